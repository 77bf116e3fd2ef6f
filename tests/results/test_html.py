"""A page loads nothing, and lets nothing in that is not escaped."""

import base64
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

from fedamm_pl.results.report import report
from fedamm_pl.results.runs import load, load_all
from tests.results.pages import HOSTILE, SOURCE, Page, change


def test_figures_are_whole_and_have_captions(fedamm_run: Path) -> None:
    run = load(fedamm_run)
    text = report([run])
    images = [base64.b64decode(data) for data in SOURCE.findall(text)]
    assert len(images) == len(run.figures()) == text.count("<figcaption>") == text.count("<img ") == text.count("alt=")
    for image in images:
        assert ElementTree.fromstring(image).tag.endswith("svg")
    assert all(caption.endswith(".") for caption in Page(text).texts["figcaption"])


def test_a_page_loads_nothing(fedamm_run: Path, fedavg_run: Path) -> None:
    for text in (report([load(fedamm_run)]), report(load_all([fedamm_run, fedavg_run]))):
        outside = SOURCE.sub("", text)
        assert not re.search(
            r"https?:|//|<link|<iframe|@import|url\(|src=|href=|fetch|import\(|eval\(|innerHTML", outside
        )
        assert "default-src 'none'" in outside
        assert Page(text).tags.count("html") == 1


def test_a_page_runs_no_script_but_the_one_that_sorts_its_tables(fedamm_run: Path, fedavg_run: Path) -> None:
    text = report(load_all([fedamm_run, fedavg_run]))
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script == (files("fedamm_pl.results") / "templates/sort.js").read_text().strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'"Content-Security-Policy" content="([^"]*)"', text)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_tables_can_be_sorted_within_their_blocks(fedamm_run: Path, fedavg_run: Path) -> None:
    """The script sorts the rows of each body of a table, below the heading that has the scope of the body's rows."""
    text = report(load_all([fedamm_run, fedavg_run]))
    methods, runs, *_ = re.findall(r'<table class="sortable">.*?</table>', text, re.DOTALL)
    assert methods.count("<tbody>") == methods.count('scope="rowgroup" colspan="8"') == 3
    assert runs.count("<tbody>") == 1
    assert "rowgroup" not in runs


def test_what_comes_from_files_is_escaped(copied: Callable[..., Path]) -> None:
    folder = copied("FedAMM", "a<b>&c", model=HOSTILE)
    versions = {HOSTILE: HOSTILE}
    change(
        folder,
        "summary.json",
        **dict.fromkeys(("method", "dataset", "model", "command", "stopped"), HOSTILE),
        versions=versions,
        hardware=versions,
        shot_groups={HOSTILE: [0]},
        diverged={"round": 1, "reason": HOSTILE},
    )
    change(folder, "diagnostics.json", class_names=[HOSTILE, *"abcde"])
    for folders in ([folder], [folder, copied("FedAvg", "other")]):
        text = report(load_all(folders))
        found = Page(text)
        assert found.tags.count("script") == 1
        assert "b" not in found.tags
        assert "&lt;script&gt;alert(&#34;&amp;1&#34;)" in text
        assert any(HOSTILE in line for table in found.tables for line in table)
        assert HOSTILE in found.texts["pre"]
