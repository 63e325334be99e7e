"""Writes the README's tables from the records in ``docs/``, which come out of runs: ``python -m pipeline.readme``.

``docs/demo-report.json`` is the report of the demo model's bundle, refreshed from ``dist/`` where a newer one lies there;
``docs/bench/bench.json`` is what `make bench` wrote.
"""

import json
import re
import shutil

from models.errors import UserError
from pipeline.bench_report import BENCH_COLUMNS, bench_rows
from pipeline.bench_sizes import DEMO_SIZE
from pipeline.recipe import ROOT
from pipeline.table import COLUMNS, MATRIX_COLUMNS, markdown, matrix_rows, price, rows, skipped_lines

README = ROOT / "README.md"
REPORT = ROOT / "docs" / "demo-report.json"
BENCH = ROOT / "docs" / "bench" / "bench.json"
FRESH = {REPORT: ROOT / "dist" / "demo-android-bundle" / "report.json"}


def results_block(report: dict) -> str:
    """What the demo model's bundle was measured to be, on this machine and held against it on the others."""
    device = report["artifacts"][0]["devices"][0]
    timed = [{**artifact, "devices": [each for each in artifact["devices"] if not each["emulated"]]} for artifact in report["artifacts"]]
    parts = [
        price(report),
        markdown(COLUMNS, rows({**report, "artifacts": timed})),
        f"Measured by `make android-bundle` on {device['device']} ({device['isa']}, threads: {device['threads']}), medians of "
        f"{len(device['rounds'])} fresh processes. Perplexity change and top-1 are against the fp32 PyTorch model that was exported, "
        "worst of the artifact's runtimes; MB are 10^6 bytes on disk.",
    ]
    if matrix := matrix_rows(report["artifacts"]):
        parts += [
            markdown(MATRIX_COLUMNS, matrix),
            "The same artifacts on other processors, by the same command: each against itself in the same runtime on the machine above. "
            "Rows are the golden vectors' logits; top-1 and perplexity are over evaluation windows. arm64 is an emulated Cortex-A76.",
        ]
    return "\n\n".join([*parts, *skipped_lines(report["skipped"])])


def bench_block(bench: dict) -> str:
    """Each artifact of the demo model, and the peers, against eager PyTorch and fp32 ONNX Runtime."""
    demo = bench["sizes"][DEMO_SIZE]
    return f"{markdown(BENCH_COLUMNS, bench_rows(demo))}\n\n{demo['how']}"


def with_block(text: str, name: str, block: str) -> str:
    """``text`` with the part between the marks of ``name`` replaced. Raises UserError when the marks are gone."""
    pattern = re.compile(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"README.md has no <!-- {name}: ... --> block; put it back")
    return pattern.sub(lambda match: f"{match[1]}{block}\n{match[2]}", text)


def rendered(text: str) -> str:
    """The README's text with both blocks as the records in ``docs/`` give them."""
    text = with_block(text, "results", results_block(json.loads(REPORT.read_text())))
    return with_block(text, "bench", bench_block(json.loads(BENCH.read_text())))


def main() -> None:
    for kept, fresh in FRESH.items():
        if fresh.is_file():
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(fresh, kept)
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
