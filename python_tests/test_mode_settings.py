"""The modes' settings: presets, files, what proves a patch, what routers are trained for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from models import tiny

import flux_ext
from flux_ext import BlockSparse, FluxConfig, FluxRouters, Full, Streaming, Triangle
from flux_ext.config import PRESETS
from flux_ext.examples import Example
from flux_ext.operators import prompt_and_answer
from flux_ext.operators.patterns import dense_mask
from flux_ext.training import Recipe, RouterDataset
from flux_ext.training.report import dense_remark


def test_what_is_hidden_of_a_prompt() -> None:
    """As the mask says, at every length."""
    for sink, window, align in ((0, 4, 1), (2, 6, 1), (3, 8, 4), (16, 4, 2)):
        config = FluxConfig(sink=sink, window=window, align=align)
        for length in range(1, 40):
            seen = dense_mask(config.sparse_pattern(), length, length)
            assert config.hides_any(length) == bool((~seen).tril().any()), (sink, window, align, length)
    assert FluxConfig(pattern="block_sparse").hides_any(1)  # not known before the scores are


def test_presets_have_the_published_numbers() -> None:
    """Sink 128, window 2048, 128 last rows (arXiv 2604.07394), threshold 0.9 at stride 16 in blocks of 128."""
    streaming, triangle = Streaming(128, 2048), Triangle(128, 2048, last_q=128)
    found = {name: FluxConfig.preset(name) for name in PRESETS}
    assert list(found) == ["fa-ssa", "fa-ta", "fa-xa", "xa-ssa"]
    for config in found.values():
        for pattern in (config.full_pattern(), config.sparse_pattern()):
            if isinstance(pattern, BlockSparse):
                assert (pattern.threshold, pattern.stride, pattern.width) == (0.9, 16, 128)
    assert [type(c.full_pattern()) for c in found.values()] == [Full, Full, Full, BlockSparse]
    assert found["fa-ssa"].sparse_pattern() == found["xa-ssa"].sparse_pattern() == streaming
    assert found["fa-ta"].sparse_pattern() == triangle
    assert isinstance(found["fa-xa"].sparse_pattern(), BlockSparse)
    assert [c.decode_pattern() for c in found.values()] == [streaming, streaming, Full(), streaming]
    assert found["fa-ssa"] == FluxConfig()
    changed = FluxConfig.preset("fa-ta", sink=4, window=16, granularity="head", decode="dense")
    assert changed == FluxConfig(pattern="triangle", sink=4, window=16, granularity="head", decode="dense")
    with pytest.raises(ValueError, match=r"a preset must be one of \('fa-ssa', .*\), got 'fa-sa'"):
        FluxConfig.preset("fa-sa")


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_and_loaded(tmp_path: Path, preset: str) -> None:
    config = FluxConfig.preset(preset, num_layers=2, head_dim=16, threshold=0.75, stride=8, block_width=64)
    FluxRouters(config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "flux_config.json").read_text())
    assert values["format_version"] == 2
    assert {name: values[name] for name in ("pattern", "full", "decode")} == PRESETS[preset]
    assert FluxRouters.from_pretrained(tmp_path).config == config


def test_files_from_before_there_were_these_modes(tmp_path: Path) -> None:
    """They choose between full and streaming (or triangle), and decode sparse, as they always did."""
    config = FluxConfig(pattern="triangle", num_layers=2, head_dim=16)
    FluxRouters(config).save_pretrained(tmp_path)
    file = tmp_path / "flux_config.json"
    values = json.loads(file.read_text()) | {"format_version": 1}
    for name in ("full", "decode", "threshold", "stride", "block_width"):
        del values[name]
    file.write_text(json.dumps(values))
    assert FluxRouters.from_pretrained(tmp_path).config == config
    assert config.decode == "sparse" and config.full == "full"


@pytest.mark.parametrize("name", ["pattern", "full", "decode"])
def test_unknown_modes_in_files(tmp_path: Path, name: str) -> None:
    FluxRouters(FluxConfig(num_layers=2, head_dim=16)).save_pretrained(tmp_path)
    file = tmp_path / "flux_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: "spiral"}))
    with pytest.raises(ValueError, match=rf"flux_config.json: {name} must be one of .*, got 'spiral'"):
        FluxRouters.from_pretrained(tmp_path)


def test_another_mode_is_another_setting() -> None:
    model = flux_ext.patch(tiny(), FluxConfig.preset("fa-xa"))
    with pytest.raises(ValueError, match="decode: 'dense' and 'sparse'"):
        flux_ext.patch(model, FluxConfig.preset("fa-xa", decode="sparse"))


def test_the_proof_holds_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are no part of what is proved: the model as it was attends to everything, and so does the patched one
    until it is proved equal."""
    seen: list[Any] = []
    attention = prompt_and_answer.attention

    def note(*args: Any, full: Any, **kwargs: Any) -> Any:
        seen.append(full)
        return attention(*args, full=full, **kwargs)

    monkeypatch.setattr(prompt_and_answer, "attention", note)
    model = flux_ext.patch(tiny(), FluxConfig.preset("xa-ssa"))
    assert seen and all(pattern == Full() for pattern in seen)
    seen.clear()
    model(torch.randint(2, 128, (1, 200)), use_cache=False)
    assert seen and all(isinstance(pattern, BlockSparse) for pattern in seen)
    seen.clear()
    other = flux_ext.patch(tiny(), FluxConfig.preset("xa-ssa", layers_to_route=[1]))
    other(torch.randint(2, 128, (1, 200)), use_cache=False)
    assert [isinstance(pattern, BlockSparse) for pattern in seen[-4:]] == [False, True, False, False]


@pytest.mark.parametrize("granularity, packed", [("layer", False), ("head", True)])
@pytest.mark.parametrize("objective", ["counterfactual", "soft", "straight_through", "even_odds"])
@pytest.mark.parametrize("preset", ["fa-ta", "fa-xa", "xa-ssa"])
def test_training(tmp_path: Path, preset: str, objective: Any, packed: bool, granularity: str) -> None:
    """Under every objective the routers of every mode learn, and nothing else does."""
    model = tiny_training.model(granularity, **PRESETS[preset], last_q=3, threshold=0.3, block_width=64)
    before = tiny_training.snapshot(model)
    words = ["".join(chr(97 + int(c)) for c in torch.randint(26, (200 + 5 * i,))) for i in range(6)]
    data = RouterDataset([Example(x, "what", x[:3], "ab"[i % 2]) for i, x in enumerate(words)], tiny_training.Bytes())
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "packed": packed, "data": data}
    trainer = tiny_training.trainer(tmp_path, model, Recipe(objective=objective, targets={"a": 0.2}), **options)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "flux_router" in name}
    trainer.save_model()
    saved = FluxRouters.from_pretrained(tmp_path).config
    assert {name: getattr(saved, name) for name in PRESETS[preset]} == PRESETS[preset]


@pytest.mark.parametrize("preset, words", [("fa-ssa", "dense so far"), ("xa-ssa", "the full mode so far")])
def test_routed_that_is_all_full_is_called_what_it_is(tmp_path: Path, preset: str, words: str) -> None:
    model = tiny_training.model(**PRESETS[preset], block_width=64)
    for router in flux_ext.get_routers(model).layers:
        router.classifier[-1].bias.data[1] = 100.0
    trainer = tiny_training.trainer(tmp_path, model, Recipe(whiten=0, start_bias=100), max_steps=1)
    trainer.train()
    assert str(dense_remark(trainer)).startswith(f"routed equals {words}: for all of the latest 4 sequences")


def test_changed_after_training() -> None:
    """Routers may be used with another way to decode than they were trained with."""
    routers = FluxRouters(FluxConfig.preset("fa-ssa", num_layers=4, head_dim=16))
    routers.config = dataclasses.replace(routers.config, decode="dense")
    assert flux_ext.get_routers(flux_ext.patch(tiny(), routers=routers)).config.decode == "dense"
