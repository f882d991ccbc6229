"""Planted faults for the tests of the bench."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import deepkern

OP = "cast_per_token"


@pytest.fixture
def plant_wrong_scales(monkeypatch) -> Callable[..., None]:
    """Makes a backend of cast_per_token return scales that are 2 % too large, where `when(x)`."""

    def plant(backend: str, when: Callable[[torch.Tensor], bool] = lambda x: True) -> None:
        op = deepkern.OPS[OP]
        launch = op.launcher(backend)

        def wrong(x, *rest):
            q, scale = launch(x, *rest)
            return q, scale * (1.02 if when(x) else 1)

        monkeypatch.setitem(op.launchers, backend, wrong)

    return plant
