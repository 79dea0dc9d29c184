"""The pairs of domains of benchmarks/adaptation.py, written as nnU-Net raw datasets; no subject is in two of them.

Of each pair: SOURCE with labels; TARGET, images only, and in imagesTs and labelsTs the test cases; where labels allow it
SUPERVISED, the target's training images with their labels: the ceiling.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SEED = 0
NOISE = 0.05  # standard deviation, in units of the range of intensities


@dataclass(frozen=True)
class Pair:
    """Numbers and names of the datasets, and nnU-Net's configuration. supervised: None where the target has no labels."""

    source: str
    target: str
    supervised: str | None
    configuration: str


PAIRS = {
    "phantom": Pair("Dataset901_PhantomCine", "Dataset902_PhantomBlackBlood", "Dataset903_PhantomBlackBloodLabelled",
                    "2d"),
    "hippocampus": Pair("Dataset911_Hippocampus", "Dataset912_HippocampusInverted", "Dataset913_HippocampusInvertedLabelled",
                        "3d_fullres"),
    "nuclei": Pair("Dataset301_NucleiFluorescence", "Dataset302_NucleiHistology", None, "2d"),
}  # fmt: skip


def write_pair(name: str, raw: Path, data: Path | None) -> Pair:
    """Writes what is missing of a pair into `raw`; SystemExit with a sentence if the data it is made of is not there.

    data : folder with Dataset004_Hippocampus, or with the two nuclei datasets; the phantom needs none
    """
    pair = PAIRS[name]
    if name == "phantom":
        write_phantom(pair, raw)
    elif data is None:
        raise SystemExit(f"--pair {name} is made of real data: name the folder that holds it with --data")
    elif name == "hippocampus":
        write_hippocampus(pair, raw, data / "Dataset004_Hippocampus")
    else:
        for dataset in (pair.source, pair.target):
            if not (raw / dataset).exists():
                check_folder(data / dataset)
                copy_once(data / dataset, raw / dataset)
    return pair


def write_phantom(pair: Pair, raw: Path) -> None:
    """20 cine hearts with labels; 20 others with black blood without; 12 more of those to test."""
    from nnunet_l2g.phantom import write_dataset

    grid = dict(size=(40, 40, 8), spacing=(2.9, 2.9, 10.0))  # small, so that a CPU can train it
    for dataset, contrast, seed, tests in (
        (pair.source, "cine", SEED, 0),
        (pair.target, "black_blood", SEED + 1, 12),
        (pair.supervised, "black_blood", SEED + 1, 0),
    ):
        if not (raw / dataset).exists():
            number, title = int(dataset[7:10]), dataset[11:]
            write_dataset(raw, 20, tests, contrast, seed=seed, dataset_id=number, name=title, **grid)
    shutil.rmtree(raw / pair.target / "labelsTr", ignore_errors=True)


def write_hippocampus(pair: Pair, raw: Path, original: Path) -> None:
    """A third of the cases as they are; a third inverted and noised to adapt to, without labels; a third of those to test."""
    if all((raw / dataset).exists() for dataset in (pair.source, pair.target, pair.supervised)):
        return
    check_folder(original)
    description = json.loads((original / "dataset.json").read_text())
    ending = description["file_ending"]
    cases = sorted(path.name.removesuffix(ending) for path in (original / "labelsTr").glob(f"*{ending}"))
    thirds = np.array_split(np.random.default_rng(SEED).permutation(cases), 3)

    def write(dataset: str, parts: list[tuple[str, np.ndarray, bool]], inverted: bool) -> None:
        if (raw / dataset).exists():
            return
        partial = raw / f".{dataset}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for split, chosen, labelled in parts:
            (partial / f"images{split}").mkdir(parents=True)
            for case in chosen:
                image = sitk.ReadImage(str(original / "imagesTr" / f"{case}_0000{ending}"))
                image = invert(image, case) if inverted else image
                sitk.WriteImage(image, str(partial / f"images{split}" / f"{case}_0000{ending}"))
            if labelled:
                (partial / f"labels{split}").mkdir()
                for case in chosen:
                    shutil.copy(original / "labelsTr" / f"{case}{ending}", partial / f"labels{split}")
        (partial / "dataset.json").write_text(json.dumps(description | {"numTraining": len(parts[0][1])}, indent=2))
        partial.rename(raw / dataset)

    write(pair.source, [("Tr", thirds[0], True)], inverted=False)
    write(pair.target, [("Tr", thirds[1], False), ("Ts", thirds[2], True)], inverted=True)
    write(pair.supervised, [("Tr", thirds[1], True)], inverted=True)


def invert(image: sitk.Image, case: str) -> sitk.Image:
    """Range minus intensity, between the 1st and 99th percentile, and noise that depends on the case's name alone."""
    values = sitk.GetArrayFromImage(image).astype(np.float32)  # (z, y, x)
    low, high = np.percentile(values, (1, 99))
    noise = np.random.default_rng([SEED, *case.encode()]).standard_normal(values.shape)
    inverted = 1 - (np.clip(values, low, high) - low) / max(high - low, 1e-6) + NOISE * noise
    result = sitk.GetImageFromArray((1000 * inverted).astype(np.float32))
    result.CopyInformation(image)
    return result


def check_folder(folder: Path) -> None:
    if not (folder / "dataset.json").is_file():
        raise SystemExit(f"{folder}: no nnU-Net raw dataset there; unpack it, or name another --data")


def copy_once(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(target)
