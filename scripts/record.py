"""Packs the runs of a comparison into one file, and checks that a table follows from such a file.

    python scripts/record.py pack runs/tables docs/protocol/tables.tar.xz
    python scripts/record.py check docs/protocol/tables.tar.xz configs/protocol/tables.yaml docs/protocol/tables.md
    python scripts/record.py check RECORD CONFIG docs/protocol/communication_bytes.md --budget bytes

A record holds the whole configuration and the summary of each run, reported or for tuning. The check unpacks them and has ``fedamm compare``
choose the options and write the tables anew: it trains nothing and needs no data. It fails if a run is missing, if one has
other options than the comparison's file, or if a character of the table differs.
"""

import argparse
import contextlib
import difflib
import io
import lzma
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from fedamm_pl.cli.main import main as fedamm  # noqa: E402

KEPT = ("config.yaml", "summary.json")


def pack(folder: Path, record: Path) -> int:
    """Write the record of a comparison's folder, and return the number of runs in it.

    The same runs always give the same bytes: names are sorted, and times and owners are left out.
    """
    files = sorted(path for path in folder.rglob("*") if path.name in KEPT)
    record.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(record, "w:xz") as archive:
        for path in files:
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            content = path.read_bytes()
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return sum(path.name == "summary.json" for path in files)


def tables(record: Path, config: Path, budget: str = "rounds") -> str:
    """Return the tables that follow from a record, for a budget of rounds or bytes.

    Raises:
        SystemExit: If the record does not have all runs of the comparison, or has other files.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "runs"
        with tarfile.open(record, "r:xz") as archive:
            for entry in archive:
                if not entry.isfile() or Path(entry.name).name not in KEPT or ".." in Path(entry.name).parts:
                    sys.exit(f"Expected {record} to hold {' and '.join(KEPT)} alone, got {entry.name!r}.")
                path = folder / entry.name.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(entry).read())  # type: ignore[union-attr]
        if alone := sorted(
            path.parent for path in folder.rglob("summary.json") if not path.with_name(KEPT[0]).exists()
        ):
            sys.exit(f"Expected {record} to hold {KEPT[0]} of each run, got none for {alone[0].relative_to(folder)}.")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            fedamm(["compare", "--config", str(config), "--dir", str(folder), "--jobs", "0", "--budget", budget])
        return (folder / f"results{'_bytes' if budget == 'bytes' else ''}.md").read_text()


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write a record")
    packing.add_argument("folder", type=Path, help="of the comparison")
    packing.add_argument("record", type=Path)
    checking = commands.add_parser("check", help="check a table against a record")
    checking.add_argument("record", type=Path)
    checking.add_argument("config", type=Path, help="of the comparison")
    checking.add_argument("table", type=Path, help="its results.md, or results_bytes.md")
    checking.add_argument(
        "--budget", choices=["rounds", "bytes"], default="rounds", help="what the table gives all methods"
    )
    options = parser.parse_args()
    if options.command == "pack":
        count = pack(options.folder, options.record)
        print(f"{count} runs, {options.record.stat().st_size / 1e6:.2f} MB: {options.record}")
        return
    try:
        found, expected = tables(options.record, options.config, options.budget), options.table.read_text()
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        sys.exit(f"record.py: error: {error}")
    if found != expected:
        lines = difflib.unified_diff(
            expected.splitlines(), found.splitlines(), str(options.table), "record", lineterm=""
        )
        sys.exit("\n".join(lines))
    print(f"{options.table} follows from {options.record}")


if __name__ == "__main__":
    main()
