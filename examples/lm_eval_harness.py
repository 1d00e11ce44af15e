"""A patched model in EleutherAI's evaluation harness (pip install lm-eval).

    python examples/lm_eval_harness.py --model MODEL --routers ROUTERS --tasks hellaswag arc_easy
    python examples/lm_eval_harness.py --model MODEL --routers ROUTERS --tasks niah_single_1 ruler_vt --length 4096

The second needs lm-eval[ruler]; these two, niah_multikey_2 and _3, ruler_cwe and ruler_fwe make their examples without
a download. A table per mode is printed, and the mean sparsity beside it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import flux_ext
from flux_ext.models.patching import last_routing, prompt_lengths

Request = tuple[Any, list[int], list[int]]


class FluxLM(HFLM):
    """The harness's own wrapper of Hugging Face models, for patched ones.

    Generation needs nothing: prompts are padded on the left and come with their mask. The likelihood of a choice is
    asked for with context and choice in one sequence, and batches are padded on the right without a mask. So that the
    routers decide as in use, from the context alone, each such request runs by itself and says where its context ends.
    """

    sparsity: float = float("nan")
    """Mean share of sparse attention over all requests since :meth:`start_counting`."""

    def start_counting(self) -> None:
        """Forgets the routes of earlier requests."""
        self._shares: list[float] = []

    def _count(self) -> None:
        self._shares += last_routing(self.model).routes.float().mean((1, 2)).tolist()
        self.sparsity = sum(self._shares) / len(self._shares)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        found = []
        for request in requests:
            text, context, choice = request
            # The harness cuts what is too long on the left. Without a text it asks for that of a whole document.
            seen = None if text is None else min(len(context), self.max_length + 1 - len(choice))
            with prompt_lengths(self.model, None if seen is None else torch.tensor([seen], device=self.device)):
                found += super()._loglikelihood_tokens([request], disable_tqdm=True, override_bs=1)
            self._count()
        return found

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = super()._model_generate(*args, **kwargs)
        self._count()
        return tokens


def modes(model: Any, names: list[str]) -> Iterator[str]:
    """Each mode's name, while the model is in it."""
    routes = {"dense": "full", "sparse": "sparse"}
    for name in names:
        with flux_ext.routes(model, routes[name]) if name in routes else contextlib.nullcontext():
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--routers", required=True, help="folder or hub name")
    parser.add_argument("--tasks", nargs="+", required=True, help="the harness's names")
    parser.add_argument("--modes", nargs="+", default=["dense", "sparse", "routed"])
    parser.add_argument("--limit", type=int, help="examples per task")
    parser.add_argument("--length", type=int, default=4096, help="tokens, for the tasks of RULER")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    dtype = torch.float32 if args.device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    flux_ext.patch(model, routers=args.routers)
    lm = FluxLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(args.model), batch_size=args.batch_size)
    for mode in modes(model, args.modes):
        lm.start_counting()
        metadata = {"pretrained": args.model, "max_seq_lengths": [args.length]}
        results = lm_eval.simple_evaluate(lm, tasks=args.tasks, limit=args.limit, metadata=metadata)
        print(f"{mode}, sparsity {lm.sparsity:.3f}\n{make_table(results)}", flush=True)


if __name__ == "__main__":
    main()
