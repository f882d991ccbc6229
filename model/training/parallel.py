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
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import deepkern
from deepkern import ExpertParallelError
from model.config import Config
from model.training.recipe import Recipe

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
# Their names from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
NOTE, WAITED = "deepkern/training/failed", "waited"  # key and text of the note of a failed rank
COLLECTIVE = 0.4  # fraction of the timeout; the rest is for the notes of the other ranks


class ParallelError(RuntimeError):
    """Another rank failed or did not answer in time; the message names it."""


@dataclass(frozen=True)
class Layout:
    """The number of ranks in each direction; data · context · tensor is the number of processes.

    experts: consecutive ranks that divide the experts of a layer; a divisor of that number.
    """

    data: int = 1
    context: int = 1
    tensor: int = 1
    experts: int = 1

    @property
    def processes(self) -> int:
        return self.data * self.context * self.tensor

    def check(self, config: Config, recipe: Recipe) -> None:
        """Raises ValueError for a size that does not divide what it must divide."""
        c = config
        dense = {"intermediate_size": c.intermediate_size}
        if c.n_shared_experts and c.n_routed_experts:
            dense["shared experts' size"] = c.moe_intermediate_size * c.n_shared_experts
        sizes: dict[str, dict[str, int]] = {
            "data": {"batch": recipe.batch},
            "tensor": {"num_attention_heads": c.num_attention_heads, **dense},
            "experts": {"n_routed_experts": c.n_routed_experts, "processes": self.processes},
        }
        for name, divided in sizes.items():
            for what, size in divided.items():
                if size % getattr(self, name):
                    text = f"expected a divisor of {what} = {size}, got {getattr(self, name)}"
                    raise ValueError(f"Layout: {name}: {text}")
        if self.context > 1 and recipe.window % (2 * self.context):
            text = f"expected a multiple of 2 * context = {2 * self.context}, got {recipe.window}"
            raise ValueError(f"Layout: window: {text}")


class Parallel:
    """The place of this process in a layout, and the collectives of a training step.

    Without arguments it is that of a run of one process, which needs no process group; then all
    methods return their argument.

    layout: the sizes.
    timeout: seconds after which all ranks have ended if one of them is lost; 0.4 of it is the limit
        of a collective.

    Raises ValueError if the layout has another number of processes than torchrun started.
    """

    def __init__(self, layout: Layout | None = None, timeout: float = 600.0) -> None:
        self.layout = layout = layout or Layout()
        self.rank, self.timeout, self.limit = 0, timeout, COLLECTIVE * timeout
        for name in ("data", "context", "tensor", "experts"):
            if getattr(layout, name) < 1:
                raise ValueError(f"Layout: {name}: expected 1 or more, got {getattr(layout, name)}")
        started = dist.get_world_size() if dist.is_initialized() else _environment_size()
        if started != layout.processes:
            text = f"expected data * context * tensor = {layout.processes}, got {started}"
            raise ValueError(f"Layout: processes: {text}")
        self.data_rank = self.context_rank = self.tensor_rank = 0
        self.experts: deepkern.ExpertParallel | None = None
        self.device = torch.device("cpu")
        if layout.processes > 1:
            self._connect()

    def _connect(self) -> None:
        """Joins the process group and makes those of the layout."""
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        limit = timedelta(seconds=self.limit)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=limit)
        self.rank = dist.get_rank()
        if kind == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
            torch.cuda.set_device(self.device)
        y = self.layout
        shape, names = (y.data, y.context, y.tensor), ("data", "context", "tensor")
        self.grid = init_device_mesh(kind, shape, mesh_dim_names=names)
        shape, names = (y.data * y.context, y.tensor), ("tokens", "tensor")
        self.dense = init_device_mesh(kind, shape, mesh_dim_names=names)
        shape, names = (y.processes // y.experts, y.experts), ("replicas", "experts")
        self.sparse = init_device_mesh(kind, shape, mesh_dim_names=names)
        self.data_rank, self.context_rank, self.tensor_rank = self.grid.get_coordinate()
        meshes = (self.grid, self.dense, self.sparse)
        for group in [dist.group.WORLD, *(g for mesh in meshes for g in mesh.get_all_groups())]:
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
        """Replaces the weights by this rank's parts of them."""
        y = self.layout
        if y.processes == 1:
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

    @contextmanager
    def naming_lost_ranks(self, what: str) -> Iterator[None]:
        """Turns a failed collective into a ParallelError that names the ranks that are the cause.

        A rank that fails leaves a note in the store of the job.  One whose collective failed waits
        for the notes of the others, which take as long as their collectives.
        """
        try:
            yield
        except Exception as error:
            if self.layout.processes == 1:
                raise
            line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            # The collectives of gloo raise RuntimeError itself.
            is_collective = type(error) is RuntimeError
            if not (is_collective or isinstance(error, (dist.DistError, ExpertParallelError))):
                self._leave_note(line)
                raise
            raise ParallelError(f"{what}: {self._cause()} (here: {line})") from error

    def _leave_note(self, text: str) -> dist.Store:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{NOTE}{self.rank}", text)
        return store

    def _cause(self) -> str:
        """The ranks without a note, and the errors of the others that are not of a collective."""
        ranks = range(self.layout.processes)
        try:
            store = self._leave_note(WAITED)
            until = time.monotonic() + self.timeout - self.limit
            while silent := [r for r in ranks if not store.check([f"{NOTE}{r}"])]:
                if time.monotonic() > until:
                    break
                time.sleep(0.05)
            notes = {r: store.get(f"{NOTE}{r}").decode() for r in ranks if r not in silent}
        except RuntimeError:
            return "no answer from the store of the job, which is usually on rank 0"
        causes = [
            f"rank {rank} failed with {note}" for rank, note in notes.items() if note != WAITED
        ]
        if silent:
            names = ", ".join(map(str, silent))
            causes.append(f"no answer from rank {names} within {self.timeout:g} s")
        return "; ".join(causes) or f"all ranks gave up, after at most {self.limit:g} s"


def _environment_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


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


class Enter(torch.autograd.Function):
    """x -> x; the gradient is the sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Leave(torch.autograd.Function):
    """x -> its sum over the group; the gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


class Gather(torch.autograd.Function):
    """x [T, ...] -> [size · T, ...] of all ranks; the gradient is summed over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((group.size() * len(x), *x.shape[1:]))
        all_gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        out = grad.new_empty((len(grad) // ctx.group.size(), *grad.shape[1:]))
        reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out, None
