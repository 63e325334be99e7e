"""The peers and their pinned versions, and where each is installed. The standard library only: installing needs no more."""

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PEERS = Path(__file__).resolve().parent.parent / "presets" / "peers.toml"
RECORD, FAILURE = "installed.json", "failure.txt"


@dataclass(frozen=True)
class Peer:
    """``module`` has its two commands. ``packages`` are requirements for pip, none: our own environment has it.

    ``source`` is a package that is compiled here, with the CMake arguments ``build``; ``variants`` have the options of ``convert``.
    """

    name: str
    module: str
    title: str
    distribution: str
    packages: tuple[str, ...]
    source: str | None
    build: tuple[str, ...]
    variants: dict[str, dict]

    @property
    def wanted(self) -> list[str]:
        """All that has to be there, as ``installed.json`` notes it."""
        return [*self.packages, *([self.source, *self.build] if self.source else [])]

    def home(self, work: Path) -> Path:
        """The folder that the peer has to itself."""
        return work.resolve() / "peers" / self.name

    def python(self, work: Path) -> Path:
        return self.home(work) / "venv" / "bin" / "python"

    def versions(self, work: Path) -> dict[str, str] | None:
        """Version by distribution of what is installed; None where the peer is not, or with other pins."""
        record = self.home(work) / RECORD
        if not record.is_file():
            return None
        found = json.loads(record.read_text(encoding="utf-8"))
        return found["versions"] if found["wanted"] == self.wanted else None

    def failure(self, work: Path) -> str | None:
        """Why the last try to install it failed."""
        path = self.home(work) / FAILURE
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None


@cache
def peers() -> tuple[Peer, ...]:
    """All peers, in the order of the file."""
    found = tomllib.loads(PEERS.read_text(encoding="utf-8"))
    return tuple(
        Peer(
            name=name,
            module=f"pipeline.peers.{name}",
            title=entry["title"],
            distribution=entry["distribution"],
            packages=tuple(entry["packages"]),
            source=entry.get("source"),
            build=tuple(entry.get("build", ())),
            variants=entry["variants"],
        )
        for name, entry in found.items()
    )
