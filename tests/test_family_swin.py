"""Swin: the paper's numbers, torchvision's network at any size, what detectron2's own class makes of our weights."""

from __future__ import annotations

import sys

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import swin_transformer as in_torchvision
from torchvision.ops import StochasticDepth

from imgcls.checkpoint import apply_key_rules, write_checkpoint
from imgcls.engine import Run, finalize
from imgcls.modeling import Architecture, family_of, make_classifier, make_trunk, spec
from imgcls.modeling.backbones import swin
from imgcls.transfer import convert, load_backbone, read_handover, verify
from imgcls.transfer.parity import NEUTRAL, logits_difference, randomise, to_our_keys

NARROW = swin.SwinSpec(32, (2, 2, 2, 2), (1, 2, 2, 4))
FEATURES = ["stem", "res2", "res3", "res4", "res5"]


@pytest.fixture
def narrow(monkeypatch):
    """A row of no paper, for speed."""
    monkeypatch.setitem(swin.VARIANTS, "swin_narrow", NARROW)
    monkeypatch.setitem(spec._FAMILY_OF, "swin_narrow", swin.FAMILY)
    return "swin_narrow"


def classifier(variant, classes=1000):
    return make_classifier(Architecture(variant, norm="LN"), classes, NEUTRAL).eval()


def stock_swin():
    return SwinTransformer(embed_dim=NARROW.channels, depths=NARROW.blocks, num_heads=NARROW.heads, drop_path_rate=0.0)


# Table 1, 224 pixels: million parameters (28.3 is printed as 29), billion multiply-adds. Of swin_l at 224 pixels the
# paper prints the parameters only; its 103.9 are for 384 pixels and windows of 12.
@pytest.mark.parametrize(
    ("variant", "millions", "billions"),
    [("swin_t", 29, 4.5), ("swin_s", 50, 8.7), ("swin_b", 88, 15.4), ("swin_l", 197, None)],
)
def test_parameters_and_multiply_adds_are_the_papers(variant, millions, billions):
    with torch.device("meta"):
        net = classifier(variant)
        assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 0.75
        with FlopCounterMode(display=False) as counter:
            net.head(net.backbone(torch.zeros(1, 3, 224, 224))["res5"])
    if billions is not None:
        assert abs(counter.get_total_flops() / 2e9 - billions) <= 0.06


def test_tensors_are_detectron2s_but_for_the_constant_table():
    stock, ours = stock_swin(), swin.FAMILY.build(NARROW, out_features=FEATURES[1:])
    shapes = {k: v.shape for k, v in stock.state_dict().items() if not k.endswith("relative_position_index")}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    # detectron2's property raises: its class sets the number under a misspelt name.
    assert isinstance(ours, SwinTransformer) and ours.size_divisibility == 0


# -- the same network as torchvision's -------------------------------------------------------------------------------


def narrow_reference():
    torch.manual_seed(0)
    reference = in_torchvision.SwinTransformer(
        [4, 4], NARROW.channels, list(NARROW.blocks), list(NARROW.heads), [7, 7], num_classes=10
    )
    randomise(reference, 0)
    for name, tensor in reference.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(tensor)
    return reference.double().eval()


def with_weights_of(reference, variant):
    mapped = to_our_keys(apply_key_rules(reference.state_dict(), swin.TORCHVISION_RULES))
    net = classifier(variant, 10).double()
    net.load_state_dict(mapped, strict=True)
    return net


# Maps in one window, in one window along one side only, in whole windows, and in windows that are filled up.
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (64, 320), (320, 64), (252, 100)])
def test_it_is_torchvisions_network_at_any_size(narrow, size):
    reference = narrow_reference()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert logits_difference(with_weights_of(reference, narrow), reference, x) <= 1e-10


def every_side_is_shifted(side):
    return 3


def no_side_is_shifted(side):
    return 0


@pytest.mark.parametrize(
    ("wrong", "size"),
    [(every_side_is_shifted, (224, 224)), (every_side_is_shifted, (64, 320)), (no_side_is_shifted, (320, 64))],
)
def test_a_wrong_shift_is_noticed(narrow, monkeypatch, wrong, size):
    reference = narrow_reference()
    monkeypatch.setattr(swin, "shift_of", wrong)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert logits_difference(with_weights_of(reference, narrow), reference, x) > 1e-5


def test_the_mask_keeps_apart_what_the_shift_brought_together():
    """Both sides shifted, neither a multiple of the window (section 3.2, figure 4)."""
    block = swin.SwinBlock(32, 1, 0.0).double().eval()
    nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, 20, 13, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 0, 0] = torch.randn(32)
    mask = swin.shift_mask(20, 13, (3, 3), x)
    difference = (block(x, (3, 3), mask) - block(changed, (3, 3), mask)).abs().amax(dim=(0, 3)) > 1e-12
    # The pixel in the corner shares its window with the three by three that the shift has carried there with it ...
    seen = torch.zeros(20, 13, dtype=torch.bool)
    seen[:3, :3] = True
    assert torch.equal(difference, seen)
    # ... and without the mask with what stands at the other edges as well.
    unmasked = (block(x, (3, 3), 0 * mask) - block(changed, (3, 3), 0 * mask)).abs().amax(dim=(0, 3)) > 1e-12
    assert unmasked.sum() > seen.sum()


# -- stochastic depth, freezing --------------------------------------------------------------------------------------


def test_drop_path_grows_over_the_blocks_as_in_torchvision_and_needs_no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models.layers", None)
    with torch.device("meta"):
        reference = in_torchvision.SwinTransformer(
            [4, 4], 96, [2, 2, 18, 2], [3, 6, 12, 24], [7, 7], stochastic_depth_prob=0.3
        )
        ours = family_of("swin_s").build(swin.VARIANTS["swin_s"], drop_path=0.3)
    expected = [module.p for module in reference.modules() if isinstance(module, StochasticDepth)]
    found = [module.p for module in ours.modules() if isinstance(module, StochasticDepth)]
    # The first block's is 0 and no layer here.
    assert expected[0] == 0 and found == pytest.approx(expected[1:]) and len(found) == 23


@pytest.mark.parametrize("freeze_at", range(6))
def test_the_norms_of_the_maps_are_never_frozen(freeze_at):
    trunk = swin.FAMILY.build(NARROW, out_features=FEATURES, drop_path=0.5).freeze(freeze_at).train()
    trunk.checkpointing = True
    maps = trunk(torch.randn(2, 3, 64, 64))
    sum((value * torch.randn_like(value)).sum() for value in maps.values()).backward()
    stages = ("patch_embed.", "layers.0.", "layers.1.", "layers.2.", "layers.3.")
    for name, parameter in trunk.named_parameters():
        frozen = name.startswith(stages[:freeze_at]) if freeze_at else False
        assert (parameter.grad is None) == frozen, name
    active = [module.training for stage in trunk.layers[: max(0, freeze_at - 1)] for module in stage.modules()]
    assert not any(active)


def test_a_body_has_what_its_maps_need_and_no_more():
    trunk = swin.FAMILY.build(NARROW, out_features=["res3", "res4"])
    names = {key.split(".weight")[0] for key in trunk.state_dict()}
    assert {"norm1", "norm2"} <= names and not {"norm0", "norm3"} & names
    # Nobody reads what the last layer would merge for the next.
    assert "layers.1.downsample.norm" in names and "layers.2.downsample.norm" not in names
    assert not any(name.startswith("layers.3") for name in names)
    with pytest.raises(ValueError, match=r"no feature map 'p2'.*res5.*OUT_FEATURES"):
        swin.FAMILY.build(NARROW, out_features=["p2"])


# -- the hand-over ---------------------------------------------------------------------------------------------------


@pytest.fixture
def handover(narrow, classifier_cfg, tmp_path):
    """Paths of the hand-over and of the classifier's checkpoint that it was made from."""
    run = Run(*finalize(classifier_cfg(narrow, "MODEL.BACKBONE.NORM", "auto")))
    randomise(run.model, 0)
    write_checkpoint(tmp_path / "model.pth", run.checkpoint(0), iteration=0)
    convert(tmp_path / "model.pth", tmp_path / "backbone.pth")
    return tmp_path / "backbone.pth", tmp_path / "model.pth"


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_the_hand_over_arrives_and_the_detector_trains(narrow, handover, detector_cfg, detector):
    path, origin = handover
    cfg = detector_cfg(detector, narrow, "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.BACKBONE.DROP_PATH", 0.2)
    for reference in (None, origin):
        outcome = verify(path, cfg, reference)
        assert outcome.passed, outcome.text()
        assert set(outcome.differences["float64"]) == {"res5"}
    of_the_detector = ["norm1", "norm2"] if detector == "retinanet" else ["norm0", "norm1", "norm2"]
    assert set(outcome.report.new) == {f"{name}.{kind}" for name in of_the_detector for kind in ("weight", "bias")}
    model = build_model(cfg).train()
    with pytest.raises(ValueError, match=r"FREEZE_AT is 2, but 0 of 33 tensors.*first missing: patch_embed.proj"):
        one_training_forward(model)
    load_backbone(model, path, cfg)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    before = {name: tensor.clone() for name, tensor in model.backbone.bottom_up.state_dict().items()}
    sum(one_training_forward(model).values()).backward()
    optimizer.step()
    moved = {n for n, tensor in model.backbone.bottom_up.state_dict().items() if not torch.equal(tensor, before[n])}
    assert not any(name.startswith(("patch_embed", "layers.0")) for name in moved)
    assert {"norm1.weight", "norm3.weight", "layers.3.blocks.1.mlp.fc2.weight"} <= moved


def one_training_forward(detector):
    instances = Instances((70, 90))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0]])), torch.tensor([1])
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    with EventStorage():
        return detector([{"image": image, "instances": instances}])


class StockDetector(nn.Module):
    """No code of ours: detectron2's pyramid over detectron2's Swin."""

    def __init__(self):
        super().__init__()
        self.backbone = FPN(stock_swin(), ["p0", "p1", "p2", "p3"], 16, top_block=LastLevelMaxPool())


@pytest.mark.parametrize(("size", "same"), [(224, False), (448, True)])
def test_stock_swin_takes_it_and_shifts_the_last_map_at_224(narrow, handover, size, same):
    model = StockDetector().eval()
    DetectionCheckpointer(model).load(str(handover[0]))
    stock, weights = model.backbone.bottom_up, read_handover(handover[0]).weights
    lacking = {name for name in stock.state_dict() if name not in weights}
    assert all(name.startswith(("norm0", "norm1", "norm2")) or name.endswith("position_index") for name in lacking)
    assert all(torch.equal(stock.state_dict()[name], tensor) for name, tensor in weights.items())
    ours = make_trunk(Architecture(narrow, norm="LN"), out_features=FEATURES[1:]).eval()
    assert not ours.load_state_dict(weights, strict=False).unexpected_keys
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        maps, theirs = ours(x), stock(x)
    differences = [
        float((maps[f"res{i + 2}"] - theirs[f"p{i}"]).abs().max() / maps[f"res{i + 2}"].abs().max()) for i in range(4)
    ]
    assert max(differences[:3]) <= 1e-5
    assert differences[3] <= 1e-5 if same else differences[3] > 1e-4
