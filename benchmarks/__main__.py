"""``python -m benchmarks cpu | cuda | end_to_end [options]``: each prints a table and writes a CSV; see ``--help``."""

from __future__ import annotations

import importlib
import sys

KINDS = ("cpu", "cuda", "end_to_end")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        raise SystemExit(f"usage: python -m benchmarks {{{','.join(KINDS)}}} [options]")
    kind = sys.argv.pop(1)
    module = importlib.import_module(f"benchmarks.{kind}")
    module.main(sys.argv[1:])


if __name__ == "__main__":
    main()
