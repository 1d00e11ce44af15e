"""patch, unpatch, routes and policies; and everything else people do with a model."""

import copy
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import torch
from models import SMALL, patched_model, ragged, routes_and_logits, scramble, tiny
from torch import Tensor
from transformers import LlamaForCausalLM

import flux_ext
from flux_ext import FluxConfig, FluxRouters
from flux_ext.caches.layer import FluxCacheLayer
from flux_ext.models.patching import get_routers, last_routing, policy

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


@pytest.mark.parametrize("route", [[0, 1, 1, 1], 1, None])
def test_routes_that_are_no_tensor_are_refused(route: Any) -> None:
    with pytest.raises(TypeError, match='route must be "full", "sparse" or a tensor, got'):
        flux_ext.routes(patched_model(), route).__enter__()


def test_forced_routes_are_those_of_the_batch() -> None:
    model, ids = patched_model(), torch.randint(2, 128, (2, 12))
    with pytest.raises(ValueError, match="route must be numbers, it has NaN"):
        flux_ext.routes(model, torch.tensor([0, 1, torch.nan, 0])).__enter__()
    with (
        torch.no_grad(),
        flux_ext.routes(model, torch.ones(3, 4, dtype=torch.int32)),
        pytest.raises(ValueError, match=r"B = 2 sequences, got shape \[3, 4\]"),
    ):
        model(ids)


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
    for other, error, message in (
        (None, TypeError, "a route must be a tensor, got NoneType"),
        (torch.zeros(3, dtype=torch.complex64), ValueError, "a route must be integers, booleans or floating numbers"),
        (torch.full((3,), 2**32 + 1), ValueError, r"route must be 0 \(full\) or 1 \(sparse\)"),
    ):
        with policy(model, lambda layer, logits, other=other: other), pytest.raises(error, match=message):
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
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear$"):
        flux_ext.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"PreTrainedModel, got Sequential: give what it has as \.1$"):
        flux_ext.patch(torch.nn.Sequential(torch.nn.Linear(2, 2), model))
    with pytest.raises(TypeError, match=r"PreTrainedModel, got SimpleNamespace: give what it has as \.model$"):
        flux_ext.patch(SimpleNamespace(task="text-generation", model=model))


def test_recomputed_layers_are_not_held_until_the_backward_pass_ends() -> None:
    """With gradient checkpointing: one layer's states at a time, where each layer's weight has a gradient."""
    model = patched_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    alive: list[int] = []
    most = 0

    def count(_module: Any, _args: Any, output: Tensor) -> None:
        nonlocal most
        storage = output.untyped_storage()
        alive.append(key := storage._cdata)
        weakref.finalize(storage, alive.remove, key)
        most = max(most, len(alive))

    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(count)
    with policy(model, lambda layer, logits: (-logits[..., 1]).sigmoid()):
        loss = model(torch.randint(2, 128, (1, 60)), use_cache=False).logits.float().sum()
        first = [d.logits for d in model._flux_ext.local.last.decisions.values()]
        most = 0
        loss.backward()
    assert len(first) == 4 and most <= 2
    again = [d.logits for d in model._flux_ext.local.last.decisions.values()]
    assert all(x is y for x, y in zip(first, again, strict=True))
    assert all(p.grad is not None for p in get_routers(model).parameters())


def test_a_dtype_without_kernels_is_said_of_the_model() -> None:
    rule = r"must compute in float16, bfloat16 or float32 on cpu, its dtype is float64: .*model\.to\(torch\.float32\)"
    ids = torch.randint(2, 128, (1, 10))
    model = patched_model().double()
    for granularity in ("layer", "head"):
        with pytest.raises(ValueError, match=f"LlamaForCausalLM cannot be patched: the model {rule}"):
            flux_ext.patch(tiny().double(), FluxConfig(**SMALL, granularity=granularity))
    with pytest.raises(ValueError, match=rule):
        model(ids)
    for layers in (None, [1]):  # a layer without a router comes first
        model = flux_ext.patch(tiny(), FluxConfig(**SMALL, layers_to_route=layers)).double()
        with pytest.raises(ValueError, match=rule):
            model(ids)
        assert bool(model.float()(ids).logits.isfinite().all())


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
    with pytest.raises(ValueError, match="must stay 'flux_ext', not become 'sdpa'"):
        model.set_attn_implementation("sdpa")
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
    assert local.context is None and local.cache_layer is None
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
        (
            {"pattern": "xattn"},
            r"pattern must be one of \('streaming', 'triangle', 'block_sparse'\) or a name that "
            r"flux_ext.register_pattern has been given, got 'xattn'",
        ),
        ({"full": "streaming"}, r"full must be one of \('full', 'block_sparse'\) or a name .*, got 'streaming'"),
        ({"pattern": ["streaming"]}, r"pattern must be one of .* got \['streaming'\]"),
        ({"decode": "full"}, r"decode must be one of \('sparse', 'dense'\), got 'full'"),
        ({"threshold": 0}, r"threshold must be in \(0, 1\], got 0"),
        ({"threshold": float("nan")}, r"threshold must be in \(0, 1\], got nan"),
        ({"threshold": "0.9"}, "threshold must be a number, got '0.9'"),
        ({"threshold": True}, "threshold must be a number, got True"),
        ({"stride": 7}, "stride must"),
        ({"stride": 16.0}, "stride must be an integer, got 16.0"),
        ({"block_width": 32}, "^block_width must be 64 or 128, got 32"),
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
    layers = [layer for layer in got.past_key_values.layers if isinstance(layer, FluxCacheLayer)]
    assert {pool.dtype for layer in layers for pool in (layer.pages.keys, layer.pages.values)} == {torch.bfloat16}
    assert ((got.logits - stock)[mask.bool()].float().abs().max() / stock.float().abs().max()) < 0.05
    step = model(ids[:, -1:], past_key_values=got.past_key_values).logits  # goes on without autocast
    assert step.dtype == torch.float32 and bool(step.isfinite().all())


def test_a_patch_that_fails_leaves_methods_of_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    from flux_ext.models.model_patch import Patch

    model = tiny()
    model.save_pretrained = own = lambda *args, **kwargs: "own"

    def fail(self: Any) -> None:
        raise RuntimeError("no place")

    monkeypatch.setattr(Patch, "_place_routers", fail)
    with pytest.raises(RuntimeError, match="no place"):
        flux_ext.patch(model, FluxConfig(**SMALL))
    assert model.save_pretrained is own
