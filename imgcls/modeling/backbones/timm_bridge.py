"""Any network of timm (Wightman 2019, pytorch-image-models) that offers ``features_only``: variants ``timm:<name>``.

Its modules are taken over as they are and grouped into the stages that end at each of timm's feature maps, so freezing,
hand-over and gradient checkpointing work as for every other trunk. A network that timm does not cut up into a chain
of single maps (EfficientNet, HRNet, ViT, SelecSLS) is one stage, ``body``. The classifier is a new head: parity with
timm is on the maps.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
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
# Both first: timm 1.0.9's Swin takes "dynamic_img_size" too, but without a word and without effect.
SIZE_OPTIONS: tuple[Mapping[str, Any], ...] = (
    {"dynamic_img_size": True, "strict_img_size": False},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)
# What timm sets only while it loads trained weights itself (``pretrained=True``): without it they mean something else.
TRAINED_WITH: Mapping[str, Mapping[str, Any]] = {"fbnetc_100": {"bn_eps": 1e-3}}
# Modules of networks that are cut up but hand on a list, of which only the first element is a map of timm's.
HAND_ON_LISTS = ("SelecSlsBlock",)

FPN = ("build_imgcls_fpn_backbone", "build_imgcls_retinanet_fpn_backbone")
SIMPLE_FPN = ("build_imgcls_simple_fpn_backbone", "build_imgcls_retinanet_simple_fpn_backbone")


@dataclass(frozen=True)
class TimmSpec:
    """One network.

    name: timm's. options: what makes it take images of any size. image_size: of its trained weights.
    maps: (our name, channels, stride) of each. indices: their numbers in timm (``out_indices``).
    """

    name: str
    options: Mapping[str, Any]
    image_size: int
    maps: tuple[tuple[str, int, int], ...]
    indices: tuple[int, ...]

    @property
    def map_names(self) -> list[str]:
        """Every name once: of several maps with one name (a ViT's blocks) the last bears it."""
        return list(dict.fromkeys(name for name, _, _ in self.maps))

    @property
    def single_map(self) -> bool:
        """Whether there is one map only, of a stride that the simple pyramid takes."""
        return {stride for _, _, stride in self.maps} in ({16}, {32})

    @property
    def finest_level(self) -> int:
        """The finest pyramid level that can be made of the maps: p3 where the simple pyramid begins at stride 32."""
        return 3 if self.single_map and self.maps[-1][2] == 32 else 2


class TimmStage(nn.Sequential):
    """Modules of timm's network up to one of its feature maps; turns maps that timm keeps as (N, H, W, C) round."""

    def __init__(self, modules: Mapping[str, nn.Module], *, takes_nhwc: bool, gives_nhwc: bool) -> None:
        super().__init__(OrderedDict(modules))
        self.takes_nhwc, self.gives_nhwc = takes_nhwc, gives_nhwc

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1) if self.takes_nhwc else x)
        # Not copied: the next stage turns the same memory back, and computes what timm computes to the last bit.
        return x.permute(0, 3, 1, 2) if self.gives_nhwc else x


class CutTrunk(StagedTrunk):
    """timm's modules as stages named by their strides: stem (2), res2 (4) .. res5 (32)."""

    def __init__(self, spec: TimmSpec, net: Any, out_features: Sequence[str]) -> None:
        super().__init__()
        self.spec = spec
        nhwc = _is_nhwc(net)
        ends = dict(zip(net.return_layers, spec.maps, strict=False))
        # Of several maps with one name (strides 1 and 2, or two of one stride) the last ends the stage of that name.
        last = {own: name for name, (own, _, _) in ends.items()}
        modules: dict[str, nn.Module] = {}
        before = 1
        for name, module in net.items():
            modules[name] = module
            if name not in last.values():
                continue
            own, channels, stride = ends[name]
            stage = TimmStage(modules, takes_nhwc=nhwc and bool(self._stage_names), gives_nhwc=nhwc)
            self.add_stage(own, stage, channels=channels, stride=stride // before)
            modules, before = {}, stride
        self.keep(out_features)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """As every trunk's, with a clear error where the network is made for one size of image."""
        with _size_is_told(self.spec, x):
            return super().forward(x)


class WholeTrunk(Trunk):
    """A network that timm does not cut up into a chain of maps (EfficientNet, HRNet, ViT): one stage, called body."""

    def __init__(self, spec: TimmSpec, net: nn.Module, out_features: Sequence[str]) -> None:
        super().__init__()
        self.spec = spec
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
        with _size_is_told(self.spec, x):
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
    require_maps(f"timm's {spec.name}", wanted, spec.map_names)
    last = max(index for index, name in enumerate(names) if name in wanted)
    options = {"in_chans": in_channels, "out_indices": spec.indices[: last + 1], **spec.options}
    options.update(TRAINED_WITH.get(spec.name.partition(".")[0], {}))
    net = _with_norm(_with_drop_path(spec.name, drop_path, options), norm)
    kind = CutTrunk if _is_chain(net) else WholeTrunk
    return kind(spec, net, wanted)


def _with_drop_path(name: str, drop_path: float, options: Mapping[str, Any]) -> Any:
    """The network with this stochastic depth, 0 too: some have another of their own when nothing is said."""
    try:
        return _create(name, drop_path_rate=drop_path, **options)
    except TypeError as error:  # the network does not know the option
        if "drop_path" not in str(error):
            raise
        if drop_path:
            what = f"timm's {name} has no stochastic depth"
            raise Problem(what, drop_path, "0.0", "MODEL.BACKBONE.DROP_PATH").error() from error
    return _create(name, **options)


@contextmanager
def _size_is_told(spec: TimmSpec, x: Tensor) -> Iterator[None]:
    """timm's complaint about an image of another size than the network is made for, as a ``ValueError``."""
    height, width = x.shape[-2:]
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        if (height, width) == (spec.image_size,) * 2 or isinstance(error, torch.OutOfMemoryError):
            raise
        side = f"{spec.image_size}x{spec.image_size}"
        raise ValueError(
            f"timm's {spec.name} failed on an image of {height}x{width}; timm made it for {side} and not every network "
            f"takes others: {_first_line(error)}"
        ) from error


def _first_line(error: Exception | None) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _create(name: str, *, features_only: bool = True, **options: Any) -> Any:
    if features_only:
        options["features_only"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _timm().create_model(name, pretrained=False, **options)


def _outline(build: Callable[[], Any]) -> Any:
    """What ``build`` makes, without memory where that goes."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):
        # timm 1.0.9 reads numbers off tensors while it builds ViTs and others. A reason of another kind comes again.
        return build()


def _is_nhwc(net: nn.Module) -> bool:
    form = getattr(net, "output_fmt", "NCHW")
    return str(getattr(form, "value", form)) == "NHWC"


def _is_chain(net: Any) -> bool:
    """Whether timm cut the network up into modules that hand one map on to the next."""
    cut_up = isinstance(net, _timm().models.FeatureDictNet)
    return cut_up and not any(type(module).__name__ in HAND_ON_LISTS for module in net.values())


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
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5, cutoff=0.5)
        raise ValueError(f"timm {timm.__version__} has no network {name!r}; near: {', '.join(near) or 'none'}")
    spec = _spec(name)
    return Family(
        name="timm",
        variants={variant: spec},
        build=timm_trunk,
        options=("drop_path",),
        pyramids=SIMPLE_FPN if spec.single_map else FPN,
        sources={"timm": Source({variant: name}, key_rules, lambda row: row.options, maps_only=True)},
    )


def _spec(name: str) -> TimmSpec:
    reason: Exception | None = None
    for options in SIZE_OPTIONS:
        try:
            net = _outline(partial(_create, name, **options))
            info = net.feature_info
            indices = list(info.out_indices)
            while isinstance(net, _timm().models.FeatureDictNet) and indices[-1] + 1 < len(info.info):
                if info.info[indices[-1]]["reduction"] >= 32:
                    break
                # timm's choice of five maps leaves stride 32 out where the first has stride 1.
                indices.append(indices[-1] + 1)
            maps = tuple(
                (map_name(stride), channels, stride)
                for channels, stride in zip(info.get("num_chs", indices), info.get("reduction", indices), strict=True)
            )
            stated = _timm().get_pretrained_cfg(name)
            return TimmSpec(name, options, stated.input_size[-1] if stated else 224, maps, tuple(indices))
        except TypeError as error:  # the network does not know the option
            reason = error
        except (RuntimeError, AssertionError, AttributeError, NotImplementedError, KeyError, ValueError) as error:
            reason = error
            break
    raise ValueError(f"timm's {name} offers no feature maps: {_first_line(reason)}")


def key_rules(spec: TimmSpec) -> list[KeyRule]:
    """timm's tensor names -> ours, one rule a tensor. What stands behind the last map has no place here."""
    theirs = _outline(partial(_create, spec.name, features_only=False)).state_dict()
    trunk = _outline(partial(timm_trunk, spec))
    # timm writes the first levels of a cut-up network with "_" for ".".
    ours = {key.removeprefix(_wrapping(trunk, key)).replace(".", "_"): key for key in trunk.state_dict()}
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


def _wrapping(trunk: Trunk, key: str) -> str:
    """What stands before timm's name in a trunk's: its stage, and the one module that some wrap the network in."""
    stage = key.split(".", 1)[0]
    inside = [name for name, _ in getattr(trunk, stage).named_children()]
    return f"{stage}.{inside[0]}." if inside in (["model"], ["body"]) and stage == "body" else f"{stage}."


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
