"""Islands of full precision inside autocast."""

from __future__ import annotations

from contextlib import nullcontext

import torch


def full_precision(device_type: str):
    """A context in which autocast changes nothing; what is computed in it has the precision of its inputs."""
    # Apple's mps refuses even a disabled autocast in older torch, meta always; nnU-Net autocasts on neither.
    return nullcontext() if device_type in ("mps", "meta") else torch.autocast(device_type, enabled=False)
