"""The models that the benchmark measures: the demo model, and published shapes with random weights made on the spot."""

import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from device_tests.devices.job import how_it_ended
from device_tests.devices.local import child_environment
from models.errors import StageDied, UserError
from pipeline.fingerprint import text_sha256
from pipeline.fit_shape import config_of
from pipeline.recipe import DEMO_TEXTS, Recipe, load_recipe
from pipeline.stages import ARTIFACT_OF_STAGE
from pipeline.whole_folder import made_whole

SIZES = Path(__file__).parent / "presets" / "bench_sizes.toml"
SHARED = ("every", "random")  # tables that are no size
DEMO_SIZE = "demo"


@dataclass(frozen=True)
class Size:
    """A model to measure: ``config`` is a preset's name, None for the demo model; ``settings`` go over the recipe.

    ``limit_s`` is what one process of a row may take, ``only`` bounds its rows as --only does.
    """

    name: str
    about: str
    config: str | None
    settings: tuple[str, ...]
    limit_s: float
    only: tuple[str, ...]


@cache
def table() -> dict:
    return tomllib.loads(SIZES.read_text(encoding="utf-8"))


def size_named(name: str) -> Size:
    """UserError for a size that there is not."""
    names = [known for known in table() if known not in SHARED]
    if name not in names:
        raise UserError(f"--size {name}: no such size; give one of {', '.join(names)}")
    entry, config = table()[name], table()[name].get("config")
    shared = [*table()["every"]["settings"], *(table()["random"]["settings"] if config else [])]
    return Size(name, entry["about"], config, (*shared, *entry["settings"]), float(entry["limit_s"]), tuple(entry.get("only", ())))


def recipe_of(size: Size, work: Path, overrides: list[str]) -> Recipe:
    """The recipe that makes every artifact of a size; ``overrides`` of the command line come last."""
    artifacts = f"artifacts={json.dumps(list(ARTIFACT_OF_STAGE.values()))}"
    if size.config is None:
        return load_recipe(None, [artifacts, *size.settings, *overrides])
    return load_recipe(None, [artifacts, *with_random_weights(size.name, size.config, work), *size.settings, *overrides])


def with_random_weights(name: str, preset: str, work: Path) -> list[str]:
    """Settings of a recipe called ``name`` that begins with random weights of a preset's shape, and has the demo's texts."""
    given = {"name": name, "checkpoint.source": random_checkpoint(preset, work / "bench")}
    given |= {f"text.{part}": path for part, path in DEMO_TEXTS.items()}
    return [f"{key}={json.dumps(str(value))}" for key, value in given.items()]


def random_config(preset: str) -> dict:
    """The preset's config with the benchmark's context and the ids of the demo model's tokenizer, which goes with it."""
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return {**config_of(preset), "max_position_embeddings": table()["every"]["context_tokens"], **ends}


def random_checkpoint(preset: str, place: Path) -> Path:
    """A Hugging Face folder under ``place`` with the preset's shape, weights drawn as for training, and the demo's tokenizer.

    Made once for each config, in a process of its own; it is there whole or not at all.
    """
    config = json.dumps(random_config(preset), sort_keys=True)
    folder = place.resolve() / f"{preset}-{text_sha256(config)[:12]}"
    if folder.is_dir():
        return folder
    with made_whole(folder) as draft:
        command = [sys.executable, "-m", "pipeline.bench_random", config, str(draft)]
        done = subprocess.run(command, env=child_environment(1), capture_output=True, text=True, check=False)
        if done.returncode:
            reason = how_it_ended(done.returncode, done.stderr, 0)
            raise StageDied(f"random weights for {preset}: {reason}; a smaller --size needs less memory")
    return folder
