"""Casts to and from FP8."""

from .cast_per_token import cast_per_token

__all__ = ["cast_per_token"]
