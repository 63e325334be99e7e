"""Stage tflite_dynamic_int8: int8 weights, activations quantised by the runtime in every call. No calibration text is needed.

The weights have one scale per tensor, since tflite-runtime 2.14 returns zeros for a dynamic product or lookup with scales per
channel, without a word. So that this does not cost what it usually costs, each row is divided by its largest magnitude first
and the result multiplied by it in float: the numbers stored are those of scales per channel, in a form that both runtimes run.
Measured on the demo model (1290 tokens, LiteRT): one scale per tensor KL 1.3e-3, top-1 97.7 %; with rows scaled KL 5.7e-4, 98.4 %;
scales per channel KL 5.5e-4, 98.8 % in LiteRT (no difference beyond chance) and all zeros in tflite-runtime. The
multiplications take 3 % of a decode step. Against float a decode step takes half the time in LiteRT and the same in
tflite-runtime 2.14, where a prompt takes 2.7 times as long: it has no fast kernel for these products.
"""

from pathlib import Path

from exporters.settings import TfliteDynamicInt8Settings
from exporters.tflite_weights import Kind, export

KIND = Kind("tflite_dynamic_int8", dequantised=False)


def run(settings: TfliteDynamicInt8Settings, out: Path, tflite: Path, text: Path) -> None:
    """Write ``tflite_dynamic_int8.tflite`` and its sidecar. GateError where a weight stayed float or no runtime is right."""
    export(KIND, settings, out, tflite, text)
