"""Weights by name, ``torchvision://resnet50/IMAGENET1K_V2`` and ``timm://resnet50/a1_in1k``: imported on use.

The handlers are registered with detectron2's PathManager, so its checkpointer takes such names too. What a name stands
for is a hand-over file with its head, made once and kept in iopath's cache folder.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, get_cache_dir

from imgcls.checkpoint import is_whole, write_tensors
from imgcls.modeling import all_variants, family_of
from imgcls.structures import Problem
from imgcls.transfer.import_weights import import_weights

logger = logging.getLogger(__name__)

# Libraries whose networks are variants of ours, ``<library>:<name>``, without being listed here.
OPEN = ("timm",)


class LibraryPathHandler(PathHandler):
    """``<library>://<name>[/<tag>]``; the name is the library's or ours.

    A network of timm that no family of ours takes weights from is the variant ``timm:<name>``.
    """

    def __init__(self, library: str) -> None:
        super().__init__()
        self.library = library

    def _get_supported_prefixes(self) -> list[str]:
        return [f"{self.library}://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        name, _, tag = path.removeprefix(f"{self.library}://").strip("/").partition("/")
        variant = self._variant(name, path)
        local = Path(get_cache_dir()) / "imgcls" / self.library / f"{variant.replace(':', '_')}-{tag or 'default'}.pth"
        if force or not is_whole(local):
            imported = import_weights(self.library, variant, tag=tag)
            local.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(local, imported.handover.to_content())
            logger.info("%s: imported from %s into %s", path, imported.origin, local)
        return str(local)

    def _variant(self, name: str, path: str) -> str:
        known: dict[str, str] = {}
        for variant in all_variants():
            source = family_of(variant).sources.get(self.library)
            if source is not None and variant in source.names:
                known.setdefault(source.names[variant], variant)
                if variant == name:
                    return variant
        if name not in known and self.library in OPEN:
            family_of(f"{self.library}:{name}")  # an unknown name is an error that lists the nearest
            return f"{self.library}:{name}"
        if name not in known:
            what = f"no network of ours takes its weights from {self.library}'s"
            raise Problem(what, name, ", ".join(known), path).error()
        return known[name]

    def _isfile(self, path: str, **_: Any) -> bool:
        return True

    def _exists(self, path: str, **_: Any) -> bool:
        return True

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        self._check_kwargs(kwargs)
        if mode not in ("r", "rb"):
            raise ValueError(f"{path} can only be read; got the mode {mode!r}")
        return open(self._get_local_path(path), mode, buffering=buffering)


for _library in ("torchvision", "timm"):
    PathManager.register_handler(LibraryPathHandler(_library), allow_override=True)
