"""What a checkpoint of nnU-Net says, read without unpickling foreign code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.compare.curves import Curves
from nnunet_l2g.files import load_safely


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
    """Read by `load_safely`, which runs nothing of the file.

    None if the file cannot be read that way (a trainer that stores more, a damaged file); the text log is
    then what is left.
    """
    try:
        content = load_safely(path)
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
