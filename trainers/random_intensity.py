"""nnUNetTrainerRandomIntensity: the control that any adaptation has to beat, as it needs no target."""

from __future__ import annotations

from nnunet_l2g.architectures import GLUA
from nnunet_l2g.trainers.base import PluginTrainer
from nnunet_l2g.training.random_intensity import RandomIntensity


class nnUNetTrainerRandomIntensity(PluginTrainer):
    """Control: plain nnU-Net on the source alone, with random intensities on top of nnU-Net's augmentation; any plans."""

    network_class = GLUA  # without unlabelled images: plain nnU-Net
    random_intensity = RandomIntensity()  # drawn anew for each sample of a batch, on the device

    def train_step(self, batch: dict) -> dict:
        images = batch["data"].to(self.device, non_blocking=True)
        return super().train_step({**batch, "data": self.random_intensity(images)})
