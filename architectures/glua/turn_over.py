"""Negatives of some channels, about the 0 of normalised intensities."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def turn_over(images: Array, polarity: Array, axis: int = 0) -> Array:
    r""":math:`\pi_c x_c`, a copy; its own inverse.

    Parameters
    ----------
    images : (..., C, *spatial), C at `axis`
    polarity : (C,), 1 or -1 for each channel
    """
    return images * polarity.reshape(-1, *[1] * (images.ndim - axis - 1))
