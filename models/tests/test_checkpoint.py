"""What is refused, in one line each, and that what is accepted comes out as it went in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_model, tiny_tokenizer, write_checkpoint
from models import checkpoint, hub_download
from models.errors import UserError
from models.settings import CheckpointSettings

FAMILIES = checkpoint.SUPPORTED_FAMILIES
WINDOW = torch.arange(40)[None] * 7 % 384


def take_in(source: Path | str, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.run(CheckpointSettings(source=str(source)), out)
    return out


def refusal(source: Path | str, tmp_path: Path) -> str:
    """The one line that the user gets; nothing may be written before it."""
    with pytest.raises(UserError) as caught:
        take_in(source, tmp_path)
    message = str(caught.value)
    assert "\n" not in message and ("; " in message)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    return message


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    """A copy of the Llama checkpoint to break."""
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "broken"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_accepted_checkpoint_keeps_its_bytes_and_function(checkpoints, tmp_path, family):
    source = checkpoints[family]
    out = take_in(source, tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    ours = checkpoint.load_model(out)
    assert torch.equal(ours(WINDOW).logits, theirs(WINDOW).logits)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    record = (out / "checkpoint.json").read_text()
    assert str(tmp_path) not in record and str(source.parent) not in record


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_agrees_with_the_tensors(checkpoints, family):
    shape = checkpoint.shape_of(checkpoint.load_model(checkpoints[family]))
    kv_heads, ffn_size = (4, 256) if family == "gpt2" else (2, 128)
    assert (shape.family, shape.vocab_size, shape.layers, shape.hidden_size) == (family, 384, 2, 64)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.ffn_size) == (4, kv_heads, 16, ffn_size)
    assert (shape.context_tokens, shape.tied, shape.bos_token_id, shape.eos_token_id) == (128, True, 0, 0)
    stored = load_file(checkpoints[family] / "model.safetensors")
    assert shape.parameters == sum(tensor.numel() for tensor in stored.values())


def test_untied_head_counts(tmp_path):
    tied = checkpoint.shape_of(tiny_model("qwen3"))
    untied = checkpoint.shape_of(tiny_model("qwen3", tied=False))
    assert not untied.tied and untied.parameters == tied.parameters + 384 * 64


def test_sharded_half_precision_checkpoint_with_card_and_licence(tmp_path):
    source = tmp_path / "source"
    tiny_model("llama", tied=False).to(torch.bfloat16).save_pretrained(source, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    out = take_in(source, tmp_path)
    record = json.loads((out / "checkpoint.json").read_text())
    assert record["licence"] == "mit" and record["source"] == "source" and record["commit"] is None
    assert len(record["weights"]) == len(list(source.glob("model-*.safetensors")))
    assert checkpoint.load_model(out).dtype == torch.float32


def test_names_without_the_models_prefix_are_accepted(checkpoints, tmp_path):
    source = Path(shutil.copytree(checkpoints["gpt2"], tmp_path / "old"))

    def as_first_published(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128).tril().bool()  # a causal mask, as old files carry

    edit_tensors(source, as_first_published)
    expected = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"]).eval()(WINDOW).logits
    assert torch.equal(checkpoint.load_model(take_in(source, tmp_path))(WINDOW).logits, expected)


def test_saved_model_is_the_same_bytes_twice_and_loads_plainly(checkpoints, tmp_path):
    model = checkpoint.load_model(checkpoints["qwen2"])
    for name in ("one", "two"):
        checkpoint.save_model(model, tmp_path / name, tokenizer_from=checkpoints["qwen2"])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(plain(WINDOW).logits, model(WINDOW).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "one")("def f").input_ids == tiny_tokenizer()("def f").input_ids


def test_tokenizer_is_what_the_file_says_whatever_class_is_named(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints["llama"], tmp_path / "named"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    text = "def f(x):\n    return x"
    assert checkpoint.load_tokenizer(folder)(text).input_ids == tiny_tokenizer()(text).input_ids


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere", tmp_path)


def test_a_file_instead_of_a_folder(text_file, tmp_path):
    assert "a file, not a folder" in refusal(text_file, tmp_path)


def test_no_config(folder, tmp_path):
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder, tmp_path)


def test_broken_config(folder, tmp_path):
    (folder / "config.json").write_text('{"model_type": "llama"')
    assert "config.json cannot be read" in refusal(folder, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_only_pickled_weights_which_stay_unopened(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "pickle_was_opened"
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(marker))
    assert "only pickled weights" in refusal(folder, tmp_path)
    assert not marker.exists()


def test_no_weights_at_all(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(folder, tmp_path, keep):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    assert "model.safetensors is truncated or corrupt" in refusal(folder, tmp_path)


def test_corrupt_header(folder, tmp_path):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    assert "truncated or corrupt" in refusal(folder, tmp_path)


@pytest.mark.parametrize("shard", ["model-00002-of-00002.safetensors", "../stolen.safetensors", "/etc/hostname", "model.bin"])
def test_index_that_names_a_missing_or_foreign_file(folder, tmp_path, shard):
    (folder.parent / "stolen.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    message = refusal(folder, tmp_path)
    assert shard in message and ("missing" in message or "no safetensors file of this folder" in message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder, tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1).__setitem__(5, value))
    assert name in refusal(folder, tmp_path)


@pytest.mark.parametrize("model_type", ["falcon", None])
def test_unknown_architecture(folder, tmp_path, model_type):
    edit_config(folder, model_type=model_type)
    message = refusal(folder, tmp_path)
    assert all(family in message for family in FAMILIES)


def test_missing_tensor(folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight"))
    assert "lack model.layers.0.self_attn.k_proj.weight" in refusal(folder, tmp_path)


def test_surplus_tensor(folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    assert "hold model.layers.0.self_attn.q_proj.bias" in refusal(folder, tmp_path)


def test_fewer_layers_in_the_config_than_stored(folder, tmp_path):
    edit_config(folder, num_hidden_layers=1)
    assert "no place for" in refusal(folder, tmp_path)


def test_tensor_of_another_shape(folder, tmp_path):
    edit_config(folder, intermediate_size=136)
    assert "has shape [128, 64]" in refusal(folder, tmp_path).replace("[64, 128]", "[128, 64]")


def test_integer_weights(folder, tmp_path):
    def quantise(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    edit_tensors(folder, quantise)
    assert "model.norm.weight is stored as I8" in refusal(folder, tmp_path)


def test_quantised_checkpoint(folder, tmp_path):
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    assert "quantised already" in refusal(folder, tmp_path)


def test_tied_config_with_a_head_of_its_own(folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(384, 64)}))
    assert "tie_word_embeddings" in refusal(folder, tmp_path)


def test_an_architecture_that_only_onnx_can_express_is_told_so(folder, tmp_path):
    edit_config(folder, model_type="gemma3_text")
    assert "known to the ONNX export alone, not yet to pruning, smoothing and TFLite" in refusal(folder, tmp_path)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 3}, {"num_attention_heads": 5, "head_dim": None}])
def test_heads_that_do_not_divide(folder, tmp_path, changes):
    edit_config(folder, **changes)
    assert "do not divide" in refusal(folder, tmp_path).replace("does not divide", "do not divide")


def test_sliding_window_in_use(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints["qwen2"], tmp_path / "sliding"))
    edit_config(folder, use_sliding_window=True, sliding_window=16, max_window_layers=0, layer_types=None)
    assert "use_sliding_window" in refusal(folder, tmp_path)


def test_no_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(folder, tmp_path)


def test_broken_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer cannot be read" in refusal(folder, tmp_path)


def test_tokenizer_that_does_not_fit_the_vocabulary(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    assert "id 384" in refusal(folder, tmp_path)


def test_no_room_on_the_disk(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "no room on the disk" in refusal(folder, tmp_path)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_hub_id_is_downloaded_at_its_revision(checkpoints, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = write_checkpoint(tmp_path / commit, "llama")
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(cached)

    monkeypatch.setattr(hub_download, "snapshot_download", snapshot_download)
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.run(CheckpointSettings(source="org/name", revision="v2"), out)
    record = json.loads((out / "checkpoint.json").read_text())
    assert (asked["repo_id"], asked["revision"]) == ("org/name", "v2")
    assert (record["source"], record["commit"]) == ("org/name", commit)
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


class Response:
    """As much of an HTTP response as the hub's errors read."""

    headers: dict = {}
    request = None
    status_code = 401


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError("no", response=Response()), "gated"),
        (RepositoryNotFoundError("no", response=Response()), "no such repository"),
        (LocalEntryNotFoundError("no"), "cannot be reached"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_hub_errors_are_told_apart(tmp_path, monkeypatch, error, said):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(hub_download, "snapshot_download", fails)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert said in refusal("org/name", tmp_path)


def test_offline_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "HF_HUB_OFFLINE is set" in refusal("org/name-that-nobody-cached", tmp_path)


@pytest.mark.parametrize("source", ["a/b/c", "./x/y", "org/na me"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(tmp_path, source):
    assert "no such folder" in refusal(source, tmp_path)
