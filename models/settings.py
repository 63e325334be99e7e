"""What a recipe may say about the checkpoint and the texts. Light on purpose: reading a recipe must not import torch."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class StageSettings(BaseModel):
    """Base of every stage's settings: frozen, and an unknown key is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class CheckpointSettings(StageSettings):
    """Where the model comes from."""

    source: str = Field(description="Hugging Face folder, or a hub id such as org/name")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit); none: the default branch")


class TextSettings(StageSettings):
    """Which texts calibrate, train and judge. Without a file, text is sampled from the dense model itself."""

    calibration: Path | None = Field(None, description="UTF-8 text file for calibration and recovery")
    evaluation: Path | None = Field(None, description="UTF-8 text file, held out, for every quality number")
    window_tokens: int = Field(192, ge=16, description="tokens per calibration and evaluation window")
    prompt_tokens: int = Field(64, ge=4, description="tokens of each window that are fed as prompt; the rest is scored")
    calibration_windows: int = Field(64, ge=1, description="number of calibration windows")
    evaluation_windows: int = Field(40, ge=1, description="number of evaluation windows")
    sampled_recovery_tokens: int = Field(
        65536, ge=1024, description="tokens sampled from the dense model for recovery when no calibration file is given"
    )
    seed: int = Field(0, description="seed of window choice and of sampling")
