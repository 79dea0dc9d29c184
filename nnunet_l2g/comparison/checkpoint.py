"""What a checkpoint of nnU-Net says, read without unpickling foreign code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.comparison.curves import Curves


@dataclass(frozen=True)
class Checkpoint:
    """epochs : finished epochs
    parameters : floating-point numbers in the network's state, shared tensors once (buffers included)
    curves : the log it carries
    mirroring : axes that prediction mirrors; None for none
    """

    epochs: int
    parameters: int
    curves: Curves
    mirroring: tuple[int, ...] | None = None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Reads with `weights_only=True`: a checkpoint can hold tensors, numbers and lists, and run nothing.

    nnU-Net's log holds numpy scalars, so exactly numpy's scalar and dtype classes are allowed. None if the file cannot be
    read that way (too old a torch, a trainer that stores more, a damaged file); the text log is then what is left.
    """
    import torch

    safe_globals = getattr(torch.serialization, "safe_globals", None)
    if safe_globals is None:
        return None
    try:
        with safe_globals(_numpy_classes()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        mirroring = content.get("inference_allowed_mirroring_axes")
        return Checkpoint(
            int(content["current_epoch"]),
            _count(content["network_weights"]),
            Curves.from_logging(content["logging"]),
            None if mirroring is None else tuple(int(axis) for axis in mirroring),
        )
    except Exception:  # whatever is wrong with it: the caller has another source
        return None


def _count(weights: dict) -> int:
    """nnU-Net's decoder holds its encoder again, so each tensor is told apart by where it lies."""
    unique = {
        (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape)): tensor.numel()
        for tensor in weights.values()
        if tensor.is_floating_point()
    }
    return sum(unique.values())


def _numpy_classes() -> list:
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]  # numpy's function that rebuilds a scalar
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")]
    # numpy 2 moved the function; a checkpoint keeps the name of the numpy that wrote it
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *dtypes]
