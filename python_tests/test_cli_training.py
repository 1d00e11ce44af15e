"""`flux-ext train` on a tiny random model: what it writes, says, refuses and goes on with."""

import json
import re
import shutil
import signal

import pytest
import torch
from cli_folder import PATTERN, error_of, folder, no_model, routers, run, train  # noqa: F401 (fixtures)

from flux_ext import FluxRouters
from flux_ext.examples import Example
from flux_ext.routers.files import CONFIG_FILE
from flux_ext.training import FluxTrainer, save_examples

# ruff: noqa: F811 (tests take them as arguments)


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


@pytest.mark.parametrize("option, expected", [((), True), (("--no-gradient-checkpointing",), False)])
def test_routers_per_head_learn_straight_through_and_hold_the_layers_inputs_alone(
    folder, tmp_path, monkeypatch, option, expected
):
    seen = []

    def watched(self, *args, **kwargs):
        seen.append(any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()))
        return step(self, *args, **kwargs)

    step = FluxTrainer.training_step
    monkeypatch.setattr(FluxTrainer, "training_step", watched)
    common = ("--steps", 1, "--batch-size", 2, "--no-calibrate", "--granularity", "head", *PATTERN, *option)
    assert train(folder, tmp_path, *common) == 0
    assert json.loads((tmp_path / "recipe.json").read_text())["objective"] == "straight_through"
    assert seen == [expected]


def test_options_of_flips_are_refused_where_nothing_is_flipped(folder, tmp_path, capsys):
    assert train(folder, tmp_path, "--granularity", "head", "--flips", 2, *PATTERN) == 1
    assert "flips must be left out, got 2: it is of counterfactuals" in capsys.readouterr().err


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
        folder, tmp_path, "--steps", 1, "--batch-size", 2, "--start-bias", 1.25, "--no-calibrate",
        *(("--routers", routers) if given else PATTERN),
    ) == 0  # fmt: skip
    starts = [r.classifier[-1].bias[1].item() for r in FluxRouters.from_pretrained(routers).layers]
    ends = [r.classifier[-1].bias[1].item() for r in FluxRouters.from_pretrained(tmp_path).layers]
    assert ends == pytest.approx(starts if given else [1.25] * 2, abs=1e-2)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--calibration-data", "none.jsonl"], "none.jsonl: no such file"),
        (["--calibration-data", "f", "--no-calibrate"], "--calibration-data must be left out with --no-calibrate"),
        (["--calibration-data", "f", "--target", "x=0"], "--calibration-data must be left out with targets"),
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


@pytest.mark.parametrize("steps", [4, 3])
def test_a_resumed_training_with_nothing_left_to_do_says_so(folder, routers, tmp_path, capfd, steps):
    out = shutil.copytree(routers, tmp_path / "out")
    options = ("--steps", steps, "--batch-size", 2, "--accumulate", 2, "--target", "x=0.25", *PATTERN)
    capfd.readouterr()
    assert train(folder, out, *options, "--resume") == 0
    text = "".join(capfd.readouterr())
    assert f"nothing is left to do: the checkpoint is at step 4, and {steps} steps were asked for" in text
    assert f"routers written to {out}; next" in text and "steps of 4 sequences" not in text
    want, got = (FluxRouters.from_pretrained(folder).state_dict() for folder in (routers, out))
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
    assert re.search(r" 1/2 \[[^]]*, 0% sparse, \+0\.000 of 0\.\d+ nats lost", err)  # figures from the first step on
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


def last_biases(path):
    return torch.stack([r.last_bias.detach() for r in FluxRouters.from_pretrained(path).layers])


def test_a_budget_is_met_at_the_end(folder, tmp_path, capsys):
    """Where anything may be lost, all becomes sparse; of what the same training leaves without calibration the last
    biases alone are shifted, all alike. What there is to be said stands in the card."""
    common = ("--batch-size", 4, "--steps", 1, "--budget", "9nats", *PATTERN)
    assert train(folder, tmp_path / "as trained", *common, "--no-calibrate") == 0
    assert "calibrated" not in capsys.readouterr().out
    assert train(folder, tmp_path / "out", *common) == 0
    out = capsys.readouterr().out
    assert "calibrated on the examples that were trained on: no task has eight" in out
    assert re.search(r"^ +1\.000 .* 9\.0000  <- taken$", out, re.MULTILINE)
    assert "Calibrated on 8 sequences: sparsity 1.000" in (tmp_path / "out" / "README.md").read_text()
    shift = last_biases(tmp_path / "out") - last_biases(tmp_path / "as trained")
    assert shift[:, 0].abs().max() == 0 and shift[0, 1] < -1 and torch.allclose(shift[:, 1], shift[0, 1])


def test_an_eighth_of_the_data_is_kept_to_calibrate_on(folder, tmp_path, capsys):
    rows = [Example(f"text {i} " * 20, "what?", f"a{i}", "xy"[i % 2]) for i in range(40)]
    save_examples(rows, tmp_path / "data.jsonl")
    arguments = ("--data", tmp_path / "data.jsonl", "--batch-size", 4, "--steps", 1, *PATTERN)
    assert train(folder, tmp_path / "out", *arguments) == 0
    out = capsys.readouterr().out
    assert "calibrated on examples that were not trained on" in out and "of 4 sequences" in out
    more = ("--calibration-data", folder / "data.jsonl", "--budget", "y=0")
    assert train(folder, tmp_path / "more", *arguments, *more) == 0
    assert "of 8 sequences" in capsys.readouterr().out


def test_a_resumed_training_keeps_apart_what_it_is_calibrated_on(folder, tmp_path, capsys):
    rows = [Example(f"text {i} " * 20, "what?", f"a{i}", "xy"[i % 2]) for i in range(40)]
    save_examples(rows, tmp_path / "data.jsonl")
    arguments = ("--data", tmp_path / "data.jsonl", "--batch-size", 4, "--save-steps", 1, *PATTERN)
    assert train(folder, tmp_path / "out", *arguments, "--steps", 1, "--no-calibrate") == 0
    capsys.readouterr()
    status, line = error_of(capsys, lambda: train(folder, tmp_path / "out", *arguments, "--steps", 2, "--resume"))
    assert status == 1 and "was trained on other examples than --data now gives" in line
    assert train(folder, tmp_path / "out", *arguments, "--steps", 2, "--no-calibrate", "--resume") == 0


def test_calibrate(folder, routers, tmp_path, capsys):
    common = ("calibrate", "--model", folder / "model", "--routers", routers, "--data", folder / "data.jsonl",
              "--device", "cpu", "--output")  # fmt: skip
    for budget, sparsity, margin in (("9nats", "1.000", 1), ("0nats", "0.000", 9)):
        assert run(*common, tmp_path / budget, "--budget", budget, "--margin", margin, "--packed") == 0
        out = capsys.readouterr().out
        assert f"routers written to {tmp_path / budget}" in out
        card = (tmp_path / budget / "README.md").read_text()
        assert f"sparsity {sparsity}" in card and "steps of" in card  # how they were trained stays
    apart = last_biases(tmp_path / "0nats") - last_biases(tmp_path / "9nats")
    assert apart[:, 0].abs().max() == 0 and apart[0, 1] > 1 and torch.allclose(apart[:, 1], apart[0, 1])


def test_calibrate_checks_before_the_model_is_loaded(folder, routers, tmp_path, no_model, capsys):
    common = ("calibrate", "--model", folder / "model", "--routers", routers, "--data", folder / "data.jsonl",
              "--device", "cpu", "--output")  # fmt: skip
    (tmp_path / CONFIG_FILE).write_text('{"model_type": "a model of somebody"}')
    for more, message in (
        ((tmp_path / "out", "--budget", "z=0.1"), "budgets names tasks that the data lack: z; they have x, y"),
        ((tmp_path,), "was not written by flux_ext and would be replaced"),
    ):
        status, line = error_of(capsys, lambda more=more: run(*common, *more))
        assert status == 1 and message in line


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
