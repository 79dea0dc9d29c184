"""Trains on a SLURM cluster: one job for each training, sent with submitit.

A job holds no state of its training. nnU-Net's checkpoints do: the same job continues however it was ended.
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
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.compare.training import FINISHED, Training
from nnunet_l2g.errors import UserError
from nnunet_l2g.nnunet import ADVICE, POLL, Child, Interrupted, Progress, last_lines

JOBS = "slurm"  # submitit's files, below the report's folder
ASK = 15.0  # s between two questions to SLURM
SILENT = 40  # unanswered questions in a row until we give up
GONE = 3  # answers without a job until its training has failed: files of other machines arrive late
KEPT = ("SLURM_CONF", "SUBMITIT_PREEMPT_SIGNAL")  # the user's settings, as are SBATCH_...
TIMEOUTS = 100  # how often a job continues after its time limit; preemptions do not count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--executor and its --slurm-... options."""
    group = parser.add_argument_group("where --train runs; docs/cluster.md")
    group.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="local: this machine, one training on each GPU (limit them with CUDA_VISIBLE_DEVICES); slurm: one job for each",
    )
    for option, kind, metavar, text in (
        ("--slurm-partition", str, "NAME", "default: the cluster's"),
        ("--slurm-gpus", int, "N", "of one training; more than 1 is nnU-Net's -num_gpus (default: 1)"),
        ("--slurm-time", int, "MINUTES", "of one job; a longer training is continued (default: 1440)"),
        ("--slurm-memory", float, "GB", "of one job (default: the partition's)"),
        ("--slurm-cpus", int, "N", "of one job (default: the cluster's, often 1: set it)"),
    ):
        group.add_argument(option, type=kind, metavar=metavar, help=text)
    extra = "further options of sbatch, without the dashes: account=mine qos=long exclusive"
    group.add_argument("--slurm-extra", nargs="+", default=[], metavar="KEY=VALUE", help=extra)


def slurm_options(args: argparse.Namespace) -> dict | None:
    """submitit's parameters of a job. None for --executor local. UserError for options that do not fit together."""
    given = {name: value for name, value in vars(args).items() if name.startswith("slurm_") and value not in (None, [])}
    if args.executor == "local":
        if given:
            named = " ".join("--" + name.replace("_", "-") for name in given)
            raise UserError(f"{named}: belongs to --executor slurm; add that, or leave it out")
        return None
    if not args.train:
        raise UserError("--executor slurm: says where --train runs; add --train, or leave it out")
    for name, least in (("slurm_gpus", 0), ("slurm_time", 1), ("slurm_cpus", 1), ("slurm_memory", 1)):
        if not least <= given.get(name, least) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {given[name]}: expected {least} or more")
    gpus = given.get("slurm_gpus", int(args.device != "cpu"))
    if (args.device == "cpu" and gpus) or (args.device == "cuda" and not gpus):
        raise UserError(f"--device {args.device} and --slurm-gpus {gpus}: do not fit together; leave one of them out")
    extra: dict[str, str | bool] = {"requeue": True}
    for text in args.slurm_extra:
        name, equals, value = text.partition("=")
        if not re.fullmatch("[a-z][a-z-]*", name) or (equals and not value) or "\n" in value:
            raise UserError(f"--slurm-extra {text}: expected an option of sbatch as NAME=VALUE, or NAME alone, without dashes")
        extra[name] = value if equals else True
    return {
        "slurm_partition": args.slurm_partition,
        "gpus_per_node": gpus or None,
        "timeout_min": given.get("slurm_time", 1440),
        "mem_gb": args.slurm_memory,
        "cpus_per_task": args.slurm_cpus,
        # since SLURM 22.05 srun does not take over the job's --cpus-per-task
        "slurm_srun_args": args.slurm_cpus and [f"--cpus-per-task={args.slurm_cpus}"],
        "slurm_additional_parameters": extra,
    }


@dataclass
class TrainingJob:
    """What a job runs. submitit pickles it, calls it, and asks for a `checkpoint` when SLURM is about to end the job.

    output, options : as in `Training.start`
    """

    training: Training
    output: Path
    options: list[str]
    child: Child | None = None

    def __call__(self) -> None:
        """RuntimeError if nnUNetv2_train fails."""
        terminated = []
        signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
        self.child = self.training.start(self.output, self.options)
        print(self.child.shown, flush=True)
        while not self.child.show() and not terminated:
            time.sleep(POLL)
        self.child.end()
        if self.child.process.returncode != 0:  # SLURM signals every process of a job; ours may be the last to see it
            time.sleep(5 * POLL)
        if terminated:
            print("SIGTERM: nnU-Net is stopped; waiting for SLURM to requeue or to end this job", file=sys.stderr, flush=True)
            while True:  # a job that ends by itself is not requeued
                time.sleep(POLL)
        if (failure := self.training.failure(self.child)) is not None:
            raise RuntimeError(failure)

    def checkpoint(self):
        """Ends nnU-Net, and returns the job to requeue: nnU-Net's checkpoints hold all that it needs."""
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            self.child.end()
        return DelayedSubmission(TrainingJob(self.training, self.output, self.options))


def check_slurm() -> None:
    """UserError unless SLURM's commands and submitit are here."""
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        where = "run on a machine that submits jobs to the cluster, or use --executor local"
        raise UserError(f"--executor slurm: {', '.join(missing)} not found on PATH; {where}")
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"--executor slurm: submitit is not installed for {sys.executable}; run `pip install submitit`")


def train_on_slurm(trainings: list[Training], parameters: dict, output: Path) -> None:
    """Submits a job for each training that has none yet, and waits for all. One that fails does not stop the others.

    UserError if a job cannot be submitted; at the end it names every training that failed, with its logs. Interrupted on
    Ctrl-C: the jobs go on, and the same call finds them again.
    """
    numbers = {name: number for number, (name, _) in live_jobs(attempts=1).items()}
    followed, failures = [], []
    try:
        for training in trainings:
            number = numbers.get(job_name(training))
            how = "is on the cluster already" if number else "submitted"
            job = FollowedJob(training, number or submit(training, parameters, output), output)
            print(f"      {training.name}: job {job.number} {how}", flush=True)
            followed.append(job)
        while followed:
            jobs = live_jobs(SILENT)
            for job in [job for job in followed if job.ended(jobs)]:
                followed.remove(job)
                if job.training.state != FINISHED:
                    failures.append(job.failure())
            time.sleep(ASK if followed else 0)
    except KeyboardInterrupt:
        left = " ".join(job.number for job in followed)
        print(f"\n      the jobs go on; the same command finds them again, `scancel {left}` ends them", file=sys.stderr)
        raise Interrupted from None
    if failures:
        raise UserError("\n".join([*failures, ADVICE]))


def submit(training: Training, parameters: dict, output: Path) -> str:
    """The new job's number. UserError with sbatch's own words if it refuses the job."""
    import submitit

    gpus = parameters["gpus_per_node"] or 0
    options = ["-device", "cuda" if gpus else "cpu", *(["-num_gpus", str(gpus)] if gpus > 1 else [])]
    kept = {name: value for name, value in os.environ.items() if name.startswith("SBATCH_") or name in KEPT}
    executor = submitit.AutoExecutor(output / JOBS / "%j", cluster="slurm", slurm_max_num_timeout=TIMEOUTS)
    executor.update_parameters(name=job_name(training), **parameters)
    try:
        # without the variables of a job that this command itself runs in; the user's settings stay
        with contextlib.redirect_stderr(io.StringIO()), submitit.helpers.clean_env():
            os.environ.update(kept)
            return executor.submit(TrainingJob(training, output, options)).job_id
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"{training.name}: sbatch refuses the job: {error}\nJobs submitted before go on. {ADVICE}") from error


def job_name(training: Training) -> str:
    """The same for the same fold in the same nnUNet_results, so that a live job is found again."""
    path = str(training.folder.absolute())
    return f"{training.model.folder.name}__fold_{training.fold}__{hashlib.sha256(path.encode()).hexdigest()[:10]}"


def live_jobs(attempts: int) -> dict[str, tuple[str, str]]:
    """Name and state of each of the user's jobs that waits or runs, by number. UserError if SLURM does not answer."""
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%T (%r)|%j"]
    for attempt in range(attempts):
        time.sleep(ASK if attempt else 0)
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            rows = (line.split("|", 2) for line in answer.stdout.splitlines())
            return {row[0]: (row[2], row[1]) for row in rows if len(row) == 3}  # without the warnings of plug-ins
        print(f"      squeue does not answer: {answer.stderr.strip()}", file=sys.stderr, flush=True)
    raise UserError("squeue does not answer; jobs that were submitted go on, and the same command finds them again")


class FollowedJob:
    """A training and its job, as far as this process knows."""

    def __init__(self, training: Training, number: str, output: Path):
        self.training, self.number = training, number
        self.logs = [output / JOBS / number / f"{number}_0_log.err", training.log(output)]
        self.progress, self.state, self.gone = Progress(training.log(output)), "", 0

    def ended(self, jobs: dict[str, tuple[str, str]]) -> bool:
        """Whether the job has left the cluster for good. Prints what is new."""
        _, state = jobs.get(self.number, ("", "ended"))
        new = [f"job {self.number} {state}"] if state != self.state else []
        self.state, self.gone = state, 0 if self.number in jobs else self.gone + 1
        for text in [*new, *self.progress.new()]:
            print(f"      {self.training.name}: {text}", flush=True)
        return self.gone >= GONE or (self.gone > 0 and self.training.state == FINISHED)

    def failure(self) -> str:
        """Names the job, its logs, and their last lines."""
        training = self.training
        head = f"training {training.name} failed: job {self.number} ended, {training.folder} is {training.state}."
        return "\n".join([head, *(f"  log: {log}\n{last_lines(log)}" for log in self.logs)])
