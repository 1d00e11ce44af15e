"""One call of each CUDA kernel, for tools that look into kernels: compute-sanitizer and Nsight Compute.

    python -m benchmarks launch sm90-prefill            # the smallest call that runs this kernel
    python -m benchmarks launch --profile               # real sizes, each between cudaProfilerStart and Stop

``benchmarks/sanitize.sh`` and ``benchmarks/profile.sh`` call it. On a CPU the same calls run on the CPU kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.cuda.problems import Setting
from flux_ext import BlockSparse, Full, Streaming, operators
from flux_ext.operators import KeyValues, Routing
from flux_ext.operators.patterns import Pattern
from flux_ext.routers.modules import HeadRouter, LayerRouter

Call = Callable[[], object]


def attention(
    s: Setting,
    q_len: int,
    kv_len: int,
    *,
    batch: int = 1,
    dim: int = 128,
    heads: tuple[int, int] = (8, 2),
    sparse: Pattern = Streaming(16, 48),
    share: float = 0.5,
    scale: float | None = None,
) -> Call:
    """Attention with that share of the KV heads sparse."""
    q = s.random(batch, q_len, heads[0], dim)
    k, v = (s.random(batch, kv_len, heads[1], dim) for _ in range(2))
    count = round(share * heads[1])
    route = s.int32([[1] * count + [0] * (heads[1] - count)] * batch)
    kv, routing = KeyValues(k, v), Routing(route, Full(), sparse)
    return lambda: operators.attend(q, kv, routing, dim**-0.5 if scale is None else scale)


def gradients(s: Setting, q_len: int, kv_len: int, *, dim: int = 128, lists: bool = False) -> Call:
    """The backward pass of attention with half of the KV heads sparse."""
    q, grad = (s.random(1, q_len, 8, dim) for _ in range(2))
    k, v = (s.random(1, kv_len, 2, dim) for _ in range(2))
    if lists:
        blocks, counts = s.int32([[[[0, 0, 0], [0, 1, 0], [0, 2, 0]]] * 2]), s.int32([[[1, 2, 2]] * 2])
        how = (None, [0, 1, 0, 1, 128] * 2, blocks, counts, blocks, counts)
    else:
        how = (s.int32([[1, 0]]), [*Full().numbers(), 0, *Streaming(16, 48).numbers(), 0], None, None, None, None)
    rest = (*how, dim**-0.5, None, None, None, None)
    out, lse = torch.ops.flux_ext.attend(q, k, v, *rest, None)
    return lambda: torch.ops.flux_ext.attend_backward(grad, q, k, v, out, lse, *rest)


def mixture(
    s: Setting, length: int, *, dim: int = 128, heads: tuple[int, int] = (8, 2), lists: bool = False, back: bool = False
) -> Call:
    """A mixture of full attention and a window, or lists of key blocks; or its backward pass."""
    q, grad = (s.random(1, length, heads[0], dim) for _ in range(2))
    k, v = (s.random(1, length, heads[1], dim) for _ in range(2))
    weight = torch.full((1, heads[1]), 0.3, device=s.device)
    if lists:
        blocks, counts = s.int32([[[[0, 0, 0], [0, 1, 0], [0, 2, 0]]] * 2]), s.int32([[[1, 2, 2]] * 2])
        how = (weight, [*Full().numbers(), 0, 0, 1, 0, 1, 128], None, None, blocks, counts)
    else:
        how = (weight, [*Full().numbers(), 0, *Streaming(16, 48).numbers(), 0], None, None, None, None)
    rest = (*how, dim**-0.5, None, None, None, None)
    if not back:
        return lambda: torch.ops.flux_ext.mix(q, k, v, *rest, None)
    _, *branches = torch.ops.flux_ext.mix(q, k, v, *rest, None)
    return lambda: torch.ops.flux_ext.mix_backward(grad, q, k, v, *branches, *rest)


def paged(s: Setting) -> Call:
    """A decode step over pages."""
    q = s.random(2, 1, 8, 128)
    k, v = (s.random(40, 16, 2, 128) for _ in range(2))
    table, kv_len = s.int32(list(reversed(range(40)))).view(2, 20), s.int32([300, 17])
    route = s.int32([0, 1])
    kv = KeyValues(k, v, end=kv_len, page_table=table)
    return lambda: operators.attend(q, kv, Routing(route, Full(), Streaming(16, 48)), 128**-0.5)


def router(s: Setting, kind: type[LayerRouter] | type[HeadRouter], length: int, batch: int = 1) -> Call:
    """A fused router."""
    module = kind(128).to(s.device, s.dtype).requires_grad_(False)
    x = s.random(batch, length, 8, 128)
    return lambda: operators.route(x, module.weights(), module.pool_size, module.per_head)


def model_step(s: Setting) -> Call:
    """A decode step of a patched model over the static cache, with whatever kernels that uses."""
    import transformers

    import flux_ext

    shape = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 64}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.AutoModelForCausalLM.from_config(config).to(s.device, s.dtype).eval().requires_grad_(False)
    flux_ext.patch(model, flux_ext.FluxConfig(sink=4, window=16, pool_size=20))
    cache = flux_ext.FluxStaticCache(model.config, flux_ext.get_routers(model).config, 64)
    ids = torch.randint(0, 64, (1, 40), device=s.device)
    with flux_ext.routes(model, torch.tensor([0, 1], dtype=torch.int32)):
        model(ids, past_key_values=cache)
    return lambda: model(ids[:, :1], past_key_values=cache, position_ids=ids.new_full((1, 1), 40))


def block_lists(s: Setting) -> Call:
    """A prompt with lists of key blocks."""
    blocks = s.int32([[[[0, 0, 0], [0, 1, 0], [0, 2, 0]]] * 2])
    counts = s.int32([[[1, 2, 2]] * 2])
    return attention(s, 300, 300, sparse=BlockSparse(blocks=blocks, counts=counts))


# A negative scale is one of the things that only the sm80 kernels take.
SMALL: dict[str, Callable[[Setting], Call]] = {
    "torch": lambda s: (lambda x: lambda: x.softmax(-1))(s.random(64, 300)),  # the tool itself, none of our kernels
    "plan": lambda s: attention(s, 1, 64, batch=300),  # more rows than a kernel plans for itself
    "decode": lambda s: attention(s, 1, 3000),
    "decode-paged": paged,
    "sm80-prefill": lambda s: attention(s, 130, 130, scale=-0.1),
    "sm80-prefill-split": lambda s: attention(s, 40, 3000, scale=-0.1),
    "sm90-prefill": lambda s: attention(s, 200, 200),
    "sm90-prefill-d64": lambda s: attention(s, 200, 200, dim=64),
    "sm90-prefill-long": lambda s: attention(s, 900, 900, heads=(64, 64)),  # goes round the rings of buffers
    "sm90-prefill-d64-wide": lambda s: attention(s, 800, 800, dim=64, heads=(212, 212)),  # three warpgroups
    "sm90-prefill-d256": lambda s: attention(s, 900, 900, dim=256, heads=(16, 8)),  # 80 keys at a time, no turns
    "sm90-prefill-split": lambda s: attention(s, 64, 3000),
    "sm90-block-lists": block_lists,
    "backward": lambda s: gradients(s, 200, 300),
    "backward-d64": lambda s: gradients(s, 200, 200, dim=64),
    "backward-d256": lambda s: gradients(s, 200, 200, dim=256),
    "backward-block-lists": lambda s: gradients(s, 300, 300, lists=True),
    "mixture": lambda s: mixture(s, 300),
    "mixture-d64": lambda s: mixture(s, 300, dim=64),
    "mixture-d256": lambda s: mixture(s, 300, dim=256),
    "mixture-long": lambda s: mixture(s, 900, heads=(64, 64)),
    "mixture-block-lists": lambda s: mixture(s, 300, lists=True),
    "mixture-backward": lambda s: mixture(s, 300, back=True),
    "mixture-backward-d64": lambda s: mixture(s, 300, dim=64, back=True),
    "mixture-backward-d256": lambda s: mixture(s, 300, dim=256, back=True),
    "mixture-backward-block-lists": lambda s: mixture(s, 300, lists=True, back=True),
    "router-layer": lambda s: router(s, LayerRouter, 300),
    "router-head": lambda s: router(s, HeadRouter, 300),
    "model-step": model_step,
}

K = 1024


def _real(s: Setting, q_len: int, kv_len: int, share: float, *, batch: int = 1, dim: int = 128) -> Call:
    if s.tiny:
        q_len, kv_len = min(q_len, 40), min(kv_len, 100)
    return attention(s, q_len, kv_len, batch=batch, dim=dim, heads=(32, 8), sparse=s.sparse, share=share)


REAL: dict[str, Callable[[Setting], Call]] = {
    "prefill 4K": lambda s: _real(s, 4 * K, 4 * K, 0),
    "prefill 32K": lambda s: _real(s, 32 * K, 32 * K, 0),
    "prefill 16K, head dimension 64": lambda s: _real(s, 16 * K, 16 * K, 0, dim=64),
    "streaming prefill 32K": lambda s: _real(s, 32 * K, 32 * K, 1),
    "decode 128K": lambda s: _real(s, 1, 128 * K, 0),
    "decode 16 x 32K": lambda s: _real(s, 1, 32 * K, 0, batch=16),
    "streaming decode 128K": lambda s: _real(s, 1, 128 * K, 1),
    "half streaming decode 128K": lambda s: _real(s, 1, 128 * K, 0.5),
    "router": lambda s: router(s, LayerRouter, 200 if s.tiny else 8 * K),
}


def profile(setting: Setting) -> None:
    """Every call of ``REAL`` once warm, once for the profiler."""
    on_cuda = setting.device == "cuda"
    for name, build in REAL.items():
        call = build(setting)
        call()
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        call()
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"profiled: {name}", flush=True)


@torch.inference_mode()
def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks launch", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SMALL)}")
    parser.add_argument("--profile", action="store_true", help="the calls of real size instead")
    parser.add_argument("--tiny", action="store_true", help="small sizes for --profile")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in SMALL]:
        parser.error(f"no launch {unknown[0]!r}: choose from {', '.join(SMALL)}")
    torch.manual_seed(0)
    setting = Setting("cuda" if torch.cuda.is_available() else "cpu", args.tiny)
    if args.profile:
        profile(setting)
    for name in args.names:
        SMALL[name](setting)()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        print(f"ran: {name}", flush=True)
