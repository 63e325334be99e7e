"""The stage in which weights share values: k-means per matrix (Han et al. 2016, Deep Compression, arXiv:1510.00149).

It pays in the download and nowhere else: a file of one index per weight deflates well, but the runtimes compute with the values,
so that memory and speed stay as they were. Pruned weights stay exactly zero and are no centroid; norms and biases are left.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from models.checkpoint import TOKENIZER_FILES, load_model, save_model
from models.checkpoint_check import INDEX, weight_files
from models.errors import GateError
from models.families import is_linear, linear_layers, weight_view
from models.progress import track
from models.provenance import library_versions, settings_record, write_json
from pipeline.compressed import deflated_bytes
from pipeline.kmeans import kmeans
from pipeline.settings import ClusterSettings


@dataclass(frozen=True)
class Indexed:
    """A matrix as ``codes`` uint8 or uint16 ``[rows, columns]`` into its group's row of ``codebook`` float32 ``[groups, codes]``.

    A codebook row is zero, if the matrix has zeros, then the centroids, then padding.
    """

    codes: np.ndarray
    codebook: np.ndarray
    group_rows: int

    def values(self) -> np.ndarray:
        """The matrix float32 ``[rows, columns]``."""
        groups = np.arange(len(self.codes)) // self.group_rows
        return self.codebook[groups[:, None], self.codes]


def run(settings: ClusterSettings, out: Path, smooth: Path) -> None:
    """Write the clustered model and cluster.json into ``out``."""
    record = {"centroids": settings.centroids, "matrices": {}, "bytes": None}
    if settings.centroids == 0:
        pass_on(smooth, out)
    else:
        model = load_model(smooth)
        indexed, errors = cluster(model, settings)
        save_model(model, out, tokenizer_from=smooth)
        record["matrices"] = measured(out, indexed, errors, settings)
        record["bytes"] = sizes(model, indexed, out)
    record["settings"] = settings_record(settings)
    record["versions"] = library_versions("torch", "transformers", "safetensors", "numpy")
    write_json(out / "cluster.json", record)


def pass_on(source: Path, target: Path) -> None:
    """Give ``target`` the model folder's files: as links to the same bytes, or as copies where the disk has no links."""
    names = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
    for path in (*weight_files(source), *(source / name for name in names if (source / name).is_file())):
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)


@torch.no_grad()
def cluster(model: PreTrainedModel, settings: ClusterSettings) -> tuple[dict[str, Indexed], dict[str, float]]:
    """Cluster in place. By parameter the indices, and the relative error ``|W - W'| / |W|``."""
    indexed, errors = {}, {}
    for name, weight in track(list(matrices(model, settings.embedding).items()), "clustering"):
        before = weight.numpy()
        indexed[name] = cluster_matrix(before, settings)
        after = indexed[name].values()
        norm = float(np.linalg.norm(before))
        errors[name] = float(np.linalg.norm(before - after)) / norm if norm else 0.0
        weight.copy_(torch.from_numpy(after))
    return indexed, errors


def matrices(model: PreTrainedModel, embedding: bool) -> dict[str, torch.Tensor]:
    """View ``[outputs, inputs]`` by the parameter's name; a tied head is the embedding and is not there twice."""
    inner = {id(module) for module in linear_layers(model).values()}
    found = {}
    for name, module in model.named_modules():
        outer = embedding and (isinstance(module, nn.Embedding) or is_linear(module))
        if id(module) in inner or outer:
            found[f"{name}.weight"] = module
    names = {name for name, _ in model.named_parameters()}  # a shared parameter has its first name alone
    return {name: weight_view(module) for name, module in found.items() if name in names}


def cluster_matrix(weight: np.ndarray, settings: ClusterSettings) -> Indexed:
    """k-means of the weights that are not zero, ``[rows, columns]``, for each group of rows."""
    group_rows = min(settings.group_rows or len(weight), len(weight))
    zero = int((weight == 0).any())
    codes, books = np.zeros(weight.shape, dtype=np.uint16), []
    for first in range(0, len(weight), group_rows):
        block = weight[first : first + group_rows]
        alive = block != 0
        book = np.zeros(zero, dtype=np.float64)
        if alive.any():
            clusters = kmeans(block[alive], settings.centroids, settings.seed)
            codes[first : first + group_rows][alive] = clusters.codes(block[alive]) + zero
            book = np.concatenate([book, clusters.centroids])
        books.append(book)
    codebook = np.zeros((len(books), max(len(book) for book in books)), dtype=np.float32)
    for row, book in zip(codebook, books, strict=True):
        row[: len(book)] = book
    return Indexed(codes.astype(np.uint8) if codebook.shape[1] <= 256 else codes, codebook, group_rows)


def measured(folder: Path, indexed: dict[str, Indexed], errors: dict[str, float], settings: ClusterSettings) -> dict[str, dict]:
    """What the saved file holds, matrix by matrix. GateError where a group has more values than asked for, or lost a zero."""
    stored = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in indexed.keys() & set(file.keys()):
                stored[name] = _measured_matrix(name, file.get_tensor(name).numpy(), indexed[name], settings.centroids)
    return {name: {**stored[name], "relative_error": errors[name]} for name in indexed}


def _measured_matrix(name: str, saved: np.ndarray, indexed: Indexed, centroids: int) -> dict:
    weight = saved if saved.shape == indexed.codes.shape and np.array_equal(saved, indexed.values()) else saved.T
    if not np.array_equal(weight, indexed.values()):
        raise GateError(f"{name} was saved with other values than its {centroids} centroids; report this as a bug")
    groups = [weight[first : first + indexed.group_rows] for first in range(0, len(weight), indexed.group_rows)]
    distinct = [len(np.unique(group[group != 0])) for group in groups]
    if max(distinct) > centroids:
        raise GateError(f"{name} holds {max(distinct)} values in a group (limit {centroids}); report this as a bug")
    return {"groups": len(groups), "distinct": max(distinct), "zeros": float((weight == 0).mean())}


def sizes(model: PreTrainedModel, indexed: dict[str, Indexed], folder: Path) -> dict:
    """Bytes of the weights: as fp32, that file after deflate, and after deflate as indices with their codebooks.

    The last is what sharing values is for, and what a download can be; the ratios are against fp32.
    """
    fp32 = sum(parameter.numel() for parameter in model.parameters()) * 4
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters() if name not in indexed}
    for name, matrix in indexed.items():
        tensors[f"{name}.codes"] = torch.from_numpy(matrix.codes)
        tensors[f"{name}.codebook"] = torch.from_numpy(matrix.codebook)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file = Path(scratch) / "indexed.safetensors"
        save_file(tensors, file)
        as_indices, indexed_bytes = deflated_bytes(file), file.stat().st_size
    as_values = sum(deflated_bytes(path) for path in weight_files(folder))
    return {
        "fp32": fp32,
        "fp32_deflated": as_values,
        "indexed": indexed_bytes,
        "indexed_deflated": as_indices,
        "fp32_deflated_ratio": fp32 / as_values,
        "indexed_deflated_ratio": fp32 / as_indices,
    }
