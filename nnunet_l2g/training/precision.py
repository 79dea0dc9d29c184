"""Islands of full precision inside autocast, and in networks that were cast as a whole (half, bfloat16, double)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn


def full_precision(device_type: str):
    """A context in which autocast changes nothing; what is computed in it has the precision of its inputs."""
    # Apple's mps refuses even a disabled autocast in older torch, meta always; nnU-Net autocasts on neither.
    return nullcontext() if device_type in ("mps", "meta") else torch.autocast(device_type, enabled=False)


def at_least_single(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in double if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_like(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """layer(x) with weights in the precision of x (..., in) -> (..., out)."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def bfloat16_where_possible(device: torch.device):
    """bfloat16 needs no gradient scaler; on the CPU and on older GPUs float32."""
    # not is_bf16_supported: in newer torch it counts emulation
    possible = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.autocast(device.type if possible else "cpu", dtype=torch.bfloat16, enabled=possible)
