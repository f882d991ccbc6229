"""Integer arithmetic of launchers.

triton.cdiv and triton.next_power_of_2 give the same (but for the power of 0), but as they may be
called in kernels too they take 1.5 µs a call, of the 15 or so that a launch may take.
"""

from __future__ import annotations


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is n or more."""
    return 1 << max(n - 1, 0).bit_length()
