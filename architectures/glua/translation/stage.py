"""The pretraining stage of GLUA's translation, on source and target images; it never reads a label of the target."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from nnunet_l2g.architectures.glua.contrast_inversion import invert_contrast
from nnunet_l2g.architectures.glua.translation.losses import (
    WEIGHTS,
    discriminator_loss,
    generate,
    generator_losses,
    head_targets,
)
from nnunet_l2g.architectures.glua.translation.slices import random_slices, to_slices
from nnunet_l2g.architectures.glua.translation.structure_loss import measure_shift
from nnunet_l2g.architectures.glua.translation.translator import Translator
from nnunet_l2g.training.distributed import average_gradients, from_rank_0, world_size
from nnunet_l2g.training.figure import warn_if_not_written
from nnunet_l2g.training.precision import bfloat16_where_possible
from nnunet_l2g.training.stages import Stage

NOISE = 0.01  # deviation of the noise added to slices in training, in units of the normalised image
DECAY_SHARE = 0.4  # of the steps, at the end, in which the learning rate falls to zero
AVERAGE_DECAY = 0.999  # approached as (1 + step) / (10 + step): a short training is not the average of its start
DRAW_EVERY = 5  # epochs
LARGE_SHIFT = 1.0  # pixels; a translation that moves shapes so far gets a warning


class TranslationStage(Stage):
    """Trains generators and discriminators by Adam in turn, averages the generators, and sets the target's styles.

    A batch holds `data` (B, C, *patch) of the source, `unlabelled` (B, C, *patch) of the target and, for a translator with a
    segmentation head, `target`, the source's labels as nnU-Net gives them. Both domains have to be sampled uniformly: with
    foreground oversampled in the source alone, the discriminators would learn how often anatomy is seen.

    Parameters
    ----------
    translator : Translator
        Frozen before and after.
    device : torch.device
    epochs, iterations, validation_iterations, settings
        See Stage.
    folder : folder or None
        For translation.png, every `DRAW_EVERY` epochs and after the last.
    slices, crop : int
        Largest number of slices of each domain in a step, and largest side of their crop.
    lr : float or None
        Constant, then linear to zero; None: see `learning_rate`.
    ignore_label : int or None
        Of the source, for the segmentation head.
    """

    FORM = 3  # counts up when a checkpoint of an older version is no longer one of this stage
    name = "translation"
    keys = ("generator", "cycle", "adversarial", "discriminator", "structure", "shift")

    def __init__(
        self,
        translator: Translator,
        device: torch.device,
        epochs: int,
        iterations: int,
        validation_iterations: int,
        settings: Mapping,
        folder: str | Path | None = None,
        slices: int = 16,
        crop: int = 256,
        lr: float | None = None,
        ignore_label: int | None = None,
    ):
        lr = learning_rate(epochs * iterations) if lr is None else lr
        own = dict(slices=slices, crop=crop, lr=lr, translation_form=self.FORM)
        own |= {f"translator_{key}": value for key, value in translator.config.items()}
        super().__init__(epochs, iterations, validation_iterations, {**settings, **own})
        self.module, self.device, self.folder, self.ignore_label = translator, device, folder, ignore_label
        self.slices, self.crop, self.lr = slices, crop, lr
        self.step, self.style_codes, self.pictured = 0, [], None

    def begin(self) -> None:
        for tensor in self.module.state_dict().values():
            tensor.copy_(from_rank_0(tensor))
        self.module.requires_grad_(True)
        self.module.average.requires_grad_(False)
        adam = dict(lr=self.lr, betas=(0.5, 0.999))
        self.generator_optimizer = torch.optim.Adam(self.module.generator_parameters(), **adam)
        self.discriminator_optimizer = torch.optim.Adam(self.module.discriminator_parameters(), **adam)
        self.step, self.style_codes, self.pictured = 0, [], None

    def train_step(self, batch: dict) -> dict[str, float]:
        translator = self.module
        rate = self.lr * linear_decay(self.step, self.epochs * self.iterations, DECAY_SHARE)
        for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = rate
        source, target, labels, maps = self._choose_slices(batch, self.step)
        with bfloat16_where_possible(self.device):
            images = generate(translator, source, target, maps)
            discriminator = discriminator_loss(translator, images)
        self._update(self.discriminator_optimizer, discriminator)
        for parameter in translator.discriminator_parameters():
            parameter.requires_grad_(False)
        with bfloat16_where_possible(self.device):
            losses = generator_losses(translator, images, maps, *labels)
        total = sum(WEIGHTS[key] * value for key, value in losses.items())
        self._update(self.generator_optimizer, total)
        for parameter in translator.discriminator_parameters():
            parameter.requires_grad_(True)
        if self.step % self.iterations == 0:  # a new epoch
            self.style_codes = []
        self.step += 1
        translator.update_average(min(AVERAGE_DECAY, (1 + self.step) / (10 + self.step)))
        self.style_codes.append(translator.encode_target_styles(target))
        return _numbers(images, losses, total, discriminator)

    def _update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(p for group in optimizer.param_groups for p in group["params"])
        optimizer.step()

    def validation_step(self, batch: dict) -> dict[str, float]:
        source, target, labels, _ = self._choose_slices(batch, 0)  # the same slices each time
        if self.pictured is None:
            self.pictured = (batch["data"], batch["unlabelled"])
        with bfloat16_where_possible(self.device):
            images = generate(self.module, source, target)  # encoded as they are, as in use
            discriminator = discriminator_loss(self.module, images)
            losses = generator_losses(self.module, images, None, *labels)
        total = sum(WEIGHTS[key] * value for key, value in losses.items())
        return _numbers(images, losses, total, discriminator)

    def _choose_slices(self, batch: dict, step: int) -> tuple[torch.Tensor, torch.Tensor, tuple, torch.Generator]:
        """Slices of source (inverted where needed) and target, (N, C, h, w); targets of the head; random numbers of maps."""
        source, target = (batch[key].to(self.device, non_blocking=True) for key in ("data", "unlabelled"))
        labels = None
        if self.module.head is not None:
            labels = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
            labels = labels.to(self.device, non_blocking=True)
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        generator = torch.Generator().manual_seed(step * world_size() + rank)
        number = min(self.slices, *(len(x) * (x.shape[2] if x.dim() == 5 else 1) for x in (source, target)))
        size = tuple(min(self.crop, s, t) for s, t in zip(source.shape[-2:], target.shape[-2:], strict=True))
        source, labels = random_slices(source, number, size, generator, labels)
        target, _ = random_slices(target, number, size, generator)
        source = invert_contrast(source, self.module.inverted, channel_axis=1)
        # invisible noise: in a flat slice nothing else keeps the gradient of twenty instance norms finite
        on_device = torch.Generator(self.device).manual_seed(generator.initial_seed())
        source, target = (
            x + NOISE * torch.randn(x.shape, generator=on_device, device=x.device, dtype=x.dtype) for x in (source, target)
        )
        outputs = self.module.config["segmentation"]
        return source, target, () if labels is None else head_targets(labels, outputs, self.ignore_label), on_device

    def end_epoch(self, epoch: int, values: Mapping[str, float], log: Callable[[str], None]) -> None:
        last = epoch + 1 == self.epochs
        self.module.set_target_styles(torch.cat(self.style_codes))  # here, so that the epoch's checkpoint has them
        if self.folder is not None and self.pictured is not None and (last or (epoch + 1) % DRAW_EVERY == 0):
            source, target = (to_slices(x.to(self.device)) for x in self.pictured)
            with warn_if_not_written(log):
                draw_translation(self.module, source, target, f"{self.folder}/translation.png")
        if last and values["validation_shift"] > LARGE_SHIFT:
            log(
                f"WARNING: the translation moves edges by {values['validation_shift']:.1f} pixels on validation images: labels "
                "no longer fit translated images. Look at translation.png; nnUNetTrainerGLUANoTranslation does without it."
            )

    def end(self) -> None:
        self.module.target_styles.copy_(from_rank_0(self.module.target_styles))  # only rank 0 has set them
        self.module.requires_grad_(False)
        self.module.eval()
        for parameter in self.module.parameters():
            parameter.grad = None
        self.generator_optimizer = self.discriminator_optimizer = self.pictured = None  # frees their memory
        self.style_codes = []

    def state_dict(self) -> dict:
        optimizers = {"generator": self.generator_optimizer, "discriminator": self.discriminator_optimizer}
        return {"step": self.step} | {key: optimizer.state_dict() for key, optimizer in optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.generator_optimizer.load_state_dict(state["generator"])
        self.discriminator_optimizer.load_state_dict(state["discriminator"])


def _numbers(images, losses: Mapping[str, torch.Tensor], total, discriminator) -> dict[str, float]:
    """The stage's numbers by key; the shift is that of the translation against the source."""
    numbers = {key: losses[key] for key in ("cycle", "adversarial", "structure")}
    numbers |= {"generator": total, "discriminator": discriminator, "shift": measure_shift(images.s, images.st).norm()}
    return dict(zip(numbers, torch.stack([n.detach().float() for n in numbers.values()]).tolist(), strict=True))


def learning_rate(steps: int) -> float:
    """2e-4 from 8000 steps on; a shorter training takes larger steps, up to 1e-3."""
    return min(1e-3, 2e-4 * max(1.0, 8000 / steps))


def linear_decay(step: int, steps: int, share: float) -> float:
    """Factor of the learning rate: 1, then linear towards 0 over the last `share` of all steps."""
    return min(1.0, (steps - step) / max(1.0, share * steps))


@torch.no_grad()
def draw_translation(translator: Translator, source: torch.Tensor, target: torch.Tensor, filename: str) -> None:
    """Writes a PNG of slices (N, C, H, W), their first channel in the target's grey window.

    Two rows show a source slice and its translations in three target styles, the last row shows four slices of the target.
    """
    from matplotlib.image import imsave

    source, target = (x[x.flatten(1).std(1).argsort(descending=True)] for x in (source, target))  # most contrast first
    styles = translator.target_styles[torch.arange(3) % len(translator.target_styles)]
    rows = [target[torch.arange(4) % len(target)]]  # (4, C, H, W) each
    for image in source[:2]:
        copies = image.expand(3, -1, -1, -1)
        translated = translator.translate(copies if translator.dims == 2 else copies[:, :, None], styles)
        rows.insert(0, torch.cat([image[None], to_slices(translated)]))
    mosaic = torch.cat([torch.cat(list(row[:, 0].float()), -1) for row in rows]).cpu()  # (rows H, 4 W)
    zoom = max(1, 256 // target.shape[-1])
    mosaic = mosaic.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()
    low, high = np.percentile(target[:, 0].float().cpu().numpy(), (1, 99.5))
    imsave(f"{filename}.partial", mosaic, vmin=low, vmax=high, cmap="gray", format="png")
    os.replace(f"{filename}.partial", filename)
