"""The stage that trains GLUA's translation on source and target images; no label of the target is ever asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from nnunet_l2g.architectures.glua.translation.alignment import shift_of
from nnunet_l2g.architectures.glua.translation.content_view import ContentView
from nnunet_l2g.architectures.glua.translation.losses import (
    WEIGHTS,
    aims_of_head,
    discriminator_loss,
    generate,
    generator_losses,
)
from nnunet_l2g.architectures.glua.translation.picture import draw_translation
from nnunet_l2g.architectures.glua.translation.slices import random_choice, to_slices
from nnunet_l2g.architectures.glua.translation.translator import Translator
from nnunet_l2g.training.distributed import average_gradients, from_rank_0, world_size
from nnunet_l2g.training.figure import warn_if_not_written
from nnunet_l2g.training.precision import bfloat16_where_possible
from nnunet_l2g.training.stages import Stage

DITHER = 0.01  # deviation of the noise added to slices in training, in units of the normalised image
MOVED = 1.0  # pixels: shapes that move so far are worth a warning


class TranslationStage(Stage):
    """Adam on generators and discriminators in turn, an average of the generators for use, and the target's styles at the end.

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
    draw : folder or None
        For translation.png, every `draw_every` epochs and after the last.
    slices, crop : int
        Slices of each domain in a step, at most; and the longest side of their crop.
    lr : float or None
        Constant, then linear to zero over the last `decay_share` of all steps; None for `learning_rate(steps)`.
    ema : float
        Decay of the average, approached as (1 + step) / (10 + step), so that a short training is not the average of its start.
    weights : mapping or None
        Of terms in losses.WEIGHTS that shall differ from it.
    remap, cycle_gradient : bool
        What content is encoded of in training, see ContentView (its `gradient`).
    ignore_label : int or None
        Of the source; the segmentation head alone asks.
    seed : int
        Which slices a step sees depends on it, on the step and on the process alone.

    Raises
    ------
    ValueError
        If a weight's name is unknown, or a batch has no `unlabelled` images.
    """

    FORM = 2  # counts up when an older stage's checkpoint is no longer this one's; 2: polarity
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
        draw: str | Path | None = None,
        draw_every: int = 5,
        slices: int = 16,
        crop: int = 256,
        lr: float | None = None,
        decay_share: float = 0.4,
        ema: float = 0.999,
        weights: Mapping[str, float] | None = None,
        remap: bool = True,
        cycle_gradient: bool = False,
        ignore_label: int | None = None,
        seed: int = 0,
    ):
        weights = dict(weights or {})
        if unknown := weights.keys() - WEIGHTS.keys():
            raise ValueError(f"weights has {', '.join(sorted(unknown))}, expected some of {', '.join(WEIGHTS)}")
        weights = WEIGHTS | weights
        lr = learning_rate(epochs * iterations) if lr is None else lr
        hyperparameters = dict(slices=slices, crop=crop, lr=lr, decay_share=decay_share, ema=ema, seed=seed)
        hyperparameters |= dict(remap=remap, cycle_gradient=cycle_gradient, translation_form=self.FORM)
        described = {f"weight_{key}": value for key, value in weights.items()}
        described |= {f"translator_{key}": value for key, value in translator.config.items()}
        super().__init__(epochs, iterations, validation_iterations, {**settings, **hyperparameters, **described})
        self.module, self.device, self.weights, self.ignore_label = translator, device, weights, ignore_label
        self.remap, self.cycle_gradient = remap, cycle_gradient
        self.draw, self.draw_every = draw, draw_every
        self.slices, self.crop, self.lr, self.decay_share, self.ema, self.seed = slices, crop, lr, decay_share, ema, seed
        self.step, self.codes, self.pictured = 0, [], None

    def begin(self) -> None:
        for tensor in self.module.state_dict().values():
            tensor.copy_(from_rank_0(tensor))
        self.module.thaw()
        adam = dict(lr=self.lr, betas=(0.5, 0.999))
        self.generator_optimizer = torch.optim.Adam(self.module.generator_parameters(), **adam)
        self.discriminator_optimizer = torch.optim.Adam(self.module.discriminator_parameters(), **adam)
        self.step, self.codes, self.pictured = 0, [], None

    def train_step(self, batch: dict) -> dict[str, float]:
        translator, optimizers = self.module, (self.generator_optimizer, self.discriminator_optimizer)
        rate = self.lr * linear_decay(self.step, self.epochs * self.iterations, self.decay_share)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        source, target, aims, view = self._images(batch, self.step)
        with bfloat16_where_possible(self.device):
            images = generate(translator, source, target, view)
            discriminator = discriminator_loss(translator, images)
        self._update(self.discriminator_optimizer, discriminator)
        for parameter in translator.discriminator_parameters():
            parameter.requires_grad_(False)
        with bfloat16_where_possible(self.device):
            losses = generator_losses(translator, images, *aims, view=view)
        total = self._total(losses)
        self._update(self.generator_optimizer, total)
        for parameter in translator.discriminator_parameters():
            parameter.requires_grad_(True)
        self.step += 1
        translator.update_average(min(self.ema, (1 + self.step) / (10 + self.step)))
        self._remember_styles(target)
        return self._numbers(images, losses, total, discriminator)

    def _update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(p for group in optimizer.param_groups for p in group["params"])
        optimizer.step()

    def validation_step(self, batch: dict) -> dict[str, float]:
        source, target, aims, _ = self._images(batch, 0)  # the same slices each time
        if self.pictured is None:
            self.pictured = (batch["data"], batch["unlabelled"])
        with bfloat16_where_possible(self.device):
            images = generate(self.module, source, target)  # images as they are encoded in use
            discriminator = discriminator_loss(self.module, images)
            losses = generator_losses(self.module, images, *aims)
        return self._numbers(images, losses, self._total(losses), discriminator)

    def _total(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return sum(self.weights[key] * value for key, value in losses.items())

    def _images(self, batch: dict, step: int) -> tuple[torch.Tensor, torch.Tensor, tuple, ContentView]:
        """Slices of source, turned, and target (N, C, h, w), the aims of the head in the former, what content is encoded of."""
        if batch.get("unlabelled") is None:
            raise ValueError("the batch has no images of the target, expected them as batch['unlabelled']")
        source, target = (batch[key].to(self.device, non_blocking=True) for key in ("data", "unlabelled"))
        labels = None
        if self.module.head is not None:
            labels = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
            labels = labels.to(self.device, non_blocking=True)
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        generator = torch.Generator().manual_seed((self.seed * 2**20 + step) * world_size() + rank)
        number = min(self.slices, *(len(x) * (x.shape[2] if x.dim() == 5 else 1) for x in (source, target)))
        size = tuple(min(self.crop, s, t) for s, t in zip(source.shape[-2:], target.shape[-2:], strict=True))
        source, labels = random_choice(source, number, size, generator, labels)
        target, _ = random_choice(target, number, size, generator)
        source = self.module.turn(source)
        # unseen, but in a slice that is flat nothing else keeps the gradient of twenty instance norms finite
        noise = torch.Generator(self.device).manual_seed(generator.initial_seed())
        source, target = (
            x + DITHER * torch.randn(x.shape, generator=noise, device=x.device, dtype=x.dtype) for x in (source, target)
        )
        return (
            source,
            target,
            () if labels is None else aims_of_head(labels, self.module.config["segmentation"], self.ignore_label),
            ContentView(self.remap, self.cycle_gradient, noise),
        )

    @torch.no_grad()
    def _remember_styles(self, target: torch.Tensor) -> None:
        """Style codes of the epoch's target images, as the average sees them: target_styles are their clusters."""
        if self.step % self.iterations == 1 % self.iterations:
            self.codes = []
        with bfloat16_where_possible(self.device):
            self.codes.append(self.module.average.styles["target"](target).float())

    @staticmethod
    def _numbers(images, losses: Mapping[str, torch.Tensor], total, discriminator) -> dict[str, float]:
        together = [x.detach().float().transpose(0, 1)[None] for x in (images.s, images.st)]  # one sample of N slices
        numbers = {key: losses[key] for key in ("cycle", "adversarial", "structure")}
        numbers |= {"generator": total, "discriminator": discriminator, "shift": shift_of(*together).norm()}
        return dict(zip(numbers, torch.stack([n.detach().float() for n in numbers.values()]).tolist(), strict=True))

    def end_epoch(self, epoch: int, values: Mapping[str, float], log: Callable[[str], None]) -> None:
        last = epoch + 1 == self.epochs
        self.module.place_styles(torch.cat(self.codes))  # before the checkpoint is written: end() comes after it
        if self.draw is not None and self.pictured is not None and (last or (epoch + 1) % self.draw_every == 0):
            source, target = (to_slices(x.to(self.device)) for x in self.pictured)
            caption = f"epoch {epoch + 1} of {self.epochs}, mean shift {values['validation_shift']:.2f} pixels"
            with warn_if_not_written(log):
                draw_translation(self.module, source, target, caption, f"{self.draw}/translation.png")
        if last and values["validation_shift"] > MOVED:
            log(
                f"WARNING: the translation moves edges by {values['validation_shift']:.1f} pixels on validation images: labels "
                "no longer fit translated images. Look at translation.png; a larger weight of the structure term holds shapes."
            )

    def end(self) -> None:
        self.module.target_styles.copy_(from_rank_0(self.module.target_styles))  # the other processes have not placed them
        self.module.thaw(False)
        self.module.eval()
        for parameter in self.module.parameters():
            parameter.grad = None
        self.generator_optimizer = self.discriminator_optimizer = self.pictured = None  # frees their memory
        self.codes = []

    def state_dict(self) -> dict:
        optimizers = {"generator": self.generator_optimizer, "discriminator": self.discriminator_optimizer}
        return {"step": self.step} | {key: optimizer.state_dict() for key, optimizer in optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.generator_optimizer.load_state_dict(state["generator"])
        self.discriminator_optimizer.load_state_dict(state["discriminator"])


def learning_rate(steps: int) -> float:
    """2e-4 from 8000 steps on; a shorter training takes larger steps, up to 1e-3."""
    return min(1e-3, 2e-4 * max(1.0, 8000 / steps))


def linear_decay(step: int, steps: int, share: float) -> float:
    """Factor of the learning rate: 1, then linear towards 0 over the last `share` of all steps."""
    return min(1.0, (steps - step) / max(1.0, share * steps))
