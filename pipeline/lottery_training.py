"""Training of the lottery ticket's small decoder: its text, its masks, and one training as a generator of steps.

Masks live on the linear layers inside the decoder layers; the embedding, which is the head too, and the norms stay whole.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from models.demo_data import PackedTokens
from models.errors import UserError
from models.families import linear_layers

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"
TEST_WINDOWS, VALIDATION_WINDOWS = 192, 48
PEAK_RATE, WARMUP_SHARE, CLIP_NORM = 4e-3, 0.1, 1.0
CHECKS = 5  # validation measurements in a training; the best of them is what the training yields

Masks = dict[str, torch.Tensor]  # by name of the linear layer, bool, the weight's shape; True: the weight stays


@dataclass(frozen=True)
class Small:
    """The decoder: by default 0.5 M parameters, half of them in the linear layers that are pruned."""

    hidden_size: int = 64
    layers: int = 4
    ffn_size: int = 256
    heads: int = 4
    window_tokens: int = 64
    batch_windows: int = 8


@dataclass(frozen=True)
class Texts:
    """Token windows: to train on, to choose by, and to judge by (int64 ``[windows, window_tokens]``)."""

    train: PackedTokens
    validation: torch.Tensor
    test: torch.Tensor
    vocab_size: int


@dataclass(frozen=True)
class Span:
    """Steps ``first`` to ``last`` of a schedule that is ``last`` long: where a rewound network goes on."""

    first: int
    last: int

    @property
    def steps(self) -> int:
        return self.last - self.first

    def rate_factor(self, step: int) -> float:
        """Linear warm-up, then linear decay to a tenth."""
        warmup = max(1, round(WARMUP_SHARE * self.last))
        return min((step + 1) / warmup, 1.0 - 0.9 * max(0, step - warmup) / max(1, self.last - warmup))


@dataclass
class Training:
    """A network in training and the best weights that it has had; filled by ``train_steps``."""

    model: LlamaForCausalLM
    masks: Masks
    best: dict[str, torch.Tensor] | None = None
    validation_loss: float = float("inf")
    early: dict[str, torch.Tensor] | None = None
    steps: int = 0


def token_hash() -> str:
    """SHA-256 over what the texts are made from."""
    names = ("tokenizer.json", "data/calibration.txt", "data/heldout.txt")
    return hashlib.sha256(b"".join(hashlib.sha256((DEMO / name).read_bytes()).digest() for name in names)).hexdigest()


def read_texts(small: Small, work: Path, seed: int) -> Texts:
    """The demo's calibration text to train on and its held-out text to judge by; ``seed`` orders the batches.

    Validation windows are taken from all over the calibration text and not trained on.
    """
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    train, test = (
        np.array(tokenizer.encode((DEMO / "data" / name).read_text("utf-8"), add_special_tokens=False).ids, dtype=np.uint16)
        for name in ("calibration.txt", "heldout.txt")
    )
    windows = cut(train, small.window_tokens)
    if len(windows) < 2 * VALIDATION_WINDOWS:
        raise UserError(f"{len(windows)} windows of {small.window_tokens} tokens are too few to train on; give a shorter window")
    held = np.linspace(0, len(windows) - 1, VALIDATION_WINDOWS).round().astype(int)
    file = work / "train.npy"
    if not file.is_file():  # the same for every seed, and may be in use
        with file.with_suffix(".draft").open("wb") as draft:
            np.save(draft, np.delete(windows, held, axis=0).reshape(-1))
        file.with_suffix(".draft").replace(file)
    judged = cut(test, small.window_tokens)[:TEST_WINDOWS]
    as_tensor = [torch.from_numpy(part.astype(np.int64)) for part in (windows[held], judged)]
    return Texts(PackedTokens(file, small.window_tokens, seed), *as_tensor, tokenizer.get_vocab_size())


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def new_model(small: Small, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A network with weights drawn by ``seed``."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=small.hidden_size,
            num_hidden_layers=small.layers,
            num_attention_heads=small.heads,
            num_key_value_heads=small.heads,
            intermediate_size=small.ffn_size,
            max_position_embeddings=small.window_tokens,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def weights_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """A copy of the parameters, a tied head once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def put_weights(model: LlamaForCausalLM, weights: dict[str, torch.Tensor], masks: Masks) -> None:
    """Load ``weights`` and set what ``masks`` leave out to zero."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    for name, module in linear_layers(model).items():
        module.weight.mul_(masks[name])


def train_steps(training: Training, texts: Texts, span: Span, batch_windows: int, early_step: int | None = None) -> Iterator[None]:
    """Train over ``span``, one item per step; ``early_step``: keep the weights before that step in ``training.early``.

    Masked weights get no gradient and so stay the zeros that they are: AdamW moves nothing that has no gradient and no size.
    """
    model = training.model.train()
    masked = [(module.weight, training.masks[name]) for name, module in linear_layers(model).items()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    check_steps = {span.first + round(span.steps * (number + 1) / CHECKS) for number in range(CHECKS)}
    for step in range(span.first, span.last):
        if step == early_step:
            training.early = weights_of(model)
        loss_of(model, texts.train.batch(step, batch_windows)).backward()
        for weight, mask in masked:
            weight.grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * span.rate_factor(step)
        optimizer.step()
        optimizer.zero_grad()
        training.steps += 1
        if step + 1 in check_steps:
            keep_better(training, texts.validation, batch_windows)
        yield


def keep_better(training: Training, windows: torch.Tensor, batch_windows: int) -> None:
    """Measure on validation windows and remember the weights if they are the best so far."""
    loss = mean_loss(training.model, windows, batch_windows)
    if loss < training.validation_loss:
        training.validation_loss, training.best = loss, weights_of(training.model)


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats per token over int64 ``[batch, tokens]``."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [batch, tokens - 1, vocab]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, windows: torch.Tensor, batch_windows: int) -> float:
    """Mean loss in nats per token over all ``windows``, which are of one length."""
    parts = [loss_of(model, batch).item() * len(batch) for batch in windows.split(batch_windows)]
    return sum(parts) / len(windows)
