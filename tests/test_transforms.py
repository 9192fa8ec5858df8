"""Every row of INPUT.TRAIN_TRANSFORMS: it happens, it does not happen, and it equals the library called directly."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F

import imgcls
from imgcls.config import all_problems, load_config
from imgcls.data import ClsMapper, build_train_loader
from imgcls.data.augmentations import TRANSFORMS
from imgcls.data.datasets import ArraySource
from imgcls.data.policies import POLICIES
from imgcls.data.random_stream import seed_cpu
from imgcls.data.samplers import Draw
from imgcls.data.transforms import test_transform as evaluation_transform  # pytest would take the name for a test
from imgcls.data.transforms import train_transform

SIDE = 24
MODE = InterpolationMode.BILINEAR
KEY = "INPUT.TRAIN_TRANSFORMS"
FLIP_AND_LIGHT = [["HorizontalFlip", {"p": 0.5}], ["RandomBrightnessContrast", {"p": 1.0}]]


def picture(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Noise that leaves the ends of the range free, so that autocontrast has something to stretch."""
    return Image.fromarray(np.random.default_rng(0).integers(40, 200, (height, width, 3), dtype=np.uint8))


def seeded(transform: Callable[[Image.Image], Any], seed: int, image: Image.Image) -> torch.Tensor:
    seed_cpu(seed)
    return transform(image)


def ours(row: list[Any], side: int = SIDE) -> v2.Compose:
    return train_transform([row], side, "bilinear")


def timms_own() -> Any:
    from timm.data.auto_augment import rand_augment_transform

    options = {"translate_const": int(SIDE * 0.45), "img_mean": (124, 116, 104), "interpolation": Image.BILINEAR}
    return rand_augment_transform("rand-m7-n3-mstd0.5-inc1", options)


# Row -> what the library's own transform must give with the same seed. None: compared in a test of its own.
DIRECT: dict[str, tuple[list[Any], Callable[[], Any] | None]] = {
    "resize": ([], lambda: v2.Resize((SIDE, SIDE), MODE)),
    "center_crop": ([20], lambda: v2.CenterCrop(20)),
    "random_crop": ([3], lambda: v2.RandomCrop(SIDE, padding=3)),
    "random_scale": ([16, 32], lambda: v2.RandomShortestSize(list(range(16, 33)), interpolation=MODE)),
    "random_resized_crop": ([0.2, 0.9], lambda: v2.RandomResizedCrop(SIDE, scale=(0.2, 0.9), interpolation=MODE)),
    "horizontal_flip": ([1.0], lambda: v2.RandomHorizontalFlip(1.0)),
    "vertical_flip": ([1.0], lambda: v2.RandomVerticalFlip(1.0)),
    "random_affine": ([10.0, 0.1, 0.9, 1.1], lambda: v2.RandomAffine(10.0, (0.1, 0.1), (0.9, 1.1), interpolation=MODE)),
    "shift_scale_rotate": ([1.0], lambda: v2.RandomAffine(45.0, (0.0625, 0.0625), (0.9, 1.1), interpolation=MODE)),
    "color_jitter": ([0.1, 0.2, 0.3, 0.1], lambda: v2.ColorJitter(0.1, 0.2, 0.3, 0.1)),
    "pca_lighting": ([0.5], None),
    "grayscale": ([1.0], lambda: v2.RandomGrayscale(1.0)),
    "solarize": ([1.0, 100], lambda: v2.RandomSolarize(100, 1.0)),
    "invert": ([1.0], lambda: v2.RandomInvert(1.0)),
    "autocontrast": ([1.0], lambda: v2.RandomAutocontrast(1.0)),
    "blur": ([1.0, 0.5, 1.5], lambda: v2.GaussianBlur(3, (0.5, 1.5))),
    "auto_augment": (["cifar10"], lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, interpolation=MODE)),
    "rand_augment": ([3, 12], lambda: v2.RandAugment(3, 12, interpolation=MODE)),
    "timm_rand_augment": (["rand-m7-n3-mstd0.5-inc1"], timms_own),
    "trivial_augment": ([], lambda: v2.TrivialAugmentWide(interpolation=MODE)),
    "augmix": ([5, 2, 2, 0.5], lambda: v2.AugMix(5, 2, 2, 0.5, interpolation=MODE)),
    "random_erasing": ([1.0, 0.1, 0.2], lambda: v2.RandomErasing(1.0, scale=(0.1, 0.2))),
    "albumentations": ([FLIP_AND_LIGHT], None),
}
# Arguments with which nothing happens to a picture that has the side already: probability 0, magnitude 0.
IDENTITIES: dict[str, list[list[Any]]] = {
    "resize": [[]],
    "center_crop": [[], [SIDE]],
    "random_crop": [[], [0]],
    "random_scale": [[SIDE, SIDE]],
    "random_resized_crop": [[1.0, 1.0]],
    "horizontal_flip": [[0.0]],
    "vertical_flip": [[0.0]],
    "random_affine": [[], [0.0, 0.0, 1.0, 1.0]],
    "shift_scale_rotate": [[0.0], [1.0, 0.0, 0.0, 0.0]],
    "color_jitter": [[0.0, 0.0, 0.0, 0.0], [0.4, 0.4, 0.4, 0.1, 0.0]],
    "pca_lighting": [[0.0]],
    "grayscale": [[0.0]],
    "solarize": [[0.0]],
    "invert": [[0.0]],
    "autocontrast": [[0.0]],
    "blur": [[0.0]],
    "auto_augment": [["imagenet", 0.0]],
    "rand_augment": [[2, 9, 0.0], [0, 9]],
    "timm_rand_augment": [["rand-m9-p0.0-inc1"], ["rand-m9-n0"]],
    "trivial_augment": [[0.0]],
    "augmix": [[3, 3, -1, 1.0, 0.0]],
    "random_erasing": [[0.0]],
    "albumentations": [[[["HorizontalFlip", {"p": 0.0}]]]],
}
# Where a probability of one half stands.
HALVES: dict[str, list[Any]] = {
    "horizontal_flip": [0.5],
    "vertical_flip": [0.5],
    "shift_scale_rotate": [0.5],
    "color_jitter": [0.4, 0.4, 0.4, 0.1, 0.5],
    "grayscale": [0.5],
    "solarize": [0.5],
    "invert": [0.5],
    "autocontrast": [0.5],
    "blur": [0.5],
    "auto_augment": ["imagenet", 0.5],
    "rand_augment": [2, 9, 0.5],
    "timm_rand_augment": ["rand-m9-n1-inc1"],
    "trivial_augment": [0.5],
    "augmix": [3, 3, -1, 1.0, 0.5],
    "random_erasing": [0.5],
    "albumentations": [[["HorizontalFlip", {"p": 0.5}]]],
}
ALL = {name: arguments for name, (arguments, _) in DIRECT.items()}


def needs_extra(name: str) -> None:
    if name == "albumentations":
        pytest.importorskip("albumentations")
    if name in ("timm_rand_augment", "a1", "a3", "deit"):
        pytest.importorskip("timm")


def test_the_transforms_are_these() -> None:
    assert list(TRANSFORMS) == list(DIRECT) == list(IDENTITIES)


@pytest.mark.parametrize("name", [name for name, (_, direct) in DIRECT.items() if direct])
def test_it_is_the_librarys_with_the_same_seed(name: str) -> None:
    needs_extra(name)
    arguments, direct = DIRECT[name]
    assert direct is not None
    image, mine, theirs = picture(40, 30), ours([name, *arguments]), direct()
    results = [seeded(mine, seed, image) for seed in range(12)]
    for seed, result in enumerate(results):
        assert result.dtype == torch.uint8
        assert torch.equal(result, F.pil_to_tensor(seeded(theirs, seed, image)))
    untouched = F.pil_to_tensor(image)
    assert any(result.shape != untouched.shape or not torch.equal(result, untouched) for result in results)


@pytest.mark.parametrize("name", IDENTITIES)
def test_it_does_not_happen(name: str) -> None:
    needs_extra(name)
    for arguments in IDENTITIES[name]:
        for seed in range(6):
            assert torch.equal(seeded(ours([name, *arguments]), seed, picture()), F.pil_to_tensor(picture()))


@pytest.mark.parametrize("name", HALVES)
def test_half_the_time_both_outcomes_are_seen(name: str) -> None:
    needs_extra(name)
    transform, untouched = ours([name, *HALVES[name]]), F.pil_to_tensor(picture())
    left_alone = sum(torch.equal(seeded(transform, seed, picture()), untouched) for seed in range(60))
    assert 15 <= left_alone <= 45


def test_what_can_be_said_without_torchvision() -> None:
    image = picture()
    pixels = F.pil_to_tensor(image)
    assert torch.equal(ours(["horizontal_flip", 1.0])(image), pixels.flip(2))
    assert torch.equal(ours(["vertical_flip", 1.0])(image), pixels.flip(1))
    assert torch.equal(ours(["invert", 1.0])(image), 255 - pixels)
    assert torch.equal(ours(["grayscale", 1.0])(image), F.pil_to_tensor(image.convert("L")).expand(3, -1, -1))
    assert torch.equal(ours(["autocontrast", 1.0])(image), F.pil_to_tensor(ImageOps.autocontrast(image)))
    assert torch.equal(ours(["center_crop", 20])(image), pixels[:, 2:22, 2:22])


# -- those that are not torchvision's alone ----------------------------------------------------------------------------

# fb.resnet.torch, datasets/imagenet.lua: eigenvalues, and eigenvectors as columns.
EIGENVALUES = [0.2175, 0.0188, 0.0045]
EIGENVECTORS = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]


@pytest.mark.parametrize("deviation", [0.1, 1.0])
def test_lighting_pixel_by_pixel(deviation: float) -> None:
    image = picture(5, 4)
    shifts = []
    for seed in range(10):
        result = seeded(ours(["pca_lighting", deviation]), seed, image)
        torch.manual_seed(seed)
        alphas = [float(value) * deviation for value in torch.randn(3)]
        shift = [sum(EIGENVECTORS[c][k] * alphas[k] * EIGENVALUES[k] for k in range(3)) for c in range(3)]
        for y in range(4):
            for x in range(5):
                for channel, value in enumerate(image.getpixel((x, y))):  # type: ignore[arg-type]
                    expected = round(min(max(value + 255 * shift[channel], 0), 255))
                    assert result[channel, y, x] == expected
        shifts.append(shift)
    assert len({tuple(shift) for shift in shifts}) == 10


def test_the_components_of_the_lighting_are_directions() -> None:
    """Columns are of length 1 and at right angles, as eigenvectors are; typed with a wrong sign they would not be."""
    matrix = np.array(EIGENVECTORS)
    assert np.abs(matrix.T @ matrix - np.eye(3)).max() < 2e-3
    matrix[1, 2] *= -1
    assert np.abs(matrix.T @ matrix - np.eye(3)).max() > 0.1


def test_lighting_spreads_as_far_as_it_says() -> None:
    """On grey 128 the first component dominates: red moves by 0.1 x 0.2175 x 0.5675 x 255 = 3.15 levels or so."""
    image, transform = Image.new("RGB", (1, 1), (128, 128, 128)), ours(["pca_lighting", 0.1])
    reds = torch.stack([seeded(transform, seed, image)[0, 0, 0].float() for seed in range(2000)])
    assert reds.std() == pytest.approx(3.16, rel=0.1) and abs(reds.mean() - 128) < 0.3


def test_the_short_side_reaches_both_ends_of_its_range() -> None:
    image = picture(40, 30)
    shapes = {tuple(seeded(ours(["random_scale", 20, 23]), seed, image).shape[1:]) for seed in range(40)}
    assert {min(shape) for shape in shapes} == {20, 21, 22, 23}
    assert all(shape[0] < shape[1] for shape in shapes)  # the aspect stays
    # He et al. 2015: 256 to 480 for crops of 224
    assert torch.equal(
        seeded(ours(["random_scale"], 224), 3, image), seeded(ours(["random_scale", 256, 480], 224), 3, image)
    )


@pytest.mark.parametrize("fill", ["black", "mean", "noise"])
def test_the_erased_rectangle_has_its_size_and_its_fill(fill: str) -> None:
    image = picture(64, 64)
    untouched = F.pil_to_tensor(image)
    inside: list[torch.Tensor] = []
    for seed in range(20):
        result = seeded(ours(["random_erasing", 1.0, 0.1, 0.2, fill]), seed, image)
        rows, columns = torch.where((result != untouched).any(0))
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        box = result[:, top:bottom, left:right].clone()
        result[:, top:bottom, left:right] = untouched[:, top:bottom, left:right]
        assert torch.equal(result, untouched)
        assert 0.08 < box[0].numel() / 64**2 < 0.22  # a tenth to a fifth, in whole pixels
        inside.append(box.flatten(1))
    pixels = torch.cat(inside, dim=1)
    if fill == "noise":
        assert (pixels.min(), pixels.max()) == (0, 255) and abs(pixels.float().mean() - 127.5) < 2
    else:
        colour = torch.tensor([0, 0, 0] if fill == "black" else [124, 116, 104])
        assert torch.equal(pixels.unique(dim=1), colour[:, None].to(torch.uint8))


# -- albumentations ----------------------------------------------------------------------------------------------------


def test_a_pipeline_is_albumentations_seeded_from_torch(tmp_path: Path) -> None:
    albumentations = pytest.importorskip("albumentations")
    theirs = albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.5),
            albumentations.OneOf(
                [albumentations.RandomBrightnessContrast(p=1.0), albumentations.GaussianBlur(p=1.0)], p=0.7
            ),
        ]
    )
    inner = [["RandomBrightnessContrast", {"p": 1.0}], ["GaussianBlur", {"p": 1.0}]]
    rows = [["HorizontalFlip", {"p": 0.5}], ["OneOf", inner, {"p": 0.7}]]
    written = tmp_path / "rows.yaml"
    written.write_text(str(rows))
    albumentations.save(theirs, tmp_path / "saved.json")
    for pipeline in (rows, str(written), str(tmp_path / "saved.json")):
        results = []
        for seed in range(12):
            results.append(seeded(ours(["albumentations", pipeline]), seed, picture()))
            torch.manual_seed(seed)
            theirs.set_random_seed(int(torch.randint(2**31, ())))
            expected = theirs(image=np.array(picture()))["image"]
            assert np.array_equal(results[-1].permute(1, 2, 0).numpy(), expected)
        assert len({result.numpy().tobytes() for result in results}) > 4


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(ValueError, match=r"needs that library: pip install 'imgcls\[albumentations\]'.*change " + KEY):
        ours(["albumentations", [["HorizontalFlip", {"p": 0.123}]]])


def test_without_timm_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data.auto_augment", None)
    with pytest.raises(ValueError, match=r"timm is not installed: pip install 'imgcls\[timm\]'.*change " + KEY):
        ours(["timm_rand_augment", "rand-m4"])


def test_a_pipeline_survives_the_written_config(tmp_path: Path) -> None:
    needs_extra("albumentations")
    (tmp_path / "mine.yaml").write_text(
        "_BASE_: " + str(Path(imgcls.__file__).parents[1] / "configs/Base-ClsNet.yaml") + "\n"
        'INPUT:\n  TRAIN_TRANSFORMS:\n    - ["resize"]\n    - ["albumentations", [["HorizontalFlip", {"p": 0.5}]]]\n'
    )
    cfg = load_config(tmp_path / "mine.yaml")
    assert KEY not in {problem.key for problem in all_problems(cfg)}
    (tmp_path / "again.yaml").write_text(cfg.dump())
    again = load_config(tmp_path / "again.yaml")
    assert again.INPUT.TRAIN_TRANSFORMS == cfg.INPUT.TRAIN_TRANSFORMS
    rows = again.INPUT.TRAIN_TRANSFORMS
    seen = {train_transform(rows, SIDE, "bilinear")(picture()).numpy().tobytes() for _ in range(20)}
    assert len(seen) == 2


# -- policies ----------------------------------------------------------------------------------------------------------

CROP_AND_FLIP = [["random_resized_crop", 0.08, 1.0], ["horizontal_flip", 0.5]]
AT_224: dict[str, list[list[Any]]] = {
    "alexnet": [
        *(["random_scale", 256, 256], ["center_crop", 256], ["random_crop"]),
        *(["horizontal_flip", 0.5], ["pca_lighting", 0.1]),
    ],
    "vgg": [["random_scale", 256, 512], ["random_crop"], ["horizontal_flip", 0.5], ["pca_lighting", 0.1]],
    "resnet": [["random_scale", 256, 480], ["random_crop"], ["horizontal_flip", 0.5], ["pca_lighting", 0.1]],
    "inception": [*CROP_AND_FLIP, ["color_jitter", 0.5, 0.5, 0.5, 0.0], ["pca_lighting", 0.1]],
    "autoaugment": [*CROP_AND_FLIP, ["auto_augment", "imagenet"]],
    "randaugment": [*CROP_AND_FLIP, ["rand_augment", 2, 9]],
    "trivialaugment": [*CROP_AND_FLIP, ["trivial_augment"]],
    "augmix": [*CROP_AND_FLIP, ["augmix", 1]],
    "a1": [*CROP_AND_FLIP, ["timm_rand_augment", "rand-m7-mstd0.5-inc1"]],
    "a3": [*CROP_AND_FLIP, ["timm_rand_augment", "rand-m6-mstd0.5-inc1"]],
    "deit": [
        *CROP_AND_FLIP,
        *(["timm_rand_augment", "rand-m9-mstd0.5-inc1"], ["random_erasing", 0.25, 0.02, 0.33, "noise"]),
    ],
    "simclr": [
        *(*CROP_AND_FLIP, ["color_jitter", 0.8, 0.8, 0.8, 0.2, 0.8]),
        *(["grayscale", 0.2], ["blur", 0.5, 0.1, 2.0]),
    ],
    "torchvision_v2": [*CROP_AND_FLIP, ["trivial_augment"], ["random_erasing", 0.1, 0.02, 0.33, "mean"]],
}


def test_the_policies_are_these() -> None:
    assert {name: policy(224) for name, policy in POLICIES.items()} == AT_224
    assert POLICIES["alexnet"](112)[:2] == [["random_scale", 128, 128], ["center_crop", 128]]


@pytest.mark.parametrize("name", AT_224)
def test_a_policy_is_its_rows(name: str) -> None:
    needs_extra(name)
    image = picture(40, 30)
    short, long = (
        train_transform([["policy", name]], SIDE, "bicubic"),
        train_transform(POLICIES[name](SIDE), SIDE, "bicubic"),
    )
    results = [seeded(short, seed, image) for seed in range(6)]
    for seed, result in enumerate(results):
        assert (result.shape, result.dtype) == ((3, SIDE, SIDE), torch.uint8)
        assert torch.equal(result, seeded(long, seed, image))
    assert len({result.numpy().tobytes() for result in results}) == 6


def test_a_policy_may_stand_among_rows() -> None:
    image = picture(40, 30)
    rows = [["policy", "trivialaugment"], ["invert", 1.0]]
    both = seeded(train_transform(rows, SIDE, "bilinear"), 1, image)
    assert torch.equal(both, 255 - seeded(ours(["policy", "trivialaugment"]), 1, image))


# -- where the draws come from -----------------------------------------------------------------------------------------

RANDOM = sorted({*HALVES, "random_crop", "random_scale", "random_resized_crop", "random_affine", "color_jitter"})


@pytest.mark.parametrize("name", [*RANDOM, "pca_lighting"])
def test_draws_are_a_function_of_seed_epoch_and_index(name: str) -> None:
    needs_extra(name)

    def drawn(seed: int, epoch: int, index: int, repeat: int = 0) -> bytes:
        pixels = np.asarray(picture(40, 40))
        mapper = ClsMapper(ours([name, *HALVES.get(name, ALL[name])]), seed=seed)
        image = mapper({"image_id": index, "label": 0, "pixels": pixels}, Draw(epoch, index, repeat))["image"]
        return bytes(str(tuple(image.shape)), "ascii") + image.numpy().tobytes()

    first = [drawn(1, 2, index) for index in range(12)]
    torch.manual_seed(77), np.random.seed(77), random.seed(77)
    assert [drawn(1, 2, index) for index in reversed(range(12))][::-1] == first
    for others in (
        [drawn(2, 2, index) for index in range(12)],
        [drawn(1, 3, index) for index in range(12)],
        [drawn(1, 2, index, 1) for index in range(12)],
    ):
        assert others != first
    assert len(set(first)) > 1


def test_all_of_them_together_do_not_depend_on_workers() -> None:
    needs_extra("albumentations")
    cfg = imgcls.get_config("Base-ClsNet.yaml")
    rows = [[name, *HALVES.get(name, ALL[name])] for name in RANDOM]
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "SEED", 3, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 5),
            *("INPUT.TRAIN_SIZE", SIDE, "INPUT.TRAIN_TRANSFORMS", [["resize"], *rows, ["resize"]]),
        ]
    )
    pixels = np.random.default_rng(0).integers(0, 256, (6, 30, 30, 3), dtype=np.uint8)
    source = ArraySource("six", pixels, np.zeros(6, np.int64), ["only"])
    streams = []
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        streams.append([batch.images for batch in build_train_loader(cfg, source)])
    assert len(streams[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*streams, strict=True))
    cfg.SEED = 4
    assert not torch.equal(streams[0][0], next(iter(build_train_loader(cfg, source))).images)


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_it_survives_pickling_and_takes_grey_pictures(name: str) -> None:
    needs_extra(name)
    transform = pickle.loads(pickle.dumps(ours([name, *ALL[name]])))  # as a worker that is spawned gets it
    image = picture(40, 30)
    assert torch.equal(seeded(transform, 5, image), seeded(ours([name, *ALL[name]]), 5, image))
    if name == "pca_lighting":
        with pytest.raises(ValueError, match="pca_lighting shifts colours, and the picture is grey"):
            transform(image.convert("L"))
    else:
        assert transform(image.convert("L")).shape[0] == 1


def test_a_transform_is_made_once_for_a_size() -> None:
    rows = [["policy", "torchvision_v2"]]
    assert train_transform(rows, 32, "bilinear") is train_transform([list(rows[0])], 32, "bilinear")
    assert train_transform(rows, 40, "bilinear")(picture(50, 50)).shape == (3, 40, 40)


@pytest.fixture
def cfg() -> CfgNode:
    made = imgcls.get_config("Base-ClsNet.yaml")
    made.INPUT.TRAIN_SIZE = SIDE
    return made


WRONG_ROWS: dict[str, tuple[Any, str]] = {
    "no such name": (["horizontal_flop"], "there is no such transform: got 'horizontal_flop'; .*mean horizontal_flip?"),
    "not like any": (["zzz"], "got 'zzz'; allowed: resize, center_crop, random_crop"),
    "a bare name": ("resize", r"a transform is not a row: got \'resize\'; allowed: a list \[name, arguments...\]"),
    "an empty row": ([], "a transform is not a row"),
    "a list for a name": ([["resize"]], "a transform is not a row"),
    "too many arguments": (["resize", 3], r"resize does not take these arguments .*got \[3\]; allowed: none"),
    "no probability": (["horizontal_flip", 2.0], r"got \[2.0\]; allowed: probability \(default 0.5\)"),
    "no probability of ours": (["blur", -0.1], r"blur does not take these arguments .*got \[-0.1\]"),
    "no number": (["random_crop", "wide"], r"random_crop does not take these arguments .*padding \(default 0\)"),
    "areas the wrong way round": (["random_resized_crop", 1.0, 0.5], "the smaller one first"),
    "a shift that shows when it draws": (["random_affine", 0, 3.0], "random_affine does not take these arguments"),
    "a scale to nothing": (["shift_scale_rotate", 0.5, 0.1, 1.0], "the scale is a share of 1"),
    "sides the wrong way round": (["random_scale", 300, 200], "the smaller one first; these are 300 and 200"),
    "a side below 0": (["center_crop", -1], "the side is a number of pixels"),
    "a deviation below 0": (["pca_lighting", -0.1], "the standard deviation is at least 0"),
    "no such AutoAugment": (["auto_augment", "coco"], "the policies are imagenet, cifar10, svhn"),
    "a magnitude that shows when it draws": (["rand_augment", 2, 31], "the magnitude is a whole number, 0 to 30"),
    "another policy of timm": (["timm_rand_augment", "original"], "the policy is one of timm's RandAugment"),
    "a section that timm does not know": (["timm_rand_augment", "rand-z3"], "Unknown RandAugment config section"),
    "a part of an operation": (["rand_augment", 1.5], "the number of operations is a whole number"),
    "too severe": (["augmix", 11], r"severity must be between \[1, 10\]"),
    "no chains": (["augmix", 3, 0], "the width is a whole number of chains"),
    "no distribution": (["augmix", 3, 3, -1, 0.0], "alpha, of the Dirichlet and Beta distributions, is above 0"),
    "no such fill": (["random_erasing", 0.5, 0.1, 0.2, "white"], "the fills are black, mean, noise"),
    "no such policy": (["policy", "dei"], "there is no such policy: got 'dei'; .*mean deit"),
    "a policy without a name": (["policy"], r"there is no such policy: got \[\]; allowed: alexnet, vgg"),
}
WRONG_PIPELINES: dict[str, tuple[Any, str]] = {
    "none": ([], "albumentations does not take these arguments .*missing 1 required.*allowed: pipeline;"),
    "empty": ([[]], r"a pipeline is a list of rows \[name, {argument: value}\]; this is \[\]"),
    "no such transform": ([[["Horizontal"]]], r"the library [\d.]+ has no transform 'Horizontal'"),
    "something else of the library's": ([[["Compose3", {}]]], "has no transform 'Compose3'"),
    "a row that is a name": ([["HorizontalFlip"]], "a row is .*this is 'HorizontalFlip'"),
    "arguments that are no mapping": ([[["HorizontalFlip", 0.5]]], r"this is \['HorizontalFlip', 0.5\]"),
    "an argument that does not exist": ([[["HorizontalFlip", {"q": 1}]]], r"Argument\(s\) 'q' are not valid"),
    "a value out of range": ([[["HorizontalFlip", {"p": 3}]]], "should be less than or equal to 1"),
    "floats": ([[["Normalize"]]], "the pipeline gives float32 pixels; leave out what normalises"),
    "a tensor": ([[["ToTensorV2"]]], "the pipeline gives torch.uint8 pixels"),
    "no file": (["nowhere.yaml"], "cannot read the pipeline nowhere.yaml"),
}


@pytest.mark.parametrize("case", [*WRONG_ROWS, *WRONG_PIPELINES])
def test_a_wrong_row_is_found_before_anything_is_built(case: str, cfg: CfgNode) -> None:
    needs_extra("timm_rand_augment" if "timm" in case else "")
    if case in WRONG_PIPELINES:
        needs_extra("albumentations")
        row, message = ["albumentations", *WRONG_PIPELINES[case][0]], WRONG_PIPELINES[case][1]
    else:
        row, message = WRONG_ROWS[case]
    with pytest.raises(ValueError, match=message + ".*change INPUT.TRAIN_TRANSFORMS"):
        train_transform([["resize"], row], SIDE, "bilinear")
    cfg.INPUT.TRAIN_TRANSFORMS = [["resize"], row]
    (problem,) = [problem for problem in all_problems(cfg) if problem.key == KEY]
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"  # whose configs do not read the key
    assert KEY not in {found.key for found in all_problems(cfg)}
    assert str(problem).count("\n") == 0


def test_right_rows_are_no_problem_and_draw_nothing(cfg: CfgNode) -> None:
    needs_extra("albumentations")
    needs_extra("timm_rand_augment")
    cfg.INPUT.TRAIN_TRANSFORMS = [
        *([name, *arguments] for name, arguments in ALL.items()),
        *(["policy", name] for name in POLICIES),
    ]
    seed_cpu(1)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    seed_cpu(1)
    assert KEY not in {problem.key for problem in all_problems(cfg)}
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_the_evaluation_transform_is_the_usual_one() -> None:
    """Short side to 12 and the middle 8 of it, by Pillow; with 0 the whole picture."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    small = image.resize((20, 12), Image.Resampling.BILINEAR)
    expected = F.pil_to_tensor(small.crop((6, 2, 14, 10)))
    assert torch.equal(evaluation_transform(12, 8, "bilinear")(image), expected)
    whole = F.pil_to_tensor(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert torch.equal(evaluation_transform(0, 8, "bicubic")(image), whole)
    assert not torch.equal(evaluation_transform(0, 8, "bilinear")(image), whole)
