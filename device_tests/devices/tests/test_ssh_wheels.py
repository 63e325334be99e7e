"""The pins for boards: they are those of this project, every board gets what fits it, and what it cannot get is said."""

import re
from importlib.metadata import requires, version

import pytest

from device_tests.devices.ssh_wheels import Lock, Target, Wheel, choose, fetch, read_lock
from device_tests.sessions import RUNTIMES

NEWER_NUMPY = {"numpy"}  # Pythons without a wheel of our numpy get another


def target(python: str = "3.11", glibc: str = "2.36", isa: str = "aarch64") -> Target:
    numbers = [tuple(int(part) for part in text.split(".")) for text in (python, glibc)]
    return Target(*numbers, isa)


def wheel(file: str) -> Wheel:
    return Wheel("x", "1", file, "0" * 64, 1, 1)


@pytest.mark.parametrize(
    ("file", "fits"),
    [
        ("x-1-cp311-cp311-manylinux_2_28_aarch64.whl", True),
        ("x-1-cp311-cp311-manylinux_2_36_aarch64.whl", True),
        ("x-1-cp311-cp311-manylinux_2_37_aarch64.whl", False),  # a newer C library
        ("x-1-cp311-cp311-manylinux2014_aarch64.whl", True),
        ("x-1-cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl", True),
        ("x-1-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("x-1-cp311-cp311-musllinux_1_2_aarch64.whl", False),
        ("x-1-cp311-cp311-macosx_11_0_arm64.whl", False),
        ("x-1-cp312-cp312-manylinux_2_28_aarch64.whl", False),
        ("x-1-cp313-cp313t-manylinux_2_28_aarch64.whl", False),
        ("x-1-cp39-abi3-manylinux_2_28_aarch64.whl", True),  # that of an older Python fits newer ones
        ("x-1-cp312-abi3-manylinux_2_28_aarch64.whl", False),
        ("x-1-py3-none-any.whl", True),
        ("x-1-py2.py3-none-any.whl", True),
        ("x-1-py2-none-any.whl", False),
    ],
)
def test_a_wheel_fits_by_its_name(file, fits):
    assert wheel(file).fits(target()) is fits


def test_the_pins_are_the_versions_that_this_project_uses():
    """Whoever moves a version has to write the lock anew; what a runtime requires is all there."""
    lock = read_lock()
    for found in lock.wheels:
        if found.name not in NEWER_NUMPY:
            assert found.version == version(found.name), f"{found.file}: run python -m device_tests.devices.ssh_wheels_update"
    assert {found.version for found in lock.wheels if found.name == "numpy"} >= {version("numpy")}
    for runtime, (_, _, _, package) in RUNTIMES.items():
        needed = [re.split(r"[<>=!~; ]", requirement)[0] for requirement in requires(package) if "extra ==" not in requirement]
        assert {re.sub(r"[-_.]+", "-", name).lower() for name in [package, *needed]} == set(lock.runtimes[runtime])


@pytest.mark.parametrize("isa", ["aarch64", "x86_64"])
@pytest.mark.parametrize(
    ("python", "without"),
    [
        ("3.9", {"onnxruntime", "litert"}),
        ("3.10", {"onnxruntime"}),
        ("3.11", set()),
        ("3.12", {"tflite"}),
        ("3.13", {"tflite"}),
        ("3.14", {"tflite"}),
    ],
)
def test_every_python_gets_the_runtimes_that_have_wheels_for_it(isa, python, without):
    wheels, missing = choose(read_lock(), target(python, "2.39", isa))
    assert set(missing) == without
    assert all(found.fits(target(python, "2.39", isa)) and re.fullmatch("[0-9a-f]{64}", found.sha256) for found in wheels.values())
    numpy = wheels["numpy"].version
    assert numpy.startswith("1.") if "tflite" not in missing else numpy  # tflite-runtime 2.14 fails with numpy 2, and not at import


def test_what_cannot_be_had_is_said_with_the_reason():
    _, missing = choose(read_lock(), target("3.13", "2.41"))
    assert missing == {"tflite": "tflite-runtime 2.14.0 has wheels for Python 3.9, 3.10, 3.11, the board has 3.13"}
    _, missing = choose(read_lock(), target("3.11", "2.31"))
    assert missing == {"tflite": "tflite-runtime 2.14.0 needs glibc 2.34, the board has 2.31; use a newer system"}
    wheels, missing = choose(read_lock(), target("3.11", "2.36", "riscv64"))
    assert not wheels and missing["litert"] == "ai-edge-litert has no wheels for riscv64; use another board"


def test_a_wheel_of_other_bytes_is_not_taken(tmp_path):
    """One that lies in the cache but is not what the lock says is fetched again, so that it never gets to a board."""
    pure = [found for found in read_lock().wheels if found.name == "tqdm"]
    lock = Lock({"x": ("tqdm",)}, tuple(pure))
    wheels, _ = choose(lock, target())
    (tmp_path / wheels["tqdm"].file).write_bytes(b"something else")
    [file] = fetch(list(wheels.values()), target(), tmp_path)
    assert file.stat().st_size == wheels["tqdm"].bytes
