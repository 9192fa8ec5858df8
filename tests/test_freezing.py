"""Freezing by pattern: what is frozen when, in both loops, over a kill, on two ranks, and with every optimizer."""

from __future__ import annotations

import copy
import multiprocessing
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_cfg
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from test_loops import run_in_process, same
from torch import nn

from imgcls.config.checks import require_sound
from imgcls.engine import TrainStep, setup
from imgcls.engine.freezing import NEVER, Freezing
from imgcls.engine.ranks.distributed import wrap_for_ranks
from imgcls.solver import build_optimizer, build_schedule
from imgcls.solver.optimizers import OPTIMIZERS
from imgcls.structures import Batch

# 24 images, 8 a step: three iterations an epoch. The stem never trains, the rest of the backbone from iteration 3 on.
NORM = {f"body.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
ROWS = [["backbone.*", 1.0], ["backbone.stem", 0]]
NET = "mobilenet_v1_0.25"


class Net(nn.Module):
    """A small classifier with what freezing has to tell apart."""

    frozen: tuple[nn.Module, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.mid = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        maps = self.mid(self.body(batch.images)).relu().mean((2, 3))
        return {"loss_cls": nn.functional.cross_entropy(self.head(maps), batch.targets)}

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


def frozen_names(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # What is frozen before iteration 5, from 5 on, and from 9 on.
        ([("body.*", 5)], [{"body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"}, set(), set()]),
        ([("body.1", NEVER)], [{"body.1.weight", "body.1.bias"}] * 3),
        (
            [("*.weight", 9), ("head", 5)],
            [{"body.0.weight", "body.1.weight", "mid.weight", "head.weight", "head.bias"}],
        ),
        ([("*", NEVER), ("head", 5), ("mid", 9)], None),
        ([("m?d.bias", 9), ("mid.b*", 5)], [{"mid.bias"}, set(), set()]),
    ],
    ids=["until", "module", "two", "everything", "last"],
)
def test_what_is_frozen_when(rows: list[tuple[str, int]], expected: list[set[str]] | None) -> None:
    network = Net()
    if expected is None:
        every = r"every weight is frozen at the start: got \['\*', 'head', 'mid'\];.*SOLVER.FREEZE"
        with pytest.raises(ValueError, match=every):
            Freezing(network, rows)
        return
    found = []
    for iteration in (0, 4, 5, 8, 9, 10**6):
        Freezing(Net(), rows).apply(network, iteration)
        found.append(frozen_names(network))
    assert found[0] == found[1] and found[2] == found[3] and found[4] == found[5]
    if len(expected) == 1:  # weights until 9, but the head, which the last row names, until 5
        expected = [expected[0], {"body.0.weight", "body.1.weight", "mid.weight"}, set()]
    assert found[::2] == expected


def test_modules_frozen_as_a_whole_are_in_eval_mode_and_only_these() -> None:
    network = Net()
    whole, part = Freezing(Net(), [("body.*", 5)]), Freezing(Net(), [("body.1.weight", 5)])
    whole.apply(network, 0)
    modes = {name: module.training for name, module in network.named_modules()}
    assert not any(modes[name] for name in ("body", "body.0", "body.1", "body.2"))
    assert modes[""] and modes["mid"] and modes["head"]
    whole.apply(network, 5)
    assert all(module.training for module in network.modules())
    part.apply(network, 0)
    assert all(module.training for module in network.modules())


def test_an_evaluation_wakes_nothing_that_is_frozen(classifier_cfg: Callable[..., CfgNode]) -> None:
    cfg = classifier_cfg(NET, "MODEL.HEAD.NUM_CLASSES", 3)
    network: Any = build_model(cfg)
    Freezing(network, [("backbone.res2.*", NEVER)]).apply(network.train(), 0)
    for each in (network, copy.deepcopy(network)):
        each.eval()
        each.train()
        assert not any(module.training for module in each.backbone.res2.modules())
        assert each.backbone.res3.training and each.head.training
    assert list(network.state_dict()) == list(build_model(cfg).state_dict())


@pytest.mark.parametrize("pattern", ["backbone.res9.*", "BACKBONE.*", "backbone.re", ""])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"nothing that trains has a name like this: got .*SOLVER.FREEZE"):
        Freezing(Net(), [("body.*", 5), (pattern, 5)])


@pytest.mark.parametrize(
    ("key", "row"), [("FREEZE", ["backbone.res9", 0]), ("PARAM_OVERRIDES", ["backbone.res9", {"lr_factor": 2.0}])]
)
def test_a_pattern_that_matches_nothing_is_known_before_anything_is_written(
    key: str, row: list[Any], classifier_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    cfg = classifier_cfg(NET, f"SOLVER.{key}", [row], "MODEL.WEIGHTS", str(weights))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"has a name like this: got 'backbone\.res9';.*SOLVER\.{key}"):
        setup(cfg)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_did_not_train_anyway_stays_as_it_is() -> None:
    network = Net()
    network.body.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing that trains has a name like this: got 'body\.\*'"):
        Freezing(network, [("body.*", 5)])
    Freezing(network, [("mid", 5)]).apply(network, 10)
    assert frozen_names(network) == {name for name, _ in network.named_parameters() if name.startswith("body.")}


@pytest.mark.parametrize(
    "row", ["backbone.*", ["backbone.*"], [1, 2], ["a", "b"], ["a", -1], ["a", float("nan")], ["a", True], ["a", 1, 2]]
)
def test_rows_that_are_none(row: Any, classifier_cfg: Callable[..., CfgNode]) -> None:
    cfg = classifier_cfg(NET)
    cfg.SOLVER.FREEZE, cfg.MODEL.WEIGHTS = [["head", 1.5], row], __file__
    with pytest.raises(ValueError, match=r"a row of what is frozen is no such row.*\[pattern.*SOLVER.FREEZE"):
        require_sound(cfg)
    cfg.SOLVER.FREEZE = [["head", 1.5], ("backbone", 0)]
    require_sound(cfg)


def test_random_weights_are_not_frozen(classifier_cfg: Callable[..., CfgNode], trained: Path) -> None:
    with pytest.raises(ValueError, match=r"random weights would be frozen: .*SOLVER.FREEZE or MODEL.WEIGHTS"):
        run_in_process("plain", classifier_cfg(NET, "SOLVER.FREEZE", ROWS))
    words = ("MODEL.WEIGHTS", str(trained), "MODEL.HEAD.RESET", True)
    with pytest.raises(ValueError, match=r"the new head would be frozen at random weights \(head\..*MODEL.HEAD.RESET"):
        run_in_process("plain", classifier_cfg(NET, *words, "SOLVER.FREEZE", [["head", 1]]))


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_24() -> Iterator[str]:
    """24 digits to train on: three iterations an epoch."""
    from imgcls.data.datasets import ArraySource, catalog

    def few(root: str) -> ArraySource:
        source = catalog.SETS["digits_val"](root)
        return ArraySource("few", source.pixels[:24], source.labels[:24], source.classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(catalog.SETS, "few_digits", few)
        yield "few_digits"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to freeze."""
    run, _ = run_in_process("plain", tiny_cfg(tmp_path_factory.mktemp("trained") / "run", "DATASETS.TEST", ()))
    return Path(run.cfg.OUTPUT_DIR) / "model_final.pth"


def words_for(trained: Path, folder: Path, digits: str) -> tuple[Any, ...]:
    return (
        *("OUTPUT_DIR", str(folder), "DATASETS.TRAIN", (digits,), "DATASETS.TEST", (digits,)),
        *("MODEL.WEIGHTS", str(trained), "MODEL.HEAD.DROPOUT", 0.2, "SOLVER.FREEZE", ROWS, "SOLVER.EMA.ENABLED", True),
        *("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINT_KEEP", 9, "TEST.EVAL_PERIOD", 1),
    )


@pytest.fixture(scope="module")
def straight(trained: Path, digits_24: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_in_process("plain", tiny_cfg(folder, *words_for(trained, folder, digits_24)))
    return folder


def state(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return content


def live(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    name = "model_final.pth" if iteration == 5 else f"model_{iteration:07d}.pth"
    return dict(state(folder, name)["live"])


def test_frozen_weights_and_statistics_stay_until_their_epoch_and_then_move(straight: Path, trained: Path) -> None:
    before = state(trained.parent, trained.name)["model"]
    last_frozen, end = live(straight, 2), live(straight, 5)
    counters = {name for name in before if name.endswith("num_batches_tracked")}
    stem = {name for name in before if name.startswith("backbone.stem.")}
    body = {name for name in before if name.startswith("backbone.")} - stem - counters
    assert any("running_var" in name for name in stem) and any("running_mean" in name for name in body)
    assert all(torch.equal(last_frozen[name], before[name]) for name in body | stem)
    assert all(torch.equal(end[name], before[name]) for name in stem)
    assert not any(torch.equal(end[name], before[name]) for name in body)
    for head in ("head.fc.weight", "head.fc.bias"):
        assert not torch.equal(last_frozen[head], before[head]) and not torch.equal(end[head], last_frozen[head])


@pytest.mark.parametrize(("loop", "done"), [("plain", 2), ("builtin", 3), ("plain", 4), ("builtin", 0)])
def test_a_kill_before_at_and_after_the_epoch_changes_nothing(
    loop: str, done: int, straight: Path, trained: Path, digits_24: str, tmp_path: Path
) -> None:
    """done: iterations of the checkpoint that is gone on from; the epoch ends with 3."""
    folder = tmp_path / "resumed"
    shutil.copytree(straight, folder)
    for path in folder.glob("model_*"):
        if not path.name.startswith(f"model_{done - 1:07d}"):
            path.unlink()
    # Without the evaluations, which must change nothing.
    cfg = tiny_cfg(folder, *words_for(trained, folder, digits_24), "SOLVER.CHECKPOINT_PERIOD", 99, "DATASETS.TEST", ())
    run, _ = run_in_process(loop, cfg, resume=True)
    assert run.start_iter == done
    ours, theirs = state(folder, "model_final.pth"), state(straight, "model_final.pth")
    assert same(ours["live"], theirs["live"]) and same(ours["model"], theirs["model"])
    momenta = [content["optimizer"]["state"] for content in (ours, theirs)]
    assert momenta[0].keys() == momenta[1].keys()
    assert all(same(momenta[0][index], momenta[1][index]) for index in momenta[0])


# -- optimizers and clipping ---------------------------------------------------------------------------------------


def random_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn((8, 3, 6, 6), generator=generator), torch.arange(8) % 2, torch.arange(8))


def make_step(cfg: CfgNode) -> tuple[TrainStep, Freezing]:
    """A small network whose body is frozen until iteration 2, but for its norm, which never trains."""
    torch.manual_seed(0)
    model = Net()
    made = Freezing(model, [("body", 2), ("body.1", NEVER)])
    optimizer = build_optimizer(cfg, model)
    step = TrainStep.from_cfg(cfg, wrap_for_ranks(model), optimizer, build_schedule(cfg, optimizer))
    made.follow(step, 0)
    return step, made


@pytest.mark.parametrize("clip", ["value", "norm", "full_model", "adaptive"])
def test_no_way_to_clip_minds_weights_without_gradient(clip: str, classifier_cfg: Callable[..., CfgNode]) -> None:
    words = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip)
    check_thaw(classifier_cfg(NET, *words))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_frozen_weights_alone(name: str, classifier_cfg: Callable[..., CfgNode]) -> None:
    """Neither decay nor momentum moves them; later they train, and a state dict of either side fits the other."""
    if "_of_timm" in OPTIMIZERS[name].__qualname__:
        pytest.importorskip("timm")
    words = ("SOLVER.OPTIMIZER", name, "SOLVER.BASE_LR", 1e-3, "SOLVER.WEIGHT_DECAY", 0.1)
    check_thaw(classifier_cfg(NET, "SOLVER.WEIGHT_DECAY_NORM", 0.1, *words))


def check_thaw(cfg: CfgNode) -> None:
    step, made = make_step(cfg)
    start = copy.deepcopy(step.model.state_dict())
    sizes = [len(group["params"]) for group in step.optimizer.param_groups]
    assert sum(sizes) == len(step.parameters) == 8
    for iteration in range(4):
        made.follow(step, iteration)
        step(random_batch(iteration), iteration)
        moved = {name for name, value in step.model.named_parameters() if not torch.equal(value, start[name])}
        if iteration < 2:
            assert moved == {"mid.weight", "mid.bias", "head.weight", "head.bias"}
        if iteration == 1:
            saved = copy.deepcopy((step.model.state_dict(), step.state_dict()))
    assert moved == {name for name in start if name.split(".")[0] in ("body", "mid", "head")} - NORM
    other, made = make_step(cfg)
    other.model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for iteration in (2, 3):
        made.follow(other, iteration)
        other(random_batch(iteration), iteration)
    assert same(other.model.state_dict(), step.model.state_dict())
    assert [len(group["params"]) for group in other.optimizer.param_groups] == sizes


# -- ranks ---------------------------------------------------------------------------------------------------------


def _train_as_rank(rank: int, folder: str, cfg: CfgNode, rebuild: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    step, made = make_step(cfg)
    if not rebuild:  # the mistake: the wrapper of the beginning stays
        step.rewrap = lambda wrap: None  # type: ignore[method-assign]
    step.model.module.body[1].running_mean.fill_(rank)  # type: ignore[operator, union-attr]  # of its own share
    weights = []
    for iteration in range(4):
        before, statistics = weakref.ref(step.model), [buffer.clone() for buffer in step.model.buffers()]
        made.follow(step, iteration)
        # DDP would give every rank those of the first; a run resumed behind the epoch would have others then.
        assert all(torch.equal(own, now) for own, now in zip(statistics, step.model.buffers(), strict=True))
        # Nothing holds the old wrapper any more, and so its hooks are off the parameters.
        assert (before() is None) == (rebuild and iteration == 2)
        step(random_batch(10 * iteration + rank), iteration)
        weights.append(copy.deepcopy(dict(step.model.module.named_parameters())))  # type: ignore[operator, union-attr]
    torch.save([*weights, dict(step.model.named_buffers())], f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("rebuild", [True, False])
def test_two_ranks_stay_alike_because_ddp_is_built_anew(
    rebuild: bool, classifier_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    """Without that the ranks' weights go apart, silently, from the epoch on."""
    cfg = classifier_cfg(NET)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_train_as_rank, args=(rank, str(tmp_path), cfg, rebuild)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    alike = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(first, second, strict=True)]
    assert alike == [True, True, rebuild, rebuild, False]  # the last ones are the running statistics
