"""What a changed PyTorch model costs and saves: quality against the dense model, and bytes to download as fp32 and as int8."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from device_tests.token_statistics import perplexity
from models.checkpoint import load_model, shape_of
from pipeline.compressed import LEVEL

BATCH = 4
INT8_MAX = 127


@dataclass(frozen=True)
class ModelPrice:
    """One model. ``kl`` in nats per token and ``top1`` against the dense model; all bytes are of weights alone.

    ``bytes_int8`` counts a byte for each weight of a matrix and a scale for each of its rows; ``download_*`` are after deflate.
    """

    perplexity: float
    perplexity_stderr: float
    ratio: float
    kl: float
    top1: float
    parameters: int
    nonzero: int
    bytes_fp32: int
    bytes_int8: int
    download_fp32: int
    download_int8: int


class Dense:
    """The dense model's answers on the evaluation windows, float32 ``[windows, scored, vocab]`` log-probabilities, held once."""

    def __init__(self, checkpoint: Path, windows: np.ndarray, prompt_tokens: int):
        self.windows = torch.from_numpy(windows.astype(np.int64))
        self.prompt_tokens = prompt_tokens
        self.logprob = list(self._scored(load_model(checkpoint)))
        self.perplexity = perplexity(np.concatenate([self._loss(place, batch) for place, batch in enumerate(self.logprob)])).value

    def price(self, folder: Path) -> ModelPrice:
        """Score the model in ``folder`` and count its bytes."""
        model = load_model(folder)
        losses, divergences, agreements = [], [], []
        for place, (expected, got) in enumerate(zip(self.logprob, self._scored(model), strict=True)):
            losses.append(self._loss(place, got))
            divergences.append(functional.kl_div(got.double(), expected.double(), reduction="none", log_target=True).sum(-1))
            agreements.append(expected.argmax(-1) == got.argmax(-1))
        found = perplexity(np.concatenate(losses))
        return ModelPrice(
            perplexity=found.value,
            perplexity_stderr=found.stderr,
            ratio=found.value / self.perplexity,
            kl=float(torch.cat(divergences).mean()),
            top1=float(torch.cat(agreements).double().mean()),
            parameters=shape_of(model).parameters,
            nonzero=sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
            **weight_bytes(model),
        )

    @torch.inference_mode()
    def _scored(self, model: PreTrainedModel) -> Iterator[torch.Tensor]:
        """Batches ``[windows, scored, vocab]`` of log-probabilities of the tokens after the prompt."""
        for batch in self.windows.split(BATCH):
            yield model(batch, use_cache=False).logits[:, self.prompt_tokens - 1 : -1].log_softmax(-1)

    def _loss(self, place: int, logprob: torch.Tensor) -> np.ndarray:
        """Negative log-likelihood ``[windows, scored]`` of the batch number ``place``."""
        targets = self.windows[place * BATCH : place * BATCH + len(logprob), self.prompt_tokens :]
        return -logprob.gather(-1, targets[..., None])[..., 0].double().numpy()


def weight_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of all parameters, a tied one once, as fp32 and as int8 with a scale per row, before and after deflate."""
    packers = {"fp32": zlib.compressobj(LEVEL), "int8": zlib.compressobj(LEVEL)}
    sizes = dict.fromkeys(packers, 0)
    packed = dict.fromkeys(packers, 0)
    for parameter in model.parameters():
        plain = parameter.detach().contiguous().numpy()
        for form, arrays in (("fp32", [plain]), ("int8", as_int8(plain))):
            for array in arrays:
                sizes[form] += array.nbytes
                packed[form] += len(packers[form].compress(array.tobytes()))
    for form, packer in packers.items():
        packed[form] += len(packer.flush())
    return {f"bytes_{form}": size for form, size in sizes.items()} | {f"download_{form}": size for form, size in packed.items()}


def as_int8(weight: np.ndarray) -> list[np.ndarray]:
    """A matrix as symmetric int8 with a float32 scale per row; a vector stays as it is."""
    if weight.ndim < 2:
        return [weight]
    magnitude = np.abs(weight).max(axis=1, keepdims=True)
    scale = np.where(magnitude > 0, magnitude / INT8_MAX, 1).astype(np.float32)
    return [np.rint(weight / scale).astype(np.int8), scale]
