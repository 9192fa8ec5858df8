"""The picture of what the network is fed shows what the training step gives it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Done, write_image_folder
from detectron2.modeling import build_model
from PIL import Image

from imgcls.commands import show_data
from imgcls.commands.show_data import Shown, draw, label_text
from imgcls.data import build_train_loader
from imgcls.engine import TrainStep, finalize
from imgcls.solver import build_optimizer, build_schedule

SMALL = (
    *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_EPOCHS", 3.0, "INPUT.TRAIN_SIZE", 24, "INPUT.TEST_SIZE", 20),
    *("INPUT.TEST_RESIZE", 0, "INPUT.TRAIN_TRANSFORMS", [["resize"], ["policy", "trivialaugment"]], "SEED", 3),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures to train on, three to evaluate on."""
    write_image_folder(tmp_path / "photos/train", {"ant": 5, "bee": 3}, side=30)
    write_image_folder(tmp_path / "photos/val", {"ant": 2, "bee": 1}, side=30, seed=1)
    return tmp_path / "photos"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """What the command draws."""
    seen: list[Shown] = []

    def remember(items: list[Shown]) -> Any:
        seen.extend(items)
        return draw(items)

    monkeypatch.setattr(show_data, "draw", remember)
    return seen


def call(folder: Path, *words: object) -> None:
    show_data.main([str(word) for word in ("--data", folder, "--output", folder / "seen.png", *words, *SMALL)])


def test_the_command_writes_a_picture(tool: Callable[..., Done], folder: Path) -> None:
    output = folder / "new" / "seen.png"
    done = tool("tools/show_data.py", "--data", folder, "--output", output, "--count", 5, *SMALL)
    assert done.returncode == 0, done.stderr
    told = rf"{output}: 5 pictures of folder:.*train, 24 x 24 pixels, epoch 0, from iteration 0, seed 3"
    assert re.fullmatch(told, done.stdout.splitlines()[-1])
    with Image.open(output) as image:
        assert image.format == "PNG" and min(image.size) > 200
    assert [path.name for path in output.parent.iterdir()] == ["seen.png"]  # nothing half-written beside it


@pytest.mark.parametrize("mixing", [(), ("INPUT.MIXUP_ALPHA", 0.8, "INPUT.CUTMIX_ALPHA", 1.0)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_it_shows_what_the_network_is_given(
    mixing: tuple[object, ...], epoch: int, folder: Path, shown: list[Shown], classifier_cfg: Any
) -> None:
    """A real training step on the same config, looked at from inside the network."""
    call(folder, "--count", 8, "--epoch", epoch, *mixing)
    sets = ("DATASETS.TRAIN", (f"folder:{folder / 'train'}",), "DATASETS.TEST", ())
    numbers = ("DATALOADER.NUM_WORKERS", 0, "SOLVER.BASE_LR", 0.0)
    cfg, data = finalize(classifier_cfg("mobilenet_v1_0.25", *sets, *numbers, *SMALL, *mixing))
    assert data.train is not None
    model, given = build_model(cfg).train(), []
    model.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    optimizer = build_optimizer(cfg, model)
    step = TrainStep.from_cfg(cfg, model, optimizer, build_schedule(cfg, optimizer))
    first = 2 * epoch  # eight pictures are two batches
    for iteration, batch in enumerate(build_train_loader(cfg, data.train, start=first), first):
        step(batch, iteration)
    # Where there is mixing, two pictures of each of four batches are shown.
    few = 2 if mixing else 4
    expected = torch.cat([batch.images[:few] for batch in given])[:8]
    assert len(shown) == 8 and torch.equal(torch.stack([item.views[0] for item in shown]), expected)
    labels = [label_text(target, data.classes) for batch in given for target in batch.targets[:few]][:8]
    assert [item.label for item in shown] == labels
    assert bool(mixing) == any("(0." in label for label in labels)


def test_evaluation_is_shown_from_all_over_the_set(folder: Path, shown: list[Shown], capsys: Any) -> None:
    call(folder, "--split", "test", "--count", 2)
    assert [item.label for item in shown] == ["ant", "bee"]
    assert "2 pictures" in capsys.readouterr().out and shown[0].views[0].shape == (3, 20, 20)
    with Image.open(sorted((folder / "val/bee").iterdir())[0]) as image:
        expected = np.asarray(image.convert("RGB").resize((20, 20), Image.Resampling.BILINEAR))
    assert np.array_equal(shown[1].views[0].permute(1, 2, 0).numpy(), expected)
    shown.clear()
    call(folder, "--split", "test")
    assert [item.label for item in shown] == ["ant", "ant", "bee"]


def test_several_views_stand_in_a_row(folder: Path, shown: list[Shown]) -> None:
    call(folder, "--count", 3, "INPUT.VIEWS", [[2, 24, "trivialaugment"], [1, 16, [["resize"]]]])
    assert [[view.shape[-1] for view in item.views] for item in shown] == [[24, 24, 16]] * 3
    assert not torch.equal(shown[0].views[0], shown[0].views[1])
    axes = draw(shown).axes
    assert len(axes) == 9 and all(axis.images for axis in axes)


def test_epochs_differ_and_one_is_the_same_again(folder: Path, shown: list[Shown]) -> None:
    for epoch in (0, 1, 0):
        call(folder, "--count", 4, "--epoch", epoch)
    stacks = [torch.stack([item.views[0] for item in shown[first : first + 4]]) for first in (0, 4, 8)]
    assert torch.equal(stacks[0], stacks[2]) and not torch.equal(stacks[0], stacks[1])


CLASSES = ("ant", "bee", "cat", "dog", "eel")


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (torch.tensor(1), "bee"),
        (torch.tensor(-1), "no label"),
        (torch.tensor([0, 0, 1.0, 0, 0]), "cat"),
        (torch.tensor([0, 0.3, 0, 0.7, 0]), "dog (0.70) + bee (0.30)"),
        (torch.tensor([1.0, 0, 1.0, 0, 0]), "ant + cat"),
        (torch.tensor([1.0, 0.2, 1.0, 0.4, 0.3]), "ant + cat + dog (0.40) and 2 more"),
        (torch.zeros(5), "no class"),
    ],
)
def test_labels_in_words(target: torch.Tensor, text: str) -> None:
    assert label_text(target, CLASSES) == text


def test_the_pixels_drawn_are_the_pictures(recwarn: pytest.WarningsRecorder, tmp_path: Path) -> None:
    """Grey, float and colour ones; names that are no plain text."""
    grey, colour = torch.tensor([[[0, 255], [7, 8]]], dtype=torch.uint8), torch.full((3, 2, 2), 99.6)
    figure = draw([Shown([grey], "a_$b$"), Shown([colour], "猫 " * 40)])
    assert np.array_equal(figure.axes[0].images[0].get_array(), [[0, 255], [7, 8]])  # type: ignore[arg-type]
    assert np.array_equal(figure.axes[1].images[0].get_array(), np.full((2, 2, 3), 100))  # type: ignore[arg-type]
    assert figure.axes[0].get_title() == "a_$b$" and figure.axes[1].get_title().endswith("...")
    show_data._write(tmp_path / "seen.png", figure)
    assert (tmp_path / "seen.png").stat().st_size > 1000 and not recwarn.list


WRONG = {
    "nothing": ((), "nothing says what to train: give --config-file FILE, or --data DIR"),
    "no picture": (("--count", 0), "too small: got 0; allowed: 1 or more; change --count"),
    "before the start": (("--epoch", -1), "too small: got -1; allowed: 0 or more; change --epoch"),
    "after the end": (
        ("--epoch", 3),
        r"training ends before: got 3; allowed: 0 to 2; change --epoch, or SOLV",
    ),
    "no PNG": (("--output", "seen.jpg"), r"the picture is a PNG: got 'seen.jpg'; .*change --output"),
    "no test set": (("--split", "test", "DATASETS.TEST", "()"), "there is nothing to evaluate on"),
    "a wrong row": (("INPUT.TRAIN_TRANSFORMS", '[["resiz"]]'), "there is no such transform: got 'resiz'"),
    "a detector": (
        ("--config-file", "detection/mobilenet_v1_retinanet_fpn.yaml"),
        "only a classifier's data can be shown: got 'RetinaNet'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(case: str, tool: Callable[..., Done], folder: Path) -> None:
    words, message = WRONG[case]
    if case not in ("nothing", "a detector"):
        words = ("--data", folder, *SMALL, *words)
    done = tool("tools/show_data.py", "--output", folder / "seen.png", *words)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(lines) == 1 and re.search(message, lines[0]), done.stderr
    assert not (folder / "seen.png").exists()


def test_a_broken_file_is_named(tool: Callable[..., Done], folder: Path) -> None:
    broken = sorted((folder / "train/ant").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:200])
    done = tool("tools/show_data.py", "--data", folder, "--output", folder / "seen.png", *SMALL)
    assert done.returncode == 2 and f"cannot read the image {broken}" in done.stderr
    done = tool("tools/show_data.py", "--data", folder, "--output", folder / "seen.png", *SMALL,
                "DATALOADER.ON_ERROR", "skip", "DATALOADER.MAX_BAD_SHARE", 0.5)  # fmt: skip
    assert done.returncode == 0, done.stderr
