"""The board's own Python environment: a virtual one in our folder there, from pinned wheels, kept for the next run.

The board fetches the wheels from its own index. Where it cannot, or has no pip, they are sent from here: a wheel is an archive, and
those of the lock need nothing but to be unpacked.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from device_tests.devices import DeviceUnavailable, Tell
from device_tests.devices.job import how_it_ended
from device_tests.devices.ssh_files import FOLDER, Files
from device_tests.devices.ssh_line import BoardFull, Line
from device_tests.devices.ssh_wheels import CACHE, Target, Wheel, choose, fetch, read_lock
from device_tests.sessions import RUNTIMES

ENVIRONMENTS, MISSING = "environments", "missing.json"
DRAFT = "work/environment"  # an environment works where it is moved to, as long as its programs are started by ``python -m``
STEP_S, INSTALL_S = 300.0, 1800.0
# what pip may wait for an index that does not answer; a board without a network says so at once
PIP = ["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-compile", "--retries", "1"]
PIP += ["--timeout", "15", "--disable-pip-version-check", "--requirement"]
FULL = "No space left on device"


@dataclass(frozen=True)
class Environment:
    """``python`` is its path on the board, ``missing`` are the runtimes that it lacks and why."""

    python: str
    missing: dict[str, str]


@dataclass(frozen=True)
class Site:
    """Where the environment is made: the folder there, the Python that makes it and what ``device_tests.board`` says."""

    folder: str
    python: str
    board: dict[str, Any]

    @property
    def target(self) -> Target:
        """What a wheel has to fit."""
        python = [int(number) for number in self.board["python"].split(".")[:2]]
        glibc = [int(number) for number in re.findall(r"\d+", self.board["libc"])[:2]]
        return Target((python[0], python[1]), (glibc[0], glibc[1]), self.board["isa"])

    def within(self, path: str) -> str:
        """The whole path of what lies in the folder."""
        return f"{self.folder}/{path}"


def prepare(line: Line, site: Site, files: Files, tell: Tell) -> Environment:
    """The environment, made if an earlier run has not left it there. DeviceUnavailable where no runtime can be had."""
    wheels, missing = choose(read_lock(), site.target)
    if not wheels:
        raise DeviceUnavailable(f"{line.address.name}: no runtime can be had there: {'; '.join(missing.values())}")
    pins = "".join(f"{wheel.requirement}\n" for wheel in wheels.values())
    place = f"{ENVIRONMENTS}/{hashlib.sha256(f'{pins}{site.target.python}{site.python}'.encode()).hexdigest()[:16]}"
    python = site.within(f"{place}/bin/python")
    known = line.fetch(f"{place}/{MISSING}")
    if known is not None:
        tell(line.address.name, f"runtimes are there from an earlier run ({FOLDER}/{place})")
        return Environment(python, json.loads(known))
    line.ask("remove", path=ENVIRONMENTS)  # of other pins
    _install(line, site, files, tell, list(wheels.values()))
    broken = _broken(line, site.within(f"{DRAFT}/bin/python"), [runtime for runtime in RUNTIMES if runtime not in missing])
    line.ask("write", path=f"{DRAFT}/{MISSING}", text=json.dumps({**missing, **broken}))
    line.ask("rename", path=DRAFT, target=place)
    size = sum(wheel.unpacked_bytes for wheel in wheels.values()) / 1e6
    tell(line.address.name, f"runtimes stay there for the next run ({size:.0f} MB in {FOLDER}/{place}; ?clean=1 removes them)")
    return Environment(python, {**missing, **broken})


def _install(line: Line, site: Site, files: Files, tell: Tell, wheels: list[Wheel]) -> None:
    """Make the environment, by the board's pip if it has one that works, else from here."""
    files.require_room(sum(wheel.bytes + wheel.unpacked_bytes for wheel in wheels), "the runtimes' environment")
    line.doing = "making its Python environment"
    tell(line.address.name, "makes a Python environment")
    own_pip = site.board["ensurepip"]
    _run(line, [site.python, "-m", "venv", *([] if own_pip else ["--without-pip"]), site.within(DRAFT)], "python3 -m venv")
    if own_pip and _installed_there(line, site, wheels):
        return
    why = "the board's pip cannot fetch the wheels" if own_pip else "the board has no pip"
    tell(line.address.name, f"{why}, they are sent from here")
    library = f"{DRAFT}/lib/python{site.target.python[0]}.{site.target.python[1]}/site-packages"
    for name in files.send(fetch(wheels, site.target, CACHE)):
        line.doing = "unpacking the runtimes"
        line.ask("unpack", sha256=name, path=library)


def _installed_there(line: Line, site: Site, wheels: list[Wheel]) -> bool:
    """Whether the board's pip could do it."""
    pins = f"{DRAFT}/pins.txt"
    line.ask("write", path=pins, text="".join(f"{wheel.requirement}\n" for wheel in wheels))
    command = [site.within(f"{DRAFT}/bin/python"), *PIP, site.within(pins)]
    done = line.ask("run", command=command, **_settings(INSTALL_S))
    if done["code"] != 0 and FULL in done["words"]:
        raise BoardFull(f"{line.address.name}: the board's disk is full during {line.doing}; make room there and run again")
    return done["code"] == 0


def _broken(line: Line, python: str, runtimes: list[str]) -> dict[str, str]:
    """Runtimes whose library cannot be imported there, and why: the only sure test of the instructions that a wheel needs."""
    broken = {}
    for runtime in runtimes:
        line.doing = f"trying {runtime}"
        done = line.ask("run", command=[python, "-c", f"import {RUNTIMES[runtime][2]}"], **_settings(STEP_S))
        if done["code"] != 0:
            ended = how_it_ended(done["code"], done["words"], STEP_S)
            hint = "; its wheel needs instructions that this processor lacks" if "SIGILL" in ended else ""
            broken[runtime] = f"importing {RUNTIMES[runtime][2]} there {ended}{hint}"
    return broken


def _run(line: Line, command: list[str], what: str) -> None:
    done = line.ask("run", command=command, **_settings(STEP_S))
    if done["code"] != 0:
        if FULL in done["words"]:
            raise BoardFull(f"{line.address.name}: the board's disk is full during {line.doing}; make room there and run again")
        ended = how_it_ended(done["code"], done["words"], STEP_S)
        raise DeviceUnavailable(f"{line.address.name}: {what} there {ended}; try it by hand: {line.address.by_hand}")


def _settings(timeout_s: float) -> dict[str, Any]:
    return {"environment": {"PYTHONNOUSERSITE": "1"}, "folder": "work", "timeout_s": timeout_s}
