"""Writes the API reference, made from the docstrings, as HTML: `make docs`, or `python tools/api_reference.py FOLDER`.

Needs pdoc (`pip install flux-ext[docs]`). A warning of pdoc, such as a public name that is not there, is an error.
"""

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pdoc

# What a user calls first, then what the recipes and the tests call.
MODULES = [
    "flux_ext",
    "flux_ext.training",
    "flux_ext.evaluation",
    "flux_ext.examples",
    "flux_ext.models",
    "flux_ext.routers",
    "flux_ext.operators",
    "flux_ext.operators.patterns",
    "flux_ext.operators.reference",
]


def main(folder: Path) -> None:
    """Writes `folder`/index.html and what it links to."""
    warnings.filterwarnings("error", module="pdoc")
    # A named tuple under another module's name: pdoc looks for its types there, and shows their names instead.
    warnings.filterwarnings("ignore", message="Error parsing type annotation", module="pdoc")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    package = import_module("flux_ext")
    os.chdir(folder)  # in a checkout, pdoc would ask whether its flux_ext or the installed one is meant
    for name in package.__all__:  # imported when first used, but pdoc looks only for what is there
        setattr(package, name, getattr(package, name))
    pdoc.render.configure(docformat="google", footer_text=f"flux_ext {package.__version__}")
    pdoc.pdoc(*MODULES, output_directory=folder)
    print(f"{folder / 'index.html'}: {len(MODULES)} modules")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/api_reference.py FOLDER")
    main(Path(sys.argv[1]))
