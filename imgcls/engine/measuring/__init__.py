"""Steps taken to measure: speed, the fastest settings, the largest batch that fits. They use a run; none uses them."""
