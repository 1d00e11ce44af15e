"""The entry point of flux_ext that vLLM loads in each of its processes (group ``vllm.general_plugins``).

It stands beside the package, not in it: vLLM only logs a plugin that fails to import, and would serve without routers
where the package is damaged or another folder of its name is found first. What :func:`register` raises stops vLLM.
"""

import os

ROUTERS_VARIABLE = "FLUX_EXT_ROUTERS"
"""Environment variable with the routers' folder or Hub repository. Unset or empty: vLLM is left as it is."""


def register() -> None:
    """Makes vLLM serve with the routers that :data:`ROUTERS_VARIABLE` names; without it imports nothing.

    Raises:
        ImportError: the package cannot be imported, or the installed vLLM is not one that was tried or lacks a name
            that is needed.
    """
    if os.environ.get(ROUTERS_VARIABLE):
        from flux_ext.serving.engine import activate

        activate()
