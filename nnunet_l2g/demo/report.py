"""The demo's results: a table, a JSON summary, and the picture."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path

from nnunet_l2g.demo.folder import PREDICTIONS
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, read_object, write_json


def write_report(
    folder: Path, raw: Path, settings: dict, seconds: dict[str, float], commands: list[str], picture: Path, summary: Path
) -> None:
    """Reads nnU-Net's evaluation, prints the table, and writes the JSON summary and the picture."""
    from nnunet_l2g.demo.picture import draw_picture  # matplotlib

    scores = read_scores(folder / PREDICTIONS / "summary.json", raw / "dataset.json")
    mean = mean_foreground(scores)
    print(format_table(scores, mean))
    draw_picture(raw, folder / PREDICTIONS, scores, mean, settings["trainer"], picture)
    write_json(
        summary,
        {
            "settings": settings,
            "versions": {name: version(name) for name in ("nnunetv2", "torch", "SimpleITK", "numpy")},
            "mean_foreground_dice": mean,
            "dice": {structure: {"mean": mean_of(cases), "cases": cases} for structure, cases in scores.items()},
            "seconds": seconds,
            "commands": commands,
        },
    )


def read_scores(evaluation: Path, dataset_json: Path) -> dict[str, dict[str, float | None]]:
    """Dice by structure and case from nnU-Net's summary.json; None where a structure is in neither segmentation.

    UserError if one of the files is not what the demo's earlier steps left.
    """
    try:
        labels = read_object(dataset_json)["labels"]
        results = read_object(evaluation)["metric_per_case"]
        scores: dict[str, dict[str, float | None]] = {name: {} for name, value in labels.items() if value != 0}
        for result in results:
            case = Path(result["prediction_file"]).name.split(".")[0]
            for name, cases in scores.items():
                dice = float(result["metrics"][str(labels[name])]["Dice"])
                cases[case] = dice if math.isfinite(dice) else None
    except DAMAGE as error:
        raise UserError(
            f"{evaluation} and {dataset_json} are not what the demo wrote ({type(error).__name__}: {error}); start afresh "
            "with --overwrite"
        ) from error
    if not scores or not all(scores.values()):
        raise UserError(f"{evaluation} holds no score; start afresh with --overwrite")
    return scores


def mean_of(cases: dict[str, float | None]) -> float | None:
    """Mean over the cases that have a value, as nnU-Net's nanmean; None if none has."""
    values = [value for value in cases.values() if value is not None]
    return sum(values) / len(values) if values else None


def mean_foreground(scores: dict[str, dict[str, float | None]]) -> float | None:
    """Mean over structures of the mean over cases: nnU-Net's foreground_mean."""
    return mean_of({name: mean_of(cases) for name, cases in scores.items()})


def format_table(scores: dict[str, dict[str, float | None]], mean: float | None) -> str:
    """Structures by cases, with the mean over cases and the mean foreground Dice."""
    cases = list(next(iter(scores.values())))
    names = [case.removeprefix("phantom_") for case in cases]
    rows = [["Dice", *names, "mean"]]
    for structure, values in scores.items():
        rows.append([structure.replace("_", " "), *(_number(values[case]) for case in cases), _number(mean_of(values))])
    rows.append(["mean foreground", *([""] * len(cases)), _number(mean)])
    return "\n".join(f"      {row[0]:<18}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
