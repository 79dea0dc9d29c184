"""How fast the quantiser is, a training step of it: forward, backward and codebook update, ours and vector-quantize-pytorch's.

python benchmarks/quantiser.py [--device cuda] [-o quantiser.json]

B images of n tokens of width d = 128, K codes; float32, EMA updates, no dead codes replaced. n is 175 for nnU-Net's Hippocampus
plan and 294 for MALC's, 4704 for a decoder level of stride 4 of the latter. Both start from the same codebook and take turns.
Reported: median and quartiles over calls in ms, and the largest difference of the codebooks after all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from timing import choose_device, conditions, seconds, write_json
from vector_quantize_pytorch import VectorQuantize

from nnunet_l2g.layers import VectorQuantizer

SIZES = [(2, 175, 64), (2, 294, 64), (2, 294, 1024), (2, 4704, 64)]  # B, n, K
DIM, DECAY = 128, 0.99


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=50, metavar="N", help="of each and size; default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's own)")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    if args.calls < 2 or (args.threads is not None and args.threads < 1):
        parser.error(f"--calls {args.calls}, --threads {args.threads}: expected at least 2 calls and 1 thread")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    rows = []
    print(f"{'B':>3}{'n':>6}{'K':>6}  {'quantiser':<26}{'median ms':>10}{'quartiles':>16}{'difference':>12}")
    for size in SIZES:
        for row in compare(*size, device, args.calls):
            rows.append(row)
            low, high = row["quartiles_ms"]
            print(
                f"{row['batch']:>3}{row['n']:>6}{row['K']:>6}  {row['quantiser']:<26}{row['median_ms']:>10.3f}"
                f"{f'{low:.3f}-{high:.3f}':>16}{row['codebook_difference']:>12.1e}"
            )
    settings = {"vector_quantize_pytorch": version("vector-quantize-pytorch"), "dim": DIM, "calls": args.calls}
    write_json(conditions(device) | settings | {"results": rows}, args.output)
    return 0


def make_pair(codes: int, device: torch.device):
    """Ours and theirs with one codebook; neither replaces dead codes."""
    torch.manual_seed(0)
    ours = VectorQuantizer(codes, DIM, beta=0.25, decay=DECAY, dead_below=0.0).train().to(device)
    theirs = VectorQuantize(
        dim=DIM, codebook_size=codes, decay=DECAY, commitment_weight=0.25, kmeans_init=False, threshold_ema_dead_code=0
    )
    theirs = theirs.train().to(device)
    book = theirs._codebook
    book.embed.data.copy_(ours.codebook[None])
    book.embed_avg.data.copy_(ours.ema_sums[None])
    book.cluster_size.data.copy_(ours.ema_counts[None])
    return ours, theirs


def compare(batch: int, n: int, codes: int, device: torch.device, calls: int) -> list[dict]:
    ours, theirs = make_pair(codes, device)

    def step_ours(h):
        q = ours(h)
        (q.square().mean() + ours.loss).backward()
        ours.update()

    def step_theirs(h):
        q, _, loss = theirs(h)
        (q.square().mean() + loss.sum()).backward()

    steps = {"ours": step_ours, "vector-quantize-pytorch": step_theirs}
    times = {name: [] for name in steps}
    generator = torch.Generator().manual_seed(0)
    for call in range(calls + 3):
        h = torch.randn(batch, n, DIM, generator=generator).to(device)
        for name, step in steps.items():
            leaf = h.clone().requires_grad_()
            time = seconds(lambda step=step, leaf=leaf: step(leaf), device)
            if call >= 3:  # the first ones warm up
                times[name].append(1000 * time)
    difference = float((ours.codebook - theirs._codebook.embed[0]).abs().max())
    return [
        {
            "batch": batch,
            "n": n,
            "K": codes,
            "quantiser": name,
            "median_ms": round(statistics.median(values), 4),
            "quartiles_ms": [round(q, 4) for q in statistics.quantiles(values, n=4, method="inclusive")[::2]],
            "codebook_difference": difference,
        }
        for name, values in times.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
