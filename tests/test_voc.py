"""Pascal VOC to COCO JSON: boxes, classes, difficult objects, dirt, and all or nothing."""

from __future__ import annotations

import json
import os
import runpy
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.pascal_voc import load_voc_instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from imgcls.commands.prepare_voc import main
from imgcls.data.voc import build_coco, convert_voc, find_classes

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prepare_voc.py"
BCCD = Path(os.environ.get("IMGCLS_TEST_DATA", "no folder named")) / "bccd-voc.tar"


def voc_object(name: str, *box: float | str, difficult: str | None = "0") -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox></object>"


def add_image(
    root: Path,
    voc_id: str,
    *objects: str,
    size: str | None = "<size><width>40</width><height>30</height><depth>3</depth></size>",
    suffix: str = ".png",
    filename: str = "elsewhere/wrong.bmp",
) -> None:
    """A 40x30 image and its XML; the XML's own idea of the file name is wrong on purpose."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{voc_id}{suffix}")
    text = f"<annotation><folder>far</folder><filename>{filename}</filename>{size or ''}{''.join(objects)}</annotation>"
    (root / "Annotations" / f"{voc_id}.xml").write_text(text, encoding="utf-8")


def add_split(root: Path, split: str, *lines: str) -> None:
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def one_image(root: Path, *objects: str, **options: Any) -> Path:
    add_image(root, "a", *objects, **options)
    add_split(root, "train", "a")
    return root


def boxes(root: Path, split: str = "train", **options: Any) -> list[list[float]]:
    return [item["bbox"] for item in build_coco(root, split, **options)[0]["annotations"]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two splits; the class "ant" is only in val, "dog" in both, "cat" only in train."""
    path = tmp_path / "VOCtiny"
    add_image(path, "000007", voc_object("dog", 1, 1, 40, 30), voc_object("cat", 10, 20, 30, 25))
    add_image(path, "000003", voc_object("dog", 5, 6, 5, 6), suffix=".JPG")
    add_image(path, "000005", voc_object("ant", 2, 3, 11, 23), suffix=".jpeg")
    add_split(path, "train", "000007", "000003")
    add_split(path, "val", "000005")
    return path


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names put in here are taken out of detectron2's catalogs afterwards."""
    names: list[str] = []
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


# Boxes


@pytest.mark.parametrize(
    ("voc", "coco"),
    [
        ((1, 1, 40, 30), [0, 0, 40, 30]),  # the whole image
        ((10, 20, 30, 25), [9, 19, 21, 6]),
        ((5, 6, 5, 6), [4, 5, 1, 1]),  # one pixel
        ((40, 30, 40, 30), [39, 29, 1, 1]),  # the last pixel
        ((2.5, 3.25, 10.5, 9.0), [1.5, 2.25, 9.0, 6.75]),
        ((" 2 ", "3\n", "4", "5"), [1, 2, 3, 3]),
    ],
)
def test_box_by_hand(tmp_path: Path, voc: Sequence[float | str], coco: list[float]) -> None:
    result, summary = build_coco(one_image(tmp_path, voc_object("dog", *voc)), "train")
    assert [item["bbox"] for item in result["annotations"]] == [coco]
    assert result["annotations"][0]["area"] == coco[2] * coco[3]
    assert (summary["clipped"], summary["dropped"]) == (0, 0)


def covers_the_same_pixels(voc: tuple[int, int, int, int], coco: Sequence[float]) -> bool:
    """Compare pixel by pixel: VOC lists 1-based pixels with both ends, COCO covers pixel i as [i, i + 1]."""
    x, y, width, height = coco
    marked = {
        (column, row)
        for row in range(30)
        for column in range(40)
        if x <= column and column + 1 <= x + width and y <= row and row + 1 <= y + height
    }
    listed = {(column - 1, row - 1) for row in range(voc[1], voc[3] + 1) for column in range(voc[0], voc[2] + 1)}
    return marked == listed and width * height == len(listed)


@pytest.mark.parametrize("voc", [(1, 1, 40, 30), (3, 4, 9, 11), (7, 8, 7, 8)])
def test_box_covers_the_same_pixels(tmp_path: Path, voc: tuple[int, int, int, int]) -> None:
    (coco,) = boxes(one_image(tmp_path, voc_object("dog", *voc)))
    assert covers_the_same_pixels(voc, coco)
    x0, y0, x1, y1 = voc
    for wrong in (
        [x0, y0, x1 - x0 + 1, y1 - y0 + 1],  # still 1-based
        [x0 - 1, y0 - 1, x1 - x0, y1 - y0],  # last pixel lost
        [x0, y0, x1 - x0, y1 - y0],
        [x0 - 1, y0 - 1, x1 - x0 + 2, y1 - y0 + 1],
    ):
        assert not covers_the_same_pixels(voc, wrong)


def test_boxes_agree_with_detectron2s_voc_loader(tmp_path: Path) -> None:
    for voc_id in ("a", "b"):
        add_image(tmp_path, voc_id, voc_object("dog", 3, 4, 17, 28), voc_object("cat", 1, 1, 2, 30))
    add_split(tmp_path, "train", "a", "b")
    theirs = [
        item for record in load_voc_instances(str(tmp_path), "train", ["cat", "dog"]) for item in record["annotations"]
    ]
    ours = build_coco(tmp_path, "train")[0]["annotations"]
    assert [item["category_id"] - 1 for item in ours] == [item["category_id"] for item in theirs] == [1, 0, 1, 0]
    xyxy = [[x, y, x + width, y + height] for x, y, width, height in (item["bbox"] for item in ours)]
    assert xyxy == [item["bbox"] for item in theirs]


def test_boxes_outside_the_image_are_clipped_or_dropped(tmp_path: Path) -> None:
    root = one_image(
        tmp_path,
        voc_object("dog", 0, 0, 10, 10),  # a 0-based box: one pixel over the edge
        voc_object("dog", 31, 21, 45, 99),
        voc_object("dog", 41, 1, 50, 10),  # right of the image
        voc_object("dog", -9, 1, 0, 10),  # left of it
        voc_object("dog", 1, 1, 40, 30),
    )
    coco, summary = build_coco(root, "train")
    assert [item["bbox"] for item in coco["annotations"]] == [[0, 0, 10, 10], [30, 20, 10, 10], [0, 0, 40, 30]]
    assert [item["area"] for item in coco["annotations"]] == [100, 100, 1200]
    assert [item["id"] for item in coco["annotations"]] == [1, 2, 3]
    assert (summary["clipped"], summary["dropped"], summary["boxes"]) == (2, 2, 3)
    assert summary["boxes_per_class"] == {"dog": 3}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (voc_object("dog", 9, 1, 8, 5), r"a\.xml object 1 \(dog\) has the box xmin=9, ymin=1, xmax=8.*xmax must not"),
        (voc_object("dog", 1, 9, 5, 8), r"ymin=9, xmax=5, ymax=8.*nor ymax below ymin"),
        (voc_object("dog", 1, "wide", 5, 8), r"a\.xml object 1 \(dog\) has bndbox/ymin = 'wide'; allowed is a number"),
        (voc_object("dog", 1, 1, "nan", 8), r"bndbox/xmax = 'nan'; allowed is a number"),
        (voc_object("dog", 1, 1, 5, "1e999"), r"bndbox/ymax = '1e999'; allowed is a number"),
        ("<object><name>dog</name></object>", r"bndbox/xmin = None; allowed is a number"),
        ("<object><name> </name></object>", r"a\.xml object 1 has no <name>"),
        (voc_object("dog", 1, 1, 5, 5, difficult="maybe"), r"difficult = 'maybe'; allowed are 0 and 1"),
    ],
)
def test_unusable_object(tmp_path: Path, item: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_coco(one_image(tmp_path, item), "train")


def test_boxes_of_parts_are_not_objects(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    person = voc_object("person", 1, 1, 9, 9).replace("<name>person", f"{part}<name>person")
    coco, _ = build_coco(one_image(tmp_path, person), "train")
    assert [item["name"] for item in coco["categories"]] == ["person"]
    assert [item["bbox"] for item in coco["annotations"]] == [[0, 0, 9, 9]]


# Classes


def test_classes_are_those_of_every_split(root: Path) -> None:
    expected = [{"id": 1, "name": "ant"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    train, val = build_coco(root, "train")[0], build_coco(root, "val")[0]
    assert train["categories"] == val["categories"] == expected
    assert [item["category_id"] for item in train["annotations"]] == [3, 2, 3]
    assert [item["category_id"] for item in val["annotations"]] == [1]
    assert find_classes(root) == ["ant", "cat", "dog"]


def test_given_classes_keep_their_order(root: Path) -> None:
    coco, summary = build_coco(root, "train", ["dog", "emu", "cat"])
    assert [(item["id"], item["name"]) for item in coco["categories"]] == [(1, "dog"), (2, "emu"), (3, "cat")]
    assert [item["category_id"] for item in coco["annotations"]] == [1, 3, 1]
    assert summary["boxes_per_class"] == {"dog": 2, "emu": 0, "cat": 1}


def test_class_outside_the_given_ones(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"000007\.xml object 2 is named 'cat'; allowed are \['dog', 'ant'\].*--classes"
    ):
        build_coco(root, "train", ["dog", "ant"])
    assert len(build_coco(root, "val", ["dog", "ant"])[0]["annotations"]) == 1  # "cat" is in train only


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], r"classes is \[\]; allowed is a list of at least one name"),
        ("dog", r"classes is 'dog'; allowed is a list"),
        (["dog", " "], r"classes is \['dog', ' '\]"),
        (["dog", "cat", "dog"], r"classes names \['dog'\] more than once"),
    ],
)
def test_unusable_classes(root: Path, classes: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_coco(root, "train", classes)


def test_no_object_anywhere(tmp_path: Path) -> None:
    root = one_image(tmp_path)
    with pytest.raises(ValueError, match=r"Annotations has no XML with an object.*--classes"):
        build_coco(root, "train")
    assert build_coco(root, "train", ["dog"])[1]["images_without_boxes"] == 1


# Difficult objects


@pytest.mark.parametrize(("keep", "crowd"), [(False, [0, 1, 0]), (True, [0, 0, 0])])
def test_difficult_objects(tmp_path: Path, keep: bool, crowd: list[int]) -> None:
    root = one_image(
        tmp_path,
        voc_object("dog", 1, 1, 5, 5),
        voc_object("dog", 11, 11, 20, 20, difficult="1"),
        voc_object("dog", 21, 21, 30, 30, difficult=None),
    )
    coco, summary = build_coco(root, "train", keep_difficult=keep)
    assert [item["iscrowd"] for item in coco["annotations"]] == crowd
    assert [item["difficult"] for item in coco["annotations"]] == [0, 1, 0]
    assert not any("ignore" in item for item in coco["annotations"])  # detectron2 refuses that key
    assert (summary["difficult"], summary["boxes"]) == (1, 3)


def average_precision(path: Path, found: Sequence[Sequence[float]]) -> float:
    """COCO AP at IoU 0.5 of detections in image 1, the first one the surest."""
    truth = COCO(str(path))
    results = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9 - 0.1 * rank} for rank, box in enumerate(found)
    ]
    run = COCOeval(truth, truth.loadRes(results), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return float(run.stats[1])


def test_evaluation_ignores_difficult_objects(tmp_path: Path) -> None:
    easy, hard, nothing = [0, 0, 10, 10], [20, 10, 10, 10], [10, 15, 8, 8]
    root = one_image(tmp_path, voc_object("dog", 1, 1, 10, 10), voc_object("dog", 21, 11, 30, 20, difficult="1"))
    ignored, kept = tmp_path / "ignored.json", tmp_path / "kept.json"
    convert_voc(root, "train", ignored)
    convert_voc(root, "train", kept, keep_difficult=True)
    assert average_precision(ignored, [easy]) == pytest.approx(1.0)  # not a miss
    assert average_precision(ignored, [hard, easy]) == pytest.approx(1.0)  # nor a false alarm
    assert average_precision(ignored, [nothing, easy]) == pytest.approx(0.5)
    assert average_precision(kept, [hard, easy]) == pytest.approx(1.0)
    assert average_precision(kept, [easy]) == pytest.approx(51 / 101)  # recall 0 to 0.5 of COCO's 101 points


# Image files and sizes


def test_image_files_are_found_by_id(root: Path) -> None:
    images = build_coco(root, "train")[0]["images"] + build_coco(root, "val")[0]["images"]
    assert [item["file_name"] for item in images] == ["000007.png", "000003.JPG", "000005.jpeg"]
    assert [item["id"] for item in images] == [1, 2, 1]
    assert {(item["width"], item["height"]) for item in images} == {(40, 30)}


def test_missing_and_doubled_image(root: Path) -> None:
    image = root / "JPEGImages" / "000003.JPG"
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / "000003.png")
    with pytest.raises(ValueError, match=r"more than one image: \['000003\.JPG', '000003\.png'\] for id '000003'"):
        build_coco(root, "train")
    (root / "JPEGImages" / "000003.png").unlink()
    image.rename(image.with_suffix(".gif"))
    with pytest.raises(ValueError, match=r"has no image for id '000003'; allowed is one file.*\.jpg, \.jpeg, \.png"):
        build_coco(root, "train")


@pytest.mark.parametrize(
    ("size", "counted"),
    [
        (None, 1),
        ("<size><width>0</width><height>0</height></size>", 1),
        ("<size><width></width><height>30</height></size>", 1),
        ("<size><width>40.0</width><height> 30 </height></size>", 0),
    ],
)
def test_size_from_the_image(tmp_path: Path, size: str | None, counted: int) -> None:
    coco, summary = build_coco(one_image(tmp_path, voc_object("dog", 1, 1, 99, 99), size=size), "train")
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (40, 30)
    assert coco["annotations"][0]["bbox"] == [0, 0, 40, 30]
    assert summary["size_from_image"] == counted


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("<size><width>30</width><height>40</height></size>", r"states an image of 30x40, but .*a\.png is 40x30"),
        ("<size><width>-40</width><height>30</height></size>", r"size/width = '-40'; allowed is a whole number"),
        ("<size><width>40</width><height>30.5</height></size>", r"size/height = '30\.5'"),
        ("<size><width>40</width><height>tall</height></size>", r"size/height = 'tall'"),
    ],
)
def test_unusable_size(tmp_path: Path, size: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_coco(one_image(tmp_path, voc_object("dog", 1, 1, 2, 2), size=size), "train")


def test_size_is_the_one_after_exif_rotation(tmp_path: Path) -> None:
    root = one_image(tmp_path, voc_object("dog", 1, 1, 30, 40), size=None, suffix=".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / "a.jpg", exif=exif)
    coco, _ = build_coco(root, "train")
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (30, 40)
    assert coco["annotations"][0]["bbox"] == [0, 0, 30, 40]


def test_file_that_is_no_image(root: Path) -> None:
    (root / "JPEGImages" / "000007.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"cannot read the image .*/000007\.png: it is no BMP"):
        build_coco(root, "train")


# Split lists


def test_numbers_behind_ids(root: Path) -> None:
    add_image(root, "photo 1", voc_object("dog", 1, 1, 2, 2))
    add_split(root, "dog_train", "000007  1", "000003 -1", "", "photo 1", "  000005\t0  ")
    images = build_coco(root, "dog_train")[0]["images"]
    assert [item["file_name"] for item in images] == ["000007.png", "000003.JPG", "photo 1.png", "000005.jpeg"]
    add_split(root, "dog_train", "photo 1 1")
    assert [item["file_name"] for item in build_coco(root, "dog_train")[0]["images"]] == ["photo 1.png"]


def test_list_from_another_system(root: Path) -> None:
    path = root / "ImageSets" / "Main" / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf000007\r\n000003\r\n")
    assert len(build_coco(root, "train")[0]["images"]) == 2
    path.write_bytes("Mädchen\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt is not UTF-8 text"):
        build_coco(root, "train")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], r"train\.txt is empty.*the splits there are \['train', 'val'\]"),
        (["000007", "000003", "000007"], r"train\.txt lists '000007' more than once"),
        (["000007", "000009"], r"train\.txt line 2 names '000009', but .*000009\.xml is missing"),
        (["../JPEGImages/000007"], r"line 1 is '\.\./JPEGImages/000007'; an id is a file name without folder"),
    ],
)
def test_unusable_split_list(root: Path, lines: list[str], message: str) -> None:
    add_split(root, "train", *lines)
    with pytest.raises(ValueError, match=message):
        build_coco(root, "train")


@pytest.mark.parametrize("split", ["tarin", "../Main/train", ""])
def test_unknown_split(root: Path, split: str) -> None:
    with pytest.raises(
        ValueError, match=r"no split '.*' in .*; the splits there are \['train', 'val'\]; change --splits"
    ):
        build_coco(root, split)


def test_folder_that_is_no_voc_root(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"JPEGImages has no folder JPEGImages; a VOC root has JPEGImages, Annotations"
    ):
        build_coco(root / "JPEGImages", "train")


# XML


BOMB = '<!DOCTYPE annotation [<!ENTITY a "dog"><!ENTITY b "&a;&a;&a;&a;">]>'


@pytest.mark.parametrize("declaration", [BOMB, "<!DOCTYPE annotation>", '<!DOCTYPE annotation SYSTEM "voc.dtd">'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_doctype_is_refused(tmp_path: Path, declaration: str, encoding: str) -> None:
    root = one_image(tmp_path, voc_object("dog", 1, 1, 2, 2))
    path = root / "Annotations" / "a.xml"
    content = path.read_text(encoding="utf-8")
    path.write_text(declaration + content, encoding=encoding)
    for call in (lambda: build_coco(root, "train", ["dog"]), lambda: find_classes(root)):
        with pytest.raises(ValueError, match=r"a\.xml cannot be used as annotation: it has a DOCTYPE"):
            call()
    path.write_text(content, encoding=encoding)
    assert find_classes(root) == ["dog"]


def test_characters_xml_escapes(tmp_path: Path) -> None:
    root = one_image(tmp_path, voc_object("cat &amp; d&#246;g", 1, 1, 2, 2))
    assert find_classes(root) == ["cat & dög"]
    summary = convert_voc(root, "train", tmp_path / "out.json")
    assert summary["boxes_per_class"] == {"cat & dög": 1}
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["categories"][0]["name"] == "cat & dög"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object></annotation>", r"a\.xml cannot be used as annotation: mismatched tag"),
        ("", r"a\.xml cannot be used as annotation: no element found"),
        ("<annotation>&dog;</annotation>", r"a\.xml cannot be used as annotation: undefined entity"),
        ("<svg/>", r"a\.xml has the root element <svg>; a VOC file has <annotation>"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', r"a\.xml cannot be used as annotation: .*encoding"),
    ],
)
def test_unusable_xml(tmp_path: Path, text: str, message: str) -> None:
    root = one_image(tmp_path)
    (root / "Annotations" / "a.xml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        build_coco(root, "train", ["dog"])


# The file


def test_equal_input_gives_equal_bytes(root: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "one" / "train.json", tmp_path / "two" / "deep" / "other.json"
    convert_voc(root, "train", first)
    moved = root.rename(tmp_path / "moved")
    convert_voc(moved, "train", second)
    assert first.read_bytes() == second.read_bytes()
    convert_voc(moved, "train", second, ["dog", "cat", "ant"])
    assert first.read_bytes() != second.read_bytes()
    assert [path.name for path in second.parent.iterdir()] == ["other.json"]


def test_failure_leaves_the_older_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out" / "train.json"
    convert_voc(root, "train", output)
    before = output.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "replace", fail)
        convert_voc(root, "val", output)
    (root / "Annotations" / "000003.xml").write_text("<annotation>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"000003\.xml cannot be used"):
        convert_voc(root, "train", output, ["dog", "cat"])
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["train.json"]
    convert_voc(root, "val", output, ["ant"])
    assert output.read_bytes() != before


def test_output_that_is_a_folder(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output .* is a folder; allowed is a file name"):
        convert_voc(root, "train", tmp_path)


def test_pycocotools_and_detectron2_read_it(root: Path, tmp_path: Path, registered: list[str]) -> None:
    add_image(root, "empty")
    add_split(root, "train", "000007", "empty", "000003")
    output = tmp_path / "train.json"
    summary = convert_voc(root, "train", output)
    assert {key: summary[key] for key in ("split", "images", "images_without_boxes", "boxes", "output")} == {
        "split": "train",
        "images": 3,
        "images_without_boxes": 1,
        "boxes": 3,
        "output": str(output),
    }
    coco = COCO(str(output))
    assert [len(coco.getAnnIds(imgIds=number)) for number in (1, 2, 3)] == [2, 0, 1]
    assert 0 not in coco.anns  # pycocotools takes a match with id 0 for none

    register_coco_instances("voc_tiny_train", {}, str(output), str(root / "JPEGImages"))
    registered.append("voc_tiny_train")
    records = DatasetCatalog.get("voc_tiny_train")
    assert MetadataCatalog.get("voc_tiny_train").thing_classes == ["ant", "cat", "dog"]
    assert [[item["category_id"] for item in record["annotations"]] for record in records] == [[2, 1], [], [2]]
    for record in records:
        with Image.open(record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])


# The command


def test_command_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], registered: list[str]) -> None:
    output = tmp_path / "coco"
    assert main(["--root", str(root), "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["train.json", "val.json"]
    printed = capsys.readouterr().out
    table = {line[:20].strip(): line[20:].split() for line in printed.splitlines()[:11]}
    assert table["images"] == ["2", "1"]
    assert table["boxes"] == ["3", "1"]
    assert (table["class ant"], table["class cat"], table["class dog"]) == (["0", "1"], ["1", "0"], ["2", "0"])

    python, yaml = printed.split("# Python")[1].split("# YAML")
    registered += ["VOCtiny_train", "VOCtiny_val"]
    exec(python.partition("\n")[2])  # the very lines that the user is told to use
    cfg = get_cfg()
    (tmp_path / "printed.yaml").write_text(yaml.partition("\n")[2])
    cfg.merge_from_file(str(tmp_path / "printed.yaml"))
    assert [len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN + cfg.DATASETS.TEST] == [2, 1]
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 3


def test_trainval_is_not_trained_on_besides_train(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_split(root, "trainval", "000007", "000003", "000005")
    splits = ["--splits", "train", "trainval", "val"]
    assert main(["--root", str(root), "--output", str(tmp_path / "out"), *splits]) == 0
    printed = capsys.readouterr().out
    assert 'TRAIN: ["VOCtiny_train"]' in printed
    assert 'TEST: ["VOCtiny_val"]' in printed


def test_command_line_options(tmp_path: Path) -> None:
    root = one_image(tmp_path / "voc", voc_object("dog", 1, 1, 5, 5, difficult="1"))
    common = ["--root", str(root), "--output", str(tmp_path), "--splits", "train"]
    assert main([*common, "--classes", "emu", "dog"]) == 0
    coco = json.loads((tmp_path / "train.json").read_text())
    assert ([item["name"] for item in coco["categories"]], coco["annotations"][0]["iscrowd"]) == (["emu", "dog"], 1)
    assert main([*common, "--keep-difficult"]) == 0
    coco = json.loads((tmp_path / "train.json").read_text())
    assert ([item["name"] for item in coco["categories"]], coco["annotations"][0]["iscrowd"]) == (["dog"], 0)


def test_command_line_error_is_one_line_and_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "JPEGImages" / "000005.jpeg").unlink()  # in val, converted last
    assert main(["--root", str(root), "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "000005" in captured.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert main(["--root", str(root), "--output", str(tmp_path / "file" / "x"), "--splits", "train"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_script(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, code in (("train", 0), ("tarin", 2)):
        words = ["--root", str(root), "--output", str(tmp_path / "out"), "--splits", split]
        monkeypatch.setattr(sys, "argv", ["prepare_voc.py", *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert stop.value.code == code
    assert (tmp_path / "out" / "train.json").is_file()


# Real photographs


def count_with_elementtree(root: Path, split: str) -> tuple[int, dict[str, int], float]:
    """Images, objects per name and the sum of all box areas in whole pixels, read without imgcls."""
    ids = (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    names: dict[str, int] = {}
    area = 0
    for voc_id in ids:
        for item in ET.parse(root / "Annotations" / f"{voc_id}.xml").getroot().iter("object"):
            name = str(item.findtext("name"))
            names[name] = names.get(name, 0) + 1
            left, top, right, bottom = (
                int(str(item.findtext(f"bndbox/{key}"))) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            area += len(range(left, right + 1)) * len(range(top, bottom + 1))
    return len(ids), names, area


@pytest.mark.skipif(not BCCD.is_file(), reason="IMGCLS_TEST_DATA names no folder with bccd-voc.tar")
def test_blood_cells(tmp_path: Path) -> None:
    with tarfile.open(BCCD) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / "BCCD"
    for split in ("train", "val", "trainval", "test"):
        summary = convert_voc(root, split, tmp_path / f"{split}.json")
        images, names, area = count_with_elementtree(root, split)
        assert summary["images"] == images
        assert summary["boxes_per_class"] == names
        assert summary["classes"] == ["Platelets", "RBC", "WBC"]
        assert (summary["clipped"], summary["dropped"]) == (0, 0)
        coco = COCO(str(tmp_path / f"{split}.json"))
        assert sum(item["area"] for item in coco.anns.values()) == area
