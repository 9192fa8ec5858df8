"""Checkpoints: whole or absent, read without running code, found whatever the pointer says."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import save_file
from torch import nn

from imgcls.checkpoint import (
    SafeCheckpointer,
    content_digest,
    file_digest,
    load_weights,
    newest_whole,
    prune,
    read_checkpoint,
    sweep,
    trunk_weights,
    write_checkpoint,
    write_tensors,
)
from imgcls.checkpoint.manifest import is_whole, manifest_path, read_manifest
from imgcls.checkpoint.safe_load import read_torch

NAME = "model_0000004.pth"


def content(value: float = 1.0, size: int = 4096, **more: Any) -> dict[str, Any]:
    return {"model": {"a.weight": torch.full((size,), value), "steps": torch.tensor(3)}, "iteration": 4, **more}


def value_in(path: Path) -> float:
    """The one value that every entry of the weight has."""
    (value,) = set(read_checkpoint(path)["model"]["a.weight"].tolist())
    return value


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WHOLE = ["last_checkpoint", NAME, f"{NAME}.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one checkpoint of the value 1, as a run leaves it."""
    made = tmp_path / "run"
    write_checkpoint(made / NAME, content(), iteration=4, newest=True)
    return made


# ------------------------------------------------------------------------------------------------------------ writing


def test_a_checkpoint_has_a_manifest_a_digest_and_the_pointer(folder: Path) -> None:
    assert names_in(folder) == WHOLE
    assert (folder / "last_checkpoint").read_text() == NAME  # as detectron2 writes it
    manifest = json.loads((folder / f"{NAME}.json").read_text())
    assert (manifest["bytes"], manifest["iteration"]) == ((folder / NAME).stat().st_size, 4)
    read = read_checkpoint(folder / NAME)
    assert torch.equal(read["model"]["a.weight"], torch.ones(4096)) and read["iteration"] == 4
    assert torch.load(folder / NAME, weights_only=True).keys() == {"model", "iteration", "digest"}


def test_without_newest_the_pointer_stays(folder: Path) -> None:
    write_checkpoint(folder / "model_best.pth", content(2.0), iteration=5)
    assert (folder / "last_checkpoint").read_text() == NAME


class FullDisk:
    """A file on a disk that has room for some bytes only."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int, only: str = "") -> None:
    """From now on files whose name contains ``only`` take ``room`` bytes."""
    opened = Path.open

    def opening(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(self, mode, *args, **kwargs)
        return FullDisk(file, room) if "w" in mode and only in self.name else file

    monkeypatch.setattr(Path, "open", opening)


def failing(
    error: BaseException, after: int = 0, instead_of: Callable[..., Any] = lambda *_: None
) -> Callable[..., Any]:
    """A function that does its work ``after`` times and then raises ``error``."""
    calls = iter(range(after + 1))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == after:
            raise error
        return instead_of(*args, **kwargs)

    return call


def break_save(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "save", failing(RuntimeError("the writer gave up")))


def break_disk(patch: pytest.MonkeyPatch) -> None:
    fill_disk(patch, 9000)


def break_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", failing(OSError(errno.EIO, "Input/output error")))


def break_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "replace", failing(PermissionError(errno.EACCES, "Permission denied")))


STAGES = {
    "torch.save": (break_save, RuntimeError, "the writer gave up"),
    "a full disk": (break_disk, OSError, rf"cannot write .*/{NAME} \(\[Errno 28\] No space left on device\)"),
    "fsync": (break_sync, OSError, rf"cannot write .*/{NAME} \(\[Errno 5\] Input/output error\)"),
    "rename": (break_rename, OSError, rf"cannot write .*/{NAME} \(\[Errno 13\] Permission denied\)"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [NAME, "model_0000009.pth"])
def test_a_failure_leaves_what_was_there(name: str, stage: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the file of before, and beside it: no torn file, no temporary one, and the old one is still the newest."""
    before = (folder / NAME).read_bytes()
    break_it, error, message = STAGES[stage]
    with monkeypatch.context() as patch, pytest.raises(error, match=message.replace(NAME, name)):
        break_it(patch)
        write_checkpoint(folder / name, content(2.0), iteration=9, newest=True)
    assert (folder / NAME).read_bytes() == before
    over = stage == "rename" and name == NAME  # its manifest went first; the digest inside serves
    assert names_in(folder) == (WHOLE[:2] if over else WHOLE)
    assert newest_whole(folder) == folder / NAME
    write_checkpoint(folder / name, content(2.0), iteration=9, newest=True)  # the cause is gone
    assert value_in(newest_whole(folder) or folder) == 2.0


def test_an_interrupt_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", failing(KeyboardInterrupt()))
        write_checkpoint(folder / NAME, content(2.0))
    assert names_in(folder) == WHOLE and value_in(folder / NAME) == 1.0


def test_plain_saving_tears_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the planted full disk is one."""
    fill_disk(monkeypatch, 9000)
    with pytest.raises(RuntimeError), (folder / NAME).open("wb") as file:
        torch.save(content(2.0), file)
    with pytest.raises(ValueError, match=f"none of the checkpoints in .* is whole .{NAME}"):
        newest_whole(folder)


@pytest.mark.parametrize(
    ("only", "iteration"),
    [pytest.param(".json", 9, id="manifest"), pytest.param("last_checkpoint", 9, id="pointer")],
)
def test_a_failure_after_the_file_itself_leaves_it_whole_and_found(
    only: str, iteration: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is whole then and is found; neither its manifest nor the pointer is needed."""
    with monkeypatch.context() as patch, pytest.raises(OSError, match=rf"cannot write .*{only}.*No space left"):
        fill_disk(patch, 3, only)
        write_checkpoint(folder / "model_0000009.pth", content(2.0), iteration=iteration, newest=True)
    assert newest_whole(folder) == folder / "model_0000009.pth"
    assert value_in(folder / "model_0000009.pth") == 2.0
    assert not [name for name in names_in(folder) if name.endswith(".tmp")]


def test_an_old_manifest_never_stands_beside_a_new_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment between the rename of the file and that of its manifest, seen from outside."""
    seen = []
    replace = os.replace

    def looking(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith(NAME):
            seen.append((is_whole(folder / NAME), read_manifest(folder / NAME)))

    monkeypatch.setattr(os, "replace", looking)
    write_checkpoint(folder / NAME, content(2.0), iteration=4)
    assert seen == [(True, None)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["model", "optimizer", "ema"])
def test_what_is_not_finite_is_never_written(bad: float, place: str, folder: Path) -> None:
    broken = content(2.0, optimizer={"state": {0: [torch.zeros(2)]}}, ema={"a": torch.zeros(2, 2)})
    tensor = {"model": broken["model"]["a.weight"], "optimizer": broken["optimizer"]["state"][0][0]}
    tensor["ema"] = broken["ema"]["a"][1]
    name = {"model": "model.a.weight", "optimizer": "optimizer.state.0.0", "ema": "ema.a"}[place]
    write_checkpoint(folder / "model_0000009.pth", broken, iteration=9, newest=True)
    tensor[place][-1] = bad
    with pytest.raises(
        ValueError, match=rf"refusing to write .*: the tensor {name} is not finite. Lower SOLVER.BASE_LR"
    ):
        write_checkpoint(folder / "model_0000014.pth", broken, iteration=14, newest=True)
    assert newest_whole(folder) == folder / "model_0000009.pth"
    assert not (folder / "model_0000014.pth").exists()


# ---------------------------------------------------------------------------------------------------------- SIGKILL

BIG = 1_000_000  # floats: a file of 4 MB takes long enough to be killed in
FORK = multiprocessing.get_context("fork")


def write_for_ever(folder: Path) -> None:
    for value in range(2, 10_000):
        write_checkpoint(folder / NAME, content(float(value), BIG), iteration=4, newest=True)


def save_for_ever(folder: Path) -> None:
    for value in range(2, 10_000):
        torch.save(content(float(value), BIG), folder / NAME)


def kill_during(work: Callable[[Path], None], folder: Path, seen: Callable[[], bool]) -> None:
    """Start ``work`` in a process and SIGKILL it as soon as ``seen`` is true."""
    process = FORK.Process(target=work, args=(folder,))
    process.start()
    try:
        deadline = time.monotonic() + 20
        while not seen():
            assert time.monotonic() < deadline and process.is_alive()
    finally:
        process.kill()
        process.join()


def a_write_is_under_way(folder: Path, at_least: int) -> bool:
    for path in folder.glob(f".{NAME}.*.tmp"):
        try:
            return path.stat().st_size >= at_least
        except FileNotFoundError:  # it was renamed in between
            return False
    return False


def test_a_killed_writer_leaves_a_whole_file(folder: Path) -> None:
    write_checkpoint(folder / NAME, content(1.0, BIG), iteration=4, newest=True)
    rng, left, values = random.Random(0), 0, set()
    for _ in range(10):
        at_least = rng.randrange(1, 4 * BIG)
        kill_during(write_for_ever, folder, lambda least=at_least: a_write_is_under_way(folder, least))  # type: ignore[misc]
        left += len(list(folder.glob(".model_*.tmp")))
        newest = newest_whole(folder)
        assert newest == folder / NAME
        values.add(value_in(newest))  # one value throughout: not half of one file and half of another
        sweep(folder)
        assert set(names_in(folder)) <= set(WHOLE)
    assert left > 3  # the kills did hit writes


def test_a_killed_plain_save_tears_the_file(folder: Path) -> None:
    """The twin: within ten kills at most (a kill may come just between two saves)."""
    for _ in range(10):
        torch.save(content(1.0, BIG), folder / NAME)
        manifest_path(folder / NAME).unlink(missing_ok=True)
        assert is_whole(folder / NAME)
        kill_during(save_for_ever, folder, lambda: 0 < (folder / NAME).stat().st_size < 3 * BIG)
        if not is_whole(folder / NAME):
            return
    pytest.fail("no kill tore the file")


# ----------------------------------------------------------------------------------------------------------- bit rot


def flip(path: Path, whole: bytes, offset: int, bit: int) -> None:
    damaged = bytearray(whole)
    damaged[offset] ^= 1 << bit
    path.write_bytes(damaged)


def test_the_manifest_notices_every_flipped_bit(folder: Path) -> None:
    rng, path = random.Random(0), folder / NAME
    whole = path.read_bytes()
    for _ in range(50):
        flip(path, whole, rng.randrange(len(whole)), rng.randrange(8))
        assert not is_whole(path)
        with pytest.raises(ValueError, match=rf"{NAME} is damaged: its bytes are not those"):
            read_checkpoint(path)
    path.write_bytes(whole)
    assert is_whole(path) and value_in(path) == 1.0


def test_the_digest_inside_notices_every_flipped_value(folder: Path) -> None:
    """A copy without its manifest. torch itself loads the wrong weights without a word."""
    path, rng = folder.parent / "copied.pth", random.Random(1)
    whole = (folder / NAME).read_bytes()
    start = whole.index(torch.ones(4096).numpy().tobytes())
    silently_wrong = 0
    for _ in range(50):
        flip(path, whole, start + rng.randrange(4 * 4096), rng.randrange(8))
        silently_wrong += not torch.equal(torch.load(path, weights_only=True)["model"]["a.weight"], torch.ones(4096))
        assert not is_whole(path)
        with pytest.raises(ValueError, match=r"copied\.pth is damaged or was changed"):
            read_checkpoint(path)
    assert silently_wrong == 50
    path.write_bytes(whole)
    assert is_whole(path) and value_in(path) == 1.0


def test_a_truncated_file_is_noticed(folder: Path) -> None:
    path = folder / NAME
    whole = path.read_bytes()
    for with_manifest in (True, False):
        if not with_manifest:
            manifest_path(path).unlink()
        for share in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:share])
            assert not is_whole(path), (with_manifest, share)
            with pytest.raises(ValueError, match=rf"{NAME}"):
                read_checkpoint(path)


def test_a_refused_file_is_explained_without_the_advice_to_load_it_all_the_same(tmp_path: Path) -> None:
    """As torch's own message says first."""
    path, reasons = tmp_path / "weights.pth", {}
    for name, value in {"object": argparse.Namespace(), "function": os.system}.items():
        torch.save({"model": value}, path)
        with pytest.raises(ValueError, match=rf"cannot read {path}: ") as told:
            read_torch(path)
        reasons[name] = str(told.value)
        assert "weights_only" not in reasons[name] and "Re-running" not in reasons[name]
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=rf"cannot read {path}: Unsupported operand 103\. Either it is torn"):
        read_torch(path)
    assert "argparse.Namespace" in reasons["object"] and "system" in reasons["function"]


def test_only_a_value_error_escapes_a_damaged_file(tmp_path: Path) -> None:
    """Falling back to an older checkpoint must survive whatever the unpickler raises about the newest."""
    rng, path, outcomes = random.Random(2), tmp_path / "model_0000001.pth", {"read": 0, "refused": 0}
    for modern in (True, False):
        torch.save({**content(size=8), "classes": ["a", "b"]}, path, _use_new_zipfile_serialization=modern)
        whole = path.read_bytes()
        for _ in range(300):
            damaged = bytearray(whole)
            for _ in range(rng.choice([1, 2, 5])):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            try:
                read_torch(path)
                outcomes["read"] += 1
            except ValueError as error:
                assert str(path) in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_the_digest_covers_everything_but_itself() -> None:
    base = {"model": {"a": torch.zeros(2, 3)}, "best": {"value": 1.5}, "classes": ["x", "y"], "digest": "old"}
    changed = [
        {**base, "model": {"a": torch.zeros(3, 2)}},
        {**base, "model": {"a": torch.zeros(2, 3, dtype=torch.float16)}},
        {**base, "model": {"b": torch.zeros(2, 3)}},
        {**base, "model": {"a": torch.full((2, 3), -0.0)}},
        {**base, "best": {"value": 1.25}},
        {**base, "best": {"value": 1.5, "digest": "of something else"}},
        {**base, "classes": ["y", "x"]},
        {**base, "more": None},
    ]
    assert len({content_digest(base), *map(content_digest, changed)}) == 1 + len(changed)
    assert content_digest({**base, "digest": "new"}) == content_digest(base)
    strided = {**base, "model": {"a": torch.zeros(3, 2).t()}}
    assert content_digest(strided) == content_digest(base)  # the values, however they lie in memory


# ---------------------------------------------------------------------------------------------- finding the newest


@pytest.mark.parametrize("pointer", [None, "", "\0\xff garbage", "model_9999999.pth", "../../etc/passwd"])
def test_the_pointer_is_not_needed(pointer: str | None, folder: Path) -> None:
    write_checkpoint(folder / "model_0000009.pth", content(2.0), iteration=9, newest=True)
    (folder / "last_checkpoint").unlink()
    if pointer is not None:
        (folder / "last_checkpoint").write_text(pointer)
    assert newest_whole(folder) == folder / "model_0000009.pth"
    checkpointer = SafeCheckpointer(nn.Linear(1, 1), str(folder))
    assert checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == str(folder / "model_0000009.pth")


def test_an_absent_folder_an_empty_one_and_a_best_alone_have_nothing_to_resume(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "gone") is None
    write_checkpoint(tmp_path / "model_best.pth", content(), iteration=3)  # the best one is no place to go on from
    assert newest_whole(tmp_path) is None
    checkpointer = SafeCheckpointer(nn.Linear(1, 1), str(tmp_path))
    assert not checkpointer.has_checkpoint() and checkpointer.get_checkpoint_file() == ""
    assert not SafeCheckpointer(nn.Linear(1, 1)).has_checkpoint()


def test_the_iteration_decides_not_the_name(folder: Path) -> None:
    """A finished run that was continued: model_final.pth is older than the periodic ones after it."""
    write_checkpoint(folder / "model_final.pth", content(2.0), iteration=7)
    assert newest_whole(folder) == folder / "model_final.pth"
    write_checkpoint(folder / "model_0000009.pth", content(3.0), iteration=9)
    assert newest_whole(folder) == folder / "model_0000009.pth"
    for manifest in folder.glob("*.json"):  # without manifests name and content say the iteration
        manifest.unlink()
    assert newest_whole(folder) == folder / "model_0000009.pth"
    (folder / "model_0000009.pth").unlink()
    write_tensors(folder / "model_final.pth", {**content(2.0), "iteration": 7})
    assert newest_whole(folder) == folder / "model_final.pth"


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"sha256": 3, "bytes": 4, "iteration": null}'])
def test_a_broken_manifest_counts_as_none(manifest: str, folder: Path) -> None:
    manifest_path(folder / NAME).write_text(manifest)
    assert newest_whole(folder) == folder / NAME
    assert value_in(folder / NAME) == 1.0


def test_a_damaged_newest_is_passed_over_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(folder / "model_0000009.pth", content(2.0), iteration=9, newest=True)
    assert newest_whole(folder) == folder / "model_0000009.pth" and not caplog.records
    with (folder / "model_0000009.pth").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff")
    assert newest_whole(folder) == folder / NAME
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"checkpoint {folder}/model_0000009.pth is damaged; looking for an older one"


def test_a_newest_that_the_disk_cannot_read_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(folder / "model_0000009.pth", content(2.0), iteration=9)

    def read(path: Path) -> str:
        if path.name != NAME:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return file_digest(path)

    monkeypatch.setattr("imgcls.checkpoint.manifest.file_digest", read)
    assert newest_whole(folder) == folder / NAME


def test_nothing_but_damaged_ones_is_an_error(folder: Path) -> None:
    """Starting again at iteration 0 would overwrite what could still be restored."""
    write_checkpoint(folder / "model_0000009.pth", content(2.0), iteration=9)
    for name in (NAME, "model_0000009.pth"):
        (folder / name).write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"none of the checkpoints in .* is whole \(model_0000009\.pth, {NAME}\)"):
        newest_whole(folder)
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(folder / "gone.pth")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        newest_whole(folder)


def test_files_of_stock_detectron2_are_accepted(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    stock = DetectionCheckpointer(model, str(tmp_path))
    stock.save("model_0000004", iteration=4)
    stock.save("model_final", iteration=9)
    assert newest_whole(tmp_path) == tmp_path / "model_final.pth"
    ours = nn.Linear(3, 2)
    assert SafeCheckpointer(ours, str(tmp_path)).resume_or_load("", resume=True)["iteration"] == 9
    assert torch.equal(ours.weight, model.weight)
    (tmp_path / "model_final.pth").write_bytes((tmp_path / "model_final.pth").read_bytes()[:-30])
    assert newest_whole(tmp_path) == tmp_path / "model_0000004.pth"


def test_stock_detectron2_reads_ours(folder: Path) -> None:
    model = nn.Linear(3, 2)
    SafeCheckpointer(model, str(folder)).save("model_0000009", iteration=9)
    assert (folder / "last_checkpoint").read_text() == "model_0000009.pth"
    theirs = nn.Linear(3, 2)
    assert DetectionCheckpointer(theirs, str(folder)).resume_or_load("", resume=True)["iteration"] == 9
    assert torch.equal(theirs.weight, model.weight)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for number in ("0000004", "0000009", "9999999", "10000004", "final", "best"):
        write_checkpoint(tmp_path / f"model_{number}.pth", content(size=2))
    prune(tmp_path, 2)
    kept = ["model_10000004.pth", "model_9999999.pth", "model_best.pth", "model_final.pth"]
    assert names_in(tmp_path) == sorted([*kept, *(f"{name}.json" for name in kept)])
    prune(tmp_path, 3)
    assert len(names_in(tmp_path)) == 8
    prune(tmp_path, 1)
    assert names_in(tmp_path)[0] == "model_10000004.pth" and len(names_in(tmp_path)) == 6


def test_sweep_takes_what_a_killed_writer_leaves_and_nothing_else(folder: Path) -> None:
    left = (f".{NAME}.123.tmp", f".{NAME}.json.7.tmp", ".last_checkpoint.123.tmp", ".per_class.csv.8.tmp")
    for name in (*left, ".mine.tmp", "notes.tmp"):
        (folder / name).write_text("left")
    sweep(folder)
    assert names_in(folder) == sorted([*WHOLE, ".mine.tmp", "notes.tmp"])


# ------------------------------------------------------------------------------------------------- hostile and foreign


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def pickled(path: Path, value: Any) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


@pytest.mark.filterwarnings("ignore")  # as an error torch's warning would stop what a user's run goes on to do
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt", ".pyth", ".ckpt", ".pth.tar"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_no_code_runs_from_a_file(
    how: str, suffix: str, forced: bool, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"evil{suffix}"
    value = {"model": {"a": torch.zeros(2)}, "extra": Canary(canary)}
    if how == "pickle":
        pickled(path, value)
    else:
        torch.save(value, path)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for read in (read_checkpoint, SafeCheckpointer(nn.Linear(1, 1)).load):
        with pytest.raises(ValueError, match=rf"evil{suffix}"):
            read(str(path))
    assert not canary.exists()


def test_the_canary_does_sing(canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: what stock detectron2 does with a .pkl, and torch with the variable set."""
    path = pickled(tmp_path / "evil.pkl", {"model": {}, "__author__": Canary(canary)})
    DetectionCheckpointer(nn.Linear(1, 1)).load(str(path))
    assert canary.is_dir()
    canary.rmdir()
    torch.save({"extra": Canary(canary)}, tmp_path / "evil.pth")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(UserWarning, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        torch.load(tmp_path / "evil.pth")
    assert canary.is_dir()


@pytest.mark.parametrize(
    "what",
    [
        *("posix system", "builtins eval", "builtins getattr", "functools partial", "importlib import_module"),
        *("numpy load", "numpy fromfile", "numpy.core.multiarray fromfile", "numpy._core.multiarray frombuffer"),
    ],
)
def test_a_pickle_may_ask_for_arrays_only(what: str, tmp_path: Path) -> None:
    module, name = what.split()
    path = tmp_path / "x.pkl"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(ValueError, match=rf"refusing .*x\.pkl: it asks for {module}\.{name}, which is not an array"):
        read_checkpoint(path)


class Body(nn.Module):
    """A layer by the name that Caffe2's model zoo gives a classifier's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1000 = nn.Linear(3, 2)


def arrays_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_a_zoo_file_with_an_author(tmp_path: Path) -> None:
    theirs, ours = Body(0), Body(1)
    pickled(tmp_path / "zoo.pkl", {"model": arrays_of(theirs), "__author__": "somebody", "step": 3})
    rest = SafeCheckpointer(ours).load(str(tmp_path / "zoo.pkl"))
    assert torch.equal(ours.fc1000.weight, theirs.fc1000.weight)
    assert rest == {"__author__": "somebody", "step": 3}


@pytest.mark.parametrize("nested", [False, True])
def test_a_caffe2_file_loads_as_in_stock_detectron2(
    nested: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours, stock = Body(0), Body(1), Body(2)
    blobs = {"fc1000_w": arrays_of(theirs)["fc1000.weight"], "fc1000_b": arrays_of(theirs)["fc1000.bias"]}
    blobs["fc1000_w_momentum"] = np.zeros((2, 3), np.float32)
    pickled(tmp_path / "c2.pkl", {"blobs": blobs} if nested else blobs)
    SafeCheckpointer(ours).load(str(tmp_path / "c2.pkl"))
    DetectionCheckpointer(stock).load(str(tmp_path / "c2.pkl"))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor) and torch.equal(stock.state_dict()[name], tensor)
    assert "momentum" not in caplog.text  # not among the unexpected: no model has it


def test_pickles_of_python_2_and_of_numpy_1(tmp_path: Path) -> None:
    """As the zoo's older files are: text as bytes, and numpy.core for what is numpy._core today."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    modern = pickle.dumps({"a": array, "scale": np.float64(0.5)}, protocol=2)
    old = modern.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert old != modern
    (tmp_path / "old.pkl").write_bytes(old)
    model = read_checkpoint(tmp_path / "old.pkl")["model"]
    np.testing.assert_array_equal(model["a"], array)
    assert model["scale"] == 0.5
    (tmp_path / "py2.pkl").write_bytes(b"(dp0\nS'caf\\xe9'\np1\nI3\ns.")
    assert read_checkpoint(tmp_path / "py2.pkl")["model"] == {"café": 3}


def test_safetensors_are_read_and_a_torn_file_is_refused(tmp_path: Path) -> None:
    theirs, ours = Body(0), Body(1)
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    SafeCheckpointer(ours).load(str(tmp_path / "x.safetensors"))
    assert torch.equal(ours.fc1000.weight, theirs.fc1000.weight)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"cannot read .*x\.safetensors"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_files_of_pycls_are_read(tmp_path: Path) -> None:
    theirs, ours = Body(0), Body(1)
    torch.save({"epoch": 3, "model_state": theirs.state_dict()}, tmp_path / "x.pyth")
    SafeCheckpointer(ours).load(str(tmp_path / "x.pyth"))
    assert torch.equal(ours.fc1000.weight, theirs.fc1000.weight)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Body(5)


def test_matching_heuristics_by_name(tmp_path: Path) -> None:
    """detectron2's way to load a bare body into a detector: asked for in the path."""
    body = Body(0)
    torch.save({"model": body.state_dict()}, tmp_path / "body.pth")
    plain, matched = Detector(), Detector()
    SafeCheckpointer(plain).load(str(tmp_path / "body.pth"))
    SafeCheckpointer(matched).load(f"{tmp_path}/body.pth?matching_heuristics=True")
    assert torch.equal(matched.backbone.fc1000.weight, body.fc1000.weight)
    assert not torch.equal(plain.backbone.fc1000.weight, body.fc1000.weight)


def test_a_failed_load_does_not_spoil_the_next(tmp_path: Path) -> None:
    torch.save({"model": Body(0).state_dict()}, tmp_path / "x.pth")
    ours, stock = SafeCheckpointer(Body(1)), DetectionCheckpointer(Body(1))
    for checkpointer in (ours, stock):
        with pytest.raises(ValueError, match="query"):
            checkpointer.load(f"{tmp_path}/x.pth?heuristics=1")
    ours.load(str(tmp_path / "x.pth"))
    with pytest.raises(AssertionError):  # detectron2's own
        stock.load(str(tmp_path / "x.pth"))


def test_saving_is_for_the_first_rank_and_a_folder(tmp_path: Path) -> None:
    SafeCheckpointer(nn.Linear(1, 1), str(tmp_path), save_to_disk=False).save("model_0000004")
    SafeCheckpointer(nn.Linear(1, 1)).save("model_0000004")
    assert names_in(tmp_path) == []
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    SafeCheckpointer(nn.Linear(1, 1), str(tmp_path), optimizer=optimizer).save("model_0000004", iteration=4, best=0.25)
    assert names_in(tmp_path) == WHOLE
    read = read_checkpoint(tmp_path / NAME)
    assert read["optimizer"]["param_groups"][0]["lr"] == 0.5 and (read["iteration"], read["best"]) == (4, 0.25)


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"there is no file {tmp_path}/gone\.pth; change what names it"):
        read_checkpoint(tmp_path / "gone.pth")
    (tmp_path / "x.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot tell what kind of file .*x\.h5 is; allowed endings: \.pth, .*\.pkl"):
        read_checkpoint(tmp_path / "x.h5")
    for value, kind in (([torch.zeros(1)], "list"), ({"model": torch.zeros(1)}, "Tensor"), (torch.zeros(1), "Tensor")):
        torch.save(value, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=rf"x\.pth holds a {kind}, not a dict of tensors"):
            read_checkpoint(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pkl holds a list, not a dict"):
        read_checkpoint(pickled(tmp_path / "x.pkl", [1]))


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    """Evaluating them would give the accuracy of chance without a word."""
    torch.save({"model": {"a.weight": torch.tensor([1.0, float("nan")]), "n": torch.tensor(1)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds NaN in a\.weight"):
        read_checkpoint(tmp_path / "x.pth")
    assert "a.weight" in read_checkpoint(tmp_path / "x.pth", check_digest=False)["model"]


def test_a_bare_state_dict_and_mmap(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pth")
    assert torch.equal(read_checkpoint(tmp_path / "x.pth", mmap=True)["model"]["a"], torch.ones(3))


def test_a_manifest_that_belongs_to_another_file(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other.pth", content(2.0))
    shutil.copy(manifest_path(tmp_path / "other.pth"), manifest_path(folder / NAME))
    with pytest.raises(ValueError, match=rf"is damaged: its bytes are not those that {NAME}\.json was written for"):
        read_checkpoint(folder / NAME)


# ---------------------------------------------------------------------------------------------------------- loading


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


NAMES = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")  # and num_batches_tracked


def test_weights_of_the_same_network_are_loaded_whole_counters_too() -> None:
    theirs, ours = network(0), network(1)
    theirs(torch.randn(4, 3))
    report = load_weights(ours, theirs.state_dict())
    assert (report.loaded, report.missing, report.unexpected, report.wrong_shape, report.new) == (NAMES, (), (), (), ())
    assert report.complete
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert int(ours.get_buffer("1.num_batches_tracked")) == 1


def test_a_file_without_counters_is_complete() -> None:
    weights = network(0).state_dict()
    del weights["1.num_batches_tracked"]
    assert load_weights(network(1), weights).complete


MISFITS: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
    "missing": (lambda w: w.pop("0.bias"), {"missing": ("0.bias",)}),
    "unexpected": (lambda w: w.update({"2.weight": torch.zeros(1)}), {"unexpected": ("2.weight",)}),
    "no tensor": (lambda w: w.update({"epoch": 3}), {"unexpected": ("epoch",)}),
    "no tensor where one should be": (
        lambda w: w.update({"0.bias": 3.0}),
        {"missing": ("0.bias",), "unexpected": ("0.bias",)},
    ),
    "transposed": (
        lambda w: w.update({"0.weight": w["0.weight"].t()}),
        {"wrong_shape": (("0.weight", (3, 2), (2, 3)),)},
    ),
    "all three": (
        lambda w: (w.pop("1.bias"), w.update({"x": torch.zeros(1), "0.bias": torch.zeros(1)})),
        {"missing": ("1.bias",), "unexpected": ("x",), "wrong_shape": (("0.bias", (1,), (2,)),)},
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_on_a_misfit_nothing_is_copied(case: str) -> None:
    spoil, expected = MISFITS[case]
    ours, weights = network(1), dict(network(0).state_dict())
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    spoil(weights)
    report = load_weights(ours, weights)
    for kind in ("missing", "unexpected", "wrong_shape"):
        assert getattr(report, kind) == expected.get(kind, ()), kind
    assert not report.complete
    with pytest.raises(ValueError, match=r"weights from x\.pth do not fit: .*Choose others"):
        report.require_complete("x.pth", "Choose others")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_nothing_loaded_is_no_success() -> None:
    report = load_weights(network(), {}, may_be_new=lambda name: True)
    assert not report.complete and report.new == NAMES and report.loaded == ()


def test_what_may_be_new() -> None:
    ours, weights = network(1), network(0).state_dict()
    head = {name: weights.pop(name) for name in list(weights) if name.startswith("1.")}
    kept = ours.get_parameter("1.weight").clone()
    assert not load_weights(ours, weights).complete
    report = load_weights(ours, weights, may_be_new=lambda name: name.startswith("1."))
    assert report.complete and report.loaded == NAMES[:2] and report.new == NAMES[2:]
    assert torch.equal(ours.get_parameter("0.weight"), network(0).get_parameter("0.weight"))
    assert torch.equal(ours.get_parameter("1.weight"), kept)
    both = load_weights(network(1), {**weights, **head}, may_be_new=lambda name: name.startswith("1."))
    assert both.loaded == NAMES and both.new == ()  # what is in the file is loaded even if it could be new


def test_numpy_arrays_are_weights(tmp_path: Path) -> None:
    path = pickled(tmp_path / "x.pkl", {"model": arrays_of(network(0)), "__author__": "a"})
    ours = network(1)
    assert load_weights(ours, read_checkpoint(path)["model"]).complete
    assert torch.equal(ours.get_parameter("0.weight"), network(0).get_parameter("0.weight"))


def test_trunk_weights_are_those_under_backbone_without_counters() -> None:
    names = ("backbone.res2.weight", "backbone.stem.bn.num_batches_tracked", "head.weight", "not_backbone.weight")
    given = {name: torch.tensor([float(index)]) for index, name in enumerate(names)}
    assert trunk_weights(given) == {"res2.weight": given["backbone.res2.weight"]}
