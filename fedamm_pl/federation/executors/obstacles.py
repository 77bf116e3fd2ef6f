"""Determines from a method's class whether its clients can train, and ask the server, in parallel."""

from pytorch_lightning.core.hooks import DataHooks, ModelHooks

from fedamm_pl.protocol.module import FederatedModule

FIT_HOOKS = sorted(
    {
        name
        for name in {**vars(ModelHooks), **vars(DataHooks)}
        if not name.startswith("_")
        and not any(part in name for part in ("valid", "test", "predict", "dataloader", "save"))
    }
    - {"on_train_start"}
    | {"training_step", "backward", "configure_optimizers", "configure_gradient_clipping", "optimizer_step"}
    | {"configure_callbacks", "optimizer_zero_grad", "lr_scheduler_step", "forward", "track", "log_means"}
    | {"sgd", "local_sgd"}
)
"""Names of methods that run in a Lightning fit, but not in parallel training."""


def obstacle(module: FederatedModule, *, compiles: bool = False) -> str | None:
    """Return why the clients of a method cannot train in parallel, or None if its class and options allow it.

    Args:
        module: The method.
        compiles: Whether its network will be compiled.
    """
    if module.asks_in_fit:
        return "its clients ask the server in the middle of a fit"
    kind = type(module)
    declared = next(base for base in kind.__mro__ if "plain_steps" in vars(base))
    if own := [name for name in FIT_HOOKS if getattr(kind, name) is not getattr(declared, name)]:
        return f"its steps are more than SGD on an objective of each example, it has {', '.join(own)} of its own"
    if not module.plain_steps or module.hparams.get("local_optimizer", "sgd") != "sgd":
        return "its steps are more than SGD on an objective of each example"
    if compiles or module.compiles:
        return "a compiled network cannot be trained side by side"
    return None


def asks_at_once(module: FederatedModule) -> bool:
    """Return whether a method's clients can ask the server together, by :meth:`questions` instead of :meth:`question`.

    They can if the class that defines ``questions`` also has the ``question``, ``answer`` and ``take_answer`` in use,
    and clients have no personal state.
    """
    kind = type(module)
    declared = next(base for base in kind.__mro__ if "questions" in vars(base))
    return (
        declared is not FederatedModule
        and not module.personal
        and all(getattr(kind, name) is getattr(declared, name) for name in ("question", "answer", "take_answer"))
    )
