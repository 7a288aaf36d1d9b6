"""Sockets: the routes served over HTTP, with faults, a log, and stopping as if killed."""

import re
import socket
import struct
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hub_server.faults import Fault, Faults
from hub_server.messages import Answer, Request
from hub_server.routes import Routes
from hub_server.store import Store


@dataclass(frozen=True)
class Logged:
    """A request that arrived: `status` is 0 if no answer was begun; `fault` names what was made to go wrong."""

    method: str
    target: str
    token: str | None
    status: int
    fault: str | None

    @property
    def line(self) -> str:
        return f"{self.method} {self.target}"


class HubServer:
    """The server, in a thread of this process.

    Args:
        store: the repositories; they outlive the server.
        port: a free one by default. It stays the same over `stop` and `start`.
        part_size: LFS objects larger than so many bytes go up in parts.
        page_size: entries of a page of a tree or a list of commits.
    """

    def __init__(self, store: Store, port: int = 0, part_size: int = 2**20, page_size: int = 50):
        self.store = store
        self.port = port
        self.routes = Routes(store, part_size, page_size)
        self.faults = Faults()
        self.log: list[Logged] = []
        self.stopping = threading.Event()
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "HubServer":
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """As if killed: the port closes, live connections are reset, answers under way are never sent."""
        self.stopping.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.reset_connections()
            self._server = None

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def requests(self, pattern: str = "") -> list[Logged]:
        """The requests so far whose `"METHOD /path?query"` matches a regular expression, in order of arrival."""
        return [entry for entry in list(self.log) if re.search(pattern, entry.line)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], hub: HubServer):
        self.hub = hub
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request, client_address) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self._connections.discard(request)
        if self.hub.stopping.is_set():
            request.close()  # no polite ending: see `reset_connections`
        else:
            super().shutdown_request(request)

    def reset_connections(self) -> None:
        for connection in list(self._connections):
            _reset_on_close(connection)

    def handle_error(self, request, client_address) -> None:
        pass  # clients that go away in the middle are what these tests are about


def _reset_on_close(connection: socket.socket) -> None:
    """Closing this connection will reset it; its thread wakes up if it was waiting for the client."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    except OSError:
        pass  # it is closed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_) -> None:
        pass

    def parse_request(self) -> bool:
        # Every method goes the same way.
        parsed = super().parse_request()
        setattr(self, f"do_{self.command}", self._handle)
        return parsed

    def _handle(self) -> None:
        hub = self.server.hub
        fault = hub.faults.strike(f"{self.command} {self.path}")
        if fault is not None and self._fails_at_once(fault):
            return
        request = Request(self.command, self.path, self.headers, self._body())
        answer = hub.routes.answer(request)
        if hub.stopping.is_set():
            return self._hang_up(answer.status)
        self._log(answer.status, fault)
        if fault is not None and fault.action == "lose_response":
            return self._hang_up()
        self._send(answer, cut=fault if fault and fault.action in ("reset_response", "truncate") else None)

    def _fails_at_once(self, fault: Fault) -> bool:
        if fault.action == "delay":
            if self.server.hub.stopping.wait(fault.delay):
                self._hang_up()
                return True
            return False
        if fault.action in ("status", "page"):
            self._body()
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            answer = Answer(fault.status, b'{"error": "made to fail"}', headers)
            if fault.action == "page":
                answer = Answer(200, b"<html>Please log in</html>", {"Content-Type": "text/html; charset=utf-8"})
            self._log(answer.status, fault)
            self._send(answer)
            return True
        if fault.action in ("drop", "reset_request"):
            self._log(0, fault)
            if fault.action == "reset_request":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                _reset_on_close(self.connection)
            self._hang_up()
            return True
        return False

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer, cut: Fault | None = None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else answer.body
        if cut is not None:
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if cut is not None:
            if cut.action == "reset_response":
                _reset_on_close(self.connection)
            self._hang_up()

    def _hang_up(self, status: int | None = None) -> None:
        if status is not None:
            self._log(status, None)
        self.close_connection = True

    def _log(self, status: int, fault: Fault | None) -> None:
        header = self.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        self.server.hub.log.append(Logged(self.command, self.path, token, status, fault.action if fault else None))
