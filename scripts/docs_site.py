"""Hooks of the documentation site: the README is its first page, and links to files outside ``docs`` become text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

README = Path(__file__).resolve().parent.parent / "README.md"
ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>(~?)([^<]*)</code>")
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+|[A-Z]+\.md)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the first page."""
    files.append(File.generated(config, "index.md", content=README.read_text().replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to files of the repository by their text."""
    return LINK.sub(_named, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show references in docstrings as code; one that begins with a tilde is shortened to its last name."""
    return ROLE.sub(lambda role: f"<code>{role[2].rpartition('.')[2] if role[1] else role[2]}</code>", html)


def _named(link: re.Match[str]) -> str:
    text, target = link.groups()
    path = target.removeprefix("../")
    return text if path in text or path == "README.md" else f"{text} (`{path}`)"
