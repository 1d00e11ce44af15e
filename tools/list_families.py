"""Tries every causal language model of the installed transformers and writes which of them can be patched.

    python tools/list_families.py                        # all of them, some minutes; writes docs/families.md
    python tools/list_families.py llama glm bloom        # some: renews their rows

Each is made tiny with random weights. One that can be patched must give the unpatched model's logits and tokens with
every route full, padded and not, and the same text from its trimmed cache as without one; one that cannot must be
refused by a ValueError at ``patch``. Anything else is a fault of this package, printed as such, and the exit status 1.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import flux_ext
from flux_ext.transformers_seam import CACHE, cache_of

HEAD = """# Families

Every causal language model of transformers {version}, made tiny with random weights and tried by
`python tools/list_families.py`, which wrote this page. Of {count} (some with other settings once more), {works} work:
with every route full, padded or not, they give the logits and the tokens of the unpatched model, and with half of the
layers sparse the same from the trimmed cache as without one. The others are refused at `flux_ext.patch` by a ValueError
with the reason given here. A model counts as it is, not by its name: `patch` tries each (`flux_ext/models/proof.py`).

| family | class | patched | why not |
| --- | --- | --- | --- |
"""
ROW = re.compile(r"^\| ([^|]+) \| (`.*)$", re.MULTILINE)
NOT_ALONE = " (this tiny one does not run by itself: "
TABLE = Path(__file__).parent.parent / "docs" / "families.md"
LARGEST = 100_000_000
"""Parameters of the largest model that is tried: more means that :data:`SMALL` lacks a name."""
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "emb_dim", "dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "bos_token_id"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length"), 512),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "mamba_n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "mamba_d_state", "rotary_dim", "laurel_rank"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "encoder_hash_byte_group_vocab"), 128),
    **dict.fromkeys(("index_head_dim", "v_head_dim", "linear_head_dim", "swa_head_dim", "hc_lowrank"), 16),
    **dict.fromkeys(("mamba_chunk_size", "index_topk"), 32),
    **dict.fromkeys(("hidden_size_global", "adapter_in_dim", "adapter_out_dim", "adapter_input_size"), 64),
    "downsample_hidden_size": 32,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "pad_token_id": 0,
    "eos_token_id": 127,
}
MIXED = ["sliding_attention", "full_attention"] * 2
RECURRENT = ["linear_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8},
    "cohere_compass_text": {
        "layer_types": MIXED,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in MIXED},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": MIXED},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": RECURRENT, "mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_loop_text": {"unpadded_vocab_size": 128},
    "inkling2_text": {"unpadded_vocab_size": 128},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": RECURRENT},
    "bailing_hybrid": {"layer_types": RECURRENT, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma4_assistant": {
        "backbone_hidden_size": 64,
        "text_config": {
            **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_kv_shared_layers": 4},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128},
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "layer_types": MIXED},
        },
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2},
    "qwen4_exp_text": {
        **{"ngram_vocab_size_base": 64, "split_ngram_parts": 2, "ple_layer_ids": [], "ple_embed_dim": 16},
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16},
        **{"indexer_compress_ratio": 4},
    },
    "xlstm": {"num_heads": 4, "hidden_size": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4},
    "zamba": {"num_key_value_heads": 4, "num_hidden_layers": 9},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16, "layer_types": MIXED},
    "mistral": {"sliding_window": None},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": ...},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single families need beside that, or instead; ``...``: the configuration's own."""
OWN["qwen4_exp"] = OWN["qwen4_exp_text"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2, no soft-capping": ("gemma2", {"attn_logit_softcapping": None}),
    "mistral, sliding window": ("mistral", {"sliding_window": 8}),
    "phi3, partial rotary": ("phi3", {"partial_rotary_factor": 0.75}),
    "qwen2, sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": MIXED}),
    "vaultgemma, no soft-capping": ("vaultgemma", {"attn_logit_softcapping": None}),
}
"""Families tried again with other settings."""


def tiny_config(cls: Any, own: dict[str, Any]) -> Any:
    """A configuration of this class with :data:`SMALL` sizes, also of its parts."""
    try:
        default = cls()
    except Exception:  # the parts' own sizes do not go together
        return cls(**own)
    taken = inspect.signature(cls.__init__).parameters
    fields = {name: value for name, value in SMALL.items() if name in taken and _has(default, name)}
    if "qk_rope_head_dim" in fields:
        fields.pop("head_dim", None)  # it is that of the rotated part
        fields |= {"num_key_value_heads": SMALL["num_attention_heads"]} if "num_key_value_heads" in fields else {}
    for name in getattr(cls, "sub_configs", {}):
        if (part := getattr(default, name, None)) is not None:
            fields[name] = tiny_config(type(part), {}).to_dict()
    if "layer_types" in taken and (kinds := list(dict.fromkeys(getattr(default, "layer_types", None) or ()))):
        fields["layer_types"] = (kinds * 4)[:4]
    fields |= own
    return cls(**{name: value for name, value in fields.items() if value is not ...})


def _has(config: Any, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except Exception:  # a property that does not hold for this configuration
        return False


def tiny_model(family: str) -> Any:
    """A random model whose weights are large enough that attention matters."""
    family, own = VARIANTS.get(family, (family, OWN.get(family, {})))
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    config_class = model_class.config_class or CONFIG_MAPPING[family]
    config = tiny_config(config_class, own)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise RuntimeError(f"{size} parameters: a size is missing in SMALL")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(3)
    return model


def ragged() -> tuple[Tensor, Tensor]:
    """Ids and mask ``[2, 40]``, the second sequence left-padded."""
    ids, mask = torch.arange(80).view(2, 40) * 37 % 120 + 3, torch.ones(2, 40, dtype=torch.long)
    mask[1, :11] = 0
    return ids * mask, mask


@torch.no_grad()
def attempt(family: str) -> tuple[str, str]:
    """Verdict ("works", "refused", "not tried", "fault" or "not made") and reason."""
    try:
        model = tiny_model(family)
    except ImportError as error:
        return "not tried", str(error).partition(".")[0]
    except Exception as error:
        return "not made", f"{type(error).__name__}: {error}"
    ids, mask = ragged()
    broken = ""
    try:
        alone = model(ids[:1]).logits
        together = model(ids, attention_mask=mask).logits
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        rounding = max(1e-3, 2 * off(stepwise(model, ids[:1]), alone))
    except Exception as error:
        broken = f"{NOT_ALONE}{type(error).__name__}: {error})"
    for granularity in ("layer", "head"):
        try:
            flux_ext.patch(model, flux_ext.FluxConfig(sink=4, window=16, pool_size=8, granularity=granularity))
        except ValueError as error:
            return "refused", str(error) + broken
        except Exception as error:
            return "fault", f"at patch, {type(error).__name__}: {error}"
        if broken:
            return "fault", "patched" + broken
        try:
            with flux_ext.routes(model, "full"):
                check("alone", model(ids[:1]).logits, alone)
                check("padded", model(ids, attention_mask=mask).logits[mask.bool()], together[mask.bool()])
                got = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
                if not torch.equal(got, tokens):
                    return "fault", "other tokens with every route full"
            layers = len(flux_ext.get_routers(model).layers)
            with flux_ext.routes(model, torch.arange(layers) % 2):
                whole = model(ids[:1], use_cache=False).logits
                check("from the trimmed cache", stepwise(model, ids[:1]), whole, rounding)
            flux_ext.unpatch(model)
            check("unpatched", model(ids[:1]).logits, alone)
        except Exception as error:
            return "fault", f"{type(error).__name__}: {error}"
    return "works", ""


def stepwise(model: Any, ids: Tensor) -> Tensor:
    """Logits of a prompt and of ten tokens after it, one by one from the cache."""
    out = model(ids[:, :-10], use_cache=True)
    cache, logits = cache_of(out), [out.logits]
    for t in range(ids.shape[1] - 10, ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], **{CACHE: cache}).logits)
    return torch.cat(logits, 1)


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def check(what: str, got: Tensor, want: Tensor, bound: float = 1e-3) -> None:
    if not off(got, want) <= bound:
        raise AssertionError(f"{what}: logits differ by {off(got, want):.1g} of the largest")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; default: all")
    asked = parser.parse_args().families
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    results: dict[str, tuple[str, str]] = {}
    for family in asked or sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]):
        begin = time.time()
        results[family] = attempt(family)
        verdict, reason = results[family]
        print(f"{family}: {verdict} ({time.time() - begin:.1f} s) {' '.join(reason.split())}", flush=True)
    rows = dict(ROW.findall(TABLE.read_text(encoding="utf-8"))) if asked and TABLE.exists() else {}
    TABLE.write_text(table(rows | {family: row(family, *result) for family, result in results.items()}), "utf-8")
    return int(any(verdict in ("fault", "not made") for verdict, _ in results.values()))


def row(family: str, verdict: str, reason: str) -> str:
    """What the table says of a family, after its name."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[VARIANTS.get(family, (family,))[0]]
    return f"`{name}` | {verdict} | {' '.join(reason.partition(NOT_ALONE)[0].split()).replace('|', '/')} |"


def table(rows: dict[str, str]) -> str:
    """The page of documentation."""
    works = sum("` | works |" in row for row in rows.values())
    head = HEAD.format(version=transformers.__version__, count=len(rows), works=works)
    return head + "".join(f"| {family} | {row}\n" for family, row in sorted(rows.items()))


if __name__ == "__main__":
    sys.exit(main())
