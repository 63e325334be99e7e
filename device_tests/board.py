"""What machine this is, as far as it may change a number: processor, clock, temperature, memory. The standard library only.

python3 -m device_tests.board        prints it as JSON

``python3 - < board.py`` does the same on a machine that nothing was copied to.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path("/")
VCGENCMD = "vcgencmd"
# Linux hands these to every process, also under emulation, where /proc/cpuinfo is the host's. Reference: asm/hwcap.h of arm64
HWCAP = {0: "fp", 1: "asimd", 8: "atomics", 9: "fphp", 10: "asimdhp", 20: "asimddp", 22: "sve"}
HWCAP2 = {1: "sve2", 13: "i8mm", 14: "bf16"}
AT_HWCAP, AT_HWCAP2 = 16, 26
X86_FLAGS = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
ARM_PARTS = {  # "CPU part" of implementer 0x41; reference: the Main ID Register in Arm's manuals
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD41: "Cortex-A78", 0xD44: "Cortex-X1",
}  # fmt: skip
_known_throttling: dict[Path, int] = {}  # the firmware keeps bits until it is started anew, so that only new ones tell
ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
# bits of the Raspberry Pi's firmware: under-voltage, clock capped, throttled, soft temperature limit
THROTTLED_NOW = 0xF
THROTTLED_SINCE_START = 0xF0000  # the same: it has been so since the board started


def describe(root: Path = ROOT) -> dict[str, Any]:
    """Facts that hold for the whole run; None for what this machine does not tell. MB are 10^6 bytes.

    ``emulated``: a user-mode emulator runs this process. ``python_bits`` 32 on a 64-bit kernel is a 32-bit system.
    """
    cpuinfo = _fields(root / "proc/cpuinfo")
    emulated = is_emulated(root)
    home = os.path.expanduser("~")
    return {
        "model": f"emulated {platform.machine()}" if emulated else _model(root, cpuinfo),
        "isa": platform.machine(),
        "cpu": None if emulated else _cpu(cpuinfo),
        "cores": os.cpu_count(),
        "cpu_flags": cpu_flags(root),
        "cache_mb": _megabytes(largest_cache_bytes(root)),
        "memory_mb": _megabytes(_memory_bytes(root, "MemTotal")),
        "free_disk_mb": _megabytes(shutil.disk_usage(home if os.path.isdir(home) else "/").free),
        "system": _fields(root / "etc/os-release", "=").get("PRETTY_NAME", "").strip('"') or None,
        "kernel": f"{platform.system()} {platform.release()}",
        "libc": libc(),
        "python": platform.python_version(),
        "python_bits": struct.calcsize("P") * 8,
        "venv": importlib.util.find_spec("venv") is not None,
        "ensurepip": _has_ensurepip(),
        "emulated": emulated,
    }


def condition(root: Path = ROOT) -> dict[str, Any]:
    """What changes while tests run; None for what this machine does not tell. Costs about a millisecond.

    ``temperature_c`` is the hottest processor sensor, ``clock_mhz`` the fastest core's. ``throttled``: heat or a weak power
    supply slows the machine now, or has done so since this process asked last.
    """
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    governors = sorted({text for text in (_read(policy / "scaling_governor") for policy in policies) if text})
    clocks = [number for number in (_number(policy / "scaling_cur_freq") for policy in policies) if number is not None]
    return {
        "temperature_c": _temperature(root),
        "clock_mhz": max(clocks) / 1e3 if clocks else _clock_of_cpuinfo(root),
        "governor": ", ".join(governors) or None,
        "throttled": _throttled(root),
        "free_memory_mb": _megabytes(_memory_bytes(root, "MemAvailable")),
    }


def is_emulated(root: Path = ROOT) -> bool:
    """Whether a user-mode emulator such as qemu runs this process.

    It answers /proc/self with what the program expects, but the thread's own entry still shows the emulator itself; and
    /proc/cpuinfo is the host's, which on ARM has no vendor.
    """
    for entry in (root / "proc/thread-self/exe", root / f"proc/self/task/{threading.get_native_id()}/exe"):
        if entry.is_symlink() and os.path.basename(os.readlink(entry)).startswith("qemu-"):
            return True
        try:
            with open(entry, "rb") as program:
                found = ELF_MACHINES.get(int.from_bytes(program.read(20)[18:20], "little"))
        except OSError:  # no such entry: an older kernel, or /proc is not mounted
            continue
        if found is not None and found != platform.machine() and platform.machine() in ELF_MACHINES.values():
            return True
    cpuinfo = _fields(root / "proc/cpuinfo")
    return ("vendor_id" in cpuinfo and platform.machine() == "aarch64") or ("CPU implementer" in cpuinfo and platform.machine() == "x86_64")


def cpu_flags(root: Path = ROOT) -> list[str]:
    """The instruction sets that decide which kernels a runtime takes, by Linux's names."""
    if platform.machine() != "aarch64":
        known = set(_fields(root / "proc/cpuinfo").get("flags", "").split())
        return [flag for flag in X86_FLAGS if flag in known]
    try:
        raw = (root / "proc/self/auxv").read_bytes()
    except OSError:
        return []
    vector = dict(struct.iter_unpack("@LL", raw[: len(raw) // 16 * 16]))
    pairs = ((HWCAP, vector.get(AT_HWCAP, 0)), (HWCAP2, vector.get(AT_HWCAP2, 0)))
    return [flag for names, bits in pairs for place, flag in names.items() if bits >> place & 1]


def largest_cache_bytes(root: Path = ROOT) -> int | None:
    """Size of the largest cache of the first core."""
    sizes = [_read(path) or "" for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "": 1}
    found = [re.fullmatch(r"(\d+)([KM]?)", size) for size in sizes]
    return max((int(match[1]) * units[match[2]] for match in found if match), default=None)


def libc() -> str | None:
    """Such as ``glibc 2.36``; None for another C library."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        return None


def _has_ensurepip() -> bool:
    """Debian keeps it in a package of its own. A folder without code in it is none."""
    found = importlib.util.find_spec("ensurepip")
    return found is not None and found.origin is not None


def _model(root: Path, cpuinfo: dict[str, str]) -> str | None:
    tree = _read(root / "proc/device-tree/model")
    if tree:
        return tree.rstrip("\0")
    maker = [_read(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name")]
    return " ".join(part for part in maker if part) or cpuinfo.get("Model") or cpuinfo.get("Hardware") or cpuinfo.get("model name")


def _cpu(cpuinfo: dict[str, str]) -> str | None:
    """The last core's: on a chip with fast and slow cores the fast ones come last."""
    if cpuinfo.get("CPU implementer") == "0x41":
        part = cpuinfo.get("CPU part", "")
        return ARM_PARTS.get(int(part, 16), f"Arm {part}") if part.startswith("0x") else None
    return cpuinfo.get("model name")


def _temperature(root: Path) -> float | None:
    """Degrees Celsius of the processor's thermal zones, else of a processor's sensor chip."""
    zones = (root / "sys/class/thermal").glob("thermal_zone*")
    files = [zone / "temp" for zone in zones if re.search("cpu|soc|core|pkg", _read(zone / "type") or "")]
    chips = (root / "sys/class/hwmon").glob("hwmon*")
    named = [chip for chip in chips if re.search("coretemp|k10temp|zenpower|cpu", _read(chip / "name") or "")]
    files = files or [file for chip in named for file in chip.glob("temp*_input")]
    found = [number for number in map(_number, files) if number is not None]
    return max(found) / 1e3 if found else None


def _clock_of_cpuinfo(root: Path) -> float | None:
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _read(root / "proc/cpuinfo") or "", re.MULTILINE)
    return max(map(float, found)) if found else None


def _throttled(root: Path) -> bool | None:
    """From the Raspberry Pi's firmware, by a file or by its own tool, else from the kernel's cooling of the processor."""
    files = sorted((root / "sys/devices/platform").glob("soc*/soc*:firmware/get_throttled"))
    text = (_read(files[0]) if files else None) or _asked_firmware(root)
    if text:
        bits = int(text, 16)
        known = _known_throttling.setdefault(root, bits)  # what happened before the first question is no news
        _known_throttling[root] = bits
        return bool(bits & THROTTLED_NOW or bits & THROTTLED_SINCE_START & ~known)
    devices = (root / "sys/class/thermal").glob("cooling_device*")
    states = [_number(device / "cur_state") for device in devices if "cpufreq" in (_read(device / "type") or "")]
    told = [state for state in states if state is not None]
    return any(told) if told else None


def _asked_firmware(root: Path) -> str | None:
    """A Raspberry Pi without the file has the tool (it takes some milliseconds); other boards have neither."""
    if "Raspberry Pi" not in (_read(root / "proc/device-tree/model") or "") or shutil.which(VCGENCMD) is None:
        return None
    try:
        answer = subprocess.run(
            [VCGENCMD, "get_throttled"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=2, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):  # no right to ask the firmware: not told
        return None
    found = re.search(rb"throttled=(0x[0-9a-fA-F]+)", answer)
    return found[1].decode() if found else None


def _memory_bytes(root: Path, name: str) -> int | None:
    found = re.match(r"(\d+) kB", _fields(root / "proc/meminfo").get(name, ""))
    return int(found[1]) * 1024 if found else None


def _megabytes(count: int | None) -> float | None:
    return None if count is None else round(count / 1e6, 1)


def _fields(path: Path, separator: str = ":") -> dict[str, str]:
    """``key: value`` lines; of lines with the same key the last."""
    pairs = (line.split(separator, 1) for line in (_read(path) or "").splitlines() if separator in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text and re.fullmatch(r"-?\d+", text) else None


def _read(path: Path) -> str | None:
    """A small file's text. None where there is none, or where its driver refuses to answer just now."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


if __name__ == "__main__":
    json.dump({**describe(), **condition()}, sys.stdout, indent=1)
    print()
