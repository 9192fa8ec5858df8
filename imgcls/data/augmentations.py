"""What the rows of ``INPUT.TRAIN_TRANSFORMS`` build; torchvision's v2 transforms do the work wherever they can.

A builder is called with the side of the training square in pixels, the interpolation, and the row's arguments. What
it returns takes a PIL picture and gives one, draws from the global generators of torch, numpy and random only, and
can be pickled. A probability of 1 draws nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from imgcls.data.albumentations_bridge import Albumentations

Transform = Callable[[Image.Image], Any]
Builder = Callable[..., Transform]

# Principal components of the RGB values (0..1) of ImageNet's training pictures, one a column, and the standard
# deviations along them: the figures that Facebook's fb.resnet.torch published for Krizhevsky et al. 2012, section 4.1.
PCA_DEVIATIONS = (0.2175, 0.0188, 0.0045)
PCA_COMPONENTS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
IMAGENET_MEAN = (124, 116, 104)  # RGB in 0..255

AUTO_AUGMENT_POLICIES = tuple(policy.value for policy in v2.AutoAugmentPolicy)
RAND_AUGMENT_MAGNITUDES = 31  # torchvision's bins, 0..30
ERASING_FILLS = ("black", "mean", "noise")


def _sometimes(transform: Transform, probability: float) -> Transform:
    return transform if probability == 1 else v2.RandomApply([transform], probability)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


# -- size and place ----------------------------------------------------------------------------------------------------


def _resize(size: int, mode: InterpolationMode) -> Transform:
    return v2.Resize((size, size), interpolation=mode)


def _center_crop(size: int, mode: InterpolationMode, side: int = 0) -> Transform:
    _require(side >= 0, "the side is a number of pixels; 0: the training side")
    return v2.CenterCrop(side or size)


def _random_crop(size: int, mode: InterpolationMode, padding: int = 0) -> Transform:
    return v2.RandomCrop(size, padding=padding)


def _random_scale(size: int, mode: InterpolationMode, min_side: int = 0, max_side: int = 0) -> Transform:
    low, high = min_side or round(size * 256 / 224), max_side or round(size * 480 / 224)
    _require(0 < low <= high, f"the short sides are pixels, the smaller one first; these are {low} and {high}")
    return v2.RandomShortestSize(list(range(low, high + 1)), interpolation=mode)


def _random_resized_crop(
    size: int, mode: InterpolationMode, min_area: float = 0.08, max_area: float = 1.0
) -> Transform:
    _require(0 < min_area <= max_area, "the areas are shares of the picture, the smaller one first")
    return v2.RandomResizedCrop(size, scale=(min_area, max_area), interpolation=mode)


def _horizontal_flip(size: int, mode: InterpolationMode, probability: float = 0.5) -> Transform:
    return v2.RandomHorizontalFlip(probability)


def _vertical_flip(size: int, mode: InterpolationMode, probability: float = 0.5) -> Transform:
    return v2.RandomVerticalFlip(probability)


def _random_affine(
    size: int,
    mode: InterpolationMode,
    degrees: float = 0.0,
    shift: float = 0.0,
    min_scale: float = 1.0,
    max_scale: float = 1.0,
) -> Transform:
    return v2.RandomAffine(degrees, translate=(shift, shift), scale=(min_scale, max_scale), interpolation=mode)


def _shift_scale_rotate(
    size: int,
    mode: InterpolationMode,
    probability: float = 0.5,
    shift: float = 0.0625,
    scale: float = 0.1,
    degrees: float = 45.0,
) -> Transform:
    _require(0 <= scale < 1, f"the scale is a share of 1, at least 0 and below 1; this is {scale}")
    return _sometimes(_random_affine(size, mode, degrees, shift, 1 - scale, 1 + scale), probability)


# -- colour ------------------------------------------------------------------------------------------------------------


def _color_jitter(
    size: int,
    mode: InterpolationMode,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Transform:
    return _sometimes(v2.ColorJitter(brightness, contrast, saturation, hue), probability)


def _pca_lighting(size: int, mode: InterpolationMode, deviation: float = 0.1) -> Transform:
    _require(deviation >= 0, f"the standard deviation is at least 0; this is {deviation}")
    return PcaLighting(deviation)


@dataclass(frozen=True)
class PcaLighting:
    """Adds one random colour to the whole picture, along the directions in which ImageNet's colours vary.

    Krizhevsky et al. 2012, section 4.1: each pixel gets ``components @ (a * deviations)`` of the range 0..1, with
    three ``a`` drawn from a normal distribution of standard deviation ``deviation`` (0.1 there), once a picture.
    """

    deviation: float

    def __call__(self, picture: Image.Image) -> Image.Image:
        _require(picture.mode == "RGB", "pca_lighting shifts colours, and the picture is grey")
        amounts = self.deviation * torch.randn(3).double().numpy()
        shift = 255 * np.array(PCA_COMPONENTS) @ (amounts * PCA_DEVIATIONS)
        table = np.rint(np.arange(256) + shift[:, None]).clip(0, 255).astype(int)
        return picture.point(table.ravel().tolist())


def _grayscale(size: int, mode: InterpolationMode, probability: float = 0.2) -> Transform:
    return v2.RandomGrayscale(probability)


def _invert(size: int, mode: InterpolationMode, probability: float = 0.5) -> Transform:
    return v2.RandomInvert(probability)


def _solarize(size: int, mode: InterpolationMode, probability: float = 0.2, threshold: int = 128) -> Transform:
    return v2.RandomSolarize(threshold, probability)


def _autocontrast(size: int, mode: InterpolationMode, probability: float = 0.5) -> Transform:
    return v2.RandomAutocontrast(probability)


def _blur(
    size: int, mode: InterpolationMode, probability: float = 0.5, min_sigma: float = 0.1, max_sigma: float = 2.0
) -> Transform:
    width = max(3, size // 10 // 2 * 2 + 1)  # of the kernel; the smallest odd one above a tenth of the side
    return _sometimes(v2.GaussianBlur(width, (min_sigma, max_sigma)), probability)


# -- learned and random policies ---------------------------------------------------------------------------------------


def _auto_augment(size: int, mode: InterpolationMode, policy: str = "imagenet", probability: float = 1.0) -> Transform:
    _require(policy in AUTO_AUGMENT_POLICIES, f"the policies are {', '.join(AUTO_AUGMENT_POLICIES)}")
    return _sometimes(v2.AutoAugment(v2.AutoAugmentPolicy(policy), interpolation=mode), probability)


def _rand_augment(
    size: int, mode: InterpolationMode, operations: int = 2, magnitude: int = 9, probability: float = 1.0
) -> Transform:
    # torchvision looks at the magnitude only when an operation that has one is drawn.
    _require(type(operations) is int and operations >= 0, "the number of operations is a whole number >= 0")
    highest = RAND_AUGMENT_MAGNITUDES - 1
    _require(type(magnitude) is int and 0 <= magnitude <= highest, f"the magnitude is a whole number, 0 to {highest}")
    return _sometimes(v2.RandAugment(operations, magnitude, RAND_AUGMENT_MAGNITUDES, interpolation=mode), probability)


def _timm_rand_augment(size: int, mode: InterpolationMode, policy: str = "rand-m9-mstd0.5-inc1") -> Transform:
    _require(policy.split("-")[0] == "rand", "the policy is one of timm's RandAugment, such as rand-m9-mstd0.5-inc1")
    return TimmRandAugment(policy, size, mode)


class TimmRandAugment:
    """timm's RandAugment, which the recipes of DeiT, Swin, ConvNeXt and "ResNet strikes back" name by such strings.

    Unlike torchvision's it leaves each of its operations out half the time, moves the magnitude by noise (``mstd``),
    lets every operation grow with it (``inc1``) and fills with ImageNet's mean colour.

    Raises ``ImportError`` without timm.
    """

    def __init__(self, policy: str, size: int, mode: InterpolationMode) -> None:
        try:
            from timm.data.auto_augment import rand_augment_transform
            from timm.data.transforms import str_to_pil_interp
        except ImportError as error:
            raise ImportError(f"timm is not installed: pip install 'imgcls[timm]' ({error})") from error
        # As in timm's transforms_imagenet_train; shifts in pixels reach 0.45 of the side.
        options = {"translate_const": int(0.45 * size), "interpolation": str_to_pil_interp(mode.value)}
        self._of_colours = rand_augment_transform(policy, {**options, "img_mean": IMAGENET_MEAN})
        self._of_greys = rand_augment_transform(policy, {**options, "img_mean": round(sum(IMAGENET_MEAN) / 3)})

    def __call__(self, picture: Image.Image) -> Image.Image:
        augmented: Image.Image = (self._of_greys if picture.mode == "L" else self._of_colours)(picture)
        return augmented


def _trivial_augment(size: int, mode: InterpolationMode, probability: float = 1.0) -> Transform:
    return _sometimes(v2.TrivialAugmentWide(interpolation=mode), probability)


def _augmix(
    size: int,
    mode: InterpolationMode,
    severity: int = 3,
    width: int = 3,
    depth: int = -1,
    alpha: float = 1.0,
    probability: float = 1.0,
) -> Transform:
    _require(type(width) is int and width >= 1, "the width is a whole number of chains, 1 or more")
    _require(alpha > 0, "alpha, of the Dirichlet and Beta distributions, is above 0")
    if mode is InterpolationMode.BICUBIC:  # torchvision works on tensors here, and shears none of them bicubically
        mode = InterpolationMode.BILINEAR
    return _sometimes(v2.AugMix(severity, width, depth, alpha, interpolation=mode), probability)


# -- erasing -----------------------------------------------------------------------------------------------------------


def _random_erasing(
    size: int,
    mode: InterpolationMode,
    probability: float = 0.5,
    min_area: float = 0.02,
    max_area: float = 0.33,
    fill: str = "black",
) -> Transform:
    _require(fill in ERASING_FILLS, f"the fills are {', '.join(ERASING_FILLS)}")
    _require(0 < min_area <= max_area, "the areas are shares of the picture, the smaller one first")
    return RandomErasing(probability, (min_area, max_area), fill)


class RandomErasing(v2.RandomErasing):
    """torchvision's, on uint8: the rectangle becomes black, ImageNet's mean colour, or uniform noise pixel by pixel.

    Zhong et al. 2017 compare these; noise does best there (table 6, RE-R).
    """

    def __init__(self, probability: float, area: tuple[float, float], fill: str) -> None:
        super().__init__(probability, scale=area, value=0)
        self.fill = fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        if params["v"] is None or self.fill == "black":
            return params
        channels = len(flat_inputs[0].getbands())
        if self.fill == "noise":
            params["v"] = torch.randint(256, (channels, params["h"], params["w"]))
        else:
            mean = torch.tensor(IMAGENET_MEAN)
            params["v"] = (mean if channels == 3 else mean.float().mean().round().long()[None])[:, None, None]
        return params


def _albumentations(size: int, mode: InterpolationMode, pipeline: list[Any] | str) -> Transform:
    return Albumentations(pipeline)


# name in YAML -> builder; the notes are printed in the documentation.
TRANSFORMS: dict[str, Builder] = {
    "resize": _resize,  # the whole picture to the square
    "center_crop": _center_crop,  # side in pixels (0: the training side); smaller pictures get a black border
    "random_crop": _random_crop,  # He et al. 2015, section 4.2: padding in pixels
    "random_scale": _random_scale,  # smallest, largest short side in pixels; 0: 256/224, 480/224 of the training side
    "random_resized_crop": _random_resized_crop,  # Szegedy et al. 2015: area range; aspect 3/4 to 4/3
    "horizontal_flip": _horizontal_flip,  # probability
    "vertical_flip": _vertical_flip,  # probability
    "random_affine": _random_affine,  # degrees, shift (share of the side), smallest and largest scale
    "shift_scale_rotate": _shift_scale_rotate,  # probability, shift (share of the side), scale (1 ± this), degrees
    "color_jitter": _color_jitter,  # brightness, contrast, saturation, hue, probability
    "pca_lighting": _pca_lighting,  # Krizhevsky et al. 2012: standard deviation of the amounts
    "grayscale": _grayscale,  # probability
    "solarize": _solarize,  # probability; value from which pixels are inverted (BYOL's and DINO's second view)
    "invert": _invert,  # probability; for drawings, which come dark on light and light on dark
    "autocontrast": _autocontrast,  # probability
    "blur": _blur,  # Chen et al. 2020: probability, smallest and largest sigma in pixels; kernel a tenth of the side
    "auto_augment": _auto_augment,  # Cubuk et al. 2018: imagenet, cifar10 or svhn; probability
    "rand_augment": _rand_augment,  # Cubuk et al. 2019: operations, magnitude 0 to 30, probability
    "timm_rand_augment": _timm_rand_augment,  # timm's (an extra): its policy's name, such as rand-m9-mstd0.5-inc1
    "trivial_augment": _trivial_augment,  # Müller and Hutter 2021, the wide ranges: probability
    "augmix": _augmix,  # Hendrycks et al. 2020: severity 1 to 10, width, depth (-1: 1 to 3), alpha, probability
    "random_erasing": _random_erasing,  # Zhong et al. 2017: probability, area range, fill (black, mean or noise)
    "albumentations": _albumentations,  # a pipeline of that library, or a YAML file that holds one
}
