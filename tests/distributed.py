"""Two gloo processes on the CPU, because stock nnU-Net's DDP needs nccl and GPUs."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# a spawned process would import torch and nnU-Net first, which is most of the time of such a test; a fork server does it once
START = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
mp.get_context(START).set_forkserver_preload(["nnunet_l2g.trainers"])


def run_two_processes(function, *arguments):
    """What function(rank, *arguments) returns in two gloo processes, by rank. The function has to be module-level."""
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
