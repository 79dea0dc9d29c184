"""L2GNet: a plan's U-Net whose deepest features are quantised and related by optimal transport."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn

from nnunet_l2g.architectures.plan_network import PlanNetwork
from nnunet_l2g.layers import L2GBlock


class L2GNet(PlanNetwork):
    r"""nnU-Net's network with an L2GBlock on chosen encoder outputs: :math:`skips_l \leftarrow \mathrm{L2GBlock}_l(skips_l)`.

    Starts as the plain network: same weights, same logits. A reconstruction of L2GNet [1] from its abstract (docs/methods).

    Parameters
    ----------
    backbone : nn.Module
        See PlanNetwork.
    levels : sequence of int
        Encoder stages whose output is changed; -1 is the bottleneck.
    **block
        Arguments of L2GBlock (dim, num_codes, num_references, eps, iterations, solver, gamma, reference_steps).

    Shapes
    ------
    forward: (B, C_in, *spatial) -> logits (B, classes, *spatial), or with deep supervision a list of them, largest first.

    Raises
    ------
    ValueError
        If a level does not exist or is named twice, or an argument of the block is out of range.
    NotImplementedError
        See PlanNetwork.

    References
    ----------
    .. [1] Gorade et al. L2GNet: optimal local-to-global representation of anatomical structures for generalized medical
       image segmentation. arXiv 2502.05229; PMLR 317:110-116, 2026.
    """

    FORMAT = 1  # of the weights; counts up when older checkpoints no longer mean the same

    def __init__(self, backbone: nn.Module, levels: Sequence[int] = (-1,), **block):
        channels = list(backbone.encoder.output_channels) if hasattr(backbone, "encoder") else []
        if channels:
            _check_levels(levels, len(channels))
        super().__init__(backbone, self._settings(levels, block))
        self.levels = tuple(levels)
        self.l2g = nn.ModuleList(L2GBlock(channels[level], **block) for level in levels)

    def _settings(self, levels, block) -> dict:
        """What the weights depend on; not how training starts, nor which of two equal solvers runs."""
        arguments = inspect.signature(L2GBlock).bind(0, **block)
        arguments.apply_defaults()
        training_only = ("channels", "solver", "gamma", "reference_steps")
        kept = {key: value for key, value in arguments.arguments.items() if key not in training_only}
        return {"network": "L2GNet", "format": self.FORMAT, "levels": list(levels), **kept}

    @classmethod
    def from_plans(
        cls,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        deep_supervision: bool = True,
        levels: Sequence[int] = (-1,),
        **block,
    ) -> L2GNet:
        """Builds the network for a configuration of nnU-Net plans; any stage count, 2D or 3D, anisotropic.

        Raises ValueError if a chosen level has a single voxel in the plan's patch.
        """
        backbone = cls.backbone_from_plans(
            configuration_manager, num_input_channels, num_output_channels, deep_supervision
        )
        network = cls(backbone, levels, **block)
        patch = tuple(configuration_manager.patch_size)
        for level in levels:
            size = _level_size(patch, network.encoder.strides, level)
            if math.prod(size) < 2:
                raise ValueError(
                    f"level {level} of these plans has spatial shape {size} for patch {patch}, a single voxel: there is "
                    "nothing to relate. Use a larger patch, or plans with fewer stages."
                )
        return network

    def forward(self, x: torch.Tensor):
        skips = self.encoder(x)  # one (B, C_l, *spatial_l) for each stage, largest first
        for index, level in enumerate(self.levels):  # no zip: older torch.compile breaks the graph at strict=True
            skips[level] = self.l2g[index](skips[level])
        return self.decoder(skips)

    @torch.no_grad()
    def explain(self, x: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
        """What each block does in eval mode, for pictures: level -> L2GBlock.explain, and "grid" (*spatial_l) of its tokens."""
        was_training = self.training
        self.eval()
        skips, found = self.encoder(x), {}
        for level, block in zip(self.levels, self.l2g, strict=True):
            found[level] = block.explain(skips[level]) | {"grid": torch.tensor(skips[level].shape[2:])}
        self.train(was_training)
        return found

    def auxiliary_loss(self) -> torch.Tensor | None:
        losses = [block.loss for block in self.l2g if block.loss is not None]
        return sum(losses) if losses else None

    def after_step(self) -> None:
        for block in self.l2g:
            block.after_step()

    def diagnostic_keys(self) -> list[str]:
        return [prefix + key for prefix, block in self._named_blocks() for key in block.diagnostic_keys]

    def diagnostics(self) -> dict[str, float]:
        """The blocks' diagnostics; with several levels each name starts with its level."""
        return {prefix + key: value for prefix, block in self._named_blocks() for key, value in block.diagnostics().items()}

    def _named_blocks(self):
        prefixes = [""] if len(self.levels) == 1 else [f"level{level}_" for level in self.levels]
        return zip(prefixes, self.l2g, strict=True)

    def fast_parameters(self) -> list[nn.Parameter]:
        """References: they start far from what they have to match, and are trained at a multiple of the learning rate."""
        return [block.alignment.references for block in self.l2g if block.alignment is not None]


def _check_levels(levels: Sequence[int], num_stages: int) -> None:
    if not levels:
        raise ValueError("levels is empty, expected at least one encoder stage (-1 is the bottleneck)")
    for level in levels:
        if not -num_stages <= level < num_stages:
            raise ValueError(f"level {level} does not exist, expected {-num_stages} to {num_stages - 1} for these plans")
    if len({level % num_stages for level in levels}) < len(levels):
        raise ValueError(f"levels {tuple(levels)} names a stage twice, expected each once")


def _level_size(patch: Sequence[int], strides: Sequence, level: int) -> tuple[int, ...]:
    """Spatial shape of an encoder output: strided 3x3 convolutions with padding round up."""
    size = tuple(patch)
    for stride in strides[: len(strides) + level + 1 if level < 0 else level + 1]:
        steps = stride if isinstance(stride, (tuple, list)) else [stride] * len(size)
        size = tuple(-(-s // step) for s, step in zip(size, steps, strict=True))
    return size
