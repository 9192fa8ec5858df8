"""EfficientNetV2: Tan and Le 2021, arXiv:2104.00298, table 4 (S) and the release's tables of M and L.

The network is EfficientNet's; its first lines are Fused-MBConv. The paper prints S only, and M and L as scaled up from
it; their tables are the release's, as in torchvision. BatchNorm's epsilon is the release's, its momentum torch's, as
in torchvision.
"""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from imgcls.modeling.backbone_base import Trunk
from imgcls.modeling.backbones.efficientnet import EfficientNet, EfficientNetSpec, Line, efficientnet_head, rules_of
from imgcls.modeling.backbones.efficientnet_keys import TORCHVISION
from imgcls.modeling.build import build_trunk
from imgcls.modeling.inverted_residual_trunk import LINEAR_BOTTLENECK
from imgcls.modeling.spec import Family, Source, register_family

S = (
    Line("stem", 1, 3, 1, 24, 2, fused=True),
    Line("res2", 4, 3, 2, 48, 4, fused=True),
    Line("res3", 4, 3, 2, 64, 4, fused=True),
    Line("res4", 4, 3, 2, 128, 6),
    Line("res4", 6, 3, 1, 160, 9),
    Line("res5", 6, 3, 2, 256, 15),
)
M = (
    Line("stem", 1, 3, 1, 24, 3, fused=True),
    Line("res2", 4, 3, 2, 48, 5, fused=True),
    Line("res3", 4, 3, 2, 80, 5, fused=True),
    Line("res4", 4, 3, 2, 160, 7),
    Line("res4", 6, 3, 1, 176, 14),
    Line("res5", 6, 3, 2, 304, 18),
    Line("res5", 6, 3, 1, 512, 5),
)
L = (
    Line("stem", 1, 3, 1, 32, 4, fused=True),
    Line("res2", 4, 3, 2, 64, 7, fused=True),
    Line("res3", 4, 3, 2, 96, 7, fused=True),
    Line("res4", 4, 3, 2, 192, 10),
    Line("res4", 6, 3, 1, 224, 19),
    Line("res5", 6, 3, 2, 384, 25),
    Line("res5", 6, 3, 1, 640, 7),
)

VARIANTS = {
    "efficientnet_v2_s": EfficientNetSpec(24, S, 1280, 384, 0.2, bn_eps=1e-3),
    "efficientnet_v2_m": EfficientNetSpec(24, M, 1280, 480, 0.3, bn_eps=1e-3),
    "efficientnet_v2_l": EfficientNetSpec(32, L, 1280, 480, 0.4, bn_eps=1e-3),
}

FAMILY = register_family(
    Family(
        name="efficientnet_v2",
        variants=VARIANTS,
        build=EfficientNet,
        head=efficientnet_head,
        options=("drop_path",),
        stems=("standard", "small"),
        dilatable=True,
        without_gradient=LINEAR_BOTTLENECK,
        # timm's networks of this name have another epsilon (efficientnetv2_*) or another padding (tf_efficientnetv2_*).
        sources={"torchvision": Source(names={name: name for name in VARIANTS}, rules=rules_of(TORCHVISION))},
    )
)


@BACKBONE_REGISTRY.register()
def build_imgcls_efficientnet_v2_backbone(cfg, input_shape: ShapeSpec) -> Trunk:  # type: ignore[no-untyped-def]
    """EfficientNetV2 of ``MODEL.BACKBONE.VARIANT``."""
    return build_trunk(cfg, input_shape, FAMILY)
