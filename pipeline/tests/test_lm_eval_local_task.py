"""lm-evaluation-harness with local tasks on the toy in ONNX Runtime; nothing is downloaded.

It needs the ``eval`` extra, which `make test` installs and the road does without.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import yaml

from device_tests.tests.toy import INTERFACE, VOCABULARY, ToyModel, write_onnx
from pipeline.recipe import ROOT
from pipeline.runner import with_our_path
from pipeline.tests.test_text_scoring import LETTERS, greedy_ids

MODEL = ToyModel(0)
QUESTIONS = [("ABC", ["D", "EF", "GHI"]), ("KLM", ["NO", "P", "Q"]), ("ZZ", ["AB", "CD", "EFG"]), ("CAB", ["X", "Y", "Z"])]


def ids_of(text: str) -> list[int]:
    return [ord(letter) - ord("A") for letter in text]


def loglikelihood(context: str, continuation: str) -> float:
    tokens = ids_of(context + continuation)
    rows = scipy.special.log_softmax(MODEL.logits(np.array(tokens[:-1])).astype(float), axis=1)
    return sum(rows[place - 1][tokens[place]] for place in range(len(context), len(tokens)))


def best(context: str, choices: list[str]) -> int:
    return int(np.argmax([loglikelihood(context, choice) for choice in choices]))


def answer_of(prompt: str, count: int) -> str:
    ids = greedy_ids(ids_of(prompt), count)
    end = ids.index(INTERFACE.eos_token_id) if INTERFACE.eos_token_id in ids else count
    return LETTERS.decode(ids[:end])


def write_task(folder: Path, name: str, rows: list[dict], **more) -> None:
    """A task's YAML and its data."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **more,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The toy with its tokenizer, and three tasks whose right answers are known from the toy in numpy."""
    root = tmp_path_factory.mktemp("lm-eval")
    tasks = root / "tasks"
    tasks.mkdir()
    write_onnx(MODEL, root / "toy.onnx")
    LETTERS.save(str(root / "tokenizer.json"))
    rights = [best(*question) for question in QUESTIONS]
    labels = [*rights[:3], (rights[3] + 1) % 3]  # the last one is wrong on purpose: 3 of 4
    rows = [{"query": q, "choices": c, "label": label} for (q, c), label in zip(QUESTIONS, labels, strict=True)]
    write_task(
        tasks, "toy_choice", rows, output_type="multiple_choice", doc_to_text="{{query}}", doc_to_choice="choices",
        doc_to_target="label", target_delimiter="", metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    prompts = ["BCD", "FGH", "QRS", "TUV", "LMN"]
    rows = [{"query": prompt, "answer": answer_of(prompt, 6)} for prompt in prompts[:4]] + [
        {"query": prompts[4], "answer": "nothing of it"}
    ]
    write_task(
        tasks, "toy_answer", rows, output_type="generate_until", doc_to_text="{{query}}", doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    write_task(
        tasks, "toy_text", [{"text": "BEADCAFE"}, {"text": "HELIOS"}], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    return root


def lm_eval(place: Path, *more: str) -> subprocess.CompletedProcess:
    """The command, with no way to a hub and its caches in the test's folder."""
    environment = with_our_path(
        {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "hf"), "NO_COLOR": "1"}
    )
    given = [str(place / "toy.json"), "--tokenizer", str(place / "tokenizer.json"), "--include-path", str(place / "tasks"), *more]
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "lm-eval", *given]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_three_kinds_of_task_have_the_toy_s_own_numbers(place):
    done = lm_eval(place, "--tasks", "toy_choice,toy_answer,toy_text", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["artifact"], found["runtime"]) == ("toy", "onnxruntime")
    assert found["results"]["toy_choice"]["acc,none"] == pytest.approx(0.75)
    assert found["results"]["toy_answer"]["exact_match,none"] == pytest.approx(0.8)
    texts = ["BEADCAFE", "HELIOS"]
    total = sum(loglikelihood(chr(ord("A") + INTERFACE.eos_token_id), text) for text in texts)
    expected = -total / sum(len(text) for text in texts) / math.log(2)
    assert found["results"]["toy_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)


def test_limit_and_table(place):
    done = lm_eval(place, "--tasks", "toy_choice", "--limit", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "toy_choice" in done.stdout and "1.0000" in done.stdout  # the first three are right
    assert "on toy in onnxruntime" in done.stdout


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--tasks", "no_such_task"), "no_such_task"),
        (("--tasks", ","), "names no task"),
        (("--tasks", "toy_choice", "--runtime", "litert"), "toy is onnx, litert runs tflite"),
        (("--tasks", "toy_choice", "--runtime", "onnx"), "no such runtime"),
        (("--tasks", "toy_choice", "--include-path", "/nowhere"), "no such folder"),
        (("--tasks", "toy_choice", "--tokenizer", "/nowhere/tokenizer.json"), "give the path of a tokenizer.json"),
    ],
)
def test_mistakes_are_one_line(place, more, words):
    done = lm_eval(place, *more)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and words in lines[-1] and lines[-1].startswith("pocketlm: "), done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_the_toy_s_ids_are_letters():
    assert LETTERS.encode("".join(chr(ord("A") + index) for index in range(VOCABULARY))).ids == list(range(VOCABULARY))
