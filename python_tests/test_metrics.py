"""Scores of generated texts: worked by hand, one line per rule."""

import pytest

from flux_ext.evaluation.metrics import TEXT_METRICS, score
from flux_ext.examples import METRICS, Example


def example(metric, *answers, classes=(), stop=""):
    return Example("text", "", answers[0], "t", metric, answers, classes, stop=stop)


def test_every_metric_is_known():
    assert set(METRICS) == {"tokens", "likelihood", *TEXT_METRICS}
    for metric in ("tokens", "likelihood"):
        with pytest.raises(ValueError, match=f"metric must be one of found, .*, got '{metric}'"):
            score("text", example(metric, "a"))


@pytest.mark.parametrize(
    "metric, answers, text, want",
    [
        ("found", ["12", "34", "56"], "they are 12 and 56.", 2 / 3),
        ("found", ["Paris"], "PARIS!", 1.0),
        ("found", ["Paris"], "", 0.0),
        ("any_found", ["12", "34"], "34 it is", 1.0),
        ("any_found", ["12", "34"], "1 2", 0.0),
        # precision 2/4, recall 2/3, articles and punctuation aside: 4/7
        ("f1", ["the big, red house"], "A red house over there", 4 / 7),
        ("f1", ["no", "red house"], "red house", 1.0),
        ("f1", ["house"], "the", 0.0),
        ("f1", ["北京大学"], "北京", 2 / 3),
        # longest common subsequence "the cat sat" of 3 and 6 words
        ("rouge_l", ["the cat sat"], "the big cat then sat down", 2 * 3 / 9),
        ("rouge_l", ["the cat sat"], "sat cat the", 2 * 1 / 6),
        ("rouge_l", ["a b", "c d"], "c d", 1.0),
        ("rouge_l", ["你好"], "你们好", 2 * 2 / 5),
        ("rouge_l", ["word"], "", 0.0),
        # "abc" and "abd" have "ab" in common; comments and fences are passed over
        ("edit_similarity", ["abd"], "\n# a comment\n```python\nabc\nabd\n", 2 * 2 / 6),
        ("edit_similarity", ["    x = 1"], "x = 1", 1.0),
        ("edit_similarity", ["x"], "# nothing", 0.0),
        ("number", ["Paragraph 12"], "Paragraph 12", 1.0),
        ("number", ["12"], "It is 12 or 13, or 12.", 2 / 3),
        ("number", ["12"], "112", 0.0),
        ("number", ["12"], "none", 0.0),
    ],
)
def test_by_hand(metric, answers, text, want):
    assert score(text, example(metric, *answers)) == pytest.approx(want)


@pytest.mark.parametrize(
    "text, want",
    [
        ("Location: city", 1.0),  # names "Location" too, which is but a part of it
        ("location: CITY or number", 0.5),
        ("number, person, location: city", 1 / 3),
        ("location", 0.0),
        ("nothing of all that", 0.0),
    ],
)
def test_classification(text, want):
    classes = ("Location", "Location: city", "Number", "Person")
    assert score(text, example("classification", "Location: city", classes=classes)) == want
    assert score("location: city", example("classification", "Location", classes=classes)) == 0.5


def test_a_text_counts_up_to_its_stop():
    assert score("\n\nred\nblue", example("found", "red", stop="\n")) == 1
    assert score("\n\nred\nblue", example("found", "blue", stop="\n")) == 0
    assert score("red\nblue", example("found", "blue")) == 1


def test_the_answer_itself_is_expected_where_no_others_are():
    e = Example("text", "", " 12 ", "t", "found")
    assert e.expected == ("12",) and score("12", e) == 1
