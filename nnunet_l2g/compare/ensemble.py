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

    `output`/ensemble/<number>_<name> gets the ensemble's segmentations, and maps of the percentage of runs that differ from it.
    Probabilities are averaged where each run has a case's .npz (nnU-Net's --npz for training, --save_probabilities for
    prediction); otherwise the majority decides, and the smaller label in a tie.

    Raises
    ------
    UserError : no method has several runs, a file cannot be read, or runs lie on other grids
    """
    several = [method for method in inputs.methods if len(method.runs) > 1]
    if not several:
        raise UserError("--ensemble: no method has several runs; compare with --runs 3, or give a name several folders")
    rows, voted = [], 0
    for number, method in enumerate(several, 1):
        folder = output / "ensemble" / f"{number}_{re.sub(r'[^A-Za-z0-9_-]+', '_', method.name)}"
        (folder / "disagreement").mkdir(parents=True, exist_ok=True)
        ensemble = Run(f"{method.name} ensemble", {}, dict(method.runs[0].folds))
        for case in inputs.cases:
            files = [run.predictions[case] for run in method.runs]
            ensemble.predictions[case] = folder / f"{case}{inputs.labels.file_ending}"
            disagreement, averaged = _write(case, files, ensemble.predictions[case], inputs.labels)
            rows.append((method.name, case, disagreement))
            voted += not averaged
        inputs.methods.append(Method(ensemble.name, [ensemble], ensemble=True))
    if voted:
        inputs.warnings.append(
            f"{voted} of {len(rows)} ensemble cases are majority votes, because not every run has their .npz; train with --npz "
            "(or predict with --save_probabilities) to average probabilities."
        )
    return pd.DataFrame(rows, columns=["method", "case", "disagreement"])


def rank_cases(disagreement: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """`add_ensembles`' table with `dice`, the mean over structures of the ensemble's; the most disagreement first."""
    dice = cases.groupby(["method", "case"])["dice"].mean()
    found = [dice.get((f"{row.method} ensemble", row.case), np.nan) for row in disagreement.itertuples()]
    return disagreement.assign(dice=found).sort_values(["method", "disagreement"], ascending=[True, False], ignore_index=True)


def _write(case: str, files: list[Path], target: Path, labels: Labels) -> tuple[float, bool]:
    """Writes the ensemble of a case. Returns the disagreement, and whether probabilities were averaged."""
    read = [read_segmentation(path, labels) for path in files]
    for path, (array, _) in zip(files, read, strict=True):
        if array.shape != read[0][0].shape:
            raise UserError(f"--ensemble: {path} has shape {array.shape}, {files[0]} {read[0][0].shape}; runs need one grid")
    members = np.stack([array for array, _ in read])  # (R, *spatial)
    probabilities = [path.with_name(f"{case}.npz") for path in files]
    averaged = all(path.is_file() for path in probabilities)
    if averaged:
        channels = len(labels.structures) + (labels.region_order is None)  # labels have a background channel, regions do not
        mean = sum(_probabilities(path, (channels, *members.shape[1:])) for path in probabilities) / len(files)
        together = segment(mean, labels)
    else:
        values = np.unique(members)
        votes = np.stack([(members == value).sum(0) for value in values])  # (labels, *spatial)
        together = values[votes.argmax(0)]
    writer, properties = labels.reader(), read[0][1]
    writer.write_seg(together, str(target), properties)
    percent = np.rint(100 * (members != together).mean(0)).astype(np.uint8)
    writer.write_seg(percent, str(target.parent / "disagreement" / target.name), properties)
    pairs = [_mean_dice(one, other, labels) for one, other in itertools.combinations(members, 2)]
    return 1 - float(np.mean(pairs)), averaged


def segment(probabilities: np.ndarray, labels: Labels) -> np.ndarray:
    """(C, *spatial) to labels (*spatial), as nnU-Net does: regions above 0.5 in their order, or the largest channel."""
    if labels.region_order is None:
        return probabilities.argmax(0)
    together = np.zeros(probabilities.shape[1:], int)
    for channel, value in zip(probabilities, labels.region_order, strict=True):
        together[channel > 0.5] = value
    return together


def _mean_dice(one: np.ndarray, other: np.ndarray, labels: Labels) -> float:
    """Mean over the structures that one of the two has; 1 if there is none."""
    masks = [(labels.mask(one, values), labels.mask(other, values)) for _, values in labels.structures]
    scores = [overlap_scores(*count_voxels(*pair))["dice"] for pair in masks if pair[0].any() or pair[1].any()]
    return float(np.mean(scores)) if scores else 1.0


def _probabilities(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """(C, *spatial) of one run. UserError if the file is damaged or of another shape."""
    try:
        with np.load(path, allow_pickle=False) as content:
            found = content["probabilities"].astype(np.float32)
        if found.shape != shape:
            raise ValueError(f"shape {found.shape}, expected {shape}")
    except Exception as error:  # numpy, zipfile and zlib have their own
        raise UserError(
            f"--ensemble: {path} cannot be used as probabilities ({type(error).__name__}: {error}); predict this case "
            "again, or delete the file to let the majority decide"
        ) from error
    return found
