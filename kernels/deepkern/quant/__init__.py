"""Casts to and from FP8."""

from .cast_back import cast_back
from .cast_per_block import cast_per_block
from .cast_per_channel import cast_per_channel
from .cast_per_token import cast_per_token
from .rmsnorm_cast import rmsnorm_cast
from .swiglu_cast import swiglu_cast, swiglu_cast_backward

__all__ = [
    "cast_back",
    "cast_per_block",
    "cast_per_channel",
    "cast_per_token",
    "rmsnorm_cast",
    "swiglu_cast",
    "swiglu_cast_backward",
]
