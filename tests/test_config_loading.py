"""Loading a configuration: safe, strict, and told in four parts."""

import os
import re
import socket
import urllib.request
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from imgcls.config.defaults import add_imgcls_config
from imgcls.config.loading import config_root, find_config, get_config, list_configs, load_config
from imgcls.config.yaml_reading import MAX_BYTES, MAX_FILES, read_yaml

ZOO = Path(str(files("detectron2") / "model_zoo" / "configs"))
STOCK_RETINANET = ZOO / "Base-RetinaNet.yaml"


def write(folder: Path, text: str | bytes, name: str = "c.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# -------------------------------------------------------------------------------------- no code from a config


class Connected(Exception):
    """A connection was tried."""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Every try to connect or to look a host up raises, and is kept even where the exception is swallowed."""
    tried: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise Connected(str(args))

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tried


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder that appears when a configuration's code runs."""
    return tmp_path / "canary"


# Each would run os.mkdir(canary), {} being its path, under yaml.unsafe_load; only the twin lets detectron2 do that.
RUNNING = {
    "apply": 'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{}"]',
    "apply with args": 'OUTPUT_DIR: !!python/object/apply:os.mkdir {{args: ["{}"]}}',
    "eval": "OUTPUT_DIR: !!python/object/apply:eval [\"__import__('os').mkdir('{}')\"]",
    "written in full": 'OUTPUT_DIR: !<tag:yaml.org,2002:python/object/apply:os.mkdir> ["{}"]',
    "by a directive": '%TAG !y! tag:yaml.org,2002:python/\n---\nSEED: !y!object/apply:os.mkdir ["{}"]',
    "deep in a list": 'TEST: {{EXPECTED_RESULTS: [[1, [!!python/object/apply:os.mkdir ["{}"]]]]}}',
    "in a key": '? !!python/object/apply:os.mkdir ["{}"]\n: 1',
    "behind an anchor": 'OUTPUT_DIR: &a !!python/object/apply:os.mkdir ["{}"]',
}
QUIET = {
    "name": "OUTPUT_DIR: !!python/name:os.system",
    "module": "OUTPUT_DIR: !!python/module:os",
    "tuple": "OUTPUT_DIR: !!python/tuple [1]",
    "str": "OUTPUT_DIR: !!str abc",
    "local": "OUTPUT_DIR: !mine abc",
    "bare": "OUTPUT_DIR: ! abc",
    "our own mark": "OUTPUT_DIR: !<imgcls-stock-literal> abc",
}


@pytest.mark.parametrize("text", RUNNING.values(), ids=RUNNING)
def test_no_tag_runs(text: str, tmp_path: Path, canary: Path) -> None:
    path = write(tmp_path, text.format(canary))
    with pytest.raises(ValueError, match=r"tag is written in the file: got .*allowed: .*c\.yaml, line \d"):
        load_config(path)
    assert not canary.exists()


@pytest.mark.parametrize("text", RUNNING.values(), ids=RUNNING)
def test_twin_detectron2_runs_each_of_them(text: str, tmp_path: Path, canary: Path) -> None:
    path = write(tmp_path, text.format(canary))
    with suppress(Exception):  # what it makes of the result is its business; by then the code has run
        get_cfg().merge_from_file(str(path))
    assert canary.is_dir()


@pytest.mark.parametrize("text", QUIET.values(), ids=QUIET)
def test_harmless_looking_tags_are_refused_too(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tag is written in the file: got '.*c\.yaml, line 1"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("depth", [1, 2])
def test_no_tag_runs_in_a_base(depth: int, tmp_path: Path, canary: Path) -> None:
    write(tmp_path, RUNNING["apply"].format(canary), "evil.yaml")
    write(tmp_path, "_BASE_: evil.yaml\nVERSION: 2", "middle.yaml")
    leaf = write(tmp_path, f"_BASE_: {'evil' if depth == 1 else 'middle'}.yaml\nVERSION: 2")
    with pytest.raises(ValueError, match=r"tag is written .*os\.mkdir.*evil\.yaml, line 1"):
        load_config(leaf)
    assert not canary.exists()
    get_cfg().merge_from_file(str(leaf))  # the twin
    assert canary.is_dir()


def test_no_tag_runs_in_the_config_beside_a_checkpoint(tmp_path: Path, canary: Path) -> None:
    write(tmp_path, b"weights", "run/model_final.pth")
    saved = write(tmp_path, "SEED: 1\n" + RUNNING["apply"].format(canary), "run/config.yaml")
    with pytest.raises(ValueError, match=r"tag is written .*run/config\.yaml, line 2"):
        load_config([ZOO / "Base-RCNN-FPN.yaml", saved])
    assert not canary.exists()


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.mkdir ["{}"]',
        "__import__('os').mkdir('{}')",
        "[__import__('os').mkdir('{}')]",
    ],
)
def test_no_override_runs(value: str, canary: Path) -> None:
    value = value.format(canary)
    cfg = load_config([], ["OUTPUT_DIR", value])
    assert value == cfg.OUTPUT_DIR
    with pytest.raises(ValueError, match=r"wrong type.*a whole number.*SOLVER\.MAX_ITER"):
        load_config([], ["SOLVER.MAX_ITER", value])
    assert not canary.exists()


def test_a_python_file_is_not_run(tmp_path: Path, canary: Path) -> None:
    program = write(tmp_path, f"import os; os.mkdir({str(canary)!r})", "lazy.py")
    with pytest.raises(ValueError, match=r"is a Python file: got '.*lazy\.py'.*LazyConfig"):
        load_config(program)
    with pytest.raises(ValueError, match=r"is a Python file.*change _BASE_ in .*c\.yaml"):
        load_config(write(tmp_path, "_BASE_: lazy.py"))
    assert not canary.exists()
    exec(program.read_text())  # the twin: the program does what it says
    assert canary.is_dir()


URLS = ["http://127.0.0.1:9/b.yaml", "https://127.0.0.1:9/b.yaml", "file:///b.yaml", "detectron2://b.yaml"]


@pytest.mark.parametrize("url", URLS)
def test_nothing_is_fetched(url: str, tmp_path: Path, no_network: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"not read from a URL: got '\w+://.*local file.*_BASE_ in .*c\.yaml"):
        load_config(write(tmp_path, f"_BASE_: {url}"))
    with pytest.raises(ValueError, match="not read from a URL"):
        load_config(write(tmp_path, f"_BASE_: [{url}]"))
    with pytest.raises(ValueError, match=r"not read from a URL.*--config-file"):
        load_config(url)
    assert no_network == []


def test_twin_detectron2_tries_to_fetch(tmp_path: Path, no_network: list[Any]) -> None:
    with pytest.raises(Connected):
        urllib.request.urlopen("http://127.0.0.1:9/b.yaml")
    assert len(no_network) == 1
    with pytest.raises(Exception):  # noqa: B017 - its downloader wraps the refusal as it likes
        get_cfg().merge_from_file(str(write(tmp_path, "_BASE_: http://127.0.0.1:9/b.yaml")))
    assert len(no_network) > 1


# --------------------------------------------------------------------- the stock file with a tag that we know


def test_stock_retinanet_is_read_with_its_anchors_as_literals() -> None:
    tree = read_yaml(STOCK_RETINANET)
    sizes = tree["MODEL"]["ANCHOR_GENERATOR"]["SIZES"]
    assert [row[0] for row in sizes] == [32, 64, 128, 256, 512]
    assert sizes[0] == pytest.approx([32, 40.3174735966, 50.7968336630], rel=1e-11)
    assert sizes[4] == pytest.approx([512, 645.0795775462, 812.7493386077], rel=1e-11)
    assert tree["SOLVER"]["BASE_LR"] == 0.01  # from the file, not from a table


def test_two_readings_of_the_stock_file_share_nothing() -> None:
    read_yaml(STOCK_RETINANET)["MODEL"]["ANCHOR_GENERATOR"]["SIZES"][0][0] = -1
    assert read_yaml(STOCK_RETINANET)["MODEL"]["ANCHOR_GENERATOR"]["SIZES"][0][0] == 32


@pytest.mark.parametrize("change", [(b"0.01", b"0.02"), (b"VERSION: 2\n", b"VERSION: 2\n\n"), (b"\n", b"\r\n")])
def test_twin_the_stock_file_with_a_changed_byte_is_a_stranger(change: tuple[bytes, bytes], tmp_path: Path) -> None:
    data = STOCK_RETINANET.read_bytes()
    assert read_yaml(write(tmp_path, data, "copy.yaml")) == read_yaml(STOCK_RETINANET)
    assert change[0] in data
    with pytest.raises(ValueError, match=r"tag is written.*python/object/apply:eval.*copy\.yaml, line 8"):
        read_yaml(write(tmp_path, data.replace(*change), "copy.yaml"))


def test_every_yaml_of_the_zoo_resolves_as_in_detectron2() -> None:
    paths = sorted(ZOO.rglob("*.yaml"))
    assert len(paths) == 92
    for path in paths:
        stock = get_cfg()
        stock.merge_from_file(str(path))
        ours = load_config(path, cfg=get_cfg())
        assert {key: (type(v), v) for key, v in leaves(ours).items()} == {
            key: (type(v), v) for key, v in leaves(stock).items()
        }, path


def test_the_default_start_has_our_keys_beside_detectron2s(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, "VERSION: 2\nMODEL: {BACKBONE: {VARIANT: resnet50}}"))
    assert cfg.MODEL.BACKBONE.VARIANT == "resnet50"
    assert cfg.INPUT.TRAIN_SIZE == 224 and cfg.MODEL.RPN.NMS_THRESH == 0.7


def test_a_given_cfg_is_copied_not_changed(tmp_path: Path) -> None:
    start = add_imgcls_config(get_cfg())
    start.SEED = 7
    start.freeze()
    cfg = load_config(write(tmp_path, "VERSION: 2\nVIS_PERIOD: 3"), ["OUTPUT_DIR", "there"], cfg=start)
    assert (cfg.SEED, cfg.VIS_PERIOD, cfg.OUTPUT_DIR) == (7, 3, "there")
    assert (start.VIS_PERIOD, start.OUTPUT_DIR, start.is_frozen()) == (0, "./output", True)


def test_a_saved_config_reads_back_as_itself(tmp_path: Path) -> None:
    cfg = load_config(STOCK_RETINANET, ["SOLVER.BASE_LR", "1e-5", "OUTPUT_DIR", "2024-01-31"])
    saved = write(tmp_path, cfg.dump())
    assert yaml.safe_load(load_config(saved).dump()) == yaml.safe_load(cfg.dump())
    assert yaml.safe_load(load_config(saved, ["SEED", "3"]).dump()) != yaml.safe_load(cfg.dump())


def test_a_date_stays_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "VERSION: 2\nOUTPUT_DIR: 2024-01-31")).OUTPUT_DIR == "2024-01-31"
    assert yaml.safe_load("A: 2024-01-31")["A"] != "2024-01-31"


# ------------------------------------------------------------------------------------------- files and _BASE_


def test_base_is_relative_to_the_file_absolute_or_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir("/")
    base = write(tmp_path, "A: 1\nB: {C: 2, D: 3}", "home/base.yaml")
    for named in ("../home/base.yaml", str(base), "~/base.yaml"):
        leaf = write(tmp_path, f"_BASE_: {named}\nB: {{C: 5}}", "leaves/leaf.yaml")
        assert read_yaml(leaf) == {"A": 1, "B": {"C": 5, "D": 3}}
    assert read_yaml("~/base.yaml") == {"A": 1, "B": {"C": 2, "D": 3}}


def test_of_a_list_of_bases_the_later_wins_and_the_file_over_all(tmp_path: Path) -> None:
    write(tmp_path, "X: {A: 1, B: 1, C: 1}\nONLY: [1]", "one.yaml")
    write(tmp_path, "X: {B: 2, C: 2}", "two.yaml")
    leaf = write(tmp_path, "_BASE_: [one.yaml, two.yaml]\nX: {C: 3}")
    assert read_yaml(leaf) == {"X": {"A": 1, "B": 2, "C": 3}, "ONLY": [1]}
    assert read_yaml(write(tmp_path, "_BASE_: [two.yaml, one.yaml]"))["X"] == {"A": 1, "B": 1, "C": 1}


def test_an_alias_in_a_base_is_not_overwritten_twice(tmp_path: Path) -> None:
    write(tmp_path, "A: &x {K: 1}\nB: *x", "base.yaml")
    assert read_yaml(write(tmp_path, "_BASE_: base.yaml\nA: {K: 2}")) == {"A": {"K": 2}, "B": {"K": 1}}


def test_of_several_paths_the_later_wins(tmp_path: Path) -> None:
    one = write(tmp_path, "VERSION: 2\nSEED: 1\nVIS_PERIOD: 1", "one.yaml")
    two = write(tmp_path, "VERSION: 2\nSEED: 2", "two.yaml")
    assert (load_config([one, two]).SEED, load_config((two, one)).SEED) == (2, 1)
    assert load_config([one, two], ["SEED", "3"]).VIS_PERIOD == 1


def test_what_a_later_file_changes_is_told_with_both_files(tmp_path: Path, log: list[str]) -> None:
    base = write(tmp_path, "VERSION: 2\nSEED: 1\nSOLVER: {BASE_LR: 0.3}", "base.yaml")
    one = write(tmp_path, "_BASE_: base.yaml\nVIS_PERIOD: 1\nSOLVER: {GAMMA: 0.2}", "one.yaml")
    two = write(tmp_path, "VERSION: 2\nSEED: 1\nSOLVER: {BASE_LR: 0.5, GAMMA: 0.4, MOMENTUM: 0.8}", "two.yaml")
    cfg = load_config([one, two], ["SOLVER.GAMMA", "0.6"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA, cfg.VIS_PERIOD) == (0.5, 0.6, 1)
    assert log == [f"{two}: SOLVER.BASE_LR 0.3 ({base}) becomes 0.5; SOLVER.GAMMA 0.2 ({one}) becomes 0.4"]
    log.clear()
    load_config([two, write(tmp_path, "VERSION: 2\nSEED: 1\nSOLVER: {STEPS: [7]}", "three.yaml")])
    assert log == []  # nothing that another file had said


def test_a_later_file_is_an_override_of_lengths_and_expectations(tmp_path: Path, log: list[str]) -> None:
    expected = 'TEST: {EXPECTED_RESULTS: [["classification", "top1", 70.0, 1.0]]}'
    one = write(tmp_path, f"VERSION: 2\nSOLVER: {{MAX_EPOCHS: 90.0, WARMUP_EPOCHS: 5.0}}\n{expected}", "one.yaml")
    two = write(tmp_path, "VERSION: 2\nSOLVER: {MAX_ITER: 3}", "two.yaml")
    cfg = load_config([one, two])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.WARMUP_EPOCHS) == (3, 0.0, 5.0)
    assert f"SOLVER.MAX_ITER given in {two} replaces SOLVER.MAX_EPOCHS 90.0" in log
    assert cfg.TEST.EXPECTED_RESULTS == [] and load_config([two, one]).TEST.EXPECTED_RESULTS != []
    both = write(tmp_path, "VERSION: 2\nSOLVER: {MAX_ITER: 3, MAX_EPOCHS: 2.0}", "both.yaml")
    assert load_config([one, both]).SOLVER.MAX_EPOCHS == 2.0
    other = write(tmp_path, "VERSION: 2\nSEED: 3", "other.yaml")
    assert load_config([one, other]).TEST.EXPECTED_RESULTS != []


def test_a_base_shared_by_two_bases_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path, "A: 1", "root.yaml")
    write(tmp_path, "_BASE_: root.yaml", "left.yaml")
    write(tmp_path, "_BASE_: root.yaml", "right.yaml")
    assert read_yaml(write(tmp_path, "_BASE_: [left.yaml, right.yaml]")) == {"A": 1}


def test_a_circle_is_printed(tmp_path: Path) -> None:
    write(tmp_path, "_BASE_: b.yaml", "a.yaml")
    write(tmp_path, "_BASE_: ./sub/../c.yaml", "b.yaml")
    write(tmp_path, "_BASE_: a.yaml", "c.yaml")
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"circle: got '\S+a\.yaml -> \S+b\.yaml -> \S+c\.yaml -> \S+a\.yaml'"):
        read_yaml(tmp_path / "a.yaml")


def test_bases_that_multiply_are_stopped(tmp_path: Path) -> None:
    write(tmp_path, "A: 1", "level0.yaml")
    for level in range(1, 12):
        below = f"level{level - 1}.yaml"
        write(tmp_path, f"_BASE_: [{below}, {below}]", f"level{level}.yaml")
    assert read_yaml(tmp_path / "level3.yaml") == {"A": 1}
    with pytest.raises(ValueError, match=f"too many files.*allowed: {MAX_FILES} files"):
        read_yaml(tmp_path / "level11.yaml")


@pytest.mark.parametrize("text", ["", "\n\n# only a comment\n", "---\n", "null"])
def test_an_empty_file_is_an_empty_dict(text: str, tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, text)) == {}


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, b"\xef\xbb\xbfSEED: 3\n")) == {"SEED": 3}
    with pytest.raises(ValueError, match="not UTF-8"):
        read_yaml(write(tmp_path, "SEED: 3\n".encode("utf-16")))


def test_aliases_and_merges_within_reason_are_read(tmp_path: Path) -> None:
    text = "A: &a {X: 1, Y: 2}\nB: {<<: *a, Y: 3}\nC: [*a, *a]"
    expected = {"A": {"X": 1, "Y": 2}, "B": {"X": 1, "Y": 3}, "C": [{"X": 1, "Y": 2}, {"X": 1, "Y": 2}]}
    assert read_yaml(write(tmp_path, text)) == expected


def laughs(levels: int) -> str:
    rows = ["L0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"L{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(rows)


# Text of the file -> what the refusal says.
BROKEN: dict[str, tuple[str | bytes, str]] = {
    "twice": (
        "SEED: 1\nVIS_PERIOD: 1\nSEED: 2",
        r"key is given twice: got 'SEED'.*in line 1 already.*line 3",
    ),
    "twice, nested": (
        "SOLVER:\n  MAX_ITER: 1\n  MAX_ITER: 1",
        r"twice: got 'MAX_ITER'.*line 2.*c\.yaml, line 3",
    ),
    "twice, quoted": ("SEED: 1\n'SEED': 2", r"key is given twice: got 'SEED'"),
    "two merges": ("A: &a {X: 1}\nB: {<<: *a, <<: *a}", r"key is given twice: got '<<'"),
    "tab": ("SOLVER:\n\tMAX_ITER: 3", r"not YAML.*\\t.*spaces \(no tabs\).*line 2"),
    "open bracket": ("SEED: [1, 2", r"not YAML.*expected.*line"),
    "bad indent": ("SOLVER:\n    MAX_ITER: 3\n  BASE_LR: 1.0", r"not YAML.*BASE_LR.*line 3"),
    "control character": (b"SEED: 1\x00", r"not YAML.*special characters"),
    "latin-1": ("SEED: 1\nOUTPUT_DIR: über".encode("latin-1"), r"not UTF-8: got b'\\xfc.*c\.yaml, line 2"),
    "list": ("- SEED\n- 3", r"not a mapping: got \['SEED', 3\].*KEY: value"),
    "scalar": ("SEED", r"not a mapping: got 'SEED'"),
    "two documents": ("SEED: 1\n---\nSEED: 2", r"not YAML.*document"),
    "number as key": ("1: 2", r"key is not text: got '1'.*quotes.*line 1"),
    "on as key": ("SOLVER: {on: 2}", r"key is not text: got 'on'"),
    "list as key": ("? [a, b]\n: 1", r"key is not text"),
    "equals sign": ("SEED: =", r"value cannot be read"),
    "endless number": ("SEED: " + "9" * 5000, r"value cannot be read.*digits"),
    "unknown alias": ("SEED: *nobody", r"not YAML.*undefined alias.*line 1"),
    "alias of itself": ("SEED: &a [*a]", r"alias contains itself"),
    "billion laughs": (laughs(9), r"aliases blow the file up: got '\d{10} values'"),
    "deep": ("A: " + "[" * 5000, r"nested too deeply"),
    "large": ("#" * (MAX_BYTES + 1), rf"too large.*{MAX_BYTES} bytes"),
    "base: number": ("_BASE_: 3", r"_BASE_ is not a path: got 3.*_BASE_ in .*c\.yaml"),
    "base: empty": ("_BASE_: ''", r"_BASE_ is not a path: got ''"),
    "base: null": ("_BASE_:", r"_BASE_ is not a path: got None"),
    "base: mapping": ("_BASE_: {a: b.yaml}", r"_BASE_ is not a path: got \{'a': 'b\.yaml'\}"),
    "base: list of lists": ("_BASE_: [[b.yaml]]", r"_BASE_ is not a path: got \['b\.yaml'\]"),
    "base: missing": ("_BASE_: none.yaml", r"file does not exist: got '.*none\.yaml'.*_BASE_ in .*c\.yaml"),
    "base: folder": ("_BASE_: .", r"configuration is a folder"),
    "base: itself": ("_BASE_: c.yaml", r"circle: got '\S+c\.yaml -> \S+c\.yaml'"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(write(tmp_path, text))
    assert_four_parts(str(caught.value))


def test_twin_detectron2_loses_the_first_of_two_equal_keys(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(write(tmp_path, "VERSION: 2\nSEED: 1\nSEED: 2")))
    assert cfg.SEED == 2


def test_missing_files_devices_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file does not exist: got '.*/none\.yaml'.*--config-file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"file does not exist: got '/dev/zero'"):
        load_config("/dev/zero")
    with pytest.raises(ValueError, match="configuration is a folder"):
        load_config(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match="file does not exist"):
        load_config(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ValueError, match="file does not exist"):
        load_config(tmp_path / "loop.yaml")


def test_a_group_over_a_value_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "SOLVER: {STEPS: [1]}", "base.yaml")
    with pytest.raises(ValueError, match=r"SOLVER\.STEPS is a group of keys here and one value in _BASE_"):
        read_yaml(write(tmp_path, "_BASE_: base.yaml\nSOLVER: {STEPS: {A: 1}}"))


def assert_four_parts(message: str) -> None:
    parts = re.fullmatch(r"(.+): got (.*); allowed: (.+); change (.+)", message)
    assert parts and all(parts.groups()), message
    assert "\n" not in message


# -------------------------------------------------------------------------- keys and values: some 40 mistakes

# A line of the file -> what the refusal says. The file is c.yaml throughout.
WRONG_IN_FILE: dict[str, tuple[str, str]] = {
    "misspelt leaf": (
        "SOLVER: {MAX_ITERS: 3}",
        r"SOLVER\.MAX_ITERS is no known key.*is SOLVER\.MAX_ITER; change",
    ),
    "right leaf, wrong group": ("MODEL: {VARIANT: a}", r"MODEL\.VARIANT .*is MODEL\.BACKBONE\.VARIANT;"),
    "group forgotten": ("MAX_EPOCHS: 3", r"MAX_EPOCHS .*is SOLVER\.MAX_EPOCHS;"),
    "misspelt group": ("SOLVERS: {MAX_ITER: 3}", r"SOLVERS is no known key.*is SOLVER;"),
    "misspelt inner group": ("SOLVER: {AMPS: {DTYPE: a}}", r"SOLVER\.AMPS .*is SOLVER\.AMP;"),
    "lower case": ("solver: {max_iter: 3}", r"solver is no known key.*is SOLVER;"),
    "transposed": ("SOLVER: {IMS_PER_BTACH: 3}", r"is SOLVER\.IMS_PER_BATCH;"),
    "classes": ("MODEL: {NUM_CLASSES: 3}", r"MODEL\.NUM_CLASSES .*is MODEL\.HEAD\.NUM_CLASSES;"),
    "base, nested": ("MODEL: {_BASE_: a.yaml}", r"MODEL\._BASE_ is no known key"),
    "nothing near": ("XYZ: 3", r"XYZ is no known key.*a key of detectron2 or of imgcls/config/defaults\.py"),
    "text for int": (
        "SOLVER: {MAX_ITER: many}",
        r"wrong type: got 'many'; allowed: a whole number \(int\); .*MAX_ITER",
    ),
    "float for int": ("SOLVER: {MAX_ITER: 1.5}", r"wrong type: got 1\.5; allowed: a whole number"),
    "bool for int": ("SOLVER: {MAX_ITER: yes}", r"wrong type: got True; allowed: a whole number"),
    "nothing for int": ("SOLVER: {MAX_ITER: }", r"wrong type: got None; allowed: a whole number"),
    "list for float": ("SOLVER: {BASE_LR: [0.1]}", r"wrong type: got \[0\.1\]; allowed: a number \(float\)"),
    "int for bool": (
        "MODEL: {HEAD: {RESET: 1}}",
        r"wrong type: got 1; allowed: True or False.*MODEL\.HEAD\.RESET",
    ),
    "int for text": ("OUTPUT_DIR: 3", r"wrong type: got 3; allowed: text"),
    "text for list": (
        "DATASETS: {TRAIN: digits}",
        r"wrong type: got 'digits'; allowed: a list.*DATASETS\.TRAIN",
    ),
    "value for group": ("SOLVER: 3", r"wrong type: got 3; allowed: a group of keys: .*MAX_ITER.*SOLVER in "),
    "nothing for group": ("SOLVER:", r"wrong type: got None; allowed: a group of keys"),
    "group for value": ("SEED: {A: 1}", r"wrong type: got \{'A': 1\}; allowed: a whole number.*SEED in "),
    "set for None": ("SOLVER: {WEIGHT_DECAY_BIAS: '{1}'}", r"wrong type: got \{1\}"),
    "later version": ("VERSION: 3", r"version is unknown: got 3; allowed: 0 to 2"),
    "text as version": ("VERSION: new", r"version is unknown: got 'new'"),
    "negative version": ("VERSION: -1", r"version is unknown: got -1"),
    "unhashable": ("SEED: '{[]: 1}'", r"value cannot be read: got '\{\[\]: 1\}'"),
}


@pytest.mark.parametrize(("text", "message"), WRONG_IN_FILE.values(), ids=WRONG_IN_FILE)
def test_a_mistake_in_a_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    version = "" if "VERSION" in text else "VERSION: 2\n"
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(tmp_path, version + text))
    assert_four_parts(str(caught.value))
    assert str(tmp_path / "c.yaml") in str(caught.value)


WRONG_IN_OVERRIDES: dict[str, tuple[Any, str]] = {
    "odd": (["SOLVER.MAX_ITER", "3", "SEED"], r"last override has no value: got 'SEED'; allowed: KEY VALUE"),
    "one word": (["SOLVER.MAX_ITER"], r"last override has no value: got 'SOLVER\.MAX_ITER'"),
    "equals": (
        ["SOLVER.MAX_ITER=3"],
        r"no key that can be set: got 'SOLVER\.MAX_ITER=3'; allowed: KEY VALUE",
    ),
    "lower case": (["solver.max_iter", "3"], r"solver is no known key|nearest known key is SOLVER"),
    "no dot": (
        ["MAX_ITER", "3"],
        r"MAX_ITER is no known key.*is SOLVER\.MAX_ITER; change MAX_ITER in the command",
    ),
    "flag": (["--num-gpus", "3"], r"--num-gpus is no known key"),
    "swapped": (["3", "SOLVER.MAX_ITER"], r"3 is no known key"),
    "misspelt": (
        ["SOLVER.BASE_RL", "0.1"],
        r"SOLVER\.BASE_RL is no known key: got '0\.1'.*is SOLVER\.BASE_LR;",
    ),
    "unknown group": (["MODEL.BACKBON.NAME", "a"], r"BACKBON is no known key.*MODEL\.BACKBONE"),
    "two dots": (["SOLVER..MAX_ITER", "3"], r"SOLVER\. is no known key"),
    "empty": (["", "3"], r"no known key"),
    "below a value": (["SEED.X", "3"], r"wrong type: got \{'X': '3'\}; allowed: a whole number"),
    "group": (["SOLVER.AMP", "True"], r"wrong type: got True; allowed: a group of keys: ENABLED, DTYPE"),
    "text for int": (
        ["SOLVER.MAX_ITER", "many"],
        r"wrong type: got 'many'.*SOLVER\.MAX_ITER in the command line",
    ),
    "float for int": (["SOLVER.MAX_ITER", "3.0"], r"wrong type: got 3\.0; allowed: a whole number"),
    "nan is text": (["SOLVER.BASE_LR", "nan"], r"wrong type: got 'nan'; allowed: a number"),
    "base": (["_BASE_", "a.yaml"], r"no key that can be set: got '_BASE_'"),
    "version": (["VERSION", "1"], r"version belongs to a file: got 1; allowed: 2"),
    "one text": ("SOLVER.MAX_ITER 3", r"overrides are one text: got 'SOLVER\.MAX_ITER 3'; allowed: a list"),
    "number as key": ([3, "SEED"], r"no key that can be set: got 3"),
    "deep": (["SEED", "[" * 100_000], r"value cannot be read|wrong type"),
}


@pytest.mark.parametrize(("words", "message"), WRONG_IN_OVERRIDES.values(), ids=WRONG_IN_OVERRIDES)
def test_a_mistake_on_the_command_line_is_named(words: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config([], words)
    assert_four_parts(str(caught.value))
    assert str(caught.value).endswith("the command line")


def test_a_mistake_in_a_base_names_the_base_not_the_leaf(tmp_path: Path) -> None:
    write(tmp_path, "VERSION: 2\nSEDE: 1", "base.yaml")
    with pytest.raises(ValueError, match=r"is SEED; change SEDE in \S*base\.yaml$"):
        load_config(write(tmp_path, "_BASE_: base.yaml"))


def test_twin_the_same_keys_spelt_right_are_taken(tmp_path: Path) -> None:
    text = 'VERSION: 2\nSOLVER: {MAX_ITER: 3, BASE_LR: 1e-3, STEPS: "(1, 2)"}\nMODEL: {BACKBONE: {VARIANT: a}}'
    cfg = load_config(write(tmp_path, text), ["SOLVER.AMP.ENABLED", "True", "DATASETS.TRAIN", "('a', 'b')"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (3, 0.001, (1, 2))
    assert cfg.SOLVER.AMP.ENABLED is True and cfg.DATASETS.TRAIN == ("a", "b")


def test_a_whole_number_will_do_for_a_float_but_not_the_reverse(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, "VERSION: 2\nSOLVER: {BASE_LR: 0}"), ["SOLVER.MAX_EPOCHS", "3"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_EPOCHS) == (0.0, 3.0)
    assert {type(cfg.SOLVER.BASE_LR), type(cfg.SOLVER.MAX_EPOCHS)} == {float}
    with pytest.raises(ValueError, match="wrong type"):
        load_config([], ["SOLVER.BASE_LR", "True"])
    with pytest.raises(ValueError, match="wrong type"):
        load_config([], ["SOLVER.BASE_LR", "1" + "0" * 400])


def test_values_of_the_command_line_are_read_once(tmp_path: Path) -> None:
    cfg = load_config([], ["OUTPUT_DIR", "'5'", "MODEL.WEIGHTS", "a b.pth", "SEED", 7])
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.SEED) == ("5", "a b.pth", 7)


def test_a_group_given_as_a_literal_is_merged_not_replaced() -> None:
    cfg = load_config([], ["SOLVER.AMP", "{'ENABLED': True}"])
    assert cfg.SOLVER.AMP == {"ENABLED": True, "DTYPE": "float16"}


def test_a_node_that_allows_new_keys_takes_them(tmp_path: Path) -> None:
    start = get_cfg()
    start.EXTRA = CfgNode(new_allowed=True)
    assert load_config(write(tmp_path, "VERSION: 2\nEXTRA: {A: {B: 1}}"), cfg=start).EXTRA == {"A": {"B": 1}}
    with pytest.raises(ValueError, match="EXTRA is no known key"):
        load_config(tmp_path / "c.yaml")


# ----------------------------------------------------------------------------------------- files of version 1


V1 = "MODEL: {WEIGHT: w.pkl, RPN: {ANCHOR_SIZES: [[8]]}, ROI_HEADS: {NMS: 0.3}}\nTEST: {AUG_ON: True}"


@pytest.mark.parametrize("version", ["", "VERSION: 1\n", "VERSION: 0\n"])
def test_an_old_file_is_upgraded_as_detectron2_does(version: str, tmp_path: Path, log: list[str]) -> None:
    path = write(tmp_path, version + V1)
    cfg, stock = load_config(path), get_cfg()
    stock.merge_from_file(str(path))
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.ANCHOR_GENERATOR.SIZES) == ("w.pkl", [[8]])
    assert (cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, cfg.TEST.AUG.ENABLED, cfg.VERSION) == (0.3, True, 2)
    assert all(leaves(cfg)[key] == value for key, value in leaves(stock).items())
    assert cfg.INPUT.TRAIN_SIZE == 224  # our keys survive the way down and up
    assert any("upgrading it to v2" in line for line in log)


def test_twin_old_keys_in_a_new_file_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHT is no known key.*is MODEL\.WEIGHTS;"):
        load_config(write(tmp_path, "VERSION: 2\n" + V1))


@pytest.mark.parametrize("text", ["MODEL: WEIGHT", "MODEL: 3", "TEST: [AUG_ON]", "MODEL:"])
def test_guessing_the_version_survives_a_value_for_a_group(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wrong type.*a group of keys"):
        load_config(write(tmp_path, text))


# -------------------------------------------------------------------- iterations on the command line, judging


RECIPE = """VERSION: 2
DATASETS:
  TRAIN: ("a",)
  TEST: ("b",)
SOLVER:
  IMS_PER_BATCH: 64
  MAX_EPOCHS: 90.0
  WARMUP_EPOCHS: 5.0
  STEPS_EPOCHS: [30, 60]
  CHECKPOINT_EPOCHS: 1.0
  DECAY_EPOCHS: 2.4
TEST:
  EVAL_EPOCHS: 2.0
  EXPECTED_RESULTS: [["classification", "top1", 70.6, 0.5]]
"""
PAIRS = [
    ("SOLVER.MAX_ITER", "3", "SOLVER.MAX_EPOCHS", 90.0, 0.0),
    ("SOLVER.WARMUP_ITERS", "2", "SOLVER.WARMUP_EPOCHS", 5.0, 0.0),
    ("SOLVER.STEPS", "(1, 2)", "SOLVER.STEPS_EPOCHS", [30, 60], []),
    ("SOLVER.CHECKPOINT_PERIOD", "4", "SOLVER.CHECKPOINT_EPOCHS", 1.0, 0.0),
    ("SOLVER.DECAY_ITERS", "6", "SOLVER.DECAY_EPOCHS", 2.4, 0.0),
    ("TEST.EVAL_PERIOD", "5", "TEST.EVAL_EPOCHS", 2.0, 0.0),
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path, RECIPE)


@pytest.mark.parametrize(("iterations", "value", "epochs", "of_file", "off"), PAIRS, ids=[p[0] for p in PAIRS])
def test_iterations_on_the_command_line_win_over_epochs(
    iterations: str, value: str, epochs: str, of_file: Any, off: Any, recipe: Path, log: list[str]
) -> None:
    assert leaves(load_config(recipe))[epochs] == of_file
    flat = leaves(load_config(recipe, [iterations, value]))
    assert flat[epochs] == off and str(flat[iterations]) == value
    assert {key: flat[key] for _, _, key, _, _ in PAIRS if key != epochs} == {
        key: given for _, _, key, given, _ in PAIRS if key != epochs
    }
    assert [line for line in log if "replaces" in line] == [
        f"{iterations} given on the command line replaces {epochs} {of_file}"
    ]


def test_of_iterations_and_epochs_the_later_word_wins(recipe: Path) -> None:
    later_epochs = load_config(recipe, ["SOLVER.MAX_ITER", "3", "SOLVER.MAX_EPOCHS", "2"])
    later_iterations = load_config(recipe, ["SOLVER.MAX_EPOCHS", "2", "SOLVER.MAX_ITER", "3"])
    assert (later_epochs.SOLVER.MAX_EPOCHS, later_iterations.SOLVER.MAX_EPOCHS) == (2.0, 0.0)
    in_a_group = load_config(recipe, ["SOLVER", "{'MAX_ITER': 3}"])
    assert in_a_group.SOLVER.MAX_EPOCHS == 0.0


def test_iterations_in_the_file_do_not_win(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, "VERSION: 2\nSOLVER: {MAX_EPOCHS: 90.0, MAX_ITER: 3}"))
    assert (cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.MAX_ITER) == (90.0, 3)


def test_iterations_are_no_matter_for_a_stock_config() -> None:
    assert load_config([], ["SOLVER.MAX_ITER", "3"], cfg=get_cfg()).SOLVER.MAX_ITER == 3


EXPECTED = [["classification", "top1", 70.6, 0.5]]
JUDGED = [
    [],
    ["SOLVER.BASE_LR", "0.1", "SEED", "3", "OUTPUT_DIR", "there"],
    ["SOLVER.IMS_PER_BATCH", "64", "DATASETS.TRAIN", "['a']", "SOLVER.MAX_EPOCHS", "90"],
    ["SOLVER.CHECKPOINT_PERIOD", "7"],
    ["DATASETS.ROOT", "there"],
]
NOT_JUDGED = {
    "DATASETS.TRAIN": ["DATASETS.TRAIN", "('c',)"],
    "DATASETS.TEST": ["DATASETS.TEST", "('b', 'c')"],
    "SOLVER.IMS_PER_BATCH": ["SOLVER.IMS_PER_BATCH", "32"],
    "SOLVER.MAX_EPOCHS": ["SOLVER.MAX_EPOCHS", "1"],
    "SOLVER.MAX_ITER, SOLVER.MAX_EPOCHS": ["SOLVER.MAX_ITER", "3"],
}


@pytest.mark.parametrize("words", JUDGED, ids=str)
def test_a_run_of_the_files_own_is_judged(words: list[str], recipe: Path, log: list[str]) -> None:
    assert load_config(recipe, words).TEST.EXPECTED_RESULTS == EXPECTED
    assert not any("not judged" in line for line in log)


@pytest.mark.parametrize(("changed", "words"), NOT_JUDGED.items(), ids=NOT_JUDGED)
def test_a_changed_run_is_not_judged(changed: str, words: list[str], recipe: Path, log: list[str]) -> None:
    assert load_config(recipe, words).TEST.EXPECTED_RESULTS == []
    said = [line for line in log if line.startswith("not judged: ")]
    assert len(said) == 1 and said[0].endswith(f"the changed {changed}")


def test_expected_results_given_on_the_command_line_are_judged(recipe: Path, log: list[str]) -> None:
    words = ["SOLVER.MAX_ITER", "3", "TEST.EXPECTED_RESULTS", "[['classification', 'top1', 10.0, 5.0]]"]
    assert load_config(recipe, words).TEST.EXPECTED_RESULTS == [["classification", "top1", 10.0, 5.0]]
    assert not any("not judged" in line for line in log)


def test_nothing_is_said_where_nothing_was_expected(log: list[str]) -> None:
    load_config([], ["SOLVER.MAX_ITER", "3"])
    assert log == []


# --------------------------------------------------------------------------------------------- packaged files

A_CONFIG = "detection/resnet50_retinanet_fpn.yaml"


def test_packaged_configs_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert A_CONFIG in list_configs() and list_configs() == sorted(list_configs())
    assert (config_root() / "sweeps/digits.yaml").is_file() and "sweeps/digits.yaml" not in list_configs()
    assert get_config(A_CONFIG).MODEL.BACKBONE.VARIANT == "resnet50"
    assert get_config(A_CONFIG, ["SEED", "3"]).SEED == 3
    assert find_config(A_CONFIG) == find_config(f"configs/{A_CONFIG}") == config_root() / A_CONFIG


def test_an_existing_path_wins_over_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = write(tmp_path, "SEED: 5", A_CONFIG)
    assert find_config(A_CONFIG) == Path(A_CONFIG) and find_config(mine) == mine
    assert get_config(A_CONFIG).SEED == -1


@pytest.mark.parametrize(
    "name", ["../README.md", "detection/../../setup.py", "/etc/hostname-that-is-not", "configs/../x"]
)
def test_a_name_does_not_leave_the_folder(name: str) -> None:
    for find in (find_config, get_config):
        with pytest.raises(ValueError, match=r"leaves configs/: got '.*a name below configs/"):
            find(name)


def test_an_existing_file_outside_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config_root())
    outside = write(tmp_path, "SEED: 5")
    with pytest.raises(ValueError, match="leaves configs/"):
        get_config(str(outside))
    assert find_config(outside) == outside


@pytest.mark.parametrize(
    "name", ["detection/resnet50_retinanet.yaml", "resnet50_retinanet_fpn.yaml", "configs/detection"]
)
def test_an_unknown_name_lists_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no such file or packaged config: got '{name}'; allowed: .*detection/"):
        find_config(name)


def test_the_nearest_name_comes_first() -> None:
    with pytest.raises(ValueError, match=f"allowed: {re.escape(A_CONFIG)}"):
        get_config("detection/resnet_50_retinanet_fpn.yaml")
