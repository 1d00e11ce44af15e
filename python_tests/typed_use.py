"""The public names as a type checker sees them. Nothing runs this file: mypy reads it (test_typing.py, ``make lint``).

Where a line is wrong on purpose, mypy must say so: under ``strict``, a ``type: ignore`` that nothing needs is an error.
"""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from typing_extensions import assert_type

import flux_ext
from flux_ext import (
    BlockSparse,
    FluxCache,
    FluxConfig,
    FluxRouters,
    FluxStaticCache,
    Full,
    Streaming,
    Triangle,
    attention,
    explain,
    get_routers,
    is_patched,
    patch,
    patched,
    register_pattern,
    routes,
    unpatch,
)
from flux_ext.evaluation import Score, evaluate, format_table
from flux_ext.examples import Example
from flux_ext.operators import reference
from flux_ext.operators.pattern_functions import PatternFunction
from flux_ext.training import (
    FluxTrainer,
    Objective,
    Recipe,
    RouterDataset,
    load_examples,
    make_objective,
    training_arguments,
)


def whole(q_len: int, kv_len: int, width: int, device: torch.device) -> Tensor:
    return torch.ones(-(-q_len // 128), -(-kv_len // width), dtype=torch.bool, device=device)


def operators(q: Tensor, k: Tensor, v: Tensor, route: Tensor, cu_seqlens: Tensor) -> None:
    sparse: list[Full | Streaming | Triangle | BlockSparse] = [
        Streaming(sink=128, window=1024),
        Triangle(128, 2048, last_q=128),
        BlockSparse(threshold=0.9),
        BlockSparse(name="mine"),
    ]
    out = attention(q, k, v, route, sparse=sparse[0], full=Full(), scale=0.1, cu_seqlens=cu_seqlens)
    assert_type(out, Tensor)
    assert_type(attention(q, k, v, return_lse=True), tuple[Tensor, Tensor])
    assert_type(reference.attention(q, k, v, route), Tensor)
    assert_type(reference.attention(q, k, v, route, return_lse=True), tuple[Tensor, Tensor])
    assert_type(explain(q, k, v, route, sparse=sparse[0]).workspace_bytes, int)
    assert_type(register_pattern("mine", whole), PatternFunction)
    assert_type(register_pattern("mine")(whole), PatternFunction)
    register_pattern("mine", len)  # type: ignore[arg-type]
    attention(q, k, v, sparse="streaming")  # type: ignore[call-overload]
    attention(q, k)  # type: ignore[call-overload]
    Streaming(window="all")  # type: ignore[arg-type]


def models(model: PreTrainedModel, folder: Path) -> None:
    config = FluxConfig(sink=16, window=64, pattern="triangle", layers_to_route=[0, 1])
    assert_type(patch(model, config), PreTrainedModel)
    assert_type(patch(model, routers="folder-or-hub-id"), PreTrainedModel)
    assert_type(patch(model, routers=folder), PreTrainedModel)
    assert_type(unpatch(model), PreTrainedModel)
    assert_type(is_patched(model), bool)
    routers = get_routers(model)
    assert_type(routers, FluxRouters)
    assert_type(routers.config, FluxConfig)
    assert_type(routers.config.sparse_pattern(), Streaming | Triangle | BlockSparse)
    assert_type(routers.layers, torch.nn.ModuleList)
    assert_type(routers.save_pretrained(folder), str | None)
    assert_type(FluxRouters.from_pretrained(folder), FluxRouters)
    assert_type(FluxConfig.from_dict(config.to_dict()), FluxConfig)
    with patched(model, config) as same, routes(model, "sparse"), routes(model, torch.zeros(4)):
        assert_type(same, PreTrainedModel)
    forced: AbstractContextManager[None] = routes(model, "full", everywhere=True)
    patch("a name", config)  # type: ignore[type-var]
    routes(model, 1)  # type: ignore[arg-type]
    flux_ext.ptach(model)  # type: ignore[attr-defined]
    del forced


def caches(model: PreTrainedModel) -> None:
    config = get_routers(model).config
    cache = FluxCache(model.config, config)
    assert_type(cache.nbytes(), int)
    assert_type(cache.dense_nbytes(), int)
    assert_type(cache.summary(), str)
    assert_type(cache.routes, Tensor)
    static = FluxStaticCache(model.config, config, max_cache_len=1024)
    assert_type(static.nbytes(), int)


class Bytes:
    """A tokenizer of one's own."""

    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def training_and_evaluation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    examples = load_examples(file)
    assert_type(examples, list[Example])
    recipe = Recipe(objective="soft", targets={"retrieval": 0.45})
    Recipe(objective="hard")  # type: ignore[arg-type]
    arguments = training_arguments("folder", max_steps=10)
    assert_type(arguments, TrainingArguments)
    assert_type(make_objective(recipe, ["retrieval"], num_layers=4), Objective)
    data = RouterDataset(examples, tokenizer)
    assert_type(data[0]["prompt"], list[int])
    RouterDataset(examples, Bytes())
    RouterDataset([{"context": "1 + 1", "question": " = ", "answer": "2", "task": "sums"}], Bytes())
    RouterDataset(examples, bytes)  # type: ignore[arg-type]
    trainer = FluxTrainer(model, recipe, arguments, train_dataset=data, tokenizer=tokenizer)
    assert_type(trainer.train().training_loss, float)
    assert_type(trainer.routers, FluxRouters)
    scores = evaluate(model, tokenizer, examples, ["dense", "routed"], likelihood={"retrieval": False})
    assert_type(scores, list[Score])
    assert_type(format_table(scores), str)
    assert_type(flux_ext.evaluate(model, tokenizer, examples), list[Score])
    evaluate(model, tokenizer, examples, ["half"])  # type: ignore[list-item]
