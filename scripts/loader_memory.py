"""What a list costs in memory once data workers have read all of it: ours, and the same as a Python list of dicts.

python scripts/loader_memory.py --entries 1000000 --workers 8
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from imgcls.data import Source, open_source

MIB = 2**20


def main() -> None:
    """Print a line for each way of starting workers and each kind of set."""
    parser = argparse.ArgumentParser(description="Measure the memory of a list in data workers.")
    parser.add_argument("--entries", type=int, default=1_000_000, metavar="N", help="rows of the list")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="worker processes")
    parser.add_argument("--start", nargs="+", default=["fork", "spawn"], choices=("fork", "spawn", "forkserver"))
    parser.add_argument("--dicts", action="store_true", help="a list of dicts too, for comparison")
    args = parser.parse_args()
    print(f"{args.workers} workers, {args.entries:,} entries; MiB more than with 10 entries:")
    print(f"{'':24}{'private to each worker':>24}{'all processes together':>24}")
    with tempfile.TemporaryDirectory() as folder:
        empty = {start: measure(list_of(10, Path(folder)), args.workers, start) for start in args.start}
        sets: dict[str, Any] = {"list": list_of(args.entries, Path(folder))}
        for name in ["list", "dicts"] if args.dicts else ["list"]:
            if name == "dicts":
                sets = {name: list(sets["list"])}
            for start in args.start:
                held_now = measure(sets[name], args.workers, start)
                grown = [(held_now[key] - empty[start][key]) / MIB for key in ("private", "all")]
                print(f"{name + ', ' + start:24}{grown[0]:24.1f}{grown[1]:24.1f}", flush=True)


def list_of(entries: int, folder: Path) -> Source:
    """An opened list of as many rows, with paths as long as ImageNet's."""
    file = folder / f"{entries}.csv"
    with file.open("w") as stream:
        stream.write("path,label\n")
        for index in range(entries):
            wnid = f"n{index % 1000:08d}"
            stream.write(f"train/{wnid}/{wnid}_{index:08d}.JPEG,{wnid}\n")
    return open_source(f"list:{file}")


class _Reading(Dataset):
    """Reads every entry of its share and then says what the process holds; opens no picture."""

    def __init__(self, entries: Any, workers: int) -> None:
        self.entries, self.workers = entries, workers

    def __len__(self) -> int:
        return self.workers

    def __getitem__(self, worker: int) -> torch.Tensor:
        seen = sum(len(self.entries[index]["file_name"]) for index in range(len(self.entries)))
        assert seen
        gc.collect()
        time.sleep(0.5)  # until the others have read theirs too: what they share is divided by their number
        return torch.tensor(held())


def measure(entries: Any, workers: int, start: str) -> dict[str, float]:
    """Bytes: ``private`` to a worker (the mean), and ``all`` that this process and its workers hold together (PSS)."""
    reading = _Reading(entries, workers)
    loader = DataLoader(reading, batch_size=None, num_workers=workers, multiprocessing_context=start)
    rows = torch.stack(list(loader)).double()
    return {"private": rows[:, 0].mean().item(), "all": rows[:, 1].sum().item() + held()[1]}


def held() -> tuple[int, int]:
    """Bytes of this process: those that nobody shares, and its proportional share of all (PSS)."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    return fields["Private_Clean"] + fields["Private_Dirty"], fields["Pss"]


if __name__ == "__main__":
    main()
