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
from nnunet_l2g.inspection.drawing import save_figure
from nnunet_l2g.inspection.transport import Plan, measure_plan
from nnunet_l2g.layers import TransportAlignment

SEED = 0
KEYS = ("kept_variance", "tokens_per_reference")


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
    rows = {name: {key: measure_plan(plan)[key] for key in KEYS} for name, plan in plans.items()}
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


def make_plans(q: torch.Tensor, layer) -> dict[str, Plan]:
    """Of q (n, d), by what was done. `layer` is the model's."""
    learnt = layer.references.detach()
    drawn = torch.randn(learnt.shape, generator=torch.Generator().manual_seed(SEED), dtype=q.dtype)
    return {
        "plain: cosines as they are\nrandom references, eps 0.2": transport(q, drawn, 0.2, layer.iterations, centred=False),
        "cosines centred": transport(q, drawn, 0.2, layer.iterations),
        f"and eps {layer.eps:g}": transport(q, drawn, layer.eps, layer.iterations),
        "and the model's references": transport(q, learnt, layer.eps, layer.iterations),
    }


@torch.no_grad()
def transport(q: torch.Tensor, references: torch.Tensor, eps: float, iterations: int, centred: bool = True) -> Plan:
    """The layer's own, of tokens q (n, d) and references (p, d)."""
    layer = TransportAlignment(q.shape[1], len(references), eps, iterations).double()
    layer.references.copy_(torch.nn.functional.normalize(references, dim=1))
    if not centred:
        layer.scores = lambda q, _: torch.nn.functional.normalize(q, dim=2) @ layer.references.T
    output = layer(q[None])[0]
    plan = layer.plan(q[None])
    values = (plan.scores[0], plan.columns[0], q, output)
    return Plan(*(v.numpy() for v in values), eps, iterations, plan.received[0].numpy() / len(references))


def draw(plans: dict[str, Plan], rows: dict[str, dict], path: Path) -> None:
    """The plans side by side in the same colours, tokens and references each in an order that shows blocks."""
    n, p = next(iter(plans.values())).columns.shape

    def panels(figure):
        from matplotlib.colors import PowerNorm

        axes = figure.subplots(1, len(plans), sharey=True)
        for axis, (name, plan) in zip(axes, plans.items(), strict=True):
            drawn = axis.imshow(
                plan.columns[np.ix_(*plan.order)] * n,
                cmap="viridis",
                norm=PowerNorm(0.5, 0, 20),
                aspect="auto",
                interpolation="nearest",
            )
            axis.set(title=f"{name}\nkept variance {rows[name]['kept_variance']:.2g}", xlabel=f"{p} references")
        axes[0].set_ylabel(f"{n} tokens")
        figure.colorbar(drawn, ax=list(axes), label="mass, 1: all tokens share alike", extend="max")

    caption = (
        "Transport plans of the same tokens. One colour is a flat plan: each reference averages nearly all tokens, and what "
        "comes back is the same everywhere. Each panel has its own order of tokens and references."
    )
    save_figure(panels, (13, 4.2), path, caption)


if __name__ == "__main__":
    main()
