"""L2GNet: references of each class, related to discrete codes by optimal transport."""

from nnunet_l2g.architectures.l2gnet.auxiliary_head import AuxiliaryHead
from nnunet_l2g.architectures.l2gnet.class_references import ClassReferences
from nnunet_l2g.architectures.l2gnet.network import L2GNet
from nnunet_l2g.architectures.l2gnet.sinkhorn import sinkhorn_potentials
from nnunet_l2g.architectures.l2gnet.vector_quantizer import VectorQuantizer

__all__ = ["AuxiliaryHead", "ClassReferences", "L2GNet", "VectorQuantizer", "sinkhorn_potentials"]
