"""From YAML files and command-line words to a config, without running anything that is written in them.

``yaml_reading`` turns bytes into a plain dict; here the dict goes into the known keys (``load_config``), and packaged
files are found by name (``get_config``).
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
from ast import literal_eval
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from detectron2.config import CfgNode, downgrade_config, get_cfg, upgrade_config
from detectron2.config.compat import guess_version
from fvcore.common.config import BASE_KEY

from imgcls.config.defaults import add_imgcls_config
from imgcls.config.durations import node_at
from imgcls.config.yaml_reading import StrPath, Tree, YamlReader, refuse, walk

logger = logging.getLogger(__name__)

# Iterations given later (in another file, as an override) switch the length in epochs off; third: what "off" is.
ITERATIONS_OVER_EPOCHS: tuple[tuple[str, str, Any], ...] = (
    ("SOLVER.MAX_ITER", "SOLVER.MAX_EPOCHS", 0.0),
    ("SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_EPOCHS", 0.0),
    ("SOLVER.STEPS", "SOLVER.STEPS_EPOCHS", []),
    ("SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_EPOCHS", 0.0),
    ("SOLVER.CHECKPOINT_KEEP_EVERY", "SOLVER.CHECKPOINT_KEEP_EVERY_EPOCHS", 0.0),
    ("SOLVER.DECAY_ITERS", "SOLVER.DECAY_EPOCHS", 0.0),
    ("SOLVER.SWA.PERIOD", "SOLVER.SWA.PERIOD_EPOCHS", 0.0),
    ("TEST.EVAL_PERIOD", "TEST.EVAL_EPOCHS", 0.0),
)

# The expected results speak of a run with the file's own data, batch and length.
EXPECTED_RESULTS = "TEST.EXPECTED_RESULTS"
JUDGED_WITH_THE_FILES_OWN = (
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.MAX_EPOCHS",
)

_COMMAND_LINE = "the command line"


def load_config(
    path: StrPath | Sequence[StrPath], overrides: Sequence[Any] = (), *, cfg: CfgNode | None = None
) -> CfgNode:
    """The config of the YAML at ``path`` (of several, later ones winning) and of ``overrides`` over it.

    overrides: a flat list ``KEY VALUE KEY VALUE`` as on the command line; VALUE is a literal or text.
    cfg: what to start from instead of the defaults; it is copied, not changed.
    """
    cfg = add_imgcls_config(get_cfg()) if cfg is None else cfg.clone()
    cfg.defrost()
    paths = [os.fspath(one) for one in ([path] if isinstance(path, (str, os.PathLike)) else path)]
    given = {*_merge_files(cfg, paths), *_merge_overrides(cfg, _pairs(overrides))}
    _let_stated_precision_stand(cfg, given)
    return cfg


def _let_stated_precision_stand(cfg: CfgNode, given: Collection[str]) -> None:
    """Who states AMP, either way, or CHANNELS_LAST False has chosen: nothing is decided for them."""
    stated = "SOLVER.AMP.ENABLED" in given or ("MODEL.CHANNELS_LAST" in given and not cfg.MODEL.CHANNELS_LAST)
    if stated and "SOLVER.CPU_SETTINGS" not in given:
        cfg.SOLVER.CPU_SETTINGS = "off"


def _merge_files(cfg: CfgNode, paths: Sequence[str]) -> Collection[str]:
    """One after the other; what a later file changes of an earlier one's goes into the log. Returns the keys given."""
    given: dict[str, str] = {}  # key -> the file that gave it last
    for path in paths:
        before = cfg.clone()
        origins = _merge_file(cfg, path)
        if given:
            # Both lengths in one file: that in epochs counts, as in a file alone.
            order = {key: int(key.rpartition(".")[2].endswith("_EPOCHS")) for key in origins}
            _let_iterations_win(cfg, order, f"in {path}")
            if EXPECTED_RESULTS not in origins:
                _drop_expectation(cfg, before)
            _tell_changes(cfg, before, {key: given[key] for key in origins if key in given}, path)
        given.update(origins)
    return given


def _tell_changes(cfg: CfgNode, before: CfgNode, given: Mapping[str, str], path: str) -> None:
    old, new = dict(walk(before)), dict(walk(cfg))
    changed = [
        f"{key} {old[key]!r} ({file}) becomes {new[key]!r}"
        for key, file in given.items()
        if not isinstance(new.get(key), dict) and old.get(key) != new.get(key)
    ]
    if changed:
        logger.info("%s: %s", path, "; ".join(changed))


def _merge_file(cfg: CfgNode, path: str) -> dict[str, str]:
    """As detectron2's ``merge_from_file``, old versions included, but read safely and told in four parts.

    Returns which file, ``path`` or one that it inherits from, gave each key.
    """
    reader = YamlReader()
    tree = reader.read(path)

    def source(key: str) -> str:
        return reader.origins.get(key, path)

    version = _version(cfg, tree, path, source)
    if version == cfg.VERSION:
        _merge(cfg, tree, source)
        return reader.origins
    logger.warning("%s is an old v%d config: upgrading it to v%d", path, version, cfg.VERSION)
    old = downgrade_config(cfg, to_version=version)
    _merge(old, tree, source)
    upgraded = upgrade_config(old)
    cfg.clear()
    cfg.update(upgraded)
    return reader.origins


def _version(cfg: CfgNode, tree: Tree, path: str, source: Callable[[str], str]) -> int:
    version = tree.get("VERSION")
    if version is None:
        groups = {key: value for key, value in tree.items() if isinstance(value, dict)}
        return int(guess_version(CfgNode(groups), path))
    if type(version) is not int or not 0 <= version <= cfg.VERSION:
        allowed = f"0 to {cfg.VERSION}, the latest that this detectron2 knows"
        refuse("the version is unknown", version, allowed, f"VERSION in {source('VERSION')}")
    return int(version)


def _merge(cfg: CfgNode, tree: Tree, source: Callable[[str], str]) -> Tree:
    fitted = _fitted(tree, cfg, cfg, source)
    cfg.merge_from_other_cfg(CfgNode(fitted))
    return fitted


def _fitted(tree: Tree, node: CfgNode, root: CfgNode, source: Callable[[str], str], prefix: str = "") -> Tree:
    """What yacs shall merge of ``tree`` into ``node``: every key is known, every value of the known type."""
    fitted: Tree = {}
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if root.key_is_deprecated(full):
            continue
        if key in node:
            value = _fitted_value(value, node[key], f"{full} in {source(full)}")
            is_group = isinstance(value, dict)
            fitted[key] = _fitted(value, node[key], root, source, f"{full}.") if is_group else value
        elif node.is_new_allowed():
            fitted[key] = value
        else:
            _refuse_unknown(full, value, root, source(full))
    return fitted


def _fitted_value(value: object, known: object, where: str) -> Any:
    try:
        read = literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        read = value  # not a literal: text, as in yacs
    except (TypeError, MemoryError, RecursionError):
        refuse("the value cannot be read", value, _kind(known), where)
    if type(known) is float and type(read) is int and abs(read) < 2**53:
        return float(read)  # "SOLVER.MAX_EPOCHS 3"; nothing is lost
    if not _fits(read, known):
        refuse("the value has the wrong type", read, _kind(known), where)
    return value if isinstance(read, str) else read  # yacs reads text once more


def _fits(value: object, known: object) -> bool:
    if isinstance(known, dict) or isinstance(value, dict):
        return isinstance(known, dict) and isinstance(value, dict)
    if known is None:
        return type(value) in (type(None), bool, int, float, str, list, tuple)
    if value is None:
        return type(known) not in (bool, int, float)
    return type(value) is type(known) or (type(value) in (list, tuple) and type(known) in (list, tuple))


def _kind(known: object) -> str:
    if isinstance(known, dict):
        return f"a group of keys: {', '.join(known)}"
    kinds = {
        bool: "True or False (bool)",
        int: "a whole number (int)",
        float: "a number (float)",
        str: "text (str)",
    }
    return kinds.get(type(known), f"a list, such as {known!r}")


def _refuse_unknown(key: str, value: object, root: CfgNode, source: str) -> NoReturn:
    near = _nearest_key(key, [known for known, _ in walk(root)])
    allowed = f"the nearest known key is {near}" if near else "a key of detectron2 or of imgcls/config/defaults.py"
    refuse(f"{key} is no known key", value, allowed, f"{key} in {source}")


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """The same last component in another group if there is one, the most similar spelling otherwise."""
    wanted = key.upper()
    last = wanted.rpartition(".")[2]
    pool = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(wanted, known, n=1)
    return max(pool, key=lambda k: difflib.SequenceMatcher(None, wanted, k).ratio(), default="")


# ----------------------------------------------------------------------------------- the command line's words


def _pairs(overrides: Sequence[Any]) -> list[tuple[str, Any]]:
    allowed = "KEY VALUE KEY VALUE, e.g. SOLVER.MAX_ITER 100"
    if isinstance(overrides, str):
        refuse("the overrides are one text", overrides, f"a list, {allowed}", _COMMAND_LINE)
    words = list(overrides)
    for key in words[::2]:
        if not isinstance(key, str) or "=" in key or key == BASE_KEY:
            refuse("an override has no key that can be set", key, allowed, _COMMAND_LINE)
    if len(words) % 2:
        refuse("the last override has no value", words[-1], allowed, _COMMAND_LINE)
    return list(zip(words[::2], words[1::2], strict=True))


def _merge_overrides(cfg: CfgNode, pairs: Sequence[tuple[str, Any]]) -> Collection[str]:
    before = cfg.clone()
    given: dict[str, int] = {}  # key -> place in the list
    for place, (key, value) in enumerate(pairs):
        tree: Any = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        fitted = _merge(cfg, tree, lambda _: _COMMAND_LINE)
        given.update((full, place) for full, _ in walk(fitted))
    if cfg.VERSION != before.VERSION:
        refuse("the version belongs to a file", cfg.VERSION, f"{before.VERSION}", _COMMAND_LINE)
    _let_iterations_win(cfg, given, f"on {_COMMAND_LINE}")
    if EXPECTED_RESULTS not in given:
        _drop_expectation(cfg, before)
    return given


def _let_iterations_win(cfg: CfgNode, given: Mapping[str, int], where: str) -> None:
    for iterations, epochs, off in ITERATIONS_OVER_EPOCHS:
        group, _, leaf = epochs.rpartition(".")
        node = node_at(cfg, group)
        if iterations not in given or given.get(epochs, -1) > given[iterations] or not node.get(leaf):
            continue
        logger.info("%s given %s replaces %s %s", iterations, where, epochs, node[leaf])
        node[leaf] = copy.copy(off)


def _drop_expectation(cfg: CfgNode, before: CfgNode) -> None:
    old = dict(walk(before))
    changed = [
        key
        for key, value in walk(cfg)
        if key.startswith(JUDGED_WITH_THE_FILES_OWN) and not isinstance(value, dict) and value != old.get(key)
    ]
    if changed and cfg.TEST.EXPECTED_RESULTS:
        logger.info("not judged: %s stands for a run without the changed %s", EXPECTED_RESULTS, ", ".join(changed))
        cfg.TEST.EXPECTED_RESULTS = []


# --------------------------------------------------------------------------------------------- packaged files


def config_root() -> Path:
    """The folder of the packaged configs: in the package when installed, the repository's in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    refuse("the packaged configs are missing", str(package), "a complete installation", "the installation")


def list_configs() -> list[str]:
    """The packaged configs by the names that `get_config` takes; search spaces (``sweeps/``) are none."""
    root = config_root()
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))
    return [name for name in names if not name.startswith("sweeps/")]


def get_config(name: str, overrides: Sequence[Any] = ()) -> CfgNode:
    """The packaged config ``name``, e.g. ``"quick/digits_mobilenet_v1.yaml"``, with ``overrides`` over it."""
    return load_config(_packaged(name), overrides)


def find_config(path_or_name: StrPath) -> Path:
    """An existing file by its path, otherwise a packaged config by its name, with or without ``configs/``."""
    path = Path(os.path.expanduser(os.fspath(path_or_name)))
    return path if os.path.isfile(path) else _packaged(os.fspath(path_or_name))


def _packaged(name: str) -> Path:
    wanted = PurePosixPath(name)
    if wanted.is_absolute() or ".." in wanted.parts:
        allowed = "an existing file, or a name below configs/"
        refuse("there is no such file, and the name leaves configs/", name, allowed, "the config's name")
    bare = wanted.as_posix().removeprefix("configs/")
    names = list_configs()
    if bare not in names:
        near = difflib.get_close_matches(bare, names, n=3, cutoff=0.4) or names[:3]
        refuse("there is no such file or packaged config", name, ", ".join(near), "the config's name")
    return config_root() / bare
