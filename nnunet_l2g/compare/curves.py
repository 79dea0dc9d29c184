"""Training curves from the log that nnU-Net keeps in a checkpoint."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Curves:
    """One value for each finished epoch.

    train_loss, val_loss : nnU-Net's losses (Dice and cross-entropy, lower is better)
    pseudo_dice : mean foreground Dice of validation patches, without sliding window
    seconds : wall time of each epoch
    """

    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    pseudo_dice: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        return len(self.train_loss)

    @property
    def seconds_per_epoch(self) -> float | None:
        """The median, because the first epoch is slower, and a resumed epoch includes the pause."""
        return statistics.median(self.seconds) if self.seconds else None

    @classmethod
    def from_logging(cls, logging: dict) -> Curves:
        """From `checkpoint["logging"]`. KeyError, TypeError or ValueError if it is not nnU-Net's."""
        starts, ends = logging["epoch_start_timestamps"], logging["epoch_end_timestamps"]
        if len({len(logging[key]) for key in ("train_losses", "val_losses", "mean_fg_dice")}) > 1:
            raise ValueError("curves of different lengths")
        return cls(
            [float(value) for value in logging["train_losses"]],
            [float(value) for value in logging["val_losses"]],
            [float(value) for value in logging["mean_fg_dice"]],
            [float(end) - float(start) for start, end in zip(starts, ends, strict=False)],
        )
