"""A proxy in front of an S3 server that injects faults by a seeded plan, and counts them.

It speaks HTTP/1.1 with one request per connection. It forwards requests unchanged except for `Connection` and `Expect`,
which are not part of signatures. `Host` stays as the client signed it, although the server has another address.
"""

import collections
import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ERROR_500, SLOW_DOWN = "error_500", "slow_down"
RESET_BEFORE, RESET_AFTER = (
    "reset_before",
    "reset_after",
)  # after: the server handled the request; only its response is lost
STALL, STALL_BODY, TRUNCATE = "stall", "stall_body", "truncate"
KINDS = (ERROR_500, SLOW_DOWN, RESET_BEFORE, RESET_AFTER, STALL, STALL_BODY, TRUNCATE)
IN_BODY = (STALL_BODY, TRUNCATE)  # need a response with a body, which only GET always has
SERVER_DOWN = "server_down"  # counted in addition to the kinds: the server itself did not respond
ERRORS = {
    ERROR_500: ("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
    SLOW_DOWN: ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
}


@dataclass(frozen=True)
class Request:
    """head ends with the empty line."""

    method: str
    path: str
    head: bytes
    body: bytes


Plan = Callable[[Request], str]  # the fault for a request, one of KINDS; "" for none


def no_faults(request: Request) -> str:
    return ""


def seeded(seed: int, rates: dict[str, float], limit: int = 10**9) -> Plan:
    """A plan in which each kind of fault hits requests at its rate, up to `limit` faults in total.

    The sequence of faults depends only on the seed. Which request gets which fault depends on the clients' timing.
    """
    unknown = set(rates) - set(KINDS)
    if unknown or sum(rates.values()) > 1:
        raise ValueError(
            f"rates are {rates}; their sum must be at most 1, and the kinds must be among {', '.join(KINDS)}"
        )
    rng, lock, left = random.Random(seed), threading.Lock(), limit

    def plan(request: Request) -> str:
        nonlocal left
        with lock:
            [kind] = rng.choices(["", *rates], [1 - sum(rates.values()), *rates.values()])
            if not kind or not left or (kind in IN_BODY and request.method != "GET"):
                return ""
            left -= 1
            return kind

    return plan


class Proxy:
    """Forwards to 127.0.0.1:`server_port`. `plan` may be replaced at any time. `injected` counts faults by kind."""

    def __init__(self, server_port: int):
        self.server_port = server_port
        self.plan: Plan = no_faults
        self.injected: collections.Counter[str] = collections.Counter()
        self.requests = 0
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        """Serves connections until `close`, each in its own thread."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def close(self) -> None:
        """Closes all connections, including stalled ones."""
        self._listener.shutdown(socket.SHUT_RDWR)  # `close` alone would not end `accept`
        self._listener.close()
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def _handle(self, client: socket.socket) -> None:
        with self._lock:
            self._clients.add(client)
        try:
            with contextlib.suppress(ConnectionError):  # clients may disconnect or be killed at any time
                request = _read_request(client)
                if request is not None:
                    self._serve(client, request)
        finally:
            with self._lock:
                self._clients.discard(client)
            client.close()

    def _serve(self, client: socket.socket, request: Request) -> None:
        with self._lock:
            self.requests += 1
        kind = self.plan(request)
        if kind in ERRORS:
            self._count(kind)
            client.sendall(_error(kind, request))
        elif kind == RESET_BEFORE:
            self._count(kind)
            _reset(client)
        elif kind == STALL:
            self._count(kind)
            _wait_until_gone(client)
        else:
            self._respond(client, kind, self._forward(request))

    def _respond(self, client: socket.socket, kind: str, response: bytes) -> None:
        body = response.partition(b"\r\n\r\n")[2]
        if kind == RESET_AFTER or not response:
            self._count(kind if response else SERVER_DOWN)
            _reset(client)
        elif kind in IN_BODY and body:
            self._count(kind)
            client.sendall(response[: -(len(body) + 1) // 2])
            if kind == STALL_BODY:
                _wait_until_gone(client)
        else:
            client.sendall(response)

    def _count(self, kind: str) -> None:
        with self._lock:
            self.injected[kind] += 1

    def _forward(self, request: Request) -> bytes:
        """The complete response of the server, until it closes the connection; b"" if there is none."""
        parts: list[bytes] = []
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", self.server_port)) as server,
        ):
            server.sendall(request.head + request.body)
            while part := server.recv(2**16):
                parts.append(part)
        return b"".join(parts)


@contextlib.contextmanager
def start_proxy(server_port: int) -> Iterator[Proxy]:
    proxy = Proxy(server_port)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()


def _read_request(client: socket.socket) -> Request | None:
    """None if the client closed the connection without a request."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = client.recv(2**16)
        if not part:
            return None
        received += part
    head, _, start = received.partition(b"\r\n\r\n")
    if re.search(rb"(?im)^transfer-encoding:", head):
        raise ValueError(f"this proxy does not support bodies without a Content-Length: {head!r}")
    if re.search(rb"(?im)^expect: *100-continue", head):
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    body = bytearray(start)
    while len(body) < (int(length[1]) if length else 0):
        part = client.recv(2**16)
        if not part:
            return None
        body += part
    method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
    kept = re.sub(rb"(?im)^(connection|expect):[^\r\n]*\r\n", b"", head + b"\r\n")
    return Request(method, path, kept + b"Connection: close\r\n\r\n", bytes(body))


def _error(kind: str, request: Request) -> bytes:
    status, code, message = ERRORS[kind]
    xml = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(xml)}\r\nConnection: close\r\n"
    return f"{head}\r\n{'' if request.method == 'HEAD' else xml}".encode()


def _reset(client: socket.socket) -> None:
    """Turns the next close into a TCP reset: data in flight is lost, and the client sees an error."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _wait_until_gone(client: socket.socket) -> None:
    while client.recv(2**16):
        pass
