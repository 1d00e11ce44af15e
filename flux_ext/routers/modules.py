"""The routers: small MLPs that decide from a prompt's pooled query or key states.

``LayerRouter`` is the Layer Router of Flux Attention (arXiv 2604.07394, section 3), one decision per sequence and
layer; ``HeadRouter`` the Attention Router of Elastic Attention (arXiv 2601.17367), one per key-value head with
shared weights. Shapes, names and pooling are the published ones, so published weights load bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .. import operators
from ..operators import decide

PUBLISHED_ENCODER = "cls_feat_extractor"
PUBLISHED_CLASSIFIER = "cls_router_head_agnostic"
FULL_BIAS = 4.5
"""Last bias of the class "full" at the start: everything is routed full, as published."""


class Router(nn.Module):
    """Base of both routers: ``encoder`` (two layers) and ``classifier`` (three), SiLU between.

    Args:
        head_dim: width D of one head's states.
        pool_size: rows pooled at either end of the prompt (published: 100).

    Raises:
        ValueError: either is below 1.
    """

    per_head: bool
    hidden_factor: int
    feature_factor: int
    is_whitened = False
    """Whether :func:`flux_ext.training.start.whiten` fitted the first layer to measured states; not saved."""

    def __init__(self, head_dim: int, pool_size: int = 100) -> None:
        super().__init__()
        if head_dim < 1:
            raise ValueError(f"head_dim must be >= 1, got {head_dim}")
        if pool_size < 1:
            raise ValueError(f"pool_size must be >= 1, got {pool_size}")
        self.head_dim, self.pool_size = head_dim, pool_size
        d, hidden, feature = head_dim, self.hidden_factor * head_dim, self.feature_factor * head_dim
        self.encoder = nn.Sequential(nn.Linear(d, hidden), nn.SiLU(), nn.Linear(hidden, feature))
        self.classifier = nn.Sequential(
            nn.Linear(feature, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU(), nn.Linear(d, 2)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's default initialisation, and a last bias that routes everything full."""
        for layer in self._linears():
            layer.reset_parameters()
        with torch.no_grad():
            self._linears()[-1].bias.copy_(torch.tensor([0.0, FULL_BIAS]))

    def _linears(self) -> list[nn.Linear]:
        return [m for m in (*self.encoder, *self.classifier) if isinstance(m, nn.Linear)]

    @property
    def last_bias(self) -> Tensor:
        """Of the logits, ``[2]``: at index 1 of full attention."""
        return cast(nn.Linear, self.classifier[-1]).bias

    def _plain_weights(self) -> list[Tensor] | None:
        """As :meth:`weights`; None where there are none. Asked before every prompt, in one walk over the layers."""
        weights: list[Tensor] = []
        for part in (self.encoder, self.classifier):
            if type(part) is not nn.Sequential or _is_hooked(part):
                return None
            for layer in part:
                if _is_hooked(layer):
                    return None
                if type(layer) is nn.SiLU:
                    continue
                if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
                    return None
                weight, bias = layer.weight, layer.bias
                if type(weight) not in (Tensor, nn.Parameter):
                    return None
                weights += weight, bias
        return weights

    def is_plain(self) -> bool:
        """Whether both MLPs are the linear layers and SiLUs they were made of, with nothing in, around or hooked to
        them: then the operator computes what calling them would."""
        return self._plain_weights() is not None

    def weights(self) -> list[Tensor]:
        """``[w1, b1, ..., w5, b5]``, the order the operator takes.

        Raises:
            ValueError: something else (an adapter, a quantised layer) took a linear layer's place.
        """
        weights = self._plain_weights()
        if weights is None:
            raise ValueError("a layer of this router was replaced or hooked: it has no plain weights")
        return weights

    def decide(
        self, x: Tensor, seq_start: Tensor | None = None, seq_end: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(logits, route)`` of the sequences in x: by one fused operator, or layer by layer where something (an
        adapter, a quantised layer, a hook) has come into or around the linear layers.

        Args:
            x: ``[B, S, H, D]`` (rows ``[seq_start, seq_end)`` of each sequence count), or packed ``[T, H, D]``
                with both bounds given.

        Returns:
            logits fp32 ``[B, 2]`` (per head ``[B, H, 2]``): index 1 argues for full attention; route int32
            ``[B]`` (``[B, H]``): 0 full where ``logits[..., 1] > logits[..., 0]`` or either is not finite, else 1
            sparse.

        Raises:
            TypeError, ValueError: x or a bound breaks a rule.

        Where the pooled states are not finite, neither are the logits, and the route is full.
        """
        weights = self._plain_weights()
        if weights is not None:
            return operators.route(x, weights, self.pool_size, self.per_head, seq_start, seq_end)
        pooled = pool_sequences(x, self.pool_size, self.per_head, seq_start, seq_end)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # as the operator, which autocast does not see
            logits = self.classifier(self.encoder(pooled.to(dtype))).float()
        return logits, decide(logits)

    def forward(
        self, x: Tensor, seq_start: Tensor | None = None, seq_end: Tensor | None = None, with_route: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The logits of :meth:`decide`, with ``with_route`` the route too; arguments as there."""
        logits, route = self.decide(x, seq_start, seq_end)
        return (logits, route) if with_route else logits

    def load_published(self, state_dict: Mapping[str, Tensor], layer: int | None = None) -> None:
        """Loads weights that carry the published names, from one router or a whole checkpoint.

        Args:
            state_dict: keys ending in ``cls_feat_extractor.{0,2}.*`` and ``cls_router_head_agnostic.{0,2,4}.*``,
                bare or below ``model.layers.N.self_attn.mask_allocator.``.
            layer: N, needed where the checkpoint has several layers.

        Raises:
            KeyError: a tensor is missing, or several layers match and ``layer`` is None.
            ValueError: a tensor has another shape than this router.
        """
        scope = "" if layer is None else f"layers.{layer}."
        found: dict[str, Tensor] = {}
        for part, published in (("encoder", PUBLISHED_ENCODER), ("classifier", PUBLISHED_CLASSIFIER)):
            for name, own in getattr(self, part).named_parameters():
                suffix = f"{published}.{name}"
                keys = [
                    key
                    for key in state_dict
                    if (key == suffix or key.endswith("." + suffix)) and f".{scope}" in f".{key}"
                ]
                if not keys:
                    raise KeyError(f"the state dict has no tensor ...{scope}...{suffix}")
                if len(keys) > 1:
                    raise KeyError(f"layer must be given: {len(keys)} tensors end in {suffix}")
                value = state_dict[keys[0]]
                if value.shape != own.shape:
                    raise ValueError(f"{keys[0]} has shape {list(value.shape)}, this router {list(own.shape)}")
                found[f"{part}.{name}"] = value
        self.load_state_dict(found)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, pool_size={self.pool_size}"


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward: hooks, or a forward of its own (accelerate's)."""
    hooked = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooked) or "forward" in module.__dict__


def pool_sequences(
    x: Tensor, pool_size: int, per_head: bool, seq_start: Tensor | None = None, seq_end: Tensor | None = None
) -> Tensor:
    """:func:`flux_ext.operators.reference.pool` of all sequences at once, without reading bounds back from the device.

    Args:
        x, seq_start, seq_end: as for :meth:`Router.decide`.

    Returns:
        fp32 ``[B, D]``, per head ``[B, H, D]``.
    """
    batch = len(seq_start) if x.dim() == 3 else x.shape[0]  # type: ignore[arg-type]
    zero = torch.zeros(batch, dtype=torch.int64, device=x.device)
    begin = zero if seq_start is None else seq_start.long()
    end = zero + x.shape[-3] if seq_end is None else seq_end.long()
    step = torch.arange(pool_size, device=x.device)
    rows = torch.cat([begin[:, None] + step, end[:, None] - 1 - step], 1)  # [B, 2 * pool_size]
    seen = (begin[:, None] <= rows) & (rows < end[:, None])
    rows = rows.clamp(0, max(x.shape[-3] - 1, 0))
    states = x[rows] if x.dim() == 3 else x[torch.arange(batch, device=x.device)[:, None], rows]
    states = torch.where(seen[..., None, None], states, 0).float()
    pooled = states.sum(1) / seen.sum(1).clamp(min=1)[:, None, None]
    return pooled if per_head else pooled.mean(1)


class LayerRouter(Router):
    """One decision per sequence from its query states; 592,002 parameters at head_dim 128."""

    per_head, hidden_factor, feature_factor = False, 8, 2


class HeadRouter(Router):
    """One decision per key-value head from its key states; 263,682 parameters at head_dim 128."""

    per_head, hidden_factor, feature_factor = True, 4, 1
