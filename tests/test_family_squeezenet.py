"""SqueezeNet: table 1 of the paper, line by line, and the windows at the border that pooling counts."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

from imgcls.modeling import Architecture, family_of, make_classifier
from imgcls.modeling.backbones.squeezenet import Fire, fire_channels
from imgcls.structures import PreprocessingContract
from imgcls.transfer.parity import import_into, logits_difference, randomise

CONTRACT = PreprocessingContract("RGB", (0.0,) * 3, (1.0,) * 3, 224, 256, "bilinear")

# Table 1: layer -> side of its output, parameters before pruning.
TABLE_1 = {
    "backbone.stem.conv1": (111, 14_208),
    "backbone.res2.fire2": (55, 11_920),
    "backbone.res2.fire3": (55, 12_432),
    "backbone.res2.fire4": (55, 45_344),
    "backbone.res3.fire5": (27, 49_440),
    "backbone.res3.fire6": (27, 104_880),
    "backbone.res3.fire7": (27, 111_024),
    "backbone.res3.fire8": (27, 188_992),
    "backbone.res4.fire9": (13, 197_184),
    "head.fc": (13, 513_000),
}


def classifier(variant):
    return make_classifier(Architecture(variant, norm="none"), 1000, CONTRACT)


def run_and_watch(net):
    """Name -> side of what every convolution and fire module makes of 227 pixels.

    Table 1 prints an input of 224, and 111 outputs of conv1, which it has for 227.
    """
    seen = {}
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, Fire)):
            module.register_forward_hook(lambda module, _, output, name=name: seen.update({name: output.shape[-1]}))
    net.eval()(torch.zeros(1, 3, 227, 227, device="meta"), normalized=True)
    return seen


def test_version_1_0_is_the_papers_table_1():
    with torch.device("meta"):
        net = classifier("squeezenet1_0")
    seen = run_and_watch(net)
    for name, (side, parameters) in TABLE_1.items():
        assert seen[name] == side, name
        assert sum(p.numel() for p in net.get_submodule(name).parameters()) == parameters, name
    assert sum(p.numel() for p in net.parameters()) == 1_248_424


def test_fire_modules_have_the_kernels_of_table_1():
    # s1x1 and e1x1 + e3x3 of fire2 .. fire9.
    squeezed = [16, 16, 32, 32, 48, 48, 64, 64]
    expanded = [128, 128, 256, 256, 384, 384, 512, 512]
    assert [fire_channels(number) for number in range(2, 10)] == list(zip(squeezed, expanded, strict=True))


@torch.no_grad()
def test_a_pooling_that_forgets_the_last_window_is_noticed():
    reference = torchvision.models.squeezenet1_1().eval()
    randomise(reference, 0)
    source = family_of("squeezenet1_1").sources["torchvision"]
    ours = import_into("squeezenet1_1", source, reference.state_dict(), classes=1000)
    x = torch.randn(1, 3, 97, 97)
    assert logits_difference(ours, reference, x) <= 1e-5
    ours.backbone.res2.pool.ceil_mode = False
    assert logits_difference(ours, reference, x) > 1e-3
