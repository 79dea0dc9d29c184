"""A masked autoencoder on a plan's patch that predicts the mean and the scale of each masked voxel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from nnunet_l2g.architectures.grcsf.cross_attention import CrossAttentionBlock
from nnunet_l2g.architectures.grcsf.patches import Partition, make_partition, patchify, sincos_positions, token_grid, unpatchify
from nnunet_l2g.training.gaussian_blur import gaussian_blur

SETS = {50: 2, 75: 4}  # masking ratio in percent: number of complementary visible sets
QUARTERS = SETS[75]  # quarters of the tokens are encoded; two of them are a visible set of 50 %


class Reconstruction(NamedTuple):
    """mean and residual (B, C, *patch), float32: what was predicted for each voxel while masked, and (x - mean) / scale."""

    mean: torch.Tensor
    residual: torch.Tensor


class MaskedAutoencoder(nn.Module):
    r"""Reconstructs masked tokens from the visible ones [1]. The encoder never sees a masked voxel.

    Every voxel is predicted as a Laplace distribution with mean :math:`\mu` and scale b, in the units of the image. (Targets
    normalised for each token would discard its mean and contrast.) The loss is the negative log likelihood of masked tokens:

    .. math::
        L = \frac{1}{|M|} \sum_{i \in M} \frac{|x_i - \mu_i|}{b_i} + \log b_i

    So :math:`(x - \mu) / b` is the error relative to the error that is expected there. Edges and texture, which are hard to
    reconstruct everywhere, do not stand out by that alone. :math:`\mu` is a correction to a smooth background, which continues
    the means of visible tokens into the masked ones (normalised convolution [2]). Colour and shading need not be learnt.

    Complementary masks (see Partition) replace random ones. Each of four quarters of the tokens is encoded once, by itself.
    At 75 % the decoder reads one quarter, at 50 % two of them. So both ratios together cost one encoder pass over all tokens,
    and the result is deterministic.

    Parameters
    ----------
    channels : int
        C. All channels are reconstructed together.
    patch_size, token_size : sequence of int
        (D,) voxels; the token size divides the patch.
    width, depth : int
        Of the encoder: timm's transformer blocks with heads of width 64.
    decoder_width, decoder_depth : int
        Of the decoder. It computes masked tokens only, which read the visible ones by cross-attention.
    min_scale : float
        Lower bound of b, in units of the normalised image.

    Shapes
    ------
    forward: (B, C, *patch) -> dict of masking ratio in percent to Reconstruction

    Raises
    ------
    ValueError
        If a token size does not divide its axis, or an image has other channels or another shape than the patch.

    References
    ----------
    .. [1] He et al. Masked autoencoders are scalable vision learners. CVPR 2022.
    .. [2] Knutsson and Westin. Normalized and differential convolution. CVPR 1993.
    """

    def __init__(
        self,
        channels: int,
        patch_size: Sequence[int],
        token_size: Sequence[int],
        width: int = 256,
        depth: int = 6,
        decoder_width: int = 128,
        decoder_depth: int = 2,
        min_scale: float = 0.02,
    ):
        super().__init__()
        self.channels, self.token_size, self.min_scale = channels, tuple(token_size), min_scale
        self.grid = token_grid(patch_size, token_size)
        voxels = channels * math.prod(token_size)  # C T
        self.embed = nn.Linear(voxels, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64), qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.to_decoder = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(decoder_width))
        self.embed_background = nn.Linear(voxels, decoder_width, bias=False)
        heads = max(1, decoder_width // 64)
        self.decoder = nn.ModuleList(CrossAttentionBlock(decoder_width, heads) for _ in range(decoder_depth))
        self.head_norm = nn.LayerNorm(decoder_width)
        self.head = nn.Linear(decoder_width, 2 * voxels)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        # Tables, which are no weights: positions (N, width) and (N, decoder width), and the partitions for use after training.
        order = torch.randperm(math.prod(self.grid), generator=torch.Generator().manual_seed(0))
        tables = {"position": sincos_positions(self.grid, width)}
        tables["decoder_position"] = sincos_positions(self.grid, decoder_width)
        for ratio, sets in SETS.items():
            tables |= {f"{key}_{ratio}": value for key, value in make_partition(order, sets)._asdict().items()}
        for name, tensor in tables.items():
            self.register_buffer(name, tensor, persistent=False)

    @staticmethod
    def resolve(arguments: Mapping) -> dict:
        """The given arguments and the defaults of all others that the weights depend on, for the settings of a network."""
        bound = inspect.signature(MaskedAutoencoder).bind(0, (), (), **arguments)
        bound.apply_defaults()
        return {key: value for key, value in bound.arguments.items() if key not in ("channels", "patch_size", "token_size")}

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *patch) -> (B, N, C T)."""
        expected = (self.channels, *(g * t for g, t in zip(self.grid, self.token_size, strict=True)))
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"the image has shape {tuple(x.shape[1:])}, expected channels and patch {expected}, as in training"
            )
        return patchify(x, self.token_size)

    def encode(self, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """tokens (B, N, C T), visible (Q, n) -> (B, Q, n, width): each set by itself."""
        seen = self.embed(tokens[:, visible]) + self.position[visible]  # (B, Q, n, width)
        return self.norm(self.blocks(seen.flatten(0, 1))).unflatten(0, (-1, len(visible)))

    def background(self, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """tokens (B, N, C T), visible (S, n) -> (B, S, N, C T): means of visible tokens, continued and interpolated."""
        batch, sets, grid = tokens.shape[0], len(visible), self.grid  # len(tokens) would fix the batch of an exported network
        means = tokens.float().unflatten(2, (self.channels, -1)).mean(-1)  # (B, N, C)
        seen = torch.zeros(sets, tokens.shape[1], device=tokens.device).scatter_(1, visible, 1.0)  # (S, N)
        known = (means[:, None] * seen[..., None]).transpose(2, 3).flatten(0, 1).unflatten(2, grid)  # (B S, C, *grid)
        weight = seen.repeat(batch, 1)[:, None].unflatten(2, grid)  # (B S, 1, *grid)
        total, norm = 0, 0
        for share, sigma in ((1.0, 0.7), (1e-3, 2.0)):  # the wide one counts where no token nearby is visible
            total = total + share * gaussian_blur(known, sigma)
            norm = norm + share * gaussian_blur(weight, sigma)
        overall = known.flatten(2).sum(2) / weight.flatten(2).sum(2)  # (B S, C)
        overall = overall.reshape(*overall.shape, *[1] * len(grid))
        continued = (total + 1e-6 * overall) / (norm + 1e-6)  # (B S, C, *grid)
        filled = torch.where(weight > 0, known, continued)
        patch = [g * t for g, t in zip(grid, self.token_size, strict=True)]
        smooth = F.interpolate(filled, patch, mode="bilinear" if len(grid) == 2 else "trilinear", align_corners=False)
        return patchify(smooth, self.token_size).unflatten(0, (batch, sets))

    def decode(
        self, latent: torch.Tensor, background: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """latent (B S, n, width), background (B S, m, C T), position (S, m, decoder width) of the masked tokens
        -> mean and scale, (B S, m, C T) each, float32."""
        sets = len(position)
        known = self.embed_background(background.to(self.mask_token.dtype))
        x = known.unflatten(0, (-1, sets)) + self.mask_token + position
        x = x.flatten(0, 1)  # (B S, m, decoder width)
        context = self.to_decoder(latent)  # (B S, n, decoder width)
        for block in self.decoder:
            x = block(x, context)
        correction, scale = self.head(self.head_norm(x)).float().chunk(2, -1)  # (B S, m, C T) each
        return background + correction, self.min_scale + F.softplus(scale)

    def predict(self, latent, tokens, visible, masked) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and scale of masked tokens (S, m) from visible ones (S, n): (B, S, m, C T) each, float32.

        latent : (B, Q, n_q, width), the encoded sets that `visible` consists of, Q / S for each of its rows
        """
        sets = len(visible)
        latent = latent.unflatten(1, (sets, -1)).flatten(2, 3).flatten(0, 1)  # (B S, n, width)
        background = self.background(tokens, visible)  # (B, S, N, C T)
        index = masked[None, :, :, None].expand(tokens.shape[0], -1, -1, tokens.shape[2])
        background = background.gather(2, index).flatten(0, 1)  # (B S, m, C T)
        mean, scale = self.decode(latent, background, self.decoder_position[masked])
        return mean.unflatten(0, (-1, sets)), scale.unflatten(0, (-1, sets))

    def forward(self, x: torch.Tensor) -> dict[int, Reconstruction]:
        tokens = self._tokens(x)  # (B, N, C T)
        latent = self.encode(tokens, self.visible_75)  # (B, 4, N / 4, width)
        return {ratio: self._reconstruct(latent, tokens, ratio) for ratio in SETS}

    def _reconstruct(self, latent: torch.Tensor, tokens: torch.Tensor, ratio: int) -> Reconstruction:
        visible, masked, inverse = (getattr(self, f"{key}_{ratio}") for key in Partition._fields)
        mean, scale = self.predict(latent, tokens, visible, masked)  # (B, S, m, C T)
        residual = (tokens[:, masked].float() - mean) / scale  # (B, S, m, C T)
        # each token, averaged over the S - 1 times it was masked
        mean, residual = (value.flatten(1, 2)[:, inverse].mean(2) for value in (mean, residual))  # (B, N, C T)
        return Reconstruction(*(unpatchify(value, self.token_size, self.grid) for value in (mean, residual)))

    def loss(self, x: torch.Tensor, left_out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss for one random mask of each ratio: negative log likelihood, mean |x - mu|, share of masked tokens that count.

        Each is () and the mean over the ratios.

        x : (B, C, *patch)
        left_out : (B, 1, *patch) bool or None
            A token with such a voxel does not count (lesions: the autoencoder is to learn healthy tissue).
        """
        tokens = self._tokens(x)  # (B, N, C T)
        weight = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)  # (B, N)
        if left_out is not None:
            weight = (~patchify(left_out, self.token_size).any(2)).float()
        order = torch.randperm(tokens.shape[1], device=x.device)
        quarters = make_partition(order, QUARTERS).visible[: QUARTERS // 2]  # (2, N / 4), visible at 50 %
        latent = self.encode(tokens, quarters)  # (B, 2, N / 4, width)
        losses, errors, shares = [], [], []
        for sets in SETS.values():
            visible, masked, _ = make_partition(order, sets)
            visible, masked = visible[:1], masked[:1]  # (1, n), (1, m)
            seen = latent[:, : QUARTERS // sets]  # (B, 2 or 1, N / 4, width)
            mean, scale = self.predict(seen, tokens, visible, masked)  # (B, 1, m, C T)
            error = (tokens[:, masked].float() - mean).abs()  # (B, 1, m, C T)
            kept = weight[:, masked]  # (B, 1, m)
            norm = kept.sum().clamp_min(1)
            losses.append(((error / scale + scale.log()).mean(-1) * kept).sum() / norm)
            errors.append((error.mean(-1) * kept).sum() / norm)
            shares.append(kept.mean())
        return torch.stack(losses).mean(), torch.stack(errors).mean().detach(), torch.stack(shares).mean()
