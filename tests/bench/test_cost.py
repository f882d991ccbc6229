"""The cost report: counts by hand, order of the op times' sources, and the committed page."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import deepkern
from bench import cost, cost_page, cost_report, limits, predictions, steps
from bench.__main__ import app
from bench.gpus import GPUS, named
from bench.op_calls import call, linear, meta, per_block, per_token
from bench.op_times import ASSUMED, MEASURED, PREDICTED, OpTimes, attained
from deepkern.testing.ops import cost as cost_of
from deepkern.testing.ops import facts
from model import DeepSeek
from model.config import Config
from model.training.recipe import Recipe
from model.training.run import Run

A = cost.Assumptions()
V3 = Config.preset("deepseek-v3", num_nextn_predict_layers=0)
T = 4096
PAIRS = T * (T + 1) // 2  # of a query and a key that it sees
# By hand, from the published sizes.
ATTENTION = 7168 * (1536 + 576) + 1536 * 24576 + 512 * 32768 + 16384 * 7168
MOE_LAYER = (8 + 1) * 3 * 7168 * 2048 + 256 * 7168
ACTIVE = 61 * ATTENTION + 3 * 3 * 7168 * 18432 + 58 * MOE_LAYER + 129280 * 7168


@pytest.fixture(scope="module")
def found():
    return cost_report.report()


@pytest.fixture(scope="module")
def compared():
    return cost_report.comparisons(A)


def flops(calls, *ops: str, without: tuple[str, ...] = ()) -> int:
    return sum(x.flops for x in calls if (not ops or x.op in ops) and x.op not in without)


@pytest.mark.parametrize("path", ["fp8", "bf16"])
def test_forward_flops_of_v3(path):
    calls = steps.training_step(V3, T, T, 4, path)["forward"]
    assert flops(calls, without=("mla_prefill",)) == 2 * ACTIVE * T
    assert flops(calls, "mla_prefill") == 61 * 2 * 128 * (192 + 128) * PAIRS
    assert pytest.approx(37e9, rel=0.02) == ACTIVE, "the report's 37B activated parameters"


@pytest.mark.parametrize("path", ["fp8", "bf16"])
def test_gradients_take_twice_the_forward_flops(path):
    calls = steps.training_step(V3, T, T, 4, path)["backward"]
    assert flops(calls, without=("mla_prefill_backward",)) == 2 * 2 * ACTIVE * T
    assert flops(calls, "mla_prefill_backward") == 61 * 2 * 128 * (3 * 192 + 2 * 128) * PAIRS


class CountedFlops(TorchDispatchMode):
    """FLOPs of the deepkern ops that run inside the block, by op."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "deepkern":
            op = deepkern.OPS[function._schema.name.partition("::")[2]]
            self.flops[op.name] += cost_of(op.name, op.positional(args, kwargs), result).flops
        return result


def test_counts_are_those_of_the_trainer():
    """A step of `model.training` on the tiny preset, with 2 sequences of 128 tokens."""
    recipe = Recipe(batch=2, window=128, precision="fp8", recompute=True)
    tokens = torch.arange(2 * 129).view(2, 129) * 7 % 256
    run = Run(Config.preset("tiny"), recipe, tokens.flatten().to(torch.uint8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    try:
        with CountedFlops() as counted:
            run.gradients(tokens)
    finally:
        torch.set_num_threads(threads)
    parts = steps.training_step(Config.preset("tiny"), 256, 128, 16, "fp8").values()
    calls = [x for part in parts for x in part]
    for op in ("gemm_nt", "mla_prefill", "mla_prefill_backward"):
        assert counted.flops[op] == flops(calls, op), op
    # The trainer rounds the rows of each expert up to 128 for the gradients of its weights.
    assert 1 <= counted.flops.total() / flops(calls) < 1.04


def test_recomputation():
    again = {mode: steps.training_step(V3, T, T, 4, "fp8", mode)["recompute"]
             for mode in steps.RECOMPUTE}  # fmt: skip
    head = 2 * 129280 * 7168 * T
    forward = flops(steps.training_step(V3, T, T, 4, "fp8")["forward"])
    assert flops(again["full"]) == forward - head
    assert flops(again["selective"]) == 61 * 2 * (1536 * 24576 + 512 * 32768) * T


def test_decode_reads_each_cached_token_once():
    calls = steps.decode_step(V3, 8, 1000, 4, "fp8")
    (attend,) = [x for x in calls if x.op == "mla_decode" and x.count == 58]
    assert attend.cost.flops == 8 * 1000 * 2 * 128 * (576 + 512)
    assert attend.cost.bytes > 8 * 1000 * 1152


def test_parameters():
    p = cost.parameters(V3)
    assert p.experts == 58 * 256 * 3 * 7168 * 2048
    assert p.total == pytest.approx(671e9, rel=0.001)
    tiny = Config.preset("tiny")
    copies = ("layers.4.embed_tokens", "layers.4.shared_head.head")
    matrices = [x.numel() for name, x in DeepSeek(tiny).named_parameters()
                if x.dim() > 1 and not any(copy in name for copy in copies)]  # fmt: skip
    assert cost.parameters(tiny).total == sum(matrices)


def test_cost_of_shapes_is_that_of_tensors():
    """A call without data has the cost that the roofs compute from real tensors."""
    args = facts("fp8_gemm_nt").inputs(torch.Generator().manual_seed(1), M=7, N=130, K=300)
    with deepkern.backend("torch"):
        want = cost_of("fp8_gemm_nt", args, deepkern.fp8_gemm_nt(*args))
    got = call("", "fp8_gemm_nt", *per_token(7, 300), *per_block(130, 300), torch.bfloat16, None)
    assert got.cost == want


def test_shapes_are_checked_by_the_op():
    with pytest.raises(ValueError, match="fp8_gemm_nt: b: expected K = 256"):
        call("", "fp8_gemm_nt", *per_token(8, 256), *per_block(8, 128), torch.bfloat16, None)


def test_more_tokens_take_longer():
    times = OpTimes(GPUS["H800"])
    seconds = [times.total(steps.training_step(V3, n, n, 4, "fp8")["forward"]).seconds
               for n in (1024, 2048, 4096)]  # fmt: skip
    assert seconds == sorted(seconds)
    assert seconds[2] > 1.9 * seconds[1] > 1.9 * 1.5 * seconds[0]


def test_longer_context_is_slower():
    layout, times = cost.Layout("fp8", 1, 64), OpTimes(GPUS["H800"])
    speeds = [
        cost.serve("deepseek-v3", times, layout, 64, True, dataclasses.replace(A, context=n))
        .tokens_per_second
        for n in (1024, 4096, 16384)
    ]  # fmt: skip
    assert speeds == sorted(speeds, reverse=True)


def serving_steps(batch: int, decoding: bool, layout: cost.Layout):
    """The H800's step without overlap, the one with overlap, and the one that is chosen."""
    args = "deepseek-v3", OpTimes(GPUS["H800"]), layout, batch, decoding
    both = [cost.scheduled_step(*args, overlap, A) for overlap in (False, True)]
    return *both, cost.serve(*args, A)


@pytest.mark.parametrize("ep", [64, 256])
@pytest.mark.parametrize("batch", [2, 160])
def test_overlapped_decoding_reads_weights_twice(batch, ep):
    whole, halves, chosen = serving_steps(batch, True, cost.Layout("fp8", 1, ep))
    again = 61 * ATTENTION + 129280 * 7168 + 58 * 3 * 7168 * 2048  # a shared expert is dense
    if batch > 2:  # each expert has rows in both halves
        again += 58 * 256 // ep * 3 * 7168 * 2048
    assert halves.computing > whole.computing + again / 3350e9, "a byte per parameter"
    assert halves.communication == whole.communication
    assert halves.step == max(halves.computing, halves.communication)
    assert whole.step == whole.computing + whole.communication
    assert chosen.step == min(whole.step, halves.step)


def test_overlapped_prefill_leaves_sms_to_exchanges():
    whole, halves, chosen = serving_steps(16384, False, cost.Layout("fp8", 1, 32))
    assert 1 <= halves.computing * (1 - 20 / 132) / whole.computing < 1.05
    assert chosen.step == min(whole.computing + whole.communication, halves.step)


def test_one_prompt_or_sequence_does_not_overlap():
    times, layout = OpTimes(GPUS["H800"]), cost.Layout("fp8", 1, 64)
    assert not cost.serve("deepseek-v3", times, layout, 1, True, A).overlap
    assert not cost.serve("deepseek-v3", times, layout, A.prompt, False, A).overlap


def test_full_recomputation_exchanges_rows_again():
    seconds = {
        mode: cost.train(
            "deepseek-v3", OpTimes(GPUS["H800"]), cost.Layout("fp8", 1, 64, mode), A
        ).communication
        for mode in steps.RECOMPUTE
    }
    assert seconds["full"] == pytest.approx(1.5 * seconds["selective"])


def test_dualpipe_exchanges_gradients_of_two_stages():
    c, gpu = Config.preset("deepseek-v3"), GPUS["H800"]
    p = cost.parameters(c)
    # A stage is in two GPUs of each of 2048 / (16 x 64) = 2 pipelines.
    sent = 2 * ((p.dense + p.vocabulary) / 16 + p.experts / 1024 * 3 / 4) * (4 + 1)
    times = OpTimes(gpu)
    adam = times.total(steps.optimizer_step(-(-p.total // 2048), "fp8")).seconds
    seconds = cost.update(c, gpu, cost.Layout("fp8", 16, 64), times, A)
    assert seconds == pytest.approx(adam + sent / 45e9)
    one = cost.update(c, gpu, cost.Layout("fp8", 1, 2048), times, A)
    assert one == pytest.approx(adam + (p.dense + p.vocabulary) * 5 / 45e9), "no copy of experts"


def test_faster_links_and_memory_never_cost_time():
    slow = GPUS["RTX 4090"]
    arch = dataclasses.replace(slow.arch, bandwidth=2 * slow.arch.bandwidth)
    layout = cost.Layout("fp8", 16, 128, "full")
    steps_ = [cost.train("deepseek-v3", OpTimes(gpu), layout, A).step for gpu in
              (slow, dataclasses.replace(slow, arch=arch), dataclasses.replace(slow, network=50),
               dataclasses.replace(slow, link=1))]  # fmt: skip
    assert max(steps_[1:3]) <= steps_[0] < steps_[3]


def test_the_published_layout_fits_into_an_h800():
    memory = cost.training_memory(Config.preset("deepseek-v3"), cost_report.V3_LAYOUT, A, 2048)
    assert 40 < memory < 80


def test_predictions_are_complete():
    """bench/predictions.json has every shape, of the Hopper kernels on sm_90 only."""
    wanted = {(g.op, target, g.backend, g.shape) for target in predictions.TARGETS
              for g in predictions.SHAPES if g.op not in predictions.UNUSED
              and (g.backend != "cuda" or target == "sm_90")}  # fmt: skip
    keys = ("op", "target", "backend", "shape")
    assert {tuple(r[key] for key in keys) for r in predictions.load()} == wanted


def test_rows_of_a_token_on_the_network():
    assert cost.copies(V3, ep=8, direct=False)[0] == 0, "one node"
    network, link = cost.copies(V3, ep=64, direct=False)
    assert network == pytest.approx(4 * (1 - 0.75**8) * 7 / 8), "at most 4 of 8 nodes"
    assert network < link < 8
    assert cost.copies(V3, ep=64, direct=True) == (7, 7 / 8)


def test_v3_is_predicted_within_a_factor(compared):
    """Without a fitted number: 0.6 to 1.7 of the published 180K H800-hours."""
    assert 0.6 < compared.ratio < 1.7
    assert compared.v3.layout == cost.Layout("fp8", 16, 64)
    assert compared.bf16.hours_per_trillion > compared.v3.hours_per_trillion


def test_layouts_fit_into_memory(found):
    for row in found.rows:
        for step in (row.training, row.prefill, row.decode):
            assert step.memory <= 0.9 * row.gpu.memory
            assert step.step >= max(step.computing, step.communication)
        assert all(s.overlap or s.step == s.computing + s.communication
                   for s in (row.prefill, row.decode))  # fmt: skip
        assert row.least_serving.gpus * row.gpu.memory > 671, "a byte per parameter"
        assert row.decode.step <= 1 / A.user_speed


def test_gpus_without_fp8_tensor_cores_train_in_bf16(found):
    for row in found.rows:
        assert (row.training.layout.path == "bf16") == (row.gpu.name in ("A100", "MI300X"))


def speed(op: str, seconds: float, size_cost, backend: str = "triton") -> dict:
    return {
        "kind": "speed", "op": op, "provider": f"deepkern {backend}", "samples": [seconds * 1e6],
        "median": seconds * 1e6, **size_cost._asdict(),
    }  # fmt: skip


def results_of(gpu: str, folder, *records: dict) -> None:
    lines = [{"kind": "machine", "gpu": {"name": gpu}}, *records]
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_measured_results_take_precedence(tmp_path):
    (one,) = linear("", T, 7168, 2048, "fp8", cast=False)
    (few,) = linear("", 8, 7168, 2048, "fp8", cast=False)
    results_of("NVIDIA H800", tmp_path, speed(one.op, 3e-3, one.cost),
               speed(one.op, 2e-3, one.cost, "cuda"), speed(one.op, 7e-5, few.cost),
               {**speed(one.op, 1e-3, one.cost), "provider": "deep_gemm"},
               {**speed(one.op, 1e-3, one.cost), "samples": []},
               {"kind": "speed", "op": one.op, "microseconds": 1.0})  # fmt: skip
    times = OpTimes(GPUS["H800"], tmp_path)
    assert times.of(one).provenance == times.of(few).provenance == MEASURED
    assert times.of(one).seconds == pytest.approx(2e-3, rel=1e-6), "the faster backend"
    assert times.of(few).seconds == pytest.approx(7e-5, rel=1e-6), "the nearest shape"
    assert OpTimes(GPUS["H200"], tmp_path).of(one).provenance == PREDICTED
    (far,) = linear("", 8, 128, 128, "fp8", cast=False)
    assert times.of(far).provenance == PREDICTED, "no near shape"
    row = cost.train("deepseek-v3", times, cost_report.V3_LAYOUT, A)
    assert MEASURED in row.compute.provenance


def test_limits_of_the_kernel_bind():
    """On an A100 the conversion of FP8 takes longer than the tensor cores."""
    (one,) = linear("", T, 7168, 2048, "fp8", cast=False)
    gpu = GPUS["A100"]
    seconds, kind = OpTimes(gpu).of(one)
    assert kind == PREDICTED
    assert seconds > 1.5 * limits.roof(one.cost, gpu.arch) / attained(one, gpu)


def test_gpu_without_predictions_is_assumed():
    gpu, one = GPUS["MI300X"], call("", "gemm_nt", meta(T, 7168), meta(2048, 7168))
    seconds, kind = OpTimes(gpu).of(one)
    assert kind == ASSUMED
    assert seconds == pytest.approx(2 * T * 7168 * 2048 / 1307e12 / 0.67)


@pytest.mark.parametrize(
    "preset", ["tiny", "deepseek-v2", "deepseek-v2-lite", "kimi-k2", "moonlight-16b-a3b"]
)
def test_other_presets(preset):
    times, layout = OpTimes(GPUS["H200"]), cost.Layout("fp8", 1, 4)
    row = cost_report.Row(
        times.gpu,
        cost.train(preset, times, layout, A),
        cost.serve(preset, times, layout, 4096, False, A),
        cost.serve(preset, times, layout, 16, True, A),
        cost.least_training(preset, times.gpu, A),
        None,
    )
    assert row.training.step > row.prefill.step > row.decode.step > 0
    assert cost_report.show(cost_report.Report(preset, A, [row]))


def test_indexer_bounds_the_cost_of_a_long_context():
    """V3.2 attends to 2048 tokens; its training is not counted."""
    times, layout = OpTimes(GPUS["H200"]), cost.Layout("fp8", 1, 64)
    speeds = {
        (preset, context): cost.serve(
            preset, times, layout, 32, True, dataclasses.replace(A, context=context)
        ).tokens_per_second
        for preset in ("deepseek-v3.1", "deepseek-v3.2")
        for context in (1024, 65536)
    }
    dense, sparse = (speeds[p, 1024] / speeds[p, 65536] for p in ("deepseek-v3.1", "deepseek-v3.2"))
    assert dense > 2 * sparse > 2
    assert cost.cheapest_training("deepseek-v3.2", times, A) is None
    assert cost.serve("deepseek-v3.2", times, layout, 4096, False, A).step > 0


def test_page_is_current(found, compared):
    """`python -m bench cost --write` would write what docs contains."""
    assert cost_page.PAGE.read_text() == cost_page.page(found, compared)
    assert cost_page.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_conclusion_follows_from_the_numbers(found, compared):
    (line,) = [x for x in cost_report.conclusion(found, compared) if x.startswith("RTX 4090")]
    assert "dearer" in line
    free = dataclasses.replace(found.row("RTX 4090").gpu, price=0.01)
    rows = [dataclasses.replace(r, gpu=free) if r.gpu.name == free.name else r for r in found.rows]
    cheap = cost_report.conclusion(dataclasses.replace(found, rows=rows), compared)
    assert any("cheaper for training, prefill, decoding" in x for x in cheap if x[:3] == "RTX")


def test_record_names_every_provenance(found):
    record = json.loads(json.dumps(cost_report.record(found)))
    assert [row["gpu"] for row in record["gpus"]] == list(GPUS)
    kinds = {kind for row in record["gpus"] for kind in row["training"]["provenance"]}
    assert kinds <= {MEASURED, PREDICTED, ASSUMED}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cost", "gpt-5"], "no preset 'gpt-5'; there are"),
        (["cost", "--gpu", "V100"], "no GPU 'V100'; there are H800"),
        (["cost", "tiny", "--write"], "--write is for deepseek-v3"),
    ],
    ids=["preset", "card", "write"],
)
def test_errors_of_the_command_line(words, message):
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


def test_gpu_names():
    assert named("rtx-4090") is named("RTX 4090") is GPUS["RTX 4090"]
