"""Going on from a checkpoint: what goes on, what the new recipe changes, what is refused, and damaged files."""

import json
import pkgutil
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_training import Bytes, model, snapshot, trainer

import flux_ext
from flux_ext.examples import Example
from flux_ext.training import Recipe, RouterDataset
from flux_ext.training.checkpoint import latest_checkpoint


@pytest.mark.parametrize("objective", ["counterfactual", "soft", "even_odds"])
def test_resume_gives_the_same_routers(tmp_path, objective):
    recipe = Recipe(objective=objective, targets={"a": 0.3})
    through = trainer(tmp_path / "one", recipe=recipe, max_steps=6)
    through.train()
    first = trainer(tmp_path / "two", recipe=recipe, max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    folder = tmp_path / "two" / "checkpoint-3"
    assert {
        "flux_config.json",
        "flux_routers.safetensors",
        "objective.safetensors",
        "recipe.json",
        "optimizer.pt",
    } <= {f.name for f in folder.iterdir()}
    routers = flux_ext.FluxRouters.from_pretrained(folder)
    assert sum(p.numel() for p in routers.parameters()) == sum(p.numel() for p in through.routers.parameters())

    second = trainer(tmp_path / "two", recipe=recipe, max_steps=6)
    second.train(resume_from_checkpoint=str(folder))
    for a, b in zip(through.routers.parameters(), second.routers.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(through.objective.multipliers.lambda1, second.objective.multipliers.lambda1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints after steps 1 and 2, and the multipliers at the second."""
    folder = tmp_path_factory.mktemp("saved")
    recipe = Recipe(targets={"a": 0.9}, multiplier_lr=0.1)
    t = trainer(folder, recipe=recipe, max_steps=2, save_strategy="steps", save_steps=1)
    t.train()
    return folder, t.objective.multipliers.lambda1.clone()


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy that may be spoilt."""
    return Path(shutil.copytree(saved[0] / "checkpoint-2", tmp_path / "checkpoint-2"))


def test_the_new_recipe_counts_and_the_multipliers_go_on(saved, tmp_path):
    folder, multipliers = saved
    assert multipliers[0] > 0
    recipe = Recipe(targets={"a": 0.2}, default_target=0.3, multiplier_lr=0.5, flips=2, tau_end=0.5)
    t = trainer(tmp_path, recipe=recipe, max_steps=3, save_strategy="steps", save_steps=3)
    seen, ascend = [], t.objective.multipliers.ascend

    def spy(sparsity, count, own):
        seen.append((t.objective.multipliers.lambda1.clone(), sparsity.maximum(own).tolist(), count.tolist()))
        ascend(sparsity, count, own)

    t.objective.multipliers.ascend = spy
    t.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    [(before, sparsity, count)] = seen
    assert torch.equal(before, multipliers)
    assert t.objective.multipliers.target.tolist() == pytest.approx([0.2, 0.3])
    for k, target in enumerate((0.2, 0.3)):
        moved = max(0.0, before[k].item() + 0.5 * (target - sparsity[k])) if count[k] else before[k].item()
        assert t.objective.multipliers.lambda1[k].item() == pytest.approx(moved, abs=1e-6)
    written = json.loads((tmp_path / "checkpoint-3" / "recipe.json").read_text())
    assert written["targets"] == {"a": 0.2} and written["flips"] == 2
    assert t.state.log_history[-2]["a/target"] == pytest.approx(0.2)


def test_another_dtype_is_said(saved, tmp_path):
    """What ``--dtype auto`` means differs between machines: the training goes on, and says so."""
    folder = saved[0] / "checkpoint-2"
    assert json.loads((folder / "recipe.json").read_text())["dtype"] == "float32"
    recipe = Recipe(targets={"a": 0.9}, multiplier_lr=0.1)
    other = model()
    other.to(torch.bfloat16)
    flux_ext.get_routers(other).float()
    t = trainer(tmp_path, other, recipe=recipe, max_steps=3)
    with pytest.warns(UserWarning, match=r"in float32, and .* goes on in bfloat16: .*--dtype float32"):
        t.train(resume_from_checkpoint=str(folder))
    assert t.state.global_step == 3

    earlier = Path(shutil.copytree(folder, tmp_path / "checkpoint-2"))
    written = json.loads((earlier / "recipe.json").read_text())
    del written["dtype"]
    (earlier / "recipe.json").write_text(json.dumps(written))
    for m, unknown in ((other, earlier), (model(), folder)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*goes on in")
            trainer(tmp_path, m, recipe=recipe, max_steps=2).train(resume_from_checkpoint=str(unknown))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"recipe": Recipe(objective="soft", targets={"a": 0.9})},
            "was trained with objective 'counterfactual', not 'soft'",
        ),
        ({"recipe": Recipe(multipliers="published")}, "was trained with multipliers 'inequality', not 'published'"),
        ({"recipe": Recipe(start_bias=3)}, "was trained with start_bias 2.0, not 3"),
        ({"recipe": Recipe(budgets={"a": 0.1})}, "was trained with constraint 'targets', not 'budget, budget of a'"),
        ({"learning_rate": 1e-3}, "optimizer.pt goes on with initial_lr 0.01, the arguments ask for 0.001"),
        ({"weight_decay": 0.0}, "optimizer.pt goes on with weight_decay 0.1, the arguments ask for 0.0"),
        ({"data": RouterDataset([Example("a", "b", "c", "z")], Bytes())}, r"tasks \('a', 'b'\), not \('z',\)"),
        ({"m": "head"}, "have other settings: granularity"),
    ],
    ids=[
        "objective",
        "multipliers",
        "start_bias",
        "constraint",
        "learning_rate",
        "weight_decay",
        "tasks",
        "granularity",
    ],
)
def test_what_cannot_change_is_refused_by_name(saved, tmp_path, options, message):
    options = {"recipe": Recipe(targets={"a": 0.9}), **options}
    recipe = options["recipe"] if "data" not in options else Recipe(default_target=0.5)
    t = trainer(tmp_path, model(options.pop("m", "layer")), **{**options, "recipe": recipe})
    assert_refused(t, saved[0] / "checkpoint-2", message)


def assert_refused(t, folder, message):
    """Resuming is a ValueError that matches, and changes nothing."""
    before, state = snapshot(t.routers), t.objective.state_dict()
    state = {name: x.clone() for name, x in state.items()}
    with pytest.raises(ValueError, match=message):
        t.train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(p, before[name]) for name, p in t.routers.named_parameters())
    assert all(torch.equal(x, state[name]) for name, x in t.objective.state_dict().items())
    assert t.state.global_step == 0


TRAINERS = (
    "objective.safetensors", "recipe.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"
)  # fmt: skip


def file_of(folder, name):
    """A file of a checkpoint; the routers' by its ending."""
    return folder / name if name in TRAINERS else next(f for f in folder.glob(f"*{name}") if f.name not in TRAINERS)


@pytest.mark.parametrize("name", ["config.json", ".safetensors", *TRAINERS])
def test_a_file_cut_short_is_named(checkpoint, tmp_path, name):
    file = file_of(checkpoint, name)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert_refused(trainer(tmp_path), checkpoint, rf"{re.escape(str(file))} (is|cannot|has)")


@pytest.mark.parametrize("name", ["config.json", ".safetensors", *TRAINERS[:-1]])
def test_a_missing_file_is_named(checkpoint, tmp_path, name):
    file = file_of(checkpoint, name)
    file.unlink()
    assert_refused(trainer(tmp_path), checkpoint, rf"{re.escape(str(checkpoint))}.*{re.escape(file.name)}")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_changed_byte_is_found(checkpoint, tmp_path, name):
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(bytes(content))
    assert_refused(trainer(tmp_path), checkpoint, rf"{re.escape(name)} is damaged")


def test_other_contents_are_named(checkpoint, tmp_path):
    torch.save([1], checkpoint / "optimizer.pt")
    assert_refused(trainer(tmp_path), checkpoint, r"optimizer\.pt is damaged")
    recipe = json.loads((checkpoint / "recipe.json").read_text())
    (checkpoint / "recipe.json").write_text(json.dumps({**recipe, "flips": "two"}))
    assert_refused(trainer(tmp_path), checkpoint, r"recipe\.json is damaged: flips must be >= 1 and whole, got two")
    (checkpoint / "recipe.json").write_text("[]")
    assert_refused(trainer(tmp_path), checkpoint, r"recipe\.json is damaged: it must hold an object, it holds a list")


def test_an_objective_of_other_shapes_is_refused(checkpoint, tmp_path):
    save_file({"deck": torch.zeros(1)}, checkpoint / "objective.safetensors")
    assert_refused(
        trainer(tmp_path), checkpoint, r"objective\.safetensors is damaged: deck must be of shape \[2, 3\], it is \[1\]"
    )


def test_the_newest_whole_checkpoint_counts(saved, tmp_path):
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    assert latest_checkpoint(folder) == str(folder / "checkpoint-2") and latest_checkpoint(tmp_path / "none") is None
    state = folder / "checkpoint-2" / "trainer_state.json"
    state.write_text('{"epoch": 1')
    t = trainer(folder)
    with pytest.raises(ValueError, match=r"checkpoint-2/trainer_state\.json is damaged"):  # asked for by name
        t.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.warns(UserWarning, match=r"checkpoint-1: .*checkpoint-2/trainer_state\.json is damaged"):
        assert latest_checkpoint(folder) == str(folder / "checkpoint-1")
    with pytest.warns(UserWarning, match="checkpoint-1"):
        t.train(resume_from_checkpoint=True)
    assert t.state.global_step == 4
    (folder / "checkpoint-1" / "whole.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .*copy is whole: .*checkpoint-1 .*cut off"):
        latest_checkpoint(folder)


class Killed(BaseException):
    """The end of the machine: nothing handles it."""


WRITES = (
    ("begun", "flux_ext.training.trainer.begin", 0),
    ("routers", "flux_ext.training.trainer.check_output_folder", 1),  # the first one is before the training
    ("objective", "flux_ext.training.trainer.save_file", 0),
    ("rest", "torch.save", 0),
    ("optimizer", "torch.save", 1),
    ("scheduler", "torch.save", 2),
    ("draws", "torch.save", 3),
    ("draws of the objective", "flux_ext.training.trainer.save_file", 1),
    ("state", "transformers.TrainerState.save_to_json", 0),
    ("mark", "flux_ext.training.trainer.finish", 0),
    ("old ones", "flux_ext.training.trainer.rotate_checkpoints", 0),
)
"""What is called on the way to a whole checkpoint, and the how manieth call."""


@pytest.mark.parametrize("where, count", [w[1:] for w in WRITES], ids=[w[0] for w in WRITES])
def test_the_end_of_the_machine_while_it_writes_a_checkpoint_loses_no_earlier_one(
    saved, tmp_path, monkeypatch, where, count
):
    """Whatever was written last: the first checkpoint is there, and resuming from it gives what was to come."""
    recipe = Recipe(targets={"a": 0.9}, multiplier_lr=0.1)
    folder = tmp_path / "run"
    shutil.copytree(saved[0] / "checkpoint-1", folder / "checkpoint-1")
    options = {"recipe": recipe, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    t = trainer(folder, **options)
    calls, owner = [], pkgutil.resolve_name(where.rpartition(".")[0])
    stock = getattr(owner, where.rpartition(".")[2])

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) > count:
            raise Killed
        return stock(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(where, killed)
        t.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    newest = folder / "checkpoint-2"
    if where.endswith("rotate_checkpoints"):
        assert latest_checkpoint(folder) == str(newest)
        return
    began = newest.is_dir()
    assert began == (where.rpartition(".")[2] not in ("begin", "check_output_folder"))
    again = trainer(folder, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint=True)
    assert began == any("checkpoint-2 is no whole checkpoint: its writing was cut off" in str(w.message) for w in said)
    assert torch.equal(again.objective.multipliers.lambda1, saved[1])
    assert latest_checkpoint(folder) == str(newest) and not (folder / "checkpoint-1").exists()
    one, two = (flux_ext.FluxRouters.from_pretrained(f / "checkpoint-2") for f in (folder, saved[0]))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_no_such_checkpoint(tmp_path):
    assert_refused(
        trainer(tmp_path), tmp_path / "none", "none is no checkpoint of a FluxTrainer: there is no such folder"
    )
