"""Training over 2 and 4 processes: losses and weights of one process, lost ranks, bad layouts.

Sums have another order in another layout, so that losses and weights differ by rounding.  Bits are
equal in these cases: a layout repeated, and the logits of initial weights that data ranks compute.

The ranks run the functions of training_ranks.py, many in one group of processes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepkern.testing import ranks
from model.training.context import Sequences
from model.training.layout import Layout
from model.training.parallel import Parallel
from tests.model.training_ranks import (
    NO_Q_LORA,
    Case,
    Outcome,
    load_and_export,
    lose_rank_1,
    lose_rank_1_after_full_disk,
    small_config,
    small_recipe,
    train,
    train_all,
)

LOSSES = ("main", "mtp", "balance", "gradient_norm")
# Largest relative difference of losses and norms, absolute one of logits and of weights after
# three steps with a rate of 3e-3.  In FP8 the rounding of a sum in bf16 changes FP8 codes and,
# rarely, the choice of an expert.
FP32 = (1e-5, 1e-4, 1e-4)
FP8 = (5e-3, 0.5, None)


def assert_close(got: Outcome, want: Outcome, tolerances: tuple) -> None:
    losses, logits, weights = tolerances
    for row, wanted in zip(got.log, want.log, strict=True):
        for name in LOSSES:
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], rel=losses), (name, row["step"])
        assert row.keys() == wanted.keys()
    assert np.abs(got.after - want.after).max() < logits
    assert got.weights.keys() == want.weights.keys()
    for name in want.weights if weights else ():
        assert np.abs(got.weights[name] - want.weights[name]).max() < weights, name


def run_cases(world: int, cases: list[Case]) -> list[Outcome]:
    """The outcomes of the main rank; the logs of all ranks are equal."""
    by_rank = ranks.run(world, train_all, cases, timeout=500)
    for others in by_rank[1:]:
        for main, other in zip(by_rank[0], others, strict=True):
            assert main.log == other.log and np.array_equal(main.after, other.after)
            assert not other.weights
    return by_rank[0]


def assert_as_one_process(world: int, layouts: list[dict], tolerances=FP32, **changes) -> list:
    """Each layout gives the losses, logits and weights of one process."""
    want = train(Case({}, **changes))
    outcomes = run_cases(world, [Case(layout, **changes) for layout in layouts])
    for layout, outcome in zip(layouts, outcomes, strict=True):
        assert_close(outcome, want, tolerances)
        if layout.keys() == {"data"}:
            assert np.array_equal(outcome.before, want.before)
    return outcomes


@pytest.mark.slow
def test_two_processes():
    layouts = [
        {"data": 2},
        {"data": 2, "experts": 2},
        {"tensor": 2, "experts": 2},
        {"context": 2},
        {"context": 2},
    ]
    *_, first, second = assert_as_one_process(2, layouts)
    assert first.log == second.log
    for name, weight in first.weights.items():
        assert np.array_equal(weight, second.weights[name])


@pytest.mark.proof
def test_four_processes():
    assert_as_one_process(4, [{"data": 2, "tensor": 2, "experts": 4}, {"data": 2, "context": 2}])


@pytest.mark.proof
def test_more_layouts_of_four_processes():
    layouts = [
        {"data": 4},
        {"data": 4, "experts": 2},
        {"data": 4, "experts": 4},
        {"data": 2, "tensor": 2},
        {"tensor": 4, "experts": 2},
        {"context": 4},
        {"context": 2, "tensor": 2, "experts": 2},
    ]
    assert_as_one_process(4, layouts)


@pytest.mark.proof
def test_two_processes_in_fp8():
    layouts = [{"data": 2}, {"data": 2, "experts": 2}, {"tensor": 2}, {"context": 2, "experts": 2}]
    assert_as_one_process(2, layouts, FP8, recipe={"precision": "fp8"})


@pytest.mark.proof
@pytest.mark.parametrize(
    "changes",
    [
        {"config": NO_Q_LORA},
        {"config": {"n_routed_experts": 0, "num_nextn_predict_layers": 0}},
        {"recipe": {"optimizer": "muon"}},
        {"recipe": {"recompute": False}},
    ],
    ids=["v2_tied_embeddings", "dense", "muon", "nothing_recomputed"],
)
def test_other_models_and_recipes(changes):
    experts = 1 if "n_routed_experts" in changes.get("config", {}) else 2
    layouts = [{"data": 2, "experts": experts}, {"tensor": 2}, {"context": 2, "experts": experts}]
    assert_as_one_process(2, layouts, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp8", marks=pytest.mark.proof)])
def test_rank_without_tokens_for_its_experts(precision):
    tolerances = FP32 if precision == "fp32" else FP8
    changes = {"recipe": {"precision": precision, "bias_rate": 0.0}, "skewed": True}
    assert_as_one_process(2, [{"data": 2, "experts": 2}], tolerances, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"tensor": 2, "experts": 2}),
        pytest.param(4, {"data": 2, "tensor": 2}, marks=pytest.mark.proof),
        pytest.param(4, {"data": 2, "context": 2, "experts": 4}, marks=pytest.mark.proof),
    ],
    ids=["tensor_experts", "data_tensor", "data_context_experts"],
)
def test_load_and_export_in_a_layout(world, layout):
    counts = ranks.run(world, load_and_export, layout, timeout=200)
    assert counts[0] > 0 and not any(counts[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "how"),
    [
        ({"data": 2, "experts": 2}, "raises"),
        pytest.param({"data": 2}, "killed", marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 2, "experts": 4}, "killed", marks=pytest.mark.proof),
        pytest.param({"data": 2, "context": 2}, "killed", marks=pytest.mark.proof),
        pytest.param({"data": 2, "tensor": 2}, "asleep", marks=pytest.mark.proof),
    ],
    ids=["raises", "killed_of_2", "killed_with_experts", "killed_with_context", "asleep"],
)
def test_lost_rank(layout, how):
    """The other ranks name rank 1, and end within the timeout and the time of a step."""
    world, timeout = Layout(**layout).processes, 20.0
    may_die = [1] if how == "killed" else []
    outcomes = ranks.run(world, lose_rank_1, layout, how, timeout, timeout=200, may_die=may_die)
    words = "rank 1 failed with MemoryError: no memory for a test"
    if how != "raises":
        words = "no answer from rank 1 within 20 s"
    for rank, outcome in enumerate(outcomes):
        if rank != 1:
            message, seconds = outcome
            assert message.startswith(f"ParallelError: step 2: {words} (here: ")
            assert seconds < timeout + 5


@pytest.mark.proof
@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("predict", "evaluation after step 1"),
        ("signals", "signals after step 2"),
        ("save", "save of step 1"),
        ("restore", "restore"),
        ("weights", "exchange of model.embed_tokens.weight"),
    ],
    ids=["predict", "signals", "save", "restore", "weights"],
)
def test_rank_killed_between_steps(tmp_path, call, what):
    args = {"data": 2}, "killed", 10.0, call, tmp_path
    (message, seconds), _ = ranks.run(2, lose_rank_1, *args, timeout=100, may_die=[1])
    assert message.startswith(f"ParallelError: {what}: no answer from rank 1 within 10 s (here: ")
    assert seconds < 15


@pytest.mark.slow
@pytest.mark.parametrize("call", ["step", pytest.param("save", marks=pytest.mark.proof)])
def test_local_error_is_quoted_at_once(tmp_path, call):
    """A RuntimeError, the class of gloo's errors: rank 1 raises it, and rank 0 quotes it."""
    args = {"data": 2}, "wrong_shape", 100.0, call, tmp_path
    outcomes = ranks.run(2, lose_rank_1, *args, timeout=100)
    text = "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    assert outcomes[1][0].startswith(text)
    assert f": rank 1 failed with {text}" in outcomes[0][0]
    assert max(seconds for _, seconds in outcomes) < 20


@pytest.mark.proof
def test_error_that_a_run_survived_is_not_quoted():
    message, _ = ranks.run(2, lose_rank_1_after_full_disk, timeout=60, may_die=[1])
    assert message.startswith("step 2: no answer from rank 1 within 2 s (here: RuntimeError: ")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"data": 3}, "data: expected a divisor of batch = 4, got 3"),
        ({"tensor": 3}, "tensor: expected a divisor of num_attention_heads = 4, got 3"),
        ({"experts": 3}, "experts: expected a divisor of n_routed_experts = 8, got 3"),
        ({"data": 2, "experts": 4}, "experts: expected a divisor of processes = 2, got 4"),
        ({"context": 3}, r"window: expected a multiple of 2 \* context = 6, got 16"),
        ({"tensor": 0}, "tensor: expected 1 or more, got 0"),
    ],
    ids=["batch", "heads", "experts", "processes", "window", "zero"],
)
def test_layouts_that_do_not_fit(layout, message):
    with pytest.raises(ValueError, match=f"Layout: {message}"):
        Layout(**layout).check(small_config(), small_recipe())


def test_layout_of_another_number_of_processes():
    message = r"processes: expected data \* context \* tensor = 6, got 1"
    with pytest.raises(ValueError, match=f"Layout: {message}"):
        Parallel(Layout(data=3, tensor=2))


@pytest.mark.parametrize("count", [2, 3], ids=["2_ranks", "3_ranks"])
def test_keys_of_context_ranks(count):
    """Each query sees the keys up to its own; all ranks see the same number of keys."""
    config, B, S = small_config(), 2, 12
    tokens = torch.arange(B * S).view(B, S)
    parts = [Sequences.make(config, tokens, rank, count) for rank in range(count)]
    gathered = torch.cat([tokens[:, part.positions].flatten() for part in parts])
    for part in parts:
        assert torch.equal(gathered[part.order].view(B, S), tokens)
        queries = tokens[:, part.positions].flatten()
        keys = gathered[part.key_rows]
        bounds = zip(part.cu_seqlens_q, part.cu_seqlens_q[1:], part.cu_seqlens_k[1:], strict=False)
        start = 0
        for first, last, end in bounds:
            visible, start = keys[start:end], end
            sequence = queries[first] // S
            assert torch.equal(visible, torch.arange(sequence * S, queries[last - 1] + 1))
    assert len({len(part.key_rows) for part in parts}) == 1
