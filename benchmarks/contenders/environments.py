"""Virtual environments of the contenders, made once from pinned requirements and then reused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"


class NotInstalledError(RuntimeError):
    """Raised when the environment of a contender cannot be made."""


def python_of(name: str, folder: Path) -> Path:
    """Return the Python of an environment, which is made if it is missing or its requirements have changed.

    Args:
        name: Name of the file in ``requirements``, without its ending.
        folder: Folder of the environments.

    Raises:
        NotInstalledError: If the environment cannot be made; with the last line of the output.
    """
    requirements, place = REQUIREMENTS / f"{name}.txt", (folder / name).absolute()
    python, noted = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python"), place / "requirements.txt"
    if noted.exists() and noted.read_text() == requirements.read_text():
        return python
    shutil.rmtree(place, ignore_errors=True)
    print(f"making the environment {place}, which takes some minutes and gigabytes", flush=True)
    for command in (
        [sys.executable, "-m", "venv", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotInstalledError(f"not installed: {last_line(done.stderr or done.stdout)}")
    noted.write_text(requirements.read_text())
    return python


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
