"""Tiny random decoders of the families whose attention goes through transformers' interface, and what their graphs must have."""

from dataclasses import dataclass, field

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, CONTEXT, WINDOW = 96, 64, 6
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """``windows`` of the two layers; ``rotated`` layers rotate inside attention unless ``place`` says otherwise."""

    config: dict = field(default_factory=dict)
    model_type: str | None = None
    place: str = "attention"
    interleaved: bool = False
    rotated: int = 2
    windows: tuple[int | None, int | None] = (None, None)
    packed: int = 2
    skip_norms: int = 4
    not_fused: tuple[str, ...] = ()  # beginnings of the record's lines


HEAD_16, HEAD_32 = {"head_dim": 16}, {"head_dim": 32}
WIDE = {"hidden_size": 128, "initializer_range": 0.07}
HALF = {"partial_rotary_factor": 0.5}
SLIDING = {"sliding_window": WINDOW}
ALTERNATING = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
FIRST, BOTH = (WINDOW, None), (WINDOW, WINDOW)
CAPPED = {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}

FAMILIES = {
    "llama": Family(),
    "llama, tied, head of 8": Family(
        {"head_dim": 8, "tie_word_embeddings": True}, "llama", "operator", not_fused=("rotation outside attention: head size 8",)
    ),
    "llama, head of 40": Family({"head_dim": 40}, "llama", "operator", not_fused=("rotation outside attention: head size 40",)),
    "llama, head of 12": Family(
        {"head_dim": 12}, "llama", "operator", not_fused=("heads of 12 padded to 16", "rotation outside attention: head size 12")
    ),
    "mistral": Family(SLIDING, windows=BOTH),
    "qwen2, windows from layer 1": Family({**SLIDING, "use_sliding_window": True, "max_window_layers": 1}, "qwen2", windows=(None, WINDOW)),
    "qwen3": Family(HEAD_16),
    "gemma": Family(HEAD_16),
    "gemma2": Family({**HEAD_16, **CAPPED, **ALTERNATING}, windows=FIRST),
    "gemma3_text": Family({**HEAD_16, "query_pre_attn_scalar": 20, **ALTERNATING}, windows=FIRST),
    "vaultgemma": Family({**HEAD_16, **CAPPED, **ALTERNATING}, windows=FIRST),
    "phi": Family({**WIDE, **HALF}, skip_norms=2),
    "phi, rotated part of 8": Family(HALF, "phi", "operator", skip_norms=2, not_fused=("rotation outside attention: 8 rotated",)),
    "phi3": Family(SLIDING, windows=BOTH),
    "stablelm": Family({**WIDE, **HALF}),
    "cohere": Family({"use_qk_norm": False, "logit_scale": 0.3}, interleaved=True, skip_norms=2),
    "cohere, q and k normalised": Family({"use_qk_norm": True}, "cohere", interleaved=True, skip_norms=2),
    "cohere2": Family(ALTERNATING, interleaved=True, rotated=1, windows=FIRST, skip_norms=2),
    "glm": Family({**HEAD_32, **HALF}, interleaved=True),
    "glm4": Family({**HEAD_32, **HALF}, interleaved=True),
    "granite": Family(GRANITE),
    "granite_swa": Family({**GRANITE, **ALTERNATING}, windows=FIRST),
    "olmo": Family(),
    "olmo2": Family(skip_norms=1),
    "olmo3": Family(ALTERNATING, windows=FIRST, skip_norms=1),
    "starcoder2": Family(SLIDING, windows=BOTH),
    "smollm3": Family({"no_rope_layers": [1, 0]}, rotated=1),
    "exaone4": Family(ALTERNATING, rotated=1, windows=FIRST, skip_norms=1),
    "gpt2": Family(place="none", rotated=0, skip_norms=5),
    "gpt_neox": Family({**WIDE, "rotary_pct": 0.5}, skip_norms=2),
    "gpt_bigcode": Family(place="none", rotated=0, skip_norms=5),
    "opt": Family({"ffn_dim": 48, "word_embed_proj_dim": 64}, place="none", rotated=0, skip_norms=5),
    "biogpt": Family(place="none", rotated=0, skip_norms=5),
    "hunyuan_v1_dense": Family(HEAD_16, place="operator", not_fused=("rotation outside attention: the model changes q or k",)),
    "ernie4_5": Family(HEAD_16, interleaved=True),
    "helium": Family(HEAD_16, interleaved=True),
    "nemotron": Family({**WIDE, **HEAD_32, **HALF}),
    "persimmon": Family({**WIDE, **HALF}, packed=0, not_fused=("q, k and v not packed in 2 of 2 layers",)),
    "seed_oss": Family(HEAD_16),
    "apertus": Family(),
    "arcee": Family(),
    "ministral": Family({**HEAD_16, **SLIDING}, windows=BOTH),
    "ministral3": Family(HEAD_16),
    "bitnet": Family(),
    "cwm": Family({**HEAD_16, **ALTERNATING}, windows=FIRST),
    "nanochat": Family(),
    "jais2": Family(),
    "hyperclovax": Family(),
}


def tiny_decoder(model_type: str, config: dict) -> PreTrainedModel:
    """A random fp32 decoder whose norms and biases are no ones and zeros, which would hide one that is lost."""
    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, **{**COMMON, **config})
    attention = "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]._supports_sdpa else "eager"
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention).eval().requires_grad_(False)
    draws = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += torch.randn(parameter.shape, generator=draws) * 0.3
    return model
