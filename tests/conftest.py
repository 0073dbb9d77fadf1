"""Fixtures that several test files use."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from tests.processes import REPOSITORY
from tutorial_lib.offline.sample import write_sample


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other: the small models here then take 20 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def penn_fudan_root() -> Path:
    """The folder of the real photographs; tests that need them are skipped, and say so, where there are none."""
    if named := os.environ.get("PENN_FUDAN_ROOT"):
        assert (Path(named) / "PNGImages").is_dir(), f"PENN_FUDAN_ROOT={named} holds no folder PNGImages"
        return Path(named)
    data = [REPOSITORY.parent / "shared", REPOSITORY / "data"]
    for folder in (parent / "PennFudanPed" for parent in data):
        if (folder / "PNGImages").is_dir():
            return folder
    pytest.skip(
        "NOT TESTED ON THE REAL PHOTOGRAPHS: set PENN_FUDAN_ROOT to the folder PennFudanPed, "
        "or put that folder into data/ (tutorial_lib.penn_fudan.download_penn_fudan('data') does)"
    )


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve synthetic images in PennFudan's layout. Read only: it is shared by all tests."""
    return write_sample(tmp_path_factory.mktemp("sample"), num_images=12)


@dataclass
class LocalServer:
    """What a path answers is put into ``pages`` as (status, headers, body); ``requests`` lists the paths got."""

    address: str
    pages: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)  # a page with a header Stall has been sent
    go_on: threading.Event = field(default_factory=threading.Event)  # lets its connection end

    def serve(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        """Answer `path` with `body`; returns its full address. A header's `_` stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.pages[path] = (status, {"Content-Length": str(len(body)), **named}, body)
        return self.address + path


@pytest.fixture
def local_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """An HTTP server of this machine, reached without a proxy."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("NO_PROXY", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> tuple[dict[str, str], bytes]:
            status, headers, body = local.pages.get(self.path, (404, {}, b"there is no such page"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            return headers, body

        def do_GET(self) -> None:
            local.requests.append(self.path)
            headers, body = self.do_HEAD()
            self.wfile.write(body)
            if "Stall" in headers:
                self.wfile.flush()
                local.stalled.set()
                local.go_on.wait(20)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        local = LocalServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield local
        local.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def refused_address(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of this machine where nobody listens."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every connection fails; the list holds the addresses that were tried."""
    tried: list[object] = []

    def refuse(address: object, *args: object, **kwargs: object) -> None:
        tried.append(address)
        raise OSError(f"no network in this test: {address}")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried
