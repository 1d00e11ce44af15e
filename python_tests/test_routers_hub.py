"""Saving and loading routers, published checkpoints, and files that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL, scramble, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux_ext
from flux_ext import FluxConfig, FluxRouters
from flux_ext.models.patching import get_routers
from flux_ext.routers.files import CONFIG_FILE, WEIGHTS_FILE
from flux_ext.routers.modules import HeadRouter, LayerRouter


def saved(folder: Path, **config: Any) -> FluxRouters:
    model = flux_ext.patch(tiny(), FluxConfig(**{**SMALL, **config}))
    routers = get_routers(model)
    scramble(routers)
    routers.save_pretrained(folder)
    return routers


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_round_trip(tmp_path: Path, granularity: str) -> None:
    routers = saved(tmp_path, granularity=granularity, layers_to_route=[0, 2, 3])
    assert {p.name for p in tmp_path.iterdir()} >= {CONFIG_FILE, WEIGHTS_FILE}
    loaded = FluxRouters.from_pretrained(tmp_path)
    assert loaded.config == routers.config and loaded.config.layers_to_route == [0, 2, 3]
    for (name, a), (other, b) in zip(routers.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    ids = torch.randint(2, 128, (2, 40))
    logits = []
    for source in (routers, loaded, str(tmp_path), tmp_path):
        with flux_ext.patched(tiny(), routers=source) as model:
            logits.append(model(ids).logits)
            assert get_routers(model).config == routers.config
    assert all(torch.equal(x, logits[0]) for x in logits)


def test_the_config_is_complete(tmp_path: Path) -> None:
    saved(tmp_path, align=4)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["format_version"] == 2 and config["flux_ext_version"] == flux_ext.__version__
    assert config["num_layers"] == 4 and config["head_dim"] == 16 and config["num_kv_heads"] == 2
    assert config["model_type"] == "llama" and config["layers_to_route"] == [0, 1, 2, 3] and config["align"] == 4


def damage(folder: Path, how: str) -> None:
    file = folder / WEIGHTS_FILE
    tensors = load_file(file)
    config = json.loads((folder / CONFIG_FILE).read_text())
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "not safetensors":
        file.write_bytes(b"hello")
    elif how == "no weights":
        file.unlink()
    elif how == "missing tensor":
        save_file({k: v for k, v in tensors.items() if k != "layers.1.encoder.0.bias"}, file)
    elif how == "superfluous tensor":
        save_file({**tensors, "layers.9.encoder.0.bias": torch.zeros(3)}, file)
    elif how == "wrong shape":
        save_file({**tensors, "layers.1.encoder.0.bias": torch.zeros(3)}, file)
    elif how == "no config":
        (folder / CONFIG_FILE).unlink()
    elif how == "config is not JSON":
        (folder / CONFIG_FILE).write_text("{")
    elif how == "bad pattern":
        (folder / CONFIG_FILE).write_text(json.dumps({**config, "pattern": "dense"}))
    elif how == "fewer layers":
        (folder / CONFIG_FILE).write_text(json.dumps({**config, "num_layers": 3, "layers_to_route": [0, 1, 2]}))
    elif how == "other head_dim":
        (folder / CONFIG_FILE).write_text(json.dumps({**config, "head_dim": 32}))


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "truncated or damaged"),
        ("not safetensors", "truncated or damaged"),
        ("no weights", "has no flux_routers.safetensors: it is missing"),
        ("missing tensor", r"lacks 1 tensors of these routers, layers.1.encoder.0.bias"),
        ("superfluous tensor", r"has 1 tensors these routers lack, layers.9"),
        ("wrong shape", r"layers.1.encoder.0.bias has shape \[3\]"),
        ("no config", "no flux_config.json: no routers are there; it holds nothing known"),
        ("config is not JSON", "flux_config.json cannot be read"),
        ("bad pattern", "pattern must be one of"),
        ("fewer layers", "tensors these routers lack"),
        ("other head_dim", "has shape"),
    ],
)
def test_damaged_folders(tmp_path: Path, how: str, message: str) -> None:
    saved(tmp_path)
    damage(tmp_path, how)
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        flux_ext.patch(model, routers=tmp_path)
    assert not flux_ext.is_patched(model) and model.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="is not a folder"):
        flux_ext.patch(model, routers=tmp_path / "nowhere")


@pytest.mark.parametrize("changes", [{"head_dim": 32}, {"num_hidden_layers": 3}, {"num_key_value_heads": 4}], ids=str)
def test_routers_of_another_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved(tmp_path)
    model = tiny(**changes)
    with pytest.raises(ValueError, match="another model"):
        flux_ext.patch(model, routers=tmp_path)
    assert not flux_ext.is_patched(model) and model.config._attn_implementation == "eager"


def test_load_weights_changes_nothing_on_an_error(tmp_path: Path) -> None:
    routers = saved(tmp_path)
    before = {k: v.clone() for k, v in routers.state_dict().items()}
    wrong = {k: v + 1 for k, v in before.items()}
    wrong["layers.3.classifier.4.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="has shape"):
        routers.load_weights(wrong)
    assert all(torch.equal(v, before[k]) for k, v in routers.state_dict().items())


# --- Published checkpoints


def published(kind: type, layers: int, head_dim: int) -> dict[str, Tensor]:
    """A whole checkpoint: router tensors in bf16 under the published names, among others."""
    tensors = {"model.embed_tokens.weight": torch.randn(8, 8), "lm_head.weight": torch.randn(8, 8)}
    for i in range(layers):
        prefix = f"model.layers.{i}.self_attn."
        tensors[prefix + "q_proj.weight"] = torch.randn(8, 8)
        router = kind(head_dim)
        for part, name in (("encoder", "cls_feat_extractor"), ("classifier", "cls_router_head_agnostic")):
            for key, value in getattr(router, part).named_parameters():
                tensors[f"{prefix}mask_allocator.{name}.{key}"] = torch.randn(value.shape).bfloat16()
    return tensors


def check_same(routers: FluxRouters, tensors: dict[str, Tensor]) -> None:
    for i, router in enumerate(routers.layers):
        prefix = f"model.layers.{i}.self_attn.mask_allocator."
        for part, name in (("encoder", "cls_feat_extractor"), ("classifier", "cls_router_head_agnostic")):
            for key, value in getattr(router, part).named_parameters():
                assert torch.equal(value, tensors[f"{prefix}{name}.{key}"].to(value.dtype))
                assert torch.equal(value.bfloat16(), tensors[f"{prefix}{name}.{key}"])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind, granularity", [(LayerRouter, "layer"), (HeadRouter, "head")])
def test_published_checkpoint(tmp_path: Path, sharded: bool, kind: type, granularity: str) -> None:
    tensors = published(kind, 12, 16)
    config = {
        "architectures": ["PawQwen3ForCausalLM"],
        "num_hidden_layers": 12,
        "num_key_value_heads": 2,
        "sink_size": 100,
        "local_window_size": 2000,
        "toggle_type": "triangle",
        "triangle_n_last": 64,
        "retrieval_mode": "full",
        "pool_size": 50,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    if sharded:
        shards = {"a.safetensors": {}, "b.safetensors": {}}
        for n, (key, value) in enumerate(tensors.items()):
            shards["ab"[n % 2] + ".safetensors"][key] = value
        for name, part in shards.items():
            save_file(part, tmp_path / name)
        index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    for routers in (FluxRouters.load_published(tmp_path), FluxRouters.from_pretrained(tmp_path)):
        check_same(routers, tensors)
        assert routers.config == FluxConfig(
            pattern="triangle",
            sink=128,
            window=2048,
            align=128,
            last_q=64,
            granularity=granularity,
            pool_size=50,
            num_layers=12,
            head_dim=16,
            num_kv_heads=2,
            model_type="qwen3",
        )
    model = flux_ext.patch(tiny("qwen3", num_hidden_layers=12), routers=tmp_path)
    assert get_routers(model).config.pool_size == 50
    model.generate(torch.randint(2, 128, (1, 300)), max_new_tokens=3)


@pytest.mark.parametrize(
    "published_modes, preset",
    [
        (("streaming", "full"), "fa-ssa"),
        (("triangle", "full"), "fa-ta"),
        (("xattn", "full"), "fa-xa"),
        (("streaming", "xattn"), "xa-ssa"),
    ],
)
def test_published_modes(published_modes: tuple[str, str], preset: str) -> None:
    config = dict(zip(("toggle_type", "retrieval_mode"), published_modes, strict=True))
    found = FluxRouters.load_published(published(LayerRouter, 3, 16), config).config
    expected = FluxConfig.preset(preset, align=128)
    assert found.differences(expected) == ""


def test_a_published_state_dict() -> None:
    tensors = published(LayerRouter, 3, 16)
    routers = FluxRouters.load_published(tensors)
    check_same(routers, tensors)
    assert routers.config.align == 128 and routers.config.num_layers == 3
    assert sum(p.numel() for p in FluxRouters.load_published(published(LayerRouter, 1, 128)).parameters()) == 592_002
    assert sum(p.numel() for p in FluxRouters.load_published(published(HeadRouter, 1, 128)).parameters()) == 263_682


@pytest.mark.parametrize(
    "config, drop, message",
    [
        (
            {"toggle_type": "topk"},
            None,
            r"toggle_type must be one of \('streaming', 'triangle', 'xattn'\).* has 'topk'",
        ),
        ({"toggle_type": ["xattn"]}, None, "toggle_type must be one of"),
        ({"toggle_type": "streaming", "retrieval_mode": "topk"}, None, "retrieval_mode must be one of"),
        ({}, "cls_", "no tensor of a published router"),
        ({}, "layers.1.self_attn.mask_allocator.cls_router_head_agnostic.2.bias", "incomplete"),
    ],
)
def test_published_checkpoints_that_cannot_be_used(config: dict[str, Any], drop: str | None, message: str) -> None:
    tensors = {k: v for k, v in published(LayerRouter, 2, 16).items() if drop is None or drop not in k}
    with pytest.raises(ValueError, match=message):
        FluxRouters.load_published(tensors, config)


def test_a_published_router_of_odd_shape() -> None:
    tensors = published(LayerRouter, 1, 16)
    key = "model.layers.0.self_attn.mask_allocator.cls_feat_extractor.0.weight"
    with pytest.raises(ValueError, match="neither by layer nor by head"):
        FluxRouters.load_published({**tensors, key: torch.zeros(32, 16)})
    bias = "model.layers.0.self_attn.mask_allocator.cls_router_head_agnostic.4.bias"
    with pytest.raises(ValueError, match="shape"):
        FluxRouters.load_published({**tensors, bias: torch.zeros(1)})


def test_import_is_light() -> None:
    """Importing the package does not import transformers; the names that need it are there all the same."""
    import subprocess
    import sys

    code = "import flux_ext, sys; assert 'transformers' not in sys.modules; flux_ext.patch; assert flux_ext.FluxCache"
    # From the folder of the package under test: in a checkout another one may lie in the working directory.
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(flux_ext.__file__).parent.parent)
    for name in flux_ext.__all__:
        assert getattr(flux_ext, name) is not None
    assert dir(flux_ext) == sorted(flux_ext.__all__)  # what completes itself: the public names, loaded or not
    with pytest.raises(AttributeError, match="no attribute"):
        _ = flux_ext.nothing
