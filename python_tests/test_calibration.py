"""Calibration: the sparsest threshold of trained routers at which a budget is kept, of all that there are."""

import math
import warnings

import pytest
import torch
from tiny_training import LAYERS, Bytes, dataset, model, trainer

import flux_ext
from flux_ext.examples import Example
from flux_ext.models import patching
from flux_ext.training import PackedCollator, PaddedCollator, Recipe, RouterDataset, calibrate, calibration
from flux_ext.training.backbone import losses
from flux_ext.training.calibration import Calibrator
from flux_ext.training.data import HELD_OUT, hold_out

NATS = {"budget_unit": "nats", "whiten": 0}


def routed_model(granularity="layer", spread=100.0):
    """Routers whose log-odds differ by prompt and lie about 0."""
    m = model(granularity)
    with torch.no_grad():
        for router in flux_ext.get_routers(m).layers:
            router.classifier[-1].weight.mul_(spread)
    return m


def biases(m):
    return torch.stack([router.last_bias.detach().clone() for router in flux_ext.get_routers(m).layers])


def shares_and_odds(m, data):
    """Share of sparse attention of each example under the routers' own routes, and log-odds."""
    shares, odds = [], []
    for i in range(len(data)):
        seen = []

        def own(layer, logits, seen=seen):
            seen.append(logits[..., 1] - logits[..., 0])
            return (seen[-1] <= 0).int()

        with torch.no_grad(), patching.policy(m, own):
            losses(m, PaddedCollator()([data[i]]))
        z = torch.cat([x.flatten() for x in seen])
        shares.append(float((z <= 0).float().mean()))
        odds.append(z)
    return torch.tensor(shares), torch.cat(odds)


@pytest.fixture
def convex(monkeypatch):
    """A loss of which the share of sparse attention is known to cost ``0.3 * share^2``: more is lost, the sparser."""

    def known(m, batch, group=None):
        real = losses(m, batch, group)
        routes = patching.last_routing(m).routes.float()
        return 1 + 0.3 * routes.flatten(1).mean(1).square() + 0 * real

    monkeypatch.setattr(calibration, "losses", known)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("budget", [0.004, 0.03, 0.15])
def test_the_sparsest_threshold_that_keeps_to_the_budget(convex, granularity, budget):
    m, data = routed_model(granularity), dataset()
    before = biases(m)
    found = calibrate(m, data, Recipe(budget=budget, **NATS), margin=0, tries=40, progress=False)
    chosen = found.chosen
    assert torch.allclose(biases(m) - before, torch.tensor([0.0, chosen.shift]).expand(LAYERS, 2), atol=1e-5)
    shares, odds = shares_and_odds(m, data)  # as folded: what is reported is what is used
    assert chosen.sparsity == pytest.approx(shares.mean().item(), abs=1e-6)
    assert chosen.budgets[""].extra == pytest.approx(0.3 * shares.square().mean().item(), rel=1e-4)
    assert 0 < chosen.budgets[""].extra <= budget and chosen.budgets[""].budget == budget
    # The next unit to become sparse would cost more than the budget.
    nearest = odds[odds > 0].min()
    with torch.no_grad():
        for router in flux_ext.get_routers(m).layers:
            router.last_bias[1] -= nearest * (1 + 1e-4) + 1e-6
    assert 0.3 * shares_and_odds(m, data)[0].square().mean() > budget
    assert [p.sparsity for p in found.tried] == sorted(p.sparsity for p in found.tried) and found.tried[0].shift > 0
    assert "<- taken" in str(found) and f"{chosen.shift:+.3f}" in found.record()


def test_a_margin_of_standard_errors_stays_below_the_budget(convex):
    data = dataset()
    points = {}
    for margin in (0, 1, 3):
        points[margin] = calibrate(
            routed_model(), data, Recipe(budget=0.05, **NATS), margin=margin, tries=40, progress=False
        ).chosen
        lost = points[margin].budgets[""]
        assert lost.extra + margin * lost.error <= 0.05
    assert points[3].sparsity < points[1].sparsity < points[0].sparsity
    m = routed_model()
    with torch.no_grad():
        for router in flux_ext.get_routers(m).layers:
            router.last_bias[1] += points[1].shift
    extra = 0.3 * shares_and_odds(m, data)[0].square()
    assert points[1].budgets[""].error == pytest.approx(extra.std().item() / math.sqrt(len(extra)), rel=1e-4)


@pytest.mark.parametrize("budget, sparsity", [(0.0, 0.0), (1.0, 1.0)])
def test_the_ends_are_beyond_what_was_seen(convex, budget, sparsity):
    """All full loses nothing, so a budget can always be kept; and where all sparse does too, all is sparse."""
    m, data = routed_model(), dataset()
    found = calibrate(m, data, Recipe(budget=budget, **NATS), tries=20, progress=False)
    assert found.chosen.sparsity == sparsity
    _, odds = shares_and_odds(m, data)
    assert bool((odds <= 0).all()) == (sparsity == 1) and odds.abs().min() > 0.5
    assert any("all is full" in note for note in found.notes) == (sparsity == 0)


@pytest.mark.parametrize("bias, budget, sparsity", [(1.0, 1.0, 1.0), (-1.0, 0.1, 0.0), (0.0, 1.0, 1.0)])
def test_ties_go_together(convex, bias, budget, sparsity):
    """Routers that say the same of everything can be all full or all sparse."""
    m = routed_model(spread=0.0)
    with torch.no_grad():
        for router in flux_ext.get_routers(m).layers:
            router.last_bias[1] = bias
    found = calibrate(m, dataset(), Recipe(budget=budget, **NATS), progress=False)
    assert found.chosen.sparsity == sparsity and {p.sparsity for p in found.tried} <= {0.0, 1.0}


def test_one_prompt_counts_by_its_own_loss(convex):
    m = routed_model()
    found = calibrate(m, dataset(1), Recipe(budget=0.04, **NATS), tries=20, progress=False)
    lost = found.chosen.budgets[""]
    assert math.isnan(lost.error) and lost.sequences == 1 and lost.extra <= 0.04 < 0.3 * (2 / 3) ** 2
    assert found.chosen.sparsity == pytest.approx(1 / 3)
    assert any("one sequence says nothing of its standard error" in note for note in found.notes)


def test_the_strictest_of_the_budgets_decides(convex):
    def at(recipe):
        return calibrate(routed_model(), dataset(), recipe, margin=0, tries=40, progress=False).chosen

    loose, strict = at(Recipe(budget=0.2, **NATS)), at(Recipe(budget=0.2, budgets={"b": 0.02}, **NATS))
    assert strict.sparsity < loose.sparsity
    assert strict.budgets["b"].extra <= 0.02 < loose.tasks["b"].extra
    assert set(strict.budgets) == {"", "b"} and strict.budgets[""].sequences == strict.budgets["b"].sequences == 6
    assert strict.tasks["b"] == strict.budgets["b"]


def test_several_budgets_share_what_was_measured(convex):
    """Each finds what it would find alone, the later ones with fewer forwards; the routers stay as they are."""
    m, data = routed_model(), dataset()
    before = biases(m)
    together, runs = Calibrator(m, data, progress=False), []
    for budget in (0.03, 0.15, 0.004):
        known = len(together._known)
        got = together.find(Recipe(budget=budget, **NATS), margin=0, tries=40)
        runs.append(len(together._known) - known)
        alone = Calibrator(m, data, progress=False).find(Recipe(budget=budget, **NATS), margin=0, tries=40)
        assert (got.chosen.sparsity, got.chosen.shift) == pytest.approx((alone.chosen.sparsity, alone.chosen.shift))
    assert runs[0] > 2 and 0 < runs[1] < runs[0] and 0 < runs[2] < runs[0]
    assert torch.equal(biases(m), before)


def test_a_share_is_of_the_mean_dense_loss():
    m, data = routed_model(), dataset()
    found = calibrate(m, data, Recipe(budget=0.1, whiten=0), tries=1, progress=False)
    with torch.no_grad(), patching.routes(m, "full"):
        dense = losses(m, PaddedCollator()([data[i] for i in range(len(data))])).mean().item()
    assert found.chosen.budgets[""].budget == pytest.approx(0.1 * dense, rel=1e-5)
    assert found.chosen.budgets[""].dense == pytest.approx(dense, rel=1e-5)


def test_tasks_that_others_pay_for_are_named(monkeypatch):
    def known(m, batch, group=None):
        losses(m, batch, group)
        share = patching.last_routing(m).routes.float().flatten(1).mean(1)
        return 1 + torch.where(batch["task_ids"] == 0, 0.2, -0.2) * share

    monkeypatch.setattr(calibration, "losses", known)
    found = calibrate(routed_model(), dataset(), Recipe(budget=0.02, **NATS), margin=0, tries=20, progress=False)
    assert found.chosen.budgets[""].extra <= 0.02 < found.chosen.tasks["a"].extra
    *others, note = found.notes
    assert [n.split(",")[0] for n in others] == [
        "12 sequences are few: what they lose says little of others (some 128 are enough)",
        "all is sparse",
    ]
    assert note.startswith("the budget is kept in the mean over the data, but exceeded in a (+0.")
    assert "b (" not in note


@pytest.mark.parametrize("noise, margin, said", [(1.0, 1.0, True), (1.0, 0.0, False), (0.05, 1.0, False)])
def test_a_margin_that_takes_most_of_a_budget_is_named(monkeypatch, noise, margin, said):
    def known(m, batch, group=None):
        losses(m, batch, group)
        share = patching.last_routing(m).routes.float().flatten(1).mean(1)
        return 1 + share * (0.2 + torch.where(batch["input_ids"].sum(1) % 2 == 0, noise, -noise))

    monkeypatch.setattr(calibration, "losses", known)
    found = calibrate(routed_model(), dataset(), Recipe(budget=0.03, **NATS), margin=margin, tries=20, progress=False)
    assert 0 < found.chosen.sparsity < 1
    notes = [n for n in found.notes if n.startswith("the margin alone takes more than half of the budget of all (12 ")]
    assert len(notes) == said


@pytest.mark.parametrize("collator, size", [(PaddedCollator(), 1), (PaddedCollator(), 5), (PackedCollator(), 5)])
def test_batches_make_no_difference(collator, size):
    def at(**options):
        return calibrate(routed_model(), dataset(), Recipe(budget=0.2, **NATS), margin=0, progress=False, **options)

    want, got = at(batch_size=12), at(collator=collator, batch_size=size)
    assert len(want.tried) == len(got.tried) > 3
    for a, b in zip(want.tried, got.tried, strict=True):
        assert (a.shift, a.sparsity) == pytest.approx((b.shift, b.sparsity), abs=1e-4)
        assert a.budgets[""].extra == pytest.approx(b.budgets[""].extra, abs=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"margin": -1.0}, r"margin must be >= 0 and finite, got -1.0"),
        ({"margin": math.inf}, r"margin must be >= 0 and finite, got inf"),
        ({"tries": 0}, r"tries must be >= 1 and whole, got 0"),
        ({"batch_size": 0}, r"batch_size must be >= 1 and whole, got 0"),
        ({"recipe": Recipe(targets={"a": 0.5})}, "recipe must have a budget to calibrate to, it has target sparsities"),
        ({"recipe": Recipe(budgets={"z": 0.5})}, "budgets names tasks that the data lack: z; they have a, b"),
    ],
)
def test_bad_arguments_change_nothing(change, message):
    m = routed_model()
    before = biases(m)
    with pytest.raises(ValueError, match=message):
        calibrate(m, dataset(), **{"recipe": Recipe(), "progress": False, **change})
    assert torch.equal(biases(m), before)


def test_data_must_name_their_tasks():
    with pytest.raises(TypeError, match="data must have tasks, like a RouterDataset, got list"):
        calibrate(routed_model(), [dataset()[0]], Recipe(), progress=False)


def test_an_error_on_the_way_leaves_the_routers(monkeypatch):
    m, calls = routed_model(), []

    def broken(*args):
        calls.append(losses(*args))
        return calls[-1] * (float("nan") if len(calls) > 6 else 1)

    monkeypatch.setattr(calibration, "losses", broken)
    before = biases(m)
    with pytest.raises(ValueError, match="the losses must be finite, those of examples"):
        calibrate(m, dataset(), Recipe(budget=0.1, **NATS), progress=False)
    assert torch.equal(biases(m), before) and not m.training


def test_a_replaced_layer_has_no_bias_to_shift():
    m = routed_model()
    flux_ext.get_routers(m).layers[1].classifier[-1] = torch.nn.Identity()
    with pytest.raises(ValueError, match="the router of layer 1 was replaced or hooked"):
        calibrate(m, dataset(), Recipe(), progress=False)


def test_the_trainer_calibrates_on_unseen_data_and_says_so_in_the_card(tmp_path):
    unseen = dataset(8)
    t = trainer(tmp_path, routed_model(), Recipe(budget=0.05, **NATS), max_steps=2)
    t.train()
    before = biases(t.model)
    found = t.calibrate(unseen, margin=0)
    assert found is t.calibration and found.chosen.tasks["a"].sequences == 4
    assert torch.allclose(biases(t.model)[:, 1], before[:, 1] + found.chosen.shift, atol=1e-5)
    t.save_model()
    assert found.record() in (tmp_path / "README.md").read_text()
    assert torch.equal(biases(t.model)[:, 1], torch.stack([
        r.last_bias[1].detach() for r in flux_ext.FluxRouters.from_pretrained(tmp_path).layers
    ]))  # fmt: skip
    with pytest.raises(ValueError, match="recipe must have a budget"):
        trainer(tmp_path / "targets").calibrate()


def test_what_is_held_out():
    def examples(count, task):
        return [Example(f"{task} {i}", "?", "!", task) for i in range(count)]

    given = [*examples(80, "a"), *examples(16, "b"), *examples(7, "c")]
    train, held = hold_out(given, 11)
    assert sorted(train + held, key=given.index) == given and not {*train} & {*held}
    assert [e.task for e in held].count("a") == 9 and [e.task for e in held].count("b") == 2
    assert {e.task for e in train} == {"a", "b", "c"} and "c" not in {e.task for e in held}
    assert hold_out(given[::-1], 11)[1] == held[::-1]  # by what they are, not by where they stand
    assert len(hold_out(examples(4000, "a"))[1]) == HELD_OUT
    assert hold_out(examples(7, "a")) == (examples(7, "a"), [])


def test_prompts_of_which_nothing_is_hidden_are_nothing_to_calibrate_on(tmp_path):
    """Not one token too few: of 8 tokens sink 2 and window 6 show all, of 9 they do not."""
    m = model()
    for count, hidden in ((7, False), (8, True)):
        rows = [Example("x" * (count - 2), "y", "z", "a"), Example("x", "y", "z", "a")]
        data = RouterDataset(rows, Bytes())
        longest = max(len(row["prompt"]) + len(row["answer"]) for row in data)
        assert (longest > 8) == hidden
        if hidden:
            calibrate(m, data, Recipe(budget=0.5, **NATS), progress=False)
            continue
        with pytest.raises(ValueError, match=rf"the longest example has {longest} tokens, and the sink and window"):
            calibrate(m, data, Recipe(budget=0.5, **NATS), progress=False)
        with pytest.warns(UserWarning, match="there is nothing to learn: the longest example has"):
            trainer(tmp_path, m, data=data)


def test_few_sequences_and_all_sparse_are_said():
    found = calibrate(routed_model(), dataset(), Recipe(budget=9.0, **NATS), progress=False)
    assert found.chosen.sparsity == 1 and "12 sequences are few" in str(found) and "all is sparse" in str(found)


def test_copies_of_an_example_are_one_that_is_held_out():
    def examples(count, task):
        return [Example(f"{task} {i}", "?", "!", task) for i in range(count)]

    given = [*(8 * examples(50, "rare")), *examples(400, "common"), *(64 * examples(1, "alone"))]
    train, held = hold_out(given)
    assert [e.task for e in held].count("rare") == 50 // 8 and [e.task for e in held].count("common") == 400 // 8
    assert len({*held}) == len(held) and not {*train} & {*held}
    assert [e.task for e in train].count("rare") == 8 * (50 - 50 // 8)
    assert [e.task for e in train].count("alone") == 64


def test_a_budget_of_a_task_that_was_not_measured_is_named():
    data = RouterDataset(dataset().examples[::2], Bytes(), tasks=["a", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibrate(routed_model(), data, Recipe(budgets={"b": 0.1}, **NATS), progress=False)
    assert any("no sequence of b was measured" in note for note in found.notes)
    assert set(found.chosen.budgets) == {""}
