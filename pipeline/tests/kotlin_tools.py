"""Compiles and runs the Kotlin library of the bundles on a JVM. What it takes is fetched once into .pocketlm/kotlin, by npm and pip.

- The compiler is JetBrains' package for npm, the version that the bundles' Gradle project names.
- ONNX Runtime's Java classes and their JNI library are not on npm or PyPI by themselves. The wheel of pyserini carries them, unchanged
  from onnxruntime 1.17.0. The runtime under them is the one of this environment: a shared library of a few lines answers for the old
  one's name and symbol version, and hands out the real one's API, which is backward compatible.
- LiteRT has no Java classes for a JVM: a stand-in with the published signatures asks a process that runs the real one.
"""

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import onnxruntime

from models.provenance import sha256_of
from pipeline.bundle_android import KOTLIN, TEMPLATES
from pipeline.fingerprint import ROOT
from pipeline.whole_folder import made_whole

HERE = Path(__file__).resolve().parent
TOOLS = ROOT / ".pocketlm" / "kotlin"
COMPILER_SHA256 = "7a16b983e6c759893c1f262c0c4bca801b0b5953a166ff8494e0a7f8659fe44e"  # of npm's kotlin-compiler in that version
CARRIER, CARRIER_VERSION = "pyserini", "0.40.0"
CARRIER_SHA256 = "fbda53e84dbded1b120055a900976c37d6a53cc841d518f40e2a8b00e454377f"
JAVA_VERSION = "1.17.0"  # of ONNX Runtime's Java classes in there
NATIVE_FOLDER = {"x86_64": "linux-x64", "aarch64": "linux-aarch64"}
SECONDS = 600
JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx900m")  # short runs: the best compiler would never pay
RELAY = """
#include <dlfcn.h>
#include <stdlib.h>

/* Named libonnxruntime.so.1.17.0 for the JNI library; answers with the API of the runtime that is installed here. */
static void *real(const char *name) {
    static void *library;
    if (!library) library = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
    void *found = library ? dlsym(library, name) : NULL;
    if (!found) abort();
    return found;
}

const void *OrtGetApiBase(void) { return ((const void *(*)(void))real("OrtGetApiBase"))(); }

void *OrtSessionOptionsAppendExecutionProvider_CPU(void *options, int arena) {
    return ((void *(*)(void *, int))real("OrtSessionOptionsAppendExecutionProvider_CPU"))(options, arena);
}
"""


class Unavailable(Exception):
    """A tool cannot be had on this machine; the message says which and why."""


class Runner:
    """The compiled library with its harness for one runtime, in a JVM that answers until it is closed."""

    def __init__(self, classpath: tuple[Path, ...], *properties: str) -> None:
        command = ["java", *JVM, "-Dfile.encoding=UTF-8", *properties, "-cp", joined(classpath), "pocketlm.HarnessKt"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def ask(self, what: str, **request):
        """The harness's answer. AssertionError with its stack trace where it breaks."""
        self._process.stdin.write(json.dumps({"what": what, **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the JVM ended with {self._process.wait(timeout=SECONDS)} at {what}"
        answer = json.loads(line)
        assert "crash" not in answer, answer["crash"]
        return answer["answer"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=SECONDS)


def onnx_runner() -> Runner:
    """The library over ONNX Runtime's own Java classes and the runtime of this environment."""
    classes, native = onnxruntime_java()
    own = library("onnx", [classes])
    return Runner((own, classes, android_classes(), *standard_jars()), f"-Donnxruntime.native.path={native}")


def litert_runner() -> Runner:
    """The library over the stand-in for LiteRT's Java classes."""
    stand_in = java_classes("litert-stub", HERE / "kotlin" / "litert_stub")
    own = library("litert", [stand_in])
    server = "\n".join((sys.executable, str(HERE / "litert_server.py")))
    return Runner((own, stand_in, android_classes(), *standard_jars()), f"-Dlitert.server={server}")


def library(source_set: str, classpath: list[Path]) -> Path:
    """Everything of the module ``pocketlm``, its test for devices, Gradle's own helper and the harness, compiled together."""
    module = TEMPLATES / "pocketlm" / "src"
    sources = [module / part / "kotlin" for part in ("main", source_set, "device", "androidTest")]
    sources += [TEMPLATES / "buildSrc" / "src" / "main" / "kotlin", HERE / "kotlin" / "harness"]
    return kotlin_classes(f"library-{source_set}", sources, [*classpath, android_classes()])


def sample(resources: Path) -> None:
    """Compile the sample app against the compiled library and the ``resources`` folder with the classes that Gradle would make."""
    classes, _ = onnxruntime_java()
    made = resources / "classes"
    run(["javac", "--release", "11", "-d", str(made), *map(str, files_of([resources]))], "javac R")
    classpath = [library("onnx", [classes]), android_classes(), made]
    run(kotlinc(classpath, resources / "sample", [TEMPLATES / "sample/src/main/kotlin"]), "kotlinc sample")


def android_classes() -> Path:
    return java_classes("android-stubs", HERE / "kotlin" / "android_stubs")


def kotlin_classes(name: str, sources: list[Path], classpath: list[Path]) -> Path:
    """Class files of Kotlin ``sources``, for the API of Java 8, which Android 7 has. AssertionError with what the compiler says."""

    def compile_into(out: Path) -> None:
        run(kotlinc(classpath, out, sources), f"kotlinc {name}")

    return kept(name, files_of(sources), [compiler(), *classpath], compile_into)


def kotlinc(classpath: list[Path], out: Path, sources: list[Path]) -> list[str]:
    """The command that compiles for Java 8's API; a warning fails."""
    home = compiler()
    jars = [*(f"kotlin-{name}" for name in ("compiler", "stdlib", "reflect", "script-runtime")), "annotations-13.0"]
    own = [*(home / "lib" / f"{name}.jar" for name in jars), *standard_jars()]
    command = ["java", *JVM, "-cp", joined(own), "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-kotlin-home", str(home)]
    command += ["-no-reflect", "-no-stdlib", "-jvm-target", "1.8", "-Xjdk-release=8", "-Werror"]
    return [*command, "-cp", joined([*classpath, *standard_jars()]), "-d", str(out), *map(str, sources)]


def syntax_faults(scripts: dict[str, str], folder: Path) -> list[str]:
    """What the compiler says of the grammar of Gradle scripts, by name; what they call is not there, and not asked for."""
    for place, (name, text) in enumerate(scripts.items()):
        (folder / f"script{place}.kt").write_text(f"fun script{place}() {{ // {name}\n{text}\n}}\n", encoding="utf-8")
    done = subprocess.run(kotlinc([], folder / "out", [folder]), capture_output=True, text=True, timeout=SECONDS, check=False)
    said = done.stderr.splitlines()
    assert any("unresolved reference" in line.lower() for line in said), f"the compiler did not look at the scripts: {done.stderr[:2000]}"
    return [line for line in said if "syntax error" in line.lower()]


def java_classes(name: str, sources: Path) -> Path:
    """Class files of Java ``sources``. AssertionError with what the compiler says."""

    def compile_into(out: Path) -> None:
        run(["javac", "--release", "11", "-d", str(out), *map(str, files_of([sources]))], f"javac {name}")

    require("javac")
    return kept(name, files_of([sources]), [], compile_into)


def kept(name: str, sources: list[Path], classpath: list[Path], make) -> Path:
    """The classes that ``make`` writes, kept for the next run by what they are made of; older ones of this name go."""
    parts = [path.relative_to(ROOT).as_posix() + sha256_of(path) for path in sources] + [path.name for path in classpath]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = TOOLS / "classes" / f"{name}-{digest}"
    if not folder.is_dir():
        for old in folder.parent.glob(f"{name}-*"):
            shutil.rmtree(old)
        with made_whole(folder) as draft:
            make(draft)
    return folder


def compiler() -> Path:
    """The Kotlin compiler's home. Unavailable without Java, or where npm cannot reach its registry."""
    require("java")
    home = TOOLS / f"compiler-{KOTLIN}"
    if not home.is_dir():
        require("npm")
        with made_whole(home) as draft:
            fetch(["npm", "pack", "--silent", "--pack-destination", str(draft), f"kotlin-compiler@{KOTLIN}"], "the Kotlin compiler")
            archive = checked(draft / f"kotlin-compiler-{KOTLIN}.tgz", COMPILER_SHA256)
            run(["tar", "-xzf", str(archive), "-C", str(draft), "--strip-components=1", "package/lib"], "tar")
            archive.unlink()
    return home


def standard_jars() -> tuple[Path, ...]:
    """Kotlin's standard library and coroutines, as they come with the compiler."""
    return tuple(compiler() / "lib" / f"{name}.jar" for name in ("kotlin-stdlib", "kotlinx-coroutines-core-jvm"))


def onnxruntime_java() -> tuple[Path, Path]:
    """ONNX Runtime's Java classes, and a folder with the JNI library beside the relay to this environment's runtime."""
    folder_of_machine = NATIVE_FOLDER.get(platform.machine())
    if folder_of_machine is None:
        raise Unavailable(f"ONNX Runtime's JNI library is not there for {platform.machine()}")
    require("cc")
    classes = TOOLS / f"onnxruntime-java-{JAVA_VERSION}"
    if not classes.is_dir():
        with made_whole(classes) as draft:
            what = f"{CARRIER}=={CARRIER_VERSION}"
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(draft), what]
            fetch(pip, "ONNX Runtime's Java classes")
            wheel = checked(next(draft.glob("*.whl")), CARRIER_SHA256)
            take_onnxruntime(wheel, draft)
            wheel.unlink()
    real = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    native = TOOLS / f"onnxruntime-native-{onnxruntime.__version__}"
    if not native.is_dir():
        with made_whole(native) as draft:
            shutil.copyfile(
                classes / "ai/onnxruntime/native" / folder_of_machine / "libonnxruntime4j_jni.so", draft / "libonnxruntime4j_jni.so"
            )
            (draft / "relay.c").write_text(RELAY, encoding="utf-8")
            symbols = "OrtGetApiBase; OrtSessionOptionsAppendExecutionProvider_CPU;"
            (draft / "relay.map").write_text(f"VERS_{JAVA_VERSION} {{ global: {symbols} }};\n", encoding="utf-8")
            command = ["cc", "-shared", "-fPIC", f'-DREAL="{real}"', f"-Wl,--version-script={draft / 'relay.map'}"]
            command += [
                f"-Wl,-soname,libonnxruntime.so.{JAVA_VERSION}",
                "-o",
                str(draft / "libonnxruntime.so"),
                str(draft / "relay.c"),
                "-ldl",
            ]
            run(command, "cc")
    return classes, native


def take_onnxruntime(wheel: Path, target: Path) -> None:
    """Classes and JNI libraries of ONNX Runtime out of the jar in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        inner = next(name for name in outer.namelist() if name.endswith("fatjar.jar"))
        jar = Path(outer.extract(inner, target))
    with zipfile.ZipFile(jar) as archive:
        for name in archive.namelist():
            if name.startswith("ai/onnxruntime/") and name.endswith((".class", "4j_jni.so")):
                archive.extract(name, target)
    shutil.rmtree(target / inner.split("/")[0])


def require(program: str) -> None:
    if shutil.which(program) is None:
        raise Unavailable(f"{program} is not on this machine")


def fetch(command: list[str], what: str) -> None:
    """Run a package client. Unavailable with its last line where it gives nothing."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        complaint = ([line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no word"])[-1]
        raise Unavailable(f"{what} cannot be had ({complaint.strip()[:200]})")


def run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, f"{what}:\n{(done.stdout + done.stderr)[-6000:]}"


def checked(path: Path, sha256: str) -> Path:
    found = sha256_of(path)
    assert found == sha256, f"{path.name} has the SHA-256 {found}, not {sha256}: another file than the one that was looked at"
    return path


def files_of(sources: Iterable[Path]) -> list[Path]:
    return sorted(path for source in sources for path in source.rglob("*") if path.suffix in (".kt", ".java"))


def joined(paths: Iterable[Path]) -> str:
    return ":".join(map(str, paths))
