"""Which nnU-Net this package works with. Reads metadata only: it can answer where nnU-Net cannot be imported."""

from __future__ import annotations

import importlib.metadata
import re

from nnunet_l2g.errors import UserError

# the same range as install_requires in setup.cfg (a test compares them)
NNUNET_MINIMUM = "2.8.0"
NNUNET_BELOW = "2.9"
NNUNET_RANGE = f">={NNUNET_MINIMUM},<{NNUNET_BELOW}"


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: (2, 8, 1) for 2.8.1.post2+local, (2, 9, 0) for 2.9, zeros for no version."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match.group().split(".")] if match else []
    return tuple([*numbers, 0, 0, 0][:3])


def check_nnunet() -> str:
    """The installed nnU-Net's version; a UserError if it is missing or one we were not made for."""
    version = installed_version("nnunetv2")
    advice = f'install one with: pip install "nnunetv2{NNUNET_RANGE}"'
    if version is None:
        raise UserError(f"nnunetv2 is not installed in this Python, nnunet_l2g needs {NNUNET_RANGE}; {advice}")
    if not release(NNUNET_MINIMUM) <= release(version) < release(NNUNET_BELOW):
        raise UserError(f"nnunetv2 {version} is installed, nnunet_l2g needs {NNUNET_RANGE}; {advice}")
    return version


def keep_ddp_graphs_whole() -> None:
    """Keeps torch.compile's DDP optimiser off our networks' graphs, with any torch before 2.14, the first that was tested.

    It cuts a graph into buckets, and older ones may not know a cut beside a higher-order op (checkpoint, autograd.Function).
    """
    import torch

    if torch.__version__ < (2, 14):
        torch._dynamo.config.optimize_ddp = False
