"""Training to a budget of quality: the price and its controller, the dense losses it is measured against, and what the
trainer makes of both."""

import math
import warnings

import pytest
import torch
from test_objective import LAYERS as TOY_LAYERS
from test_objective import objective as toy_objective
from test_objective import toy
from tiny_training import batch_rows, dataset, model, trainer

import flux_ext
from flux_ext.models import patching
from flux_ext.training import Multipliers, PackedCollator, PaddedCollator, Recipe, make_objective
from flux_ext.training.backbone import losses
from flux_ext.training.budget import SATURATED, DenseLosses, Price, sequence_keys
from flux_ext.training.monitor import RouteWatch

NATS = Recipe(budget=0.02, budget_unit="nats")


def ascend(price, lost, count=8, dense=1.0):
    """A step in which all sequences of each task lose as much: ``lost [T]`` nats."""
    n = torch.full((len(price.tasks),), float(count))
    lost = torch.tensor(lost, dtype=torch.float64)
    price.ascend(n, n * lost, n * lost.square(), n * dense)


# The controller


def test_the_price_rises_while_nothing_is_lost_holds_at_the_budget_and_falls_beyond():
    start, steps = Price.START, 5
    for lost, error in ((0.0, 1.0), (-1.0, 1.0), (0.02, 0.0), (0.03, -0.5), (9.0, -Price.WORST)):
        price = Price(["a"], NATS)
        for _ in range(steps):
            ascend(price, [lost])
        ratio = start * math.exp(Price.RATE * error * steps)
        assert price.ratio.item() == pytest.approx(ratio, rel=1e-4)
        assert price.prices().item() == pytest.approx(0.02 * ratio * math.exp(Price.GAIN * error), rel=1e-4)
        assert price.extra().item() == pytest.approx(lost, rel=1e-5)


def test_an_uncertain_loss_moves_the_price_less():
    """Eight sequences that lose 1.5 budgets in the mean, with a standard error of one: half of the error counts."""
    price, n, mean = Price(["a"], NATS), 8, 0.03
    variance = n * 0.02**2
    price.ascend(*(torch.tensor([x], dtype=torch.float64) for x in (n, n * mean, n * (variance + mean**2), n)))
    error = -0.5 / 2
    ratio = Price.START * math.exp(Price.RATE * error)
    assert price.ratio.item() == pytest.approx(ratio, rel=1e-5)
    assert price.prices().item() == pytest.approx(0.02 * ratio * math.exp(Price.GAIN * error), rel=1e-5)


def test_the_price_stays_within_its_bounds():
    price = Price(["a"], NATS)
    gain = math.exp(-Price.GAIN * Price.WORST)
    for lost, ratio, highest in ((0.0, Price.MOST, Price.MOST), (9.0, Price.LEAST, Price.LEAST * gain)):
        for _ in range(500):
            ascend(price, [lost])
        assert price.ratio.item() == pytest.approx(ratio)
        assert price.prices().item() == pytest.approx(0.02 * highest)


def test_a_step_that_measured_nothing_changes_nothing():
    price = Price(["a"], NATS)
    ascend(price, [0.05])
    before = {name: x.clone() for name, x in price.state_dict().items()}
    ascend(price, [0.0], count=0)
    assert all(torch.equal(x, before[name]) for name, x in price.state_dict().items())


@pytest.mark.parametrize("cost", [0.03, 0.3])
def test_in_a_closed_loop_the_loss_keeps_to_the_budget(cost):
    """Routers that follow the price with a delay, a loss ``cost * sparsity^2``, noise of five budgets per sequence."""
    generator = torch.Generator().manual_seed(0)
    price, sparsity, seen = Price(["a"], NATS), 0.0, []
    for _ in range(1500):
        wanted = min(1.0, price.prices().item() / (2 * cost))  # where one more unit costs what it earns
        sparsity += (wanted - sparsity) / 25
        lost = cost * sparsity**2
        each = lost + 0.1 * torch.randn(4, generator=generator)
        price.ascend(torch.tensor([4.0]), each.sum()[None], each.square().sum()[None], torch.tensor([4.0]))
        seen.append(lost)
    assert sum(seen[500:]) / 1000 == pytest.approx(0.02, rel=0.15)


# Units, and budgets of tasks


def test_a_share_is_of_the_mean_dense_loss():
    price = Price(["a"], Recipe(budget=0.01))
    assert price.budgets().item() == price.prices().item() == 0  # of losses that nobody has seen
    ascend(price, [0.0], dense=1.0)
    ascend(price, [0.0], dense=2.0)
    assert price.budgets().item() == pytest.approx(0.015)
    sure = Price(["a"], Recipe(budget=0.01))
    ascend(sure, [0.0], dense=1e-4)
    assert sure.budgets().item() == pytest.approx(0.01 * SATURATED)
    assert Price(["a"], NATS).budgets().item() == pytest.approx(0.02)


def test_a_task_with_a_budget_of_its_own_has_a_price_of_its_own():
    price = Price(["a", "b", "c"], Recipe(budget=0.02, budget_unit="nats", budgets={"b": 0.1}))
    assert price.budgets().tolist() == pytest.approx([0.02, 0.1, 0.02])
    for _ in range(40):
        ascend(price, [0.0, 0.5, 0.08])  # a and c together lose 0.04
    a, b, c = price.prices().tolist()
    assert a == c < 0.02 * Price.START and b < 0.1 * Price.START
    assert price.extra().tolist() == pytest.approx([0.04, 0.5, 0.04])
    assert set(price.figures()) == {"price", "budget", "b/price", "b/budget"}
    sparsity = torch.tensor([0.5, 0.25, 1.0], requires_grad=True)
    price.penalty(sparsity, torch.tensor([0, 1, 2])).backward()
    assert torch.allclose(sparsity.grad, -torch.tensor([a, b, c]) / 3)


def test_a_budget_of_nothing_has_no_price():
    price = Price(["a"], Recipe(budget=0))
    ascend(price, [0.3])
    assert price.prices().item() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"budget": -0.1}, r"the budget must be >= 0 and finite, got -0.1"),
        ({"budget": 5.0}, "the budget must be at most 1, as it is a share of the dense loss, got 5.0: 0.05 is 5 %"),
        ({"budget": math.nan}, "the budget must be >= 0 and finite, got nan"),
        ({"budgets": {"a": math.inf}}, "the budget of a must be >= 0 and finite, got inf"),
        ({"budget_unit": "bits"}, "budget_unit must be one of share, nats, got 'bits'"),
        ({"budget": 0.1, "targets": {"a": 0.5}}, "budget must be left out where targets"),
        ({"budgets": {"a": 0.1}, "default_target": 0.5}, "budget must be left out where targets"),
        ({"budget": 0.1, "multipliers": "published"}, "budget must be left out where targets"),
    ],
)
def test_bad_budgets(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_a_budget_of_a_task_that_the_data_lack(tmp_path):
    with pytest.raises(ValueError, match="budgets names tasks that the data lack: z; they have a, b"):
        trainer(tmp_path, recipe=Recipe(budgets={"z": 0.1}))


# Targets, where these are given


def test_a_target_that_is_more_than_met_is_bought_back():
    """The odds leave a part of each unit full where the routes in use leave none: those count, in the inequality."""
    m = toy()
    o = toy_objective(targets={"a": 0.75, "b": 0.75}, multiplier_lr=0.1)
    with torch.no_grad():
        m.z.fill_(-0.1)
    step = o(m, m.tasks)
    assert step.sparsity.max() < 0.75 and bool(step.choice.all())
    count, sparsity, own = torch.tensor([4, 4]), step.sparsity[:2], step.choice[:2].float().mean((1, 2))
    o.multipliers.lambda1.fill_(1.0)
    o.multipliers.ascend(sparsity, count, own)
    assert o.multipliers.lambda1.tolist() == pytest.approx([1 - 0.1 * 0.25] * 2)
    recipe = Recipe(multipliers="published", default_target=0.75)
    published = [Multipliers(["a", "b"], recipe, torch.Generator().manual_seed(0)) for _ in range(2)]
    published[0].ascend(sparsity, count, own)
    published[1].ascend(sparsity, count)
    assert torch.equal(published[0].lambda1, published[1].lambda1)


# The objective with a budget


def test_half_of_a_batch_takes_the_routers_own_routes():
    m = toy()
    o = make_objective(Recipe(), ["a", "b"], TOY_LAYERS, seed=1)
    with torch.no_grad():
        m.z.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(2, -1, 1))
    measured = []
    for _ in range(20):
        step = o(m, m.tasks)
        own = step.deployed.isfinite()
        want = m.cost[m.tasks][:, 1::2].sum((1, 2))
        assert torch.allclose(step.deployed[own], want[own])
        measured.append(int(own.sum()))
    assert set(measured) == {4}
    odd = [int(make_objective(Recipe(), ["a"], 2, seed=s).own_rows(3).sum()) for s in range(20)]
    assert set(odd) == {1, 2}


@pytest.mark.parametrize("name", ["soft", "straight_through", "even_odds"])
def test_objectives_with_a_backward_pass_keep_to_a_budget_too(name):
    m = toy()
    step = make_objective(Recipe(objective=name), ["a", "b"], TOY_LAYERS, seed=1)(m, m.tasks)
    assert torch.allclose(step.deployed, m.cost[m.tasks].sum((1, 2)))  # log-odds of 0 are sparse in use
    step.loss.backward()
    assert m.z.grad.abs().max() > 0


@pytest.mark.parametrize("num_heads, layers, flips", [(1, 9, 2), (4, 9, 4), (4, 3, 3), (1, 1, 1)])
def test_flips_where_the_recipe_leaves_them_open(num_heads, layers, flips):
    assert make_objective(Recipe(objective="counterfactual"), ["a"], layers, num_heads).deal([0]).shape == (1, flips)


# Dense losses


def test_dense_losses_are_those_of_the_dense_model_whatever_the_collator():
    m, rows = model(), batch_rows(dataset(6))
    with torch.no_grad(), patching.routes(m, "full"):
        want = losses(m, PaddedCollator()(rows))
    keys = [sequence_keys(PaddedCollator()([row]))[0] for row in rows]
    assert keys == sequence_keys(PaddedCollator()(rows)) == sequence_keys(PackedCollator()(rows))
    changed = {**rows[0], "answer": [5, 6]}
    assert sequence_keys(PaddedCollator()([changed])) != sequence_keys(PaddedCollator()(rows[:1]))

    known, asked = DenseLosses(), []

    def measure(which):
        asked.extend(which.tolist())
        return want[which]

    some = torch.tensor([4, 1])
    assert torch.equal(known.get(PaddedCollator()(rows), some, measure), want[some])
    assert torch.equal(known.get(PackedCollator()(rows), torch.arange(6), measure), want)
    assert asked == [4, 1, 0, 2, 3, 5] and len(known) == 6
    again = DenseLosses()
    again.update(known.tensors())
    assert torch.equal(again.get(PaddedCollator()(rows), some, None), want[some])


@pytest.mark.parametrize(
    "tensors",
    [
        {"dense_keys": torch.arange(3)},
        {"dense_keys": torch.arange(3), "dense_losses": torch.zeros(2)},
        {"dense_keys": torch.zeros(3), "dense_losses": torch.zeros(3)},
    ],
)
def test_damaged_dense_losses(tensors):
    with pytest.raises(ValueError, match="dense_keys must be int64"):
        DenseLosses().update(tensors)


class Counting(DenseLosses):
    """Which sequences were measured."""

    def __init__(self):
        super().__init__()
        self.measured = []

    def get(self, inputs, rows, measure, agree):
        keys = sequence_keys(inputs)

        def counted(which):
            self.measured += [keys[i] for i in which.tolist()]
            return measure(which)

        return super().get(inputs, rows, counted, agree)


@pytest.mark.parametrize("objective", ["counterfactual", "soft"])
@pytest.mark.parametrize("packed", [False, True])
def test_dense_losses_are_measured_once_and_survive_resuming(tmp_path, objective, packed):
    recipe, data, m = Recipe(objective=objective), dataset(6), model()
    options = {"recipe": recipe, "data": data, "packed": packed, "per_device_train_batch_size": 3}
    t = trainer(tmp_path, m, max_steps=8, save_strategy="steps", save_steps=8, **options)
    t.dense_losses = Counting()
    t.train()  # four epochs
    assert len(t.dense_losses.measured) == len(set(t.dense_losses.measured)) == len(t.dense_losses) > 3
    with torch.no_grad(), patching.routes(m, "full"):
        batch = PaddedCollator()(batch_rows(data))
        dense = dict(zip(sequence_keys(batch), losses(m, batch).tolist(), strict=True))
    for key, value in t.dense_losses._known.items():
        assert value == pytest.approx(dense[key], abs=1e-4)

    resumed = trainer(tmp_path, model(), max_steps=10, **options)
    resumed.dense_losses = Counting()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert not set(resumed.dense_losses.measured) & set(t.dense_losses.measured)
    assert set(t.dense_losses._known) <= set(resumed.dense_losses._known)


def test_resuming_with_a_budget_gives_the_same_routers_and_price(tmp_path):
    recipe = Recipe(budget=0.05, budgets={"b": 0.2})
    through = trainer(tmp_path / "one", recipe=recipe, max_steps=6)
    through.train()
    first = trainer(tmp_path / "two", recipe=recipe, max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    second = trainer(tmp_path / "two", recipe=recipe, max_steps=6)
    second.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    for a, b in zip(through.routers.parameters(), second.routers.parameters(), strict=True):
        assert torch.equal(a, b)
    want = through.objective.multipliers.state_dict()
    assert all(torch.equal(x, want[name]) for name, x in second.objective.multipliers.state_dict().items())
    changed = trainer(tmp_path / "two", recipe=Recipe(budget=0.05), max_steps=6)
    with pytest.raises(ValueError, match="was trained with constraint 'budget, budget of b', not 'budget'"):
        changed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))


# What is logged, and who is warned


def test_what_is_logged(tmp_path):
    t = trainer(tmp_path, recipe=Recipe(budget=0.05, budgets={"b": 0.2}), max_steps=3)
    t.train()
    logs = [log for log in t.state.log_history if "loss" in log]
    for log in logs:
        assert {"sparsity", "routes_vary", "routes_tell_task", "price", "budget", "extra_loss", "dense_loss", "b/price",
                "b/budget"} <= set(log)  # fmt: skip
        assert not {"a/price", "a/target", "a/lambda1"} & set(log)
    measured = list(t.dense_losses._known.values())
    assert min(measured) <= logs[-1]["dense_loss"] <= max(measured)


def test_what_the_watch_counts():
    watch = RouteWatch(size=4)
    two = torch.tensor([1.0, 1.0])  # one of each task
    watch.note(two, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]))
    assert (watch.count, watch.vary, watch.sparsity) == (2, pytest.approx(1 / 3), pytest.approx(0.5))
    for _ in range(2):
        watch.note(two, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    assert (watch.count, watch.vary, watch.sparsity) == (4, 0, pytest.approx(1 / 3))  # the first step is forgotten


def test_what_routes_tell_of_the_task():
    """Of 32 sequences of each of four tasks: nothing in a unit that is always sparse, nothing in one that is a coin's
    fall, a bit in one that is sparse for two of the tasks, and 0.811 in one that is sparse for one."""
    watch, count = RouteWatch(size=128), torch.full((4,), 32.0)
    units = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    chance = 3 / (2 * 128 * math.log(2))  # what as many sequences show of nothing
    one = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    for unit, bits in zip(units, (0, 0, 1 - chance, one - chance), strict=True):
        watch.clear()
        watch.note(count, (32 * unit)[:, None])
        assert watch.tell_task == pytest.approx(bits)
    watch.clear()
    watch.note(count, 32 * units.T)
    assert watch.tell_task == pytest.approx((1 + one - 2 * chance) / 4)
    watch.clear()
    watch.note(torch.tensor([8.0, 0.0]), torch.tensor([[4.0], [0.0]]))  # a task that was not seen
    assert watch.tell_task == 0


@pytest.mark.parametrize("bias", [(9.0, -9.0, 9.0), (-9.0, -9.0, -9.0), None])
def test_routers_that_route_all_inputs_alike_are_named(tmp_path, bias):
    """Not where all is sparse, and not where routes differ."""
    m = model()
    t = trainer(tmp_path, m, Recipe(whiten=0), max_steps=16, learning_rate=0.0)  # 64 sequences
    with torch.no_grad():
        for i, router in enumerate(flux_ext.get_routers(m).layers):
            final = router.classifier[-1]
            if bias is None:
                final.weight.mul_(100)
            else:
                final.weight.zero_()
                final.bias.copy_(torch.tensor([0.0, bias[i]]))
    if bias is None:
        # Even odds on average, so that what differs between the prompts decides.
        rows = PaddedCollator()(batch_rows(dataset()))
        seen = {}

        def watch(layer, logits):
            seen[layer] = logits[:, 1] - logits[:, 0]
            return torch.zeros_like(logits[:, 0], dtype=torch.int32)

        with torch.no_grad(), patching.policy(m, watch):
            losses(m, rows)
            for i, router in enumerate(flux_ext.get_routers(m).layers):
                router.classifier[-1].bias[1] -= seen[i].median()
    if bias == (9.0, -9.0, 9.0):
        with pytest.warns(UserWarning, match="the latest 64 sequences all the same routes, 33% sparse"):
            t.train()
        assert t.state.log_history[-2]["routes_vary"] == 0
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            t.train()
        assert (t.state.log_history[-2]["routes_vary"] > 0) == (bias is None)
