"""The road, read top to bottom: every stage, the module that runs it, and the stages whose results it is given."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One step of the road.

    ``name`` is also the recipe's table; ``module`` has ``run(settings, out, **inputs)``; ``inputs`` maps the keyword of
    ``run`` to the stage that fills it; ``content`` names settings that are paths: what they point to counts, not the path.
    ``artifact`` names what the stage makes for devices, if anything: such a stage runs only where the recipe wants it, or
    where another such stage needs it.
    """

    name: str
    module: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    content: tuple[str, ...] = ()
    artifact: str | None = None


EXPORTED = {"model": "cluster", "text": "text"}
FROM_ONNX = {"onnx": "onnx", "text": "text"}
FROM_TFLITE = {"tflite": "tflite", "text": "text"}
STAGES = (
    Stage("checkpoint", "models.checkpoint", content=("source",)),
    Stage("text", "models.text", {"checkpoint": "checkpoint"}, content=("calibration", "evaluation")),
    Stage("prune", "pipeline.prune", {"checkpoint": "checkpoint", "text": "text"}),
    Stage("recover", "pipeline.recover", {"checkpoint": "checkpoint", "prune": "prune", "text": "text"}),
    Stage("smooth", "pipeline.smooth", {"recover": "recover", "text": "text"}),
    Stage("cluster", "pipeline.cluster", {"smooth": "smooth"}),
    Stage("golden", "pipeline.golden", {"checkpoint": "checkpoint", "recover": "recover", "exported": "cluster", "text": "text"}),
    Stage("onnx", "exporters.onnx_export", EXPORTED, artifact="onnx_fp32"),
    Stage("onnx_int8", "exporters.onnx_int8", FROM_ONNX, artifact="onnx_static_int8"),
    Stage("onnx_dynamic_int8", "exporters.onnx_dynamic_int8", FROM_ONNX, artifact="onnx_dynamic_int8"),
    Stage("onnx_weight_only_int8", "exporters.onnx_weight_only_int8", FROM_ONNX, artifact="onnx_weight_only_int8"),
    Stage("onnx_weight_only_int4", "exporters.onnx_weight_only_int4", FROM_ONNX, artifact="onnx_weight_only_int4"),
    Stage("onnx_hybrid_int8", "exporters.onnx_hybrid_int8", FROM_ONNX, artifact="onnx_hybrid_int8"),
    Stage("onnx_hybrid_int4", "exporters.onnx_hybrid_int4", FROM_ONNX, artifact="onnx_hybrid_int4"),
    Stage("tflite", "exporters.tflite_export", EXPORTED, artifact="tflite_fp32"),
    Stage("tflite_int8", "exporters.tflite_int8", FROM_TFLITE, artifact="tflite_static_int8"),
    Stage("tflite_dynamic_int8", "exporters.tflite_dynamic_int8", FROM_TFLITE, artifact="tflite_dynamic_int8"),
    Stage("tflite_weight_only_int8", "exporters.tflite_weight_only_int8", FROM_TFLITE, artifact="tflite_weight_only_int8"),
    Stage("tflite_full_int8", "exporters.tflite_full_int8", EXPORTED, artifact="tflite_full_int8"),
    Stage("tokenizer", "exporters.tokenizer_graph", {"checkpoint": "checkpoint", "text": "text"}),
)
ARTIFACT_OF_STAGE = {stage.name: stage.artifact for stage in STAGES if stage.artifact}


def needed(stages: Iterable[Stage], artifacts: Iterable[str]) -> tuple[Stage, ...]:
    """The stages that lead to ``artifacts``, and all that make none, in order."""
    stages, wanted = tuple(stages), set(artifacts)
    return leading_to(stages, (stage.name for stage in stages if stage.artifact is None or stage.artifact in wanted))


def leading_to(stages: Iterable[Stage], goals: Iterable[str]) -> tuple[Stage, ...]:
    """The stages named ``goals`` and all that they need, in order."""
    stages, kept = tuple(stages), set(goals)
    for stage in reversed(stages):  # a stage stands behind those that it needs
        if stage.name in kept:
            kept.update(stage.inputs.values())
    return tuple(stage for stage in stages if stage.name in kept)


def stages_of(artifacts: Iterable[str]) -> dict[str, str]:
    """Artifact by the stage that makes it, for those of ``artifacts``, in the road's order."""
    wanted = set(artifacts)
    return {stage: artifact for stage, artifact in ARTIFACT_OF_STAGE.items() if artifact in wanted}
