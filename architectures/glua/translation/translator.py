"""All networks of the translation, their averages for use, and the styles of the target."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nnunet_l2g.architectures.glua.translation.discriminators import ContentDiscriminator, ImageDiscriminator
from nnunet_l2g.architectures.glua.translation.networks import Generator, SegmentationHead
from nnunet_l2g.architectures.glua.translation.slices import from_slices, pad, to_slices
from nnunet_l2g.architectures.glua.turn_over import turn_over
from nnunet_l2g.training.kmeans import kmeans_centres
from nnunet_l2g.training.precision import bfloat16_where_possible

CHUNK = 64  # slices translated at a time: memory stays bounded for large patches
DOMAINS = ("source", "target")


def halvings_of(patch_size: Sequence[int]) -> int:
    """How often the sides of a patch's slices are halved: a small one has no more than a few pixels for a wall to lose."""
    return 2 if min(patch_size[-2:]) >= 96 else 1


class Translator(nn.Module):
    r"""Images of one domain in the looks of another, shapes unchanged, learnt without pairs; frozen until its stage trains it.

    An image is content, where things are, and style, 8 numbers that say how they look: with one content encoder E and one
    decoder G for both domains and a style encoder for each,

    .. math::
        x_{s \to t} = G(E(\pi x_s), z), \quad z \text{ one of the target's styles}

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
        Of an image's sides on the way to its content; see `halvings_of`.
    segmentation : int
        Outputs of a light segmentation head on content codes; 0: none. One for each label but the background, or for each
        region.

    Attributes
    ----------
    generator, average : Generator
        What is trained, and its exponential moving average, which is used.
    target_styles : (num_styles, style_dim) buffer
        Zeros until the stage has placed them.
    polarity : (C,) buffer
        :math:`\pi`, 1, or -1 where a channel of the source is turned over before all else, see `adaptation.polarity`. Whoever
        calls has the source as it is, on the way in and out.

    Raises
    ------
    ValueError
        If dims is not 2 or 3, or halvings not 0, 1 or 2; if an image has other dimensions or channels, or styles do not fit it.
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
        if dims not in (2, 3):
            raise ValueError(f"dims={dims}: expected 2 or 3, the dimensions of a patch")
        if halvings not in (0, 1, 2):
            raise ValueError(f"halvings={halvings}: expected 0, 1 or 2; slices are padded to multiples of 4")
        self.channels, self.dims = channels, dims
        self.generator = Generator(channels, width, style_dim, halvings)
        self.average = copy.deepcopy(self.generator)
        self.image_discriminators = nn.ModuleDict({domain: ImageDiscriminator(channels, 2 * width) for domain in DOMAINS})
        self.content_discriminator = ContentDiscriminator(width * 2**halvings, 2 * width)
        self.head = SegmentationHead(width, segmentation, halvings) if segmentation else None
        self.register_buffer("target_styles", torch.zeros(num_styles, style_dim))
        self.register_buffer("polarity", torch.ones(channels))
        self.config = dict(
            channels=channels, dims=dims, width=width, style_dim=style_dim, num_styles=num_styles, segmentation=segmentation,
            halvings=halvings,
        )  # fmt: skip
        self.thaw(False)

    def generator_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.generator.parameters()
        if self.head is not None:
            yield from self.head.parameters()

    def discriminator_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.image_discriminators.parameters()
        yield from self.content_discriminator.parameters()

    def thaw(self, yes: bool = True) -> None:
        """All but the average, which no gradient ever moves."""
        self.requires_grad_(yes)
        self.average.requires_grad_(False)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        r""":math:`\bar\theta \leftarrow decay\,\bar\theta + (1 - decay)\,\theta`."""
        torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 1 - decay)

    @torch.no_grad()
    def place_styles(self, codes: torch.Tensor) -> None:
        """target_styles become the k-means centres of the target images' style codes (n, style_dim)."""
        self.target_styles.copy_(kmeans_centres(codes.float(), len(self.target_styles)))

    def turn(self, source: torch.Tensor) -> torch.Tensor:
        """Source images (B, C, *spatial), or what looks like them: channels times their polarity. Its own inverse."""
        return turn_over(source, self.polarity.to(source.dtype), axis=1)

    def draw_styles(self, n: int) -> torch.Tensor:
        """n of the target's styles at random, (n, style_dim)."""
        return self.target_styles[torch.randint(len(self.target_styles), (n,)).to(self.target_styles.device)]

    @torch.no_grad()
    def encode_style(self, x: torch.Tensor, domain: str) -> torch.Tensor:
        """x (B, C, *patch) of "source" or "target" -> (B, style_dim), the mean over a sample's slices."""
        self._check(x)
        x = self.turn(x) if domain == "source" else x
        encoder = self.average.styles[domain]
        with bfloat16_where_possible(x.device):
            codes = torch.cat([encoder(chunk).float() for chunk in pad(to_slices(x)).split(CHUNK)])
        return codes.view(len(x), -1, codes.shape[1]).mean(1)

    @torch.no_grad()
    def translate(self, x: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
        """Source images in the target's looks, by the averaged weights.

        Parameters
        ----------
        x : (B, C, *patch)
            Any size; padded to multiples of 4 and cropped again.
        styles : (B, style_dim)
            One for each sample, the same for all its slices.

        Returns
        -------
        (B, C, *patch) in x's type, at the same places.
        """
        self._check(x)
        return self._paint(self.turn(x), styles)

    @torch.no_grad()
    def translate_back(self, x: torch.Tensor, styles_source: torch.Tensor) -> torch.Tensor:
        """Target images in the source's looks. The same networks: the style alone says which domain comes out."""
        self._check(x)
        return self.turn(self._paint(x, styles_source))

    def _paint(self, x: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
        if styles.shape != (len(x), self.target_styles.shape[1]):
            raise ValueError(
                f"styles of shape {tuple(styles.shape)} for {len(x)} images, expected {(len(x), self.target_styles.shape[1])}"
            )
        slices = pad(to_slices(x))  # (N, C, H, W)
        styles = styles.to(x.device).repeat_interleave(len(slices) // max(1, len(x)), 0)  # (N, style_dim)
        with bfloat16_where_possible(x.device):
            translated = [
                self.average.decoder(self.average.content(chunk), style).to(x.dtype)
                for chunk, style in zip(slices.split(CHUNK), styles.split(CHUNK), strict=True)
            ]
        translated = torch.cat(translated)[..., : x.shape[-2], : x.shape[-1]]
        return from_slices(translated, x.shape)

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != self.dims + 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"the translator got images of shape {tuple(x.shape)}, expected {self.dims} spatial dimensions and "
                f"{self.channels} channels"
            )
