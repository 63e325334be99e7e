"""What a bundle says of rights: ``LICENSE`` of the model, and ``NOTICE``, which tells whose each part is and where it came from."""

import importlib.metadata
from pathlib import Path

from pipeline.manifest import Manifest
from pipeline.rendering import environment
from pipeline.report import Report

LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "COPYING*")
NOTICE_PATTERNS = ("NOTICE*",)
PROGRAM_FOLDERS = ("device_tests", "android", "python")


def write_licence(checkpoint: Path, target: Path, stated: str | None) -> str:
    """The model's licence texts as one file; where it has none, what is known of it. Returns its name or ``unknown``."""
    texts = found(checkpoint, LICENCE_PATTERNS)
    if texts:
        target.write_bytes(b"\n".join(path.read_bytes().rstrip() + b"\n" for path in texts))
    elif stated:
        text = f"The model's card states the licence {stated}; the checkpoint came without its text.\n"
        target.write_text(text, encoding="utf-8")
    else:
        target.write_text("The licence of this model is unknown: ask whoever made it before you ship it.\n", encoding="utf-8")
    return stated or ("see LICENSE" if texts else "unknown")


def found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def notice(manifest: Manifest, report: Report, bundle: Path, checkpoint: Path) -> str:
    """The text of NOTICE; the checkpoint's own notices are carried on."""
    of_role = {role: [file.path for file in manifest.files if file.role == role] for role in ("artifact", "tokenizer")}
    template = environment().get_template("notice.j2")
    return template.render(
        name=manifest.name,
        model=report.model,
        model_files=[path for path in of_role["artifact"] if not path.endswith(".json")],
        tokenizer_files=of_role["tokenizer"],
        licence=manifest.licence,
        changes=changes(report, manifest),
        text=text_source(report),
        program_folders=[f"{folder}/" for folder in PROGRAM_FOLDERS if (bundle / folder).is_dir()],
        version=importlib.metadata.version("pocketlm"),
        notices=[path.read_text(encoding="utf-8", errors="replace").strip() for path in found(checkpoint, NOTICE_PATTERNS)],
    )


def changes(report: Report, manifest: Manifest) -> list[str]:
    """What was done to the model's weights, as Apache-2.0 and other licences ask to be told."""
    done = []
    if report.pruned.parameters < report.model.parameters:
        done.append(f"pruned from {report.model.parameters} to {report.pruned.parameters} parameters")
    if report.pruned.sparsity >= 0.005:  # a few weights are zero in any model
        done.append(f"{report.pruned.sparsity:.0%} of the remaining weights of its linear layers set to zero")
    if report.recovery.kept != "before":
        done.append("trained on by distillation from the original")
    if report.clusters:
        done.append("weights clustered")
    return [*done, f"exported as {', '.join(artifact.name for artifact in manifest.artifacts)}"]


def text_source(report: Report) -> str:
    """Where the evaluation text came from, whose owner has rights in it."""
    text = report.text["evaluation"]
    if text.get("kind") != "file":
        return "The dense model wrote that text itself."
    return f"It is {text.get('name', 'a text')} as whoever built the bundle gave it; its authors keep their rights in it."
