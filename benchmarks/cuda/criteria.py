"""What the figures have to reach, checked on the rows of a table."""

from __future__ import annotations

import csv
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .decode import K, M
from .problems import OURS, SHARES, Group
from .table import Row

Seen = dict[str, float]  # what a criterion compares, by case


class Results:
    """Rows of the operators' table, and of the end-to-end tables."""

    def __init__(self, rows: Iterable[Row], models: Iterable[Mapping[str, str]] = ()) -> None:
        self.rows = [r for r in rows if r.us is not None]
        self.models = list(models)

    def all(self, group: str, contender: str = OURS, **fields: object) -> list[Row]:
        return [
            r
            for r in self.rows
            if r.group == group and r.contender == contender and all(getattr(r, k) == v for k, v in fields.items())
        ]

    def one(self, group: str, contender: str = OURS, **fields: object) -> Row | None:
        return next(iter(self.all(group, contender, **fields)), None)


def _where(row: Row) -> str:
    return f"{row.kind} {row.batch} x {row.length}" + (f" d{row.dim}" if row.dim not in (0, 128) else "")


def _of(rows: Iterable[Row], value: str) -> Seen:
    return {_where(r): getattr(r, value) for r in rows if getattr(r, value) is not None}


def value(group: str, name: str, results: Results, *, least: int = 0, most: int = 1 << 30, **fields: object) -> Seen:
    """One column of our rows in a group, within bounds of length."""
    return _of((r for r in results.all(group, **fields) if least <= r.length <= most), name)


def decode_share_128k(results: Results) -> Seen:
    """Share of the copy rate, 1 and 16 sequences."""
    return _of((r for r in results.all("decode", length=128 * K) if r.batch in (1, 16)), "share")


def beside(group: str, peer: str, results: Results, *, least: int = 0, **fields: object) -> Seen:
    """A peer's time over ours."""
    return _of((r for r in results.all(group, peer, **fields) if r.length >= least), "ratio")


def rate_of_dense(group: str, results: Results, **fields: object) -> Seen:
    """Our rate on visible work over that of a dense prompt of 32K in the same run."""
    dense = results.one("dense", length=32 * K)
    if dense is None or not dense.rate:
        return {}
    return {_where(r): r.rate / dense.rate for r in results.all(group, **fields) if r.rate and r.kind != "95%"}


def linear(results: Results) -> Seen:
    """Rate of the longest streaming prompt over that at 32K."""
    short, long = (results.one("streaming", length=n) for n in (32 * K, M))
    return {"1M / 32K": long.rate / short.rate} if short and long and short.rate and long.rate else {}


def over_parts(results: Results, *, least: int) -> Seen:
    """Mixed heads: time over what their shares of a dense and a streaming prompt take."""
    seen = {}
    for row in results.all("mixed-heads"):
        dense, sparse = (results.one(g, length=row.length) for g in ("dense", "streaming"))
        if dense and sparse and row.length >= least:
            share = SHARES[row.kind]
            seen[_where(row)] = row.us / ((1 - share) * dense.us + share * sparse.us)
    return seen


def over_dense(results: Results) -> Seen:
    """Mixed heads: time over that of the dense prompt."""
    dense = {r.length: r.us for r in results.all("dense")}
    return {_where(r): r.us / dense[r.length] for r in results.all("mixed-heads") if r.length in dense}


def over(group: str, twin: str, results: Results, *, ours: str = OURS, least: int = 0, **fields: object) -> Seen:
    """Our time over that of another of our contenders in the same case."""
    twins = {r.case: r.us for r in results.all(group, f"{OURS}, {twin}", **fields)}
    rows = (r for r in results.all(group, ours, **fields) if r.length >= least)
    return {_where(r): r.us / twins[r.case] for r in rows if r.case in twins}


def with_selection(results: Results) -> Seen:
    """Block selection and the attention to 95 % of the blocks over the dense prompt."""
    ours = f"{OURS}, and then 95 % of the blocks"
    return over("selection", "dense prompt", results, ours=ours, least=32 * K, kind="stride 16")


def half_over_full(results: Results) -> Seen:
    """Short prompts with half the heads sparse over the full route."""
    full = {r.case: r.us for r in results.all("short", f"{OURS}, full")}
    return {_where(r): r.us / full[r.case] for r in results.all("short", f"{OURS}, half") if r.case in full}


def scoring(results: Results) -> Seen:
    """Choosing blocks: its time over what the sparse attention saves."""
    seen = {}
    for row in results.all("block-sparse", f"{OURS}, choosing blocks", kind="25%"):
        ours, full = (results.one("block-sparse", c, kind="25%") for c in (OURS, f"{OURS}, full"))
        if ours and full:
            saved = full.us - ours.us
            seen[_where(row)] = row.us / saved if saved > 0 else math.inf
    return seen


def beyond_bytes(results: Results, *, factor: float) -> Seen:
    """Mixed-head decode: microseconds beyond ``factor`` times what its bytes take at the rate of full decode."""
    seen = {}
    for row in results.all("decode-mixed"):
        full = results.one("decode", batch=row.batch, length=row.length)
        if full and full.rate and row.rate:
            seen[_where(row)] = row.us * (1 - factor * row.rate / full.rate)
    return seen


def layers(share: str, results: Results) -> Seen:
    """Attention of a decode step at 256K: the fastest dense time over ours."""
    rows = [r for r in results.rows if r.group == "decode-layers" and r.kind == "0"]
    ours = results.one("decode-layers", kind=share)
    return {share: min(r.us for r in rows) / ours.us} if rows and ours else {}


def prefill(variant: str, results: Results) -> Seen:
    """Whole models at 256K: prefill time of stock attention over ours."""
    return {
        row["model"]: float(row["prefill_x"])
        for row in results.models
        if row["variant"] == variant and int(row["length"]) == 256 * K and row.get("prefill_x")
    }


@dataclass(frozen=True)
class Criterion:
    """``seen`` must be at least (``sign`` +1) or at most (-1) one of two limits: must hold, and aimed at."""

    name: str
    sign: int
    must: float | None
    aim: float | None
    seen: Callable[[Results], Seen]


def _criterion(
    sign: int, name: str, must: float | None, aim: float | None, seen: Callable[[Results], Seen]
) -> Criterion:
    return Criterion(name, sign, must, aim, seen)


_at_least = partial(_criterion, 1)
_at_most = partial(_criterion, -1)


CRITERIA: tuple[Criterion, ...] = (
    _at_least("full decode 128K, 1 and 16 sequences, share of the copy rate", 0.80, None, decode_share_128k),
    _at_least("full decode from 32K on, share of the copy rate", None, 0.90,
              partial(value, "decode", "share", least=32 * K)),
    _at_least("full decode, fastest peer's time over ours", None, 1.0, partial(value, "decode", "ratio")),
    _at_most("streaming decode, us, any length", 10, 6, partial(value, "decode-streaming", "us", batch=1)),
    _at_most("mixed-head decode, us beyond 1.10 x its bytes", 5, None, partial(beyond_bytes, factor=1.10)),
    _at_most("mixed-head decode, us beyond 1.05 x its bytes", None, 3, partial(beyond_bytes, factor=1.05)),
    _at_most("router, one sequence, us", 12, 6, partial(value, "router", "us", batch=1)),
    _at_least("dense D 128, 8K to 128K, share of the matrix rate", 0.65, 0.80,
              partial(value, "dense", "share", least=8 * K)),
    _at_least("dense D 128, 8K to 128K, cuDNN's time over ours", 0.95, None,
              partial(beside, "dense", "SDPA cuDNN", least=8 * K)),
    _at_least("dense D 128, 8K to 128K, fastest peer's time over ours", None, 1.0,
              partial(value, "dense", "ratio", least=8 * K)),
    _at_least("dense D 64, fastest peer's time over ours", None, 1.0, partial(value, "dense-64", "ratio", least=8 * K)),
    _at_least("dense D 256, fastest peer's time over ours", None, 1.0, partial(value, "dense-256", "ratio")),
    _at_least("dense, short or in batches, fastest peer's time over ours", None, 1.0,
              partial(value, "dense-short", "ratio")),
    _at_least("a few queries over a cache, fastest peer's time over ours", None, 1.0,
              partial(value, "few-queries", "ratio")),
    _at_least("streaming 128K, share of the matrix rate on visible work", 0.60, None,
              partial(value, "streaming", "share", least=128 * K, most=128 * K)),
    _at_least("streaming, rate over dense 32K", None, 0.75, partial(rate_of_dense, "streaming")),
    _at_least("streaming, linear in length: rate at 1M over 32K", None, 0.95, linear),
    _at_most("mixed heads, time over that of their parts (32K on)", 1.10, 1.05, partial(over_parts, least=32 * K)),
    _at_most("mixed heads, time over dense", None, 1.0, over_dense),
    _at_most("mixed sequences, one launch over eight", None, 1.05, partial(over, "mixed-sequences", "one by one")),
    _at_most("short prompts, sparse route over full (3 % is noise)", 1.03, 1.0, partial(over, "short", "full")),
    _at_most("short prompts, half the heads sparse over full", 1.03, 1.0, half_over_full),
    _at_least("block-sparse, rate over dense 32K", None, 0.75, partial(rate_of_dense, "block-sparse")),
    _at_most("block-sparse, 95 % of the blocks over dense", None, 1.0,
             partial(over, "block-sparse", "full", kind="95%")),
    _at_least("gradients, dense D 128, 4K to 32K, cuDNN's time over ours", None, 1.0,
              partial(beside, "backward", "SDPA cuDNN", kind="dense", dim=128)),
    _at_most("block-sparse, choosing over what is saved", None, 0.10, scoring),
    _at_most("block selection by strides of 16 over a dense prompt, 16K on", None, 0.05,
             partial(over, "selection", "dense prompt", kind="stride 16", least=16 * K)),
    _at_most("selection and 95 % of the blocks over a dense prompt, 32K on", None, 1.0, with_selection),
    *(
        _at_least(f"decode attention of 32 layers at 256K, {share} sparse, speedup", None, aim, partial(layers, share))
        for share, aim in (("0.5", 1.9), ("0.75", 3.7), ("0.9", 8.5))
    ),
    *(
        _at_least(f"prefill of a model at 256K, {share} sparse, speedup", must, aim, partial(prefill, f"flux {share}"))
        for share, must, aim in (("0.5", 1.5, 1.6), ("0.75", 2.2, 2.4), ("0.9", 3.0, 3.4))
    ),
)  # fmt: skip

HEADER = ("criterion", "bound", "worst", "case", "met", "cases")


def everything(groups: Iterable[Group]) -> Results:
    """What a table looks like that lacks nothing: how many cases each criterion has."""
    twins = ("", ", full", ", half", ", one by one", ", choosing blocks", ", dense prompt")
    twins += (", and then 95 % of the blocks",)
    rows = [
        Row(**vars(spec), contender=contender, us=1.0, rate=1.0, share=1.0, ratio=1.0)
        for group in groups
        for spec in group.specs
        for contender in ("SDPA cuDNN", *(OURS + twin for twin in twins))
    ]
    models = [
        {"model": "llama-3.1-8b", "length": str(256 * K), "variant": f"flux {share}", "prefill_x": "1"}
        for share in ("0.5", "0.75", "0.9")
    ]
    return Results(rows, models)


def verdicts(results: Results, complete: Results) -> list[tuple[str, ...]]:
    """One line per bound: what was seen where it was worst, and whether every case meets it.

    Args:
        complete: what there would be to see if everything had been run.
    """
    lines = []
    for criterion in CRITERIA:
        for kind, limit in (("must", criterion.must), ("aim", criterion.aim)):
            if limit is None:
                continue
            seen, cases = criterion.seen(results), len(criterion.seen(complete))
            bound = f"{kind} {'>=' if criterion.sign > 0 else '<='} {limit:g}"
            if not seen:
                lines.append((criterion.name, bound, "", "", "not measured", f"0/{cases}"))
                continue
            where, worst = min(seen.items(), key=lambda item: criterion.sign * item[1])
            met = sum(criterion.sign * x >= criterion.sign * limit for x in seen.values())
            verdict = "NO" if met < len(seen) else "yes" if len(seen) >= cases else "so far"
            lines.append((criterion.name, bound, f"{worst:.3g}", where, verdict, f"{met}/{max(cases, len(seen))}"))
    return lines


def show(lines: Sequence[tuple[str, ...]]) -> None:
    """Prints the table; what was not measured only by name."""
    measured = [line for line in lines if line[2]]
    for name, bound, worst, where, met, cases in (HEADER, *measured):
        print(f"{name[:62]:62} {bound:12} {worst:>6} {where[:22]:22} {met:6} {cases}")
    if missing := list(dict.fromkeys(line[0] for line in lines if line not in measured)):
        print(textwrap.fill("not measured: " + "; ".join(missing), 140))


def write(path: Path, lines: Sequence[tuple[str, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *lines])


def read_models(path: Path) -> list[dict[str, str]]:
    """Rows of an end-to-end table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(text for text in file if not text.startswith("#")))
