"""Training on deepkern's ops: losses and gradients, precisions, optimizers, schedule, data."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import deepkern
from model import DeepSeek
from model.checkpoint import Checkpoint, CheckpointError
from model.config import Config
from model.deepseek import Precision
from model.plain import PlainModel, PlainMoE
from model.training.data import batch_of_step, heldout_text, is_held_out, read_corpus
from model.training.exchange import checkpoint_tensors, initialize, load_weights
from model.training.modules import TrainableDeepSeek
from model.training.optimizer import MOMENT, make_optimizer, orthogonal
from model.training.recipe import Recipe
from model.training.run import Run
from tests.models import Calls

TEXT = b"for i in range(10):\n    print(i)\n" * 300
DATA = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
TOY = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "vocab_size": 256}
RECIPE = {"batch": 2, "window": 48, "warmup": 0.05}


@pytest.fixture
def toy(make_config):
    """A toy model with random weights, in any precision."""

    def build(precision="fp32", recompute=False, **changes):
        model = TrainableDeepSeek(make_config(**{**TOY, **changes}), precision, recompute)
        initialize(model, 1)
        return model

    return build


def plain_with_weights(model: TrainableDeepSeek) -> PlainModel:
    plain = PlainModel(model.config)
    plain.load_state_dict(checkpoint_tensors(model))
    if not model.config.tie_word_embeddings:
        for layer in plain.model["layers"][model.config.num_hidden_layers :]:
            layer.embed_tokens.weight = plain.model["embed_tokens"].weight
            layer.shared_head["head"].weight = plain.lm_head.weight
    return plain.train()


def plain_losses(model: PlainModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of the report in plain PyTorch; balance is that of the main model's layers."""
    inputs = tokens[:, :-1]
    hidden = model.hidden(inputs)
    layers = [m for m in model.modules() if isinstance(m, PlainMoE) and hasattr(m, "balance")]
    balance = torch.stack([layer.balance for layer in layers]).sum()
    ahead = model.mtp_logits(inputs, hidden)
    return {
        "main": F.cross_entropy(model.lm_head(hidden).flatten(0, 1), tokens[:, 1:].flatten()),
        "mtp": F.cross_entropy(ahead.flatten(0, 1), tokens[:, 2:].flatten()),
        "balance": balance,
    }


CONFIGS = {
    "v3": {},
    "v2": {"q_lora_rank": None, "topk_method": "group_limited_greedy", "scoring_func": "softmax",
           "norm_topk_prob": False, "n_shared_experts": 2},
    "no-groups": {"n_group": 1, "topk_group": 1, "n_shared_experts": 0},
    "split-rope": {"rope_interleave": False},
}  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_equal_plain(changes, toy, generator):
    """In fp32 on the op path, against autograd through plain PyTorch."""
    model = toy(**changes)
    for name, bias in model.named_buffers():
        if name.endswith("correction_bias"):
            bias.copy_(0.2 * torch.randn(bias.shape, generator=generator))
    plain = plain_with_weights(model)
    tokens = torch.randint(256, (3, 33), generator=generator)
    got, want = model.train()(tokens), plain_losses(plain, tokens)
    main_layers = [moe for layer in model.layers for moe in [layer.mlp] if layer.is_moe]
    got["balance"] = torch.stack([moe.balance for moe in main_layers]).sum()
    for name in ("main", "mtp", "balance"):
        torch.testing.assert_close(got[name], want[name], rtol=2e-5, atol=0)
        weight = {"main": 1.0, "mtp": 0.3, "balance": 0.1}[name]
        (weight * got[name]).backward(retain_graph=True)
        (weight * want[name]).backward(retain_graph=True)
    expected = dict(plain.named_parameters())
    for parameter in model.parameters():
        parameter.data = parameter.grad
    compared = 0
    for name, grad in checkpoint_tensors(model).items():
        if name in expected:
            # None: an expert that no token chose.
            want = torch.zeros_like(grad) if expected[name].grad is None else expected[name].grad
            assert (grad - want).norm() <= 2e-3 * want.norm(), name
            compared += 1
    assert compared == len(expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_recompute_changes_no_bit(precision, toy, generator):
    tokens = torch.randint(256, (2, 33), generator=generator)
    results = []
    for recompute in (False, True):
        model = toy(precision, recompute)
        losses = model.train()(tokens)
        torch.stack([*losses.values()]).sum().backward()
        results.append([*losses.values(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_recompute_saves_no_queries(toy, generator):
    """Between forward and backward, no output of the up-projections and the norms is kept."""
    tokens, saved = torch.randint(256, (2, 65), generator=generator), {}
    for recompute in (False, True):
        model, sizes = toy("fp8", recompute), []
        hooks = (lambda t, sizes=sizes: sizes.append(t.nbytes) or t), lambda t: t
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            torch.stack([*model.train()(tokens).values()]).sum()
        saved[recompute] = sum(sizes)
    assert saved[True] < 0.75 * saved[False]


def test_ops_of_a_step_in_fp8(toy, generator):
    """Products, router, attention and experts of a step run in deepkern's ops, none in torch's."""
    model = toy("fp8", True)
    tokens = torch.randint(256, (2, 33), generator=generator)
    with Calls() as calls:
        torch.stack([*model.train()(tokens).values()]).sum().backward()
    layers, dense = 3, 1
    assert calls.counts["mla_prefill"] == calls.counts["mla_prefill_backward"] == layers
    assert calls.counts["route_topk"] == calls.counts["route_topk_backward"] == layers - dense
    assert calls.counts["sequence_balance_loss_backward"] == layers - dense
    assert calls.counts["k_grouped_fp8_gemm_nt"] == 2 * (2 * (layers - dense) + dense)
    assert calls.counts["fp8_gemm_nt"] and calls.counts["gemm_nt"]
    products = {"mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"}
    assert not products & {*calls.others}


def step_on(backend, model, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of a step and all its gradients, flat."""
    with deepkern.backend(backend):
        losses = model.train()(tokens)
        torch.stack([*losses.values()]).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return torch.stack([*losses.values()]).detach(), gradient


@pytest.mark.proof
def test_backends_give_the_same_step(toy, generator):
    """Triton's kernels in the interpreter and the native CPU ops, compared with the reference.

    In FP8 a last bit of a sum moves values to other codes and tokens to other experts. So there a
    backend's gradients are compared with those in fp32: their error is at most 1.5 times the
    reference's. The balance loss may differ by two choices of an expert in each layer with experts,
    each weighted with the mean probability of an expert.
    """
    tokens = torch.randint(256, (1, 17), generator=generator)
    exact_losses, exact = step_on("torch", toy("fp32"), tokens)
    losses, gradient = step_on("torch", toy("fp8"), tokens)
    rounding = (gradient - exact).norm()
    config = toy("fp8").config
    # + 1: the layer of multi-token prediction.
    layers = config.num_hidden_layers - config.first_k_dense_replace + 1
    one_choice = layers / (config.num_experts_per_tok * (tokens.shape[1] - 1))
    for backend in ("cpu", "triton"):
        own_losses, own = step_on(backend, toy("fp32"), tokens)
        torch.testing.assert_close(own_losses, exact_losses, rtol=1e-5, atol=0)
        assert (own - exact).norm() < 1e-4 * exact.norm(), backend
        own_losses, own = step_on(backend, toy("fp8"), tokens)
        torch.testing.assert_close(own_losses[:2], losses[:2], rtol=3e-3, atol=0)
        assert (own_losses[2] - losses[2]).abs() < 2 * one_choice, backend
        assert (own - exact).norm() < 1.5 * rounding, backend


def test_gradients_reach_every_weight(toy, generator):
    model = toy("fp8")
    tokens = torch.randint(256, (8, 49), generator=generator)
    torch.stack([*model.train()(tokens).values()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name


def test_mtp_of_two_depths(toy, generator):
    """The second prediction layer continues from the first; its targets are three tokens ahead."""
    model = toy(num_nextn_predict_layers=2)
    tokens = torch.randint(256, (2, 20), generator=generator)
    before = model(tokens)["mtp"]
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256  # a target of both depths
    assert model(changed)["mtp"] != before
    losses = model.train()(tokens)
    losses["mtp"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.prediction[1].parameters())


def test_indexer_is_refused():
    with pytest.raises(ValueError, match="index_topk: expected 0"):
        TrainableDeepSeek(Config.preset("deepseek-v3.2", num_hidden_layers=1))


# Weights.


def test_served_model_has_the_trained_logits(toy, generator):
    model = toy().eval()
    checkpoint = Checkpoint.from_tensors(model.config, checkpoint_tensors(model))
    served = DeepSeek.from_checkpoint(checkpoint, Precision(torch.float32))
    tokens = torch.randint(256, (2, 33), generator=generator)
    with torch.no_grad():
        logits = model.predict(tokens).view(2, 33, -1)
    torch.testing.assert_close(served(tokens), logits, atol=2e-5, rtol=0)


def test_weights_of_a_checkpoint_are_loaded(toy):
    model, other = toy(), toy()
    initialize(other, 2)
    for bias in (b for n, b in other.named_buffers() if n.endswith("correction_bias")):
        bias.normal_()
    tensors = checkpoint_tensors(other)
    load_weights(model, Checkpoint.from_tensors(other.config, tensors))
    for name, value in checkpoint_tensors(model).items():
        assert torch.equal(value, tensors[name]), name


def test_fp8_checkpoint_is_dequantized(toy):
    model = toy()
    codes, scale = deepkern.cast_per_block(
        torch.randn(model.layers[0].self_attn.o_proj.weight.shape)
    )
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = {**checkpoint_tensors(model), name: codes, f"{name}_scale_inv": scale}
    load_weights(model, Checkpoint.from_tensors(model.config, tensors))
    expected = deepkern.cast_back(codes, scale, (128, 128), torch.float32)
    assert torch.equal(model.layers[0].self_attn.o_proj.weight, expected)


def test_missing_weight_is_named(toy):
    model = toy()
    tensors = checkpoint_tensors(model)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight is missing"):
        load_weights(model, Checkpoint.from_tensors(model.config, tensors))


def test_initial_weights_depend_on_name_and_seed(toy):
    first, second = toy(), toy()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    initialize(second, 2)
    assert not torch.equal(first.lm_head, second.lm_head)
    assert first.layers[1].mlp.experts.w13.std().item() == pytest.approx(72**-0.5, rel=0.05)


# Optimizers.


def test_adamw_equals_torch_up_to_bf16_moments(generator):
    weight = torch.randn(40, 30, generator=generator)
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    module = torch.nn.ParameterDict({"w": ours})
    mine = make_optimizer(module, Recipe(optimizer="adamw", weight_decay=0.1))
    reference = torch.optim.AdamW([theirs], betas=(0.9, 0.95), weight_decay=0.1)
    for group in (*mine.param_groups, *reference.param_groups):
        group["lr"] = 1e-2
    for _ in range(20):
        grad = torch.randn(40, 30, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        reference.step()
    assert mine.state[ours]["m"].dtype == mine.state[ours]["v"].dtype == MOMENT
    moved = (theirs - weight).norm()
    assert (ours - theirs).norm() < 0.01 * moved


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (3, 2, 16, 40)], ids=str)
def test_orthogonal(shape, generator):
    """Singular vectors stay; singular values come close to 1."""
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(0.1, 1, u.shape[-1])
    inside = u.mT @ orthogonal(u * values @ v) @ v.mT
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.3 and diagonal.max() < 1.3
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-3


def test_muon_updates_hidden_matrices_only(toy):
    model = toy()
    optimizer = make_optimizer(model, Recipe(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["muon"]: [] for group in optimizer.param_groups}
    for group in optimizer.param_groups:
        groups[group["muon"]] += [names[id(p)] for p in group["params"]]
    assert {"embed_tokens", "lm_head", "layers.1.mlp.gate.weight", "norm.weight"} <= {
        *groups[False]
    }
    assert "layers.1.mlp.experts.w13" in groups[True]
    assert sum(map(len, groups.values())) == len(names)
    vectors = [g for g in optimizer.param_groups if not g["weight_decay"]]
    assert len(vectors) == 1 and all(p.dim() == 1 for p in vectors[0]["params"])


# Recipe and data.


def test_learning_rates():
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=0.1, final=0.05)
    assert recipe.rate(4) == pytest.approx(0.5)
    assert recipe.rate(9) == pytest.approx(1.0)
    assert recipe.rate(99) == pytest.approx(0.05)


def test_schedule_of_the_report():
    """2.2e-4 to 10 T tokens, a cosine to 2.2e-5 at 14.3 T, then that, then 7.3e-6."""
    recipe = Recipe(steps=14800, learning_rate=2.2e-4, warmup=0.0, schedule="report")
    assert recipe.rate(9998) == 2.2e-4
    assert recipe.rate(12149) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-3)
    assert recipe.rate(14500) == pytest.approx(2.2e-5)
    assert recipe.rate(14799) == pytest.approx(7.3e-6, rel=0.01)


@pytest.mark.parametrize(
    "change", [{"precision": "fp4"}, {"optimizer": "sgd"}, {"steps": 0}], ids=str
)
def test_wrong_option_is_named(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"Recipe: {name}: expected"):
        Recipe(**change)


def test_unknown_option_is_named():
    assert Recipe.from_dict({"steps": 3}) == Recipe(steps=3)
    with pytest.raises(ValueError, match="minutes: no such option"):
        Recipe.from_dict({"minutes": 3})


def test_batches_repeat():
    recipe = Recipe(batch=3, window=16)
    second = batch_of_step(DATA, recipe, 1)
    assert second.shape == (3, 17) and second.dtype == torch.int64
    assert torch.equal(second, batch_of_step(DATA, recipe, 1))
    assert not torch.equal(second, batch_of_step(DATA, recipe, 2))
    with pytest.raises(ValueError, match="17 tokens to train on, expected more than window"):
        batch_of_step(DATA[:17], recipe, 0)


def test_corpus_excludes_held_out_files():
    tokens, held_out = read_corpus()
    data = bytes(tokens.tolist())
    assert len(held_out) > 4 and sum(map(len, held_out.values())) < 0.08 * len(data)
    assert not any(text in data for text in held_out.values() if len(text) > 1000)
    text, paths = heldout_text(held_out)
    assert all(is_held_out(path) for path in paths)
    assert text == heldout_text(held_out)[0]


def test_folder_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("first é")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("second")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / ".hidden").write_text("hidden")
    tokens, held_out = read_corpus(tmp_path)
    assert bytes(tokens.tolist()) == "\ffirst é\fsecond".encode() and not held_out
    tokens, _ = read_corpus(tmp_path, lambda text: [1, *map(ord, text)])
    assert tokens.tolist() == [1, *map(ord, "first é"), 1, *map(ord, "second")]


def test_folder_without_text_is_named(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\xff")
    with pytest.raises(ValueError, match="no text file in it"):
        read_corpus(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_corpus(tmp_path / "absent")


# Runs.


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_precisions_have_close_losses(optimizer, make_config):
    curves = {}
    for precision in ("fp32", "bf16", "fp8"):
        recipe = Recipe(**RECIPE, steps=12, precision=precision, optimizer=optimizer)
        run = Run(make_config(**TOY), recipe, DATA)
        curves[precision] = [row["main"] for row in run.steps()]
        assert len(curves[precision]) == 12
        assert curves[precision][-1] < curves[precision][0] - 1
    assert curves["fp8"] == pytest.approx(curves["bf16"], rel=0.03)
    assert curves["bf16"] == pytest.approx(curves["fp32"], rel=0.03)
    assert curves["fp8"] != curves["bf16"] != curves["fp32"]


def test_runs_of_one_recipe_are_equal(make_config):
    recipe = Recipe(**RECIPE, steps=3)
    rows = []
    for _ in range(2):
        run = Run(make_config(**TOY), recipe, DATA)
        rows.append([{**row, "seconds": 0} for row in run.steps()])
    assert rows[0] == rows[1]


def test_selection_bias_evens_the_load(make_config):
    run = Run(make_config(**TOY), Recipe(**RECIPE, steps=2), DATA)
    (moe, _), load = run.model.experts, None
    run.take_step()
    load = moe.load.float()
    assert load.sum() == 2 * 48 * 3
    assert torch.equal(moe.gate.e_score_correction_bias, 1e-3 * (load.mean() - load).sign())


def test_row_of_the_log(make_config, tmp_path):
    run = Run(make_config(**TOY), Recipe(**RECIPE, steps=1), DATA, tmp_path / "run")
    (row,) = run.steps()
    assert row["step"] == 1 and row["tokens"] == 96 and row["balance"] > 1.9
    assert 0 < row["load_entropy"] <= 1 and len(row["load_max"]) == 2
    assert math.isfinite(row["gradient_norm"])
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 1
