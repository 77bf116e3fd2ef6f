"""Messages: one line that names options, and suggests only what exists for the class that was chosen."""

from collections.abc import Callable

import pytest

from fedamm_pl import FedAMM
from fedamm_pl.cli.main import main
from fedamm_pl.cli.messages import one_line, option_names, unknown_class
from fedamm_pl.cli.options import GROUPS, options_of
from fedamm_pl.hints import similar

RUN = ["--algorithm", "FedAvg", "--federation.num_rounds", "1"]

Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """What the program says as it refuses a command line, in one line."""

    def refusal(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(words)
        printed = capsys.readouterr()
        assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
        return printed.err.removeprefix("fedamm: error: ").rstrip("\n")

    return refusal


# Options that do not exist


def test_option_of_another_method_is_not_suggested(refusal: Refusal) -> None:
    said = "FedAvg has no option meta_lr (FedAMM has); its options are model, lr, momentum, weight_decay, local_optimizer, rho"
    assert refusal(*RUN, "--algorithm.meta_lr", "0.1") == said
    assert refusal(*RUN, "--algorithm.meta_lr=0.1") == said
    assert refusal(*RUN, "--algorithm.dict_kwargs.meta_lr=0.1") == said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--algorithm.momentu", "0"], "FedAvg has no option momentu; did you mean --algorithm.momentum?"),
        (["--algorithm.LR", "0"], "FedAvg has no option LR; did you mean --algorithm.lr?"),
        (["--algorithm.num_clients", "3"], "FedAvg has no option num_clients; did you mean --data.num_clients?"),
        (["--data.lr", "1"], "FederatedDataModule has no option lr; did you mean --algorithm.lr?"),
        (["--data.num_client", "1"], "FederatedDataModule has no option num_client; did you mean --data.num_clients?"),
        (["--federation.num_round", "1"], "unknown option federation.num_round; did you mean --federation.num_rounds?"),
        (["--federation.client_timeout", "1"], "unknown option federation.client_timeout; did you mean --executor.client_timeout?"),
        (["--federation.xyz", "1"], "unknown option federation.xyz; see --federation.help"),
        (["--trainer.presicion", "1"], "unknown option trainer.presicion; did you mean --trainer.precision?"),
        (["--output.folder", "x"], "unknown option output.folder; see --output.help"),
        (["--executor.client_timeout", "1"], "Sequential has no option client_timeout (Processes, Ray have); see --executor.help"),
        (
            ["--executor", "Processes", "--executor.worker", "2"],
            "Processes has no option worker; did you mean --executor.num_workers?",
        ),
        (["--lr", "1"], "unknown option lr; did you mean --algorithm.lr?"),
        (["--num_rnds", "1"], "unknown option num_rnds; did you mean --federation.num_rounds?"),
        (["--qwertz"], "unknown option qwertz; see --help"),
        (["stray"], "unknown option stray; see --help"),
    ],
)  # fmt: skip
def test_suggestion_exists_for_what_was_chosen(words: list[str], expected: str, refusal: Refusal) -> None:
    assert refusal(*RUN, *words) == expected


def test_option_before_its_class_is_told_so(refusal: Refusal) -> None:
    said = refusal("--federation.num_rounds", "1", "--algorithm.meta_lr", "0.1", "--algorithm", "FedAMM")
    assert said.startswith("Expected --algorithm before --algorithm.meta_lr")


def test_comparison_and_report_have_options_of_their_own(refusal: Refusal) -> None:
    assert refusal("compare", "--job", "2") == "unknown option job; did you mean --jobs?"
    assert refusal("compare", "--lr", "1") == "unknown option lr; see --help"
    assert refusal("report", "x", "--outpt", "1") == "unknown option outpt; did you mean --output?"


# Classes that do not exist


def test_class_in_other_letters_is_suggested(refusal: Refusal) -> None:
    assert refusal(*RUN, "--algorithm", "fedamm").endswith("got fedamm; did you mean FedAMM?")
    assert refusal(*RUN, "--executor", "processes").endswith("got processes; did you mean Processes?")


def test_class_names_are_those_that_are_offered() -> None:
    message = unknown_class("executor", "Threads")
    assert (
        message
        == "Expected --executor to be one of Sequential, Processes, Ray, Vectorized or the import path of your own Executor, got Threads"
    )
    assert "ClassPriorModule" not in unknown_class("algorithm", "x")


# What the library says


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Expected `lr` to be above 0, got 0.", "Expected --algorithm.lr to be above 0, got 0."),
        ("Expected `output_dir` to be x", "Expected --output.dir to be x"),
        ("Expected `seed` to be x", "Expected --seed to be x"),
        ("Expected `nothing` to be x", "Expected `nothing` to be x"),
        ("two\n  lines\n - and `num_rounds`", "two lines and --federation.num_rounds"),
        ("Call to compute_fn of link 'x' (y) failed: no data", "no data"),
        ('Parser key "num_clients":\n  Expected a <class \'int\'>. Got value: x', "Expected --data.num_clients to be int, got x"),
    ],
)  # fmt: skip
def test_parameters_become_options(message: str, expected: str) -> None:
    assert one_line(message) == expected


def test_every_option_has_a_name() -> None:
    names = option_names()
    for group, base in GROUPS.items():
        for name in options_of(base):
            assert names[name] == f"--{group}.{name}"
    assert names["meta_lr"] == "--algorithm.meta_lr"
    assert names["client_timeout"] == "--executor.client_timeout"
    assert option_names(FedAMM)["lr"] == "--algorithm.lr"
    assert "num_classes" not in names


def test_nothing_is_similar_to_what_is_far_away() -> None:
    assert similar("xyz", ["FedAMM", "FedAvg"]) is None
