"""JSON as its standard has it: there are no numbers but finite ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """The same with None in place of every float that JSON cannot write (NaN and the infinities)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def dumps(value: object) -> str:
    """The text of a JSON file, null where a number is not finite."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
