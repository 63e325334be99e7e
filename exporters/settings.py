"""What a recipe may say about the exports. Light on purpose: reading a recipe must not import torch or tensorflow."""

from typing import Literal

from pydantic import Field

from models.settings import StageSettings


class OnnxSettings(StageSettings):
    """PyTorch to ONNX, fp32, one graph for prompt and decoding."""

    max_abs_diff: float = Field(5e-5, gt=0, description="largest allowed difference of logits to PyTorch")
    greedy_tokens: int = Field(32, ge=1, description="tokens of greedy text that must be identical to PyTorch's")


class OnnxInt8Settings(StageSettings):
    """ONNX Runtime static quantisation: QDQ, unsigned activations, signed per-channel weights."""

    calibrator: Literal["minmax", "percentile", "entropy"] = Field("minmax", description="how ranges are chosen")
    windows: int = Field(64, ge=1, description="calibration windows fed, each as prompt and as decode steps")
    decode_steps: int = Field(8, ge=1, description="decode steps with real cache fed per window")
    rounding: Literal["nearest", "compensated"] = Field(
        "compensated", description="how weights are rounded; compensated: later weights make up for the error of earlier ones"
    )
    two_step_crest: float | None = Field(
        6.0,
        gt=0,
        description="inputs wider than this many standard deviations are quantised as value and remainder; none: never."
        " 6 is nearly all of them, 40 the inputs of gated FFNs' down projections",
    )
    reduce_range: bool = Field(False, description="7-bit weights, for x86 machines without VNNI")


class TfliteSettings(StageSettings):
    """PyTorch to TFLite, fp32, signatures prefill and decode."""

    prefill_tokens: int = Field(64, ge=1, description="tokens per prefill call; longer prompts go in chunks")
    context_tokens: int = Field(512, ge=16, description="length of the KV cache in tokens")
    max_abs_diff: float = Field(5e-5, gt=0, description="largest allowed difference of logits to PyTorch")


class TfliteInt8Settings(StageSettings):
    """Static int8 with ai-edge-quantizer, in the form that LiteRT and tflite-runtime both run rightly."""

    windows: int = Field(16, ge=1, description="calibration windows fed through prefill and decode")
    decode_steps: int = Field(16, ge=1, description="decode steps with a filled cache fed per window")
    input_smoothing: float = Field(
        0.5, ge=0, le=1, description="share of outliers moved from the inputs of o and down projections to their weights"
    )


class TokenizerSettings(StageSettings):
    """The tokenizer as an ONNX graph."""

    random_documents: int = Field(200, ge=0, description="random Unicode documents added to the parity corpus")
    seed: int = Field(0, description="seed of the random documents")
