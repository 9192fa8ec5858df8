"""Search the values of a config with many trainings; ended or killed, the same command goes on with it.

OUTPUT/trials/0003 is the run of trial 3; OUTPUT/trials.csv lists them all, OUTPUT/best.yaml is the best one's config.
"""

from __future__ import annotations

import argparse
import csv
import io
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from detectron2.config import CfgNode
from tabulate import tabulate

from imgcls.checkpoint import write_whole
from imgcls.commands.arguments import add_config_file, one_line_errors, overriding_parser, parse
from imgcls.commands.recipe import training_config
from imgcls.commands.search import Search, ranked, shown
from imgcls.commands.search_space import Dimension, overrides, own_values, read_space, require_fitting, value_at
from imgcls.config import load_config
from imgcls.config.yaml_reading import read_yaml, walk
from imgcls.engine.early_stop import COSTS
from imgcls.engine.output.output_dir import claim
from imgcls.engine.setup import sound
from imgcls.structures import Problem

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner

DATABASE, BASE, BEST, TABLE = "sweep.db", "base.yaml", "best.yaml", "trials.csv"
SHOWN = 5  # best trials in the table


def parser() -> argparse.ArgumentParser:
    made = overriding_parser(__doc__ or "")
    made.add_argument("--space", required=True, metavar="FILE", help="YAML: KEY: [low, high, log], or {choices: [...]}")
    add_config_file(made, "the config that all trials share")
    made.add_argument("--data", default="", metavar="DIR", help="as for training")
    made.add_argument("--variant", default="", metavar="NAME", help="as for training")
    made.add_argument("--output", required=True, metavar="DIR", help="folder of the sweep")
    made.add_argument("--trials", type=_from_one, default=20, metavar="N", help="in all, earlier ones counted (20)")
    made.add_argument("--jobs", type=_from_one, default=1, metavar="K", help="trainings at the same time (1)")
    made.add_argument(
        "--pruner",
        choices=("median", "halving", "none"),
        default="median",
        help="end trials early: below the median of the others, or by successive halving (ASHA)",
    )
    made.add_argument("--seed", type=int, default=0, metavar="S", help="of what is proposed (0)")
    made.add_argument("--keep-weights", action="store_true", help="keep the checkpoints of all trials")
    return made


def _from_one(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(), argv)
    _require_optuna()
    space, folder = read_space(args.space), Path(args.output)
    cfg = shared_config(args)
    require_fitting(space, lambda words: sound(load_config([], words, cfg=cfg)))
    claim(folder, resume=(folder / DATABASE).exists())
    base = _write_base(cfg, folder)
    study = open_study(folder, space, cfg, args)

    def write_results() -> None:
        if ranked(study):
            write_best(study, base)
        write_table(study, space, folder / TABLE)

    search = Search(
        study, space, folder, base, jobs=args.jobs, keep_weights=args.keep_weights, after_each=write_results
    )
    with _terminated_in_order(search):
        try:
            search.run(args.trials)
        finally:
            write_results()
    print(summary(study, space))
    if not ranked(study):
        reasons = [str(trial.user_attrs.get("reason", "")) for trial in study.trials]
        raise ValueError(f"no trial came to its end; the last one: {reasons[-1] or 'pruned'}")
    print(f"{folder / BEST}: the config of trial {ranked(study)[0].number}, for --config-file")


def _require_optuna() -> None:
    """Say what to install. It is an extra, and so imported where it is used."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            f"a sweep takes the package optuna ({error}); install it with: pip install 'imgcls[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def shared_config(args: argparse.Namespace) -> CfgNode:
    """What all trials share: the config of the command line, without what would judge or place a single run."""
    folder = Path(args.output)
    args.output = ""
    cfg = training_config(args)
    if not cfg.DATASETS.TEST:
        raise Problem("there is nothing to compare trials by", (), "a data set", "DATASETS.TEST").error()
    cfg.TEST.EXPECTED_RESULTS = []
    cfg.OUTPUT_DIR = str(folder / "best")
    return cfg


def _write_base(cfg: CfgNode, folder: Path) -> Path:
    """``base.yaml``, once; a sweep goes on with the config that it began with, or not at all."""
    base = folder / BASE
    if not (folder / DATABASE).exists():
        write_whole(base, cfg.dump())
        return base
    before, now = dict(walk(read_yaml(base))), dict(walk(yaml.safe_load(cfg.dump())))
    changed = [key for key, value in now.items() if not isinstance(value, dict) and before.get(key) != value]
    changed = [key for key in changed if key != "OUTPUT_DIR"]
    if changed:
        what = f"the sweep in {folder} began with another config; differing"
        raise Problem(what, ", ".join(changed), "the same, or another folder", "--output").error()
    return base


def open_study(folder: Path, space: list[Dimension], cfg: CfgNode, args: argparse.Namespace) -> Study:
    """The study in ``folder``; a new one begins with the config's own values, where these lie in the space."""
    import optuna
    from sqlalchemy.engine import URL

    # SQLite, since a kill in the middle of a write leaves it whole.
    url = URL.create("sqlite", database=str(folder / DATABASE)).render_as_string(hide_password=False)
    study = optuna.create_study(
        storage=url,
        study_name="sweep",
        direction="minimize" if cfg.TEST.METRIC in COSTS else "maximize",
        pruner=_pruner(args.pruner),
        load_if_exists=True,
    )
    described = list(map(str, space))
    if study.user_attrs.get("space", described) != described:
        what = f"the sweep in {folder} has another search space"
        raise Problem(what, args.space, "the same, or another folder", "--space or --output").error()
    if "space" not in study.user_attrs:
        study.set_user_attr("space", described)
        own = own_values(space, cfg)
        if own is not None:
            study.enqueue_trial(own)
    # A resumed search must not propose again what it began with.
    study.sampler = optuna.samplers.TPESampler(seed=args.seed + len(study.trials), constant_liar=True)
    return study


def _pruner(name: str) -> BasePruner:
    from optuna import pruners

    makers: dict[str, Callable[[], BasePruner]] = {
        "median": pruners.MedianPruner,
        "halving": lambda: pruners.SuccessiveHalvingPruner(min_resource=1),
        "none": pruners.NopPruner,
    }
    return makers[name]()


def write_best(study: Study, base: Path) -> None:
    """``best.yaml``: what the best trial has of its own, over ``base.yaml`` beside it."""
    best = ranked(study)[0]
    ours, theirs = load_config(base, overrides(best.params)), load_config(base)
    # Not the parameters alone: a length in iterations switches its twin in epochs off.
    keys = [key for key, value in walk(ours) if not isinstance(value, dict) and value_at(theirs, key) != value]
    tree: dict[str, Any] = {"_BASE_": base.name}
    for key in keys:
        *groups, leaf = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = list(value) if isinstance(value := value_at(ours, key), tuple) else value
    text = f"# Trial {best.number} of a sweep with {len(study.trials)} trials: {best.value:.4f}.\n"
    write_whole(base.with_name(BEST), text + yaml.safe_dump(tree, sort_keys=False))


def write_table(study: Study, space: list[Dimension], file: Path) -> None:
    """A row for each trial: number, state, value, evaluations, seconds, the values, and why it failed."""
    keys = [dimension.key for dimension in space]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(("trial", "state", "value", "evaluations", "seconds", *keys, "reason"))
    for trial in study.trials:
        seconds = trial.user_attrs.get("seconds")
        row = (trial.number, trial.state.name.lower(), trial.value, len(trial.intermediate_values))
        values = (trial.params.get(key) for key in keys)
        writer.writerow((*row, seconds and f"{seconds:.1f}", *values, trial.user_attrs.get("reason", "")))
    write_whole(file, lines.getvalue())


def summary(study: Study, space: list[Dimension]) -> str:
    """The best trials as a table, how the others ended, and why those failed that did."""
    keys = [dimension.key for dimension in space]
    rows = [
        (trial.number, f"{trial.value:.4f}", *(shown(trial.params.get(key)) for key in keys))
        for trial in ranked(study)[:SHOWN]
    ]
    states = [trial.state.name.lower() for trial in study.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    failures = [
        f"trial {trial.number} failed: {trial.user_attrs['reason']}"
        for trial in study.trials
        if "reason" in trial.user_attrs
    ]
    table = tabulate(rows, ("trial", "value", *keys), disable_numparse=True)
    return "\n".join([table, f"{len(states)} trials: {counts}", *failures])


@contextmanager
def _terminated_in_order(search: Search) -> Iterator[None]:
    """Let SIGTERM end the sweep as Ctrl-C does: its trainings are told to save, its results so far are written."""

    def stop(number: int, frame: Any) -> None:
        # Raised from here, an exception could be swallowed by a library's callback that the signal fell into.
        search.leave_with = 128 + number

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
