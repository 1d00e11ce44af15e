"""A patched Hugging Face model and one batch, as the objectives see them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import patching
from ..sequence_parallel import SequenceGroup
from ..transformers_seam import KEEP_LOGITS, kept_logits
from .data import IGNORED
from .distributed import Agree, alone
from .objective import Policy
from .sequence_parallel import own_columns, part_of

_OURS = ("labels", "task_ids", "prompt_lengths")
"""Columns of a batch that are no arguments of the model."""


RUN_TOKENS = 16_384
"""A GPU that is asked for fewer is idle in part: flips of several layers then run together, though all but the first
run some layers twice."""


class PatchedModel:
    """The losses of one batch under any routes: a :class:`~.objective.RoutedModel`.

    :meth:`loss_again`, which runs some sequences a second time with one layer routed otherwise, starts at that layer:
    :meth:`loss` has kept the layer's input for them (together no more than one layer's hidden states per flip).

    Args:
        model: the patched model, as wrapped for training.
        inputs: a batch of :class:`~.data.PaddedCollator` or :class:`~.data.PackedCollator`.
        num_layers, num_heads: routed layers, and decisions per layer.
        layers: the model's own index of each routed layer.
        agree: where a forward needs all processes (FSDP), so that all must make as many: tells the most that any of
            them is going to make.
        group: who shares the batch's sequences with this process; None: nobody.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_layers: int,
        num_heads: int = 1,
        layers: Sequence[int] | None = None,
        agree: Agree = alone,
        group: SequenceGroup | None = None,
    ) -> None:
        self.model, self.inputs, self.agree, self.group = model, inputs, agree, group
        self.num_layers, self.num_heads = num_layers, num_heads
        self._own = patching.unwrap_parallel(model)
        self._index = list(range(num_layers)) if layers is None else list(layers)
        self._blocks = patching.decoder_layers(model)
        self._kept: dict[int, Tensor] = {}
        self._spare = 0

    @property
    def run_size(self) -> int:
        """How many sequences :meth:`loss_again` should be asked for at once, at least."""
        tokens: Tensor = self.inputs["input_ids"]
        return max(1, RUN_TOKENS * len(self.inputs["task_ids"]) // tokens.numel()) if tokens.is_cuda else 1

    def loss(self, policy: Policy, keep: Mapping[int, Tensor] | None = None) -> Tensor:
        """The loss of each sequence ``[B]``, nats per answer token."""
        self._kept = {}
        self._spare = self.agree(len(keep or {})) - len(keep or {})
        with contextlib.ExitStack() as stack:
            stack.enter_context(patching.policy(self._own, policy))
            for layer, rows in (keep or {}).items():
                block = self._blocks[self._index[layer]]
                stack.enter_context(_before(block, self._keeper(layer, rows)))
            return losses(self.model, self.inputs, self.group)

    def loss_again(self, policy: Policy, layer: int, rows: Tensor) -> Tensor:
        """The losses ``[len(rows)]`` of these sequences, run from the layer on whose input was kept."""
        if not len(rows):
            self._pass()
            return rows.new_zeros(0, dtype=torch.float32)
        inputs = take(self.inputs, rows)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            stack.enter_context(patching.policy(self._own, policy))
            if layer in self._kept:
                first, hidden = self._index[layer], self._kept.pop(layer)
                for block in self._blocks[:first]:
                    stack.enter_context(_skipped(block))
                stack.enter_context(_before(self._blocks[first], lambda _: hidden))
            # Not through the wrapper: nothing here has a gradient to be reduced.
            return losses(self._own, inputs, self.group)

    def keep_step(self) -> None:
        """After the flips of a batch: takes part in those of processes that have more."""
        while self._spare > 0:
            self._spare -= 1
            self._pass()

    def _pass(self) -> None:
        """A forward through no layer, for the other processes' sake."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for block in self._blocks:
                stack.enter_context(_skipped(block))
            losses(self._own, take(self.inputs, torch.zeros_like(self.inputs["task_ids"][:1])), self.group)

    def _keeper(self, layer: int, rows: Tensor) -> Callable[[Tensor], None]:
        def keep(hidden: Tensor) -> None:
            tokens = token_index(self.inputs, rows)
            hidden = hidden.detach()  # first: checkpointing recomputes the layer without this hook, and counts tensors
            self._kept[layer] = hidden[rows] if tokens is None else hidden[:, tokens]

        return keep


def losses(model: nn.Module, inputs: Mapping[str, Any], group: SequenceGroup | None = None) -> Tensor:
    """The mean cross-entropy of each sequence's answer, fp32 ``[B]``, nats per token.

    The routers decide from the prompts; logits are made for answers only.

    Args:
        model: a patched causal language model, wrapped or not.
        inputs: a batch of :class:`~.data.PaddedCollator` or :class:`~.data.PackedCollator`.
        group: the processes that share it, all of which have the whole of ``inputs`` and get all losses; None: this
            one alone.

    Raises:
        ValueError: a sequence has no answer; see :func:`answered`.
    """
    counts = answer_lengths(inputs)
    if not bool(counts.all()):
        rows = (counts == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"labels must leave an answer token in every sequence, {rows} of {len(counts)} have none")
    targets = _targets(inputs)
    columns = kept = (targets != IGNORED).any(0).nonzero()[:, 0]  # the logits at i predict the token at i + 1
    if group is not None:
        columns, kept = own_columns(columns, inputs["labels"].shape[1], group)
    logits = kept_logits(model, run(model, inputs, group, **{KEEP_LOGITS: kept}), len(columns))  # [B, K, V]
    targets = targets[:, columns]
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    if group is not None:
        return group.sum(nats.view_as(targets).sum(1)) / counts
    if inputs.get("cu_seq_lens_q") is None:
        return nats.view_as(targets).sum(1) / counts
    return nats.new_zeros(len(counts)).index_add(0, _sequence_of(columns, inputs), nats) / counts


def run(model: nn.Module, inputs: Mapping[str, Any], group: SequenceGroup | None = None, **options: Any) -> Any:
    """The model's output for a batch, without a cache; the routers decide from the prompts.

    Args:
        group: the processes that share it; the output is then of this one's part of the tokens.
        options: further keywords of the model's forward.
    """
    arguments, shard = {k: v for k, v in inputs.items() if k not in _OURS}, None
    if group is not None:
        arguments, shard = part_of(inputs, group)
    with patching.prompt_lengths(model, inputs["prompt_lengths"]), patching.shard(model, shard):
        return model(**arguments, use_cache=False, **options)


def answer_lengths(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens of each sequence that have a label and something before them to be predicted from, int64 ``[B]``."""
    counted = (_targets(inputs) != IGNORED).long()
    bounds = inputs.get("cu_seq_lens_q")
    if bounds is None:
        return counted.sum(1)
    columns = torch.arange(counted.shape[1], device=counted.device)
    return counted.new_zeros(len(bounds) - 1).index_add(0, _sequence_of(columns, inputs), counted[0])


def _targets(inputs: Mapping[str, Any]) -> Tensor:
    """``labels[:, 1:]``, what the logits at ``[:, :-1]`` predict; no packed sequence predicts the next one's start."""
    targets: Tensor = inputs["labels"][:, 1:]
    bounds = inputs.get("cu_seq_lens_q")
    return targets if bounds is None else targets.index_fill(1, bounds[1:-1].long() - 1, IGNORED)


def _sequence_of(columns: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Which sequence of a packed row the targets ``labels[:, 1:]`` in these columns belong to, int64."""
    bounds = inputs["cu_seq_lens_q"]
    return torch.searchsorted(bounds[1:].contiguous(), (columns + 1).to(bounds.dtype), right=True)


def answered(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch without the sequences all of whose labels are masked: there is nothing to learn from them.

    Raises:
        ValueError: none is left.
    """
    counts = answer_lengths(inputs)
    if bool(counts.all()):
        return inputs
    rows = counts.nonzero()[:, 0]
    if not len(rows):
        raise ValueError(
            f"labels are masked ({IGNORED}) in all {len(counts)} sequences of the batch: at least one must have an "
            "answer token (does the collator cut answers off?)"
        )
    return take(inputs, rows)


def take(inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """The batch of these sequences (int64 ``rows``) alone, padded or packed like the whole."""
    tokens = token_index(inputs, rows)
    if tokens is None:
        return {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    lengths = inputs["cu_seq_lens_q"].diff()[rows]
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    part: dict[str, Any] = {k: inputs[k][:, tokens] for k in ("input_ids", "labels", "position_ids")}
    part |= {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return part | {k: inputs[k][rows] for k in ("task_ids", "prompt_lengths")}


def token_index(inputs: Mapping[str, Any], rows: Tensor) -> Tensor | None:
    """Which tokens of a packed row belong to these sequences, int64; None for padded batches."""
    bounds = inputs.get("cu_seq_lens_q")
    if bounds is None:
        return None
    ends = bounds.tolist()
    spans = [torch.arange(ends[r], ends[r + 1], device=bounds.device) for r in rows.tolist()]
    return torch.cat(spans)


@contextlib.contextmanager
def _before(block: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Shows ``change`` the hidden states that go into a decoder layer; what it returns takes their place."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        new = change(hidden)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _skipped(block: nn.Module) -> Iterator[None]:
    """Lets a decoder layer pass its input through; its own ``forward`` and hooks come back afterwards."""
    own = block.__dict__.get("forward")
    block.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
