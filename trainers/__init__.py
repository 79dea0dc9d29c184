"""The trainers that nnU-Net finds by name. Those with lengths and runs in their names are made on request."""

from __future__ import annotations

import sys

from nnunet_l2g.trainers import glua, grcsf, l2gnet, random_intensity
from nnunet_l2g.training.names import make_trainer

# All trainers of these modules, in the order in which the modules and their classes are written.
_TRAINERS = {
    name: value
    for module in (l2gnet, grcsf, glua, random_intensity)
    for name, value in vars(module).items()
    if name.startswith("nnUNetTrainer") and value.__module__ == module.__name__
}
globals().update(_TRAINERS)
__all__ = list(_TRAINERS)


def __getattr__(name: str) -> type:
    """`nnUNetTrainerL2GNet_20epochs`, `nnUNetTrainer_run2` and others. They are kept in this module, where pickle looks."""
    try:
        trainer = make_trainer(name, _TRAINERS, __name__)
    except AttributeError:
        if name.startswith(tuple(f"{known}_" for known in __all__)):  # a typing error, or a trainer of the user elsewhere
            print(
                f"nnunet_l2g has no {name} (names are <Trainer>, <Trainer>_<N>epochs, <Trainer>_<N>epochs_<M>iterations, each "
                "also with _run<K>: nnUNetTrainerL2GNet_20epochs_run2); nnU-Net looks further.",
                file=sys.stderr,
            )
        raise
    setattr(sys.modules[__name__], name, trainer)
    return trainer
