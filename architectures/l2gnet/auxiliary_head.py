"""Ablation of L2GNet: a 1x1 head replaces the references, with the same weight of the loss and the same read-out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.architectures.l2gnet.class_references import WEIGHT
from nnunet_l2g.architectures.l2gnet.token_labels import balanced_weights, token_labels
from nnunet_l2g.training.precision import full_precision


class AuxiliaryHead(nn.Module):
    """Evidence W f + b for each output, and L = 0.3 sum_i w_i CE_i with the token labels and weights of ClassReferences.

    Shapes: forward (B, C, *spatial) -> (B, outputs, *spatial). For regions the cross-entropy is the binary one of each.
    """

    diagnostic_keys = ()

    def __init__(self, channels: int, outputs: int, regions: bool = False):
        super().__init__()
        self.outputs, self.regions = outputs, regions
        self.project = nn.Linear(channels, outputs)
        self._last: torch.Tensor | None = None

    def forward(self, f: torch.Tensor) -> torch.Tensor:
        with full_precision(f.device.type):
            features = f.flatten(2).to(torch.promote_types(f.dtype, torch.float32)).transpose(1, 2)  # (B, n, C)
            weight, bias = (x.to(features.dtype) for x in (self.project.weight, self.project.bias))
            evidence = F.linear(features, weight, bias).transpose(1, 2).unflatten(2, f.shape[2:])
        self._last = evidence if self.training else None
        return evidence

    def loss(self, target: torch.Tensor | None) -> torch.Tensor | None:
        if self._last is None or target is None:
            return None
        evidence, grid = self._last.flatten(2), tuple(self._last.shape[2:])  # (B, outputs, n)
        labels = token_labels(target, self.outputs, grid, self.regions)  # (B, S, n)
        weights = balanced_weights(labels, 2 if self.regions else self.outputs)
        label = labels.clamp_min(0)
        if self.regions:
            losses = F.binary_cross_entropy_with_logits(evidence, label.to(evidence.dtype), reduction="none")  # (B, S, n)
        else:
            losses = F.cross_entropy(evidence, label[:, 0], reduction="none")[:, None]  # (B, 1, n)
        return WEIGHT * (weights * losses).sum() / labels.shape[:2].numel()

    def after_step(self) -> list:
        self._last = None
        return []

    def __getstate__(self):
        return {**self.__dict__, "_last": None}
