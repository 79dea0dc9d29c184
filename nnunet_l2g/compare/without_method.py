"""Does a trained network use its method? Predicts the validation cases again with the method left out: the Dice lost."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from scipy import stats

from nnunet_l2g.compare.models import Model
from nnunet_l2g.compare.predicting import predict_again, write_links
from nnunet_l2g.compare.results import Inputs
from nnunet_l2g.compare.tables import MEAN
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import Options, Pair, score_pairs
from nnunet_l2g.files import load_safely

FOLDER = "without_method"
OFF = "from nnunet_l2g.architectures import PlanNetwork; PlanNetwork.method_off = True; "  # before nnU-Net builds the network
OPTION = "--without-method"
PLACE = ("method", "run", "case")


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


def dice_without(
    methods: list[list[Model]],
    inputs: Inputs,
    images: dict[str, list[Path]],
    dataset: str,
    device: str,
    output: Path,
    options: Options,
    processes: int,
) -> pd.DataFrame:
    """Columns method, run, case, structure, dice: of all runs of the chosen methods, predicted without the method.

    Raises UserError if nnU-Net fails, Interrupted on Ctrl-C.
    """
    fold_of, ending = inputs.runs[0].folds, inputs.labels.file_ending
    for fold in inputs.folds:
        links = output / FOLDER / "images" / f"fold_{fold}"
        write_links({case: images[case] for case in inputs.cases if fold_of[case] == fold}, links, ending)
        for model in (model for models in methods for model in models):
            predict_again(model, fold, dataset, device, links, _predictions(output, model, fold), output, FOLDER, OFF)
    pairs = [
        Pair(models[0].name, case, reference, _predictions(output, model, fold_of[case]) / f"{case}{ending}", model.run)
        for models in methods
        for model in models
        for case, reference in inputs.references.items()
    ]
    scores, _ = score_pairs(pairs, inputs.labels, options, processes)
    rows = [(*place, structure, values["dice"]) for place, found in scores.items() for structure, values in found.items()]
    return pd.DataFrame(rows, columns=[*PLACE, "structure", "dice"])


def lost_table(cases: pd.DataFrame, without: pd.DataFrame) -> pd.DataFrame:
    r"""What each trained network loses without its method, for each structure and, with several, their mean.

    Columns method, run, structure, cases, dice, without, lost, low, high: mean Dice over cases with and without the method, and
    the difference :math:`\bar d`, paired by case, with :math:`\bar d \pm t_{0.975, n - 1} s_d / \sqrt n`, a statement about
    this trained network and new cases. Cases whose Dice is undefined in one of the two are left out.

    cases, without : columns method, run, case, structure, dice
    """
    both = cases.merge(without, on=[*PLACE, "structure"], suffixes=("", "_off")).dropna(subset=["dice", "dice_off"])
    if both["structure"].nunique() > 1:
        means = both.groupby(list(PLACE), sort=False)[["dice", "dice_off"]].mean().reset_index().assign(structure=MEAN)
        both = pd.concat([of_method for _, of_method in pd.concat([both, means]).groupby(["method", "run"], sort=False)])
    both["lost"] = both["dice"] - both["dice_off"]
    grouped = both.groupby(["method", "run", "structure"], sort=False)
    table = grouped.agg(cases=("lost", "size"), dice=("dice", "mean"), without=("dice_off", "mean"), lost=("lost", "mean"))
    half = stats.t.ppf(0.975, table["cases"] - 1) * grouped["lost"].sem()  # NaN for one case
    return table.assign(low=table["lost"] - half, high=table["lost"] + half).reset_index()


def _predictions(output: Path, model: Model, fold: str) -> Path:
    return output / FOLDER / "predictions" / model.folder.name / f"fold_{fold}"
