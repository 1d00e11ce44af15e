"""How ``patch`` proves itself on the model at hand, with a few tokens.

1. :class:`Proof` runs the model as it is: a prompt of two sequences, one left-padded, and one cached step.
2. :func:`look` runs it with an attention function that only looks: at the heads it is given, at the mask each layer
   would get, and at where queries and keys can be tapped before the rotary embedding.
3. :meth:`Proof.compare` runs the patched model, all routes full, on the tokens of 1. Every attention module must give
   what it gave, and then hands on exactly what it gave: so each is tried with the inputs of the unpatched model,
   rounding does not add up over the layers (nor choose another expert), and what the layers and the decoder do beside
   attention must stay the same too.

What does not hold is a ValueError that names model, module and reason.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..transformers_seam import AttentionInterface, AttentionMaskInterface, cache_of, setting
from . import families
from .attention_function import FLOATS, check_dtype, flux_mask, refuse_terms

LOOK = "flux_ext_look"
PROMPT, PADDING = 9, 3


def _tokens(text_config: Any, device: torch.device) -> Tensor:
    """Some tokens ``[2, PROMPT + 1]``."""
    count = 2 * (PROMPT + 1)
    vocabulary: int = text_config.vocab_size
    return (torch.arange(1, count + 1, device=device) * 7919 % vocabulary).view(2, -1)


@contextlib.contextmanager
def quiet(decoder: nn.Module) -> Iterator[None]:
    """Forwards in here draw no random numbers that later ones would have drawn, drop nothing, and keep no graph."""
    training = [m for m in decoder.modules() if m.training]
    devices = {p.device for p in decoder.parameters() if p.device.type == "cuda"}
    decoder.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def refusing(name: str, doing: str) -> Iterator[None]:
    """Turns every error in a forward into the ValueError that refuses the model."""
    try:
        yield
    except (ImportError, torch.OutOfMemoryError):
        raise
    except ValueError as error:
        raise ValueError(f"{name} cannot be patched: {error}") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be patched: {doing}, {type(error).__name__}: {error}") from error


class Proof:
    """What the unpatched model gives; to be made before anything is changed in it.

    Args:
        attentions: the attention modules that will be patched, by layer.
    """

    def __init__(self, model: Any, decoder: Any, attentions: dict[int, nn.Module], text_config: Any) -> None:
        self.name, self.decoder, self.attentions = type(model).__name__, decoder, attentions
        self.tolerance = {i: _coarseness(m) for i, m in attentions.items()}
        self.seen: dict[int, list[Tensor]] = {i: [] for i in attentions}
        with refusing(self.name, "the unpatched model fails on a few tokens"):
            self.tokens = _tokens(text_config, families.device_of(decoder))
            self.mask = torch.ones_like(self.tokens)
            self.mask[1, :PADDING] = 0
            self.outputs = self._run(self._record)

    def compare(self, cache: Any, name: str) -> None:
        """Runs the patched model with this empty cache, which its decoder takes by this name."""
        self.calls = dict.fromkeys(self.seen, 0)
        with refusing(self.name, "patched it fails on a few tokens"):
            outputs = self._run(self._compare, **{name: cache})
        for index, calls in self.calls.items():
            if calls != len(self.seen[index]):
                raise ValueError(f"{self.name} cannot be patched: layer {index} attends {calls} times in two forwards")
        for got, want, when in zip(outputs, self.outputs, ("at the prompt", "at a cached step"), strict=True):
            self._judge(got, want, f"{when}, with the same attention, {type(self.decoder).__name__}", 0.0)

    def _run(self, hook: Any, **cache: Any) -> list[Tensor]:
        """The decoder's outputs for the prompt and the step."""
        handles = [
            attention.register_forward_hook(lambda module, args, output, i=i: hook(i, output))
            for i, attention in self.attentions.items()
        ]
        common = {"use_cache": True, "return_dict": True}
        try:
            with quiet(self.decoder), _computable(self.decoder, self.tokens.device):
                prompt = self.decoder(
                    input_ids=self.tokens[:, :-1], attention_mask=self.mask[:, :-1], **cache, **common
                )
                made = cache_of(prompt)
                if made is None:
                    raise ValueError("its decoder gives back no cache")
                if cache and made is not next(iter(cache.values())):
                    raise ValueError(f"its decoder brings a cache of its own, {type(made).__name__}")
                own = cache or {next(k for k in prompt if prompt[k] is made): made}
                step = self.decoder(input_ids=self.tokens[:, -1:], attention_mask=self.mask, **own, **common)
        finally:
            for handle in handles:
                handle.remove()
        return [prompt[0].clone(), step[0].clone()]

    def _record(self, index: int, output: Any) -> None:
        own = _first(output).clone()
        check_dtype(own, FLOATS)
        if not self._valid(own).isfinite().all():
            raise ValueError(f"layer {index} of the unpatched model gives values that are not finite: load its weights")
        self.seen[index].append(own)

    def _compare(self, index: int, output: Any) -> Any:
        call = self.calls[index]
        self.calls[index] += 1
        if call >= len(self.seen[index]):
            raise ValueError(f"layer {index} attends more often than before")
        want = self.seen[index][call]
        when = "at the prompt" if call < len(self.seen[index]) / 2 else "at a cached step"
        name = f"{when}, {type(self.attentions[index]).__name__} of layer {index}"
        self._judge(_first(output), want, name, self.tolerance[index])
        return (want, *output[1:]) if isinstance(output, tuple) else want

    def _valid(self, states: Tensor) -> Tensor:
        """The states of tokens, without those of padding, on which nothing depends."""
        return states[self.mask[:, :-1].bool().to(states.device)] if states.shape[:2] == (2, PROMPT) else states

    def _judge(self, got: Tensor, want: Tensor, name: str, tolerance: float) -> None:
        if got.shape != want.shape:
            raise ValueError(f"{name} gives {list(got.shape)}, unpatched {list(want.shape)}")
        bound = max(tolerance, 1e-3, 8 * torch.finfo(want.dtype).eps)
        got, want = self._valid(got).double(), self._valid(want).double()
        off = float((got - want).abs().nan_to_num(torch.inf).max())
        deviation = off / max(float(want.abs().max()), 1e-30) if off else 0.0
        if deviation > bound:
            raise ValueError(
                f"{name} differs from the unpatched model by {deviation:.2g} of its largest value though every route "
                f"is full (rounding explains {bound:.2g}): its attention is more than this package computes"
            )


def _computable(decoder: nn.Module, device: torch.device) -> Any:
    """Autocast for an fp32 model on CUDA, where the kernels take fp16 and bf16 only: it will be run so too."""
    single = any(p.dtype == torch.float32 for p in decoder.parameters())
    if device.type != "cuda" or not single or torch.is_autocast_enabled("cuda"):
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16)


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _coarseness(module: nn.Module) -> float:
    """How far a module's output may jump where its input changes in the last bit, as a share of its largest value: 0,
    but more where weights are quantised, as then the inputs may be rounded to a few levels too."""
    weights = [t for t in (*module.parameters(), *module.buffers()) if t.dim() > 1]
    if weights and all(t.is_floating_point() and t.dtype.itemsize > 1 for t in weights):
        return 0.0
    return 5e-2


# --- Looking


@dataclass
class View:
    """What attention is given in one layer: states ``[2, heads, S, head_dim]`` and submodules' outputs."""

    query: Tensor | None = None
    key: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, head_dim."""
        assert self.query is not None and self.key is not None
        return self.query.shape[1], self.key.shape[1], self.query.shape[3]


class _Looker:
    """What one run of :func:`look` collects. An attention module carries the index of its layer, ``_flux_look``."""

    def __init__(self, windows: dict[int, int], views: dict[int, View], kinds: list[str]) -> None:
        self.windows, self.views, self.kinds = windows, views, kinds
        self.masks: list[tuple[Tensor, Any]] = []

    def stranger(self, module: nn.Module) -> str:
        """The reason to refuse a module that attends, though its layer is not among those that were found to."""
        index = getattr(module, "layer_idx", None)
        kind = self.kinds[index] if isinstance(index, int) and index < len(self.kinds) else "none"
        return (
            f"{type(module).__name__} attends too (layer {index}), with a cache layer that is neither for full "
            f"attention nor for a sliding window ({kind})"
        )

    def attend(self, index: int, module: nn.Module, q: Tensor, k: Tensor, mask: Any, window: Any) -> None:
        view = self.views[index]
        if view.query is not None:
            raise ValueError(f"layer {index} attends more than once")
        view.query, view.key = q, k
        own = self.windows.get(index)
        if window is not None and window != own:
            raise ValueError(f"layer {index} attends in a window of {window}, its cache is of {own or 'everything'}")
        for marker, function in self.masks:
            if mask is marker and not _masks_as_we_do(function, own):
                what = f"the last {own} keys" if own else "all earlier keys"
                raise ValueError(f"layer {index} ({type(module).__name__}) has a mask of its own: not {what}")


class _Local(threading.local):
    looker: Any = None  # _Looker


_local = _Local()


def _masks_as_we_do(function: Any, window: int | None) -> bool:
    """Whether a mask function is the causal one (within a window), tried at positions near and far."""
    w = window or 1
    q = torch.tensor(sorted({0, 1, 2, 7, w - 1, w, w + 1, 2 * w + 1, 8191, 8192, 100_000, 1_000_003}))[:, None]
    kv = torch.cat([q - q, q // 2, q - w - 1, q - w, q - w + 1, q - 1, q, q + 1], 1)
    want = (kv <= q) & (kv > q - window) if window else kv <= q
    got = function(torch.zeros_like(kv), 0, q.expand_as(kv), kv)
    return bool((torch.as_tensor(got) == want)[kv >= 0].all())


def _look_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Notes what it is given, and returns each token's own value, as if it saw itself alone."""
    index = getattr(module, "_flux_look", None)
    if index is None:
        raise ValueError(_local.looker.stranger(module))
    refuse_terms(module, kwargs)
    _local.looker.attend(index, module, query, key, attention_mask, kwargs.get("sliding_window"))
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


def _look_mask(mask_function: Any = None, **kwargs: Any) -> Tensor:
    """An empty tensor in place of the mask, by which the attention function can tell which mask function it is of."""
    flux_mask(mask_function=mask_function, **kwargs)  # refuses what it refuses
    marker = torch.empty(0, device=kwargs.get("device"))
    _local.looker.masks.append((marker, mask_function))
    return marker


def look(
    model: Any,
    decoder: Any,
    attentions: dict[int, nn.Module],
    text_config: Any,
    windows: dict[int, int],
    kinds: list[str],
    set_implementation: Callable[[str], None],
) -> dict[int, View]:
    """What every layer's attention is given, in a forward of two equal rows: in the first all tokens stand at position
    0, in the second all at position 7.

    Both rows must give the same, as attention depends on differences of positions alone. At position 0 a rotary
    embedding changes nothing: what attention is given there is what a router must see, and a submodule that gives the
    same in both rows comes before the embedding.

    Args:
        windows: sliding windows, of the layers that have one.
        kinds: the class of every layer's stock cache.
        set_implementation: sets the model's attention implementation; the caller sets it back.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(f"{name} has no rotary embedding ({type(decoder).__name__} takes no position_ids)")
    AttentionInterface.register(LOOK, _look_attention)
    AttentionMaskInterface.register(LOOK, _look_mask)
    views = {i: View() for i in attentions}
    tokens = _tokens(text_config, families.device_of(decoder))[:1, :-1].expand(2, -1).contiguous()
    position_ids = torch.tensor([[0], [7]], device=tokens.device).expand(2, PROMPT)
    handles = []
    _local.looker = _Looker(windows, views, kinds)
    try:
        for i, attention in attentions.items():
            for tapped in families.tapped_names(attention):
                note = functools.partial(_note, views[i].outputs, tapped)
                handles.append(getattr(attention, tapped).register_forward_hook(note))
            handles.append(attention.register_forward_hook(_same_rows))
            attention._flux_look = i  # type: ignore[assignment]
        set_implementation(LOOK)
        with refusing(name, "its attention cannot be looked at"), quiet(decoder):
            decoder(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=position_ids, use_cache=False
            )
    finally:
        _local.looker = None
        for handle in handles:
            handle.remove()
        for attention in attentions.values():
            attention.__dict__.pop("_flux_look", None)
    for i, view in views.items():
        if view.query is None:
            raise ValueError(
                f"{name} cannot be patched: {type(attentions[i]).__name__} (layer {i}) does not call its attention "
                "through transformers' AttentionInterface"
            )
    return views


def heads(name: str, views: dict[int, View], text_config: Any) -> tuple[int, int, int]:
    """Query heads, KV heads and head_dim, as attention is given them, of the layers that can be routed."""
    shapes = {i: view.heads for i, view in views.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"{name} cannot be patched: (query heads, KV heads, head_dim) differ among its layers with full "
            f"attention, {shapes}"
        )
    found = next(iter(shapes.values()))
    if (named := setting(text_config, "num_attention_heads")) not in (None, found[0]):
        raise ValueError(f"{name} cannot be patched: its attention is given {found[0]} of {named} heads")
    return found


def _note(outputs: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        outputs.setdefault(name, output.clone())


def _same_rows(module: nn.Module, args: Any, output: Any) -> Any:
    """Makes the second row a copy of the first: they differ by rounding, which shall not add up over the layers."""
    first = _first(output)
    first = torch.cat([first[:1], first[:1]]) if first.shape[0] == 2 else first
    return (first, *output[1:]) if isinstance(output, tuple) else first
