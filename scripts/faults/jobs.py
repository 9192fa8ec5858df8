"""The job that is killed again and again: small pictures, a tiny network, and everything that a resume could lose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")
TRAIN, VAL, SIDE = 40, 8, 28  # pictures of each class, and their side in pixels
BATCH, ITERATIONS, PERIOD, EVALUATION, KEPT = 8, 40, 5, 10, 2
RUN = "run"  # OUTPUT_DIR, in the folder that a trainer is started in
TRACE = "trace.jsonl"  # beside it: what is looked at must not be lost with what is looked for

# Four convolutions with BatchNorm and a chain that is added to its input: 27 thousand parameters.
ROWS = [["conv", 3, 8, 3, 2], ["conv", 8, 16, 3, 2], ["res", [16, 8], [8, 16], [1, 3], 1, True], ["conv", 16, 32, 3, 2]]

SMALL = (
    *("MODEL.BACKBONE.NAME", "build_imgcls_sandbox_backbone", "MODEL.BACKBONE.VARIANT", "sandbox"),
    *("MODEL.BACKBONE.ROWS", str(ROWS), "MODEL.HEAD.DROPOUT", "0.2"),
    *("MODEL.DEVICE", "cpu", "MODEL.CHANNELS_LAST", "False"),
    *("INPUT.TRAIN_SIZE", "24", "INPUT.TEST_SIZE", "24", "INPUT.TEST_RESIZE", "0"),
    *("INPUT.TRAIN_TRANSFORMS", "[['random_resized_crop', 0.3, 1.0], ['horizontal_flip', 0.5]]"),
    *("SOLVER.IMS_PER_BATCH", str(BATCH), "SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.WARMUP_ITERS", "6"),
    *("SOLVER.WARMUP_EPOCHS", "0", "SOLVER.BASE_LR", "0.05", "SOLVER.LOG_PERIOD", "1", "SOLVER.WRITERS", "[]"),
    *("SOLVER.CHECKPOINT_PERIOD", str(PERIOD), "SOLVER.CHECKPOINT_EPOCHS", "0", "SOLVER.CHECKPOINT_KEEP", str(KEPT)),
    *("TEST.EVAL_PERIOD", str(EVALUATION), "TEST.EVAL_EPOCHS", "0", "TEST.IMS_PER_BATCH", "24"),
    *("TEST.PRECISE_BN.NUM_ITER", "3", "DATALOADER.TRACE", TRACE, "SEED", "3"),
)

# What a resume has to bring back, each beside momentum, dropout, crops and the schedule.
FEATURES: dict[str, tuple[str, ...]] = {
    "ema": ("SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.9"),
    "swa": ("SOLVER.SWA.ENABLED", "True", "SOLVER.SWA.START", "0.3", "SOLVER.SWA.PERIOD", "3"),
    "mixup": ("INPUT.MIXUP_ALPHA", "0.4"),
    "cutmix": ("INPUT.CUTMIX_ALPHA", "1.0"),
    "bf16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"),
    "fp16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"),
    "accumulate": ("SOLVER.ACCUMULATE", "2"),
    "adamw": ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.005"),
    "plateau": ("SOLVER.LR_SCHEDULER_NAME", "PlateauLR", "SOLVER.PLATEAU_PATIENCE", "1", "TEST.METRIC", "loss"),
    "balanced": ("DATALOADER.SAMPLING", "balanced"),
    "repeats": ("DATALOADER.REPEATS", "2"),
    "precise": ("TEST.PRECISE_BN.ENABLED", "True"),
    "dicts": ("DATALOADER.PACKING", "dicts"),
    "clip": ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.5"),
}


@dataclass(frozen=True)
class Variant:
    """A way to run the job."""

    loop: str  # plain | builtin
    ranks: int
    workers: int
    features: tuple[str, ...]

    @property
    def name(self) -> str:
        """Short, for folders and parts of a campaign; no two of VARIANTS share one."""
        return f"{self.loop}-{self.ranks}r{self.workers}w"

    @property
    def builtin(self) -> bool:
        """Whether the command is that of detectron2's loop."""
        return self.loop == "builtin"

    @property
    def described(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"loop": self.loop, "ranks": self.ranks, "workers": self.workers, "features": list(self.features)}


VARIANTS = (
    Variant("plain", 1, 0, ("ema", "mixup")),
    Variant("builtin", 1, 0, ("ema", "mixup")),
    Variant("plain", 2, 0, ("ema", "mixup", "accumulate")),
    Variant("builtin", 1, 1, ("ema", "cutmix", "bf16", "accumulate")),
    Variant("plain", 1, 1, ("swa", "mixup", "cutmix", "clip")),
    Variant("builtin", 2, 0, ("ema", "cutmix", "plateau")),
    Variant("plain", 1, 4, ("adamw", "plateau", "repeats", "precise")),
    Variant("builtin", 1, 4, ("ema", "fp16", "mixup")),
    Variant("plain", 2, 1, ("swa", "bf16", "mixup")),
    Variant("builtin", 2, 1, ("ema", "adamw", "mixup")),
    Variant("plain", 2, 4, ("ema", "balanced", "cutmix")),
    Variant("builtin", 2, 4, ("ema", "mixup", "dicts")),
)


def words(variant: Variant, data: Path, *more: str) -> list[str]:
    """The command line of a training, for a process whose working directory is the case's own."""
    features = [word for feature in variant.features for word in FEATURES[feature]]
    options = ["--config-file", "quick/digits_sandbox_cnn.yaml", "--data", str(data), "--output", RUN]
    return [*options, *SMALL, "DATALOADER.NUM_WORKERS", str(variant.workers), *features, *more]


def make_pictures(root: Path) -> Path:
    """``root/train`` and ``root/val`` with a folder a class; every file name is there once."""
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for tint, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                pixels[..., tint] //= 2  # something to learn, so that the best checkpoint changes
                Image.fromarray(pixels).save(folder / f"{split}_{name}_{index:02d}.png")
    return root
