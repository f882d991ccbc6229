"""Inputs of the experts ops."""

from __future__ import annotations

SIZES = {}
