"""Inputs, comparison and timing: what tests/ and bench/ share."""
