"""The command ``flux-ext``: demo, info, generate, make-data, train, calibrate, eval, frontier, bench."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import FluxConfig, __version__
from ..caches.summary import LEGEND, letters
from . import calibrate, dtypes, options
from .parser import Run, parser

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .. import FluxRouters
    from ..evaluation import Score
    from ..examples import Example
    from ..training import FluxTrainer, Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status (0, or 1 after an error that was reported).

    Raises:
        SystemExit: with status 2, where an option's value breaks a rule.
    """
    args = parser(COMMANDS).parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args.run(args)
    except KeyboardInterrupt as stop:
        print(f"flux-ext: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
        if args.traceback:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"flux-ext: error: {' '.join(str(message).split())}", file=sys.stderr)
        return 1
    return 0


def _demo(args: argparse.Namespace) -> None:
    if args.model == "smollm2":
        for name in ("steps", "check"):
            if getattr(args, name):
                raise ValueError(f"--{name} is of the bundled model: the routers of smollm2 are trained already")
        from . import smollm2

        length = {} if args.length is None else {"length": args.length}
        smollm2.run(args.output, examples=args.examples, seed=args.seed, **length)
        return
    if args.length is not None:
        raise ValueError("--length is of --model smollm2")
    from .demo import run, verdicts

    scores = run(args.output, steps=args.steps, examples=args.examples, seed=args.seed)
    missed = [verdict.text for verdict in verdicts(scores) if not verdict.holds]
    if args.check and missed:
        raise RuntimeError(f"the demonstration missed what is expected of it: {'; '.join(missed)}")


# info


def _info(args: argparse.Namespace) -> None:
    facts = info()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {value}")


def info() -> dict[str, str]:
    """What is built and found, by name."""
    from .. import _library

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    try:
        from .._C import isa

        fast = str(dtypes.fast_on_cpu()).removeprefix("torch.")
        cpu_kernels = f"{isa()}; {fast} is the fast dtype here"
    except ImportError as error:
        cpu_kernels = f"unknown: the module _C does not load ({error})"
    cuda = "loaded" if _library.has_cuda_library else "not built (no nvcc at build time, or FLUX_CUDA=OFF)"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "flux-ext": f"{__version__} in {Path(__file__).parents[1]}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": version("transformers"),
        "accelerate": version("accelerate"),
        "safetensors": version("safetensors"),
        "CPU library": f"loaded from {_library.FOLDER}",
        "CPU kernels": cpu_kernels,
        "CUDA library": cuda,
        "GPU": ", ".join(devices) or "none",
    }


# models


def load_model(
    args: argparse.Namespace, routers: str | FluxConfig | FluxRouters | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The patched model (not patched where ``routers`` is None), in evaluation mode, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import flux_ext

    if isinstance(routers, str):  # the smaller files first
        routers = flux_ext.FluxRouters.from_pretrained(routers)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        if args.dtype == "auto":
            dtype = dtypes.default(args.device, AutoConfig.from_pretrained(args.model).dtype)
        else:
            dtype = getattr(torch, args.dtype)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    except Exception as error:  # of any type: the readers of safetensors and tokenizers have their own
        raise ValueError(f"--model {args.model} cannot be loaded: {error}") from error
    if not getattr(args, "fsdp", False):  # which gives each process its part itself
        model.to(_own_device(args.device))
    model.eval()
    if isinstance(routers, FluxConfig):
        flux_ext.patch(model, routers)
    elif routers is not None:
        flux_ext.patch(model, routers=routers)
    return model, tokenizer


def _own_device(device: Any) -> Any:
    """Where this process, of those that torchrun has started, keeps a model."""
    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if device == "cuda" and own is not None else device


def _prompt(file: Path) -> str:
    try:
        prompt = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {file} must be UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"--prompt-file {file} cannot be read: {error.strerror}") from None
    if not prompt:
        raise ValueError(f"--prompt-file {file} is empty")
    return prompt


def _generate(args: argparse.Namespace) -> None:
    from ..transformers_seam import cache_of

    prompt = _prompt(args.prompt_file)
    model, tokenizer = load_model(args, args.routers)
    inputs = tokenizer(prompt, return_tensors="pt").to(args.device)
    if not inputs["input_ids"].numel():
        raise ValueError(f"--prompt-file {args.prompt_file} has no tokens")
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=args.max_new_tokens, return_dict_in_generate=True, **sampling
        )
    seconds = time.perf_counter() - start
    length = inputs["input_ids"].shape[1]
    print(tokenizer.decode(out.sequences[0, length:], skip_special_tokens=True))
    route = cache_of(out).routes[0]  # [L, Hkv]
    print(
        f"[{length} + {out.sequences.shape[1] - length} tokens in {seconds:.1f} s; "
        f"sparsity {route.float().mean():.2f}; layers {letters(route)} ({LEGEND})]",
        file=sys.stderr,
    )


# training and evaluation


def budgets(given: Sequence[tuple[str | None, float, str]]) -> dict[str, Any]:
    """The recipe's budget, its unit and the tasks' own, as ``--budget`` says them."""
    if not given:
        return {}
    units = {unit for _, amount, unit in given if amount}  # 0 is the same in both
    if len(units) > 1:
        raise ValueError("--budget: all amounts must be shares, or all nats")
    common = [amount for task, amount, _ in given if task is None]
    if len(common) > 1:
        raise ValueError(f"--budget: one amount may be without a task, got {len(common)}")
    return {
        "budget": common[0] if common else None,
        "budget_unit": units.pop() if units else "share",
        "budgets": {task: amount for task, amount, _ in given if task is not None},
    }


def _train(args: argparse.Namespace) -> None:
    from ..examples import load_examples
    from ..routers.collection import FluxRouters
    from ..training import Recipe, RouterDataset
    from ..training.callbacks import StopOnInterrupt
    from ..training.checkpoint import check_output_folder, check_unused, latest_checkpoint
    from ..training.data import nothing_hidden

    options.fill_in_training(args)
    recipe = Recipe(
        objective=args.objective,
        **budgets(args.budget),
        targets=dict(args.target),
        default_target=args.default_target,
        multipliers=args.multipliers,
        multiplier_lr=args.multiplier_lr,
        start_bias=args.start_bias,
        whiten=args.whiten,
        flips=args.flips,
        flip_choice=args.flip_choice,
        heads_per_flip=args.heads_per_flip,
    )
    examples, unseen = calibrate.held_out(args, load_examples(args.data), recipe.has_budget)
    held_out = load_examples(args.eval_data) if args.eval_data else []
    tasks = sorted({e.task for e in examples})
    if getattr(args, "preset_targets", False) and not set(recipe.targets) & set(tasks):
        [(name, target)] = args.target
        raise ValueError(
            f"--preset {args.preset} has a target for tasks called {name!r}, and the data have {', '.join(tasks)}: "
            f"name those that need retrieval, for example --target {tasks[0]}={target:g}"
        )
    recipe.check_tasks(tasks)
    if args.routers and (given := options.given_modes(args)):
        raise ValueError(f"{given[0]} is for new routers: those of --routers have settings of their own")
    config = FluxRouters.from_pretrained(args.routers).config if args.routers else options.config_of(args)
    recipe = recipe.settled(config.granularity)
    checkpoint = latest_checkpoint(args.output) if args.resume is True else args.resume
    if args.resume is True and checkpoint is None:
        raise ValueError(f"--resume: {args.output} has no checkpoint")
    if checkpoint is not None:
        _check_resume(Path(checkpoint), args, recipe, examples, config)
    check_output_folder(args.output)
    if checkpoint is None and not args.dry_run:
        check_unused(args.output)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args, args.routers or config)
    with contextlib.ExitStack() as stack:  # a Trainer makes its folder when it is made
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if args.dry_run else str(args.output)
        trainer = _trainer(args, recipe, examples, folder, model, tokenizer)
        if args.dry_run:
            cost = trainer.dry_run()
            if trainer.is_world_process_zero():
                print(cost)
            return
    with StopOnInterrupt() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if stop.asked and step < steps:
        raise KeyboardInterrupt(
            f"stopped after step {step} of {steps}, with a checkpoint in {args.output}: the same command with --resume "
            "goes on from there"
        )
    longest = nothing_hidden(trainer.train_dataset, trainer.routers)
    if recipe.has_budget and not args.no_calibrate and longest is not None:
        if trainer.is_world_process_zero():
            print(f"not calibrated: with prompts of at most {longest} tokens sparse attention hides nothing")
    elif recipe.has_budget and not args.no_calibrate:
        all_tasks = sorted({*tasks, *(e.task for e in unseen)})
        rows = RouterDataset(unseen, tokenizer, all_tasks, args.max_length) if unseen else None
        found = trainer.calibrate(rows, margin=args.margin)
        if trainer.is_world_process_zero():
            print("calibrated on examples that were not trained on" if unseen else calibrate.TOO_FEW)
            print(found)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"routers written to {args.output}; next, on data that the training has not seen:")
        for command, data in (("eval", ("--data", "FILE.jsonl")), ("generate", ("--prompt-file", "FILE.txt"))):
            used = ("--model", args.model, "--routers", str(args.output), *data)
            print("   ", shlex.join(["flux-ext", command, *used]))
    if held_out:
        from ..evaluation import evaluate

        _print_scores(model, evaluate(model, tokenizer, held_out, batch_size=args.batch_size))


def _check_resume(
    checkpoint: Path, args: argparse.Namespace, recipe: Recipe, examples: Sequence[Example], config: FluxConfig
) -> None:
    """ValueError, before the model is loaded, where a training cannot go on from a checkpoint as the options say."""
    from ..training.checkpoint import Checkpoint, check_progress
    from ..training.data import digest

    saved = Checkpoint.read(checkpoint)
    check_progress(checkpoint, 0, {"initial_lr": args.lr})
    if difference := config.differences(saved.routers.config):
        raise ValueError(
            f"the routers in {checkpoint} have other settings than these options ask for: {difference}; --resume goes "
            "on with the options that the training began with"
        )
    saved.check_goes_on(recipe, sorted({e.task for e in examples}))
    if saved.data not in (None, digest(examples)):
        raise ValueError(
            f"{checkpoint} was trained on other examples than --data now gives: --resume goes on with the same file, "
            "and with the same choice of what is calibrated on (--no-calibrate, --calibration-data)"
        )


def _trainer(
    args: argparse.Namespace,
    recipe: Recipe,
    examples: Sequence[Example],
    folder: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> FluxTrainer:
    from ..training import FluxTrainer, RouterDataset, training_arguments

    checkpointing = args.gradient_checkpointing
    more: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if args.fsdp else {}
    return FluxTrainer(
        model,
        recipe,
        training_arguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.lr,
            save_steps=args.save_steps,
            logging_steps=args.logging_steps,
            report_to=args.report_to,
            seed=args.seed,
            use_cpu=torch.device(args.device).type == "cpu",
            gradient_checkpointing=recipe.goes_backward if checkpointing is None else checkpointing,
            **more,
        ),
        train_dataset=RouterDataset(examples, tokenizer, max_length=args.max_length),
        packed=args.packed,
        tokenizer=tokenizer,
        sequence_parallel=args.sequence_parallel,
    )


def _calibrate(args: argparse.Namespace) -> None:
    calibrate.run(args)


def _make_data(args: argparse.Namespace) -> None:
    from . import data

    data.make(args)


def _eval(args: argparse.Namespace) -> None:
    from ..evaluation import evaluate, report
    from .data import read

    examples = read(args)
    model, tokenizer = load_model(args, args.routers)
    scores = evaluate(
        model,
        tokenizer,
        examples,
        args.modes,
        generate=not args.no_generate,
        likelihood={e.task: not args.no_likelihood or e.metric == "likelihood" for e in examples},
        teacher_forced=args.teacher_forced,
        batch_size=args.batch_size,
        results=report.files_of(args.output)["results"] if args.output else None,
    )
    _print_scores(model, scores)
    if args.output:
        report.write_report(scores, args.output)


def _print_scores(model: PreTrainedModel, scores: Sequence[Score]) -> None:
    from ..evaluation import format_table, modes_of
    from ..evaluation.report import dense_remark

    print(format_table(scores))
    if remark := dense_remark(scores, "full" if "full" in modes_of(model) else "dense"):
        print(remark)


def _frontier(args: argparse.Namespace) -> None:
    from . import frontier

    frontier.run(args)


# bench


def _bench(args: argparse.Namespace) -> None:
    import torch.nn.functional as F

    from .. import Streaming, attention

    if args.heads % args.kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv-heads, {args.kv_heads}, got {args.heads}")
    if args.dtype == "auto":
        dtype = dtypes.fast_on_cpu() if torch.device(args.device).type == "cpu" else torch.bfloat16
    else:
        dtype = getattr(torch, args.dtype)
    on_gpu = torch.device(args.device).type == "cuda"
    sparse = Streaming(args.sink, args.window)

    def least_ms(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(args.repeats):
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return 1e3 * min(times)

    print(
        f"forward, {args.device}, {dtype}, batch {2 * args.batch}, {args.heads} / {args.kv_heads} heads of "
        f"{args.head_dim}, sink {args.sink}, window {args.window}; least of {args.repeats}, milliseconds"
    )
    print(f"{'tokens':>8} {'PyTorch':>10} {'full':>10} {'sparse':>10} {'half the sequences sparse':>26}")
    for length in args.lengths:
        torch.manual_seed(0)
        batch = 2 * args.batch

        def draw(heads: int, batch: int = batch, length: int = length) -> torch.Tensor:
            return torch.randn(batch, length, heads, args.head_dim, device=args.device, dtype=dtype)

        q, k, v = draw(args.heads), draw(args.kv_heads), draw(args.kv_heads)
        route = torch.zeros(batch, dtype=torch.int32, device=args.device)
        mixed = torch.arange(batch, device=args.device).remainder(2).to(torch.int32)
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        works: list[Callable[[], object]] = [
            partial(F.scaled_dot_product_attention, qt, kt, vt, is_causal=True, enable_gqa=True),
            *(partial(attention, q, k, v, r, sparse=sparse) for r in (route, route + 1, mixed)),
        ]
        with torch.inference_mode():
            a, b, c, d = (least_ms(work) for work in works)
        print(f"{length:>8} {a:>10.2f} {b:>10.2f} {c:>10.2f} {d:>26.2f}", flush=True)


COMMANDS: dict[str, Run] = {
    "demo": _demo,
    "info": _info,
    "generate": _generate,
    "make-data": _make_data,
    "train": _train,
    "calibrate": _calibrate,
    "eval": _eval,
    "frontier": _frontier,
    "bench": _bench,
}
"""What each command runs."""
