"""Four ways to train routers against a frozen backbone, behind one interface.

An objective sees the backbone as a function from routes to one loss per sequence (:class:`RoutedModel`) and
returns a scalar whose gradient trains the routers (:class:`Step`). It knows nothing of transformers.

Log-odds ``z`` are those of full attention, ``logits[..., 1] - logits[..., 0]``; units are the places that
decide: one per layer, or one per layer and KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .budget import Price
from .config import ObjectiveName, Recipe
from .flips import FlipChances

Policy = Callable[[int, Tensor], Tensor]
"""``(layer, logits [B, 2] or [B, Hkv, 2]) -> route [B] or [B, Hkv]``: integers choose (0 full, 1 sparse),
floats are the weight of sparse attention. ``layer`` counts routed layers from 0."""


class RoutedModel(Protocol):
    """A frozen model whose routed layers ask a policy."""

    num_layers: int
    """Routed layers L."""
    num_heads: int
    """Decisions per layer: 1, or the KV heads."""
    # Optional: run_size, how many sequences :meth:`loss_again` should be asked for at once, at least; without it 1.

    def loss(self, policy: Policy, keep: Mapping[int, Tensor] | None = None) -> Tensor:
        """The loss of each sequence, ``[B]``, in nats per answer token.

        Args:
            policy: decides every routed layer.
            keep: ``{layer: rows}``, int64 rows of the batch: what :meth:`loss_again` is going to be asked for.
        """
        ...

    def loss_again(self, policy: Policy, layer: int, rows: Tensor) -> Tensor:
        """The losses of some sequences of the last batch, ``[len(rows)]``, without a gradient.

        Args:
            policy: asked with the logits of ``rows`` only; below ``layer`` it answers as in the last :meth:`loss`,
                so the model may start there.
            layer: the first layer that is routed otherwise.
            rows: int64, which sequences; one may be there several times, routed otherwise at several layers.
        """
        ...


@dataclass(frozen=True)
class Step:
    """One evaluation of an objective."""

    loss: Tensor
    """Scalar, to be differentiated."""
    lm_loss: Tensor
    """``[B]`` in nats per answer token, detached."""
    sparsity: Tensor
    """``[B]`` share of sparse attention of each sequence, as the constraint counts it, detached."""
    choice: Tensor
    """bool ``[B, L, H]``: the routers' own routes in this company, what they would choose in use (True sparse)."""
    deployed: Tensor
    """``[B]`` the loss where all units take their own routes, as in use, detached; NaN where that was not run."""


class Multipliers(nn.Module):
    """Lagrange multipliers of the tasks' target sparsities (arXiv 2604.07394).

    Buffers ``lambda1`` and ``lambda2`` (nats per unit of sparsity, and of its square), fp32 ``[T]``, moved by explicit
    dual ascent: no weight decay and no gradient clipping sees them. ``target`` (share of sparse attention), fp32
    ``[T]``, is the recipe's and no state: whoever loads a state goes on with the targets of the new recipe.

    Args:
        tasks: the tasks' names; T of them.
        recipe: the form of the penalty, the targets and the rate of the ascent.
        generator: draws the start of the published forms.
    """

    lambda1: Tensor
    lambda2: Tensor
    target: Tensor

    def __init__(self, tasks: Sequence[str], recipe: Recipe, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.tasks, self.form, self.rate = tuple(tasks), recipe.multipliers, recipe.multiplier_lr
        start = torch.zeros(2, len(self.tasks))
        if self.form != "inequality":  # U(0, 0.5), as published
            start = 0.5 * torch.rand(start.shape, generator=generator)
        self.register_buffer("lambda1", start[0].clone())
        self.register_buffer("lambda2", start[1].clone())
        target = torch.tensor([recipe.target(t) for t in self.tasks], dtype=torch.float32)
        self.register_buffer("target", target, persistent=False)

    def penalty(self, sparsity: Tensor, tasks: Tensor) -> Tensor:
        """The multipliers' term of the loss: a scalar, in nats.

        In the inequality form it is a mean over sequences, each of which pays the price of its own task; in the
        published forms a mean, over the tasks present, of a function of the task's mean sparsity.

        Args:
            sparsity: ``[B]``, differentiable.
            tasks: int64 ``[B]``, the sequences' tasks.
        """
        if self.form == "inequality":
            return (self.lambda1[tasks] * (self.target[tasks] - sparsity)).mean()
        terms = []
        for task in tasks.unique():
            d = sparsity[tasks == task].mean() - self.target[task]
            linear = d.abs() if self.form == "published_abs" else d
            terms.append(self.lambda1[task] * linear + self.lambda2[task] * d.square())
        return torch.stack(terms).mean()

    @torch.no_grad()
    def ascend(self, sparsity: Tensor, count: Tensor, own: Tensor | None = None) -> None:
        """One step of gradient ascent. The multipliers become new tensors: a backward pass that is still to come
        needs the ones its loss was made with.

        Args:
            sparsity: ``[T]``, the mean of each task over all sequences of the step, those of all ranks.
            count: ``[T]``, how many sequences each task had; tasks with none stay as they are.
            own: ``[T]``, the same under the routers' own routes. Where these are sparser, they count in the inequality
                form: what is more than met in use needs no higher price, though the odds still leave a part full.
        """
        if self.form == "inequality" and own is not None:
            sparsity = torch.maximum(sparsity, own)
        d = sparsity - self.target
        if self.form == "inequality":
            first, second = -d, torch.zeros_like(d)
        else:
            first, second = d.abs() if self.form == "published_abs" else d, d.square()
        seen = count > 0
        self.lambda1 = torch.where(seen, (self.lambda1 + self.rate * first).clamp(min=0), self.lambda1)
        self.lambda2 = torch.where(seen, (self.lambda2 + self.rate * second).clamp(min=0), self.lambda2)


class Objective(nn.Module):
    """Base of the four. Calling it gives a :class:`Step`; multipliers and random draws are its state dict.

    Args:
        recipe: the options.
        tasks: the tasks' names; batches name them by index.
        num_layers, num_heads: see :class:`RoutedModel`.
        seed: all draws come from one generator of its own, on the CPU. Ranks that share a sequence (sequence
            parallel) take the same seed, ranks with different sequences different ones.
    """

    def __init__(
        self, recipe: Recipe, tasks: Sequence[str], num_layers: int, num_heads: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks must name at least one task")
        self.recipe, self.tasks = recipe, tuple(tasks)
        self.num_layers, self.num_heads = num_layers, num_heads
        self.generator = torch.Generator().manual_seed(seed)
        # The multipliers' start is the same on all ranks.
        self.multipliers: Multipliers | Price
        if recipe.has_budget:
            self.multipliers = Price(tasks, recipe)
        else:
            self.multipliers = Multipliers(tasks, recipe, torch.Generator().manual_seed(0))

    def forward(self, model: RoutedModel, tasks: Tensor, progress: float = 0.0) -> Step:
        """One evaluation on a batch.

        Args:
            model: the backbone with its batch; asked for losses one or several times.
            tasks: int64 ``[B]``, the sequences' tasks.
            progress: the share of the training that is done, in [0, 1], for the schedules.
        """
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())

    def uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uniform draws in (0, 1), fp32 of this ``shape``, on the device of ``like``."""
        x = torch.rand(*shape, generator=self.generator).clamp_(1e-6, 1 - 1e-6)
        return x.to(like.device, non_blocking=True)


def log_odds(logits: Tensor) -> Tensor:
    """``[..., 2]`` logits -> ``[...]`` log-odds of full attention."""
    return (logits[..., 1] - logits[..., 0]).float()


def full_route(layer: int, logits: Tensor) -> Tensor:
    """Every route full: the policy of the dense model, or of the full mode where that is not full attention."""
    return torch.zeros_like(logits[..., 0], dtype=torch.int32)


def own_route(layer: int, logits: Tensor) -> Tensor:
    """The policy of the routers themselves, as in use: full where its log-odds are positive."""
    return (log_odds(logits) <= 0).to(torch.int32)


def _stack(per_layer: Mapping[int, Tensor]) -> Tensor:
    """``{layer: [B] or [B, H]}`` -> ``[B, L, H]`` (H is 1 with layer-level routing)."""
    rows = [per_layer[layer] for layer in sorted(per_layer)]
    return torch.stack([r if r.dim() == 2 else r[:, None] for r in rows], 1)


class Soft(Objective):
    """Full and sparse attention mixed by Gumbel-softmax weights (Flux Attention, arXiv 2604.07394, section 3).

    ``r = softmax((logits + g) / tau)[1]``, ``out = r * full + (1 - r) * sparse``.
    """

    def forward(self, model: RoutedModel, tasks: Tensor, progress: float = 0.0) -> Step:
        tau = self.recipe.tau(progress)
        noise: dict[int, Tensor] = {}
        weight: dict[int, Tensor] = {}
        odds: dict[int, Tensor] = {}
        rows = torch.arange(len(tasks), device=tasks.device)
        with torch.no_grad():  # first: nothing may come between the graph's forward and its backward
            deployed = model.loss_again(own_route, 0, rows) if self.recipe.has_budget else None

        def policy(layer: int, logits: Tensor) -> Tensor:
            if layer not in noise:  # gradient checkpointing asks twice, and must get the same draw
                noise[layer] = -torch.log(-torch.log(self.uniform(logits.shape, logits)))
            full = self.weight(logits, ((logits.float() + noise[layer]) / tau).softmax(-1)[..., 1])
            weight.setdefault(layer, full)
            odds.setdefault(layer, log_odds(logits))
            return 1 - full

        loss, z = model.loss(policy), _stack(odds)
        sparsity = 1 - _stack(weight).mean((1, 2))
        total = loss.mean() + self.multipliers.penalty(sparsity, tasks) + self.bound(z)
        loss = loss.detach()
        deployed = torch.full_like(loss, torch.nan) if deployed is None else deployed
        return Step(total, loss, sparsity.detach(), z.detach() <= 0, deployed)

    def weight(self, logits: Tensor, soft: Tensor) -> Tensor:
        """The weight of full attention, of the shape of ``soft``.

        Args:
            logits: of a layer, ``[B, 2]`` or ``[B, Hkv, 2]``.
            soft: what Gumbel-softmax made of them.
        """
        return soft

    def bound(self, z: Tensor) -> Tensor:
        """What is added to the loss for log-odds ``z [B, L, H]`` that have gone far: nothing, as published."""
        return z.new_zeros(())


class StraightThrough(Soft):
    """As :class:`Soft`, with the weight rounded to 0 or 1 in the forward pass and not in the gradient.

    The estimator of Elastic Attention (arXiv 2601.17367) and of both published codes.
    """

    def weight(self, logits: Tensor, soft: Tensor) -> Tensor:
        return (soft > 0.5).float() + soft - soft.detach()


class EvenOdds(StraightThrough):
    """As :class:`StraightThrough`, with a gradient that does not depend on what the router thinks already.

    That of a softmax vanishes where log-odds are large, which is where it drives them, so a unit that was taken for
    sparse once hardly comes back. Here a weight moves by a quarter of what its log-odds move by, wherever they are, as
    it would at even odds; and beyond ``BOUND`` they are pulled back softly, so that a router can still turn.
    """

    BOUND, BOUND_WEIGHT = 3.0, 0.01

    def weight(self, logits: Tensor, soft: Tensor) -> Tensor:
        z = log_odds(logits)
        return (soft > 0.5).float() + (z - z.detach()) / 4

    def bound(self, z: Tensor) -> Tensor:
        return self.BOUND_WEIGHT * F.relu(z.abs() - self.BOUND).square().mean()


class Counterfactual(Objective):
    """What would this sequence's loss be, had one layer taken the other route?

    Routes are drawn from the routers' own policy and the model runs once without a graph. Then one layer per
    sequence (or a group of its heads) takes the other route, all else being equal: the difference is that
    layer's exact worth ``delta = loss(full) - loss(sparse)`` for this sequence in this company. The routers'
    log-odds get the gradient ``(L * delta + price) / 4``: what it would be at even odds, so that a confident
    router can still turn, with a soft bound on the log-odds for the same reason. The price is the
    multipliers' gradient. No backward pass goes through the backbone.

    With a budget, half of the sequences are not drawn for but take the routers' own routes: they say what is lost in
    use, and what each layer is worth there; the others explore.

    The layers to flip come off a shuffled deck per task, so every task sees every layer equally often; or
    (``flip_choice="by_worth"``) they are drawn, those more often whose flips have changed more.
    """

    BOUND_WEIGHT = 0.1
    LAYER_FLIPS, HEAD_FLIPS = 2, 4
    """Where the recipe leaves them open."""
    OWN_SHARE = 0.5
    """Of the sequences, with a budget, that take the routers' own routes."""
    SHIFT = 4.0
    """The others explore up to so much fuller than the policy, in log-odds: where much is sparse already, what one more
    full layer is worth is seen only beside others that are full."""
    deck: Tensor
    dealt: Tensor

    def __init__(
        self, recipe: Recipe, tasks: Sequence[str], num_layers: int, num_heads: int = 1, seed: int = 0
    ) -> None:
        super().__init__(recipe, tasks, num_layers, num_heads, seed)
        if recipe.flips is not None and recipe.flips > num_layers:
            raise ValueError(f"flips must be at most the {num_layers} routed layers, got {recipe.flips}")
        self.flips = recipe.flips or min(self.HEAD_FLIPS if num_heads > 1 else self.LAYER_FLIPS, num_layers)
        if recipe.heads_per_flip > num_heads:
            raise ValueError(
                f"heads_per_flip must be at most the {num_heads} decisions of a layer, got {recipe.heads_per_flip}"
            )
        self.register_buffer("deck", torch.zeros(len(self.tasks), num_layers, dtype=torch.long))
        self.register_buffer("dealt", torch.full((len(self.tasks),), num_layers))
        self.chances = FlipChances(num_layers, self.flips) if recipe.flip_choice == "by_worth" else None

    def deal(self, tasks: Sequence[int]) -> Tensor:
        """The layers to flip for sequences of these ``tasks``, int64 ``[B, flips]`` on the CPU, different ones in each
        row."""
        flips, rows = self.flips, []
        for task in tasks:
            if self.dealt[task] + flips > self.num_layers:
                self.deck[task] = torch.randperm(self.num_layers, generator=self.generator)
                self.dealt[task] = 0
            first = int(self.dealt[task])
            rows.append(self.deck[task, first : first + flips].clone())
            self.dealt[task] += flips
        return torch.stack(rows)

    @staticmethod
    def runs(layers: Tensor, size: int) -> list[tuple[int, Tensor, Tensor]]:
        """Which flips run together: the layer to start at, the rows, and which of their flips, int64 on the CPU.

        Args:
            layers: int64 ``[B, K]``, the layer of each flip.
            size: flips of a run, at least, where there are as many: the flips of one layer run together in any case.
        """
        order = layers.flatten().argsort(stable=True)
        ends = [i for i in range(1, len(order)) if layers.flatten()[order[i]] != layers.flatten()[order[i - 1]]]
        runs, first = [], 0
        for end in [*ends, len(order)]:
            if end - first >= size or end == len(order):
                some = order[first:end]
                runs.append((int(layers.flatten()[some[0]]), some // layers.shape[1], some % layers.shape[1]))
                first = end
        return runs

    def own_rows(self, batch: int) -> Tensor:
        """Which of the ``batch`` (B) sequences take the routers' own routes, bool ``[B]`` on the CPU: half, to one."""
        if not self.recipe.has_budget:
            return torch.zeros(batch, dtype=torch.bool)
        count = int(batch * self.OWN_SHARE + float(torch.rand((), generator=self.generator)))
        return torch.randperm(batch, generator=self.generator) < count

    def shifts(self, batch: int) -> Tensor:
        """How much fuller than the policy the ``batch`` (B) sequences explore, ``[B]`` log-odds on the CPU."""
        if not self.recipe.has_budget:
            return torch.zeros(batch)
        return self.SHIFT * torch.rand(batch, generator=self.generator)

    def groups(self, own: Tensor) -> Tensor:
        """The heads that flip together, bool ``[B, flips, H]`` on the CPU; one only where ``own`` (bool ``[B]``) says
        that routes are the routers' own, as several may stand on different sides there."""
        shape = (len(own), self.flips, self.num_heads)
        rank = torch.rand(shape, generator=self.generator).argsort(-1).argsort(-1)
        return rank < torch.where(own, 1, self.recipe.heads_per_flip)[:, None, None]

    def forward(self, model: RoutedModel, tasks: Tensor, progress: float = 0.0) -> Step:
        batch, recipe = len(tasks), self.recipe
        chance = torch.full((self.num_layers,), self.flips / self.num_layers)
        if self.chances is None:
            layers = self.deal(tasks.tolist())  # [B, K]
        else:
            chance = self.chances.chances()
            layers = self.chances.draw(chance, batch, self.generator)
        own = self.own_rows(batch)
        group = self.groups(own).to(tasks.device)  # [B, K, H]
        own, shift = own.to(tasks.device), self.shifts(batch).to(tasks.device)
        runs = self.runs(layers, getattr(model, "run_size", 1))
        flipped = set(layers.flatten().tolist())
        # By layer: the log-odds, and which decisions were full.
        z_of: dict[int, Tensor] = {}
        full_of: dict[int, Tensor] = {}

        def sample(layer: int, logits: Tensor) -> Tensor:
            z = log_odds(logits)
            if layer not in full_of:  # gradient checkpointing asks twice, and must get the same draw
                z_of[layer] = z
                draw, wide = self.uniform(z.shape, z), (-1,) + (1,) * (z.dim() - 1)
                odds = z.detach() + shift.view(wide)
                full = draw < torch.sigmoid(odds)
                if self.num_heads > 1 and layer in flipped:
                    full = self._agree(full, odds, draw, layers == layer, group)
                full_of[layer] = torch.where(own.view(wide), z.detach() > 0, full)
            return (~full_of[layer]).to(torch.int32)

        base = model.loss(sample, {first: rows.to(tasks.device) for first, rows, _ in runs}).detach()
        z, full = _stack(z_of), _stack(full_of)  # [B, L, H]
        # Heads are weighed as if each had been flipped alone: a group's worth is shared out evenly.
        together = group.sum(-1)[:, :1]  # [B, 1]
        scale = self.num_heads / (together.square() * batch)
        worth = torch.zeros_like(z)
        for first, rows, which in runs:
            place = layers[rows, which].to(tasks.device)  # [R]
            rows, which = rows.to(tasks.device), which.to(tasks.device)
            members = group[rows, which]  # [R, H]

            def other(
                asked: int, logits: Tensor, rows: Tensor = rows, members: Tensor = members, place: Tensor = place
            ) -> Tensor:
                route = full[rows, asked] ^ (members & (place == asked)[:, None])
                return (~(route if logits.dim() == 3 else route[:, 0])).to(torch.int32)

            with torch.no_grad():
                change = model.loss_again(other, first, rows) - base[rows]
            was_full = (full[rows, place] & members).any(1)
            delta = torch.where(was_full, -change, change).clamp(-recipe.delta_clip, recipe.delta_clip)
            # No row has a layer twice.
            worth[rows, place] += scale[rows] / chance.to(delta)[place, None] * delta[:, None] * members
            if self.chances is not None:
                for layer in place.unique().tolist():
                    self.chances.note(layer, delta[place == layer])
        p = torch.sigmoid(z.detach())
        sparsity = 1 - (p + (z - z.detach()) / 4).mean((1, 2))  # value of the policy, gradient of even odds
        bound = F.relu(z.abs() - recipe.logit_bound).square().mean()
        total = (worth / 4 * (z - z.detach())).sum() + self.multipliers.penalty(sparsity, tasks)
        # The value is the policy's loss, for the logs; the gradient is that of the terms above.
        loss = total + base.mean() + self.BOUND_WEIGHT * bound
        return Step(loss, base, sparsity.detach(), z.detach() <= 0, torch.where(own, base, torch.nan))

    @staticmethod
    def _agree(full: Tensor, z: Tensor, draw: Tensor, flipped: Tensor, group: Tensor) -> Tensor:
        """Heads that are going to flip together share one draw, so that all are full or all sparse before they do."""
        flipped = flipped.to(group.device)
        members = (group & flipped[..., None]).any(1)  # [B, H]
        count = members.sum(1, keepdim=True).clamp(min=1)
        odds = (torch.sigmoid(z) * members).sum(1, keepdim=True) / count
        first = members.int().argmax(1, keepdim=True)
        return torch.where(members, draw.gather(1, first) < odds, full)


def make_objective(
    recipe: Recipe, tasks: Sequence[str], num_layers: int, num_heads: int = 1, seed: int = 0
) -> Objective:
    """The objective that the recipe names; arguments as for :class:`Objective`."""
    recipe = recipe.settled("head" if num_heads > 1 else "layer")
    kinds = {
        "counterfactual": Counterfactual,
        "soft": Soft,
        "straight_through": StraightThrough,
        "even_odds": EvenOdds,
    }
    return kinds[cast(ObjectiveName, recipe.objective)](recipe, tasks, num_layers, num_heads, seed)
