"""A Hugging Face folder on the evaluation windows, in PyTorch: one forward pass per window, scored as artifacts are.

``python -m pipeline.quality_torch <folder> <golden folder> <tokens .npz> <threads>`` is a process of its own, as every artifact
has one. It exits with 2 for a person's mistake and 1 for a model that answers with broken logits, and says why in one line on
standard output.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from device_tests.artifact import Interface
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.quality import TokenScores, score, write_scores
from device_tests.vectors import Vectors, open_evaluation, open_golden
from models.checkpoint import load_model, shape_of
from models.checkpoint_check import check_tensors, checked_config, stored_shapes, weight_files
from models.errors import UserError


def score_folder(folder: Path, golden: Path) -> TokenScores:
    """Every scored token of the fp32 model in ``folder``. UserError and DeviceTestError for what cannot be compared."""
    config = checked_config(folder)
    check_tensors(config, stored_shapes(weight_files(folder)))
    model = load_model(folder)
    shape = shape_of(model)
    interface = Interface(
        vocab_size=shape.vocab_size, layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
        context_tokens=shape.context_tokens, prefill_tokens=None, bos_token_id=shape.bos_token_id, eos_token_id=shape.eos_token_id,
    )  # fmt: skip
    open_golden(golden, interface)
    return score_model(model, open_evaluation(golden, interface), shape.vocab_size)


def score_model(model: torch.nn.Module, evaluation: Vectors, vocab_size: int) -> TokenScores:
    """Every scored token of a loaded model; logits of one window in memory."""

    def answers(window: np.ndarray, scored: int) -> Iterable[np.ndarray]:
        tokens = torch.from_numpy(window[:-1].astype(np.int64))[None]  # [1, T - 1]
        with torch.inference_mode():
            return model(tokens, use_cache=False, logits_to_keep=scored).logits[0].numpy()  # [scored, vocab]

    return score(answers, evaluation, vocab_size)


def main() -> int:
    """Score one folder as the command line says."""
    folder, golden, tokens, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    try:
        write_scores(Path(tokens), score_folder(Path(folder), Path(golden)))
    except (UserError, DeviceTestError) as error:
        print(" ".join(str(error).split()))
        return 2
    except ArtifactFailure as failure:
        print(" ".join(str(failure).split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
