"""Files of examples, their tokens and the two ways to make batches."""

import json

import pytest
import torch

from flux_ext.examples import Example, load_examples, save_examples
from flux_ext.training.data import IGNORED, PackedCollator, PaddedCollator, RouterDataset

EXAMPLES = [Example("some code ", "what?", "an äns", "a"), Example("", "why?", "so", "b")]


class Bytes:
    """A tokenizer: one token per byte, after a start token."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [2 + b for b in text.encode()]}


def test_json_lines_round_trip(tmp_path):
    save_examples(EXAMPLES, tmp_path / "x.jsonl")
    assert load_examples(tmp_path / "x.jsonl") == EXAMPLES


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"context": e.context, "question": e.question, "answer": e.answer, "task": e.task} for e in EXAMPLES]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert load_examples(tmp_path / "x.parquet") == EXAMPLES
    pq.write_table(pa.Table.from_pylist([{**rows[0], "task": None}]), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"y.parquet, line 1: the column 'task' must be text, got NoneType"):
        load_examples(tmp_path / "y.parquet")
    (tmp_path / "z.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"z\.parquet: not a Parquet file"):
        load_examples(tmp_path / "z.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:4] + b"\0" * 40 + whole[44:])
    with pytest.raises(ValueError, match=r"cut\.parquet: not a Parquet file"):
        load_examples(tmp_path / "cut.parquet")


GOOD = {"context": "c", "question": "q", "answer": "a", "task": "t"}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"context": "c"', r"x.jsonl, line 2, column 16: not JSON"),
        ("[1]", r"line 2: a line must be an object with context, question, answer, task, got list"),
        (json.dumps({**GOOD, "answer": 5}), r"line 2: the column 'answer' must be text, got int"),
        (json.dumps({**GOOD, "answer": ""}), r"line 2: the column 'answer' is empty"),
        (json.dumps({**GOOD, "task": ""}), r"line 2: the column 'task' is empty"),
        (
            json.dumps({**GOOD, "context": "", "question": ""}),
            r"line 2: the columns 'context' and 'question' are both",
        ),
        (json.dumps({k: v for k, v in GOOD.items() if k != "task"}), r"line 2: the column 'task' is missing"),
        (b"\xff\xfe", r"line 2: not UTF-8"),
        (json.dumps(GOOD)[:-1] + ', "answer": "b"}', r"line 2: not an example \(the key 'answer' stands there twice"),
        (
            json.dumps({**GOOD, "context": "a \ud83d b"}),
            r"x.jsonl, line 2: the column 'context' .* character 3 is half of",
        ),
        (json.dumps({**GOOD, "metric": "bleu"}), r"line 2: the column 'metric' must be one of tokens, .*, got 'bleu'"),
        (json.dumps({**GOOD, "metric": 1}), r"line 2: the column 'metric' must be text, got int"),
        (json.dumps({**GOOD, "answers": "so"}), r"line 2: the column 'answers' must be a list of texts, got 'so'"),
        (json.dumps({**GOOD, "answers": ["so", 1]}), r"line 2: the column 'answers' must be a list of texts, got"),
        (json.dumps({**GOOD, "classes": ["a", ""]}), r"line 2: the column 'classes' has an empty text"),
        (json.dumps({**GOOD, "max_new_tokens": 0}), r"line 2: the column 'max_new_tokens' must be >= 1, got 0"),
        (json.dumps({**GOOD, "max_new_tokens": True}), r"'max_new_tokens' must be a whole number, got bool"),
        (json.dumps({**GOOD, "answers": ["a \ud83d"]}), r"line 2: the column 'answers' .* is half of a surrogate"),
        ('{"context": ' + "1" * 5000 + "}", r"x.jsonl, line 2: not an example"),
        ("[" * 100_000, r"x.jsonl, line 2: not an example"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "x.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message):
        load_examples(tmp_path / "x.jsonl")


SCORED = Example("some code ", "what?", "a, b", "a", "found", ("a", "b"), ("a", "b", "c"), 7, "\n")


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert load_examples(file) == [Example(**GOOD)]


def test_how_a_text_is_scored_is_kept_where_it_says_something(tmp_path):
    save_examples([*EXAMPLES, SCORED], tmp_path / "x.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert rows[0].keys() == rows[1].keys() == {"context", "question", "answer", "task"}
    assert rows[2]["answers"] == ["a", "b"] and rows[2]["stop"] == "\n" and len(rows[2]) == 9
    assert load_examples(tmp_path / "x.jsonl") == [*EXAMPLES, SCORED]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = sorted({c for row in rows for c in row})
    table = pyarrow.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows])
    parquet.write_table(table, tmp_path / "x.parquet")
    assert load_examples(tmp_path / "x.parquet") == [*EXAMPLES, SCORED]


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file"):
        load_examples(tmp_path / "none.jsonl")
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(ValueError, match=r"x.csv: the name must end in .jsonl or .parquet"):
        load_examples(tmp_path / "x.csv")
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"x\.jsonl: the file has no examples"):
        load_examples(tmp_path / "x.jsonl")


def test_tokens_and_truncation():
    rows = RouterDataset(EXAMPLES, Bytes())
    assert rows.tasks == ("a", "b") and len(rows) == 2
    row = rows[0]
    assert row["prompt"] == [1, *(2 + b for b in b"some code what?")] and row["task"] == 0
    assert row["answer"] == [2 + b for b in "an äns".encode()]
    short = RouterDataset(EXAMPLES, Bytes(), max_length=13)[0]
    assert short["answer"] == row["answer"]
    assert short["prompt"] == row["prompt"][:3] + row["prompt"][-3:]
    with pytest.raises(ValueError, match="'why' -> '' of 'a' has 4 prompt and 0 answer tokens; both need one"):
        RouterDataset([Example("", "why", "", "a")], Bytes())[0]
    with pytest.raises(ValueError, match="max_length 8 has no room"):
        RouterDataset(EXAMPLES, Bytes(), max_length=8)[0]
    with pytest.raises(ValueError, match="'b' is not in"):
        RouterDataset(EXAMPLES, Bytes(), tasks=["a"])


def test_dicts_of_the_columns_are_examples():
    """In place of :class:`Example`, mixed with it, and with the same rules as a line of a file."""
    dicts = [{"context": e.context, "question": e.question, "answer": e.answer, "task": e.task} for e in EXAMPLES]
    scored = {**dicts[0], "metric": "found", "answers": ("an", "äns"), "unknown": 1}
    rows = RouterDataset([*dicts, EXAMPLES[0], scored], Bytes())
    assert rows.examples == [*EXAMPLES, EXAMPLES[0], Example(*dicts[0].values(), metric="found", answers=("an", "äns"))]
    assert [rows[i] for i in range(2)] == [RouterDataset(EXAMPLES, Bytes())[i] for i in range(2)]
    for bad, message in (
        ({"context": "a", "question": "b", "answer": "c"}, r"examples\[1\]: the column 'task' is missing"),
        ({**dicts[0], "answer": 5}, r"examples\[1\]: the column 'answer' must be text, got int"),
        ("text", r"examples\[1\]: must be an object with context, question, answer, task, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            RouterDataset([dicts[0], bad], Bytes())


def test_collators_hold_the_same_sequences():
    rows = [RouterDataset(EXAMPLES, Bytes())[i] for i in (0, 1, 1)]
    padded, packed = PaddedCollator(0)(rows), PackedCollator()(rows)
    bounds = packed["cu_seq_lens_q"].tolist()
    assert packed["max_length_q"] == padded["input_ids"].shape[1]
    for i, row in enumerate(rows):
        keep = padded["attention_mask"][i].bool()
        span = slice(bounds[i], bounds[i + 1])
        assert padded["input_ids"][i, keep].tolist() == packed["input_ids"][0, span].tolist()
        assert padded["labels"][i, keep].tolist() == packed["labels"][0, span].tolist()
        assert packed["position_ids"][0, span].tolist() == list(range(keep.sum()))
        labels = padded["labels"][i][padded["labels"][i] != IGNORED]
        assert labels.tolist() == row["answer"]
    assert padded["attention_mask"][1, 0] == 0  # on the left
    for batch in (padded, packed):
        assert batch["task_ids"].tolist() == [0, 1, 1]
        assert batch["prompt_lengths"].tolist() == [len(r["prompt"]) for r in rows]
    assert "attention_mask" not in PaddedCollator(0)([rows[0], rows[0]])
    assert all(torch.is_tensor(v) for v in padded.values())
