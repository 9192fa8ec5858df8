"""Data sets: sources of labelled pictures and the names they go by."""

from imgcls.data.datasets.catalog import SETS, open_source, open_sources
from imgcls.data.datasets.folder import FolderSource, splits_below
from imgcls.data.datasets.source import ArraySource, ConcatSource, DictSource, Source

__all__ = [
    "SETS",
    "ArraySource",
    "ConcatSource",
    "DictSource",
    "FolderSource",
    "Source",
    "open_source",
    "open_sources",
    "splits_below",
]
