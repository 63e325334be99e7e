"""``MODEL_CARD.md`` of a bundle, in the Hugging Face hub's format: metadata that the hub reads, and text for people."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipeline.bundle_licences import changes
from pipeline.manifest import Manifest
from pipeline.rendering import TEMPLATES
from pipeline.report import Report

CARD = "MODEL_CARD.md"
LIBRARY_OF_FORMAT = {"onnx": "onnx", "tflite": "tflite"}
LOCAL_IMAGE = re.compile(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n?")
UNKNOWN = "unknown"  # the hub's own word


def model_card(manifest: Manifest, report: Report, checkpoint: Path) -> str:
    """The card; the text of the checkpoint's own card, if it has one, is at its end."""
    card = ModelCard.from_template(
        card_data(manifest, report),
        template_path=str(TEMPLATES / "model_card.md.j2"),
        name=manifest.name,
        parameters=report.pruned.parameters,
        dense_parameters=report.model.parameters,
        context_tokens=manifest.context_tokens,
        source=report.model.source,
        commit=report.model.commit,
        changes=changes(report, manifest),
        tokens=report.reference.tokens,
        text=text_of(report),
        dense_perplexity=report.reference.perplexity,
        perplexity=report.pruned.perplexity,
        change=percent(report.pruned.perplexity_change),
        artifacts=[
            {
                "file": artifact.file,
                "perplexity": "–" if not artifact.quality or artifact.quality.perplexity is None else f"{artifact.quality.perplexity:.3f}",
                "change": percent(artifact.quality.perplexity_change if artifact.quality else None),
            }
            for artifact in manifest.artifacts
        ],
        original=original_text(checkpoint),
    )
    return str(card).rstrip() + "\n"


def card_data(manifest: Manifest, report: Report) -> ModelCardData:
    """What the hub reads: licence, where the model comes from if that is on the hub, and its perplexity."""
    result = EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=text_of(report),
        metric_type="perplexity",
        metric_name="perplexity of the exported model in fp32",
        metric_value=round(report.pruned.perplexity, 3),
    )
    formats = dict.fromkeys(artifact.format for artifact in manifest.artifacts)
    return ModelCardData(
        model_name=manifest.name,
        license=UNKNOWN if manifest.licence in (UNKNOWN, "see LICENSE") else manifest.licence,
        base_model=report.model.source if report.model.commit else None,  # a commit: it came from the hub
        pipeline_tag="text-generation",
        library_name=LIBRARY_OF_FORMAT[next(iter(formats))],
        tags=[*formats, "android", "on-device"],
        eval_results=[result],
    )


def original_text(checkpoint: Path) -> str | None:
    """The card that the checkpoint came with, without its metadata and without images of files that stayed at the source."""
    path = checkpoint / "README.md"
    if not path.is_file():
        return None
    text = ModelCard(path.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True).text.strip()
    text = LOCAL_IMAGE.sub("", text)
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines()) or None


def text_of(report: Report) -> str:
    text = report.text["evaluation"]
    return str(text.get("name", "a text")) if text.get("kind") == "file" else "text that the dense model wrote itself"


def percent(change: float | None) -> str:
    return "–" if change is None else f"{change:+.2%}"
