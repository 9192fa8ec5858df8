"""GoogLeNet: the paper's table, its auxiliary heads, and torchvision's way of training and normalising it."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from imgcls.checkpoint import write_checkpoint
from imgcls.engine import Run, finalize
from imgcls.modeling import Architecture, family_of, make_classifier, make_trunk
from imgcls.modeling.backbones.googlenet import AuxiliaryHead
from imgcls.transfer import convert, read_handover
from imgcls.transfer.parity import NEUTRAL, import_into, randomise
from imgcls.transfer.references import build_reference

# Table 1: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj; parameters in K (1024 weights), multiply-adds in M.
MODULES = {
    "inception3a": (64, 96, 128, 16, 32, 32, 159, 128),
    "inception3b": (128, 128, 192, 32, 96, 64, 380, 304),
    "inception4a": (192, 96, 208, 16, 48, 64, 364, 73),
    "inception4b": (160, 112, 224, 24, 64, 64, 437, 88),
    "inception4c": (128, 128, 256, 24, 64, 64, 463, 100),
    "inception4d": (112, 144, 288, 32, 64, 64, 580, 119),
    "inception4e": (256, 160, 320, 32, 128, 128, 840, 170),
    "inception5a": (256, 160, 320, 32, 128, 128, 1072, 54),
    "inception5b": (384, 192, 384, 48, 128, 128, 1388, 71),
}
# Printed parameters that fit neither the printed widths nor the printed multiply-adds, which agree with one another.
MISPRINTED = {"inception4a", "inception4c", "inception4d", "inception4e", "inception5b"}


def weights_of(module):
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def paper(auxiliary=False):
    net = make_classifier(Architecture("googlenet_paper", norm="none"), 1000, NEUTRAL, auxiliary=auxiliary)
    return net.double().eval()


def imported(reference):
    source = family_of("googlenet").sources["torchvision"]
    return import_into("googlenet", source, reference.state_dict(), classes=1000).double()


def torchvisions(**options):
    torch.manual_seed(0)
    source = family_of("googlenet").sources["torchvision"]
    reference = build_reference("torchvision", "googlenet", {**source.options, **options})
    randomise(reference, 1)
    keep_signal(reference)
    return reference.double()


def keep_signal(reference):
    """torchvision's own initial weights (init_weights=False) leave logits that hardly depend on the image (1e-5)."""
    for module in reference.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)


def training_without_chance(net):
    net.train()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    return net


# -- the paper -------------------------------------------------------------------------------------------------------


def test_rows_have_the_papers_parameters_and_multiply_adds():
    """Two rows are misprinted as a whole: conv1 (2.7K for 7x7 kernels), and 5a, which is 4e over 832 channels."""
    with torch.device("meta"):
        net = paper()
    trunk = net.backbone
    assert weights_of(trunk.stem) == 7 * 7 * 3 * 64
    assert round(weights_of(trunk.res2) / 1024) == 112 and round(weights_of(trunk.res2) * 56**2 / 1e6) == 360
    assert round(weights_of(net.head) / 1024) == 1000
    counted = {}
    for stage, side in (("res3", 28), ("res4", 14), ("res5", 7)):
        for name, module in getattr(trunk, stage).named_children():
            if name == "pool":
                continue
            counted[name] = weights_of(module)
            kilo, mega = MODULES[name][6:]
            if name != "inception5a":
                assert abs(counted[name] * side**2 / 1e6 - mega) < 1, name
                assert (abs(counted[name] / 1024 - kilo) <= 1.1) == (name not in MISPRINTED), name
    assert list(counted) == list(MODULES)
    assert counted["inception5a"] == counted["inception4e"] + (832 - 528) * (256 + 160 + 32 + 128)


def test_maps_at_224_pixels_are_the_papers():
    wanted = {"stem": (64, 112), "res2": (192, 56), "res3": (480, 28), "res4": (832, 14), "res5": (1024, 7)}
    wanted |= {"aux1": (512, 14), "aux2": (528, 14)}
    with torch.device("meta"):
        for variant, norm in (("googlenet", "BN"), ("googlenet_paper", "none")):
            trunk = make_trunk(Architecture(variant, norm=norm), out_features=list(wanted))
            maps = trunk(torch.zeros(1, 3, 224, 224))
            assert {name: (m.shape[1], m.shape[2]) for name, m in maps.items()} == wanted


def slow_response_norm(x):
    squares = F.pad(x**2, (0, 0, 0, 0, 2, 2))
    total = sum(squares[:, i : i + x.shape[1]] for i in range(5))
    return x / (1 + 1e-4 * total / 5) ** 0.75


def slow_pool(x):
    """3x3 windows every 2 pixels, as many as begin inside; what juts out is not there."""
    sides = [-(-(side - 3) // 2) + 1 for side in x.shape[2:]]
    rows = [
        torch.stack([x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax(dim=(2, 3)) for j in range(sides[1])], dim=-1)
        for i in range(sides[0])
    ]
    return torch.stack(rows, dim=-2)


def slow_googlenet(tensors, x):
    """Table 1 from top to bottom with figure 3's response norms."""

    def conv(x, name, kernel, width, stride=1):
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        assert tuple(weight.shape) == (width, x.shape[1], kernel, kernel), name
        return F.conv2d(x, weight, bias, stride=stride, padding=kernel // 2).clamp(min=0)

    x = slow_response_norm(slow_pool(conv(x, "stem.conv1", 7, 64, stride=2)))
    x = slow_response_norm(conv(conv(x, "res2.reduce", 1, 64), "res2.conv", 3, 192))
    for name, (one, reduce3, three, reduce5, five, pool, *_) in MODULES.items():
        if name in ("inception3a", "inception4a", "inception5a"):
            x = slow_pool(x)
        prefix = f"res{name[9]}.{name}"
        branch3 = conv(conv(x, f"{prefix}.reduce3x3", 1, reduce3), f"{prefix}.conv3x3", 3, three)
        branch5 = conv(conv(x, f"{prefix}.reduce5x5", 1, reduce5), f"{prefix}.conv5x5", 5, five)
        padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
        shifted = [padded[:, :, i : i + x.shape[2], j : j + x.shape[3]] for i in range(3) for j in range(3)]
        branch_pool = conv(torch.stack(shifted).amax(dim=0), f"{prefix}.pool_proj", 1, pool)
        x = torch.cat([conv(x, f"{prefix}.conv1x1", 1, one), branch3, branch5, branch_pool], dim=1)
    return x


@torch.no_grad()
def test_the_papers_network_is_the_papers_table():
    torch.manual_seed(0)
    trunk = paper().backbone
    randomise(trunk, 1)
    x = torch.randn(1, 3, 97, 64, dtype=torch.float64)
    ours, slow = trunk(x)["res5"], slow_googlenet(trunk.state_dict(), x)
    assert (ours - slow).abs().max() <= 1e-10 * slow.abs().max()
    for norm in (trunk.res2.response_norm1, trunk.res2.response_norm2):
        norm.k = 1.01
        assert (trunk(x)["res5"] - slow).abs().max() > 1e-6 * slow.abs().max()
        norm.k = 1.0


@torch.no_grad()
def test_the_papers_auxiliary_heads_take_means_of_5x5_windows_every_3_pixels():
    torch.manual_seed(0)
    head = AuxiliaryHead(512, 10, norm=None, windows=True).double().eval()
    x = torch.randn(2, 512, 14, 14, dtype=torch.float64)
    means = [x[:, :, i : i + 5, j : j + 5].mean(dim=(2, 3)) for i in (0, 3, 6, 9) for j in (0, 3, 6, 9)]
    grid = torch.stack(means, dim=-1).unflatten(-1, (4, 4))
    slow = F.conv2d(grid, head.conv.weight, head.conv.bias).clamp(min=0).flatten(1)
    slow = head.fc(head.hidden(slow).clamp(min=0))
    assert (head(x) - slow).abs().max() <= 1e-10 * slow.abs().max()
    head.windows = False
    assert (head(x) - slow).abs().max() > 1e-3 * slow.abs().max()


# -- torchvision -----------------------------------------------------------------------------------------------------


def test_it_has_torchvisions_parameters():
    """The number that torchvision publishes with its weights, which come without auxiliary heads."""
    with torch.device("meta"):
        net = make_classifier(Architecture("googlenet"), 1000, NEUTRAL)
    assert sum(p.numel() for p in net.parameters()) == 6_624_904


@torch.no_grad()
def test_auxiliary_logits_equal_torchvisions():
    reference = torchvisions()
    ours = imported(reference)
    for net in (reference, ours):
        training_without_chance(net)
    x = torch.randn(2, 3, 97, 97, dtype=torch.float64)
    theirs = reference(x)
    expected = {"": theirs.logits, "aux1": theirs.aux_logits1, "aux2": theirs.aux_logits2}

    def differences():
        logits = ours._all_logits(x, True)
        assert set(logits) == set(expected)
        return {name: ((logits[name] - e).abs().max() / e.abs().max()).item() for name, e in expected.items()}

    assert max(differences().values()) <= 1e-10
    # 4b lies between the two: the first head must not see a change of it, the second must.
    ours.backbone.res4.inception4b.conv1x1.weight.mul_(1.01)
    changed = differences()
    assert changed["aux1"] <= 1e-10 and changed["aux2"] > 1e-6 and changed[""] > 1e-6


@torch.no_grad()
def test_transform_input_is_another_mean_and_std():
    reference = torchvisions(transform_input=True).eval()
    ours = imported(reference)
    pixels = torch.randint(0, 256, (2, 3, 97, 97)).double()
    mean = torch.tensor((0.485, 0.456, 0.406), dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225), dtype=torch.float64).view(3, 1, 1)
    imagenet = (pixels / 255 - mean) / std
    theirs = reference(imagenet)
    difference = (ours((pixels - 127.5) / 127.5, normalized=True) - theirs).abs().max() / theirs.abs().max()
    assert difference <= 1e-10
    assert (ours(imagenet, normalized=True) - theirs).abs().max() > 1e-3 * theirs.abs().max()


# -- auxiliary heads in training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["googlenet", "googlenet_paper"])
def test_auxiliary_losses_have_their_weight_and_can_be_left_out(classifier_cfg, variant):
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 3])
    own = ("MODEL.BACKBONE.NORM", "auto", "MODEL.HEAD.NUM_CLASSES", 10)
    net = training_without_chance(build_model(classifier_cfg(variant, *own)))
    logits, losses = net._all_logits(images, False), net(images, labels)
    assert set(losses) == {"loss_cls", "loss_cls_aux1", "loss_cls_aux2"}
    for name, weight in (("", 1.0), ("aux1", 0.3), ("aux2", 0.3)):
        expected = weight * F.cross_entropy(logits[name], labels).item()
        assert losses[f"loss_cls_{name}".rstrip("_")].item() == pytest.approx(expected, rel=1e-5)
    net = build_model(classifier_cfg(variant, *own, "MODEL.HEAD.AUX_WEIGHT", 0.0)).train()
    assert set(net(images, labels)) == {"loss_cls"}
    assert not any("auxiliary" in key for key in net.state_dict())


def test_evaluation_runs_no_auxiliary_head():
    net = make_classifier(Architecture("googlenet"), 10, NEUTRAL, auxiliary=True)
    calls = []
    for name, module in net.head.auxiliary.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    x = torch.randn(2, 3, 32, 32)
    net.eval()(x, normalized=True)
    assert calls == []
    net.train()(x, torch.tensor([0, 1]), normalized=True)
    assert calls == ["aux1", "aux2"]


def test_extra_maps_are_no_stages():
    with torch.device("meta"):
        plain = make_trunk(Architecture("googlenet"))
        tapped = make_trunk(Architecture("googlenet"), out_features=["aux1", "aux2", "res5"])
    assert [name for name, _ in tapped.stage_modules()] == [name for name, _ in plain.stage_modules()]
    assert list(tapped.state_dict()) == list(plain.state_dict())
    with pytest.raises(ValueError, match=r"aux1 lie inside res4.*OUT_FEATURES"):
        make_trunk(Architecture("googlenet"), out_features=["aux1", "res3"])


def test_a_trained_checkpoint_is_handed_over_without_auxiliary_heads(classifier_cfg, tmp_path):
    run = Run(*finalize(classifier_cfg("googlenet")))
    before = {key: value.clone() for key, value in run.model.head.auxiliary.state_dict().items()}
    with EventStorage(0):
        for iteration, batch in zip(range(2), run.batches(), strict=False):
            run.step(batch, iteration)
    for key, value in run.model.head.auxiliary.named_parameters():
        assert not torch.equal(value, before[key]), key
    write_checkpoint(tmp_path / "model.pth", run.checkpoint(1), iteration=1)
    convert(tmp_path / "model.pth", tmp_path / "backbone.pth")
    weights = read_handover(tmp_path / "backbone.pth").weights
    wanted = {key for key in run.model.backbone.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(weights) == wanted and not any("aux" in key for key in weights)
