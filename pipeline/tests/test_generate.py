"""Generation from a bundle: sampling, whole characters, ends, and one-line errors; over a toy that really runs."""

import dataclasses
import io
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from conftest import tiny_tokenizer
from device_tests.tests.toy import CONTEXT, VOCABULARY, NumpySession, ToyModel
from models.errors import GateError, UserError
from pipeline.bundle import BundleInputs, build_bundle
from pipeline.generate import RUNTIMES, GenerateOptions, OneByOne, TextStream, chosen_artifact, generate, prompt_ids, stream, told
from pipeline.manifest import Manifest
from pipeline.report import build_report
from pipeline.tests.fake_road import fake_outcome, fake_recipe, fake_road, fake_stages, with_toy

MODEL = ToyModel(0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    road = with_toy(fake_road(root / "road"))
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    return build_bundle(BundleInputs(fake_recipe(), road, report, "key"), root / "dist")


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
    assert re.match(r"onnx_(fp32|static_int8): \d+ tokens, .*; stopped: ", told(found))


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
    text = TextStream(tokenizer_of(bundle), [5])
    found = stream(one_by_one(NumpySession(MODEL)), artifact, [5] * 30, text, GenerateOptions(max_tokens=10_000), io.StringIO())
    assert found.ended == "context is full" and found.new_tokens == CONTEXT - 30 + 1


def one_by_one(session) -> OneByOne:
    return OneByOne(session, GenerateOptions())


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

    text = TextStream(tokenizer_of(bundle), [5])
    session = one_by_one(NumpySession(MODEL, ends))
    found = stream(session, manifest.artifacts[0], [5] * 3, text, GenerateOptions(max_tokens=20), io.StringIO())
    assert found.ended == "end of text" and found.new_tokens == 3 and found.text == tokenizer_of(bundle).decode([7, 7, 7])


def test_interrupt_ends_well(bundle, manifest):
    def interrupted(row, position):
        if position == 6:
            raise KeyboardInterrupt
        return row

    artifact, text = endless(manifest.artifacts[0]), TextStream(tokenizer_of(bundle), [5])
    found = stream(one_by_one(NumpySession(MODEL, interrupted)), artifact, [5] * 4, text, GenerateOptions(), io.StringIO())
    assert found.ended == "interrupted" and found.new_tokens == 3 and len(found.text) == 3


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
    assert f"100% of {with_draft.drafted_tokens} drafted tokens taken" in told(with_draft)
    with pytest.raises(UserError, match="--draft goes with greedy text only, and --temperature is 0.5"):
        run(bundle, draft=bundle.folder, temperature=0.5)


def test_a_prompt_is_not_computed_twice(bundle, tmp_path):
    cache = tmp_path / "prompt.npz"
    first = run(bundle, "def f(x):", max_tokens=8, prompt_cache=cache)
    again = run(bundle, "def f(x):", max_tokens=8, prompt_cache=cache)
    assert first.reused_tokens == 0 and again.reused_tokens == again.prompt_tokens - 1 and again.text == first.text
    other = run(bundle, "def g(y):", max_tokens=8, prompt_cache=cache)
    assert other.reused_tokens == len("def ") and other.text == run(bundle, "def g(y):", max_tokens=8).text
    assert f"{len('def ')} of {other.prompt_tokens} prompt tokens from the cache" in told(other)
    cache.write_bytes(b"no archive")
    with pytest.raises(UserError, match="prompt.npz: no prompt cache"):
        run(bundle, "def f(x):", prompt_cache=cache)
    assert cache.read_bytes() == b"no archive" and list(tmp_path.iterdir()) == [cache]
