"""Training curves, from a checkpoint's log or from nnU-Net's text log."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

_NUMBER = r"(nan|-?inf|-?\d+\.?\d*(?:e[-+]?\d+)?)"
_LINES = {
    "epoch": re.compile(r"Epoch (\d{1,9})\s*$"),
    "train_loss": re.compile(rf"train_loss {_NUMBER}"),
    "val_loss": re.compile(rf"val_loss {_NUMBER}"),
    "pseudo": re.compile(r"Pseudo dice \[(.*)\]"),
    "seconds": re.compile(rf"Epoch time: {_NUMBER} s"),
}
_VALUE = re.compile(_NUMBER + r"(?=[),]|$)")  # of "0.5, nan" and "np.float32(0.5), np.float32(nan)"


@dataclass
class Curves:
    """One value for each epoch, as many as were finished; empty where unknown.

    train_loss, val_loss : nnU-Net's (Dice and cross-entropy, lower is better)
    pseudo_dice : mean foreground Dice of validation patches, no sliding window
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
        """The median: the first epoch warms up, and a resumed one has waited."""
        return statistics.median(self.seconds) if self.seconds else None

    @classmethod
    def from_logging(cls, logging: dict) -> Curves:
        """From `checkpoint["logging"]`. KeyError, TypeError or ValueError if it is not nnU-Net's."""
        ends, starts = logging["epoch_end_timestamps"], logging["epoch_start_timestamps"]
        if len({len(logging[key]) for key in ("train_losses", "val_losses", "mean_fg_dice")}) > 1:
            raise ValueError("curves of different lengths")
        return cls(
            [float(value) for value in logging["train_losses"]],
            [float(value) for value in logging["val_losses"]],
            [float(value) for value in logging["mean_fg_dice"]],
            [float(end) - float(start) for start, end in zip(starts, ends, strict=False)],
        )


def read_logs(fold: Path) -> Curves:
    """From `training_log_*.txt` in a fold's folder, oldest first: an epoch that was run again replaces the first run of it.

    A new run from epoch 0 begins anew. An empty Curves if there is no log.
    """
    epochs: dict[int, dict[str, float]] = {}
    current: dict[str, float] = {}
    for path in sorted(fold.glob("training_log_*.txt"), key=_started):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if found := _LINES["epoch"].search(line):
                number, current = int(found[1]), {}
                epochs = {earlier: values for earlier, values in epochs.items() if earlier < number}
                epochs[number] = current
            elif found := _LINES["pseudo"].search(line):
                values = [float(value) for value in _VALUE.findall(found[1])]
                defined = [value for value in values if not math.isnan(value)]
                current["pseudo"] = statistics.fmean(defined) if defined else math.nan
            else:
                for name in ("train_loss", "val_loss", "seconds"):
                    if found := _LINES[name].search(line):
                        current[name] = float(found[1])
    done = [values for _, values in sorted(epochs.items()) if "seconds" in values]
    columns = ([values.get(name, math.nan) for values in done] for name in ("train_loss", "val_loss", "pseudo", "seconds"))
    return Curves(*columns)


def _started(log: Path) -> list[int]:
    """Year, month, ..., second: nnU-Net writes them into the name without leading zeros."""
    return [int(number) for number in re.findall(r"\d+", log.name)]
