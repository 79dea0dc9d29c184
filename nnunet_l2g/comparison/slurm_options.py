"""What `nnunet_l2g compare --executor slurm` asks a cluster for."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field

from nnunet_l2g.errors import UserError

SIGNAL_MINUTES = 1.5  # before the time limit, a job is told to stop
LEAST_MINUTES = 5  # SLURM may be a minute early with that
OURS = {
    "partition": "--slurm-partition",
    "gpus-per-node": "--slurm-gpus",
    "gpus": "--slurm-gpus",
    "gres": "--slurm-gpus",
    "time": "--slurm-time",
    "mem": "--slurm-memory",
    "cpus-per-task": "--slurm-cpus",
}
FIXED = ("job-name", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "array", "nodes", "ntasks-per-node")


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
    group.add_argument("--slurm-partition", metavar="NAME", help="default: the cluster's")
    group.add_argument(
        "--slurm-gpus", type=int, metavar="N", help="of one fold; more than 1 is nnU-Net's -num_gpus (default: 1)"
    )
    group.add_argument(
        "--slurm-time", type=int, metavar="MINUTES", help="of one job; a longer training is continued (default: 1440)"
    )
    group.add_argument("--slurm-memory", type=float, metavar="GB", help="of one job (default: the partition's)")
    group.add_argument("--slurm-cpus", type=int, metavar="N", help="of one job (default: the cluster's, often 1: name it)")
    group.add_argument(
        "--slurm-extra",
        nargs="+",
        metavar="KEY=VALUE",
        help="further options of sbatch, without the dashes: account=mine qos=long exclusive",
    )


def slurm_options(args: argparse.Namespace) -> SlurmOptions | None:
    """None for --executor local. UserError for options that do not fit together, or a number out of its range."""
    given = {name: value for name, value in vars(args).items() if name.startswith("slurm_") and value is not None}
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
    return SlurmOptions(
        args.slurm_partition,
        gpus,
        SlurmOptions.time if args.slurm_time is None else args.slurm_time,
        args.slurm_memory,
        args.slurm_cpus,
        _extra(args.slurm_extra or []),
    )


def _extra(texts: list[str]) -> dict[str, str | bool]:
    options: dict[str, str | bool] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not re.fullmatch("[a-z][a-z-]*", name) or (equals and not value) or "\n" in value:
            raise UserError(f"--slurm-extra {text}: expected an option of sbatch as NAME=VALUE, or NAME alone, without dashes")
        if name in OURS:
            raise UserError(f"--slurm-extra {text}: use {OURS[name]}")
        if name in FIXED:
            raise UserError(f"--slurm-extra {text}: nnunet_l2g sets {name} itself")
        options[name] = value if equals else True
    return options
