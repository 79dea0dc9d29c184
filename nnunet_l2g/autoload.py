"""The start-up files run this at every start of Python. It tells nnU-Net where our trainers are, and imports os alone.

nnU-Net reads the variable `nnUNet_extTrainer` at each look-up, and child processes inherit it.
"""

import os

VARIABLE = "nnUNet_extTrainer"
OPT_OUT = "NNUNET_L2G_AUTOLOAD"


def trainers_folder() -> str:
    """The folder that nnU-Net has to search. Its one module passes on `nnunet_l2g.trainers`."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "_nnunet_ext")


def with_trainers(value: str) -> str:
    """Appends our folder to `value` (folders, separated by os.pathsep) unless it is there. The user's folders stay first."""
    folder = trainers_folder()
    if folder in value.split(os.pathsep):
        return value
    return value + os.pathsep + folder if value else folder


def append_trainers() -> None:
    """Appends our folder to the variable. Silent on any error, because no Python may fail to start because of us."""
    try:
        if os.environ.get(OPT_OUT) != "0":
            os.environ[VARIABLE] = with_trainers(os.environ.get(VARIABLE, ""))
    except Exception:
        pass
