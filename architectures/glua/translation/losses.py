"""What generators and discriminators of the translation minimise."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from nnunet_l2g.architectures.glua.translation.networks import least_squares, score_groups
from nnunet_l2g.architectures.glua.translation.slices import random_intensity_maps
from nnunet_l2g.architectures.glua.translation.structure_loss import structure_loss
from nnunet_l2g.architectures.glua.translation.translator import Translator

WEIGHTS = {
    "reconstruction": 10.0, "cycle": 10.0, "content": 1.0, "style": 1.0, "style_prior": 0.1, "adversarial": 1.0,
    "content_adversarial": 1.0, "structure": 1.0, "segmentation": 1.0,
}  # fmt: skip


class Images(NamedTuple):
    """One pass of the generators: images (N, C, H, W), content codes (N, m width, H/m, W/m), styles (N, style_dim).

    `st` is source content in a target style, `ts` the opposite; `ss` and `tt` are reconstructions.
    """

    s: torch.Tensor
    t: torch.Tensor
    content_s: torch.Tensor
    content_t: torch.Tensor
    style_s: torch.Tensor
    style_t: torch.Tensor
    ss: torch.Tensor
    tt: torch.Tensor
    st: torch.Tensor
    ts: torch.Tensor


def encode_content(translator: Translator, images: torch.Tensor, maps: torch.Generator | None) -> torch.Tensor:
    """Content of images (N, C, H, W), without a gradient to the images.

    In training they are encoded along random intensity maps: a content code that knows how bright things are in their own
    domain need not learn how they look in the other one. With a gradient, the cycle loss would reward translations that keep
    the intensities of the image they were made of.

    maps : random numbers of the maps; None: images are encoded as they are, as in use
    """
    images = images.detach()
    return translator.generator.content(images if maps is None else random_intensity_maps(images, maps))


def generate(translator: Translator, s: torch.Tensor, t: torch.Tensor, maps: torch.Generator | None = None) -> Images:
    """Both domains in both styles: the i-th source image takes the style of the i-th target image and vice versa."""
    generator = translator.generator
    content_s, content_t = encode_content(translator, torch.cat([s, t]), maps).chunk(2)
    style_s, style_t = generator.styles["source"](s), generator.styles["target"](t)
    contents = torch.cat([content_s, content_t, content_s, content_t])
    styles = torch.cat([style_s, style_t, style_t, style_s])
    ss, tt, st, ts = generator.decoder(contents, styles).chunk(4)
    return Images(s, t, content_s, content_t, style_s, style_t, ss, tt, st, ts)


def discriminator_loss(translator: Translator, images: Images) -> torch.Tensor:
    r"""Least squares: 1 for real and 0 for generated images; for content, 1 for source and 0 for target.

    Reconstructed target images are half of the generated ones. They show target anatomy, so that anatomy alone does not tell
    translations from real images.
    """
    images = Images(*(image.detach() for image in images))
    target, source = translator.image_discriminators["target"], translator.image_discriminators["source"]
    real_t, of_st, of_tt = score_groups(target, images.t, images.st, images.tt)
    real_s, of_ts = score_groups(source, images.s, images.ts)
    content_s, content_t = score_groups(translator.content_discriminator, images.content_s, images.content_t)
    loss = least_squares(real_t, 1.0) + least_squares(real_s, 1.0)
    loss = loss + 0.5 * least_squares(of_st, 0.0) + 0.5 * least_squares(of_tt, 0.0) + least_squares(of_ts, 0.0)
    return loss + least_squares(content_s, 1.0) + least_squares(content_t, 0.0)


def generator_losses(
    translator: Translator,
    images: Images,
    maps: torch.Generator | None = None,
    labels: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    r"""The terms, unweighted, in float32; both directions of each added. E is `encode_content`, sg a stopped gradient.

    =====================  ==============================================================================================
    reconstruction         :math:`|G(E(x), S(x)) - x|_1`
    cycle                  :math:`|G(E(x_{s \to t}), S_s(x_s)) - x_s|_1`
    content, style         :math:`|E(x_{s \to t}) - sg\,E(x_s)|_1`, :math:`|S_t(x_{s \to t}) - sg\,z|_1`; without sg, codes
                           could shrink to reduce them
    style_prior            :math:`|z|^2 / \dim z`; nothing else bounds the codes, and the style term grows with them
    adversarial            :math:`\sum (D(x_{s \to t}) - 1)^2`, half of it for reconstructed target images
    content_adversarial    :math:`(D_c(E(x)) - 1/2)^2`
    structure              see structure_loss; the cycle does not see a shift that the way back undoes
    segmentation           see segmentation_loss; of source content and of the translation's
    =====================  ==============================================================================================

    labels, known : (N, L, H, W), (N, 1, H, W), see head_targets; needed if the translator has a segmentation head
    """
    generator = translator.generator
    content_st, content_ts = encode_content(translator, torch.cat([images.st, images.ts]), maps).chunk(2)
    contents, styles = torch.cat([content_st, content_ts]), torch.cat([images.style_s, images.style_t])
    cycle_s, cycle_t = generator.decoder(contents, styles).chunk(2)
    of_st, of_tt = score_groups(translator.image_discriminators["target"], images.st, images.tt)
    (of_ts,) = score_groups(translator.image_discriminators["source"], images.ts)
    scores_s, scores_t = score_groups(translator.content_discriminator, images.content_s, images.content_t)
    losses = {
        "reconstruction": _l1(images.ss, images.s) + _l1(images.tt, images.t),
        "cycle": _l1(cycle_s, images.s) + _l1(cycle_t, images.t),
        "content": _l1(content_st, images.content_s.detach()) + _l1(content_ts, images.content_t.detach()),
        "style": _l1(generator.styles["target"](images.st), images.style_t.detach())
        + _l1(generator.styles["source"](images.ts), images.style_s.detach()),
        "style_prior": images.style_s.float().square().mean() + images.style_t.float().square().mean(),
        "adversarial": 0.5 * least_squares(of_st, 1.0) + 0.5 * least_squares(of_tt, 1.0) + least_squares(of_ts, 1.0),
        "content_adversarial": least_squares(scores_s, 0.5) + least_squares(scores_t, 0.5),
        "structure": structure_loss(images.s, images.st) + structure_loss(images.t, images.ts),
    }
    if translator.head is not None:
        logits = translator.head(torch.cat([images.content_s, content_st])).float()
        losses["segmentation"] = segmentation_loss(logits, labels.repeat(2, 1, 1, 1), known.repeat(2, 1, 1, 1))
    return losses


def _l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() - b.float()).abs().mean()


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy plus soft Dice per output, over known voxels. logits, labels (N, L, H, W); known (N, 1, H, W)."""
    entropy = (F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * known).sum()
    entropy = entropy / (known.sum() * logits.shape[1]).clamp_min(1)
    probability = logits.sigmoid() * known
    common, total = (probability * labels).sum((0, 2, 3)), (probability + labels * known).sum((0, 2, 3))  # (L,)
    return entropy + 1 - ((2 * common + 1) / (total + 1)).mean()


def head_targets(target: torch.Tensor, outputs: int, ignore_label: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """nnU-Net's target -> targets of a head with `outputs` outputs, and the voxels where they are known.

    target : (N, 1, H, W) label values, (N, outputs, H, W) regions, or regions and one more channel, 1 where ignored

    Returns (N, outputs, H, W) and (N, 1, H, W), 0 or 1 in float32.
    """
    known = torch.ones_like(target[:, :1], dtype=torch.float32)
    if target.shape[1] == outputs + 1:
        return target[:, :outputs].float(), 1 - target[:, outputs:].float()
    if target.shape[1] > 1:
        return target.float(), known
    values = torch.arange(1, outputs + 1, device=target.device)[None, :, None, None]
    if ignore_label is not None:
        known = (target != ignore_label).float()
    return (target.round() == values).float(), known
