"""L2GNet: a plan's U-Net with trainable references of each class at one level of its decoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.architectures.l2gnet.auxiliary_head import AuxiliaryHead
from nnunet_l2g.architectures.l2gnet.class_references import ClassReferences
from nnunet_l2g.architectures.plan_network import PlanNetwork


class L2GNet(PlanNetwork):
    r"""nnU-Net's network, with evidence of ClassReferences on the features of one decoder level added to its logits.

    .. math:: logits \leftarrow logits + \mathrm{upsample}(\alpha \cdot evidence(f_{level})), \quad \alpha = 0 \text{ at first}

    It starts as the plain network: same weights, same logits. A reconstruction of L2GNet [1] from its abstract (docs/methods).

    Parameters
    ----------
    backbone : nn.Module
        See PlanNetwork.
    regions : bool
        Whether outputs are regions, which may overlap. The trainer says so in the plans.
    auxiliary_head : bool
        Ablation: an AuxiliaryHead replaces the references.
    **references
        Arguments of ClassReferences: per_class, dim, codebook, nearest, moved, readout.

    Shapes
    ------
    forward: (B, C_in, *spatial) -> logits (B, outputs, *spatial), or with deep supervision a list of them, largest first. The
    evidence is added to the largest ones only.

    Raises
    ------
    ValueError
        If an argument of ClassReferences is out of range.
    NotImplementedError
        See PlanNetwork.

    References
    ----------
    .. [1] Gorade et al. L2GNet: optimal local-to-global representation of anatomical structures for generalized medical
       image segmentation. arXiv 2502.05229; PMLR 317:110-116, 2026.
    """

    FORMAT = 2  # of the weights; it is raised when older checkpoints no longer mean the same

    def __init__(
        self,
        backbone: nn.Module,
        regions: bool = False,
        auxiliary_head: bool = False,
        **references,
    ):
        super().__init__(backbone, {})  # refuses other backbones
        outputs, channels = self.decoder.num_classes, self.encoder.output_channels
        number = references.get("per_class", 5) * (2 * outputs if regions else outputs)
        level = choose_level(
            self.encoder.strides, channels[0], number
        )  # numbered as the encoder's stages, 0 is full resolution
        self.level, self.regions = level, regions
        make = AuxiliaryHead if auxiliary_head else ClassReferences
        self.l2g = make(channels[level], outputs, regions, **references)
        self.alpha = nn.Parameter(torch.zeros(())) if references.get("readout", True) else None
        kind = {"auxiliary_head": auxiliary_head, "regions": regions, "level": level, **references}
        self.store_settings({"network": "L2GNet", "format": self.FORMAT, **kind})
        self._image: torch.Tensor | None = None  # (1, C_in, *spatial) of the last training batch, for diagnostics

    def forward(self, x: torch.Tensor):
        if self.training:
            self._image = x[:1].detach()
        outputs, evidence = self._decode(self.encoder(x))
        if evidence is None:
            return outputs
        if isinstance(outputs, list):
            return [self._add(outputs[0], evidence), *outputs[1:]]
        return self._add(outputs, evidence)

    def _decode(self, skips: list[torch.Tensor]):
        """nnU-Net's outputs, and the evidence (B, outputs, *spatial_level) or None."""
        evidence = None

        def find_evidence(level: int, features: torch.Tensor) -> torch.Tensor:
            nonlocal evidence
            if level == self.level:
                evidence = self.l2g(features)
            return features

        return self.decode(skips, find_evidence), evidence

    def _add(self, logits: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        # multiplied in float32: the gradient of alpha is a sum over all voxels, which overflows float16
        scaled = (self.alpha.to(evidence.dtype) * evidence).to(logits.dtype)
        mode = "bilinear" if logits.ndim == 4 else "trilinear"
        return logits + F.interpolate(scaled, logits.shape[2:], mode=mode)

    @torch.no_grad()
    def explain(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the method does with images x (B, C_in, *spatial), in eval mode, by name.

        without, logits : (B, outputs, *spatial) without and with the read-out. If there are references also moved, r' (B, S, G,
        M, d), and cosines (B, p, *spatial_level) of tokens and r', p = S G M.
        """
        was_training = self.training
        self.eval()
        features = []
        hook = self.l2g.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
        outputs, evidence = self._decode(self.encoder(x))
        hook.remove()
        without = outputs[0] if isinstance(outputs, list) else outputs
        found = {"without": without, "logits": without if evidence is None else self._add(without, evidence)}
        if isinstance(self.l2g, ClassReferences):
            tokens, _, moved = self.l2g.relate(features[0])
            cosines = moved.flatten(1, 3) @ tokens  # (B, p, n)
            found |= {"moved": moved, "cosines": cosines.unflatten(2, features[0].shape[2:])}
        self.train(was_training)
        return found

    def auxiliary_loss(self, target: torch.Tensor | None = None) -> torch.Tensor | None:
        return self.l2g.loss(target)

    def after_step(self) -> list[nn.Parameter]:
        return self.l2g.after_step()

    def diagnostic_keys(self) -> list[str]:
        return [*([] if self.alpha is None else ["alpha", "changed_voxels"]), *self.l2g.diagnostic_keys]

    def diagnostics(self) -> dict[str, float]:
        """alpha; changed_voxels, the share of one training image whose label the read-out changes; those of the module."""
        found = self.explain(self._image)
        values = {}
        if self.alpha is not None:
            one, other = (self._labels(found[key]) for key in ("without", "logits"))
            values = {"alpha": float(self.alpha.detach()), "changed_voxels": float((one != other).any(1).float().mean())}
        return values | (self.l2g.diagnostics(found["moved"]) if "moved" in found else {})

    def _labels(self, logits: torch.Tensor) -> torch.Tensor:
        return logits > 0 if self.regions else logits.argmax(1, keepdim=True)

    def __getstate__(self):
        return {**self.__dict__, "_image": None}  # a copy does not hold the last batch


def choose_level(strides, features: int, references: int) -> int:
    """The finest level from 1 on whose scores, tokens times references, are at most half of the finest feature map.

    With C_0 features at full resolution of n_0 voxels, and n_l = n_0 / prod(strides up to l) tokens: n_l p <= n_0 C_0 / 2.
    The scores are the largest tensor of the method, so this bounds its time and memory by those of the plain network, for any
    number of classes. If no level is coarse enough, it is the coarsest one of the decoder.

    strides : of the encoder's stages, one number for each axis
    features, references : C_0, p
    """
    coarsest, voxels = len(strides) - 2, 1
    for level in range(1, coarsest):
        stride = strides[level]
        voxels *= math.prod(stride)
        if references <= features / 2 * voxels:
            return level
    return max(coarsest, 0)
