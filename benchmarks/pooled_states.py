"""How well what a router sees tells one task from another: a linear reading of pooled states.

    flux-ext make-data --model DIR --tasks single prose code --count 48 --length 1000 --min-length 900 --output FILE
    python -m benchmarks pooled_states --model DIR --data FILE --granularity head --pool-size 8 32 100

Of each pair of tasks, for each router (per head: of each head): the pooled states of three quarters of the prompts,
each dimension divided by its deviation as whitening does, are fitted to the task by ridge regression, and the sign is
read of the others; the mean of twenty random splits. A line per pair: the share read rightly, in the mean over the
routers, of the router at the tenth percentile, and of the worst. Everything is full, as where training measures these
states.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import flux_ext
from flux_ext import FluxConfig
from flux_ext.examples import load_examples
from flux_ext.models import patching
from flux_ext.routers.modules import Router, pool_sequences
from flux_ext.training import PaddedCollator, RouterDataset
from flux_ext.training.backbone import run
from flux_ext.transformers_seam import KEEP_LOGITS

RIDGE, SPLITS, FITTED = 0.3, 20, 0.75


def right(a: Tensor, b: Tensor) -> Tensor:
    """How often the task is read rightly of prompts that were not fitted.

    Args:
        a, b: pooled states ``[N, routers, D]`` of the prompts of two tasks, as many of each.

    Returns:
        shares ``[routers]``, fp64.
    """
    generator, count = torch.Generator().manual_seed(0), int(len(a) * FITTED)
    found = []
    for _ in range(SPLITS):
        x, y = (t[torch.randperm(len(t), generator=generator)].double() for t in (a, b))
        fitted = torch.cat([x[:count], y[:count]])
        others = torch.cat([x[count:], y[count:]])
        scale = fitted.std(0).clamp(min=1e-9)
        z, unseen = ((t - fitted.mean(0)) / scale for t in (fitted, others))
        task = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(count)
        truth = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(len(x) - count)
        z = z.transpose(0, 1)  # [routers, n, D]
        gram = z.mT @ z / len(task) + RIDGE * torch.eye(z.shape[-1], dtype=torch.float64)
        weight = torch.linalg.solve(gram, (z.mT @ task / len(task)).unsqueeze(-1))  # [routers, D, 1]
        read = (unseen.transpose(0, 1) @ weight).squeeze(-1).sign()
        found.append((read == truth).double().mean(1))
    return torch.stack(found).mean(0)


@torch.no_grad()
def pooled_states(model: nn.Module, batch: dict[str, Any], sizes: Sequence[int]) -> Tensor:
    """What the routers of a patched model see of one prompt with pools of these sizes, ``[sizes, routers, D]``."""
    seen: list[Tensor] = []

    def before(router: Router, args: tuple[Any, ...]) -> None:
        x, begin, end = (*args, None, None)[:3]
        pools = [pool_sequences(x, size, router.per_head, begin, end)[0] for size in sizes]  # [D] or [H, D]
        seen.append(torch.stack([pool.view(-1, pool.shape[-1]) for pool in pools]))

    handles = [router.register_forward_pre_hook(before) for router in patching.get_routers(model).layers]
    try:
        with patching.routes(model, "full"):
            run(model, batch, **{KEEP_LOGITS: 1})
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(seen, 1).float().cpu()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks pooled_states", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl with a task in each line")
    parser.add_argument("--granularity", choices=["layer", "head"], default="head")
    parser.add_argument(
        "--pool-size", type=int, nargs="+", default=[8, 16, 32, 64, 100, 200], help="rows at either end"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    flux_ext.patch(model, FluxConfig(granularity=args.granularity))
    rows, collate = RouterDataset(load_examples(args.data), tokenizer), PaddedCollator(0)
    states: dict[str, list[Tensor]] = {task: [] for task in rows.tasks}
    for i in tqdm(range(len(rows)), desc="prompts", unit="prompt"):
        batch = {k: v.to(args.device) if isinstance(v, Tensor) else v for k, v in collate([rows[i]]).items()}
        states[rows.tasks[rows[i]["task"]]].append(pooled_states(model, batch, args.pool_size))
    print("pool_size,tasks,prompts_of_each,routers,mean,tenth_percentile,worst")
    for (place, size), (a, b) in itertools.product(enumerate(args.pool_size), itertools.combinations(rows.tasks, 2)):
        count = min(len(states[a]), len(states[b]))
        shares = right(*(torch.stack(states[task][:count])[:, place] for task in (a, b)))
        figures = ",".join(f"{x:.3f}" for x in (shares.mean(), shares.quantile(0.1), shares.min()))
        print(f"{size},{a} and {b},{count},{len(shares)},{figures}")


if __name__ == "__main__":
    main()
