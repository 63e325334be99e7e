"""Stage tflite_weight_only_int8: int8 weights that the runtime makes float again when it loads them; all computing stays float.

The weights have a scale per channel: DEQUANTIZE gets those right in LiteRT and in tflite-runtime 2.14, unlike the int8 kernels.
Measured on the demo model (1290 tokens, both runtimes alike): one scale per tensor KL 9.0e-4, perplexity +0.24 %; per channel
KL 2.1e-4, and over 5160 tokens perplexity +0.01 % with a standard error of 0.03. It makes the
download small, and neither speed nor memory better than the float file's.
"""

from pathlib import Path

from exporters.settings import TfliteWeightOnlyInt8Settings
from exporters.tflite_weights import Kind, export

KIND = Kind("tflite_weight_only_int8", dequantised=True)


def run(settings: TfliteWeightOnlyInt8Settings, out: Path, tflite: Path, text: Path) -> None:
    """Write ``tflite_weight_only_int8.tflite`` and its sidecar. GateError where a weight stayed float or no runtime is right."""
    export(KIND, settings, out, tflite, text)
