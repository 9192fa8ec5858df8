"""Any network of timm (Wightman 2019, pytorch-image-models) that offers ``features_only``: variants ``timm:<name>``.

Its modules are taken over as they are and grouped into the stages that end at each of timm's feature maps, so freezing,
hand-over and gradient checkpointing work as for every other trunk. A network that timm does not cut up into a chain
(EfficientNet, HRNet, ViT) is one stage, ``body``. The classifier is a new head: parity with timm is on the maps.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log2
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from imgcls.modeling.backbone_base import StagedTrunk, Trunk, require_maps
from imgcls.modeling.build import build_trunk
from imgcls.modeling.spec import Family, Source, family_of, register_open_family
from imgcls.structures import KeyRule, Problem

PREFIX = "timm:"
# What lets networks of a fixed image size take others, by the kind of network; the first that timm accepts is used.
SIZE_OPTIONS: tuple[Mapping[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


@dataclass(frozen=True)
class TimmSpec:
    """timm's name of the network, what makes it take images of any size, and its maps as (name, channels, stride)."""

    name: str
    options: Mapping[str, Any]
    image_size: int
    maps: tuple[tuple[str, int, int], ...]


class TimmStage(nn.Sequential):
    """Modules of timm's network up to one of its feature maps; turns maps that timm keeps as (N, H, W, C) round."""

    def __init__(self, modules: Mapping[str, nn.Module], *, takes_nhwc: bool, gives_nhwc: bool) -> None:
        super().__init__(OrderedDict(modules))
        self.takes_nhwc, self.gives_nhwc = takes_nhwc, gives_nhwc

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1) if self.takes_nhwc else x)
        return x.permute(0, 3, 1, 2).contiguous() if self.gives_nhwc else x


class CutTrunk(StagedTrunk):
    """timm's modules as stages named by their strides: stem (2), res2 (4) .. res5 (32)."""

    def __init__(self, spec: TimmSpec, net: Any, out_features: Sequence[str]) -> None:
        super().__init__()
        nhwc = _is_nhwc(net)
        ends = dict(zip(net.return_layers, spec.maps, strict=False))
        modules: dict[str, nn.Module] = {}
        before = 1
        for position, (name, module) in enumerate(net.items()):
            modules[name] = module
            if name not in ends:
                continue
            own, channels, stride = ends[name]
            # Of several maps with one stride the last is that stride's stage.
            if any(ends[later][2] == stride for later in list(net)[position + 1 :] if later in ends):
                continue
            stage = TimmStage(modules, takes_nhwc=nhwc and before > 1, gives_nhwc=nhwc)
            self.add_stage(own, stage, channels=channels, stride=stride // before)
            modules, before = {}, stride
        self.keep(out_features)


class WholeTrunk(Trunk):
    """A network that timm does not cut up into a chain (EfficientNet, HRNet, ViT): one stage, called body."""

    def __init__(self, spec: TimmSpec, net: nn.Module, out_features: Sequence[str]) -> None:
        super().__init__()
        self.body = net
        self._nhwc = _is_nhwc(net)
        self._names = [name for name, _, _ in spec.maps]
        self._out_features = list(out_features)
        self._out_feature_channels = {name: channels for name, channels, _ in spec.maps}
        self._out_feature_strides = {name: stride for name, _, stride in spec.maps}
        self.stages_return_maps = False

    def stage_modules(self) -> list[tuple[str, nn.Module]]:
        return [("body", self.body)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W), normalised -> feature name -> map."""
        if self.training:
            self.require_arrival()
        maps = dict(zip(self._names, self.run_stage(self.body, x), strict=False))
        return {name: maps[name].permute(0, 3, 1, 2) if self._nhwc else maps[name] for name in self._out_features}


def timm_trunk(
    spec: TimmSpec,
    *,
    in_channels: int = 3,
    norm: str = "BN",
    out_features: Sequence[str] | None = None,
    stem: str = "standard",
    drop_path: float = 0.0,
) -> Trunk:
    """The trunk of one row; nothing behind the last of ``out_features`` is built."""
    names = [name for name, _, _ in spec.maps]
    wanted = list(out_features or names[-1:])
    require_maps(f"timm's {spec.name}", wanted, list(dict.fromkeys(names)))
    last = max(index for index, name in enumerate(names) if name in wanted)
    options = {**spec.options, **({"drop_path_rate": drop_path} if drop_path else {})}
    indices = {} if last + 1 == len(names) else {"out_indices": tuple(range(last + 1))}
    net = _with_norm(_create(spec.name, in_chans=in_channels, **indices, **options), norm)
    kind = CutTrunk if isinstance(net, _timm().models.FeatureDictNet) else WholeTrunk
    return kind(spec, net, wanted)


def _create(name: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _timm().create_model(name, pretrained=False, features_only=True, **options)


def _is_nhwc(net: nn.Module) -> bool:
    form = getattr(net, "output_fmt", "NCHW")
    return str(getattr(form, "value", form)) == "NHWC"


def map_name(stride: int) -> str:
    """detectron2's name of a map of this stride; one that is no power of two is called by its number."""
    level = log2(stride)
    if level != int(level):
        return f"stride{stride}"
    return "stem" if level <= 1 else f"res{int(level)}"


def _with_norm(net: nn.Module, norm: str) -> nn.Module:
    """timm's BatchNorms (some of which hold the activation too) as the kind asked for, through timm's own functions."""
    layers = _timm().layers
    if norm == "FrozenBN":
        return layers.freeze_batch_norm_2d(net)
    if norm == "SyncBN":
        return layers.convert_sync_batchnorm(net)
    if norm != "BN":
        what = "timm's networks keep their own norms, and their BatchNorm cannot become this"
        raise Problem(what, norm, "auto, BN, FrozenBN, SyncBN (on GPUs)", "MODEL.BACKBONE.NORM").error()
    return net


@cache
def timm_family(variant: str) -> Family:
    """The family of one network of timm; a name that timm has not, or cannot cut up, is a ``ValueError``."""
    timm = _timm()
    name = variant.removeprefix(PREFIX)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
        raise ValueError(f"timm {timm.__version__} has no network {name!r}; near: {', '.join(near) or 'none'}")
    spec = _spec(name)
    return Family(
        name="timm",
        variants={variant: spec},
        build=timm_trunk,
        options=("drop_path",),
        sources={"timm": Source({variant: name}, rules=key_rules)},
    )


def _spec(name: str) -> TimmSpec:
    reason: Exception | None = None
    for options in SIZE_OPTIONS:
        try:
            with torch.device("meta"):
                info = _create(name, **options).feature_info
            stated = _timm().get_pretrained_cfg(name)
            maps = tuple(
                (map_name(stride), channels, stride)
                for channels, stride in zip(info.channels(), info.reduction(), strict=True)
            )
            return TimmSpec(name, options, stated.input_size[-1] if stated else 224, maps)
        except TypeError as error:  # the network does not know the option
            reason = error
        except (RuntimeError, AssertionError, AttributeError, NotImplementedError, KeyError, ValueError) as error:
            reason = error
            break
    first_line = next(iter(str(reason).splitlines()), type(reason).__name__)
    raise ValueError(f"timm's {name} offers no feature maps: {first_line}")


def key_rules(spec: TimmSpec) -> list[KeyRule]:
    """timm's tensor names -> ours, one rule a tensor. What stands behind the last map has no place here."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _timm().create_model(spec.name, pretrained=False).state_dict()
        # timm writes the first levels of a cut-up network with "_" for "."; some others stand under "model.".
        ours = {_canonical(key): key for key in timm_trunk(spec).state_dict()}
    return [
        KeyRule(f"^{re.escape(key)}$", ours[key.replace(".", "_")])
        if key.replace(".", "_") in ours
        else KeyRule(f"^{re.escape(key)}$", change="drop")
        for key in theirs
    ]


def timm_keys(weights: Mapping[str, Tensor], variant: str) -> dict[str, Tensor]:
    """A trunk's tensors under timm's own names, for use outside imgcls; the way back of :func:`key_rules`."""
    spec: TimmSpec = family_of(variant).variants[variant]
    back = {rule.ours: rule.theirs[1:-1].replace("\\", "") for rule in key_rules(spec) if rule.ours}
    return {back[name]: tensor for name, tensor in weights.items()}


def _canonical(key: str) -> str:
    rest = key.split(".", 1)[1]
    return rest.removeprefix("model.").replace(".", "_")


def _timm() -> Any:
    try:
        import timm
        import timm.layers
    except ImportError as error:
        raise ImportError(
            f"networks named {PREFIX}… need timm, which is not installed: pip install 'imgcls[timm]' ({error})"
        ) from error
    return timm


register_open_family(PREFIX, timm_family)


@BACKBONE_REGISTRY.register()
def build_imgcls_timm_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """The network of timm that ``MODEL.BACKBONE.VARIANT`` names."""
    return build_trunk(cfg, input_shape, family_of(cfg.MODEL.BACKBONE.VARIANT))
