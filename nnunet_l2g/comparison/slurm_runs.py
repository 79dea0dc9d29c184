"""Trainings as jobs of a SLURM cluster, one for each fold, sent through submitit."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_l2g.comparison.models import FINISHED
from nnunet_l2g.comparison.slurm_job import FoldJob
from nnunet_l2g.comparison.slurm_options import SlurmOptions
from nnunet_l2g.comparison.training import ADVICE, Training
from nnunet_l2g.demo.progress import TrainingProgress
from nnunet_l2g.demo.runner import Interrupted, LogLines, stop_signals
from nnunet_l2g.errors import UserError

JOBS = "slurm"  # submitit's files, below the report's folder
ASK = 15.0  # s between two questions to the controller
SILENT = 40  # unanswered ones in a row until we give up
GONE = 3  # answers that show a job ended, until an unfinished fold is a failure: files of other machines arrive late
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
KEPT = ("SLURM_CONF", "SUBMITIT_PREEMPT_SIGNAL")  # the user's settings, as are SBATCH_...
TIMEOUTS = 10_000  # requeues that submitit allows: FoldJob itself stops where there is no progress


def check_slurm(options: SlurmOptions) -> None:
    """UserError unless SLURM's commands are here, its controller answers, and the partition exists."""
    elsewhere = "run on a machine that submits jobs to the cluster, or use --executor local"
    missing = [name for name in ("sbatch", "srun", "squeue", "sinfo", "scontrol") if shutil.which(name) is None]
    if missing:
        raise UserError(f"--executor slurm: {', '.join(missing)} not found on PATH; {elsewhere}")
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"--executor slurm: submitit is not installed for {sys.executable}; run `pip install submitit`")
    answer = _ask("sinfo", "--noheader", "--format=%R")
    if answer.returncode != 0:
        raise UserError(f"--executor slurm: SLURM does not answer: {_last(answer)}; try `sinfo`, or {elsewhere}")
    partitions = sorted(set(answer.stdout.split()))
    if options.partition and (unknown := set(options.partition.split(",")) - set(partitions)):
        raise UserError(f"--slurm-partition {', '.join(sorted(unknown))}: the cluster has {', '.join(partitions)}")


def train_on_slurm(trainings: Sequence[Training], options: SlurmOptions, output: Path) -> None:
    """A job for each training that has none yet, then waits for all. A failing one does not stop the others.

    Raises
    ------
    UserError : a job cannot be submitted; or, at the end, names every training that failed with its logs
    Interrupted : a stop signal came; the jobs go on, and the same call finds them again
    """
    states = job_states()
    if states is None:
        raise UserError("--executor slurm: squeue does not answer; try again")
    alive = {name: job_id for job_id, (state, _, name) in states.items() if state not in ENDED}
    jobs = []
    with stop_signals() as received:
        for number, training in enumerate(trainings, start=1):
            if (job_id := alive.get(job_name(training))) is None:
                job_id, how = submit(training, options, output / JOBS), "submitted"
            else:
                training, how = replace(training, output=submitted_for(job_id) or output), "is on the cluster already"
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
    if answer.returncode != 0:
        return None
    rows = (line.split("|", 3) for line in answer.stdout.splitlines())
    return {row[0]: (row[1], row[2], row[3]) for row in rows if len(row) == 4}  # not the warnings of a plug-in


def submitted_for(job_id: str) -> Path | None:
    """The report's folder that a live job writes its logs to: it may have been submitted for another report than this."""
    found = re.search(rf"StdErr=(.+?)/{JOBS}/{job_id}/", _ask("scontrol", "show", "job", job_id).stdout)
    return Path(found[1]) if found else None


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
        last = self.lines.last()
        if last == ["(none)"]:
            last = LogLines(log).last()
        return "\n".join([
            f"training {self.training.name} failed: job {self.job_id} ended ({self.state}), and "
            f"{self.training.folder} is {self.training.model.state(self.training.fold)}.",
            f"  log: {self.training.log}",
            f"  the job's own log: {log}",
            "  the last lines:",
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


def _ask(*command: str) -> subprocess.CompletedProcess:
    """One of SLURM's commands."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer within a minute")


def _last(answer: subprocess.CompletedProcess) -> str:
    return (answer.stderr.strip().splitlines() or ["no output"])[-1]
