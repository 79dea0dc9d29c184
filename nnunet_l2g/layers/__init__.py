"""Layers that know tokens and feature maps, nothing of nnU-Net."""

from nnunet_l2g.layers.global_compensation import GlobalCompensationUnit
from nnunet_l2g.layers.l2g_block import L2GBlock
from nnunet_l2g.layers.masked_autoencoder import MaskedAutoencoder
from nnunet_l2g.layers.prototype_readout import PrototypeReadout
from nnunet_l2g.layers.region_compensation import RegionCompensationUnit
from nnunet_l2g.layers.sinkhorn import sinkhorn_potentials
from nnunet_l2g.layers.transport_alignment import TransportAlignment
from nnunet_l2g.layers.vector_quantizer import VectorQuantizer

__all__ = [
    "GlobalCompensationUnit",
    "L2GBlock",
    "MaskedAutoencoder",
    "PrototypeReadout",
    "RegionCompensationUnit",
    "TransportAlignment",
    "VectorQuantizer",
    "sinkhorn_potentials",
]
