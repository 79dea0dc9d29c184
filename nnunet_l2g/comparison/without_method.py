"""Does a trained network use its method? Predicts the validation cases again with the method left out: the Dice lost."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nnunet_l2g.comparison.models import Model
from nnunet_l2g.comparison.predicting import predict_again, write_links
from nnunet_l2g.comparison.results import Inputs
from nnunet_l2g.comparison.tables import MEAN
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cache import Cache
from nnunet_l2g.evaluation.cases import Options, Pair, score_pairs
from nnunet_l2g.untrusted.checkpoints import load_safely

FOLDER = "without_method"
OFF = "from nnunet_l2g.architectures import PlanNetwork; PlanNetwork.method_off = True; "  # before nnU-Net builds the network
OPTION = "--without-method"


def has_method(model: Model, fold: str) -> bool:
    """Whether the weights are of a network of ours with more than nnU-Net's encoder and decoder.

    UserError for a checkpoint that cannot be read.
    """
    path = model.fold(fold) / "checkpoint_final.pth"
    try:
        names = set(load_safely(path)["network_weights"])
    except Exception as error:  # whatever torch raises for a damaged file
        raise UserError(f"{OPTION}: {path} cannot be read ({type(error).__name__}); train or validate again") from error
    return "settings" in names and any(not name.startswith(("encoder.", "decoder.", "settings")) for name in names)


def choose_methods(methods: list[list[Model]], folds: list[str]) -> list[list[Model]]:
    """Those with a method to leave out; says of the others that they have none. UserError if no method has one."""
    chosen = [models for models in methods if has_method(models[0], folds[0])]
    others = ", ".join(models[0].name for models in methods if models not in chosen)
    why = "the network is an encoder and a decoder alone, or not nnunet_l2g's"
    if not chosen:
        raise UserError(f"{OPTION}: {others} have nothing that could be left out ({why}); leave the option out")
    if others:
        print(f"{OPTION}: {others}: nothing to leave out, {why}", flush=True)
    return chosen


def without_table(
    methods: list[list[Model]],
    inputs: Inputs,
    images: dict[str, list[Path]],
    dataset: str,
    device: str,
    output: Path,
    options: Options,
    cache: Cache,
    processes: int,
) -> pd.DataFrame:
    r"""What each trained network loses without its method, for each structure and their mean.

    Columns method, run, structure, cases, dice, without, lost, low, high: the mean Dice over cases of the validation's
    predictions, of those without the method, and their difference :math:`\bar d`, paired by case, with
    :math:`\bar d \pm t_{0.975, n - 1} s_d / \sqrt n`, a statement about this trained network and new cases. Cases whose
    Dice is undefined with or without the method (no such structure, none predicted) are left out.

    Raises UserError if nnU-Net fails, Interrupted on Ctrl-C.
    """
    fold_of, ending = inputs.runs[0].folds, inputs.labels.file_ending
    names = {models[0].name: models for models in methods}
    compared = [method for method in inputs.methods if method.name in names]
    with_method, without = [], []
    for fold in inputs.folds:
        links = output / FOLDER / "images" / f"fold_{fold}"
        write_links({case: images[case] for case in inputs.cases if fold_of[case] == fold}, links, ending)
        for model in (model for models in methods for model in models):
            predict_again(model, fold, dataset, device, links, _predictions(output, model, fold), output, FOLDER, OFF)
    for method in compared:
        for number, (run, model) in enumerate(zip(method.runs, names[method.name], strict=True), 1):
            for case, reference in inputs.references.items():
                file = _predictions(output, model, fold_of[case]) / f"{case}{ending}"
                with_method.append(Pair(method.name, case, reference, run.predictions[case], number))
                without.append(Pair(method.name, case, reference, file, number))
    scores = [score_pairs(pairs, inputs.labels, options, cache, processes) for pairs in (with_method, without)]
    rows = []
    for method in compared:
        for number in range(1, len(method.runs) + 1):
            on, off = (
                pd.DataFrame({case: _dice(found[method.name, number, case]) for case in inputs.cases}).T for found in scores
            )  # (cases, structures)
            for structure in on:
                rows.append((method.name, number, structure, *_lost(on[structure], off[structure])))
    return pd.DataFrame(rows, columns=["method", "run", "structure", "cases", "dice", "without", "lost", "low", "high"])


def _dice(scores: dict[str, dict]) -> dict[str, float]:
    values = {structure: found["dice"] for structure, found in scores.items()}
    return values | ({MEAN: pd.Series(values, dtype=float).mean()} if len(values) > 1 else {})


def _lost(on: pd.Series, off: pd.Series) -> tuple:
    from scipy import stats

    both = on.notna() & off.notna()
    on, off = on[both].astype(float), off[both].astype(float)
    difference = on - off
    half = stats.t.ppf(0.975, len(on) - 1) * difference.sem() if len(on) > 1 else float("nan")
    lost = difference.mean()
    return len(on), on.mean(), off.mean(), lost, lost - half, lost + half


def _predictions(output: Path, model: Model, fold: str) -> Path:
    return output / FOLDER / "predictions" / model.folder.name / f"fold_{fold}"
