"""A routed model, slow and obvious: the stock model over a whole sequence at once, under masks that say who sees what.

No cache, no padding, no batch: one sequence, of which the prompt and the tokens after it are told apart.
"""

import itertools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from flux_ext import FluxConfig
from flux_ext.operators.block_selection import select_blocks
from flux_ext.operators.patterns import BlockSparse, dense_mask

NUMBERS = itertools.count()


class MaskedTwin:
    """Logits and greedy tokens of a stock model under given routes.

    Args:
        model: a stock model; it is left with another attention implementation.
        config: the modes.
        route: ``[L, Hkv]``, 0 full and 1 sparse; or weights of sparse between.
        chunk: tokens of a chunk where the prompt is fed in chunks.
    """

    def __init__(self, model: Any, config: FluxConfig, route: Tensor, chunk: int | None = None) -> None:
        self.model, self.config, self.route, self.chunk = model, config, route, chunk
        name = f"masked_twin_{next(NUMBERS)}"
        AttentionInterface.register(name, self.attend)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
        model.set_attn_implementation(name)

    def visible(self, sparse: bool, q: Tensor, k: Tensor) -> Tensor:
        """Of one KV head, queries ``[S, G, D]`` and keys ``[S, D]``: the mask ``[S, S]``."""
        length, config = len(k), self.config
        mask = dense_mask(config.decode_pattern() if sparse else FluxConfig().full_pattern(), length, length)
        ends = [*range(0, self.prompt, self.chunk or self.prompt), self.prompt]
        for begin, end in pairwise(ends):
            pattern = config.sparse_pattern() if sparse else config.full_pattern()
            if begin > 0 and end - begin == 1:
                continue  # a single token after others is a decode step
            if isinstance(pattern, BlockSparse) and pattern.threshold is not None:
                pattern = select_blocks(pattern, q[None, begin:end], k[None, :end, None])
            mask[begin:end] = False
            mask[begin:end, :end] = dense_mask(pattern, end - begin, end).view(end - begin, end)
        return mask

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        out = torch.zeros_like(q)
        group = q.shape[1] // k.shape[1]
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            weight = float(self.route[module.layer_idx, h])
            for sparse, share in ((False, 1 - weight), (True, weight)):
                if share:
                    mask = self.visible(sparse, q[0, heads].transpose(0, 1), k[0, h])
                    scores = (q[0, heads] @ k[0, h].T * scaling).masked_fill(~mask, -torch.inf)
                    out[0, heads] += share * (scores.softmax(-1) @ v[0, h])
        return out.transpose(1, 2).contiguous(), None

    def logits(self, tokens: Sequence[int], prompt: int) -> Tensor:
        """``[S, V]`` of a sequence whose first ``prompt`` tokens are its prompt."""
        self.prompt = prompt
        with torch.no_grad():
            found: Tensor = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return found

    def continues(self, tokens: Sequence[int], prompt: int) -> list[int]:
        """The greedy token at the end of the prompt and at each token after it: where they are the ones that follow
        there, all of them are what this model generates. One recomputation serves, as tokens see none behind them."""
        found: list[int] = self.logits(tokens, prompt)[prompt - 1 :].argmax(-1).tolist()
        return found
