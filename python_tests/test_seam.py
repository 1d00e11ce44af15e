"""A transformers in which something is missing is refused by name and version; nothing fails open."""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import SMALL, tiny
from test_layering import ROOT
from transformers.generation.utils import GenerationMixin

import flux_ext
from flux_ext import FluxConfig
from flux_ext import transformers_seam as seam
from flux_ext.models import attention_function, model_methods
from flux_ext.training import FluxTrainer

SOURCE = Path(seam.__file__)
IMPORTED = [
    (node.module, alias.name)
    for node in ast.walk(ast.parse(SOURCE.read_text()))
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.")
    for alias in node.names
]


@pytest.mark.parametrize("module, name", IMPORTED)
def test_a_release_without_a_name_that_is_imported(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    spec = importlib.util.spec_from_file_location("flux_ext.another_seam", SOURCE)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=rf"transformers {transformers.__version__} is installed.*{name}.*5\.17\.0"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def refused(name: str) -> None:
    """A model is not patched, the error names what is missing and the versions, and the model is as it was."""
    model = tiny("llama", num_hidden_layers=1)
    keys, attributes = set(model.state_dict()), set(vars(model))
    with pytest.raises(ImportError, match=rf"transformers {transformers.__version__} is installed.*{name}.*5\.17\.0"):
        flux_ext.patch(model, FluxConfig(**SMALL))
    assert set(model.state_dict()) == keys and set(vars(model)) == attributes
    assert model.config._attn_implementation == "eager"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def without(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes an attribute from a class, wherever it has it from."""
    for cls in owner.__mro__:
        if name in vars(cls):
            monkeypatch.delattr(cls, name)


NEEDED = [(owner, name) for owner, names in seam.NEEDED for name in names]


@pytest.mark.parametrize("owner, name", NEEDED, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_release_without_an_attribute(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(owner, name, monkeypatch)
    with pytest.raises(ImportError, match=rf"{name}.*5\.17\.0"):
        seam.check_installed()


@pytest.mark.parametrize("name", seam.GENERATION_SETTINGS)
def test_a_release_without_a_setting_of_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Config(transformers.GenerationConfig):
        def __init__(self) -> None:
            super().__init__()
            vars(self).pop(name)

    monkeypatch.setattr(seam, "GenerationConfig", Config)
    refused(name)


@pytest.mark.parametrize("name", seam.REPLACED)
def test_a_release_without_a_method_that_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(GenerationMixin, name, monkeypatch)
    refused(name)


@pytest.mark.parametrize("name", [n for n, arguments in seam.REPLACED.items() if arguments])
def test_a_release_in_which_it_takes_other_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerationMixin, name, lambda self, **kwargs: None)
    refused(f"argument .* of {name}")


@pytest.mark.parametrize("name", seam.ATTENTION_KEYWORDS)
def test_a_release_without_a_keyword_of_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "_taken", seam._taken - {name})
    refused(name)


def test_a_release_with_other_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.PreTrainedModel, "_set_gradient_checkpointing", lambda self, enable: None)
    refused("gradient_checkpointing_func")


def test_a_release_without_masks_for_full_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(seam.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, seam.FULL_MASK)
    refused(seam.FULL_MASK)


@pytest.mark.parametrize("name", [n for n, arguments in seam.TRAINER_METHODS.items() if arguments])
def test_a_release_in_which_the_trainer_takes_other_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seam.check_trainer(transformers.Trainer)
    monkeypatch.setattr(transformers.Trainer, name, lambda self: None)
    with pytest.raises(ImportError, match=rf"argument .* of Trainer.{name}\b.*5\.17\.0"):
        seam.check_trainer(transformers.Trainer)


@pytest.mark.parametrize("name", seam.TRAINER_METHODS)
def test_a_release_without_a_method_of_the_trainer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(transformers.Trainer, name, monkeypatch)
    with pytest.raises(ImportError, match=rf"method {name} of Trainer.*5\.17\.0"):
        seam.check_trainer(transformers.Trainer)


@pytest.mark.parametrize("name", seam.TRAINER_FIELDS)
def test_a_release_without_a_field_of_the_trainer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam.inspect, "getsource", lambda cls: cls.__doc__)
    monkeypatch.setattr(seam, "TRAINER_FIELDS", (name,))
    with pytest.raises(ImportError, match=f"field {name} of Trainer"):
        seam.check_trainer(transformers.Trainer)


def test_a_trainer_that_something_else_derived() -> None:
    class Another(transformers.Trainer):
        pass

    seam.check_trainer(Another)


def test_what_the_trainer_overrides_is_checked() -> None:
    own = {name for name, x in vars(FluxTrainer).items() if callable(x) and hasattr(transformers.Trainer, name)}
    assert {name for name in own if not name.startswith("__")} <= seam.TRAINER_METHODS.keys()


def test_a_model_that_makes_all_logits() -> None:
    class Stubborn(torch.nn.Module):
        pass

    with pytest.raises(
        ValueError, match="Stubborn must take logits_to_keep: asked for the logits of 2 columns it gave 5"
    ):
        seam.kept_logits(Stubborn(), SimpleNamespace(logits=torch.zeros(1, 5, 8)), 2)


def test_checkpointed_layers_without_their_function() -> None:
    model = flux_ext.patch(tiny(), FluxConfig(**SMALL)).train()
    model.model.layers[1].gradient_checkpointing = True
    with pytest.raises(ImportError, match="_gradient_checkpointing_func"):
        model(torch.randint(2, 128, (1, 20)))


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"determinism_check": "none"}])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_that_may_be_reentrant_is_refused(kwargs: dict[str, Any]) -> None:
    """Also where only some layers recompute themselves, and where torch is left to choose."""
    model = flux_ext.patch(tiny(), FluxConfig(**SMALL)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    for layer in model.model.layers[:3]:
        layer.gradient_checkpointing = False
    with pytest.raises(ValueError, match="non-reentrant"):
        model(torch.randint(2, 128, (1, 20)))


def test_every_method_that_is_replaced_has_its_replacement() -> None:
    assert model_methods.REPLACEMENTS.keys() == seam.REPLACED.keys()
    assert all(hasattr(model_methods.ModelMethods, name) for name in model_methods.REPLACEMENTS.values())


def test_a_model_that_does_not_generate_needs_none_of_them() -> None:
    model = transformers.LlamaModel(tiny().config)
    flux_ext.patch(model, FluxConfig(**SMALL))
    assert not hasattr(model, "_get_candidate_generator")


@pytest.mark.parametrize("name", seam.ATTENTION_TERMS)
def test_terms_that_the_kernels_do_not_compute(name: str) -> None:
    module, given = torch.nn.Identity(), torch.ones(2) if name in ("s_aux", "position_bias") else 0.5
    attention_function.refuse_terms(module, {name: None})
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        attention_function.refuse_terms(module, {name: given})


def test_a_keyword_of_a_newer_release_is_refused_where_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_function, "UNKNOWN_KEYWORDS", ("temperature",))
    attention_function.refuse_terms(torch.nn.Identity(), {"temperature": None})
    with pytest.raises(ValueError, match="temperature is not supported"):
        attention_function.refuse_terms(torch.nn.Identity(), {"temperature": 2.0})


def imports_transformers(path: Path) -> bool:
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules.append(node.module or "")
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return any(m.split(".")[0] == "transformers" for m in modules)


def test_only_the_seam_knows_transformers() -> None:
    """Beside what is built on the package, which uses its Trainer and Auto classes."""
    package = ROOT / "flux_ext"
    files = [
        p
        for p in package.rglob("*.py")
        if p.relative_to(package).with_suffix("").parts[0] not in {"training", "evaluation", "cli"}
    ]
    assert [p.name for p in files if imports_transformers(p)] == [SOURCE.name]


def test_masks_by_layer_type_that_lack_ours_do_not_lose_the_padding() -> None:
    model = flux_ext.patch(tiny(), FluxConfig(**SMALL))
    ids = torch.randint(2, 128, (2, 20))
    with pytest.raises(ValueError, match=r"lacks 'full_attention', it has \['whole_attention'\]"):
        model(ids, attention_mask={"whole_attention": torch.ones_like(ids)})
