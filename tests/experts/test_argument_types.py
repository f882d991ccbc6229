"""None for a required argument, and values of a wrong type, for the functions that are not ops.

tests/test_every_op.py has the same tests for ops.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist

import deepkern

LOAD = torch.ones(2, 8)
PLAN = deepkern.rebalance_experts(LOAD, 12, 2, 2, 4)
EXPERT = torch.zeros(3, 2, dtype=torch.int64)
# Valid arguments of every function; a missing argument keeps its default.
FUNCTIONS = {
    "fp8_experts": {
        "x": torch.ones(3, 8),
        "topk_weights": torch.ones(3, 2),
        "topk_idx": EXPERT,
        "w13": torch.ones(4, 10, 8),
        "w2": torch.ones(4, 8, 5),
    },
    "choose_replicas": {"topk_idx": EXPERT, "log2phy": PLAN[1][0], "logcnt": PLAN[2][0]},
    "nearest_replicas": {
        "log2phy": PLAN[1],
        "logcnt": PLAN[2],
        "gpu": 0,
        "num_replicas": 12,
        "num_gpus": 4,
    },
    "rebalance_experts": {
        "load": LOAD,
        "num_replicas": 12,
        "num_groups": 2,
        "num_nodes": 2,
        "num_gpus": 4,
    },
    "placement_bound": {
        "load": LOAD,
        "num_replicas": 12,
        "num_groups": 2,
        "num_nodes": 2,
        "num_gpus": 4,
    },
    "gpu_loads": {"load": LOAD, "phy2log": PLAN[0], "num_gpus": 4},
    "plan_moves": {"old_phy2log": PLAN[0], "new_phy2log": PLAN[0], "num_gpus": 4},
    "LoadStatistics": {"layer": 0, "tokens_per_expert": LOAD[0]},
    "ExpertParallel.dispatch": {
        "x": torch.ones(3, 8),
        "topk_idx": EXPERT,
        "topk_weights": torch.ones(3, 2),
    },
    "ExpertParallel.combine": {"y": torch.ones(6, 8), "handle": None},
}
FLAGS = {"async_op"}  # any value has a truth value


class Unknown:
    """A value of a type that no argument accepts."""


@pytest.fixture
def functions():
    """The functions by the name in their errors."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ep = deepkern.ExpertParallel(None, 4, timeout=10)
    handle = ep.dispatch(**FUNCTIONS["ExpertParallel.dispatch"])[4]
    found = {name: getattr(deepkern, name) for name in FUNCTIONS if hasattr(deepkern, name)}
    found["LoadStatistics"] = deepkern.LoadStatistics(2, 8, half_life=2).update
    found["ExpertParallel.dispatch"], found["ExpertParallel.combine"] = ep.dispatch, ep.combine
    yield found, {"handle": handle}
    dist.destroy_process_group()


def test_every_function_is_walked():
    ops = set(deepkern.OPS)
    public = {name: getattr(deepkern, name) for name in deepkern.__all__}
    in_family = {
        name
        for name, value in public.items()
        if inspect.isfunction(value) and value.__module__.startswith("deepkern.experts.")
    }
    assert in_family - ops <= set(FUNCTIONS)


def test_none_and_wrong_types_name_the_argument(functions):
    found, fixed = functions
    for name, function in found.items():
        good = FUNCTIONS[name] | {k: v for k, v in fixed.items() if k in FUNCTIONS[name]}
        function(**good)
        for argument, parameter in inspect.signature(function).parameters.items():
            if argument in FLAGS:
                continue
            values = {"Unknown": Unknown()}
            if parameter.default is not None:
                values["None"] = None
            for got, value in values.items():
                with pytest.raises(TypeError) as caught:
                    function(**good | {argument: value})
                message = str(caught.value)
                assert message.startswith(f"{name}: {argument}: expected "), message
                assert message.endswith(f", got {got}"), message
