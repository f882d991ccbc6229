"""The moves from one placement of experts to another: as few as possible.

The search is native (csrc/host); it runs on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import native
from ..runtime.contract import Contract, check_that
from .checks import check_divisors, check_ints
from .rebalance_experts import replicas_of

_CONTRACT = Contract("plan_moves", old_phy2log="int64 [L, R]", new_phy2log="int64 [L, R]")


def plan_moves(
    old_phy2log: Tensor, new_phy2log: Tensor, num_gpus: int, num_nodes: int = 1, num_groups: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Permutes the GPUs of a new placement so that few experts move, and lists the moves.

        new = deepkern.rebalance_experts(load, 288, 8, 4, 32)[0]
        phy2log, log2phy, logcnt, moves = deepkern.plan_moves(old, new, 32, 4, 8)

    GPUs are interchangeable, so the balance is that of `new_phy2log`. If num_nodes divides
    num_groups, as in `rebalance_experts`, whole nodes are permuted, and GPUs within a node. The
    number of moves is the minimum over all such permutations and all orders of the slots of a GPU.

    Args:
        old_phy2log: int64 [L, R] on the CPU, the placement in use.
        new_phy2log: int64 [L, R], the next placement, from `rebalance_experts`.
        num_gpus: a divisor of R.
        num_nodes: a divisor of num_gpus; a node has num_gpus/num_nodes consecutive GPUs.
        num_groups: as given to `rebalance_experts`.

    Returns:
        phy2log: int64 [L, R], the new placement after the permutation.
        log2phy, logcnt: as from `rebalance_experts`.
        moves: int64 [n, 4], rows of (layer, target slot, source slot in the old placement,
            expert), sorted by layer and target. The source is on the same GPU if that has the
            expert, else on the same node, else anywhere; among equals, on the GPU that sends
            least. Slots without a row are unchanged. Read sources before they are overwritten.

    Raises:
        TypeError, ValueError: an argument violates the rules above; an expert is outside [0, R),
            or an expert of the new placement is not in the old one.
        ImportError: deepkern._host was not built.
    """
    name = "plan_moves"
    _CONTRACT.check({"old_phy2log": old_phy2log, "new_phy2log": new_phy2log})
    check_ints(name, num_gpus=num_gpus, num_nodes=num_nodes, num_groups=num_groups)
    device = old_phy2log.device
    check_that(name, "old_phy2log", device.type == "cpu", "a tensor on the CPU", f"one on {device}")
    L, R = old_phy2log.shape
    check_that(name, "old_phy2log", R > 0, "at least one slot", f"shape {(L, R)}")
    placements = {"old_phy2log": old_phy2log, "new_phy2log": new_phy2log}
    for argument, phy2log in placements.items():
        wrong = phy2log[(phy2log < 0) | (phy2log >= R)].tolist()
        expected = f"experts in [0, {R}), each of which has a slot"
        check_that(name, argument, not wrong, expected, wrong[0] if wrong else None)
    E = 1 + max(int(p.max()) if L else 0 for p in placements.values())
    check_divisors(name, ("num_gpus", num_gpus, R), ("num_nodes", num_nodes, num_gpus))
    check_that(name, "num_groups", num_groups >= 1, "at least 1", num_groups)
    in_old = torch.zeros(L, E, dtype=torch.bool).scatter_(1, old_phy2log, True)
    missing = (~in_old.gather(1, new_phy2log)).nonzero().tolist()
    layer, slot = missing[0] if missing else (0, 0)
    got = f"expert {int(new_phy2log[layer, slot])} in layer {layer}" if missing else None
    check_that(name, "new_phy2log", not missing, "experts of the old placement", got)

    host = native.host()
    arrays = old_phy2log.numpy(), new_phy2log.numpy()
    phy2log, moves = host.plan_moves(*arrays, E, num_groups, num_nodes, num_gpus)
    phy2log = torch.from_numpy(phy2log)
    return phy2log, *replicas_of(phy2log, E), torch.from_numpy(moves)
