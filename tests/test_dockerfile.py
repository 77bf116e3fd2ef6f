"""What can be said of the Dockerfile without building an image: what it copies is there, is enough, and is the same Python."""

import json
import re
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet

from fedamm_pl.cli.main import main

ROOT = Path(__file__).parent.parent
LINES = [
    line.partition(" ")
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    if line and not line.startswith("#")
]
PROJECT = (ROOT / "pyproject.toml").read_text()


def of(instruction: str) -> list[str]:
    return [rest.strip() for name, _, rest in LINES if name == instruction]


COPIED = [source for line in of("COPY") for source in line.split()[:-1]]


def test_it_copies_what_is_there_and_ignores_all_else() -> None:
    assert [name for name in COPIED if not (ROOT / name).exists()] == []
    ignored = [line for line in (ROOT / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    assert sorted(line.removeprefix("!") for line in ignored if line.startswith("!")) == sorted(COPIED)
    assert ignored[-1] == "**/__pycache__"


def test_the_image_of_the_federation_is_another_one_and_has_all_files() -> None:
    """Its Dockerfile copies the repository, of which the first one's list leaves out the examples."""
    folder = ROOT / "examples/federation"
    assert "COPY . ." in (folder / "Dockerfile").read_text()
    assert not [path for path in (ROOT / ".dockerignore", folder / "Dockerfile.dockerignore") if path.exists()]
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    assert {service["image"] for service in compose["services"].values()} == {"fedamm-federation"}


def test_it_copies_what_the_installation_needs() -> None:
    needed = {"pyproject.toml", "setup.py", "MANIFEST.in", "fedamm_pl"}
    needed |= set(re.findall(r'^readme = "(.*)"', PROJECT, re.MULTILINE))
    needed |= set(re.findall(r'^dependencies = .*"(.*)"', PROJECT, re.MULTILINE))
    (licences,) = re.findall(r"^license-files = (\[.*\])", PROJECT, re.MULTILINE)
    needed |= {name.partition("/")[0] for name in json.loads(licences)}
    needed |= set(re.findall(r"^recursive-include (\S+)", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE))
    assert needed <= set(COPIED)


def test_its_python_is_one_that_is_tested() -> None:
    arguments = dict(line.split("=", 1) for line in of("ARG"))
    assert of("FROM") == ["python:${PYTHON}-slim"]
    (requires,) = re.findall(r'^requires-python = "(.*)"', PROJECT, re.MULTILINE)
    assert arguments["PYTHON"] in SpecifierSet(requires)
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert arguments["PYTHON"] in jobs["check"]["strategy"]["matrix"]["python"]


def test_it_starts_the_program_as_a_user_without_rights() -> None:
    assert [json.loads(line) for line in of("ENTRYPOINT")] == [["fedamm"]]
    assert f'fedamm = "{main.__module__}:{main.__name__}"' in PROJECT
    assert of("USER") == ["fedamm"]
    names = [name for name, _, _ in LINES]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    (page,) = re.findall(r"^docker run .*$", (ROOT / "docs/running.md").read_text(), re.MULTILINE)
    assert f":{of('WORKDIR')[-1]}" in page  # what is mounted is where it runs
