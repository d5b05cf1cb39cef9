"""Servers of buckets on this machine, for tests: Amazon's protocol (moto) and Google's (gcp-storage-emulator), and what can go
wrong on the way to them."""

import contextlib
import http.client
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a server with the bucket "texts"."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/texts")
    assert connection.getresponse().status == 200
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def gcs_server() -> Iterator[str]:
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="texts")
    server.start()
    try:
        yield f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    finally:
        server.stop()


@contextlib.contextmanager
def buckets() -> Iterator[None]:
    """Within, s3://texts and gs://texts are there, empty, and nothing else is."""
    with s3_server() as s3, gcs_server() as gcs, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", s3)
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", gcs)
        yield


@contextlib.contextmanager
def troubled(server: str) -> Iterator[tuple[str, list[str]]]:
    """(the URL of a server in front of `server`, the paths it was asked for). It is too busy the first two times it is asked
    for any object of tokens, refuses everything with "private" in its path, and once "down" is among the paths is down."""
    asked: list[str] = []

    class Front(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append(self.path)
            if "down" in asked:
                return self.answer(503, b"")
            if "private" in self.path:
                return self.answer(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
            if "/tokens/" in self.path and asked.count(self.path) <= 2:
                return self.answer(503, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")
            connection = http.client.HTTPConnection(server.removeprefix("http://"))
            connection.request("GET", self.path, headers=dict(self.headers))
            reply = connection.getresponse()
            self.answer(reply.status, reply.read(), dict(reply.getheaders()))

        def answer(self, status, body, headers=()):
            self.send_response(status)
            dropped = ("content-length", "connection", "transfer-encoding", "date", "server")
            for name, value in dict(headers).items():
                if name.lower() not in dropped:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Front) as front:
        threading.Thread(target=front.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{front.server_address[1]}", asked
        front.shutdown()
