"""All networks of the translation, the averaged weights that are used, and the styles of the target."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nnunet_l2g.architectures.glua.contrast_inversion import invert_contrast
from nnunet_l2g.architectures.glua.translation.networks import DOMAINS, Discriminator, Generator, SegmentationHead
from nnunet_l2g.architectures.glua.translation.slices import from_slices, pad, to_slices
from nnunet_l2g.training.kmeans import kmeans_centres
from nnunet_l2g.training.precision import bfloat16_where_possible

CHUNK = 64  # slices translated at a time: memory stays bounded for large patches


def halvings_of(patch_size: Sequence[int]) -> int:
    """How often the sides of a patch's slices are halved: once for small ones, where a wall is only a few pixels wide."""
    return 2 if min(patch_size[-2:]) >= 96 else 1


class Translator(nn.Module):
    r"""Translates images of the source into the styles of the target, learnt without pairs. Frozen outside its training.

    An image is content (what is where) and style (8 numbers: how it looks). With one content encoder E and one decoder G for
    both domains, and a style encoder for each,

    .. math::
        x_{s \to t} = G(E(\pm x_s), z), \quad z \text{ one of the target's styles}

    Parameters
    ----------
    channels : int
        C, the same in both domains.
    dims : int
        2 or 3, of the patches. 3D patches are translated slice by slice along their first axis.
    width : int
        Channels after the first convolution; content has 2^halvings times as many.
    style_dim : int
    num_styles : int
        Of the target, one for each cluster of its style codes.
    halvings : int
        Of an image's sides on the way to its content, at most 2; see `halvings_of`.
    segmentation : int
        Outputs of a segmentation head on content codes: one for each label but the background, or for each region. 0: no head.

    Attributes
    ----------
    generator, average : Generator
        What is trained, and its exponential moving average, which is used.
    target_styles : (num_styles, style_dim) buffer
        Zeros until the pretraining stage has set them.
    inverted : (C,) bool buffer
        Channels of the source that are inverted (-x) before they are encoded, see contrast_inversion. Callers pass the source
        as it is.
    """

    def __init__(
        self,
        channels: int,
        dims: int,
        width: int = 32,
        style_dim: int = 8,
        num_styles: int = 6,
        segmentation: int = 0,
        halvings: int = 2,
    ):
        super().__init__()
        self.config = dict(
            channels=channels, dims=dims, width=width, style_dim=style_dim, num_styles=num_styles, segmentation=segmentation,
            halvings=halvings,
        )  # fmt: skip
        self.dims = dims
        self.generator = Generator(channels, width, style_dim, halvings)
        self.average = copy.deepcopy(self.generator)
        self.image_discriminators = nn.ModuleDict({domain: Discriminator(channels, 2 * width, 3, 4) for domain in DOMAINS})
        self.content_discriminator = Discriminator(width * 2**halvings, 2 * width, 1, 3)
        self.head = SegmentationHead(width, segmentation, halvings) if segmentation else None
        self.register_buffer("target_styles", torch.zeros(num_styles, style_dim))
        self.register_buffer("inverted", torch.zeros(channels, dtype=torch.bool))
        self.requires_grad_(False)

    def generator_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.generator.parameters()
        if self.head is not None:
            yield from self.head.parameters()

    def discriminator_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.image_discriminators.parameters()
        yield from self.content_discriminator.parameters()

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        r""":math:`\bar\theta \leftarrow decay\,\bar\theta + (1 - decay)\,\theta`."""
        torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 1 - decay)

    @torch.no_grad()
    def encode_target_styles(self, images: torch.Tensor) -> torch.Tensor:
        """Slices of the target (N, C, H, W) -> style codes (N, style_dim) by the averaged weights, float32."""
        with bfloat16_where_possible(images.device):
            return self.average.styles["target"](images).float()

    @torch.no_grad()
    def set_target_styles(self, codes: torch.Tensor) -> None:
        """target_styles become the k-means centres of style codes (n, style_dim)."""
        self.target_styles.copy_(kmeans_centres(codes.float(), len(self.target_styles)))

    def draw_styles(self, n: int) -> torch.Tensor:
        """n of the target's styles at random, (n, style_dim)."""
        return self.target_styles[torch.randint(len(self.target_styles), (n,)).to(self.target_styles.device)]

    @torch.no_grad()
    def translate(self, x: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
        """Source images in the target's styles, by the averaged weights.

        Parameters
        ----------
        x : (B, C, *patch)
            Any size; padded for the networks and cropped again.
        styles : (B, style_dim)
            One for each sample, the same for all its slices.

        Returns
        -------
        (B, C, *patch) in x's type, at the same places.
        """
        slices = pad(to_slices(invert_contrast(x, self.inverted, channel_axis=1)))  # (N, C, H, W)
        styles = styles.to(x.device).repeat_interleave(len(slices) // max(1, len(x)), 0)  # (N, style_dim)
        with bfloat16_where_possible(x.device):
            translated = [
                self.average.decoder(self.average.content(chunk), style).to(x.dtype)
                for chunk, style in zip(slices.split(CHUNK), styles.split(CHUNK), strict=True)
            ]
        return from_slices(torch.cat(translated)[..., : x.shape[-2], : x.shape[-1]], x.shape)
