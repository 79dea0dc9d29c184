"""Unsupervised adaptation to a target without labels: target checks, fingerprint, preprocessing, adapted plans."""

from nnunet_l2g.adapt.datasets import TARGET_KEY
from nnunet_l2g.adapt.plans import AdaptedTarget, check_adapted_plans

__all__ = ["TARGET_KEY", "AdaptedTarget", "check_adapted_plans"]
