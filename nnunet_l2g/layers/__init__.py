"""Layers that know tokens and feature maps, nothing of nnU-Net."""

from nnunet_l2g.layers.auxiliary_head import AuxiliaryHead
from nnunet_l2g.layers.class_references import ClassReferences
from nnunet_l2g.layers.global_compensation import GlobalCompensationUnit
from nnunet_l2g.layers.masked_autoencoder import MaskedAutoencoder
from nnunet_l2g.layers.region_compensation import RegionCompensationUnit
from nnunet_l2g.layers.sinkhorn import sinkhorn_potentials
from nnunet_l2g.layers.vector_quantizer import VectorQuantizer

__all__ = [
    "AuxiliaryHead",
    "ClassReferences",
    "GlobalCompensationUnit",
    "MaskedAutoencoder",
    "RegionCompensationUnit",
    "VectorQuantizer",
    "sinkhorn_potentials",
]
