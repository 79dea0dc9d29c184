"""nnUNetTrainerRandomIntensity: the control that any adaptation has to beat, as it needs no target."""

from __future__ import annotations

from nnunet_l2g.architectures import GLUA
from nnunet_l2g.trainers.base import PluginTrainer
from nnunet_l2g.training.random_intensity import RandomIntensity


class nnUNetTrainerRandomIntensity(PluginTrainer):
    """Control: plain nnU-Net on the source alone, with strong random looks on top of nnU-Net's augmentation; any plans.

    Attributes
    ----------
    look : RandomIntensity
        Drawn anew for each sample of a batch, on the device.
    """

    network_class = GLUA  # without unlabelled images: plain nnU-Net
    look = RandomIntensity()

    def train_step(self, batch: dict) -> dict:
        return super().train_step({**batch, "data": self.look(batch["data"].to(self.device, non_blocking=True))})
