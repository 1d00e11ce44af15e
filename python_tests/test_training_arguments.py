"""What the trainer takes from transformers' TrainingArguments as they come, and what it refuses by name."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_training import LAYERS, Bytes, Grab, dataset, model, trainer

import flux_ext
from flux_ext.training import FluxTrainer, Recipe, config, make_objective, training_arguments


def stock(tmp_path, **changes):
    """TrainingArguments with nothing of ours."""
    short = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return transformers.TrainingArguments(str(tmp_path), **{**short, **quiet, **changes})


def steps(args, **options):
    """Parameters of the routers after training with these arguments."""
    m = model()
    FluxTrainer(m, Recipe(), args, train_dataset=dataset(), tokenizer=Bytes(), **options).train()
    return torch.cat([p.detach().flatten() for p in flux_ext.get_routers(m).parameters()])


def test_stock_arguments_train_what_ours_train(tmp_path):
    published = {"weight_decay": 0.1, "adam_beta2": 0.95, "lr_scheduler_type": "cosine", "warmup_steps": 0.2}
    args = stock(tmp_path, per_device_train_batch_size=4, **published)
    assert args.remove_unused_columns
    given = copy.copy(args)
    ours = training_arguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, use_cpu=True, save_strategy="no", disable_tqdm=True,
        learning_rate=1e-2,
    )  # fmt: skip
    assert torch.equal(steps(args), steps(ours))
    assert vars(args) == vars(given)  # another Trainer may have use for them


@pytest.mark.parametrize(
    "changes",
    [
        {"label_names": ["labels"]},
        {"dataloader_drop_last": True, "dataloader_num_workers": 1, "dataloader_pin_memory": False},
        {"train_sampling_strategy": "sequential"},
        {"include_num_input_tokens_seen": "all"},
        {"neftune_noise_alpha": 1.0},
        {"optim": "sgd"},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=lambda c: next(iter(c)),
)
def test_arguments_that_work(tmp_path, changes):
    before = torch.cat([p.detach().flatten() for p in flux_ext.get_routers(model()).parameters()])
    evaluation = {"eval_dataset": dataset(4)} if "eval_steps" in changes else {}
    after = steps(stock(tmp_path, **changes), **evaluation)
    assert bool(after.isfinite().all()) and not torch.equal(before, after)


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("torch_compile", True, "must be False, got True"),
        ("use_liger_kernel", True, "must be False, got True"),
        ("label_smoothing_factor", 0.1, "must be 0, got 0.1"),
        ("fp16_full_eval", True, "must be False, got True"),
        ("bf16_full_eval", True, "must be False, got True"),
        ("train_sampling_strategy", "group_by_length", "must be 'random' or 'sequential', got 'group_by_length'"),
        ("train_sampling_strategy", "batch_rebalance", "must be 'random' or 'sequential', got 'batch_rebalance'"),
    ],
)
def test_arguments_that_are_refused(tmp_path, name, value, rule):
    m, args = model(), stock(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"{name} {rule}"):
        FluxTrainer(m, args=args, train_dataset=dataset(), tokenizer=Bytes())
    assert all(p.requires_grad for p in m.parameters())  # nothing has been done


@pytest.mark.parametrize("name", ["sp_size", "cp_size", "tp_size"])
def test_accelerates_own_ways_to_share_sequences_are_refused(tmp_path, name):
    """Set behind the arguments' own checks, which want as many processes."""
    m, args = model(), stock(tmp_path)
    args.parallelism_config = SimpleNamespace(**{"sp_size": 1, "cp_size": 1, "tp_size": 1, name: 2})
    with pytest.raises(ValueError, match=rf"parallelism_config.{name} must be 1, got 2: .*FluxTrainer\(sequence_par"):
        FluxTrainer(m, args=args, train_dataset=dataset(), tokenizer=Bytes())
    assert all(p.requires_grad for p in m.parameters())  # nothing has been done


def test_batches_are_not_dispatched(tmp_path):
    with pytest.raises(ValueError, match="dispatch_batches must be False, got True"):
        trainer(tmp_path, accelerator_config={"dispatch_batches": True})


def test_an_accelerate_that_is_too_old_for_fsdp_is_named(tmp_path, monkeypatch):
    args = stock(tmp_path)
    args.fsdp = True
    monkeypatch.setattr(config.importlib.metadata, "version", lambda name: "1.11.0")
    with pytest.raises(ValueError, match="fsdp needs accelerate >= 1.12, .* found 1.11.0"):
        FluxTrainer(model(), args=args, train_dataset=dataset(), tokenizer=Bytes())


def test_a_model_that_was_sharded_while_it_was_loaded_is_refused(tmp_path, monkeypatch):
    m = model()
    monkeypatch.setattr(type(m), "is_distributed_loading_by_transformers", True, raising=False)
    with pytest.raises(ValueError, match="model must be whole, it was sharded while it was loaded"):
        FluxTrainer(m, args=stock(tmp_path), train_dataset=dataset(), tokenizer=Bytes())


def test_several_gpus_in_one_process_are_refused(tmp_path):
    m, args = model(), stock(tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(ValueError, match="n_gpu must be 1, got 2.*torchrun"):
        FluxTrainer(m, args=args, train_dataset=dataset(), tokenizer=Bytes())
    m.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}  # spread over them: no copies are made
    FluxTrainer(m, args=args, train_dataset=dataset(), tokenizer=Bytes())


@pytest.mark.parametrize(
    "name", ["model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"]
)
def test_functions_that_would_never_be_called_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be left out"):
        FluxTrainer(model(), args=stock(tmp_path), train_dataset=dataset(), **{name: lambda *_: None})


def test_a_dataset_without_tasks_is_refused(tmp_path):
    with pytest.raises(TypeError, match="train_dataset must have tasks, like a RouterDataset, got list"):
        FluxTrainer(model(), args=stock(tmp_path), train_dataset=[1])


@pytest.mark.parametrize(
    "granularity, objective", [("layer", "counterfactual"), ("head", "straight_through")], ids=["layer", "head"]
)
def test_the_default_objective_and_what_it_holds_follow_the_granularity(tmp_path, monkeypatch, granularity, objective):
    monkeypatch.chdir(tmp_path)  # where the default folder is made
    t = FluxTrainer(model(granularity), train_dataset=dataset(), tokenizer=Bytes())
    heads = 2 if granularity == "head" else 1
    assert t.recipe.objective == objective and type(t.objective) is type(make_objective(Recipe(), ["a"], 2, heads))
    checkpointing = getattr(t.args, "activation_checkpointing", t.args.gradient_checkpointing)
    assert checkpointing == t.recipe.goes_backward == (granularity == "head")
    for named in ("counterfactual", "soft"):
        assert trainer(tmp_path, model(granularity), Recipe(objective=named)).recipe.objective == named


def test_options_of_flips_need_flips(tmp_path):
    for option in ({"flips": 3}, {"flip_choice": "by_worth"}, {"heads_per_flip": 2}, {"delta_clip": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be left out, got .* of counterfactuals"):
            trainer(tmp_path, model("head"), Recipe(**option))
    assert trainer(tmp_path, model(), Recipe(flips=2)).objective.flips == 2
    with pytest.raises(ValueError, match="objective must be named, got None"):
        Recipe().goes_backward  # noqa: B018


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective", ["counterfactual", "soft", "straight_through", "even_odds"])
def test_gradient_checkpointing_changes_nothing(tmp_path, objective, packed):
    """Over several steps: what is recomputed must not use up random draws either."""
    seen = []
    for checkpointing in (False, True):
        grads = []
        t = trainer(
            tmp_path, recipe=Recipe(objective=objective, flips=2), max_steps=3, packed=packed, callbacks=[Grab(grads)],
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        t.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in t.model.modules()) == checkpointing
        seen.append((torch.stack(grads), [x["loss"] for x in t.state.log_history if "loss" in x]))
    (grads, losses), (grads_too, losses_too) = seen
    assert grads.abs().max() > 0
    assert torch.allclose(grads, grads_too, atol=1e-6, rtol=1e-4)
    assert losses == pytest.approx(losses_too, rel=1e-6)
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.skipif(
    "activation_checkpointing" not in {f.name for f in dataclasses.fields(transformers.TrainingArguments)},
    reason="these options came with transformers 5.24",
)
@pytest.mark.parametrize("option", ["every_n_layers", "offload"])
@pytest.mark.parametrize("granularity, objective", [("layer", "soft"), ("head", "straight_through")])
def test_checkpointing_of_some_layers_or_on_the_host_changes_nothing(
    tmp_path, monkeypatch, granularity, objective, option
):
    pinned = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(  # without an accelerator there is no pinned memory, which is all that differs
        transformers.modeling_utils, "save_on_cpu", lambda pin_memory, device_type: pinned(False, device_type)
    )
    seen = []
    for given in ({}, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {option: 2}}):
        grads = []
        recipe = Recipe(objective=objective, targets={"a": 0.5}, whiten=0)
        t = trainer(tmp_path, model(granularity), recipe, max_steps=2, callbacks=[Grab(grads)], **given)
        t.train()
        layers = [layer.gradient_checkpointing for layer in t.model.model.layers]
        assert sum(layers) == (0 if not given else math.ceil(LAYERS / 2) if option == "every_n_layers" else LAYERS)
        seen.append(torch.stack(grads))
    assert seen[0].abs().max() > 0 and torch.allclose(*seen, atol=1e-6, rtol=1e-4)


def test_deepspeed_would_save_routers_in_parts_and_is_refused(tmp_path, monkeypatch):
    start = transformers.Trainer.create_accelerator_and_postprocess

    def started(self):
        start(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", started)
    with pytest.raises(ValueError, match="DeepSpeed must be off: routers and multipliers would not be whole"):
        trainer(tmp_path)
