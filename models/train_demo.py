"""Train the demo model from nothing: `python -m models.train_demo --out models/demo`.

Everything it needs is installed already: the corpus is the Python source in the environment (models/corpus.py). Stop it at
any time, with Ctrl-C or SIGTERM, and start it again: it goes on from its last checkpoint, also with another --steps.
"""

import argparse
import json
import signal
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from models.corpus import Source, collect, split_of
from models.demo_card import write_card
from models.demo_data import PackedTokens, pack, write_demo_texts
from models.demo_export import export_model, perplexity, window_losses
from models.demo_log import LogRow, append_row, plot_losses, read_log, write_log
from models.demo_tokenizer import END_OF_TEXT_ID, save_tokenizer, train_tokenizer
from models.demo_training import Schedule, Training

SEED = 1234
CONTEXT_TOKENS = 1024
VALIDATION_BLOCKS = 48
ROW_STEPS = 10  # between rows of the log
DEMO_CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 1024,
    "max_position_embeddings": CONTEXT_TOKENS,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": END_OF_TEXT_ID,
}


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes."""

    out: Path  # the finished model
    work: Path  # packed corpus, checkpoint; not for a repository
    snapshot: Path | None = None  # an unfinished model, renewed at each checkpoint

    @property
    def log(self) -> Path:
        return self.out / "training" / "log.csv"


def prepare(places: Places) -> Tokenizer:
    """Read the corpus, train the tokenizer, pack the tokens; once, since all of it depends on the environment alone."""
    facts_file = places.work / "corpus.json"
    if not facts_file.exists():
        places.work.mkdir(parents=True, exist_ok=True)
        sources = collect()
        write_demo_texts(sources, places.out / "data")
        parts = {split: [s for s in sources if split_of(s.path) == split] for split in ("train", "validation")}
        tokenizer = train_tokenizer((source.text for source in parts["train"][::3]), DEMO_CONFIG["vocab_size"])
        save_tokenizer(tokenizer, places.work / "tokenizer", CONTEXT_TOKENS)
        packed_tokens = {
            split: pack((source.text for source in part), tokenizer, places.work / f"{split}.npy", SEED) for split, part in parts.items()
        }
        facts_file.write_text(json.dumps(corpus_facts(parts["train"], packed_tokens["train"]), indent=1) + "\n", "utf-8")
    return Tokenizer.from_file(str(places.work / "tokenizer" / "tokenizer.json"))


def corpus_facts(sources: list[Source], train_tokens: int) -> dict:
    """What the model card says about the training text: files, and UTF-8 bytes per package."""
    packages: dict[tuple[str, str, str], int] = {}
    for source in sources:
        key = (source.package, source.version, source.licence)
        packages[key] = packages.get(key, 0) + len(source.text.encode())
    return {
        "train_files": len(sources),
        "train_tokens": train_tokens,
        "packages": [[*key, size] for key, size in packages.items()],
    }


def train(training: Training, places: Places, tokenizer: Tokenizer, checkpoint_seconds: float, stop: threading.Event) -> bool:
    """Learn until the schedule ends, or until `stop` is set: then False is returned. Leaves a checkpoint either way."""
    data = PackedTokens(places.work / "train.npy", CONTEXT_TOKENS, SEED)
    validation = PackedTokens(places.work / "validation.npy", CONTEXT_TOKENS, SEED).first(VALIDATION_BLOCKS)
    if (places.work / "checkpoint.pt").exists():
        training.load(places.work / "checkpoint.pt")
    write_log(places.log, [row for row in read_log(places.log) if row.step <= training.step])
    losses, saved_at = [], time.monotonic()
    blocks, steps = training.schedule.batch_blocks, training.schedule.steps
    while training.step < steps and not stop.is_set():
        factor = training.schedule.lr_factor(training.step)
        losses.append(training.learn(data.batch(training.step, blocks)))
        due = time.monotonic() - saved_at > checkpoint_seconds or training.step == steps or stop.is_set()
        if due or training.step % ROW_STEPS == 0:
            held = window_losses(training.model, validation).mean().item() if due else None
            tokens = training.step * blocks * CONTEXT_TOKENS
            row = LogRow(training.step, tokens, training.seconds, factor, statistics.fmean(losses), held)
            append_row(places.log, row)
            print(row, flush=True)
            losses = []
        if due:
            checkpoint(training, places, tokenizer)
            saved_at = time.monotonic()
    return training.step >= steps


def checkpoint(training: Training, places: Places, tokenizer: Tokenizer) -> None:
    """Save the run, redraw its plot, renew the snapshot."""
    training.save(places.work / "checkpoint.pt")
    plot_losses(read_log(places.log), places.log.with_name("loss.png"))
    if places.snapshot:
        export_model(training.model, tokenizer, places.snapshot)


def finish(training: Training, places: Places, tokenizer: Tokenizer) -> None:
    """Write the model, measure what was written rather than what is in memory, and write its card from the measurements."""
    export_model(training.model, tokenizer, places.out)
    model = LlamaForCausalLM.from_pretrained(places.out, dtype=torch.float32)
    heldout = (places.out / "data" / "heldout.txt").read_text("utf-8")
    quality = perplexity(model, tokenizer, heldout, CONTEXT_TOKENS)
    facts = json.loads((places.work / "corpus.json").read_text("utf-8"))
    write_card(places.out, model, tokenizer, facts, quality)


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="where the finished model goes")
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"), help="packed corpus and checkpoint")
    parser.add_argument("--snapshot", type=Path, help="also write the unfinished model here at each checkpoint")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps in all; change it before the decay begins")
    parser.add_argument("--checkpoint-seconds", type=float, default=240.0, help="seconds between checkpoints")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile, which needs g++")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    places = Places(options.out, options.work, options.snapshot)
    tokenizer = prepare(places)
    training = Training(DEMO_CONFIG, Schedule(options.steps), SEED, options.compile)
    if train(training, places, tokenizer, options.checkpoint_seconds, stop):
        finish(training, places, tokenizer)


if __name__ == "__main__":
    main()
