"""Reads nnU-Net's preprocessed cases and plans, and runs nothing that they name.

nnU-Net's own readers unpickle every class that a .pkl names, and call every function that a plan names.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import pickle
import pydoc
import sys
from pathlib import Path

import numpy as np

from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, check_plain_name

REMEDY = "preprocess the dataset again (nnUNetv2_preprocess)"
# The functions and classes that rebuild numpy's arrays and scalars, under the names of numpy 1 and 2. Containers and numbers
# need no name.
_CORES = ("numpy.core", "numpy._core")
_ALLOWED = {
    *((f"{core}.multiarray", name) for core in _CORES for name in ("_reconstruct", "scalar")),
    *((f"{core}.numeric", "_frombuffer") for core in _CORES),
    *(("numpy", name) for name in ("ndarray", "dtype")),
}


class _ValuesOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, expected numbers and numpy arrays only")
        return super().find_class(module, name)


def read_properties(path: Path) -> dict:
    """What nnU-Net noted about a case (.pkl). UserError if it is damaged, or names anything but numpy's arrays and scalars."""
    try:
        properties = _ValuesOnly(io.BytesIO(path.read_bytes())).load()
        if not isinstance(properties, dict):
            raise ValueError(f"it holds a {type(properties).__name__}, expected a dictionary")
    except Exception as error:  # each opcode fails in its own way
        raise UserError(f"{path}: cannot be read as a case's properties ({_cause(error)}); {REMEDY}") from error
    return properties


def read_voxels(folder: Path, case: str) -> np.ndarray:
    """A preprocessed image (C, *grid), from <case>.b2nd or <case>.npz. UserError if it is missing or damaged."""
    path = folder / f"{case}.b2nd"
    if not path.is_file():
        path = folder / f"{case}.npz"
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                voxels = arrays["data"]
        else:
            import blosc2

            content = path.read_bytes()  # some versions of blosc2 read from it later, so it needs a name
            voxels = np.asarray(blosc2.ndarray_from_cframe(content)[:])  # blosc2.open can compute what a file names
        if voxels.ndim != 4 or voxels.dtype.kind not in "fiu":
            raise ValueError(f"it holds {voxels.ndim} axes of {voxels.dtype}, expected four axes of numbers")
    except Exception as error:  # each library has its own
        raise UserError(f"{path}: cannot be read as a preprocessed image ({_cause(error)}); {REMEDY}") from error
    return voxels


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def check_plans(plans: dict, path: Path):
    """nnU-Net's PlansManager of `plans`.

    UserError, which names the file `path`, unless all names are plain, all numbers are in their range, and nnU-Net can resolve
    each configuration.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    for key in ("plans_name", "dataset_name"):
        check_plain_name(plans.get(key), f"{path}: {key}")
    try:
        manager = PlansManager(plans)
        _check(plans, "image_reader_writer", lambda value: isinstance(value, str))
        _check(plans, "transpose_forward", lambda value: sorted(value) == [0, 1, 2])
        _check(plans, "transpose_backward", lambda value: sorted(value) == [0, 1, 2])
        _check(plans, "original_median_spacing_after_transp", lambda value: len(value) == 3 and _positive(value))
        _check(plans, "original_median_shape_after_transp", lambda value: len(value) == 3 and _positive(value))
        resolved = {name: manager.get_configuration(name) for name in plans["configurations"]}
        for name, configuration in resolved.items():
            check_plain_name(name, f"{path}: a configuration")
            check_plain_name(configuration.data_identifier, f"{path}: data_identifier of {name}")
            _check_configuration(configuration.configuration)
    except UserError:
        raise
    except Exception as error:  # nnU-Net's managers fail in many ways on values of another kind
        raise UserError(f"{path}: not nnU-Net's plans ({_cause(error)}); copy the file again") from error
    return manager


def _check_configuration(values: dict) -> None:
    dims = len(values["patch_size"])
    _check(values, "patch_size", lambda value: dims in (2, 3) and _positive(value, int) and max(value) < 1 << 15)
    _check(values, "spacing", lambda value: len(value) == dims and _positive(value))
    _check(values, "batch_size", lambda value: _positive([value], int))
    _check(values, "preprocessor_name", lambda value: isinstance(value, str))
    _check(values, "normalization_schemes", lambda value: all(isinstance(scheme, str) for scheme in value))
    _check(values, "use_mask_for_norm", lambda value: all(isinstance(mask, bool) for mask in value))


def _positive(values: list, kinds: type | tuple = (int, float)) -> bool:
    return all(isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < float("inf") for value in values)


def _check(values: dict, key: str, holds) -> None:
    if not holds(values[key]):
        raise ValueError(f"{key} is {str(values[key])[:80]}")


KNOWN = ("torch.nn.", "dynamic_network_architectures.", "nnunetv2.", "nnunet_l2g.")  # packages that may be imported for a name


def check_network_classes(configuration, path: Path) -> None:
    """UserError unless each name that nnU-Net calls to build the network of a ConfigurationManager is a torch.nn.Module's."""
    try:
        arguments = configuration.network_arch_init_kwargs
        needed = configuration.network_arch_init_kwargs_req_import
        names = {"network_class_name": configuration.network_arch_class_name} | {key: arguments[key] for key in needed}
    except DAMAGE as error:
        raise UserError(
            f"{path}: its architecture is not as nnU-Net writes one ({_cause(error)}); copy the file again"
        ) from error
    for key, name in names.items():
        left_out = name is None and key != "network_class_name"
        if not left_out and not (isinstance(name, str) and _names_a_module(name)):
            raise UserError(
                f"{path}: {key} is {str(name)[:80]!r}; expected the dotted name of a torch.nn.Module in one of {KNOWN}, "
                "or in a module that is imported already: take the plans.json that nnU-Net wrote"
            )


def _names_a_module(name: str) -> bool:
    """Whether nnU-Net finds a torch.nn.Module under a name. Only known packages are searched, because a search imports them."""
    import dynamic_network_architectures
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
    from torch import nn

    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)  # a user's own class, if it is imported already
    if name.startswith(KNOWN):
        with contextlib.suppress(pydoc.ErrorDuringImport):
            found = pydoc.locate(name)
        if found is None:  # a class that has moved within its package: nnU-Net searches for it
            folder = Path(dynamic_network_architectures.__path__[0], "architectures")
            found = recursive_find_python_class(str(folder), attribute, "dynamic_network_architectures.architectures")
    return inspect.isclass(found) and issubclass(found, nn.Module)
