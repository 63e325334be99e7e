"""What a Hugging Face folder must satisfy before any stage touches it. Every refusal is one line ending in what to do next.

transformers fills tensors that a checkpoint lacks with random numbers and drops those that it doesn't know, with no more than a
warning; both give a working model with the wrong function, so both are refused here. Format: huggingface/safetensors README.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from models.errors import UserError
from models.families import ONNX_FAMILIES, SUPPORTED_FAMILIES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry and that hold no weights: causal masks, rotary frequencies.
BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, cut to a length that fits a terminal."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError when it is unreadable or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read ({one_line(error)}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} holds no JSON object; download the checkpoint again")
    return value


def checked_config(folder: Path) -> PreTrainedConfig:
    """The folder's config, of a supported family, with heads that divide and attention over the whole context."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face folder or a hub id such as org/name")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it; give a folder in Hugging Face format")
    raw = read_json(folder / "config.json")
    family = raw.get("model_type")
    if family not in SUPPORTED_FAMILIES:
        named = f"architecture {family!r} is not supported" if family else "config.json names no model_type"
        if family in ONNX_FAMILIES:
            named = f"architecture {family!r} is known to the ONNX export alone, not yet to pruning, smoothing and TFLite"
        raise UserError(f"{named}; use a checkpoint of one of: {', '.join(SUPPORTED_FAMILIES)}")
    if raw.get("quantization_config"):
        raise UserError("the checkpoint is quantised already; use the original one in float32, float16 or bfloat16")
    _check_heads(raw, family)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the configs' own validators raise many types, none of them a bug of ours
        raise UserError(f"config.json is not a valid {family} config ({one_line(error)}); correct it") from error
    sliding = {kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"}
    if sliding:
        kinds = ", ".join(sorted(sliding))
        unsayable = f"the model's layers use {kinds}, which the TFLite export cannot say"
        raise UserError(f"{unsayable}; use a checkpoint with use_sliding_window false")
    return config


def _check_heads(raw: dict, family: str) -> None:
    """Heads must divide the hidden size (unless head_dim is stated) and be a multiple of the KV heads."""
    names = ("n_embd", "n_head") if family == "gpt2" else ("hidden_size", "num_attention_heads")
    hidden_size, heads = (raw.get(name) for name in names)
    kv_heads = raw.get("num_key_value_heads") or heads
    counts = [count for count in (hidden_size, heads, kv_heads) if count is not None]
    if any(not isinstance(count, int) or count < 1 for count in counts):
        raise UserError(f"config.json: {', '.join(names)} and num_key_value_heads must be positive whole numbers; correct it")
    if hidden_size and heads and hidden_size % heads and not raw.get("head_dim"):
        undivided = f"config.json: hidden size {hidden_size} does not divide into {heads} heads"
        raise UserError(f"{undivided}; correct {names[0]} or {names[1]}")
    if heads and heads % kv_heads:
        raise UserError(f"config.json: {heads} heads do not divide into {kv_heads} KV heads; correct num_key_value_heads")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, in the order of their names."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{INDEX} has no weight_map; download the checkpoint again")
        names = sorted({str(name) for name in weight_map.values()})
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    elif any(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise UserError(f"{folder}: only pickled weights, which are never opened; convert them to safetensors first")
    else:
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX}; give a folder with safetensors weights")
    for name in names:
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{INDEX} names {name!r}, which is no safetensors file of this folder; correct the index")
        if not (folder / name).is_file():
            raise UserError(f"{INDEX} names {name}, which is missing; download the checkpoint again")
    return [folder / name for name in names]


def stored_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor by name. Reads all values: UserError names a broken file or a NaN or infinite tensor."""
    shapes = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    stored = file.get_slice(name)
                    shapes[name] = tuple(stored.get_shape())
                    if not BUFFERS.search(name):
                        _check_values(name, stored.get_dtype(), file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path.name} is truncated or corrupt ({one_line(error)}); download it again") from error
    return shapes


def _check_values(name: str, stored_type: str, tensor: torch.Tensor) -> None:
    if stored_type not in FLOAT_TYPES:
        raise UserError(f"tensor {name} is stored as {stored_type}; use a checkpoint in float32, float16 or bfloat16")
    if not torch.isfinite(tensor).all():
        raise UserError(f"tensor {name} holds NaN or infinite values; use a checkpoint whose training did not diverge")


def check_tensors(config: PreTrainedConfig, stored: dict[str, tuple[int, ...]]) -> None:
    """Every parameter of the architecture must be stored in its shape, and nothing else may be stored."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    prefix = model.base_model_prefix + "."  # older checkpoints leave it out
    names = {name if name in expected else prefix + name: name for name in stored if not BUFFERS.search(name)}
    rows = model.get_input_embeddings().weight
    head, embedding = "lm_head.weight", next(name for name, value in model.named_parameters() if value is rows)
    if config.tie_word_embeddings and len({head, embedding} & names.keys()) == 1:
        names[head] = names[embedding] = names.get(embedding, names.get(head))
    missing = sorted(expected.keys() - names.keys())
    if missing:
        lacking = f"the weights lack {_some(missing)}, which config.json asks for"
        raise UserError(f"{lacking}; download the checkpoint again or correct config.json")
    surplus = sorted(names[name] for name in names.keys() - expected.keys())
    if surplus:
        raise UserError(f"the weights hold {_some(surplus)}, which config.json has no place for; correct config.json")
    for name, shape in expected.items():
        if stored[names[name]] != shape:
            found = list(stored[names[name]])
            raise UserError(f"tensor {names[name]} has shape {found}, config.json asks for {list(shape)}; correct config.json")


def _some(names: list[str]) -> str:
    return f"{names[0]}" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
