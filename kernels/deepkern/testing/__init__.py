"""Facts of every op, comparison and timing, for tests/ and bench/."""
