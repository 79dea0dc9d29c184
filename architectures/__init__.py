"""Whole networks, built from a plan."""

from nnunet_l2g.architectures.glua import GLUA
from nnunet_l2g.architectures.grcsf import GRCSF
from nnunet_l2g.architectures.l2gnet import L2GNet
from nnunet_l2g.architectures.plan_network import PlanNetwork

__all__ = ["GLUA", "GRCSF", "L2GNet", "PlanNetwork"]
