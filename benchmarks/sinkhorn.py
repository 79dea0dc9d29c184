"""How fast Sinkhorn's potentials are, forward and backward, and what memory they take: ours beside four others.

python benchmarks/sinkhorn.py [--n 280 4096 --p 64 --batch 2] [--device cuda] [-o sinkhorn.json]

One call is T = 20 iterations on the scores of B images with n tokens and p references, the plan A = exp(S/eps + u + v), a
weighted sum of it, and the gradient to the scores; float32. The default n are nnU-Net's ACDC plan (280), and 128, 1024, 4096.

- ours, ours compiled: `sinkhorn_potentials`, alone and under torch.compile
- unrolled: the same loop, differentiated by autograd
- POT batch: `ot.batch.solve_batch`, all iterations differentiated; POT per sample: `ot.sinkhorn(method="sinkhorn_log")`
- geomloss: `SamplesLoss("sinkhorn", potentials=True)`, tensorized, with as many steps; its eps falls from 1 to ours on the way
  and its gradient is the last step's alone, so it computes something else: the difference says how far

Solvers take turns. Reported: median and quartiles over calls in ms; the memory of a call (CUDA: peak above what stood before,
CPU: what the backward keeps); the largest difference of the gradient from ours in float64, relative to its largest entry.
Skipped, and said so: what would take longer than --max-seconds a call, judged by the last size, or more than --max-mib, judged
by T n p B.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from timing import MIB, choose_device, conditions, peak_bytes, positive, seconds, write_json

from nnunet_l2g.layers import sinkhorn_potentials

EPS, ITERATIONS, EXACT_UP_TO = 0.1, 20, 2**22


def ours(scores: torch.Tensor, solver: str = "log") -> torch.Tensor:
    """Scores (B, n, p) -> the plan A of the same shape, as all of these."""
    u, v = sinkhorn_potentials(scores, EPS, ITERATIONS, solver=solver)
    return (scores / EPS + u[:, :, None] + v[:, None, :]).exp()


def unrolled(scores: torch.Tensor) -> torch.Tensor:
    kernel, v = scores / EPS, scores.new_zeros(scores.shape[0], 1, scores.shape[2])  # (B, n, p), (B, 1, p)
    log_rows = math.log(scores.shape[2] / scores.shape[1])
    for _ in range(ITERATIONS):
        u = log_rows - (kernel + v).logsumexp(2, keepdim=True)  # (B, n, 1)
        v = -(kernel + u).logsumexp(1, keepdim=True)  # (B, 1, p)
    return (kernel + u + v).exp()


def pot_per_sample(scores: torch.Tensor) -> torch.Tensor:
    import ot

    _, n, p = scores.shape
    a, b = scores.new_full((n,), 1 / n), scores.new_full((p,), 1 / p)
    options = dict(reg=EPS, method="sinkhorn_log", numItermax=ITERATIONS, stopThr=0.0, warn=False)
    return p * torch.stack([ot.sinkhorn(a, b, -sample, **options) for sample in scores])


def geomloss(scores: torch.Tensor) -> torch.Tensor:
    from geomloss import SamplesLoss

    batch, n, p = scores.shape
    x, y, cost = scores.new_zeros(batch, n, 1), scores.new_zeros(batch, p, 1), 1 - scores  # (B, n, p)

    def cost_between(first, _):
        return cost if first.data_ptr() == x.data_ptr() else cost.transpose(1, 2)

    falling = EPS ** (1 / (ITERATIONS - 2))
    loss = SamplesLoss(
        "sinkhorn", p=1, blur=EPS, diameter=1.0, scaling=falling, debias=False, potentials=True, cost=cost_between,
        backend="tensorized",
    )  # fmt: skip
    f, g = loss(scores.new_full((batch, n), 1 / n), x, scores.new_full((batch, p), 1 / p), y)  # (B, n), (B, p)
    return ((f[:, :, None] + g[:, None, :] - cost) / EPS).exp() / n


SOLVERS: dict[str, Callable] = {
    "ours": ours,
    "unrolled": unrolled,
    "POT batch": lambda scores: ours(scores, "pot"),
    "POT per sample": pot_per_sample,
    "geomloss": geomloss,
}
LIGHT = ("ours", "ours compiled", "geomloss")  # keep no matrix for each iteration


def main() -> int:
    args = parse_arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    solvers = dict(SOLVERS)
    if args.compile:
        solvers["ours compiled"] = torch.compile(ours, dynamic=False)
    rows, rates = [], {}
    print(f"{'n':>6}{'p':>5}{'B':>4}  {'solver':<16}{'median ms':>11}{'quartiles':>20}{'MiB':>9}{'difference':>12}")
    for n, p, batch in sorted(itertools.product(args.n, args.p, args.batch), key=math.prod):
        torch.compiler.reset()  # else it gives up after a few shapes, and runs uncompiled
        for row in compare(solvers, rates, n, p, batch, device, args):
            rows.append({"n": n, "p": p, "batch": batch, **row})
            print(f"{n:>6}{p:>5}{batch:>4}  {row['solver']:<16}{describe(row)}", flush=True)
    versions = {"pot": version("POT"), "geomloss": version("geomloss")}
    limits = {"max_seconds": args.max_seconds, "max_mib": args.max_mib}
    settings = versions | {"eps": EPS, "iterations": ITERATIONS, "calls": args.calls} | limits
    write_json(conditions(device) | settings | {"results": rows}, args.output)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"n": [128, 280, 1024, 4096], "p": [64], "batch": [2]}
    for name, values in sizes.items():
        parser.add_argument(f"--{name}", type=positive, nargs="+", default=values, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    parser.add_argument("--calls", type=positive, default=50, metavar="N", help="of each solver and size; default: %(default)s")
    parser.add_argument("--max-seconds", type=float, default=2.0, metavar="S", help="of a call; default: %(default)s")
    parser.add_argument("--max-mib", type=float, default=4096.0, metavar="MIB", help="of a call; default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of torch (default: torch's own)")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    return parser.parse_args()


def compare(solvers: dict, rates: dict, n: int, p: int, batch: int, device: torch.device, args) -> list[dict]:
    """A row for each solver; `rates` keeps seconds for each entry of the scores, from one size to the next."""
    generator = torch.Generator().manual_seed(0)
    tokens, references = torch.randn(batch, n, 32, generator=generator), torch.randn(p, 32, generator=generator)
    scores = torch.nn.functional.normalize(tokens, dim=2) @ torch.nn.functional.normalize(references, dim=1).T  # (B, n, p)
    weights = torch.randn(batch, n, p, generator=generator)
    size = scores.numel()
    exact = gradient(ours, scores.double(), weights.double()) if size <= EXACT_UP_TO else None
    scores, weights = scores.to(device), weights.to(device)
    rows, times = {}, {}
    for name, solver in solvers.items():
        mib = 4 * size * (10 if name in LIGHT else 4 * ITERATIONS) / MIB
        expected = rates.get(name, 0.0) * size
        if mib > args.max_mib:
            rows[name] = {"skipped": f"would take about {mib:.0f} MiB"}
        elif expected > args.max_seconds:
            rows[name] = {"skipped": f"would take about {expected:.1f} s"}
        else:
            rows[name], times[name] = first_calls(solver, scores, weights, exact, device), []
    for _ in range(args.calls):
        for name in times:
            times[name].append(seconds(lambda name=name: gradient(solvers[name], scores, weights), device))
    for name, values in times.items():
        rates[name] = statistics.median(values) / size
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        rows[name] |= {
            "median_ms": round(1000 * statistics.median(values), 4),
            "quartiles_ms": [round(1000 * low, 4), round(1000 * high, 4)],
            "ratio_to_ours": round(statistics.median(a / b for a, b in zip(values, times["ours"], strict=True)), 3)
            if "ours" in times
            else None,
        }
    return [{"solver": name, **row} for name, row in rows.items()]


def first_calls(solver: Callable, scores: torch.Tensor, weights: torch.Tensor, exact, device: torch.device) -> dict:
    """They compile and warm up, and say how near the gradient comes and what memory it takes."""
    found = gradient(solver, scores, weights).cpu()
    difference = None if exact is None else float((found - exact).abs().max() / exact.abs().max())
    gradient(solver, scores, weights)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    memory = peak_bytes(lambda: gradient(solver, scores, weights), device, [scores, weights]) - before
    return {"memory_mib": round(memory / MIB, 3), "gradient_difference": difference}


def gradient(solver: Callable, scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One call, forward and backward: the gradient to the scores."""
    leaf = scores.detach().requires_grad_()
    (solver(leaf) * weights).sum().backward()
    return leaf.grad


def describe(row: dict) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    low, high = row["quartiles_ms"]
    difference = "n/a" if row["gradient_difference"] is None else f"{row['gradient_difference']:.1e}"
    return f"{row['median_ms']:>11.3f}{f'{low:.3f}-{high:.3f}':>20}{row['memory_mib']:>9.2f}{difference:>12}"


if __name__ == "__main__":
    sys.exit(main())
