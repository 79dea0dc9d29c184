"""Is a transport plan flat? One patch's tokens of a trained L2GNet, transported as a plain insertion would and as ours does.

python benchmarks/flat_plan.py -m MODEL_FOLDER -i IMAGE_0000.nii.gz [-l LABEL] [-f 0] [--figure OUT.png] [-o OUT.json]

Same tokens each time; what changes, one thing after another: the plain insertion (cosines as they are, random references,
eps 0.2), centred cosines, eps 0.1, and the model's own references, which began where k-means placed them. Random references
are drawn with a fixed seed. Kept variance: Var(o) / Var(q) over tokens, 0 where the plan is flat. Tokens per reference: exp of
the entropy of a column, n where it is flat.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from timing import conditions, write_json

from nnunet_l2g.autoload import VARIABLE, with_trainers

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", dest="model", type=Path, required=True, help="nnU-Net's model folder of an nnUNetTrainerL2GNet")
    parser.add_argument("-i", dest="image", type=Path, required=True, help="CASE_0000.nii.gz")
    parser.add_argument("-l", dest="label", type=Path, help="guides the patch to its rarest class; default: the centre")
    parser.add_argument("-f", dest="fold", default="0")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    os.environ[VARIABLE] = with_trainers(os.environ.get(VARIABLE, ""))
    tokens, layer = read_tokens(args.model, args.fold, args.image, args.label)
    plans = make_plans(tokens, layer)
    rows = {name: measure(columns, tokens) for name, columns in plans.items()}
    print(f"{len(tokens)} tokens, {len(layer.references)} references")
    for name, row in rows.items():
        print(f"{name.replace(chr(10), ', '):44} kept variance {row['kept_variance']:.2g}, tokens per reference "
              f"{row['tokens_per_reference']:.1f}")  # fmt: skip
    found = {"tokens": len(tokens), "references": len(layer.references)}
    found["plans"] = {name.replace("\n", ", "): row for name, row in rows.items()}
    write_json(conditions(torch.device("cpu")) | found, args.output)
    if args.figure:
        draw(plans, rows, args.figure)


def read_tokens(folder: Path, fold: str, image: Path, label: Path | None):
    """q (n, d) of a patch, the one that `inspect` takes if it is given the label, float64; the model's TransportAlignment."""
    from nnunet_l2g.inspection.case import read_case
    from nnunet_l2g.inspection.model import load_model
    from nnunet_l2g.inspection.patch import cut, patch_box

    model = load_model(folder, fold, "checkpoint_final.pth")
    blocks = list(getattr(model.network, "l2g", []))
    layer = blocks[-1].alignment if blocks else None
    if layer is None or not layer.iterations or layer.relaxation is not None or blocks[-1].ties is not None:
        raise SystemExit(f"{folder}: {model.trainer} has no transport with uniform marginals, expected an nnUNetTrainerL2GNet")
    case = read_case(model, [image], label)
    guide = np.zeros(case.data.shape[1:], np.int16) if case.labels is None else np.maximum(case.labels, 0)
    index, box = patch_box(guide, model.patch_size)
    patch = torch.from_numpy(cut(case.data, index, box))[None]  # (1, C, *patch)
    explained = model.network.explain(patch)[model.network.places[-1]]
    return explained["tokens"][0].double(), layer.double()


def make_plans(q: torch.Tensor, layer) -> dict[str, np.ndarray]:
    """Columns A (n, p), which sum to 1, by what was done."""
    references = layer.references.detach()
    drawn = torch.randn(references.shape, generator=torch.Generator().manual_seed(SEED), dtype=q.dtype)
    centred = q - q.mean(0)
    return {
        "plain: cosines as they are\nrandom references, eps 0.2": transport(q, drawn, 0.2, layer.iterations),
        "cosines centred": transport(centred, drawn, 0.2, layer.iterations),
        f"and eps {layer.eps:g}": transport(centred, drawn, layer.eps, layer.iterations),
        "and the model's references": transport(centred, references, layer.eps, layer.iterations),
    }


def transport(q: torch.Tensor, references: torch.Tensor, eps: float, iterations: int) -> np.ndarray:
    from nnunet_l2g.layers import sinkhorn_potentials

    unit = torch.nn.functional.normalize
    scores = unit(q, dim=1) @ unit(references, dim=1).T  # (n, p)
    u, _ = sinkhorn_potentials(scores[None], eps, iterations)
    return (scores / eps + u[0][:, None]).softmax(0).numpy()


def measure(columns: np.ndarray, q: torch.Tensor) -> dict[str, float]:
    q = q.numpy()
    rows = columns / columns.sum(1, keepdims=True)  # (n, p)
    output = rows @ (columns.T @ q)  # (n, d)
    entropy = -(columns * np.log(np.maximum(columns, 1e-30))).sum(0)
    return {
        "kept_variance": float(output.var(0).sum() / q.var(0).sum()),
        "tokens_per_reference": float(np.exp(entropy).mean()),
    }


def draw(plans: dict[str, np.ndarray], rows: dict[str, dict], path: Path) -> None:
    """The plans side by side in the same colours, tokens and references each in an order that shows blocks."""
    from matplotlib.colors import PowerNorm

    from nnunet_l2g.inspection.drawing import save_figure

    n, p = next(iter(plans.values())).shape

    def panels(figure):
        axes = figure.subplots(1, len(plans), sharey=True)
        for axis, (name, columns) in zip(axes, plans.items(), strict=True):
            order = np.argsort((columns * np.log(np.maximum(columns, 1e-30))).sum(0))[::-1]  # most concentrated first
            by = np.lexsort((-columns.max(1), np.argsort(order)[columns.argmax(1)]))
            drawn = axis.imshow(columns[by][:, order] * n, cmap="viridis", norm=PowerNorm(0.5, 0, 20), aspect="auto",
                                interpolation="nearest")  # fmt: skip
            row = rows[name]
            axis.set_title(f"{name}\nkept variance {row['kept_variance']:.2g}")
            axis.set_xlabel(f"{p} references")
        axes[0].set_ylabel(f"{n} tokens")
        figure.colorbar(drawn, ax=list(axes), label="mass, 1: all tokens share alike", extend="max")

    caption = (
        "Transport plans of the same tokens. One colour is a flat plan: each reference averages nearly all tokens, and what "
        "comes back is the same everywhere. Each panel has its own order of tokens and references."
    )
    save_figure(panels, (13, 4.2), path, caption)


if __name__ == "__main__":
    main()
