"""From the bytes of a YAML file to a plain dict, without running anything that is written in it.

detectron2's own ``merge_from_file`` calls ``yaml.unsafe_load`` as soon as it meets a ``!!python`` tag, here or in a
``_BASE_``, even a remote one; so nothing here goes through it.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import yaml
from fvcore.common.config import BASE_KEY

from imgcls.structures.problem import Problem

StrPath = str | os.PathLike[str]
Tree = dict[str, Any]

# Far above any honest config (detectron2's full dump has 10 KB and 700 nodes), far below what hurts.
MAX_BYTES = 256 * 1024  # of one file
MAX_NODES = 50_000  # of one file, with every alias written out
MAX_FILES = 20  # read for one config, a file inherited twice counting twice
MAX_SHOWN = 2000  # characters of a value in a message

# The tagged value of a stock file, as written there -> what it means. The file is known by the SHA-256 of its
# bytes: one changed byte makes it a stranger, its tag is refused. All else is read from the file as usual.
_RETINANET_SIZES = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"
STOCK_LITERALS: dict[str, dict[str, Any]] = {
    # detectron2/model_zoo/configs/Base-RetinaNet.yaml
    "b3f717f0d46bc443a69e616fe716c1d6768ab86d1f52b4b01715ca9c42a657d6": {
        f'!!python/object/apply:eval ["{_RETINANET_SIZES}"]': [
            [size, size * 2 ** (1.0 / 3), size * 2 ** (2.0 / 3)] for size in (32, 64, 128, 256, 512)
        ],
    },
}

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def refuse(what: str, value: object, allowed: str, key: str) -> NoReturn:
    shown = value if len(repr(value)) <= MAX_SHOWN else f"{repr(value)[:MAX_SHOWN]}..."
    raise Problem(what, shown, allowed, key).error()


def read_yaml(path: StrPath) -> Tree:
    """The YAML file at ``path`` with what it inherits through ``_BASE_``, as a plain dict.

    ``_BASE_`` names one local file or a list of them (relative to the file that says it, absolute, or ``~``);
    later ones win, the file itself wins over all. Tags, duplicate keys, URLs and cycles are a ``ValueError``.
    """
    return YamlReader().read(path)


class YamlReader:
    """Reads one file and its ancestors, and remembers which file gave each key."""

    def __init__(self) -> None:
        self.origins: dict[str, str] = {}
        self._files_read = 0

    def read(self, path: StrPath, chain: tuple[str, ...] = ()) -> Tree:
        name = os.path.expanduser(os.fspath(path))
        asked_by = f"{BASE_KEY} in {chain[-1]}" if chain else "the path of the configuration (--config-file)"
        _refuse_foreign(name, asked_by)
        self._refuse_endless(name, chain)
        tree = _parse(_bytes_of(name, asked_by), name)
        merged: Tree = {}
        for base in _bases(tree.pop(BASE_KEY, []), name):
            merged = overlaid(merged, self.read(base, (*chain, name)), base)
        self.origins.update((key, name) for key, _ in walk(tree))
        return overlaid(merged, tree, name)

    def _refuse_endless(self, name: str, chain: tuple[str, ...]) -> None:
        if os.path.realpath(name) in map(os.path.realpath, chain):
            shown = " -> ".join((*chain, name))
            refuse(f"{BASE_KEY} runs in a circle", shown, "a chain that ends", f"{BASE_KEY} in {chain[-1]}")
        self._files_read += 1
        if self._files_read > MAX_FILES:
            what = "the configuration inherits from too many files"
            refuse(what, self._files_read, f"{MAX_FILES} files", f"{BASE_KEY} in {chain[-1]}")


def _refuse_foreign(name: str, asked_by: str) -> None:
    if _SCHEME.match(name):
        allowed = "a local file; nothing is fetched for a configuration"
        refuse("a configuration is not read from a URL", name, allowed, asked_by)
    if name.lower().endswith(".py"):
        allowed = "a .yaml file; Python files (LazyConfig) are programs and are not run"
        refuse("the configuration is a Python file", name, allowed, asked_by)


def _bytes_of(name: str, asked_by: str) -> bytes:
    # isfile first: a pipe or a device would block or never end.
    if not os.path.isfile(name):
        is_what = "is a folder" if os.path.isdir(name) else "file does not exist"
        refuse(f"the configuration {is_what}", name, "an existing YAML file", asked_by)
    try:
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        refuse("the configuration file cannot be read", error.strerror, "a readable file", name)
    if len(data) > MAX_BYTES:
        refuse("the configuration file is too large", f"over {MAX_BYTES} bytes", f"{MAX_BYTES} bytes", name)
    return data


def parse_yaml(text: str, name: str) -> Tree:
    """What ``text`` says, plain values only; name: what to call it in an error. A mistake is a ``ValueError``."""
    return _parse(text.encode(), name)


def _parse(data: bytes, name: str) -> Tree:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        value = data[error.start : error.start + 4]
        refuse("the file is not UTF-8", value, "text in UTF-8", f"{name}, line {line}")
    literals = STOCK_LITERALS.get(hashlib.sha256(data).hexdigest(), {})
    tree = _construct(text, name, literals)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        refuse("the file is not a mapping", tree, "lines of the form KEY: value", name)
    return tree


def _construct(text: str, name: str, literals: Mapping[str, Any]) -> Any:
    try:
        loader = _PlainLoader(text, name, literals)
        node = loader.get_single_node()
        _refuse_explosion(node, name)
    except yaml.YAMLError as error:
        _refuse_syntax(error, text, name)
    except RecursionError:
        refuse("the file is nested too deeply", "...", "a few levels", name)
    try:
        return loader.construct_document(node) if node else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of over 4300 digits
        refuse("a value cannot be read", str(error), "plain YAML values", name)


class _PlainLoader(yaml.SafeLoader):
    """Takes text keys, each once, and plain values; refuses while composing, before any value is made."""

    STOCK_TAG = "imgcls-stock-literal"  # nobody can write it in a file: compose_node meets every written tag
    # Without timestamps: 2024-01-31 stays text, as an output folder may be called.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, name: str, literals: Mapping[str, Any]) -> None:
        super().__init__(text)
        self.text, self.file_name, self.literals = text, name, literals

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The node, unless a tag is written before it."""
        tag = getattr(self.peek_event(), "tag", None)
        node = super().compose_node(parent, index)
        if tag is None or node is None:
            return node
        written = self.text[node.start_mark.index : node.end_mark.index]
        if written not in self.literals:
            self._refuse_at("a tag is written in the file", tag, "plain values; tags can run code", node)
        return yaml.ScalarNode(self.STOCK_TAG, written, node.start_mark, node.end_mark)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping, unless a key is not text or stands there twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                self._refuse_at("a key is not text", key.value, "text; put it in quotes", key)
            if key.value in lines:
                allowed = f"each key once; it stands in line {lines[key.value]} already"
                self._refuse_at("a key is given twice", key.value, allowed, key)
            lines[key.value] = key.start_mark.line + 1
        return node

    def stock_literal(self, node: yaml.Node) -> Any:
        """What the tagged text of a stock file means."""
        return copy.deepcopy(self.literals[node.value])

    def _refuse_at(self, what: str, value: object, allowed: str, node: yaml.Node) -> NoReturn:
        refuse(what, value, allowed, f"{self.file_name}, line {node.start_mark.line + 1}")


_PlainLoader.add_constructor(_PlainLoader.STOCK_TAG, _PlainLoader.stock_literal)


def _refuse_explosion(root: yaml.Node | None, name: str) -> None:
    """Aliases of aliases grow exponentially when written out ("billion laughs"), or without end."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: frozenset[int]) -> int:
        if id(node) in above:
            refuse("an alias contains itself", f"line {node.start_mark.line + 1}", "no loops", name)
        if id(node) not in sizes:
            sizes[id(node)] = 1 + sum(size(child, above | {id(node)}) for child in _children(node))
        return sizes[id(node)]

    values = size(root, frozenset()) if root else 0
    if values > MAX_NODES:
        refuse("aliases blow the file up", f"{values} values", f"{MAX_NODES} values", name)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _refuse_syntax(error: yaml.YAMLError, text: str, name: str) -> NoReturn:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        refuse("the file is not YAML", str(error).splitlines()[0], "printable text", name)
    shown = text.splitlines()[mark.line : mark.line + 1]
    what = f"the file is not YAML ({getattr(error, 'problem', None)})"
    refuse(what, "".join(shown), "YAML, indented by spaces (no tabs)", f"{name}, line {mark.line + 1}")


def _bases(value: object, name: str) -> list[str]:
    bases = value if isinstance(value, list) else [value]
    for base in bases:
        if not isinstance(base, str) or not base:
            allowed = "a local path, or a list of local paths"
            refuse(f"{BASE_KEY} is not a path", base, allowed, f"{BASE_KEY} in {name}")
    expanded = map(os.path.expanduser, bases)
    # A URL keeps its form, so that reading it refuses it as one.
    return [base if _SCHEME.match(base) else os.path.join(os.path.dirname(name), base) for base in expanded]


def overlaid(below: Tree, above: Tree, name: str, prefix: str = "") -> Tree:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and key in below:
            if not isinstance(below[key], dict):
                what = f"{prefix}{key} is a group of keys here and one value in {BASE_KEY}"
                refuse(what, below[key], "the same kind in both", f"{prefix}{key} in {name}")
            value = overlaid(below[key], value, name, f"{prefix}{key}.")
        merged[key] = value
    return merged


def walk(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, groups included."""
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
