"""The content of ``summary.json`` and ``diagnostics.json``, described once for typing, checking and the reference."""

from typing import Annotated, Any

from typing_extensions import NotRequired, TypedDict  # in typing from Python 3.11 on

from fedamm_pl.algorithms.meta.tallies import FAMILY_CURVES
from fedamm_pl.federation.summary import SHOWN
from fedamm_pl.kinds import MAX_TEXT, Kind, fields, flag, items, mapping, nullable, number, text, whole

MAX_CLASSES, MAX_CLIENTS, MAX_ROUNDS, MAX_GROUPS = 50_000, 1_000_000, 1_000_000, 100
"""Limits above anything that a run contains; ImageNet-21k has 21,841 classes."""
MAX_COLUMNS = 2 * MAX_CLASSES + 2_000  # on the test set and on the validation set

ACCURACIES = ("test/acc", "val/acc", "local/acc")
SHARE = number(0, 1)
OTHER_ACCURACY, OTHER_METRIC = nullable(number(-1e6, 1e6)), nullable(number(-1e308, 1e308))


def metric(name: str) -> Kind:
    """Describe the value of a metric; the loss of a model that has diverged is null."""
    return SHARE if name in SHOWN else OTHER_ACCURACY if name.startswith(ACCURACIES) else OTHER_METRIC


def best(name: str) -> Kind:
    """Describe the best value of a metric and its round."""
    return fields({"value": metric(name), "round": whole(MAX_ROUNDS)})


def all_of(kind: Kind) -> Kind:
    """Describe a mapping from a few names to values of one kind."""
    return mapping(lambda _: kind, MAX_GROUPS)


COUNT, AMOUNT, LONG = whole(), number(0), text(MAX_TEXT)
CLASS_COUNTS = items(COUNT, MAX_CLASSES)
MEMBERS = all_of(CLASS_COUNTS)
SEEN = nullable(items(nullable(number(-1e9, 1e9)), MAX_CLASSES))
HARDWARE: Kind = lambda value: (whole() if isinstance(value, int) else text())(value)  # noqa: E731
WAYS = dict.fromkeys(("received", "sent", "received_per_client", "sent_per_client"), AMOUNT)
CURVE = fields(
    {"round": items(whole(MAX_ROUNDS), MAX_ROUNDS), "bytes": items(AMOUNT, MAX_ROUNDS)},
    dict.fromkeys((*SHOWN, "val/acc"), items(SHARE, MAX_ROUNDS)),
)
ROUND = fields(
    {"round": whole(MAX_ROUNDS), "bytes": AMOUNT, "seconds": all_of(AMOUNT), "client_seconds": all_of(AMOUNT)},
    dict.fromkeys(("weight_curve", *FAMILY_CURVES, "weight_per_class", "loss_histogram"), SEEN),
)

Metrics = dict[str, float]


class Summary(TypedDict):
    """The content of ``summary.json``: the results of a run. Accuracies are fractions of 1.

    Fields that files of earlier versions may lack, and fields that some runs do not have, are not required.
    """

    final: Annotated[Metrics, mapping(metric, MAX_COLUMNS)]
    """Metric -> its value in the last evaluation."""
    best: Annotated[dict[str, dict[str, float]], mapping(best, MAX_COLUMNS)]
    """Metric -> its best ``value`` and the ``round`` of it; see ``best_is``."""
    mean_last_10: Annotated[Metrics, mapping(metric, MAX_COLUMNS)]
    """Metric -> its mean over the last ``num_averaged`` evaluations, round 0 excluded."""
    num_averaged: NotRequired[Annotated[int, whole(MAX_ROUNDS)]]
    """Ten, or the number of evaluations if it is smaller."""
    best_is: NotRequired[Annotated[str, LONG]]
    """How ``best`` was chosen, and on which set, in words."""
    method: Annotated[str, text()]
    """Name of the algorithm's class."""
    uses_meta_set: Annotated[bool, flag]
    """Whether the method uses the server's balanced examples."""
    model: NotRequired[Annotated[str, text()]]
    """Name of the network."""
    num_parameters: NotRequired[Annotated[int, COUNT]]
    """Parameters of the network."""
    num_rounds: Annotated[int, whole(MAX_ROUNDS)]
    """Number of completed rounds."""
    failed_clients: Annotated[int, COUNT]
    """Clients that failed in a round, over all rounds."""
    refused_updates: Annotated[int, COUNT]
    """Updates that the server refused, over all rounds."""
    failed_rounds: Annotated[int, COUNT]
    """Rounds that failed and left the global model unchanged."""
    resumes: Annotated[int, COUNT]
    """How often the run was continued."""
    diverged: NotRequired[
        Annotated[dict[str, Any] | None, nullable(fields({"round": whole(MAX_ROUNDS), "reason": LONG}))]
    ]
    """The ``round`` in which the global model was first found to have diverged, and the ``reason``; else null."""
    stopped: Annotated[str | None, nullable(LONG)]
    """Why the run stopped, if too many rounds in a row failed or none succeeded; else null."""
    ended: Annotated[str | None, nullable(LONG)]
    """Why a callback or early stopping ended the run; null if none did."""
    seed: Annotated[int, COUNT]
    """The run's seed."""
    dataset: Annotated[str, text()]
    """Name of the data set."""
    class_counts: NotRequired[Annotated[list[int], CLASS_COUNTS]]
    """Training examples of each class, over all clients."""
    unused_images: NotRequired[Annotated[int, COUNT]]
    """Training examples that the partition leaves unused."""
    validation_examples: NotRequired[Annotated[int, COUNT]]
    """Examples of the validation set, if there is one."""
    local_test_examples: NotRequired[Annotated[int, COUNT]]
    """Examples that clients hold out for their local tests, if they do."""
    clients_without_local_test: NotRequired[Annotated[int, COUNT]]
    """Clients too small to hold out any."""
    shot_rule: NotRequired[Annotated[str, text()]]
    """How classes are grouped into many, medium and few."""
    shot_groups: NotRequired[Annotated[dict[str, list[int]], MEMBERS]]
    """Group -> its classes."""
    imbalance_factor: Annotated[float, SHARE]
    """Smallest over largest of ``class_counts``."""
    IF: Annotated[float | None, nullable(number(1))]
    """The reciprocal of ``imbalance_factor``; null if a class has no examples."""
    normalization: NotRequired[dict[str, Any]]
    """``mean`` and ``std`` by which inputs were standardised."""
    bytes_per_round: Annotated[dict[str, float], fields(WAYS)]
    """Mean tensor bytes ``received`` and ``sent`` per round by all clients, and ``..._per_client``."""
    seconds_per_round: Annotated[dict[str, float], all_of(AMOUNT)]
    """Mean wall time per round by kind of work."""
    client_seconds_per_round: Annotated[dict[str, float], all_of(AMOUNT)]
    """Mean time per round added up over its clients, which exceeds the wall time if several train at once."""
    hardware: NotRequired[Annotated[dict[str, Any], all_of(HARDWARE)]]
    """Accelerator, processor, threads and precision."""
    versions: NotRequired[Annotated[dict[str, str], all_of(text())]]
    """Library -> its version."""
    command: NotRequired[Annotated[str, LONG]]
    """The command that started the run."""
    curve: NotRequired[Annotated[dict[str, list[float]], CURVE]]
    """``round``, ``bytes`` exchanged so far, and accuracies, one for each evaluated round."""


class Diagnostics(TypedDict):
    """The content of ``diagnostics.json``: what the figures need besides ``metrics.csv``."""

    class_names: Annotated[list[str], items(text(), MAX_CLASSES)]
    """Names of the classes."""
    class_counts: Annotated[list[int], CLASS_COUNTS]
    """Training examples of each class, over all clients."""
    shot_groups: Annotated[dict[str, list[int]], MEMBERS]
    """Group -> its classes."""
    client_class_counts: NotRequired[Annotated[list[list[int]] | None, nullable(items(CLASS_COUNTS, MAX_CLIENTS))]]
    """Training examples of each client by class."""
    client_names: NotRequired[Annotated[list[str] | None, nullable(items(text(), MAX_CLIENTS))]]
    """Names of the clients."""
    losses: NotRequired[Annotated[list[float] | None, nullable(items(number(0, 1e9), MAX_CLASSES))]]
    """Losses at which ``weight_curve`` and ``loss_histogram`` of ``rounds`` are given, in nats."""
    confusion: NotRequired[Annotated[list[list[int]] | None, nullable(items(CLASS_COUNTS, MAX_CLASSES))]]
    """Test examples of the last evaluation by true class (rows) and predicted class."""
    client_accuracies: NotRequired[Annotated[list[float | None], items(nullable(SHARE), MAX_CLIENTS)]]
    """Accuracy of the global model on each client's held-out examples, in the last evaluation; null if it has none."""
    rounds: Annotated[list[dict[str, Any]], items(ROUND, MAX_ROUNDS)]
    """For each evaluated round: ``round``; ``bytes``, ``seconds`` and ``client_seconds`` so far; for a weight net its
    ``weight_curve``, the ``weight_per_class`` and a ``loss_histogram``."""
