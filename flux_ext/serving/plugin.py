"""The entry point that vLLM loads in each of its processes (group ``vllm.general_plugins``).

Imports nothing until routers are named: vLLM only logs a plugin that fails to import, but stops where one that was
imported raises.
"""

import os

ROUTERS_VARIABLE = "FLUX_EXT_ROUTERS"
"""Environment variable with the routers' folder or Hub repository. Unset or empty: vLLM is left as it is."""


def register() -> None:
    """Makes vLLM serve with the routers that :data:`ROUTERS_VARIABLE` names; without it does nothing.

    Raises:
        ImportError: the installed vLLM is not one that was tried, or lacks a name that is needed.
    """
    if os.environ.get(ROUTERS_VARIABLE):
        from .engine import activate

        activate()
