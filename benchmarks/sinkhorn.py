"""Sinkhorn with gradients: ours, ours compiled, and POT's batched solver, on the same scores.

python benchmarks/sinkhorn.py [--device cuda] [--repeats 20] [-o sinkhorn.json]

Forward and backward of the plan A for cosine-like scores (B, n, p), eps 0.1, T 20; median milliseconds, solvers in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from nnunet_l2g.layers import sinkhorn_potentials

EPS, ITERATIONS = 0.1, 20
SHAPES = [(2, 294, 64), (9, 175, 64)]  # bottlenecks of MALC and Hippocampus


def plan(scores: torch.Tensor, solver: str) -> torch.Tensor:
    u, v = sinkhorn_potentials(scores, EPS, ITERATIONS, solver=solver)
    return (scores / EPS + u[:, :, None] + v[:, None, :]).exp()  # (B, n, p)


def seconds(function, scores: torch.Tensor, weights: torch.Tensor) -> float:
    """One forward and backward, the device's queue drained before and after."""
    wait = torch.cuda.synchronize if scores.is_cuda else lambda: None
    scores = scores.clone().requires_grad_()
    wait()
    begin = time.perf_counter()
    (function(scores) * weights).sum().backward()
    wait()
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("-o", "--output", help="JSON file")
    args = parser.parse_args(argv)
    compiled = torch.compile(lambda scores: plan(scores, "log"), fullgraph=True)
    solvers = {"ours": lambda s: plan(s, "log"), "ours compiled": compiled, "POT batched": lambda s: plan(s, "pot")}
    rows = []
    for shape in SHAPES:
        scores, weights = torch.rand(shape, device=args.device) * 2 - 1, torch.randn(shape, device=args.device)
        for function in solvers.values():  # compiles, warms up
            for _ in range(3):
                seconds(function, scores, weights)
        rounds = [{name: seconds(f, scores, weights) for name, f in solvers.items()} for _ in range(args.repeats)]
        medians = {name: 1e3 * statistics.median(r[name] for r in rounds) for name in solvers}
        rows.append({"shape": shape, "device": args.device, "torch": torch.__version__, "milliseconds": medians})
        print(f"{shape!s:16} " + "  ".join(f"{name} {value:.2f} ms" for name, value in medians.items()))
    if args.output:
        with open(args.output, "w") as file:
            json.dump(rows, file, indent=2)
            file.write("\n")
    return rows


if __name__ == "__main__":
    main()
