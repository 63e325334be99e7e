"""What a model of any size will take: parameters, bytes per format, KV cache, and tokens per second that a device's memory allows.

A decoder reads all its weights and its whole KV cache for every token, so ``tokens/s <= bandwidth / bytes read per token``:
a bound, not a promise. Where the model has been exported, the predicted bytes stand beside the measured ones.
"""

import itertools
import json
import tomllib
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from models.errors import GateError, UserError
from pipeline.fit_shape import DecoderShape, Parameters, config_of, parameters, pruned, shape_of_config
from pipeline.fit_sizes import Blocks, Size, formats, kv_cache_bytes, size_of
from pipeline.recipe import DEFAULT_RECIPE, put, read_toml, told
from pipeline.settings import PruneSettings

DEVICES = Path(__file__).parent / "presets" / "devices.toml"
REPORT = "report.json"
SHAPE_KEYS = (
    "family", "vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim", "ffn_size", "context_tokens", "tied",
)  # fmt: skip
TOLERANCE = 0.03  # between predicted and measured bytes
DOWNLOAD_SPARSITIES = (0.5, 0.9)
SPARSE_FORMAT = "onnx_static_int8"
USUAL_CONTEXT = 2048
KV_ELEMENTS = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Question:
    """What is asked about a model. ``memory_share``: of a device's memory, what weights and cache may take."""

    contexts: tuple[int, ...] = ()  # none: USUAL_CONTEXT, or all that the model has
    prune: PruneSettings = PruneSettings()
    memory_share: float = 0.5


@dataclass(frozen=True)
class Device:
    """Memory in GiB, bandwidth in 10^9 bytes per second, what kind of figure that is, and where it comes from."""

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    kind: str
    source: str


@dataclass(frozen=True)
class OnDevice:
    """One format on one device at the longest context: whether it fits, and the bound on decoding."""

    device: str
    format: str
    needed_bytes: int
    fits: bool
    tokens_per_s: float


@dataclass(frozen=True)
class Compared:
    """Predicted and measured bytes of an artifact; ``error`` as a share of what was measured."""

    artifact: str
    predicted: int
    measured: int
    error: float


@dataclass(frozen=True)
class Fit:
    """The whole answer. ``kv_cache``: bytes by context length and element type."""

    name: str
    shape: DecoderShape
    parameters: Parameters
    sizes: tuple[Size, ...]
    kv_cache: dict[int, dict[str, int]]
    devices: tuple[OnDevice, ...]
    compared: tuple[Compared, ...]


def fit(config: str, question: Question) -> Fit:
    """The arithmetic for ``config``: a preset, a config.json, its folder, or a bundle (or its report.json), which is compared too."""
    report = report_of(config)
    if report is None:
        shape, blocks = shape_of_config(config_of(config), config), usual_blocks()
    else:
        shape, blocks = shape_of_report(report, config), blocks_of_recipe(report["recipe"])
        if question.prune != PruneSettings():
            raise UserError(f"{config} is pruned already; leave --prune out, or ask about its config.json")
    shape = pruned(shape, question.prune)
    question = replace(question, contexts=question.contexts or (min(USUAL_CONTEXT, shape.context_tokens),))
    check_question(question, shape)
    sizes = sizes_of(shape, blocks, question.prune.sparsity)
    return Fit(
        name=config,
        shape=shape,
        parameters=parameters(shape),
        sizes=sizes,
        kv_cache={tokens: kv_by_element(shape, tokens) for tokens in question.contexts},
        devices=tuple(on_device(shape, size, device, question) for device in devices() for size in sizes if not size.sparsity),
        compared=compare(sizes, report),
    )


def prune_settings(text: str) -> PruneSettings:
    """``ffn=0.5,layers=2`` as the prune table of a recipe. UserError for what such a table does not take."""
    values: dict = {}
    for pair in filter(None, text.split(",")):
        put(values, pair)
    try:
        return PruneSettings.model_validate(values)
    except ValidationError as error:
        raise UserError(told(error, Path("--prune"))) from error


def check_question(question: Question, shape: DecoderShape) -> None:
    """UserError for a context that the model does not have or a share that is none."""
    if not 0 < question.memory_share <= 1:
        raise UserError(f"--memory-share {question.memory_share}: give a share above 0 and up to 1")
    for tokens in question.contexts:
        if not 0 < tokens <= shape.context_tokens:
            raise UserError(f"--context {tokens}: this model has 1 to {shape.context_tokens} tokens; give a length among them")


def sizes_of(shape: DecoderShape, blocks: Blocks, sparsity: float) -> tuple[Size, ...]:
    """Every format, and static int8 with zeros in it: the same on disk, less to download."""
    known = {form.name: form for form in formats(blocks)}
    sparse = sorted({*DOWNLOAD_SPARSITIES, *([sparsity] if sparsity else [])})
    return (*(size_of(shape, form) for form in known.values()), *(size_of(shape, known[SPARSE_FORMAT], share) for share in sparse))


def kv_by_element(shape: DecoderShape, tokens: int) -> dict[str, int]:
    """Bytes of a cache of ``tokens`` tokens by element type."""
    return {kind: kv_cache_bytes(shape, tokens, size) for kind, size in KV_ELEMENTS.items()}


@cache
def devices() -> tuple[Device, ...]:
    """The devices of the data file."""
    return tuple(Device(name, **facts) for name, facts in tomllib.loads(DEVICES.read_text(encoding="utf-8")).items())


def on_device(shape: DecoderShape, size: Size, device: Device, question: Question) -> OnDevice:
    """``size`` on ``device`` with a full cache of the longest context."""
    cache_bytes = kv_cache_bytes(shape, max(question.contexts), size.kv_bytes)
    needed = size.memory + cache_bytes
    return OnDevice(
        device=device.name,
        format=size.name,
        needed_bytes=needed,
        fits=needed <= device.memory_gib * 2**30 * question.memory_share,
        tokens_per_s=device.bandwidth_gb_s * 1e9 / (size.read_per_token + cache_bytes),
    )


def report_of(config: str) -> dict | None:
    """The report when ``config`` is one or a bundle, else None."""
    path = Path(config) / REPORT if Path(config).is_dir() else Path(config)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); give a config.json, a bundle or its report") from error
    return values if isinstance(values, dict) and "artifacts" in values else None


def shape_of_report(report: dict, where: str) -> DecoderShape:
    """The sizes of the exported model. UserError where they do not add up to the parameters that the report counted."""
    counted = report["pruned"]["shape"]
    facts = {key: counted[key] for key in SHAPE_KEYS}
    plain = DecoderShape(**facts, attention_bias=facts["family"] == "gpt2", mlp_bias=facts["family"] == "gpt2")
    for attention_bias, mlp_bias in itertools.product((False, True), repeat=2):  # a report does not say
        shape = replace(plain, attention_bias=attention_bias, mlp_bias=mlp_bias)
        if parameters(shape).total == counted["parameters"]:
            return shape
    sums = f"its sizes make {parameters(plain).total} parameters, it counted {counted['parameters']}"
    raise UserError(f"{where}: {sums}; give the model's config.json")


def usual_blocks() -> Blocks:
    """The options that decide bytes as the default recipe has them."""
    return blocks_of_recipe(read_toml(DEFAULT_RECIPE))


def blocks_of_recipe(recipe: dict) -> Blocks:
    """The options of a recipe that decide bytes; a stage that the recipe does not name has its defaults."""
    default, values = Blocks(), {}
    for artifact in ("weight_only_int8", "weight_only_int4", "hybrid_int8", "hybrid_int4"):
        table, name = recipe.get(f"onnx_{artifact}", {}), artifact.removeprefix("weight_only_")
        values[name] = table.get("block", getattr(default, name))
        if name.endswith("int4"):
            values[f"{name}_embedding_bits"] = table.get("embedding_bits", getattr(default, f"{name}_embedding_bits"))
    return Blocks(**values)


def compare(sizes: tuple[Size, ...], report: dict | None) -> tuple[Compared, ...]:
    """Predicted against measured bytes, for every artifact of the report whose format the arithmetic knows."""
    measured = {artifact["name"]: artifact["bytes"] for artifact in report["artifacts"]} if report else {}
    found = [(size.name, size.disk, measured[size.name]) for size in sizes if size.name in measured]
    return tuple(Compared(name, disk, real, disk / real - 1) for name, disk, real in found)


def require_close(found: Fit) -> None:
    """GateError unless there are measured bytes and all predictions are within TOLERANCE of them."""
    if not found.compared:
        raise UserError(f"{found.name}: nothing measured to compare with; give a bundle or its report.json")
    wrong = [item for item in found.compared if abs(item.error) > TOLERANCE]
    if wrong:
        lines = [f"{item.artifact}: predicted {item.predicted}, measured {item.measured} bytes ({item.error:+.1%})" for item in wrong]
        raise GateError("\n".join([f"fit: {len(wrong)} predictions are off by more than {TOLERANCE:.0%}", *lines]))


def as_record(found: Fit) -> dict:
    """The answer as JSON values."""
    counted = {**asdict(found.parameters), "total": found.parameters.total}
    return {**asdict(found), "parameters": counted, "device_table": [asdict(device) for device in devices()]}
