"""Weights from elsewhere: key rules, libraries, files, names that fetch, and what is refused."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

import imgcls
from imgcls.checkpoint import apply_key_rules, read_checkpoint
from imgcls.data.imagenet import imagenet_classes
from imgcls.modeling import family_of, fit_channels
from imgcls.modeling.backbones import timm_bridge
from imgcls.structures import KeyRule
from imgcls.transfer import import_weights, read_handover, write_import
from imgcls.transfer.import_weights import for_channels
from imgcls.transfer.parity import randomise
from imgcls.transfer.pretrained import download, stated_preprocessing

SMALL = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(3)
    net = torchvision.models.get_model(SMALL, weights=None)
    randomise(net, 3)
    return net.eval()


@pytest.fixture(scope="module")
def theirs(reference, tmp_path_factory):
    """A file as torchvision publishes them: digest in its name."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(reference.state_dict(), folder / "plain.pth")
    digest = hashlib.sha256((folder / "plain.pth").read_bytes()).hexdigest()[:8]
    return shutil.copy(folder / "plain.pth", folder / f"{SMALL}-{digest}.pth")


# -- key rules -------------------------------------------------------------------------------------------------------


def test_rules_apply_in_order_and_join_parts():
    tensors = {
        "a.q": torch.ones(2, 3),
        "a.v": 3 * torch.ones(2, 3),
        "a.k": 2 * torch.ones(2, 3),
        "old.b": torch.ones(4, 5),
    }
    rules = [
        KeyRule(r"^old\.", "new."),
        KeyRule(r"\.q$", ".qkv", part=(0, 3)),
        KeyRule(r"\.k$", ".qkv", part=(1, 3)),
        KeyRule(r"\.v$", ".qkv", part=(2, 3)),
        KeyRule(r"^new\.b$", "new.c", change="to_conv"),
    ]
    found = apply_key_rules(tensors, rules)
    assert found["a.qkv"][:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert found["new.c"].shape == (4, 5, 1, 1) and set(found) == {"a.qkv", "new.c"}


def test_rules_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match=r"y and x would both become z"):
        apply_key_rules({"x": torch.ones(1), "y": torch.ones(1)}, [KeyRule("^[xy]$", "z")])
    with pytest.raises(ValueError, match=r"qkv is made of 3 tensors; number 1, 2 is missing"):
        apply_key_rules({"q": torch.ones(1)}, [KeyRule("^q$", "qkv", part=(0, 3))])
    assert apply_key_rules({"x": torch.ones(1)}, [KeyRule("^x$", change="drop")]) == {}


# -- importing -------------------------------------------------------------------------------------------------------


def test_a_file_becomes_a_hand_over_with_its_head(theirs, reference, tmp_path, detector_cfg):
    imported = import_weights("torchvision", SMALL, theirs)
    assert imported.difference == 0.0 and not imported.report.missing and not imported.report.unexpected
    write_import(imported, tmp_path / "backbone.pth")
    handover = read_handover(tmp_path / "backbone.pth")
    assert handover.intact and handover.classes == imagenet_classes() and "head.fc.weight" in handover.classifier
    assert handover.contract.pixel_mean == (123.675, 116.28, 103.53) and handover.contract.interpolation == "bilinear"
    model = build_model(detector_cfg("retinanet", SMALL))
    DetectionCheckpointer(model).load(str(tmp_path / "backbone.pth"))
    theirs_conv = reference.state_dict()["conv1.0.weight"]
    assert torch.equal(model.backbone.bottom_up.state_dict()["stem.conv1.weight"], theirs_conv)


def test_the_command_says_what_it_did(tool, theirs, tmp_path):
    words = ("--from", "torchvision", "--variant", SMALL, theirs, "--output", tmp_path / "b.pth")
    done = tool("tools/import_weights.py", *words)
    assert done.returncode == 0, done.stderr
    assert "none left over on either side" in done.stdout
    assert "largest difference to the library's own network 0.0e+00" in done.stdout
    assert f"VARIANT: {SMALL}" in (tmp_path / "b.yaml").read_text()
    again = tool("tools/import_weights.py", *words)
    assert again.returncode == 2 and "exists; choose another --output" in again.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("stage2.0.branch2.0.weight"), r"1 missing: backbone.res3"),
        (lambda t: t.update(extra=torch.ones(2)), r"1 unexpected: backbone.extra"),
        (lambda t: t.update({"fc.weight": torch.ones(10, 7), "fc.bias": torch.ones(10)}), r"head.fc.weight \[10, 7\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_tensor(theirs, tmp_path, change, message):
    tensors = torch.load(theirs, weights_only=True)
    change(tensors)
    torch.save(tensors, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=message):
        import_weights("torchvision", SMALL, tmp_path / "changed.pth")


def test_weights_of_another_network_are_refused_naming_tensors(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"missing: .*res2.2.conv1.weight.*torchvision's resnet34"):
        import_weights("torchvision", "resnet34", tmp_path / "r18.pth")


@pytest.mark.parametrize("known", [True, False])
def test_weights_that_mean_something_else_there_are_refused(tmp_path, tool, monkeypatch, known):
    """timm builds this network with another epsilon when it loads trained weights; every tensor fits all the same."""
    timm = pytest.importorskip("timm")
    if not known:
        monkeypatch.setattr(timm_bridge, "TRAINED_WITH", {})
    torch.manual_seed(0)
    net = timm.create_model("fbnetc_100")
    randomise(net, 0)
    torch.save(net.state_dict(), tmp_path / "fbnetc.pth")
    words = ("--from", "timm", "--variant", "timm:fbnetc_100", tmp_path / "fbnetc.pth")
    done = tool("tools/import_weights.py", *words, "--output", tmp_path / "b.pth")
    assert (tmp_path / "b.pth").exists() == known
    if known:
        assert "largest difference to the library's own network 0.0e+00" in done.stdout
    else:
        assert done.returncode == 2 and "gives other maps than timm's own network" in done.stderr


def test_a_trunk_alone_is_taken_and_said(theirs, tmp_path):
    tensors = {name: value for name, value in torch.load(theirs, weights_only=True).items() if "fc" not in name}
    tensors = {name: value for name, value in tensors.items() if not name.startswith("conv5")}
    torch.save(tensors, tmp_path / "trunk.pth")
    imported = import_weights("torchvision", SMALL, tmp_path / "trunk.pth")
    assert imported.difference is None and imported.why_not == "the file holds no head"
    assert imported.handover.classifier == {} and imported.handover.classes == ()
    assert all(name.startswith("head.") for name in imported.report.new)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--from", "keras", "--variant", "resnet50"),
            "takes no weights from there: got 'keras'; allowed: torchvision",
        ),
        (("--from", "torchvision", "--variant", "resnet5"), "no such network: got 'resnet5'; allowed: did you mean"),
        (("--from", "torchvision", "--variant", "darknet19"), "none: this network has no counterpart elsewhere"),
        (("--from", "torchvision", "--variant", "resnet50", "nowhere.pth"), "there is no file nowhere.pth"),
        (("--from", "torchvision", "--variant", "resnet50", "--tag", "V9"), "got 'V9'; allowed: IMAGENET1K_V1"),
        (("--from", "mae", "--variant", "vit_b_16_gap"), "mae offers no weights to fetch"),
    ],
)
def test_mistakes_are_one_line(tool, tmp_path, words, message):
    done = tool("tools/import_weights.py", *words, "--output", tmp_path / "b.pth")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# -- channels --------------------------------------------------------------------------------------------------------


def test_the_first_convolution_fits_other_channels():
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    grey = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    conv = nn.functional.conv2d
    three = conv(grey.expand(1, 3, 8, 8), weight)
    assert torch.allclose(conv(grey, fit_channels(weight, 1)), three)
    assert fit_channels(weight, 3) is weight
    five = fit_channels(weight, 5)
    assert five.shape == (4, 5, 3, 3) and torch.allclose(five[:, 3], weight[:, 0] * 3 / 5)
    assert torch.allclose(conv(grey.expand(1, 6, 8, 8), fit_channels(weight, 6)), three)


def test_import_for_grey_images_and_training_on_them(theirs, tmp_path, classifier_cfg):
    from imgcls.engine import Run, finalize

    imported = import_weights("torchvision", SMALL, theirs, in_channels=1)
    assert imported.handover.weights["stem.conv1.weight"].shape[1] == 1
    assert imported.handover.contract == for_channels(imported.handover.contract, 1)
    full = import_weights("torchvision", SMALL, theirs)
    write_import(full, tmp_path / "rgb.pth")
    cfg = classifier_cfg(SMALL, "MODEL.PIXEL_MEAN", [120.0], "MODEL.PIXEL_STD", [60.0], "MODEL.HEAD.RESET", True)
    run = Run(*finalize(cfg))
    report = run.load_initial(str(tmp_path / "rgb.pth"))
    assert not report.wrong_shape
    rgb = full.handover.weights["stem.conv1.weight"]
    assert torch.equal(run.model.backbone.stem.conv1.weight, rgb.sum(dim=1, keepdim=True))


# -- names that fetch ------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch, theirs, tmp_path):
    """torchvision's weights at a file: address, as the only place that can be reached."""
    enum = torchvision.models.get_model_weights(SMALL)
    weights = enum.DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(type(weights), "url", property(lambda self: f"file://{theirs}"))
    return theirs


def test_a_name_starts_a_classifier_and_a_detector(published, classifier_cfg, detector_cfg, tmp_path):
    from imgcls.engine import Run, finalize

    name = f"torchvision://{SMALL}/IMAGENET1K_V1"
    run = Run(*finalize(classifier_cfg(SMALL, "MODEL.HEAD.RESET", True)))
    report = run.load_initial(name)
    expected = torch.load(published, weights_only=True)["conv1.0.weight"]
    assert len(report.loaded) > 100 and torch.equal(run.model.backbone.stem.conv1.weight, expected)
    cfg = detector_cfg("retinanet", SMALL, "MODEL.WEIGHTS", name)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(name)
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, expected)
    assert len(list((tmp_path / "cache").rglob("*.pth"))) == 1


def test_a_detector_that_contradicts_the_name_is_refused(published, detector_cfg):
    cfg = detector_cfg("retinanet", SMALL, "MODEL.WEIGHTS", f"torchvision://{SMALL}", "INPUT.FORMAT", "BGR")
    with pytest.raises(ValueError, match=r"INPUT.FORMAT is 'BGR' in the config, the weights need 'RGB'"):
        build_model(cfg)


def test_a_damaged_download_is_refused(published, tmp_path, monkeypatch):
    local = download(f"file://{published}")
    local.write_bytes(local.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is damaged: its SHA-256 begins with"):
        download(f"file://{published}")


def test_without_a_network_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot fetch file:///nowhere/x-01234567.pth.*put the file at"):
        download("file:///nowhere/x-01234567.pth")
    assert not list(tmp_path.rglob("*.pth"))
    with pytest.raises(ValueError, match="does not carry its digest"):
        download("https://example.org/resnet.pth")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no network of ours takes its weights from torchvision's: got 'lenet'"):
        read_checkpoint("torchvision://lenet")


# -- preprocessing ---------------------------------------------------------------------------------------------------


def test_preprocessing_is_what_the_library_says():
    new = stated_preprocessing("torchvision", "resnet50", "IMAGENET1K_V2")
    assert (new.size, new.resize, new.interpolation) == (224, 232, "bilinear")
    for name in ("googlenet", "inception_v3"):
        contract = stated_preprocessing("torchvision", name)
        assert contract.pixel_mean == contract.pixel_std == (127.5, 127.5, 127.5)
    assert stated_preprocessing("torchvision", "inception_v3").size == 299
    timm = stated_preprocessing("timm", "resnet50", "a1_in1k")
    assert (timm.interpolation, timm.size) == ("bicubic", 288)


def test_the_thousand_classes_are_sorted_wordnet_ids():
    classes = imagenet_classes()
    assert len(set(classes)) == 1000 and list(classes) == sorted(classes)
    assert all(name.startswith("n") and len(name) == 9 for name in classes)


# -- real weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2])
def test_real_weights_give_the_librarys_logits_on_a_picture(number, tmp_path):
    """The figures on photographs are in the docs; here a drawn picture, for no photograph is in the repository."""
    imported = import_weights("efficientnet_lite_pytorch", f"efficientnet_lite{number}")
    assert imported.difference is not None and imported.difference <= 1e-5
    assert imported.handover.contract.size == (224, 240, 260)[number]
    write_import(imported, tmp_path / "lite.pth")
    side = imported.handover.contract.size
    picture = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
    cfg = imgcls.get_config("Base-ClsNet.yaml", ["MODEL.DEVICE", "cpu", "MODEL.HEAD.NUM_CLASSES", 1000])
    cfg.MODEL.BACKBONE.VARIANT = f"efficientnet_lite{number}"
    cfg.MODEL.BACKBONE.NAME = family_of(cfg.MODEL.BACKBONE.VARIANT).builder
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.0] * 3, [128.0] * 3
    net = build_model(cfg).eval()
    handover = read_handover(tmp_path / "lite.pth")
    state = {f"backbone.{name}": value for name, value in handover.weights.items()} | dict(handover.classifier)
    net.load_state_dict(state, strict=False)
    from imgcls.transfer.pretrained import fetch
    from imgcls.transfer.references import build_reference

    library = build_reference("efficientnet_lite_pytorch", f"efficientnet-lite{number}", {})
    library.load_state_dict(fetch("efficientnet_lite_pytorch", f"efficientnet-lite{number}").tensors)
    with torch.no_grad():
        ours, reference = net(pixels[None]), library.eval()((pixels[None].float() - 127) / 128)
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()
    assert ours.argmax() == reference.argmax()
