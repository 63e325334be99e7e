"""What a recipe may say about pruning, recovery, smoothing, clustering and the gates. Light on purpose: no torch here."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from models.settings import StageSettings

DEVICES = "local, arm64, arm64?cpu=cortex-a72, avx2, ssh://user@host[:port][?threads=4] or adb://serial"
ADDRESS = re.compile(r"local|avx2|arm64(\?cpu=[\w.-]+)?|ssh://[^/]+|adb://.*")  # told before hours of work; the drivers say more


class PruneSettings(StageSettings):
    """What is removed. Sparsity 0 and full structure is the dense model."""

    method: Literal["none", "magnitude", "wanda", "sparsegpt", "taylor"] = Field(
        "none", description="how single weights are chosen: by size, by weight times input norm, by second moments, by gradient"
    )
    sparsity: float = Field(0.0, ge=0.0, lt=1.0, description="share of the weights of the linear layers set to zero")
    scope: Literal["layer", "model"] = Field(
        "layer", description="within what weights compete: each layer, or the whole model (magnitude and taylor)"
    )
    pattern: Literal["none", "2:4", "4:8"] = Field("none", description="n of every m neighbouring inputs are set to zero; sparsity is 0.5")
    damping: float = Field(0.01, gt=0, description="of the mean diagonal, added to SparseGPT's second moments")
    ffn: float = Field(0.0, ge=0.0, lt=1.0, description="share of the FFN's width removed in every layer")
    kv_groups: float = Field(0.0, ge=0.0, lt=1.0, description="share of KV heads removed with their query heads")
    layers: int = Field(0, ge=0, description="number of whole layers removed, least influential first")
    hidden: float = Field(0.0, ge=0.0, lt=1.0, description="share of the hidden size removed")
    target: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the parameters removed by structure, split among its kinds by measured sensitivity"
    )
    windows: int = Field(32, ge=1, description="calibration windows for every score that looks at activations or gradients")

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> "PruneSettings":
        """A choice about single weights says nothing where none are removed."""
        if self.method == "none" and self.scope == "model":
            raise ValueError("scope is model but method is none, so it would do nothing; set method or leave scope out")
        if self.method != "none" and self.pattern == "none" and "sparsity" not in self.model_fields_set:
            raise ValueError(f"method is {self.method} but nothing says how much goes; set sparsity or pattern")
        if self.method != "sparsegpt" and self.damping != type(self).model_fields["damping"].default:
            raise ValueError(f"damping is {self.damping} but method is {self.method}, so it would do nothing; leave damping out")
        return self


class RecoverSettings(StageSettings):
    """Knowledge distillation from the dense model: KL on logits, masks kept."""

    steps: int = Field(0, ge=0, description="optimiser steps; 0 is no recovery")
    batch_windows: int = Field(8, ge=1, description="windows per step")
    window_tokens: int = Field(256, ge=16, description="tokens per window")
    learning_rate: float | None = Field(None, gt=0, description="peak; none: chosen from the damage done by pruning")
    seed: int = Field(0, description="seed of the order of windows")
    hidden_weight: float = Field(
        0.0, ge=0.0, description="weight of the hidden states' relative squared error beside KL; needs equal hidden sizes"
    )
    patience: int = Field(0, ge=0, description="validation measurements without a gain after which recovery stops; 0: never early")
    sparsity: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of the linear layers' weights that is zero in the end: recovery removes them little by little; 0: none",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the large products; auto: bfloat16 on a GPU that has it, else float32; weights stay float32"
    )

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> "RecoverSettings":
        """Weights that go while recovering need steps to go in."""
        if self.sparsity and not self.steps:
            raise ValueError(f"sparsity is {self.sparsity} but steps is 0, so it would do nothing; set steps, or use prune.sparsity")
        return self


class SmoothSettings(StageSettings):
    """SmoothQuant folded into the weights; the function does not change."""

    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["search"] = Field(
        0.5, description="share of the difficulty moved from activations to weights; search: the best of a grid for each fold"
    )
    windows: int = Field(16, ge=1, description="calibration windows for the activation maxima")
    enabled: bool = Field(True, description="false: weights go on unchanged")


class ClusterSettings(StageSettings):
    """Weights that share values: k-means per matrix. It makes the download smaller, and nothing else."""

    centroids: Literal[0] | Annotated[int, Field(ge=2, le=256)] = Field(
        0, description="values that a matrix may hold beside zero; 0: as they are"
    )
    group_rows: int = Field(0, ge=0, description="output rows that share centroids; 0: the whole matrix")
    embedding: bool = Field(True, description="the embedding and the head too")
    seed: int = Field(0, description="seed of the first centroids")


class GoldenSettings(StageSettings):
    """The fp32 PyTorch answers that every artifact is held against."""

    windows: int = Field(3, ge=1, description="evaluation windows whose full logits travel in the bundle, up to 8 MB")
    scored_tokens: int = Field(32, ge=1, description="tokens after the prompt with full logits per golden window")
    greedy_tokens: int = Field(32, ge=1, description="length of the reference's greedy continuations")
    top_k: int = Field(256, ge=1, description="reference log-probabilities kept per evaluated token; the rest as one sum")


class Gate(StageSettings):
    """Limits of one artifact; none: not judged."""

    perplexity_change: float | None = Field(None, description="largest allowed change against the exported model, fraction")
    top1: float | None = Field(None, ge=0, le=1, description="smallest allowed share of equal first choices")
    kl: float | None = Field(None, gt=0, description="largest allowed mean KL divergence, nats per token")
    max_abs_diff: float | None = Field(None, gt=0, description="largest allowed difference of logits on the golden vectors")


class DeviceSettings(StageSettings):
    """Where and how the artifacts are measured."""

    devices: tuple[str, ...] = Field(
        ("local", "arm64"), min_length=1, description=f"machines that every artifact has to pass on: {DEVICES}"
    )
    threads: int = Field(1, ge=1, le=64, description="threads that a runtime may use")
    rounds: int = Field(3, ge=1, description="fresh processes that time each artifact, of which medians are taken")
    emulated_windows: int = Field(3, ge=1, description="evaluation windows scored on emulated devices, which are slow")
    same_top1: float = Field(0.99, ge=0, le=1, description="smallest share of first choices equal to those on this machine")
    same_perplexity: float = Field(
        0.001, ge=0, description="largest change of perplexity, up or down, against the same artifact on this machine, fraction"
    )

    @field_validator("devices")
    @classmethod
    def known(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        """Each is an address of a kind that there is, and named once."""
        if unknown := [device for device in devices if not ADDRESS.fullmatch(device)]:
            raise ValueError(f"{unknown[0]!r} is no device; give {DEVICES}")
        if len(set(devices)) < len(devices):
            raise ValueError("give each device once")
        return devices
