"""What a training says of its cost: measured before it starts, and nothing changes."""

import re

import pytest
import torch
from tiny_training import Bytes, batch_rows, dataset, trainer

from flux_ext.examples import Example
from flux_ext.training import Recipe, RouterDataset
from flux_ext.training.callbacks import in_short
from flux_ext.training.dry_run import duration, lengths, peak, reset_peak

RECIPES = (Recipe(budget=0.05), Recipe(targets={"a": 0.5}), Recipe(objective="soft"))


def examples():
    """Fifty short ones and one long, far from where an even choice looks."""
    texts = ["x" * (20 + i % 5) for i in range(51)]
    texts[30] = "y" * 90
    return RouterDataset([Example(text, "q", "abc", "ab"[i % 2]) for i, text in enumerate(texts)], Bytes())


def seen_by(t):
    """Shapes of the batches that training_step is given."""
    shapes, stock = [], t.training_step

    def spy(model, inputs, *args):
        shapes.append(tuple(inputs["input_ids"].shape))
        return stock(model, inputs, *args)

    t.training_step = spy
    return shapes


def test_figures(tmp_path):
    t = trainer(tmp_path, recipe=Recipe(budget=0.05), data=examples(), per_device_train_batch_size=2,
                gradient_accumulation_steps=3, max_steps=7)  # fmt: skip
    shapes = seen_by(t)
    mean = sum(len(x["prompt"]) + len(x["answer"]) for x in batch_rows(t.train_dataset)) / 51
    cost = t.dry_run()
    assert (cost.steps, cost.sequences, cost.longest) == (7, 6, 95)
    assert cost.tokens == pytest.approx(6 * mean) and cost.positions == pytest.approx(mean) and cost.logits == 3
    assert 0.02 < cost.padding < 0.2 and cost.fits
    assert shapes[-1] == (2, 95) and all(width < 40 for _, width in shapes[:-1]), "the last one is the longest"
    weights = sum(x.nbytes for x in (*t.model.parameters(), *t.model.buffers()))
    assert cost.weights == weights < cost.memory
    assert all(0 < x < 100 for x in (cost.seconds, cost.new_seconds, cost.longest_seconds))
    share = 51 / 42  # of the steps, not more than all
    assert cost.total_seconds == pytest.approx(7 * (cost.seconds + min(1, share) * (cost.new_seconds - cost.seconds)))
    said = str(cost)
    assert "6 sequences of 28 in the mean, 95 at most" in said and "logits: of 3 positions" in said
    assert "; 7 steps in " in said
    packed = trainer(tmp_path, data=examples(), packed=True)
    assert lengths(packed).padding == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=["budget", "targets", "soft"])
def test_a_dry_run_changes_nothing(tmp_path, recipe):
    """Neither the routers, the draws, the prices nor what is known of the data: training afterwards is as without."""
    found = []
    for dry in (False, True):
        torch.manual_seed(5)
        t = trainer(tmp_path / str(dry), recipe=recipe, callbacks=None)
        if dry:
            before = {name: x.clone() for name, x in t.objective.state_dict().items()}
            routers = [p.clone() for p in t.routers.parameters()]
            modes, draws = [m.training for m in t.model.modules()], torch.get_rng_state()
            t.dry_run()
            assert all(torch.equal(a, b) for a, b in zip(routers, t.routers.parameters(), strict=True))
            assert all(torch.equal(x, before[name]) for name, x in t.objective.state_dict().items())
            assert modes == [m.training for m in t.model.modules()] and torch.equal(draws, torch.get_rng_state())
            assert len(t.dense_losses) == t.monitor.routes.count == t.state.global_step == 0
            assert all(p.grad is None for p in t.model.parameters())
            assert not list((tmp_path / "True").iterdir()) and not t.is_in_train
        t.train()
        logs = [
            {k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k}
            for log in t.state.log_history
        ]
        found.append((torch.cat([p.detach().flatten() for p in t.routers.parameters()]), logs))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_what_does_not_fit_is_extrapolated_and_said(tmp_path):
    t = trainer(tmp_path, data=examples(), per_device_train_batch_size=2)
    stock = t.training_step

    def step(model, inputs, *args):
        if inputs["input_ids"].shape[1] > 50:
            raise torch.OutOfMemoryError
        return stock(model, inputs, *args)

    t.training_step = step
    cost = t.dry_run()
    assert not cost.fits and "DO NOT FIT" in str(cost) and "--sequence-parallel" in str(cost)
    assert cost.longest_seconds > 2 * cost.seconds


@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_made_for_answers_only(tmp_path, packed):
    t = trainer(tmp_path, recipe=Recipe(budget=0.05), data=dataset(8, ragged=False), packed=packed, max_steps=2)
    seen = []
    t.model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[:2].numel()))
    t.train()
    assert len(seen) > 4 and max(seen) == 4 * 3, "of 3 answer tokens each"


def test_a_normal_training_says_it_too(tmp_path, capsys):
    trainer(tmp_path, data=examples(), max_steps=3, disable_tqdm=False).train()
    out = capsys.readouterr().out
    assert "3 steps of 4 sequences, about 11" in out and "the longest sequence has about 95" in out
    assert "a step takes about" in out and "GB of memory at the peak so far" in out


def test_behind_the_progress_bar_is_room_for_two_figures():
    tasks = [f"t{i}" for i in range(8)]
    figures = {"sparsity": 0.618, "budget": 0.015, "price": 0.1, "extra_loss": 0.0104, "routes_vary": 0.4}
    figures |= {f"{t}/{name}": 0.5 for t in tasks for name in ("sparsity", "lm_loss", "extra_loss")}
    assert in_short(figures, tasks) == "62% sparse, +0.010 of 0.015 nats lost"
    figures = {"sparsity": 0.25, "a/sparsity": 0.5, "a/target": 0.45, "b/sparsity": 0.31, "b/target": 0.7}
    assert in_short(figures | {"c/target": 1.0}, ["a", "b", "c"]) == "25% sparse, b 0.31 of 0.70"
    assert in_short({}, tasks) == ""
    figures = {"extra_loss": 0.02, "t0/extra_loss": 0.01, "t0/budget": 0.02, "t1/extra_loss": 0.01, "t1/budget": 0.0}
    assert in_short(figures, tasks) == "t1 +0.010 of 0.000 nats lost", "all have budgets of their own"


@pytest.mark.parametrize(
    "recipe, behind",
    [({"budget": 0.05}, r"\d+% sparse"), ({"targets": {"a": 0.5}}, r"% sparse, [ab] 0\.\d\d of 0\.50")],
)
def test_the_bar_of_a_training_has_them(tmp_path, capsys, recipe, behind):
    trainer(tmp_path, recipe=Recipe(whiten=0, **recipe), max_steps=2, disable_tqdm=False).train()
    assert re.search(behind, capsys.readouterr().err)


def test_the_peak_is_of_what_was_in_use_since(tmp_path):
    device = torch.device("cpu")
    reset_peak(device)
    before = peak(device)
    x = torch.ones(30_000_000)
    assert 0.9 * x.nbytes < peak(device) - before < 1.5 * x.nbytes
    del x
    reset_peak(device)
    assert peak(device) - before < 60_000_000


@pytest.mark.parametrize(
    "seconds, words", [(0.01234, "0.0123 s"), (75, "75 s"), (3000, "50 min"), (50_000, "13 h 53 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words
