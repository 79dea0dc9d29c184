"""nnUNetTrainerL2GNet and its ablations, the same network with one part removed."""

from __future__ import annotations

from nnunet_l2g.architectures import L2GNet
from nnunet_l2g.trainers.base import PluginTrainer

REGIONS_KEY = "nnunet_l2g_regions"  # in the plans, as nnU-Net does not tell a network whether its outputs are regions


class nnUNetTrainerL2GNet(PluginTrainer):
    """L2GNet on nnU-Net's plans: references of each class, related to discrete codes by optimal transport."""

    network_class = L2GNet
    figure_name = "progress_l2gnet.png"

    @classmethod
    def settings_for(cls, plans_manager) -> dict:
        return cls.network_settings | ({"regions": True} if plans_manager.plans.get(REGIONS_KEY) else {})

    def initialize(self):
        if self.label_manager.has_regions:
            self.plans_manager.plans[REGIONS_KEY] = True  # nnU-Net writes these plans into the model folder
        super().initialize()
        if hasattr(self.raw_network.l2g, "placement_step"):  # the first epoch of a long training, 5 % of a short one
            steps = self.num_epochs * self.num_iterations_per_epoch
            self.raw_network.l2g.placement_step = max(2, min(250, steps // 20))


class nnUNetTrainerL2GNetNoCodebook(nnUNetTrainerL2GNet):
    """Ablation: the tokens are transported instead of their codes."""

    network_settings = {"codebook": False}


class nnUNetTrainerL2GNetNearestReference(nnUNetTrainerL2GNet):
    """Ablation: each token belongs to its nearest reference, without transport."""

    network_settings = {"nearest": True}


class nnUNetTrainerL2GNetFixedReferences(nnUNetTrainerL2GNet):
    """Ablation: references are not moved by what they collect from the image."""

    network_settings = {"moved": False}


class nnUNetTrainerL2GNetOneReference(nnUNetTrainerL2GNet):
    """Ablation: one reference for each class."""

    network_settings = {"per_class": 1}


class nnUNetTrainerL2GNetNoReadout(nnUNetTrainerL2GNet):
    """Ablation: only the losses are added, and the logits are those of nnU-Net's decoder."""

    network_settings = {"readout": False}


class nnUNetTrainerL2GNetAuxiliaryHead(nnUNetTrainerL2GNet):
    """Ablation: a 1x1 head replaces the references, with the same weight of the loss and the same read-out."""

    network_settings = {"auxiliary_head": True}
