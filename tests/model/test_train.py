"""Training of a small model: losses, balance, clock and steps, precisions, resuming, export."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
import typer
from torch import nn

import deepkern
from model import DeepSeek
from model.evaluate import bits_per_byte
from model.export import export, is_quantized
from model.plain import PlainMoE, balance_loss
from model.train import (
    Recipe,
    Run,
    batches,
    corpus,
    heldout_text,
    is_held_out,
    learning_rate,
    losses,
    run_folder,
    run_until_done,
    update_biases,
)

DATA = b"for i in range(10):\n    print(i)\n" * 300
TOY = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "vocab_size": 256}
RECIPE = {"minutes": 3 / 60, "batch": 2, "window": 48, "warmup": 0.05}


@pytest.fixture
def toy_run(make_config, tmp_path):
    return Run(make_config(**TOY), Recipe(**RECIPE), tmp_path / "state")


def test_train_resume_and_export(make_config, toy_run, tmp_path):
    for tokens in batches(DATA, toy_run.recipe, 0):
        toy_run.train_step(tokens)
        toy_run.step += 1
        toy_run.seconds += 0.05  # in place of the clock
        if toy_run.step == 55:
            break
    run_until_done(toy_run, DATA, DATA[:512])  # by the real clock
    assert toy_run.seconds >= 3
    trained = bits_per_byte(toy_run.model.eval(), DATA[:512], 48)
    assert trained < 4.0  # of 8

    resumed = Run(make_config(**TOY), Recipe(**RECIPE), tmp_path / "state")
    assert (resumed.step, resumed.seconds) == (toy_run.step, toy_run.seconds)
    assert bits_per_byte(resumed.model.eval(), DATA[:512], 48) == trained

    notes = {
        "recipe": asdict(Recipe(**RECIPE)),
        "training_bytes": len(DATA),
        "held_out_files": ["x.py"],
        "steps": 1,
        "tokens_seen": 1,
        "training_minutes": 0.1,
        "training_threads": 1,
    }
    metrics = export(resumed.model, tmp_path / "out", DATA[:512], notes, resumed.log, window=48)
    assert metrics["held_out_bits_per_byte_fp32"] == trained
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    model = DeepSeek.from_pretrained(tmp_path / "out", dtype=torch.float32)
    measured = bits_per_byte(model, DATA[:512], 48)
    assert measured == pytest.approx(metrics["held_out_bits_per_byte_fp8"], abs=1e-4)


def test_gradients_reach_every_weight(toy_run):
    tokens = next(batches(DATA, Recipe(batch=8, window=48), 0))
    terms = losses(toy_run.model.train(), tokens)
    sum(terms.values()).backward()
    for name, parameter in toy_run.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_prediction_layer_has_main_embedding_head(toy_run):
    model = toy_run.model.model
    layer = model["layers"][2]
    assert layer.embed_tokens.weight is model["embed_tokens"].weight
    assert layer.shared_head["head"].weight is toy_run.model.lm_head.weight


def test_selection_bias_evens_the_load(toy_run):
    toy_run.model.train()
    losses(toy_run.model, next(batches(DATA, Recipe(batch=2, window=48), 0)))
    moe = next(module for module in toy_run.model.modules() if isinstance(module, PlainMoE))
    assert moe.load.sum() == 2 * 48 * 3
    update_biases(toy_run.model, 0.001)
    expected = 0.001 * (moe.load.float().mean() - moe.load).sign()
    assert torch.equal(moe.gate.e_score_correction_bias, expected)


def test_balance_loss():
    even, ones = torch.arange(8).view(4, 2) % 4, torch.ones(4, 4)
    assert balance_loss(even, ones, 1).item() == pytest.approx(1.0)
    # All tokens choose experts 0 and 1, which have the whole score: 4/2 · (1/2 + 1/2).
    skewed = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4)
    assert balance_loss(torch.tensor([[0, 1]] * 4), skewed, 1).item() == pytest.approx(2.0)


def test_learning_rate():
    recipe = Recipe(learning_rate=1.0, warmup=0.1, final=0.05)
    assert learning_rate(recipe, 0.05) == pytest.approx(0.5)
    assert learning_rate(recipe, 0.1) == pytest.approx(1.0)
    assert learning_rate(recipe, 1.0) == pytest.approx(0.05)


def test_length_in_steps(make_config, tmp_path):
    """Rate and end follow the steps: neither the clock nor a stop changes them."""

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


def test_linears_that_compute_in_fp8(make_config, tmp_path):
    model = Run(make_config(**TOY), Recipe(precision="fp8"), tmp_path).model
    parameters = dict(model.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert plain == ["model.layers.2.eh_proj", "model.layers.2.shared_head.head", "lm_head"]
    fp8 = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, deepkern.FP8Linear)]
    assert fp8 == [name for name in parameters if is_quantized(name)] and len(fp8) > 60


def test_precisions_have_close_losses(make_config, tmp_path):
    curves = {}
    for precision in PRECISIONS:
        recipe = Recipe(**RECIPE, steps=12, precision=precision)
        run = Run(make_config(**TOY), recipe, tmp_path / precision)
        run_until_done(run, DATA, DATA[:512], log_every=1)
        curves[precision] = [row["main"] for row in run.log]
        assert len(curves[precision]) == 12
        assert curves[precision][-1] < curves[precision][0] - 1
    assert curves["fp8"] == pytest.approx(curves["bf16"], rel=0.03)
    assert curves["bf16"] == pytest.approx(curves["fp32"], rel=0.03)
    assert curves["fp8"] != curves["bf16"] != curves["fp32"]


def test_batches_repeat():
    recipe = Recipe(batch=3, window=16)
    stream = batches(DATA, recipe, 0)
    next(stream)
    second = next(stream)
    assert second.shape == (3, 17) and torch.equal(second, next(batches(DATA, recipe, 1)))


def test_corpus_excludes_held_out_files():
    data, held_out = corpus()
    assert len(held_out) > 4 and sum(map(len, held_out.values())) < 0.08 * len(data)
    assert not any(text in data for text in held_out.values() if len(text) > 1000)
    text, paths = heldout_text(held_out)
    assert all(is_held_out(path) for path in paths)
    assert text == heldout_text(held_out)[0]


def test_run_folder_is_new_by_default():
    folder = run_folder(None, resume=False)
    assert folder.parent.name == "runs" and not folder.exists()


def test_run_folder_with_files_needs_resume(tmp_path):
    (tmp_path / "state.pt").touch()
    with pytest.raises(typer.BadParameter, match="not empty; --resume"):
        run_folder(tmp_path, resume=False)
    assert run_folder(tmp_path, resume=True) == tmp_path


def test_resume_needs_a_run(tmp_path):
    for out in (None, tmp_path):
        with pytest.raises(typer.BadParameter, match=r"no state\.pt to resume"):
            run_folder(out, resume=True)
