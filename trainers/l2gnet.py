"""nnUNetTrainerL2GNet and its twins: the same network with one part taken away."""

from __future__ import annotations

from nnunet_l2g.architectures import L2GNet
from nnunet_l2g.trainers.base import PluginTrainer


class nnUNetTrainerL2GNet(PluginTrainer):
    """L2GNet on nnU-Net's plans: codes of the bottleneck, related by optimal transport on trainable references."""

    network_class = L2GNet
    figure_name = "progress_l2gnet.png"


class nnUNetTrainerL2GNetNoTransport(nnUNetTrainerL2GNet):
    """Twin: codes only, no references and no transport."""

    network_settings = {"num_references": None}


class nnUNetTrainerL2GNetNoCodebook(nnUNetTrainerL2GNet):
    """Twin: transport on continuous tokens, no codebook."""

    network_settings = {"num_codes": None}


class nnUNetTrainerL2GNetSoftmax(nnUNetTrainerL2GNet):
    """Twin: a softmax over tokens for each reference in the transport's place, so nothing couples the references."""

    network_settings = {"iterations": 0}
