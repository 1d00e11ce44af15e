"""The two demonstration tasks, and the backbone that was made for them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_ext.evaluation import tasks

BACKBONE = Path(tasks.__file__).parents[1] / "assets" / "demo_backbone"
SINK, WINDOW = 16, 192


# The tasks


def test_splits_are_disjoint_and_cover_the_library():
    train, heldout = tasks.corpus("train"), tasks.corpus("heldout")
    assert len(train) > len(heldout) > 10
    assert not train.keys() & heldout.keys()
    assert all(map(tasks.is_heldout, heldout))
    assert not any(map(tasks.is_heldout, train))
    assert not any("test" in Path(name).parts for name in [*train, *heldout])


def test_the_split_does_not_depend_on_the_machine():
    assert tasks.is_heldout("enum.py")
    assert not tasks.is_heldout("typing.py")


def test_unknown_split():
    with pytest.raises(ValueError, match="split"):
        tasks.corpus("test")


@pytest.mark.parametrize("task", [tasks.retrieval, tasks.continuation])
def test_examples_follow_from_the_arguments(task):
    assert task(4, seed=1) == task(4, seed=1)
    assert task(4, seed=1) != task(4, seed=2)
    assert task(4, split="train") != task(4, split="heldout")


@pytest.mark.parametrize("length", [768, 1024])
@pytest.mark.parametrize("task", [tasks.retrieval, tasks.continuation])
def test_prompts_have_the_length_asked_for(task, length):
    for example in task(8, length=length):
        assert len(example.prompt.encode()) == length
        assert example.prompt == example.context + example.question
        assert example.task == task.__name__


@pytest.mark.parametrize("facts", [1, 4])
@pytest.mark.parametrize("distance", [256, 400])
def test_the_fact_is_far_behind_the_question(facts, distance):
    for example in tasks.retrieval(16, facts=facts, distance=distance, head=32):
        key = example.question.removesuffix(" is ")[-4:]
        fact = tasks.fact_line(key, example.answer)
        assert example.context.count(fact) == 1
        assert example.context.count(tasks.fact_line("", "")[:10]) >= facts
        assert len(example.context) - (example.context.index(fact) + len(fact)) >= distance
        assert example.context.index(fact) >= len(tasks.HEADER) + 32
        # Otherwise the answer is told nowhere.
        assert key not in example.context.replace(fact, "")


def test_no_room_for_the_facts():
    with pytest.raises(ValueError, match="no room"):
        tasks.retrieval(1, length=512, distance=512)


def test_continuations_are_the_text_itself():
    texts = tasks.corpus("heldout").values()
    for example in tasks.continuation(8, answer_length=64):
        assert len(example.answer) == 64
        assert example.question == ""
        assert any(example.context + example.answer in text for text in texts)


# The backbone


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BACKBONE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BACKBONE).eval()


@pytest.mark.parametrize(
    "text", ["", "def f(x):\r\n\treturn x  # ok\n", " don't , stop . ", "héllo 漢字 🙂 \x00\x7f\u200b"]
)
def test_tokens_are_bytes(tokenizer, text):
    tokens = tokenizer(text).input_ids
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text


def test_special_tokens(tokenizer, model):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size


def test_the_backbone_is_small():
    assert sum(path.stat().st_size for path in BACKBONE.rglob("*")) < 8 * 2**20


def test_generate_answers_questions(model, tokenizer):
    examples = tasks.retrieval(4, seed=3)
    prompts = tokenizer([example.prompt for example in examples], return_tensors="pt")
    out = model.generate(**prompts, max_new_tokens=8)
    answers = tokenizer.batch_decode(out[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    assert answers == [example.answer for example in examples]


@torch.no_grad()
def test_retrieval_needs_the_far_keys(model, tokenizer):
    examples = tasks.retrieval(4, seed=3)
    tokens = tokenizer([example.prompt + example.answer for example in examples], return_tensors="pt").input_ids
    position = torch.arange(tokens.shape[1])
    behind = position[:, None] - position
    streaming = (behind >= 0) & ((position < SINK) | (behind < WINDOW))
    masks = {"full_attention": streaming[None, None]}
    logits = model(tokens, attention_mask=masks, logits_to_keep=5, use_cache=False).logits
    assert not (logits[:, :-1].argmax(-1) == tokens[:, -4:]).all(-1).any()
