"""Checkpoints: written whole or not at all, read without running code, found whatever the pointer says."""

from imgcls.checkpoint.checkpointer import SafeCheckpointer
from imgcls.checkpoint.key_rules import apply_key_rules
from imgcls.checkpoint.manifest import BEST, FINAL, content_digest, is_whole, newest_whole
from imgcls.checkpoint.reading import load_weights, local_path, read_checkpoint, trunk_weights, without_counters
from imgcls.checkpoint.resuming import Resume, checkpoint_to_resume, continues, require_state, set_aside_newer
from imgcls.checkpoint.writing import prune, sweep, write_checkpoint, write_tensors

__all__ = [
    "BEST",
    "FINAL",
    "Resume",
    "SafeCheckpointer",
    "apply_key_rules",
    "checkpoint_to_resume",
    "content_digest",
    "continues",
    "is_whole",
    "load_weights",
    "local_path",
    "newest_whole",
    "prune",
    "read_checkpoint",
    "require_state",
    "set_aside_newer",
    "sweep",
    "trunk_weights",
    "without_counters",
    "write_checkpoint",
    "write_tensors",
]
