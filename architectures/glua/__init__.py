"""GLUA: unsupervised adaptation to another modality by style transfer and a local feature mask."""

from nnunet_l2g.architectures.glua.network import GLUA

__all__ = ["GLUA"]
