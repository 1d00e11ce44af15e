"""Make the demonstration backbone: a small Qwen3 over bytes that retrieves with few layers and copes without the rest.

    python tools/train_demo_backbone.py --minutes 3.5

writes the tokenizer, the model in bfloat16 and a README with the figures. Half of every batch is code, the other half
code with facts hidden in it and questions about them (flux_ext.evaluation.tasks). What makes the result useful for
routing is that each sequence is trained under its own route, one full-or-streaming choice per layer:

- sequences with questions keep the RETRIEVAL_LAYERS full, and any of the others: retrieval settles in those layers;
- sequences of code learn the text with every layer streaming; with full layers they learn to predict what they would
  without (distillation), so that continuing code hardly comes to depend on far keys.

Large pretrained models are found to be like this by themselves, with few retrieval heads; a model this small is not.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AttentionInterface, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flux_ext.evaluation import tasks

END_OF_TEXT, PAD = 256, 257  # Below are the bytes: token i is byte i.
SPECIAL_TOKENS = {"<|endoftext|>": END_OF_TEXT, "<|pad|>": PAD}
VOCABULARY = 264  # The next multiple of 8: odd sizes make slow matrix products.
SINKS, WINDOWS = (8, 32), (96, 192)  # Streaming in training varies a little, so that nothing hangs on its exact size.
RETRIEVAL_LAYERS = (3, 5)  # In the middle: what comes before gathers a fact's key, what follows reads the value out.
FACT_BYTES = len(tasks.fact_line("....", "...."))
README = Path(__file__).with_name("demo_backbone_readme.md")  # With fields for str.format.
ASSETS = Path(__file__).resolve().parent.parent / "flux_ext" / "assets"


# The tokenizer and the model


def byte_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """Every byte of the UTF-8 text is a token; the token's number is the byte."""
    # Fast tokenizers work on characters, and by GPT-2's convention spell the bytes that do not print with others.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}

    tokenizer = Tokenizer(models.BPE(vocab={spelling[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=length,
    )


def new_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=args.length,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT,
        pad_token_id=PAD,
    )
    return Qwen3ForCausalLM(config)


# Routes: per sequence and layer, full or streaming attention


@dataclass(frozen=True)
class Routing:
    """What each layer of each sequence sees: where it streams, ``routes [B, L]``, and both masks, ``[S, S]``."""

    routes: torch.Tensor
    full: torch.Tensor
    streaming: torch.Tensor

    @classmethod
    def of(cls, routes: torch.Tensor, length: int, sink: int, window: int) -> Routing:
        position = torch.arange(length, device=routes.device)
        behind = position[:, None] - position[None, :]
        full = behind >= 0
        return cls(routes, full, full & ((position[None, :] < sink) | (behind < window)))

    def mask(self, layer: int) -> torch.Tensor:
        """What the layer sees, ``[B, 1, S, S]``."""
        return torch.where(self.routes[:, layer, None, None, None], self.streaming, self.full)


def routed_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """An attention function for transformers that takes a Routing where others take a mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = attention_mask.mask(module.layer_idx)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def forward(model: Qwen3ForCausalLM, tokens: torch.Tensor, routing: Routing, last: int = 0) -> torch.Tensor:
    """Logits under a routing; of the last positions only if ``last`` is given."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        # A dictionary by layer type goes to the layers as it is; a bare mask would be looked into.
        masks = {"full_attention": routing}
        return model(tokens, attention_mask=masks, logits_to_keep=last, use_cache=False).logits


def question_route(rng: random.Random, layers: int) -> list[bool]:
    """A route of a training sequence with questions, true where the layer streams."""
    share = rng.choice((0.0, rng.random(), 1.0))  # Of the other layers that are full.
    return [layer not in RETRIEVAL_LAYERS and rng.random() >= share for layer in range(layers)]


def mixed_route(rng: random.Random, layers: int) -> list[bool]:
    """A route of a training sequence of code with some layers full, or all."""
    share = rng.choice((rng.random(), 1.0))
    return [rng.random() >= share for _ in range(layers)]


# Batches


def prompt_length(args: argparse.Namespace) -> int:
    """The part of the longest sequences that prompts take; the rest is for what is generated."""
    return args.length * 8 // 9


@dataclass(frozen=True)
class Stage:
    """One lesson of the curriculum. It ends when its questions are answered, or after a share of the whole time."""

    until: float
    lengths: tuple[int, ...]
    facts: tuple[int, int]
    questions: tuple[int, int]


def curriculum(length: int) -> list[Stage]:
    """Short texts with many questions first: retrieval comes sooner from them."""
    return [
        Stage(0.40, (length // 2,), (3, 4), (3, 4)),
        Stage(1.00, (length, length, length // 2), (1, 6), (1, 4)),
    ]


@dataclass(frozen=True)
class Batch:
    """Rows of code, the first ``mixed`` with full layers and the others streaming, then as many rows of questions."""

    tokens: torch.Tensor  # [B, S]
    is_answer: torch.Tensor  # [B, S]
    routes: torch.Tensor  # [B, L]
    mixed: int

    def to(self, device: str) -> Batch:
        """The batch on the device, without waiting for the copies."""
        tensors = (self.tokens, self.is_answer, self.routes)
        if device != "cpu":
            tensors = (x.pin_memory().to(device, non_blocking=True) for x in tensors)
        return Batch(*tensors, self.mixed)


class Batches:
    """Draws training batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rng = random.Random(args.seed)
        documents = list(tasks.corpus("train").values())
        self.excerpts = tasks.Excerpts(documents, args.length)
        stream = [token for text in documents for token in (*text.encode(), END_OF_TEXT)]
        self.code = torch.tensor(stream, dtype=torch.int16)

    def question_row(self, length: int, stage: Stage) -> tuple[list[int], list[bool]]:
        """Tokens of code with facts, then questions with answers; and which tokens belong to the answers."""
        rng = self.rng
        facts, questions = rng.randint(*stage.facts), rng.randint(*stage.questions)
        hidden = tasks.draw_facts(rng, facts)
        keys = rng.sample(list(hidden), min(facts, questions))
        tail, is_answer = [], []
        for key in keys:
            asked = tasks.question_text(key)
            if key != keys[-1]:  # The question's last line will do: room for more of them.
                asked = asked[asked.rindex("\n") :]
            tail += [*asked.encode(), *hidden[key].encode(), END_OF_TEXT]
            is_answer += [False] * len(asked) + [True] * (len(hidden[key]) + 1)
        header = rng.choice((tasks.HEADER, ""))
        code_length = length - len(header) - len(tail) - facts * FACT_BYTES
        lines = [tasks.fact_line(key, value) for key, value in hidden.items()]
        body = None
        while body is None:
            body = tasks.hide(rng, self.excerpts.draw(rng, code_length), lines, min(32, code_length // 4), code_length)
        row = [*header.encode(), *body.encode(), *tail]
        return row, [False] * (length - len(tail)) + is_answer

    def draw(self, stage: Stage) -> Batch:
        """A batch of the stage."""
        rng, args = self.rng, self.args
        length = rng.choice(stage.lengths)
        half = max(2, args.tokens // length // 2)
        mixed = math.ceil(half * args.code_full)
        starts = torch.tensor([rng.randrange(len(self.code) - length) for _ in range(half)])
        code = self.code[starts[:, None] + torch.arange(length)].long()
        rows = [self.question_row(length, stage) for _ in range(half)]
        questions, is_answer = (torch.tensor(x) for x in zip(*rows, strict=True))
        routes = [mixed_route(rng, args.layers) for _ in range(mixed)]
        routes += [[True] * args.layers] * (half - mixed)
        routes += [question_route(rng, args.layers) for _ in range(half)]
        return Batch(
            tokens=torch.cat([code, questions]),
            is_answer=torch.cat([torch.zeros_like(is_answer), is_answer]),
            routes=torch.tensor(routes),
            mixed=mixed,
        )


# Evaluation, on code that training never reads


class Evaluation:
    """Retrieval accuracy and bits per byte of a model under a route."""

    def __init__(self, args: argparse.Namespace, count: int) -> None:
        self.args = args
        prompt = prompt_length(args)
        self.retrieval = self._batch(tasks.retrieval(count, length=prompt, distance=2 * args.window))
        self.continuation = self._batch(tasks.continuation(count, length=prompt, answer_length=args.length - prompt))

    def _batch(self, examples: list[tasks.Example]) -> tuple[torch.Tensor, int]:
        texts = [(example.prompt + example.answer).encode() for example in examples]
        return torch.tensor([list(text) for text in texts], device=self.args.device), len(examples[0].answer)

    @torch.no_grad()
    def _answers(self, model: Qwen3ForCausalLM, batch: tuple[torch.Tensor, int], full: tuple[int, ...]):
        """Logits of the answers, and the answers."""
        (tokens, answer), args = batch, self.args
        route = [layer not in full for layer in range(args.layers)]
        for part in tokens.split(64):
            routes = torch.tensor([route] * len(part), device=part.device)
            routing = Routing.of(routes, tokens.shape[1], args.sink, args.window)
            yield forward(model, part, routing, last=answer + 1)[:, :-1].float(), part[:, -answer:]

    def accuracy(self, model: Qwen3ForCausalLM, full: tuple[int, ...]) -> float:
        """Share of questions answered right in every digit, with only these layers full."""
        right = [(x.argmax(-1) == y).all(-1) for x, y in self._answers(model, self.retrieval, full)]
        return torch.cat(right).float().mean().item()

    def bits_per_byte(self, model: Qwen3ForCausalLM, full: tuple[int, ...]) -> float:
        """Mean code length of the continuations, with only these layers full."""
        answers = self._answers(model, self.continuation, full)
        nats = [F.cross_entropy(x.transpose(1, 2), y, reduction="none") for x, y in answers]
        return torch.cat(nats).mean().item() / math.log(2)


def evaluate(model: Qwen3ForCausalLM, args: argparse.Namespace) -> list[dict]:
    """The final table: dense, all streaming, and with the one full layer that serves each task best."""
    evaluation, small = Evaluation(args, args.eval_count), Evaluation(args, args.eval_count // 4)
    every = tuple(range(args.layers))
    ones = [(layer,) for layer in every]
    chosen = {
        "dense": every,
        "all streaming": (),
        "best layer for retrieval": max(ones, key=lambda full: small.accuracy(model, full)),
        "best layer for code": min(ones, key=lambda full: small.bits_per_byte(model, full)),
    }
    return [
        {
            "route": name,
            "full layers": "all" if full == every else ", ".join(map(str, full)) or "none",
            "sparsity": 1 - len(full) / args.layers,
            "retrieval accuracy": evaluation.accuracy(model, full),
            "bits per byte": evaluation.bits_per_byte(model, full),
        }
        for name, full in chosen.items()
    ]


# Training


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """The model in bfloat16, as ``from_pretrained`` wants it."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.generation_config = GenerationConfig(do_sample=False, eos_token_id=END_OF_TEXT, pad_token_id=PAD)
    half.save_pretrained(folder)


def load(folder: Path, device: str) -> Qwen3ForCausalLM:
    """The saved model, weights as they were rounded, computing as in training."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="routed")
    return model.to(device).eval()


def losses(model: Qwen3ForCausalLM, batch: Batch, sink: int, window: int) -> tuple[torch.Tensor, ...]:
    """Mean loss of the code, mean loss of the answers, share of the answers' tokens that are right."""
    tokens, mixed, half = batch.tokens, batch.mixed, len(batch.tokens) // 2
    routing = Routing.of(batch.routes, tokens.shape[1], sink, window)
    logits = forward(model, tokens, routing)[:, :-1].float()
    nats = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    with torch.no_grad():
        streaming = replace(routing, routes=torch.ones_like(batch.routes[:mixed]))
        taught = forward(model, tokens[:mixed], streaming)[:, :-1].float().softmax(-1)
    distilled = F.cross_entropy(logits[:mixed].transpose(1, 2), taught.transpose(1, 2), reduction="none")
    is_answer = batch.is_answer[half:, 1:]
    # Multiplying with what is wanted, unlike picking it out, needs no word from the device how much it is.
    count = is_answer.sum()
    right = logits[half:].argmax(-1) == tokens[half:, 1:]
    code_loss = torch.cat([distilled, nats[mixed:half]]).mean()
    return code_loss, (nats[half:] * is_answer).sum() / count, (right & is_answer).sum() / count


def train(args: argparse.Namespace) -> dict:
    """Train until the time or the steps are over; the best model is in ``args.out``. Returns what the README tells."""
    start = time.monotonic()
    model = new_model(args).to(args.device)
    model.set_attn_implementation("routed")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=args.device != "cpu",
    )
    batches, evaluation = Batches(args), Evaluation(args, args.eval_count // 4)
    stages = curriculum(args.length)
    every = tuple(range(args.layers))
    step, seen, best, next_eval = 0, 0, math.inf, 0.1
    print(f"{model.num_parameters():,} parameters, {len(batches.code):,} bytes of code, {args.device}")

    progress = 0.0
    while progress < 1:
        batch = batches.draw(stages[0]).to(args.device)
        rate = args.rate * min(1, (step + 1) / args.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        code_loss, answer_loss, found = losses(model, batch, batches.rng.randint(*SINKS), batches.rng.randint(*WINDOWS))
        (code_loss + args.answer_weight * answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + batch.tokens.numel()
        progress = max(step / args.steps, (time.monotonic() - start) / (60 * args.minutes))

        if step % args.log_every == 0:
            found = found.item()
            print(
                f"{time.monotonic() - start:5.0f} s  step {step:5}  length {batch.tokens.shape[1]:4}  "
                f"code {code_loss.item() / math.log(2):.3f} bits per byte  "
                f"answers {answer_loss.item():.3f} nats, {found:.2f} right",
                flush=True,
            )
            if len(stages) > 1 and (found > 0.95 or progress > stages[0].until):
                del stages[0]
        if progress >= min(next_eval, 1):
            next_eval = progress + 0.1
            model.eval()
            accuracies = [evaluation.accuracy(model, full) for full in (every, RETRIEVAL_LAYERS, ())]
            bits = [evaluation.bits_per_byte(model, full) for full in (every, RETRIEVAL_LAYERS, ())]
            model.train()
            # A wrong answer in ten weighs as much as 0.2 bits per byte.
            score = (bits[0] + bits[2]) / 2 + 2 * (1 - min(accuracies[:2]))
            print(
                f"{time.monotonic() - start:5.0f} s  held out, dense / {RETRIEVAL_LAYERS} full / streaming: "
                f"accuracy {' / '.join(f'{x:.3f}' for x in accuracies)}, "
                f"bits per byte {' / '.join(f'{x:.4f}' for x in bits)}",
                flush=True,
            )
            if score < best:
                best = score
                save(model, args.out)
    return {"steps": step, "tokens": seen, "seconds": round(time.monotonic() - start)}


# What is told of it


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "| --- " + "| ---: " * (len(rows[0]) - 1) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(x if isinstance(x, str) else f"{x:.3f}" for x in row.values()) + " |")
    return "\n".join(lines)


def write_readme(args: argparse.Namespace, facts: dict, rows: list[dict]) -> None:
    """Beside the model's folder: how it was made, and how good it is."""
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    if args.device != "cpu":
        machine = f"one {torch.cuda.get_device_name()}"
    defaults = vars(command_line().parse_args([]))
    options = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(args).items()
        if value != defaults[name] and name not in ("out", "device")
    ]
    text = README.read_text().format(
        command=" ".join(["python tools/train_demo_backbone.py", *options]),
        machine=machine,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        code=sum(map(len, tasks.corpus("train").values())),
        end=END_OF_TEXT,
        pad=PAD,
        length=args.length,
        layers=" and ".join(map(str, RETRIEVAL_LAYERS)),
        mostly=1 - args.code_full,
        sinks=SINKS,
        windows=WINDOWS,
        count=args.eval_count,
        prompt=prompt_length(args),
        rest=args.length - prompt_length(args),
        distance=2 * args.window,
        sink=args.sink,
        window=args.window,
        table=table(rows),
        **facts,
    )
    (args.out.parent / "README.md").write_text(text)


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ASSETS / "demo_backbone", help="folder of the model; the README goes beside it")
    add("--table", action="store_true", help="only print the table of figures of the model that is there")
    add("--minutes", type=float, default=3.5, help="training ends after so long")
    add("--steps", type=int, default=1_000_000, help="or after so many steps")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--layers", type=int, default=8)
    add("--hidden", type=int, default=192)
    add("--length", type=int, default=1152, help="tokens of the longest sequences: nine parts, eight of prompt")
    add("--tokens", type=int, default=65536, help="tokens per step")
    add("--rate", type=float, default=2e-3, help="highest learning rate")
    add("--warmup", type=int, default=100, help="steps until that is reached")
    add("--weight-decay", type=float, default=0.3, help="of the matrices; the text is read many times")
    add("--answer-weight", type=float, default=1.0, help="weight of the answers' loss beside the code's")
    add("--code-full", type=float, default=0.25, help="share of code sequences with full layers")
    add("--sink", type=int, default=16, help="of the figures")
    add("--window", type=int, default=192, help="of the figures")
    add("--eval-count", type=int, default=256, help="examples of each task in the final table")
    add("--log-every", type=int, default=50, help="steps")
    return parser


def main() -> None:
    args = command_line().parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    AttentionInterface.register("routed", routed_attention)
    if not args.table:
        args.out.mkdir(parents=True, exist_ok=True)
        byte_tokenizer(args.length).save_pretrained(args.out)
    transformers.utils.logging.disable_progress_bar()
    facts = {} if args.table else train(args)
    model = load(args.out, args.device)
    rows = evaluate(model, args)
    print(table(rows))
    if not args.table:
        write_readme(args, {**facts, "parameters": model.num_parameters()}, rows)


if __name__ == "__main__":
    main()
