"""What a training is going to cost: tokens, memory and time, measured before it starts by steps that change nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .budget import DenseLosses, Price
from .data import PackedCollator, Tokens

if TYPE_CHECKING:
    from .trainer import FluxTrainer

LOOKED_AT = 256
"""Examples that say how long the others are."""
MUCH_PADDING = 0.1


class Measured(Exception):
    """Ends a training before its first step: it was for the figures alone."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost


@dataclass(frozen=True)
class Lengths:
    """Of examples, in tokens.

    Attributes:
        mean: of prompt and answer, over those looked at.
        answer: of the answer alone, their mean.
        padding: share of padding in batches as they are going to be drawn.
        longest: the longest examples, as many as a batch has.
        typical: a batch with short and long ones.
    """

    mean: float
    answer: float
    padding: float
    longest: list[Tokens]
    typical: list[Tokens]

    @property
    def most(self) -> int:
        """Tokens of the longest one."""
        return max(map(_length, self.longest))


@dataclass(frozen=True)
class Cost:
    """What a training costs.

    Attributes:
        steps: of the optimiser.
        sequences, tokens: per step, of all processes; padding is no token.
        longest: tokens of the longest example that was found.
        padding: share of padding in batches.
        logits: positions of a sequence of which logits are made: those before its answer's tokens.
        positions: all of them, in the mean.
        seconds: of a typical step, where its dense losses are known (a step measures those of new sequences).
        new_seconds: of a typical step with new sequences.
        longest_seconds: of a step whose sequences are all as long as the longest ones, and new.
        total_seconds: of the whole training.
        memory: the largest of all processes' peaks, in bytes, with the longest sequences and the optimiser's state.
        weights: bytes of the model's and the routers' weights, in it.
        capacity: bytes of the device; 0: not known.
        fits: False: the longest sequences did not fit on the device. ``memory`` and ``longest_seconds`` were then
            extrapolated from typical ones, linearly.
    """

    steps: int
    sequences: int
    tokens: float
    longest: int
    padding: float
    logits: float
    positions: float
    seconds: float
    new_seconds: float
    longest_seconds: float
    total_seconds: float
    memory: int
    weights: int
    capacity: int
    fits: bool

    def __str__(self) -> str:
        lines = [
            f"tokens: {self.tokens:,.0f} a step, {self.sequences} sequences of {self.positions:,.0f} in the mean, "
            f"{self.longest:,} at most; {self.padding:.0%} of a batch is padding",
            f"logits: of {self.logits:,.0f} positions of a sequence's {self.positions:,.0f}, its answer's",
            f"memory: {_gigabytes(self.memory)} at the peak, with the longest sequences; {_gigabytes(self.weights)} of "
            f"it weights{f', of {_gigabytes(self.capacity)}' if self.capacity else ''}",
            f"time: {duration(self.seconds)} a step, {duration(self.new_seconds)} with sequences that are new, "
            f"{duration(self.longest_seconds)} with the longest; {self.steps} steps in {duration(self.total_seconds)}",
        ]
        if not self.fits:
            lines.append(
                "THE LONGEST SEQUENCES DO NOT FIT: memory and their time are extrapolated from shorter ones. Take a "
                "smaller --batch-size and --accumulate more, --max-length, or several processes (FSDP, "
                "--sequence-parallel)"
            )
        elif self.padding > MUCH_PADDING:
            lines.append("much of a batch is padding: --packed (packed=True) has none")
        return "\n".join(lines)


def lengths(trainer: FluxTrainer, count: int = LOOKED_AT) -> Lengths:
    """Of a training's examples; of so many, taken evenly, and of those whose text is longest."""
    data: Any = trainer.train_dataset
    size = trainer.args.per_device_train_batch_size
    count = min(count, len(data))
    seen = {i * len(data) // count: None for i in range(count)}
    sample: list[Tokens] = sorted((data[i] for i in seen), key=_length)
    examples = getattr(data, "examples", None)
    long: list[Tokens] = list(sample)
    if examples is not None:  # characters say which may be the longest in tokens
        by_text = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt) - len(examples[i].answer))
        long += [data[i] for i in by_text[: 2 * size] if i not in seen]
    long.sort(key=_length, reverse=True)
    typical = [sample[int((i + 0.5) * len(sample) / size)] for i in range(size)]
    total = sum(map(_length, sample))
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [[sample[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    slots = total
    if not isinstance(trainer.data_collator, PackedCollator):
        slots = sum(len(batch) * max(map(_length, batch)) for batch in batches)
    longest = [long[i % len(long)] for i in range(size)]
    answer = sum(len(x["answer"]) for x in sample) / len(sample)
    return Lengths(total / len(sample), answer, 1 - total / slots, longest, typical)


def measure(trainer: FluxTrainer, model: nn.Module) -> Cost:
    """The cost of a training that is about to begin. Nothing is changed, but for caches of memory.

    Args:
        trainer: its model and optimiser prepared.
        model: as wrapped for training.
    """
    args, device = trainer.args, trainer.args.device
    found, collate = lengths(trainer), cast(Any, trainer.data_collator)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()) if not hasattr(x, "to_local"))
    weights += sum(x.to_local().nbytes for x in model.parameters() if hasattr(x, "to_local"))
    state = 2 * sum(p.nbytes for p in trainer.routers.parameters())  # of the optimiser, which has none yet

    def step(rows: Sequence[Tokens], dense: DenseLosses) -> tuple[float, int]:
        """Seconds of a whole step of such batches, and the peak of its memory in bytes."""
        trainer.dense_losses = dense
        reset_peak(device)
        _wait(device)
        start = time.perf_counter()
        trainer.training_step(model, collate(list(rows)))
        _wait(device)
        seconds = time.perf_counter() - start
        for p in trainer.routers.parameters():
            p.grad = None
        return seconds * args.gradient_accumulation_steps, peak(device)

    with _unchanged(trainer, model):
        step(found.typical, DenseLosses())  # the first one is slower
        new_seconds, typical_peak = step(found.typical, DenseLosses())
        seconds, _ = (
            step(found.typical, _Known()) if isinstance(trainer.objective.multipliers, Price) else (new_seconds, 0)
        )
        fits = True
        try:
            longest_seconds, memory = step(found.longest, DenseLosses())
        except torch.OutOfMemoryError:
            if trainer.accelerator.num_processes > 1:  # the others wait for this one
                raise
            fits, factor = False, found.most * len(found.longest) / max(1, sum(map(_length, found.typical)))
            memory = int(weights + (typical_peak - weights) * factor)
            longest_seconds = new_seconds * factor
    figures = torch.tensor([seconds, new_seconds, longest_seconds, memory + state], dtype=torch.float64)
    if trainer.accelerator.num_processes > 1:
        figures = trainer.accelerator.gather(figures.float().to(device)[None]).amax(0).double().cpu()
    seconds, new_seconds, longest_seconds, memory = (*figures[:3].tolist(), int(figures[3]))
    steps = trainer.state.max_steps
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    data: Any = trainer.train_dataset
    new = min(1.0, len(data) / max(1, steps * sequences))
    return Cost(
        steps=steps,
        sequences=sequences,
        tokens=found.mean * sequences,
        longest=found.most,
        padding=found.padding,
        logits=found.answer,
        positions=found.mean,
        seconds=seconds,
        new_seconds=new_seconds,
        longest_seconds=longest_seconds,
        total_seconds=steps * (seconds + new * (new_seconds - seconds)),
        memory=memory,
        weights=weights,
        capacity=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
        fits=fits,
    )


class _Known(DenseLosses):
    """As if all had been measured."""

    def get(
        self, inputs: Mapping[str, Any], rows: Tensor, measure: Callable[[Tensor], Tensor], agree: Any = None
    ) -> Tensor:
        return torch.zeros(len(rows), device=rows.device)


@contextlib.contextmanager
def _unchanged(trainer: FluxTrainer, model: nn.Module) -> Iterator[None]:
    """Puts back everything that a step changes, in the end."""
    state = {name: x.clone() for name, x in trainer.objective.state_dict().items()}
    dense, draws = trainer.dense_losses, torch.get_rng_state()
    modes = [(module, module.training) for module in model.modules()]
    gradients = trainer.accelerator.gradient_state
    synced = gradients.sync_gradients
    gradients._set_sync_gradients(True)
    trainer.current_gradient_accumulation_steps = 1
    try:
        yield
    finally:
        gradients._set_sync_gradients(synced)
        trainer.objective.load_state_dict(state)
        trainer.dense_losses = dense
        trainer.monitor.clear()
        torch.set_rng_state(draws)
        for p in trainer.routers.parameters():
            p.grad = None
        for module, training in modes:
            module.training = training


def _length(tokens: Tokens) -> int:
    return len(tokens["prompt"]) + len(tokens["answer"])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Lets :func:`peak` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # no Linux, or not allowed: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes that were in use at most since :func:`reset_peak`: of the GPU, or of the process. 0: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 0


def duration(seconds: float) -> str:
    """In words."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
