"""Training on two processes (gloo, CPU): the same gradients as on one, the same routers everywhere, and resuming.

As a program this file is one of the processes.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from processes import end, launch
from tiny_training import LAYERS, Grab, dataset, model, trainer

from flux_ext.training import Recipe

PROCESSES = 2
OBJECTIVES = ("counterfactual", "soft", "straight_through")


def one_step(folder, objective, packed=False, granularity="layer", ragged=False, **options):
    """Gradient and multipliers of one step over four sequences, with nothing left to chance: every layer is flipped,
    of heads all together."""
    recipe, data, grads = Recipe(objective=objective, flips=LAYERS, default_target=0.5), dataset(4, ragged=ragged), []
    if granularity == "head":
        recipe = replace(recipe, heads_per_flip=2)
    t = trainer(
        folder,
        model(granularity),
        recipe=recipe,
        data=data,
        packed=packed,
        max_steps=1,
        max_grad_norm=0.0,
        callbacks=[Grab(grads)],
        **options,
    )
    t.objective.multipliers.lambda1.fill_(3.0)
    t.objective.uniform = lambda shape, like: torch.full(tuple(shape), 0.5)
    t.train()
    return grads[0], t.objective.multipliers.lambda1


def one_step_of_the_budget(folder, **options):
    """Gradient and the price's state of one step over four sequences that all take the routers' own routes, and the
    figures of the log."""
    recipe = Recipe(budget=0.05, budgets={"b": 0.2}, flips=LAYERS, whiten=0)
    grads, data = [], dataset(4, ragged=False)
    t = trainer(folder, recipe=recipe, data=data, max_steps=1, max_grad_norm=0.0, callbacks=[Grab(grads)], **options)
    t.objective.own_rows = lambda batch: torch.ones(batch, dtype=torch.bool)
    t.train()
    names = ("sparsity", "routes_vary", "extra_loss", "dense_loss", "price", "b/price")
    [log] = [log for log in t.state.log_history if "loss" in log]
    return grads[0], t.objective.multipliers.state_dict(), {name: log[name] for name in names}


def states(t):
    """Routers' parameters, multipliers, and the objective's draws."""
    routers = torch.cat([p.detach().flatten() for p in t.routers.parameters()])
    return routers, t.objective.multipliers.lambda1.clone(), t.objective.generator.get_state()


def some_steps(folder, objective, resume=None, **options):
    t = trainer(
        folder, recipe=Recipe(objective=objective, targets={"a": 0.3}), max_steps=4, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    t.train(resume_from_checkpoint=resume)
    return states(t)


def resumed(checkpoint, go_on):
    """What ``go_on`` gives from a checkpoint on; None where transformers cannot (5.17: optimizers go to "cpu:1")."""
    try:
        return go_on(str(checkpoint))
    except RuntimeError as error:
        if not transformers.__version__.startswith("5.17.") or "restore data location" not in str(error):
            raise
        return None


def process(folder: Path) -> None:
    """What each of the processes does; what it saw goes to a file."""
    seen = {}
    for objective in OBJECTIVES:
        for packed in (False, True):
            seen["step", objective, packed] = one_step(
                folder / "step", objective, packed, per_device_train_batch_size=1, gradient_accumulation_steps=2
            )
    seen["budget"] = one_step_of_the_budget(
        folder / "budget", per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    for objective in ("counterfactual", "soft"):
        own = folder / objective
        seen["through", objective] = some_steps(own, objective, save_strategy="steps", save_steps=2)
        seen["resumed", objective] = resumed(own / "checkpoint-2", partial(some_steps, own, objective))
    go_on = partial(some_steps, folder / "after one", "counterfactual")
    seen["after one"] = resumed(folder / "one" / "checkpoint-2", go_on)
    torch.save(seen, folder / f"seen-{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the processes saw, one entry each."""
    folder = tmp_path_factory.mktemp("distributed")
    some_steps(folder / "one", "counterfactual", save_strategy="steps", save_steps=2)
    launch(__file__, PROCESSES, folder)
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(PROCESSES)]


def needs_resuming(seen, what="after one"):
    if seen[0][what] is None:
        pytest.skip(f"transformers {transformers.__version__} loads no optimizer into several processes on the CPU")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("packed", [False, True])
def test_two_processes_and_two_micro_batches_give_the_gradient_of_one_batch(seen, tmp_path, objective, packed):
    want, multipliers = one_step(tmp_path, objective, packed, per_device_train_batch_size=4)
    for got, own_multipliers in (s["step", objective, packed] for s in seen):
        assert want.abs().max() > 1e-3
        assert torch.allclose(got, want, atol=1e-6, rtol=1e-4)
        assert torch.allclose(own_multipliers, multipliers)


def test_the_price_is_that_of_all_sequences_of_all_processes(seen, tmp_path):
    want, price, figures = one_step_of_the_budget(tmp_path, per_device_train_batch_size=4)
    assert price["recent"][0].tolist() == [2, 2] and abs(figures["extra_loss"]) > 1e-4
    for got, own_price, own_figures in (s["budget"] for s in seen):
        assert torch.allclose(got, want, atol=1e-6, rtol=1e-4)
        assert all(torch.allclose(own_price[name], x, rtol=1e-4, atol=1e-6) for name, x in price.items())
        assert own_figures == pytest.approx(figures, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", ["counterfactual", "soft"])
def test_all_processes_have_the_same_routers_and_their_own_draws(seen, objective):
    one, two = (s["through", objective] for s in seen)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[2], two[2])


@pytest.mark.parametrize("objective", ["counterfactual", "soft"])
def test_resuming_goes_on_where_each_process_was(seen, objective):
    needs_resuming(seen)
    for s in seen:
        for a, b in zip(s["through", objective], s["resumed", objective], strict=True):
            assert torch.equal(a, b)


def test_more_processes_than_before_go_on_with_their_own_draws(seen):
    needs_resuming(seen)
    one, two = (s["after one"] for s in seen)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[2], two[2])


if __name__ == "__main__":
    process(Path(sys.argv[1]))
    end()
