"""Buffers for batches: used again when nothing looks at them, and never before."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import pytest
import torch
from conftest import write_image_folder
from detectron2.config import CfgNode

from imgcls.config import get_config
from imgcls.data import batch_buffers, build_test_loader, build_train_loader, loaders, open_source
from imgcls.data.batch_buffers import BatchBuffers, BufferedDraws, ImageWriter, InBuffer, WithBuffers
from imgcls.data.samplers import Draw

IMAGES = [torch.full((3, 2, 2), value, dtype=torch.uint8) for value in (1, 2)]


def written(buffers: BatchBuffers, images: list[torch.Tensor]) -> torch.Tensor | None:
    """What arrives of ``images`` where they are written to a free buffer and sent; None if they are not in one."""
    # Pickles of our own making, here and below: what a queue does between a worker and its loader.
    draws = pickle.loads(pickle.dumps(BufferedDraws([Draw(0, 0)], (buffers.number, buffers.take()))))
    writer = ImageWriter(draws)
    placed = [writer.add(image) for image in images]
    for image, place in zip(images, placed, strict=True):
        assert torch.equal(image, place)
    sent = writer.images(len(images))
    return None if sent is None else pickle.loads(pickle.dumps(sent))


def test_a_buffer_is_free_again_when_no_tensor_looks_at_it() -> None:
    buffers = BatchBuffers(1, 24)
    first = written(buffers, IMAGES)
    assert first is not None and torch.equal(first, torch.stack(IMAGES))
    place = first.data_ptr()
    assert buffers.take() == -1
    last = first[1:, 0].numpy()  # a view of a view, as an array
    del first
    gc.collect()
    assert buffers.take() == -1 and (last == 2).all()
    del last
    second = written(buffers, [image + 5 for image in IMAGES])
    assert second is not None and second.data_ptr() == place and int(second[0, 0, 0, 0]) == 6


def test_what_does_not_fit_travels_without() -> None:
    buffers = BatchBuffers(8, 24)
    assert written(buffers, [*IMAGES, IMAGES[0]]) is None  # 36 bytes
    assert written(buffers, [image.float() for image in IMAGES[:1]]) is None
    assert written(buffers, [IMAGES[0], IMAGES[1][:, :1]]) is None  # two sizes
    assert written(buffers, []) is None
    fewer = written(buffers, IMAGES[:1])
    assert fewer is not None and fewer.shape == (1, 3, 2, 2)
    unknown = ImageWriter(BufferedDraws([Draw(0, 0)], (10**9, 0)))
    assert unknown.add(IMAGES[0]) is IMAGES[0] and unknown.images(1) is None
    plain = ImageWriter([Draw(0, 0)])
    assert plain.add(IMAGES[0]) is IMAGES[0] and plain.images(1) is None


def test_the_buffers_exist_before_the_first_batch_is_asked_for() -> None:
    """torch asks for an iterator, then starts its workers, then asks for another."""
    sampler = WithBuffers([[Draw(0, 0)], [Draw(0, 1)]], 1, 12)
    before = set(batch_buffers._known)
    iter(sampler)
    (number,) = set(batch_buffers._known) - before
    first, second = iter(sampler)
    assert (list(first), list(second)) == ([Draw(0, 0)], [Draw(0, 1)]) and len(sampler) == 2
    assert isinstance(first, BufferedDraws) and isinstance(second, BufferedDraws)
    assert (first.buffer, second.buffer) == ((number, 0), (number, -1))


def test_without_shared_memory_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    batches = [[Draw(0, 0)]]
    assert list(WithBuffers(batches, 1, 12)) == batches


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    write_image_folder(tmp_path, {"ant": 5, "bee": 5}, side=40)
    cfg = get_config("Base-ClsNet.yaml")
    cfg.MODEL.DEVICE, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = "cpu", 1, 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.TEST.IMS_PER_BATCH = 2, 12, 4
    cfg.INPUT.TRAIN_SIZE, cfg.INPUT.TEST_SIZE, cfg.INPUT.TEST_RESIZE = 32, 32, 0
    cfg.DATASETS.TRAIN = (f"folder:{tmp_path}",)
    return cfg


def test_batches_from_workers_are_those_made_without(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at one by one they lie in a few buffers; those who keep all of them keep all of them."""
    source = open_source(cfg.DATASETS.TRAIN[0])
    expected = [batch.images for batch in build_train_loader(cfg, source)]
    cfg.DATALOADER.NUM_WORKERS = 1
    arrived = []
    images = BatchBuffers.images
    monkeypatch.setattr(BatchBuffers, "images", lambda *args: arrived.append(args[1]) or images(*args))
    for batch, wanted in zip(build_train_loader(cfg, source), expected, strict=True):
        assert torch.equal(batch.images, wanted)
    assert len(arrived) == 12 and len(set(arrived)) <= loaders.PREFETCH + 3
    arrived.clear()
    kept = [batch.images for batch in build_train_loader(cfg, source)]
    assert 0 < len(arrived) == len(set(arrived)) <= loaders.PREFETCH + 3  # then there was none left
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_evaluation_passes_again_and_again(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(cfg.DATASETS.TRAIN[0])
    expected = torch.cat([batch.images for batch in build_test_loader(cfg, source)])
    cfg.DATALOADER.NUM_WORKERS = 1
    arrived = []
    images = BatchBuffers.images
    monkeypatch.setattr(BatchBuffers, "images", lambda *args: arrived.append(args[2][0]) or images(*args))
    loader = build_test_loader(cfg, source)
    for _ in range(3):
        assert torch.equal(torch.cat([batch.images for batch in loader]), expected)
    assert arrived == [4, 4, 2] * 3
    next(iter(loader))  # a pass that is given up
    assert torch.equal(torch.cat([batch.images for batch in loader]), expected)


@pytest.mark.parametrize(("free", "count"), [(2**40, 7), (2 * 3 * 32 * 32 * 2 * 2, 2), (1000, 0)])
def test_no_more_than_half_of_the_shared_memory(
    free: int, count: int, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "free_shared_memory", lambda: float(free))
    cfg.DATALOADER.NUM_WORKERS = 2
    sampler = build_train_loader(cfg, open_source(cfg.DATASETS.TRAIN[0])).loader.batch_sampler
    assert (sampler._count if isinstance(sampler, WithBuffers) else 0) == count


def test_dicts_go_without(cfg: CfgNode) -> None:
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.PACKING = 1, "dicts"
    loader = build_train_loader(cfg, open_source(cfg.DATASETS.TRAIN[0]))
    assert not isinstance(loader.loader.batch_sampler, WithBuffers)
    assert len(InBuffer(0, 0, (7, 3, 2, 2))) == 7
