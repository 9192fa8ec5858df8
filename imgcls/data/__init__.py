"""Data: sets, reading, transforms, the mapper, the counter sampler and the loaders."""

from imgcls.data.datasets import SETS, Source, open_source, open_sources, splits_below
from imgcls.data.loaders import Loader, build_test_loader, build_train_loader
from imgcls.data.mapper import ClsMapper
from imgcls.data.random_stream import mix

__all__ = [
    "SETS",
    "ClsMapper",
    "Loader",
    "Source",
    "build_test_loader",
    "build_train_loader",
    "mix",
    "open_source",
    "open_sources",
    "splits_below",
]
