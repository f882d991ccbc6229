"""How often each expert is replicated, and on which GPU each replica stands.

    load of a GPU = Σ over its replicas of load[e] / logcnt[e]

The fullest GPU sets the pace of all, so its load is what is made small. The policy is that of
DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB): if num_nodes divides num_groups, whole groups
of experts go to nodes, so that group-limited routing sends a token to few nodes; else all GPUs are
one pool. The search that goes on from EPLB's placement is native (csrc/host/rebalance_experts.cpp).
All of it runs on the host, on a copy of the load: a plan of a few ms for every few minutes.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from ..reference import placement as reference
from ..runtime import native
from ..runtime.contract import check_that

NAME = "rebalance_experts"


def rebalance_experts(
    load: Tensor | np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replicates experts and places the replicas on GPUs so that the fullest GPU holds little.

    Args:
        load: real or integer [L, E], the load of each expert in each layer, >= 0: a tensor on any
            device (copied to the host, for which it waits) or a numpy array.
        num_replicas: R >= E, a multiple of num_gpus; GPU g holds the slots from g·R/num_gpus on.
        num_groups: groups of E/num_groups consecutive experts.
        num_nodes: if it divides num_groups, the experts of a group all stay on one node, a node
            having num_gpus/num_nodes consecutive GPUs; else groups and nodes play no part.
        num_gpus: a multiple of num_nodes in the former case.

    Returns:
        phy2log: int64 [L, R] on the CPU, the expert of each slot.
        log2phy: int64 [L, E, X], the slots of each expert in ascending order, then -1; X is the
            largest number of replicas of any expert.
        logcnt: int64 [L, E], the replicas of each expert, at least 1.

    The same load gives the same placement on every machine. The fullest GPU of a layer holds no
    more than by DeepSeek's EPLB, from whose placement a search goes on. Without deepkern._host it
    is EPLB's placement itself, computed in PyTorch, with a RuntimeWarning.

    Raises:
        TypeError, ValueError: an argument is not as above; load is negative, NaN or infinite.
    """
    load = checked_load(NAME, load)
    check_cluster(NAME, load.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    cluster = num_replicas, num_groups, num_nodes, num_gpus
    try:
        host = native.host()
    except ImportError as error:
        warnings.warn(
            f"{NAME}: {error}; until then it is slow, and the balance is EPLB's, no better",
            RuntimeWarning,
            stacklevel=2,
        )
        return reference.rebalance_experts(torch.from_numpy(load), *cluster)
    phy2log = torch.from_numpy(host.rebalance_experts(load, *cluster))
    return phy2log, *replicas_of(phy2log, load.shape[1])


def replicas_of(phy2log: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """log2phy and logcnt of a placement that is known to be right."""
    log2phy, logcnt = native.host().replicas_of(phy2log.numpy(), num_experts)
    return torch.from_numpy(log2phy), torch.from_numpy(logcnt)


def checked_load(name: str, load: Tensor | np.ndarray) -> np.ndarray:
    """`load` as float64 [L, E] on the host; an error in the name of `name` if it is no load."""
    if not isinstance(load, (Tensor, np.ndarray)):
        raise TypeError(f"{name}: load: expected a Tensor or an array, got {type(load).__name__}")
    given = load.dtype
    if isinstance(load, Tensor):
        number = not (load.is_complex() or given == torch.bool)
        load = load.detach().to("cpu", torch.float64 if number else given).numpy()
    if not (np.issubdtype(load.dtype, np.floating) or np.issubdtype(load.dtype, np.integer)):
        raise TypeError(f"{name}: load: expected real or integer numbers, got {given}")
    check_that(name, "load", load.ndim == 2, "rank 2 (real [L, E])", f"rank {load.ndim}")
    load = np.ascontiguousarray(load, np.float64)
    wrong = np.argwhere(~((load >= 0) & (load < np.inf)))
    got = f"{load[tuple(wrong[0])]} at {tuple(map(int, wrong[0]))}" if len(wrong) else None
    check_that(name, "load", not len(wrong), "finite values of at least 0", got)
    return load


def check_cluster(
    name: str, E: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> None:
    """The numbers of `rebalance_experts` for E experts; the same demands as EPLB's."""
    numbers = {
        "num_replicas": num_replicas,
        "num_groups": num_groups,
        "num_nodes": num_nodes,
        "num_gpus": num_gpus,
    }
    for argument, value in numbers.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"{name}: {argument}: expected an int, got {type(value).__name__}")
        check_that(name, argument, 1 <= value < 2**31, "1 to 2^31 - 1", value)
    check_that(name, "load", E >= 1, "at least one expert", f"shape [L, {E}]")
    expected = f"at least the {E} experts"
    check_that(name, "num_replicas", num_replicas >= E, expected, num_replicas)
    expected = f"a multiple of num_gpus = {num_gpus}"
    check_that(name, "num_replicas", num_replicas % num_gpus == 0, expected, num_replicas)
    if num_groups % num_nodes == 0:
        expected = f"a divisor of the {E} experts"
        check_that(name, "num_groups", E % num_groups == 0, expected, num_groups)
        expected = f"a multiple of num_nodes = {num_nodes}"
        check_that(name, "num_gpus", num_gpus % num_nodes == 0, expected, num_gpus)
