"""What artifacts are held against: the golden stage's files, where they are, and whether an artifact belongs to them."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from device_tests.artifact import Interface
from device_tests.errors import DeviceTestError
from device_tests.vectors import Vectors, open_evaluation, open_golden
from exporters.artifact import checkpoint_sha256
from models.errors import UserError
from models.provenance import sha256_of
from pipeline.recipe import Recipe
from pipeline.runner import RECORD, plan
from pipeline.stages import ARTIFACT_OF_STAGE, STAGES

PROVED = "exported from the reference"
SAME_VECTORS = "its bundle has the reference's golden vectors"
UNPROVED = "same sizes; that it was exported from the reference is not proved"


@dataclass(frozen=True)
class Reference:
    """A golden stage's folder.

    ``record`` is its golden.json; ``exported`` the SHA-256 of the model whose answers it holds, or None where that model is not
    there any more; ``tokenizer`` the tokenizer.json of its checkpoint, where there is one.
    """

    folder: Path
    record: dict
    evaluation: Vectors
    exported: str | None
    tokenizer: Path | None

    def check(self, interface: Interface) -> None:
        """UserError when an artifact has other sizes than the model whose answers these are."""
        try:
            open_golden(self.folder, interface)
            open_evaluation(self.folder, interface)
        except DeviceTestError as error:
            raise UserError(str(error)) from error


def find_reference(recipe: Recipe, work: Path) -> Path:
    """The golden stage's result for a recipe. UserError where it was not run: nothing is run here."""
    golden = next(item for item in plan(recipe, work) if item.stage.name == "golden")
    if not golden.cached:
        raise UserError(
            f"{work}: this recipe's reference is not there ({golden.reasons[0]}); run `pocketlm run` with the same options first, "
            "or give --golden FOLDER"
        )
    return golden.folder


def read_reference(folder: Path) -> Reference:
    """A folder with golden.json, golden.npz and evaluation.npz. UserError says which is missing."""
    for name in ("golden.json", "golden.npz", "evaluation.npz"):
        if not (folder / name).is_file():
            hint = "; a bundle has none" if name == "evaluation.npz" else ""
            raise UserError(f"{folder}: no {name} in it{hint}; give the folder of a golden stage, such as .pocketlm/golden/<key>")
    record = json_object(folder / "golden.json")
    if not {"reference", "exported", "top_k"} <= record.keys():
        raise UserError(f"{folder / 'golden.json'}: not what the golden stage writes; run `pocketlm run` again")
    inputs = inputs_of(folder)
    exported = inputs.get("exported")
    has_weights = exported is not None and any(exported.glob("*.safetensors"))
    tokenizer = inputs["checkpoint"] / "tokenizer.json" if "checkpoint" in inputs else None
    return Reference(
        folder=folder,
        record=record,
        evaluation=evaluation_of(folder, record),
        exported=checkpoint_sha256(exported) if has_weights else None,
        tokenizer=tokenizer if tokenizer is not None and tokenizer.is_file() else None,
    )


def evaluation_of(folder: Path, record: dict) -> Vectors:
    """The evaluation windows, checked against the sizes that golden.json states of its model."""
    try:
        sizes = {field.name: record["exported"]["shape"].get(field.name) for field in fields(Interface)}
        return open_evaluation(folder, Interface(**sizes))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'golden.json'}: no sizes of its model in it; run `pocketlm run` again") from error
    except DeviceTestError as error:
        raise UserError(str(error)) from error


def json_object(path: Path) -> dict:
    """A JSON object from a file. UserError when it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no JSON that can be read ({error}); give the JSON beside a model file") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: holds no JSON object; give the JSON beside a model file")
    return record


def inputs_of(folder: Path) -> dict[str, Path]:
    """The stage results that a stage result was made from, by keyword; empty for a folder that no stage wrote."""
    if not (folder / RECORD).is_file():
        return {}
    record = json_object(folder / RECORD)
    stages = {stage.name: stage for stage in STAGES}
    if record.get("stage") not in stages:
        return {}
    known, keys = stages[record["stage"]].inputs, record["parts"]["inputs"]
    work = folder.resolve().parent.parent
    return {keyword: work / known[keyword] / key for keyword, key in keys.items() if keyword in known}


def exported_from(sidecar: Path) -> str | None:
    """SHA-256 of the checkpoint at the end of an artifact's chain of parents, or None where the chain is broken."""
    record = json_object(sidecar)
    if record.get("name") in exported_directly():
        return record.get("parent")
    folders = [sidecar.parent, *inputs_of(sidecar.parent).values()]
    for candidate in sorted(path for folder in folders for path in folder.glob("*.json") if path != sidecar):
        try:
            found = json_object(candidate)
        except UserError:  # a neighbour that is no sidecar is none of ours
            continue
        if "parent" in found and found.get("sha256") == record.get("parent"):
            return exported_from(candidate)
    return None


def exported_directly() -> set[str]:
    """Artifacts that are made from a checkpoint, not from another artifact."""
    return {ARTIFACT_OF_STAGE[stage.name] for stage in STAGES if stage.artifact and "model" in stage.inputs}


def belongs(sidecar: Path, reference: Reference) -> str:
    """How well it is known that an artifact was exported from the reference. UserError when it was exported from another model."""
    source = exported_from(sidecar)
    if source is not None and reference.exported is not None:
        if source == reference.exported:
            return PROVED
        raise UserError(
            f"{sidecar}: exported from another model than {reference.folder} holds the answers of; "
            "give the --golden, or the recipe, of the run that made it"
        )
    vectors = sidecar.resolve().parent.parent / "golden" / "golden.npz"  # where a bundle has them
    if vectors.is_file() and sha256_of(vectors) == sha256_of(reference.folder / "golden.npz"):
        return SAME_VECTORS
    return UNPROVED
