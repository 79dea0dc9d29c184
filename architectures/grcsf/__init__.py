"""GRCSF: global and regional feature compensation, guided by the errors of a masked autoencoder."""

from nnunet_l2g.architectures.grcsf.global_compensation import GlobalCompensationUnit
from nnunet_l2g.architectures.grcsf.masked_autoencoder import MaskedAutoencoder
from nnunet_l2g.architectures.grcsf.network import GRCSF
from nnunet_l2g.architectures.grcsf.region_compensation import RegionCompensationUnit

__all__ = ["GRCSF", "GlobalCompensationUnit", "MaskedAutoencoder", "RegionCompensationUnit"]
