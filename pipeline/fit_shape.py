"""The sizes of a decoder from its config.json alone, and what its parameters are: arithmetic for any size, no weights needed.

The counts are those of the modules that transformers builds for the four families.
"""

import json
import math
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from models.errors import UserError
from pipeline.settings import PruneSettings

PRESETS = Path(__file__).parent / "presets" / "models.toml"
DEMO = "demo"
DEMO_CONFIG = Path(__file__).resolve().parent.parent / "models" / "demo" / "config.json"
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
WIDTH_MULTIPLE = 8  # pruned widths go in eights, as the prune stage makes them


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, columns], outputs by inputs, of which a model has ``count``."""

    part: str  # attention, ffn or head
    rows: int
    columns: int
    bias: bool
    count: int


@dataclass(frozen=True)
class DecoderShape:
    """What a config says. ``attention_bias``: on q, k, v and the output; qwen2 has it on q, k and v alone, whatever this says."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    context_tokens: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def rotary(self) -> bool:
        return self.family != "gpt2"

    @property
    def gated(self) -> bool:
        return self.family != "gpt2"


@dataclass(frozen=True)
class Parameters:
    """Counts. Biases count with their part; ``head`` is 0 where it is the embedding."""

    embedding: int
    positions: int
    attention: int
    ffn: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.positions + self.attention + self.ffn + self.norms + self.head


def matrices(shape: DecoderShape) -> list[Matrix]:
    """Every linear map with its bias; q, k and v as three. A tied head is among them: its matrix is the embedding."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, ffn, layers = shape.hidden_size, shape.ffn_size, shape.layers
    qkv_bias = shape.attention_bias or shape.family == "qwen2"
    output_bias = shape.attention_bias and shape.family != "qwen2"
    return [
        Matrix("attention", queries, hidden, qkv_bias, layers),
        Matrix("attention", keys, hidden, qkv_bias, 2 * layers),
        Matrix("attention", hidden, queries, output_bias, layers),
        Matrix("ffn", ffn, hidden, shape.mlp_bias, (2 if shape.gated else 1) * layers),
        Matrix("ffn", hidden, ffn, shape.mlp_bias, layers),
        Matrix("head", shape.vocab_size, hidden, False, 1),
    ]


def parameters(shape: DecoderShape) -> Parameters:
    """Parameters by part."""
    counts = {"attention": 0, "ffn": 0, "head": 0}
    for matrix in matrices(shape):
        counts[matrix.part] += matrix.count * (matrix.rows * matrix.columns + matrix.rows * matrix.bias)
    norm = shape.hidden_size if shape.rotary else 2 * shape.hidden_size  # RMSNorm has no bias
    head_norms = 2 * shape.head_dim if shape.family == "qwen3" else 0  # of q and of k
    return Parameters(
        embedding=shape.vocab_size * shape.hidden_size,
        positions=0 if shape.rotary else shape.context_tokens * shape.hidden_size,
        attention=counts["attention"],
        ffn=counts["ffn"],
        norms=shape.layers * (2 * norm + head_norms) + norm,
        head=0 if shape.tied else counts["head"],
    )


@cache
def presets() -> dict[str, dict]:
    """Configs by name; the demo's is read from the model itself."""
    demo = json.loads(DEMO_CONFIG.read_text(encoding="utf-8"))
    return {DEMO: demo, **tomllib.loads(PRESETS.read_text(encoding="utf-8"))}


def config_of(name: str) -> dict:
    """A config by the name of a preset, of a config.json or of the folder that it is in. UserError where there is none."""
    if name.lower() in presets():
        return presets()[name.lower()]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{name}: neither a file nor a preset; give a config.json or one of: {', '.join(presets())}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); give a model's config.json") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no JSON object; give a model's config.json")
    return config


def shape_of_config(config: dict, where: str) -> DecoderShape:
    """The sizes that ``config`` states; UserError names what it lacks. Optional keys have the defaults of transformers."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type is {family!r}; the arithmetic knows {', '.join(FAMILIES)}")
    read = _Reader(config, where)
    shape = _gpt2_shape(read) if family == "gpt2" else _gated_shape(read, family)
    if shape.heads % shape.kv_heads:
        raise UserError(f"{where}: {shape.heads} heads are no multiple of {shape.kv_heads} KV heads; correct num_key_value_heads")
    return shape


@dataclass(frozen=True)
class _Reader:
    config: dict
    where: str

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; without ``default`` the key must be there."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise UserError(f"{self.where}: {key} is missing, and sizes are not guessed; add it")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.where}: {key} is {value!r}; it must be a whole number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} is {value!r}; it must be true or false")
        return value

    def head_dim(self, hidden: int, heads: int) -> int:
        if "head_dim" not in self.config and hidden % heads:
            raise UserError(f"{self.where}: {heads} heads do not divide the hidden size {hidden}, and head_dim is missing; add it")
        return self.size("head_dim", hidden // heads)


def _gpt2_shape(read: _Reader) -> DecoderShape:
    hidden, heads = read.size("n_embd"), read.size("n_head")
    if hidden % heads:
        raise UserError(f"{read.where}: n_head {heads} does not divide n_embd {hidden}; correct one of them")
    return DecoderShape(
        family="gpt2",
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden,
        layers=read.size("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=read.size("n_inner", 4 * hidden),
        context_tokens=read.size("n_positions"),
        tied=read.flag("tie_word_embeddings", True),
        attention_bias=True,
        mlp_bias=True,
    )


def _gated_shape(read: _Reader, family: str) -> DecoderShape:
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    return DecoderShape(
        family=family,
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden,
        layers=read.size("num_hidden_layers"),
        heads=heads,
        # Llama without the key has a KV head for every head; the defaults of the Qwens fit one size of them only.
        kv_heads=read.size("num_key_value_heads", heads if family == "llama" else None),
        head_dim=read.size("head_dim") if family == "qwen3" else read.head_dim(hidden, heads),
        ffn_size=read.size("intermediate_size"),
        context_tokens=read.size("max_position_embeddings"),
        tied=read.flag("tie_word_embeddings", False),
        attention_bias=family != "qwen2" and read.flag("attention_bias", False),
        mlp_bias=family == "llama" and read.flag("mlp_bias", False),
    )


def pruned(shape: DecoderShape, settings: PruneSettings) -> DecoderShape:
    """What structured pruning by ``settings`` leaves, rounded as the prune stage does. UserError where it would refuse too."""
    if settings.target:
        raise UserError("prune.target is split by measured sensitivity, not by arithmetic; give ffn, layers, kv_groups or hidden")
    if settings.layers >= shape.layers:
        raise UserError(f"prune.layers {settings.layers} leaves none of {shape.layers} layers; set it below {shape.layers}")
    if not shape.rotary and (settings.kv_groups or settings.hidden):
        raise UserError("a GPT-2 config cannot say heads or a hidden size apart; leave prune.kv_groups and prune.hidden out")
    kv_heads = shape.kv_heads - round(settings.kv_groups * shape.kv_heads)
    heads = shape.heads // shape.kv_heads * kv_heads
    # Llama's config insists that heads divide the hidden size, although the model does not need it.
    divisor = heads if shape.family == "llama" else 1
    if settings.kv_groups and (not 0 < kv_heads < shape.kv_heads or (not settings.hidden and shape.hidden_size % divisor)):
        raise UserError(f"prune.kv_groups {settings.kv_groups} would leave {kv_heads} of {shape.kv_heads} KV heads; give another share")
    return replace(
        shape,
        layers=shape.layers - settings.layers,
        ffn_size=_width(shape.ffn_size, settings.ffn, "ffn", WIDTH_MULTIPLE),
        kv_heads=kv_heads,
        heads=heads,
        hidden_size=_width(shape.hidden_size, settings.hidden, "hidden", math.lcm(WIDTH_MULTIPLE, divisor)),
    )


def _width(width: int, share: float, key: str, step: int) -> int:
    """The width that remains: the nearest multiple of ``step``."""
    if share == 0:
        return width
    kept = round(width * (1 - share) / step) * step
    if not 0 < kept < width:
        raise UserError(f"prune.{key} {share} leaves {kept} of a width of {width}, which goes in steps of {step}; give another share")
    return kept
