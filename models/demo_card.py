"""The demo model's card. Every number in it is measured or read from the run; nothing is typed by hand."""

import json
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from models.demo_export import Perplexity, sample
from models.demo_log import LogRow, read_log

# None ends in white space: the tokenizer joins a line break with the indentation after it, so a prompt that stops between the
# two promises a line without indentation, and the model keeps the promise.
PROMPTS = (
    "def read_lines(path):",
    "import numpy as np\n\n\ndef softmax(x, axis=-1):",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "for i in range(",
)
SAMPLE_TOKENS = 96
TEMPERATURE = 0.7

CONFIG_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [code, python, llama, demo]
model-index:
- name: pocketlm-demo
  results:
  - task: {{type: text-generation}}
    dataset: {{name: heldout.txt, type: python-source}}
    metrics: [{{type: perplexity, value: {perplexity:.3f}}}]
---

# PocketLM demo model

A very small Llama that writes Python-looking text. It exists so that PocketLM's whole road (prune, quantise, export, prove)
can be walked on one laptop, offline, with a model that has really learnt something. It is no coding assistant: it knows
syntax, idiom and the names that libraries use, and has no idea what a program means.

| | |
| --- | --- |
| parameters | {parameters:,} (embedding tied to the head) |
| shape | {layers} layers, hidden {hidden}, FFN {ffn}, vocabulary {vocab} |
| attention | {heads} query heads and {kv_heads} key-value heads of {head_dim} |
| context | {context} tokens |
| weights | {weights_bytes:,} bytes, fp16 |
| trained on | {tokens:,} tokens ({epochs:.2f} epochs), {steps:,} steps |
| time | {minutes:.0f} minutes, {tokens_per_second:,.0f} tokens/s |
| held-out perplexity | **{perplexity:.3f}** ± {perplexity_error:.3f} |
| held-out bits per byte | {bits_per_byte:.4f} |

## Quality

Perplexity of `data/heldout.txt` with the fp16 weights of this folder, computed in fp32: {windows} windows of {window_tokens}
tokens that do not overlap, each begun afresh with `<|endoftext|>`; {measured_tokens:,} tokens scored. The error is one
standard error over windows. None of those files was trained on, and near-duplicates were dropped before the split.

![loss](training/loss.png)

Every row behind that plot is in `training/log.csv`; the last validation loss is {validation_loss:.4f} nats per token.

## How it was trained

`python -m models.train_demo`, from nothing: byte-level BPE trained on the corpus, Muon for the hidden matrices, AdamW for the
embedding and the norms, bf16 autocast, {batch_tokens:,} tokens a step, warmup, a stable rate, then linear decay to zero.
Sequences are half the context, and the whole context in the last steps; validation windows are whole ones throughout.

## Data

{files:,} Python files, {megabytes:.1f} MB, of the standard library and of packages that PocketLM's environment installs and
whose own metadata states an MIT, BSD, Apache or PSF licence. Left out: test folders, vendored copies, generated code, files
that are mostly data, and near-duplicates. Files are split by the hash of their path. `data/LICENSES.md` lists each file of the
two texts in this folder.

| package | version | licence | MB |
| --- | --- | --- | ---: |
{packages}

## What it writes

After each prompt: greedy, then sampled at temperature {temperature} (top-p 0.95, seed 0); {sample_tokens} tokens, unedited.
Let no prompt end in white space: the tokenizer joins a line break with the indentation that follows it.

{samples}

## Licence

The weights are under the Apache License 2.0. The model has seen source code of the packages above and can repeat pieces of
it, whose licences then apply.
"""


def write_card(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, corpus: dict, quality: Perplexity) -> None:
    """Write README.md and training/evaluation.json into the finished folder. `corpus` is what train_demo.corpus_facts says."""
    rows = read_log(out / "training" / "log.csv")
    config = model.config
    values = {
        **asdict(quality),
        **run_facts(rows, corpus),
        **{card: getattr(config, field) for card, field in CONFIG_FIELDS.items()},
        "perplexity": quality.perplexity,
        "perplexity_error": quality.perplexity * quality.standard_error,
        "measured_tokens": quality.tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_bytes": (out / "model.safetensors").stat().st_size,
        "packages": package_table(corpus["packages"]),
        "samples": sample_section(model, tokenizer),
        "temperature": TEMPERATURE,
        "sample_tokens": SAMPLE_TOKENS,
    }
    (out / "README.md").write_text(CARD.format(**values), "utf-8")
    measured = asdict(quality) | {name: values[name] for name in ("perplexity", "perplexity_error", "validation_loss", "steps")}
    (out / "training" / "evaluation.json").write_text(json.dumps(measured, indent=2) + "\n", "utf-8")


def run_facts(rows: list[LogRow], corpus: dict) -> dict:
    """What the log and the corpus say about the run."""
    last = rows[-1]
    return {
        "tokens": last.tokens,
        "steps": last.step,
        "minutes": last.seconds / 60,
        "tokens_per_second": last.tokens / last.seconds,
        "batch_tokens": last.tokens // last.step,
        "epochs": last.tokens / corpus["train_tokens"],
        "validation_loss": [row.validation_loss for row in rows if row.validation_loss is not None][-1],
        "files": corpus["train_files"],
        "megabytes": sum(size for *_, size in corpus["packages"]) / 1e6,
    }


def package_table(packages: list[list]) -> str:
    """Markdown rows, largest first, of [package, version, licence, bytes]."""
    ordered = sorted(packages, key=lambda package: -package[3])
    return "\n".join(f"| {name} | {version} | {licence} | {size / 1e6:.2f} |" for name, version, licence, size in ordered)


def sample_section(model: LlamaForCausalLM, tokenizer: Tokenizer) -> str:
    """Each prompt with a greedy and a sampled continuation, as fenced Markdown."""
    parts = []
    for prompt in PROMPTS:
        for how, temperature in (("greedy", 0.0), (f"temperature {TEMPERATURE}", TEMPERATURE)):
            text = sample(model, tokenizer, prompt, SAMPLE_TOKENS, temperature)
            # A longer fence than any that the model writes inside a docstring.
            parts.append(f"**{how}**, after `{prompt!r}`:\n\n````python\n{prompt}{text.rstrip()}\n````")
    return "\n\n".join(parts)
