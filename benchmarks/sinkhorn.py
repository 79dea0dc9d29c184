"""How fast is our Sinkhorn beside POT's batched solver, forward and backward?

python benchmarks/sinkhorn.py [--device cpu] [--threads 1] [-o sinkhorn.json]

Cosines of n random tokens and p random references, eps 0.1, T iterations, uniform marginals. The loss is the mean square of
what each reference collects, and its gradient goes to the scores. Three solvers take turns: ours without logarithms, ours with
logarithms, and POT's `ot.batch.solve_batch` on logarithms. The ratio is POT's time over ours, the median over rounds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from ot.batch import solve_batch
from timing import choose_device, conditions, positive, ratios, seconds, take_turns, write_json

from nnunet_l2g.architectures.l2gnet import sinkhorn_potentials

EPS = 0.1
POT = "POT"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[280, 1024], metavar="N", help="default: 280 1024")
    parser.add_argument("--references", type=positive, default=64, metavar="P", help="default: %(default)s")
    parser.add_argument("--iterations", type=positive, default=20, metavar="T", help="default: %(default)s")
    parser.add_argument("--batch", type=positive, default=2, help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of torch; default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=15, help="default: %(default)s")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = choose_device(args.device), {}
    for tokens in args.tokens:
        calls = make_calls(args.batch, tokens, args.references, args.iterations, device)
        for call in calls.values():
            seconds(call, device)  # warms up
        times = take_turns(calls, device, args.rounds, number=5)
        rows[tokens] = {name: summarise(name, times) for name in calls}
        print(f"n {tokens}, p {args.references}, T {args.iterations}, batch {args.batch}, {device}")
        for name, row in rows[tokens].items():
            low, high = row["range"]
            milliseconds = f"{1000 * row['median_seconds']:9.2f} ms"
            print(f"    {name:<18}{milliseconds}, {row['times_as_fast_as_pot']} times POT ({low} to {high})")
    shape = {"references": args.references, "iterations": args.iterations, "batch": args.batch, "eps": EPS}
    write_json(conditions(device) | shape | {"tokens": rows}, args.output)
    return 0


def summarise(name: str, times: dict[str, list[list[float]]]) -> dict:
    """Median seconds of a solver, and how many times as fast as POT it is: median and range over rounds."""
    found = ratios(POT, times, name)
    return {
        "median_seconds": ratios(name, times, POT)["median_seconds"],
        "times_as_fast_as_pot": round(found["ratio_to_vanilla"], 2),
        "range": [round(ratio, 2) for ratio in found["ratio_range"]],
    }


def make_calls(batch: int, n: int, p: int, iterations: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """A forward and a backward with each solver, on the same scores."""
    generator = torch.Generator().manual_seed(0)
    tokens = F.normalize(torch.randn(batch, n, 32, generator=generator), dim=2).to(device)
    references = F.normalize(torch.randn(p, 32, generator=generator), dim=1).to(device)
    scores = (tokens @ references.T).requires_grad_()  # (B, n, p)
    a, b = torch.full((batch, n), 1 / n, device=device), torch.full((batch, p), 1 / p, device=device)

    def ours(bound: float) -> torch.Tensor:
        kernel = scores / EPS
        u, v = sinkhorn_potentials(kernel, a, b, iterations, bound)
        return (kernel + u[:, :, None] + v[:, None, :]).exp()

    def pots() -> torch.Tensor:
        return solve_batch(
            -scores, reg=EPS, a=a, b=b, max_iter=iterations, tol=0.0, method="log_sinkhorn", grad="autodiff"
        ).plan  # tol 0: exactly T iterations

    def step(plan: Callable[[], torch.Tensor]) -> None:
        scores.grad = None
        (p * plan().mT @ tokens).square().mean().backward()

    solvers = {"ours": lambda: ours(1 / EPS), "ours, logarithms": lambda: ours(math.inf), POT: pots}
    return {name: lambda plan=plan: step(plan) for name, plan in solvers.items()}


if __name__ == "__main__":
    sys.exit(main())
