"""The trainer on tiny random models: what moves, what is saved, what resumes, what the batches mean."""

import json
import math

import pytest
import torch
import transformers
from tiny_training import LAYERS, Grab, batch_rows, dataset, model, snapshot, trainer

import flux_ext
from flux_ext.models import patching
from flux_ext.training import PackedCollator, PaddedCollator, Recipe
from flux_ext.training.backbone import PatchedModel, answer_lengths, losses


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("objective", ["counterfactual", "soft", "straight_through", "even_odds"])
@pytest.mark.parametrize("packed", [False, True])
def test_only_the_routers_move(tmp_path, objective, granularity, packed):
    m = model(granularity)
    before = snapshot(m)
    t = trainer(tmp_path, m, Recipe(objective=objective, targets={"a": 0.2}), packed=packed)
    t.train()
    moved = {name for name, p in m.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "flux_router" in name}
    logs = [x for x in t.state.log_history if "loss" in x]
    assert len(logs) == 4
    for task in "ab":
        for key in ("sparsity", "target", "lambda1", "lambda2", "lm_loss"):
            assert f"{task}/{key}" in logs[-1]
        assert 0 <= logs[-1][f"{task}/sparsity"] <= 1
    assert logs[-1]["a/target"] == pytest.approx(0.2) and logs[-1]["b/target"] == 0.5


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_losses_are_the_same_alone_padded_and_packed(family):
    m, data = model(family=family), dataset(5)
    rows = batch_rows(data)
    with torch.no_grad():
        alone = torch.cat([losses(m, PaddedCollator(0)([row])) for row in rows])
        padded, packed = losses(m, PaddedCollator(0)(rows)), losses(m, PackedCollator()(rows))
        whole = [
            m(torch.tensor([row["prompt"] + row["answer"]]), use_cache=False).logits[0].log_softmax(-1) for row in rows
        ]
    slow = torch.stack(
        [
            -torch.stack([x[len(r["prompt"]) - 1 + i, a] for i, a in enumerate(r["answer"])]).mean()
            for x, r in zip(whole, rows, strict=True)
        ]
    )
    for value in (alone, padded, packed):
        assert torch.allclose(value, slow, atol=1e-4)


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_routers_see_the_prompts_alone(granularity):
    """Whatever the answer: the logits are those of the prompt by itself."""
    m, rows = model(granularity), batch_rows(dataset(5))
    with torch.no_grad():
        m(torch.tensor([rows[0]["prompt"]]), use_cache=False)
        alone = []
        for row in rows:
            m(torch.tensor([row["prompt"]]), use_cache=False)
            alone.append(patching.last_routing(m).logits)
        for collator in (PaddedCollator(0), PackedCollator()):
            # All layers alike, so that nothing but the routers' own input can differ.
            with patching.routes(m, "full"):
                losses(m, collator(rows))
            first = patching.last_routing(m).logits[:, 0]
            assert torch.allclose(first, torch.cat(alone)[:, 0], atol=1e-5)


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator()], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_second_run_from_a_layer_equals_the_whole_run(collator, family):
    """It starts at the flipped layer, and must give what a run from the tokens gives."""
    m, inputs = model(family=family), collator(batch_rows(dataset(5)))
    m.requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    base = torch.randint(2, (5, LAYERS), generator=generator, dtype=torch.int32)
    flips = {0: torch.tensor([1]), 1: torch.tensor([0, 4]), 2: torch.tensor([3, 2, 4])}
    routed = PatchedModel(m, inputs, LAYERS)
    ran = []
    handles = [b.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(m.model.layers)]
    routed.loss(lambda layer, logits: base[:, layer], flips)
    assert ran == [0, 1, 2]
    for layer, rows in flips.items():
        changed = base.clone()
        changed[rows, layer] ^= 1
        ran.clear()
        again = routed.loss_again(lambda asked, logits, c=changed, r=rows: c[r, asked], layer, rows)
        assert ran == list(range(layer, LAYERS))
        with patching.policy(m, lambda asked, logits, c=changed: c[:, asked]), torch.no_grad():
            whole = losses(m, inputs)
        assert torch.allclose(again, whole[rows], atol=1e-5)
    for handle in handles:
        handle.remove()
    assert not any("forward" in b.__dict__ or b._forward_pre_hooks for b in m.model.layers)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_flips_of_several_layers_can_run_together(tmp_path, monkeypatch, granularity, packed):
    """As they do on a GPU that would idle: a run starts at the first of its layers, a sequence may be in it twice, and
    every gradient is what it is with a run per layer."""
    recipe = Recipe(objective="counterfactual", targets={"a": 0.2}, whiten=0, flips=2)
    grads: dict[int, list[torch.Tensor]] = {1: [], 100: []}
    for size, found in grads.items():
        runs: list[int] = []
        again = PatchedModel.loss_again

        def loss_again(self, policy, layer, rows, again=again, runs=runs):
            runs.append(len(rows))
            return again(self, policy, layer, rows)

        with monkeypatch.context() as patched:
            patched.setattr(PatchedModel, "run_size", size)
            patched.setattr(PatchedModel, "loss_again", loss_again)
            t = trainer(tmp_path, model(granularity), recipe, packed=packed, max_steps=2, callbacks=[Grab(found)])
            t.train()
        assert sum(runs) == 2 * 4 * 2 and len(runs) == (2 * LAYERS if size == 1 else 2 * 1)
    for one, together in zip(*grads.values(), strict=True):
        torch.testing.assert_close(one, together, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["counterfactual", "soft", "straight_through", "even_odds"])
@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_autocast(tmp_path, objective, packed):
    """Routers in fp32 learn over a backbone under autocast, and from nearly the same losses."""
    logs = {}
    for bf16 in (False, True):
        m = model()
        before = snapshot(m)
        t = trainer(tmp_path, m, Recipe(objective=objective, targets={"a": 0.2}, whiten=0), packed=packed, bf16=bf16)
        seen = []
        m.lm_head.register_forward_hook(lambda _m, args, out, seen=seen: seen.append(out.dtype))
        t.train()
        assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}
        moved = {name for name, p in m.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "flux_router" in name}
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in m.parameters())
        logs[bf16] = [x for x in t.state.log_history if "loss" in x]
    for task in "ab":
        assert logs[True][0][f"{task}/lm_loss"] == pytest.approx(logs[False][0][f"{task}/lm_loss"], rel=0.05)


def test_counterfactual_builds_no_graph_through_the_backbone(tmp_path):
    t = trainer(tmp_path)
    inputs = t.data_collator(batch_rows(dataset(4)))
    seen = []
    t.model.lm_head.register_forward_hook(lambda _m, args, out: seen.append(out.requires_grad))
    t.model.train()
    t.compute_loss(t.model, inputs).backward()
    assert len(seen) > 1 and not any(seen)


def test_frozen_queries_are_not_kept_for_the_routers_gradient():
    """With a router in every layer they would be the backbone's activations."""
    m = model()
    m.requires_grad_(False)
    flux_ext.get_routers(m).requires_grad_(True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.shape) or x, lambda x: x):
        m(torch.arange(5, 205)[None], use_cache=False)
    assert sizes and not any(200 in shape for shape in sizes)


def test_counterfactual_reaches_every_router(tmp_path):
    t = trainer(tmp_path)
    t.model.train()
    t.compute_loss(t.model, t.data_collator(batch_rows(dataset(4)))).backward()
    assert all(p.grad is not None for p in t.routers.parameters())


@pytest.mark.parametrize("objective", ["counterfactual", "soft"])
def test_gradient_accumulation_is_a_mean(tmp_path, objective):
    """The same four sequences at once or in four micro-batches give the same gradient, also of the penalty."""
    grads = []
    for size, accumulate in ((4, 1), (1, 4)):
        m = model()
        # No noise, no draws: odds beyond doubt, and every layer flipped.
        recipe = Recipe(objective=objective, targets={"a": 0.5}, flips=LAYERS, logit_bound=100.0, whiten=0)
        with torch.no_grad():
            for router in flux_ext.get_routers(m).layers:
                router.classifier[-1].bias.copy_(torch.tensor([0.0, 50.0]))
        t = trainer(
            tmp_path, m, recipe, dataset(4, ragged=False), max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate, max_grad_norm=0.0, callbacks=[Grab(grads)],
        )  # fmt: skip
        t.objective.multipliers.lambda1.fill_(3.0)
        t.train()
        assert t.objective.multipliers.lambda1.tolist() == pytest.approx([3.0 + 0.1 * 0.5] * 2)  # one ascent
    one, four = grads
    assert one.abs().max() > 0 if objective == "counterfactual" else True
    assert torch.allclose(one, four, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("form", ["inequality", "published", "published_abs"])
@pytest.mark.parametrize("objective", ["counterfactual", "soft", "straight_through", "even_odds"])
def test_losses_and_multipliers_are_those_of_the_formula(tmp_path, objective, form, accumulate):
    """Multipliers move after the step whose loss they are in, once per step, by the mean over its sequences."""
    grads = []
    for rate in (0.0, 0.3):
        recipe = Recipe(objective=objective, multipliers=form, multiplier_lr=rate, targets={"a": 0.2, "b": 0.9})
        t = trainer(
            tmp_path, recipe=recipe, max_steps=1, per_device_train_batch_size=4 // accumulate, max_grad_norm=0.0,
            gradient_accumulation_steps=accumulate, callbacks=[Grab(grads)],
        )  # fmt: skip
        if form == "inequality":
            t.objective.multipliers.lambda1.fill_(0.4)
        first, second = t.objective.multipliers.lambda1.tolist(), t.objective.multipliers.lambda2.tolist()
        seen, note = [], t.monitor.add

        def spy(tasks, step, dense, seen=seen, note=note):
            seen.append((tasks.tolist(), step))
            note(tasks, step, dense)

        t.monitor.add = spy
        t.train()
        assert len(seen) == accumulate
        for tasks, step in seen:
            sparsity = step.sparsity.tolist()
            if form == "inequality":
                terms = [first[k] * (recipe.target("ab"[k]) - s) for k, s in zip(tasks, sparsity, strict=True)]
            else:
                terms = []
                for k in sorted(set(tasks)):
                    own = [s for task, s in zip(tasks, sparsity, strict=True) if task == k]
                    d = sum(own) / len(own) - recipe.target("ab"[k])
                    terms.append(first[k] * (abs(d) if form == "published_abs" else d) + second[k] * d * d)
            assert step.loss.item() == pytest.approx(step.lm_loss.mean().item() + sum(terms) / len(terms), abs=1e-5)
        multipliers = t.objective.multipliers
        for k in (0, 1):
            own = [s.item() for tasks, step in seen for i, s in zip(tasks, step.sparsity, strict=True) if i == k]
            use = [c.float().mean() for tasks, step in seen for i, c in zip(tasks, step.choice, strict=True) if i == k]
            reached = float(max(sum(own), sum(use))) if form == "inequality" else sum(own)
            d = reached / len(own) - recipe.target("ab"[k]) if own else 0.0
            up = {"inequality": -d, "published": d, "published_abs": abs(d)}[form]
            assert multipliers.lambda1[k].item() == pytest.approx(max(0.0, first[k] + rate * up), abs=1e-5)
            quadratic = 0.0 if form == "inequality" else second[k] + rate * d * d
            assert multipliers.lambda2[k].item() == pytest.approx(quadratic, abs=1e-5)
    assert grads[0].abs().max() > 0
    assert torch.equal(grads[0], grads[1])  # of the multipliers as they were


def start_biases(routers):
    return [router.classifier[-1].bias.tolist() for router in routers.layers]


def fresh():
    m = model()
    config = flux_ext.get_routers(m).config
    flux_ext.unpatch(m)
    flux_ext.patch(m, config)
    return m


@pytest.mark.parametrize(
    "recipe, bias",
    [
        (Recipe(), 2.0),
        (Recipe(objective="soft"), 4.5),
        (Recipe(start_bias=-1.5), -1.5),
        (Recipe(objective="soft", start_bias=3), 3.0),
    ],
)
def test_fresh_routers_start_at_the_recipes_bias(tmp_path, recipe, bias):
    t = trainer(tmp_path, fresh(), recipe)
    assert start_biases(t.routers) == [[0.0, bias]] * LAYERS
    again = trainer(tmp_path, t.model, recipe)
    assert start_biases(again.routers) == [[0.0, bias]] * LAYERS


def test_the_start_is_as_sparse_as_its_bias_says(tmp_path):
    t = trainer(tmp_path, fresh(), Recipe(), max_steps=1)
    t.train()
    assert t.state.log_history[0]["a/sparsity"] == pytest.approx(1 / (1 + math.exp(2)), abs=0.03)


def test_trained_and_loaded_routers_keep_their_bias(tmp_path):
    t = trainer(tmp_path, fresh(), Recipe(objective="soft"), max_steps=2)
    t.train()
    t.save_model()
    trained = start_biases(t.routers)
    assert trained != [[0.0, 4.5]] * LAYERS
    assert start_biases(trainer(tmp_path, t.model, Recipe(start_bias=1)).routers) == trained
    m = fresh()
    flux_ext.unpatch(m)
    flux_ext.patch(m, routers=tmp_path)
    assert start_biases(trainer(tmp_path, m, Recipe(start_bias=1)).routers) == trained


def masking(collator, row):
    """A collator that loses the answer of one row."""

    def collate(rows):
        batch = collator(rows)
        if "cu_seq_lens_q" in batch:
            ends = batch["cu_seq_lens_q"].tolist()
            batch["labels"][0, ends[row] : ends[row + 1]] = -100
        else:
            batch["labels"][row] = -100
        return batch

    return collate


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator()], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", ["counterfactual", "soft", "straight_through", "even_odds"])
def test_a_row_without_labels_counts_as_none(tmp_path, objective, collator):
    seen = []
    for collate in (masking(collator, 1), lambda rows: collator([rows[0], *rows[2:]])):
        grads = []
        recipe = Recipe(objective=objective, targets={"a": 0.5}, whiten=0)
        t = trainer(tmp_path, recipe=recipe, max_steps=2, callbacks=[Grab(grads)])
        t.data_collator = collate
        t.train()
        logs = [x for log in t.state.log_history if "loss" in log for k, x in log.items() if k != "grad_norm"]
        seen.append((torch.stack(grads), t.objective.multipliers.lambda1, logs))
    assert seen[0][0].abs().max() > 0
    for a, b in zip(*(s[:2] for s in seen), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert seen[0][2] == pytest.approx(seen[1][2], rel=1e-4)


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator()], ids=["padded", "packed"])
def test_a_batch_without_labels_is_refused(tmp_path, collator):
    t = trainer(tmp_path)
    before = snapshot(t.routers)

    def collate(rows):
        batch = collator(rows)
        batch["labels"].fill_(-100)
        return batch

    t.data_collator = collate
    with pytest.raises(ValueError, match=r"labels are masked \(-100\) in all 4 sequences of the batch"):
        t.train()
    with pytest.raises(ValueError, match="in all 4 sequences"):
        t.evaluate(dataset(4))
    assert all(torch.equal(p, before[name]) for name, p in t.routers.named_parameters())
    rows = batch_rows(dataset(4))
    with pytest.raises(ValueError, match=r"an answer token in every sequence, \[2\] of 4 have none"):
        losses(t.model, masking(collator, 2)(rows))


def test_a_label_with_nothing_before_it_counts_for_nothing():
    rows = batch_rows(dataset(3))
    for collator in (PaddedCollator(0), PackedCollator()):
        batch = collator(rows)
        assert answer_lengths(batch).tolist() == [len(row["answer"]) for row in rows]
    batch["labels"][0, batch["cu_seq_lens_q"][:-1].long()] = 5
    assert answer_lengths(batch).tolist() == [len(row["answer"]) for row in rows]


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    t = trainer(tmp_path)
    before = snapshot(t.routers)
    with torch.no_grad():
        t.model.lm_head.weight[5] = torch.nan
    with pytest.raises(RuntimeError, match=r"step 1: the loss must be finite, got nan from the sequences' \[nan, nan"):
        t.train()
    assert all(torch.equal(p, before[name]) for name, p in t.routers.named_parameters())
    assert t.objective.multipliers.lambda1.tolist() == [0, 0]


def test_a_gradient_that_is_not_finite_stops_the_training(tmp_path):
    t = trainer(tmp_path)
    before = snapshot(t.routers)
    next(t.routers.parameters()).register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(RuntimeError, match="step 1: the gradient of the routers must be finite, its norm is nan"):
        t.train()
    assert all(torch.equal(p, before[name]) for name, p in t.routers.named_parameters())


def test_the_trainers_state_is_strict_json(tmp_path):
    t = trainer(tmp_path)
    t.log({"grad_norm": math.nan, "eval_loss": math.inf, "other": 1.5})
    t.state.save_to_json(str(tmp_path / "state.json"))

    def refuse(word):
        raise ValueError(f"not JSON: {word}")

    [entry] = json.loads((tmp_path / "state.json").read_text(), parse_constant=refuse)["log_history"]
    assert (entry["grad_norm"], entry["eval_loss"], entry["other"]) == (None, None, 1.5)


def test_a_training_that_could_not_be_saved_does_not_begin(tmp_path):
    t = trainer(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"another's")
    for call in (t.train, t.save_model):
        with pytest.raises(ValueError, match=r"training_args\.bin would be replaced"):
            call()
    assert t.state.global_step == 0 and [f.name for f in tmp_path.iterdir()] == ["training_args.bin"]


def test_saved_routers_are_used_by_patch(tmp_path):
    t = trainer(tmp_path)
    t.train()
    t.save_model()
    m = model()
    flux_ext.unpatch(m)
    flux_ext.patch(m, routers=tmp_path)
    for a, b in zip(flux_ext.get_routers(m).parameters(), t.routers.parameters(), strict=True):
        assert torch.equal(a, b)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["tasks"] == ["a", "b"] and recipe["targets"] == {"a": 0.5}


def test_same_seed_same_routers(tmp_path):
    runs = []
    for seed in (0, 0, 1):
        t = trainer(tmp_path, seed=seed)
        t.train()
        runs.append(torch.cat([p.detach().flatten() for p in t.routers.parameters()]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_evaluation_loss_is_that_of_the_hard_routes(tmp_path):
    t = trainer(tmp_path)
    t.eval_dataset = dataset(4)
    value = t.evaluate()["eval_loss"]
    with torch.no_grad():
        rows = batch_rows(t.eval_dataset)
        expected = losses(t.model, PaddedCollator(0)(rows)).mean()
    assert value == pytest.approx(expected.item(), rel=1e-4)


def test_evaluation_leaves_every_module_in_its_mode(tmp_path):
    t = trainer(tmp_path)
    t.model.train().model.layers[1].eval()
    before = {name: module.training for name, module in t.model.named_modules()}
    t.evaluate(dataset(4))
    with pytest.raises(KeyError):
        t.evaluate([{}])
    assert {name: module.training for name, module in t.model.named_modules()} == before


def test_layers_without_a_router_are_left_alone(tmp_path):
    m = model(layers_to_route=[0, 2])
    t = trainer(tmp_path, m, Recipe(flips=2))
    t.train()
    assert t.objective.num_layers == 2


def test_bad_input(tmp_path):
    m = model()
    with pytest.raises(ValueError, match="targets names tasks that the data lack: c"):
        trainer(tmp_path, m, Recipe(targets={"c": 0.5}))
    trainer(tmp_path, m, ddp_find_unused_parameters=True)  # of no account in one process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.TrainingArguments, "world_size", 2)
        with pytest.raises(ValueError, match="ddp_find_unused_parameters must be False"):
            trainer(tmp_path, m, ddp_find_unused_parameters=True)
    flux_ext.unpatch(m)
    with pytest.raises(ValueError, match="is not patched"):
        trainer(tmp_path, m)
