"""The operators with their tensors and patterns, and plain PyTorch that says what each computes (``reference``).

Nothing here knows transformers.
"""

from .block_selection import select_blocks
from .cache_append import append
from .explanation import Explanation, explain
from .operands import KeyValues, Routing
from .prompt_and_answer import attention_after_prompt
from .routed_attention import attend, attention, mix
from .router_scoring import decide, route

__all__ = [
    "Explanation",
    "KeyValues",
    "Routing",
    "append",
    "attend",
    "attention",
    "attention_after_prompt",
    "decide",
    "explain",
    "mix",
    "route",
    "select_blocks",
]
