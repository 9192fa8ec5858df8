"""How much memory there is, and what to tell a user when it is used up."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

MIB = 2**20

# What torch, oneDNN and the operating system say on a CPU; none of them has a class of its own for it.
_ON_THE_CPU = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out_of_memory")

_ADVICE = (
    "Lower SOLVER.IMS_PER_BATCH (--find-batch-size finds the largest that fits); or keep the batch and set "
    "SOLVER.ACCUMULATE 2 (half of it at a time), MODEL.BACKBONE.CHECKPOINT True (slower) or SOLVER.AMP.ENABLED True; "
    "--resume goes on from the last checkpoint"
)


class OutOfMemory(ValueError):
    """Memory was used up; says what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is Python's, CUDA's or the CPU allocator's word that there is no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ON_THE_CPU)


def out_of_memory(error: BaseException) -> OutOfMemory:
    """What to tell the user of an error that :func:`is_out_of_memory`."""
    lines = str(error).strip().splitlines() or ["MemoryError"]
    # CUDA goes on about its allocator, the CPU's begins with the line of C++ that failed.
    said = lines[0].rpartition("DefaultCPUAllocator: ")[2].split(". ")[0].rstrip(".")
    return OutOfMemory(f"out of memory: {said}. {_ADVICE}")


def available_memory() -> int:
    """Bytes that this process may still take before the machine, its control group or its own limits refuse.

    Linux' accounts; elsewhere a ``ValueError``.
    """
    try:
        machine = _fields(Path("/proc/meminfo"))["MemAvailable"]
        process = _fields(Path("/proc/self/status"))
    except (OSError, KeyError) as error:
        raise ValueError(f"this system does not say how much memory is free ({error}); Linux does") from error
    return max(0, min(machine, *_left_in_groups(), *_left_in_limits(process)))


def taken_memory() -> int:
    """Bytes of writable memory that this process has asked for so far, as RLIMIT_DATA counts them."""
    return _fields(Path("/proc/self/status"))["VmData"]


def peak_resident() -> int:
    """Bytes of memory that this program held at most; what the program before an exec held does not count."""
    return _fields(Path("/proc/self/status"))["VmHWM"]


def peak_memory() -> float:
    """MiB at most so far: of tensors on the GPU; without one, of this process (its data workers apart)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return taken / (2**20 if sys.platform == "darwin" else 2**10)


def _fields(path: Path) -> dict[str, int]:
    """Of lines such as ``VmData:  1234 kB`` the bytes."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}


def _left_in_limits(process: dict[str, int]) -> list[int]:
    import resource  # not on Windows

    used = {resource.RLIMIT_AS: process["VmSize"], resource.RLIMIT_DATA: process["VmData"]}
    limits = {kind: resource.getrlimit(kind)[0] for kind in used}
    return [limit - used[kind] for kind, limit in limits.items() if limit != resource.RLIM_INFINITY]


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in each control group that this process is in, and in those around it; version 1 and 2."""
    try:
        rows = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, kinds, path in rows:
        if kinds == "":
            base, most, now = root, "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            base, most, now = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            limit, usage = _number(folder / most), _number(folder / now)
            if limit is not None and usage is not None:
                # Files that it has read count as used, and are dropped when somebody needs the room.
                left.append(limit - usage + _inactive_files(folder / "memory.stat"))
    return left


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_files(path: Path) -> int:
    try:
        rows = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
