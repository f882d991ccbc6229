"""Inference over several processes: tensor and expert parallel.

    torchrun --nproc-per-node 4 ...
    model = DeepSeek.from_pretrained(folder, ranks=Ranks(tensor=2, experts=4))

All ranks run the same engine on the same requests.  Between the layers their activations are equal
bit for bit, so they schedule and sample alike.

    tensor    consecutive ranks that divide the heads of attention and the inner columns of dense
              MLPs and shared experts
    experts   number of parts into which the routed experts of a layer are divided

The number of processes P is the larger of the two; the smaller divides it.  If tensor < P, groups
of `tensor` ranks compute the same attention.  If experts < P, P / experts consecutive ranks divide
the inner columns of the same experts.  Each rank has all of the rest: embedding, norms, router,
indexer, head and latent cache.

Parallelization: each rank computes a part of the sum over heads, inner columns and experts.  `sum`
adds the parts, once after attention and once after the MLP or all experts, in fp32 in rank order.
The order of gloo's all_reduce depends on a row's place in the batch, and so would the bits.

Limit: the latency of the exchanges in decoding, the interconnect for prompts.  A sum of M rows of K
values sends 2·M·K values to each rank.  All ranks already have all tokens, so the experts do not
need `deepkern.ExpertParallel`.  With `dispatch` they use it: each rank sends M/P rows to the ranks
of their experts and all gather the results.  With topk = 8 and rows in FP8, a rank receives fewer
bytes if P is more than about 8, down to a half, but in four exchanges, and the host waits.

Source: Megatron-LM (arXiv:1909.08053); the inference code released with DeepSeek-V3.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

import deepkern
from deepkern.arithmetic import cdiv
from deepkern.experts.exchange import Exchange
from deepkern.runtime.contract import check_that
from model.config import Config

BLOCK = 128  # rows and columns of an FP8 weight that have one scale
# A sum takes one exchange if a rank then receives at most this many bytes (10 µs at 100 GB/s), and
# two exchanges with fewer bytes otherwise.
ONE_EXCHANGE = 1 << 20


class Ranks:
    """The sizes, the place of this process in them, and the exchanges of a forward pass.

    `Ranks()` is one process, without a process group.

    Args:
        tensor, experts: as above.
        dispatch: send tokens to the ranks of their experts; requires experts = P.
        timeout: seconds that an exchange waits for other ranks, the first one for their loading.

    Raises:
        ValueError: a size is less than 1 or does not divide the other.
        ExpertParallelError: from the exchanges: another rank has ended or did not answer in time.
            The message names it.
    """

    def __init__(
        self, tensor: int = 1, experts: int = 1, dispatch: bool = False, timeout: float = 600.0
    ) -> None:
        check_that("Ranks", "tensor", tensor >= 1, "at least 1", tensor)
        check_that("Ranks", "experts", experts >= 1, "at least 1", experts)
        self.tensor, self.experts, self.dispatch, self.timeout = tensor, experts, dispatch, timeout
        self.processes, self.rank = max(tensor, experts), 0
        divides = self.processes % min(tensor, experts) == 0
        expected = f"a divisor or a multiple of experts = {experts}"
        check_that("Ranks", "tensor", divides, expected, tensor)
        expected = f"a multiple of tensor = {tensor} with dispatch"
        check_that("Ranks", "experts", not dispatch or experts >= tensor, expected, experts)
        self.exchange: Exchange | None = None
        self.expert_parallel: deepkern.ExpertParallel | None = None

    def connect(self, config: Config, device: torch.device | str) -> torch.device:
        """Joins the process group and returns the device of this rank.

        The group is NCCL's on a GPU, else gloo's, unless the process has one.  The device "cuda" is
        the GPU of torchrun's LOCAL_RANK.

        Raises ValueError if the sizes do not fit the model or the number of processes.
        """
        self.check(config)
        device = torch.device(device)
        if self.processes == 1:
            return device
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=self.timeout))
        self.rank = dist.get_rank()
        if self.dispatch:
            count = config.n_routed_experts
            self.expert_parallel = deepkern.ExpertParallel(None, count, timeout=self.timeout)
            self.exchange = self.expert_parallel.hops[0].exchange
        else:
            self.exchange = Exchange(dist.group.WORLD, self.timeout)
        return device

    def check(self, config: Config) -> None:
        """Raises ValueError for a size that does not fit the model or the number of processes."""
        c, env = config, os.environ.get("WORLD_SIZE", 1)
        started = dist.get_world_size() if dist.is_initialized() else int(env)
        expected = f"max(tensor, experts) = {self.processes}"
        check_that("Ranks", "processes", started == self.processes, expected, started)
        expected = f"a divisor of num_attention_heads = {c.num_attention_heads}"
        divides = c.num_attention_heads % self.tensor == 0
        check_that("Ranks", "tensor", divides, expected, self.tensor)
        limits = [("tensor", self.tensor, "intermediate_size", c.intermediate_size)]
        limits.append(("experts", self.experts, "n_routed_experts", c.n_routed_experts))
        if c.n_routed_experts:
            inner, columns = c.moe_intermediate_size, self.processes // self.experts
            limits.append(("tensor / experts", columns, "moe_intermediate_size", inner))
            if c.n_shared_experts:
                inner *= c.n_shared_experts
                limits.append(("tensor", self.tensor, "the shared experts' size", inner))
        for name, value, what, size in limits:
            check_that("Ranks", name, value <= max(1, size), f"at most {what} = {size}", value)

    # The parts of this rank.

    def heads(self, count: int) -> slice:
        return part(count, self.tensor, self.rank % self.tensor)

    def columns(self, inner: int) -> slice:
        """Inner columns of a dense MLP or of the shared experts."""
        return part(inner, self.tensor, self.rank % self.tensor, BLOCK)

    def expert_range(self, count: int) -> range:
        """The routed experts."""
        return range(count)[part(count, self.experts, self.rank * self.experts // self.processes)]

    def expert_columns(self, inner: int) -> slice:
        """The inner columns of each of them."""
        count = self.processes // self.experts
        return part(inner, count, self.rank % count, BLOCK)

    def rows(self, count: int) -> slice:
        """The rows that it dispatches."""
        return part(count, self.processes, self.rank)

    # The exchanges.

    def sum(self, x: Tensor, count: int) -> Tensor:
        """x [M, K] of `count` consecutive ranks -> the sum, equal on all, added in rank order.

        With two exchanges, a rank receives some rows of all, adds them and sends the sums to all.
        """
        if count == 1:
            return x
        if x.nbytes * count <= ONE_EXCHANGE:
            return ordered_sum(self._send_to_all(x, [len(x)] * count).view(count, *x.shape))
        rows = split(len(x), count)
        own = rows[self.rank % count]
        received = self._send(x, rows, [own] * count)
        return self._send_to_all(ordered_sum(received.view(count, own, -1)), rows)

    def gather(self, x: Tensor, count: int) -> Tensor:
        """x, for the `rows` of each rank -> all rows [count, K]."""
        return self._send_to_all(x, split(count, self.processes))

    def _send_to_all(self, x: Tensor, received: list[int]) -> Tensor:
        count = len(received)
        return self._send(x.repeat(count, 1), [len(x)] * count, received)

    def _send(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends rows of x to each rank of the group, `len(sent)` ranks: [sum(received), K].

        All groups share one `Exchange`, so that an error names the lost ranks of any group.
        """
        assert self.exchange is not None
        first = self.rank // len(sent) * len(sent)
        before, after = [0] * first, [0] * (self.processes - first - len(sent))
        self.exchange.begin("sum")
        rows = x.contiguous().view(torch.uint8)
        counts = before + sent + after, before + received + after
        return self.exchange.start("sum", rows, *counts).wait().view(x.dtype)


def part(size: int, count: int, index: int, unit: int = 1) -> slice:
    """Part `index` of `count` parts with borders at multiples of `unit`, a power of two.

    The first parts have up to a unit more.  With fewer units than parts the unit is halved until
    there are enough; each part is then within one unit of twice the size.
    """
    while unit > 1 and cdiv(size, unit) < count:
        unit //= 2
    units = split(cdiv(size, unit), count)
    start = sum(units[:index]) * unit
    return slice(start, min(start + units[index] * unit, size))


def split(size: int, count: int) -> list[int]:
    """The sizes of `count` parts; the first ones are larger by one if it does not divide."""
    quotient, remainder = divmod(size, count)
    return [quotient + (index < remainder) for index in range(count)]


def ordered_sum(parts: Tensor) -> Tensor:
    """[ranks, M, K] -> [M, K], in fp32 in the order of the ranks, rounded once."""
    total = parts[0].float()
    for one in parts[1:]:
        total = total + one
    return total.to(parts.dtype)


ALONE = Ranks()  # one process
