"""The one module that nnU-Net finds in this folder. It passes on the trainers of `nnunet_l2g.trainers`.

nnU-Net imports it again at each look-up and then drops it from sys.modules. So no class may be defined here: it would be
another class each time, and could not be pickled.
"""

import re

try:
    import nnunet_l2g.trainers as _trainers
except ModuleNotFoundError as error:
    # An interpreter without nnunet_l2g can inherit the variable. It must still find its user's own trainers.
    if error.name != "nnunet_l2g":
        raise
    _trainers = None


def __getattr__(name: str) -> type:
    """Asks `nnunet_l2g.trainers`, which keeps the trainers that it makes on request (..._50epochs, nnUNetTrainer_run2)."""
    if _trainers is None or not re.fullmatch(r"nnUNetTrainer\w*|\w+_(\d+(epochs?|iterations?)|run\d+)", name):
        raise AttributeError(f"no trainer of nnunet_l2g is called {name!r}")
    return getattr(_trainers, name)
