"""fp8_linear: values and gradients, saved tensors, batch invariance, errors, FP8Linear."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import deepkern
from deepkern import FP8Linear, fp8_linear, reference
from deepkern.testing import compare
from deepkern.testing.random_inputs import values

F32, BF16, F16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
REAL = [BF16, F16, F32]


def make(generator, M, N, K, dtype=F32, weight_dtype=F32):
    """x, weight and bias, which all require a gradient, and the gradient of the output.

    All are standard normal, so that the outputs fit float16.
    """
    device = generator.device

    def real(*shape, dtype):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, weight = real(M, K, dtype=dtype), real(N, K, dtype=weight_dtype)
    bias, grad = real(N, dtype=weight_dtype), real(M, N, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad


def run(x, weight, bias, grad, **options):
    """The output, and the gradients of x, weight and bias."""
    out = fp8_linear(x, weight, bias, **options)
    return out, *torch.autograd.grad(out, (x, weight, bias), grad)


def round_to_fp8(x, cast, block):
    """x cast to FP8 and dequantized, in float64."""
    return reference.cast_back(*cast(x.detach()), block, F32).double()


def expected_results(x, weight, bias, grad):
    """The results of `run` in float64, from the operands rounded as fp8_linear rounds them."""
    w = round_to_fp8(weight, reference.cast_per_block, (128, 128))
    out = round_to_fp8(x, reference.cast_per_token, (1, 128)) @ w.T + bias.detach().double()
    grad_x = round_to_fp8(grad, reference.cast_per_token, (1, 128)) @ w
    channels = [round_to_fp8(t, reference.cast_per_channel, (128, 1)) for t in (grad, x)]
    return out, grad_x, channels[0].T @ channels[1], grad.double().sum(0)


def assert_correct(x, weight, bias, grad):
    names = ("output", "gradient of x", "gradient of weight", "gradient of bias")
    got, want = run(x, weight, bias, grad), expected_results(x, weight, bias, grad)
    for g, w, like, name in zip(got, want, (x, x, weight, bias), names, strict=True):
        assert g.dtype == like.dtype
        compare.assert_close(g, w, name)


EDGES = [(1, 1, 1), (3, 5, 127), (130, 40, 129), (17, 257, 64), (129, 128, 128), (60, 131, 300)]


@pytest.mark.parametrize(("M", "N", "K"), EDGES)
def test_edge_shapes(backend, generator, M, N, K):
    assert_correct(*make(generator, M, N, K))


@pytest.mark.parametrize("weight_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", REAL)
def test_dtypes(backend, generator, dtype, weight_dtype):
    assert_correct(*make(generator, 70, 40, 150, dtype, weight_dtype))


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    M=st.integers(0, 140),
    N=st.integers(0, 140),
    K=st.integers(0, 200),
    dtype=st.sampled_from(REAL),
    weight_dtype=st.sampled_from(REAL),
    seed=st.integers(0, 2**31),
)
def test_any_shape(M, N, K, dtype, weight_dtype, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    with deepkern.backend("triton"):
        assert_correct(*make(generator, M, N, K, dtype, weight_dtype))


@pytest.mark.parametrize(("M", "N", "K"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty_tensors(backend, generator, M, N, K):
    x, weight, bias, grad = make(generator, M, N, K)
    out, grad_x, grad_weight, grad_bias = run(x, weight, bias, grad)
    assert torch.equal(out, bias.expand(M, N))
    assert grad_x.shape == (M, K) and not grad_x.any()
    assert grad_weight.shape == (N, K) and not grad_weight.any()
    assert torch.equal(grad_bias, grad.sum(0))


def test_close_to_the_fp32_layer(backend, generator):
    x, weight, bias, grad = make(generator, 140, 90, 260)
    out = F.linear(x, weight, bias)
    want = out, *torch.autograd.grad(out, (x, weight), grad)
    for g, w in zip(run(x, weight, bias, grad), want, strict=False):
        assert 1e-5 < compare.diff(g, w) < 2e-3  # the error of FP8


def test_rows_with_small_gradients(backend, generator):
    """Row gradients differ by 2^20; one scale per token preserves the small ones."""
    x, weight, bias, grad = make(generator, 40, 130, 60)
    grad[::2] *= 2**-20
    (got,) = torch.autograd.grad(fp8_linear(x, weight, bias), x, grad)
    exact = grad.double() @ weight.double()
    assert compare.diff(got[::2], exact[::2]) < 2e-3 and compare.diff(got[1::2], exact[1::2]) < 2e-3


@pytest.mark.parametrize("power", [-50, -20, 40])
def test_gradient_bits_scale_by_powers_of_two(backend, generator, power):
    """Also gradients below 1e-4, the lower bound of the casts, as a mean loss has them."""
    x, weight, bias, grad = make(generator, 20, 40, 60)
    want = run(x, weight, bias, grad)
    got = run(x, weight, bias, grad * 2.0**power)
    for g, w in zip(got[1:], want[1:], strict=True):
        compare.assert_bitwise(g, w * 2.0**power)


def test_small_gradients_in_float16(backend, generator):
    """The gradients lose no digits in addition to the rounding to float16."""
    x, weight, bias, grad = make(generator, 20, 40, 60, F16)
    grad = (grad.float() * 2.0**-18).half()
    _, grad_x, grad_weight, _ = run(x, weight, bias, grad)
    compare.assert_bitwise(grad_x, run(x, weight, bias, grad.float())[1].half())
    assert compare.diff(grad_weight, grad.double().T @ x.double()) < 2e-3


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (2, 0)])
def test_leading_dimensions(backend, generator, lead):
    x, weight = values(generator, *lead, 70, dtype=F32).requires_grad_(), values(generator, 30, 70)
    out = fp8_linear(x, weight)
    (grad_x,) = torch.autograd.grad(out, x, out.detach())
    rows = x.detach().reshape(-1, 70).requires_grad_()
    flat = fp8_linear(rows, weight)
    (flat_x,) = torch.autograd.grad(flat, rows, flat.detach())
    assert out.shape == (*lead, 30) and grad_x.shape == (*lead, 70)
    compare.assert_bitwise(out.reshape(-1, 30), flat)
    compare.assert_bitwise(grad_x.reshape(-1, 70), flat_x)


def test_strided_tensors(backend, generator):
    """Transposed and sliced x, weight, bias and gradient; and an expanded gradient."""
    x, weight, bias, grad = (t.detach() for t in make(generator, 40, 70, 60))
    want = run(*(t.clone().requires_grad_() for t in (x, weight, bias)), grad)
    x, weight, grad = x.T.contiguous().T, weight.T.contiguous().T, grad.T.contiguous().T
    bias = torch.stack([bias, bias], 1)[:, 0]
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    for g, w in zip(run(*tensors, grad), want, strict=True):
        compare.assert_bitwise(g, w)
    fp8_linear(*tensors).sum().backward()
    ones = run(*(t.detach().requires_grad_() for t in tensors), torch.ones_like(grad))
    for tensor, w in zip(tensors, ones[1:], strict=True):
        compare.assert_bitwise(tensor.grad, w)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_bias_is_added_before_rounding(backend, device, dtype):
    x, weight = torch.full((1, 1), 1.25, dtype=dtype), torch.ones(1, 1)
    bias = torch.tensor([256.0])  # 1.25 is 448 times its scale, so the product is near 1.25
    got = fp8_linear(x.to(device), weight.to(device), bias.to(device))
    assert got.item() == torch.tensor(257.25).to(dtype).item()


def test_fp8_weight(backend, generator):
    """The bits of the real weight that it was cast from; gradients of x and bias."""
    x, weight, bias, grad = make(generator, 20, 140, 200, BF16)
    want = run(x, weight, bias, grad)
    q, scale = deepkern.cast_per_block(weight.detach())
    out = fp8_linear(x, q, bias, weight_scale=scale)
    got = out, *torch.autograd.grad(out, (x, bias), grad)
    for g, w in zip(got, (want[0], want[1], want[3]), strict=True):
        compare.assert_bitwise(g, w)
    parameter = nn.Parameter(q)
    fp8_linear(x, parameter, bias, weight_scale=scale).sum().backward()
    assert parameter.grad is None and x.grad is not None


class Calls(TorchDispatchMode):
    """Counts the deepkern ops that run in the block."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "deepkern":
            self.counts[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()


GEMM, TOKEN, BLOCK, CHANNEL = "fp8_gemm_nt", "cast_per_token", "cast_per_block", "cast_per_channel"


@pytest.mark.parametrize(
    ("required", "forward", "backward"),
    [
        ("", {}, None),
        ("x", {}, {GEMM: 1, TOKEN: 1}),
        ("weight", {CHANNEL: 1}, {GEMM: 1, CHANNEL: 1}),
        ("bias", {}, {}),
        ("x weight bias", {CHANNEL: 1}, {GEMM: 2, TOKEN: 1, CHANNEL: 1}),
    ],
    ids=["none", "x", "weight", "bias", "all"],
)
def test_only_required_gradients_are_computed(generator, required, forward, backward):
    """`forward` and `backward` count ops; the first three ops of a forward pass are implied."""
    x, weight, bias, grad = make(generator, 4, 5, 6)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(name in required.split())
    with Calls() as calls:
        out = fp8_linear(x, weight, bias)
    assert calls.counts == {GEMM: 1, TOKEN: 1, BLOCK: 1, **forward}
    assert out.requires_grad == (backward is not None)
    if backward is not None:
        with Calls() as calls:
            out.backward(grad)
        assert calls.counts == backward


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_bytes_saved_for_backward(generator, dtype):
    """One byte per value of x and the weight, and their scales; no real values of x."""
    M, N, K = 300, 140, 200
    x, weight, bias, _ = make(generator, M, N, K, dtype)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8_linear(x, weight, bias)
    assert sum(t.nbytes for t in saved) == M * K + 4 * K * 3 + N * K + 4 * 2 * 2
    assert all(t.dtype == FP8 or t.dim() == 2 and t.numel() <= 3 * K for t in saved)
    with torch.no_grad(), saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8_linear(x, weight, bias)
    assert len(saved) == 4


def test_same_bits_twice_and_under_no_grad(backend, generator):
    x, weight, bias, grad = make(generator, 20, 140, 150)
    want = run(x, weight, bias, grad)
    for g, w in zip(run(x, weight, bias, grad), want, strict=True):
        compare.assert_bitwise(g, w)
    with torch.no_grad():
        compare.assert_bitwise(fp8_linear(x, weight, bias), want[0])


def test_compile_fullgraph_with_backward(backend, generator):
    x, weight, bias, grad = make(generator, 20, 140, 150)
    layer = FP8Linear.from_linear(linear_of(weight, bias))
    quantized = FP8Linear.from_quantised(*deepkern.cast_per_block(torch.eye(140)))
    leaves = (x, layer.weight, layer.bias)
    want = torch.autograd.grad((quantized(layer(x)) * grad).sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantized(layer(x)), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad((compiled(x) * grad).sum(), leaves)
    for g, w in zip(got, want, strict=True):
        compare.assert_bitwise(g, w)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_same_bits_with_checkpointing(backend, generator, use_reentrant):
    x, weight, bias, grad = make(generator, 20, 40, 150)
    want = run(x, weight, bias, grad)
    out = checkpoint(fp8_linear, x, weight, bias, use_reentrant=use_reentrant)
    out.backward(grad)
    for g, w in zip((out, x.grad, weight.grad, bias.grad), want, strict=True):
        compare.assert_bitwise(g.detach(), w.detach())


def test_row_bits_independent_of_batch(backend, generator):
    x, weight, bias, grad = make(generator, 70, 130, 150)
    out, grad_x, *_ = run(x, weight, bias, grad)
    for rows in (slice(0, 1), slice(3, 20), slice(5, 70)):
        part = x.detach()[rows].requires_grad_()
        got, got_x, *_ = run(part, weight, bias, grad[rows])
        compare.assert_bitwise(got, out[rows])
        compare.assert_bitwise(got_x, grad_x[rows])


def test_nan_and_inf_propagate(backend, generator):
    x, weight, bias, grad = make(generator, 20, 40, 150)
    with torch.no_grad():
        x[3, 7], grad[5, 2] = float("nan"), float("inf")
    out, grad_x, grad_weight, grad_bias = run(x, weight, bias, grad)
    row = torch.arange(20, device=x.device)[:, None]
    assert torch.equal(out.isnan(), (row == 3).expand(20, 40))
    assert torch.equal(grad_x.isnan(), (row == 5).expand(20, 150))
    is_nan = torch.zeros(40, 150, dtype=torch.bool, device=x.device)
    is_nan[2], is_nan[:, 7] = True, True
    assert torch.equal(grad_weight.isnan(), is_nan)
    assert grad_bias[2].isinf() and grad_bias.isfinite().sum() == 39


def test_no_second_derivative(generator):
    x, weight, bias, grad = make(generator, 4, 5, 6)
    (first,) = torch.autograd.grad(fp8_linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_function_transforms_are_refused_by_name(transform):
    weight = torch.randn(30, 200)
    with pytest.raises(RuntimeError, match="fp8_linear: torch.func transforms .* not supported"):
        transform(lambda x: fp8_linear(x, weight).sum())(torch.randn(4, 200))
    scores = torch.randn(3, 4, 8)
    with pytest.raises(RuntimeError, match="route_topk: torch.func transforms"):
        transform(lambda x: deepkern.route_topk(x, topk=2)[0].sum())(scores)


def valid_arguments():
    return {"x": torch.ones(4, 200), "weight": torch.ones(30, 200), "bias": torch.ones(30)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.ones(4, 100)}, ValueError, "weight: expected K = 100 in"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected rank 1 or more"),
        ({"x": torch.ones(4, 200).to(FP8)}, TypeError, "x: expected dtype bfloat16 or float16 or"),
        ({"x": None}, TypeError, r"x: expected real \[\.\.\., K\], got None"),
        ({"weight": None}, TypeError, r"weight: expected real\|fp8 \[N, K\], got None"),
        ({"x": 3}, TypeError, "x: expected a Tensor, got int"),
        ({"weight": [1.0]}, TypeError, "weight: expected a Tensor, got list"),
        ({"bias": True}, TypeError, "bias: expected a Tensor, got bool"),
        ({"weight_scale": 1.0}, TypeError, "weight_scale: expected a Tensor, got float"),
        ({"weight": torch.ones(200)}, ValueError, "weight: expected rank 2"),
        ({"weight": torch.ones(30, 200).double()}, TypeError, "weight: expected dtype bfloat16"),
        ({"weight": torch.ones(30, 200, device="meta")}, ValueError, "weight: expected device cpu"),
        ({"weight": torch.ones(30, 200).to(FP8)}, ValueError,
         "weight_scale: expected a scale of the FP8 weight, got None"),
        ({"weight_scale": torch.ones(1, 2)}, ValueError,
         r"weight_scale: expected None with torch.float32, got shape \(1, 2\)"),
        ({"weight": torch.ones(30, 200).to(FP8), "weight_scale": torch.ones(30, 2)}, ValueError,
         r"weight_scale: expected N/128 = 1 in .*, got shape \(30, 2\)"),
        ({"bias": torch.ones(1)}, ValueError, r"bias: expected N = 30 in .*, got shape \(1,\)"),
    ],
)  # fmt: skip
def test_errors(changed, error, message):
    with pytest.raises(error, match=f"^fp8_linear: {message}"):
        fp8_linear(**{**valid_arguments(), **changed})


def linear_of(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    return linear


def test_module_initialization_equals_linear(generator):
    torch.manual_seed(3)
    want = nn.Linear(70, 30, dtype=BF16)
    torch.manual_seed(3)
    layer = FP8Linear(70, 30, dtype=BF16)
    assert layer.state_dict().keys() == want.state_dict().keys()
    compare.assert_bitwise(layer.weight, want.weight)
    compare.assert_bitwise(layer.bias, want.bias)
    assert FP8Linear(70, 30, bias=False).bias is None
    assert FP8Linear(70, 30, device="meta").weight.is_meta


def test_from_linear_shares_parameters(backend, generator):
    x, weight, bias, _ = make(generator, 5, 30, 70)
    linear = linear_of(weight, bias).eval()
    layer = FP8Linear.from_linear(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    compare.assert_bitwise(layer(x), fp8_linear(x, weight, bias))


def test_module_learns(generator, device):
    """20 steps of SGD lower the loss about as much as in fp32."""
    x, weight, bias, _ = make(generator, 64, 20, 50)
    target = torch.randn(64, 20, generator=generator, device=device)
    losses = []
    for kind in (FP8Linear, nn.Linear):
        layer = kind(50, 20, device=device)
        layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.mse_loss(layer(x.detach()), target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    start = F.mse_loss(F.linear(x, weight, bias), target).item()
    assert losses[0] < start / 10 and losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.fixture
def quantized(generator):
    """A layer whose weight is FP8, with a bias."""
    q, scale = deepkern.cast_per_block(values(generator, 140, 200))
    return FP8Linear.from_quantised(q, scale, values(generator, 140, dtype=F32))


def test_quantized_layer_through_safetensors(quantized, generator, tmp_path):
    save_file(quantized.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors", device=str(generator.device))
    assert {name: t.dtype for name, t in state.items()} == {
        "weight": FP8, "weight_scale": F32, "bias": F32,
    }  # fmt: skip
    other = FP8Linear.from_quantised(
        *deepkern.cast_per_block(torch.ones(140, 200)), torch.ones(140)
    )
    other.to(generator.device).load_state_dict(state)
    x = values(generator, 5, 200)
    compare.assert_bitwise(other(x), quantized(x))
    compare.assert_bitwise(copy.deepcopy(quantized)(x), quantized(x))


@pytest.mark.parametrize("change", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(BF16)])
def test_quantized_weight_keeps_its_dtype(quantized, generator, change):
    """A conversion such as `model.bfloat16()` must not change the codes and their scales."""
    before = {name: t.clone() for name, t in quantized.state_dict().items()}
    change(quantized)
    compare.assert_bitwise(quantized.weight.detach(), before["weight"])
    compare.assert_bitwise(quantized.weight_scale, before["weight_scale"])
    assert quantized.bias.dtype in (BF16, F16)
    assert quantized(values(generator, 5, 200)).isfinite().all()
    assert FP8Linear(3, 4).bfloat16().weight.dtype == BF16
    empty = quantized.to("meta")
    assert empty.weight.is_meta and empty.weight_scale.is_meta


def test_quantized_weight_is_not_trained(quantized, generator):
    assert [name for name, p in quantized.named_parameters() if p.requires_grad] == []
    x = values(generator, 5, 200).requires_grad_()
    quantized(x).sum().backward()
    assert x.grad.isfinite().all() and quantized.weight.grad is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(3, 4)}, "weight: expected dtype torch.float8_e4m3fn, got"),
        ({"weight": None}, r"weight: expected real\|fp8 \[N, K\], got None"),
        ({"weight_scale": None}, r"weight_scale: expected fp32 \[N/128, K/128\], got None"),
        ({"weight": 3}, "weight: expected a Tensor, got int"),
        ({"weight_scale": 1.0}, "weight_scale: expected a Tensor, got float"),
        ({"bias": [0.0]}, "bias: expected a Tensor, got list"),
    ],
)
def test_errors_of_from_quantised(changed, message):
    arguments = {"weight": torch.ones(3, 4).to(FP8), "weight_scale": torch.ones(1, 1)}
    with pytest.raises(TypeError, match=f"^fp8_linear: {message}"):
        FP8Linear.from_quantised(**{**arguments, **changed})


def test_repr_of_modules(quantized):
    assert str(FP8Linear(3, 4)) == (
        "FP8Linear(in_features=3, out_features=4, bias=True, weight=float32)"
    )
    assert str(quantized).endswith("out_features=140, bias=True, weight=float8_e4m3fn)")
