"""What the timing scripts share: the device, the time of one call, what the numbers were measured on, and the JSON file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where torch sees one. Exits with a sentence if `cuda` is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda, but torch {torch.__version__} sees none; use --device cpu, or a CUDA build of torch")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds from the start of a call to the end of the work it queued: CUDA events on the GPU, perf_counter elsewhere."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()  # so that host work of the call itself counts, and nothing queued before it
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def conditions(device: torch.device) -> dict:
    """What the numbers depend on beside the code; `load_average` (1 minute) over `cpus` says that others used the machine."""
    return {
        "command": shlex.join(["python", "/".join(Path(sys.argv[0]).parts[-2:]), *sys.argv[1:]]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def cpu_name() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(result: dict, file: Path | None) -> None:
    """Writes the result; None writes nothing."""
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {file}")
