"""nnUNetTrainerGLUASelfTraining: an option on top of GLUA, off in GLUA itself and reported separately."""

from __future__ import annotations

import torch

from nnunet_l2g.architectures.glua.network import Seen
from nnunet_l2g.architectures.glua.self_training import Teacher, pseudo_label_loss, self_training_weight
from nnunet_l2g.trainers.glua import nnUNetTrainerGLUA
from nnunet_l2g.training.random_intensity import RandomIntensity


class nnUNetTrainerGLUASelfTraining(nnUNetTrainerGLUA):
    """GLUA, and in the second half it learns its averaged self's confident labels on perturbed target images.

    Attributes
    ----------
    self_training_weight : float
        In the last epoch; 0 in the first half, then linear.
    """

    self_training_weight = 0.5

    def initialize(self):
        super().initialize()
        self.teacher = Teacher(self.raw_network, regions=self.label_manager.has_regions)
        self.perturb = RandomIntensity(1.0, convolution=False, invert=False)
        self._pseudo_labels, self._confident = None, []

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        if not self._checkpoint_loaded:  # -pretrained_weights are in only now
            self.teacher = Teacher(self.raw_network, regions=self.label_manager.has_regions)
        super().on_train_start()

    @property
    def _weight(self) -> float:
        return self_training_weight(self.progress, self.self_training_weight)

    def train_step(self, batch: dict) -> dict:
        if self._weight > 0:
            unlabelled = batch["unlabelled"].to(self.device, non_blocking=True)  # (B, C, *patch)
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                self._pseudo_labels = self.teacher.probabilities(unlabelled)
            self.raw_network.perturbed = self.perturb(unlabelled)
        try:
            return super().train_step(batch)
        finally:
            self._pseudo_labels = None

    def _objective(self, seen: Seen) -> torch.Tensor | None:
        alignment = super()._objective(seen)
        if seen.perturbed is None:
            return alignment
        regions, confidence = self.label_manager.has_regions, self.teacher.confidence
        loss, share = pseudo_label_loss(seen.perturbed, self._pseudo_labels, confidence, regions)
        self._confident.append(share)
        return self._weight * loss + (0.0 if alignment is None else alignment)

    def _after_step(self) -> None:
        super()._after_step()
        self.teacher.follow(self.raw_network)

    @property
    def diagnostic_keys(self) -> list[str]:
        return [*super().diagnostic_keys, "confident_share"]

    def diagnostics(self) -> dict[str, float]:
        share = float(torch.stack(self._confident).mean()) if self._confident else 0.0
        self._confident = []
        return super().diagnostics() | {"confident_share": share}

    def extra_state(self) -> dict:
        return super().extra_state() | {"teacher": self.teacher.state_dict()}

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        self.teacher.load_state_dict(state["teacher"])
