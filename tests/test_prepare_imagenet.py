"""ImageNet's archives in miniature: nested train tars, a flat val tar, a devkit with numbers of its own."""

from __future__ import annotations

import io
import os
import shutil
import signal
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from imgcls.data import imagenet_archives, open_source
from imgcls.data.archives import ArchiveError
from imgcls.data.datasets import known_sets
from imgcls.data.imagenet_archives import DEVKIT, TRAIN, VAL, Counts, prepare, read_devkit

# In the devkit's order, which is not the sorted one; the last is an inner node of WordNet. Pictures: of training.
SYNSETS = [("n02000003", 0, 4), ("n02000001", 0, 2), ("n02000002", 0, 3), ("n01000000", 3, 0)]
TRUTH = [2, 1, 3, 1, 2]  # ILSVRC2012_ID of each validation picture
CLASSES = ("n02000001", "n02000002", "n02000003")
COUNTS = Counts(3, 9, 5)


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number * 20, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as bundle:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            bundle.addfile(member, io.BytesIO(content))
    return out.getvalue()


def devkit(synsets: list[tuple[str, int, int]] = SYNSETS, truth: list[int] = TRUTH) -> bytes:
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8"), ("num_train_images", "f8")]
    rows = [(number, wnid, children, count) for number, (wnid, children, count) in enumerate(synsets, start=1)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    top = "ILSVRC2012_devkit_t12"
    return tar(
        {
            f"{top}/readme.txt": b"...",
            f"{top}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in truth).encode(),
            f"{top}/data/meta.mat": meta.getvalue(),
        },
        "w:gz",
    )


def train_files(synsets: list[tuple[str, int, int]] = SYNSETS) -> dict[str, bytes]:
    return {
        f"{wnid}.tar": tar({f"{wnid}_{10 * index}.JPEG": jpeg(index) for index in range(count)})
        for wnid, children, count in synsets
        if not children
    }


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / TRAIN).write_bytes(tar(train_files()))
    (folder / VAL).write_bytes(tar({f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(n) for n in range(1, 6)}))
    (folder / DEVKIT).write_bytes(devkit())
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which stays."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def quiet(line: str) -> None:
    pass


EXPECTED = {
    **{f"train/{wnid}/{wnid}_{10 * i}.JPEG": jpeg(i) for wnid, _, count in SYNSETS[:3] for i in range(count)},
    # By hand from TRUTH and the order of SYNSETS.
    "val/n02000001/ILSVRC2012_val_00000001.JPEG": jpeg(1),
    "val/n02000003/ILSVRC2012_val_00000002.JPEG": jpeg(2),
    "val/n02000002/ILSVRC2012_val_00000003.JPEG": jpeg(3),
    "val/n02000003/ILSVRC2012_val_00000004.JPEG": jpeg(4),
    "val/n02000001/ILSVRC2012_val_00000005.JPEG": jpeg(5),
    "imagenet.json": b'{"classes": 3, "train": 9, "val": 5}\n',
}


def test_the_folders(archives: Path, tmp_path: Path, tool: Callable[..., Any]) -> None:
    out = tmp_path / "imagenet"
    words = ("scripts/prepare_imagenet.py", "--archives", archives, "--output", out, "--counts", 3, 9, 5)
    done = tool(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "train: 3 of 3 classes",
        "val: 5 of 5 pictures",
        f"{out}: 9 training and 5 validation pictures of 3 classes",
    ]
    assert tree(out) == EXPECTED
    assert tool(*words).stdout == f"{out}: 9 training and 5 validation pictures of 3 classes, there already\n"


def test_what_was_built_is_the_set_of_that_name(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(archives, tmp_path / "out", expected=COUNTS, say=quiet)
    with pytest.raises(
        ValueError, match=r"imagenet_train has 9 pictures of 3 classes .* should have 1,281,167 of 1,000"
    ):
        open_source("imagenet_train", root=str(tmp_path / "out"))
    row = known_sets.KNOWN_SETS["imagenet"]
    monkeypatch.setitem(known_sets.KNOWN_SETS, "imagenet", type(row)(row.reader, {"train": (9, 3), "val": (5, 3)}))
    train = open_source("imagenet_train", root=str(tmp_path / "out"))
    val = open_source("imagenet_val", root=str(tmp_path / "out"), classes=train.classes)
    assert train.classes == val.classes == CLASSES
    assert np.bincount(train.labels).tolist() == [2, 3, 4]
    assert [(os.path.basename(s["file_name"])[-6], s["label"]) for s in val] == [
        *(("1", 0), ("5", 0), ("3", 1), ("2", 2), ("4", 2)),
    ]


def test_the_devkits_numbers_are_not_the_sorted_order(archives: Path) -> None:
    found = read_devkit(archives / DEVKIT, COUNTS)
    assert list(found.train.items()) == [("n02000003", 4), ("n02000001", 2), ("n02000002", 3)]
    assert found.val == ["n02000001", "n02000003", "n02000002", "n02000003", "n02000001"]


# -------------------------------------------------------------------------------------------------- killed and resumed


class _CutOffError(BaseException):
    """Like KeyboardInterrupt, it is caught by nobody."""


def run_until(limit: int, archives: Path, out: Path, stop: Callable[[], None]) -> None:
    """Prepare with ``stop`` called before file ``limit`` is written, half of it being there already."""
    written = 0

    def counted(entry: Any, path: Path, name: str) -> int:
        nonlocal written
        if written == limit:
            path.write_bytes(b"half a pictu")
            stop()
        written += 1
        return original(entry, path, name)

    original = imagenet_archives.write
    imagenet_archives.write = counted  # type: ignore[assignment]
    try:
        prepare(archives, out, expected=COUNTS, say=quiet)
    finally:
        imagenet_archives.write = original


def killed_at(limit: int, archives: Path, out: Path) -> int:
    """The same in a process that is killed; its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside torch's threads
        child = os.fork()
    if child == 0:
        try:
            run_until(limit, archives, out, lambda: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("limit", range(14))
def test_killed_before_any_file_and_resumed(limit: int, archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert killed_at(limit, archives, out) == -signal.SIGKILL
    assert not (out / "val").exists() and not (out / "imagenet.json").exists()
    assert (out / "train").is_dir() == (limit >= 9)  # whole, or not there
    finished = {path.name for path in (out / ".train.partial").glob("n*")}
    assert len(finished) == (0 if limit >= 9 else sum(limit >= end for end in (4, 6, 9)))
    lines: list[str] = []
    assert prepare(archives, out, expected=COUNTS, say=lines.append)
    assert tree(out) == EXPECTED
    assert any("going on behind" in line for line in lines) == bool(finished)
    assert {path.name for path in out.iterdir()} == {"train", "val", "imagenet.json", ".lock"}


def test_killed_again_and_again(archives: Path, tmp_path: Path) -> None:
    """Each life is long enough for the largest class, and no longer."""
    lives = 1
    while killed_at(4, archives, tmp_path / "out") == -signal.SIGKILL:
        lives += 1
        assert lives < 10
    assert lives > 2
    assert not prepare(archives, tmp_path / "out", expected=COUNTS, say=quiet)
    assert tree(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize("limit", [0, 5, 11])
def test_an_interruption_leaves_no_half_class(limit: int, archives: Path, tmp_path: Path) -> None:
    def stop() -> None:
        raise _CutOffError

    with pytest.raises(_CutOffError):
        run_until(limit, archives, tmp_path / "out", stop)
    assert list((tmp_path / "out").glob(".train.partial/.*")) == []
    prepare(archives, tmp_path / "out", expected=COUNTS, say=quiet)
    assert tree(tmp_path / "out") == EXPECTED


def test_finished_classes_are_not_written_again(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_at(6, archives, out)
    before = {path: path.stat().st_mtime_ns for path in (out / ".train.partial").glob("n*/*")}
    assert len(before) == 6
    prepare(archives, out, expected=COUNTS, say=quiet)
    after = {path: path.stat().st_mtime_ns for path in (out / "train").glob("n*/*")}
    assert {p.name: t for p, t in before.items()}.items() <= {p.name: t for p, t in after.items()}.items()


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(archives: Path, out: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        prepare(archives, out, **{"expected": COUNTS, "say": quiet, **options})
    assert not any((out / name).exists() for name in ("val", "imagenet.json"))


def test_the_published_counts_are_the_default(archives: Path, tmp_path: Path) -> None:
    assert Counts() == Counts(1000, 1_281_167, 50_000)
    refused(
        archives, tmp_path / "out", r"speaks of 3 classes and 5 val.* expected are 1,000 and 50,000", expected=Counts()
    )
    refused(
        archives, tmp_path / "out", r"has 9 pictures, expected are 10 \(0 classes differ", expected=Counts(3, 10, 5)
    )


def test_an_archive_that_is_absent(archives: Path, tmp_path: Path, tool: Callable[..., Any]) -> None:
    (archives / VAL).unlink()
    done = tool("scripts/prepare_imagenet.py", "--archives", archives, "--output", tmp_path / "out")
    told = f"error: there is no file {archives / VAL}; fetch it from image-net.org or change --archives\n"
    assert (done.returncode, done.stderr, (tmp_path / "out").exists()) == (2, told, False)


def test_digests_are_checked_when_asked_for(archives: Path, tmp_path: Path, tool: Callable[..., Any]) -> None:
    done = tool("scripts/prepare_imagenet.py", "--archives", archives, "--output", tmp_path / "out", "--check-digests")
    assert done.returncode == 2
    assert f"{archives / TRAIN} is not the file that it should be" in done.stderr
    assert "expected md5:1d675b47d978889d74fa0da5fadfb00e" in done.stderr


def test_a_class_with_a_picture_less_is_built_again_from_a_better_archive(archives: Path, tmp_path: Path) -> None:
    out, files = tmp_path / "out", train_files()
    whole = (archives / TRAIN).read_bytes()
    files["n02000002.tar"] = tar({"n02000002_0.JPEG": jpeg(0)})
    (archives / TRAIN).write_bytes(tar(files))
    refused(archives, out, r"has 7 pictures, expected are 9 \(1 classes .*: n02000002 1 instead of 3\)")
    assert not (out / "train").exists()
    (archives / TRAIN).write_bytes(whole)
    prepare(archives, out, expected=COUNTS, say=quiet)
    assert tree(out) == EXPECTED


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda files: files.pop("n02000001.tar"), "lacks 1 classes, the first is n02000001"),
        (
            lambda files: files.update({"n09999999.tar": b""}),
            r"has 'n09999999\.tar', which is the tar file of no class",
        ),
        (lambda files: files.update({"n02000001.tar": b"no tar"}), r"n02000001\.tar\) is damaged or no archive"),
        (
            lambda files: files.update({"n02000001.tar": files["n02000001.tar"][:1500]}),
            r"n02000001\.tar\) is damaged or no archive",
        ),
        (
            lambda files: files.update({"n02000001.tar": tar({"../n02000001_0.JPEG": b""})}),
            "lies outside the archive's own folder",
        ),
        (lambda files: files.update({"n02000001.tar": tar({"deep/n02000001_0.JPEG": b""})}), "without folders"),
    ],
)
def test_a_training_archive_that_is_wrong(
    change: Callable[..., Any], match: str, archives: Path, tmp_path: Path
) -> None:
    files = train_files()
    change(files)
    (archives / TRAIN).write_bytes(tar(files))
    refused(archives, tmp_path / "out", match)
    assert not (tmp_path / "out" / "train").exists()


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_training_archive_that_is_cut_off(keep: float, archives: Path, tmp_path: Path) -> None:
    whole = tar(train_files())
    end = len(whole.rstrip(b"\0"))
    (archives / TRAIN).write_bytes(whole[: int(keep * end)])
    refused(archives, tmp_path / "out", "is damaged or no archive")
    (archives / TRAIN).write_bytes(whole)
    prepare(archives, tmp_path / "out", expected=COUNTS, say=quiet)
    assert tree(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([1, 2, 3, 4], "has 4 pictures, expected are 5"),
        ([1, 2, 3, 4, 6], "val_00000006.JPEG', which is none of its pictures"),
        ([1, 2, 3, 4, 4], "val_00000004.JPEG', which is none of its pictures"),
    ],
)
def test_a_validation_archive_that_is_wrong(names: list[int], match: str, archives: Path, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as bundle:
        for number in names:
            bundle.addfile(tarfile.TarInfo(f"ILSVRC2012_val_{number:08d}.JPEG"))
    (archives / VAL).write_bytes(out.getvalue())
    refused(archives, tmp_path / "out", match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (devkit(truth=[1, 2, 3, 4, 1]), "the label 4, which is no class"),  # the inner node's number
        (devkit(truth=[1, 2]), "3 classes and 2 validation pictures"),
        (devkit([("../../evil", 0, 1), *SYNSETS[1:]]), "'../../evil' is no WordNet id"),
        (tar({"data/meta.mat": b"MATLAB 5.0"}, "w:gz"), "has no file ILSVRC2012_validation_ground_truth.txt"),
        (
            tar({"meta.mat": b"MATLAB 5.0", "ILSVRC2012_validation_ground_truth.txt": b"1"}, "w:gz"),
            "meta.mat in .* cannot be read",
        ),
    ],
)
def test_a_devkit_that_is_wrong(content: bytes, match: str, archives: Path, tmp_path: Path) -> None:
    (archives / DEVKIT).write_bytes(content)
    refused(archives, tmp_path / "out", match)
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there already needs no room again."""
    pictures = sum(len(content) for content in train_files().values()) + (archives / VAL).stat().st_size

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))

    leave(pictures)  # less than with what the file system takes
    refused(archives, tmp_path / "out", r"needs 0\.0 GB more, its disk has 0\.0 GB left; make room")
    assert not (tmp_path / "out" / ".train.partial").exists()
    leave(int(1.03 * pictures))
    killed_at(4, archives, tmp_path / "out")
    leave(pictures)
    prepare(archives, tmp_path / "out", expected=COUNTS, say=quiet)


def test_two_at_once(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with imagenet_archives._alone(out), pytest.raises(ValueError, match=f"another process is preparing {out}"):
        prepare(archives, out, expected=COUNTS, say=quiet)
    prepare(archives, out, expected=COUNTS, say=quiet)


def test_a_full_disk_is_no_damaged_archive(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(OSError, match="No space left") as caught:
            prepare(archives, tmp_path / "out", expected=COUNTS, say=quiet)
    assert not isinstance(caught.value, ArchiveError)
    assert list((tmp_path / "out" / ".train.partial").iterdir()) == []
    prepare(archives, tmp_path / "out", expected=COUNTS, say=quiet)
