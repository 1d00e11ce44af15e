"""Training steps of the routers of whole models of real shapes with random weights: seconds and memory.

    python -m benchmarks training --minutes 9                               # the most important runs first
    python -m benchmarks training --runs llama-3.1-8b:131072 --objectives dense counterfactual --steps 2
    python -m benchmarks training --runs llama-3.1-8b:32768 --granularity head --objectives counterfactual
    python -m benchmarks training --runs tiny:256 tiny:512                  # seconds, on a CPU too

A run is MODEL:LENGTH, one sequence of so many tokens, the last of which are an answer. The steps are
``FluxTrainer.train``'s own, the optimiser's among them, with the model frozen in bf16 (on a CPU fp32).
``counterfactual`` has a budget, as by default; ``soft`` and ``straight_through`` are the papers' recipes, with targets
(``--preset flux`` and ``elastic``), and go backward through the model with gradient checkpointing. ``dense`` is no
objective but one forward of the same tokens, everything full, beside which the others stand (``dense_x``).

What a step costs depends on the routes, so they are set: ``--share`` of the layers, spread evenly, start with log-odds
of full attention at -2 and the others at 2. Counterfactual steps take the routers' own routes and explore in turns, as
the two halves of a batch do, and flip layers that together run as much of the model as two flips do in the mean. Their
first step is more (``first_s``): its sequence is new, so its dense loss is measured. ``sparse`` is the share of sparse
layers or heads under the routers' own routes, ``peak_GB`` what PyTorch had allocated at most, ``weights_GB`` of it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

import flux_ext
from benchmarks.cuda.measure import first_line
from benchmarks.end_to_end import SHAPES, WARM_UP, Writer, batch_of, build, seconds_of, sparse_layers
from flux_ext import FluxConfig
from flux_ext.training import FluxTrainer, Recipe, training_arguments
from flux_ext.training.backbone import losses
from flux_ext.training.data import PaddedCollator, Tokens

RUNS = ("llama-3.1-8b:32768", "llama-3.1-8b:65536", "llama-3.1-8b:131072")
DENSE = "dense"
FIELDS = (
    "model", "length", "objective", "granularity", "sparse", "steps", "first_s", "step_s", "least_s", "most_s",
    "dense_x", "peak_GB", "weights_GB", "note",
)  # fmt: skip
RECIPES = {
    "counterfactual": Recipe(objective="counterfactual", whiten=0),
    "soft": Recipe.preset("flux"),
    "straight_through": Recipe.preset("elastic"),
}
LOG_ODDS = 2.0
ANSWER = 64


class OneSequence(Dataset[Tokens]):
    """The same sequence, as often as it is asked for."""

    tasks = ("retrieval",)

    def __init__(self, ids: Tensor, count: int) -> None:
        tokens = ids[0].tolist()
        answer = min(ANSWER, len(tokens) // 4)
        self._row: Tokens = {"prompt": tokens[:-answer], "answer": tokens[-answer:], "task": 0}
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Tokens:
        return self._row


class Clock(TrainerCallback):
    """The seconds of each step; none begins that would end after the deadline."""

    def __init__(self, device: str, deadline: float) -> None:
        self.device, self.deadline, self.seconds = device, deadline, list[float]()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._now()
        self.seconds.append(now - self._began)
        if now + self.seconds[-1] > self.deadline:
            control.should_training_stop = True


def even_deck(num_layers: int) -> list[int]:
    """All layers, each followed by its mirror image: two flips run as many layers as any other two."""
    half = num_layers // 2
    middle = [half] if num_layers % 2 else []
    order = sorted(range(half), key=lambda layer: (layer * 5) % half)  # not from one end to the other
    return [x for layer in order for x in (layer, num_layers - 1 - layer)] + middle


def settle(trainer: FluxTrainer, share: float) -> None:
    """Gives the routers routes of a known cost, and a counterfactual objective choices of the mean cost."""
    route = sparse_layers(len(trainer.routers.layers), share)
    with torch.no_grad():
        for router, sparse in zip(trainer.routers.layers, route.tolist(), strict=True):
            *_, last = router.classifier  # type: ignore[misc]
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.0, -LOG_ODDS if sparse else LOG_ODDS]))
    objective: Any = trainer.objective
    if hasattr(objective, "deck"):
        objective.deck[0] = torch.tensor(even_deck(objective.num_layers))
        objective.dealt[0] = 0
        turns = iter(range(sys.maxsize))
        objective.own_rows = lambda batch: torch.full((batch,), next(turns) % 2 == 0)


def train(model: Any, ids: Tensor, objective: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of training steps and their peak of memory."""
    device = ids.device.type
    backward = objective != "counterfactual"
    clock = Clock(device, args.deadline)
    with tempfile.TemporaryDirectory() as folder:
        trainer = FluxTrainer(
            model,
            RECIPES[objective],
            training_arguments(
                folder,
                max_steps=1 + args.steps,
                per_device_train_batch_size=1,
                gradient_checkpointing=backward,
                gradient_checkpointing_kwargs={"use_reentrant": False} if backward else None,
                learning_rate=0.0,
                use_cpu=device == "cpu",
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
            ),
            train_dataset=OneSequence(ids, 1 + args.steps),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        settle(trainer, args.share)
        reset_peak(device)
        try:
            trainer.train()
        finally:  # by its name from transformers 5.24 on, or the one before
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
    first, *others = clock.seconds
    found = {
        "sparse": trainer.monitor.routes.sparsity,
        "steps": len(others),
        "first_s": first,
        "peak_GB": peak(device),
    }
    if others:
        found |= {"step_s": statistics.mean(others), "least_s": min(others), "most_s": max(others)}
    return found


def dense(model: Any, ids: Tensor) -> dict[str, float]:
    """One forward with everything full, logits for the answer only, as it is run for a dense loss."""
    device = ids.device.type

    def forward(tokens: Tensor) -> None:
        inputs = PaddedCollator()([OneSequence(tokens, 1)[0]])
        inputs = {name: x.to(device) for name, x in inputs.items()}
        with torch.no_grad(), flux_ext.routes(model, "full"):
            losses(model, inputs)

    forward(ids[:, :WARM_UP])
    reset_peak(device)
    return {"step_s": seconds_of(lambda: forward(ids), 1, device), "peak_GB": peak(device)}


def reset_peak(device: str) -> None:
    """Forgets the most memory that was in use."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> float:
    """The most memory that was in use, in GB; on a CPU it is not known, 0."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0


def run(model: Any, name: str, length: int, args: argparse.Namespace, writer: Writer) -> None:
    """All objectives of one run."""
    device = model.device.type
    ids, _ = batch_of(length, 1, model.config.vocab_size, device)
    weights = sum(p.nbytes for p in model.parameters()) / 1e9
    dense_seconds = 0.0
    variants = [(o, g) for o in args.objectives for g in ([""] if o == DENSE else args.granularity)]
    for objective, granularity in variants:
        row: dict[str, Any] = {"model": name, "length": length, "objective": objective, "granularity": granularity}
        if time.monotonic() > args.deadline:
            writer.add({**row, "note": "not run: the time was up"})
            continue
        try:
            with flux_ext.patched(model, FluxConfig(granularity=granularity or "layer")):
                found = dense(model, ids) if objective == DENSE else train(model, ids, objective, args)
            if objective == DENSE:
                dense_seconds = found["step_s"]
            if dense_seconds and "step_s" in found:
                found["dense_x"] = found["step_s"] / dense_seconds
            writer.add({**row, **found, "weights_GB": weights})
        except Exception as error:  # out of memory above all
            writer.add({**row, "note": first_line(error)})
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def parse_run(text: str) -> tuple[str, int]:
    """MODEL:LENGTH."""
    name, _, length = text.partition(":")
    if name not in SHAPES or not length.isdigit() or int(length) < 8:
        raise argparse.ArgumentTypeError(f"expected MODEL:LENGTH with MODEL of {', '.join(SHAPES)}, got {text!r}")
    return name, int(length)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks training", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--runs", type=parse_run, nargs="+", default=[parse_run(r) for r in RUNS])
    parser.add_argument("--objectives", nargs="+", choices=[DENSE, *RECIPES], default=[DENSE, *RECIPES])
    parser.add_argument("--granularity", nargs="+", choices=["layer", "head"], default=["layer"])
    parser.add_argument("--share", type=float, default=0.5, help="of sparse layers")
    parser.add_argument("--steps", type=int, default=4, help="after the first")
    parser.add_argument("--minutes", type=float, default=60.0, help="start nothing that would end after this")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    if args.steps < 0:
        parser.error(f"--steps must be 0 or more, got {args.steps}")
    if not 0 <= args.share <= 1:
        parser.error(f"--share must be from 0 to 1, got {args.share}")
    args.deadline = time.monotonic() + 60 * args.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    writer = Writer(args.output / f"training-{device}.csv", device, "training", FIELDS, argv)
    model, built = None, ("", 0)
    for name, length in tqdm(args.runs, desc="training", unit="run", file=sys.stderr, disable=None):
        longest = max(n for other, n in args.runs if other == name)
        if built != (name, longest):
            model = None  # one model at a time
            gc.collect()
            model, built = build(name, device, dtype, longest), (name, longest)
        run(model, name, length, args, writer)
