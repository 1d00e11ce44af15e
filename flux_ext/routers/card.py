"""The model card of saved routers: what they are for, how they are loaded, their settings and their training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..config import FluxConfig
from ..operators.pattern_functions import BUILT_IN

TEMPLATE = """\
---
{{ card_data }}
{%- if base_model %}
base_model: {{ base_model }}
{%- endif %}
---

# Routers of {{ model }}

They choose for each input which {{ units }} of the model attend to every token (full) and which to few of them
(sparse), as in Flux Attention ([arXiv 2604.07394](https://arxiv.org/abs/2604.07394)) and Elastic Attention
([arXiv 2601.17367](https://arxiv.org/abs/2601.17367)). The model's own weights are not here: it is loaded as ever, and
patched with these routers ({{ parameters }} parameters).

```python
import flux_ext
from transformers import AutoModelForCausalLM

{% for name in own_patterns -%}
flux_ext.register_pattern("{{ name }}", YOUR_FUNCTION)  # these routers were trained with a pattern of this name
{% endfor -%}
model = AutoModelForCausalLM.from_pretrained("{{ model }}")
flux_ext.patch(model, routers="{{ source }}")
```

## Settings

| field of `FluxConfig` | value |
| --- | --- |
{%- for name, value in settings.items() %}
| `{{ name }}` | {{ value }} |
{%- endfor %}

## Training

{{ training or "Nothing is recorded about how these routers were trained." }}
"""
"""In Jinja, as the Hub's mixin has it; :func:`facts` gives the values."""

_TRAINING = "## Training\n\n"


def training_of(folder: str | Path) -> str | None:
    """What the card in a folder says of the routers' training; None where there is no card of ours."""
    try:
        _, found, text = (Path(folder) / "README.md").read_text(encoding="utf-8").partition(_TRAINING)
    except (OSError, UnicodeDecodeError):
        return None
    return text.strip() if found else None


_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def facts(config: FluxConfig, parameters: int) -> dict[str, Any]:
    """What the template says of routers with this configuration and so many parameters."""
    name = config.base_model_name_or_path
    published = name is not None and bool(_REPOSITORY.fullmatch(name)) and not Path(name).exists()
    return {
        "base_model": name if published else None,  # the Hub takes repositories only
        "model": name or "MODEL",
        "source": "FOLDER-OR-REPOSITORY",
        "own_patterns": sorted({config.full, config.pattern} - set(BUILT_IN)),
        "units": "layers" if config.granularity == "layer" else "KV heads",
        "parameters": f"{parameters:,}",
        "settings": {k: v for k, v in config.to_dict().items() if v is not None and k != "base_model_name_or_path"},
        "training": None,
    }
