"""nnUNetTrainerL2GNet and its ablations: the same network with one part taken away."""

from __future__ import annotations

import torch

from nnunet_l2g.architectures import L2GNet
from nnunet_l2g.trainers.base import PluginTrainer

REGIONS_KEY = "nnunet_l2g_regions"  # in the plans: nnU-Net builds a network without saying what its outputs are


class nnUNetTrainerL2GNet(PluginTrainer):
    """L2GNet on nnU-Net's plans: references of each class, related to discrete codes by optimal transport."""

    network_class = L2GNet
    figure_name = "progress_l2gnet.png"

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = torch.device("cuda")
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.label_manager.has_regions:
            self.plans_manager.plans[REGIONS_KEY] = True  # nnU-Net writes the plans into the model's folder

    @classmethod
    def settings_for(cls, plans_manager) -> dict:
        return cls.network_settings | ({"regions": True} if plans_manager.plans.get(REGIONS_KEY) else {})

    def initialize(self):
        super().initialize()
        if hasattr(self.raw_network.l2g, "placement_step"):  # the first epoch of a long training, 5 % of a short one
            steps = self.num_epochs * self.num_iterations_per_epoch
            self.raw_network.l2g.placement_step = max(2, min(250, steps // 20))


class nnUNetTrainerL2GNetNoCodebook(nnUNetTrainerL2GNet):
    """Ablation: tokens are transported, in the place of their codes."""

    network_settings = {"codebook": False}


class nnUNetTrainerL2GNetNearestReference(nnUNetTrainerL2GNet):
    """Ablation: the nearest reference in the place of the transport."""

    network_settings = {"nearest": True}


class nnUNetTrainerL2GNetFixedReferences(nnUNetTrainerL2GNet):
    """Ablation: what references collect from the image does not move them."""

    network_settings = {"moved": False}


class nnUNetTrainerL2GNetOneReference(nnUNetTrainerL2GNet):
    """Ablation: one reference for each class."""

    network_settings = {"per_class": 1}


class nnUNetTrainerL2GNetNoReadout(nnUNetTrainerL2GNet):
    """Ablation: the losses alone, logits are nnU-Net's."""

    network_settings = {"readout": False}


class nnUNetTrainerL2GNetAuxiliaryHead(nnUNetTrainerL2GNet):
    """Ablation: an ordinary 1x1 head in the place of the references, with the same weight and read-out."""

    network_settings = {"auxiliary_head": True}
