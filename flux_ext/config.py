"""What a patched model does beyond its weights: which sparse pattern, which routers, when they decide."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, SupportsIndex

from .operators.patterns import Streaming, Triangle

FORMAT_VERSION = 1
"""Of the format of saved routers. 1: in files with names of their own; 0, which is not written into files: the fields
alone, in ``config.json``."""

_CHOICES = {
    "pattern": ("streaming", "triangle"),
    "granularity": ("layer", "head"),
    "route_on": ("prompt", "first_chunk"),
}
_FILLED_BY_PATCH = ("num_layers", "head_dim", "num_kv_heads", "model_type", "base_model_name_or_path")


@dataclass
class FluxConfig:
    """Settings of :func:`flux_ext.patch`, saved beside the routers.

    Args:
        pattern: the sparse mode, ``"streaming"`` or ``"triangle"`` (streaming whose last prompt rows see
            everything; Flux Attention, arXiv 2604.07394).
        sink, window, align: tokens, see :class:`flux_ext.Streaming`. The published checkpoints have
            ``align=128``.
        last_q: rows at the end of the prompt that see everything (triangle only).
        granularity: ``"layer"``, one decision per sequence and layer from its query states (Flux), or
            ``"head"``, one per KV head from its key states (Elastic Attention, arXiv 2601.17367).
        pool_size: rows pooled at either end of the prompt.
        layers_to_route: indices of the model's layers that get a router; None: all with full attention.
            The other layers with full attention stay full.
        route_on: ``"prompt"``: the first forward of a sequence has its whole prompt (``prefill_chunk_size``
            is refused); ``"first_chunk"``: its first chunk decides and the route sticks.
        num_layers, head_dim, num_kv_heads, model_type, base_model_name_or_path: of the model; filled by
            ``patch`` and compared when routers are loaded.

    Raises:
        ValueError: a field breaks a rule; the message names field, rule and value.
    """

    pattern: str = "streaming"
    sink: int = 128
    window: int = 2048
    align: int = 1
    last_q: int = 128
    granularity: str = "layer"
    pool_size: int = 100
    layers_to_route: list[int] | None = None
    route_on: str = "prompt"
    num_layers: int | None = None
    head_dim: int | None = None
    num_kv_heads: int | None = None
    model_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("sink", "window", "align", "last_q", "pool_size"):
            check_integer(name, getattr(self, name))
        for name in ("model_type", "base_model_name_or_path"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name} must be a string or None, got {getattr(self, name)!r}")
        self.sparse_pattern()  # checks sink, window, align and last_q
        if self.pool_size < 1:
            raise ValueError(f"pool_size must be >= 1, got {self.pool_size}")
        if self.pattern == "triangle" and self.route_on == "first_chunk":
            raise ValueError('pattern="triangle" needs the whole prompt at once: route_on must be "prompt"')
        for name in ("num_layers", "head_dim", "num_kv_heads"):
            value = getattr(self, name)
            if value is not None and check_integer(name, value) < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.layers_to_route is not None:
            layers = self.layers_to_route = _layer_indices(self.layers_to_route)
            if not layers:
                raise ValueError("layers_to_route is empty: nothing would be routed")
            if layers != sorted(set(layers)) or layers[0] < 0:
                raise ValueError(f"layers_to_route must be ascending layer indices from 0, got {layers}")
            if self.num_layers is not None and layers[-1] >= self.num_layers:
                raise ValueError(f"layers_to_route has layer {layers[-1]}, the model {self.num_layers} layers")

    def to_dict(self) -> dict[str, Any]:
        """The fields, the version of the format and that of the package, as they are saved."""
        from . import __version__

        return {"format_version": FORMAT_VERSION, "flux_ext_version": __version__, **asdict(self)}

    @classmethod
    def from_dict(cls, values: object, source: str = "the configuration") -> FluxConfig:
        """The configuration that :meth:`to_dict` gave; fields that an older version lacked have their defaults.

        Args:
            values: what the JSON file holds.
            source: the file, for errors.

        Raises:
            ValueError: a newer version, an unknown field, or a field that breaks a rule.
        """
        from . import __version__

        if not isinstance(values, Mapping):
            raise ValueError(f"{source} must hold a JSON object, got {type(values).__name__}")
        values = dict(values)
        writer = values.pop("flux_ext_version", None)
        needs = f"use flux_ext {writer} or newer, this is {__version__}"
        version = check_integer("format_version", values.pop("format_version", 0), f"{source}: ")
        if version > FORMAT_VERSION:
            raise ValueError(f"{source} has format_version {version}, above {FORMAT_VERSION}: {needs}")
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"{source} has unknown fields ({', '.join(unknown)}): {needs}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def sparse_pattern(self) -> Streaming | Triangle:
        """The sparse mode over a prompt."""
        if self.pattern == "triangle":
            return Triangle(self.sink, self.window, self.last_q, self.align)
        return Streaming(self.sink, self.window, self.align)

    def decode_pattern(self) -> Streaming:
        """The sparse mode of the steps after the prompt."""
        return Streaming(self.sink, self.window, self.align)

    def routed_layers(self) -> list[int]:
        """Indices of the layers that have a router, one per entry of ``FluxRouters.layers``."""
        if self.layers_to_route is not None:
            return self.layers_to_route
        if self.num_layers is None:
            raise ValueError("num_layers must be given where layers_to_route is None")
        return list(range(self.num_layers))

    def differences(self, other: FluxConfig) -> str:
        """Fields in which two configurations contradict each other; what either leaves open (None) agrees."""
        return ", ".join(
            f"{f.name}: {a!r} and {b!r}"
            for f in fields(self)
            if f.name != "base_model_name_or_path"
            and (a := getattr(self, f.name)) != (b := getattr(other, f.name))
            and not (f.name in (*_FILLED_BY_PATCH, "layers_to_route") and None in (a, b))
        )


def check_integer(name: str, value: object, where: str = "") -> int:
    """The value; ValueError with its name where it is no integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}{name} must be an integer, got {value!r}")
    return value


def _layer_indices(layers: Iterable[SupportsIndex]) -> list[int]:
    """Layers as a list of ints, from any sequence of integers."""
    try:
        if isinstance(layers, str) or any(isinstance(i, bool) for i in layers):
            raise TypeError
        return [operator.index(i) for i in layers]
    except TypeError:
        raise ValueError(f"layers_to_route must be a list of integers or None, got {layers!r}") from None
