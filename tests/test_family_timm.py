"""timm's networks as trunks: equal to timm's own maps, tensors named both ways, in classifiers and in detectors."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from dataclasses import dataclass
from functools import cache

import pytest
import timm
import torch
import yaml
from conftest import ROOT
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from imgcls.checkpoint import local_path, read_checkpoint, without_counters, write_checkpoint
from imgcls.engine import Run, TrainStep, finalize
from imgcls.modeling import Architecture, Trunk, family_of, make_trunk
from imgcls.modeling.backbones import timm_bridge
from imgcls.modeling.backbones.timm_bridge import map_name, timm_family, timm_keys
from imgcls.solver import build_optimizer, build_schedule
from imgcls.structures import Batch, PreprocessingContract
from imgcls.transfer import convert, import_weights, read_handover, verify
from imgcls.transfer.detector_config import detector_yaml
from imgcls.transfer.examine import CONTRACT, in_detectors, plain
from imgcls.transfer.parity import maps_difference, maps_reference, measure_parity, randomise, trunk_of
from imgcls.transfer.path_handlers import LibraryPathHandler

SIDE = 128
SWIN = "swin_tiny_patch4_window7_224"
FIVE, FOUR, BODY = ["stem", "res2", "res3", "res4", "res5"], ["res2", "res3", "res4", "res5"], ["body"]

# The smallest of their kinds: the trunk's stages, its maps, and what of timm's network stands behind the last map.
NETWORKS = {
    "resnet10t": (FIVE, FIVE, {"fc"}),
    "mobilenetv3_small_050": (BODY, FIVE, {"conv_head", "classifier"}),
    "convnext_atto": (FOUR, FOUR, {"head"}),
    SWIN: (FOUR, FOUR, {"norm", "head"}),
    "vit_tiny_patch16_224": (BODY, ["res4"], {"norm", "head"}),
    "hrnet_w18_small": (BODY, FIVE, {"downsamp_modules", "final_layer", "classifier"}),
    "efficientnet_b0": (BODY, FIVE, {"conv_head", "bn2", "classifier"}),
    "regnetx_002": (FIVE, FIVE, {"head"}),
    "nf_regnet_b0": (FIVE, FIVE, {"head"}),
    "dla46_c": (FIVE, FIVE, {"fc"}),
    "mambaout_femto": (FOUR, FOUR, {"head"}),
    # Modules that hand on lists; two maps of stride at most 2; maps that timm takes with hooks.
    "selecsls42": (BODY, FIVE, {"head", "fc"}),
    "darknet17": (FIVE, FIVE, {"head"}),
    "legacy_xception": (BODY, FIVE, {"fc"}),
}
DETECTOR = ("tools/make_detector_config.py", "--detector", "retinanet")
STRIDES = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}


@dataclass
class Pair:
    """A network of timm's with random weights, timm's own network of its maps, and our trunk."""

    variant: str
    tensors: dict[str, torch.Tensor]
    reference: nn.Module
    trunk: Trunk

    @property
    def row(self):
        return family_of(self.variant).variants[self.variant]

    def reference_maps(self, x):
        with torch.no_grad():
            return dict(zip((name for name, _, _ in self.row.maps), self.reference(x), strict=True))


@cache
def pair(name: str) -> Pair:
    variant = f"timm:{name}"
    torch.manual_seed(1)
    whole = timm.create_model(name)
    randomise(whole, 1)
    tensors = whole.state_dict()
    trunk = trunk_of(variant, family_of(variant).sources["timm"], tensors)
    return Pair(variant, tensors, maps_reference(variant, "timm", tensors), trunk)


def images(count=2, side=SIDE, channels=3):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(side))


def keys_of(contract):
    """The input keys of a detector's config."""
    return ("MODEL.PIXEL_MEAN", list(contract.pixel_mean), "MODEL.PIXEL_STD", list(contract.pixel_std))


def batch_norms(network):
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


# -- equal to timm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_timms_own_to_the_last_bit(name):
    found = pair(name)
    theirs = found.reference_maps(images())
    with torch.no_grad():
        ours = found.trunk(images())
    assert list(ours) == NETWORKS[name][1]
    for own, value in ours.items():
        assert torch.equal(value, theirs[own]), own
        assert value.shape[1] == found.trunk.output_shape()[own].channels
        # legacy_xception does not pad its first two convolutions.
        assert abs(value.shape[2] - SIDE // STRIDES[own]) <= (3 if name == "legacy_xception" else 0)
        assert (value[0] - value[1]).abs().max() > 1e-3 * value.abs().max()


def test_the_reference_holds_the_weights_that_timm_was_given():
    """timm's own loading, not ours, has filled the reference; a network of other weights has other maps."""
    found = pair("resnet10t")
    assert torch.equal(found.reference.state_dict()["layer2.0.conv1.weight"], found.tensors["layer2.0.conv1.weight"])
    other = timm.create_model("resnet10t", features_only=True).eval()
    assert max(maps_difference(found.trunk, other, images()).values()) > 1e-2


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_twin_one_wrong_tensor_is_seen(name):
    found = pair(name)
    key = next(key for key, value in found.tensors.items() if value.dim() == 4)
    wrong = {**found.tensors, key: found.tensors[key].flip(1)}
    trunk = trunk_of(found.variant, family_of(found.variant).sources["timm"], wrong)
    assert max(maps_difference(trunk, found.reference, images()).values()) > 1e-3
    with pytest.raises(ValueError, match=r"1 missing: "):
        trunk_of(found.variant, family_of(found.variant).sources["timm"], {k: v for k, v in wrong.items() if k != key})


def test_parity_is_measured_in_both_precisions_at_the_networks_own_size():
    found = measure_parity("timm:vit_tiny_patch16_224", "timm")
    assert found.equal and set(found.differences) == {"float32 224x224", "float64 224x224"}
    assert set(found.differences.values()) == {0.0}


@pytest.mark.parametrize("name", ["dla46_c", "hrnet_w18_small", SWIN, "darknet17"])
def test_a_map_asked_for_alone_is_the_same_map(name):
    """dla46_c's maps are timm's numbers 1 to 5: asking for the first three is not asking for 0 to 2."""
    found = pair(name)
    trunk = make_trunk(Architecture(found.variant), out_features=["res3"])
    trunk.load_state_dict({key: found.trunk.state_dict()[key] for key in trunk.state_dict()})
    assert torch.equal(trunk.eval()(images())["res3"], found.reference_maps(images())["res3"])


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_has_its_name_in_timm(name):
    found = pair(name)
    own = found.trunk.state_dict()
    back = timm_keys(own, found.variant)
    assert len(back) == len(own) and all(torch.equal(found.tensors[key], value) for key, value in back.items())
    behind = {key: value for key, value in found.tensors.items() if key not in back}
    assert {key.split(".")[0] for key in behind} == NETWORKS[name][2]
    again = timm.create_model(name)
    again.load_state_dict({**behind, **back}, strict=True)
    assert all(torch.equal(value, found.tensors[key]) for key, value in again.state_dict().items())


def test_twin_a_tensor_too_many_has_no_name():
    found = pair("resnet10t")
    with pytest.raises(KeyError, match=r"stem\.conv9"):
        timm_keys({**found.trunk.state_dict(), "stem.conv9": torch.ones(1)}, found.variant)


@pytest.mark.parametrize(("stride", "name"), [(1, "stem"), (2, "stem"), (4, "res2"), (32, "res5"), (64, "res6")])
def test_maps_are_named_by_their_strides(stride, name):
    assert map_name(stride) == name and map_name(14) == "stride14"


# -- freezing and norms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_stages_do_not_learn_and_their_statistics_stand(name):
    trunk = make_trunk(Architecture(f"timm:{name}"), out_features=NETWORKS[name][1])
    stages = trunk.stage_modules()
    assert [stage for stage, _ in stages] == NETWORKS[name][0]
    count = min(2, len(stages))
    trunk.freeze(count).train()
    frozen = {f"{stage}.{key}" for stage, module in stages[:count] for key in module.state_dict()}
    assert frozen == {key for key in trunk.state_dict() if key.split(".")[0] in NETWORKS[name][0][:count]}
    assert all(parameter.requires_grad != (key in frozen) for key, parameter in trunk.named_parameters())
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    trunk(images(side=64))
    moved = {key for key, value in trunk.state_dict().items() if not torch.equal(value, before[key])}
    assert not moved & frozen
    assert bool(moved) == bool(len(stages) > 2 and batch_norms(trunk))
    with pytest.raises(ValueError, match=rf"cannot freeze 6 stages.*0 to {len(stages)}; change MODEL.BACKBONE.FREEZE_"):
        trunk.freeze(6)


# legacy_xception: hooks sit on modules beside the replaced ones. Swin has no BatchNorm.
@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_b0", "dla46_c", "legacy_xception", SWIN])
def test_frozen_batch_norms_keep_statistics_epsilon_and_activation(name):
    found = pair(name)
    trunk = make_trunk(Architecture(found.variant, norm="FrozenBN"), out_features=NETWORKS[name][1])
    assert not batch_norms(trunk)
    trunk.load_state_dict(without_counters(found.trunk.state_dict()))
    # In training: nothing takes the batch's own statistics, and no path is dropped unasked.
    difference = maps_difference(trunk.train(), found.reference, images())
    assert max(difference.values()) <= 1e-5
    if batch_norms(found.trunk):
        learning = copy.deepcopy(found.trunk).train()
        assert max(maps_difference(learning, found.reference, images()).values()) > 1e-2


@pytest.mark.parametrize("norm", ["GN", "naiveSyncBN"])
def test_a_norm_that_timm_has_not_is_refused(norm):
    with pytest.raises(ValueError, match=rf"cannot become this: got '{norm}'; allowed: auto, BN, FrozenBN, .*NORM"):
        make_trunk(Architecture("timm:resnet10t", norm=norm))


def test_drop_path_is_what_was_said_and_nothing_when_nothing_was():
    """timm's Swin drops paths unless told not to."""
    name, kind = f"timm:{SWIN}", timm.layers.DropPath
    trunks = [make_trunk(Architecture(name), drop_path=probability) for probability in (0.0, 0.3)]
    rates = [[module.drop_prob for module in trunk.modules() if isinstance(module, kind)] for trunk in trunks]
    assert not any(rates[0]) and max(rates[1]) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"dla46_c has no stochastic depth: got 0\.3; allowed: 0\.0"):
        make_trunk(Architecture("timm:dla46_c"), drop_path=0.3)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_near_ones(tool, tmp_path):
    with pytest.raises(ValueError, match=r"no network 'vit_tiney_patch16_224'; near: vit_tiny_patch16_224, "):
        family_of("timm:vit_tiney_patch16_224")
    done = tool(*DETECTOR, "--variant", "timm:qqqq", "--output", tmp_path / "x.yaml")
    assert done.returncode == 2 and "has no network 'qqqq'; near: none" in done.stderr
    with pytest.raises(ValueError, match=r"Invalid pretrained tag \(nobody\)"):
        family_of("timm:resnet10t.nobody")


def test_a_network_that_is_not_to_be_cut_up_says_why(monkeypatch):
    def no_maps(name, **options):
        raise RuntimeError("features_only not implemented for Vision Transformer models.\nsecond line")

    monkeypatch.setattr(timm_bridge, "_create", no_maps)
    timm_family.cache_clear()
    with pytest.raises(
        ValueError, match=r"timm's resnet14t offers no feature maps: features_only not .* models\.: got"
    ):
        family_of("timm:resnet14t")


def test_without_timm_one_line_says_what_to_install(monkeypatch, tool, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    timm_family.cache_clear()
    with pytest.raises(ImportError, match=r"^networks named timm:… need timm.*pip install 'imgcls\[timm\]'[^\n]*$"):
        family_of("timm:resnet10t")
    done = tool(*DETECTOR, "--variant", "timm:resnet10t", "--output", tmp_path / "x.yaml")
    assert done.returncode == 2 and done.stderr.startswith("error: networks named timm:")
    assert done.stderr.count("\n") == 1


def test_a_network_of_one_image_size_says_so():
    trunk = make_trunk(Architecture("timm:coat_lite_tiny")).eval()
    assert trunk(images(1, 224))["res5"].shape[-1] == 7
    with pytest.raises(ValueError, match=r"coat_lite_tiny failed on an image of 128x128; timm made it for 224x224"):
        trunk(images(1))


def test_a_map_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 has no feature map 'res2'; allowed: res4; change"):
        make_trunk(Architecture("timm:vit_tiny_patch16_224"), out_features=["res2"])


# -- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0"])
def test_a_new_head_trains_a_step(classifier_cfg, name):
    cfg = classifier_cfg(f"timm:{name}", "MODEL.HEAD.NUM_CLASSES", 4, "MODEL.BACKBONE.NORM", "auto")
    assert cfg.MODEL.BACKBONE.NAME == "build_imgcls_timm_backbone"
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    step = TrainStep.from_cfg(cfg, model, optimizer, build_schedule(cfg, optimizer))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pixels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    losses = step(Batch(pixels, torch.arange(8) % 4, torch.arange(8)), 0)
    assert all(torch.isfinite(value) for value in losses.values())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert "head.fc.weight" in moved and any(key.startswith("backbone.") for key in moved)


@pytest.mark.parametrize("name", ["resnet10t", "nf_regnet_b0"])
def test_recomputed_maps_have_the_same_gradients(name):
    """timm's activations work in place: what a stage reads must not have been changed when it is read again."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trunk = make_trunk(Architecture(f"timm:{name}"), out_features=FIVE).train()
        randomise(trunk, 0)
        trunk.checkpointing = checkpointing
        sum(value.square().mean() for value in trunk(images(side=64)).values()).backward()
        found.append([parameter.grad for parameter in trunk.parameters()] + list(trunk.buffers()))
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_another_familys_builder_is_refused(classifier_cfg):
    cfg = classifier_cfg("timm:resnet10t", "MODEL.BACKBONE.NAME", "build_imgcls_resnet_backbone")
    with pytest.raises(ValueError, match=r"got 'timm:resnet10t'.*MODEL.BACKBONE.NAME build_imgcls_timm_backbone"):
        build_model(cfg)


# -- detectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arrived"), [("resnet10t", "70 of 70"), ("vit_tiny_patch16_224", "148 of 148")])
def test_it_arrives_in_a_retinanet_which_then_learns(name, arrived):
    """The cut-up network under an FPN; the ViT, with one map, under the simple pyramid."""
    found = in_detectors(f"timm:{name}", ["retinanet"])["retinanet"]
    assert (
        found["problems"] == []
        and found["arrived"] == arrived
        and set(found["differences"])
        == {
            "float32",
            "float64",
        }
    )


def test_a_trained_checkpoint_is_converted_and_verified(classifier_cfg, detector_cfg, tmp_path):
    name = "timm:mobilenetv3_small_050"
    run = Run(*finalize(classifier_cfg(name)))
    randomise(run.model, 2)
    write_checkpoint(tmp_path / "model.pth", run.checkpoint(0))
    handover = convert(tmp_path / "model.pth", tmp_path / "backbone.pth")
    assert handover.architecture.variant == name and all(key.startswith("body.") for key in handover.weights)
    cfg = detector_cfg("retinanet", name, *keys_of(handover.contract), "MODEL.WEIGHTS", str(tmp_path / "backbone.pth"))
    outcome = verify(tmp_path / "backbone.pth", cfg, tmp_path / "model.pth")
    assert outcome.problems == [] and len(outcome.report.loaded) == len(handover.weights)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    with pytest.raises(ValueError, match=r"cannot freeze 2 stages of timm:mobilenetv3_small_050; allowed: 0 to 1"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("variant", "frozen", "pyramid"),
    [
        ("timm:mobilenetv3_small_050", 0, "build_imgcls_retinanet_fpn_backbone"),
        ("timm:vit_tiny_patch16_224", 0, "build_imgcls_retinanet_simple_fpn_backbone"),
        ("timm:resnet10t", 2, "build_imgcls_retinanet_fpn_backbone"),
        ("mobilenet_v1_0.25", 2, "build_imgcls_retinanet_fpn_backbone"),
    ],
)
def test_a_detectors_config_freezes_no_more_stages_than_there_are(tool, tmp_path, variant, frozen, pyramid):
    """A body is one stage: the stock FREEZE_AT 2 is not possible there, and 1 would freeze the whole network."""
    written = yaml.safe_load(detector_yaml("retinanet", plain(variant), CONTRACT, "somewhere.pth"))
    backbone = written["MODEL"]["BACKBONE"]
    assert backbone.get("FREEZE_AT", 2) == frozen and backbone["NAME"] == pyramid
    done = tool(*DETECTOR, "--variant", variant, "--output", tmp_path / "detector.yaml")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "detector.yaml").read_text())["MODEL"]["BACKBONE"]["VARIANT"] == variant


def test_the_simple_pyramid_over_stride_32_begins_at_p3():
    assert family_of("timm:mixer_s32_224").variants["timm:mixer_s32_224"].finest_level == 3
    assert pair("vit_tiny_patch16_224").row.finest_level == 2 and not pair("resnet10t").row.single_map


# -- import ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "mobilenetv3.pth"
    torch.save(pair("mobilenetv3_small_050").tensors, path)
    return path


def test_a_file_is_imported_and_the_report_says_what_stands_behind(tool, file, tmp_path):
    words = ("--from", "timm", "--variant", "timm:mobilenetv3_small_050", file, "--output", tmp_path / "b.pth")
    done = tool("tools/import_weights.py", *words)
    assert done.returncode == 0, done.stderr
    behind = "conv_head.weight, conv_head.bias, classifier.weight, classifier.bias"
    assert f"206 tensors mapped, 4 of the file stand behind the last map and have no place: {behind}" in done.stdout
    assert "maps: largest difference to the library's own network 0.0e+00 (relative)" in done.stdout
    handover = read_handover(tmp_path / "b.pth")
    assert handover.intact and not handover.classifier and handover.contract.interpolation == "bicubic"
    assert yaml.safe_load((tmp_path / "b.yaml").read_text())["MODEL"]["BACKBONE"]["FREEZE_AT"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.0.conv_pw.weight"), "1 missing: backbone.body.blocks.1.0.conv_pw.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "1 unexpected: backbone.extra"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(file, tmp_path, change, message):
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=message):
        import_weights("timm", "timm:mobilenetv3_small_050", tmp_path / "changed.pth")


@pytest.fixture
def published(monkeypatch, tmp_path):
    """timm's weights without a network: what it would fetch is what it was asked for with random weights."""
    create = timm.create_model

    def fetched(name, pretrained=False, **options):
        model = create(name, pretrained=pretrained and bool(options), **options)
        if pretrained and not options:
            model.load_state_dict(pair(name.partition(".")[0]).tensors)
        return model

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(timm, "create_model", fetched)


def test_any_name_of_timm_can_be_fetched(published, detector_cfg):
    address = "timm://mobilenetv3_small_050/lamb_in1k"
    content = read_checkpoint(address)
    assert content["imgcls"]["architecture"]["variant"] == "timm:mobilenetv3_small_050"
    assert local_path(address).name == "timm_mobilenetv3_small_050-lamb_in1k.pth"
    fits = keys_of(PreprocessingContract.from_dict(content["imgcls"]["contract"]))
    model = build_model(detector_cfg("retinanet", "timm:mobilenetv3_small_050", *fits, "MODEL.WEIGHTS", address))
    DetectionCheckpointer(model).load(address)
    own = model.backbone.bottom_up.body.conv_stem.weight
    assert torch.equal(own, pair("mobilenetv3_small_050").tensors["conv_stem.weight"])


def test_names_of_our_own_families_come_first():
    handler = LibraryPathHandler("timm")
    assert handler._variant("resnet18", "timm://resnet18") == "resnet18"
    assert handler._variant("resnet10t", "timm://resnet10t") == "timm:resnet10t"
    with pytest.raises(ValueError, match="no network 'resnet5000'; near: "):
        handler._variant("resnet5000", "timm://resnet5000")
    with pytest.raises(ValueError, match="no network of ours takes its weights from torchvision's: got 'resnet10t'"):
        LibraryPathHandler("torchvision")._variant("resnet10t", "torchvision://resnet10t")


# -- the campaign ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def campaign():
    spec = importlib.util.spec_from_file_location("timm_campaign", ROOT / "scripts/timm_campaign.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record():
    return json.loads((ROOT / "docs/data/timm.json").read_text())


def test_the_record_is_of_todays_bridge_and_counts_every_network(campaign, record):
    assert record["digest"] == campaign.digest(), "run scripts/timm_campaign.py again"
    done, remaining = set(record["networks"]), set(record["remaining"])
    assert not done & remaining and len(done) == record["covered"] and len(done | remaining) == record["listed"]
    if timm.__version__ == record["timm"]:
        assert done | remaining == set(timm.list_models())


def test_the_page_says_what_the_record_says(record):
    found = list(record["networks"].values())
    page = " ".join((ROOT / "docs/timm.md").read_text(encoding="utf-8").split())
    assert f"{len(found)} of {record['listed']} networks of timm {record['timm']}" in page
    assert f"maps of {sum('difference' in one for one in found)} were compared" in page
    assert f"{sum('one size' in one for one in found)} of these take images of one size only" in page


def test_no_recorded_network_has_a_problem(record):
    networks = record["networks"]
    assert [name for name, found in networks.items() if "problem" in found] == []
    compared = [found["difference"] for found in networks.values() if "difference" in found]
    assert len(compared) > 100 and max(compared) <= 1e-5
    assert all("no maps" in found or found["tensors"] > 0 for found in networks.values())


def test_the_campaign_tells_a_fault_and_goes_on_where_it_was(campaign, tmp_path, monkeypatch):
    found = campaign.try_network("resnet10t", 25e6)
    assert found["difference"] == 0.0 and found["behind the last map"] == 2 and "problem" not in found
    assert campaign.try_network("resnet10t", 1e6)["compared"] == "not: more than 1 M parameters"
    monkeypatch.setattr(campaign, "maps_difference", lambda *_: {"res5": 1e-3})
    assert campaign.try_network("resnet10t", 25e6)["problem"] == "the maps differ by 1.0e-03"
    campaign.write(tmp_path / "t.json", {"resnet10t": found}, ["resnet10t", "resnet14t"], 25e6)
    assert campaign.read(tmp_path / "t.json") == {"resnet10t": found}
    monkeypatch.setattr(campaign, "digest", lambda: "another")
    assert campaign.read(tmp_path / "t.json") == {}


def test_the_campaign_takes_small_networks_of_every_module_first(campaign):
    names = ["vit_base_patch16_224", "resnet50", "vit_tiny_patch16_224", "resnet10t"]
    assert campaign.in_turn(names) == ["vit_tiny_patch16_224", "resnet10t", "vit_base_patch16_224", "resnet50"]
