"""DeepEP's interface, computed by deepkern.

    import deepkern.compat.deep_ep as deep_ep

`ElasticBuffer` and `EPHandle` are those of DeepEP's V2 interface, `Buffer` that of V1. Names,
arguments, their order and results are those of DeepEP 2.1.0 (deep_ep/buffers/elastic.py and
deep_ep/buffers/legacy.py, https://github.com/deepseek-ai/DeepEP). Both run on any torch.distributed
group, gloo on CPUs included: any hidden size, any number of ranks, several ranks on one GPU, ranks
without tokens. Differences:

- There are no buffers, SMs or queue pairs to size.
- A call is complete when it returns on a CPU, and ordered with the current stream on a GPU. Events
  and `async_finish` have no effect.
- Each dispatch reads row counts on the host, also where DeepEP does not (`num_worst_tokens`,
  `do_cpu_sync=False`, low latency). A dispatch can therefore not be captured in a CUDA graph.
- Received rows are always sorted by source rank and token, so results are deterministic.

A rank that ends or gets out of step gives the others `deepkern.ExpertParallelError`. A name that
DeepEP has and this module does not raises an AttributeError with the alternative.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .deep_ep_buffer import Buffer
from .deep_ep_elastic import ElasticBuffer, EPHandle
from .deep_ep_types import Config, EventHandle, EventOverlap
from .unsupported import DEEP_EP, module_getattr

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "get_logical_domain_size",
    "topk_idx_t",
]

topk_idx_t = torch.int64
__getattr__ = module_getattr(__name__, DEEP_EP)


def get_logical_domain_size(
    group: dist.ProcessGroup, allow_hybrid_mode: bool = True
) -> tuple[int, int]:
    """(1, ranks of `group`): tokens go from rank to rank in one hop."""
    return 1, group.size()
