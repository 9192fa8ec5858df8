"""Arrays that cost their bytes once, whatever the number of workers and however these are started."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch


class SharedArrays:
    """Base of what data workers are handed: workers share the numpy arrays among its attributes.

    Forked workers share every page that nobody writes to, and an array has no reference counts inside that reading
    would write. A worker that starts by spawn or forkserver gets its objects pickled: the first time, the arrays move
    to shared memory, and then travel as handles.
    """

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if get_spawning_popen() is None:  # a plain copy or pickle
            return state
        for name, value in state.items():
            if isinstance(value, np.ndarray) and value.nbytes and not value.dtype.hasobject:
                block = _blocks(self).get(name) or _Block.of(value)
                _blocks(self)[name] = block
                setattr(self, name, block.array())
                state[name] = block
        state.pop("_shared_blocks", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.array() if isinstance(value, _Block) else value)


@dataclass(frozen=True, eq=False)
class _Block:
    """An array in shared memory: bytes (n,) uint8, and what they mean."""

    memory: torch.Tensor
    dtype: np.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> _Block:
        memory = torch.empty(array.nbytes, dtype=torch.uint8).share_memory_()
        block = cls(memory, array.dtype, array.shape)
        block.array()[...] = array
        return block

    def array(self) -> np.ndarray:
        return self.memory.numpy().view(self.dtype).reshape(self.shape)


def _blocks(holder: SharedArrays) -> dict[str, _Block]:
    blocks: dict[str, _Block] = vars(holder).setdefault("_shared_blocks", {})
    return blocks
