"""`patch_transformers`: a DeepSeek model of transformers runs on deepkern's ops.

Only the `forward` of the modules changes.  Parameters, buffers, configuration, caches, hooks and
`generate` stay transformers' own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from importlib.metadata import version

import torch
from torch import nn

from .transformers_attention import IMPLEMENTATIONS, attention_forward
from .transformers_layers import (
    experts_forward,
    fp8_experts_forward,
    fp8_linear_forward,
    mlp_forward,
    moe_layer_forward,
    norm_forward,
    router_forward,
    routing_of,
)
from .transformers_rows import RowsMemo

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
}
FORWARDS: dict[str, Callable] = {
    "Attention": attention_forward,
    "RMSNorm": norm_forward,
    "MLP": mlp_forward,
    "TopkRouter": router_forward,
    "MoE": moe_layer_forward,
    "Moe": moe_layer_forward,
    "Experts": experts_forward,
}
FP8_FORWARDS: dict[str, Callable] = {
    "FP8Linear": fp8_linear_forward,
    "FP8Experts": fp8_experts_forward,
}
FP8_MODULE = "transformers.integrations.finegrained_fp8"
ATTRIBUTES = "deepkern_rows", "deepkern_kv_b_proj", "deepkern_routing"


def patch_transformers(model: nn.Module) -> nn.Module:
    """Makes a DeepSeek V2, V3 or V3.2 model of transformers run on deepkern's ops, in place.

    Args:
        model: `DeepseekV2ForCausalLM`, `DeepseekV3ForCausalLM`, `DeepseekV32ForCausalLM`, or
            another model of these architectures, loaded by transformers 5.23, on any device, in
            bf16, fp16, fp32 or with FP8 weights (`FineGrainedFP8Config`, 128x128 scales). A
            patched model stays as it is.

    Returns:
        `model`. `unpatch_transformers` restores it.

    Ops: attention `mla_prefill`, and `mla_decode` on the cached latents; with more than
    `index_topk` tokens, V3.2's attention `mla_sparse_prefill` and `mla_sparse_decode` on the tokens
    that transformers' indexer selects. Norms `rmsnorm_cast`, MLPs `swiglu`, router `route_topk`,
    experts `expert_dispatch`, `m_grouped_gemm_nt_contiguous`, `swiglu` and `expert_combine`, FP8
    experts `moe_forward`, FP8 Linears `cast_per_token` and `fp8_gemm_nt`. Other Linears, the rotary
    embedding and the indexer are torch's and transformers'.

    Tokens may be padded on either side. The attention of a token that the mask hides is 0. The
    cache is a `DynamicCache` or `StaticCache`, and `generate` works with greedy search, sampling
    and beam search.

    Gradients: where one is needed, what has no backward does not run. RMSNorm is transformers' own
    code, experts are a loop of `F.linear` and `swiglu`, and attention is `mla_prefill` instead of
    `mla_decode`, on a cache that grows by copies. FP8 weights have no gradient.

    Raises:
        TypeError: `model` is not a model of transformers.
        ValueError: its architecture, quantization or activation is not one of the above, its
            modules are replaced or distributed. A forward pass raises ValueError for another
            attention implementation than "eager" and "sdpa", another cache, a mask that is not
            causal with padding, `output_attentions`, and `attention_dropout` in training.

    Example:
        >>> path = "deepseek-ai/DeepSeek-V2-Lite"
        >>> model = transformers.AutoModelForCausalLM.from_pretrained(path)
        >>> deepkern.patch_transformers(model).generate(tokens, max_new_tokens=20)
    """
    prefix = check_model(model)
    patches = list(forwards_of(model, prefix))
    for name, module, forward in patches:
        check_module(name, module, forward)
    memo = RowsMemo()
    for _, module, forward in patches:
        if is_patched(module):
            continue
        if forward is attention_forward:
            module.deepkern_rows, module.deepkern_kv_b_proj = memo, None
        elif forward is router_forward:
            module.deepkern_routing = routing_of(module)
        module.forward = types.MethodType(forward, module)
    return model


def unpatch_transformers(model: nn.Module) -> None:
    """Restores the forward passes that `patch_transformers` replaced.

    Args:
        model: a patched model, or any other module, which stays as it is. Caches that the patched
            model filled remain valid.

    Example:
        >>> deepkern.unpatch_transformers(model)
    """
    for module in model.modules():
        if is_patched(module):
            del module.forward
            for name in ATTRIBUTES:
                module.__dict__.pop(name, None)


def is_patched(module: nn.Module) -> bool:
    """Whether the module's forward pass is one of this package."""
    forward = module.__dict__.get("forward")
    return getattr(forward, "__func__", None) in (*FORWARDS.values(), *FP8_FORWARDS.values())


def check_model(model: nn.Module) -> str:
    """Returns the prefix of the model's class names; raises for a model that is not handled."""
    config, name = getattr(model, "config", None), type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(config, "model_type"):
        raise TypeError(f"patch_transformers: model: expected a model of transformers, got {name}")
    if not type(model).__module__.startswith("transformers.models.deepseek_v"):
        refuse("model", f"a class of transformers for {' or '.join(ARCHITECTURES)}",
               f"{type(model).__module__}.{name}")  # fmt: skip
    if config.model_type not in ARCHITECTURES:
        refuse("model", " or ".join(ARCHITECTURES), config.model_type)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and type(quantizer).__name__ != "FineGrainedFP8HfQuantizer":
        refuse("quantizer", "FineGrainedFP8HfQuantizer or none", type(quantizer).__name__)
    if config.hidden_act != "silu":
        refuse("hidden_act", "'silu'", repr(config.hidden_act))
    if not getattr(config, "is_causal", True):
        refuse("is_causal", "True", "False")
    implementation = config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        refuse("attn_implementation", " or ".join(IMPLEMENTATIONS), repr(implementation))
    return ARCHITECTURES[config.model_type]


def forwards_of(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, Callable]]:
    """The modules to patch by name, each with its new forward pass."""
    for name, module in model.named_modules():
        kind = type(module)
        forward = FP8_FORWARDS.get(kind.__name__) if kind.__module__ == FP8_MODULE else None
        if kind.__module__.startswith("transformers.models.deepseek_v"):
            forward = FORWARDS.get(kind.__name__.removeprefix(prefix))
        if forward is fp8_linear_forward and module.weight.element_size() > 1:
            continue  # FP8Linear with a real weight is F.linear
        if forward is not None:
            yield name, module, forward


def check_module(name: str, module: nn.Module, forward: Callable) -> None:
    """Raises ValueError for a module that its new forward pass does not compute."""
    if "forward" in module.__dict__ and not is_patched(module):
        refuse(name, "the forward pass of its class", "another one (a hook of accelerate?)")
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if hasattr(parameter, "device_mesh"):
            refuse(f"{name}.{parameter_name}", "a tensor of one process", "a DTensor")
    if getattr(module, "_is_expert_parallel", False):
        refuse(name, "all experts", "expert parallelism")
    if forward is attention_forward and not hasattr(module, "expand_kv"):
        refuse("transformers", "version 5.23, which caches latents", version("transformers"))
    if forward is router_forward:
        method = getattr(module, "topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            refuse("topk_method", "'greedy' or 'group_limited_greedy'", repr(method))
    if forward is fp8_linear_forward:
        check_fp8(name, module, "weight", "weight_scale_inv")
    if forward is fp8_experts_forward:
        check_fp8(name, module, "gate_up_proj", "gate_up_proj_scale_inv")
        check_fp8(name, module, "down_proj", "down_proj_scale_inv")


def check_fp8(name: str, module: nn.Module, weight_name: str, scale_name: str) -> None:
    """Checks an FP8 weight [..., N, K] and its scales, one per 128x128 block."""
    weight, scale = getattr(module, weight_name), getattr(module, scale_name)
    if weight.dtype != torch.float8_e4m3fn:
        refuse(f"{name}.{weight_name}", "float8_e4m3fn", weight.dtype)
    if module.activation_scheme != "dynamic":
        refuse(f"{name}.activation_scheme", "'dynamic'", repr(module.activation_scheme))
    blocks = tuple(-(-size // 128) for size in weight.shape[-2:])
    if tuple(scale.shape[-2:]) != blocks:
        refuse(f"{name}.{scale_name}", f"shape [..., {blocks[0]}, {blocks[1]}]", tuple(scale.shape))


def refuse(argument: str, expected: str, got: object) -> None:
    raise ValueError(f"patch_transformers: {argument}: expected {expected}, got {got}")
