"""Data sets: sources of labelled pictures and the names they go by."""

from imgcls.data.datasets.catalog import SETS, open_source, open_sources
from imgcls.data.datasets.folder import FolderSource
from imgcls.data.datasets.hold_out import HeldOutSource, HoldOut
from imgcls.data.datasets.source import ArraySource, ConcatSource, DictSource, Source
from imgcls.data.datasets.splits import splits_below

__all__ = [
    "SETS",
    "ArraySource",
    "ConcatSource",
    "DictSource",
    "FolderSource",
    "HeldOutSource",
    "HoldOut",
    "Source",
    "open_source",
    "open_sources",
    "splits_below",
]
