"""Who imports whom: folders follow the way of the data, files make no circle, and little is loaded at the start."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedamm_pl"
ORDER = ["base", "data", "models", "protocol", "algorithms", "federation", "results", "cli", "integrations"]
BASE = {
    "version",
    "light_torchmetrics",
    "files",
    "kinds",
    "foreign",
    "hints",
    "stored",
    "terminal",
    "cores",
    "seeding",
    "losses",
    "metrics",
    "precision",
    "sharpness",
}
"""Files beside the folders."""
HEAVY = ["matplotlib.pyplot", "scipy.signal", "scipy.stats", "scipy.special", "ray", "flwr", "pandas", "pyarrow"]
"""Of SciPy its parts: torchmetrics loads the empty package, which takes no time."""


def name_of(path: Path) -> str:
    """The name of a module of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def folder(module: str) -> str:
    """The folder that a module lies in."""
    part = module.split(".")[1]
    return "base" if part in BASE else part


def parents(module: str) -> list[str]:
    """The packages that are loaded before a module."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(2, len(parts))]


def imports(module: str) -> Iterator[str]:
    """The modules of the package that a file names in an import, anywhere in it."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "fedamm_pl")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            if node.module and node.module.partition(".")[0] == "fedamm_pl":
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    yield submodule if submodule in FILES else node.module


GRAPH = {module: set(imports(module)) for module in FILES}


def test_every_file_has_its_place_in_the_order() -> None:
    assert {folder(module) for module in FILES if module != "fedamm_pl"} == set(ORDER)
    assert set.union(*GRAPH.values()) <= set(FILES)


@pytest.mark.parametrize("place", ORDER)
def test_no_file_imports_from_a_later_folder(place: str) -> None:
    later = ORDER[ORDER.index(place) + 1 :]
    found = [
        f"{module} imports {imported}"
        for module in FILES
        if module != "fedamm_pl" and folder(module) == place
        for imported in GRAPH[module] - {"fedamm_pl"}
        if folder(imported) in later
    ]
    assert found == []


def test_nothing_inside_imports_from_the_package_itself() -> None:
    assert [module for module, imported in GRAPH.items() if "fedamm_pl" in imported] == []


def test_files_make_no_circle() -> None:
    # what is in a folder's __init__ is loaded first, whoever imports from the folder
    edges = {
        module: {
            needed
            for imported in GRAPH[module]
            for needed in (imported, *parents(imported))
            if needed != module and needed not in parents(module)
        }
        for module in FILES
    }
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in sorted(edges[module]):
                visit(imported, [*path, module])
            done.add(module)

    for module in FILES:
        visit(module, [])


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, fedamm_pl; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_what_the_import_has_put_off_can_be_imported_afterwards() -> None:
    code = "import fedamm_pl, scipy, scipy.signal, scipy.stats; print(scipy.signal.windows.hamming(3)[1], scipy.stats.t.ppf(0.5, 3))"
    found = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1.0 0.0"
