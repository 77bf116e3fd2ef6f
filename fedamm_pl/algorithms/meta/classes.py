"""``KnowsClasses``: the class counts and families of FedAMM's clients, for families of classes and adjusted logits."""

from typing import Literal, get_args

from torch import Tensor

from fedamm_pl.algorithms.class_prior import check_absent
from fedamm_pl.algorithms.meta.families import families_by_size, families_of_groups
from fedamm_pl.algorithms.meta.tallies import MAX_FAMILIES
from fedamm_pl.algorithms.meta.weighing import Objective, Weighing, losses_of_objective
from fedamm_pl.protocol.classifier import require_range
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ClientSession, ServerSession

Families = Literal["global", "local", "fixed"]
WhoseCounts = Literal["local", "global"]


class KnowsClasses(FederatedModule):
    """A module whose examples are weighted by their loss, and by the family of their class if it has families.

    Abstract: a subclass must have the options ``families``, ``num_families``, ``log_counts``, ``objective``,
    ``counts``, ``tau``, ``absent``, ``gamma`` and ``detached``, call :meth:`check_weighting` in its constructor, and
    call :meth:`learn_classes` before it weights examples.
    """

    class_counts: Tensor | None
    """Number of examples of each class, shape (C,), for the objective; None if it does not need them."""
    class_families: Tensor | None
    """Family of each class, shape (C,); None without families."""
    num_outputs: int
    """Number of outputs of the weight net, one for each family."""

    def check_weighting(self) -> None:
        """Check the options, and register the buffers for class counts and families.

        Raises:
            ValueError: If an option is out of range, or ``info`` lacks the shot groups for fixed families.
        """
        options = self.hparams
        for name, known in (
            ("families", (None, *get_args(Families))),
            ("objective", get_args(Objective)),
            ("counts", get_args(WhoseCounts)),
            ("num_families", range(1, MAX_FAMILIES + 1)),
        ):
            if options[name] not in known:
                choices = ", ".join("null" if value is None else str(value) for value in known)
                raise ValueError(f"Expected `{name}` to be one of {choices}, got {options[name]!r}.")
        check_absent(options["absent"])
        require_range("tau", options["tau"], least=0)
        require_range("gamma", options["gamma"], least=0)
        for name in ("class_counts", "class_families"):
            self.register_buffer(name, None, persistent=False)
        self.num_outputs = options["num_families"] if options["families"] else 1
        if options["families"] == "fixed":
            self.num_outputs = int(fixed_families(self).max()) + 1

    @property
    def weighing(self) -> Weighing:
        """How the examples are weighted, with the classes that :meth:`learn_classes` has set last."""
        options = self.hparams
        losses = losses_of_objective(options["objective"], options["tau"], options["absent"], options["gamma"])
        return Weighing(losses, self.class_counts, self.class_families, options["detached"])

    def learn_classes(self, session: ClientSession | None) -> None:
        """Set the class counts and the families of a client.

        Args:
            session: Session of the client; None in a plain Trainer, where all counts are those in ``info``.
        """
        options, families = self.hparams, None
        adjusts = options["objective"] == "logit_adjusted"
        self.class_counts = self._counts(options["counts"], session).to(self.device) if adjusts else None
        if options["families"] == "fixed":
            families = fixed_families(self)
        elif options["families"] is not None:
            counts = self._counts(options["families"], session)
            families = families_by_size(counts, options["num_families"], options["log_counts"])
        self.class_families = None if families is None else families.to(self.device)

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model, and the class counts of all clients if they are used."""
        sent = super().broadcast(state, server)
        return {**sent, "class_counts": self.known_counts()} if self.sends_counts else sent

    @property
    def sends_counts(self) -> bool:
        """Whether the server sends the class counts of all clients along with the model."""
        options = self.hparams
        return "global" in (options["families"], options["objective"] == "logit_adjusted" and options["counts"])

    def _counts(self, whose: str, session: ClientSession | None) -> Tensor:
        if session is None:
            return self.known_counts()
        if whose == "global":
            return session.payload["class_counts"]
        return session.data.class_counts(self.hparams["num_classes"])


def fixed_families(module: FederatedModule) -> Tensor:
    """Return the family of each class according to the shot groups in ``info``, shape (C,).

    Raises:
        ValueError: If there are no shot groups, or they do not hold each class once.
    """
    if "shot_groups" not in module.info:
        raise ValueError(f"Expected `info` of {type(module).__name__} to hold shot_groups, got none.")
    return families_of_groups(module.info["shot_groups"], module.known_counts().tolist())
