"""Checkpoints of nnU-Net read without unpickling foreign code."""

from __future__ import annotations

from pathlib import Path


def load_safely(path: Path) -> dict:
    """A checkpoint's content on the CPU, by `weights_only=True`: it can hold tensors, numbers and lists, and run nothing.

    nnU-Net's log holds numpy scalars, so exactly numpy's scalar and dtype classes are allowed.

    Raises
    ------
    Exception : whatever torch raises for a damaged file, or for one that holds other classes
    """
    import torch

    with torch.serialization.safe_globals(_numpy_classes()):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _numpy_classes() -> list:
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]  # numpy's function that rebuilds a scalar
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")]
    # numpy 2 moved the function; a checkpoint keeps the name of the numpy that wrote it
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *dtypes]
