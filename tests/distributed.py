"""Two gloo processes on the CPU: stock nnU-Net's DDP wants nccl and GPUs."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# a spawned process imports torch and nnU-Net first, most of such a test; a fork server has done so once
START = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
mp.get_context(START).set_forkserver_preload(["nnunet_l2g.trainers"])


def run_two_processes(function, *arguments):
    """Calls function(rank, *arguments) in two gloo processes; what they return, by rank. function is module-level."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (function, folder, arguments), nprocs=2, start_method=START)
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(2)]


def _process(rank, function, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(rank, *arguments), Path(folder, str(rank)))
    dist.barrier()
    # Not destroy_process_group: in torch 2.6 it joins gloo's thread while that one waits for the interpreter to free a tensor.
    os._exit(0)
