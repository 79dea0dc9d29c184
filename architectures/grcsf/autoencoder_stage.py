"""The pretraining stage of GRCSF: its masked autoencoder is trained on the training images of the fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from nnunet_l2g.architectures.grcsf.masked_autoencoder import MaskedAutoencoder
from nnunet_l2g.training.distributed import average_gradients
from nnunet_l2g.training.precision import bfloat16_where_possible
from nnunet_l2g.training.stages import Stage

MEMORISES = 1.1  # validation error / training error, above which a warning is logged


class AutoencoderStage(Stage):
    """Trains on the autoencoder's likelihood by AdamW with warm-up and cosine decay, under the augmentation of the segmenter.

    Parameters
    ----------
    autoencoder : MaskedAutoencoder
        It is frozen before and after.
    device : torch.device
    epochs, iterations, validation_iterations, settings
        See Stage.
    left_out : callable or None
        Targets (B, 1 or regions, *patch) -> (B, 1, *patch) bool. A token with such a voxel does not count in the loss: labels
        are lesions, and the autoencoder is to learn healthy tissue.
    draw : callable or None
        Called after each epoch, for a picture.
    """

    name = "autoencoder"
    nothing_to_learn = (
        "every token has a labelled voxel. If labels cover whole organs and not lesions, train a subclass of the trainer with "
        "leave_out_labelled = False."
    )
    keys = ("loss", "error")  # negative log likelihood, mean |x - mean| in units of the normalised image
    lr, weight_decay = 5e-4, 0.05

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        device: torch.device,
        epochs: int,
        iterations: int,
        validation_iterations: int,
        settings: Mapping,
        left_out: Callable[[torch.Tensor], torch.Tensor] | None = None,
        draw: Callable[[], None] | None = None,
    ):
        hyperparameters = {"leave_out_labelled": left_out is not None, "lr": self.lr, "weight_decay": self.weight_decay}
        super().__init__(epochs, iterations, validation_iterations, {**settings, **hyperparameters})
        self.module, self.device, self.left_out, self.draw = autoencoder, device, left_out, draw

    def begin(self) -> None:
        self.module.requires_grad_(True)
        matrices = [p for p in self.module.parameters() if p.dim() > 1]
        vectors = [p for p in self.module.parameters() if p.dim() <= 1]  # norms, biases, mask token: no decay
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, self.lr, betas=(0.9, 0.95))
        steps = self.epochs * self.iterations
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warm_cosine(step, steps))

    def train_step(self, batch: dict) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        loss, error, share = self._loss(batch)
        loss.backward()
        average_gradients(self.module.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        norm, loss, error, share = _read(norm, loss, error, share)
        if not math.isfinite(norm):  # the same in all processes. run_stage stops, and the weights stay finite
            return {"loss": float("nan"), "error": error}
        self.optimizer.step()
        self.scheduler.step()
        return self._numbers(loss, error, share)

    def validation_step(self, batch: dict) -> dict[str, float]:
        return self._numbers(*_read(*self._loss(batch)))

    def _numbers(self, loss: float, error: float, share: float) -> dict[str, float]:
        return {"loss": loss, "error": error} if share > 0 else {}

    def _loss(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = batch["data"].to(self.device, non_blocking=True)  # (B, C, *patch)
        labelled = None
        if self.left_out is not None:
            target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]  # (B, 1 or regions, *patch)
            labelled = self.left_out(target.to(self.device, non_blocking=True))  # (B, 1, *patch)
        with bfloat16_where_possible(self.device):
            return self.module.loss(x, labelled)

    def end_epoch(self, epoch: int, values: Mapping[str, float], log: Callable[[str], None]) -> None:
        if self.draw is not None:
            self.draw()
        ratio = values["validation_error"] / max(values["train_error"], 1e-8)
        if epoch + 1 == self.epochs and ratio > MEMORISES:
            log(
                f"WARNING: the autoencoder's error is {ratio:.2f} times larger on validation than on training images. It has "
                "begun to memorise these, and its residual maps will be larger on new images. Train it for fewer epochs."
            )

    def end(self) -> None:
        self.module.requires_grad_(False).eval()
        for parameter in self.module.parameters():
            parameter.grad = None
        self.optimizer = self.scheduler = None  # frees their memory for the segmenter

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": {"last_epoch": self.scheduler.last_epoch}}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]


def _read(*values: torch.Tensor) -> list[float]:
    """Numbers of tensors (). The CPU waits for the device only once."""
    return torch.stack([value.detach().float() for value in values]).tolist()


def warm_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: it rises linearly over the first 5 % of the steps, then falls as a half cosine to 1 %."""
    warm = max(1, round(0.05 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))
