"""A checkpoint with random weights, in a process of its own: ``python -m pipeline.bench_random '<config as JSON>' <folder>``."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.checkpoint import save_model
from pipeline.recipe import DEMO

SEED = 0


def write_random(config: dict, folder: Path) -> None:
    """Draw the weights as for training (standard deviation 0.02, norms 1), write them in fp32 with config and the demo's tokenizer."""
    torch.manual_seed(SEED)
    described = AutoConfig.for_model(config["model_type"], **{key: value for key, value in config.items() if key != "model_type"})
    save_model(AutoModelForCausalLM.from_config(described, dtype=torch.float32), folder, tokenizer_from=DEMO)


if __name__ == "__main__":
    write_random(json.loads(sys.argv[1]), Path(sys.argv[2]))
