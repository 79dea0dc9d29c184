"""Trainings as jobs of a SLURM cluster, one for each fold, sent through submitit.

A job holds no state of its training, nnU-Net's checkpoints do: however it was ended, the same job started again continues.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_l2g.compare.models import FINISHED
from nnunet_l2g.compare.training import ADVICE, Training
from nnunet_l2g.errors import UserError
from nnunet_l2g.processes import POLL, Child, Interrupted, LogLines, stop_signals
from nnunet_l2g.progress import TrainingProgress

JOBS = "slurm"  # submitit's files, below the report's folder
LEAST_MINUTES = 5  # of a job: it is told to stop 90 s before its time limit, and SLURM may be a minute early with that
FIXED = ("job-name", "output", "error", "open-mode", "signal", "time", "requeue", "no-requeue", "array")  # by us or submitit
ASK = 15.0  # s between two questions to the controller
SILENT = 40  # unanswered ones in a row until we give up
GONE = 3  # answers that show a job ended, until an unfinished fold is a failure: files of other machines arrive late
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
KEPT = ("SLURM_CONF", "SUBMITIT_PREEMPT_SIGNAL")  # the user's settings, as are SBATCH_...
TIMEOUTS = 10_000  # requeues that submitit allows: FoldJob itself stops where there is no progress


@dataclass(frozen=True)
class SlurmOptions:
    """Of one job, which trains one fold.

    time : minutes
    memory : GB; None leaves it to the partition
    extra : further options of sbatch, without the dashes; True for one without a value
    """

    partition: str | None = None
    gpus: int = 1
    time: int = 24 * 60
    memory: float | None = None
    cpus: int | None = None
    extra: dict[str, str | bool] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--executor and its --slurm-... options."""
    group = parser.add_argument_group("where --train runs; docs/cluster.md")
    group.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="local: this machine, one fold on each GPU (limit them with CUDA_VISIBLE_DEVICES); slurm: one job for each fold",
    )
    for option, kind, metavar, text in (
        ("--slurm-partition", str, "NAME", "default: the cluster's"),
        ("--slurm-gpus", int, "N", "of one fold; more than 1 is nnU-Net's -num_gpus (default: 1)"),
        ("--slurm-time", int, "MINUTES", "of one job; a longer training is continued (default: 1440)"),
        ("--slurm-memory", float, "GB", "of one job (default: the partition's)"),
        ("--slurm-cpus", int, "N", "of one job (default: the cluster's, often 1: name it)"),
    ):
        group.add_argument(option, type=kind, metavar=metavar, help=text)
    extra = "further options of sbatch, without the dashes: account=mine qos=long exclusive"
    group.add_argument("--slurm-extra", nargs="+", default=[], metavar="KEY=VALUE", help=extra)


def slurm_options(args: argparse.Namespace) -> SlurmOptions | None:
    """None for --executor local. UserError for options that do not fit together, or a number out of its range."""
    given = {name: value for name, value in vars(args).items() if name.startswith("slurm_") and value not in (None, [])}
    named = " ".join("--" + name.replace("_", "-") for name in given)
    if args.executor == "local":
        if given:
            raise UserError(f"{named}: belongs to --executor slurm; add that, or leave it out")
        return None
    if not args.train:
        raise UserError("--executor slurm: says where --train runs; add --train, or leave it out")
    for option, value, least in (
        ("--slurm-gpus", args.slurm_gpus, 0),
        ("--slurm-time", args.slurm_time, LEAST_MINUTES),
        ("--slurm-cpus", args.slurm_cpus, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{option} {value}: expected {least} or more")
    if args.slurm_memory is not None and not 0 < args.slurm_memory < float("inf"):
        raise UserError(f"--slurm-memory {args.slurm_memory:g}: expected a number of GB above 0")
    gpus = args.slurm_gpus if args.slurm_gpus is not None else int(args.device != "cpu")
    if args.device == "cpu" and gpus:
        raise UserError(f"--device cpu and --slurm-gpus {gpus}: leave one of them out")
    if args.device == "cuda" and not gpus:
        raise UserError("--device cuda and --slurm-gpus 0: a job without a GPU trains on the CPU; use --device cpu")
    time = SlurmOptions.time if args.slurm_time is None else args.slurm_time
    return SlurmOptions(args.slurm_partition, gpus, time, args.slurm_memory, args.slurm_cpus, _extra(args.slurm_extra))


def _extra(texts: list[str]) -> dict[str, str | bool]:
    options: dict[str, str | bool] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not re.fullmatch("[a-z][a-z-]*", name) or (equals and not value) or "\n" in value:
            raise UserError(f"--slurm-extra {text}: expected an option of sbatch as NAME=VALUE, or NAME alone, without dashes")
        if name in FIXED:
            raise UserError(f"--slurm-extra {text}: nnunet_l2g sets {name} itself; leave it out")
        options[name] = value if equals else True
    return options


class FoldJob:
    """What a job runs: a callable that submitit pickles, and asks for a `checkpoint` when the job is told to stop.

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
        # SLURM signals every process of a job: at the signal before the time limit this one ends nnU-Net, not SLURM.
        self.child = self.training.start(self.variables, ignored=(stop_signal(),))
        print(self.child.shown, flush=True)
        while not self.child.show() and not self.terminated:
            time.sleep(POLL)
        self.child.kill_group()
        if self.child.process.returncode < 0:  # ended by a signal: was it sent to this process, too?
            time.sleep(5 * POLL)
        if self.terminated:
            print("SIGTERM: nnU-Net is stopped; waiting for SLURM to requeue or to end this job", file=sys.stderr, flush=True)
            while True:  # not back to submitit: a job that ends by itself is not requeued
                time.sleep(POLL)
        if (failure := self.training.failure(self.child)) is not None:
            raise RuntimeError(failure)

    def checkpoint(self):
        """Ends nnU-Net; the job to requeue, or None after a time limit that was too short for any progress."""
        from submitit.helpers import DelayedSubmission

        signal.signal(stop_signal(), signal.SIG_IGN)  # once is enough
        if self.child is not None:
            self.child.kill_group()
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


def check_slurm() -> None:
    """UserError unless SLURM's commands and submitit are here."""
    missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"--executor slurm: {', '.join(missing)} not found on PATH; run on a machine that submits jobs to the cluster, or "
            "use --executor local"
        )
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"--executor slurm: submitit is not installed for {sys.executable}; run `pip install submitit`")


def train_on_slurm(trainings: Sequence[Training], options: SlurmOptions, output: Path) -> None:
    """A job for each training that has none yet, then waits for all. A failing one does not stop the others.

    Raises
    ------
    UserError : a job cannot be submitted; or, at the end, names every training that failed with its logs
    Interrupted : a stop signal came; the jobs go on, and the same call finds them again
    """
    states = job_states()
    if states is None:
        raise UserError("--executor slurm: squeue does not answer; is SLURM up? Try again")
    alive = {name: job_id for job_id, (state, _, name) in states.items() if state not in ENDED}
    jobs = []
    with stop_signals() as received:
        for number, training in enumerate(trainings, start=1):
            job_id, how = alive.get(job_name(training)), "is on the cluster already"
            if job_id is None:
                job_id, how = submit(training, options, output / JOBS), "submitted"
            jobs.append(FoldOnSlurm(training, job_id))
            print(f"[{number}/{len(trainings)}] {training.name}: job {job_id} {how}", flush=True)
            if received:
                break
        failures = _wait(jobs, received)
    if failures:
        raise UserError("\n".join([*failures, ADVICE]))


def submit(training: Training, options: SlurmOptions, folder: Path) -> str:
    """The new job's number. UserError with sbatch's own words if it is refused."""
    import submitit

    variables = {name: value for name, value in os.environ.items() if name.startswith("nnUNet_")}
    kept = {name: value for name, value in os.environ.items() if name.startswith("SBATCH_") or name in KEPT}
    executor = open_executor(folder, training, options)
    try:
        with contextlib.redirect_stderr(io.StringIO()), submitit.helpers.clean_env():  # from a job: nothing of that job
            os.environ.update(kept)
            return executor.submit(FoldJob(training, variables, options.time)).job_id
    except submitit.core.utils.FailedJobError as error:
        raise UserError(
            f"{training.name}: sbatch refuses the job: {str(error).strip()}\nJobs submitted before go on. {ADVICE}"
        ) from error


def open_executor(folder: Path, training: Training, options: SlurmOptions):
    """submitit's, set up for one training."""
    import submitit

    executor = submitit.SlurmExecutor(folder / "%j", max_num_timeout=TIMEOUTS)
    wanted = {
        "partition": options.partition,
        "gpus_per_node": options.gpus or None,
        "mem": None if options.memory is None else f"{round(options.memory * 1024)}M",
        "cpus_per_task": options.cpus,
        # since SLURM 22.05 a step does not take over the job's --cpus-per-task
        "srun_args": None if options.cpus is None else [f"--cpus-per-task={options.cpus}"],
    }
    executor.update_parameters(
        job_name=job_name(training),
        time=options.time,
        additional_parameters={"requeue": True} | options.extra,
        **{name: value for name, value in wanted.items() if value is not None},
    )
    return executor


def job_name(training: Training) -> str:
    """The same for the same fold in the same nnUNet_results, whatever the report's folder: what finds a live job again."""
    path = str(training.folder.absolute())
    return f"{training.model.folder.name}__fold_{training.fold}__{hashlib.sha256(path.encode()).hexdigest()[:10]}"


def job_states() -> dict[str, tuple[str, str, str]] | None:
    """State, reason and name of each of the user's jobs that SLURM still knows, by number; None if it does not answer."""
    answer = _ask("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r|%j")
    if answer is None or answer.returncode != 0:
        return None
    rows = (line.split("|", 3) for line in answer.stdout.splitlines())
    return {row[0]: (row[1], row[2], row[3]) for row in rows if len(row) == 4}  # not the warnings of a plug-in


class FoldOnSlurm:
    """One training and its job, as far as it is known here."""

    def __init__(self, training: Training, job_id: str):
        self.training, self.job_id = training, job_id
        size = training.log.stat().st_size if training.log.is_file() else 0
        self.lines, self.progress = LogLines(training.log, size), TrainingProgress()
        self.shown = self.state = ""
        self.gone = 0

    def show(self, states: dict[str, tuple[str, str, str]]) -> None:
        """One line for each change of state, and the training's own progress."""
        self.state, reason, _ = states.get(self.job_id, ("no longer known to SLURM", "None", ""))
        shown = self.state + (f" ({reason})" if self.state == "PENDING" and reason != "None" else "")
        if shown != self.shown:
            self.shown = shown
            self._print(f"job {self.job_id} {shown}")
        for line in self.lines.new():
            if (text := self.progress(line)) is not None:
                self._print(text)

    def ended(self, states: dict[str, tuple[str, str, str]]) -> bool:
        """Whether SLURM has said so often enough, or the fold is finished."""
        self.gone = self.gone + 1 if self.job_id not in states or self.state in ENDED else 0
        return self.gone >= GONE or (self.gone > 0 and self.finished())

    def finished(self) -> bool:
        return self.training.model.state(self.training.fold) == FINISHED

    def failure(self) -> str:
        """Names the job, its logs, and the last lines of the one that says most."""
        log = self.training.output / JOBS / self.job_id / f"{self.job_id}_0_log.err"
        last = next((last for lines in (self.lines, LogLines(log)) if (last := lines.last()) != ["(none)"]), ["(none)"])
        state = self.training.model.state(self.training.fold)
        return "\n".join([
            f"training {self.training.name} failed: job {self.job_id} ended ({self.state}), {self.training.folder} is {state}.",
            f"  log: {self.training.log}", f"  the job's own log: {log}", "  the last lines:",
            *(f"    {line}" for line in last),
        ])  # fmt: skip

    def _print(self, text: str) -> None:
        print(f"      {self.training.name}: {text}", flush=True)


def _wait(jobs: list[FoldOnSlurm], received: list[int]) -> list[str]:
    """Until all have ended; the failures."""
    left, failures, unanswered = list(jobs), [], 0
    while left:
        if received:
            numbers = " ".join(job.job_id for job in left)
            print(f"\n      the jobs go on; the same command finds them again, `scancel {numbers}` ends them", file=sys.stderr)
            raise Interrupted("waiting for SLURM")
        states = job_states()
        unanswered = unanswered + 1 if states is None else 0
        if unanswered == 1:
            print("      squeue does not answer; asking again", file=sys.stderr, flush=True)
        if unanswered >= SILENT:
            raise UserError("squeue does not answer any more; the jobs may go on: the same command finds them again")
        for job in list(left) if states is not None else ():
            job.show(states)
            if job.ended(states):
                left.remove(job)
                if not job.finished():
                    failures.append(job.failure())
        _sleep(ASK if left else 0, received)
    return failures


def _sleep(seconds: float, received: list[int]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not received:
        time.sleep(0.2)


def _ask(*command: str) -> subprocess.CompletedProcess | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return None
