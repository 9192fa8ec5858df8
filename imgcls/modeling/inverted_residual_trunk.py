"""What the networks made of inverted residuals share: how blocks become stages, and other libraries' names of them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from detectron2.layers import Conv2d
from torch import nn

from imgcls.layers import InvertedResidual, fill_conv
from imgcls.modeling.backbone_base import StagedTrunk
from imgcls.structures import KeyRule


class InvertedResidualTrunk(StagedTrunk):
    """``stem.conv1``, then inverted residuals ``<stage>.block<i>``; what a stage's blocks do to the map is booked."""

    def __init__(
        self, conv1: Conv2d, blocks: Sequence[tuple[str, InvertedResidual]], out_features: Sequence[str] | None
    ) -> None:
        """blocks: each with the name of its stage, in order."""
        super().__init__()
        stages: dict[str, OrderedDict[str, nn.Module]] = {"stem": OrderedDict(conv1=conv1)}
        channels, strides = {"stem": conv1.out_channels}, {"stem": conv1.stride[0]}
        for (stage, block), name in zip(blocks, block_names(stage for stage, _ in blocks), strict=True):
            stages.setdefault(stage, OrderedDict())[name.removeprefix(f"{stage}.")] = block
            channels[stage] = block.out_channels
            strides[stage] = strides.get(stage, 1) * block.stride
        for stage, layers in stages.items():
            self.add_stage(stage, nn.Sequential(layers), channels=channels[stage], stride=strides[stage])
        self.keep(out_features)
        self.apply(fill_conv)


def block_names(stages: Iterable[str]) -> Iterator[str]:
    """stem, res2, res2 -> stem.block0, res2.block0, res2.block1: one name for every block."""
    count: Counter[str] = Counter()
    for stage in stages:
        yield f"{stage}.block{count[stage]}"
        count[stage] += 1


# Parameters without gradient (Family.without_gradient): no activation stands behind a linear bottleneck's norm.
LINEAR_BOTTLENECK = {
    "*.project.norm.bias": "a constant added to a channel is taken off again by the BatchNorm behind the next 1x1"
}

# timm calls the parts of a block that expands nothing by other names than those of the rest.
TIMM_PARTS = {
    "conv_pw": "expand",
    "bn1": "expand.norm",
    "conv_dw": "depthwise",
    "bn2": "depthwise.norm",
    "conv_pwl": "project",
    "bn3": "project.norm",
}
TIMM_PARTS_UNEXPANDED = {
    "conv_dw": "depthwise",
    "bn1": "depthwise.norm",
    "conv_pw": "project",
    "bn2": "project.norm",
}


def timm_rules(groups: Sequence[Sequence[str]]) -> list[KeyRule]:
    """From the names of timm's EfficientNet class to those of a trunk and its WideningHead.

    groups: timm's stages; of each the stages that our blocks are in. The very first block expands nothing.
    """
    rules = [
        KeyRule(r"^conv_stem\.", "stem.conv1."),
        KeyRule(r"^bn1\.", "stem.conv1.norm."),
        KeyRule(r"^conv_head\.", "head.conv."),
        KeyRule(r"^bn2\.", "head.conv.norm."),
        KeyRule(r"^classifier\.", "head.fc."),
        KeyRule(r"\.se\.conv_reduce\.", ".se.fc1."),
        KeyRule(r"\.se\.conv_expand\.", ".se.fc2."),
    ]
    names = block_names(stage for group in groups for stage in group)
    for number, group in enumerate(groups):
        for index, _ in enumerate(group):
            name, theirs = next(names), rf"^blocks\.{number}\.{index}\."
            parts = TIMM_PARTS if number else TIMM_PARTS_UNEXPANDED
            rules += [KeyRule(rf"{theirs}{part}\.", f"{name}.{ours}.") for part, ours in parts.items()]
            rules.append(KeyRule(theirs, f"{name}."))
    return rules
