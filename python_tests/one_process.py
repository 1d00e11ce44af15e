"""Steps of a training that several processes take and one process takes, and that both must give the same."""

from dataclasses import replace

import pytest
import torch
import transformers
from tiny_training import LAYERS, Grab, dataset, model, trainer

import flux_ext
from flux_ext.training import Recipe

OBJECTIVES = ("counterfactual", "soft", "straight_through", "even_odds")


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


def calibrated(folder, **options):
    """What calibration to a budget gives on five sequences, more than a share of each process, and the last biases."""
    t = trainer(folder, routers_that_differ(), recipe=Recipe(budget=0.3, whiten=0), max_steps=1, learning_rate=0.0,
                **options)  # fmt: skip
    t.train()
    found = t.calibrate(dataset(5), margin=0)
    tried = [[p.shift, p.sparsity, p.budgets[""].extra] for p in found.tried]
    return tried, found.chosen.shift, torch.stack([r.last_bias.detach().clone() for r in t.routers.layers])


def routers_that_differ():
    """Routers that do not route all prompts alike."""
    m = model()
    with torch.no_grad():
        for router in flux_ext.get_routers(m).layers:
            router.classifier[-1].weight.mul_(100)
    return m


def needs_resuming(seen, what="after one"):
    if seen[0][what] is None:
        pytest.skip(f"transformers {transformers.__version__} loads no optimizer into several processes on the CPU")


def same_step(found, want):
    """Whether all processes have found the gradient and the multipliers of one (:func:`one_step`)."""
    gradient, multipliers = want
    assert gradient.abs().max() > 1e-3
    for got, own_multipliers in found:
        assert torch.allclose(got, gradient, atol=1e-6, rtol=1e-4)
        assert torch.allclose(own_multipliers, multipliers)


def same_step_of_the_budget(found, want):
    """Whether all have found the gradient, the price and the log of one (:func:`one_step_of_the_budget`)."""
    gradient, price, figures = want
    assert price["recent"][0].tolist() == [2, 2] and abs(figures["extra_loss"]) > 1e-4
    for got, own_price, own_figures in found:
        assert torch.allclose(got, gradient, atol=1e-6, rtol=1e-4)
        assert all(torch.allclose(own_price[name], x, rtol=1e-4, atol=1e-6) for name, x in price.items())
        assert own_figures == pytest.approx(figures, rel=1e-4, abs=1e-6)


def same_calibration(found, want):
    """Whether all have measured what one has (:func:`calibrated`), and have the same bits of the routers."""
    tried, shift, bias = want
    assert len(tried) > 3 and shift != 0
    for own_tried, own_shift, own_bias in found:
        assert own_tried == found[0][0] and own_shift == found[0][1] and torch.equal(own_bias, found[0][2])
        assert [x for point in own_tried for x in point] == pytest.approx([x for p in tried for x in p], abs=1e-4)
        assert own_shift == pytest.approx(shift, abs=1e-4) and torch.allclose(own_bias, bias, atol=1e-4)
