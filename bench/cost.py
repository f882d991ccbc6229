"""What training and serving a preset cost on a GPU: GPU-hours, tokens per second and dollars.

A GPU's seconds per token are the times of its op calls over all layers, divided by its tokens:
pipeline stages divide both the layers and the GPUs. In training, the exchanges of the experts
overlap with computation and the longer one of the two counts. In serving, overlap needs two
half-batches, each of which reads all weights; `serve` compares it with a step without overlap.
`Assumptions` has what is assumed.

Layouts: pipeline stages x expert-parallel GPUs, the rest of the cluster data-parallel with the
optimizer's state distributed (ZeRO-1); attention, router and shared expert are in every GPU of a
stage. The layout that is reported is the cheapest one that fits into memory;
of those that cost almost the same, the one of fewest GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from deepkern.arithmetic import cdiv
from model.config import Config

from . import steps
from .gpus import NODE, Gpu
from .op_calls import PATHS, Call
from .op_times import OpTimes, Time

CLOSE = 0.02  # times that differ by less count as equal in the choice of a layout


@dataclass(frozen=True)
class Assumptions:
    """Numbers that are neither in the preset nor properties of a GPU; sources in cost_page.py."""

    sequence: int = 4096
    global_batch: int = 15360  # sequences of an optimizer step
    micro_batch: int = 1  # sequences
    cluster: int = 2048  # GPUs
    reserved: float = 0.10  # of the memory
    imbalance: float = 1.1  # rows of the busiest GPU over the mean
    communication_sms: float = 20 / 132  # of the GPU, in training and overlapped prefill
    link_share: float = 0.80  # attained, of the peak of NVLink and PCIe
    network_share: float = 0.90
    prompt: int = 4096
    prefill_tokens: int = 16384  # of a GPU in one step
    context: int = 4989  # cached tokens of a sequence in decoding
    batches: tuple[int, ...] = (  # sequences of a GPU
        288, 256, 240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 56, 48, 40, 32, 28,
        24, 20, 16, 14, 12, 10, 8, 6, 4, 2, 1,
    )  # fmt: skip
    user_speed: float = 20  # tokens per second and sequence, at least


@dataclass(frozen=True)
class Layout:
    """`pp` pipeline stages of `ep` expert-parallel GPUs, in one arithmetic."""

    path: str
    pp: int
    ep: int
    recompute: str = "selective"

    @property
    def gpus(self) -> int:
        return self.pp * self.ep


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, with the prediction layers."""

    experts: int  # routed
    dense: int  # all other linear layers
    vocabulary: int  # embedding and head, which the prediction layers use too

    @property
    def total(self) -> int:
        return self.experts + self.dense + self.vocabulary


@dataclass(frozen=True)
class Training:
    """One GPU's part of an optimizer step; seconds are those of a micro-batch."""

    gpu: Gpu
    layout: Layout
    compute: Time
    parts: dict[str, float]  # forward, recompute, backward, without the SMs of communication
    flops: int  # of a micro-batch
    communication: float
    bubble: float  # fraction of the micro-batches' time
    update: float  # per optimizer step: AdamW, gradients and weights between replicas
    micro_batches: int
    tokens: int  # of a micro-batch
    memory: float  # GB

    @property
    def computing(self) -> float:
        """With the SMs that move the experts' rows."""
        return sum(self.parts.values())

    @property
    def step(self) -> float:
        """Seconds per micro-batch and GPU, all included."""
        busy = max(self.computing, self.communication) * (1 + self.bubble)
        return busy + self.update * self.layout.pp / self.micro_batches

    @property
    def hours_per_trillion(self) -> float:
        return self.step / self.tokens * 1e12 / 3600

    @property
    def dollars_per_trillion(self) -> float:
        return self.hours_per_trillion * self.gpu.price

    @property
    def utilization(self) -> float:
        """FLOPs without recomputation, over the bf16 peak."""
        return self.flops / self.step / (self.gpu.arch.bf16_tflops * 1e12)


@dataclass(frozen=True)
class Serving:
    """One forward step of a GPU."""

    gpu: Gpu
    layout: Layout
    overlap: bool  # two half-batches, one computes while the other one exchanges
    compute: Time  # of all half-batches
    computing: float
    communication: float
    tokens: int  # of the GPU in this step: prompt tokens, or sequences
    memory: float  # GB

    @property
    def step(self) -> float:
        if self.overlap:
            return max(self.computing, self.communication)
        return self.computing + self.communication

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def dollars_per_million(self) -> float:
        return self.gpu.price / 3600 / self.tokens_per_second * 1e6


_Step = TypeVar("_Step", Training, Serving)


def parameters(c: Config, prediction: bool = True) -> Parameters:
    """`prediction`: with the layers of multi-token prediction."""
    shapes = [steps.first_projection(c), steps.query_projection(c), steps.key_projection(c),
              steps.output_projection(c)]  # fmt: skip
    shapes += steps.indexer_projections(c)
    attention = sum(N * K for N, K in filter(None, shapes))
    K, expert = c.hidden_size, 3 * c.hidden_size * c.moe_intermediate_size
    counts, depth = steps.layer_counts(c, prediction), c.num_nextn_predict_layers * prediction
    moe, dense = counts.get(True, 0), counts.get(False, 0)
    per_moe_layer = attention + c.n_routed_experts * K + c.n_shared_experts * expert
    per_dense_layer = attention + 3 * K * c.intermediate_size
    return Parameters(
        experts=moe * c.n_routed_experts * expert,
        dense=moe * per_moe_layer + dense * per_dense_layer
        + depth * 2 * K * K,
        vocabulary=2 * c.vocab_size * K,
    )  # fmt: skip


# Communication of the experts.


def distinct(places: float, picks: int) -> float:
    """Expected number of different places among `picks` random ones."""
    return places * (1 - (1 - 1 / places) ** picks)


def copies(c: Config, ep: int, direct: bool) -> tuple[float, float]:
    """Rows of a token that go to other nodes, and to other GPUs of a node.

    With `direct`, each expert receives its own row (decoding). Otherwise a row crosses to a node
    once and is forwarded there, and the groups of the router limit the nodes.
    """
    topk, nodes = c.num_experts_per_tok, max(1, ep // NODE)
    ranks = min(ep, NODE)
    if direct:
        return topk * (1 - 1 / nodes), topk / nodes * (1 - 1 / ranks)
    reachable = nodes
    if c.n_group > 1:
        reachable = min(nodes, c.topk_group * max(1, nodes // c.n_group))
    network = distinct(reachable, topk) * (1 - 1 / nodes)
    return network, distinct(reachable * ranks, topk) * (1 - 1 / ranks)


def exchange(c: Config, gpu: Gpu, layout: Layout, T: int, a: Assumptions, direct: bool) -> float:
    """Seconds of one dispatch and one combine of T tokens of a GPU."""
    if layout.ep == 1 or not c.n_routed_experts:
        return 0.0
    K = c.hidden_size
    sent = K + 4 * cdiv(K, 128) if layout.path == "fp8" else 2 * K
    row = T * (sent + 2 * K) * a.imbalance
    network, link = copies(c, layout.ep, direct)
    rates = gpu.network * a.network_share, gpu.link * a.link_share
    return max(network * row / (rates[0] * 1e9), link * row / (rates[1] * 1e9))


def balanced(time: Time, a: Assumptions) -> float:
    """Seconds of the busiest GPU: routed experts have more rows than the mean."""
    experts = time.by(0).get(steps.EXPERTS, 0.0)
    return time.seconds + experts * (a.imbalance - 1)


# Training.


@functools.cache
def config(preset: str) -> Config:
    return Config.preset(preset)


@functools.cache
def _training_calls(preset: str, T: int, S: int, experts: int, path: str, recompute: str) -> dict:
    return steps.training_step(config(preset), T, S, experts, path, recompute)


def stages_of_a_gpu(layout: Layout) -> int:
    """DualPipe runs two stages on each GPU, so each parameter of a pipeline is on two GPUs."""
    return 2 if layout.pp > 1 else 1


def training_memory(c: Config, layout: Layout, a: Assumptions, gpus: int) -> float:
    """GB: weights, fp32 gradients, the optimizer's state, and what the backward pass reads."""
    p = parameters(c)
    own = (p.dense + p.vocabulary + p.experts / layout.ep) / layout.pp
    weight = 1 if layout.path == "fp8" else 2
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    saved = steps.saved_bytes(c, layout.path, layout.recompute)
    T = a.micro_batch * a.sequence
    in_flight = layers * (1 + 1 / layout.pp)  # a stage keeps pp + 1 micro-batches of its layers
    logits = 6 * T * c.vocab_size  # bf16, and fp32 in the loss
    state = stages_of_a_gpu(layout) * own * (weight + 4) + 8 * p.total / gpus
    return (state + in_flight * T * saved + logits) / 1e9


def update(c: Config, gpu: Gpu, layout: Layout, times: OpTimes, a: Assumptions) -> float:
    """Seconds of an optimizer step outside the micro-batches.

    A GPU sends the gradients of all its stages, and receives their weights: both copies of a stage
    have gradients of their own micro-batches.
    """
    p, stages = parameters(c), stages_of_a_gpu(layout)
    local = steps.optimizer_step(cdiv(p.total, a.cluster), layout.path)
    replicas = stages * a.cluster / layout.gpus
    dense = (p.dense + p.vocabulary) / layout.pp
    experts = p.experts / layout.gpus * (1 - 1 / replicas)
    moved = stages * (dense + experts) * (4 + (1 if layout.path == "fp8" else 2))
    return times.total(local).seconds + moved / (gpu.network * a.network_share * 1e9)


def train(preset: str, times: OpTimes, layout: Layout, a: Assumptions) -> Training:
    """A step of `a.cluster` GPUs in this layout."""
    c, gpu, T = config(preset), times.gpu, a.micro_batch * a.sequence
    calls = _training_calls(preset, T, a.sequence, cdiv(max(c.n_routed_experts, 1), layout.ep),
                            layout.path, layout.recompute)  # fmt: skip
    spent = {name: times.total(part) for name, part in calls.items()}
    slower = 1 / (1 - a.communication_sms) if layout.ep > 1 else 1.0
    parts = {name: balanced(time, a) * slower for name, time in spent.items()}
    forward, backward = parts["forward"], parts["backward"] + parts["recompute"]
    micro_batches = a.global_batch // a.micro_batch * layout.pp // a.cluster
    # DualPipe (table 2 of the report): (pp/2 - 1)(F&B + B - 3W), with F&B = F + B and W = F.
    idle = max(0.0, layout.pp / 2 - 1) * max(0.0, 2 * backward - 2 * forward)
    layers = steps.layer_counts(c).get(True, 0)
    passes = 3 if layout.recompute == "full" else 2  # forward, backward; recomputed forward
    exchanged = passes * layers * exchange(c, gpu, layout, T, a, direct=False)
    boundaries = 2 * (layout.pp - 1) * T * 2 * c.hidden_size / (gpu.network * 1e9)
    return Training(
        gpu, layout, sum(spent.values(), Time()), parts,
        sum(x.flops for name in ("forward", "backward") for x in calls[name]),
        exchanged + boundaries, idle / (micro_batches * (forward + backward)),
        update(c, gpu, layout, times, a), micro_batches, T,
        training_memory(c, layout, a, a.cluster),
    )  # fmt: skip


def expert_parallel(c: Config) -> list[int]:
    """GPUs over which the experts can be distributed: divisors of their number, whole nodes."""
    E = c.n_routed_experts
    return [n for n in range(1, E + 1) if E % n == 0 and (n <= NODE or n % NODE == 0)] or [1]


def paths(gpu: Gpu, serving: bool) -> tuple[str, ...]:
    """The arithmetic to consider: FP8 weights can be served without FP8 tensor cores."""
    return PATHS if gpu.fp8_tensor_cores or serving else ("bf16",)


def training_layouts(c: Config, gpu: Gpu, a: Assumptions) -> Iterator[Layout]:
    for path in paths(gpu, serving=False):
        for ep in expert_parallel(c):
            for pp in (1, 2, 4, 8, 16, 32):
                if pp <= c.num_hidden_layers and pp * ep <= a.cluster:
                    for recompute in steps.RECOMPUTE:
                        yield Layout(path, pp, ep, recompute)


def smallest_of_cheapest(found: list[_Step]) -> _Step | None:
    """The step of fewest GPUs among those within `CLOSE` of the least time per token."""
    least = min((s.step / s.tokens for s in found), default=0.0)
    close = [s for s in found if s.step / s.tokens <= least * (1 + CLOSE)]
    return min(close, key=lambda s: (s.layout.gpus, s.step / s.tokens), default=None)


def cheapest_training(preset: str, times: OpTimes, a: Assumptions) -> Training | None:
    """In the cheapest layout that fits; None if none does, and for a model with an indexer."""
    c, gpu = config(preset), times.gpu
    if c.is_sparse:
        return None
    room = gpu.memory * (1 - a.reserved)
    layouts = [layout for layout in training_layouts(c, gpu, a)
               if training_memory(c, layout, a, a.cluster) <= room]  # fmt: skip
    return smallest_of_cheapest([train(preset, times, layout, a) for layout in layouts])


def least_training(preset: str, gpu: Gpu, a: Assumptions) -> Layout | None:
    """The layout of fewest GPUs whose memory holds model, optimizer and activations."""
    c, room = config(preset), gpu.memory * (1 - a.reserved)
    fitting = [layout for layout in training_layouts(c, gpu, a)
               if training_memory(c, layout, a, layout.gpus) <= room]  # fmt: skip
    return min(fitting, key=lambda layout: layout.gpus, default=None)


# Serving.


@functools.cache
def _prefill_calls(preset: str, T: int, S: int, experts: int, path: str) -> list[Call]:
    return steps.prefill_step(config(preset), T, S, experts, path)


@functools.cache
def _decode_calls(preset: str, B: int, context: int, experts: int, path: str) -> list[Call]:
    return steps.decode_step(config(preset), B, context, experts, path)


def weights_memory(c: Config, layout: Layout) -> float:
    """GB of a GPU, without prediction layers."""
    p = parameters(c, prediction=False)
    size = 1 if layout.path == "fp8" else 2
    own = size * (p.dense + p.experts / layout.ep) + 2 * p.vocabulary
    return own / layout.pp / 1e9


def activation_memory(c: Config, T: int) -> float:
    """GB of the largest intermediate results: queries, keys, values, and rows of experts."""
    heads = c.num_attention_heads * 2 * (2 * c.qk_head_dim + 2 * c.v_head_dim)
    rows = c.num_experts_per_tok * (3 * c.hidden_size + 5 * c.moe_intermediate_size)
    return T * (heads + rows + 4 * c.hidden_size) / 1e9


def cache_memory(c: Config, sequences: int, length: int) -> float:
    """GB: latents in bf16, and the indexer's keys in FP8 with a scale."""
    index = c.index_head_dim + 4 if c.is_sparse else 0
    return sequences * length * c.num_hidden_layers * (2 * c.cache_width + index) / 1e9


def serving_memory(c: Config, layout: Layout, tokens: int, decoding: bool, a: Assumptions) -> float:
    """GB: weights, activations of a step, and the cache of its sequences or prompts."""
    kept = cache_memory(c, tokens, a.context) if decoding else cache_memory(c, 1, tokens)
    return weights_memory(c, layout) + activation_memory(c, tokens) + kept


def serving_layouts(
    c: Config, gpu: Gpu, tokens: int, decoding: bool, a: Assumptions
) -> Iterator[Layout]:
    """For each arithmetic and EP, the fewest pipeline stages that fit: more gain no time."""
    room = gpu.memory * (1 - a.reserved)
    for path in paths(gpu, serving=True):
        for ep in expert_parallel(c):
            stages = [Layout(path, pp, ep) for pp in (1, 2, 4, 8) if pp <= c.num_hidden_layers]
            yield from [layout for layout in stages
                        if serving_memory(c, layout, tokens, decoding, a) <= room][:1]  # fmt: skip


def serve(
    preset: str, times: OpTimes, layout: Layout, tokens: int, decoding: bool, a: Assumptions
) -> Serving:
    """A prefill step of `tokens` prompt tokens, or a decoding step of `tokens` sequences.

    The faster one of the whole batch without overlap and, if the batch divides, of two halves.
    """
    divides = tokens % (2 if decoding else 2 * a.prompt) == 0
    schedules = (False, True) if divides else (False,)
    return min((scheduled_step(preset, times, layout, tokens, decoding, overlap, a)
                for overlap in schedules), key=lambda s: s.step)  # fmt: skip


def scheduled_step(
    preset: str,
    times: OpTimes,
    layout: Layout,
    tokens: int,
    decoding: bool,
    overlap: bool,
    a: Assumptions,
) -> Serving:
    """`overlap`: as two half-batches, each of which reads all weights."""
    c, gpu = config(preset), times.gpu
    experts = cdiv(max(c.n_routed_experts, 1), layout.ep)
    batch = tokens // 2 if overlap else tokens
    if decoding:
        calls = _decode_calls(preset, batch, a.context, experts, layout.path)
    else:
        calls = _prefill_calls(preset, batch, a.prompt, experts, layout.path)
    time = times.total(calls)
    time = time + time if overlap else time
    lost = a.communication_sms if overlap and layout.ep > 1 and not decoding else 0.0
    layers = sum(c.is_moe(i) for i in range(c.num_hidden_layers))
    moved = layers * exchange(c, gpu, layout, tokens, a, direct=decoding)
    moved += (layout.pp - 1) * tokens * 2 * c.hidden_size / (gpu.network * 1e9)
    memory = serving_memory(c, layout, tokens, decoding, a)
    busy = balanced(time, a) / (1 - lost)
    return Serving(gpu, layout, overlap, time, busy, moved, tokens, memory)


def cheapest_prefill(preset: str, times: OpTimes, a: Assumptions) -> Serving | None:
    layouts = serving_layouts(config(preset), times.gpu, a.prefill_tokens, False, a)
    return smallest_of_cheapest(
        [serve(preset, times, layout, a.prefill_tokens, False, a) for layout in layouts]
    )


def cheapest_decode(preset: str, times: OpTimes, a: Assumptions) -> Serving | None:
    """The most tokens per second at `a.user_speed`; if none is as fast, the fastest for a user."""
    found = [
        serve(preset, times, layout, B, True, a)
        for B in a.batches
        for layout in serving_layouts(config(preset), times.gpu, B, True, a)
    ]
    fast = [s for s in found if s.step <= 1 / a.user_speed]
    if fast:
        return smallest_of_cheapest(fast)
    return min(found, key=lambda s: s.step, default=None)


def least_serving(preset: str, gpu: Gpu, a: Assumptions) -> Layout | None:
    """The layout of fewest GPUs that decodes one sequence of `a.context` tokens."""
    layouts = serving_layouts(config(preset), gpu, 1, True, a)
    return min(layouts, key=lambda layout: layout.gpus, default=None)
