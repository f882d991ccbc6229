"""Inputs of the attention ops."""

from __future__ import annotations

SIZES = {}
