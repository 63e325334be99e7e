"""The commands of ``pocketlm`` that write text with a bundle's model. Imports stand in the command."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from models.errors import UserError
from pipeline.cli_options import WORK, AsJson, Work
from pipeline.cli_voice import told

app = typer.Typer()
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="bundle folder or zip")]


@app.command(
    epilog="Examples: `pocketlm generate dist/demo-android-bundle --prompt 'def '`; "
    "`pocketlm generate dist/demo-android-bundle.zip --runtime tflite --temperature 0.7 --seed 1 --stop 'def '`; "
    "`pocketlm generate dist/demo-android-bundle < prompt.txt`"
)
def generate(
    path: Bundle,
    runtime: Annotated[str, typer.Option(help="onnx, litert or tflite", autocompletion=lambda: ["onnx", "litert", "tflite"])] = "onnx",
    prompt: Annotated[str | None, typer.Option(help="text to go on from; without it, or with -, what standard input has")] = None,
    artifact: Annotated[str | None, typer.Option(help="such as onnx_fp32; without it the one that was measured to answer soonest")] = None,
    max_tokens: Annotated[int, typer.Option(help="most tokens to write")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 0.0,
    top_k: Annotated[int, typer.Option(help="draw from the k likeliest tokens; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the fewest tokens that hold this share; 1: from all")] = 1.0,
    seed: Annotated[int, typer.Option(help="seed of the draws")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="text before which the answer ends; may be given again")] = None,
    threads: Annotated[int, typer.Option(help="threads of the runtime")] = 1,
    prompt_cache: Annotated[Path | None, typer.Option(help="file that keeps what was computed: common beginnings are reused")] = None,
    draft: Annotated[Path | None, typer.Option(help="bundle of a pruned sibling that goes ahead; the greedy text stays the same")] = None,
    ahead: Annotated[int, typer.Option(help="tokens that the draft goes ahead")] = 4,
    packed: Annotated[Path | None, typer.Option(help="folder for the weights of an ONNX model as this machine's kernels want them")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Stream text from a bundle's model in the terminal; speed and memory follow on standard error. Ctrl-C ends it (exit code 130)."""
    import io
    from dataclasses import asdict

    from pipeline import generate as generation
    from pipeline.streaming import INTERRUPTED, GenerateOptions, told_of

    options = GenerateOptions(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, threads=threads, stop=tuple(stop or ()),
        artifact=artifact, echo=not as_json, prompt_cache=prompt_cache, draft=draft, ahead=ahead, packed=packed,
    )  # fmt: skip
    made = generation.generate(path, runtime, prompt_text(prompt), options, io.StringIO() if as_json else sys.stdout)
    if as_json:
        print(json.dumps(asdict(made), indent=1))
    else:
        print(flush=True)
        told.print(told_of(made), markup=False)
    if made.ended == INTERRUPTED:
        raise typer.Exit(130)


def prompt_text(given: str | None) -> str:
    """The prompt: as given, or all of standard input; empty where a person sits at it. UserError where it is no UTF-8."""
    if given not in (None, "-"):
        return given
    if sys.stdin is None or (given is None and sys.stdin.isatty()):
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start}); give the prompt in UTF-8") from error


@app.command(epilog="Example: `pocketlm demo dist/demo-android-bundle --port 8080`")
def demo(
    path: Bundle,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of this machine only; 0 takes a free one")] = 8765,
    threads: Annotated[int, typer.Option(min=1, help="threads of each runtime")] = 1,
    work: Work = WORK,
    as_json: AsJson = False,
) -> None:
    """Serve a page on this machine where fp32, ONNX and TFLite complete a prompt side by side. Ctrl-C ends it."""
    from pipeline.demo import serve

    def ready(url: str) -> None:
        print(json.dumps({"url": url}) if as_json else f"{url}  (Ctrl-C ends it)", flush=True)

    serve(path, port, threads, work, ready)
