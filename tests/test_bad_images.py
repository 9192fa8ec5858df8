"""Every kind of unusual and damaged file: right pixels, or a refusal that names it; in both readers, within bounds."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import bad_images
import numpy as np
import pytest
from bad_images import KINDS, ODD_NAMES
from detectron2.data.detection_utils import read_image as detectron2_reads
from picture_files import blank_png, jpeg, noise, zeros_after
from PIL import Image, ImageFile
from torchvision.datasets.folder import pil_loader

from imgcls.data.fast_jpeg import FromJpeg, Jpeg, from_jpeg, read_fast
from imgcls.data.mapper import ClsMapper
from imgcls.data.reading import ImageError, read_image, read_size
from imgcls.data.samplers import Draw
from imgcls.data.transforms import test_transform as evaluation_transform  # pytest would take the name for a test

ROOT = Path(__file__).resolve().parents[1]
READABLE = [name for name, kind in KINDS.items() if kind.pixels is not None]
REFUSED = [name for name, kind in KINDS.items() if kind.pixels is None]


def read(path: Path) -> np.ndarray:
    return np.asarray(read_image(str(path))).astype(np.int64)


# -------------------------------------------------------------------------------------------------------- the reader


@pytest.mark.parametrize("name", READABLE)
def test_right_pixels(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    assert kind.pixels is not None
    path = kind.put(tmp_path)
    seen = read(path)
    assert seen.shape == kind.pixels.shape
    assert np.abs(seen - kind.pixels).max() <= kind.within
    assert read_size(str(path)) == (seen.shape[1], seen.shape[0])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the reason; also where other code has told Pillow to make do with half a file."""
    path = KINDS[name].put(tmp_path)
    message = rf"^cannot read the image {path}: [^\n]*({KINDS[name].reason})[^\n]*; replace the file or remove it$"
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match=message) as told:
        read_image(str(path))
    assert told.value.name == str(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_corpus() -> None:
    """At least these many kinds, every reason stated, and a reader that accepts or refuses all would fail."""
    assert len(KINDS) >= 100 and min(len(READABLE), len(REFUSED)) >= 45
    assert all(KINDS[name].reason for name in REFUSED)


def test_others_read_some_of_them_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins: what torchvision's reader makes of files that are refused or mended here."""
    never_arrived = tmp_path / "zeros.jpg"
    never_arrived.write_bytes(zeros_after(jpeg(noise()), 0.5))
    whole = np.asarray(pil_loader(str(KINDS["JPEG"].put(tmp_path))))
    assert whole.shape == (40, 48, 3)
    lower_half = np.asarray(pil_loader(str(never_arrived)))[40:].astype(float)
    assert lower_half.std() < 20 < 60 < noise()[40:].std()  # one grey, without a word
    assert np.asarray(pil_loader(str(KINDS["PNG, grey, 16 bits"].put(tmp_path)))).mean() > 250
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert np.asarray(pil_loader(str(KINDS["99 % of a PNG"].put(tmp_path)))).shape == (64, 64, 3)


def test_warnings_of_pillow_change_nothing(tmp_path: Path) -> None:
    """With warnings as errors, as in this suite, and without; and none comes out, for they name no file."""
    path = KINDS["JPEG, EXIF that ends early"].put(tmp_path)
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open(path) as image:
        image.getexif()
    for action in ("error", "always"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(action)  # type: ignore[arg-type]
            assert read(path).shape == (40, 48, 3)
        assert not caught


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_odd_names_in_messages(name: str, bad: bool, tmp_path: Path) -> None:
    """One line of UTF-8 whatever the name, in which the name can be recognised."""
    path = tmp_path / name
    path.write_bytes(b"no picture" if bad else jpeg())
    if not bad:
        assert read(path).shape == (40, 48, 3)
        return
    with pytest.raises(ImageError) as told:
        read_image(str(path))
    assert "\n" not in str(told.value) and str(told.value).encode()
    assert {"two\nlines.jpg": r"two\nlines.jpg", os.fsdecode(b"caf\xe9.jpg"): r"caf\udce9.jpg"}.get(name, name) in str(
        told.value
    )


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX only")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = KINDS["JPEG"].put(tmp_path)
    path.chmod(0)
    me = os.geteuid()
    try:
        if me == 0:
            os.seteuid(65534)  # root may read everything
        with pytest.raises(ImageError, match=r"x\.jpeg: Permission denied; replace the file"):
            read_image(str(path))
    finally:
        os.seteuid(me)


def test_bytes_are_read_like_files(tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        if kind.on_disk or len(name) > 30:
            continue
        content = kind.put(tmp_path).read_bytes()
        if kind.pixels is not None:
            assert np.asarray(read_image(content)).shape == kind.pixels.shape, name
        else:
            with pytest.raises(ImageError, match=r"cannot read the image shard\.tar/7\.jpg: "):
                read_image(content, name="shard.tar/7.jpg")


# ------------------------------------------------------------------------------------------- one reader for everything

# The reader, its fast twin, and what they are compared with. Detectors read through detectron2.
MAY_READ = {"imgcls/data/reading.py", "imgcls/data/fast_jpeg.py", "imgcls/commands/benchmark_data.py"}
READERS = {
    "imread",
    "imdecode",
    "decode_image",
    "decode_jpeg",
    "decode_png",
    "read_file",
    "pil_loader",
    "default_loader",
}


def readers_in(source: str) -> list[str]:
    """What in ``source`` opens or decodes a picture by another way than ``imgcls.data.reading``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found += sorted(names & READERS)
            if node.module == "detectron2.data.detection_utils":
                found += sorted(names & {"read_image"})
            if (node.module or "").startswith("torchvision.io") or node.module == "imageio":
                found.append(node.module or "")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            found += [called] if node.attr in READERS or called in ("Image.open", "torchvision.io") else []
    return found


def test_no_other_code_opens_pictures() -> None:
    files = [path for folder in ("imgcls", "tools", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 60
    found = {str(path.relative_to(ROOT)): readers_in(path.read_text()) for path in files}
    assert readers_in((ROOT / "imgcls/data/reading.py").read_text()) == ["Image.open"]
    assert {name: calls for name, calls in found.items() if calls and name not in MAY_READ} == {}


@pytest.mark.parametrize(
    "source",
    [
        "with Image.open(path) as image: pass",
        "cv2.imdecode(data, 1)",
        "from torchvision.io import read_image",
        "from detectron2.data.detection_utils import read_image",
        "from torchvision.datasets.folder import pil_loader",
    ],
)
def test_other_code_would_be_seen(source: str) -> None:
    assert len(readers_in(source)) >= 1


# It clips sixteen bits to white, turns a TIFF that Pillow has turned already, and lets Pillow's warnings out.
NOT_LIKE_DETECTRON2 = re.compile("grey, 16 bits|PGM, 1|TIFF, EXIF|palette with opacities|ends early|wrong type")


@pytest.mark.parametrize("name", [name for name in READABLE if not NOT_LIKE_DETECTRON2.search(name)])
def test_a_detector_sees_the_same(name: str, tmp_path: Path) -> None:
    """Through detectron2's own reader; exactly, for both decode with Pillow."""
    path = KINDS[name].put(tmp_path)
    np.testing.assert_array_equal(detectron2_reads(str(path), "RGB"), read(path))


# ---------------------------------------------------------------------------------------------------- the fast reader


@pytest.mark.parametrize("name", KINDS)
def test_the_fast_reader_agrees(name: str, tmp_path: Path) -> None:
    """The same verdict, and the same pixels up to the filter that makes them small."""
    sample = {"image_id": 0, "label": 0, "file_name": str(KINDS[name].put(tmp_path))}
    transform = evaluation_transform(0, 20, "bilinear")
    exact, fast = ClsMapper(transform), ClsMapper(from_jpeg(transform))
    assert isinstance(fast.transform, FromJpeg)
    if KINDS[name].pixels is None:
        for mapper in (exact, fast):
            with pytest.raises(ImageError, match=KINDS[name].reason):
                mapper(sample, Draw(0, 0))
        return
    one, two = (mapper(sample, Draw(0, 0))["image"].float() for mapper in (exact, fast))
    assert one.shape == two.shape == (3, 20, 20)
    assert (one - two).abs().max() <= 3


def test_it_is_the_fast_reader(tmp_path: Path) -> None:
    """Not the exact one on both sides of the comparison above."""
    pytest.importorskip("simplejpeg")
    paths = {
        name: KINDS[name].put(tmp_path, "" if name in ODD_NAMES else f"{name} ")
        for name in READABLE
        if "link" not in name
    }
    fast = {name for name, path in paths.items() if isinstance(read_fast(str(path)), Jpeg)}
    assert {"JPEG", "JPEG, progressive", "JPEG, grey", "JPEG, EXIF orientation 6", *ODD_NAMES} <= fast
    assert not fast & {"JPEG, CMYK", "JPEG, YCCK", "JPEG, arithmetic coding", "JPEG, lossless", "PNG called .jpg"}


# ------------------------------------------------------------------------------------------------------------- memory

_MEASURE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("reading", "imgcls/data/reading.py")
reading = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reading)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
reading.read_image(sys.argv[1])
before = peak()
for path in sys.argv[3:]:
    try:
        reading.read_image(path, max_pixels=int(sys.argv[2]))
        print("read", end=" ")
    except reading.ImageError:
        print("refused", end=" ")
print(peak() - before)
"""


def memory(small: Path, max_pixels: int, *paths: Path) -> tuple[list[str], float]:
    """What becomes of ``paths`` in a process of its own, and by how many MiB its memory grew at most."""
    words = [sys.executable, "-c", _MEASURE, small, max_pixels, *paths]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True, cwd=ROOT)
    *fates, grown = done.stdout.split()
    return fates, float(grown)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is Linux's to tell")
def test_what_is_refused_costs_no_memory(tmp_path: Path) -> None:
    bombs = [name for name in REFUSED if re.search("mega|65500|10000|16384|64 MB|terabyte", name)]
    assert len(bombs) >= 11
    paths = [KINDS[name].put(tmp_path, f"{index} ") for index, name in enumerate(bombs)]
    small = KINDS["PNG"].put(tmp_path)
    fates, grown = memory(small, 64_000_000, *paths)
    assert fates == ["refused"] * len(bombs) and grown < 40  # 64 MB of text are unpacked only in part
    # The twin: allowed, sixteen megapixels take about eight bytes each.
    allowed = tmp_path / "allowed.png"
    allowed.write_bytes(blank_png(4000, 4000))
    fates, grown = memory(small, 16_000_000, allowed)
    assert fates == ["read"] and 16e6 * 3 / 2**20 < grown < 16e6 * 9 / 2**20


def test_the_page_has_the_table() -> None:
    """docs/bad-input.md; ``python tests/bad_images.py`` prints it."""
    assert bad_images.table() in (ROOT / "docs/bad-input.md").read_text()
