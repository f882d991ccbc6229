"""moe_forward: against a loop in float64, hostile indices, batches, memory, kernels, gradients."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deepkern
from deepkern import reference
from deepkern.experts.expert_combine import expert_combine_kernel
from deepkern.testing import compare, ops
from deepkern.testing.routing import V3_LAYER

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {"T": 5, "E": 3, "topk": 2, "K": 128, "I": 64}


def make(generator, **size) -> list:
    return list(ops.inputs("moe_forward", generator, **{**SMALL, **size}))


def assert_matches_reference(args) -> torch.Tensor:
    got = deepkern.moe_forward(*args)
    compare.assert_matches("moe_forward", got, reference.moe_forward(*args))
    return got


# Against another formula, with real values


def real_inputs(generator, T, E, topk, K, I, dtype) -> list:
    """Real tokens and weights, cast like a checkpoint."""
    device = generator.device
    args = make(generator, T=T, E=E, topk=topk, K=K, I=I, none=0.2)
    w13 = torch.randn(E, 2 * I, K, generator=generator, device=device) / K**0.5
    w2 = torch.randn(E, K, I, generator=generator, device=device) / I**0.5
    x = torch.randn(T, K, generator=generator, device=device).to(dtype)
    return [x, *args[1:3], *reference.cast_per_block(w13), *reference.cast_per_block(w2)]


def real(q, scale, block) -> torch.Tensor:
    return reference.cast_back(q, scale, block, F32).double()


def token_by_token(x, weights, idx, w13, w13_scale, w2, w2_scale, gate_error=0.0, up_error=0.0):
    """(out [T, K] in float64, the FP8 codes of h by token).

    Before gate and up are rounded, relative errors of gate_error and up_error are added to them.
    """
    w13, w2 = real(w13, w13_scale, (128, 128)), real(w2, w2_scale, (128, 128))
    tokens = real(*reference.cast_per_token(x), (1, 128))
    out, codes = torch.zeros(x.shape, dtype=torch.float64, device=x.device), []
    for t, row in enumerate(tokens):
        codes.append([])
        for j, e in enumerate(idx[t].tolist()):
            if 0 <= e < len(w13):
                gate, up = (w13[e] @ row).chunk(2)
                gate = gate + gate_error * (gate.abs() + gate.std(correction=0))
                up = up + up_error * (up.abs() + up.std(correction=0))
                gate, up = gate.to(x.dtype).double(), up.to(x.dtype).double()
                h = gate / (1 + torch.exp(-gate)) * up
                q, scale = reference.cast_per_token(h[None].float())
                codes[t].append(q.float())
                out[t] += weights[t, j].double() * (w2[e] @ real(q, scale, (1, 128))[0])
    return out, codes


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("K", "I"), [(160, 72), (129, 200)])
def test_token_by_token(backend, K, I, dtype, generator):
    """Tokens whose codes do not depend on the last bits of sums are within docs/numerics.md."""
    args = real_inputs(generator, 14, 3, 2, K, I, dtype)
    want, codes = token_by_token(*args)
    e = 2.0**-20  # the error of a sum in fp32 is a few units of 2^-24
    perturbed = [
        token_by_token(*args, *errors)[1] for errors in ((e, e), (e, -e), (-e, e), (-e, -e))
    ]
    is_stable = [
        all(torch.equal(a, b) for other in perturbed for a, b in zip(row, other[t], strict=True))
        for t, row in enumerate(codes)
    ]
    assert sum(is_stable) >= 8  # of 14; a few percent of the tokens are not
    is_stable = torch.tensor(is_stable, device=want.device)
    got = deepkern.moe_forward(*args)
    compare.assert_close(got[is_stable], want[is_stable])
    assert compare.diff(got, want) < 1e-4  # the others differ by a code or two


def test_as_good_as_plain_pytorch(backend, generator):
    """The error is that of the cast of h and of rounding before the sum, not more."""
    x, weights, idx, *w = real_inputs(generator, 24, 4, 3, 256, 128, BF16)
    w13, w2 = real(*w[:2], (128, 128)), real(*w[2:], (128, 128))

    def layer(x, w13, w2):
        out = torch.zeros(x.shape, dtype=x.dtype if x.dtype == torch.float64 else F32)
        out = out.to(x.device)
        for e in range(4):
            t, j = (idx == e).nonzero(as_tuple=True)
            gate, up = (x[t] @ w13[e].T).chunk(2, 1)
            y = (torch.nn.functional.silu(gate) * up) @ w2[e].T
            out.index_add_(0, t, weights[t, j, None] * y.to(out.dtype))
        return out

    exact = layer(x.double(), w13, w2)
    got = deepkern.moe_forward(x, weights, idx, *w)
    error = compare.diff(got, exact)
    assert compare.diff(layer(x, w13.bfloat16(), w2.bfloat16()), exact) < error < 2e-3  # FP8's


# Shapes


@pytest.mark.parametrize(("E", "topk"), [(1, 1), (7, 1), (5, 5), (3, 8), (20, 3)])
def test_experts_and_slots(kernel_backend, E, topk, generator):
    assert_matches_reference(make(generator, E=E, topk=topk))


@pytest.mark.parametrize("K", [1, 100, 3584, 7168])
def test_hidden_sizes(kernel_backend, K, generator):
    assert_matches_reference(make(generator, T=2, E=2, topk=2, K=K, I=16, none=0.0))


@pytest.mark.parametrize("b_rows", [1, 128])
@pytest.mark.parametrize("I", [1, 64, 72, 130])
def test_scale_block_across_gate_and_up(kernel_backend, I, b_rows, generator):
    """With I = 72, one scale covers the last gates and the first ups."""
    assert_matches_reference(make(generator, T=3, E=2, I=I, b_rows=b_rows))


@pytest.mark.parametrize("T", [1, 0])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_few_tokens(backend, T, dtype, generator):
    got = assert_matches_reference(make(generator, T=T, E=9, dtype=dtype))
    assert got.shape == (T, SMALL["K"]) and got.dtype == dtype


def test_all_to_one_expert(kernel_backend, generator):
    args = make(generator, T=70, E=3, topk=1, K=128, I=16)
    args[2].fill_(1)
    assert_matches_reference(args)


def test_strided_arguments_and_int32(backend, generator):
    args = make(generator)
    want = deepkern.moe_forward(*args)
    x, weights, idx, *w = args
    x = torch.cat([x, x], 1)[:, : SMALL["K"]]
    weights = weights.repeat(1, 2)[:, :2]
    idx = idx.clamp(-1, SMALL["E"]).int().repeat(1, 2)[:, :2]
    w = [t.mT.contiguous().mT if t.dtype == F32 else t for t in w]
    compare.assert_bitwise(deepkern.moe_forward(x, weights, idx, *w), want)


# Indices


def test_hostile_indices(backend, generator):
    x, weights, idx, *w = make(generator, T=5, topk=4, none=0.0)
    hostile = [-1, 3, -(2**31), 2**31, -(2**63), 2**63 - 1, 2**32 + 1]
    idx[1] = torch.tensor(hostile[:4], device=idx.device)
    idx[3, 1:] = torch.tensor(hostile[4:], device=idx.device)
    weights[1], weights[3, 1:] = torch.nan, torch.inf
    got = assert_matches_reference([x, weights, idx, *w])
    assert (got[1] == 0).all() and got.isfinite().all()
    alone = deepkern.moe_forward(x[3:4], weights[3:4, :1].contiguous(), idx[3:4, :1], *w)
    compare.assert_bitwise(alone[0], got[3])


def test_no_valid_index(backend, generator):
    args = make(generator)
    args[0].fill_(torch.nan)
    args[2].fill_(-1)
    assert (deepkern.moe_forward(*args) == 0).all()


def test_duplicate_experts(backend, generator):
    """Each slot has its own weight; with powers of two no sum is rounded."""
    x, weights, idx, *w = make(generator, topk=1, none=0.0)
    once = deepkern.moe_forward(x, torch.full_like(weights, 0.5), idx, *w)
    both = torch.tensor([[0.25, 0.25]], device=x.device).expand(len(x), 2).contiguous()
    compare.assert_bitwise(deepkern.moe_forward(x, both, idx.expand(-1, 2).contiguous(), *w), once)


def test_nan_stays_with_its_token(backend, generator):
    x, *rest = make(generator, none=0.0)
    want = deepkern.moe_forward(x, *rest)
    x = x.clone()
    x[2, 5] = torch.nan
    got = deepkern.moe_forward(x, *rest)
    others = torch.arange(len(x), device=x.device) != 2
    assert got[2].isnan().all()
    compare.assert_bitwise(got[others], want[others])


@pytest.mark.parametrize("order", ["reverse", "random:3"])
def test_any_order_of_programs(order, generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_INTERPRETER_ORDER", order)
    with deepkern.backend("triton"):
        assert_matches_reference(make(generator))


# Decoding and prefill


def test_row_bits_independent_of_T(generator):
    """In a batch with the tiles of prefill, and alone with those of decoding."""
    x, weights, idx, *w = make(generator, T=140, E=2)
    x = torch.randn(x.shape, generator=generator, device=x.device).to(BF16)
    with deepkern.backend("triton"):
        together = deepkern.moe_forward(x, weights, idx, *w)
        choose_tile = deepkern.moe_forward.op.choose_tile
        assert choose_tile(x, weights, idx, *w) != choose_tile(x[:1], weights[:1], idx[:1], *w)
        for tokens in (slice(0, 1), slice(77, 78), slice(100, 117)):
            few = deepkern.moe_forward(x[tokens], weights[tokens], idx[tokens], *w)
            compare.assert_bitwise(few, together[tokens])


class Allocations(TorchDispatchMode):
    """Records the peak bytes of live tensors from torch.empty and similar calls (`most`), and
    whether a value was read by the host."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.read_back = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("empty", "new_empty", "empty_strided", "empty_like", "new_empty_strided"):
            self.now += out.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(out, self.free, out.nbytes)
        self.read_back |= name in ("_local_scalar_dense", "nonzero")
        return out

    def free(self, nbytes: int) -> None:
        self.now -= nbytes


def stated_bytes(T, E, topk, K, I, size) -> int:
    """The docstring's formula."""
    k, i = 4 * -(-K // 128), 4 * -(-I // 128)
    stages = K + k + 2 * I * size, 2 * I * size + I + i, I + i + K * size
    return T * topk * (8 + max(stages)) + 8 * E


@pytest.mark.parametrize(
    ("K", "I", "dtype"),
    [(512, 128, BF16), (256, 384, BF16), (128, 640, F32), (512, 128, F32)],
    ids=["peak_in_gate_up", "peak_in_h", "peak_in_h_fp32", "peak_in_gate_up_fp32"],
)
def test_peak_memory_matches_docstring(K, I, dtype, generator):
    T, E, topk = 20, 2, 2
    args = make(generator, T=T, E=E, topk=topk, K=K, I=I, dtype=dtype)
    with Allocations() as memory:
        out = deepkern.moe_forward.op.launcher("triton")(*args)
    assert memory.most - out.nbytes <= stated_bytes(T, E, topk, K, I, dtype.itemsize)
    assert memory.most - out.nbytes > 0.99 * stated_bytes(T, E, topk, K, I, dtype.itemsize)
    assert memory.now == out.nbytes and not memory.read_back


def test_memory_formula_for_v3():
    assert stated_bytes(1, 0, 8, 7168, 2048, 2) / 8 == pytest.approx(16.5e3, rel=0.01)


# Kernels

STEPS = (
    "expert_dispatch_count",
    "expert_dispatch_scan",
    "expert_dispatch_place",
    "expert_dispatch_copy",
    "m_grouped_fp8_gemm_nt",
    "swiglu_cast",
    "m_grouped_fp8_gemm_nt",
    "expert_combine",
)
BACKWARD_STEPS = (
    "expert_dispatch_count",
    "expert_dispatch_scan",
    "expert_dispatch_place",
    "expert_dispatch_copy",
    "m_grouped_fp8_gemm_nt",
    "moe_forward_backward_scatter",
    "swiglu_cast_backward",
    "moe_forward_backward_gather",
    "cast_per_token",
    "m_grouped_fp8_gemm_nt",
    "expert_combine",
)


@pytest.mark.parametrize(
    ("op", "steps"),
    [("moe_forward", STEPS), ("moe_forward_backward", BACKWARD_STEPS)],
    ids=["forward", "backward"],
)
def test_kernel_names_tell_the_steps(op, steps, generator, monkeypatch):
    """A profiler's trace shows which step of the layer each kernel is."""
    names = []
    kernel_type = type(expert_combine_kernel)  # JITFunction, or the interpreter's
    run = kernel_type.run

    def record(self, *args, **kwargs):
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kernel_type, "run", record)
    args = ops.inputs(op, generator, **SMALL)
    deepkern.OPS[op].launcher("triton")(*args)
    # Some targets transpose the weights before the GEMMs of the backward pass.
    names = [name for name in names if "transpose" not in name]
    assert len(names) == len(steps), names
    for name, step in zip(names, steps, strict=True):
        assert name.startswith(step) and name.endswith("_kernel"), (name, step)
    assert len(set(names)) == len(set(steps)), names


# Gradients


def gradients(args, grad) -> tuple[torch.Tensor, tuple]:
    """The output, and the gradients of x and topk_weights."""
    x, weights, *rest = args
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = deepkern.moe_forward(x, weights, *rest)
    return out, torch.autograd.grad(out, (x, weights), grad)


def test_same_bits_with_gradients_enabled(backend, generator):
    args = make(generator)
    out, _ = gradients(args, torch.ones_like(args[0]))
    compare.assert_bitwise(out, deepkern.moe_forward(*args))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_gradients_near_float64(backend, dtype, generator):
    """Against the layer without casts except of x: the difference is the error of FP8."""
    args = real_inputs(generator, 24, 4, 3, 128, 64, dtype)
    grad = torch.randn(args[0].shape, generator=generator, device=generator.device).to(dtype) * 1e-7
    _, got = gradients(args, grad)
    _, weights, idx, *w = args
    w13, w2 = real(*w[:2], (128, 128)), real(*w[2:], (128, 128))
    x = real(*reference.cast_per_token(args[0]), (1, 128)).requires_grad_()
    weights = weights.double().requires_grad_()
    out = torch.zeros_like(x)
    for e in range(4):
        t, j = (idx == e).nonzero(as_tuple=True)
        gate, up = (x[t] @ w13[e].T).chunk(2, 1)
        y = (gate * torch.sigmoid(gate) * up) @ w2[e].T
        out = out.index_add(0, t, weights[t, j, None] * y)
    want = torch.autograd.grad(out, (x, weights), grad.double())
    for g, w, like in zip(got, want, (args[0], args[1]), strict=True):
        assert g.dtype == like.dtype
        assert 1e-5 < compare.diff(g, w) < 3e-3
    assert (got[1][(idx < 0) | (idx >= 4)] == 0).all()


def test_gradients_of_hostile_indices(backend, generator):
    args = list(ops.inputs("moe_forward_backward", generator, **{**SMALL, "none": 0.0}))
    args[2][1] = torch.tensor([-1, 2**63 - 1], device=args[2].device)
    args[1][1] = torch.nan
    grad_x, grad_weights = torch.ops.deepkern.moe_forward_backward(*args)
    want = reference.moe_forward_backward(*args)
    compare.assert_matches("moe_forward_backward", (grad_x, grad_weights), want)
    assert (grad_x[1] == 0).all() and (grad_weights[1] == 0).all() and grad_x.isfinite().all()


def test_gradient_bits_independent_of_T(generator):
    args = make(generator, none=0.0)
    grad = torch.randn(args[0].shape, generator=generator, device=generator.device).to(BF16)
    with deepkern.backend("triton"):
        _, together = gradients(args, grad)
        _, alone = gradients([*(a[3:4] for a in args[:3]), *args[3:]], grad[3:4])
    for one, all_ in zip(alone, together, strict=True):
        compare.assert_bitwise(one[0], all_[3])


def test_expanded_gradient_and_bf16_weights(backend, generator):
    args = make(generator, none=0.0)
    args[1] = args[1].bfloat16()
    grad = torch.ones(1, 1, dtype=BF16, device=args[0].device).expand(args[0].shape)
    _, (grad_x, grad_weights) = gradients(args, grad)
    _, want = gradients(args, grad.contiguous())
    assert grad_weights.dtype == BF16
    compare.assert_bitwise(grad_x, want[0])
    compare.assert_bitwise(grad_weights, want[1])


def test_saved_tensors(backend, generator):
    """gate_up in FP8, the routing and the weights are saved, and no tensor of the size of x."""
    x, weights, idx, *w = make(generator, none=0.0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        deepkern.moe_forward(x.requires_grad_(), weights, idx, *w)
    rows, I = idx.numel(), SMALL["I"]
    given = {t.data_ptr() for t in (weights, idx, *w)}
    new = [(t.dtype, tuple(t.shape)) for t in saved if t.data_ptr() not in given]
    assert new == [(torch.float8_e4m3fn, (rows, 2 * I)), (F32, (rows, -(-2 * I // 128)))]


def test_compiles_with_its_gradients(generator):
    x, weights, idx, *w = make(generator, T=3, none=0.0)
    x, weights = x.requires_grad_(), weights.requires_grad_()

    def loss(x, weights):
        return deepkern.moe_forward(x, weights, idx, *w).float().square().sum()

    want = torch.autograd.grad(loss(x, weights), (x, weights))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weights), (x, weights))
    for g, w_ in zip(got, want, strict=True):
        compare.assert_close(g, w_)


# Errors


def test_wrong_shapes(backend, generator):
    x, weights, idx, w13, w13_scale, w2, w2_scale = make(generator)
    wrong = {
        r"w13: expected 2I = 128 rows": (w13[:, 1:], w13_scale, w2, w2_scale),
        r"w13_scale: expected \[N/128": (w13, w13_scale[:, :0], w2, w2_scale),
        r"w2_scale: expected \[N/128": (w13, w13_scale, w2, w2_scale[:, :0]),
        r"w13: expected at least 1 expert": (w13[:0], w13_scale[:0], w2[:0], w2_scale[:0]),
    }
    for message, w in wrong.items():
        with pytest.raises(ValueError, match=f"^moe_forward: {message}.* got "):
            deepkern.moe_forward(x, weights, idx, *w)


def test_gradient_needs_128x128_scales(backend, generator):
    args = make(generator, T=2, b_rows=1)
    deepkern.moe_forward(*args)
    with pytest.raises(ValueError, match="moe_forward: w13_scale: expected one per 128x128 for a"):
        deepkern.moe_forward(args[0].requires_grad_(), *args[1:])


def test_debug_check(backend, generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    args = make(generator, none=0.0)
    args[2][2, 1] = 3
    with pytest.raises(ValueError, match=r"moe_forward: topk_idx: .* got 3 at \(2, 1\)"):
        deepkern.moe_forward(*args)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("T", [1, 32, 512])
def test_gpu_v3(T, skewed, generator):
    args = ops.inputs("moe_forward", generator, T=T, **V3_LAYER, skewed=skewed)
    with deepkern.backend("triton"):
        got = assert_matches_reference(args)
        for _ in range(3):
            compare.assert_bitwise(deepkern.moe_forward(*args), got)


@pytest.mark.gpu
def test_gpu_batches(generator):
    """The same bits for a token with the tiles of decoding and of prefill."""
    x, weights, idx, *w = make(generator, T=4096, E=8, topk=4, K=1024, I=512, none=0.0)
    x = torch.randn(x.shape, generator=generator, device=x.device).to(BF16)
    with deepkern.backend("triton"):
        together = deepkern.moe_forward(x, weights, idx, *w)
        for T in (1, 2, 3, 17, 64, 127, 128, 129, 257, 1000):
            few = deepkern.moe_forward(x[:T], weights[:T], idx[:T], *w)
            compare.assert_bitwise(few, together[:T])


@pytest.mark.gpu
def test_cuda_graph(generator):
    """Captured once, forward and backward, and replayed with other tokens and indices."""
    args = make(generator, T=300, E=20, topk=4, K=512, I=256)
    other = make(generator, T=300, E=20, topk=4, K=512, I=256)
    for a in args[:2]:
        a.requires_grad_()
    grad = torch.randn(args[0].shape, generator=generator, device=generator.device).to(BF16)

    def step():
        out = deepkern.moe_forward(*args)
        return out, *torch.autograd.grad(out, args[:2], grad)

    with deepkern.backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        with torch.no_grad():
            for a, b in zip(args[:3], other[:3], strict=True):
                a.copy_(b)
        graph.replay()
        for g, w in zip(got, step(), strict=True):
            compare.assert_bitwise(g, w)
