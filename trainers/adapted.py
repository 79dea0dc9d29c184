"""AdaptedTrainer: what trainers on plans of `nnunet_l2g adapt` share."""

from __future__ import annotations

from functools import cached_property

from nnunet_l2g.architectures import GLUA
from nnunet_l2g.architectures.glua.polarity import measure_polarity
from nnunet_l2g.architectures.glua.target_stream import target_dataset
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers.base import PluginTrainer
from nnunet_l2g.training.adapted_plans import AdaptedTarget, check_adapted_plans


class AdaptedTrainer(PluginTrainer):
    """Plain nnU-Net's network, trained on a labelled source with an unlabelled target in view.

    Attributes
    ----------
    translation, alignment, sign_alone : bool
        What a subclass has, and keeps in its checkpoints beside the network.
    """

    network_class = GLUA
    translation, alignment, sign_alone = False, False, False

    @cached_property
    def target(self) -> AdaptedTarget:
        """UserError if the plans name no target, or what `adapt` made of it is gone. Prediction never asks."""
        return check_adapted_plans(self.plans_manager.plans, self.configuration_name)

    def on_train_start(self):
        _ = self.target  # before anything is computed
        if not self.was_initialized:
            self.initialize()
        if self._checkpoint_loaded and self.extra_state() and not self._extra_loaded:
            raise UserError(
                f"the checkpoint in {self.output_folder} has nothing of what {type(self).__name__} keeps beside the network "
                "(translator, discriminator, signs), expected what it was trained with: another program has stripped it. "
                "Predict with it, or train anew without --c."
            )
        super().on_train_start()

    def get_training_transforms(self, *args, use_mask_for_norm=None, **kwargs):
        """nnU-Net's for the source, whose use_mask_for_norm the plans do not hold: theirs is the target's."""
        return super().get_training_transforms(*args, use_mask_for_norm=self.target.source_use_mask_for_norm, **kwargs)

    def _measure_polarity(self) -> list[int]:
        """1 or -1 for each channel. Of cases and not of a batch: all processes, and a run that continues, find the same."""
        source, _ = self.get_tr_and_val_datasets()
        signs = []
        for channel, found in enumerate(measure_polarity(source, target_dataset(self.target))):
            signs.append(found.sign)
            self.print_to_log_file(
                f"Channel {channel} of the source is {'turned over' if found.sign < 0 else 'left as it is'}: Wasserstein "
                f"distance to the target's intensities as it is {found.as_it_is:.3g}, turned over {found.turned:.3g}"
            )
        return signs
