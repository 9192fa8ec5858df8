"""The bodies of the commands in ``tools/`` and of ``python -m imgcls``."""
