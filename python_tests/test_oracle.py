"""Trained routers against the oracle: the best of all routings with as much full attention, all of them tried."""

import itertools
import math

import torch

import flux_ext
from flux_ext import demo, patching
from flux_ext.evaluation import tasks
from flux_ext.training import PaddedCollator, RouterDataset
from flux_ext.training.data import IGNORED

SETTINGS = demo.Settings(steps=36, batch_size=6)
EXAMPLES = 24


def accuracy(model, batch):
    """Share of answers all of whose tokens are the likeliest, and routes ``[B, L]``."""
    labels = batch["labels"][:, 1:]
    columns = (labels != IGNORED).any(0).nonzero()[:, 0]
    with torch.no_grad(), patching.prompt_lengths(model, batch["prompt_lengths"]):
        logits = model(batch["input_ids"], use_cache=False, logits_to_keep=columns).logits
    right = (logits.argmax(-1) == labels[:, columns]).all(1)
    return right.float().mean().item(), patching.last_routing(model).routes[..., 0]


def test_training_comes_within_two_percent_of_the_oracle(tmp_path):
    model, tokenizer = demo.load_backbone()
    demo.train(model, tokenizer, SETTINGS, seed=0, output=tmp_path)
    examples = tasks.retrieval(
        EXAMPLES, length=SETTINGS.train_length, facts=SETTINGS.train_facts, distance=SETTINGS.train_distance
    )
    rows = RouterDataset(examples, tokenizer)
    batch = PaddedCollator(tokenizer.pad_token_id)([rows[i] for i in range(len(rows))])
    trained, routes = accuracy(model, batch)
    layers = len(flux_ext.get_routers(model).layers)
    full = math.ceil((1 - routes.float()).sum(1).mean().item() - 1e-6)
    assert full <= layers * (1 - SETTINGS.retrieval_target), "the target sparsity is not reached"

    best = 0.0
    for chosen in itertools.combinations(range(layers), full):
        route = torch.ones(layers, dtype=torch.int32)
        route[list(chosen)] = 0
        with patching.routes(model, route):
            best = max(best, accuracy(model, batch)[0])
        if best == 1.0:  # there is no better one
            break
    assert best > 0.9, "no routing of this sparsity retrieves: the case shows nothing"
    assert trained >= 0.98 * best
