"""What machine this is, as far as it may change a number: processor, clock, temperature, memory. The standard library only.

python3 -m device_tests.board        prints it as JSON
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any


def describe() -> dict[str, Any]:
    """Facts that hold for the whole run."""
    return {"isa": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}


def condition() -> dict[str, Any]:
    """What changes while tests run; None for what this machine does not tell."""
    return {"temperature_c": None, "clock_mhz": None, "governor": None, "throttled": None, "free_memory_mb": None}


if __name__ == "__main__":
    json.dump({**describe(), **condition()}, sys.stdout, indent=1)
