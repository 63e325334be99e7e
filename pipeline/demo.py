"""The demo: a page on this machine where one types a prompt and sees what each runtime makes of it, word by word.

Only this machine reaches it, and no page of another site may use it: the server listens on the loopback address, answers only to
requests that name it as their host, and to none that another origin sent (DNS rebinding and cross-site request forgery).
"""

import base64
import hashlib
import json
import logging
import os
import re
import signal
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import UserError
from pipeline.demo_columns import columns
from pipeline.demo_run import Demo
from pipeline.rendering import environment
from pipeline.report_numbers import FORMATS
from pipeline.streaming import GenerateOptions, check_options
from pipeline.verify import bundle_folder

LOOPBACK = "127.0.0.1"
MAX_BODY_BYTES = 1 << 20
logger = logging.getLogger(__name__)


class Asked(BaseModel):
    """What the page sends."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str
    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = Field([], max_length=16)
    in_turn: bool = False

    @property
    def options(self) -> GenerateOptions:
        """As for a terminal."""
        given = self.model_dump(include={"max_tokens", "temperature", "top_k", "top_p", "seed"})
        return GenerateOptions(**given, stop=tuple(self.stop))


class Refused(Exception):
    """A request that is not answered: its status and a line of why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class DemoServer(ThreadingHTTPServer):
    """The server of one demo. ``hosts`` are the names that it answers to."""

    daemon_threads = True

    def __init__(self, port: int, demo: Demo, page: str) -> None:
        super().__init__((LOOPBACK, port), Handler)
        self.demo, self.page = demo, page.encode()
        self.policy = content_policy(page)
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: DemoServer
    timeout = 60  # seconds that a connection may say nothing, or take nothing

    def do_GET(self) -> None:
        """The page."""
        self.answered(self.send_page)

    def do_POST(self) -> None:
        """A completion as server-sent events, or the end of one."""
        self.answered({"/complete": self.complete, "/stop": self.stop}.get(self.path, self.no_such_place))

    def answered(self, answer: Callable[[], None]) -> None:
        """Answer, unless the request is refused."""
        try:
            self.check_sender()
            answer()
        except Refused as refused:
            self.send_body(refused.status, "text/plain; charset=utf-8", f"{refused}\n".encode())
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the page was closed, or sleeps

    def check_sender(self) -> None:
        """Refuse whoever means another host, or is another site's page."""
        host = self.headers.get("Host", "")
        if host not in self.server.hosts:
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, f"this is {self.server.url} and answers to no other name")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site")
        if origin not in (None, f"http://{host}") or site not in (None, "same-origin", "none"):
            raise Refused(HTTPStatus.FORBIDDEN, "only the demo's own page may ask")

    def no_such_place(self) -> None:
        raise Refused(HTTPStatus.NOT_FOUND, "no such place")

    def send_page(self) -> None:
        if self.path != "/":
            self.no_such_place()
        self.send_body(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def stop(self) -> None:
        self.read_body()
        self.server.demo.stop()
        self.send_body(HTTPStatus.NO_CONTENT, None, b"")

    def complete(self) -> None:
        """Send events until every column has ended; a page that goes away stops them."""
        try:
            asked = Asked.model_validate_json(self.read_body())
            options = asked.options
            check_options(options)
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(HTTPStatus.BAD_REQUEST, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except UserError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        with self.server.demo.completion(asked.prompt, options, asked.in_turn) as events:
            if events is None:
                raise Refused(HTTPStatus.CONFLICT, "another page is being answered; stop that one or wait")
            self.send_headers(HTTPStatus.OK, "text/event-stream; charset=utf-8")
            for name, values in events:
                self.send_event(name, values)
            self.send_event("end", {})

    def send_event(self, name: str, values: dict) -> None:
        """In the format of server-sent events (HTML standard, 9.2)."""
        self.wfile.write(b":\n\n" if name == "alive" else f"event: {name}\ndata: {json.dumps(values)}\n\n".encode())
        self.wfile.flush()

    def read_body(self) -> bytes:
        """The body, as JSON that a script of our own sent: another site's form cannot send that type."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not length.isascii() or not length.isdigit():
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "give application/json with its length")
        if int(length) > MAX_BODY_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY_BYTES} bytes")
        return self.rfile.read(int(length))

    def send_body(self, status: HTTPStatus, kind: str | None, body: bytes) -> None:
        self.send_headers(status, kind, len(body))
        self.wfile.write(body)

    def send_headers(self, status: HTTPStatus, kind: str | None, length: int | None = None) -> None:
        """Nothing of this may be kept, framed, guessed at, or load anything from elsewhere."""
        self.send_response(status)
        found = {
            "Content-Type": kind,
            "Content-Length": length,
            "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in found.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, format: str, *args) -> None:
        logger.debug(format, *args)


def serve(bundle: Path, port: int, threads: int, work: Path, ready: Callable[[str], None]) -> None:
    """Serve the demo of a bundle until Ctrl-C or SIGTERM; ``ready`` is given the address once it answers.

    ``port`` 0 takes a free one. Raises UserError where there is no bundle or the port is taken, GateError where the bundle is not as it
    was built.
    """
    with bundle_folder(bundle) as (folder, manifest):
        found = columns(folder, manifest, work)
        demo = Demo(found, folder / manifest.tokenizer.file, threads)
        try:
            server = DemoServer(port, demo, demo_page(manifest.name, demo, threads))
        except OSError as error:
            raise UserError(f"port {port} cannot be had ({error.strerror}); give another --port, 0 takes a free one") from error
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            demo.start()
            ready(server.url)
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            logger.info("the demo ends")
        finally:
            signal.signal(signal.SIGTERM, before)
            server.server_close()
            demo.close()


def demo_page(name: str, demo: Demo, threads: int) -> str:
    """The page: style, script and columns in one file."""
    cores = len(os.sched_getaffinity(0))
    wanted = threads * sum(column.missing is None for column in demo.columns)
    template = environment(autoescape=True).get_template("demo.html.j2")
    return template.render(
        name=name, columns=demo.columns, cores=cores, crowded=wanted > cores, threads=threads, megabytes=FORMATS["megabytes"]
    )


def content_policy(page: str) -> str:
    """The page's own style and script and its own server, by the digests of what they are (Content Security Policy level 3)."""
    sources = {kind: re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL) for kind in ("style", "script")}
    digests = {
        kind: " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)
        for kind, texts in sources.items()
    }
    return (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src {digests['style']}; script-src {digests['script']}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
