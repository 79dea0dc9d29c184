"""Plans name the network's classes by dotted paths, and nnU-Net calls whatever it finds there: `os.system` as well."""

from __future__ import annotations

import inspect
import pydoc
import sys
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.untrusted.json_files import DAMAGE

KNOWN = ("torch.nn.", "dynamic_network_architectures.", "nnunetv2.", "nnunet_l2g.")  # whose modules may be imported for a name


def check_network_classes(configuration, path: Path) -> None:
    """UserError unless each name that building the network would call is that of a network's module.

    Parameters
    ----------
    configuration : nnU-Net's ConfigurationManager
    path : of the plans, for the message
    """
    try:
        arguments = configuration.network_arch_init_kwargs
        needed = configuration.network_arch_init_kwargs_req_import
        names = {"network_class_name": configuration.network_arch_class_name} | {key: arguments[key] for key in needed}
    except DAMAGE as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: its architecture is not as nnU-Net describes one ({cause}); copy the file again") from error
    for key, name in names.items():
        if name is None and key != "network_class_name":
            continue
        if not (isinstance(name, str) and _is_module(_located(name))):
            raise UserError(
                f"{path}: {key} is {str(name)[:80]!r}; expected the dotted name of a torch.nn.Module in one of {KNOWN}, "
                "or in a module that is imported already: take the plans.json that nnU-Net wrote"
            )


def _located(name: str) -> object:
    """What nnU-Net finds under a name; None if nothing. Finding imports modules, so those of others are not even looked for."""
    import dynamic_network_architectures
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    if not name.startswith(KNOWN):
        module, _, attribute = name.rpartition(".")
        return getattr(sys.modules.get(module), attribute, None)  # a user's own, if it is there already
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return None
    if found is None:  # classes have moved within their package, and nnU-Net looks for them there
        folder = Path(dynamic_network_architectures.__path__[0], "architectures")
        package = "dynamic_network_architectures.architectures"
        found = recursive_find_python_class(str(folder), name.split(".")[-1], package)
    return found


def _is_module(found: object) -> bool:
    from torch import nn

    return inspect.isclass(found) and issubclass(found, nn.Module)
