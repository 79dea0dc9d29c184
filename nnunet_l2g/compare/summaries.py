"""nnU-Net's own summary.json of a fold: which cases it validated, with which Dice."""

from __future__ import annotations

import math
import re
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, read_object


def read_summary(path: Path) -> dict[str, dict[tuple[int, ...], float]]:
    """Dice by case (file name of the prediction) and label values. UserError if the file is damaged; names it."""
    try:
        entries = read_object(path)["metric_per_case"]
        return {
            Path(entry["prediction_file"].replace("\\", "/")).name: {
                tuple(int(value) for value in re.findall(r"\d+", key)): float(scores["Dice"])
                for key, scores in entry["metrics"].items()
            }
            for entry in entries
        }
    except DAMAGE as error:
        raise UserError(
            f"{path}: not a summary of nnU-Net ({type(error).__name__}: {error}); write it again with "
            "`nnUNetv2_train ... --val`"
        ) from error


def disagreements(
    summary: dict[str, dict[tuple[int, ...], float]],
    scores: dict[str, dict[str, dict]],
    structures: tuple[tuple[str, tuple[int, ...]], ...],
) -> list[str]:
    """File names whose Dice in the summary is not the one computed now; scores by file name and structure."""
    different = []
    for name, structure_scores in scores.items():
        for structure, values in structures:
            theirs = summary.get(name, {}).get(values)
            ours = structure_scores[structure]["dice"]
            if theirs is not None and not (math.isnan(theirs) and math.isnan(ours)) and not abs(theirs - ours) < 1e-6:
                different.append(name)
                break
    return different
