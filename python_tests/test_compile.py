"""Patched models under torch.compile."""

import torch
from models import patched_model, ragged

import flux_ext
from flux_ext.patching import last_routing


def test_position_ids_and_packed_rows_compile_as_one_graph() -> None:
    model, position = patched_model(num_hidden_layers=1), torch.cat([torch.arange(18), torch.arange(12)])[None]
    ids, bounds = torch.randint(2, 128, (1, 30)), torch.tensor([0, 18, 30], dtype=torch.int32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for kwargs in ({"position_ids": torch.arange(30)[None]}, {"position_ids": position, "cu_seq_lens_q": bounds}):
        with torch.no_grad():
            want = model(ids, use_cache=False, **kwargs).logits
            torch.testing.assert_close(compiled(ids, use_cache=False, **kwargs).logits, want)


def test_torch_compile_without_a_cache_is_one_graph() -> None:
    model = patched_model("qwen3", num_hidden_layers=2)
    ids, mask = ragged()
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        routes = last_routing(model).routes
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(got.logits, want)
    assert torch.equal(last_routing(model).routes, routes)


def test_torch_compile_with_a_cache() -> None:
    """The cache's bookkeeping breaks the graph; steps after the second compile nothing."""
    model = patched_model(num_hidden_layers=1)
    ids = torch.randint(2, 128, (2, 30))
    with torch.no_grad(), flux_ext.routes(model, "sparse"):
        want = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        out = compiled(ids[:, :24])
        torch.testing.assert_close(out.logits, want[:, :24], rtol=1e-4, atol=2e-4)
        for t in range(24, 30):
            with torch.compiler.set_stance("fail_on_recompile" if t >= 27 else "default"):
                out = compiled(ids[:, t : t + 1], past_key_values=out.past_key_values)
            torch.testing.assert_close(out.logits[:, 0], want[:, t], rtol=1e-4, atol=2e-4)
