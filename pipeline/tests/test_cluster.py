"""Clustering: few values, zeros kept, means of members, no worse than the textbook's loop, and a folder that anyone can load."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from conftest import tiny_model, write_checkpoint
from models.checkpoint import load_model, save_model
from models.errors import GateError
from models.families import linear_layers, weight_view
from pipeline import cluster
from pipeline.compressed import deflated_bytes
from pipeline.kmeans import kmeans, starts
from pipeline.settings import ClusterSettings

FAMILIES = ("llama", "qwen3", "gpt2")
WINDOW = torch.arange(40)[None] * 7 % 384
FLOATS = st.integers(-2048, 2048).map(lambda whole: whole / 256)  # exact in sums, so that ties are ties in both
TENSORS = {"llama": 2 * 7 + 1, "qwen3": 2 * 7 + 1, "gpt2": 2 * 4 + 2}  # matrices; GPT-2 has a table of positions


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(WINDOW).logits


def thinned(checkpoint: Path, folder: Path, share: float) -> Path:
    """The checkpoint with a share of its linear layers' weights at zero."""
    model = load_model(checkpoint)
    for module in linear_layers(model).values():
        weight = module.weight
        weight[weight.abs() < weight.abs().flatten().quantile(share)] = 0.0
    save_model(model, folder, tokenizer_from=checkpoint)
    return folder


def naive_error(values: np.ndarray, start: np.ndarray) -> float:
    """Lloyd as the textbook has it: every distance to every centroid, until no member changes its cluster."""
    centroids, members = start.astype(np.float64).copy(), None
    for _ in range(10_000):
        nearest = np.abs(values[:, None] - centroids[None]).argmin(1)
        if members is not None and (nearest == members).all():
            break
        members = nearest
        for index in range(len(centroids)):
            if (members == index).any():
                centroids[index] = values[members == index].mean()
    return float(((values - centroids[members]) ** 2).sum())


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, st.integers(1, 120), elements=FLOATS), st.integers(2, 17), st.integers(0, 3))
def test_never_worse_than_the_textbook_loop_and_centroids_are_means(values, k, seed):
    found = kmeans(values, k, seed)
    codes, exact = found.codes(values), values.astype(np.float64)
    assert len(found.centroids) <= k and codes.max() < len(found.centroids)
    for index, centroid in enumerate(found.centroids):
        assert np.isclose(centroid, exact[codes == index].mean(), rtol=1e-9, atol=1e-9)  # no cluster is empty: mean() would be NaN
    error = float(((exact - found.centroids[codes]) ** 2).sum())
    ordered, first = np.sort(exact), np.unique(np.sort(exact), return_index=True)[1]
    if len(first) <= k:
        assert error == 0
    else:
        best = min(naive_error(exact, start) for start in starts(ordered, first, k, seed))
        assert error <= best * (1 + 1e-6) + 1e-9


@given(arrays(np.float32, 30, elements=st.sampled_from([-1.5, 0.25, 2.0, 3.0])))
def test_more_centroids_than_values_lose_nothing(values):
    found = kmeans(values, 5, 0)
    assert np.array_equal(found.centroids, np.unique(values))
    assert np.array_equal(found.centroids[found.codes(values)], values)


def test_bell_shaped_weights_meet_the_known_optimum():
    """The least error of a 16-level quantiser of a normal distribution is 0.009497 (Max 1960, table I)."""
    values = np.random.default_rng(0).normal(size=400_000).astype(np.float32)
    found = kmeans(values, 16, 0)
    assert float(((values - found.centroids[found.codes(values)]) ** 2).mean()) == pytest.approx(0.009497, rel=0.02)


@settings(max_examples=40, deadline=None)
@given(
    weight=arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 12)), elements=st.one_of(FLOATS, st.just(0.0))),
    group_rows=st.integers(0, 12),
    centroids=st.integers(2, 6),
)
def test_zeros_stay_and_each_group_has_few_values(weight, group_rows, centroids):
    indexed = cluster.cluster_matrix(weight, ClusterSettings(centroids=centroids, group_rows=group_rows))
    values = indexed.values()
    assert (values[weight == 0] == 0).all()
    rows = group_rows or len(weight)
    for first in range(0, len(weight), rows):
        block, original = values[first : first + rows], weight[first : first + rows]
        assert len(np.unique(block[original != 0])) <= centroids
        if len(np.unique(original[original != 0])) <= centroids:
            assert np.array_equal(block, original)


def test_all_equal_and_all_zero_matrices_stay():
    for value in (0.75, 0.0):
        weight = np.full((6, 5), value, dtype=np.float32)
        assert np.array_equal(cluster.cluster_matrix(weight, ClusterSettings(centroids=4)).values(), weight)


def test_256_centroids_and_zero_need_a_wider_index():
    weight = np.linspace(1, 2, 64 * 64, dtype=np.float32).reshape(64, 64)  # evenly spread: no cluster loses its members
    assert cluster.cluster_matrix(weight, ClusterSettings(centroids=256)).codes.dtype == np.uint8
    weight[0, :7] = 0
    indexed = cluster.cluster_matrix(weight, ClusterSettings(centroids=256))
    assert indexed.codes.dtype == np.uint16 and (indexed.values() == 0).sum() == 7
    assert len(np.unique(indexed.values())) == 257


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_reloads_with_the_values_that_the_record_counts(family, checkpoints, tmp_path):
    source, out = thinned(checkpoints[family], tmp_path / "source", 0.6), tmp_path / "out"
    out.mkdir()
    cluster.run(ClusterSettings(centroids=7), out, smooth=source)
    record = json.loads((out / "cluster.json").read_text())
    before, after = load_model(source), AutoModelForCausalLM.from_pretrained(out).eval()
    clustered = load_model(source)
    cluster.cluster(clustered, ClusterSettings(centroids=7))
    assert torch.equal(logits(after), logits(clustered)) and not torch.equal(logits(after), logits(before))
    assert len(record["matrices"]) == TENSORS[family]
    saved = load_file(out / "model.safetensors")
    for name, parameter in before.named_parameters():
        now = after.get_parameter(name)
        assert torch.equal(now == 0, parameter == 0)
        if name in record["matrices"]:
            assert len(np.unique(saved[name][saved[name] != 0])) == record["matrices"][name]["distinct"] <= 7
            error = float((now - parameter).norm() / parameter.norm())
            assert record["matrices"][name]["relative_error"] == pytest.approx(error, rel=1e-4) and 0 < error < 0.3
        else:
            assert parameter.dim() == 1 and torch.equal(now, parameter)
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight and "lm_head.weight" not in saved
    zeros = [sum(int((module.weight == 0).sum()) for module in linear_layers(model).values()) for model in (before, after)]
    assert zeros[0] == zeros[1] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_output_rows_have_their_own_centroids(family, checkpoints):
    """GPT-2 stores its weights transposed: rows are outputs all the same."""
    model, whole, grouped = (load_model(checkpoints[family]) for _ in range(3))
    cluster.cluster(whole, ClusterSettings(centroids=4))
    cluster.cluster(grouped, ClusterSettings(centroids=4, group_rows=16))
    for name, module in linear_layers(grouped).items():
        weight, dense = weight_view(module), weight_view(model.get_submodule(name))
        assert all(len(block.unique()) == 4 for block in weight.split(16))
        assert float((weight - dense).norm()) < float((weight_view(whole.get_submodule(name)) - dense).norm())


def test_without_embedding_and_with_an_untied_head(tmp_path, checkpoints):
    untied = write_checkpoint(tmp_path / "untied", "llama", tied=False)
    for embedding, changed in ((False, set()), (True, {"lm_head.weight", "model.embed_tokens.weight"})):
        before, after = load_model(untied), load_model(untied)
        indexed, _ = cluster.cluster(after, ClusterSettings(centroids=5, embedding=embedding))
        outside = {name for name, _ in before.named_parameters() if "layers" not in name}
        assert {name for name in outside if not torch.equal(before.get_parameter(name), after.get_parameter(name))} == changed
        assert {name for name in indexed if "layers" not in name} == changed


def test_no_centroids_hands_the_same_bytes_on(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "load_model", lambda folder: pytest.fail("no model is needed"))
    (tmp_path / "linked").mkdir()
    cluster.run(ClusterSettings(), tmp_path / "linked", smooth=checkpoints["llama"])
    assert os.path.samefile(tmp_path / "linked" / "model.safetensors", checkpoints["llama"] / "model.safetensors")
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links on this disk")))
    (tmp_path / "copied").mkdir()
    cluster.run(ClusterSettings(), tmp_path / "copied", smooth=checkpoints["llama"])
    for path in (tmp_path / "linked").iterdir():
        assert path.read_bytes() == (tmp_path / "copied" / path.name).read_bytes()
    assert torch.equal(logits(load_model(tmp_path / "copied")), logits(load_model(checkpoints["llama"])))
    assert json.loads((tmp_path / "copied" / "cluster.json").read_text())["matrices"] == {}


def test_bytes_are_those_of_files(checkpoints, tmp_path):
    """The indexed form holds every weight: it is unpacked here and compared; its deflated size is a file's."""
    model = load_model(checkpoints["llama"])
    indexed, _ = cluster.cluster(model, ClusterSettings(centroids=16))
    for name, matrix in indexed.items():
        assert np.array_equal(matrix.values(), model.get_parameter(name).numpy())
    cluster.run(ClusterSettings(centroids=16), tmp_path, smooth=checkpoints["llama"])
    found = json.loads((tmp_path / "cluster.json").read_text())["bytes"]
    assert found["fp32"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert found["fp32_deflated"] == len(zlib.compress((tmp_path / "model.safetensors").read_bytes(), 9))
    assert found["indexed_deflated"] < found["fp32_deflated"] and found["fp32_deflated_ratio"] > 2
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_deflated_bytes_in_blocks_are_those_of_the_whole(tmp_path):
    content = np.random.default_rng(0).integers(0, 9, 5_000_000).astype(np.uint8).tobytes()
    (tmp_path / "file").write_bytes(content)
    assert deflated_bytes(tmp_path / "file") == len(zlib.compress(content, 9))


def test_a_file_that_lost_its_values_fails_the_gate(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "save_model", lambda model, out, tokenizer_from: tiny_model("llama").save_pretrained(out))
    with pytest.raises(GateError, match="saved with other values"):
        cluster.run(ClusterSettings(centroids=3), tmp_path, smooth=checkpoints["llama"])


@pytest.mark.parametrize("centroids", [-1, 1, 257])
def test_numbers_of_centroids_that_make_no_sense(centroids):
    with pytest.raises(ValidationError):
        ClusterSettings(centroids=centroids)
