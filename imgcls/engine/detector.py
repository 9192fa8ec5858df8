"""Training a detector: detectron2's own trainer, started from weights that are known to have arrived."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, TrainerBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from imgcls.checkpoint import Resume, SafeCheckpointer, set_aside_newer
from imgcls.config import register_check
from imgcls.data.datasets.coco import PREFIX, count_categories, register_coco_names
from imgcls.engine.ranks.distributed import first_rank_does
from imgcls.modeling import is_classifier
from imgcls.structures import Problem

# What its checkpoint has and a file of weights has not.
DETECTOR_STATE = ("trainer", "iteration")


class DetectorTrainer(DefaultTrainer):
    """DefaultTrainer with a checkpointer that runs no code from files and writes them whole, and COCO evaluation."""

    def build_hooks(self) -> list[Any]:
        # Before the hooks take hold of it: DefaultTrainer makes its checkpointer just before it calls this.
        old: DetectionCheckpointer = self.checkpointer
        self.checkpointer: DetectionCheckpointer = SafeCheckpointer(old.model, old.save_dir, **old.checkpointables)
        return super().build_hooks()

    def resume_or_load(self, resume: Resume = True) -> None:
        """As detectron2's; ``resume`` may also name the checkpoint to go on from. Collective."""
        if isinstance(resume, bool):
            super().resume_or_load(resume)
            return
        self.checkpointer.load(str(resume))
        self.start_iter = self.iter + 1
        first_rank_does(lambda: set_aside_newer(Path(resume), Path(self.cfg.OUTPUT_DIR)))

    def train(self) -> None:
        """As detectron2's, but TEST.EXPECTED_RESULTS is judged by the command, which can end with its exit code."""
        TrainerBase.train(self, self.start_iter, self.max_iter)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def register_detection_sets(cfg: CfgNode) -> None:
    """Register the ``coco:JSON@IMAGES`` names of DATASETS; a name that nobody registered is a ``ValueError``."""
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    register_coco_names(names)
    known = DatasetCatalog.list()
    for name in names:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "a name that a script registered"
            allowed = f"{PREFIX}ANNOTATIONS.json@IMAGES_DIR, or {near}"
            raise Problem("there is no such data set", name, allowed, "DATASETS.TRAIN or DATASETS.TEST").error()


@register_check
def check_detector_classes(cfg: CfgNode) -> list[Problem]:
    """The detector's number of classes against the categories of its annotation files."""
    if is_classifier(cfg):
        return []
    key = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    stated = cfg.MODEL[key].NUM_CLASSES
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name.startswith(PREFIX) and count_categories(name) != stated:
            allowed = f"{count_categories(name)}, the categories of {name}"
            return [Problem("the number of classes is not the data's", stated, allowed, f"MODEL.{key}.NUM_CLASSES")]
    return []
