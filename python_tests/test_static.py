"""What does not look at the input: greedy layers, gates by distillation, and the routes made of them."""

import pytest
import torch
from tiny_training import LAYERS, batch_rows, dataset, model

import flux_ext
from flux_ext.operators.patterns import Streaming
from flux_ext.training import static
from flux_ext.training.backbone import losses
from flux_ext.training.data import PackedCollator, PaddedCollator


def test_greedy_search_takes_the_cheapest_layer_each_time():
    m, data = model(), dataset()
    batches = [PackedCollator()(batch_rows(data)[:5]), PaddedCollator()(batch_rows(data)[5:])]
    order = static.greedy_layers(m, batches)
    assert sorted(order) == list(range(LAYERS))

    def cost(sparse):
        route = torch.tensor([int(layer in sparse) for layer in range(LAYERS)])
        with torch.no_grad(), flux_ext.routes(m, route):
            return sum(float(losses(m, batch).sum()) for batch in batches)

    for i, layer in enumerate(order):
        costs = {other: cost([*order[:i], other]) for other in order[i:]}
        assert min(costs, key=costs.get) == layer, costs


def test_passes_of_the_search():
    """With three layers: 3 forwards of the whole, and candidates that start at their own layers."""
    starts = [3 + 2 + 1, (3 + 2 + 1) * 2 / 3, (3 + 2 + 1) / 3]  # layers run, in the mean over which are left
    assert static.greedy_passes(3) == pytest.approx(3 + sum(starts) / 3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gates_mix_what_the_routes_choose(family):
    """Closed they give what all sparse gives, open what dense does."""
    m = model(family=family)
    pattern = Streaming(2, 6)
    batch = PaddedCollator()([dataset()[0]])
    ids, expected = batch["input_ids"], {}
    for name in ("full", "sparse"):
        with torch.no_grad(), flux_ext.routes(m, name):
            expected[name] = m(ids, use_cache=False).logits
    flux_ext.unpatch(m)
    before = m.config._attn_implementation
    gates = torch.ones(LAYERS, 2)
    with torch.no_grad(), static._gated(m, pattern) as use:
        for name, value in (("full", gates), ("sparse", 0 * gates)):
            with use(value):
                torch.testing.assert_close(m(ids, use_cache=False).logits, expected[name], rtol=1e-4, atol=1e-4)
    assert m.config._attn_implementation == before


def test_gates_learn_which_heads_matter():
    """Heads whose outputs are thrown away can be sparse; the others matter, and close last."""
    m, data = model(family="llama"), dataset(ragged=False)
    flux_ext.unpatch(m)
    idle = [(0, 1), (2, 0)]
    with torch.no_grad():
        for layer, head in idle:
            m.model.layers[layer].self_attn.o_proj.weight[:, 16 * head : 16 * (head + 1)] = 0  # 2 query heads of 8
    batches = [PaddedCollator()([row]) for row in batch_rows(data)] * 3
    gates = static.distilled_gates(m, batches, Streaming(2, 6), steps=len(batches), penalty=1e-3)
    assert gates.shape == (LAYERS, 2) and gates.min() >= 0 and gates.max() <= 1
    routes = static.head_routes(gates, 1 / 3)
    assert {tuple(place) for place in routes.nonzero().tolist()} == set(idle)


def test_gates_need_a_stock_model():
    with pytest.raises(ValueError, match="model must not be patched"):
        static.distilled_gates(model(), [], Streaming(2, 6))


def test_routes():
    assert static.layer_routes([2, 0, 1], 0.67, 2).tolist() == [[1, 1], [0, 0], [1, 1]]
    assert static.head_routes(torch.tensor([[0.1, 0.9], [0.3, 0.2]]), 0.5).tolist() == [[1, 0], [0, 1]]
    policy = static.fixed(torch.tensor([[1, 0], [0, 0]]))
    assert policy(0, torch.zeros(3, 2)).tolist() == [[1, 0]] * 3


@pytest.mark.parametrize("length", [1, 5, 40])
def test_mask_is_the_pattern(length):
    pattern = Streaming(3, 8, 4)
    q = torch.randn(1, length, 1, 8)
    k, v = torch.randn(1, length, 1, 8), torch.randn(1, length, 1, 8)
    out = flux_ext.attention(q, k, v, torch.ones(1, dtype=torch.int32), sparse=pattern)
    mask = static.streaming_mask(length, pattern, torch.device("cpu"))
    scores = (q[0, :, 0] @ k[0, :, 0].T / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(out[0, :, 0], scores @ v[0, :, 0], rtol=1e-4, atol=1e-4)
