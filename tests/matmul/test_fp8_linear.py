"""fp8_linear: each product on the operands it rounds, what is kept, what is left out, modules."""

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
    """x, weight, bias, all of which want a gradient, and the gradient of the output.

    Their deviations are 1, small enough for the products to fit float16.
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


def rounded(x, cast, block):
    """The real numbers that `cast` makes of x."""
    return reference.cast_back(*cast(x.detach()), block, F32).double()


def recipe(x, weight, bias, grad):
    """What `run` gives, in float64 on the values to which the report's recipe rounds."""
    w = rounded(weight, reference.cast_per_block, (128, 128))
    out = rounded(x, reference.cast_per_token, (1, 128)) @ w.T + bias.detach().double()
    grad_x = rounded(grad, reference.cast_per_token, (1, 128)) @ w
    by_rows = [rounded(t, reference.cast_per_channel, (128, 1)) for t in (grad, x)]
    return out, grad_x, by_rows[0].T @ by_rows[1], grad.double().sum(0)


def assert_recipe(x, weight, bias, grad):
    names = ("output", "gradient of x", "gradient of weight", "gradient of bias")
    got, want = run(x, weight, bias, grad), recipe(x, weight, bias, grad)
    for g, w, like, name in zip(got, want, (x, x, weight, bias), names, strict=True):
        assert g.dtype == like.dtype
        compare.assert_close(g, w, name)


EDGES = [(1, 1, 1), (3, 5, 127), (130, 40, 129), (17, 257, 64), (129, 128, 128), (60, 131, 300)]


@pytest.mark.parametrize(("M", "N", "K"), EDGES)
def test_edges(backend, generator, M, N, K):
    assert_recipe(*make(generator, M, N, K))


@pytest.mark.parametrize("weight_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", REAL)
def test_dtypes(backend, generator, dtype, weight_dtype):
    assert_recipe(*make(generator, 70, 40, 150, dtype, weight_dtype))


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
        assert_recipe(*make(generator, M, N, K, dtype, weight_dtype))


@pytest.mark.parametrize(("M", "N", "K"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty(backend, generator, M, N, K):
    x, weight, bias, grad = make(generator, M, N, K)
    out, grad_x, grad_weight, grad_bias = run(x, weight, bias, grad)
    assert torch.equal(out, bias.expand(M, N))
    assert grad_x.shape == (M, K) and not grad_x.any()
    assert grad_weight.shape == (N, K) and not grad_weight.any()
    assert torch.equal(grad_bias, grad.sum(0))


def test_near_the_layer_in_fp32(backend, generator):
    x, weight, bias, grad = make(generator, 140, 90, 260)
    out = F.linear(x, weight, bias)
    want = out, *torch.autograd.grad(out, (x, weight), grad)
    for g, w in zip(run(x, weight, bias, grad), want, strict=False):
        assert 1e-5 < compare.diff(g, w) < 2e-3  # FP8's error, and not another's


def test_gradients_of_unlike_size_keep_their_digits(backend, generator):
    """Rows whose gradients differ by 2^20: one scale per token is what keeps the small ones."""
    x, weight, bias, grad = make(generator, 40, 130, 60)
    grad[::2] *= 2**-20
    (got,) = torch.autograd.grad(fp8_linear(x, weight, bias), x, grad)
    exact = grad.double() @ weight.double()
    assert compare.diff(got[::2], exact[::2]) < 2e-3 and compare.diff(got[1::2], exact[1::2]) < 2e-3


@pytest.mark.parametrize("power", [-50, -20, 40])
def test_small_gradients_are_as_exact_as_large_ones(backend, generator, power):
    """A mean over many tokens makes them small; the casts clamp magnitudes below 1e-4."""
    x, weight, bias, grad = make(generator, 20, 40, 60)
    want = run(x, weight, bias, grad)
    got = run(x, weight, bias, grad * 2.0**power)
    for g, w in zip(got[1:], want[1:], strict=True):
        compare.assert_bitwise(g, w * 2.0**power)


def test_small_gradients_in_float16(backend, generator):
    """Of which its own rounding has left few digits: those stay."""
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


def test_strides(backend, generator):
    """Transposed and cut x, weight, bias and gradient; and a gradient that is one number."""
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
def test_bias_is_added_before_the_one_rounding(backend, device, dtype):
    x, weight = torch.full((1, 1), 1.25, dtype=dtype), torch.ones(1, 1)
    bias = torch.tensor([256.0])  # 1.25 is 448 times its scale, so the product is near 1.25
    got = fp8_linear(x.to(device), weight.to(device), bias.to(device))
    assert got.item() == torch.tensor(257.25).to(dtype).item()


def test_fp8_weight(backend, generator):
    """The same bits as from the weight that was cast; x and bias get their gradients."""
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
    """Counts the deepkern ops that run inside."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "deepkern":
            self.counts[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()


GEMM, TOKEN, BLOCK, CHANNEL = "fp8_gemm_nt", "cast_per_token", "cast_per_block", "cast_per_channel"


@pytest.mark.parametrize(
    ("asked", "forward", "backward"),
    [
        ("", {}, None),
        ("x", {}, {GEMM: 1, TOKEN: 1}),
        ("weight", {CHANNEL: 1}, {GEMM: 1, CHANNEL: 1}),
        ("bias", {}, {}),
        ("x weight bias", {CHANNEL: 1}, {GEMM: 2, TOKEN: 1, CHANNEL: 1}),
    ],
)
def test_no_gradient_is_computed_that_nobody_asks_for(generator, asked, forward, backward):
    x, weight, bias, grad = make(generator, 4, 5, 6)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(name in asked.split())
    with Calls() as calls:
        out = fp8_linear(x, weight, bias)
    assert calls.counts == {GEMM: 1, TOKEN: 1, BLOCK: 1, **forward}
    assert out.requires_grad == (backward is not None)
    if backward is not None:
        with Calls() as calls:
            out.backward(grad)
        assert calls.counts == backward


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_what_is_kept_for_the_backward_pass(generator, dtype):
    """One byte a value of x and of the weight, and their scales; no real number of x."""
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


def test_same_bits_twice_and_without_a_gradient(backend, generator):
    x, weight, bias, grad = make(generator, 20, 140, 150)
    want = run(x, weight, bias, grad)
    for g, w in zip(run(x, weight, bias, grad), want, strict=True):
        compare.assert_bitwise(g, w)
    with torch.no_grad():
        compare.assert_bitwise(fp8_linear(x, weight, bias), want[0])


def test_compiles_whole_forward_and_backward(backend, generator):
    x, weight, bias, grad = make(generator, 20, 140, 150)
    layer = FP8Linear.from_linear(linear_of(weight, bias))
    resident = FP8Linear.from_quantised(*deepkern.cast_per_block(torch.eye(140)))
    leaves = (x, layer.weight, layer.bias)
    want = torch.autograd.grad((resident(layer(x)) * grad).sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: resident(layer(x)), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad((compiled(x) * grad).sum(), leaves)
    for g, w in zip(got, want, strict=True):
        compare.assert_bitwise(g, w)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(backend, generator, use_reentrant):
    x, weight, bias, grad = make(generator, 20, 40, 150)
    want = run(x, weight, bias, grad)
    out = checkpoint(fp8_linear, x, weight, bias, use_reentrant=use_reentrant)
    out.backward(grad)
    for g, w in zip((out, x.grad, weight.grad, bias.grad), want, strict=True):
        compare.assert_bitwise(g.detach(), w.detach())


def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(backend, generator):
    x, weight, bias, grad = make(generator, 70, 130, 150)
    out, grad_x, *_ = run(x, weight, bias, grad)
    for rows in (slice(0, 1), slice(3, 20), slice(5, 70)):
        part = x.detach()[rows].requires_grad_()
        got, got_x, *_ = run(part, weight, bias, grad[rows])
        compare.assert_bitwise(got, out[rows])
        compare.assert_bitwise(got_x, grad_x[rows])


def test_nan_reaches_what_it_is_multiplied_into(backend, generator):
    x, weight, bias, grad = make(generator, 20, 40, 150)
    with torch.no_grad():
        x[3, 7], grad[5, 2] = float("nan"), float("inf")
    out, grad_x, grad_weight, grad_bias = run(x, weight, bias, grad)
    row = torch.arange(20, device=x.device)[:, None]
    assert torch.equal(out.isnan(), (row == 3).expand(20, 40))
    assert torch.equal(grad_x.isnan(), (row == 5).expand(20, 150))
    spoilt = torch.zeros(40, 150, dtype=torch.bool, device=x.device)
    spoilt[2], spoilt[:, 7] = True, True
    assert torch.equal(grad_weight.isnan(), spoilt)
    assert grad_bias[2].isinf() and grad_bias.isfinite().sum() == 39


def test_no_second_derivative(generator):
    x, weight, bias, grad = make(generator, 4, 5, 6)
    (first,) = torch.autograd.grad(fp8_linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def tensors_to_break():
    return {"x": torch.ones(4, 200), "weight": torch.ones(30, 200), "bias": torch.ones(30)}


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        ({"x": torch.ones(4, 100)}, ValueError, "weight: expected K = 100 in"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected rank 1 or more"),
        ({"x": torch.ones(4, 200).to(FP8)}, TypeError, "x: expected dtype bfloat16 or float16 or"),
        ({"x": None}, TypeError, "x: expected a Tensor, got None"),
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
def test_errors(broken, error, message):
    with pytest.raises(error, match=f"^fp8_linear: {message}"):
        fp8_linear(**{**tensors_to_break(), **broken})


def linear_of(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    return linear


def test_module_is_initialised_as_linear_is(generator):
    torch.manual_seed(3)
    want = nn.Linear(70, 30, dtype=BF16)
    torch.manual_seed(3)
    layer = FP8Linear(70, 30, dtype=BF16)
    assert layer.state_dict().keys() == want.state_dict().keys()
    compare.assert_bitwise(layer.weight, want.weight)
    compare.assert_bitwise(layer.bias, want.bias)
    assert FP8Linear(70, 30, bias=False).bias is None
    assert FP8Linear(70, 30, device="meta").weight.is_meta


def test_module_from_linear_shares_its_parameters(backend, generator):
    x, weight, bias, _ = make(generator, 5, 30, 70)
    linear = linear_of(weight, bias).eval()
    layer = FP8Linear.from_linear(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    compare.assert_bitwise(layer(x), fp8_linear(x, weight, bias))


def test_module_learns(generator, device):
    """A step along its gradients lowers the loss about as much as in fp32."""
    x, weight, bias, _ = make(generator, 64, 20, 50)
    target = torch.randn(64, 20, generator=generator, device=device)
    after = []
    for kind in (FP8Linear, nn.Linear):
        layer = kind(50, 20, device=device)
        layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.mse_loss(layer(x.detach()), target)
            loss.backward()
            optimizer.step()
        after.append(loss.item())
    start = F.mse_loss(F.linear(x, weight, bias), target).item()
    assert after[0] < start / 10 and after[0] == pytest.approx(after[1], rel=0.02)


@pytest.fixture
def resident(generator):
    """A layer whose weight is FP8, with a bias."""
    q, scale = deepkern.cast_per_block(values(generator, 140, 200))
    return FP8Linear.from_quantised(q, scale, values(generator, 140, dtype=F32))


def test_resident_layer_goes_through_safetensors(resident, generator, tmp_path):
    save_file(resident.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors", device=str(generator.device))
    assert {name: t.dtype for name, t in state.items()} == {
        "weight": FP8, "weight_scale": F32, "bias": F32,
    }  # fmt: skip
    other = FP8Linear.from_quantised(
        *deepkern.cast_per_block(torch.ones(140, 200)), torch.ones(140)
    )
    other.to(generator.device).load_state_dict(state)
    x = values(generator, 5, 200)
    compare.assert_bitwise(other(x), resident(x))
    compare.assert_bitwise(copy.deepcopy(resident)(x), resident(x))


@pytest.mark.parametrize("change", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(BF16)])
def test_resident_weight_survives_a_change_of_dtype(resident, generator, change):
    """Else `model.bfloat16()` would turn codes into numbers, and round the scales."""
    before = {name: t.clone() for name, t in resident.state_dict().items()}
    change(resident)
    compare.assert_bitwise(resident.weight.detach(), before["weight"])
    compare.assert_bitwise(resident.weight_scale, before["weight_scale"])
    assert resident.bias.dtype in (BF16, F16)
    assert resident(values(generator, 5, 200)).isfinite().all()
    assert FP8Linear(3, 4).bfloat16().weight.dtype == BF16
    empty = resident.to("meta")
    assert empty.weight.is_meta and empty.weight_scale.is_meta


def test_resident_weight_is_not_trained(resident, generator):
    assert [name for name, p in resident.named_parameters() if p.requires_grad] == []
    x = values(generator, 5, 200).requires_grad_()
    resident(x).sum().backward()
    assert x.grad.isfinite().all() and resident.weight.grad is None


def test_quantised_layer_of_a_real_weight_is_refused():
    with pytest.raises(TypeError, match="^fp8_linear: weight: expected dtype torch.float8_e4m3fn"):
        FP8Linear.from_quantised(torch.ones(3, 4), torch.ones(1, 1))


def test_modules_say_what_they_are(resident):
    assert str(FP8Linear(3, 4)) == (
        "FP8Linear(in_features=3, out_features=4, bias=True, weight=float32)"
    )
    assert str(resident).endswith("out_features=140, bias=True, weight=float8_e4m3fn)")
