"""A whole model: patch it, train its routers, save and load them, generate, see what was routed where.

The model is a tiny Llama with random weights and the text is made up, so nothing is downloaded and nothing useful is
learned; with a real model and tokenizer the calls are the same. On a CPU in seconds: python examples/patch_and_train.py
"""

import json
import random
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flux_ext
from flux_ext.training import FluxTrainer, Recipe, RouterDataset, load_examples, training_arguments


class Bytes:
    """A tokenizer, one token per byte; any Hugging Face tokenizer does."""

    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [2 + byte for byte in text.encode()]}


def write_examples(file: Path) -> None:
    """Two tasks, a JSON object a line: the prompt is context + question, the loss is that of the answer's tokens."""
    draw = random.Random(0)
    with file.open("w") as out:
        for i in range(16):
            key, noise = draw.randint(10, 99), " ".join(str(draw.random()) for _ in range(6))
            fact = f"The key is {key}. "
            task, context = ("far", fact + noise) if i % 2 else ("near", noise + fact)
            example = {"context": context, "question": " Which key? ", "answer": str(key), "task": task}
            out.write(json.dumps(example) + "\n")


def main(work: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    flux_ext.patch(model, flux_ext.FluxConfig(sink=4, window=32, pool_size=16))

    # Train: the backbone is frozen. A target is the share of a task's attention that is to be sparse. (The default
    # rates are for hundreds of steps; here there are 20.)
    write_examples(work / "examples.jsonl")
    tokenizer = Bytes()
    options = {"max_steps": 20, "learning_rate": 0.01, "per_device_train_batch_size": 4, "use_cpu": True}
    trainer = FluxTrainer(
        model,
        Recipe(targets={"near": 1.0, "far": 0.5}, multiplier_lr=0.2),
        training_arguments(str(work / "run"), **options),
        train_dataset=RouterDataset(load_examples(work / "examples.jsonl"), tokenizer),
        tokenizer=tokenizer,
    )
    trainer.train()

    # Save the model, and its routers beside it. Load both: from_pretrained gives a plain model, patch routes it.
    model.save_pretrained(work / "model")
    loaded = AutoModelForCausalLM.from_pretrained(work / "model").eval()
    flux_ext.patch(loaded, routers=str(work / "model"))

    # Generate. The routers decide once, from the prompt.
    prompt = torch.tensor([tokenizer("The key is 42. " + "Now something else. " * 12 + "Which key? ")["input_ids"]])
    answer = loaded.generate(prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(answer.sequences, model.generate(prompt, max_new_tokens=8, do_sample=False)), "not as saved"
    cache = answer.past_key_values
    for layer, route in enumerate(cache.routes[0].tolist()):  # of the first sequence, [layers, KV heads]
        print(f"layer {layer}: {['full', 'sparse'][route[0]]}")
    print(f"{prompt.shape[1]} tokens in the prompt, {cache.nbytes()} bytes of keys and values kept")
    flux_ext.unpatch(loaded)  # the stock model again


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
