"""The road, read top to bottom: every stage, the module that runs it, and the stages whose results it is given."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One step of the road.

    ``name`` is also the recipe's table; ``module`` has ``run(settings, out, **inputs)``; ``inputs`` maps the keyword of
    ``run`` to the stage that fills it; ``content`` names settings that are paths: what they point to counts, not the path.
    """

    name: str
    module: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    content: tuple[str, ...] = ()


STAGES = (
    Stage("checkpoint", "models.checkpoint", content=("source",)),
    Stage("text", "models.text", {"checkpoint": "checkpoint"}, content=("calibration", "evaluation")),
    Stage("prune", "pipeline.prune", {"checkpoint": "checkpoint", "text": "text"}),
    Stage("recover", "pipeline.recover", {"checkpoint": "checkpoint", "prune": "prune", "text": "text"}),
    Stage("smooth", "pipeline.smooth", {"recover": "recover", "text": "text"}),
    Stage("golden", "pipeline.golden", {"checkpoint": "checkpoint", "recover": "recover", "smooth": "smooth", "text": "text"}),
    Stage("onnx", "exporters.onnx_export", {"smooth": "smooth", "text": "text"}),
    Stage("onnx_int8", "exporters.onnx_int8", {"onnx": "onnx", "text": "text"}),
    Stage("tflite", "exporters.tflite_export", {"smooth": "smooth", "text": "text"}),
    Stage("tflite_int8", "exporters.tflite_int8", {"tflite": "tflite", "text": "text"}),
    Stage("tokenizer", "exporters.tokenizer_graph", {"checkpoint": "checkpoint", "text": "text"}),
)
ARTIFACT_STAGES = ("onnx", "onnx_int8", "tflite", "tflite_int8")
