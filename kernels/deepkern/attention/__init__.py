"""Multi-head latent attention and its paged cache."""

from .mla_cache_append import mla_cache_append
from .mla_decode import mla_decode

__all__ = ["mla_cache_append", "mla_decode"]
