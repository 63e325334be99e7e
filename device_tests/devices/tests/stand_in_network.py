"""What lies between a board and the rest: a cable that can be cut, and a package index."""

import shutil
import socket
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Wire:
    """A cable between client and board. ``up`` counts the bytes to the board; ``at`` calls something once so many have passed.

    What fails in such a call breaks the cable at once and is raised again by ``close``.
    """

    def __init__(self, port: int) -> None:
        self._board, self.up, self._at, self._hung = port, 0, [], threading.Event()
        self._ends: list[socket.socket] = []
        self._failed: list[BaseException] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def at(self, count: int, call) -> None:
        """Call ``call`` when ``count`` more bytes have gone to the board; nothing goes on until it returns."""
        self._at.append((self.up + count, call))

    def cut(self) -> None:
        """Both ends see the connection end."""
        for end in self._ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has ended by itself
                continue
        self._ends.clear()

    def hang(self) -> None:
        """From now on nothing gets through, and nobody is told."""
        self._hung.set()

    def close(self) -> None:
        self._listener.close()
        self.cut()
        for failure in self._failed:
            raise AssertionError("what was to happen in the middle of a transfer failed") from failure

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                board = socket.create_connection(("127.0.0.1", self._board))
            except OSError:  # closed, or the board is off
                return
            self._ends += [client, board]
            for source, target, up in ((client, board, True), (board, client, False)):
                threading.Thread(target=self._carry, args=(source, target, up), daemon=True).start()

    def _call(self, call) -> None:
        try:
            call()
        except BaseException as failure:  # pytest's own failures are no Exception
            self._failed.append(failure)
            self.cut()

    def _carry(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if self._hung.is_set():
                    continue
                target.sendall(data)
                if up:
                    self.up += len(data)
                    due = [entry for entry in self._at if entry[0] <= self.up]
                    self._at = [entry for entry in self._at if entry not in due]
                    for _, call in due:
                        self._call(call)
            if not self._hung.is_set():
                target.shutdown(socket.SHUT_WR)
        except OSError:  # cut
            return


@contextmanager
def package_index(folder: Path, wheels: list[Path]):
    """A package index on loopback with these files; its address."""
    for wheel in wheels:
        place = folder / "simple" / wheel.name.split("-")[0].replace("_", "-").replace(".", "-").lower()
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel, place / wheel.name)

    class Quiet(SimpleHTTPRequestHandler):
        asked: list[str] = []

        def __init__(self, *given) -> None:
            super().__init__(*given, directory=str(folder))

        def log_message(self, *words) -> None:
            self.asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/simple", Quiet.asked
    finally:
        server.shutdown()
