"""Sparse layers in a model, without any training: what they cost and what they save, chosen by you or by measuring.

    python examples/without_training.py                                  # a small bundled model, half a minute on a CPU
    python examples/without_training.py --model MODEL --data examples.jsonl --sink 128 --window 2048
    python examples/without_training.py --model MODEL --data examples.jsonl --sparse 1 2 3:0    # of layer 3: KV head 0

Without --sparse each layer is made sparse alone, then the cheapest ones together. What is shown is how much more the
right answers lose than in the model as it is, in nats per token. `flux-ext make-data` writes examples for any model. A
choice for all inputs, as made here, is what trained routers have to beat.
"""

import argparse

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import flux_ext
from flux_ext.cli.demo import BACKBONE
from flux_ext.evaluation.tasks import continuation, retrieval
from flux_ext.examples import load_examples, tokenized
from flux_ext.transformers_seam import cache_of


@torch.inference_mode()
def measure(routes):
    """Under routes ``[1, layers, KV heads]`` (1 is sparse): nats per answer token by task, and bytes that are kept."""
    nats, kept = {}, 0
    with flux_ext.routes(model, routes):
        for task, prompt, answer in examples:
            ids = torch.tensor([prompt + answer], device=model.device)
            out = model(ids[:, :-1], logits_to_keep=len(answer))
            loss = float(F.cross_entropy(out.logits[0].float(), ids[0, -len(answer) :]))
            nats[task] = nats.get(task, 0) + loss / len(of_task[task])
            kept += cache_of(out).nbytes()
    return nats, kept


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(BACKBONE), help="folder or hub name")
parser.add_argument("--data", help="examples: .jsonl or .parquet with the columns context, question, answer, task")
parser.add_argument("--examples", type=int, default=3, help="of each task, the first so many")
parser.add_argument("--sparse", nargs="+", metavar="LAYER[:HEAD]", help="these, instead of measuring each layer")
parser.add_argument("--sink", type=int, default=16)
parser.add_argument("--window", type=int, default=192)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32 if args.device == "cpu" else "auto")
flux_ext.patch(model.to(args.device).eval(), flux_ext.FluxConfig(sink=args.sink, window=args.window))
tokenizer = AutoTokenizer.from_pretrained(args.model)
rows = load_examples(args.data) if args.data else retrieval(args.examples) + continuation(args.examples)
of_task = {task: [e for e in rows if e.task == task][: args.examples] for task in sorted({e.task for e in rows})}
examples = [(task, *tokenized(e, tokenizer)) for task, chosen in of_task.items() for e in chosen]
routers = flux_ext.get_routers(model)
full = torch.zeros(1, len(routers.layers), routers.config.num_kv_heads, dtype=torch.int32)
dense, all_bytes = measure(full)
print("everything full:", ", ".join(f"{task} {nats:.4f} nats" for task, nats in dense.items()))


def show(name, chosen):
    """Prints what these layers, or heads of layers, cost and save; returns the cost in the mean over the tasks."""
    routes = full.clone()
    for layer, *head in (map(int, str(place).split(":")) for place in chosen):
        routes[0, layer, head or slice(None)] = 1
    nats, kept = measure(routes)
    print(f"{name} sparse:", ", ".join(f"{task} {nats[task] - dense[task]:+.4f}" for task in nats), end="; ")
    print(f"{kept / 1e6:.1f} MB of keys and values, {kept / all_bytes:.0%} of what full keeps", flush=True)
    return sum(nats[task] - dense[task] for task in nats) / len(nats)


if args.sparse:
    show(" ".join(args.sparse), args.sparse)
else:
    cost = {layer: show(f"layer {layer} alone", [layer]) for layer in range(full.shape[1])}
    order = sorted(cost, key=cost.__getitem__)
    for count in (len(order) * part // 8 for part in (4, 6, 7, 8)):
        show(f"layers {sorted(order[:count])}", order[:count])
