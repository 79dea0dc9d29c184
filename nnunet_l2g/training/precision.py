"""Contexts of autocast: full precision inside it, and bfloat16 where the device has it."""

from __future__ import annotations

from contextlib import nullcontext

import torch


def full_precision(device_type: str):
    """A context without autocast: results have the precision of their inputs."""
    # Older torch refuses autocast on Apple's mps even if it is disabled, and on meta always. nnU-Net autocasts on neither.
    return nullcontext() if device_type in ("mps", "meta") else torch.autocast(device_type, enabled=False)


def bfloat16_where_possible(device: torch.device):
    """Autocast to bfloat16, which needs no gradient scaler; float32 on the CPU and on older GPUs."""
    # not is_bf16_supported, which is true for emulation too in newer torch
    possible = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.autocast(device.type if possible else "cpu", dtype=torch.bfloat16, enabled=possible)
