"""``MODEL.BACKBONE.NORM SyncBN`` for the BatchNorms that no builder of ours made."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

ASKED = ("SyncBN", "naiveSyncBN")
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronise_norms(cfg: CfgNode, network: nn.Module) -> None:
    """Make torch's SyncBatchNorm of the plain BatchNorms that are left in ``network``, in place.

    The families' trunks and heads, and timm's, have theirs from the config already; a backbone registered by somebody
    else may read another key, or none. On CPUs torch has no SyncBatchNorm, and the log says what stays.
    """
    if cfg.MODEL.BACKBONE.NORM not in ASKED or comm.get_world_size() == 1:
        return
    plain = [name for name, module in network.named_modules() if type(module) in PLAIN]
    if not plain:
        return
    told = f"{plain[0]}{f' and {len(plain) - 1} more' if len(plain) > 1 else ''}"
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        logger.warning("%s: each rank has its own statistics there; torch's SyncBatchNorm is for GPUs", told)
        return
    for name in plain:
        # One by one: torch would make others anew too, such as timm's, which have an activation inside.
        network.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(network.get_submodule(name)))
    logger.info("made SyncBatchNorm of %s", told)
