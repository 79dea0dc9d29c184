"""The list of plans in docs/guarantees.md, written from the results of a test run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from compatibility_cell import STAGES
from compatibility_settings import SETTINGS

DOCUMENT = Path(__file__).parents[1] / "docs" / "guarantees.md"
WRITE = "NNUNET_L2G_WRITE_COMPATIBILITY"
BEGIN, END = "<!-- compatibility: begin -->\n", "<!-- compatibility: end -->\n"
FAMILIES = {
    "L2GNet": [name for name in STAGES if "L2GNet" in name],
    "GRCSF": [name for name in STAGES if "GRCSF" in name or "DiceFocal" in name],
    "GLUA": [name for name in STAGES if "GLUA" in name or "RandomIntensity" in name],
}


def outcomes_list(results: Mapping[tuple[str, str], str]) -> str:
    """A Markdown list: one entry for all settings in which the methods have the same outcome.

    results : (trainer, setting) -> "" for a pass, or the sentence of the refusal
    """
    settings_of: dict[str, list[str]] = {}
    for setting in SETTINGS:
        outcomes = (f"{family} {_outcome(results, setting, trainers)}" for family, trainers in FAMILIES.items())
        settings_of.setdefault("; ".join(outcomes), []).append(setting)
    entries = [f"- {outcome}: {'; '.join(settings)}" for outcome, settings in settings_of.items()]
    return "".join(textwrap.fill(entry, 120, subsequent_indent="  ") + "\n" for entry in entries)


def committed_list() -> str:
    """The list that stands in the document between the two markers."""
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write_list(text: str) -> None:
    """Replaces the list in the document, and nothing else of it."""
    page = DOCUMENT.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")


def _outcome(results: Mapping[tuple[str, str], str], setting: str, trainers: list[str]) -> str:
    """One word for all trainers of a method, or one for each of them if they differ."""
    outcomes = {name: "refuses" if results[name, setting] else "passes" for name in trainers}
    if len(set(outcomes.values())) == 1:
        return next(iter(outcomes.values()))
    return ", ".join(f"{name.removeprefix('nnUNetTrainer')} {outcome}" for name, outcome in outcomes.items())
