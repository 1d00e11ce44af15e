"""A patched model's own view of its transformers configuration.

Attention modules and masks look up the attention function by ``config._attn_implementation``. One configuration
object may belong to several models, patched and not, and new models and files are made from it; so the object itself
stays as it is, and only the modules of the patched model see another name, through a view that shares the rest.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn


def view_of(config: Any, implementation: str, text: Any = None) -> Any:
    """An object of a subclass of the configuration's class, with the same attributes for ever: what is set on one is
    set on the other.

    Args:
        config: the configuration that stays as it is.
        implementation: what ``_attn_implementation`` is in the view.
        text: where ``config`` is of a model of several parts, the view of its text model's configuration, which
            ``get_text_config`` then gives: the other parts keep their ``_attn_implementation``.
    """
    stock: Any = type(config)
    cls = _view_class(stock)
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "_flux_stock", config)
    object.__setattr__(view, "_flux_name", implementation)
    object.__setattr__(view, "_flux_text", text)
    return view


@functools.cache
def _view_class(stock: Any) -> Any:
    def implementation(self: Any) -> str | None:
        name: str | None = self._flux_name if self._flux_text is None else self._flux_stock._attn_implementation
        return name

    def set_implementation(self: Any, name: Any) -> None:
        self._flux_stock._attn_implementation = name

    def get_text_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = stock.get_text_config(self, *args, **kwargs)
        return self._flux_text if self._flux_text is not None and found is self._flux_text._flux_stock else found

    def reduce(self: Any, protocol: Any) -> Any:
        """Copies and pickles are views of the configuration's copy."""
        return view_of, (self._flux_stock, self._flux_name, self._flux_text)

    return type(
        stock.__name__,
        (stock,),
        {
            "__module__": __name__,
            "__doc__": stock.__doc__,
            "__slots__": ("_flux_stock", "_flux_name", "_flux_text"),  # not in the shared __dict__
            "__new__": lambda cls, *args, **kwargs: stock(*args, **kwargs),  # a call makes a stock object, no view
            "__init__": stock.__init__,
            "__reduce_ex__": reduce,
            "__copy__": lambda self: view_of(copy.copy(self._flux_stock), self._flux_name, self._flux_text),
            "_attn_implementation": property(implementation, set_implementation),
            "get_text_config": get_text_config,
        },
    )


class Views:
    """Lets the modules of one model see another ``_attn_implementation``, and nobody else.

    Args:
        model: whose own ``config`` stays: it is what people and ``generate`` look at.
        decoder: its part that attends, maybe the model itself.
        text: the decoder's configuration.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, text: Any) -> None:
        self.model, self.decoder, self.text = model, decoder, text
        self.views: list[tuple[Any, Any]] = []  # configurations and what is seen of them
        self.before: list[tuple[Any, Any]] = []  # modules and the configuration they had

    def show(self, implementation: str) -> None:
        """Gives every module with this model's configuration a view of it."""
        whole: Any = self.model.config
        self.views = [(self.text, view_of(self.text, implementation))]
        if whole is not self.text:
            self.views.append((whole, view_of(whole, implementation, self.views[0][1])))
        for module in self.model.modules():
            config = module.__dict__.get("config")
            if config is None or (module is self.model and module is not self.decoder):
                continue
            if type(config) is type(self.text) and self.of(config) is config:  # some families have one per layer
                self.views.append((config, view_of(config, implementation)))
            if self.of(config) is not config:
                self.before.append((module, config))
                module.config = self.of(config)

    def hide(self) -> None:
        """Gives the modules back what they had."""
        for module, config in self.before:
            module.config = config
        self.views, self.before = [], []

    def of(self, config: Any) -> Any:
        """What this model's modules see of a configuration."""
        return next((view for stock, view in self.views if stock is config), config)
