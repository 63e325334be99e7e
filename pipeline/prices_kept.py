"""Which prices need not be measured again: rows carry the key of all that decides them, and travel with ``docs/prices.json``.

Rows of models are quality alone, the same wherever they are measured, so each may be taken over. Rows of artifacts hold times,
which compare on one machine only: they are taken over all together or not at all.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from device_tests.board import describe
from pipeline.fingerprint import ROOT, code_of, text_sha256
from pipeline.measure import measuring_modules
from pipeline.runner import Planned


@dataclass(frozen=True)
class Earlier:
    """What an earlier measurement found, as ``prices.json`` holds it; empty where there is none."""

    found: dict = field(default_factory=dict)

    @classmethod
    def read(cls, docs: Path) -> "Earlier":
        path = docs / "prices.json"
        return cls(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def rows(self, part: str, key: str) -> list[dict]:
        """The rows of ``models``, ``artifacts`` or ``long`` with this key."""
        return [row for row in self.found.get(part, ()) if row.get("key") == key]


def row_key(kind: str, parts: list) -> str:
    """16 hex digits over what decides a row: keys of stages, and the code that measures."""
    return text_sha256(json.dumps([kind, parts, measuring_code(kind)], sort_keys=True))[:16]


def stage_keys(planned: list[Planned], names: tuple[str, ...]) -> list[str]:
    """The keys of the stages ``names``, in their order."""
    by_name = {item.stage.name: item.key for item in planned}
    return [by_name[name] for name in names]


def measuring_code(kind: str) -> dict[str, str]:
    """Hash of every module that measures rows of a kind."""
    tops = measuring_modules() if kind == "artifact" else ("pipeline.prices_measure",)
    return {name: digest for top in tops for name, digest in code_of(top)[0].items()}


def kept(work: Path, kind: str, parts: list, measured: Callable[[], dict]) -> dict:
    """What ``measured`` gives, or gave before in this work folder with the same parts and the same code."""
    path = work / "prices" / f"{kind}-{row_key(kind, parts)}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(measured()), encoding="utf-8")
        os.replace(draft, path)
    return json.loads(path.read_text(encoding="utf-8"))


def measured_here() -> dict:
    """The machine that measures and the version of the code, for rows that hold times."""
    board = describe()
    return {"version": version(), "cpu": board["cpu"], "cores": board["cores"], "isa": board["isa"]}


def version() -> str | None:
    """The commit that this code is, or None outside a checkout."""
    if not shutil.which("git"):
        return None
    asked = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
