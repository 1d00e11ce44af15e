"""The operation alone: routes per sequence and per head, packed sequences, a step over a paged cache.

Each result is compared with plain PyTorch. Runs on a CPU in seconds: python examples/attention.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import flux_ext

torch.manual_seed(0)
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 300, 8, 2, 64
PATTERN = flux_ext.Streaming(sink=4, window=64)  # what sparse sees: the first 4 keys and the last 64


def plain(q: Tensor, k: Tensor, v: Tensor, route: Tensor) -> Tensor:
    """The same by PyTorch, with a mask: q [B, S, H, D], k and v [B, Skv, KV heads, D], route [B, KV heads]."""
    p = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]  # the queries are the last tokens
    j = torch.arange(k.shape[1])
    full = j <= p
    sparse = full & ((j < PATTERN.sink) | (j > p - PATTERN.window))
    mask = torch.where(route[..., None, None].bool(), sparse, full)  # [B, KV heads, S, Skv]
    mask = mask.repeat_interleave(q.shape[2] // k.shape[2], 1)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def check(name: str, out: Tensor, expected: Tensor) -> None:
    """Prints the largest deviation, and stops where it is more than rounding."""
    worst = float((out - expected).abs().max())
    print(f"{name:42} {list(out.shape)!s:18} differs from PyTorch by at most {worst:.1e}")
    assert worst < 1e-5


q = torch.randn(BATCH, LENGTH, HEADS, DIM)
k, v = torch.randn(2, BATCH, LENGTH, KV_HEADS, DIM)

# One route per sequence: the first is full (0), the second sparse (1).
by_sequence = torch.tensor([0, 1])
out = flux_ext.attention(q, k, v, by_sequence, sparse=PATTERN)
check("a route per sequence", out, plain(q, k, v, by_sequence[:, None].expand(-1, KV_HEADS)))

# One route per sequence and KV head.
by_head = torch.tensor([[0, 1], [1, 0]])
out = flux_ext.attention(q, k, v, by_head, sparse=PATTERN)
check("a route per head", out, plain(q, k, v, by_head))

# Sequences of different lengths, packed into one row of tokens [T, H, D]; cu_seqlens says where each begins.
lengths = [100, 40, 160]
cu_seqlens = torch.tensor([0, 100, 140, 300], dtype=torch.int32)
routes = torch.tensor([0, 1, 1])
out = flux_ext.attention(q[0], k[0], v[0], routes, sparse=PATTERN, cu_seqlens=cu_seqlens)
parts = [x[0].split(lengths) for x in (q, k, v)]
alone = [plain(*(x[i][None] for x in parts), routes[i].expand(1, KV_HEADS))[0] for i in range(len(lengths))]
check("packed sequences", out, torch.cat(alone))

# A decode step over a paged cache: keys and values lie in pages of a pool, in any order; the page table lists the pages
# of each sequence. kv_len counts the stored tokens, the new one included.
PAGE = 16
pages = -(-LENGTH // PAGE)
page_table = torch.randperm(BATCH * pages, dtype=torch.int32).view(BATCH, pages)
kv_len = torch.tensor([LENGTH, 170], dtype=torch.int32)
k_pool, v_pool = torch.zeros(2, BATCH * pages, PAGE, KV_HEADS, DIM)
for b in range(BATCH):
    for t in range(int(kv_len[b])):
        k_pool[page_table[b, t // PAGE], t % PAGE] = k[b, t]
        v_pool[page_table[b, t // PAGE], t % PAGE] = v[b, t]
step = torch.randn(BATCH, 1, HEADS, DIM)
out = flux_ext.attention(step, k_pool, v_pool, by_head, sparse=PATTERN, kv_len=kv_len, page_table=page_table)
alone = [plain(step[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], by_head[b : b + 1]) for b, n in enumerate(kv_len)]
check("one step over a paged cache", out, torch.cat(alone))
