"""nnUNetTrainerGLUASignOnly: plain nnU-Net on the source's negative, where that is nearer to the target."""

from __future__ import annotations

import numpy as np
import torch

from nnunet_l2g.architectures.glua.turn_over import turn_over
from nnunet_l2g.architectures.glua.turned_over import turned_over
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers.adapted import AdaptedTrainer


class nnUNetTrainerGLUASignOnly(AdaptedTrainer):
    r"""GLUA's twin: :math:`x_s \mapsto \pi x_s` with the measured sign of each channel, and nothing else of it.

    Training, pseudo Dice and the validation of full images all see the source so; a prediction sees the target as it is.
    Where no channel's negative is nearer this is plain nnU-Net on the adapted plans, and the log says so.
    """

    sign_alone = True
    polarity: torch.Tensor | None = None  # (C,), 1 or -1; measured when training begins, then in every checkpoint

    def _run_stages(self) -> None:
        self.polarity = torch.tensor(self._measure_polarity(), dtype=torch.float32, device=self.device)
        if bool((self.polarity > 0).all()):
            self.print_to_log_file(
                "WARNING: no channel of the source is nearer to the target turned over, and this trainer does nothing else: "
                "what follows is plain nnU-Net on the source. nnUNetTrainerGLUA translates."
            )
        super()._run_stages()

    def train_step(self, batch: dict) -> dict:
        return super().train_step(self._turned(batch))

    def validation_step(self, batch: dict) -> dict:
        return super().validation_step(self._turned(batch))

    def _turned(self, batch: dict) -> dict:
        images = batch["data"].to(self.device, non_blocking=True)  # (B, C, *patch)
        return {**batch, "data": turn_over(images, self.polarity, axis=1)}

    def perform_actual_validation(self, save_probabilities: bool = False):
        """nnU-Net's, on source images as the network knows them. UserError if the checkpoint has lost the signs."""
        if self.polarity is None:
            raise self._no_signs()
        plain = self.dataset_class
        self.dataset_class = turned_over(plain, self.polarity.cpu().numpy().astype(np.float32))
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = plain

    def _no_signs(self) -> UserError:
        return UserError(
            f"the checkpoint in {self.output_folder} does not say which channels of the source were turned over, expected 1 or "
            f"-1 for each of {self.num_input_channels}: another trainer wrote it, or another program stripped it. It predicts "
            "the target as before; to validate on the source or continue, copy the training's own checkpoint again."
        )

    def extra_state(self) -> dict:
        return super().extra_state() | {"polarity": self.polarity}

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        polarity = state.get("polarity")
        if polarity is None or polarity.shape != (self.num_input_channels,):
            raise self._no_signs()
        self.polarity = polarity.to(self.device)
