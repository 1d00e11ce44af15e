"""patch, unpatch, routes and policies; padding and packing; and everything else people do with a model."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from models import ragged, scramble, tiny
from torch import Tensor
from transformers import LlamaForCausalLM

import flux_ext
from flux_ext import FluxConfig, FluxRouters
from flux_ext.batch import Batch
from flux_ext.cache import FluxLayer
from flux_ext.patching import get_routers, last_routing, policy

SMALL = {"sink": 4, "window": 16, "pool_size": 20}


def patched_model(family: str = "llama", granularity: str = "layer", **changes: Any) -> Any:
    model = flux_ext.patch(tiny(family, **changes), FluxConfig(granularity=granularity, **SMALL))
    scramble(get_routers(model))
    return model


def routes_and_logits(model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    output = model(*args, use_cache=False, **kwargs).logits
    routing = last_routing(model)
    assert routing.logits is not None
    return routing.routes, routing.logits, output


# --- A prompt gets the same route alone, padded and packed.


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_routes_do_not_depend_on_the_layout(family: str, granularity: str) -> None:
    model = patched_model(family, granularity)
    lengths = (60, 31, 45)
    ids, mask = ragged(lengths)
    prompts = [ids[b, mask[b].bool()] for b in range(3)]
    alone = [routes_and_logits(model, p[None]) for p in prompts]
    routes = torch.cat([a[0] for a in alone])
    logits = torch.cat([a[1] for a in alone])
    assert 0 < routes.float().mean() < 1, "the routers should mix"

    def check(got: tuple[Tensor, Tensor, Tensor], rows: list[Tensor]) -> None:
        assert torch.equal(got[0], routes)
        torch.testing.assert_close(got[1], logits, rtol=1e-4, atol=1e-3)
        for row, one in zip(rows, alone, strict=True):
            torch.testing.assert_close(row, one[2][0], rtol=1e-4, atol=3e-4)

    for side in ("left", "right"):
        padded, mask = torch.zeros(3, 60, dtype=torch.long), torch.zeros(3, 60, dtype=torch.long)
        for b, p in enumerate(prompts):
            rows = slice(60 - len(p), 60) if side == "left" else slice(0, len(p))
            padded[b, rows], mask[b, rows] = p, 1
        position = (mask.cumsum(1) - 1).clamp(min=0)
        got = routes_and_logits(model, padded, attention_mask=mask, position_ids=position)
        check(got, [got[2][b, mask[b].bool()] for b in range(3)])

    packed = torch.cat(prompts)[None]
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 60, 91, 136], dtype=torch.int32)
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 60, "max_length_k": 60}
    for kwargs in ({"position_ids": position}, {"position_ids": position, **flash}):
        got = routes_and_logits(model, packed, **kwargs)
        check(got, list(got[2][0].split(list(lengths))))


def test_packed_rows_have_no_cache() -> None:
    model = patched_model()
    ids = torch.randint(2, 128, (1, 30))
    position = torch.cat([torch.arange(18), torch.arange(12)])[None]
    assert model(ids, position_ids=position).past_key_values is None
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, position_ids=position, use_cache=True)


def test_packed_sequences_in_several_rows_are_refused() -> None:
    model, position = patched_model(), torch.cat([torch.arange(18), torch.arange(12)]).expand(2, -1)
    with pytest.raises(ValueError, match="position_ids restart in a batch"):
        model(torch.randint(2, 128, (2, 30)), position_ids=position)


def test_packing_that_cannot_be_honoured() -> None:
    model, position = patched_model(), torch.cat([torch.arange(18), torch.arange(12)])[None]
    ids, bounds = torch.randint(2, 128, (1, 30)), torch.tensor([0, 18, 30], dtype=torch.int32)
    cache = flux_ext.FluxCache(model.config, get_routers(model).config)
    padded = torch.ones(1, 30).index_fill(1, torch.tensor([29]), 0)
    for kwargs, message in (
        ({"cu_seq_lens_q": bounds, "past_key_values": cache}, "cu_seq_lens_q: .* no cache"),
        ({"position_ids": position, "past_key_values": cache}, "restart with a cache"),
        ({"cu_seq_lens_q": bounds, "attention_mask": padded}, "padding beside cu_seq_lens_q"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **kwargs)
    with pytest.raises(ValueError, match="got a batch of 2 rows"):
        model(ids.expand(2, -1), cu_seq_lens_q=bounds)
    want = model(ids, position_ids=position, cu_seq_lens_q=bounds).logits
    ones = torch.ones_like(ids)  # says nothing that cu_seq_lens_q does not
    assert torch.equal(model(ids, position_ids=position, cu_seq_lens_q=bounds, attention_mask=ones).logits, want)


def test_position_ids_and_packed_rows_compile_as_one_graph() -> None:
    model, position = patched_model(num_hidden_layers=1), torch.cat([torch.arange(18), torch.arange(12)])[None]
    ids, bounds = torch.randint(2, 128, (1, 30)), torch.tensor([0, 18, 30], dtype=torch.int32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for kwargs in ({"position_ids": torch.arange(30)[None]}, {"position_ids": position, "cu_seq_lens_q": bounds}):
        with torch.no_grad():
            want = model(ids, use_cache=False, **kwargs).logits
            torch.testing.assert_close(compiled(ids, use_cache=False, **kwargs).logits, want)


def test_bounds_are_read_once_for_copies_of_a_batch() -> None:
    batch = Batch(seq_start=torch.tensor([1]), seq_end=torch.tensor([3]))
    assert batch.to("cpu").host_bounds(1, 4)[0] is batch.host_bounds(1, 4)[0]


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.tensor([[1, 1, 0, 1, 1]]), "hole"),
        (torch.ones(1, 3), "attention_mask must be"),
        (torch.ones(2, 5), "attention_mask must be"),
        (torch.ones(1, 1, 5, 5), "padding mask"),
    ],
)
def test_masks_that_cannot_be_honoured(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patched_model()(torch.randint(2, 128, (1, 5)), attention_mask=mask)


# --- Routes and policies


def test_forced_routes_take_every_shape() -> None:
    model = patched_model(granularity="head")
    ids = torch.randint(2, 128, (2, 50))
    per_head = torch.randint(0, 2, (2, 4, 2))
    for route in (per_head, per_head.bool(), per_head[:, :, 0], per_head[0, :, 0], "full", "sparse"):
        with flux_ext.routes(model, route):
            got = routes_and_logits(model, ids)[0]
        if isinstance(route, str):
            want = torch.full_like(got, int(route == "sparse"))
        elif route.dim() == 1:
            want = route[None, :, None].expand(2, 4, 2)
        else:
            want = route if route.dim() == 3 else route[:, :, None].expand(2, 4, 2)
        assert torch.equal(got, want.int())


def test_fractional_routes_mix_and_have_gradients() -> None:
    model = patched_model()
    ids = torch.randint(2, 128, (2, 50))
    with flux_ext.routes(model, torch.tensor([1, 0, 0, 1])):
        hard = model(ids, use_cache=False).logits
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0], requires_grad=True)
    with flux_ext.routes(model, weight):
        mixed = model(ids, use_cache=False).logits
    torch.testing.assert_close(mixed, hard, rtol=1e-4, atol=2e-4)
    mixed.sum().backward()
    assert weight.grad is not None and (weight.grad != 0).all()


@pytest.mark.parametrize("route", ["half", torch.zeros(3), torch.zeros(2, 3), torch.zeros(()), torch.zeros(2, 4, 2, 1)])
def test_bad_routes(route: Any) -> None:
    model = patched_model()
    with pytest.raises(ValueError, match="route must be"), flux_ext.routes(model, route):
        pass


def test_a_policy_gets_logits_and_its_answer_is_checked() -> None:
    model = patched_model(granularity="head")
    ids = torch.randint(2, 128, (3, 40))
    own = routes_and_logits(model, ids)
    seen: dict[int, Tensor] = {}

    def flip(layer: int, logits: Tensor) -> Tensor:
        seen[layer] = logits
        route = (logits[..., 0] >= logits[..., 1]).int()
        return 1 - route if layer == 3 else route

    with policy(model, flip):
        flipped = routes_and_logits(model, ids)
    assert sorted(seen) == [0, 1, 2, 3] and seen[0].shape == (3, 2, 2)
    assert torch.equal(flipped[0][:, :3], own[0][:, :3]) and torch.equal(flipped[0][:, 3], 1 - own[0][:, 3])
    for bad in (torch.zeros(3, 3), torch.zeros(1), torch.zeros(3, 2, 2)):
        with policy(model, lambda layer, logits, bad=bad: bad), pytest.raises(ValueError, match="a route must be"):
            model(ids)
    assert torch.equal(routes_and_logits(model, ids)[0], own[0])  # nothing is left behind


def test_nested_policies_restore_each_other() -> None:
    model, ids = patched_model(), torch.randint(2, 128, (1, 30))
    with flux_ext.routes(model, "sparse"):
        with flux_ext.routes(model, "full"):
            assert routes_and_logits(model, ids)[0].sum() == 0
        assert (routes_and_logits(model, ids)[0] == 1).all()


# --- patch and unpatch


def test_patch_is_idempotent_and_undone() -> None:
    model = tiny()
    before = {name: id(module) for name, module in model.named_modules()}
    attributes, keys = set(vars(model)), set(model.state_dict())
    assert not flux_ext.is_patched(model)
    assert flux_ext.patch(model, FluxConfig(**SMALL)) is model and flux_ext.is_patched(model)
    routers = get_routers(model)
    assert flux_ext.patch(model, FluxConfig(**SMALL)) is model and get_routers(model) is routers
    assert flux_ext.patch(model, routers=routers) is model and flux_ext.patch(model) is model
    with pytest.raises(ValueError, match="window: 16 and 32"):
        flux_ext.patch(model, FluxConfig(sink=4, window=32, pool_size=20))
    with pytest.raises(ValueError, match="other routers"):
        flux_ext.patch(model, routers=FluxRouters(routers.config))
    with pytest.raises(ValueError, match="either config or routers"):
        flux_ext.patch(model, FluxConfig(), routers=routers)
    assert flux_ext.unpatch(model) is model
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert set(vars(model)) == attributes and set(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "eager"
    for use in (flux_ext.unpatch, get_routers, last_routing):
        with pytest.raises(ValueError, match="not patched"):
            use(model)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        flux_ext.patch(torch.nn.Linear(2, 2))


def test_with_patched_undoes_itself_on_an_error() -> None:
    model = tiny()
    with pytest.raises(KeyError), flux_ext.patched(model, FluxConfig(**SMALL)):
        assert flux_ext.is_patched(model)
        raise KeyError
    assert not flux_ext.is_patched(model)


def test_with_patched_leaves_an_older_patch() -> None:
    model = patched_model()
    with flux_ext.patched(model):
        pass
    assert flux_ext.is_patched(model)


def test_the_same_folder_again_changes_nothing(tmp_path: Path) -> None:
    get_routers(patched_model()).save_pretrained(tmp_path)
    model = flux_ext.patch(tiny(), routers=tmp_path)
    routers = get_routers(model)
    assert flux_ext.patch(model, routers=str(tmp_path)) is model and get_routers(model) is routers
    with pytest.raises(ValueError, match="other routers"):
        flux_ext.patch(model, routers=str(tmp_path / "other"))


def test_another_attention_implementation_is_refused_until_unpatched() -> None:
    model, ids = patched_model(), torch.randint(2, 128, (1, 10))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="must stay 'flux_ext', it was set to 'sdpa'"):
        model(ids)
    flux_ext.unpatch(model)(ids)


def test_attention_weights_are_refused() -> None:
    model, ids = patched_model(), torch.randint(2, 128, (1, 10))
    for call in (model, lambda *a, **kw: model.generate(*a, max_new_tokens=2, return_dict_in_generate=True, **kw)):
        with pytest.raises(ValueError, match="output_attentions"):
            call(ids, output_attentions=True)


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model, ids = patched_model(), torch.randint(2, 128, (1, 10))
    model(ids)

    def fail(layer: int, logits: Tensor) -> Tensor:
        raise KeyError

    with pytest.raises(KeyError), policy(model, fail):
        model(ids)
    local = model._flux_ext.local
    assert local.batch is None and local.cache is None
    with pytest.raises(ValueError, match="no forward"):
        last_routing(model)
    model(ids)
    assert last_routing(model).routes.shape == (1, 4, 2)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"layers_to_route": [1, 4]}, "layers with full attention"),
        ({"head_dim": 32}, "another model: head_dim is 32, here 16"),
        ({"num_layers": 5}, "another model"),
        ({"num_kv_heads": 4}, "another model"),
        ({"model_type": "qwen3"}, "another model"),
    ],
)
def test_a_config_of_another_model(config: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        flux_ext.patch(model, FluxConfig(**config))
    assert not flux_ext.is_patched(model) and not any("flux" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "config, message",
    [
        ({"pattern": "full"}, "pattern must be one of"),
        ({"granularity": "token"}, "granularity must be one of"),
        ({"route_on": "decode"}, "route_on must be one of"),
        ({"sink": -1}, "sink must be >= 0"),
        ({"window": 100, "align": 64}, "window must be a positive multiple of align"),
        ({"window": 10.0}, "window must be an integer"),
        ({"pool_size": 0}, "pool_size must be >= 1"),
        ({"pattern": "triangle", "last_q": -1}, "last_q must be >= 0"),
        ({"pattern": "triangle", "route_on": "first_chunk"}, "whole prompt"),
        ({"layers_to_route": []}, "empty"),
        ({"layers_to_route": [2, 1]}, "ascending"),
        ({"layers_to_route": [3], "num_layers": 2}, "layers_to_route has layer 3"),
        ({"head_dim": 0}, "head_dim must be >= 1"),
    ],
)
def test_bad_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FluxConfig(**config)


def test_a_module_called_on_its_own_decides_nothing() -> None:
    model = patched_model("qwen3")
    ids = torch.randint(2, 128, (1, 20))
    routes = routes_and_logits(model, ids)[0]
    attention = model.model.layers[0].self_attn
    attention.q_norm(torch.randn(1, 20, 4, 16))
    assert torch.equal(last_routing(model).routes, routes)
    with pytest.raises(RuntimeError, match="only inside its decoder"):
        attention(torch.randn(1, 20, 64), None, None)


# --- What people do with a model


def test_save_pretrained_has_no_router(tmp_path: Path) -> None:
    model = patched_model()
    model.save_pretrained(tmp_path)
    assert "flux" not in (tmp_path / "config.json").read_text()
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(2, 128, (1, 20))
    with flux_ext.routes(model, "full"):
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=2e-4)
    assert not any("flux" in name for name in plain.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how: str) -> None:
    model = patched_model()
    ids = torch.randint(2, 128, (2, 50))
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), want)
    assert get_routers(other).layers[0] is other.model.layers[0].self_attn.flux_router
    assert get_routers(other).layers[0] is not get_routers(model).layers[0]
    with flux_ext.routes(model, "sparse"):
        routes_and_logits(model, ids)
        assert not torch.equal(routes_and_logits(other, ids)[0], last_routing(model).routes)
    flux_ext.unpatch(other)
    assert flux_ext.is_patched(model) and not flux_ext.is_patched(other)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), want)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = patched_model().train()
    ids = torch.randint(2, 128, (2, 50))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)

        def gumbel(layer: int, logits: Tensor) -> Tensor:
            return torch.nn.functional.gumbel_softmax(logits, tau=1.0)[..., 0]

        with policy(model, gumbel):
            loss = model(ids, labels=ids).loss
        assert last_routing(model).logits.requires_grad
        (loss + last_routing(model).routes.mean()).backward()
        return [p.grad.clone() for p in get_routers(model).parameters()]

    plain = gradients()
    assert all((g != 0).any() for g in plain)
    model.gradient_checkpointing_enable()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="non-reentrant"):
        model(ids)


def test_training_makes_no_cache() -> None:
    model = patched_model().train()
    assert model(torch.randint(2, 128, (1, 20))).past_key_values is None


def test_lora_over_and_under_a_patch() -> None:
    """The router sees the adapted queries, whichever came first."""
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    ids = torch.randint(2, 128, (2, 40))

    def run(patch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        model = tiny()
        torch.manual_seed(5)
        routers = FluxRouters(FluxConfig(num_layers=4, head_dim=16, **SMALL))
        scramble(routers)
        if patch_first:
            flux_ext.patch(model, routers=routers)
            model(ids)
        torch.manual_seed(6)
        model = peft.get_peft_model(model, lora)
        if not patch_first:
            flux_ext.patch(model, routers=routers)
        assert flux_ext.is_patched(model)
        result = routes_and_logits(model.eval(), input_ids=ids)
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        return result

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b)


def test_peft_can_train_and_save_the_routers(tmp_path: Path) -> None:
    model = patched_model("qwen3")
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["flux_router"], r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad and "flux_router" in n]
    assert len(trainable) == 4 * 10
    with torch.no_grad():
        dict(model.named_parameters())[trainable[-1]].add_(1.0)
    # The copies PEFT trains decide, and are what get_routers gives.
    wrapped = model.get_base_model().model.layers[3].self_attn.flux_router
    assert get_routers(model).layers[3] is wrapped.modules_to_save["default"]
    ids = torch.randint(2, 128, (1, 40))
    model.eval()(input_ids=ids)
    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(flux_ext.patch(tiny("qwen3"), FluxConfig(**SMALL)), tmp_path).eval()
    torch.testing.assert_close(fresh(input_ids=ids).logits, model(input_ids=ids).logits)


def test_threads_share_one_model() -> None:
    model = patched_model()
    prompts = [torch.randint(2, 128, (1, 20 + 9 * i)) for i in range(4)]
    routes = ["full", "sparse", torch.tensor([0, 1, 0, 1]), None]

    def generate(i: int) -> Tensor:
        kwargs: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
        if routes[i] is None:
            return model.generate(prompts[i], **kwargs)
        with flux_ext.routes(model, routes[i]):
            return model.generate(prompts[i], **kwargs)

    want = [generate(i) for i in range(4)]
    wrong: list[Any] = []

    def work(i: int) -> None:
        try:
            wrong.extend(i for _ in range(3) if not torch.equal(generate(i), want[i]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


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
            if t == 27:
                torch.compiler.set_stance("fail_on_recompile")
            out = compiled(ids[:, t : t + 1], past_key_values=out.past_key_values)
            torch.testing.assert_close(out.logits[:, 0], want[:, t], rtol=1e-4, atol=2e-4)
        torch.compiler.set_stance("default")


def test_offloaded_weights() -> None:
    """accelerate brings each module's weights when it runs, and moves its inputs, the batch among them."""
    ids, mask = ragged()
    model = patched_model("qwen3")
    want = routes_and_logits(model, ids, attention_mask=mask)
    routers = get_routers(model)
    offloaded = accelerate.cpu_offload(tiny("qwen3"), torch.device("cpu"))
    flux_ext.patch(offloaded, routers=routers)
    for a, b in zip(routes_and_logits(offloaded, ids, attention_mask=mask), want, strict=True):
        torch.testing.assert_close(a, b)
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny().config)
    with pytest.raises(ValueError, match="device meta"):
        flux_ext.patch(empty)
    assert not flux_ext.is_patched(empty)


def test_bfloat16() -> None:
    model = tiny("qwen3").bfloat16()
    ids, mask = ragged()
    stock = model(ids, attention_mask=mask).logits
    flux_ext.patch(model, FluxConfig(**SMALL))
    with flux_ext.routes(model, "full"):
        got = model(ids, attention_mask=mask).logits
    assert got.dtype == torch.bfloat16
    scale = stock.float().abs().max()
    assert ((got - stock)[mask.bool()].float().abs().max() / scale) < 0.05
    model.generate(ids, attention_mask=mask, max_new_tokens=4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_autocast(family: str) -> None:
    """The rotary embedding of an fp32 model gives fp32 queries and keys beside bfloat16 values."""
    model = tiny(family)
    ids, mask = ragged()
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(ids, attention_mask=mask).logits
        flux_ext.patch(model, FluxConfig(**SMALL))
        with flux_ext.routes(model, "full"):
            got = model(ids, attention_mask=mask)
            got.logits.float().sum().backward()
            generated = model.generate(ids, **kwargs)
            if family != "gemma3":
                assert torch.equal(model.generate(ids, cache_implementation="static", **kwargs), generated)
    assert generated.shape[1] == ids.shape[1] + 6
    layers = [layer for layer in got.past_key_values.layers if isinstance(layer, FluxLayer)]
    assert {pool.dtype for layer in layers for pool in (layer.rows.keys, layer.rows.values)} == {torch.bfloat16}
    assert ((got.logits - stock)[mask.bool()].float().abs().max() / stock.float().abs().max()) < 0.05
    step = model(ids[:, -1:], past_key_values=got.past_key_values).logits  # goes on without autocast
    assert step.dtype == torch.float32 and bool(step.isfinite().all())
