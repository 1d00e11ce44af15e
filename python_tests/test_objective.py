"""The four objectives on a toy whose losses are known for every routing."""

import itertools
import math

import pytest
import torch
from torch import nn

from flux_ext.training import Multipliers, Recipe, make_objective

LAYERS = 4


class Toy:
    """A loss per sequence that depends on the routes alone: each task pays for the units it misses.

    ``cost [T, L, H]`` is what a sequence of a task loses per sparse unit; ``pair`` adds a loss of 1 unless
    those two layers are both full.
    """

    def __init__(self, cost: torch.Tensor, tasks: torch.Tensor, pair: tuple[int, int] | None = None) -> None:
        self.cost, self.tasks, self.pair = cost, tasks, pair
        self.num_layers, self.num_heads = cost.shape[1:]
        self.z = nn.Parameter(torch.zeros(*cost.shape))  # a router per task: log-odds of full
        self.asked: list[tuple[int, int]] = []

    def _run(self, policy, rows) -> torch.Tensor:
        routes = []
        for layer in range(self.num_layers):
            z = self.z[self.tasks[rows], layer]
            logits = torch.stack([torch.zeros_like(z), z], -1)
            route = policy(layer, logits if self.num_heads > 1 else logits[:, 0])
            routes.append(route if route.dim() == 2 else route[:, None])
        sparse = torch.stack(routes, 1).float()
        loss = (self.cost[self.tasks[rows]] * sparse).sum((1, 2))
        if self.pair is not None:
            full = 1 - sparse[..., 0]
            loss = loss + 1 - full[:, self.pair[0]] * full[:, self.pair[1]]
        return loss

    def loss(self, policy, keep=None):
        self.base = self._run(policy, torch.arange(len(self.tasks)))
        return self.base

    def loss_again(self, policy, layer, rows):
        assert not torch.is_grad_enabled()
        self.asked += [(layer, int(r)) for r in rows]
        return self._run(policy, rows)


def toy(num_heads: int = 1, batch: int = 8, **kwargs) -> Toy:
    generator = torch.Generator().manual_seed(3)
    return Toy(torch.randn(2, LAYERS, num_heads, generator=generator), torch.arange(batch) % 2, **kwargs)


def objective(num_heads: int = 1, **recipe):
    recipe = {"objective": "counterfactual", "targets": {"a": 0.5, "b": 1.0}, **recipe}
    return make_objective(Recipe(**recipe), ["a", "b"], LAYERS, num_heads, seed=1)


def test_counterfactual_gradient_is_the_exact_worth_of_each_unit():
    """With a separable loss the worth of a unit is minus its cost, whatever the others do."""
    model, o = toy(), objective(flips=LAYERS, delta_clip=100)
    o(model, model.tasks).loss.backward()
    expected = -model.cost * LAYERS / LAYERS / 4 / 2  # scale L / flips; a task has half of the batch
    assert torch.allclose(model.z.grad, expected, atol=1e-6)


@pytest.mark.parametrize("num_heads, group", [(1, 1), (4, 2)])
@pytest.mark.parametrize("size", [9, 1000])
def test_flips_that_run_together_are_worth_the_same(num_heads, group, size):
    """Whichever flips share a run: the gradient is that of each flip on its own."""
    grads, runs = [], []
    for run_size in (1, size):
        model = toy(num_heads, batch=7, pair=(0, 2))
        model.run_size = run_size
        o = objective(num_heads, flips=3, heads_per_flip=group)
        for _ in range(3):
            o(model, model.tasks).loss.backward()
        grads.append(model.z.grad)
        runs.append(len({layer for layer, _ in model.asked}))
        assert len(model.asked) == 3 * 3 * 7
    assert torch.allclose(*grads, atol=1e-6)
    assert runs[1] < runs[0] == LAYERS


def test_runs_start_at_their_first_layer():
    layers = torch.tensor([[3, 0], [1, 3], [3, 2]])
    runs = make_objective(Recipe(flips=2), ["a"], LAYERS).runs
    assert [(first, rows.tolist(), which.tolist()) for first, rows, which in runs(layers, 2)] == [
        (0, [0, 1], [1, 0]),  # layers 0 and 1
        (2, [2, 0, 1, 2], [1, 0, 1, 0]),  # 2, and all of 3
    ]
    assert [first for first, *_ in runs(layers, 1)] == [0, 1, 2, 3]


@pytest.mark.parametrize("choice", ["evenly", "by_worth"])
@pytest.mark.parametrize("flips", [1, 3])
@pytest.mark.parametrize("num_heads, group", [(1, 1), (3, 1), (4, 2)])
def test_counterfactual_gradient_is_unbiased(num_heads, group, flips, choice):
    model = toy(num_heads)
    o = objective(num_heads, flips=flips, heads_per_flip=group, delta_clip=100, flip_choice=choice)
    total = torch.zeros_like(model.z)
    steps = 1500
    for _ in range(steps):
        model.z.grad = None
        o(model, model.tasks).loss.backward()
        total += model.z.grad
    if group == 1:
        worth = model.cost
    else:  # what a head earns in the company of a random other one, shared out evenly
        mean_of_others = (model.cost.sum(2, keepdim=True) - model.cost) / (num_heads - 1)
        worth = (model.cost + mean_of_others * (group - 1)) / group
    expected = -worth / 4 / 2
    assert torch.allclose(total / steps, expected, atol=0.06 if num_heads > 1 else 0.03)


def test_every_layer_of_every_task_is_flipped_equally_often():
    model, o = toy(batch=6), objective(flips=1)
    for _ in range(4):
        o(model, model.tasks)
    for task in (0, 1):
        flipped = [layer for layer, row in model.asked if model.tasks[row] == task]
        assert sorted(flipped) == sorted(list(range(LAYERS)) * 3)


def test_price_and_bound_alone():
    model, o = toy(), objective()
    model.cost.zero_()
    o.multipliers.lambda1[:] = torch.tensor([0.4, 0.0])
    o(model, model.tasks).loss.backward()
    # Price lambda / L per unit, half the batch, a quarter for even odds; it pulls towards sparse.
    assert torch.allclose(model.z.grad[0], torch.full_like(model.z.grad[0], 0.4 / LAYERS / 2 / 4))
    assert torch.equal(model.z.grad[1], torch.zeros_like(model.z.grad[1]))
    with torch.no_grad():
        model.z.fill_(9.0)
    model.z.grad = None
    o.multipliers.lambda1.zero_()
    o(model, model.tasks).loss.backward()
    assert (model.z.grad > 0).all()  # beyond the bound the log-odds are pulled back


def test_soft_gradient_is_autograd_of_the_mixture():
    model, o = toy(), objective(objective="soft", multipliers="published", tau_start=1.0)
    state = o.generator.get_state()
    step = o(model, model.tasks)
    (grad,) = torch.autograd.grad(step.loss, model.z)

    o.generator.set_state(state)
    o.multipliers.lambda1.zero_()
    o.multipliers.lambda2.zero_()
    without = o(model, model.tasks)
    assert torch.equal(without.lm_loss, step.lm_loss)
    assert torch.allclose(without.loss, without.lm_loss.mean())
    d = torch.stack([step.sparsity[model.tasks == t].mean() for t in (0, 1)]) - o.multipliers.target
    o2 = objective(objective="soft", multipliers="published")
    penalty = (o2.multipliers.lambda1 * d + o2.multipliers.lambda2 * d**2).mean()
    assert torch.allclose(step.loss, step.lm_loss.mean() + penalty)
    assert grad.abs().min() > 0


def test_straight_through_is_hard_forward_and_soft_backward():
    model, o = toy(), objective(objective="straight_through", multipliers="published_abs")
    step = o(model, model.tasks)
    assert set((step.sparsity * LAYERS).tolist()) <= set(range(LAYERS + 1))
    step.loss.backward()
    assert model.z.grad.abs().min() > 0


@pytest.mark.parametrize("z", [-2.5, 0.4, 2.9])
def test_at_even_odds_the_gradient_does_not_depend_on_the_log_odds(z):
    """With a separable loss it is minus a quarter of the unit's cost, whatever is drawn; the published one vanishes."""
    model, o = toy(), objective(objective="even_odds")
    with torch.no_grad():
        model.z.fill_(z)
    step = o(model, model.tasks)
    assert set((step.sparsity * LAYERS).tolist()) <= set(range(LAYERS + 1))
    step.loss.backward()
    assert torch.allclose(model.z.grad, -model.cost / 4 / 2)  # a task has half of the batch
    assert torch.equal(step.choice, torch.full_like(step.choice, z <= 0))


@pytest.mark.parametrize("sign", [1, -1])
def test_far_log_odds_are_pulled_back_at_even_odds_and_lost_in_a_softmax(sign):
    grads = {}
    for name in ("even_odds", "straight_through"):
        model, o = toy(), objective(objective=name)
        with torch.no_grad():
            model.z.fill_(sign * 40.0)
        o(model, model.tasks).loss.backward()
        grads[name] = model.z.grad
    pull = 0.01 * 2 * (40 - 3) * sign / LAYERS / 2  # of a mean over sequences and layers
    assert torch.allclose(grads["even_odds"], pull - model.cost / 4 / 2)
    assert grads["straight_through"].abs().max() < 1e-9


@pytest.mark.parametrize("objective", ["soft", "straight_through"])
def test_as_published_nothing_bounds_the_log_odds(objective):
    o = make_objective(Recipe(objective=objective), ["a"], LAYERS)
    assert float(o.bound(torch.full((2, LAYERS, 1), 40.0))) == 0


@pytest.mark.parametrize(
    "name, start", [("counterfactual", 2.0), ("soft", 4.5), ("straight_through", 4.5), ("even_odds", 2.0)]
)
def test_where_new_routers_start(name, start):
    assert Recipe(objective=name).initial_bias == start
    assert Recipe(objective=name, start_bias=1.0).initial_bias == 1.0


def test_noise_is_drawn_once_per_layer():
    """Gradient checkpointing runs a layer twice; both runs must see the same draw."""
    o = objective(objective="soft")
    seen = []

    class Twice(Toy):
        def _run(self, policy, rows):
            logits = torch.zeros(len(rows), 2)
            first = [policy(layer, logits) for layer in range(LAYERS)]
            seen.append([torch.equal(policy(layer, logits), first[layer]) for layer in range(LAYERS)])
            return sum(first)

    model = Twice(torch.zeros(2, LAYERS, 1), torch.arange(4) % 2)
    o(model, model.tasks)
    assert seen == [[True] * LAYERS]


@pytest.mark.parametrize("form", ["inequality", "published", "published_abs"])
def test_dual_ascent(form):
    m = Multipliers(["a", "b", "c"], Recipe(multipliers=form, default_target=0.5, multiplier_lr=0.1))
    before = m.lambda1.clone(), m.lambda2.clone()
    sparsity, count = torch.tensor([0.3, 0.9, math.nan]), torch.tensor([4, 4, 0])
    m.ascend(sparsity, count)
    change1, change2 = m.lambda1 - before[0], m.lambda2 - before[1]
    assert change1[2] == change2[2] == 0  # a task that was not seen
    if form == "inequality":
        assert torch.allclose(change1[:2], torch.tensor([0.02, 0.0]))  # 0 is the least
        m.ascend(torch.tensor([0.9, 0.9, 0.9]), count)
        assert m.lambda1[0] == 0  # a target that is met takes the price back
    else:
        sign = 1 if form == "published_abs" else -1
        assert torch.allclose(change1[:2], torch.tensor([sign * 0.02, 0.04]), atol=1e-6)
        assert torch.allclose(change2[:2], torch.tensor([0.004, 0.016]), atol=1e-6)
    assert (m.lambda1 >= 0).all() and (m.lambda2 >= 0).all()


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential"])
def test_temperature(name):
    r = Recipe(tau_schedule=name, tau_start=2.0, tau_end=0.5, tau_share=0.6)
    assert r.tau(0) == pytest.approx(2.0)
    assert r.tau(0.6) == r.tau(1.0) == pytest.approx(0.5)
    assert r.tau(0.3) == pytest.approx({"cosine": 1.25, "linear": 1.25, "exponential": 1.0}[name])
    steps = [r.tau(x / 50) for x in range(51)]
    assert steps == sorted(steps, reverse=True)


def test_state_dict_resumes_the_draws():
    model = toy()
    one, two = objective(), objective()
    for _ in range(3):
        one(model, model.tasks)
    two.load_state_dict(one.state_dict())
    model.asked = []
    one(model, model.tasks)
    first, model.asked = model.asked, []
    two(model, model.tasks)
    assert first == model.asked


@pytest.mark.parametrize("name", ["counterfactual", "soft"])
def test_training_reaches_the_best_routing_where_two_layers_need_each_other(name):
    """Task a needs layers 1 and 3 together and neither alone; task b needs none."""
    cost = torch.full((2, LAYERS, 1), 0.001)
    recipe = {"multiplier_lr": 0.02, "objective": name, "tau_end": 0.3}
    model, o = Toy(cost, torch.arange(16) % 2, pair=(1, 3)), objective(**recipe)
    model_loss = model._run
    # The pair matters for task a only.
    model._run = lambda policy, rows: torch.where(
        model.tasks[rows] == 0, model_loss(policy, rows), model_loss(policy, rows) * 0
    )
    with torch.no_grad():
        model.z.fill_(o.recipe.initial_bias)
    optimizer = torch.optim.Adam([model.z], lr=0.05)
    for step in range(500):
        out = o(model, model.tasks, step / 500)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        o.multipliers.ascend(torch.stack([out.sparsity[model.tasks == t].mean() for t in (0, 1)]), torch.tensor([8, 8]))
    chosen = (model.z > 0)[..., 0]
    best = min(
        (r for r in itertools.product([False, True], repeat=LAYERS) if sum(r) == 2),
        key=lambda r: 1 - (r[1] and r[3]),
    )
    assert chosen[0].tolist() == list(best)
    assert not chosen[1].any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"objective": "magic"}, "objective must be one of .* got 'magic'"),
        ({"multipliers": "none"}, "multipliers must be one of"),
        ({"tau_schedule": "step"}, "tau_schedule must be one of"),
        ({"targets": {"a": 1.5}}, r"target sparsity of a must lie in \[0, 1\], got 1.5"),
        ({"tau_end": 0.0}, "tau_end must be > 0"),
        ({"delta_clip": math.inf}, "delta_clip must be > 0 and finite, got inf"),
        ({"multiplier_lr": math.nan}, "multiplier_lr must be >= 0 and finite, got nan"),
        ({"start_bias": math.nan}, "start_bias must be finite, got nan"),
        ({"default_target": math.nan}, r"default_target must lie in \[0, 1\], got nan"),
        ({"flip_choice": "often"}, "flip_choice must be one of evenly, by_worth, got 'often'"),
        ({"flips": 1.5}, "flips must be >= 1 and whole, got 1.5"),
        ({"flips": 0}, "flips must be >= 1"),
        ({"flips": 9}, "flips must be at most the 4 routed layers, got 9"),
        ({"heads_per_flip": 2}, "heads_per_flip must be at most the 1 decisions"),
        ({"multiplier_lr": -1.0}, "multiplier_lr must be >= 0"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        objective(**change)
