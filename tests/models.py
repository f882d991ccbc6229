"""Shared by the tests of models: random weights, FP8 tensors, the operators that a pass calls."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.plain import PlainModel
from model.tensors import is_quantized

BLOCK = 128  # rows and columns per scale
E4M3_MAX = 448.0


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights of deviation 1/sqrt(inputs), norms from 0.5 to 1.5, selection biases around 0."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """real [N, K] -> e4m3 [N, K] and fp32 scales [⌈N/128⌉, ⌈K/128⌉] that multiply to dequantize.

    scale[i, j] = max(|block[i, j]|, 1e-4) / 448        codes = e4m3(weight * (1 / scale))
    """
    rows, columns = weight.shape
    pad = (0, -columns % BLOCK, 0, -rows % BLOCK)
    blocks = F.pad(weight.float(), pad).unflatten(0, (-1, BLOCK))
    blocks = blocks.unflatten(2, (-1, BLOCK))  # [rows / 128, 128, columns / 128, 128]
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-4) / E4M3_MAX
    scaled = blocks * (1 / scale)[:, None, :, None]
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = codes.view(torch.uint8).flatten(2).flatten(0, 1)[:rows, :columns]
    return codes.contiguous().view(torch.float8_e4m3fn), scale


def stored_tensors(model: PlainModel) -> dict[str, Tensor]:
    """The tensors of an FP8 checkpoint by name, `<name>_scale_inv` included, in plain PyTorch."""
    tensors = {}
    for name, value in model.state_dict().items():
        if is_quantized(name):
            tensors[name], tensors[name + "_scale_inv"] = quantize_blocks(value)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = value.float()
        else:
            tensors[name] = value.bfloat16()
    return tensors


class Calls(TorchDispatchMode):
    """Counts the operators that are called in the block, not those inside of an op.

    counts: of deepkern.  others: all other ones.
    """

    def __enter__(self):
        self.counts: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        counter = self.counts if function.namespace == "deepkern" else self.others
        counter[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))
