"""GLUA: a plan's plain U-Net, which in training also shows what its encoder makes of unlabelled target images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from nnunet_l2g.architectures.plan_network import PlanNetwork


class Seen(NamedTuple):
    """Of one training forward: deep features (B, C, *spatial) of the labelled and the unlabelled images, None if none were
    given; logits (B, heads, *patch) of the perturbed ones, likewise."""

    source: torch.Tensor | None
    target: torch.Tensor | None
    perturbed: torch.Tensor | None


class GLUA(PlanNetwork):
    r"""nnU-Net's network, unchanged: prediction needs nothing else. What adapts it stands beside it in the trainer.

    The stage that is aligned is an encoder output. A reconstruction of GLUA [1] from its abstract (docs/methods).

    Parameters
    ----------
    backbone : nn.Module
        See PlanNetwork.
    level : int
        Encoder stage whose output is aligned; -1 is the bottleneck.

    Attributes
    ----------
    unlabelled, perturbed : (B, C, *patch) or None
        Set by the trainer before a training forward, see Seen; read in train mode alone.
    align : bool
        Whether the encoder gets a gradient through `unlabelled`; False saves its cost while nothing is aligned yet.
    objective : callable or None
        Seen -> (), the auxiliary loss, or None.

    Shapes
    ------
    forward: (B, C, *patch) -> logits (B, heads, *patch), or with deep supervision a list of them, largest first.

    Raises
    ------
    ValueError
        If the level does not exist.
    NotImplementedError
        See PlanNetwork; and for cascades, whose second stage needs first-stage segmentations that the target does not have.

    References
    ----------
    .. [1] Su et al. Mind The Gap: alleviating local imbalance for unsupervised cross-modality medical image segmentation.
       arXiv 2205.11888; IEEE JBHI.
    """

    FORMAT = 1  # of the weights; counts up when older checkpoints no longer mean the same

    def __init__(self, backbone: nn.Module, level: int = -1):
        super().__init__(backbone, {"network": "GLUA", "format": self.FORMAT})  # the level is nothing weights depend on
        stages = len(self.encoder.output_channels)
        if not -stages <= level < stages:
            raise ValueError(f"level {level} does not exist, expected {-stages} to {stages - 1} for these plans")
        self.level = level
        self.forget()
        self.align, self.objective = True, None

    @classmethod
    def from_plans(
        cls,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        deep_supervision: bool = True,
        **settings,
    ) -> GLUA:
        """Builds the network for a configuration of nnU-Net plans."""
        if configuration_manager.previous_stage_name is not None:
            raise NotImplementedError(
                "GLUA and its controls do not support cascades: the second stage's input holds the first stage's "
                "segmentation, which has no other modality. Train 2d, 3d_lowres or 3d_fullres."
            )
        backbone = cls.backbone_from_plans(configuration_manager, num_input_channels, num_output_channels, deep_supervision)
        return cls(backbone, **settings)

    @property
    def deep_channels(self) -> int:
        """C of the aligned features."""
        return self.encoder.output_channels[self.level]

    def train(self, mode: bool = True):
        if not mode:
            self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Drops the unlabelled images and what was made of them."""
        self.unlabelled = self.perturbed = self._seen = None

    def forward(self, x: torch.Tensor):
        skips = self.encoder(x)  # one (B, C_l, *spatial_l) for each stage, largest first
        if self.training:
            self._seen = self._look(skips[self.level])
        return self.decoder(skips)

    def _look(self, deep: torch.Tensor) -> Seen | None:
        target = logits = None
        if self.unlabelled is not None:
            with torch.set_grad_enabled(self.align and torch.is_grad_enabled()):
                target = self.encoder(self.unlabelled)[self.level]
        if self.perturbed is not None:
            logits = self.decoder(self.encoder(self.perturbed))
            logits = logits[0] if isinstance(logits, (list, tuple)) else logits
        return Seen(None if target is None else deep.detach(), target, logits)

    def deep_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *patch) -> the aligned features (B, C_l, *spatial_l)."""
        return self.encoder(x)[self.level]

    def auxiliary_loss(self, target: torch.Tensor | None = None) -> torch.Tensor | None:
        if self.objective is None or self._seen is None:
            return None
        return self.objective(self._seen)

    def __getstate__(self):
        # deepcopy copies the network, not its last batch nor the trainer behind the objective
        return {**self.__dict__, "_seen": None, "unlabelled": None, "perturbed": None, "objective": None}
