"""Writes a comparison: page, Markdown, JSON, CSV and pictures; each file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_l2g.compare.comparison import Comparison
from nnunet_l2g.compare.page import markdown, page
from nnunet_l2g.compare.plots import draw_all
from nnunet_l2g.compare.sentences import findings
from nnunet_l2g.compare.tables import plain, records
from nnunet_l2g.compare.text import title
from nnunet_l2g.files import write_json, write_text

PAGE, MARKDOWN, JSON = "report.html", "report.md", "report.json"
TABLES = {"cases": "cases.csv", "summary": "summary.csv", "paired": "paired.csv", "runs": "runs.csv", "cost": "cost.csv"}
PICTURES = "plots"


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Writes all files and returns the page's path."""
    for name, filename in TABLES.items():
        write_text(folder / filename, getattr(comparison, name).to_csv(index=False))
    for name in ("shift", "without", "failures"):
        if (table := getattr(comparison, name)) is not None:
            write_text(folder / f"{name}.csv", table.to_csv(index=False))
    write_json(folder / JSON, as_json(comparison))
    pictures = draw_all(comparison)
    (folder / PICTURES).mkdir(exist_ok=True)
    for picture in pictures:
        _write_bytes(folder / PICTURES / f"{picture.name}.png", picture.png)
    write_text(folder / MARKDOWN, markdown(comparison, pictures))
    write_text(folder / PAGE, page(comparison, pictures))
    return folder / PAGE


def as_json(comparison: Comparison) -> dict:
    """Everything, as plain JSON; undefined values are null."""
    labels = comparison.inputs.labels
    return plain(
        {
            "command": comparison.command,
            "versions": comparison.versions,
            "settings": {
                "surface_tolerance": comparison.options.tolerance,
                "distance_unit": "px" if labels.pixels else "mm",
                "lesions": comparison.options.lesions,
                "lesion_overlap": comparison.options.lesion_overlap,
                "lesion_min_size": comparison.options.lesion_min_size,
            },
            "structures": {name: list(values) for name, values in labels.structures},
            "ignore_label": labels.ignore,
            "methods": comparison.methods,
            "runs": {method.name: len(method.runs) for method in comparison.inputs.methods},
            "folds": comparison.inputs.folds,
            "findings": findings(comparison),
            "warnings": comparison.warnings,
            "summary": records(comparison.summary),
            "paired": [row | {"name": title(row["structure"])} for row in records(comparison.paired)],
            "run_means": records(comparison.runs),
            "empty": records(comparison.empty),
            "lesion_recall_by_size": records(comparison.lesion_sizes),
            "shift": None if comparison.shift is None else records(comparison.shift),
            "without": None if comparison.without is None else records(comparison.without),
            "failures": None if comparison.failures is None else records(comparison.failures),
            "cost": records(comparison.cost),
            "cases": records(comparison.cases),
        }
    )


def _write_bytes(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
