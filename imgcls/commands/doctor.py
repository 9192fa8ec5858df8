"""Examine a data set before training on it: files, copies and leaks, labels, balance, sizes, speed.

Exits with 1 when something serious is found."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from imgcls.commands.arguments import add_config_file, one_line_errors, overriding_parser, parse
from imgcls.commands.recipe import FOLDER_RECIPE, sizes_for, training_config
from imgcls.config import find_config, load_config
from imgcls.data import HoldOut, Source, open_sources
from imgcls.data import inspection as look
from imgcls.data.inspection import NOTE, SERIOUS, SEVERITIES, WARNING, Finding, Survey
from imgcls.engine.measuring.speed import Speed, measure_speed
from imgcls.engine.setup import Data, decide, sound
from imgcls.modeling import is_classifier
from imgcls.structures import Problem

VERSION = 1  # of the JSON


def parser() -> argparse.ArgumentParser:
    made = overriding_parser(__doc__ or "")
    add_config_file(made)
    made.add_argument(
        "--data", default="", metavar="DIR", help="folder of class folders, or the root of the config's data set"
    )
    made.add_argument("--train", default="", metavar="DIR", help="training folder, or the name of a data set")
    made.add_argument("--val", default="", metavar="DIR", help="validation folder, or the name of a data set")
    made.add_argument("--sample", type=int, default=0, metavar="N", help="look at N pictures of each set; 0: all")
    made.add_argument("--workers", type=int, default=_cores(), metavar="N", help="processes (default: %(default)s)")
    made.add_argument("--no-speed", action="store_true", help="do not measure the loader and the training step")
    made.add_argument("--json", default="", metavar="FILE", help="write the report as JSON; -: instead of the text")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(), argv)
    for option, lowest in (("sample", 0), ("workers", 1)):
        if getattr(args, option) < lowest:
            raise Problem("too small", getattr(args, option), f"{lowest} or more", f"--{option}").error()
    with _quiet():
        cfg, surveys, findings, speed = _examine(args)
    if args.json:
        _write_json(args.json, report(cfg, surveys, findings, speed))
    if args.json != "-":
        print(text(surveys, findings))
    if any(finding.severity == SERIOUS for finding in findings):
        sys.exit(1)


def _examine(args: argparse.Namespace) -> tuple[CfgNode, list[Survey], list[Finding], Speed | None]:
    cfg = _config(args)
    if not is_classifier(cfg):
        what = "the doctor examines the sets of classifiers"
        raise Problem(what, cfg.MODEL.META_ARCHITECTURE, "ClsNet", "--config-file").error()
    cfg = sound(cfg)
    surveys = [
        look.survey(source, role, sample=args.sample, workers=args.workers, max_pixels=cfg.INPUT.MAX_PIXELS)
        for role, source in _open(cfg).items()
    ]
    findings = _findings(cfg, surveys)
    speed, told = (None, []) if args.no_speed else _speed(cfg, surveys[0])
    findings += told + look.machine_findings(cfg, speed.parameters if speed else 0)
    return cfg, surveys, look.ranked(findings), speed


@contextmanager
def _quiet() -> Iterator[None]:
    """What opening and building have to say would stand among the findings, which say it better."""
    logger = logging.getLogger("imgcls")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- what to examine -----------------------------------------------------------------------------------------------


def _config(args: argparse.Namespace) -> CfgNode:
    """The config to judge the data by: the file's; or with folders alone the recipe that training would take."""
    if args.val and not args.train:
        raise ValueError("--val needs --train: the sets are examined against each other; add --train DIR")
    if args.train and args.data:
        raise ValueError("--data and --train name the training set twice; give one of them")
    named = {"DATASETS.TRAIN": args.train, "DATASETS.TEST": args.val}
    sets = [
        word for key, name in named.items() if args.train for word in (key, repr((_set_name(name),) if name else ()))
    ]
    if args.train and not args.config_file:
        cfg = load_config(find_config(FOLDER_RECIPE), sets)
        train = open_sources(cfg.DATASETS.TRAIN, hold_out=HoldOut.from_cfg(cfg))
        return load_config(find_config(FOLDER_RECIPE), [*sets, *sizes_for(train), *args.opts])
    if not (args.config_file or args.data):
        raise ValueError("nothing says what to examine: give --config-file FILE, --data DIR, or --train DIR --val DIR")
    named_options = {"config_file": args.config_file, "data": args.data, "opts": [*sets, *args.opts]}
    return training_config(argparse.Namespace(**named_options, variant="", output=""))


def _set_name(name: str) -> str:
    """A folder's, or of another kind of set the name itself."""
    return f"folder:{name}" if Path(name).is_dir() or os.sep in name.partition(":")[0] else name


def _open(cfg: CfgNode) -> dict[str, Source]:
    """role -> source, each with its own classes: that they differ is a finding here, not an error."""
    options: dict[str, Any] = {"root": cfg.DATASETS.ROOT, "hold_out": HoldOut.from_cfg(cfg)}
    sources = {"train": open_sources(cfg.DATASETS.TRAIN, **options)}
    if cfg.DATASETS.TEST:
        sources["val"] = open_sources(cfg.DATASETS.TEST, key="DATASETS.TEST", **options)
    for source in sources.values():
        if not len(source):
            raise ValueError(f"{source.name} has no samples; change DATASETS.TRAIN or DATASETS.TEST")
    return sources


# -- what was found ------------------------------------------------------------------------------------------------


def _findings(cfg: CfgNode, surveys: Sequence[Survey]) -> list[Finding]:
    found: list[Finding] = []
    for survey in surveys:
        found += look.unreadable_findings(survey) + look.spelling_findings(survey.source, survey.role)
    found += look.duplicate_findings(surveys)
    if len(surveys) == 2:
        train, val = surveys
        found += look.name_findings(train.source, val.source) + look.swap_findings(train, val)
    for survey in surveys:
        found += look.balance_findings(survey) + look.size_findings(survey, cfg)
        found += look.kind_findings(survey) + look.colour_findings(survey, cfg)
        if len(survey) < len(survey.source):
            what = f"of {len(survey.source)} pictures were looked at: what lies in the others is not known"
            remedy = "leave out --sample to see them all"
            found.append(Finding(NOTE, "sampled", survey.role, len(survey), what, (), remedy))
    return found


def _speed(cfg: CfgNode, train: Survey) -> tuple[Speed | None, list[Finding]]:
    source = train.readable()
    if not len(source):
        return None, []
    data = Data(source, None, source.classes)
    try:
        decide(cfg, data)
        speed = measure_speed(cfg, data)
    except (ValueError, RuntimeError) as error:
        what = f"the speed cannot be measured: {' '.join(str(error).split())}"
        return None, [Finding(WARNING, "speed_unknown", "machine", 0, what, (), "--no-speed leaves it out")]
    slow = speed.loader < speed.step
    workers = f"{speed.workers} workers, {speed.memory} MiB each" if speed.workers else "no workers"
    what = (
        f"images/s from the loader ({workers}); the training step takes {speed.step:.0f} images/s "
        f"(batch {speed.batch}, {speed.device})"
    )
    remedy = "nothing: the loader keeps up"
    if slow:
        remedy = "raise DATALOADER.NUM_WORKERS up to the number of cores, or pack the set: tools/pack_dataset.py"
    return speed, [Finding(WARNING if slow else NOTE, "speed", "machine", round(speed.loader), what, (), remedy)]


# -- what is said --------------------------------------------------------------------------------------------------


def text(surveys: Sequence[Survey], findings: Sequence[Finding]) -> str:
    """The report for people: the gravest first, each with examples and what to do."""
    lines = []
    for survey in surveys:
        part = f" ({len(survey)} looked at)" if len(survey) < len(survey.source) else ""
        classes = f"{len(survey.source.classes)} classes"
        lines.append(f"{survey.role:6}{survey.source.name}: {len(survey.source)} pictures{part}, {classes}")
    for finding in findings:
        details = _details(finding)
        # Findings of one line stand together.
        lines += [""] if details or not lines[-1].startswith(SEVERITIES) else []
        lines.append(f"{finding.severity:8} {finding.where:10} {finding.count:6}  {finding.what}")
        lines += details
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
    return "\n".join([*lines, "", ", ".join(f"{count} {severity}" for severity, count in counts.items())])


def _details(finding: Finding) -> list[str]:
    lines = [f"{'':28}{example}" for example in finding.examples]
    if finding.count > len(finding.examples) > 0:
        lines.append(f"{'':28}... and {finding.count - len(finding.examples)} more")
    if finding.remedy and not finding.remedy.startswith("nothing"):
        lines.append(f"{'':25}-> {finding.remedy}")
    return lines


def report(cfg: CfgNode, surveys: Sequence[Survey], findings: Sequence[Finding], speed: Speed | None) -> dict[str, Any]:
    """The report for machines; docs/doctor.md says what stands where."""
    return {
        "version": VERSION,
        "serious": sum(finding.severity == SERIOUS for finding in findings),
        "sets": {survey.role: _set_report(survey) for survey in surveys},
        "findings": [asdict(finding) for finding in findings],
        "speed": None if speed is None else asdict(speed),
        "config": {
            "INPUT.TRAIN_SIZE": cfg.INPUT.TRAIN_SIZE,
            "INPUT.TEST_SIZE": cfg.INPUT.TEST_SIZE,
            "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
            "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
        },
    }


def _set_report(survey: Survey) -> dict[str, Any]:
    mean, std = look.mean_and_std(survey)
    return {
        "name": survey.source.name,
        "pictures": len(survey.source),
        "looked_at": len(survey),
        "unreadable": {survey.name(row): reason for row, reason in sorted(survey.errors.items())},
        "classes": dict(zip(survey.source.classes, look.class_counts(survey).tolist(), strict=True)),
        "mean": mean.tolist(),
        "std": std.tolist(),
    }


def _write_json(where: str, content: dict[str, Any]) -> None:
    written = json.dumps(content, indent=2, ensure_ascii=False)
    if where == "-":
        print(written)
        return
    path = Path(where)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(written + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
