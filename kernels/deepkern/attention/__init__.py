"""Multi-head latent attention and its paged cache."""

from .merge_states import merge_states, merge_states_backward
from .mla_cache_append import mla_cache_append
from .mla_cache_gather import mla_cache_gather
from .mla_decode import mla_decode

__all__ = [
    "merge_states",
    "merge_states_backward",
    "mla_cache_append",
    "mla_cache_gather",
    "mla_decode",
]
