"""GLUA's network: a plan's plain U-Net that in training also encodes unlabelled target images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from nnunet_l2g.architectures.plan_network import PlanNetwork


class AuxiliaryOutputs(NamedTuple):
    """What a training forward computes beside the logits, None for images that were not given.

    source_features, target_features : (B, C, *spatial), at the bottleneck; the source's without gradient
    perturbed_logits : (B, heads, *patch)
    """

    source_features: torch.Tensor | None
    target_features: torch.Tensor | None
    perturbed_logits: torch.Tensor | None


class GLUA(PlanNetwork):
    r"""nnU-Net's network, unchanged: prediction needs nothing else. The trainer has the parts that adapt it.

    The output of the last encoder stage is aligned. A reconstruction of GLUA [1] from its abstract (docs/methods/glua.md).

    Attributes
    ----------
    unlabelled, perturbed : (B, C, *patch) or None
        Target images for the alignment, and perturbed ones for self-training. The trainer sets them before a training forward.
    align : bool
        Whether the encoder gets a gradient through `unlabelled`. False saves its cost while nothing is aligned yet.
    objective : callable or None
        AuxiliaryOutputs -> (), the auxiliary loss, or None.

    Shapes
    ------
    forward: (B, C, *patch) -> logits (B, heads, *patch), or with deep supervision a list of them, largest first.

    References
    ----------
    .. [1] Su et al. Mind The Gap: alleviating local imbalance for unsupervised cross-modality medical image segmentation.
       arXiv 2205.11888; IEEE JBHI.
    """

    FORMAT = 1  # of the weights; counts up when older checkpoints no longer mean the same

    def __init__(self, backbone: nn.Module):
        super().__init__(backbone, {"network": "GLUA", "format": self.FORMAT})
        self.align, self.objective = True, None
        self.forget()

    @classmethod
    def from_plans(
        cls, configuration_manager, num_input_channels: int, num_output_channels: int, deep_supervision: bool = True
    ) -> GLUA:
        """Builds the network for a configuration of nnU-Net plans; NotImplementedError for cascades."""
        if configuration_manager.previous_stage_name is not None:
            raise NotImplementedError(
                "GLUA and its controls do not support cascades: the second stage's input holds the first stage's "
                "segmentation, which has no other modality. Train 2d, 3d_lowres or 3d_fullres."
            )
        return cls(cls.backbone_from_plans(configuration_manager, num_input_channels, num_output_channels, deep_supervision))

    @property
    def deep_channels(self) -> int:
        """C of the aligned features."""
        return self.encoder.output_channels[-1]

    def train(self, mode: bool = True):
        if not mode:
            self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Drops the unlabelled images and the outputs that were computed of them."""
        self.unlabelled = self.perturbed = self.auxiliary_outputs = None

    def forward(self, x: torch.Tensor):
        skips = self.encoder(x)  # one (B, C_l, *spatial_l) for each stage, largest first
        if self.training:
            self.auxiliary_outputs = self._auxiliary_outputs(skips[-1])
        return self.decoder(skips)

    def _auxiliary_outputs(self, source: torch.Tensor) -> AuxiliaryOutputs:
        source_features = target_features = logits = None
        if self.unlabelled is not None:
            source_features = source.detach()
            with torch.set_grad_enabled(self.align and torch.is_grad_enabled()):
                target_features = self.encoder(self.unlabelled)[-1]
        if self.perturbed is not None:
            logits = self.decoder(self.encoder(self.perturbed))
            logits = logits[0] if isinstance(logits, (list, tuple)) else logits
        return AuxiliaryOutputs(source_features, target_features, logits)

    def deep_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *patch) -> the aligned features (B, C_l, *spatial_l)."""
        return self.encoder(x)[-1]

    def auxiliary_loss(self, target: torch.Tensor | None = None) -> torch.Tensor | None:
        if self.objective is None or self.auxiliary_outputs is None:
            return None
        return self.objective(self.auxiliary_outputs)

    def __getstate__(self):
        # deepcopy copies the network, not its last batch nor the trainer that the objective refers to
        return {**self.__dict__, "unlabelled": None, "perturbed": None, "auxiliary_outputs": None, "objective": None}
