"""Streams text from a bundle's model: ``device_tests`` sessions for the model, the tokenizers library for the text."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np
from tokenizers import Tokenizer

from device_tests import prompt_cache
from device_tests.artifact import read_artifact
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.sessions import Session, import_runtime, open_artifact, open_session
from device_tests.speculative import Speculator
from models.errors import GateError, UserError
from pipeline import library_output, report_headline
from pipeline.manifest import Artifact, Manifest
from pipeline.streaming import Generated, GenerateOptions, OneByOne, Request, Written, check_options, prompt_ids, stream
from pipeline.verify import bundle_folder

RUNTIMES = {"onnx": ("onnxruntime", "onnx"), "litert": ("litert", "tflite"), "tflite": ("tflite", "tflite")}


def generate(bundle: Path, runtime: str, prompt: str, options: GenerateOptions, out: TextIO | None = None) -> Generated:
    """Write the continuation of ``prompt`` to ``out`` (stdout) as it comes.

    ``runtime`` is onnx, litert or tflite. Ctrl-C ends it well. Raises UserError for options, prompts and bundles that cannot
    be used, GateError when the artifact or its runtime does wrong.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"--runtime {runtime}: no such runtime; give one of {', '.join(RUNTIMES)}")
    check_options(options)
    with bundle_folder(bundle) as (folder, manifest):
        artifact = chosen_artifact(manifest, runtime, options.artifact)
        tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer.file))
        request = Request(artifact, tokenizer, prompt_ids(tokenizer, prompt, artifact), options)
        ids = np.array(request.ids)
        try:
            exported = read_artifact(folder / artifact.sidecar)
            with library_output.to_log():
                import_runtime(RUNTIMES[runtime][0])
                session = open_artifact(exported, RUNTIMES[runtime][0], options.threads, options.packed)
            reused = prompt_cache.load(options.prompt_cache, session, exported, ids) if options.prompt_cache else 0
            chooser = OneByOne(session, options)
            if options.draft:
                with library_output.to_log():
                    draft = draft_session(options, runtime, folder / manifest.tokenizer.file)
                chooser = Speculator(session, draft, options.ahead)
            sink = out or sys.stdout
            sink.write(prompt if options.echo else "")
            made = stream(chooser, request, lambda piece: written_to(sink, piece))
            if options.prompt_cache and session.position >= len(ids):
                prompt_cache.save(options.prompt_cache, session, exported, ids)
            drafted, accepted = (chooser.proposed, chooser.accepted) if isinstance(chooser, Speculator) else (0, 0)
            return replace(made, reused_tokens=reused, drafted_tokens=drafted, accepted_tokens=accepted)
        except DeviceTestError as error:
            raise UserError(str(error)) from error
        except ArtifactFailure as error:
            raise GateError(str(error)) from error


def written_to(sink: TextIO, piece: Written) -> bool:
    """Show a piece at once; a terminal always wants more."""
    sink.write(piece.text)
    sink.flush()
    return True


def draft_session(options: GenerateOptions, runtime: str, tokenizer_file: Path) -> Session:
    """The draft's session. UserError unless its bundle has the very same tokenizer."""
    with bundle_folder(options.draft) as (folder, manifest):
        if (folder / manifest.tokenizer.file).read_bytes() != tokenizer_file.read_bytes():
            raise UserError(f"--draft {options.draft}: its tokenizer is another one; give a bundle of a pruned sibling of the same model")
        artifact = chosen_artifact(manifest, runtime, None)
        return open_session(folder / artifact.sidecar, RUNTIMES[runtime][0], options.threads, options.packed)


def chosen_artifact(manifest: Manifest, runtime: str, name: str | None) -> Artifact:
    """The artifact called ``name``, else the one that ``runtime`` answers with soonest, as it was measured when the bundle was made."""
    ours = RUNTIMES[runtime][0]
    fitting = [artifact for artifact in manifest.artifacts if ours in [device.runtime for device in artifact.runtimes]]
    if not fitting:
        raise UserError(f"this bundle has nothing for --runtime {runtime}; give another runtime")
    if name is None:
        return min(fitting, key=lambda artifact: (answer_ms(artifact, ours), artifact.bytes))
    for artifact in fitting:
        if artifact.name == name:
            return artifact
    names = ", ".join(artifact.name for artifact in fitting)
    raise UserError(f"--artifact {name}: --runtime {runtime} opens {names}; give one of them")


def answer_ms(artifact: Artifact, runtime: str) -> float:
    """Milliseconds of an answer on the first device that timed ``runtime``; infinite where none did."""
    times = (
        report_headline.answer_ms(device.first_token_ms, device.decode_tokens_per_s)
        for device in artifact.runtimes
        if device.runtime == runtime
    )
    return next((time for time in times if time < float("inf")), float("inf"))
