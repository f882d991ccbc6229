"""`patch_transformers` with FP8 weights, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

import deepkern
from deepkern import patch_transformers, unpatch_transformers
from tests.compat.patched_models import (
    DENSE,
    FAMILIES,
    SHAPE,
    FP8Experts,
    FP8Linear,
    gradients,
    median_error,
    native_backend,  # noqa: F401  (runs around every test)
    new_batch,
    new_model,
    tokens_of,
    transformers,
)
from tests.models import Calls


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
