"""Which norms of a model are one operator: judged by numbers on random values, a name only says where to look."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

PROBE_TOLERANCE = 1e-5
EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
RMS, LAYER = "SimplifiedLayerNormalization", "LayerNormalization"


@dataclass(frozen=True)
class Norm:
    """Module ``name`` computes ``operator`` with scale ``offset + weight`` (ones where it has no weight) and bias, if any."""

    name: str
    operator: str
    epsilon: float
    offset: float
    size: int


def norm_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Norms that PyTorch has no operator for, by name; the exporter knows nn.LayerNorm itself."""
    found = {name: module for name, module in model.named_modules() if "Norm" in type(module).__name__}
    return {name: module for name, module in found.items() if not isinstance(module, nn.LayerNorm) and not list(module.children())}


def probe_norm(name: str, module: nn.Module, shape: tuple[int, ...]) -> Norm | None:
    """The operator that ``module`` is, on inputs of ``shape``; None where it is none of them."""
    epsilons = [getattr(module, key) for key in EPSILON_NAMES if isinstance(getattr(module, key, None), float)]
    if not epsilons and type(module).__name__.endswith("LayerNorm"):
        epsilons = [1e-5]  # written into the call of layer_norm
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=draws) * 3 + 1  # a mean that is not 0 tells the two kinds apart
    with torch.no_grad():
        given = module(values)
        for epsilon in epsilons[:1]:
            for operator in (RMS, LAYER):
                for offset in (0.0, 1.0):
                    norm = Norm(name, operator, epsilon, offset, shape[-1])
                    if torch.allclose(given, _expected(norm, module, values), atol=PROBE_TOLERANCE, rtol=PROBE_TOLERANCE):
                        return norm
    return None


@contextmanager
def norm_as_operator(norm: Norm, module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` emits one operator; its scale is still called as the checkpoint calls the weight."""
    scale = _scale(norm, module)
    stored = {"weight": nn.Parameter(scale, requires_grad=False)} if norm.offset else {}

    def forward(values: torch.Tensor) -> torch.Tensor:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        inputs = (values, scale if weight is None else weight) + (() if bias is None else (bias,))
        attributes = {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1}
        return torch.onnx.ops.symbolic(norm.operator, inputs, attributes, dtype=values.dtype, shape=values.shape)

    with patch.dict(module._parameters, stored), patch.object(module, "forward", forward):
        yield


def _scale(norm: Norm, module: nn.Module) -> torch.Tensor:
    """``[size]``, or ``[heads, size]`` where every head has a scale of its own."""
    weight = getattr(module, "weight", None)
    return torch.ones(norm.size) if weight is None else (norm.offset + weight).detach()


def _expected(norm: Norm, module: nn.Module, values: torch.Tensor) -> torch.Tensor:
    centred = values - values.mean(-1, keepdim=True) if norm.operator == LAYER else values
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + norm.epsilon) * _scale(norm, module)
    bias = getattr(module, "bias", None)
    return normed if bias is None else normed + bias
