"""What a SLURM job runs: one fold, from wherever it stands, so that a requeued job continues it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from nnunet_l2g.comparison.training import Training, unwhole_checkpoints
from nnunet_l2g.demo.runner import POLL, Child

# Runs before nnU-Net in its process. Its workers are not to ignore SIGTERM: multiprocessing ends them with it.
KEEP_ON_SIGTERM = (
    "import os, signal; signal.signal(signal.SIGTERM, lambda *_: None); "
    "os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)); "
)
WRITING = 30.0  # s that a checkpoint's writing may take before its training is ended all the same


class FoldJob:
    """A callable that submitit pickles, runs in a job, and asks for a `checkpoint` when the job is told to stop.

    It holds no state of the training: nnU-Net's checkpoints do. So the same object serves each start: also when SLURM
    itself kills and requeues the job, after a preemption without warning or a node's failure.

    variables : nnU-Net's, as they are where the job is submitted
    minutes : the job's time limit
    """

    child: Child | None = None
    begun = 0.0
    terminated = False

    def __init__(self, training: Training, variables: dict[str, str], minutes: float):
        self.training, self.variables, self.minutes = training, variables, minutes
        self.before: dict[str, int] = {}

    def __call__(self) -> None:
        """RuntimeError if nnUNetv2_train fails."""
        self.begun, self.before = time.monotonic(), checkpoint_times(self.training.folder)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))
        # SLURM signals every process of a job: what this one is to act on must not end nnU-Net in the midst of writing.
        self.child = self.training.start(self.variables, ignored=(stop_signal(),), prelude=KEEP_ON_SIGTERM)
        print(self.child.shown, flush=True)
        while not self.child.show() and not self.terminated:
            time.sleep(POLL)
        if self.terminated:
            self._await_end()
        self.child.kill_group()
        if (failure := self.training.failure(self.child)) is not None:
            raise RuntimeError(failure)

    def _await_end(self) -> None:
        """After SIGTERM, which has ended nnU-Net's workers already: SLURM is about to requeue the job, or to cancel it.

        Not back to submitit: a job that ends by itself is not requeued.
        """
        end_between_writes(self.child, self.training.folder)
        print("SIGTERM: nnU-Net is stopped; waiting for SLURM to requeue or to end this job", file=sys.stderr, flush=True)
        while True:
            time.sleep(POLL)

    def checkpoint(self):
        """Ends nnU-Net; the job to requeue, or None after a time limit that was too short for any progress."""
        from submitit.helpers import DelayedSubmission

        signal.signal(stop_signal(), signal.SIG_IGN)  # once is enough
        if self.child is not None:
            end_between_writes(self.child, self.training.folder)
            minutes = (time.monotonic() - self.begun) / 60
            if minutes > self.minutes / 2 and checkpoint_times(self.training.folder) == self.before:
                print(
                    f"No checkpoint of {self.training.folder} was written in {minutes:.0f} minutes: to go on from there would "
                    "go on for ever. Give the job more time (--slurm-time).",
                    file=sys.stderr,  # stdout may be in use: this is a signal handler
                    flush=True,
                )
                return None
        return DelayedSubmission(FoldJob(self.training, self.variables, self.minutes))


def stop_signal() -> signal.Signals:
    """The one that submitit has SLURM send before the time limit."""
    return signal.Signals["SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]


def checkpoint_times(folder: Path) -> dict[str, int]:
    """When each checkpoint, nnU-Net's or a stage's, was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")}


def end_between_writes(child: Child, folder: Path) -> None:
    """Ends nnU-Net and its workers at a moment when no checkpoint is half-written (nnU-Net writes them in place)."""
    end = time.monotonic() + WRITING
    while child.process.poll() is None:
        child.signal_group(signal.SIGSTOP)
        time.sleep(POLL)  # until all have stopped
        if not unwhole_checkpoints(folder) or time.monotonic() > end:
            break
        child.signal_group(signal.SIGCONT)
        time.sleep(POLL)
    child.kill_group()
