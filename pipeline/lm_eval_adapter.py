"""lm-evaluation-harness over an exported artifact in its own runtime: ``pocketlm lm-eval ARTIFACT --tasks ...``.

The only module that needs lm_eval, which is no dependency of the rest:

    .venv/bin/pip install --constraint constraints.txt --editable '.[eval]'

From Python, ``ArtifactLM(session, tokenizer)`` goes wherever the harness takes a model object.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from lm_eval import __version__ as LM_EVAL_VERSION
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from device_tests.artifact import read_artifact
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.sessions import RUNTIMES, Session, open_session
from models.checkpoint import load_tokenizer
from models.errors import GateError, UserError
from models.progress import track
from models.text import leading_token
from pipeline.measure import runtimes_of
from pipeline.quality_reference import inputs_of, json_object
from pipeline.text_scoring import answer, continuation_loglikelihood, read_answering

METRIC_COLUMNS = ("task", "filter", "metric", "value", "standard error")


class ArtifactLM(TemplateLM):
    """A device session and a tokenizer as a model of lm-evaluation-harness.

    A text gets the token that the tokenizer itself puts before one, as the windows of the quality numbers do.
    """

    def __init__(self, session: Session, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.session, self.tokenizer = session, tokenizer
        self.leading = leading_token(tokenizer)

    @property
    def eot_token_id(self) -> int | None:
        """The model's end of text."""
        return self.session.interface.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context. UserError where the model has no such token."""
        sizes = self.session.interface
        for token in (self.leading, sizes.bos_token_id, sizes.eos_token_id):
            if token is not None:
                return token
        raise UserError("this model has no token that begins a text; leave out tasks with empty contexts")

    @property
    def max_length(self) -> int:
        """Tokens that the artifact's cache holds."""
        return self.session.interface.context_tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; with the leading token unless ``add_special_tokens`` is False or the text begins with it."""
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False).input_ids
        wanted = self.leading is not None and add_special_tokens is not False and ids[:1] != [self.leading]
        return [self.leading, *ids] if wanted else ids

    def _loglikelihood_tokens(self, requests: list, **_: object) -> list[tuple[float, bool]]:
        """One pass per request; the pairs of ids come from ``TemplateLM.loglikelihood``."""
        scored = track(requests, "scoring answers", len(requests))
        return [continuation_loglikelihood(self.session, context, continuation) for _, context, continuation in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in the harness's own windows of the whole context."""
        found = []
        for request in track(requests, "scoring texts", len(requests)):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            found.append(sum(continuation_loglikelihood(self.session, context, predicted)[0] for context, predicted in pairs))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One answer per request, as its task's ``generation_kwargs`` say."""
        found = []
        for request in track(requests, "writing answers", len(requests)):
            context, given = request.args
            ids = self.tok_encode(context) or [self.prefix_token_id]
            found.append(answer(self.session, self.tokenizer.backend_tokenizer, ids, read_answering(given)))
        return found


class CheckedTasks(TaskManager):
    """The harness's tasks; what it cannot load is the user's mistake and told in one line."""

    def load_task_or_group(self, task_list: str | list | None = None) -> dict:
        """UserError for an unknown task, a faulty YAML, or data that is not there."""
        names = [task_list] if isinstance(task_list, str) else list(task_list or [])
        unknown = [name for name in names if name not in self.all_tasks]
        if unknown:
            raise UserError(f"--tasks {', '.join(unknown)}: no such task; give names of tasks, and --include-path for your own")
        try:
            return super().load_task_or_group(task_list)
        except (KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
            line = " ".join(str(error).split())
            raise UserError(f"--tasks {', '.join(names)}: cannot be loaded ({line}); mend the task or bring its data here") from error


@dataclass(frozen=True)
class Evaluation:
    """What is run. ``runtime`` None: the first of the artifact's; ``limit`` None: every document; ``fewshot`` None: the task's own."""

    tasks: tuple[str, ...]
    include_path: Path | None = None
    runtime: str | None = None
    threads: int = 1
    tokenizer: Path | None = None
    limit: int | None = None
    fewshot: int | None = None


def evaluate(sidecar: Path, wanted: Evaluation) -> dict:
    """The harness's results for one artifact, as JSON values. UserError for a mistake, GateError where the artifact does wrong."""
    if wanted.include_path is not None and not wanted.include_path.is_dir():
        raise UserError(f"--include-path {wanted.include_path}: no such folder; give the one that holds the tasks' YAML files")
    tasks = [name for name in wanted.tasks if name]
    if not tasks:
        raise UserError("--tasks names no task; give some, such as --tasks hellaswag,arc_easy")
    runtime = chosen_runtime(sidecar, wanted.runtime)
    folder = tokenizer_folder(sidecar, wanted.tokenizer)
    try:
        session = open_session(sidecar, runtime, wanted.threads)
        manager = CheckedTasks(include_path=str(wanted.include_path) if wanted.include_path else None)
        found = simple_evaluate(
            ArtifactLM(session, load_tokenizer(folder)), tasks=tasks, task_manager=manager, limit=wanted.limit,
            num_fewshot=wanted.fewshot, log_samples=False,
        )  # fmt: skip
    except DeviceTestError as error:
        raise UserError(str(error)) from error
    except ArtifactFailure as failure:
        raise GateError(f"{sidecar.stem} in {runtime}: {failure}") from failure
    artifact = read_artifact(sidecar)
    kept = {key: found[key] for key in ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better") if key in found}
    return {"artifact": artifact.name, "sha256": artifact.sha256, "runtime": runtime, "lm_eval": LM_EVAL_VERSION, **kept}


def chosen_runtime(sidecar: Path, asked: str | None) -> str:
    """The runtime that was asked for, else the first that the sidecar is for."""
    if asked is not None and asked not in RUNTIMES:
        raise UserError(f"--runtime {asked}: no such runtime; give one of {', '.join(RUNTIMES)}")
    record = json_object(sidecar)
    if "format" not in record:
        raise UserError(f"{sidecar}: no sidecar of an artifact; give the JSON beside the model file")
    able = runtimes_of(record)
    if asked is None and not able:
        raise UserError(f"{sidecar}: its JSON says that it was proved right in no runtime; choose one with --runtime")
    return asked or able[0]


def tokenizer_folder(sidecar: Path, chosen: Path | None) -> Path:
    """The folder of the tokenizer.json that was given, of the bundle around the artifact, or of the model it was exported from."""
    if chosen is not None:
        if chosen.name != "tokenizer.json" or not chosen.is_file():
            raise UserError(f"--tokenizer {chosen}: give the path of a tokenizer.json")
        return chosen.parent
    inputs = inputs_of(sidecar.parent)
    for parent in list(inputs.values()):
        inputs |= inputs_of(parent)  # int8 was made from fp32, and that from a checkpoint
    for folder in (sidecar.resolve().parent.parent / "tokenizer", *inputs.values()):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise UserError(f"{sidecar}: no tokenizer near it; give --tokenizer with the path of its tokenizer.json")


def metric_rows(found: dict) -> list[tuple[str, ...]]:
    """One row per task, filter and metric."""
    rows = []
    for task, numbers in found["results"].items():
        for key, value in numbers.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{filtered}")
            rows.append((task, filtered, metric, number(value), number(error)))
    return rows


def number(value: object) -> str:
    """A metric's value; the harness writes N/A where it has none."""
    return f"{value:.4f}" if isinstance(value, float) else "-" if value in (None, "N/A") else str(value)
