"""ViT: its papers' sizes, other libraries' layouts both ways, detectron2's own class on the same keys, detectors."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import timm
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import ViT, build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from imgcls.checkpoint import apply_key_rules, load_weights, write_checkpoint
from imgcls.engine import Run, finalize
from imgcls.modeling import Architecture, make_classifier, make_trunk, spec
from imgcls.modeling.backbones.vit import EXPORTS, FAMILY, VARIANTS, ViTSpec, attends_globally
from imgcls.structures import PreprocessingContract
from imgcls.transfer import body_of, convert, load_backbone, verify
from imgcls.transfer.parity import logits_difference, to_our_keys
from imgcls.transfer.references import build_reference

NEUTRAL = PreprocessingContract("RGB", (0.0,) * 3, (1.0,) * 3, 224, 256, "bilinear")
NARROW = {"width": 24, "depth": 8, "heads": 3, "size": 48}
TEN = ("MODEL.BACKBONE.NORM", "auto", "MODEL.HEAD.NUM_CLASSES", 10)
PYRAMID, RETINANET = FAMILY.pyramids
SIMPLE = {"retinanet": RETINANET, "faster_rcnn": PYRAMID, "mask_rcnn": PYRAMID}


@pytest.fixture
def narrow(monkeypatch):
    """Two made-up rows, "narrow" and "narrow_gap": eight blocks of width 24 for images of 48 pixels."""
    for name in ("narrow", "narrow_gap"):
        monkeypatch.setitem(FAMILY.variants, name, ViTSpec(16, average=name.endswith("gap"), **NARROW))
        monkeypatch.setitem(spec._FAMILY_OF, name, FAMILY)


@pytest.fixture
def cfg_of(detector_cfg):
    def make(detector, variant, *overrides):
        return detector_cfg(detector, variant, "MODEL.BACKBONE.NAME", SIMPLE[detector], *overrides)

    return make


@torch.no_grad()
def randomised(network):
    """Every parameter at random: initial zeros (positions, biases, torchvision's last layer) hide mistakes."""
    torch.manual_seed(3)
    for name, parameter in network.named_parameters():
        parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return network.double().eval()


def classifier_of(variant, mapped, **options):
    net = make_classifier(Architecture(variant, norm="LN", options=options), 10, NEUTRAL).double().eval()
    load_weights(net, mapped).require_complete("the reference", "")
    return net


# -- the papers' numbers ---------------------------------------------------------------------------------------------


def parameters(variant):
    with torch.device("meta"):
        net = make_classifier(Architecture(variant, norm="LN"), 1000, NEUTRAL)
    return sum(p.numel() for p in net.parameters())


def test_sizes_are_those_of_the_papers():
    # DeiT, table 1, in whole millions (cut off); Dosovitskiy et al., table 1, prints 307 for both L.
    for variant, millions in {"vit_ti_16": 5, "vit_s_16": 22, "vit_b_16": 86}.items():
        assert parameters(variant) // 10**6 == millions
    for variant in ("vit_l_16", "vit_l_32"):
        assert abs(parameters(variant) / 307e6 - 1) < 0.01
    # torchvision prints them to the digit.
    for variant in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32"):
        printed = torchvision.models.get_model_weights(variant).IMAGENET1K_V1.meta["num_params"]
        assert parameters(variant) == parameters(f"{variant}_gap") == printed


def test_every_row_is_there_in_both_forms():
    names = [
        f"vit_{size}_{patch}{form}" for form in ("", "_gap") for size in ("ti", "s", "b", "l") for patch in (16, 32)
    ]
    assert [name for name in VARIANTS if name.startswith("vit_")] == names
    for name in names:
        row = VARIANTS[name]
        assert (row.patch, row.average) == (int(name.split("_")[2]), name.endswith("gap"))


# -- other libraries -------------------------------------------------------------------------------------------------


def narrow_reference(library, average):
    if library == "torchvision":
        size = {"image_size": 48, "patch_size": 16, "num_layers": 8, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 96}
        return torchvision.models.VisionTransformer(**size, num_classes=10)
    if library == "huggingface":
        pytest.importorskip("transformers")
        sizes = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 3}
        options = {"model_type": "vit", "image_size": 48, "num_labels": 10, "layer_norm_eps": 1e-6, **sizes}
        return build_reference(library, "", options)
    return narrow_timm(average)


def narrow_timm(average, image_size=48):
    size = {"img_size": image_size, "embed_dim": 24, "depth": 8, "num_heads": 3, "num_classes": 10}
    return timm.models.VisionTransformer(**size, global_pool="avg" if average else "token")


def swapped(tensors):
    """The must-fail twin: queries and keys exchanged in one block."""
    key = next(name for name in tensors if name.endswith("blocks.2.attn.qkv.weight"))
    query, keys, values = tensors[key].chunk(3)
    return {**tensors, key: torch.cat([keys, query * 1.1, values])}


@pytest.mark.parametrize(
    ("library", "variant"),
    [
        ("torchvision", "narrow"),
        ("timm", "narrow"),
        ("timm", "narrow_gap"),
        ("mae", "narrow_gap"),
        ("huggingface", "narrow"),
    ],
)
def test_equals_other_libraries_whatever_the_tensors(narrow, library, variant):
    row = FAMILY.variants[variant]
    reference = randomised(narrow_reference(library, row.average))
    mapped = to_our_keys(apply_key_rules(reference.state_dict(), FAMILY.sources[library].rules_for(row)))
    x = torch.randn(2, 3, 48, 48).double()
    assert logits_difference(classifier_of(variant, mapped), reference, x) <= 1e-10
    assert logits_difference(classifier_of(variant, swapped(mapped)), reference, x) > 1e-6
    forgotten = {**mapped, "backbone.cls_token": torch.zeros(1, 1, 24)}
    assert logits_difference(classifier_of(variant, forgotten), reference, x) > 1e-6


def test_huggingfaces_files_have_other_names_than_its_modules(narrow, tmp_path):
    pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    reference = randomised(narrow_reference("huggingface", False))
    reference.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in tensors
    mapped = to_our_keys(apply_key_rules(tensors, FAMILY.sources["huggingface"].rules_for(VARIANTS["narrow"])))
    again = narrow_reference("huggingface", False)
    again.load_state_dict(tensors)
    x = torch.randn(1, 3, 48, 48).double()
    for network in (reference, again.double()):
        assert logits_difference(classifier_of("narrow", mapped), network, x) <= 1e-10


def test_published_torchvision_files_name_the_mlp_otherwise():
    rules = FAMILY.sources["torchvision"].rules_for(None)
    name = "encoder.layers.encoder_layer_3.mlp."
    given = {f"{name}{layer}.weight": torch.zeros(1) for layer in ("linear_1", "linear_2")}
    assert set(apply_key_rules(given, rules)) == {"blocks.3.mlp.fc1.weight", "blocks.3.mlp.fc2.weight"}


def test_an_mae_pretraining_brings_its_encoder(narrow):
    trunk = randomised(make_trunk(Architecture("narrow_gap", norm="LN")))
    encoder = {k: v.clone() for k, v in trunk.state_dict().items()}
    rest = ("norm.weight", "mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.bias")
    mae = {**encoder, **{name: torch.zeros(1) for name in rest}}
    mapped = apply_key_rules(mae, FAMILY.sources["mae"].rules_for(VARIANTS["narrow_gap"]))
    assert mapped.keys() == encoder.keys()
    assert all(mapped[name] is mae[name] for name in encoder)


@pytest.mark.parametrize("variant", ["narrow", "narrow_gap"])
@pytest.mark.parametrize("layout", ["timm", "mae"])
def test_a_classifier_goes_back_to_timm_and_mae(narrow, variant, layout):
    net = make_classifier(Architecture(variant, norm="LN"), 10, NEUTRAL)
    randomised(net)
    row = FAMILY.variants[variant]
    exported = apply_key_rules(net.state_dict(), EXPORTS[layout](row))
    theirs = narrow_timm(row.average).double().eval()
    theirs.load_state_dict(exported)
    assert logits_difference(net, theirs, torch.randn(2, 3, 48, 48).double()) <= 1e-10
    again = to_our_keys(apply_key_rules(exported, FAMILY.sources["timm"].rules_for(row)))
    assert again.keys() == net.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in net.state_dict().items())
    body = apply_key_rules(net.backbone.state_dict(), EXPORTS[layout](row))
    assert body.keys() == net.backbone.state_dict().keys()


def test_vitdets_layout_both_ways(narrow, cfg_of):
    net = make_classifier(Architecture("narrow", norm="LN"), 10, NEUTRAL)
    randomised(net)
    row = FAMILY.variants["narrow"]
    exported = apply_key_rules(net.state_dict(), EXPORTS["vitdet"](row))
    detector = build_model(cfg_of("faster_rcnn", "narrow", "MODEL.BACKBONE.REL_POS", True)).double()
    missing, unexpected = detector.load_state_dict(exported, strict=False)
    assert not unexpected
    assert {k for k in missing if ".net." in k} == {k for k in detector.state_dict() if "rel_pos" in k}
    back = apply_key_rules(detector.state_dict(), FAMILY.sources["vitdet"].rules_for(row))
    own = {name: tensor for name, tensor in net.backbone.state_dict().items() if name != "cls_token"}
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


# -- detectron2's class ----------------------------------------------------------------------------------------------


def stock_vit(eps=1e-6, **options):
    norm = partial(nn.LayerNorm, eps=eps)
    return ViT(embed_dim=24, depth=8, num_heads=3, pretrain_img_size=48, norm_layer=norm, **options).double().eval()


def narrow_body(**options):
    return randomised(FAMILY.build(FAMILY.variants["narrow"], for_detector=True, **options))


@pytest.mark.parametrize("size", [(48, 48), (64, 96), (75, 33)])
def test_stock_detectron2_takes_the_body_and_computes_the_same(narrow, size):
    body, stock = narrow_body(), stock_vit()
    stock.load_state_dict(body.state_dict())
    x = torch.randn(2, 3, *size).double()
    ours, theirs = body(x)["last_feat"], stock(x)["last_feat"]
    assert torch.equal(ours, theirs) and ours.shape == (2, 24, size[0] // 16, size[1] // 16)
    careless = stock_vit(eps=1e-5)
    careless.load_state_dict(body.state_dict())
    assert not torch.allclose(careless(x)["last_feat"], theirs, rtol=1e-7, atol=0)


def test_vitdets_attention_is_detectron2s_on_maps_larger_than_a_window(narrow):
    body = narrow_body(window_size=2, rel_pos=True)
    stock = stock_vit(window_size=2, window_block_indexes=(0, 2, 4, 6), use_rel_pos=True)
    stock.load_state_dict(body.state_dict())
    x = torch.randn(1, 3, 80, 48).double()
    assert torch.equal(body(x)["last_feat"], stock(x)["last_feat"])
    stock.blocks[2].window_size = 0
    assert (body(x)["last_feat"] - stock(x)["last_feat"]).abs().max() > 1e-4


def test_a_map_that_fits_into_a_window_is_seen_whole(narrow):
    windowed = narrow_body(window_size=2)
    whole, stock = stock_vit(), stock_vit(window_size=2, window_block_indexes=(0, 2, 4, 6))
    whole.load_state_dict(windowed.state_dict())
    stock.load_state_dict(windowed.state_dict())
    fits, larger = torch.randn(1, 3, 16, 32).double(), torch.randn(1, 3, 16, 48).double()
    assert torch.equal(windowed(fits)["last_feat"], whole(fits)["last_feat"])
    # detectron2 fills the window up with zeros, which softmax takes for keys.
    assert (stock(fits)["last_feat"] - whole(fits)["last_feat"]).abs().max() > 1e-4
    assert torch.equal(windowed(larger)["last_feat"], stock(larger)["last_feat"])


def test_windows_and_relative_positions_are_where_vitdet_has_them():
    # ViTDet-B and -L as in detectron2's projects/ViTDet: blocks without windows.
    assert [i for i in range(12) if attends_globally(i, 12)] == [2, 5, 8, 11]
    assert [i for i in range(24) if attends_globally(i, 24)] == [5, 11, 17, 23]
    with torch.device("meta"):
        body = FAMILY.build(VARIANTS["vit_b_16"], for_detector=True, window_size=14, rel_pos=True)
    assert [block.window_size for block in body.blocks] == [14, 14, 0] * 4
    assert tuple(body.pos_embed.shape) == (1, 197, 768)
    shapes = [tuple(block.attn.rel_pos_h.shape) for block in body.blocks]
    assert shapes == [(27, 64), (27, 64), (127, 64)] * 4


def test_positions_for_other_image_sizes_are_maes(narrow):
    """Against timm's network of the other size, with the positions resampled as MAE's fine-tuning does it."""
    reference = randomised(narrow_timm(False))
    rules = FAMILY.sources["timm"].rules_for(VARIANTS["narrow"])
    net = classifier_of("narrow", to_our_keys(apply_key_rules(reference.state_dict(), rules)))
    larger = narrow_timm(False, 80).double().eval()
    positions = reference.pos_embed.detach()
    grid = positions[:, 1:].reshape(1, 3, 3, 24).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False)
    resampled = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    larger.load_state_dict({**reference.state_dict(), "pos_embed": resampled})
    x = torch.randn(2, 3, 80, 80).double()
    assert logits_difference(net, larger, x) <= 1e-10
    own = timm.layers.resample_abs_pos_embed(positions, (5, 5))
    larger.load_state_dict({**reference.state_dict(), "pos_embed": own})
    assert logits_difference(net, larger, x) > 1e-6


# -- freezing, options, refusals -------------------------------------------------------------------------------------


def test_the_embeddings_freeze_together_and_relative_positions_never(narrow):
    trunk = make_trunk(Architecture("narrow", norm="LN", options={"rel_pos": True}), for_detector=True)
    trunk.freeze(2)
    frozen = {name for name, parameter in trunk.named_parameters() if not parameter.requires_grad}
    first = {n for n in trunk.state_dict() if n.startswith("blocks.0.") and "rel_pos" not in n}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", *first}
    classifier = make_trunk(Architecture("narrow", norm="LN")).freeze(1)
    frozen = {name for name, parameter in classifier.named_parameters() if not parameter.requires_grad}
    assert frozen == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_frozen_positions_that_do_not_arrive_are_an_error(narrow):
    trunk = make_trunk(Architecture("narrow", norm="LN"), for_detector=True).freeze(1).train()
    trunk.watch_arrival()
    tensors = trunk.state_dict()
    trunk.load_state_dict({k: v for k, v in tensors.items() if k != "pos_embed"}, strict=False)
    with pytest.raises(ValueError, match=r"2 of 3 tensors .* first missing: pos_embed"):
        trunk(torch.zeros(1, 3, 32, 32))
    trunk.load_state_dict(tensors)
    assert trunk(torch.zeros(1, 3, 32, 32))


def test_stochastic_depth_grows_linearly(narrow):
    blocks = FAMILY.build(FAMILY.variants["narrow"], drop_path=0.3).blocks
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx(
        [index * 0.3 / 7 for index in range(8)]
    )


def test_what_does_not_go_together_is_refused(narrow, classifier_cfg, cfg_of):
    for key, value in (("WINDOW_SIZE", 14), ("REL_POS", True)):
        cfg = classifier_cfg("narrow", *TEN, f"MODEL.BACKBONE.{key}", value)
        with pytest.raises(ValueError, match=rf"are for detectors.*{key} {value}"):
            build_model(cfg)
    cfg = classifier_cfg("narrow", *TEN, "MODEL.BACKBONE.PRETRAIN_SIZE", 8)
    with pytest.raises(ValueError, match=r"smaller than a patch: got 8.*PRETRAIN_SIZE"):
        build_model(cfg)
    cfg = cfg_of("retinanet", "narrow", "MODEL.FPN.IN_FEATURES", ["token"])
    with pytest.raises(ValueError, match=r"no feature map 'token'; allowed: last_feat"):
        build_model(cfg)
    cfg = cfg_of("retinanet", "resnet18", "MODEL.FPN.IN_FEATURES", ["res3"])
    with pytest.raises(ValueError, match=r"stride 16 or 32: got 'res3 of stride 8'.*FPN.IN_FEATURES"):
        build_model(cfg)


def test_without_timm_one_line_says_what_to_install(narrow, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.layers", None)
    with pytest.raises(ImportError, match=r"^detectron2's ViT needs timm.*pip install 'imgcls\[timm\]'[^\n]*$"):
        FAMILY.build(FAMILY.variants["narrow"])


# -- detectors -------------------------------------------------------------------------------------------------------


def one_step(detector, side=64):
    instances = Instances((side, side))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0]])), torch.tensor([1])
    instances.gt_masks = BitMasks(torch.ones(1, side, side, dtype=torch.bool))
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    with EventStorage():
        losses = detector.train()([{"image": image, "instances": instances}])
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("detector", SIMPLE)
@pytest.mark.parametrize("variant", ["narrow", "vit_ti_16"])
def test_detectors_train_on_the_simple_pyramid(narrow, cfg_of, detector, variant):
    torch.manual_seed(0)
    model = build_model(cfg_of(detector, variant))
    losses = one_step(model)
    assert all(torch.isfinite(value) for value in losses.values())
    for name, parameter in model.backbone.net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # In this class the position of the class token is never read.
        used = parameter.grad[:, 1:] if name == "pos_embed" else parameter.grad
        assert used.abs().max() > 0, name


@pytest.mark.parametrize(
    ("builder", "patch", "strides"),
    [
        (PYRAMID, 16, {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
        (PYRAMID, 32, {"p3": 8, "p4": 16, "p5": 32, "p6": 64}),
        (RETINANET, 16, {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
        (RETINANET, 32, {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
    ],
)
def test_levels_and_strides_of_the_simple_pyramid(narrow, plain_cfg, builder, patch, strides):
    plain_cfg.merge_from_list(["MODEL.BACKBONE.NAME", builder, "MODEL.BACKBONE.VARIANT", f"vit_ti_{patch}"])
    plain_cfg.merge_from_list(["MODEL.FPN.IN_FEATURES", ["res2", "res3"], "MODEL.FPN.OUT_CHANNELS", 8])
    backbone = build_backbone(plain_cfg, ShapeSpec(channels=3)).eval()
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == strides
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 128, 64))
    for name, stride in strides.items():
        assert tuple(maps[name].shape) == (1, 8, max(128 // stride, 1), max(64 // stride, 1)), name


def test_a_detector_pads_its_images_to_whole_patches(narrow, cfg_of):
    model = build_model(cfg_of("faster_rcnn", "narrow"))
    images = model.preprocess_image([{"image": torch.zeros(3, 75, 97)}])
    assert tuple(images.tensor.shape) == (1, 3, 96, 128)


@pytest.fixture
def handed_over(narrow, classifier_cfg, tmp_path):
    def make(variant, *overrides):
        run = Run(*finalize(classifier_cfg(variant, *TEN, *overrides)))
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in run.model.backbone.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        checkpoint, path = tmp_path / "classifier.pth", tmp_path / "backbone.pth"
        write_checkpoint(checkpoint, run.checkpoint(0), iteration=0)
        convert(checkpoint, path)
        trunk = {name: tensor for name, tensor in run.model.backbone.state_dict().items() if name != "cls_token"}
        return checkpoint, path, trunk

    return make


VITDET = ("MODEL.BACKBONE.WINDOW_SIZE", 14, "MODEL.BACKBONE.REL_POS", True)


@pytest.mark.parametrize(
    ("detector", "variant", "there", "here"),
    [
        ("retinanet", "narrow", (), ()),
        ("faster_rcnn", "narrow", (), ()),
        ("faster_rcnn", "narrow_gap", (), VITDET),
        ("mask_rcnn", "vit_ti_16", ("MODEL.BACKBONE.PRETRAIN_SIZE", 32), (*VITDET, "MODEL.BACKBONE.PRETRAIN_SIZE", 32)),
    ],
)
def test_a_hand_over_arrives_bit_for_bit(handed_over, cfg_of, detector, variant, there, here):
    checkpoint, path, trunk = handed_over(variant, *there)
    cfg = cfg_of(detector, variant, *here, "MODEL.BACKBONE.FREEZE_AT", 2)
    for reference in (None, checkpoint):
        cfg.MODEL.WEIGHTS = str(path)
        outcome = verify(path, cfg, reference)
        assert outcome.passed, outcome.text()
        assert set(outcome.report.loaded) == set(trunk)
        relative = [name for name in body_of(build_model(cfg)).state_dict() if "rel_pos" in name]
        assert sorted(outcome.report.new) == sorted(relative) and bool(relative) == bool(here)
        assert max(outcome.differences["float64"].values()) <= 1e-10
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(path))
    state = model.state_dict()
    assert all(torch.equal(state[f"backbone.net.{name}"], tensor) for name, tensor in trunk.items())
    assert one_step(model)
    other = build_model(cfg)
    load_backbone(other, path, cfg)
    assert all(torch.equal(body_of(other).state_dict()[name], tensor) for name, tensor in trunk.items())


def test_another_position_grid_or_a_lost_tensor_fails(handed_over, cfg_of):
    _, path, trunk = handed_over("narrow")
    cfg = cfg_of("retinanet", "narrow", "MODEL.BACKBONE.PRETRAIN_SIZE", 64, "MODEL.WEIGHTS", str(path))
    outcome = verify(path, cfg)
    assert not outcome.passed and "pos_embed" in outcome.text()
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(path))
    with pytest.raises(ValueError, match=rf"{len(trunk) - 1} of {len(trunk)} tensors.*pos_embed"):
        one_step(model)
    cfg.MODEL.BACKBONE.PRETRAIN_SIZE = 0
    content = torch.load(path, weights_only=True)
    content["model"]["blocks.1.attn.qkv.weight"] += 1e-3
    torch.save(content, path)
    assert "features of last_feat differ" in verify(path, cfg).text()


def test_a_bare_body_in_a_detector(handed_over, detector_cfg):
    _, path, trunk = handed_over("narrow")
    cfg = detector_cfg("retinanet", "narrow", "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.WEIGHTS = FAMILY.builder, str(path)
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES, cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = ["last_feat"], 16
    outcome = verify(path, cfg)
    assert outcome.passed and set(outcome.report.loaded) == set(trunk), outcome.text()
