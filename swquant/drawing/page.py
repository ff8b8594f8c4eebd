"""One self-contained HTML page: sections of sentences, figures and tables. It opens offline, prints, and has no script.

Light or dark follows the reader's setting, two figures stand side by side where there is room, tables scroll by
themselves on a phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from swquant.drawing.charts import COLOURS
from swquant.drawing.section import Cell, Interval, Section, Table, number

__all__ = ["appended", "facts", "page", "section_html"]

_LIGHT = "".join(f"--{name}:{pair[0]};" for name, pair in COLOURS.items())
_DARK = "".join(f"--{name}:{pair[1]};" for name, pair in COLOURS.items())
_CSS = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}}
main{{max-width:66rem;margin:0 auto;padding:1.2rem 1rem 4rem}}
h1{{font-size:1.6rem;line-height:1.25;margin:.6rem 0;overflow-wrap:anywhere}}
h2{{font-size:1.25rem;margin:2.6rem 0 .6rem;border-top:1px solid var(--grid);padding-top:1.4rem}}
p,dl{{max-width:46rem;margin:.5rem 0}}
a{{color:var(--series-1)}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}}
dt,.paper,.note,.caption{{color:var(--faint)}}
dd{{margin:0;overflow-wrap:anywhere}}
.verdict{{font-weight:600}}
.verdict.no{{color:var(--series-2)}}
.verdict.yes{{color:var(--series-3)}}
.figures{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1rem;margin:1rem 0}}
figure{{margin:0}}
svg.chart{{display:block;width:100%;max-width:34rem;height:auto}}
svg.chart text{{font-family:system-ui,sans-serif}}
.scroll{{overflow-x:auto;margin:1rem 0;border:1px solid var(--grid);border-radius:6px}}
table{{border-collapse:collapse;font-size:.86rem;width:100%}}
.caption{{font-size:.86rem;margin:1.2rem 0 -.6rem}}
@media (max-width:34rem){{dl{{grid-template-columns:1fr}}dd{{margin-bottom:.4rem}}}}
th,td{{padding:.28rem .7rem;text-align:right;white-space:nowrap;border-top:1px solid var(--grid)}}
th{{font-weight:600;white-space:normal;vertical-align:bottom}}
th:first-child,td:first-child{{text-align:left}}
.ends{{color:var(--faint)}}
details>summary{{cursor:pointer;color:var(--faint);margin:.6rem 0}}
code{{overflow-wrap:anywhere}}
"""
# Tables longer than this are folded, so that a page can be read from top to bottom.
_LONG = 14
_END = "\n</main>\n</body>\n</html>\n"


def page(title: str, lead: Sequence[str], body: Sequence[str]) -> str:
    """A whole document. lead: paragraphs, as plain text, under the title; body: HTML."""
    paragraphs = "\n".join(f"<p>{escape(text)}</p>" for text in lead)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        '<link rel="icon" href="data:,">\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n{paragraphs}\n"
        + "\n".join(body)
        + _END
    )


def appended(document: str, body: str) -> str | None:
    """A page with more at its end. body: HTML. None for a document that `page` did not write."""
    return f"{document.removesuffix(_END)}\n{body}{_END}" if document.endswith(_END) else None


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of names and values."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f"<dl>{items}</dl>"


def section_html(section: Section, figures: Mapping[str, str]) -> str:
    """One experiment: what the paper found, what this model shows, figures (name of chart -> its <svg>), tables."""
    parts = [f'<section id="{section.name}">', f"<h2>{escape(section.title)}</h2>"]
    if section.paper:
        parts.append(f'<p class="paper">The paper: {escape(section.paper)}</p>')
    parts.append(f"<p>{_verdict(section.agrees)}{escape(section.finding)}</p>")
    if section.charts:
        parts += [
            '<div class="figures">',
            *(f"<figure>\n{figures[chart.name]}</figure>" for chart in section.charts),
            "</div>",
        ]
    parts += [_table(table) for table in section.tables if table.rows]
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    return "\n".join([*parts, "</section>"])


def _verdict(agrees: bool | None) -> str:
    if agrees is None:
        return ""
    return (
        '<span class="verdict yes">As in the paper.</span> '
        if agrees
        else '<span class="verdict no">Not as in the paper.</span> '
    )


def _cell(cell: Cell) -> str:
    match cell:
        case None:
            return ""
        case str():
            return escape(cell)
        case Interval(value, low, high) if low is not None and high is not None:
            return f'{number(value)} <span class="ends">({number(low)} to {number(high)})</span>'
        case Interval(value):
            return number(value)
        case _:
            return number(cell)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "\n".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    body = (
        f'<p class="caption">{escape(table.caption)}</p>\n<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )
    if len(table.rows) <= _LONG:
        return body
    return f"<details><summary>Table of {len(table.rows)} rows</summary>\n{body}\n</details>"
