"""Gives every peer an environment of its own: ``python -m pipeline.peers.install [--work .pocketlm] [peer ...]``.

One that cannot be installed leaves the reason for the benchmark's row, and the others go on. Exit code 1 then.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from pipeline.peers.table import FAILURE, RECORD, Peer, peers

LIST_VERSIONS = (
    "import json, importlib.metadata as m; print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
)


def main(arguments: list[str] | None = None) -> int:
    """Install what is not there yet and say how each went."""
    command = argparse.ArgumentParser(prog="python -m pipeline.peers.install", description="install the benchmark's peers")
    command.add_argument("peer", nargs="*", help=f"of {', '.join(peer.name for peer in peers())}; none: all")
    command.add_argument("--work", type=Path, default=Path(".pocketlm"), help="folder of environments (default %(default)s)")
    given = command.parse_args(arguments)
    if unknown := set(given.peer) - {peer.name for peer in peers()}:
        print(f"{', '.join(sorted(unknown))}: no such peer; give some of {', '.join(peer.name for peer in peers())}", file=sys.stderr)
        return 2
    chosen = [peer for peer in peers() if not given.peer or peer.name in given.peer]
    return 0 if all([installed(peer, given.work) for peer in chosen]) else 1


def installed(peer: Peer, work: Path) -> bool:
    """Install one peer unless it is there; prints a line."""
    if not peer.packages:
        print(f"{peer.title}: part of this project's environment")
    elif peer.versions(work) is not None:
        print(f"{peer.title}: there already")
    else:
        print(f"{peer.title}: being installed{', which compiles for several minutes' if peer.source else ''} ...", flush=True)
        try:
            install(peer, work)
        except (OSError, ValueError, subprocess.CalledProcessError, tarfile.TarError) as error:
            reason = reason_of(error)
            (peer.home(work) / FAILURE).write_text(reason + "\n", encoding="utf-8")
            print(f"{peer.title}: NOT installed: {reason}; the log is {peer.home(work) / 'install.log'}")
            return False
        print(f"{peer.title}: installed")
    return True


def install(peer: Peer, work: Path) -> None:
    """An environment with the pinned versions; whatever of them is there already is kept."""
    home, python = peer.home(work), peer.python(work)
    home.mkdir(parents=True, exist_ok=True)
    (home / "install.log").unlink(missing_ok=True)
    (home / FAILURE).unlink(missing_ok=True)
    if not python.is_file():
        logged(home, [sys.executable, "-m", "venv", str(home / "venv")])
    logged(home, [str(python), "-m", "pip", "install", *peer.packages])
    if peer.source and versions_in(python).get(peer.distribution) != peer.source.split("==")[1]:
        build(peer, home, python)
    versions = versions_in(python)
    if peer.distribution not in versions:
        raise ValueError(f"pip ended well but {peer.distribution} is not there")
    (home / RECORD).write_text(json.dumps({"wanted": peer.wanted, "versions": versions}, indent=1) + "\n", encoding="utf-8")


def build(peer: Peer, home: Path, python: Path) -> None:
    """Fetch the source package, unpack it to ``source``, which conversion needs too, and compile it."""
    shutil.rmtree(home / "source", ignore_errors=True)
    name = peer.source.split("==")[0]
    logged(home, [str(python), "-m", "pip", "download", "--no-deps", "--no-binary", name, "--dest", str(home / "sdist"), peer.source])
    (archive,) = (home / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(home / "unpacked", filter="data")
    (folder,) = (home / "unpacked").iterdir()
    folder.rename(home / "source")
    shutil.rmtree(home / "unpacked")
    environment = {**os.environ, "CMAKE_ARGS": " ".join(peer.build), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    logged(home, [str(python), "-m", "pip", "install", "--verbose", str(home / "source")], environment)


def logged(home: Path, command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command, its words to the log. CalledProcessError carries the log's path in ``stderr``."""
    log = home / "install.log"
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment, check=False).returncode
    if code:
        raise subprocess.CalledProcessError(code, command, stderr=log.read_text(encoding="utf-8", errors="replace"))


def reason_of(error: Exception) -> str:
    """One line: pip's last word of an error, or what Python says."""
    lines = (getattr(error, "stderr", None) or "").splitlines()
    told = [line.strip() for line in lines if "error" in line.lower() and line.strip()]
    return told[-1] if told else " ".join(str(error).split())


def versions_in(python: Path) -> dict[str, str]:
    """Version by distribution in an environment, names with hyphens."""
    return json.loads(subprocess.run([str(python), "-c", LIST_VERSIONS], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
