"""nnUNetTrainerGRCSF, its ablations, and a control with the same loss."""

from __future__ import annotations

from functools import cached_property

import torch

from nnunet_l2g.architectures import GRCSF
from nnunet_l2g.architectures.grcsf.autoencoder_stage import AutoencoderStage
from nnunet_l2g.architectures.grcsf.picture import draw_compensation, has_foreground, labelled_patch
from nnunet_l2g.architectures.plan_network import decode_settings
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers.base import PluginTrainer
from nnunet_l2g.training.figure import warn_if_not_written
from nnunet_l2g.training.focal import use_focal_loss
from nnunet_l2g.training.stages import Stage


class nnUNetTrainerGRCSF(PluginTrainer):
    """GRCSF on nnU-Net's plans: pretrains a masked autoencoder on the fold's training images, then trains the segmenter.

    Attributes
    ----------
    pretraining_share : float
        Epochs of the autoencoder for each epoch of the segmenter, at least one in all.
    leave_out_labelled : bool
        Tokens with a labelled voxel do not count in the loss of the autoencoder, which is to learn healthy tissue. Set it to
        False where labels cover whole organs.
    weight_dice : float
        Weight of the Dice loss beside the focal loss.
    picture_every : int
        Epochs between two pictures compensation.png. The last epoch always has one.
    """

    network_class = GRCSF
    figure_name = "progress_grcsf.png"
    pretraining_share = 0.5
    leave_out_labelled = True
    weight_dice = 1.0
    picture_every = 10

    def _build_loss(self):
        return use_focal_loss(super()._build_loss(), weight_dice=self.weight_dice)

    def get_tr_and_val_datasets(self):
        """nnU-Net's datasets. UserError if there is nothing to learn from, before anything is trained."""
        training, validation = super().get_tr_and_val_datasets()
        cases = list(training.identifiers)
        if len(cases) < 2 and self.raw_network.autoencoder is not None:
            raise UserError(
                f"fold {self.fold} has {len(cases)} training case, expected at least 2: the masked autoencoder would memorise "
                "it. Use a fold with more cases, or `all`."
            )
        if not any(has_foreground(training.load_case(case)[3]) for case in cases):
            raise UserError(
                f"fold {self.fold} has no labelled voxel in its {len(cases)} training cases, expected at least one. Check "
                "labelsTr and splits_final.json."
            )
        return training, validation

    def stages(self) -> list[Stage]:
        autoencoder = self.raw_network.autoencoder
        if autoencoder is None:
            return []
        network = decode_settings(self.raw_network.settings)
        kept = ("autoencoder_", "channels", "format", "token_size")
        settings = {key: value for key, value in network.items() if key.startswith(kept)}
        settings |= {
            "dataset": self.plans_manager.dataset_name,
            "plans": self.plans_manager.plans_name,
            "configuration": self.configuration_name,
            "fold": self.fold,
            "batch_size": self.configuration_manager.batch_size,  # of all processes together
        }
        stage = AutoencoderStage(
            autoencoder,
            self.device,
            epochs=max(1, round(self.pretraining_share * self.num_epochs)),
            iterations=self.num_iterations_per_epoch,
            validation_iterations=self.num_val_iterations_per_epoch,
            settings=settings,
            left_out=self._labelled if self.leave_out_labelled else None,
            draw=lambda: self.draw_picture("the autoencoder trains"),
        )
        return [stage]

    def _labelled(self, target: torch.Tensor) -> torch.Tensor:
        """Where targets (B, 1 or regions, *patch) of nnU-Net's loader are labelled, (B, 1, *patch). Ignored voxels are not."""
        ignore = self.label_manager.ignore_label
        if self.label_manager.has_regions:  # nnU-Net appends a channel of ignored voxels
            return (target[:, : -1 if ignore is not None else None] != 0).any(1, keepdim=True)
        return (target != 0) & (target != (0 if ignore is None else ignore))

    def on_epoch_end(self):
        super().on_epoch_end()  # counts the epoch
        if self.local_rank == 0 and (self.current_epoch % self.picture_every == 0 or self.current_epoch == self.num_epochs):
            self.draw_picture(f"epoch {self.current_epoch} of {self.num_epochs}")

    @cached_property
    def _pictured(self):
        return labelled_patch(self.get_tr_and_val_datasets()[1], self.configuration_manager.patch_size)

    def draw_picture(self, when: str) -> None:
        """Writes compensation.png to the output folder, of the same validation patch each time."""
        network = self.raw_network
        image = torch.from_numpy(self._pictured.image)[None].to(self.device)  # (1, C, *patch)
        explained = {key: value[0].cpu().numpy() for key, value in network.explain(image).items()}
        logits = torch.from_numpy(explained["logits"])
        prediction = self.label_manager.convert_logits_to_segmentation(logits).numpy()  # (*patch)
        labels = {v: k for k, v in self.dataset_json["labels"].items() if isinstance(v, int) and v > 0}
        if self.label_manager.has_regions:
            regions = [name for name, value in self.dataset_json["labels"].items() if name != "ignore" and value != 0]
            labels = dict(zip(self.dataset_json["regions_class_order"], regions, strict=True))
        kind = "training" if self.fold == "all" else "validation"
        caption = f"{self.plans_manager.dataset_name}, {kind} case {self._pictured.case}, {when}"
        filename = f"{self.output_folder}/compensation.png"
        with warn_if_not_written(self.print_to_log_file):
            draw_compensation(self._pictured.image, self._pictured.reference, prediction, explained, labels, caption, filename)


class nnUNetTrainerGRCSFFocal(nnUNetTrainerGRCSF):
    """Only the focal loss, as for coronary calcium in the paper."""

    weight_dice = 0.0


class nnUNetTrainerGRCSFNoGCU(nnUNetTrainerGRCSF):
    """Ablation: no Global Compensation Units."""

    network_settings = {"gcu": False}


class nnUNetTrainerGRCSFNoRCU(nnUNetTrainerGRCSF):
    """Ablation: no Region Compensation Units, and so no autoencoder."""

    network_settings = {"residual": None}


class nnUNetTrainerGRCSFOtherResidual(nnUNetTrainerGRCSF):
    """Ablation: the Region Compensation Units read the residual maps of another image. Is it the map, or the parameters?"""

    network_settings = {"residual": "other"}


class nnUNetTrainerGRCSFDoGResidual(nnUNetTrainerGRCSF):
    """Ablation: a difference of Gaussians replaces the residual maps."""

    network_settings = {"residual": "dog"}


class nnUNetTrainerDiceFocal(nnUNetTrainerGRCSF):
    """Control: plain nnU-Net with the loss of GRCSF."""

    network_settings = {"gcu": False, "residual": None}
