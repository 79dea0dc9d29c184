"""Shared by the timing scripts: device, time and memory of a call, taking turns, conditions of a measurement, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

MIB = 2**20


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1 on")
    return int(text)


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where torch sees one. Exits with a sentence if `cuda` is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda, but torch {torch.__version__} sees none; use --device cpu, or a CUDA build of torch")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds from the start of a call to the end of the work that it queued, by CUDA events on a GPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()  # so that nothing counts that was queued before
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def take_turns(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int, number: int = 1
) -> dict[str, list[list[float]]]:
    """Seconds of each call by name and round. A round makes `number` calls of each, and starts with another name each time."""
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append([seconds(calls[name], device) for _ in range(number)])
    return times


def ratios(name: str, times: dict[str, list[list[float]]], baseline: str) -> dict:
    """Median seconds, and the ratio to the baseline: median and range over rounds of the ratio of a round's medians."""
    medians = {key: [statistics.median(calls) for calls in times[key]] for key in (name, baseline)}
    found = [ours / theirs for ours, theirs in zip(medians[name], medians[baseline], strict=True)]
    return {
        "median_seconds": round(statistics.median(call for calls in times[name] for call in calls), 6),
        "round_medians_seconds": [round(median, 6) for median in medians[name]],
        "ratio_to_vanilla": round(statistics.median(found), 4),
        "ratio_range": [round(min(found), 4), round(max(found), 4)],
    }


class _Kept:
    """A tensor kept for the backward, counted while it is."""

    def __init__(self, counter: SavedBytes, tensor: torch.Tensor):
        self.counter, self.tensor, self.key = counter, tensor, tensor.untyped_storage().data_ptr()
        counter.change(self.key, tensor.untyped_storage().nbytes(), 1)

    def __del__(self):
        self.counter.change(self.key, self.tensor.untyped_storage().nbytes(), -1)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the largest number of bytes that are kept for a backward at one time, without `known` tensors (parameters).

    It stands for the memory of a step on a CPU, and leaves out what operations need while they run.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.users: dict[int, int] = {}
        self.now = self.peak = 0
        super().__init__(lambda tensor: _Kept(self, tensor.detach()), lambda kept: kept.tensor)

    def change(self, key: int, size: int, by: int) -> None:
        before = self.users.get(key, 0)
        self.users[key] = before + by
        if key not in self.known and (before == 0 or before + by == 0):
            self.now += by * size
            self.peak = max(self.peak, self.now)


def peak_bytes(call: Callable[[], object], device: torch.device, known: Iterable[torch.Tensor] = ()) -> int:
    """Peak of allocated bytes of one call on CUDA; on the CPU what its backward keeps. Call it after a warm-up."""
    if device.type != "cuda":
        saved = SavedBytes(known)
        with saved:
            call()
        return saved.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def conditions(device: torch.device) -> dict:
    """What the numbers depend on beside the code. A `load_average` (1 minute) above 1 means that others used the machine."""
    return {
        "command": shlex.join(["python", "/".join(Path(sys.argv[0]).parts[-2:]), *sys.argv[1:]]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # convolutions differ several times with it
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def cpu_name() -> str:
    """The name of the processor on Linux, its architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(result: dict, file: Path | None) -> None:
    """Writes the result; None writes nothing."""
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {file}")
