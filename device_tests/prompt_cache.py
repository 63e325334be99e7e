"""Keys and values of a prompt on disk, so that a system prompt is computed once: what two prompts begin with is not computed again."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from device_tests.artifact import Artifact
from device_tests.errors import DeviceTestError
from device_tests.sessions import Session


def save(path: Path, session: Session, artifact: Artifact, tokens: np.ndarray) -> None:
    """Write what ``session`` holds of the beginning ``tokens`` int ``[n]`` of its text. There is a whole file or none."""
    arrays = {name: cache[:, :, : len(tokens)] for name, cache in session.caches().items()}
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as file:
            np.savez(file, tokens=np.asarray(tokens, np.int64), artifact=np.array(artifact.sha256), **arrays)
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise DeviceTestError(f"{path}: cannot be written ({error.strerror}); give another file for the prompt's cache") from error


def load(path: Path, session: Session, artifact: Artifact, tokens: np.ndarray) -> int:
    """Put what the file holds of the beginning of ``tokens`` int ``[n]`` into an empty ``session``; how many tokens that were.

    At least the last token is left to be fed, because logits come from there. 0 where there is no file, and where it is another
    artifact's. DeviceTestError for a file that is no such cache, or whose arrays are not this model's.
    """
    if not path.exists():
        return 0
    try:
        with np.load(path, allow_pickle=False) as held:
            if str(held["artifact"]) != artifact.sha256:
                return 0
            common = common_beginning(held["tokens"], tokens[:-1])
            arrays = {name: held[name][:, :, :common] for name in session.caches()}
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise DeviceTestError(f"{path}: no prompt cache ({error}); remove it or give another file") from error
    for name, cache in session.caches().items():
        wanted = (*cache.shape[:2], common, cache.shape[3])
        if arrays[name].shape != wanted or arrays[name].dtype != cache.dtype:
            held, ours = (f"{kind} {shape}" for kind, shape in ((arrays[name].dtype, arrays[name].shape), (cache.dtype, wanted)))
            raise DeviceTestError(f"{path}: {name} is {held}, this model's is {ours}; remove the file")
    for name, cache in session.caches().items():
        cache[:, :, :common] = arrays[name]
    session.rewind(common)
    return common


def common_beginning(one: np.ndarray, other: np.ndarray) -> int:
    """How many leading tokens are equal."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
