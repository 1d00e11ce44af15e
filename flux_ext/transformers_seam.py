"""What this package takes from transformers under names that its releases change.

5.24 renamed the cache: the argument ``past_key_values`` of models, decoders and attention modules, and the field of
their outputs, is ``cache``. Modules outside transformers may still use the old name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from typing import Any

from transformers.masking_utils import create_causal_mask

CACHE_NAMES = ("cache", "past_key_values")


def cache_name(function: Callable[..., Any]) -> str:
    """The keyword under which a function takes its cache.

    Raises:
        ValueError: it takes none.
    """
    parameters = inspect.signature(function).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise ValueError(f"{function.__qualname__} takes no cache: it has no parameter {' or '.join(CACHE_NAMES)}")


CACHE = cache_name(create_causal_mask)
"""The keyword of the installed transformers: its models and ``generate`` take a cache by this name."""


def cache_of(x: Any) -> Any:
    """The cache in a model's or generate's output, or among keyword arguments; None where there is none."""
    for name in CACHE_NAMES:
        if name in x and x[name] is not None:
            return x[name]
    return None


def take_cache(kwargs: MutableMapping[str, Any]) -> Any:
    """As :func:`cache_of`, and removes it from the keyword arguments."""
    cache = cache_of(kwargs)
    for name in CACHE_NAMES:
        kwargs.pop(name, None)
    return cache
