"""``genai_config.json``: what onnxruntime-genai reads beside a decoder. Schema: microsoft/onnxruntime-genai, src/config.h."""

from transformers import PreTrainedModel

from models.checkpoint import ModelShape

# "decoder" is the plain layout that we write, whatever the family; GPT-2's own type there means another one.
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
OTHER_TYPE = "decoder"


def genai_config(model: PreTrainedModel, shape: ModelShape, file_name: str) -> dict:
    """The configuration for ``file_name``, an export in the tensor contract of ``exporters.onnx_export``."""
    pad = model.config.pad_token_id
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": file_name,
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
    }
    tokens = {
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": pad if pad is not None else shape.eos_token_id,
    }
    return {
        "model": {
            "type": MODEL_TYPES.get(shape.family, OTHER_TYPE),
            "vocab_size": shape.vocab_size,
            "context_length": shape.context_tokens,
            **{name: value for name, value in tokens.items() if value is not None},
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": shape.context_tokens, "past_present_share_buffer": True},
    }
