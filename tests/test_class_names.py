"""Class names: one order, alignment of every kind of set by name, and what is refused instead of drifting."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_image_folder
from detectron2.data import DatasetCatalog, MetadataCatalog

from imgcls.data import Source, open_source
from imgcls.data.datasets import ArraySource
from imgcls.data.datasets.class_names import AlignedSource, align, aligned, ordered

COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "émeu"), unicodedata.normalize("NFD", "émeu")


def array_source(labels: np.ndarray, classes: list[str], **more: Any) -> ArraySource:
    return ArraySource("pictures", np.zeros((len(labels), 2, 2), np.uint8), labels, classes, **more)


# -------------------------------------------------------------------------------------------------------------- order


def test_names_are_sorted_as_text_and_numbers_are_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "imgcls.data")
    assert ordered(["2", "10", "1"], "the set") == ("1", "10", "2")
    assert (
        "the set: the classes are numbers and sorted as text, so that index 0 is '1', 1 is '10', 2 is '2'"
        in caplog.text
    )


@pytest.mark.parametrize("names", [["0", "1", "2"], ["01", "02", "10"], ["1", "10", "two"], ["ant", "B"]])
def test_names_whose_order_nobody_mistakes_are_not_said(names: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "imgcls.data")
    assert ordered(reversed(names), "the set") == tuple(sorted(names))
    assert caplog.text == ""


def test_two_spellings_that_look_alike_are_no_two_classes() -> None:
    assert COMPOSED != DECOMPOSED
    assert ordered([DECOMPOSED, "ant"], "the set") == ("ant", COMPOSED)
    with pytest.raises(ValueError, match=r"the set has the class '.*' in two Unicode spellings, .*\\xe9.*; give both"):
        ordered([COMPOSED, DECOMPOSED], "the set")
    assert ordered(["a", "A"], "the set") == ("A", "a")  # letters written by hand are such classes


# ---------------------------------------------------------------------------------------------------------- alignment


def test_places_follow_the_names(caplog: pytest.LogCaptureFixture) -> None:
    assert align(["cat", "ant", DECOMPOSED], ["ant", "bee", "cat", COMPOSED], "val") == [2, 0, 3]
    assert "val has no pictures of 1 of the 4 classes: bee" in caplog.text
    caplog.clear()
    assert align(["bee", "ant"], ["ant", "bee"], "val") == [1, 0]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (["ant", "dog", "eel"], r"val has the class 'dog' \(2 in all\) that the training set has not; its classes are"),
        (["Ant", "Bee"], r"the class 'Ant' \(2 in all\) .* has not, where it is written 'ant'"),
        ([" ant"], r"the class ' ant' \(1 in all\) .* has not, where it is written 'ant'"),
        (["0", "1"], r"the class '0' \(2 in all\)"),  # renumbered
        (["__MACOSX", "ant"], r"the class '__MACOSX' \(1 in all\)"),
        ([COMPOSED, DECOMPOSED], r"val has the class '.*' in two Unicode spellings"),
    ],
)
def test_what_cannot_be_aligned_is_refused(found: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        align(found, ["ant", "bee", COMPOSED], "val")


def test_labels_are_renumbered() -> None:
    source = array_source(np.array([0, 1, 1, -1]), ["cat", "ant"])  # -1: no label
    seen = aligned(source, ["ant", "bee", "cat"])
    assert isinstance(seen, AlignedSource) and seen.classes == ("ant", "bee", "cat")
    assert [sample["label"] for sample in seen] == [2, 0, 0, -1]
    np.testing.assert_array_equal(seen.labels, [2, 0, 0, -1])
    assert len(seen) == 4 and seen[0]["pixels"] is not None
    assert aligned(source, ("cat", "ant")) is source and aligned(source, None) is source


def test_columns_are_renumbered() -> None:
    rows = np.array([[1, 0], [1, 1], [0, 0]], dtype=np.float32)
    seen = aligned(array_source(rows, ["cat", "ant"], multi_label=True), ["ant", "bee", "cat"])
    expected = [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    np.testing.assert_array_equal(seen.labels, expected)
    np.testing.assert_array_equal([sample["label"] for sample in seen], expected)
    assert seen.multi_label and seen[0]["label"].dtype == np.float32


# ------------------------------------------------------------------------------------------------- every kind of set


def a_folder(folder: Path) -> str:
    return f"folder:{write_image_folder(folder, {'cat': 1, 'ant': 2})}"


def a_list(folder: Path) -> str:
    write_image_folder(folder, {"ant": 2, "cat": 1})
    (folder / "list.csv").write_text("path,label\nant/000.png,ant\nant/001.png,ant\ncat/000.png,cat\n")
    return f"list:{folder}/list.csv"


def registered_dicts(folder: Path) -> str:
    write_image_folder(folder, {"ant": 2, "cat": 1})
    labels = {"ant/000.png": 1, "ant/001.png": 1, "cat/000.png": 0}  # its classes stand the other way round
    samples = [{"file_name": str(folder / name), "label": label} for name, label in labels.items()]
    DatasetCatalog.register("other_way_round", lambda: samples)
    MetadataCatalog.get("other_way_round").set(classes=["cat", "ant"])
    return "other_way_round"


@pytest.mark.parametrize("make", [a_folder, a_list, registered_dicts])
def test_every_set_follows_the_training_sets_names(make: Callable[[Path], str], tmp_path: Path) -> None:
    try:
        name = make(tmp_path)
        source = open_source(name, classes=("ant", "bee", "cat"))
        assert source.classes == ("ant", "bee", "cat")
        named = sorted((Path(sample["file_name"]).parent.name, sample["label"]) for sample in source)
        assert named == [("ant", 0), ("ant", 0), ("cat", 2)]
        assert sorted(source.labels.tolist()) == [0, 0, 2]  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"has the class 'cat' \(1 in all\) that the training set has not"):
            open_source(name, classes=("ant", "bee"))
    finally:
        if "other_way_round" in DatasetCatalog.list():
            DatasetCatalog.remove("other_way_round")
            MetadataCatalog.remove("other_way_round")


def test_coco_categories_follow_the_names(tmp_path: Path) -> None:
    """Two files often give one category different ids."""
    sources: list[Source] = []
    for ids in ({"ant": 1, "bee": 2}, {"ant": 9, "bee": 4}):
        folder = write_image_folder(tmp_path / str(ids["ant"]), {"images": 1})
        content = {
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
            "images": [{"id": 5, "file_name": "000.png"}],
            "annotations": [{"image_id": 5, "category_id": ids["ant"]}],
        }
        (folder / "labels.json").write_text(json.dumps(content))
        name = f"coco-labels:{folder}/labels.json@{folder}/images"
        sources.append(open_source(name, classes=sources[0].classes if sources else None))
    assert [source.classes for source in sources] == [("ant", "bee")] * 2
    assert [source[0]["label"].tolist() for source in sources] == [[1, 0]] * 2


def test_a_folder_that_a_mac_wrote(tmp_path: Path) -> None:
    """File names in Unicode's decomposed form, macOS' and Jupyter's own folders: no class drifts."""
    write_image_folder(tmp_path / "train", {"ant": 1, COMPOSED: 1})
    write_image_folder(tmp_path / "val", {"ant": 1, DECOMPOSED: 1, "__MACOSX": 1, ".ipynb_checkpoints": 1})
    train = open_source(f"folder:{tmp_path}/train")
    val = open_source(f"folder:{tmp_path}/val", classes=train.classes)
    assert val.classes == train.classes == ("ant", COMPOSED)
    assert [sample["label"] for sample in val] == [0, 1]
    assert all(Path(sample["file_name"]).is_file() for sample in val)
