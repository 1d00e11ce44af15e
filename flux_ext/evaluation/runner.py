"""Scores a patched model on examples: dense, all full, all sparse, or as its routers decide.

Every example is scored the way it would be used: the prompt is read into a cache (the routers decide from
the prompt alone, sparse layers drop what they cannot see), then the answer is generated or continued from
that cache. Answers of the metric "tokens" are compared by token: decoding may lose a space. Those of all others are
compared as texts (``metrics.py``). A task may be scored without generating (``teacher_forced``): the right answer is
read at once, and what the model would have written at each place stands for what it writes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..examples import Example, Tokenizer, as_examples, tokenized
from ..models import patching
from ..transformers_seam import CACHE, KEEP_LOGITS, cache_of, kept_logits
from . import metrics
from .results import MODES, Mode, Result, ResultsFile, digest, modes_of


class DecodingTokenizer(Tokenizer, Protocol):
    """A tokenizer that also writes; any of Hugging Face's does."""

    def decode(self, tokens: list[int], /, *, skip_special_tokens: bool = False) -> object:
        """The text of ``tokens``, without the special ones where ``skip_special_tokens``."""


@dataclass(frozen=True)
class Score:
    """What one ``task`` gave in one ``mode``, over so many ``examples`` and in so many ``seconds``."""

    task: str
    mode: Mode
    examples: int
    accuracy: float
    """Mean score of the generated answers, by the examples' metric: with "tokens" the share that is right to the last
    token, with several expected answers the mean share of them that was found; NaN where none were generated."""
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
    tokenizer: DecodingTokenizer,
    examples: Iterable[Example | Mapping[str, Any]],
    modes: Sequence[Mode] | None = None,
    *,
    generate: bool | Mapping[str, bool] = True,
    likelihood: bool | Mapping[str, bool] = True,
    teacher_forced: Collection[str] = (),
    batch_size: int = 8,
    progress: bool = True,
    results: Path | None = None,
) -> list[Score]:
    """Scores each task of the examples in each mode.

    Args:
        model: a patched causal language model.
        tokenizer: its tokenizer.
        examples: prompts and answers, also as dicts of their columns; batches hold one task each and may be ragged.
            The examples of a task have the same metric.
        modes: ``"dense"`` (full attention, whatever the full mode is), ``"full"`` (every route full; refused where the
            full mode is full attention, as that is dense), ``"sparse"`` (every route sparse), ``"routed"``. None: all
            that the model has.
        generate: whether answers are generated greedily and compared, for all tasks or by task; never those whose
            metric is ``"likelihood"``. Otherwise ``accuracy`` is NaN.
        likelihood: whether the right answers' code length is measured, likewise. Otherwise ``bits_per_byte`` is NaN.
        teacher_forced: tasks whose answers are read and not generated, where ``generate`` says so: each token is the
            model's first choice behind the right ones before it. One forward instead of one per token; where there is
            one right answer and one way to write it, it is found if and only if it would be generated.
        batch_size: examples at a time.
        progress: show a progress bar, with the figures of the task so far.
        results: a file that keeps what every example gave (``results.py``). If it exists, with unfinished results of
            the same model, examples and options, the evaluation goes on from there.

    Returns:
        One :class:`Score` per mode and task, modes first.

    The model is in evaluation mode meanwhile; afterwards, also after an error, each of its modules is in the mode
    it was found in.

    Raises:
        ValueError: there are no examples, one has no tokens, the model is not patched or lacks a mode, a task is
            neither to be generated nor measured or has several metrics, or ``results`` is something else.
    """
    examples = as_examples(examples)
    if not examples:
        raise ValueError("examples must not be empty")
    known_modes = modes_of(model)
    modes = known_modes if modes is None else modes
    if unknown := [mode for mode in modes if mode not in known_modes]:
        why = ": every route full is dense here, as FluxConfig.full is 'full'" if unknown[0] == "full" else ""
        raise ValueError(f"modes must be among {', '.join(known_modes)}, got {unknown[0]!r}{why}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    tasks = sorted({e.task for e in examples})
    generates, measures = (
        {t: x.get(t, False) if isinstance(x, Mapping) else x for t in tasks} for x in (generate, likelihood)
    )
    forces: dict[str, bool] = {}
    for task in tasks:
        kinds = sorted({e.metric for e in examples if e.task == task})
        if len(kinds) > 1:
            raise ValueError(f"examples of the task {task!r} must have one metric, got {' and '.join(kinds)}")
        generates[task] &= kinds != ["likelihood"]
        forces[task] = generates[task] and task in teacher_forced
        if not generates[task] and not measures[task]:
            raise ValueError(f"generate or likelihood must be True for the task {task!r}")
    store = None
    if results is not None:
        options: dict[str, object] = {
            "modes": tuple(modes),
            "generate": generates,
            "likelihood": measures,
            "batch_size": batch_size,
        }
        if forced := sorted(set(teacher_forced) & set(tasks)):
            options["teacher_forced"] = forced
        if "dense" in modes and "full" in known_modes:  # once scored by the full mode: those are other results
            options["dense"] = "full attention"
        store = ResultsFile(results, digest(model, tokenizer, examples, options))
    known = {(r.mode, r.example): r for r in store.results} if store else {}
    scores = []
    with (
        patching.evaluation_mode(model),
        torch.inference_mode(),
        tqdm(total=len(examples) * len(modes), disable=not progress, unit="example") as bar,
    ):
        for mode in modes:
            for task in tasks:
                bar.set_description(f"evaluating {mode} on {task}")
                found: list[Result] = []
                for batch in _batches(examples, task, batch_size):
                    if all((mode, i) in known for i in batch):
                        new = [known[mode, i] for i in batch]
                    else:
                        how = (generates[task], measures[task], forces[task])
                        new = _results(model, tokenizer, examples, batch, mode, *how)
                        if store:
                            store.add(new)
                    found += new
                    scored = _score(examples, task, mode, found)
                    bar.set_postfix_str(_figures(scored), refresh=False)
                    bar.update(len(batch))
                scores.append(scored)
    if store:
        store.finish()
    return scores


def _batches(examples: Sequence[Example], task: str, size: int) -> Iterator[list[int]]:
    """Positions of a task's examples, those of like length together; padding is computed for nothing."""
    chosen = [i for i, e in enumerate(examples) if e.task == task]
    chosen.sort(key=lambda i: len(examples[i].prompt))
    for first in range(0, len(chosen), size):
        yield chosen[first : first + size]


def _score(examples: Sequence[Example], task: str, mode: Mode, results: Sequence[Result]) -> Score:
    """What the results of one task come to."""
    count = len(results)
    points = [r.score for r in results if r.score is not None]
    nats = [r.nats for r in results if r.nats is not None]
    answer_bytes = sum(len(examples[r.example].answer.encode()) for r in results)
    full_share = torch.tensor([r.full_share for r in results], dtype=torch.float64).mean(0)
    return Score(
        task=task,
        mode=mode,
        examples=count,
        accuracy=sum(points) / count if points else math.nan,
        bits_per_byte=sum(nats) / math.log(2) / answer_bytes if nats else math.nan,
        sparsity=1 - full_share.mean().item(),
        kv_bytes=sum(r.kv_bytes for r in results) / count,
        full_share=tuple(full_share.tolist()),
        seconds=sum(r.seconds for r in results),
    )


def _figures(score: Score) -> str:
    """The figures of a score that are not NaN."""
    texts = [] if math.isnan(score.accuracy) else [f"accuracy {score.accuracy:.3f}"]
    texts += [] if math.isnan(score.bits_per_byte) else [f"bits/byte {score.bits_per_byte:.3f}"]
    return ", ".join([*texts, f"sparsity {score.sparsity:.2f}"])


def _results(
    model: nn.Module,
    tokenizer: DecodingTokenizer,
    examples: Sequence[Example],
    batch: Sequence[int],
    mode: Mode,
    generate: bool,
    likelihood: bool,
    forced: bool,
) -> list[Result]:
    """What the examples of one batch, given by their positions, give."""
    start = time.perf_counter()
    chosen = [examples[i] for i in batch]
    prompts, answers = zip(*(tokenized(e, tokenizer) for e in chosen), strict=True)
    prompt, mask = _pad_left(prompts, model.device)  # type: ignore[arg-type]
    points: Sequence[float | None] = [None] * len(batch)
    said: Sequence[str | None] = [None] * len(batch)
    nats: Sequence[float | None] = [None] * len(batch)
    with _attending(model, mode):
        new: Sequence[Sequence[int]] | None = None
        if generate and not forced:
            lengths = [
                len(a) if e.metric == "tokens" else e.max_new_tokens or len(a)
                for e, a in zip(chosen, answers, strict=True)
            ]
            new, kept, routes = _generate_answers(model, tokenizer, prompt, mask, lengths)
        if likelihood or forced:
            measured, choices, kept, routes = _measure_answers(model, prompt, mask, answers)
            nats = measured if likelihood else nats
            new = choices if forced else new
        if new is not None:
            texts = [str(tokenizer.decode(list(row), skip_special_tokens=True)) for row in new]
            points = [
                float(list(row) == a) if e.metric == "tokens" else metrics.score(text, e)
                for row, text, a, e in zip(new, texts, answers, chosen, strict=True)
            ]
            said = texts
    shares = (1 - routes.float()).mean(2).cpu().tolist()  # [B, L] of [B, L, Hkv]
    seconds = (time.perf_counter() - start) / len(batch)
    return [
        Result(mode, i, points[b], said[b], nats[b], kept / len(batch), tuple(shares[b]), seconds)
        for b, i in enumerate(batch)
    ]


def _attending(model: nn.Module, mode: Mode) -> contextlib.AbstractContextManager[None]:
    """The block in which the model attends as the mode says."""
    if mode == "routed":
        return contextlib.nullcontext()
    return patching.dense(model) if mode == "dense" else patching.routes(model, mode)


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows and their mask, int64 ``[B, S]``."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(r)) + [*r] for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return tokens, mask


def _measure_answers(
    model: nn.Module, prompt: Tensor, mask: Tensor, answers: Sequence[Sequence[int]]
) -> tuple[list[float], list[list[int]], int, Tensor]:
    """Nats of each answer, the model's first choice for each of its tokens, bytes that the cache kept of the prompts,
    and the routes ``[B, L, Hkv]``."""
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
    nats = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view_as(counted)
    first = logits.argmax(-1).tolist()
    choices = [row[: len(a)] for row, a in zip(first, answers, strict=True)]
    return (nats * counted).sum(1).tolist(), choices, kept, routes


def _generate_answers(
    model: nn.Module, tokenizer: DecodingTokenizer, prompt: Tensor, mask: Tensor, lengths: Sequence[int]
) -> tuple[list[list[int]], int, Tensor]:
    """Tokens of greedy continuations, each cut to its length, bytes in the cache at the end, and the routes."""
    out = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=mask,
        max_new_tokens=max(lengths),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        return_dict_in_generate=True,
    )
    cache = cache_of(out)
    rows = out.sequences[:, prompt.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = ends if isinstance(ends, list) else [ends]
    for row, length in zip(rows, lengths, strict=True):
        stop = next((i for i, t in enumerate(row) if t in ends), length)
        del row[min(stop + 1, length) :]  # what follows the end of a text is padding
    return rows, cache.nbytes(), cache.routes


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
