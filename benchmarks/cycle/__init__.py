"""What the scripts of the Squeeze-Release benchmarks share."""
