"""Studies: long runs that answer one question and write their result to bench/results/."""
