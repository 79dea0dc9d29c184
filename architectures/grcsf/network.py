"""GRCSF: a plan's U-Net, guided by what an autoencoder cannot reconstruct and by what downsampling lost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from nnunet_l2g.architectures.grcsf.global_compensation import GlobalCompensationUnit
from nnunet_l2g.architectures.grcsf.masked_autoencoder import MaskedAutoencoder
from nnunet_l2g.architectures.grcsf.patches import choose_token_size, sincos_positions, token_grid
from nnunet_l2g.architectures.grcsf.region_compensation import RegionCompensationUnit
from nnunet_l2g.architectures.grcsf.residual_maps import DifferenceOfGaussians, num_map_channels, stack_residuals
from nnunet_l2g.architectures.plan_network import PlanNetwork

RESIDUALS = ("autoencoder", "other", "dog", None)


class GRCSF(PlanNetwork):
    r"""nnU-Net's network with a GlobalCompensationUnit on each skip and RegionCompensationUnits on the last decoder levels.

    Starts as the plain network: same weights, same logits. The masked autoencoder is part of the network, so that a model
    folder predicts alone; it is frozen here, and trained by its own stage before. A reconstruction of GRCSF [1] from its
    abstract and second-hand accounts (docs/methods).

    Parameters
    ----------
    backbone : nn.Module
        See PlanNetwork.
    patch_size, token_size : sequence of int
        (D,) voxels; `choose_token_size` finds a token size. It may be None if `residual` is.
    gcu : bool
        False leaves out the GlobalCompensationUnits (twin).
    residual : str or None
        What the RegionCompensationUnits look at: "autoencoder" its residual maps; "other" those of the previous training
        image (twin: is it the map, or the parameters?); "dog" a difference of Gaussians (twin); None no units (twin).
    rcu_levels : int
        Decoder levels with a unit, counted from full resolution; fewer if the plan has fewer or tokens do not fit.
    dim : int
        Width of the units' tokens.
    autoencoder : mapping
        Further arguments of MaskedAutoencoder. Its width defaults to 256 in 2D and 384 in 3D.

    Shapes
    ------
    forward: (B, C, *patch) -> logits (B, classes, *patch), or with deep supervision a list of them, largest first.

    Raises
    ------
    ValueError
        For an unknown `residual`, a token size that does not divide the patch or fits no decoder level, rcu_levels under 1.
    NotImplementedError
        See PlanNetwork; and for cascades, whose second stage has segmentation channels that no autoencoder should see.

    References
    ----------
    .. [1] Wang, Chen, Yang, Kim. GRCSF. arXiv 2502.08675; Pattern Recognition 2025, 112461.
    """

    FORMAT = 2  # of the weights; counts up when older checkpoints no longer mean the same

    def __init__(
        self,
        backbone: nn.Module,
        patch_size: Sequence[int],
        token_size: Sequence[int] | None,
        gcu: bool = True,
        residual: str | None = "autoencoder",
        rcu_levels: int = 3,
        dim: int = 128,
        autoencoder: Mapping | None = None,
    ):
        if residual not in RESIDUALS:
            raise ValueError(f"residual is {residual!r}, expected one of {', '.join(map(repr, RESIDUALS))}")
        if rcu_levels < 1:
            raise ValueError(f"rcu_levels is {rcu_levels}, expected at least 1; residual=None leaves the units out")
        channels = _input_channels(backbone)
        autoencoder = MaskedAutoencoder.resolve({"width": {2: 256, 3: 384}[len(patch_size)], **(autoencoder or {})})
        settings = {
            "network": "GRCSF", "format": self.FORMAT, "channels": channels, "gcu": gcu, "residual": residual,
        }  # fmt: skip
        if residual is not None:
            settings |= {"token_size": list(token_size), "rcu_levels": rcu_levels, "dim": dim}
        if residual in ("autoencoder", "other"):
            settings |= {f"autoencoder_{key}": value for key, value in autoencoder.items()}
        super().__init__(backbone, settings)
        self.residual, self.patch_size = residual, tuple(patch_size)
        self.token_size = None if residual is None else tuple(token_size)
        dims, widths = len(self.patch_size), list(self.encoder.output_channels)
        self.gcu = nn.ModuleList(
            GlobalCompensationUnit(width, below, dims) for width, below in itertools.pairwise(widths) if gcu
        )
        self.autoencoder = None
        if residual in ("autoencoder", "other"):
            self.autoencoder = MaskedAutoencoder(channels, patch_size, token_size, **autoencoder)
            self.autoencoder.requires_grad_(False)  # before DDP wraps the network; its stage thaws it for a while
        self.gaussians = DifferenceOfGaussians(dims) if residual == "dog" else None
        self.rcu = nn.ModuleDict()  # by decoder stage
        if residual is not None:
            self._add_units(widths, channels, rcu_levels, dim)
        if residual == "other":
            shape = (2, num_map_channels(channels), *patch_size)
            self.register_buffer("other_maps", torch.zeros(shape, dtype=torch.float16))
        tables = [name for name, _ in self.named_buffers() if name not in self.state_dict()]
        # equal on all processes, so DDP need not broadcast them in each forward; compiled modules have a prefix
        self._ddp_params_and_buffers_to_ignore = [prefix + name for name in tables for prefix in ("", "_orig_mod.")]
        self._maps = None  # of the last training forward, for the twin "other"
        self._auxiliary = None

    def _add_units(self, widths: list[int], channels: int, rcu_levels: int, dim: int) -> None:
        strides = level_strides(self.encoder.strides, len(self.patch_size))
        levels = fitting_levels(self.token_size, strides)[:rcu_levels]
        if not levels:
            raise ValueError(
                f"token size {self.token_size} is no multiple of any decoder level's stride ({strides[:-1]}): the Region "
                "Compensation Unit fits nowhere. Choose another token size."
            )
        for level in levels:
            unit = RegionCompensationUnit(
                widths[level], widths[-1], num_map_channels(channels), self.token_size, strides[level], dim
            )
            self.rcu[str(len(widths) - 2 - level)] = unit
        grid = token_grid(self.patch_size, self.token_size)
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
        """Builds the network for a configuration of nnU-Net plans; the token size is chosen from patch, spacing and strides.

        Raises ValueError if no token size divides the patch.
        """
        if configuration_manager.previous_stage_name is not None:
            raise NotImplementedError(
                "GRCSF does not support cascades: the second stage's input holds the first stage's segmentation, which the "
                "masked autoencoder must not reconstruct. Train 2d, 3d_lowres or 3d_fullres."
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
        """What the network sees and does, in eval mode, for pictures: (B, ?, *patch) each, float32.

        mean_50, mean_75, residual_50, residual_75 (C channels, with an autoencoder), map_50, map_75 (C + 2), compensation
        (the GCU's m at full resolution, 1), importance_<s> (w of the unit at decoder stage s, 1, on the token grid), logits.
        """
        was_training, deep_supervision = self.training, self.decoder.deep_supervision
        self.eval().decoder.deep_supervision = False
        found: dict[str, torch.Tensor] = {}
        found["logits"] = self._forward(x, found)
        self.train(was_training).decoder.deep_supervision = deep_supervision
        return {key: value.float() for key, value in found.items()}

    def _forward(self, x: torch.Tensor, found: dict):
        """forward, leaving intermediate results in `found`."""
        skips = self.encoder(x)  # one (B, C_l, *spatial_l) for each stage, largest first
        maps = None if self.residual is None else self._residual_maps(x, found)
        losses = []
        bottleneck, below = skips[-1], list(skips)  # the units read what the encoder made, not each other's output
        for level, unit in enumerate(self.gcu):
            skips[level], gap, loss = unit(below[level], below[level + 1])
            losses.append(loss)
            found.setdefault("compensation", gap)
        self._auxiliary = torch.stack(losses).mean() if losses and self.training else None
        return self._decode(skips, maps, bottleneck, found)

    def _decode(self, skips, maps, bottleneck, found: dict):
        """nnU-Net's decoder with a unit after chosen stages."""

        def compensate(level: int, features: torch.Tensor) -> torch.Tensor:
            s = len(self.decoder.stages) - 1 - level
            if str(s) in self.rcu:
                position = self._position(maps[0])
                features, found[f"importance_{s}"] = self.rcu[str(s)](features, maps, bottleneck, position)
            return features

        return self.decode(skips, compensate)

    def _position(self, residual_map: torch.Tensor) -> torch.Tensor:
        grid = token_grid(residual_map.shape[2:], self.token_size)
        if grid == token_grid(self.patch_size, self.token_size):
            return self.position
        return sincos_positions(grid, self.position.shape[1]).to(self.position)

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
        return {**self.__dict__, "_maps": None, "_auxiliary": None}  # deepcopy copies the network, not its last batch

    def diagnostic_keys(self) -> list[str]:
        return [f"gamma_level{level}" for level in range(len(self.gcu))] + [
            f"{name}_stage{s}" for s in self.rcu for name in ("mix_50", "mix_75", "update")
        ]

    def diagnostics(self) -> dict[str, float]:
        """gamma of each GCU; of each RCU the two mixing weights and the size of its convolution (mean absolute weight)."""
        values = {f"gamma_level{level}": float(unit.gamma.detach()) for level, unit in enumerate(self.gcu)}
        for s, unit in self.rcu.items():
            values |= {f"mix_{ratio}_stage{s}": float(w.detach()) for ratio, w in zip((50, 75), unit.mix, strict=True)}
            values[f"update_stage{s}"] = float(unit.conv.weight.detach().abs().mean())
        return values


def level_strides(strides: Sequence, dims: int) -> list[tuple[int, ...]]:
    """How much smaller than the patch each encoder stage's output is, for each axis."""
    total, levels = [1] * dims, []
    for stride in strides:
        steps = stride if isinstance(stride, (tuple, list)) else [stride] * dims
        total = [t * s for t, s in zip(total, steps, strict=True)]
        levels.append(tuple(total))
    return levels


def fitting_levels(token_size: Sequence[int], strides: list[tuple[int, ...]]) -> list[int]:
    """Decoder levels, from full resolution down, whose stride divides the token size; the bottleneck is none of them."""
    return [i for i, stride in enumerate(strides[:-1]) if all(t % s == 0 for t, s in zip(token_size, stride, strict=True))]


def _multiples(strides: Sequence, patch: Sequence[int]) -> tuple[int, ...]:
    """What the token size has to be a multiple of, for units on the last three decoder levels, or on those the plan has."""
    levels = level_strides(strides, len(patch))[:-1]
    return tuple(math.gcd(s, p) for s, p in zip(levels[min(2, len(levels) - 1)], patch, strict=True))


def _input_channels(backbone: nn.Module) -> int:
    """Of the first convolution; 0 for a backbone that PlanNetwork refuses with its own words."""
    convolutions = (m for m in backbone.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    return next((m.in_channels for m in convolutions), 0)
