"""The doctor: what is planted in a data set is found and named, and a clean set is called clean."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.config import CfgNode
from PIL import Image

from imgcls.data import Source, open_source
from imgcls.data.datasets import ArraySource
from imgcls.data.digits import load_digits
from imgcls.data.inspection import (
    SERIOUS,
    Finding,
    Survey,
    balance_findings,
    duplicate_findings,
    kind_findings,
    machine_findings,
    mean_and_std,
    name_findings,
    near,
    ranked,
    size_findings,
    spelling_findings,
    survey,
)
from imgcls.data.inspection import duplicates as duplicates_module
from imgcls.data.inspection.fingerprint import Fingerprint, fingerprint
from imgcls.data.inspection.label_map import exchanged
from imgcls.data.inspection.pictures import effective_number
from imgcls.data.inspection.survey import Chosen
from imgcls.data.reading import MAX_PIXELS
from imgcls.engine.measuring.speed import measure_speed
from imgcls.engine.setup import Data, decide, sound

CLASSES = ("ant", "bee", "cow")
COLOURS = {"ant": (200, 60, 60), "bee": (60, 200, 60), "cow": (60, 60, 200)}


def photo(seed: int, colour: tuple[int, int, int] = (128, 128, 128), width: int = 96, height: int = 80) -> Image.Image:
    """Smooth random light and dark with some grain, as photographs have, tinted."""
    random = np.random.default_rng(seed)
    coarse = random.normal(0, 40, (6, 7, 3)) + random.normal(0, 45, (6, 7, 1)) + np.array(colour)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + random.normal(
        0, 4, (height, width, 3)
    )
    return Image.fromarray(smooth.clip(0, 255).astype(np.uint8))


def write(root: Path, counts: dict[str, int], seed: int) -> Path:
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            photo(seed + 1000 * place + index, COLOURS.get(name, (90, 90, 90))).save(root / name / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clean")
    write(root / "train", dict.fromkeys(CLASSES, 24), seed=0)
    write(root / "val", dict.fromkeys(CLASSES, 10), seed=500_000)
    return root


@pytest.fixture
def dirty(clean: Path, tmp_path: Path) -> Path:
    """A copy of the clean set, to spoil."""
    return Path(shutil.copytree(clean, tmp_path / "set"))


def look(root: Path | Source, role: str, **options: Any) -> Survey:
    source = root if isinstance(root, Source) else open_source(f"folder:{root}")
    return survey(source, role, max_pixels=MAX_PIXELS, **options)


def by_code(findings: list[Finding]) -> dict[str, Finding]:
    assert len({(finding.code, finding.where) for finding in findings}) == len(findings)
    return {finding.code: finding for finding in findings}


def twins(root: Path) -> dict[str, Finding]:
    return by_code(duplicate_findings([look(root / "train", "train"), look(root / "val", "val")]))


# ------------------------------------------------------------------------------------------------------- the command


def doctor(tool: Callable[..., Any], root: Path, *words: object) -> Any:
    return tool(
        "tools/doctor.py", "--train", root / "train", "--val", root / "val", "--no-speed", "INPUT.TRAIN_SIZE", 64,
        "INPUT.TEST_SIZE", 64, "INPUT.TEST_RESIZE", 72, *words,
    )  # fmt: skip


def test_a_clean_set_is_called_clean(clean: Path, tool: Callable[..., Any]) -> None:
    done = doctor(tool, clean)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nserious " not in done.stdout and "\nwarning " not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 serious, 0 warning")


def test_a_planted_set_is_seen_through(dirty: Path, tool: Callable[..., Any], tmp_path: Path) -> None:
    (dirty / "train/ant/torn.png").write_bytes((dirty / "train/ant/000.png").read_bytes()[:900])
    shutil.copy(dirty / "train/bee/003.png", dirty / "val/bee/leak.png")
    for index in range(22):
        (dirty / f"train/cow/{index:03d}.png").unlink()
    (dirty / "val/ant").rename(dirty / "val/x")
    (dirty / "val/bee").rename(dirty / "val/ant")
    (dirty / "val/x").rename(dirty / "val/bee")
    photo(999_999, width=40, height=40).save(dirty / "val/cow/small.png")
    done = doctor(tool, dirty, "--json", tmp_path / "report.json")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads((tmp_path / "report.json").read_text())
    found = {(finding["code"], finding["where"]): finding for finding in report["findings"]}
    assert found["unreadable", "train"]["severity"] == found["leak_file", "train, val"]["severity"] == "serious"
    assert "train/ant/torn.png" in found["unreadable", "train"]["examples"][0]
    assert "val/ant/leak.png" in found["leak_file", "train, val"]["examples"][0]
    assert found["imbalance", "train"]["severity"] == "warning" and found["too_small", "val"]["count"] == 1
    assert found["label_conflict", "train, val"]["count"] == 1  # the leak went along with the exchanged folder
    # Two pictures of cow are left: not enough to be judged, and no hindrance to the others.
    assert found["classes_exchanged", "train, val"]["count"] == 2
    assert report["serious"] == 3 and report["sets"]["train"]["classes"] == {"ant": 25, "bee": 24, "cow": 2}
    assert list(report["sets"]["train"]["unreadable"]) == [str(dirty / "train/ant/torn.png")]
    # The same again, on stdout, and from one process instead of several: the same bytes.
    again = doctor(tool, dirty, "--json", "-", "--workers", 1)
    assert again.returncode == 1
    once, twice = (
        [finding for finding in content["findings"] if finding["where"] != "machine"]
        for content in (report, json.loads(again.stdout))
    )
    assert once == twice
    # People read the gravest first, with what to do.
    severities = [
        line.split()[0] for line in done.stdout.splitlines() if line.split(" ")[0] in ("serious", "warning", "note")
    ]
    assert severities == sorted(severities, key=["serious", "warning", "note"].index)
    assert "-> replace or remove them; or set DATALOADER.ON_ERROR skip to leave them out" in done.stdout


def test_a_class_that_train_has_not_is_a_finding_and_no_error(dirty: Path, tool: Callable[..., Any]) -> None:
    (dirty / "val/cow").rename(dirty / "val/Cow")
    done = doctor(tool, dirty)
    assert done.returncode == 1 and "classes of val that train has not" in done.stdout and " Cow\n" in done.stdout


def test_a_folder_alone_is_split_as_training_splits_it(clean: Path, tool: Callable[..., Any]) -> None:
    done = tool("tools/doctor.py", "--data", clean / "train", "--no-speed", "--sample", 12)
    assert done.returncode == 0
    assert f"train folder:{clean}/train#train: 66 pictures (12 looked at), 3 classes" in done.stdout
    assert "12  of 66 pictures were looked at" in done.stdout
    assert (
        "pictures with a side below INPUT.TRAIN_SIZE 224: they are enlarged; the median short side is 80" in done.stdout
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing says what to examine"),
        (["--val", "x"], "--val needs --train"),
        (["--train", "x", "--data", "y"], "--data and --train name the training set twice"),
        (["--config-file", "detection/mobilenet_v1_retinanet_fpn.yaml"], "the doctor examines the sets of classifiers"),
        (["--train", "no/where"], "there is no folder .*no/where"),
        (["--train", "digits_trian"], "there is no such data set: got 'digits_trian'"),
        (["--train", "digits_train", "--sample", "-1"], "too small: got -1; allowed: 0 or more; change --sample"),
        (["--train", "digits_train", "--workers", "0"], "change --workers"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], told: str, tool: Callable[..., Any], tmp_path: Path) -> None:
    done = tool("tools/doctor.py", *words, "--json", tmp_path / "report.json")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert re.search(told, done.stderr)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- files, one by one


def digits_source(number: int = 40) -> ArraySource:
    pixels, labels = load_digits("train")
    rows = np.arange(0, len(pixels), len(pixels) // number)
    return ArraySource("digits", pixels[rows], labels[rows], tuple("0123456789"))


def dangerous(sample: dict[str, Any], max_pixels: int) -> Fingerprint:
    if sample["image_id"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if sample["image_id"] == 5:
        time.sleep(60)
    if sample["image_id"] == 17:
        os._exit(7)
    return fingerprint(sample, max_pixels)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_that_ends_or_stops_the_process_is_named_and_costs_no_other(workers: int) -> None:
    seen = look(digits_source(), "train", workers=workers, seconds=0.5, examine=dangerous)
    assert set(seen.errors) == {3, 5, 17} and seen.good.sum() == 37
    assert "ended the process (SIGKILL)" in seen.errors[3]
    assert "took longer than 0.5 seconds" in seen.errors[5]
    assert "ended the process (exit code 7)" in seen.errors[17]
    safe = look(digits_source(), "train", workers=workers)
    assert safe.good.all() and (seen.thumbs[seen.good] == safe.thumbs[seen.good]).all()


def hungry(sample: dict[str, Any], max_pixels: int) -> Fingerprint:
    if sample["image_id"] == 4:
        np.ones(4 << 30, dtype=np.uint8)
    return fingerprint(sample, max_pixels)


def test_memory_is_limited() -> None:
    seen = look(digits_source(), "train", examine=hungry)
    assert set(seen.errors) == {4} and "Unable to allocate 4.00 GiB" in seen.errors[4]


def test_facts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(1).save(tmp_path / "a/0.png")
    photo(2).convert("CMYK").save(tmp_path / "a/1.jpg")
    photo(3).convert("RGBA").save(tmp_path / "a/2.png")
    photo(4).convert("L").save(tmp_path / "a/3.png")
    photo(4).convert("L").convert("RGB").save(tmp_path / "a/4.png")
    photo(5).save(tmp_path / "a/5.jpg", exif=exif)
    Image.fromarray(np.full((80, 96), 40_000, dtype=np.uint16)).save(tmp_path / "a/6.png")
    photo(6).convert("P").save(tmp_path / "a/7.png")
    photo(7).save(tmp_path / "a/8.gif", save_all=True, append_images=[photo(8)])
    (tmp_path / "a/9.jpg").write_text("<html>404</html>")
    seen = look(tmp_path, "train")
    names = [seen.name(row).rsplit("/", 1)[-1] for row in range(len(seen))]
    assert names == sorted(names)
    shown = {
        code: [Path(line).name for line in finding.examples] for code, finding in by_code(kind_findings(seen)).items()
    }
    assert shown == {
        "kind_grey": ["3.png", "6.png"], "kind_grey_in_colour": ["4.png"], "kind_palette": ["7.png", "8.gif"],
        "kind_transparent": ["2.png"], "kind_cmyk": ["1.jpg"], "kind_16_bits": ["6.png"],
        "kind_turned_by_exif": ["5.jpg"], "kind_animated": ["8.gif"],
    }  # fmt: skip
    assert set(seen.errors) == {9} and "9.jpg" in seen.errors[9]
    assert seen.sizes[5].tolist() == [80, 96] and seen.sizes[0].tolist() == [96, 80]
    assert seen.pixels[3] == seen.pixels[4] and seen.contents[3] != seen.contents[4]


def test_mean_and_std_are_those_of_all_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (30, 9, 7, 3), dtype=np.uint8)
    seen = look(ArraySource("noise", pixels, np.zeros(30, dtype=np.int64), ("a",)), "train")
    values = pixels.reshape(-1, 3).astype(np.float64)
    mean, std = mean_and_std(seen)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-4)


def test_a_sample_of_a_set_is_the_same_each_time() -> None:
    first, again = (look(digits_source(), "train", sample=10) for _ in range(2))
    assert len(first) == 10 and (first.indices == again.indices).all() and len(set(first.indices)) == 10
    assert (first.labels == digits_source().labels[first.indices]).all()


def test_the_readable_part(tmp_path: Path) -> None:
    write(tmp_path, {"a": 3, "b": 2}, seed=0)
    (tmp_path / "a/001.png").write_bytes(b"nothing")
    part = look(tmp_path, "train").readable()
    assert isinstance(part, Chosen) and [Path(sample["file_name"]).name for sample in part] == [
        "000.png", "002.png", "000.png", "001.png",
    ]  # fmt: skip
    assert part.labels is not None and part.labels.tolist() == [0, 0, 1, 1]
    assert [sample["image_id"] for sample in part] == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------------------- copies


def test_a_clean_set_has_no_copies(clean: Path) -> None:
    assert twins(clean) == {}


def reencoded(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50)
    return Image.open(file)


ALTERED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-encoded": reencoded,
    "resized": lambda picture: picture.resize((48, 40)),
    "enlarged": lambda picture: picture.resize((192, 120)),
    "darker": lambda picture: picture.point(lambda value: int(0.75 * value)),
    "grey": lambda picture: picture.convert("L"),
    "cropped": lambda picture: picture.crop((3, 3, 93, 77)),
    "cropped at one side": lambda picture: picture.crop((5, 0, 96, 80)),
}


@pytest.mark.parametrize("how", ALTERED)
def test_near_copies_are_found_and_no_others(how: str, dirty: Path) -> None:
    with Image.open(dirty / "train/bee/005.png") as picture:
        ALTERED[how](picture.convert("RGB")).save(dirty / "val/bee/near.png")
    found = twins(dirty)
    assert set(found) == {"leak_near"}
    assert (found["leak_near"].severity, found["leak_near"].count) == (SERIOUS, 1)
    assert found["leak_near"].examples == (f"{dirty}/train/bee/005.png = {dirty}/val/bee/near.png",)


def test_exact_copies_by_bytes_and_by_pixels(dirty: Path) -> None:
    shutil.copy(dirty / "train/bee/000.png", dirty / "train/bee/copy.png")
    shutil.copy(dirty / "train/bee/000.png", dirty / "val/bee/leak.png")
    shutil.copy(dirty / "train/bee/001.png", dirty / "train/cow/other.png")
    with Image.open(dirty / "train/ant/002.png") as picture:
        picture.save(dirty / "val/ant/same.bmp")
    found = twins(dirty)
    assert {code: finding.count for code, finding in found.items()} == {
        "leak_file": 1, "leak_pixels": 1, "label_conflict": 1, "copies_file": 2,
    }  # fmt: skip
    assert found["label_conflict"].examples == (
        f"{dirty}/train/bee/001.png is bee, {dirty}/train/cow/other.png is cow",
    )
    assert [finding.severity for finding in found.values()] == [SERIOUS, SERIOUS, SERIOUS, "warning"]


def test_digits_are_alike_and_no_copies() -> None:
    pixels, _ = load_digits("val")
    thumbs = np.stack([cv2.resize(image, (40, 40), interpolation=cv2.INTER_LINEAR) for image in pixels])
    assert len(near.candidates(near.hashes(thumbs))) > 1000  # hashes alone would cry out
    pairs, _ = near.near_pairs(thumbs)
    assert len(pairs) == 0
    # Yet a digit that is there twice, once through JPEG, is found.
    copy = cv2.imdecode(cv2.imencode(".jpg", pixels[123], [cv2.IMWRITE_JPEG_QUALITY, 75])[1], cv2.IMREAD_GRAYSCALE)
    copy = cv2.resize(copy, (40, 40), interpolation=cv2.INTER_LINEAR)
    pairs, likeness = near.near_pairs(np.concatenate([thumbs, copy[None]]))
    assert pairs.tolist() == [[123, 1000]] and likeness[0] > 0.99


def test_drawings_and_blank_pages_are_no_copies() -> None:
    pages = np.full((300, 40, 40), 255, dtype=np.uint8)
    assert len(near.near_pairs(pages)[0]) == 0
    random = np.random.default_rng(0)
    for page in pages:  # a few thin strokes each
        for _ in range(4):
            ends = random.integers(0, 40, 4).tolist()
            cv2.line(page, ends[:2], ends[2:], 0, 1)
    assert len(near.near_pairs(pages)[0]) == 0


def test_candidates_are_those_of_a_comparison_of_all_with_all() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**63, (40, 3), dtype=np.uint64)
    copies = codes.copy()
    for row in range(40):
        for bit in random.permutation(64)[: row % 14]:
            copies[row, row % 3] ^= np.uint64(1) << np.uint64(bit)
    everything = np.concatenate([codes, copies])
    slow = set()
    for a in range(80):
        for b in range(80):
            for window in range(3):
                apart = bin(int(everything[a, window]) ^ int(everything[b, 0])).count("1")
                if a != b and apart <= (near.CROPPED_RADIUS if window else near.RADIUS):
                    slow.add((min(a, b), max(a, b)))
    assert len(slow) > 10
    assert sorted(map(tuple, near.candidates(everything).tolist())) == sorted(slow)
    assert near.distance(everything[:, 0], everything[:, 1]).tolist() == [
        bin(int(a) ^ int(b)).count("1") for a, b in everything[:, :2].tolist()
    ]


def test_too_many_candidates_are_said(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(thumbs: np.ndarray) -> None:
        raise near.TooManyCandidates("more than 1 pairs")

    monkeypatch.setattr(duplicates_module, "near_pairs", give_up)
    assert "more than 1 pairs" in twins(clean)["near_not_searched"].what
    monkeypatch.setattr(near, "MAX_CANDIDATES", 1)
    with pytest.raises(near.TooManyCandidates, match="more than 1 pairs of 50 pictures"):
        near.candidates(np.zeros((50, 1), dtype=np.uint64))


# --------------------------------------------------------------------------------------------------------- labels


def digit_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    made = []
    for split, step in (("train", 4), ("val", 4)):
        pixels, labels = load_digits(split)
        small = [cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA) for image in pixels[::step]]
        made += [np.stack(small), np.array(labels[::step])]
    return made[0], made[1], made[2], made[3]


@pytest.mark.parametrize("circle", [(), (3, 7), (1, 2, 3), tuple(range(10))])
def test_exchanged_classes_are_found(circle: tuple[int, ...]) -> None:
    train, train_labels, val, val_labels = digit_arrays()
    moved = val_labels.copy()
    for place, digit in enumerate(circle):  # folder "circle[place]" of val holds what belongs to the next one
        moved[val_labels == circle[(place + 1) % len(circle)]] = digit
    found = exchanged(train, train_labels, val, moved)
    assert [tuple(classes) for classes, _, _ in found] == ([circle] if circle else [])
    for _, shares, chance in found:
        assert chance <= 0.001 and all(next_one > 0.7 > own for next_one, own in shares)


@pytest.mark.parametrize("seed", range(5))
def test_labels_without_meaning_are_not_called_exchanged(seed: int) -> None:
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)
    labels = random.integers(0, 8, 400)
    assert exchanged(noise[:300], labels[:300], noise[300:], labels[300:]) == []


def named(*classes: str) -> ArraySource:
    return ArraySource("set", np.zeros((1, 2, 2), dtype=np.uint8), np.zeros(1, dtype=np.int64), classes)


def test_names_of_classes() -> None:
    assert name_findings(named("a", "b"), named("a", "b")) == []
    found = by_code(name_findings(named("a", "b"), named("b", "c")))
    assert {code: finding.examples for code, finding in found.items()} == {
        "class_not_in_train": ("c",), "class_not_in_val": ("a",),
    }  # fmt: skip
    assert found["class_not_in_train"].severity == SERIOUS and "renumbered" not in found["class_not_in_train"].what
    shifted = by_code(name_findings(named("0", "1", "2"), named("1", "2", "3")))
    assert "as if the folders had been renumbered" in shifted["class_not_in_train"].what
    order = by_code(name_findings(named("a", "b"), named("b", "a")))
    assert order["class_order"].examples == ("b: 1 in train, 0 in val", "a: 0 in train, 1 in val")


def test_spelling_of_classes(dirty: Path) -> None:
    assert spelling_findings(named("1", "2", "3"), "train") == []
    numbers = by_code(spelling_findings(named("1", "10", "2"), "train"))
    assert numbers["class_numbers"].examples == ("'1' is class 0", "'10' is class 1")
    assert by_code(spelling_findings(named("Cat", "cat"), "val"))["class_case"].examples == ("Cat / cat",)
    (dirty / "train/.cache").mkdir()
    found = by_code(spelling_findings(open_source(f"folder:{dirty}/train"), "train"))
    assert found["hidden_folders"].examples == (f"{dirty}/train/.cache",)


# ---------------------------------------------------------------------------------------------- balance, sizes, machine


def test_balance() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (44, 4, 4), dtype=np.uint8)
    source = ArraySource("set", pixels, np.repeat([0, 1], [40, 4]), ("many", "few", "none"))
    found = by_code(balance_findings(look(source, "train")))
    assert found["class_empty"].examples == ("none",)
    assert "(10 : 1)" in found["imbalance"].what and found["imbalance"].examples == ("few: 4", "many: 40")
    assert set(by_code(balance_findings(look(source, "val")))) == {"imbalance", "class_small_in_val"}
    even = ArraySource("set", pixels, np.arange(44) % 4, tuple("abcd"))
    assert balance_findings(look(even, "train")) == []


def test_balance_with_several_labels() -> None:
    labels = np.zeros((30, 3), dtype=np.float32)
    labels[:, 0], labels[:2, 1], labels[:20, 2] = 1, 1, 1
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8)
    seen = look(ArraySource("set", pixels, labels, tuple("abc"), multi_label=True), "train")
    assert seen.label_names(0) == "a|b|c" and seen.label_names(25) == "a"
    assert "POS_WEIGHTS" in by_code(balance_findings(seen))["imbalance"].remedy


def test_the_effective_number_of_classes() -> None:
    assert effective_number(np.array([7, 7, 7, 0])) == pytest.approx(3)
    assert effective_number(np.array([1, 1, 2])) == pytest.approx(2 * 2**0.5)  # entropy of (1/4, 1/4, 1/2): 1.5 bits
    assert effective_number(np.array([1000, 1])) < 1.01


def test_sizes(plain_cfg: CfgNode, tmp_path: Path) -> None:
    plain_cfg.INPUT.TRAIN_SIZE = 64
    write(tmp_path, {"a": 3}, seed=0)
    assert size_findings(look(tmp_path, "train"), plain_cfg) == []
    photo(0, width=63, height=70).save(tmp_path / "a/x.png")
    photo(0, width=400, height=100).save(tmp_path / "a/y.png")
    found = by_code(size_findings(look(tmp_path, "train"), plain_cfg))
    assert found["too_small"].examples == (f"{tmp_path}/a/x.png: 63 x 70",)
    assert found["too_long"].examples == (f"{tmp_path}/a/y.png: 400 x 100",)


def test_the_machine(plain_cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_cfg.OUTPUT_DIR = str(tmp_path / "not/there/yet")
    found = by_code(machine_findings(plain_cfg, parameters=1000))
    assert found["disk"].severity == "note" and f"the disk of {tmp_path};" in found["disk"].what
    assert by_code(machine_findings(plain_cfg, parameters=10**15))["disk"].severity == SERIOUS
    plain_cfg.SOLVER.IMS_PER_BATCH = 10**9
    shared = by_code(machine_findings(plain_cfg))["shared_memory"]
    assert shared.severity == SERIOUS and "--shm-size" in shared.remedy
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 4096))
    assert by_code(machine_findings(plain_cfg))["open_files"].remedy == "ulimit -n 4096"


@pytest.mark.parametrize("workers", [0, 1])
def test_speed(workers: int, classifier_cfg: Callable[..., CfgNode]) -> None:
    cfg = sound(classifier_cfg("mobilenet_v1_0.25", "DATALOADER.NUM_WORKERS", workers))
    source = digits_source(200)
    data = Data(source, None, source.classes)
    decide(cfg, data)
    speed = measure_speed(cfg, data, seconds=0.1)
    assert speed.loader > 0 and speed.step > 0 and (speed.workers, speed.batch, speed.device) == (workers, 8, "cpu")
    assert (speed.memory > 10) == (workers > 0)
    assert 200_000 < speed.parameters < 250_000  # Howard et al. 2017, table 7: 0.5 M, of which 0.25 M classify 1000


def test_the_gravest_come_first() -> None:
    findings = [Finding(severity, severity, "train", 1, "") for severity in ("note", "serious", "warning", "serious")]
    assert [finding.severity for finding in ranked(findings)] == ["serious", "serious", "warning", "note"]
