"""How the demo model learns: its schedule, and one step at a time with checkpoints between."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn. Rates are peaks; all of them follow `lr_factor`."""

    steps: int
    batch_blocks: int = 8  # of the whole context each
    warmup_steps: int = 60
    decay_share: float = 0.45  # of all steps, at the end
    whole_share: float = 0.15  # of all steps, at the end: those on sequences of the whole context
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3

    @property
    def decay_from_step(self) -> float:
        return self.steps * (1 - self.decay_share)

    def lr_factor(self, step: int) -> float:
        """Warmup, stable, decay: the middle doesn't know how long the run is, so `steps` may change until the decay begins."""
        return max(0.0, min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / (self.steps - self.decay_from_step)))

    def pieces(self, step: int) -> int:
        """Into how many sequences a block is cut: two, which is cheaper, until the last steps, where every position learns."""
        return 2 if step < self.steps * (1 - self.whole_share) else 1


class Training:
    """Model, optimizers and position of a run: what a checkpoint holds.

    Muon (Jordan et al. 2024) takes the hidden matrices, AdamW the embedding and the norms: at a few million tokens Muon needs
    about half the steps, and its even updates leave fewer outliers for int8 to stumble over.
    """

    def __init__(self, config: dict, schedule: Schedule, seed: int, compiled: bool = False):
        torch.manual_seed(seed)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = LlamaForCausalLM(LlamaConfig(**config)).to(self.device)
        self.schedule = schedule
        hidden = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.optimizers = (
            torch.optim.Muon(hidden, lr=schedule.muon_lr, weight_decay=0.02, momentum=0.95),
            torch.optim.AdamW(others, lr=schedule.adamw_lr, weight_decay=0.0, betas=(0.9, 0.95)),
        )
        self.peak_rates = (schedule.muon_lr, schedule.adamw_lr)
        self.step = 0
        self.seconds = 0.0
        self._loss_of = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def _loss(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [batch, tokens - 1, vocab]
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def learn(self, blocks: torch.Tensor) -> float:
        """One step on int64 [blocks, context]. Returns the loss before it, nats per token."""
        start = time.monotonic()
        tokens = blocks.to(self.device).reshape(len(blocks) * self.schedule.pieces(self.step), -1)
        with torch.autocast(self.device, torch.bfloat16):
            loss = self._loss_of(tokens)
        loss.backward()
        for optimizer, peak in zip(self.optimizers, self.peak_rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * self.schedule.lr_factor(self.step)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        value = loss.item()
        self.seconds += time.monotonic() - start
        return value

    def save(self, file: Path) -> None:
        """Write a checkpoint whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        draft = file.with_suffix(".draft")
        torch.save(state, draft)
        draft.replace(file)

    def load(self, file: Path) -> None:
        """Go on from a checkpoint. weights_only: nothing but tensors and plain values is ever unpickled."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())
