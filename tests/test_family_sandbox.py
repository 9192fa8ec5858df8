"""The sandbox: Darknet-53 from rows, attention against a slow loop and torch's own, and what wrong rows are told."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_backbone, build_model
from torch import Tensor, nn
from torch.nn import functional as F

import imgcls
from imgcls.checkpoint import write_checkpoint
from imgcls.config import all_problems, require_sound
from imgcls.engine import Run, finalize
from imgcls.layers.pixel_attention import PixelTransformer, sine_positions
from imgcls.modeling import Architecture, family_of, make_classifier
from imgcls.modeling.backbones import sandbox
from imgcls.modeling.sandbox_rows import read_stages
from imgcls.transfer import convert, verify
from imgcls.transfer.parity import NEUTRAL, randomise

SHIPPED = [
    "imagenet/convformer_rows_sgd_90ep.yaml",
    "imagenet/darknet53_rows_sgd_90ep.yaml",
    "quick/digits_sandbox_cnn.yaml",
    "quick/digits_sandbox_convformer.yaml",
    "quick/digits_sandbox_transformer.yaml",
]
FAMILY = family_of("sandbox")
CPU = ["MODEL.DEVICE", "cpu", "MODEL.HEAD.NUM_CLASSES", 10]


def build(rows, **options):
    return FAMILY.build(FAMILY.variants["sandbox"], rows=rows, **options)


# -- Darknet-53 as rows ----------------------------------------------------------------------------------------------


def of_rows(key: str) -> str:
    """A key of the family's Darknet-53 in the sandbox's words: rows count through, its stages begin again."""
    stage, name, rest = key.split(".", 2)
    rows = {"stem": (2, 3), "res2": (4, 5), "res3": (6, 7), "res4": (8, 9), "res5": (10, 11)}[stage]
    if name == "conv1":
        return f"{stage}.row1.{rest}"
    if name == "down":
        return f"{stage}.row{rows[0]}.{rest}"
    return f"{stage}.row{rows[1]}.chain{name.removeprefix('block')}.convs.{rest}"


def test_darknet53_as_rows_is_the_family():
    rows = imgcls.get_config("imagenet/darknet53_rows_sgd_90ep.yaml").MODEL.BACKBONE.ROWS
    family = make_classifier(Architecture("darknet53"), 10, NEUTRAL)
    randomise(family, 0)
    trunk, names = build(rows).eval(), ["stem", "res2", "res3", "res4", "res5"]
    weights = {of_rows(key): tensor for key, tensor in family.backbone.state_dict().items()}
    assert list(weights) == list(trunk.state_dict())
    trunk.load_state_dict(weights)
    family = family.eval()
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        expected, logits = family.backbone(x)["res5"], family(x, normalized=True)
        assert torch.equal(trunk(x)["res5"], expected)
        family.backbone = trunk
        assert torch.equal(family(x, normalized=True), logits)
        trunk.res4.row9.chain7.convs.conv1.weight.mul_(1.01)
        assert not torch.equal(trunk(x)["res5"], expected)
    spec = build(rows, out_features=names).output_shape()
    assert [(spec[name].channels, spec[name].stride) for name in names] == [
        (64, 2), (128, 4), (256, 8), (512, 16), (1024, 32),
    ]  # fmt: skip


def test_the_shipped_darknet53_has_the_linear_head():
    cfg = imgcls.get_config("imagenet/darknet53_rows_sgd_90ep.yaml", [*CPU, "MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        net = build_model(cfg)
        stock = make_classifier(Architecture("darknet53"), 10, NEUTRAL)
    assert net.head.fc.weight.shape == stock.head.fc.weight.shape
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in stock.parameters())


# -- attention -------------------------------------------------------------------------------------------------------


def slow_positions(channels: int, height: int, width: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5, for the row in the first half of the channels and the column in the second."""
    half, table = channels // 2, torch.zeros(channels, height, width, dtype=torch.float64)
    for i in range(half // 2):
        wavelength = 10000 ** float(Fraction(2 * i, half))
        for y in range(height):
            for x in range(width):
                table[2 * i, y, x], table[2 * i + 1, y, x] = math.sin(y / wavelength), math.cos(y / wavelength)
                table[half + 2 * i, y, x] = math.sin(x / wavelength)
                table[half + 2 * i + 1, y, x] = math.cos(x / wavelength)
    return table


def slow_layer(layer: PixelTransformer, x: Tensor, over: str = "keys") -> Tensor:
    """One image (C, H, W), one head and one pixel at a time. over "heads": the softmax taken where it must not be."""
    channels, height, width = x.shape
    x = x + slow_positions(channels, height, width)
    pixels = [(i, j) for i in range(height) for j in range(width)]
    size = layer.query.weight.shape[0] // layer.heads

    def made(convolution: nn.Conv2d, head: int, pixel: tuple[int, int]) -> Tensor:
        kernel = convolution.weight[head * size : (head + 1) * size]
        reach, total = kernel.shape[-1] // 2, torch.zeros(size, dtype=torch.float64)
        for di in range(-reach, reach + 1):
            for dj in range(-reach, reach + 1):
                i, j = pixel[0] + di, pixel[1] + dj
                if 0 <= i < height and 0 <= j < width:
                    total = total + kernel[:, :, di + reach, dj + reach] @ x[:, i, j]
        return total

    queries, keys, values = (
        [[made(convolution, head, pixel) for pixel in pixels] for head in range(layer.heads)]
        for convolution in (layer.query, layer.key, layer.value)
    )
    scores = torch.stack([torch.stack([torch.stack([q @ k for k in ks]) for q in qs])
                          for qs, ks in zip(queries, keys, strict=True)])  # fmt: skip
    weights = (scores / math.sqrt(size)).exp()
    weights = weights / weights.sum(dim=2 if over == "keys" else 0, keepdim=True)
    out = torch.zeros(channels, height, width, dtype=torch.float64)
    for p, (i, j) in enumerate(pixels):
        heads = [sum(w * v for w, v in zip(weights[h, p], values[h], strict=True)) for h in range(layer.heads)]
        token = normalised(layer.norm1, x[:, i, j] + layer.project.weight @ torch.cat(heads))
        hidden = (layer.hidden.weight @ token + layer.hidden.bias).clamp(min=0)
        out[:, i, j] = normalised(layer.norm2, token + layer.output.weight @ hidden + layer.output.bias)
    return out


def normalised(norm: nn.LayerNorm, token: Tensor) -> Tensor:
    mean, variance = token.mean(), token.var(unbiased=False)
    return (token - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize(("channels", "size", "heads", "kernel"), [(8, 3, 2, 3), (8, 4, 3, 1), (4, 5, 1, 5)])
def test_attention_is_the_slow_loops(channels, size, heads, kernel):
    torch.manual_seed(0)
    layer = PixelTransformer(channels, size, heads, kernel)
    randomise(layer, 0)
    layer, x = layer.double(), torch.randn(2, channels, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        ours = layer(x)
        slow = torch.stack([slow_layer(layer, image) for image in x])
        assert (ours - slow).abs().max() <= 1e-12 * slow.abs().max()
        twin = torch.stack([slow_layer(layer, image, over="heads") for image in x])
    assert (ours - twin).abs().max() > 1e-2 * slow.abs().max()


def test_linear_attention_is_torchs_multihead_attention():
    torch.manual_seed(0)
    layer = PixelTransformer(24, 6, 4).double()
    theirs = nn.MultiheadAttention(24, 4, bias=False, batch_first=True).double()
    x = torch.randn(2, 24, 5, 7, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([m.weight[..., 0, 0] for m in (layer.query, layer.key, layer.value)]))
        theirs.out_proj.weight.copy_(layer.project.weight)
        ours, expected = layer.project(layer.attend(x)), theirs(tokens, tokens, tokens)[0]
        assert (ours - expected).abs().max() <= 1e-12
        theirs.in_proj_weight.copy_(theirs.in_proj_weight.roll(24, 0))  # keys for queries and so on
        assert (ours - theirs(tokens, tokens, tokens)[0]).abs().max() > 1e-2


def test_positions_tell_every_pixel_from_every_other():
    table = sine_positions(torch.zeros(1, 12, 9, 11, dtype=torch.float64))
    assert (table - slow_positions(12, 9, 11)).abs().max() <= 1e-12
    pixels = table.flatten(1).T
    assert torch.cdist(pixels, pixels).fill_diagonal_(1).min() > 1e-2
    coarse = sine_positions(torch.zeros(1, 12, 300, 2, dtype=torch.bfloat16))
    assert coarse.dtype == torch.bfloat16
    assert (coarse.double() - slow_positions(12, 300, 2)).abs().max() < 0.01  # angles were not rounded, values were


def test_without_positions_a_transformer_row_would_not_see_where_a_pixel_stands(monkeypatch):
    layer = PixelTransformer(8, 4, 2).double()
    x, order = torch.randn(1, 8, 1, 6, dtype=torch.float64), torch.tensor([3, 0, 5, 1, 4, 2])
    assert not torch.allclose(layer(x[..., order]), layer(x)[..., order])
    monkeypatch.setattr("imgcls.layers.pixel_attention.sine_positions", lambda x: 0)
    assert torch.allclose(layer(x[..., order]), layer(x)[..., order])


# -- stages, head ----------------------------------------------------------------------------------------------------


def named(rows):
    return [(stage.name, stage.total, len(stage.rows)) for stage in read_stages(rows, 3)]


@pytest.mark.parametrize(
    ("rows", "stages"),
    [
        ([["conv", 3, 8, 3, 1]], [("stem", 1, 1)]),
        ([["conv", 3, 8, 7, 4], ["conv", 8, 8, 3, 8]], [("res5", 32, 2)]),
        (
            [["conv", 3, 8, 3, 2], ["res", [8], [8], [3], 2, True], ["conv", 8, 8, 3, 4], ["conv", 8, 16, 1, 1]],
            [("stem", 2, 2), ("res3", 8, 2)],
        ),
        (
            [
                ["conv", 3, 8, 3, 4],
                ["transformer", 8, 2, 1, True],
                ["conv", 8, 8, 3, 2],
                ["res", [8], [8], [3], 1, True],
            ],
            [("res2", 4, 2), ("res3", 8, 2)],
        ),
        (
            [["conv", 3, 8, 3, 4], ["convformer", 8, 2, 3, 1, False], ["conv", 8, 8, 3, 4]],
            [("res4", 16, 3)],
        ),
    ],
)
def test_stages_end_with_stored_rows_and_are_named_by_their_stride(rows, stages):
    assert named(rows) == stages
    trunk = build(rows, out_features=[name for name, *_ in stages]).eval()
    maps = trunk(torch.zeros(1, 3, 37, 50))
    assert {n: tuple(m.shape[2:]) for n, m in maps.items()} == {n: (-(-37 // s), -(-50 // s)) for n, s, _ in stages}
    assert [len(stage) for _, stage in trunk.stage_modules()] == [count for *_, count in stages]
    assert len(build(rows).freeze(1)._frozen[0]) == stages[0][2]


def test_the_head_is_a_convolution_to_the_classes_the_mean_and_a_linear_layer():
    net = make_classifier(Architecture("sandbox", options={"rows": [["conv", 3, 8, 3, 2]]}), 5, NEUTRAL).eval()
    randomise(net, 0)
    x = torch.randn(1, 3, 21, 34)
    head = net.head
    assert tuple(head.conv.weight.shape) == (5, 8, 1, 1) and tuple(head.fc.weight.shape) == (5, 5)
    with torch.no_grad():
        y = F.conv2d(net.backbone(x)["stem"], head.conv.weight)
        y = F.leaky_relu(head.conv.norm(y), 0.1).mean((2, 3))
        assert torch.allclose(net(x, normalized=True), head.fc(y), atol=1e-6)


def test_rows_go_through_the_hand_over_into_a_detector(tmp_path, detector_cfg):
    cfg = imgcls.get_config("quick/digits_sandbox_convformer.yaml", CPU)
    write_checkpoint(tmp_path / "c.pth", Run(*finalize(cfg)).checkpoint(0))
    handed = convert(tmp_path / "c.pth", tmp_path / "b.pth")
    assert handed.architecture.options == {"rows": cfg.MODEL.BACKBONE.ROWS}
    rows = ("MODEL.BACKBONE.ROWS", cfg.MODEL.BACKBONE.ROWS)
    outcome = verify(tmp_path / "b.pth", detector_cfg("retinanet", "sandbox", *rows))
    assert outcome.passed and len(outcome.report.loaded) == len(handed.weights), outcome.text()
    other = [[*row[:-1], False] if row[0] == "convformer" else row for row in cfg.MODEL.BACKBONE.ROWS]
    with pytest.raises(ValueError, match=r"no feature map 'res3', 'res4'; allowed: res2, res5; change .*OUT_FEATURES"):
        build_model(detector_cfg("retinanet", "sandbox", "MODEL.BACKBONE.ROWS", other))


# -- wrong rows ------------------------------------------------------------------------------------------------------

CONV = ["conv", 3, 64, 3, 1]
WRONG = {
    "misfit": (
        [["conv", 3, 16, 3, 2], ["conv", 32, 64, 3, 2]],
        r"row 2 \[conv, 32, 64, 3, 2\] takes 32 channels, row 1 \[conv, 3, 16, 3, 2\] above it gives 16: got 32; "
        r"allowed: 16; change row 1 or 2 of MODEL.BACKBONE.ROWS",
    ),
    "misfit to a res": (
        [CONV, ["res", [32, 16], [16, 32], [1, 3], 1, True]],
        r"row 2 \[res, \[32, 16\], .*true\] takes 32 .*row 1",
    ),
    "image": ([["conv", 1, 16, 3, 1]], r"row 1 \[conv, 1, 16, 3, 1\] takes 1 channels, the images have 3"),
    "kind": ([CONV, ["convfromer", 64, 8, 3, 2, True]], r"row 2 .*got 'convfromer'; allowed: convformer, "),
    "kind, no text": ([[3, 64, 3, 1]], r"row 1 \[3, 64, 3, 1\] is of no known kind: got 3"),
    "length": (
        [CONV, ["conv", 64, 64, 3]],
        r"row 2 .*has 3 values behind its kind, not 4.*allowed: \[conv, in, out, kernel, stride\]",
    ),
    "text for a number": (
        [["conv", 3, "64", 3, 1]],
        r"row 1 \[conv, 3, 64, 3, 1\] has a wrong value for out: got '64'",
    ),
    "true for a number": ([["conv", 3, 64, 3, True]], r"row 1 .*wrong value for stride: got True; allowed: 1, 2"),
    "a float": ([["conv", 3, 64.0, 3, 1]], r"row 1 .*wrong value for out: got 64.0; allowed: a whole number >= 1"),
    "no channels": ([["conv", 3, 0, 3, 1]], r"row 1 .*wrong value for out: got 0"),
    "even kernel": ([["conv", 3, 64, 4, 1]], r"row 1 .*wrong value for kernel: got 4; allowed: an odd whole number"),
    "stride": ([["conv", 3, 64, 3, 3]], r"row 1 .*wrong value for stride: got 3"),
    "number for store": (
        [CONV, ["transformer", 64, 8, 2, 1]],
        r"row 2 .*wrong value for store: got 1; allowed: true or false",
    ),
    "tokens": (
        [["conv", 3, 6, 3, 1], ["transformer", 6, 8, 2, True]],
        r"row 2 .*wrong value for in: got 6; .*multiple of 4",
    ),
    "no lists in res": ([CONV, ["res", 64, 64, 3, 1, True]], r"row 2 .*wrong value for ins: got 64; allowed: a list"),
    "uneven res": ([CONV, ["res", [64, 32], [64], [3], 1, True]], r"row 2 .*has 2 ins, 1 outs and 1 kernels"),
    "empty res": ([CONV, ["res", [], [], [], 1, True]], r"row 2 .*has 0 ins"),
    "chain": (
        [CONV, ["res", [64, 30], [32, 64], [1, 3], 1, True]],
        r"in row 2 .*convolution 1 gives 32 channels and convolution 2 has 30",
    ),
    "skip": (
        [CONV, ["res", [64, 32], [32, 48], [1, 3], 1, True]],
        r"in row 2 .*convolution 2 gives 48 channels and the skip, .*has 64",
    ),
    "no list": ([CONV, "conv"], r"row 2 is no list: got 'conv'; allowed: \[conv, in, out, kernel, stride\] or"),
    "one flat list": (["conv", 3, 16, 3, 1], r"the rows are no list of lists: .*allowed: \[\[conv, in, out"),
    "strides": ([["conv", 3, 8, 3, 32], ["conv", 8, 8, 3, 2]], r"strides of row 1 .*, row 2 .*multiply .*: got 64"),
    "one name twice": (
        [["conv", 3, 8, 3, 4], ["transformer", 8, 2, 1, True], ["transformer", 8, 2, 1, False]],
        r"row 2 .* and row 3 .*would both be stored \(the last row always is\) as res2.*change store in row 2",
    ),
}


def sandbox_cfg(rows):
    cfg = imgcls.get_config("quick/digits_sandbox_cnn.yaml", CPU)
    cfg.MODEL.BACKBONE.ROWS = rows
    return cfg


@pytest.mark.parametrize(("rows", "told"), WRONG.values(), ids=WRONG)
def test_wrong_rows_are_told_before_anything_is_built(rows, told, monkeypatch):
    monkeypatch.setattr(nn.Conv2d, "__init__", lambda *_, **__: pytest.fail("something was built"))
    with pytest.raises(ValueError, match=told) as from_check:
        require_sound(sandbox_cfg(rows))
    assert "MODEL.BACKBONE.ROWS" in str(from_check.value)
    with pytest.raises(ValueError, match=told):
        build(rows)


def test_every_wrong_row_is_told_at_once():
    problems = all_problems(sandbox_cfg([["conv", 3, 8, 2, 1], CONV, ["pool"], ["conv", 64, 8, 3]]))
    assert [problem.key for problem in problems] == [f"row {n} of MODEL.BACKBONE.ROWS" for n in (1, 3, 4)]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_rows_are_sound_and_build(name):
    cfg = imgcls.get_config(name, CPU)
    assert all_problems(cfg) == []
    with torch.device("meta"):
        shape = build_backbone(cfg).output_shape()
    assert {(n, spec.stride) for n, spec in shape.items()} == {("res5", 32)}


def test_the_page_shows_the_shipped_rows_and_the_measured_figures():
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs/sandbox.md").read_text()
    shown = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    shipped = imgcls.get_config("quick/digits_sandbox_convformer.yaml")
    assert shown["MODEL"]["BACKBONE"]["ROWS"] == shipped.MODEL.BACKBONE.ROWS
    figures = re.findall(r"^\| `(configs/\S+)` \|.*\| ([\d.]+) % \|$", page, flags=re.MULTILINE)
    assert len(figures) == 3
    for name, top1 in figures:
        assert f"top-1 {top1} %" in (root / name).read_text()
        assert imgcls.get_config(name.removeprefix("configs/")).TEST.EXPECTED_RESULTS[0][2] == float(top1)


def test_rows_of_another_family_are_an_error(classifier_cfg):
    cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.BACKBONE.ROWS", [CONV], "MODEL.HEAD.NUM_CLASSES", 10)
    with pytest.raises(ValueError, match=r"mobilenet_v1 does not read this key.*MODEL.BACKBONE.ROWS"):
        build_model(cfg)


def test_without_rows_the_example_is_built_for_any_number_of_channels(monkeypatch):
    told = []
    monkeypatch.setattr(sandbox.logger, "info", lambda line, *args: told.append(line % args))
    for channels in (1, 3, 5):
        trunk = build((), in_channels=channels).eval()
        assert tuple(trunk(torch.zeros(1, channels, 33, 33))["res5"].shape) == (1, 64, 2, 2)
    assert told == ["MODEL.BACKBONE.ROWS is empty: the sandbox builds its example of 10 rows"] * 3
