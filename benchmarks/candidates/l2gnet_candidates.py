"""Forms of L2GNet that have not earned their place yet, each beside its twins, for the search in benchmarks/README.md.

nnU-Net finds them by name, with any length, when this folder is in its variable of trainer folders:

    export nnUNet_extTrainer="$PWD/benchmarks/candidates${nnUNet_extTrainer:+:$nnUNet_extTrainer}"
    nnUNetv2_train 206 3d_fullres 0 -tr nnUNetTrainerL2GNetClassTied_20epochs
"""

from __future__ import annotations

from nnunet_l2g.trainers import nnUNetTrainerL2GNet

STRIDE_4 = {"levels": (), "decoder_levels": (2,), "over_codes": True, "dim": 64}
TIED = {**STRIDE_4, "references_per_class": 4}
SETTINGS = {
    # references that belong to classes; the plan's column marginal is the class prior
    "ClassTied": TIED,
    "ClassTiedRelaxed": {**TIED, "relaxation": 0.1},
    "ClassTiedShuffled": {**TIED, "shuffled_classes": True},
    "ClassTiedSoftmax": {**TIED, "iterations": 0},
    "ClassTiedLossOnly": {**TIED, "feed_back": False},
    # logits from the image's own class prototypes; their mean over training
    "Readout": {**TIED, "readout": "image"},
    "ReadoutMean": {**TIED, "readout": "dataset"},
    # at the bottleneck: features rebuilt from the codes alone in 3 of 10 images; from continuous tokens
    "CodeDropout": {"keep_features": 0.7},
    "TokenDropout": {"keep_features": 0.7, "num_codes": None},
    # references that move within a training: the default's stay where k-means has placed them
    "ShortReferences": {"reference_norm": 0.1},
    "ShorterReferences": {"reference_norm": 0.03},
    # one plan for the many tokens of stride 4, without classes
    "ManyTokens": STRIDE_4,
    "ManyTokensSoftmax": {**STRIDE_4, "iterations": 0},
}
CANDIDATES = {
    name: type(name, (nnUNetTrainerL2GNet,), {"network_settings": settings, "__module__": __name__})
    for name, settings in ((f"nnUNetTrainerL2GNet{end}", settings) for end, settings in SETTINGS.items())
}
globals().update(CANDIDATES)
