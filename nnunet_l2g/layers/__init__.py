"""Layers that know tokens and feature maps, nothing of nnU-Net."""

from nnunet_l2g.layers.l2g_block import L2GBlock
from nnunet_l2g.layers.sinkhorn import sinkhorn_potentials
from nnunet_l2g.layers.transport_alignment import TransportAlignment
from nnunet_l2g.layers.vector_quantizer import VectorQuantizer

__all__ = ["L2GBlock", "TransportAlignment", "VectorQuantizer", "sinkhorn_potentials"]
