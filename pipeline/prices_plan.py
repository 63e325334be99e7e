"""Which rows the prices have: every way of shrinking, as what it changes in the default recipe.

A row of a model is measured in PyTorch after the stage ``goal``. A row of an artifact goes the whole road and is measured in its
runtimes.
"""

from dataclasses import dataclass
from typing import Literal

DENSE = ("prune.ffn=0", "recover.steps=0")
UNSTRUCTURED = ("magnitude", "wanda", "sparsegpt", "taylor")
MODEL_SCOPE = ("magnitude", "taylor")
FULL_STEPS, QUICK_STEPS = 100, 20
BATCH_WINDOWS = 4  # per step: half of the default, because there are many rows


@dataclass(frozen=True)
class ModelRow:
    """A pruned or clustered model. ``kind`` groups rows in the table; ``share`` is what was asked for, 0 where nothing was."""

    name: str
    kind: Literal["dense", "weights", "pattern", "structure", "clusters"]
    share: float
    recovered: bool
    overrides: tuple[str, ...]
    goal: Literal["prune", "recover", "cluster"]


@dataclass(frozen=True)
class ArtifactRow:
    """An artifact of the default recipe with ``overrides``; ``outliers``: of the checkpoint with outliers put in."""

    name: str
    artifact: str
    overrides: tuple[str, ...] = ()
    outliers: bool = False


@dataclass(frozen=True)
class LongRow:
    """A heavy cut that recovers for ``steps``; ``target`` is the perplexity over the dense model's that it is to come back to."""

    name: str
    target: float
    steps: int
    overrides: tuple[str, ...]


LONG_STEPS = 1700
GROUP_ROWS = 64  # output rows that share centroids, in the row of clusters by group


def long_rows() -> tuple[LongRow, ...]:
    """About ten minutes on two cores each, or as much of them as its target took."""
    taylor = ("prune.method=taylor", "prune.scope=model", "prune.sparsity=0.7")
    return (
        LongRow("taylor over the model 70%", 1.08, LONG_STEPS, taylor),
        LongRow("90%, pruned while recovering", 1.4, 1000, ("recover.sparsity=0.9",)),
        LongRow("layers -2, hidden states compared", 1.12, LONG_STEPS, ("prune.layers=2", "recover.hidden_weight=1")),
    )


def model_rows(quick: bool) -> list[ModelRow]:
    """All rows of models, the dense one first."""
    shares = (0.5, 0.9) if quick else (0.25, 0.5, 0.75, 0.9)
    steps = QUICK_STEPS if quick else FULL_STEPS
    pairs = [*weights_rows(shares), *pattern_rows(), *structure_rows(quick)]
    rows = [ModelRow("dense", "dense", 0.0, False, DENSE, "prune")]
    for name, kind, share, overrides in pairs:
        base = ("prune.ffn=0", *overrides)
        rows.append(ModelRow(name, kind, share, False, (*base, "recover.steps=0"), "prune"))
        rows.append(ModelRow(name, kind, share, True, (*base, *recovery(steps)), "recover"))
    return rows + cluster_rows(steps)


def recovery(steps: int) -> tuple[str, str]:
    """The settings of a recovery of so many steps."""
    return f"recover.steps={steps}", f"recover.batch_windows={BATCH_WINDOWS}"


Pair = tuple[str, Literal["weights", "pattern", "structure"], float, tuple[str, ...]]


def weights_rows(shares: tuple[float, ...]) -> list[Pair]:
    """Single weights: each method within layers, and where it can, over the whole model."""
    scopes = [(method, "layer") for method in UNSTRUCTURED] + [(method, "model") for method in MODEL_SCOPE]
    return [
        (
            f"{method}{' over the model' if scope == 'model' else ''} {share:.0%}",
            "weights",
            share,
            (f"prune.method={method}", f"prune.scope={scope}", f"prune.sparsity={share}"),
        )
        for method, scope in scopes
        for share in shares
    ]


def pattern_rows() -> list[Pair]:
    """n of m neighbours."""
    return [
        (f"{method} {pattern}", "pattern", 0.5, (f"prune.method={method}", f'prune.pattern="{pattern}"'))
        for method in UNSTRUCTURED
        for pattern in ("2:4", "4:8")
    ]


NAMES = {
    "ffn": "FFN width",
    "kv_groups": "KV groups",
    "layers": "layers",
    "hidden": "hidden size",
    "target": "parameters, split by sensitivity,",
}


def structure_rows(quick: bool) -> list[Pair]:
    """Parts of the architecture, and one target split among them."""
    amounts: dict[str, tuple[float, ...]] = {
        "ffn": (0.25, 0.5, 0.75),
        "kv_groups": (0.5,),
        "layers": (1, 2),
        "hidden": (0.25, 0.5),
        "target": (0.25, 0.5, 0.75),
    }
    if quick:
        amounts = {"ffn": (0.5,), "layers": (2,), "target": (0.5,)}
    return [
        (f"{NAMES[key]} {f'-{amount:.0%}' if amount < 1 else f'-{amount}'}", "structure", float(amount), (f"prune.{key}={amount}",))
        for key in amounts
        for amount in amounts[key]
    ]


def cluster_rows(steps: int) -> list[ModelRow]:
    """Shared values, alone and on top of recovered pruning. Nothing is trained after them."""
    rows = []
    for centroids in (256, 64, 16):
        overrides = (*DENSE, "smooth.enabled=false", f"cluster.centroids={centroids}")
        rows.append(ModelRow(f"{centroids} centroids", "clusters", 0.0, False, overrides, "cluster"))
    grouped = (*DENSE, "smooth.enabled=false", "cluster.centroids=16", f"cluster.group_rows={GROUP_ROWS}")
    rows.append(ModelRow(f"16 centroids for every {GROUP_ROWS} rows", "clusters", 0.0, False, grouped, "cluster"))
    for share, centroids in ((0.5, 16), (0.9, 15)):
        overrides = ("prune.ffn=0", "prune.method=sparsegpt", f"prune.sparsity={share}", *recovery(steps))
        overrides += ("smooth.enabled=false", f"cluster.centroids={centroids}")
        rows.append(ModelRow(f"sparsegpt {share:.0%}, {centroids} centroids", "clusters", share, True, overrides, "cluster"))
    return rows


def artifact_rows(quick: bool, artifacts: tuple[str, ...]) -> list[ArtifactRow]:
    """Every artifact of the default recipe, the choices of static int8, the model with outliers, and what was pruned to 90 %."""
    rows = [ArtifactRow(name, name) for name in artifacts]
    if not quick:
        choices = [
            "calibrator=percentile",
            "calibrator=entropy",
            "calibrator=mse",
            "per_channel=false",
            "rounding=nearest",
            "two_step_crest=40",
        ]
        settings = [f"onnx_int8.{choice}" for choice in choices] + ["smooth.alpha=search", "smooth.enabled=false"]
        rows += [of_choice("onnx_static_int8", setting, "onnx_int8.mixed_precision=false") for setting in settings]
        for choice in ("rounding=nearest", "rounding=searched", "block=32"):
            rows.append(of_choice("onnx_weight_only_int4", f"onnx_weight_only_int4.{choice}"))
    steps = QUICK_STEPS if quick else FULL_STEPS
    sparse = ("prune.ffn=0", "prune.method=sparsegpt", "prune.sparsity=0.9", *recovery(steps))
    rows += [ArtifactRow(f"{name}, with outliers x40", name, DENSE, outliers=True) for name in ("onnx_static_int8", "tflite_static_int8")]
    rows += [ArtifactRow(f"{name}, dense model", name, DENSE) for name in ("onnx_fp32", "onnx_static_int8")]
    return rows + [ArtifactRow(f"{name}, sparsegpt 90%", name, sparse) for name in ("onnx_fp32", "onnx_static_int8")]


def of_choice(artifact: str, setting: str, *others: str) -> ArtifactRow:
    """An artifact with one setting of its own, which names the row."""
    return ArtifactRow(f"{artifact}, {setting.split('.', 1)[0]}: {setting.split('.', 1)[1]}", artifact, (setting, *others))
