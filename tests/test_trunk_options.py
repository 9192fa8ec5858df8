"""What a config may ask of a trunk, asked of the smallest variant of every family: it is done exactly, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling import build_model
from small_networks import VARIANTS, classifier_of, images, relative, side, trunk_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from imgcls.modeling import backbone_base, family_of, input_convolution, make_classifier
from imgcls.transfer.examine import CONTRACT, fit_statistics, plain
from imgcls.transfer.references import build_reference

OWN_NORM = {"alexnet": "none", "convnext_tiny": "LN", "squeezenet1_1": "none", "swin_t": "LN", "vit_ti_16": "LN"}
CHOSEN_NORM = [variant for variant in VARIANTS if variant not in OWN_NORM]
STOCHASTIC_DEPTH = ["convnext_tiny", "efficientnet_lite0", "efficientnet_v2_s", "resnet18", "swin_t", "vit_ti_16"]
NOT_IN_TORCHVISION = [
    *("classic_cnn_8", "darknet53", "darknet19", "efficientnet_lite0", "mobilenet_v1_0.25", "sandbox"),
    "shufflenet_v1_g8",
]
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)
NORM_LAYERS = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": nn.GroupNorm,
}


# -- gradient checkpointing ------------------------------------------------------------------------------------------


def step(net, start, x):
    """Loss, gradients, state after one forward and backward from ``start``, and the bytes kept for the backward."""
    net.load_state_dict(start)
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = sum(net(x, torch.tensor([3, 7])).values())
    named = dict(net.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {"loss": loss.detach(), **{f"gradient of {n}": g for n, g in zip(named, gradients, strict=True)}}
    return found, {name: value.clone() for name, value in net.state_dict().items()}, kept


def different(ours, theirs):
    assert list(ours) == list(theirs)
    return [name for name in ours if ours[name] is not theirs[name] and not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_no_bit(variant, classifier_cfg, monkeypatch):
    drops = ("MODEL.BACKBONE.DROP_PATH", 0.3) if variant in STOCHASTIC_DEPTH else ()
    small = ("MODEL.BACKBONE.PRETRAIN_SIZE", 32) if variant == "vit_ti_16" else ()
    head = ("MODEL.HEAD.NAME", "LinearHead", "MODEL.HEAD.NUM_CLASSES", 10, "MODEL.HEAD.DROPOUT", 0.2)
    cfg = classifier_cfg(variant, "MODEL.BACKBONE.CHECKPOINT", True, *head, *drops, *small)
    torch.manual_seed(0)
    net = build_model(cfg).train()
    assert net.backbone.checkpointing
    start = {name: value.clone() for name, value in net.state_dict().items()}
    x = images(variant)
    found, state, kept = step(net, start, x)
    net.backbone.checkpointing = False
    expected, expected_state, all_kept = step(net, start, x)
    assert different(found, expected) == [] and different(state, expected_state) == []
    assert kept < 0.7 * all_kept
    net.backbone.checkpointing = True
    # Twin: torch's own checkpoint blends every batch into the running statistics twice.
    monkeypatch.setattr(backbone_base, "recomputed", lambda stage, x: checkpoint(stage, x, use_reentrant=False))
    _, state, _ = step(net, start, x)
    norms = any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert norms == (variant not in OWN_NORM)
    assert any("running_var" in name for name in different(state, expected_state)) == norms


# -- export and precision --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_exported_classifier_gives_the_same_logits(variant):
    net = classifier_of(variant)
    fit_statistics(net, side(variant))
    net.eval()
    x, others = images(variant), images(variant, seed=1)
    exported = torch.export.export(net, (x,)).module()
    for batch in (x, others):
        torch.testing.assert_close(exported(batch), net(batch), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(exported(x), exported(others), rtol=1e-4)


# bfloat16 has 8 bits, 0.4 % per rounding, and the networks round up to some hundred times; most stay below 0.02.
BF16_LIMIT = 0.1


def calm(variant):
    net = classifier_of(variant)
    if variant == "efficientnet_v2_s":
        # With the statistics that it starts with, its maps grow a thousandfold, and what rounding does to them too.
        fit_statistics(net, side(variant))
    return net


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_last_and_bfloat16_stay_near(variant):
    net = calm(variant)
    x, targets = images(variant), torch.tensor([3, 7])
    with torch.no_grad():
        expected = net.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x)
    assert 0 < relative(low, expected) <= BF16_LIMIT
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(net.train()(x, targets).values())
    gradients = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients if g is not None)
    net = calm(variant)
    net.memory_format = torch.channels_last
    net.to(memory_format=torch.channels_last)
    convolutions = [
        m for m in net.modules() if isinstance(m, nn.Conv2d) and m.weight[0].numel() > m.weight.shape[1] > 1
    ]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    with torch.no_grad():
        assert relative(net.eval()(x), expected) <= 1e-4
    assert torch.isfinite(sum(net.train()(x, targets).values()))


# -- norms -----------------------------------------------------------------------------------------------------------


def norms_of(net, layer):
    return {name: module for name, module in net.named_modules() if type(module) is layer}


@pytest.mark.parametrize("variant", CHOSEN_NORM)
def test_every_kind_of_norm_stands_at_the_same_places_with_eps_and_momentum(variant):
    with torch.device("meta"):
        nets = {k: make_classifier(replace(plain(variant), norm=k), 10, CONTRACT, auxiliary=True) for k in NORM_LAYERS}
    wanted = norms_of(nets["BN"], nn.BatchNorm2d)
    assert len(wanted) > 5
    for kind, layer in NORM_LAYERS.items():
        found = norms_of(nets[kind], layer)
        assert list(found) == list(wanted), kind
        for name, module in found.items():
            assert module.eps == wanted[name].eps
            if layer in BATCH_NORMS:
                assert module.momentum == wanted[name].momentum


@pytest.mark.parametrize("variant", [variant for variant in CHOSEN_NORM if variant not in NOT_IN_TORCHVISION])
def test_eps_and_momentum_are_the_references(variant):
    family = family_of(variant)
    source = family.sources["torchvision"]
    reference = build_reference("torchvision", source.names[variant], source.options_for(family.variants[variant]))
    theirs = {(m.eps, m.momentum) for m in reference.modules() if isinstance(m, nn.BatchNorm2d)}
    with torch.device("meta"):
        ours = make_classifier(plain(variant), 10, CONTRACT, auxiliary=True)
    assert {(m.eps, m.momentum) for m in ours.modules() if isinstance(m, nn.BatchNorm2d)} == theirs


@pytest.mark.parametrize("asked", ["GN", "SyncBN", "FrozenBN"])
@pytest.mark.parametrize("variant", OWN_NORM)
def test_norms_of_its_own_are_kept_and_others_refused(variant, asked, classifier_cfg, detector_cfg):
    assert family_of(variant).own_norm(variant) == OWN_NORM[variant]
    words = ("MODEL.HEAD.NUM_CLASSES", 10, "MODEL.BACKBONE.NORM")
    with pytest.raises(ValueError, match=rf"norms of {variant} are not to be chosen.*got '{asked}'; allowed: auto, "):
        build_model(classifier_cfg(variant, *words, asked))


@pytest.mark.parametrize("variant", OWN_NORM)
def test_auto_is_the_networks_own_norm(variant, classifier_cfg):
    net = build_model(classifier_cfg(variant, "MODEL.HEAD.NUM_CLASSES", 10, "MODEL.HEAD.NAME", "LinearHead"))
    assert net.backbone.architecture.norm == OWN_NORM[variant]
    batch_or_group = (*NORM_LAYERS.values(), nn.modules.batchnorm._BatchNorm)
    assert not any(isinstance(module, batch_or_group) for module in net.modules())


# -- input channels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_one_and_of_four_channels(variant, channels):
    trunk = trunk_of(variant, in_channels=channels, for_detector=True).eval()
    assert input_convolution(trunk)[1].in_channels == channels
    x = torch.randn(1, channels, *[side(variant)] * 2, requires_grad=True)
    (found,) = trunk(x).values()
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert (gradient.abs().amax(dim=(0, 2, 3)) > 0).all()
    with torch.no_grad():
        (usual,) = trunk_of(variant, for_detector=True).eval()(torch.zeros(1, 3, *x.shape[2:])).values()
    assert found.shape == usual.shape


# -- stochastic depth ------------------------------------------------------------------------------------------------

# Blocks that add their input -> their place among all, for the linear rule.
PLACES = {
    "convnext_tiny": [i / 17 for i in range(18)],
    "resnet18": [i / 7 for i in range(8)],
    "swin_t": [i / 11 for i in range(12)],
    "vit_ti_16": [i / 11 for i in range(12)],
    # Tan and Le 2019, table 1: 16 blocks, of which these keep the map's shape.
    "efficientnet_lite0": [i / 16 for i in (2, 4, 6, 7, 9, 10, 12, 13, 14)],
    # Tan and Le 2021, table 4: 40 blocks in stages of 2, 4, 4, 6, 9, 15, whose first change channels but in stage 1.
    "efficientnet_v2_s": [i / 40 for i in range(40) if i not in (2, 6, 10, 16, 25)],
}


def rates_of(trunk):
    """Of every block that has stochastic depth, with its module."""
    found = {}
    for name, block in trunk.named_modules():
        drop = getattr(block, "drop_path", None)
        if isinstance(drop, nn.Module):
            found[name] = (block, float(getattr(drop, "p", getattr(drop, "drop_prob", 0.0)) or 0.0))
    return found


@pytest.mark.parametrize("variant", STOCHASTIC_DEPTH)
def test_rates_grow_linearly_and_evaluation_is_without_them(variant):
    assert set(PLACES) == set(STOCHASTIC_DEPTH)
    dropping, plainly = (trunk_of(variant, drop_path=rate).eval() for rate in (0.4, 0.0))
    rates = [rate for _, rate in rates_of(dropping).values()]
    expected = [0.4 * place for place in PLACES[variant]]
    assert [rate for rate in rates if rate] == pytest.approx([rate for rate in expected if rate])
    assert not any(rate for _, rate in rates_of(plainly).values())
    plainly.load_state_dict(dropping.state_dict())
    x = torch.randn(1, 3, *[side(variant)] * 2)
    with torch.no_grad():
        for name, value in dropping(x).items():
            assert torch.equal(value, plainly(x)[name])


@torch.no_grad()
@pytest.mark.parametrize("variant", STOCHASTIC_DEPTH)
def test_with_a_rate_near_one_nothing_but_the_shortcut_is_left_of_the_last_block(variant):
    trunk = trunk_of(variant, drop_path=1 - 1e-7)
    block, rate = max(rates_of(trunk).values(), key=lambda found: found[1])
    assert rate > 0.87
    for drop in block.modules():
        if isinstance(drop, StochasticDepth):
            drop.p = 1 - 1e-7  # EfficientNet's last block has one step less
    for name, parameter in trunk.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(1.0)  # ConvNeXt's layer scale starts at a millionth
    seen = {}
    block.register_forward_pre_hook(lambda _, inputs: seen.update(before=inputs[0].clone()))
    block.register_forward_hook(lambda _, inputs, output: seen.update(after=output.clone()))
    x = torch.randn(2, 3, *[side(variant)] * 2)
    trunk.train()(x)
    assert torch.equal(seen["after"], seen["before"])
    trunk.eval()(x)
    assert not torch.allclose(seen["after"], seen["before"], rtol=1e-3)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in STOCHASTIC_DEPTH])
def test_a_family_without_stochastic_depth_says_so(variant):
    with pytest.raises(ValueError, match=r"has no stochastic depth: got 0.1; allowed: 0.0; change MODEL.BACKBONE.DROP"):
        trunk_of(variant, drop_path=0.1)
