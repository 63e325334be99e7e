"""Tiny random checkpoints in Hugging Face format, made once per test session: never a download."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 384  # 256 bytes, 127 merges and the end-of-text token
CONTEXT = 128
ROTARY = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": CONTEXT}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCABULARY`` tokens trained on this repository's own words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=CONTEXT
    )


def tiny_text() -> str:
    """Some kilobytes of Python text, the same on every machine."""
    return Path(__file__).read_text(encoding="utf-8") * 4


def tiny_model(family: str, layers: int = 2, tied: bool = True, seed: int = 0) -> torch.nn.Module:
    """A random fp32 decoder of hidden size 64. Weights are drawn wide enough that logits are not flat."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.15,
        "tie_word_embeddings": tied,
    }
    rotary = {**common, **ROTARY, "hidden_size": 64, "num_hidden_layers": layers}
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**rotary)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**rotary)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**rotary, head_dim=16)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**common, n_embd=64, n_layer=layers, n_head=4, n_positions=CONTEXT)),
    }
    return makers[family]().eval()


def write_checkpoint(folder: Path, family: str, **changes) -> Path:
    """A Hugging Face folder with a tiny random model of ``family`` and its tokenizer."""
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """One folder per family: llama, qwen2, qwen3, gpt2."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(root / family, family) for family in ("llama", "qwen2", "qwen3", "gpt2")}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A UTF-8 text file long enough for several windows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_text(), encoding="utf-8")
    return path
