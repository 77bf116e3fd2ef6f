"""Checks before the first round for problems that would otherwise appear, or go unnoticed, in the middle of a run."""

import torch
from torch import Tensor, nn

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.data.partitions import MIN_SIZED
from fedamm_pl.data.partitions.natural import shown_client
from fedamm_pl.federation.config import MIN_ROBUST_CLIENTS, FederationConfig
from fedamm_pl.federation.executors.base import Executor
from fedamm_pl.federation.sampling import num_sampled
from fedamm_pl.federation.server import not_optimizable
from fedamm_pl.models import attempt, deep_copy, features_and_logits, logits_of
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.seeding import drawing_from


def check_fit(module: FederatedModule, data: FederatedDataModule) -> None:
    """Check that a module and the data fit together.

    Raises:
        ValueError: If the network does not fit the images or the classes, a method that needs a meta set has none, the
            module has no normalisation or has state that is neither shared nor personal, or a client holds a single
            example and the network cannot train on one.
    """
    if not module.info:
        raise ValueError("Expected `info` of the module to be data.info, which normalises the examples, got none.")
    if module.uses_meta_set and data.hparams["num_meta_per_class"] < 1:
        raise ValueError(
            f"Expected `num_meta_per_class` to be 1 or more for {type(module).__name__}, "
            f"got {data.hparams['num_meta_per_class']}."
        )
    covered = (*module.shared, *module.personal)
    if private := sorted(name for name in module.state_dict() if not name.startswith(covered)):
        raise ValueError(
            f"Expected `shared` and `personal` of {type(module).__name__} to cover the whole state, got {covered} without "
            f"{private[0]}: it would leak from one client to the next. What stays at a client is `personal`."
        )
    _check_parameters(module)
    sizes = [data.client_size(client) for client in range(data.num_clients)]
    single = None
    if 1 in sizes:
        sized = data.hparams["partition"] in MIN_SIZED
        remedy = "`min_client_size` to be 2 or more" if sized else "`partition` to give each client 2 or more examples"
        single = remedy, shown_client(sizes.index(1), data.client_names)
    _check_network(module, data.images.train_images[:1], data.num_classes, single)
    module.check((data.images.train_images[:8], data.images.train_labels[:8]))


def check_options(
    module: FederatedModule, data: FederatedDataModule, config: FederationConfig, executor: Executor
) -> None:
    """Check options against each other.

    Raises:
        ValueError: If an aggregation has too few clients or cannot protect what the method's clients send, the method
            does not support a server optimizer, its clients ask questions during local training but the executor cannot
            answer them, or early stopping has no validation set.
    """
    method, sampled = type(module).__name__, num_sampled(data.num_clients, config.client_fraction)
    if config.robust and sampled < MIN_ROBUST_CLIENTS:
        raise ValueError(
            f"Expected `client_fraction` to give {MIN_ROBUST_CLIENTS} or more clients a round for the aggregation "
            f"{config.aggregation}, got {config.client_fraction} of {data.num_clients} clients."
        )
    sums = [prefix for prefix, reduction in module.returned.items() if reduction == "sum"]
    if config.robust and sums:
        raise ValueError(
            f"Expected `aggregation` to be num_examples or uniform for {method}, got {config.aggregation}: it cannot protect "
            f"the sums that its clients send ({', '.join(sums)})."
        )
    if config.server_optimizer != "none" and not module.optimizable:
        raise ValueError(not_optimizable(module, config.server_optimizer))
    if module.asks_in_fit and not executor.can_ask:
        raise ValueError(
            f"Expected `executor` to be one that answers clients during local training for {method} with these options, "
            f"got {type(executor).__name__}, which cannot."
        )
    if config.early_stopping is not None and not data.has_validation:
        raise ValueError(
            f"Expected `num_val_per_class` to be 1 or more, or data with a validation set, for `early_stopping` "
            f"{config.early_stopping}, got none: the test set is not used for it."
        )


def check_compiles(module: FederatedModule, data: FederatedDataModule) -> None:
    """Call the compiled network once, on a batch of the test set.

    Raises:
        ValueError: If it cannot be compiled here.
    """
    images, _ = next(iter(data.test_dataloader()))
    was_training = module.training
    try:
        with torch.inference_mode():
            module.eval()(images)
    except Exception as error:  # a missing compiler, or code that it does not support
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"Expected `compile` to be false, and `model` to be given uncompiled, where it cannot be compiled: {reason:.200}"
        ) from error
    finally:
        module.train(was_training)


def _check_parameters(module: FederatedModule) -> None:
    parameters = dict(module.model.named_parameters())
    if not any(value.requires_grad for value in parameters.values()):
        raise ValueError(
            f"Expected `model` to have parameters that train, got {module.network_name} with {len(parameters)}, none of them."
        )
    if computed := [name for name, value in parameters.items() if not value.is_leaf]:
        raise ValueError(
            f"Expected `model` to have parameters that an optimizer can move also in a copy of it, got {module.network_name} "
            f"({type(module.model).__name__}), whose {computed[0]} is computed."
        )
    if others := [name for name, value in parameters.items() if not value.is_floating_point()]:
        raise ValueError(
            f"Expected `model` to have real parameters, got {module.network_name} with {others[0]} of "
            f"{str(parameters[others[0]].dtype).removeprefix('torch.')}."
        )


def _check_network(module: FederatedModule, image: Tensor, num_classes: int, single: tuple[str, str] | None) -> None:
    """Pass images through a copy of the network, in both modes, forwards and backwards; random states are unchanged.

    Args:
        module: Has the network.
        image: An image of the data, shape (1, in_channels, H, W).
        num_classes: Number of classes C.
        single: The remedy and the name of the client for the error message, if a client holds a single example.
    """
    device = module.device
    image = module.prepare(image.to(device))
    with drawing_from(0, device):
        network = deep_copy(module.model).eval()
        with torch.no_grad():
            _check_logits(_logits(module, network, image, "take"), module, num_classes, image.dtype)
            if module.uses_features:
                features_and_logits(network, image)
        network.train()
        with torch.enable_grad():
            pair = torch.cat([image, image])
            logits = _logits(module, network, pair, "train on")
            attempt(logits.sum().backward, image, module.network_name, "train on")
            if module.uses_features:
                features_and_logits(network, pair)
        if single is not None:
            _check_single_example(module, network, image, *single)


def _logits(module: FederatedModule, network: nn.Module, images: Tensor, verb: str) -> Tensor:
    return logits_of(attempt(lambda: network(images), images, module.network_name, verb))


def _check_logits(logits: Tensor, module: FederatedModule, num_classes: int, dtype: torch.dtype) -> None:
    if logits.shape != (1, num_classes):
        raise ValueError(
            f"Expected `model` to give logits of shape (B, {num_classes}), got {module.network_name} with {tuple(logits.shape)}."
        )
    if torch.promote_types(logits.dtype, dtype) != logits.dtype:
        raise ValueError(
            f"Expected `model` to give logits as precise as the examples' {dtype}, got {module.network_name} with {logits.dtype}."
        )
    if not logits.isfinite().all():
        raise ValueError(f"Expected `model` to give finite logits, got {module.network_name} with NaN or infinity.")


def _check_single_example(module: FederatedModule, network: nn.Module, image: Tensor, remedy: str, client: str) -> None:
    try:
        with torch.no_grad():
            network(image)
    except ValueError as error:  # BatchNorm over single values
        raise ValueError(
            f"Expected {remedy} for {module.network_name}, which cannot train on a single example "
            f"({error}), got client {client} with one."
        ) from error
