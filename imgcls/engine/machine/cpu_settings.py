"""Precision and memory format for training on a CPU, by a rule from its flags and the config."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from imgcls.modeling import is_classifier
from imgcls.modeling.analysis import analyze

logger = logging.getLogger(__name__)

# Fewer pixels than these in a micro-batch, and nothing is gained that would be worth looking at the network.
LEAST_PIXELS = 128 * 128
# Multiply-adds of a convolution or linear layer, in the mean of the network, on one micro-batch. With fewer, what
# autocast adds to each layer (casting its weights and maps) costs more than bfloat16 saves: docs/training-speed.md.
LEAST_WORK = 30_000_000
# Networks of depthwise convolutions move data more than they multiply, and gain on large maps only.
LIGHT = 200  # multiply-adds for an element of their output, in the mean of the layers: those with fewer are such
LEAST_LIGHT_WORK = 80_000_000
LEAST_LIGHT_SIDE = 192  # pixels


@dataclass(frozen=True)
class Layers:
    """What the rule knows of a network at one micro-batch.

    work: multiply-adds of a layer (convolution or linear) in the mean. intensity: those for an element of its output.
    spatial: whether a convolution but the first has a kernel larger than 1. depthwise: whether one has as many groups
    as channels. side: pixels of the images.
    """

    work: float
    intensity: float
    spatial: bool
    depthwise: bool
    side: int


def decide_cpu_settings(cfg: CfgNode) -> None:
    """``SOLVER.CPU_SETTINGS`` auto: set AMP and CHANNELS_LAST, in place, where that trains faster; it becomes decided.

    Does nothing for ``off`` and ``decided``. What is True already stays so, and nothing is set but on CPUs. A function
    of the config and this machine's CPU alone. cfg: with device, classes and batch decided.
    """
    if cfg.SOLVER.CPU_SETTINGS != "auto" or not is_classifier(cfg):
        return
    cfg.SOLVER.CPU_SETTINGS = "decided"
    if cfg.MODEL.DEVICE != "cpu" or _pixels(cfg) < LEAST_PIXELS:
        return
    layers = layers_of(cfg)
    if layers is None:
        return
    bfloat16, channels_last = rule(layers, fast_bfloat16=has_fast_bfloat16())
    chosen = []
    if bfloat16 and not cfg.SOLVER.AMP.ENABLED:
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "bfloat16"
        chosen.append("SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16")
    if channels_last and not cfg.MODEL.CHANNELS_LAST:
        cfg.MODEL.CHANNELS_LAST = True
        chosen.append("MODEL.CHANNELS_LAST True")
    if chosen:
        logger.info("faster on this CPU, so decided: %s (SOLVER.CPU_SETTINGS off leaves them)", " ".join(chosen))


def undecided(cfg: CfgNode) -> CfgNode:
    """A copy with all as stated, for which :func:`decide_cpu_settings` does nothing; ``off`` stays ``off``."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.SOLVER.CPU_SETTINGS == "auto":
        cfg.SOLVER.CPU_SETTINGS = "decided"
    return cfg


def take_over(decided: CfgNode, cfg: CfgNode) -> None:
    """Set in ``cfg``, in place, what was decided in another one."""
    cfg.SOLVER.CPU_SETTINGS = decided.SOLVER.CPU_SETTINGS
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = decided.SOLVER.AMP.ENABLED, decided.SOLVER.AMP.DTYPE
    cfg.MODEL.CHANNELS_LAST = decided.MODEL.CHANNELS_LAST


def rule(layers: Layers, *, fast_bfloat16: bool) -> tuple[bool, bool]:
    """Whether to train under bfloat16 autocast, and whether with maps in channels-last order."""
    if layers.depthwise and layers.intensity < LIGHT:
        bfloat16 = layers.work >= LEAST_LIGHT_WORK and layers.side >= LEAST_LIGHT_SIDE
    else:
        bfloat16 = layers.work >= LEAST_WORK
    bfloat16 = bfloat16 and fast_bfloat16
    # oneDNN's kernels for depthwise convolutions want that order in any precision, all others in bfloat16.
    return bfloat16, layers.depthwise or (bfloat16 and layers.spatial)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), and torch uses it."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if "AVX512" not in torch.backends.cpu.get_cpu_capability().upper().replace("_", ""):
        return False
    # torch.cpu is undocumented and has changed its names before; Linux says the same.
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(ask() for ask in asked if ask is not None) or bool({"avx512_bf16", "amx_bf16"} & _flags())


def _flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _images(cfg: CfgNode) -> int:
    """Images of a micro-batch on one rank."""
    return max(1, int(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() // cfg.SOLVER.ACCUMULATE))


def _pixels(cfg: CfgNode) -> int:
    return int(_images(cfg) * cfg.INPUT.TRAIN_SIZE**2)


def layers_of(cfg: CfgNode) -> Layers | None:
    """The network of ``cfg`` at its micro-batch; None for one that cannot be laid out without computing it."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            net = build_model(cfg)
        cost = analyze(net, cfg.INPUT.TRAIN_SIZE)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        logger.info("SOLVER.CPU_SETTINGS: the network is not examined (%s)", str(error).partition("\n")[0])
        return None
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    count = len(convolutions) + sum(isinstance(module, nn.Linear) for module in net.modules())
    return Layers(
        work=cost.multiply_adds * _images(cfg) / max(1, count),
        intensity=cost.multiply_adds / max(1, cost.activations),
        spatial=any(max(conv.kernel_size) > 1 for conv in convolutions[1:]),
        depthwise=any(conv.groups == conv.in_channels > 1 for conv in convolutions),
        side=cfg.INPUT.TRAIN_SIZE,
    )
