"""Our attention backend by the rules that vLLM has for one, on CPUs and on GPUs: the functions here are those with
which vLLM's runner for GPUs lays out pages and makes metadata, called on CPU tensors. It needs no GPU and no engine.

Runs where vLLM is installed, as ``test_serving_vllm.py`` does.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/run tests serving in an environment of its own")

from torch import nn
from vllm.config import CompilationConfig, VllmConfig
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.platforms.interface import DeviceCapability, Platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, get_attn_cg_support, get_kv_cache_spec
from vllm.v1.worker.utils import AttentionGroup, allocate_kv_cache, prepare_kernel_block_sizes

import flux_ext
from flux_ext import FluxConfig, FluxRouters, Streaming
from flux_ext.serving import backend, engine, install, vllm_seam
from flux_ext.serving.backend import ROUTED, RoutedBackend, RoutedImplementation, RoutedMetadataBuilder
from flux_ext.serving.install import Tap
from flux_ext.serving.layers import RoutedLayer
from flux_ext.serving.page_manager import RoutedPagesSpec
from flux_ext.serving.requests import Requests, RouteTable
from flux_ext.serving.steps import Steps

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 16
CONFIG = FluxConfig(sink=16, window=32, num_layers=2, head_dim=DIM, num_kv_heads=KV_HEADS, pool_size=8)


# --- The classes.


@pytest.mark.parametrize("ours", [RoutedBackend, RoutedImplementation, RoutedMetadataBuilder])
def test_nothing_is_of_one_device_and_nothing_is_missing(ours):
    assert not inspect.isabstract(ours)
    assert {c.__module__ for c in ours.__mro__} <= {
        backend.__name__,
        "vllm.v1.attention.backend",
        "abc",
        "typing",
        "builtins",
    }
    base = next(c for c in ours.__mro__ if c.__module__ == "vllm.v1.attention.backend")
    for name, function in vars(ours).items():
        if callable(getattr(ours, name)) and hasattr(base, name) and name != "__module__":
            theirs, here = (list(inspect.signature(getattr(c, name)).parameters) for c in (base, ours))
            assert here[: len(theirs)] == theirs, (name, function)


def rejected(**changes):
    """Why vLLM would not take our backend for a layer on an H100."""
    asked = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, **changes}
    capability = asked.pop("capability", DeviceCapability(9, 0))
    config = AttentionSelectorConfig(**asked)
    return RoutedBackend.validate_configuration(device_capability=capability, **config._asdict())


def test_what_vllm_may_ask_of_it():
    for supported in (
        {},
        {"dtype": torch.float16, "kv_cache_dtype": "float16"},
        {"head_size": 64, "block_size": 64},
        {"head_size": 256, "block_size": None, "use_kv_connector": True},
        {"capability": DeviceCapability(8, 0)},
    ):
        assert rejected(**supported) == []
    for (name, value), reason in {
        ("kv_cache_dtype", "fp8"): "kv_cache_dtype not supported",
        ("head_size", 320): "head_size not supported",
        ("head_size", 100): "head_size not supported",
        ("block_size", 12): "block_size not supported",
        ("dtype", torch.float64): "dtype not supported",
        ("capability", DeviceCapability(7, 5)): "compute capability not supported",
        ("attn_type", "encoder_decoder"): "attention type encoder_decoder not supported",
        ("attn_type", "encoder_only"): "attention type encoder_only not supported",
        ("has_sliding_window", True): "sliding window not supported",
        ("has_sink", True): "attention sinks not supported",
        ("use_mla", True): "MLA not supported",
        ("use_sparse", True): "sparse not supported",
        ("use_mm_prefix", True): "partial multimodal token full attention not supported",
        ("use_non_causal", True): "non-causal attention not supported",
        ("use_dcp", True): "DCP not supported",
        ("use_pcp", True): "PCP not supported",
        ("use_rswa", True): "R-SWA not supported",
        ("use_batch_invariant", True): "batch invariance not supported",
    }.items():
        assert rejected(**{name: value}) == [reason]


def test_no_step_becomes_a_cuda_graph():
    """A replayed step of answers would leave out the router of a prompt whose last token comes alone."""
    group = AttentionGroup(RoutedBackend, ["layer"], spec(), 0)
    group.create_metadata_builders(None, torch.device("cpu"))
    support = get_attn_cg_support([[group]], None)
    assert support.min_cg_support == AttentionCGSupport.NEVER and support.min_cg_attn_backend == "RoutedBackend"
    for mode in (CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.NONE):
        config = CompilationConfig(mode=CompilationMode.NONE, cudagraph_mode=mode)
        arguments = support.min_cg_support, support.min_cg_attn_backend
        assert config.resolve_cudagraph_mode_and_sizes(*arguments) == CUDAGraphMode.NONE


# --- Pages.


def spec(layer: int = 0, page: int = PAGE, dtype: torch.dtype = torch.float32) -> RoutedPagesSpec:
    stock = FullAttentionSpec(block_size=page, num_kv_heads=KV_HEADS, head_size=DIM, head_size_v=DIM, dtype=dtype)
    return RoutedPagesSpec.of(stock, layer, Streaming(16, 32))


def cache_config(pages: int, layout: KVCacheLayout, layers: int = 2) -> KVCacheConfig:
    """One group for each layer, all in one pool, as vLLM lays out groups of equal pages."""
    strides = compute_layout_strides(spec(), pages, 1, layout)
    size = pages * spec().page_size_bytes
    tensors = [KVCacheTensor(size, [f"layers.{i}"], strides[0], strides[1]) for i in range(layers)]
    groups = [KVCacheGroupSpec([f"layers.{i}"], spec(i)) for i in range(layers)]
    return KVCacheConfig(pages, tensors, groups)


class Served:
    """The attention layers of a worker, with the pages and the metadata that vLLM's runner for GPUs gives them."""

    def __init__(self, layout: KVCacheLayout, routes: list[int], pages: int = 40) -> None:
        self.requests = Requests()
        self.requests.table = RouteTable(pages, 1, "cpu")
        self.requests.groups = {layer: layer for layer in range(len(routes))}
        steps = Steps(self.requests, CONFIG)
        self.config = cache_config(pages, layout)
        self.groups = [[AttentionGroup(RoutedBackend, group.layer_names, group.kv_cache_spec, i)]
                       for i, group in enumerate(self.config.kv_cache_groups)]  # fmt: skip
        sizes = prepare_kernel_block_sizes(self.config, self.groups)
        assert sizes == [PAGE] * len(routes)
        for (group,), size in zip(self.groups, sizes, strict=True):
            group.create_metadata_builders(None, torch.device("cpu"), size)
        caches = allocate_kv_cache(self.config, torch.device("cpu"), layout, sizes)
        self.layers = []
        for i, (router, route) in enumerate(zip(FluxRouters(CONFIG).layers, routes, strict=True)):
            with torch.no_grad():
                router.classifier[4].weight.zero_()
                router.classifier[4].bias.copy_(torch.tensor([0.0, -1.0 if route else 1.0]))
            layer = SimpleNamespace(
                layer_name=f"layers.{i}", num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=DIM,
                kv_cache=caches[f"layers.{i}"], impl=RoutedImplementation(HEADS, DIM, DIM**-0.5, KV_HEADS),
            )  # fmt: skip
            tap = Tap(nn.Identity(), RoutedLayer(i, router, CONFIG, self.requests), layer, steps)
            setattr(layer, ROUTED, tap)
            self.layers.append(layer)

    def step(self, spans, tables, q, k, v, padding=0, announced=True, only_answers=False):
        """What the layers give for tokens ``[begin, end)`` of each request, and ``padding`` rows after them."""
        lengths = torch.tensor([0, *(end - begin for begin, end in spans)]).cumsum(0).int()
        q, k, v = (torch.cat([x, torch.full_like(x[:padding], torch.nan)]) for x in (q, k, v))
        slots = []
        for group in tables:
            places = [torch.tensor(row)[torch.arange(b, e) // PAGE] * PAGE + torch.arange(b, e) % PAGE
                      for row, (b, e) in zip(group, spans, strict=True)]  # fmt: skip
            slots.append(torch.cat([*places, torch.full((padding,), -1)]))
        metadata = build_attn_metadata(
            self.groups, len(spans), int(lengths[-1]), lengths, lengths, max(e - b for b, e in spans),
            torch.tensor([e for _, e in spans] + [0]).int(), max(e for _, e in spans),
            [torch.nn.utils.rnn.pad_sequence([torch.tensor(row).int() for row in rows], True) for rows in tables],
            torch.stack(slots), self.config,
        )  # fmt: skip
        if announced:
            self.requests.next_step(only_answers)
        outputs = []
        for layer, slot in zip(self.layers, slots, strict=True):
            tap, own = getattr(layer, ROUTED), metadata[layer.layer_name]
            tap.routed.see(q, tap.step(own))
            layer.impl.do_kv_cache_update(layer, k, v, layer.kv_cache, slot)
            outputs.append(layer.impl.forward(layer, q, k, v, layer.kv_cache, own, torch.full_like(q, torch.nan)))
        assert all(out[lengths[-1] :].isnan().all() for out in outputs)
        return [out[: lengths[-1]] for out in outputs]


@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_every_layout_of_pages(layout):
    """A prompt, an answer beside another prompt and a warm-up of the runner, over pages as vLLM lays them out."""
    torch.manual_seed(0)
    served = Served(layout, [0, 1])
    q, k, v = (torch.randn(100, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    tables = [[[3, 9, 5, 30, 7, 21]], [[4, 8, 15, 16, 23, 31]]]
    streaming = CONFIG.streaming()

    def expected(begin, end, route, start=0):
        parts = (x[None, start:end] for x in (q, k, v))
        return flux_ext.attention(next(parts)[:, begin:], *parts, torch.tensor([route]), sparse=streaming)[0]

    made_up = served.step([(0, 20)], [[[6, 17]], [[18, 19]]], q[:20], k[:20], v[:20], announced=False)
    for out in made_up:  # of a request that nobody announced: full attention
        torch.testing.assert_close(out, expected(0, 20, 0), rtol=1e-5, atol=1e-5)
    served.requests.begin("a", 80, (3, 4))
    outputs = served.step([(0, 80)], tables, q[:80], k[:80], v[:80], padding=2)
    for route, out in enumerate(outputs):
        torch.testing.assert_close(out, expected(0, 80, route), rtol=1e-5, atol=1e-5)
    for layer, ((table,), cache) in enumerate(zip(tables, (x.kv_cache for x in served.layers), strict=True)):
        assert cache.shape == (40, KV_HEADS, PAGE, 2 * DIM)
        assert torch.equal(cache[table[4], 1, 3], torch.cat([k[67, 1], v[67, 1]])), layer
    first, last = 1, 3  # pages that the sparse layer has given back: another request's, or NaN
    served.layers[1].kv_cache[tables[1][0][first:last]] = torch.nan
    outputs = served.step([(80, 81)], tables, q[80:81], k[80:81], v[80:81], only_answers=True)
    for route, out in enumerate(outputs):
        torch.testing.assert_close(out, expected(80, 81, route), rtol=1e-5, atol=1e-5)
    served.requests.begin("b", 19, (11, 12))
    both = [tables[0] + [[11, 13]], tables[1] + [[12, 14]]]
    rows = torch.arange(81, 100), torch.arange(81, 82)
    parts = [torch.cat([x[rows[1]], x[rows[0]]]) for x in (q, k, v)]
    outputs = served.step([(81, 82), (0, 19)], both, *parts)
    for route, out in enumerate(outputs):
        torch.testing.assert_close(out[:1], expected(81, 82, route), rtol=1e-5, atol=1e-5)
        alone = flux_ext.attention(*(x[None, 81:100] for x in (q, k, v)), torch.tensor([route]), sparse=streaming)[0]
        torch.testing.assert_close(out[1:], alone, rtol=1e-5, atol=1e-5)


def test_pages_and_their_layout_are_whatever_the_other_layers_need():
    class Picky(RoutedBackend):
        @classmethod
        def supported_kv_cache_layouts(cls):
            return (KVCacheLayout.LBHNC,)

        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec=None):
            return [MultipleOf(32)]

    assert set(get_supported_kv_cache_layouts([RoutedBackend])) == set(KVCacheLayout)
    assert get_supported_kv_cache_layouts([RoutedBackend, Picky]) == [KVCacheLayout.LBHNC]
    preferred = Platform._preferred_block_size_for_backends
    config = VllmConfig()
    assert [preferred([RoutedBackend], size, config) for size in (16, 64, 128)] == [64, 64, 128]
    assert preferred([RoutedBackend, Picky], 16, config) == 32


def test_the_runner_for_gpus_asks_for_pages_of_each_layer(monkeypatch):
    layer = attention_layer()
    install._own_pages(layer, 1, Streaming(16, 32))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=PAGE), attention_config=SimpleNamespace(hisparse_config=None)
    )
    monkeypatch.setattr("vllm.v1.worker.gpu.attn_utils.get_layers_from_vllm_config", lambda *_: {"layers.1": layer})
    asked = get_kv_cache_spec(config)["layers.1"]
    assert isinstance(asked, RoutedPagesSpec) and (asked.layer_index, asked.sink, asked.window) == (1, 16, 32)
    assert asked.copy_with_new_block_size(32).block_size == 32


# --- What is refused.


def attention_layer(impl=None, kind=vllm_seam.Attention, **changes):
    """A layer of vLLM as it is after a model was loaded, on any device."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    own = {"scale": 0.125, "alibi_slopes": None, "logits_soft_cap": 0, "sinks": None, **(impl or {})}
    settings = {
        "layer_name": "layers.1", "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": DIM, "head_size_v": DIM,
        "sliding_window": None, "attn_type": AttentionType.DECODER, "use_mm_prefix": False, "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto", "kv_cache_torch_dtype": torch.bfloat16, "kv_sharing_target_layer_name": None,
        "impl": SimpleNamespace(**own), "attn_backend": RoutedBackend, **changes,
    }  # fmt: skip
    layer.__dict__.update(settings)
    return layer


class Gpu:
    """A platform as vLLM's for GPUs answers."""

    device_type = "cuda"

    def __init__(self, capability=(9, 0), cuda=True):
        self.capability, self.cuda = DeviceCapability(*capability), cuda

    def is_cpu(self):
        return False

    def is_cuda(self):
        return self.cuda

    def get_device_capability(self):
        return self.capability


class ChunkedAttention(vllm_seam.Attention):
    """A layer with a rule of its own for what it sees."""


def test_a_layer_gets_our_attention():
    ours = install.implementation_for(attention_layer({"scale": 0.3}), 1)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_size, ours.scale) == (HEADS, KV_HEADS, DIM, 0.3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 128}, "has a sliding window of its own"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "is not causal"),
        ({"kv_cache_dtype": "fp8"}, "has keys and values in fp8"),
        (
            {"kv_cache_torch_dtype": torch.float16},
            "computes in torch.bfloat16 and keeps keys and values in torch.float16",
        ),
        ({"kv_sharing_target_layer_name": "layers.0"}, "shares another layer's keys and values"),
        ({"use_mm_prefix": True}, "sees the later tokens of an image"),
        ({"head_size": 320, "head_size_v": 320}, "has head_dim 320"),
        ({"head_size_v": 128}, "has values of another width"),
        ({"impl": {"sinks": torch.zeros(4)}}, "has learned sinks"),
        ({"impl": {"logits_soft_cap": 30.0}}, "soft-caps its scores"),
        ({"impl": {"alibi_slopes": [0.5]}}, "has ALiBi slopes"),
        ({"kind": ChunkedAttention}, "is a ChunkedAttention"),
        ({"platform": Gpu(), "dtype": torch.float32}, "computes in torch.float32"),
        ({"platform": Gpu((7, 5))}, "is on a GPU of compute capability"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_layer_that_cannot_be_routed(monkeypatch, changes, reason):
    monkeypatch.setattr(install, "current_platform", changes.pop("platform", install.current_platform))
    with pytest.raises(ValueError, match=f"^layer 7 {reason}.*: it cannot be routed$"):
        install.implementation_for(attention_layer(**changes), 7)


def test_a_layer_whose_attention_does_not_say_what_it_is():
    layer = attention_layer()
    del layer.impl.sinks
    with pytest.raises(ImportError, match=r"sinks of the attention in layer 7 \(SimpleNamespace\)"):
        install.implementation_for(layer, 7)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"alibi_slopes": [1.0]}, "ALiBi slopes"),
        ({"sliding_window": 64}, "a sliding window"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "keys and values in fp8_e4m3"),
        ({"logits_soft_cap": 30.0}, "soft-capped scores"),
        ({"attn_type": AttentionType.ENCODER}, ".* attention"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "another layer's keys and values"),
        ({"sinks": torch.zeros(4)}, "learned sinks"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_attention_made_by_vllm_says_what_it_cannot(arguments, what):
    with pytest.raises(ValueError, match=f"attention with {what} cannot be routed"):
        RoutedImplementation(HEADS, DIM, 0.125, KV_HEADS, **arguments)


def test_a_step_that_asks_for_more_is_refused():
    served = Served(KVCacheLayout.LBNHC, [0, 1])
    layer, x = served.layers[0], torch.randn(1, HEADS, DIM)
    assert not layer.impl.forward(layer, x, x, x, layer.kv_cache, None, torch.full_like(x, torch.nan)).any()
    with pytest.raises(NotImplementedError, match="does not quantise its output"):
        layer.impl.forward(layer, x, x, x, layer.kv_cache, None, x, output_scale=torch.ones(1))
    common = SimpleNamespace(causal=False)
    with pytest.raises(RuntimeError, match="routed attention is causal, layers.0 was asked for another one"):
        served.groups[0][0].get_metadata_builder(0).build(0, common)


@pytest.mark.parametrize("built", [True, False])
def test_devices(monkeypatch, built):
    engine.refuse_platform(SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: built)
    with pytest.raises(ValueError, match="served on CPUs and CUDA GPUs, this vLLM runs on cuda"):
        engine.refuse_platform(Gpu(cuda=False))
    if built:
        said = []
        monkeypatch.setattr(engine, "init_logger", lambda _: SimpleNamespace(warning=lambda *text: said.append(text)))
        engine.refuse_platform(Gpu())
        assert len(said) == 1 and "GPU" in str(said[0])
    else:
        with pytest.raises(ValueError, match="flux_ext was built without its CUDA kernels"):
            engine.refuse_platform(Gpu())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        *((("parallel_config", name), 2, f"with routers {name} must be 1, got 2") for name in engine.PARALLEL),
        (("parallel_config", "use_ubatching"), True, "enable_dbo and ubatch_size must not be given"),
        (("cache_config", "cache_dtype"), "fp8_e5m2", "kv_cache_dtype must be one of .*, got fp8_e5m2"),
        (("kv_transfer_config", "kv_connector"), "NixlConnector", "an argument of the engine asks for NixlConnector"),
        (("model_config", "runner_type"), "pooling", "must generate, got runner_type 'pooling'"),
    ],
    ids=lambda x: x[1] if isinstance(x, tuple) else "",
)
def test_a_configuration_for_which_routers_were_not_made(monkeypatch, place, value, message):
    monkeypatch.setattr(engine, "current_platform", SimpleNamespace(is_cpu=lambda: True))
    sizes = {name: 1 for name in engine.PARALLEL}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes, use_ubatching=False),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        kv_transfer_config=SimpleNamespace(kv_connector=engine.CONNECTOR),
        model_config=SimpleNamespace(
            runner_type="generate",
            get_total_num_hidden_layers=lambda: CONFIG.num_layers,
            get_head_size=lambda: DIM,
            get_total_num_kv_heads=lambda: KV_HEADS,
        ),
    )
    engine.refuse_unsupported(config, CONFIG)
    setattr(getattr(config, place[0]), place[1], value)
    with pytest.raises(ValueError, match=message):
        engine.refuse_unsupported(config, CONFIG)
