"""In which calls of a TFLite file the Kotlin library takes a prompt."""

from itertools import product

import pytest

CALL_TOKENS = 16  # tokens that take as long as a call by itself

pytest_plugins = ["pipeline.tests.kotlin_fixtures"]


@pytest.mark.parametrize("lengths", [(64,), (4, 16), (16, 64, 256), (1, 7, 50), (16, 48, 64)])
def test_no_other_calls_would_take_less_time(onnx_library, lengths):
    """Held against every way of covering the prompt; of equally quick ones, against the fewest calls."""
    tokens = list(range(1, 140))
    for count, calls in zip(tokens, onnx_library.ask("calls", tokens=tokens, lengths=lengths), strict=True):
        assert calls == sorted(calls, reverse=True) and sum(calls) >= count and set(calls) <= set(lengths)
        assert (time_of(calls), len(calls)) == min((time_of(way), len(way)) for way in ways(count, lengths)), count


def ways(count: int, lengths: tuple[int, ...]):
    """Every multiset of calls that holds so many tokens, none of whose kinds is more than needed alone."""
    for counts in product(*(range(-(-count // length) + 1) for length in lengths)):
        calls = [length for length, times in zip(lengths, counts, strict=True) for _ in range(times)]
        if sum(calls) >= count:
            yield calls


def time_of(calls: list[int]) -> int:
    return sum(calls) + CALL_TOKENS * len(calls)


def test_a_long_prompt_goes_in_long_calls(onnx_library):
    found = onnx_library.ask("calls", tokens=[4096, 4097], lengths=(16, 64, 256))
    assert found == [[256] * 16, [256] * 16 + [16]]
