"""``model.litertlm`` of a tiny random model: the graph in it answers as the artifact to the bit, and LiteRT-LM writes the same text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from tokenizers import Tokenizer

from conftest import VOCABULARY, write_checkpoint
from exporters import tflite_export, tflite_int8, tflite_litert_lm
from exporters.settings import TfliteInt8Settings, TfliteSettings
from exporters.tflite_litert_lm import separate_weights, write_self_caching
from exporters.tflite_structure import operators, read_model, tensor_contract, write_model
from models.errors import GateError
from pipeline.litert_lm import Runners, add_litert_lm, interpreter_of, litert_lm, obstacle
from pipeline.manifest import Artifact, Prompt
from pipeline.tests.other_runtimes import LITERT_LM, PROMPTS, check_same, said_by

PLAIN = Prompt(format="plain text", chat_template=None)
TOKENS = 12
NAME = "tflite_static_int8"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A static int8 artifact of a tiny Llama with its tokenizer, as they lie in a bundle."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("exported")
    draw = np.random.default_rng(0)
    for name, count in (("calibration", 8), ("validation", 4)):
        np.save(root / f"{name}.npy", draw.integers(0, VOCABULARY, (count, 40)).astype(np.int32))
    model = write_checkpoint(root / "model", "llama", tied=False)
    for stage in ("float", "bundle/litert"):
        (root / stage).mkdir(parents=True)
    tflite_export.run(TfliteSettings(prefill_tokens=12, context_tokens=100), root / "float", model=model, text=root)
    tflite_int8.run(TfliteInt8Settings(windows=4, decode_steps=6), root / "bundle/litert", tflite=root / "float", text=root)
    shutil.copyfile(model / "tokenizer.json", root / "bundle/litert/tokenizer.json")
    return root / "bundle"


@pytest.fixture
def bundle(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


def artifact_of(bundle: Path) -> Artifact:
    sidecar = json.loads((bundle / f"litert/{NAME}.json").read_text())
    return Artifact(
        recommended=True, file=f"litert/{sidecar['file']}", sidecar=f"litert/{NAME}.json", files=[f"litert/{sidecar['file']}"],
        bytes_compressed=1, why="", gates={}, quality=None, runtimes=[],
        **{key: sidecar[key] for key in ("name", "format", "sha256", "bytes", "interface", "tensors")},
    )  # fmt: skip


def test_signatures_are_those_that_litert_lm_looks_for(bundle, tmp_path):
    write_self_caching(bundle / f"litert/{NAME}.tflite", tmp_path / "graph.tflite", 2)
    contract = tensor_contract(read_model(tmp_path / "graph.tflite"))
    cache = {f"kv_cache_{part}_{layer}": [1, 2, 100, 16] for part in "kv" for layer in range(2)}
    (prompt,) = contract.keys() - {"decode"}
    for signature, tokens, logits in ((prompt, 12, {}), ("decode", 1, {"logits": [1, 1, VOCABULARY]})):
        shapes = {side: {tensor["name"]: tensor["shape"] for tensor in contract[signature][side]} for side in ("inputs", "outputs")}
        assert shapes["inputs"] == {"tokens": [1, tokens], "positions": [1, tokens], **cache}
        assert shapes["outputs"] == {**cache, **logits}


def test_a_prompt_computes_no_logits(bundle, tmp_path):
    write_self_caching(bundle / f"litert/{NAME}.tflite", tmp_path / "graph.tflite", 2)
    before, after = (heads(read_model(path)) for path in (bundle / f"litert/{NAME}.tflite", tmp_path / "graph.tflite"))
    assert before == 2 and after == 1


def heads(model) -> int:
    """Linear layers that make logits."""
    linear = [operator for operator in operators(model) if operator.name == "FULLY_CONNECTED"]
    return sum(operator.outputs[0].shape[-1] == VOCABULARY for operator in linear)


def layer(weight: int, scale: float, zero: int) -> tuple[list[schema.TensorT], schema.OperatorT]:
    """An int8 linear layer over the buffer ``weight``, whose input has this scale and zero point; its tensors are the next three."""
    around = schema.QuantizationParametersT(scale=[scale], zeroPoint=[zero])
    tensors = [
        schema.TensorT(shape=[1, 4], type=schema.TensorType.INT8, buffer=buffer, name=name, quantization=quantization)
        for name, buffer, quantization in ((b"in", 0, around), (b"weight", weight, None), (b"out", 0, around))
    ]
    return tensors, schema.OperatorT(opcodeIndex=0)


def test_layers_that_litert_lm_would_mistake_for_each_other_get_weights_of_their_own(tmp_path):
    """Two signatures with three layers over one weight: the first two layers differ in their input, the third is like the first."""
    model = schema.ModelT(
        version=3, subgraphs=[], signatureDefs=[], buffers=[schema.BufferT(), schema.BufferT(data=np.arange(16, dtype=np.uint8))]
    )
    model.operatorCodes = [schema.OperatorCodeT(builtinCode=schema.BuiltinOperator.FULLY_CONNECTED)]
    for name in ("decode", "prefill"):
        subgraph = schema.SubGraphT(tensors=[], operators=[], inputs=[], outputs=[])
        for scale, zero in ((0.1, 3), (0.2, 3), (0.1, 3)):
            tensors, operator = layer(1, scale, zero)
            first = len(subgraph.tensors)
            operator.inputs, operator.outputs = [first, first + 1], [first + 2]
            subgraph.tensors += tensors
            subgraph.operators.append(operator)
        model.signatureDefs.append(schema.SignatureDefT([], [], name.encode(), len(model.subgraphs)))
        model.subgraphs.append(subgraph)
    separate_weights(model)
    write_model(model, tmp_path / "apart.tflite")
    apart = read_model(tmp_path / "apart.tflite")
    used = [operator.inputs[1].buffer for operator in operators(apart)]
    assert used[0] == used[2] == used[3] == used[5] and used[1] == used[4] != used[0]
    assert bytes(apart.buffers[used[1]].data) == bytes(apart.buffers[used[0]].data) == bytes(range(16))
    separate_weights(apart)
    assert len(apart.buffers) == len(model.buffers) == 3


def test_the_file_is_made_with_its_proof_and_the_same_bytes_again(bundle):
    made = add_litert_lm(bundle, artifact_of(bundle), PLAIN)
    path = bundle / made.litert_lm_file
    assert path.name == f"{NAME}.litertlm" and litert_lm(made).opens == made.litert_lm_file
    first = path.read_bytes()
    add_litert_lm(bundle, artifact_of(bundle), PLAIN)
    assert first[:8] == b"LITERTLM" and path.read_bytes() == first


def test_a_graph_that_answers_otherwise_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(tflite_litert_lm, "HIDDEN", 0.0)
    with pytest.raises(GateError, match="logits differ by up to .* 0 is allowed"):
        add_litert_lm(bundle, artifact_of(bundle), PLAIN)


def test_an_artifact_of_other_tensors_is_told_why(bundle):
    artifact = artifact_of(bundle)
    tensors = json.loads(json.dumps(artifact.tensors).replace('"float32"', '"int8"'))
    other = artifact.model_copy(update={"tensors": tensors})
    assert obstacle(artifact) is None and "mask, k_0 of tflite_static_int8 differ" in obstacle(other)
    assert litert_lm(other).opens is None and "--litert-lm" in litert_lm(artifact).note


def said_by_interpreter(model: Path, tokenizer: Path) -> list[dict]:
    """Greedy text of the artifact in the Interpreter API, one token at a time: no packed weights are kept there, and no prompt is cut."""
    interpreter, encoder, found = interpreter_of(model), Tokenizer.from_file(str(tokenizer)), []
    (prompt_signature,) = interpreter.get_signature_list().keys() - {"decode"}
    for prompt in PROMPTS:
        runners, ids, new = Runners(interpreter, prompt_signature), encoder.encode(prompt).ids, []
        for place, token in enumerate(ids):
            logits = runners.call(np.array([token], np.int32), place)["logits"]
        while int(logits.argmax()) != 0 and len(new) < TOKENS:
            new.append(int(logits.argmax()))
            logits = runners.call(np.array(new[-1:], np.int32), len(ids) + len(new) - 1)["logits"]
        found.append({"prompt": ids, "text": encoder.decode(new, skip_special_tokens=False)})
    return found


def test_litert_lm_writes_the_same_text_with_its_weight_cache_cold_and_warm(bundle):
    made = add_litert_lm(bundle, artifact_of(bundle), PLAIN)
    ours = said_by_interpreter(bundle / made.file, bundle / "litert/tokenizer.json")
    for _ in range(2):
        check_same(said_by(LITERT_LM, bundle / made.litert_lm_file, TOKENS), ours, None)
        assert list((bundle / "litert").glob("*.xnnpack_cache")), "no cache of weights: the second run proves nothing"
