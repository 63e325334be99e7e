"""Checkpoints in and out: the stage that takes a Hugging Face folder or hub id in, and how every stage loads and saves a model.

Only safetensors is read and no code from a checkpoint is run.
"""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import metadata_load
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from models.checkpoint_check import INDEX, check_tensors, checked_config, one_line, stored_shapes, weight_files
from models.errors import UserError
from models.families import SUPPORTED_FAMILIES, layer_parts
from models.hub_download import download
from models.provenance import library_versions, settings_record, sha256_of, write_json
from models.settings import CheckpointSettings

__all__ = ["SUPPORTED_FAMILIES", "ModelShape", "load_model", "load_tokenizer", "run", "save_model", "shape_of"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")
FFN_SIZE_NAMES = ("intermediate_size", "ffn_dim", "n_inner")  # what configs call it
SPARE_BYTES = 64 * 2**20  # left free on the disk after the copy
# Mixed text on which a tokenizer class that rebuilds its own pipeline differs from tokenizer.json.
TOKENIZER_PROBE = "def f(x):\n    return x  # Ünïcödé, 数字 42, don't\t  \U0001f600\n\n"


@dataclass(frozen=True)
class ModelShape:
    """The sizes that exports and reports need; ``kv_heads`` and ``head_dim`` are read from a real cache, not the config."""

    family: str
    vocab_size: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    context_tokens: int
    tied: bool
    bos_token_id: int | None
    eos_token_id: int | None
    parameters: int  # a tied head counts once


def load_model(folder: Path) -> PreTrainedModel:
    """The model in fp32, evaluation mode, without gradients. UserError where transformers would fill weights in by itself."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=_attention_of(folder),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    invented = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if invented:
        raise UserError(f"{folder.name}: weights lack {invented[0]}, which the config asks for; make the checkpoint again")
    return model.eval().requires_grad_(False)


def _attention_of(folder: Path) -> str:
    """PyTorch's fused attention, but for families that it cannot express (soft caps, sinks): those compute it step by step."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer exactly as ``tokenizer.json`` describes it.

    The class named in ``tokenizer_config.json`` is left aside: some classes of transformers 5 rebuild pre-tokenizer and
    decoder from their own defaults and so give other ids than the file.
    """
    return TokenizersBackend.from_pretrained(folder, local_files_only=True)


def save_model(model: PreTrainedModel, folder: Path, tokenizer_from: Path) -> None:
    """Write a Hugging Face folder that plain ``AutoModelForCausalLM.from_pretrained`` loads; same weights give same bytes."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    copy_tokenizer(tokenizer_from, folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what tokenizer files there are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Measure the sizes of a loaded model; feeds two tokens to see the cache."""
    config = model.config
    with torch.no_grad():
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        cache = model(tokens, use_cache=True).past_key_values.layers
    sizes = {tuple(layer.keys.shape) for layer in cache}  # each [1, kv_heads, 2, head_dim]
    if len(sizes) != 1:
        raise UserError(f"{config.model_type}: the layers' KV caches differ in size, which no export can say; use another model")
    keys = cache[0].keys
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return ModelShape(
        family=config.model_type,
        vocab_size=model.get_input_embeddings().num_embeddings,
        layers=len(cache),
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=keys.shape[1],
        head_dim=keys.shape[3],
        ffn_size=_ffn_size(model),
        context_tokens=config.max_position_embeddings,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        bos_token_id=config.bos_token_id,
        eos_token_id=eos,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _ffn_size(model: PreTrainedModel) -> int:
    """Inner width of the FFN: from the matrices where their places are known, else what the config says."""
    if model.config.model_type in SUPPORTED_FAMILIES:
        return layer_parts(model)[0].down.weight.shape[1]
    return next(getattr(model.config, name) for name in FFN_SIZE_NAMES if getattr(model.config, name, None))


def run(settings: CheckpointSettings, out: Path) -> None:
    """Check the checkpoint that ``settings.source`` names and copy it, byte for byte, into ``out``."""
    folder, commit = locate(settings)
    config = checked_config(folder)
    files = weight_files(folder)
    check_tensors(config, stored_shapes(files))
    if config.tie_word_embeddings:
        _check_tied(files)
    check_room(files, out)
    _check_tokenizer(folder, config.vocab_size)
    index = [folder / INDEX] if (folder / INDEX).is_file() else []
    extras = [path for pattern in LICENCE_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    for path in (folder / "config.json", *files, *index, *extras):
        shutil.copyfile(path, out / path.name)
    _write_tokenizer(folder, out)
    model = load_model(out)
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")
    else:
        model.generation_config.save_pretrained(out)
    named = settings.source if commit or not Path(settings.source).is_absolute() else Path(settings.source).name
    record = {
        "source": named if ".." not in Path(named).parts else Path(named).name,
        "commit": commit,
        "licence": licence_of(folder),
        "shape": asdict(shape_of(model)),
        "weights": [{"file": path.name, "sha256": sha256_of(out / path.name), "bytes": path.stat().st_size} for path in files],
        "settings": {"revision": settings_record(settings)["revision"]},
        "versions": library_versions("torch", "transformers", "safetensors", "tokenizers"),
    }
    write_json(out / "checkpoint.json", record)


def locate(settings: CheckpointSettings) -> tuple[Path, str | None]:
    """The folder that holds the checkpoint and, when it came from the hub, the commit."""
    source = Path(settings.source).expanduser()
    if source.is_dir():
        return source, None
    if source.exists():
        raise UserError(f"{settings.source}: a file, not a folder; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", settings.source) or settings.source.startswith("."):
        raise UserError(f"{settings.source}: no such folder; give a Hugging Face folder or a hub id such as org/name")
    return download(settings.source, settings.revision)


def check_room(files: list[Path], out: Path) -> None:
    """UserError unless the disk under ``out`` has room for a copy of ``files``."""
    needed = sum(path.stat().st_size for path in files) + SPARE_BYTES
    free = shutil.disk_usage(out).free
    if free < needed:
        megabytes = f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise UserError(f"no room on the disk: the checkpoint needs {megabytes}; make room")


def licence_of(folder: Path) -> str | None:
    """The licence that the model card's front matter states, or None without one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        licence = (metadata_load(card) or {}).get("license")
    except ValueError:  # front matter that is no YAML mapping states nothing
        return None
    return str(licence) if licence else None


def _check_tied(files: list[Path]) -> None:
    """A tied config with two different matrices stored: transformers would silently not tie them."""
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if name.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight")):
                    found[name] = file.get_tensor(name)
    first, *others = found.values()
    if any(not torch.equal(first, other) for other in others):
        raise UserError("config.json ties head and embedding but their weights differ; set tie_word_embeddings to false in it")


def _tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"{folder}: no tokenizer in it; put tokenizer.json beside config.json")
    try:
        if (folder / "tokenizer.json").is_file():
            Tokenizer.from_file(str(folder / "tokenizer.json"))
            return load_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise UserError(f"the tokenizer cannot be read ({one_line(error)}); download the checkpoint again") from error


def _check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Every id must have an embedding row, and the loaded tokenizer must give the ids of ``tokenizer.json``."""
    tokenizer = _tokenizer_in(folder)
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise UserError("the tokenizer has an empty vocabulary; download the checkpoint again")
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    if highest >= vocab_size:
        gives = f"the tokenizer gives id {highest} ({token!r}) but the model has {vocab_size} rows"
        raise UserError(f"{gives}; use the model's own tokenizer")
    if (folder / "tokenizer.json").is_file():
        stored = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TOKENIZER_PROBE, add_special_tokens=False).ids
        if tokenizer(TOKENIZER_PROBE, add_special_tokens=False).input_ids != stored:
            raise UserError("tokenizer.json and tokenizer_config.json disagree about ids; correct tokenizer_config.json")


def _write_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer; one without tokenizer.json (vocab.json and merges.txt) is converted."""
    copy_tokenizer(folder, out)
    if not (out / "tokenizer.json").is_file():
        _tokenizer_in(folder).save_pretrained(out)
    elif not (out / "tokenizer_config.json").is_file():
        load_tokenizer(folder).save_pretrained(out)
