"""Shards: written whole or not at all, read by number with every sample once, and no damage that goes unseen."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_image_folder
from PIL import Image
from torch.utils.data import DataLoader

from imgcls.commands import pack_dataset
from imgcls.data import open_source, splits_below
from imgcls.data.datasets import ArraySource, Source, shards
from imgcls.data.datasets.shards import ShardSource
from imgcls.data.packing import PackOptions, pack
from imgcls.data.random_stream import run_permutation
from imgcls.data.reading import ImageError, read_image
from imgcls.data.samplers import CounterBatchSampler, EpochOrder

pytest.importorskip("webdataset")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """17 pictures of three classes, of 30 x 20 pixels and more, JPEG and PNG."""
    rng = np.random.default_rng(0)
    for name, count in (("ant", 8), ("bee", 6), ("cat", 3)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (20 + 10 * index, 30 + 10 * index, 3), dtype=np.uint8)
            ending = "jpg" if index % 2 else "png"
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.{ending}")
    return tmp_path / "photos"


@pytest.fixture
def packed(photos: Path, tmp_path: Path) -> Path:
    """The photos in shards of five, as they are."""
    pack(open_source(f"folder:{photos}"), new_folder(tmp_path / "packed"), PackOptions(shard_samples=5))
    return tmp_path / "packed"


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def contents(source: Source) -> Counter[tuple[str, Any]]:
    """How often each (digest of the picture's bytes, class names) comes."""
    found: Counter[tuple[str, Any]] = Counter()
    for sample in source:
        content = sample["encoded"] if "encoded" in sample else Path(sample["file_name"]).read_bytes()
        names = np.flatnonzero(sample["label"]) if source.multi_label else [sample["label"]]
        found[hashlib.sha256(content).hexdigest(), tuple(source.classes[index] for index in names)] += 1
    return found


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------ packing


def test_what_was_packed_is_what_is_read(photos: Path, packed: Path) -> None:
    original, source = open_source(f"folder:{photos}"), open_source(f"shards:{packed}")
    assert (source.name, source.classes, len(source)) == (f"shards:{packed}", ("ant", "bee", "cat"), 17)
    assert contents(source) == contents(original)
    assert source.labels is not None and source.labels.tolist() == [sample["label"] for sample in source]
    assert source.runs is not None and source.runs.tolist() == [5, 5, 5, 2]
    assert [sample["image_id"] for sample in source] == list(range(17))
    name = source[6]["name"]
    assert name.startswith(f"{packed}/shard-000001.tar:000000006.") and name[-3:] in ("jpg", "png")
    source.check_files()


def test_a_shard_holds_a_mixture_of_classes(photos: Path, packed: Path, tmp_path: Path) -> None:
    in_order = new_folder(tmp_path / "in_order")
    pack(open_source(f"folder:{photos}"), in_order, PackOptions(seed=-1))
    assert ShardSource(str(in_order)).labels.tolist() == [0] * 8 + [1] * 6 + [2] * 3
    assert ShardSource(str(packed)).labels.tolist() != [0] * 8 + [1] * 6 + [2] * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files open
def test_the_library_reads_our_shards(packed: Path) -> None:
    import webdataset

    files = [str(path) for path in sorted(packed.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(files, shardshuffle=False).decode("pil"))
    ours = open_source(f"shards:{packed}")
    assert len(theirs) == len(ours)
    for sample, other in zip(ours, theirs, strict=True):
        assert sample["label"] == other["cls"]
        picture = np.asarray(other.get("jpg") or other["png"])
        np.testing.assert_array_equal(picture, np.asarray(read_image(sample["encoded"])))


def test_smaller_pictures(photos: Path, tmp_path: Path) -> None:
    """Those with a longer short side become JPEGs of exactly that one; the others keep their bytes."""
    out = new_folder(tmp_path / "small")
    done = pack(open_source(f"folder:{photos}"), out, PackOptions(short_side=50, quality=95, seed=-1))
    assert (done.resized, done.copied, done.shards) == (6, 11, 1)  # of the sides 20, 30 .. 90
    small = ShardSource(str(out))
    for sample, original in zip(small, open_source(f"folder:{photos}"), strict=True):
        before, after = read_image(original["file_name"]), read_image(sample["encoded"])
        if min(before.size) <= 50:
            assert sample["encoded"] == Path(original["file_name"]).read_bytes()
            continue
        width, height = before.size
        assert after.size == (round(width * 50 / height), 50) and sample["name"].endswith(".jpg")
        exact = before.resize(after.size, Image.Resampling.BICUBIC).convert("L")  # antialiased; colours lose more
        picked = before.resize(after.size, Image.Resampling.NEAREST).convert("L")
        ours, exactly, nearest = (np.asarray(picture.convert("L"), float) for picture in (after, exact, picked))
        assert np.abs(ours - exactly).mean() < 4 < 15 < np.abs(ours - nearest).mean()


def test_the_same_shards_with_any_number_of_workers(photos: Path, tmp_path: Path) -> None:
    digests = []
    for name, options in (("none", {}), ("two", {"workers": 2}), ("other", {"seed": 1})):
        out = new_folder(tmp_path / name)
        pack(open_source(f"folder:{photos}"), out, PackOptions(shard_samples=6, short_side=40, **options))
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()})
    assert digests[0] == digests[1] != digests[2]
    assert sorted(digests[0]) == ["index.json", "index.npz", *(f"shard-{number:06d}.tar" for number in range(3))]


def test_shards_end_before_they_grow_too_large(photos: Path, tmp_path: Path) -> None:
    out = new_folder(tmp_path / "out")
    pack(open_source(f"folder:{photos}"), out, PackOptions(shard_bytes=30_000))
    source = ShardSource(str(out))
    ends = np.cumsum(source.runs)
    sizes = [
        sum(len(source[index]["encoded"]) for index in range(end - run, end))
        for run, end in zip(source.runs, ends, strict=True)
    ]
    assert len(sizes) > 2 and max(sizes) <= 30_000 and min(sizes[:-1]) > 5_000


def test_several_labels_pixels_and_weights(tmp_path: Path) -> None:
    rows = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=np.float32)
    pixels = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)
    original = ArraySource("arrays", pixels, rows, ["a", "b|c", "é"], multi_label=True)
    original.weights = np.array([1.0, 2.0, 0.5])
    pack(original, new_folder(tmp_path / "out"), PackOptions(seed=3))
    source = open_source(f"shards:{tmp_path}/out")
    assert source.multi_label and source.classes == ("a", "b|c", "é") and source.weights is not None
    found = {read_image(sample["encoded"]).tobytes(): index for index, sample in enumerate(source)}
    places = [found[Image.fromarray(picture).convert("RGB").tobytes()] for picture in pixels]
    assert sorted(places) == [0, 1, 2] != places
    for row, weight, place in zip(rows, original.weights, places, strict=True):
        assert source[place]["label"].tolist() == row.tolist() and source.weights[place] == weight


def test_labels_that_shards_cannot_hold(tmp_path: Path) -> None:
    pixels = np.zeros((1, 4, 4), np.uint8)
    for labels, multi, said in (
        (np.array([-1]), False, "sample 0 of arrays has no label"),
        (np.array([[0.5, 0.5]], np.float32), True, "sample 0 of arrays has shares of classes as its label"),
        (np.array([[0.5, 0.5]], np.float32), False, "sample 0 of arrays has shares of classes as its label"),
    ):
        out = new_folder(tmp_path / f"{multi}{labels.ndim}")
        with pytest.raises(ValueError, match=said):
            pack(ArraySource("arrays", pixels, labels, ["a", "b"], multi_label=multi), out, PackOptions())


def test_a_picture_that_cannot_be_read(photos: Path, tmp_path: Path) -> None:
    torn = photos / "bee" / "1.jpg"
    torn.write_bytes(torn.read_bytes()[:-300])
    with pytest.raises(ImageError, match=rf"cannot read the image {torn}"):
        pack(open_source(f"folder:{photos}"), new_folder(tmp_path / "raise"), PackOptions())
    done = pack(open_source(f"folder:{photos}"), new_folder(tmp_path / "skip"), PackOptions(skip_bad=True))
    assert done.copied == 16 and len(done.left_out) == 1 and str(torn) in done.left_out[0]
    torn.unlink()
    assert contents(open_source(f"shards:{tmp_path}/skip")) == contents(open_source(f"folder:{photos}"))


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_packs_both_splits(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--data", photos, "--output", out, "--short-side", 60, "--shard-size", 6]
    assert pack_dataset.main([*map(str, words)]) == 0
    said = capsys.readouterr().out
    counted = re.findall(
        rf"folder:{photos}#(train|val): (\d+) pictures of 3 classes, (\d+) resized, (\d+) as .*; (\d)", said
    )
    assert [(name, int(pictures), int(number)) for name, pictures, _, _, number in counted] == [
        ("train", 14, 3),
        ("val", 3, 1),
    ]
    assert sum(int(resized) for _, _, resized, _, _ in counted) == 4  # of short sides above 60
    assert f"written: {out}; train with --data {out}" in said
    train, val = map(open_source, splits_below(out))
    assert (train.name, val.name) == (f"shards:{out}/train", f"shards:{out}/val")
    assert (len(train), len(val)) == (14, 3) and train.classes == val.classes == ("ant", "bee", "cat")
    assert pack_dataset.main(["--check", str(out)]) == 0
    assert "is whole" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_one_set_by_its_name(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_dataset.main(["--data", f"folder:{photos}", "--output", str(tmp_path / "out"), "--shard-size", "1GB"])
    assert f"it is called shards:{tmp_path}/out" in capsys.readouterr().out
    assert splits_below(tmp_path / "out") == (f"shards:{tmp_path}/out#train", f"shards:{tmp_path}/out#val")
    train, val = map(open_source, splits_below(tmp_path / "out"))
    assert sorted(train.labels.tolist() + val.labels.tolist()) == [0] * 8 + [1] * 6 + [2] * 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "photos"], "nothing says what to pack: give --data DIR or NAME, and --output DIR"),
        (["--data", "photos", "--output", "photos"], "photos is there already; remove it, or change --output"),
        (
            ["--data", "photos", "--output", "out", "--shard-size", "9TB"],
            "--shard-size is '9TB'; allowed: a number with",
        ),
        (["--data", "photos", "--output", "out", "--shard-size", "0"], "--shard-size is '0'"),
        (["--data", "photos", "--output", "out", "--quality", "96"], "--quality is 96; allowed: 1 to 95; change"),
        (["--data", "gone", "--output", "out"], "there is no such data set: got 'gone'"),
        (["--check", "photos"], "photos has no index.json, and neither has a folder in it"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(
    words: list[str], said: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos.parent)
    with pytest.raises(SystemExit) as end:
        pack_dataset.main(words)
    told = capsys.readouterr().err
    assert end.value.code == 2 and said in told and told.count("\n") == 1
    assert os.listdir(photos.parent) == ["photos"]


def test_a_failure_midway_leaves_nothing(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cat" / "2.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(SystemExit):
        pack_dataset.main(["--data", f"folder:{photos}", "--output", str(tmp_path / "out"), "--seed", "-1"])
    assert "photos/cat/2.png" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["photos"]


# ------------------------------------------------------------------------------------------------------------- damage


def shard_with(packed: Path, change: Callable[[bytearray], Any]) -> Path:
    path = packed / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def test_a_missing_and_a_truncated_shard_are_refused(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard_with(packed, lambda content: content.__delitem__(slice(-512, None)))
    with pytest.raises(ValueError, match=rf"the shard {path} has \d+ bytes, not \d+; copy it again"):
        open_source(f"shards:{packed}")
    path.unlink()
    with pytest.raises(ValueError, match=rf"the shard {path} is missing; bring it back"):
        open_source(f"shards:{packed}")
    assert pack_dataset.main(["--check", str(packed)]) == 1
    assert f"the shard {path} is missing" in capsys.readouterr().out


def test_a_changed_byte_is_never_trained_on(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many a changed byte leaves a JPEG that decodes."""
    victim = open_source(f"shards:{packed}")[7]
    path = shard_with(packed, lambda content: flip(content, content.find(victim["encoded"]) + 200))
    source = open_source(f"shards:{packed}")
    with pytest.raises(ImageError, match=rf"cannot read {victim['name']}: its bytes are not those that were packed"):
        source[7]
    with pytest.raises(ImageError, match=rf"{victim['name']}"):
        source.check_files()
    assert [source[index]["label"] for index in (6, 8)]  # its neighbours are whole
    assert pack_dataset.main(["--check", str(packed)]) == 1
    assert f"the shard {path} has other bytes than were packed" in capsys.readouterr().out


def flip(content: bytearray, place: int) -> None:
    content[place] ^= 1


def test_a_shard_that_vanishes_or_shrinks_while_it_is_used(packed: Path) -> None:
    source = open_source(f"shards:{packed}")
    os.truncate(packed / "shard-000000.tar", 600)
    with pytest.raises(ImageError, match=r"cannot read .*shard-000000\.tar:000000000\..*: the shard ends before it"):
        source[0]
    (packed / "shard-000001.tar").unlink()
    with pytest.raises(ImageError, match=r"cannot read .*shard-000001\.tar:000000005\..*: the shard is not there any"):
        source[5]


def test_an_index_that_is_not_the_shards(packed: Path) -> None:
    header = json.loads((packed / "index.json").read_text())
    table = (packed / "index.npz").read_bytes()
    (packed / "index.npz").write_bytes(table[:-1])
    with pytest.raises(ValueError, match=r"index\.npz is not the file that its index\.json was written with"):
        open_source(f"shards:{packed}")
    (packed / "index.npz").write_bytes(table)
    outside = {**header["shards"][0], "file": "../shard-000000.tar"}
    for change, said in (
        ({"format": "other"}, "its format is 'other'"),
        ({"shards": [outside]}, r"it names a file '\.\./shard-000000\.tar' outside its folder"),
        ({"table": {"file": "/etc/passwd", "digest": ""}}, "it names a file '/etc/passwd' outside"),
        ({"shards": [{"file": "a.tar"}]}, "is no index of shards"),
    ):
        (packed / "index.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(ValueError, match=said):
            open_source(f"shards:{packed}")


# ------------------------------------------------------------------------------------------- ranks, workers and order


def as_it_is(batch: list[Any]) -> list[Any]:
    return batch


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_sample_once_for_any_number_of_ranks(world: int, packed: Path) -> None:
    """17 samples in batches of 6: an epoch ends within a batch."""
    source = open_source(f"shards:{packed}")
    seen: Counter[int] = Counter()
    for rank in range(world):
        sampler = CounterBatchSampler(len(source), global_batch=6, seed=1, start=0, stop=17, rank=rank, world=world)
        seen.update(draw.index for batch in sampler for draw in batch)
    assert seen == dict.fromkeys(range(17), 6)


def test_workers_read_every_sample_once(packed: Path) -> None:
    source = open_source(f"shards:{packed}")
    expected = contents(source)  # and files that are open now are inherited by the workers
    loader = DataLoader(source, batch_size=4, num_workers=2, collate_fn=as_it_is, shuffle=True)
    found = [sample for batch in loader for sample in batch]
    assert sorted(sample["image_id"] for sample in found) == list(range(17))
    assert Counter(hashlib.sha256(sample["encoded"]).hexdigest() for sample in found) == Counter(
        digest for digest, _ in expected.elements()
    )


@pytest.mark.parametrize("group", [1, 2, 3, 4, 9])
def test_the_order_by_blocks(group: int) -> None:
    runs = [5, 1, 4, 7]
    order = run_permutation(runs, group, 3, 0)
    assert sorted(order.tolist()) == list(range(17))
    assert torch.equal(order, run_permutation(runs, group, 3, 0))
    assert not torch.equal(order, run_permutation(runs, group, 3, 1))
    shard_of = np.repeat(np.arange(4), runs)[order.numpy()]
    # Group after group: a group's shards are read out before the next one's begin.
    places = {shard: np.flatnonzero(shard_of == shard) for shard in range(4)}
    first = sorted(range(4), key=lambda shard: places[shard].min())
    spans = [(places[shard].min(), places[shard].max()) for shard in first]
    overlapping = max(sum(low <= place <= high for low, high in spans) for place in range(17))
    assert overlapping <= group and (overlapping == 1) == (group == 1)


def test_the_order_by_blocks_shuffles_shards_and_samples() -> None:
    orders = [run_permutation([10, 10, 10], 1, 0, epoch).tolist() for epoch in range(20)]
    assert {order[0] // 10 for order in orders} == {0, 1, 2}
    assert all(order[:10] != sorted(order[:10]) for order in orders)
    mixed = run_permutation([10, 10, 10], 2, 0, 0).tolist()
    assert len({index // 10 for index in mixed[:20]}) == 2 and len({index // 10 for index in mixed[:8]}) == 2


def test_a_sampler_takes_that_order(packed: Path) -> None:
    source = open_source(f"shards:{packed}")
    assert source.runs is not None
    runs = source.runs.tolist()
    sampler = CounterBatchSampler(
        17, global_batch=1, seed=0, start=0, stop=17, order=lambda epoch: EpochOrder(run_permutation(runs, 1, 0, epoch))
    )
    files = [source[draw.index]["name"].split(":")[0] for batch in sampler for draw in batch]
    assert len(set(files)) == 4 and sum(a != b for a, b in pairwise(files)) == 3


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_folder(tmp_path / "many")
    monkeypatch.setattr(shards, "OPEN_FILES", 3)
    for index in range(10):
        write_tar(folder / f"{index}.tar", {f"{index}.png": png(index), f"{index}.cls": b"0"})
    source = ShardSource(str(folder))
    before = len(os.listdir("/proc/self/fd"))
    assert [read_image(source[index % 10]["encoded"]).getpixel((0, 0))[0] for index in range(30)] == [*range(10)] * 3  # type: ignore[index]
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    copy = pickle.loads(pickle.dumps(source))  # as spawn sends it
    assert copy[4]["encoded"] == source[4]["encoded"]


def test_an_open_shard_survives_a_fork(packed: Path) -> None:
    """Reading in the child moves nothing in the parent: there is no common place in the file."""
    source = open_source(f"shards:{packed}")
    expected = [sample["encoded"] for sample in source]
    child = os.fork()
    if child == 0:
        right = all(source[index]["encoded"] == expected[index] for index in reversed(range(17)))
        os._exit(0 if right else 1)
    assert all(source[index]["encoded"] == expected[index] for index in range(17))
    assert os.waitpid(child, 0)[1] == 0


# ----------------------------------------------------------------------------------------------- somebody else's shards


def test_shards_without_an_index(tmp_path: Path) -> None:
    """Numbers are indices; the index is kept beside them and made anew when they change."""
    write_tar(tmp_path / "b.tar", {"x/0.PNG": png(3), "x/0.cls": b"10\n"})
    write_tar(tmp_path / "a.tar", {"__MACOSX/._0": b"", "0.png": png(1), "0.cls": b"2", "1.txt.png": png(2)} | {})
    with pytest.raises(ValueError, match=r"the sample 1 of the shard .*a\.tar has txt\.png; it needs one picture, and"):
        open_source(f"shards:{tmp_path}")
    write_tar(tmp_path / "a.tar", {"0.cls": b"2", "0.png": png(1), "1.png": png(2), "1.json": b'{"label": 0}'})
    source = open_source(f"shards:{tmp_path}")
    assert source.classes == tuple(map(str, range(11)))
    assert [(sample["name"].partition(f"{tmp_path}/")[2], sample["label"]) for sample in source] == [
        *(("a.tar:0.png", 2), ("a.tar:1.png", 0), ("b.tar:x/0.PNG", 10))
    ]
    assert [read_image(sample["encoded"]).getpixel((0, 0)) for sample in source] == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]
    assert (tmp_path / "index.json").is_file() and len(open_source(f"shards:{tmp_path}/b*.tar")) == 1
    (tmp_path / "b.tar").unlink()
    assert len(open_source(f"shards:{tmp_path}")) == 2
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    write_tar(tmp_path / "c.tar", {"9.png": png(4), "9.cls": b"1"})
    assert open_source(f"shards:{tmp_path}").classes == ("ant", "bee", "cat")


def test_the_kept_index_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": png(1), "0.cls": b"1"})
    first = open_source(f"shards:{tmp_path}")
    monkeypatch.setattr(shards, "index_shards", lambda paths: pytest.fail("the headers are read again"))
    again = open_source(f"shards:{tmp_path}")
    assert (again.classes, again[0]["encoded"]) == (first.classes, first[0]["encoded"])


def test_names_as_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": png(), "0.cls": b"cat", "1.png": png(), "1.json": b'{"label": "ant"}'})
    source = open_source(f"shards:{tmp_path}")
    assert source.classes == ("ant", "cat") and source.labels is not None and source.labels.tolist() == [1, 0]
    aligned = open_source(f"shards:{tmp_path}", classes=("ant", "bee", "cat"))
    assert [sample["label"] for sample in aligned] == [2, 0]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (
            {"0.png": b"", "0.cls": b"-3"},
            r"the label \(cls\) of the sample 0 of the shard .*a\.tar cannot be read: -3 is neither",
        ),
        ({"0.png": b"", "0.json": b"{"}, r"the label \(json\) of the sample 0 .* cannot be read"),
        (
            {"0.png": b"", "0.json": b'{"caption": "x"}'},
            r"the label \(json\) of the sample 0 .* cannot be read: 'label'",
        ),
        (
            {"0.png": b"", "0.jpg": b"", "0.cls": b"1"},
            r"the sample 0 of the shard .* has png, jpg, cls; it needs one pic",
        ),
        (
            {"0.png": b"", "0.cls": b"1", "1.png": b"", "1.cls": b"x"},
            r"the labels in the shards of .* of different kinds",
        ),
        ({"notes": b""}, r"the shards of .* have no samples"),
    ],
)
def test_shards_that_say_no_label(members: dict[str, bytes], said: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=said):
        ShardSource(str(tmp_path))


def test_tar_files_that_are_none(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{index}.{end}": b"0" for index in range(9) for end in ("png", "cls")})
    whole = path.read_bytes()
    for content in (b"", b"no tar at all" * 100, whole[:700], whole[:-10240] + b"x" * 512, whole.rstrip(b"\0")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"the shard {path} is no whole uncompressed tar file: .*; copy it again"):
            ShardSource(str(tmp_path))
    with pytest.raises(ValueError, match=rf"there is no shard {tmp_path}/none-\*\.tar; change DATASETS"):
        ShardSource(f"{tmp_path}/none-*.tar")


# ------------------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def remote(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The packed photos in fsspec's own file system in memory, and an empty cache."""
    import fsspec

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    for path in packed.iterdir():
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    return "memory://bucket"


def test_remote_shards_are_fetched_once_when_they_are_needed(remote: str, packed: Path, tmp_path: Path) -> None:
    import fsspec

    source = open_source(f"shards:{remote}")
    fetched = {path.name.partition("-")[2] for path in (tmp_path / "cache").rglob("*.tar")}
    assert fetched == set()
    assert source[6]["encoded"] == open_source(f"shards:{packed}")[6]["encoded"]
    assert source[6]["name"].startswith(f"{remote}/shard-000001.tar:")
    assert [path.name.partition("-")[2] for path in (tmp_path / "cache").rglob("*.tar")] == ["shard-000001.tar"]
    fsspec.filesystem("memory").rm("/bucket/shard-000001.tar")
    assert contents(open_source(f"shards:{remote}")) == contents(open_source(f"shards:{packed}"))


def test_remote_shards_that_are_damaged_or_gone(remote: str, tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    content = system.cat("/bucket/shard-000000.tar")
    system.pipe("/bucket/shard-000000.tar", content[:-1] + b"x")
    source = open_source(f"shards:{remote}")
    with pytest.raises(
        ValueError, match=r"what came from memory://bucket/shard-000000\.tar is not the file that it sho"
    ):
        source[0]
    system.rm("/bucket/shard-000001.tar")
    with pytest.raises(ValueError, match=r"cannot fetch memory://bucket/shard-000001\.tar: .*; check the address"):
        source[5]
    assert not list((tmp_path / "cache").rglob("*.tar")) and not list((tmp_path / "cache").rglob("*.partial"))
    with pytest.raises(ValueError, match=r"cannot fetch memory://nowhere/index\.json"):
        open_source("shards:memory://nowhere")
    with pytest.raises(ValueError, match=r"http://host/set/index\.json is not fetched: http is open to anybody's"):
        open_source("shards:http://host/set")


def test_file_systems_of_iopath(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.utils.file_io import PathManager
    from iopath.common.file_io import PathHandler

    class Elsewhere(PathHandler):
        def _get_supported_prefixes(self) -> list[str]:
            return ["elsewhere://"]

        def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
            return open(packed / path.removeprefix("elsewhere://set/"), mode)

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    PathManager.register_handler(Elsewhere(), allow_override=True)
    assert contents(open_source("shards:elsewhere://set")) == contents(open_source(f"shards:{packed}"))


def test_an_index_of_somebody_elses_shards_is_not_fetched(remote: str, tmp_path: Path) -> None:
    import fsspec

    folder = new_folder(tmp_path / "theirs")
    write_tar(folder / "a.tar", {"0.png": png(), "0.cls": b"0"})
    open_source(f"shards:{folder}")
    fsspec.filesystem("memory").pipe("/theirs/index.json", (folder / "index.json").read_bytes())
    with pytest.raises(ValueError, match=r"memory://theirs has an index without digests"):
        open_source("shards:memory://theirs")


# ------------------------------------------------------------------------------------------------------ from end to end


def test_training_from_shards(tmp_path: Path, classifier_cfg: Callable[..., Any]) -> None:
    """The batches of the packed set are pictures of the set, through the project's own loader and workers."""
    from imgcls.data import build_train_loader

    photos = write_image_folder(tmp_path / "photos", {"ant": 6, "bee": 6}, side=32)
    pack(open_source(f"folder:{photos}"), new_folder(tmp_path / "packed"), PackOptions(shard_samples=5))
    cfg = classifier_cfg("mobilenet_v1_0.25", "INPUT.TRAIN_TRANSFORMS", [["resize"]], "DATALOADER.NUM_WORKERS", 1)
    seen = list(build_train_loader(cfg, open_source(f"shards:{tmp_path}/packed")))
    assert sum(len(batch) for batch in seen) == 32
    pixels = {np.asarray(Image.open(path)).tobytes() for path in photos.rglob("*.png")}
    images = [
        np.ascontiguousarray(image.permute(1, 2, 0).numpy()).tobytes() for batch in seen for image in batch.images
    ]  # type: ignore[union-attr]
    assert set(images) == pixels
