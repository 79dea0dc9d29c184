"""The report as one HTML page that needs nothing else (styles inside, pictures as data), as Markdown and on the terminal."""

from __future__ import annotations

import base64

from jinja2 import Environment

from nnunet_l2g.compare.comparison import Comparison
from nnunet_l2g.compare.plots import Picture
from nnunet_l2g.compare.sentences import findings, heading, method_lines, sentence
from nnunet_l2g.compare.text import tables

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ heading }}</title><meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; }
body { margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.finding { font-size: 1.1rem; border-left: .4rem solid #0072B2; padding: .2rem 1rem; overflow-wrap: anywhere; }
.warning { border-left: .4rem solid #D55E00; background: #fdf1ea; padding: .6rem 1rem; margin: 1rem 0; }
.warning p { margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; max-width: 16rem; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #444; }
tr.mean td { font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption, .how { font-size: .9rem; color: #444; }
code { overflow-wrap: anywhere; }
</style></head>
<body>
{% macro prose(line) %}{% for piece in line.split("`") %}
{% if loop.index0 % 2 %}<code>{{ piece }}</code>{% else %}{{ piece }}{% endif %}{% endfor %}{% endmacro %}
{% macro show(table) %}
<h2>{{ table.head }}</h2><div class="scroll"><table>
<thead><tr>{% for cell in table.rows[0] %}
<th scope="col">{{ cell | e | replace("_", "_<wbr>" | safe) }}</th>{% endfor %}</tr></thead>
<tbody>{% set mean = namespace(on=false) %}{% for row in table.rows[1:] %}
{% if row[0] %}{% set mean.on = row[0] == "mean foreground" %}{% endif %}
<tr{% if mean.on %} class="mean"{% endif %}>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table></div>
{% endmacro %}
<h1>{{ heading }}</h1><p>{{ sentence }}</p>
{% for finding in findings %}<p class="finding">{{ prose(finding) }}</p>{% endfor %}
{% if warnings %}<div class="warning" role="alert"><strong>Read this first</strong>
{% for warning in warnings %}<p>{{ warning }}</p>{% endfor %}</div>{% endif %}
{% for table in tables if table.main %}{{ show(table) }}{% endfor %}
{% for picture in pictures %}<h2>{{ picture.title }}</h2>
<figure><img alt="{{ picture.caption }}" width="{{ picture.width }}" src="data:image/png;base64,{{ picture | base64 }}">
<figcaption>{{ picture.caption }}</figcaption></figure>{% endfor %}
<details><summary>Other scores</summary>{% for table in tables if not table.main %}{{ show(table) }}{% endfor %}</details>
<h2>How these numbers were made</h2><ul class="how">{% for line in lines %}<li>{{ prose(line) }}</li>{% endfor %}</ul>
</body></html>
"""
MARKDOWN = """# {{ heading }}

{{ sentence }}
{% for finding in findings %}

{{ finding }}
{% endfor %}
{% if warnings %}

## Warnings

{% for warning in warnings %}
- {{ warning }}
{% endfor %}
{% endif %}
{% for table in tables %}

## {{ table.head }}

{% for row in table.rows %}
| {% for cell in row %}{{ cell | replace("|", "\\\\|") }} | {% endfor %}

{% if loop.first %}
| --- |{{ " ---: |" * (row | length - 1) }}
{% endif %}
{% endfor %}
{% endfor %}

## How

{% for line in lines %}
- {{ line }}
{% endfor %}

## Figures

{% for picture in pictures %}
![{{ picture.caption }}](plots/{{ picture.name }}.png)

{% endfor %}
"""


def page(comparison: Comparison, pictures: list[Picture]) -> str:
    """The page's HTML. Names and warnings are escaped: a folder may be called anything."""
    return _render(PAGE, True, comparison, pictures)


def markdown(comparison: Comparison, pictures: list[Picture]) -> str:
    """The whole report for a paper's appendix, with links to the pictures."""
    return _render(MARKDOWN, False, comparison, pictures)


def _render(template: str, html: bool, comparison: Comparison, pictures: list[Picture]) -> str:
    environment = Environment(autoescape=html, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda picture: base64.b64encode(picture.png).decode()
    return environment.from_string(template).render(
        heading=heading(comparison),
        sentence=sentence(comparison),
        findings=findings(comparison),
        warnings=comparison.warnings,
        tables=tables(comparison),
        lines=method_lines(comparison),
        pictures=pictures,
    )


def terminal(comparison: Comparison) -> str:
    """What is compared, what was found, the main tables and the warnings."""
    parts = [sentence(comparison), *findings(comparison)]
    parts += [_aligned(table.rows) for table in tables(comparison) if table.main]
    parts += [f"WARNING: {text}" for text in comparison.warnings]
    return "\n\n".join(parts)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows
    )
