"""Do the residual maps of the autoencoder find lesions better than edges do? To be asked before the segmenter is trained.

python benchmarks/residual_gate.py --model RESULTS/DATASET/TRAINER__PLANS__CONFIGURATION [--fold 0] [-o gate.json]

Reads the checkpoint of the pretraining stage (stage_autoencoder.pth) and the preprocessed validation cases of the fold. For
each lesion class and each map it computes the average precision of lesion voxels against unlabelled ones, and the mean
inside the lesion over the mean in a ring around it (unlabelled voxels within --ring voxels), both averaged over cases that
have the class. Controls are a difference of Gaussians (G_s - G_2s, s = 1, 2, 4 voxels) and x - G_s x (s = 2, 4, 8). As a
difference of Gaussians also smooths the noise, the autoencoder's maps are evaluated smoothed too, by G_1 and G_2. Every map
is evaluated in three ways (absolute, positive, negative; mean over channels), and the best way for the class counts, for
controls too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import binary_dilation
from sklearn.metrics import average_precision_score
from timing import choose_device, conditions, write_json
from tqdm import tqdm

from nnunet_l2g.architectures.grcsf.masked_autoencoder import SETS
from nnunet_l2g.trainers import nnUNetTrainerGRCSF
from nnunet_l2g.training.gaussian_blur import gaussian_blur

SAMPLE = 100_000
WAYS = {"absolute": np.abs, "positive": lambda r: np.maximum(r, 0), "negative": lambda r: np.maximum(-r, 0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with plans.json and fold_<F>")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--ring", type=int, default=10, help="voxels")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    device = choose_device(args.device)

    plans = PlansManager(json.loads((args.model / "plans.json").read_text()))
    configuration = plans.get_configuration(args.model.name.split("__")[2])
    description = json.loads((args.model / "dataset.json").read_text())
    labels = {value: name for name, value in description["labels"].items() if isinstance(value, int) and value > 0}
    stage = torch.load(args.model / f"fold_{args.fold}" / "stage_autoencoder.pth", map_location="cpu", weights_only=True)
    channels = stage["settings"]["channels"]
    network = nnUNetTrainerGRCSF.build_network_architecture(plans, configuration, channels, len(labels) + 1, False)
    autoencoder = network.autoencoder
    autoencoder.load_state_dict(stage["module"])
    autoencoder.eval().to(device)

    preprocessed = Path(os.environ["nnUNet_preprocessed"], plans.dataset_name)
    folder = preprocessed / configuration.data_identifier
    cases = json.loads((preprocessed / "splits_final.json").read_text())[args.fold]["val"]
    dataset = infer_dataset_class(str(folder))(str(folder), cases)
    scores: dict[str, dict[str, list]] = {}
    for case in tqdm(cases, "cases"):
        image, reference, _, _ = dataset.load_case(case)
        image, reference = image[:], reference[0]
        if len(configuration.patch_size) == 2:
            image, reference = image[:, 0], reference[0]
        for name, residual in residual_maps(autoencoder, image, device).items():
            for value, label in labels.items():
                if (reference == value).any():
                    found = score(residual, reference, value, args.ring)
                    scores.setdefault(label, {}).setdefault(name, []).append(found)
    result = conditions(device) | {
        "dataset": plans.dataset_name, "plans": plans.plans_name, "fold": args.fold, "cases": len(cases), "ring": args.ring,
        "epochs": stage["epoch"], "history": stage["history"], "settings": stage["settings"],
        "classes": {label: {name: best(values) for name, values in maps.items()} for label, maps in scores.items()},
    }  # fmt: skip
    print_table(result["classes"])
    write_json(result, args.output)
    return 0


@torch.no_grad()
def residual_maps(autoencoder, image: np.ndarray, device: torch.device) -> dict[str, np.ndarray]:
    """Signed maps (C, *spatial) by name. The autoencoder sees the plan's patches, as in training, side by side."""
    x = torch.from_numpy(image.astype(np.float32))[None].to(device)
    patch = [grid * token for grid, token in zip(autoencoder.grid, autoencoder.token_size, strict=True)]
    pad = [n for size, length in zip(reversed(x.shape[2:]), reversed(patch), strict=True) for n in (0, max(0, length - size))]
    padded = torch.nn.functional.pad(x, pad)
    found = {ratio: [torch.zeros_like(padded) for _ in range(2)] for ratio in SETS}
    for start in itertools.product(*compute_steps_for_sliding_window(tuple(padded.shape[2:]), tuple(patch), 1.0)):
        tile = (..., *(slice(a, a + length) for a, length in zip(start, patch, strict=True)))
        for ratio, (mean, residual) in autoencoder(padded[tile]).items():
            found[ratio][0][tile], found[ratio][1][tile] = mean, residual
    crop = (slice(None), *(slice(0, size) for size in x.shape[2:]))
    maps = {f"autoencoder {ratio} %": residual[0][crop] for ratio, (_, residual) in found.items()}
    maps["autoencoder mean"] = sum(maps.values()) / len(maps)
    maps |= {f"|x - mean|, {ratio} %": x[0] - mean[0][crop] for ratio, (mean, _) in found.items()}
    for name, sigma in itertools.product(list(maps), (1, 2)):
        maps[f"{name}, smoothed {sigma}"] = gaussian_blur(maps[name][None], sigma)[0]
    for sigma in (1, 2, 4):
        maps[f"difference of Gaussians {sigma}"] = (gaussian_blur(x, sigma) - gaussian_blur(x, 2 * sigma))[0]
    for sigma in (2, 4, 8):
        maps[f"x - blur {sigma}"] = (x - gaussian_blur(x, sigma))[0]
    return {name: value.cpu().numpy() for name, value in maps.items()}


def score(residual: np.ndarray, reference: np.ndarray, value: int, ring: int) -> dict[str, dict[str, float]]:
    """Average precision and inside-to-ring ratio for each way to read the map."""
    lesion, free = reference == value, reference == 0
    around = binary_dilation(lesion, iterations=ring) & free
    # all lesion voxels, and of the unlabelled ones a sample that stands for all
    sample = np.random.default_rng(0).permutation(np.flatnonzero(free))[:SAMPLE]
    chosen = np.concatenate((np.flatnonzero(lesion), sample))
    weight = np.where(np.arange(len(chosen)) < lesion.sum(), 1.0, free.sum() / max(len(sample), 1))
    found = {}
    for way, read in WAYS.items():
        values = read(residual).mean(0)
        precision = average_precision_score(lesion.flat[chosen], values.flat[chosen], sample_weight=weight)
        found[way] = {
            "average_precision": float(precision),
            "ratio": float(values[lesion].mean() / max(values[around].mean(), 1e-8)),
        }
    return found


def best(cases: list[dict]) -> dict:
    """The way with the highest mean average precision."""
    mean = {
        way: {key: float(np.mean([case[way][key] for case in cases])) for key in ("average_precision", "ratio")} for way in WAYS
    }
    way = max(WAYS, key=lambda way: mean[way]["average_precision"])
    return {"way": way, "cases": len(cases), **mean[way], "absolute": mean["absolute"]}


def print_table(classes: dict) -> None:
    for label, maps in classes.items():
        print(f"\n{label}, {next(iter(maps.values()))['cases']} cases")
        for name, values in sorted(maps.items(), key=lambda item: -item[1]["average_precision"]):
            print(
                f"  {name:32} average precision {values['average_precision']:.4f} ({values['way']}), "
                f"ratio {values['ratio']:.2f}; absolute {values['absolute']['average_precision']:.4f}"
            )


if __name__ == "__main__":
    sys.exit(main())
