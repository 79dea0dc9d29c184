"""The scores by name: how they are shown, their unit and which direction is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One score of one structure in one case.

    title : as shown
    unit : "mm" or "" for fractions
    higher_is_better : the direction of improvement
    digits : shown after the point
    """

    title: str
    unit: str = ""
    higher_is_better: bool = True
    digits: int = 3

    @property
    def label(self) -> str:
        """Title with unit, for axes and table heads."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title


OVERLAP = {"dice": Score("Dice"), "iou": Score("IoU"), "precision": Score("precision"), "recall": Score("recall")}
SURFACE = {
    "hd95": Score("HD95", "mm", higher_is_better=False, digits=2),
    "assd": Score("ASSD", "mm", higher_is_better=False, digits=2),
    "nsd": Score("NSD"),
}
LESION = {
    "lesion_precision": Score("lesion precision"),
    "lesion_recall": Score("lesion recall"),
    "lesion_f1": Score("lesion F1"),
}
SCORES = OVERLAP | SURFACE | LESION


def with_units(pixels: bool) -> dict[str, Score]:
    """SCORES, with distances in pixels where the files have no spacing."""
    if not pixels:
        return SCORES
    return {name: Score(s.title, "px" if s.unit else "", s.higher_is_better, s.digits) for name, s in SCORES.items()}
