"""How near does a short translation of the phantom come to the truth?

python benchmarks/translation_error.py --seeds 0 1 [-o OUT.json]
python benchmarks/translation_error.py --halvings 1 2 --rates 2e-4 1e-3

Cine hearts to black blood, 2D slices of 32 x 32, each normalised by itself, 64 + 64 hearts, none in both; 16 held-out hearts
exist in both contrasts, so their translation has a true answer, which the training never sees. A small translator on a CPU.

error: mean absolute difference to the truth, both smoothed by 3 x 3 pixels, in standard deviations of the image.
correlation: with the truth, likewise smoothed, mean over hearts. reconstruction: the error of a true target image
translated into a target style, about the best that can be reached. structures: of ventricles and myocardium, mean absolute
difference of a structure's mean intensity over all hearts. shift: of edges, pixels, translation against source.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from timing import conditions

from nnunet_l2g.architectures.glua.translation.stage import TranslationStage
from nnunet_l2g.architectures.glua.translation.structure_loss import measure_shift
from nnunet_l2g.architectures.glua.translation.translator import Translator, halvings_of
from nnunet_l2g.phantom import make_case

SIZE, TRAINING, HELD_OUT, SLICES, WIDTH = 32, 64, 16, 4, 8
HALVINGS = halvings_of((SIZE, SIZE))  # the default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halvings", type=int, nargs="+", default=[HALVINGS], metavar="N", help="of an image's sides")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    result = {"conditions": conditions(torch.device("cpu")), "rows": []}
    for halvings, rate, seed in itertools.product(args.halvings, args.rates, args.seeds):
        row = {"halvings": halvings, "rate": rate, "steps": args.steps, "seed": seed}
        row |= train(halvings, rate, args.steps, seed)
        if not result["rows"]:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        result["rows"].append(row)
        print("| " + " | ".join(f"{x:.3g}" for x in row.values()) + " |", flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


def train(halvings: int, rate: float, steps: int, seed: int) -> dict[str, float]:
    """Trains one translator and measures on the held-out hearts."""
    torch.manual_seed(seed)
    (source, _), (target, _) = hearts(range(TRAINING), "cine"), hearts(range(100, 100 + TRAINING), "black_blood")
    (held, labels), (truth, _) = (hearts(range(200, 200 + HELD_OUT), contrast) for contrast in ("cine", "black_blood"))
    translator = Translator(1, 2, width=WIDTH, halvings=halvings)
    stage = TranslationStage(translator, torch.device("cpu"), 1, steps, 1, {}, slices=SLICES, lr=rate)
    generator = torch.Generator().manual_seed(seed)
    stage.begin()
    for _ in range(steps):
        chosen = torch.randint(TRAINING, (2, SLICES), generator=generator)
        stage.train_step({"data": source[chosen[0]], "unlabelled": target[chosen[1]]})
    translator.set_target_styles(translator.encode_target_styles(target))
    translated, again = (translator.translate(x, translator.draw_styles(len(x))) for x in (held, truth))
    return {
        "error_before": error(held, truth),
        "error": error(translated, truth),
        "correlation_before": correlation(held, truth),
        "correlation": correlation(translated, truth),
        "structures_before": structures(held, truth, labels),
        "structures": structures(translated, truth, labels),
        "reconstruction": error(again, truth),
        "shift": float(measure_shift(held, translated).norm()),
    }


def hearts(seeds: range, contrast: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, each of mean 0 and deviation 1, and their labels, both (B, 1, H, W)."""
    cases = [make_case(seed, contrast, size=(SIZE, SIZE), spacing=(115.2 / SIZE,) * 2)[:2] for seed in seeds]
    arrays = [[sitk.GetArrayFromImage(part).astype(np.float32) for part in case] for case in cases]  # (image, labels) each
    images, labels = torch.from_numpy(np.array(arrays))[:, :, None].unbind(1)
    return (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True), labels


def smooth(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((smooth(x) - smooth(truth)).abs().mean())


def correlation(x: torch.Tensor, truth: torch.Tensor) -> float:
    pairs = zip(smooth(x), smooth(truth), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in pairs]).mean())


def structures(x: torch.Tensor, truth: torch.Tensor, labels: torch.Tensor) -> float:
    return float(np.mean([(x - truth)[labels == label].mean().abs() for label in (1, 2, 3)]))


if __name__ == "__main__":
    main()
