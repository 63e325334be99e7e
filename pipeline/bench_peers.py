"""The benchmark's rows of other projects: each peer that is installed converts the checkpoint in its own environment, once."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from device_tests.devices.job import how_it_ended
from device_tests.devices.local import child_environment
from exporters.artifact import checkpoint_sha256
from exporters.bytes_read import onnx_bytes
from pipeline.bench_rows import PEER, Row, matches
from pipeline.fingerprint import code_of, library_versions, text_sha256
from pipeline.peers.table import Peer, peers
from pipeline.whole_folder import made_whole

CONVERTED = "converted.json"
HOW_TO_INSTALL = "not installed; run: make bench-peers"
CONVERSION_LIMIT_S = 3600.0


@dataclass(frozen=True)
class Conversion:
    """What one variant of a peer is made from, and where to. ``threads`` are those of the conversion."""

    peer: Peer
    variant: str
    checkpoint: Path
    work: Path
    threads: int

    @property
    def label(self) -> str:
        return f"{self.peer.title} {self.variant}"

    @property
    def python(self) -> str:
        return str(self.peer.python(self.work)) if self.peer.packages else sys.executable

    @property
    def folder(self) -> Path:
        """Changes with the checkpoint, the pins, the options, and the code that converts."""
        parts = [checkpoint_sha256(self.checkpoint), self.peer.wanted, self.peer.variants[self.variant], code_of(self.peer.module)[0]]
        key = text_sha256(json.dumps([*parts, self.versions() if not self.peer.packages else {}], sort_keys=True))[:16]
        return self.work.resolve() / "bench" / "peers" / self.peer.name / key

    def versions(self) -> dict[str, str] | None:
        """Of the peer's environment; None where it is not installed."""
        if self.peer.packages:
            return self.peer.versions(self.work)
        return library_versions(code_of(self.peer.module)[1])


def peer_rows(checkpoint: Path, work: Path, only: tuple[str, ...], tell: Callable[[str, str], None], threads: int) -> list[Row]:
    """One row for each variant of each peer that was asked for; what cannot be run says why, and is there all the same."""
    rows = []
    for peer in peers():
        for variant in peer.variants:
            conversion = Conversion(peer, variant, checkpoint, work, threads)
            if matches(conversion.label, only):
                rows.append(peer_row(conversion, tell))
    return rows


def peer_row(conversion: Conversion, tell: Callable[[str, str], None]) -> Row:
    """Convert unless that was done, and describe what came of it."""
    peer, label, versions = conversion.peer, conversion.label, conversion.versions()
    if versions is None:
        failure = peer.failure(conversion.work)
        return Row(label, PEER, missing=f"could not be installed: {failure}" if failure else HOW_TO_INSTALL)
    try:
        record = converted(conversion)
    except ConversionFailed as error:
        tell(label, str(error))
        return Row(label, PEER, missing=str(error), version=versions[peer.distribution])
    tell(label, f"converted, {record['peak_rss_mb']:.0f} MB")
    model = conversion.folder / record["model"]
    read = record["bytes_read_per_token"]
    return Row(
        label, PEER, (conversion.python, "-m", peer.module, "time"), str(model),
        bytes=sum((conversion.folder / name).stat().st_size for name in record["weights"]),
        bytes_read_per_token=onnx_bytes(model) if read is None else read,
        version=versions[peer.distribution],
        notes=(*record["notes"], f"converted with {record['peak_rss_mb']:.0f} MB at most"),
    )  # fmt: skip


class ConversionFailed(Exception):
    """A peer could not convert the checkpoint; the message is the row's reason."""


def converted(conversion: Conversion) -> dict:
    """The record of the conversion; made in a draft folder, so that it is there whole or not at all."""
    folder = conversion.folder
    if (folder / CONVERTED).is_file():
        return json.loads((folder / CONVERTED).read_text(encoding="utf-8"))
    options = json.dumps(conversion.peer.variants[conversion.variant])
    with made_whole(folder) as draft:
        command = [conversion.python, "-m", conversion.peer.module, "convert", str(conversion.checkpoint.resolve()), str(draft), options]
        code, said, words = run_limited(command, conversion.threads, CONVERSION_LIMIT_S)
        if code != 0:
            raise ConversionFailed(f"could not convert: {how_it_ended(code, words, CONVERSION_LIMIT_S)}")
        record = json.loads(said.splitlines()[-1])
        (draft / CONVERTED).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def run_limited(command: list[str], threads: int, limit_s: float) -> tuple[int | None, str, str]:
    """Exit code (None: stopped for taking longer than ``limit_s``), standard output and standard error of a fresh process."""
    with subprocess.Popen(
        command, env=child_environment(threads), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace",
    ) as process:  # fmt: skip
        try:
            said, words = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            said, words = process.communicate()
            return None, said, words
    return process.returncode, said, words
