"""detectron2's checkpointer, reading without running code and writing whole files."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from detectron2.checkpoint import DetectionCheckpointer

from imgcls.checkpoint.manifest import newest_whole
from imgcls.checkpoint.reading import read_checkpoint, without_counters
from imgcls.checkpoint.writing import sweep, write_checkpoint
from imgcls.structures import LoadReport


class SafeCheckpointer(DetectionCheckpointer):
    """Drop-in for ``DetectionCheckpointer``: same files, same matching heuristics.

    ``.pkl`` files go through an unpickler that knows arrays only (detectron2's runs whatever is in them), files are
    written to a temporary name first and get a manifest, and resuming takes the newest whole file, whatever
    ``last_checkpoint`` names.
    """

    _parsed_url_during_load: Any  # detectron2's: the URL whose query _load_file reads
    report: LoadReport  # of the last load

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load(path, *args, **kwargs)
        finally:
            # detectron2 forgets to on an error, and then every later load fails.
            self._parsed_url_during_load = None

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        content.update(kwargs)
        folder = Path(self.save_dir)
        sweep(folder)
        self.logger.info("Saving checkpoint to %s", folder / f"{name}.pth")
        iteration = int(kwargs.get("iteration", -1))
        write_checkpoint(folder / f"{name}.pth", content, iteration=iteration, newest=True)

    def has_checkpoint(self) -> bool:
        return bool(self.save_dir) and newest_whole(Path(self.save_dir)) is not None

    def get_checkpoint_file(self) -> str:
        return str(newest_whole(Path(self.save_dir)) or "")

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        missing = set(incompatible.missing_keys)
        wrong = {name for name, *_ in incompatible.incorrect_shapes}
        self.report = LoadReport(
            loaded=tuple(name for name in without_counters(self.model.state_dict()) if name not in missing | wrong),
            missing=tuple(sorted(missing - wrong)),
            unexpected=tuple(incompatible.unexpected_keys),
            wrong_shape=tuple((name, tuple(a), tuple(b)) for name, a, b in incompatible.incorrect_shapes),
        )
        return incompatible

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_checkpoint(filename)
        if filename.endswith(".pkl"):
            return _from_zoo(content)
        if filename.endswith(".pyth") and "model_state" in content["model"]:
            model = content["model"]["model_state"]
            return {"model": model, "__author__": "pycls", "matching_heuristics": True}
        query = parse_qs(self._parsed_url_during_load.query)
        if query.pop("matching_heuristics", ["False"]) == ["True"]:
            content["matching_heuristics"] = True
        if query:
            raise ValueError(f"unknown query {query} in MODEL.WEIGHTS; allowed: matching_heuristics=True")
        return content


def _from_zoo(content: dict[str, Any]) -> dict[str, Any]:
    """What a ``.pkl`` means to detectron2: its own format has an author, anything else comes from Caffe2."""
    if "__author__" in content:
        return content
    arrays = content["model"].get("blobs", content["model"])
    arrays = {name: array for name, array in arrays.items() if not name.endswith("_momentum")}
    return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}
