"""The trainer on tiny random models: what moves, what is saved, what resumes, what the batches mean."""

import json

import pytest
import torch
import transformers
from tiny_training import LAYERS, Grab, batch_rows, dataset, model, snapshot, trainer

import flux_ext
from flux_ext import patching
from flux_ext.training import PackedCollator, PaddedCollator, Recipe
from flux_ext.training.backbone import PatchedModel, losses


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("objective", ["counterfactual", "soft", "straight_through"])
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


@pytest.mark.parametrize("objective", ["counterfactual", "soft", "straight_through"])
@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_autocast(tmp_path, objective, packed):
    """Routers in fp32 learn over a backbone under autocast, and from nearly the same losses."""
    logs = {}
    for bf16 in (False, True):
        m = model()
        before = snapshot(m)
        t = trainer(tmp_path, m, Recipe(objective=objective, targets={"a": 0.2}), packed=packed, bf16=bf16)
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
        recipe = Recipe(objective=objective, targets={"a": 0.5}, flips=LAYERS, logit_bound=100.0)
        with torch.no_grad():
            for router in flux_ext.get_routers(m).layers:
                router.classifier[-1].bias.copy_(torch.tensor([0.0, 50.0]))
        t = trainer(
            tmp_path, m, recipe, dataset(4, ragged=False), max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate, max_grad_norm=0.0, callbacks=[Grab(grads)],
        )  # fmt: skip
        t.objective.multipliers.lambda1.fill_(3.0)
        t.train()
        assert t.objective.multipliers.lambda1.tolist() == pytest.approx([3.0 + 0.02 * 0.5] * 2)  # one ascent
    one, four = grads
    assert one.abs().max() > 0 if objective == "counterfactual" else True
    assert torch.allclose(one, four, atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path):
    grads = []
    for checkpointing in (False, True):
        t = trainer(
            tmp_path, recipe=Recipe(objective="soft"), max_steps=1, gradient_checkpointing=checkpointing,
            callbacks=[Grab(grads)],
        )  # fmt: skip
        t.train()
    assert grads[0].abs().max() > 0
    assert torch.allclose(grads[0], grads[1], atol=1e-7)
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.parametrize("objective", ["counterfactual", "soft"])
def test_resume_gives_the_same_routers(tmp_path, objective):
    recipe = Recipe(objective=objective, targets={"a": 0.3})
    through = trainer(tmp_path / "one", recipe=recipe, max_steps=6)
    through.train()
    first = trainer(tmp_path / "two", recipe=recipe, max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    folder = tmp_path / "two" / "checkpoint-3"
    names = {f.name for f in folder.iterdir()}
    assert {
        "flux_config.json",
        "flux_routers.safetensors",
        "objective.safetensors",
        "recipe.json",
        "optimizer.pt",
    } <= names
    routers = flux_ext.FluxRouters.from_pretrained(folder)
    assert sum(p.numel() for p in routers.parameters()) == sum(p.numel() for p in through.routers.parameters())

    second = trainer(tmp_path / "two", recipe=recipe, max_steps=6)
    second.train(resume_from_checkpoint=str(folder))
    for a, b in zip(through.routers.parameters(), second.routers.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(through.objective.multipliers.lambda1, second.objective.multipliers.lambda1)


def test_resume_checks_the_checkpoint(tmp_path):
    t = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    t.train()
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="was trained with objective 'counterfactual', not 'soft'"):
        trainer(tmp_path, recipe=Recipe(objective="soft")).train(resume_from_checkpoint=str(folder))
    other = trainer(tmp_path, model(granularity="head"))
    with pytest.raises(ValueError, match="have other settings: granularity"):
        other.train(resume_from_checkpoint=str(folder))
    (folder / "objective.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it has no objective\.safetensors"):
        trainer(tmp_path).train(resume_from_checkpoint=str(folder))


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
