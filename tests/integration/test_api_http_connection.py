"""The HTTP/1.1 connection against raw sockets: framing, patience, refusals, bad peers."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from api_server import DEADLINE_S, Running, read_all, read_answer, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.http_listener import Patience
from protocol.limits import HEADER_BYTES_MAX

IMPATIENT = Patience(
    header_s=0.3, keep_alive_s=0.6, transfer_grace_s=0.4, transfer_rate_min=1000, linger_s=0.5
)


class Echo:
    """Answers with what it received: method, path, length and digest of the body."""

    def __init__(self) -> None:
        self.disconnects = 0
        self.completed = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        path = scope["path"]
        if path == "/early":
            await self._answer(send, 413, b"too much")
            return
        if path == "/big":
            await self._answer(send, 200, bytes(16 << 20))
            return
        if path == "/raise":
            raise RuntimeError("a mistake")
        parts = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return
            parts.append(bytes(message["body"]))
            more = message["more_body"]
        body = b"".join(parts)
        self.completed += 1
        seen = {
            "method": scope["method"],
            "path": path,
            "query": scope["query_string"].decode("latin-1"),
            "length": len(body),
            "digest": hashlib.sha256(body).hexdigest(),
            "headers": len(scope["headers"]),
            "pieces": len(parts),
        }
        await self._answer(send, 200, orjson.dumps(seen))

    async def _answer(self, send: Any, status: int, body: bytes) -> None:
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo()


@pytest.fixture(scope="module")
def server(echo: Echo) -> Iterator[Running]:
    with serving(lambda: echo) as running:
        yield running


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    with serving(Echo, IMPATIENT) as running:
        yield running


def _until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _kind(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split(b" ")[1]), orjson.loads(body)["error"]["kind"]


SIZES = [0, 1, 1000, 32 * 1024, 64 * 1024 + 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 4 << 20]


@pytest.mark.parametrize("size", SIZES)
def test_body_of_known_length_arrives_exactly_and_the_connection_goes_on(
    server: Running, size: int
) -> None:
    body = os.urandom(size)
    with server.connect() as peer:
        for _ in range(3):
            peer.sendall(b"PUT /x?a=b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
            peer.sendall(body)
            status, _, answer = read_answer(peer)
            seen = orjson.loads(answer)
            assert status == 200
            assert (seen["length"], seen["digest"]) == (size, hashlib.sha256(body).hexdigest())
            assert (seen["method"], seen["path"], seen["query"]) == ("PUT", "/x", "a=b")


@pytest.mark.parametrize("cut", [1, 17, 5000, 70_000])
def test_body_cut_into_pieces_arrives_exactly(server: Running, cut: int) -> None:
    body = os.urandom(200_000 if cut > 20 else 500)
    request = b"PUT /x HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with server.connect() as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(request), cut):
            peer.sendall(request[start : start + cut])
        assert orjson.loads(read_answer(peer)[2])["digest"] == hashlib.sha256(body).hexdigest()


def test_large_body_arrives_in_few_pieces(server: Running) -> None:
    with server.connect() as peer:
        peer.sendall(b"PUT /x HTTP/1.1\r\nContent-Length: 4194304\r\n\r\n" + bytes(4 << 20))
        assert orjson.loads(read_answer(peer)[2])["pieces"] <= 8


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=5000), max_size=20),
    split=st.integers(min_value=1, max_value=3000),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_chunked_body_arrives_exactly(server: Running, chunks: list[bytes], split: int) -> None:
    request = b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    request += b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    with server.connect() as peer:
        for start in range(0, len(request), split):
            peer.sendall(request[start : start + split])
        seen = orjson.loads(read_answer(peer)[2])
    assert seen["digest"] == hashlib.sha256(b"".join(chunks)).hexdigest()


def test_large_chunked_body_arrives_exactly(server: Running) -> None:
    body = os.urandom(3 << 20)
    with server.connect() as peer:
        peer.sendall(b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(body), 100_000):
            piece = body[start : start + 100_000]
            peer.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        peer.sendall(b"0\r\n\r\n")
        assert orjson.loads(read_answer(peer)[2])["digest"] == hashlib.sha256(body).hexdigest()


def test_trailers_of_a_chunked_body_do_not_become_headers(server: Running) -> None:
    request = (
        b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1\r\na\r\n0\r\nAuthorization: Bearer stolen\r\n\r\n"
    )
    with server.connect() as peer:
        peer.sendall(request)
        assert orjson.loads(read_answer(peer)[2])["headers"] == 1


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    requests = b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % i for i in range(200))
    last = b"GET /last HTTP/1.1\r\nConnection: close\r\n\r\n"
    answer = server.exchange(requests + last)
    paths = [part.split(b'"')[0] for part in answer.split(b'"path":"')[1:]]
    assert paths == [b"/%d" % i for i in range(200)] + [b"/last"]


def test_pipelined_request_behind_a_large_body_is_answered(server: Running) -> None:
    body = os.urandom(2 << 20)
    request = b"PUT /a HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    answer = server.exchange(request + b"GET /b HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.index(b'"/a"') < answer.index(b'"/b"')
    assert hashlib.sha256(body).hexdigest().encode() in answer


def test_expect_continue_is_answered_before_the_body_is_sent(server: Running) -> None:
    with server.connect() as peer:
        peer.sendall(b"PUT /x HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert peer.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        peer.sendall(b"abc")
        assert read_answer(peer)[0] == 200


def test_expect_continue_is_not_answered_for_a_refused_body(server: Running) -> None:
    with server.connect() as peer:
        peer.sendall(b"PUT /early HTTP/1.1\r\nContent-Length: 3000\r\nExpect: 100-continue\r\n\r\n")
        status, headers, _ = read_answer(peer)
        assert (status, headers["connection"]) == (413, "close")


def test_refusal_before_the_body_reaches_a_peer_that_sends_all_of_it_first(
    server: Running,
) -> None:
    size = 24 << 20
    with server.connect() as peer:
        peer.sendall(b"PUT /early HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size)
        peer.sendall(bytes(size))
        status, headers, body = read_answer(peer)
        assert (status, headers["connection"], body) == (413, "close", b"too much")
        assert peer.recv(1) == b""


def test_endless_body_after_a_refusal_is_not_read_for_ever(impatient: Running) -> None:
    with impatient.connect() as peer:
        peer.sendall(b"PUT /early HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n")
        assert read_answer(peer)[0] == 413
        _until(lambda: not _send_quietly(peer, bytes(1 << 16)))


def test_head_has_the_length_and_no_body(server: Running) -> None:
    answer = server.exchange(b"HEAD /big HTTP/1.1\r\nConnection: close\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-length: 16777216" in head
    assert body == b""


def test_answer_has_a_date_and_no_server_name(server: Running) -> None:
    with server.connect() as peer:
        peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        headers = read_answer(peer)[1]
    assert headers["date"].endswith("gmt")
    assert "server" not in headers


def test_http_1_0_is_answered_and_closed(server: Running) -> None:
    assert server.exchange(b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 OK")


def test_peer_that_closed_its_own_direction_still_gets_its_answer(server: Running) -> None:
    with server.connect() as peer:
        peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        peer.shutdown(socket.SHUT_WR)
        assert read_all(peer).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("sent", [0, 10, 100_000, 3 << 20])
def test_body_shorter_than_its_length_never_completes(
    server: Running, echo: Echo, sent: int
) -> None:
    disconnects, completed = echo.disconnects, echo.completed
    with server.connect() as peer:
        peer.sendall(b"PUT /x HTTP/1.1\r\nContent-Length: 4194304\r\n\r\n" + bytes(sent))
        peer.shutdown(socket.SHUT_WR)
        assert read_all(peer) == b""
    _until(lambda: echo.disconnects == disconnects + 1)
    assert echo.completed == completed


MALFORMED = {
    "noise": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 30,
    "no method": b"/ HTTP/1.1\r\n\r\n",
    "unknown method": b"BREW / HTTP/1.1\r\n\r\n",
    "lower-case method": b"get / HTTP/1.1\r\n\r\n",
    "other protocol": b"GET / SMTP/1.1\r\n\r\n",
    "http 2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http 0.9": b"GET /\r\n\r\n",
    "http 3.1": b"GET / HTTP/3.1\r\n\r\n",
    "space before colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "header without name": b"GET / HTTP/1.1\r\n: a\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
    "bare CR in a header": b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n",
    "obsolete folding": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "two lengths": b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "the same length twice": b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
    "list of lengths": b"PUT / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\na",
    "negative length": b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "signed length": b"PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
    "hex length": b"PUT / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\na",
    "huge length": b"PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "length and chunked": (
        b"PUT / HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "chunked and length": (
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"
    ),
    "unknown coding": b"PUT / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked not last": b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "bad chunk length": b"PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "chunk longer than said": b"PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
    "huge chunk length": (
        b"PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n"
    ),
    "upgrade with a body": (
        b"PUT /x HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 30\r\n\r\n"
        b"GET /smuggled HTTP/1.1\r\n\r\n    "
    ),
    "target without slash": b"GET x HTTP/1.1\r\n\r\n",
    "target that is no text": b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_refused_and_the_connection_closed(
    server: Running, echo: Echo, name: str
) -> None:
    completed = echo.completed
    answer = server.exchange(MALFORMED[name] + b"GET /smuggled HTTP/1.1\r\n\r\n")
    assert _kind(answer) == (400, "malformed_http")
    assert echo.completed == completed


def test_request_to_upgrade_is_answered_as_a_plain_one_and_closed(server: Running) -> None:
    request = b"GET /x HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    answer = server.exchange(request + b"GET /smuggled HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"smuggled" not in answer


def test_malformed_request_behind_a_good_one_does_not_spoil_its_answer(server: Running) -> None:
    answer = server.exchange(b"GET /a HTTP/1.1\r\n\r\n\x00\x01\x02")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.count(b"HTTP/1.1") == 1


def test_header_over_the_limit_is_refused(server: Running) -> None:
    for request in (
        b"GET /" + b"a" * HEADER_BYTES_MAX + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * HEADER_BYTES_MAX + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (HEADER_BYTES_MAX // 2) + b"\r\n",
    ):
        assert _kind(server.exchange(request)) == (431, "header_too_large")


def test_header_that_never_ends_is_refused_while_it_grows(server: Running) -> None:
    with server.connect() as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nA: ")
        for _ in range(HEADER_BYTES_MAX // 1024 + 1):
            peer.sendall(b"a" * 1024)
        assert _kind(read_all(peer)) == (431, "header_too_large")


def test_header_that_does_not_come_in_time_is_given_up(impatient: Running) -> None:
    assert _kind(impatient.exchange(b"GET / HTTP/1.1\r\nA: b\r\n")) == (408, "request_timeout")


def test_header_that_comes_byte_by_byte_is_given_up(impatient: Running) -> None:
    with impatient.connect() as peer:
        peer.sendall(b"GET /")
        _until(lambda: not _send_quietly(peer, b"a") or _has_answer(peer))
        assert _kind(read_all(peer)) == (408, "request_timeout")


def _has_answer(peer: socket.socket) -> bool:
    readable, _, _ = select.select([peer], [], [], 0.02)
    return bool(readable)


def test_idle_connection_is_closed_and_one_in_use_is_not(impatient: Running) -> None:
    with impatient.connect() as used, impatient.connect() as idle:
        start = time.monotonic()
        while time.monotonic() - start < 1.2:
            used.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert read_answer(used)[0] == 200
            time.sleep(0.05)
        assert idle.recv(1) == b""


def test_body_that_stalls_is_given_up(impatient: Running) -> None:
    request = b"PUT /x HTTP/1.1\r\nContent-Length: 4194304\r\n\r\n" + bytes(1 << 20)
    assert _kind(impatient.exchange(request)) == (408, "request_timeout")


def test_body_that_trickles_is_given_up_and_a_steady_one_is_not(impatient: Running) -> None:
    with impatient.connect() as slow, impatient.connect() as steady:
        size = 40_000
        for peer in (slow, steady):
            peer.sendall(b"PUT /x HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(20):
            steady.sendall(bytes(size // 20))
            _send_quietly(slow, b"a")
            time.sleep(0.05)
        assert read_answer(steady)[0] == 200
        assert b"408" in read_all(slow)[:12]


def _send_quietly(peer: socket.socket, data: bytes) -> bool:
    try:
        peer.sendall(data)
    except OSError:
        return False
    return True


def test_peer_that_does_not_take_its_answer_is_dropped(impatient: Running) -> None:
    with impatient.connect() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.sendall(b"GET /big HTTP/1.1\r\n\r\n")
        state = impatient.server.server_state
        _until(lambda: any(c._room is not None for c in list(state.connections)))
        _until(lambda: all(c._room is None for c in list(state.connections)))


def test_connection_over_the_limit_is_closed_and_others_go_on() -> None:
    patience = Patience(connections_max=2)
    with serving(Echo, patience) as server, server.connect() as first, server.connect() as second:
        for peer in (first, second):
            peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert read_answer(peer)[0] == 200
        with server.connect() as third:
            _until(lambda: not _send_quietly(third, b"GET / HTTP/1.1\r\n\r\n"))
        first.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert read_answer(first)[0] == 200


@pytest.mark.filterwarnings("default")
def test_mistake_of_the_application_drops_only_its_connection(server: Running) -> None:
    assert server.exchange(b"GET /raise HTTP/1.1\r\n\r\n") == b""
    assert server.exchange(b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_stopping_server_finishes_the_request_it_works_on() -> None:
    with serving(Echo) as running, running.connect() as busy, running.connect() as idle:
        busy.sendall(b"PUT /x HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + bytes(100_000))
        idle.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert read_answer(idle)[0] == 200
        running.server.should_exit = True
        assert idle.recv(1) == b""
        busy.sendall(bytes(100_000))
        status, headers, _ = read_answer(busy)
        assert (status, headers["connection"]) == (200, "close")


@given(st.binary(min_size=1, max_size=400))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_garbage_is_answered_by_a_refusal_or_by_nothing(server: Running, garbage: bytes) -> None:
    with server.connect() as peer:
        peer.sendall(garbage)
        peer.shutdown(socket.SHUT_WR)
        answer = read_all(peer)
    assert answer == b"" or _kind(answer)[0] in (400, 431)
