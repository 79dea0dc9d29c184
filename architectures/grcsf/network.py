"""GRCSF: a plan's U-Net with compensation units for what downsampling lost and what an autoencoder cannot reconstruct."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from nnunet_l2g.architectures.grcsf.compensation_units import GlobalCompensationUnit, RegionCompensationUnit
from nnunet_l2g.architectures.grcsf.masked_autoencoder import MaskedAutoencoder
from nnunet_l2g.architectures.grcsf.patches import choose_token_size, sincos_positions, token_grid
from nnunet_l2g.architectures.grcsf.residual_maps import DifferenceOfGaussians, num_map_channels, stack_residuals
from nnunet_l2g.architectures.plan_network import PlanNetwork

RESIDUALS = ("autoencoder", "other", "dog", None)
RCU_LEVELS = 3  # decoder levels with a RegionCompensationUnit, counted from full resolution


class GRCSF(PlanNetwork):
    r"""nnU-Net's network with a GlobalCompensationUnit on each skip and RegionCompensationUnits on the last decoder levels.

    It starts as the plain network: same weights, same logits. The masked autoencoder is part of the network, so that a model
    folder is enough for prediction. It is frozen here and trained before, in its own pretraining stage. A reconstruction of
    GRCSF [1] from its abstract and second-hand accounts (docs/methods).

    Parameters
    ----------
    backbone : nn.Module
        See PlanNetwork.
    patch_size, token_size : sequence of int
        (D,) voxels; `choose_token_size` finds a token size. It may be None if `residual` is.
    gcu : bool
        False (ablation): no GlobalCompensationUnits.
    residual : str or None
        What the RegionCompensationUnits read. "autoencoder": its residual maps. Ablations: "other", the maps of the previous
        training image (is it the map, or the parameters?); "dog", a difference of Gaussians; None, no units.
    dim : int
        Width of the units' tokens.
    autoencoder : mapping
        Further arguments of MaskedAutoencoder. Its width is 256 in 2D and 384 in 3D by default.

    Shapes
    ------
    forward: (B, C, *patch) -> logits (B, classes, *patch), or with deep supervision a list of them, largest first.

    Raises
    ------
    ValueError
        If `residual` is unknown, or the token size does not divide the patch or fits no decoder level.
    NotImplementedError
        See PlanNetwork; and for cascades, whose second configuration has segmentations as input channels, which the
        autoencoder must not reconstruct.

    References
    ----------
    .. [1] Wang, Chen, Yang, Kim. GRCSF. arXiv 2502.08675; Pattern Recognition 2025, 112461.
    """

    FORMAT = 2  # of the weights; it is raised when older checkpoints no longer mean the same

    def __init__(
        self,
        backbone: nn.Module,
        patch_size: Sequence[int],
        token_size: Sequence[int] | None,
        gcu: bool = True,
        residual: str | None = "autoencoder",
        dim: int = 128,
        autoencoder: Mapping | None = None,
    ):
        if residual not in RESIDUALS:
            raise ValueError(f"residual is {residual!r}, expected one of {', '.join(map(repr, RESIDUALS))}")
        super().__init__(backbone, {})  # refuses other backbones
        dims, widths = len(patch_size), list(self.encoder.output_channels)
        channels = next(m.in_channels for m in self.encoder.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
        settings = {"network": "GRCSF", "format": self.FORMAT, "channels": channels, "gcu": gcu, "residual": residual}
        self.residual, self.patch_size = residual, tuple(patch_size)
        self.gcu = nn.ModuleList(
            GlobalCompensationUnit(width, below, dims) for width, below in itertools.pairwise(widths) if gcu
        )
        self.autoencoder = None
        self.rcu = nn.ModuleDict()  # by decoder stage
        self.gaussians = DifferenceOfGaussians() if residual == "dog" else None
        if residual is not None:
            settings |= {"token_size": list(token_size), "rcu_levels": RCU_LEVELS, "dim": dim}
            self._add_region_units(tuple(token_size), widths, channels, dim)
        if residual in ("autoencoder", "other"):
            arguments = MaskedAutoencoder.resolve({"width": {2: 256, 3: 384}[dims], **(autoencoder or {})})
            settings |= {f"autoencoder_{key}": value for key, value in arguments.items()}
            self.autoencoder = MaskedAutoencoder(channels, patch_size, token_size, **arguments)
            self.autoencoder.requires_grad_(False)  # before DDP wraps the network; its pretraining stage thaws it for a while
        if residual == "other":
            shape = (2, num_map_channels(channels), *patch_size)
            self.register_buffer("other_maps", torch.zeros(shape, dtype=torch.float16))
        self.store_settings(settings)
        tables = [name for name, _ in self.named_buffers() if name not in self.state_dict()]
        # equal in all processes, so DDP need not broadcast them in each forward; compiled modules have a prefix
        self._ddp_params_and_buffers_to_ignore = [prefix + name for name in tables for prefix in ("", "_orig_mod.")]
        self._maps = None  # of the last training forward, for the ablation "other"
        self._auxiliary = None

    def _add_region_units(self, token_size: tuple[int, ...], widths: list[int], channels: int, dim: int) -> None:
        strides = level_strides(self.encoder.strides, len(self.patch_size))
        levels = fitting_levels(token_size, strides)[:RCU_LEVELS]
        if not levels:
            raise ValueError(
                f"token size {token_size} is no multiple of any decoder level's stride ({strides[:-1]}): the Region "
                "Compensation Unit fits nowhere. Choose another token size."
            )
        for level in levels:
            unit = RegionCompensationUnit(
                widths[level], widths[-1], num_map_channels(channels), token_size, strides[level], dim
            )
            self.rcu[str(len(widths) - 2 - level)] = unit
        grid = token_grid(self.patch_size, token_size)
        self.register_buffer("position", sincos_positions(grid, dim), persistent=False)  # (N, dim)

    @classmethod
    def from_plans(
        cls,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        deep_supervision: bool = True,
        **settings,
    ) -> GRCSF:
        """As PlanNetwork.from_plans. The token size is chosen from patch, spacing and strides.

        Raises ValueError if no token size divides the patch.
        """
        if configuration_manager.previous_stage_name is not None:
            raise NotImplementedError(
                "GRCSF does not support cascades: the input of the second configuration holds the segmentation of the first "
                "one, which the masked autoencoder must not reconstruct. Train 2d, 3d_lowres or 3d_fullres."
            )
        backbone = cls.backbone_from_plans(configuration_manager, num_input_channels, num_output_channels, deep_supervision)
        patch, token_size = configuration_manager.patch_size, None
        if settings.get("residual", "autoencoder") is not None:  # a plain network needs no tokens
            multiples = _multiples(backbone.encoder.strides, patch)
            token_size = choose_token_size(patch, configuration_manager.spacing, multiples)
        return cls(backbone, patch, token_size, **settings)

    def train(self, mode: bool = True):
        super().train(mode)
        if not mode:
            self._auxiliary = self._maps = None
        return self

    def forward(self, x: torch.Tensor):
        return self._forward(x, {})

    @torch.no_grad()
    def explain(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Intermediate results in eval mode, for pictures: (B, channels, *patch) each, float32.

        mean_50, mean_75, residual_50, residual_75 (C channels, with an autoencoder), map_50, map_75 (C + 2), compensation
        (m of the GCU at full resolution, 1), importance_<s> (w of the RCU at decoder stage s, 1, on the token grid), logits.
        """
        was_training, deep_supervision = self.training, self.decoder.deep_supervision
        self.eval().decoder.deep_supervision = False
        found: dict[str, torch.Tensor] = {}
        found["logits"] = self._forward(x, found)
        self.train(was_training).decoder.deep_supervision = deep_supervision
        return {key: value.float() for key, value in found.items()}

    def _forward(self, x: torch.Tensor, found: dict):
        """`forward`, which adds intermediate results to `found`."""
        skips = self.encoder(x)  # one (B, C_l, *spatial_l) for each stage, largest first
        maps = None if self.residual is None else self._residual_maps(x, found)
        losses = []
        bottleneck, below = skips[-1], list(skips)  # the units read the encoder's features, not each other's output
        for level, unit in enumerate(self.gcu):
            skips[level], gap, loss = unit(below[level], below[level + 1])
            losses.append(loss)
            found.setdefault("compensation", gap)
        self._auxiliary = torch.stack(losses).mean() if losses and self.training else None

        def compensate(level: int, features: torch.Tensor) -> torch.Tensor:
            s = len(self.decoder.stages) - 1 - level
            if str(s) in self.rcu:
                features, found[f"importance_{s}"] = self.rcu[str(s)](features, maps, bottleneck, self.position)
            return features

        return self.decode(skips, compensate)

    def _residual_maps(self, x: torch.Tensor, found: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Two maps (B, C + 2, *patch), of 50 % and 75 % masking, without gradient."""
        with torch.no_grad():
            if self.gaussians is not None:
                residuals = self.gaussians(x)
            else:
                reconstructions = self.autoencoder(x)  # {50: , 75: }
                residuals = [r.residual for r in reconstructions.values()]
                found |= {f"mean_{ratio}": r.mean for ratio, r in reconstructions.items()}
                found |= {f"residual_{ratio}": r.residual for ratio, r in reconstructions.items()}
            maps = stack_residuals(*residuals)
        found |= {"map_50": maps[0], "map_75": maps[1]}
        if self.residual != "other":
            return maps
        if self.training:
            self._maps = maps
        return tuple(m.to(maps[0].dtype).expand_as(maps[0]) for m in self.other_maps)

    def auxiliary_loss(self, target: torch.Tensor | None = None) -> torch.Tensor | None:
        return self._auxiliary

    @torch.no_grad()
    def after_step(self) -> None:
        if self.residual == "other" and self._maps is not None:
            self.other_maps.copy_(torch.stack([m[0] for m in self._maps]))
            self._maps = None

    def __getstate__(self):
        return {**self.__dict__, "_maps": None, "_auxiliary": None}  # a copy does not hold the last batch

    def diagnostic_keys(self) -> list[str]:
        return [f"gamma_level{level}" for level in range(len(self.gcu))] + [
            f"{name}_stage{s}" for s in self.rcu for name in ("mix_50", "mix_75", "update")
        ]

    def diagnostics(self) -> dict[str, float]:
        """gamma of each GCU; the two mixing weights of each RCU and the mean absolute weight of its convolution."""
        values = {f"gamma_level{level}": float(unit.gamma.detach()) for level, unit in enumerate(self.gcu)}
        for s, unit in self.rcu.items():
            values |= {f"mix_{ratio}_stage{s}": float(w.detach()) for ratio, w in zip((50, 75), unit.mix, strict=True)}
            values[f"update_stage{s}"] = float(unit.conv.weight.detach().abs().mean())
        return values


def level_strides(strides: Sequence, dims: int) -> list[tuple[int, ...]]:
    """The factor by which the output of each encoder stage is smaller than the patch, for each axis."""
    total, levels = [1] * dims, []
    for stride in strides:
        steps = stride if isinstance(stride, (tuple, list)) else [stride] * dims
        total = [t * s for t, s in zip(total, steps, strict=True)]
        levels.append(tuple(total))
    return levels


def fitting_levels(token_size: Sequence[int], strides: list[tuple[int, ...]]) -> list[int]:
    """Decoder levels, from full resolution down, whose stride divides the token size. The bottleneck is not one of them."""
    return [i for i, stride in enumerate(strides[:-1]) if all(t % s == 0 for t, s in zip(token_size, stride, strict=True))]


def _multiples(strides: Sequence, patch: Sequence[int]) -> tuple[int, ...]:
    """What the token size has to be a multiple of, so that it fits the last three decoder levels, or all if there are fewer."""
    levels = level_strides(strides, len(patch))[:-1][:RCU_LEVELS]
    return tuple(math.gcd(s, p) for s, p in zip(levels[-1], patch, strict=True))
