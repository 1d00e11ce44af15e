"""Scores a patched model on examples: dense, all sparse, or as its routers decide.

Every example is scored the way it would be used: the prompt is read into a cache (the routers decide from
the prompt alone, sparse layers drop what they cannot see), then the answer is generated or continued from
that cache. Answers are compared by token: decoding may lose a space.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..examples import Example, Tokenizer, tokenized
from ..models import patching
from ..transformers_seam import CACHE, KEEP_LOGITS, cache_of, kept_logits

Mode = Literal["dense", "sparse", "routed"]
MODES: tuple[Mode, ...] = ("dense", "sparse", "routed")
_ROUTES = {"dense": "full", "sparse": "sparse"}


@dataclass(frozen=True)
class Score:
    """What one ``task`` gave in one ``mode``, over so many ``examples`` and in so many ``seconds``."""

    task: str
    mode: Mode
    examples: int
    accuracy: float
    """Share of generated answers that are right to the last token; NaN where none were generated."""
    bits_per_byte: float
    """Code length of the answers' UTF-8 bytes; NaN where it was not asked for."""
    sparsity: float
    """Mean share of sparse attention over layers and heads."""
    kv_bytes: float
    """Bytes of keys and values kept of the prompt (generated: and of the answer), per example."""
    full_share: tuple[float, ...]
    """Share of full attention of each routed layer."""
    seconds: float


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    modes: Sequence[Mode] = MODES,
    *,
    generate: bool | Mapping[str, bool] = True,
    likelihood: bool | Mapping[str, bool] = True,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Score]:
    """Scores each task of the examples in each mode.

    Args:
        model: a patched causal language model.
        tokenizer: its tokenizer.
        examples: prompts and answers; batches hold one task each and may be ragged.
        modes: ``"dense"`` (all full), ``"sparse"`` (all sparse), ``"routed"``.
        generate: whether answers are generated greedily and compared (as many tokens as the right answer
            has), for all tasks or by task. Otherwise ``accuracy`` is NaN.
        likelihood: whether the right answers' code length is measured, likewise. Otherwise ``bits_per_byte`` is NaN.
        batch_size: examples at a time.
        progress: show a progress bar.

    Returns:
        One :class:`Score` per mode and task, modes first.

    The model is in evaluation mode meanwhile; afterwards, also after an error, each of its modules is in the mode
    it was found in.

    Raises:
        ValueError: there are no examples, one has no tokens, a mode is unknown, a task is neither to be generated nor
            measured, or the model is not patched.
    """
    if not examples:
        raise ValueError("examples must not be empty")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"modes must be among {', '.join(MODES)}, got {unknown[0]!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    patching.get_routers(model)
    tasks = sorted({e.task for e in examples})
    generates, measures = (
        {t: x.get(t, False) if isinstance(x, Mapping) else x for t in tasks} for x in (generate, likelihood)
    )
    for task in tasks:
        if not generates[task] and not measures[task]:
            raise ValueError(f"generate or likelihood must be True for the task {task!r}")
    scores = []
    with (
        patching.evaluation_mode(model),
        torch.inference_mode(),
        tqdm(total=len(examples) * len(modes), disable=not progress, unit="example") as bar,
    ):
        for mode in modes:
            for task in tasks:
                bar.set_description(f"evaluating {mode} on {task}")
                chosen = [e for e in examples if e.task == task]
                scores.append(_score(model, tokenizer, chosen, mode, generates[task], measures[task], batch_size, bar))
    return scores


def _score(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: list[Example],
    mode: Mode,
    generate: bool,
    likelihood: bool,
    batch_size: int,
    bar: tqdm,
) -> Score:
    start = time.perf_counter()
    right, nats, kv_bytes, sparse = 0, 0.0, 0.0, []
    with patching.routes(model, _ROUTES[mode]) if mode in _ROUTES else contextlib.nullcontext():
        for batch in _batches(examples, batch_size):
            prompts, answers = zip(*(tokenized(e, tokenizer) for e in batch), strict=True)
            prompt, mask = _pad_left(prompts, model.device)  # type: ignore[arg-type]
            if generate:
                new, kept, routes = _generate_answers(model, tokenizer, prompt, mask, answers)
                right += sum(row[: len(a)] == a for row, a in zip(new, answers, strict=True))
            if likelihood:
                answer_nats, kept, routes = _measure_answers(model, prompt, mask, answers)
                nats += answer_nats
            kv_bytes += kept
            sparse.append(routes.float().cpu())
            bar.update(len(batch))
    route = torch.cat(sparse)  # [N, L, Hkv]
    answer_bytes = sum(len(e.answer.encode()) for e in examples)
    return Score(
        task=examples[0].task,
        mode=mode,
        examples=len(examples),
        accuracy=right / len(examples) if generate else math.nan,
        bits_per_byte=nats / math.log(2) / answer_bytes if likelihood else math.nan,
        sparsity=route.mean().item(),
        kv_bytes=kv_bytes / len(examples),
        full_share=tuple((1 - route).mean((0, 2)).tolist()),
        seconds=time.perf_counter() - start,
    )


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Examples of like length together; the padding of a batch is computed for nothing."""
    ordered = sorted(examples, key=lambda e: len(e.prompt))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows and their mask, int64 ``[B, S]``."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(r)) + [*r] for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return tokens, mask


def _measure_answers(
    model: nn.Module, prompt: Tensor, mask: Tensor, answers: Sequence[Sequence[int]]
) -> tuple[float, int, Tensor]:
    """Nats of the answers, bytes that the cache kept of the prompts, and the routes ``[B, L, Hkv]``."""
    out = model(prompt, attention_mask=mask, use_cache=True, **{KEEP_LOGITS: 1})
    cache = cache_of(out)
    kept, routes = cache.nbytes(), cache.routes.clone()
    longest = max(map(len, answers))
    tokens = torch.tensor([[*a] + [0] * (longest - len(a)) for a in answers], device=prompt.device)
    counted = torch.tensor([[1.0] * len(a) + [0.0] * (longest - len(a)) for a in answers], device=prompt.device)
    logits = kept_logits(model, out, 1)
    if longest > 1:
        fed = tokens[:, :-1]
        grown = torch.cat([mask, torch.ones_like(fed)], 1)
        more = model(fed, attention_mask=grown, use_cache=True, **{CACHE: cache}).logits
        logits = torch.cat([logits, more], 1)
    nats = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    return float((nats * counted.flatten()).sum()), kept, routes


def _generate_answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: Tensor,
    mask: Tensor,
    answers: Sequence[Sequence[int]],
) -> tuple[list[list[int]], int, Tensor]:
    """Tokens of greedy continuations as long as the longest answer, bytes in the cache at the end, and the routes."""
    out = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=mask,
        max_new_tokens=max(map(len, answers)),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        return_dict_in_generate=True,
    )
    cache = cache_of(out)
    return out.sequences[:, prompt.shape[1] :].tolist(), cache.nbytes(), cache.routes


def format_table(scores: Sequence[Score]) -> str:
    """The scores as a plain text table, a row per task and mode."""
    head = ("task", "mode", "accuracy", "bits/byte", "sparsity", "KV bytes", "seconds")
    rows = [
        (
            s.task,
            s.mode,
            "-" if math.isnan(s.accuracy) else f"{s.accuracy:.3f}",
            "-" if math.isnan(s.bits_per_byte) else f"{s.bits_per_byte:.3f}",
            f"{s.sparsity:.3f}",
            f"{s.kv_bytes:,.0f}",
            f"{s.seconds:.1f}",
        )
        for s in sorted(scores, key=lambda s: (s.task, MODES.index(s.mode)))
    ]
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])
