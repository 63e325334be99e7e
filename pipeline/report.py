"""``report.json``: what a build measured, in a shape that other programs read. The models below are its schema.

Changes are fractions (0.003 is +0.3 %); bytes are bytes, times milliseconds or seconds, memory MB, as the names say.
"""

import json
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from device_tests.devices.campaign import Outcome
from models.errors import UserError
from pipeline.compressed import deflated_bytes
from pipeline.recipe import Recipe, recipe_toml
from pipeline.stages import ARTIFACT_OF_STAGE, stages_of

FORMAT_VERSION = 1
FP32_BYTES = 4
RECORDS = ("checkpoint", "text", "prune", "recover", "smooth", "cluster", "golden")  # stages whose JSON is <stage>.json

Measured = float | None  # None: the run that should have measured it died before


class Entry(BaseModel):
    """Part of a report, frozen. A measurement may say more than the fields that are promised here."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Model(Entry):
    """The dense model that the road began with."""

    name: str
    source: str
    commit: str | None = Field(description="hub commit; null for a local folder")
    sha256: list[str] = Field(description="of each weight file, in name order")
    licence: str | None = Field(description="as the checkpoint states it; null when it does not")
    family: str
    parameters: int = Field(description="a tied head is counted once")
    bytes_fp32: int = Field(description="parameters in 4 bytes each: what every size is held against")
    context_tokens: int
    vocab_size: int


class Reference(Entry):
    """The dense model on the evaluation windows."""

    perplexity: float
    perplexity_stderr: float
    tokens: int


class Pruned(Entry):
    """The pruned and recovered fp32 model on the same windows; changes are against the dense one."""

    perplexity: float
    parameters: int
    sparsity: float = Field(description="share of zeros among the weights that remain in linear layers")
    perplexity_stderr: Measured = None
    perplexity_change: Measured = None
    kl: Measured = None
    top1: Measured = None


class Recovery(Entry):
    """How recovery ended; the model that validation text liked best was kept."""

    kept: str = Field(description="`before`, or the step whose model was kept")
    diverged: bool
    stopped_early: bool


class Quality(Entry):
    """An artifact in one of its own runtimes, teacher-forced, against the fp32 PyTorch model that it was exported from."""

    perplexity: Measured
    perplexity_stderr: Measured
    perplexity_change: Measured
    perplexity_change_dense: Measured = Field(description="against the dense model")
    kl: Measured = Field(description="mean KL divergence in nats per token")
    top1: Measured = Field(description="share of tokens with the same first choice")


class Agreement(Entry):
    """An artifact on a device held against the same artifact in the same runtime on the machine that built it."""

    local_isa: str
    max_abs_diff: float = Field(description="largest difference of logits on the golden vectors")
    bit_equal: float = Field(description="share of the golden vectors' rows of logits that are equal to the bit")
    golden_tokens: int
    top1: float = Field(description="share of tokens with the same first choice")
    perplexity: Measured = Field(description="on this device, over the windows that both scored")
    perplexity_change: Measured
    perplexity_change_stderr: Measured
    tokens: int
    windows: int


class Prompt(Entry):
    """Time to the first token after a prompt of ``tokens``."""

    tokens: int
    cold_ms: float = Field(description="the first time")
    ms: float = Field(description="median of the others")
    tokens_per_s: float


class Device(Entry):
    """One artifact measured in one runtime on one device, in a fresh process; times are medians over ``rounds``."""

    device: str
    isa: str | None = Field(description="as `uname -m` says it")
    emulated: bool = Field(False, description="no real processor of this kind: numbers count, nothing was timed")
    runtime: str
    runtime_version: str | None
    threads: int
    load_cold_ms: Measured = Field(None, description="from storage; null where the system does not let go of a file's pages")
    load_ms: Measured = Field(None, description="with the file in the page cache")
    first_token_ms: Measured = None
    decode_ms_p50: Measured = None
    decode_ms_p90: Measured = None
    decode_ms_p99: Measured = None
    prefill_tokens_per_s: Measured = None
    decode_tokens_per_s: Measured = None
    host_us_per_token: Measured = Field(None, description="microseconds of a decoded token that the runtime's call did not take")
    load_rss_mb: Measured = Field(None, description="VmHWM once the model is open")
    peak_rss_mb: Measured = None
    prompts: list[Prompt] = Field([], description="every prompt length that was timed")
    rounds: list[dict] = Field([], description="the same numbers of each fresh process: their range is the spread")
    bytes_read_per_token: int | None = Field(None, description="of weights as stored, without tables of which one row is picked")
    read_gb_s: Measured = Field(None, description="bytes_read_per_token times decoded tokens per second, in 10^9 bytes/s")
    bandwidth_gb_s: Measured = Field(None, description="measured memory bandwidth of the device with as many threads")
    bandwidth_share: Measured = Field(None, description="read_gb_s over bandwidth_gb_s; above 1 where a cache holds the weights")
    max_abs_diff: Measured = Field(None, description="largest difference of logits to PyTorch on the golden vectors")
    kl: Measured = None
    top1: Measured = None
    decode_ms: list[float] = Field([], description="every decode step that was timed in the first round")
    conditions: dict[str, dict] = Field({}, description="temperature, clock, governor and throttling before, during and after")
    environment: dict[str, str] = Field({}, description="kernel, C library, Python, numpy, CPUs that could be used")
    against_local: Agreement | None = Field(None, description="null on the machine itself and where there was nothing to compare")
    quality: Quality | None = Field(None, description="in this runtime; null when it was not asked for or the run died")
    notes: list[str] = []
    passed: bool
    failures: list[str] = []


class Skipped(Entry):
    """A device that was out of reach, or a runtime that it cannot have."""

    device: str
    runtime: str | None = None
    reason: str


class LayerCost(Entry):
    """What is lost when only this layer, or all layers of this kind, are int8."""

    name: str
    kl: float = Field(description="mean KL divergence from fp32 in nats per token")
    top1: float


class Sensitivity(Entry):
    """Each list dearest first."""

    layers: list[LayerCost]
    operators: list[LayerCost]
    tokens: int


class Coverage(Entry):
    """How much of an artifact is in the form that it is named after, as found in its file; null where a form has no such number."""

    linear_layers: int | None
    int8_linear_layers: int | None
    prompt_int8_linear_layers: int | None = Field(description="of the second graph of a hybrid artifact")
    embedding_int8: bool | None
    bits_per_weight: Measured


class Artifact(Entry):
    """An exported model file and everything that was measured of it."""

    name: str
    file: str
    sha256: str
    bytes: int
    size_ratio: float = Field(description="bytes over the dense model's bytes_fp32")
    bytes_compressed: int = Field(description="after deflate at its best level, file by file: what a phone downloads")
    other_forms: list[dict] = Field([], description="layers that are not in the form that the artifact is named after, and why")
    coverage: Coverage | None = Field(None, description="how much of it is int8; null for fp32, and in reports older than this field")
    sensitivity: Sensitivity | None = Field(None, description="what each layer costs as int8; null where it was not measured")
    quality: Quality | None = Field(description="each number the worst over the artifact's runtimes; null when none was measured")
    devices: list[Device]
    passed: bool


class StageCost(Entry):
    """What a stage of the road cost when it ran; ``cached``: this build found its result."""

    stage: str
    seconds: float
    peak_rss_mb: float
    disk_mb: float | None = Field(None, description="10^6 bytes of its result; null in reports that are older than this field")
    cached: bool


class Tokenizer(Entry):
    """Whether the tokenizer's ONNX graphs equal the tokenizer; without parity they are not in the bundle."""

    parity: bool
    documents: int
    mismatches: int
    reason: str | None
    limits: list[str] = []


class Report(Entry):
    """The whole report."""

    format_version: int = FORMAT_VERSION
    model: Model
    reference: Reference
    pruned: Pruned
    recovery: Recovery
    clusters: dict | None = Field(
        None, description="bytes of the clustered weights, plain and as codes with a codebook; null without clusters"
    )
    artifacts: list[Artifact]
    boards: dict[str, dict | None] = Field({}, description="what each device is, as it says itself")
    skipped: list[Skipped] = []
    passed: bool = Field(description="every artifact passed in every runtime on every device that was not skipped")
    text: dict = Field(description="where calibration and evaluation text came from; says so when the model sampled it itself")
    text_sampled: bool = Field(description="some of the text was sampled from the dense model")
    tokenizer: Tokenizer
    stages: list[StageCost]
    gates: dict[str, dict] = Field(description="the limits by artifact")
    versions: dict[str, str] = Field(description="libraries that made the artifacts")
    recipe: dict


def build_report(recipe: Recipe, folders: dict[str, Path], outcome: Outcome, stages: list[dict]) -> Report:
    """Put together what stages and device tests left.

    ``folders`` maps stage names to their results; ``outcome`` has one result per artifact, runtime and device;
    ``stages`` are ``{"stage", "seconds", "peak_rss_mb", "disk_mb", "cached"}``. Raises UserError when a result was measured
    on other bytes than the artifact's.
    """
    records = {name: read_json(folders[name] / f"{name}.json") for name in RECORDS}
    model = model_of(recipe.name, records["checkpoint"])
    paths = [sidecar_path(folders, stage) for stage in stages_of(recipe.artifacts)]
    sidecars = [read_json(path) for path in paths]
    artifacts = [artifact_of(path, outcome.results, model.bytes_fp32) for path in paths]
    tokenizer = read_json(folders["tokenizer"] / "tokenizer_graph.json")
    texts = {name: records["text"][name] for name in ("calibration", "evaluation")}
    return Report(
        model=model,
        reference=Reference(**records["golden"]["reference"]),
        pruned=Pruned(**records["golden"]["pruned"]),
        recovery=Recovery(**{field: records["recover"][field] for field in Recovery.model_fields}),
        clusters=records["cluster"]["bytes"],
        artifacts=artifacts,
        boards=outcome.boards,
        skipped=[Skipped(**entry) for entry in outcome.skipped],
        passed=all(artifact.passed for artifact in artifacts),
        text=texts,
        text_sampled=any(text.get("kind") != "file" for text in texts.values()),
        tokenizer=Tokenizer(**{field: tokenizer[field] for field in Tokenizer.model_fields if field in tokenizer}),
        stages=[StageCost(**stage) for stage in stages],
        gates=recipe.gates.model_dump(mode="json", include=set(recipe.artifacts)),
        versions=versions_of([*records.values(), *sidecars, tokenizer]),
        recipe=tomllib.loads(recipe_toml(recipe)),
    )


def sidecar_path(folders: dict[str, Path], stage: str) -> Path:
    """The JSON beside the artifact that ``stage`` made."""
    return folders[stage] / f"{ARTIFACT_OF_STAGE[stage]}.json"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def model_of(name: str, checkpoint: dict) -> Model:
    """The model's entry from ``checkpoint.json``."""
    shape = checkpoint["shape"]
    return Model(
        name=name,
        source=checkpoint["source"],
        commit=checkpoint["commit"],
        sha256=[file["sha256"] for file in checkpoint["weights"]],
        licence=checkpoint["licence"],
        bytes_fp32=FP32_BYTES * shape["parameters"],
        **shape,
    )


def artifact_of(path: Path, results: list[dict], dense_bytes: int) -> Artifact:
    """The artifact of the sidecar at ``path`` with all results that name it. Without a result it did not pass."""
    sidecar = read_json(path)
    own = [result for result in results if result["artifact"] == sidecar["name"]]
    for result in own:
        if result["sha256"] not in (sidecar["sha256"], None):  # None: the run died before it had read the artifact
            raise UserError(f"{sidecar['name']}: the measurement is of other bytes than the artifact; run `pocketlm test` again")
    devices = [device_of(result) for result in own]
    return Artifact(
        name=sidecar["name"],
        file=sidecar["file"],
        sha256=sidecar["sha256"],
        bytes=sidecar["bytes"],
        size_ratio=sidecar["bytes"] / dense_bytes,
        bytes_compressed=sum(deflated_bytes(path.parent / file["path"]) for file in sidecar["files"]),
        other_forms=other_forms(sidecar["measured"]),
        coverage=coverage_of(sidecar["measured"]),
        sensitivity=sidecar["measured"].get("sensitivity"),
        quality=worst_quality([device.quality for device in devices if device.quality]),
        devices=devices,
        passed=bool(devices) and all(device.passed for device in devices),
    )


def device_of(result: dict) -> Device:
    """A result of ``device_tests`` as an entry."""
    return Device(**{**result["device"], "quality": result.get("quality")})


def coverage_of(measured: dict) -> Coverage | None:
    """What a quantised artifact's sidecar counted; None where it counted nothing, as for fp32."""
    counted = {**measured, **measured.get("coverage", {})}
    found = {name: counted.get(name) for name in Coverage.model_fields}
    return Coverage(**found) if any(value is not None for value in found.values()) else None


def other_forms(measured: dict) -> list[dict]:
    """``{"name", "why"}`` of each layer that is not int8 in an int8 artifact, or dynamic in a static one."""
    dynamic = measured.get("coverage", {}).get("dynamic_linear_layers", [])
    why = "dynamic int8: int8 weights, inputs quantised anew in every call"
    return [*measured.get("not_int8", []), *({"name": name, "why": why} for name in dynamic)]


def worst_quality(qualities: list[Quality]) -> Quality | None:
    """Perplexity where its change is highest; KL the highest and top-1 the lowest of all. A missing number is the worst."""
    if not qualities:
        return None
    highest = max(qualities, key=lambda quality: missing_last(quality.perplexity_change))
    kl = max((quality.kl for quality in qualities), key=missing_last)
    top1 = min((quality.top1 for quality in qualities), key=lambda share: -1.0 if share is None else share)
    return highest.model_copy(update={"kl": kl, "top1": top1})


def missing_last(value: float | None) -> float:
    return float("inf") if value is None or value != value else value


def versions_of(records: list[dict]) -> dict[str, str]:
    """Every library version that a stage named, in name order."""
    found = {}
    for record in records:
        found |= record.get("versions", {})
    return dict(sorted(found.items()))


def report_json(report: Report) -> str:
    """The report as text. Numbers that are none (infinite, undefined) become null: JSON has no word for them."""
    return report.model_dump_json(indent=1) + "\n"


def read_report(path: Path) -> Report:
    """A checked report from a file."""
    return Report.model_validate_json(path.read_text(encoding="utf-8"))
