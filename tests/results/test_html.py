"""A page loads nothing, and lets nothing in that is not escaped."""

import base64
import re
from collections.abc import Callable
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
        assert not re.search(r"https?:|//|<script|<link|<iframe|@import|url\(|src=|href=", outside)
        assert "default-src 'none'" in outside
        assert Page(text).tags.count("html") == 1


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
        assert not {"script", "b"} & set(found.tags)
        assert "&lt;script&gt;alert(&quot;&amp;1&quot;)" in text
        assert any(HOSTILE in line for table in found.tables for line in table)
        assert HOSTILE in found.texts["pre"]
