"""What the tests of the command line share: a folder with a tiny random model, and the commands run on it."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flux_ext.cli import commands
from flux_ext.examples import Example
from flux_ext.training import save_examples

PATTERN = ["--sink", "2", "--window", "8", "--pool-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, its tokenizer, examples and a prompt."""
    path = tmp_path_factory.mktemp("cli")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(
        path / "model"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=256,
        pad_token_id=257,
    )
    Qwen3ForCausalLM(config).save_pretrained(path / "model")
    examples = [Example(f"text {i} " * 40, "what?", f"a{i}", "xy"[i % 2]) for i in range(8)]
    save_examples(examples, path / "data.jsonl")
    (path / "prompt.txt").write_text("Once upon a time")
    (path / "prose").mkdir()
    words = [f"{a}{b}{c}nd" for a in "bdfglmnprst" for b in "aeiou" for c in "klmnr"]
    for i in range(3):
        text = [words[(i + 7 * j) % len(words)] for j in range(900)]
        (path / "prose" / f"{i}.txt").write_text(". ".join(" ".join(text[j : j + 8]) for j in range(0, 900, 8)))
    return path


def run(*args):
    return commands.main([str(a) for a in args])


@pytest.fixture(scope="module")
def routers(folder):
    """Routers that the command line has trained."""
    out = folder / "routers"
    assert run(
        "train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", out,
        "--device", "cpu", "--steps", 4, "--batch-size", 2, "--accumulate", 2, "--save-steps", 2,
        "--target", "x=0.25", *PATTERN,
    ) == 0  # fmt: skip
    return out


@pytest.fixture
def no_model(monkeypatch):
    """A model that must not be loaded."""

    def load(*_, **__):
        raise AssertionError("the model was loaded before the options were checked")

    monkeypatch.setattr(commands, "load_model", load)


def train(folder, output, *args):
    return run(
        "train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", output,
        "--device", "cpu", *args,
    )  # fmt: skip


def error_of(capsys, call):
    """Exit status and the one line that was written."""
    try:
        status = call()
    except SystemExit as exit:
        status = exit.code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("flux-ext: error: ")
    return status, line
