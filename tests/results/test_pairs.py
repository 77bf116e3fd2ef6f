"""Which runs make a pair, what is said of those left out, and what the tables, files and pages of a comparison say of differences."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fedamm_pl.results.comparison import CompareConfig, PlannedRun, plan
from fedamm_pl.results.comparison_files import over_all, write_results
from fedamm_pl.results.comparison_files import rows as finished_rows
from fedamm_pl.results.paired_figures import forest, rank_diagram
from fedamm_pl.results.paired_tables import difference_cells, rank_cells
from fedamm_pl.results.pairs import Paired, Ranks, compared, default_reference, few_seeds, pair, rank
from tests.results.drawn import check_layout, labels
from tests.results.handmade import a_run, a_summary
from tests.results.pages import page

GROUPS = ("all", "few")


def a_row(method: str, seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    results = {f"{kind}/{group}": accuracy for kind in ("final", "best", "mean_last_10") for group in GROUPS}
    return {"method": method, "seed": seed, "num_averaged": 10, **results, **changes}


def rows(**accuracies: list[float]) -> list[dict[str, Any]]:
    """Rows of method=[accuracy of seed 0, of seed 1, ...]."""
    return [a_row(name, seed, value) for name, found in accuracies.items() for seed, value in enumerate(found)]


THREE = {"FedProx": [61.0, 62.0, 63.0], "FedAvg": [60.0, 60.0, 60.0], "Moon": [60.0, 61.0, 58.0]}


def test_differences_are_seed_by_seed_from_fedavg() -> None:
    found = pair(rows(**THREE), {})
    assert (found.reference, found.seeds) == ("FedAvg", [0, 1, 2])
    assert list(found.differences) == ["mean_last_10/all", "mean_last_10/few"]
    by_method = found.differences["mean_last_10/all"]
    assert list(by_method) == ["FedProx", "Moon"]
    prox, moon = by_method.values()
    assert (prox.values, prox.mean, prox.p, prox.holm) == ([1, 2, 3], 2, 0.25, 0.5)
    assert prox.interval == pytest.approx((-0.484, 4.484), abs=1e-3)  # 2 ± 4.303 / sqrt(3)
    assert (moon.values, moon.p, moon.holm, moon.wilcoxon) == ([0, 1, -2], 1, 1, 1)
    assert found.forest.keys() == {"all", "few"}
    assert [note.partition(",")[0] for note in found.notes] == ["With 3 seeds no p value can be below 0.25 (2/2^3)"]


def test_only_the_seeds_that_all_share_are_paired_whatever_their_order() -> None:
    found = pair([*rows(FedAvg=[60, 61, 62]), *(a_row("FedProx", seed, 60.0 + 2 * seed) for seed in (7, 2, 1))], {})
    assert found.seeds == [1, 2]
    assert found.differences["mean_last_10/all"]["FedProx"].values == [62 - 61, 64 - 62]


@pytest.mark.parametrize(
    ("found", "left_out", "reference", "note"),
    [
        (rows(FedAvg=[60], FedProx=[61]), {}, None, "at least 2 seeds must be shared by all methods, and these share only 0."),
        ([a_row("FedAvg", 0, 60), a_row("FedProx", 1, 60)], {}, None, "must be shared by all methods, and these share none."),
        (rows(**THREE), {"FedAvg": "seed 1 diverged"}, "FedAvg", "differences: the reference, FedAvg, has no complete runs."),
        (rows(FedAvg=[60, 61], A=[60, 61]), {"A": "seed 1 diverged"}, None, "only FedAvg has complete runs."),
        ([], {"A": "seed 0 is not finished", "B": "seed 0 is not finished"}, None, "No paired differences: the reference, A"),
    ],
)  # fmt: skip
def test_where_nothing_is_paired_one_line_says_why(
    found: list[dict[str, Any]], left_out: dict[str, str], reference: str | None, note: str
) -> None:
    paired = pair(found, left_out, reference)
    assert paired.differences == {}
    assert len(paired.notes) == 1 + len(left_out)
    assert note in paired.notes[-1]
    for name, why in left_out.items():
        assert f"Left out of the paired differences: {name} ({why})." in paired.notes


def test_one_method_has_no_differences_and_nobody_expects_any() -> None:
    assert pair(rows(FedAvg=[60, 61]), {}).notes == []
    assert pair([], {}).notes == []


def test_methods_left_out_are_no_part_of_the_others_pairs_and_of_holms_number() -> None:
    found = pair(rows(**THREE), {"Moon": "seed 2 diverged"})
    (prox,) = found.differences["mean_last_10/all"].values()
    assert prox.holm == prox.p == 0.25
    assert found.notes[0] == "Left out of the paired differences: Moon (seed 2 diverged)."


def test_the_best_is_compared_where_it_is_of_a_validation_set() -> None:
    chosen = [row | {"best_on": "validation"} for row in rows(**THREE)]
    assert [key.partition("/")[0] for key in pair(chosen, {}).columns] == ["mean_last_10"] * 2 + ["best"] * 2
    chosen[0].pop("best_on")
    assert [key.partition("/")[0] for key in pair(chosen, {}).columns] == ["mean_last_10"] * 2


def test_reference_is_fedavg_or_the_first() -> None:
    assert default_reference(["a", "FedAvg"]) == "FedAvg"
    assert default_reference(["a", "b"]) == "a"
    assert default_reference(["a", "FedAvgM", "FedAvg, lr 1"]) == "FedAvg, lr 1"
    assert pair(rows(**THREE), {}, "Moon").reference == "Moon"


def test_many_seeds_need_no_warning() -> None:
    assert list(few_seeds(6, 1)) == []
    assert "nor below 0.062 after Holm's correction for 2 methods" in next(few_seeds(6, 2))
    assert next(few_seeds(6, 2)).endswith("takes 7 seeds or more.")
    assert list(few_seeds(17, 40)) == []


def test_cells_have_a_block_for_each_group_and_a_line_for_each_method() -> None:
    head, *lines = difference_cells(pair(rows(**THREE), {}))
    assert [text for text, _ in head] == ["method", "minus FedAvg", "95 % interval", "p", "p, Holm", "p, Wilcoxon", "within 0.5"]  # fmt: skip
    assert [line[0] for line in lines[::3]] == [("all, mean of last 10", True), ("few, mean of last 10", True)]
    assert [text for text, _ in lines[1]][:6] == ["FedProx", "+2.0", "-0.5 to +4.5", "0.250", "0.500", "0.250"]
    assert {len(line) for line in (head, *lines)} == {7}


# Ranks over settings.


def three_settings() -> list[Paired]:
    return [pair(rows(**THREE), {}, setting=name) for name in "abc"]


def test_ranks_are_of_the_methods_that_all_settings_have() -> None:
    found = rank(three_settings())
    assert found is not None
    assert (found.num_settings, found.methods) == (3, ["FedProx", "FedAvg", "Moon"])
    assert found.ranks == {"all": [1, 2, 3], "few": [1, 2, 3]}  # means 62, 60, 59.7
    assert found.friedman["all"] == pytest.approx(0.0498, abs=1e-4)  # exp(-3)
    assert [text for text, _ in rank_cells({"": found})[1]] == ["FedProx", "1.00", "1.00"]
    assert [text for text, _ in rank_cells({"": found})[-1]] == ["Friedman, p", "0.050", "0.050"]


def test_two_methods_or_one_setting_have_no_ranks() -> None:
    settings = three_settings()
    assert rank(settings[:1]) is None
    assert rank([]) is None
    assert rank([*settings[:1], pair(rows(**THREE), {"Moon": "seed 0 diverged"})]) is None
    assert rank([*settings[:1], pair(rows(FedAvg=[60], FedProx=[61], Moon=[62]), {})]) is None


# Figures.


@pytest.mark.parametrize("num_methods", [2, 16])
def test_forest_has_zero_a_band_and_its_layout(num_methods: int) -> None:
    found = {f"MetaFineTune † {index}": [60.0 + index, 61.0, 63.0] for index in range(num_methods)}
    groups = {group: compared(found, "MetaFineTune † 0") for group in ("all", "many", "medium", "few")}
    panels = {f"data.partition {name}, data.imbalance_factor 0.01": groups for name in ("by_num_classes", "iid")}
    figure = forest(panels, dict.fromkeys(panels, "MetaFineTune † 0"))
    check_layout({"forest": figure})
    axes = figure.axes[0]
    assert axes.patches[0].get_extents().transformed(axes.transData.inverted()).intervalx == pytest.approx((-0.5, 0.5))
    assert len(axes.lines) == 1 + 3 * (num_methods - 1)
    assert list(axes.lines[2].get_xdata()) == list(groups["all"]["MetaFineTune † 1"].interval)
    assert figure.get_supxlabel().startswith("test accuracy minus that of MetaFineTune † 0")


def test_diagram_of_ranks_has_names_ranks_and_its_layout() -> None:
    methods = [f"MetaFineTune † {index}" for index in range(16)]
    spread = [1.0 + index for index in range(16)]
    figures = {
        "wide": rank_diagram({"": Ranks(40, methods, {"all": spread, "few": [8.5] * 16}, {"all": 1e-9, "few": 1.0})}),
        "narrow": rank_diagram({"": Ranks(2, methods[:3], {"all": spread[:3]}, {"all": 0.135})}),
    }
    check_layout(figures)
    texts = [text.get_text() for text in figures["wide"].axes[0].texts]
    assert f"{methods[3]}  4.00" in texts
    assert (
        "critical difference 3.65" in texts
    )  # 4.993 / sqrt(2) · sqrt(16 · 17 / 240) is 3.65: q of 16 is 4.85 / sqrt(2)
    assert "Friedman p 1e-09" in labels(figures["wide"])
    for figure in figures.values():
        FigureCanvasAgg(figure).draw()


# The files of a comparison.


def a_comparison(folder: Path, accuracies: dict[str, list[float]], **options: Any) -> list[PlannedRun]:
    """Runs that are finished, their accuracies method -> of each seed; a negative one has not finished."""
    config = CompareConfig(
        **{"base": {}, "methods": dict.fromkeys(accuracies), "seeds": list(range(len(accuracies["FedAvg"]))), **options}
    )
    runs = plan(config, folder, lambda whole: (yaml.safe_dump(whole), 3))
    for run in runs:
        value = accuracies[run.method][run.seed]
        if value >= 0:
            results: dict[str, Any] = {"test/loss": 1.0, "test/acc": value}
            best = {name: {"value": number, "round": 3} for name, number in results.items()}
            run.folder.mkdir(parents=True, exist_ok=True)
            summary = a_summary(final=results, best=best, mean_last_10=results, num_rounds=3)
            (run.folder / "summary.json").write_text(json.dumps(summary))
    return runs


FOUND = {"FedAvg": [0.60, 0.61], "FedProx": [0.62, 0.64], "Moon": [0.5, 0.5]}


def test_a_comparison_says_prints_and_draws_differences_and_ranks(tmp_path: Path) -> None:
    runs = a_comparison(tmp_path, FOUND, grid={"data.partition": ["iid", "by_shards"]})
    text = write_results(tmp_path, runs)
    assert text.count("Paired differences from FedAvg, over the seeds 0, 1.") == 3
    assert text.count("| FedProx | +2.5 | -3.9 to +8.9 | 0.500 | 1.000 | 0.500 | 0.03 |") == 3  # ± 12.706 · 0.5
    assert text.count("With 2 seeds no p value can be below 0.5") == 3
    assert "| FedProx | 1.00 |" in text
    assert "Mean ranks of the methods over 2 settings" in text
    assert text.count("All of this is about further seeds on the same data") == 1
    with (tmp_path / "results_paired.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["data.partition"] for line in lines] == ["iid"] * 2 + ["by_shards"] * 2 + [""] * 2
    assert [line["method"] for line in lines] == ["FedProx", "Moon"] * 3
    assert float(lines[0]["difference"]) == pytest.approx(2.5)
    assert float(lines[0]["p_holm"]) == 1.0
    assert r"FedProx & +2.5 & -3.9 to +8.9" in (tmp_path / "results.tex").read_text()
    for name in ("results_paired", "results_ranks"):
        for kind in ("pdf", "png"):
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 1000


def test_the_mean_over_settings_is_that_of_each_seed(tmp_path: Path) -> None:
    runs = a_comparison(tmp_path, FOUND, grid={"data.partition": ["iid", "by_shards"]})
    for run in runs:
        if run.method == "FedProx" and run.setting["data.partition"] == "iid":
            shutil.copy(run.folder.parent.parent / "Moon" / run.folder.name / "summary.json", run.folder)
    members, paired = over_all(runs, finished_rows(runs)) or ([], None)
    assert {(row["method"], row["seed"]): row["mean_last_10/all"] for row in members} == pytest.approx(
        {
            ("FedAvg", 0): 60.0,
            ("FedAvg", 1): 61.0,
            ("FedProx", 0): 56.0,  # (50 + 62) / 2
            ("FedProx", 1): 57.0,
            ("Moon", 0): 50.0,
            ("Moon", 1): 50.0,
        }
    )
    assert paired is not None
    assert paired.differences["mean_last_10/all"]["FedProx"].values == pytest.approx([-4.0, -4.0])
    (runs[-1].folder / "summary.json").unlink()
    members, paired = over_all(runs, finished_rows(runs)) or ([], None)
    assert sum(row["method"] == "Moon" for row in members) == 1
    assert paired is not None
    assert paired.notes[0] == (
        "Left out of the paired differences: Moon (data.partition by_shards, seed 1 is not finished)."
    )


def test_one_setting_has_no_mean_over_settings(tmp_path: Path) -> None:
    runs = a_comparison(tmp_path, FOUND, grid={"data.partition": ["iid"]})
    assert over_all(runs, finished_rows(runs)) is None
    (first, *_) = runs = a_comparison(tmp_path / "two", FOUND, grid={"data.partition": ["iid", "by_shards"]})
    half = [row for row in finished_rows(runs) if row["data.partition"] == first.setting["data.partition"]]
    assert over_all(runs, half) is None


def test_unfinished_and_diverged_methods_are_named_and_in_no_pair(tmp_path: Path) -> None:
    runs = a_comparison(tmp_path, {**FOUND, "Moon": [0.5, -1.0], "FedLC": [0.5, 0.6]})
    path = runs[-1].folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"diverged": {"round": 3, "reason": "the loss is nan"}}))
    text = write_results(tmp_path, runs)
    assert "Left out of the paired differences: Moon (seed 1 is not finished)." in text
    assert "Left out of the paired differences: FedLC (seed 1 diverged)." in text
    assert "| Moon | +" not in text
    assert "| Moon † | 1 |" in text  # the table of accuracies has what there is
    assert "| FedProx | +2.5 |" in text


def test_what_cannot_be_said_any_more_is_removed(tmp_path: Path) -> None:
    write_results(tmp_path, a_comparison(tmp_path, FOUND, grid={"data.partition": ["iid", "by_shards"]}))
    assert len(list(tmp_path.glob("results_*"))) == 5
    fewer = a_comparison(tmp_path, FOUND, grid={"data.partition": ["iid"]}, seeds=[1])
    assert (
        "No paired differences: at least 2 seeds must be shared by all methods, and these share only 1."
        in write_results(tmp_path, fewer)
    )
    assert not list(tmp_path.glob("results_*"))


def test_the_reference_may_be_chosen_and_must_be_a_method(tmp_path: Path) -> None:
    assert "minus Moon" in write_results(tmp_path, a_comparison(tmp_path, FOUND), "Moon")
    with pytest.raises(ValueError, match=r"Expected `reference` to be one of `methods`, FedAvg, Moon, got FedProx\."):
        CompareConfig(base={}, methods={"FedAvg": None, "Moon": None}, reference="FedProx")


# The page of several runs.


def test_a_page_has_the_differences(six: list[Path]) -> None:
    found = page(*six)
    assert "Paired differences" in found.texts["h2"]
    assert "Paired differences from FedAvg, over the seeds 0, 1." in found.texts["p"]
    head, block, first, *_ = found.tables[2]
    assert head[1] == "minus FedAvg"
    assert block[0] == "all, mean of last 3"
    assert first[0] == "FedAMM, meta_update asynchronous"


def test_runs_on_other_data_are_no_pairs(copied: Callable[..., Path]) -> None:
    folders = [copied(method, f"{method}{seed}", seed) for method in ("FedAMM", "FedAvg") for seed in (0, 1)]
    for folder in folders[:2]:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["data"]["init_args"]["num_clients"] = 3
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert "Paired differences" not in page(*folders).texts["h2"]


def test_a_seed_twice_a_stopped_and_a_diverged_run_are_named(tmp_path: Path) -> None:
    folders = [a_run(tmp_path / f"avg{seed}", seed=seed, method="FedAvg") for seed in (0, 1)]
    folders += [a_run(tmp_path / f"prox{seed}", seed=seed, method="FedProx") for seed in (0, 1)]
    folders += [a_run(tmp_path / f"twice{index}", seed=0, method="Moon") for index in (0, 1)]
    folders.append(a_run(tmp_path / "stopped", seed=1, method="FedLC", stopped="it is late"))
    folders.append(a_run(tmp_path / "apart", seed=1, method="FedRS", diverged={"round": 2, "reason": "nan"}))
    notes = page(*folders).texts["p"]
    for text in ("Moon (2 runs of seed 0)", "FedLC (seed 1 stopped)", "FedRS (seed 1 diverged)"):
        assert f"Left out of the paired differences: {text}." in notes
    assert [line[0] for line in page(*folders).tables[2][2::2]] == ["FedProx"] * 2
