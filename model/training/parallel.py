"""Training over several processes: data, context, tensor and expert parallel.

    torchrun --nproc-per-node 8 ...
    parallel = Parallel(Layout(data=2, context=2, tensor=2, experts=4))
    run = Run(config, recipe, tokens, folder, parallel)

The ranks are a grid, rank = (data · contexts + context) · tensors + tensor:

    data      ranks with other sequences of a batch
    context   ranks with other tokens of the same sequences; see `model/training/context.py`
    tensor    ranks with the same tokens and other heads and columns of the MLPs
    experts   this number of consecutive ranks divides the routed experts of a layer among them

A rank dispatches its own tokens to the ranks with their experts (`deepkern.ExpertParallel`).  Of
the tokens that the ranks of a tensor group have in common, each of them dispatches a part.  So any
number of processes may divide the experts, and each token is processed once.

Weights are also sharded by `fully_shard` (FSDP2) over the data and context ranks, and those of the
experts over the groups of expert ranks.  They are fp32 DTensors that know the whole shape.  Casts
to FP8 follow the gathering of a weight, so that they give the bits of one process, except where a
tensor rank's part does not start at a multiple of 128 rows or columns.

There is no pipeline parallelism: torch's schedules need several batches per step and a model in
stages.  Context parallelism needs neither, and the latents that it gathers are small.

Source: ZeRO (arXiv:1910.02054); tensor parallelism of Megatron-LM (arXiv:1909.08053).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import deepkern
from model.training.collectives import Enter, Gather, Leave
from model.training.layout import Layout, processes_of_job
from model.training.lost_ranks import LostRanks
from model.training.processes import process_group

if TYPE_CHECKING:
    from model.training.modules import TrainableDeepSeek

# Dimension of a weight that tensor ranks divide: rows of heads, and columns of what reads them.
TENSOR_DIMS = {
    "q_b_proj.weight": 0,
    "q_proj.weight": 0,
    "kv_b_proj.weight": 0,
    "o_proj.weight": 1,
    "gate_up_proj": 1,
    "down_proj": 1,
}
EXPERT_WEIGHTS = (".experts.w13", ".experts.w2")
COLLECTIVE = 0.4  # fraction of the timeout; the rest is for the notes of the other ranks


class Parallel:
    """The place of this process in a layout, and the collectives of a training step.

    Without arguments it is that of a run of one process, which needs no process group.

    layout: the sizes.
    timeout: seconds after which all ranks have ended if one of them is lost; 0.4 of it is the limit
        of a collective.

    Raises ValueError if torchrun started another number of processes than the layout has.
    """

    def __init__(self, layout: Layout | None = None, timeout: float = 600.0) -> None:
        self.layout = layout = layout or Layout()
        self.rank, self.limit = 0, COLLECTIVE * timeout
        self.lost_ranks = LostRanks(timeout, timeout - self.limit)
        if layout.processes > 1:
            started = processes_of_job()
            if started != layout.processes:
                text = f"expected data * context * tensor = {layout.processes}, got {started}"
                raise ValueError(f"Layout: processes: {text}")
        self.data_rank = self.context_rank = self.tensor_rank = 0
        self.experts: deepkern.ExpertParallel | None = None
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if layout.processes > 1:
            self._connect()

    def _connect(self) -> None:
        """Joins the process group and makes those of the layout."""
        kind = self.device.type
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        limit = timedelta(seconds=self.limit)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=limit)
        self.rank = dist.get_rank()
        y = self.layout
        shape, names = (y.data, y.context, y.tensor), ("data", "context", "tensor")
        self.grid = init_device_mesh(kind, shape, mesh_dim_names=names)
        shape, names = (y.data * y.context, y.tensor), ("tokens", "tensor")
        self.dense = init_device_mesh(kind, shape, mesh_dim_names=names)
        shape, names = (y.processes // y.experts, y.experts), ("replicas", "experts")
        self.sparse = init_device_mesh(kind, shape, mesh_dim_names=names)
        self.data_rank, self.context_rank, self.tensor_rank = self.grid.get_coordinate()
        meshes = (self.grid, self.dense, self.sparse)
        groups = [group for mesh in meshes for group in mesh.get_all_groups()]
        for group in [dist.group.WORLD, process_group(), *groups]:
            dist.distributed_c10d._set_pg_timeout(limit, group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def token_ranks(self) -> int:
        """The number of ranks with tokens of their own."""
        return self.layout.data * self.layout.context

    def rows(self, batch: Tensor) -> Tensor:
        """The sequences of this rank in a batch of all."""
        return batch.chunk(self.layout.data)[self.data_rank].to(self.device)

    # The weights.

    def shard(self, model: TrainableDeepSeek) -> None:
        """Moves the model to the device and replaces the weights by this rank's parts of them."""
        y = self.layout
        if y.processes == 1:
            model.to(self.device)
            return
        for name, parameter in list(model.named_parameters()):
            dims = [dim for suffix, dim in TENSOR_DIMS.items() if name.endswith("." + suffix)]
            if dims and y.tensor > 1:
                mesh, dim = self.dense["tensor"], dims[0]
            elif name.endswith(EXPERT_WEIGHTS) and y.experts > 1:
                mesh, dim = self.sparse["experts"], 0
            else:
                continue
            owner, _, last = name.rpartition(".")
            part = distribute_tensor(parameter.data, mesh, [Shard(dim)], src_data_rank=None)
            setattr(model.get_submodule(owner), last, nn.Parameter(part))
        if y.experts > 1:
            mesh, count = self.sparse["experts"], model.config.n_routed_experts
            self.experts = deepkern.ExpertParallel(mesh, count, timeout=self.limit)
        for moe in model.experts:
            self._fully_shard(moe.experts, self.sparse["replicas"])
        for layer in (*model.layers, *model.prediction):
            self._fully_shard(layer, self.dense["tokens"])
        self._fully_shard(model, self.dense["tokens"])
        register_fsdp_forward_method(model, "predict")

    def _fully_shard(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Shards the weights over `mesh`; their gradients are the sums over all ranks / tokens."""

        def placement(parameter: nn.Parameter) -> Shard | None:
            """A dimension that no other mesh divides, if the ranks divide it evenly."""
            if not isinstance(parameter, DTensor):
                return None
            taken = {p.dim for p in parameter.placements if isinstance(p, Shard)}
            fitting = [
                dim
                for dim, size in enumerate(parameter.shape)
                if dim not in taken and size % mesh.size() == 0
            ]
            return Shard(fitting[0]) if fitting else None

        fully_shard(module, mesh=mesh, shard_placement_fn=placement)
        module.set_gradient_divide_factor(float(self.token_ranks))
        # gloo sums only.  On one rank, this option of torch 2.13 divides by the factor twice.
        module.set_force_sum_reduction_for_comms(mesh.size() > 1)

    def reshard(self, model: nn.Module) -> None:
        """Frees gathered weights after a pass without a backward pass."""
        if self.layout.processes > 1:
            model.reshard()

    def clip_norm(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """The norm of the gradient, which is scaled to at most `limit`."""
        if self.layout.processes == 1:
            return torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for grad in gradients:
            parts = 1  # into which the ranks divide it; the others have copies
            for dim, placement in enumerate(grad.placements):
                parts *= grad.device_mesh.size(dim) if not placement.is_replicate() else 1
            norm = torch.linalg.vector_norm(grad.to_local(), dtype=torch.float64)
            total += norm.square() * (parts / self.layout.processes)
        dist.all_reduce(total)
        norm = total.sqrt().item()
        if not norm <= limit:
            for grad in gradients:
                grad.mul_(limit / (norm + 1e-6))
        return norm

    # The activations.

    def enter(self, x: Tensor) -> Tensor:
        """Starts a region in which each tensor rank computes a part: sums the gradients."""
        return x if self.layout.tensor == 1 else Enter.apply(x, self.grid["tensor"].get_group())

    def leave(self, x: Tensor) -> Tensor:
        """Ends it: sums the parts of the tensor ranks."""
        return x if self.layout.tensor == 1 else Leave.apply(x, self.grid["tensor"].get_group())

    def own_assignments(self, experts: Tensor) -> Tensor:
        """experts [T, topk], with -1 for the tokens that another tensor rank dispatches."""
        if self.layout.tensor == 1:
            return experts
        row = torch.arange(len(experts), device=experts.device)[:, None]
        return experts.where(row % self.layout.tensor == self.tensor_rank, -1)

    def gather(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """x [T, ...] of each context rank -> the given rows of all, in the order of the ranks."""
        return x if rows is None else Gather.apply(x, self.grid["context"].get_group())[rows]

    # Sums over the ranks.

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The mean over the ranks of each value."""
        stacked = torch.stack([value.detach() for value in values.values()])
        if self.layout.processes > 1:
            dist.all_reduce(stacked, group=self.dense["tokens"].get_group())
            stacked /= self.token_ranks
        return dict(zip(values, stacked.tolist(), strict=True))

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over the tokens of all ranks."""
        if self.layout.processes > 1:
            dist.all_reduce(counts, group=self.dense["tokens"].get_group())
        return counts

    def naming_lost_ranks(self, what: str) -> AbstractContextManager[None]:
        """Within it, a failed collective raises a ParallelError that names the lost ranks."""
        return nullcontext() if self.layout.processes == 1 else self.lost_ranks.named(what)


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(weight: Tensor) -> Tensor:
    """The values of all ranks, which all of them must gather."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


@torch.no_grad()
def assign(weight: Tensor, value: Tensor) -> None:
    """Copies a value of the whole shape, equal on all ranks, to a weight."""
    if isinstance(weight, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        value = value.to(weight.device)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    weight.copy_(value)
