"""What an Android phone is and how it feels: its properties, processor, memory, temperature, thermal status, free storage."""

from __future__ import annotations

import re
from typing import Any

from device_tests.devices.adb_link import Link

FOLDER = "/data/local/tmp"  # where the shell's user may write and run programs
ISAS = {"arm64-v8a": "aarch64", "armeabi-v7a": "armv7l", "armeabi": "armv6l", "x86_64": "x86_64", "x86": "i686", "riscv64": "riscv64"}
THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
CPU_FREQUENCY = "/sys/devices/system/cpu/cpu*/cpufreq"  # some phones let the shell read some of it


def describe(link: Link) -> dict[str, Any]:
    """Facts that hold for the whole run, by the names of ``device_tests.board``; None for what the phone does not tell.

    ``abis`` are the instruction sets that it runs, best first; ``emulated``: an Android emulator and no phone.
    """
    properties = properties_of(link.read("getprop"))
    abi = properties.get("ro.product.cpu.abi", "")
    processors = link.read("cat /proc/cpuinfo")
    flags = re.search(r"^(?:Features|flags)\s*:\s*(.*)$", processors, re.MULTILINE)
    hardware = re.search(r"^(?:Hardware|model name)\s*:\s*(.*)$", processors, re.MULTILINE)
    free = free_bytes(link)

    def named(*names: str) -> str | None:
        return " ".join(filter(None, (properties.get(name) for name in names))) or None

    return {
        "model": named("ro.product.manufacturer", "ro.product.model"),
        "isa": ISAS.get(abi),
        "cpu": named("ro.soc.manufacturer", "ro.soc.model") or (hardware.group(1).strip() if hardware else None),
        "cores": len(re.findall(r"^processor\s*:", processors, re.MULTILINE)) or None,
        "cpu_flags": flags.group(1).split() if flags else [],
        "memory_mb": memory_mb(link.read("cat /proc/meminfo"), "MemTotal"),
        "free_disk_mb": None if free is None else free / 1e6,
        "system": f"Android {named('ro.build.version.release')} (sdk {named('ro.build.version.sdk')})",
        "kernel": f"Linux {link.read('uname -r')}",
        "build": named("ro.build.fingerprint"),
        "abis": [name for name in properties.get("ro.product.cpu.abilist", abi).split(",") if name],
        "emulated": "1" in (properties.get("ro.kernel.qemu"), properties.get("ro.boot.qemu")),
    }


def condition(link: Link) -> dict[str, Any]:
    """What changes while tests run. The temperature is the battery's; ``throttled`` is what the thermal service says."""
    status = thermal_status(link.read("dumpsys thermalservice"))
    clocks = [int(word) for word in link.read(f"cat {CPU_FREQUENCY}/scaling_cur_freq 2>/dev/null || true").split() if word.isdigit()]
    governors = link.read(f"cat {CPU_FREQUENCY}/scaling_governor 2>/dev/null || true").split()
    return {
        "temperature_c": battery_c(link.read("dumpsys battery")),
        "thermal_status": None if status is None else THERMAL_STATUS[status],
        "throttled": None if status is None else status > 0,
        "clock_mhz": max(clocks) / 1000 if clocks else None,
        "governor": ", ".join(sorted(set(governors))) or None,
        "free_memory_mb": memory_mb(link.read("cat /proc/meminfo"), "MemAvailable"),
    }


def free_bytes(link: Link) -> int | None:
    """Free bytes where runs are put; None when the phone does not tell."""
    lines = link.read(f"df -k {FOLDER}").splitlines()
    words = lines[-1].split() if lines else []  # ... Available Use% Mounted-on
    return int(words[-3]) * 1024 if len(words) >= 5 and words[-3].isdigit() else None


def properties_of(text: str) -> dict[str, str]:
    """``[name]: [value]`` lines of ``getprop``."""
    return dict(re.findall(r"^\[([^\]]+)\]: \[(.*)\]\s*$", text, re.MULTILINE))


def battery_c(text: str) -> float | None:
    """Degrees Celsius from ``dumpsys battery``, which gives tenths. Its event log, where it has one, holds older ones."""
    found = re.search(r"^\s*temperature:\s*(-?\d+)\s*$", text, re.MULTILINE)
    return int(found.group(1)) / 10 if found else None


def thermal_status(text: str) -> int | None:
    """0 (none) to 6 (shutdown) from ``dumpsys thermalservice``; None before Android 10."""
    found = re.search(r"^\s*Thermal Status:\s*([0-6])\s*$", text, re.MULTILINE)
    return int(found.group(1)) if found else None


def memory_mb(text: str, name: str) -> float | None:
    """MB (10^6 bytes) of a line of ``/proc/meminfo``."""
    found = re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 / 1e6 if found else None
