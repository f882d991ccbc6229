"""Integer arithmetic of launchers, beside Triton's."""

from __future__ import annotations

import triton

from deepkern.runtime.integers import cdiv, next_power_of_2


def test_as_triton_has_them():
    for n in (0, 1, 2, 3, 4, 5, 127, 128, 129, 2**31 - 1, 2**31, 2**40 + 1):
        for by in (1, 2, 3, 128):
            assert cdiv(n, by) == triton.cdiv(n, by)
        if n:
            assert next_power_of_2(n) == triton.next_power_of_2(n)
    assert next_power_of_2(0) == 1
