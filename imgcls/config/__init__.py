"""Configuration: keys, safe loading, durations, checks."""

from imgcls.config.checks import all_problems, register_check, require_sound
from imgcls.config.defaults import add_imgcls_config
from imgcls.config.durations import iterations_for, resolve_durations
from imgcls.config.loading import find_config, get_config, load_config

__all__ = [
    "add_imgcls_config",
    "all_problems",
    "find_config",
    "get_config",
    "iterations_for",
    "load_config",
    "register_check",
    "require_sound",
    "resolve_durations",
]
