"""The main job on real text: ``flux-ext demo``.

A small pretrained backbone (``assets/demo_backbone``, a Qwen3 over bytes) is frozen and patched. Its routers
learn two tasks over the Python standard library's sources: answering questions about facts hidden far beyond
the window, and continuing code. Held-out files are then scored dense, all sparse and routed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import FluxConfig, get_routers, patch, pictures, strict_json
from ..caches.summary import LEGEND, letters
from ..evaluation import Score, evaluate, format_table, tasks
from ..examples import Example
from ..training import FluxTrainer, Recipe, RouterDataset, training_arguments
from ..training.config import ObjectiveName
from ..transformers_seam import cache_of

BACKBONE = Path(__file__).parents[1] / "assets" / "demo_backbone"


@dataclass(frozen=True)
class Settings:
    """Sizes of the demonstration; lengths are in bytes, and a byte is a token."""

    sink: int = 16
    window: int = 192
    pool_size: int = 64
    train_length: int = 576
    """Prompts that the routers learn from."""
    length: int = 1024
    """Prompts that are scored."""
    distance: int = 384
    """Between a hidden fact and its question, at least; more than the window."""
    train_facts: int = 2
    """Facts hidden in a prompt of the training."""
    train_distance: int = 208
    """As ``distance``, in the training."""
    answer: int = 128
    """Code to be continued after a prompt."""
    train_answer: int = 32
    """As ``answer``, in the training."""
    objective: ObjectiveName = "counterfactual"
    steps: int = 80
    batch_size: int = 8
    flips: int = 2
    learning_rate: float = 4e-3
    multiplier_lr: float = 0.5
    logit_bound: float = 4.0
    delta_clip: float = 1.0
    """A wrong answer costs many nats; more than one would drown the price of the other task."""
    examples: int = 48
    """Of each task, to be scored."""
    retrieval_target: float = 0.75
    continuation_target: float = 1.0


def load_backbone(folder: Path = BACKBONE) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped backbone in fp32, in evaluation mode, and its tokenizer."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the demonstration's backbone is missing: {folder} has no config.json")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, seed: int, output: Path
) -> FluxTrainer:
    """Patches the model and trains its routers; the trainer, with the log, is returned."""
    s = settings
    recipe = Recipe(
        objective=s.objective,
        targets={tasks.RETRIEVAL: s.retrieval_target, tasks.CONTINUATION: s.continuation_target},
        multiplier_lr=s.multiplier_lr,
        flips=s.flips,
        logit_bound=s.logit_bound,
        delta_clip=s.delta_clip,
        whiten=0,  # these rates tell the two tasks apart without
    )
    torch.manual_seed(seed)
    patch(model, FluxConfig(sink=s.sink, window=s.window, pool_size=s.pool_size))
    count = s.steps * s.batch_size // 2
    examples = tasks.retrieval(
        count,
        length=s.train_length,
        facts=s.train_facts,
        distance=s.train_distance,
        split="train",
        seed=seed,
    ) + tasks.continuation(count, length=s.train_length, answer_length=s.train_answer, split="train", seed=seed)
    trainer = FluxTrainer(
        model,
        recipe,
        training_arguments(
            str(output),
            max_steps=s.steps,
            per_device_train_batch_size=s.batch_size,
            learning_rate=s.learning_rate,
            logging_steps=max(1, s.steps // 20),
            save_strategy="no",
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=RouterDataset(examples, tokenizer),
        tokenizer=tokenizer,
    )
    trainer.train()
    model.eval()
    return trainer


def run(
    output: Path,
    *,
    steps: int | None = None,
    examples: int | None = None,
    seed: int = 0,
    settings: Settings | None = None,
) -> list[Score]:
    """The whole demonstration; prints the report and writes picture, scores and routers to ``output``."""
    start = time.perf_counter()
    given = {"steps": steps, "examples": examples}
    s = Settings(**{**asdict(settings or Settings()), **{k: v for k, v in given.items() if v is not None}})
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    model, tokenizer = load_backbone()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"backbone: {model.config.num_hidden_layers} layers, {parameters:,} parameters, frozen")
    print(f"training routers: {s.steps} steps of {s.batch_size} sequences, {torch.get_num_threads()} threads")
    output.mkdir(parents=True, exist_ok=True)
    train(model, tokenizer, s, seed, output)
    trained = time.perf_counter()
    get_routers(model).save_pretrained(output / "routers")

    held_out = tasks.retrieval(s.examples, length=s.length, distance=s.distance, seed=seed) + tasks.continuation(
        s.examples, length=s.length, answer_length=s.answer, seed=seed
    )
    scores = evaluate(
        model,
        tokenizer,
        held_out,
        generate={tasks.RETRIEVAL: True},
        likelihood={tasks.CONTINUATION: True},
        batch_size=8,
    )
    print(f"\nheld-out text, prompts of {s.length} bytes, {s.examples} examples per task\n")
    print(format_table(scores))
    print()
    print(*verdicts(scores), sep="\n")
    for task in tasks.TASKS:
        show_example(model, tokenizer, next(e for e in held_out if e.task == task))
    picture = output / "routing.png"
    pictures.routes({x.task: x.full_share for x in scores if x.mode == "routed"}).savefig(picture, dpi=120)
    (output / "scores.json").write_text(strict_json.dumps([asdict(x) for x in scores]))
    total = time.perf_counter() - start
    print(f"\n{picture}, {output / 'scores.json'} and {output / 'routers'} written")
    print(f"{trained - start:.0f} s of training, {total:.0f} s in all")
    return scores


class Verdict(NamedTuple):
    """One expectation of the demonstration, and whether it was met."""

    holds: bool
    text: str

    def __str__(self) -> str:
        return f"[{'yes' if self.holds else 'NO '}] {self.text}"


def verdicts(scores: Sequence[Score]) -> list[Verdict]:
    """What the demonstration is expected to show, and whether it did."""
    by = {(s.task, s.mode): s for s in scores}
    dense, sparse, routed = (by[tasks.RETRIEVAL, mode] for mode in ("dense", "sparse", "routed"))
    code, routed_code = by[tasks.CONTINUATION, "dense"], by[tasks.CONTINUATION, "routed"]
    more_bits = routed_code.bits_per_byte / code.bits_per_byte - 1
    return [
        Verdict(
            dense.accuracy > 0.90,
            f"{tasks.RETRIEVAL}: dense attention answers {dense.accuracy:.1%} (expected > 90 %)",
        ),
        Verdict(
            sparse.accuracy < 0.30,
            f"{tasks.RETRIEVAL}: sparse attention alone answers {sparse.accuracy:.1%} (expected < 30 %)",
        ),
        Verdict(
            routed.accuracy >= 0.95 * dense.accuracy,
            f"{tasks.RETRIEVAL}: routed keeps {routed.accuracy / max(dense.accuracy, 1e-9):.1%} of dense "
            f"(expected >= 95 %) at sparsity {routed.sparsity:.2f}",
        ),
        Verdict(
            routed_code.sparsity >= 0.75,
            f"{tasks.CONTINUATION}: routed at sparsity {routed_code.sparsity:.2f} (expected >= 0.75)",
        ),
        Verdict(
            more_bits <= 0.02,
            f"{tasks.CONTINUATION}: routed takes {more_bits:+.2%} bits per byte (expected within 2 % of dense)",
        ),
    ]


def show_example(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """Generates one answer under the routers' own routes and prints it beside the right one."""
    inputs = tokenizer(example.prompt, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=len(example.answer), do_sample=False, return_dict_in_generate=True
        )
    text = tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    layers = letters(cache_of(out).routes[0])
    print(f"\n--- {example.task}: layers {layers} ({LEGEND}); the prompt's end, then what was generated")
    print(f"{example.prompt[-160:]}[{text}]")
    print(f"--- right: [{example.answer}]")
