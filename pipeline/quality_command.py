"""`pocketlm quality`: artifacts in their own runtimes and Hugging Face folders in PyTorch, held against the exported fp32 model.

Teacher-forced on the reference's evaluation windows, one after the other, each artifact and runtime in a fresh process. The
reference is kept as its k likeliest tokens and one sum; what that shortcut loses stands in golden.json and is shown.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from device_tests.artifact import read_artifact
from device_tests.devices.local import Run, child_environment, run_local
from device_tests.errors import DeviceTestError
from device_tests.quality import TokenScores, read_scores
from device_tests.sessions import RUNTIMES
from device_tests.vectors import read_rows
from models.errors import StageDied, UserError
from pipeline.manifest import MANIFEST
from pipeline.measure import runtimes_of
from pipeline.quality_reference import Reference, belongs, json_object, read_reference
from pipeline.quality_statistics import by_position, plain, record_of, statistics, worst_windows
from pipeline.verify import bundle_folder

PYTORCH = "pytorch"
OTHER_MODEL = "a checkpoint of the same vocabulary"


@dataclass(frozen=True)
class QualityOptions:
    """``runtime`` None: every runtime of an artifact; ``worst`` windows are told as text; ``tokenizer`` None: one that is found."""

    runtime: str | None = None
    threads: int = 1
    worst: int = 3
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Candidate:
    """One thing to score: a sidecar in a runtime, or a Hugging Face folder in PyTorch."""

    name: str
    path: Path
    runtime: str
    belongs: str


def quality(given: list[Path], golden: Path, options: QualityOptions, tell: Callable[[str, str], None]) -> dict:
    """Score everything in ``given`` (sidecars, bundles, Hugging Face folders) against the files in ``golden``.

    Returns JSON values: ``reference`` and one entry of ``results`` each, with ``quality`` null and ``failures`` where an artifact
    did not run to its end. UserError for what cannot be compared, before any work.
    """
    check_options(options)
    reference = read_reference(golden)
    with ExitStack() as open_bundles:
        opened = [open_bundles.enter_context(opened_source(path)) for path in given]
        candidates = [candidate for source in opened for candidate in source.candidates(reference, options)]
        tokenizer = find_tokenizer(options.tokenizer, reference, [source.tokenizer for source in opened])
        results = []
        for candidate in sorted(candidates, key=lambda candidate: candidate.runtime != PYTORCH):  # what may be refused yet goes first
            label = f"{candidate.name} in {candidate.runtime}"
            tell(label, "runs")
            results.append(result_of(candidate, reference, options, tokenizer))
            tell(label, "FAILED" if results[-1]["failures"] else "scored")
    return {"reference": describe_reference(reference), "results": results}


def check_options(options: QualityOptions) -> None:
    """UserError that names the option whose value makes no sense."""
    if options.runtime is not None and options.runtime not in RUNTIMES:
        raise UserError(f"--runtime {options.runtime}: no such runtime; give one of {', '.join(RUNTIMES)}")
    if options.threads < 1:
        raise UserError(f"--threads {options.threads}: give 1 or more")
    if options.worst < 0:
        raise UserError(f"--worst {options.worst}: give 0 or more")


@dataclass(frozen=True)
class Source:
    """One argument of the command: the sidecars that it stands for, or a Hugging Face folder."""

    path: Path
    sidecars: tuple[Path, ...]
    model: Path | None
    tokenizer: Path | None

    def candidates(self, reference: Reference, options: QualityOptions) -> list[Candidate]:
        """What is scored of it; checked against the reference. UserError where nothing runs in the runtime that was asked for."""
        if self.model is not None:
            return [Candidate(self.path.resolve().name, self.model, PYTORCH, OTHER_MODEL)]
        found, formats = [], set()
        for sidecar in self.sidecars:
            record = json_object(sidecar)
            try:
                artifact = read_artifact(sidecar)
            except DeviceTestError as error:
                raise UserError(str(error)) from error
            formats.add(artifact.format)
            runtimes = runtimes_of(record) if options.runtime is None else [options.runtime]
            fitting = [runtime for runtime in runtimes if RUNTIMES[runtime][0] == artifact.format]
            if fitting:
                reference.check(artifact.interface)
                relation = belongs(sidecar, reference)
                found += [Candidate(artifact.name, sidecar, runtime, relation) for runtime in fitting]
        if not found and options.runtime is None:
            raise UserError(f"{self.path}: its JSON says that it was proved right in no runtime; choose one with --runtime")
        if not found:
            able = [name for name, (form, *_) in RUNTIMES.items() if form in formats]
            raise UserError(f"{self.path}: nothing in it for --runtime {options.runtime}; give one of {', '.join(able)}")
        return found


@contextmanager
def opened_source(path: Path) -> Iterator[Source]:
    """What a path stands for. UserError when it is neither an artifact's JSON, nor a bundle, nor a Hugging Face folder."""
    if path.suffix == ".json" and path.is_file():
        tokenizer = path.resolve().parent.parent / "tokenizer" / "tokenizer.json"  # where a bundle has it
        yield Source(path, (path,), None, tokenizer if tokenizer.is_file() else None)
    elif (path / MANIFEST).is_file() or path.suffix == ".zip":
        with bundle_folder(path) as (folder, manifest):
            sidecars = tuple(folder / artifact.sidecar for artifact in manifest.artifacts)
            yield Source(path, sidecars, None, folder / manifest.tokenizer.file)
    elif (path / "config.json").is_file():
        tokenizer = path / "tokenizer.json"
        yield Source(path, (), path, tokenizer if tokenizer.is_file() else None)
    else:
        raise UserError(f"{path}: nothing to score there; give an artifact's JSON, a bundle, or a Hugging Face folder")


def find_tokenizer(chosen: Path | None, reference: Reference, others: list[Path | None]) -> Tokenizer | None:
    """The tokenizer that was given, else that of the reference's checkpoint, else one that came with what is scored."""
    if chosen is not None and not chosen.is_file():
        raise UserError(f"--tokenizer {chosen}: no such file; give a tokenizer.json")
    path = next((found for found in (chosen, reference.tokenizer, *others) if found is not None), None)
    if path is None:
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise UserError(f"{path}: no tokenizer that can be read ({' '.join(str(error).split())}); give another --tokenizer") from error


def result_of(candidate: Candidate, reference: Reference, options: QualityOptions, tokenizer: Tokenizer | None) -> dict:
    """One entry of ``results``: scored in a fresh process."""
    entry = {"artifact": candidate.name, "path": str(candidate.path), "runtime": candidate.runtime, "belongs": candidate.belongs}
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
        tokens = Path(scratch) / "tokens.npz"
        if candidate.runtime == PYTORCH:
            entry["failures"] = run_torch(candidate, reference, options.threads, tokens)
        else:
            run = Run(candidate.runtime, options.threads, quality=True, tokens=tokens, timing=False)
            device = run_local(candidate.path, reference.folder, run)["device"]
            entry |= {"runtime_version": device["runtime_version"], "failures": device["failures"]}
        scored = described(read_scores(tokens), reference, options, tokenizer) if tokens.is_file() else None
        return {**entry, "quality": scored}


def run_torch(candidate: Candidate, reference: Reference, threads: int, tokens: Path) -> list[str]:
    """Score a Hugging Face folder in a process of its own; what went wrong, as a device test tells it. UserError for a mistake."""
    given = [str(candidate.path.resolve()), str(reference.folder.resolve()), str(tokens), str(threads)]
    command = [sys.executable, "-m", "pipeline.quality_torch", *given]
    done = subprocess.run(command, env=child_environment(threads), capture_output=True, text=True, check=False)
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 2:
        raise UserError(said)
    if done.returncode == 1 and said:
        return [f"{candidate.name} in {PYTORCH}: {said}"]
    if done.returncode:
        raise StageDied(f"{candidate.name} could not be scored in PyTorch: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return []


def described(scores: TokenScores, reference: Reference, options: QualityOptions, tokenizer: Tokenizer | None) -> dict:
    """All statistics as JSON values; the worst windows with their text."""
    worst = worst_windows(scores, options.worst)
    texts = windows_of(reference, {window.window for window in worst})
    return {
        **record_of(statistics(scores)),
        "positions": [
            {"first_token": bucket.first_token, "last_token": bucket.last_token, **record_of(bucket.statistics)}
            for bucket in by_position(scores)
        ],
        "worst_windows": [
            {**asdict(window), "statistics": record_of(window.statistics), **text_of(texts[window.window], window.worst_token, tokenizer)}
            for window in worst
        ],
    }


def windows_of(reference: Reference, wanted: set[int]) -> dict[int, list[int]]:
    """Token ids of some windows."""
    rows = enumerate(read_rows(reference.evaluation, ("windows",)))
    return {index: row["windows"].tolist() for index, row in rows if index in wanted}


def text_of(ids: list[int], worst_token: int, tokenizer: Tokenizer | None) -> dict:
    """A window's text around its worst token: what came before it, the token itself, what follows; ids where no tokenizer is."""
    if tokenizer is None:
        return {"ids": ids, "before": None, "token": None, "after": None}
    last = len(ids)
    return {
        "ids": ids,
        "before": decoded(tokenizer, ids[:worst_token]),
        "token": following(tokenizer, ids, worst_token, worst_token + 1) or decoded(tokenizer, ids[worst_token : worst_token + 1]),
        "after": following(tokenizer, ids, worst_token + 1, last),
    }


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def following(tokenizer: Tokenizer, ids: list[int], start: int, end: int) -> str:
    """Text of tokens ``start`` to ``end``, read behind the one before: some tokenizers drop a space at the start of a text."""
    return decoded(tokenizer, ids[start - 1 : end])[len(decoded(tokenizer, ids[start - 1 : start])) :]


def describe_reference(reference: Reference) -> dict:
    """The fp32 models' own scores, and what keeping k tokens of the reference loses of KL."""
    exported, dense, evaluation = reference.record["exported"], reference.record["reference"], reference.evaluation
    return {
        "golden": str(reference.folder),
        "windows": evaluation.sizes["m"],
        "prompt_tokens": evaluation.prompt_tokens,
        "window_tokens": evaluation.sizes["T"],
        "tokens": evaluation.sizes["m"] * evaluation.sizes["S"],
        "perplexity": exported["perplexity"],
        "perplexity_stderr": exported["perplexity_stderr"],
        "dense_perplexity": dense["perplexity"],
        "top_k": {**reference.record["top_k"], "share_lost": share_lost(reference.record["top_k"])},
    }


def share_lost(top_k: dict) -> dict[str, float | None]:
    """Share of the full KL that the shortcut does not see, in each comparison that golden.json has."""
    return {
        name: plain(cost["lost"] / cost["kl_full"]) if cost["kl_full"] else 0.0 for name, cost in top_k.items() if isinstance(cost, dict)
    }
