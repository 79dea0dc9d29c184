"""nnU-Net's preprocessed cases, read without its loaders: those unpickle whatever a .pkl names."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np

from nnunet_l2g.errors import UserError

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
