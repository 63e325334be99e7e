"""The Kotlin library of the bundles, compiled once per session for each runtime. A test module names this one in ``pytest_plugins``."""

import pytest

from pipeline.tests import kotlin_tools


def running(make):
    try:
        runner = make()
    except kotlin_tools.Unavailable as reason:
        pytest.skip(str(reason))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def onnx_library():
    yield from running(kotlin_tools.onnx_runner)


@pytest.fixture(scope="session")
def litert_library():
    yield from running(kotlin_tools.litert_runner)
