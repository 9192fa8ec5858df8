"""How other libraries name the tensors of EfficientNet, EfficientNet-Lite and EfficientNetV2."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imgcls.structures import KeyRule

if TYPE_CHECKING:
    from imgcls.modeling.backbones.efficientnet import Block


@dataclass(frozen=True)
class Spelling:
    """The names of one library; every mapping is from theirs to ours.

    block: their name of a block, from its place.
    inside: kind of block -> the parts of it.
    ends: stem and head, from the number of lines of the network's table.
    """

    block: Callable[[int, int, int], str]
    inside: Mapping[str, Mapping[str, str]]
    ends: Callable[[int], Mapping[str, str]]

    def rules(self, blocks: Sequence[Block]) -> list[KeyRule]:
        """The key rules of the network that consists of ``blocks``."""
        names = dict(self.ends(blocks[-1].place[0] + 1))
        for block in blocks:
            theirs, ours = self.block(*block.place), f"{block.line.feature}.{block.name}"
            names |= {f"{theirs}.{part}": f"{ours}.{name}" for part, name in self.inside[block.kind].items()}
        return [KeyRule(f"^{re.escape(theirs)}\\.", f"{ours}.") for theirs, ours in names.items()]


TORCHVISION = Spelling(
    block=lambda line, index, running: f"features.{line + 1}.{index}.block",
    inside={
        "mb": {
            "0.0": "expand",
            "0.1": "expand.norm",
            "1.0": "depthwise",
            "1.1": "depthwise.norm",
            "2": "se",
            "3.0": "project",
            "3.1": "project.norm",
        },
        "mb1": {
            "0.0": "depthwise",
            "0.1": "depthwise.norm",
            "1": "se",
            "2.0": "project",
            "2.1": "project.norm",
        },
        "fused": {"0.0": "fused", "0.1": "fused.norm", "1.0": "project", "1.1": "project.norm"},
        "fused1": {"0.0": "fused", "0.1": "fused.norm"},
    },
    ends=lambda lines: {
        "features.0.0": "stem.conv1",
        "features.0.1": "stem.conv1.norm",
        f"features.{lines + 1}.0": "head.conv",
        f"features.{lines + 1}.1": "head.conv.norm",
        "classifier.1": "head.fc",
    },
)

TIMM = Spelling(
    block=lambda line, index, running: f"blocks.{line}.{index}",
    inside={
        "mb": {
            "conv_pw": "expand",
            "bn1": "expand.norm",
            "conv_dw": "depthwise",
            "bn2": "depthwise.norm",
            "se.conv_reduce": "se.fc1",
            "se.conv_expand": "se.fc2",
            "conv_pwl": "project",
            "bn3": "project.norm",
        },
        "mb1": {
            "conv_dw": "depthwise",
            "bn1": "depthwise.norm",
            "se.conv_reduce": "se.fc1",
            "se.conv_expand": "se.fc2",
            "conv_pw": "project",
            "bn2": "project.norm",
        },
        "fused": {"conv_exp": "fused", "bn1": "fused.norm", "conv_pwl": "project", "bn2": "project.norm"},
        "fused1": {"conv": "fused", "bn1": "fused.norm"},
    },
    ends=lambda lines: {
        "conv_stem": "stem.conv1",
        "bn1": "stem.conv1.norm",
        "conv_head": "head.conv",
        "bn2": "head.conv.norm",
        "classifier": "head.fc",
    },
)

_LITE_PYTORCH_BLOCK = {
    "_expand_conv": "expand",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise",
    "_bn1": "depthwise.norm",
    "_project_conv": "project",
    "_bn2": "project.norm",
}
LITE_PYTORCH = Spelling(
    block=lambda line, index, running: f"_blocks.{running}",
    inside={"mb": _LITE_PYTORCH_BLOCK, "mb1": _LITE_PYTORCH_BLOCK},
    ends=lambda lines: {
        "_conv_stem": "stem.conv1",
        "_bn0": "stem.conv1.norm",
        "_conv_head": "head.conv",
        "_bn1": "head.conv.norm",
        "_fc": "head.fc",
    },
)
