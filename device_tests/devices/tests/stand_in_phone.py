"""Makes the phone that ``stand_in_adb`` shows, and programs that it can run. What the files say has the form of a real phone's."""

from __future__ import annotations

import json
import os
import platform
import stat
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERIAL = "39181FDJG000AB"
ABIS = {"x86_64": "x86_64", "aarch64": "arm64-v8a"}
HOST_ABI = ABIS.get(platform.machine(), "x86_64")  # the stand-in runs programs for real, so its phone has this machine's processor
FOLDER = "data/local/tmp"
PROPERTIES = """[persist.sys.locale]: [en-GB]
[ro.build.fingerprint]: [google/shiba/shiba:14/AP2A.240805.005/12025142:user/release-keys]
[ro.build.version.release]: [14]
[ro.build.version.sdk]: [34]
[ro.product.cpu.abi]: [{abi}]
[ro.product.cpu.abilist]: [{abi}]
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 8]
[ro.soc.manufacturer]: [Google]
[ro.soc.model]: [Tensor G3]
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Max charging current: 500000
  Charge counter: 3270000
  status: 2
  health: 2
  present: true
  level: 75
  scale: 100
  voltage: 4156
  temperature: 314
  technology: Li-ion
[EventLogBuffer]
08-11 18:34:14.721  Sending ACTION_BATTERY_CHANGED: level:72, health:2, voltage:4120, temperature:345
"""
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 1
Thermal Status: {status}
Cached temperatures:
\tTemperature{{mValue=62.5, mType=0, mName=BIG, mStatus=3}}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{{mValue=38.2, mType=3, mName=VIRTUAL-SKIN, mStatus={status}}}
"""
PROCESSOR = "processor\t: {number}\nBogoMIPS\t: 49.15\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd4d\n\n"
MEMORY = "MemTotal:        7763340 kB\nMemFree:          213456 kB\nMemAvailable:    3423332 kB\n"
DISK = "Filesystem       1K-blocks     Used Available Use% Mounted on\n/dev/block/dm-50 111418372 74322236 {free:9d}  67% /data\n"


class StandInPhone:
    """A phone in ``root``; ``bin`` goes first in the PATH and has the adb that shows it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root.parent / f"{root.name}-path"
        for folder in (root / FOLDER, root / "bin", root / "proc", root / "sys/devices/system/cpu/cpu0/cpufreq", self.bin):
            folder.mkdir(parents=True)
        script(self.bin / "adb", f'exec "{sys.executable}" "{HERE / "stand_in_adb.py"}" "$@"')
        script(root / "bin/getprop", f'cat "{root}/properties"')
        script(root / "bin/df", f'cat "{root}/disk"')
        script(root / "bin/uname", "echo 5.15.137-android14-11-gdeadbeef")
        absent = 'echo "Can\'t find service: $1" >&2; exit 20'
        script(root / "bin/dumpsys", f'if [ -f "{root}/$1" ]; then cat "{root}/$1"; else {absent}; fi')
        self.write("properties", PROPERTIES.format(abi=HOST_ABI))
        self.write("battery", BATTERY)
        self.write("thermalservice", THERMAL.format(status=0))
        self.write("disk", DISK.format(free=37079752))
        self.write("proc/cpuinfo", "".join(PROCESSOR.format(number=number) for number in range(9)))
        self.write("proc/meminfo", MEMORY)
        self.write("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "2914000\n")
        self.write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "sched_pixel\n")
        self.list(f"{SERIAL}         device usb:1-4 product:shiba model:Pixel_8 device:shiba transport_id:2")

    def write(self, name: str, text: str) -> None:
        """Set a file of the phone."""
        (self.root / name).write_text(text, encoding="utf-8")

    def list(self, *lines: str) -> None:
        """Set what ``adb devices -l`` lists."""
        self.write("devices", "".join(f"{line}\n" for line in lines) + "\n")

    def calls(self) -> list[list[str]]:
        """Every call of adb so far."""
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def left(self) -> list[str]:
        """What lies where runs are put."""
        return sorted(path.name for path in (self.root / FOLDER).iterdir())


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def program(path: Path, body: str) -> Path:
    """An ELF file for this machine's processor that hands over to a shell script with ``body``: execve(script, argv, environment).

    So that the driver reads a real header, and the system refuses to run the file before it is made executable.
    """
    target = os.fsencode(script(path.with_name(path.name + ".sh"), body)) + b"\0"
    base, start = 0x400000, 120  # the headers' length
    if platform.machine() == "aarch64":
        machine = 183
        # ldr x0, target; add x1, sp, 8; ldr x3, [sp]; add x2, x1, x3, lsl 3; add x2, x2, 8; execve; exit(127)
        words = (0x58000140, 0x910023E1, 0xF94003E3, 0x8B030C22, 0x91002042, 0xD2801BA8, 0xD4000001, 0xD2800FE0, 0xD2800BA8, 0xD4000001)
        code = struct.pack("<10IQ", *words, base + start + 48)
    else:
        machine = 62
        # mov rdi, target; lea rsi, [rsp+8]; mov rax, [rsp]; lea rdx, [rsp+rax*8+16]; execve; exit(127)
        code = bytes.fromhex("48bf") + struct.pack("<Q", base + start + 43)
        code += bytes.fromhex("488d742408 488b0424 488d54c410 b83b000000 0f05 bf7f000000 b83c000000 0f05")
    size = start + len(code) + len(target)
    path.write_bytes(elf_header(machine, base + start) + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + code + target)
    return path


def elf_header(machine: int, entry: int = 0, headers: int = 1) -> bytes:
    """64 bytes: a 64-bit little-endian executable with ``headers`` program headers behind it."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, entry, 64, 0, 0, 64, 56, headers, 0, 0, 0)
