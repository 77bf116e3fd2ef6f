"""Rows, tables, and their Markdown and LaTeX."""

from typing import Any

import pytest

from fedamm_pl.results.tables import (
    accuracies,
    as_latex,
    as_markdown,
    markdown_text,
    plain,
    row,
    stacked,
    table,
)
from fedamm_pl.terminal import as_csv
from tests.results.handmade import a_summary


def a_row(method: str, seed: int, accuracy: float, **options: Any) -> dict[str, Any]:
    accuracies = {f"{kind}/{group}": accuracy for kind in ("final", "best", "mean_last_10") for group in ("all", "few")}
    return {
        **options,
        "method": method,
        "seed": seed,
        "uses_meta_set": method == "FedAMM",
        **accuracies,
        "num_averaged": 10,
        "bytes_per_round": 2_500_000,
        "seconds_per_round": 1.234,
    }


def test_a_row_holds_percents_and_the_wall_time() -> None:
    found = row("mine", 3, {"data.partition": "iid"}, a_summary(resumes=2, num_averaged=3))
    assert found == {
        "data.partition": "iid",
        "method": "mine",
        "seed": 3,
        "uses_meta_set": True,
        **{f"{kind}/{name}": v for kind in ("final", "best", "mean_last_10") for name, v in (("all", 50), ("few", 25))},
        "num_averaged": 3,
        "bytes_per_round": 40.0,
        "seconds_per_round": 2.0,
        "failed_clients": 0,
        "refused_updates": 0,
        "failed_rounds": 0,
        "resumes": 2,
    }


def test_accuracies_are_of_the_groups_that_all_have() -> None:
    rows = [a_row("a", 0, 60), a_row("a", 1, 62), a_row("b", 0, 70)]
    del rows[1]["mean_last_10/few"]
    assert accuracies(rows) == {"all": {"a": [60, 62], "b": [70]}}


def test_stacked_has_a_block_of_lines_for_each_kind() -> None:
    assert stacked(table([a_row("FedAvg", 0, 60)])) == [
        *plain([["method", "seeds", "all", "few", "MB a round", "s a round"]]),
        *(
            line
            for kind in ("final", "best on test", "mean of last 10")
            for line in ([(kind, True), *[("", False)] * 5], *plain([["FedAvg", "1", "60.0", "60.0", "2.50", "1.23"]]))
        ),
    ]


def test_table_holds_means_and_spreads_and_marks_leader_and_meta_set() -> None:
    cells = table([a_row(*run) for seed in (0, 1, 2) for run in (("FedAvg", seed, 60 + seed), ("FedAMM", seed, 70))])
    head, first, second = cells
    titles = [title for title, _ in head]
    assert titles[:4] == ["method", "seeds", "all, final", "few, final"]
    assert titles[-2:] == ["MB a round", "s a round"]
    assert not any(bold for _, bold in head)
    assert first == [
        ("FedAvg", False),
        ("3", False),
        *[("61.0 ± 1.0", False)] * 6,
        ("2.50", False),
        ("1.23", False),
    ]
    assert second[0] == ("FedAMM †", False)
    assert second[2:8] == [("70.0 ± 0.0", True)] * 6


def test_nothing_is_bold_where_methods_do_not_share_three_seeds_or_have_one_twice() -> None:
    def bold(*seeds: tuple[int, ...]) -> list[bool]:
        rows = [a_row(f"{index}", seed, 60 + 10 * index) for index, mine in enumerate(seeds) for seed in mine]
        return [line[2][1] for line in table(rows)[1:]]

    assert bold((0, 1, 2, 3), (0, 1, 2)) == [False, True]
    assert bold((0, 1, 2), (1, 2, 3)) == [False, False]
    assert bold((0, 1, 2), (0, 1, 2, 2)) == [False, False]


def test_table_of_single_seeds_has_no_spread_and_no_leader() -> None:
    cells = table([a_row("FedAvg", 0, 60), a_row("FedAMM", 0, 70)])
    assert [line[2] for line in cells[1:]] == [("60.0", False), ("70.0", False)]


def test_table_leaves_out_groups_that_a_run_lacks() -> None:
    lacking = {name: value for name, value in a_row("FedAMM", 0, 70).items() if not name.endswith("/few")}
    titles = [title for title, _ in table([a_row("FedAvg", 0, 60), lacking])[0]]
    assert "all, final" in titles
    assert "few, final" not in titles


def test_markdown_has_a_cell_for_each_column() -> None:
    assert as_markdown([[("method", False), ("all", False)], [("FedAvg", False), ("61.0 ± 1.4", True)]]) == [
        "| method | all |",
        "|---|---|",
        "| FedAvg | **61.0 ± 1.4** |",
    ]


def test_markdown_keeps_its_columns_whatever_a_method_is_called() -> None:
    *_, line = as_markdown([[("method", False)], [("a|b", False)]])
    assert line == r"| a\|b |"


def test_latex_is_a_booktabs_table() -> None:
    lines = as_latex([[("method", False), ("all", False)], [("FedAMM †", False), ("61.0 ± 1.4", True)]])
    assert lines == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"method & all \\",
        r"\midrule",
        r"FedAMM $\dagger$ & \textbf{61.0 $\pm$ 1.4} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b", r"a\_b"),
        ("50 % & more", r"50 \% \& more"),
        ("$x$ #1", r"\$x\$ \#1"),
        ("{x}", r"\{x\}"),
        ("a\\b", r"a\textbackslash{}b"),
        ("2^3", r"2\textasciicircum{}3"),
        ("a~b", r"a\textasciitilde{}b"),
        ("[x]*", r"{[}x{]}{*}"),
        ("a\n\\input{x}", r"a\textbackslash{}n\textbackslash{}input\{x\}"),
        ("a\u202eb\r", r"a\textbackslash{}u202eb\textbackslash{}r"),
    ],
)
def test_latex_escapes_what_is_special_to_it(text: str, escaped: str) -> None:
    *_, line, _, _ = as_latex([[("method", False)], [(text, False)]])
    assert line == escaped + r" \\"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-x", "@SUM(A1)", " =1", "\uff1d1"])
def test_a_text_that_begins_a_formula_gets_a_quote(text: str) -> None:
    assert as_csv(text) == f"'{text}"


@pytest.mark.parametrize("value", [-1.5, 0, True, None, "FedAvg", "a=b", "[1, 2]"])
def test_other_fields_stay_as_they_are(value: Any) -> None:
    assert as_csv(value) is value


def test_control_characters_begin_no_field() -> None:
    assert [as_csv(text) for text in ("\t=1", "\r=1", "a\nb")] == [r"\t=1", r"\r=1", r"a\nb"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\\nb"),
        ("<img src=x>", r"\<img src=x\>"),
        ("`x` *y* _z_ a_b", r"\`x\` \*y\* \_z\_ a_b"),
        ("[a](b)", r"\[a\](b)"),
        ("a\\", "a" + 2 * "\\"),
        ("FedAMM †", "FedAMM †"),
        ("67.3 ± 1.1", "67.3 ± 1.1"),
    ],
)
def test_markdown_shows_a_text_as_it_is(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


def test_the_heading_says_how_many_evaluations_were_averaged() -> None:
    rows = [a_row("a", 0, 60) | {"num_averaged": count} for count in (3, 3)]
    assert [title for title, _ in table(rows)[0]][6] == "all, mean of last 3"
    assert [line[0] for line in stacked(table(rows))][-2] == ("mean of last 3", True)
    rows[0]["num_averaged"] = 10
    assert [title for title, _ in table(rows)[0]][6] == "all, mean of last 3 to 10"
    rows[0]["num_averaged"] = None  # of an earlier version
    assert [title for title, _ in table(rows)[0]][6] == "all, mean of last 10 or fewer"
