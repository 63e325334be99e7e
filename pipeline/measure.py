"""Every artifact in every runtime that runs it, on this machine, judged by the recipe's gates. Never cached."""

from collections.abc import Callable
from pathlib import Path

from device_tests.devices.local import Run, run_local
from device_tests.gates import Gates as DeviceGates
from device_tests.sessions import RUNTIMES
from pipeline.recipe import Recipe
from pipeline.report import read_json, sidecar_path
from pipeline.stages import stages_of
from pipeline.table import shown
from pipeline.verify import bundle_folder

NAMED_LAYERS = 3  # in the line of a failed gate
BUNDLE_COLUMNS = (
    "artifact", "runtime", "load ms", "first token ms",
    "ms/token p50", "p90", "p99", "tokens/s", "peak MB", "difference", "top-1", "verdict",
)  # fmt: skip


def measuring_modules() -> tuple[str, ...]:
    """The modules that decide what a measurement gives. Drivers are imported by name: no import statement leads to them."""
    return ("device_tests.__main__", *dict.fromkeys(driver for _, driver, *_ in RUNTIMES.values()))


def runtimes_of(sidecar: dict) -> list[str]:
    """The runtimes that an artifact is for: those that its sidecar names, else all that run its format."""
    named = sidecar.get("runtimes")
    return [name for name, (form, *_) in RUNTIMES.items() if form == sidecar["format"] and (named is None or name in named)]


def measure(recipe: Recipe, folders: dict[str, Path], tell: Callable[[str, str], None]) -> list[dict]:
    """One result per artifact and runtime, as ``device_tests`` gives it: times, memory, golden vectors and quality.

    One after the other, because two at once would time each other.
    """
    results = []
    for stage, name in stages_of(recipe.artifacts).items():
        sidecar = sidecar_path(folders, stage)
        gates = DeviceGates(**getattr(recipe.gates, name).model_dump())
        for runtime in runtimes_of(read_json(sidecar)):
            tell(f"{name} in {runtime}", "runs")
            run = Run(runtime=runtime, threads=recipe.device.threads, gates=gates, quality=True)
            results.append(with_dearest(run_local(sidecar, folders["golden"], run), read_json(sidecar)))
            tell(f"{name} in {runtime}", "passed" if results[-1]["device"]["passed"] else "FAILED")
    return results


def with_dearest(result: dict, sidecar: dict) -> dict:
    """The same result; where it failed, each failure also names the layers that cost most, if they were measured."""
    found = (sidecar["measured"].get(part, {}).get("layers") for part in ("sensitivity", "mixed_precision"))
    costs = next((layers for layers in found if layers), None)
    if result["device"]["passed"] or not costs:
        return result
    dearest = ", ".join(f"{layer['name']} (KL {layer['kl']:.1e})" for layer in costs[:NAMED_LAYERS])
    failures = [f"{failure}; dearest layers as int8: {dearest}" for failure in result["device"]["failures"]]
    return {**result, "device": {**result["device"], "failures": failures}}


def measure_bundle(path: Path, tell: Callable[[str, str], None], threads: int = 1) -> list[dict]:
    """Times, memory and golden vectors of every artifact of a bundle, against the gates in its manifest.

    Raises GateError, and opens nothing, when a byte of the bundle is not as it was built.
    """
    results = []
    with bundle_folder(path) as (folder, manifest):
        for artifact in manifest.artifacts:
            for runtime in (device.runtime for device in artifact.runtimes):
                tell(f"{artifact.name} in {runtime}", "runs")
                run = Run(runtime=runtime, threads=threads, gates=DeviceGates(**artifact.gates))
                results.append(run_local(folder / artifact.sidecar, folder / "golden", run))
    return results


def bundle_rows(results: list[dict]) -> list[tuple[str, ...]]:
    """One row per result; a dash where a run died before it could measure."""

    rows = []
    for result in results:
        device = result["device"]
        times = [shown(device[key], ".2f") for key in ("load_ms", "first_token_ms", "decode_ms_p50", "decode_ms_p90", "decode_ms_p99")]
        rest = [
            shown(device["decode_tokens_per_s"], ".0f"),
            shown(device["peak_rss_mb"], ".0f"),
            shown(device["max_abs_diff"], ".2g"),
        ]
        verdict = "passed" if device["passed"] else "FAILED"
        rows.append((result["artifact"], device["runtime"], *times, *rest, shown(device["top1"], ".2%"), verdict))
    return rows
