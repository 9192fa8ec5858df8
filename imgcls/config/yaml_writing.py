"""From a config to YAML text: what of it is not the default, in plain values that any reader takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from detectron2.config import CfgNode


def changed_from(default: Mapping[str, Any], cfg: CfgNode) -> dict[str, Any]:
    """What of ``cfg`` is not as in ``default``, nested as it stands there; ``VERSION`` stays."""
    changed: dict[str, Any] = {"VERSION": cfg.VERSION} if "VERSION" in cfg else {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            inner = changed_from(default.get(key, {}), value)
            if inner:
                changed[key] = inner
        elif key not in default or default[key] != value:
            changed[key] = value
    return changed


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"MODEL.WEIGHTS": x} -> {"MODEL": {"WEIGHTS": x}}."""
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        node = tree
        *groups, leaf = dotted.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


def as_yaml(tree: Mapping[str, Any]) -> str:
    """YAML text without Python tags; tuples become lists."""
    return str(yaml.safe_dump(_plain(tree), sort_keys=True, default_flow_style=None, width=120))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
