"""The bundle's ``python/`` folder: generate.py, a single-file example for a Raspberry Pi."""

import shutil
from pathlib import Path

from pipeline.manifest import Manifest

SOURCE = Path(__file__).resolve().parent / "templates" / "python" / "generate.py"


def write_example(bundle: Path, manifest: Manifest) -> None:
    """Write ``bundle/python/generate.py``. It reads names and sizes from the manifest, so it is the same in every bundle."""
    (bundle / "python").mkdir()
    shutil.copyfile(SOURCE, bundle / "python" / SOURCE.name)
