"""Each artifact against eager PyTorch and fp32 ONNX Runtime: interleaved rounds of one run, medians, and ratios.

A noisy machine slows all rows of a round alike, so ratios of one run hold where absolute times do not.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device_tests.devices.local import Run, child_environment, run_local
from models.errors import GateError
from pipeline.measure import runtimes_of
from pipeline.report import read_json, sidecar_path
from pipeline.stages import ARTIFACT_OF_STAGE

BENCH_COLUMNS = (
    "row", "threads", "MB", "first token ms", "x PyTorch", "x fp32 ORT", "decode tokens/s", "x PyTorch", "x fp32 ORT", "spread", "peak MB",
)  # fmt: skip
TORCH = "PyTorch eager fp32"
FP32 = "onnx_fp32 in onnxruntime"
MUST_BE_FASTER = {
    "onnx_static_int8 in onnxruntime": "onnx_fp32 in onnxruntime",
    "tflite_static_int8 in litert": "tflite_fp32 in litert",
}
LARGEST_SHARE_OF_FP32_BYTES = 0.28


@dataclass(frozen=True)
class BenchPlan:
    """How much is run: every row at every thread count, ``rounds`` times, ``decode_tokens`` single tokens each."""

    threads: tuple[int, ...] = (1,)
    rounds: int = 3
    decode_tokens: int = 64


def bench(folders: dict[str, Path], plan: BenchPlan, tell: Callable[[str, str], None]) -> dict:
    """Time all rows. Returns ``{"how", "rows": [...], "rounds"}``; rows carry every round's numbers and their medians."""
    sidecars = {name: sidecar_path(folders, stage) for stage, name in ARTIFACT_OF_STAGE.items() if stage in folders}
    entries = [(TORCH, None, "")]
    for name, sidecar in sidecars.items():
        entries += [(f"{name} in {runtime}", sidecar, runtime) for runtime in runtimes_of(read_json(sidecar))]
    found: dict[tuple[str, int], list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        prompt = golden_prompt(folders["golden"], Path(scratch))
        for turn in range(plan.rounds):
            tell(f"round {turn + 1}", f"of {plan.rounds}")
            for threads in plan.threads:
                for label, sidecar, runtime in entries:
                    if sidecar is None:
                        timing = time_torch(folders["smooth"], prompt, threads, plan)
                    else:
                        run = Run(runtime=runtime, threads=threads, decode_tokens=plan.decode_tokens)
                        timing = timed(run_local(sidecar, folders["golden"], run))
                    found.setdefault((label, threads), []).append(timing)
    bytes_of = {TORCH: sum(file.stat().st_size for file in folders["smooth"].glob("*.safetensors"))}
    bytes_of |= {label: read_json(sidecar)["bytes"] for label, sidecar, _ in entries if sidecar}
    rows = [row_of(label, threads, bytes_of[label], timings) for (label, threads), timings in found.items()]
    return {"how": how(plan, found), "rounds": plan.rounds, "rows": rows}


def golden_prompt(golden: Path, scratch: Path) -> Path:
    """The prompt that device tests time, as a file of its own."""
    with np.load(golden / "golden.npz", allow_pickle=False) as vectors:
        prompt = vectors["windows"][0][: int(vectors["prompt_tokens"])]
    np.save(scratch / "prompt.npy", prompt)
    return scratch / "prompt.npy"


def time_torch(model: Path, prompt: Path, threads: int, plan: BenchPlan) -> dict:
    """Timing of the exported model in eager PyTorch, in a fresh process."""
    command = [sys.executable, "-m", "pipeline.torch_session", str(model), str(prompt), str(plan.decode_tokens), str(threads)]
    done = subprocess.run(command, env=child_environment(threads), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"eager PyTorch could not be timed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def timed(result: dict) -> dict:
    """The device part of a result. GateError when the artifact did not run to its end."""
    if result["device"]["first_token_ms"] is None:
        raise GateError(f"bench: {'; '.join(result['device']['failures'])}")
    return result["device"]


def row_of(label: str, threads: int, size: int, timings: list[dict]) -> dict:
    """Medians over the rounds; ``spread`` is (largest - smallest) / median of decode tokens/s."""
    decode = [timing["decode_tokens_per_s"] for timing in timings]
    return {
        "row": label,
        "threads": threads,
        "bytes": size,
        "first_token_ms": statistics.median(timing["first_token_ms"] for timing in timings),
        "decode_tokens_per_s": statistics.median(decode),
        "decode_spread": (max(decode) - min(decode)) / statistics.median(decode),
        "peak_rss_mb": statistics.median(timing["peak_rss_mb"] for timing in timings),
        "rounds": [{key: timing[key] for key in ("first_token_ms", "decode_tokens_per_s", "load_ms", "peak_rss_mb")} for timing in timings],
    }


def how(plan: BenchPlan, found: dict) -> str:
    """One sentence that says how the numbers came about."""
    prompt = next(iter(found.values()))[0]["prompt_tokens"]
    return (
        f"Measured by `make bench`: medians of {plan.rounds} interleaved rounds, a fresh process per row and round, a prompt of "
        f"{prompt} tokens and {plan.decode_tokens} single tokens after warm-up; MB are 10^6 bytes, `x` says how many times as fast; "
        "spread is (most - least) / median of decode tokens/s."
    )


def bench_rows(found: dict) -> list[tuple[str, ...]]:
    """The rows as text, with ratios against PyTorch and fp32 ONNX Runtime at the same number of threads."""
    base = {(row["row"], row["threads"]): row for row in found["rows"]}
    lines = []
    for row in found["rows"]:
        torch_row, fp32_row = base[TORCH, row["threads"]], base[FP32, row["threads"]]
        first = [f"{other['first_token_ms'] / row['first_token_ms']:.2f}" for other in (torch_row, fp32_row)]
        decode = [f"{row['decode_tokens_per_s'] / other['decode_tokens_per_s']:.2f}" for other in (torch_row, fp32_row)]
        lines.append(
            (
                row["row"],
                str(row["threads"]),
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['first_token_ms']:.2f}",
                *first,
                f"{row['decode_tokens_per_s']:.0f}",
                *decode,
                f"{row['decode_spread']:.0%}",
                f"{row['peak_rss_mb']:.0f}",
            )  # fmt: skip
        )
    return lines


def missed(found: dict) -> list[str]:
    """What int8 promises and does not hold in this run: faster than its fp32 sibling in both phases, and far smaller."""
    base = {(row["row"], row["threads"]): row for row in found["rows"]}
    lines = []
    for int8, fp32 in MUST_BE_FASTER.items():
        for threads in sorted({row["threads"] for row in found["rows"]}):
            small, large = base[int8, threads], base[fp32, threads]
            ratios = {
                "first token": large["first_token_ms"] / small["first_token_ms"],
                "decode": small["decode_tokens_per_s"] / large["decode_tokens_per_s"],
            }
            lines += [
                f"{int8}, {threads} threads: {phase} {ratio:.2f} x fp32, must be over 1" for phase, ratio in ratios.items() if ratio <= 1
            ]
        share = base[int8, threads]["bytes"] / base[fp32, threads]["bytes"]
        if share >= LARGEST_SHARE_OF_FP32_BYTES:
            lines.append(f"{int8}: {share:.3f} of the bytes of fp32, must be under {LARGEST_SHARE_OF_FP32_BYTES}")
    return lines
