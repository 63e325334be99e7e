"""What stands at the end of training: the folder that others load, what it scores, and what it writes."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaForCausalLM

from models.demo_tokenizer import END_OF_TEXT_ID, save_tokenizer


@dataclass(frozen=True)
class Perplexity:
    """Quality on a text. `standard_error` is that of `nats_per_token`, over windows, which count as independent."""

    nats_per_token: float
    standard_error: float
    bits_per_byte: float
    tokens: int
    windows: int
    window_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def export_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write an ordinary HF folder with fp16 weights; the tied embedding is stored once."""
    half = copy.deepcopy(model).to(device="cpu", dtype=torch.float16)
    half.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID, do_sample=False
    )
    half.save_pretrained(out)
    save_tokenizer(tokenizer, out, model.config.max_position_embeddings)


@torch.inference_mode()
def window_losses(model: LlamaForCausalLM, windows: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """Mean next-token loss of each window, nats per token. `windows` is int64 [windows, tokens]; the result is [windows]."""
    losses = []
    for rows in windows.to(model.device).split(batch):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()  # [batch, tokens - 1, vocab]
        losses.append(functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1))
    return torch.cat(losses).cpu()


def perplexity(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, window_tokens: int) -> Perplexity:
    """Perplexity in windows that don't overlap, each started afresh with `<|endoftext|>`; a last part-window is left out."""
    encoding = tokenizer.encode(text)
    body = window_tokens - 1
    count = len(encoding.ids) // body
    windows = torch.tensor(encoding.ids[: count * body]).reshape(count, body)
    windows = torch.cat([torch.full((count, 1), END_OF_TEXT_ID), windows], dim=1)
    losses = window_losses(model, windows)
    used_bytes = len(text[: encoding.offsets[count * body - 1][1]].encode())
    mean = losses.mean().item()
    error = losses.std().item() / math.sqrt(count)
    return Perplexity(mean, error, mean / math.log(2) * count * body / used_bytes, count * body, count, window_tokens)


@torch.inference_mode()
def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, new_tokens: int, temperature: float, seed: int = 0) -> str:
    """What the model writes after `prompt`; greedy at temperature 0. The prompt is not repeated."""
    ids = torch.tensor([[END_OF_TEXT_ID, *tokenizer.encode(prompt).ids]], device=model.device)
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95} if temperature else {"do_sample": False}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=END_OF_TEXT_ID, **how)
    return tokenizer.decode(written[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
