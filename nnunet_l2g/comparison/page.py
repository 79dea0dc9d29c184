"""One HTML page that needs nothing else: styles inside, pictures as data."""

from __future__ import annotations

import base64
from html import escape

from nnunet_l2g.comparison import text
from nnunet_l2g.comparison.comparison import Comparison
from nnunet_l2g.comparison.plots import Picture

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; }
body { margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.warning { border-left: .4rem solid #D55E00; background: #fdf1ea; padding: .6rem 1rem; margin: 1rem 0; }
.warning p { margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; overflow-wrap: anywhere; vertical-align: bottom; min-width: 4rem; max-width: 18rem; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #444; }
tr.mean td { font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption, .how { font-size: .9rem; color: #444; }
code { overflow-wrap: anywhere; }
"""


def page(comparison: Comparison, pictures: list[Picture]) -> str:
    """The page's HTML. Names and warnings are escaped: a folder may be called anything."""
    heading = text.heading(comparison)
    parts = [f"<h1>{escape(heading)}</h1>", f"<p>{escape(text.sentence(comparison))}</p>"]
    if comparison.warnings:
        paragraphs = "".join(f"<p>{escape(warning)}</p>" for warning in comparison.warnings)
        parts.append(f'<div class="warning" role="alert"><strong>Read this first</strong>{paragraphs}</div>')
    main = [name for name in text.TERMINAL if name in comparison.shown]
    for name in main:
        parts.append(_section(comparison.shown[name].label, text.score_rows(comparison, name)))
    parts += [_section(head, rows) for head, rows in text.extra_rows(comparison).items()]
    parts += [_figure(picture) for picture in pictures]
    others = [name for name in comparison.shown if name not in main]
    tables = "".join(_section(comparison.shown[name].label, text.score_rows(comparison, name)) for name in others)
    summary = f"<summary>Other scores: {', '.join(comparison.shown[name].title for name in others)}</summary>"
    parts.append(f"<details>{summary}{tables}</details>")
    lines = "".join(f"<li>{_with_code(line)}</li>" for line in text.method_lines(comparison))
    parts.append(f'<h2>How these numbers were made</h2><ul class="how">{lines}</ul>')
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(heading)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _section(head: str, rows: list[list[str]]) -> str:
    first, *body = rows
    lines = ["<tr>" + "".join(f'<th scope="col">{_breakable(cell)}</th>' for cell in first) + "</tr>"]
    mark = ""
    for row in body:
        if row[0]:  # rows without a title belong to the one above
            mark = ' class="mean"' if row[0] == text.title("mean") else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    table = f"<thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody>"
    return f'<h2>{escape(head)}</h2><div class="scroll"><table>{table}</table></div>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    caption = escape(picture.caption)
    image = f'<img alt="{caption}" width="{picture.width}" src="data:image/png;base64,{data}">'
    return f"<h2>{escape(picture.title)}</h2><figure>{image}<figcaption>{caption}</figcaption></figure>"


def _breakable(name: str) -> str:
    """A head that may be broken behind underscores: trainers have long names."""
    return escape(name).replace("_", "_<wbr>")


def _with_code(line: str) -> str:
    """Text between backticks as code."""
    pieces = escape(line).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
