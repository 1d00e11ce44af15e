"""Sequences that several processes share (gloo, CPU): the losses, gradients and routers of one process.

As a program this file is one of the processes.
"""

import os
import sys
from functools import partial
from pathlib import Path

import models
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
from tiny_training import Bytes, batch_rows, dataset, model, trainer

import flux_ext
from flux_ext.models import patching
from flux_ext.sequence_parallel import SequenceGroup
from flux_ext.training import PackedCollator, PaddedCollator, Recipe
from flux_ext.training.backbone import losses
from flux_ext.training.sequence_parallel import make_group
from flux_ext.training.start import pooled_states

RANKS = ((2, 2), (4, 4), (4, 2))
"""Processes, and how many of them share a sequence: both KV heads of the model on a rank of their own, each of them on
two, and two groups."""
MODELS = ("llama", "qwen3", "gemma3", "phi3", "gpt_neox", "mixtral")
CASES = ("layer", "head")


def forward(family, group):
    """Losses of three sequences of different lengths under routes that their routers choose, with and without sharing
    them, and the pooled states."""
    m = models.tiny(family)
    flux_ext.patch(m, flux_ext.FluxConfig(**{**models.SMALL, "pool_size": 6}))
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (9, 61, 30):  # one prompt is shorter than what routers pool at both ends
        tokens = torch.randint(2, 128, (length + 3,), generator=generator).tolist()
        rows.append({"prompt": tokens[:length], "answer": tokens[length:], "task": 0})
    batch = PaddedCollator()(rows)
    widths = []
    m.get_input_embeddings().register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    found = []
    with torch.no_grad():
        for shared in (None, group):
            with patching.policy(m, lambda layer, z: (z[..., 1] - z[..., 0] < 0.01 * (layer - 1)).int()):
                loss = losses(m, batch, shared)
            found.append((loss, torch.stack(pooled_states(m, [batch], shared))))
    assert widths[0] == 64 and widths[-1] == 64 // group.size
    return found


def process(folder: Path, size: int) -> None:
    """What each of the processes does; what it saw goes to a file."""
    count, seen = int(os.environ["WORLD_SIZE"]), {}
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // count, "sequence_parallel": size}
    for objective in OBJECTIVES:
        for granularity in CASES:
            seen["step", objective, granularity] = one_step(
                folder / "step", objective, False, granularity, ragged=True, **options
            )
    seen["budget"] = one_step_of_the_budget(folder / "budget", **options)
    more = {"sequence_parallel": size}
    seen["through"] = some_steps(folder / "own", "counterfactual", save_strategy="steps", save_steps=2, **more)
    go_on = partial(some_steps, folder / "own", "counterfactual", **more)
    seen["resumed"] = resumed(folder / "own" / "checkpoint-2", go_on)
    seen["calibrated"] = calibrated(folder / "calibrated", sequence_parallel=size, per_device_train_batch_size=2)
    t = trainer(folder / "eval", sequence_parallel=size, per_device_eval_batch_size=1)
    seen["eval"] = t.evaluate(dataset(5))["eval_loss"]
    group = make_group(size)
    for family in MODELS:
        seen["forward", family] = forward(family, group)
    with pytest.raises(ValueError, match="packed must be False with sequence_parallel"):
        trainer(folder / "packed", packed=True, sequence_parallel=size)
    with pytest.raises(ValueError, match=rf"sequence_parallel must divide the {count} processes, got 3"):
        trainer(folder / "three", sequence_parallel=3)
    with pytest.raises(ValueError, match="packed into one row cannot be spread"):
        losses(model(), PackedCollator()(batch_rows(dataset(2))), group)
    jamba = flux_ext.patch(models.tiny("jamba"), flux_ext.FluxConfig(**models.SMALL))
    with pytest.raises(ValueError, match="2 of 4 layers of JambaForCausalLM carry a state from token to token"):
        patching.check_sequence_parallel(jamba, group)
    torch.save(seen, folder / f"seen-{os.environ['RANK']}.pt")


@pytest.fixture(scope="module", params=RANKS, ids=lambda p: f"{p[0]} processes, {p[1]} share")
def seen(request, tmp_path_factory):
    """What the processes saw, one entry each, and how many share a sequence."""
    count, size = request.param
    folder = tmp_path_factory.mktemp("shared")
    launch(__file__, count, folder, size)
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(count)], size


@pytest.mark.parametrize("family", MODELS)
def test_losses_are_those_of_one_process(seen, family):
    for s in seen[0]:
        (want, pooled), (got, got_pooled) = s["forward", family]
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
        assert torch.allclose(got_pooled, pooled, rtol=1e-4, atol=1e-5)
        assert torch.equal(got_pooled, seen[0][0]["forward", family][1][1])  # the same bits everywhere


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("granularity", CASES)
def test_the_gradient_is_that_of_one_process(seen, tmp_path, objective, granularity):
    want = one_step(tmp_path, objective, False, granularity, ragged=True, per_device_train_batch_size=4)
    same_step([s["step", objective, granularity] for s in seen[0]], want)


def test_the_price_is_that_of_one_process(seen, tmp_path):
    want = one_step_of_the_budget(tmp_path, per_device_train_batch_size=4)
    same_step_of_the_budget([s["budget"] for s in seen[0]], want)


def test_calibration_is_that_of_one_process(seen, tmp_path):
    same_calibration([s["calibrated"] for s in seen[0]], calibrated(tmp_path))


def test_a_group_draws_alike_and_all_processes_have_the_same_routers(seen):
    found, size = seen
    for rank, s in enumerate(found):
        routers, multipliers, draws = s["through"]
        assert torch.equal(routers, found[0]["through"][0]) and torch.equal(multipliers, found[0]["through"][1])
        for other, theirs in enumerate(found):
            assert torch.equal(draws, theirs["through"][2]) == (rank // size == other // size)


def test_resuming_goes_on_where_each_group_was(seen):
    needs_resuming(seen[0], "resumed")
    for s in seen[0]:
        (routers, *through), (routers_too, *resumed) = s["through"], s["resumed"]
        assert torch.allclose(routers, routers_too, rtol=1e-5, atol=1e-6)  # four processes add in another order
        assert all(torch.allclose(a.float(), b.float()) for a, b in zip(through, resumed, strict=True))


def test_evaluation_is_that_of_one_process(seen, tmp_path):
    want = trainer(tmp_path, per_device_eval_batch_size=1).evaluate(dataset(5))["eval_loss"]
    for s in seen[0]:
        assert s["eval"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("size, q_heads, kv_heads, works", [
    (2, 4, 2, True), (4, 4, 2, True), (2, 9, 3, False), (3, 9, 3, True), (4, 12, 3, False), (8, 32, 8, True)
])  # fmt: skip
def test_heads_that_cannot_be_dealt_out_are_refused(size, q_heads, kv_heads, works):
    group = SequenceGroup.__new__(SequenceGroup)
    group.size = size
    if works:
        group.check_heads(q_heads, kv_heads)
        return
    with pytest.raises(ValueError, match=f"over {size} processes needs .* there are {q_heads} and {kv_heads}"):
        group.check_heads(q_heads, kv_heads)


def test_one_process_shares_with_nobody(tmp_path):
    with pytest.raises(ValueError, match="sequence_parallel must divide the 1 processes, got 2"):
        trainer(tmp_path, sequence_parallel=2)
    with pytest.raises(ValueError, match="sequence_parallel must divide the 1 processes, got 0"):
        trainer(tmp_path, sequence_parallel=0)
    assert trainer(tmp_path, recipe=Recipe()).group is None and Bytes.pad_token_id == 0


if __name__ == "__main__":
    process(Path(sys.argv[1]), int(sys.argv[2]))
    end()
