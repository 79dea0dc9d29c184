"""A form of GLUA that has not earned its place: the local feature mask re-weights what the decoder reads, at prediction too.

Found by nnU-Net when this folder is in nnUNet_extTrainer; measured by `benchmarks/adaptation.py --methods ... reweighted`.
"""

from __future__ import annotations

import torch

from nnunet_l2g.architectures import GLUA
from nnunet_l2g.architectures.glua.adversarial_alignment import AdversarialAlignment
from nnunet_l2g.architectures.glua.domain_discriminator import DomainDiscriminator
from nnunet_l2g.architectures.glua.local_feature_mask import local_feature_mask
from nnunet_l2g.trainers import nnUNetTrainerGLUA


class ReweightedGLUA(GLUA):
    r"""The decoder reads :math:`f' = f (1 + m(D(f)))`. D belongs to the network, and sees f: of f' it would amplify itself."""

    def __init__(self, backbone, level: int = -1):
        super().__init__(backbone, level)
        dims = next(p.dim() for p in self.encoder.parameters() if p.dim() > 2) - 2
        self.discriminator = DomainDiscriminator(self.deep_channels, dims).requires_grad_(False)

    def forward(self, x: torch.Tensor):
        skips = list(self.encoder(x))  # one (B, C_l, *spatial_l) for each stage, largest first
        deep = skips[self.level]
        if self.training:
            self._seen = self._look(deep)
        with torch.no_grad():
            mask = local_feature_mask(self.discriminator(deep))  # (B, 1, *spatial)
        skips[self.level] = deep * (1 + mask.to(deep.dtype))
        return self.decoder(skips)


class nnUNetTrainerGLUAReweighted(nnUNetTrainerGLUA):
    """Aligns every position alike; the mask is in the network."""

    network_class = ReweightedGLUA
    mask = False

    def initialize(self):
        super().initialize()
        self.alignment_of_features = AdversarialAlignment(self.raw_network.discriminator, self.mask)
