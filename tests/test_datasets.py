"""Data sets: folders of any shape, known names, the user's own, and what is wrong with them in words."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_image_folder
from detectron2.data import DatasetCatalog, MetadataCatalog

from imgcls.data import SETS, open_source, open_sources, splits_below
from imgcls.data.datasets import ArraySource, ConcatSource, FolderSource, Source, catalog
from imgcls.data.datasets.coco import coco_paths, count_categories, register_coco_names
from imgcls.data.reading import ImageError


def files_of(source: Source, root: Path) -> list[tuple[str, int]]:
    """(path below root, label) of each sample."""
    return [(os.path.relpath(sample["file_name"], root), sample["label"]) for sample in source]


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    """``registered(name, samples, classes=[...])``: an entry in detectron2's catalogs for the length of a test."""
    names = []

    def register(name: str, samples: Any, **metadata: Any) -> None:
        names.append(name)
        DatasetCatalog.register(name, lambda: samples)
        MetadataCatalog.get(name).set(**metadata)

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


# ------------------------------------------------------------------------------------------------- shapes of folders


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    source = FolderSource(write_image_folder(tmp_path, {"bee": 1, "ant": 2}))
    assert source.classes == ("ant", "bee")
    assert len(source) == 3
    assert files_of(source, tmp_path) == [("ant/000.png", 0), ("ant/001.png", 0), ("bee/000.png", 1)]
    assert [sample["image_id"] for sample in source] == [0, 1, 2]


def test_classes_are_sorted_as_text(tmp_path: Path) -> None:
    source = FolderSource(write_image_folder(tmp_path, {"1": 1, "2": 1, "10": 1, "B": 1, "a": 1}))
    assert source.classes == ("1", "10", "2", "B", "a")


def test_images_may_lie_deeper(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "ant", {"north": 1, "north/far": 1})
    write_image_folder(tmp_path, {"ant": 1, "bee": 1})
    expected = [("ant/000.png", 0), ("ant/north/000.png", 0), ("ant/north/far/000.png", 0), ("bee/000.png", 1)]
    assert files_of(FolderSource(tmp_path), tmp_path) == expected


def test_what_is_passed_over(tmp_path: Path) -> None:
    """Hidden folders and files, macOS' folder, other endings, files beside the class folders."""
    write_image_folder(tmp_path, {"ant": 1, "bee": 1, ".ipynb_checkpoints": 2, "__MACOSX": 2, "ant/.cache": 1})
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    shutil.copy(tmp_path / "bee" / "000.png", tmp_path / "bee" / "._000.png")
    shutil.copy(tmp_path / "bee" / "000.png", tmp_path / "stray.png")
    shutil.copy(tmp_path / "bee" / "000.png", tmp_path / "bee" / "LOUD.PNG")
    source = FolderSource(tmp_path)
    assert source.classes == ("ant", "bee")
    assert files_of(source, tmp_path) == [("ant/000.png", 0), ("bee/000.png", 1), ("bee/LOUD.PNG", 1)]


def test_an_absent_an_empty_and_a_flat_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"there is no folder {tmp_path}/gone; change --data or DATASETS"):
        FolderSource(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"{tmp_path} has no class folders; expected {tmp_path}/<class>/<image>"):
        FolderSource(tmp_path)
    write_image_folder(tmp_path, {".": 2})
    with pytest.raises(ValueError, match="has no class folders"):
        FolderSource(tmp_path)


def test_an_empty_class_is_named_and_nothing_is_renumbered(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"ant": 1, "bee": 0, "cat": 1})
    with pytest.raises(ValueError, match=rf"the class folder {tmp_path}/bee has no images .*remove the folder"):
        FolderSource(tmp_path)
    (tmp_path / "bee" / "wings.txt").write_text("still no image")
    with pytest.raises(ValueError, match=rf"{tmp_path}/bee has no images"):
        FolderSource(tmp_path)


def test_links(tmp_path: Path) -> None:
    """A class folder may lie elsewhere; a link below one is not followed, or one image would become dozens."""
    elsewhere = write_image_folder(tmp_path / "elsewhere", {"bee": 2}) / "bee"
    root = write_image_folder(tmp_path / "root", {"ant": 1})
    (root / "bee").symlink_to(elsewhere)
    (root / "ant" / "loop").symlink_to(root / "ant")
    assert files_of(FolderSource(root), root) == [("ant/000.png", 0), ("bee/000.png", 1), ("bee/001.png", 1)]


@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_to_a_folder_above_is_no_class(target: str, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"ant": 1})
    (root / "loop").symlink_to(root / target)
    with pytest.raises(ValueError, match=r"root/loop is a link to .*, which contains it; remove the link"):
        FolderSource(root)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.walk alone would pass over it, and its images with it. (Tests may run as root, who may read everything.)"""
    write_image_folder(tmp_path, {"ant": 1, "ant/locked": 1})
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*ant/locked'"):
        FolderSource(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"ant": 1, "bee": 1})
    image = (tmp_path / "ant" / "000.png").read_bytes()
    odd = os.fsencode(tmp_path) + b"/ant/\xff\xfe\n.png"
    Path(os.fsdecode(odd)).write_bytes(image)
    source = FolderSource(tmp_path)
    names = [os.fsencode(sample["file_name"]) for sample in source]
    assert odd in names and len(names) == 3
    assert Path(source[names.index(odd)]["file_name"]).read_bytes() == image


def test_a_file_that_is_no_image_is_named_when_the_folder_is_checked(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"ant": 3, "bee": 3})
    (tmp_path / "bee" / "001.png").write_text("an error page")
    with pytest.raises(ImageError, match=rf"{tmp_path}/bee/001\.png"):
        FolderSource(tmp_path).check_files()
    (tmp_path / "bee" / "001.png").unlink()
    (tmp_path / "bee" / "001.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=rf"{tmp_path}/bee/001\.png"):
        FolderSource(tmp_path).check_files()


# ------------------------------------------------------------------------------------------- one split of the other


def test_a_validation_folder_without_a_class_keeps_the_training_sets_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image_folder(tmp_path / "val", {"ant": 1, "cat": 1})
    val = FolderSource(tmp_path / "val", classes=("ant", "bee", "cat"))
    assert val.classes == ("ant", "bee", "cat")
    assert files_of(val, tmp_path / "val") == [("ant/000.png", 0), ("cat/000.png", 2)]
    assert "has no pictures of 1 of the 3 classes: bee" in caplog.text
    assert files_of(FolderSource(tmp_path / "val"), tmp_path / "val")[1] == ("cat/000.png", 1)  # alone it drifts


def test_a_validation_folder_with_another_class_is_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "val", {"ant": 1, "dog": 1, "eel": 1})
    with pytest.raises(ValueError, match=r"val has the class 'dog' \(2 in all\) that the training set has not;"):
        FolderSource(tmp_path / "val", classes=("ant", "bee"))


def held(root: Path, split: str) -> set[str]:
    return {name for name, _ in files_of(FolderSource(root, split), root)}


def test_the_hold_out_is_disjoint_complete_and_a_tenth_of_each_class(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path, {"ant": 40, "bee": 2, "cat": 15, "dog": 3}, side=2)
    train, val = held(root, "train"), held(root, "val")
    assert not train & val
    assert train | val == {name for name, _ in files_of(FolderSource(root), root)}
    counts = {name: sum(file.startswith(name) for file in val) for name in ("ant", "bee", "cat", "dog")}
    assert counts == {"ant": 4, "bee": 1, "cat": 2, "dog": 1}


def test_the_hold_out_looks_at_names_only(tmp_path: Path) -> None:
    """The same on every machine, for other pixels, another root, and whatever other classes there are."""
    one = write_image_folder(tmp_path / "one", {"ant": 30, "bee": 20}, side=2)
    two = write_image_folder(tmp_path / "else/where", {"ant": 30, "cow": 4}, side=3, seed=9)
    ants = {name for name in held(one, "val") if name.startswith("ant")}
    assert ants == {name for name in held(two, "val") if name.startswith("ant")}
    # Changing the rule would move images between the splits of runs that are to be compared.
    checksums = {zlib.crc32(f"ant/{index:03d}.png".encode()): f"ant/{index:03d}.png" for index in range(30)}
    assert ants == {checksums[value] for value in sorted(checksums)[:3]}
    assert sorted(ants) != [f"ant/{index:03d}.png" for index in range(3)]  # not simply the first
    assert {name[4:] for name in ants} != {name[4:] for name in held(one, "val") if name.startswith("bee")}


def test_a_class_with_one_image_cannot_be_divided(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"ant": 5, "bee": 1})
    assert len(FolderSource(tmp_path)) == 6
    with pytest.raises(ValueError, match=rf"{tmp_path}/bee has 1 image; .*or give {tmp_path}/train and {tmp_path}/val"):
        FolderSource(tmp_path, "train")


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_splits_that_have_folders(val: str, tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train/ant": 1, f"{val}/ant": 1, "documents": 0})
    assert splits_below(tmp_path) == (f"folder:{tmp_path}/train", f"folder:{tmp_path}/{val}")


def test_val_comes_before_test(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train/ant": 1, "test/ant": 1, "val/ant": 1})
    assert splits_below(tmp_path) == (f"folder:{tmp_path}/train", f"folder:{tmp_path}/val")


def test_splits_that_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(tmp_path / "a", {"train/ant": 2})
    assert splits_below(tmp_path / "a") == (f"folder:{tmp_path}/a/train#train", f"folder:{tmp_path}/a/train#val")
    write_image_folder(tmp_path / "b", {"ant": 2})
    monkeypatch.chdir(tmp_path)  # a relative path stays right for workers and for a later --resume
    assert splits_below("b") == (f"folder:{tmp_path}/b#train", f"folder:{tmp_path}/b#val")


def test_a_class_called_train(tmp_path: Path) -> None:
    """CIFAR-100 and COCO have one."""
    write_image_folder(tmp_path, {"bus": 2, "car": 2, "train": 2})
    assert splits_below(tmp_path) == (f"folder:{tmp_path}#train", f"folder:{tmp_path}#val")


def test_a_validation_folder_alone_is_no_set_of_classes(tmp_path: Path) -> None:
    """ "val" and "test" would become the two classes."""
    write_image_folder(tmp_path, {"val/ant": 1, "test/ant": 1})
    with pytest.raises(ValueError, match=rf"has val but no train; expected {tmp_path}/train/<class>/<image>"):
        splits_below(tmp_path)


def test_split_folders_without_class_folders(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 2, "val": 2})
    train, _ = splits_below(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}/train has no class folders"):
        open_source(train)


# ------------------------------------------------------------------------------------------------------------- names


def test_folder_names(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "a#b", {"ant": 10, "bee": 10})
    name = f"folder:{tmp_path}/a#b"
    whole, train, val = open_source(name), open_source(f"{name}#train"), open_source(f"{name}#val")
    assert (len(whole), len(train), len(val)) == (20, 18, 2)
    assert (whole.name, val.name) == (name, f"{name}#val")


def test_the_names_are_these() -> None:
    assert sorted(SETS) == [
        *("cifar100_test", "cifar100_train", "cifar10_test", "cifar10_train"),
        *("digits_train", "digits_val", "digitsets_test", "digitsets_train", "digitsets_val"),
        *("fashion_mnist_test", "fashion_mnist_train", "flowers102_test", "flowers102_train", "flowers102_val"),
        *("imagenet_train", "imagenet_val", "mnist_test", "mnist_train"),
        *("office31_amazon", "office31_dslr", "office31_webcam"),
        *("omniglot_background", "omniglot_background_small1", "omniglot_background_small2", "omniglot_evaluation"),
        *("stl10_test", "stl10_train", "stl10_unlabeled"),
    ]


def test_an_unknown_name_lists_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no such data set: got 'cifar10_tran'; allowed: .*cifar10_train"):
        open_source("cifar10_tran")
    with pytest.raises(ValueError, match=r"got 'zzzzzz'; allowed: folder:DIR, .*imagenet_train.*; change DATASETS"):
        open_source("zzzzzz")
    with pytest.raises(ValueError, match=r"no data set is named: got \(\); .*change DATASETS\.TEST"):
        open_sources((), key="DATASETS.TEST")


def test_a_set_of_other_classes_than_the_training_set(registered: Callable[..., None]) -> None:
    registered("two_animals", [{"file_name": "a.jpg", "label": 0}], classes=["ant", "bee"])
    assert open_source("two_animals", classes=("ant", "bee"))[0]["label"] == 0
    assert open_source("two_animals", classes=("bee", "ant"))[0]["label"] == 1  # more in test_class_names.py
    with pytest.raises(ValueError, match=r"two_animals has the class 'ant' \(1 in all\) that the training set has not"):
        open_source("two_animals", classes=("bee", "cat"))


# ------------------------------------------------------------------------------------------------ the user's own sets


def test_a_registered_list_of_dicts(registered: Callable[..., None]) -> None:
    samples = [
        {"file_name": "a.jpg", "label": 1, "image_id": "whatever"},
        {"file_name": "b.jpg", "label": np.int64(0), "height": 3},
        {"file_name": "c.jpg", "label": [0.25, 0.75]},
    ]
    registered("mine", samples, classes=["ant", "bee"])
    source = open_source("mine")
    assert (source.name, source.classes, len(source)) == ("mine", ("ant", "bee"), 3)
    assert source[0] == {"file_name": "a.jpg", "label": 1, "image_id": 0}
    assert source[1]["image_id"] == 1 and source[1]["height"] == 3
    registered("mine_of_things", samples, thing_classes=["ant", "bee"])
    assert open_source("mine_of_things").classes == ("ant", "bee")


def test_a_registered_set_without_classes(registered: Callable[..., None]) -> None:
    registered("nameless", [{"file_name": "a.jpg", "label": 0}])
    with pytest.raises(
        ValueError, match=r"'nameless' does not name its classes; call MetadataCatalog.get\('nameless'\)"
    ):
        open_source("nameless")


@pytest.mark.parametrize("lacking", ["file_name", "label"])
def test_a_sample_without_its_file_or_label(lacking: str, registered: Callable[..., None]) -> None:
    good = {"file_name": "a.jpg", "label": 0}
    registered("mine", [good, {key: value for key, value in good.items() if key != lacking}], classes=["ant"])
    with pytest.raises(ValueError, match=r"sample 1 of the data set 'mine' has the entries .*needs 'file_name' and"):
        open_source("mine")


@pytest.mark.parametrize("label", [2, -1, "ant", 0.0, None, [1.0], [0.5, 0.25, 0.25]])
def test_a_label_that_is_no_class(label: object, registered: Callable[..., None]) -> None:
    """It would surface as an index error in the loss, an epoch later."""
    registered("mine", [{"file_name": "a.jpg", "label": 0}, {"file_name": "b.jpg", "label": label}], classes=["a", "b"])
    with pytest.raises(ValueError, match=r"sample 1 of the data set 'mine' has the label .*from 0 to 1, or 2 weights"):
        open_source("mine")


def test_a_registered_source_is_taken_as_it_is(registered: Callable[..., None]) -> None:
    source = ArraySource("pictures", np.zeros((2, 4, 4), np.uint8), np.array([0, 1]), ["a", "b"])
    registered("my_pictures", source)
    assert open_source("my_pictures") is source
    with pytest.raises(ValueError, match="broken: 2 pictures but 1 labels"):
        ArraySource("broken", np.zeros((2, 4, 4), np.uint8), np.array([0]), ["a", "b"])


def test_a_name_that_the_user_took_first_stays_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registering before imgcls is imported: both catalogs must then mean the user's set."""
    DatasetCatalog.remove("mnist_train")
    theirs = ArraySource("theirs", np.zeros((1, 4, 4), np.uint8), np.array([0]), ["zero"])
    DatasetCatalog.register("mnist_train", lambda: theirs)
    monkeypatch.setattr(catalog, "_taken", set())
    try:
        catalog.register_sets()
        assert DatasetCatalog.get("mnist_train") is theirs
        assert open_source("mnist_train") is theirs
        assert len(catalog._taken) == len(SETS)  # the others were there already
    finally:
        DatasetCatalog.remove("mnist_train")
        monkeypatch.undo()
        DatasetCatalog.register("mnist_train", lambda: SETS["mnist_train"](""))


def test_several_sets_as_one(tmp_path: Path) -> None:
    one = write_image_folder(tmp_path / "one", {"ant": 2, "bee": 1})
    two = write_image_folder(tmp_path / "two", {"ant": 1, "bee": 1})
    source = open_sources([f"folder:{one}", f"folder:{two}"])
    assert (len(source), source.classes) == (5, ("ant", "bee"))
    assert [sample["image_id"] for sample in source] == [0, 1, 2, 3, 4]
    expected = [("one/ant/000.png", 0), ("one/ant/001.png", 0), ("one/bee/000.png", 1)]
    assert files_of(source, tmp_path) == [*expected, ("two/ant/000.png", 0), ("two/bee/000.png", 1)]
    assert isinstance(source, ConcatSource) and isinstance(open_sources([f"folder:{one}"]), FolderSource)


def test_sets_of_other_classes_are_not_joined(tmp_path: Path) -> None:
    one = write_image_folder(tmp_path / "one", {"ant": 1, "bee": 1})
    two = write_image_folder(tmp_path / "two", {"ant": 1, "cow": 1})
    with pytest.raises(ValueError, match=r"two has the classes \['ant', 'cow'\].*same classes in the same order"):
        open_sources([f"folder:{one}", f"folder:{two}"])


# ----------------------------------------------------------------------------------------------------------- detection


@pytest.fixture
def coco(tmp_path: Path) -> str:
    categories = [{"id": 3, "name": "ant"}, {"id": 7, "name": "bee"}]
    images = [{"id": 1, "file_name": "a.png", "height": 8, "width": 6}]
    boxes = [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    return f"coco:{tmp_path}/boxes.json@{tmp_path}/images"


def test_coco_names(coco: str, tmp_path: Path) -> None:
    assert coco_paths(coco) == (tmp_path / "boxes.json", tmp_path / "images")
    assert count_categories(coco) == 2
    try:
        register_coco_names([coco, "coco_2017_val"])
        register_coco_names([coco])  # a second config with the same names
        (sample,) = DatasetCatalog.get(coco)
        assert sample["file_name"] == f"{tmp_path}/images/a.png"
        assert sample["annotations"][0]["category_id"] == 1  # detectron2 numbers them 0 .. n-1
        assert MetadataCatalog.get(coco).thing_classes == ["ant", "bee"]
    finally:
        DatasetCatalog.remove(coco)
        MetadataCatalog.remove(coco)


def test_coco_names_that_lead_nowhere(coco: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot read the data set 'coco:a\.json'; expected coco:ANNOTATIONS\.json@IM"
    ):
        coco_paths("coco:a.json")
    with pytest.raises(ValueError, match=rf"there is no file {tmp_path}/gone\.json; change DATASETS"):
        register_coco_names([f"coco:{tmp_path}/gone.json@{tmp_path}"])
    with pytest.raises(ValueError, match=rf"there is no folder {tmp_path}/gone; change DATASETS"):
        register_coco_names([f"coco:{tmp_path}/boxes.json@{tmp_path}/gone"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "is no JSON file"), ("[]", "has no list of categories"), ('{"categories": 3}', "has no list of categories")],
)
def test_annotations_that_are_none(content: str, reason: str, coco: str, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/boxes\.json {reason}"):
        count_categories(coco)
