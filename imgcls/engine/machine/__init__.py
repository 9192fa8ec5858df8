"""What the machine at hand allows: precision, compilation, memory, settings for its CPU."""
