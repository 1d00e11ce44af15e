"""``flux-ext frontier``: routers of several budgets, and what does not look at the input beside them, on one picture.

Every contender is scored on the same held-out examples: the model dense, all by the full mode where that is another
than full attention, all sparse, static allocations (:mod:`flux_ext.training.static`), and routers trained for each
granularity, budget and seed. What one has given is a file of its own, so that an interrupted run goes on and several
processes can share the work; the table and the picture are made of all that are there.

======================= ===========================================================================
``frontier.csv``         a row per task and contender (of static ones, per sparsity)
``frontier.png``         score against sparsity, a panel per task
``routers/NAME``         trained routers, calibrated to their budget; ``NAME@BUDGET`` to another
``runs/NAME.json``       what a contender gave; beside it its log and single results
``runs/settings.json``   what all of them were made with
======================= ===========================================================================
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import flux_ext

from .. import FluxConfig, FluxRouters, Streaming, strict_json
from ..evaluation import Score, evaluate
from ..evaluation.frontier import Point, picture, read_table, write_table
from ..examples import Example, load_examples
from ..models import patching
from . import calibrate
from .options import config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAIN = "import sys; sys.path[0] = {!r}; from flux_ext.cli.commands import main; sys.exit(main())"
PROGRAM = [sys.executable, "-c", _MAIN.format(str(Path(__file__).parents[2])), "frontier"]
"""What a process of ``--jobs`` runs, with the options behind it: this package, wherever it is started from."""
_NOT_SETTINGS = (
    *("run", "traceback", "output", "jobs", "only", "argv"),
    *("budgets", "seeds", "granularity", "static", "objective"),
)
"""Options that name contenders or say how the work is done: they may differ from one call to the next."""


@dataclass(frozen=True)
class Contender:
    """One way to route."""

    kind: str
    """``"dense"``, ``"full"``, ``"sparse"``, ``"static"`` or ``"routed"``."""
    granularity: str = ""
    budget: str = ""
    """As it was given: ``0.01`` or ``0.02nats,prose=0.01nats``."""
    seed: int = 0
    objective: str = "counterfactual"
    """Of the routers' training."""

    @property
    def routes(self) -> str:
        """What the table calls it."""
        return self.kind if self.objective == "counterfactual" else self.objective

    @property
    def name(self) -> str:
        """Of its files."""
        if self.kind in ("dense", "full", "sparse"):
            return self.kind
        budget = self.budget.replace(",", "+")
        return "-".join([self.routes, self.granularity, *([budget] if budget else []), str(self.seed)])


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Those that the options ask for, seed by seed, so that an interrupted run has whole seeds."""
    from ..training import Recipe

    whole = ["dense", "sparse"] if _full_is_dense(args) else ["dense", "full", "sparse"]
    found = [Contender(kind) for kind in whole]
    for seed in args.seeds:
        found += [Contender("static", granularity, seed=seed) for granularity in args.static if granularity != "none"]
        found += [
            Contender("routed", granularity, budget, seed, objective or str(Recipe().settled(granularity).objective))
            for objective in args.objective or [None]
            for budget in args.budgets
            for granularity in args.granularity
        ]
    return found


def run(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: the folder holds the frontier of other settings or data, an unknown ``--only``, options that
            contradict each other, or data that do not fit them.
        RuntimeError: a process of ``--jobs`` failed.
    """
    for budget in args.budgets:
        budget_options(budget)  # before anything runs
    for budget in args.calibrate:
        budget_options(budget, "--calibrate")
    if args.calibrate and args.no_calibrate:
        raise ValueError("--calibrate must be left out with --no-calibrate")
    calibrate.check_data(args, budget=True)
    pattern = config_of(args, granularity="layer").pattern
    if "head" in args.static and pattern != "streaming":
        raise ValueError(f"--static head needs the pattern streaming, which its gates learn with, not {pattern}")
    wanted = contenders(args)
    flipped = any(c.kind == "routed" and c.objective == "counterfactual" for c in wanted)
    if args.flips and not flipped and "layer" not in args.static:  # whose search takes as long as flips do
        raise ValueError(f"--flips must be left out where nothing is flipped, got {args.flips}: see --objective")
    if args.only:
        names = {c.name: c for c in wanted}
        if unknown := [name for name in args.only if name not in names]:
            raise ValueError(f"--only must be among {', '.join(names)}, got {unknown[0]!r}")
        wanted = [names[name] for name in args.only]
    runs = args.output / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    _check_settings(args, runs / "settings.json")
    missing = [c for c in wanted if not _there(args, c)]
    if args.jobs > 1 and len(missing) > 1:
        _share_out(args, missing)
    elif missing:
        train = [e for path in args.data for e in load_examples(path)]
        test = [e for path in args.test for e in load_examples(path)]
        for contender in missing:
            print(f"{contender.name} ...", flush=True)
            _write(_file(args.output, contender), _give(args, contender, train, test))
    if not args.only:
        report(args, wanted)


def report(args: argparse.Namespace, wanted: Sequence[Contender]) -> None:
    """Writes the table and the picture of the contenders that are there, and prints the table's means."""
    table = args.output / "frontier.csv"
    points = list(_points(args, wanted))
    write_table(points, table)
    picture(read_table(table)).savefig(args.output / "frontier.png", dpi=150)
    print(f"{table}, {args.output / 'frontier.png'} written")


# Files


def _file(output: Path, contender: Contender) -> Path:
    return output / "runs" / f"{contender.name}.json"


def _there(args: argparse.Namespace, contender: Contender) -> bool:
    """Whether it is known what a contender gave. Dense was once scored by the full mode: where that is another than
    full attention, a file that does not say by what it was scored does not count."""
    file = _file(args.output, contender)
    if contender.kind != "dense" or not file.exists() or _full_is_dense(args):
        return file.exists()
    return "attention" in json.loads(file.read_text(encoding="utf-8"))


def _full_is_dense(args: argparse.Namespace) -> bool:
    return config_of(args, granularity="layer").full == "full"


def _write(path: Path, value: object) -> None:
    """The file is there as a whole, or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(strict_json.dumps(value), encoding="utf-8")
    os.replace(beside, path)


def _check_settings(args: argparse.Namespace, file: Path) -> None:
    settings: dict[str, Any] = {
        name: [str(x) for x in value] if isinstance(value, list) else value if value is None else str(value)
        for name, value in sorted(vars(args).items())
        if name not in _NOT_SETTINGS
    }
    digest = hashlib.sha256()
    for path in (*args.data, *args.test, *([args.calibration_data] if args.calibration_data else [])):
        digest.update(path.read_bytes())
    settings["digest"] = digest.hexdigest()
    if not file.exists():
        _write(file, settings)
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    if differ := sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name)):
        name = differ[0]
        raise ValueError(
            f"{file.parent.parent} holds a frontier with --{name.replace('_', '-')} {found.get(name)}, not "
            f"{settings.get(name)}: give another --output"
        )


def _share_out(args: argparse.Namespace, missing: Sequence[Contender]) -> None:
    """Each contender in a process of its own, so many at a time; a failed one keeps none of the others."""
    argv = args.argv[args.argv.index("frontier") + 1 :]

    def work(contender: Contender) -> int:
        log = args.output / "runs" / f"{contender.name}.log"
        command = [*PROGRAM, *argv, "--jobs", "1", "--only", contender.name]
        with open(log, "w", encoding="utf-8") as file:
            return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode

    failed = []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(missing), unit="contender") as bar:
        for contender, status in zip(missing, pool.map(work, missing), strict=True):
            failed += [contender.name] if status else []
            bar.set_postfix_str(contender.name)
            bar.update()
    if failed:
        log = args.output / "runs" / f"{failed[0]}.log"
        raise RuntimeError(f"{len(failed)} of {len(missing)} contenders failed, {failed[0]} for one: see {log}")


# Contenders


def _give(
    args: argparse.Namespace, contender: Contender, train: Sequence[Example], test: Sequence[Example]
) -> dict[str, Any]:
    """What a contender gives: scores, and seconds of training."""
    from .commands import load_model

    config = config_of(args, granularity=contender.granularity or "layer")
    runs = args.output / "runs"
    if contender.kind == "routed":
        return _routed(args, contender, config, train, test)
    torch.manual_seed(contender.seed)  # of routers that nobody asks, but by which unfinished results are known again
    if contender.kind == "static":
        from ..training import static

        routes, seconds, model, tokenizer = _static(args, contender, config, train)
        scores = []
        for sparsity, route in routes.items():
            with patching.policy(model, static.fixed(route)):
                file = runs / f"{contender.name}-{sparsity}-results.jsonl"
                scores += [asdict(s) for s in _scores(args, model, tokenizer, test, "routed", file)]
        return {**asdict(contender), "training_seconds": seconds, "scores": scores}
    model, tokenizer = load_model(args, config)
    file = runs / f"{contender.name}-results.jsonl"
    scores = [asdict(s) for s in _scores(args, model, tokenizer, test, contender.kind, file)]
    attention = _pattern(config, contender.kind) or "full"
    return {**asdict(contender), "attention": attention, "training_seconds": None, "scores": scores}


def _routed(
    args: argparse.Namespace,
    contender: Contender,
    config: FluxConfig,
    train: Sequence[Example],
    test: Sequence[Example],
) -> dict[str, Any]:
    """Routers trained once, and calibrated and scored for each budget: their training's, and further ones."""
    from ..training import Recipe, RouterDataset
    from ..training.calibration import Calibrator
    from ..training.data import TOO_SHORT, PackedCollator, nothing_hidden
    from .commands import load_model

    trained, seconds = args.output / "runs" / contender.name / "trained", None
    train, unseen = calibrate.held_out(args, train, budget=True, count=args.calibration_count)
    tasks = sorted({e.task for e in (*train, *unseen)})
    if (trained / "flux_config.json").exists():
        model, tokenizer = load_model(args, str(trained))
    else:
        model, tokenizer = load_model(args, config)
        longest = nothing_hidden(RouterDataset(train, tokenizer), patching.get_routers(model))
        if longest is not None:
            raise ValueError(f"--data {args.data} has nothing to learn from: {TOO_SHORT.format(longest)}")
        seconds = _train(args, contender, model, tokenizer, train, trained)
    routers = patching.get_routers(model)
    state = {name: x.clone() for name, x in routers.state_dict().items()}
    calibrator: Calibrator | None = None
    scores = []
    for budget in dict.fromkeys([contender.budget, *args.calibrate]):
        name = contender.name if budget == contender.budget else f"{contender.name}@{budget.replace(',', '+')}"
        folder = args.output / "routers" / name
        if (folder / "flux_config.json").exists():
            routers.load_state_dict(FluxRouters.from_pretrained(folder).state_dict())
        else:
            routers.load_state_dict(state)
            card = {}
            if not args.no_calibrate:
                calibrator = calibrator or Calibrator(
                    model,
                    RouterDataset(unseen or train, tokenizer, tasks),
                    collator=PackedCollator(),
                    batch_size=args.batch_size,
                )
                found = calibrator.find(Recipe(**budget_options(budget)), margin=args.margin)
                calibrator.shift(found.chosen.shift)
                print(f"calibrated to {budget}\n{found}", flush=True)
                card["training"] = found.record()
            routers.save_pretrained(folder, model_card_kwargs=card)
        of = budget if budget == contender.budget else f"{budget} (trained {contender.budget})"
        file = args.output / "runs" / f"{name}-results.jsonl"
        scores += [{**asdict(s), "budget": of} for s in _scores(args, model, tokenizer, test, "routed", file)]
    return {**asdict(contender), "training_seconds": seconds, "scores": scores}


def _scores(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[Example],
    mode: Any,
    results: Path,
) -> list[Score]:
    return evaluate(
        model,
        tokenizer,
        test,
        [mode],
        likelihood={e.task: e.metric == "likelihood" for e in test},
        teacher_forced=args.teacher_forced,
        batch_size=args.eval_batch_size,
        results=results,
    )


def budget_options(text: str, option: str = "--budgets") -> dict[str, Any]:
    """A word of this option, ``0.01`` or ``0.02nats,prose=0.01nats``, as options of the recipe."""
    from .commands import budgets
    from .options import budget

    try:
        return budgets([budget(part) for part in text.split(",")])
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{option} {error}") from None


def _train(
    args: argparse.Namespace,
    contender: Contender,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    folder: Path,
) -> float:
    """Trains the routers and saves them; the seconds that took. An interrupted training goes on."""
    from ..training import FluxTrainer, Recipe, RouterDataset, training_arguments
    from ..training.checkpoint import latest_checkpoint

    on_cpu = torch.device(args.device).type == "cpu"
    torch.manual_seed(contender.seed)
    flips = args.flips if contender.objective == "counterfactual" else None
    recipe = Recipe(**budget_options(contender.budget), objective=cast(Any, contender.objective), flips=flips)
    recipe.check_tasks({e.task for e in train})
    checkpoints = args.output / "runs" / contender.name
    trainer = FluxTrainer(
        model,
        recipe,
        training_arguments(
            str(checkpoints),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            save_steps=args.save_steps,
            save_total_limit=1,
            logging_steps=max(1, args.steps // 20),
            seed=contender.seed,
            gradient_checkpointing=recipe.goes_backward,
            use_cpu=on_cpu,
            dataloader_num_workers=0 if on_cpu else 1,  # tokenizing, while the GPU is at work
        ),
        train_dataset=RouterDataset(train, tokenizer),
        packed=True,  # prompts of any length: padding would cost as much again
        tokenizer=tokenizer,
    )
    known = args.output / "runs" / "dense-losses.safetensors"
    if known.exists():  # of an earlier contender: the same examples
        trainer.dense_losses.update(load_file(known))
    began = time.perf_counter()
    trainer.train(latest_checkpoint(checkpoints))
    seconds = time.perf_counter() - began
    if len(trainer.dense_losses):
        beside = known.with_name(f"{known.name}.{os.getpid()}")
        save_file(trainer.dense_losses.tensors(), beside)
        os.replace(beside, known)
    trainer.routers.save_pretrained(folder)
    model.eval()
    return seconds


def _static(
    args: argparse.Namespace, contender: Contender, config: FluxConfig, train: Sequence[Example]
) -> tuple[dict[float, torch.Tensor], float, PreTrainedModel, PreTrainedTokenizerBase]:
    """The routes of each sparsity, seconds of the search, and the patched model with its tokenizer.

    The greedy search takes as many forward passes of a sequence as a training of routers does.
    """
    from ..training import RouterDataset, static
    from ..training.data import PackedCollator, PaddedCollator
    from .commands import load_model

    model, tokenizer = load_model(args, None)
    data = RouterDataset(train, tokenizer)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(contender.seed)).tolist()
    began = time.perf_counter()
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    if contender.granularity == "layer":
        flux_ext.patch(model, config)
        # A training runs each sequence once, its flips from the middle on in the mean, and half of them dense.
        passes = args.steps * args.batch_size * (1.5 + (args.flips or 2) / 2)
        rows = [data[i] for i in order[: max(1, round(passes / static.greedy_passes(layers)))]]
        batches = [
            {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            for batch in map(PackedCollator(), _chunks(rows, args.batch_size))
        ]
        with tqdm(total=layers, desc="greedy search", unit="layer") as bar:
            ranked = static.greedy_layers(model, batches, bar.update)
        routes = {s: static.layer_routes(ranked, s, heads) for s in args.static_sparsity}
    else:
        steps = 2 * args.steps  # of one sequence each
        with tqdm(total=steps, desc="gates", unit="step") as bar:
            gates = static.distilled_gates(
                model,
                (
                    {k: v.to(model.device) for k, v in PaddedCollator()([data[order[i % len(order)]]]).items()}
                    for i in range(steps)
                ),
                Streaming(config.sink, config.window, config.align),
                steps=steps,
                progress=bar.update,
            )
        routes = {s: static.head_routes(gates.cpu(), s) for s in args.static_sparsity}
        flux_ext.patch(model, config)
    return routes, time.perf_counter() - began, model, tokenizer


def _chunks(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _points(args: argparse.Namespace, wanted: Sequence[Contender]) -> Iterator[Point]:
    """What is there of the contenders, as rows of the table."""
    there = [c for c in wanted if _there(args, c)]
    given = {c: json.loads(_file(args.output, c).read_text(encoding="utf-8")) for c in there}
    dense = {s["task"]: s for c, x in given.items() if c.kind == "dense" for s in x["scores"]}
    config = config_of(args, granularity="layer")
    for c, found in given.items():
        for s in found["scores"]:
            measure = "bits_per_byte" if s["accuracy"] is None else "accuracy"
            reference = dense.get(s["task"])
            yield Point(
                task=s["task"],
                routes=c.routes,
                granularity=c.granularity,
                pattern=_pattern(config, c.kind),
                budget=s.get("budget", c.budget),
                seed=c.seed,
                examples=s["examples"],
                measure=measure,
                score=s[measure],
                dense_score=math.nan if reference is None else reference[measure],
                sparsity=s["sparsity"],
            )


def _pattern(config: FluxConfig, kind: str = "routed") -> str:
    """What the table says of a contender: nothing of dense, of full the full mode, of all others what sparse attention
    sees; behind it what the full mode is, where it is another than full attention."""
    blocks = f"block_sparse {config.threshold:g}"
    if kind in ("dense", "full"):
        return "" if kind == "dense" else blocks
    sparse = blocks if config.pattern == "block_sparse" else f"{config.pattern} {config.sink}+{config.window}"
    return sparse if config.full == "full" else f"{sparse} beside {config.full}"
