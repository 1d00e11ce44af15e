"""The command line, from training data to a generated text, on a tiny random model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flux_ext import FluxRouters, cli
from flux_ext.evaluation.tasks import Example
from flux_ext.router_files import CONFIG_FILE, WEIGHTS_FILE
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
    return path


def run(*args):
    return cli.main([str(a) for a in args])


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


def test_train_writes_routers(routers):
    loaded = FluxRouters.from_pretrained(routers)
    assert loaded.config.window == 8 and len(loaded.layers) == 2
    recipe = json.loads((routers / "recipe.json").read_text())
    assert recipe["targets"] == {"x": 0.25} and recipe["objective"] == "counterfactual"
    assert (routers / "checkpoint-2").is_dir()


def test_train_resumes_packed_with_another_routers_start(folder, routers, capsys):
    out = folder / "again"
    common = (
        "train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", out,
        "--device", "cpu", "--batch-size", 2, "--packed", "--routers", routers, "--save-steps", 1,
        "--objective", "soft",
    )  # fmt: skip
    assert run(*common, "--steps", 1) == 0
    assert run(*common, "--steps", 2, "--resume", "--eval-data", folder / "data.jsonl") == 0
    assert "routed" in capsys.readouterr().out


def test_eval(folder, routers, capsys):
    scores = folder / "scores.json"
    assert run(
        "eval", "--model", folder / "model", "--routers", routers, "--data", folder / "data.jsonl",
        "--device", "cpu", "--output", scores,
    ) == 0  # fmt: skip
    table = capsys.readouterr().out
    rows = json.loads(scores.read_text())
    assert len(rows) == 6 and all(r["mode"] in table for r in rows)
    by = {(r["task"], r["mode"]): r for r in rows}
    assert by["x", "dense"]["sparsity"] == 0 and by["x", "sparse"]["sparsity"] == 1
    assert by["x", "sparse"]["kv_bytes"] < by["x", "dense"]["kv_bytes"]


def test_generate(folder, routers, capsys):
    assert run(
        "generate", "--model", folder / "model", "--routers", routers, "--prompt-file", folder / "prompt.txt",
        "--max-new-tokens", 5, "--device", "cpu",
    ) == 0  # fmt: skip
    assert "sparsity" in capsys.readouterr().err


def test_info(capsys):
    assert run("info") == 0
    assert "CPU kernels" in capsys.readouterr().out
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"].startswith(torch.__version__)


def test_bench(capsys):
    assert run("bench", "--lengths", 64, "--repeats", 1, "--window", 16, "--sink", 4, "--device", "cpu") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "64"


def test_python_m():
    # From the folder of the package under test: in a checkout another one may lie in the working directory.
    folder = Path(cli.__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "flux_ext", "--version"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0 and done.stdout.startswith("flux-ext ")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--target", "x"], "--target must read TASK=SHARE"),
        (["--target", "x=2"], r"target sparsity of x must lie in [0, 1], got 2.0"),
        (["--target", "z=0.5"], "targets names tasks that the data lack: z"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--resume"], "has no checkpoint"),
        (["--flips", "3"], "flips must be at most the 2 routed layers, got 3"),
        (["--window", "0"], "window must be"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, args, message, capsys):
    status = run(
        "train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", tmp_path / "out",
        "--device", "cpu", *args,
    )  # fmt: skip
    assert status == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("flux-ext: error: ") and message in last


def test_routers_of_another_model_are_refused(folder, routers, capsys):
    config = json.loads((routers / CONFIG_FILE).read_text())
    other = folder / "other"
    other.mkdir()
    (other / WEIGHTS_FILE).write_bytes((routers / WEIGHTS_FILE).read_bytes())
    (other / CONFIG_FILE).write_text(json.dumps({**config, "model_type": "llama"}))
    prompt = folder / "prompt.txt"
    assert run("generate", "--model", folder / "model", "--routers", other, "--prompt-file", prompt) == 1
    assert "model_type" in capsys.readouterr().err
