"""The demo model's tokenizer: a byte-level BPE with GPT-2's pre-tokenizer, trained on the demo corpus.

GPT-2's own splitting is kept, although it packs indentation worse than newer patterns do, because it is the one that
onnxruntime-extensions builds into its graphs: the tokenizer can then travel to a phone without any Python.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from `texts`. Id 0 is `<|endoftext|>`; all 256 bytes are in the vocabulary, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_tokens: int) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` and onnxruntime-extensions need."""
    folder.mkdir(parents=True, exist_ok=True)
    definition = json.loads(tokenizer.to_str())
    # Merges as "a b", not as pairs: both are valid, but onnxruntime-extensions 0.15 reads only this form.
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False, indent=1) + "\n", "utf-8")
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": context_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
