"""The parts of `benchmarks.speed`: ways of doing the same work, timed in turns."""
