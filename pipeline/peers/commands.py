"""The two commands that every peer's module has, ``convert`` and ``time``."""

import contextlib
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from device_tests.timing import peak_rss_mb
from pipeline.bench_child import Prepare, main

TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Converted:
    """What a conversion made: ``model`` is what is opened, ``weights`` are the files it reads, names inside the output folder.

    ``bytes_read_per_token`` is None where whoever asked can count it in the file itself (ONNX). ``notes`` are for the reader.
    """

    model: str
    weights: tuple[str, ...]
    bytes_read_per_token: int | None = None
    notes: tuple[str, ...] = ()


def serve(convert: Callable[[Path, Path, dict], Converted], prepare: Prepare) -> None:
    """Carry out the command line of a peer's module."""
    command, *given = sys.argv[1:]
    if command == "convert":
        checkpoint, out, options = given
        converted = convert(Path(checkpoint), Path(out), json.loads(options))
        print(json.dumps({**asdict(converted), "peak_rss_mb": peak_rss_mb()}))
    elif command == "time":
        main(prepare, *given)
    else:
        sys.exit(f"{command}: no such command; give convert or time")


def files_in(folder: Path) -> tuple[str, ...]:
    """The files of a folder that hold graphs or weights."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix not in (".json", ".jinja", ".txt")))


def run_module(name: str, words: list[str]) -> None:
    """A module's command line, in this process, so that its memory is counted; what it prints goes to stderr."""
    given, sys.argv = sys.argv, [name, *words]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = given


def as_of_transformers_4(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint by links in ``folder``, with config and tokenizer as transformers 4 reads them.

    It would leave ``rope_parameters`` aside without a word, and does not know the tokenizer class of transformers 5.
    """
    for path in checkpoint.iterdir():
        if path.name not in ("config.json", TOKENIZER):
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    rope = dict(config.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype", "float32")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if (checkpoint / TOKENIZER).is_file():
        tokenizer = json.loads((checkpoint / TOKENIZER).read_text(encoding="utf-8"))
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / TOKENIZER).write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder
