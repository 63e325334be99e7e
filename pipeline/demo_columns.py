"""What stands side by side in the demo: fp32, the best quantised ONNX and the best quantised TFLite, each in its runtime."""

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from device_tests.sessions import RUNTIMES
from pipeline.generate import answer_ms
from pipeline.manifest import Artifact, Manifest
from pipeline.report_headline import is_fp32

FP32_STAGES = {"onnx": "onnx_fp32", "tflite": "tflite_fp32"}  # stage by the artifact that it makes
RUNTIMES_OF = {"onnx": ("onnxruntime",), "tflite": ("litert", "tflite")}  # the preferred one first
TITLES = {"onnx": "ONNX", "tflite": "TFLite"}


@dataclass(frozen=True)
class Column:
    """One column: the artifact's sidecar and the runtime that opens it, or why there is none."""

    title: str
    artifact: str | None = None
    runtime: str | None = None
    sidecar: Path | None = None
    bytes: int | None = None
    note: str | None = None
    missing: str | None = None


def columns(folder: Path, manifest: Manifest, work: Path) -> tuple[Column, ...]:
    """The three columns of a bundle that lies in ``folder``; ``work`` is where the stages keep their results."""
    return fp32_column(folder, manifest, work), *(quantised_column(folder, manifest, form) for form in TITLES)


def fp32_column(folder: Path, manifest: Manifest, work: Path) -> Column:
    """The bundle's own fp32 file, else the very one among the stages' results that its quantised files were made from."""
    for form in FP32_STAGES:
        found = [artifact for artifact in manifest.artifacts if artifact.format == form and artifact.name.endswith("_fp32")]
        if found and (runtime := installed(proved_in(found[0], form))):
            return Column("fp32", found[0].name, runtime, folder / found[0].sidecar, found[0].bytes)
    parents = {json.loads((folder / artifact.sidecar).read_text(encoding="utf-8")).get("parent") for artifact in manifest.artifacts}
    for stage, name in FP32_STAGES.items():
        runtime = installed(RUNTIMES_OF[stage])
        for sidecar in sorted((work / stage).glob(f"*/{name}.json")) if runtime else ():
            record = json.loads(sidecar.read_text(encoding="utf-8"))
            if record["sha256"] in parents:
                return Column("fp32", name, runtime, sidecar, record["bytes"], note=f"not in the bundle; from {work}")
    return Column(
        "fp32",
        missing=f"The bundle has no fp32 file, and {work} not the one that its files were made from. Build it with "
        "`pocketlm bundle --variants all`, or give the folder of the build's stages with --work.",
    )


def quantised_column(folder: Path, manifest: Manifest, form: str) -> Column:
    """The quantised file of one format that was measured to answer soonest, in the runtime that it was proved in."""
    title = TITLES[form]
    found = [artifact for artifact in manifest.artifacts if artifact.format == form and not is_fp32({"name": artifact.name})]
    if not found:
        return Column(title, missing=f"The bundle has no quantised {title} file.")
    artifact = min(found, key=lambda artifact: min(answer_ms(artifact, runtime) for runtime in RUNTIMES_OF[form]))
    runtime = installed(proved_in(artifact, form))
    titled = f"{title} {artifact.name.rsplit('_', 1)[1]}"
    if runtime is None:
        packages = " or ".join(RUNTIMES[name][3] for name in proved_in(artifact, form))
        return Column(titled, artifact.name, missing=f"{artifact.name} needs {packages}, which is not installed here.")
    return Column(titled, artifact.name, runtime, folder / artifact.sidecar, artifact.bytes)


def proved_in(artifact: Artifact, form: str) -> tuple[str, ...]:
    """The runtimes that an artifact passed in, the preferred one first."""
    passed = {device.runtime for device in artifact.runtimes}
    return tuple(runtime for runtime in RUNTIMES_OF[form] if runtime in passed)


def installed(runtimes: Iterable[str]) -> str | None:
    """The first of them whose library is here."""
    return next((name for name in runtimes if importlib.util.find_spec(RUNTIMES[name][2].split(".")[0])), None)
