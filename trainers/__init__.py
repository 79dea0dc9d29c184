"""The trainers nnU-Net finds by name, and their schedules, which are made on request."""

from __future__ import annotations

import sys

from nnunet_l2g.trainers.glua import (
    nnUNetTrainerGLUA,
    nnUNetTrainerGLUANoMask,
    nnUNetTrainerGLUANoTranslation,
    nnUNetTrainerGLUATranslationOnly,
)
from nnunet_l2g.trainers.glua_self_training import nnUNetTrainerGLUASelfTraining
from nnunet_l2g.trainers.glua_sign_only import nnUNetTrainerGLUASignOnly
from nnunet_l2g.trainers.grcsf import (
    nnUNetTrainerDiceFocal,
    nnUNetTrainerGRCSF,
    nnUNetTrainerGRCSFDoGResidual,
    nnUNetTrainerGRCSFFocal,
    nnUNetTrainerGRCSFNoGCU,
    nnUNetTrainerGRCSFNoRCU,
    nnUNetTrainerGRCSFOtherResidual,
)
from nnunet_l2g.trainers.l2gnet import (
    nnUNetTrainerL2GNet,
    nnUNetTrainerL2GNetAuxiliaryHead,
    nnUNetTrainerL2GNetFixedReferences,
    nnUNetTrainerL2GNetNearestReference,
    nnUNetTrainerL2GNetNoCodebook,
    nnUNetTrainerL2GNetNoReadout,
    nnUNetTrainerL2GNetOneReference,
)
from nnunet_l2g.trainers.random_intensity import nnUNetTrainerRandomIntensity
from nnunet_l2g.training.schedules import make_scheduled_trainer

__all__ = [  # noqa: RUF022, in the order of README's table
    "nnUNetTrainerL2GNet",
    "nnUNetTrainerL2GNetNoCodebook",
    "nnUNetTrainerL2GNetNearestReference",
    "nnUNetTrainerL2GNetFixedReferences",
    "nnUNetTrainerL2GNetOneReference",
    "nnUNetTrainerL2GNetNoReadout",
    "nnUNetTrainerL2GNetAuxiliaryHead",
    "nnUNetTrainerGRCSF",
    "nnUNetTrainerGRCSFFocal",
    "nnUNetTrainerGRCSFNoGCU",
    "nnUNetTrainerGRCSFNoRCU",
    "nnUNetTrainerGRCSFOtherResidual",
    "nnUNetTrainerGRCSFDoGResidual",
    "nnUNetTrainerDiceFocal",
    "nnUNetTrainerGLUA",
    "nnUNetTrainerGLUATranslationOnly",
    "nnUNetTrainerGLUANoMask",
    "nnUNetTrainerGLUANoTranslation",
    "nnUNetTrainerGLUASignOnly",
    "nnUNetTrainerGLUASelfTraining",
    "nnUNetTrainerRandomIntensity",
]


def __getattr__(name: str) -> type:
    """`nnUNetTrainerL2GNet_20epochs` and the like. Kept in this module, so that pickle and identity hold."""
    try:
        trainer = make_scheduled_trainer(name, {known: globals()[known] for known in __all__}, __name__)
    except AttributeError:
        if name.startswith(tuple(f"{known}_" for known in __all__)):  # a slip, or a user's own trainer elsewhere
            print(f"nnunet_l2g has no {name} (it has {__all__[0]}_<N>epochs and {__all__[0]}_<N>epochs_<M>iterations, "
                  "likewise for its other trainers); nnU-Net looks further.", file=sys.stderr)  # fmt: skip
        raise
    setattr(sys.modules[__name__], name, trainer)
    return trainer
