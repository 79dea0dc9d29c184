"""Does a trained network use its method? The validation cases are predicted again without it, and the Dice lost is shown."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from scipy import stats

from nnunet_l2g.compare.models import Model
from nnunet_l2g.compare.predicting import Predictor
from nnunet_l2g.compare.tables import MEAN
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import load_safely

# runs before nnU-Net builds the network
METHOD_OFF = "from nnunet_l2g.architectures import PlanNetwork; PlanNetwork.method_off = True; "
OPTION = "--without-method"
PLACE = ("method", "run", "case")


def has_method(model: Model, fold: str) -> bool:
    """Whether a checkpoint is that of a network of nnunet_l2g, with more weights than nnU-Net's encoder and decoder.

    UserError for a checkpoint that cannot be read.
    """
    path = model.fold(fold) / "checkpoint_final.pth"
    try:
        names = set(load_safely(path)["network_weights"])
    except Exception as error:  # whatever torch raises for a damaged file
        raise UserError(f"{OPTION}: {path} cannot be read ({type(error).__name__}); train or validate again") from error
    return "settings" in names and any(not name.startswith(("encoder.", "decoder.", "settings")) for name in names)


def choose_methods(methods: list[list[Model]], folds: list[str]) -> list[list[Model]]:
    """Those with a method to leave out. Prints which have none. UserError if no method has one."""
    chosen = [models for models in methods if has_method(models[0], folds[0])]
    others = ", ".join(models[0].name for models in methods if models not in chosen)
    why = "the network is an encoder and a decoder alone, or not nnunet_l2g's"
    if not chosen:
        raise UserError(f"{OPTION}: {others} have nothing that could be left out ({why}); leave the option out")
    if others:
        print(f"{OPTION}: {others}: nothing to leave out, {why}", flush=True)
    return chosen


def dice_without(predictor: Predictor, methods: list[list[Model]], images: dict[str, list[Path]]) -> pd.DataFrame:
    """Columns method, run, case, structure, dice: of all runs of the chosen methods, predicted without the method.

    Raises what `Predictor.scores` raises.
    """
    variants = {"": lambda image, link: link.symlink_to(image.resolve())}
    scores = predictor.scores(methods, images, "without_method", variants, METHOD_OFF)
    rows = [(*place, structure, values["dice"]) for place, found in scores.items() for structure, values in found.items()]
    return pd.DataFrame(rows, columns=[*PLACE, "structure", "dice"])


def lost_table(cases: pd.DataFrame, without: pd.DataFrame) -> pd.DataFrame:
    r"""What each trained network loses without its method, for each structure and, with several, their mean.

    Columns method, run, structure, cases, dice, without, lost, low, high: the mean Dice over cases with and without the
    method, and the mean difference :math:`\bar d`, paired by case, with its 95 % interval
    :math:`\bar d \pm t_{0.975, n - 1} s_d / \sqrt n`. The interval speaks of this trained network and new cases. Cases whose
    Dice is undefined in one of the two are left out.

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
