"""The demo: what stands in its columns, whom its server answers, and that a person can use it on a phone and on a desk."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import expect

from pipeline import demo_run
from pipeline.bundle import BundleInputs, build_bundle
from pipeline.bundle_files import BundleOptions
from pipeline.demo import DemoServer, Handler, demo_page
from pipeline.demo_columns import Column, columns
from pipeline.demo_run import Demo
from pipeline.fingerprint import ROOT
from pipeline.generate import generate
from pipeline.manifest import Manifest
from pipeline.report import build_report
from pipeline.runner import with_our_path
from pipeline.streaming import GenerateOptions
from pipeline.tests.fake_road import BEST, EVERYTHING, fake_outcome, fake_recipe, fake_road, fake_stages, with_toy
from pipeline.tests.pages import PHONE, SCREEN_NAMES, SCREENS, faults_of_layout, opened

PROMPT = "def f(x):"
# A worker whose model takes its time.
SLOW = """
import time
from pipeline import demo_worker, streaming
at_once = streaming.next_token
streaming.next_token = lambda *given: (time.sleep(0.1), at_once(*given))[1]
demo_worker.main()
"""
DIES = "import os, sys; sys.stdin.readline(); print('out of luck', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> dict[str, Path]:
    """Stage results with toys that run: ONNX, and TFLite where the int8 artifact is."""
    folders = with_toy(fake_road(tmp_path_factory.mktemp("demo") / "road"))
    made, sidecar = folders["tflite_int8"] / "tflite_static_int8.tflite", folders["tflite_int8"] / "tflite_static_int8.json"
    fake = json.loads(sidecar.read_text())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "device_tests.tests.toy_tflite", str(made)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    sidecar.write_text(json.dumps({**fake, **json.loads(sidecar.read_text()), "name": fake["name"]}))
    return folders


def built(road: dict[str, Path], out: Path, options: BundleOptions) -> Path:
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    return build_bundle(BundleInputs(fake_recipe(), road, report, "key", options), out).folder


@pytest.fixture(scope="module")
def bundle(road, tmp_path_factory) -> Path:
    return built(road, tmp_path_factory.mktemp("whole"), EVERYTHING)


@pytest.fixture(scope="module")
def small(road, tmp_path_factory) -> Path:
    """A bundle without fp32."""
    return built(road, tmp_path_factory.mktemp("small"), BundleOptions(variants=BEST))


def columns_of(bundle: Path, work: Path) -> tuple[Column, ...]:
    return columns(bundle, Manifest.model_validate_json((bundle / "manifest.json").read_text()), work)


@contextmanager
def served(bundle: Path, work: Path = Path("nowhere")) -> Iterator[DemoServer]:
    """The demo of a bundle, in this process but for the columns."""
    demo = Demo(columns_of(bundle, work), bundle / "tokenizer" / "tokenizer.json", 1)
    server = DemoServer(0, demo, demo_page("tiny", demo, 1))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        demo.close()


@pytest.fixture(scope="module")
def server(bundle) -> Iterator[DemoServer]:
    with served(bundle) as running:
        yield running


def ask(server: DemoServer, path: str = "/complete", body: dict | bytes | None = None, method: str = "POST", **headers: str):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    body = json.dumps({"prompt": PROMPT} if body is None else body).encode() if not isinstance(body, bytes) else body
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method, path, body if method == "POST" else None, sent)
    answer = connection.getresponse()
    try:
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def events_in(text: str) -> list[tuple[str, dict]]:
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("event: ")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def texts_in(events: list[tuple[str, dict]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for name, values in events:
        if name in ("text", "done"):
            found[values["column"]] = found.get(values["column"], "") + values["text"]
    return found


def test_columns_are_fp32_and_the_quantised_file_of_each_format(bundle):
    found = columns_of(bundle, Path("nowhere"))
    assert [(column.title, column.artifact, column.runtime) for column in found] == [
        ("fp32", "onnx_fp32", "onnxruntime"),
        ("ONNX int8", "onnx_static_int8", "onnxruntime"),
        ("TFLite int8", "tflite_static_int8", "litert"),
    ]
    assert not any(column.missing or column.note for column in found)


def test_fp32_that_is_not_in_the_bundle_comes_from_the_stages_by_its_hash(small, tmp_path):
    assert "--variants all" in columns_of(small, tmp_path)[0].missing and columns_of(small, tmp_path)[0].sidecar is None
    parent = json.loads((small / "onnx" / "onnx_static_int8.json").read_text())["parent"]
    for key, sha256 in (("aaa", "00" * 32), ("bbb", parent)):
        folder = tmp_path / "onnx" / key
        folder.mkdir(parents=True)
        (folder / "onnx_fp32.json").write_text(json.dumps({"sha256": sha256, "bytes": 5}))
    found = columns_of(small, tmp_path)[0]
    assert found.sidecar == tmp_path / "onnx" / "bbb" / "onnx_fp32.json" and found.note == f"not in the bundle; from {tmp_path}"


def test_a_runtime_that_is_not_installed_is_named_in_its_column(bundle, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("ai_edge_litert", "tflite_runtime") else name)
    found = columns_of(bundle, Path("nowhere"))
    assert (
        found[2].missing == "tflite_static_int8 needs ai-edge-litert or tflite-runtime, which is not installed here." and found[0].sidecar
    )


@pytest.mark.parametrize("in_turn", [False, True], ids=["at once", "in turn"])
def test_every_column_writes_what_generate_writes(server, bundle, in_turn):
    status, headers, body = ask(server, body={"prompt": PROMPT, "max_tokens": 12, "in_turn": in_turn})
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    events, expected = events_in(body), {}
    for place, (runtime, artifact) in enumerate((("onnx", "onnx_fp32"), ("onnx", "onnx_static_int8"), ("litert", "tflite_static_int8"))):
        expected[place] = generate(bundle, runtime, PROMPT, GenerateOptions(max_tokens=12, artifact=artifact), open(os.devnull, "w")).text
    assert texts_in(events) == expected and events[-1] == ("end", {})
    done = {values["column"]: values for name, values in events if name == "done"}
    assert all(values["peak_rss_mb"] > 10 and values["first_token_ms"] > 0 for values in done.values()) and len(done) == 3
    began = [values["column"] for name, values in events if name == "begun"]
    assert began == [0, 1, 2]
    if in_turn:
        order = [name for name, _ in events if name in ("begun", "done")]
        assert order == ["begun", "done"] * 3


def test_stop_texts_and_draws_reach_the_runtimes(server):
    def text(**options) -> str:
        return texts_in(events_in(ask(server, body={"prompt": PROMPT, "max_tokens": 20, **options})[2]))[0]

    drawn = {"temperature": 3.0, "seed": 5}
    whole = text(**drawn)
    assert whole == text(**drawn) != text() and text(**drawn, top_k=1) == text()
    assert text(**drawn, stop=[whole[2:4]]) == whole[: whole.index(whole[2:4])]


def test_only_the_loopback_address_is_listened_on(server):
    port = f"{server.server_port:04X}"
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    assert [address for address in listening if address.endswith(f":{port}")] == [f"0100007F:{port}"]  # 127.0.0.1, little endian
    other = Path("/proc/net/tcp6")
    assert not other.exists() or f":{port} " not in other.read_text()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421), ({"Host": "evil.example:{port}"}, 421), ({"Host": "127.0.0.1"}, 421),
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "http://127.0.0.1:1"}, 403), ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403), ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Content_Type": "text/plain"}, 415), ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
    ],
)  # fmt: skip
def test_other_hosts_and_other_origins_are_refused(server, headers, status):
    told = {name: value.format(port=server.server_port) for name, value in headers.items()}
    for path in ("/complete", "/stop"):
        assert ask(server, path, **told)[0] == status
    if status != 415:
        found = ask(server, "/", method="GET", **told)
        assert found[0] == status and "<html" not in found[2]


def test_its_own_page_is_answered(server):
    for host in (f"127.0.0.1:{server.server_port}", f"localhost:{server.server_port}"):
        status, headers, body = ask(server, "/", method="GET", Host=host, Sec_Fetch_Site="none")
        assert status == 200 and "<html" in body and "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert ask(server, "/stop", body={}, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 204
    assert ask(server, "/etc/passwd", method="GET")[0] == 404 and ask(server, "/page")[0] == 404


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "a", "max_tokens": 0}, 400, "--max-tokens 0: give 1 or more"), ({"prompt": 7}, 400, "prompt: "), ({}, 400, "prompt: "),
        ({"prompt": "a", "threads": 99}, 400, "threads: "), (b"no json", 400, "JSON"),
    ],
    ids=["senseless", "wrong type", "nothing", "unknown", "no JSON"],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(server, body, status, words):
    found = ask(server, body=body)
    assert found[0] == status and words in found[2] and found[2].count("\n") == 1


@pytest.mark.parametrize(("length", "status"), [(str((1 << 20) + 1), 413), ("-1", 415), ("\u0661".encode().decode("latin-1"), 415)])
def test_a_body_of_a_length_that_cannot_be_is_not_read(server, length, status):
    assert ask(server, body=b"x", Content_Length=length)[0] == status


def test_a_connection_that_says_nothing_is_closed(server, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.2)
    for words in (b"", b"POST /stop HTTP/1.0\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
            connection.sendall(words.replace(b"%s", server.url.split("/")[2].encode()))
            assert connection.recv(100) == b""
    assert ask(server, body={"prompt": PROMPT, "max_tokens": 1})[0] == 200


def test_a_prompt_that_does_not_fit_is_told_in_its_column(server):
    events = events_in(ask(server, body={"prompt": "a" * 500})[2])
    assert [values["message"] for name, values in events if name == "failed"] == [
        "the prompt has 500 tokens but the context holds 40; give a shorter --prompt"
    ] * 3


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


def test_one_completion_at_a_time_and_a_page_that_goes_away_stops_it(bundle, monkeypatch):
    monkeypatch.setattr(demo_run, "WORKER", ("-c", SLOW))
    with served(bundle) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request("POST", "/complete", json.dumps({"prompt": PROMPT, "temperature": 3.0}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"event: begun")
        status, _, body = ask(server)
        assert status == 409 and "another page" in body
        answer.close()
        connection.close()
        wait_for(lambda: ask(server, body={"prompt": PROMPT, "max_tokens": 1})[0] == 200)


def test_a_process_that_dies_is_told_and_the_others_go_on(bundle, monkeypatch):
    with served(bundle) as server:
        monkeypatch.setattr(demo_run, "WORKER", ("-c", DIES))
        server.demo._workers[1].start()
        monkeypatch.undo()
        events = events_in(ask(server, body={"prompt": PROMPT, "max_tokens": 4})[2])
        assert [values for name, values in events if name == "broken"] == [
            {"column": 1, "message": "its process ended with signal SIGKILL: out of luck"}
        ]
        assert sorted(values["column"] for name, values in events if name == "done") == [0, 2]
        again = events_in(ask(server, body={"prompt": PROMPT, "max_tokens": 4})[2])
        assert sorted(values["column"] for name, values in again if name == "done") == [0, 1, 2], "it is started again"


def test_a_file_that_was_changed_is_told_in_its_column(bundle, tmp_path):
    found = columns_of(bundle, tmp_path)
    sidecar = tmp_path / found[0].sidecar.name
    sidecar.write_text(found[0].sidecar.read_text())
    model = tmp_path / json.loads(sidecar.read_text())["file"]
    model.write_bytes((found[0].sidecar.parent / model.name).read_bytes()[:-1] + b"x")
    demo = Demo((replace(found[0], sidecar=sidecar),), bundle / "tokenizer" / "tokenizer.json", 1)
    with demo.completion("a", GenerateOptions(), False) as events:
        found = list(events)
    demo.close()
    assert found[-1][0] == "broken" and "differs from its JSON" in found[-1][1]["message"]


@pytest.fixture
def command(bundle) -> Iterator[subprocess.Popen]:
    code = "from pipeline.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "demo", str(bundle), "--port", "0", "--json"], env=with_our_path(dict(os.environ)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_tells_its_address_and_ends_with_all_its_processes(command, bundle, how):
    port = int(json.loads(command.stdout.readline())["url"].rstrip("/").rsplit(":", 1)[1])
    wait_for(lambda: len(children_of(command.pid)) == 3)
    mine = children_of(command.pid)
    taken = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli import main; main()", "demo", str(bundle), "--port", str(port)],
        env=with_our_path(dict(os.environ)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert taken.returncode == 2 and f"port {port} cannot be had" in taken.stderr
    command.send_signal(how)
    _, told = command.communicate(timeout=60)
    assert command.returncode == 0 and "Traceback" not in told, told
    wait_for(lambda: not [child for child in mine if Path(f"/proc/{child}").exists()])


def children_of(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.parametrize(("screen", "scheme"), SCREENS, ids=SCREEN_NAMES)
def test_a_person_types_and_sees_three_texts_with_their_speed(browser, server, screen, scheme):
    expected = texts_in(events_in(ask(server, body={"prompt": "abc", "max_tokens": 20})[2]))
    with opened(browser, server.url, screen, scheme) as (page, faults):
        assert faults_of_layout(page) == []
        page.fill("#prompt", "abc")
        page.click("summary")
        page.fill("[name=max_tokens]", "20")
        page.click("#run")
        expect(page.locator("[data-state=done]")).to_have_count(3, timeout=30_000)
        assert dict(enumerate(page.locator(".made").all_text_contents())) == expected
        assert page.locator(".given").all_text_contents() == ["abc"] * 3
        for rate in page.locator(".tokens-per-s").all_text_contents():
            assert int(rate.replace(",", "")) > 0
        for state in page.locator(".state").all_text_contents():
            assert " tokens, first after " in state and " MB at most, " in state
        expect(page.locator("#run")).to_be_enabled()
        expect(page.locator("#stop")).to_be_disabled()
        assert faults_of_layout(page) == [] and faults == []
        lefts = [box["x"] for box in (column.bounding_box() for column in page.locator(".column").all())]
        assert (len(set(lefts)) == 1) == (screen is PHONE), "one below the other on a phone, beside each other on a desk"


def test_a_person_stops_it(browser, bundle, monkeypatch):
    monkeypatch.setattr(demo_run, "WORKER", ("-c", SLOW))
    with served(bundle) as server, opened(browser, server.url, PHONE, "light") as (page, faults):
        page.fill("#prompt", "abc")
        page.evaluate("document.querySelector('[name=in_turn]').checked = false")
        page.click("summary")
        page.fill("[name=temperature]", "3")
        page.keyboard.press("Control+Enter")  # not in the prompt: nothing happens
        assert page.locator("#stop").is_disabled()
        page.focus("#prompt")
        page.keyboard.press("Control+Enter")
        for column in range(3):
            expect(page.locator(".made").nth(column)).to_have_text(re.compile(".", re.DOTALL), timeout=30_000)
        page.click("#stop")
        expect(page.locator("[data-state=done]")).to_have_count(3, timeout=30_000)
        states = page.locator(".state").all_text_contents()
        assert all(state.endswith("interrupted") for state in states), states
        assert faults == []


def test_missing_fp32_and_faults_are_told_on_the_page(browser, small, tmp_path):
    with served(small, tmp_path) as server, opened(browser, server.url, PHONE, "dark") as (page, faults):
        assert "--variants all" in page.locator(".missing").inner_text() and faults_of_layout(page) == []
        page.click("summary")
        page.fill("[name=stop]", "x")
        page.evaluate("document.querySelector('[name=top_p]').value = '0'")
        page.click("#run")
        page.wait_for_selector("#fault:has-text('--top-p 0.0: give more than 0')")
        assert [fault for fault in faults if "400" not in fault] == []  # the browser itself tells of the status


def test_a_text_is_shown_as_text(browser, server):
    """What looks like markup in a prompt stays what it is."""
    with opened(browser, server.url, PHONE, "light") as (page, faults):
        page.fill("#prompt", "<img src=x onerror=alert(1)>")
        page.click("#run")
        expect(page.locator("[data-state=done], [data-state=failed]")).to_have_count(3, timeout=30_000)
        assert page.locator(".given").all_text_contents() == ["<img src=x onerror=alert(1)>"] * 3 and page.locator("img").count() == 0
        assert faults == []
