"""What the terminal shows of nnU-Net's output: one line for each epoch and case; the log files have everything."""

from __future__ import annotations

import re

_TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: ")
_VALUES = re.compile(r"(nan|-?\d+\.?\d*(?:e-?\d+)?)(?=[),\]])")  # of [0.5, nan] and [np.float32(0.5), np.float32(nan)]


class TrainingProgress:
    """Collects nnU-Net's lines of an epoch into one: `epoch 3: train_loss -0.47, ..., Pseudo dice 0.88 0.80 0.47`."""

    def __init__(self):
        self.epoch, self.parts = None, []

    def __call__(self, line: str) -> str | None:
        line = _TIMESTAMP.sub("", line).strip()
        if found := re.fullmatch(r"Epoch (\d+)", line):
            self.epoch, self.parts = found[1], []
        elif re.match(r"(train_loss|val_loss) ", line):
            self.parts.append(line)
        elif line.startswith("Pseudo dice"):
            self.parts.append("Pseudo dice " + " ".join(_VALUES.findall(line)))
        elif (found := re.match(r"Epoch time: (\d+\.?\d*) s", line)) and self.epoch is not None:
            return f"epoch {self.epoch}: {', '.join(self.parts)} ({float(found[1]):.0f} s)"
        elif re.match(r"(predicting \w+$|Mean Validation Dice)", line):
            return line
        return None


def planning_progress(line: str) -> str | None:
    """nnU-Net's three parts of planning."""
    return line if re.match(r"(Fingerprint extraction|Experiment planning|Preprocessing)\.\.\.", line) else None


def prediction_progress(line: str) -> str | None:
    """One line for each case."""
    return line.rstrip(":") if line.startswith("Predicting ") else None


def no_progress(line: str) -> str | None:
    """For commands of a few seconds."""
    return None
