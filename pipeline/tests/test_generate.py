"""Generation from a bundle: sampling, whole characters, ends, and one-line errors; over a toy that really runs."""

import dataclasses
import io
import logging
import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from conftest import tiny_tokenizer
from device_tests.tests.toy import CONTEXT, VOCABULARY, NumpySession, ToyModel
from models.errors import GateError, UserError
from pipeline import library_output
from pipeline.bundle import BundleInputs, build_bundle
from pipeline.generate import RUNTIMES, chosen_artifact, generate
from pipeline.manifest import Manifest
from pipeline.report import build_report
from pipeline.streaming import INTERRUPTED, GenerateOptions, OneByOne, Request, Written, prompt_ids, stream, told_of
from pipeline.tests.fake_road import EVERYTHING, fake_outcome, fake_recipe, fake_road, fake_stages, with_toy
from pipeline.text_pieces import StopAt, TextStream
from pipeline.text_scoring import cut

MODEL = ToyModel(0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    road = with_toy(fake_road(root / "road"))
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    return build_bundle(BundleInputs(fake_recipe(), road, report, "key", EVERYTHING), root / "dist")


@pytest.fixture
def manifest(bundle) -> Manifest:
    return Manifest.model_validate_json((bundle.folder / "manifest.json").read_text())


def tokenizer_of(bundle) -> Tokenizer:
    return Tokenizer.from_file(str(bundle.folder / "tokenizer/tokenizer.json"))


def greedy_text(bundle, prompt: str, count: int) -> str:
    """What the numpy form of the toy says, without any cache."""
    tokenizer = tokenizer_of(bundle)
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        ids.append(int(MODEL.logits(np.array(ids))[-1].argmax()))
        if ids[-1] == 0:
            return tokenizer.decode(ids[len(tokenizer.encode(prompt).ids) : -1])
    return tokenizer.decode(ids[len(tokenizer.encode(prompt).ids) :])


def run(bundle, prompt="def f(x):", runtime="onnx", **options):
    out = io.StringIO()
    found = generate(bundle.folder, runtime, prompt, GenerateOptions(threads=1, **options), out)
    assert out.getvalue() == found.text
    return found


def test_greedy_text_is_the_model_s_own(bundle):
    found = run(bundle, max_tokens=12)
    assert found.text == greedy_text(bundle, "def f(x):", 12)
    assert found.prompt_tokens == 9 and found.first_token_ms > 0
    assert found.peak_rss_mb is None or found.peak_rss_mb > 10
    assert re.match(r"onnx_(fp32|static_int8): \d+ tokens, .*; stopped: ", told_of(found))


def test_what_libraries_print_goes_to_the_log(caplog, capfd):
    with caplog.at_level(logging.INFO, "pipeline.library_output"):
        with library_output.to_log():
            os.write(2, b"INFO: created a delegate\n")
        os.write(2, b"an error\n")
    assert caplog.messages == ["INFO: created a delegate"] and capfd.readouterr().err == "an error\n"


def test_zip_and_folder_say_the_same(bundle):
    out = io.StringIO()
    assert generate(bundle.archive, "onnx", "abc", GenerateOptions(max_tokens=4), out).text == run(bundle, "abc", max_tokens=4).text


def test_echo_writes_the_prompt_once_the_model_is_open(bundle):
    out = io.StringIO()
    found = generate(bundle.folder, "onnx", "abc", GenerateOptions(max_tokens=3, echo=True), out)
    assert out.getvalue() == "abc" + found.text
    out = io.StringIO()
    with pytest.raises(UserError, match="the prompt has"):
        generate(bundle.folder, "onnx", "a" * 100, GenerateOptions(echo=True), out)
    assert out.getvalue() == ""


def test_same_seed_same_text_and_other_seeds_differ(bundle):
    texts = [run(bundle, temperature=3.0, seed=seed, max_tokens=20).text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) > 1


def test_artifact_can_be_chosen(bundle):
    assert run(bundle, artifact="onnx_fp32", max_tokens=1).artifact == "onnx_fp32"
    with pytest.raises(UserError, match="--artifact tflite_fp32: --runtime onnx opens onnx_fp32, onnx_static_int8"):
        run(bundle, artifact="tflite_fp32")


def test_runtime_opens_its_own_format(bundle):
    with pytest.raises(UserError, match="--runtime cuda: no such runtime; give one of onnx, litert, tflite"):
        run(bundle, runtime="cuda")
    with pytest.raises(GateError, match="cannot open tflite_fp32"):  # right bytes, but no model
        run(bundle, runtime="litert")


def test_context_is_filled_and_not_overrun(bundle, manifest):
    artifact = endless(manifest.artifacts[0])
    found = streamed(bundle, NumpySession(MODEL), artifact, [5] * 30, max_tokens=10_000)
    assert found.ended == "context is full" and found.new_tokens == CONTEXT - 30 + 1


def streamed(bundle, session, artifact, ids, emit=lambda piece: True, **options):
    options = GenerateOptions(**options)
    return stream(OneByOne(session, options), Request(artifact, tokenizer_of(bundle), ids, options), emit)


def endless(artifact):
    """The same artifact without a token that ends a text."""
    return artifact.model_copy(update={"interface": artifact.interface.model_copy(update={"eos_token_id": None})})


def test_prompt_of_the_context_s_length_is_refused_in_one_line(bundle, manifest):
    assert len(prompt_ids(tokenizer_of(bundle), "a" * (CONTEXT - 1), manifest.artifacts[0])) == CONTEXT - 1
    for length in (CONTEXT, 5 * CONTEXT):
        with pytest.raises(UserError, match=f"the prompt has {length} tokens but the context holds {CONTEXT}; give a shorter") as caught:
            run(bundle, "a" * length)
        assert "\n" not in str(caught.value)


def test_empty_prompt_starts_with_the_model_s_first_token(bundle, manifest):
    artifact = manifest.artifacts[0]
    assert prompt_ids(tokenizer_of(bundle), "", artifact) == [0]
    assert run(bundle, "", max_tokens=3).prompt_tokens == 1
    bare = artifact.model_copy(update={"interface": artifact.interface.model_copy(update={"eos_token_id": None, "bos_token_id": None})})
    with pytest.raises(UserError, match="the prompt is empty"):
        prompt_ids(tokenizer_of(bundle), "", bare)


def test_prompt_that_is_no_text_is_refused(bundle):
    with pytest.raises(UserError, match="not UTF-8"):
        run(bundle, "a\udcff")


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
     ("seed", -1), ("threads", 0)],
)  # fmt: skip
def test_senseless_options_are_named(bundle, option, value):
    options = dataclasses.replace(GenerateOptions(), **{option: value})
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {value}: give "):
        generate(bundle.folder, "onnx", "a", options, io.StringIO())


def test_end_of_text_stops_and_is_not_written(bundle, manifest):
    def ends(row, position):
        return np.where(np.arange(VOCABULARY) == (0 if position >= 5 else 7), 9.0, 0.0).astype(np.float32)

    found = streamed(bundle, NumpySession(MODEL, ends), manifest.artifacts[0], [5] * 3, max_tokens=20)
    assert found.ended == "end of text" and found.new_tokens == 3 and found.text == tokenizer_of(bundle).decode([7, 7, 7])


def test_interrupt_ends_well(bundle, manifest):
    def interrupted(row, position):
        if position == 6:
            raise KeyboardInterrupt
        return row

    found = streamed(bundle, NumpySession(MODEL, interrupted), endless(manifest.artifacts[0]), [5] * 4)
    assert found.ended == INTERRUPTED and found.new_tokens == 3 and len(found.text) == 3


def test_whoever_listens_may_end_it(bundle, manifest):
    pieces: list[Written] = []

    def twice(piece: Written) -> bool:
        pieces.append(piece)
        return len(pieces) < 2

    found = streamed(bundle, NumpySession(MODEL), endless(manifest.artifacts[0]), [5] * 4, twice)
    assert found.ended == INTERRUPTED and found.new_tokens == 2 and "".join(piece.text for piece in pieces) == found.text
    assert [piece.new_tokens for piece in pieces] == [1, 2] and pieces[0].decode_tokens_per_s is None and pieces[1].decode_tokens_per_s > 0


def test_a_stop_text_ends_the_answer_and_is_not_in_it(bundle, manifest):
    artifact, drawn = endless(manifest.artifacts[0]), {"temperature": 3.0, "max_tokens": 12}
    whole = streamed(bundle, NumpySession(MODEL), artifact, [5] * 4, **drawn).text
    stop = whole[4:7]
    found = streamed(bundle, NumpySession(MODEL), artifact, [5] * 4, **drawn, stop=(stop, "never there"))
    assert found.text == whole[: whole.index(stop)] and found.ended == "stop text"
    assert found.new_tokens < 12, "it ended with the stop text"
    other = streamed(bundle, NumpySession(MODEL), artifact, [5] * 4, **drawn, stop=("never there",))
    half = streamed(bundle, NumpySession(MODEL), artifact, [5] * 4, **{**drawn, "max_tokens": 6}, stop=(stop,))
    assert other.text == whole
    assert len(half.text) > 4 and whole.startswith(half.text), "what could have become a stop text, and did not, is written at the end"
    with pytest.raises(UserError, match="--stop with an empty text"):
        run(bundle, stop=("",))


@given(text=st.text("ab.", max_size=30), stops=st.lists(st.text("ab.", max_size=4), max_size=3), sizes=st.lists(st.integers(1, 5)))
def test_text_in_pieces_is_cut_where_whole_text_is(text, stops, sizes):
    """Held against `pipeline.text_scoring.cut`, which looks at a text as a whole: at all that was there when a stop text was complete."""
    pieces, rest, sizes = [], text, sizes or [1]
    while rest:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(rest[:size])
        rest = rest[size:]
    stop = StopAt(tuple(stops))
    written = [stop.push(piece) for piece in pieces]
    whole = "".join(written) + stop.finish()
    prefixes = ["".join(pieces[: count + 1]) for count in range(len(pieces))]
    complete = next((prefix for prefix in prefixes if any(each and each in prefix for each in stops)), text)
    assert whole == cut(complete, tuple(stops))
    assert (stop.found is not None) == any(each and each in text for each in stops)
    for count in range(len(written)):  # and nothing is held back that could not begin a stop text
        so_far, shown = "".join(pieces[: count + 1]), "".join(written[: count + 1])
        held = "" if any(each and each in so_far for each in stops) else so_far[len(shown) :]
        assert not held or any(each.startswith(held) for each in stops)


@pytest.mark.parametrize("text", ["é😀 naïve 中文", "👩‍👩‍👧‍👦 x", "plain", " leading", "\ufffd!", "a\n\n  b"])
def test_no_half_character_is_ever_written(text):
    tokenizer = tiny_tokenizer().backend_tokenizer
    ids, prompt = tokenizer.encode(text).ids, tokenizer.encode("p:").ids
    pieces = TextStream(tokenizer, prompt)
    written = [pieces.push(token) for token in ids]
    assert "".join(written) + pieces.finish() == text
    for piece in written:
        piece.encode("utf-8")
        assert "\ufffd" in text or "\ufffd" not in piece


def test_unfinished_bytes_come_out_at_the_end():
    tokenizer = tiny_tokenizer().backend_tokenizer
    half = tokenizer.encode("😀").ids[:-1]
    pieces = TextStream(tokenizer, tokenizer.encode("p").ids)
    assert "".join(pieces.push(token) for token in half) == "" and set(pieces.finish()) == {"\ufffd"}


def test_the_artifact_that_answered_soonest_is_taken(manifest):
    """By what was measured when the bundle was made; a file without times comes last, however small."""
    first = manifest.artifacts[0]
    timed = first.runtimes[0].model_copy(update={"first_token_ms": 10.0, "decode_tokens_per_s": 100.0})
    untimed = timed.model_copy(update={"first_token_ms": None, "decode_tokens_per_s": None})
    quick = timed.model_copy(update={"decode_tokens_per_s": 200.0})
    artifacts = [
        first.model_copy(update={"name": name, "runtimes": [device], "bytes": size})
        for name, device, size in (("large", timed, 9), ("quick", quick, 8), ("untimed", untimed, 1))
    ]
    found = manifest.model_copy(update={"artifacts": artifacts})
    runtime = next(ours for ours, (name, _) in RUNTIMES.items() if name == timed.runtime)
    assert chosen_artifact(found, runtime, None).name == "quick"
    assert chosen_artifact(found.model_copy(update={"artifacts": artifacts[2:]}), runtime, None).name == "untimed"
    assert chosen_artifact(found, runtime, "large").name == "large"


def test_a_draft_leaves_greedy_text_as_it_is(bundle):
    """The model as its own draft: every guess is taken."""
    prompt = next(letter for letter in "abcdefghijklmnop" if run(bundle, letter, max_tokens=12).new_tokens == 12)
    alone, with_draft = run(bundle, prompt, max_tokens=12), run(bundle, prompt, max_tokens=12, draft=bundle.folder, ahead=3)
    assert with_draft.text == alone.text and with_draft.drafted_tokens > 0
    assert with_draft.accepted_tokens == with_draft.drafted_tokens
    assert f"100% of {with_draft.drafted_tokens} drafted tokens taken" in told_of(with_draft)
    with pytest.raises(UserError, match="--draft goes with greedy text only, and --temperature is 0.5"):
        run(bundle, draft=bundle.folder, temperature=0.5)


def test_packed_weights_are_kept_in_a_folder_and_change_no_text(bundle, tmp_path):
    packed = tmp_path / "packed"
    first, again = (run(bundle, "def f(x):", max_tokens=8, packed=packed) for _ in range(2))
    assert first.text == again.text == run(bundle, "def f(x):", max_tokens=8).text
    [place] = packed.iterdir()
    assert place.name.startswith(f"{first.artifact}-") and list(place.glob("*.data"))
    with pytest.raises(UserError, match="litert cannot keep packed weights in a folder.*leave out --packed"):
        run(bundle, "def f(x):", runtime="litert", packed=packed)


def test_a_prompt_is_not_computed_twice(bundle, tmp_path):
    cache = tmp_path / "prompt.npz"
    first = run(bundle, "def f(x):", max_tokens=8, prompt_cache=cache)
    again = run(bundle, "def f(x):", max_tokens=8, prompt_cache=cache)
    assert first.reused_tokens == 0 and again.reused_tokens == again.prompt_tokens - 1 and again.text == first.text
    other = run(bundle, "def g(y):", max_tokens=8, prompt_cache=cache)
    assert other.reused_tokens == len("def ") and other.text == run(bundle, "def g(y):", max_tokens=8).text
    assert f"{len('def ')} of {other.prompt_tokens} prompt tokens from the cache" in told_of(other)
    cache.write_bytes(b"no archive")
    with pytest.raises(UserError, match="prompt.npz: no prompt cache"):
        run(bundle, "def f(x):", prompt_cache=cache)
    assert cache.read_bytes() == b"no archive" and list(tmp_path.iterdir()) == [cache]
