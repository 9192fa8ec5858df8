"""Distillation: the loss, whom its gradient reaches, what the teacher sees, exact resume, and misfits."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import lines_of, tiny_cfg
from sharding_cases import on_ranks
from test_loops import losses, run_in_process, same, weights

from imgcls.checkpoint import read_checkpoint, write_checkpoint
from imgcls.engine import Run, finalize
from imgcls.engine import run as run_module
from imgcls.engine.teacher import build_distillation, order_of
from imgcls.modeling import Architecture, Distillation, Teacher, make_classifier
from imgcls.structures import PreprocessingContract

FAST = ("DATALOADER.NUM_WORKERS", 0, "TEST.IMS_PER_BATCH", 500)
DIGITS = tuple("0123456789")
# Not the student's: (123.675, ...) and (58.395, ...).
OTHER = PreprocessingContract("RGB", (10.0, 127.5, 200.0), (127.5, 20.0, 60.0), 32, 0, "bilinear")
UNUSED = Teacher(torch.nn.Identity(), pixel_mean=[0.0], pixel_std=[1.0], order=[0])


def teacher_file(path: Path, contract=OTHER, *, classes=DIGITS, seed=3, **changes) -> Path:
    """A checkpoint as training writes it, of a random network whose statistics and classes are not the student's."""
    torch.manual_seed(seed)
    net = make_classifier(Architecture("mobilenet_v1_0.25"), len(classes), contract)
    with torch.no_grad():
        net.head.fc.weight.normal_(std=0.5)
    content = {
        "model": net.state_dict(),
        "contract": contract.to_dict(),
        "architecture": net.backbone.architecture.to_dict(),
        "classes": list(classes),
    }
    write_checkpoint(path, {**content, **changes})
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return teacher_file(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def student(output: Path, *overrides: object) -> Run:
    return Run(*finalize(tiny_cfg(output, *FAST, *overrides)))


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_soft_loss_is_hintons(temperature):
    """Against the sum written out in float64."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 5, 7)) * 3
    p, q = softmax(theirs / temperature), softmax(ours / temperature)
    expected = temperature**2 * np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=1))
    loss = Distillation(UNUSED, kind="soft", alpha=0.5, temperature=temperature).loss
    assert float(loss(torch.tensor(ours), torch.tensor(theirs))) == pytest.approx(expected, rel=1e-12)
    assert float(loss(torch.tensor(theirs), torch.tensor(theirs))) == pytest.approx(0.0, abs=1e-12)
    # The other way round the divergence is another number.
    assert float(loss(torch.tensor(theirs), torch.tensor(ours))) != pytest.approx(expected, rel=1e-3)


def test_the_hard_loss_is_cross_entropy_with_the_teachers_choice():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=(2, 6, 4))
    expected = -np.mean(np.log(softmax(ours))[np.arange(6), theirs.argmax(axis=1)])
    loss = Distillation(UNUSED, kind="hard", alpha=0.5, temperature=9.0).loss
    assert float(loss(torch.tensor(ours), torch.tensor(theirs))) == pytest.approx(expected, rel=1e-12)


def test_labels_and_teacher_share_the_loss(teacher, tmp_path):
    batches = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6)
    alone = student(tmp_path).model.train()
    drawn = torch.get_rng_state()
    taught = student(tmp_path, "MODEL.DISTILL.TEACHER", str(teacher), "MODEL.DISTILL.ALPHA", 0.25).model.train()
    assert torch.equal(drawn, torch.get_rng_state())
    assert same(alone.state_dict(), taught.state_dict())  # no key of the teacher, and the same first weights
    with torch.no_grad():
        plain, losses = alone(*batches), taught(*batches)
    assert list(losses) == ["loss_cls", "loss_distill"]
    assert float(losses["loss_cls"]) == pytest.approx(0.75 * float(plain["loss_cls"]), rel=1e-6)
    logits = alone._all_logits(batches[0], False)[""].detach()
    expected = taught.distillation.soft(logits, taught.distillation.teacher(batches[0]))
    assert float(losses["loss_distill"]) == pytest.approx(0.25 * float(expected), rel=1e-4)


def test_the_teacher_gives_its_true_logits_for_the_students_images(teacher, tmp_path):
    """Its own mean and std, eval mode, and its classes in the student's order."""
    shuffled = teacher_file(tmp_path / "shuffled.pth", classes=DIGITS[::-1])
    content = read_checkpoint(teacher)
    net = make_classifier(Architecture(**content["architecture"]), 10, OTHER)
    net.load_state_dict(content["model"])
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    alone = net.eval()(images)
    seen = student(tmp_path, "MODEL.DISTILL.TEACHER", str(teacher)).model.distillation.teacher
    torch.testing.assert_close(seen(images), alone, rtol=1e-4, atol=1e-5)
    turned = student(tmp_path, "MODEL.DISTILL.TEACHER", str(shuffled)).model.distillation.teacher
    torch.testing.assert_close(turned(images), alone.flip(1), rtol=1e-4, atol=1e-5)
    # A hand-over file that has its head, as import_weights writes it.
    trunk, head = ({n: v for n, v in content["model"].items() if n.startswith(part)} for part in ("backbone.", "head."))
    notes = {key: content[key] for key in ("architecture", "contract", "classes")} | {"classifier": head}
    trunk = {name.removeprefix("backbone."): value for name, value in trunk.items()}
    torch.save({"model": trunk, "matching_heuristics": True, "imgcls": notes}, tmp_path / "handover.pth")
    handed = student(tmp_path, "MODEL.DISTILL.TEACHER", str(tmp_path / "handover.pth")).model.distillation.teacher
    torch.testing.assert_close(handed(images), seen(images), rtol=0, atol=0)
    # Twins: what a teacher with the student's normalisation, or in training mode, would have said.
    usual = make_classifier(Architecture(**content["architecture"]), 10, student(tmp_path).model.contract)
    usual.load_state_dict(content["model"])
    assert (usual.eval()(images) - alone).abs().max() > 0.1
    assert (net.train()._all_logits(images, False)[""] - alone).abs().max() > 0.1


def test_images_are_resized_for_the_teacher_where_asked(teacher, tmp_path):
    words = ("MODEL.DISTILL.TEACHER", str(teacher), "MODEL.DISTILL.SIZE", 64)
    asked, images = student(tmp_path, *words).model.distillation.teacher, torch.rand(2, 3, 32, 32) * 255
    larger = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)
    as_it_comes = student(tmp_path, *words[:2]).model.distillation.teacher
    torch.testing.assert_close(asked(images), as_it_comes(larger))
    assert not torch.allclose(asked(images), as_it_comes(images), atol=1e-2)
    one_by_one = asked([images[0], larger[1]])
    torch.testing.assert_close(one_by_one[:1], asked(images[:1]))
    torch.testing.assert_close(one_by_one[1:], asked(larger[1:]))


def test_only_the_student_learns(teacher, tmp_path):
    run = student(tmp_path, "MODEL.DISTILL.TEACHER", str(teacher), "SOLVER.EMA.ENABLED", True)
    network = run.model.distillation.teacher.network
    net = network.func if isinstance(network, partial) else network
    before = copy.deepcopy(net.state_dict())
    held = {id(parameter) for group in run.step.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in run.model.parameters()}
    for iteration, batch in zip(range(2), run.batches(), strict=False):
        run.step(batch, iteration)
    assert not net.training and same(net.state_dict(), before)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(parameter.grad is not None for parameter in run.model.parameters())
    # The average of the student shares the teacher instead of copying it.
    assert run.step.average.network.distillation is run.model.distillation


def test_a_share_of_zero_is_training_without_a_teacher(teacher, tmp_path):
    run_in_process("plain", tiny_cfg(tmp_path / "alone", *FAST))
    words = ("MODEL.DISTILL.TEACHER", str(teacher), "MODEL.DISTILL.ALPHA")
    run_in_process("plain", tiny_cfg(tmp_path / "zero", *FAST, *words, 0.0))
    run_in_process("plain", tiny_cfg(tmp_path / "some", *FAST, *words, 0.1))
    assert same(weights(tmp_path / "zero"), weights(tmp_path / "alone"))
    assert not same(weights(tmp_path / "some"), weights(tmp_path / "alone"))


def test_both_loops_are_equal_and_resume_exactly(teacher, tmp_path):
    """With mixup, which the teacher sees too."""
    words = (*FAST, "MODEL.DISTILL.TEACHER", str(teacher), "INPUT.MIXUP_ALPHA", 0.2, "SOLVER.CHECKPOINT_PERIOD", 2)
    run_in_process("plain", tiny_cfg(tmp_path / "plain", *words))
    run_in_process("builtin", tiny_cfg(tmp_path / "builtin", *words))
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "builtin"))
    straight = weights(tmp_path / "builtin")
    shutil.copytree(tmp_path / "plain", tmp_path / "cut")
    for path in (tmp_path / "cut").glob("model_final*"):
        path.unlink()
    with lines_of("imgcls.engine.teacher") as said:
        again, _ = run_in_process("builtin", tiny_cfg(tmp_path / "cut", *words), resume=True)
    assert again.start_iter == 2 and same(weights(tmp_path / "cut"), straight)
    (line,) = [line for line in said if line.startswith("teacher: ")]
    assert "SHA-256" in line and "10 classes, mean [10.0, 127.5, 200.0]" in line


def test_a_teacher_of_timm(tmp_path):
    """Its own head and mean; no download: the weights are a file, whose outputs are in the training set's order."""
    torch.manual_seed(5)
    net = timm.create_model("test_resnet", num_classes=10).eval()
    torch.save(net.state_dict(), tmp_path / "timm.pth")
    words = ("MODEL.DISTILL.TEACHER", "timm:test_resnet", "MODEL.DISTILL.WEIGHTS", str(tmp_path / "timm.pth"))
    images = torch.rand(3, 3, 32, 32) * 255
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    alone = net((images / 255 - mean) / std).detach()
    given = student(tmp_path, *words, "MODEL.DISTILL.CLASSES", "in_order").model.distillation.teacher
    torch.testing.assert_close(given(images), alone, rtol=1e-4, atol=1e-5)
    (tmp_path / "names.txt").write_text("\n".join(DIGITS[::-1]) + "\n")
    named = student(tmp_path, *words, "MODEL.DISTILL.CLASSES", str(tmp_path / "names.txt")).model.distillation.teacher
    torch.testing.assert_close(named(images), alone.flip(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"knows other classes than the data: 1000 to 10; not in the data: n01440764"):
        student(tmp_path, *words)


def test_the_classes_are_aligned_by_name():
    assert order_of(("cat", "dog", "ant"), ("ant", "cat", "dog"), "t") == [2, 0, 1]
    with pytest.raises(ValueError, match=r"t knows other .*: 2 to 3; not in the data: none; not the teacher's: dog"):
        order_of(("cat", "ant"), ("ant", "cat", "dog"), "t")


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    def refused(path, message, *words):
        with pytest.raises(ValueError, match=message):
            student(tmp_path / "run", "MODEL.DISTILL.TEACHER", str(path), *words)
        assert not (tmp_path / "run").exists()

    refused("none.pth", r"no such file: got 'none.pth'.*change MODEL.DISTILL.TEACHER")
    refused("timm:none", r"timm has no such network: got 'none'", "MODEL.DISTILL.CLASSES", "in_order")
    refused(
        teacher_file(tmp_path / "letters.pth", classes=tuple("abcdefghij")),
        r"letters.pth knows other classes than the data: 10 to 10; not in the data: a, b, c, d and 6 more",
    )
    content = read_checkpoint(good := teacher_file(tmp_path / "good.pth"))
    refused(good, r"other classes than the data: 2 to 10", "MODEL.DISTILL.CLASSES", str(names(tmp_path, "12")))
    refused(good, r"no such file: got 'nowhere.txt'.*MODEL.DISTILL.CLASSES", "MODEL.DISTILL.CLASSES", "nowhere.txt")
    other = {name.replace("head.fc", "head.out"): value for name, value in content["model"].items()}
    refused(teacher_file(tmp_path / "other.pth", model=other), r"other.pth do not fit: .*MODEL.DISTILL.HEAD must be")
    content["model"]["head.fc.bias"][3] = torch.nan
    torch.save({key: value for key, value in content.items() if key != "digest"}, tmp_path / "nan.pth")
    refused(tmp_path / "nan.pth", r"nan.pth holds NaN in head.fc.bias")
    torch.save({"model": read_checkpoint(good)["model"], "classes": list(DIGITS)}, tmp_path / "bare.pth")
    refused(tmp_path / "bare.pth", r"does not say which network it is of")
    headless = {name: value for name, value in content["model"].items() if not name.startswith("head.")}
    refused(teacher_file(tmp_path / "trunk.pth", model=headless), r"the teacher has no head")
    nameless = {name: value for name, value in read_checkpoint(good).items() if name not in ("classes", "digest")}
    torch.save(nameless, tmp_path / "nameless.pth")
    refused(tmp_path / "nameless.pth", r"does not name its classes: got ''; allowed: a text file.*or in_order")


def names(folder: Path, classes: str) -> Path:
    path = folder / f"{classes}.txt"
    path.write_text("\n".join(classes))
    return path


def test_a_network_of_one_image_size_says_so_before_training(tmp_path):
    net = timm.create_model("test_vit3", num_classes=10)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    words = ("MODEL.DISTILL.TEACHER", "timm:test_vit3", "MODEL.DISTILL.WEIGHTS", str(tmp_path / "vit.pth"))
    words = (*words, "MODEL.DISTILL.CLASSES", "in_order")
    with pytest.raises(ValueError, match=r"timm:test_vit3 fails on images of 32x32: .*Set MODEL.DISTILL.SIZE"):
        student(tmp_path, *words)
    side = net.pretrained_cfg["input_size"][-1]
    made = student(tmp_path, *words, "MODEL.DISTILL.SIZE", side).model.distillation.teacher
    assert made(torch.rand(2, 3, 32, 32) * 255).shape == (2, 10)


def test_a_student_of_normalised_images_has_no_teacher(teacher, tmp_path):
    model = student(tmp_path, "MODEL.DISTILL.TEACHER", str(teacher)).model.train()
    with pytest.raises(ValueError, match=r"give the network images in 0..255"):
        model(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64), normalized=True)


# -- two ranks -----------------------------------------------------------------------------------------------------

# A student in which no image looks at its neighbours: however they are shared out, the sums are the same.
ALONE = (
    *("MODEL.BACKBONE.NORM", "GN", "MODEL.HEAD.DROPOUT", 0.0, "SOLVER.BASE_LR", 0.01, "SOLVER.CPU_SETTINGS", "off"),
    *("DATASETS.TEST", (), "MODEL.DISTILL.ALPHA", 0.9, "MODEL.DISTILL.TEMPERATURE", 4.0, "MODEL.DISTILL.TEACHER"),
)


def taught(folder: Path, teacher: Path, training: bool = False) -> dict[str, Any]:
    """What a run leaves on this rank. training: the mistake, a teacher that keeps statistics of what it is shown."""

    def build(cfg, classes):
        made = build_distillation(cfg, classes)
        made.teacher.network.func.backbone.train(training)
        return made

    usual = run_module.build_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build_distillation", build)
        # In float64: four steps of a small network turn the last bit of float32 into the fourth decimal.
        patch.setattr(run_module, "build_model", lambda cfg: usual(cfg).double())
        run, _ = run_in_process("plain", tiny_cfg(folder, *FAST, *ALONE, str(teacher)))
    net = run.model.distillation.teacher.network.func
    return {
        "student": run.model.state_dict(),
        "trained": list(run.step.model.state_dict()),
        "teacher": net.state_dict(),
        "gradients": [name for name, parameter in net.named_parameters() if parameter.grad is not None],
    }


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference."""
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder and the weights of a run on one rank."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, taught(folder, teacher)["student"]


def test_two_ranks_learn_what_one_does_and_leave_the_teacher_as_it_was(alone, teacher, tmp_path):
    ranks = on_ranks(2, taught, tmp_path / "ranks", tmp_path / "two", teacher)
    untaught = student(tmp_path / "untaught", *ALONE[:-1]).model.state_dict()
    for found in ranks:
        assert apart(found["student"], alone[1]) < 1e-10
        assert same(found["teacher"], read_checkpoint(teacher)["model"]) and found["gradients"] == []
        assert found["trained"] == [f"module.{name}" for name in untaught]  # DDP has not heard of the teacher
    assert same(*(found["student"] for found in ranks))
    assert losses(tmp_path / "two") == pytest.approx(losses(alone[0]), rel=1e-6)


def test_a_teacher_in_training_mode_would_be_another_on_each_rank(alone, teacher, tmp_path):
    first, second = on_ranks(2, taught, tmp_path / "ranks", tmp_path / "two", teacher, True)
    assert apart(first["student"], alone[1]) > 1e-3
    assert not same(first["teacher"], read_checkpoint(teacher)["model"])
    assert not same(first["teacher"], second["teacher"])
