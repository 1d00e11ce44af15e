"""``python -m benchmarks KIND [options]``; every kind has ``--help``."""

from __future__ import annotations

import importlib
import sys

KINDS = {
    "cpu": "benchmarks.cpu",
    "cuda": "benchmarks.cuda.run",
    "end_to_end": "benchmarks.end_to_end",
    "frontier": "benchmarks.frontier",
    "launch": "benchmarks.launch",
    "picture": "benchmarks.picture",
    "pooled_states": "benchmarks.pooled_states",
    "serving_steps": "benchmarks.serving_steps",
    "step": "benchmarks.step",
    "training": "benchmarks.training",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        raise SystemExit(f"usage: python -m benchmarks {{{','.join(KINDS)}}} [options]")
    kind = sys.argv.pop(1)
    module = importlib.import_module(KINDS[kind])
    module.main(sys.argv[1:])


if __name__ == "__main__":
    main()
