"""N-way K-shot episodes: what is drawn, against the words of the papers, and how it reaches a batch."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_image_folder
from detectron2.config import CfgNode
from detectron2.utils import comm
from PIL import Image
from test_docs import blocks, text_of

import imgcls
from imgcls.data import EpisodeSampler, build_episode_loader, open_source
from imgcls.data.datasets import ArraySource, FolderSource
from imgcls.data.datasets.rotated import RotatedClasses
from imgcls.data.random_stream import mix
from imgcls.data.samplers import Draw
from imgcls.structures import Batch, Episode

SIZES = [9, 3, 0, 12, 7, 20, 8]  # of the classes


def labels_of(sizes: list[int] = SIZES, seed: int = 0) -> np.ndarray:
    """In no order, and five pictures without a label among them."""
    labels = np.array([-1] * 5 + [label for label, size in enumerate(sizes) for _ in range(size)])
    return np.random.default_rng(seed).permutation(labels)


def sampler(**arguments: Any) -> EpisodeSampler:
    return EpisodeSampler(labels_of(), **{"ways": 3, "shots": 2, "queries": 4, "episodes": 50, "seed": 5, **arguments})


def indices(drawn: list[Draw]) -> list[int]:
    return [draw.index for draw in drawn]


def slowly(labels: np.ndarray, ways: int, shots: int, queries: int, seed: int, episode: int) -> list[int]:
    """Choose classes, then pictures of each, from shuffled lists; shots of all classes first, then all queries."""

    def shuffled(things: list[int], *counters: int) -> list[int]:
        order = torch.randperm(len(things), generator=torch.Generator().manual_seed(mix(seed, episode, *counters)))
        return [things[place] for place in order.tolist()]

    members = {label: [i for i, other in enumerate(labels) if other == label] for label in range(int(labels.max()) + 1)}
    large = [label for label, places in members.items() if len(places) >= shots + queries]
    chosen = [shuffled(members[label], label) for label in shuffled(large)[:ways]]
    support = [place for places in chosen for place in places[:shots]]
    return support + [place for places in chosen for place in places[shots : shots + queries]]


# ---------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize(("ways", "shots", "queries"), [(2, 1, 1), (3, 2, 4), (5, 1, 6), (5, 3, 4), (2, 5, 15)])
def test_episodes_against_a_slow_reference(ways: int, shots: int, queries: int) -> None:
    sizes = [size + 13 for size in SIZES]
    labels = labels_of(sizes)
    ours = EpisodeSampler(labels, ways=ways, shots=shots, queries=queries, episodes=8, seed=5)
    assert [indices(drawn) for drawn in ours] == [slowly(labels, ways, shots, queries, 5, e) for e in range(8)]
    assert all(draw == Draw(number, draw.index) for number, drawn in enumerate(ours) for draw in drawn)


def test_support_and_query_are_disjoint_and_of_the_same_classes() -> None:
    labels = labels_of()
    for drawn in sampler():
        support, query = indices(drawn)[:6], indices(drawn)[6:]
        assert len(set(support + query)) == 3 * (2 + 4)
        classes = labels[support[::2]]
        assert len(set(classes)) == 3
        assert labels[support].tolist() == np.repeat(classes, 2).tolist()
        assert labels[query].tolist() == np.repeat(classes, 4).tolist()


def test_every_class_and_picture_that_can_be_drawn_is_drawn_and_no_other() -> None:
    labels = labels_of()
    places = Counter(chain.from_iterable(map(indices, sampler(episodes=600))))
    assert set(places) == {i for i, label in enumerate(labels) if label in (0, 3, 4, 5, 6)}
    classes = Counter(labels[indices(drawn)[2 * way]] for drawn in sampler(episodes=600) for way in range(3))
    # 600 episodes take 3 of 5 classes: 360 each, a standard deviation is 12.
    assert set(classes) == {0, 3, 4, 5, 6} and all(abs(count - 360) < 48 for count in classes.values())


def test_an_episode_is_a_function_of_the_seed_and_its_number() -> None:
    whole = list(sampler())
    assert len(sampler()) == len(whole) == 50
    assert len({tuple(indices(drawn)) for drawn in whole}) == 50
    assert list(sampler(start=17)) == whole[17:] and list(sampler(episodes=10)) == whole[:10]
    assert sampler().episode(31) == whole[31]
    assert sampler(seed=6).episode(0) != whole[0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_take_disjoint_episodes(world: int) -> None:
    parts = [list(sampler(start=7, rank=rank, world=world)) for rank in range(world)]
    numbers = [drawn[0].epoch for part in parts for drawn in part]
    assert sorted(numbers) == list(range(7, 50))
    assert sorted(chain.from_iterable(parts)) == sorted(sampler(start=7))
    assert [len(sampler(start=7, rank=rank, world=world)) for rank in range(world)] == [len(part) for part in parts]


def test_classes_that_are_too_small_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="imgcls"):
        sampler()
        assert caplog.messages == ["1 classes are left out: an episode takes 6 pictures of each"]
        caplog.clear()
        sampler(shots=1, queries=2)  # all of them will do
        assert caplog.messages == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ways": 6},
            "5 classes have the 6 pictures .* got 6; allowed: 2 to 5, or fewer shots and queries; .* ways",
        ),
        ({"queries": 11}, "1 classes have the 13 pictures .* got 3; allowed: fewer shots and queries; change ways"),
        ({"shots": 50}, "0 classes have the 54 pictures .* got 3; allowed: fewer shots and queries"),
        ({"ways": 1}, "cannot be drawn so: got 1; allowed: a whole number >= 2; change ways"),
        ({"shots": 0}, "got 0; allowed: a whole number >= 1; change shots"),
        ({"queries": 1.5}, "got 1.5; allowed: a whole number >= 1; change queries"),
        ({"start": -1}, "got -1; allowed: a whole number >= 0; change start"),
    ],
)
def test_episodes_that_cannot_be_drawn(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**arguments)


# ----------------------------------------------------------------------------------------------------------- the loader


@pytest.fixture
def cfg() -> CfgNode:
    made = imgcls.get_config("Base-ClsNet.yaml")
    made.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "SEED", 5, "DATALOADER.NUM_WORKERS", 0, "INPUT.TRAIN_SIZE", 12),
            *("INPUT.TEST_SIZE", 8, "INPUT.TEST_RESIZE", 0, "INPUT.TRAIN_TRANSFORMS", [["random_crop"]]),
        ]
    )
    return made


@pytest.fixture
def noise() -> ArraySource:
    labels = labels_of()
    pixels = np.random.default_rng(1).integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
    return ArraySource("noise", pixels, labels, list("abcdefg"))


TASK = {"ways": 3, "shots": 2, "queries": 4, "episodes": 6}


def episodes(cfg: CfgNode, source: Any, **arguments: Any) -> list[Episode]:
    return list(build_episode_loader(cfg, source, **{**TASK, **arguments}))


def same(one: Episode, two: Episode) -> bool:
    pairs = [
        (getattr(getattr(one, part), name), getattr(getattr(two, part), name))
        for part in ("support", "query")
        for name in ("images", "targets", "ids")
    ]
    return all(torch.equal(a, b) for a, b in [*pairs, (one.classes, two.classes)])


def test_an_episode(cfg: CfgNode, noise: ArraySource) -> None:
    found = episodes(cfg, noise)
    assert len(found) == 6
    for number, episode in enumerate(found):
        assert isinstance(episode, Episode)
        support, query = episode.support, episode.query
        assert support.ids.tolist() + query.ids.tolist() == slowly(noise.labels, 3, 2, 4, 5, number)
        assert support.targets.tolist() == [0, 0, 1, 1, 2, 2] and query.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert episode.classes[support.targets].tolist() == noise.labels[support.ids].tolist()
        assert episode.classes[query.targets].tolist() == noise.labels[query.ids].tolist()
        assert tuple(support.images.shape) == (6, 3, 8, 8) and tuple(query.images.shape) == (12, 3, 8, 8)


def test_workers_and_restarts_change_nothing(cfg: CfgNode, noise: ArraySource) -> None:
    alone = episodes(cfg, noise, augment=True)
    assert alone[0].query.images.shape[-1] == 12
    cfg.DATALOADER.NUM_WORKERS = 2
    assert all(same(a, b) for a, b in zip(alone, episodes(cfg, noise, augment=True), strict=True))
    cfg.DATALOADER.NUM_WORKERS = 0
    torch.manual_seed(99)
    assert all(same(a, b) for a, b in zip(alone[4:], episodes(cfg, noise, augment=True, start=4), strict=True))
    assert not same(alone[0], alone[1])  # the twin


def test_a_picture_is_augmented_anew_in_each_episode(cfg: CfgNode, noise: ArraySource) -> None:
    def distinct(augment: bool) -> list[int]:
        seen: dict[int, list[bytes]] = {}
        for episode in episodes(cfg, noise, augment=augment, episodes=20):
            for place, image in zip(episode.query.ids.tolist(), episode.query.images, strict=True):
                seen.setdefault(place, []).append(image.numpy().tobytes())
        return [len(set(images)) for images in seen.values() if len(images) > 2]

    assert set(distinct(augment=False)) == {1}
    assert min(distinct(augment=True)) > 1


def test_ranks_share_the_episodes(cfg: CfgNode, noise: ArraySource, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = episodes(cfg, noise)
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        assert all(same(a, b) for a, b in zip(alone[rank::4], episodes(cfg, noise), strict=True))


def test_sets_without_one_known_label_a_picture(cfg: CfgNode, noise: ArraySource) -> None:
    noise.labels = np.eye(7, dtype=np.float32)[noise.labels]
    with pytest.raises(ValueError, match="episodes are of pictures with one class each: got 'noise'"):
        episodes(cfg, noise)
    noise.labels = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="only when its samples are read: got 'noise'; allowed: a set that knows"):
        episodes(cfg, noise)


def test_moving_an_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    support, query = Batch(torch.zeros(2, 1), torch.tensor([0, 1])), Batch(torch.ones(4, 1), torch.tensor([0, 0, 1, 1]))
    episode = Episode(support, query, torch.tensor([7, 3]))
    moved = episode.to("meta")
    assert {moved.support.images.device.type, moved.query.targets.device.type} == {"meta"}
    assert moved.classes is episode.classes
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # where there is no GPU it fails
    assert episode.pin_memory().query.images.tolist() == [[2]] * 4


# ------------------------------------------------------------------------------------------------------------ bad files


def test_a_bad_file_is_replaced_by_another_of_its_class(cfg: CfgNode, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data", {"ant": 12, "bee": 12, "cat": 12})
    good = episodes(cfg, FolderSource(root), episodes=8)
    torn = {0, 1, 12, 30}
    for index in torn:
        Path(FolderSource(root).path(index)).write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot read the image"):
        episodes(cfg, FolderSource(root), episodes=8)
    cfg.DATALOADER.ON_ERROR, cfg.DATALOADER.MAX_BAD_SHARE = "skip", 0.2
    found, source = episodes(cfg, FolderSource(root), episodes=8), FolderSource(root)
    replaced = 0
    for one, two in zip(good, found, strict=True):
        ours = torch.cat([two.support.ids, two.query.ids])
        theirs = torch.cat([one.support.ids, one.query.ids])
        assert len(set(ours.tolist())) == 18 and not torn & set(ours.tolist())
        assert np.array_equal(source.labels[ours], source.labels[theirs])
        bad = torch.tensor([place in torn for place in theirs.tolist()])
        assert torch.equal(ours[~bad], theirs[~bad])
        replaced += int(bad.sum())
    assert replaced > 6
    cfg.DATALOADER.NUM_WORKERS = 2
    again = episodes(cfg, FolderSource(root), episodes=8)
    assert all(same(a, b) for a, b in zip(found, again, strict=True))


def test_a_class_without_spare_pictures_is_named(cfg: CfgNode, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data", {"ant": 6, "bee": 6})
    (root / "bee" / "003.png").write_bytes(b"torn")
    cfg.DATALOADER.ON_ERROR, cfg.DATALOADER.MAX_BAD_SHARE = "skip", 0.2
    with pytest.raises(
        ValueError, match=r"the class bee has too few pictures that can be read .* of 2 shots and 4 queries"
    ):
        episodes(cfg, FolderSource(root), ways=2)


# ------------------------------------------------------------------------------------------------------ rotated classes


def test_rotated_classes(tmp_path: Path) -> None:
    folder = FolderSource(write_image_folder(tmp_path / "data", {"ant": 2, "bee": 3}, side=6))
    source = RotatedClasses(folder)
    assert len(source) == 20 and len(source.classes) == 8
    assert source.classes == ("ant", "bee", "ant@90", "bee@90", "ant@180", "bee@180", "ant@270", "bee@270")
    for index in range(20):
        turns, place = divmod(index, 5)
        sample = source[index]
        label = 2 * turns + int(place >= 2)
        assert (sample["image_id"], sample["label"], int(source.labels[index])) == (index, label, label)
        assert len({"file_name", "pixels", "encoded"} & set(sample)) == 1
        upright = np.asarray(Image.open(folder.path(place)))
        found = np.asarray(Image.open(sample["file_name"])) if turns == 0 else sample["pixels"]
        np.testing.assert_array_equal(found, np.rot90(upright, turns))


def test_rotated_classes_have_episodes_of_their_own(cfg: CfgNode, tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "data", {"ant": 6, "bee": 6}, side=8)
    source = open_source(f"rotated:folder:{folder}")
    (episode,) = build_episode_loader(cfg, source, ways=8, shots=2, queries=4, episodes=1)
    assert sorted(episode.classes.tolist()) == list(range(8))
    support = episode.support
    for image, index, target in zip(support.images, support.ids.tolist(), support.targets, strict=True):
        turns, place = divmod(index, 12)
        upright = np.asarray(Image.open(FolderSource(folder).path(place)))
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.rot90(upright, turns))
        assert int(episode.classes[target]) == 2 * turns + place // 6


def test_rotation_keeps_weights_and_pictures_without_labels(noise: ArraySource) -> None:
    noise.weights = np.arange(float(len(noise)))
    source = RotatedClasses(noise)
    assert np.array_equal(source.weights, np.tile(noise.weights, 4))
    assert (source.labels < 0).sum() == 20 and source.labels.max() == 27


def test_rotation_needs_one_known_label(noise: ArraySource) -> None:
    noise.labels = np.eye(7, dtype=np.float32)[noise.labels]
    with pytest.raises(ValueError, match="noise cannot have its classes rotated: each picture needs one label"):
        RotatedClasses(noise)


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_pages_block_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = text_of("docs/sampling.md")
    found = blocks(page)
    (place,) = [number for number, block in enumerate(found) if block.language == "python"]
    exec(found[place].body, {})
    assert capsys.readouterr().out == found[place + 1].body
