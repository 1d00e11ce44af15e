"""A transformers model and what a patch changes in it.

``flux_ext`` has the names for use (``patch``, ``routes``, ...). Here are those to watch and to train it with: what the
routers decided (:func:`last_routing`), and deciding in their place (:func:`policy`).
"""

from .patching import RoutingRecord, evaluation_mode, last_routing, policy, prompt_lengths

__all__ = ["RoutingRecord", "evaluation_mode", "last_routing", "policy", "prompt_lengths"]
