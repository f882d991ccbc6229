"""Inference over several gloo processes against one process, and a rank that is lost.

The ranks run the functions of inference_ranks.py.  A group of processes runs many cases, because
starting processes takes longer than the cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepkern
from deepkern.testing import ranks as processes
from model.attention import LatentAttention
from model.checkpoint import Checkpoint, dequantize_blocks, write_checkpoint
from model.experts import MLP, Experts
from model.linear import Rows
from model.plain import PlainModel
from model.ranks import Ranks, ordered_sum, part
from model.serve import main as serve
from model.weights import Precision, load_matrix
from tests.model import inference_ranks
from tests.model.training_ranks import small_config
from tests.models import quantize_blocks, randomize

COMMITTED = Path(__file__).parents[2] / "model" / "checkpoints" / "stdlib-bytes"
MODELS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v2": {"q_lora_rank": None, "n_shared_experts": 0, "n_routed_experts": 7, "n_group": 1,
           "topk_group": 1},
    "v32": {"model_type": "deepseek_v32", "index_topk": 12, "index_n_heads": 4,
            "index_head_dim": 16},
    "blocks": {"hidden_size": 128, "v_head_dim": 64, "intermediate_size": 384,
               "moe_intermediate_size": 128, "n_shared_experts": 2},
}  # fmt: skip
PRECISIONS = {"fp32": ("float32", False), "bf16": ("bfloat16", False), "fp8": ("bfloat16", True),
              "fp8_fp32": ("float32", True)}  # fmt: skip
# Relative to the norm of a row of logits.  In fp32 each row is compared, else the median row: after
# rounding a router may choose other experts for a row.  bf16 rounds the parts of a sum.  fp8_fp32
# has FP8 weights and casts in a model of fp32.  The parts of "blocks" begin at multiples of 128, so
# casts have the scales of one process; those of the committed checkpoint do not.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "fp8": 0.06, "fp8_fp32": 1e-5}

BOTH, DISPATCH = {"tensor": 2, "experts": 2}, {"experts": 2, "dispatch": True}
TWO = {
    "tensor": ("v3", {"tensor": 2}, "fp32"),
    "experts": ("v3", {"experts": 2}, "fp32"),
    "both": ("v3", BOTH, "fp32"),
    "dispatch": ("v3", DISPATCH, "fp32"),
    "uneven_experts": ("v2", BOTH, "fp32"),
    "indexer": ("v32", BOTH, "fp32"),
    "bf16": ("v3", BOTH, "bf16"),
    "fp8": ("blocks", BOTH, "fp8_fp32"),
    "fp8_dispatch": ("blocks", DISPATCH, "fp8_fp32"),
    "committed": ("committed", BOTH, "fp8"),
}
FOUR = {
    "tensor": ("v3", {"tensor": 4}, "fp32"),
    "experts": ("v3", {"experts": 4}, "fp32"),
    "more_experts": ("v2", {"tensor": 2, "experts": 4}, "fp32"),
    "more_tensor": ("v3", {"tensor": 4, "experts": 2}, "fp32"),
    "dispatch": ("v2", {"tensor": 2, "experts": 4, "dispatch": True}, "fp32"),
    "indexer": ("v32", {"tensor": 2, "experts": 4}, "fp32"),
    "fp8": ("blocks", {"tensor": 2, "experts": 4}, "fp8_fp32"),
    "committed": ("committed", {"tensor": 2, "experts": 4}, "fp8"),
}

SUMS = {2: {"tensor": 2}, 4: {"tensor": 2, "experts": 4}}
COUNTS = [1, 5, 700]  # rows; the last ones take two exchanges


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], str]:
    """The checkpoint of one of MODELS, or the committed one."""

    @cache
    def write(name: str) -> str:
        if name == "committed":
            return str(COMMITTED)
        torch.manual_seed(0)
        plain = PlainModel(small_config(**MODELS[name]))
        randomize(plain)
        path = tmp_path_factory.mktemp(name)
        write_checkpoint(path, plain.config, plain.state_dict())
        return str(path)

    return write


@pytest.fixture(scope="module")
def results(folder) -> Callable[[int], tuple[Any, dict[str, tuple[dict, list[dict]]]]]:
    """Sums of each rank; name of a case -> the result of one process, and those of all ranks."""

    @cache
    def run(world: int) -> tuple[Any, dict[str, tuple[dict, list[dict]]]]:
        names = TWO if world == 2 else FOUR
        cases = [
            (folder(model), layout, *PRECISIONS[kind], 3 if model == "committed" else 5)
            for model, layout, kind in names.values()
        ]
        outcomes, sums = zip(
            *processes.run(world, inference_ranks.run_all, cases, SUMS[world], COUNTS, timeout=240),
            strict=True,
        )
        alone = {}
        for case in cases:
            key = case[0], *case[2:]
            if key not in alone:
                (alone[key],) = inference_ranks.run_cases([(case[0], {}, *case[2:])])
        return sums, {
            name: (alone[(case[0], *case[2:])], [outcome[i] for outcome in outcomes])
            for i, (name, case) in enumerate(zip(names, cases, strict=True))
        }

    return run


def each_case(function: Callable) -> Callable:
    """Two processes in each run of the tests, four with `proof`."""
    cases = [pytest.param(2, name, TWO[name][2], id=f"2-{name}") for name in TWO]
    cases += [
        pytest.param(4, name, FOUR[name][2], id=f"4-{name}", marks=pytest.mark.proof)
        for name in FOUR
    ]
    return pytest.mark.parametrize(("world", "name", "precision"), cases)(function)


@pytest.mark.slow
@each_case
def test_logits_equal_one_process(results, world, name, precision):
    alone, ranks = results(world)[1][name]
    for key in ("logits", "mtp"):
        expected, got = alone[key], ranks[0][key]
        error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert (error.max() if precision == "fp32" else np.median(error)) < TOLERANCE[precision]
        for other in ranks[1:]:  # the same bits
            assert np.array_equal(other[key], got)


@pytest.mark.slow
@each_case
def test_requests_equal_one_process(results, world, name, precision):
    """Tokens of a batch with drafts; bits of the same request alone and on every rank."""
    alone, ranks = results(world)[1][name]
    for one in ranks:
        assert one["together"] == one["alone"] == ranks[0]["together"]
        assert one["drafted"] > 0
    if precision == "fp32":
        assert [r[0] for r in ranks[0]["together"]] == [r[0] for r in alone["together"]]


@pytest.mark.proof
@pytest.mark.parametrize("layout", [BOTH, DISPATCH], ids=["sums", "dispatch"])
def test_schedules_give_the_same_bits(folder, layout):
    processes.run(2, inference_ranks.schedules, folder("v3"), layout, 1, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.proof)])
def test_sums_are_in_the_order_of_the_ranks(results, world):
    """The same bits on every rank, and for a row in a batch of any size."""
    sums, _ = results(world)
    for i, count in enumerate(COUNTS):
        rows = torch.stack([inference_ranks.rank_rows(rank, count) for rank in range(world)])
        for rank, outcome in enumerate(sums):
            first = rank // 2 * 2
            for got, parts in zip(outcome[i], (rows[first : first + 2], rows), strict=True):
                assert np.array_equal(got, ordered_sum(parts).float().numpy())


# Parts of weights, without processes.


def place(rank: int, **sizes: int) -> Ranks:
    ranks = Ranks(**sizes)
    ranks.rank = rank
    return ranks


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        (512, 2, [0, 256, 512]),
        (384, 2, [0, 256, 384]),
        (96, 2, [0, 64, 96]),
        (256, 4, [0, 64, 128, 192, 256]),
        (384, 4, [0, 128, 256, 320, 384]),
        (5, 5, [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_borders_of_inner_columns(size, count, expected):
    """At multiples of 128, of 64 if those are too few, and so on."""
    parts = [part(size, count, index, 128) for index in range(count)]
    assert [p.start for p in parts] == expected[:-1] and [p.stop for p in parts] == expected[1:]


@pytest.fixture
def fp8_weight() -> Checkpoint:
    tensors = {"w.weight": torch.randn(300, 288) * torch.logspace(0, 2, 300)[:, None]}
    tensors["w.weight"], tensors["w.weight_scale_inv"] = quantize_blocks(tensors["w.weight"])
    return Checkpoint.from_tensors(small_config(), tensors)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ((0, 300), (0, 288)), ((0, 128), (0, 144)), ((130, 300), (128, 288)), ((128, 256), (0, 9)),
        ((40, 90), (140, 250)), ((299, 300), (256, 288)),
    ],
    ids=str,
)  # fmt: skip
def test_parts_keep_the_scales_of_the_checkpoint(fp8_weight, rows, columns):
    rows, columns = slice(*rows), slice(*columns)
    precision = Precision(torch.float32, fp8=True)
    weight, scale = load_matrix(fp8_weight, "w.weight", precision, rows=rows, columns=columns)
    block = (1, 128) if rows.start % 128 else (128, 128)
    whole = dequantize_blocks(*load_matrix(fp8_weight, "w.weight", precision))
    assert torch.equal(dequantize_blocks(weight, scale, block), whole[rows, columns])


def load(module: torch.nn.Module, checkpoint: Checkpoint, prefix: str) -> torch.nn.Module:
    for name, child in module.named_modules():
        if hasattr(child, "load"):
            child.load(checkpoint, f"{prefix}.{name}" if name else prefix)
    return module


@torch.no_grad()
@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_parts_of_the_committed_checkpoint_sum_to_the_whole(count, fp8):
    """MLP, experts and the output of attention, whose parts of 48 columns begin inside blocks."""
    checkpoint, precision = Checkpoint.open(COMMITTED), Precision(torch.float32, fp8=fp8)
    c = checkpoint.config

    def output(ranks: Ranks) -> tuple[torch.Tensor, ...]:
        mlp = load(MLP(192, 512, precision, ranks), checkpoint, "model.layers.0.mlp")
        experts = load(Experts(c, precision, ranks), checkpoint, "model.layers.1.mlp.experts")
        attention = LatentAttention(c, precision, ranks)
        attention = load(attention, checkpoint, "model.layers.0.self_attn")
        heads = ranks.heads(6)
        values = read[:, heads.start * 48 : heads.stop * 48]
        return (
            mlp.part(Rows(x, *deepkern.cast_per_token(x))),
            experts(x, weights, indices),
            attention.o_proj(values),
        )

    x, read = torch.randn(5, 192), torch.randn(5, 288)
    weights, indices = torch.rand(5, 4), torch.randint(16, (5, 4))
    whole = output(Ranks())
    for sizes in ({"tensor": count}, {"tensor": count, "experts": count}):
        parts = [output(place(rank, **sizes)) for rank in range(count)]
        for expected, *own in zip(whole, *parts, strict=True):
            difference = (sum(own) - expected).norm() / expected.norm()
            assert difference < (0.03 if fp8 else 1e-5)


# Errors.


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 0}, "Ranks: tensor: expected at least 1, got 0"),
        ({"tensor": 2, "experts": 3}, "tensor: .* multiple of experts = 3, got 2"),
        ({"tensor": 2, "dispatch": True}, "experts: expected a multiple of tensor = 2 .* got 1"),
        ({"tensor": 3}, "tensor: expected a divisor of num_attention_heads = 4, got 3"),
        ({"experts": 9}, "experts: expected at most n_routed_experts = 8, got 9"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(monkeypatch, sizes, message):
    monkeypatch.setenv("WORLD_SIZE", str(max(s for s in sizes.values() if s is not True)))
    with pytest.raises(ValueError, match=message):
        Ranks(**sizes).check(small_config())


def test_number_of_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes: expected max.* = 4, got 2"):
        Ranks(tensor=4).check(small_config())
    with pytest.raises(Exception) as caught:
        serve()
    assert caught.value.exit_code == 2
    assert "the server runs in 1 process, torchrun started 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "timeout"),
    [("killed", 12.0), pytest.param("asleep", 3.0, marks=pytest.mark.proof)],
    ids=["killed", "asleep"],
)
def test_lost_rank(folder, how, timeout):
    """The others name it, in time."""
    layout, may_die = {"experts": 3, "timeout": timeout}, [1] if how == "killed" else []
    outcomes = processes.run(
        3, inference_ranks.lost_rank, folder("v3"), layout, how, timeout=60, may_die=may_die
    )
    for message, seconds in (outcomes[0], outcomes[2]):
        assert "no answer from rank 1 within" in message and "(ranks 0, 1, 2)" in message
        assert seconds < timeout + 1.0


@pytest.mark.proof
def test_command(tmp_path):
    """The first process prints what one process prints."""
    options = "--prompt", "import os", "--max-new-tokens", "16", "--draft-tokens", "1"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    outputs = []
    for start, sizes in (([], ()), (several, ("--tensor", "2", "--experts", "2"))):
        done = subprocess.run(
            [sys.executable, *start, "-m", "model.generate", *options, *sizes],
            capture_output=True, text=True, timeout=200,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("16 tokens") == 1
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
