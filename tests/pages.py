"""The pages of the documentation, and the blocks of code and the commands that are in them."""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
FENCED = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, without its indentation."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a page, without comments, without variables that are set for it, and without the file that it writes to."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.words)

    @property
    def program(self) -> str:
        return self.words[0]


def blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages, or all."""
    text = (ROOT / page).read_text()
    found = [
        Block(page, text.count("\n", 0, match.start()) + 2, match[2], textwrap.dedent(match[3]))
        for match in FENCED.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


def outside_blocks(page: str) -> str:
    return FENCED.sub("", (ROOT / page).read_text())


def commands(block: Block) -> list[Command]:
    """The commands of a block in bash."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split(" && ")]
    return [command for part in parts if (command := _command(str(block), part))]


def inline_commands(page: str, programs: set[str]) -> list[Command]:
    """The commands of one of these programs that stand in the text of a page, where they have arguments and are whole."""
    found = []
    for text in INLINE.findall(outside_blocks(page)):
        command = None if "..." in text else _command(page, " ".join(text.split()))
        if command and len(command.words) > 1 and command.program in programs:
            found.append(command)
    return found


def _command(place: str, text: str) -> Command | None:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # a word with an apostrophe in the text, no command
        return None
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    words = words[: words.index(">")] if ">" in words else words
    return Command(place, tuple(words)) if words else None


def run_python(page: str, smaller: dict[str, str] | None = None, **names: Any) -> dict[str, Any]:
    """Run the blocks of a page in Python one after the other, and return their names.

    Args:
        page: The page.
        smaller: What stands in the code -> what is run in its place, to be faster.
        names: What the page says that there is.
    """
    replaced = dict(smaller or {})
    for block in blocks(page, "python"):
        code = block.text
        for text in [text for text in replaced if text in code]:
            code = code.replace(text, replaced.pop(text))
        exec(compile("\n" * (block.line - 1) + code, str(ROOT / page), "exec"), names)
    assert not replaced, f"{page} no longer has {list(replaced)}"
    return names
