"""Which nnU-Net this package works with. Reads metadata only, so that it answers where nnU-Net cannot be imported."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

from nnunet_l2g.errors import UserError

NNUNET_RANGE = ">=2.8.0,<2.9"  # as in install_requires in setup.cfg (a test compares them)


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_nnunet() -> str:
    """The version of the installed nnU-Net. UserError if it is missing, or outside the supported range."""
    version = installed_version("nnunetv2")
    if version is not None and SpecifierSet(NNUNET_RANGE).contains(version, prereleases=True):
        return version
    found = "is not installed in this Python" if version is None else f"{version} is installed"
    advice = f'install one with: pip install "nnunetv2{NNUNET_RANGE}"'
    raise UserError(f"nnunetv2 {found}, nnunet_l2g needs {NNUNET_RANGE}; {advice}")


def keep_ddp_graphs_whole() -> None:
    """Turns torch.compile's DDP optimiser off with any torch before 2.14, the first version that was tested.

    It cuts a graph into buckets. Older versions may not be able to cut beside a higher-order op (checkpoint,
    autograd.Function).
    """
    import torch

    if torch.__version__ < (2, 14):
        torch._dynamo.config.optimize_ddp = False
