"""Damaged files among good ones: what loaders, training and evaluation make of them, with either policy."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_images import KINDS, ODD_NAMES
from conftest import Done, write_image_folder
from detectron2.config import CfgNode
from detectron2.utils import comm
from PIL import Image

import imgcls
from imgcls.data import build_test_loader, build_train_loader
from imgcls.data.datasets import FolderSource
from imgcls.evaluation import ClassificationEvaluator
from imgcls.structures import Batch

READABLE = [name for name, kind in KINDS.items() if kind.pixels is not None]
REFUSED = [name for name, kind in KINDS.items() if kind.pixels is None]


# ------------------------------------------------------------------------------------------------------------- loaders


@pytest.fixture
def cfg() -> CfgNode:
    """Four pictures a batch, bad ones replaced."""
    made = imgcls.get_config("Base-ClsNet.yaml")
    made.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "SEED", 3, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 12),
            *("INPUT.TRAIN_SIZE", 8, "INPUT.TEST_SIZE", 8, "INPUT.TEST_RESIZE", 8, "TEST.IMS_PER_BATCH", 4),
            *("INPUT.TRAIN_TRANSFORMS", [["resize"], ["horizontal_flip", 0.5]], "DATALOADER.NUM_WORKERS", 0),
            *("DATALOADER.ON_ERROR", "skip", "DATALOADER.MAX_BAD_SHARE", 0.5),
        ]
    )
    return made


@pytest.fixture
def folder(tmp_path: Path) -> FolderSource:
    """Twenty pictures, of which numbers 2, 7 and 13 are damaged, each in another way."""
    made = FolderSource(write_image_folder(tmp_path / "data", {"ant": 10, "bee": 10}, side=10))
    for index, name in ((2, "no byte"), (7, "50 % of a PNG"), (13, "PNG, a changed byte, checksum mended")):
        Path(made.path(index)).write_bytes(KINDS[name].make())  # type: ignore[call-arg, arg-type]
    return made


BAD = {2, 7, 13}


def batches(cfg: CfgNode, source: Any, start: int = 0) -> list[Any]:
    return list(build_train_loader(cfg, source, start=start))


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("images", "targets", "ids"))


def test_replacements_are_the_same_whatever_the_workers_ranks_and_restarts(
    cfg: CfgNode, folder: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = batches(cfg, folder)
    ids = list(chain.from_iterable(batch.ids.tolist() for batch in alone))
    assert len(ids) == 48 and not BAD & set(ids)
    cfg.DATALOADER.ON_ERROR = "raise"
    with pytest.raises(ValueError, match="cannot read the image"):
        batches(cfg, folder)
    cfg.DATALOADER.ON_ERROR = "skip"
    for workers in (1, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        assert all(same(a, b) for a, b in zip(alone, batches(cfg, folder), strict=True))
    cfg.DATALOADER.NUM_WORKERS = 0
    for start in (1, 5):
        assert all(same(a, b) for a, b in zip(alone[start:], batches(cfg, folder, start), strict=True))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(batches(cfg, folder))
    for whole, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_only_the_bad_ones_are_replaced(cfg: CfgNode, folder: FolderSource) -> None:
    """By others in other epochs; the places of good ones keep what they would have held."""
    ids = torch.cat([batch.ids for batch in batches(cfg, folder)]).tolist()
    for index in BAD:
        Image.new("RGB", (10, 10)).save(folder.path(index))
    mended = torch.cat([batch.ids for batch in batches(cfg, folder)]).tolist()
    assert set(range(20)) == set(mended)
    replaced = [(before, after) for before, after in zip(mended, ids, strict=True) if before != after]
    assert len(replaced) >= 6 and {before for before, _ in replaced} == BAD
    assert len({after for _, after in replaced}) > 2


def test_each_bad_file_is_said_once_and_all_are_counted(
    cfg: CfgNode, folder: FolderSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="imgcls")
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        caplog.clear()
        batches(cfg, folder)  # two epochs and more
        said = [record.getMessage() for record in caplog.records]
        for index in BAD:
            assert sum(f"left out: cannot read the image {folder.path(index)}: " in line for line in said) == 1
        assert len(said) == 4 and said[-1] == f"{folder.name}: 3 of 20 files could not be read"


def test_evaluation_replaces_nothing(cfg: CfgNode, folder: FolderSource, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="imgcls")
    for workers in (0, 1):
        cfg.DATALOADER.NUM_WORKERS = workers
        loader = build_test_loader(cfg, folder)
        for _ in range(2):  # evaluations, of which the second has nothing new to say
            seen = torch.cat([batch.ids for batch in loader]).tolist()
            assert seen == [index for index in range(20) if index not in BAD]
            assert loader.left_out == 3
        assert len(caplog.records) == 4
        caplog.clear()


@pytest.mark.parametrize("build", [build_train_loader, build_test_loader])
def test_too_many_bad_ones_end_the_run(build: Callable[..., Any], cfg: CfgNode, folder: FolderSource) -> None:
    cfg.DATALOADER.MAX_BAD_SHARE = 0.15  # three of twenty are just allowed
    list(build(cfg, folder))
    cfg.DATALOADER.MAX_BAD_SHARE = 0.14
    message = r"^3 of 20 images cannot be read, more than the share DATALOADER\.MAX_BAD_SHARE 0\.14; the last one: .*"
    with pytest.raises(ValueError, match=message):
        list(build(cfg, folder))


def test_nothing_but_bad_files(cfg: CfgNode, folder: FolderSource) -> None:
    for index in range(20):
        Path(folder.path(index)).write_bytes(b"")
    cfg.DATALOADER.MAX_BAD_SHARE = 1.0
    with pytest.raises(ValueError, match=r"^100 files in a row cannot be read, the first one: .*check DATASETS\.TRAIN"):
        batches(cfg, folder)
    loader = build_test_loader(cfg, folder)
    assert list(loader) == [] and loader.left_out == 20


@pytest.mark.parametrize(("seen", "left_out"), [((4, 3), (1, 2)), ((7, 0), (0, 3))])
def test_the_missing_are_counted_over_the_ranks(
    seen: tuple[int, int], left_out: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen and missing together are the set, also where a rank could read nothing; a lost one is noticed."""

    def evaluated(expected: int) -> float:
        shares: list[Any] = []
        monkeypatch.setattr(comm, "all_gather", lambda share: shares.append(share) or shares)
        for number, missing in zip(seen, left_out, strict=True):
            evaluator = ClassificationEvaluator(expected if shares else number + missing, 2)
            if number:
                batch = Batch(torch.zeros(number, 3, 1, 1), torch.zeros(number, dtype=torch.int64))
                evaluator.process(batch, torch.tensor([[1.0, 0.0]]).repeat(number, 1))
            evaluator.missing = missing
            figures = evaluator.evaluate()["classification"]
        assert figures["top1"] == 100
        return figures["missing"]

    assert evaluated(10) == 3
    with pytest.raises(RuntimeError, match="evaluated 7 images of 11; the loaders lost or doubled some"):
        evaluated(11)


# ----------------------------------------------------------------------------------------------------------- commands


def corpus_folder(root: Path, good: int, bad: int) -> tuple[Path, int]:
    """train/ and val/ with two classes, ``good`` pictures and ``bad`` kinds of damage; and how many files each has."""
    every = len(REFUSED) // bad if bad else 1
    kinds = [KINDS[name] for name in REFUSED[::every][:bad]]
    for split in ("train", "val"):
        write_image_folder(root / split, {"ant": good // 2, "bee": good - good // 2}, side=16)
        for index, kind in enumerate(kinds):
            target = root / split / ("ant", "bee")[index % 2]
            target.mkdir(parents=True, exist_ok=True)
            kind.put(target, f"bad {index} ")
    return root, sum(not path.is_dir() for path in (root / "train").rglob("*"))


def words(data: Path, run: Path, policy: str, share: float) -> list[object]:
    return [
        *("--data", data, "--variant", "mobilenet_v1_0.25", "--output", run, "MODEL.DEVICE", "cpu"),
        *("SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_EPOCHS", 1.0, "SOLVER.WARMUP_EPOCHS", 0.0),
        *("DATALOADER.NUM_WORKERS", 1, "DATALOADER.ON_ERROR", policy, "DATALOADER.MAX_BAD_SHARE", share),
    ]


@pytest.mark.parametrize(("good", "bad"), [(99, 1), (90, 10)])
@pytest.mark.parametrize("script", ["tools/train_net.py", "tools/train_net_builtin.py"])
def test_training_and_evaluation_pass_over_bad_files(
    script: str, good: int, bad: int, tmp_path: Path, tool: Callable[..., Done]
) -> None:
    data, files = corpus_folder(tmp_path / "data", good, bad)
    done = tool(script, *words(data, tmp_path / "run", "skip", 0.2))
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"folder:{data}/train: {bad} of {files} files could not be read" in said
    assert f"folder:{data}/val: {bad} of {files} files could not be read" in said
    for name in {path.name for path in (data / "train").rglob("bad *")}:
        assert len(set(re.findall(rf"left out: cannot read the image \S*/train/.*{re.escape(name)}", said))) == 1
    assert f"classification/missing {bad}.0000" in done.stdout


def test_raise_ends_training_with_the_file(tmp_path: Path, tool: Callable[..., Done]) -> None:
    """What its header betrays before anything is written, what decoding shows when its turn comes."""
    data, _ = corpus_folder(tmp_path / "early", 20, 2)
    done = tool("tools/train_net.py", *words(data, tmp_path / "run", "raise", 0.1))
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert re.match(rf"error: cannot read the image {data}/train/.*bad \d", done.stderr.strip().splitlines()[-1])
    data = write_image_folder(tmp_path / "late", {"ant": 10, "bee": 10}, side=16)
    KINDS["PNG, a changed byte in its pixels"].put(data / "bee")
    done = tool("tools/train_net.py", *words(data, tmp_path / "run", "raise", 0.1))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: cannot read the image {data}/bee/x.png: broken data stream"), done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(("policy", "share"), [("raise", 0.1), ("skip", 0.1), ("skip", 1.0)])
def test_a_folder_of_nothing_but_damage(policy: str, share: float, tmp_path: Path, tool: Callable[..., Done]) -> None:
    data, _ = corpus_folder(tmp_path / "data", 0, len(REFUSED))
    done = tool("tools/train_net.py", *words(data, tmp_path / "run", policy, share))
    assert done.returncode == 2
    expected = {
        ("raise", 0.1): "error: cannot read the image ",
        ("skip", 0.1): r"error: \d+ of \d+ images cannot be read, more than the share DATALOADER.MAX_BAD_SHARE 0.1",
        ("skip", 1.0): "error: 100 files in a row cannot be read",
    }
    assert re.match(expected[policy, share], done.stderr.strip().splitlines()[-1])
    assert "Traceback" not in done.stderr + done.stdout


def test_every_readable_kind_is_trained_and_evaluated_on(tmp_path: Path, tool: Callable[..., Done]) -> None:
    """All of them, odd names too, with the policy that forgives nothing."""
    for split, label, number in ((a, b, c) for a in ("train", "val") for c, b in enumerate(("ant", "bee"))):
        folder = tmp_path / "data" / split / label
        folder.mkdir(parents=True)
        for index, name in enumerate(READABLE):
            if index % 2 == number:
                KINDS[name].put(folder, "" if name in ODD_NAMES else f"{index} ")
        KINDS["PNG"].put(folder, "one more ")
    done = tool("tools/train_net.py", *words(tmp_path / "data", tmp_path / "run", "raise", 0.0))
    assert done.returncode == 0, done.stderr
    assert "classification/top1" in done.stdout and "missing" not in done.stdout
