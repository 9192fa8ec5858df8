"""``--resume`` with another config: what may change, what is told, what is refused, and that new values count."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines_of, tiny_cfg
from detectron2.config import CfgNode
from torch import nn

from imgcls.checkpoint import read_checkpoint, write_checkpoint
from imgcls.config.yaml_reading import walk
from imgcls.engine import Run, train
from imgcls.engine.changes import FREE, POLICY, REFUSED, TOLD, best_stays, changes, rule_for, with_what_was_decided
from imgcls.engine.output import provenance
from imgcls.engine.output.output_dir import release
from imgcls.engine.setup import setup
from imgcls.solver.optimizer_state import fitted_state, names_by_number

BASE = (
    *("SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", (), "SOLVER.WARMUP_ITERS", 1),
    *("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR", 0.1),
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations with checkpoints after 2 and 4."""
    cfg, data = setup(tiny_cfg(tmp_path_factory.mktemp("begun") / "run", *BASE))
    train(Run(cfg, data))
    release(cfg.OUTPUT_DIR)
    return Path(cfg.OUTPUT_DIR)


@pytest.fixture
def resume(begun: Path, tmp_path: Path) -> Callable[..., Run]:
    """``resume("KEY", value, ...)``: a copy of that run after iteration 1 goes on with other values."""
    folder = tmp_path / "run"
    shutil.copytree(begun, folder, ignore=shutil.ignore_patterns("model_final*", ".lock"))

    def go_on(*overrides: Any) -> Run:
        cfg, data = setup(tiny_cfg(folder, *BASE, *overrides), resume=True)
        release(cfg.OUTPUT_DIR)
        run = Run(cfg, data)
        run.start(resume=True)
        return run

    return go_on


# -- the table -------------------------------------------------------------------------------------------------------


def test_every_key_was_thought_of(plain_cfg: CfgNode) -> None:
    """A new key goes into imgcls/engine/changes.py: FREE, TOLD or REFUSED?"""
    keys = [key for key, value in walk(plain_cfg) if not isinstance(value, dict)]
    assert len(keys) > 200 and [key for key in keys if rule_for(key) is None] == []
    assert rule_for("MODEL.SOMEBODY.ELSES") is None


def test_every_row_speaks_of_a_key(plain_cfg: CfgNode) -> None:
    from fnmatch import fnmatchcase

    keys = [key for key, value in walk(plain_cfg) if not isinstance(value, dict)]
    idle = [one for _, patterns in POLICY for one in patterns if not any(fnmatchcase(key, one) for key in keys)]
    assert idle == []


KINDS = {
    "DATALOADER.NUM_WORKERS": FREE,
    "SOLVER.LOG_PERIOD": FREE,
    "SOLVER.CHECKPOINT_PERIOD": FREE,
    "SOLVER.MAX_EPOCHS": FREE,
    "MODEL.RPN.IN_FEATURES": FREE,
    "SOLVER.BASE_LR": TOLD,
    "SOLVER.WEIGHT_DECAY": TOLD,
    "SOLVER.AMP.ENABLED": TOLD,
    "MODEL.DEVICE": TOLD,
    "INPUT.TRAIN_TRANSFORMS": TOLD,
    "MODEL.LOSS.LABEL_SMOOTHING": TOLD,
    "SOLVER.EMA.DECAY": TOLD,
    "MODEL.BACKBONE.DROP_PATH": TOLD,
    "MODEL.BACKBONE.VARIANT": REFUSED,
    "MODEL.HEAD.NUM_CLASSES": REFUSED,
    "SOLVER.IMS_PER_BATCH": REFUSED,
    "SOLVER.OPTIMIZER": REFUSED,
    "SOLVER.EMA.ENABLED": REFUSED,
    "SEED": REFUSED,
    "DATALOADER.REPEATS": REFUSED,
}


@pytest.mark.parametrize("key", KINDS)
def test_a_key_is_free_told_or_refused_whatever_its_values(key: str) -> None:
    assert rule_for(key) == KINDS[key]


def test_lists_are_tuples_and_older_checkpoints_had_defaults(plain_cfg: CfgNode) -> None:
    """And a checkpoint that tells no config is compared with nothing."""
    plain_cfg.SOLVER.STEPS = (10, 20)
    plain_cfg.SOLVER.BASE_LR = 1e-05
    content = {"config": plain_cfg.dump(), "iteration": 1, "images": 10}
    plain_cfg.SOLVER.STEPS = [10, 20]
    assert changes(plain_cfg, content, images=10) == []
    content["config"] = "\n".join(line for line in content["config"].splitlines() if "LOG_PERIOD" not in line)
    assert changes(plain_cfg, content, images=10) == []
    plain_cfg.SOLVER.LOG_PERIOD = 7
    assert [str(change) for change in changes(plain_cfg, content, images=10)] == ["SOLVER.LOG_PERIOD: 20 -> 7"]
    assert changes(plain_cfg, {"iteration": 1}, images=10) == []
    assert [change.kind for change in changes(plain_cfg, {"iteration": 1, "images": 9}, images=10)] == [REFUSED]


@pytest.mark.parametrize(
    ("key", "old", "new", "kind"),
    [
        ("DATASETS.TRAIN", ("/a/cats/train",), ("/b/cats/train",), TOLD),
        ("DATASETS.TRAIN", ("/a/cats/train",), ("/a/cats/all",), REFUSED),
        ("DATASETS.TRAIN", ("digits_train",), ("digits_train", "digits_val"), REFUSED),
        ("MODEL.HEAD.AUX_WEIGHT", 0.3, 0.2, TOLD),
        ("MODEL.HEAD.AUX_WEIGHT", 0.3, 0.0, REFUSED),
        ("SOLVER.MAX_ITER", 100, 90, TOLD),
        ("SOLVER.MAX_ITER", 100, 80, TOLD),
        ("SOLVER.MAX_ITER", 100, 79, REFUSED),
    ],
)
def test_keys_whose_values_decide(key: str, old: Any, new: Any, kind: str, plain_cfg: CfgNode) -> None:
    plain_cfg.merge_from_list([key, old])
    content = {"config": plain_cfg.dump(), "iteration": 79}
    plain_cfg.merge_from_list([key, new])
    (change,) = changes(plain_cfg, content, images=0)
    assert (change.key, change.kind) == (key, kind)


def test_which_changes_make_figures_incomparable(plain_cfg: CfgNode) -> None:
    def after(key: str, old: Any, new: Any) -> bool:
        plain_cfg.merge_from_list([key, old])
        content = {"config": plain_cfg.dump(), "iteration": 1}
        plain_cfg.merge_from_list([key, new])
        return best_stays(changes(plain_cfg, content, images=0))

    assert after("SOLVER.BASE_LR", 0.1, 0.2) and after("DATASETS.TEST", ("/a/val",), ("/b/val",))
    assert not after("DATASETS.TEST", ("/a/val",), ("/a/test",)) and not after("INPUT.TEST_SIZE", 32, 64)


# -- what a machine or chance decided --------------------------------------------------------------------------------


def test_what_the_run_decided_for_itself_stays(plain_cfg: CfgNode) -> None:
    plain_cfg.merge_from_list(["MODEL.DEVICE", "cpu", "SOLVER.CPU_SETTINGS", "auto"])
    began = plain_cfg.clone()
    began.merge_from_list(
        ["SOLVER.CPU_SETTINGS", "decided", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"]
    )
    content = {"config": began.dump(), "seed": 77}
    taken = with_what_was_decided(plain_cfg, content)
    assert (taken.SEED, taken.SOLVER.CPU_SETTINGS, taken.MODEL.CHANNELS_LAST) == (77, "decided", False)
    assert taken.SOLVER.AMP.ENABLED and taken.SOLVER.AMP.DTYPE == "bfloat16"
    # Stated values are the user's.
    plain_cfg.merge_from_list(["SEED", 3, "SOLVER.CPU_SETTINGS", "off"])
    assert with_what_was_decided(plain_cfg, content) == plain_cfg
    # And on a GPU nothing was chosen.
    plain_cfg.merge_from_list(["SOLVER.CPU_SETTINGS", "auto"])
    began.merge_from_list(["MODEL.DEVICE", "cuda"])
    assert with_what_was_decided(plain_cfg, {"config": began.dump()}) == plain_cfg
    assert with_what_was_decided(plain_cfg, {}) == plain_cfg


# -- an optimizer's state under another config -----------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def groups(model: nn.Module, *decays: float) -> list[dict[str, Any]]:
    """One group of all, or weights of two dimensions and the others, in another order than the network's."""
    parameters = list(model.parameters())
    if len(decays) == 1:
        return [{"params": parameters, "weight_decay": decays[0]}]
    flat, full = [p for p in parameters if p.ndim < 2], [p for p in parameters if p.ndim > 1]
    return [{"params": flat, "weight_decay": decays[0]}, {"params": full, "weight_decay": decays[1]}]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).reshape(4, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_state_finds_its_parameter_in_other_groups(kind: Any) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    one, other = network(), network()
    first = kind(groups(one, 0.0), lr=0.01, **options)
    step(one, first)
    other.load_state_dict(one.state_dict())
    second = kind(groups(other, 0.5, 0.25), lr=0.02, **options)
    saved, names = first.state_dict(), names_by_number(first, one)
    assert names == [name for name, _ in one.named_parameters()] != names_by_number(second, other)
    second.load_state_dict(fitted_state(second, names_by_number(second, other), saved, names))
    own = {name: first.state[p] for name, p in one.named_parameters()}
    for name, parameter in other.named_parameters():
        assert own[name].keys() == second.state[parameter].keys()
        assert all(torch.equal(own[name][key], second.state[parameter][key]) for key in own[name])
    assert [(group["lr"], group["weight_decay"]) for group in second.param_groups] == [(0.02, 0.5), (0.02, 0.25)]
    # torch alone would have refused the groups, and a checkpoint without names is.
    with pytest.raises(ValueError, match=r"groups the parameters in another way \(\[4, 2\]\) than .* \(\[6\]\)"):
        fitted_state(second, names_by_number(second, other), saved, None)


def test_what_is_kept_in_a_group_comes_along() -> None:
    """timm's LAMB counts its steps there."""
    optim = pytest.importorskip("timm.optim")
    one = network()
    first = optim.Lamb(groups(one, 0.0), lr=0.01)
    step(one, first)
    second = optim.Lamb(groups(one, 0.1), lr=0.02)
    names = names_by_number(first, one)
    second.load_state_dict(fitted_state(second, names, first.state_dict(), names))
    assert [second.param_groups[0][key] for key in ("step", "lr", "weight_decay")] == [1, 0.02, 0.1]


def test_new_parameters_begin_anew_and_old_ones_go() -> None:
    one = network()
    first = torch.optim.SGD(one[0].parameters(), lr=0.1, momentum=0.9)
    step(one, first)
    parameters = dict(one.named_parameters())
    second = torch.optim.SGD([parameters["2.weight"], parameters["0.bias"]], lr=0.1, momentum=0.9)
    names = names_by_number(first, one), names_by_number(second, one)
    second.load_state_dict(fitted_state(second, names[1], first.state_dict(), names[0]))
    bias = parameters["0.bias"]
    assert list(second.state) == [bias]
    assert torch.equal(second.state[bias]["momentum_buffer"], first.state[bias]["momentum_buffer"])


# -- runs ------------------------------------------------------------------------------------------------------------


def test_another_rate_counts_from_there_on(resume: Callable[..., Run]) -> None:
    """With the same moments, at the place of the run that was reached; the default, by a warning with both values."""
    before = resume()
    with lines_of("imgcls.engine.changes") as told:
        after = resume(
            "SOLVER.BASE_LR", 0.5, "SOLVER.MOMENTUM", 0.7, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.LOG_PERIOD", 3
        )
    rates = [run.step.optimizer.param_groups[0]["lr"] for run in (before, after)]
    # Iteration 2 of 4: half of the cosine.
    assert rates == pytest.approx([0.1 * 0.5, 0.5 * 0.5]) and before.start_iter == after.start_iter == 2
    assert {group["momentum"] for group in after.step.optimizer.param_groups} == {0.7}
    assert {group["weight_decay"] for group in after.step.optimizer.param_groups} == {0.0}
    assert told[0].startswith("the config has changed; from iteration 2 on the new values count: ")
    for change in ("BASE_LR: 0.1 -> 0.5", "MOMENTUM: 0.9 -> 0.7", "WEIGHT_DECAY: "):
        assert f"SOLVER.{change}" in told[0]
    assert told[1] == "changed, but nothing that is computed: SOLVER.LOG_PERIOD: 1 -> 3"
    assert len(before.step.optimizer.param_groups) == 2 and len(after.step.optimizer.param_groups) == 1
    moments = [
        {name: run.step.optimizer.state[p]["momentum_buffer"] for name, p in run.model.named_parameters()}
        for run in (before, after)
    ]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_a_longer_run_goes_on_with_the_course_of_the_longer(resume: Callable[..., Run]) -> None:
    run = resume("SOLVER.MAX_ITER", 8)
    # A quarter of the way: (1 + cos(pi / 4)) / 2.
    assert run.step.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.8535533906)


def test_nothing_changed_nothing_told(resume: Callable[..., Run]) -> None:
    with lines_of("imgcls.engine.changes") as told:
        resume()
    assert told == []


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("SOLVER.IMS_PER_BATCH", 4, "SEED", 9), ["SEED: 0 -> 9", "SOLVER.IMS_PER_BATCH: 8 -> 4"]),
        (("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.2), ["SOLVER.OPTIMIZER: 'SGD' -> 'AdamW'"]),
        (("MODEL.BACKBONE.STEM", "small"), ["MODEL.BACKBONE.STEM: 'standard' -> 'small'"]),
        (("SOLVER.EMA.ENABLED", True), ["SOLVER.EMA.ENABLED: False -> True"]),
        (("SOLVER.MAX_ITER", 1), ["SOLVER.MAX_ITER: 4 -> 1"]),
    ],
    ids=["batch and seed", "optimizer", "stem", "average", "length"],
)
def test_refused_with_every_difference_and_nothing_touched(
    overrides: tuple[Any, ...], named: list[str], resume: Callable[..., Run], tmp_path: Path
) -> None:
    before = fingerprint(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"cannot go on with another .*\. Take the old values .*MODEL.WEIGHTS"
    ) as caught:
        resume(*overrides)
    text = str(caught.value)
    assert all(one in text for one in named) and "BASE_LR" not in text and "\n" not in text
    assert fingerprint(tmp_path / "run") == before


def test_another_number_of_images_is_refused(resume: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "run" / "model_0000001.pth"
    content = read_checkpoint(path)
    images = content["images"]
    content.pop("digest")
    write_checkpoint(path, {**content, "images": images + 7}, iteration=1)
    with pytest.raises(ValueError, match=rf"another images of DATASETS.TRAIN: {images + 7} -> {images}\."):
        resume()


# -- what is saved with the run --------------------------------------------------------------------------------------


def test_the_run_says_where_it_comes_from(resume: Callable[..., Run], tmp_path: Path, begun: Path) -> None:
    folder = tmp_path / "run"
    first = (folder / "environment.txt").read_text()
    assert first.startswith("=== 20") and ", iteration 0 of 4\n" in first
    assert f"command: {provenance.command()}\n" in first and shlex.split(provenance.command())[0] == sys.executable
    assert "imgcls: " in first and "1 ranks on cpu" in first and "PyTorch" in first
    resume("SOLVER.BASE_LR", 0.5)
    both = (folder / "environment.txt").read_text()
    assert both.startswith(first) and "iteration 2 of 4" in both and "changed SOLVER.BASE_LR: 0.1 -> 0.5\n" in both
    assert (folder / "config_0000002.yaml").read_text().replace(str(folder), str(begun)) == (
        begun / "config.yaml"
    ).read_text()
    assert "BASE_LR: 0.5" in (folder / "config.yaml").read_text()
    # Another change before anything was saved: what was trained up to here is still the first.
    resume("SOLVER.BASE_LR", 0.7)
    assert "BASE_LR: 0.1\n" in (folder / "config_0000002.yaml").read_text()
    assert (folder / "environment.txt").read_text().count("=== 20") == 3


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("there is no git here")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "file").write_text("one")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    return folder


def test_a_revision_is_the_commit_and_whether_files_differ(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    head = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    (repository / "new").write_text("not tracked")
    assert provenance.revision(repository) == head
    (repository / "file").write_text("two")
    assert provenance.revision(repository) == f"{head} with changes"
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert provenance.revision(tmp_path / "none") == "no repository, or no git"
    monkeypatch.setenv("PATH", "")
    assert provenance.revision(repository) == "no repository, or no git"


def test_a_command_to_type_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["imgcls train", "--output", "my run"])
    assert shlex.split(provenance.command()) == [sys.executable, "-m", "imgcls", "train", "--output", "my run"]
