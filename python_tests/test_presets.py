"""The papers' presets: in Python, on the command line, and as docs/training.md says them."""

import ast
import re
from pathlib import Path

import pytest
from cli_folder import error_of, folder, no_model, train  # noqa: F401 (fixtures)

from flux_ext import FluxConfig
from flux_ext.cli import commands, options
from flux_ext.cli.parser import parser
from flux_ext.config import PAPERS
from flux_ext.training import Recipe, training_arguments
from flux_ext.training.config import PAPER_RECIPES

# ruff: noqa: F811 (tests take them as arguments)

DOCUMENTED = Path(__file__).parents[1] / "docs" / "training.md"


def documented(name):
    """The settings that the table of docs/training.md has for a preset."""
    section = DOCUMENTED.read_text().split("### As the papers train")[1].split("\n### ")[0]
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in section.splitlines() if line[:1] == "|"
    ]
    header, _, *rows = [row for row in rows if len(row) == 3]
    column = next(i for i, cell in enumerate(header) if f"`{name}`" in cell)
    found = {}
    for row in rows:
        names = re.findall(r"`([^`]+)`", row[0])
        values = ast.literal_eval(f"[{row[column].replace('`', '')}]")
        found |= dict(zip(names, values, strict=True))
    return found


def parsed(tmp_path, *given):
    args = parser(commands.COMMANDS).parse_args(
        ["train", "--model", "m", "--data", "d", "--output", str(tmp_path), *given]
    )
    options.fill_in_training(args)
    return args


@pytest.mark.parametrize("name", PAPERS)
def test_python_sets_what_the_documentation_says(name, tmp_path):
    wanted = documented(name)
    assert len(wanted) == 26
    config, recipe = FluxConfig.preset(name), Recipe.preset(name)
    arguments = training_arguments(str(tmp_path), preset=name, use_cpu=True)
    wanted.pop("--max-length")
    for setting, value in wanted.items():
        holder = next(x for x in (config, recipe, arguments) if hasattr(x, setting))
        assert getattr(holder, setting) == value, setting
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert (arguments.per_device_train_batch_size, batch) == (1, 48)


@pytest.mark.parametrize("name", PAPERS)
def test_so_does_the_command_line(name, tmp_path):
    args, wanted = parsed(tmp_path, "--preset", name), documented(name)
    assert options.config_of(args) == FluxConfig.preset(name)
    for option, setting in {
        "objective": "objective", "default_target": "default_target", "multipliers": "multipliers", "whiten": "whiten",
        "multiplier_lr": "multiplier_lr", "lr": "learning_rate", "steps": "max_steps", "max_length": "--max-length",
    }.items():  # fmt: skip
        assert getattr(args, option) == wanted[setting], option
    assert dict(args.target) == wanted["targets"] and (args.batch_size, args.accumulate) == (1, 48)


def test_what_is_given_counts_instead(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "5")  # as torchrun sets it
        args = parsed(
            tmp_path, "--preset", "flux", "--target", "x=0.2", "--lr", "0.1", "--batch-size", "4", "--max-length", "99"
        )
    assert (args.target, args.lr, args.max_length) == ([("x", 0.2)], 0.1, 99)
    assert (args.batch_size, args.accumulate) == (4, 3), "4 * 5 * 3 sequences: the first multiple of 20 from 48 on"
    assert Recipe.preset("elastic", objective="soft").objective == "soft"
    arguments = training_arguments(
        str(tmp_path), preset="flux", learning_rate=0.1, per_device_train_batch_size=2, use_cpu=True
    )
    assert (arguments.learning_rate, arguments.gradient_accumulation_steps) == (0.1, 24)


def test_a_budget_beside_a_papers_targets_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="--budget must be left out with --preset flux"):
        parsed(tmp_path, "--preset", "flux", "--budget", "0.01")


def test_modes_have_no_recipe():
    with pytest.raises(ValueError, match="got 'fa-xa' .modes without a recipe: FluxConfig.preset"):
        Recipe.preset("fa-xa")


@pytest.mark.parametrize("size", [0, -1, "4", True])
def test_a_batch_size_that_is_none_is_refused_by_name(tmp_path, size):
    with pytest.raises(ValueError, match="per_device_train_batch_size must be a whole number of 1 or more, got"):
        training_arguments(str(tmp_path), preset="flux", per_device_train_batch_size=size)


def test_other_commands_offer_modes_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parser(commands.COMMANDS).parse_args(
            ["frontier", "--model", "m", "--data", "d", "--test", "t", "--output", str(tmp_path), "--preset", "flux"]
        )
    assert "invalid choice: 'flux'" in capsys.readouterr().err


def test_without_a_paper_the_defaults_are_as_ever(tmp_path):
    args = parsed(tmp_path)
    assert {name: getattr(args, name) for name in options.TRAINING} == options.TRAINING
    assert (args.target, args.default_target, args.max_length, args.whiten) == ([], None, None, None)
    default = Recipe()
    assert all(getattr(default, n) == v for n, v in options.TRAINING.items() if hasattr(default, n))


def test_unknown_presets(tmp_path):
    for function in (Recipe.preset, lambda name: training_arguments(str(tmp_path), preset=name)):
        with pytest.raises(ValueError, match=r"a preset must be one of \('flux', 'elastic'\), got 'fa-ssa'"):
            function("fa-ssa")
    with pytest.raises(ValueError, match="a preset must be one of .*'xa-ssa', 'flux', 'elastic'.*, got 'x'"):
        FluxConfig.preset("x")
    assert list(PAPERS) == list(PAPER_RECIPES)


@pytest.mark.usefixtures("no_model")
def test_tasks_that_need_retrieval_must_be_named(folder, tmp_path, capsys):
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out", "--preset", "flux"))
    assert status == 1 and "has a target for tasks called 'retrieval', and the data have x, y" in line
    assert "--target x=0.45" in line
    status, line = error_of(
        capsys, lambda: train(folder, tmp_path / "out", "--preset", "flux", "--budget", "0.1", "--target", "x=0.5")
    )
    assert status == 1 and "budget must be left out" in line


@pytest.mark.parametrize("name", PAPERS)
def test_a_training_by_a_preset(name, folder, tmp_path):
    out = tmp_path / "out"
    assert train(
        folder, out, "--preset", name, "--target", "x=0.45", "--steps", "1", "--accumulate", "1", "--window", "128",
    ) == 0  # fmt: skip
    import json

    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["objective"] == PAPER_RECIPES[name]["objective"] and recipe["default_target"] == 1.0
