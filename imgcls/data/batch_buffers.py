"""Shared memory that batches of images travel in, used again and again.

A worker hands its images to the training process in shared memory. The system gives that out page by page, clears each
page first and takes all back when the batch is done with, which is a seventh of the time of a worker that reads
photographs. So a loader has a few buffers that its workers are born with, and each batch is asked for with the place of
one that is free. A buffer is free again when no tensor looks at it any more. Where none is free, or a worker does not
know the buffers (one that was spawned does not), images travel as they would without: who keeps batches may keep them.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from imgcls.data.samplers import Draw

_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, BatchBuffers] = weakref.WeakValueDictionary()  # by number


class BatchBuffers:
    """count buffers of ``size`` bytes each. Raises ``OSError`` or ``RuntimeError`` where no memory can be shared."""

    def __init__(self, count: int, size: int) -> None:
        self.memory = torch.empty((count, size), dtype=torch.uint8).share_memory_()
        self._free = list(range(count))
        self.number = next(_numbers)
        _known[self.number] = self

    def take(self) -> int:
        """The place of a free buffer; -1 when there is none."""
        return self._free.pop() if self._free else -1

    def images(self, place: int, shape: tuple[int, ...]) -> Tensor:
        """The uint8 images in a buffer that was taken, which is free again when no tensor looks at it any more."""
        pixels = self.memory[place].numpy()
        weakref.finalize(pixels, self._free.append, place)  # a tensor of an array keeps that array alive
        return torch.from_numpy(pixels)[: math.prod(shape)].view(shape)


class BufferedDraws(list[Draw]):
    """The draws of a batch, and the buffer for its images: (number of the buffers, place)."""

    def __init__(self, draws: Iterable[Draw], buffer: tuple[int, int]) -> None:
        super().__init__(draws)
        self.buffer = buffer

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferedDraws, (list(self), self.buffer)


class WithBuffers:
    """A batch sampler: the batches of ``batches``, each with a buffer.

    count: of the buffers. size: of each, in bytes.
    """

    def __init__(self, batches: Sequence[list[Draw]], count: int, size: int) -> None:
        self._batches, self._count, self._size = batches, count, size
        self._buffers: BatchBuffers | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        # Here, which is before the workers are born, and not when the first batch is asked for.
        if self._buffers is None:
            try:
                self._buffers = BatchBuffers(self._count, self._size)
            except (OSError, RuntimeError):  # the workers will find that, too, and say it
                return iter(self._batches)
        buffers = self._buffers
        return (BufferedDraws(draws, (buffers.number, buffers.take())) for draws in self._batches)


class ImageWriter:
    """Puts the images of a batch into its buffer one by one, each while the processor has it at hand."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        self._number: int
        self._place: int
        self._number, self._place = getattr(draws, "buffer", (-1, -1))
        buffers = _known.get(self._number)
        self._memory = buffers.memory[self._place] if buffers and self._place >= 0 else None
        self._shapes: list[torch.Size] = []

    def add(self, image: Tensor) -> Tensor:
        """``image``, in the buffer if it fits: by its size, its type, and its shape, which is that of the first."""
        begin, end = (count * image.numel() for count in (len(self._shapes), len(self._shapes) + 1))
        if self._memory is None or end > len(self._memory) or image.dtype is not torch.uint8:
            return image
        if self._shapes and image.shape != self._shapes[0]:
            return image
        self._shapes.append(image.shape)
        return self._memory[begin:end].view(image.shape).copy_(image)

    def images(self, count: int) -> InBuffer | None:
        """All ``count`` images of the batch; None unless every one of them is in the buffer."""
        if not count or len(self._shapes) != count:
            return None
        return InBuffer(self._number, self._place, (count, *self._shapes[0]))


class InBuffer:
    """Images in a buffer, (N, C, H, W). Pickled in a worker, it comes out in the loader's process as their tensor."""

    def __init__(self, number: int, place: int, shape: tuple[int, ...]) -> None:
        self._arguments = (number, place, shape)

    def __len__(self) -> int:
        return self._arguments[2][0]

    def __reduce__(self) -> tuple[Any, ...]:
        return _images, self._arguments


def _images(number: int, place: int, shape: tuple[int, ...]) -> Tensor:
    return _known[number].images(place, shape)
