"""The recipe: one TOML file that says all that a run does. Validated as a whole, every fault told at once."""

import re
import tomllib
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import Field, ValidationError, field_validator

from exporters.settings import (
    OnnxDynamicInt8Settings,
    OnnxHybridInt4Settings,
    OnnxHybridInt8Settings,
    OnnxInt8Settings,
    OnnxSettings,
    OnnxWeightOnlyInt4Settings,
    OnnxWeightOnlyInt8Settings,
    TfliteDynamicInt8Settings,
    TfliteFullInt8Settings,
    TfliteInt8Settings,
    TfliteSettings,
    TfliteWeightOnlyInt8Settings,
    TokenizerSettings,
)
from models.errors import UserError
from models.settings import CheckpointSettings, StageSettings, TextSettings
from pipeline.settings import ClusterSettings, DeviceSettings, Gate, GoldenSettings, PruneSettings, RecoverSettings, SmoothSettings
from pipeline.stages import ARTIFACT_OF_STAGE

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = ROOT / "pipeline" / "recipes" / "default.toml"
DEMO = ROOT / "models" / "demo"
DEMO_TEXTS = {"calibration": DEMO / "data" / "calibration.txt", "evaluation": DEMO / "data" / "heldout.txt"}


class Gates(StageSettings):
    """The limits of each artifact, in every runtime that it runs in."""

    onnx_fp32: Gate = Gate()
    onnx_static_int8: Gate = Gate()
    onnx_dynamic_int8: Gate = Gate()
    onnx_weight_only_int8: Gate = Gate()
    onnx_weight_only_int4: Gate = Gate()
    onnx_hybrid_int8: Gate = Gate()
    onnx_hybrid_int4: Gate = Gate()
    tflite_fp32: Gate = Gate()
    tflite_static_int8: Gate = Gate()
    tflite_dynamic_int8: Gate = Gate()
    tflite_weight_only_int8: Gate = Gate()
    tflite_full_int8: Gate = Gate()


class Recipe(StageSettings):
    """Which artifacts are made, every stage's settings under the stage's name, the gates, and how devices measure."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="the bundle is <name>-android-bundle")]
    artifacts: Annotated[tuple[str, ...], Field(min_length=1, description="what is made and measured")] = (
        "onnx_fp32",
        "onnx_static_int8",
        "onnx_hybrid_int8",
        "tflite_fp32",
        "tflite_static_int8",
    )
    checkpoint: CheckpointSettings
    text: TextSettings = TextSettings()
    prune: PruneSettings = PruneSettings()
    recover: RecoverSettings = RecoverSettings()
    smooth: SmoothSettings = SmoothSettings()
    cluster: ClusterSettings = ClusterSettings()
    golden: GoldenSettings = GoldenSettings()
    onnx: OnnxSettings = OnnxSettings()
    onnx_int8: OnnxInt8Settings = OnnxInt8Settings()
    onnx_dynamic_int8: OnnxDynamicInt8Settings = OnnxDynamicInt8Settings()
    onnx_weight_only_int8: OnnxWeightOnlyInt8Settings = OnnxWeightOnlyInt8Settings()
    onnx_weight_only_int4: OnnxWeightOnlyInt4Settings = OnnxWeightOnlyInt4Settings()
    onnx_hybrid_int8: OnnxHybridInt8Settings = OnnxHybridInt8Settings()
    onnx_hybrid_int4: OnnxHybridInt4Settings = OnnxHybridInt4Settings()
    tflite: TfliteSettings = TfliteSettings()
    tflite_int8: TfliteInt8Settings = TfliteInt8Settings()
    tflite_dynamic_int8: TfliteDynamicInt8Settings = TfliteDynamicInt8Settings()
    tflite_weight_only_int8: TfliteWeightOnlyInt8Settings = TfliteWeightOnlyInt8Settings()
    tflite_full_int8: TfliteFullInt8Settings = TfliteFullInt8Settings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    device: DeviceSettings = DeviceSettings()
    gates: Gates = Gates()

    @field_validator("artifacts")
    @classmethod
    def known(cls, artifacts: tuple[str, ...]) -> tuple[str, ...]:
        """Each artifact is one that a stage makes, and named once."""
        unknown = [name for name in artifacts if name not in ARTIFACT_OF_STAGE.values()]
        if unknown or len(set(artifacts)) < len(artifacts):
            raise ValueError(f"give each at most once, of {', '.join(ARTIFACT_OF_STAGE.values())}")
        return artifacts


def load_recipe(path: Path | None, overrides: list[str]) -> Recipe:
    """Read a recipe and put ``table.key=value`` overrides over it.

    ``path`` None is the default recipe. Where nothing names a checkpoint, it is the demo model with its own texts.
    Raises UserError that lists every fault, each with key, value and what would be right.
    """
    values = read_toml(path or DEFAULT_RECIPE)
    for override in overrides:
        put(values, override)
    source = values.setdefault("checkpoint", {}).get("source")
    if source is None:
        values["checkpoint"]["source"] = str(DEMO)
        values["text"] = {**DEMO_TEXTS, **values.get("text", {})}
    values.setdefault("name", bundle_name(str(source or DEMO)))
    try:
        return with_targets(Recipe.model_validate(values))
    except ValidationError as error:
        raise UserError(told(error, path)) from error


def with_targets(recipe: Recipe) -> Recipe:
    """The same recipe, in which mixed precision aims at what the artifact's gate will ask for, unless it says itself."""
    changed = {}
    for name in ("onnx_int8", "tflite_int8"):
        stage, gate = getattr(recipe, name), getattr(recipe.gates, ARTIFACT_OF_STAGE[name])
        aims = {"least_top1": gate.top1, "largest_perplexity_change": gate.perplexity_change}
        changed[name] = stage.model_copy(update={key: limit for key, limit in aims.items() if getattr(stage, key) is None})
    return recipe.model_copy(update=changed)


def told(error: ValidationError, path: Path | None) -> str:
    """One line where there is one fault; else one line for each, behind a line that says where they are."""
    faults: dict[str, list[str]] = {}  # a key whose value may be of several kinds has a message for each kind
    for fault in error.errors():
        key = key_of_fault(fault["loc"])
        value = "" if fault["type"] in ("missing", "extra_forbidden") else f" = {fault['input']!r}"
        message = "no such key; see `pocketlm plan --json` for all keys" if fault["type"] == "extra_forbidden" else fault["msg"]
        faults.setdefault(key + value, []).append(message)
    lines = [f"{key}: {', or '.join(messages)}" for key, messages in faults.items()]
    where = path.name if path else "the recipe"
    if len(lines) == 1:
        return f"{where}: {lines[0]}; mend it and run again"
    return "\n".join([f"{where}: {len(lines)} faults; mend and run again", *lines])


def key_of_fault(location: tuple[str | int, ...]) -> str:
    """The recipe's key at a location, without what pydantic adds about the kind of value that it tried."""
    model, steps = Recipe, []
    for step in location:
        steps.append(str(step))
        kind = model.model_fields[step].annotation if step in model.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, StageSettings)):
            break
        model = kind
    return ".".join(steps)


def read_toml(path: Path) -> dict:
    """Parse a TOML file. Raises UserError when there is none or when it is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such recipe; give a TOML file or leave the option out") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}; mend it and run again") from error


def put(values: dict, override: str) -> None:
    """Put one ``table.key=value`` into nested ``values``. The value is read as TOML, and as a plain string where it is none."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: write it as key=value, such as prune.sparsity=0.5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {table} is a value, not a table; see `pocketlm plan --json` for all keys")
    values[last] = value


def bundle_name(source: str) -> str:
    """A name for files from a folder or a hub id: its last part in lower case."""
    tail = Path(source).name or Path(source).resolve().name
    cleaned = re.sub(r"[^a-z0-9._-]", "-", tail.lower())
    return cleaned.strip("._-")[:64] or "model"


def recipe_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, defaults included, with paths reduced to their names: it travels in the bundle."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    source = Path(recipe.checkpoint.source)
    if source.exists():
        values["checkpoint"]["source"] = source.resolve().name
    for field in ("calibration", "evaluation"):
        if field in values["text"]:
            values["text"][field] = Path(values["text"][field]).name
    return tomli_w.dumps(values)
