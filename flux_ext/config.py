"""What a patched model does beyond its weights: its two modes of attention, which routers, when they decide."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, SupportsIndex

from .operators.pattern_functions import is_registered
from .operators.patterns import BlockSparse, Full, Streaming, Triangle

FORMAT_VERSION = 2
"""Of the format of saved routers. 2: with block-sparse modes and dense decoding; 1: without, in files with names of
their own; 0, which is not written into files: the fields alone, in ``config.json``."""

PRESETS: dict[str, dict[str, Any]] = {
    "fa-ssa": {"full": "full", "pattern": "streaming", "decode": "sparse"},
    "fa-ta": {"full": "full", "pattern": "triangle", "decode": "sparse"},
    "fa-xa": {"full": "full", "pattern": "block_sparse", "decode": "dense"},
    "xa-ssa": {"full": "block_sparse", "pattern": "streaming", "decode": "sparse"},
}
"""The papers' names of a full mode and a sparse mode: FA is full attention, SSA streaming, TA triangle, XA block-sparse
attention by antidiagonal scores (arXiv 2604.07394 and 2601.17367). All numbers are the fields' defaults."""

PAPERS: dict[str, dict[str, Any]] = {
    "flux": {**PRESETS["fa-ssa"], "align": 128, "granularity": "layer"},
    "elastic": {**PRESETS["fa-ssa"], "align": 128, "granularity": "head"},
}
"""The published checkpoints of Flux Attention (arXiv 2604.07394) and Elastic Attention (arXiv 2601.17367): windows that
start at multiples of 128, a decision per layer or per KV head."""

_CHOICES = {
    "full": ("full", "block_sparse"),
    "pattern": ("streaming", "triangle", "block_sparse"),
    "decode": ("sparse", "dense"),
    "granularity": ("layer", "head"),
    "route_on": ("prompt", "first_chunk"),
}
_FILLED_BY_PATCH = ("num_layers", "head_dim", "num_kv_heads", "model_type", "base_model_name_or_path")


@dataclass
class FluxConfig:
    """Settings of :func:`flux_ext.patch`, saved beside the routers.

    Args:
        pattern: the sparse mode over a prompt: ``"streaming"``; ``"triangle"``, streaming whose last prompt rows see
            everything (Flux Attention, arXiv 2604.07394); ``"block_sparse"``, blocks of keys that antidiagonal scores
            choose (XAttention, arXiv 2503.16428); or a name of your own, blocks of keys that a function chooses, see
            :func:`flux_ext.register_pattern`.
        full: the full mode over a prompt: ``"full"``; ``"block_sparse"`` (XA-SSA of Elastic Attention, arXiv
            2601.17367); or a name of your own. Layers without a router attend to everything.
        decode: what the tokens after the prompt see where the route is sparse: ``"sparse"``, sink and window, and what
            these do not show is dropped; or ``"dense"``, everything, which is kept. Full routes always decode dense.
        sink, window, align: tokens, see :class:`flux_ext.Streaming`: of streaming and triangle, and of sparse decoding
            whatever the pattern. The published checkpoints have ``align=128``.
        last_q: rows at the end of the prompt that see everything (triangle only).
        threshold, stride: of ``"block_sparse"``, see :class:`flux_ext.BlockSparse`.
        block_width: keys per block of ``"block_sparse"`` and of functions, 128 or 64.
        granularity: ``"layer"``, one decision per sequence and layer from its query states (Flux), or
            ``"head"``, one per KV head from its key states (Elastic Attention, arXiv 2601.17367).
        pool_size: rows pooled at either end of the prompt.
        layers_to_route: indices of the model's layers that get a router; None: all with full attention.
            The other layers with full attention stay full.
        route_on: ``"prompt"``: the first forward of a sequence has its whole prompt (``prefill_chunk_size``
            is refused), and what follows is decoding, also the next turn of a conversation; ``"first_chunk"``: its
            first chunk decides and the route sticks, and later forwards of more than one token are chunks too.
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
    full: str = "full"
    decode: str = "sparse"
    threshold: float = 0.9
    stride: int = 16
    block_width: int = 128
    num_layers: int | None = None
    head_dim: int | None = None
    num_kv_heads: int | None = None
    model_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value, own = getattr(self, name), name in ("full", "pattern")
            if value not in choices and not (own and is_registered(value)):
                where = " or a name that flux_ext.register_pattern has been given" if own else ""
                raise ValueError(f"{name} must be one of {choices}{where}, got {value!r}")
        for name in ("sink", "window", "align", "last_q", "stride", "block_width", "pool_size"):
            check_integer(name, getattr(self, name))
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise ValueError(f"threshold must be a number, got {self.threshold!r}")
        for name in ("model_type", "base_model_name_or_path"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name} must be a string or None, got {getattr(self, name)!r}")
        self._check_patterns()
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

    def _check_patterns(self) -> None:
        """ValueError where a number breaks its rule, whichever pattern uses it."""
        Triangle(self.sink, self.window, self.last_q, self.align)
        try:
            self._blocks("block_sparse")
        except ValueError as error:  # which has its own name for one of them
            raise ValueError(str(error).replace("width", "block_width")) from None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FluxConfig:
        """The modes that the papers name, with the published numbers.

        Args:
            name: ``"fa-ssa"``, ``"fa-ta"``, ``"fa-xa"`` or ``"xa-ssa"``, see :data:`PRESETS`. ``"fa-xa"`` decodes
                dense, the others sparse. Or ``"flux"`` or ``"elastic"``, see :data:`PAPERS`;
                :meth:`flux_ext.training.Recipe.preset` has how they are trained.
            changes: any fields, instead of what the preset has.

        Raises:
            ValueError: an unknown name, or a field that breaks a rule.
        """
        presets = {**PRESETS, **PAPERS}
        if name not in presets:
            raise ValueError(f"a preset must be one of {tuple(presets)}, got {name!r}")
        return cls(**{**presets[name], **changes})

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

    def full_pattern(self) -> Full | BlockSparse:
        """The full mode over a prompt."""
        return Full() if self.full == "full" else self._blocks(self.full)

    def sparse_pattern(self) -> Streaming | Triangle | BlockSparse:
        """The sparse mode over a prompt."""
        if self.pattern == "streaming":
            return self.streaming()
        if self.pattern == "triangle":
            return Triangle(self.sink, self.window, self.last_q, self.align)
        return self._blocks(self.pattern)

    def decode_pattern(self) -> Streaming | Full:
        """The sparse mode of the tokens after the prompt; the full one sees everything."""
        return self.streaming() if self.decode == "sparse" else Full()

    def streaming(self) -> Streaming:
        """Sink and window: what is left of the keys that are dropped."""
        return Streaming(self.sink, self.window, self.align)

    def hides_any(self, length: int) -> bool:
        """Whether sparse routes hide any key of a prompt of ``length`` tokens; of lists of blocks: whether they may."""
        if self.pattern not in ("streaming", "triangle"):
            return True
        return self.align * ((length - 1) // self.align + 1) - self.window > self.sink

    def drops_keys(self) -> bool:
        """Whether sparse routes give back the memory of keys out of sight. Dense decoding sees them all, and so may
        later chunks of a block-sparse prompt."""
        chunks_see_all = self.pattern not in ("streaming", "triangle") and self.route_on == "first_chunk"
        return self.decode == "sparse" and not chunks_see_all

    def _blocks(self, mode: str) -> BlockSparse:
        if mode != "block_sparse":
            return BlockSparse(name=mode, width=self.block_width)
        return BlockSparse(threshold=self.threshold, width=self.block_width, stride=self.stride)

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
