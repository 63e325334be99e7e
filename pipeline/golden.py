"""What the fp32 PyTorch models answer, written down once: every artifact is held against these files, on any device.

Three models score the evaluation windows, one after the other so that only one is in memory: the dense one, the pruned and
recovered one, and the smoothed, perhaps clustered one that is exported (the reference of the artifacts).

golden.npz      windows int32 [g, T], prompt_tokens, logits float32 [g, R, V] (at the prompt's last token and after),
                greedy_prompts int32 [q, P'], greedy_tokens int32 [q, N]
evaluation.npz  windows int32 [m, T], prompt_tokens, and for each of the S = T - P tokens after the prompt: top_ids int32
                [m, S, k] (likeliest first), top_logprob float32, rest_logprob float32 [m, S] (log of the mass of all other
                tokens), target_logprob float32 [m, S], dense_target_logprob float32 [m, S]
golden.json     what the models score, and what the shortcut of keeping k tokens costs
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from models.checkpoint import load_model
from models.provenance import library_versions, settings_record, write_json
from pipeline.quality import Plan, Scores, describe, score, shortcut_cost
from pipeline.settings import GoldenSettings

GOLDEN_BYTES = 8 * 10**6  # golden.npz travels in every bundle


def run(settings: GoldenSettings, out: Path, checkpoint: Path, recover: Path, exported: Path, text: Path) -> None:
    """Write golden.npz, evaluation.npz and golden.json."""
    record = json.loads((text / "text.json").read_text(encoding="utf-8"))
    windows = np.load(text / "evaluation.npy", allow_pickle=False)
    model = load_model(checkpoint)
    plan = make_plan(settings, windows, record["prompt_tokens"], model.get_input_embeddings().num_embeddings)
    dense = score(model, plan, "dense model", None)
    del model
    pruned = score(load_model(recover), plan, "pruned model", dense)
    model = load_model(exported)
    final = score(model, plan, "exported model", dense)
    prompts, continuations = greedy(model, plan, settings)
    del model
    write_vectors(out, plan, dense, final, (prompts, continuations))
    described = {
        "reference": describe(dense, None),
        "pruned": describe(pruned, dense),
        "exported": {
            **describe(final, dense),
            "max_abs_diff_to_pruned": float(np.abs(final.golden_logits - pruned.golden_logits).max()),
        },
        "golden": {
            "windows": plan.golden_windows,
            "prompt_tokens": plan.prompt_tokens,
            "scored_tokens": plan.golden_tokens,
            "less_than_asked": (plan.golden_windows, plan.golden_tokens) != (settings.windows, settings.scored_tokens),
            "greedy_prompts": len(prompts),
            "greedy_prompt_tokens": prompts.shape[1],
            "greedy_tokens": continuations.shape[1],
            "bytes": (out / "golden.npz").stat().st_size,
        },
        "top_k": {"k": plan.top_k, **shortcut_cost(final, dense, plan)},
        "text": record,
        "settings": settings_record(settings),
        "versions": library_versions("torch", "transformers", "numpy"),
    }
    write_json(out / "golden.json", described)


def make_plan(settings: GoldenSettings, windows: np.ndarray, prompt_tokens: int, vocab_size: int) -> Plan:
    """As many golden rows as asked for, or as fit the size of golden.npz: windows give way down to eight tokens each."""
    available = windows.shape[1] - prompt_tokens
    rows = max(2, GOLDEN_BYTES // (4 * vocab_size))
    golden_windows = min(settings.windows, len(windows), max(1, rows // min(8, settings.scored_tokens)))
    return Plan(
        windows=windows.astype(np.int32),
        prompt_tokens=prompt_tokens,
        golden_windows=golden_windows,
        golden_tokens=min(settings.scored_tokens, available, max(2, rows // golden_windows)),
        top_k=min(settings.top_k, vocab_size),
    )


@torch.inference_mode()
def greedy(model: PreTrainedModel, plan: Plan, settings: GoldenSettings) -> tuple[np.ndarray, np.ndarray]:
    """Prompts int32 ``[q, P']`` and the reference's greedy continuations int32 ``[q, N]``, token by token with its cache.

    The prompts are three quarters of the scored ones, so that a runtime with fixed prompt shapes meets one that needs padding.
    """
    length = max(1, plan.prompt_tokens * 3 // 4)
    steps = min(settings.greedy_tokens, model.config.max_position_embeddings - length)
    prompts = plan.windows[: settings.windows, :length]
    found = np.empty((len(prompts), steps), dtype=np.int32)
    for index, prompt in enumerate(prompts):
        feed, cache = torch.from_numpy(prompt.astype(np.int64))[None], None
        for step in range(steps):
            answer = model(feed, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            feed = answer.logits[:, -1].argmax(dim=-1, keepdim=True)  # [1, 1]
            found[index, step] = int(feed)
    return prompts, found


def write_vectors(out: Path, plan: Plan, dense: Scores, exported: Scores, continuations: tuple[np.ndarray, np.ndarray]) -> None:
    """Both .npz, uncompressed: numpy dates their members 1980, so the same arrays give the same bytes."""
    prompt_tokens = np.int32(plan.prompt_tokens)
    np.savez(
        out / "golden.npz",
        windows=plan.windows[: plan.golden_windows],
        prompt_tokens=prompt_tokens,
        logits=exported.golden_logits,
        greedy_prompts=continuations[0],
        greedy_tokens=continuations[1],
    )
    np.savez(
        out / "evaluation.npz",
        windows=plan.windows,
        prompt_tokens=prompt_tokens,
        top_ids=exported.top_ids,
        top_logprob=exported.top_logprob,
        rest_logprob=exported.rest_logprob,
        target_logprob=exported.target_logprob,
        dense_target_logprob=dense.target_logprob,
    )
