"""The two readers of files from elsewhere: neither runs code, whatever the file or the environment says."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from imgcls.structures import first_line


def read_torch(path: Path, *, mmap: bool = False) -> Any:
    """``torch.load`` on the CPU that never unpickles objects, whatever the environment says."""
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        # Said at the call it wins over TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD; torch's default would not.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a torn or hostile pickle can make the unpickler raise anything
        raise ValueError(
            f"cannot read {path}: {_reason(error)}. Either it is torn, or it holds Python objects, which are never "
            "loaded: save plain tensors ({'model': state_dict}) where it was made"
        ) from error


def _reason(error: Exception) -> str:
    """What torch has against a file, without its advice to load that unsafely all the same."""
    said = re.search(r"(?:Trying to load unsupported|Unsupported) .+?(?=\. |\.?$)", str(error), re.MULTILINE)
    return said[0] if said else first_line(error)


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("reading it needs the package safetensors (pip install safetensors)") from error
    return load_file(path)


class _ArraysOnly(pickle.Unpickler):
    """Knows numpy arrays and ordered dicts; every other global of a pickle is refused by name."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            # numpy.core is the name of before numpy 2; the modern home serves both.
            return super().find_class(module.replace("numpy.core.", "numpy._core."), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not an array")


def read_arrays_pickle(path: Path) -> Any:
    """A pickle of arrays in dicts, as the model zoos of detectron2 and Caffe2 ship; anything callable is refused."""
    try:
        # Safe: _ArraysOnly admits no callable but numpy's own constructors.
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:
        raise ValueError(f"refusing {path}: {error}. Only arrays are read from a .pkl") from error
    return content
