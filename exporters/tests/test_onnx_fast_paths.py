"""Every fast path gives the answers of the slow one: prompt, steps, chunks and ragged batches, long prompts, drafts, cached beginnings.

Rounding differs between kernels for one row and for many, and an int8 activation can fall to the other side of a step by it: answers
are compared by the share of noise in them. Left padding, a lost chunk or a position off by one are noise of the size of the signal.
"""

import numpy as np
import pytest

from conftest import VOCABULARY
from device_tests import onnx_hybrid as host
from device_tests import onnx_session, prompt_cache
from device_tests.artifact import read_artifact
from device_tests.sessions import open_session as open_host
from device_tests.speculative import Speculator
from exporters import onnx_export, onnx_hybrid_int4, onnx_hybrid_int8, onnx_int8
from exporters.onnx_session import empty_past, feed, open_session, past_names, present_name, run_tokens
from exporters.settings import OnnxHybridInt4Settings, OnnxHybridInt8Settings, OnnxInt8Settings, OnnxSettings
from exporters.tests.families import tiny_decoder

LONG = 700  # context of a model whose prompts go in several chunks
PROMPT = 24
NOISE = 1e-3  # mean square of the difference over that of the answers
ROTARY = {"vocab_size": VOCABULARY, "max_position_embeddings": LONG, "head_dim": 16}
FAMILIES = {"llama": {"tie_word_embeddings": True}, "qwen3": {}}
MAKERS = {
    "static": (onnx_int8, OnnxInt8Settings(windows=4, decode_steps=4, mixed_precision=False)),
    "static, int8 cache": (onnx_int8, OnnxInt8Settings(windows=4, decode_steps=4, mixed_precision=False, kv_cache="int8")),
    "hybrid int8": (onnx_hybrid_int8, OnnxHybridInt8Settings(block=32, decode_steps=4)),
    "hybrid int8, int8 cache": (onnx_hybrid_int8, OnnxHybridInt8Settings(block=32, decode_steps=4, kv_cache="int8")),
    "hybrid int4": (onnx_hybrid_int4, OnnxHybridInt4Settings(block=16, decode_steps=4)),
}
FORMS = ["fp32", *MAKERS]
HYBRIDS = [form for form in MAKERS if form.startswith("hybrid")]


@pytest.fixture(scope="module")
def sidecar(text, tmp_path_factory):
    """The sidecar by family and form, made when first asked for."""
    made = {}

    def get(form, family="llama"):
        if (family, form) not in made:
            folder = tmp_path_factory.mktemp("fast")
            if form == "fp32":
                tiny_decoder(family, {**ROTARY, **FAMILIES[family]}).save_pretrained(folder / "model")
                (folder / "out").mkdir()
                onnx_export.run(OnnxSettings(greedy_tokens=1), folder / "out", model=folder / "model", text=text)
                made[family, form] = folder / "out" / "onnx_fp32.json"
            else:
                module, settings = MAKERS[form]
                module.run(settings, folder, onnx=get("fp32", family).parent, text=text)
                made[family, form] = folder / f"{module.NAME}.json"
        return made[family, form]

    return get


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(3, VOCABULARY, count)


def assert_same(got, expected, noise=NOISE):
    assert got.shape == expected.shape
    found = np.square(got - expected).mean() / np.square(expected).mean()
    assert found <= noise, f"noise {found:.1e} of the answers, limit {noise:.0e}"


def steps_of(session, ids):
    """Logits ``[n, vocab]`` after each of ``ids``, one at a time."""
    return np.stack([session.step(int(token)).copy() for token in ids])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_prompt_steps_and_chunks_agree(sidecar, form, family):
    """Teacher-forced after a prompt, after a prompt in two calls, and with no prompt at all."""
    ids = tokens(40)
    sessions = [open_host(sidecar(form, family), "onnxruntime") for _ in range(4)]
    expected = np.concatenate([sessions[0].prefill(ids[:PROMPT])[None], steps_of(sessions[0], ids[PROMPT:])])
    sessions[1].prefill(ids[:11])
    chunked = np.concatenate([sessions[1].prefill(ids[11:PROMPT])[None], steps_of(sessions[1], ids[PROMPT:])])
    stepped = steps_of(sessions[2], ids)[PROMPT - 1 :]
    sessions[3].prefill(ids[: PROMPT - 1])
    scored = sessions[3].score(ids[PROMPT - 1 :])
    # A hybrid's tokens go through one graph or the other: between its ways lies what int8 activations cost.
    noise = 5e-3 if form in HYBRIDS or "int8 cache" in form else NOISE
    for got in (chunked, stepped, scored):
        assert_same(got, expected, noise)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_a_ragged_batch_padded_on_the_right_is_its_rows(sidecar, form, family):
    """Two prompts of different lengths in one call, then a step of both: as each row alone, in the graphs themselves."""
    artifact = read_artifact(sidecar(form, family))
    decode = open_session(artifact.path)
    lengths = np.array([PROMPT, 9])
    rows = np.stack([tokens(PROMPT + 1, seed) for seed in (1, 2)])
    mask = (np.arange(PROMPT)[None] < lengths[:, None]).astype(np.int64)
    step_mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
    prefill = prompt_of(sidecar(form, family), decode)
    past = prefill(rows[:, :PROMPT] * mask, mask)
    together, _ = run_tokens(decode, rows[[0, 1], lengths][:, None], past, step_mask)
    for row, length in enumerate(lengths):
        own = prefill(rows[row : row + 1, :length], np.ones((1, length), np.int64))
        alone, _ = run_tokens(decode, rows[row : row + 1, length : length + 1], own)
        assert_same(together[row], alone[0])


def prompt_of(sidecar, decode):
    """``(ids [batch, n], mask) -> cache`` by the graph that this artifact's prompts go through."""
    artifact = read_artifact(sidecar)
    session = open_host(sidecar, "onnxruntime")._prompt_session if artifact.prompt is not None else decode
    names = past_names(session)

    def run(ids, mask):
        presents = session.run([present_name(name) for name in names], feed(ids, empty_past(session, len(ids)), mask))
        return dict(zip(names, presents, strict=True))

    return run


@pytest.mark.parametrize("form", FORMS)
def test_a_long_prompt_goes_in_chunks_of_bounded_size_and_answers_the_same(sidecar, form, monkeypatch):
    """600 tokens; the logits of a graph that gives all of them may take 64 rows at most here."""
    ids = tokens(640)
    for module in (host, onnx_session):
        monkeypatch.setattr(module, "CHUNK_TOKENS", LONG)
    whole = open_host(sidecar(form), "onnxruntime")
    expected = np.concatenate([whole.prefill(ids[:600])[None], steps_of(whole, ids[600:])])
    monkeypatch.undo()
    monkeypatch.setattr(onnx_session, "PROMPT_LOGITS_BYTES", 4 * VOCABULARY * 64)
    chunked = open_host(sidecar(form), "onnxruntime")
    given, run_bound = [], chunked._run_bound
    monkeypatch.setattr(chunked, "_run_bound", lambda *call: (given.append(call[-1]), run_bound(*call)))
    first = chunked.prefill(ids[:600])
    assert sum(given) == 600 and max(given) <= (host.CHUNK_TOKENS if form in HYBRIDS else 64) and len(given) >= 3
    assert_same(np.concatenate([first[None], steps_of(chunked, ids[600:])]), expected, 5e-3 if "int8 cache" in form else NOISE)


@pytest.mark.parametrize("form", FORMS)
def test_a_cached_beginning_is_a_computed_one(sidecar, form, tmp_path):
    """A system prompt from disk and another question behind it, the question short or long."""
    system, artifact = tokens(PROMPT), read_artifact(sidecar(form))
    saver = open_host(sidecar(form), "onnxruntime")
    saver.prefill(system)
    prompt_cache.save(tmp_path / "cache", saver, artifact, system)
    for more in (4, 30):
        ids = np.concatenate([system, tokens(more, 5)])
        cached, computed = (open_host(sidecar(form), "onnxruntime") for _ in range(2))
        assert prompt_cache.load(tmp_path / "cache", cached, artifact, ids) == PROMPT
        rows = [
            np.concatenate([session.prefill(ids[session.position :])[None], steps_of(session, tokens(9, 6))])
            for session in (cached, computed)
        ]
        assert_same(rows[0], rows[1], 5e-3 if form in HYBRIDS or "int8 cache" in form else NOISE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("draft", ["itself", "fp32"])
def test_drafted_text_is_greedy_text(sidecar, form, draft):
    prompt, count = tokens(PROMPT), 40
    alone = open_host(sidecar(form), "onnxruntime")
    greedy = [int(alone.prefill(prompt).argmax())]
    while len(greedy) < count:
        greedy.append(int(alone.step(greedy[-1]).argmax()))
    model, other = open_host(sidecar(form), "onnxruntime"), open_host(sidecar(form if draft == "itself" else "fp32"), "onnxruntime")
    speculator = Speculator(model, other, 4)
    drafted = [speculator.first(prompt)]
    while len(drafted) < count:
        drafted.append(speculator.next(drafted[-1]))
    assert drafted == greedy
    assert speculator.accepted > speculator.proposed / 2
