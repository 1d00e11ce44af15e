"""Files in the form of LongBench: how each dataset is asked and scored, what is cut, and what is refused."""

import json

import pytest
from tiny_training import Bytes
from transformers import AutoTokenizer

from flux_ext.cli.demo import BACKBONE
from flux_ext.evaluation.longbench import DATASETS, is_longbench, load_longbench

ROW = {
    "input": "Who wrote it?",
    "context": "A long text. " * 30,
    "answers": ["Ada", "Ada L."],
    "length": 90,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}


def write(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join(json.dumps({**ROW, **row}, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8"
    )
    return path


def test_which_files_are_of_this_form(tmp_path):
    assert is_longbench(write(tmp_path, {}))
    assert not is_longbench(tmp_path / "none.jsonl")
    ours = tmp_path / "ours.jsonl"
    for text in (json.dumps({"context": "c", "question": "q", "answer": "a", "task": "t"}), "", "no JSON", "[1]"):
        ours.write_text(text)
        assert not is_longbench(ours)


def test_a_question(tmp_path):
    [e] = load_longbench(write(tmp_path, {"dataset": "hotpotqa_e"}), Bytes())
    assert e.task == "hotpotqa_e" and (e.metric, e.max_new_tokens) == ("f1", 32)
    assert e.answers == ("Ada", "Ada L.") and e.answer == " Ada"
    assert e.context.endswith(ROW["context"]) and e.question == "\n\nQuestion: Who wrote it?\nAnswer:"


def test_a_chat_template_stands_around_questions_but_not_around_shown_examples(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    tokenizer.chat_template = "[{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
    shots = {
        "dataset": "trec",
        "input": "Question: Where?\nType:",
        "all_classes": ["Place", "Time"],
        "answers": ["Place"],
    }
    path = write(tmp_path, {}, shots, {"dataset": "lcc", "input": ""})
    question, few, code = load_longbench(path, tokenizer)
    assert question.prompt.startswith("[Answer") and question.prompt.endswith("Question: Who wrote it?]>Answer:")
    assert few.prompt.endswith("Question: Where?\nType:") and few.classes == ("Place", "Time") and few.stop == "\n"
    assert not few.prompt.startswith("[") and code.prompt.endswith(ROW["context"])
    assert not load_longbench(path, tokenizer, chat=False)[0].prompt.startswith("[")


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_can_be_read(tmp_path, name):
    [e] = load_longbench(write(tmp_path, {"dataset": name, "all_classes": ["Ada", "Bob"]}), Bytes())
    assert e.metric == DATASETS[name].metric and e.max_new_tokens == DATASETS[name].max_new_tokens
    assert ROW["context"] in e.prompt and ROW["input"] in e.prompt


def test_long_contexts_lose_their_middle(tmp_path):
    context = "".join(f"<{i}>" for i in range(400))
    [e] = load_longbench(write(tmp_path, {"context": context}), Bytes(), max_length=600)
    assert len(Bytes()(e.prompt)["input_ids"]) + e.max_new_tokens == 600
    assert "<0><1>" in e.prompt and "<398><399>" in e.prompt and "<200>" not in e.prompt
    assert e.prompt.endswith("Answer:")
    with pytest.raises(ValueError, match="line 1: max_length leaves 68 tokens for the prompt"):
        load_longbench(write(tmp_path, {}), Bytes(), max_length=100)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"dataset": "squad"}, "line 2: the column 'dataset' must be one of narrativeqa, .*, got 'squad'"),
        ({"answers": []}, "line 2: the column 'answers' is empty"),
        ({"answers": "Ada"}, "line 2: the column 'answers' must be a list of texts, got 'Ada'"),
        ({"context": 3}, "line 2: the column 'context' must be text, got int"),
        ({"dataset": "trec"}, "line 2: the column 'all_classes' must name the classes"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_longbench(write(tmp_path, {}, row), Bytes())


def test_bad_files(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_longbench(path, Bytes())
    for text, message in (
        ("\n", "the file has no examples"),
        ("[]\n", "line 1: a line must be an object with input, .*, got list"),
        ("{\n", "line 1, column 2: not JSON"),
        ('{"input": ""}\n', "line 1: the column 'context' is missing"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_longbench(path, Bytes())
    path.write_bytes(b'{"input": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        load_longbench(path, Bytes())
