"""Checkpoints: written whole or not at all, read without running code, found whatever the pointer says."""

from imgcls.checkpoint.checkpointer import SafeCheckpointer
from imgcls.checkpoint.key_rules import apply_key_rules
from imgcls.checkpoint.manifest import BEST, FINAL, content_digest, newest_whole
from imgcls.checkpoint.reading import load_weights, read_checkpoint, trunk_weights
from imgcls.checkpoint.writing import prune, sweep, write_checkpoint, write_tensors

__all__ = [
    "BEST",
    "FINAL",
    "SafeCheckpointer",
    "apply_key_rules",
    "content_digest",
    "load_weights",
    "newest_whole",
    "prune",
    "read_checkpoint",
    "sweep",
    "trunk_weights",
    "write_checkpoint",
    "write_tensors",
]
