"""Training on two processes (gloo, CPU): the same gradients as on one, the same routers everywhere, and resuming.

As a program this file is one of the processes.
"""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from one_process import (
    OBJECTIVES,
    calibrated,
    needs_resuming,
    one_step,
    one_step_of_the_budget,
    resumed,
    same_calibration,
    same_step,
    same_step_of_the_budget,
    some_steps,
)
from processes import end, launch

from flux_ext import FluxRouters

PROCESSES = 2


def process(folder: Path) -> None:
    """What each of the processes does; what it saw goes to a file."""
    seen = {"saved": 0}
    save = FluxRouters.save_pretrained

    def counted(*args, **options):
        seen["saved"] += 1
        return save(*args, **options)

    FluxRouters.save_pretrained = counted
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
    seen["calibrated"] = calibrated(folder / "calibrated", per_device_train_batch_size=2)
    torch.save(seen, folder / f"seen-{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the processes saw, one entry each."""
    folder = tmp_path_factory.mktemp("distributed")
    some_steps(folder / "one", "counterfactual", save_strategy="steps", save_steps=2)
    launch(__file__, PROCESSES, folder)
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("packed", [False, True])
def test_two_processes_and_two_micro_batches_give_the_gradient_of_one_batch(seen, tmp_path, objective, packed):
    want = one_step(tmp_path, objective, packed, per_device_train_batch_size=4)
    same_step([s["step", objective, packed] for s in seen], want)


def test_the_price_is_that_of_all_sequences_of_all_processes(seen, tmp_path):
    same_step_of_the_budget(
        [s["budget"] for s in seen], one_step_of_the_budget(tmp_path, per_device_train_batch_size=4)
    )


def test_calibration_is_that_of_one_process(seen, tmp_path):
    same_calibration([s["calibrated"] for s in seen], calibrated(tmp_path))


@pytest.mark.parametrize("objective", ["counterfactual", "soft"])
def test_all_processes_have_the_same_routers_and_their_own_draws(seen, objective):
    one, two = (s["through", objective] for s in seen)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[2], two[2])


def test_one_process_writes_the_routers(seen):
    """Two that wrote the same files would find each other's half written."""
    first, *others = (s["saved"] for s in seen)
    assert first > 0 and not any(others)


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
