"""Every artifact in every runtime that runs it, on every device, judged by the recipe's gates. Never cached."""

from collections.abc import Callable
from pathlib import Path

from device_tests.devices import DRIVERS, check_address
from device_tests.devices.campaign import Limits, Outcome, Plan, run_everywhere
from device_tests.devices.job import Job, Run
from device_tests.gates import Gates as DeviceGates
from device_tests.sessions import RUNTIMES
from models.progress import meter
from pipeline.recipe import Recipe
from pipeline.report import read_json, sidecar_path
from pipeline.settings import DeviceSettings
from pipeline.stages import stages_of
from pipeline.verify import bundle_folder

NAMED_LAYERS = 3  # in the line of a failed gate


def measuring_modules() -> tuple[str, ...]:
    """The modules that decide what a measurement gives. Drivers are imported by name: no import statement leads to them."""
    return ("device_tests.__main__", *dict.fromkeys([*(driver for _, driver, *_ in RUNTIMES.values()), *DRIVERS.values()]))


def runtimes_of(sidecar: dict) -> list[str]:
    """The runtimes that an artifact is for: those that its sidecar names, else all that run its format."""
    named = sidecar.get("runtimes")
    return [name for name, (form, *_) in RUNTIMES.items() if form == sidecar["format"] and (named is None or name in named)]


def measure(recipe: Recipe, folders: dict[str, Path], work: Path, tell: Callable[[str, str], None]) -> Outcome:
    """Every artifact in every runtime on the recipe's devices: times, memory, golden vectors, quality, agreement of devices."""
    jobs, sidecars = [], {}
    for stage, name in stages_of(recipe.artifacts).items():
        sidecar = sidecar_path(folders, stage)
        sidecars[name] = read_json(sidecar)
        gates = DeviceGates(**getattr(recipe.gates, name).model_dump())
        for runtime in runtimes_of(sidecars[name]):
            jobs.append(Job(sidecar, folders["golden"], Run(runtime, recipe.device.threads, gates, quality=True)))
    outcome = run_with_bar(jobs, plan_of(recipe.device, work), tell)
    outcome.results = [with_dearest(result, sidecars[result["artifact"]]) for result in outcome.results]
    return outcome


def run_with_bar(jobs: list[Job], plan: Plan, tell: Callable[[str, str], None]) -> Outcome:
    """Every job on every device, with a bar of the runs that are done."""
    with meter("measuring", plan.runs(len(jobs))) as move_on:
        return run_everywhere(jobs, plan, tell, lambda: move_on(1))


def check_devices(recipe: Recipe) -> None:
    """DeviceTestError for a device's address that says nothing: told before the stages run."""
    for address in recipe.device.devices:
        check_address(address)


def plan_of(settings: DeviceSettings, work: Path) -> Plan:
    """The recipe's devices as a plan; emulated ones are kept under ``work``."""
    limits = Limits(settings.same_top1, settings.same_perplexity)
    return Plan(settings.devices, settings.rounds, settings.emulated_windows, limits, work)


def with_dearest(result: dict, sidecar: dict) -> dict:
    """The same result; where it failed, each failure also names the layers that cost most, if they were measured."""
    found = (sidecar["measured"].get(part, {}).get("layers") for part in ("sensitivity", "mixed_precision"))
    costs = next((layers for layers in found if layers), None)
    if result["device"]["passed"] or not costs:
        return result
    dearest = ", ".join(f"{layer['name']} (KL {layer['kl']:.1e})" for layer in costs[:NAMED_LAYERS])
    failures = [f"{failure}; dearest layers as int8: {dearest}" for failure in result["device"]["failures"]]
    return {**result, "device": {**result["device"], "failures": failures}}


def measure_bundle(path: Path, settings: DeviceSettings, work: Path, tell: Callable[[str, str], None]) -> Outcome:
    """Times, memory and golden vectors of every artifact of a bundle on devices, against the gates in its manifest.

    Raises GateError, and opens nothing, when a byte of the bundle is not as it was built.
    """
    with bundle_folder(path) as (folder, manifest):
        jobs = []
        for artifact in manifest.artifacts:
            for runtime in dict.fromkeys(device.runtime for device in artifact.runtimes):
                run = Run(runtime, settings.threads, DeviceGates(**artifact.gates))
                jobs.append(Job(folder / artifact.sidecar, folder / "golden", run))
        return run_with_bar(jobs, plan_of(settings, work), tell)
