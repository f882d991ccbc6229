"""From one placement of experts to another: few moves, and which."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import native
from ..runtime.contract import Contract, check_that
from .rebalance_experts import replicas_of

_CONTRACT = Contract("plan_moves", old_phy2log="int64 [L, R]", new_phy2log="int64 [L, R]")


def plan_moves(
    old_phy2log: Tensor, new_phy2log: Tensor, num_gpus: int, num_nodes: int = 1, num_groups: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exchanges the roles of GPUs in a new placement so that few experts move, and lists the moves.

    GPUs are alike, so the balance is that of `new_phy2log`. If num_nodes divides num_groups, as in
    `rebalance_experts`, the roles of whole nodes are exchanged, and those of GPUs within a node.
    Among all such exchanges and all orders of the slots of a GPU the moves are the fewest possible.

    Args:
        old_phy2log: int64 [L, R] on the CPU, the placement in use.
        new_phy2log: int64 [L, R], the one to come, from `rebalance_experts`.
        num_gpus: a divisor of R.
        num_nodes: a divisor of num_gpus; a node has num_gpus/num_nodes consecutive GPUs.
        num_groups: as given to `rebalance_experts`.

    Returns:
        phy2log: int64 [L, R], the new placement with its roles exchanged.
        log2phy, logcnt: as from `rebalance_experts`.
        moves: int64 [n, 4], rows of (layer, slot that gets it, slot of the old placement that has
            it, expert), by layer and slot. The source is on the same GPU if that has the expert,
            else on the same node, else anywhere; among equals, on the GPU that sends least. Slots
            without a row keep what they hold. Read sources before they are overwritten.

    Raises:
        TypeError, ValueError: an argument is not as above; an expert outside [0, R), or one of the
            new placement that is not in the old.
        ImportError: deepkern._host was not built.
    """
    name = "plan_moves"
    _CONTRACT.check({"old_phy2log": old_phy2log, "new_phy2log": new_phy2log})
    on = old_phy2log.device
    check_that(name, "old_phy2log", on.type == "cpu", "a tensor on the CPU", f"one on {on}")
    L, R = old_phy2log.shape
    check_that(name, "old_phy2log", R > 0, "at least one slot", f"shape {(L, R)}")
    placements = {"old_phy2log": old_phy2log, "new_phy2log": new_phy2log}
    for argument, phy2log in placements.items():
        wrong = phy2log[(phy2log < 0) | (phy2log >= R)].tolist()
        expected = f"experts in [0, {R}), of which each has a slot"
        check_that(name, argument, not wrong, expected, wrong[0] if wrong else None)
    E = 1 + max(int(p.max()) if L else 0 for p in placements.values())
    for argument, part, whole in (("num_gpus", num_gpus, R), ("num_nodes", num_nodes, num_gpus)):
        check_that(name, argument, part >= 1 and whole % part == 0, f"a divisor of {whole}", part)
    check_that(name, "num_groups", num_groups >= 1, "at least 1", num_groups)
    held = torch.zeros(L, E, dtype=torch.bool).scatter_(1, old_phy2log, True)
    missing = (~held.gather(1, new_phy2log)).nonzero().tolist()
    layer, slot = missing[0] if missing else (0, 0)
    got = f"expert {int(new_phy2log[layer, slot])} in layer {layer}" if missing else None
    check_that(name, "new_phy2log", not missing, "experts of the old placement", got)

    host = native.host()
    arrays = old_phy2log.numpy(), new_phy2log.numpy()
    phy2log, moves = host.plan_moves(*arrays, E, num_groups, num_nodes, num_gpus)
    phy2log = torch.from_numpy(phy2log)
    return phy2log, *replicas_of(phy2log, E), torch.from_numpy(moves)
