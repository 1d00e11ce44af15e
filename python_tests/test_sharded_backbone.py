"""Training with the backbone cut up (FSDP2) over processes (gloo, CPU), alone and with shared sequences: the gradients
of one process. And what is left when a process ends.

As a program this file is one of the processes.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from one_process import (
    calibrated,
    needs_resuming,
    one_step,
    one_step_of_the_budget,
    resumed,
    same_calibration,
    same_step,
    same_step_of_the_budget,
)
from packaging.version import Version
from processes import allow_fsdp, end, launch, run
from tiny_training import dataset, trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import flux_ext
from flux_ext.training import Recipe
from flux_ext.training.checkpoint import latest_checkpoint
from flux_ext.training.config import FSDP_ACCELERATE
from flux_ext.training.distributed import keep_whole

pytestmark = pytest.mark.skipif(
    Version(accelerate.__version__) < Version(FSDP_ACCELERATE),
    reason=f"FSDP needs accelerate >= {FSDP_ACCELERATE}, this is {accelerate.__version__}",
)
RANKS = ((2, 1), (4, 2))
"""Processes, and how many of them share a sequence."""
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
CASES = (("counterfactual", "layer"), ("counterfactual", "head"), ("soft", "layer"), ("straight_through", "head"))


class Look(TrainerCallback):
    """That the backbone is cut up while it trains, and the routers are not."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        routers = {p for p in flux_ext.get_routers(model).parameters()}
        assert isinstance(model, FSDPModule) and all(isinstance(x, FSDPModule) for x in model.model.layers)
        assert all(isinstance(p, DTensor) != (p in routers) for p in model.model.layers.parameters())


class Killed(TrainerCallback):
    """The last process ends in the third step, or while it writes what the fourth step's checkpoint has of it."""

    def __init__(self, writing):
        self.writing = writing

    def on_step_end(self, args, state, control, **kwargs):
        if os.environ["RANK"] != str(args.world_size - 1):
            return
        if self.writing and state.global_step == 4:
            trainer_module = sys.modules["flux_ext.training.trainer"]
            trainer_module.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        elif not self.writing and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def training(folder, resume=None, callbacks=None, **options):
    """Routers, price and draws after six steps with other flips, and new sequences, in every process."""
    allow_fsdp("fsdp" in options)
    t = trainer(
        folder, recipe=Recipe(budget=0.05), max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, callbacks=callbacks, **options,
    )  # fmt: skip
    t.train(resume_from_checkpoint=resume)
    routers = torch.cat([p.detach().flatten() for p in t.routers.parameters()])
    return routers, t.objective.multipliers.ratio, t.objective.generator.get_state()


def process(folder: Path, size: int) -> None:
    """What each of the processes does; what it saw goes to a file."""
    allow_fsdp(True)
    count, seen = int(os.environ["WORLD_SIZE"]), {}
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // count, "sequence_parallel": size}
    for case in CASES:
        objective, granularity = case
        seen["step", case] = one_step(folder / "step", objective, False, granularity, **options, **FSDP)
    seen["budget"] = one_step_of_the_budget(folder / "budget", **options, **FSDP)
    more = {"sequence_parallel": size, **FSDP}
    seen["plain"] = training(folder / "plain", sequence_parallel=size)
    seen["through"] = training(folder / "own", callbacks=[Look()], **more)
    for name, options in (("resumed", more), ("resumed plain", {"sequence_parallel": size})):
        seen[name] = resumed(folder / "own" / "checkpoint-4", partial(training, folder / "own", **options))
    allow_fsdp(True)
    seen["calibrated"] = calibrated(folder / "calibrated", **{**more, "per_device_train_batch_size": 2})
    t = trainer(folder / "eval", per_device_eval_batch_size=1, **more)
    t.train()
    seen["eval"], routers = t.evaluate(dataset(5))["eval_loss"], t.routers
    if os.environ["RANK"] == "0":
        routers.save_pretrained(folder / "trained")
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading must be False"):
        trainer(folder / "wrong", **{**more, "fsdp_config": {"cpu_ram_efficient_loading": True}})
    torch.save(seen, folder / f"seen-{os.environ['RANK']}.pt")


@pytest.fixture(scope="module", params=RANKS, ids=lambda p: f"{p[0]} processes, {p[1]} share")
def seen(request, tmp_path_factory):
    """What the processes saw, one entry each, and the folder they wrote to."""
    count, size = request.param
    folder = tmp_path_factory.mktemp("sharded")
    launch(__file__, count, "train", folder, size)
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(count)], folder


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_process(seen, tmp_path, case):
    want = one_step(tmp_path, case[0], False, case[1], per_device_train_batch_size=4)
    same_step([s["step", case] for s in seen[0]], want)


def test_the_price_is_that_of_one_process(seen, tmp_path):
    want = one_step_of_the_budget(tmp_path, per_device_train_batch_size=4)
    same_step_of_the_budget([s["budget"] for s in seen[0]], want)


def test_calibration_is_that_of_one_process(seen, tmp_path):
    same_calibration([s["calibrated"] for s in seen[0]], calibrated(tmp_path))


@pytest.mark.parametrize("other", ["plain", "resumed", "resumed plain"])
def test_routers_are_those_of_an_uncut_backbone_and_resuming_goes_on(seen, other):
    needs_resuming(seen[0], other)
    for s in seen[0]:
        assert torch.equal(s["through"][0], seen[0][0]["through"][0])
        for a, b in zip(s["through"], s[other], strict=True):
            assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6)


def test_evaluation_is_that_of_one_process(seen, tmp_path):
    found, folder = seen
    t = trainer(tmp_path, per_device_eval_batch_size=1)
    t.routers.load_state_dict(flux_ext.FluxRouters.from_pretrained(folder / "trained").state_dict())
    assert [s["eval"] for s in found] == pytest.approx([t.evaluate(dataset(5))["eval_loss"]] * len(found), rel=1e-5)


def test_the_first_fsdp_is_refused():
    plugin = SimpleNamespace(fsdp_version=1, cpu_ram_efficient_loading=False)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=r'fsdp_config\["version"\] must be 2 \(fully_shard\), got 1'):
        keep_whole(accelerator, torch.nn.Linear(1, 1))


@pytest.mark.parametrize("seen", RANKS[:1], indirect=True, ids=["2 processes"])
@pytest.mark.parametrize("writing", [False, True])
def test_a_process_that_ends_loses_nothing_before_the_newest_whole_checkpoint(seen, tmp_path, writing):
    done = run(__file__, 2, "killed", tmp_path, writing)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert (tmp_path / "checkpoint-4").is_dir() == writing
    if not writing:
        assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    needs_resuming(seen[0], "resumed plain")
    launch(__file__, 2, "resumed", tmp_path)
    for rank, s in enumerate(seen[0]):
        for a, b in zip(s["plain"], torch.load(tmp_path / f"seen-{rank}.pt"), strict=True):
            assert torch.equal(a, b)


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "train":
        process(folder, int(sys.argv[3]))
    elif what == "killed":
        training(folder, callbacks=[Killed(sys.argv[3] == "True")])
    else:
        torch.save(training(folder, True), folder / f"seen-{os.environ['RANK']}.pt")
    end()
