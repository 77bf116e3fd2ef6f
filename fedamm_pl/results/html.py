"""Pieces of an HTML page that needs nothing beside itself: its style, tables, figures inside the text."""

import base64
from collections.abc import Sequence
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from fedamm_pl.results.figure_parts import rendered
from fedamm_pl.results.tables import Cells
from fedamm_pl.terminal import printable

WIDE = 7  # inches; a figure of more gets a line of its own
CSS = """
:root { --text: #1b1f24; --soft: #59636e; --page: #fff; --line: #d5dae0; --block: #f4f6f8; --note: #fff4d6; --edge: #c98a00 }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e3e7eb; --soft: #9aa4ae; --page: #14181c; --line: #363d45; --block: #1e242a; --note: #3a2f10 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem }
p { margin: .5rem 0; max-width: 46rem }
.soft, figcaption { color: var(--soft); font-size: .9rem }
.note { padding: .5rem .8rem; border-left: .25rem solid var(--edge); background: var(--note); overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap }
thead th, th:first-child { white-space: normal }
tbody th:first-child { min-width: 9rem }
th { font-weight: 600 }
tbody th { font-weight: 400 }
th:first-child { text-align: left }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1.2rem; margin: 0 }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem;
  align-items: start }
figure { margin: 0; break-inside: avoid }
.wide { grid-column: 1 / -1; overflow-x: auto }
.wide img { min-width: 40rem; max-width: 68rem }
figcaption strong { display: block; color: var(--text) }
img { display: block; width: 100%; max-width: 48rem; margin-bottom: .4rem; padding: .4rem; border: 1px solid var(--line);
  border-radius: .4rem; background: #fff }
details { margin: .8rem 0 }
summary { cursor: pointer; font-weight: 600 }
section.run { margin-left: .6rem; padding-left: .9rem; border-left: 2px solid var(--line) }
pre { margin: .5rem 0; padding: .7rem .9rem; overflow-x: auto; border-radius: .4rem; background: var(--block);
  font: .85rem/1.45 ui-monospace, monospace }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere }
@media print {
  :root { font-size: 11px }
  body { max-width: none; padding: 0 }
  pre { white-space: pre-wrap }
  h2, summary { break-after: avoid }
  tr { break-inside: avoid }
  .figures { grid-template-columns: 1fr 1fr }
  .wide img { min-width: 0 }
  details::details-content { content-visibility: visible; block-size: auto }
}
"""


def escaped(text: str) -> str:
    """Return a text as HTML that shows it, its control characters as codes."""
    return escape(printable(text, keep="\n"))


def page(title: str, body: str) -> str:
    """Return a whole page; it loads nothing."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escaped(title)}</title>
<style>{CSS}</style>
</head>
<body>
{body}
</body>
</html>
"""


def tabular(cells: Cells) -> str:
    """Return a table; the first line are the headings."""

    def line(texts: Sequence[tuple[str, bool]], scope: str) -> str:
        marked = [f"<strong>{escaped(text)}</strong>" if bold else escaped(text) for text, bold in texts]
        first, rest = marked[0], marked[1:]
        if scope == "col":
            return "<tr>" + "".join(f'<th scope="col">{text}</th>' for text in marked) + "</tr>"
        return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{text}</td>" for text in rest) + "</tr>"

    body = "\n".join(line(texts, "row") for texts in cells[1:])
    return f'<div class="scroll"><table>\n<thead>{line(cells[0], "col")}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def definitions(terms: dict[str, str]) -> str:
    """Return terms and what there is to say about them."""
    return (
        "<dl>\n" + "\n".join(f"<dt>{escaped(t)}</dt><dd>{escaped(fact)}</dd>" for t, fact in terms.items()) + "\n</dl>"
    )


def folded(title: str, content: str) -> str:
    """Return what can be folded up."""
    return f"<details><summary>{escaped(title)}</summary>\n{content}\n</details>"


def embedded(figure: Figure, title: str, caption: str) -> str:
    """Return a figure inside the page."""
    # outlines in place of fonts: as sharp, and the same on every machine; the salt makes the same figure the same bytes
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "fedamm"}):
        data = base64.b64encode(rendered(figure, "svg", metadata={"Date": None})).decode()
    return (
        f"<figure{' class=wide' if figure.get_figwidth() > WIDE else ''}>"
        f'<img src="data:image/svg+xml;base64,{data}" alt="{escaped(title)}">'
        f"<figcaption><strong>{escaped(title)}</strong> {escaped(caption)}</figcaption></figure>"
    )


def gallery(figures: Sequence[str]) -> str:
    """Return figures side by side."""
    return "\n".join(['<div class="figures">', *figures, "</div>"]) if figures else ""
