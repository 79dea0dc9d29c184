"""The trainers nnU-Net finds by name; those with lengths and runs in their names are made on request."""

from __future__ import annotations

import sys

from nnunet_l2g.trainers.glua import (
    nnUNetTrainerGLUA,
    nnUNetTrainerGLUAInversionOnly,
    nnUNetTrainerGLUANoMask,
    nnUNetTrainerGLUANoTranslation,
    nnUNetTrainerGLUASelfTraining,
    nnUNetTrainerGLUATranslationOnly,
)
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
from nnunet_l2g.training.names import make_trainer

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
    "nnUNetTrainerGLUAInversionOnly",
    "nnUNetTrainerGLUASelfTraining",
    "nnUNetTrainerRandomIntensity",
]


def __getattr__(name: str) -> type:
    """`nnUNetTrainerL2GNet_20epochs`, `nnUNetTrainer_run2` and others, kept in this module: pickle and identity hold."""
    try:
        trainer = make_trainer(name, {known: globals()[known] for known in __all__}, __name__)
    except AttributeError:
        if name.startswith(tuple(f"{known}_" for known in __all__)):  # a slip, or a user's own trainer elsewhere
            print(
                f"nnunet_l2g has no {name} (names are <Trainer>, <Trainer>_<N>epochs, <Trainer>_<N>epochs_<M>iterations, each "
                "also with _run<K>: nnUNetTrainerL2GNet_20epochs_run2); nnU-Net looks further.",
                file=sys.stderr,
            )
        raise
    setattr(sys.modules[__name__], name, trainer)
    return trainer
