"""Multi-head latent attention and its paged cache."""

from .hadamard_cast import hadamard_cast
from .hadamard_transform import hadamard_transform
from .indexer_cache_append import indexer_cache_append
from .merge_states import merge_states, merge_states_backward
from .mla_cache_append import mla_cache_append
from .mla_cache_gather import mla_cache_gather
from .mla_decode import mla_decode
from .mla_prefill import mla_prefill
from .mla_prefill_backward import mla_prefill_backward
from .mla_sparse_decode import mla_sparse_decode
from .mla_sparse_prefill import mla_sparse_prefill, mla_sparse_prefill_backward
from .mqa_logits import mqa_logits
from .paged_mqa_logits import paged_mqa_logits
from .topk_indices import topk_indices

__all__ = [
    "hadamard_cast",
    "hadamard_transform",
    "indexer_cache_append",
    "merge_states",
    "merge_states_backward",
    "mla_cache_append",
    "mla_cache_gather",
    "mla_decode",
    "mla_prefill",
    "mla_prefill_backward",
    "mla_sparse_decode",
    "mla_sparse_prefill",
    "mla_sparse_prefill_backward",
    "mqa_logits",
    "paged_mqa_logits",
    "topk_indices",
]
