"""What all layers share in one forward of a patched model: the sequences' bounds and the decisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sequence_parallel import Shard
from .transformers_seam import FULL_MASK

Policy = Callable[[int, Tensor], Tensor]


class Decision(NamedTuple):
    """Of one layer: route ``[B, Hkv]`` and logits ``[B, 2]`` or ``[B, Hkv, 2]`` (None: an earlier forward decided)."""

    logits: Tensor | None
    route: Tensor


@dataclass
class Held:
    """What the first forward of a ``generate`` without a cache leaves for the others, which have the prompt again.

    Attributes:
        routes: those that were decided, by place among the routed layers.
        prompt_len: slots of the prompt; None: no forward has run.
    """

    routes: dict[int, Tensor] = field(default_factory=dict)
    prompt_len: int | None = None


class Unstored:
    """What the attention module that ran last has left to be stored: a cache layer and its prompt; None: nothing. An
    object of its own: copies of a context have the same one, however they are made."""

    left: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = None


@dataclass
class ForwardContext:
    """The context of one forward: what all layers of the model share, read off the decoder's arguments once.

    Attributes:
        policy: chooses the routes instead of the routers' argmax; None: the argmax does.
        dense: whether the full mode is full attention whatever the configuration says. Here, as the policy is, so that
            a layer that checkpointing recomputes, in another thread or later, attends as it did.
        seq_start, seq_end: int32 ``[B]``, rows ``[start, end)`` of this forward's tensors belong to each sequence;
            None: all do. Of a step over a static cache, ``seq_end`` is 1 where a sequence has a token, 0 where it has
            none, and -1 where the mask contradicts the cache.
        cu_seqlens: int32 ``[n + 1]``, bounds of ``n`` sequences packed into one row; None: they are not packed.
        mask: the padding mask, bool ``[B, seen + new slots]``; None: there is no padding.
        seen: slots that the cache had seen before this forward, padding included.
        prompt_len: how many of this forward's slots are the prompt, from which routers decide; None: all. Assisted
            decoding appends candidates to it, ``generate`` without a cache the answer so far.
        prompt_lengths: integers ``[B]``, the same for each sequence, padding not counted; None: all. Training appends
            the answers.
        held: what an earlier forward of the same ``generate`` decided, where there is no cache to keep it. Empty in the
            first forward, which fills it.
        unstored: a prompt, to be stored when the next attention module begins. Here, so that what a forward leaves is
            its own, and goes with it.
        decisions: what was decided in this forward, by place among the routed layers; filled layer by layer.
        shard: this process's part of sequences that several processes share, to which ``seq_start``, ``seq_end`` and
            ``mask``, being of all slots, do not apply; None: it has all tokens.
    """

    policy: Policy | None = None
    dense: bool = False
    seq_start: Tensor | None = None
    seq_end: Tensor | None = None
    cu_seqlens: Tensor | None = None
    mask: Tensor | None = None
    seen: int = 0
    prompt_len: int | None = None
    held: Held | None = None
    prompt_lengths: Tensor | None = None
    unstored: Unstored = field(default_factory=lambda: Unstored())  # a graph cannot hold the class as a factory
    decisions: dict[int, Decision] = field(default_factory=dict)
    shard: Shard | None = None
    _host: list[Tensor] = field(default_factory=list)  # the mask on the CPU, once; shared by copies on other devices

    def to(self, device: Any, *args: Any, **kwargs: Any) -> ForwardContext:
        """The same on another device; accelerate calls this where a model is spread over several."""
        names = ("seq_start", "seq_end", "cu_seqlens", "mask", "prompt_lengths")
        return replace(self, **{n: t.to(device) for n in names if (t := getattr(self, n)) is not None})

    def store_prompt(self) -> None:
        """Stores what is ``unstored``."""
        left, self.unstored.left = self.unstored.left, None
        if left is not None:
            cache_layer, prompt = left
            cache_layer.store_prompt(*prompt, self)

    def host_mask(self) -> Tensor | None:
        """``mask`` on the CPU, read from the device once per forward."""
        if self.mask is not None and not self._host:
            self._host.append(self.mask.cpu())
        return self._host[0] if self._host else None

    def prompts(self, x: Tensor, pool_size: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What of states ``[B, S, H, D]`` routers may see, and the rows ``[begin, end)`` of each sequence in it.

        Packed sequences are ``[T, H, D]``. Of sequences that several processes share, it is the ``pool_size`` tokens at
        either end of each prompt.
        """
        begin, end = self._prompt_rows(x.device)
        if self.cu_seqlens is not None:
            x = x[0]
        if self.shard is not None:
            return self.shard.ends(x, begin, end, pool_size)
        if self.prompt_len is not None and self.prompt_len < x.shape[1]:
            x = x[:, : self.prompt_len]
            end = None if end is None else end.clamp(max=self.prompt_len)
        return x, begin, end

    def _prompt_rows(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """int32 ``[B]`` each, the rows of each sequence's prompt, but for ``prompt_len``; None: from the first, to the
        last."""
        begin, end = self.seq_start, self.seq_end
        if self.cu_seqlens is not None:
            begin, end = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        if self.prompt_lengths is not None:
            lengths = self.prompt_lengths.to(device, torch.int32)
            begin = torch.zeros_like(lengths) if begin is None else begin
            end = begin + lengths
        return begin, end

    def prompt_end(self, x: Tensor) -> Tensor | None:
        """int32 ``[B]``, the row behind each sequence's prompt, of states ``[B, S, H, D]``; None: there are only
        prompts."""
        if self.prompt_lengths is None and (self.prompt_len is None or self.prompt_len >= x.shape[1]):
            return None
        last = x.shape[1] if self.prompt_len is None else min(self.prompt_len, x.shape[1])
        _, end = self._prompt_rows(x.device)
        if end is None:
            return torch.full((x.shape[0],), last, dtype=torch.int32, device=x.device)
        return end.clamp(max=last)

    def q_bounds(self, q_len: int) -> tuple[Tensor | None, Tensor | None]:
        """int32 ``[B]`` bounds of ``q_len`` queries per sequence, as attention takes them.

        A single query has none: what it gives where it is padding is never used, so nothing need be set to 0.
        """
        return (None, None) if q_len == 1 else (self.seq_start, self.seq_end)

    def kv_bounds(self, kv_len: int) -> tuple[Tensor | None, Tensor | None]:
        """int32 ``[B]`` bounds of the tokens among the last ``kv_len`` slots, for caches that keep padding."""
        return (None, None) if self.mask is None else span(self.mask[:, -kv_len:])

    def has_holes(self, kv_len: int) -> bool:
        """Whether padding may lie between tokens among the last ``kv_len`` slots, as it does after several turns. While
        compiling the mask cannot be looked at: then the answer is yes wherever there was an earlier forward."""
        if self.mask is None or not self.seen:
            return False
        if torch.compiler.is_compiling():
            return True
        mask = self.host_mask()
        assert mask is not None
        mask = mask[:, -kv_len:]
        return bool((mask[:, 1:] & ~mask[:, :-1]).sum(1).add(mask[:, 0]).gt(1).any())


def span(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First valid row and one past the last, int32 ``[B]`` each, of a padding mask ``[B, S]``.

    Raises:
        ValueError: the mask has a hole. Checked on the CPU only: elsewhere it would wait for the device.
    """
    start = mask.to(torch.int32).argmax(1).to(torch.int32)
    end = start + mask.sum(1, dtype=torch.int32)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = torch.arange(mask.shape[1], device=mask.device)  # which need not be the default device
        wrong = (mask != ((rows >= start[:, None]) & (rows < end[:, None]))).any(1)
        if wrong.any():
            raise ValueError(
                f"attention_mask has a hole in sequence {int(wrong.int().argmax())}: padding must lie before or after "
                "the tokens of a forward, not between them"
            )
    return start, end


def read_part(
    policy: Policy | None, kwargs: dict[str, Any], tokens: Tensor, cache: Any, shard: Shard
) -> ForwardContext:
    """As :func:`read_forward`, of a forward over this process's part of the sequences.

    Raises:
        ValueError: there are fewer or more tokens than its part, a cache, a mask beside that of the shard, or packing.
    """
    own = shard.part.stop - shard.part.start
    if tokens.shape[1] != own:
        raise ValueError(f"of {shard.length} slots this process must have {own}, got {tokens.shape[1]} tokens")
    if cache is not None or kwargs.get("use_cache"):
        raise ValueError("sequences that several processes share have no cache: pass use_cache=False")
    for name in ("attention_mask", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must be left out where several processes share sequences")
    start, end = (None, None) if shard.mask is None else span(shard.mask)
    return ForwardContext(policy, seq_start=start, seq_end=end, mask=shard.mask, shard=shard)


def read_forward(policy: Policy | None, kwargs: dict[str, Any], tokens: Tensor, cache: Any) -> ForwardContext:
    """The context of a decoder's forward, from its keyword arguments.

    Sequences packed into one row are found by ``cu_seq_lens_q``, or by position_ids that restart. The latter waits
    for the device. Without a cache, of one row, it breaks a graph: a model compiled as one needs ``cu_seq_lens_q``, or
    a mask. Elsewhere, where positions must not restart, a graph checks them as it runs: they are replaced in ``kwargs``
    by what the check gives.

    tokens: ``input_ids [B, S]`` or ``inputs_embeds [B, S, H]``.

    Raises:
        ValueError: a mask or positions of a wrong shape, a mask with a hole, or packing that cannot be honoured: beside
            padding, in several rows, or with a cache.
    """
    batch_size, q_len = tokens.shape[:2]
    packed = kwargs.get("cu_seq_lens_q") is not None
    if packed and batch_size > 1:
        raise ValueError(f"cu_seq_lens_q bounds sequences packed into one row, got a batch of {batch_size} rows")
    if packed and cache is not None:
        raise ValueError("cu_seq_lens_q: sequences packed into one row have no cache, leave it out")
    seen = 0 if cache is None else cache.get_seq_length()
    known = not isinstance(seen, Tensor)  # how many slots a static cache has seen, only the device knows
    positions = kwargs.get("position_ids")
    if positions is not None and positions.dim() == 2:
        rows, columns = positions.shape
        if rows not in (1, batch_size) or columns != q_len:
            raise ValueError(f"position_ids must be [{batch_size} or 1, {q_len}], got {list(positions.shape)}")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):  # prepared per layer type by generate; ours are all the same padding mask
        if FULL_MASK not in mask:
            raise ValueError(f"attention_mask by layer type lacks {FULL_MASK!r}, it has {sorted(mask)}")
        mask = mask[FULL_MASK]
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(f"attention_mask must be a padding mask [B, tokens], got shape {list(mask.shape)}")
        least = seen + q_len if known else q_len
        if mask.shape[0] != batch_size or mask.shape[1] < least:
            raise ValueError(
                f"attention_mask must be [{batch_size}, >= {least}] for this input (the tokens that the cache has seen "
                f"and the new ones), got {list(mask.shape)}"
            )
        mask = mask.to(device=tokens.device, dtype=torch.bool)
        if packed:
            if torch.compiler.is_compiling():
                raise ValueError("attention_mask beside cu_seq_lens_q cannot be checked while compiling: leave it out")
            if not bool(mask.all()):
                raise ValueError("attention_mask has padding beside cu_seq_lens_q: leave one of them out")
            return ForwardContext(policy, cu_seqlens=packed_bounds(kwargs))
        if not known:
            start = torch.zeros_like(mask[:, 0], dtype=torch.int32)
            return ForwardContext(policy, seq_start=start, seq_end=cache.active(mask), mask=mask)
        mask = mask[:, : seen + q_len]
        if not torch.compiler.is_compiling() and _hides_nothing(mask, cache):
            return ForwardContext(policy)
        start, end = span(mask[:, seen:])
        return ForwardContext(policy, seq_start=start, seq_end=end, mask=mask, seen=seen)
    if packed:
        return ForwardContext(policy, cu_seqlens=packed_bounds(kwargs))
    if positions is None or positions.dim() != 2 or not known or seen > 0:
        return ForwardContext(policy)
    if torch.compiler.is_compiling() and (cache is not None or batch_size > 1):
        kwargs["position_ids"] = check_positions(positions, cache is not None)
        return ForwardContext(policy)
    return ForwardContext(policy, cu_seqlens=restarts(positions, q_len, batch_size, cache is not None))


def _hides_nothing(mask: Tensor, cache: Any) -> bool:
    """Whether a mask, as ``generate`` makes one for every prompt, has no padding, now or earlier. Then no bounds are to
    be read from the device, and attention may know all lengths.

    Asked only where the cache keeps books on the host, and would read the mask anyway.
    """
    history = getattr(cache, "history", None)
    if history is None or not history.cache_layers or history.valid is not None:
        return False
    return bool(mask.all())


def packed_bounds(kwargs: dict[str, Any]) -> Tensor:
    """``cu_seq_lens_q`` as int32 ``[n + 1]``."""
    return kwargs["cu_seq_lens_q"].reshape(-1).to(torch.int32)


@torch.compiler.disable(
    reason="whether position_ids restart, i.e. sequences are packed, cannot be seen inside a graph: for fullgraph=True "
    "leave position_ids out, or give cu_seq_lens_q or an attention_mask"
)
def restarts(positions: Tensor, q_len: int, batch_size: int, cached: bool) -> Tensor | None:
    """int32 ``[n + 1]`` where position_ids ``[B or 1, S]`` say that the row holds several sequences. Waits for the
    device.

    Raises:
        ValueError: they restart in a batch of several rows, or where there is a cache.
    """
    steps = positions[:, 1:] != positions[:, :-1] + 1
    if not bool(steps.any()):
        return None
    if cached or batch_size > 1:
        raise _restart_error(cached)
    inner = steps[0].nonzero()[:, 0] + 1
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), q_len)]).to(torch.int32)


def _restart_error(cached: bool) -> ValueError:
    where = "with a cache" if cached else "in a batch of several rows"
    return ValueError(
        f"position_ids restart {where}: pack sequences into one row without a cache, or give an attention_mask"
    )


# What it gives is used in place of the positions, so that the compiler keeps the call.
@torch.library.custom_op("flux_ext::check_positions", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def check_positions(positions: Tensor, cached: bool) -> Tensor:
    """:func:`restarts` where position_ids ``[B or 1, S]`` must not restart, as an operator: the check does not break a
    graph. Returns them."""
    if bool((positions[:, 1:] != positions[:, :-1] + 1).any()):
        raise _restart_error(cached)
    return positions.clone()


@check_positions.register_fake
def _(positions, cached):
    return torch.empty_like(positions)
