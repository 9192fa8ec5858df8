"""Lists of pictures (CSV, JSON lines), COCO annotations as labels, and what a set costs in memory with workers."""

from __future__ import annotations

import io
import json
import multiprocessing.context as context
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, write_image_folder

from imgcls.data import Source, open_source, splits_below
from imgcls.data.datasets.coco_labels import CocoLabelsSource
from imgcls.data.datasets.files import FileSource, PackedPaths
from imgcls.data.datasets.lists import ListSource
from imgcls.data.reading import ImageError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write("a.csv", "path,label", "a.png,ant")``: a file of these lines; dicts become JSON."""

    def make(name: str, *lines: str | dict[str, Any]) -> Path:
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / name).write_text("\n".join(text) + "\n", encoding="utf-8")
        return tmp_path / name

    return make


def rows_of(source: Source) -> list[tuple[str, Any]]:
    """(file name, label) of each sample, a vector as a list."""
    return [
        (Path(sample["file_name"]).name, sample["label"].tolist() if source.multi_label else sample["label"])
        for sample in source
    ]


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_list_with_one_label(write: Write, tmp_path: Path) -> None:
    file = write("a.csv", "path,label", "x/1.png,cat", '"odd, name.png",ant', "/elsewhere/3.png,cat", "", "4.png,ant")
    source = open_source(f"list:{file}")
    assert (source.name, source.classes, source.multi_label) == (f"list:{file}", ("ant", "cat"), False)
    assert [sample["file_name"] for sample in source] == [
        *(f"{tmp_path}/x/1.png", f"{tmp_path}/odd, name.png", "/elsewhere/3.png", f"{tmp_path}/4.png")
    ]
    assert source.labels is not None and source.labels.dtype == np.int64 and source.labels.tolist() == [1, 0, 1, 0]
    assert [(sample["image_id"], sample["label"]) for sample in source] == [(0, 1), (1, 0), (2, 1), (3, 0)]
    assert source.weights is None
    assert open_source(f"list:{file}", root="/photos")[0]["file_name"] == "/photos/x/1.png"


def test_a_list_with_several_labels(write: Write) -> None:
    file = write("a.csv", "labels,path", "cat|ant,1.png", ",2.png", "bee,3.png", "ant|ant,4.png")
    source = open_source(f"list:{file}")
    assert source.classes == ("ant", "bee", "cat") and source.multi_label
    assert source.labels is not None and source.labels.dtype == np.float32
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert source.labels.tolist() == expected
    assert rows_of(source) == [(f"{index + 1}.png", row) for index, row in enumerate(expected)]


def test_json_lines_say_the_same(write: Write) -> None:
    csv = write("a.csv", "path,label,weight", "1.png,cat,2", "2.png,ant,0.5")
    rows = {"path": "1.png", "label": "cat", "weight": 2}, "", {"path": "2.png", "label": "ant", "weight": 0.5}
    lines = write("a.jsonl", *rows)
    for source in (open_source(f"list:{csv}"), open_source(f"list:{lines}")):
        assert rows_of(source) == [("1.png", 1), ("2.png", 0)]
        assert source.weights is not None and source.weights.tolist() == [2.0, 0.5]
    several = write("b.jsonl", {"path": "1.png", "labels": ["a|b", "c"]}, {"path": "2.png", "labels": [], "weight": 3})
    source = open_source(f"list:{several}")
    assert source.classes == ("a|b", "c") and rows_of(source) == [("1.png", [1, 1]), ("2.png", [0, 0])]
    assert source.weights is not None and source.weights.tolist() == [1.0, 3.0]
    numbers = write("c.jsonl", {"path": "1.png", "label": 10}, {"path": "2.png", "label": 9})
    assert open_source(f"list:{numbers}").classes == ("10", "9")


def test_what_spreadsheets_write(tmp_path: Path) -> None:
    """A mark at the beginning, Windows' line ends, columns of their own."""
    (tmp_path / "a.csv").write_bytes("﻿path,height,label\r\ncafé.png,3,ant\r\nb.png,4,bee\r\n".encode())
    assert rows_of(open_source(f"list:{tmp_path}/a.csv")) == [("café.png", 0), ("b.png", 1)]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["path,label"], r"a\.csv lists no pictures; add rows"),
        (["path", "a.png"], r"line 1 of .*a\.csv has the columns 'path'; needed are 'path' and either"),
        (["path,label,labels", "a.png,x,y"], r"line 1 of .* has the columns .*needed are 'path' and either"),
        (["path;label", "a.png;ant"], r"line 1 of .* has the columns 'path;label'; .*with commas between them"),
        (["path,lable", "a.png,ant"], r"line 1 of .* has the column 'lable'; did you mean 'label'\?"),
        (["path,label,wieght", "a.png,ant,1"], r"has the column 'wieght'; did you mean 'weight'\?"),
        (["path,label,path", "a.png,ant,b"], r"line 1 of .* names a column twice: path, label, path"),
        (["path,label", "a.png,ant", "b,c.png,ant"], r"line 3 of .*a\.csv has 3 cells, the header 2; put quotes"),
        (["path,label", "a.png,ant", ",ant"], r"line 3 of .*a\.csv has the path ''; it must be a file name"),
        (["path,label", "a.png,"], r"line 2 of .* has the label ''; it must be a class name"),
        (["path,label", "a.png, ant"], r"line 2 of .* has the label ' ant'; it must be a class name without blanks"),
        (["path,labels", "a.png,ant| bee"], r"line 2 of .* has the label ' bee'"),
        (["path,labels", "a.png,"], r"no row of .*a\.csv has a label; write class names into its column 'labels'"),
        (["path,label,weight", "a.png,ant,-1"], r"line 2 of .* has the weight '-1'; it must be a finite number >= 0"),
        (["path,label,weight", "a.png,ant,nan"], r"line 2 of .* has the weight 'nan'"),
        (["path,label,weight", "a.png,ant,"], r"line 2 of .* has the weight ''"),
        (["path,label,weight", "a.png,ant,0"], r"every weight in .*a\.csv is 0"),
        (["path,label,split", "a.png,ant,tain"], r"line 2 of .* has the split 'tain'; allowed: train, val, valid"),
        (["path,label", 'a.png,"ant'], r"line 2 of .*a\.csv is no CSV: unexpected end of data"),
    ],
)
def test_a_mistake_in_a_csv_names_its_line(lines: list[str], said: str, write: Write) -> None:
    with pytest.raises(ValueError, match=said):
        ListSource(write("a.csv", *lines))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"line 2 of .*a\.jsonl is no JSON: .*; write one object a line"),
        ("[]", r"line 2 of .*a\.jsonl is no JSON object"),
        ("[" * 100_000, r"line 2 of .*a\.jsonl is no JSON: "),
        ('{"path": "b.png"}', r"line 2 of .* has no label; add 'label'"),
        ('{"path": 3, "label": "ant"}', r"line 2 of .* has the path 3; it must be a file name"),
        ('{"path": "a\\u0000", "label": "ant"}', r"line 2 of .* has the path 'a\\x00'"),
        ('{"path": "b.png", "label": true}', r"line 2 of .* has the label True; it must be a class name"),
        ('{"path": "b.png", "label": ["ant"]}', r"line 2 of .* has the label \['ant'\]"),
        ('{"path": "b.png", "labels": "ant"}', r"line 2 of .* has the labels 'ant'; they must be a list"),
        ('{"path": "b.png", "labels": ["ant"]}', r"line 2 of .* has labels, the lines before it have label; use"),
        ('{"path": "b.png", "label": "ant", "split": "val"}', r"has label and split, the lines before it have label;"),
        ('{"path": "b.png", "label": "ant", "weight": true}', r"line 2 of .* has the weight True"),
        ('{"path": "b.png", "label": "ant", "weigth": 2}', r"line 2 of .* has the column 'weigth'; did you mean"),
    ],
)
def test_a_mistake_in_json_lines_names_its_line(line: str, said: str, write: Write) -> None:
    with pytest.raises(ValueError, match=said):
        ListSource(write("a.jsonl", {"path": "a.png", "label": "ant"}, line))


def test_a_list_that_cannot_be_read(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ValueError, match=rf"there is no file {tmp_path}/gone\.csv; change DATASETS"):
        open_source(f"list:{tmp_path}/gone.csv")
    with pytest.raises(ValueError, match=r"cannot read the list .*a\.txt; allowed endings: \.csv, \.jsonl"):
        open_source(f"list:{write('a.txt', 'path,label')}")
    (tmp_path / "latin.csv").write_bytes("path,label\n1.png,ant\ncafé.png,ant\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 3 of .*latin\.csv is not UTF-8 text: .*; save it as UTF-8"):
        open_source(f"list:{tmp_path}/latin.csv")


def test_a_missing_file_is_named_when_the_set_is_checked(tmp_path: Path, write: Write) -> None:
    write_image_folder(tmp_path, {"ant": 2})
    good = open_source(f"list:{write('good.csv', 'path,label', 'ant/000.png,ant', 'ant/001.png,ant')}")
    good.check_files()
    bad = open_source(f"list:{write('bad.csv', 'path,label', 'ant/000.png,ant', 'ant/gone.png,ant')}")
    with pytest.raises(ImageError, match=rf"cannot read the image {tmp_path}/ant/gone\.png"):
        bad.check_files()


# ------------------------------------------------------------------------------------------------------------- splits


def test_a_column_says_the_split(write: Write) -> None:
    rows = ["1.png,ant,train", "2.png,bee,val", "3.png,ant,test", "4.png,cat,train"]
    name = f"list:{write('a.csv', 'path,label,split', *rows)}"
    parts = {split: rows_of(open_source(f"{name}#{split}")) for split in ("train", "val", "test")}
    assert parts == {"train": [("1.png", 0), ("4.png", 2)], "val": [("2.png", 1)], "test": [("3.png", 0)]}
    assert all(open_source(f"{name}#{split}").classes == ("ant", "bee", "cat") for split in parts)
    assert len(open_source(name)) == 4
    with pytest.raises(ValueError, match=r"no row of .* has the split 'valid'; it has test, train, val; change"):
        open_source(f"{name}#valid")
    only_test = f"list:{write('b.csv', 'path,label,split', '1.png,ant,train', '3.png,ant,test')}"
    assert rows_of(open_source(f"{only_test}#val")) == [("3.png", 0)]


def test_without_the_column_a_tenth_is_held_out_as_from_folders(write: Write, tmp_path: Path) -> None:
    """By the checksum of class and path."""
    write_image_folder(tmp_path / "photos", {"ant": 30, "bee": 12}, side=2)
    rows = [
        f"photos/{name}/{index:03d}.png,{name}"
        for name, number in (("ant", 30), ("bee", 12))
        for index in range(number)
    ]
    name = f"list:{write('a.csv', 'path,label', *rows)}"
    train, val = rows_of(open_source(f"{name}#train")), rows_of(open_source(f"{name}#val"))
    assert (len(train), len(val)) == (38, 4) and [label for _, label in val] == [0, 0, 0, 1]
    checksums = {zlib.crc32(f"ant/photos/ant/{index:03d}.png".encode()): f"{index:03d}.png" for index in range(30)}
    assert {file for file, label in val if label == 0} == {checksums[value] for value in sorted(checksums)[:3]}
    with pytest.raises(ValueError, match=r"has no column 'split', so that #test means nothing"):
        open_source(f"{name}#test")


def test_a_picture_that_is_listed_twice_stays_on_one_side(write: Write) -> None:
    rows = [f"{index % 10}.png,ant" for index in range(40)]
    name = f"list:{write('a.csv', 'path,label', *rows)}"
    train, val = ({file for file, _ in rows_of(open_source(f"{name}#{split}"))} for split in ("train", "val"))
    assert len(val) == 1 and len(train) == 9 and not train & val


def test_several_labels_are_held_out_as_one(write: Write) -> None:
    rows = [f"{index}.png,{'ant|bee' if index % 2 else ''}" for index in range(20)]
    name = f"list:{write('a.csv', 'path,labels', *rows)}"
    train, val = open_source(f"{name}#train"), open_source(f"{name}#val")
    assert (len(train), len(val)) == (18, 2)
    assert sorted(rows_of(train) + rows_of(val)) == sorted(rows_of(open_source(name)))


def test_a_class_of_one_cannot_be_held_out(write: Write) -> None:
    name = f"list:{write('a.csv', 'path,label', '1.png,ant', '1.png,ant', '2.png,bee', '3.png,bee')}"
    with pytest.raises(ValueError, match=r"a\.csv has 1 picture of the class 'ant'; holding some out .* needs 2"):
        open_source(f"{name}#val")


def test_data_may_be_a_list(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.csv", "path,label", "1.png,ant")
    monkeypatch.chdir(tmp_path)
    assert splits_below("a.csv") == (f"list:{tmp_path}/a.csv#train", f"list:{tmp_path}/a.csv#val")


# --------------------------------------------------------------------------------------------------------------- COCO


def coco_content() -> dict[str, Any]:
    return {
        "categories": [{"id": 7, "name": "zebra"}, {"id": 3, "name": "bee"}],
        "images": [
            {"id": 20, "file_name": "b.png"},
            {"id": 10, "file_name": "a.png"},
            {"id": 30, "file_name": "c.png"},
        ],
        "annotations": [
            {"image_id": 10, "category_id": 3, "iscrowd": 0},
            {"image_id": 10, "category_id": 3, "iscrowd": 0},
            {"image_id": 10, "category_id": 7, "iscrowd": 1},
            {"image_id": 20, "category_id": 7, "iscrowd": 1},
        ],
    }


def test_coco_annotations_as_labels(tmp_path: Path) -> None:
    """Categories by id; a crowd counts; a picture without annotations stays, without labels."""
    (tmp_path / "a.json").write_text(json.dumps(coco_content()))
    source = open_source(f"coco-labels:{tmp_path}/a.json@{tmp_path}")
    assert isinstance(source, CocoLabelsSource)
    assert (source.classes, source.multi_label) == (("bee", "zebra"), True)
    assert rows_of(source) == [("b.png", [0, 1]), ("a.png", [1, 1]), ("c.png", [0, 0])]
    assert [sample["image_id"] for sample in source] == [0, 1, 2]


def test_coco_annotations_agree_with_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    content = coco_content()
    content["annotations"] = [{"id": index, **item} for index, item in enumerate(content["annotations"])]
    (tmp_path / "a.json").write_text(json.dumps(content))
    theirs = COCO(str(tmp_path / "a.json"))
    source = open_source(f"coco-labels:{tmp_path}/a.json@{tmp_path}")
    for name, row in rows_of(source):
        (image,) = (item["id"] for item in content["images"] if item["file_name"] == name)
        ids = {item["category_id"] for item in theirs.loadAnns(theirs.getAnnIds(imgIds=image))}
        there = {theirs.loadCats(number)[0]["name"] for number in ids}
        assert {label for label, value in zip(source.classes, row, strict=True) if value} == there


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": 3}, r"a\.json has no list of images, as COCO files have"),
        ({"images": []}, r"a\.json has 2 categories and 0 images; it needs some of both"),
        ({"images": [{"id": "1", "file_name": "a"}]}, r"entry 0 of 'images' in .* needs 'id' \(int\) and 'file_name'"),
        ({"images": [{"id": 1, "file_name": "a"}] * 2}, r"has two images with the id 1; mend the file"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, r"two categories with the name 'a'"),
        (
            {"annotations": [{"id": 5, "image_id": 1, "category_id": 3}]},
            r"annotation 5 of .* speaks of image 1 and cat",
        ),
        (
            {"annotations": [{"image_id": 10, "category_id": 4}]},
            r"annotation 0 of .* speaks of image 10 and category 4",
        ),
    ],
)
def test_coco_files_that_contradict_themselves(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({**coco_content(), **change}))
    with pytest.raises(ValueError, match=said):
        open_source(f"coco-labels:{tmp_path}/a.json@{tmp_path}")


def test_a_coco_name_without_its_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the data set 'coco-labels:a\.json'; expected coco-labels:ANN"):
        open_source("coco-labels:a.json")


# ------------------------------------------------------------------------------------------------------------- memory


def test_packed_paths() -> None:
    paths = ["a", "", "é/ü.jpg", os.fsdecode(b"\xff.png"), "a"]
    packed = PackedPaths.of(iter(paths))
    assert [packed[index] for index in range(len(packed))] == paths
    assert len(PackedPaths.of([])) == 0


class Starting:
    """Stands in for the process that spawn is starting, on whose behalf objects are pickled."""

    class DupFd:
        def __init__(self, descriptor: int) -> None:
            self.descriptor = descriptor

        def detach(self) -> int:
            return self.descriptor

    def duplicate_for_child(self, descriptor: int) -> int:
        return os.dup(descriptor)


@pytest.fixture
def sent() -> Iterator[Callable[[Any], tuple[Any, int]]]:
    """``sent(object)``: what a worker that spawn starts gets, and how many bytes travelled."""

    def send(value: Any) -> tuple[Any, int]:
        context.set_spawning_popen(Starting())
        try:
            stream = io.BytesIO()
            ForkingPickler(stream).dump(value)
        finally:
            context.set_spawning_popen(None)
        return ForkingPickler.loads(stream.getvalue()), len(stream.getvalue())

    yield send


def test_spawned_workers_get_handles_instead_of_bytes(write: Write, sent: Callable[[Any], tuple[Any, int]]) -> None:
    file = write("a.csv", "path,label", *(f"folder/{index:08d}.png,{index % 7}" for index in range(20_000)))
    source = ListSource(file)
    expected = rows_of(source)[::99]
    before = source.labels
    one, size = sent(source)
    two, _ = sent(source)
    assert size < 5_000  # the paths alone are 380,000 bytes
    assert [rows_of(each)[::99] for each in (one, two, source)] == [expected] * 3
    one.labels[0] = 5  # nobody does that; it shows that there is one memory
    assert two.labels[0] == source.labels[0] == 5
    assert before[0] == 0  # what somebody had in hand is still theirs
    assert sent(np.zeros(20_000))[1] > 100_000  # the twin: an array by itself travels as bytes


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux'")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_forked_workers_do_not_copy_a_list(tmp_path: Path) -> None:
    import runpy

    script = runpy.run_path(str(ROOT / "scripts/loader_memory.py"))
    measure, list_of = script["measure"], script["list_of"]
    empty = measure(list_of(10, tmp_path), 2, "fork")["private"]
    source = list_of(60_000, tmp_path)
    assert isinstance(source, FileSource)
    ours = measure(source, 2, "fork")["private"] - empty
    dicts = measure(list(source), 2, "fork")["private"] - empty  # the twin: reading counts references, which copies
    assert dicts > 2**20 and ours < 0.6 * dicts
