"""``model.litertlm``: a TFLite artifact with its tokenizer in one file, for LiteRT-LM, Google's host for language models.

The file is made by Google's builder. The builder looks at nothing that it packs, so the graph inside is replayed here first, and has
to answer as the artifact does, to the bit.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from litert_lm_builder import litertlm_builder
from litert_lm_builder.litertlm_builder import DType, LitertLmFileBuilder, Metadata, TfLiteModelType
from litert_lm_builder.runtime.proto.llm_metadata_pb2 import LlmMetadata
from tokenizers import Tokenizer

from exporters.tflite_litert_lm import HIDDEN, write_self_caching
from models.errors import GateError
from models.provenance import sha256_of
from pipeline.manifest import Artifact, Interface, OtherRuntime, Prompt

NAME = "LiteRT-LM"
EPOCH = "1980-01-01T00:00:00+00:00"
DECODE = "decode"
CHECKED_STEPS = 4
CONTRACT = ("tokens", "positions", "mask", "k_0")  # what the rewriting knows how to serve


def obstacle(artifact: Artifact) -> str | None:
    """Why no file can be made of a TFLite artifact, or None."""
    inputs = {tensor["name"]: tensor["dtype"] for tensor in artifact.tensors["decode"]["inputs"]}
    other = [name for name in CONTRACT if inputs.get(name) != ("int32" if name in CONTRACT[:2] else "float32")]
    if other:
        return f"no .litertlm: LiteRT-LM feeds int32 tokens and keeps a float32 cache, and {', '.join(other)} of {artifact.name} differ"
    return None


def add_litert_lm(bundle: Path, artifact: Artifact, prompt: Prompt) -> Artifact:
    """Write ``<model>.litertlm`` beside the model. GateError unless the graph in it answers as the artifact, to the bit."""
    source = bundle / artifact.file
    target, tokenizer = source.with_suffix(".litertlm"), source.parent / "tokenizer.json"
    with tempfile.TemporaryDirectory(prefix="litertlm-") as scratch:
        graph, metadata = Path(scratch) / "model.tflite", Path(scratch) / "metadata.pb"
        write_self_caching(source, graph, artifact.interface.layers)
        check_same(source, graph, artifact.interface)
        metadata.write_bytes(described(artifact.interface, tokenizer, prompt).SerializeToString(deterministic=True))
        builder = LitertLmFileBuilder()
        builder.add_system_metadata(Metadata("model", artifact.name, DType.STRING))
        builder.add_llm_metadata(str(metadata))
        builder.add_tflite_model(str(graph), TfLiteModelType.PREFILL_DECODE)
        builder.add_hf_tokenizer(str(tokenizer))
        with fixed_identity(f"{sha256_of(graph)} {sha256_of(tokenizer)} {sha256_of(metadata)}"), target.open("wb") as file:
            builder.build(file)
    return artifact.model_copy(update={"litert_lm_file": f"{target.parent.name}/{target.name}"})


@contextmanager
def fixed_identity(content: str) -> Iterator[None]:
    """The builder stamps a random id and the time on every file; here the id follows from the content, and the time is fixed."""

    def populate(metadata: list[Metadata]) -> list[Metadata]:
        identity = {"uuid": str(uuid5(NAMESPACE_URL, content)), "creation_timestamp": EPOCH}
        return [*metadata, *(Metadata(key, value, DType.STRING) for key, value in identity.items())]

    kept, litertlm_builder.populate_system_metadata = litertlm_builder.populate_system_metadata, populate
    try:
        yield
    finally:
        litertlm_builder.populate_system_metadata = kept


def described(interface: Interface, tokenizer: Path, prompt: Prompt) -> LlmMetadata:
    """What the host has to know: the context, where a text begins and ends, and how messages become text."""
    message = LlmMetadata(max_num_tokens=interface.context_tokens)
    message.llm_model_type.generic_model.SetInParent()
    if interface.eos_token_id is not None:
        message.stop_tokens.add().token_ids.ids.append(interface.eos_token_id)
    encoder = Tokenizer.from_file(str(tokenizer))
    whole, plain = encoder.encode("a").ids, encoder.encode("a", add_special_tokens=False).ids
    for token in whole[: max(0, len(whole) - len(plain))] if whole[-len(plain) :] == plain else ():
        message.start_token.token_ids.ids.append(token)  # the host asks its tokenizer for the plain ids
    if prompt.chat_template:
        message.jinja_prompt_template = prompt.chat_template
    return message


def check_same(source: Path, graph: Path, interface: Interface) -> None:
    """GateError where the rewritten graph's logits are not the artifact's own, after the same calls of each signature for prompts.

    The prompt is a whole chunk and a short one; single tokens follow.
    """
    artifact, rewritten = (interpreter_of(path) for path in (source, graph))
    for name in artifact.get_signature_list():
        if name != DECODE:
            check_signature(Runners(artifact, name), Runners(rewritten, name), interface, f"{source.name} for {NAME}, {name}")


def interpreter_of(path: Path) -> Interpreter:
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


class Runners:
    """A signature for prompts and the one for single tokens, with a cache that starts out empty."""

    def __init__(self, interpreter: Interpreter, prompt: str) -> None:
        self._interpreter = interpreter  # runners do not keep it alive
        self._prompt, self._decode = (interpreter.get_signature_runner(name) for name in (prompt, DECODE))
        details = self._prompt.get_input_details()
        self.chunk = int(details["tokens"]["shape"][1])
        self.cache = {
            name: np.zeros(each["shape"], np.float32) for name, each in details.items() if len(each["shape"]) == 4 and name != "mask"
        }

    def call(self, ids: np.ndarray, start: int) -> dict[str, np.ndarray]:
        """Outputs for int32 ``[n]`` ids at positions from ``start``; behind a short prompt stand zeros."""
        runner, width = (self._decode, 1) if len(ids) == 1 else (self._prompt, self.chunk)
        tokens, positions = np.zeros((2, 1, width), np.int32)
        tokens[0, : len(ids)], positions[0, : len(ids)] = ids, np.arange(start, start + len(ids))
        feeds = {"tokens": tokens, "positions": positions, **self.cache}
        wanted = runner.get_input_details()
        if "mask" in wanted:
            context = wanted["mask"]["shape"][3] - width
            mask = np.full((1, 1, width, context + width), HIDDEN, np.float32)
            mask[..., :start] = 0
            mask[0, 0, :, context:] = np.where(np.tri(width, dtype=bool), 0, HIDDEN)
            feeds["mask"] = mask
        if "last" in wanted:
            feeds["last"] = np.array([len(ids) - 1], np.int32)
        answers = runner(**feeds)
        for name, cache in self.cache.items():
            if name in answers:
                self.cache[name] = answers[name]
            else:
                cache[:, :, start : start + len(ids)] = answers[f"new_{name}"][:, :, : len(ids)]
        return answers


def check_signature(artifact: Runners, rewritten: Runners, interface: Interface, name: str) -> None:
    """GateError unless both give the same logits to the bit after the same prompt in chunks."""
    chunk, context = artifact.chunk, interface.context_tokens
    length = min(min(2, context // chunk) * chunk - 1, context - CHECKED_STEPS)  # writing may not reach over the cache's end
    prompt = np.arange(1, length + 1, dtype=np.int32) % interface.vocab_size
    for start in range(0, length, chunk):
        for runners in (artifact, rewritten):
            runners.call(prompt[start : start + chunk], start)
    token = int(prompt[-1])
    for step in range(CHECKED_STEPS):
        ids = np.array([token], np.int32)
        expected, found = (runners.call(ids, length + step)["logits"].reshape(-1) for runners in (artifact, rewritten))
        if not np.array_equal(found, expected):
            difference = float(np.abs(found - expected).max())
            raise GateError(f"{name}: logits differ by up to {difference:.2g} from the artifact's; 0 is allowed")
        token = int(found.argmax())


def litert_lm(artifact: Artifact) -> OtherRuntime:
    """What LiteRT-LM can do with a TFLite artifact of this bundle."""
    if artifact.litert_lm_file:
        return OtherRuntime(name=NAME, opens=artifact.litert_lm_file, note=None)
    note = obstacle(artifact) or "not in here: `pocketlm bundle --litert-lm` adds a .litertlm, as large as the model"
    return OtherRuntime(name=NAME, opens=None, note=note)
