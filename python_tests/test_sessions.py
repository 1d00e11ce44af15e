"""Random sessions over one cache, every logit against masks: turns of any size with padding on either side, single
tokens, crops, sequences selected and repeated, tokens taken back, copies, inputs that are refused.

What each token of each sequence saw is written down as it is fed, and the stock model computes it anew, all at once.
"""

from __future__ import annotations

import copy
import pickle
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from masked_twin import MaskedTwin
from models import tiny
from torch import Tensor

import flux_ext
from flux_ext import FluxCache, FluxConfig
from flux_ext.models.patching import get_routers
from flux_ext.operators.block_selection import select_blocks
from flux_ext.operators.patterns import BlockSparse, Full, dense_mask

SETTINGS: dict[str, Any] = {"window": 16, "last_q": 5, "threshold": 0.6, "block_width": 64, "pool_size": 20}


@dataclass
class Fed:
    """All tokens that one sequence was ever fed.

    Attributes:
        ids, positions, slots: of each.
        here: indices of those that are still in the cache.
        forwards: of each forward, the indices of its tokens and of all that were in the cache then, and whether it was
            the prompt.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    here: list[int] = field(default_factory=list)
    forwards: list[tuple[list[int], list[int], bool]] = field(default_factory=list)

    def feed(self, ids: list[int], positions: list[int], slots: list[int], prompt: bool) -> None:
        new = list(range(len(self.ids), len(self.ids) + len(ids)))
        self.ids, self.positions, self.slots = self.ids + ids, self.positions + positions, self.slots + slots
        self.here = self.here + new
        self.forwards = [*self.forwards, (new, self.here, prompt)]

    def forget(self, slots: set[int]) -> None:
        self.here = [i for i in self.here if self.slots[i] not in slots]


class SessionTwin(MaskedTwin):
    """The stock model over everything that a sequence was fed, in layers with a sliding window of their own too."""

    fed: Fed

    def __init__(self, model: Any, config: FluxConfig, windows: dict[int, int]) -> None:
        super().__init__(model, config, torch.zeros(0))
        self.windows = windows

    def visible(self, sparse: bool, q: Tensor, k: Tensor) -> Tensor:
        mask = torch.zeros(len(k), len(k), dtype=torch.bool)
        for rows, keys, prompt in self.fed.forwards:
            pattern: Any = self.config.decode_pattern() if sparse else Full()
            if prompt:
                pattern = self.config.sparse_pattern() if sparse else self.config.full_pattern()
            if not rows:
                continue
            if isinstance(pattern, BlockSparse):
                pattern = select_blocks(pattern, q[None, rows], k[None, keys, None], self.scaling)
            seen = dense_mask(pattern, len(rows), len(keys)).view(len(rows), len(keys))
            mask[torch.tensor(rows)[:, None], torch.tensor(keys)] = seen
        return mask

    def in_window(self, window: int) -> Tensor:
        """The mask of a layer with a sliding window, in which padding counts."""
        mask, slots = torch.zeros(len(self.fed.ids), len(self.fed.ids), dtype=torch.bool), torch.tensor(self.fed.slots)
        for rows, keys, _ in self.fed.forwards:
            distance = slots[rows][:, None] - slots[keys]
            mask[torch.tensor(rows, dtype=torch.long)[:, None], keys] = (distance >= 0) & (distance < window)
        return mask

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, scaling: float, **kwargs: Any) -> Any:
        self.scaling, layer = scaling, module.layer_idx
        if layer not in self.windows:
            return super().attend(module, q, k, v, *args, scaling=scaling, **kwargs)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.mT * scaling).masked_fill(~self.in_window(self.windows[layer]), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    def last_logits(self, fed: Fed, route: Tensor) -> Tensor:
        """Of the last forward's tokens, ``[n, V]``."""
        self.fed, self.route = fed, route
        ids, positions = torch.tensor([fed.ids]), torch.tensor([fed.positions])
        with torch.no_grad():
            found: Tensor = self.model(ids, position_ids=positions, use_cache=False).logits[0]
        return found[fed.forwards[-1][0]]


class Session:
    """One cache, its sequences, and what they were fed."""

    def __init__(self, family: str, preset: str, seed: int) -> None:
        self.random = random.Random(seed)
        align = self.random.choice([1, 8])
        decode, sink = self.random.choice(["sparse", "dense"]), self.random.choice([0, 3])
        config = FluxConfig.preset(preset, decode=decode, align=align, sink=sink, **SETTINGS)
        self.model = flux_ext.patch(tiny(family, max_position_embeddings=1024), config)
        config = get_routers(self.model).config
        self.cache = FluxCache(self.model.config, config, page_size=self.random.choice([1, 4, 16]))
        windows = {i: x.sliding_window for i, x in enumerate(self.cache.layers) if x.is_sliding}
        self.twin = SessionTwin(tiny(family, max_position_embeddings=1024), config, windows)
        self.layers, self.recording = torch.tensor(config.routed_layers()), self.random.random() < 0.5
        if self.recording:
            self.cache.activate_past_recording()
        self.sequences = [Fed() for _ in range(self.random.randint(1, 3))]
        self.routes = torch.randint(0, 2, (len(self.sequences), len(self.layers), 2))
        self.mask = torch.zeros(len(self.sequences), 0, dtype=torch.long)
        self.uncropped = 0  # slots since the last crop, which layers with a sliding window can give back

    def forward(self, count: int) -> None:
        """Of so many slots, some of them padding."""
        batch, seen = self.mask.shape
        new = torch.ones(batch, count, dtype=torch.long)
        for row in new:
            if self.random.random() < 0.4:
                padding = self.random.randint(0, count - 1)
                row[:padding] = 0
                if self.random.random() < 0.5:
                    row.copy_(row.flip(0))
        mask = torch.cat([self.mask, new], 1)
        ids = torch.randint(2, 128, (batch, count))
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, seen:]
        with torch.no_grad(), flux_ext.routes(self.model, self.routes):
            step = {"attention_mask": mask, "position_ids": positions}
            logits = self.model(ids, past_key_values=self.cache, **step).logits
        self.mask, self.uncropped = mask, self.uncropped + count
        assert self.cache.get_seq_length() == mask.shape[1] and torch.equal(self.cache.routes, self.routes.int())
        for b, fed in enumerate(self.sequences):
            kept = new[b].nonzero()[:, 0]
            fed.feed(ids[b, kept].tolist(), positions[b, kept].tolist(), (seen + kept).tolist(), seen == 0)
            route = torch.zeros(len(self.cache.layers), 2).index_copy(0, self.layers, self.routes[b].float())
            torch.testing.assert_close(logits[b, kept], self.twin.last_logits(fed, route), atol=2e-3, rtol=2e-3)

    def select(self) -> None:
        batch = len(self.sequences)
        picked = torch.tensor([self.random.randrange(batch) for _ in range(self.random.randint(1, 3))])
        self.cache.batch_select_indices(picked)
        self.sequences = [replace(self.sequences[b]) for b in picked.tolist()]
        self.mask, self.routes = self.mask[picked], self.routes[picked]

    def crop(self) -> None:
        """The last slots, where nothing of what then comes into view has been dropped."""
        count = self.random.randint(1, min(4, self.uncropped))
        try:
            self.cache.crop(-count)
        except RuntimeError:
            assert not self.recording
            return
        left = self.mask.shape[1] - count
        for fed in self.sequences:
            fed.forget(set(range(left, left + count)))
        self.mask, self.uncropped = self.mask[:, :left], 0

    def take_back(self) -> None:
        """Some tokens, by a mask that calls them padding, of the forward that follows."""
        b = self.random.randrange(len(self.sequences))
        fed, before = self.sequences[b], self.mask
        gone = {fed.slots[i] for i in fed.here[-self.random.randint(1, 3) :]}
        self.mask = self.mask.clone()
        self.mask[b, list(gone)] = 0
        here = fed.here
        fed.forget(gone)
        try:
            self.forward(self.random.choice([1, 4]))
        except RuntimeError as error:
            assert "takes back" in str(error) and not self.recording
            self.mask, fed.here = before, here

    def refused(self) -> None:
        batch, seen = self.mask.shape
        ids, mask = torch.full((batch, 1), 2), torch.ones(batch, seen + 1, dtype=torch.long)
        wrong: dict[str, Any] = {
            "batch": {"input_ids": torch.full((batch + 1, 1), 2)},
            "mask": {"input_ids": ids, "attention_mask": mask[:, :seen]},
            "positions": {"input_ids": ids, "position_ids": torch.full((batch, 3), seen)},
        }
        if not self.mask.all():
            wrong["shown"] = {"input_ids": ids, "attention_mask": mask}
        with pytest.raises(ValueError), torch.no_grad():
            self.model(past_key_values=self.cache, **wrong[self.random.choice(sorted(wrong))])

    def copied(self) -> None:
        self.cache = self.random.choice([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])(self.cache)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(("preset", "seed"), [("fa-ssa", 0), ("fa-ta", 1), ("fa-xa", 2), ("xa-ssa", 3)])
def test_random_sessions(family: str, preset: str, seed: int) -> None:
    torch.manual_seed(seed)
    session = Session(family, preset, seed)
    session.forward(session.random.choice([40, 150] if "xa" in preset else [5, 40, 60]))
    for _ in range(12):
        session.random.choice(
            [
                lambda: session.forward(1),
                lambda: session.forward(1),
                lambda: session.forward(session.random.randint(2, 20)),
                session.select,
                session.crop,
                session.take_back,
                session.refused,
                session.copied,
            ]
        )()
        session.forward(1)
