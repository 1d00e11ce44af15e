"""Random models whose queries and keys have the structure that block selection looks for.

Random keys are all alike, so that a threshold of 0.9 keeps 90 % of their blocks. In trained models most attention goes
to the first token (the sink), to the last few hundred tokens, and to a few passages; heads differ in how sharply. Here
the weights of a Llama with biases (``attention_bias``) make the same:

- **Local.** Queries and keys of a head get one constant bias in some pairs of features that the rotary embedding turns.
  What the turned biases give is a sum of cosines of the distance: it is largest at distance 0 and falls off over 64 to
  512 tokens (``REACH``), by KV head.
- **Sink and passages.** The first feature of the embeddings marks the first token (id 0), each of eight more the
  tokens of one kind of passage; these features outweigh everything that layers add to them. A KV head has a weight
  from the first, and from that of one kind (another one in each layer), to the pair of features that turns slowest,
  where its queries have a bias. A passage is a run of 64 tokens; there is one in every 2K, and for each head in 16K.
- **Noise.** What is left of the random weights: queries are a quarter of what they were.

Scores, in nats: ``LOCAL`` and ``PASSAGE`` above the noise, times ``SHARPNESS`` from the first KV head to the last. At
head_dim 128 and eight KV heads a threshold of 0.9 keeps 23 % of the blocks of 4K and of 16K tokens: 4 % in the sharpest
head, 58 % in the least sharp one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flux_ext import BlockSparse
from flux_ext.models import attention_function
from flux_ext.operators.block_selection import select_blocks

LOCAL, SINK, PASSAGE = 9.0, 12.0, 8.0
SHARPNESS = (0.75, 1.15)
REACH = (64, 128, 256, 512)
"""Tokens over which the local part falls off, by KV head in turn."""
KINDS, RUN, RARITY = 8, 64, 2048
"""Kinds of passages, tokens of one, and tokens in which there is one."""
LOUD = 1e4
"""A marking feature of an embedding: far more than layers add to it."""


@torch.no_grad()
def give_structure(model: Any) -> None:
    """Changes the weights of a Llama that was made with ``attention_bias=True``."""
    config = model.config
    head_dim = config.head_dim
    turning = model.model.rotary_emb.inv_freq.cpu()  # [D / 2] radians per token, of features i and i + D / 2
    slow = len(turning) - 1
    embedding = model.get_input_embeddings().weight
    embedding[:, : 1 + KINDS] = 0
    for kind in range(1 + KINDS):  # tokens 0 (the sink), and 1 to KINDS
        embedding[kind] = 0
        embedding[kind, kind] = LOUD
    sharpness = torch.linspace(*SHARPNESS, config.num_key_value_heads).tolist()
    group = config.num_attention_heads // config.num_key_value_heads
    for index, layer in enumerate(model.model.layers):
        q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
        q.weight.mul_(0.25)
        q_bias, k_bias = q.bias.view(-1, group, head_dim), k.bias.view(-1, head_dim)
        k_weight = k.weight.view(-1, head_dim, config.hidden_size)
        k_weight[:, slow, : 1 + KINDS] = 0
        for h, sharp in enumerate(sharpness):
            reach = REACH[h % len(REACH)]
            band = ((turning >= 1 / reach) & (turning <= 1 / 16)).nonzero()[:, 0].to(q.bias.device)
            amplitude = (LOCAL * sharp * head_dim**0.5 / max(len(band), 1)) ** 0.5
            q_bias[h][:, band], k_bias[h][band] = amplitude, amplitude
            q_bias[h][:, slow] = 1.0
            for feature, score in ((0, SINK), (1 + (h + index) % KINDS, PASSAGE * sharp)):
                k_weight[h, slow, feature] = score * head_dim**0.5 / config.hidden_size**0.5  # a norm leaves its root


def structured_tokens(length: int, vocab: int, device: str) -> Tensor:
    """Token ids ``[1, length]``: the sink, then random ones with passages among them."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1 + KINDS, vocab, (length,), generator=g)
    for begin in range(RUN, length - RUN, RARITY):
        at = begin + int(torch.randint(max(min(RARITY, length - begin) - RUN, 1), (), generator=g))
        ids[at : at + RUN] = 1 + int(torch.randint(KINDS, (), generator=g))
    ids[0] = 0
    return ids[None].to(device)


@contextlib.contextmanager
def noting_blocks(pattern: BlockSparse, layers: int) -> Iterator[list[float]]:
    """A list that gets, of the first, middle and last of ``layers`` calls of attention, the share of the key blocks up
    to the diagonal that the pattern keeps, whatever the layers' routes are."""
    shares: list[float] = []
    calls = iter(range(1 << 30))
    attend = attention_function.operators.attention_after_prompt

    def note(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if next(calls) in (0, layers // 2, layers - 1):
            chosen = select_blocks(pattern, q, k)
            every = select_blocks(BlockSparse(threshold=1.0, width=pattern.width), q[:, :, :1], k[:, :, :1])
            kept, possible = chosen.full_counts().double().mean(1), every.full_counts().double().mean(1)
            shares.append(float(kept.sum() / possible.sum()))
        return attend(q, k, *args, **kwargs)

    with mock.patch.object(attention_function.operators, "attention_after_prompt", note):
        yield shares
