"""What others offer for the same problems, each under its name; what cannot run says why."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .measure import Call, first_line

Inputs = Sequence[tuple[Tensor, Tensor, Tensor]]  # q [B, S, Hq, D], k, v [B, Skv, Hkv, D]
Peers = tuple[dict[str, Sequence[Call]], dict[str, str]]  # calls by name; why the others are missing

ON_CUDA = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
ON_CPU = {"SDPA flash": SDPBackend.FLASH_ATTENTION}


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True
        )


def _flash4(module: Any) -> Callable[..., Any]:
    return lambda q, k, v, causal, window: module.flash_attn_func(
        q, k, v, causal=causal, window_size=(window, 0 if window is not None else None)
    )


def _flash3(module: Any) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Any:
        # A few queries over a cache: it shares the keys out as its own heuristic says (0), not to one block (1, its
        # default), and packs the query heads of a KV head together.
        few = {"num_splits": 0, "pack_gqa": True} if q.shape[1] < k.shape[1] else {}
        return module.flash_attn_func(
            q, k, v, causal=causal, window_size=(-1, -1) if window is None else (window, 0), **few
        )

    return run


def _flashinfer(module: Any) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Any:
        if q.shape[0] != 1:
            raise ValueError("this call takes one sequence")
        window_left = -1 if window is None else window
        if q.shape[1] == 1:
            return module.single_decode_with_kv_cache(q[0, 0], k[0], v[0], window_left=window_left)
        return module.single_prefill_with_kv_cache(q[0], k[0], v[0], causal=causal, window_left=window_left)

    return run


# Packages that may or may not be there: the modules that may hold them, and what makes a call of one.
OPTIONAL: dict[str, tuple[Sequence[str], Callable[[Any], Callable[..., Any]]]] = {
    "FlashAttention-3": (("flash_attn_interface", "fa3_fwd_interface"), _flash3),
    "FlashAttention-4": (("flash_attn.cute",), _flash4),
    "FlashInfer": (("flashinfer",), _flashinfer),
}


def _import_first(modules: Sequence[str]) -> Any:
    """The first of the modules that is installed."""
    for module in modules[:-1]:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            pass
    return importlib.import_module(modules[-1])


def optional(inputs: Inputs, causal: bool, window: int | None = None) -> Peers:
    """The packages of ``OPTIONAL`` that import; ``window``: keys before the query's own (there are no sinks)."""
    calls: dict[str, Sequence[Call]] = {}
    missing: dict[str, str] = {}
    for name, (modules, make) in OPTIONAL.items():
        if inputs[0][0].device.type != "cuda":
            missing[name] = "needs CUDA"
            continue
        try:
            run = make(_import_first(modules))
        except Exception as error:
            missing[name] = first_line(error)
            continue
        calls[name] = [lambda s=s, run=run: run(*s, causal, window) for s in inputs]
    return calls, missing


def dense(inputs: Inputs, causal: bool) -> Peers:
    """SDPA's backends and the optional packages, over everything."""
    on_cuda = inputs[0][0].device.type == "cuda"
    calls, missing = optional(inputs, causal)
    for name, backend in (ON_CUDA if on_cuda else ON_CPU).items():
        calls[name] = [lambda s=s, b=backend: _sdpa(b, *s, causal) for s in inputs]
    if not on_cuda:
        missing["SDPA cuDNN"] = "needs CUDA"
    return calls, missing


def paged(queries: Sequence[Tensor], k: Tensor, v: Tensor, tables: Sequence[Tensor], length: int) -> Peers:
    """FlashInfer's decode of sequences of one length, its plans made before (a model makes one for all its layers): by
    its kernel without and by its kernel with tensor cores, which is the one of its prefill.

    Args:
        queries: ``[B, 1, Hq, D]`` of each call.
        k, v: pools of pages, ``[pages, page size, Hkv, D]``.
        tables: int32 ``[B, pages of a sequence]`` of each call.
        length: keys of a sequence.
    """
    names = {"FlashInfer": False, "FlashInfer with tensor cores": True}
    if not k.is_cuda:
        return {}, dict.fromkeys(names, "needs CUDA")
    calls: dict[str, Sequence[Call]] = {}
    missing: dict[str, str] = {}
    for name, tensor_cores in names.items():
        try:
            module = importlib.import_module("flashinfer")
            workspace = torch.zeros(1 << 28, dtype=torch.uint8, device=k.device)  # of one call at a time
            calls[name] = [
                _paged(module, workspace, tensor_cores, q[:, 0], k, v, t, length)
                for q, t in zip(queries, tables, strict=True)
            ]
        except Exception as error:
            missing[name] = first_line(error)
    return calls, missing


def _paged(
    module: Any, workspace: Tensor, tensor_cores: bool, q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: int
) -> Call:
    batch, pages = table.shape
    size = k.shape[1]
    first_page = torch.arange(batch + 1, dtype=torch.int32, device=k.device) * pages
    last_page_len = torch.full((batch,), length - (pages - 1) * size, dtype=torch.int32, device=k.device)
    decode = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    heads = q.shape[1], k.shape[2], q.shape[2]
    kinds = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    decode.plan(first_page, table.flatten(), last_page_len, *heads, size, **kinds)
    return lambda: decode.run(q, (k, v))


def _cudnn_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Call:
    aten = torch.ops.aten
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True
    )
    return lambda: aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True
    )


def _flash_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Call:
    aten = torch.ops.aten
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    return lambda: aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset
    )


def dense_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Peers:
    """The backward passes of SDPA's backends, causal, as autograd would call them after a forward pass (untimed)."""
    calls: dict[str, Sequence[Call]] = {}
    missing: dict[str, str] = {}
    for name, make in {"SDPA cuDNN": _cudnn_backward, "SDPA flash": _flash_backward}.items():
        try:
            calls[name] = [make(*(t.transpose(1, 2) for t in (q, k, v, grad)))]
        except Exception as error:
            missing[name] = first_line(error)
    return calls, missing


def _mask_builder(mask: Callable[..., Tensor], q: Tensor) -> Callable[[], BlockMask]:
    n, device = q.shape[1], q.device.type
    create = torch.compile(create_block_mask) if device == "cuda" else create_block_mask
    return lambda: create(mask, 1, q.shape[2], n, n, device=device)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Callable[..., Tensor]) -> dict[str, Sequence[Call]]:
    """FlexAttention with ``mask(b, h, i, j)``: its block mask built before, and once more as a contender of its own.

    On the CPU neither is compiled.
    """
    build = _mask_builder(mask, q)
    block_mask = build()
    run = torch.compile(flex_attention) if q.is_cuda else flex_attention
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    return {
        "FlexAttention": [lambda: run(*heads_first, block_mask=block_mask, enable_gqa=True)],
        "FlexAttention's block mask": [build],
    }
