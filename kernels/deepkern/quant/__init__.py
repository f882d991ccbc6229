"""Casts to and from FP8."""
