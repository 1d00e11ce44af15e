"""EleutherAI's evaluation harness drives a patched model: all full it finds what it finds in the stock one."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from models import SMALL, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import flux_ext

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm-eval)")
EXAMPLES = Path(__file__).parents[1] / "examples"

YAML = """
task: toy_{kind}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: {target}
metric_list:
  - metric: {metric}
{more}
"""


@pytest.fixture(scope="module")
def harness():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("lm_eval_harness")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks of the harness, a question with choices and one with a generated answer."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": "word " * (6 + 3 * i) + f"{i}?", "choices": ["a", "bcd", "ef"], "label": i % 3} for i in range(6)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "multiple_choice": ("label", "acc", 'doc_to_choice: "{{choices}}"'),
        "generate_until": (
            '"{{choices[label]}}"',
            "exact_match",
            "generation_kwargs: {until: [], max_gen_toks: 8, do_sample: false}",
        ),
    }
    for kind, (target, metric, more) in kinds.items():
        text = YAML.format(kind=kind, data=data, target=target, metric=metric, more=more)
        (folder / f"{kind}.yaml").write_text(text)
    return [f"toy_{kind}" for kind in kinds], TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def tokenizer():
    """A token per character of ASCII."""
    t = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="\x01"))
    t.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    t.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="\x02", pad_token="\x00", unk_token="\x01")


def found(lm, tasks):
    """What the harness saw of each example: likelihoods of the choices, or the text."""
    names, manager = tasks
    out = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0)
    return {(task, sample["doc_id"]): sample["resps"] for task, samples in out["samples"].items() for sample in samples}


@pytest.fixture(scope="module")
def stock(tasks, tokenizer):
    return found(lm_eval.models.huggingface.HFLM(pretrained=tiny(), tokenizer=tokenizer, batch_size=1), tasks)


@pytest.fixture(scope="module")
def lm(harness, tokenizer):
    model = flux_ext.patch(tiny(), flux_ext.FluxConfig(**SMALL))
    return harness.FluxLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


def test_all_full_gives_what_the_stock_model_gives(harness, lm, tasks, stock):
    assert len(stock) == 12
    for _ in harness.modes(lm.model, ["dense"]):
        lm.start_counting()
        dense = found(lm, tasks)
    assert lm.sparsity == 0
    assert dense.keys() == stock.keys()
    for key, want in stock.items():
        if key[0] == "toy_generate_until":
            assert dense[key] == want
        else:
            numbers = [[float(x[0][0]) for x in side] for side in (dense[key], want)]
            torch.testing.assert_close(torch.tensor(numbers[0]), torch.tensor(numbers[1]))
    for _ in harness.modes(lm.model, ["sparse"]):
        lm.start_counting()
        assert found(lm, tasks) != dense
    assert lm.sparsity == 1


def test_routers_see_the_context_alone(lm):
    """The route of a choice is that of its context, whatever the choice is."""
    context = list(range(3, 60))
    seen = []
    with flux_ext.models.patching.policy(lm.model, lambda layer, logits: seen.append(logits) or logits.argmin(-1)):
        lm.start_counting()
        lm._loglikelihood_tokens([(("c", "x"), context, choice) for choice in ([5], [70, 71, 72, 73])])
        layers = len(seen) // 2
        with torch.no_grad():
            lm.model(torch.tensor([context]), use_cache=False)
    assert layers == lm.model.config.num_hidden_layers
    for first, second, alone in zip(seen[:layers], seen[layers : 2 * layers], seen[2 * layers :], strict=True):
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, alone)
