"""The networks of other libraries, built there with random weights: what ours are measured against."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def _torchvision(name: str, options: Mapping[str, Any]) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


def _timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    timm = require("timm")
    return timm.create_model(name, pretrained=False, **options)


def _efficientnet_lite_pytorch(name: str, options: Mapping[str, Any]) -> nn.Module:
    library = require("efficientnet_lite_pytorch")
    return library.EfficientNet.from_name(name, **options)


def _mae(name: str, options: Mapping[str, Any]) -> nn.Module:
    # MAE is published as code, not as a package; its ViT for fine-tuning is timm's class with this pooling.
    return _timm(f"{name}_224", {"global_pool": "avg", **options})


def _huggingface(name: str, options: Mapping[str, Any]) -> nn.Module:
    """From a configuration, never from the network: ``options`` are its values, ``model_type`` among them."""
    library = require("transformers")
    values = {"num_labels": 1000, **options}
    config = library.AutoConfig.for_model(values.pop("model_type"), **values)
    network: nn.Module = library.AutoModelForImageClassification.from_config(config)
    network.register_forward_hook(lambda _module, _inputs, output: output.logits)
    network.register_load_state_dict_pre_hook(_take_files_names)
    return network


def _take_files_names(network: Any, tensors: dict[str, Any], *_: object) -> None:
    # Files keep names that transformers 5 has given up in its modules; its own loading translates.
    if tensors.keys() != network.state_dict().keys():
        translated = type(network).from_pretrained(None, config=network.config, state_dict=dict(tensors))
        tensors.clear()
        tensors.update(translated.state_dict())


# Library -> builds its network ``name`` with random weights.
BUILDERS: dict[str, Callable[[str, Mapping[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "efficientnet_lite_pytorch": _efficientnet_lite_pytorch,
    "mae": _mae,
    "huggingface": _huggingface,
}


def _timm_maps(name: str, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module:
    """timm's ``features_only`` network, into which timm itself has loaded the whole network's ``tensors``."""
    given = {"state_dict": dict(tensors), "custom_load": False, "source": ""}
    network: nn.Module = require("timm").create_model(
        name, pretrained=True, features_only=True, pretrained_cfg_overlay=given, **options
    )
    if str(getattr(getattr(network, "output_fmt", ""), "value", "")) == "NHWC":
        network.register_forward_hook(lambda _module, _inputs, maps: [value.permute(0, 3, 1, 2) for value in maps])
    return network


# Library -> builds its network of feature maps, (N, C, H, W) each and finest first, with the whole network's tensors.
MAP_BUILDERS: dict[str, Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], nn.Module]] = {"timm": _timm_maps}

# Import name -> what to install.
INSTALL = {
    "timm": "pip install 'imgcls[timm]'",
    "efficientnet_lite_pytorch": "pip install efficientnet-lite-pytorch",
    "transformers": "pip install transformers",
}


def build_reference(library: str, name: str, options: Mapping[str, Any]) -> nn.Module:
    """``name`` of ``library`` with that library's random weights, in eval mode."""
    with warnings.catch_warnings():
        # torchvision announces that GoogLeNet's and Inception's initialisation will change.
        warnings.filterwarnings("ignore", category=FutureWarning)
        return BUILDERS[library](name, options).eval()


def build_maps_reference(
    library: str, name: str, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> nn.Module:
    """The maps of ``name`` of ``library`` with the whole network's ``tensors``, in eval mode."""
    logger = logging.getLogger("timm")
    level = logger.level
    # timm warns of each tensor that stands behind the last map.
    logger.setLevel(logging.ERROR)
    try:
        return MAP_BUILDERS[library](name, tensors, options).eval()
    finally:
        logger.setLevel(level)


def require(module: str) -> Any:
    """Import an optional library; absent, it is an ``ImportError`` that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module}, which is not installed: {INSTALL[module]} ({error})") from error
