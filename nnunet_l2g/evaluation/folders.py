"""Prediction files and the references they belong to, by name."""

from __future__ import annotations

from pathlib import Path

from nnunet_l2g.errors import UserError


def segmentations(folder: Path, ending: str) -> dict[str, Path]:
    """Segmentation files of a folder by case, sorted. UserError if there is no folder, or no such file in it.

    Names that begin with a dot are no cases: macOS leaves ._NAME beside each file it copies.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with segmentations (*{ending})")
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = {path.name.removesuffix(ending): path for path in visible if path.name.endswith(ending)}
    if not files:
        others = sorted({"".join(path.suffixes[-2:]) for path in visible if path.suffix})
        raise UserError(
            f"{folder}: no {ending} file in it, but {', '.join(others) or 'nothing'}; dataset.json says that "
            f"segmentations end in {ending}"
        )
    return files


def references_for(cases: list[str], folder: Path, ending: str) -> dict[str, Path]:
    """The reference of each case. UserError if one has none; names up to five."""
    files = segmentations(folder, ending)
    without = [case for case in cases if case not in files]
    if without:
        raise UserError(f"{folder}: no reference for {some(without)}; expected a file of the same name as the prediction")
    return {case: files[case] for case in cases}


def some(names: list[str], limit: int = 5) -> str:
    """The first names of a long list, and how many there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
