"""nnUNetTrainerGLUA and its ablations: translate the source, then segment it while the target's features are aligned."""

from __future__ import annotations

import math

import torch

from nnunet_l2g.architectures.glua.alignment import AdversarialAlignment, DomainDiscriminator, alignment_weight
from nnunet_l2g.architectures.glua.contrast_inversion import invert_contrast, inverted_dataset_class
from nnunet_l2g.architectures.glua.domain_gap import DomainGap
from nnunet_l2g.architectures.glua.network import AuxiliaryOutputs
from nnunet_l2g.architectures.glua.translation.stage import TranslationStage
from nnunet_l2g.architectures.glua.translation.translator import Translator, halvings_of
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers.adapted import AdaptedTrainer
from nnunet_l2g.training.stages import Stage

USED = ("average.", "target_styles", "inverted")  # of the translator in use; the stage's own checkpoint has the rest


class nnUNetTrainerGLUA(AdaptedTrainer):
    """GLUA on adapted plans (`nnunet_l2g adapt`): first a translation of source into target images, then the segmenter.

    The network is plain nnU-Net's. Translator and discriminator belong to the trainer. They are in its checkpoints so that
    `--c` continues, and a prediction does not need them.

    Attributes
    ----------
    translation_share, translation_steps : float, int
        Epochs of the translation for each epoch of the segmenter, with as many iterations: at least one epoch, and at most
        this number of steps.
    translation_settings, stage_settings : dict
        Further arguments of Translator and TranslationStage.
    translated_share : float
        Chance of a source sample to be translated; the others stay as they are.
    alignment_start, alignment_weights : float, (float, float)
        Share of the epochs before the alignment begins, and its weight then and at the end.
    """

    figure_name = "progress_glua.png"
    translation, alignment, mask = True, True, True
    translation_share, translation_steps = 0.5, 8000
    translation_settings: dict = {}
    stage_settings: dict = {}
    translated_share = 0.7
    alignment_start, alignment_weights = 0.2, (1e-3, 5e-3)

    def initialize(self):
        super().initialize()
        dims, labels = len(self.configuration_manager.patch_size), self.label_manager
        self.translator = self.alignment_of_features = None
        if self.translation:
            outputs = len(labels.foreground_regions if labels.has_regions else labels.foreground_labels)
            settings = {"segmentation": outputs, "halvings": halvings_of(self.configuration_manager.patch_size)}
            settings |= self.translation_settings
            self.translator = Translator(self.num_input_channels, dims, **settings).to(self.device).eval()
        if self.alignment:
            discriminator = DomainDiscriminator(self.raw_network.deep_channels, dims).to(self.device)
            self.alignment_of_features = AdversarialAlignment(discriminator, self.mask)
        self.gap = DomainGap()
        self._translated = None

    # ---- the translation's pretraining stage ----

    def stages(self) -> list[Stage]:
        if not self.translation:
            return []
        most = math.ceil(self.translation_steps / self.num_iterations_per_epoch)
        stage = TranslationStage(
            self.translator,
            self.device,
            epochs=max(1, min(most, round(self.translation_share * self.num_epochs))),
            iterations=self.num_iterations_per_epoch,
            validation_iterations=self.num_val_iterations_per_epoch,
            settings={
                "dataset": self.plans_manager.dataset_name,
                "target": self.target.dataset_name,
                "plans": self.plans_manager.plans_name,
                "configuration": self.configuration_name,
                "fold": self.fold,
                "batch_size": self.configuration_manager.batch_size,  # of all processes
            },
            folder=self.output_folder,
            ignore_label=self.label_manager.ignore_label,
            **self.stage_settings,
        )
        return [stage]

    def _run_stages(self) -> None:
        usual = self.oversample_foreground_percent
        if self.translation:
            inverted = self.measure_inverted_channels()
            self.translator.inverted.copy_(torch.tensor(inverted))
            if any(inverted):
                self.print_to_log_file("Compare with nnUNetTrainerGLUAInversionOnly here, which inverts and does nothing else")
            self._remake_loaders(0.0)  # oversampling would teach the discriminators how often anatomy is seen
        super()._run_stages()
        if self.translation:
            self._remake_loaders(usual)

    def _remake_loaders(self, oversample_foreground_percent: float) -> None:
        self._finish_loaders()
        self.oversample_foreground_percent = oversample_foreground_percent
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()

    # ---- the segmenter ----

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        if self.alignment:
            weight = alignment_weight(self.progress, self.alignment_start, self.alignment_weights)
            self.alignment_of_features.weight, self.raw_network.align = weight, weight > 0

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's, on translated images and beside the target's."""
        self.gap.remember(batch["data"], batch["unlabelled"])
        images = batch["data"].to(self.device, non_blocking=True)
        return super().train_step({**batch, "data": self._translate_some(images)})

    def _translate_some(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, *patch), some samples in a target style of their own; labels stay where they are."""
        if self.translator is None:
            self._translated = None  # all source samples count as source
            return images
        chosen = torch.rand(len(images)) < self.translated_share
        self._translated = chosen.to(images.device)
        if chosen.any():
            places = chosen.nonzero()[:, 0].to(images.device)  # not the mask itself: it would wait for the device
            images = images.index_copy(0, places, self._translate(images[places]))
        return images

    def _translate(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device)
        return self.translator.translate(images, self.translator.draw_styles(len(images)))

    def _auxiliary_loss(self, outputs: AuxiliaryOutputs) -> torch.Tensor | None:
        loss = super()._auxiliary_loss(outputs)
        if outputs.target_features is None:
            return loss
        alignment = self.alignment_of_features.loss(outputs.source_features, outputs.target_features)
        return alignment if loss is None else loss + (0.0 if alignment is None else alignment)

    def _after_step(self) -> None:
        super()._after_step()
        if self.alignment:
            self.alignment_of_features.step(self._translated)

    # ---- log and checkpoint ----

    @property
    def diagnostic_keys(self) -> list[str]:
        keys = ["gap_intensity", "gap_features"]
        if self.translation:
            keys = ["gap_intensity", "gap_intensity_translated", "gap_features", "gap_features_translated"]
        if self.alignment:
            keys += ["mask_mean", "domain_accuracy", "alignment_weight"]
        return keys + super().diagnostic_keys

    def diagnostics(self) -> dict[str, float]:
        gap = self.gap.measure(
            lambda images: self.raw_network.deep_features(images.to(self.device)),
            self._translate if self.translation else None,
        )
        return super().diagnostics() | gap | (self.alignment_of_features.diagnostics() if self.alignment else {})

    def extra_state(self) -> dict:
        state = super().extra_state()
        if self.translation:
            weights = self.translator.state_dict()
            state["translator"] = {key: value for key, value in weights.items() if key.startswith(USED)}
        if self.alignment:
            state["alignment"] = self.alignment_of_features.state_dict()
        return state

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        if self.translation:
            try:
                self.translator.load_state_dict({**self.translator.state_dict(), **state["translator"]})
            except RuntimeError as error:
                raise UserError(
                    f"the checkpoint in {self.output_folder} has a translator of other sizes, expected those of this trainer "
                    f"({self.translator.config}): it is of another version or translation_settings; train anew without --c"
                ) from error
        if self.alignment:
            self.alignment_of_features.load_state_dict(state["alignment"])


class nnUNetTrainerGLUATranslationOnly(nnUNetTrainerGLUA):
    """Ablation: plain nnU-Net on translated images, without a discriminator."""

    alignment = False


class nnUNetTrainerGLUANoMask(nnUNetTrainerGLUA):
    """Ablation: all positions have the same weight in the alignment."""

    mask = False


class nnUNetTrainerGLUANoTranslation(nnUNetTrainerGLUA):
    """Ablation: alignment on source images as they are, without the translation's stage."""

    translation = False


class nnUNetTrainerGLUASelfTraining(nnUNetTrainerGLUA):
    """GLUA with self-training, which GLUA itself does not have; reported separately."""

    self_training = True


class nnUNetTrainerGLUAInversionOnly(AdaptedTrainer):
    r"""Ablation: plain nnU-Net on the source with measured channels inverted, :math:`x_s \mapsto -x_s`.

    Training, pseudo Dice and the validation of full images see the inverted source; a prediction sees the target as it is.
    Without a channel to invert this is plain nnU-Net on the adapted plans, and the log says so.
    """

    inversion_only = True
    inverted: torch.Tensor | None = None  # (C,) bool; measured when training begins, then in every checkpoint

    def _run_stages(self) -> None:
        self.inverted = torch.tensor(self.measure_inverted_channels(), device=self.device)
        if not bool(self.inverted.any()):
            self.print_to_log_file(
                "WARNING: no channel of the source is nearer to the target after inversion, and this trainer does nothing "
                "else: what follows is plain nnU-Net on the source. nnUNetTrainerGLUA translates."
            )
        super()._run_stages()

    def train_step(self, batch: dict) -> dict:
        return super().train_step(self._invert(batch))

    def validation_step(self, batch: dict) -> dict:
        return super().validation_step(self._invert(batch))

    def _invert(self, batch: dict) -> dict:
        images = batch["data"].to(self.device, non_blocking=True)  # (B, C, *patch)
        return {**batch, "data": invert_contrast(images, self.inverted, channel_axis=1)}

    def perform_actual_validation(self, save_probabilities: bool = False):
        """nnU-Net's, on the inverted source."""
        self._check_inverted()
        plain = self.dataset_class
        self.dataset_class = inverted_dataset_class(plain, self.inverted.cpu().numpy())
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = plain

    def _check_inverted(self) -> None:
        if self.inverted is None or self.inverted.shape != (self.num_input_channels,):
            raise UserError(
                f"the checkpoint in {self.output_folder} does not say which of {self.num_input_channels} channels of the "
                "source are inverted: another trainer or version wrote it, or another program stripped it. It predicts the "
                "target as before. To validate on the source or continue, copy the training's own checkpoint again."
            )

    def extra_state(self) -> dict:
        return super().extra_state() | {"inverted": self.inverted}

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        self.inverted = state.get("inverted")
        self._check_inverted()
        self.inverted = self.inverted.to(self.device)
