"""Decoding by replayed graphs, with stand-ins for the capture of a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.batch import Segment, build_batch
from model.engine import Engine
from model.graph import DecodeGraphs
from model.sampling import Sampling


def capture_on_cpu(function):
    """Runs the function at each replay and writes to the same result, as a graph does."""
    result = function().clone()
    return lambda: result.copy_(function()), result


@pytest.fixture
def model(make_config, make_plain, deepkern_model):
    plain = make_plain(make_config(num_hidden_layers=2, num_nextn_predict_layers=1))
    return deepkern_model(plain, torch.bfloat16, fp8=True)


def test_graphs_give_the_same_bits(model):
    prompts = [[5, 6, 7], [8], list(range(30))]
    sampling = Sampling(max_new_tokens=12, ignore_eos=True)
    expected = Engine(model, page=8).generate(prompts, sampling)
    engine = Engine(model, page=8)
    engine.graphs = DecodeGraphs(model, engine.pool, 4, 16, capture_on_cpu)
    results = engine.generate(prompts, sampling)
    assert [r.samples for r in results] == [r.samples for r in expected]
    assert list(engine.graphs.graphs) == [4]


def test_batches_that_do_not_fit(model):
    pool = model.new_pool(8, 4)
    graphs = DecodeGraphs(model, pool, 2, 2, capture_on_cpu)
    table = model.rotary_table(32)

    def batch(*segments: Segment):
        tokens = torch.zeros(sum(s.stop - s.start for s in segments), dtype=torch.int64)
        return build_batch(tokens, list(segments), 4, table)

    one = Segment(3, 4, [0], False)
    assert graphs.fits(batch(one, one))
    assert not graphs.fits(batch(one, one, one))
    assert not graphs.fits(batch(Segment(3, 4, [0], True)))
    assert not graphs.fits(batch(Segment(8, 9, [0, 1, 2], False)))


def test_a_step_reads_no_value_on_the_host(model):
    """Fake tensors have no values: a read would raise, and a capture would fail on it."""
    pool = model.new_pool(8, 4)
    inputs = DecodeGraphs(model, pool, 2, 2, capture_on_cpu).empty_batch(2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert model.run(inputs, pool).shape == (2, 72)


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_bits(make_config, make_plain, deepkern_model, device):
    plain = make_plain(make_config(num_hidden_layers=2))
    model = deepkern_model(plain, torch.bfloat16, device, fp8=True)
    prompts, sampling = [[5, 6, 7], [8]], Sampling(max_new_tokens=12, ignore_eos=True)
    eager = Engine(model, graphs=False).generate(prompts, sampling)
    engine = Engine(model, graphs=True)
    results = engine.generate(prompts, sampling)
    assert [r.samples for r in results] == [r.samples for r in eager]
    assert engine.graphs.graphs
