"""Checkpoints: written whole or not at all, read without running code, found whatever the pointer says."""

from imgcls.checkpoint.averaging import average_checkpoints
from imgcls.checkpoint.checkpointer import SafeCheckpointer
from imgcls.checkpoint.key_rules import apply_key_rules
from imgcls.checkpoint.manifest import (
    BEST,
    FINAL,
    content_digest,
    file_digest,
    is_whole,
    iteration_of,
    newest_whole,
    read_manifest,
)
from imgcls.checkpoint.reading import (
    classifier_weights,
    load_weights,
    local_path,
    notes_of,
    read_checkpoint,
    trunk_weights,
    without_counters,
)
from imgcls.checkpoint.resuming import Resume, checkpoint_to_resume, continues, require_state, set_aside_newer
from imgcls.checkpoint.writing import (
    point_at,
    prunable,
    prune,
    sweep,
    whole_file,
    write_checkpoint,
    write_manifest,
    write_tensors,
    write_whole,
)

__all__ = [
    "BEST",
    "FINAL",
    "Resume",
    "SafeCheckpointer",
    "apply_key_rules",
    "average_checkpoints",
    "checkpoint_to_resume",
    "classifier_weights",
    "content_digest",
    "continues",
    "file_digest",
    "is_whole",
    "iteration_of",
    "load_weights",
    "local_path",
    "newest_whole",
    "notes_of",
    "point_at",
    "prunable",
    "prune",
    "read_checkpoint",
    "read_manifest",
    "require_state",
    "set_aside_newer",
    "sweep",
    "trunk_weights",
    "whole_file",
    "without_counters",
    "write_checkpoint",
    "write_manifest",
    "write_tensors",
    "write_whole",
]
