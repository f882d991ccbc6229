"""`patch_transformers`: a patched model equals the model of transformers, and runs on deepkern."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deepkern
from deepkern import patch_transformers, unpatch_transformers
from deepkern.runtime import native

transformers = pytest.importorskip("transformers")
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear  # noqa: E402

VOCABULARY, TOLERANCE = 67, 1e-4
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 72,
    "intermediate_size": 90,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "max_position_embeddings": 128,
}
GROUPS = {"n_group": 4, "topk_group": 2}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}
INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
CASES = {
    "v2": ("V2", {**SHAPE, **ONE_GROUP, "q_lora_rank": None, "rope_parameters": YARN}),
    "v2-groups": ("V2", {**SHAPE, **GROUPS, "topk_method": "group_limited_greedy"}),
    "v3": ("V3", {**SHAPE, **GROUPS, "rope_parameters": YARN}),
    "v3-no-q-lora": ("V3", {**SHAPE, **ONE_GROUP, "q_lora_rank": None, "norm_topk_prob": False}),
    "v3-half-split-rope": ("V3", {**SHAPE, **GROUPS, "rope_interleave": False}),
    "v32": ("V32", {**SHAPE, **GROUPS, **INDEXER}),
    "v32-all-tokens": ("V32", {**SHAPE, **GROUPS, **INDEXER, "index_topk": 64}),
}
FAMILIES = ["v2", "v3", "v32"]
DENSE = ["v2", "v3", "v32-all-tokens"]  # these attend to every token
PADDING = {"none": (0, 0), "left": (7, 0), "right": (0, 7)}


@pytest.fixture(autouse=True)
def native_backend():
    """An op without a native CPU kernel fails, instead of running as the reference."""
    if native.missing_reason():
        pytest.skip(native.missing_reason())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    with deepkern.backend("cpu"):
        yield
    torch.set_num_threads(threads)


def new_model(case: str, dtype: torch.dtype = torch.float32, **values):
    """A model with random weights and no end of sequence."""
    family, config = CASES[case]
    config = getattr(transformers, f"Deepseek{family}Config")(**{**config, **values})
    config.eos_token_id, config.pad_token_id = None, 0
    torch.manual_seed(1)
    model = getattr(transformers, f"Deepseek{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model.to(dtype)


def new_batch(padding: str = "left", length: int = 30) -> dict[str, torch.Tensor]:
    """Two sequences, the first one padded."""
    left, right = PADDING[padding]
    tokens = torch.randint(1, VOCABULARY, (2, length))
    mask = torch.ones_like(tokens)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def tokens_of(batch: dict, rows: torch.Tensor) -> torch.Tensor:
    return rows[batch["attention_mask"].bool()]


def median_error(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The median over tokens: of a few tokens the experts or the selected tokens differ."""
    ours, reference = ours.flatten(0, -2), reference.flatten(0, -2)
    return ((ours - reference).norm(dim=1) / reference.norm(dim=1)).median()


def assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert reference.abs().max() > 0.5, "the logits are too small to compare"
    assert (ours - reference).abs().max() <= TOLERANCE


class Calls(TorchDispatchMode):
    """Counts the deepkern ops that run in the block."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "deepkern":
            self.counts[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()


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


def gradients(model, batch: dict, **arguments) -> dict[str, torch.Tensor]:
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels, **arguments).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict, reference: dict) -> None:
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert (ours[name] - expected).norm() <= 1e-4 * expected.norm(), name


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


def set_fp8(case: str, **sizes):
    """Replaces the Linears and experts of the layers by transformers' FP8 modules.

    Returns the model and one in fp32 with the same weights, whose Linears and experts round their
    input to FP8 first.
    """
    model = new_model(case, **sizes)
    real = copy.deepcopy(model)
    for name, module in list(model.model.layers.named_modules()):
        other = real.model.layers.get_submodule(name)
        if type(module) is torch.nn.Linear and "indexer" not in name:
            fp8 = FP8Linear(module.in_features, module.out_features, (128, 128))
            set_fp8_weight(fp8, other, "weight")
            if (
                case != "v32" or "kv_b_proj" not in name
            ):  # absorbed with more than index_topk tokens
                other.register_forward_pre_hook(lambda linear, args: round_to_fp8(args[0]))
        elif type(module).__name__.endswith("Experts"):
            fp8 = FP8Experts(model.config, (128, 128))
            set_fp8_weight(fp8, other, "gate_up_proj")
            set_fp8_weight(fp8, other, "down_proj")
            other.register_forward_pre_hook(
                lambda experts, args: (round_to_fp8(args[0]), *args[1:])
            )
            other.forward = rounded_experts(other)
        else:
            continue
        model.model.layers.set_submodule(name, fp8)
    return model.eval(), real


def set_fp8_weight(fp8, real, name: str) -> None:
    """Sets the FP8 weight and its scales, and the same values in the real module."""
    weight, scale = deepkern.cast_per_block(getattr(real, name).detach())
    real_weight = deepkern.cast_back(weight, scale, (128, 128), torch.float32)
    setattr(real, name, torch.nn.Parameter(real_weight))
    setattr(fp8, name, torch.nn.Parameter(weight))
    shape = getattr(fp8, f"{name}_scale_inv").shape
    setattr(fp8, f"{name}_scale_inv", torch.nn.Parameter(scale.expand(shape).contiguous()))


def round_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """x, rounded as `cast_per_token` does; the gradient passes unchanged."""
    rounded = deepkern.cast_back(
        *deepkern.cast_per_token(x.detach().flatten(0, -2)), (1, 128), x.dtype
    )
    return x + (rounded.view_as(x) - x).detach()


def rounded_experts(experts):
    """The formula of the experts on every token, with the input of down_proj rounded."""

    def forward(x, indices, weights):
        gate, up = torch.einsum("tk,ejk->tej", x, experts.gate_up_proj).chunk(2, -1)
        h = round_to_fp8(torch.nn.functional.silu(gate) * up)
        y = torch.einsum("tei,eki->tek", h, experts.down_proj)
        dense = torch.zeros(y.shape[:2]).scatter(1, indices, weights)
        return torch.einsum("tek,te->tk", y, dense)

    return forward


FP8_SIZES = {"hidden_size": 168, "moe_intermediate_size": 136, "intermediate_size": 200}


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_fp8_weights(case):
    """Weights with partial blocks."""
    model, real = set_fp8(case, **FP8_SIZES)
    batch = new_batch("left")
    reference = real(**batch).logits
    with Calls() as calls:
        ours = patch_transformers(model)(**batch).logits
    assert median_error(tokens_of(batch, ours), tokens_of(batch, reference)) < 0.01
    linears = sum(type(module).__name__ == "FP8Linear" for module in model.modules())
    absorbed = 2 * (case == "v32")  # kv_b_proj, with more than index_topk tokens
    assert calls.counts["fp8_gemm_nt"] == linears - absorbed
    assert calls.counts["moe_forward"] == 1


@pytest.mark.parametrize("case", DENSE)
@torch.no_grad()
def test_fp8_weights_in_decode(case):
    """`mla_decode` reads latents that are not rounded to FP8, and kv_b_proj dequantized."""
    model, real = set_fp8(case, **FP8_SIZES)
    tokens = new_batch("none", 8)["input_ids"]

    def run(model, change) -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config)
        model(tokens[:, :7], past_key_values=cache)
        change()
        return model(tokens[:, 7:], past_key_values=cache).logits

    def stop_rounding() -> None:
        """kv_b_proj of a step of one token."""
        for layer in real.model.layers:
            layer.self_attn.kv_b_proj._forward_pre_hooks.clear()

    reference = run(real, stop_rounding)
    with Calls() as calls:
        ours = run(patch_transformers(model), lambda: None)
    assert median_error(ours, reference) < 0.01
    assert calls.counts["mla_decode"] == calls.counts["mla_prefill"] == 2
    assert calls.counts["cast_back"] == 2


@torch.no_grad()
def test_fp8_linear_is_exact():
    model, _ = set_fp8("v3", **FP8_SIZES)
    linear = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 5, linear.in_features)
    expected = deepkern.fp8_linear(x, linear.weight, None, linear.weight_scale_inv)
    patch_transformers(model)
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("case", DENSE)
def test_gradients_through_fp8_weights(case):
    """The gradients of norms, embedding and router; FP8 weights have none."""
    model, real = set_fp8(case, **FP8_SIZES)
    batch = new_batch("left")
    reference, ours = gradients(real, batch), gradients(patch_transformers(model), batch)
    assert any("layernorm" in name for name in ours)
    for name, gradient in ours.items():
        assert relative_error(gradient, reference[name]) < 0.1, name
    assert not any("_proj" in name for name in ours)


def refused(model, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_transformers(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="a model of transformers, got Linear"):
        patch_transformers(torch.nn.Linear(2, 2))
    sizes = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    refused(transformers.LlamaForCausalLM(config), "LlamaForCausalLM")


def test_configurations_are_refused_by_name():
    refused(new_model("v3", hidden_act="gelu"), "hidden_act: expected 'silu', got 'gelu'")
    refused(new_model("v2", topk_method="noaux_tc"), "topk_method: .* got 'noaux_tc'")
    model = new_model("v3")
    model.config._attn_implementation_internal = "flex_attention"
    refused(model, "attn_implementation: .* got 'flex_attention'")
    model = new_model("v3")
    model.hf_quantizer = type("Bnb4BitHfQuantizer", (), {})()
    refused(model, "quantizer: .* got Bnb4BitHfQuantizer")
    model = new_model("v3")
    model.model.norm.register_forward_hook(lambda *_: None)  # hooks are fine
    model.lm_head.forward = model.lm_head.forward  # and so are other modules
    patch_transformers(model)
    unpatch_transformers(model)
    model.model.norm.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model\.norm: expected the forward pass of its class"):
        patch_transformers(model)


def test_fp8_modules_are_refused_by_name():
    model, _ = set_fp8("v3")  # 80 rows of gate and up, for which there are two scales
    refused(model, r"experts\.gate_up_proj_scale_inv: expected shape \[..., 1, 1\]")
    model, _ = set_fp8("v3", **FP8_SIZES)
    model.model.layers[0].mlp.up_proj.activation_scheme = "static"
    refused(model, "up_proj.activation_scheme: expected 'dynamic', got 'static'")


def test_calls_are_refused_by_name():
    model, batch = patch_transformers(new_model("v3")), new_batch("left")
    tokens = batch["input_ids"]

    def refused_call(message: str, **arguments) -> None:
        with pytest.raises(ValueError, match=message):
            model(tokens, **arguments)

    class OtherCache(transformers.DynamicCache):
        pass

    refused_call("cache: .* got OtherCache", past_key_values=OtherCache(config=model.config))
    prefix = torch.ones(2, 1, 30, 30, dtype=torch.bool)
    refused_call("attention_mask: expected a causal mask", attention_mask=prefix)
    bias = torch.full((2, 1, 30, 30), 0.5)
    refused_call("attention_mask: .* got a bias", attention_mask=bias)
    packed = torch.cat([torch.arange(20), torch.arange(10)]).expand(2, -1)
    arguments = {"position_ids": packed, "use_cache": False}
    refused_call("packed sequences", **arguments)
    refused_call("output_attentions", output_attentions=True)
    model.config._attn_implementation_internal = "flash_attention_2"
    refused_call("attn_implementation: .* got 'flash_attention_2'", attention_mask=prefix)
    model = patch_transformers(new_model("v3", attention_dropout=0.1))
    model(tokens)
    model.train()
    refused_call("attention_dropout: expected 0 in training, got 0.1")


def test_a_causal_mask_of_the_user_is_accepted():
    model, batch = new_model("v3"), new_batch("right")
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    mask = (causal & batch["attention_mask"].bool()[:, None])[:, None]
    with torch.no_grad():
        reference = model(batch["input_ids"], attention_mask=mask).logits
        ours = patch_transformers(model)(batch["input_ids"], attention_mask=mask).logits
    assert_close(tokens_of(batch, ours), tokens_of(batch, reference))


def test_deepkern_does_not_import_transformers():
    code = "import sys, deepkern; deepkern.patch_transformers; print('transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "False"
