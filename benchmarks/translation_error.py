"""How near does a short translation of the phantom come to the truth, and at which learning rate?

python benchmarks/translation_error.py --rates 2e-4 5e-4 1e-3 --steps 600 [-o OUT.json]

Cine hearts to black blood, 2D slices of 32 x 32, each normalised by itself, 64 + 64 hearts, none in both; 16 held-out hearts
exist in both contrasts, so their translation has a true answer, which the training never sees. A small translator on a CPU.

error: mean absolute difference to the truth, both smoothed by 3 x 3 pixels, in standard deviations of the image.
correlation: with the truth, likewise smoothed, mean over hearts. reconstruction: the error of a true target image
translated into a target style, about the best that can be reached.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from timing import conditions

from nnunet_l2g.phantom import make_case
from nnunet_l2g.translation.stage import TranslationStage
from nnunet_l2g.translation.translator import Translator

SIZE, TRAINING, HELD_OUT, SLICES, WIDTH = 32, 64, 16, 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    result = {"conditions": conditions(torch.device("cpu")), "rows": []}
    print("| rate | steps | error, before | after | correlation, before | after | reconstruction |\n" + "|---" * 7 + "|")
    for rate in args.rates:
        row = train(rate, args.steps, args.seed)
        result["rows"].append(row)
        print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |", flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def train(rate: float, steps: int, seed: int) -> dict[str, float]:
    """Trains at one rate and measures on the held-out hearts."""
    torch.manual_seed(seed)
    source, target = hearts(range(TRAINING), "cine"), hearts(range(100, 100 + TRAINING), "black_blood")
    held, truth = (hearts(range(200, 200 + HELD_OUT), contrast) for contrast in ("cine", "black_blood"))
    translator = Translator(1, 2, width=WIDTH)
    stage = TranslationStage(translator, torch.device("cpu"), 1, steps, 1, {}, slices=SLICES, lr=rate)
    generator = torch.Generator().manual_seed(seed)
    stage.begin()
    for _ in range(steps):
        chosen = torch.randint(TRAINING, (2, SLICES), generator=generator)
        stage.train_step({"data": source[chosen[0]], "unlabelled": target[chosen[1]]})
    translator.place_styles(translator.encode_style(target, "target"))
    translated, again = (translator.translate(x, translator.draw_styles(len(x))) for x in (held, truth))
    return {
        "rate": rate,
        "steps": steps,
        "error_before": error(held, truth),
        "error": error(translated, truth),
        "correlation_before": correlation(held, truth),
        "correlation": correlation(translated, truth),
        "reconstruction": error(again, truth),
    }


def hearts(seeds: range, contrast: str) -> torch.Tensor:
    """(B, 1, H, W), each of mean 0 and deviation 1."""
    images = [make_case(seed, contrast, size=(SIZE, SIZE), spacing=(115.2 / SIZE,) * 2)[0] for seed in seeds]
    stack = torch.from_numpy(np.stack([sitk.GetArrayFromImage(image).astype(np.float32) for image in images]))[:, None]
    return (stack - stack.mean((2, 3), keepdim=True)) / stack.std((2, 3), keepdim=True)


def smooth(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((smooth(x) - smooth(truth)).abs().mean())


def correlation(x: torch.Tensor, truth: torch.Tensor) -> float:
    pairs = zip(smooth(x), smooth(truth), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in pairs]).mean())


if __name__ == "__main__":
    main()
