"""Routers of a tiny random model in training: what the tests of the trainer share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

import flux_ext
from flux_ext.examples import Example
from flux_ext.training import FluxTrainer, Recipe, RouterDataset, training_arguments

LAYERS = 3
SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


class Bytes:
    """A tokenizer: one token per byte, after a start token."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [2 + b for b in text.encode()]}

    def decode(self, tokens, skip_special_tokens=False):
        return bytes(t - 2 for t in tokens if 2 <= t < 258).decode(errors="replace")


def model(granularity="layer", family="qwen3", **config):
    torch.manual_seed(0)
    kind, cls = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    m = cls(kind(**SMALL)).eval()
    with torch.no_grad():  # far from uniform, so that routes matter
        for p in m.parameters():
            p.mul_(3)
    flux_ext.patch(m, flux_ext.FluxConfig(sink=2, window=6, pool_size=4, granularity=granularity, **config))
    with torch.no_grad():
        for router in flux_ext.get_routers(m).layers:
            router.classifier[-1].bias.zero_()
    return m


def dataset(count=12, ragged=True):
    generator = torch.Generator().manual_seed(2)

    def text(length):
        return "".join(chr(97 + int(c)) for c in torch.randint(26, (length,), generator=generator))

    examples = [
        Example(text(20 + (5 * i % 17 if ragged else 0)), text(3), text(2 + i % 3 if ragged else 3), "ab"[i % 2])
        for i in range(count)
    ]
    return RouterDataset(examples, Bytes())


def trainer(tmp_path, m=None, recipe=None, data=None, **options):
    packed = options.pop("packed", False)
    sequence_parallel = options.pop("sequence_parallel", 1)
    callbacks = options.pop("callbacks", None)
    args = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        **options,
    }
    return FluxTrainer(
        model() if m is None else m,
        recipe or Recipe(targets={"a": 0.5}, whiten=0),
        training_arguments(str(tmp_path), **args),
        train_dataset=data or dataset(),
        packed=packed,
        sequence_parallel=sequence_parallel,
        tokenizer=Bytes(),
        callbacks=callbacks,
    )


def snapshot(m):
    return {name: p.detach().clone() for name, p in m.named_parameters()}


def batch_rows(data):
    return [data[i] for i in range(len(data))]


class Grab(TrainerCallback):
    """Keeps the gradient at each step."""

    def __init__(self, grads):
        self.grads = grads

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        routers = flux_ext.get_routers(model)
        self.grads.append(torch.cat([p.grad.flatten() for p in routers.parameters()]).clone())
