"""What a recipe may say about pruning, recovery, smoothing and the gates. Light on purpose: no torch here."""

from typing import Literal

from pydantic import Field

from models.settings import StageSettings


class PruneSettings(StageSettings):
    """What is removed. Sparsity 0 and full structure is the dense model."""

    method: Literal["none", "magnitude"] = Field("none", description="unstructured method; its sparsity stands beside it")
    sparsity: float = Field(0.0, ge=0.0, lt=1.0, description="share of the weights of each linear layer set to zero")
    ffn: float = Field(0.0, ge=0.0, lt=1.0, description="share of the FFN's width removed in every layer")
    kv_groups: float = Field(0.0, ge=0.0, lt=1.0, description="share of KV heads removed with their query heads")
    layers: int = Field(0, ge=0, description="number of whole layers removed, least influential first")
    windows: int = Field(32, ge=1, description="calibration windows for the scores of structured pruning")


class RecoverSettings(StageSettings):
    """Knowledge distillation from the dense model: KL on logits, masks kept."""

    steps: int = Field(0, ge=0, description="optimiser steps; 0 is no recovery")
    batch_windows: int = Field(8, ge=1, description="windows per step")
    window_tokens: int = Field(256, ge=16, description="tokens per window")
    learning_rate: float | None = Field(None, gt=0, description="peak; none: chosen from the damage done by pruning")
    seed: int = Field(0, description="seed of the order of windows")


class SmoothSettings(StageSettings):
    """SmoothQuant folded into the weights; the function does not change."""

    alpha: float = Field(0.5, ge=0.0, le=1.0, description="share of the difficulty moved from activations to weights")
    windows: int = Field(16, ge=1, description="calibration windows for the activation maxima")
    enabled: bool = Field(True, description="false: weights go on unchanged")


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
    """How the artifacts are measured."""

    threads: int = Field(1, ge=1, le=64, description="threads that a runtime may use")
