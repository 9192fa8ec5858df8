"""The pipelines that ``benchmark_data`` compares: ours, torchvision's reference, timm's and DALI's."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler

from imgcls.commands import dali_pipeline
from imgcls.config import get_config
from imgcls.config.defaults import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB
from imgcls.data import Source, build_train_loader

WARM_UP = 5  # batches, which also empty the queues of the workers
CROP_AND_FLIP = [["random_resized_crop", 0.08, 1.0], ["horizontal_flip", 0.5]]
DALI_PACKAGE = "nvidia-dali-cuda130"

Contestant = Callable[[], float]  # one run; images/s


@dataclass(frozen=True)
class Work:
    """What each pipeline is asked for. folder: of class folders. images: in one run, behind the warm-up."""

    folder: Path
    images: int
    batch: int
    workers: int
    size: int

    @property
    def batches(self) -> int:
        return max(1, self.images // self.batch)


def imgcls_pipeline(work: Work, source: Source, decode: str = "fast") -> Contestant:
    """The training loader. decode: ``INPUT.TRAIN_DECODE``."""
    cfg = get_config("Base-ClsNet.yaml")
    cfg.MODEL.DEVICE = _device()
    cfg.SEED, cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 1, work.workers, work.batch
    cfg.SOLVER.MAX_ITER = WARM_UP + work.batches
    cfg.INPUT.TRAIN_SIZE, cfg.INPUT.TRAIN_TRANSFORMS, cfg.INPUT.TRAIN_DECODE = work.size, CROP_AND_FLIP, decode
    return lambda: rate_of(build_train_loader(cfg, source), work)


def torchvision_pipeline(work: Work) -> Contestant:
    """As in torchvision's reference training: ImageFolder, Pillow, normalisation of each picture, a DataLoader."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    mean, std = ([value / 255 for value in values] for values in (IMAGENET_MEAN_RGB, IMAGENET_STD_RGB))
    steps = [v2.RandomResizedCrop(work.size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    folder = ImageFolder(str(work.folder), v2.Compose(steps))
    sampler = RandomSampler(folder, replacement=True, num_samples=(WARM_UP + work.batches) * work.batch)
    return lambda: rate_of(DataLoader(folder, work.batch, sampler=sampler, num_workers=work.workers), work)


def timm_pipeline(work: Work) -> Contestant:
    """``create_loader`` with its prefetcher, which takes bytes and normalises whole batches."""
    if importlib.util.find_spec("timm") is None:
        raise ValueError("timm is not installed: pip install 'imgcls[timm]', or leave out --with timm")
    from timm.data import ImageDataset, create_loader

    folder = ImageDataset(str(work.folder))
    no_jitter: Any = None  # timm's own way to say it
    epochs = -(-(WARM_UP + work.batches) * work.batch // len(folder))

    def run() -> float:
        repeated: Any = _Repeated(folder, epochs)
        loader = create_loader(
            repeated,
            (3, work.size, work.size),
            work.batch,
            is_training=True,
            hflip=0.5,
            color_jitter=no_jitter,
            interpolation="bilinear",
            num_workers=work.workers,
            persistent_workers=False,
            device=torch.device(_device()),
        )
        return rate_of(loader, work)

    return run


class _Repeated(ConcatDataset):
    """A set over and over: an epoch's end would start new workers. timm hands it the transform."""

    def __init__(self, dataset: Any, times: int) -> None:
        super().__init__([dataset] * times)
        self._dataset = dataset

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transform":
            self._dataset.transform = value
        super().__setattr__(name, value)


def dali_pipeline_of(work: Work, python: str) -> Contestant:
    """DALI on the CPU, in a process of its own. python: an interpreter that has it."""
    find = "import importlib.util as u, sys; sys.exit(not (u.find_spec('nvidia') and u.find_spec('nvidia.dali')))"
    if subprocess.run([python, "-c", find], check=False).returncode:
        raise ValueError(
            f"{python} cannot import nvidia.dali: pip install {DALI_PACKAGE} (no GPU is needed), there or in an "
            "environment of its own that --dali-python then names; or leave out --with dali"
        )
    options = {"batch": work.batch, "threads": max(1, work.workers), "size": work.size}
    command = [python, dali_pipeline.__file__, str(work.folder.absolute())]
    for name, value in {**options, "warm-up": WARM_UP, "batches": work.batches}.items():
        command += [f"--{name}", str(value)]

    def run() -> float:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"DALI failed: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
        return float(done.stdout.split()[-1])

    return run


def rate_of(loader: Iterable[Any], work: Work) -> float:
    """Images/s of ``loader`` behind the warm-up."""
    batches = iter(loader)
    for _ in range(WARM_UP):
        next(batches)
    start = time.perf_counter()
    for _ in itertools.islice(batches, work.batches):
        pass
    return work.batches * work.batch / (time.perf_counter() - start)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# name behind --with -> function(work, source, python that has DALI); it raises ValueError when something is missing
OTHERS: dict[str, Callable[[Work, Source, str], Contestant]] = {
    "torchvision": lambda work, source, python: torchvision_pipeline(work),
    "timm": lambda work, source, python: timm_pipeline(work),
    "dali": lambda work, source, python: dali_pipeline_of(work, python),
    "exact": lambda work, source, python: imgcls_pipeline(work, source, "exact"),
}
