"""AdaptedTrainer: what trainers on plans of `nnunet_l2g adapt` share, self-training included."""

from __future__ import annotations

from functools import cached_property

import torch

from nnunet_l2g.architectures import GLUA
from nnunet_l2g.architectures.glua.contrast_inversion import measure_contrast_distances
from nnunet_l2g.architectures.glua.network import AuxiliaryOutputs
from nnunet_l2g.architectures.glua.self_training import Teacher, pseudo_label_loss, self_training_weight
from nnunet_l2g.architectures.glua.target_stream import WithUnlabelled, target_dataset, target_streams
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers.base import PluginTrainer
from nnunet_l2g.training.adapted_plans import AdaptedTarget, check_adapted_plans
from nnunet_l2g.training.random_intensity import RandomIntensity
from nnunet_l2g.training.stages import cases_of


class AdaptedTrainer(PluginTrainer):
    """Trains nnU-Net's plain network on a labelled source, beside an unlabelled target.

    Attributes
    ----------
    translation, alignment, inversion_only : bool
        Parts of GLUA that a subclass has. Their state is in its checkpoints, beside the network.
    self_training : bool
        Whether pseudo-labels of a teacher on perturbed target images are learnt in the second half of the training.
    self_training_weight : float
        Of their loss in the last epoch; 0 in the first half, then linear.
    """

    network_class = GLUA
    translation = alignment = inversion_only = self_training = False
    self_training_weight = 0.5

    @cached_property
    def target(self) -> AdaptedTarget:
        """UserError if the plans name no target, or what `adapt` made of it is gone. Prediction does not need it."""
        return check_adapted_plans(self.plans_manager.plans, self.configuration_name)

    @property
    def progress(self) -> float:
        """0 in the first epoch, 1 in the last."""
        return self.current_epoch / max(1, self.num_epochs - 1)

    def initialize(self):
        super().initialize()
        self.raw_network.objective = self._auxiliary_loss
        self.optimizer.register_step_post_hook(lambda *_: self._after_step())
        self.perturb = RandomIntensity(1.0, convolution=False, invert=False)
        self._make_teacher()

    def _make_teacher(self) -> None:
        self._pseudo_labels, self._confident = None, []
        if self.self_training:
            self.teacher = Teacher(self.raw_network, self.label_manager.has_regions)

    def on_train_start(self):
        _ = self.target  # before anything is computed
        if not self.was_initialized:
            self.initialize()
        if self._checkpoint_loaded and self.extra_state() and not self._extra_loaded:
            raise UserError(
                f"the checkpoint in {self.output_folder} has nothing of what {type(self).__name__} keeps beside the network "
                "(translator, discriminator, inverted channels), expected what it was trained with: another program has "
                "stripped it. Predict with it, or train anew without --c."
            )
        if not self._checkpoint_loaded:
            self._make_teacher()  # nnU-Net loads -pretrained_weights after initialize
        super().on_train_start()

    # ---- data ----

    @property
    def needs_target_images(self) -> bool:
        return self.self_training or not self.inversion_only

    def get_training_transforms(self, *args, use_mask_for_norm=None, **kwargs):
        """nnU-Net's, with the source's use_mask_for_norm: the plans hold the target's."""
        return super().get_training_transforms(*args, use_mask_for_norm=self.target.source_use_mask_for_norm, **kwargs)

    def get_dataloaders(self):
        """nnU-Net's, with patches of the target beside if they are needed."""
        loaders = super().get_dataloaders()
        if not self.needs_target_images:
            return loaders
        return tuple(map(WithUnlabelled, loaders, target_streams(self, self.target)))

    def _finish_loaders(self) -> None:
        super()._finish_loaders()
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, WithUnlabelled):
                loader.finish()

    def on_train_end(self):
        super().on_train_end()
        self._finish_loaders()

    def measure_inverted_channels(self) -> list[bool]:
        """Channels of the source to invert. Measured on cases, so all processes and a continued run find the same."""
        source, _ = self.get_tr_and_val_datasets()
        distances = measure_contrast_distances(source, target_dataset(self.target))
        for channel, found in enumerate(distances):
            self.print_to_log_file(
                f"Channel {channel} of the source is {'inverted' if found.invert else 'left as it is'}: Wasserstein distance "
                f"to the target's intensities as it is {found.as_it_is:.3g}, inverted {found.inverted:.3g}"
            )
        return [found.invert for found in distances]

    # ---- a step ----

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's, with the target's images set beside the source's."""
        if not self.needs_target_images:
            return super().train_step(batch)
        if not torch.isfinite(batch["unlabelled"]).all():  # before the alignment starts, no loss shows it
            self._on_nonfinite("the target's images hold NaN or Inf", cases_of(batch), healed=False)
        network, images = self.raw_network, batch["unlabelled"].to(self.device, non_blocking=True)  # (B, C, *patch)
        if self.alignment:
            network.unlabelled = images
        if self.self_training and self.progress > 0.5:
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                self._pseudo_labels = self.teacher.probabilities(images)
            network.perturbed = self.perturb(images)
        try:
            return super().train_step(batch)
        finally:
            network.forget()
            self._pseudo_labels = None

    def _auxiliary_loss(self, outputs: AuxiliaryOutputs) -> torch.Tensor | None:
        """What is added to the segmentation loss, () or None."""
        if outputs.perturbed_logits is None:
            return None
        loss, share = pseudo_label_loss(outputs.perturbed_logits, self._pseudo_labels, self.teacher.regions)
        self._confident.append(share)
        return self_training_weight(self.progress, self.self_training_weight) * loss

    def _after_step(self) -> None:
        if self.self_training:
            self.teacher.follow(self.raw_network)

    # ---- log and checkpoint ----

    @property
    def diagnostic_keys(self) -> list[str]:
        return ["confident_share"] if self.self_training else []

    def diagnostics(self) -> dict[str, float]:
        if not self.self_training:
            return {}
        shares, self._confident = self._confident, []
        return {"confident_share": float(torch.stack(shares).mean()) if shares else 0.0}

    def extra_state(self) -> dict:
        return {"teacher": self.teacher.state_dict()} if self.self_training else {}

    def load_extra_state(self, state: dict) -> None:
        if self.self_training:
            self.teacher.load_state_dict(state["teacher"])
