"""Training loops on one batch in memory, for the benchmark: ours, the bare one, and timm's.

The last two have a training step of their own, for that is what ours is compared with; nothing else uses them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventWriter
from torch import Tensor, nn

from imgcls.data import mix
from imgcls.engine import ClsTrainer, Data, Run, train
from imgcls.modeling import ClsNet
from imgcls.solver import build_optimizer
from imgcls.structures import Batch
from imgcls.transfer.references import require

# Takes the batches of a block.
Loop = Callable[[], None]

# Our names of networks that timm has; a variant "timm:NAME" is timm's anyway.
TIMM_NAMES = {
    **{name: name for name in ("resnet18", "resnet34", "resnet50", "densenet121", "efficientnet_b0", "convnext_tiny")},
    "mobilenet_v1_1.0": "mobilenetv1_100",
    "mobilenet_v2_1.0": "mobilenetv2_100",
    "vit_ti_16": "vit_tiny_patch16_224",
    "vit_s_16": "vit_small_patch16_224",
    "vit_b_16": "vit_base_patch16_224",
}


class Feed:
    """One batch, handed out ``steps`` + 1 times a block, and the seconds that the loop took for ``steps`` of them.

    From the moment it is asked for the first until it is asked for the last: all that a loop does for each.
    """

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.steps = batch, steps
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        start = self._now()
        for step in range(self.steps + 1):
            if step == self.steps:
                self.seconds = self._now() - start
            yield self.batch

    def _now(self) -> float:
        if isinstance(self.batch.images, Tensor) and self.batch.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


# ------------------------------------------------------------------------------------------------------------- ours


class FedRun(Run):
    """A run that trains on what a feed hands out, and keeps its writers open from block to block."""

    def __init__(self, cfg: CfgNode, data: Data, feed: Feed) -> None:
        super().__init__(cfg, data)
        self._feed = feed
        self._open: list[EventWriter] | None = None

    def due(self, period: int, iteration: int) -> bool:
        """The end of a block is not that of a run."""
        return period > 0 and (iteration + 1) % period == 0

    def train_loader(self) -> Iterable[Any]:
        return self._feed

    def writers(self) -> list[EventWriter]:
        if self._open is None:
            self._open = [_KeptOpen(writer) for writer in super().writers()]
        return self._open


class _KeptOpen(EventWriter):
    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer

    def write(self, **kwargs: Any) -> None:
        self._writer.write(**kwargs)

    def close(self) -> None:
        pass


def plain_loop(cfg: CfgNode, data: Data, feed: Feed) -> Loop:
    """``imgcls.engine.train``."""
    run = FedRun(cfg, data, feed)

    def block() -> None:
        run.max_iter = run.start_iter + feed.steps + 1
        train(run)
        run.start_iter = run.max_iter

    return block


def builtin_loop(cfg: CfgNode, data: Data, feed: Feed) -> Loop:
    """``ClsTrainer``, detectron2's DefaultTrainer with its hooks."""

    class FedTrainer(ClsTrainer):
        def build_run(self, cfg: CfgNode, data: Data) -> Run:
            return FedRun(cfg, data, feed)

    trainer = FedTrainer(cfg, data)

    def block() -> None:
        run = trainer.run
        run.max_iter = run.start_iter + feed.steps + 1
        trainer.train()
        trainer.start_iter = run.start_iter = run.max_iter

    return block


# ----------------------------------------------------------------------------------------------------- the others'


def bare_loop(cfg: CfgNode, data: Data, feed: Feed) -> Loop:
    """Forward, backward and optimizer, with our network, loss and optimizer, and nothing around them."""
    model, device = _network(cfg), cfg.MODEL.DEVICE.partition(":")[0]
    optimizer = build_optimizer(cfg, model)
    amp = cfg.SOLVER.AMP

    def block() -> None:
        for batch in feed:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=getattr(torch, amp.DTYPE), enabled=amp.ENABLED):
                loss = torch.stack(list(model(batch).values())).sum()
            loss.backward()
            optimizer.step()

    return block


def timm_step_loop(cfg: CfgNode, data: Data, feed: Feed) -> Loop:
    """What timm's train.py does for a batch, on our network in the same precision."""
    amp = cfg.SOLVER.AMP
    return _timm_loop(cfg, _Logits(_network(cfg)), feed, getattr(torch, amp.DTYPE) if amp.ENABLED else None)


def timm_loop(cfg: CfgNode, data: Data, feed: Feed) -> Loop:
    """timm's train.py as it comes: its network of the same name, float32, contiguous."""
    name = timm_name(cfg)
    if not name:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.CHANNELS_LAST = False
        return _timm_loop(cfg, _Logits(_network(cfg)), feed, None)
    timm = require("timm")
    size = {"img_size": cfg.INPUT.TRAIN_SIZE} if name.startswith("vit") else {}
    torch.manual_seed(mix(cfg.SEED, -1))
    model = timm.create_model(name, num_classes=cfg.MODEL.HEAD.NUM_CLASSES, **size)
    return _timm_loop(cfg, model.to(cfg.MODEL.DEVICE), feed, None)


def timm_name(cfg: CfgNode) -> str:
    """timm's name of the network; empty where it has none like ours."""
    variant = cfg.MODEL.BACKBONE.VARIANT
    if variant.startswith("timm:"):
        return str(variant.removeprefix("timm:"))
    return TIMM_NAMES.get(variant, "") if cfg.MODEL.BACKBONE.STEM == "standard" else ""


def _timm_loop(cfg: CfgNode, model: nn.Module, feed: Feed, amp_dtype: torch.dtype | None) -> Loop:
    """Normalised pictures, loss, optimizer, running mean of the loss and schedule are timm's, as train.py has them."""
    require("timm")  # an extra; absent, this says what to install
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter

    model.train()
    smoothing = cfg.MODEL.LOSS.LABEL_SMOOTHING
    criterion = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=1_000_000, t_in_epochs=False)
    losses, device = AverageMeter(), cfg.MODEL.DEVICE.partition(":")[0]
    mean, std = (
        torch.tensor(values, device=cfg.MODEL.DEVICE).view(1, -1, 1, 1)
        for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    updates = 0

    def block() -> None:
        nonlocal updates
        for batch in feed:
            assert isinstance(batch.images, Tensor)
            images = batch.images.float().sub_(mean).div_(std)  # its prefetcher does so, in the main process
            with torch.autocast(device, dtype=amp_dtype, enabled=amp_dtype is not None):
                loss = criterion(model(images), batch.targets)
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(batch))
            optimizer.zero_grad()
            updates += 1
            scheduler.step_update(num_updates=updates, metric=losses.avg)

    return block


class _Logits(nn.Module):
    def __init__(self, net: ClsNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net.logits(images, normalized=True)


def _network(cfg: CfgNode) -> ClsNet:
    torch.manual_seed(mix(cfg.SEED, -1))
    net: ClsNet = build_model(cfg).train()
    return net
