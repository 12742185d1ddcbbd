"""The same masked models through srfx and through other tools; `python -m benchmarks.peers`."""
