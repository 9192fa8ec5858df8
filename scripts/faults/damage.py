"""Files that were damaged while nobody looked: flipped bits, cut ends, and a pointer that points nowhere."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from faults import judging
from faults.bench import LIMIT, Bench, Workshop
from faults.jobs import PERIOD, Variant
from faults.records import record
from faults.sabotage import Death, Sabotage
from faults.strikes import resumed_at
from imgcls.checkpoint import is_whole, read_checkpoint

KILLED_AT = 23  # the checkpoints of iterations 14 and 19 are there then
NEWEST, OLDER = "model_0000019.pth", "model_0000014.pth"


def killed(shop: Workshop, variant: Variant, name: str) -> Bench:
    """A run that was killed at iteration 23."""
    bench = Bench(shop, variant, name)
    trainer = bench.fork(Sabotage(death=Death(KILLED_AT, 0, after=False)))
    trainer.wait(LIMIT)
    trainer.kill()
    return bench


def _flip(path: Path, chance: Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, chance: Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def bits(shop: Workshop, variant: Variant, name: str, chance: Random, count: int) -> list[dict[str, Any]]:
    """So many flipped bits and truncations of one checkpoint, with its manifest and without: each has to be refused.

    A flip without a manifest counts when it changes what ``torch.load`` gives; it may hit a byte that means nothing.
    """
    bench = killed(shop, variant, name)
    found = []
    for what, spoil in (("flipped bits", _flip), ("truncations", _truncate)):
        for manifest in (True, False):
            tally = _tally(bench.folder / "spoilt", bench.run / NEWEST, spoil, manifest, chance, count)
            accepted, loads = tally["accepted"], tally["torch.load notices nothing"]
            problems = [f"{accepted} were accepted"] if accepted else []
            cause = "refused by its digest" if not accepted else "accepted"
            point = f"{count} {what} {'with' if manifest else 'without'} the manifest"
            more = {"cause": cause, "exit_code": 2 * (not accepted), **tally}
            found.append(_plain(what, variant, point, problems, **more))
            assert what != "flipped bits" or loads or count < 20, "torch.load notices flipped bits by itself?"
    return found


def _tally(
    folder: Path, whole: Path, spoil: Callable[[Path, Random], None], manifest: bool, chance: Random, count: int
) -> dict[str, int]:
    original = judging.read_checkpoint(whole)
    tally = {"tried": count, "harmless": 0, "refused": 0, "accepted": 0, "torch.load notices nothing": 0}
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = Path(shutil.copy(whole, folder))
        if manifest:
            shutil.copy(f"{whole}.json", folder)
        spoil(path, chance)
        loaded = judging.read_checkpoint(path)
        reads = bool(loaded.digests)
        changed = not reads or bool(judging.differing(loaded.digests, original.digests))
        tally["torch.load notices nothing"] += reads and changed
        refused = not is_whole(path)
        with contextlib.suppress(ValueError):
            read_checkpoint(path)
            refused = False
        tally["refused"] += refused
        tally["harmless"] += not refused and not changed and not manifest
        tally["accepted"] += not refused and (changed or manifest)
    return tally


def _plain(kind: str, variant: Variant, point: str, problems: list[str], **more: Any) -> dict[str, Any]:
    """The record of a case without a trainer."""
    return {"kind": kind, **variant.described, "point": point, **more, "problems": problems}


def _pointers(run: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    pointer = run / judging.POINTER
    yield "lost", pointer.unlink
    yield "empty", lambda: pointer.write_bytes(b"")
    yield "garbage", lambda: pointer.write_bytes(bytes(range(128, 256)) * 3)
    yield "naming a file that is not there", lambda: pointer.write_text("model_0000999.pth")
    yield "naming a file outside", lambda: pointer.write_text("../../elsewhere/model_0000019.pth")
    yield "naming an older one", lambda: pointer.write_text(OLDER)


def _files(run: Path, chance: Random) -> Iterator[tuple[str, Callable[[], Any]]]:
    newest, manifest = run / NEWEST, run / f"{NEWEST}.json"

    def without_manifest() -> None:
        manifest.unlink()
        _truncate(newest, chance)

    yield "a flipped bit in the newest", lambda: _flip(newest, chance)
    yield "the newest cut short", lambda: _truncate(newest, chance)
    yield "the newest cut short, its manifest lost", without_manifest
    yield "the newest empty", lambda: newest.write_bytes(b"")
    yield "the newest's manifest garbage", lambda: manifest.write_text("{")


def resumed_all_the_same(
    shop: Workshop, variant: Variant, name: str, chance: Random, most: int
) -> list[dict[str, Any]]:
    """With each damage the command finds the newest checkpoint that is whole, and ends as if nothing had happened."""
    template = killed(shop, variant, name)
    reference = shop.reference(variant)
    found = []
    kinds = [("pointer", what) for what, _ in _pointers(template.run)][:most]
    kinds += [("damaged file", what) for what, _ in _files(template.run, chance)][:most]
    for number, (kind, what) in enumerate(kinds):
        bench = copied(template, f"{name}-{number}")
        dict([*_pointers(bench.run), *_files(bench.run, chance)])[what]()
        passed_over = kind == "damaged file" and "garbage" not in what
        trainer = bench.fork()
        trainer.wait(LIMIT)
        problems = [] if trainer.code == 0 else [f"it ended with {trainer.code}: {trainer.last_line()}"]
        expected = 20 - PERIOD * passed_over
        if resumed_at(trainer) != expected:
            problems.append(f"resumed at {resumed_at(trainer)}, not at {expected}")
        if passed_over and not re.search(rf"{NEWEST} is damaged", trainer.stdout):
            problems.append("the damaged file is not named")
        problems += reference.end_problems(bench.run, bench.trace)
        more = {"cause": f"goes on at iteration {resumed_at(trainer)}", "resumed_at": resumed_at(trainer)}
        found.append(record(kind, variant, what, trainer, problems, equal=not problems, bad_newest=False, **more))
    found.append(_nothing_whole(copied(template, f"{name}-none")))
    return found


def copied(template: Bench, name: str) -> Bench:
    """A copy of a bench to spoil; the next trainer in it resumes."""
    bench = Bench(template.shop, template.variant, name)
    shutil.copytree(template.folder, bench.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    bench.count = template.count
    return bench


def _nothing_whole(bench: Bench) -> dict[str, Any]:
    """Where every checkpoint is damaged the command stops: beginning anew is for the user to decide."""
    for path in bench.run.glob("model_*.pth"):
        path.write_bytes(path.read_bytes()[:-100])
    before = fingerprint(bench.run)
    trainer = bench.fork()
    trainer.wait(LIMIT)
    problems = refusal_problems(trainer, rf"none of the checkpoints .*{NEWEST}")
    if fingerprint(bench.run) != before:
        problems.append("files were changed")
    return record("damaged file", bench.variant, "all of them cut short", trainer, problems)


def refusal_problems(trainer: Any, says: str) -> list[str]:
    """What is wrong with how a command refuses: the exit code, or what it says."""
    problems = [] if trainer.code == 2 else [f"it ended with {trainer.code} instead of 2"]
    if not re.search(says, trainer.last_line()):
        problems.append(f"it does not say {says!r}: {trainer.last_line()}")
    return problems


def fingerprint(run: Path) -> dict[str, bytes]:
    """What a refused command must not have changed: all but its own words in the log."""
    results = ("model_*", judging.POINTER, "metrics.json", "config.yaml")
    return {path.name: path.read_bytes() for pattern in results for path in sorted(run.glob(pattern))}
