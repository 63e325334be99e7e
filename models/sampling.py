"""Text drawn from a model itself, for when no text is given: batched, with a KV cache, the same for the same seed."""

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from models.errors import UserError
from models.progress import track

BATCH_ROWS = 64


def sample_tokens(model: PreTrainedModel, rows: int, length: int, seed: int) -> np.ndarray:
    """Draw int32 ``[rows, length]`` at temperature 1 over the whole vocabulary.

    Every row starts after the beginning-of-text token, else after the end-of-text token, else after a random one; that first
    token is not part of the row. A row may go past an end-of-text token into the next text, as training streams do.
    """
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    batches = [min(BATCH_ROWS, rows - first) for first in range(0, rows, BATCH_ROWS)]
    drawn = []
    for batch_rows in track(batches, "sampling text from the dense model"):
        drawn.append(_sample_batch(model, _first_tokens(model, batch_rows, generator), length, generator))
    return torch.cat(drawn).numpy().astype(np.int32)


def _first_tokens(model: PreTrainedModel, rows: int, generator: torch.Generator) -> torch.Tensor:
    """int64 ``[rows, 1]``."""
    config = model.config
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    start = config.bos_token_id if config.bos_token_id is not None else eos
    if start is None:
        return torch.randint(config.vocab_size, (rows, 1), generator=generator)
    return torch.full((rows, 1), start)


@torch.no_grad()
def _sample_batch(model: PreTrainedModel, tokens: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """int64 ``[rows, length]``. Chance is drawn on the CPU, so that the seed means the same with and without a GPU."""
    cache = DynamicCache(config=model.config)
    row_tokens = []
    for _ in range(length):
        logits = model(tokens.to(model.device), past_key_values=cache, use_cache=True).logits[:, -1]  # [rows, vocab]
        probabilities = torch.softmax(logits.float(), dim=-1).cpu()
        if not torch.isfinite(probabilities).all():
            raise UserError("the dense model gives non-finite logits, so no text can be sampled from it; give text.calibration")
        tokens = torch.multinomial(probabilities, 1, generator=generator)  # [rows, 1]
        row_tokens.append(tokens)
    return torch.cat(row_tokens, dim=1)
