"""Writes the report of a comparison: one HTML page, Markdown, JSON, CSV and pictures."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from jinja2 import Environment

from nnunet_l2g.compare.plots import draw_all
from nnunet_l2g.compare.tables import Comparison
from nnunet_l2g.compare.text import describe, findings, make_notes, make_tables, versions
from nnunet_l2g.files import write_json, write_text

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ heading }}</title><meta name="viewport" content="width=device-width">
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1.5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.finding { font-size: 1.1rem; border-left: .4rem solid #0072B2; padding: .2rem 1rem; }
.warning { border-left: .4rem solid #D55E00; background: #fdf1ea; padding: .6rem 1rem; margin: 1rem 0; }
.warning p { margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; max-width: 16rem; border-bottom: 2px solid #444; overflow-wrap: normal; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption, .how { font-size: .9rem; color: #444; }
</style></head>
<body>
{% macro show(table) %}<h2>{{ table.title }}</h2><div class="scroll">{{ table.html() | safe }}</div>{% endmacro %}
<h1>{{ heading }}</h1><p>{{ sentence }}</p>
{% for finding in findings %}<p class="finding">{{ finding }}</p>{% endfor %}
{% if warnings %}<div class="warning" role="alert"><strong>Read this first</strong>
{% for warning in warnings %}<p>{{ warning }}</p>{% endfor %}</div>{% endif %}
{% for table in tables if table.main %}{{ show(table) }}{% endfor %}
{% for picture in pictures %}<h2>{{ picture.title }}</h2>
<figure><img alt="{{ picture.caption }}" width="{{ picture.width }}" src="data:image/png;base64,{{ picture.png | base64 }}">
<figcaption>{{ picture.caption }}</figcaption></figure>{% endfor %}
<details><summary>Other scores</summary>{% for table in tables if not table.main %}{{ show(table) }}{% endfor %}</details>
<h2>How these numbers were made</h2><ul class="how">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
</body></html>
"""


def write_report(comparison: Comparison, folder: Path) -> tuple[Path, str]:
    """Writes all files. Returns the page's path, and the text for the terminal."""
    found, tables, pictures = findings(comparison), make_tables(comparison), draw_all(comparison)
    frames = {name: getattr(comparison, name) for name in ("cases", "summary", "paired", "runs", "cost")} | comparison.extra
    for name, frame in frames.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    write_json(folder / "report.json", as_json(comparison))
    (folder / "plots").mkdir(exist_ok=True)
    for picture in pictures:
        (folder / "plots" / f"{picture.name}.png").write_bytes(picture.png)
    heading = f"{' and '.join(comparison.trained[1:])} against {comparison.trained[0]}"
    sentence, notes, warnings = describe(comparison), make_notes(comparison), comparison.warnings

    markdown = [f"# {heading}", sentence, *found, *(f"**Warning:** {warning}" for warning in warnings)]
    markdown += [f"## {table.title}\n\n{table.markdown()}" for table in tables]
    markdown += [f"![{picture.caption}](plots/{picture.name}.png)" for picture in pictures]
    markdown += ["## How these numbers were made", "\n".join(f"- {note}" for note in notes)]
    write_text(folder / "report.md", "\n\n".join(markdown) + "\n")

    environment = Environment(autoescape=True)  # a folder, and so a method, may have any name
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    page = environment.from_string(PAGE).render(
        heading=heading,
        sentence=sentence,
        findings=found,
        warnings=warnings,
        tables=tables,
        pictures=pictures,
        notes=notes,
    )
    write_text(folder / "report.html", page)
    terminal = [sentence, *found, *(f"{table.title}\n{table.markdown()}" for table in tables if table.main)]
    return folder / "report.html", "\n\n".join([*terminal, *(f"WARNING: {warning}" for warning in warnings)])


def as_json(comparison: Comparison) -> dict:
    """The full record; undefined values are null."""
    labels, options = comparison.inputs.labels, comparison.options
    tables = {name: getattr(comparison, name) for name in ("summary", "paired", "empty", "cost", "cases")} | comparison.extra
    tables["run_means"] = comparison.runs
    return {
        "command": comparison.command,
        "versions": versions(),
        "settings": {
            "surface_tolerance": options.tolerance,
            "distance_unit": "px" if labels.pixels else "mm",
            "lesions": options.lesions,
            "lesion_overlap": options.lesion_overlap,
            "lesion_min_size": options.lesion_min_size,
        },
        "structures": {name: list(values) for name, values in labels.structures},
        "ignore_label": labels.ignore,
        "methods": comparison.methods,
        "runs": {method.name: len(method.runs) for method in comparison.inputs.methods},
        "folds": comparison.inputs.folds,
        "findings": findings(comparison),
        "warnings": comparison.warnings,
    } | {name: json.loads(table.to_json(orient="records", double_precision=15)) for name, table in tables.items()}
