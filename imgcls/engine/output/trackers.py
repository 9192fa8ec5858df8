"""MLflow and Weights & Biases behind one interface: a run's scalars, delivered beside the training.

A service that is slow or away costs the training nothing: a thread of its own delivers, waits and tries again. What has
not arrived when the run ends is given up; ``metrics.json`` has it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import secrets
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.events import EventWriter, get_event_storage

from imgcls.config import add_imgcls_config, register_check
from imgcls.modeling import is_classifier
from imgcls.structures import Problem, first_line

logger = logging.getLogger(__name__)

RETRY_AFTER = 20.0  # seconds, when something was not delivered
PATIENCE = 30.0  # seconds at the end of a run, for what is still under way
_SMOOTHED = 20  # iterations, as detectron2's own writers

Line = tuple[int, dict[str, float]]  # iteration, scalars


class Tracker(EventWriter):
    """Delivers to a service what the event storage holds; a subclass says how to open, log and finish a run there.

    folder: the run's OUTPUT_DIR, which remembers the run's id at the service, so that a resumed run goes on there.
    settings: keys of the config that are not the defaults, dotted, with their values as text.
    """

    name = ""
    module = ""  # to import

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder, self.settings = folder, settings
        self._written = -1
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name=self.name, daemon=True)
        self._thread.start()

    @classmethod
    def of_run(cls, cfg: CfgNode) -> Callable[[], Tracker]:
        """What builds the tracker of this run."""
        return partial(cls, Path(cfg.OUTPUT_DIR), stated(cfg))

    @abstractmethod
    def open(self) -> None:
        """Begin the run at the service, or go on with the one that ``folder`` remembers."""

    @abstractmethod
    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        """Deliver the scalars of one iteration."""

    @abstractmethod
    def finish(self) -> None:
        """Tell the service that the run is over."""

    def write(self) -> None:
        """Take what is new in the storage; returns at once."""
        lines: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(_SMOOTHED).items():
            if iteration > self._written:
                lines.setdefault(iteration, {})[name] = float(value)
        for iteration in sorted(lines):
            self._lines.put((iteration, lines[iteration]))
            self._written = iteration

    def close(self) -> None:
        self._lines.put(None)
        self._ending.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning("%s does not answer; metrics.json has what did not arrive there", self.name)

    def _deliver(self) -> None:
        """What the thread does: one action after the other, each until it has worked."""
        warned = False
        for action in self._actions():
            while True:
                last_try = self._ending.is_set()
                try:
                    action()
                    break
                except Exception as error:
                    if not warned:
                        text = "%s cannot be reached, training goes on (metrics.json has everything): %s"
                        logger.warning(text, self.name, first_line(error))
                    warned = True
                if last_try:
                    return
                self._ending.wait(RETRY_AFTER)

    def _actions(self) -> Iterator[Callable[[], None]]:
        yield self.open
        for line in iter(self._lines.get, None):
            yield partial(self.log, *line)
        yield self.finish

    def remembered(self, make: Callable[[], str]) -> str:
        """The id of this run at the service; made, and written into ``folder``, when there is none yet."""
        file = self.folder / f"{self.name}_run.txt"
        known = file.read_text(encoding="utf-8").strip() if file.exists() else ""
        if not known:
            known = make()
            file.write_text(f"{known}\n", encoding="utf-8")
        return known


class MLflowTracker(Tracker):
    """Delivers to MLFLOW_TRACKING_URI (files in OUTPUT_DIR/mlruns without it), experiment MLFLOW_EXPERIMENT_NAME."""

    name = module = "mlflow"

    def open(self) -> None:
        # Importing it is slow, and its own default would be a database in the working directory.
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (self.folder / "mlruns").absolute().as_uri()
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 refuses plain files without it
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._run = self.remembered(self._new_run)
        params = [Param(key, value[:500]) for key, value in self.settings.items()]
        known = self._client.get_run(self._run).data.params
        self._client.log_batch(self._run, params=[param for param in params if param.key not in known])

    def _new_run(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "imgcls")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        return str(self._client.create_run(number, run_name=self.folder.name).info.run_id)

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[Metric(k, v, now, iteration) for k, v in scalars.items()])

    def finish(self) -> None:
        self._client.set_terminated(self._run)


class WandbTracker(Tracker):
    """Delivers to the project WANDB_PROJECT (imgcls without it); its own WANDB_MODE=offline keeps all in OUTPUT_DIR."""

    name = module = "wandb"

    def open(self) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "imgcls"),
            dir=self.folder,
            name=self.folder.name,
            id=self.remembered(partial(secrets.token_hex, 6)),
            resume="allow",
            config=self.settings,
        )

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=iteration)

    def finish(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (MLflowTracker, WandbTracker)}


def stated(cfg: CfgNode) -> dict[str, str]:
    """The keys of ``cfg`` whose values are not the defaults, dotted."""
    return dict(_differences(cfg, add_imgcls_config(get_cfg())))


def _differences(ours: CfgNode, theirs: CfgNode, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in ours.items():
        if isinstance(value, CfgNode):
            yield from _differences(value, theirs.get(key, CfgNode()), f"{prefix}{key}.")
        elif key not in theirs or theirs[key] != value:
            yield prefix + key, str(value)


@register_check
def check_writers(cfg: CfgNode) -> list[Problem]:
    """What ``SOLVER.WRITERS`` names must be installed; the service itself may be away."""
    if not is_classifier(cfg):
        return []
    absent = [
        name
        for name in cfg.SOLVER.WRITERS
        if name in TRACKERS and importlib.util.find_spec(TRACKERS[name].module) is None
    ]
    what = "the writer takes a package that is not installed"
    return [Problem(what, name, f"after pip install 'imgcls[{name}]'", "SOLVER.WRITERS") for name in absent]
