"""route_topk: against transformers, a Python loop and float64 autograd; ties, groups, NaN."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.testing import compare, ops

NEVER = float("-inf")


def distinct(generator: torch.Generator, T: int, E: int) -> torch.Tensor:
    """Logits that differ enough within a row for their scores to differ."""
    device = generator.device
    order = torch.rand(T, E, generator=generator, device=device).argsort(1)
    return (order - E / 2) * (12 / E)


def by_index(weights: torch.Tensor, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sorted by index, to compare without regard to order."""
    idx, order = idx.sort(1)
    return weights.gather(1, order), idx


# Against transformers' gates, on the logits that they compute.


def gate(version: str, generator: torch.Generator, **config):
    """(logits, weights, idx) of a transformers router with random weights."""
    from importlib import import_module

    package = f"transformers.models.deepseek_{version}"
    settings = {"hidden_size": 32, "num_experts_per_tok": 4, **config}
    name = f"Deepseek{version.upper()}"
    made = getattr(import_module(f"{package}.configuration_deepseek_{version}"), f"{name}Config")
    module = import_module(f"{package}.modeling_deepseek_{version}")
    routers = {"v2": "TopkRouter", "v3": "TopkRouter", "v4": "TopKRouter"}
    router = getattr(module, name + routers[version])(made(**settings))
    router = router.to(generator.device, torch.float32)
    bias = getattr(router, "e_score_correction_bias", None)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        if bias is not None:
            bias.normal_(std=0.3, generator=generator)
        hidden = torch.randn(40, 32, generator=generator, device=generator.device)
        return *router(hidden), bias


def assert_same_choice(got, want) -> None:
    (weights, idx), (want_weights, want_idx) = by_index(*got), by_index(*want)
    assert torch.equal(idx, want_idx)
    torch.testing.assert_close(weights, want_weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_groups", [1, 4])
def test_transformers_v3(backend, num_groups, generator):
    groups = {"n_group": num_groups, "topk_group": max(1, num_groups // 2)}
    logits, weights, idx, bias = gate(
        "v3",
        generator,
        n_routed_experts=32,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        **groups,
    )
    got = deepkern.route_topk(
        logits, bias, 4, num_groups, groups["topk_group"], "sigmoid", "top2", True, 2.5
    )
    assert_same_choice(got, (weights, idx))


@pytest.mark.parametrize("num_groups", [1, 5])
def test_transformers_v2(backend, num_groups, generator):
    method = "greedy" if num_groups == 1 else "group_limited_greedy"
    topk_groups = min(3, num_groups)
    logits, weights, idx, _ = gate(
        "v2", generator, n_routed_experts=20, topk_method=method, n_group=num_groups,
        topk_group=topk_groups, routed_scaling_factor=16.0,
    )  # fmt: skip
    got = deepkern.route_topk(
        logits, None, 4, num_groups, topk_groups, "softmax", "max", False, 16.0
    )
    assert_same_choice(got, (weights, idx))


def test_transformers_v4(backend, generator):
    logits, weights, idx, bias = gate(
        "v4", generator, n_routed_experts=24, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5
    )
    got = deepkern.route_topk(logits, bias, 4, score="sqrtsoftplus", scale=1.5)
    assert_same_choice(got, (weights, idx))


PRESETS = {
    "deepseek-v2": (
        "v2",
        {
            "n_routed_experts": 160, "topk_method": "group_limited_greedy", "n_group": 8,
            "topk_group": 3, "num_experts_per_tok": 6, "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek-v2-lite": ("v2", {"n_routed_experts": 64, "num_experts_per_tok": 6}),
    # The defaults of transformers are those of V3 and V4.
    "deepseek-v3": ("v3", {"num_experts_per_tok": 8}),
    "deepseek-v4": ("v4", {"num_experts_per_tok": 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets(backend, name, generator):
    """Against the gate of each model in transformers, at the size of the model."""
    version, config = PRESETS[name]
    logits, weights, idx, bias = gate(version, generator, **config)
    got = deepkern.route_topk(logits, bias, **deepkern.ROUTING[name])
    assert_same_choice(got, (weights, idx))
    want = deepkern.reference.route_topk(logits, bias, **deepkern.ROUTING[name])
    compare.assert_matches("route_topk", got, want)


def test_every_preset_is_tested():
    assert set(PRESETS) == set(deepkern.ROUTING)


# Choice


@pytest.mark.parametrize("E", [1, 2, 3, 8, 10, 64, 160, 256])
@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_any_number_of_experts(backend, E, score, generator):
    args = ops.inputs("route_topk", generator, T=6, E=E, topk=min(E, 8), score=score)
    weights, idx = deepkern.route_topk(*args)
    compare.assert_matches("route_topk", (weights, idx), deepkern.reference.route_topk(*args))
    assert ((idx >= 0) & (idx < E)).all()
    assert all(len(set(row)) == len(row) for row in idx.tolist())
    torch.testing.assert_close(weights.sum(1), torch.ones(6, device=idx.device), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("num_groups", "topk_groups"),
    [(1, 1), (4, 2), (6, 1), (12, 5)],
    ids=["1_of_1", "2_of_4", "1_of_6", "5_of_12"],
)
def test_against_a_loop(backend, num_groups, topk_groups, generator):
    """Against Python's sort, with many ties."""
    T, E, topk = 30, 24, 2
    logits = torch.randint(-6, 6, (T, E), generator=generator, device=generator.device).float()
    _, idx = deepkern.route_topk(
        logits, None, topk, num_groups, topk_groups, "sigmoid", "max", True, 1.0
    )
    size = E // num_groups
    for row, chosen in zip(logits.tolist(), idx.tolist(), strict=True):
        best = [max(row[g * size : (g + 1) * size]) for g in range(num_groups)]
        kept = sorted(range(num_groups), key=lambda g: (-best[g], g))[:topk_groups]
        experts = [e for e in range(E) if e // size in kept]
        assert chosen == sorted(experts, key=lambda e: (-row[e], e))[:topk]


def test_order_is_descending_and_stable(backend, generator):
    logits = distinct(generator, 5, 40)
    _, idx = deepkern.route_topk(logits, topk=40)
    assert torch.equal(idx, logits.argsort(1, descending=True))


@pytest.mark.parametrize("num_groups", [1, 4])
def test_ties_go_to_the_lowest_index(backend, num_groups, device):
    logits = torch.full((3, 40), 0.7, device=device)
    weights, idx = deepkern.route_topk(logits, topk=8, num_groups=num_groups)
    assert idx.tolist() == [list(range(8))] * 3
    assert (weights == 0.125).all()


def test_group_score_top2_and_max(backend, device):
    logits = torch.tensor([[3.0, -3.0, -3.0, 1.0, 1.0, -3.0]], device=device)
    one = {"topk": 1, "num_groups": 2, "topk_groups": 1}
    assert deepkern.route_topk(logits, **one)[1].item() == 3  # 0.73 + 0.73 > 0.95 + 0.05
    assert deepkern.route_topk(logits, group_score="max", **one)[1].item() == 0


def test_groups_of_one_expert(backend, generator):
    logits = distinct(generator, 4, 8)
    _, idx = deepkern.route_topk(logits, topk=2, num_groups=8, topk_groups=3)
    assert torch.equal(idx, logits.topk(2).indices)


def test_dropped_groups_are_never_chosen(backend, device):
    """All biased scores are negative: a mask of 0.0 instead of -inf would choose masked experts."""
    logits = torch.zeros(1, 8, device=device)
    bias = torch.tensor([-9.0, -9, -5, -5, -9, -9, -9, -9], device=device)
    _, idx = deepkern.route_topk(logits, bias, topk=2, num_groups=4)
    assert idx.tolist() == [[2, 3]]
    bias[2] = NEVER  # -inf in the kept group ranks before all other groups
    bias[3] = 100.0
    _, idx = deepkern.route_topk(logits, bias, topk=2, num_groups=4, group_score="max")
    assert idx.tolist() == [[3, 2]]


def test_bias_is_not_in_the_weights(backend, device):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0], device=device)
    weights, idx = deepkern.route_topk(logits, bias, topk=2, normalize=False, scale=3.0)
    assert idx.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, 3 * logits[:, [3, 0]].sigmoid())


# NaN and inf


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_row(backend, score, bad, generator):
    logits = distinct(generator, 4, 12)
    rule = {"topk": 3, "num_groups": 3, "topk_groups": 2, "score": score}
    good = deepkern.route_topk(logits, **rule)
    logits[2, 5] = bad
    got = deepkern.route_topk(logits, **rule)
    compare.assert_matches("route_topk", got, deepkern.reference.route_topk(logits, **rule))
    assert ((got[1] >= 0) & (got[1] < 12)).all() and len(set(got[1][2].tolist())) == 3
    if bad != bad:
        assert got[0][2].isnan().all()
    for a, b in zip(got, good, strict=True):
        compare.assert_bitwise(a[[0, 1, 3]], b[[0, 1, 3]])


def test_rows_of_nan(backend, device):
    logits = torch.full((2, 10), torch.nan, device=device)
    weights, idx = deepkern.route_topk(logits, topk=3, num_groups=5, topk_groups=2)
    assert idx.tolist() == [[0, 1, 2]] * 2 and weights.isnan().all()


def test_debug_check(backend, generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    logits = distinct(generator, 9, 8)
    deepkern.route_topk(logits, torch.zeros(8, device=logits.device), topk=2)
    logits[7, 3] = torch.nan
    with pytest.raises(ValueError, match="route_topk: logits: .*row 7"):
        deepkern.route_topk(logits, topk=2)
    bias = torch.tensor([0.0, torch.nan], device=logits.device)
    with pytest.raises(ValueError, match="route_topk: bias: .*1"):
        deepkern.route_topk(torch.zeros(3, 2, device=logits.device), bias, topk=1)


# Layout and independence


def test_strided_rows_and_other_dtypes(backend, generator):
    wide = torch.randn(7, 50, generator=generator, device=generator.device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, bias = wide.to(dtype)[:, 3:13], wide[0, :10].to(dtype)
        got = deepkern.route_topk(logits, bias, topk=4)
        want = deepkern.reference.route_topk(logits.float().contiguous(), bias.float(), topk=4)
        compare.assert_matches("route_topk", got, want)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_row_bits_independent_of_T(backend, score, generator):
    args = ops.inputs("route_topk", generator, T=21, E=48, topk=6, score=score)
    weights, idx = deepkern.route_topk(*args)
    for row in (0, 8, 20):
        one = deepkern.route_topk(args[0][row : row + 1], *args[1:])
        compare.assert_bitwise(one[0][0], weights[row])
        compare.assert_bitwise(one[1][0], idx[row])


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_permuted_experts(backend, score, generator):
    logits = distinct(generator, 9, 30)
    order = torch.randperm(30, generator=generator, device=generator.device)
    weights, idx = deepkern.route_topk(logits, topk=5, score=score)
    got_weights, got_idx = deepkern.route_topk(logits[:, order], topk=5, score=score)
    assert torch.equal(order[got_idx], idx)
    compare.assert_bitwise(got_weights, weights)


# Gradient


def plain_weights(logits, idx, score, normalize, scale):
    s = {
        "sigmoid": torch.sigmoid,
        "softmax": lambda x: torch.softmax(x, 1),
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    }[score](logits)
    chosen = s.gather(1, idx)
    return scale * (chosen / chosen.sum(1, keepdim=True) if normalize else chosen)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_gradient(backend, score, normalize, generator):
    logits = (distinct(generator, 7, 20) / 2).requires_grad_()
    rule = {"score": score, "normalize": normalize, "scale": 2.5}
    weights, idx = deepkern.route_topk(logits, topk=4, **rule)
    assert weights.requires_grad and not idx.requires_grad
    towards = torch.randn(weights.shape, generator=generator, device=generator.device)
    (got,) = torch.autograd.grad(weights, logits, towards)
    exact = logits.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(plain_weights(exact, idx, **rule), exact, towards.double())
    compare.assert_close(got, want)
    (expanded,) = torch.autograd.grad(deepkern.route_topk(logits, topk=4, **rule)[0].sum(), logits)
    assert expanded.shape == logits.shape and expanded.isfinite().all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_gradient_of_extreme_logits(backend, score, device):
    logits = torch.tensor([[-150.0, -150.0, -150.0], [90.0, 0.0, -90.0]], device=device)
    idx = torch.tensor([[0, 1], [0, 2]], device=device)
    grad = torch.tensor([[1.0, -1.0], [1.0, 2.0]], device=device)
    got = torch.ops.deepkern.route_topk_backward(grad, logits, idx, score)
    assert got.isfinite().all()


def test_gradient_of_hostile_indices(backend, device):
    logits = torch.zeros(2, 4, device=device)
    idx = torch.tensor([[-1, 4], [2**62, 3]], device=device)
    got = torch.ops.deepkern.route_topk_backward(
        torch.ones(2, 2, device=device), logits, idx, "sigmoid", False
    )
    assert got.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0.25]]


# Errors


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("score", {"score": "relu"}),
        ("group_score", {"group_score": "sum"}),
        ("num_groups", {"num_groups": 5}),
        ("num_groups", {"num_groups": 0}),
        ("topk_groups", {"num_groups": 4, "topk_groups": 5}),
        ("topk_groups", {"num_groups": 4, "topk_groups": 0}),
        ("topk", {"topk": 13}),
        ("topk", {"topk": 0}),
        ("topk", {"topk": 4, "num_groups": 4}),
    ],
)
def test_bad_arguments(backend, argument, wrong, device):
    with pytest.raises(ValueError, match=f"^route_topk: {argument}: expected .* got "):
        deepkern.route_topk(torch.zeros(2, 12, device=device), **{"topk": 2, **wrong})


def test_compiles_with_its_gradient(generator):
    logits = distinct(generator, 5, 16).requires_grad_()

    def loss(x):
        weights, idx = deepkern.route_topk(x, topk=3, scale=2.0)
        return (weights * idx).sum()

    (want,) = torch.autograd.grad(loss(logits), logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(logits), logits)
    compare.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ops.sizes("route_topk").gpu, ids=str)
def test_gpu_sizes(backend, size, generator):
    args = ops.inputs("route_topk", generator, **size)
    compare.assert_matches(
        "route_topk", deepkern.route_topk(*args), deepkern.reference.route_topk(*args)
    )
