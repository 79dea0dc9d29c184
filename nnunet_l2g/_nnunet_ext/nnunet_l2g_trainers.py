"""The one module nnU-Net finds in this folder: it passes on the trainers of `nnunet_l2g.trainers`.

nnU-Net imports it anew at each look-up and then drops it from sys.modules, so no class may be defined here: it would be
another one each time and could not be pickled.
"""

import re

try:
    import nnunet_l2g.trainers as _trainers
except ModuleNotFoundError as error:
    # Another interpreter, without nnunet_l2g, can inherit the variable: its user's own trainers must stay findable.
    if error.name != "nnunet_l2g":
        raise
    _trainers = None


def __getattr__(name: str) -> type:
    """Asks the module itself, which keeps the trainers it made on request (..._50epochs, nnUNetTrainer_run2)."""
    if _trainers is None or not re.fullmatch(r"nnUNetTrainer\w*|\w+_(\d+(epochs?|iterations?)|run\d+)", name):
        raise AttributeError(f"no trainer of nnunet_l2g is called {name!r}")
    return getattr(_trainers, name)
