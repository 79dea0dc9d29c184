"""nnUNetTrainerGLUA and its twins: translate the source, then segment it while the target's features are drawn near."""

from __future__ import annotations

import math

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_l2g.architectures.glua.adversarial_alignment import AdversarialAlignment, alignment_weight
from nnunet_l2g.architectures.glua.domain_discriminator import DomainDiscriminator
from nnunet_l2g.architectures.glua.domain_gap import DomainGap
from nnunet_l2g.architectures.glua.network import Seen
from nnunet_l2g.architectures.glua.target_stream import WithUnlabelled, target_stream
from nnunet_l2g.architectures.glua.translation.stage import TranslationStage
from nnunet_l2g.architectures.glua.translation.translator import Translator, halvings_of
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers.adapted import AdaptedTrainer
from nnunet_l2g.training.stages import Stage, cases_of

USED = ("average.", "target_styles", "polarity")  # of the translator after its stage; the stage's own checkpoint has the rest


class nnUNetTrainerGLUA(AdaptedTrainer):
    """GLUA on adapted plans (`nnunet_l2g adapt`): first a translation of source into target images, then the segmenter.

    The network is plain nnU-Net's. Translator, discriminator and their like are the trainer's, in its checkpoints so that
    `--c` continues, and not needed to predict.

    Attributes
    ----------
    translation_share, translation_steps : float, int
        Epochs of the translation for each epoch of the segmenter, with as many iterations; at least one, and no more than
        it takes for so many steps.
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
    _before_translation = False

    def initialize(self):
        super().initialize()
        network = self.raw_network
        dims, labels = len(self.configuration_manager.patch_size), self.label_manager
        self.translator = self.alignment_of_features = None
        if self.translation:
            outputs = len(labels.foreground_regions if labels.has_regions else labels.foreground_labels)
            settings = {"segmentation": outputs, "halvings": halvings_of(self.configuration_manager.patch_size)}
            settings |= self.translation_settings
            self.translator = Translator(self.num_input_channels, dims, **settings).to(self.device).eval()
        if self.alignment:
            discriminator = DomainDiscriminator(network.deep_channels, dims).to(self.device)
            self.alignment_of_features = AdversarialAlignment(discriminator, self.mask)
        self.gap = DomainGap()
        self._translated = None
        network.objective = self._objective
        self.optimizer.register_step_post_hook(lambda *_: self._after_step())

    # ---- data ----

    def on_train_start(self):
        self._before_translation = self.translation and not self._checkpoint_loaded
        super().on_train_start()

    def get_dataloaders(self):
        """nnU-Net's, with the target's patches beside; while the translation trains, both domains are sampled uniformly."""
        usual = self.oversample_foreground_percent
        if self._before_translation:  # else the translation's discriminators would learn how often anatomy is seen
            self.oversample_foreground_percent = 0.0
        try:
            loaders = super().get_dataloaders()
        finally:
            self.oversample_foreground_percent = usual
        return tuple(map(WithUnlabelled, loaders, self._target_streams()))

    def _target_streams(self):
        patch = self.configuration_manager.patch_size
        rotation, dummy_2d, initial_patch, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        training = nnUNetTrainer.get_training_transforms(
            patch, rotation, None, mirror_axes, dummy_2d, use_mask_for_norm=self.configuration_manager.use_mask_for_norm
        )
        validation = nnUNetTrainer.get_validation_transforms(None)
        workers, pinned = get_allowed_n_proc_DA(), self.device.type == "cuda"
        for initial, transforms, processes in (
            (initial_patch, training, workers // 2 or min(1, workers)),
            (patch, validation, min(1, workers)),
        ):
            yield target_stream(self.target, self.batch_size, initial, patch, self.label_manager, transforms, processes, pinned)

    def _finish_loaders(self) -> None:
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, WithUnlabelled):
                loader.finish()

    def on_train_end(self):
        super().on_train_end()
        self._finish_loaders()

    # ---- stage 1 ----

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
            draw=self.output_folder,
            ignore_label=self.label_manager.ignore_label,
            **self.stage_settings,
        )
        return [stage]

    def _run_stages(self) -> None:
        if self._before_translation:
            signs = self._measure_polarity()
            for channel, sign in enumerate(signs):
                self.translator.polarity[channel] = sign
            if -1 in signs:
                self.print_to_log_file("nnUNetTrainerGLUASignOnly turns over and does nothing else: the control to beat here")
        super()._run_stages()
        if self._before_translation:
            self._finish_loaders()
            self._before_translation = False
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()  # nnU-Net's oversampling again

    # ---- stage 2 ----

    @property
    def progress(self) -> float:
        """0 in the first epoch, 1 in the last."""
        return self.current_epoch / max(1, self.num_epochs - 1)

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        if self.alignment:
            weight = alignment_weight(self.progress, self.alignment_start, self.alignment_weights)
            self.alignment_of_features.weight, self.raw_network.align = weight, weight > 0

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's, on translated images, with the target's set beside them."""
        network = self.raw_network
        if not torch.isfinite(batch["unlabelled"]).all():  # found here: nothing depends on it before the alignment starts
            self._on_nonfinite("the target's images hold NaN or Inf", cases_of(batch), healed=False)
        self.gap.remember(batch["data"], batch["unlabelled"])
        batch = {**batch, "data": self._translate_some(batch["data"].to(self.device, non_blocking=True))}
        if self.alignment:
            network.unlabelled = batch["unlabelled"].to(self.device, non_blocking=True)
        try:
            return super().train_step(batch)
        finally:
            network.forget()

    def _translate_some(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, *patch), some samples of it in a target style of their own; labels stay where they are."""
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

    def _objective(self, seen: Seen) -> torch.Tensor | None:
        """What is added to the segmentation loss."""
        return None if seen.target is None else self.alignment_of_features.loss(seen.source, seen.target)

    def _after_step(self) -> None:
        if self.alignment:
            self.alignment_of_features.step(self._translated)

    # ---- log and checkpoint ----

    @property
    def diagnostic_keys(self) -> list[str]:
        keys = ["gap_intensity", "gap_features"]
        if self.translation:
            keys = ["gap_intensity", "gap_intensity_translated", "gap_features", "gap_features_translated"]
        return keys + (["mask_mean", "domain_accuracy", "alignment_weight"] if self.alignment else [])

    def diagnostics(self) -> dict[str, float]:
        network = self.raw_network
        was_training = network.training
        network.eval()  # validation is next; no batch statistics, no state left behind

        def encode(images):
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                return network.deep_features(images.to(self.device))

        values = self.gap.measure(encode, self._translate if self.translation else None)
        network.train(was_training)
        if self.alignment:
            values |= self.alignment_of_features.diagnostics()
        return values

    def extra_state(self) -> dict:
        state = {}
        if self.translation:
            weights = self.translator.state_dict()
            state["translator"] = {key: value for key, value in weights.items() if key.startswith(USED)}
        if self.alignment:
            state["alignment"] = self.alignment_of_features.state_dict()
        return state

    def load_extra_state(self, state: dict) -> None:
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
    """Twin: plain nnU-Net on translated images, no discriminator."""

    alignment = False


class nnUNetTrainerGLUANoMask(nnUNetTrainerGLUA):
    """Twin: every position is aligned alike."""

    mask = False


class nnUNetTrainerGLUANoTranslation(nnUNetTrainerGLUA):
    """Twin: alignment on source images as they are, no first stage."""

    translation = False
