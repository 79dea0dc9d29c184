"""Files that nnU-Net wrote, or somebody in its name: preprocessed cases, plans, and the classes that plans name.

nnU-Net's own readers unpickle whatever a .pkl names, and call whatever a plan names.
"""

from __future__ import annotations

import inspect
import io
import pickle
import pydoc
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, check_plain_name

REMEDY = "preprocess the dataset again (nnUNetv2_preprocess)"
# What rebuilds numpy's arrays and scalars, under the names of numpy 1 and 2. Containers and numbers need no name.
_ALLOWED = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
}


class _ValuesOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, expected numbers and numpy arrays only")
        return super().find_class(module, name)


def read_properties(path: Path) -> dict:
    """What nnU-Net's reader and preprocessing noted about a case (.pkl): Python's and numpy's values, nothing else is made.

    UserError if the file is damaged or names anything else.
    """
    try:
        properties = _ValuesOnly(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # each opcode fails in its own way
        raise UserError(f"{path}: cannot be read as a case's properties ({_cause(error)}); {REMEDY}") from error
    if not isinstance(properties, dict):
        raise UserError(f"{path}: holds a {type(properties).__name__}, expected a case's properties; {REMEDY}")
    return properties


def read_voxels(folder: Path, case: str) -> np.ndarray:
    """A preprocessed image (C, *grid), from <case>.b2nd or <case>.npz. UserError if it is missing or damaged."""
    path = folder / f"{case}.b2nd"
    if not path.is_file():
        path = folder / f"{case}.npz"
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                voxels = content["data"]
        else:
            import blosc2

            content = path.read_bytes()  # a name of its own: some versions of blosc2 read from it and do not keep it
            # not blosc2.open, which, in some versions, computes what a file names
            voxels = np.asarray(blosc2.ndarray_from_cframe(content)[:])
    except Exception as error:  # each library has its own
        raise UserError(f"{path}: cannot be read as a preprocessed image ({_cause(error)}); {REMEDY}") from error
    if voxels.ndim != 4 or voxels.dtype.kind not in "fiu":
        raise UserError(f"{path}: holds {voxels.ndim} axes of {voxels.dtype}, expected an image of four; {REMEDY}")
    return voxels


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


LONGEST = 1 << 15  # voxels along an axis, the most that a NIfTI header can say


def check_plans(plans: dict, path: Path):
    """nnU-Net's PlansManager of `plans`.

    UserError unless names are plain, numbers are in their range, and each configuration can be resolved; `path` is the file
    that the message names.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    for key in ("plans_name", "dataset_name"):
        check_plain_name(plans.get(key), f"{path}: {key}")
    try:
        manager = PlansManager(plans)
        _check(isinstance(plans["image_reader_writer"], str), "image_reader_writer", plans)
        for key in ("transpose_forward", "transpose_backward"):
            _check(sorted(plans[key]) == [0, 1, 2], key, plans)
        for key in ("original_median_spacing_after_transp", "original_median_shape_after_transp"):
            _check(len(plans[key]) == 3 and _positive(plans[key], float("inf")), key, plans)
        names = list(plans["configurations"])
        found = {name: manager.get_configuration(name) for name in names}
        for name in names:
            _check_configuration(found[name], path, name)
    except UserError:
        raise
    except Exception as error:  # wherever nnU-Net's managers stumble over a value of another kind
        cause = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path}: not nnU-Net's plans ({cause}); copy the file again") from error
    return manager


def _check_configuration(found, path: Path, name: str) -> None:
    check_plain_name(name, f"{path}: a configuration")
    check_plain_name(found.data_identifier, f"{path}: data_identifier of {name}")
    values = found.configuration
    dims = len(found.patch_size)
    _check(dims in (2, 3) and _positive(found.patch_size, LONGEST, whole=True), "patch_size", values)
    _check(len(found.spacing) == dims and _positive(found.spacing, float("inf")), "spacing", values)
    _check(_positive([found.batch_size], 1 << 20, whole=True), "batch_size", values)
    _check(isinstance(found.preprocessor_name, str), "preprocessor_name", values)
    _check(_all(found.normalization_schemes, str), "normalization_schemes", values)
    _check(_all(found.use_mask_for_norm, bool), "use_mask_for_norm", values)
    _check(found.previous_stage_name is None or isinstance(found.previous_stage_name, str), "previous_stage", values)


def _positive(values: Sequence, largest: float, whole: bool = False) -> bool:
    kinds = (int,) if whole else (int, float)
    return all(isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < largest for value in values)


def _all(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _check(holds: bool, key: str, values: dict) -> None:
    if not holds:
        raise ValueError(f"{key} is {str(values[key])[:80]}")


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
