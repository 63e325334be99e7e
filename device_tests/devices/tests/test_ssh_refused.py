"""Boards that cannot be used: one line that says what to do, from a real sshd, and nothing is left there."""

import platform
import shutil
import sys
from pathlib import Path

import pytest

from device_tests.devices import DeviceUnavailable, open_device, ssh, ssh_environment
from device_tests.devices.ssh_wheels import Lock, read_lock
from device_tests.devices.tests.stand_in_board import StandIn, free_port, key

PYTHON = Path(sys.executable).resolve()
OLD = f"""#!/bin/sh
exec {PYTHON} -c 'import sys; sys.version_info = (3, 7, 3, "final", 0); exec(sys.argv[1])' "$2"
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A board that would do; its login prints something first, as some do."""
    board = StandIn(tmp_path_factory.mktemp("board") / "pi", login='echo "Welcome to {board}"; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    board.start()
    yield board
    board.kill()


def refusal(monkeypatch, config: Path, address: str = "ssh://board") -> str:
    """The line that opening it ends with."""
    monkeypatch.setenv("POCKETLM_SSH_CONFIG", str(config))
    with pytest.raises(DeviceUnavailable) as raised, open_device(address, lambda what, state: None):
        pass
    line = str(raised.value)
    assert line.startswith("ssh://board: ") or address != "ssh://board"
    assert "\n" not in line
    return line


def assert_untouched(stand_in: StandIn) -> None:
    files = [path for path in stand_in.home.rglob("*") if path.is_file()]
    assert not files and not stand_in.cache.exists()


def test_a_host_key_that_is_not_known_stops_it(board, monkeypatch):
    """Although the person's configuration says StrictHostKeyChecking no: that is for logins by hand."""
    line = refusal(monkeypatch, board.client("unknown", known=""))
    assert "its host key is not known here; log in once by hand (ssh board)" in line
    assert (board.folder / "unknown.known_hosts").read_text() == "", "nothing may be learnt on the way"
    assert_untouched(board)


def test_a_host_key_that_has_changed_stops_it(board, monkeypatch, tmp_path):
    line = refusal(monkeypatch, board.client("changed", known=key(tmp_path / "other")))
    assert "its host key is not the one in known_hosts; if the board was set up anew, forget the old key (ssh-keygen -R" in line
    assert_untouched(board)


def test_a_key_that_the_board_does_not_know(board, monkeypatch, tmp_path):
    config = board.client("stranger")
    key(tmp_path / "stranger")
    config.write_text(config.read_text().replace(str(board.folder / "user_key"), str(tmp_path / "stranger")))
    assert "give the board your key (ssh-copy-id board) and try ssh board" in refusal(monkeypatch, config)


def test_hosts_that_are_not_there(board, monkeypatch):
    config = board.client("none")
    line = refusal(monkeypatch, config, f"ssh://127.0.0.1:{free_port()}")
    assert line.endswith("nothing answers on that port; switch ssh on there (raspi-config) or give the port")
    line = refusal(monkeypatch, config, "ssh://pi@no-such-board.invalid")
    assert line == "ssh://pi@no-such-board.invalid: no such host; check the name, or give the board's address in numbers"


def test_no_ssh_here(board, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(monkeypatch, board.client("no-client")).endswith("there is no ssh on this machine; install OpenSSH's client")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"python": None}, "there is no python3; install Python 3.9 or newer there"),
        ({"python": OLD}, "Python there is 3.7; install Python 3.9 or newer"),
        ({"python": "#!/bin/sh\nkill -SEGV $$\n"}, "ssh ended with exit code"),
        (
            {"login": 'exec setarch linux32 sh -c "$SSH_ORIGINAL_COMMAND"'},
            "it is i686, the runtimes are for aarch64 and x86_64; use",
        ),
    ],
    ids=["no python", "old python", "broken python", "wrong architecture"],
)
def test_a_board_that_lacks_something(tmp_path, monkeypatch, settings, words):
    if "login" in settings and (shutil.which("setarch") is None or platform.machine() != "x86_64"):
        pytest.skip("no setarch here that makes this machine say that it is 32-bit")
    stand_in = StandIn(tmp_path / "pi", **settings)
    stand_in.start()
    try:
        assert words in refusal(monkeypatch, stand_in.client("me"))
        assert_untouched(stand_in)
    finally:
        stand_in.kill()


def test_a_board_without_a_matching_wheel(board, monkeypatch):
    """No runtime has a wheel for its Python: then the lock is of no use to it."""
    lock = read_lock()
    others = tuple(
        wheel for wheel in lock.wheels if not wheel.file.split("-")[2].startswith(f"cp{sys.version_info[0]}{sys.version_info[1]}")
    )
    monkeypatch.setattr(ssh_environment, "read_lock", lambda: Lock(lock.runtimes, others))
    line = refusal(monkeypatch, board.client("wheel"))
    assert "no runtime can be had there: " in line and f"the board has {sys.version_info[0]}.{sys.version_info[1]}" in line
    assert_untouched(board)


def test_a_board_without_room_for_the_runtimes(tmp_path, monkeypatch):
    stand_in = StandIn(tmp_path / "pi", small_disks={".cache": 8 << 20})
    stand_in.start()
    try:
        line = refusal(monkeypatch, stand_in.client("me"))
        assert "the runtimes' environment needs " in line and "and 8 MB are free on the board" in line and line.endswith("run again")
        assert_untouched(stand_in)
    finally:
        stand_in.kill()


@pytest.mark.parametrize(
    ("fact", "value", "words"),
    [
        ("isa", "armv7l", "it is armv7l, the runtimes are for aarch64 and x86_64; use a 64-bit system"),
        ("python_bits", 32, "its system is 32-bit, the runtimes are 64-bit; install the 64-bit system on it"),
        ("libc", None, "its C library is not glibc, which the runtimes need; install Debian"),
        ("venv", False, "its Python cannot make environments; install python3-venv there"),
    ],
)
def test_what_the_board_says_decides(fact, value, words):
    facts = {"isa": "aarch64", "python_bits": 64, "libc": "glibc 2.36", "venv": True}
    ssh.refuse("ssh://pi", facts)
    with pytest.raises(DeviceUnavailable, match=words):
        ssh.refuse("ssh://pi", {**facts, fact: value})
