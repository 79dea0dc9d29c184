"""The runs of a method together: an ensemble as a method of its own, and where its runs disagree.

Disagreement of a case: 1 - mean Dice between pairs of runs, over pairs and structures. It needs no reference, so it can rank
new cases; few methods find failures better [1]_.

.. [1] Zenk et al.: Comparative benchmarking of failure detection methods in medical image segmentation. Medical Image Analysis
   101 (2025).
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_l2g.compare.results import Inputs, Method, Run
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation import count_voxels, overlap_scores
from nnunet_l2g.evaluation.geometry import read_segmentation
from nnunet_l2g.evaluation.labels import Labels


def add_ensembles(inputs: Inputs, output: Path) -> pd.DataFrame:
    """Adds the method "<name> ensemble" for each method with several runs. Columns method, case, disagreement.

    In the ensemble, each voxel has the label of most runs, and the smallest of these labels in a tie. `output`/ensemble/
    <number>_<name> gets its segmentations, and maps of the percentage of runs that differ from it.

    Raises
    ------
    UserError : no method has several runs, a file cannot be read, or runs lie on other grids
    """
    several = [method for method in inputs.methods if len(method.runs) > 1]
    if not several:
        raise UserError("--ensemble: no method has several runs; compare with --runs 3, or give a name several folders")
    rows = []
    for number, method in enumerate(several, 1):
        folder = output / "ensemble" / f"{number}_{re.sub(r'[^A-Za-z0-9_-]+', '_', method.name)}"
        (folder / "disagreement").mkdir(parents=True, exist_ok=True)
        ensemble = Run(f"{method.name} ensemble", {}, dict(method.runs[0].folds))
        for case in inputs.cases:
            ensemble.predictions[case] = folder / f"{case}{inputs.labels.file_ending}"
            files = [run.predictions[case] for run in method.runs]
            rows.append((method.name, case, _write_ensemble(files, ensemble.predictions[case], inputs.labels)))
        inputs.methods.append(Method(ensemble.name, [ensemble], ensemble=True))
    return pd.DataFrame(rows, columns=["method", "case", "disagreement"])


def rank_cases(disagreement: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """`add_ensembles`' table with `dice`, the mean over structures of the ensemble's; the most disagreement first."""
    dice = cases.groupby(["method", "case"])["dice"].mean()
    found = [dice.get((f"{row.method} ensemble", row.case), np.nan) for row in disagreement.itertuples()]
    return disagreement.assign(dice=found).sort_values(["method", "disagreement"], ascending=[True, False], ignore_index=True)


def _write_ensemble(files: list[Path], target: Path, labels: Labels) -> float:
    """Writes the ensemble of a case and its map. Returns the disagreement of the runs."""
    read = [read_segmentation(path, labels) for path in files]
    for path, (array, _) in zip(files, read, strict=True):
        if array.shape != read[0][0].shape:
            raise UserError(f"--ensemble: {path} has shape {array.shape}, {files[0]} {read[0][0].shape}; runs need one grid")
    members = np.stack([array for array, _ in read])  # (R, *spatial)
    values = np.unique(members)
    votes = np.stack([(members == value).sum(0) for value in values])  # (labels, *spatial)
    majority = values[votes.argmax(0)]  # (*spatial)
    writer, properties = labels.reader(), read[0][1]
    writer.write_seg(majority, str(target), properties)
    percent = np.rint(100 * (members != majority).mean(0)).astype(np.uint8)
    writer.write_seg(percent, str(target.parent / "disagreement" / target.name), properties)
    return 1 - float(np.mean([_mean_dice(one, other, labels) for one, other in itertools.combinations(members, 2)]))


def _mean_dice(one: np.ndarray, other: np.ndarray, labels: Labels) -> float:
    """Mean over the structures that one of the two has; 1 if there is none."""
    masks = [(labels.mask(one, values), labels.mask(other, values)) for _, values in labels.structures]
    scores = [overlap_scores(*count_voxels(*pair))["dice"] for pair in masks if pair[0].any() or pair[1].any()]
    return float(np.mean(scores)) if scores else 1.0
