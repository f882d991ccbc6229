"""Casts to and from FP8."""

from .cast_back import cast_back
from .cast_per_block import cast_per_block
from .cast_per_token import cast_per_token

__all__ = ["cast_back", "cast_per_block", "cast_per_token"]
