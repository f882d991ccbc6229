"""Mixture of experts: routing, dispatch, combine, expert parallelism, load balancing."""
