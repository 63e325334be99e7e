"""What a recipe may say about the exports. Light on purpose: reading a recipe must not import torch or tensorflow."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from models.settings import StageSettings


class OnnxSettings(StageSettings):
    """PyTorch to ONNX, fp32, one graph for prompt and decoding."""

    max_abs_diff: float = Field(5e-5, gt=0, description="largest allowed difference of logits to PyTorch")
    greedy_tokens: int = Field(32, ge=1, description="tokens of greedy text that must be identical to PyTorch's")


class MixedPrecisionSettings(StageSettings):
    """What a static int8 stage does where all int8 would miss its gate."""

    mixed_precision: bool = Field(
        True, description="when a target is missed on validation text, the dearest layers leave static int8 until it holds"
    )
    least_top1: float | None = Field(
        None, ge=0, le=1, description="mixed precision's target for first choices equal to fp32's; none: what the artifact's gate says"
    )
    largest_perplexity_change: float | None = Field(
        None, ge=0, description="mixed precision's target against fp32, fraction; none: what the artifact's gate says"
    )


class StaticInt8Settings(StageSettings):
    """How the ranges of static int8 activations are found."""

    calibrator: Literal["minmax", "percentile", "entropy", "mse"] = Field("minmax", description="how ranges are chosen")
    windows: int = Field(64, ge=1, description="calibration windows fed, each as prompt and as decode steps")
    decode_steps: int = Field(8, ge=1, description="decode steps with real cache fed per window")
    two_step_crest: float | None = Field(
        40.0,
        gt=0,
        description="inputs wider than this many standard deviations are quantised as value and remainder; none: never."
        " 6 is nearly all of them, 40 the inputs of gated FFNs' down projections",
    )
    reduce_range: bool = Field(False, description="7-bit weights, for x86 machines without VNNI")
    kv_cache: Literal["float32", "int8"] = Field(
        "float32",
        description="numbers of the KV cache; int8: a quarter of its memory, a scale for each channel of each head, slower prompts",
    )


class OnnxInt8Settings(MixedPrecisionSettings, StaticInt8Settings):
    """ONNX Runtime static quantisation: QDQ, unsigned activations, signed per-channel weights."""

    rounding: Literal["nearest", "compensated"] = Field(
        "compensated", description="how weights are rounded; compensated: later weights make up for the error of earlier ones"
    )
    two_step_crest: float | None = Field(6.0, gt=0, description=StaticInt8Settings.model_fields["two_step_crest"].description)
    per_channel: bool = Field(True, description="a weight scale for each output channel; false: one for each matrix")
    keep_float: tuple[str, ...] = Field((), description="layers that stay fp32, by node name or shell pattern; embedding is one of them")
    sensitivity_windows: int = Field(2, ge=1, description="validation windows on which each layer alone is measured")
    sensitivity_up_to_mb: float = Field(
        250.0,
        ge=0,
        description="fp32 models up to this size (10^6 bytes) have each layer measured alone, which takes a run of the model for each;"
        " in larger ones mixed precision chooses by the error of each layer's own output",
    )


class OnnxDynamicInt8Settings(StageSettings):
    """ONNX Runtime dynamic quantisation: int8 weights, activations quantised anew in every call."""

    per_channel: bool = Field(True, description="a weight scale for each output channel; false: one for each matrix")
    reduce_range: bool = Field(False, description="7-bit weights, for x86 machines without VNNI")


class OnnxWeightOnlySettings(StageSettings):
    """Weights in few bits, in blocks along the inputs with a scale each; activations stay fp32 (MatMulNBits)."""

    rounding: Literal["nearest", "compensated", "searched"] = Field(
        "nearest",
        description="nearest; compensated: GPTQ, later weights make up for earlier ones; searched: k-quant, the best scale per block",
    )
    windows: int = Field(64, ge=1, description="calibration windows for compensated and searched rounding")


class OnnxWeightOnlyInt8Settings(OnnxWeightOnlySettings):
    """8 bits per weight."""

    block: Literal[32, 64, 128, 256] = Field(128, description="weights that share a scale")


class OnnxWeightOnlyInt4Settings(OnnxWeightOnlySettings):
    """4 bits per weight; the embedding 8 or 4."""

    block: Literal[16, 32, 64, 128] = Field(32, description="weights that share a scale")
    rounding: Literal["nearest", "compensated", "searched"] = Field("compensated", description="as for 8 bits")
    embedding_bits: Literal[4, 8] = Field(8, description="bits of the embedding and of a head that is tied to it")


class OnnxHybridInt8Settings(StaticInt8Settings):
    """Static int8 for prompts and weight-only for single tokens, as two graphs over one file of weights: the same 8-bit numbers."""

    rounding: Literal["nearest", "compensated"] = Field("compensated", description="how weights are rounded, as for static int8")
    block: Literal[32, 64, 128, 256] = Field(128, description="weights that the decode graph reads at once; each output has one scale")


class OnnxHybridInt4Settings(StaticInt8Settings, OnnxWeightOnlyInt4Settings):
    """As the 8-bit hybrid, with 4 bits per weight; the prompt graph has the same numbers as int8."""


def as_several(value: Any) -> Any:
    """A single number is a list of one."""
    return (value,) if isinstance(value, int) else value


class TfliteSettings(StageSettings):
    """PyTorch to TFLite, fp32, signatures prefill_N for each length N of a call, and decode."""

    prefill_tokens: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(as_several), AfterValidator(lambda sizes: tuple(sorted(set(sizes))))
    ] = Field(
        (16, 64, 256),
        min_length=1,
        description="tokens per prefill call, a number or a list: a prompt goes in the calls that cost least. Each is a signature with"
        " the same weights; the Interpreter API packs them anew for each in memory, LiteRT's CompiledModel API once",
    )
    context_tokens: int = Field(512, ge=16, description="length of the KV cache in tokens")
    max_abs_diff: float = Field(5e-5, gt=0, description="largest allowed difference of logits to PyTorch")


class TfliteInt8Settings(MixedPrecisionSettings):
    """Static int8 with ai-edge-quantizer, in the form that LiteRT and tflite-runtime both run rightly."""

    windows: int = Field(16, ge=1, description="calibration windows fed through prefill and decode")
    decode_steps: int = Field(16, ge=1, description="decode steps with a filled cache fed per window")
    input_smoothing: float = Field(
        0.5, ge=0, le=1, description="share of outliers moved from the inputs of o and down projections to their weights"
    )
    dynamic: tuple[str, ...] | None = Field(
        None,
        description="linear layers, by a part of their name or a shell pattern, that quantise their inputs in each call and give float"
        " outputs; none: the head (logits) and the second projections of FFNs",
    )


class TfliteDynamicInt8Settings(StageSettings):
    """int8 weights in TFLite, activations quantised anew in every call."""


class TfliteWeightOnlyInt8Settings(StageSettings):
    """int8 weights in TFLite, made float again before each product."""


class TfliteFullInt8Settings(StageSettings):
    """Full-integer int8 for NPUs: inputs, outputs and KV cache are int8 too, through TensorFlow's own converter."""

    windows: int = Field(16, ge=1, description="calibration windows fed through prefill and decode")
    decode_steps: int = Field(16, ge=1, description="decode steps with a filled cache fed per window")
    prefill_tokens: int = Field(64, ge=1, description="tokens per prefill call; longer prompts go in chunks")
    context_tokens: int = Field(512, ge=16, description="length of the KV cache in tokens")


class TokenizerSettings(StageSettings):
    """The tokenizer as an ONNX graph."""

    random_documents: int = Field(200, ge=0, description="random Unicode documents added to the parity corpus")
    seed: int = Field(0, description="seed of the random documents")
