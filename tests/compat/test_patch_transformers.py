"""`patch_transformers`: a patched model equals the model of transformers, and runs on deepkern."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

from deepkern import patch_transformers, unpatch_transformers
from deepkern.runtime.backends import requested
from tests.compat.patched_models import (
    CASES,
    FAMILIES,
    PADDING,
    TOLERANCE,
    assert_close,
    assert_same_gradients,
    gradients,
    median_error,
    native_backend,  # noqa: F401  (runs around every test)
    new_batch,
    new_model,
    tokens_of,
    transformers,
)
from tests.models import Calls


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_prefill(case, padding):
    model, batch = new_model(case), new_batch(padding)
    reference = model(**batch).logits
    ours = patch_transformers(model)(**batch).logits
    assert_close(tokens_of(batch, ours), tokens_of(batch, reference))


@torch.no_grad()
def run_in_steps(model, batch: dict, steps: list[int], cache) -> torch.Tensor:
    """Logits [B, S, vocabulary] of a forward pass per step."""
    parts, begin = [], 0
    for end in torch.tensor(steps).cumsum(0).tolist():
        mask = batch["attention_mask"][:, :end]
        tokens = batch["input_ids"][:, begin:end]
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:]
        call = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": cache}
        parts.append(model(tokens, **call).logits)
        begin = end
    return torch.cat(parts, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("case", FAMILIES)
def test_prefill_in_chunks_and_decode(case, kind, attention):
    model, batch = new_model(case, attn_implementation=attention), new_batch("left")
    steps = [12, 9, 3, 1, 1, 1, 1, 1, 1]

    def new_cache():
        if kind == "dynamic":
            return transformers.DynamicCache(config=model.config)
        return transformers.StaticCache(config=model.config, max_cache_len=33)

    reference = run_in_steps(model, batch, steps, new_cache())
    ours = run_in_steps(patch_transformers(model), batch, steps, new_cache())
    assert_close(tokens_of(batch, ours), tokens_of(batch, reference))


@pytest.mark.parametrize("case", FAMILIES)
def test_patched_and_unpatched_share_a_cache(case):
    model, batch = new_model(case), new_batch("none")
    steps = [12, 1, 5, 1, 1, 10]
    reference = run_in_steps(model, batch, steps, transformers.DynamicCache(config=model.config))
    cache, parts = transformers.DynamicCache(config=model.config), []
    for i, tokens in enumerate(batch["input_ids"].split(steps, 1)):
        (unpatch_transformers if i % 2 else patch_transformers)(model)
        with torch.no_grad():
            parts.append(model(tokens, past_key_values=cache).logits)
        assert cache.get_seq_length() == sum(steps[: i + 1])
    assert_close(torch.cat(parts, 1), reference)


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_copied_and_cropped_caches(case):
    """Two copies of a cache continue independently, and a cropped one from its new end."""
    model, tokens = new_model(case), new_batch("none")["input_ids"]

    def run() -> list[torch.Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        model(tokens[:, :20], past_key_values=cache)
        shallow = copy.copy(cache)
        shallow.layers = [copy.copy(layer) for layer in cache.layers]
        caches = shallow, copy.deepcopy(cache), cache
        logits = [model(tokens[:, i : i + 3], past_key_values=c) for i, c in enumerate(caches)]
        for other in caches:
            other.crop(-2)
            logits.append(model(tokens[:, 25:26], past_key_values=other))
        return [output.logits for output in logits]

    reference = run()
    patch_transformers(model)
    for ours, expected in zip(run(), reference, strict=True):
        assert_close(ours, expected)


GENERATE = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beam-search": {"num_beams": 3},
    "static-cache": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
}


@pytest.mark.parametrize("arguments", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("case", FAMILIES)
def test_generate(case, arguments):
    model, batch = new_model(case), new_batch("left", 14)

    def generate():
        torch.manual_seed(3)
        arguments_ = {"do_sample": False, "max_new_tokens": 8, **arguments}
        return model.generate(**batch, **arguments_)

    reference = generate()
    patch_transformers(model)
    assert torch.equal(generate(), reference)


def test_assisted_generation():
    """Several new tokens behind cached ones, some of which the cache drops again."""
    model, tokens = new_model("v3"), torch.randint(1, 9, (1, 20))
    arguments = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
    reference = model.generate(tokens, **arguments)
    assert torch.equal(patch_transformers(model).generate(tokens, **arguments), reference)


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        *((case, "train") for case in CASES),
        *((case, "eval") for case in FAMILIES),
        *((case, "checkpointing") for case in FAMILIES),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients(case, mode):
    model, batch = new_model(case).train(mode != "eval"), new_batch("right")
    reference = gradients(model, batch)
    patch_transformers(model)
    if mode == "checkpointing":
        model.gradient_checkpointing_enable()
    with Calls() as calls:
        ours = gradients(model, batch, use_cache=False)
    assert_same_gradients(ours, reference)
    assert calls.counts["route_topk_backward"] and calls.counts["expert_combine_backward"]
    sparse = case == "v32"
    assert calls.counts["mla_sparse_prefill_backward" if sparse else "mla_prefill_backward"] == 2


@pytest.mark.parametrize("case", FAMILIES)
def test_gradients_behind_cached_tokens(case):
    """Tokens that were cached without a gradient, then some with one, then one without."""
    model, tokens = new_model(case), new_batch("none")["input_ids"]

    def run():
        model.zero_grad()
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :15], past_key_values=cache)
        for part in tokens[:, 15:20], tokens[:, 20:21]:
            loss = model(part, past_key_values=cache).logits.square().mean()
        loss.backward()
        with torch.no_grad():
            logits = model(tokens[:, 21:22], past_key_values=cache).logits
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, logits

    reference = run()
    patch_transformers(model)
    ours = run()
    assert_same_gradients(ours[0], reference[0])
    assert_close(ours[1], reference[1])


@pytest.mark.parametrize("trained", ["q_b_proj", "kv_b_proj"])
def test_gradients_of_one_matrix_behind_cached_tokens(trained):
    model, tokens = new_model("v3"), new_batch("none")["input_ids"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.0.self_attn.{trained}" in name)

    def run():
        model.zero_grad()
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :15], past_key_values=cache)
        model(tokens[:, 15:16], past_key_values=cache).logits.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    reference = run()
    assert len(reference) == 1
    patch_transformers(model)
    assert_same_gradients(run(), reference)


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_transformers(case):
    model, batch = new_model(case), new_batch("left")
    exact = tokens_of(batch, model(**batch).logits)
    model = new_model(case, torch.bfloat16)
    reference = tokens_of(batch, model(**batch).logits)
    ours = tokens_of(batch, patch_transformers(model)(**batch).logits)
    assert ours.dtype == torch.bfloat16
    assert median_error(ours, exact) <= 1.5 * median_error(reference, exact)


@pytest.mark.parametrize("case", FAMILIES)
def test_autocast(case):
    model, batch = new_model(case).train(), new_batch("left")
    exact = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        reference = gradients(model, batch)
        ours = gradients(patch_transformers(model), batch)

    def error(other: dict) -> float:
        return sum((other[n] - exact[n]).norm() / exact[n].norm() for n in exact) / len(exact)

    assert error(ours) <= 1.5 * error(reference)


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_unpatch_restores_the_model(case):
    model, batch = new_model(case), new_batch("left")
    before = [dict(module.__dict__) for module in model.modules()]
    reference = model(**batch).logits
    patch_transformers(model)
    model(**batch)
    unpatch_transformers(model)
    assert torch.equal(model(**batch).logits, reference)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert "forward" not in module.__dict__


@torch.no_grad()
def test_patching_twice_changes_nothing():
    model, batch = new_model("v3"), new_batch("left")
    assert patch_transformers(model) is model
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    logits = model(**batch).logits
    patch_transformers(model)
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert torch.equal(model(**batch).logits, logits)
    unpatch_transformers(model)
    unpatch_transformers(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_a_deep_copy_is_a_patched_model_of_its_own():
    model, batch = patch_transformers(new_model("v3")), new_batch("left")
    other = copy.deepcopy(model)
    logits = model(**batch).logits
    for parameter in other.parameters():
        parameter.mul_(0.9)
    assert not torch.equal(other(**batch).logits, logits)
    unpatch_transformers(other)
    assert torch.equal(model(**batch).logits, logits)


EXPERTS = {"route_topk": 1, "expert_dispatch": 1, "expert_combine": 1}
GEMM = {"m_grouped_gemm_nt_contiguous": 2, "swiglu": 3}  # a dense layer, experts, shared experts
NORMS = {"v2": 7, "v3": 9, "v32": 9}  # two per layer, two of latents, the last one


@pytest.mark.parametrize(
    ("case", "prefill", "decode"),
    [
        ("v2", "mla_prefill", "mla_decode"),
        ("v3", "mla_prefill", "mla_decode"),
        ("v32", "mla_sparse_prefill", "mla_sparse_decode"),
        ("v32-all-tokens", "mla_prefill", "mla_decode"),
    ],
    ids=["v2", "v3", "v32", "v32-all-tokens"],
)
@torch.no_grad()
def test_every_op_runs(case, prefill, decode):
    model, tokens = patch_transformers(new_model(case)), new_batch("none")["input_ids"]
    cache = transformers.DynamicCache(config=model.config)
    assert requested() == "cpu"  # native kernels, or an error
    for part, attention in ((tokens, prefill), (tokens[:, :1], decode)):
        with Calls() as calls:
            model(part, past_key_values=cache)
        norms = {"rmsnorm_cast": NORMS[case.split("-")[0]]}
        assert calls.counts == {attention: 2, **norms, **EXPERTS, **GEMM}


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_outputs_of_layers_are_captured(case):
    model, batch = new_model(case), new_batch("none")
    arguments = {"output_hidden_states": True, "output_router_logits": True}
    reference = model(**batch, **arguments)
    ours = patch_transformers(model)(**batch, **arguments)
    for name in "hidden_states", "router_logits":
        for x, y in zip(getattr(ours, name), getattr(reference, name), strict=True):
            assert (x - y).abs().max() <= TOLERANCE


def test_a_causal_mask_of_the_user_is_accepted():
    model, batch = new_model("v3"), new_batch("right")
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    mask = (causal & batch["attention_mask"].bool()[:, None])[:, None]
    with torch.no_grad():
        reference = model(batch["input_ids"], attention_mask=mask).logits
        ours = patch_transformers(model)(batch["input_ids"], attention_mask=mask).logits
    assert_close(tokens_of(batch, ours), tokens_of(batch, reference))


@pytest.mark.slow
def test_deepkern_does_not_import_transformers():
    code = "import sys, deepkern; deepkern.patch_transformers; print('transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "False"
