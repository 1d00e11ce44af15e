"""Scores of a patched model: what is right, in which mode the model is left, what is refused, strict JSON."""

import json
import math

import pytest
import torch
from tiny_training import Bytes, model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flux_ext
from flux_ext import strict_json
from flux_ext.evaluation import MODES, Score, evaluate, format_table
from flux_ext.evaluation.report import dense_remark
from flux_ext.evaluation.results import digest
from flux_ext.examples import Example

EXAMPLES = [Example("The source of it", " is?", answer, "q") for answer in ("abc", "a")]
WORDS = ["<unk>", "<s>", "</s>", "▁The", "▁capital", "▁is", "▁Paris", "Paris", ":", "▁", "▁A"]


@pytest.fixture(scope="module")
def metaspace():
    """A tokenizer like Llama's: the first space is made up, and lost again in decoding."""
    t = Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(WORDS)], unk_id=0, byte_fallback=False))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def answering(m, rows):
    """Lets ``generate`` give these tokens after each prompt."""
    generate = m.generate

    def perfect(prompt, **kwargs):
        out = generate(prompt, **kwargs)
        out.sequences = torch.cat([prompt, torch.tensor(rows)], 1)
        return out

    m.generate = perfect


@pytest.mark.parametrize("answer", ["Paris", " Paris", "Paris:", " Paris: Paris"])
def test_the_right_tokens_are_right(metaspace, answer):
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    m = LlamaForCausalLM(config).eval()
    flux_ext.patch(m, flux_ext.FluxConfig(sink=2, window=8, pool_size=4))
    right = metaspace(answer, add_special_tokens=False)["input_ids"]
    for tokens, accuracy in ((right, 1.0), ([*right[:-1], 10], 0.0)):
        answering(m, [tokens])
        [score] = evaluate(
            m, metaspace, [Example("The capital is", ":", answer, "q")], ["dense"], likelihood=False, progress=False
        )
        assert score.accuracy == accuracy and math.isnan(score.bits_per_byte)


class Latin(Bytes):
    """Every token is a character: whatever a random model writes is a text."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [2 + b for b in text.encode("latin-1")]}

    def decode(self, tokens, skip_special_tokens=False):
        return bytes(t - 2 for t in tokens if 2 <= t < 258).decode("latin-1")


@pytest.mark.parametrize("metric", ["tokens", "found"])
def test_what_would_be_generated_is_found_without_generating(metric):
    """The model's own greedy answer is right, and one with another last letter is not."""
    m, tokenizer = model(), Latin()
    m.generation_config.eos_token_id = None
    prompts = ["The source of it", "Another one, longer than the first", "x"]
    examples = []
    with torch.inference_mode(), flux_ext.routes(m, "full"):
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            own = m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
            text = tokenizer.decode(own)
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == own
            other = text[:-1] + ("0" if text[-1] != "0" else "1")
            for task, answer in (("own", text), ("other", other)):
                examples.append(Example(prompt, "", answer, task, metric, () if metric == "tokens" else (answer,)))
    tasks = ["own", "other"]
    options = {"likelihood": False, "progress": False, "batch_size": 3}
    forced = evaluate(m, tokenizer, examples, ["dense"], teacher_forced=tasks, **options)
    generated = evaluate(m, tokenizer, examples, ["dense"], **options)
    assert {s.task: s.accuracy for s in forced} == {"own": 1.0, "other": 0.0}
    assert {s.task: s.accuracy for s in generated} == {"own": 1.0, "other": 0.0}
    assert all(math.isnan(s.bits_per_byte) for s in forced)


def test_each_right_answer_counts_though_one_before_it_is_wrong():
    """Each token has the right ones before it: a wrong choice in the first word does not spoil the second."""
    m, tokenizer = model(), Bytes()
    answers = ("abc", "def")
    chosen = tokenizer("abX, def", add_special_tokens=False)["input_ids"]

    def forward(*args, _forward=m.forward, **kwargs):
        out = _forward(*args, **kwargs)
        done = m.told
        count = out.logits.shape[1]
        out.logits = torch.nn.functional.one_hot(torch.tensor([chosen[done : done + count]]), 260).float()
        m.told = done + count
        return out

    m.told, m.forward = 0, forward
    example = Example("the words are ", "", "abc, def", "q", "found", answers)
    [score] = evaluate(m, tokenizer, [example], ["dense"], likelihood=False, teacher_forced=["q"], progress=False)
    assert score.accuracy == 0.5


def test_examples_may_be_dicts_of_their_columns():
    m = model()
    rows = [{name: getattr(e, name) for name in ("context", "question", "answer", "task")} for e in EXAMPLES]
    [score], [want] = (evaluate(m, Bytes(), x, ["dense"], generate=False, progress=False) for x in (rows, EXAMPLES))
    assert score.bits_per_byte == want.bits_per_byte and score.examples == len(EXAMPLES)


def test_routed_that_equals_dense_is_said():
    def score(task, mode, sparsity):
        return Score(task, mode, 1, 1.0, math.nan, sparsity, 1.0, (1 - sparsity,), 1.0)

    scores = [score("a", "dense", 0.0), score("a", "routed", 0.0), score("b", "dense", 0.0), score("b", "routed", 0.1)]
    assert dense_remark(scores).startswith("routed equals dense on a: the routers chose full attention in every layer")
    assert dense_remark(scores[2:]) is None and dense_remark(scores[:1]) is None


def test_routed_that_equals_the_full_mode_is_not_called_dense():
    scores = [Score("a", mode, 1, 1.0, math.nan, 0.0, 1.0, (1.0,), 1.0) for mode in ("dense", "full", "routed")]
    assert dense_remark(scores, "full").startswith("routed equals full on a: the routers chose the full mode in every")


BLOCKS = {"full": "block_sparse", "threshold": 0.1, "block_width": 64}


def own_answers(tokenizer, count=4):
    """Prompts of several blocks, of several lengths, with what the unpatched model writes; and its nats for that."""
    stock, generator = flux_ext.unpatch(model()), torch.Generator().manual_seed(1)
    stock.generation_config.eos_token_id = None
    examples, nats = [], 0.0
    for i in range(count):
        prompt = "".join(chr(97 + int(c)) for c in torch.randint(26, (330 + 20 * i,), generator=generator))
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            out = stock.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            logits = stock(out).logits[0, ids.shape[1] - 1 : -1]
        answer = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        assert tokenizer(answer, add_special_tokens=False)["input_ids"] == out[0, ids.shape[1] :].tolist()
        nats += torch.nn.functional.cross_entropy(logits, out[0, ids.shape[1] :], reduction="sum").item()
        examples.append(Example(prompt, "", answer, "own"))
    return examples, nats / math.log(2) / sum(len(e.answer.encode()) for e in examples)


@pytest.mark.parametrize("forced", [(), ("own",)], ids=["generated", "forced"])
@pytest.mark.parametrize(
    "change",
    [{}, {"granularity": "head", "pattern": "triangle"}, {"route_on": "first_chunk"}, {"layers_to_route": [0, 2]}],
    ids=["layer", "head", "chunks", "some"],
)
def test_dense_is_the_model_as_it_was_whatever_the_full_mode_is(change, forced):
    tokenizer = Latin()
    examples, bits = own_answers(tokenizer)
    m = model(**BLOCKS, **change)
    m.generation_config.eos_token_id = None
    scores = evaluate(m, tokenizer, examples, teacher_forced=forced, batch_size=2, progress=False)
    assert tuple(s.mode for s in scores) == MODES
    dense, full, sparse, _ = scores
    assert dense.accuracy == 1 and dense.bits_per_byte == pytest.approx(bits, rel=1e-4)
    assert full.accuracy < 1 and abs(full.bits_per_byte / bits - 1) > 0.01
    assert (dense.sparsity, full.sparsity, sparse.sparsity) == (0, 0, 1) and dense.kv_bytes == full.kv_bytes
    assert [line.split()[1] for line in format_table(scores).splitlines()[2:]] == [*MODES]


def test_where_the_full_mode_is_full_attention_it_is_dense_alone():
    scores = evaluate(model(), Bytes(), EXAMPLES, generate=False, progress=False)
    assert [s.mode for s in scores] == ["dense", "sparse", "routed"]
    message = "modes must be among dense, sparse, routed, got 'full': every route full is dense here"
    with pytest.raises(ValueError, match=message):
        evaluate(model(), Bytes(), EXAMPLES, ["full"], progress=False)


def test_results_of_dense_that_were_of_the_full_mode_are_replaced(tmp_path):
    """Earlier versions kept them under this digest."""
    m, path = model(**BLOCKS), tmp_path / "results.jsonl"
    options = {"modes": ("dense",), "generate": {"q": False}, "likelihood": {"q": True}, "batch_size": 8}
    row = {"mode": "dense", "score": None, "text": None, "nats": 0.0, "kv_bytes": 1.0, "full_share": [1.0] * 3}
    rows = [{"digest": digest(m, Bytes(), EXAMPLES, options)}]
    rows += [{**row, "example": i, "seconds": 1.0} for i in range(len(EXAMPLES))]
    path.write_text("".join(json.dumps(x) + "\n" for x in [*rows, {"complete": True}]))
    [score] = evaluate(m, Bytes(), EXAMPLES, ["dense"], generate=False, progress=False, results=path)
    assert score.bits_per_byte > 0


def test_each_answer_is_compared_up_to_its_own_length():
    m = model()
    answering(m, [Bytes()("abc", add_special_tokens=False)["input_ids"]] * 2)
    [score] = evaluate(m, Bytes(), EXAMPLES, ["routed"], likelihood=False, progress=False)
    assert score.accuracy == 1.0
    answering(m, [Bytes()("acc", add_special_tokens=False)["input_ids"]] * 2)
    [score] = evaluate(m, Bytes(), EXAMPLES, ["routed"], likelihood=False, progress=False)
    assert score.accuracy == 0.5


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_left_in_its_mode(fails):
    m = model().train()
    m.model.layers[1].eval()
    m.model.layers[2].mlp.eval()
    before = {name: module.training for name, module in m.named_modules()}
    assert len(set(before.values())) == 2
    seen = []
    handle = m.lm_head.register_forward_hook(lambda *_: seen.append({x.training for x in m.modules()}))
    if fails:
        with pytest.raises(ValueError, match="generate or likelihood must be True for the task 'q'"):
            evaluate(m, Bytes(), EXAMPLES, generate={"other": True}, likelihood=False, progress=False)
    else:
        evaluate(m, Bytes(), EXAMPLES, ["dense"], generate=False, progress=False)
        assert seen and all(modes == {False} for modes in seen)
    handle.remove()
    assert {name: module.training for name, module in m.named_modules()} == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"examples": []}, "examples must not be empty"),
        ({"modes": ["Dense"]}, "modes must be among dense, sparse, routed, got 'Dense'"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        (
            {"examples": [Example("c", "q", "", "t")]},
            "'q' -> '' of 't' has 3 prompt and 0 answer tokens; both need one",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model(), Bytes(), **{"examples": EXAMPLES, "progress": False, **change})


def test_generated_texts_are_scored_by_their_metric():
    """Several expected answers: the mean share that was found; what follows the end of a text is not of it."""
    m = model()
    m.generation_config.eos_token_id = 258
    examples = [
        Example("The source", "?", " a, b", "q", "found", answers, max_new_tokens=6)
        for answers in (("ab", "cd"), ("ab", "xy"), ("ef", "xy"))
    ]
    said = [*Bytes()("abcd", add_special_tokens=False)["input_ids"], 258, 0, 0, 0]
    answering(
        m, [said, [*said[:4], *said[:4]], [*said[:4], 258, *Bytes()("ef", add_special_tokens=False)["input_ids"], 0]]
    )
    [score] = evaluate(m, Bytes(), examples, ["dense"], likelihood=False, progress=False)
    assert score.accuracy == pytest.approx((1 + 0.5 + 0) / 3)


def test_as_many_tokens_as_the_example_asks_for():
    m, asked = model(), []
    generate = m.generate
    m.generate = lambda *args, **kwargs: asked.append(kwargs["max_new_tokens"]) or generate(*args, **kwargs)
    for n, want in ((None, 3), (7, 7)):
        e = Example("The source", "?", "abc", "q", "found", max_new_tokens=n)
        evaluate(m, Bytes(), [e], ["dense"], likelihood=False, progress=False)
        assert asked[-1] == want


def test_what_is_only_measured_is_not_generated():
    m = model()
    m.generate = None
    examples = [Example("The source", "?", "abc", "q", "likelihood")]
    [score] = evaluate(m, Bytes(), examples, ["dense"], progress=False)
    assert math.isnan(score.accuracy) and score.bits_per_byte > 0
    with pytest.raises(ValueError, match="generate or likelihood must be True for the task 'q'"):
        evaluate(m, Bytes(), examples, ["dense"], likelihood=False, progress=False)
    with pytest.raises(ValueError, match="of the task 'q' must have one metric, got likelihood and tokens"):
        evaluate(m, Bytes(), [*examples, Example("c", "q", "a", "q")], progress=False)


def test_half_a_surrogate_pair_is_no_text():
    for column in range(4):
        texts = ["text"] * 4
        texts[column] = "a \ud83d b"
        name = ("context", "question", "answer", "task")[column]
        with pytest.raises(
            ValueError, match=rf"the column '{name}' .* character 3 is half of a surrogate pair \(\\ud83d"
        ):
            Example(*texts)
    assert Example("\U0001f600", "", "a", "t").prompt == "\U0001f600"


def test_json_has_no_numbers_but_finite_ones():
    value = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf, "d": "NaN"}, "e": None, "f": True}
    text = strict_json.dumps(value)
    assert text.endswith("\n")
    assert json.loads(text) == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": "NaN"}, "e": None, "f": True}
