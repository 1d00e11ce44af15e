"""Which kernel a call takes: the answer fits the call, and nothing is computed for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flux_ext
from flux_ext import BlockSparse, Explanation, Streaming, attention, explain

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def operands(q_len: int = 300, batch: int = 2, head_dim: int = 128, device: str = "cpu") -> list[Tensor]:
    """q with 8 heads, k and v of 300 tokens with 2."""
    q = torch.randn(batch, q_len, 8, head_dim, device=device, dtype=torch.bfloat16)
    return [q, *torch.randn(2, batch, 300, 2, head_dim, device=device, dtype=torch.bfloat16)]


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_a_prompt_and_a_decode_step_on_the_cpu() -> None:
    core = pytest.importorskip("flux_ext._C")
    prompt, step = explain(*operands(head_dim=40)), explain(*operands(q_len=1, head_dim=40))
    for found in (prompt, step):
        assert (found.device, found.family, found.processor) == (torch.device("cpu"), "cpu", core.isa())
        assert found.workers == torch.get_num_threads()
        assert found.q_tokens * 4 <= found.tile_rows  # 4 query heads share a KV head
        assert found.head_dim >= 40 and found.kv_block >= 1
        assert found.copies == () and not found.plans_itself
        # At least the result of a tile for each worker.
        assert found.workspace_bytes >= found.workers * found.tile_rows * 40 * 4
    assert step.decode and not prompt.decode


def test_it_follows_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = explain(*operands())
        torch.set_num_threads(2)
        two = explain(*operands())
    finally:
        torch.set_num_threads(before)
    assert (one.workers, two.workers) == (1, 2)
    assert two.workspace_bytes == 2 * one.workspace_bytes


@pytest.mark.parametrize("of", ["queries", "sequences"])
def test_nothing_to_do(of: str) -> None:
    q, k, v = operands()
    found = explain(q[:, :0], k, v) if of == "queries" else explain(q[:0], k[:0], v[:0])
    nothing = dict.fromkeys(("tile_rows", "q_tokens", "kv_block", "head_dim", "workers", "workspace_bytes"), 0)
    nothing |= {"family": "none", "processor": "none", "decode": False, "plans_itself": False, "copies": ()}
    assert found == Explanation(device=torch.device("cpu"), **nothing)
    assert str(found) == "attention on cpu: there is no query, so nothing is computed"


def calls() -> dict[str, tuple[list[Tensor], dict[str, Any]]]:
    """Arguments of ``attention`` in every layout."""
    q, k, v = operands()
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    pages = [q[:, :1], *torch.randn(2, 40, 16, 2, 128, dtype=torch.bfloat16)]
    tables = {"kv_len": int32([300, 17]), "page_table": torch.arange(40, dtype=torch.int32).view(2, 20)}
    lists = BlockSparse(blocks=torch.zeros(2, 2, 3, 1, dtype=torch.int32))
    return {
        "route": ([q, k, v, int32([[0, 1], [1, 0]])], {}),
        "booleans": ([q, k, v, torch.tensor([True, False])], {"scale": -0.1}),
        "a mixture": ([q, k, v, torch.tensor([0.5, 1.0])], {"sparse": Streaming(4, 64)}),
        "padded": ([q, k, v], {"seq_start": int32([0, 7])}),
        "packed": (packed, {"cu_seqlens": int32([0, 100, 600])}),
        "cache": ([q[:, :5], k, v], {"kv_len": int32([300, 20])}),
        "paged": (pages, tables),
        "block lists": ([q, k, v, int32([0, 1])], {"sparse": lists}),
        "threshold": ([q, k, v, int32([0, 1])], {"sparse": BlockSparse(threshold=0.9)}),
        "lse": ([q, k, v], {"return_lse": True}),
    }


@pytest.mark.parametrize("name", calls())
def test_every_layout(name: str) -> None:
    arguments, options = calls()[name]
    found = explain(*arguments, **options)
    assert found.workers == torch.get_num_threads() and found.decode == (name == "paged")
    attention(*arguments, **options)  # a call that is explained is a call that can be made


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q must be a tensor, got None"),
        ({"sparse": "streaming"}, TypeError, "sparse must be one of Full, Streaming, Triangle, BlockSparse, got str"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"scale": math.inf}, ValueError, "scale must be a finite number"),
        ({"route": torch.zeros(3)}, ValueError, r"route must be .*got \[3\]"),
        ({"kv_len": torch.zeros(2)}, ValueError, "kv_len must be int32"),
        ({"page_table": int32([[0], [1]])}, ValueError, "page_table needs kv_len"),
        ({"v": torch.zeros(2, 300, 2, 128)}, ValueError, "v must have the dtype of q"),
    ],
    ids=lambda x: "" if not isinstance(x, dict) else next(iter(x)),
)
def test_rules_are_those_of_attention(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = dict(zip("qkv", operands(), strict=True)) | change
    for call in (explain, attention):
        with pytest.raises(error, match=message):
            call(**given)


def test_no_value_is_looked_at() -> None:
    q, k, v = operands()
    found = explain(q, k, v, int32([0, 5]))  # attention refuses a route that is neither 0 nor 1
    assert found == explain(q, k, v, int32([0, 1]))


def test_text() -> None:
    fields = {"tile_rows": 128, "q_tokens": 32, "kv_block": 64, "head_dim": 128, "workspace_bytes": 428032}
    on_cpu = Explanation(
        torch.device("cpu"), "cpu", "avx2", decode=False, workers=2, plans_itself=False, copies=(), **fields
    )
    assert str(on_cpu) == (
        "attention on cpu (avx2): the prefill kernel of the family cpu\n"
        "tiles of up to 128 rows (32 queries), 64 keys a step, head_dim 128\n"
        "2 threads share the work\n"
        "workspace: 428,032 bytes at most"
    )
    on_hopper = Explanation(
        torch.device("cuda", 1), "sm80", "9.0", decode=True, workers=132, plans_itself=True, copies=("q", "v"), **fields
    )
    assert str(on_hopper) == (
        "attention on cuda:1 (compute capability 9.0): the decode kernel of the family sm80\n"
        "tiles of up to 128 rows (32 queries), 64 keys a step, head_dim 128\n"
        "132 thread blocks share the work, each planning for itself\n"
        "workspace: 428,032 bytes at most\n"
        "copied at every call, for alignment to 16 bytes: q, v"
    )


@on_gpu
@pytest.mark.parametrize("q_len", [1, 300])
def test_family_and_kind_on_a_gpu(q_len: int) -> None:
    major, minor = torch.cuda.get_device_capability()
    found = explain(*operands(q_len=q_len, device="cuda"))
    assert found.device.type == "cuda" and found.processor == f"{major}.{minor}"
    assert found.decode == (q_len == 1)
    assert found.head_dim == 128 and found.workers >= 1 and found.copies == ()
    assert found.q_tokens * 4 <= found.tile_rows
    assert found.family == ("sm90" if (major, minor) == (9, 0) and q_len > 1 else "sm80")
    # A negative scale is one of the things that only the portable kernels take.
    assert explain(*operands(q_len=q_len, device="cuda"), scale=-0.1).family == "sm80"


@on_gpu
def test_copies_on_a_gpu() -> None:
    q, k, v = (torch.cat([x, x], -1)[..., 1:129] for x in operands(device="cuda"))  # rows from the second number on
    assert explain(q, k, v).copies == ("q", "k", "v")
    aligned = explain(q.contiguous(), k, v.contiguous())
    assert aligned.copies == ("k",)
    assert aligned.family == explain(q.contiguous(), k.contiguous(), v.contiguous()).family  # copies are as good


@on_gpu
def test_many_rows_are_planned_before_on_a_gpu() -> None:
    assert explain(*operands(q_len=1, batch=1, device="cuda")).plans_itself
    assert not explain(*operands(q_len=1, batch=300, device="cuda")).plans_itself


@on_gpu
@pytest.mark.parametrize("q_len", [1, 300])
def test_workspace_on_a_gpu(q_len: int) -> None:
    """It is what a call allocates beside its outputs; the allocator counts in units of 512 bytes."""
    arguments = operands(q_len=q_len, device="cuda")
    found = explain(*arguments)
    attention(*arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = attention(*arguments, return_lse=True)
    taken = torch.cuda.max_memory_allocated() - before
    sizes = (out.nbytes, lse.nbytes, found.workspace_bytes)
    assert taken >= found.workspace_bytes
    assert taken <= sum(-(-size // 512) * 512 for size in sizes) + (1 << 20)  # large blocks are not cut to size


def test_nothing_is_computed() -> None:
    """A call over a million tokens would take minutes."""
    q, k, v = (torch.empty(1, 1, h, 64, dtype=torch.bfloat16).expand(1, 1 << 20, h, 64) for h in (32, 8, 8))
    assert not flux_ext.explain(q, k, v).decode


def test_what_attention_refuses_of_a_fractional_route_is_refused() -> None:
    q = torch.randn(1, 8, 2, 16)
    for kwargs, message in (
        ({"route": torch.rand(1, 1, 1)}, r"route must be \[B\] or \[B, Hkv\]"),
        ({"route": torch.rand(1), "return_lse": True}, "return_lse needs a hard route"),
        ({"route": torch.rand(1).to(torch.float8_e4m3fn)}, "a fractional route must be dense"),
    ):
        for function in (flux_ext.attention, flux_ext.explain):
            with pytest.raises(ValueError, match=message):
                function(q, q, q, **kwargs)
