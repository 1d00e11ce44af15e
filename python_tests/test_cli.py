"""The command line, from training data to a generated text, on a tiny random model."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flux_ext import FluxConfig, FluxRouters
from flux_ext.caches.summary import letters
from flux_ext.cli import commands, options
from flux_ext.cli.parser import parser
from flux_ext.config import PRESETS
from flux_ext.evaluation import MODES
from flux_ext.evaluation.ruler import TASKS, TRAINING_TASKS
from flux_ext.evaluation.tasks import SPLITS
from flux_ext.examples import Example, load_examples
from flux_ext.routers.files import CONFIG_FILE, WEIGHTS_FILE
from flux_ext.training import FluxTrainer, Recipe, save_examples, training_arguments
from flux_ext.training.config import MULTIPLIER_FORMS, OBJECTIVES

PATTERN = ["--sink", "2", "--window", "8", "--pool-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, its tokenizer, examples and a prompt."""
    path = tmp_path_factory.mktemp("cli")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(
        path / "model"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=256,
        pad_token_id=257,
    )
    Qwen3ForCausalLM(config).save_pretrained(path / "model")
    examples = [Example(f"text {i} " * 40, "what?", f"a{i}", "xy"[i % 2]) for i in range(8)]
    save_examples(examples, path / "data.jsonl")
    (path / "prompt.txt").write_text("Once upon a time")
    (path / "prose").mkdir()
    words = [f"{a}{b}{c}nd" for a in "bdfglmnprst" for b in "aeiou" for c in "klmnr"]
    for i in range(3):
        text = [words[(i + 7 * j) % len(words)] for j in range(900)]
        (path / "prose" / f"{i}.txt").write_text(". ".join(" ".join(text[j : j + 8]) for j in range(0, 900, 8)))
    return path


def run(*args):
    return commands.main([str(a) for a in args])


def test_what_the_parser_says_is_what_the_recipe_has(tmp_path):
    """It spells defaults and choices out, as help would have to import transformers for them."""
    train = ["train", "--model", "m", "--data", "d", "--output", str(tmp_path)]
    parse = parser(commands.COMMANDS).parse_args
    args, recipe, arguments = parse(train), Recipe(), training_arguments(str(tmp_path))
    names = "objective multipliers multiplier_lr whiten flips heads_per_flip start_bias default_target"
    for name in names.split():
        assert getattr(args, name) == getattr(recipe, name), name
    assert (args.steps, args.lr) == (arguments.max_steps, arguments.learning_rate)
    assert args.logging_steps == arguments.logging_steps
    for option, choices in (("objective", OBJECTIVES), ("multipliers", MULTIPLIER_FORMS)):
        for choice in choices:
            assert getattr(parse([*train, f"--{option}", choice]), option) == choice
    score = parse(["eval", "--model", "m", "--routers", "r", "--data", "d"])
    assert tuple(score.modes) == MODES
    make = ["make-data", "--model", "m", "--output", "o", "--length", "9"]
    assert parse([*make, "--tasks", *TASKS]).tasks == [*TASKS]
    for split in SPLITS:
        assert parse([*make, "--split", split]).split == split


def test_modes_on_the_command_line(tmp_path):
    """``--preset`` names modes as ``FluxConfig.preset`` does, and other options change its fields."""
    command = ["train", "--model", "m", "--data", "d", "--output", str(tmp_path)]

    def config(*args):
        return options.config_of(parser(commands.COMMANDS).parse_args([*command, *args]))

    assert config() == FluxConfig()
    for preset in PRESETS:
        assert config("--preset", preset) == FluxConfig.preset(preset)
    changed = config("--preset", "fa-xa", "--decode", "sparse", "--threshold", "0.8", "--block-width", "64")
    assert changed == FluxConfig.preset("fa-xa", decode="sparse", threshold=0.8, block_width=64)
    for name, option in options.MODES.items():
        for choice in option.get("choices", ()):
            assert getattr(config(f"--{name.replace('_', '-')}", str(choice)), name) == choice
        values = {name: 0.5 if name == "threshold" else 64 if name == "block_width" else 8}
        if "choices" not in option:
            assert config(f"--{name.replace('_', '-')}", str(values[name])) == FluxConfig(**values)


def test_help_and_facts_need_no_transformers():
    """Which take seconds to load, and may be what is broken."""
    code = "import sys, flux_ext.cli.commands as c; c.main(['info']); assert 'transformers' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(commands.__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr


def every_option():
    """Those of the whole and of each command, with the default that the help of each must say."""
    whole = parser(commands.COMMANDS)
    [commands_of] = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in {"flux-ext": whole, **commands_of.choices}.items():
        for action in command._actions:
            if action.option_strings and not {"--help", "--version"} & set(action.option_strings):
                yield pytest.param(action, id=f"{name} {action.option_strings[-1]}")


@pytest.mark.parametrize("action", every_option())
def test_help_says_what_holds_where_an_option_is_left_out(action):
    formatter = options.Formatter("flux-ext", width=1000)
    formatter.add_argument(action)
    [text] = re.findall(r"\((?:default: ([^()]+)|required)\)", formatter.format_help())
    default = action.default
    assert bool(text) != action.required and not re.search(r"None|False|\[|SUPPRESS", text)
    if isinstance(default, list) and default:
        assert text == " ".join(map(str, default))
    elif default is False:
        assert text == "off"
    elif default not in (None, [], argparse.SUPPRESS):
        assert text == str(default)


def test_letters_of_layers():
    assert letters(torch.tensor([[0, 0], [1, 1], [0, 1]])) == "Fsm"


@pytest.fixture(scope="module")
def routers(folder):
    """Routers that the command line has trained."""
    out = folder / "routers"
    assert run(
        "train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", out,
        "--device", "cpu", "--steps", 4, "--batch-size", 2, "--accumulate", 2, "--save-steps", 2,
        "--target", "x=0.25", *PATTERN,
    ) == 0  # fmt: skip
    return out


def test_a_dry_run_says_what_it_costs_and_writes_nothing(folder, tmp_path, capsys):
    assert run(
        "train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", tmp_path / "out",
        "--device", "cpu", "--steps", 4, "--batch-size", 2, *PATTERN, "--dry-run",
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "tokens: " in out and "memory: " in out and "; 4 steps in " in out
    assert not list(tmp_path.iterdir())


def test_train_writes_routers(routers):
    loaded = FluxRouters.from_pretrained(routers)
    assert loaded.config.window == 8 and len(loaded.layers) == 2
    recipe = json.loads((routers / "recipe.json").read_text())
    assert recipe["targets"] == {"x": 0.25} and recipe["objective"] == "counterfactual"
    assert (routers / "checkpoint-2").is_dir()


def test_train_resumes_packed_with_another_routers_start(folder, routers, capsys):
    out = folder / "again"
    common = (
        "train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", out,
        "--device", "cpu", "--batch-size", 2, "--packed", "--routers", routers, "--save-steps", 1,
        "--objective", "soft",
    )  # fmt: skip
    assert run(*common, "--steps", 1) == 0
    assert run(*common, "--steps", 2, "--resume", "--eval-data", folder / "data.jsonl") == 0
    assert "routed" in capsys.readouterr().out


def test_eval(folder, routers, capsys):
    scores = folder / "scores.json"
    assert run(
        "eval", "--model", folder / "model", "--routers", routers, "--data", folder / "data.jsonl",
        "--device", "cpu", "--output", scores,
    ) == 0  # fmt: skip
    table = capsys.readouterr().out
    rows = json.loads(scores.read_text())
    assert len(rows) == 6 and all(r["mode"] in table for r in rows)
    by = {(r["task"], r["mode"]): r for r in rows}
    assert by["x", "dense"]["sparsity"] == 0 and by["x", "sparse"]["sparsity"] == 1
    assert by["x", "sparse"]["kv_bytes"] < by["x", "dense"]["kv_bytes"]


@pytest.fixture(scope="module")
def made(folder):
    """Held-out examples that the command line has made."""
    out = folder / "made.jsonl"
    assert run(
        "make-data", "--model", folder / "model", "--output", out, "--length", 500, "--min-length", 450, "--count", 2,
        "--tasks", "single", "prose", "twohop", "--notes", 2, "--prose", folder / "prose",
    ) == 0  # fmt: skip
    return out


def test_made_data_is_scored(folder, routers, made, capsys):
    scores = folder / "made.json"
    common = ("eval", "--model", folder / "model", "--routers", routers, "--device", "cpu", "--output", scores)
    assert run(*common, "--data", made, "--examples", 1, "--modes", "routed", "--no-likelihood") == 0
    rows = {r["task"]: r for r in json.loads(scores.read_text())}
    assert rows.keys() == {"single", "prose", "twohop"} and all(r["examples"] == 1 for r in rows.values())
    assert rows["single"]["accuracy"] == 0 and rows["single"]["bits_per_byte"] is None
    assert rows["prose"]["accuracy"] is None and rows["prose"]["bits_per_byte"] > 0
    written = {p.name for p in folder.glob("made*")}
    assert written == {
        "made.jsonl", "made.json", "made.csv", "made.png", "made-routes.png", "made-results.jsonl"
    }  # fmt: skip


def test_training_data_is_for_training(folder, capsys):
    out = folder / "train.jsonl"
    common = ("make-data", "--model", folder / "model", "--output", out, "--length", 1500, "--count", 1)
    assert run(*common, "--prose", folder / "prose", "--split", "train") == 0
    assert {e.task for e in load_examples(out)} == set(TRAINING_TASKS)
    assert "1 single, 1 multikey" in capsys.readouterr().out


def test_longbench(folder, routers):
    row = {"input": "Who?", "context": "Long. " * 200, "answers": ["Ada"], "dataset": "hotpotqa", "all_classes": None}
    (folder / "longbench.jsonl").write_text(json.dumps(row) + "\n")
    scores = folder / "longbench.json"
    assert run(
        "eval", "--model", folder / "model", "--routers", routers, "--device", "cpu", "--output", scores,
        "--data", folder / "longbench.jsonl", folder / "data.jsonl", "--max-length", 300, "--modes", "dense",
    ) == 0  # fmt: skip
    rows = {r["task"]: r for r in json.loads(scores.read_text())}
    assert rows.keys() == {"hotpotqa", "x", "y"} and rows["hotpotqa"]["accuracy"] == 0


def test_generate(folder, routers, capsys):
    assert run(
        "generate", "--model", folder / "model", "--routers", routers, "--prompt-file", folder / "prompt.txt",
        "--max-new-tokens", 5, "--device", "cpu",
    ) == 0  # fmt: skip
    assert "sparsity" in capsys.readouterr().err


def test_info(capsys):
    assert run("info") == 0
    assert "CPU kernels" in capsys.readouterr().out
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"].startswith(torch.__version__)


def test_bench(capsys):
    assert run("bench", "--lengths", 64, "--repeats", 1, "--window", 16, "--sink", 4, "--device", "cpu") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "64"


def test_python_m():
    # From the folder of the package under test: in a checkout another one may lie in the working directory.
    folder = Path(commands.__file__).parents[2]
    done = subprocess.run([sys.executable, "-m", "flux_ext", "--version"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0 and done.stdout.startswith("flux-ext ")


def test_train_with_published_multipliers(folder, tmp_path):
    assert run(
        "train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", tmp_path / "out",
        "--device", "cpu", "--steps", 2, "--batch-size", 2, "--accumulate", 2, "--multipliers", "published",
        "--gradient-checkpointing", "--objective", "soft", *PATTERN,
    ) == 0  # fmt: skip
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["multipliers"] == "published"


@pytest.mark.parametrize("given", [False, True], ids=["fresh", "given"])
def test_only_fresh_routers_start_at_the_bias_that_was_asked_for(folder, routers, tmp_path, given):
    assert train(
        folder, tmp_path, "--steps", 1, "--batch-size", 2, "--start-bias", 1.25,
        *(("--routers", routers) if given else PATTERN),
    ) == 0  # fmt: skip
    starts = [r.classifier[-1].bias[1].item() for r in FluxRouters.from_pretrained(routers).layers]
    ends = [r.classifier[-1].bias[1].item() for r in FluxRouters.from_pretrained(tmp_path).layers]
    assert ends == pytest.approx(starts if given else [1.25] * 2, abs=1e-2)


def test_likelihood_alone_is_strict_json(folder, routers):
    scores = folder / "likelihood.json"
    assert run(
        "eval", "--model", folder / "model", "--routers", routers, "--data", folder / "data.jsonl",
        "--device", "cpu", "--no-generate", "--modes", "routed", "--output", scores,
    ) == 0  # fmt: skip

    def refuse(word):
        raise ValueError(f"not JSON: {word}")

    rows = json.loads(scores.read_text(), parse_constant=refuse)
    assert [row["accuracy"] for row in rows] == [None, None] and all(row["bits_per_byte"] > 0 for row in rows)


@pytest.fixture
def no_model(monkeypatch):
    """A model that must not be loaded."""

    def load(*_, **__):
        raise AssertionError("the model was loaded before the options were checked")

    monkeypatch.setattr(commands, "load_model", load)


def train(folder, output, *args):
    return run(
        "train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", output,
        "--device", "cpu", *args,
    )  # fmt: skip


def error_of(capsys, call):
    """Exit status and the one line that was written."""
    try:
        status = call()
    except SystemExit as exit:
        status = exit.code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("flux-ext: error: ")
    return status, line


@pytest.mark.parametrize(
    "args, message",
    [
        *(
            ([f"--{name}", value], f"argument --{name}: must be a whole number >= 1, got '{value}'")
            for name in (
                "steps", "batch-size", "accumulate", "save-steps", "logging-steps", "flips", "heads-per-flip", "window",
                "align", "pool-size",
            )
            for value in ("0", "-1", "1.5", "x")
        ),
        (["--sink", "-1"], "argument --sink: must be a whole number >= 0, got '-1'"),
        (["--preset", "xa-xa"], "argument --preset: invalid choice: 'xa-xa'"),
        (["--threshold", "1.5"], "argument --threshold: must be a finite number in (0, 1], got '1.5'"),
        (["--block-width", "96"], "argument --block-width: invalid choice: 96"),
        (["--max-length", "2"], "argument --max-length: must be a whole number >= 3, got '2'"),
        (["--seed", "-1"], "argument --seed: must be a whole number in [0, 4294967295], got '-1'"),
        *((["--lr", x], f"argument --lr: must be a finite number > 0, got '{x}'") for x in ("0", "nan", "inf", "x")),
        (["--multiplier-lr", "nan"], "argument --multiplier-lr: must be a finite number >= 0, got 'nan'"),
        (["--start-bias", "inf"], "argument --start-bias: must be a finite number, got 'inf'"),
        (["--default-target", "1.5"], "argument --default-target: must be a finite number in [0, 1], got '1.5'"),
        (["--budget", "-1"], "argument --budget: must be a finite number >= 0, got '-1'"),
        (["--budget", "=1"], "argument --budget: must read [TASK=]AMOUNT, for example 0.01 or 0.02nats, got '=1'"),
        (["--budget", "x=1bits"], "argument --budget: must be a finite number >= 0, got '1bits'"),
        (["--target", "x"], "argument --target: must read TASK=SHARE, for example retrieval=0.45, got 'x'"),
        (["--target", "x=2"], "argument --target: must be a finite number in [0, 1], got '2'"),
        (["--target", "x=nan"], "argument --target: must be a finite number in [0, 1], got 'nan'"),
        (["--device", "cuda:99"], "argument --device: must be a device of this machine, which has "),
        (["--device", "meta"], "argument --device: must be cpu, cuda or one of several GPUs, like cuda:1, got 'meta'"),
        (["--device", "gpu"], "argument --device: must be cpu, cuda or one of several GPUs, like cuda:1, got 'gpu'"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--objective", "magic"], "argument --objective: invalid choice: 'magic'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_values_are_checked_by_the_parser(folder, tmp_path, no_model, capsys, args, message):
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out", *args))
    assert status == 2 and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["generate", "--temperature", "-1"], "argument --temperature: must be a finite number >= 0, got '-1'"),
        (["generate", "--temperature", "nan"], "argument --temperature: must be a finite number >= 0, got 'nan'"),
        (["generate", "--max-new-tokens", "0"], "argument --max-new-tokens: must be a whole number >= 1, got '0'"),
        (["eval", "--batch-size", "0"], "argument --batch-size: must be a whole number >= 1, got '0'"),
        (["eval", "--output", "x.csv"], "argument --output: must be a file whose name ends in .json, got 'x.csv'"),
        (["eval", "--examples", "0"], "argument --examples: must be a whole number >= 1, got '0'"),
        (["make-data", "--length", "0"], "argument --length: must be a whole number >= 1, got '0'"),
        (["make-data", "--tasks", "niah"], "argument --tasks: invalid choice: 'niah'"),
        (["eval", "--output", "."], "argument --output: must be a file, '.' is a folder"),
        (["eval", "--output", "none/x.json"], "argument --output: must be a file in a folder that exists, got"),
        (["demo", "--steps", "0"], "argument --steps: must be a whole number >= 1, got '0'"),
        (["demo", "--examples", "0"], "argument --examples: must be a whole number >= 1, got '0'"),
        (["demo", "--output", __file__], "argument --output: must be a folder, "),
        (["train", "--output", __file__], "argument --output: must be a folder, "),
        (["train", "--output", f"{__file__}/out"], "argument --output: must be a folder, "),
        (["bench", "--lengths", "0"], "argument --lengths: must be a whole number >= 1, got '0'"),
        (["bench", "--repeats", "0"], "argument --repeats: must be a whole number >= 1, got '0'"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_values_of_the_other_commands(capsys, args, message):
    status, line = error_of(capsys, lambda: run(*args))
    assert status == 2 and message in line


def test_heads_must_share_key_value_heads(capsys):
    status, line = error_of(capsys, lambda: run("bench", "--heads", 3, "--kv-heads", 2, "--device", "cpu"))
    assert status == 1 and "--heads must be a multiple of --kv-heads, 2, got 3" in line


def test_output_that_cannot_be_written(folder, tmp_path, no_model, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out"))
    assert status == 2 and "argument --output: must be a folder to write to" in line
    status, line = error_of(capsys, lambda: run("eval", "--output", tmp_path / "scores.json"))
    assert status == 2 and "argument --output: must be a file to write to" in line


@pytest.mark.parametrize(
    "args, message",
    [
        (["--target", "z=0.5"], "targets names tasks that the data lack: z; they have x, y"),
        (["--budget", "z=0.5"], "budgets names tasks that the data lack: z; they have x, y"),
        (["--budget", "0.1", "--budget", "0.2"], "--budget: one amount may be without a task, got 2"),
        (["--budget", "0.1", "--budget", "x=0.2nats"], "--budget: all amounts must be shares, or all nats"),
        (["--budget", "0.1", "--target", "x=0.5"], "budget must be left out where targets"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--resume"], "has no checkpoint"),
        (["--resume", "none"], "none is no checkpoint of a FluxTrainer: there is no such folder"),
        (["--window", "100", "--align", "64"], "window must be"),
        (["--preset", "fa-xa", "--stride", "7"], "stride must"),
        (["--routers", "r", "--sink", "4"], "--sink is for new routers: those of --routers have settings of their own"),
        (["--routers", "r", "--preset", "fa-xa"], "--preset is for new routers"),
    ],
)
def test_errors_before_the_model_is_loaded(folder, tmp_path, no_model, capsys, args, message):
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out", *args))
    assert status == 1 and message in line


@pytest.mark.parametrize("name", [CONFIG_FILE, "recipe.json", "training_args.bin", "objective.safetensors"])
def test_files_of_something_else_are_not_replaced(folder, tmp_path, no_model, capsys, name):
    (tmp_path / name).write_text('{"model_type": "a model of somebody"}')
    status, line = error_of(capsys, lambda: train(folder, tmp_path))
    assert status == 1 and f"{tmp_path / name} " in line and "would be replaced" in line
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_routers_beside_their_model(folder, tmp_path):
    """And resumed: what the first training wrote is its own."""
    shutil.copytree(folder / "model", tmp_path / "model")
    before = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}
    common = ("--model", tmp_path / "model", "--batch-size", 2, "--save-steps", 1, *PATTERN)
    for more in (("--steps", 1), ("--steps", 2, "--resume")):
        assert train(folder, tmp_path / "model", *common, *more) == 0
    assert all((tmp_path / "model" / name).read_bytes() == content for name, content in before.items())
    assert len(FluxRouters.from_pretrained(tmp_path / "model").layers) == 2


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], {"budget": None, "budget_unit": "share", "budgets": {}}),
        (["0.02"], {"budget": 0.02, "budget_unit": "share", "budgets": {}}),
        (["0.02nats", "x=0", "y=1e-1nats"], {"budget": 0.02, "budget_unit": "nats", "budgets": {"x": 0.0, "y": 0.1}}),
        (["x=0.5"], {"budget": None, "budget_unit": "share", "budgets": {"x": 0.5}}),
    ],
)
def test_budgets(folder, tmp_path, options, expected):
    given = [a for amount in options for a in ("--budget", amount)]
    assert train(folder, tmp_path / "out", "--batch-size", 2, "--steps", 1, "--save-steps", 1, *PATTERN, *given) == 0
    recipe = json.loads((tmp_path / "out" / "checkpoint-1" / "recipe.json").read_text())
    assert {name: recipe[name] for name in expected} == expected


class Interrupted:
    """Presses Ctrl-C while a step of a training runs."""

    def __init__(self, monkeypatch, step, times):
        self.step, self.times, self.real = step, times, FluxTrainer.training_step
        monkeypatch.setattr(FluxTrainer, "training_step", lambda trainer, *args: self.run(trainer, *args))

    def run(self, trainer, *args):
        if trainer.state.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return self.real(trainer, *args)


STEPS = ("--batch-size", 2, "--steps", 5, "--save-steps", 3, *PATTERN)


def test_ctrl_c_writes_a_checkpoint_and_loses_nothing(folder, tmp_path, monkeypatch, capfd):
    assert train(folder, tmp_path / "whole", *STEPS) == 0
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patches:
        Interrupted(patches, step=2, times=1)
        assert train(folder, tmp_path / "out", *STEPS) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    text = capfd.readouterr().err
    assert "this step ends, then a checkpoint is written; Ctrl-C again stops at once" in text
    assert text.splitlines()[-1] == (
        f"flux-ext: stopped after step 2 of 5, with a checkpoint in {tmp_path / 'out'}: the same command with --resume "
        "goes on from there"
    )
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    assert train(folder, tmp_path / "out", *STEPS, "--resume") == 0
    want, got = (FluxRouters.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize(
    "step, left", [(2, "there is no checkpoint, all is lost"), (5, "goes on from {}, later steps are lost")]
)
def test_ctrl_c_twice_stops_at_once_and_says_what_is_lost(folder, tmp_path, monkeypatch, capsys, step, left):
    Interrupted(monkeypatch, step, times=2)
    assert train(folder, tmp_path / "out", *STEPS) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"interrupted after step {step - 1} of 5: " in last
    assert left.format(tmp_path / "out" / "checkpoint-3") in last


def test_the_end_of_a_training_says_what_came_of_it_and_what_to_do_next(folder, tmp_path, capsys):
    """Here nothing is sparse: routers that have learnt nothing start with everything full."""
    assert train(folder, tmp_path / "a b", "--batch-size", 8, "--steps", 2, "--lr", 1e-9, *PATTERN) == 0
    out, err = capsys.readouterr()
    assert re.search(r" 1/2 \[[^]]*, sparsity=0, price=\S+, extra_loss=0", err)  # figures from the first step on
    lines = out.splitlines()
    [head] = (i for i, line in enumerate(lines) if line.startswith("the latest 16 sequences, losses in nats"))
    names, *rows = (line.split("  ") for line in lines[head + 1 : head + 4])
    table = [[x.strip() for x in row if x.strip()] for row in (names, *rows)]
    assert table[0] == ["task", "sequences", "sparsity", "extra loss", "dense loss", "training loss"]
    for task, row in zip("xy", table[1:], strict=True):
        assert row[:4] == [task, "8", "0.00", "+0.0000"] and 2 < float(row[4]) < 8 and 2 < float(row[5]) < 8
    remark = lines[head + 4]
    assert remark.startswith("routed equals dense so far: for all of the latest 16 sequences")
    assert "sampling explores; in use argmax decides" in remark
    *_, written, score, generate = lines
    out = tmp_path / "a b"
    card = (out / "README.md").read_text()
    assert "2 of 2 steps of 8 sequences; objective counterfactual; budget 0.01 of the dense loss; learning" in card
    assert "\n".join(lines[head : head + 4]) in card
    assert written == f"routers written to {out}; next, on data that the training has not seen:"
    assert score == f"    flux-ext eval --model {folder / 'model'} --routers '{out}' --data FILE.jsonl"
    assert generate == f"    flux-ext generate --model {folder / 'model'} --routers '{out}' --prompt-file FILE.txt"


def test_targets_stand_in_the_table(folder, tmp_path, capsys):
    args = ("--batch-size", 8, "--steps", 2, "--target", "x=0.25", "--default-target", 0.75, *PATTERN)
    assert train(folder, tmp_path / "out", *args) == 0
    lines = capsys.readouterr().out.splitlines()
    names = lines.index("task  sequences  sparsity  target  training loss")
    assert [line.split()[3] for line in lines[names + 1 : names + 3]] == ["0.25", "0.75"]


def test_collapsed_routers_are_named(folder, tmp_path):
    with pytest.warns(UserWarning, match="the latest 64 sequences all the same routes, 0% sparse"):
        train(folder, tmp_path / "out", "--batch-size", 8, "--steps", 8, "--lr", 1e-9, *PATTERN)


def test_too_many_flips(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "out", "--flips", "3") == 1
    assert "flips must be at most the 2 routed layers, got 3" in capsys.readouterr().err.splitlines()[-1]


def test_data_with_half_a_surrogate_pair(folder, tmp_path, no_model, capsys):
    row = '{"context": "a \\ud83d b", "question": "q?", "answer": "ab", "task": "t"}\n'
    (tmp_path / "lone.jsonl").write_text(row)
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out", "--data", tmp_path / "lone.jsonl"))
    assert status == 1 and "lone.jsonl, line 1: the column 'context'" in line and "half of a surrogate pair" in line


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff\xfeO\0n\0c\0e\0", "must be UTF-8: invalid start byte at byte 0"),
        ("é".encode("latin-1"), "must be UTF-8: unexpected end of data at byte 0"),
        (b"", "is empty"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_bad_prompt_files(folder, tmp_path, no_model, capsys, content, message):
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    status, line = error_of(
        capsys, lambda: run("generate", "--model", "m", "--routers", "r", "--prompt-file", file, "--device", "cpu")
    )
    assert status == 1 and f"--prompt-file {file} {message}" in line
    status, line = error_of(
        capsys, lambda: run("generate", "--model", "m", "--routers", "r", "--prompt-file", tmp_path, "--device", "cpu")
    )
    assert status == 1 and f"--prompt-file {tmp_path} cannot be read: Is a directory" in line


def test_damaged_checkpoint(folder, routers, tmp_path, no_model, capsys):
    shutil.copytree(routers, tmp_path / "out")
    file = tmp_path / "out" / "checkpoint-4" / "objective.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out", "--resume", file.parent))
    assert status == 1 and f"{file} is damaged" in line
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out", "--resume"))
    assert status == 1 and f"no checkpoint in {tmp_path / 'out'} is whole: {file} is damaged" in line


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "is the folder of an earlier training (it has checkpoint-2, checkpoint-4, flux_config.json): go on with"),
        (["--resume", "--objective", "soft"], "was trained with objective 'counterfactual', not 'soft'"),
        (["--resume", "--lr", "1"], "goes on with initial_lr 0.001, the arguments ask for 1.0"),
        (["--resume", "--window", "9"], "have other settings than these options ask for: window: 9 and 8"),
        (["--resume", "--target", "x=0.25", "--granularity", "head"], "granularity: 'head' and 'layer'"),
        (["--resume", "--budget", "1"], "was trained with constraint 'targets', not 'budget'"),
    ],
)
def test_a_used_folder_is_gone_on_with_as_it_began_or_left_alone(
    folder, routers, tmp_path, no_model, capsys, args, message
):
    shutil.copytree(routers, tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    options = [*PATTERN, *args] if "--budget" in args else [*PATTERN, "--target", "x=0.25", *args]
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out", *options))
    assert status == 1 and message in line
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


def test_a_dry_run_may_name_a_used_folder(folder, routers, tmp_path):
    shutil.copytree(routers, tmp_path / "out")
    assert train(folder, tmp_path / "out", "--batch-size", 2, "--steps", 2, "--dry-run", *PATTERN) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_damaged_model(folder, routers, tmp_path, capsys, name):
    shutil.copytree(folder / "model", tmp_path / "model")
    content = (tmp_path / "model" / name).read_bytes()
    (tmp_path / "model" / name).write_bytes(content[: len(content) // 2])
    args = ("--routers", routers, "--prompt-file", folder / "prompt.txt", "--device", "cpu")
    assert run("generate", "--model", tmp_path / "model", *args) == 1
    assert f"--model {tmp_path / 'model'} cannot be loaded: " in capsys.readouterr().err.splitlines()[-1]


def test_routers_of_another_model_are_refused(folder, routers, capsys):
    config = json.loads((routers / CONFIG_FILE).read_text())
    other = folder / "other"
    other.mkdir()
    (other / WEIGHTS_FILE).write_bytes((routers / WEIGHTS_FILE).read_bytes())
    (other / CONFIG_FILE).write_text(json.dumps({**config, "model_type": "llama"}))
    prompt = folder / "prompt.txt"
    assert run("generate", "--model", folder / "model", "--routers", other, "--prompt-file", prompt) == 1
    assert "model_type" in capsys.readouterr().err


def test_training_into_the_models_own_folder_leaves_the_model(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    status = run(
        "train", "--model", model, "--data", folder / "data.jsonl", "--output", model, "--device", "cpu",
        "--steps", 1, "--batch-size", 2, *PATTERN,
    )  # fmt: skip
    assert status == 0
    assert {name: (model / name).read_bytes() for name in before} == before
    assert len(FluxRouters.from_pretrained(model).layers) == 2


@pytest.mark.parametrize("theirs", ["training_args.bin", "checkpoint-1/model.safetensors", CONFIG_FILE])
def test_training_does_not_replace_what_it_did_not_write(folder, tmp_path, no_model, capsys, theirs):
    file = tmp_path / "out" / theirs
    file.parent.mkdir(parents=True)
    file.write_bytes(b"theirs")
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out"))
    assert status == 1 and str(tmp_path / "out" / theirs.split("/")[0]) in line and "choose another" in line
    assert file.read_bytes() == b"theirs"
