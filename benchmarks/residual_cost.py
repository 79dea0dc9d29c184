"""What the residual maps cost: complementary masks against five random masks at each ratio; operations and seconds.

python benchmarks/residual_cost.py [--plan idrid] [--device cuda] [-o residual_cost.json]

One image of the plan's patch, eval mode, no gradient. Operations are counted on the meta device (torch.utils.flop_counter,
attention as two matrix products): forward passes of the plan's plain network, of the whole GRCSF network, of the maps as they
are made here (four complementary sets encoded once, masked tokens decoded only), and of the naive way: five random masks at
50 % and five at 75 %, each encoded for itself and all tokens decoded. Seconds are of the two ways to make the maps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from timing import choose_device, conditions, seconds, write_json
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_l2g.architectures import GRCSF
from nnunet_l2g.architectures.grcsf.masked_autoencoder import SETS, MaskedAutoencoder
from nnunet_l2g.architectures.grcsf.partition import make_partition
from nnunet_l2g.architectures.grcsf.patches import choose_token_size, patchify

PLANS = {  # patch, channels, features, as nnU-Net 2.8 plans them
    "idrid": ((768, 1152), 3, [32, 64, 128, 256, 512, 512, 512, 512]),
    "malc": ((96, 112, 112), 1, [32, 64, 128, 256, 320]),
    "hippocampus": ((40, 56, 40), 1, [32, 64, 128, 256]),
    "tiny": ((64, 96), 1, [8, 16, 32]),
}
RANDOM_MASKS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="idrid", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=5, metavar="N", help="of each way; default: %(default)s")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    if args.calls < 1:
        parser.error(f"--calls is {args.calls}, expected at least 1")
    device = choose_device(args.device)
    plain, network = make_networks(args.plan)
    patch, channels, _ = PLANS[args.plan]

    x = torch.empty(1, channels, *patch, device="meta")
    meta = network.to("meta")
    operations = {
        "plain network": count(lambda: plain.to("meta")(x)),
        "whole network": count(lambda: meta(x)),
        "maps, complementary": count(lambda: meta.autoencoder(x)),
        "maps, five random masks": count(lambda: naive_maps(meta.autoencoder, x)),
    }
    autoencoder = make_networks(args.plan)[1].autoencoder.to(device)
    x = torch.randn(1, channels, *patch, device=device)
    ways = {"maps, complementary": autoencoder, "maps, five random masks": lambda x: naive_maps(autoencoder, x)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for call in range(args.calls + 1):
            for name, way in ways.items():
                duration = seconds(lambda way=way: way(x), device)
                if call:  # the first warms up
                    times[name].append(duration)
    result = conditions(device) | {
        "plan": args.plan,
        "token_size": list(network.token_size),
        "tokens": autoencoder.position.shape[0],
        "gflop": {name: round(value / 1e9, 2) for name, value in operations.items()},
        "median_seconds": {name: round(statistics.median(values), 5) for name, values in times.items()},
    }
    for name, value in result["gflop"].items():
        took = f"{result['median_seconds'][name]:.4f} s" if name in times else ""
        print(f"{name:26}{value:>10.1f} GFLOP {value / result['gflop']['plain network']:>7.3f} of plain  {took}")
    write_json(result, args.output)
    return 0


def make_networks(plan: str) -> tuple[nn.Module, GRCSF]:
    """The plan's plain network and GRCSF on it, in eval mode."""
    patch, channels, features = PLANS[plan]
    dims = len(patch)
    strides = [1] + [2] * (len(features) - 1)
    backbones = [
        PlainConvUNet(
            channels, len(features), features, {2: nn.Conv2d, 3: nn.Conv3d}[dims], 3, strides, 2, 5, 2, conv_bias=True,
            norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims], nonlin=nn.LeakyReLU, deep_supervision=False,
        )
        for _ in range(2)
    ]  # fmt: skip
    token_size = choose_token_size(patch, [1.0] * dims, [4 if len(features) > 3 else 2] * dims)
    return backbones[0].eval(), GRCSF(backbones[1], patch, token_size).eval()


def naive_maps(autoencoder: MaskedAutoencoder, x: torch.Tensor) -> torch.Tensor:
    """The mean of |x - mean| over five random masks at each ratio, all tokens decoded."""
    tokens = patchify(x, autoencoder.token_size)  # (B, N, C T)
    every = torch.arange(tokens.shape[1], device=x.device)[None]  # (1, N)
    tables = {"decoder_position": autoencoder.decoder_position}
    total = 0
    for sets in SETS.values():
        for _ in range(RANDOM_MASKS):
            seen = 1 if sets == 4 else 2  # quarters: 25 % or 50 % are visible
            order = torch.randperm(tokens.shape[1])  # on the CPU: the meta device has no numbers
            visible = make_partition(order, 4).visible[:seen].reshape(1, -1).to(x.device)  # (1, n)
            latent = autoencoder.encode(tokens, visible, autoencoder.position)  # (B, 1, n, width)
            mean, _ = autoencoder.predict(latent, tokens, visible, every, autoencoder.grid, tables)  # (B, 1, N, C T)
            total = total + (tokens[:, None] - mean).abs()
    return total / (len(SETS) * RANDOM_MASKS)


def count(call) -> int:
    """Floating-point operations of a forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(main())
