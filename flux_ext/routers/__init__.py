"""The routers of a model, one per routed layer.

Here are the modules. All of a model's together are a :class:`flux_ext.FluxRouters` (``collection``, which needs
huggingface_hub), whose files are known to ``files``.
"""

from .modules import HeadRouter, LayerRouter, Router

__all__ = ["HeadRouter", "LayerRouter", "Router"]
