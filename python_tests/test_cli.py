"""The command line, from training data to a generated text, on a tiny random model."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_folder import PATTERN, error_of, folder, no_model, routers, run, train  # noqa: F401 (fixtures)

from flux_ext import FluxConfig, FluxRouters
from flux_ext.caches.summary import letters
from flux_ext.cli import commands, dtypes, options
from flux_ext.cli.parser import parser
from flux_ext.config import PRESETS
from flux_ext.evaluation import MODES
from flux_ext.evaluation.ruler import TASKS, TRAINING_TASKS
from flux_ext.evaluation.tasks import SPLITS
from flux_ext.examples import load_examples
from flux_ext.routers.files import CONFIG_FILE, WEIGHTS_FILE
from flux_ext.training import Recipe, training_arguments
from flux_ext.training.config import FLIP_CHOICES, MULTIPLIER_FORMS, OBJECTIVES

# ruff: noqa: F811 (tests take them as arguments)


def test_what_the_parser_says_is_what_the_recipe_has(tmp_path):
    """It spells defaults and choices out, as help would have to import transformers for them."""
    train = ["train", "--model", "m", "--data", "d", "--output", str(tmp_path)]
    parse = parser(commands.COMMANDS).parse_args
    args, recipe, arguments = parse(train), Recipe(), training_arguments(str(tmp_path))
    options.fill_in_training(args)
    names = "objective multipliers multiplier_lr whiten flips flip_choice heads_per_flip start_bias"
    for name in [*names.split(), "default_target"]:
        assert getattr(args, name) == getattr(recipe, name), name
    assert (args.steps, args.lr) == (arguments.max_steps, arguments.learning_rate)
    assert args.logging_steps == arguments.logging_steps
    for name, choices in (
        ("objective", OBJECTIVES),
        ("multipliers", MULTIPLIER_FORMS),
        ("flip_choice", FLIP_CHOICES),
    ):
        for choice in choices:
            assert getattr(parse([*train, f"--{name.replace('_', '-')}", choice]), name) == choice
    evaluation = ["eval", "--model", "m", "--routers", "r", "--data", "d"]
    score = parse(evaluation)
    assert score.modes is None and tuple(parse([*evaluation, "--modes", *MODES]).modes) == MODES
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
    fast = "bfloat16" if "bf16" in facts["CPU kernels"].split(";")[0] else "float32"
    assert facts["CPU kernels"].endswith(f"; {fast} is the fast dtype here")


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_weights_are_loaded_as_stored_where_that_is_fast(folder, monkeypatch, tmp_path, fast):
    monkeypatch.setattr(dtypes, "fast_on_cpu", lambda: fast)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stored, loaded in {torch.bfloat16: fast, torch.float16: torch.float32, torch.float32: torch.float32}.items():
        AutoModelForCausalLM.from_pretrained(folder / "model").to(stored).save_pretrained(tmp_path / str(stored))
        AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / str(stored))
        for asked, got in {"auto": loaded, "float16": torch.float16}.items():
            args = argparse.Namespace(model=str(tmp_path / str(stored)), device="cpu", dtype=asked)
            assert commands.load_model(args, None)[0].dtype == got
    assert dtypes.default("cuda", torch.float32) == "auto"


def test_bench(capsys):
    assert run("bench", "--lengths", 64, "--repeats", 1, "--window", 16, "--sink", 4, "--device", "cpu") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "64"


def test_python_m():
    # From the folder of the package under test: in a checkout another one may lie in the working directory.
    folder = Path(commands.__file__).parents[2]
    done = subprocess.run([sys.executable, "-m", "flux_ext", "--version"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0 and done.stdout.startswith("flux-ext ")


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


def test_routers_beside_their_model(folder, tmp_path):
    """And resumed: what the first training wrote is its own."""
    shutil.copytree(folder / "model", tmp_path / "model")
    before = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}
    common = ("--model", tmp_path / "model", "--batch-size", 2, "--save-steps", 1, *PATTERN)
    for more in (("--steps", 1), ("--steps", 2, "--resume")):
        assert train(folder, tmp_path / "model", *common, *more) == 0
    assert all((tmp_path / "model" / name).read_bytes() == content for name, content in before.items())
    assert len(FluxRouters.from_pretrained(tmp_path / "model").layers) == 2


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
