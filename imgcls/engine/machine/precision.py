"""How GPUs multiply float32: exactly, or in TF32 (``SOLVER.TF32``)."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def set_float32_precision(cfg: CfgNode) -> None:
    """``SOLVER.TF32``, for matrix products and convolutions alike, in the whole process.

    torch's own default is neither: convolutions in TF32, matrix products not. CPUs are left alone.
    """
    wanted = bool(cfg.SOLVER.TF32)
    # torch 2.9 has newer switches, behind which reading these raises; behind these both kinds can be read.
    torch.backends.cuda.matmul.allow_tf32 = wanted
    torch.backends.cudnn.allow_tf32 = wanted
    if cfg.MODEL.DEVICE.startswith("cuda"):
        logger.info("float32 is multiplied %s (SOLVER.TF32)", "in TF32, where the GPU has it" if wanted else "exactly")
    elif wanted:
        logger.info("SOLVER.TF32 changes nothing on %s: TF32 is of NVIDIA's GPUs", cfg.MODEL.DEVICE)
