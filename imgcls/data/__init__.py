"""Data: sets, reading, transforms, the mapper, the counter sampler and the loaders."""

from imgcls.data.datasets import SETS, HoldOut, Source, open_source, open_sources, splits_below
from imgcls.data.episodes import EpisodeSampler, build_episode_loader
from imgcls.data.guarded_loader import Loader
from imgcls.data.loaders import build_test_loader, build_train_loader
from imgcls.data.mapper import ClsMapper
from imgcls.data.mixing import Mixing
from imgcls.data.random_stream import mix
from imgcls.data.views import build_view_loader

__all__ = [
    "SETS",
    "ClsMapper",
    "EpisodeSampler",
    "HoldOut",
    "Loader",
    "Mixing",
    "Source",
    "build_episode_loader",
    "build_test_loader",
    "build_train_loader",
    "build_view_loader",
    "mix",
    "open_source",
    "open_sources",
    "splits_below",
]
