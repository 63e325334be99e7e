"""Text into token windows: the stage whose windows calibrate, train and judge everything after it.

No token of the validation windows is in the recovery stream or among the calibration windows, and the evaluation text is another
file (or another draw from the model). Windows start at multiples of their length, wherever documents begin or end.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from models.checkpoint import load_model, load_tokenizer
from models.errors import UserError
from models.provenance import library_versions, settings_record, write_json
from models.sampling import sample_tokens
from models.settings import TextSettings

VALIDATION_SHARE = 0.05  # of the calibration text's windows
MAX_VALIDATION_WINDOWS = 32


@dataclass(frozen=True)
class Source:
    """One text as tokens: ``tokens`` int32 ``[n]`` without special tokens, and what ``text.json`` says about it."""

    tokens: np.ndarray
    record: dict


@dataclass(frozen=True)
class Split:
    """The calibration text taken apart: windows int32 ``[n, window_tokens]``, the recovery stream int32 ``[N]``."""

    calibration: np.ndarray
    validation: np.ndarray
    recovery: np.ndarray


def run(settings: TextSettings, out: Path, checkpoint: Path) -> None:
    """Write calibration.npy, validation.npy, recovery.npy, evaluation.npy and text.json."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    check_lengths(settings, config.max_position_embeddings)
    tokenizer = load_tokenizer(checkpoint)
    bos = leading_token(tokenizer)
    body_tokens = settings.window_tokens - (bos is not None)
    calibration, evaluation = read_sources(settings, checkpoint, tokenizer, body_tokens)
    split = split_calibration(calibration.tokens, settings, bos)
    judged = choose_windows(evaluation, "evaluation", settings.evaluation_windows, settings, bos)
    np.save(out / "calibration.npy", split.calibration)
    np.save(out / "validation.npy", split.validation)
    np.save(out / "recovery.npy", split.recovery)
    np.save(out / "evaluation.npy", judged)
    record = {
        "calibration": calibration.record,
        "evaluation": evaluation.record,
        "windows": {"calibration": len(split.calibration), "validation": len(split.validation), "evaluation": len(judged)},
        "recovery_tokens": len(split.recovery),
        "window_tokens": settings.window_tokens,
        "prompt_tokens": settings.prompt_tokens,
        "bos_token_id": bos,
        "settings": settings_record(settings),
        "versions": library_versions("torch", "transformers", "tokenizers", "numpy"),
    }
    write_json(out / "text.json", record)


def check_lengths(settings: TextSettings, context_tokens: int) -> None:
    """UserError unless a window fits the context and leaves tokens to score after the prompt."""
    if settings.window_tokens > context_tokens:
        raise UserError(
            f"text.window_tokens is {settings.window_tokens} but the model's context is {context_tokens} tokens;"
            f" set text.window_tokens to {context_tokens} or less"
        )
    if settings.prompt_tokens >= settings.window_tokens:
        raise UserError(
            f"text.prompt_tokens {settings.prompt_tokens} leaves nothing of a window of {settings.window_tokens} tokens to score;"
            f" set text.prompt_tokens below {settings.window_tokens}"
        )


def leading_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer itself puts before a text, or None when it puts none."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    special = tokenizer("a").input_ids
    return special[0] if special[1 : 1 + len(plain)] == plain and special[0] != plain[0] else None


def read_sources(settings: TextSettings, checkpoint: Path, tokenizer: PreTrainedTokenizerBase, body_tokens: int) -> tuple[Source, Source]:
    """The calibration and the evaluation text; one that has no file is sampled from the dense model."""
    if settings.calibration and settings.evaluation and settings.calibration.resolve() == settings.evaluation.resolve():
        raise UserError("text.evaluation is the calibration file; give a text that nothing was fitted to")
    files = {name: getattr(settings, name) for name in ("calibration", "evaluation")}
    found = {name: tokens_of_file(path, f"text.{name}", tokenizer) for name, path in files.items() if path is not None}
    if len(found) < len(files):
        model = load_model(checkpoint)
        for seed, name in enumerate(files, start=2 * settings.seed):
            if name not in found:
                found[name] = sampled_source(model, name, settings, body_tokens, seed)
    if found["calibration"].record["sha256"] == found["evaluation"].record["sha256"]:
        raise UserError("text.evaluation holds the calibration text; give a text that nothing was fitted to")
    return found["calibration"], found["evaluation"]


def tokens_of_file(path: Path, key: str, tokenizer: PreTrainedTokenizerBase) -> Source:
    """Tokenise a whole UTF-8 file. UserError names the recipe key when it is missing, empty or in another encoding."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror}); give the path of a UTF-8 text file") from error
    if not text.strip():
        raise UserError(f"{key}: {path} is empty; give a text of some thousand words")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    sha256 = hashlib.sha256(content).hexdigest()
    record = {"kind": "file", "name": path.name, "sha256": sha256, "bytes": len(content), "tokens": len(ids)}
    return Source(np.asarray(ids, dtype=np.int32), record)


def sampled_source(model: torch.nn.Module, name: str, settings: TextSettings, body_tokens: int, seed: int) -> Source:
    """Text drawn from the dense model itself at temperature 1, whole windows, as many as ``settings`` ask for."""
    if name == "evaluation":
        rows = settings.evaluation_windows
    else:
        recovery_rows = -(-settings.sampled_recovery_tokens // body_tokens)
        rows = -(-max(recovery_rows, settings.calibration_windows) // (1 - VALIDATION_SHARE)) + 1
    tokens = sample_tokens(model, int(rows), body_tokens, seed).reshape(-1)
    record = {
        "kind": "sampled from the dense model",
        "temperature": 1.0,
        "seed": seed,
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "tokens": len(tokens),
    }
    return Source(tokens, record)


def split_calibration(tokens: np.ndarray, settings: TextSettings, bos: int | None) -> Split:
    """Take validation windows out of the calibration text; the rest is the recovery stream, and calibration windows come from it.

    Validation windows are drawn from all over the text, so that they are like it; the stream is what remains, in order.
    """
    body = settings.window_tokens - (bos is not None)
    slots = len(tokens) // body
    validation_count = min(MAX_VALIDATION_WINDOWS, max(1, round(VALIDATION_SHARE * slots)))
    if slots < settings.calibration_windows + validation_count:
        _refuse_short("calibration", len(tokens), max(0, slots - validation_count), settings.calibration_windows, settings)
    order = np.random.default_rng(settings.seed).permutation(slots)
    validation = np.sort(order[:validation_count])
    calibration = np.sort(order[validation_count : validation_count + settings.calibration_windows])
    kept = np.ones(len(tokens), dtype=bool)
    for slot in validation:
        kept[slot * body : (slot + 1) * body] = False
    return Split(
        calibration=cut_windows(tokens, calibration, body, bos),
        validation=cut_windows(tokens, validation, body, bos),
        recovery=tokens[kept],
    )


def choose_windows(source: Source, name: str, count: int, settings: TextSettings, bos: int | None) -> np.ndarray:
    """``count`` windows int32 ``[count, window_tokens]``, no two overlapping, drawn by the seed and kept in order."""
    body = settings.window_tokens - (bos is not None)
    slots = len(source.tokens) // body
    if slots < count:
        _refuse_short(name, len(source.tokens), slots, count, settings)
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(slots)[:count])
    return cut_windows(source.tokens, chosen, body, bos)


def cut_windows(tokens: np.ndarray, slots: np.ndarray, body: int, bos: int | None) -> np.ndarray:
    """Windows of ``body`` tokens at the given slots, each with the leading token where there is one."""
    windows = tokens[slots[:, None] * body + np.arange(body)]  # [count, body]
    if bos is not None:
        windows = np.concatenate([np.full((len(windows), 1), bos, dtype=tokens.dtype), windows], axis=1)
    return windows.astype(np.int32)


def calibration_windows(text: Path, count: int, key: str) -> torch.Tensor:
    """The first ``count`` calibration windows of a text stage, int64 ``[count, window_tokens]``; UserError when fewer."""
    windows = np.load(text / "calibration.npy")
    if count > len(windows):
        raise UserError(f"{key} is {count} but there are {len(windows)} calibration windows; set {key}={len(windows)}")
    return torch.from_numpy(windows[:count].astype(np.int64))


def _refuse_short(name: str, tokens: int, available: int, wanted: int, settings: TextSettings) -> None:
    remedy = f"text.{name}_windows={available}" if available else "text.window_tokens lower"
    yielded = f"{tokens} tokens yield {available} windows of {settings.window_tokens} tokens, {wanted} are needed"
    raise UserError(f"text.{name}: {yielded}; give more text or set {remedy}")
