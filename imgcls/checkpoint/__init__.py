"""Checkpoints: written whole or not at all, read without running code, found whatever the pointer says."""

from imgcls.checkpoint.checkpointer import SafeCheckpointer
from imgcls.checkpoint.key_rules import apply_key_rules
from imgcls.checkpoint.manifest import BEST, FINAL, content_digest, is_whole, newest_whole
from imgcls.checkpoint.reading import load_weights, local_path, read_checkpoint, trunk_weights, without_counters
from imgcls.checkpoint.writing import prune, sweep, write_checkpoint, write_tensors

__all__ = [
    "BEST",
    "FINAL",
    "SafeCheckpointer",
    "apply_key_rules",
    "content_digest",
    "is_whole",
    "load_weights",
    "local_path",
    "newest_whole",
    "prune",
    "read_checkpoint",
    "sweep",
    "trunk_weights",
    "without_counters",
    "write_checkpoint",
    "write_tensors",
]
