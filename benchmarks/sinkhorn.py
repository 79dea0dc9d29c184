"""How fast Sinkhorn's potentials are, forward and backward: ours, ours under torch.compile, and POT's `ot.batch`.

python benchmarks/sinkhorn.py [--device cuda] [-o sinkhorn.json]

One call is T = 20 iterations on the scores of B images with n tokens and p = 64 references, the plan A = exp(S/eps + u + v),
a weighted sum of it, and the gradient to the scores; float32. n is 175 for nnU-Net's Hippocampus plan and 294 for MALC's.
The three take turns. Reported: median and quartiles over calls in ms, and the largest difference of the gradient from
ours in float64 relative to its largest entry: they compute the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from timing import choose_device, conditions, seconds, write_json

from nnunet_l2g.layers import sinkhorn_potentials

TOKENS, BATCHES, REFERENCES = (175, 294), (2, 9), 64
EPS, ITERATIONS = 0.1, 20


def weighted_plan(scores: torch.Tensor, weights: torch.Tensor, solver: str = "log") -> torch.Tensor:
    """sum_ij W_ij A_ij: scores and weights (B, n, p) -> ()."""
    u, v = sinkhorn_potentials(scores, EPS, ITERATIONS, solver=solver)
    return ((scores / EPS + u[:, :, None] + v[:, None, :]).exp() * weights).sum()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    parser.add_argument("--calls", type=int, default=50, metavar="N", help="of each solver and size; default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's own)")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    if args.calls < 1 or (args.threads is not None and args.threads < 1):
        parser.error(f"--calls {args.calls}, --threads {args.threads}: expected whole numbers from 1 on")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    solvers = {"ours": weighted_plan, "pot": lambda scores, weights: weighted_plan(scores, weights, "pot")}
    if args.compile:
        solvers["ours compiled"] = torch.compile(weighted_plan, dynamic=False)
    rows = []
    print(f"{'n':>4}{'p':>4}{'B':>3}  {'solver':<14}{'median ms':>10}{'quartiles':>16}{'difference':>12}")
    for n in TOKENS:
        for batch in BATCHES:
            for row in compare(solvers, batch, n, device, args.calls):
                rows.append(row)
                low, high = row["quartiles_ms"]
                print(
                    f"{n:>4}{REFERENCES:>4}{batch:>3}  {row['solver']:<14}{row['median_ms']:>10.3f}"
                    f"{f'{low:.3f}-{high:.3f}':>16}{row['gradient_difference']:>12.1e}"
                )
    settings = {"pot": version("POT"), "eps": EPS, "iterations": ITERATIONS, "calls": args.calls}
    write_json(conditions(device) | settings | {"results": rows}, args.output)
    return 0


def compare(solvers: dict[str, Callable], batch: int, n: int, device: torch.device, calls: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    tokens, references = torch.randn(batch, n, 32, generator=generator), torch.randn(REFERENCES, 32, generator=generator)
    scores = torch.nn.functional.normalize(tokens, dim=2) @ torch.nn.functional.normalize(references, dim=1).T  # (B, n, p)
    weights = torch.randn(batch, n, REFERENCES, generator=generator)
    exact = gradient(weighted_plan, scores.double(), weights.double())
    scores, weights = scores.to(device), weights.to(device)
    difference = {  # the first calls: they compile and warm up
        name: float((gradient(solver, scores, weights).cpu() - exact).abs().max() / exact.abs().max())
        for name, solver in solvers.items()
    }
    times = {name: [] for name in solvers}
    for call in range(calls + 2):
        for name, solver in solvers.items():
            time = seconds(lambda solver=solver: gradient(solver, scores, weights), device)
            if call >= 2:
                times[name].append(1000 * time)
    return [
        {
            "n": n,
            "p": REFERENCES,
            "batch": batch,
            "solver": name,
            "median_ms": round(statistics.median(times[name]), 4),
            "quartiles_ms": quartiles(times[name]),
            "gradient_difference": difference[name],
        }
        for name in solvers
    ]


def gradient(solver: Callable, scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One call, forward and backward: the gradient to the scores."""
    leaf = scores.detach().requires_grad_()
    solver(leaf, weights).backward()
    return leaf.grad


def quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(low, 4), round(high, 4)]


if __name__ == "__main__":
    sys.exit(main())
