"""Two GPUs: sequences that they share and a backbone that is cut up give the losses and gradients of one GPU (NCCL).

As a program this file is one of the processes.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import launch
from tiny_training import Bytes, Grab, batch_rows, dataset
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM

import flux_ext
from flux_ext.models import patching
from flux_ext.training import FluxTrainer, PaddedCollator, Recipe, training_arguments
from flux_ext.training.backbone import losses
from flux_ext.training.sequence_parallel import make_group

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PLAIN, FSDP = {}, {"fsdp": True, "fsdp_config": {"version": 2}}
ENGINES = {"ddp": (1, PLAIN), "fsdp": (1, FSDP), "shared": (2, PLAIN), "shared, fsdp": (2, FSDP)}


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    m = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    flux_ext.patch(m, flux_ext.FluxConfig(sink=2, window=6, pool_size=4))
    return m


def one_step(folder, engine):
    """The gradient of one step over four sequences, every layer flipped."""
    size, options = ENGINES[engine]
    count, grads = int(os.environ.get("WORLD_SIZE", 1)), []
    t = FluxTrainer(
        model(),
        Recipe(flips=4, default_target=0.5, whiten=0),
        training_arguments(
            str(folder), max_steps=1, per_device_train_batch_size=4 // count, max_grad_norm=0.0, disable_tqdm=True,
            save_strategy="no", **options,
        ),
        train_dataset=dataset(4, ragged=False), tokenizer=Bytes(), callbacks=[Grab(grads)], sequence_parallel=size,
    )  # fmt: skip
    t.objective.multipliers.lambda1.fill_(3.0)
    t.objective.uniform = lambda shape, like: torch.full(tuple(shape), 0.5, device=like.device)
    t.train()
    assert isinstance(t.model, FSDPModule) == (options is FSDP)
    return grads[0].cpu()


def process(folder: Path, engine: str) -> None:
    """What each of the processes does; what it saw goes to a file."""
    seen = {"grad": one_step(folder / "step", engine)}
    if engine == "shared":
        group, m = make_group(2), model().cuda()
        batch = {k: v.cuda() for k, v in PaddedCollator()(batch_rows(dataset(6))).items()}
        with torch.no_grad(), patching.routes(m, torch.tensor([0, 1, 1, 0])):
            seen["losses"] = [losses(m, batch, shared).cpu() for shared in (None, group)]
    torch.save(seen, folder / f"seen-{dist.get_rank()}.pt")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_gpus_are_as_one(tmp_path, engine):
    launch(__file__, 2, tmp_path, engine)
    first, second = (torch.load(tmp_path / f"seen-{rank}.pt") for rank in range(2))
    launch(__file__, 1, tmp_path, "ddp")
    want = torch.load(tmp_path / "seen-0.pt")["grad"]
    assert torch.equal(first["grad"], second["grad"])
    assert (first["grad"] - want).norm() < 5e-2 * want.norm()
    for one, two in [s["losses"] for s in (first, second) if "losses" in s]:
        assert torch.allclose(one, two, rtol=2e-2)


if __name__ == "__main__":
    process(Path(sys.argv[1]), sys.argv[2])
    dist.destroy_process_group()
