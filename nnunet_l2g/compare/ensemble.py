"""The runs of a method together: an ensemble as a method of its own, and where its members disagree.

Disagreement of a case: 1 - mean Dice between pairs of runs, over pairs and structures. It needs no reference, so that it can
rank new cases. How well it finds failures is the area under the risk-coverage curve (AURC) of the risk 1 - Dice of the
ensemble [1]_: the mean, over k = 1 to n, of the mean risk of the k cases with the least disagreement. Lower is better; the
order by risk itself is the best possible, a random order has the mean risk. Pairwise Dice is the baseline that others hardly
beat [2]_.

.. [1] Geifman, El-Yaniv: Selective classification for deep neural networks. NeurIPS 2017.
.. [2] Zenk et al.: Comparative benchmarking of failure detection methods in medical image segmentation. Medical Image Analysis
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
from nnunet_l2g.evaluation.labels import Labels
from nnunet_l2g.evaluation.overlap import count_voxels, overlap_scores
from nnunet_l2g.evaluation.reading import read_segmentation

FOLDER, MAPS = "ensemble", "disagreement"


def add_ensembles(inputs: Inputs, output: Path) -> pd.DataFrame:
    """Adds "<name> ensemble" to the methods, one for each with several runs. Columns method, case, disagreement.

    Written to `output`/ensemble/<number>_<name>: its segmentations, and maps of the percentage of runs that say something else
    than the ensemble, in the images' format. Probabilities are averaged where each run has a case's .npz (nnU-Net's --npz
    for training, --save_probabilities for prediction); otherwise the majority decides, the smaller label in a tie.

    Raises
    ------
    UserError : no method has several runs, a file cannot be read, or runs lie on other grids
    """
    several = [method for method in inputs.methods if len(method.runs) > 1]
    if not several:
        raise UserError("--ensemble: no method has several runs; compare with --runs 3, or give a name several folders")
    rows, voted = [], 0
    for number, method in enumerate(several, 1):
        folder = output / FOLDER / f"{number}_{re.sub(r'[^A-Za-z0-9_-]+', '_', method.name)}"
        (folder / MAPS).mkdir(parents=True, exist_ok=True)
        run = Run(f"{method.name} ensemble", {}, dict(method.runs[0].folds))
        for case in inputs.cases:
            files = [member.predictions[case] for member in method.runs]
            run.predictions[case] = folder / f"{case}{inputs.labels.file_ending}"
            disagreement, averaged = _write(case, files, run.predictions[case], inputs.labels)
            rows.append((method.name, case, disagreement))
            voted += not averaged
        inputs.methods.append(Method(run.name, [run], ensemble=True))
    if voted:
        inputs.warnings.append(
            f"{voted} of {len(rows)} ensemble cases are majority votes, because not every run has their .npz; train with --npz "
            "(or predict with --save_probabilities) to average probabilities."
        )
    return pd.DataFrame(rows, columns=["method", "case", "disagreement"])


def area_under_risk_coverage(disagreement: np.ndarray, risk: np.ndarray) -> float:
    """AURC of the module's docstring; disagreement (n,), risk (n,). NaN for no case."""
    order = np.argsort(disagreement, kind="stable")
    return float((np.cumsum(risk[order]) / np.arange(1, risk.size + 1)).mean()) if risk.size else float("nan")


def failure_table(disagreement: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """`add_ensembles`' table with `dice`, the mean over structures of the ensemble's; the most disagreement first."""
    dice = cases.groupby(["method", "case"])["dice"].mean()
    found = [dice.get((f"{method} ensemble", case), np.nan) for method, case in disagreement[["method", "case"]].to_numpy()]
    table = disagreement.assign(dice=found)
    return table.sort_values(["method", "disagreement"], ascending=[True, False], kind="stable").reset_index(drop=True)


def _write(case: str, files: list[Path], target: Path, labels: Labels) -> tuple[float, bool]:
    """Disagreement of a case, and whether probabilities were averaged."""
    read = [read_segmentation(path, labels) for path in files]
    members = np.stack([_same_shape(array, path, read[0][0], files[0]) for (array, _), path in zip(read, files, strict=True)])
    probabilities = [path.with_name(f"{case}.npz") for path in files]  # members (R, *spatial)
    averaged = all(path.is_file() for path in probabilities)
    if averaged:
        shape = (len(labels.structures) + (labels.region_order is None), *members.shape[1:])  # background is a channel
        mean = sum(_probabilities(path, shape) for path in probabilities) / len(files)
        together = _segment(mean, labels)
    else:
        values = np.unique(members)
        votes = np.stack([(members == value).sum(0) for value in values])  # (labels, *spatial)
        together = values[votes.argmax(0)]
    writer, properties = labels.reader(), read[0][1]
    writer.write_seg(together, str(target), properties)
    percent = np.rint(100 * (members != together).mean(0)).astype(np.uint8)
    writer.write_seg(percent, str(target.parent / MAPS / target.name), properties)
    pairs = [_dice(one, other, labels) for one, other in itertools.combinations(members, 2)]
    return 1 - float(np.mean(pairs)), averaged


def _segment(probabilities: np.ndarray, labels: Labels) -> np.ndarray:
    """(C, *spatial) to labels (*spatial), as nnU-Net does: regions above 0.5 in their order, or the largest channel."""
    if labels.region_order is None:
        return probabilities.argmax(0)
    together = np.zeros(probabilities.shape[1:], int)
    for channel, value in zip(probabilities, labels.region_order, strict=True):
        together[channel > 0.5] = value
    return together


def _dice(one: np.ndarray, other: np.ndarray, labels: Labels) -> float:
    """Mean over the structures that one of the two has; 1 if there is none."""
    scores = []
    for _, values in labels.structures:
        tp, fp, fn = count_voxels(labels.mask(one, values), labels.mask(other, values))
        scores.append(overlap_scores(tp, fp, fn)["dice"])
    defined = [score for score in scores if not np.isnan(score)]
    return float(np.mean(defined)) if defined else 1.0


def _same_shape(array: np.ndarray, path: Path, first: np.ndarray, first_path: Path) -> np.ndarray:
    if array.shape != first.shape:
        raise UserError(f"--ensemble: {path} has shape {array.shape}, {first_path} {first.shape}; runs need one grid")
    return array


def _probabilities(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """(C, *spatial) of one run. UserError if the file is damaged or of another shape."""
    try:
        with np.load(path, allow_pickle=False) as content:
            found = content["probabilities"].astype(np.float32)
        if found.shape != shape:
            raise ValueError(f"shape {found.shape}, expected {shape}")
    except Exception as error:  # numpy's, zipfile's and zlib's own
        raise UserError(
            f"--ensemble: {path} cannot be used as probabilities ({type(error).__name__}: {error}); predict this case "
            "again, or delete the file: the majority decides then"
        ) from error
    return found
