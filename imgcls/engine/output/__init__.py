"""What a run writes beside its checkpoints: its folder, log, metrics, trace and where it came from."""
