"""What a board says of itself, from folders that look like the root of a Raspberry Pi, of other boards and of none."""

import json
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from device_tests import board
from device_tests.devices.local import PACKAGE_ROOT

PI5_CPUINFO = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd0b

Revision\t: c04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture()
def pi(tmp_path, monkeypatch):
    """A Raspberry Pi 5 with its governor on powersave, warm, and with one sensor that is no processor's."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    policy = "sys/devices/system/cpu/cpufreq/policy0"
    files = {
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/cpuinfo": PI5_CPUINFO,
        "proc/meminfo": "MemTotal:        8245488 kB\nMemFree:         1000000 kB\nMemAvailable:    2000000 kB\n",
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
        f"{policy}/scaling_governor": "powersave\n",
        f"{policy}/scaling_cur_freq": "1500000\n",
        "sys/devices/system/cpu/cpu0/cache/index0/size": "64K\n",
        "sys/devices/system/cpu/cpu0/cache/index3/size": "2M\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "61250\n",
        "sys/class/thermal/thermal_zone1/type": "battery\n",
        "sys/class/thermal/thermal_zone1/temp": "99000\n",
        FIRMWARE: "0\n",
    }
    return write(tmp_path, files)


def test_a_raspberry_pi_is_described(pi):
    bits = 1 << 0 | 1 << 1 | 1 << 8 | 1 << 20  # fp, asimd, atomics, asimddp
    pairs = [(6, 4096), (16, bits), (26, 1 << 13), (0, 0)]
    (pi / "proc/self").mkdir()
    (pi / "proc/self/auxv").write_bytes(b"".join(struct.pack("@LL", *pair) for pair in pairs))
    found = board.describe(pi)
    assert found["model"] == "Raspberry Pi 5 Model B Rev 1.0" and found["cpu"] == "Cortex-A76" and found["isa"] == "aarch64"
    assert found["cpu_flags"] == ["fp", "asimd", "atomics", "asimddp", "i8mm"]
    assert found["memory_mb"] == 8443.4 and found["cache_mb"] == 2.1 and found["system"] == "Debian GNU/Linux 12 (bookworm)"
    assert not found["emulated"]


def test_its_condition_is_in_plain_units(pi):
    assert board.condition(pi) == {
        "temperature_c": 61.25,
        "clock_mhz": 1500.0,
        "governor": "powersave",
        "throttled": False,
        "free_memory_mb": 2048.0,
    }


def test_two_kinds_of_cores_give_the_fastest_clock_and_both_governors(pi):
    policy = "sys/devices/system/cpu/cpufreq/policy4"
    write(pi, {f"{policy}/scaling_governor": "performance\n", f"{policy}/scaling_cur_freq": "2400000\n"})
    found = board.condition(pi)
    assert found["clock_mhz"] == 2400.0 and found["governor"] == "performance, powersave"


@pytest.mark.parametrize(
    ("answers", "throttled"),
    [
        (["0x0", "0x0"], [False, False]),
        (["0x40004", "0x40000"], [True, False]),  # throttled now; then no longer, and the bit that stays is no news
        (["0x50000", "0x50000"], [False, False]),  # all of it before the first question
        (["0x0", "0x40000", "0x40000"], [False, True, False]),  # between two questions
        (["0x40000", "0x50000"], [False, True]),  # under-voltage has come to it
        (["0x50005"], [True]),
        (["80008"], [True]),  # the file has no 0x
    ],
)
def test_throttling_is_told_when_it_is_and_when_it_was_since_the_last_question(pi, answers, throttled):
    found = []
    for answer in answers:
        (pi / FIRMWARE).write_text(answer + "\n")
        found.append(board.condition(pi)["throttled"])
    assert found == throttled


def test_a_raspberry_pi_without_the_file_is_asked_by_its_own_tool(pi, tmp_path_factory, monkeypatch):
    (pi / FIRMWARE).unlink()
    tool = tmp_path_factory.mktemp("bin") / "vcgencmd"
    tool.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x50005\n')
    tool.chmod(0o755)
    assert board.condition(pi)["throttled"] is None
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert board.condition(pi)["throttled"] is True
    tool.write_text("#!/bin/sh\necho VCHI initialization failed\nexit 255\n")
    assert board.condition(pi)["throttled"] is None


def test_another_board_tells_by_its_cooling(tmp_path):
    cooling = "sys/class/thermal/cooling_device0"
    write(tmp_path, {f"{cooling}/type": "thermal-cpufreq-0\n", f"{cooling}/cur_state": "0\n"})
    write(tmp_path, {"sys/class/thermal/cooling_device1/type": "pwm-fan\n", "sys/class/thermal/cooling_device1/cur_state": "3\n"})
    assert board.condition(tmp_path)["throttled"] is False, "a fan that turns slows nothing"
    write(tmp_path, {f"{cooling}/cur_state": "2\n"})
    assert board.condition(tmp_path)["throttled"] is True


def test_a_machine_that_tells_nothing_gives_none_everywhere(tmp_path):
    assert set(board.condition(tmp_path).values()) == {None}
    found = board.describe(tmp_path)
    assert found["model"] is None and found["cache_mb"] is None and found["memory_mb"] is None and found["cores"] == os.cpu_count()


def test_emulation_shows_in_the_thread_and_in_a_processor_of_another_kind(pi, monkeypatch):
    assert not board.is_emulated(pi)
    (pi / "proc/thread-self").mkdir()
    emulator = pi / "proc/thread-self/exe"
    emulator.symlink_to("/usr/bin/qemu-aarch64-static")
    assert board.is_emulated(pi)
    emulator.unlink()
    header = bytearray(64)
    header[18:20] = (62).to_bytes(2, "little")  # an x86-64 program says that it is on aarch64
    emulator.write_bytes(header)
    assert board.is_emulated(pi)
    header[18:20] = (183).to_bytes(2, "little")
    emulator.write_bytes(header)
    assert not board.is_emulated(pi)
    (pi / "proc/cpuinfo").write_text("vendor_id\t: GenuineIntel\nflags\t: sse2 avx2\n")
    assert board.is_emulated(pi) and board.describe(pi)["model"] == "emulated aarch64"


def test_this_machine_describes_itself_and_is_not_emulated():
    found = {**board.describe(), **board.condition()}
    assert found["isa"] == os.uname().machine and found["kernel"].endswith(os.uname().release) and not found["emulated"]
    assert found["libc"] == " ".join(platform.libc_ver()) and found["python"] == platform.python_version()
    assert 0 < found["free_memory_mb"] <= found["memory_mb"] and found["free_disk_mb"] > 0 and found["python_bits"] == 64


def test_it_works_piped_into_another_python_and_as_a_module():
    """As on a board that nothing was copied to: isolated, without site-packages."""
    source = (PACKAGE_ROOT / "device_tests/board.py").read_bytes()
    piped = subprocess.run([sys.executable, "-I", "-S", "-"], input=source, capture_output=True, check=False)
    module = subprocess.run([sys.executable, "-m", "device_tests.board"], cwd=PACKAGE_ROOT, capture_output=True, check=False)
    for done in (piped, module):
        assert done.returncode == 0, done.stderr
        assert set(json.loads(done.stdout)) == set(board.describe()) | set(board.condition())
