"""Training on a toy: losses, balance, clock and steps, precisions, resuming, what is exported."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from model.blocks import dequantise_blocks, quantise_blocks
from torch import nn

import deepkern
from model import DeepSeek, compare_precisions
from model.evaluate import bits_per_byte, windows
from model.export import export, is_quantised
from model.plain import MoE, balance_loss
from model.train import (
    Recipe,
    Run,
    batches,
    corpus,
    heldout_text,
    is_held_out,
    learning_rate,
    losses,
    run_until_done,
    update_biases,
)

DATA = b"for i in range(10):\n    print(i)\n" * 300
TOY = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "vocab_size": 256}
RECIPE = {"minutes": 3 / 60, "batch": 2, "window": 48, "warmup": 0.05}


@pytest.fixture
def toy_run(make_config, tmp_path):
    return Run(make_config(**TOY), Recipe(**RECIPE), tmp_path / "state")


def test_training_learns_resumes_and_exports(make_config, toy_run, tmp_path):
    for tokens in batches(DATA, toy_run.recipe, 0):
        toy_run.train_step(tokens)
        toy_run.step, toy_run.seconds = toy_run.step + 1, toy_run.seconds + 0.05  # a steady clock
        if toy_run.step == 55:
            break
    run_until_done(toy_run, DATA, DATA[:512])  # by the real clock, to the end
    assert toy_run.seconds >= 3
    trained = bits_per_byte(toy_run.model.eval(), DATA[:512], 48)
    assert trained < 4.0  # of 8

    again = Run(make_config(**TOY), Recipe(**RECIPE), tmp_path / "state")
    assert (again.step, again.seconds) == (toy_run.step, toy_run.seconds)
    assert bits_per_byte(again.model.eval(), DATA[:512], 48) == trained

    notes = {
        "recipe": asdict(Recipe(**RECIPE)),
        "training_bytes": len(DATA),
        "held_out_files": ["x.py"],
        "steps": 1,
        "tokens_seen": 1,
        "training_minutes": 0.1,
        "training_threads": 1,
    }
    metrics = export(again.model, tmp_path / "out", DATA[:512], notes, again.log, window=48)
    assert metrics["held_out_bits_per_byte_fp32"] == trained
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    model = DeepSeek.from_pretrained(tmp_path / "out", dtype=torch.float32)
    measured = bits_per_byte(model, DATA[:512], 48)
    assert measured == pytest.approx(metrics["held_out_bits_per_byte_fp8"], abs=1e-4)


def test_gradients_reach_every_weight(toy_run):
    tokens = next(batches(DATA, Recipe(batch=8, window=48), 0))
    parts = losses(toy_run.model.train(), tokens)
    sum(parts.values()).backward()
    for name, parameter in toy_run.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_prediction_layer_shares_embedding_and_head(toy_run):
    model = toy_run.model.model
    layer = model["layers"][2]
    assert layer.embed_tokens.weight is model["embed_tokens"].weight
    assert layer.shared_head["head"].weight is toy_run.model.lm_head.weight


def test_biases_move_against_the_load(toy_run):
    toy_run.model.train()
    losses(toy_run.model, next(batches(DATA, Recipe(batch=2, window=48), 0)))
    moe = next(module for module in toy_run.model.modules() if isinstance(module, MoE))
    assert moe.load.sum() == 2 * 48 * 3
    update_biases(toy_run.model, 0.001)
    expected = 0.001 * (moe.load.float().mean() - moe.load).sign()
    assert torch.equal(moe.gate.e_score_correction_bias, expected)


def test_balance_loss():
    even, ones = torch.arange(8).view(4, 2) % 4, torch.ones(4, 4)
    assert balance_loss(even, ones, 1).item() == pytest.approx(1.0)
    # all tokens choose experts 0 and 1, which have all the score: 4/2 · (1/2 + 1/2)
    skewed = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4)
    assert balance_loss(torch.tensor([[0, 1]] * 4), skewed, 1).item() == pytest.approx(2.0)


def test_learning_rate():
    recipe = Recipe(learning_rate=1.0, warmup=0.1, final=0.05)
    assert learning_rate(recipe, 0.05) == pytest.approx(0.5)
    assert learning_rate(recipe, 0.1) == pytest.approx(1.0)
    assert learning_rate(recipe, 1.0) == pytest.approx(0.05)


def test_length_in_steps(make_config, tmp_path):
    """Rate and end follow the steps, whatever the clock says, and whether or not it was stopped."""

    def rates(folder, *stops):
        for stop in stops:
            run = Run(make_config(**TOY), Recipe(**RECIPE, steps=7), tmp_path / folder)
            assert run.progress == run.step / 7
            for tokens in batches(DATA, run.recipe, run.step):
                if run.step == stop or run.progress >= 1:
                    break
                run.seconds += 100.0
                run.record(run.train_step(tokens))
                run.step += 1
            run.save()
        return run.step, [(row["lr"], row["main"]) for row in run.log]

    steps, whole = rates("whole", 99)
    assert (steps, whole) == rates("halves", 3, 99) and steps == 7
    assert [lr for lr, _ in whole] == pytest.approx(
        [learning_rate(Recipe(**RECIPE), i / 7) for i in range(7)], abs=1e-6
    )


PRECISIONS = ["fp32", "bf16", "fp8"]


def test_which_linears_have_another_precision(make_config, tmp_path):
    model = Run(make_config(**TOY), Recipe(precision="fp8"), tmp_path).model
    parameters = dict(model.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert plain == ["model.layers.2.eh_proj", "model.layers.2.shared_head.head", "lm_head"]
    eight = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, deepkern.FP8Linear)]
    assert eight == [name for name in parameters if is_quantised(name)] and len(eight) > 60


def test_precisions_train_alike(make_config, tmp_path):
    found = {}
    for precision in PRECISIONS:
        recipe = Recipe(**RECIPE, steps=12, precision=precision)
        run = Run(make_config(**TOY), recipe, tmp_path / precision)
        run_until_done(run, DATA, DATA[:512], log_every=1)
        found[precision] = [row["main"] for row in run.log]
        assert len(found[precision]) == 12
        assert found[precision][-1] < found[precision][0] - 1
    assert found["fp8"] == pytest.approx(found["bf16"], rel=0.03)
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.03)
    assert found["fp8"] != found["bf16"] != found["fp32"]


@pytest.mark.slow
def test_precisions_compared(make_config, monkeypatch, tmp_path, capsys):
    """The whole command, on a toy: what it trains, keeps, continues and writes."""
    monkeypatch.setattr(compare_precisions.Config, "preset", lambda *_, **__: make_config(**TOY))
    monkeypatch.setattr(compare_precisions, "corpus", lambda: (DATA, {"a.py": DATA[:3000]}))
    options = {"batch": 1, "window": 32, "state": tmp_path / "state", "out": tmp_path}
    compare_precisions.main(12, precision=["fp8"], only="bf16", **options)
    assert not list(tmp_path.glob("*.json")) and "from step 0 of 12\n" in capsys.readouterr().out
    compare_precisions.main(12, precision=["fp8"], only=None, **options)
    assert "bf16: from step 12 of 12\n" in capsys.readouterr().out
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.is_file()) == [".json", ".png"]
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["recipe"]["steps"] == 12 and list(record["runs"]) == ["bf16", "fp8"]
    bf16, fp8 = record["runs"].values()
    assert len(fp8["mean_of_every_10_steps"]) == 2
    for key in ("mean_of_last_tenth", "held_out"):
        assert record["above_bf16"]["fp8"][key] == pytest.approx(fp8[key] / bf16[key] - 1)


def test_batches_repeat():
    recipe = Recipe(batch=3, window=16)
    stream = batches(DATA, recipe, 0)
    next(stream)
    second = next(stream)
    assert second.shape == (3, 17) and torch.equal(second, next(batches(DATA, recipe, 1)))


def test_held_out_files_are_not_trained_on():
    data, held_out = corpus()
    assert len(held_out) > 4 and sum(map(len, held_out.values())) < 0.08 * len(data)
    assert not any(text in data for text in held_out.values() if len(text) > 1000)
    text, paths = heldout_text(held_out)
    assert all(is_held_out(path) for path in paths)
    assert text == heldout_text(held_out)[0]


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (40, 300), (576, 200)])
def test_quantiser_is_deepkern_s(shape):
    weight = torch.randn(shape)
    weight[:, : shape[1] // 3] *= 1e-3
    weight[: shape[0] // 2, -1] = 0
    codes, scale = quantise_blocks(weight)
    expected, expected_scale = deepkern.cast_per_block(weight)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
    back = deepkern.cast_back(codes, scale, (128, 128), torch.float32)
    assert torch.equal(dequantise_blocks(codes, scale), back)
    assert (back - weight).abs().max() <= weight.abs().max() / 16


def test_zero_block():
    codes, scale = quantise_blocks(torch.zeros(3, 5))
    assert not codes.float().any() and scale.item() == pytest.approx(1e-4 / 448)


@pytest.mark.parametrize(
    ("name", "fp8"),
    [
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.1.mlp.experts.3.down_proj.weight", True),
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", True),
        ("model.layers.1.mlp.gate.weight", False),
        ("model.layers.1.mlp.gate.e_score_correction_bias", False),
        ("model.layers.1.self_attn.kv_a_layernorm.weight", False),
        ("model.layers.4.eh_proj.weight", False),
        ("model.layers.4.shared_head.head.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_what_is_stored_in_fp8(name, fp8):
    assert is_quantised(name) is fp8


def test_windows_score_every_byte_once():
    data = bytes(range(100))
    targets = [t for piece in windows(data, 16, 2) for t in piece[:, 1:].flatten().tolist()]
    assert targets == list(range(1, 100))


def test_bits_per_byte_of_a_uniform_model():
    uniform = bits_per_byte(lambda tokens: torch.zeros(*tokens.shape, 256), DATA[:100], 16)
    assert uniform == pytest.approx(8.0)
