"""GRCSF: global and region compensation, guided by the errors of a masked autoencoder."""

from nnunet_l2g.architectures.grcsf.compensation_units import GlobalCompensationUnit, RegionCompensationUnit
from nnunet_l2g.architectures.grcsf.masked_autoencoder import MaskedAutoencoder
from nnunet_l2g.architectures.grcsf.network import GRCSF

__all__ = ["GRCSF", "GlobalCompensationUnit", "MaskedAutoencoder", "RegionCompensationUnit"]
