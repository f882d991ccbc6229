"""Inputs of the matmul ops."""

from __future__ import annotations

SIZES = {}
