"""Published training policies by name: ``["policy", NAME]`` in ``INPUT.TRAIN_TRANSFORMS`` stands for their rows.

Each is a function of the side of the training square in pixels. Mixup and CutMix act on batches and are keys of their
own (``INPUT.MIXUP_ALPHA``, ``INPUT.CUTMIX_ALPHA``); what a recipe sets them to is said where it has them. Recipes that
were made with timm take RandAugment from there (``pip install 'imgcls[timm]'``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rows = list[list[Any]]

_CROP: Rows = [["random_resized_crop", 0.08, 1.0], ["horizontal_flip", 0.5]]


def _at_224(pixels: int, size: int) -> int:
    """A length that a paper gives for crops of 224 pixels, for crops of ``size``."""
    return round(pixels * size / 224)


def _alexnet(size: int) -> Rows:
    short = _at_224(256, size)
    crop: Rows = [["random_scale", short, short], ["center_crop", short], ["random_crop"]]
    return [*crop, ["horizontal_flip", 0.5], ["pca_lighting", 0.1]]


def _vgg(size: int) -> Rows:
    scale: list[Any] = ["random_scale", _at_224(256, size), _at_224(512, size)]
    return [scale, ["random_crop"], ["horizontal_flip", 0.5], ["pca_lighting", 0.1]]


def _resnet(size: int) -> Rows:
    scale: list[Any] = ["random_scale", _at_224(256, size), _at_224(480, size)]
    return [scale, ["random_crop"], ["horizontal_flip", 0.5], ["pca_lighting", 0.1]]


def _inception(size: int) -> Rows:
    return [*_CROP, ["color_jitter", 0.5, 0.5, 0.5, 0.0], ["pca_lighting", 0.1]]


def _autoaugment(size: int) -> Rows:
    return [*_CROP, ["auto_augment", "imagenet"]]


def _randaugment(size: int) -> Rows:
    return [*_CROP, ["rand_augment", 2, 9]]


def _trivialaugment(size: int) -> Rows:
    return [*_CROP, ["trivial_augment"]]


def _augmix(size: int) -> Rows:
    return [*_CROP, ["augmix", 1]]


def _a1(size: int) -> Rows:
    return [*_CROP, ["timm_rand_augment", "rand-m7-mstd0.5-inc1"]]


def _a3(size: int) -> Rows:
    return [*_CROP, ["timm_rand_augment", "rand-m6-mstd0.5-inc1"]]


def _deit(size: int) -> Rows:
    augment: list[Any] = ["timm_rand_augment", "rand-m9-mstd0.5-inc1"]
    return [*_CROP, augment, ["random_erasing", 0.25, 0.02, 0.33, "noise"]]


def _simclr(size: int) -> Rows:
    jitter: list[Any] = ["color_jitter", 0.8, 0.8, 0.8, 0.2, 0.8]
    return [*_CROP, jitter, ["grayscale", 0.2], ["blur", 0.5, 0.1, 2.0]]


def _torchvision_v2(size: int) -> Rows:
    return [*_CROP, ["trivial_augment"], ["random_erasing", 0.1, 0.02, 0.33, "mean"]]


# name -> its rows for a side; the notes are printed in the documentation.
POLICIES: dict[str, Callable[[int], Rows]] = {
    "alexnet": _alexnet,  # Krizhevsky et al. 2012, section 4.1
    "vgg": _vgg,  # Simonyan and Zisserman 2014, section 3.1, multi-scale
    "resnet": _resnet,  # He et al. 2015, section 3.4
    "inception": _inception,  # Szegedy et al. 2015, section 6, with the photometric distortions of Howard 2013
    "autoaugment": _autoaugment,  # Cubuk et al. 2018, the policy found on ImageNet
    "randaugment": _randaugment,  # Cubuk et al. 2019, ResNet-50: N = 2, M = 9
    "trivialaugment": _trivialaugment,  # Müller and Hutter 2021, TA (wide)
    "augmix": _augmix,  # Hendrycks et al. 2020, on ImageNet, without the consistency loss
    "a1": _a1,  # Wightman et al. 2021, A1 and A2; MIXUP_ALPHA 0.2 (A2: 0.1), CUTMIX_ALPHA 1.0
    "a3": _a3,  # Wightman et al. 2021, A3, trained at 160 pixels; MIXUP_ALPHA 0.1, CUTMIX_ALPHA 1.0
    "deit": _deit,  # Touvron et al. 2021; MIXUP_ALPHA 0.8, CUTMIX_ALPHA 1.0
    "simclr": _simclr,  # Chen et al. 2020, appendix A, strength 1; for INPUT.VIEWS
    "torchvision_v2": _torchvision_v2,  # torchvision's second ImageNet weights; MIXUP_ALPHA 0.2, CUTMIX_ALPHA 1.0
}
