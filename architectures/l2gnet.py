"""L2GNet: a plan's U-Net some of whose features are quantised and related by optimal transport."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.architectures.plan_network import PlanNetwork
from nnunet_l2g.layers import L2GBlock, PrototypeReadout

TRAINING_ONLY = (
    "channels", "num_classes", "solver", "gamma", "reference_steps", "reference_norm", "class_weight", "shuffled_classes",
)  # fmt: skip
OPTIONAL = ("relaxation", "over_codes", "references_per_class", "feed_back", "keep_features")


class L2GNet(PlanNetwork):
    r"""nnU-Net's network with an L2GBlock on chosen encoder outputs, :math:`skips_l \leftarrow \mathrm{L2GBlock}_l(skips_l)`,
    or decoder outputs.

    Starts as the plain network: same weights, same logits. A reconstruction of L2GNet [1] from its abstract (docs/methods).

    Parameters
    ----------
    backbone : nn.Module
        See PlanNetwork.
    levels : sequence of int
        Encoder stages whose output is changed; -1 is the bottleneck.
    decoder_levels : sequence of int
        Levels at which what the decoder makes is changed; numbered as the encoder's stages, 0 being full resolution.
    readout : "image", "dataset" or None
        Adds a PrototypeReadout to the logits: of what the references of the last of `decoder_levels` collect, compared with the
        decoder's output at level 1. Needs `references_per_class`.
    **block
        Arguments of L2GBlock.

    Shapes
    ------
    forward: (B, C_in, *spatial) -> logits (B, classes, *spatial), or with deep supervision a list of them, largest first.

    Raises
    ------
    ValueError
        If a level does not exist or is named twice, the read-out lacks what it needs, or an argument of the block is out of
        range.
    NotImplementedError
        See PlanNetwork.

    References
    ----------
    .. [1] Gorade et al. L2GNet: optimal local-to-global representation of anatomical structures for generalized medical
       image segmentation. arXiv 2502.05229; PMLR 317:110-116, 2026.
    """

    FORMAT = 1  # of the weights; counts up when older checkpoints no longer mean the same

    def __init__(
        self,
        backbone: nn.Module,
        levels: Sequence[int] = (-1,),
        decoder_levels: Sequence[int] = (),
        readout: str | None = None,
        **block,
    ):
        channels = list(backbone.encoder.output_channels) if hasattr(backbone, "encoder") else []
        if channels:
            _check_levels(levels, decoder_levels, len(channels))
        super().__init__(backbone, self._settings(levels, decoder_levels, readout, block))
        self.levels, self.decoder_levels = tuple(levels), tuple(sorted(decoder_levels, reverse=True))
        if block.get("references_per_class") is not None:
            block["num_classes"] = self.decoder.num_classes
        self.l2g = nn.ModuleList(L2GBlock(channels[level], **block) for level in [*self.levels, *self.decoder_levels])
        self.readout = None
        if readout is not None:
            ties = self.l2g[-1].ties
            if ties is None or not self.decoder_levels or self.decoder_levels[-1] < 1:
                raise ValueError(
                    f"readout {readout!r} needs references_per_class and decoder_levels of 1 or more, got "
                    f"{block.get('references_per_class')} and {self.decoder_levels}: it reads what those references collect"
                )
            dim = self.l2g[-1].project_in.out_features
            self.readout = PrototypeReadout(channels[1], dim, ties.num_classes, ties.per_class, source=readout)

    def _settings(self, levels, decoder_levels, readout, block) -> dict:
        """What the weights depend on; not how training starts, nor which of two equal solvers runs."""
        signature = inspect.signature(L2GBlock)
        arguments = signature.bind(0, **block)
        arguments.apply_defaults()
        kept = {key: value for key, value in arguments.arguments.items() if key not in TRAINING_ONLY}
        optional = {**{key: kept.pop(key) for key in OPTIONAL}, "readout": readout}
        optional["decoder_levels"] = sorted(decoder_levels, reverse=True)  # in the order of the decoder
        defaults = {**{key: signature.parameters[key].default for key in OPTIONAL}, "decoder_levels": [], "readout": None}
        # an option that is off is not stored, so that weights from before it was there still fit
        on = {key: value for key, value in optional.items() if value != defaults[key]}
        return {"network": "L2GNet", "format": self.FORMAT, "levels": list(levels), **kept, **on}

    @classmethod
    def from_plans(
        cls,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        deep_supervision: bool = True,
        levels: Sequence[int] = (-1,),
        decoder_levels: Sequence[int] = (),
        **settings,
    ) -> L2GNet:
        """Builds the network for a configuration of nnU-Net plans; any stage count, 2D or 3D, anisotropic.

        Raises ValueError if a chosen level has a single voxel in the plan's patch.
        """
        backbone = cls.backbone_from_plans(configuration_manager, num_input_channels, num_output_channels, deep_supervision)
        network = cls(backbone, levels, decoder_levels, **settings)
        patch = tuple(configuration_manager.patch_size)
        for level in [*levels, *decoder_levels]:
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
        return self._decode(skips) if self.decoder_levels else self.decoder(skips)

    def _decode(self, skips: list[torch.Tensor], seen: dict[int, torch.Tensor] | None = None):
        """nnU-Net's decoder with blocks and read-out; `seen`, if given, gets what each block was given, by its index."""
        collected = compared = None

        def relate(level: int, features: torch.Tensor) -> torch.Tensor:
            nonlocal collected, compared
            if level in self.decoder_levels:
                index = len(self.levels) + self.decoder_levels.index(level)
                if seen is not None:
                    seen[index] = features
                features, collected = self.l2g[index].relate(features)
            if level == 1 and self.readout is not None:
                compared = self.readout(features, collected)  # (B, classes, *spatial_1)
            return features

        outputs = self.decode(skips, relate)
        if compared is None:
            return outputs
        logits = outputs[0] if isinstance(outputs, list) else outputs  # (B, classes, *spatial)
        mode = "bilinear" if logits.ndim == 4 else "trilinear"
        logits = logits + F.interpolate(compared, logits.shape[2:], mode=mode).to(logits.dtype)
        return [logits, *outputs[1:]] if isinstance(outputs, list) else logits

    @torch.no_grad()
    def explain(self, x: torch.Tensor) -> dict[int | str, dict[str, torch.Tensor]]:
        """What each block does in eval mode, for pictures: place -> L2GBlock.explain, and "grid" (*spatial_l) of its tokens."""
        was_training = self.training
        self.eval()
        skips, given = self.encoder(x), {}
        for index, level in enumerate(self.levels):
            given[index] = skips[level]
            skips[level] = self.l2g[index](skips[level])
        if self.decoder_levels:
            self._decode(skips, given)
        found = {
            place: self.l2g[index].explain(given[index]) | {"grid": torch.tensor(given[index].shape[2:])}
            for index, place in enumerate(self.places)
        }
        self.train(was_training)
        return found

    @property
    def places(self) -> list[int | str]:
        """Where each block is: the encoder's level, or decoder<level>."""
        return [*self.levels, *(f"decoder{level}" for level in self.decoder_levels)]

    def auxiliary_loss(self, target: torch.Tensor | None = None) -> torch.Tensor | None:
        losses = [block.loss for block in self.l2g]
        if target is not None:
            losses += [block.class_loss(target) for block in self.l2g]
        losses = [loss for loss in losses if loss is not None]
        return sum(losses) if losses else None

    def after_step(self) -> None:
        for block in self.l2g:
            block.after_step()
        if self.readout is not None:
            self.readout.update()

    def diagnostic_keys(self) -> list[str]:
        return [prefix + key for prefix, block in self._named_blocks() for key in block.diagnostic_keys]

    def diagnostics(self) -> dict[str, float]:
        """The blocks' diagnostics; with several levels each name starts with its level."""
        return {prefix + key: value for prefix, block in self._named_blocks() for key, value in block.diagnostics().items()}

    def _named_blocks(self):
        names = [place if isinstance(place, str) else f"level{place}" for place in self.places]
        prefixes = [""] if len(names) == 1 else [f"{name}_" for name in names]
        return zip(prefixes, self.l2g, strict=True)

    def fast_parameters(self) -> list[nn.Parameter]:
        """References: they start far from what they have to match, and are trained at a multiple of the learning rate."""
        return [block.alignment.references for block in self.l2g if block.alignment is not None]


def _check_levels(levels: Sequence[int], decoder_levels: Sequence[int], num_stages: int) -> None:
    if not levels and not decoder_levels:
        raise ValueError("levels and decoder_levels are empty, expected at least one stage (level -1 is the bottleneck)")
    for level in levels:
        if not -num_stages <= level < num_stages:
            raise ValueError(f"level {level} does not exist, expected {-num_stages} to {num_stages - 1} for these plans")
    for level in decoder_levels:
        if not 0 <= level < num_stages - 1:
            raise ValueError(f"decoder level {level} does not exist, expected 0 to {num_stages - 2} for these plans")
    if len({level % num_stages for level in levels}) < len(levels) or len(set(decoder_levels)) < len(decoder_levels):
        raise ValueError(
            f"levels {tuple(levels)} or decoder_levels {tuple(decoder_levels)} names a stage twice, expected each once"
        )


def _level_size(patch: Sequence[int], strides: Sequence, level: int) -> tuple[int, ...]:
    """Spatial shape of an encoder output: strided 3x3 convolutions with padding round up."""
    size = tuple(patch)
    for stride in strides[: len(strides) + level + 1 if level < 0 else level + 1]:
        steps = stride if isinstance(stride, (tuple, list)) else [stride] * len(size)
        size = tuple(-(-s // step) for s, step in zip(size, steps, strict=True))
    return size
