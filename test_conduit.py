"""Tests of conduit.py, under the same chapter numbers and banners as the file itself.

Each chapter has three kinds of tests: examples from the specification, properties (hypothesis), and
conversations with a real server process over a real socket.  `make test` runs them; the very long
ones run with DEEP=1 only (`make test-deep`), and QUICK=1 leaves out what takes several seconds.

Every response that a `Client` gets is held against the OpenAPI data of the specification where its
checker is to be found (SPEC_TOOLS, or ../shared/tools beside the repository), and each server's log
must be free of tracebacks when it stops; both are asserted at the end of the session.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import http.server
import importlib
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import string
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Final, cast
from urllib.parse import quote, unquote

import httpx
import mautrix.appservice
import mautrix.client.state_store
import nacl.bindings
import nacl.public
import nacl.signing
import nio
import nio.crypto
import pytest
import trustme
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import conduit

# ═════════════════════════════════════════════════════════════════════════════
#  0. HARNESS
#
#  A real server in a folder of its own, a small synchronous client, and the
#  shared fixtures:  server (one process for the whole session), new_server
#  (a factory, any configuration), register(server) -> Client.
# ═════════════════════════════════════════════════════════════════════════════

Json = dict[str, Any]
ROOT: Final = Path(__file__).resolve().parent
SPEC_TOOLS: Final = Path(os.environ.get("SPEC_TOOLS") or ROOT.parent / "shared" / "tools")
PASSWORD: Final = "correct horse battery staple"
CLIENT: Final = "/_matrix/client/v3/"

deep = pytest.mark.skipif(not os.environ.get("DEEP"), reason="long: runs with DEEP=1")
slow = pytest.mark.skipif(bool(os.environ.get("QUICK")), reason="left out by QUICK=1")

settings.register_profile("conduit", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("conduit")

# ── 0.1  The schema check ────────────────────────────────────────────────────

VIOLATIONS: Final[Counter[str]] = (
    Counter()
)  # what responses of this process violated, and how often


def load_checker() -> Any:
    """The specification's checker (a module), or None where it is absent."""
    if not (SPEC_TOOLS / "spec_check.py").exists() or os.environ.get("NO_SPEC_CHECK"):
        return None
    sys.path.append(str(SPEC_TOOLS))
    return importlib.import_module("spec_check")


class SchemaCheck:
    """Collects violations of the specification; loads its data with the first response."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.checker: Any = None
        self.spec: Any = None
        self.seen: set[bytes] = set()  # shapes already checked: the same answer is not parsed twice

    def check(self, response: httpx.Response) -> None:
        """Hold one response against the specification."""
        with self.lock:
            if self.checker is None:
                self.checker = load_checker() or False
                self.spec = self.checker and self.checker.Spec()
            if self.checker and self._is_new(response):
                self._check(response)

    def _is_new(self, response: httpx.Response) -> bool:
        """Whether an answer of this shape (values of ids and numbers aside) was not seen before."""
        shape = re.sub(rb'"[!@$#][^"]*"|\d+', b"0", response.content)
        key = hashlib.blake2b(shape, digest_size=16)
        key.update(f"{response.request.method}{response.status_code}".encode())
        key.update(re.sub(rb"[!@$#%][^/?]*|\d+", b"0", response.request.url.raw_path))
        digest = key.digest()
        known = digest in self.seen
        self.seen.add(digest)
        return not known

    def _check(self, response: httpx.Response) -> None:
        request = response.request
        target = request.url.raw_path.decode("ascii")
        exchange = self.checker.Exchange(
            request.method,
            target,
            req_body=request.content,
            req_type=request.headers.get("content-type", ""),
            status=response.status_code,
            resp_headers=dict(response.headers),
            resp_body=response.content,
        )
        endpoint, findings = self.spec.check(exchange)
        if is_beyond_the_schema(response):
            return
        name = endpoint.key if endpoint else f"{request.method} {target}"
        for finding in findings:
            if finding.severity == "error" or finding.kind == "cors":
                where = self.checker.general(finding.pointer)
                VIOLATIONS[
                    f"{name} [{response.status_code}] {finding.kind} {where}: {finding.message}"
                    f" ({finding.sample})"
                ] += 1


def is_beyond_the_schema(response: httpx.Response) -> bool:
    """Answers that are right and that the specification's data does not describe.

    Ranges and conditional requests are HTTP's; a full disk is nobody's wish; filters may take
    members out of events, or ask for the format of the federation.
    """
    by_http = response.status_code in (206, 304, 507)
    return by_http or re.search("event_(?:fields|format)", str(response.request.url)) is not None


SCHEMA: Final = SchemaCheck()

# ── 0.2  Servers ─────────────────────────────────────────────────────────────


def free_port() -> int:
    """A TCP port on the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def toml_value(value: Any) -> str:
    """A scalar or a list as TOML writes it (JSON's spelling is right for all that we use)."""
    return json.dumps(value, ensure_ascii=False)


def to_toml(values: Mapping[str, Any], table: str = "global") -> str:
    """Keys of a table, then its nested tables ({...}) and arrays of tables ([{...}])."""
    lines = [f"[{table}]"]
    nested = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            nested.append(to_toml(value, f"{table}.{key}"))
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            inner = [to_toml(item, f"{table}.{key}") for item in value]
            nested += [text.replace(f"[{table}.{key}]", f"[[{table}.{key}]]", 1) for text in inner]
        elif value is not None:
            lines.append(f"{key} = {toml_value(value)}")
    return "\n".join([*lines, "", *nested])


class Server:
    """One conduit.py process with its own folder, port and configuration.

    Keyword arguments become keys of [global]; None leaves a key out.  The process is started as
    `python -m conduit` in the folder of conduit.py with CONDUIT_CONFIG set.
    """

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder = folder
        self.port = int(config.get("port") or free_port())
        self.name = str(config.get("server_name", "test.example"))
        self.config: Json = {
            "server_name": self.name,
            "database_path": str(folder / "data"),
            "database_backend": "sqlite",
            "address": "127.0.0.1",
            "port": self.port,
            "allow_registration": True,
            "allow_check_for_updates": False,
            "rate_limit": False,
            "enable_lightning_bolt": False,
            "trusted_servers": [],
            "log": "info",
            **config,
        }
        self.command = [sys.executable, "-m", "conduit"]
        self.environment: dict[str, str] = {}
        self.cwd = ROOT
        self.process: subprocess.Popen[bytes] | None = None
        self.may_fail = False  # whether tracebacks in the log are what a test is after
        self.log_path = folder / "server.log"
        self.config_path = folder / "conduit.toml"
        self.write_config()

    # -- what it is

    @property
    def data(self) -> Path:
        """The folder that holds everything the server keeps."""
        return Path(self.config["database_path"])

    @property
    def database(self) -> Path:
        """The SQLite file in the data folder."""
        return next(
            path for path in sorted(self.data.iterdir()) if path.suffix in (".db", ".sqlite3")
        )

    @property
    def url(self) -> str:
        """Where its client API answers."""
        scheme = "https" if self.config.get("tls") else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All that it has written to standard output and error so far."""
        return self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self.process is not None, "the server was not started"
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def rss(self) -> float:
        """Resident memory in MiB."""
        return self._status("VmRSS")

    def peak_rss(self) -> float:
        """Highest resident memory so far in MiB."""
        return self._status("VmHWM")

    def _status(self, name: str) -> float:
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
        assert found is not None
        return int(found[1]) / 1024

    def cpu(self) -> float:
        """Seconds of CPU that the process has used, all threads."""
        return time.clock_gettime((~self.pid << 3) | 2)  # clock_getcpuclockid(3)

    # -- its life

    def write_config(self, **changes: Any) -> None:
        """Write the configuration file, with changes that stay."""
        self.config.update(changes)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(to_toml(self.config), "utf-8")

    def process_environment(self) -> dict[str, str]:
        """Our environment but for what steers servers or keeps Python from writing bytecode."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("CONDUIT_") and name != "PYTHONDONTWRITEBYTECODE"
        }
        return {**kept, "CONDUIT_CONFIG": str(self.config_path), **self.environment}

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process without waiting for its first answer."""
        environment = self.process_environment()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603  our own command line
                self.command,
                cwd=self.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self.process

    def start(self, timeout: float = 60) -> Server:
        """Start, and return when it answers."""
        self.spawn()
        deadline = time.monotonic() + timeout
        while not self.answers():
            assert self.running, f"the server ended:\n{self.log[-4000:]}"
            assert time.monotonic() < deadline, f"no answer in {timeout} s:\n{self.log[-4000:]}"
            time.sleep(0.02)
        return self

    def answers(self) -> bool:
        """Whether GET /_matrix/client/versions is answered with 200 now."""
        with contextlib.suppress(httpx.TransportError):
            reply = httpx.get(f"{self.url}/_matrix/client/versions", verify=False, timeout=5)  # noqa: S501  own server
            return reply.status_code == 200
        return False

    def stop(self, timeout: float = 15) -> int:
        """SIGTERM, as systemd does; the exit status."""
        if self.process is None:
            return 0
        if self.running:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill9()
            pytest.fail(f"the server did not stop in {timeout} s:\n{self.log[-4000:]}")

    def kill9(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def restart(self) -> Server:
        """Stop in peace, start again on the same data."""
        self.stop()
        return self.start()

    def run_command(
        self, *arguments: str, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m conduit ARGUMENTS` with this server's configuration."""
        environment = self.process_environment()
        return subprocess.run(  # noqa: S603  our own command line
            [*self.command, *arguments],
            cwd=self.cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def check(self) -> None:
        """`--check` on the stopped server's database finds nothing wrong."""
        result = self.run_command("--check")
        assert result.returncode == 0, result.stdout + result.stderr

    def assert_clean_log(self) -> None:
        """No traceback was logged (unless a test said that there may be)."""
        if self.may_fail:
            return
        position = self.log.find("Traceback")
        excerpt = self.log[max(0, position - 500) : position + 5000]
        assert position < 0, f"a traceback in the server's log:\n{excerpt}"


# ── 0.3  Clients ─────────────────────────────────────────────────────────────

COUNTER: Final = itertools.count(1)


def unique(prefix: str = "user") -> str:
    """A user name, alias or transaction id that nobody else in this run has."""
    return f"{prefix}_{next(COUNTER)}_{secrets.token_hex(2)}"


def path_of(path: str | Sequence[str]) -> str:
    """A path, below /_matrix/client/v3/ unless it starts with "/"; tuples are quoted and joined."""
    if not isinstance(path, str):
        path = "/".join(quote(part, safe="") for part in path)
    return path if path.startswith("/") else CLIENT + path


def ok(response: httpx.Response) -> Json:
    """The JSON of a response that must be 200."""
    request = response.request
    assert response.status_code == 200, (
        f"{request.method} {request.url}: {response.status_code} {response.text}"
    )
    return cast("Json", response.json())


def fails(response: httpx.Response, status: int, errcode: str | None = None) -> Json:
    """The JSON of a response that must be this error."""
    request = response.request
    assert response.status_code == status, (
        f"{request.method} {request.url}: {response.status_code} {response.text}"
    )
    body = cast("Json", response.json())
    assert isinstance(body.get("error"), str)
    assert errcode is None or body["errcode"] == errcode, body
    return body


class Client:
    """A user's device (or, without a token, nobody), talking to one server synchronously.

    Paths are relative to /_matrix/client/v3/ unless they begin with "/"; a tuple of parts is
    percent-encoded:  alice.put(("rooms", room_id, "state", "m.room.topic"), {"topic": "x"}).
    `checked=False` keeps the answers out of the schema check (for tests that provoke 5xx).
    """

    def __init__(
        self,
        server: Server,
        token: str = "",
        user_id: str = "",
        device_id: str = "",
        *,
        checked: bool = True,
    ) -> None:
        self.server = server
        self.token = token
        self.user_id = user_id
        self.device_id = device_id
        self.password = PASSWORD
        self.refresh_token = ""
        self.since: str | None = None  # where poll() goes on
        self.checked = checked
        self.http = httpx.Client(timeout=90, verify=False)  # noqa: S501  our own test certificate

    # -- requests

    def request(
        self, method: str, path: str | Sequence[str], body: Any = None, **options: Any
    ) -> httpx.Response:
        """One request with this client's token; `body` is sent as JSON, `content` as it is."""
        sent = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if body is not None:
            options["content"] = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        sent.update(options.pop("headers", None) or {})
        url = self.server.url + path_of(path)
        response = self.http.request(method, url, headers=sent, **options)
        if self.checked and isinstance(options.get("content", b""), bytes):
            SCHEMA.check(response)
        return response

    def get(self, path: str | Sequence[str], **options: Any) -> httpx.Response:
        """GET; keyword arguments are the query string, but for headers, content, timeout."""
        return self.request("GET", path, **self._split(options))

    def post(self, path: str | Sequence[str], body: Any = None, **options: Any) -> httpx.Response:
        """POST with a JSON body."""
        options = self._split(options)
        if body is None and "content" not in options:
            body = {}
        return self.request("POST", path, body, **options)

    def put(self, path: str | Sequence[str], body: Any = None, **options: Any) -> httpx.Response:
        """PUT with a JSON body."""
        options = self._split(options)
        if body is None and "content" not in options:
            body = {}
        return self.request("PUT", path, body, **options)

    def delete(self, path: str | Sequence[str], body: Any = None, **options: Any) -> httpx.Response:
        """DELETE, with a JSON body where the endpoint wants one."""
        return self.request("DELETE", path, body, **self._split(options))

    @staticmethod
    def _split(options: Json) -> Json:
        special = {
            k: v for k, v in options.items() if k in ("headers", "content", "timeout", "params")
        }
        query = {k: v for k, v in options.items() if k not in special}
        return {"params": query, **special} if query else special

    # -- accounts

    def login(self, user: str | None = None, password: str | None = None, **fields: Any) -> Client:
        """A new device of this user (or of `user`) as a new Client."""
        body = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": user or self.user_id},
            "password": password or self.password,
            **fields,
        }
        device = client_from(self.server, ok(Client(self.server).post("login", body)))
        device.password = password or self.password
        return device

    def uia(
        self, method: str, path: str | Sequence[str], body: Json | None = None
    ) -> httpx.Response:
        """A request behind user-interactive authentication, answered with the password."""
        first = self.request(method, path, body or {})
        if first.status_code != 401:
            return first
        identifier = {"type": "m.id.user", "user": self.user_id}
        auth = {
            "type": "m.login.password",
            "session": first.json()["session"],
            "identifier": identifier,
            "password": self.password,
        }
        return self.request(method, path, {**(body or {}), "auth": auth})

    # -- rooms

    def create_room(self, *invite: Client, **fields: Any) -> str:
        """Create a room; the clients given are invited.  The room id."""
        body = {"preset": "private_chat", **fields}
        if invite:
            body["invite"] = [client.user_id for client in invite]
        return str(ok(self.post("createRoom", body))["room_id"])

    def room_with(self, *others: Client, **fields: Any) -> str:
        """Create a room in which the other clients are joined."""
        room_id = self.create_room(*others, **fields)
        for other in others:
            other.join(room_id)
        return room_id

    def join(self, room: str, **fields: Any) -> str:
        """Join by room id or alias; the room id."""
        return str(ok(self.post(("join", room), fields))["room_id"])

    def leave(self, room_id: str) -> None:
        """Leave, or refuse an invitation."""
        ok(self.post(("rooms", room_id, "leave")))

    def invite(self, room_id: str, other: Client | str) -> None:
        """Invite a client or a user id."""
        user_id = other if isinstance(other, str) else other.user_id
        ok(self.post(("rooms", room_id, "invite"), {"user_id": user_id}))

    def send(self, room_id: str, event_type: str, content: Json, txn_id: str | None = None) -> str:
        """Send an event; its id."""
        path = ("rooms", room_id, "send", event_type, txn_id or unique("txn"))
        return str(ok(self.put(path, content))["event_id"])

    def send_text(self, room_id: str, text: str, txn_id: str | None = None) -> str:
        """Send a text message; its event id."""
        return self.send(room_id, "m.room.message", {"msgtype": "m.text", "body": text}, txn_id)

    def set_state(self, room_id: str, event_type: str, content: Json, state_key: str = "") -> str:
        """Send a state event; its id."""
        path = ("rooms", room_id, "state", event_type, state_key)
        return str(ok(self.put(path, content))["event_id"])

    def state(self, room_id: str, event_type: str | None = None, state_key: str = "") -> Any:
        """The content of one state event, or the whole state as a list of events."""
        if event_type is None:
            return ok(self.get(("rooms", room_id, "state")))
        return ok(self.get(("rooms", room_id, "state", event_type, state_key)))

    def redact(self, room_id: str, event_id: str, reason: str | None = None) -> str:
        """Redact an event; the redaction's event id."""
        body = {} if reason is None else {"reason": reason}
        return str(
            ok(self.put(("rooms", room_id, "redact", event_id, unique("txn")), body))["event_id"]
        )

    def messages(self, room_id: str, direction: str = "b", **query: Any) -> Json:
        """One page of /messages."""
        query.setdefault("limit", 100)
        return ok(self.get(("rooms", room_id, "messages"), params={"dir": direction, **query}))

    def bodies(self, room_id: str) -> list[str]:
        """The bodies of all messages of a room that this user may see, oldest first."""
        events: list[Json] = []
        page = self.messages(room_id, limit=1000)
        events += page["chunk"]
        while page.get("end") and page["chunk"]:
            page = self.messages(room_id, limit=1000, **{"from": page["end"]})
            events += page["chunk"]
        return [e["content"]["body"] for e in reversed(events) if "body" in e["content"]]

    # -- sync

    def sync(
        self,
        since: str | None = None,
        timeout: int = 0,
        filter: Json | str | None = None,
        **query: Any,
    ) -> Json:
        """One /sync; `timeout` in milliseconds, `filter` an id or a filter."""
        params: Json = {"timeout": timeout, **query}
        if since is not None:
            params["since"] = since
        if filter is not None:
            params["filter"] = filter if isinstance(filter, str) else json.dumps(filter)
        return ok(self.get("sync", params=params))

    def poll(self, timeout: int = 0, **query: Any) -> Json:
        """The next /sync after the last poll() of this client."""
        result = self.sync(self.since, timeout, **query)
        self.since = str(result["next_batch"])
        return result

    def timeline(self, room_id: str, result: Json) -> list[Json]:
        """The timeline of a joined room in a sync result (empty if the room is not there)."""
        room = result.get("rooms", {}).get("join", {}).get(room_id, {})
        return cast("list[Json]", room.get("timeline", {}).get("events", []))

    def wait_for(self, wanted: Callable[[Json], Any], seconds: float = 10) -> Any:
        """Poll until `wanted(sync result)` gives something true; that."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = wanted(self.poll(timeout=500))
            if found:
                return found
        pytest.fail(f"what was waited for did not come in {seconds} s")

    # -- media

    def upload(
        self,
        data: bytes,
        content_type: str = "application/octet-stream",
        filename: str | None = None,
    ) -> str:
        """Upload bytes; the mxc:// URI."""
        query = {} if filename is None else {"filename": filename}
        response = self.request(
            "POST",
            "/_matrix/media/v3/upload",
            content=data,
            params=query,
            headers={"Content-Type": content_type},
        )
        return str(ok(response)["content_uri"])

    def download(self, mxc: str, **options: Any) -> httpx.Response:
        """Download by mxc:// URI from the authenticated endpoint."""
        return self.get(
            "/_matrix/client/v1/media/download/" + mxc.removeprefix("mxc://"), **options
        )


def client_from(server: Server, answer: Json) -> Client:
    """The Client for an answer of /register or /login."""
    client = Client(server, answer["access_token"], answer["user_id"], answer["device_id"])
    client.refresh_token = answer.get("refresh_token", "")
    return client


def registration_auth(server: Server, answer: Json) -> Json:
    """The `auth` member that satisfies the first stage that /register asks for."""
    stages = {stage for flow in answer["flows"] for stage in flow["stages"]}
    if "m.login.registration_token" in stages:
        token = server.config["registration_token"]
        return {"type": "m.login.registration_token", "token": token, "session": answer["session"]}
    return {"type": "m.login.dummy", "session": answer["session"]}


def register(server: Server, name: str | None = None, **fields: Any) -> Client:
    """Register a user (a unique name by default) through user-interactive authentication."""
    anyone = Client(server)
    body: Json = {"username": name or unique(), "password": PASSWORD, **fields}
    response = anyone.post("register", body)
    while response.status_code == 401:
        auth = registration_auth(server, response.json())
        assert auth["type"] not in response.json().get("completed", []), response.text
        response = anyone.post("register", {**body, "auth": auth})
    client = client_from(server, ok(response))
    client.password = body["password"]
    return client


def raw_exchange(server: Server, data: bytes, timeout: float = 5) -> bytes:
    """Send bytes to the server's port; all that comes back until it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as connection:
        connection.sendall(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
        return received


def eventually(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait until the condition is true; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not true after {seconds} s: {condition}"
        time.sleep(0.05)
    return value


# ── 0.4  Fixtures ────────────────────────────────────────────────────────────


@pytest.fixture(scope="session", autouse=True)
def schema_is_kept() -> Iterator[None]:
    """After the last test of this process, no response may have violated the specification."""
    yield
    report = "\n".join(f"{count:5} x {text}" for text, count in VIOLATIONS.most_common())
    assert not VIOLATIONS, f"responses that violate the specification:\n{report}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share; its first user has the name "admin"."""
    shared = Server(tmp_path_factory.mktemp("server")).start()
    register(shared, "admin")
    yield shared
    shared.stop()
    shared.assert_clean_log()


@pytest.fixture
def new_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Factory of servers with a configuration of their own; stopped when the test ends.

    new_server(key=value, ...) starts it; new_server(start=False, ...) leaves that to the caller.
    """
    made: list[Server] = []

    def make(*, start: bool = True, **config: Any) -> Server:
        fresh = Server(tmp_path_factory.mktemp("server"), **config)
        made.append(fresh)
        return fresh.start() if start else fresh

    yield make
    for each in made:
        each.stop()
        each.assert_clean_log()


@pytest.fixture
def alice(server: Server) -> Client:
    """A fresh user of the shared server."""
    return register(server, unique("alice"))


@pytest.fixture
def bob(server: Server) -> Client:
    """Another fresh user of the shared server."""
    return register(server, unique("bob"))


@pytest.fixture
def nobody(server: Server) -> Client:
    """A client without an access token."""
    return Client(server)


# ── 0.5  Two servers ─────────────────────────────────────────────────────────


class Authority:
    """A certificate authority of the tests' own, and what it has certified, as files."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.folder = folder
        self.file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.file)

    def certify(self, *names: str) -> tuple[Path, Path]:
        """Paths of certificate chain and key for some host names and addresses."""
        made = self.ca.issue_cert(*names)
        certs, key = (self.folder / f"{names[0]}.{kind}.pem" for kind in ("certs", "key"))
        certs.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(key)
        return certs, key


def federating(folder: Path, authority: Authority, **config: Any) -> Server:
    """A server (not started) that speaks TLS under the name localhost:PORT, with open doors."""
    port = free_port()
    certs, key = authority.certify("localhost", "127.0.0.1")
    settings_ = {"port": port, "server_name": f"localhost:{port}", "ip_range_denylist": []}
    tls = {"certs": str(certs), "key": str(key)}
    made = Server(folder, **{**settings_, "tls": tls, **config})
    made.environment["SSL_CERT_FILE"] = str(authority.file)
    return made


class Synapse(Server):
    """A real Synapse as the other side: SQLite, TLS by the tests' own authority, loopback."""

    def __init__(self, folder: Path, authority: Authority, **config: Any) -> None:
        self.authority = authority
        port = free_port()
        super().__init__(folder, port=port, server_name=f"localhost:{port}", tls=True, **config)
        self.command = [sys.executable, "-m", "synapse.app.homeserver", "-c"]
        self.command.append(str(self.config_path))
        self.may_fail = True  # its log is its own affair

    def write_config(self, **changes: Any) -> None:
        """Write its YAML (which JSON is) and the configuration of its log."""
        self.config.update(changes)
        self.folder.mkdir(parents=True, exist_ok=True)
        certs, key = self.authority.certify("localhost", "127.0.0.1")
        freely = {"per_second": 10_000, "burst_count": 10_000}
        resources = [{"names": ["client", "federation"]}]
        listener = {"port": self.port, "tls": True, "type": "http", "resources": resources}
        log = {
            "version": 1,
            "handlers": {"err": {"class": "logging.StreamHandler"}},
            "root": {"level": "WARNING", "handlers": ["err"]},
        }
        (self.folder / "log.yaml").write_text(json.dumps(log))
        values: Json = {
            "server_name": self.name,
            "pid_file": str(self.folder / "pid"),
            "listeners": [{**listener, "bind_addresses": ["127.0.0.1"], "x_forwarded": False}],
            "tls_certificate_path": str(certs),
            "tls_private_key_path": str(key),
            "federation_custom_ca_list": [str(self.authority.file)],
            "database": {
                "name": "sqlite3",
                "args": {"database": str(self.folder / "homeserver.db")},
            },
            "log_config": str(self.folder / "log.yaml"),
            "media_store_path": str(self.folder / "media"),
            "signing_key_path": str(self.folder / "signing.key"),
            "trusted_key_servers": [],
            "ip_range_blacklist": [],
            "federation_ip_range_blacklist": [],
            "enable_registration": True,
            "enable_registration_without_verification": True,
            "registration_shared_secret": "shared secret",
            "macaroon_secret_key": "macaroon secret",
            "report_stats": False,
            "bcrypt_rounds": 4,
            "presence": {"enabled": True},
            "enable_room_list_search": True,
            "allow_public_rooms_over_federation": True,
            "allow_public_rooms_without_auth": True,
            "experimental_features": {"msc3266_enabled": True},
            "federation": {"destination_min_retry_interval": "1s"},
            **{
                name: freely
                for name in ("rc_message", "rc_registration", "rc_joins_per_room", "rc_reports")
            },
            "rc_login": dict.fromkeys(("address", "account", "failed_attempts"), freely),
            "rc_joins": {"local": freely, "remote": freely},
            "rc_invites": dict.fromkeys(("per_room", "per_user", "per_issuer"), freely),
            "rc_federation": {
                "window_size": 1000,
                "sleep_limit": 100_000,
                "sleep_delay": 1,
                "reject_limit": 100_000,
                "concurrent": 100,
            },
            **self.config.get("synapse", {}),
        }
        self.config_path.write_text(json.dumps(values, indent=1))

    def process_environment(self) -> dict[str, str]:
        """Our environment, with the tests' own authority among those that Python trusts."""
        return {**os.environ, "SSL_CERT_FILE": str(self.authority.file)}

    def check(self) -> None:
        """Its database is its own affair."""


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that certifies all servers of a test run."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def synapse(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Synapse]:
    """The Synapse that the tests of a process share."""
    shared = Synapse(tmp_path_factory.mktemp("synapse"), authority).start()
    yield shared
    shared.stop()


def test_both_sides_speak_tls(tmp_path: Path, authority: Authority, synapse: Synapse) -> None:
    trusted = ssl.create_default_context(cafile=str(authority.file))
    ours = federating(tmp_path, authority).start()
    for each in (ours, synapse):
        url = f"https://localhost:{each.port}/_matrix/client/versions"
        assert "v1.11" in httpx.get(url, verify=trusted).json()["versions"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    ours.stop()
    ours.assert_clean_log()


# ═════════════════════════════════════════════════════════════════════════════
#  2. CONFIGURATION
#
#  The table of keys against the example file and the README, each key against
#  what it must refuse, and the three ways in which a key reaches the server.
# ═════════════════════════════════════════════════════════════════════════════

EXAMPLE: Final = (ROOT / "conduit-example.toml").read_text("utf-8")
MINIMAL: Final = {
    "CONDUIT_CONFIG": "",
    "CONDUIT_SERVER_NAME": "example.org",
    "CONDUIT_DATABASE_PATH": "/var/lib/matrix-conduit",
}
# The tables of Conduit's documents, as far as the defaults are the same here.
DOCUMENTED: Final[dict[str, Any]] = {
    "port": 8000,
    "tls": None,
    "db_cache_capacity_mb": 300.0,
    "enable_lightning_bolt": True,
    "allow_check_for_updates": True,
    "conduit_cache_capacity_modifier": 1.0,
    "rocksdb_max_open_files": 1000,
    "pdu_cache_capacity": 150_000,
    "cleanup_second_interval": 60,
    "max_request_size": 20_971_520,
    "max_concurrent_requests": 100,
    "max_fetch_prev_events": 100,
    "allow_registration": False,
    "registration_token": None,
    "allow_encryption": True,
    "allow_federation": True,
    "allow_room_creation": True,
    "allow_unstable_room_versions": True,
    "allow_jaeger": False,
    "tracing_flame": False,
    "jwt_secret": None,
    "trusted_servers": (),
    "log": "warn",
    "turn_username": "",
    "turn_password": "",
    "turn_uris": (),
    "turn_secret": "",
    "turn_ttl": 86_400,
    "emergency_password": None,
}


def config_of(text: str, folder: Path, **environ: str) -> conduit.Config:
    """The configuration in a file with these lines below [global]."""
    return config_and_warnings(text, folder, **environ)[0]


def config_and_warnings(
    text: str, folder: Path, **environ: str
) -> tuple[conduit.Config, list[str]]:
    """The same with the warnings; server_name and database_path are given."""
    file = folder / "conduit.toml"
    required = '[global]\nserver_name = "example.org"\ndatabase_path = "data"\n'
    file.write_text(required + text, "utf-8")
    return conduit.load_config({"CONDUIT_CONFIG": str(file), **environ})


def problems_of(text: str, folder: Path, **environ: str) -> list[str]:
    """What is said to be wrong with the file."""
    with pytest.raises(conduit.ConfigError) as caught:
        config_of(text, folder, **environ)
    return caught.value.problems


# ── 2.1  The table, the example, the README ──────────────────────────────────


def test_documented_keys_have_the_documented_defaults() -> None:
    config, warnings = conduit.load_config(MINIMAL)
    assert {key: getattr(config, key) for key in DOCUMENTED} == DOCUMENTED
    assert warnings == []
    assert config.address == "127.0.0.1"
    assert config.default_room_version == "12"
    assert config.well_known.client == "https://example.org"
    assert config.well_known.server == "example.org:443"


def test_well_known_of_a_name_with_a_port() -> None:
    config, _ = conduit.load_config({**MINIMAL, "CONDUIT_SERVER_NAME": "example.org:8448"})
    assert config.well_known.client == "https://example.org:8448"
    assert config.well_known.server == "example.org:8448"


def test_every_key_has_a_help_text_and_is_found_by_its_name() -> None:
    for table in (conduit.Config, *conduit.CONFIG_TABLES.values()):
        for entry in conduit.keys_of(table).values():
            rules = entry.metadata["setting"]
            shape = conduit.shape_of(entry.type)
            assert len(rules.text) > 5, entry.name
            assert shape.table or shape.base in conduit.KINDS, entry.name
            if shape.base in ("int", "float"):
                assert rules.bounds, f"{entry.name} has no bounds"


def example_keys(commented: bool) -> dict[str, str]:
    """Key → value as text, of the lines of the example that are comments or are not."""
    mark = "#" if commented else ""
    flat = EXAMPLE.split("#  Tables.")[0]
    return dict(re.findall(rf"(?m)^{mark}(\w+) = (.+?)(?: +# ↻)?$", flat))


def test_the_example_has_every_key() -> None:
    uncommented = re.sub(r"(?m)^#(?=\w+ = |\[)", "", EXAMPLE)
    table = conduit.tomllib.loads(uncommented)["global"]
    for key in conduit.known_keys(conduit.Config):
        if key.endswith("_file"):
            continue
        place: Any = table
        for name in key.split("."):
            place = place[0] if isinstance(place, list) else place
            assert name in place, f"{key} is not in conduit-example.toml"
            place = place[name]
    assert table["turn"]


def test_the_example_is_right_when_every_line_of_it_is_used(tmp_path: Path) -> None:
    uncommented = re.sub(r"(?m)^#(?=\w+ = |\[)", "", EXAMPLE)
    for key in ("uris", "secret"):
        uncommented = re.sub(
            rf"(?m)^turn_{key} = .*$", "", uncommented
        )  # they are in [global.turn]
    for name in ("fullchain.pem", "privkey.pem"):
        (tmp_path / name).write_text("")
    uncommented = uncommented.replace("/etc/letsencrypt/live/example.org", str(tmp_path))
    file = tmp_path / "conduit.toml"
    file.write_text(uncommented.replace("YOU-NEED-TO-EDIT-THIS", "a-token"), "utf-8")
    config, warnings = conduit.load_config({"CONDUIT_CONFIG": str(file)})
    assert not [warning for warning in warnings if "unknown" in warning]
    assert config.tls is not None
    assert config.proxy.by_domain[0].exclude == ("*.clearnet.onion",)
    assert config.smtp is not None
    assert config.smtp.from_ == "matrix@example.org"


def test_comments_of_the_example_show_the_defaults() -> None:
    defaults, _ = conduit.load_config(MINIMAL)
    keys = conduit.keys_of(conduit.Config)
    shown = 0
    for name, text in example_keys(commented=True).items():
        value = conduit.tomllib.loads(f"value = {text}")["value"]
        before = EXAMPLE.split(f"#{name} = ")[0].rsplit("\n\n", 1)[-1]
        if name == "server_name" or re.search(r"\bexamples?\.", before.replace("\n# ", " ")):
            continue
        default = getattr(defaults, keys[name].name)
        listed = [str(one) for one in default] if isinstance(default, tuple) else default
        assert value == listed, f"{name}: the example says {value}, the default is {default}"
        shown += 1
    assert shown > 25


def test_sec_31_the_sample_token_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "conduit.toml"
    file.write_text(EXAMPLE, "utf-8")
    with pytest.raises(conduit.ConfigError) as caught:
        conduit.load_config({"CONDUIT_CONFIG": str(file), "CONDUIT_SERVER_NAME": "example.org"})
    assert len(caught.value.problems) == 1
    assert "registration_token" in caught.value.problems[0]
    assert "openssl rand" in caught.value.problems[0]
    for sample in conduit.SAMPLE_TOKENS | {"", " "}:
        assert problems_of(f"registration_token = {json.dumps(sample)}", tmp_path)


def test_sec_31_a_server_with_the_sample_token_does_not_start(
    new_server: Callable[..., Server],
) -> None:
    server = new_server(start=False, registration_token="YOU-NEED-TO-EDIT-THIS")
    process = server.spawn()
    assert process.wait(20) != 0
    assert "registration_token" in server.log
    assert "Traceback" not in server.log


KIND_NAMES: Final = {
    "str": "text",
    "Path": "path",
    "bool": "true or false",
    "int": "whole number",
    "float": "number",
    "Network": "address range",
    "Json": "table",
}


def default_text(entry: Any) -> str:
    """The default of a key as the README shows it."""
    if entry.default is dataclasses.MISSING:
        return "**required**"
    if entry.metadata["setting"].shown:
        return str(entry.metadata["setting"].shown)
    if entry.default is None or dataclasses.is_dataclass(entry.default):
        return ""
    return f"`{conduit.shown_value(entry.default, False)}`"


def config_table(table: type = conduit.Config, prefix: str = "") -> str:
    """The README's table of keys, in Markdown; ↻ marks what a reload changes."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"] if not prefix else []
    for name, entry in conduit.keys_of(table).items():
        rules, shape = entry.metadata["setting"], conduit.shape_of(str(entry.type))
        mark = " ↻" if rules.reload else ""
        kind = "table" if shape.table else KIND_NAMES[shape.base]
        kind = (f"list of {kind}s" if shape.many else kind) + conduit.bounds_text(rules)
        rows.append(f"| `{prefix}{name}`{mark} | {kind} | {default_text(entry)} | {rules.text} |")
        if shape.table:
            rows.append(config_table(shape.table, f"{prefix}{name}."))
    return "\n".join(rows)


def test_the_readme_has_the_table_of_keys() -> None:
    assert config_table() in (ROOT / "README.md").read_text("utf-8")


# ── 2.2  Where values come from ──────────────────────────────────────────────


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    config = config_of(
        'port = 1\nlog = "info"\n[global.well_known]\nclient = "https://a"\nserver = "b:1"',
        tmp_path,
        CONDUIT_PORT="6167",
        CONDUIT_TURN_URIS='["turn:a?transport=udp", "turn:a?transport=tcp"]',
        CONDUIT_ALLOW_FEDERATION="false",
        CONDUIT_WELL_KNOWN__CLIENT="https://c/",
        CONDUIT_RTC_FOCI='[{"type": "livekit"}]',
        CONDUIT_TERMS='[{id = "tos", name = "Terms", url = "https://a/b"}]',
        CONDUIT_PROXY__GLOBAL__URL="http://a:1",
        CONDUIT_DB_CACHE_CAPACITY_MB="64",
        CONDUIT_SERVER_NAME="1.2.3.4",
    )
    assert (config.port, config.log, config.allow_federation) == (6167, "info", False)
    assert config.turn_uris == ("turn:a?transport=udp", "turn:a?transport=tcp")
    assert (config.well_known.client, config.well_known.server) == ("https://c", "b:1")
    assert config.rtc_foci == ({"type": "livekit"},)
    assert config.terms[0].id == "tos"
    assert config.proxy.global_ == conduit.ProxyGlobal(url="http://a:1")
    assert config.db_cache_capacity_mb == 64.0
    assert config.server_name == "1.2.3.4"


def test_without_a_file_three_lines_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(conduit.ConfigError) as caught:
        conduit.load_config({"CONDUIT_SERVER_NAME": "example.org"})
    assert len(str(caught.value).splitlines()) == 3
    for word in ("CONDUIT_CONFIG", "conduit-example.toml", "server_name"):
        assert word in str(caught.value)
    (tmp_path / "conduit.toml").write_text('[global]\nserver_name = "b.org"\ndatabase_path = "c"')
    assert conduit.load_config({})[0].server_name == "b.org"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('server_name = "a"', "write the line [global] above server_name"),
        ("[global\n", "cannot be read"),
        ("[global]\nport = " + "[" * 100_000, "cannot be read"),
        ("global = 3", "has no [global] table"),
        ('allow_federation = false\n[global]\nserver_name = "a"', "stands outside of [global]"),
    ],
)
def test_files_of_the_wrong_shape(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "conduit.toml"
    file.write_text(text)
    with pytest.raises(conduit.ConfigError, match=re.escape(said)):
        conduit.load_config({"CONDUIT_CONFIG": str(file)})
    with pytest.raises(conduit.ConfigError, match="cannot be read"):
        conduit.load_config({"CONDUIT_CONFIG": str(tmp_path / "missing.toml")})


def test_secrets_can_stay_in_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    for key in ("turn_secret", "jwt_secret", "emergency_password", "registration_shared_secret"):
        config = config_of(f'{key}_file = "{secret}"', tmp_path)
        assert getattr(config, key) == "s3cret"
    config = config_of(
        'registration_token = "YOU-NEED-TO-EDIT-THIS"',
        tmp_path,
        CONDUIT_REGISTRATION_TOKEN_FILE=str(secret),
    )
    assert config.registration_token == "s3cret"
    config = config_of(
        f'registration_token_file = "{secret}"', tmp_path, CONDUIT_REGISTRATION_TOKEN="other"
    )
    assert config.registration_token == "other"
    assert "No such file" in problems_of(f'jwt_secret_file = "{tmp_path}/missing"', tmp_path)[0]
    both = problems_of(f'jwt_secret = "a"\njwt_secret_file = "{secret}"', tmp_path)
    assert "left out" in both[0]


def test_turn_can_be_a_table(tmp_path: Path) -> None:
    config = config_of(
        '[global.turn]\nuris = ["turn:a"]\nsecret = "b"\nttl = 60\nusername = "c"\npassword = "d"',
        tmp_path,
        CONDUIT_TURN__USERNAME="e",
        CONDUIT_TURN__URIS='["turn:f"]',
        CONDUIT_TURN__TTL="90",
    )
    assert (config.turn_uris, config.turn_secret, config.turn_ttl) == (("turn:f",), "b", 90)
    assert (config.turn_username, config.turn_password) == ("e", "d")
    twice = problems_of('turn_secret = "hidden"\n[global.turn]\nsecret = "hidden"', tmp_path)
    assert len(twice) == 1
    assert "hidden" not in twice[0]


def test_spellings_of_old_files(tmp_path: Path) -> None:
    old = 'proxy = "none"\naddress = ""\ntrusted_servers = [""]\nrocksdb_max_open_files = 20\n'
    config, warnings = config_and_warnings(
        old + 'log = "warn,rocket=off,_=off,sled=off,conduit::api=debug"', tmp_path
    )
    assert config.proxy == conduit.ProxyConfig()
    assert config.address == "127.0.0.1"
    assert config.trusted_servers == ()
    assert [warning for warning in warnings if "rocksdb_max_open_files has no effect" in warning]
    levels = conduit.parse_log_levels(config.log)
    assert (levels[""], levels["api"]) == (logging.WARNING, logging.DEBUG)


# ── 2.3  What is refused ─────────────────────────────────────────────────────


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    found = problems_of(
        'port = 70000\ndatabase_backend = "rocksdb"\nlog = "loud"\nallow_federation = "yes"\n'
        'turn_uris = "turn:a"\nmax_request_size = 20.5\nip_range_denylist = ["10.0.0.1/8"]\n'
        'default_room_version = 10\njwt_secret = ""\nturn_ttl = true\nsupport_page = "no"\n'
        'proxy = { by_domain = [{ include = ["*"] }] }\n[global.tls]\ncerts = "/missing"\n',
        tmp_path,
        CONDUIT_PDU_CACHE_CAPACITY="many",
    )
    text = "\n".join(found)
    assert len(found) == 15, text
    for said in (
        "port = 70000\n    should be: a whole number from 0 to 65535",
        'database_backend = "rocksdb"\n    should be: write database_backend = "sqlite"',
        'allow_federation = "yes"\n    should be: true or false',
        'turn_uris = "turn:a"\n    should be: a list',
        "proxy.by_domain[0].url is missing",
        "tls.key is missing",
        'CONDUIT_PDU_CACHE_CAPACITY = "many"',
        'default_room_version = 10\n    should be: a text in quotes: a version from "1" to "12"',
    ):
        assert said in text


def test_secrets_are_masked_in_complaints(tmp_path: Path) -> None:
    text = 'turn_secret = 12345\nregistration_token = ["hunter2"]\n'
    text += 'proxy = { global = { url = "ftp://me:hunter2@a:1" } }'
    found = "\n".join(problems_of(text, tmp_path))
    assert "12345" not in found
    assert "hunter2" not in found


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("prot = 1", "port"),
        ("alow_registration = true", "allow_registration"),
        ("max_concurent_requests = 2", "max_concurrent_requests"),
        ('well_know = { client = "a" }', "well_known"),
        ('well_known = { clinet = "https://a" }', "well_known.client"),
        ("conduit_cache_capacity_modifer = 2.0", "conduit_cache_capacity_modifier"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(
    tmp_path: Path, written: str, meant: str
) -> None:
    _, warnings = config_and_warnings(written, tmp_path)
    assert any(warning.endswith(f"did you mean {meant}?") for warning in warnings), warnings


def test_unknown_names_in_the_environment_and_hopeless_ones(tmp_path: Path) -> None:
    _, warnings = config_and_warnings("zzzzzzzz = 1", tmp_path, CONDUIT_WELL_KNOWN_CLIENT="a")
    assert "unknown key zzzzzzzz" in warnings
    assert (
        "unknown key CONDUIT_WELL_KNOWN_CLIENT; did you mean CONDUIT_WELL_KNOWN__CLIENT?"
        in warnings
    )


def test_unknown_keys_are_named_beside_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "conduit.toml"
    file.write_text('[global]\nserver_nam = "a"\ndatabase_path = "b"')
    with pytest.raises(conduit.ConfigError, match="did you mean server_name"):
        conduit.load_config({"CONDUIT_CONFIG": str(file)})


def wrong_values(entry: Any) -> Iterator[Any]:
    """Values that a key must refuse, by its type and bounds."""
    rules, shape = entry.metadata["setting"], conduit.shape_of(entry.type)
    wrong = {
        "str": 5,
        "Path": 5,
        "bool": "yes",
        "int": 1.5,
        "float": "1",
        "Network": "x",
        "Json": 1,
    }
    one = wrong.get(shape.base, 7)
    yield [one] if shape.many else one
    yield {} if shape.many else [one]
    if rules.bounds is not None:
        yield from (rules.bounds[0] - 1, rules.bounds[1] + 1)
    if rules.check is not None and shape.base == "str":
        yield ["\0 "] if shape.many else "\0 "


@pytest.mark.parametrize("name", sorted(conduit.keys_of(conduit.Config)))
def test_every_key_refuses_what_it_cannot_hold(name: str) -> None:
    entry = conduit.keys_of(conduit.Config)[name]
    if name in ("registration_token", "emergency_password", "jwt_secret"):
        name_of_wrong: list[Any] = [5, ""]
    elif name == "registration_shared_secret":
        name_of_wrong = [5, ""]
    else:
        name_of_wrong = list(wrong_values(entry))
    for wrong in name_of_wrong:
        reader = conduit.ConfigReader()
        reader.table(conduit.Config, {"server_name": "a", "database_path": "b", name: wrong})
        assert len(reader.problems) >= 1, f"{name} = {wrong!r} was accepted"
        assert all(name in problem for problem in reader.problems)


ANY_TOML: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(sorted(conduit.keys_of(conduit.Config))) | st.text(), ANY_TOML, max_size=6
    )
)
def test_no_value_raises_anything_but_problems(raw: dict[str, Any]) -> None:
    reader = conduit.ConfigReader()
    config = reader.table(conduit.Config, raw)
    assert (config is None) == bool(reader.problems)


@given(
    st.dictionaries(
        st.sampled_from(
            sorted(
                "CONDUIT_" + key.upper().replace(".", "__")
                for key in conduit.known_keys(conduit.Config)
            )
        )
        | st.text().map(lambda text: "CONDUIT_" + text),
        st.text(),
        max_size=6,
    )
)
def test_no_environment_raises_anything_but_problems(environ: dict[str, str]) -> None:
    environ = {k: v for k, v in environ.items() if not k.endswith("_FILE")}
    with contextlib.suppress(conduit.ConfigError):
        conduit.load_config({**environ, **MINIMAL})


def test_nothing_is_near_to_nonsense() -> None:
    assert conduit.nearest_key("qqqqqqqqqqqq", conduit.known_keys(conduit.Config)) is None


@pytest.mark.parametrize("good", ["127.0.0.1", "::", "localhost", "/run/conduit.sock", "0.0.0.0"])
def test_addresses(good: str) -> None:
    assert conduit.is_listen_address(good)


@pytest.mark.parametrize("bad", ["", "http://a", "a b", "[::1]", "-a", "/run/\0"])
def test_addresses_that_are_none(bad: str) -> None:
    with contextlib.suppress(ValueError):
        assert not conduit.is_listen_address(bad)


# ── 2.4  Advice ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("allow_registration = true", "only this machine can register"),
        ("allow_registration = true\nallow_open_registration = true", "open to everybody"),
        ('registration_token = "abc"', "while allow_registration is false"),
        ('allow_registration = true\nregistration_token = "two words"', "up to 64 letters"),
        ('turn_uris = ["turn:a"]', "turn_secret"),
        ('turn_uris = ["turn:a"]\nturn_password = "abc"', "turn_username"),
        ('emergency_password = "abc"', "remove it soon"),
    ],
)
def test_what_is_most_likely_not_meant_is_said(tmp_path: Path, lines: str, said: str) -> None:
    _, warnings = config_and_warnings(lines, tmp_path)
    assert len(warnings) == 1
    assert said in warnings[0]


# ── 2.5  Reload, logs, and showing it ────────────────────────────────────────


def test_reload_takes_what_can_change_and_names_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = config_of('port = 6167\nlog = "warn"', tmp_path)
    environ = {"CONDUIT_CONFIG": str(tmp_path / "conduit.toml")}
    config_of('port = 9999\nlog = "debug"\nallow_federation = false', tmp_path)
    with caplog.at_level(logging.WARNING, "conduit"):
        fresh = conduit.reload_config(running, environ)
    assert (fresh.port, fresh.log, fresh.allow_federation) == (6167, "debug", True)
    assert "port has changed; the new value waits for a restart" in caplog.text
    assert "allow_federation has changed" in caplog.text
    (tmp_path / "conduit.toml").write_text("[global]\nport = 'x'")
    with pytest.raises(conduit.ConfigError):
        conduit.reload_config(running, environ)


def test_log_levels_reach_the_loggers() -> None:
    names = ("conduit", "conduit.http", "conduit.sync")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        conduit.apply_log_levels(conduit.parse_log_levels("error,http=debug,sync=off"))
        levels = [logging.getLogger(name).level for name in names]
        assert levels == [logging.ERROR, logging.DEBUG, logging.CRITICAL + 10]
        conduit.apply_log_levels(conduit.parse_log_levels("info"))
        assert logging.getLogger("conduit.http").getEffectiveLevel() == logging.INFO
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("bad", ["loud", "http=loud", "http", "a b=info", "warn;info", "=="])
def test_log_filters_that_are_none(bad: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        conduit.parse_log_levels(bad)


def test_the_dump_masks_every_secret_and_can_be_read_again(tmp_path: Path) -> None:
    config = config_of(
        'registration_token = "hunter2"\njwt_secret = "hunter2"\nturn_secret = "hunter2"\n'
        'turn_password = "hunter2"\nemergency_password = "hunter2"\n'
        'registration_shared_secret = "hunter2"\n'
        '[[global.terms]]\nid = "a"\nname = "b"\nurl = "https://c"\n'
        '[global.proxy.global]\nurl = "http://me:hunter2@a:1"\n'
        '[global.smtp]\nhost = "a"\nfrom = "b@c"\nuser = "d"\npassword = "hunter2"\n',
        tmp_path,
    )
    text = conduit.masked_config(config)
    assert "hunter2" not in text
    assert 'server_name = "example.org"' in text
    shown = conduit.tomllib.loads(text.replace("********", "masked").replace("= masked", '= "m"'))
    assert shown["global"]["terms"][0]["lang"] == "en"
    assert shown["global"]["smtp"]["password"] == "m"
    (tmp_path / "again.toml").write_text(
        text.replace("********@", "me@").replace("********", '"masked"'), "utf-8"
    )
    again, _ = conduit.load_config({"CONDUIT_CONFIG": str(tmp_path / "again.toml")})
    assert again.port == config.port
    assert again.terms == config.terms


# ═════════════════════════════════════════════════════════════════════════════
#  3. CANONICAL JSON, HASHES, SIGNATURES
# ═════════════════════════════════════════════════════════════════════════════

# ── 3.1  Writing JSON ────────────────────────────────────────────────────────

json_numbers = st.integers() | st.floats()
json_text = st.text(max_size=8) | st.sampled_from(["\ud800", "\0", "@a:one.example", "$", "!"])
any_json = st.recursive(
    st.none() | st.booleans() | json_numbers | json_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_text, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("{}", "{}"),
        ('{"one": 1, "two": "Two"}', '{"one":1,"two":"Two"}'),
        ('{"b": "2", "a": "1"}', '{"a":"1","b":"2"}'),
        ('{"b":"2","a":"1"}', '{"a":"1","b":"2"}'),
        (
            """{"auth": {"success": true, "mxid": "@john.doe:example.com", "profile": {
            "display_name": "John Doe", "three_pids": [
            {"medium": "email", "address": "john.doe@example.org"},
            {"medium": "msisdn", "address": "123456789"}]}}}""",
            '{"auth":{"mxid":"@john.doe:example.com","profile":{"display_name":"John Doe",'
            '"three_pids":[{"address":"john.doe@example.org","medium":"email"},'
            '{"address":"123456789","medium":"msisdn"}]},"success":true}}',
        ),
        ('{"a": "日本語"}', '{"a":"日本語"}'),
        ('{"本": 2, "日": 1}', '{"日":1,"本":2}'),
        ('{"a": "\\u65E5"}', '{"a":"日"}'),
        ('{"a": null}', '{"a":null}'),
        ('{"a": -0, "b": 1}', '{"a":0,"b":1}'),
        ('"\\u0007\\u000b\\n\\"\\\\\\/\\u007f"', '"\\u0007\\u000b\\n\\"\\\\/\x7f"'),
        ('{"\\ud83d\\ude00": 1, "\\uffff": 2}', '{"\uffff":2,"😀":1}'),
    ],
)
def test_canonical_json_examples(text: str, canonical: str) -> None:
    assert conduit.canonical_json(conduit.parse_json(text.encode())) == canonical.encode()


@given(any_json)
def test_canonical_json_of_anything(value: Any) -> None:
    """Bytes that read back as the same value and are written the same again, or M_BAD_JSON."""
    try:
        raw = conduit.canonical_json(value)
    except conduit.MatrixError as error:
        assert error.errcode == "M_BAD_JSON"
        return
    again = conduit.parse_json(raw)
    assert again == value
    assert conduit.canonical_json(again) == raw


@given(any_json)
def test_check_canonical_is_the_range_of_canonical_json(value: Any) -> None:
    def numbers(item: Any) -> Iterator[Any]:
        if isinstance(item, (dict, list)):
            for child in item.values() if isinstance(item, dict) else item:
                yield from numbers(child)
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            yield item

    fine = all(isinstance(n, int) and abs(n) < 2**53 for n in numbers(value))
    if fine:
        conduit.check_canonical(value)
    else:
        with pytest.raises(conduit.MatrixError):
            conduit.check_canonical(value)


# ── 3.2  Reading JSON ────────────────────────────────────────────────────────


def json_error(raw: bytes, *, strict: bool = False) -> str | None:
    try:
        conduit.parse_json(raw, strict=strict)
    except conduit.MatrixError as error:
        assert error.status == 400
        return error.errcode
    return None


@pytest.mark.parametrize(
    ("raw", "plain", "strict"),
    [
        (b'{"a":1}', None, None),
        (b"", "M_NOT_JSON", "M_NOT_JSON"),
        (b"{", "M_NOT_JSON", "M_NOT_JSON"),
        (b"NaN", "M_NOT_JSON", "M_NOT_JSON"),
        (b"[-Infinity]", "M_NOT_JSON", "M_NOT_JSON"),
        (b"1e400", "M_BAD_JSON", "M_BAD_JSON"),
        (b"1.0", None, "M_BAD_JSON"),
        (b"-0", None, "M_BAD_JSON"),
        (b"9007199254740991", None, None),
        (b"-9007199254740991", None, None),
        (b"9007199254740992", None, "M_BAD_JSON"),
        (b"-9007199254740992", None, "M_BAD_JSON"),
        (b"1" * 4300, None, "M_BAD_JSON"),
        (b"1" * 4301, "M_NOT_JSON", "M_BAD_JSON"),
        (b'{"a":1,"a":2}', None, "M_BAD_JSON"),
        (b'"\\ud800"', "M_BAD_JSON", "M_BAD_JSON"),
        (b'"\\ud83d\\ude00"', None, None),
        (b'"\\\\ud800"', None, None),
        (b'"\xff"', "M_NOT_JSON", "M_NOT_JSON"),
        (b'"\xed\xa0\x80"', "M_NOT_JSON", "M_NOT_JSON"),
        ('{"a":1}'.encode("utf-16"), "M_NOT_JSON", "M_NOT_JSON"),
        (b"\xef\xbb\xbf{}", "M_NOT_JSON", "M_NOT_JSON"),
        (b"[" * 100 + b"]" * 100, None, None),
        (b"[" * 101 + b"]" * 101, "M_BAD_JSON", "M_BAD_JSON"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "M_BAD_JSON", "M_BAD_JSON"),
        (b"[" * 200_000, "M_NOT_JSON", "M_NOT_JSON"),
        (b"[" + b"[]," * 200 + b"0]", None, None),
    ],
)
def test_sec_c_hostile_json(raw: bytes, plain: str | None, strict: str | None) -> None:
    assert json_error(raw) == plain
    assert json_error(raw, strict=True) == strict


@given(st.binary(max_size=40) | any_json.map(lambda value: json.dumps(value).encode()))
def test_parse_json_raises_nothing_but_matrix_errors(raw: bytes) -> None:
    json_error(raw)
    json_error(raw, strict=True)


# ── 3.3  Base64 ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", ""),
        (b"f", "Zg"),
        (b"fo", "Zm8"),
        (b"foo", "Zm9v"),
        (b"foob", "Zm9vYg"),
        (b"fooba", "Zm9vYmE"),
        (b"foobar", "Zm9vYmFy"),
        (b"\xfb\xff", "+/8"),
    ],
)
def test_base64_examples(raw: bytes, text: str) -> None:
    assert conduit.b64encode(raw) == text
    assert conduit.b64decode(text) == raw
    assert conduit.b64decode(text + "=" * (-len(text) % 4)) == raw
    assert conduit.b64decode(conduit.b64url_encode(raw)) == raw


@pytest.mark.parametrize("text", ["A", "Zg===", "Z g", "Zg\n", "é", "Z=g", None, 5, b"Zg", []])
def test_not_base64(text: Any) -> None:
    with pytest.raises(conduit.MatrixError):
        conduit.b64decode(text)


@given(st.binary(max_size=50))
def test_base64_there_and_back(raw: bytes) -> None:
    assert conduit.b64decode(conduit.b64encode(raw)) == raw
    assert conduit.b64decode(conduit.b64url_encode(raw)) == raw


# ── 3.4  Signing keys ────────────────────────────────────────────────────────

SPEC_KEY = conduit.SigningKey("1", conduit.b64decode("YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1"))


def test_key_file_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    key = conduit.SigningKey.generate()
    key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"ed25519 a_\w{4} [A-Za-z0-9+/]{43}\n", path.read_text())
    again = conduit.SigningKey.load(path)
    assert (again.key_id, again.public, again.sign(b"x")) == (
        key.key_id,
        key.public,
        key.sign(b"x"),
    )
    with pytest.raises(FileExistsError):
        key.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["signing.key"]


def test_key_file_of_synapse(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    path.write_text(f"\ned25519 1 {conduit.b64encode(SPEC_KEY.seed)}\r\ned25519 2 {'A' * 43}\n")
    assert conduit.SigningKey.load(path).public == SPEC_KEY.public
    assert conduit.SigningKey.parse(SPEC_KEY.text()).key_id == "ed25519:1"


@pytest.mark.parametrize(
    "text", ["", "x", "ed25519 1 AAAA", "rsa 1 " + "A" * 43, "ed25519 é " + "A" * 43]
)
def test_key_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "signing.key"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected one line"):
        conduit.SigningKey.load(path)


def test_sec_05_generated_keys_are_random() -> None:
    keys = [conduit.SigningKey.generate() for _ in range(20)]
    assert len({key.seed for key in keys}) == 20
    assert all(len(key.seed) == 32 for key in keys)


# ── 3.5  Signed JSON ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "signature"),
    [
        (
            {},
            "K8280/U9SSy9IVtjBuVeLr+HpOB4BQFWbg+UZaADMtTdGYI7Geitb76LTrr5QV/7Xg4ahLwYGYZzuHGZKM5ZAQ",
        ),
        (
            {"one": 1, "two": "Two"},
            "KqmLSbO39/Bzb0QIYE82zqLwsA+PDzYIpIRA2sRQ4sL53+sN6/fpNSoqE7BP7vBZhG6kYdD13EIMJpvhJI+6Bw",
        ),
    ],
)
def test_json_signing_vectors(value: Json, signature: str) -> None:
    """Appendices, "JSON Signing"; what is unsigned, and older signatures, make no difference."""
    signed = conduit.sign_json(value, "domain", SPEC_KEY)
    assert signed == {**value, "signatures": {"domain": {"ed25519:1": signature}}}
    more = {**value, "unsigned": {"a": 1}, "signatures": {"x": {"y": "z"}, "domain": {"k": "s"}}}
    signed = conduit.sign_json(more, "domain", SPEC_KEY)
    assert signed["signatures"]["domain"] == {"k": "s", "ed25519:1": signature}
    assert signed["signatures"]["x"] == {"y": "z"}
    assert conduit.verify_json(signed, "domain", "ed25519:1", SPEC_KEY.public)
    assert not conduit.verify_json({**signed, "three": 3}, "domain", "ed25519:1", SPEC_KEY.public)
    assert not conduit.verify_json(signed, "other", "ed25519:1", SPEC_KEY.public)
    assert not conduit.verify_json(signed, "domain", "ed25519:2", SPEC_KEY.public)
    other = conduit.SigningKey("1", bytes(32))
    assert not conduit.verify_json(signed, "domain", "ed25519:1", other.public)


@given(any_json, any_json, any_json)
def test_signature_of_anything_is_a_verdict(public: Any, signature: Any, signatures: Any) -> None:
    good = SPEC_KEY.sign(b"x")
    assert conduit.verify_signature(public, good, b"x") is False
    assert conduit.verify_signature(SPEC_KEY.public, signature, b"x") is False
    for value in (signatures, {"s": signatures}, {"s": {"k": signatures}}):
        assert conduit.verify_json({"signatures": value}, "s", "k", SPEC_KEY.public) is False


def test_signatures_of_wrong_length() -> None:
    good = SPEC_KEY.sign(b"x")
    assert conduit.verify_signature(SPEC_KEY.public, good, b"x")
    assert not conduit.verify_signature(SPEC_KEY.public, good[:-4], b"x")
    assert not conduit.verify_signature(SPEC_KEY.public + "AAAA", good, b"x")
    assert not conduit.verify_signature(SPEC_KEY.public, good, b"y")


# ═════════════════════════════════════════════════════════════════════════════
#  4. STORAGE
# ═════════════════════════════════════════════════════════════════════════════


@contextlib.asynccontextmanager
async def open_store(folder: Path) -> AsyncIterator[conduit.Database]:
    """A database of a server named here.test, closed at the end."""
    database = conduit.Database(folder, "here.test", 64)
    try:
        yield database
    finally:
        await database.close()


def refusal(folder: Path, server_name: str = "here.test") -> str:
    """Why the folder is refused."""

    async def attempt() -> None:
        conduit.Database(folder, server_name, 64)

    with pytest.raises(conduit.DatabaseRefused) as refused:
        asyncio.run(attempt())
    return str(refused.value)


def make_store(folder: Path) -> Path:
    """A database that was opened and closed once."""

    async def once() -> None:
        async with open_store(folder):
            pass

    asyncio.run(once())
    return folder / "conduit.db"


def test_folder_is_private_and_database_in_wal_mode(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    make_store(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    with contextlib.closing(sqlite3.connect(folder / "conduit.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_block_is_undone_as_a_whole_and_others_are_kept(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path) as database:
            with database.write():
                database.set_meta("kept", 1)
            with pytest.raises(ValueError, match="stop"), database.write():
                database.set_meta("lost", 1)
                with database.write():
                    database.set_meta("inner", 1)
                raise ValueError("stop")
            assert database.meta("kept") == 1
            assert database.meta("lost") is None
            assert database.meta("inner") is None
            await database.synced()

    asyncio.run(story())


def test_writes_of_many_handlers_share_one_commit(tmp_path: Path) -> None:
    async def writer(database: conduit.Database, number: int) -> None:
        database.set_meta(f"key {number}", number)
        await database.synced()

    async def story() -> int:
        async with open_store(tmp_path) as database:
            statements: list[str] = []
            database.connection.set_trace_callback(statements.append)
            await asyncio.gather(*(writer(database, number) for number in range(50)))
            return statements.count("COMMIT")

    assert asyncio.run(story()) <= 3


def test_synced_waits_for_the_sync_of_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    real = os.fdatasync

    def note(descriptor: int) -> None:
        real(descriptor)
        lengths.append(os.fstat(descriptor).st_size)

    async def story() -> None:
        async with open_store(tmp_path) as database:
            monkeypatch.setattr(os, "fdatasync", note)
            await database.synced()
            assert lengths == []  # nothing was written, nobody waits
            database.set_meta("key", "value")
            await database.synced()
            assert lengths[-1] == (tmp_path / "conduit.db-wal").stat().st_size

    asyncio.run(story())


def test_failed_sync_acknowledges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[int] = []

    def fail(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    async def story() -> None:
        async with open_store(tmp_path) as database:
            monkeypatch.setattr(os, "fdatasync", fail)
            monkeypatch.setattr(os, "kill", lambda _pid, number: stopped.append(number))
            database.set_meta("key", "value")
            with pytest.raises(conduit.MatrixError) as error:
                await database.synced()
            assert error.value.status >= 500
            with pytest.raises(conduit.MatrixError):
                database.set_meta("other", "value")

    asyncio.run(story())
    assert stopped == [signal.SIGTERM]


def test_database_of_another_server_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path)
    assert "belongs to here.test" in refusal(tmp_path, "there.test")


def test_database_of_a_newer_program_is_refused_untouched(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    assert "version 99" in refusal(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("wipe", ["tables", "row", "bytes", "file"])
def test_half_wiped_database_is_refused(tmp_path: Path, wipe: str) -> None:
    path = make_store(tmp_path)
    if wipe == "bytes":
        path.write_bytes(b"\0" * 8192)
    elif wipe == "file":
        path.unlink()
        (tmp_path / "media").mkdir()
    else:
        sql = {"tables": "DROP TABLE events", "row": "DELETE FROM meta"}[wipe]
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(sql)
    text = refusal(tmp_path)
    assert "backup" in text or "cannot be read" in text


def test_second_server_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path):
            with pytest.raises(conduit.DatabaseRefused, match="another server is running"):
                conduit.Database(tmp_path, "here.test", 64)

    asyncio.run(story())


def migrate_with(path: Path, *sql: str) -> None:
    """Run invented migrations on a database."""
    steps = [conduit.Migration("an invented step", one) for one in sql]
    with contextlib.closing(conduit.connect(path)) as connection:
        conduit.migrate(connection, path, steps)


def test_migration_is_numbered_and_leaves_a_copy_of_what_was(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    migrate_with(path, "CREATE TABLE one (a)", "CREATE TABLE two (a)")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    for version, tables in ((2, set()), (3, {"one"})):
        copy = path.with_name(f"conduit.db.before-version-{version}")
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
        assert names & {"one", "two"} == tables


def test_failed_migration_changes_nothing(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    with pytest.raises(sqlite3.Error):
        migrate_with(path, "CREATE TABLE one (a); SELECT nonsense FROM nowhere")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
    assert "one" not in names
    make_store(tmp_path)


@given(
    plan=st.lists(st.one_of(st.integers(1, 30_000), st.just("crash"), st.just("stop")), max_size=8)
)
@settings(max_examples=20, deadline=None)
def test_stream_position_never_comes_twice(plan: list[int | str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        highest = 0
        for group in split_at_ends(plan):
            highest = asyncio.run(stamp_so_often(Path(folder), group, highest))


def split_at_ends(plan: list[int | str]) -> list[tuple[int, str]]:
    """(how many stamps, how the server ends) for each life of a server."""
    lives: list[tuple[int, str]] = []
    count = 0
    for step in [*plan, "stop"]:
        if isinstance(step, str):
            lives.append((count, step))
            count = 0
        else:
            count += step
    return lives


async def stamp_so_often(folder: Path, life: tuple[int, str], highest: int) -> int:
    """One life of a server; returns its highest position, above all former ones."""
    count, end = life
    async with open_store(folder) as database:
        stream = conduit.Stream(database)
        for _ in range(count):
            position = stream.stamp(conduit.TYPING, 1)
            assert position > highest
            highest = position
        if end == "stop":
            stream.save()
    return highest


def test_stream_log_knows_what_came_after_a_token(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_store(tmp_path) as database:
            stream = conduit.Stream(database)
            start = stream.position
            assert stream.since(start - 1) is None  # before this server's time
            first = stream.stamp(conduit.RECEIPT, 7)
            stream.stamp(conduit.TYPING, 8)
            assert stream.since(start) == [(conduit.RECEIPT, 7), (conduit.TYPING, 8)]
            assert stream.since(first) == [(conduit.TYPING, 8)]
            for _ in range(conduit.STREAM_LOG + 1):
                stream.stamp(conduit.TYPING, 9)
            assert stream.since(first) is None
            assert stream.since(stream.position) == []

    asyncio.run(story())


def test_backup_while_the_server_runs(server: Server, alice: Client, tmp_path: Path) -> None:
    room_id = alice.create_room()
    alice.send_text(room_id, "before the backup")
    copy = tmp_path / "copy.db"
    assert server.run_command("--backup", str(copy)).returncode == 0
    assert copy.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = connection.execute(
            "SELECT COUNT(*) FROM events WHERE CAST(pdu AS TEXT) LIKE '%before the backup%'"
        )
        assert found.fetchone() == (1,)
    again = server.run_command("--backup", str(copy))
    assert again.returncode != 0
    assert "exists already" in again.stderr + again.stdout


def test_check_finds_what_dangles(new_server: Callable[..., Server]) -> None:
    one = new_server()
    user = register(one)
    user.send_text(user.create_room(), "hello")
    one.check()
    one.stop()
    with contextlib.closing(sqlite3.connect(one.database)) as connection, connection:
        connection.execute(
            "DELETE FROM state_groups "
            "WHERE state_group = (SELECT MAX(state_group) FROM state_groups)"
        )
    result = one.run_command("--check")
    assert result.returncode != 0
    assert "state groups" in result.stdout + result.stderr


def test_refusal_before_any_write_costs_nobody_their_caches(tmp_path: Path) -> None:
    async def story() -> list[str]:
        forgotten: list[str] = []
        async with open_store(tmp_path) as database:
            database.on_reset(lambda: forgotten.append("caches"))
            with pytest.raises(conduit.MatrixError), database.write():
                raise conduit.forbidden("no")
            assert not forgotten
            with pytest.raises(conduit.MatrixError), database.write():
                database.user_nid("@someone:here.test")
                raise conduit.forbidden("no")
            assert database.find_user_nid("@someone:here.test") is None
            with pytest.raises(ValueError, match="bug"), database.write():
                raise ValueError("bug")
        return forgotten

    assert asyncio.run(story()) == ["caches", "caches"]


def test_block_around_a_lost_one_fails_as_well(tmp_path: Path) -> None:
    """A full disk makes SQLite undo the whole transaction, the outer blocks' writes included."""

    async def story() -> None:
        async with open_store(tmp_path) as database:
            with pytest.raises(conduit.MatrixError), database.write():
                database.set_meta("outer", 1)
                with pytest.raises(conduit.MatrixError) as lost, database.write():
                    database.execute("ROLLBACK")
                    raise sqlite3.OperationalError("database or disk is full")
                assert lost.value.status == 507
            database.set_meta("later", 1)
            await database.synced()
            assert (database.meta("outer"), database.meta("later")) == (None, 1)

    asyncio.run(story())


def test_log_stays_small_although_someone_always_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduit, "CHECKPOINT_COMMITS", 20)

    async def writer(database: conduit.Database, number: int, until: float) -> None:
        while time.monotonic() < until:
            database.set_meta(f"key {number}", secrets.token_hex(500))
            await database.synced()

    async def story() -> None:
        async with open_store(tmp_path) as database:
            until = time.monotonic() + 3
            await asyncio.gather(*(writer(database, number, until) for number in range(5)))
            assert database.connection.total_changes > 1_000
            assert (tmp_path / "conduit.db-wal").stat().st_size < 3_000_000

    asyncio.run(story())


def test_answers_do_not_wait_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = threading.Event()
    monkeypatch.setattr(conduit, "CHECKPOINT_COMMITS", 1)
    monkeypatch.setattr(conduit, "checkpoint", lambda _path: hold.wait(10))

    async def story() -> None:
        async with open_store(tmp_path) as database:
            for number in range(3):
                database.set_meta("key", number)
                await asyncio.wait_for(database.synced(), 5)
            hold.set()

    asyncio.run(story())


# ═════════════════════════════════════════════════════════════════════════════
#  5. ROOM VERSIONS
# ═════════════════════════════════════════════════════════════════════════════

# ── 5.1  The table ───────────────────────────────────────────────────────────

VERSIONS_WITH = {
    "explicit_event_ids": "1 2",
    "url_safe_event_ids": "4 5 6 7 8 9 10 11 12",
    "strict_json": "6 7 8 9 10 11 12",
    "room_id_is_hash": "12",
    "enforce_key_validity": "5 6 7 8 9 10 11 12",
    "redaction_keeps_create": "11 12",
    "redaction_keeps_signed_invite": "11 12",
    "redacts_in_content": "11 12",
    "aliases_rule": "1 2 3 4 5",
    "redaction_rule": "1 2",
    "creator_in_content": "1 2 3 4 5 6 7 8 9 10",
    "notification_levels": "6 7 8 9 10 11 12",
    "knock": "7 8 9 10 11 12",
    "restricted": "8 9 10 11 12",
    "knock_restricted": "10 11 12",
    "integer_levels": "10 11 12",
    "privileged_creators": "12",
}


@pytest.mark.parametrize(("feature", "versions"), VERSIONS_WITH.items())
def test_version_features(feature: str, versions: str) -> None:
    rows = conduit.ROOM_VERSIONS.values()
    assert [row.id for row in rows if getattr(row, feature)] == versions.split()


def test_versions_and_resolutions() -> None:
    assert [*conduit.ROOM_VERSIONS] == [str(number) for number in range(1, 13)]
    algorithms = [row.resolution for row in conduit.ROOM_VERSIONS.values()]
    assert algorithms == ["v1", *["v2"] * 10, "v2.1"]


def test_versions_agree_with_synapse() -> None:
    pytest.importorskip("synapse.event_auth", exc_type=ImportError)
    theirs = importlib.import_module("synapse.api.room_versions").KNOWN_ROOM_VERSIONS
    names = {
        "strict_json": "strict_canonicaljson",
        "room_id_is_hash": "msc4291_room_ids_as_hashes",
        "enforce_key_validity": "enforce_key_validity",
        "redacts_in_content": "updated_redaction_rules",
        "aliases_rule": "special_case_aliases_auth",
        "notification_levels": "limit_notifications_power_levels",
        "knock": "knock_join_rule",
        "restricted": "restricted_join_rule",
        "knock_restricted": "knock_restricted_join_rule",
        "integer_levels": "enforce_int_power_levels",
        "privileged_creators": "msc4289_creator_power_enabled",
    }
    for name, version in conduit.ROOM_VERSIONS.items():
        for ours, their_name in names.items():
            assert getattr(version, ours) == getattr(theirs[name], their_name), (name, ours)
        assert version.creator_in_content != theirs[name].implicit_room_creator


@given(any_json)
def test_room_version_of_anything(name: Any) -> None:
    if isinstance(name, str) and name in conduit.ROOM_VERSIONS:
        assert conduit.room_version(name).id == name
        return
    with pytest.raises(conduit.MatrixError) as caught:
        conduit.version_of_create({"room_version": name})
    assert (caught.value.status, caught.value.errcode) == (400, "M_UNSUPPORTED_ROOM_VERSION")


def test_a_create_event_without_version_makes_a_room_of_version_1() -> None:
    assert conduit.version_of_create({}).id == "1"


# ═════════════════════════════════════════════════════════════════════════════
#  6. EVENTS
# ═════════════════════════════════════════════════════════════════════════════

# ── 6.1  Helpers ─────────────────────────────────────────────────────────────

each_version = pytest.mark.parametrize("version", conduit.ROOM_VERSIONS.values(), ids=str)


def sample_fields(version: conduit.RoomVersion, **changes: Any) -> Json:
    """The fields of a message as the room store would fill them in."""
    reference: Any = "$" + "a" * 43
    if version.explicit_event_ids:
        reference = ["$a:one.example", {"sha256": "a" * 43}]
    fields: Json = {
        "type": "m.room.message",
        "sender": "@alice:one.example",
        "room_id": "!" + "r" * 43 if version.room_id_is_hash else "!room:one.example",
        "content": {"body": "hello", "msgtype": "m.text"},
        "depth": 5,
        "origin_server_ts": 1_700_000_000_000,
        "prev_events": [reference],
        "auth_events": [reference],
    }
    fields.update(changes)
    return {key: value for key, value in fields.items() if value is not ...}


def sample_pdu(version: conduit.RoomVersion, **changes: Any) -> Json:
    """A finished event, then changed without care for hash and signature; ... removes a key."""
    pdu = conduit.finish_event(version, sample_fields(version), "one.example", SPEC_KEY).pdu
    return {key: value for key, value in {**pdu, **changes}.items() if value is not ...}


def format_error(version: conduit.RoomVersion, pdu: Any) -> str | None:
    try:
        conduit.check_format(version, pdu)
    except conduit.MatrixError as error:
        return error.errcode
    return None


# ── 6.2  The format ──────────────────────────────────────────────────────────

BAD, LARGE = "M_BAD_JSON", "M_TOO_LARGE"
PAIR = ["$a:one.example", {"sha256": "x"}]
FORMAT_TABLE: list[tuple[str, str | None, Json]] = [
    ("1-12", None, {}),
    ("1-12", None, {"state_key": ""}),
    ("1-12", None, {"unsigned": {"age": 5}}),
    ("1-12", None, {"unsigned": "whatever"}),
    ("1-12", None, {"unknown": {"x": [1, None, True]}}),
    *[
        ("1-12", BAD, {key: ...})
        for key in ["type", "sender", "content", "depth", "origin_server_ts"]
    ],
    *[("1-12", BAD, {key: ...}) for key in ["prev_events", "auth_events", "hashes", "signatures"]],
    *[
        ("1-12", BAD, {key: None})
        for key in ["type", "sender", "content", "depth", "room_id", "state_key"]
    ],
    ("1-2", BAD, {"event_id": ...}),
    ("1-2", BAD, {"event_id": "$nodomain"}),
    ("1-2", BAD, {"event_id": 5}),
    ("3-12", None, {"event_id": 5}),
    ("1-12", BAD, {"room_id": ...}),
    ("1-12", BAD, {"room_id": "room"}),
    ("12", BAD, {"room_id": "!room:one.example"}),
    ("1-11", BAD, {"room_id": "!" + "r" * 43}),
    ("12", None, {"type": "m.room.create", "state_key": "", "room_id": ...}),
    ("1-11", BAD, {"type": "m.room.create", "state_key": "", "room_id": ...}),
    ("1-12", BAD, {"sender": "alice"}),
    ("1-12", BAD, {"sender": "@alice"}),
    ("1-12", BAD, {"sender": "@alice:one.example:80:80"}),
    ("1-12", BAD, {"sender": "@ali\0ce:one.example"}),
    ("1-12", None, {"sender": "@Alice Ünüsüäl\t:one.example:8448"}),
    ("1-12", None, {"sender": "@:one.example"}),
    ("1-12", None, {"type": "t" * 255}),
    ("1-12", None, {"type": "é" * 127}),
    ("1-12", LARGE, {"type": "t" * 256}),
    ("1-12", LARGE, {"type": "é" * 128}),
    ("1-12", None, {"state_key": "é" * 127}),
    ("1-12", LARGE, {"state_key": "é" * 128}),
    ("1-12", LARGE, {"sender": "@" + "a" * 244 + ":one.example"}),
    ("1-12", BAD, {"depth": -1}),
    ("1-12", BAD, {"depth": True}),
    ("1-12", BAD, {"depth": 1.0}),
    ("1-12", BAD, {"depth": "1"}),
    ("1-5", None, {"depth": 2**63 - 1}),
    ("1-5", BAD, {"depth": 2**63}),
    ("6-12", None, {"depth": 2**53 - 1}),
    ("6-12", BAD, {"depth": 2**53}),
    ("1-5", None, {"origin_server_ts": 2**53}),
    ("1-12", BAD, {"origin_server_ts": 2**63}),
    ("6-12", BAD, {"origin_server_ts": 2**53}),
    ("1-12", None, {"origin_server_ts": -5}),
    ("1-5", None, {"content": {"x": 1.5}}),
    ("6-12", BAD, {"content": {"x": 1.5}}),
    ("1-5", None, {"content": {"x": [2**53]}}),
    ("6-12", BAD, {"content": {"x": [2**53]}}),
    ("6-12", None, {"content": {"x": [2**53 - 1, -(2**53) + 1]}}),
    ("6-12", BAD, {"content": {"x": [-(2**53)]}}),
    ("1-12", BAD, {"content": {"x": float("nan")}}),
    ("1-12", BAD, {"content": {"x": "\ud800"}}),
    ("6-12", None, {"unsigned": {"x": 1.5}}),
    ("1-12", BAD, {"content": []}),
    ("1-12", BAD, {"hashes": {}}),
    ("1-12", BAD, {"hashes": {"sha256": 1}}),
    ("1-12", BAD, {"signatures": []}),
    ("1-12", BAD, {"signatures": {"a": "b"}}),
    ("1-12", BAD, {"signatures": {"a": {"b": 1}}}),
    ("1-12", None, {"signatures": {}}),
    ("1-10", BAD, {"redacts": 5}),
    ("11-12", None, {"redacts": 5}),
    ("1-2", None, {"prev_events": [PAIR] * 20}),
    ("1-2", BAD, {"prev_events": [PAIR] * 21}),
    ("1-2", BAD, {"auth_events": [PAIR] * 11}),
    ("1-2", BAD, {"prev_events": ["$a:one.example"]}),
    ("1-2", BAD, {"prev_events": [["$a:one.example"]]}),
    ("1-2", BAD, {"prev_events": [["$a:one.example", "x"]]}),
    ("1-2", BAD, {"prev_events": [[5, {}]]}),
    ("3-12", BAD, {"prev_events": [PAIR]}),
    ("3-12", None, {"prev_events": ["$a"] * 20, "auth_events": ["$a"] * 10}),
    ("3-12", BAD, {"prev_events": ["$a"] * 21}),
    ("3-12", BAD, {"auth_events": ["$a"] * 11}),
    ("1-12", BAD, {"auth_events": [5]}),
    ("1-12", BAD, {"auth_events": {}}),
    ("3-12", BAD, {"auth_events": ["a"]}),
]


def in_range(version: conduit.RoomVersion, span: str) -> bool:
    low, _, high = span.partition("-")
    return int(low) <= int(version.id) <= int(high or low)


@each_version
def test_sec_18_event_format(version: conduit.RoomVersion) -> None:
    for span, expected, changes in FORMAT_TABLE:
        if in_range(version, span):
            assert format_error(version, sample_pdu(version, **changes)) == expected, changes


@each_version
def test_sec_16_event_size_to_the_byte(version: conduit.RoomVersion) -> None:
    spare = 65536 - len(conduit.canonical_json(sample_pdu(version, content={"body": ""})))
    for size, expected in ((spare, None), (spare + 1, "M_TOO_LARGE")):
        content = {"body": "é" * (size // 2) + "x" * (size % 2)}
        assert format_error(version, sample_pdu(version, content=content)) == expected
        fields = sample_fields(version, content=content)
        if version.explicit_event_ids:
            fields["event_id"] = "$" + "e" * 24 + ":one.example"
        if expected is None:
            event = conduit.finish_event(version, fields, "one.example", SPEC_KEY)
            assert len(conduit.canonical_json(event.pdu)) == 65536
        else:
            with pytest.raises(conduit.MatrixError) as caught:
                conduit.finish_event(version, fields, "one.example", SPEC_KEY)
            assert caught.value.errcode == "M_TOO_LARGE"


@given(any_json)
def test_format_of_anything(value: Any) -> None:
    for version in conduit.ROOM_VERSIONS.values():
        assert format_error(version, value) is not None


# ── 6.3  Redaction ───────────────────────────────────────────────────────────

TOP_1 = {
    "event_id",
    "type",
    "room_id",
    "sender",
    "state_key",
    "content",
    "hashes",
    "signatures",
    "depth",
    "prev_events",
}
TOP_1 |= {"prev_state", "auth_events", "origin", "origin_server_ts", "membership"}
TOP_11 = TOP_1 - {"prev_state", "origin", "membership"}
LEVELS_1 = "ban events events_default kick redact state_default users users_default"
KEPT_CONTENT: list[tuple[str, str, str]] = [
    ("1-8", "m.room.member", "membership"),
    ("9-10", "m.room.member", "membership join_authorised_via_users_server"),
    ("11-12", "m.room.member", "membership join_authorised_via_users_server third_party_invite"),
    ("1-10", "m.room.create", "creator"),
    ("11-12", "m.room.create", "*"),
    ("1-7", "m.room.join_rules", "join_rule"),
    ("8-12", "m.room.join_rules", "join_rule allow"),
    ("1-10", "m.room.power_levels", LEVELS_1),
    ("11-12", "m.room.power_levels", LEVELS_1 + " invite"),
    ("1-5", "m.room.aliases", "aliases"),
    ("6-12", "m.room.aliases", ""),
    ("1-12", "m.room.history_visibility", "history_visibility"),
    ("1-10", "m.room.redaction", ""),
    ("11-12", "m.room.redaction", "redacts"),
    ("1-12", "m.room.message", ""),
    ("1-12", "m.room.third_party_invite", ""),
]
ALL_CONTENT = set(
    f"{LEVELS_1} invite notifications membership creator join_rule allow aliases".split()
)
ALL_CONTENT |= set(
    ["history_visibility", "redacts", "body", "reason", "room_version", "additional_creators"]
)
ALL_CONTENT |= {"join_authorised_via_users_server"}


@each_version
def test_redaction_tables(version: conduit.RoomVersion) -> None:
    top = TOP_1 if int(version.id) < 11 else TOP_11
    for span, event_type, kept in KEPT_CONTENT:
        if not in_range(version, span):
            continue
        content: Json = {key: {"value": key} for key in ALL_CONTENT}
        content["third_party_invite"] = {"signed": {"token": "t"}, "display_name": "secret"}
        pdu = dict.fromkeys([*TOP_1, "redacts", "unsigned", "age_ts", "other"], 1)
        pdu = {**pdu, "type": event_type, "content": content}
        redacted = conduit.redact(version, pdu)
        assert set(redacted) == top, event_type
        expected = set(content) if kept == "*" else set(kept.split())
        assert set(redacted["content"]) == expected, event_type
        if kept != "*" and "third_party_invite" in expected:
            assert redacted["content"]["third_party_invite"] == {"signed": {"token": "t"}}
        assert conduit.redact(version, redacted) == redacted


@given(any_json, any_json, any_json)
def test_redaction_of_anything(event_type: Any, content: Any, invite: Any) -> None:
    """Redacting always gives an object, and a second time the same."""
    for version in conduit.ROOM_VERSIONS.values():
        for kind in (event_type, "m.room.member", "m.room.create"):
            for inner in (content, {"third_party_invite": invite, "membership": invite}):
                redacted = conduit.redact(version, {"type": kind, "content": inner, "x": 1})
                assert "x" not in redacted
                assert conduit.redact(version, redacted) == redacted


# ── 6.4  Hashes, ids and signatures ──────────────────────────────────────────

SIGNED_EVENTS: list[tuple[Json, str, str]] = [
    (
        {
            "room_id": "!x:domain",
            "sender": "@a:domain",
            "origin": "domain",
            "origin_server_ts": 1000000,
            "signatures": {},
            "hashes": {},
            "type": "X",
            "content": {},
            "prev_events": [],
            "auth_events": [],
            "depth": 3,
            "unsigned": {"age_ts": 1000000},
        },
        "5jM4wQpv6lnBo7CLIghJuHdW+s2CMBJPUOGOC89ncos",
        "KxwGjPSDEtvnFgU00fwFz+l6d2pJM6XBIaMEn81SXPTRl16AqLAYqfIReFGZlHi5KLjAWbOoMszkwsQma+lYAg",
    ),
    (
        {
            "content": {"body": "Here is the message content"},
            "event_id": "$0:domain",
            "origin": "domain",
            "origin_server_ts": 1000000,
            "type": "m.room.message",
            "room_id": "!r:domain",
            "sender": "@u:domain",
            "signatures": {},
            "unsigned": {"age_ts": 1000000},
        },
        "onLKD1bGljeBWQhWZ1kaP9SorVmRQNdN5aM2JYU2n/g",
        "Wm+VzmOUOz08Ds+0NTWb1d4CZrVsJSikkeRxh6aCcUwu6pNC78FunoD7KNWzqFn241eYHYMGCA5McEiVPdhzBA",
    ),
]


@pytest.mark.parametrize(("pdu", "content_hash", "signature"), SIGNED_EVENTS)
def test_event_signing_vectors(pdu: Json, content_hash: str, signature: str) -> None:
    """Appendices, "Event Signing"."""
    assert conduit.content_hash(pdu) == content_hash
    pdu = {**pdu, "hashes": {"sha256": content_hash}}
    assert conduit.content_hash_ok(pdu)
    covered = conduit.reference_bytes(conduit.ROOM_VERSIONS["1"], pdu)
    assert SPEC_KEY.sign(covered) == signature


@each_version
def test_our_own_events_pass_every_check(version: conduit.RoomVersion) -> None:
    event = conduit.finish_event(version, sample_fields(version), "one.example", SPEC_KEY)
    conduit.check_format(version, event.pdu)
    assert conduit.content_hash_ok(event.pdu)
    received = conduit.make_event(version, json.loads(conduit.encode_json(event.pdu)))
    assert received.event_id == event.event_id
    keys = {("one.example", SPEC_KEY.key_id): SPEC_KEY.public}
    conduit.verify_event_signatures(received, lambda *name: keys.get(name))
    redacted = conduit.make_event(version, conduit.redact(version, received.pdu))
    assert redacted.event_id == event.event_id
    conduit.verify_event_signatures(redacted, lambda *name: keys.get(name))
    assert not conduit.content_hash_ok(redacted.pdu)
    assert conduit.make_event(version, event.pdu, "$known").event_id == "$known"


@each_version
def test_event_ids_have_the_form_of_the_version(version: conduit.RoomVersion) -> None:
    ids = [
        conduit.finish_event(
            version, sample_fields(version, depth=n), "one.example", SPEC_KEY
        ).event_id
        for n in range(50)
    ]
    assert len(set(ids)) == 50
    if version.explicit_event_ids:
        assert all(re.fullmatch(r"\$\w{24}:one\.example", event_id) for event_id in ids)
    else:
        alphabet = "A-Za-z0-9_-" if version.url_safe_event_ids else "A-Za-z0-9+/"
        assert all(re.fullmatch(rf"\$[{alphabet}]{{43}}", event_id) for event_id in ids)


def test_references_carry_hashes_in_versions_1_and_2() -> None:
    for version in conduit.ROOM_VERSIONS.values():
        event = conduit.finish_event(version, sample_fields(version), "one.example", SPEC_KEY)
        reference = conduit.event_reference(event)
        if not version.explicit_event_ids:
            assert reference == event.event_id
            continue
        digest = hashlib.sha256(conduit.reference_bytes(version, event.pdu)).digest()
        assert reference == [event.event_id, {"sha256": conduit.b64encode(digest)}]
        later = sample_fields(version, prev_events=[reference], auth_events=[reference])
        event = conduit.finish_event(version, later, "one.example", SPEC_KEY)
        assert event.prev_events == event.auth_events == [reference[0]]


def test_room_id_of_version_12_is_the_create_event() -> None:
    version = conduit.ROOM_VERSIONS["12"]
    fields = sample_fields(version, type="m.room.create", state_key="", room_id=...)
    fields.update(prev_events=[], auth_events=[])
    event = conduit.finish_event(version, fields, "one.example", SPEC_KEY)
    assert event.room_id == "!" + event.event_id[1:]
    assert "room_id" not in event.pdu
    conduit.check_format(version, event.pdu)


INVITED = {"type": "m.room.member", "state_key": "@bob:two.example"}
SIGNERS: list[tuple[str, set[str], Json]] = [
    ("3-12", {"one.example"}, {}),
    ("1-2", {"one.example", "two.example"}, {"event_id": "$x:two.example"}),
    ("3-12", {"one.example"}, {**INVITED, "content": {"membership": "invite"}}),
    ("3-12", set(), {**INVITED, "content": {"membership": "invite", "third_party_invite": {}}}),
    (
        "3-12",
        {"one.example"},
        {**INVITED, "content": {"membership": "join", "third_party_invite": {}}},
    ),
    *[
        (
            span,
            {"one.example", *more},
            {
                **INVITED,
                "content": {
                    "membership": "join",
                    "join_authorised_via_users_server": "@c:three.example",
                },
            },
        )
        for span, more in (("3-7", set()), ("8-12", {"three.example"}))
    ],
    (
        "8-12",
        {"one.example", ""},
        {**INVITED, "content": {"membership": "join", "join_authorised_via_users_server": []}},
    ),
    (
        "8-12",
        {"one.example"},
        {"content": {"join_authorised_via_users_server": "@c:three.example"}},
    ),
]


@each_version
def test_required_signers(version: conduit.RoomVersion) -> None:
    for span, expected, changes in SIGNERS:
        if in_range(version, span):
            event = conduit.make_event(version, sample_pdu(version, **changes))
            assert conduit.required_signers(event) == expected, changes


def test_sec_04_event_signatures() -> None:
    """One good signature is enough, one bad one too many, unknown keys do not count."""
    version = conduit.ROOM_VERSIONS["10"]
    event = conduit.finish_event(version, sample_fields(version), "one.example", SPEC_KEY)
    good = event.pdu["signatures"]["one.example"]["ed25519:1"]
    bad = conduit.SigningKey("1", bytes(32)).sign(b"x")
    known = {"ed25519:1": SPEC_KEY.public, "ed25519:2": SPEC_KEY.public, "rsa:1": SPEC_KEY.public}

    def verdict(signatures: Json) -> bool:
        changed = conduit.make_event(version, {**event.pdu, "signatures": signatures})
        try:
            conduit.verify_event_signatures(changed, lambda _server, key_id: known.get(key_id))
        except conduit.MatrixError as error:
            assert error.status == 403
            return False
        return True

    assert verdict({"one.example": {"ed25519:1": good}})
    assert verdict({"one.example": {"ed25519:1": good, "ed25519:unknown": bad}})
    assert verdict({"one.example": {"ed25519:1": good}, "two.example": {"ed25519:1": bad}})
    assert not verdict({"one.example": {"ed25519:1": good, "ed25519:2": bad}})
    assert not verdict({"one.example": {"ed25519:unknown": good}})
    assert not verdict({"one.example": {"rsa:1": good}})
    assert not verdict({"one.example": {}})
    assert not verdict({"two.example": {"ed25519:1": good}})
    assert not verdict({})


def test_an_altered_event_is_noticed() -> None:
    """The content hash guards what the signature does not cover, and the signature the rest."""
    version = conduit.ROOM_VERSIONS["12"]
    event = conduit.finish_event(version, sample_fields(version), "one.example", SPEC_KEY)
    for key, value in (("content", {"body": "other"}), ("depth", 6), ("more", 1)):
        assert not conduit.content_hash_ok({**event.pdu, key: value})
    assert conduit.content_hash_ok({**event.pdu, "unsigned": {"age": 1}})
    changed = conduit.make_event(version, {**event.pdu, "depth": 6})
    assert changed.event_id != event.event_id
    with pytest.raises(conduit.MatrixError):
        conduit.verify_event_signatures(changed, lambda *_: SPEC_KEY.public)


@given(any_json)
def test_content_hash_of_anything(value: Any) -> None:
    assert conduit.content_hash_ok({"hashes": value, "content": {}}) is False
    assert conduit.content_hash_ok({"hashes": {"sha256": value}, "content": value}) is False


def test_what_we_build_must_be_an_event() -> None:
    version = conduit.ROOM_VERSIONS["12"]
    for changes in ({"content": {"x": 1.5}}, {"type": "t" * 256}, {"content": {"x": "\ud800"}}):
        with pytest.raises(conduit.MatrixError):
            conduit.finish_event(
                version, sample_fields(version, **changes), "one.example", SPEC_KEY
            )


def test_building_an_event_is_cheap() -> None:
    """Check, hash, redact, sign: the goal is 150 µs with check_auth; noise is allowed for."""
    version = conduit.ROOM_VERSIONS["12"]
    fields = sample_fields(version)
    began = time.process_time()
    for _ in range(500):
        conduit.finish_event(version, fields, "one.example", SPEC_KEY)
    assert (time.process_time() - began) / 500 < 0.0005


# ═════════════════════════════════════════════════════════════════════════════
#  7. AUTHORIZATION RULES
#
#  SECURITY class 10: for each numbered rule of each version, what it lets pass
#  and what it refuses. Rules have their numbers of room version 12.
# ═════════════════════════════════════════════════════════════════════════════

# ── 7.1  A room to judge in ──────────────────────────────────────────────────

CREATOR, ALICE = "@creator:one.example", "@alice:one.example"
BOB, CAROL, DAVE = "@bob:two.example", "@carol:two.example", "@dave:three.example"
ALL_JOINED = dict.fromkeys((CREATOR, ALICE, BOB, CAROL), "join")
LEVELS: Json = {"users": {CREATOR: 100, ALICE: 50, BOB: 25}}
TOKEN_KEY = conduit.SigningKey("0", bytes(range(32)))


def raw_event(
    version: conduit.RoomVersion, event_type: str, sender: str, **more: Any
) -> conduit.Event:
    """An event without hashes and signatures, which the rules do not look at."""
    fields = sample_fields(version, type=event_type, sender=sender, content={}, prev_events=[])
    fields = {**fields, "auth_events": [], "depth": 9, **more}
    for name in ("prev_events", "auth_events"):
        if version.explicit_event_ids:
            fields[name] = [[event_id, {"sha256": "x"}] for event_id in fields[name]]
    if version.explicit_event_ids:
        digest = hashlib.sha256(json.dumps([event_type, sender, more], default=str).encode())
        fields.setdefault("event_id", f"${digest.hexdigest()}:{conduit.server_of(sender)}")
    return conduit.make_event(version, {key: v for key, v in fields.items() if v is not ...})


def create_event(version: conduit.RoomVersion, **content: Any) -> conduit.Event:
    base = {"room_version": version.id, "creator": CREATOR, **content}
    room_id = ... if version.room_id_is_hash else "!room:one.example"
    return raw_event(version, "m.room.create", CREATOR, content=base, room_id=room_id, state_key="")


class Court:
    """A room state, and the verdicts of the rules in it."""

    def __init__(self, version: conduit.RoomVersion, **create: Any) -> None:
        self.version = version
        self.create = create_event(version, **create)
        self.state = {("m.room.create", ""): self.create}

    def event(self, event_type: str, sender: str, **more: Any) -> conduit.Event:
        return raw_event(
            self.version, event_type, sender, **{"room_id": self.create.room_id, **more}
        )

    def put(
        self, event_type: str, sender: str, content: Json, state_key: str = ""
    ) -> conduit.Event:
        event = self.event(event_type, sender, content=content, state_key=state_key)
        self.state[event.key] = event
        return event

    def furnish(
        self, members: Mapping[str, str], levels: Json | None, rule: Any, invite: Json | None
    ) -> None:
        for user, membership in members.items():
            self.put("m.room.member", user, {"membership": membership}, user)
        if levels is not None:
            users = {**levels.get("users", {})}
            if self.version.privileged_creators:
                users.pop(CREATOR, None)
            self.put("m.room.power_levels", CREATOR, {**levels, "users": users})
        if rule is not None:
            self.put("m.room.join_rules", CREATOR, {"join_rule": rule})
        if invite is not None:
            self.put("m.room.third_party_invite", ALICE, invite, "token")

    def verdict(self, event: conduit.Event) -> str | None:
        """The number of the rule that refuses the event; None when all let it pass."""
        try:
            conduit.check_auth(self.version, event, self.state)
        except conduit.AuthError as error:
            assert (error.status, error.errcode) == (403, "M_FORBIDDEN")
            assert f"rule {error.rule})" in error.error
            return error.rule
        return None


def member(
    membership: Any, sender: str, target: str | None = None, **content: Any
) -> tuple[str, str, Json]:
    content = {"membership": membership, **content}
    more = {"content": content, "state_key": sender if target is None else target}
    return "m.room.member", sender, more


def power(sender: str, **content: Any) -> tuple[str, str, Json]:
    return "m.room.power_levels", sender, {"content": content, "state_key": ""}


def state(event_type: str, sender: str, state_key: str | None = "", **content: Any) -> Any:
    return event_type, sender, {"content": content, "state_key": state_key}


def message(event_type: str, sender: str, **more: Any) -> tuple[str, str, Json]:
    return event_type, sender, {"content": {"body": "x"}, **more}


def ticket(key: conduit.SigningKey = TOKEN_KEY, **changes: Any) -> Json:
    """content.third_party_invite of an invite of DAVE."""
    signed: Json = {"mxid": DAVE, "token": "token", **changes}
    signed = {name: value for name, value in signed.items() if value is not ...}
    return {"display_name": "d", "signed": conduit.sign_json(signed, "id.example", key)}


RuleRow = tuple[str, str | None, tuple[str, str, Json], Json]


def judge(version: conduit.RoomVersion, row: RuleRow) -> None:
    span, expected, (event_type, sender, more), room = row
    court = Court(version, **room.get("create", {}))
    members, levels = room.get("members", ALL_JOINED), room.get("levels", LEVELS)
    court.furnish(members, levels, room.get("rule", "invite"), room.get("invite"))
    event = court.event(event_type, sender, **{"state_key": ..., **more})
    assert court.verdict(event) == expected, (span, event_type, sender, more, room)


ALL_RULE_ROWS: Final[list[RuleRow]] = []


def rules(table: list[RuleRow]) -> Any:
    """One test per version for a table of (versions, refusing rule, event, the room)."""
    ALL_RULE_ROWS.extend(table)

    @each_version
    def test(version: conduit.RoomVersion) -> None:
        for row in table:
            if in_range(version, row[0]):
                judge(version, row)

    return test


# ── 7.2  Power levels ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "before_10", "since_10"),
    [
        (5, 5, 5),
        (-5, -5, -5),
        (True, None, None),
        (None, None, None),
        ("100", 100, None),
        ("000100", 100, None),
        ("+100", 100, None),
        ("-100", -100, None),
        (" 00100 ", 100, None),
        ("\t+100\n", 100, None),
        ("0", 0, None),
        ("-000", 0, None),
        ("", None, None),
        ("+", None, None),
        ("+-1", None, None),
        ("1.0", None, None),
        ("1_0", None, None),
        ("1 0", None, None),
        ("٣", None, None),
        ("0x10", None, None),
        ("0" * 60000 + "7", 7, None),
        ("9" * 309, None, None),
        ("0" * 60000 + "x", None, None),
        (50.57, 50, None),
        (-50.57, -50, None),
        (5.114698e4, 51146, None),
        (float("inf"), None, None),
        (float("nan"), None, None),
        ([], None, None),
        ({}, None, None),
    ],
)
def test_levels_as_integers_strings_and_floats(
    value: Any, before_10: int | None, since_10: int | None
) -> None:
    for version in conduit.ROOM_VERSIONS.values():
        expected = since_10 if version.integer_levels else before_10
        assert conduit.level_of(version, value) == expected, version


@each_version
def test_power_level_defaults(version: conduit.RoomVersion) -> None:
    court = Court(version)
    creator = conduit.INFINITE_LEVEL if version.privileged_creators else 100
    levels = conduit.power_levels_of(version, court.state)
    assert (levels.user(CREATOR), levels.user(ALICE)) == (creator, 0)
    defaults = levels.invite, levels.kick, levels.ban, levels.redact, levels.notification("room")
    assert defaults == (0, 50, 50, 50, 50)
    assert (levels.event("x", True), levels.event("x", False)) == (50, 0)
    content = {"users_default": 5, "events": {"x": 7}, "state_default": 9, "events_default": 3}
    court.put("m.room.power_levels", CREATOR, {**content, "notifications": {"room": 1}, "ban": 2})
    levels = conduit.power_levels_of(version, court.state)
    assert levels.user(CREATOR) == (creator if version.privileged_creators else 5)
    assert (levels.user(ALICE), levels.ban, levels.notification("room")) == (5, 2, 1)
    assert [levels.event(*what) for what in (("x", True), ("y", True), ("y", False))] == [7, 9, 3]


# ── 7.3  Which events authorise ──────────────────────────────────────────────


@each_version
def test_auth_types(version: conduit.RoomVersion) -> None:
    def types(event_type: str, sender: str, state_key: str | None, content: Json) -> set[Any]:
        keys = conduit.auth_types_for_event(version, event_type, sender, state_key, content)
        assert len(set(keys)) == len(keys)
        return set(keys)

    always = {("m.room.power_levels", ""), ("m.room.member", ALICE)}
    if int(version.id) < 12:
        always.add(("m.room.create", ""))
    rule, bob = ("m.room.join_rules", ""), ("m.room.member", BOB)
    voucher = {"membership": "join", "join_authorised_via_users_server": BOB}
    third = {"membership": "invite", "third_party_invite": {"signed": {"token": "t"}}}
    assert types("m.room.create", ALICE, "", {}) == set()
    assert types("m.room.message", ALICE, None, {}) == always
    assert types("m.room.member", ALICE, None, {"membership": "join"}) == always
    assert types("m.room.member", ALICE, ALICE, {"membership": "join"}) == always | {rule}
    assert types("m.room.member", ALICE, BOB, {"membership": "invite"}) == always | {rule, bob}
    assert types("m.room.member", ALICE, ALICE, {"membership": "knock"}) == always | {rule}
    assert types("m.room.member", ALICE, BOB, {"membership": "ban"}) == always | {bob}
    assert types("m.room.member", ALICE, ALICE, {"membership": "leave"}) == always
    token = ("m.room.third_party_invite", "t")
    assert types("m.room.member", ALICE, BOB, third) == always | {rule, bob, token}
    more = {bob} if int(version.id) >= 8 else set()
    assert types("m.room.member", ALICE, ALICE, voucher) == always | {rule} | more
    assert types("m.room.member", ALICE, ALICE, {**voucher, "membership": "leave"}) == always


# ── 7.4  Rules 1 to 4: the room ──────────────────────────────────────────────


@each_version
def test_rule_1_create(version: conduit.RoomVersion) -> None:
    number = int(version.id)
    court = Court(version)

    def verdict(sender: str = CREATOR, content: Json | None = None, **more: Any) -> str | None:
        room_id = ... if number >= 12 else "!room:one.example"
        content = {"room_version": version.id, "creator": sender, **(content or {})}
        content = {key: value for key, value in content.items() if value is not ...}
        fields = {"room_id": room_id, "state_key": "", **more}
        return court.verdict(raw_event(version, "m.room.create", sender, content=content, **fields))

    assert verdict() is None
    assert verdict(prev_events=["$x:one.example"]) == "1.1"
    assert verdict(BOB) == ("v1 1.2" if number < 12 else None)
    if number >= 12:
        assert verdict(room_id="!" + "r" * 43) == "1.2"
    assert verdict(content={"room_version": ...}) is None
    for unknown in ("13", "org.example", 1, None, [], {}):
        assert verdict(content={"room_version": unknown}) == "1.3"
    assert verdict(content={"creator": ...}) == ("v1 1.4" if number < 11 else None)
    assert verdict(content={"creator": 5}) is None
    assert verdict(content={"additional_creators": [BOB, DAVE]}) is None
    for bad in (BOB, {}, None, 5, [5], ["bob"], ["@bob"], [BOB, "@" + "b" * 250 + ":one.example"]):
        assert verdict(content={"additional_creators": bad}) == ("1.4" if number >= 12 else None)


@each_version
def test_rule_2_and_3_auth_events(version: conduit.RoomVersion) -> None:
    hashed = version.room_id_is_hash
    court = Court(version)
    court.furnish(ALL_JOINED, LEVELS, "invite", None)
    create = court.create
    alice, bob = court.state["m.room.member", ALICE], court.state["m.room.member", BOB]
    levels = court.state["m.room.power_levels", ""]
    event = court.event("m.room.message", ALICE)
    base = [alice, levels] if hashed else [create, alice, levels]

    def verdict(entries: list[conduit.Event], event: conduit.Event = event) -> str | None:
        try:
            found = conduit.check_auth_events(event, entries, create if hashed else None)
        except conduit.AuthError as error:
            return error.rule
        assert found == {entry.key: entry for entry in [*entries, create]}
        return None

    assert verdict(base) is None
    assert verdict(base[:-1]) is None
    assert verdict([*base, alice]) == "3.1"
    assert verdict([*base, bob]) == "3.2"
    assert verdict([*base, court.state["m.room.join_rules", ""]]) == "3.2"
    assert verdict([*base, court.event("m.room.message", ALICE)]) == "3.2"
    assert verdict([*base, create]) == ("3.2" if hashed else "3.1")
    if not hashed:
        assert verdict([alice, levels]) == "v1 2.4"
    foreign = raw_event(
        version, "m.room.member", ALICE, content={"membership": "join"}, state_key=ALICE,
        room_id="!" + "x" * 43 if hashed else "!other:one.example",
    )  # fmt: skip
    assert verdict([*base[:-2], foreign]) == "3.5"
    alice.rejected = "because"
    assert verdict(base) == "3.3"


@each_version
def test_sec_11_nothing_stands_on_a_rejected_create_event(version: conduit.RoomVersion) -> None:
    court = Court(version)
    court.furnish(ALL_JOINED, LEVELS, "invite", None)
    event = court.event("m.room.message", ALICE)
    assert court.verdict(event) is None
    with pytest.raises(conduit.AuthError) as refused:
        conduit.check_auth(version, event, {})
    assert refused.value.rule == "3.4"
    with pytest.raises(conduit.AuthError):
        conduit.check_auth_events(event, [], None)
    if version.room_id_is_hash:
        other = court.event("m.room.message", ALICE, room_id="!" + "x" * 43)
        assert court.verdict(other) == "2"
        court.create.rejected = "because"
        assert court.verdict(event) == "2"


CLOSED: Json = {"create": {"m.federate": False}}
test_rule_4_federation = rules([
    ("1-12", None, message("m.room.message", BOB), {}),
    ("1-12", None, message("m.room.message", BOB), {"create": {"m.federate": True}}),
    ("1-12", None, message("m.room.message", BOB), {"create": {"m.federate": "no"}}),
    ("1-12", "4", message("m.room.message", BOB), CLOSED),
    ("1-12", "4", member("leave", BOB), CLOSED),
    ("1-12", None, message("m.room.message", ALICE), CLOSED),
])  # fmt: skip

test_rule_4_of_version_1_aliases = rules([
    ("1-5", None, state("m.room.aliases", DAVE, "three.example"), {}),
    ("1-5", "v1 4.2", state("m.room.aliases", DAVE, "two.example"), {}),
    ("1-5", "v1 4.2", state("m.room.aliases", ALICE, ""), {}),
    ("1-5", "v1 4.1", message("m.room.aliases", ALICE), {}),
    ("6-12", "6", state("m.room.aliases", DAVE, "three.example"), {}),
    ("6-12", None, state("m.room.aliases", ALICE, "x"), {}),
    ("6-12", "8", state("m.room.aliases", BOB, "two.example"), {}),
])  # fmt: skip

# ── 7.5  Rule 5: membership ──────────────────────────────────────────────────

test_rule_5_1_shape = rules([
    ("1-12", "5.1", message("m.room.member", ALICE), {}),
    ("1-12", "5.1", ("m.room.member", ALICE, {"content": {"membership": "join"}}), {}),
    ("1-12", "5.1", ("m.room.member", ALICE, {"content": {}, "state_key": ALICE}), {}),
    ("1-12", "5.1", member("join", ALICE, "alice"), {}),
    ("1-12", "5.1", member(5, ALICE), {}),
    ("1-12", "5.1", member(["join"], ALICE), {}),
    ("1-12", "5.8", member("visit", ALICE), {}),
    ("1-12", "5.8", member("", ALICE), {}),
    ("1-6", "5.8", member("knock", DAVE), {"rule": "knock"}),
])  # fmt: skip


@each_version
def test_rule_5_3_1_creator_joins(version: conduit.RoomVersion) -> None:
    court = Court(version, creator=BOB)  # content.creator counts until version 10 only
    creator, other = (CREATOR, BOB) if int(version.id) >= 11 else (BOB, CREATOR)

    def verdict(user: str, prev: list[str], sender: str | None = None) -> str | None:
        event_type, sender, more = member("join", sender or user, user)
        return court.verdict(court.event(event_type, sender, prev_events=prev, **more))

    first = [court.create.event_id]
    assert verdict(creator, first) is None
    assert verdict(other, first) == "5.3.4"
    assert verdict(creator, []) == "5.3.4"
    assert verdict(creator, [*first, "$other:one.example"]) == "5.3.4"
    assert verdict(creator, ["$other:one.example"]) == "5.3.4"
    assert verdict(creator, first, sender=ALICE) is None  # for 5.3.1 comes before 5.3.2


def joins(rule: Any, **memberships: Any) -> list[RuleRow]:
    """Rows of a join rule: versions and verdict by DAVE's membership; "none" for no event."""
    rows = []
    for current, verdicts in memberships.items():
        members = {**ALL_JOINED, **({} if current == "none" else {DAVE: current})}
        for span, expected in verdicts.items():
            rows.append((span, expected, member("join", DAVE), {"rule": rule, "members": members}))
    return rows


OUT, BANNED, NO_RULE = {"1-12": "5.3.4"}, {"1-12": "5.3.3"}, {"1-12": "5.3.7"}
KNOCK_OUT = {"1-6": "5.3.7", "7-12": "5.3.4"}
test_rule_5_3_join = rules([
    ("1-12", "5.3.2", member("join", ALICE, DAVE), {"rule": "public"}),
    *joins("public", none={"1-12": None}, leave={"1-12": None}, invite={"1-12": None},
           join={"1-12": None}, knock={"1-12": None}, ban=BANNED),
    *joins("invite", none=OUT, leave=OUT, invite={"1-12": None}, join={"1-12": None}, ban=BANNED),
    *joins(None, none=OUT, leave=OUT, invite={"1-12": None}, join={"1-12": None}, ban=BANNED),
    *joins("knock", none=KNOCK_OUT, leave=KNOCK_OUT, knock=KNOCK_OUT, ban=BANNED,
           invite={"1-6": "5.3.7", "7-12": None}, join={"1-6": "5.3.7", "7-12": None}),
    *joins("restricted", ban=BANNED, none={"1-7": "5.3.7", "8-12": "5.3.5.2"},
           invite={"1-7": "5.3.7", "8-12": None}, join={"1-7": "5.3.7", "8-12": None}),
    *joins("knock_restricted", ban=BANNED, none={"1-9": "5.3.7", "10-12": "5.3.5.2"},
           invite={"1-9": "5.3.7", "10-12": None}, join={"1-9": "5.3.7", "10-12": None}),
    *joins("private", none=NO_RULE, invite=NO_RULE, join=NO_RULE, ban=BANNED),
    *joins(["public"], none=NO_RULE, invite=NO_RULE),
    *joins(5, none=NO_RULE),
])  # fmt: skip


def vouched(span: str, expected: str | None, voucher: Any, **room: Any) -> list[RuleRow]:
    event = member("join", DAVE, join_authorised_via_users_server=voucher)
    newer = f"10-{span.partition('-')[2]}"
    return [
        (span, expected, event, {"rule": "restricted", **room}),
        (newer, expected, event, {"rule": "knock_restricted", **room}),
    ]


test_rule_5_3_5_restricted = rules([
    *vouched("8-12", None, ALICE),
    *vouched("8-12", None, CAROL),
    *vouched("8-12", None, ALICE, levels={**LEVELS, "invite": 50}),
    *vouched("8-12", "5.3.5.2", CAROL, levels={**LEVELS, "invite": 50}),
    *vouched("8-12", None, CREATOR, levels={**LEVELS, "invite": 100}),
    *vouched("8-12", "5.3.5.2", DAVE),
    *vouched("8-12", "5.3.5.2", "@nobody:one.example"),
    *vouched("8-12", "5.3.5.2", ALICE, members={**ALL_JOINED, ALICE: "leave"}),
    *vouched("8-12", "5.3.5.2", ALICE, members={**ALL_JOINED, ALICE: "invite"}),
    *vouched("8-12", "5.3.5.2", None),
    *vouched("8-12", "5.3.5.2", [ALICE]),
    *vouched("8-12", "5.3.3", ALICE, members={**ALL_JOINED, DAVE: "ban"}),
    *vouched("8-12", None, "nonsense", members={**ALL_JOINED, DAVE: "invite"}),
    ("1-7", "5.3.7", member("join", DAVE, join_authorised_via_users_server=ALICE),
     {"rule": "restricted"}),
])  # fmt: skip

test_rule_5_4_invite = rules([
    ("1-12", None, member("invite", CAROL, DAVE), {}),
    ("1-12", None, member("invite", CAROL, DAVE), {"levels": None}),
    ("1-12", None, member("invite", CAROL, DAVE), {"members": {**ALL_JOINED, DAVE: "leave"}}),
    ("1-12", None, member("invite", CAROL, DAVE), {"members": {**ALL_JOINED, DAVE: "invite"}}),
    ("1-12", None, member("invite", CAROL, DAVE), {"members": {**ALL_JOINED, DAVE: "knock"}}),
    ("1-12", "5.4.2", member("invite", DAVE, DAVE), {"rule": "public"}),
    ("1-12", "5.4.2", member("invite", DAVE, "@e:one.example"), {}),
    ("1-12", "5.4.2", member("invite", DAVE, "@e:one.example"),
     {"members": {**ALL_JOINED, DAVE: "invite"}}),
    ("1-12", "5.4.3", member("invite", CREATOR, DAVE), {"members": {**ALL_JOINED, DAVE: "ban"}}),
    ("1-12", "5.4.3", member("invite", CREATOR, BOB), {}),
    ("1-12", "5.4.3", member("invite", CREATOR, CREATOR), {}),
    ("1-12", None, member("invite", ALICE, DAVE), {"levels": {**LEVELS, "invite": 50}}),
    ("1-12", "5.4.5", member("invite", BOB, DAVE), {"levels": {**LEVELS, "invite": 50}}),
    ("1-12", None, member("invite", CREATOR, DAVE), {"levels": {**LEVELS, "invite": 100}}),
    ("12-12", None, member("invite", CREATOR, DAVE), {"levels": {**LEVELS, "invite": 10**6}}),
    ("1-11", "5.4.5", member("invite", CREATOR, DAVE), {"levels": {**LEVELS, "invite": 10**6}}),
])  # fmt: skip


def by_ticket(
    expected: str | None, third_party: Any, *, sender: str = ALICE, invite: Any = ..., **room: Any
) -> RuleRow:
    room.setdefault("levels", {**LEVELS, "invite": 100})  # which rule 5.4.1 does not ask for
    invite = {"public_key": TOKEN_KEY.public} if invite is ... else invite
    event = member("invite", sender, DAVE, third_party_invite=third_party)
    return "1-12", expected, event, {"invite": invite, **room}


URL_SAFE = TOKEN_KEY.public.replace("+", "-").replace("/", "_")
OTHER_KEY = conduit.SigningKey("0", bytes(32))
UNSIGNED = {"mxid": DAVE, "token": "token", "signatures": {}}
test_rule_5_4_1_third_party_invite = rules([
    by_ticket(None, ticket()),
    by_ticket(None, ticket(), members={}),
    by_ticket(None, ticket(), invite={"public_key": URL_SAFE + "="}),
    by_ticket(None, ticket(), invite={"public_keys": [{"public_key": TOKEN_KEY.public}]}),
    by_ticket(None, ticket(), invite={"public_key": OTHER_KEY.public,
                                      "public_keys": [5, {}, {"public_key": TOKEN_KEY.public}]}),
    by_ticket(None, ticket(), members={**ALL_JOINED, DAVE: "join"}),
    by_ticket("5.4.1.1", ticket(), members={**ALL_JOINED, DAVE: "ban"}),
    by_ticket("5.4.1.2", {}),
    by_ticket("5.4.1.2", None),
    by_ticket("5.4.1.2", {"signed": []}),
    by_ticket("5.4.1.3", ticket(mxid=...)),
    by_ticket("5.4.1.3", ticket(token=...)),
    by_ticket("5.4.1.4", ticket(mxid=ALICE)),
    by_ticket("5.4.1.4", ticket(mxid=5)),
    by_ticket("5.4.1.5", ticket(), invite=None),
    by_ticket("5.4.1.5", ticket(token="other")),
    by_ticket("5.4.1.5", ticket(token=["token"])),
    by_ticket("5.4.1.6", ticket(), sender=CREATOR),
    by_ticket("5.4.1.8", ticket(OTHER_KEY)),
    by_ticket("5.4.1.8", ticket(), invite={}),
    by_ticket("5.4.1.8", ticket(), invite={"public_key": 5, "public_keys": 5}),
    by_ticket("5.4.1.8", {"signed": UNSIGNED}),
    by_ticket("5.4.1.8", {"signed": {**UNSIGNED, "signatures": 5}}),
    by_ticket("5.4.1.8", {"signed": {**UNSIGNED, "signatures": {"a": {"ed25519:0": "AAAA"}}}}),
    by_ticket("5.4.1.8", {"signed": {**UNSIGNED, "signatures": {"a": {"ed25519:0": 5}}}}),
    by_ticket("5.4.1.8", {"signed": {**ticket()["signed"], "more": 1}}),
])  # fmt: skip


def test_sec_14_third_party_invites_do_not_cost_much() -> None:
    version = conduit.ROOM_VERSIONS["12"]
    court = Court(version)
    mark = OTHER_KEY.sign(b"x")
    signatures = {f"s{n}": {f"ed25519:{m}": mark for m in range(10)} for n in range(50)}
    keys = [{"public_key": TOKEN_KEY.public}] * 800
    court.furnish(ALL_JOINED, LEVELS, "invite", {"public_keys": keys})
    signed = {"signed": {**UNSIGNED, "signatures": signatures}}
    event_type, sender, more = member("invite", ALICE, DAVE, third_party_invite=signed)
    began = time.process_time()
    assert court.verdict(court.event(event_type, sender, **more)) == "5.4.1.8"
    assert time.process_time() - began < 1


def with_dave(membership: str, **levels: Any) -> Json:
    return {"members": {**ALL_JOINED, DAVE: membership}, "levels": {**LEVELS, **levels}}


test_rule_5_5_leave = rules([
    ("1-12", None, member("leave", ALICE), {}),
    ("1-12", None, member("leave", DAVE), with_dave("invite")),
    ("1-6", "5.5.1", member("leave", DAVE), with_dave("knock")),
    ("7-12", None, member("leave", DAVE), with_dave("knock")),
    ("1-12", "5.5.1", member("leave", DAVE), with_dave("leave")),
    ("1-12", "5.5.1", member("leave", DAVE), with_dave("ban")),
    ("1-12", "5.5.1", member("leave", DAVE), {}),
    ("1-12", "5.5.2", member("leave", DAVE, BOB), {}),
    ("1-12", "5.5.2", member("leave", DAVE, BOB), with_dave("invite")),
    ("1-12", None, member("leave", ALICE, BOB), {}),
    ("1-12", None, member("leave", ALICE, DAVE), {}),
    ("1-12", None, member("leave", ALICE, DAVE), with_dave("invite")),
    ("1-12", "5.5.5", member("leave", BOB, CAROL), {}),
    ("1-12", None, member("leave", BOB, CAROL), {"levels": {**LEVELS, "kick": 25}}),
    ("1-12", "5.5.5", member("leave", ALICE, CREATOR), {}),
    ("1-12", "5.5.5", member("leave", ALICE, BOB), {"levels": {"users": {ALICE: 50, BOB: 50}}}),
    ("1-12", None, member("leave", ALICE, DAVE), with_dave("ban")),
    ("1-12", "5.5.3", member("leave", ALICE, DAVE), with_dave("ban", ban=51)),
    ("1-12", "5.5.5", member("leave", ALICE, DAVE), with_dave("ban", kick=51)),
    ("1-12", None, member("leave", CREATOR, ALICE), {}),
    ("12-12", None, member("leave", CREATOR, ALICE), {"levels": {"users": {ALICE: 2**53 - 1}}}),
    ("12-12", "5.5.5", member("leave", ALICE, CREATOR), {"levels": {"users": {ALICE: 2**53 - 1}}}),
    ("12-12", "5.5.5", member("leave", CREATOR, BOB), {"create": {"additional_creators": [BOB]}}),
    ("11-11", None, member("leave", CREATOR, BOB), {"create": {"additional_creators": [BOB]}}),
])  # fmt: skip

test_rule_5_6_ban = rules([
    ("1-12", None, member("ban", ALICE, BOB), {}),
    ("1-12", None, member("ban", ALICE, DAVE), {}),
    ("1-12", None, member("ban", ALICE, DAVE), with_dave("ban")),
    ("1-12", "5.6.1", member("ban", DAVE, BOB), {}),
    ("1-12", "5.6.1", member("ban", DAVE, BOB), with_dave("invite")),
    ("1-12", "5.6.3", member("ban", BOB, CAROL), {}),
    ("1-12", None, member("ban", BOB, CAROL), {"levels": {**LEVELS, "ban": 25}}),
    ("1-12", "5.6.3", member("ban", ALICE, CREATOR), {}),
    ("1-12", "5.6.3", member("ban", ALICE, ALICE), {}),
    ("1-12", "5.6.3", member("ban", ALICE, BOB), {"levels": {"users": {ALICE: 50, BOB: 50}}}),
    ("1-12", "5.6.3", member("ban", CREATOR, CREATOR), {}),
])  # fmt: skip

test_rule_5_7_knock = rules([
    ("7-12", None, member("knock", DAVE), {"rule": "knock"}),
    ("7-12", None, member("knock", DAVE), {"rule": "knock", **with_dave("leave")}),
    ("7-12", None, member("knock", DAVE), {"rule": "knock", **with_dave("knock")}),
    ("10-12", None, member("knock", DAVE), {"rule": "knock_restricted"}),
    ("7-9", "5.7.1", member("knock", DAVE), {"rule": "knock_restricted"}),
    *[("7-12", "5.7.1", member("knock", DAVE), {"rule": rule})
      for rule in ("public", "invite", "restricted", None, 5, ["knock"])],
    ("7-12", "5.7.2", member("knock", ALICE, DAVE), {"rule": "knock"}),
    ("7-12", "5.7.4", member("knock", DAVE), {"rule": "knock", **with_dave("ban")}),
    ("7-12", "5.7.4", member("knock", DAVE), {"rule": "knock", **with_dave("invite")}),
    ("7-12", "5.7.4", member("knock", DAVE), {"rule": "knock", **with_dave("join")}),
])  # fmt: skip

# ── 7.6  Rules 6 to 9: everything else ───────────────────────────────────────

test_rules_6_to_9 = rules([
    ("1-12", None, message("m.room.message", CAROL), {}),
    ("1-12", "6", message("m.room.message", DAVE), {}),
    *[("1-12", "6", message("m.room.message", DAVE), with_dave(m))
      for m in ("invite", "leave", "ban", "knock", "odd")],
    ("1-12", "6", power(DAVE), {}),
    ("1-12", None, state("m.room.third_party_invite", CAROL, "@t"), {}),
    ("1-12", "7.1", state("m.room.third_party_invite", CAROL), {"levels": {**LEVELS, "invite": 1}}),
    ("1-12", None, state("m.room.third_party_invite", BOB), {"levels": {**LEVELS, "invite": 25}}),
    ("1-12", "6", state("m.room.third_party_invite", DAVE), {}),
    ("1-12", "8", state("m.room.topic", BOB), {}),
    ("1-12", None, state("m.room.topic", ALICE), {}),
    ("1-12", None, state("m.room.topic", BOB), {"levels": {**LEVELS, "state_default": 25}}),
    ("1-12", None, state("m.room.topic", BOB),
     {"levels": {**LEVELS, "events": {"m.room.topic": 25}}}),
    ("1-12", "8", message("m.room.message", CAROL), {"levels": {**LEVELS, "events_default": 1}}),
    ("1-12", "8", message("m.room.topic", CAROL), {"levels": {"events": {"m.room.topic": 1}}}),
    ("1-12", "8", state("m.room.topic", ALICE), {"levels": None}),
    ("1-12", None, state("m.room.topic", CREATOR), {"levels": None}),
    ("1-11", "8", state("m.room.topic", CREATOR), {"levels": {}}),
    ("12-12", None, state("m.room.topic", CREATOR), {"levels": {}}),
    ("12-12", None, state("m.room.topic", BOB), {"create": {"additional_creators": [BOB]}}),
    ("11-11", "8", state("m.room.topic", BOB), {"create": {"additional_creators": [BOB]}}),
    ("1-12", None, state("test", ALICE, ALICE), {}),
    ("1-12", "9", state("test", ALICE, BOB), {}),
    ("1-12", "9", state("test", ALICE, "@"), {}),
    ("1-12", None, state("test", ALICE, "x" + BOB), {}),
    ("12-12", "9", state("test", CREATOR, BOB), {}),
])  # fmt: skip

# ── 7.7  Rule 10: power levels ───────────────────────────────────────────────

NAMES = ["users_default", "events_default", "state_default", "ban", "redact", "kick", "invite"]
FIRST: Json = {"levels": None}
test_rule_10_shapes = rules([
    ("1-12", None, power(CREATOR), FIRST),
    ("1-12", None, power(CREATOR, users={}, events={}, notifications={}), FIRST),
    *[("1-12", None, power(CREATOR, **{name: 7}), FIRST) for name in NAMES],
    *[("1-9", None, power(CREATOR, **{name: " +07"}), FIRST) for name in NAMES],
    *[("10-12", "10.1", power(CREATOR, **{name: "7"}), FIRST) for name in NAMES],
    *[("1-12", "10.1", power(CREATOR, **{name: bad}), FIRST)
      for name in NAMES for bad in (None, True, "x", [], {})],
    ("1-5", None, power(CREATOR, ban=7.5), FIRST),
    ("10-12", "10.1", power(CREATOR, ban=7.5), FIRST),
    *[("1-12", "10.2", power(CREATOR, events=bad), FIRST)
      for bad in (None, [], 5, {"x": None}, {"x": True}, {"x": "y"}, {"x": {}})],
    *[("6-12", "10.2", power(CREATOR, notifications=bad), FIRST) for bad in (None, [], {"x": "y"})],
    ("1-5", None, power(CREATOR, notifications={"x": "y"}), FIRST),
    ("10-12", "10.2", power(CREATOR, events={"x": "5"}), FIRST),
    *[("1-12", "10.3", power(CREATOR, users=bad), FIRST)
      for bad in (None, [], 5, {ALICE: None}, {ALICE: True}, {ALICE: "x"}, {"alice": 5}, {"": 5})],
    ("1-9", None, power(CREATOR, users={ALICE: "50", BOB: "\t-1"}), FIRST),
    ("10-12", "10.3", power(CREATOR, users={ALICE: "50"}), FIRST),
    ("1-11", None, power(CREATOR, users={CREATOR: 100}), FIRST),
    ("12-12", "10.4", power(CREATOR, users={CREATOR: 100}), FIRST),
    ("12-12", "10.4", power(CREATOR, users={BOB: 5}),
     {**FIRST, "create": {"additional_creators": [BOB]}}),
    ("12-12", None, power(CREATOR, users={BOB: 5}),
     {**FIRST, "create": {"additional_creators": [ALICE]}}),
    ("1-12", None, power(CREATOR, users={ALICE: 10**6}, ban=10**6), FIRST),
])  # fmt: skip


def change(span: str, expected: str | None, old: Json, new: Json, sender: str = ALICE) -> RuleRow:
    """ALICE, who has 50 of 50, or another changes the power levels from old to new."""
    users = {CREATOR: 100, ALICE: 50}
    old = {**old, "users": {**users, **old.get("users", {})}}
    new = {**new, "users": {**users, **new.get("users", {})}}
    if span == "12-12":
        del new["users"][CREATOR]
    new["users"] = {user: level for user, level in new["users"].items() if level is not ...}
    return span, expected, power(sender, **new), {"levels": old}


def both(expected: str | None, old: Json, new: Json, sender: str = ALICE) -> list[RuleRow]:
    return [change(span, expected, old, new, sender) for span in ("1-11", "12-12")]


test_rule_10_changes = rules([
    *both(None, {}, {}),
    *[row for name in NAMES[3:] for row in [
        *both(None, {}, {name: 50}),
        *both("10.6", {}, {name: 51}),
        *both(None, {name: 50}, {name: 49}),
        *both("10.6", {name: 51}, {name: 50}),
        *both("10.6", {name: 51}, {}),
        *both(None, {name: 51}, {name: 51}),
    ]],
    *both("10.6", {}, {"users_default": 51}),
    *both(None, {}, {"events_default": 50}),
    *both("10.6", {}, {"state_default": 51}),
    *both(None, {}, {"events": {"x": 50}}),
    *both("10.7", {}, {"events": {"x": 51}}),
    *both("10.7", {"events": {"x": 51}}, {"events": {"x": 50}}),
    *both("10.7", {"events": {"x": 51}}, {"events": {}}),
    *both("10.7", {"events": {"x": 51}}, {}),
    *both(None, {"events": {"x": 51}}, {"events": {"x": 51, "y": 1}}),
    change("1-5", None, {}, {"notifications": {"x": 51}}),
    change("6-11", "10.7", {}, {"notifications": {"x": 51}}),
    change("12-12", "10.7", {"notifications": {"x": 51}}, {}),
    change("1-5", None, {"notifications": {"x": 51}}, {}),
    *both(None, {}, {"users": {BOB: 50}}),
    *both("10.10", {}, {"users": {BOB: 51}}),
    *both(None, {"users": {BOB: 49}}, {"users": {BOB: 0}}),
    *both(None, {"users": {BOB: 49}}, {"users": {BOB: ...}}),
    *both("10.9", {"users": {BOB: 50}}, {"users": {BOB: 49}}),
    *both("10.9", {"users": {BOB: 50}}, {"users": {BOB: ...}}),
    *both("10.9", {"users": {BOB: 51}}, {"users": {BOB: ...}}),
    *both(None, {"users": {BOB: 50}}, {"users": {BOB: 50}}),
    *both(None, {}, {"users": {ALICE: 49}}),
    *both(None, {}, {"users": {ALICE: ...}}),
    *both("10.10", {}, {"users": {ALICE: 51}}),
    change("1-11", "10.9", {}, {"users": {CREATOR: 50}}),
    change("1-11", "10.9", {}, {"users": {CREATOR: ...}}),
    *both(None, {"users": {BOB: 99}}, {"users": {BOB: 0}}, CREATOR),
    change("1-11", "10.9", {"users": {BOB: 100}}, {"users": {BOB: 0}}, CREATOR),
    change("12-12", None, {"users": {BOB: 100}}, {"users": {BOB: 0}}, CREATOR),
    change("12-12", None, {}, {"users": {BOB: 2**53 - 1}, "ban": 2**53 - 1}, CREATOR),
    change("1-11", "10.6", {}, {"ban": 101}, CREATOR),
    change("1-9", None, {"ban": "51"}, {"ban": " 051"}),
    change("1-9", None, {"ban": "51"}, {"ban": 51}),
    change("1-9", "10.6", {"ban": "51"}, {"ban": 50}),
    change("1-5", None, {"ban": 51.9}, {"ban": "51"}),
])  # fmt: skip


@each_version
def test_rule_10_with_power_levels_that_should_not_be(version: conduit.RoomVersion) -> None:
    """What is unreadable in the current levels counts as not there."""
    for bad in (None, [], {"x": 5}, "x", {"users": 5}):
        for name in (*NAMES, "events", "notifications", "users"):
            court = Court(version)
            court.furnish(ALL_JOINED, None, None, None)
            court.put("m.room.power_levels", CREATOR, {"users_default": 50, name: bad})
            for event_type, sender, more in (power(ALICE, ban=51), power(CREATOR, ban=0)):
                court.verdict(court.event(event_type, sender, **more))


# ── 7.8  Redactions ──────────────────────────────────────────────────────────

test_rule_11_of_version_1_redaction = rules([
    ("1-2", None, message("m.room.redaction", ALICE, redacts="$x:two.example"), {}),
    ("1-2", None, message("m.room.redaction", BOB, redacts="$x:two.example"), {}),
    ("1-2", "v1 11.3", message("m.room.redaction", BOB, redacts="$x:one.example"), {}),
    ("1-2", "v1 11.3", message("m.room.redaction", BOB), {}),
    ("1-2", None,
     message("m.room.redaction", BOB, redacts="$x:two.example", event_id="$y:two.example"), {}),
    ("1-2", "v1 11.3",
     message("m.room.redaction", BOB, redacts="$x:two.example", event_id="$y:one.example"), {}),
    ("3-12", None, message("m.room.redaction", BOB, redacts="$x:one.example"), {}),
    ("1-12", "8", message("m.room.redaction", BOB, redacts="$x:two.example"),
     {"levels": {**LEVELS, "events": {"m.room.redaction": 26}}}),
])  # fmt: skip


@each_version
def test_sec_17_whether_a_redaction_takes_effect(version: conduit.RoomVersion) -> None:
    court = Court(version)
    court.furnish(ALL_JOINED, LEVELS, None, None)
    levels = conduit.power_levels_of(version, court.state)
    target = court.event("m.room.message", CAROL)

    def effect(sender: str, aim: str, **more: Any) -> bool:
        where = {"content": {"redacts": aim}} if version.redacts_in_content else {"redacts": aim}
        redaction = court.event("m.room.redaction", sender, **where, **more)
        assert redaction.redacts == aim
        return conduit.may_redact(redaction, target, levels)

    assert effect(CAROL, target.event_id)
    assert effect(BOB, target.event_id)  # of the same server
    assert effect(ALICE, target.event_id)  # has the redact level
    assert not effect(ALICE, "$other:one.example")
    assert effect(DAVE, target.event_id) == version.redaction_rule  # where auth has decided before
    other = "!" + "x" * 43 if version.room_id_is_hash else "!other:one.example"
    assert not effect(CAROL, target.event_id, room_id=other)
    wrong = {"redacts": target.event_id} if version.redacts_in_content else {}
    assert court.event("m.room.redaction", ALICE, **wrong).redacts is None
    assert court.event("m.room.message", ALICE, redacts=target.event_id).redacts is None


# ── 7.9  Anything at all ─────────────────────────────────────────────────────

EVENT_TYPES = [
    *("m.room.create", "m.room.member", "m.room.power_levels", "m.room.join_rules"),
    *("m.room.third_party_invite", "m.room.aliases", "m.room.redaction", "m.room.message"),
]
CONTENT_KEYS = [
    *("membership", "join_rule", "users", "events", "notifications", "ban", "users_default"),
    *("third_party_invite", "join_authorised_via_users_server", "creator", "m.federate"),
    *("additional_creators", "room_version", "public_key", "public_keys", "redacts"),
]
memberships = st.sampled_from(["join", "invite", "leave", "ban", "knock"])
some_users = st.sampled_from([CREATOR, ALICE, BOB, DAVE])
levels_json = st.dictionaries(some_users | json_text, any_json | st.integers(-1, 101), max_size=4)
content_value = any_json | memberships | some_users | levels_json | st.just(ticket())
contents = st.dictionaries(st.sampled_from(CONTENT_KEYS) | json_text, content_value, max_size=5)
event_changes = st.fixed_dictionaries(
    {
        "type": st.sampled_from(EVENT_TYPES),
        "content": contents | any_json,
        "sender": some_users | any_json,
    },
    optional={
        "state_key": st.sampled_from(["", CREATOR, ALICE, "token", "one.example"]) | any_json,
        "room_id": any_json,
        "redacts": any_json,
        "depth": any_json,
        "hashes": any_json,
        "signatures": any_json,
        "unsigned": any_json,
        "prev_events": any_json,
        "auth_events": any_json,
    },
)


@settings(max_examples=5000 if os.environ.get("DEEP") else 200)
@given(
    st.sampled_from([*conduit.ROOM_VERSIONS.values()]),
    event_changes,
    st.lists(event_changes, max_size=6),
)
def test_any_event_gets_a_verdict(
    version: conduit.RoomVersion, changes: Json, others: list[Json]
) -> None:
    """Any JSON in any field, of the event and of the state it is judged by: a verdict."""
    court = Court(version)
    court.furnish(ALL_JOINED, LEVELS, "public", {"public_key": TOKEN_KEY.public})
    room = {} if "room_id" in changes else {"room_id": court.create.room_id}
    for odd in others:
        pdu = sample_pdu(version, **{"room_id": court.create.room_id, **odd})
        if format_error(version, pdu) is None and "state_key" in pdu:
            event = conduit.make_event(version, pdu)
            court.state[event.key] = event
    pdu = sample_pdu(version, **room, **changes)
    if format_error(version, pdu) is not None:
        return
    event = conduit.make_event(version, pdu)
    court.verdict(event)
    assert conduit.content_hash_ok(pdu) in (True, False)
    levels = conduit.power_levels_of(version, court.state)
    assert all(type(levels.named(name)) is int for name in conduit.LEVEL_DEFAULTS)
    assert type(levels.user(event.sender)) is type(levels.event(event.type, event.is_state)) is int
    with contextlib.suppress(conduit.MatrixError):
        conduit.verify_event_signatures(event, lambda *_: SPEC_KEY.public)
    with contextlib.suppress(conduit.AuthError):
        conduit.check_auth_events(event, court.state.values(), court.create)
    assert event.membership is None or isinstance(event.membership, str)


def test_sec_10_every_rule_refuses_and_lets_pass() -> None:
    """Each rule that the code names is expected by a test above, and each version meets both."""
    named = set(re.findall(r'AuthError\(\s*"([^"]+)"', inspect.getsource(conduit)))
    named |= {"10.6", "10.7", "10.8"} & set(re.findall(r'"(10\.\d)"', inspect.getsource(conduit)))
    book = Path(__file__).read_text()
    chapter = book.split("#  7. AUTHORIZATION RULES")[1].split("#  8. STATE RESOLUTION")[0]
    assert named > {"1.1", "3.4", "5.3.5.2", "10.10", "v1 11.3"}
    assert not {rule for rule in named if f'"{rule}"' not in chapter}
    for version in conduit.ROOM_VERSIONS.values():
        rows = [row for row in ALL_RULE_ROWS if in_range(version, row[0])]
        allowed = sum(row[1] is None for row in rows)
        assert min(allowed, len(rows) - allowed) > 80, version


def test_check_auth_is_cheap() -> None:
    """A message judged by the state in memory."""
    court = Court(conduit.ROOM_VERSIONS["12"])
    court.furnish(ALL_JOINED, LEVELS, "public", None)
    event = court.event("m.room.message", ALICE)
    began = time.process_time()
    for _ in range(1000):
        conduit.check_auth(event.version, event, court.state)
    assert (time.process_time() - began) / 1000 < 0.0001


# ═════════════════════════════════════════════════════════════════════════════
#  8. STATE RESOLUTION
#
#  The three algorithms, held against the package matrix-synapse as an oracle
#  on random rooms. Where a seed is printed, ORACLE_SEED repeats that one room.
# ═════════════════════════════════════════════════════════════════════════════

# ── 8.1  Random rooms ────────────────────────────────────────────────────────
#
# What the generator avoids is where Synapse knowingly or unknowingly leaves the specification:
#
#  - m.federate false: Synapse also refuses targets of other servers (no rule has it), and takes any
#    value but true for false (v12 rule 4: "set to false").
#  - levels that are no integers: before version 10 Synapse fails with ValueError on reading them
#    instead of refusing the event, and takes true for 1 and "1_0" for 10.
#  - m.room.redaction without `redacts` in versions 1 and 2: Synapse lets it pass (v1 rule 11.3).
#  - events rejected by the state before them but accepted in a resolution: Synapse keeps them out,
#    "this isn't spec compliant" (synapse/state/v2.py). They cannot come up: no state holds them.

ORACLE_SERVERS = ("one.example", "two.example", "three.example")
ORACLE_USERS = tuple(f"@u{number}:{ORACLE_SERVERS[number % 3]}" for number in range(7))
INVITE_KEY = conduit.SigningKey("0", bytes(range(32)))


class RandomRoom:
    """A room graph in which several servers act at once, each seeing only part of the graph."""

    def __init__(self, version: str, seed: int) -> None:
        self.version = conduit.ROOM_VERSIONS[version]
        self.random = random.Random(seed)  # noqa: S311  rooms, not secrets
        self.events: dict[str, conduit.Event] = {}
        self.before: dict[str, dict[conduit.StateKey, str]] = {}
        self.after: dict[str, dict[conduit.StateKey, str]] = {}
        self.merges: list[list[str]] = []
        self.room_id = "!room:one.example"
        self.serial = 0
        self.federates = self.random.random() < 0.95
        self.users = ORACLE_USERS if self.federates else ("@u0:one.example", "@u3:one.example")
        self.begin()

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def level(self) -> Any:
        number = self.pick(-1, 0, 0, 1, 25, 49, 50, 50, 51, 75, 99, 100, 100, 101)
        if self.version.integer_levels:
            return number
        forms = [number, number, number, str(number), f" {number:+04d}\t"]
        return self.pick(
            *forms, *([] if self.version.strict_json else [number + 0.5 * (number > 0)])
        )

    def begin(self) -> None:
        content: Json = {"room_version": self.version.id}
        if self.version.creator_in_content:
            content["creator"] = self.users[0]
        if not self.federates:
            content["m.federate"] = False
        if self.version.privileged_creators and self.random.random() < 0.4:
            content["additional_creators"] = [self.users[1]]
        self.add([], "m.room.create", self.users[0], content, "")
        tip = [*self.events]
        self.add(tip, "m.room.member", self.users[0], {"membership": "join"}, self.users[0])
        if self.random.random() < 0.8:
            self.add(
                [[*self.events][-1]], "m.room.power_levels", self.users[0], self.levels({}), ""
            )
        if self.random.random() < 0.8:
            rule = {"join_rule": self.pick("public", "public", "public", "invite", "knock")}
            self.add([[*self.events][-1]], "m.room.join_rules", self.users[0], rule, "")
        for user in self.users[1:]:
            if self.random.random() < 0.7:
                self.add([[*self.events][-1]], "m.room.member", user, {"membership": "join"}, user)

    def grow(self, steps: int, width: int) -> None:
        for _ in range(steps):
            recent = [*self.events][-width:]
            # a rejected event is no good prev event, but others may name it all the same
            count = self.pick(1, 1, 1, 2, 2, 3)
            prev = sorted(self.random.sample(recent, min(count, len(recent))))
            state = self.state_at(prev)
            for _ in range(self.pick(1, 5, 5)):
                event_type, sender, content, state_key, extra = self.action(state)
                event = self.add(prev, event_type, sender, content, state_key, state, **extra)
                if event.rejected is None:
                    break
                if self.random.random() < 0.9:
                    del self.events[event.event_id]  # most of what is not allowed is not tried

    def state_at(self, prev: list[str]) -> dict[conduit.StateKey, str]:
        if len(prev) > 1:
            self.merges.append(prev)
        sets = [self.after[event_id] for event_id in prev]
        return conduit.resolve_state(self.version, sets, self.events.get)

    def add(
        self,
        prev: list[str],
        event_type: str,
        sender: str,
        content: Json,
        state_key: str | None,
        state: dict[conduit.StateKey, str] | None = None,
        **extra: Any,
    ) -> conduit.Event:
        state = self.state_at(prev) if state is None else state
        self.serial += 1
        keys = conduit.auth_types_for_event(self.version, event_type, sender, state_key, content)
        auth = [state[key] for key in keys if key in state]
        depth = 1 + max((self.events[event_id].depth for event_id in prev), default=0)
        pdu: Json = {
            "type": event_type,
            "sender": sender,
            "content": content,
            "room_id": self.room_id,
            "depth": depth if self.random.random() < 0.9 else self.pick(1, 3, 1000),
            "origin_server_ts": 1000 + self.random.randrange(8),
            "prev_events": prev,
            "auth_events": auth,
            "hashes": {"sha256": str(self.serial)},
            "signatures": {},
            **({} if state_key is None else {"state_key": state_key}),
            **extra,
        }
        if self.version.explicit_event_ids:
            pdu["event_id"] = f"${self.serial}:{conduit.server_of(sender)}"
            for name in ("prev_events", "auth_events"):
                pdu[name] = [[event_id, {"sha256": "x"}] for event_id in pdu[name]]
        if self.version.room_id_is_hash and event_type == "m.room.create":
            del pdu["room_id"]
        conduit.check_format(self.version, pdu)
        event = conduit.make_event(self.version, pdu)
        self.accept(event, state)
        return event

    def accept(self, event: conduit.Event, state: dict[conduit.StateKey, str]) -> None:
        if event.type == "m.room.create":
            self.room_id = event.room_id
        self.events[event.event_id] = event
        self.before[event.event_id] = self.after[event.event_id] = state
        try:
            conduit.check_auth(self.version, event, self.auth_state(event))
        except conduit.AuthError as error:
            event.rejected = str(error)
            return
        if event.is_state:
            self.after[event.event_id] = {**state, event.key: event.event_id}

    def auth_state(self, event: conduit.Event) -> dict[conduit.StateKey, conduit.Event]:
        state = self.before[event.event_id]
        keys = [*conduit.auth_types_of(event), ("m.room.create", "")]
        return {key: self.events[state[key]] for key in keys if key in state}

    def action(self, state: dict[conduit.StateKey, str]) -> tuple[Any, ...]:
        """A random thing to do, likely to be allowed often enough."""
        sender, target = self.pick(*self.users[:3], *self.users), self.pick(*self.users)
        kind = self.random.random()
        if kind < 0.5:
            return self.member_action(sender, target, state)
        if kind < 0.7:
            old = state.get(("m.room.power_levels", ""))
            content = self.levels(self.events[old].content if old else {})
            return "m.room.power_levels", sender, content, "", {}
        if kind < 0.8:
            rules = ("public", "invite", "knock", "restricted", "knock_restricted", "private")
            return "m.room.join_rules", sender, {"join_rule": self.pick(*rules)}, "", {}
        return self.other_action(sender, target)

    def member_action(
        self, sender: str, target: str, state: dict[conduit.StateKey, str]
    ) -> tuple[Any, ...]:
        memberships = ("join", "join", "join", "leave", "leave", "invite", "ban", "knock", "odd")
        membership = self.pick(*memberships)
        content: Json = {"membership": membership}
        if membership in ("join", "knock") and self.random.random() < 0.95:
            target = sender
        if membership == "join" and self.random.random() < 0.3:
            content["join_authorised_via_users_server"] = self.pick(*self.users)
        if membership == "invite" and self.random.random() < 0.3:
            sender = self.third_party(content, sender, target, state)
        return "m.room.member", sender, content, target, {}

    def third_party(
        self, content: Json, sender: str, target: str, state: dict[conduit.StateKey, str]
    ) -> str:
        """Turn an invite into one that stems from a third-party invite, as a rule a right one."""
        token = self.pick("a", "b")
        signed: Json = {"mxid": self.pick(target, target, target, sender), "token": token}
        key = self.pick(INVITE_KEY, INVITE_KEY, conduit.SigningKey("0", bytes(32)))
        content["third_party_invite"] = {"signed": conduit.sign_json(signed, "id.example", key)}
        invite = state.get(("m.room.third_party_invite", token))
        return self.events[invite].sender if invite and self.random.random() < 0.8 else sender

    def other_action(self, sender: str, target: str) -> tuple[Any, ...]:
        public: Json = {"public_key": INVITE_KEY.public}
        redacted = self.pick(*[*self.events][-5:])
        redaction = (
            ({"redacts": redacted}, {})
            if self.version.redacts_in_content
            else ({}, {"redacts": redacted})
        )
        return self.pick(
            ("m.room.topic", sender, {"topic": str(self.random.random())}, "", {}),
            ("m.room.name", sender, {"name": str(self.random.random())}, "", {}),
            ("m.room.history_visibility", sender, {"history_visibility": "shared"}, "", {}),
            ("m.room.message", sender, {"body": "hello"}, None, {}),
            ("test.of.user", sender, {"x": 1}, self.pick(sender, target), {}),
            ("m.room.third_party_invite", sender, public, self.pick("a", "b"), {}),
            ("m.room.third_party_invite", sender, {"public_keys": [public]}, "a", {}),
            ("m.room.aliases", sender, {"aliases": []}, self.pick(*ORACLE_SERVERS), {}),
            ("m.room.redaction", sender, redaction[0], None, redaction[1]),
        )

    def levels(self, old: Json) -> Json:
        """The old power levels with some changes, or new ones."""
        content = json.loads(json.dumps(old)) if self.random.random() < 0.9 else {}
        users = content.setdefault("users", {})
        if not users and not self.version.privileged_creators:
            users[self.users[0]] = 100
        for _ in range(self.pick(1, 1, 2, 3)):
            where = self.random.random()
            if where < 0.6:
                users[self.pick(*self.users[1:], *self.users)] = self.level()
            elif where < 0.7 and users:
                del users[self.pick(*users)]
            elif where < 0.85:
                content[self.pick("ban", "kick", "invite", "redact", "state_default")] = (
                    self.level()
                )
            else:
                table = content.setdefault(self.pick("events", "notifications"), {})
                table[self.pick("m.room.topic", "m.room.power_levels", "room")] = self.level()
        if self.version.privileged_creators and self.random.random() < 0.8:
            for creator in self.users[:2]:
                users.pop(creator, None)
        if self.random.random() < 0.02:
            users["nobody"] = 50
        return content


# ── 8.2  The oracle ──────────────────────────────────────────────────────────


class OracleStore:
    """What Synapse's resolution asks of its database, answered in the plainest way."""

    def __init__(self, events: dict[str, Any]) -> None:
        self.events = events

    async def sleep(self, _duration: object) -> None:
        return

    async def get_events(self, ids: Iterable[str], **_options: object) -> dict[str, Any]:
        return {event_id: self.events[event_id] for event_id in ids if event_id in self.events}

    def chain(self, ids: Iterable[str]) -> set[str]:
        found: set[str] = set()
        stack = [*ids]
        while stack:
            event_id = stack.pop()
            if event_id not in found:
                found.add(event_id)
                stack.extend(self.events[event_id].auth_event_ids())
        return found

    async def get_auth_chain_difference(
        self, _room: str, sets: list[set[str]], conflicted: set[str] | None, _more: object
    ) -> Any:
        chains = [self.chain(ids) for ids in sets]
        difference = set.union(*chains) - set.intersection(*chains)
        subgraph = None
        if conflicted is not None:
            below = self.chain(conflicted)
            subgraph = {e for e in below if not conflicted.isdisjoint(self.chain([e]))}
        module = importlib.import_module("synapse.storage.databases.main.event_federation")
        return module.StateDifference(difference, subgraph)


def finished(task: Any) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        task.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the oracle waited for something")


class Oracle:
    """Synapse's idea of a room."""

    def __init__(self, room: RandomRoom) -> None:
        self.auth = importlib.import_module("synapse.event_auth")
        self.resolution = importlib.import_module(
            "synapse.state.v1" if room.version.resolution == "v1" else "synapse.state.v2"
        )
        self.errors = importlib.import_module("synapse.api.errors")
        versions = importlib.import_module("synapse.api.room_versions").KNOWN_ROOM_VERSIONS
        self.version = versions[room.version.id]
        make = importlib.import_module("synapse.events").make_event_from_dict
        self.room = room
        self.make = make
        self.events = {
            event_id: make(event.pdu, self.version, {}, event.rejected)
            for event_id, event in room.events.items()
        }
        self.store = OracleStore(self.events)

    def verdict(self, event: conduit.Event) -> bool:
        state = self.room.auth_state(event)
        try:
            self.auth.check_state_dependent_auth_rules(
                self.events[event.event_id], [self.events[e.event_id] for e in state.values()]
            )
        except self.errors.SynapseError:
            return False
        return True

    def verdict_on_auth_events(self, event: conduit.Event) -> bool:
        theirs = self.make(event.pdu, self.version, {})
        task = self.auth.check_state_independent_auth_rules(self.store, theirs)
        try:
            finished(task)
        except self.errors.SynapseError:
            return False
        return True

    def resolve(self, sets: list[dict[conduit.StateKey, str]]) -> dict[conduit.StateKey, str]:
        room = self.room
        if room.version.resolution == "v1":
            task = self.resolution.resolve_events_with_store(
                room.room_id, self.version, sets, None, self.store.get_events
            )
        else:
            task = self.resolution.resolve_events_with_store(
                self.store, room.room_id, self.version, sets, None, self.store
            )
        return dict(finished(task))


def random_auth_events(room: RandomRoom) -> conduit.Event:
    """Some event of the room with auth_events that as a rule are wrong.

    From version 12 the create event is not among them: Synapse fails on it with a RuntimeError.
    """
    create, *others = room.events.values()
    pdu = dict(room.random.choice(others).pdu)
    if not room.version.room_id_is_hash:
        others.append(create)
    entries = [event.event_id for event in others if event.is_state]
    named = room.random.choices(entries, k=room.pick(0, 1, 2, 3))
    if room.random.random() < 0.7:
        named += conduit.referenced_ids(room.version, pdu["auth_events"])
    pdu["auth_events"] = [
        [event_id, {}] if room.version.explicit_event_ids else event_id for event_id in named
    ]
    return conduit.make_event(room.version, pdu)


def compare_auth_events(room: RandomRoom, oracle: Oracle) -> bool:
    event = random_auth_events(room)
    create = room.events.get("$" + room.room_id[1:])
    try:
        entries = [room.events[event_id] for event_id in event.auth_events]
        conduit.check_auth_events(event, entries, create)
    except conduit.AuthError:
        assert not oracle.verdict_on_auth_events(event), event.pdu
        return False
    assert oracle.verdict_on_auth_events(event), event.pdu
    return True


def compare_with_oracle(version: str, seed: int) -> Counter[str]:
    """Build one room and hold every verdict and every resolution in it against Synapse's."""
    room = RandomRoom(version, seed)
    room.grow(room.pick(10, 20, 30, 40, 120), room.pick(2, 4, 8, 15))
    oracle = Oracle(room)
    where = f"ORACLE_SEED={seed} version={version}"
    counts: Counter[str] = Counter(rooms=1, events=len(room.events))
    for event_id, event in room.events.items():
        assert oracle.events[event_id].event_id == event_id, where
        if event.type != "m.room.create":
            counts["accepted" if event.rejected is None else "rejected"] += 1
            assert oracle.verdict(event) == (event.rejected is None), (where, event, event.rejected)
    for _ in range(8):
        counts["right auth_events" if compare_auth_events(room, oracle) else "wrong ones"] += 1
    ids = [*room.events]
    extra = [room.random.sample(ids, min(len(ids), room.pick(2, 3, 5))) for _ in range(5)]
    for prev in [*room.merges, *extra]:
        sets = [room.after[event_id] for event_id in prev]
        ours = conduit.resolve_state(room.version, sets, room.events.get)
        counts["resolutions"] += 1
        counts["conflicts"] += any(state != sets[0] for state in sets)
        assert ours == oracle.resolve(sets), (where, prev)
        room.random.shuffle(sets)
        assert ours == conduit.resolve_state(room.version, sets, room.events.get), where
    return counts


def oracle_run(version: str, rooms: int) -> None:
    pytest.importorskip("synapse.event_auth", exc_type=ImportError)
    logging.getLogger("synapse").setLevel(logging.CRITICAL)
    start = int(os.environ.get("ORACLE_SEED", "0")) or random.randrange(2**40)  # noqa: S311  rooms, not secrets
    rooms = 1 if "ORACLE_SEED" in os.environ else rooms
    print(f"oracle: version {version}, seeds {start} to {start + rooms - 1}")
    counts: Counter[str] = Counter()
    for seed in range(start, start + rooms):
        counts += compare_with_oracle(version, seed)
    print(f"oracle: version {version}: {dict(counts)}")
    assert rooms == 1 or counts["rejected"] > counts["rooms"] < counts["accepted"]


@pytest.mark.parametrize("version", conduit.ROOM_VERSIONS)
def test_oracle(version: str) -> None:
    oracle_run(version, 30)


@deep
@pytest.mark.parametrize("version", conduit.ROOM_VERSIONS)
def test_oracle_deep(version: str) -> None:
    """Ten thousand rooms for each of the three algorithms."""
    oracle_run(version, 1000 if 2 <= int(version) <= 11 else 10_000)


# ── 8.3  Properties ──────────────────────────────────────────────────────────


@settings(max_examples=60)
@given(st.sampled_from([*conduit.ROOM_VERSIONS]), st.integers(0, 2**32), st.data())
def test_resolution_properties(version: str, seed: int, data: st.DataObject) -> None:
    """Order makes no difference, nor does repetition; agreement is kept; nothing is made up."""
    room = RandomRoom(version, seed)
    room.grow(15, 6)
    ids = data.draw(st.lists(st.sampled_from([*room.events]), min_size=2, max_size=5))
    sets = [room.after[event_id] for event_id in ids]
    resolved = conduit.resolve_state(room.version, sets, room.events.get)
    mixed = data.draw(st.permutations(sets + sets))
    assert conduit.resolve_state(room.version, mixed, room.events.get) == resolved
    assert conduit.resolve_state(room.version, [resolved, resolved], room.events.get) == resolved
    for key, event_id in resolved.items():
        assert room.events[event_id].key == key
        assert room.events[event_id].rejected is None
    for key, event_id in sets[0].items():
        if all(state.get(key) == event_id for state in sets):
            assert resolved[key] == event_id


@settings(max_examples=60)
@given(st.sampled_from([*conduit.ROOM_VERSIONS]), st.integers(0, 2**32))
def test_resolution_with_events_missing(version: str, seed: int) -> None:
    """A lookup that knows only some events, or none, is no reason to fail."""
    room = RandomRoom(version, seed)
    room.grow(15, 6)
    sets = [room.after[event_id] for event_id in room.random.sample([*room.events], 4)]
    for share in (0.0, 0.5, 0.9):
        known = {key: e for key, e in room.events.items() if room.random.random() < share}
        resolved = conduit.resolve_state(room.version, sets, known.get)
        assert resolved == conduit.resolve_state(room.version, sets[::-1], known.get)


def test_resolution_of_nothing_and_of_one() -> None:
    for version in conduit.ROOM_VERSIONS.values():
        assert conduit.resolve_state(version, [], {}.get) == {}
        assert conduit.resolve_state(version, [{("a", ""): "$x"}], {}.get) == {("a", ""): "$x"}


# ── 8.4  Auth chains ─────────────────────────────────────────────────────────


class KeptGraph(conduit.AuthGraph):
    """A graph whose heights are known beforehand, and which counts what it is asked."""

    def __init__(self, events: Mapping[str, conduit.Event]) -> None:
        super().__init__(events.get)
        self.kept: dict[str, int] = {}
        self.asked = 0
        for event_id, event in events.items():
            self.kept[event_id] = 1 + max(
                (self.kept.get(e, 0) for e in event.auth_events), default=0
            )

    def height(self, event_id: str) -> int:
        return self.kept[event_id]

    def parents(self, event_id: str) -> Iterable[str]:
        self.asked += 1
        return super().parents(event_id)


@settings(max_examples=60)
@given(st.sampled_from([*conduit.ROOM_VERSIONS]), st.integers(0, 2**32))
def test_auth_chains_against_the_definition(version: str, seed: int) -> None:
    room = RandomRoom(version, seed)
    room.grow(20, 8)

    def chain(ids: Iterable[str]) -> set[str]:
        found, stack = set[str](), [*ids]
        while stack:
            event_id = stack.pop()
            if event_id not in found:
                found.add(event_id)
                stack += room.events[event_id].auth_events
        return found

    sets = [set(room.after[e].values()) for e in room.random.sample([*room.events], 4)]
    chains = [chain(ids) for ids in sets]
    difference = set.union(*chains) - set.intersection(*chains)
    some = set(room.random.sample([*room.events], 5))
    between = {e for e in chain(some) if not some.isdisjoint(chain([e]))}
    for graph in (conduit.AuthGraph(room.events.get), KeptGraph(room.events)):
        assert graph.difference(sets) == difference
        assert graph.subgraph(some) == between


class ChainRoom:
    """A room in which one user makes as many events as a test wants, all of them allowed."""

    def __init__(self, version: str) -> None:
        self.court = Court(conduit.ROOM_VERSIONS[version])
        self.events = {self.court.create.event_id: self.court.create}
        self.joined = self.put("m.room.member", CREATOR, [], membership="join")
        self.common = {self.court.create.key: self.court.create.event_id}
        self.common[self.joined.key] = self.joined.event_id

    def put(
        self, event_type: str, state_key: str, auth: list[str], **content: Any
    ) -> conduit.Event:
        number = len(self.events)
        base = [] if self.court.version.room_id_is_hash else [self.court.create.event_id]
        base += [self.joined.event_id] if number > 1 else []
        prev = [self.court.create.event_id] if number == 1 else []
        fields = {"content": content, "state_key": state_key, "origin_server_ts": number % 97}
        more = {"prev_events": prev, "auth_events": base + auth, "depth": number}
        event = self.court.event(event_type, CREATOR, **fields, **more)
        self.events[event.event_id] = event
        return event

    def levels(self, auth: list[str]) -> conduit.Event:
        users = {} if self.court.version.privileged_creators else {CREATOR: 100}
        number = len(self.events) % 50
        return self.put("m.room.power_levels", "", auth, users=users, ban=number)

    def line(self, start: str, length: int) -> list[str]:
        ids = [start]
        for _ in range(length):
            ids.append(self.levels([ids[-1]]).event_id)
        return ids

    def resolve(self, *ends: dict[conduit.StateKey, str]) -> dict[conduit.StateKey, str]:
        sets = [{**self.common, **end} for end in ends]
        return conduit.resolve_state(self.court.version, sets, self.events.get)


def test_auth_difference_stays_near_the_fork() -> None:
    """Two branches of a room with a long past: the past is not walked when heights are kept."""
    room = ChainRoom("11")
    past = room.line(room.levels([]).event_id, 2000)
    ends = [{*room.common.values(), room.line(past[-1], 5)[-1]} for _ in range(2)]
    graph = KeptGraph(room.events)
    assert len(graph.difference(ends)) == 10
    assert graph.asked < 30


# ── 8.5  Hostile graphs ──────────────────────────────────────────────────────

POWER_KEY = ("m.room.power_levels", "")


def deep_line(room: ChainRoom, size: int) -> list[Json]:
    """One branch has never heard of a very long line of power levels."""
    line = room.line(room.levels([]).event_id, size)
    return [{POWER_KEY: line[0]}, {POWER_KEY: line[-1]}]


def two_lines(room: ChainRoom, size: int) -> list[Json]:
    """Two long lines from one start."""
    start = room.levels([]).event_id
    return [{POWER_KEY: room.line(start, size // 2)[-1]} for _ in range(2)]


def side_lines(room: ChainRoom, size: int) -> list[Json]:
    """Ordinary state that stands all along a line that is not the main line."""
    line = room.line(room.levels([]).event_id, size // 2)
    ends: list[Json] = [{POWER_KEY: line[0]}, {POWER_KEY: line[-1]}]
    for number in range(size // 2):
        event = room.put("test", str(number), [line[number * 7 % len(line)]])
        ends[number % 2][event.key] = event.event_id
    return ends


def wide_fork(room: ChainRoom, size: int) -> list[Json]:
    """Five hundred branches that contradict each other everywhere."""
    start = room.levels([]).event_id
    ends: list[Json] = [{POWER_KEY: start} for _ in range(500)]
    for number in range(size):
        event = room.put("test", str(number // 500 % 10), [start], number=number)
        ends[number % 500][event.key] = event.event_id
    return ends


def dense_line(room: ChainRoom, size: int) -> list[Json]:
    """Each event names the eight before it."""
    line = [room.levels([]).event_id]
    for _ in range(size):
        line.append(room.levels(line[:-9:-1]).event_id)
    return [{POWER_KEY: line[0]}, {POWER_KEY: line[-1]}]


@slow
@pytest.mark.parametrize("version", ["2", "12"])
@pytest.mark.parametrize("shape", [deep_line, two_lines, side_lines, wide_fork, dense_line])
def test_sec_14_hostile_graphs_end_in_time(version: str, shape: Any) -> None:
    """50,000 events within 10 s of CPU."""
    room = ChainRoom(version)
    ends = shape(room, 50_000)
    began = time.process_time()
    resolved = room.resolve(*ends)
    took = time.process_time() - began
    print(f"{shape.__name__}, version {version}: {took:.2f} s for {len(room.events)} events")
    assert took < 10
    assert POWER_KEY in resolved


def test_cycles_end() -> None:
    """Versions 1 and 2 can spell auth events in a circle; nothing good comes of it, but no hang."""
    for version in ("1", "2"):
        room = ChainRoom(version)
        line = room.line(room.levels([]).event_id, 20)
        room.events[line[0]].auth_events.append(line[-1])
        room.events[line[5]].auth_events.append(line[15])
        resolved = room.resolve({POWER_KEY: line[3]}, {POWER_KEY: line[12]}, {POWER_KEY: line[18]})
        assert resolved[room.joined.key] == room.joined.event_id


# ── 8.6  Known rooms ─────────────────────────────────────────────────────────


def test_version_1_takes_what_only_some_states_have() -> None:
    for version in ("1", "2"):
        room = ChainRoom(version)
        levels = room.levels([])
        topic = room.put("m.room.topic", "", [levels.event_id])
        key = topic.key
        resolved = room.resolve({POWER_KEY: levels.event_id, key: topic.event_id}, {})
        assert resolved[key] == topic.event_id


def fork_with_ban(version: str) -> tuple[Court, dict[str, conduit.Event], list[Any]]:
    """ALICE bans BOB on one branch while BOB sets the topic on the other, later by his clock."""
    court = Court(conduit.ROOM_VERSIONS[version])
    levels = {"users": {CREATOR: 100, ALICE: 50, BOB: 50 - 1}, "events": {"m.room.topic": 0}}
    court.furnish(ALL_JOINED, levels, "public", None)
    base = {key: event.event_id for key, event in court.state.items()}
    events = {event.event_id: event for event in court.state.values()}

    def act(event_type: str, sender: str, **fields: Any) -> conduit.Event:
        event = court.event(event_type, sender, **fields)
        auth = [base[key] for key in conduit.auth_types_of(event) if key in base]
        event = court.event(event_type, sender, **fields, auth_events=auth)
        events[event.event_id] = event
        return event

    ban = act("m.room.member", ALICE, content={"membership": "ban"}, state_key=BOB, depth=10)
    topic = act("m.room.topic", BOB, content={"topic": "mine"}, state_key="", depth=10)
    return court, events, [{**base, ban.key: ban.event_id}, {**base, topic.key: topic.event_id}]


@pytest.mark.parametrize("version", conduit.ROOM_VERSIONS)
def test_bans_win_over_what_the_banned_did_meanwhile(version: str) -> None:
    """SS-API "Soft failure": version 1 lets the evader's topic stand, later ones do not."""
    court, events, sets = fork_with_ban(version)
    resolved = conduit.resolve_state(court.version, sets, events.get)
    assert events[resolved["m.room.member", BOB]].membership == "ban"
    assert (("m.room.topic", "") in resolved) == (version == "1")


# ═════════════════════════════════════════════════════════════════════════════
#  9. STATE GROUPS
# ═════════════════════════════════════════════════════════════════════════════


def grow_groups(folder: Path, changes: list[dict[int, int]], check: Callable[..., None]) -> None:
    """Make a state group for each set of changes and call check(groups, ids, states)."""

    async def story() -> None:
        async with open_store(folder) as database:
            groups = conduit.StateGroups(database, conduit.Stream(database), 2**20)
            parent: int | None = None
            ids: list[int] = []
            states: list[dict[int, int]] = []
            for change in changes:
                parent = groups.extend(1, parent, change)
                ids.append(parent)
                merged = {**(states[-1] if states else {}), **change}
                states.append({key: value for key, value in merged.items() if value})
            check(groups, ids, states)

    asyncio.run(story())


STATE_CHANGE = st.dictionaries(st.integers(1, 12), st.integers(0, 50), min_size=1, max_size=3)


@given(changes=st.lists(STATE_CHANGE, min_size=1, max_size=70), data=st.data())
@settings(max_examples=40)
def test_state_groups_remember_every_state(
    changes: list[dict[int, int]], data: st.DataObject
) -> None:
    def check(groups: conduit.StateGroups, ids: list[int], states: list[dict[int, int]]) -> None:
        for group, state in zip(ids, states, strict=True):
            assert groups.read(group) == state
            for key in range(13):
                assert groups.lookup(group, key) == state.get(key)
        old, new = (data.draw(st.integers(0, len(ids) - 1)) for _ in range(2))
        expected = {
            key: value for key, value in states[new].items() if states[old].get(key) != value
        }
        assert groups.difference(ids[old], ids[new]) == expected

    with tempfile.TemporaryDirectory() as folder:
        grow_groups(Path(folder), changes, check)


def test_state_of_a_big_room_costs_little(tmp_path: Path) -> None:
    """10,000 members: at most 200 bytes and a few rows for each further state event."""
    changes = [{number: number + 1} for number in range(1, 10_001)]

    def check(groups: conduit.StateGroups, ids: list[int], _states: Any) -> None:
        size = groups.database.value("SELECT SUM(LENGTH(delta)) FROM state_groups")
        assert size / len(ids) < 200
        assert max(len(list(groups.chain(group))) for group in ids) <= 14
        begin = time.perf_counter()
        assert len(groups.read(ids[7_000])) == 7_001
        assert time.perf_counter() - begin < 0.1

    grow_groups(tmp_path, changes, check)


# ═════════════════════════════════════════════════════════════════════════════
#  10. THE ROOM STORE
# ═════════════════════════════════════════════════════════════════════════════


def test_sec_17_redaction_takes_the_content_from_the_disk(server: Server, alice: Client) -> None:
    room_id = alice.create_room()
    secret = unique("secret")
    event_id = alice.send_text(room_id, secret)
    redaction = alice.redact(room_id, event_id, reason="a slip")
    event = ok(alice.get(("rooms", room_id, "event", event_id)))
    assert event["content"] == {}
    assert event["unsigned"]["redacted_because"]["event_id"] == redaction
    assert event["unsigned"]["redacted_because"]["content"]["reason"] == "a slip"
    with contextlib.closing(sqlite3.connect(server.database)) as connection:
        found = connection.execute(
            "SELECT COUNT(*) FROM events WHERE INSTR(CAST(pdu AS TEXT), ?)", (secret,)
        )
        assert found.fetchone() == (0,)


def test_sec_17_redaction_of_a_redaction_ends(alice: Client) -> None:
    room_id = alice.create_room()
    first = alice.redact(room_id, alice.send_text(room_id, "x"))
    second = alice.redact(room_id, first)
    alice.redact(room_id, second)
    assert ok(alice.get(("rooms", room_id, "event", first)))["unsigned"]["redacted_because"]
    assert alice.messages(room_id)["chunk"]


def test_members_see_each_others_redactions_only_with_power(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    event_id = alice.send_text(room_id, "mine")
    response = bob.put(("rooms", room_id, "redact", event_id, unique("txn")), {})
    fails(response, 403, "M_FORBIDDEN")
    alice.redact(room_id, bob.send_text(room_id, "yours"))


def test_redactions_of_redactions_are_not_nested(alice: Client) -> None:
    """Or a chain of them makes answers that grow without end, and runs out of stack."""
    room_id = alice.create_room()
    target = event_id = alice.send_text(room_id, "x")
    for _ in range(4):
        target, event_id = event_id, alice.redact(room_id, event_id)
    because = ok(alice.get(("rooms", room_id, "event", target)))["unsigned"]["redacted_because"]
    assert because["event_id"] == event_id
    for event in alice.messages(room_id)["chunk"]:
        because = event["unsigned"].get("redacted_because", {})
        assert "redacted_because" not in because.get("unsigned", {})


def test_room_in_hand_is_read_again_when_writes_are_undone(tmp_path: Path) -> None:
    user = "@a:here.test"

    async def story() -> None:
        async with open_store(tmp_path) as database:
            key, stream = conduit.SigningKey.generate(), conduit.Stream(database)
            rooms = conduit.Rooms(key, database, stream, "here.test", 2**20, 100)
            room = rooms.create("11", user, {"room_version": "11"})
            rooms.send(room, user, "m.room.member", {"membership": "join"}, state_key=user)
            before = (room.group, room.last_pos, list(room.extremities), dict(room.state))
            with pytest.raises(ValueError, match="stop"), database.write():
                rooms.send(room, user, "m.room.topic", {"topic": "x"}, state_key="")
                raise ValueError("stop")
            after = (room.group, room.last_pos, list(room.extremities), dict(room.state))
            assert after == before
            assert (room.members(), room.joined_count) == ([user], 1)
            assert rooms.get(room.room_id) is room
            event = rooms.send(room, user, "m.room.message", {"body": "goes on"})
            assert rooms.events_between(room, 0, stream.position, 1) == [event]

    asyncio.run(story())


# ═════════════════════════════════════════════════════════════════════════════
#  11. HISTORY VISIBILITY AND THE CLIENT FORMAT
# ═════════════════════════════════════════════════════════════════════════════

# One story in a room of each visibility; who sees which moment of it, through which door. At each
# moment the host takes its number as name, and says it:
#   0 before the invitation · 1 while invited · 2 while joined · 3 after leaving ·
#   4 after joining again

ROLES: Final = (
    *("stranger", "knocking", "invited", "joined"),
    *("left", "rejoined", "banned", "forgotten"),  # who left and forgot the room
)
VISIBILITIES: Final = ("world_readable", "shared", "invited", "joined")
Cells = tuple[str, ...]  # the moments that each of ROLES sees
ALL: Final[Cells] = ("01234",) * 8

# fmt: off
EVENTS: Final[dict[str, Cells]] = {
    # visibility     stranger knocking invited joined left  rejoined banned forgotten
    "world_readable": ALL,
    "shared":        ("", "", "",     "01234", "012", "01234", "012", ""),
    "invited":       ("", "", "1234", "1234",  "12",  "124",   "12",  ""),
    "joined":        ("", "", "",     "234",   "2",   "24",    "2",   ""),
}
# In a sync, only those who are or were in have a timeline; it ends where the user left; and what
# lies before the gap at a rejoin is for /messages.
SYNCED: Final[dict[str, Cells]] = {
    "world_readable": ("", "", "", "01234", "012", "01234", "012", ""),
    "shared":         ("", "", "", "01234", "012", "01234", "012", ""),
    "invited":        ("", "", "", "1234",  "12",  "4",     "12",  ""),
    "joined":         ("", "", "", "234",   "2",   "4",     "2",   ""),
}
SYNCED_STATE: Final = dict.fromkeys(VISIBILITIES, ("", "", "", "4", "2", "4", "2", ""))
# The state is that of now, or of when one left.
SETTINGS_SEEN: Final[dict[str, Cells]] = {**SYNCED_STATE, "world_readable": ("4",) * 8}
MEMBERS_ONLY: Final = dict.fromkeys(VISIBILITIES, ("", "", "", "4", "", "4", "", ""))
# The members at each moment: refused (-) where its message cannot be seen; after one has left, the
# members of then.
OUTSIDE: Final = "-----"
AT: Final[dict[str, Cells]] = {
    "world_readable": ALL,
    "shared":  (OUTSIDE, OUTSIDE, OUTSIDE, "01234", "01222", "01234", "01222", OUTSIDE),
    "invited": (OUTSIDE, OUTSIDE, OUTSIDE, "-1234", "-1222", "-12-4", "-1222", OUTSIDE),
    "joined":  (OUTSIDE, OUTSIDE, OUTSIDE, "--234", "--222", "--2-4", "--222", OUTSIDE),
}
# fmt: on
NEWEST: Final[dict[str, Cells]] = {
    visibility: tuple(seen[-1:] for seen in cells) for visibility, cells in EVENTS.items()
}


@dataclass
class RoomStory:
    """A room, its people, and by moment the message's id and a token just behind it."""

    host: Client
    room_id: str
    people: dict[str, Client]
    sent: list[str] = dataclasses.field(default_factory=list)
    tokens: list[str] = dataclasses.field(default_factory=list)

    def moment(self) -> None:
        number = str(len(self.sent))
        content = {"membership": "join", "displayname": number}
        self.host.set_state(self.room_id, "m.room.member", content, self.host.user_id)
        self.sent.append(self.host.send_text(self.room_id, number))
        self.tokens.append(self.host.sync()["next_batch"])

    def name_in(self, events: Iterable[Json]) -> str:
        """The moment that a list of state or member events is of."""
        return "".join(e["content"]["displayname"] for e in events
                       if e.get("state_key") == self.host.user_id)  # fmt: skip

    def numbers(self, ids: set[str]) -> str:
        return "".join(str(n) for n, event_id in enumerate(self.sent) if event_id in ids)


def story_of_visibility(server: Server, visibility: str) -> RoomStory:
    setting = {"history_visibility": visibility}
    host = register(server)
    room_id = host.create_room(
        initial_state=[
            {"type": "m.room.history_visibility", "content": setting},
            {"type": "m.room.join_rules", "content": {"join_rule": "knock"}},
        ]
    )
    story = RoomStory(host, room_id, {role: register(server) for role in ROLES})
    people = story.people
    story.moment()
    ok(people["knocking"].post(("knock", room_id)))
    for role in ROLES[2:]:
        host.invite(room_id, people[role])
    story.moment()
    for role in ROLES[3:]:
        people[role].join(room_id)
    story.moment()
    for role in ("left", "rejoined", "forgotten"):
        people[role].leave(room_id)
    ok(people["forgotten"].post(("rooms", room_id, "forget")))
    ok(host.post(("rooms", room_id, "ban"), {"user_id": people["banned"].user_id}))
    story.moment()
    host.invite(room_id, people["rejoined"])
    people["rejoined"].join(room_id)
    story.moment()
    return story


def answer_or_none(response: httpx.Response, *refusals: int) -> Any:
    return None if response.status_code in refusals else ok(response)


def seen_by_event(reader: Client, story: RoomStory) -> str:
    found = {i for i in story.sent
             if answer_or_none(reader.get(("rooms", story.room_id, "event", i)), 404)}  # fmt: skip
    return story.numbers(found)


def seen_by_messages(reader: Client, story: RoomStory) -> str:
    answer = reader.get(("rooms", story.room_id, "messages"), params={"dir": "b", "limit": 100})
    chunk = (answer_or_none(answer, 403) or {"chunk": []})["chunk"]
    return story.numbers({event["event_id"] for event in chunk})


def seen_by_lazy_members(reader: Client, story: RoomStory) -> str:
    wanted = {"types": ["m.room.message"], "lazy_load_members": True}
    query = {"dir": "b", "limit": 100, "filter": json.dumps(wanted)}
    answer = answer_or_none(reader.get(("rooms", story.room_id, "messages"), params=query), 403)
    return story.name_in((answer or {}).get("state", []))


def contexts(reader: Client, story: RoomStory, limit: int) -> Iterator[Json]:
    for event_id in story.sent:
        path = ("rooms", story.room_id, "context", event_id)
        answer = answer_or_none(reader.get(path, params={"limit": limit}), 404)
        if answer is not None:
            yield answer


def seen_by_context(reader: Client, story: RoomStory) -> str:
    parts = ("events_before", "events_after")
    found = {
        event["event_id"]
        for answer in contexts(reader, story, 100)
        for event in [answer["event"], *(one for part in parts for one in answer[part])]
    }
    return story.numbers(found)


def seen_by_context_state(reader: Client, story: RoomStory) -> str:
    return "".join(story.name_in(answer["state"]) for answer in contexts(reader, story, 0))


def synced_room(reader: Client, story: RoomStory, **query: Any) -> Json:
    wanted = {"room": {"include_leave": True, "timeline": {"limit": 100}}}
    rooms = reader.sync(filter=wanted, **query).get("rooms", {})
    parts = [rooms.get(section, {}).get(story.room_id) for section in ("join", "leave")]
    return next((part for part in parts if part is not None), {})


def seen_by_sync(reader: Client, story: RoomStory) -> str:
    events = synced_room(reader, story).get("timeline", {}).get("events", [])
    return story.numbers({event["event_id"] for event in events})


def seen_by_sync_state(reader: Client, story: RoomStory) -> str:
    prefix = "org.matrix.msc4222."
    part = synced_room(reader, story, **{f"{prefix}use_state_after": "true"})
    return story.name_in(part.get(f"{prefix}state_after", {}).get("events", []))


def seen_by_state(reader: Client, story: RoomStory) -> str:
    return story.name_in(answer_or_none(reader.get(("rooms", story.room_id, "state")), 403) or [])


def seen_by_state_key(reader: Client, story: RoomStory) -> str:
    path = ("rooms", story.room_id, "state", "m.room.member", story.host.user_id)
    return str((answer_or_none(reader.get(path), 403) or {}).get("displayname", ""))


def members_seen(reader: Client, story: RoomStory, **query: str) -> str | None:
    response = reader.get(("rooms", story.room_id, "members"), params=query)
    answer = answer_or_none(response, 403)
    return None if answer is None else story.name_in(answer["chunk"])


def seen_by_members(reader: Client, story: RoomStory) -> str:
    return members_seen(reader, story) or ""


def seen_by_members_at(reader: Client, story: RoomStory) -> str:
    return "".join(members_seen(reader, story, at=token) or "-" for token in story.tokens)


def seen_by_joined_members(reader: Client, story: RoomStory) -> str:
    response = reader.get(("rooms", story.room_id, "joined_members"))
    joined = (answer_or_none(response, 403) or {"joined": {}})["joined"]
    return str(joined.get(story.host.user_id, {}).get("display_name", ""))


# A door is a function from a reader and a story to the moments seen, and the table of what it is
# to show.
DOORS: Final[list[tuple[Callable[[Client, RoomStory], str], Mapping[str, Cells]]]] = [
    (seen_by_event, EVENTS),
    (seen_by_messages, EVENTS),
    (seen_by_lazy_members, NEWEST),
    (seen_by_context, EVENTS),
    (seen_by_context_state, EVENTS),
    (seen_by_sync, SYNCED),
    (seen_by_sync_state, SYNCED_STATE),
    (seen_by_state, SETTINGS_SEEN),
    (seen_by_state_key, SETTINGS_SEEN),
    (seen_by_members, SETTINGS_SEEN),
    (seen_by_members_at, AT),
    (seen_by_joined_members, MEMBERS_ONLY),
]


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_sec_19_history_visibility_on_every_door(server: Server, visibility: str) -> None:
    story = story_of_visibility(server, visibility)
    expected = {
        (door.__name__, role): cell
        for door, table in DOORS
        for role, cell in zip(ROLES, table[visibility], strict=True)
    }
    found = {
        (door.__name__, role): door(story.people[role], story)
        for door, _ in DOORS
        for role in ROLES
    }
    assert found == expected


def visible_by_the_specification(events: list[Json], user_id: str) -> list[str]:
    """The ids of those events that the user may see, as the specification puts it.

    Spec: CS-API "Room history visibility", "Server behaviour", rule by rule.
    """
    setting, membership = "shared", "leave"
    around = []  # what each event saw before and after it
    for event in events:
        before = setting, membership
        if event["type"] == "m.room.history_visibility":
            value = event["content"].get("history_visibility")
            setting = value if value in VISIBILITIES else "shared"
        if event["type"] == "m.room.member" and event["state_key"] == user_id:
            membership = event["content"]["membership"]
        around.append({before, (setting, membership)})
    visible = []
    for number, event in enumerate(events):
        joins_later = any(
            after["type"] == "m.room.member"
            and after["state_key"] == user_id
            and after["content"]["membership"] == "join"
            for after in events[number + 1 :]
        )
        if any(
            value == "world_readable"
            or member == "join"
            or (value == "shared" and joins_later)
            or (value == "invited" and member == "invite")
            for value, member in around[number]
        ):
            visible.append(event["event_id"])
    return visible


def random_visibility_story(host: Client, watcher: Client, room_id: str, seed: int) -> None:
    """Settings and memberships that come and go, with a message between any two of them."""
    rng = random.Random(seed)  # noqa: S311  a story, no secret
    room, about = ("rooms", room_id), {"user_id": watcher.user_id}
    for number in range(25):
        step = rng.choice(["setting", "invite", "join", "join", "leave", "ban", "unban", "name"])
        if step == "setting":
            value = rng.choice([*VISIBILITIES, "nonsense"])
            host.set_state(room_id, "m.room.history_visibility", {"history_visibility": value})
        elif step in ("join", "leave"):
            watcher.post((*room, step))  # which may be refused: then nothing happens
        elif step == "name":
            content = {"membership": "join", "displayname": str(number)}
            watcher.put((*room, "state", "m.room.member", watcher.user_id), content)
        else:
            host.post((*room, step), about)
        host.send_text(room_id, str(number))


@pytest.mark.parametrize("seed", range(40 if os.environ.get("DEEP") else 3))
def test_sec_19_visibility_against_the_specification(alice: Client, bob: Client, seed: int) -> None:
    room_id = alice.create_room(preset="public_chat")
    random_visibility_story(alice, bob, room_id, seed)
    events = alice.messages(room_id, "f", limit=1000)["chunk"]
    allowed = visible_by_the_specification(events, bob.user_id)
    ids = [event["event_id"] for event in events]
    answers = {i: answer_or_none(bob.get(("rooms", room_id, "event", i)), 404) for i in ids}
    assert [event_id for event_id in ids if answers[event_id]] == allowed
    page = answer_or_none(bob.get(("rooms", room_id, "messages"), dir="f", limit=1000), 403)
    if page is not None:
        assert [event["event_id"] for event in page["chunk"]] == allowed


def test_own_leave_is_seen_whatever_the_visibility(
    server: Server, alice: Client, bob: Client
) -> None:
    state = {"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}
    room_id = alice.create_room(bob, initial_state=[state])
    bob.poll()
    bob.leave(room_id)
    left = bob.poll()["rooms"]["leave"][room_id]
    assert [event["content"]["membership"] for event in left["timeline"]["events"]] == ["leave"]


# ═════════════════════════════════════════════════════════════════════════════
#  12. HTTP SERVER
#
#  Raw bytes over real sockets: what must be refused, in which order answers
#  come, what slow and rude clients can do. The time limits are cut to fractions
#  of a second, so that the tests of them are over before the coffee is.
# ═════════════════════════════════════════════════════════════════════════════

WebHandler = Callable[[conduit.Request], Awaitable[conduit.Response]]
HELLO: Final = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
BIG: Final = 64 << 20  # more than the kernel takes off our hands
SHORT_LIMITS: Final = {
    "HEAD_SECONDS": 0.6,
    "IDLE_SECONDS": 1.0,
    "BODY_SECONDS": 0.5,
    "WRITE_SECONDS": 0.5,
    "LINGER_SECONDS": 0.3,
    "SWEEP_SECONDS": 0.05,
}


def json_response(value: Json) -> conduit.Response:
    """A JSON object as an answer."""
    return conduit.Response(body=conduit.encode_json(value))


async def describe(request: conduit.Request) -> conduit.Response:
    """The handler of most tests: answers with what it has understood of the request."""
    body = await request.stream.read()
    if request.path == "/boom":
        raise RuntimeError(f"a fault that quotes {body.decode()} and {request.raw_query}")
    if request.path == "/poll":
        news = asyncio.get_running_loop().create_future()
        came = await request.wait(news, 20)
        return json_response({"came": came})
    if request.path == "/big":
        return conduit.Response(body=bytes(BIG), content_type="application/octet-stream")
    if request.path == "/header":
        return conduit.Response(headers={"X-Name": request.arg("name", "") or ""})
    if request.path == "/blocks":
        return conduit.Response(body=three_blocks(), content_type="text/plain")
    if request.path.startswith("/file/"):
        path = Path("/" + "/".join(request.segments[1:]))
        return conduit.Response(
            body=conduit.FileBody(path, path.stat().st_size),
            headers={"ETag": '"tag"'},
            content_type="image/png",
        )
    described = {
        "method": request.method,
        "segments": request.segments,
        "query": request.query,
        "body": body.decode("latin-1"),
        "address": request.address,
        "local": request.is_local(),
    }
    return json_response(described)


async def three_blocks() -> AsyncIterator[bytes]:
    """A body that is made while it is sent."""
    for word in (b"one ", b"", b"two ", b"three"):
        await asyncio.sleep(0)
        yield word


class Web:
    """An HttpServer of this process, its loop in a thread, and raw sockets to talk to it."""

    def __init__(
        self, handler: WebHandler = describe, address: str = "127.0.0.1", **options: Any
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.tls = options.pop("tls", None)
        self.http: conduit.HttpServer = self.run(self._start(handler, address, options))
        self.place: Any = address
        if not address.startswith("/"):
            host, _, port = self.http.names[0].partition("://")[2].rpartition(":")
            self.place = (host.strip("[]"), int(port))

    async def _start(self, handler: WebHandler, address: str, options: Json) -> conduit.HttpServer:
        options = {"max_request_size": 1 << 20, **options}
        server = conduit.HttpServer(handler, **options)
        await server.listen(address, 0, self.tls)
        return server

    def run(self, work: Awaitable[Any], timeout: float = 20) -> Any:
        """Await something on the server's loop."""

        async def awaited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(timeout)

    def connect(self, timeout: float = 10) -> socket.socket:
        """A socket to the server."""
        if isinstance(self.place, str):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(timeout)
            sock.connect(self.place)
            return sock
        return socket.create_connection(self.place, timeout)

    def say(self, data: bytes, timeout: float = 10) -> bytes:
        """Send bytes, keep the sending side open, and return all until the server hangs up."""
        with self.connect(timeout) as sock:
            sock.sendall(data)
            return until_closed(sock)

    def ask(self, data: bytes) -> list[Answer]:
        """The answers to requests of which the last one asks to close."""
        return answers_in(self.say(data))

    def close(self) -> None:
        """Stop the server and its loop."""
        self.run(self.http.stop(1))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()


@dataclass
class Answer:
    """One parsed HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Json:
        """Its JSON body."""
        return cast("Json", json.loads(self.body))


def until_closed(sock: socket.socket) -> bytes:
    """All bytes until the peer hangs up, with or without a reset."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            received += data
    return received


def answers_in(data: bytes, heads_only: bool = False) -> list[Answer]:
    """All answers in a stream of bytes; strict, so that a malformed one fails the test."""
    answers = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, f"no end of head in {head!r}"
        status_line, *lines = head.decode("latin-1").split("\r\n")
        assert re.fullmatch(r"HTTP/1\.1 [1-5]\d\d [A-Za-z -]+", status_line), status_line
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        status = int(status_line.split(" ")[1])
        body = b""
        if headers.get("transfer-encoding") == "chunked" and not heads_only:
            body, data = dechunked(data)
        elif status >= 200 and not heads_only:
            length = int(headers.get("content-length", "0" if status == 204 else len(data)))
            assert len(data) >= length, "the body is shorter than its length says"
            body, data = data[:length], data[length:]
        answers.append(Answer(status, headers, body))
    return answers


def dechunked(data: bytes) -> tuple[bytes, bytes]:
    """A chunked body, and what follows it."""
    body = b""
    while True:
        size_line, _, data = data.partition(b"\r\n")
        size = int(size_line, 16)
        body += data[:size]
        assert data[size : size + 2] == b"\r\n"
        data = data[size + 2 :]
        if not size:
            return body, data


def request_bytes(
    method: str = "GET", target: str = "/hello", body: bytes | None = None, *lines: str
) -> bytes:
    """A plain request with Host, and Content-Length if there is a body."""
    length = [] if body is None else [f"Content-Length: {len(body)}"]
    head = "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *length, *lines, "", ""])
    return head.encode("latin-1") + (body or b"")


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    """A server with the ordinary time limits."""
    running = Web()
    yield running
    running.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server that loses patience within a second."""
    for name, seconds in SHORT_LIMITS.items():
        monkeypatch.setattr(conduit, name, seconds)
    running = Web()
    yield running
    running.close()


# ── 12.1  The head of a request ──────────────────────────────────────────────

POST: Final = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED: Final = b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
REFUSED_HEADS: Final = {
    "both_lengths": (400, POST + b"Content-Length: 3\r\n" + CHUNKED),
    "both_lengths_reversed": (
        400,
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    ),
    "two_different_lengths": (400, POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
    "two_equal_lengths": (400, POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc"),
    "length_list": (400, POST + b"Content-Length: 3, 3\r\n\r\nabc"),
    "length_plus": (400, POST + b"Content-Length: +3\r\n\r\nabc"),
    "length_negative": (400, POST + b"Content-Length: -3\r\n\r\nabc"),
    "length_hex": (400, POST + b"Content-Length: 0x3\r\n\r\nabc"),
    "length_underscore": (400, POST + b"Content-Length: 1_0\r\n\r\nabc"),
    "length_empty": (400, POST + b"Content-Length:\r\n\r\nabc"),
    "length_huge": (400, POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n"),
    "length_other_digits": (400, POST + b"Content-Length: \xb2\r\n\r\n"),
    "chunked_misspelt": (501, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "chunked_doubled": (501, POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    "chunked_twice": (400, POST + b"Transfer-Encoding: chunked\r\n" + CHUNKED),
    "chunked_not_last": (501, POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
    "gzip_chunked": (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "identity": (501, POST + b"Transfer-Encoding: identity\r\n\r\n"),
    "chunked_vertical_tab": (400, POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    "chunked_in_http10": (400, b"POST / HTTP/1.0\r\nHost: x\r\n" + CHUNKED),
    "bare_lf_in_request_line": (400, b"GET / HTTP/1.1\nHost: x\r\n\r\n"),
    "bare_lf_everywhere": (400, b"GET / HTTP/1.1\nHost: x\n\n"),
    "bare_lf_in_header": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\nC: d\r\n\r\n"),
    "bare_cr_in_header": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\rC: d\r\n\r\n"),
    "bare_cr_at_line_end": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\r\n\r\n"),
    "obs_fold": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n"),
    "obs_fold_tab": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\tc: d\r\n\r\n"),
    "space_before_first_header": (400, b"GET / HTTP/1.1\r\n Host: x\r\n\r\n"),
    "space_before_colon": (400, b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length : 3\r\n\r\nabc"),
    "tab_before_colon": (400, b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length\t: 3\r\n\r\nabc"),
    "nul_in_name": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA\0: b\r\n\r\n"),
    "nul_in_value": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\0\r\n\r\n"),
    "escape_in_value": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: \x1b[0m\r\n\r\n"),
    "delete_in_value": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: \x7f\r\n\r\n"),
    "name_not_a_token": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA(b): c\r\n\r\n"),
    "name_not_ascii": (400, "GET / HTTP/1.1\r\nHost: x\r\nÄ: c\r\n\r\n".encode()),
    "name_empty": (400, b"GET / HTTP/1.1\r\nHost: x\r\n: c\r\n\r\n"),
    "no_colon": (400, b"GET / HTTP/1.1\r\nHost: x\r\nabc\r\n\r\n"),
    "no_host": (400, b"GET / HTTP/1.1\r\nA: b\r\n\r\n"),
    "host_twice": (400, b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n"),
    "host_with_path": (400, b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n"),
    "host_with_user": (400, b"GET / HTTP/1.1\r\nHost: a@x\r\n\r\n"),
    "absolute_form": (400, b"GET http://x/hello HTTP/1.1\r\nHost: x\r\n\r\n"),
    "authority_form": (400, b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n"),
    "asterisk_form": (400, b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"),
    "double_slash": (400, b"GET //evil/hello HTTP/1.1\r\nHost: x\r\n\r\n"),
    "fragment": (400, b"GET /hello#a HTTP/1.1\r\nHost: x\r\n\r\n"),
    "percent_nul": (400, b"GET /hello%00 HTTP/1.1\r\nHost: x\r\n\r\n"),
    "percent_broken": (400, b"GET /hello%zz HTTP/1.1\r\nHost: x\r\n\r\n"),
    "percent_cut_off": (400, b"GET /hello%2 HTTP/1.1\r\nHost: x\r\n\r\n"),
    "overlong_utf8": (400, b"GET /%c0%af HTTP/1.1\r\nHost: x\r\n\r\n"),
    "utf8_surrogate": (400, b"GET /%ed%a0%80 HTTP/1.1\r\nHost: x\r\n\r\n"),
    "raw_utf8_target": (400, "GET /ä HTTP/1.1\r\nHost: x\r\n\r\n".encode()),
    "two_spaces": (400, b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "tab_in_request_line": (400, b"GET\t/\tHTTP/1.1\r\nHost: x\r\n\r\n"),
    "space_in_target": (400, b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n"),
    "leading_space": (400, b" GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "method_in_lower_case": (400, b"get / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "http09": (400, b"GET /\r\n\r\n"),
    "http_in_lower_case": (400, b"GET / http/1.1\r\nHost: x\r\n\r\n"),
    "http12": (400, b"GET / HTTP/1.2\r\nHost: x\r\n\r\n"),
    "http2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "tls_to_plain_port": (400, b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n"),
    "request_line_64_kb": (431, b"GET /" + b"a" * 65536 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "request_line_17_kb": (431, b"GET /" + b"a" * 17000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "headers_101": (431, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100 + b"\r\n"),
    "header_8_kb": (431, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 8192 + b"\r\n\r\n"),
    "head_without_end": (431, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20000),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_HEADS)
def test_sec_c_head_is_refused(web: Web, case: str) -> None:
    """Each way to be misunderstood is answered with an error and a closed connection."""
    status, data = REFUSED_HEADS[case]
    answers = answers_in(web.say(data + HELLO))
    assert [answer.status for answer in answers] == [status]
    assert answers[0].headers["connection"] == "close"
    assert answers[0].json()["errcode"].startswith("M_")
    assert answers[0].headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /hello HTTP/1.1\r\nHost:x\r\n",
        b"GET /hello HTTP/1.1\r\nHost: [::1]:8008\r\n",
        b"GET /hello HTTP/1.1\r\nHost: \t x \t\r\n",
        b"GET /hello HTTP/1.1\r\nhOST: x\r\nX-Empty:\r\n",
        b"GET /hello HTTP/1.1\r\nHost: x\r\nX: caf\xe9\r\nX: b\r\n",
        b"\r\nGET /hello HTTP/1.1\r\nHost: x\r\n",
        b"GET /hello HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 98,
        b"GET /hello HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 8100 + b"\r\n",
        b"GET /hello?a=" + b"b" * 12000 + b" HTTP/1.1\r\nHost: x\r\n",
    ],
)
def test_unusual_but_proper_heads(web: Web, head: bytes) -> None:
    """What the RFC allows is answered."""
    answers = web.ask(head + b"Connection: close\r\n\r\n")
    assert [answer.status for answer in answers] == [200]


def test_sec_c_path_is_split_before_decoding(web: Web) -> None:
    """%2F is part of a segment and never makes a new one; %2e%2e means nothing."""
    target = "/a%2Fb/%2e%2e/%23r%C3%A4um%3Ax/?q=%26+%3D&q=2&e&=v"
    answer = web.ask(request_bytes("GET", target, None, "Connection: close"))[0].json()
    assert answer["segments"] == ["a/b", "..", "#räum:x", ""]
    assert answer["query"] == {"q": ["& =", "2"], "e": [""], "": ["v"]}


@given(st.binary(max_size=300))
def test_parser_raises_nothing_but_matrix_errors(raw: bytes) -> None:
    """Whatever the bytes, the parser returns a head or a MatrixError."""
    with contextlib.suppress(conduit.MatrixError):
        _method, target, is_http11, headers = conduit.parse_head(raw)
        conduit.body_length(headers, is_http11)
        conduit.percent_decode(target)


TOKENS: Final = st.text("!#$%&'*+-.^_`|~" + string.ascii_letters + string.digits, min_size=1)
VALUES: Final = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF).filter(
    lambda letter: letter != "\x7f"
))  # fmt: skip


@given(st.dictionaries(TOKENS, VALUES, max_size=20), st.text(string.ascii_letters + "/%?&=~._-"))
def test_parser_reads_what_was_written(fields: dict[str, str], target: str) -> None:
    """A proper head comes back as it was, names in lower case, values stripped."""
    fields = {name: value for name, value in fields.items() if name.lower() != "host"}
    assume(len({name.lower() for name in fields}) == len(fields))
    assume(not target.startswith("/"))
    lines = [f"GET /{target} HTTP/1.1", "Host: h", *(f"{n}: {v}" for n, v in fields.items())]
    head = conduit.parse_head("\r\n".join(lines).encode("latin-1"))
    expected = {name.lower(): value.strip(" \t") for name, value in fields.items()}
    assert head == ("GET", "/" + target, True, {"host": "h", **expected})


@given(st.text(min_size=1))
def test_percent_encoding_comes_back(text: str) -> None:
    """Decoding undoes encoding, for all texts without NUL."""
    assume("\0" not in text)
    assume(all(not 0xD800 <= ord(letter) < 0xE000 for letter in text))
    assert conduit.percent_decode(quote(text, safe="")) == text
    assert request_for(f"/?a={quote(text, safe='')}").query == {"a": [text]}


@given(st.text(st.sampled_from("%0123456789abcdefABCDEFgz/"), max_size=30))
def test_percent_decoding_agrees_with_the_library(text: str) -> None:
    """What is accepted is what urllib makes of it; what is not raises a MatrixError."""
    try:
        decoded = conduit.percent_decode(text)
    except conduit.MatrixError:
        assert re.search(r"%(?![0-9A-Fa-f]{2})|%00|%[89A-Fa-f]", text)
    else:
        assert decoded == unquote(text, errors="strict")


# ── 12.2  The body of a request ──────────────────────────────────────────────

CHUNKED: Final = b"POST /hello HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
REFUSED_CHUNKS: Final = {
    "size_not_hex": b"xyz\r\nabc\r\n0\r\n\r\n",
    "size_empty": b"\r\nabc\r\n0\r\n\r\n",
    "size_negative": b"-3\r\nabc\r\n0\r\n\r\n",
    "size_prefixed": b"0x3\r\nabc\r\n0\r\n\r\n",
    "size_underscore": b"1_0\r\nabc\r\n0\r\n\r\n",
    "size_overflow": b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "size_space": b"3 \r\nabc\r\n0\r\n\r\n",
    "size_bare_lf": b"3\nabc\r\n0\r\n\r\n",
    "size_bare_cr": b"3\r;a\r\nabc\r\n0\r\n\r\n",
    "extension_too_long": b"3;" + b"a" * 300 + b"\r\nabc\r\n0\r\n\r\n",
    "extension_bare_lf": b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "chunk_too_long": b"3\r\nabcd\r\n0\r\n\r\n",
    "chunk_bare_lf": b"3\r\nabc\n0\r\n\r\n",
    "trailer": b"3\r\nabc\r\n0\r\nA: b\r\n\r\n",
    "trailer_bare_lf": b"3\r\nabc\r\n0\r\nA: b\nC: d\r\n\r\n",
}


@pytest.mark.parametrize("case", REFUSED_CHUNKS)
def test_sec_c_chunks_are_refused(web: Web, case: str) -> None:
    """A chunked body that can be read in two ways gets 400, and nothing behind it is read."""
    answers = answers_in(web.say(CHUNKED + REFUSED_CHUNKS[case] + HELLO))
    assert [answer.status for answer in answers] == [400]
    assert answers[0].headers["connection"] == "close"


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=6), st.data())
def test_chunked_bodies_in_pieces(web: Web, chunks: list[bytes], data: st.DataObject) -> None:
    """A chunked body is read the same wherever the network cuts it, and the next request too."""
    coded = b"".join(b"%x;x=y\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    stream = CHUNKED + coded + b"0\r\n\r\n" + request_bytes("GET", "/next")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    with web.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            sock.sendall(stream[start:end])
        sock.shutdown(socket.SHUT_WR)
        first, second = answers_in(until_closed(sock))
    assert first.json()["body"] == b"".join(chunks).decode("latin-1")
    assert second.json()["segments"] == ["next"]


def test_sec_c_body_on_get_is_read(web: Web) -> None:
    """The body of a GET is not taken for the next request."""
    smuggled = request_bytes("GET", "/smuggled")
    answers = web.ask(
        request_bytes("GET", "/first", smuggled)
        + request_bytes("GET", "/last", None, "Connection: close")
    )
    assert [answer.json()["segments"] for answer in answers] == [["first"], ["last"]]


def test_sec_c_expect_100_continue(web: Web) -> None:
    """The go-ahead comes when the body is wanted, once, and not if the body is there already."""
    with web.connect() as sock:
        head = request_bytes("POST", "/hello", None, "Content-Length: 3", "Expect: 100-continue")
        sock.sendall(head)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        assert b'"body":"abc"' in sock.recv(4096)
        sock.sendall(head + b"def")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")


def test_sec_c_body_over_the_limit(web: Web) -> None:
    """413 before the body is read when its length is known, and as soon as it is clear else."""
    told = request_bytes("POST", "/hello", None, f"Content-Length: {2 << 20}")
    assert [answer.status for answer in answers_in(web.say(told))] == [413]
    expecting = request_bytes(
        "POST", "/hello", None, f"Content-Length: {2 << 20}", "Expect: 100-continue"
    )
    assert [answer.status for answer in answers_in(web.say(expecting))] == [413]
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    assert [answer.status for answer in answers_in(web.say(CHUNKED + chunk * 17))] == [413]


def test_sec_c_huge_chunk_is_not_waited_for(web: Web) -> None:
    """A chunk that says it is larger than any body is refused by its size alone."""
    answers = answers_in(web.say(CHUNKED + b"ffffffff\r\n"))
    assert [answer.status for answer in answers] == [413]


def test_refused_upload_still_gets_its_answer() -> None:
    """A client that sends on although it is refused can read why: no reset overtakes the answer."""

    async def refuse(_request: conduit.Request) -> conduit.Response:
        raise conduit.forbidden("no uploads")

    web = Web(refuse, max_request_size=64 << 20)
    with web.connect() as sock:
        sock.sendall(request_bytes("POST", "/upload", None, f"Content-Length: {8 << 20}"))
        with contextlib.suppress(ConnectionError):
            for _ in range(128):
                sock.sendall(bytes(65536))
        assert [answer.status for answer in answers_in(until_closed(sock))] == [403]
    web.close()


def test_small_refused_body_keeps_the_connection() -> None:
    """What a handler does not read is dropped, and the next request is understood."""

    async def refuse(request: conduit.Request) -> conduit.Response:
        raise conduit.forbidden(request.path)

    web = Web(refuse)
    data = request_bytes("PUT", "/a", b"x" * 5000) + request_bytes("PUT", "/b", b"y")
    answers = web.ask(data + request_bytes("GET", "/c", None, "Connection: close"))
    assert [answer.json()["error"] for answer in answers] == ["/a", "/b", "/c"]
    web.close()


# ── 12.3  Answers ────────────────────────────────────────────────────────────


def test_sec_c_pipelined_requests_are_answered_in_order() -> None:
    """The first, slow one does not let the second pass."""
    order = []

    async def handler(request: conduit.Request) -> conduit.Response:
        await asyncio.sleep(0.2 if request.path == "/0" else 0)
        order.append(request.path)
        return json_response({"path": request.path})

    web = Web(handler)
    data = b"".join(request_bytes("GET", f"/{number}") for number in range(50))
    answers = web.ask(data + request_bytes("GET", "/50", None, "Connection: close"))
    assert [answer.json()["path"] for answer in answers] == [f"/{n}" for n in range(51)] == order
    web.close()


def test_head_has_the_headers_of_get_and_no_body(web: Web, tmp_path: Path) -> None:
    """HEAD, for bytes, for a file and for a stream; the connection stays usable."""
    path = tmp_path / "picture"
    path.write_bytes(b"x" * 1000)
    targets = ["/hello", f"/file{path}", "/blocks"]
    data = b"".join(request_bytes("HEAD", target) for target in targets)
    raw = web.say(data + request_bytes("HEAD", "/hello", None, "Connection: close"))
    answers = answers_in(raw, heads_only=True)
    assert [answer.status for answer in answers] == [200] * 4
    assert answers[1].headers["content-length"] == "1000"
    assert answers[2].headers["transfer-encoding"] == "chunked"


def test_sec_c_no_response_splitting(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """A header with a line end in it is never sent: the answer is 500, and the log says why."""
    for evil in ("a%0D%0AX-Evil:%20b", "a%0Db", "a%0Ab", "%E2%80%A8", "%7F"):
        request = request_bytes("GET", f"/header?name={evil}", None, "Connection: close")
        (answer,) = web.ask(request)
        assert answer.status == 500
        assert "x-evil" not in answer.headers
    assert "unsafe value" in caplog.text


def test_sec_c_upgrade_is_refused(web: Web) -> None:
    """No protocol is switched; the connection ends with the answer, whatever a proxy thinks."""
    for protocol in ("h2c", "websocket"):
        data = request_bytes("GET", "/hello", None, "Connection: Upgrade", f"Upgrade: {protocol}")
        answers = answers_in(web.say(data + HELLO))
        assert [answer.status for answer in answers] == [200]
        assert answers[0].headers["connection"] == "close"


def test_every_answer_has_cors_and_date(web: Web) -> None:
    """Good answers and bad ones."""
    data = (
        request_bytes("GET", "/hello") + request_bytes("POST", "/boom", b"") + b"nonsense\r\n\r\n"
    )
    answers = web.ask(data)
    assert [answer.status for answer in answers] == [200, 500, 400]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "Authorization" in answer.headers["access-control-allow-headers"]
        assert "PUT" in answer.headers["access-control-allow-methods"]
        told = time.strptime(answer.headers["date"], "%a, %d %b %Y %H:%M:%S GMT")
        assert abs(time.mktime(told) - time.mktime(time.gmtime())) < 5


def test_faults_are_logged_without_secrets(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """500 tells the client nothing, and the log no token, even if the exception quotes one."""

    async def fail(request: conduit.Request) -> conduit.Response:
        request.json = {"auth": [{"password": "hunter2"}], "body": "fine"}
        raise KeyError(f"hunter2 {request.headers['authorization']} {request.raw_query}")

    failing = Web(fail)
    lines = ("Authorization: Bearer sesame-open", "Connection: close")
    (answer,) = failing.ask(request_bytes("GET", "/x?access_token=tok-en&a=1", None, *lines))
    failing.close()
    assert answer.status == 500
    assert answer.json() == {"errcode": "M_UNKNOWN", "error": "Internal server error"}
    assert "KeyError" in caplog.text
    assert "GET /x failed" in caplog.text
    assert not re.search("hunter2|sesame-open|tok-en", caplog.text)


def test_nothing_leaves_before_the_hook() -> None:
    """The answer waits for before_response, and is replaced by the error which that raises."""
    written: list[str] = []

    async def write(request: conduit.Request) -> conduit.Response:
        written.append(request.path)
        return json_response({})

    async def synced() -> None:
        if written[-1] == "/full":
            raise conduit.MatrixError(507, "M_UNKNOWN", "The disk is full")
        if written[-1] == "/broken":
            raise OSError("the disk is gone")
        await asyncio.sleep(0.2)
        written.append("synced")

    web = Web(write, before_response=synced)
    started = time.monotonic()
    data = b"".join(request_bytes("PUT", path, b"") for path in ("/a", "/full", "/broken"))
    answers = web.ask(data + request_bytes("PUT", "/b", b"", "Connection: close"))
    web.close()
    assert [answer.status for answer in answers] == [200, 507, 500, 200]
    assert time.monotonic() - started > 0.4
    assert written == ["/a", "synced", "/full", "/broken", "/b", "synced"]


def test_http10_clients(web: Web) -> None:
    """They are hung up on after one answer, and get no chunks."""
    plain = answers_in(web.say(b"GET /hello HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + HELLO))
    assert [answer.headers["connection"] for answer in plain] == ["close"]
    streamed = answers_in(web.say(b"GET /blocks HTTP/1.0\r\n\r\n"))
    assert "transfer-encoding" not in streamed[0].headers
    assert streamed[0].body == b"one two three"


def test_streamed_answer(web: Web) -> None:
    """Blocks go out in chunks as they are made; an empty one does not end the body."""
    answers = web.ask(
        request_bytes("GET", "/blocks") + request_bytes("GET", "/hello", None, "Connection: close")
    )
    assert answers[0].body == b"one two three"
    assert answers[1].status == 200


def test_stream_that_fails_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    """A client must not take half a body for a whole one."""

    async def blocks() -> AsyncIterator[bytes]:
        yield b"half"
        raise ValueError("the other half is gone")

    async def handler(_request: conduit.Request) -> conduit.Response:
        return conduit.Response(body=blocks())

    web = Web(handler)
    raw = web.say(HELLO)
    web.close()
    assert raw.endswith(b"4\r\nhalf\r\n")
    assert "the other half is gone" in caplog.text


# ── 12.4  Files and ranges ───────────────────────────────────────────────────

CONTENT: Final = bytes(range(256)) * 2000


@pytest.fixture(scope="module")
def some_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 512,000 bytes."""
    path = tmp_path_factory.mktemp("files") / "content"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize(
    ("asked", "status", "first", "end"),
    [
        (None, 200, 0, 512_000),
        ("bytes=0-", 206, 0, 512_000),
        ("bytes=0-0", 206, 0, 1),
        ("bytes=100-300000", 206, 100, 300_001),
        ("bytes=511999-", 206, 511_999, 512_000),
        ("bytes=511999-99999999999", 206, 511_999, 512_000),
        ("bytes=-1", 206, 511_999, 512_000),
        ("bytes=-600000", 206, 0, 512_000),
        ("bytes=512000-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=5-3", 200, 0, 512_000),
        ("bytes=-", 200, 0, 512_000),
        ("bytes=0-1,3-4", 200, 0, 512_000),
        ("bytes=a-b", 200, 0, 512_000),
        ("bytes=1_0-", 200, 0, 512_000),
        ("items=0-1", 200, 0, 512_000),
    ],
)
def test_ranges(
    web: Web, some_file: Path, asked: str | None, status: int, first: int, end: int
) -> None:
    """RFC 9110, 14: one range is served, several ones and nonsense are ignored."""
    lines = [f"Range: {asked}"] if asked else []
    (answer,) = web.ask(
        request_bytes("GET", f"/file{some_file}", None, *lines, "Connection: close")
    )
    assert answer.status == status
    if status == 416:
        assert json.loads(answer.body)["errcode"] == "M_INVALID_PARAM"
    else:
        assert answer.body == CONTENT[first:end]
        assert answer.headers["content-type"] == "image/png"
    assert answer.headers["accept-ranges"] == "bytes"
    ranges = {206: f"bytes {first}-{end - 1}/512000", 416: "bytes */512000"}
    assert answer.headers.get("content-range") == ranges.get(status)


def test_if_range(web: Web, some_file: Path) -> None:
    """A part is served only of the version that the client has."""
    statuses = []
    for tag in ('"tag"', '"other"', 'W/"tag"'):
        lines = ("Range: bytes=1-2", f"If-Range: {tag}", "Connection: close")
        (answer,) = web.ask(request_bytes("GET", f"/file{some_file}", None, *lines))
        statuses.append(answer.status)
    assert statuses == [206, 200, 200]


@given(first=st.integers(0, 20), last=st.integers(0, 20), size=st.integers(0, 20))
def test_ranges_are_slices(first: int, last: int, size: int) -> None:
    """A range is what Python's slice gives; a suffix too."""
    whole = bytes(range(size))
    bounds = conduit.byte_range(f"bytes={first}-{last}", size)
    assert bounds is None or whole[slice(*bounds)] == whole[first : last + 1]
    suffix = conduit.byte_range(f"bytes=-{last}", size)
    assert suffix is not None
    assert whole[slice(*suffix)] == (whole[-last:] if last else b"")


def test_missing_and_shrunken_files(
    web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is gone gets 500; one that is shorter than promised, a closed connection."""

    async def handler(request: conduit.Request) -> conduit.Response:
        return conduit.Response(body=conduit.FileBody(tmp_path / request.segments[0], 300_000))

    (tmp_path / "short").write_bytes(bytes(200_000))
    files = Web(handler)
    assert (
        answers_in(files.say(request_bytes("GET", "/gone", None, "Connection: close")))[0].status
        == 500
    )
    raw = files.say(request_bytes("GET", "/short", None))
    files.close()
    assert raw.startswith(b"HTTP/1.1 200")
    assert len(raw) < 200_000
    assert "shorter than" in caplog.text
    assert web.ask(request_bytes("GET", "/hello", None, "Connection: close"))[0].status == 200


# ── 12.5  Slow, rude and numerous clients ────────────────────────────────────


def test_sec_c_slow_head(hasty: Web) -> None:
    """One byte now and then does not buy more time: the whole head has one deadline."""
    started = time.monotonic()
    with hasty.connect() as sock:
        for byte in b"GET /hello HTTP/1.1\r\nX: " + b"y" * 1000:
            try:
                sock.sendall(bytes([byte]))
            except ConnectionError:
                break
            if select.select([sock], [], [], 0.05)[0]:
                break
        answers = answers_in(until_closed(sock))
    assert [answer.status for answer in answers] == [408]
    assert 0.5 < time.monotonic() - started < 3


def test_sec_c_slow_body(hasty: Web) -> None:
    """A body that trickles in below the minimum rate gets 408; a steady one may take its time."""
    with hasty.connect() as sock:
        sock.sendall(request_bytes("POST", "/hello", None, "Content-Length: 10000"))
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while not select.select([sock], [], [], 0.1)[0]:
                sock.sendall(b"x")
        assert [answer.status for answer in answers_in(until_closed(sock))] == [408]
        assert time.monotonic() - started < 3
    with hasty.connect() as sock:
        sock.sendall(request_bytes("POST", "/hello", None, "Content-Length: 10000"))
        for _ in range(10):
            time.sleep(0.15)
            sock.sendall(b"x" * 1000)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_sec_c_slow_reader(hasty: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not take an answer is hung up on; the server does not keep it for ever."""
    monkeypatch.setattr(conduit, "MIN_RATE", 1 << 30)
    with hasty.connect() as sock:
        sock.sendall(request_bytes("GET", "/big"))
        eventually(lambda: not hasty.http._connections, 5)
        assert len(until_closed(sock)) < BIG


def test_slow_makers_of_answers_are_not_cut_off(hasty: Web) -> None:
    """The write deadline is the reader's, not that of whoever makes the blocks."""

    async def blocks() -> AsyncIterator[bytes]:
        yield bytes(4 << 20)
        await asyncio.sleep(1.5)
        yield b"end"

    async def handler(_request: conduit.Request) -> conduit.Response:
        return conduit.Response(body=blocks())

    web = Web(handler)
    (answer,) = web.ask(request_bytes("GET", "/x", None, "Connection: close"))
    web.close()
    assert answer.body.endswith(b"end")
    assert len(answer.body) == (4 << 20) + 3


def test_pipelines_do_not_hold_the_loop(web: Web) -> None:
    """Others are answered between the requests of a long pipeline."""
    with web.connect() as greedy, web.connect() as modest:
        greedy.sendall(HELLO * 1500)
        started = time.monotonic()
        modest.sendall(HELLO)
        assert modest.recv(4096).startswith(b"HTTP/1.1 200")
        first = time.monotonic() - started
        greedy.shutdown(socket.SHUT_WR)
        assert len(answers_in(until_closed(greedy))) == 1500
        assert first < (time.monotonic() - started) / 2


def test_sec_c_idle_connections_end(hasty: Web) -> None:
    """A connection without requests is closed, one with requests stays."""
    with hasty.connect() as idle, hasty.connect() as busy:
        for _ in range(6):
            busy.sendall(HELLO)
            assert busy.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(0.3)
        assert idle.recv(10) == b""


def test_long_poll_outlives_the_time_limits(hasty: Web) -> None:
    """No deadline cuts a request off whose handler waits."""
    with hasty.connect() as sock:
        sock.sendall(request_bytes("GET", "/poll"))
        assert not select.select([sock], [], [], 2)[0]
        assert len(hasty.http._connections) == 1


def test_long_poll_of_a_client_that_left_ends(hasty: Web) -> None:
    """The handler is freed soon after the client hangs up, by FIN as well as by RST."""
    for linger in (None, struct.pack("ii", 1, 0)):
        with hasty.connect() as sock:
            sock.sendall(request_bytes("GET", "/poll"))
            eventually(lambda: any(c.waiting for c in hasty.http._connections), 5)
            if linger:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        eventually(lambda: not hasty.http._connections, 5)


def test_sec_c_connections_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """When all places are taken the oldest idle connection goes; busy ones never do."""
    web = Web()
    web.http._limit = 10
    polls = [web.connect() for _ in range(5)]
    for sock in polls:
        sock.sendall(request_bytes("GET", "/poll"))
    eventually(lambda: sum(c.waiting is not None for c in web.http._connections) == 5, 5)
    idle = []
    for _ in range(20):
        idle.append(web.connect())
        idle[-1].sendall(HELLO)
        assert idle[-1].recv(4096).startswith(b"HTTP/1.1 200")
    assert len(web.http._connections) <= 15  # those that made room are still going
    assert idle[0].recv(10) == b""
    assert not select.select(polls, [], [], 0.1)[0]
    more = [web.connect() for _ in range(8)]
    for sock in more:
        sock.sendall(request_bytes("GET", "/poll"))
    time.sleep(0.3)
    assert sum(c.waiting is not None for c in web.http._connections) == 10
    for sock in [*polls, *idle, *more]:
        sock.close()
    web.close()


def test_sec_c_connections_per_address_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """One address cannot take all places, unless it is a trusted proxy."""
    monkeypatch.setattr(conduit, "MAX_CONNECTIONS_PER_ADDRESS", 5)
    for trusted, expected in (((), 5), (conduit.LOOPBACK_RANGES, 12)):
        web = Web(trusted_proxies=trusted)
        socks = [web.connect() for _ in range(12)]
        for sock in socks:
            with contextlib.suppress(ConnectionError):
                sock.sendall(request_bytes("GET", "/poll"))
        time.sleep(0.3)
        assert sum(c.waiting is not None for c in web.http._connections) == expected
        for sock in socks:
            sock.close()
        web.close()


@slow
def test_sec_c_ten_thousand_idle_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of idle connections holds no more than the cap, and a client is still answered."""
    web = Web(trusted_proxies=conduit.LOOPBACK_RANGES)
    web.http._limit = 200
    flood: deque[socket.socket] = deque(maxlen=300)
    for _ in range(10_000 if os.environ.get("DEEP") else 1_500):
        flood.append(web.connect())
    assert len(web.http._connections) <= 205
    assert web.ask(request_bytes("GET", "/hello", None, "Connection: close"))[0].status == 200
    for sock in flood:
        sock.close()
    web.close()
    assert not web.http._connections


@given(st.binary(max_size=200), st.sampled_from(sorted(REFUSED_HEADS)), st.integers(0, 300))
@settings(max_examples=60)
def test_random_bytes_never_break_the_server(web: Web, noise: bytes, case: str, cut: int) -> None:
    """Noise between requests gets an answer or a closed connection, never a 5xx but 501 and 505."""
    data = REFUSED_HEADS[case][1][:cut] + noise
    with web.connect() as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        raw = until_closed(sock)
    for status in re.findall(rb"^HTTP/1\.1 (\d+)", raw, re.MULTILINE):
        assert int(status) < 500 or int(status) in (501, 505)


# ── 12.6  Addresses ──────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("198.51.100.7", "", "198.51.100.7"),
        ("198.51.100.7", "203.0.113.9", "198.51.100.7"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("127.0.0.1", "10.0.0.1, 203.0.113.9", "203.0.113.9"),
        ("127.0.0.1", "203.0.113.9, 10.1.2.3", "203.0.113.9"),
        ("127.0.0.1", "evil, 10.1.2.3", "10.1.2.3"),
        ("127.0.0.1", "unknown", "127.0.0.1"),
        ("127.0.0.1", "2001:db8::1", "2001:db8::1"),
        ("127.0.0.1", "::ffff:203.0.113.9", "203.0.113.9"),
        ("", "203.0.113.9", "203.0.113.9"),
        ("", "", ""),
    ],
)
def test_sec_29_forwarded_addresses(peer: str, forwarded: str, expected: str) -> None:
    """X-Forwarded-For is believed from trusted proxies only, from the right end on."""

    async def check() -> str:
        networks = (*conduit.LOOPBACK_RANGES, ipaddress.ip_network("10.0.0.0/8"))
        server = conduit.HttpServer(describe, max_request_size=1, trusted_proxies=networks)
        head = f"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {forwarded}".encode()
        return conduit.Request(conduit.Connection(server, peer), head).address

    assert asyncio.run(check()) == expected


def test_is_local(web: Web) -> None:
    """Local is: from this machine, not through a proxy, asking for localhost."""
    port = web.place[1]
    cases = {
        f"Host: localhost:{port}": True,
        "Host: 127.0.0.1": True,
        "Host: [::1]:80": True,
        "Host: localhost.evil.example": False,
        "Host: rebound.example": False,
        "Host: localhost\r\nX-Forwarded-For: 127.0.0.1": False,
        "Host: localhost\r\nForwarded: for=1": False,
        "Host: localhost\r\nVia: 1.1 proxy": False,
    }
    for lines, expected in cases.items():
        data = f"GET /x HTTP/1.1\r\n{lines}\r\nConnection: close\r\n\r\n".encode()
        assert web.ask(data)[0].json()["local"] is expected, lines


def test_address_groups() -> None:
    """IPv6 customers count by their /64."""
    group = conduit.address_group
    assert group("203.0.113.9") == "203.0.113.9"
    assert group("2001:db8::1") == group("2001:db8:0:0:ffff::2") != group("2001:db8:0:1::1")


def test_unix_socket(tmp_path: Path) -> None:
    """A socket for owner and group; a dead one is replaced; it goes at the end."""
    path = str(tmp_path / "http.sock")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.close()
    web = Web(address=path)
    assert Path(path).stat().st_mode & 0o777 == 0o660
    data = request_bytes("GET", "/x", None, "X-Forwarded-For: 203.0.113.9", "Connection: close")
    answer = web.ask(data)[0].json()
    assert (answer["address"], answer["local"]) == ("203.0.113.9", False)
    web.close()
    assert not Path(path).exists()


def test_dual_stack() -> None:
    """The address :: takes IPv4 too, whose addresses look as they always do."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    web = Web(address="::")
    for host in ("127.0.0.1", "::1"):
        with socket.create_connection((host, web.place[1]), 5) as sock:
            sock.sendall(HELLO)
            assert answers_in(sock.recv(4096))[0].json()["address"] == host
    web.close()


# ── 12.7  TLS ────────────────────────────────────────────────────────────────


def self_signed(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for a name, and its key; made by the openssl command."""
    certs, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"),
        *("-keyout", str(key), "-out", str(certs)),
    ]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603  our own command line
    return certs, key


needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl command")


@needs_openssl
def test_tls_and_its_reload(tmp_path: Path) -> None:
    """HTTPS works, a new certificate is served to new connections, and old ones go on."""
    first, second = self_signed(tmp_path, "first.example"), self_signed(tmp_path, "second.example")
    web = Web(tls=conduit.tls_context(*first))
    assert web.http.names[0].startswith("https://")

    def connect(certs: Path, name: str) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=certs)
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context.wrap_socket(web.connect(), server_hostname=name)

    old = connect(first[0], "first.example")
    assert old.selected_alpn_protocol() == "http/1.1"
    web.http.tls = conduit.tls_context(*second)
    eventually(lambda: connect(second[0], "second.example").close() is None, 5)
    old.sendall(request_bytes("POST", "/hello", b"x" * 300_000, "Connection: close"))
    answers = answers_in(until_closed(old))
    assert len(answers[0].json()["body"]) == 300_000
    web.close()


@needs_openssl
def test_sec_c_stalled_handshakes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that never finish the TLS handshake are bounded and end."""
    monkeypatch.setattr(conduit, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(conduit, "MAX_CONNECTIONS_PER_ADDRESS", 5)
    web = Web(tls=conduit.tls_context(*self_signed(tmp_path, "stall.example")))
    stalled = [web.connect() for _ in range(12)]
    time.sleep(0.2)
    assert len(web.http._connections) == 5
    eventually(lambda: not web.http._connections, 5)
    for sock in stalled:
        sock.close()
    web.close()


# ── 12.8  The end ────────────────────────────────────────────────────────────


def test_graceful_stop() -> None:
    """Long polls are answered, requests under way finished, idle connections closed."""
    begun, finished = [], []

    async def handler(request: conduit.Request) -> conduit.Response:
        begun.append(request.path)
        if request.path == "/work":
            await asyncio.sleep(0.5)
            finished.append(True)
        return await describe(request)

    web = Web(handler)
    socks = {target: web.connect() for target in ("/poll", "/work", "/idle")}
    for target in ("/poll", "/work"):
        socks[target].sendall(request_bytes("GET", target))
    eventually(lambda: sorted(begun) == ["/poll", "/work"], 5)
    started = time.monotonic()
    web.run(web.http.stop(4))
    assert 0.3 < time.monotonic() - started < 3
    (polled,) = answers_in(until_closed(socks["/poll"]))
    assert polled.json() == {"came": False}
    assert polled.headers["connection"] == "close"
    assert answers_in(until_closed(socks["/work"]))[0].status == 200
    assert until_closed(socks["/idle"]) == b""
    assert finished
    with pytest.raises(ConnectionError):
        web.connect()
    web.close()


def test_stop_does_not_wait_for_ever() -> None:
    """A handler that hangs is cancelled when the time is over."""
    begun, cancelled = [], []

    async def hang(_request: conduit.Request) -> conduit.Response:
        begun.append(True)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return json_response({})

    web = Web(hang)
    sock = web.connect()
    sock.sendall(HELLO)
    eventually(lambda: begun, 5)
    started = time.monotonic()
    web.run(web.http.stop(0.5))
    assert time.monotonic() - started < 2
    assert cancelled
    sock.close()
    web.close()


# ── 12.9  Through another server ─────────────────────────────────────────────

NGINX_CONFIG: Final = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off; client_header_timeout 300ms; client_body_timeout 300ms; keepalive_timeout 300ms;
    client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
    uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{upstream};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_request_buffering off;
        }}
    }}
}}
"""


def is_listening(port: int) -> bool:
    """Whether something accepts connections on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, list[str]]]:
    """The port of an nginx in front of a server, and the requests that came through to that."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("needs nginx")
    seen: list[str] = []

    async def count(request: conduit.Request) -> conduit.Response:
        body = await request.stream.read()
        seen.append(f"{request.method} {request.path} {len(body)}")
        return json_response({})

    web = Web(count)
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    config = folder / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(folder=folder, port=port, upstream=web.place[1]))
    process = subprocess.Popen([program, "-c", str(config), "-p", str(folder)])  # noqa: S603  ours
    try:
        eventually(lambda: is_listening(port), 10)
        yield port, seen
    finally:
        process.terminate()
        process.wait(10)
        web.close()


@pytest.mark.parametrize("case", sorted(REFUSED_HEADS) + sorted(REFUSED_CHUNKS))
def test_sec_c_nginx_sees_the_same_requests(nginx: tuple[int, list[str]], case: str) -> None:
    """Behind nginx no bytes make more requests than nginx counted: nothing can be smuggled."""
    port, seen = nginx
    seen.clear()
    data = REFUSED_HEADS[case][1] if case in REFUSED_HEADS else CHUNKED + REFUSED_CHUNKS[case]
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        raw = until_closed(sock)
    counted = len(re.findall(rb"HTTP/1\.1 \d\d\d ", raw)) or raw == b"{}"  # which is HTTP/0.9
    assert len(seen) <= counted, (seen, raw)


def test_every_answer_behind_nginx(nginx: tuple[int, list[str]]) -> None:
    """The ordinary case through the proxy: bodies of both kinds, pipelined."""
    port, seen = nginx
    seen.clear()
    data = request_bytes("PUT", "/a", b"12345") + CHUNKED + b"3\r\nabc\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(data + request_bytes("GET", "/c", None, "Connection: close"))
        answers = answers_in(until_closed(sock))
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert seen == ["PUT /a 5", "POST /hello 3", "GET /c 0"]


# ═════════════════════════════════════════════════════════════════════════════
#  13. ROUTER, AUTHENTICATION, RATE LIMITS
#
#  A router with routes of its own, called without a network; then the routes of
#  the real server, each of which must refuse whom it should.
# ═════════════════════════════════════════════════════════════════════════════

KNOWN_TOKENS: Final = {
    "user": conduit.Requester("@user:x", conduit.UserNid(1), "D", conduit.DeviceNid(1), 1),
    "guest": conduit.Requester("@g:x", conduit.UserNid(2), "D", conduit.DeviceNid(2), 2, True),
    "admin": conduit.Requester(
        "@admin:x", conduit.UserNid(3), "D", conduit.DeviceNid(3), 3, is_admin=True
    ),
}


def authenticate(_request: conduit.Request, token: str) -> conduit.Requester:
    """What chapter 12 does, in small."""
    if token not in KNOWN_TOKENS:
        raise conduit.MatrixError(401, "M_UNKNOWN_TOKEN", "Unknown token", soft_logout=False)
    return KNOWN_TOKENS[token]


class Routes:
    """A set of routes apart from the real ones, and a router over them."""

    def __init__(self, rate_limit: bool = False) -> None:
        self.routes: list[conduit.Route] = []
        config = types.SimpleNamespace(rate_limit=rate_limit)
        self.hs: Any = types.SimpleNamespace(config=config, db=types.SimpleNamespace(lost=0))

    def add(self, method: str, *paths: str, **options: Any) -> None:
        """A route whose handler tells what it was called with."""

        async def handler(_hs: Any, request: conduit.Request, **values: str) -> Any:
            user = request.requester and request.requester.user_id
            return {"path": paths[0], "values": values, "json": request.json, "user": user}

        facts: Json = {"auth": conduit.NONE, "limit": "default", "body": None, **options}
        entry = conduit.Route(method, paths, facts["auth"], facts["limit"], facts["body"], handler)
        self.routes.append(entry)

    def ask(self, method: str, target: str, body: bytes = b"", *lines: str) -> Answer:
        """The answer to one request, made of real bytes but without a socket."""
        return asyncio.run(self._ask(self.router(), request_bytes(method, target, body, *lines)))

    def router(self) -> conduit.Router:
        """A fresh router."""
        router = conduit.Router(self.hs, self.routes)
        router.authenticate = authenticate
        return router

    async def _ask(self, router: conduit.Router, data: bytes) -> Answer:
        server = conduit.HttpServer(router.dispatch, max_request_size=1 << 20)
        connection = conduit.Connection(server, "203.0.113.1")
        head, _, connection.buffer = data.partition(b"\r\n\r\n")
        request = conduit.Request(connection, head)
        response = await server.answer(request)
        assert isinstance(response.body, bytes)
        return Answer(response.status, dict(response.headers), response.body)


# ── 13.1  Paths ──────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def routes() -> Routes:
    """Paths that compete with each other."""
    made = Routes()
    room = "/_matrix/client/v3/rooms/{room_id}"
    made.add("GET", f"{room}/state")
    made.add("GET", f"{room}/state/{{event_type}}/{{state_key...}}")
    made.add("PUT", f"{room}/state/{{event_type}}/{{state_key...}}", body=conduit.ANY_OBJECT)
    made.add("PUT", f"{room}/send/{{event_type}}/{{txn_id}}", body=conduit.ANY_OBJECT)
    made.add("GET", "/profile/{user_id}/{key}")
    made.add("PUT", "/profile/{user_id}/displayname")
    made.add("GET", "/profile/{user_id}/displayname")
    made.add("DELETE", "/profile/{user_id}/{key}")
    made.add("GET", "/rules/")
    made.add("GET", "/")
    return made


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/_matrix/client/v3/rooms/!a:b/state", {"room_id": "!a:b"}),
        ("GET", "/_matrix/client/v3/rooms/%21a%3Ab/state", {"room_id": "!a:b"}),
        ("GET", "/_matrix/client/v3/rooms/!a/state/t", {"event_type": "t", "state_key": ""}),
        ("GET", "/_matrix/client/v3/rooms/!a/state/t/", {"event_type": "t", "state_key": ""}),
        ("PUT", "/_matrix/client/v3/rooms/!a/state/t/k", {"event_type": "t", "state_key": "k"}),
        ("GET", "/_matrix/client/v3/rooms/!a/state/t/k/l/", {"state_key": "k/l/"}),
        ("GET", "/_matrix/client/v3/rooms/!a/state/t/%2F%3F", {"state_key": "/?"}),
        ("GET", "/_matrix/client/v3/rooms/a%2Fb/state", {"room_id": "a/b"}),
        ("PUT", "/_matrix/client/v3/rooms/!a/send/m.x/1", {"event_type": "m.x", "txn_id": "1"}),
        ("GET", "/%70rofile/u/displayname", {"user_id": "u"}),
        ("GET", "/profile/u/other", {"key": "other"}),
        ("DELETE", "/profile/u/displayname", {"key": "displayname"}),
        ("HEAD", "/profile/u/other", {"key": "other"}),
        ("GET", "/rules/?a=b", {}),
        ("GET", "/", {}),
    ],
)
def test_paths(routes: Routes, method: str, target: str, expected: dict[str, str]) -> None:
    """Literal before parameter before rest; parameters decoded; a wrong turn is taken back."""
    answer = routes.ask(method, target)
    assert answer.status == 200
    assert expected.items() <= answer.json()["values"].items()


@pytest.mark.parametrize(
    ("method", "target", "status", "allow"),
    [
        ("GET", "/rules", 404, None),
        ("GET", "/_matrix/client/v3/rooms//state", 404, None),
        ("GET", "/_matrix/client/v3/rooms/!a/state%2Ft", 404, None),
        ("GET", "/_matrix/client/v3/rooms/!a/send/m.x", 404, None),
        ("GET", "/profile/../rules/", 404, None),
        ("POST", "/profile/u/displayname", 405, "GET, PUT, DELETE"),
        ("BREW", "/rules/", 405, "GET"),
        ("TRACE", "/", 405, "GET"),
    ],
)
def test_unrecognized(
    routes: Routes, method: str, target: str, status: int, allow: str | None
) -> None:
    """404 for unknown paths, 405 for known ones with another method, both M_UNRECOGNIZED."""
    answer = routes.ask(method, target)
    assert (answer.status, answer.json()["errcode"]) == (status, "M_UNRECOGNIZED")
    assert answer.headers.get("Allow") == allow


def test_preflight(routes: Routes) -> None:
    """OPTIONS is answered for every path, without a token.  Spec: "Web browser clients"."""
    for target in ("/rules/", "/nowhere", "/_matrix/client/v3/rooms/!a/state"):
        answer = routes.ask("OPTIONS", target)
        assert (answer.status, answer.body) == (204, b"")


def test_two_handlers_for_one_path_are_an_error() -> None:
    """Also if they come in by different spellings."""
    made = Routes()
    made.add("GET", "/a/{b}")
    made.add("GET", "/x", "/a/{c}")
    with pytest.raises(ValueError, match="two handlers"):
        made.router()


SEGMENT: Final = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
)
PATTERN: Final = st.lists(st.sampled_from(["a", "b", "{p}", "{q}"]), min_size=1, max_size=4)


@given(
    st.lists(PATTERN, min_size=1, max_size=6), st.lists(SEGMENT | st.sampled_from("ab"), max_size=4)
)
def test_router_finds_what_a_slow_one_finds(patterns: list[list[str]], segments: list[str]) -> None:
    """The trie agrees with trying each pattern, the most literal from the left going first."""
    root, known = conduit.PathNode(), {}
    for pattern in patterns:
        shape = tuple(part if part in "ab" else "{}" for part in pattern)
        if shape not in known:
            known[shape] = conduit.Route("GET", (), conduit.NONE, None, None, describe)
            root.add(known[shape], "/" + "/".join(pattern))
    fitting = [
        shape
        for shape in known
        if len(shape) == len(segments)
        and all(part in ("{}", segment) for part, segment in zip(shape, segments, strict=True))
    ]
    best = min(fitting, key=lambda shape: [part == "{}" for part in shape], default=None)
    found = root.find(segments, 0, "GET")
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found[0][0] is known[best]
        values = [segment for part, segment in zip(best, segments, strict=True) if part == "{}"]
        assert found[1][::-1] == values


# ── 13.2  Who may call ───────────────────────────────────────────────────────

WHO_MAY: Final = {
    conduit.NONE: {None: 200, "user": 200, "guest": 200, "admin": 200, "wrong": 200},
    conduit.OPTIONAL: {None: 200, "user": 200, "guest": 200, "admin": 200, "wrong": 401},
    conduit.GUEST: {None: 401, "user": 200, "guest": 200, "admin": 200, "wrong": 401},
    conduit.USER: {None: 401, "user": 200, "guest": 403, "admin": 200, "wrong": 401},
    conduit.ADMIN: {None: 401, "user": 403, "guest": 403, "admin": 200, "wrong": 401},
    conduit.APPSERVICE: {None: 401, "user": 403, "guest": 403, "admin": 403, "wrong": 401},
}


@pytest.mark.parametrize("where", ["header", "query"])
@pytest.mark.parametrize("auth", list(conduit.Auth))
def test_who_may_call(auth: conduit.Auth, where: str) -> None:
    """The whole table, with the token in the header and in the query."""
    made = Routes()
    made.add("GET", "/x", auth=auth)
    for token, status in WHO_MAY[auth].items():
        lines = [f"Authorization: Bearer {token}"] if token and where == "header" else []
        target = f"/x?access_token={token}" if token and where == "query" else "/x"
        answer = made.ask("GET", target, b"", *lines)
        assert answer.status == status, token
        if status == 200 and auth is not conduit.NONE:
            assert answer.json()["user"] == (KNOWN_TOKENS[token].user_id if token else None)
        if status == 401:
            assert answer.json()["errcode"] == ("M_UNKNOWN_TOKEN" if token else "M_MISSING_TOKEN")
        if status == 403 and token == "guest":
            assert answer.json()["errcode"] == "M_GUEST_ACCESS_FORBIDDEN"


def test_forms_of_the_authorization_header() -> None:
    """The scheme in any case; other schemes are no token; the header goes before the query."""
    made = Routes()
    made.add("GET", "/x", auth=conduit.USER)
    cases = {
        "bearer user": 200,
        "BEARER  user ": 200,
        "Bearer": 401,
        "Bearer ": 401,
        "Basic user": 401,
        "user": 401,
        "Bearer user, Bearer admin": 401,
    }
    for value, status in cases.items():
        assert made.ask("GET", "/x", b"", f"Authorization: {value}").status == status, value
    answer = made.ask("GET", "/x?access_token=admin", b"", "Authorization: Bearer user")
    assert answer.json()["user"] == "@user:x"


def test_every_route_says_who_may_call() -> None:
    """The real table: each route has an access rule, a limit that exists, and can be printed."""
    assert len(conduit.ROUTES) > 100
    for entry in conduit.ROUTES:
        assert isinstance(entry.auth, conduit.Auth)
        assert entry.limit is None or entry.limit in conduit.RATE_LIMITS
        assert entry.handler.__doc__, entry.paths
    table = conduit.route_table()
    assert len(table.splitlines()) == sum(len(entry.paths) for entry in conduit.ROUTES)
    assert "/_matrix/client/versions" in table


def test_parameters_of_handlers_fit_their_paths() -> None:
    """Each handler takes the parameters that its paths name; others have a default."""
    for entry in conduit.ROUTES:
        code = entry.handler.__code__  # type: ignore[attr-defined]  # functions, all of them
        count = code.co_argcount + code.co_kwonlyargcount
        if code.co_flags & inspect.CO_VARKEYWORDS:
            continue
        taken = code.co_varnames[2:count]
        optional = len(entry.handler.__defaults__ or ())  # type: ignore[attr-defined]  # the same
        for path in entry.paths:
            given = set(re.findall(r"\{(\w+)", path))
            assert given <= set(taken), (path, entry.handler)
            assert set(taken[: len(taken) - optional]) <= given, (path, entry.handler)


def test_real_routes_refuse_strangers(server: Server) -> None:
    """Without a token, every route that wants one says so, and none fails."""
    checked, session = 0, httpx.Client(base_url=server.url)
    for entry in conduit.ROUTES:
        path = re.sub(r"\{(\w+)(\.\.\.)?\}", "x", entry.paths[0])
        response = session.request(entry.method, path, content=b"{}")
        assert response.status_code < 500, (entry.method, path)
        if entry.auth not in (conduit.NONE, conduit.OPTIONAL):
            assert response.status_code == 401, (entry.method, path, response.text)
            assert response.json()["errcode"] == "M_MISSING_TOKEN"
            checked += 1
    session.close()
    assert checked > 50


# ── 13.3  Bodies ─────────────────────────────────────────────────────────────

SCHEMA_OF_ALL: Final[Json] = {
    "text": str,
    "number?": int,
    "real?": float,
    "flag?": bool,
    "list?": [str],
    "inner?": {"deep": int, "deeper?": [{"x": str}]},
    "map?": {str: {str: int}},
    "either?": (str, int),
    "free?": conduit.ANY,
    "object?": dict,
}


@pytest.mark.parametrize(
    ("body", "errcode", "names"),
    [
        ('{"text": "x"}', None, ""),
        ('{"text": "x", "number": 1, "real": 1, "flag": true, "list": [], "more": 1}', None, ""),
        (
            '{"text": "x", "map": {"a": {"b": 1}}, "either": 1, "free": [null], "real": 1.5}',
            None,
            "",
        ),
        ('{"text": "x", "number": null, "inner": null}', None, ""),
        ("", "M_MISSING_PARAM", "text"),
        ("{}", "M_MISSING_PARAM", "text"),
        ('{"text": null}', "M_BAD_JSON", "text"),
        ('{"text": 1}', "M_BAD_JSON", "text must be a string"),
        ('{"text": "x", "number": true}', "M_BAD_JSON", "number must be an integer"),
        ('{"text": "x", "number": 1.0}', "M_BAD_JSON", "number"),
        ('{"text": "x", "number": "1"}', "M_BAD_JSON", "number"),
        ('{"text": "x", "real": false}', "M_BAD_JSON", "real"),
        ('{"text": "x", "flag": 1}', "M_BAD_JSON", "flag"),
        ('{"text": "x", "list": {}}', "M_BAD_JSON", "list must be an array"),
        ('{"text": "x", "list": ["a", 1]}', "M_BAD_JSON", "list[1]"),
        ('{"text": "x", "inner": {}}', "M_MISSING_PARAM", "inner.deep"),
        ('{"text": "x", "inner": {"deep": 1, "deeper": [{}]}}', "M_MISSING_PARAM", "deeper[0].x"),
        ('{"text": "x", "map": {"a": {"b": "c"}}}', "M_BAD_JSON", "map.a.b"),
        ('{"text": "x", "either": []}', "M_BAD_JSON", "a string or an integer"),
        ('{"text": "x", "object": []}', "M_BAD_JSON", "object"),
        ("[]", "M_BAD_JSON", "object"),
        ("null", "M_BAD_JSON", "object"),
        ("{", "M_NOT_JSON", ""),
        ('{"text": "x"} x', "M_NOT_JSON", ""),
        ("\ufeff{}", "M_NOT_JSON", ""),
    ],
)
def test_schemas(body: str, errcode: str | None, names: str) -> None:
    """What is missing, and what is wrong, by name."""
    made = Routes()
    made.add("POST", "/x", body=SCHEMA_OF_ALL)
    answer = made.ask("POST", "/x", body.encode())
    if errcode is None:
        assert answer.status == 200
        assert None not in answer.json()["json"].values()
        return
    assert (answer.status, answer.json()["errcode"]) == (400, errcode)
    assert names in answer.json()["error"]


JSON_VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from("ab"), inner),
    max_leaves=10,
)


@given(JSON_VALUES, st.sampled_from([SCHEMA_OF_ALL, {"a": int, "b?": [str]}, {str: {str: dict}}]))
def test_schemas_raise_only_matrix_errors(value: Any, shape: Json) -> None:
    """Whatever the JSON, the checker passes it or raises a MatrixError."""
    with contextlib.suppress(conduit.MatrixError):
        conduit.check_shape(value, shape)


def test_bodies_that_nobody_asked_for(routes: Routes) -> None:
    """Any object, or nothing; a body on a GET is dropped unless it is too large for that."""
    path = "/_matrix/client/v3/rooms/!a/send/m.x/1"
    assert routes.ask("PUT", path).json()["json"] == {}
    assert routes.ask("PUT", path, b'{"a": null}').json()["json"] == {"a": None}
    assert routes.ask("GET", "/rules/", b"not json").status == 200
    assert routes.ask("GET", "/rules/", b"x" * 70_000).status == 413


def test_body_limits() -> None:
    """413 M_TOO_LARGE; strangers may send less than users."""
    made = Routes()
    made.add("POST", "/open", body=conduit.ANY_OBJECT)
    made.add("POST", "/closed", body=conduit.ANY_OBJECT, auth=conduit.USER)
    body = b'{"a": "' + b"x" * 300_000 + b'"}'
    answer = made.ask("POST", "/open", body)
    assert (answer.status, answer.json()["errcode"]) == (413, "M_TOO_LARGE")
    assert made.ask("POST", "/closed", body, "Authorization: Bearer user").status == 200
    assert made.ask("POST", "/closed", body).status == 401


# ── 13.4  Arguments ──────────────────────────────────────────────────────────


def request_for(target: str) -> conduit.Request:
    """A request that came from nowhere."""

    async def make() -> conduit.Request:
        server = conduit.HttpServer(describe, max_request_size=1)
        head = f"GET {target} HTTP/1.1\r\nHost: x".encode()
        return conduit.Request(conduit.Connection(server, ""), head)

    return asyncio.run(make())


def test_arguments() -> None:
    """Strict integers and booleans, defaults, the first of several values."""
    request = request_for("/x?a=1&a=2&big=99999&neg=-5&t=true&f=false&e=&u=1_0&w=+1&h=0x1")
    assert request.arg("a") == "1"
    assert request.arg("none") is None
    assert request.arg("none", "d") == "d"
    assert request.query["a"] == ["1", "2"]
    assert request.int_arg("a", 7, 0, 100) == 1
    assert request.int_arg("none", 7, 0, 100) == 7
    assert request.int_arg("big", 7, 0, 100) == 100
    assert request.int_arg("neg", 7, -10, 100) == -5
    assert request.bool_arg("t", False) is True
    assert request.bool_arg("f", True) is False
    assert request.bool_arg("none", True) is True
    for name in ("neg", "e", "u", "w", "h", "t"):
        with pytest.raises(conduit.MatrixError, match="M_INVALID_PARAM"):
            request.int_arg(name, 7, 0, 100)
    with pytest.raises(conduit.MatrixError, match="M_INVALID_PARAM"):
        request.bool_arg("a", False)


# ── 13.5  Rate limits ────────────────────────────────────────────────────────


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A limiter's time, to be set."""
    now = [1000.0]
    monkeypatch.setattr(conduit.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(conduit.RATE_LIMITS, "default", (2, 5))
    return iter([now])


def test_token_bucket(clock: Iterator[list[float]]) -> None:
    """A burst, then the steady rate; 429 says exactly when to come back."""
    now, limiter = next(clock), conduit.RateLimiter()
    for _ in range(5):
        limiter.check("default", 1)
    with pytest.raises(conduit.MatrixError) as caught:
        limiter.check("default", 1)
    assert caught.value.status == 429
    assert caught.value.extra["retry_after_ms"] == 500
    limiter.check("default", 2)
    limiter.check("message", 1)
    now[0] += 0.501
    limiter.check("default", 1)
    with pytest.raises(conduit.MatrixError):
        limiter.check("default", 1)
    now[0] += 1000
    for _ in range(5):
        limiter.check("default", 1)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_bucket_never_gives_more_than_promised(pauses: list[float]) -> None:
    """In any stretch of time at most burst + rate * time requests pass; the wait told suffices."""
    limiter, now, passed = conduit.RateLimiter(), 1000.0, []
    per_second, burst = conduit.RATE_LIMITS["login"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduit.time, "monotonic", lambda: now)
        for pause in pauses:
            now += pause
            try:
                limiter.check("login", "a")
            except conduit.MatrixError as error:
                now += error.extra["retry_after_ms"] / 1000
                limiter.check("login", "a")
            passed.append(now)
    for index, start in enumerate(passed):
        for later in range(index, len(passed)):
            allowed = burst + per_second * (passed[later] - start)
            assert later - index + 1 <= allowed + 1e-6


def test_buckets_are_bounded(clock: Iterator[list[float]]) -> None:
    """A flood of addresses takes no more memory than the cap, and the newest stay counted."""
    next(clock)
    limiter = conduit.RateLimiter()
    for number in range(conduit.MAX_BUCKETS + 500):
        limiter.check("default", f"address {number}")
    assert len(limiter._full_at) <= conduit.MAX_BUCKETS
    for _ in range(4):
        limiter.check("default", f"address {conduit.MAX_BUCKETS + 499}")
    with pytest.raises(conduit.MatrixError):
        limiter.check("default", f"address {conduit.MAX_BUCKETS + 499}")


def test_limits_by_user_and_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers count by address, users by name and, more generously, by address."""
    monkeypatch.setitem(conduit.RATE_LIMITS, "default", (0.01, 3))
    made = Routes(rate_limit=True)
    made.add("GET", "/open")
    made.add("GET", "/closed", auth=conduit.USER)
    made.add("GET", "/free", limit=None)
    router = made.router()

    def ask(target: str, token: str = "") -> Answer:
        lines = [f"Authorization: Bearer {token}"] if token else []
        return asyncio.run(made._ask(router, request_bytes("GET", target, b"", *lines)))

    statuses = [ask("/closed", "user").status for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    assert ask("/closed", "admin").status == 200
    refused = [ask("/closed", "wrong").status for _ in range(30)]
    assert refused[0] == 401
    assert refused[-1] == 429
    limited = ask("/open")
    assert limited.status == 429
    assert limited.json()["errcode"] == "M_LIMIT_EXCEEDED"
    assert int(limited.headers["Retry-After"]) * 1000 >= limited.json()["retry_after_ms"]
    assert {ask("/free").status for _ in range(20)} == {200}
    made.hs.config.rate_limit = False
    assert {ask("/closed", "user").status for _ in range(20)} == {200}


# ═════════════════════════════════════════════════════════════════════════════
#  14. ACCOUNTS, DEVICES, LOGINS
# ═════════════════════════════════════════════════════════════════════════════

ADMIN_TOKEN_LINE: Final = re.compile(r"^\W*([0-9A-Za-z]{43})\W*$", re.MULTILINE)


def try_login(client: Client, user: str, password: str, **fields: Any) -> httpx.Response:
    """One attempt to log in; the answer, whatever it is."""
    identifier = {"type": "m.id.user", "user": user}
    body = {"type": "m.login.password", "identifier": identifier, "password": password, **fields}
    headers = fields.pop("headers", None)
    body.pop("headers", None)
    return client.post("login", body, headers=headers)


def password_auth(client: Client, session: str, password: str = PASSWORD) -> Json:
    """The `auth` member for a client's own password."""
    identifier = {"type": "m.id.user", "user": client.user_id}
    return {
        "type": "m.login.password",
        "identifier": identifier,
        "password": password,
        "session": session,
    }


def printed_token(server: Server) -> str:
    """The one-time admin token that the server has printed."""
    found = ADMIN_TOKEN_LINE.search(server.log)
    assert found, server.log
    return found[1]


def from_afar(address: str) -> dict[str, str]:
    """Headers that make a request come from another address, through a trusted proxy."""
    return {"X-Forwarded-For": address}


def read_database(server: Server, sql: str, *params: Any) -> list[Any]:
    """Rows of the server's database, read beside it."""
    with contextlib.closing(sqlite3.connect(f"file:{server.database}?mode=ro", uri=True)) as db:
        return db.execute(sql, params).fetchall()


def change_database(server: Server, sql: str, *params: Any) -> None:
    """Change the database of a server that is stopped."""
    with contextlib.closing(sqlite3.connect(server.database)) as db:
        db.execute(sql, params)
        db.commit()


# ── 14.1  Passwords ──────────────────────────────────────────────────────────


def test_password_hash_has_owasp_parameters() -> None:
    stored = conduit.hash_password("hunter2")
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert conduit.matches_hash(stored, "hunter2")
    assert not conduit.matches_hash(stored, "hunter3")
    assert conduit.hash_password("hunter2") != stored


def test_nobody_has_the_password_of_the_dummy_hash() -> None:
    assert conduit.NO_PASSWORD.startswith(conduit.HASH_PREFIX)
    assert not conduit.matches_hash(conduit.NO_PASSWORD, "")


# ── 14.2  Budgets for guesses ────────────────────────────────────────────────


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def guess(limiter: conduit.GuessLimiter, address: str, *, known: bool = False) -> int:
    """One wrong try at alice's password: 0, or the milliseconds to wait."""
    try:
        limiter.take(limiter.login_keys("@alice:a", address, known))
    except conduit.MatrixError as error:
        assert (error.status, error.errcode) == (429, "M_LIMIT_EXCEEDED")
        return int(error.extra["retry_after_ms"])
    return 0


def test_ten_wrong_tries_then_wait_and_the_budget_comes_back() -> None:
    clock = Clock()
    limiter = conduit.GuessLimiter(clock)
    assert [guess(limiter, "1.2.3.4") for _ in range(10)] == [0] * 10
    wait = guess(limiter, "1.2.3.4")
    assert 29_000 < wait <= 31_000
    clock.now += wait / 1000
    assert guess(limiter, "1.2.3.4") == 0
    assert guess(limiter, "1.2.3.4") > 0


def test_right_passwords_cost_nothing() -> None:
    limiter = conduit.GuessLimiter(Clock())
    for _ in range(100):
        keys = limiter.login_keys("@alice:a", "1.2.3.4", False)
        limiter.take(keys)
        limiter.refund(keys)
    assert guess(limiter, "1.2.3.4") == 0


def test_a_thousand_guessers_do_not_lock_the_owner_out() -> None:
    """Neither at home, where the account was used before, nor at an address new to it."""
    limiter = conduit.GuessLimiter(Clock())
    for number in range(1000):
        for _ in range(12):
            guess(limiter, f"10.0.{number // 250}.{number % 250}")
    assert guess(limiter, "10.0.0.1") > 0
    assert guess(limiter, "192.0.2.1", known=True) == 0
    assert guess(limiter, "198.51.100.7") == 0
    slow = [guess(limiter, "198.51.100.7") for _ in range(5)]
    assert slow[:2] == [0, 0]
    assert all(slow[2:])


def test_one_address_cannot_try_all_accounts() -> None:
    limiter = conduit.GuessLimiter(Clock())
    admitted = 0
    for number in range(200):
        with contextlib.suppress(conduit.MatrixError):
            limiter.take(limiter.login_keys(f"@user{number}:a", "1.2.3.4", False))
            admitted += 1
    assert admitted == conduit.BUDGETS["address"][0]


def test_ipv6_addresses_of_one_customer_are_one() -> None:
    limiter = conduit.GuessLimiter(Clock())
    waits = [guess(limiter, f"2001:db8:1:2::{number:x}") for number in range(1, 12)]
    assert waits[:10] == [0] * 10
    assert waits[10] > 0


# ── 14.3  Devices and tokens ─────────────────────────────────────────────────


def test_refresh_keeps_old_tokens_until_the_new_are_used(server: Server, alice: Client) -> None:
    device = alice.login(refresh_token=True)
    old_access, old_refresh = device.token, device.refresh_token
    first = ok(Client(server).post("refresh", {"refresh_token": old_refresh}))
    assert 0 < first["expires_in_ms"] <= 86_400_000
    ok(device.get("account/whoami"))
    again = ok(Client(server).post("refresh", {"refresh_token": old_refresh}))
    device.token = again["access_token"]
    who = ok(device.get("account/whoami"))
    assert who["device_id"] == device.device_id
    for dead in (old_access, first["access_token"]):
        device.token = dead
        fails(device.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    for dead in (old_refresh, first["refresh_token"]):
        answer = Client(server).post("refresh", {"refresh_token": dead})
        fails(answer, 401, "M_UNKNOWN_TOKEN")


def test_using_the_new_refresh_token_ends_the_old(server: Server, alice: Client) -> None:
    device = alice.login(refresh_token=True)
    one = ok(Client(server).post("refresh", {"refresh_token": device.refresh_token}))
    two = ok(Client(server).post("refresh", {"refresh_token": one["refresh_token"]}))
    spent = Client(server).post("refresh", {"refresh_token": device.refresh_token})
    assert fails(spent, 401, "M_UNKNOWN_TOKEN")["soft_logout"] is True
    ok(Client(server, one["access_token"]).get("account/whoami"))
    ok(Client(server, two["access_token"]).get("account/whoami"))
    fails(Client(server, one["access_token"]).get("account/whoami"), 401, "M_UNKNOWN_TOKEN")


def test_expired_access_token_is_a_soft_logout(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice = register(server, "alice", refresh_token=True)
    forever = alice.login()
    server.stop()
    change_database(server, "UPDATE tokens SET expires_ts = 1 WHERE expires_ts IS NOT NULL")
    server.start()
    assert fails(alice.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")["soft_logout"] is True
    ok(forever.get("account/whoami"))
    fresh = ok(Client(server).post("refresh", {"refresh_token": alice.refresh_token}))
    ok(Client(server, fresh["access_token"]).get("account/whoami"))


def test_login_without_refresh_gives_a_token_that_stays(alice: Client) -> None:
    body = {"type": "m.login.password", "user": alice.user_id, "password": PASSWORD}
    answer = ok(Client(alice.server).post("login", body))
    assert "refresh_token" not in answer
    assert "expires_in_ms" not in answer


def test_a_second_login_of_a_device_ends_its_first_token(alice: Client) -> None:
    again = alice.login(device_id=alice.device_id, initial_device_display_name="ignored")
    assert again.device_id == alice.device_id
    fails(alice.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    assert len(ok(again.get("devices"))["devices"]) == 1


def test_devices_are_listed_renamed_and_deleted(alice: Client, bob: Client) -> None:
    phone = alice.login(initial_device_display_name="phone", device_id="PHONE")
    devices = {d["device_id"]: d for d in ok(alice.get("devices"))["devices"]}
    assert devices.keys() == {alice.device_id, "PHONE"}
    assert devices["PHONE"]["display_name"] == "phone"
    assert devices[alice.device_id]["last_seen_ip"] == "127.0.0.1"
    assert abs(devices[alice.device_id]["last_seen_ts"] - time.time() * 1000) < 60_000
    ok(alice.put("devices/PHONE", {"display_name": "old phone"}))
    ok(alice.put("devices/PHONE", {}))
    assert ok(alice.get("devices/PHONE"))["display_name"] == "old phone"
    fails(alice.get("devices/NONE"), 404, "M_NOT_FOUND")
    fails(alice.put("devices/NONE", {"display_name": "x"}), 404, "M_NOT_FOUND")
    fails(bob.get("devices/PHONE"), 404, "M_NOT_FOUND")
    fails(alice.put("devices/PHONE", {"display_name": "x" * 101}), 400)
    fails(alice.put("devices/PHONE", {"display_name": "a\nb"}), 400)
    ok(alice.uia("DELETE", "devices/PHONE"))
    fails(phone.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    ok(alice.uia("DELETE", "devices/PHONE"))
    for name in ("A", "B"):
        alice.login(device_id=name)
    ok(alice.uia("POST", "delete_devices", {"devices": ["A", "B", "NONE"]}))
    assert len(ok(alice.get("devices"))["devices"]) == 1


@pytest.mark.parametrize("device_id", ["", "x" * 256, "a\u0000b", "a\nb"])
def test_strange_device_ids_are_refused(alice: Client, device_id: str) -> None:
    answer = try_login(Client(alice.server), alice.user_id, PASSWORD, device_id=device_id)
    if device_id:
        fails(answer, 400)
    else:
        assert answer.status_code in (200, 400)


def test_logout_ends_one_session_and_logout_all_every(alice: Client) -> None:
    one, two = alice.login(), alice.login()
    ok(one.post("logout"))
    assert "soft_logout" not in one.get("account/whoami").json() or (
        one.get("account/whoami").json()["soft_logout"] is False
    )
    fails(one.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    ok(two.get("account/whoami"))
    ok(two.post("logout/all"))
    for client in (alice, two):
        fails(client.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    alice.login()


def test_sessions_survive_a_restart(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice = register(server, "alice")
    ok(alice.get("account/whoami"))
    server.restart()
    assert ok(alice.get("account/whoami"))["user_id"] == alice.user_id
    seen = ok(alice.get("devices"))["devices"][0]
    assert seen["last_seen_ip"] == "127.0.0.1"


# ── 14.4  Making, changing and ending accounts ───────────────────────────────


def test_password_change_ends_other_sessions(alice: Client) -> None:
    other = alice.login()
    ok(alice.uia("POST", "account/password", {"new_password": "new " + PASSWORD}))
    ok(alice.get("account/whoami"))
    fails(other.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    anyone = Client(alice.server)
    fails(try_login(anyone, alice.user_id, PASSWORD), 403, "M_FORBIDDEN")
    ok(try_login(anyone, alice.user_id, "new " + PASSWORD))


def test_password_change_can_keep_other_sessions(alice: Client) -> None:
    other = alice.login()
    body = {"new_password": "new " + PASSWORD, "logout_devices": False}
    ok(alice.uia("POST", "account/password", body))
    ok(other.get("account/whoami"))


def test_empty_passwords_are_refused(server: Server, alice: Client) -> None:
    fails(alice.post("account/password", {"new_password": ""}), 400, "M_WEAK_PASSWORD")
    body = {"username": unique(), "password": ""}
    fails(Client(server).post("register", body), 400, "M_WEAK_PASSWORD")
    fails(Client(server).post("register", {**body, "password": "x" * 513}), 400)


def test_deactivation_leaves_rooms_and_ends_everything(alice: Client, bob: Client) -> None:
    room = bob.room_with(alice)
    other = alice.login()
    invited_to = bob.create_room(alice)
    answer = ok(alice.uia("POST", "account/deactivate", {"erase": True}))
    assert answer == {"id_server_unbind_result": "success"}
    for client in (alice, other):
        fails(client.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    fails(try_login(Client(bob.server), alice.user_id, PASSWORD), 403)
    body = {"username": alice.user_id[1:].split(":")[0], "password": PASSWORD}
    fails(Client(bob.server).post("register", body), 400, "M_USER_IN_USE")
    fails(bob.get(("profile", alice.user_id)), 404, "M_NOT_FOUND")
    for room_id in (room, invited_to):
        eventually(
            lambda at=room_id: (
                bob.state(at, "m.room.member", alice.user_id)["membership"] == "leave"
            )
        )


def test_interrupted_deactivation_goes_on_after_a_restart(
    new_server: Callable[..., Server],
) -> None:
    server = new_server()
    alice, bob = register(server, "alice"), register(server, "bob")
    room = alice.room_with(bob)
    server.stop()
    change_database(
        server,
        """
        UPDATE accounts SET behind = 1, deactivated = 1
        WHERE user_nid = (SELECT user_nid FROM users WHERE user_id = ?)
        """,
        bob.user_id,
    )
    server.start()
    eventually(lambda: alice.state(room, "m.room.member", bob.user_id)["membership"] == "leave")


def test_locked_accounts_may_only_log_out(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice = register(server, "alice", refresh_token=True)
    server.stop()
    change_database(server, "UPDATE accounts SET locked = 1 WHERE password_hash IS NOT NULL")
    server.start()
    for answer in (
        alice.get("account/whoami"),
        alice.get("sync"),
        try_login(Client(server), "alice", PASSWORD),
        Client(server).post("refresh", {"refresh_token": alice.refresh_token}),
        alice.put("rooms/!x:test.example/send/m.room.message/logout", {"body": "x"}),
        alice.put("rooms/!x:test.example/send/logout/all", {"body": "x"}),
    ):
        assert fails(answer, 401, "M_USER_LOCKED")["soft_logout"] is True
    ok(alice.post("logout"))
    fails(alice.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")


def test_suspended_accounts_may_read_only(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice, bob = register(server, "alice"), register(server, "bob")
    room_id, other_room = alice.room_with(bob), alice.create_room()
    open_room = bob.create_room(preset="public_chat")
    own, foreign = alice.send_text(room_id, "mine"), bob.send_text(room_id, "bob's")
    server.stop()
    change_database(server, "UPDATE accounts SET suspended = 1 WHERE password_hash IS NOT NULL")
    server.start()
    ok(alice.get("sync"))
    body = {"displayname": "x"}
    fails(alice.put(("profile", alice.user_id, "displayname"), body), 403, "M_USER_SUSPENDED")
    room, other = ("rooms", room_id), {"user_id": bob.user_id}
    for refused in (
        alice.put((*room, "send", "m.room.message", "1"), {"body": "x"}),
        alice.put((*room, "state", "m.room.topic"), {"topic": "x"}),
        alice.put((*room, "state", "m.room.member", alice.user_id), {"membership": "join"}),
        alice.put((*room, "redact", foreign, "2"), {}),
        *(alice.post((*room, step), other) for step in ("invite", "kick", "ban", "unban")),
        alice.post((*room, "upgrade"), {"new_version": "12"}),
        alice.post("createRoom", {}),
        alice.post(("join", open_room)),
        alice.post(("knock", open_room)),
    ):
        fails(refused, 403, "M_USER_SUSPENDED")
    assert alice.bodies(room_id) == ["mine", "bob's"]
    alice.redact(room_id, own)
    alice.leave(room_id)
    path = ("rooms", other_room, "state", "m.room.member", alice.user_id)
    ok(alice.put(path, {"membership": "leave"}))
    ok(alice.login().post("logout"))


# ── 14.5  User-interactive authentication ────────────────────────────────────


def test_uia_first_answer_has_flows_and_no_error(alice: Client) -> None:
    answer = alice.delete(f"devices/{alice.device_id}", {})
    assert answer.status_code == 401
    body = answer.json()
    assert body["flows"] == [{"stages": ["m.login.password"]}]
    assert body["params"] == {}
    assert "errcode" not in body
    assert "completed" not in body


def test_uia_wrong_password_can_be_tried_again(alice: Client) -> None:
    session = alice.delete("devices/X", {}).json()["session"]
    wrong = alice.delete("devices/X", {"auth": password_auth(alice, session, "wrong")})
    body = fails(wrong, 401, "M_FORBIDDEN")
    assert body["session"] == session
    assert body["flows"]
    ok(alice.delete("devices/X", {"auth": password_auth(alice, session)}))


def test_uia_takes_the_old_way_to_name_the_user(alice: Client) -> None:
    auth = {"type": "m.login.password", "user": alice.user_id, "password": PASSWORD}
    ok(alice.delete("devices/X", {"auth": auth}))
    localpart = alice.user_id[1:].split(":")[0]
    auth["identifier"] = {"type": "m.id.user", "user": localpart}
    ok(alice.delete("devices/X", {"auth": auth}))


def test_uia_unknown_stage_is_refused_but_not_fatal(alice: Client) -> None:
    session = alice.delete("devices/X", {}).json()["session"]
    for stage in ("m.login.dummy", "m.login.registration_token", "m.login.sso", "x"):
        auth = {"type": stage, "session": session, "token": "x"}
        fails(alice.delete("devices/X", {"auth": auth}), 401, "M_FORBIDDEN")
    only_session = alice.delete("devices/X", {"auth": {"session": session}})
    assert only_session.status_code == 401
    ok(alice.delete("devices/X", {"auth": password_auth(alice, session)}))


def test_sec_27_uia_session_is_bound_to_user_operation_and_body(alice: Client, bob: Client) -> None:
    """Class 27: a session of A used by B, replayed, or used for another operation or body."""
    session = alice.delete("devices/X", {}).json()["session"]
    stolen = bob.delete("devices/X", {"auth": password_auth(bob, session)})
    fails(stolen, 403, "M_FORBIDDEN")
    elsewhere = alice.delete("devices/Y", {"auth": password_auth(alice, session)})
    fails(elsewhere, 403, "M_FORBIDDEN")
    other_kind = {"devices": [bob.device_id], "auth": password_auth(alice, session)}
    fails(alice.post("delete_devices", other_kind), 403, "M_FORBIDDEN")
    ok(alice.delete("devices/X", {"auth": password_auth(alice, session)}))
    replay = alice.delete("devices/X", {"auth": {"session": session}})
    assert replay.status_code == 401
    assert replay.json()["session"] != session
    assert "completed" not in replay.json()
    as_bob = alice.delete("devices/X", {"auth": password_auth(bob, session)})
    fails(as_bob, 401, "M_FORBIDDEN")


def test_sec_27_uia_body_is_fixed_by_the_first_completed_stage() -> None:
    """Class 27: what was agreed to by one stage is not exchanged before the next."""
    accounts = SimpleNamespace(uia=conduit.ShortLived(900), uia_key=b"key")
    flows = ((conduit.DUMMY, conduit.PASSWORD),)

    def answer(**body: Any) -> Json:
        request = SimpleNamespace(method="POST", path="/x", requester=None, json=body)
        with pytest.raises(conduit.MatrixError) as caught:
            hs = SimpleNamespace(accounts=accounts)
            asyncio.run(conduit.user_interactive_auth(cast(Any, hs), cast(Any, request), flows))
        return caught.value.to_json()

    session = answer(want=1)["session"]
    first = answer(want=2, auth={"type": conduit.DUMMY, "session": session})
    assert (first["completed"], first["session"]) == ((conduit.DUMMY,), session)
    assert answer(want=2, auth={"session": session}) == first
    assert "changed" in answer(want=3, auth={"session": session})["error"]


def test_sec_27_names_that_look_alike_are_refused(server: Server, alice: Client) -> None:
    """Class 27: an existing name in other case, with a dot, or in letters that look like it."""
    name = alice.user_id[1:].split(":")[0]
    anyone = Client(server)
    for taken in (name, name.upper(), name.capitalize()):
        body = {"username": taken, "password": PASSWORD}
        fails(anyone.post("register", body), 400, "M_USER_IN_USE")
        fails(anyone.get("register/available", username=taken), 400, "M_USER_IN_USE")
    strange = [name + ".", "." + name, "\u0430" + name[1:], name + "\u200b", name + " ", "@" + name]
    strange += [alice.user_id, name + "\u0000", "\u212aarl", "a" * 300, name + ":x", "a/../b\n"]
    for username in strange:
        body = {"username": username, "password": PASSWORD}
        fails(anyone.post("register", body), 400, "M_INVALID_USERNAME")
    fails(anyone.post("register", {"username": "conduit", "password": "x"}), 400, "M_EXCLUSIVE")


# ── 14.6  Registration ───────────────────────────────────────────────────────


def test_registration_answers_as_asked(server: Server) -> None:
    anyone = Client(server)
    name = unique("New")
    body = {"username": name, "password": PASSWORD, "device_id": "MINE"}
    body["initial_device_display_name"] = "my phone"
    session = anyone.post("register", body).json()["session"]
    answer = ok(
        anyone.post("register", {**body, "auth": {"type": "m.login.dummy", "session": session}})
    )
    assert answer["user_id"] == f"@{name.lower()}:{server.name}"
    assert answer["device_id"] == "MINE"
    client = client_from(server, answer)
    assert ok(client.get("devices/MINE"))["display_name"] == "my phone"
    assert ok(client.get("account/whoami")) == {
        "user_id": answer["user_id"],
        "device_id": "MINE",
        "is_guest": False,
    }


def test_registration_without_login(server: Server) -> None:
    body = {"username": unique(), "password": PASSWORD, "inhibit_login": True}
    answer = ok(Client(server).post("register", {**body, "auth": {"type": "m.login.dummy"}}))
    assert "access_token" not in answer
    assert "device_id" not in answer
    ok(try_login(Client(server), answer["user_id"], PASSWORD))


def test_registration_makes_up_a_name(server: Server) -> None:
    body = {"password": PASSWORD, "auth": {"type": "m.login.dummy"}}
    answer = ok(Client(server).post("register", body))
    assert re.fullmatch(r"@[a-z0-9]{12}:test\.example", answer["user_id"])


def test_registration_may_send_more_with_each_request(server: Server) -> None:
    """Some clients learn the flows with an empty request first."""
    anyone = Client(server)
    session = anyone.post("register", {}).json()["session"]
    body = {"username": unique(), "password": PASSWORD}
    auth = {"type": "m.login.dummy", "session": session}
    ok(anyone.post("register", {**body, "auth": auth}))
    fails(anyone.post("register", {"auth": {"type": "m.login.dummy"}}), 400, "M_MISSING_PARAM")


def test_lightning_bolt(new_server: Callable[..., Server]) -> None:
    server = new_server(enable_lightning_bolt=True)
    alice = register(server, "alice")
    assert ok(alice.get(("profile", alice.user_id)))["displayname"] == "alice ⚡️"


def test_default_display_name(alice: Client) -> None:
    localpart = alice.user_id[1:].split(":")[0]
    assert ok(alice.get(("profile", alice.user_id))) == {"displayname": localpart}


def test_availability(server: Server, alice: Client) -> None:
    anyone = Client(server)
    assert ok(anyone.get("register/available", username=unique())) == {"available": True}
    fails(anyone.get("register/available"), 400, "M_MISSING_PARAM")
    fails(anyone.get("register/available", username="Ä"), 400, "M_INVALID_USERNAME")
    fails(anyone.get("register/available", username="conduit"), 400, "M_EXCLUSIVE")


def test_registration_token_and_its_validity(new_server: Callable[..., Server]) -> None:
    server = new_server(registration_token="let-me-in")
    anyone = Client(server)
    path = "/_matrix/client/v1/register/m.login.registration_token/validity"
    assert ok(anyone.get(path, token="let-me-in")) == {"valid": True}
    assert ok(anyone.get(path, token="let-me-out")) == {"valid": False}
    body = {"username": "alice", "password": PASSWORD}
    answer = anyone.post("register", body)
    assert answer.json()["flows"] == [{"stages": ["m.login.registration_token"]}]
    auth = {"type": "m.login.registration_token", "session": answer.json()["session"]}
    fails(anyone.post("register", {**body, "auth": {**auth, "token": "wrong"}}), 401, "M_FORBIDDEN")
    fails(anyone.post("register", {**body, "auth": auth}), 400, "M_MISSING_PARAM")
    dummy = {**auth, "type": "m.login.dummy"}
    fails(anyone.post("register", {**body, "auth": dummy}), 401)
    ok(anyone.post("register", {**body, "auth": {**auth, "token": "let-me-in"}}))
    register(server, "bob")
    for _ in range(10):
        anyone.get(path, token=secrets.token_hex())
    fails(anyone.get(path, token="let-me-in"), 429, "M_LIMIT_EXCEEDED")


def test_registration_can_be_off(new_server: Callable[..., Server]) -> None:
    """The first account can be made all the same, with the printed token; then nobody gets in."""
    server = new_server(allow_registration=False)
    anyone = Client(server)
    body: Json = {"username": "alice", "password": PASSWORD}
    answer = anyone.post("register", body)
    assert answer.json()["flows"] == [{"stages": ["m.login.registration_token"]}]
    auth = {"type": "m.login.registration_token", "token": printed_token(server)}
    ok(anyone.post("register", {**body, "auth": auth}))
    fails(anyone.post("register", {**body, "username": "bob"}), 403, "M_FORBIDDEN")
    fails(anyone.post("register", {**body, "username": "bob", "auth": auth}), 403, "M_FORBIDDEN")
    path = "/_matrix/client/v1/register/m.login.registration_token/validity"
    fails(anyone.get(path, token="x"), 403, "M_FORBIDDEN")


def test_guests_need_open_registration(new_server: Callable[..., Server], server: Server) -> None:
    fails(Client(server).post("register", {}, kind="guest"), 403, "M_FORBIDDEN")
    fails(Client(server).post("register", {}, kind="king"), 400, "M_INVALID_PARAM")
    opened = new_server(allow_open_registration=True)
    answer = ok(Client(opened).post("register", {"username": "ignored"}, kind="guest"))
    guest = client_from(opened, answer)
    assert "ignored" not in guest.user_id
    assert ok(guest.get("account/whoami"))["is_guest"] is True
    fails(guest.post("createRoom"), 403, "M_GUEST_ACCESS_FORBIDDEN")
    ok(guest.put(("profile", guest.user_id, "displayname"), {"displayname": "Passer-by"}))
    fails(guest.put(("profile", guest.user_id, "m.tz"), {"m.tz": "Europe/Paris"}), 403)
    assert read_database(opened, "SELECT COUNT(*) FROM accounts WHERE is_admin") == [(0,)]


def test_guest_becomes_a_user(new_server: Callable[..., Server]) -> None:
    server = new_server(allow_open_registration=True)
    register(server, "alice")
    anyone = Client(server)
    guest = client_from(server, ok(anyone.post("register", {}, kind="guest")))
    other = client_from(server, ok(anyone.post("register", {}, kind="guest")))
    name = guest.user_id[1:].split(":")[0]
    body: Json = {"username": name, "password": PASSWORD, "auth": {"type": "m.login.dummy"}}
    fails(anyone.post("register", body), 400, "M_USER_IN_USE")
    for wrong in (other.token, register(server, "bob").token):
        fails(anyone.post("register", {**body, "guest_access_token": wrong}), 403, "M_FORBIDDEN")
    alices = {**body, "username": "alice", "guest_access_token": guest.token}
    fails(anyone.post("register", alices), 403, "M_FORBIDDEN")
    fails(anyone.post("register", {**body, "guest_access_token": "x"}), 401, "M_UNKNOWN_TOKEN")
    user = client_from(
        server, ok(anyone.post("register", {**body, "guest_access_token": guest.token}))
    )
    assert ok(user.get("account/whoami"))["is_guest"] is False
    user.create_room()
    ok(try_login(anyone, name, PASSWORD))


def shared_secret_body(anyone: Client, secret: str, name: str, *, admin: bool = False) -> Json:
    """A registration by shared secret, as Synapse's register_new_matrix_user makes it."""
    nonce = ok(anyone.get("/_synapse/admin/v1/register"))["nonce"]
    parts = (nonce, name, PASSWORD, "admin" if admin else "notadmin")
    mac = hmac.new(secret.encode(), "\0".join(parts).encode(), hashlib.sha1).hexdigest()
    return {"nonce": nonce, "username": name, "password": PASSWORD, "admin": admin, "mac": mac}


def test_registration_by_shared_secret(new_server: Callable[..., Server], server: Server) -> None:
    path = "/_synapse/admin/v1/register"
    fails(Client(server).get(path), 404, "M_UNRECOGNIZED")
    private = new_server(allow_registration=False, registration_shared_secret="secret!")
    anyone = Client(private)
    body = shared_secret_body(anyone, "secret!", "alice", admin=True)
    alice = client_from(private, ok(anyone.post(path, body)))
    assert ok(alice.get("account/whoami"))["user_id"] == alice.user_id
    fails(anyone.post(path, body), 400)  # the nonce is used
    wrong = shared_secret_body(anyone, "guess", "bob")
    fails(anyone.post(path, wrong), 403, "M_FORBIDDEN")
    fails(anyone.post(path, {**wrong, "nonce": "x"}), 400)
    raised = {**shared_secret_body(anyone, "secret!", "bob"), "admin": True}
    fails(anyone.post(path, raised), 403, "M_FORBIDDEN")
    ok(anyone.post(path, shared_secret_body(anyone, "secret!", "bob")))
    admins = read_database(
        private, "SELECT user_id FROM accounts JOIN users USING (user_nid) WHERE is_admin"
    )
    assert admins == [("@alice:test.example",)]


def admins_of(server: Server) -> list[str]:
    """Who administers a server."""
    sql = "SELECT user_id FROM accounts JOIN users USING (user_nid) WHERE is_admin ORDER BY 1"
    return [row[0] for row in read_database(server, sql)]


def test_first_user_from_the_machine_itself_is_admin(new_server: Callable[..., Server]) -> None:
    server = new_server()
    register(server, "alice")
    register(server, "bob")
    assert admins_of(server) == ["@alice:test.example"]


def test_sec_31_open_registration_needs_a_second_switch(new_server: Callable[..., Server]) -> None:
    """Class 31: allow_registration without a token opens the door to the machine itself only."""
    config: Json = {"trusted_proxies": ["127.0.0.1"]}
    body = {"username": "mallory", "password": PASSWORD, "auth": {"type": "m.login.dummy"}}
    closed = new_server(**config)
    register(closed, "alice")
    stranger = Client(closed)
    headers = from_afar("203.0.113.5")
    fails(stranger.post("register", body, headers=headers), 403, "M_FORBIDDEN")
    fails(stranger.post("register", {}, headers=headers, kind="guest"), 403, "M_FORBIDDEN")
    opened = new_server(allow_open_registration=True, **config)
    register(opened, "alice")
    ok(Client(opened).post("register", body, headers=headers))


def test_sec_32_admin_right_needs_the_printed_token(new_server: Callable[..., Server]) -> None:
    """Class 32: on the open network, the first to come is not the admin by being first."""
    server = new_server(allow_open_registration=True, trusted_proxies=["127.0.0.1"])
    headers = from_afar("203.0.113.5")
    body = {"username": "mallory", "password": PASSWORD}
    anyone = Client(server)
    dummy = {**body, "auth": {"type": "m.login.dummy"}}
    fails(anyone.post("register", dummy, headers=headers), 401, "M_FORBIDDEN")
    guessed = {"type": "m.login.registration_token", "token": "A" * 43}
    fails(anyone.post("register", {**body, "auth": guessed}, headers=headers), 401, "M_FORBIDDEN")
    assert admins_of(server) == []
    token = printed_token(server)
    auth = {"type": "m.login.registration_token", "token": token}
    body["username"] = "owner"
    ok(anyone.post("register", {**body, "auth": auth}, headers=headers))
    assert admins_of(server) == ["@owner:test.example"]
    again = {"username": "mallory", "password": PASSWORD, "auth": auth}
    assert anyone.post("register", again, headers=headers).status_code in (401, 403)
    ok(anyone.post("register", dummy, headers=headers))
    assert admins_of(server) == ["@owner:test.example"]


def test_sec_32_two_with_the_printed_token_at_once(new_server: Callable[..., Server]) -> None:
    """Class 32: the token makes one admin, however many send it at the same time."""
    server = new_server(allow_registration=False)
    auth = {"type": "m.login.registration_token", "token": printed_token(server)}

    def attempt(number: int) -> int:
        body = {"username": f"user{number}", "password": PASSWORD, "auth": auth}
        return Client(server).post("register", body).status_code

    with ThreadPoolExecutor(6) as pool:
        results = sorted(pool.map(attempt, range(6)))
    assert results.count(200) == 1, results
    assert len(admins_of(server)) == 1


# ── 14.7  Login and refresh ──────────────────────────────────────────────────


def test_login_flows(nobody: Client) -> None:
    flows = {flow["type"]: flow for flow in ok(nobody.get("login"))["flows"]}
    kinds = {"m.login.password", "m.login.token", "m.login.application_service"}
    assert flows.keys() == kinds
    assert flows["m.login.token"]["get_login_token"] is True


def test_login_takes_all_ways_to_name_a_user(server: Server, alice: Client) -> None:
    localpart = alice.user_id[1:].split(":")[0]
    anyone = Client(server)
    for user in (
        alice.user_id,
        localpart,
        alice.user_id.upper().replace("TEST.EXAMPLE", server.name),
    ):
        ok(try_login(anyone, user, PASSWORD))
        ok(anyone.post("login", {"type": "m.login.password", "user": user, "password": PASSWORD}))


@pytest.mark.parametrize(
    ("body", "status", "errcode"),
    [
        ({}, 400, "M_MISSING_PARAM"),
        ({"type": 5}, 400, "M_BAD_JSON"),
        ({"type": "m.login.password"}, 400, "M_MISSING_PARAM"),
        ({"type": "m.login.password", "user": "x"}, 400, "M_MISSING_PARAM"),
        ({"type": "m.login.password", "identifier": {}, "password": "x"}, 403, "M_FORBIDDEN"),
        (
            {
                "type": "m.login.password",
                "identifier": {"type": "m.id.thirdparty", "medium": "email", "address": "a@b.c"},
                "password": "x",
            },
            403,
            "M_FORBIDDEN",
        ),
        (
            {"type": "m.login.password", "medium": "email", "address": "a@b.c", "password": "x"},
            400,
            "M_MISSING_PARAM",
        ),
        (
            {
                "type": "m.login.password",
                "identifier": {"type": "m.id.user", "user": "@a:elsewhere"},
                "password": "x",
            },
            403,
            "M_FORBIDDEN",
        ),
        (
            {
                "type": "m.login.password",
                "identifier": {"type": "m.id.user", "user": ["a"]},
                "password": "x",
            },
            400,
            "M_BAD_JSON",
        ),
        ({"type": "m.login.token"}, 400, "M_MISSING_PARAM"),
        ({"type": "m.login.token", "token": "x"}, 403, "M_FORBIDDEN"),
        ({"type": "m.login.application_service"}, 400, "M_MISSING_PARAM"),
        ({"type": "m.login.application_service", "user": "x"}, 401, "M_MISSING_TOKEN"),
        ({"type": "m.login.dummy"}, 400, "M_UNKNOWN"),
    ],
)
def test_bad_logins(nobody: Client, body: Json, status: int, errcode: str) -> None:
    fails(nobody.post("login", body), status, errcode)


def login_token(client: Client) -> str:
    """A token for another device of the same user."""
    answer = ok(client.uia("POST", "/_matrix/client/v1/login/get_token"))
    assert answer["expires_in_ms"] == 120_000
    return str(answer["login_token"])


def test_login_by_token(server: Server, alice: Client) -> None:
    asked = alice.post("/_matrix/client/v1/login/get_token", {})
    assert asked.status_code == 401
    body = {"type": "m.login.token", "token": login_token(alice), "device_id": "TV"}
    answer = ok(Client(server).post("login", body))
    assert (answer["user_id"], answer["device_id"]) == (alice.user_id, "TV")


def test_sec_28_login_tokens_are_long_bound_and_good_once(server: Server, alice: Client) -> None:
    """Class 28: at least 128 bits, single use, for that account and that purpose only."""
    token = login_token(alice)
    assert len(token) * math.log2(62) >= 128
    assert token not in {login_token(alice) for _ in range(3)}
    body = {"type": "m.login.token", "token": token}
    assert ok(Client(server).post("login", body))["user_id"] == alice.user_id
    fails(Client(server).post("login", body), 403, "M_FORBIDDEN")
    fails(Client(server, login_token(alice)).get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    path = ("user", alice.user_id, "openid", "request_token")
    openid = ok(alice.post(path))["access_token"]
    fails(Client(server).post("login", {**body, "token": openid}), 403, "M_FORBIDDEN")


def test_sec_28_login_tokens_expire() -> None:
    """Class 28: a token that was never used is worth nothing after its time."""
    clock = Clock()
    tokens = conduit.ShortLived[int](120, clock)
    token = tokens.add(7)
    assert tokens.get(token) == 7
    clock.now += 121
    assert tokens.get(token) is None
    assert tokens.pop(token) is None


def test_sec_33_no_jwt_is_believed(alice: Client) -> None:
    """Class 33: without a configured secret no token that says its own name logs anybody in."""

    def part(value: Json) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    claims = part({"sub": alice.user_id[1:].split(":")[0]})
    for header in ({"alg": "none"}, {"alg": "HS256"}):
        forged = f"{part(header)}.{claims}."
        for kind in ("org.matrix.login.jwt", "m.login.jwt", "m.login.token"):
            answer = Client(alice.server).post("login", {"type": kind, "token": forged})
            assert answer.status_code in (400, 403)


def test_emergency_password(new_server: Callable[..., Server]) -> None:
    server = new_server(emergency_password="break glass")
    register(server, "alice")
    anyone = Client(server)
    fails(try_login(anyone, "conduit", "wrong"), 403, "M_FORBIDDEN")
    bot = client_from(server, ok(try_login(anyone, "conduit", "break glass")))
    ok(bot.get("account/whoami"))
    assert read_database(
        server,
        """
        SELECT password_hash FROM accounts JOIN users USING (user_nid)
        WHERE user_id = '@conduit:test.example'
        """,
    ) == [(None,)]
    server.stop()
    server.write_config(emergency_password=None)
    server.start()
    fails(bot.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    fails(try_login(anyone, "conduit", "break glass"), 403, "M_FORBIDDEN")
    fails(try_login(anyone, "conduit", ""), 403, "M_FORBIDDEN")


def test_sec_29_ten_wrong_passwords_then_wait(new_server: Callable[..., Server]) -> None:
    """Class 29: per account and address; a forged X-Forwarded-For changes nothing; no lockout."""
    server = new_server(trusted_proxies=[])
    alice = register(server, "alice")
    change_of_address = 0

    def wrong_try(name: str) -> httpx.Response:
        nonlocal change_of_address
        change_of_address += 1
        headers = from_afar(f"203.0.113.{change_of_address}")
        return try_login(Client(server), name, "wrong", headers=headers)

    for name in ("alice", "nobody"):
        for _ in range(10):
            fails(wrong_try(name), 403, "M_FORBIDDEN")
        blocked = wrong_try(name)
        body = fails(blocked, 429, "M_LIMIT_EXCEEDED")
        assert 0 < int(blocked.headers["Retry-After"]) <= 30
        assert 0 < body["retry_after_ms"] <= 30_000
    ok(alice.get("account/whoami"))


def test_sec_29_the_owner_is_not_locked_out(new_server: Callable[..., Server]) -> None:
    """Class 29: while others guess, the owner gets in at home and at a new address."""
    server = new_server(trusted_proxies=["127.0.0.1"], registration_token="let-me-in")
    register(server, "alice")
    anyone = Client(server)
    ok(try_login(anyone, "alice", PASSWORD, headers=from_afar("192.0.2.1")))
    with ThreadPoolExecutor(8) as pool:
        addresses = [f"10.0.{n}.1" for n in range(20) for _ in range(12)]
        list(
            pool.map(
                lambda a: try_login(Client(server), "alice", "wrong", headers=from_afar(a)),
                addresses,
            )
        )
    fails(try_login(anyone, "alice", "wrong", headers=from_afar("10.0.1.1")), 429)
    ok(try_login(anyone, "alice", PASSWORD, headers=from_afar("192.0.2.1")))
    ok(try_login(anyone, "alice", PASSWORD, headers=from_afar("198.51.100.7")))


def test_sec_29_uia_is_no_way_to_guess_more(new_server: Callable[..., Server]) -> None:
    """Class 29: whoever got hold of a token guesses no faster in this way."""
    alice = register(new_server(), "alice")
    for _ in range(10):
        fails(alice.delete("devices/X", {"auth": password_auth(alice, "", "wrong")}), 401)
    answer = alice.delete("devices/X", {"auth": password_auth(alice, "", "wrong")})
    fails(answer, 429, "M_LIMIT_EXCEEDED")


def test_sec_23_unknown_users_answer_like_wrong_passwords(
    new_server: Callable[..., Server],
) -> None:
    """Class 23: neither text nor time of a failed login tells whether there is such a user."""
    server = new_server()
    for number in range(6):
        register(server, f"user{number}")
    anyone = Client(server)
    spent = {"user": 0.0, "nobody": 0.0}
    texts = set()
    for number in range(6):
        for kind in spent:
            began = server.cpu()
            answers = [try_login(anyone, f"{kind}{number}", "wrong") for _ in range(3)]
            spent[kind] += server.cpu() - began
            texts |= {json.dumps(fails(answer, 403), sort_keys=True) for answer in answers}
    assert len(texts) == 1
    assert abs(spent["user"] - spent["nobody"]) < 0.2 * spent["user"], spent


def test_sec_25_dead_tokens_open_nothing(new_server: Callable[..., Server]) -> None:
    """Class 25: each kind of token of a user who is gone, at each kind of endpoint."""
    server = new_server()
    register(server, "admin")

    def every_token(client: Client) -> list[str]:
        refreshing = client.login(refresh_token=True)
        refreshed = ok(Client(server).post("refresh", {"refresh_token": refreshing.refresh_token}))
        return [client.token, refreshing.token, refreshed["access_token"]]

    for way in ("logout/all", "account/deactivate"):
        user = register(server, unique())
        tokens = every_token(user)
        login = login_token(user)
        last = user.login(refresh_token=True)
        if way == "logout/all":
            ok(user.post(way))
        else:
            ok(user.uia("POST", way, {}))
            fails(Client(server).post("login", {"type": "m.login.token", "token": login}), 403)
        for token in [*tokens, last.token]:
            dead = Client(server, token, user.user_id)
            for method, path in (
                ("GET", "account/whoami"),
                ("GET", "sync"),
                ("POST", "keys/upload"),
                ("GET", "/_matrix/client/v1/media/config"),
                ("PUT", ("profile", user.user_id, "displayname")),
                ("POST", "createRoom"),
                ("GET", "devices"),
                ("POST", "logout"),
            ):
                fails(dead.request(method, path, {}), 401, "M_UNKNOWN_TOKEN")
        answer = Client(server).post("refresh", {"refresh_token": last.refresh_token})
        fails(answer, 401, "M_UNKNOWN_TOKEN")


def test_sec_30_no_secret_in_database_or_log(new_server: Callable[..., Server]) -> None:
    """Class 30: tokens are hashed at rest, and neither they nor passwords are in the log."""
    server = new_server(log="debug")
    alice = register(server, "alice", refresh_token=True)
    ok(Client(server).get("account/whoami", access_token=alice.token))
    short = login_token(alice)
    new_password = "a different pass phrase"
    session = alice.post("account/password", {"new_password": new_password}).json()["session"]
    body = {"new_password": new_password, "auth": password_auth(alice, session)}
    ok(alice.post("account/password", body))
    refresh = {"refresh_token": alice.refresh_token}
    fresh = ok(Client(server).post("refresh", refresh))
    fails(try_login(Client(server), "alice", "my other secret"), 403)
    server.stop()
    stored = b"".join(path.read_bytes() for path in server.data.rglob("*") if path.is_file())
    secrets_used = [
        PASSWORD,
        new_password,
        "my other secret",
        short,
        alice.token,
        alice.refresh_token,
        fresh["access_token"],
        fresh["refresh_token"],
        session,
    ]
    for secret in secrets_used:
        assert secret.encode() not in stored
        assert secret not in server.log


# ── 14.8  The own account ────────────────────────────────────────────────────


def test_capabilities(server: Server, alice: Client) -> None:
    answer = ok(alice.get("capabilities"))["capabilities"]
    assert answer["m.change_password"] == {"enabled": True}
    assert answer["m.get_login_token"] == {"enabled": True}
    assert answer["m.3pid_changes"] == {"enabled": False}
    assert answer["m.profile_fields"] == {"enabled": True}
    versions = answer["m.room_versions"]
    assert versions["default"] == "12"
    assert versions["available"]["12"] == "stable"
    assert set(versions["available"]) <= set(conduit.ROOM_VERSIONS)


def test_openid_token_tells_who_somebody_is_and_nothing_else(server: Server, alice: Client) -> None:
    path = ("user", alice.user_id, "openid", "request_token")
    answer = ok(alice.post(path))
    assert answer["matrix_server_name"] == server.name
    assert answer["expires_in"] == 3600
    token = answer["access_token"]
    userinfo = "/_matrix/federation/v1/openid/userinfo"
    anyone = Client(server)
    assert ok(anyone.get(userinfo, access_token=token)) == {"sub": alice.user_id}
    fails(anyone.get(userinfo, access_token="x"), 401, "M_UNKNOWN_TOKEN")
    fails(anyone.get(userinfo), 401)
    fails(Client(server, token).get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    fails(alice.post(("user", "@other:test.example", "openid", "request_token")), 403)


def test_there_are_no_third_party_identifiers(server: Server, alice: Client) -> None:
    assert ok(alice.get("account/3pid")) == {"threepids": []}
    session = {"client_secret": "x", "sid": "y"}
    fails(alice.post("account/3pid/add", session), 403)
    email = {"client_secret": "x", "email": "a@example.org", "send_attempt": 1}
    anyone = Client(server)
    for path in ("register", "account/3pid", "account/password"):
        fails(anyone.post(f"{path}/email/requestToken", email), 403, "M_THREEPID_DENIED")
    address = {"medium": "email", "address": "a@example.org"}
    answer = ok(alice.post("account/3pid/delete", address))
    assert answer == {"id_server_unbind_result": "no-support"}


# ── 14.9  Transaction ids ────────────────────────────────────────────────────


def test_transactions_belong_to_a_device_and_survive_refresh(server: Server, alice: Client) -> None:
    device = alice.login(refresh_token=True)
    room = alice.create_room()
    first = device.send_text(room, "once", "txn1")
    assert device.send_text(room, "once", "txn1") == first
    fresh = ok(Client(server).post("refresh", {"refresh_token": device.refresh_token}))
    device.token = fresh["access_token"]
    assert device.send_text(room, "once", "txn1") == first
    assert alice.send_text(room, "once", "txn1") != first


def test_transactions_survive_a_restart(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice = register(server, "alice")
    room = alice.create_room()
    first = alice.send_text(room, "once", "txn1")
    server.restart()
    assert alice.send_text(room, "once", "txn1") == first
    assert alice.bodies(room) == ["once"]


# ═════════════════════════════════════════════════════════════════════════════
#  15. PROFILES, ACCOUNT DATA, FILTERS
# ═════════════════════════════════════════════════════════════════════════════

AVATAR: Final = "mxc://test.example/abcDEF123"


def profile_path(client: Client, *name: str) -> tuple[str, ...]:
    """The path of a client's profile, or of a field of it."""
    return ("profile", client.user_id, *name)


def set_profile(client: Client, name: str, value: Any) -> httpx.Response:
    """Set a field of the own profile."""
    return client.put(profile_path(client, name), {name: value})


def account_data_in(result: Json, room_id: str | None = None) -> dict[str, Json]:
    """The account data of a sync result by type, of a room or of the account."""
    place = result if room_id is None else result["rooms"]["join"].get(room_id, {})
    events = place.get("account_data", {}).get("events", [])
    return {event["type"]: event["content"] for event in events}


# ── 15.1  Profiles ───────────────────────────────────────────────────────────


def test_profile_fields_are_set_read_and_deleted(alice: Client, nobody: Client) -> None:
    fields = {"displayname": "Älice 🦆", "avatar_url": AVATAR, "m.tz": "Europe/Berlin"}
    fields["com.example.pronouns"] = cast("Any", [{"language": "en", "value": "she"}, 1.5, None])
    for name, value in fields.items():
        ok(set_profile(alice, name, value))
        assert ok(nobody.get(profile_path(alice, name))) == {name: value}
    assert ok(nobody.get(profile_path(alice))) == fields
    for name in fields:
        ok(alice.delete(profile_path(alice, name)))
        ok(alice.delete(profile_path(alice, name)))
        fails(nobody.get(profile_path(alice, name)), 404, "M_NOT_FOUND")
    assert ok(nobody.get(profile_path(alice))) == {}


def test_unstable_path_of_profile_fields(alice: Client) -> None:
    path = "/_matrix/client/unstable/uk.tcpip.msc4133/profile/" + quote(alice.user_id) + "/x.y"
    ok(alice.put(path, {"x.y": 1}))
    assert ok(alice.get(path)) == {"x.y": 1}


def test_empty_name_and_avatar_take_them_away(alice: Client) -> None:
    ok(set_profile(alice, "avatar_url", AVATAR))
    ok(set_profile(alice, "avatar_url", ""))
    ok(set_profile(alice, "displayname", ""))
    assert ok(alice.get(profile_path(alice))) == {}


@pytest.mark.parametrize(
    ("name", "value", "errcode"),
    [
        ("displayname", 5, "M_BAD_JSON"),
        ("displayname", None, "M_BAD_JSON"),
        ("displayname", "x" * 257, "M_INVALID_PARAM"),
        ("avatar_url", "https://example.org/x.png", "M_INVALID_PARAM"),
        ("avatar_url", "mxc://a b/c", "M_INVALID_PARAM"),
        ("avatar_url", "mxc://test.example/../x", "M_INVALID_PARAM"),
        ("avatar_url", ["mxc://a/b"], "M_BAD_JSON"),
        ("m.tz", "../../etc/passwd", "M_INVALID_PARAM"),
        ("Upper.Case", 1, "M_INVALID_PARAM"),
        ("5start", 1, "M_INVALID_PARAM"),
        ("a" * 256, 1, "M_KEY_TOO_LARGE"),
        ("com.example.null", None, "M_BAD_JSON"),
    ],
)
def test_bad_profile_fields(alice: Client, name: str, value: Any, errcode: str) -> None:
    fails(set_profile(alice, name, value), 400, errcode)


def test_profile_errors(alice: Client, bob: Client) -> None:
    body = {"displayname": "x"}
    fails(alice.put(profile_path(alice, "avatar_url"), body), 400, "M_MISSING_PARAM")
    fails(alice.put(profile_path(bob, "displayname"), body), 403, "M_FORBIDDEN")
    fails(alice.delete(profile_path(bob, "displayname")), 403, "M_FORBIDDEN")
    fails(alice.get(("profile", "@nobody:test.example")), 404, "M_NOT_FOUND")
    fails(alice.get(("profile", "nobody")), 400, "M_INVALID_PARAM")


def test_profile_has_at_most_64_kib(alice: Client) -> None:
    for number in range(6):
        ok(set_profile(alice, f"com.example.f{number}", "x" * 10_000))
    fails(set_profile(alice, "com.example.f6", "x" * 10_000), 400, "M_PROFILE_TOO_LARGE")
    ok(set_profile(alice, "com.example.f5", "x" * 10))
    ok(set_profile(alice, "com.example.f6", "x" * 10_000))


def test_name_and_avatar_follow_into_rooms(alice: Client, bob: Client) -> None:
    rooms = [alice.room_with(bob) for _ in range(3)]
    bob.poll()
    ok(set_profile(alice, "displayname", "First"))
    ok(set_profile(alice, "displayname", "Second"))
    ok(set_profile(alice, "avatar_url", AVATAR))

    def follows(room_id: str) -> bool:
        content = bob.state(room_id, "m.room.member", alice.user_id)
        return (content.get("displayname"), content.get("avatar_url")) == ("Second", AVATAR)

    for room_id in rooms:
        eventually(lambda at=room_id: follows(at))
    seen = bob.poll()
    last = bob.timeline(rooms[0], seen)[-1]
    assert last["type"] == "m.room.member"
    assert last["content"]["membership"] == "join"
    ok(set_profile(alice, "m.tz", "Europe/Paris"))
    ok(set_profile(alice, "avatar_url", AVATAR))
    time.sleep(0.3)
    assert bob.timeline(rooms[0], bob.poll()) == []
    new_room = alice.create_room()
    assert alice.state(new_room, "m.room.member", alice.user_id)["displayname"] == "Second"


def test_member_events_keep_what_is_not_of_the_profile(alice: Client) -> None:
    room = alice.create_room()
    content = {"membership": "join", "displayname": "Here only", "com.example.x": 1, "reason": "y"}
    alice.set_state(room, "m.room.member", content, alice.user_id)
    ok(set_profile(alice, "displayname", "Everywhere"))
    wanted = {"membership": "join", "displayname": "Everywhere", "com.example.x": 1}
    eventually(lambda: alice.state(room, "m.room.member", alice.user_id) == wanted)


def test_interrupted_profile_change_goes_on_after_a_restart(
    new_server: Callable[..., Server],
) -> None:
    server = new_server()
    alice = register(server, "alice")
    room = alice.create_room()
    server.stop()
    sql = "UPDATE profiles SET value = ? WHERE field = 'displayname' AND value = ?"
    change_database(server, sql, '"Interrupted"', '"alice"')
    user = "SELECT user_nid FROM users WHERE user_id = '@alice:test.example'"
    change_database(server, f"UPDATE accounts SET behind = 1 WHERE user_nid = ({user})")
    server.start()
    eventually(
        lambda: (
            alice.state(room, "m.room.member", alice.user_id).get("displayname") == "Interrupted"
        )
    )
    eventually(lambda: not read_database(server, "SELECT 1 FROM accounts WHERE behind > 0"))


@slow
def test_a_profile_in_many_rooms_does_not_hold_up_others(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice, bob = register(server, "alice"), register(server, "bob")
    rooms = [alice.create_room() for _ in range(150)]
    ok(set_profile(alice, "displayname", "Busy"))
    longest = 0.0
    for _ in range(20):
        began = time.perf_counter()
        ok(bob.get("account/whoami"))
        longest = max(longest, time.perf_counter() - began)
    assert longest < 0.25
    for room_id in rooms:
        eventually(
            lambda at=room_id: (
                alice.state(at, "m.room.member", alice.user_id)["displayname"] == "Busy"
            ),
            30,
        )


# ── 15.2  Account data ───────────────────────────────────────────────────────


def test_account_data_is_kept_and_synced(alice: Client, bob: Client) -> None:
    phone = alice.login()
    phone.poll()
    path = ("user", alice.user_id, "account_data", "com.example.x")
    fails(alice.get(path), 404, "M_NOT_FOUND")
    for content in ({"a": 1}, {"b": [1.5, None, "ü"]}, {}):
        ok(alice.put(path, content))
        assert ok(alice.get(path)) == content
        assert account_data_in(phone.poll())["com.example.x"] == content
    assert "com.example.x" not in account_data_in(phone.poll())
    assert account_data_in(alice.login().sync())["com.example.x"] == {}
    fails(bob.get(path), 403, "M_FORBIDDEN")
    fails(bob.put(path, {}), 403, "M_FORBIDDEN")
    fails(alice.put(path, content="[]"), 400)
    fails(alice.put(path, content="{"), 400, "M_NOT_JSON")


def test_account_data_wakes_a_waiting_sync(alice: Client) -> None:
    phone = alice.login()
    since = phone.sync()["next_batch"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(phone.sync, since, 20_000)
        time.sleep(0.3)
        began = time.monotonic()
        ok(alice.put(("user", alice.user_id, "account_data", "m.direct"), {"@x:y": ["!r:y"]}))
        result = waiting.result()
    assert time.monotonic() - began < 5
    assert account_data_in(result) == {"m.direct": {"@x:y": ["!r:y"]}}


def test_room_account_data(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    path = ("user", alice.user_id, "rooms", room, "account_data", "com.example.x")
    alice.poll()
    fails(alice.get(path), 404, "M_NOT_FOUND")
    ok(alice.put(path, {"a": 1}))
    assert ok(alice.get(path)) == {"a": 1}
    result = alice.poll()
    assert account_data_in(result, room) == {"com.example.x": {"a": 1}}
    assert account_data_in(result) == {}
    assert bob.get(path).status_code == 403
    for room_id, status in (("nonsense", 404), ("!unknown:test.example", 404)):
        wrong = ("user", alice.user_id, "rooms", room_id, "account_data", "x")
        fails(alice.put(wrong, {}), status)
        fails(alice.get(wrong), status)


def test_what_the_server_manages_is_not_set_by_clients(alice: Client) -> None:
    room = alice.create_room()
    for data_type in ("m.fully_read", "m.push_rules"):
        path = ("user", alice.user_id, "account_data", data_type)
        fails(alice.put(path, {}), 405, "M_BAD_JSON")
        in_room = ("user", alice.user_id, "rooms", room, "account_data", data_type)
        fails(alice.put(in_room, {}), 405, "M_BAD_JSON")
    event_id = alice.send_text(room, "hello")
    ok(alice.post(("rooms", room, "read_markers"), {"m.fully_read": event_id}))
    path = ("user", alice.user_id, "rooms", room, "account_data", "m.fully_read")
    assert ok(alice.get(path)) == {"event_id": event_id}
    rules = ok(alice.get(("user", alice.user_id, "account_data", "m.push_rules")))
    assert rules["global"] == ok(alice.get("pushrules/"))["global"]


def test_account_data_has_limits(alice: Client) -> None:
    path = ("user", alice.user_id, "account_data")
    fails(alice.put((*path, "x" * 256), {}), 400)
    fails(alice.put((*path, "com.example.x"), {"x": "x" * 1_048_576}), 413, "M_TOO_LARGE")


def test_ignored_users_are_not_heard(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    path = ("user", alice.user_id, "account_data", "m.ignored_user_list")
    alice.poll()
    ok(alice.put(path, {"ignored_users": {bob.user_id: {}}}))
    bob.send_text(room, "not heard")
    bob.set_state(bob.create_room(alice), "m.room.topic", {"topic": "x"})
    result = alice.poll()
    assert alice.timeline(room, result) == []
    assert not result.get("rooms", {}).get("invite")
    ok(alice.put(path, {"ignored_users": {}}))
    bob.send_text(room, "heard")
    bodies = [e["content"]["body"] for e in alice.timeline(room, alice.poll())]
    assert bodies == ["heard"]
    ok(alice.put(path, {"ignored_users": ["nonsense"]}))
    alice.poll()


# ── 15.3  Tags ───────────────────────────────────────────────────────────────


def test_tags(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    path = ("user", alice.user_id, "rooms", room, "tags")
    alice.poll()
    assert ok(alice.get(path)) == {"tags": {}}
    ok(alice.put((*path, "m.favourite"), {"order": 0.25}))
    ok(alice.put((*path, "u.Würste/Käse"), {}))
    tags = {"m.favourite": {"order": 0.25}, "u.Würste/Käse": {}}
    assert ok(alice.get(path)) == {"tags": tags}
    assert account_data_in(alice.poll(), room)["m.tag"] == {"tags": tags}
    ok(alice.delete((*path, "u.Würste/Käse")))
    ok(alice.delete((*path, "m.favourite")))
    ok(alice.delete((*path, "m.favourite")))
    assert account_data_in(alice.poll(), room)["m.tag"] == {"tags": {}}
    for order in (-0.1, 1.1):
        fails(alice.put((*path, "x"), {"order": order}), 400)
    fails(alice.put((*path, "x"), {"order": "0.5"}), 400, "M_BAD_JSON")
    fails(alice.put((*path, "x" * 256), {}), 400)
    fails(bob.get(path), 403, "M_FORBIDDEN")


def test_nonsense_stored_as_tags_does_no_harm(alice: Client) -> None:
    room = alice.create_room()
    path = ("user", alice.user_id, "rooms", room)
    ok(alice.put((*path, "account_data", "m.tag"), {"tags": ["x"]}))
    assert ok(alice.get((*path, "tags"))) == {"tags": {}}
    ok(alice.put((*path, "tags", "m.favourite"), {}))
    assert ok(alice.get((*path, "tags"))) == {"tags": {"m.favourite": {}}}


# ── 15.4  Filters ────────────────────────────────────────────────────────────


def store_filter(client: Client, definition: Any) -> httpx.Response:
    """Store a filter; the answer, whatever it is."""
    return client.post(("user", client.user_id, "filter"), definition)


def test_filters_are_stored_and_equal_ones_are_one(alice: Client, bob: Client) -> None:
    definition = {"room": {"timeline": {"limit": 10, "types": ["m.room.*"]}}, "event_fields": ["a"]}
    same = {"event_fields": ["a"], "room": {"timeline": {"types": ["m.room.*"], "limit": 10}}}
    first = ok(store_filter(alice, definition))["filter_id"]
    assert ok(store_filter(alice, same))["filter_id"] == first
    assert not first.startswith("{")
    other = ok(store_filter(alice, {"event_format": "federation"}))["filter_id"]
    assert other != first
    assert ok(alice.get(("user", alice.user_id, "filter", first))) == definition
    for missing in ("999", "x", "-1", "1e3", "9" * 30, "{}"):
        fails(alice.get(("user", alice.user_id, "filter", missing)), 404, "M_NOT_FOUND")
    fails(bob.get(("user", alice.user_id, "filter", first)), 403)
    fails(bob.get(("user", bob.user_id, "filter", first)), 404)


BAD_FILTERS: Final[list[Json]] = [
    {"presence": "not an object"},
    {"event_fields": "x"},
    {"event_format": "xml"},
    {"room": {"timeline": []}},
    {"room": {"rooms": ["not a room"]}},
    {"room": {"timeline": {"rooms": ["not a room"]}}},
    {"room": {"state": {"senders": ["not a user"]}}},
    {"presence": {"not_senders": [5]}},
    {"account_data": {"limit": -1}},
    {"account_data": {"limit": "5"}},
    {"account_data": {"limit": True}},
    {"room": {"include_leave": "yes"}},
    {"room": {"timeline": {"contains_url": 1}}},
]


@pytest.mark.parametrize("definition", BAD_FILTERS)
def test_bad_filters_are_refused_stored_or_not(alice: Client, definition: Json) -> None:
    fails(store_filter(alice, definition), 400, "M_BAD_JSON")
    fails(alice.get("sync", filter=json.dumps(definition)), 400, "M_INVALID_PARAM")


def test_inline_filters_are_read(alice: Client) -> None:
    for text in ("{", "{]", '{"a": NaN}', '{"room": ' * 200):
        fails(alice.get("sync", filter=text), 400, "M_INVALID_PARAM")
    assert alice.get("sync", filter="999").status_code in (400, 404)
    room = alice.create_room()
    result = alice.sync(filter={"room": {"timeline": {"limit": 1}}})
    assert len(alice.timeline(room, result)) == 1
    fails(store_filter(alice, {"room": {"rooms": ["!a:b"] * 20_000}}), 413, "M_TOO_LARGE")


def test_old_filters_make_room_for_new(new_server: Callable[..., Server]) -> None:
    alice = register(new_server(), "alice")
    ids = [ok(store_filter(alice, {"event_fields": [str(n)]}))["filter_id"] for n in range(502)]
    assert len(set(ids)) == 502
    fails(alice.get(("user", alice.user_id, "filter", ids[0])), 404)
    ok(alice.get(("user", alice.user_id, "filter", ids[-1])))


JSON_VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["room", "timeline", "limit", "rooms", "senders", "presence", "types"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_filter_check_raises_nothing_but_matrix_errors(value: Any) -> None:
    with contextlib.suppress(conduit.MatrixError):
        conduit.check_filter(value)


def test_deleted_account_data_is_told_once(alice: Client) -> None:
    room_id = alice.create_room()
    own, in_room = ("user", alice.user_id), ("user", alice.user_id, "rooms", room_id)
    base = "/_matrix/client/unstable/org.matrix.msc3391/"
    for place, deleted in ((own, "a"), (in_room, "b")):
        path = (*place, "account_data", deleted)
        ok(alice.put(path, {"x": 1}))
        alice.poll()
        ok(alice.delete(base + path_of(path).removeprefix(CLIENT)))
        fails(alice.get(path), 404, "M_NOT_FOUND")
        news = account_data_in(alice.poll(), room_id if place is in_room else None)
        assert news[deleted] == {}
        fresh = account_data_in(alice.sync(), room_id if place is in_room else None)
        assert deleted not in fresh
        ok(alice.delete(base + path_of(path).removeprefix(CLIENT)))
    assert "account_data" not in alice.poll() or not account_data_in(alice.poll())
    rules = base + path_of((*own, "account_data", "m.push_rules")).removeprefix(CLIENT)
    fails(alice.delete(rules), 405, "M_BAD_JSON")


def test_what_is_kept_for_a_device_goes_with_it(alice: Client) -> None:
    phone = alice.login()
    kind = f"org.matrix.msc3890.local_notification_settings.{phone.device_id}"
    ok(alice.put(("user", alice.user_id, "account_data", kind), {"is_silenced": True}))
    ok(phone.post("logout"))
    fails(alice.get(("user", alice.user_id, "account_data", kind)), 404, "M_NOT_FOUND")


# ═════════════════════════════════════════════════════════════════════════════
#  16. DIRECTORY
# ═════════════════════════════════════════════════════════════════════════════


def fresh_alias(server: Server) -> str:
    """An alias that nobody else in this run has."""
    return f"#{unique('room')}:{server.name}"


def put_alias(client: Client, alias: str, room_id: str) -> httpx.Response:
    """Point an alias at a room."""
    return client.put(("directory", "room", alias), {"room_id": room_id})


def find_users(client: Client, term: str, **fields: Any) -> list[str]:
    """The ids that a search for users finds, in order."""
    answer = ok(client.post("user_directory/search", {"search_term": term, **fields}))
    return [user["user_id"] for user in answer["results"]]


# ── 16.1  Aliases ────────────────────────────────────────────────────────────


def test_alias_is_made_found_and_deleted(server: Server, alice: Client, nobody: Client) -> None:
    room, alias = alice.create_room(), fresh_alias(server)
    ok(put_alias(alice, alias, room))
    answer = ok(nobody.get(("directory", "room", alias)))
    assert answer == {"room_id": room, "servers": [server.name]}
    assert ok(alice.get(("rooms", room, "aliases"))) == {"aliases": [alias]}
    fails(put_alias(alice, alias, room), 409, "M_UNKNOWN")
    ok(alice.delete(("directory", "room", alias)))
    fails(nobody.get(("directory", "room", alias)), 404, "M_NOT_FOUND")
    fails(alice.delete(("directory", "room", alias)), 404, "M_NOT_FOUND")


def test_alias_in_create_room_and_join(server: Server, alice: Client, bob: Client) -> None:
    name = unique("lobby")
    room = alice.create_room(room_alias_name=name, preset="public_chat")
    alias = f"#{name}:{server.name}"
    assert alice.state(room, "m.room.canonical_alias")["alias"] == alias
    assert bob.join(alias) == room
    body = {"room_alias_name": name}
    fails(alice.post("createRoom", body), 400, "M_ROOM_IN_USE")


@pytest.mark.parametrize(
    "alias",
    ["nonsense", "#:test.example", "#a b:test.example", "#x:elsewhere.example", "#x\u0007:t"],
)
def test_bad_aliases(alice: Client, alias: str) -> None:
    fails(put_alias(alice, alias, alice.create_room()), 400, "M_INVALID_PARAM")


def test_alias_needs_membership(server: Server, alice: Client, bob: Client) -> None:
    room, alias = alice.create_room(preset="public_chat"), fresh_alias(server)
    fails(put_alias(bob, alias, room), 403, "M_FORBIDDEN")
    fails(put_alias(bob, alias, "!unknown:test.example"), 403, "M_FORBIDDEN")
    fails(put_alias(bob, alias, "nonsense"), 403)
    bob.join(room)
    ok(put_alias(bob, alias, room))
    bob.leave(room)
    fails(bob.get(("rooms", room, "aliases")), 403, "M_FORBIDDEN")
    ok(bob.delete(("directory", "room", alias)))


def test_who_may_delete_an_alias(server: Server, alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    of_alice, of_bob = fresh_alias(server), fresh_alias(server)
    ok(put_alias(alice, of_alice, room))
    ok(put_alias(bob, of_bob, room))
    fails(bob.delete(("directory", "room", of_alice)), 403, "M_FORBIDDEN")
    ok(alice.delete(("directory", "room", of_bob)))
    admin = Client(server).login("admin")
    ok(admin.delete(("directory", "room", of_alice)))


def test_deleted_alias_leaves_the_canonical_alias(server: Server, alice: Client) -> None:
    room = alice.create_room()
    one, two = fresh_alias(server), fresh_alias(server)
    for alias in (one, two):
        ok(put_alias(alice, alias, room))
    alice.set_state(room, "m.room.canonical_alias", {"alias": one, "alt_aliases": [one, two]})
    ok(alice.delete(("directory", "room", one)))
    assert alice.state(room, "m.room.canonical_alias") == {"alt_aliases": [two]}
    ok(alice.delete(("directory", "room", two)))
    assert alice.state(room, "m.room.canonical_alias") == {"alt_aliases": []}


def test_sec_09_the_admins_alias_is_nobodys(server: Server, alice: Client) -> None:
    """Class 9: #admins cannot be taken, moved or deleted, not even by an admin."""
    admins = f"#admins:{server.name}"
    admin = Client(server).login("admin")
    for client in (alice, admin):
        room = client.create_room()
        answer = put_alias(client, admins, room)
        assert answer.status_code in (400, 409)
        assert client.delete(("directory", "room", admins)).status_code in (403, 404)
        body = {"room_alias_name": "admins"}
        assert client.post("createRoom", body).status_code == 400


# ── 20.2, 20.3  The list of rooms ────────────────────────────────────────────


def publish(client: Client, room_id: str, visibility: str = "public") -> httpx.Response:
    """Put a room into the list, or take it out."""
    return client.put(("directory", "list", "room", room_id), {"visibility": visibility})


def listed(client: Client, **fields: Any) -> list[str]:
    """The ids of the rooms in the list, all pages."""
    rooms: list[str] = []
    body: Json = {**fields}
    while True:
        page = ok(client.post("publicRooms", body))
        rooms += [room["room_id"] for room in page["chunk"]]
        if "next_batch" not in page:
            return rooms
        body["since"] = page["next_batch"]


def test_visibility_in_the_list(server: Server, alice: Client, bob: Client, nobody: Client) -> None:
    room = alice.room_with(bob, visibility="public", preset="private_chat", name="Listed")
    path = ("directory", "list", "room", room)
    assert ok(nobody.get(path)) == {"visibility": "public"}
    fails(publish(bob, room, "private"), 403, "M_FORBIDDEN")
    fails(publish(alice, room, "secret"), 400)
    ok(publish(alice, room, "private"))
    assert ok(nobody.get(path)) == {"visibility": "private"}
    ok(alice.put(path, {}))
    assert ok(nobody.get(path)) == {"visibility": "public"}
    fails(nobody.get(("directory", "list", "room", "!unknown:test.example")), 404, "M_NOT_FOUND")
    ok(publish(Client(server).login("admin"), room, "private"))


def test_listed_room_is_shown_as_it_is_now(server: Server, alice: Client, bob: Client) -> None:
    name, alias = unique("Shown"), fresh_alias(server)
    room = alice.create_room(
        visibility="public", preset="public_chat", name=name, topic="of many things"
    )

    def shown() -> Json:
        answer = ok(alice.post("publicRooms", {"filter": {"generic_search_term": name.upper()}}))
        assert len(answer["chunk"]) == 1
        return cast("Json", answer["chunk"][0])

    assert shown() == {
        "room_id": room,
        "name": name,
        "topic": "of many things",
        "num_joined_members": 1,
        "world_readable": False,
        "guest_can_join": False,
        "join_rule": "public",
    }
    bob.join(room)
    ok(put_alias(alice, alias, room))
    alice.set_state(room, "m.room.canonical_alias", {"alias": alias})
    alice.set_state(room, "m.room.avatar", {"url": "mxc://test.example/x"})
    alice.set_state(room, "m.room.history_visibility", {"history_visibility": "world_readable"})
    alice.set_state(room, "m.room.guest_access", {"guest_access": "can_join"})
    alice.set_state(room, "m.room.topic", {"topic": {"nonsense": 1}})
    now = shown()
    assert now["num_joined_members"] == 2
    assert now["canonical_alias"] == alias
    assert now["avatar_url"] == "mxc://test.example/x"
    assert (now["world_readable"], now["guest_can_join"]) == (True, True)
    assert "topic" not in now
    for client in (alice, bob):
        client.leave(room)
    assert room not in listed(alice)


def test_list_is_paged_both_ways(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice, bob = register(server, "alice"), register(server, "bob")
    rooms = [alice.create_room(visibility="public", preset="public_chat") for _ in range(7)]
    large = rooms[3]
    bob.join(large)
    everything = listed(alice)
    assert sorted(everything) == sorted(rooms)
    assert everything[0] == large
    assert listed(alice, limit=2) == everything
    first = ok(Client(server).get("publicRooms", limit=3))
    assert first["total_room_count_estimate"] == 7
    assert "prev_batch" not in first
    second = ok(alice.get("publicRooms", limit=3, since=first["next_batch"]))
    third = ok(alice.get("publicRooms", limit=3, since=second["next_batch"]))
    assert "next_batch" not in third
    chunks = [[room["room_id"] for room in page["chunk"]] for page in (first, second, third)]
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    back = ok(alice.get("publicRooms", limit=3, since=third["prev_batch"]))
    assert [room["room_id"] for room in back["chunk"]] == chunks[1]
    front = ok(alice.get("publicRooms", limit=3, since=back["prev_batch"]))
    assert [room["room_id"] for room in front["chunk"]] == chunks[0]
    for since in ("x", "-5", "1e3", "9" * 40):
        fails(alice.get("publicRooms", since=since), 400, "M_INVALID_PARAM")
    fails(alice.get("publicRooms", limit=0), 400)
    fails(alice.post("publicRooms", {"limit": 0}), 400)
    fails(alice.get("publicRooms", server="elsewhere.example"), 404)
    ok(alice.get("publicRooms", server=server.name))


def test_list_by_room_type(alice: Client) -> None:
    tag = unique("typed")
    create = {"visibility": "public", "preset": "public_chat", "name": tag}
    plain = alice.create_room(**create)
    space = alice.create_room(**create, creation_content={"type": "m.space"})

    def of_types(*kinds: str | None) -> set[str]:
        wanted = {"generic_search_term": tag, "room_types": list(kinds)}
        return set(listed(alice, filter=wanted))

    assert of_types(None) == {plain}
    assert of_types("m.space") == {space}
    assert of_types(None, "m.space") == {plain, space}
    assert of_types() == set()
    assert set(listed(alice, filter={"generic_search_term": tag})) == {plain, space}
    assert listed(alice, third_party_instance_id="irc") == []
    for wrong in ("m.space", {"a": 1}):
        fails(alice.post("publicRooms", {"filter": {"room_types": wrong}}), 400, "M_BAD_JSON")


@given(st.integers(0, 12), st.integers(1, 5))
def test_pages_cover_everything_once(size: int, limit: int) -> None:
    rooms: list[Json] = [{"room_id": f"!{number}:a"} for number in range(size)]
    page = conduit.page_of(rooms, "0", limit)
    forwards = list(page["chunk"])
    while "next_batch" in page:
        page = conduit.page_of(rooms, page["next_batch"], limit)
        forwards += page["chunk"]
    assert forwards == rooms
    backwards = list(page["chunk"])
    while "prev_batch" in page:
        page = conduit.page_of(rooms, page["prev_batch"], limit)
        backwards = page["chunk"] + backwards
    assert backwards == rooms


# ── 16.2  The search for users ───────────────────────────────────────────────


def test_users_are_found_by_name_and_id(alice: Client, bob: Client) -> None:
    tag = unique("zz")
    ok(bob.put(("profile", bob.user_id, "displayname"), {"displayname": f"Ärmel {tag} Schmidt"}))
    assert find_users(alice, tag) == []
    alice.room_with(bob)
    for term in (
        tag,
        tag.upper(),
        f"ÄRMEL {tag}",
        f"schmidt {tag[:6]}",
        bob.user_id,
        bob.user_id[1:9],
    ):
        assert bob.user_id in find_users(alice, term), term
    answer = ok(alice.post("user_directory/search", {"search_term": tag}))
    assert answer == {
        "results": [{"user_id": bob.user_id, "display_name": f"Ärmel {tag} Schmidt"}],
        "limited": False,
    }
    assert find_users(bob, tag) == []  # not oneself
    for strange in ("%", "_%_", "\\", "'", "   ", ""):
        assert tag not in str(find_users(alice, strange + tag[:0]))
    fails(alice.post("user_directory/search", {}), 400, "M_MISSING_PARAM")
    fails(alice.post("user_directory/search", {"search_term": "x", "limit": 0}), 400)


def test_search_has_a_limit(server: Server, alice: Client) -> None:
    tag = unique("many").replace("_", "")
    found = [register(server, name) for name in (f"x{tag}", f"{tag}yy", tag)]
    room = alice.create_room(preset="public_chat")
    for user in found:
        user.join(room)
    assert find_users(alice, tag) == sorted(user.user_id for user in found)
    answer = ok(alice.post("user_directory/search", {"search_term": tag, "limit": 2}))
    assert answer["limited"] is True
    assert len(answer["results"]) == 2


def test_sec_22_strangers_are_not_found(alice: Client, bob: Client) -> None:
    """Class 22: only users in a room with the searcher, or in one that is open to all."""
    assert find_users(alice, bob.user_id) == []
    private = bob.create_room()
    assert find_users(alice, bob.user_id) == []
    bob.set_state(private, "m.room.join_rules", {"join_rule": "public"})
    assert find_users(alice, bob.user_id) == [bob.user_id]
    bob.set_state(private, "m.room.join_rules", {"join_rule": "invite"})
    assert find_users(alice, bob.user_id) == []
    readable = {"history_visibility": "world_readable"}
    bob.set_state(private, "m.room.history_visibility", readable)
    assert find_users(alice, bob.user_id) == [bob.user_id]
    bob.leave(private)
    assert find_users(alice, bob.user_id) == []
    shared = alice.room_with(bob)
    assert find_users(alice, bob.user_id) == [bob.user_id]
    bob.leave(shared)
    assert find_users(alice, bob.user_id) == []


def test_sec_22_names_in_private_rooms_stay_there(alice: Client, bob: Client) -> None:
    """Class 22, CVE-2021-39164: the name that somebody has in one room is not found by others."""
    secret = unique("secretname")
    private = bob.create_room()
    content = {"membership": "join", "displayname": secret}
    bob.set_state(private, "m.room.member", content, bob.user_id)
    alice.room_with(bob)
    assert find_users(alice, secret) == []
    answer = ok(alice.post("user_directory/search", {"search_term": bob.user_id}))
    assert secret not in json.dumps(answer)


def test_sec_22_aliases_and_data_of_rooms_one_is_not_in(alice: Client, bob: Client) -> None:
    """Class 22: a room's aliases and account data are for its members."""
    room = alice.create_room()
    fails(bob.get(("rooms", room, "aliases")), 403, "M_FORBIDDEN")
    fails(bob.get(("rooms", "!unknown:test.example", "aliases")), 403, "M_FORBIDDEN")
    known = bob.get(("user", bob.user_id, "rooms", room, "account_data", "x"))
    unknown = bob.get(("user", bob.user_id, "rooms", "!unknown:test.example", "account_data", "x"))
    assert fails(known, 404) == fails(unknown, 404)


def test_deactivated_users_are_not_found(server: Server, alice: Client) -> None:
    gone = register(server, unique("gone"))
    room = alice.create_room(preset="public_chat")
    gone.join(room)
    assert find_users(alice, gone.user_id) == [gone.user_id]
    ok(gone.uia("POST", "account/deactivate", {}))
    eventually(lambda: find_users(alice, gone.user_id) == [])


# ═════════════════════════════════════════════════════════════════════════════
#  51. DELAYED EVENTS
# ═════════════════════════════════════════════════════════════════════════════

DELAYED: Final = "/_matrix/client/unstable/org.matrix.msc4140/"


def delayed_send(client: Client, room_id: str, delay: int, body: str, txn_id: str = "") -> str:
    """Schedule a text message; the delay_id."""
    path = ("rooms", room_id, "send", "m.room.message", txn_id or unique())
    query = {"org.matrix.msc4140.delay": delay}
    answer = client.put(path, {"msgtype": "m.text", "body": body}, params=query)
    client.checked = True
    return str(ok(answer)["delay_id"])


@pytest.fixture
def caller(server: Server) -> Client:
    """A user whose answers to delayed requests are beyond the specification's schema."""
    client = register(server)
    client.checked = False
    return client


def delayed_set(client: Client, room_id: str, delay: int, key: str, content: Json) -> str:
    """Schedule a piece of state; the delay_id."""
    path = ("rooms", room_id, "state", "org.example.call", key)
    query = {"org.matrix.msc4140.delay": delay}
    return str(ok(client.put(path, content, params=query))["delay_id"])


def act(client: Client, delay_id: str, action: str) -> httpx.Response:
    return client.post(f"{DELAYED}delayed_events/{delay_id}/{action}")


def look(client: Client, delay_id: str) -> Json:
    return ok(client.get(f"{DELAYED}delayed_events/{delay_id}"))


def waiting_for(client: Client) -> list[str]:
    found = ok(client.get(f"{DELAYED}delayed_events"))["delayed_events"]
    return [each["delay_id"] for each in found]


def test_a_delayed_event_comes_in_its_time(server: Server, caller: Client, bob: Client) -> None:
    room_id = caller.room_with(bob)
    path = ("rooms", room_id, "send", "m.room.message", "txn")
    query = {"org.matrix.msc4140.delay": 400}
    content = {"msgtype": "m.text", "body": "later"}
    began = time.time() * 1000
    delay_id = ok(caller.put(path, content, params=query))["delay_id"]
    assert ok(caller.put(path, content, params=query))["delay_id"] == delay_id
    (shown,) = ok(caller.get(f"{DELAYED}delayed_events"))["delayed_events"]
    assert shown["content"] == content
    assert shown["delay_ms"] == shown["delay"] == 400
    assert began - 1 <= shown["scheduled_at"] == shown["running_since"] <= time.time() * 1000
    assert "state_key" not in shown
    assert caller.bodies(room_id) == []
    eventually(lambda: caller.bodies(room_id) == ["later"])
    done = look(caller, delay_id)
    assert done["finalised_ts"] >= done["scheduled_at"] + 400
    assert waiting_for(caller) == []
    event = caller.messages(room_id)["chunk"][0]
    assert event["event_id"] == done["event_id"]
    assert event["unsigned"]["org.matrix.msc4140.delay_id"] == delay_id
    assert "transaction_id" not in event["unsigned"]
    others = bob.messages(room_id)["chunk"][0]
    assert "org.matrix.msc4140.delay_id" not in others["unsigned"]


def test_send_cancel_restart_and_what_follows(server: Server, caller: Client) -> None:
    room_id = caller.create_room()
    sent, cancelled, again = (
        delayed_set(caller, room_id, 60_000, key, {"left": True}) for key in ("a", "b", "c")
    )
    ok(act(caller, sent, "send"))
    ok(act(caller, cancelled, "cancel"))
    first = look(caller, again)["scheduled_at"]
    ok(caller.post(f"{DELAYED}delayed_events/{again}", {"action": "restart"}))
    assert look(caller, again)["scheduled_at"] > first
    assert caller.state(room_id, "org.example.call", "a") == {"left": True}
    fails(caller.get(("rooms", room_id, "state", "org.example.call", "b")), 404)
    assert look(caller, sent)["event_id"].startswith("$")
    assert look(caller, cancelled).keys().isdisjoint({"event_id", "error"})
    for delay_id, right in ((sent, "send"), (cancelled, "cancel")):
        for action in ("send", "cancel", "restart"):
            answer = act(caller, delay_id, action)
            if action == right:
                ok(answer)
            else:
                fails(answer, 409, "M_UNKNOWN")
    fails(act(caller, again, "explode"), 400, "M_INVALID_PARAM")
    fails(act(caller, "unknown", "send"), 404, "M_NOT_FOUND")
    assert waiting_for(caller) == [again]


def test_delayed_events_are_their_users(server: Server, caller: Client, bob: Client) -> None:
    room_id = caller.create_room()
    delay_id = delayed_set(caller, room_id, 60_000, "", {})
    fails(bob.get(f"{DELAYED}delayed_events/{delay_id}"), 404, "M_NOT_FOUND")
    fails(act(bob, delay_id, "cancel"), 404, "M_NOT_FOUND")
    assert waiting_for(bob) == []
    ok(act(Client(server), delay_id, "restart"))  # who carries the call knows the secret
    fails(Client(server).get(f"{DELAYED}delayed_events/{delay_id}"), 401)


def test_delayed_events_survive_and_come_in_order(new_server: Callable[..., Server]) -> None:
    server = new_server()
    caller = register(server)
    caller.checked = False
    room_id = caller.create_room()
    for body, delay in (("second", 700), ("first", 600), ("third", 800)):
        delayed_send(caller, room_id, delay, body)
    late = delayed_set(caller, room_id, 3_600_000, "", {})
    server.kill9()
    server.check()
    time.sleep(1)
    server.start()
    eventually(lambda: caller.bodies(room_id) == ["first", "second", "third"])
    assert waiting_for(caller) == [late]


def test_rules_are_asked_when_the_event_is_sent(caller: Client, bob: Client) -> None:
    bob.checked = False
    room_id = caller.room_with(bob)
    levels = caller.state(room_id, "m.room.power_levels")
    refused, early = (
        delayed_set(bob, room_id, delay, key, {}) for delay, key in ((300, "a"), (60_000, "b"))
    )
    fails(act(bob, early, "send"), 403, "M_FORBIDDEN")
    assert waiting_for(bob)[-1] == early
    error = eventually(lambda: look(bob, refused).get("error"))
    assert error["errcode"] == "M_FORBIDDEN"
    caller.set_state(room_id, "m.room.power_levels", {**levels, "events": {"org.example.call": 0}})
    ok(act(bob, early, "send"))


def test_state_of_somebody_else_cancels_what_would_overwrite_it(
    caller: Client, bob: Client
) -> None:
    room_id = caller.room_with(bob, power_level_content_override={"state_default": 0})
    delay_id = delayed_set(caller, room_id, 60_000, "x", {"left": True})
    caller.set_state(room_id, "org.example.call", {"here": 1}, "x")
    assert waiting_for(caller) == [delay_id]
    bob.set_state(room_id, "org.example.call", {"here": 2}, "other")
    assert waiting_for(caller) == [delay_id]
    bob.set_state(room_id, "org.example.call", {"here": 2}, "x")
    assert waiting_for(caller) == []
    fails(act(caller, delay_id, "send"), 409, "M_UNKNOWN")


def test_delays_that_cannot_be(caller: Client) -> None:
    room_id = caller.create_room()
    path = ("rooms", room_id, "send", "m.room.message", unique())
    for delay, status, errcode in (
        ("0", 400, "M_INVALID_PARAM"),
        ("-5", 400, "M_INVALID_PARAM"),
        ("soon", 400, "M_INVALID_PARAM"),
        (f"{conduit.MAX_DELAY_MS + 1}", 403, "M_FORBIDDEN"),
        ("9" * 300, 400, "M_INVALID_PARAM"),
    ):
        fails(caller.put(path, {}, params={"org.matrix.msc4140.delay": delay}), status, errcode)
    own = f"{DELAYED}rooms/{quote(room_id)}/delayed_event/m.room.message/{unique()}"
    fails(caller.put(own, {"content": {}}), 400, "M_MISSING_PARAM")
    fails(caller.put(own, {"delay_ms": 5}), 400, "M_MISSING_PARAM")
    fails(caller.put(own, {"delay_ms": 0, "content": {}}), 400, "M_INVALID_PARAM")
    huge = {"delay_ms": 5, "content": {"body": "x" * 70_000}}
    fails(caller.put(own, huge), 413, "M_TOO_LARGE")
    fails(caller.put(own, {"delay_ms": 5, "content": {"x": 1.5}}), 400, "M_BAD_JSON")
    delay_id = ok(caller.put(own, {"delay": 60_000, "content": {}, "state_key": ""}))["delay_id"]
    assert look(caller, delay_id)["state_key"] == ""
    limits = ok(caller.get("capabilities"))["capabilities"]["org.matrix.msc4140.delayed_events"]
    assert limits == {"max_delay_ms": conduit.MAX_DELAY_MS, "max_scheduled": conduit.MAX_SCHEDULED}
    for n in range(conduit.MAX_SCHEDULED - 1):
        delayed_set(caller, room_id, 60_000, f"{n}", {})
    answer = caller.put(own + "x", {"delay_ms": 50, "content": {}})
    fails(answer, 429, "M_LIMIT_EXCEEDED")
    assert 0 < int(answer.headers["retry-after"]) <= 60


# ═════════════════════════════════════════════════════════════════════════════
#  41. RELATIONS
# ═════════════════════════════════════════════════════════════════════════════


def related(kind: str, parent: str, text: str = "child", **more: Any) -> Json:
    """The content of a text message that relates to another event."""
    relation = {"rel_type": kind, "event_id": parent}
    return {"msgtype": "m.text", "body": text, "m.relates_to": relation, **more}


def edit_of(parent: str, text: str) -> Json:
    """The content of an edit."""
    return related("m.replace", parent, f"* {text}", **{"m.new_content": message(text)})


def message(text: str) -> Json:
    """The content of a text message."""
    return {"msgtype": "m.text", "body": text}


def say(client: Client, room_id: str, content: Json) -> str:
    """Send a message with any content; its event id."""
    return client.send(room_id, "m.room.message", content)


def ignore(client: Client, *others: Client) -> None:
    """Make these the users whom a client ignores."""
    content = {"ignored_users": {other.user_id: {} for other in others}}
    ok(client.put(("user", client.user_id, "account_data", "m.ignored_user_list"), content))


def sums(client: Client, room_id: str, event_id: str) -> Json:
    """The aggregations that come with an event."""
    event = ok(client.get(("rooms", room_id, "event", event_id)))
    return cast("Json", event["unsigned"].get("m.relations", {}))


def v1(*parts: str) -> str:
    """A path below /_matrix/client/v1/."""
    return "/_matrix/client/v1/" + "/".join(quote(part, safe="") for part in parts)


def related_ids(client: Client, room_id: str, *parts: str, **query: Any) -> list[str]:
    """The ids in one page of /relations."""
    page = ok(client.get(v1("rooms", room_id, "relations", *parts), **query))
    return [event["event_id"] for event in page["chunk"]]


def test_the_latest_valid_edit_is_bundled(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    event_id = alice.send_text(room_id, "first")
    say(alice, room_id, edit_of(event_id, "second"))
    newest = say(alice, room_id, edit_of(event_id, "third"))
    say(bob, room_id, edit_of(event_id, "not the sender"))
    say(alice, room_id, related("m.replace", event_id, "without new content"))
    alice.send(room_id, "org.example.other", edit_of(event_id, "of another type"))
    edit = sums(bob, room_id, event_id)["m.replace"]
    assert (edit["event_id"], edit["content"]["m.new_content"]["body"]) == (newest, "third")
    say(alice, room_id, edit_of(newest, "an edit of an edit"))
    assert sums(bob, room_id, newest) == {}


def test_edits_are_bundled_at_every_door(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    event_id = alice.send_text(room_id, "zebra")
    edit = say(alice, room_id, edit_of(event_id, "zebra too"))
    for _ in range(3):
        alice.send_text(room_id, "later")
    context = ok(alice.get(("rooms", room_id, "context", event_id)))
    room_events = {"search_term": "zebra"}
    found = ok(bob.post("search", {"search_categories": {"room_events": room_events}}))
    limited = bob.sync(filter={"room": {"timeline": {"limit": 5}}})
    seen = [
        *alice.messages(room_id)["chunk"],
        context["event"],
        found["search_categories"]["room_events"]["results"][0]["result"],
        *bob.timeline(room_id, limited),
    ]
    originals = [event for event in seen if event["event_id"] == event_id]
    assert len(originals) == 4
    for event in originals:
        assert event["content"]["body"] == "zebra"
        assert event["unsigned"]["m.relations"]["m.replace"]["event_id"] == edit


def test_redacting_edits_goes_back_one_by_one(alice: Client) -> None:
    room_id = alice.create_room()
    event_id = alice.send_text(room_id, "first")
    edits = [say(alice, room_id, edit_of(event_id, text)) for text in ("second", "third")]
    alice.redact(room_id, edits[1])
    assert sums(alice, room_id, event_id)["m.replace"]["event_id"] == edits[0]
    alice.redact(room_id, event_id)
    assert sums(alice, room_id, event_id) == {}


def test_encrypted_edits_are_valid_without_new_content(alice: Client) -> None:
    room_id = alice.create_room()
    cipher = {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "x"}
    event_id = alice.send(room_id, "m.room.encrypted", cipher)
    relation = {"m.relates_to": {"rel_type": "m.replace", "event_id": event_id}}
    edit = alice.send(room_id, "m.room.encrypted", {**cipher, **relation})
    assert sums(alice, room_id, event_id)["m.replace"]["event_id"] == edit


def test_a_thread_is_summed_up(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    root = alice.send_text(room_id, "root")
    replies = [say(bob, room_id, related("m.thread", root, f"{n}")) for n in range(3)]
    edit = say(bob, room_id, edit_of(replies[2], "better"))
    for client in (alice, bob):
        thread = sums(client, room_id, root)["m.thread"]
        assert (thread["count"], thread["current_user_participated"]) == (3, True)
        latest = thread["latest_event"]
        assert latest["event_id"] == replies[2]
        assert latest["unsigned"]["m.relations"]["m.replace"]["event_id"] == edit
    bob.redact(room_id, replies[2])
    thread = sums(alice, room_id, root)["m.thread"]
    assert (thread["count"], thread["latest_event"]["event_id"]) == (2, replies[1])
    bob.redact(room_id, replies[0])
    bob.redact(room_id, replies[1])
    assert sums(alice, room_id, root) == {}


def test_who_only_reads_a_thread_has_no_part_in_it(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    root = alice.send_text(room_id, "root")
    say(alice, room_id, related("m.thread", root))
    assert sums(bob, room_id, root)["m.thread"]["current_user_participated"] is False
    say(bob, room_id, related("m.thread", root))
    assert sums(bob, room_id, root)["m.thread"]["current_user_participated"] is True


def test_references_are_listed_and_reactions_are_not(alice: Client) -> None:
    room_id = alice.create_room()
    event_id = alice.send_text(room_id, "poll")
    votes = [say(alice, room_id, related("m.reference", event_id)) for _ in range(3)]
    relation = {"rel_type": "m.annotation", "event_id": event_id, "key": "x"}
    alice.send(room_id, "m.reaction", {"m.relates_to": relation})
    found = sums(alice, room_id, event_id)
    assert found == {"m.reference": {"chunk": [{"event_id": vote} for vote in votes]}}


def test_state_events_have_no_aggregations(alice: Client) -> None:
    room_id = alice.create_room()
    topic = alice.set_state(room_id, "m.room.topic", {"topic": "x"})
    say(alice, room_id, related("m.reference", topic))
    assert sums(alice, room_id, topic) == {}


def test_no_thread_starts_from_what_has_a_relation(alice: Client) -> None:
    room_id = alice.create_room()
    root = alice.send_text(room_id, "root")
    reply = say(alice, room_id, related("m.thread", root))
    path = ("rooms", room_id, "send", "m.room.message", unique())
    fails(alice.put(path, related("m.thread", reply)), 400, "M_UNKNOWN")
    rich = {**message("reply"), "m.relates_to": {"m.in_reply_to": {"event_id": root}}}
    say(alice, room_id, related("m.thread", say(alice, room_id, rich)))


def test_relations_of_other_rooms_do_not_count(alice: Client) -> None:
    here, there = alice.create_room(), alice.create_room()
    event_id = alice.send_text(here, "here")
    for kind in ("m.thread", "m.reference", "m.replace"):
        say(alice, there, related(kind, event_id, **{"m.new_content": message("x")}))
    assert sums(alice, here, event_id) == {}
    assert related_ids(alice, here, event_id) == []


def test_sec_24_ignored_users_are_left_out_everywhere(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    root = alice.send_text(room_id, "root quokka")
    mine = say(alice, room_id, related("m.thread", root, "mine"))
    theirs = say(bob, room_id, related("m.thread", root, "theirs quokka"))
    reference = say(bob, room_id, related("m.reference", root))
    other_root = bob.send_text(room_id, "a thread of bob's")
    answer = say(alice, room_id, related("m.thread", other_root, "answer"))
    ignore(alice, bob)
    thread = sums(alice, room_id, root)
    assert "m.reference" not in thread
    assert thread["m.thread"]["count"] == 1
    assert thread["m.thread"]["latest_event"]["event_id"] == mine
    assert related_ids(alice, room_id, root) == [mine]
    assert related_ids(alice, room_id, other_root) == [answer]
    shown = {event["event_id"] for event in alice.messages(room_id)["chunk"]}
    shown |= {event["event_id"] for event in alice.timeline(room_id, alice.sync())}
    assert not shown & {theirs, reference, other_root}
    fails(alice.get(("rooms", room_id, "event", theirs)), 404, "M_NOT_FOUND")
    fails(alice.get(("rooms", room_id, "context", theirs)), 404, "M_NOT_FOUND")
    assert found_bodies(alice, "quokka") == ["root quokka"]
    threads = ok(alice.get(v1("rooms", room_id, "threads")))["chunk"]
    assert [event["event_id"] for event in threads] == [other_root, root]
    assert threads[0]["content"] == {}
    ignore(alice)
    assert sums(alice, room_id, root)["m.thread"]["count"] == 2


def test_an_id_beyond_all_bounds_is_no_relation(alice: Client) -> None:
    room_id = alice.create_room()
    say(alice, room_id, related("m.thread", "$" + "x" * 60_000))
    say(alice, room_id, related("x" * 60_000, alice.send_text(room_id, "x")))
    assert thread_ids(alice, room_id) == []


@slow
@settings(max_examples=4)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans()), max_size=30))
def test_sums_are_those_of_a_recount(server: Server, actions: list[tuple[int, int, bool]]) -> None:
    """Whatever comes and goes in a thread, its sums are what is left of it."""
    alice, bob = register(server), register(server)
    room_id = alice.room_with(bob)
    root = alice.send_text(room_id, "root")
    replies: list[tuple[str, Client]] = []
    edits: dict[str, list[str]] = defaultdict(list)
    for kind, which, by_bob in actions:
        client = bob if by_bob else alice
        if kind < 2 or not replies:
            replies.append((say(client, room_id, related("m.thread", root)), client))
            continue
        event_id, sender = replies[which % len(replies)]
        if kind == 2:
            edits[event_id].append(say(sender, room_id, edit_of(event_id, "edited")))
            continue
        replies.pop(which % len(replies))
        sender.redact(room_id, event_id)
    thread = sums(bob, room_id, root).get("m.thread")
    assert (thread is None) == (not replies)
    if thread is not None:
        assert thread["count"] == len(replies)
        assert thread["current_user_participated"] == any(one is bob for _, one in replies)
        latest, bundle = thread["latest_event"], replies[-1][0]
        assert latest["event_id"] == bundle
        edit = latest["unsigned"].get("m.relations", {}).get("m.replace")
        assert (edit or {"event_id": None})["event_id"] == (edits[bundle] or [None])[-1]
    found = related_ids(alice, room_id, root, "m.thread", limit=100)
    assert found == [event_id for event_id, _ in reversed(replies)]


def test_changes_of_subscriptions_are_listed_from_the_newest() -> None:
    rows = [(1, "$a", 9, "manual"), (2, "$b", 7, "none")]
    room = types.SimpleNamespace(room_id="!room")
    threads = object.__new__(conduit.Threads)
    threads.hs = cast(Any, types.SimpleNamespace(rooms=SimpleNamespace(by_nid=lambda _: room)))
    threads.db = cast(Any, types.SimpleNamespace(all=lambda sql, params: rows[: params[3]]))
    assert threads.changed(conduit.UserNid(1), 0, 10, 5) == [
        ("!room", "$a", 9, "manual"),
        ("!room", "$b", 7, "none"),
    ]


# ── 41.4  Threads and push rules ─────────────────────────────────────────────


def subscription(room_id: str, root: str) -> str:
    """The path of the subscription to a thread."""
    parts = "/".join(quote(part, safe="") for part in (room_id, "thread", root))
    return f"/_matrix/client/unstable/io.element.msc4306/rooms/{parts}/subscription"


def test_subscriptions_decide_what_notifies(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    roots = [alice.send_text(room_id, f"root {n}") for n in range(2)]
    say(alice, room_id, related("m.thread", roots[0]))
    assert thread_counts(bob, room_id)[roots[0]] == (1, 0)  # bob never subscribed to anything
    ok(bob.put(subscription(room_id, roots[1])))
    ok(bob.put(rule_path("room", room_id), {"actions": []}))  # the room is muted
    for root in roots:
        say(alice, room_id, related("m.thread", root))
    counts = thread_counts(bob, room_id)
    assert (counts[roots[0]], counts[roots[1]]) == ((1, 0), (1, 0))
    mention = {"m.mentions": {"user_ids": [bob.user_id]}}
    say(alice, room_id, related("m.thread", roots[0], **mention))
    assert thread_counts(bob, room_id)[roots[0]] == (2, 1)
    ok(bob.delete(subscription(room_id, roots[1])))
    say(alice, room_id, related("m.thread", roots[1]))
    assert thread_counts(bob, room_id)[roots[1]] == (1, 0)


def test_rules_of_the_kind_postcontent_are_the_servers(alice: Client) -> None:
    rules = ok(alice.get("pushrules/"))["global"]["postcontent"]
    names = [rule["rule_id"] for rule in rules]
    prefix = ".io.element.msc4306.rule."
    assert names == [f"{prefix}unsubscribed_thread", f"{prefix}subscribed_thread"]
    body = {"actions": ["notify"], "conditions": []}
    fails(alice.put("pushrules/global/postcontent/mine", body), 400, "M_INVALID_PARAM")
    ok(alice.put(("pushrules", "global", "postcontent", names[0], "enabled"), {"enabled": False}))
    assert ok(alice.get("pushrules/"))["global"]["postcontent"][0]["enabled"] is False


# ═════════════════════════════════════════════════════════════════════════════
#  17. ROOMS AND MESSAGES
# ═════════════════════════════════════════════════════════════════════════════


@given(pattern=st.text("ab*", max_size=8), text=st.text("ab", max_size=10))
def test_wildcards_match_as_regular_expressions_would(pattern: str, text: str) -> None:
    expected = re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), text) is not None
    assert conduit.wildcard_match(pattern, text) == expected


@pytest.mark.parametrize(
    ("fields", "rule", "guests"),
    [
        ({"preset": "private_chat"}, "invite", "can_join"),
        ({"preset": "trusted_private_chat"}, "invite", "can_join"),
        ({"preset": "public_chat"}, "public", "forbidden"),
        ({"preset": None, "visibility": "public"}, "public", "forbidden"),
        ({"preset": None}, "invite", "can_join"),
    ],
)
def test_presets(alice: Client, fields: Json, rule: str, guests: str) -> None:
    body = {key: value for key, value in fields.items() if value is not None}
    room_id = ok(alice.post("createRoom", body))["room_id"]
    assert alice.state(room_id, "m.room.join_rules") == {"join_rule": rule}
    assert alice.state(room_id, "m.room.guest_access") == {"guest_access": guests}
    assert alice.state(room_id, "m.room.history_visibility") == {"history_visibility": "shared"}


def test_created_room_has_what_was_asked_for(server: Server, alice: Client, bob: Client) -> None:
    name = unique("alias")
    room_id = alice.create_room(
        bob,
        name="Kitchen",
        topic="Who cooks?",
        room_alias_name=name,
        visibility="public",
        is_direct=True,
        creation_content={"m.federate": False, "creator": "@someone:else", "type": "m.space"},
        power_level_content_override={"events_default": 10},
        initial_state=[
            {"type": "m.room.encryption", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}
        ],
    )
    alias = f"#{name}:{server.name}"
    created = alice.state(room_id, "m.room.create")
    assert created == {"m.federate": False, "room_version": "12", "type": "m.space"}
    assert alice.state(room_id, "m.room.name") == {"name": "Kitchen"}
    assert alice.state(room_id, "m.room.topic")["topic"] == "Who cooks?"
    assert alice.state(room_id, "m.room.canonical_alias") == {"alias": alias}
    assert alice.state(room_id, "m.room.power_levels")["events_default"] == 10
    assert alice.state(room_id, "m.room.encryption")["algorithm"] == "m.megolm.v1.aes-sha2"
    assert alice.state(room_id, "m.room.member", bob.user_id)["is_direct"] is True
    assert ok(alice.get(("directory", "room", alias)))["room_id"] == room_id
    again = alice.post("createRoom", {"room_alias_name": name})
    fails(again, 400, "M_ROOM_IN_USE")


@pytest.mark.parametrize("version", [str(number) for number in range(1, 13)])
def test_every_room_version_works(alice: Client, bob: Client, version: str) -> None:
    room_id = alice.room_with(bob, room_version=version, preset="trusted_private_chat")
    event_id = bob.send_text(room_id, "hello")
    bob.set_state(room_id, "m.room.topic", {"topic": "an invitee of a trusted chat may"})
    alice.redact(room_id, event_id)
    created = alice.state(room_id, "m.room.create")
    assert created.get("room_version") == version
    assert ("creator" in created) == (int(version) < 11)
    assert (":" in room_id) == (int(version) < 12)


def test_sec_13_creators_of_version_12_stand_above_all(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob, preset="trusted_private_chat")
    created = alice.state(room_id, "m.room.create")
    assert created["additional_creators"] == [bob.user_id]
    assert alice.state(room_id, "m.room.power_levels")["users"] == {}
    assert alice.state(room_id, "m.room.power_levels")["events"]["m.room.tombstone"] == 150
    levels = {**alice.state(room_id, "m.room.power_levels"), "users": {bob.user_id: 50}}
    response = alice.put(("rooms", room_id, "state", "m.room.power_levels", ""), levels)
    fails(response, 403, "M_FORBIDDEN")


@pytest.mark.parametrize(
    ("body", "errcode"),
    [
        ({"room_version": "99"}, "M_UNSUPPORTED_ROOM_VERSION"),
        ({"preset": "nonsense"}, "M_INVALID_PARAM"),
        ({"visibility": "nonsense"}, "M_INVALID_PARAM"),
        ({"invite": ["nonsense"]}, "M_INVALID_PARAM"),
        ({"name": 7}, "M_BAD_JSON"),
        ({"initial_state": [{"type": "m.room.name"}]}, "M_MISSING_PARAM"),
        ({"power_level_content_override": {"users": {"@a:b": "x"}}}, "M_INVALID_ROOM_STATE"),
        ({"room_alias_name": "a b"}, "M_INVALID_PARAM"),
    ],
)
def test_bad_rooms_are_refused_as_a_whole(alice: Client, body: Json, errcode: str) -> None:
    before = ok(alice.get("joined_rooms"))
    fails(alice.post("createRoom", body), 400, errcode)
    assert ok(alice.get("joined_rooms")) == before


# ── Membership ───────────────────────────────────────────────────────────────


def test_life_of_a_member(alice: Client, bob: Client) -> None:
    room_id = alice.create_room()
    member = ("rooms", room_id)
    fails(bob.post((*member, "join")), 403, "M_FORBIDDEN")
    alice.invite(room_id, bob)
    alice.invite(room_id, bob)  # invited already: nothing happens
    bob.join(room_id)
    fails(alice.post((*member, "invite"), {"user_id": bob.user_id}), 403, "M_FORBIDDEN")
    bob.join(room_id)  # joined already: nothing happens
    assert (
        len([e for e in alice.messages(room_id)["chunk"] if e.get("state_key") == bob.user_id]) == 2
    )
    fails(bob.post((*member, "kick"), {"user_id": alice.user_id}), 403, "M_FORBIDDEN")
    fails(bob.post((*member, "forget")), 400, "M_UNKNOWN")
    ok(alice.post((*member, "kick"), {"user_id": bob.user_id, "reason": "too loud"}))
    assert alice.state(room_id, "m.room.member", bob.user_id)["reason"] == "too loud"
    fails(alice.post((*member, "kick"), {"user_id": bob.user_id}), 403, "M_FORBIDDEN")
    fails(bob.put((*member, "send", "m.room.message", "1"), {"body": "x"}), 403, "M_FORBIDDEN")
    ok(alice.post((*member, "ban"), {"user_id": bob.user_id}))
    fails(alice.post((*member, "invite"), {"user_id": bob.user_id}), 403, "M_FORBIDDEN")
    fails(bob.post((*member, "join")), 403, "M_FORBIDDEN")
    ok(alice.post((*member, "unban"), {"user_id": bob.user_id}))
    fails(alice.post((*member, "unban"), {"user_id": bob.user_id}), 403, "M_FORBIDDEN")
    ok(bob.post((*member, "forget")))
    fails(bob.get((*member, "messages"), dir="b"), 403, "M_FORBIDDEN")
    alice.invite(room_id, bob)
    bob.join(room_id)
    bob.leave(room_id)
    bob.leave(room_id)


def test_knocking(alice: Client, bob: Client) -> None:
    knock = {"type": "m.room.join_rules", "content": {"join_rule": "knock"}}
    room_id = alice.create_room(initial_state=[knock], name="Club")
    bob.poll()
    assert ok(bob.post(("knock", room_id), {"reason": "let me in"}))["room_id"] == room_id
    knocked = bob.poll()["rooms"]["knock"][room_id]["knock_state"]["events"]
    assert {"name": "Club"} in [event["content"] for event in knocked]
    fails(bob.post(("join", room_id)), 403, "M_FORBIDDEN")
    alice.invite(room_id, bob)
    bob.join(room_id)
    fails(bob.post(("knock", room_id)), 403, "M_FORBIDDEN")
    fails(bob.post(("knock", alice.create_room())), 403, "M_FORBIDDEN")


def test_restricted_room_lets_members_of_the_other_room_in(
    alice: Client, bob: Client, server: Server
) -> None:
    space = alice.create_room(preset="public_chat")
    allow = [{"type": "m.room_membership", "room_id": space}]
    rules = {"type": "m.room.join_rules", "content": {"join_rule": "restricted", "allow": allow}}
    room_id = alice.create_room(initial_state=[rules])
    fails(bob.post(("join", room_id)), 403, "M_FORBIDDEN")
    bob.join(space)
    bob.join(room_id)
    joined = alice.state(room_id, "m.room.member", bob.user_id)
    assert joined["join_authorised_via_users_server"] == alice.user_id
    fails(register(server).post(("join", room_id)), 403, "M_FORBIDDEN")


def test_invite_of_nobody_is_refused(server: Server, alice: Client) -> None:
    room_id = alice.create_room()
    for user_id, status in (
        (f"@{unique('nobody')}:{server.name}", 404),
        ("@a:elsewhere.test", 403),
    ):
        response = alice.post(("rooms", room_id, "invite"), {"user_id": user_id})
        assert response.status_code == status
    fails(alice.post(("rooms", room_id, "invite"), {}), 400, "M_MISSING_PARAM")


@pytest.mark.parametrize(("version", "rule"), [
    ("7", "restricted"), ("8", "restricted"), ("9", "knock_restricted"),
    ("10", "knock_restricted"), ("12", "restricted"),
])  # fmt: skip
def test_restricted_rooms_of_each_version(
    server: Server, alice: Client, bob: Client, version: str, rule: str
) -> None:
    """The rule works from its version on; before, it lets nobody in."""
    space = bob.create_room(preset="public_chat")
    allow = [{"type": "unknown", "room_id": space}, 5, {"type": "m.room_membership"},
             {"type": "m.room_membership", "room_id": space}]  # fmt: skip
    room_id = alice.create_room(
        room_version=version,
        initial_state=[{"type": "m.room.join_rules",
                        "content": {"join_rule": rule, "allow": allow}}],
    )  # fmt: skip
    known = rule in conduit.known_join_rules(conduit.ROOM_VERSIONS[version])
    response = bob.post(("join", room_id))
    if not known:
        fails(response, 403, "M_FORBIDDEN")
        return
    ok(response)
    joined = alice.state(room_id, "m.room.member", bob.user_id)
    assert joined["join_authorised_via_users_server"] == alice.user_id
    # A new name is no new join: nobody has to vouch for it, and nobody does.
    ok(bob.put(("profile", bob.user_id, "displayname"), {"displayname": "Bob"}))
    eventually(lambda: alice.state(room_id, "m.room.member", bob.user_id).get("displayname"))
    member = alice.state(room_id, "m.room.member", bob.user_id)
    assert "join_authorised_via_users_server" not in member
    ok(alice.post(("rooms", room_id, "ban"), {"user_id": bob.user_id}))
    fails(bob.post(("join", room_id)), 403, "M_FORBIDDEN")
    stranger = register(server)
    fails(stranger.post(("join", room_id)), 403, "M_FORBIDDEN")
    knocked = stranger.post(("knock", room_id))
    assert knocked.status_code == (200 if rule == "knock_restricted" else 403)
    alice.invite(room_id, stranger)
    stranger.join(room_id)
    member = alice.state(room_id, "m.room.member", stranger.user_id)
    assert "join_authorised_via_users_server" not in member


def test_who_vouches_may_invite(server: Server, alice: Client, bob: Client) -> None:
    space = alice.create_room(preset="public_chat")
    allow = [{"type": "m.room_membership", "room_id": space}]
    rules = {"type": "m.room.join_rules", "content": {"join_rule": "restricted", "allow": allow}}
    room_id = alice.room_with(
        bob, room_version="11", initial_state=[rules], power_level_content_override={"invite": 60}
    )
    first, second = register(server), register(server)
    first.join(space)
    second.join(space)
    first.join(room_id)
    joined = alice.state(room_id, "m.room.member", first.user_id)
    assert joined["join_authorised_via_users_server"] == alice.user_id
    alice.leave(room_id)
    fails(second.post(("join", room_id)), 403, "M_UNABLE_TO_GRANT_JOIN")


@pytest.mark.parametrize("rule", ["private", "nonsense"])
def test_a_private_room_lets_nobody_in(alice: Client, bob: Client, rule: str) -> None:
    state = {"type": "m.room.join_rules", "content": {"join_rule": rule}}
    room_id = alice.create_room(initial_state=[state])
    fails(bob.post(("join", room_id)), 403, "M_FORBIDDEN")
    fails(bob.post(("knock", room_id)), 403, "M_FORBIDDEN")
    alice.invite(room_id, bob)
    fails(bob.post(("join", room_id)), 403, "M_FORBIDDEN")


def signed_for(client: Client, sender: Client, key: conduit.SigningKey, **changes: Any) -> Json:
    fields = {"mxid": client.user_id, "sender": sender.user_id, "token": "token", **changes}
    return conduit.sign_json(fields, "id.example", key)


def test_third_party_invites_are_taken_up(server: Server, alice: Client, bob: Client) -> None:
    room_id = alice.create_room()
    pending = {"display_name": "b...@e...", "public_key": TOKEN_KEY.public}
    alice.set_state(room_id, "m.room.third_party_invite", pending, "token")
    wrong = [
        signed_for(bob, alice, OTHER_KEY),
        signed_for(alice, alice, TOKEN_KEY),
        signed_for(bob, bob, TOKEN_KEY),
        signed_for(bob, alice, TOKEN_KEY, token="other"),
        {**signed_for(bob, alice, TOKEN_KEY), "more": 1},
        {**signed_for(bob, alice, TOKEN_KEY), "signatures": {}},
    ]
    for signed in wrong:
        fails(bob.post(("join", room_id), {"third_party_signed": signed}), 403, "M_FORBIDDEN")
    shapes: list[Any] = [5, {}, {**signed_for(bob, alice, TOKEN_KEY), "token": []}]
    for signed in shapes:
        assert bob.post(("join", room_id), {"third_party_signed": signed}).status_code == 400
    assert not [e for e in alice.state(room_id) if e.get("state_key") == bob.user_id]
    signed = signed_for(bob, alice, TOKEN_KEY)
    bob.join(room_id, third_party_signed=signed, reason="thanks")
    events = [e for e in alice.messages(room_id, "f")["chunk"] if e.get("state_key") == bob.user_id]
    invite, joined = (event["content"] for event in events)
    assert events[0]["sender"] == alice.user_id
    assert invite["membership"] == "invite"
    assert invite["third_party_invite"] == {"display_name": "b...@e...", "signed": signed}
    assert (joined["membership"], joined["reason"]) == ("join", "thanks")
    assert "third_party_invite" not in joined
    # A ban holds against it, and an invite that was withdrawn is none.
    ok(alice.post(("rooms", room_id, "ban"), {"user_id": bob.user_id}))
    fails(bob.post(("join", room_id), {"third_party_signed": signed}), 403, "M_FORBIDDEN")
    alice.set_state(room_id, "m.room.third_party_invite", {}, "token")
    third = register(server)
    body = {"third_party_signed": signed_for(third, alice, TOKEN_KEY)}
    fails(third.post(("join", room_id), body), 403, "M_FORBIDDEN")


def test_a_third_party_invite_that_would_have_to_be_asked_after_is_refused(
    alice: Client, bob: Client
) -> None:
    room_id = alice.create_room()
    key = {"public_key": TOKEN_KEY.public, "key_validity_url": "https://id.example/"}
    for where in (key, {"public_keys": [5, key]}):
        alice.set_state(room_id, "m.room.third_party_invite", where, "token")
        body = {"third_party_signed": signed_for(bob, alice, TOKEN_KEY)}
        fails(bob.post(("join", room_id), body), 403, "M_FORBIDDEN")


def test_guests_come_and_go_as_the_room_says(new_server: Callable[..., Server]) -> None:
    one = new_server(allow_open_registration=True)
    host = register(one)
    guest = client_from(one, ok(Client(one).post("register", {}, kind="guest")))
    public = {"preset": "public_chat"}
    room_id = host.create_room(**public)
    fails(guest.post(("join", room_id)), 403, "M_GUEST_ACCESS_FORBIDDEN")
    path = ("rooms", room_id, "state", "m.room.member", guest.user_id)
    fails(guest.put(path, {"membership": "join"}), 403, "M_GUEST_ACCESS_FORBIDDEN")
    host.set_state(room_id, "m.room.guest_access", {"guest_access": "can_join"})
    guest.join(room_id)
    assert host.state(room_id, "m.room.member", guest.user_id)["kind"] == "guest"
    guest.send_text(room_id, "hello")
    host.set_state(room_id, "m.room.guest_access", {"guest_access": "can_join", "x": 1})
    time.sleep(0.2)
    assert host.state(room_id, "m.room.member", guest.user_id)["membership"] == "join"
    other = register(one)
    other.join(room_id)
    host.set_state(room_id, "m.room.guest_access", {"guest_access": "forbidden"})
    eventually(lambda: host.state(room_id, "m.room.member", guest.user_id)["membership"] == "leave")
    assert host.state(room_id, "m.room.member", other.user_id)["membership"] == "join"


def test_bans_hold_on_every_way_in(server: Server, alice: Client, bob: Client) -> None:
    knock = {"type": "m.room.join_rules", "content": {"join_rule": "knock"}}
    for room_id in (
        alice.create_room(preset="public_chat"),
        alice.create_room(initial_state=[knock]),
    ):
        ok(alice.post(("rooms", room_id, "ban"), {"user_id": bob.user_id}))
        own = ("rooms", room_id, "state", "m.room.member", bob.user_id)
        tries = [
            bob.post(("join", room_id)),
            bob.post(("rooms", room_id, "join")),
            bob.post(("knock", room_id)),
            bob.post(("rooms", room_id, "leave")),
            *(bob.put(own, {"membership": value}) for value in ("join", "knock", "leave")),
            alice.post(("rooms", room_id, "invite"), {"user_id": bob.user_id}),
            alice.post(("rooms", room_id, "kick"), {"user_id": bob.user_id}),
        ]
        for response in tries:
            fails(response, 403, "M_FORBIDDEN")
        assert alice.state(room_id, "m.room.member", bob.user_id)["membership"] == "ban"


def test_blocked_rooms_let_nobody_in(new_server: Callable[..., Server]) -> None:
    one = new_server()
    host, guest = register(one), register(one)
    room_id = host.create_room(preset="public_chat")
    other = host.create_room(guest)
    one.stop()
    blocked = [room_id, other, "!elsewhere:x"]

    async def block() -> None:
        hs: Any = SimpleNamespace(db=conduit.Database(one.data, one.name, 64))
        for each in blocked:
            conduit.block_room(hs, each, host.user_id)
            conduit.block_room(hs, each, guest.user_id)
        with pytest.raises(conduit.MatrixError):
            conduit.block_room(hs, "nonsense", host.user_id)
        found = conduit.blocked_rooms(hs)
        assert {row[0] for row in found} == set(blocked)
        assert {row[1] for row in found} == {host.user_id}
        assert conduit.unblock_room(hs, blocked[2])
        assert not conduit.unblock_room(hs, blocked[2])
        await hs.db.close()

    asyncio.run(block())
    one.start()
    own = ("rooms", room_id, "state", "m.room.member", guest.user_id)
    tries = [
        guest.post(("join", room_id)),
        guest.post(("join", other)),
        guest.post(("knock", room_id)),
        guest.put(own, {"membership": "join"}),
        host.post(("rooms", room_id, "invite"), {"user_id": guest.user_id}),
        host.post(("rooms", room_id, "upgrade"), {"new_version": "12"}),
    ]
    for response in tries:
        assert "blocked" in fails(response, 403, "M_FORBIDDEN")["error"]
    host.send_text(room_id, "who is in stays in")
    guest.leave(other)


# ── Replacing a room ─────────────────────────────────────────────────────────


def upgrade(client: Client, room_id: str, version: str = "12", **fields: Any) -> str:
    answer = ok(client.post(("rooms", room_id, "upgrade"), {"new_version": version, **fields}))
    return str(answer["replacement_room"])


@pytest.mark.parametrize(
    ("old_version", "new_version"),
    [("1", "12"), ("5", "6"), ("9", "11"), ("11", "12"), ("12", "12"), ("12", "10"), ("10", "1")],
)
def test_an_upgrade_takes_everything_along(
    server: Server, alice: Client, bob: Client, old_version: str, new_version: str
) -> None:
    banned = register(server)
    names = [f"#{unique('alias')}:{server.name}" for _ in range(2)]
    settings_of_old: dict[str, Json] = {
        "m.room.server_acl": {"allow": ["*"], "deny": ["evil.example"]},
        "m.room.encryption": {"algorithm": "m.megolm.v1.aes-sha2"},
        "m.room.avatar": {"url": "mxc://a/b"},
        "m.room.guest_access": {"guest_access": "forbidden"},
        "m.room.history_visibility": {"history_visibility": "joined"},
        "m.room.join_rules": {"join_rule": "public"},
    }
    old = alice.room_with(
        bob,
        room_version=old_version,
        name="Hall",
        topic="Talk",
        visibility="public",
        room_alias_name=names[0][1:].partition(":")[0],
        creation_content={"type": "org.example.kind", "m.federate": False},
        power_level_content_override={"events": {"m.room.name": 30}, "kick": 40},
        initial_state=[{"type": kind, "content": one} for kind, one in settings_of_old.items()],
    )
    ok(alice.put(("directory", "room", names[1]), {"room_id": old}))
    alice.set_state(old, "m.room.canonical_alias", {"alias": names[0], "alt_aliases": [names[1]]})
    ok(alice.post(("rooms", old, "ban"), {"user_id": banned.user_id, "reason": "spam"}))
    last = alice.send_text(old, "the last word")
    levels = alice.state(old, "m.room.power_levels")

    new = upgrade(alice, old, new_version)
    created = alice.state(new, "m.room.create")
    predecessor = {"room_id": old} | ({} if new_version == "12" else {"event_id": last})
    assert created["predecessor"] == predecessor
    assert (created["room_version"], created["type"]) == (new_version, "org.example.kind")
    assert created["m.federate"] is False
    wanted = {**settings_of_old, "m.room.name": {"name": "Hall"}}
    wanted["m.room.canonical_alias"] = {"alias": names[0], "alt_aliases": [names[1]]}
    for kind, content in wanted.items():
        assert alice.state(new, kind) == content, kind
    assert alice.state(new, "m.room.topic")["topic"] == "Talk"
    kept = alice.state(new, "m.room.member", banned.user_id)
    assert (kept["membership"], kept["reason"]) == ("ban", "spam")
    raised = alice.state(new, "m.room.power_levels")
    assert raised["users"] == ({} if new_version == "12" else {alice.user_id: 100})
    assert (raised["kick"], raised["events"]["m.room.name"]) == (40, 30)
    if new_version == "12":
        assert raised["events"]["m.room.tombstone"] > raised["state_default"]

    tombstone = alice.state(old, "m.room.tombstone")
    assert tombstone["replacement_room"] == new
    assert tombstone["body"]
    closed = alice.state(old, "m.room.power_levels")
    assert closed == {**levels, "events_default": 50, "invite": 50}
    assert alice.state(old, "m.room.canonical_alias") == {}
    for name in names:
        assert ok(alice.get(("directory", "room", name)))["room_id"] == new
    for room_id, visibility in ((old, "private"), (new, "public")):
        listed = ok(alice.get(("directory", "list", "room", room_id)))
        assert listed["visibility"] == visibility
    fails(bob.put(("rooms", old, "send", "m.room.message", unique("t")), {}), 403, "M_FORBIDDEN")
    fails(banned.post(("join", new)), 403, "M_FORBIDDEN")
    bob.join(names[0])
    bob.send_text(new, "here we are")


def test_personal_settings_follow_an_upgrade(alice: Client, bob: Client) -> None:
    old = alice.room_with(bob, preset="public_chat")
    people = {alice: bob, bob: alice}
    for client, other in people.items():
        mine = ("user", client.user_id)
        ok(client.put((*mine, "rooms", old, "tags", "m.favourite"), {"order": 0.5}))
        ok(client.put(("pushrules", "global", "room", old), {"actions": []}))
        direct = {other.user_id: [old], "@else:where": ["!x"]}
        ok(client.put((*mine, "account_data", "m.direct"), direct))
        client.poll()
    new = upgrade(alice, old)
    fails(bob.get(("pushrules", "global", "room", new)), 404)
    bob.join(new)
    for client, other in people.items():
        mine = ("user", client.user_id)
        tags = {"tags": {"m.favourite": {"order": 0.5}}}
        assert ok(client.get((*mine, "rooms", new, "tags"))) == tags
        assert ok(client.get(("pushrules", "global", "room", new)))["actions"] == []
        direct = ok(client.get((*mine, "account_data", "m.direct")))
        assert direct == {other.user_id: [old, new], "@else:where": ["!x"]}
        synced = client.poll()
        assert {e["type"] for e in synced["account_data"]["events"]} >= {"m.push_rules", "m.direct"}
        data = synced["rooms"]["join"][new]["account_data"]["events"]
        assert {"type": "m.tag", "content": tags} in data
    # What is changed afterwards stays changed.
    ok(bob.delete(("user", bob.user_id, "rooms", new, "tags", "m.favourite")))
    bob.leave(new)
    bob.join(new)
    assert ok(bob.get(("user", bob.user_id, "rooms", new, "tags"))) == {"tags": {}}


def test_a_room_that_only_says_it_is_the_successor_gets_nothing(alice: Client, bob: Client) -> None:
    old = alice.room_with(bob)
    ok(bob.put(("user", bob.user_id, "rooms", old, "tags", "m.favourite"), {}))
    claim = {"predecessor": {"room_id": old, "event_id": "$x"}}
    for content in (claim, {"predecessor": 5}, {"predecessor": {"room_id": [old]}}):
        new = alice.room_with(bob, creation_content=content)
        assert ok(bob.get(("user", bob.user_id, "rooms", new, "tags"))) == {"tags": {}}
    alice.set_state(old, "m.room.tombstone", {"body": "", "replacement_room": "!other:x"})
    alice.set_state(old, "m.room.tombstone", {"body": "", "replacement_room": [new]})
    alice.set_state(old, "m.room.tombstone", {"body": "", "replacement_room": new})
    assert ok(bob.get(("user", bob.user_id, "rooms", new, "tags"))) == {"tags": {}}


def test_who_may_upgrade_and_to_what(server: Server, alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob, room_version="11", preset="public_chat")
    path = ("rooms", room_id, "upgrade")
    fails(alice.post(path, {"new_version": "99"}), 400, "M_UNSUPPORTED_ROOM_VERSION")
    fails(alice.post(path, {}), 400, "M_MISSING_PARAM")
    fails(alice.post(path, {"new_version": 12}), 400, "M_BAD_JSON")
    bad = {"new_version": "12", "additional_creators": ["bob"]}
    fails(alice.post(path, bad), 400, "M_INVALID_PARAM")
    for client in (bob, register(server)):
        fails(client.post(path, {"new_version": "12"}), 403, "M_FORBIDDEN")
    fails(alice.post(("rooms", "!no:x", "upgrade"), {"new_version": "12"}), 403, "M_FORBIDDEN")
    rooms = ok(alice.get("joined_rooms"))
    assert rooms == {"joined_rooms": [room_id]}
    new = upgrade(alice, room_id, "11", additional_creators=["ignored before version 12"])
    assert "additional_creators" not in alice.state(new, "m.room.create")


def test_creators_of_an_upgraded_room(alice: Client, bob: Client) -> None:
    levels = {"users": {alice.user_id: 100, bob.user_id: 100, "@carol:x": 50}}
    first = alice.create_room(room_version="11", power_level_content_override=levels)
    creators = [bob.user_id, alice.user_id, bob.user_id]
    second = upgrade(alice, first, additional_creators=creators)
    assert alice.state(second, "m.room.create")["additional_creators"] == [bob.user_id]
    assert alice.state(second, "m.room.power_levels")["users"] == {"@carol:x": 50}
    third = upgrade(alice, second)  # where they are not taken over
    assert "additional_creators" not in alice.state(third, "m.room.create")
    fourth = upgrade(alice, second, "11")  # where they have levels instead
    users = {alice.user_id: 100, bob.user_id: 100, "@carol:x": 50}
    assert alice.state(fourth, "m.room.power_levels")["users"] == users


def test_a_moderator_who_may_upgrades_without_gaining_power(alice: Client, bob: Client) -> None:
    levels = {
        "users": {alice.user_id: 100, bob.user_id: 60},
        "events": {"m.room.tombstone": 55, "m.room.encryption": 100, "m.room.name": 90},
        "notifications": {"room": "20"},
        "ban": "50",
        "users_default": 5,
    }
    old = alice.room_with(
        bob, room_version="9", name="Hall", power_level_content_override=levels,
        initial_state=[{"type": "m.room.encryption", "content": {"algorithm": "m.megolm"}}],
    )  # fmt: skip
    new = upgrade(bob, old, "11")
    assert bob.state(new, "m.room.name") == {"name": "Hall"}
    assert bob.state(new, "m.room.encryption") == {"algorithm": "m.megolm"}
    after = bob.state(new, "m.room.power_levels")
    assert after["users"] == levels["users"]
    assert after["events"] == levels["events"]
    assert (after["notifications"], after["ban"], after["users_default"]) == ({"room": 20}, 50, 5)
    fails(bob.put(("rooms", new, "state", "m.room.name"), {"name": "Mine"}), 403, "M_FORBIDDEN")
    # The old room's levels were not theirs to set.
    assert bob.state(old, "m.room.power_levels")["ban"] == "50"
    assert "m.room.tombstone" in [event["type"] for event in bob.state(old)]


def test_spaces_keep_track_of_upgrades(alice: Client, bob: Client) -> None:
    via = {"via": ["x"], "order": "a"}
    space = alice.create_room(creation_content={"type": "m.space"})
    foreign = bob.room_with(alice, creation_content={"type": "m.space"})
    child = alice.create_room(
        initial_state=[{"type": "m.space.parent", "state_key": space, "content": {"via": ["x"]}}]
    )
    for keeper, room_id in ((alice, space), (bob, foreign)):
        keeper.set_state(room_id, "m.space.child", via, child)
    alice.set_state(space, "m.space.child", {}, "!gone:x")
    new = upgrade(alice, child)
    assert alice.state(space, "m.space.child", new) == via
    assert alice.state(space, "m.space.child", child) == {}
    assert alice.state(foreign, "m.space.child", child) == via  # where alice may not
    assert alice.state(new, "m.space.parent", space) == {"via": ["x"]}
    other = upgrade(alice, space)
    assert alice.state(other, "m.space.child", new) == via
    assert alice.state(other, "m.room.create")["type"] == "m.space"
    children = [e["state_key"] for e in alice.state(other) if e["type"] == "m.space.child"]
    assert children == [new]


def test_many_bans_and_children_do_not_hold_up_the_others(server: Server, alice: Client) -> None:
    children = [
        {"type": "m.space.child", "state_key": f"!{number}:x", "content": {"via": ["x"]}}
        for number in range(150)
    ]
    old = alice.create_room(creation_content={"type": "m.space"}, initial_state=children)
    for number in range(60):
        ok(alice.post(("rooms", old, "ban"), {"user_id": f"@spam{number}:x"}))
    since = time.monotonic()
    new = upgrade(alice, old)
    print(f"upgrade with 210 inherited events: {time.monotonic() - since:.3f} s")
    state = alice.state(new)
    assert sum(event["type"] == "m.space.child" for event in state) == 150
    assert sum(event["content"].get("membership") == "ban" for event in state) == 60


def test_bans_during_an_upgrade_are_not_lost(alice: Client) -> None:
    children = [
        {"type": "m.space.child", "state_key": f"!{number}:x", "content": {"via": ["x"]}}
        for number in range(400)
    ]
    old = alice.create_room(initial_state=children)
    moderator = alice.login()
    with ThreadPoolExecutor(1) as pool:
        upgraded = pool.submit(upgrade, alice, old)
        for number in itertools.count():
            body = {"user_id": f"@spam{number}:x"}
            ok(moderator.post(("rooms", old, "ban"), body))
            if upgraded.done():
                break
    events = alice.messages(old, "f", limit=1000)["chunk"]
    types = [event["type"] for event in events]
    early = events[: types.index("m.room.tombstone")]
    banned = {e["state_key"] for e in early if e["content"].get("membership") == "ban"}
    print(f"{len(banned)} bans came during the upgrade")
    kept = ok(alice.get(("rooms", upgraded.result(), "members"), membership="ban"))["chunk"]
    assert {event["state_key"] for event in kept} == banned


def test_two_upgrades_at_once_leave_one_successor(alice: Client) -> None:
    children = [
        {"type": "m.space.child", "state_key": f"!{number}:x", "content": {"via": ["x"]}}
        for number in range(100)
    ]
    old = alice.create_room(initial_state=children)
    devices = [alice.login() for _ in range(3)]
    path, body = ("rooms", old, "upgrade"), {"new_version": "12"}
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda device: device.post(path, body), devices))
    made = [ok(answer)["replacement_room"] for answer in answers if answer.status_code == 200]
    assert alice.state(old, "m.room.tombstone")["replacement_room"] in made
    assert sorted(ok(alice.get("joined_rooms"))["joined_rooms"]) == sorted([old, *made])


def test_unstable_versions_can_be_switched_off(new_server: Callable[..., Server]) -> None:
    one = new_server(allow_unstable_room_versions=False, default_room_version="11")
    user = register(one)
    versions = ok(user.get("capabilities"))["capabilities"]["m.room_versions"]
    stable = sorted(conduit.STABLE_VERSIONS, key=int)
    assert versions == {"default": "11", "available": dict.fromkeys(stable, "stable")}
    room_id = user.create_room()
    assert user.state(room_id, "m.room.create")["room_version"] == "11"
    for version in set(conduit.ROOM_VERSIONS) - set(stable):
        refused = 400, "M_UNSUPPORTED_ROOM_VERSION"
        fails(user.post("createRoom", {"room_version": version}), *refused)
        fails(user.post(("rooms", room_id, "upgrade"), {"new_version": version}), *refused)


def test_versions_that_this_server_offers(alice: Client) -> None:
    versions = ok(alice.get("capabilities"))["capabilities"]["m.room_versions"]
    stable = {version.id: version.stable for version in conduit.ROOM_VERSIONS.values()}
    assert versions["default"] == "12"
    assert versions["available"] == {
        name: "stable" if is_stable else "unstable" for name, is_stable in stable.items()
    }


# ── Sending and state ────────────────────────────────────────────────────────


def test_transaction_id_is_kept_per_device(alice: Client) -> None:
    room_id = alice.create_room()
    first = alice.send_text(room_id, "once", txn_id="t1")
    assert alice.send_text(room_id, "once", txn_id="t1") == first
    phone = alice.login()
    assert phone.send_text(room_id, "from the phone", txn_id="t1") != first
    assert alice.bodies(room_id) == ["once", "from the phone"]
    own = alice.timeline(room_id, alice.sync())
    assert [e["unsigned"].get("transaction_id") for e in own if e["type"] == "m.room.message"] == [
        "t1",
        None,
    ]


def test_events_have_a_limit_of_65536_bytes(alice: Client) -> None:
    room_id = alice.create_room()
    path = ("rooms", room_id, "send", "m.room.message", unique("txn"))
    low, high = 60_000, 66_000
    while high - low > 1:
        middle = (low + high) // 2
        response = alice.put((*path[:-1], unique("txn")), {"body": "x" * middle})
        low, high = (middle, high) if response.status_code == 200 else (low, middle)
        if response.status_code != 200:
            fails(response, 413, "M_TOO_LARGE")
    event = ok(alice.get(("rooms", room_id, "messages"), params={"dir": "b", "limit": 1}))["chunk"][
        0
    ]
    assert 60_000 < len(event["content"]["body"]) <= low


@pytest.mark.parametrize(
    "content", ['{"a": 1.5}', '{"a": 9007199254740992}', '{"a": "\\ud800"}', "[]", '"x"', "{"]
)
def test_sec_18_numbers_and_texts_that_cannot_be_signed(alice: Client, content: str) -> None:
    room_id = alice.create_room()
    path = ("rooms", room_id, "send", "m.room.message", unique("txn"))
    response = alice.request("PUT", path, content=content.encode())
    assert response.status_code == 400
    assert response.json()["errcode"] in ("M_BAD_JSON", "M_NOT_JSON")


def test_sec_16_types_and_keys_at_their_limits(alice: Client) -> None:
    room_id = alice.create_room()
    for length, texts in ((255, ("x" * 255, "ü" * 127 + "x")), (256, ("x" * 256, "ü" * 128))):
        for text in texts:
            assert len(text.encode()) == length
            for response in (
                alice.put(("rooms", room_id, "send", text, unique("txn")), {}),
                alice.put(("rooms", room_id, "state", text), {}),
                alice.put(("rooms", room_id, "state", "m.test", text), {}),
            ):
                assert (response.status_code == 200) == (length == 255), response.text
                assert response.status_code in (200, 400, 413)


@pytest.mark.parametrize("version", ["1", "2", "3", "6", "10", "11", "12"])
def test_sec_17_who_may_redact(server: Server, alice: Client, bob: Client, version: str) -> None:
    """In each version, by each of the two endpoints: one's own, or with the redact level."""
    room_id = alice.room_with(bob, room_version=version)
    elsewhere = alice.send_text(alice.create_room(room_version=version), "elsewhere")

    def tries(client: Client, target: str) -> list[httpx.Response]:
        sent = ("rooms", room_id, "send", "m.room.redaction", unique("txn"))
        path = ("rooms", room_id, "redact", target, unique("txn"))
        return [client.put(path, {"reason": "r"}), client.put(sent, {"redacts": target})]

    def content_of(event_id: str) -> Json:
        return cast("Json", ok(alice.get(("rooms", room_id, "event", event_id)))["content"])

    foreign = alice.send_text(room_id, "alice's")
    for response in [*tries(bob, foreign), *tries(register(server), foreign)]:
        fails(response, 403, "M_FORBIDDEN")
    for response in [*tries(alice, elsewhere), *tries(alice, "$nothing:x")]:
        fails(response, 404, "M_NOT_FOUND")
    assert content_of(foreign)["body"] == "alice's"
    for client in (alice, bob):
        for number in range(2):
            target = bob.send_text(room_id, "bob's")
            redaction_id = ok(tries(client, target)[number])["event_id"]
            found = ok(alice.get(("rooms", room_id, "event", target)))
            assert found["content"] == {}
            because = found["unsigned"]["redacted_because"]
            assert because["event_id"] in {redaction_id, *ids_of_redactions(alice, room_id)}
            redaction = ok(alice.get(("rooms", room_id, "event", redaction_id)))
            assert redaction["redacts"] == redaction["content"]["redacts"] == target
    raw = read_database(server, "SELECT pdu FROM events WHERE event_id = ?", redaction_id)
    pdu = json.loads(raw[0][0])
    assert ("redacts" in pdu) == (int(version) < 11)
    assert pdu["content"].get("redacts", target) == target
    # Of state: what the room is held together by stays.
    member = alice.state(room_id)
    own = next(e for e in member if e.get("state_key") == bob.user_id)
    bob.redact(room_id, own["event_id"])
    assert alice.state(room_id, "m.room.member", bob.user_id)["membership"] == "join"
    created = next(e for e in member if e["type"] == "m.room.create")
    alice.redact(room_id, created["event_id"])
    assert alice.state(room_id, "m.room.create").get("room_version", "1") in (version, "1")
    bob.send_text(room_id, "the room goes on")
    # The level of the redaction's own type counts as well.
    levels = alice.state(room_id, "m.room.power_levels")
    events = {**levels["events"], "m.room.redaction": 50}
    alice.set_state(room_id, "m.room.power_levels", {**levels, "events": events})
    for response in tries(bob, bob.send_text(room_id, "stays")):
        fails(response, 403, "M_FORBIDDEN")
    assert alice.bodies(room_id)[-1] == "stays"


def test_admins_may_redact_what_users_of_this_server_sent(
    new_server: Callable[..., Server],
) -> None:
    one = new_server()
    admin, host, other = register(one), register(one), register(one)
    room_id = host.create_room(preset="public_chat")
    target = host.send_text(room_id, "spam")
    path = ("rooms", room_id, "redact", target)
    fails(admin.put((*path, "1")), 403, "M_FORBIDDEN")
    for client in (admin, other):
        client.join(room_id)
    fails(other.put((*path, "1")), 403, "M_FORBIDDEN")
    admin.redact(room_id, target)
    assert host.bodies(room_id) == []


def ids_of_redactions(client: Client, room_id: str) -> set[str]:
    chunk = client.messages(room_id)["chunk"]
    return {event["event_id"] for event in chunk if event["type"] == "m.room.redaction"}


def test_nobody_else_vouches_for_a_join_in_a_name_change(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    content = {"membership": "join", "join_authorised_via_users_server": "@someone:else"}
    bob.set_state(room_id, "m.room.member", content, bob.user_id)
    assert alice.state(room_id, "m.room.member", bob.user_id) == {"membership": "join"}


def test_state_that_changes_nothing_makes_no_event(alice: Client) -> None:
    room_id = alice.create_room()
    first = alice.set_state(room_id, "m.room.topic", {"topic": "x"})
    assert alice.set_state(room_id, "m.room.topic", {"topic": "x"}) == first
    assert alice.set_state(room_id, "m.room.topic", {"topic": "y"}) != first


def test_state_reads(alice: Client, bob: Client) -> None:
    room_id = alice.create_room(name="A")
    event = ok(alice.get(("rooms", room_id, "state", "m.room.name", ""), format="event"))
    assert (event["content"], event["state_key"], event["room_id"]) == ({"name": "A"}, "", room_id)
    assert ok(alice.get(("rooms", room_id, "state", "m.room.name"))) == {"name": "A"}
    fails(alice.get(("rooms", room_id, "state", "m.room.nothing")), 404, "M_NOT_FOUND")
    fails(bob.get(("rooms", room_id, "state")), 403, "M_FORBIDDEN")
    fails(bob.get(("rooms", "!nowhere:x", "state")), 403, "M_FORBIDDEN")


def test_who_left_reads_the_state_of_then(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob, name="Before")
    bob.leave(room_id)
    alice.set_state(room_id, "m.room.name", {"name": "After"})
    assert bob.state(room_id, "m.room.name") == {"name": "Before"}
    assert {"name": "After"} not in [event["content"] for event in bob.state(room_id)]


def test_who_left_and_was_banned_later_reads_the_state_of_leaving(
    alice: Client, bob: Client
) -> None:
    room_id = alice.room_with(bob, name="Before")
    bob.leave(room_id)
    alice.set_state(room_id, "m.room.name", {"name": "After"})
    ok(alice.post(("rooms", room_id, "ban"), {"user_id": bob.user_id}))
    assert bob.state(room_id, "m.room.name") == {"name": "Before"}
    assert "join" in [e["content"].get("membership") for e in bob.state(room_id)]


def test_strangers_do_not_learn_who_is_in_a_room(alice: Client, bob: Client) -> None:
    room_id = alice.create_room()
    kick = ("rooms", room_id, "kick")
    answers = [
        fails(bob.post(kick, {"user_id": user_id}), 403, "M_FORBIDDEN")["error"]
        for user_id in (alice.user_id, bob.user_id)
    ]
    assert answers[0] == answers[1]


def test_canonical_alias_must_lead_here(server: Server, alice: Client) -> None:
    room_id = alice.create_room()
    alias = f"#{unique('alias')}:{server.name}"
    path = ("rooms", room_id, "state", "m.room.canonical_alias", "")
    fails(alice.put(path, {"alias": alias}), 400, "M_BAD_ALIAS")
    fails(alice.put(path, {"alias": "nonsense"}), 400, "M_INVALID_PARAM")
    ok(alice.put(("directory", "room", alias), {"room_id": room_id}))
    ok(alice.put(path, {"alias": alias}))
    other = alice.create_room()
    fails(alice.put(("rooms", other, *path[2:]), {"alt_aliases": [alias]}), 400, "M_BAD_ALIAS")


def test_members_now_and_then(alice: Client, bob: Client) -> None:
    room_id = alice.create_room()
    before = alice.sync()["next_batch"]
    alice.invite(room_id, bob)
    bob.join(room_id)

    def members(**query: str) -> set[str]:
        return {
            e["state_key"]
            for e in ok(alice.get(("rooms", room_id, "members"), params=query))["chunk"]
        }

    assert members() == {alice.user_id, bob.user_id}
    assert members(at=before) == {alice.user_id}
    assert members(at="s0") == set()
    fails(alice.get(("rooms", room_id, "members"), at="x"), 400, "M_INVALID_PARAM")
    bob.leave(room_id)
    assert members(membership="join") == {alice.user_id}
    assert members(not_membership="join") == {bob.user_id}
    joined = ok(alice.get(("rooms", room_id, "joined_members")))["joined"]
    assert list(joined) == [alice.user_id]


# ── Pages ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_pages_give_each_event_once_in_both_directions(alice: Client, limit: int) -> None:
    room_id = alice.create_room()
    sent = [alice.send_text(room_id, str(number)) for number in range(20)]
    for direction in "bf":
        seen: list[str] = []
        query: Json = {"limit": limit}
        while True:
            page = alice.messages(room_id, direction, **query)
            seen += [event["event_id"] for event in page["chunk"]]
            if "end" not in page:
                break
            query["from"] = page["end"]
        assert len(set(seen)) == len(seen)
        ordered = seen if direction == "f" else seen[::-1]
        assert ordered[-20:] == sent


def test_page_between_two_tokens(alice: Client) -> None:
    room_id = alice.create_room()
    start = alice.sync()["next_batch"]
    sent = [alice.send_text(room_id, str(number)) for number in range(4)]
    end = alice.sync()["next_batch"]
    alice.send_text(room_id, "later")
    chunk = alice.messages(room_id, "f", **{"from": start, "to": end})["chunk"]
    assert [event["event_id"] for event in chunk] == sent
    chunk = alice.messages(room_id, "b", **{"from": end, "to": start})["chunk"]
    assert [event["event_id"] for event in chunk] == sent[::-1]


def test_page_with_filter(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    alice.send_text(room_id, "from alice")
    bob.send(room_id, "m.room.message", {"body": "with url", "url": "mxc://a/b"})
    bob.send(room_id, "m.sticker", {"body": "sticker"})

    def bodies(**wanted: Any) -> list[str]:
        chunk = alice.messages(room_id, filter=json.dumps(wanted))["chunk"]
        return [event["content"]["body"] for event in chunk if "body" in event["content"]]

    assert bodies(types=["m.room.*"]) == ["with url", "from alice"]
    assert bodies(not_types=["m.room.message"]) == ["sticker"]
    assert bodies(senders=[alice.user_id]) == ["from alice"]
    assert bodies(not_senders=[alice.user_id]) == ["sticker", "with url"]
    assert bodies(contains_url=True) == ["with url"]
    page = alice.messages(
        room_id, filter=json.dumps({"lazy_load_members": True, "types": ["m.sticker"]})
    )
    assert [event["state_key"] for event in page["state"]] == [bob.user_id]
    fails(alice.get(("rooms", room_id, "messages"), dir="b", filter="{"), 400, "M_NOT_JSON")
    fails(
        alice.get(("rooms", room_id, "messages"), dir="b", filter='{"types": 7}'), 400, "M_BAD_JSON"
    )


def test_sec_45_hidden_events_do_not_end_the_history(alice: Client, bob: Client) -> None:
    hidden = {"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}
    room_id = alice.room_with(bob, initial_state=[hidden])
    first = bob.send_text(room_id, "seen long ago")
    bob.leave(room_id)
    for number in range(120):
        alice.send_text(room_id, str(number))
    alice.invite(room_id, bob)
    bob.join(room_id)
    query: Json = {"limit": 10}
    seen: list[str] = []
    while True:
        page = bob.messages(room_id, **query)
        seen += [event["event_id"] for event in page["chunk"]]
        if "end" not in page:
            break
        query["from"] = page["end"]
    assert first in seen


@pytest.mark.parametrize(
    ("query", "errcode"),
    [
        ({}, "M_MISSING_PARAM"),
        ({"dir": "x"}, "M_INVALID_PARAM"),
        ({"dir": "b", "from": "nonsense"}, "M_INVALID_PARAM"),
        ({"dir": "b", "limit": "x"}, "M_INVALID_PARAM"),
    ],
)
def test_bad_pages(alice: Client, query: Json, errcode: str) -> None:
    response = alice.get(("rooms", alice.create_room(), "messages"), params=query)
    fails(response, 400, errcode)


def test_context(alice: Client) -> None:
    room_id = alice.create_room(name="Here")
    sent = [alice.send_text(room_id, str(number)) for number in range(7)]
    around = ok(alice.get(("rooms", room_id, "context", sent[3]), limit=4))
    assert around["event"]["event_id"] == sent[3]
    assert [e["event_id"] for e in around["events_before"]] == [sent[2], sent[1]]
    assert [e["event_id"] for e in around["events_after"]] == [sent[4], sent[5]]
    assert {"name": "Here"} in [e["content"] for e in around["state"]]
    older = alice.messages(room_id, "b", **{"from": around["start"], "limit": 1})
    assert [e["event_id"] for e in older["chunk"]] == [sent[0]]
    newer = alice.messages(room_id, "f", **{"from": around["end"], "limit": 10})
    assert [e["event_id"] for e in newer["chunk"]] == [sent[6]]


def test_switches(new_server: Callable[..., Server]) -> None:
    one = new_server(allow_room_creation=False, allow_encryption=False)
    admin, user = register(one), register(one)
    fails(user.post("createRoom", {}), 403, "M_FORBIDDEN")
    room_id = admin.create_room()
    path = ("rooms", room_id, "state", "m.room.encryption", "")
    fails(admin.put(path, {"algorithm": "m.megolm.v1.aes-sha2"}), 403, "M_FORBIDDEN")


def test_new_users_find_themselves_in_the_rooms_of_the_house(
    new_server: Callable[..., Server],
) -> None:
    aliases = [f"#{name}:localhost" for name in ("hall", "cellar", "nowhere")]
    one = new_server(server_name="localhost", auto_join_rooms=aliases)
    host = register(one)
    hall = host.create_room(preset="public_chat", room_alias_name="hall")
    host.create_room(preset="private_chat", room_alias_name="cellar")
    guest = register(one)
    assert ok(guest.get("joined_rooms"))["joined_rooms"] == [hall]
    assert "cannot join #cellar:localhost" in one.log


# ═════════════════════════════════════════════════════════════════════════════
#  18. PUSH RULES AND UNREAD COUNTS
# ═════════════════════════════════════════════════════════════════════════════

PUSH_USER: Final = "@me:test.example"
PUSH_ROOM: Final = "!room:test.example"


def push_event(event_type: str = "m.room.message", **fields: Any) -> Any:
    """What push rules look at in an event."""
    pdu: Json = {
        "type": event_type,
        "sender": "@other:test.example",
        "room_id": PUSH_ROOM,
        "content": {"msgtype": "m.text", "body": "hello"},
        **fields,
    }
    event = types.SimpleNamespace(pdu=pdu, event_id="$event", redacts=None, redacted_by=None)
    event.__dict__.update({k: pdu[k] for k in ("type", "sender", "room_id", "content")})
    event.state_key = pdu.get("state_key")
    return event


def push_room(members: int = 3, sender_level: int = 0, displayname: str = "Me Myself") -> Any:
    """What push rules look at in a room."""
    levels = types.SimpleNamespace(user=lambda user_id: sender_level, notification=lambda key: 50)
    member = types.SimpleNamespace(content={"displayname": displayname})
    return types.SimpleNamespace(
        store=None,
        joined_count=members,
        power_levels=lambda: levels,
        state_event=lambda event_type, state_key="": member if state_key == PUSH_USER else None,
    )


def matching_rule(event: Any, room: Any = None, stored: Json | None = None) -> str | None:
    """The id of the rule that an event meets."""
    ruleset = conduit.PushRuleset(0, stored or {})
    rule = ruleset.match(event, room or push_room(), PUSH_USER)
    return rule.rule_id if rule else None


def holds(condition: Any, event: Any = None, room: Any = None) -> bool:
    """Whether one condition holds."""
    prepared = conduit.prepare_condition(condition)
    return prepared(event or push_event(), room or push_room(), PUSH_USER)


# ── 18.1  Globs ──────────────────────────────────────────────────────────────


def reference_glob(pattern: str) -> str:
    """The glob as a regular expression, for short texts."""
    pieces = {"*": "[\\s\\S]*", "?": "[\\s\\S]"}
    return "".join(pieces.get(c) or re.escape(c) for c in pattern)


GLOB_TEXT: Final = st.text(alphabet="aAbB_ -\n", max_size=12)


@given(st.text(alphabet="aAb_ -*?", max_size=7), GLOB_TEXT)
def test_glob_matches_like_the_reference(pattern: str, text: str) -> None:
    expected = re.fullmatch(reference_glob(pattern.lower()), text.lower()) is not None
    assert conduit.glob(pattern)(text) is expected


@given(st.text(alphabet="aAb_ -*?", max_size=7), GLOB_TEXT)
def test_glob_finds_words_like_the_reference(pattern: str, text: str) -> None:
    expression = re.compile(reference_glob(pattern.lower()))
    places = [
        expression.fullmatch(text.lower(), i, j)
        for i in range(len(text) + 1)
        for j in range(i, len(text) + 1)
        if is_edge(text, i) and is_edge(text, j)
    ]
    assert conduit.glob(pattern, words=True)(text) is any(places)


def is_edge(text: str, index: int) -> bool:
    """A word boundary as the specification defines it: an end of the text, or no word character."""
    word = string.ascii_letters + string.digits + "_"
    around = text[max(0, index - 1) : index + 1]
    return index in (0, len(text)) or not all(c in word for c in around)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("lunc?*", "Lunch plans", True),
        ("lunc?*", "LUNCH", True),
        ("lunc?*", " lunch", False),
        ("lunc?*", "lunc", False),
        ("", "", True),
        ("", "x", False),
        ("*", "", True),
        ("[a-z].+", "[a-z].+", True),
        ("[a-z].+", "abc", False),
    ],
)
def test_glob_examples(pattern: str, text: str, expected: bool) -> None:
    assert conduit.glob(pattern)(text) is expected


@pytest.mark.parametrize(
    ("pattern", "body", "expected"),
    [
        ("ex*ple", "An example event.", True),
        ("ex*ple", "exple", True),
        ("ex*ple", "An exciting triple-whammy", True),
        ("ex*ple", "An examples event", False),
        ("tea", "It's TEA time", True),
        ("tea", "steam", False),
        ("tea", "tea_time", False),
        ("tea", "(tea)", True),
        ("@room", "hi @room!", True),
    ],
)
def test_glob_word_examples(pattern: str, body: str, expected: bool) -> None:
    assert conduit.glob(pattern, words=True)(body) is expected


def test_sec_42_glob_does_not_blow_up() -> None:
    texts = ("a" * 60_000 + "c", "a " * 30_000 + "c", "b" + "a" * 60_000, "a " * 30_000 + "xbx")
    for pattern in ("*a" * 100 + "b", "?*" * 120 + "b", "a?" * 100 + "b", "*" + "?" * 200 + "b"):
        for words in (False, True):
            matches = conduit.glob(pattern, words=words)
            before = time.perf_counter()
            assert not any(matches(text) for text in texts)
            assert time.perf_counter() - before < 0.7


# ── 18.2  The predefined rules ───────────────────────────────────────────────

STATE: Final = {"state_key": ""}
MENTION: Final = {"m.mentions": {"user_ids": [PUSH_USER]}, "body": "x"}
ROOM_CALL: Final = {"m.mentions": {"room": True}, "body": "x"}
INVITE: Final = {"state_key": PUSH_USER, "content": {"membership": "invite"}}

# rule, an event that meets it, and one that nearly does
DEFAULT_CASES: Final[list[tuple[str, Any, Any, int, int]]] = [
    (
        "suppress_notices",
        push_event(content={"msgtype": "m.notice", "body": "x"}),
        push_event(content={"msgtype": "m.notices", "body": "x"}),
        3,
        0,
    ),
    (
        "invite_for_me",
        push_event("m.room.member", **INVITE),
        push_event("m.room.member", **{**INVITE, "state_key": "@you:test.example"}),
        3,
        0,
    ),
    (
        "member_event",
        push_event("m.room.member", state_key="@x:y", content={"membership": "join"}),
        push_event("m.room.members"),
        3,
        0,
    ),
    (
        "is_user_mention",
        push_event(content=MENTION),
        push_event(content={"m.mentions": {"user_ids": PUSH_USER}}),
        3,
        0,
    ),
    (
        "is_room_mention",
        push_event(content=ROOM_CALL),
        push_event(content={"m.mentions": {"room": 1}}),
        3,
        50,
    ),
    (
        "tombstone",
        push_event("m.room.tombstone", **STATE, content={}),
        push_event("m.room.tombstone", content={}),
        3,
        0,
    ),
    ("reaction", push_event("m.reaction", content={}), push_event("m.reactions"), 3, 0),
    (
        "room.server_acl",
        push_event("m.room.server_acl", **STATE, content={}),
        push_event("m.room.server_acl", content={}),
        3,
        0,
    ),
    (
        "suppress_edits",
        push_event(content={"m.relates_to": {"rel_type": "m.replace"}}),
        push_event(content={"m.relates_to": {"rel_type": "m.thread"}}),
        3,
        0,
    ),
    ("call", push_event("m.call.invite", content={}), push_event("m.call.answer"), 3, 0),
    (
        "encrypted_room_one_to_one",
        push_event("m.room.encrypted", content={}),
        push_event("m.room.encrypt"),
        2,
        0,
    ),
    ("room_one_to_one", push_event(), push_event("org.example"), 2, 0),
    ("message", push_event(), push_event("org.example"), 3, 0),
    ("encrypted", push_event("m.room.encrypted", content={}), push_event("org.example"), 3, 0),
]


@pytest.mark.parametrize(("name", "fits", "misses", "members", "level"), DEFAULT_CASES)
def test_default_rule(name: str, fits: Any, misses: Any, members: int, level: int) -> None:
    room = push_room(members, level)
    assert matching_rule(fits, room) == f".m.rule.{name}"
    assert matching_rule(misses, room) != f".m.rule.{name}"


RULE_KINDS = [kind for kind in conduit.PUSH_KINDS if kind != "postcontent"]


def test_all_default_rules_are_there_in_order() -> None:
    ruleset = conduit.DEFAULT_RULESET.to_json(PUSH_USER)
    names = [rule["rule_id"] for kind in RULE_KINDS for rule in ruleset[kind]]
    assert names == [".m.rule.master", *(f".m.rule.{case[0]}" for case in DEFAULT_CASES)]
    assert json.dumps(ruleset).count(PUSH_USER) == 2
    assert "Matrix ID" not in json.dumps(ruleset)
    assert ruleset["override"][0]["enabled"] is False


def test_rules_agree_with_the_text_of_the_specification() -> None:
    text_file = SPEC_TOOLS.parent / "spec/content/client-server-api/modules/push.md"
    if not text_file.exists():
        pytest.skip("the specification is not at hand")
    blocks = re.findall(r"```json\n(\{\s+\"rule_id\".*?)```", text_file.read_text(), re.DOTALL)
    specified = [json.loads(block) for block in blocks]
    placeholder = "[the user's Matrix ID]"
    ours = conduit.DEFAULT_RULESET.to_json(placeholder)
    assert [*ours["override"], *ours["underride"]] == specified


def test_room_mention_needs_power() -> None:
    event = push_event(content=ROOM_CALL)
    assert matching_rule(event, push_room(3, 49)) == ".m.rule.message"
    assert matching_rule(event, push_room(3, 50)) == ".m.rule.is_room_mention"


def test_master_silences_everything_even_own_rules() -> None:
    own = {"rule_id": "loud", "enabled": True, "actions": ["notify"], "conditions": []}
    stored = {"override": [own], "default": {".m.rule.master": {"enabled": True}}}
    assert matching_rule(push_event(), stored=stored) == ".m.rule.master"
    assert matching_rule(push_event(), stored={"override": [own]}) == "loud"


def test_order_of_kinds() -> None:
    rule = {"enabled": True, "actions": ["notify"]}
    stored: Json = {
        "override": [],
        "content": [{**rule, "rule_id": "word", "pattern": "hello"}],
        "room": [{**rule, "rule_id": PUSH_ROOM}],
        "sender": [{**rule, "rule_id": "@other:test.example"}],
        "underride": [{**rule, "rule_id": "under", "conditions": []}],
    }
    for kind, expected in (
        ("content", "word"),
        ("room", PUSH_ROOM),
        ("sender", "@other:test.example"),
        ("underride", "under"),
    ):
        assert matching_rule(push_event(), stored=stored) == expected
        stored[kind] = []
    assert matching_rule(push_event(), stored=stored) == ".m.rule.message"


def test_disabled_rules_do_not_match() -> None:
    stored = {"default": {".m.rule.message": {"enabled": False}}}
    assert matching_rule(push_event(), stored=stored) is None


def test_rules_for_a_room_do_not_leak_into_another() -> None:
    rule = {"rule_id": PUSH_ROOM, "enabled": True, "actions": []}
    ruleset = conduit.PushRuleset(0, {"room": [rule]})
    for _ in range(2):
        here = ruleset.match(push_event(), push_room(), PUSH_USER)
        assert here is not None
        assert here.rule_id == PUSH_ROOM
        other = push_event(room_id="!other:test.example")
        there = ruleset.match(other, push_room(), PUSH_USER)
        assert there is not None
        assert there.rule_id == ".m.rule.message"


# ── 18.3  Conditions ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("content.body", ["content", "body"]),
        (r"content.m\.relates_to", ["content", "m.relates_to"]),
        (r"content.m\\foo", ["content", "m\\foo"]),
        (r"content.\x", ["content", r"\x"]),
        ("", [""]),
        ("a..b", ["a", "", "b"]),
        ("end\\", ["end\\"]),
    ],
)
def test_property_paths(key: str, path: list[str]) -> None:
    pdu: Any = "found"
    for name in reversed(path):
        pdu = {name: pdu}
    get = conduit.property_getter(key)
    assert get(types.SimpleNamespace(pdu=pdu)) == "found"
    assert get(types.SimpleNamespace(pdu={**pdu, path[0]: 1})) != "found"


def test_event_match_on_fields_outside_of_the_content() -> None:
    assert holds({"kind": "event_match", "key": "room_id", "pattern": "!room*"})
    assert holds({"kind": "event_match", "key": "sender", "pattern": "@OTHER:*"})
    assert holds({"kind": "event_match", "key": "event_id", "pattern": "$event"})
    assert not holds({"kind": "event_match", "key": "state_key", "pattern": "*"})
    assert holds({"kind": "event_match", "key": "state_key", "pattern": ""}, push_event(**STATE))


def test_event_property_is_does_not_cast() -> None:
    event = push_event(content={"t": True, "one": 1, "text": "1", "nothing": None, "list": [1]})
    cases: list[tuple[str, Any, bool]] = [
        ("t", True, True),
        ("t", 1, False),
        ("one", 1, True),
        ("one", True, False),
        ("one", "1", False),
        ("text", "1", True),
        ("nothing", None, True),
        ("absent", None, False),
        ("list", 1, False),
    ]
    for key, value, expected in cases:
        condition = {"kind": "event_property_is", "key": f"content.{key}", "value": value}
        assert holds(condition, event) is expected, (key, value)
    assert not holds({"kind": "event_property_is", "key": "content.list", "value": [1]}, event)
    assert not holds({"kind": "event_property_is", "key": "content.nothing"}, event)


def test_event_property_contains() -> None:
    event = push_event(content={"list": ["a", 1, None, {"x": 1}], "text": "abc"})
    for value, expected in (("a", True), (1, True), (True, False), (None, True), ("A", False)):
        condition = {"kind": "event_property_contains", "key": "content.list", "value": value}
        assert holds(condition, event) is expected, value
    condition = {"kind": "event_property_contains", "key": "content.text", "value": "a"}
    assert not holds(condition, event)


@pytest.mark.parametrize(
    ("text", "matching"),
    [
        ("2", {2}),
        ("==2", {2}),
        ("<2", {1}),
        (">2", {3}),
        ("<=2", {1, 2}),
        (">=2", {2, 3}),
        ("", set()),
        ("two", set()),
        ("=2", set()),
        (" 2", set()),
    ],
)
def test_room_member_count(text: Any, matching: set[int]) -> None:
    condition = {"kind": "room_member_count", "is": text}
    assert {n for n in (1, 2, 3) if holds(condition, room=push_room(n))} == matching


def test_contains_display_name() -> None:
    condition = {"kind": "contains_display_name"}
    said = push_event(content={"body": "Hello me myself!"})
    assert holds(condition, said)
    assert not holds(condition, push_event(content={"body": "some myself"}))
    assert not holds(condition, said, push_room(displayname=""))
    assert not holds(condition, said, push_room(displayname="*"))
    assert holds(condition, push_event(content={"body": "a * b"}), push_room(displayname="*"))


PUSH_JUNK: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just(PUSH_USER),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS: Final = st.sampled_from(
    ["content.body", "content", "type", "room_id", "content.m\\.mentions.user_ids", "x.y"]
)
PUSH_CONDITION: Final = st.fixed_dictionaries(
    {"kind": st.sampled_from([*conduit.PUSH_CONDITIONS, "unknown"]) | PUSH_JUNK},
    optional={
        "key": KEYS | PUSH_JUNK,
        "pattern": st.text(max_size=5) | PUSH_JUNK,
        "value": PUSH_JUNK,
        "is": st.sampled_from(["2", ">1"]) | PUSH_JUNK,
    },
)


@given(
    PUSH_CONDITION | PUSH_JUNK,
    st.dictionaries(st.sampled_from(["body", "m.mentions", "m.relates_to"]), PUSH_JUNK, max_size=3),
)
def test_no_condition_and_no_content_crashes(condition: Any, content: Json) -> None:
    """A condition is refused, or can be asked about any event."""
    body = {"actions": [], "conditions": [condition]}
    try:
        conduit.check_shape(body, conduit.PUSH_RULE_SHAPE, "The body")
    except conduit.MatrixError as error:
        assert error.errcode in ("M_BAD_JSON", "M_MISSING_PARAM")
        return
    event = push_event(content=content)
    assert holds(condition, event) in (True, False)
    matching_rule(event, stored={"override": [conduit.parse_push_rule("override", "x", body)]})


@given(st.lists(PUSH_JUNK, max_size=4))
def test_actions_that_are_junk_are_refused_or_harmless(actions: list[Any]) -> None:
    try:
        kept = conduit.parse_actions(actions)
    except conduit.MatrixError as error:
        assert error.errcode == "M_BAD_JSON"
        return
    rule = {"rule_id": "x", "enabled": True, "actions": kept, "conditions": []}
    conduit.PushRule("override", rule)


def test_rule_is_found_quickly() -> None:
    event, room = push_event(), push_room()
    conduit.DEFAULT_RULESET.match(event, room, PUSH_USER)
    before = time.perf_counter()
    for _ in range(2000):
        conduit.DEFAULT_RULESET.match(event, room, PUSH_USER)
    assert (time.perf_counter() - before) / 2000 < 50e-6  # measured: 4 µs


# ── 18.4  The push rule endpoints ────────────────────────────────────────────


def rule_ids(client: Client, kind: str) -> list[str]:
    """The ids of a user's own rules of a kind, in order."""
    rules = ok(client.get("pushrules/global/"))[kind]
    return [rule["rule_id"] for rule in rules if not rule["default"]]


def rule_path(kind: str, rule_id: str, *rest: str) -> tuple[str, ...]:
    """The path of a rule."""
    return ("pushrules", "global", kind, rule_id, *rest)


def test_push_rules_as_a_whole(alice: Client) -> None:
    whole = ok(alice.get("pushrules/"))
    assert whole["global"] == ok(alice.get("pushrules/global/"))
    assert ok(alice.get("pushrules")) == whole
    assert set(whole["global"]) == set(conduit.PUSH_KINDS)
    assert whole["global"]["override"][0]["rule_id"] == ".m.rule.master"
    mention = next(r for r in whole["global"]["override"] if r["rule_id"].endswith("user_mention"))
    assert mention["conditions"][0]["value"] == alice.user_id


def test_own_rule_made_changed_deleted(alice: Client) -> None:
    path = rule_path("content", "cake")
    ok(alice.put(path, {"pattern": "cake*lie", "actions": ["dont_notify"]}))
    rule = ok(alice.get(path))
    assert rule == {
        "rule_id": "cake",
        "pattern": "cake*lie",
        "actions": [],
        "enabled": True,
        "default": False,
    }
    ok(alice.put((*path, "enabled"), {"enabled": False}))
    ok(alice.put((*path, "actions"), {"actions": ["notify", {"set_tweak": "glow"}]}))
    assert ok(alice.get((*path, "enabled"))) == {"enabled": False}
    assert ok(alice.get((*path, "actions"))) == {"actions": ["notify", {"set_tweak": "glow"}]}
    ok(alice.put(path, {"pattern": "pie", "actions": []}))
    assert ok(alice.get(path))["pattern"] == "pie"
    ok(alice.delete(path))
    fails(alice.get(path), 404, "M_NOT_FOUND")
    fails(alice.delete(path), 404, "M_NOT_FOUND")


def test_rule_order_by_before_and_after(alice: Client) -> None:
    def put(rule_id: str, **query: str) -> httpx.Response:
        body = {"conditions": [], "actions": []}
        return alice.put(rule_path("underride", rule_id), body, params=query)

    for rule_id in "abc":
        ok(put(rule_id))
    assert rule_ids(alice, "underride") == ["c", "b", "a"]
    ok(put("d", before="b"))
    ok(put("e", after="b"))
    assert rule_ids(alice, "underride") == ["c", "d", "b", "e", "a"]
    ok(put("a", before="c", after="b"))
    assert rule_ids(alice, "underride") == ["a", "c", "d", "b", "e"]
    ok(put("d"))
    assert rule_ids(alice, "underride") == ["a", "c", "d", "b", "e"]
    fails(put("f", before="nope"), 400, "M_UNKNOWN")
    fails(put("f", after=".m.rule.message"), 400, "M_UNKNOWN")
    fails(put("d", after="d"), 400, "M_UNKNOWN")
    assert rule_ids(alice, "underride") == ["a", "c", "d", "b", "e"]


def test_default_rules_can_be_tuned_but_not_deleted(alice: Client) -> None:
    path = rule_path("underride", ".m.rule.message")
    ok(alice.put((*path, "enabled"), {"enabled": False}))
    ok(alice.put((*path, "actions"), {"actions": []}))
    rule = ok(alice.get(path))
    assert (rule["enabled"], rule["actions"], rule["default"]) == (False, [], True)
    fails(alice.delete(path), 400)
    fails(alice.put(path, {"actions": [], "conditions": []}), 400, "M_INVALID_PARAM")


@pytest.mark.parametrize(
    ("kind", "rule_id", "body", "errcode"),
    [
        ("nonsense", "x", {"actions": []}, "M_INVALID_PARAM"),
        ("override", ".x", {"actions": []}, "M_INVALID_PARAM"),
        ("override", "a/b", {"actions": []}, "M_INVALID_PARAM"),
        ("override", "a\\b", {"actions": []}, "M_INVALID_PARAM"),
        ("override", "x", {}, "M_MISSING_PARAM"),
        ("override", "x", {"actions": "notify"}, "M_BAD_JSON"),
        ("override", "x", {"actions": [1]}, "M_BAD_JSON"),
        ("override", "x", {"actions": [{"no": "tweak"}]}, "M_BAD_JSON"),
        ("override", "x", {"actions": [], "conditions": [1]}, "M_BAD_JSON"),
        ("override", "x", {"actions": [], "conditions": [{"key": "x"}]}, "M_MISSING_PARAM"),
        ("content", "x", {"actions": []}, "M_MISSING_PARAM"),
        ("content", "x", {"actions": [], "pattern": 1}, "M_BAD_JSON"),
        ("content", "x", {"actions": [], "pattern": "x" * 5000}, "M_INVALID_PARAM"),
        ("override", "x", {"actions": ["x" * 300_000]}, "M_TOO_LARGE"),
        ("room", "x", {"actions": []}, "M_INVALID_PARAM"),
        ("sender", "x", {"actions": []}, "M_INVALID_PARAM"),
    ],
)
def test_bad_rules(alice: Client, kind: str, rule_id: str, body: Json, errcode: str) -> None:
    status = 413 if errcode == "M_TOO_LARGE" else 400
    fails(alice.put(rule_path(kind, rule_id), body), status, errcode)


def test_conditions_that_are_incomplete_are_kept_and_never_hold(alice: Client, bob: Client) -> None:
    kinds = ("event_match", "event_property_is", "room_member_count", "org.example")
    conditions: list[Json] = [{"kind": kind} for kind in kinds]
    conditions.append({"kind": "event_match", "pattern": "*"})
    for number, condition in enumerate(conditions):
        body = {"actions": [], "conditions": [condition]}
        ok(alice.put(rule_path("override", f"{number}"), body))
    room = bob.room_with(alice)
    bob.send_text(room, "x")
    assert counts(alice, room) == (1, 0)


def test_unknown_rules_and_kinds(alice: Client) -> None:
    for rest in ((), ("enabled",), ("actions",)):
        fails(alice.get(rule_path("override", "nope", *rest)), 404, "M_NOT_FOUND")
        fails(alice.get(rule_path("nonsense", "nope", *rest)), 400)
    fails(alice.put(rule_path("override", "nope", "enabled"), {"enabled": True}), 404)
    fails(alice.put(rule_path("override", "nope", "actions"), {"actions": []}), 404)


def push_rules_event(result: Json) -> Json | None:
    """The content of m.push_rules in a sync result."""
    events = result.get("account_data", {}).get("events", [])
    found = [event["content"] for event in events if event["type"] == "m.push_rules"]
    return found[0] if found else None


def test_changed_rules_come_with_sync(alice: Client, bob: Client) -> None:
    assert push_rules_event(alice.poll()) is not None
    assert push_rules_event(alice.poll()) is None
    ok(alice.put(rule_path("sender", bob.user_id), {"actions": []}))
    content = push_rules_event(alice.poll())
    assert content is not None
    assert content["global"]["sender"][0]["rule_id"] == bob.user_id
    assert push_rules_event(alice.poll()) is None
    path = ("user", alice.user_id, "account_data", "m.push_rules")
    assert ok(alice.get(path)) == content
    fails(alice.put(path, {}), 405)


# ── 18.5  Unread counts ──────────────────────────────────────────────────────

THREADS: Final = {"room": {"timeline": {"unread_thread_notifications": True}}}


def counts(client: Client, room_id: str) -> tuple[int, int]:
    """Notifications and highlights of a room for a client that knows no threads."""
    room = client.sync()["rooms"]["join"][room_id]["unread_notifications"]
    return room["notification_count"], room["highlight_count"]


def thread_counts(client: Client, room_id: str) -> dict[str, tuple[int, int]]:
    """Notifications and highlights by thread."""
    room = client.sync(filter=THREADS)["rooms"]["join"][room_id]
    by_thread = {
        "main": room["unread_notifications"],
        **room.get("unread_thread_notifications", {}),
    }
    return {k: (v["notification_count"], v["highlight_count"]) for k, v in by_thread.items()}


def receipt(
    client: Client, room_id: str, event_id: str, thread: str | None = None, kind: str = "m.read"
) -> None:
    """Send a receipt."""
    body = {} if thread is None else {"thread_id": thread}
    ok(client.post(("rooms", room_id, "receipt", kind, event_id), body))


def mention(client: Client, room_id: str, *users: str) -> str:
    """Send a message that mentions users."""
    content = {"msgtype": "m.text", "body": "hey", "m.mentions": {"user_ids": list(users)}}
    return client.send(room_id, "m.room.message", content)


def in_thread(client: Client, room_id: str, root: str, **content: Any) -> str:
    """Send a message in a thread."""
    relation = {"rel_type": "m.thread", "event_id": root}
    body = {"msgtype": "m.text", "body": "in thread", "m.relates_to": relation, **content}
    return client.send(room_id, "m.room.message", body)


def test_counts_rise_with_messages_and_fall_with_receipts(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    assert counts(bob, room) == (0, 0)
    events = [alice.send_text(room, f"{n}") for n in range(5)]
    assert counts(bob, room) == (5, 0)
    assert counts(alice, room) == (0, 0)
    mention(alice, room, bob.user_id)
    assert counts(bob, room) == (6, 1)
    receipt(bob, room, events[2])
    assert counts(bob, room) == (3, 1)
    receipt(bob, room, events[0])
    assert counts(bob, room) == (3, 1)
    receipt(bob, room, events[4], kind="m.read.private")
    assert counts(bob, room) == (1, 1)
    receipt(bob, room, mention(alice, room, "@nobody:test.example"))
    assert counts(bob, room) == (0, 0)


def test_what_does_not_count(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    text = alice.send_text(room, "counts")
    receipt(bob, room, text)
    alice.send(room, "m.room.message", {"msgtype": "m.notice", "body": "x"})
    alice.send(
        room,
        "m.reaction",
        {"m.relates_to": {"rel_type": "m.annotation", "event_id": text, "key": "x"}},
    )
    edit = {"rel_type": "m.replace", "event_id": text}
    new = {"msgtype": "m.text", "body": "y"}
    alice.send(room, "m.room.message", {**new, "m.relates_to": edit, "m.new_content": new})
    alice.set_state(room, "m.room.topic", {"topic": "x"})
    alice.send(room, "org.example.unknown", {})
    assert counts(bob, room) == (0, 0)


def test_redacted_events_no_longer_count(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    first, second = alice.send_text(room, "1"), mention(alice, room, bob.user_id)
    assert counts(bob, room) == (2, 1)
    alice.redact(room, second)
    assert counts(bob, room) == (1, 0)
    third = alice.send_text(room, "3")
    alice.redact(room, third)
    assert counts(bob, room) == (1, 0)
    alice.redact(room, first)
    assert counts(bob, room) == (0, 0)


def test_counts_begin_with_the_join_and_again_after_another(alice: Client, bob: Client) -> None:
    room = alice.create_room(bob)
    alice.send_text(room, "before")
    bob.join(room)
    assert counts(bob, room) == (0, 0)
    alice.send_text(room, "after")
    assert counts(bob, room) == (1, 0)
    bob.leave(room)
    alice.send_text(room, "meanwhile")
    alice.invite(room, bob)
    bob.join(room)
    assert counts(bob, room) == (0, 0)
    alice.send_text(room, "again")
    assert counts(bob, room) == (1, 0)


def test_own_message_reads_but_own_profile_change_does_not(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    alice.send_text(room, "x")
    ok(bob.put(("profile", bob.user_id, "displayname"), {"displayname": "Bobby"}))
    assert counts(bob, room) == (1, 0)
    bob.send_text(room, "y")
    assert counts(bob, room) == (0, 0)


def test_ignored_users_do_not_notify(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    alice.send_text(room, "before")
    assert counts(bob, room) == (1, 0)
    path = ("user", bob.user_id, "account_data", "m.ignored_user_list")
    ok(bob.put(path, {"ignored_users": {alice.user_id: {}}}))
    assert counts(bob, room) == (0, 0)
    alice.send_text(room, "after")
    assert counts(bob, room) == (0, 0)


def test_muted_room_and_keyword(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    ok(bob.put(rule_path("room", room), {"actions": []}))
    alice.send_text(room, "quiet")
    assert counts(bob, room) == (0, 0)
    body: Json = {"pattern": "fire", "actions": ["notify", {"set_tweak": "highlight"}]}
    ok(bob.put(rule_path("content", "fire"), body))
    alice.send_text(room, "There is FIRE!")
    assert counts(bob, room) == (1, 1)
    mention(alice, room, bob.user_id)
    assert counts(bob, room) == (2, 2)


def test_threads_are_counted_and_read_apart(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    root = alice.send_text(room, "root")
    one = in_thread(alice, room, root)
    two = in_thread(alice, room, root, **{"m.mentions": {"user_ids": [bob.user_id]}})
    main = alice.send_text(room, "main")
    assert thread_counts(bob, room) == {"main": (2, 0), root: (2, 1)}
    assert counts(bob, room) == (4, 1)
    receipt(bob, room, main, "main")
    assert thread_counts(bob, room) == {"main": (0, 0), root: (2, 1)}
    receipt(bob, room, one, root)
    assert thread_counts(bob, room) == {"main": (0, 0), root: (1, 1)}
    receipt(bob, room, two, root)
    assert thread_counts(bob, room) == {"main": (0, 0)}
    in_thread(alice, room, root)
    alice.send_text(room, "more")
    receipt(bob, room, alice.send_text(room, "last"))
    assert thread_counts(bob, room) == {"main": (0, 0)}


def test_relations_belong_to_the_thread_of_what_they_relate_to(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    root = alice.send_text(room, "root")
    reply = in_thread(alice, room, root)
    receipt(bob, room, reply)
    relation = {"rel_type": "org.example.note", "event_id": reply}
    content = {"msgtype": "m.text", "body": "x", "m.relates_to": relation}
    alice.send(room, "m.room.message", content)
    assert thread_counts(bob, room) == {"main": (0, 0), root: (1, 0)}
    relation = {"rel_type": "org.example.note", "event_id": root}
    alice.send(room, "m.room.message", {**content, "m.relates_to": relation})
    assert thread_counts(bob, room) == {"main": (1, 0), root: (1, 0)}


def test_counts_come_with_the_event_and_to_other_devices(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    phone = bob.login()
    bob.poll()
    phone.poll()
    event = alice.send_text(room, "x")
    section = bob.poll()["rooms"]["join"][room]
    assert section["unread_notifications"]["notification_count"] == 1
    phone.poll()
    receipt(bob, room, event, kind="m.read.private")
    section = phone.poll()["rooms"]["join"][room]
    assert section["unread_notifications"]["notification_count"] == 0


def test_receipts_outlast_a_change_of_rules_and_a_restart(
    new_server: Callable[..., Server],
) -> None:
    """What was read in a muted room must not come back as unread when it is unmuted."""
    server = new_server()
    alice, bob = register(server), register(server)
    room = alice.room_with(bob)
    ok(bob.put(rule_path("room", room), {"actions": []}))
    alice.send_text(room, "1")
    receipt(bob, room, alice.send_text(room, "2"))
    ok(bob.delete(rule_path("room", room)))
    server.restart()
    assert counts(bob, room) == (0, 0)


def test_cost_of_keywords_is_bounded(alice: Client) -> None:
    for number in range(4):
        rule = {"pattern": "x" * (conduit.MAX_PATTERNS // 4), "actions": []}
        ok(alice.put(rule_path("content", f"{number}"), rule))
    response = alice.put(rule_path("content", "more"), {"pattern": "more", "actions": []})
    fails(response, 400, "M_INVALID_PARAM")
    assert len(rule_ids(alice, "content")) == 4


def test_counts_survive_restarts(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice, bob = register(server), register(server)
    room = alice.room_with(bob)
    root = alice.send_text(room, "root")
    events = [alice.send_text(room, f"{n}") for n in range(120)]
    in_thread(alice, room, root)
    mention(alice, room, bob.user_id)
    expected = {"main": (122, 1), root: (1, 0)}
    assert thread_counts(bob, room) == expected
    server.restart()
    assert thread_counts(bob, room) == expected
    receipt(bob, room, events[-1], "main")
    server.kill9()
    server.start()
    assert thread_counts(bob, room) == {"main": (1, 1), root: (1, 0)}
    ok(bob.put(rule_path("room", room), {"actions": []}))
    server.restart()
    assert rule_ids(bob, "room") == [room]


@slow
def test_badge_after_a_long_absence_is_bounded(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    events = [alice.send_text(room, "x") for _ in range(conduit.MAX_CONSIDERED + 20)]
    assert counts(bob, room) == (conduit.MAX_CONSIDERED, 0)
    receipt(bob, room, events[-3])
    assert counts(bob, room) == (2, 0)


ACTIONS: Final = st.lists(
    st.tuples(
        st.sampled_from(["send", "thread", "mention", "read", "read main", "redact", "reply"]),
        st.integers(0, 30),
    ),
    max_size=25,
)


@slow
@settings(max_examples=15)
@given(ACTIONS)
def test_counts_agree_with_a_model(server: Server, actions: list[tuple[str, int]]) -> None:
    """Any history: the counts are what a naive recount from all events and receipts gives."""
    alice, bob = family(server)
    room = alice.room_with(bob)
    root = alice.send_text(room, "root")
    sent: list[tuple[str, str, bool, bool]] = [
        (root, "main", False, True)
    ]  # id, thread, high, live
    read = {"main": -1, root: -1}
    for action, number in actions:
        index = number % len(sent)
        if action == "read":
            receipt(bob, room, sent[index][0])
            read = {thread: max(at, index) for thread, at in read.items()}
        elif action == "read main":
            if sent[index][1] == "main":
                receipt(bob, room, sent[index][0], "main")
                read["main"] = max(read["main"], index)
        elif action == "redact":
            event_id, thread, high, live = sent[index]
            if live and event_id != root:
                alice.redact(room, event_id)
                sent[index] = (event_id, thread, high, False)
        elif action == "reply":
            sent.append((bob.send_text(room, "own"), "main", False, False))
            read["main"] = len(sent) - 1
        else:
            sent.append(sent_by(alice, bob, room, root, action))
    expected = {"main": (0, 0)}
    for index, (_, thread, high, live) in enumerate(sent):
        if live and index > read[thread]:
            n, h = expected.get(thread, (0, 0))
            expected[thread] = (n + 1, h + high)
    assert thread_counts(bob, room) == expected


def sent_by(
    alice: Client, bob: Client, room: str, root: str, action: str
) -> tuple[str, str, bool, bool]:
    """Let alice send one event: its id, its thread, whether it highlights, whether it counts."""
    if action == "thread":
        return in_thread(alice, room, root), root, False, True
    if action == "mention":
        return mention(alice, room, bob.user_id), "main", True, True
    return alice.send_text(room, "x"), "main", False, True


FAMILY: Final[dict[str, tuple[Client, Client]]] = {}


def family(server: Server) -> tuple[Client, Client]:
    """Two users that all examples of a property share."""
    if server.url not in FAMILY:
        FAMILY[server.url] = register(server, unique("ma")), register(server, unique("pa"))
    return FAMILY[server.url]


# ═════════════════════════════════════════════════════════════════════════════
#  42. THREADS AND DAYS
# ═════════════════════════════════════════════════════════════════════════════


def test_relations_by_type_direction_and_page(alice: Client) -> None:
    room_id = alice.create_room()
    root = alice.send_text(room_id, "root")
    replies = [say(alice, room_id, related("m.thread", root, f"{n}")) for n in range(7)]
    reaction = {"m.relates_to": {"rel_type": "m.annotation", "event_id": root, "key": "x"}}
    liked = alice.send(room_id, "m.reaction", reaction)
    assert related_ids(alice, room_id, root) == [liked, *reversed(replies)]
    assert related_ids(alice, room_id, root, "m.thread") == replies[::-1]
    assert related_ids(alice, room_id, root, "m.annotation", "m.reaction") == [liked]
    assert related_ids(alice, room_id, root, "m.thread", "m.reaction") == []
    assert related_ids(alice, room_id, root, dir="f", limit=3) == replies[:3]
    seen, token = list[str](), ""
    path = v1("rooms", room_id, "relations", root, "m.thread")
    while True:
        page = ok(alice.get(path, limit=3, **({"from": token} if token else {})))
        assert ("prev_batch" in page) == bool(token)
        seen += [event["event_id"] for event in page["chunk"]]
        if "next_batch" not in page:
            break
        token = page["next_batch"]
    assert seen == replies[::-1]
    fails(alice.get(path, **{"from": "nonsense"}), 400, "M_INVALID_PARAM")
    fails(alice.get(path, dir="x"), 400, "M_INVALID_PARAM")
    fails(alice.get(path, limit=0), 400, "M_INVALID_PARAM")
    fails(alice.get(v1("rooms", room_id, "relations", "$nothing")), 404, "M_NOT_FOUND")


def test_sec_47_relations_recurse_three_levels_and_end(alice: Client) -> None:
    room_id = alice.create_room()
    chain = [alice.send_text(room_id, "root")]
    for _ in range(6):
        chain.append(say(alice, room_id, related("m.reference", chain[-1])))
    path = v1("rooms", room_id, "relations", chain[0])
    page = ok(alice.get(path, recurse="true"))
    assert [event["event_id"] for event in page["chunk"]] == chain[3:0:-1]
    assert page["recursion_depth"] == 3
    assert "recursion_depth" not in ok(alice.get(path))
    edit = say(alice, room_id, edit_of(chain[1], "edited"))
    found = related_ids(alice, room_id, chain[0], "m.replace", recurse="true")
    assert found == [edit]
    assert related_ids(alice, room_id, chain[0], recurse="true", limit=2, dir="f") == chain[1:3]


def test_redacted_children_are_no_relations(alice: Client) -> None:
    room_id = alice.create_room()
    root = alice.send_text(room_id, "root")
    replies = [say(alice, room_id, related("m.thread", root)) for _ in range(2)]
    alice.redact(room_id, replies[0])
    assert related_ids(alice, room_id, root) == replies[1:]


def test_messages_can_be_filtered_by_relation(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    root = alice.send_text(room_id, "root")
    plain = alice.send_text(room_id, "plain")
    reply = say(bob, room_id, related("m.thread", root))
    edit = say(alice, room_id, edit_of(plain, "edited"))

    def shown(**wanted: Any) -> list[str]:
        wanted["types"] = ["m.room.message"]
        page = alice.messages(room_id, filter=json.dumps(wanted))
        return [event["event_id"] for event in page["chunk"]]

    assert shown(related_by_rel_types=["m.thread"]) == [root]
    assert shown(related_by_senders=[bob.user_id]) == [root]
    assert shown(related_by_senders=["@nobody:test.example"]) == []
    assert shown(related_by_senders=[alice.user_id], related_by_rel_types=["m.thread"]) == []
    for prefix in ("", "org.matrix.msc3874."):
        assert shown(**{f"{prefix}rel_types": ["m.thread"]}) == [reply]
        assert shown(**{f"{prefix}not_rel_types": ["m.thread"]}) == [edit, plain, root]
        both = {f"{prefix}rel_types": ["m.thread", "m.replace"]}
        assert shown(**both, **{f"{prefix}not_rel_types": ["m.thread"]}) == [edit]
    assert shown(not_rooms=[room_id]) == []
    assert shown(not_senders=[alice.user_id]) == [reply]
    assert shown(contains_url=True) == []


def thread_ids(client: Client, room_id: str, **query: Any) -> list[str]:
    """The ids of all thread roots of a room, page by page."""
    found: list[str] = []
    while True:
        page = ok(client.get(v1("rooms", room_id, "threads"), **query))
        found += [event["event_id"] for event in page["chunk"]]
        if "next_batch" not in page:
            return found
        query["from"] = page["next_batch"]


def test_threads_come_by_their_newest_reply(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    roots = [alice.send_text(room_id, f"root {n}") for n in range(5)]
    for root in (*roots, roots[1], roots[0]):
        say(bob, room_id, related("m.thread", root))
        say(alice, room_id, related("m.thread", root))
    order = [roots[0], roots[1], *roots[:1:-1]]
    for limit in (1, 2, 3, 10):
        assert thread_ids(bob, room_id, limit=limit) == order
    theirs = bob.send_text(room_id, "of bob's")
    say(bob, room_id, related("m.thread", theirs))
    assert thread_ids(alice, room_id, include="participated", limit=2) == order
    assert thread_ids(alice, room_id) == [theirs, *order]
    path = v1("rooms", room_id, "threads")
    fails(alice.get(path, include="some"), 400, "M_INVALID_PARAM")
    fails(alice.get(path, **{"from": "nonsense"}), 400, "M_INVALID_PARAM")
    stranger = register(alice.server)
    fails(stranger.get(path), 403, "M_FORBIDDEN")


def test_thread_subscriptions_by_hand_and_by_themselves(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    root = alice.send_text(room_id, "root")
    path = subscription(room_id, root)
    fails(bob.get(path), 404, "M_NOT_FOUND")
    ok(bob.delete(path))
    causes = [say(alice, room_id, related("m.thread", root)) for _ in range(2)]
    outside = alice.send_text(room_id, "outside")
    for event_id in (outside, root, "$nothing"):
        answer = bob.put(path, {"automatic": event_id})
        fails(answer, 400, "IO.ELEMENT.MSC4306.M_NOT_IN_THREAD")
    ok(bob.put(path, {"automatic": causes[0]}))
    assert ok(bob.get(path)) == {"automatic": True}
    ok(bob.put(path))
    ok(bob.put(path, {"automatic": causes[1]}))
    assert ok(bob.get(path)) == {"automatic": False}  # by hand goes first
    ok(bob.delete(path))
    answer = bob.put(path, {"automatic": causes[1]})
    fails(answer, 409, "IO.ELEMENT.MSC4306.M_CONFLICTING_UNSUBSCRIPTION")
    ok(bob.put(path, {"automatic": say(alice, room_id, related("m.thread", root))}))
    assert ok(bob.get(path)) == {"automatic": True}
    stranger = register(alice.server)
    for method in ("GET", "PUT", "DELETE"):
        fails(stranger.request(method, path, {}), 404, "M_NOT_FOUND")
    fails(bob.put(path, {"automatic": 1}), 400, "M_BAD_JSON")


def test_a_day_finds_its_event(alice: Client) -> None:
    room_id = alice.create_room()
    events = []
    for n in range(3):
        events.append(alice.send_text(room_id, f"{n}"))
        time.sleep(0.02)
    times = [ok(alice.get(("rooms", room_id, "event", e)))["origin_server_ts"] for e in events]
    path = v1("rooms", room_id, "timestamp_to_event")
    for n in range(3):
        for direction in ("b", "f"):
            found = ok(alice.get(path, ts=times[n], dir=direction))
            assert found == {"event_id": events[n], "origin_server_ts": times[n]}
    assert ok(alice.get(path, ts=times[1] + 1, dir="b"))["event_id"] == events[1]
    assert ok(alice.get(path, ts=times[1] + 1, dir="f"))["event_id"] == events[2]
    fails(alice.get(path, ts=times[2] + 1, dir="f"), 404, "M_NOT_FOUND")
    fails(alice.get(path, ts=1, dir="b"), 404, "M_NOT_FOUND")
    fails(alice.get(path, dir="b"), 400, "M_MISSING_PARAM")
    fails(alice.get(path, ts="x", dir="b"), 400, "M_INVALID_PARAM")
    fails(alice.get(path, ts=1, dir="x"), 400, "M_INVALID_PARAM")


# ═════════════════════════════════════════════════════════════════════════════
#  58. SEARCH
# ═════════════════════════════════════════════════════════════════════════════


def search(client: Client, term: str, token: str | None = None, **wanted: Any) -> Json:
    """The room_events of a search's answer."""
    body = {"search_categories": {"room_events": {"search_term": term, **wanted}}}
    query = {} if token is None else {"next_batch": token}
    found = ok(client.post("search", body, **query))
    return cast("Json", found["search_categories"]["room_events"])


def found_bodies(client: Client, term: str, **wanted: Any) -> list[str]:
    """The texts of the results of a search."""
    results = search(client, term, **wanted)["results"]
    return [result["result"]["content"].get("body") for result in results]


def test_search_finds_words_in_messages_names_and_topics(alice: Client) -> None:
    room_id = alice.create_room(name="Wombat Café", topic="where a Wombat lives")
    alice.send_text(room_id, "a wombat")
    alice.send_text(room_id, "two wombats, and again wombats")
    alice.send_text(room_id, "a kangaroo")
    found = search(alice, "WOMBAT")
    assert (found["count"], found["highlights"]) == (4, ["wombat"])
    ranks = [result["rank"] for result in found["results"]]
    assert ranks == sorted(ranks, reverse=True)
    assert found_bodies(alice, "again wombats") == ["two wombats, and again wombats"]
    assert len(search(alice, "cafe")["results"]) == 1
    for key, count in {"content.body": 2, "content.name": 1, "content.topic": 1}.items():
        assert len(search(alice, "wombat", keys=[key])["results"]) == count
    assert search(alice, "!!!")["results"] == search(alice, "")["results"] == []
    assert found_bodies(alice, 'wombat" OR kangaroo') == []
    recent = found_bodies(alice, "wombat", order_by="recent", keys=["content.body"])
    assert recent == ["two wombats, and again wombats", "a wombat"]


def test_search_refuses_what_it_does_not_know(alice: Client) -> None:
    for wanted in (
        {"order_by": "size"},
        {"keys": ["content.url"]},
        {"filter": {"limit": 0}},
        {"groupings": {"group_by": [{"key": "day"}]}},
    ):
        body = {"search_categories": {"room_events": {"search_term": "x", **wanted}}}
        fails(alice.post("search", body), 400, "M_INVALID_PARAM")
    assert ok(alice.post("search", {"search_categories": {}})) == {"search_categories": {}}
    fails(alice.post("search", {}), 400, "M_MISSING_PARAM")
    body = {"search_categories": {"room_events": {"search_term": "x"}}}
    deep = base64.b64encode(b"[" * 5000).decode()
    for token in ("?", "x", "W10", base64.b64encode(b"[1,2,3,4]").decode(), deep, "MQ"):
        fails(alice.post("search", body, next_batch=token), 400, "M_INVALID_PARAM")


def test_search_pages_groups_context_and_state(alice: Client, bob: Client) -> None:
    rooms = [alice.room_with(bob) for _ in range(2)]
    for n in range(6):
        (alice, bob)[n % 2].send_text(rooms[n % 2], f"numbat {n}")
    wanted: Json = {
        "order_by": "recent",
        "filter": {"limit": 4},
        "groupings": {"group_by": [{"key": "room_id"}, {"key": "sender"}]},
        "event_context": {"before_limit": 1, "after_limit": 1, "include_profile": True},
        "include_state": True,
    }
    page = search(alice, "numbat", **wanted)
    texts = [one["result"]["content"]["body"] for one in page["results"]]
    assert texts == [f"numbat {n}" for n in (5, 4, 3, 2)]
    alice.send_text(rooms[0], "numbat too late")  # pages do not move
    rest = search(alice, "numbat", page["next_batch"], **wanted)
    assert [one["result"]["content"]["body"] for one in rest["results"]] == ["numbat 1", "numbat 0"]
    assert "next_batch" not in rest
    by_room = page["groups"]["room_id"]
    assert {room: len(group["results"]) for room, group in by_room.items()} == {
        rooms[0]: 2,
        rooms[1]: 2,
    }
    group = search(alice, "numbat", by_room[rooms[1]]["next_batch"], **wanted)
    assert [one["result"]["content"]["body"] for one in group["results"]] == ["numbat 1"]
    assert set(page["groups"]["sender"]) == {alice.user_id, bob.user_id}
    context = page["results"][2]["context"]
    assert [e["content"]["body"] for e in context["events_before"]] == ["numbat 1"]
    assert [e["content"]["body"] for e in context["events_after"]] == ["numbat 5"]
    assert set(context["profile_info"]) == {bob.user_id}
    assert {event["type"] for event in page["state"][rooms[0]]} >= {"m.room.create"}
    only = found_bodies(alice, "numbat", filter={"senders": [bob.user_id]}, order_by="recent")
    assert only == [f"numbat {n}" for n in (5, 3, 1)]
    assert found_bodies(alice, "numbat", filter={"rooms": [rooms[1]], "not_rooms": rooms}) == []


def test_edits_change_what_is_found(alice: Client) -> None:
    room_id = alice.create_room()
    event_id = alice.send_text(room_id, "a quoll")
    assert found_bodies(alice, "quoll") == ["a quoll"]
    edit = say(alice, room_id, edit_of(event_id, "a bilby"))
    assert found_bodies(alice, "quoll") == []
    say(alice, room_id, edit_of(edit, "an edit of a bilby edit"))
    found = search(alice, "bilby")["results"]
    assert [one["result"]["event_id"] for one in found] == [event_id]
    alice.redact(room_id, edit)
    assert found_bodies(alice, "quoll") == ["a quoll"]
    assert found_bodies(alice, "bilby") == []


def test_sec_17_redacted_content_is_nowhere(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice = register(server)
    room_id = alice.create_room()
    secret = f"secret{secrets.token_hex(8)}"
    root = alice.send_text(room_id, "root")
    gone = say(alice, room_id, related("m.thread", root, secret))
    assert found_bodies(alice, secret) == [secret]
    stranger = register(server)
    path = ("rooms", room_id, "redact", gone, unique())
    fails(stranger.put(path, {}), 403, "M_FORBIDDEN")
    alice.redact(room_id, gone)
    assert found_bodies(alice, secret) == []
    assert sums(alice, room_id, root) == {}
    assert related_ids(alice, room_id, root) == []
    assert thread_ids(alice, room_id) == []
    server.stop()
    with contextlib.closing(sqlite3.connect(server.database)) as database:
        database.execute("VACUUM")
        dump = "\n".join(database.iterdump())
    assert secret not in dump


def test_encrypted_rooms_have_nothing_to_search(alice: Client) -> None:
    room_id = alice.create_room()
    alice.send_text(room_id, "a potoroo")
    assert found_bodies(alice, "potoroo") == ["a potoroo"]
    alice.set_state(room_id, "m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2"})
    alice.send_text(room_id, "a second potoroo")
    assert found_bodies(alice, "potoroo") == []


def test_search_survives_a_kill_and_does_without_its_index(
    new_server: Callable[..., Server],
) -> None:
    server = new_server()
    alice = register(server)
    room_id = alice.create_room()
    alice.send_text(room_id, "one bandicoot")
    assert found_bodies(alice, "bandicoot") == ["one bandicoot"]
    alice.send_text(room_id, "two bandicoots bandicoots")
    server.kill9()
    server.start()
    both = ["two bandicoots bandicoots", "one bandicoot"]
    assert found_bodies(alice, "bandicoot") == both
    server.stop()
    server.check()
    with contextlib.closing(sqlite3.connect(server.database)) as database:
        database.execute("DELETE FROM meta WHERE key = 'search_indexed'")  # as without FTS5
        database.execute("DROP TABLE search_index")
        database.commit()
    server.start()
    assert found_bodies(alice, "bandicoot") == both


def test_the_fallback_reads_the_texts_one_by_one() -> None:
    rows = ((3, "content.body", "Ein Beuteldachs"), (2, "content.body", "two, BEUTELDACHSE"))
    params = {"rooms": "[1]", "keys": '["content.body"]', "upto": 9}
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE search_texts (nid, room_nid, pos, key, text)")
        for nid, key, text in (*rows, (1, "content.name", "beuteldachs")):
            row = (nid, 1, nid, key, text)
            database.execute("INSERT INTO search_texts VALUES (?, ?, ?, ?, ?)", row)
        for words, nids in ((["beuteldachs"], [3, 2]), (["ein", "beuteldachs"], [3]), (["x"], [])):
            hits = conduit.find_hits(database, words, conduit.TEXTS, params)
            assert [nid for nid, _ in hits] == nids


def test_topics_have_a_plain_text() -> None:
    rich = {"m.text": [{"mimetype": "text/html", "body": "<b>x</b>"}, {"body": "x"}]}
    assert conduit.plain_topic({"topic": "old", "m.topic": rich}) == "x"
    for odd in ({}, {"m.text": 1}, {"m.text": [1, {"body": 2}]}, 3):
        assert conduit.plain_topic({"topic": "old", "m.topic": odd}) in ("old", None)


# ── 58.3  History visibility at these doors ──────────────────────────────────


@pytest.mark.parametrize("visibility", ["world_readable", "shared", "invited", "joined"])
def test_sec_19_history_visibility_at_the_doors_of_relations(
    server: Server, visibility: str
) -> None:
    owner, late, left, never = (register(server) for _ in range(4))
    setting = {"type": "m.room.history_visibility", "content": {"history_visibility": visibility}}
    room_id = owner.create_room(preset="public_chat", initial_state=[setting])
    left.join(room_id)
    word = f"thylacine{secrets.token_hex(4)}"
    root = owner.send_text(room_id, f"{word} root")
    before = say(owner, room_id, related("m.thread", root, f"{word} before"))
    left.leave(room_id)
    hidden = say(owner, room_id, related("m.thread", root, f"{word} hidden"))
    day = ok(owner.get(("rooms", room_id, "event", hidden)))["origin_server_ts"]
    late.join(room_id)
    after = say(owner, room_id, related("m.thread", root, f"{word} after"))
    open_to = {"world_readable": "all", "shared": "late"}.get(visibility, "")
    expected = {
        owner: [after, hidden, before],
        late: [after, hidden, before] if open_to else [after],
        left: [after, hidden, before] if open_to == "all" else [before],
        never: [after, hidden, before] if open_to == "all" else [],
    }
    for client, seen in expected.items():
        sees_root = before in seen
        path = v1("rooms", room_id, "relations", root)
        answer = client.get(path)
        if sees_root:
            assert [event["event_id"] for event in ok(answer)["chunk"]] == seen
            thread = sums(client, room_id, root)["m.thread"]
            assert thread["latest_event"]["event_id"] == seen[0]
            assert thread["count"] == len(seen)
            assert thread_ids(client, room_id) == [root]
            ok(client.put(subscription(room_id, root)))
        else:
            fails(answer, 404, "M_NOT_FOUND")
            fails(client.put(subscription(room_id, root)), 404, "M_NOT_FOUND")
            fails(client.get(("rooms", room_id, "event", root)), 404)
        found = {one["result"]["event_id"] for one in search(client, word)["results"]}
        assert found == ({root, *seen} if sees_root else set(seen)) - (
            {root, *seen} if client is never else set()
        )
        near = client.get(v1("rooms", room_id, "timestamp_to_event"), ts=day, dir="f")
        if hidden not in seen:
            assert near.status_code != 200 or near.json()["event_id"] != hidden


def test_sec_45_a_long_hidden_past_does_not_end_the_way(new_server: Callable[..., Server]) -> None:
    server = new_server()
    owner, reader = register(server), register(server)
    setting = {"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}
    room_id = owner.create_room(preset="public_chat", initial_state=[setting])
    root = owner.send_text(room_id, "root")
    reader.join(room_id)
    first = say(owner, room_id, related("m.thread", root, "seen dunnart"))
    reader.leave(room_id)
    for n in range(150):
        say(owner, room_id, related("m.thread", root, f"hidden dunnart {n}"))
    reader.join(room_id)
    last = say(owner, room_id, related("m.thread", root, "last dunnart"))
    path = v1("rooms", room_id, "timestamp_to_event")
    start = ok(owner.get(path, ts=1, dir="f"))
    assert ok(reader.get(path, ts=start["origin_server_ts"], dir="f"))["event_id"] != root
    found = set(found_bodies(reader, "dunnart"))
    assert found == {"seen dunnart", "last dunnart"}
    visible = reader.send_text(room_id, "root of the reader's")
    say(owner, room_id, related("m.thread", visible))
    assert thread_ids(reader, room_id, limit=1) == [visible]
    assert {first, last} <= {event["event_id"] for event in reader.messages(room_id)["chunk"]}


# ═════════════════════════════════════════════════════════════════════════════
#  59. SPACES, SUMMARIES, REPORTS
# ═════════════════════════════════════════════════════════════════════════════


def space(client: Client, **fields: Any) -> str:
    """A new space."""
    return client.create_room(creation_content={"type": "m.space"}, **fields)


def add_child(client: Client, parent: str, child: str, **content: Any) -> None:
    """Put a room into a space."""
    via = {"via": [client.server.name], **content}
    client.set_state(parent, "m.space.child", via, child)


def hierarchy(client: Client, space_id: str, **query: Any) -> list[Json]:
    """All rooms of a hierarchy, page by page."""
    rooms: list[Json] = []
    while True:
        page = ok(client.get(v1("rooms", space_id, "hierarchy"), **query))
        rooms += page["rooms"]
        if "next_batch" not in page:
            return rooms
        query["from"] = page["next_batch"]


def hierarchy_ids(client: Client, space_id: str, **query: Any) -> list[str]:
    """The ids of the rooms of a hierarchy."""
    return [room["room_id"] for room in hierarchy(client, space_id, **query)]


def test_a_hierarchy_is_walked_in_order(alice: Client) -> None:
    top, inner = space(alice), space(alice)
    rooms = [alice.create_room(preset="public_chat") for _ in range(4)]
    add_child(alice, top, rooms[0])
    add_child(alice, top, rooms[1], order="b", suggested=True)
    add_child(alice, top, inner, order="a")
    add_child(alice, top, rooms[3], order="\t")  # not valid: as if there were none
    add_child(alice, inner, rooms[2], suggested=True)
    alice.set_state(top, "m.space.child", {}, alice.create_room())  # taken out again
    whole = [top, inner, rooms[2], rooms[1], rooms[0], rooms[3]]
    for limit in (1, 2, 100):
        assert hierarchy_ids(alice, top, limit=limit) == whole
    assert hierarchy_ids(alice, top, max_depth=0) == [top]
    assert hierarchy_ids(alice, top, max_depth=1) == [top, inner, rooms[1], rooms[0], rooms[3]]
    assert hierarchy_ids(alice, top, suggested_only="true") == [top, rooms[1]]
    first = hierarchy(alice, top)[0]
    assert first["room_type"] == "m.space"
    children = [child["state_key"] for child in first["children_state"]]
    assert children == [inner, rooms[1], rooms[0], rooms[3]]
    path = v1("rooms", top, "hierarchy")
    token = ok(alice.get(path, limit=1))["next_batch"]
    again = {"limit": 2, "from": token}
    assert ok(alice.get(path, **again))["rooms"] == ok(alice.get(path, **again))["rooms"]
    fails(alice.get(path, max_depth=1, **again), 400, "M_INVALID_PARAM")
    fails(alice.get(path, **{"from": "nonsense"}), 400, "M_INVALID_PARAM")
    fails(alice.get(path, limit=0), 400, "M_INVALID_PARAM")
    fails(register(alice.server).get(path, **again), 400, "M_INVALID_PARAM")


def test_children_are_ordered_as_in_the_specification() -> None:
    """The example of "Ordering of children within a space"."""
    rows = [
        ("!d", 1640741000000, None),
        ("!a", 1640141000000, "aaaa"),
        ("!e", 1640641000000, None),
        ("!c", 1640841000000, "first"),
        ("!b", 1640341000000, " "),
    ]
    events = [
        types.SimpleNamespace(
            content={} if order is None else {"order": order}, origin_server_ts=ts, state_key=key
        )
        for key, ts, order in rows
    ]
    ranked = sorted(cast(Any, events), key=conduit.child_rank)
    assert [event.state_key for event in ranked] == ["!b", "!a", "!c", "!e", "!d"]


def test_sec_47_spaces_in_a_circle_end(alice: Client) -> None:
    one, two = space(alice), space(alice)
    add_child(alice, one, two)
    add_child(alice, two, one)
    add_child(alice, one, one)
    assert hierarchy_ids(alice, one) == [one, two]
    below = space(alice)
    deep = [below]
    for _ in range(55):
        deep.append(space(alice))
        add_child(alice, deep[-2], deep[-1])
    assert hierarchy_ids(alice, below, max_depth=10_000) == deep[:51]


def test_sec_22_a_hierarchy_shows_only_what_one_may_know(alice: Client, bob: Client) -> None:
    top = space(alice, preset="public_chat")
    public = alice.create_room(preset="public_chat")
    private = alice.create_room(name="private name")
    invited = alice.create_room(bob)
    knock = alice.create_room(
        initial_state=[{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}]
    )
    condition = {"type": "m.room_membership", "room_id": top}
    rule = {"join_rule": "restricted", "allow": [condition]}
    restricted = alice.create_room(initial_state=[{"type": "m.room.join_rules", "content": rule}])
    readable = {"history_visibility": "world_readable"}
    world = alice.create_room(
        initial_state=[{"type": "m.room.history_visibility", "content": readable}]
    )
    banned = alice.create_room(preset="public_chat")
    ok(alice.post(("rooms", banned, "ban"), {"user_id": bob.user_id}))
    every = [public, private, invited, knock, restricted, world, banned, "!nowhere:test.example"]
    for room_id in every:
        add_child(alice, top, room_id)
    assert hierarchy_ids(alice, top) == [top, *every[:-1]]
    assert hierarchy_ids(bob, top) == [top, public, invited, knock, world]
    fails(bob.get(v1("room_summary", restricted)), 404, "M_NOT_FOUND")
    bob.join(top)
    rooms = hierarchy(bob, top)
    assert [room["room_id"] for room in rooms] == [top, public, invited, knock, restricted, world]
    assert rooms[4]["allowed_room_ids"] == [top]
    assert "private name" not in json.dumps(rooms)
    for room_id in (private, banned, "!nowhere:test.example"):
        fails(bob.get(v1("room_summary", room_id)), 404, "M_NOT_FOUND")
        fails(bob.get(v1("rooms", room_id, "hierarchy")), 403, "M_FORBIDDEN")
    anyone = Client(alice.server)
    for room_id in (private, invited, restricted):
        fails(anyone.get(v1("room_summary", room_id)), 404, "M_NOT_FOUND")
    for room_id in (public, knock, world):
        assert ok(anyone.get(v1("room_summary", room_id)))["room_id"] == room_id


def test_a_room_in_short(alice: Client, bob: Client) -> None:
    alias = unique("short")
    cipher = {"algorithm": "m.megolm.v1.aes-sha2"}
    room_id = alice.room_with(
        bob,
        name="Short",
        topic="plain",
        preset="public_chat",
        room_alias_name=alias,
        initial_state=[{"type": "m.room.encryption", "content": cipher}],
    )
    full = f"#{alias}:test.example"
    for path in (
        v1("room_summary", full),
        v1("room_summary", room_id),
        f"/_matrix/client/unstable/im.nheko.summary/summary/{quote(room_id, safe='')}",
        f"/_matrix/client/unstable/im.nheko.summary/rooms/{quote(room_id, safe='')}/summary",
    ):
        found = ok(bob.get(path))
        wanted = {
            "room_id": room_id,
            "name": "Short",
            "topic": "plain",
            "canonical_alias": full,
            "num_joined_members": 2,
            "membership": "join",
            "encryption": cipher["algorithm"],
            "room_version": "12",
            "join_rule": "public",
        }
        assert found | wanted == found
    assert "membership" not in ok(Client(alice.server).get(v1("room_summary", room_id)))
    assert ok(register(alice.server).get(v1("room_summary", room_id)))["membership"] == "leave"
    fails(bob.get(v1("room_summary", "nonsense")), 400, "M_INVALID_PARAM")


def test_mutual_rooms(alice: Client, bob: Client) -> None:
    rooms = [alice.room_with(bob) for _ in range(3)]
    alice.create_room(bob)
    bob.leave(rooms[0])
    answer = ok(alice.get(v1("mutual_rooms"), user_id=bob.user_id))
    assert answer == {"joined": rooms[1:], "count": 2}
    old = "/_matrix/client/unstable/uk.half-shot.msc2666/user/mutual_rooms"
    assert ok(alice.get(old, user_id=bob.user_id)) == answer
    nobody = ok(alice.get(v1("mutual_rooms"), user_id="@nobody:elsewhere.example"))
    assert nobody == {"joined": [], "count": 0}
    for wrong in (alice.user_id, "bob", "@Bob!:test.example"):
        fails(alice.get(v1("mutual_rooms"), user_id=wrong), 400, "M_INVALID_PARAM")
    fails(alice.get(v1("mutual_rooms")), 400, "M_MISSING_PARAM")
    token = {"from": "nonsense"}
    fails(alice.get(v1("mutual_rooms"), user_id=bob.user_id, **token), 400, "M_INVALID_PARAM")


def test_reports_reach_the_admins(new_server: Callable[..., Server]) -> None:
    server = new_server()
    admin, alice, bob = (register(server) for _ in range(3))
    room_id = alice.room_with(bob)
    bad = bob.send_text(room_id, "bad")
    ignore(alice, bob)
    ok(alice.post(("rooms", room_id, "report", bad), {"reason": "<b>rude</b>"}))
    ok(alice.post(("rooms", room_id, "report"), {"reason": ""}))
    ok(alice.post(("users", bob.user_id, "report"), {"reason": "x" * 5000}))

    def told(result: Json) -> bool:
        events = json.dumps(result)
        return all(text in events for text in (bad, "rude", f"the user {bob.user_id}", "x" * 1000))

    assert admin.wait_for(lambda _: told(admin.sync()))
    fails(alice.post(("rooms", room_id, "report")), 400, "M_MISSING_PARAM")
    fails(alice.post(("users", bob.user_id, "report")), 400, "M_MISSING_PARAM")
    fails(alice.post(("users", "bob", "report"), {"reason": ""}), 400, "M_INVALID_PARAM")


def test_sec_23_reports_do_not_tell_what_exists(alice: Client, bob: Client) -> None:
    room_id = alice.create_room()
    event_id = alice.send_text(room_id, "x")
    for room in (room_id, "!nowhere:test.example"):
        assert ok(bob.post(("rooms", room, "report"), {"reason": ""})) == {}
        answer = bob.post(("rooms", room, "report", event_id), {})
        body = fails(answer, 404, "M_NOT_FOUND")
        assert room not in body["error"]
    for user_id in (alice.user_id, "@nobody:test.example", "@nobody:elsewhere.example"):
        assert ok(bob.post(("users", user_id, "report"), {"reason": ""})) == {}
    fails(alice.post(("rooms", room_id, "report", "$nothing"), {}), 404, "M_NOT_FOUND")
    alice.redact(room_id, event_id)
    fails(alice.post(("rooms", room_id, "report", event_id), {}), 404, "M_NOT_FOUND")


# ═════════════════════════════════════════════════════════════════════════════
#  19. RECEIPTS, TYPING, PRESENCE
# ═════════════════════════════════════════════════════════════════════════════


def ephemeral(result: Json, room_id: str, event_type: str) -> Json | None:
    """The content of an ephemeral event of a room in a sync result."""
    room = result.get("rooms", {}).get("join", {}).get(room_id, {})
    events = room.get("ephemeral", {}).get("events", [])
    found = [event["content"] for event in events if event["type"] == event_type]
    assert len(found) <= 1
    return found[0] if found else None


# ── 19.1  Receipts ───────────────────────────────────────────────────────────


def test_receipt_reaches_the_others_once(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    event = alice.send_text(room, "x")
    alice.poll()
    receipt(bob, room, event)
    content = ephemeral(alice.poll(), room, "m.receipt")
    assert content is not None
    reader = content[event]["m.read"][bob.user_id]
    assert abs(reader["ts"] - time.time() * 1000) < 60_000
    assert "thread_id" not in reader
    assert ephemeral(alice.poll(), room, "m.receipt") is None
    receipt(bob, room, event)
    assert ephemeral(alice.poll(), room, "m.receipt") is None
    assert ephemeral(alice.sync(), room, "m.receipt") == content


def test_private_receipts_are_for_their_owner(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    event = alice.send_text(room, "x")
    alice.poll()
    bob.poll()
    receipt(bob, room, event, kind="m.read.private")
    assert "rooms" not in alice.poll()
    assert "m.read.private" not in json.dumps(alice.sync())
    content = ephemeral(bob.poll(), room, "m.receipt")
    assert content is not None
    assert list(content[event]) == ["m.read.private"]
    assert list(content[event]["m.read.private"]) == [bob.user_id]


def test_receipts_do_not_go_back(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    first, second = alice.send_text(room, "1"), alice.send_text(room, "2")
    receipt(bob, room, second)
    alice.poll()
    receipt(bob, room, first)
    assert "rooms" not in alice.poll()
    receipt(bob, room, first, "main")  # another thread: another receipt
    content = ephemeral(alice.poll(), room, "m.receipt")
    assert content is not None
    assert content[first]["m.read"][bob.user_id]["thread_id"] == "main"


def test_each_type_and_thread_has_one_receipt(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    root = alice.send_text(room, "root")
    reply = in_thread(alice, room, root)
    last = alice.send_text(room, "last")
    receipt(bob, room, last)
    receipt(bob, room, root, "main")
    receipt(bob, room, reply, root)
    content = ephemeral(alice.sync(), room, "m.receipt")
    assert content is not None
    threads = {
        event: users["m.read"][bob.user_id].get("thread_id") for event, users in content.items()
    }
    assert threads == {last: None, root: "main", reply: root}
    receipt(bob, room, last, "main")  # two at one event: the unthreaded one says more
    content = ephemeral(alice.sync(), room, "m.receipt")
    assert content is not None
    assert "thread_id" not in content[last]["m.read"][bob.user_id]


def test_receipt_threads_are_checked(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    root = alice.send_text(room, "root")
    reply = in_thread(alice, room, root)
    other = alice.send_text(room, "other")
    path = ("rooms", room, "receipt", "m.read")
    for event, thread in (
        (reply, "main"),
        (other, root),
        (other, ""),
        (other, 1),
        (other, None),
        (other, "$unknown"),
    ):
        fails(bob.post((*path, event), {"thread_id": thread}), 400, "M_INVALID_PARAM")
    receipt(bob, room, root, "main")
    receipt(bob, room, root, root)
    relation = {"rel_type": "m.annotation", "event_id": reply, "key": "+1"}
    reaction = alice.send(room, "m.reaction", {"m.relates_to": relation})
    receipt(bob, room, reaction, root)


def test_receipts_that_are_refused(alice: Client, bob: Client) -> None:
    room, elsewhere = alice.room_with(bob), alice.create_room()
    event, foreign = alice.send_text(room, "x"), alice.send_text(elsewhere, "y")

    def post(kind: str, event_id: str, body: Json | None = None) -> httpx.Response:
        return bob.post(("rooms", room, "receipt", kind, event_id), body)

    fails(post("m.nonsense", event), 400, "M_INVALID_PARAM")
    fails(post("m.read", "$unknown"), 400, "M_INVALID_PARAM")
    fails(post("m.read", foreign), 400, "M_INVALID_PARAM")
    fails(post("m.fully_read", event, {"thread_id": "main"}), 400, "M_INVALID_PARAM")
    fails(bob.post(("rooms", elsewhere, "receipt", "m.read", foreign)), 403, "M_FORBIDDEN")
    fails(bob.post(("rooms", "!nowhere:test.example", "receipt", "m.read", event)), 403)
    ok(bob.request("POST", ("rooms", room, "receipt", "m.read", event)))  # as old clients: no body


def test_receipts_survive_a_restart(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice, bob = register(server), register(server)
    room = alice.room_with(bob)
    event = alice.send_text(room, "x")
    alice.poll()
    receipt(bob, room, event)
    receipt(alice, room, event, kind="m.read.private")
    server.kill9()
    server.start()
    content = ephemeral(alice.poll(), room, "m.receipt")
    assert content is not None
    assert set(content[event]) == {"m.read", "m.read.private"}
    server.stop()
    server.check()


# ── 19.2  Read markers ───────────────────────────────────────────────────────


def fully_read(client: Client, room_id: str) -> str | None:
    """Where the marker of what is fully read stands."""
    response = client.get(
        ("user", client.user_id, "rooms", room_id, "account_data", "m.fully_read")
    )
    return None if response.status_code == 404 else str(ok(response)["event_id"])


def test_read_markers(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    first, second, third = (alice.send_text(room, text) for text in "abc")
    bob.poll()
    body = {"m.fully_read": first, "m.read": second, "m.read.private": third}
    ok(bob.post(("rooms", room, "read_markers"), body))
    result = bob.poll()
    section = result["rooms"]["join"][room]
    assert section["account_data"]["events"] == [
        {"type": "m.fully_read", "content": {"event_id": first}}
    ]
    content = ephemeral(result, room, "m.receipt")
    assert content is not None
    assert {event: list(kinds) for event, kinds in content.items()} == {
        second: ["m.read"],
        third: ["m.read.private"],
    }
    assert section["unread_notifications"]["notification_count"] == 0
    assert fully_read(alice, room) is None


def test_fully_read_moves_forward_only(alice: Client) -> None:
    room = alice.create_room()
    first, second = alice.send_text(room, "1"), alice.send_text(room, "2")
    ok(alice.post(("rooms", room, "receipt", "m.fully_read", second)))
    assert fully_read(alice, room) == second
    ok(alice.post(("rooms", room, "read_markers"), {"m.fully_read": first}))
    assert fully_read(alice, room) == second
    ok(alice.post(("rooms", room, "read_markers"), {}))
    fails(alice.post(("rooms", room, "read_markers"), {"m.fully_read": "$unknown"}), 400)
    fails(alice.post(("rooms", room, "read_markers"), {"m.read": 1}), 400, "M_BAD_JSON")


# ── 19.3  Typing ─────────────────────────────────────────────────────────────


def set_typing(client: Client, room_id: str, is_typing: bool = True, **body: Any) -> httpx.Response:
    """Say that the client types."""
    path = ("rooms", room_id, "typing", client.user_id)
    return client.put(path, {"typing": is_typing, **body})


def test_typing_begins_and_ends(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    alice.poll()
    ok(set_typing(bob, room, timeout=20_000))
    assert ephemeral(alice.poll(), room, "m.typing") == {"user_ids": [bob.user_id]}
    ok(set_typing(bob, room, timeout=20_000))
    assert ephemeral(alice.poll(), room, "m.typing") is None
    assert ephemeral(alice.sync(), room, "m.typing") == {"user_ids": [bob.user_id]}
    ok(set_typing(bob, room, is_typing=False))
    assert ephemeral(alice.poll(), room, "m.typing") == {"user_ids": []}


def test_typing_runs_out(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    ok(set_typing(alice, room, timeout=30_000))
    alice.poll()
    ok(set_typing(bob, room, timeout=300))
    both = {"user_ids": [alice.user_id, bob.user_id]}
    assert ephemeral(alice.poll(), room, "m.typing") == both
    began = time.monotonic()
    result = alice.poll(timeout=10_000)
    assert ephemeral(result, room, "m.typing") == {"user_ids": [alice.user_id]}
    assert time.monotonic() - began < 3


def test_typing_ends_with_the_departure(alice: Client, bob: Client) -> None:
    room = alice.room_with(bob)
    ok(set_typing(bob, room))
    alice.poll()
    bob.leave(room)
    assert ephemeral(alice.poll(), room, "m.typing") == {"user_ids": []}


def test_typing_survives_refused_writes(alice: Client, bob: Client) -> None:
    """A write that is rolled back empties caches; who is typing is no cache."""
    room = alice.room_with(bob)
    ok(set_typing(bob, room))
    fails(bob.put(("rooms", room, "state", "m.room.topic", ""), {"topic": "x"}), 403)
    assert ephemeral(alice.sync(), room, "m.typing") == {"user_ids": [bob.user_id]}


def test_typing_that_is_refused(alice: Client, bob: Client) -> None:
    room = alice.create_room()
    fails(set_typing(bob, room), 403, "M_FORBIDDEN")
    fails(alice.put(("rooms", room, "typing", bob.user_id), {"typing": True}), 403, "M_FORBIDDEN")
    fails(alice.put(("rooms", room, "typing", alice.user_id), {}), 400, "M_MISSING_PARAM")
    fails(set_typing(alice, room, timeout="long"), 400, "M_BAD_JSON")
    ok(set_typing(alice, room, timeout=-5))
    ok(set_typing(alice, room, timeout=2**60))


# ── 19.4  Presence ───────────────────────────────────────────────────────────


class PresenceStage:
    """Presence on a clock of our own, without a server."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.position = 100
        self.stamps: list[int] = []
        nothing = types.SimpleNamespace(
            subscribe=lambda callback: None,
            subscribe_membership=lambda callback: None,
            on_deactivated=lambda callback: None,
        )
        rows: list[Any] = []
        database = types.SimpleNamespace(
            all=lambda sql: rows,
            write=contextlib.nullcontext,
            execute=lambda sql, values: rows.append(values),
        )
        self.saved = rows
        self.hs: Any = types.SimpleNamespace(
            config=types.SimpleNamespace(allow_local_presence=True),
            rooms=nothing,
            accounts=nothing,
            db=database,
            stream=types.SimpleNamespace(stamp=self.stamp),
        )
        self.presence: Any = None

    def stamp(self, kind: str, target: int) -> int:
        """Count what the others were told."""
        assert kind == conduit.PRESENCE
        self.stamps.append(target)
        self.position += 1
        return self.position

    def at(self, seconds: float) -> None:
        """Let time pass, with the sweeps that belong to it."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + conduit.PRESENCE_SWEEP_SECONDS)
            self.presence.sweep()

    def state(self, nid: int = 1) -> str:
        """What the others see."""
        return str(self.presence.of(nid)["presence"])


def on_stage(play: Callable[[PresenceStage], None], saved: Sequence[Any] = ()) -> None:
    """Run something on a loop with Presence on a stage."""

    async def run() -> None:
        stage = PresenceStage()
        stage.saved.extend(saved)
        stage.presence = conduit.Presence(stage.hs, lambda: stage.now)
        stage.saved.clear()
        play(stage)
        if stage.presence._timer is not None:
            stage.presence._timer.cancel()

    asyncio.run(run())


def device(nid: int = 1, device_nid: int | None = 10) -> Any:
    """A requester."""
    return types.SimpleNamespace(nid=nid, device_nid=device_nid)


def test_presence_goes_idle_and_offline() -> None:
    def play(stage: PresenceStage) -> None:
        stage.presence.note_sync(device(), "online", 30)
        assert stage.presence.of(1) == {
            "presence": "online",
            "currently_active": True,
            "last_active_ago": 0,
        }
        for _ in range(13):
            stage.at(25)
            stage.presence.note_sync(device(), "online", 30)
        assert stage.state() == "unavailable"
        assert stage.presence.of(1)["last_active_ago"] == 325_000
        stage.presence.touch(1)
        assert stage.state() == "online"
        stage.at(80)
        assert stage.state() == "offline"
        assert stage.presence._present == set()

    on_stage(play)


def test_presence_does_not_flood() -> None:
    def play(stage: PresenceStage) -> None:
        stage.presence.note_sync(device(), "online", 30)
        for _ in range(600):  # ten minutes of lively chatting
            stage.now += 1
            stage.presence.touch(1)
            stage.presence.note_sync(device(), "online", 30)
            stage.presence.sweep()
        assert len(stage.stamps) == 1
        for _ in range(60):  # an hour with a word every minute
            stage.at(25)
            stage.presence.note_sync(device(), "online", 30)
            stage.at(36)
            stage.presence.note_sync(device(), "online", 30)
            stage.presence.touch(1)
        assert len(stage.stamps) <= 1 + 2 * 61

    on_stage(play)


def test_presence_of_several_devices_is_the_best_of_them() -> None:
    def play(stage: PresenceStage) -> None:
        stage.presence.note_sync(device(device_nid=10), "unavailable", 30)
        assert stage.state() == "unavailable"
        stage.presence.note_sync(device(device_nid=11), "online", 30)
        assert stage.state() == "online"
        stage.presence.note_sync(device(device_nid=12), "offline", 30)
        for _ in range(3):
            stage.at(25)
            stage.presence.note_sync(device(device_nid=10), "unavailable", 30)
        assert stage.state() == "unavailable"

    on_stage(play)


def test_presence_set_by_hand_outlives_syncs_that_say_nothing_new() -> None:
    def play(stage: PresenceStage) -> None:
        stage.presence.note_sync(device(), "online", 30)
        stage.presence.put(device(), "unavailable", "at lunch")
        stage.at(20)
        stage.presence.note_sync(device(), "online", 30)
        assert stage.state() == "unavailable"
        assert stage.presence.of(1)["status_msg"] == "at lunch"
        stage.presence.touch(1)
        assert stage.state() == "online"
        stage.presence.put(device(), "offline", None)
        stage.presence.touch(1)
        stage.presence.note_sync(device(), "online", 30)
        assert stage.state() == "offline"
        assert "status_msg" not in stage.presence.of(1)

    on_stage(play)


def test_offline_syncs_have_no_effect_and_the_switch_works() -> None:
    def play(stage: PresenceStage) -> None:
        stage.presence.note_sync(device(), "offline", 30)
        stage.presence.touch(1)
        stage.hs.config.allow_local_presence = False
        stage.presence.note_sync(device(), "online", 30)
        stage.presence.put(device(), "online", None)
        assert stage.state() == "offline"
        assert not stage.stamps
        assert not stage.presence._users

    on_stage(play)


def test_presence_after_a_restart() -> None:
    def play(stage: PresenceStage) -> None:
        assert stage.state(1) == "online"
        assert stage.presence.of(2) == {"presence": "offline", "status_msg": "gone fishing"}
        stage.presence.note_sync(device(nid=3), "online", 3600)
        stage.at(50)
        assert stage.state(1) == "online"
        stage.at(20)
        assert stage.state(1) == "offline"
        assert (1, "offline", None) in stage.saved
        assert 1 in stage.stamps
        assert 2 not in stage.stamps

    on_stage(play, [(1, "online", None), (2, "offline", "gone fishing")])


def presence_of(result: Json, client: Client) -> Json | None:
    """The content of a user's m.presence in a sync result."""
    events = result.get("presence", {}).get("events", [])
    found = [event["content"] for event in events if event["sender"] == client.user_id]
    return found[-1] if found else None


def test_presence_is_set_and_seen(alice: Client, bob: Client) -> None:
    alice.room_with(bob)
    alice.poll()
    path = ("presence", bob.user_id, "status")
    ok(bob.put(path, {"presence": "unavailable", "status_msg": "in a meeting"}))
    seen = alice.wait_for(lambda result: presence_of(result, bob))
    assert (seen["presence"], seen["status_msg"]) == ("unavailable", "in a meeting")
    assert presence_of(alice.poll(), bob) is None
    told = ok(alice.get(path))
    assert (told["presence"], told["status_msg"]) == ("unavailable", "in a meeting")
    ok(bob.put(path, {"presence": "online", "status_msg": None}))
    seen = alice.wait_for(lambda result: presence_of(result, bob))
    assert seen["currently_active"] is True
    assert "status_msg" not in seen
    assert ok(bob.get(path))["presence"] == "online"


def test_presence_is_for_those_who_share_a_room(alice: Client, bob: Client) -> None:
    bob.poll(set_presence="online")
    alice.poll()
    fails(alice.get(("presence", bob.user_id, "status")), 403, "M_FORBIDDEN")
    fails(alice.get(("presence", "@nobody:test.example", "status")), 403, "M_FORBIDDEN")
    ok(bob.put(("presence", bob.user_id, "status"), {"presence": "unavailable"}))
    assert presence_of(alice.poll(), bob) is None
    assert presence_of(alice.sync(), bob) is None


def test_presence_comes_with_a_new_common_room(alice: Client, bob: Client) -> None:
    alice.poll()
    bob.poll()
    room = alice.create_room(bob)
    bob.poll()
    alice.poll()
    bob.join(room)
    assert presence_of(bob.poll(), alice) is not None
    assert presence_of(alice.poll(), bob) is not None
    assert presence_of(bob.poll(), alice) is None


def test_presence_that_is_refused(alice: Client, bob: Client) -> None:
    path = ("presence", alice.user_id, "status")
    fails(bob.put(path, {"presence": "online"}), 403, "M_FORBIDDEN")
    fails(alice.put(path, {"presence": "asleep"}), 400, "M_INVALID_PARAM")
    fails(alice.put(path, {}), 400, "M_MISSING_PARAM")
    fails(alice.put(path, {"presence": "online", "status_msg": 1}), 400, "M_BAD_JSON")
    fails(alice.put(path, {"presence": "online", "status_msg": "x" * 2000}), 400)
    fails(alice.get("sync", params={"set_presence": "asleep"}), 400, "M_INVALID_PARAM")


def test_presence_can_be_switched_off(new_server: Callable[..., Server]) -> None:
    server = new_server(allow_local_presence=False)
    alice, bob = register(server), register(server)
    alice.room_with(bob)
    path = ("presence", bob.user_id, "status")
    ok(bob.put(path, {"presence": "online", "status_msg": "here"}))
    assert ok(alice.get(path)) == {"presence": "offline"}
    assert "presence" not in alice.sync()


def test_status_message_survives_a_restart(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice = register(server)
    path = ("presence", alice.user_id, "status")
    ok(alice.put(path, {"presence": "online", "status_msg": "gone fishing"}))
    server.kill9()
    server.start()
    assert ok(alice.get(path))["status_msg"] == "gone fishing"


def test_who_is_busy_stays_so_while_syncing(alice: Client) -> None:
    path, busy = ("presence", alice.user_id, "status"), "org.matrix.msc3026.busy"
    alice.checked = False  # a state that the specification does not have
    ok(alice.put(path, {"presence": busy}))
    alice.sync(set_presence="online")
    assert ok(alice.get(path))["presence"] == busy
    alice.login().sync(set_presence="unavailable")
    assert ok(alice.get(path))["presence"] == busy
    ok(alice.put(path, {"presence": "online"}))
    assert ok(alice.get(path))["presence"] == "online"


# ═════════════════════════════════════════════════════════════════════════════
#  49. PUSHERS
# ═════════════════════════════════════════════════════════════════════════════

GATEWAY: Final = "https://push.example/_matrix/push/v1/notify"


class Outcome(SimpleNamespace):
    """What the outside world answers."""

    status: int = 200
    headers: Mapping[str, str]
    body: bytes


class World:
    """The way out of a server under test: each request is answered by a function."""

    def __init__(self, answer: Callable[[str, Json | None], Any]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, str, Json | None]] = []

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Any,
        body: bytes = b"",
        timeout: float,
        max_bytes: int,
    ) -> Outcome:
        assert timeout > 0 < max_bytes
        sent = json.loads(body) if body else None
        self.requests.append((method, url, sent))
        await asyncio.sleep(0.001)
        found = self.answer(url, sent)
        if isinstance(found, Exception):
            raise found
        if isinstance(found, Outcome):
            return found
        return Outcome(status=200, headers={}, body=json.dumps(found).encode())

    @property
    def pushes(self) -> list[Json]:
        """The notifications that gateways were sent."""
        return [sent["notification"] for _, _, sent in self.requests if sent]


class InnerServer(Server):
    """A server in this process, whose way out is a World."""

    def __init__(self, folder: Path, world: World, **config: Any) -> None:
        super().__init__(folder, **config)
        self.world = world

    def start(self, timeout: float = 60) -> InnerServer:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.call(self._start())
        return self

    async def _start(self) -> None:
        environ = {"CONDUIT_CONFIG": str(self.config_path)}
        self.hs = conduit.Homeserver(conduit.load_config(environ)[0])
        self.hs.http_client = self.world
        await self.hs.start()

    def call(self, coroutine: Any) -> Any:
        """Run something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call something on the server's loop."""

        async def call() -> Any:
            return function(*args, **kwargs)

        return self.call(call())

    def stop(self, timeout: float = 15) -> int:
        if self.thread.is_alive():
            self.call(self.hs.stop())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()
        return 0


@pytest.fixture
def inner(tmp_path: Path) -> Iterator[Callable[..., InnerServer]]:
    """A factory of servers in this process."""
    started: list[InnerServer] = []

    def make(answer: Callable[[str, Json | None], Any], **config: Any) -> InnerServer:
        config = {"allow_open_registration": True, **config}
        server = InnerServer(tmp_path / f"inner{len(started)}", World(answer), **config)
        started.append(server.start())
        return started[-1]

    yield make
    for server in started:
        server.stop()


def pusher(key: str = "key", **fields: Any) -> Json:
    data = {"url": GATEWAY, "custom": [1], **fields.pop("data", {})}
    texts = {"app_display_name": "App", "device_display_name": "Phone", "lang": "en"}
    return {"app_id": "org.app", "pushkey": key, "kind": "http", "data": data, **texts, **fields}


def pushkeys_of(client: Client) -> list[str]:
    return [each["pushkey"] for each in ok(client.get("pushers"))["pushers"]]


def accept(_url: str, _sent: Json | None) -> Json:
    return {"rejected": []}


def test_pushers_are_set_changed_listed_and_deleted(alice: Client) -> None:
    ok(alice.post("pushers/set", pusher(profile_tag="tag", append=True)))
    (shown,) = ok(alice.get("pushers"))["pushers"]
    assert {"profile_tag": "tag", "lang": "en", "kind": "http"}.items() <= shown.items()
    assert shown["data"] == {"url": GATEWAY, "custom": [1]}
    assert "append" not in shown
    assert shown["org.matrix.msc3881.enabled"] is True
    assert shown["org.matrix.msc3881.device_id"] == alice.device_id
    ok(alice.post("pushers/set", pusher(lang="de")))
    assert [each["lang"] for each in ok(alice.get("pushers"))["pushers"]] == ["de"]
    ok(alice.post("pushers/set", {"app_id": "org.app", "pushkey": "key", "kind": None}))
    ok(alice.post("pushers/set", {"app_id": "org.app", "pushkey": "never", "kind": None}))
    assert pushkeys_of(alice) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://push.example/_matrix/push/v1/notify",
        "https://push.example/notify",
        "https://push.example/_matrix/push/v1/notify/",
        "https://user@push.example/_matrix/push/v1/notify",
        "https:///_matrix/push/v1/notify",
        "https://push.example:99999/_matrix/push/v1/notify",
        "https://[::1/_matrix/push/v1/notify",
        "file:///_matrix/push/v1/notify",
        "",
    ],
)
def test_sec_41_a_gateway_has_one_kind_of_address(alice: Client, url: str) -> None:
    refused = alice.post("pushers/set", pusher(data={"url": url}))
    fails(refused, 400, "M_INVALID_PARAM")
    assert pushkeys_of(alice) == []


@pytest.mark.parametrize(
    ("change", "errcode"),
    [
        ({"pushkey": "é" * 257}, "M_INVALID_PARAM"),
        ({"app_id": "a" * 65}, "M_INVALID_PARAM"),
        ({"kind": "email"}, "M_INVALID_PARAM"),
        ({"kind": 5}, "M_INVALID_PARAM"),
        ({"data": {"url": GATEWAY, "x": "y" * 20_000}}, "M_INVALID_PARAM"),
        ({"data": None}, "M_BAD_JSON"),
        ({"lang": None}, "M_BAD_JSON"),
        ({"append": "yes"}, "M_BAD_JSON"),
    ],
)
def test_pushers_that_cannot_be(alice: Client, change: Json, errcode: str) -> None:
    fails(alice.post("pushers/set", {**pusher(), **change}), 400, errcode)
    for name in change:
        body = {key: value for key, value in pusher().items() if key != name}
        if name not in ("append",):
            fails(alice.post("pushers/set", body), 400, "M_MISSING_PARAM")


def test_one_key_is_one_users_unless_told_to_append(alice: Client, bob: Client) -> None:
    key = unique()
    ok(alice.post("pushers/set", pusher(key)))
    ok(bob.post("pushers/set", pusher(key, append=True)))
    assert pushkeys_of(alice) == pushkeys_of(bob) == [key]
    ok(bob.post("pushers/set", pusher(key)))
    assert (pushkeys_of(alice), pushkeys_of(bob)) == ([], [key])


def test_pushers_go_with_their_device(server: Server, alice: Client) -> None:
    phone, tablet = alice.login(), alice.login()
    ok(phone.post("pushers/set", pusher("phone")))
    ok(tablet.post("pushers/set", pusher("tablet")))
    ok(alice.post("pushers/set", pusher("own")))
    ok(phone.post("logout"))
    assert sorted(pushkeys_of(alice)) == ["own", "tablet"]
    ok(alice.uia("POST", "account/password", {"new_password": "another password"}))
    assert pushkeys_of(alice) == ["own"]


def test_a_message_is_pushed_with_all_that_a_gateway_may_know(
    inner: Callable[..., InnerServer],
) -> None:
    server = inner(accept)
    alice, bob = register(server), register(server)
    ok(bob.put(("profile", bob.user_id, "displayname"), {"displayname": "Bob"}))
    room_id = bob.room_with(alice, name="Kitchen")
    ok(alice.post("pushers/set", pusher("full")))
    ok(alice.post("pushers/set", pusher("short", data={"format": "event_id_only"})))
    event_id = bob.send_text(room_id, "supper")
    eventually(lambda: len(server.world.pushes) == 2)
    pushes = {push["devices"][0]["pushkey"]: push for push in server.world.pushes}
    assert [url for _, url, _ in server.world.requests] == [GATEWAY] * 2
    full, short = pushes["full"], pushes["short"]
    device = full.pop("devices")[0]
    assert device["data"] == {"custom": [1]}
    assert device["tweaks"] == {"sound": "default"}
    assert isinstance(device["pushkey_ts"], int)
    assert full == {
        **{"event_id": event_id, "room_id": room_id, "type": "m.room.message"},
        **{"sender": bob.user_id, "sender_display_name": "Bob", "room_name": "Kitchen"},
        **{"content": {"msgtype": "m.text", "body": "supper"}, "counts": {"unread": 1}},
        "prio": "high",
    }
    assert short.keys() == {"event_id", "room_id", "counts", "devices", "prio"}
    assert short["devices"][0]["data"] == {"custom": [1], "format": "event_id_only"}


def test_badges_go_down_after_reading_elsewhere(inner: Callable[..., InnerServer]) -> None:
    server = inner(accept)
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    ok(alice.post("pushers/set", pusher()))

    def badges() -> list[int]:
        return [push["counts"]["unread"] for push in server.world.pushes]

    first, second = bob.send_text(room_id, "1"), bob.send_text(room_id, "2")
    eventually(lambda: badges()[-1:] == [2])
    ok(alice.post(("rooms", room_id, "receipt", "m.read", first)))
    eventually(lambda: badges()[-1:] == [1])
    assert "event_id" not in server.world.pushes[-1]
    ok(alice.post(("rooms", room_id, "receipt", "m.read.private", second)))
    eventually(lambda: badges()[-1:] == [0])
    bob.send_text(room_id, "3")
    eventually(lambda: badges()[-1:] == [1])
    alice.send_text(room_id, "read, as I write")
    eventually(lambda: badges()[-1:] == [0])
    gone = bob.send_text(room_id, "4")
    eventually(lambda: badges()[-1:] == [1])
    bob.redact(room_id, gone)
    eventually(lambda: badges()[-1:] == [0])
    other = bob.room_with(alice)
    bob.send_text(other, "5")
    eventually(lambda: badges()[-1:] == [1])
    ok(bob.post(("rooms", other, "kick"), {"user_id": alice.user_id}))
    eventually(lambda: badges()[-1:] == [0])
    count = len(badges())
    alice.send_text(room_id, "nothing new to tell")
    time.sleep(0.1)
    assert len(badges()) == count


def test_what_is_read_while_the_gateway_is_told_leaves_the_badge(
    inner: Callable[..., InnerServer],
) -> None:
    def answer(_url: str, sent: Json | None) -> Json:
        event_id = (sent or {})["notification"].get("event_id")
        if event_id is not None:
            hs = server.hs
            event, nid = hs.rooms.event(event_id), hs.db.find_user_nid(alice.user_id)
            hs.receipts.record(hs.rooms.by_nid(event.room_nid), nid, "m.read", "", event)
        return {"rejected": []}

    server = inner(answer)
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    ok(alice.post("pushers/set", pusher()))
    bob.send_text(room_id, "read at once")
    eventually(lambda: len(server.world.pushes) == 2)
    assert [push["counts"]["unread"] for push in server.world.pushes] == [1, 0]


def test_what_is_read_while_the_gateway_sleeps_is_not_pushed(
    inner: Callable[..., InnerServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduit, "PUSH_RETRY_MS", (300, 300))
    down = [True]
    error = conduit.MatrixError(502, "M_UNKNOWN", "unreachable")
    server = inner(lambda url, sent: error if down else {"rejected": []})
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    ok(alice.post("pushers/set", pusher()))
    read, unread = bob.send_text(room_id, "read"), bob.send_text(room_id, "unread")
    eventually(lambda: server.world.pushes)
    ok(alice.post(("rooms", room_id, "receipt", "m.read", read)))
    server.world.requests.clear()
    down.clear()
    eventually(lambda: server.world.pushes)
    time.sleep(0.1)
    assert [push.get("event_id") for push in server.world.pushes] == [unread]


def test_the_queue_survives_and_every_event_is_pushed_once(new_server: Any, tmp_path: Path) -> None:
    server = new_server()
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    ok(alice.post("pushers/set", pusher()))
    ids = [bob.send_text(room_id, f"{n}") for n in range(5)]
    server.kill9()
    server.check()
    world = World(accept)
    inside = InnerServer(server.folder, world, **server.config)
    inside.start()
    try:
        eventually(lambda: len(world.pushes) == 5)
        time.sleep(0.1)
        assert [push["event_id"] for push in world.pushes] == ids
        assert [push["counts"] for push in world.pushes] == [{"unread": 5}] * 5
        inside.stop()
        inside.start()
        time.sleep(0.1)
        assert len(world.pushes) == 5
    finally:
        inside.stop()


def test_rejected_keys_are_removed(inner: Callable[..., InnerServer]) -> None:
    server = inner(lambda url, sent: {"rejected": ["dead", "somebody else's"]})
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    for key in ("dead", "alive"):
        ok(alice.post("pushers/set", pusher(key)))
    bob.send_text(room_id, "hello")
    eventually(lambda: pushkeys_of(alice) == ["alive"])


@pytest.mark.parametrize(
    "answer",
    [
        Outcome(status=500, headers={}, body=b""),
        Outcome(status=200, headers={}, body=b"<html>"),
        Outcome(status=302, headers={"location": "https://127.0.0.1/"}, body=b""),
        conduit.MatrixError(403, "M_FORBIDDEN", "refused address"),
    ],
)
def test_failures_are_tried_again_later_and_later(
    inner: Callable[..., InnerServer], answer: Any
) -> None:
    server = inner(lambda url, sent: answer)
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    ok(alice.post("pushers/set", pusher()))
    bob.send_text(room_id, "hello")
    query = "SELECT failures, retry_ts, error FROM pushers"
    failures, retry_ts, error = eventually(
        lambda: (row := server.do(server.hs.db.one, query))[0] and row
    )
    assert failures >= 1
    assert retry_ts > time.time() * 1000
    assert error
    assert pushkeys_of(alice) == ["key"]


@pytest.mark.parametrize("value", [None, [], {"rejected": "key"}, {"rejected": [5, None, {}]}])
def test_odd_answers_of_gateways_do_no_harm(inner: Callable[..., InnerServer], value: Any) -> None:
    server = inner(lambda url, sent: value)
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    ok(alice.post("pushers/set", pusher()))
    bob.send_text(room_id, "hello")
    eventually(lambda: server.world.pushes)
    eventually(lambda: not server.do(server.hs.db.all, "SELECT * FROM push_queue"))
    assert pushkeys_of(alice) == ["key"]


def test_sec_24_what_is_not_pushed(inner: Callable[..., InnerServer]) -> None:
    server = inner(accept)
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    ok(alice.post("pushers/set", pusher()))
    bob.send(room_id, "m.room.message", {"msgtype": "m.notice", "body": "a notice"})
    bob.send(room_id, "m.reaction", {"m.relates_to": {"rel_type": "m.annotation"}})
    alice.send_text(room_id, "my own")
    path = ("user", alice.user_id, "account_data", "m.ignored_user_list")
    ok(alice.put(path, {"ignored_users": {bob.user_id: {}}}))
    bob.send_text(room_id, "ignored")
    ok(alice.put(path, {"ignored_users": {"@nobody:here": {}}}))
    ok(alice.post("pushers/set", pusher(**{"org.matrix.msc3881.enabled": False})))
    bob.send_text(room_id, "switched off")
    ok(alice.post("pushers/set", pusher()))
    expected = bob.send_text(room_id, "this")
    eventually(lambda: server.world.pushes)
    time.sleep(0.1)
    assert [push.get("event_id") for push in server.world.pushes] == [expected]


def test_old_news_is_not_pushed(
    inner: Callable[..., InnerServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = inner(accept)
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    ok(alice.post("pushers/set", pusher()))
    monkeypatch.setattr(conduit, "PUSH_KEPT_MS", -1)
    bob.send_text(room_id, "old")
    eventually(lambda: not server.do(server.hs.db.all, "SELECT * FROM push_queue"))
    assert server.world.pushes == []


def test_names_that_are_no_texts_stay_here(inner: Callable[..., InnerServer]) -> None:
    server = inner(accept)
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    bob.set_state(room_id, "m.room.name", {"name": {"a": 1}})
    bob.set_state(room_id, "m.room.member", {"membership": "join", "displayname": 5}, bob.user_id)
    ok(alice.post("pushers/set", pusher()))
    bob.send_text(room_id, "hello")
    eventually(lambda: server.world.pushes)
    assert server.world.pushes[-1].keys().isdisjoint({"room_name", "sender_display_name"})


def test_invitations_are_pushed_until_they_are_answered(
    inner: Callable[..., InnerServer],
) -> None:
    server = inner(accept)
    alice, bob = register(server), register(server)
    ok(alice.post("pushers/set", pusher()))
    room_id = bob.create_room(alice)
    eventually(lambda: server.world.pushes)
    (push,) = server.world.pushes
    assert push["user_is_target"] is True
    assert push["room_id"] == room_id
    assert push["content"]["membership"] == "invite"


def test_a_full_queue_keeps_the_newest(new_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = new_server()
    alice, bob = register(server), register(server)
    room_id = bob.room_with(alice)
    ok(alice.post("pushers/set", pusher()))
    for n in range(conduit.MAX_PUSHES_WAITING + 5):
        bob.send_text(room_id, f"{n}")
    server.stop()
    with contextlib.closing(sqlite3.connect(server.database)) as database:
        rows = database.execute("SELECT event_nid FROM push_queue ORDER BY 1").fetchall()
        newest = database.execute("SELECT MAX(nid) FROM events").fetchone()
    assert len(rows) == conduit.MAX_PUSHES_WAITING
    assert rows[-1] == newest


def test_the_list_of_notifications(alice: Client, bob: Client) -> None:
    room_id = bob.room_with(alice)
    ids = [bob.send_text(room_id, f"{n}") for n in range(6)]
    mention = {"msgtype": "m.text", "body": "you", "m.mentions": {"user_ids": [alice.user_id]}}
    loud = bob.send(room_id, "m.room.message", mention)
    alice.messages(room_id)
    ok(alice.post(("rooms", room_id, "receipt", "m.read", ids[2])))
    found: list[Json] = []
    query: Json = {"limit": 3}
    while True:
        page = ok(alice.get("notifications", params=query))
        assert len(page["notifications"]) <= 3
        found += page["notifications"]
        if "next_token" not in page:
            break
        query["from"] = page["next_token"]
    shown = [each for each in found if each["event"]["type"] == "m.room.message"]
    assert [each["event"]["event_id"] for each in shown] == [loud, *reversed(ids)]
    assert [each["read"] for each in shown] == [False] * 4 + [True] * 3
    assert shown[0]["actions"][0] == "notify"
    assert {each["room_id"] for each in shown} == {room_id}
    only = ok(alice.get("notifications", only="highlight"))["notifications"]
    assert [each["event"]["event_id"] for each in only] == [loud]
    bob.redact(room_id, loud)
    assert ok(alice.get("notifications", only="highlight"))["notifications"] == []
    alice.leave(room_id)
    rooms = {each["room_id"] for each in ok(alice.get("notifications"))["notifications"]}
    assert room_id not in rooms
    fails(alice.get("notifications", **{"from": "nonsense"}), 400, "M_INVALID_PARAM")
    fails(alice.get("notifications", limit="x"), 400, "M_INVALID_PARAM")


# ═════════════════════════════════════════════════════════════════════════════
#  20. ENCRYPTION KEYS AND TO-DEVICE
#
#  Devices whose keys and signatures are made by nacl and not by our own code:
#  what they upload, claim, sign, back up and send each other.
# ═════════════════════════════════════════════════════════════════════════════


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode().rstrip("=")


class KeyPair:
    """An Ed25519 key pair of a device or of cross-signing, made by nacl and not by our code."""

    def __init__(self, name: str | None = None) -> None:
        self.key = nacl.signing.SigningKey.generate()
        self.public = b64(bytes(self.key.verify_key))
        self.id = f"ed25519:{name or self.public}"

    def sign(self, value: Json, user_id: str) -> Json:
        """A copy of the object with one more signature."""
        bare = {k: v for k, v in value.items() if k not in ("signatures", "unsigned")}
        raw = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        signatures = json.loads(json.dumps(value.get("signatures", {})))
        signatures.setdefault(user_id, {})[self.id] = b64(self.key.sign(raw).signature)
        return {**value, "signatures": signatures}


def curve_key() -> str:
    return b64(bytes(nacl.public.PrivateKey.generate().public_key))


class CryptoDevice:
    """A client with encryption keys, as far as the server has to do with them."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.user_id = client.user_id
        self.device_id = client.device_id
        self.identity = KeyPair(client.device_id)
        self.cross: dict[str, KeyPair] = {}
        self.counter = itertools.count(1)

    def device_keys(self, **changes: Any) -> Json:
        value = {
            "user_id": self.user_id,
            "device_id": self.device_id,
            "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
            "keys": {
                f"curve25519:{self.device_id}": curve_key(),
                self.identity.id: self.identity.public,
            },
            **changes,
        }
        return self.identity.sign(value, self.user_id)

    def one_time_keys(self, count: int, **members: Any) -> Json:
        """New signed one-time keys; their ids rise."""
        made = {}
        for _ in range(count):
            key = self.identity.sign({"key": curve_key(), **members}, self.user_id)
            made[f"signed_curve25519:{next(self.counter):06}"] = key
        return made

    def upload(self, **body: Any) -> httpx.Response:
        return self.client.post("keys/upload", body)

    def publish(self, count: int = 0) -> CryptoDevice:
        """Upload the identity keys and some one-time keys."""
        ok(self.upload(device_keys=self.device_keys(), one_time_keys=self.one_time_keys(count)))
        return self

    def cross_signing_keys(self, **pairs: KeyPair) -> Json:
        """The body of /keys/device_signing/upload with new keys, but for those given."""
        self.cross = {
            u: pairs.get(u) or KeyPair() for u in ("master", "self_signing", "user_signing")
        }
        body = {}
        for usage, pair in self.cross.items():
            value = {"user_id": self.user_id, "usage": [usage], "keys": {pair.id: pair.public}}
            signer = self.identity if usage == "master" else self.cross["master"]
            body[f"{usage}_key"] = signer.sign(value, self.user_id)
        return body


def crypto(client: Client, count: int = 0) -> CryptoDevice:
    return CryptoDevice(client).publish(count)


def query(client: Client, *users: Client | CryptoDevice, **fields: Any) -> Json:
    return ok(
        client.post("keys/query", {"device_keys": {user.user_id: [] for user in users}, **fields})
    )


def claim(client: Client, device: CryptoDevice, algorithm: str = "signed_curve25519") -> Json:
    """Claim one key of a device: {key id: key}, or {}."""
    wanted = {device.user_id: {device.device_id: algorithm}}
    answer = ok(client.post("keys/claim", {"one_time_keys": wanted}))["one_time_keys"]
    return cast(Json, answer.get(device.user_id, {}).get(device.device_id, {}))


def tell_devices(
    client: Client, event_type: str, messages: Json, txn_id: str | None = None
) -> None:
    path = ("sendToDevice", event_type, txn_id or unique("txn"))
    assert ok(client.put(path, {"messages": messages})) == {}


def to_device(result: Json) -> list[Json]:
    return cast("list[Json]", result.get("to_device", {}).get("events", []))


def changed(result: Json) -> set[str]:
    return set(result.get("device_lists", {}).get("changed", []))


def left(result: Json) -> set[str]:
    return set(result.get("device_lists", {}).get("left", []))


# ── 20.1  Device lists ───────────────────────────────────────────────────────


def test_device_lists_tell_those_who_share_a_room(
    alice: Client, bob: Client, server: Server
) -> None:
    stranger = register(server)
    room = alice.room_with(bob)
    for client in (alice, bob, stranger):
        client.poll()
    crypto(alice)
    assert changed(bob.poll()) == {alice.user_id}
    assert changed(alice.poll()) == {alice.user_id}
    assert changed(stranger.poll()) == set()
    second = alice.login()
    crypto(second)
    assert changed(bob.poll()) == {alice.user_id}
    ok(second.post("logout"))
    assert changed(bob.poll()) == {alice.user_id}
    assert list(query(bob, alice)["device_keys"][alice.user_id]) == [alice.device_id]
    ok(alice.put(("devices", alice.device_id), {"display_name": "new name"}))
    assert changed(bob.poll()) == {alice.user_id}
    assert room


def test_device_lists_follow_joins_and_leaves(alice: Client, bob: Client) -> None:
    alice.poll()
    bob.poll()
    room = alice.create_room(bob)
    assert changed(bob.poll()) == changed(alice.poll()) == set()
    bob.join(room)
    assert bob.user_id in changed(alice.poll())
    assert alice.user_id in changed(bob.poll())
    other = alice.room_with(bob)
    bob.leave(room)
    assert left(alice.poll()) == left(bob.poll()) == set()
    bob.leave(other)
    assert left(alice.poll()) == {bob.user_id}
    assert left(bob.poll()) == {alice.user_id}
    crypto(alice)
    assert changed(bob.poll()) == set()
    bob.join(alice.create_room(bob))
    assert alice.user_id in changed(bob.poll())


def test_keys_changes_between_two_tokens_and_over_a_restart(
    new_server: Callable[..., Server],
) -> None:
    server = new_server()
    alice, bob, carol = (register(server) for _ in range(3))
    room = alice.room_with(bob, carol)
    start = alice.poll()["next_batch"]
    crypto(bob)
    carol.leave(room)
    end = alice.poll()["next_batch"]
    expected = {"changed": [bob.user_id], "left": [carol.user_id]}
    assert ok(alice.get("keys/changes", **{"from": start, "to": end})) == expected
    assert ok(alice.get("keys/changes", **{"from": end, "to": end})) == {"changed": [], "left": []}
    server.restart()
    assert ok(alice.get("keys/changes", **{"from": start, "to": end})) == expected
    assert ok(carol.get("keys/changes", **{"from": start, "to": end}))["left"] == sorted(
        [alice.user_id, bob.user_id]
    )
    fails(alice.get("keys/changes", to=end), 400)
    fails(alice.get("keys/changes", **{"from": "nonsense", "to": end}), 400)
    result = alice.sync(start)
    assert (changed(result), left(result)) == ({bob.user_id}, {carol.user_id})


class FakeRooms:
    """Who is in which room, as the room store would say."""

    def __init__(self, hs: Any) -> None:
        self.hs = hs
        self.joined: dict[int, set[int]] = {}

    def share_room(self, one: int, other: int) -> bool:
        return any({one, other} <= users for users in self.joined.values())

    def users_sharing(self, user: int) -> set[int]:
        together = [users for users in self.joined.values() if user in users]
        return set().union(*together) - {user}

    def move(self, user: int, nid: int) -> None:
        """Join, or leave when joined, as the room store announces it."""
        users = self.joined.setdefault(nid, set())
        was = "join" if user in users else "leave"
        users ^= {user}
        position = self.hs.stream.stamp(conduit.ROOM_EVENT, nid)
        room = cast(Any, types.SimpleNamespace(nid=nid, last_pos=position))
        conduit.note_membership(
            self.hs, room, cast(Any, user), was, "leave" if was == "join" else "join"
        )


@contextlib.contextmanager
def bare_homeserver(folder: Path) -> Iterator[Any]:
    """Database, stream and keys without a server around them; needs a running loop."""
    hs: Any = types.SimpleNamespace(db=conduit.Database(folder, "test.example", 16.0))
    hs.stream = conduit.Stream(hs.db)
    hs.keys = conduit.KeyCache(hs.db, hs.stream.position)
    hs.rooms = FakeRooms(hs)
    try:
        yield hs
    finally:
        hs.db.connection.execute("COMMIT")
        hs.db.connection.close()


list_steps = st.lists(
    st.one_of(
        st.tuples(st.just("move"), st.integers(0, 3), st.integers(1, 3)),
        st.tuples(st.just("keys"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("sync"), st.integers(0, 3), st.just(0)),
    ),
    max_size=30,
)


def run_list_steps(hs: Any, steps: list[tuple[str, int, int]]) -> None:
    """Play the steps, and hold what each user hears against a plain model."""
    run = next(COUNTER)
    users = [hs.db.user_nid(f"@u{n}:run{run}") for n in range(4)]
    hs.rooms.joined = {}
    since = dict.fromkeys(users, hs.stream.position)
    shared: dict[int, set[int]] = {user: set() for user in users}
    news: dict[int, set[int]] = {user: set() for user in users}
    for kind, number, room in steps:
        user = users[number]
        if kind == "move":
            hs.rooms.move(user, 4 * run + room)
        elif kind == "keys":
            conduit.device_list_changed(hs, user)
            for each in news.values():
                each.add(user)
        else:
            now = hs.rooms.users_sharing(user)
            expected = now & news[user] | now - shared[user] | {user} & news[user]
            answer = conduit.device_list_changes(hs, user, since[user], hs.stream.position)
            named, gone = ({*map(hs.db.user_nid, part)} for part in answer)
            assert expected <= named <= now | {user}
            assert shared[user] - now <= gone
            assert not gone & (now | {user})
            since[user], shared[user], news[user] = hs.stream.position, now, set()


def test_device_lists_never_say_too_little(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bare_homeserver(tmp_path) as hs, hs.db.write():
            given(list_steps)(lambda steps: run_list_steps(hs, steps))()

    asyncio.run(scenario())


# ── 20.2  Uploading ──────────────────────────────────────────────────────────


def test_keys_upload_and_query(alice: Client, bob: Client) -> None:
    device = CryptoDevice(alice)
    keys = device.device_keys()
    ok(alice.put(("devices", alice.device_id), {"display_name": "phone"}))
    assert ok(device.upload(device_keys=keys)) == {"one_time_key_counts": {"signed_curve25519": 0}}
    answer = query(bob, alice)
    assert answer["device_keys"] == {
        alice.user_id: {alice.device_id: {**keys, "unsigned": {"device_display_name": "phone"}}}
    }
    assert answer["failures"] == {}
    assert answer["user_signing_keys"] == answer["master_keys"] == {}
    named = {"device_keys": {alice.user_id: ["NO_SUCH_DEVICE"], "@nobody:test.example": []}}
    assert ok(bob.post("keys/query", named))["device_keys"] == {alice.user_id: {}}


def test_keys_query_names_servers_that_cannot_be_reached(alice: Client) -> None:
    answer = ok(alice.post("keys/query", {"device_keys": {"@x:remote.example": []}, "timeout": 10}))
    assert set(answer["failures"]) == {"remote.example"}
    answer = ok(
        alice.post(
            "keys/claim", {"one_time_keys": {"@x:remote.example": {"D": "signed_curve25519"}}}
        )
    )
    assert set(answer["failures"]) == {"remote.example"}
    assert answer["one_time_keys"] == {}


def test_keys_upload_of_the_same_keys_again_is_no_change(alice: Client, bob: Client) -> None:
    device, room = crypto(alice), alice.room_with(bob)
    bob.poll()
    keys = device.device_keys()
    ok(device.upload(device_keys=keys))
    assert changed(bob.poll()) == {alice.user_id}
    ok(device.upload(device_keys=keys))
    assert changed(bob.poll()) == set()
    assert room


@pytest.mark.parametrize(
    ("change", "errcode"),
    [
        ({"user_id": "@other:test.example"}, "M_INVALID_PARAM"),
        ({"device_id": "OTHER"}, "M_INVALID_PARAM"),
        ({"algorithms": "m.olm"}, "M_BAD_JSON"),
        ({"algorithms": [1]}, "M_BAD_JSON"),
        ({"keys": []}, "M_BAD_JSON"),
        ({"keys": {"ed25519": 1}}, "M_BAD_JSON"),
        ({"signatures": {"x": "y"}}, "M_BAD_JSON"),
        ({"extra": 1.5}, "M_BAD_JSON"),
        ({"extra": 2**60}, "M_BAD_JSON"),
        ({"extra": "x" * 70_000}, "M_TOO_LARGE"),
    ],
)
def test_keys_upload_refuses_device_keys_that_are_wrong(
    alice: Client, change: Json, errcode: str
) -> None:
    keys = {**CryptoDevice(alice).device_keys(), **change}
    response = CryptoDevice(alice).upload(device_keys=keys)
    fails(response, 413 if errcode == "M_TOO_LARGE" else 400, errcode)
    assert query(alice, alice)["device_keys"] == {alice.user_id: {}}


def test_keys_of_unknown_algorithms_are_kept_as_they_are(alice: Client, bob: Client) -> None:
    keys = {
        "user_id": alice.user_id,
        "device_id": alice.device_id,
        "algorithms": ["org.example.new"],
        "keys": {"x:y": "any text", "ed25519:" + alice.device_id: "no base64!"},
        "signatures": {alice.user_id: {"x:y": "not checked"}, "@else:x": {"a:b": "c"}},
    }
    one_time = {"x:1": {"key": "text", "more": [1]}, "y:1": "text", "signed_curve25519:A": {}}
    fallback = {"x:1": {"key": "fallback", "fallback": True}}
    device, bob.checked = CryptoDevice(alice), False  # what goes in wrongly comes out wrongly
    ok(device.upload(device_keys=keys, one_time_keys=one_time, fallback_keys=fallback))
    found = query(bob, alice)["device_keys"][alice.user_id][alice.device_id]
    assert found == {**keys, "unsigned": {}}
    taken = [claim(bob, device, algorithm) for algorithm in ("x", "y", "signed_curve25519", "x")]
    assert taken == [*({name: key} for name, key in one_time.items()), fallback]
    body = device.cross_signing_keys()
    fails(alice.post("keys/device_signing/upload", body), 400, "M_INVALID_SIGNATURE")


def test_one_time_keys_need_no_identity_keys(alice: Client, bob: Client) -> None:
    device = CryptoDevice(alice)
    keys = device.one_time_keys(1)
    assert ok(device.upload(one_time_keys=keys))["one_time_key_counts"] == {"signed_curve25519": 1}
    assert claim(bob, device) == keys


@pytest.mark.parametrize(
    "keys",
    [
        {"signed_curve25519": {"key": "x"}},
        {":AA": {"key": "x"}},
        {"signed_curve25519:AA": 5},
        {"signed_curve25519:AA": {"key": 1.5}},
        {"signed_curve25519:AA": {"key": "x" * 70_000}},
        {"signed_curve25519:" + "A" * 300: {"key": "A" * 43}},
    ],
)
def test_one_time_keys_of_wrong_shape_are_refused(alice: Client, keys: Json) -> None:
    device = crypto(alice)
    assert device.upload(one_time_keys=keys).status_code in (400, 413)
    assert device.upload(fallback_keys=keys).status_code in (400, 413)
    assert claim(alice, device) == {}


def test_one_time_key_id_with_other_content_is_refused(alice: Client) -> None:
    device = crypto(alice)
    keys = device.one_time_keys(2)
    assert ok(device.upload(one_time_keys=keys))["one_time_key_counts"] == {"signed_curve25519": 2}
    assert ok(device.upload(one_time_keys=keys))["one_time_key_counts"] == {"signed_curve25519": 2}
    first = next(iter(keys))
    other = {first: next(iter(device.one_time_keys(1).values()))}
    fails(device.upload(one_time_keys=other), 400, "M_INVALID_PARAM")
    assert claim(alice, device) == {first: keys[first]}


def test_a_claimed_key_does_not_come_back_with_a_repeated_upload(
    alice: Client, bob: Client
) -> None:
    device = crypto(alice)
    keys = device.one_time_keys(2)
    ok(device.upload(one_time_keys=keys))
    first = claim(bob, device)
    ok(device.upload(one_time_keys=keys))  # the client had not heard the first answer
    second = claim(bob, device)
    assert {**first, **second} == keys
    assert claim(bob, device) == {}


def test_new_identity_keys_make_the_old_one_time_keys_worthless(alice: Client, bob: Client) -> None:
    device = crypto(alice, 5)
    again = CryptoDevice(alice)
    answer = ok(again.upload(device_keys=again.device_keys(), one_time_keys=again.one_time_keys(1)))
    assert answer["one_time_key_counts"] == {"signed_curve25519": 1}
    assert query(bob, alice)["device_keys"][alice.user_id][alice.device_id]["keys"][
        device.identity.id
    ] == (again.identity.public)


def test_unsigned_one_time_keys_are_kept_by_algorithm(alice: Client, bob: Client) -> None:
    device = crypto(alice, 1)
    counts = ok(device.upload(one_time_keys={"curve25519:AA": curve_key()}))["one_time_key_counts"]
    assert counts == {"signed_curve25519": 1, "curve25519": 1}
    assert set(claim(bob, device, "curve25519")) == {"curve25519:AA"}
    assert claim(bob, device, "curve25519") == {}


# ── 20.3  Claiming ───────────────────────────────────────────────────────────


def test_one_time_keys_are_claimed_in_the_order_of_upload(alice: Client, bob: Client) -> None:
    device = crypto(alice)
    batches = [device.one_time_keys(3) for _ in range(3)]
    for batch in batches:
        ok(device.upload(one_time_keys=batch))
    for batch in batches:
        found: Json = {}
        for _ in batch:
            found |= claim(bob, device)
        assert found == batch
    assert claim(bob, device) == {}


def test_one_time_keys_are_claimed_once_by_many_at_once(alice: Client, server: Server) -> None:
    device = crypto(alice, 60)
    clients = [register(server) for _ in range(8)]

    def take(client: Client) -> list[str]:
        return [key_id for _ in range(12) for key_id in claim(client, device)]

    with ThreadPoolExecutor(8) as pool:
        taken = [key_id for keys in pool.map(take, clients) for key_id in keys]
    assert len(taken) == len(set(taken)) == 60


def test_fallback_key_is_given_out_when_one_time_keys_are_used_up(
    alice: Client, bob: Client
) -> None:
    device = crypto(alice, 1)
    assert alice.poll()["device_unused_fallback_key_types"] == []
    fallback = device.one_time_keys(1, fallback=True)
    ok(device.upload(fallback_keys=fallback))
    assert alice.poll()["device_unused_fallback_key_types"] == ["signed_curve25519"]
    assert claim(bob, device) != fallback
    assert alice.poll()["device_unused_fallback_key_types"] == ["signed_curve25519"]
    assert claim(bob, device) == claim(bob, device) == fallback
    result = alice.poll(timeout=2000)
    assert result["device_unused_fallback_key_types"] == []
    assert result["device_one_time_keys_count"]["signed_curve25519"] == 0
    ok(device.upload(fallback_keys=fallback))  # the same again stays used
    assert alice.poll()["device_unused_fallback_key_types"] == []
    fresh = device.one_time_keys(1, fallback=True)
    ok(device.upload(fallback_keys=fresh))
    assert alice.poll()["device_unused_fallback_key_types"] == ["signed_curve25519"]
    assert claim(bob, device) == fresh


def test_sync_wakes_when_a_key_is_claimed(alice: Client, bob: Client) -> None:
    device = crypto(alice, 10)
    assert alice.poll()["device_one_time_keys_count"] == {"signed_curve25519": 10}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(alice.poll, 20_000)
        time.sleep(0.3)
        started = time.monotonic()
        claim(bob, device)
        assert waiting.result()["device_one_time_keys_count"] == {"signed_curve25519": 9}
    assert time.monotonic() - started < 5


def test_keys_query_and_claim_refuse_wrong_types(alice: Client) -> None:
    for body in (
        {},
        {"device_keys": []},
        {"device_keys": {alice.user_id: "x"}},
        {"device_keys": {"x": []}},
    ):
        assert alice.post("keys/query", body).status_code == 400
    for users in ([], {alice.user_id: []}, {alice.user_id: {"D": 5}}, {"nobody": {}}):
        assert alice.post("keys/claim", {"one_time_keys": users}).status_code == 400


@slow
def test_sec_49_claimed_keys_stay_claimed_when_the_server_is_killed(
    new_server: Callable[..., Server],
) -> None:
    server = new_server()
    owner, taker = register(server), register(server)
    device = crypto(owner, 40)
    taken: list[str] = []
    for _ in range(4):
        taken += [key_id for _ in range(5) for key_id in claim(taker, device)]
        ok(device.upload(one_time_keys=device.one_time_keys(2)))
        server.kill9()
        server.start()
    while found := claim(taker, device):
        taken += found
    assert len(taken) == len(set(taken)) == 48
    server.stop()
    server.check()


# ── 20.4  Cross-signing ──────────────────────────────────────────────────────


def test_cross_signing_keys_are_uploaded_freely_once(alice: Client, bob: Client) -> None:
    device, _ = crypto(alice), alice.room_with(bob)
    body = device.cross_signing_keys()
    bob.poll()
    assert ok(alice.post("keys/device_signing/upload", body)) == {}
    assert changed(bob.poll()) == {alice.user_id}
    mine, theirs = query(alice, alice), query(bob, alice)
    for usage in ("master", "self_signing", "user_signing"):
        assert mine[f"{usage}_keys"][alice.user_id] == body[f"{usage}_key"]
    assert theirs["master_keys"] == mine["master_keys"]
    assert theirs["self_signing_keys"] == mine["self_signing_keys"]
    assert theirs["user_signing_keys"] == {}
    assert (
        ok(alice.post("keys/device_signing/upload", body)) == {}
    )  # the same again needs no password
    assert changed(bob.poll()) == set()


def test_replacing_cross_signing_keys_needs_the_password(alice: Client) -> None:
    alice.checked = False  # the specification's data leave out the 401 of this endpoint
    device = crypto(alice)
    first = device.cross_signing_keys()
    ok(alice.post("keys/device_signing/upload", first))
    second = device.cross_signing_keys()
    challenge = alice.post("keys/device_signing/upload", second)
    assert challenge.status_code == 401
    assert challenge.json()["flows"]
    wrong = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": alice.user_id}}
    auth = {**wrong, "password": "wrong", "session": challenge.json()["session"]}
    assert alice.post("keys/device_signing/upload", {**second, "auth": auth}).status_code == 401
    assert query(alice, alice)["master_keys"][alice.user_id] == first["master_key"]
    ok(alice.uia("POST", "keys/device_signing/upload", second))
    assert query(alice, alice)["master_keys"][alice.user_id] == second["master_key"]


def test_another_self_signing_key_alone_needs_the_password_too(alice: Client) -> None:
    alice.checked = False  # the specification's data leave out the 401 of this endpoint
    device = crypto(alice)
    ok(alice.post("keys/device_signing/upload", device.cross_signing_keys()))
    master = device.cross["master"]
    body = device.cross_signing_keys(master=master)
    only = {"self_signing_key": body["self_signing_key"]}
    assert alice.post("keys/device_signing/upload", only).status_code == 401
    ok(alice.uia("POST", "keys/device_signing/upload", only))
    assert query(alice, alice)["self_signing_keys"][alice.user_id] == only["self_signing_key"]


def test_cross_signing_signatures_are_checked(alice: Client) -> None:
    device = crypto(alice)
    body = device.cross_signing_keys()
    for name in ("self_signing_key", "user_signing_key"):
        unsigned = {k: v for k, v in body[name].items() if k != "signatures"}
        forged = KeyPair().sign(unsigned, alice.user_id)
        wrong = {
            **unsigned,
            "signatures": {alice.user_id: {device.cross["master"].id: b64(bytes(64))}},
        }
        for bad in (unsigned, forged, wrong):
            fails(
                alice.post("keys/device_signing/upload", {**body, name: bad}),
                400,
                "M_INVALID_SIGNATURE",
            )
    spoilt = {
        **body["master_key"],
        "signatures": {alice.user_id: {device.identity.id: b64(bytes(64))}},
    }
    response = alice.post("keys/device_signing/upload", {**body, "master_key": spoilt})
    fails(response, 400, "M_INVALID_SIGNATURE")
    only = {"self_signing_key": body["self_signing_key"]}
    fails(alice.post("keys/device_signing/upload", only), 400, "M_MISSING_PARAM")
    assert query(alice, alice)["master_keys"] == {}


def test_cross_signing_keys_of_wrong_shape_are_refused(alice: Client) -> None:
    device = crypto(alice)
    good = device.cross_signing_keys()["master_key"]
    for change in (
        {"user_id": "@other:test.example"},
        {"usage": ["self_signing"]},
        {"usage": "master"},
        {"keys": {}},
        {"keys": {"ed25519:x": good["keys"][device.cross["master"].id]}},
        {"keys": {"ed25519:AAAA": "AAAA"}},
        {"keys": 5},
        {"extra": 0.5},
    ):
        response = alice.post("keys/device_signing/upload", {"master_key": {**good, **change}})
        assert response.status_code == 400, change


def test_cross_signing_key_may_not_be_a_device_id(alice: Client) -> None:
    pair = KeyPair()
    device = CryptoDevice(alice.login(device_id=pair.public)).publish()
    body = device.cross_signing_keys(master=pair)
    fails(alice.post("keys/device_signing/upload", body), 403, "M_FORBIDDEN")
    same = KeyPair()
    body = device.cross_signing_keys(self_signing=same, user_signing=same)
    fails(alice.post("keys/device_signing/upload", body), 403, "M_FORBIDDEN")


def test_a_device_may_not_have_the_name_of_a_cross_signing_key(alice: Client) -> None:
    device = crypto(alice)
    ok(alice.post("keys/device_signing/upload", device.cross_signing_keys()))
    twin = CryptoDevice(alice.login(device_id=device.cross["self_signing"].public))
    fails(twin.upload(device_keys=twin.device_keys()), 403, "M_FORBIDDEN")


def test_signatures_are_checked_and_merged(alice: Client, bob: Client, server: Server) -> None:
    phone, friend, _ = crypto(alice), crypto(bob), alice.room_with(bob)
    ok(alice.post("keys/device_signing/upload", phone.cross_signing_keys()))
    ok(bob.post("keys/device_signing/upload", friend.cross_signing_keys()))
    device = query(alice, alice)["device_keys"][alice.user_id][alice.device_id]
    own = phone.cross["self_signing"].sign({**device, "signatures": {}}, alice.user_id)
    master = query(alice, bob)["master_keys"][bob.user_id]
    theirs = phone.cross["user_signing"].sign({**master, "signatures": {}}, alice.user_id)
    laptop = alice.login()
    for client in (alice, bob, laptop):
        client.poll()
    body = {
        alice.user_id: {alice.device_id: own},
        bob.user_id: {friend.cross["master"].public: theirs},
    }
    assert ok(alice.post("keys/signatures/upload", body)) == {"failures": {}}
    # Everyone sees the device signed; only its maker sees the signature of the user-signing key.
    seen = query(bob, alice)["device_keys"][alice.user_id][alice.device_id]["signatures"][
        alice.user_id
    ]
    assert set(seen) == {phone.identity.id, phone.cross["self_signing"].id}
    mine = query(alice, bob)["master_keys"][bob.user_id]["signatures"]
    assert set(mine[alice.user_id]) == {phone.cross["user_signing"].id}
    assert set(mine[bob.user_id]) == {friend.identity.id}
    for viewer in (bob, register(server)):
        assert set(query(viewer, bob)["master_keys"][bob.user_id]["signatures"]) == {bob.user_id}
    assert changed(bob.poll()) == {alice.user_id}
    assert changed(laptop.poll()) == {alice.user_id, bob.user_id}
    assert ok(alice.post("keys/signatures/upload", body)) == {"failures": {}}
    assert changed(laptop.poll()) == set()


def test_signatures_that_fail_are_named_one_by_one(alice: Client, bob: Client) -> None:
    phone, friend = crypto(alice), crypto(bob)
    ok(alice.post("keys/device_signing/upload", phone.cross_signing_keys()))
    ok(bob.post("keys/device_signing/upload", friend.cross_signing_keys()))
    device = query(alice, alice)["device_keys"][alice.user_id][alice.device_id]
    bare = {**device, "signatures": {}}
    signing, master = phone.cross["self_signing"], friend.cross["master"].public
    foreign = query(alice, bob)["master_keys"][bob.user_id]

    def failure(user: Client, name: str, value: Any) -> str:
        answer = ok(alice.post("keys/signatures/upload", {user.user_id: {name: value}}))
        return str(answer["failures"][user.user_id][name]["errcode"])

    spoilt = {**bare, "signatures": {alice.user_id: {signing.id: b64(bytes(64))}}}
    altered = signing.sign({**bare, "algorithms": []}, alice.user_id)
    assert failure(alice, alice.device_id, spoilt) == "M_INVALID_SIGNATURE"
    assert failure(alice, alice.device_id, bare) == "M_INVALID_SIGNATURE"
    assert (
        failure(alice, alice.device_id, KeyPair().sign(bare, alice.user_id))
        == "M_INVALID_SIGNATURE"
    )
    assert (
        failure(alice, alice.device_id, phone.cross["master"].sign(bare, alice.user_id))
        == "M_INVALID_SIGNATURE"
    )
    assert failure(alice, alice.device_id, altered) == "M_INVALID_PARAM"
    assert failure(alice, "NOSUCHDEVICE", signing.sign(bare, alice.user_id)) == "M_NOT_FOUND"
    assert failure(bob, bob.device_id, signing.sign(bare, alice.user_id)) == "M_NOT_FOUND"
    assert (
        failure(bob, master, signing.sign({**foreign, "signatures": {}}, alice.user_id))
        == "M_INVALID_SIGNATURE"
    )
    for bad in ([], {alice.device_id: 5}):
        fails(alice.post("keys/signatures/upload", {alice.user_id: bad}), 400, "M_BAD_JSON")
    signed = query(alice, alice)["device_keys"][alice.user_id][alice.device_id]["signatures"]
    assert set(signed[alice.user_id]) == {phone.identity.id}


def test_a_new_master_key_drops_what_the_old_ones_signed(alice: Client) -> None:
    alice.checked = False  # the specification's data leave out the 401 of this endpoint
    phone = crypto(alice)
    ok(alice.post("keys/device_signing/upload", phone.cross_signing_keys()))
    device = query(alice, alice)["device_keys"][alice.user_id][alice.device_id]
    own = phone.cross["self_signing"].sign({**device, "signatures": {}}, alice.user_id)
    assert (
        ok(alice.post("keys/signatures/upload", {alice.user_id: {alice.device_id: own}}))[
            "failures"
        ]
        == {}
    )
    body = phone.cross_signing_keys()
    ok(alice.uia("POST", "keys/device_signing/upload", {"master_key": body["master_key"]}))
    answer = query(alice, alice)
    assert answer["self_signing_keys"] == answer["user_signing_keys"] == {}
    signatures = answer["device_keys"][alice.user_id][alice.device_id]["signatures"][alice.user_id]
    assert set(signatures) == {phone.identity.id}


# ── 20.5  Key backup ─────────────────────────────────────────────────────────

ALGORITHM: Final = "m.megolm_backup.v1.curve25519-aes-sha2"


def new_backup(client: Client) -> str:
    body = {"algorithm": ALGORITHM, "auth_data": {"public_key": curve_key()}}
    return str(ok(client.post("room_keys/version", body))["version"])


def backed_up(first: int = 0, forwarded: int = 0, verified: bool = False, data: str = "x") -> Json:
    return {
        "first_message_index": first,
        "forwarded_count": forwarded,
        "is_verified": verified,
        "session_data": {"ciphertext": data, "ephemeral": curve_key(), "mac": "m"},
    }


def test_backup_versions(alice: Client) -> None:
    fails(alice.get("room_keys/version"), 404, "M_NOT_FOUND")
    first, auth = new_backup(alice), {"public_key": "x", "signatures": {}}
    ok(alice.put(("room_keys", "version", first), {"algorithm": ALGORITHM, "auth_data": auth}))
    described = {
        "algorithm": ALGORITHM,
        "auth_data": auth,
        "count": 0,
        "etag": "0",
        "version": first,
    }
    assert ok(alice.get("room_keys/version")) == described
    other = {"algorithm": "other", "auth_data": auth}
    fails(alice.put(("room_keys", "version", first), other), 400, "M_INVALID_PARAM")
    mismatch = {"algorithm": ALGORITHM, "auth_data": auth, "version": "77"}
    fails(alice.put(("room_keys", "version", first), mismatch), 400, "M_INVALID_PARAM")
    second = new_backup(alice)
    assert ok(alice.get("room_keys/version"))["version"] == second != first
    assert ok(alice.get(("room_keys", "version", first))) == described
    ok(alice.delete(("room_keys", "version", second)))
    fails(alice.delete(("room_keys", "version", second)), 404, "M_NOT_FOUND")
    fails(alice.get(("room_keys", "version", second)), 404)
    assert ok(alice.get("room_keys/version"))["version"] == first
    assert new_backup(alice) not in {first, second}
    for unknown in ("77", "0", "-1", "x", "٣", "1" * 40):
        fails(alice.get(("room_keys", "version", unknown)), 404, "M_NOT_FOUND")
        fails(alice.delete(("room_keys", "version", unknown)), 404, "M_NOT_FOUND")


def test_backup_sessions(alice: Client, bob: Client) -> None:
    version = new_backup(alice)
    one, two = "!one:test.example", "!two:test.example"
    keys: Json = {f"s{n}": backed_up(n) for n in range(3)}
    assert (
        ok(alice.put(("room_keys", "keys", one, "s0"), keys["s0"], version=version))["count"] == 1
    )
    answer = ok(alice.put(("room_keys", "keys", one), {"sessions": keys}, version=version))
    assert answer["count"] == 3
    rooms = {one: {"sessions": keys}, two: {"sessions": {"t": backed_up()}}}
    after = ok(alice.put("room_keys/keys", {"rooms": rooms}, version=version))
    assert after["count"] == 4
    assert after["etag"] != answer["etag"]
    assert (
        ok(alice.put("room_keys/keys", {"rooms": {two: rooms[two]}}, version=version))["etag"]
        == after["etag"]
    )
    everything = ok(alice.get("room_keys/keys", version=version))["rooms"]
    assert everything[one]["sessions"] == keys
    assert set(everything) == {one, two}
    assert ok(alice.get(("room_keys", "keys", one), version=version)) == {"sessions": keys}
    assert ok(alice.get(("room_keys", "keys", one, "s1"), version=version)) == keys["s1"]
    assert ok(alice.get(("room_keys", "keys", "!none:x"), version=version)) == {"sessions": {}}
    fails(alice.get(("room_keys", "keys", one, "none"), version=version), 404, "M_NOT_FOUND")
    fails(bob.get("room_keys/keys", version=version), 404, "M_NOT_FOUND")
    assert ok(alice.delete(("room_keys", "keys", one, "s1"), version=version))["count"] == 3
    assert ok(alice.delete(("room_keys", "keys", one), version=version))["count"] == 1
    assert set(ok(alice.get("room_keys/keys", version=version))["rooms"]) == {two}
    assert ok(alice.delete("room_keys/keys", version=version))["count"] == 0
    assert ok(alice.get("room_keys/keys", version=version)) == {"rooms": {}}


def test_backup_takes_sessions_for_the_newest_version_only(alice: Client) -> None:
    path = ("room_keys", "keys", "!r:test.example", "s")
    fails(alice.put(path, backed_up(), version="1"), 404, "M_NOT_FOUND")
    old = new_backup(alice)
    ok(alice.put(path, backed_up(), version=old))
    new = new_backup(alice)
    error = fails(alice.put(path, backed_up(), version=old), 403, "M_WRONG_ROOM_KEYS_VERSION")
    assert error["current_version"] == new
    fails(alice.put(path, backed_up(), version="77"), 404, "M_NOT_FOUND")
    fails(alice.put(path, backed_up()), 400, "M_MISSING_PARAM")
    assert ok(alice.get(path, version=old))["is_verified"] is False  # still there to be read
    fails(alice.get(path, version=new), 404, "M_NOT_FOUND")
    ok(alice.delete(("room_keys", "version", old)))
    fails(alice.get(path, version=old), 404, "M_NOT_FOUND")


@pytest.mark.parametrize(
    "change",
    [
        {"first_message_index": True},
        {"first_message_index": 2**53},
        {"forwarded_count": 1.5},
        {"forwarded_count": None},
        {"is_verified": 1},
        {"session_data": "text"},
        {"session_data": {"x": 1.5}},
        {"session_data": {"x": 2**60}},
        {"session_data": {"x": "y" * 70_000}},
    ],
)
def test_backup_refuses_sessions_of_wrong_shape(alice: Client, change: Json) -> None:
    version = new_backup(alice)
    response = alice.put(
        ("room_keys", "keys", "!r:x", "s"), {**backed_up(), **change}, version=version
    )
    assert response.status_code in (400, 413)
    assert ok(alice.get("room_keys/keys", version=version)) == {"rooms": {}}


def test_a_large_backup_is_given_back_whole(alice: Client) -> None:
    version = new_backup(alice)
    rooms = {
        f"!room{n}:test.example": {
            "sessions": {f"s{i}\u0000ü": backed_up(i, data="z" * 50) for i in range(n)}
        }
        for n in (1, 199, 201, 350)
    }
    assert ok(alice.put("room_keys/keys", {"rooms": rooms}, version=version))["count"] == 751
    assert ok(alice.get("room_keys/keys", version=version))["rooms"] == rooms
    for room_id, room in rooms.items():
        assert ok(alice.get(("room_keys", "keys", room_id), version=version)) == room
    assert (
        ok(alice.delete(("room_keys", "keys", "!room350:test.example"), version=version))["count"]
        == 401
    )


sessions = st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3))


def rank(upload: tuple[bool, int, int]) -> tuple[bool, int, int]:
    names = ("is_verified", "first_message_index", "forwarded_count")
    return conduit.session_rank(dict(zip(names, upload, strict=True)))


@given(st.lists(sessions, min_size=1, max_size=8))
def test_the_best_session_stays_whatever_the_order(uploads: list[tuple[bool, int, int]]) -> None:
    kept = uploads[0]
    for new in uploads[1:]:
        kept = max(kept, new, key=rank)
    verified = [each for each in uploads if each[0]] or uploads
    lowest = min(each[1] for each in verified)
    assert kept == (verified[0][0], lowest, min(each[2] for each in verified if each[1] == lowest))


def test_backup_keeps_the_better_session(alice: Client) -> None:
    version = new_backup(alice)
    path = ("room_keys", "keys", "!r:test.example", "s")
    order = [
        (5, 5, False),
        (5, 4, False),
        (4, 9, False),
        (9, 9, True),
        (0, 0, False),
        (9, 10, True),
        (8, 99, True),
    ]
    kept = []
    for first, forwarded, verified in order:
        ok(alice.put(path, backed_up(first, forwarded, verified), version=version))
        stored = ok(alice.get(path, version=version))
        kept.append(
            (stored["first_message_index"], stored["forwarded_count"], stored["is_verified"])
        )
    assert kept == [*order[:4], order[3], order[3], order[6]]


# ── 20.6  To-device messages ─────────────────────────────────────────────────


def test_to_device_messages_reach_the_named_devices(alice: Client, bob: Client) -> None:
    laptop = bob.login()
    for client in (alice, bob, laptop):
        client.poll()
    tell_devices(alice, "m.test", {bob.user_id: {bob.device_id: {"n": 1}, "NOSUCHDEVICE": {}}})
    tell_devices(alice, "m.test", {bob.user_id: {"*": {"n": 2}}, "@nobody:test.example": {"*": {}}})
    tell_devices(alice, "m.test", {bob.user_id: {"*": {"n": 3}, laptop.device_id: {"n": 4}}})

    def seen(client: Client) -> list[int]:
        events = to_device(client.poll())
        assert all(e["sender"] == alice.user_id and e["type"] == "m.test" for e in events)
        return [event["content"]["n"] for event in events]

    assert seen(bob) == [1, 2, 3]
    assert seen(laptop) == [2, 4]
    assert seen(bob) == seen(laptop) == seen(alice) == []


def test_to_device_transaction_is_repeated_without_effect(alice: Client, bob: Client) -> None:
    bob.poll()
    for n in range(3):
        tell_devices(alice, "m.test", {bob.user_id: {"*": {"n": n}}}, "same")
    tell_devices(alice, "m.other", {bob.user_id: {"*": {"n": 9}}}, "same")
    other = alice.login()
    tell_devices(other, "m.test", {bob.user_id: {"*": {"n": 10}}}, "same")
    assert [event["content"]["n"] for event in to_device(bob.poll())] == [0, 9, 10]


def test_to_device_message_stays_until_its_token_comes_back(alice: Client, bob: Client) -> None:
    start = bob.sync()["next_batch"]
    tell_devices(alice, "m.test", {bob.user_id: {"*": {"n": 1}}})
    first = bob.sync(start)
    assert to_device(bob.sync(start)) == to_device(first) != []  # the answer was lost: again
    assert to_device(bob.sync(first["next_batch"])) == []
    assert to_device(bob.sync(start)) == []  # acknowledged: gone
    assert to_device(bob.sync()) == []


def test_many_to_device_messages_come_a_hundred_at_a_time(alice: Client, bob: Client) -> None:
    bob.poll()
    for n in range(250):
        tell_devices(alice, "m.test", {bob.user_id: {bob.device_id: {"n": n}}})
    pages = [[event["content"]["n"] for event in to_device(bob.poll())] for _ in range(4)]
    assert pages == [[*range(100)], [*range(100, 200)], [*range(200, 250)], []]


def test_many_to_device_messages_wait_for_a_first_sync(alice: Client, bob: Client) -> None:
    for n in range(120):
        tell_devices(alice, "m.test", {bob.user_id: {bob.device_id: {"n": n}}})
    found = [event["content"]["n"] for _ in range(3) for event in to_device(bob.poll())]
    assert found == [*range(120)]


def test_to_device_wakes_a_waiting_sync(alice: Client, bob: Client) -> None:
    bob.poll()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bob.poll, 20_000)
        time.sleep(0.3)
        started = time.monotonic()
        tell_devices(alice, "m.test", {bob.user_id: {bob.device_id: {"n": 1}}})
        assert len(to_device(waiting.result())) == 1
    assert time.monotonic() - started < 5


def test_messages_of_a_deleted_device_are_deleted(alice: Client, bob: Client) -> None:
    laptop = bob.login(device_id="LAPTOP")
    laptop.poll()
    crypto(laptop, 3)
    tell_devices(alice, "m.test", {bob.user_id: {"LAPTOP": {}}})
    ok(laptop.post("logout"))
    tell_devices(alice, "m.test", {bob.user_id: {"LAPTOP": {}}})
    again = bob.login(device_id="LAPTOP")
    result = again.poll()
    assert to_device(result) == []
    assert result["device_one_time_keys_count"].get("signed_curve25519", 0) == 0
    assert query(bob, bob)["device_keys"] == {bob.user_id: {}}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        {"@u:test.example": []},
        {"@u:test.example": {"D": 5}},
        {"@u:test.example": {"D": {"x": 1.5}}},
    ],
)
def test_to_device_refuses_wrong_types(alice: Client, messages: Any) -> None:
    response = alice.put(("sendToDevice", "m.test", unique("txn")), {"messages": messages})
    fails(response, 400)


def test_sec_46_to_device_messages_have_a_size(alice: Client, bob: Client) -> None:
    def send(size: int) -> httpx.Response:
        content = {"x": "y" * (size - len('{"x":""}'))}
        body = {"messages": {bob.user_id: {"*": content}}}
        return alice.put(("sendToDevice", "m.test", unique("txn")), body)

    fails(send(65_537), 413, "M_TOO_LARGE")
    ok(send(65_536))
    long_type = ("sendToDevice", "m" * 256, unique("txn"))
    fails(alice.put(long_type, {"messages": {}}), 400, "M_INVALID_PARAM")


def test_sec_46_a_full_queue_refuses_the_newest_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduit, "MAX_QUEUE_BYTES", 1100)

    async def scenario() -> None:
        with bare_homeserver(tmp_path) as hs, hs.db.write():
            user = hs.db.user_nid("@u:test.example")
            for nid, name in ((1, "DEAD"), (2, "ALIVE")):
                insert = "INSERT INTO devices (device_nid, user_nid, device_id) VALUES (?, ?, ?)"
                hs.db.execute(insert, (nid, user, name))
            dead, alive = (types.SimpleNamespace(device_nid=nid) for nid in (1, 2))

            def send(message: bytes) -> None:
                conduit.queue_to_device(hs, user, "m.test", user, {"*": message})

            def waiting(device: Any) -> list[int]:
                position = hs.stream.position
                events, _ = conduit.to_device_messages(hs, device, 0, position)
                return [event["content"]["n"] for event in events]

            for n in range(8):
                send(b'{"n":%d}' % n)
                if n < 7:
                    conduit.acknowledge_to_device(hs, cast(Any, alive), hs.stream.position)
            assert waiting(dead) == [0, 1, 2, 3, 4]
            assert waiting(alive) == [7]
            conduit.acknowledge_to_device(hs, cast(Any, dead), hs.stream.position)
            send(b'{"n":9,"x":"%s"}' % (b"x" * 800))
            assert waiting(dead) == [9]
            assert waiting(alive) == [7]

    asyncio.run(scenario())


@slow
def test_to_device_is_delivered_exactly_once_over_restarts(
    new_server: Callable[..., Server],
) -> None:
    server = new_server()
    sender, receiver = register(server), register(server)
    receiver.poll()
    chance = random.Random(17)  # noqa: S311  chance for tests
    sent, received = [], []
    for n in range(120):
        step = chance.random()
        if step < 0.6:
            tell_devices(
                sender, "m.test", {receiver.user_id: {receiver.device_id: {"n": n}}}, f"txn{n}"
            )
            sent.append(n)
        elif step < 0.75:
            receiver.sync(receiver.since)  # an answer that never arrives
        elif step < 0.95:
            received += [event["content"]["n"] for event in to_device(receiver.poll())]
        else:
            chance.choice([server.kill9, server.stop])()
            server.start()
    received += [event["content"]["n"] for _ in range(3) for event in to_device(receiver.poll())]
    assert received == sent
    server.stop()
    server.check()


DEHYDRATED: Final = "/_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device"


def dehydrated_keys(client: Client, device_id: str) -> Json:
    """The upload of a dehydrated device."""
    keys = {f"ed25519:{device_id}": "x" * 43, f"curve25519:{device_id}": "y" * 43}
    device = {"user_id": client.user_id, "device_id": device_id, "algorithms": [], "keys": keys}
    return {
        "device_id": device_id,
        "device_data": {"algorithm": "org.matrix.msc3814.v2", "device_pickle": "secret"},
        "device_keys": {**device, "signatures": {}, "dehydrated": True},
        "one_time_keys": {"signed_curve25519:a": {"key": "k", "signatures": {}}},
        "fallback_keys": {"signed_curve25519:f": {"key": "f", "signatures": {}, "fallback": True}},
        "initial_device_display_name": "Asleep",
    }


def test_a_dehydrated_device_collects_keys(alice: Client, bob: Client) -> None:
    alice.room_with(bob)
    fails(alice.get(DEHYDRATED), 404, "M_NOT_FOUND")
    fails(alice.delete(DEHYDRATED), 404, "M_NOT_FOUND")
    bob.poll()
    upload = dehydrated_keys(alice, "ASLEEP")
    assert ok(alice.put(DEHYDRATED, upload)) == {"device_id": "ASLEEP"}
    found = ok(alice.get(DEHYDRATED))
    assert found == {"device_id": "ASLEEP", "device_data": upload["device_data"]}
    assert alice.user_id in bob.poll()["device_lists"]["changed"]
    query = ok(bob.post("keys/query", {"device_keys": {alice.user_id: []}}))["device_keys"]
    assert query[alice.user_id]["ASLEEP"]["dehydrated"] is True
    assert {"ASLEEP"} < {d["device_id"] for d in ok(alice.get("devices"))["devices"]}
    claim = {"one_time_keys": {alice.user_id: {"ASLEEP": "signed_curve25519"}}}
    keys = ok(bob.post("keys/claim", claim))["one_time_keys"][alice.user_id]["ASLEEP"]
    assert keys == upload["one_time_keys"]
    for n in range(5):
        messages = {alice.user_id: {"ASLEEP": {"n": n}}}
        ok(bob.put(("sendToDevice", "m.test", unique()), {"messages": messages}))
    events = DEHYDRATED + "/ASLEEP/events"
    batch = ok(alice.post(events, {}))
    assert [event["content"]["n"] for event in batch["events"]] == list(range(5))
    assert batch["events"][0]["sender"] == bob.user_id
    assert ok(alice.post(events, {"next_batch": batch["next_batch"]}))["events"] == []
    first = ok(alice.get(events, limit=3))
    rest = ok(alice.get(events, params={"limit": 3, "from": first["next_batch"]}))
    assert [e["content"]["n"] for e in first["events"] + rest["events"]] == list(range(5))
    assert "next_batch" not in rest
    assert ok(alice.delete(DEHYDRATED)) == {"device_id": "ASLEEP"}
    fails(alice.get(events), 403, "M_FORBIDDEN")
    assert alice.user_id in bob.poll()["device_lists"]["changed"]


def test_there_is_one_dehydrated_device(server: Server, alice: Client, bob: Client) -> None:
    for device_id in ("FIRST", "SECOND", "SECOND"):
        ok(alice.put(DEHYDRATED, dehydrated_keys(alice, device_id)))
    names = {device["device_id"] for device in ok(alice.get("devices"))["devices"]}
    assert names == {"SECOND", alice.device_id}
    fails(alice.put(DEHYDRATED, dehydrated_keys(alice, alice.device_id)), 400, "M_INVALID_PARAM")
    fails(bob.get(DEHYDRATED + "/SECOND/events"), 403, "M_FORBIDDEN")
    fails(alice.get(f"{DEHYDRATED}/{alice.device_id}/events"), 403, "M_FORBIDDEN")
    wrong = dehydrated_keys(alice, "THIRD")
    wrong["device_keys"]["device_id"] = "OTHER"
    fails(alice.put(DEHYDRATED, wrong), 400, "M_INVALID_PARAM")
    del wrong["device_keys"]
    fails(alice.put(DEHYDRATED, wrong), 400, "M_MISSING_PARAM")
    assert ok(alice.get(DEHYDRATED))["device_id"] == "SECOND"  # nothing of it was done
    ok(alice.uia("DELETE", ("devices", "SECOND")))
    fails(alice.get(DEHYDRATED), 404, "M_NOT_FOUND")


# ═════════════════════════════════════════════════════════════════════════════
#  21. SYNC
# ═════════════════════════════════════════════════════════════════════════════

LAZY: Final = {"room": {"state": {"lazy_load_members": True}, "timeline": {"limit": 5}}}


def keys_of(events: Iterable[Json]) -> set[tuple[str, str]]:
    return {(event["type"], event["state_key"]) for event in events}


def joined(result: Json, room_id: str) -> Json:
    return cast(Json, result["rooms"]["join"][room_id])


def test_first_sync_has_the_whole_state(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob, name="Den")
    for number in range(15):
        alice.send_text(room_id, str(number))
    room = joined(bob.poll(), room_id)
    bodies = [event["content"]["body"] for event in room["timeline"]["events"]]
    assert bodies == [str(number) for number in range(5, 15)]
    assert room["timeline"]["limited"] is True
    assert keys_of(room["state"]["events"]) == keys_of(alice.state(room_id))
    assert room["summary"] == {"m.joined_member_count": 2, "m.invited_member_count": 0}
    older = bob.messages(room_id, **{"from": room["timeline"]["prev_batch"], "limit": 1})
    assert older["chunk"][0]["content"]["body"] == "4"


def test_small_room_is_not_limited_and_state_comes_once(alice: Client) -> None:
    room_id = alice.create_room()
    room = joined(alice.sync(filter={"room": {"timeline": {"limit": 50}}}), room_id)
    assert room["timeline"]["limited"] is False
    assert room["state"]["events"] == []
    assert room["timeline"]["events"][0]["type"] == "m.room.create"


def test_only_what_is_new_comes_and_each_event_once(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    other = alice.room_with(bob)
    bob.poll()
    assert "rooms" not in bob.poll()
    event_id = alice.send_text(room_id, "news")
    result = bob.poll()
    assert set(result["rooms"]["join"]) == {room_id}
    assert [event["event_id"] for event in bob.timeline(room_id, result)] == [event_id]
    assert joined(result, room_id)["state"]["events"] == []
    assert "rooms" not in bob.poll()
    alice.send_text(other, "elsewhere")
    assert set(bob.poll()["rooms"]["join"]) == {other}


def test_gap_brings_the_state_that_changed_in_it(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob, name="Old")
    bob.poll()
    alice.set_state(room_id, "m.room.name", {"name": "New"})
    alice.set_state(room_id, "m.room.topic", {"topic": "one"})
    for number in range(12):
        alice.send_text(room_id, str(number))
    alice.set_state(room_id, "m.room.topic", {"topic": "two"})
    room = joined(bob.poll(), room_id)
    assert room["timeline"]["limited"] is True
    state = {event["type"]: event["content"] for event in room["state"]["events"]}
    assert state["m.room.name"] == {"name": "New"}
    assert state["m.room.topic"] == {"topic": "one"}
    assert room["timeline"]["events"][-1]["content"] == {"topic": "two"}


@pytest.mark.parametrize("name", ["use_state_after", "org.matrix.msc4222.use_state_after"])
def test_state_after_is_the_state_behind_the_timeline(
    alice: Client, bob: Client, name: str
) -> None:
    room_id = alice.room_with(bob)
    section = "state_after" if name == "use_state_after" else "org.matrix.msc4222.state_after"
    first = joined(bob.poll(**{name: "true"}), room_id)
    assert keys_of(first[section]["events"]) == keys_of(alice.state(room_id))
    assert "state" not in first
    alice.set_state(room_id, "m.room.topic", {"topic": "x"})
    alice.send_text(room_id, "hello")
    second = joined(bob.poll(**{name: "true"}), room_id)
    assert keys_of(second[section]["events"]) == {("m.room.topic", "")}


def test_joining_brings_history_and_state(alice: Client, bob: Client) -> None:
    bob.poll()
    room_id = alice.create_room(bob, name="Den")
    invited = bob.poll()["rooms"]["invite"][room_id]["invite_state"]["events"]
    assert {("m.room.name", ""), ("m.room.member", bob.user_id)} <= keys_of(invited)
    assert all(set(event) == {"type", "state_key", "content", "sender"} for event in invited)
    assert "rooms" not in bob.poll()
    alice.send_text(room_id, "before you came")
    bob.join(room_id)
    room = joined(bob.poll(), room_id)
    assert "before you came" in [e["content"].get("body") for e in room["timeline"]["events"]]
    everything = [
        *room["state"]["events"],
        *(e for e in room["timeline"]["events"] if "state_key" in e),
    ]
    assert keys_of(everything) == keys_of(alice.state(room_id))


def test_leaving_ends_with_the_leave(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    bob.poll()
    alice.send_text(room_id, "last words")
    ok(alice.post(("rooms", room_id, "kick"), {"user_id": bob.user_id}))
    alice.send_text(room_id, "behind your back")
    result = bob.poll()
    left = result["rooms"]["leave"][room_id]["timeline"]["events"]
    assert [e["content"].get("body", e["content"].get("membership")) for e in left] == [
        "last words",
        "leave",
    ]
    assert room_id not in result["rooms"].get("join", {})
    assert "rooms" not in bob.poll()
    assert room_id not in bob.sync().get("rooms", {}).get("leave", {})
    archived = bob.sync(filter={"room": {"include_leave": True}})["rooms"]["leave"]
    assert room_id in archived
    ok(bob.post(("rooms", room_id, "forget")))
    archived = bob.sync(filter={"room": {"include_leave": True}}).get("rooms", {}).get("leave", {})
    assert room_id not in archived


def test_sec_20_nothing_after_a_ban(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    bob.poll()
    ok(alice.post(("rooms", room_id, "ban"), {"user_id": bob.user_id}))
    alice.send_text(room_id, "secret")
    alice.set_state(room_id, "m.room.topic", {"topic": "secret"})
    assert "secret" not in json.dumps(bob.poll())
    assert "secret" not in json.dumps(bob.poll(full_state="true"))


def test_lazy_members_come_with_their_first_message_only(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    first = joined(bob.poll(filter=LAZY), room_id)
    members = {e["state_key"] for e in first["state"]["events"] if e["type"] == "m.room.member"}
    in_timeline = {
        e["state_key"] for e in first["timeline"]["events"] if e["type"] == "m.room.member"
    }
    assert members | in_timeline == {alice.user_id, bob.user_id}
    alice.send_text(room_id, "one")
    second = joined(bob.poll(filter=LAZY), room_id)
    alice.send_text(room_id, "two")
    third = joined(bob.poll(filter=LAZY), room_id)
    assert {e["state_key"] for e in second["state"]["events"]} <= {alice.user_id}
    assert third["state"]["events"] == []
    redundant = {"room": {"state": {"lazy_load_members": True, "include_redundant_members": True}}}
    alice.send_text(room_id, "three")
    fourth = joined(bob.poll(filter=redundant), room_id)
    assert {e["state_key"] for e in fourth["state"]["events"]} == {alice.user_id}


def test_filters(alice: Client, bob: Client) -> None:
    room_id, other = alice.room_with(bob), alice.room_with(bob)
    alice.send_text(room_id, "text")
    alice.send(room_id, "m.sticker", {"body": "sticker"})

    def types(**room: Any) -> list[str]:
        rooms = bob.sync(filter={"room": room}).get("rooms", {}).get("join", {})
        return [
            event["type"] for event in rooms.get(room_id, {}).get("timeline", {}).get("events", [])
        ]

    assert types(timeline={"types": ["m.sticker"]}) == ["m.sticker"]
    assert "m.sticker" not in types(timeline={"not_types": ["m.stick*"]})
    assert types(timeline={"senders": ["@nobody:x"]}) == []
    assert types(not_rooms=[room_id]) == []
    assert set(bob.sync(filter={"room": {"rooms": [other]}})["rooms"]["join"]) == {other}
    limited = bob.sync(
        filter={"room": {"timeline": {"limit": 1}}, "event_fields": ["content.body"]}
    )
    assert bob.timeline(room_id, limited) == [{"content": {"body": "sticker"}}]
    raw = bob.sync(filter={"event_format": "federation", "room": {"timeline": {"limit": 1}}})
    assert {"hashes", "signatures", "auth_events"} <= set(bob.timeline(room_id, raw)[0])
    stored = ok(bob.post(("user", bob.user_id, "filter"), {"room": {"rooms": [other]}}))[
        "filter_id"
    ]
    assert set(bob.sync(filter=stored)["rooms"]["join"]) == {other}
    fails(bob.get("sync", params={"filter": "{"}), 400)
    fails(bob.get("sync", params={"since": "nonsense"}), 400, "M_INVALID_PARAM")


def test_full_state(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob, name="Den")
    bob.poll()
    assert "rooms" not in bob.poll()
    room = joined(bob.poll(full_state="true"), room_id)
    assert keys_of(room["state"]["events"]) == keys_of(alice.state(room_id))
    assert room["timeline"]["events"] == []


def test_ignored_users_are_silent_but_their_state_stays(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    content = {"ignored_users": {alice.user_id: {}}}
    ok(bob.put(("user", bob.user_id, "account_data", "m.ignored_user_list"), content))
    bob.poll()
    alice.send_text(room_id, "hello?")
    alice.set_state(room_id, "m.room.topic", {"topic": "seen"})
    invited = alice.create_room(bob)
    result = bob.poll()
    assert [event["type"] for event in bob.timeline(room_id, result)] == ["m.room.topic"]
    assert invited not in result["rooms"].get("invite", {})


# ── Waiting ──────────────────────────────────────────────────────────────────


def waits_until(reader: Client, act: Callable[[], Any]) -> tuple[Json, float]:
    """The answer of a sync during which something happens, and how long it took after that."""
    reader.poll()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(reader.poll, 20_000)
        time.sleep(0.3)
        begin = time.perf_counter()
        act()
        return future.result(), time.perf_counter() - begin


def test_sync_wakes_for_whatever_concerns_its_user(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    phone = bob.login()
    event_id = alice.send_text(room_id, "read me")
    member = ("rooms", room_id)
    acts: dict[str, Callable[[], Any]] = {
        "message": lambda: alice.send_text(room_id, "x"),
        "typing": lambda: ok(
            alice.put((*member, "typing", alice.user_id), {"typing": True, "timeout": 9000})
        ),
        "receipt": lambda: ok(alice.post((*member, "receipt", "m.read", event_id))),
        "account data": lambda: ok(
            phone.put(("user", bob.user_id, "account_data", "x.y"), {"a": 1})
        ),
        "tag": lambda: ok(phone.put(("user", bob.user_id, "rooms", room_id, "tags", "u.x"), {})),
        "to-device": lambda: ok(
            alice.put(
                ("sendToDevice", "x.z", unique("txn")), {"messages": {bob.user_id: {"*": {}}}}
            )
        ),
        "invite": lambda: alice.create_room(bob),
        "kick": lambda: ok(alice.post((*member, "kick"), {"user_id": bob.user_id})),
    }
    for name, act in acts.items():
        result, seconds = waits_until(bob, act)
        news = set(result) - {
            "next_batch",
            "device_one_time_keys_count",
            "device_unused_fallback_key_types",
        }
        assert news, name
        assert seconds < 5, name


def test_sync_without_news_returns_after_its_timeout(alice: Client) -> None:
    alice.poll()
    begin = time.perf_counter()
    result = alice.poll(timeout=600)
    assert 0.5 < time.perf_counter() - begin < 5
    assert "rooms" not in result


def test_sync_token_outlives_a_kill(new_server: Callable[..., Server]) -> None:
    one = new_server()
    host, guest = register(one), register(one)
    room_id = host.room_with(guest)
    guest.poll()
    ok(host.put(("rooms", room_id, "typing", host.user_id), {"typing": True, "timeout": 30_000}))
    guest.poll()  # a token from a position that nothing on the disk has
    missed = host.send_text(room_id, "while you slept")
    one.kill9()
    one.start()
    later = host.send_text(room_id, "after the restart")
    assert [e["event_id"] for e in guest.timeline(room_id, guest.poll())] == [missed, later]
    assert "rooms" not in guest.poll()


def test_sec_25_a_poll_that_waits_ends_with_its_device(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    thief = bob.login()
    thief.poll()
    with ThreadPoolExecutor(1) as pool:
        query = {"since": thief.since, "timeout": 9000}
        waiting = pool.submit(thief.get, "sync", params=query)
        time.sleep(0.3)
        ok(bob.uia("DELETE", ("devices", thief.device_id)))
        alice.send_text(room_id, "not for the thief")
        response = waiting.result()
    fails(response, 401, "M_UNKNOWN_TOKEN")


def test_sec_25_a_request_ends_with_its_session(server: Server, alice: Client) -> None:
    """The token is good when the head comes, and not any more when the body is there."""
    room_id = alice.create_room()
    phone = alice.login()
    body = b'{"body": "late"}'
    path = f"/_matrix/client/v3/rooms/{quote(room_id)}/send/m.room.message/late"
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {phone.token}\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body[:3])
        time.sleep(0.2)
        ok(phone.post("logout"))
        connection.sendall(body[3:])
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 401")
    assert alice.bodies(room_id) == []


# ── Convergence ──────────────────────────────────────────────────────────────


class Mirror:
    """What a client knows of its rooms from incremental syncs alone."""

    def __init__(self, client: Client, wanted: Json | None = None) -> None:
        self.client = client
        self.wanted = wanted
        self.since: str | None = None
        self.state: dict[str, dict[tuple[str, str], str]] = {}
        self.seen: dict[str, list[str]] = {}

    def catch_up(self) -> None:
        result = self.client.sync(self.since, filter=self.wanted)
        self.since = result["next_batch"]
        rooms = result.get("rooms", {})
        for room_id, room in rooms.get("join", {}).items():
            state = self.state.setdefault(room_id, {})
            seen = self.seen.setdefault(room_id, [])
            for event in room["state"]["events"]:
                state[event["type"], event["state_key"]] = event["event_id"]
            for event in room["timeline"]["events"]:
                seen.append(event["event_id"])
                if "state_key" in event:
                    state[event["type"], event["state_key"]] = event["event_id"]
        for room_id in rooms.get("leave", {}):
            self.state.pop(room_id, None)
            self.seen.pop(room_id, None)


ACTION: Final = st.tuples(
    st.sampled_from(["message", "topic", "name", "leave", "join", "burst", "sync", "sync"]),
    st.integers(0, 1),
    st.integers(0, 2),
)


@given(story=st.lists(ACTION, max_size=25))
@settings(max_examples=25)
def test_incremental_syncs_come_to_what_a_fresh_one_says(
    server: Server, story: list[tuple[str, int, int]]
) -> None:
    people = [register(server) for _ in range(3)]
    rooms = [people[0].create_room(preset="public_chat") for _ in range(2)]
    mirrors = [Mirror(person, {"room": {"timeline": {"limit": 3}}}) for person in people]
    for action, which, who in story:
        act_at_random(people[who], people[0], rooms[which], action)
        if action == "sync":
            mirrors[who].catch_up()
    for person, mirror in zip(people, mirrors, strict=True):
        mirror.catch_up()
        in_rooms = set(ok(person.get("joined_rooms"))["joined_rooms"])
        assert set(mirror.state) == in_rooms
        for room_id in in_rooms:
            now = {(e["type"], e["state_key"]): e["event_id"] for e in person.state(room_id)}
            assert mirror.state[room_id] == now
            assert len(mirror.seen[room_id]) == len(set(mirror.seen[room_id]))


def act_at_random(person: Client, host: Client, room_id: str, action: str) -> None:
    """One step of a story; what the rules forbid is simply not done."""
    if action == "burst":
        for number in range(6):
            host.send_text(room_id, str(number))
    elif action == "message":
        person.put(("rooms", room_id, "send", "m.room.message", unique("txn")), {"body": "x"})
    elif action in ("topic", "name"):
        host.set_state(room_id, f"m.room.{action}", {action: unique("text")})
    elif action == "join":
        person.post(("join", room_id))
    elif action == "leave" and person is not host:
        person.post(("rooms", room_id, "leave"))


# ── What a filter or a lost answer must not take away ────────────────────────


def send_number(sender: Client, target: Client, number: int) -> None:
    body = {"messages": {target.user_id: {target.device_id: {"number": number}}}}
    ok(sender.put(("sendToDevice", "test.number", unique("txn")), body))


def test_more_to_device_messages_than_fit_into_one_answer(alice: Client, bob: Client) -> None:
    for number in range(230):
        send_number(alice, bob, number)
    seen: list[int] = []
    while events := bob.poll().get("to_device", {}).get("events", []):
        assert len(events) <= 100
        seen += [event["content"]["number"] for event in events]
    assert seen == list(range(230))


@pytest.mark.parametrize("state_after", [False, True])
def test_state_that_the_timeline_filter_drops_comes_as_state(
    alice: Client, state_after: bool
) -> None:
    room_id = alice.create_room()
    query: Json = {"filter": {"room": {"timeline": {"types": ["m.room.message"]}}}}
    name = "state"
    if state_after:
        query["use_state_after"], name = "true", "state_after"
    since = alice.sync(**query)["next_batch"]
    alice.send_text(room_id, "before")
    alice.set_state(room_id, "m.room.topic", {"topic": "new"})
    room = alice.sync(since=since, **query)["rooms"]["join"][room_id]
    assert [event["type"] for event in room["timeline"]["events"]] == ["m.room.message"]
    assert [event["type"] for event in room[name]["events"]] == ["m.room.topic"]


def test_state_of_a_room_without_a_timeline(alice: Client) -> None:
    room_id = alice.create_room()
    query: Json = {"filter": {"room": {"timeline": {"not_rooms": [room_id]}}}}
    since = alice.sync(**query)["next_batch"]
    alice.set_state(room_id, "m.room.topic", {"topic": "new"})
    room = alice.sync(since=since, **query)["rooms"]["join"][room_id]
    assert [event["type"] for event in room["state"]["events"]] == ["m.room.topic"]


def test_lazy_members_come_again_when_the_answer_was_lost(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob, name="Named, so without heroes")
    lazy = {"room": {"state": {"lazy_load_members": True}, "timeline": {"limit": 1}}}

    def has_bob(result: Json) -> bool:
        state = result["rooms"]["join"][room_id]["state"]["events"]
        return bob.user_id in [event["state_key"] for event in state]

    alice.send_text(room_id, "mine")
    since = alice.sync(filter=lazy)["next_batch"]
    bob.send_text(room_id, "from bob")
    assert has_bob(alice.sync(filter=lazy, since=since))
    again = alice.sync(filter=lazy, since=since)
    assert has_bob(again)
    bob.send_text(room_id, "once more")
    assert not has_bob(alice.sync(filter=lazy, since=again["next_batch"]))
    bob.send_text(room_id, "and more")
    anew = alice.sync(filter=lazy)
    assert has_bob(anew)
    alice.send_text(room_id, "mine again")
    anew = alice.sync(filter=lazy)  # the client lost all it had, and sees no message of bob's
    bob.send_text(room_id, "to the new one")
    assert has_bob(alice.sync(filter=lazy, since=anew["next_batch"]))


def test_who_came_and_went_between_two_syncs_gets_the_state(alice: Client, bob: Client) -> None:
    room_id = alice.create_room(name="Kitchen")
    since = bob.sync()["next_batch"]
    alice.invite(room_id, bob)
    bob.join(room_id)
    bob.leave(room_id)
    few = {"room": {"timeline": {"limit": 1}}}
    left = bob.sync(since=since, filter=few)["rooms"]["leave"][room_id]
    assert {"name": "Kitchen"} in [event["content"] for event in left["state"]["events"]]


def test_private_receipt_of_someone_else_is_no_news(alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob)
    event_id = alice.send_text(room_id, "read me")
    alice.poll()
    bob.poll()
    receipt = ("rooms", room_id, "receipt", "m.read.private", event_id)
    ok(bob.post(receipt, {}))
    assert room_id not in alice.poll().get("rooms", {}).get("join", {})
    assert room_id in bob.poll()["rooms"]["join"]


# ═════════════════════════════════════════════════════════════════════════════
#  22. MEDIA
# ═════════════════════════════════════════════════════════════════════════════

UPLOAD: Final = "/_matrix/media/v3/upload"
MEDIA: Final = "/_matrix/client/v1/media/"


def png(width: int, height: int, *, honest: bool = True) -> bytes:
    """A grey PNG; a dishonest one has a header and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(width) for _ in range(height)) if honest else b""
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def picture(kind: str, width: int, height: int, **options: Any) -> bytes:
    """A picture with a gradient, so that scaling has something to do."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    output = io.BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


def moving_gif(width: int, height: int) -> bytes:
    frames = [Image.new("RGB", (width, height), colour) for colour in ("red", "green", "blue")]
    output = io.BytesIO()
    frames[0].save(output, "GIF", save_all=True, append_images=frames[1:], loop=0)
    return output.getvalue()


def thumbnail(client: Client, mxc: str, width: int, height: int, **query: Any) -> httpx.Response:
    path = MEDIA + "thumbnail/" + mxc.removeprefix("mxc://")
    return client.get(path, params={"width": width, "height": height, **query})


def opened(response: httpx.Response) -> Image.Image:
    assert response.status_code == 200, response.text
    assert response.headers["content-disposition"].startswith("inline")
    return Image.open(io.BytesIO(response.content))


def incoming(server: Server) -> list[str]:
    """The names of what is being uploaded just now."""
    return [path.name for path in (server.data / "media" / "incoming").iterdir()]


def stored(server: Server) -> list[Path]:
    """All files of uploads."""
    folder = server.data / "media"
    return [path for path in folder.glob("??/*") if path.is_file()]


# ── 22.1  Receiving a file ───────────────────────────────────────────────────


def test_what_is_uploaded_is_downloaded(alice: Client, bob: Client) -> None:
    data = secrets.token_bytes(300_000)
    mxc = alice.upload(data, "video/mp4", 'Café "1".mp4')
    response = bob.download(mxc)
    assert response.content == data
    assert response.headers["content-type"] == "video/mp4"
    assert (
        response.headers["content-disposition"]
        == "inline; filename*=utf-8''Caf%C3%A9%20%221%22.mp4"
    )
    assert re.fullmatch(rf"mxc://{re.escape(alice.server.name)}/[A-Za-z0-9_-]+", mxc)


def test_an_upload_without_type_and_name(alice: Client) -> None:
    response = alice.request("POST", UPLOAD, content=b"")
    headers = alice.download(ok(response)["content_uri"]).headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"] == "attachment"
    assert headers["content-length"] == "0"


def test_the_same_content_is_on_the_disk_once(server: Server, alice: Client, bob: Client) -> None:
    data = secrets.token_bytes(5000)
    first, second = alice.upload(data), bob.upload(data, "text/plain")
    assert first != second
    name = hashlib.sha256(data).hexdigest()
    assert [path for path in stored(server) if path.parent.name + path.name == name] == [
        server.data / "media" / name[:2] / name[2:]
    ]
    assert bob.download(first).content == alice.download(second).content == data


def test_uploads_survive_kill_9(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice = register(server)
    kept = [(alice.upload(data), data) for data in map(secrets.token_bytes, (1, 1000, 400_000))]
    (server.data / "media" / "incoming" / "left-over").write_bytes(b"half")
    server.kill9()
    server.start()
    assert incoming(server) == []
    assert all(alice.download(mxc).content == data for mxc, data in kept)
    server.stop()
    server.check()


@slow
def test_large_files_take_constant_memory(new_server: Callable[..., Server]) -> None:
    server = new_server(max_request_size=200_000_000)
    alice = register(server)
    alice.download(alice.upload(b"warm"))
    before = server.peak_rss()
    block = secrets.token_bytes(1_000_000)
    mxc = ok(alice.request("POST", UPLOAD, content=(block for _ in range(100)), timeout=60))[
        "content_uri"
    ]
    assert hashlib.sha256(alice.download(mxc, timeout=60).content).digest() == (
        hashlib.sha256(block * 100).digest()
    )
    assert server.peak_rss() - before < 12


@pytest.mark.parametrize("announced", [True, False])
def test_sec_38_unbounded_upload(new_server: Callable[..., Server], announced: bool) -> None:
    """An endless body is cut off at max_request_size, whether it says how long it is or not."""
    server = new_server(max_request_size=1_000_000)
    alice = register(server)
    content: Any = (bytes(65536) for _ in range(10_000))
    if announced:
        content = bytes(1_000_001)
    with contextlib.suppress(httpx.TransportError):
        fails(alice.request("POST", UPLOAD, content=content), 413, "M_TOO_LARGE")
    eventually(lambda: not incoming(server))
    assert stored(server) == []
    assert ok(alice.get(MEDIA + "config")) == {"m.upload.size": 1_000_000}
    assert alice.download(alice.upload(bytes(1_000_000))).content == bytes(1_000_000)


def test_a_client_that_goes_away_leaves_nothing(server: Server, alice: Client) -> None:
    head = (
        f"POST {UPLOAD} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {alice.token}\r\n"
        "Content-Length: 5000000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + bytes(500_000))
        eventually(lambda: incoming(server))
    eventually(lambda: not incoming(server))


def test_a_full_disk_is_a_clear_error(new_server: Callable[..., Server]) -> None:
    server = new_server(start=False)
    python = " ".join(server.command)
    server.command = ["sh", "-c", f"ulimit -f 12000; exec {python}"]  # files of up to 6 or 12 MB
    server.start()
    alice = register(server)
    body = fails(alice.request("POST", UPLOAD, content=bytes(15_000_000)), 507)
    assert "disk" in body["error"]
    eventually(lambda: not incoming(server))
    assert stored(server) == []
    assert alice.download(alice.upload(b"small")).content == b"small"


def test_guests_and_strangers_do_not_upload(nobody: Client) -> None:
    fails(nobody.request("POST", UPLOAD, content=b"x"), 401, "M_MISSING_TOKEN")
    fails(nobody.post("/_matrix/media/v1/create"), 401, "M_MISSING_TOKEN")


# ── 22.2  Headers that cannot hurt ───────────────────────────────────────────

HOSTILE_TYPES: Final = [
    "text/html",
    "TEXT/HTML",
    "text/html;charset=utf-8",
    "text/html ; charset=utf-8",
    "image/svg+xml",
    "application/xhtml+xml",
    "application/pdf",
    "text/xml",
    "application/javascript",
    "multipart/x-mixed-replace; boundary=x",
    "text/plain, text/html",
    "text/plain\ttext/html",
    "text/plain;,text/html",
    "nonsense",
    "image/png" + "; a=b" * 100,
]
HOSTILE_NAMES: Final = [
    'a"b.png',
    "a\r\nSet-Cookie: x=y\r\n.png",
    "../../../etc/passwd",
    "..\\..\\boot.ini",
    "a;b=c.html",
    "\u202egnp.exe",
    "x" * 3000,
    "%0d%0a.png",
    "\u0085\u2028",
    "日本.png",
]


@pytest.mark.parametrize("content_type", HOSTILE_TYPES)
def test_sec_35_stored_scripts_never_run(alice: Client, content_type: str) -> None:
    """What could run is an attachment, and whatever it is, it is sandboxed and not sniffed."""
    mxc = alice.upload(b"<script>alert(1)</script>", content_type, "page.html")
    for response in (alice.download(mxc), alice.download(mxc + "/picture.png")):
        assert response.headers["content-disposition"].startswith("attachment; filename=")
        assert_harmless(response)


@pytest.mark.parametrize("filename", HOSTILE_NAMES)
def test_sec_35_file_names_stay_in_their_header(alice: Client, filename: str) -> None:
    mxc = alice.upload(b"x", "image/png", filename)
    for url in (mxc, f"{mxc}/{quote(filename, safe='')}"):
        response = alice.download(url)
        assert_harmless(response)
        assert "set-cookie" not in response.headers
        shown = response.headers["content-disposition"]
        assert re.fullmatch(
            r"inline(; filename=\"[^\"\\/]*\"|; filename\*=utf-8''[^/\\;\" ]*)?", shown
        )


def assert_harmless(response: httpx.Response) -> None:
    assert response.status_code == 200, response.text
    headers = response.headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("sandbox; default-src 'none';")
    assert "script-src 'none'" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "cross-origin"


def test_sec_40_media_is_never_kept_by_proxies(alice: Client) -> None:
    """Shared caches must not keep what takes an access token."""
    mxc = alice.upload(png(200, 200), "image/png")
    for response in (alice.download(mxc), thumbnail(alice, mxc, 32, 32, method="crop")):
        assert "private" in response.headers["cache-control"]
        assert "immutable" in response.headers["cache-control"]
        again = alice.get(
            response.request.url.raw_path.decode(),
            headers={"If-None-Match": response.headers["etag"]},
        )
        assert (again.status_code, again.content) == (304, b"")


def test_every_type_that_only_shows_is_inline(alice: Client) -> None:
    for kind in ("text/plain", "text/plain; charset=utf-8", "image/jpeg", "audio/ogg", "VIDEO/mp4"):
        response = alice.download(alice.upload(b"x", kind))
        assert response.headers["content-disposition"] == "inline"
        assert response.headers["content-type"] == kind


@given(st.text())
def test_a_content_type_is_sane_or_replaced(text: str) -> None:
    safe = conduit.safe_content_type(text)
    assert safe.isascii()
    assert safe.isprintable()
    assert conduit.safe_content_type(safe) == safe
    assert safe in (text.strip(" \t"), "application/octet-stream")


@given(st.text())
def test_a_content_disposition_is_one_header(text: str) -> None:
    name = conduit.safe_filename(text)
    shown = conduit.content_disposition("image/png", name)
    assert shown.isascii()
    assert shown.isprintable()
    if name is not None and "*=" in shown:
        assert unquote(shown.partition("''")[2]) == name
    elif name is not None:
        assert shown == f'inline; filename="{name}"'


# ── 22.3  Thumbnails ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("width", "height", "method", "size"),
    [
        (32, 32, "crop", (32, 32)),
        (33, 33, "crop", (96, 96)),
        (96, 96, "crop", (96, 96)),
        (100, 100, "crop", (360, 240)),  # no kept crop is that large: the whole picture
        (90, 60, "crop", (360, 240)),  # nor is one of this shape
        (320, 240, "scale", (360, 240)),
        (321, 240, "scale", (720, 480)),
        (640, 480, "scale", (720, 480)),
        (800, 600, "scale", (900, 600)),
        (801, 600, "scale", (1800, 1200)),  # never larger than it is: the original
        (5000, 5000, "scale", (1800, 1200)),
    ],
)
def test_thumbnails_are_never_smaller_than_asked(
    alice: Client, width: int, height: int, method: str, size: tuple[int, int]
) -> None:
    """Spec: "Servers MUST NOT return a smaller thumbnail than requested", nor an upscaled one."""
    mxc = alice.upload(picture("JPEG", 1800, 1200), "image/jpeg", "photo.jpg")
    for _ in range(2):  # made, then kept
        response = thumbnail(alice, mxc, width, height, method=method)
        assert opened(response).size == size
        assert response.headers["content-type"] == "image/jpeg"
        assert_harmless(response)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_thumbnails_of_each_format(server: Server, alice: Client, kind: str) -> None:
    data = picture(kind, 500 + secrets.randbelow(100), 400)
    mxc = alice.upload(data, "application/octet-stream")  # what the uploader says does not count
    assert opened(thumbnail(alice, mxc, 96, 96, method="crop")).size == (96, 96)
    name = hashlib.sha256(data).hexdigest()
    kept = server.data / "media" / "thumbnails" / name[:2] / f"{name[2:]}-96x96-crop"
    assert Image.open(kept).size == (96, 96)


def test_a_small_picture_is_its_own_thumbnail(alice: Client) -> None:
    data = picture("PNG", 50, 40)
    mxc = alice.upload(data, "image/png")
    assert thumbnail(alice, mxc, 96, 96, method="crop").content == data
    assert thumbnail(alice, mxc, 800, 600).content == data
    assert opened(thumbnail(alice, mxc, 32, 32, method="crop")).size == (32, 32)


def test_a_thumbnail_is_turned_as_the_camera_was(alice: Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    mxc = alice.upload(picture("JPEG", 1200, 900, exif=exif), "image/jpeg")
    image = opened(thumbnail(alice, mxc, 320, 240))
    assert image.size == (320, 427)
    assert image.getexif().get(0x0112, 1) == 1


def test_transparency_stays(alice: Client) -> None:
    output = io.BytesIO()
    Image.new("RGBA", (400, 400), (255, 0, 0, 0)).save(output, "PNG")
    image = opened(
        thumbnail(alice, alice.upload(output.getvalue(), "image/png"), 32, 32, method="crop")
    )
    assert image.format == "PNG"
    assert image.getpixel((16, 16))[3] == 0  # type: ignore[index]  # of an RGBA picture


def test_animated_thumbnails_only_on_demand(alice: Client) -> None:
    mxc = alice.upload(moving_gif(400, 400), "image/gif")
    for wanted, moves in ((None, False), ("false", False), ("true", True)):
        query = {} if wanted is None else {"animated": wanted}
        image = opened(thumbnail(alice, mxc, 96, 96, method="crop", **query))
        assert bool(getattr(image, "is_animated", False)) is moves
    small = alice.upload(moving_gif(20, 20), "image/gif")
    assert not getattr(opened(thumbnail(alice, small, 96, 96)), "is_animated", False)


@pytest.mark.parametrize(
    "query",
    [
        {"width": "32"},
        {"height": "32"},
        {"width": "-1", "height": "32"},
        {"width": "0", "height": "32"},
        {"width": "x", "height": "32"},
        {"width": "32", "height": "32", "method": "stretch"},
        {"width": "32", "height": "32", "animated": "maybe"},
    ],
)
def test_senseless_thumbnail_requests(alice: Client, query: dict[str, str]) -> None:
    mxc = alice.upload(png(64, 64), "image/png")
    assert alice.get(MEDIA + "thumbnail/" + mxc[6:], params=query).status_code == 400


def test_sec_37_bombs_are_not_decoded(server: Server, alice: Client) -> None:
    """A picture of 900 megapixels in 100 bytes, or one that is broken, costs nothing."""
    alice.upload(b"warm")
    before = server.peak_rss()
    bomb = alice.upload(png(30_000, 30_000, honest=False), "image/png")
    fails(thumbnail(alice, bomb, 32, 32), 413, "M_TOO_LARGE")
    broken = alice.upload(png(3000, 3000, honest=False), "image/png")
    fails(thumbnail(alice, broken, 32, 32), 400, "M_UNKNOWN")
    assert server.peak_rss() - before < 60


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "ICO", "PPM", "PDF", "TGA", "DDS", "PCX"])
def test_sec_37_other_decoders_see_nothing(alice: Client, kind: str) -> None:
    """Only PNG, JPEG, GIF and WebP, by their first bytes, whatever type the uploader claims."""
    mxc = alice.upload(picture(kind, 64, 64), "image/png")
    fails(thumbnail(alice, mxc, 32, 32), 400, "M_UNKNOWN")


def test_sec_37_compressed_bodies_stay_compressed(alice: Client) -> None:
    data = zlib.compress(bytes(1_000_000))
    headers = {"Content-Encoding": "deflate", "Content-Type": "image/png"}
    response = alice.request("POST", UPLOAD, content=data, headers=headers)
    if response.status_code == 200:  # refusing it would do as well
        assert alice.download(response.json()["content_uri"]).content == data


@given(st.binary(max_size=200), st.sampled_from([b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff"]))
def test_sec_37_no_bytes_break_the_thumbnailer(tail: bytes, magic: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.write_bytes(magic + tail)
        with contextlib.suppress(conduit.MatrixError):
            conduit.make_thumbnail(
                source, Path(folder) / "thumbs" / "t", conduit.THUMBNAIL_SIZES[0], None
            )


def test_without_pillow_the_original_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduit, "load_pillow", lambda: None)
    size = conduit.THUMBNAIL_SIZES[0]

    def serve(data: bytes, animated: bool | None = None) -> Any:
        (tmp_path / "source").write_bytes(data)
        return conduit.make_thumbnail(tmp_path / "source", tmp_path / "target", size, animated)

    assert serve(picture("WEBP", 99, 99)) == (tmp_path / "source", "image/webp")
    assert serve(moving_gif(99, 99), True) == (tmp_path / "source", "image/gif")
    for data, animated in ((b"<svg/>", None), (moving_gif(99, 99), False)):
        with pytest.raises(conduit.MatrixError) as caught:
            serve(data, animated)
        assert caught.value.status == 400


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(["scale", "crop"]))
def test_the_chosen_size_covers_the_request(width: int, height: int, method: str) -> None:
    size = conduit.choose_size(width, height, method)
    assert size in conduit.THUMBNAIL_SIZES
    assert size[0] >= width
    assert size[1] >= height
    assert size[2] == "scale" or (method == "crop" and width == height)


# ── 22.4  The media of this server ───────────────────────────────────────────


def create_media(client: Client) -> str:
    answer = ok(client.post("/_matrix/media/v1/create"))
    assert answer["unused_expires_at"] > time.time() * 1000 + 3_600_000
    return str(answer["content_uri"])


def put_media(client: Client, mxc: str, data: bytes, **query: Any) -> httpx.Response:
    path = f"{UPLOAD}/{mxc.removeprefix('mxc://')}"
    return client.request(
        "PUT", path, content=data, params=query, headers={"Content-Type": "text/plain"}
    )


def test_an_id_now_and_the_content_later(alice: Client, bob: Client) -> None:
    mxc = create_media(alice)
    fails(bob.download(mxc, timeout_ms=1), 504, "M_NOT_YET_UPLOADED")
    fails(thumbnail(bob, mxc, 32, 32, timeout_ms=1), 504, "M_NOT_YET_UPLOADED")
    fails(put_media(bob, mxc, b"mine"), 403, "M_FORBIDDEN")
    assert ok(put_media(alice, mxc, b"here", filename="a.txt")) == {}
    response = bob.download(mxc)
    assert (response.content, response.headers["content-type"]) == (b"here", "text/plain")
    assert response.headers["content-disposition"] == 'inline; filename="a.txt"'
    fails(put_media(alice, mxc, b"again"), 409, "M_CANNOT_OVERWRITE_MEDIA")
    fails(put_media(alice, alice.upload(b"x"), b"again"), 409, "M_CANNOT_OVERWRITE_MEDIA")
    assert bob.download(mxc).content == b"here"


def test_unknown_ids_cannot_be_uploaded_to(alice: Client) -> None:
    fails(put_media(alice, f"mxc://{alice.server.name}/invented", b"x"), 404, "M_NOT_FOUND")
    fails(put_media(alice, "mxc://elsewhere.example/invented", b"x"), 404, "M_NOT_FOUND")


def test_a_download_waits_for_its_upload(alice: Client, bob: Client) -> None:
    mxc = create_media(alice)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.download, mxc, timeout_ms=20_000) for client in (alice, bob)]
        time.sleep(0.3)
        assert not any(future.done() for future in waiting)
        ok(put_media(alice, mxc, b"at last"))
        assert [future.result(5).content for future in waiting] == [b"at last"] * 2


def test_two_uploads_to_one_id(alice: Client) -> None:
    mxc = create_media(alice)
    with ThreadPoolExecutor(4) as pool:
        bodies = [bytes([number]) * 300_000 for number in range(4)]
        answers = list(pool.map(lambda body: put_media(alice, mxc, body), bodies))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    winner = next(body for body, answer in zip(bodies, answers, strict=True) if answer.is_success)
    assert alice.download(mxc).content == winner


def test_pending_uploads_are_limited(alice: Client) -> None:
    first = create_media(alice)
    for _ in range(conduit.PENDING_UPLOADS - 1):
        create_media(alice)
    fails(alice.post("/_matrix/media/v1/create"), 429, "M_LIMIT_EXCEEDED")
    ok(put_media(alice, first, b"done"))
    create_media(alice)


def test_unused_ids_expire(new_server: Callable[..., Server]) -> None:
    server = new_server()
    alice = register(server)
    mxc = create_media(alice)
    server.stop()
    with contextlib.closing(sqlite3.connect(server.database)) as database:
        database.execute("UPDATE media SET expires_ts = 1 WHERE expires_ts IS NOT NULL")
        database.commit()
    server.start()
    fails(alice.download(mxc), 404, "M_NOT_FOUND")
    fails(put_media(alice, mxc, b"late"), 404, "M_NOT_FOUND")


def test_lost_files_are_found(new_server: Callable[..., Server]) -> None:
    """A file that is missing is a 404 and a line in the log, and --check names it."""
    server = new_server()
    alice = register(server)
    mxc, kept = alice.upload(picture("PNG", 50, 50)), alice.upload(b"kept")
    lost = next(path for path in stored(server) if path.stat().st_size > 10)
    lost.unlink()
    fails(alice.download(mxc), 404, "M_NOT_FOUND")
    fails(thumbnail(alice, mxc, 32, 32), 400, "M_UNKNOWN")
    assert alice.download(kept).content == b"kept"
    assert str(lost) in server.log
    server.stop()
    problem = f"media {mxc.rpartition('/')[2]}: its file is missing or has another size"
    assert conduit.check_database(server.data) == [problem]


# ── 22.5  Downloading ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wanted", "status", "part", "shown"),
    [
        ("bytes=0-9", 206, slice(0, 10), "bytes 0-9/1000"),
        ("bytes=990-", 206, slice(990, 1000), "bytes 990-999/1000"),
        ("bytes=-10", 206, slice(990, 1000), "bytes 990-999/1000"),
        ("bytes=500-5000", 206, slice(500, 1000), "bytes 500-999/1000"),
        ("bytes=5-4", 200, slice(0, 1000), None),
        ("lines=1-2", 200, slice(0, 1000), None),
    ],
)
def test_ranges_of_media(
    alice: Client, wanted: str, status: int, part: slice, shown: str | None
) -> None:
    data = secrets.token_bytes(1000)
    response = alice.download(alice.upload(data, "video/mp4"), headers={"Range": wanted})
    assert response.status_code == status
    assert response.content == data[part]
    assert response.headers.get("content-range") == shown
    assert_harmless_part(response)


def assert_harmless_part(response: httpx.Response) -> None:
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["accept-ranges"] == "bytes"


def test_a_range_outside_of_the_file(alice: Client) -> None:
    response = alice.download(alice.upload(b"12345"), headers={"Range": "bytes=5-"})
    assert response.status_code == 416
    assert response.headers["content-range"] == "bytes */5"


def test_head_is_get_without_the_bytes(alice: Client) -> None:
    mxc = alice.upload(b"12345", "text/plain")
    response = alice.request("HEAD", MEDIA + "download/" + mxc[6:])
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == "5"


def test_a_download_under_another_name(alice: Client) -> None:
    mxc = alice.upload(b"x", "image/png", "one.png")
    response = alice.download(mxc + "/two.png")
    assert response.headers["content-disposition"] == 'inline; filename="two.png"'


def test_media_takes_a_token(alice: Client, nobody: Client) -> None:
    mxc = alice.upload(png(64, 64), "image/png")
    fails(nobody.download(mxc), 401, "M_MISSING_TOKEN")
    fails(thumbnail(nobody, mxc, 32, 32), 401, "M_MISSING_TOKEN")
    fails(nobody.get(MEDIA + "config"), 401, "M_MISSING_TOKEN")


@pytest.mark.parametrize(
    "media_id",
    [
        "..",
        "%2e%2e%2f%2e%2e%2fconduit.db",
        "..%2f..%2f..%2fetc%2fpasswd",
        "..%5c..%5cconduit.db",
        "%00",
        "abc%00.png",
        "a" * 4000,
        "CON",
        "NUL.txt",
        "%c0%ae%c0%ae",
        "incoming",
        "thumbnails",
        "a%20b",
        "~root",
    ],
)
def test_sec_36_ids_are_no_paths(server: Server, alice: Client, media_id: str) -> None:
    """No id, and no server name, leads anywhere but to a row; and files have names of our own."""
    for name in (server.name, "..", "%2e%2e", "127.0.0.1", ""):
        for kind in ("download", "thumbnail"):
            for prefix in (MEDIA, "/_matrix/media/v3/"):
                path = f"{prefix}{kind}/{name}/{media_id}?width=32&height=32&timeout_ms=0"
                assert alice.get(path).status_code in (400, 404)
    for path in stored(server):
        assert re.fullmatch(r"[0-9a-f]{64}", path.parent.name + path.name)


def test_media_of_other_servers_is_not_there_yet(alice: Client) -> None:
    fails(alice.download("mxc://elsewhere.example/abc"), 404, "M_NOT_FOUND")
    fails(thumbnail(alice, "mxc://elsewhere.example/abc", 32, 32), 404, "M_NOT_FOUND")


# ── 22.6  The frozen endpoints ───────────────────────────────────────────────


@pytest.mark.parametrize("version", ["v3", "r0", "v1"])
def test_the_old_paths_want_a_token_too(alice: Client, nobody: Client, version: str) -> None:
    mxc = alice.upload(png(64, 64), "image/png", "a.png")
    old = f"/_matrix/media/{version}/"
    size = "?width=32&height=32&method=crop"
    for path in (f"download/{mxc[6:]}", f"download/{mxc[6:]}/b.png", f"thumbnail/{mxc[6:]}{size}"):
        fails(nobody.get(old + path), 404, "M_NOT_FOUND")
        assert_harmless(alice.get(old + path))
        assert_harmless(alice.get(old + path, params=None))
    assert ok(alice.get(old + "config"))["m.upload.size"] > 0
    allowed = {"allow_redirect": "true", "allow_remote": "false"}
    assert alice.get(f"{old}download/{mxc[6:]}", params=allowed).status_code == 200


def test_media_is_where_old_clients_look_too(alice: Client) -> None:
    base = "/_matrix/client/unstable/org.matrix.msc3916/media/"
    old = "/_matrix/media/unstable/fi.mau.msc2246/"
    mxc = ok(alice.post(old + "create"))["content_uri"]
    place = mxc.removeprefix("mxc://")
    data = picture("PNG", 50, 50)
    ok(alice.put(f"{old}upload/{place}", content=data, headers={"Content-Type": "image/png"}))
    assert alice.get(f"{base}download/{place}").content == data
    assert alice.get(f"{base}download/{place}/cat.png").content == data
    assert opened(alice.get(f"{base}thumbnail/{place}", width=32, height=32, method="crop"))
    assert ok(alice.get(base + "config"))["m.upload.size"] > 0
    fails(alice.get(base + "preview_url", url="https://example.org"), 403, "M_FORBIDDEN")


def fetched(server: InnerServer, data: bytes, name: str = "", age_days: float = 0) -> str:
    """Put a file among the media as if it came from elsewhere so long ago; its media id."""

    async def chunks() -> AsyncIterator[bytes]:
        yield data

    async def put() -> str:
        upload = (*await conduit.receive_file(server.hs, chunks()), "text/plain", None)
        media_id = server.hs.media.add(conduit.UserNid(1), upload, None)
        used = time.time() * 1000 - age_days * 86_400_000
        with server.hs.db.write():
            sql = "UPDATE media SET server = ?, last_access_ts = ? WHERE media_id = ?"
            server.hs.db.execute(sql, (name, int(used), media_id))
        return str(media_id)

    return cast(str, server.call(put()))


def media_left(server: InnerServer) -> list[str]:
    server.call(server.hs.media.sweep())
    rows = server.do(server.hs.db.all, "SELECT media_id FROM media ORDER BY media_nid")
    return [media_id for (media_id,) in rows]


def nid_of(server: InnerServer, media_id: str) -> int:
    sql = "SELECT media_nid FROM media WHERE media_id = ?"
    return cast(int, server.do(server.hs.db.value, sql, (media_id,)))


def test_fetched_media_goes_by_its_last_use(inner: Callable[..., InnerServer]) -> None:
    server = inner(accept)
    own = fetched(server, b"own", "", 400)
    old = fetched(server, b"old", "far.example", 31)
    fresh = fetched(server, b"fresh", "far.example", 29)
    server.do(server.hs.media.expire, None, None)
    assert media_left(server) == [own, old, fresh]
    server.do(server.hs.media.expire, 30, None)
    assert media_left(server) == [own, fresh]
    assert len(stored(server)) == 2


def test_fetched_media_stays_within_its_budget(inner: Callable[..., InnerServer]) -> None:
    server = inner(accept)
    own = fetched(server, bytes(900_000), "", 99)
    ids = [fetched(server, bytes([n]) * 400_000, "far.example", 10 - n) for n in range(4)]
    server.do(server.hs.media.expire, None, 1)
    assert media_left(server) == [own, *ids[2:]]
    server.do(server.hs.media.expire, None, 1)
    assert media_left(server) == [own, *ids[2:]]


def test_a_file_goes_with_its_last_media_id(inner: Callable[..., InnerServer]) -> None:
    server = inner(accept)
    alice = register(server)
    mxc = alice.upload(picture("PNG", 200, 200), "image/png")
    thumbnail(alice, mxc, 32, 32, method="crop")
    again = alice.upload(picture("PNG", 200, 200), "image/png")
    first, second = (nid_of(server, uri.rpartition("/")[2]) for uri in (mxc, again))
    assert server.do(server.hs.media.delete, [first]) == 1
    media_left(server)
    fails(alice.download(mxc), 404, "M_NOT_FOUND")
    assert alice.download(again).status_code == 200
    assert server.do(server.hs.media.delete, [first, second]) == 1
    assert media_left(server) == []
    assert stored(server) == []
    assert not list((server.data / "media" / "thumbnails").glob("*/*"))


def test_media_for_admins_to_delete(inner: Callable[..., InnerServer]) -> None:
    server = inner(accept)
    alice = register(server)
    mxc = alice.upload(b"mine")
    there = fetched(server, b"theirs", "far.example", 5)
    select, later = server.hs.media.select, int(time.time() * 1000) + 1000
    nid = server.do(server.hs.db.find_user_nid, alice.user_id)
    own = nid_of(server, mxc.rpartition("/")[2])
    assert server.do(select, user_nid=nid, before=later) == [own]
    theirs = [nid_of(server, there)]
    assert server.do(select, server="far.example", before=later) == theirs
    assert server.do(select, before=later) == [own]
    assert server.do(select, before=5) == []
    room_id = alice.create_room()
    contents = {"url": mxc, "x": [mxc, f"mxc://far.example/{there}", "mxc://test.example/none"]}
    event = server.do(server.hs.rooms.event, alice.send(room_id, "m.room.message", contents))
    assert sorted(server.do(server.hs.media.of_event, event)) == sorted([own, *theirs])
    content = {"url": mxc, "info": {"thumbnail_url": "mxc://a/b", "x": ["mxc://c/d/e", 5]}}
    assert sorted(conduit.media_in(content)) == sorted([("a", "b"), tuple(mxc[6:].split("/"))])


def test_media_in_quarantine(inner: Callable[..., InnerServer]) -> None:
    server = inner(accept)
    alice = register(server)
    mxc = alice.upload(picture("PNG", 99, 99), "image/png")
    nids = [nid_of(server, mxc.rpartition("/")[2])]
    server.do(server.hs.media.quarantine, nids)
    fails(alice.download(mxc), 404, "M_NOT_FOUND")
    fails(thumbnail(alice, mxc, 32, 32), 404, "M_NOT_FOUND")
    server.do(server.hs.media.quarantine, nids, False)
    assert alice.download(mxc).status_code == 200


# ═════════════════════════════════════════════════════════════════════════════
#  50. PREVIEWS
# ═════════════════════════════════════════════════════════════════════════════

PAGE: Final = """<!doctype html><html><head><meta charset="utf-8"><title>The  title
of it</title><meta property="og:image" content="/cat.png"><meta name="description" content="Words">
<meta property="og:site_name" content="Site"><meta property="og:image:width" content="7"></head>
<body><nav><p>Menu</p></nav><h1>Heading</h1><p>First</p><p>Second</p></body></html>"""


def page(text: str, kind: str = "text/html", **headers: str) -> Outcome:
    return Outcome(status=200, headers={"content-type": kind, **headers}, body=text.encode())


def preview(client: Client, url: str) -> httpx.Response:
    return client.get(MEDIA + "preview_url", params={"url": url})


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        (PAGE, {"og:title": "The title of it", "og:description": "Words"}),
        ("<h1>Only <b>this</b></h1><p>and that", {"og:title": "Only this"}),
        ("<header><h1>No</h1></header><p>Yes &amp; so</p>", {"og:description": "Yes & so"}),
        ('<meta property="OG:Title" content=" a ">', {"og:title": "a"}),
        ('<meta name="twitter:title" content="t"><title>x</title>', {"og:title": "t"}),
        ("<script>var x = '<title>no</title>'</script>", {}),
        ("no page at all", {}),
        ("<![foo[ broken", {}),
    ],
)
def test_what_a_page_says(html: str, expected: Json) -> None:
    found = conduit.read_html(html.encode(), "text/html")
    shown = {k: v for k, v in found.items() if k in ("og:title", "og:description")}
    assert shown.items() >= expected.items()
    assert expected or not shown


@pytest.mark.parametrize(
    ("raw", "content_type"),
    [
        ("Grüße".encode("latin-1"), "text/html; charset=ISO-8859-1"),
        ("Grüße".encode(), 'text/html; charset="utf-8"'),
        ("Grüße".encode(), "text/html"),
        ("Grüße".encode(), "text/html; charset=punycode"),
        (b'<meta charset="windows-1252">' + "Grüße".encode("cp1252"), "text/html"),
    ],
)
def test_encodings_of_pages(raw: bytes, content_type: str) -> None:
    found = conduit.read_html(b"<title>" + raw + b"</title>", content_type)
    assert found["og:title"] == "Grüße"


@given(st.binary(max_size=300) | st.text("<>/!-[]&;=\"' apmetitlscr", max_size=300).map(str.encode))
def test_no_bytes_break_the_reader_of_pages(raw: bytes) -> None:
    found = conduit.read_html(raw, "text/html")
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.mark.parametrize(
    "text",
    [
        *(
            part * 200_000
            for part in ("<div>", "<", "<a ", "<!--", "</", "<![", "&#", "<?", "<a b=")
        ),
        "<meta " + "a=b " * 200_000,
        "<a" + '"' * 500_000,
    ],
    ids=lambda text: text[:8],
)
def test_sec_39_hostile_pages_take_no_time(text: str) -> None:
    began = time.process_time()
    conduit.read_html(text.encode(), "text/html")
    assert time.process_time() - began < 5


def test_a_preview_is_made_once_with_its_picture(inner: Callable[..., InnerServer]) -> None:
    answers = {
        "http://news.example/a": Outcome(
            status=301, headers={"location": "https://www.news.example/b"}, body=b""
        ),
        "https://www.news.example/b": page(PAGE),
        "https://www.news.example/cat.png": Outcome(status=200, headers={}, body=png(3, 2)),
    }
    server = inner(
        lambda url, sent: answers[url], url_preview_allowlist=["news.example", "*.news.example"]
    )
    alice = register(server)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ok(preview(alice, "http://news.example/a")), range(4)))
    assert len(server.world.requests) == 3
    assert all(each == found[0] for each in found)
    picture = found[0].pop("og:image")
    assert found[0] == {
        **{"og:title": "The title of it", "og:description": "Words", "og:site_name": "Site"},
        **{"og:image:type": "image/png", "matrix:image:size": len(png(3, 2))},
        "og:image:width": 7,
    }
    assert alice.download(picture).content == png(3, 2)
    ok(alice.get("/_matrix/media/v3/preview_url", url="http://news.example/a#part"))
    assert len(server.world.requests) == 3
    age_previews(server)
    server.do(server.hs.previews.maintain)
    server.call(server.hs.media.sweep())
    fails(alice.download(picture), 404)
    assert stored(server) == []


def age_previews(server: InnerServer) -> None:
    """Let all previews be too old."""

    def age() -> None:
        with server.hs.db.write():
            server.hs.db.execute("UPDATE previews SET expires_ts = 1")

    server.do(age)


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/",
        "https://news.example.evil.example/",
        "https://news.example@evil.example/",
        "https://user@news.example/",
        "ftp://news.example/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "news.example",
        "https://[::1",
        "https://news.example/" + "x" * 3000,
    ],
)
def test_sec_34_only_listed_pages_are_looked_at(
    inner: Callable[..., InnerServer], url: str
) -> None:
    server = inner(lambda url, sent: page(PAGE), url_preview_allowlist=["news.example"])
    alice = register(server)
    fails(preview(alice, url), 403, "M_FORBIDDEN")
    assert server.world.requests == []


def test_sec_34_redirects_are_held_against_the_list(inner: Callable[..., InnerServer]) -> None:
    moved = Outcome(status=302, headers={"location": "http://169.254.169.254/"}, body=b"")
    loop = Outcome(status=302, headers={"location": "/round"}, body=b"")
    server = inner(
        lambda url, sent: loop if "round" in url else moved, url_preview_allowlist=["news.example"]
    )
    alice = register(server)
    assert ok(preview(alice, "http://news.example/")) == {}
    assert len(server.world.requests) == 1
    assert ok(preview(alice, "http://news.example/round")) == {}
    assert len(server.world.requests) <= 2 + conduit.MAX_REDIRECTS


@pytest.mark.parametrize(
    "answer",
    [
        page("<p>gone", "text/html"),
        page("%PDF", "application/pdf"),
        Outcome(status=404, headers={}, body=b""),
        conduit.MatrixError(502, "M_UNKNOWN", "no answer"),
        page('<meta property="og:image" content="http://[">'),
        page('<meta property="og:image" content="javascript:x">'),
        page('<meta property="og:image" content="/loop">'),
    ],
)
def test_pages_of_which_little_can_be_said(inner: Callable[..., InnerServer], answer: Any) -> None:
    server = inner(lambda url, sent: answer, url_preview_allowlist=["*"])
    alice = register(server)
    assert ok(preview(alice, "https://a.example/")).keys() <= {"og:description"}
    fails(alice.get(MEDIA + "preview_url"), 400, "M_MISSING_PARAM")


def test_previews_are_off_by_default(alice: Client) -> None:
    fails(preview(alice, "https://example.org/"), 403, "M_FORBIDDEN")
    shown = ok(alice.get("capabilities"))["capabilities"]
    assert shown["io.element.msc4452.preview_url"] == {"enabled": False}


class Outside(http.server.BaseHTTPRequestHandler):
    """A push gateway and a web site over TLS."""

    pushes: ClassVar[list[Json]] = []

    def answer(self, data: bytes, kind: str = "text/html", status: int = 200) -> None:
        self.send_response(status)
        for name, value in (("Type", kind), ("Length", f"{len(data)}")):
            self.send_header(f"Content-{name}", value)
        self.send_header("Location", "/page")
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.pushes.append(sent["notification"])
        self.answer(b'{"rejected": []}', "application/json")

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.answer(b"", status=302)
        elif self.path == "/page":
            self.answer(PAGE.encode())
        else:
            self.answer(png(3, 2), "image/png")

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def outside(authority: Authority) -> Iterator[str]:
    """Where the gateway and the web site are."""
    certs, key = authority.certify("localhost", "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Outside) as made:
        made.socket = context.wrap_socket(made.socket, server_side=True)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"https://localhost:{made.server_port}"
        made.shutdown()


@pytest.mark.skipif(not hasattr(conduit, "HttpClient"), reason="there is no HTTP client yet")
def test_sec_34_pushes_and_previews_go_out_but_not_to_refused_addresses(
    authority: Authority, outside: str, tmp_path: Path
) -> None:
    server = Server(
        tmp_path / "server",
        ip_range_denylist=[],
        url_preview_allowlist=["localhost"],
        allow_open_registration=True,
    )
    server.environment["SSL_CERT_FILE"] = str(authority.file)
    server.start()
    try:
        alice, bob = register(server), register(server)
        room_id = bob.room_with(alice)
        ok(alice.post("pushers/set", pusher(data={"url": f"{outside}/_matrix/push/v1/notify"})))
        ids = [bob.send_text(room_id, f"{n}") for n in range(3)]
        eventually(lambda: [push.get("event_id") for push in Outside.pushes] == ids)
        server.kill9()
        server.start()
        ok(alice.post(("rooms", room_id, "receipt", "m.read", ids[-1])))
        eventually(lambda: Outside.pushes[-1]["counts"] == {"unread": 0})
        found = ok(preview(alice, f"{outside}/moved"))
        assert found["og:title"] == "The title of it"
        assert alice.download(found["og:image"]).content == png(3, 2)
        server.write_config(ip_range_denylist=["127.0.0.0/8", "::1/128"])
        server.restart()
        pushed = len(Outside.pushes)
        bob.send_text(room_id, "to a refused address")
        assert ok(preview(alice, f"{outside}/page")) == {}
        time.sleep(1)
        assert len(Outside.pushes) == pushed
        server.assert_clean_log()
    finally:
        server.stop()


# ═════════════════════════════════════════════════════════════════════════════
#  52. APPLICATION SERVICES
# ═════════════════════════════════════════════════════════════════════════════

REGISTRATIONS: Final = {
    "mautrix": r"""
id: telegram
url: http://localhost:29317
as_token: WgPQnZr5Wk2PYjYTvcVJZhiSkYNMPGzBTHRdMlxYhKXm7tSvLuLy2jRDs3cMXIVG
hs_token: 8kNGqD1cNxQbF2WYrmAn0sT0cKfLJp9S6gEMqxuEwFgXnZeTFBWzDP3dCNQyhAGk
sender_localpart: rMtJQVKz0DlDJCzV1QaUZbtF6Ydwybmo
rate_limited: false
namespaces:
    users:
        - regex: ^@telegrambot:example\.com$
          exclusive: true
        - regex: ^@telegram_.*:example\.com$
          exclusive: true
de.sorunome.msc2409.push_ephemeral: true
receive_ephemeral: true
io.element.msc4190: true
""",
    "appservice-irc": r"""
id: 1c5d6e2bb7f1
hs_token: 43a1dd9c7c0e7d6cb2e0a9de5fbdd4ce1b4a5e5b9d4d5b0f4f4c3d1e2a9b8c7d
as_token: 0e7a1dd9c7c0e7d6cb2e0a9de5fbdd4ce1b4a5e5b9d4d5b0f4f4c3d1e2a9b8c7
namespaces:
  users:
    - exclusive: true
      regex: '@irc_.*:example\.com'
  aliases:
    - exclusive: true
      regex: '#irc_.*:example\.com'
  rooms: []
url: 'http://localhost:9999'
sender_localpart: appservice-irc
rate_limited: false
protocols:
  - irc
de.sorunome.msc2409.push_ephemeral: true
""",
    "appservice-discord": r"""
id: 59c4d1c6d1
hs_token: b6a3
as_token: a8c1-f0
namespaces:
  users:
    - exclusive: true
      regex: '@_discord_.*'
  rooms: []
  aliases:
    - exclusive: true
      regex: '#_discord_.*'
url: 'http://localhost:9005'
sender_localpart: _discord_bot
rate_limited: false
protocols:
  - discord
""",
    "hookshot": r"""
id: matrix-hookshot # This can be anything, but must be unique within your homeserver
as_token: CHANGEME # This again can be a random string
hs_token: "CHANGEME" # ..as can this
namespaces:
  rooms: []
  users: # In the following, foobar is your homeserver's domain
    - regex: "@_github_.*:foobar"
      exclusive: true
    - regex: "@_webhooks_.*:foobar" # Where _webhooks_ is set by userIdPrefix in config.yml
      exclusive: true
  aliases:
    - regex: "#github_.+:foobar"
      exclusive: true

sender_localpart: hookshot
url: "http://localhost:9993" # This should match the bridge.port in your config file
rate_limited: false

# If enabling encryption
"de.sorunome.msc2409.push_ephemeral": true
push_ephemeral: true
"org.matrix.msc3202": true
""",
    "draupnir": r"""
id: "draupnir"
url: "http://localhost:9000"
as_token: "token_abc"
hs_token: "token_def"
sender_localpart: "draupnir-main"
namespaces:
  users:
    - exclusive: true
      regex: '@draupnir_.*'
rate_limited: false
""",
    "heisenbridge": r"""
id: heisenbridge
url: http://127.0.0.1:9898
as_token: NzTcmRIpAzvqlgMvTYDIcDt9mxDqWLnEBsjhTvsFcDxSmwlOlWHmvpOqgKSQZWcM
hs_token: JfdVBOWLkTAhBPVPYPbZxPbOvaBhKyKAsbpqVVHYeOGlRQOyVqCzDUkqaxWEUdHV
rate_limited: false
sender_localpart: heisenbridge
namespaces:
  users:
  - regex: '@hbirc_.*'
    exclusive: true
  aliases: []
  rooms: []
""",
    "by hand": r"""
---
id: "caf\u00e9"
url: null
as_token: >-
  a-token-that-is-folded
hs_token: |
  first
  second

sender_localpart: bot
namespaces: {users: [{regex: "@x.*", exclusive: false}], rooms: [ ]}
rate_limited: True
more:
  - - a
    - b
  -
    c: -12
  - 'it''s'
""",
}
YAML_BITS: Final = [
    *"abz019 :-#'\"[]{},&*!|>%@`~?\\\n\t.=_<$^(",
    *("yes", "on", "1e5", "0x1f", "2020-01-01", "12:30:00", "- ", "  ", "\n\n", "null", "|\n"),
    *("key: ", ".5", "1_000", "\u2028", "\x85", "é", "+1", "-.inf", "0o7", "007", "---\n", "...\n"),
]


def miswritten(text: str, rng: random.Random) -> str:
    """The text with a few characters more, fewer, or in other places."""
    letters = list(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        at, other = rng.randrange(len(letters)), rng.randrange(len(letters))
        match rng.randrange(4):
            case 0:
                letters[at] = ""
            case 1 | 2:
                letters[at] += rng.choice(YAML_BITS)
            case 3:
                letters[at], letters[other] = letters[other], letters[at]
    return "".join(letters)


# ── 52.1  The YAML of registrations ──────────────────────────────────────────


@pytest.mark.parametrize("name", REGISTRATIONS)
def test_registrations_read_as_pyyaml_reads_them(name: str) -> None:
    text = REGISTRATIONS[name]
    for variant in (text, text.strip(), text.replace("\n", "\r\n")):
        assert conduit.YamlReader(variant).document() == yaml.safe_load(variant)
    assert conduit.read_registration(text, "example.com").id


def test_mutated_registrations_read_the_same_or_name_a_line() -> None:
    rng, same, refused = random.Random(5), 0, 0  # noqa: S311  the same each time
    for _ in range(20_000 if os.environ.get("DEEP") else 1_000):
        text = miswritten(rng.choice([*REGISTRATIONS.values()]), rng)
        try:
            found = conduit.YamlReader(text).document()
        except conduit.YamlError as error:
            line = re.match(r"line (\d+): .", str(error))
            assert line is not None, error
            assert 1 <= int(line[1]) <= text.count("\n") + 1
            refused += 1
        else:
            assert repr(found) == repr(yaml.safe_load(text)), text
            same += 1
    assert same > 200
    assert refused > 200


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("id: a\nurl: [", "line 2"),
        ("id: a\n\turl: b", "line 2: tabs"),
        ("id: a\nid: b", "line 2: the key id"),
        ("id: a\n  url: b", "line 2: this is indented too far"),
        ("id: yes", "line 1: yes belongs in quotes"),
        ("id: 012", "line 1: 012 belongs in quotes"),
        ("id: @bot", "line 1: this belongs in quotes"),
        ("id: 'open", "line 1"),
        ("id: *anchor", "line 1"),
        ("a:\n" + "".join(" " * n + "- \n" for n in range(1, 99)), "nested too deeply"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: " + "[[" * 5 + "x", "line 1"),
        ("", "line 1"),
        ("- a", "line 1: a registration begins"),
    ],
)
def test_mistakes_in_yaml_are_told_with_their_line(text: str, complaint: str) -> None:
    with pytest.raises(conduit.YamlError, match=re.escape(complaint)):
        conduit.YamlReader(text).document()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"as_token": None}, "as_token is missing"),
        ({"as_token": 5}, "as_token must be a string"),
        ({"url": "ftp://x"}, "no URL"),
        ({"namespaces": {"users": [{"regex": "(", "exclusive": True}]}}, "no regular expression"),
        ({"namespaces": {"users": [{"regex": "x"}]}}, "exclusive is missing"),
        ({"sender_localpart": "a b"}, "no user id"),
        ({"id": " "}, "must not be empty"),
    ],
)
def test_a_registration_that_is_wrong_is_refused(changes: Json, complaint: str) -> None:
    fields = {**yaml.safe_load(REGISTRATIONS["mautrix"]), **changes}
    text = yaml.safe_dump({key: value for key, value in fields.items() if value is not None})
    with pytest.raises(conduit.MatrixError, match=complaint):
        conduit.read_registration(text, "example.com")


# ── 52.2  A service to talk to ───────────────────────────────────────────────


class Bridge:
    """An application service: what it was sent, and how it answers."""

    def __init__(self, **fields: Any) -> None:
        self.transactions: list[tuple[str, Json]] = []
        self.requests: list[tuple[str, str]] = []
        self.status = 200
        self.answers: dict[str, Callable[[], Any]] = {}  # by path: makes the JSON, or None for 404
        self.prefix = "/_matrix/app/v1"
        bridge = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                status, body = bridge.handle(self, self.rfile.read(length))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        name = unique("br").replace("_", "")
        self.fields = {
            "id": name,
            "url": f"http://127.0.0.1:{self.http.server_port}",
            "as_token": secrets.token_hex(16),
            "hs_token": secrets.token_hex(16),
            "sender_localpart": f"{name}bot",
            "namespaces": {
                "users": [{"regex": f"@{name}_.*", "exclusive": True}],
                "aliases": [{"regex": f"#{name}_.*", "exclusive": True}],
            },
            "rate_limited": False,
            **fields,
        }
        self.id = str(self.fields["id"])

    def handle(self, request: Any, body: bytes) -> tuple[int, bytes]:
        path = request.path
        self.requests.append((request.command, path))
        if request.headers.get("Authorization") != f"Bearer {self.fields['hs_token']}":
            return 403, b'{"errcode": "M_FORBIDDEN"}'
        if not path.startswith(self.prefix):
            return 404, b"{}"
        path = unquote(path.removeprefix(self.prefix)).partition("?access_token")[0]
        if path.startswith("/transactions/"):
            self.transactions.append((path.rpartition("/")[2], json.loads(body)))
            return self.status, b"{}"
        answer = self.answers[path]() if path in self.answers else None
        return (404, b"{}") if answer is None else (200, json.dumps(answer).encode())

    @property
    def events(self) -> list[Json]:
        """The events told so far, each once."""
        bodies = dict(self.transactions).values() if self.status == 200 else []
        return [event for body in bodies for event in body["events"]]

    def told(self, member: str) -> list[Any]:
        """What stood in a member of the transactions' bodies."""
        return [body[member] for _, body in self.transactions if member in body]

    def register_at(self, admin: Client) -> Bridge:
        """Be registered in the admin room."""
        text = f"register-appservice\n```yaml\n{yaml.safe_dump(self.fields)}\n```"
        assert f"registered application service {self.id}" in order(admin, text).lower()
        return self

    def client(self, server: Server, user: str = "", **query: str) -> AsClient:
        """Speaks to the server as the service, for one of its users or for itself."""
        localpart = f"{self.id}_{user}" if user else str(self.fields["sender_localpart"])
        user_id = f"@{localpart}:{server.name}"
        client = AsClient(server, str(self.fields["as_token"]), user_id)
        client.as_query = {"user_id": user_id, **query} if user else query
        return client

    def user(self, server: Server, name: str = "") -> AsClient:
        """A new user of the service."""
        client = self.client(server, name or unique("u"))
        body = {"type": "m.login.application_service", "inhibit_login": True}
        ok(client.post("register", {**body, "username": client.user_id[1:].partition(":")[0]}))
        return client

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class AsClient(Client):
    """A client whose requests say for whom the service acts."""

    as_query: Json

    def request(
        self, method: str, path: str | Sequence[str], body: Any = None, **options: Any
    ) -> httpx.Response:
        options["params"] = {**self.as_query, **options.get("params", {})}
        return super().request(method, path, body, **options)


@pytest.fixture
def new_bridge() -> Iterator[Callable[..., Bridge]]:
    """Factory of application services, which are gone when the test ends."""
    made: list[Bridge] = []

    def make(**fields: Any) -> Bridge:
        made.append(Bridge(**fields))
        return made[-1]

    yield make
    for bridge in made:
        bridge.close()


@pytest.fixture
def bridge(admin: Client, new_bridge: Callable[..., Bridge]) -> Iterator[Bridge]:
    """An application service that the shared server knows."""
    made = new_bridge().register_at(admin)
    yield made
    order(admin, f"unregister-appservice {made.id}")


# ── 52.3  Who speaks, and what is theirs ─────────────────────────────────────


def test_services_are_registered_listed_and_forgotten(
    admin: Client, new_bridge: Callable[..., Bridge], server: Server
) -> None:
    made = new_bridge().register_at(admin)
    assert made.id in order(admin, "list-appservices")
    again = f"register-appservice\n```\n{yaml.safe_dump(made.fields)}```"
    assert "already" in order(admin, again)
    other = yaml.safe_dump({**made.fields, "id": unique("other")})
    assert "same as_token" in order(admin, f"register-appservice\n```\n{other}\n```")
    taken = yaml.safe_dump(
        {**made.fields, "id": unique(), "as_token": unique(), "sender_localpart": "admin"}
    )
    assert "somebody's account" in order(admin, f"register-appservice\n```\n{taken}\n```")
    assert "line 1" in order(admin, "register-appservice\n```\nid: [\n```")
    assert "code block" in order(admin, "register-appservice")
    ok(made.client(server).get("account/whoami"))
    assert "Unregistered" in order(admin, f"unregister-appservice {made.id}")
    assert made.id not in order(admin, "list-appservices")
    fails(made.client(server).get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    assert "no application service" in order(admin, f"unregister-appservice {made.id}")


def test_services_from_files(new_server: Callable[..., Server], tmp_path: Path) -> None:
    path = tmp_path / "bridge.yaml"
    path.write_text(REGISTRATIONS["draupnir"])
    server = new_server(appservice_config_files=[str(path)])
    admin = register(server)
    assert "draupnir" in order(admin, "list-appservices")
    assert "appservice_config_files" in order(admin, "unregister-appservice draupnir")
    server.stop()
    path.write_text("id: [\n")
    assert server.spawn().wait(30) == 1
    assert f"{path}: " in server.log
    assert "line 1" in server.log


def test_a_service_speaks_for_itself_and_its_users(server: Server, bridge: Bridge) -> None:
    bot = bridge.client(server)
    assert ok(bot.get("account/whoami"))["user_id"] == bot.user_id
    ghost = bridge.user(server)
    assert ok(ghost.get("account/whoami"))["user_id"] == ghost.user_id
    fails(bridge.client(server, "nobody").get("account/whoami"), 403, "M_FORBIDDEN")
    fails(ghost.put(("profile", bot.user_id, "displayname"), {"displayname": "x"}), 403)
    ok(ghost.put(("profile", ghost.user_id, "displayname"), {"displayname": "Ghost"}))


def test_users_of_services_are_made_and_logged_in(
    server: Server, bridge: Bridge, nobody: Client
) -> None:
    kind = {"type": "m.login.application_service"}
    flows = [flow["type"] for flow in ok(nobody.get("login"))["flows"]]
    assert kind["type"] in flows
    name = f"{bridge.id}_one"
    fails(nobody.post("register", {**kind, "username": name}), 401, "M_MISSING_TOKEN")
    stranger = Client(server, "wrong")
    fails(stranger.post("register", {**kind, "username": name}), 401, "M_UNKNOWN_TOKEN")
    service = Client(server, str(bridge.fields["as_token"]))
    fails(service.post("register", {**kind, "username": "else"}), 400, "M_EXCLUSIVE")
    made = ok(service.post("register", {**kind, "username": name}))
    assert made["access_token"]
    fails(service.post("register", {**kind, "username": name}), 400, "M_USER_IN_USE")
    who = {"identifier": {"type": "m.id.user", "user": name}}
    session = client_from(server, ok(service.post("login", {**kind, **who})))
    assert ok(session.get("account/whoami"))["user_id"] == made["user_id"]
    fails(nobody.post("login", {**kind, **who}), 401, "M_MISSING_TOKEN")
    other = {"identifier": {"type": "m.id.user", "user": "admin"}}
    fails(service.post("login", {**kind, **other}), 400, "M_EXCLUSIVE")
    # And nobody else can have such a name.
    fails(nobody.get("register/available", username=f"{bridge.id}_two"), 400, "M_EXCLUSIVE")


def test_devices_of_services(server: Server, bridge: Bridge) -> None:
    ghost = bridge.user(server)
    fails(ghost.get("account/whoami", params={"device_id": "D1"}), 400, "M_UNKNOWN_DEVICE")
    made = ghost.put("devices/D1", {"display_name": "one"})
    assert made.status_code == 201
    assert ghost.put("devices/D1", {"display_name": "two"}).status_code == 200
    ghost.as_query["device_id"] = "D1"
    assert ok(ghost.get("account/whoami"))["device_id"] == "D1"
    keys = {"signed_curve25519:A": {"key": "a", "signatures": {}}}
    ok(ghost.post("keys/upload", {"one_time_keys": keys}))
    del ghost.as_query["device_id"]
    fails(ghost.post("keys/upload", {"one_time_keys": keys}), 400)
    assert ghost.delete("devices/D1").status_code == 200
    assert ok(ghost.get("devices"))["devices"] == []
    fails(ghost.post("account/deactivate"), 403, "M_FORBIDDEN")
    fails(ghost.post("account/password", {"new_password": "x"}), 403, "M_FORBIDDEN")


def test_the_time_of_events(server: Server, bridge: Bridge, alice: Client) -> None:
    ghost = bridge.user(server)
    room_id = ghost.create_room(alice)
    path = ("rooms", room_id, "send", "m.room.message", unique())
    text = {"msgtype": "m.text", "body": "old"}
    event_id = ok(ghost.put(path, text, params={"ts": "1234567"}))["event_id"]
    assert ok(ghost.get(("rooms", room_id, "event", event_id)))["origin_server_ts"] == 1234567
    topic = ("rooms", room_id, "state", "m.room.topic", "")
    event_id = ok(ghost.put(topic, {"topic": "x"}, params={"ts": "42"}))["event_id"]
    assert ok(ghost.get(("rooms", room_id, "event", event_id)))["origin_server_ts"] == 42
    for wrong in ("-1", "x", str(2**53)):
        fails(ghost.put((*path[:4], unique()), text, params={"ts": wrong}), 400)
    alice.join(room_id)
    sent = ok(alice.put((*path[:4], unique()), text, params={"ts": "5"}))["event_id"]
    assert ok(alice.get(("rooms", room_id, "event", sent)))["origin_server_ts"] > 10**12


def test_aliases_of_services(server: Server, bridge: Bridge, alice: Client) -> None:
    ghost = bridge.user(server)
    room_id, theirs = ghost.create_room(), alice.create_room()
    alias = ("directory", "room", f"#{bridge.id}_a:{server.name}")
    fails(alice.put(alias, {"room_id": theirs}), 400, "M_EXCLUSIVE")
    fails(alice.post("createRoom", {"room_alias_name": f"{bridge.id}_a"}), 400, "M_EXCLUSIVE")
    ok(ghost.put(alias, {"room_id": room_id}))
    fails(alice.delete(alias), 403)
    outside = ("directory", "room", f"#{unique()}:{server.name}")
    fails(ghost.put(outside, {"room_id": room_id}), 400, "M_EXCLUSIVE")
    ok(ghost.delete(alias))


def test_no_rate_limit_for_services(
    new_server: Callable[..., Server], new_bridge: Callable[..., Bridge]
) -> None:
    server = new_server(rate_limit=True)
    admin = register(server)
    free = new_bridge().register_at(admin)
    for number in range(30):  # "register" allows ten at once, "create" twenty
        free.user(server, f"g{number}").create_room()
    bound = new_bridge(rate_limited=True).register_at(admin)
    ghost = bound.user(server, "g")
    statuses = Counter(ghost.post("createRoom").status_code for _ in range(30))
    assert statuses[429] >= 5
    assert bound.client(server).post("createRoom").status_code == 200


def test_sec_26_a_service_gets_no_more_than_its_namespaces(
    server: Server, admin: Client, bridge: Bridge, new_bridge: Callable[..., Bridge]
) -> None:
    """Whoever holds an as_token is nobody outside of the namespaces, and nowhere an admin."""
    service = Client(server, str(bridge.fields["as_token"]))
    room_id = admin_room(admin)
    for user_id in (admin.user_id, bot_of(server), "@x:elsewhere.example", "nonsense", "@"):
        for path in ("sync", "account/whoami", "devices", ("rooms", room_id, "messages")):
            query = {"user_id": user_id, "dir": "b"}
            fails(service.get(path, params=query), 403, "M_FORBIDDEN")
    fails(service.get(("rooms", room_id, "state")), 403)
    # A service for everybody acts for an admin as for others, but not with an admin's rights.
    namespaces = {"users": [{"regex": "@.*", "exclusive": False}]}
    wide = new_bridge(namespaces=namespaces).register_at(admin)
    puppet = Client(server, str(wide.fields["as_token"]))
    query = {"user_id": admin.user_id}
    assert ok(puppet.get("account/whoami", params=query))["user_id"] == admin.user_id
    send = ("rooms", room_id, "send", "m.room.message", unique())
    order_text = {"msgtype": "m.text", "body": "!admin create-user evil"}
    fails(puppet.put(send, order_text, params=query), 403, "M_FORBIDDEN")
    login = {"type": "m.login.application_service", "user": admin.user_id}
    fails(puppet.post("login", login), 403, "M_FORBIDDEN")
    stranger = register(server)
    hidden = stranger.create_room(room_alias_name=unique("hidden"))
    listing = ("directory", "list", "room", hidden)
    fails(puppet.put(listing, {"visibility": "public"}, params=query), 403, "M_FORBIDDEN")
    eventually(lambda: any(event["room_id"] == hidden for event in wide.events))
    assert not any(event["room_id"] == room_id for event in wide.events)
    order(admin, f"unregister-appservice {wide.id}")


# ── 52.4  What they are told ─────────────────────────────────────────────────


def test_events_are_told_in_order(server: Server, bridge: Bridge, alice: Client) -> None:
    ghost = bridge.user(server)
    room_id = alice.create_room(topic="before")
    alice.send_text(room_id, "unheard")
    alice.invite(room_id, ghost.user_id)
    ghost.join(room_id)
    for number in range(120):
        alice.send_text(room_id, f"n{number}")
    wanted = [f"n{number}" for number in range(120)]
    eventually(lambda: len(bridge.events) >= 122)
    told = bridge.events
    assert [e["content"]["body"] for e in told if e["type"] == "m.room.message"] == wanted
    assert [e["content"]["membership"] for e in told[:2]] == ["invite", "join"]
    assert {e["room_id"] for e in told} == {room_id}
    assert len({txn_id for txn_id, _ in bridge.transactions}) == len(bridge.transactions)
    ghost.leave(room_id)
    alice.send_text(room_id, "unheard")
    last = alice.create_room(room_alias_name=unique("x"))
    alice.invite(last, ghost.user_id)
    eventually(lambda: bridge.events[-1]["room_id"] == last)
    assert bridge.events[-2]["content"]["membership"] == "leave"


def test_a_service_that_fails_gets_the_same_again(
    new_server: Callable[..., Server], new_bridge: Callable[..., Bridge]
) -> None:
    server = new_server()
    admin = register(server)
    bridge = new_bridge().register_at(admin)
    ghost = bridge.user(server)
    bridge.status = 500
    room_id = ghost.create_room()
    eventually(lambda: bridge.transactions)
    ghost.send_text(room_id, "meanwhile")
    first = bridge.transactions[0]
    server.kill9()
    server.start()
    eventually(lambda: len(bridge.transactions) >= 2)
    assert {json.dumps(body["events"]) for _, body in bridge.transactions} == {
        json.dumps(first[1]["events"])
    }
    assert {txn_id for txn_id, _ in bridge.transactions} == {first[0]}
    bridge.status = 200
    eventually(lambda: any(e["content"].get("body") == "meanwhile" for e in bridge.events), 30)
    ids = [event["event_id"] for event in bridge.events]
    assert len(ids) == len(set(ids))


def test_ephemeral_events(
    server: Server, admin: Client, new_bridge: Callable[..., Bridge], alice: Client
) -> None:
    bridge = new_bridge(receive_ephemeral=True).register_at(admin)
    ghost = bridge.user(server)
    room_id = alice.create_room(ghost)
    ghost.join(room_id)
    event_id = ghost.send_text(room_id, "read this")
    ok(alice.put(("rooms", room_id, "typing", alice.user_id), {"typing": True, "timeout": 9000}))
    ok(alice.post(("rooms", room_id, "receipt", "m.read.private", event_id)))
    ok(alice.post(("rooms", room_id, "receipt", "m.read", event_id)))
    ok(ghost.post(("rooms", room_id, "receipt", "m.read.private", event_id)))
    ok(alice.put(("presence", alice.user_id, "status"), {"presence": "online", "status_msg": "x"}))

    def seen() -> dict[str, list[Json]]:
        found: dict[str, list[Json]] = defaultdict(list)
        for event in itertools.chain(*bridge.told("ephemeral")):
            found[event["type"]].append(event)
        return found

    eventually(lambda: ghost.user_id in json.dumps(seen()["m.receipt"]))
    eventually(lambda: seen()["m.typing"] and seen()["m.presence"])
    assert seen()["m.typing"][0]["content"] == {"user_ids": [alice.user_id]}
    assert {event["room_id"] for event in seen()["m.receipt"]} == {room_id}
    kinds = {k: set(u) for e in seen()["m.receipt"] for k, u in e["content"][event_id].items()}
    assert alice.user_id in kinds["m.read"]
    private = [e["content"][event_id].get("m.read.private", {}) for e in seen()["m.receipt"]]
    assert {user for users in private for user in users} == {ghost.user_id}
    order(admin, f"unregister-appservice {bridge.id}")


def test_encryption_for_services(
    server: Server, admin: Client, new_bridge: Callable[..., Bridge], alice: Client
) -> None:
    bridge = new_bridge(**{"org.matrix.msc3202": True}).register_at(admin)
    ghost = bridge.user(server)
    assert ghost.put("devices/BOT").status_code == 201
    ghost.as_query["device_id"] = "BOT"
    key = {"key": "a", "signatures": {ghost.user_id: {"ed25519:BOT": "x"}}}
    ok(ghost.post("keys/upload", {"one_time_keys": {"signed_curve25519:A": key}}))
    claim = {"one_time_keys": {ghost.user_id: {"BOT": "signed_curve25519"}}}
    ok(alice.post("keys/claim", claim))
    counts = "org.matrix.msc3202.device_one_time_keys_count"
    zero = {ghost.user_id: {"BOT": {"signed_curve25519": 0}}}
    eventually(lambda: zero in bridge.told(counts))
    message = {"messages": {ghost.user_id: {"BOT": {"hello": 1}}}}
    ok(alice.put(("sendToDevice", "m.test", unique()), message))
    sent = eventually(lambda: [*itertools.chain(*bridge.told("de.sorunome.msc2409.to_device"))])
    to = {"to_user_id": ghost.user_id, "to_device_id": "BOT"}
    content = {"type": "m.test", "sender": alice.user_id, "content": {"hello": 1}}
    assert sent == [{**content, **to}]
    assert ghost.sync().get("to_device", {}).get("events", []) == []
    room_id = alice.create_room(ghost)
    ghost.join(room_id)
    keys = {"user_id": alice.user_id, "device_id": alice.device_id, "algorithms": [], "keys": {}}
    ok(alice.post("keys/upload", {"device_keys": {**keys, "signatures": {}}}))
    lists = "org.matrix.msc3202.device_lists"
    eventually(lambda: any(alice.user_id in told["changed"] for told in bridge.told(lists)))
    alice.leave(room_id)
    eventually(lambda: any(alice.user_id in told["left"] for told in bridge.told(lists)))
    order(admin, f"unregister-appservice {bridge.id}")


class PuppetStore(mautrix.client.state_store.MemoryStateStore, mautrix.appservice.ASStateStore):
    """What the framework remembers, in memory."""

    def __init__(self) -> None:
        mautrix.client.state_store.MemoryStateStore.__init__(self)
        mautrix.appservice.ASStateStore.__init__(self)


def test_a_bot_made_with_mautrix(
    server: Server, admin: Client, new_bridge: Callable[..., Bridge], alice: Client
) -> None:
    """A framework that bridges are made with: its bot answers, and a user of it joins in."""
    registration = new_bridge(receive_ephemeral=True)
    port = free_port()
    registration.fields["url"] = f"http://127.0.0.1:{port}"
    registration.register_at(admin)
    names = {key: str(registration.fields[key]) for key in ("id", "as_token", "hs_token")}
    heard: list[str] = []

    async def bot_life(done: threading.Event) -> None:
        service = mautrix.appservice.AppService(
            server=server.url,
            domain=server.name,
            bot_localpart=str(registration.fields["sender_localpart"]),
            ephemeral_events=True,
            state_store=PuppetStore(),
            **names,
        )
        await service.start("127.0.0.1", port)
        await service.intent.ensure_registered()

        async def handle(event: Any) -> None:
            if getattr(event, "state_key", None) == service.bot_mxid:
                await service.intent.join_room(event.room_id)
            elif str(event.type) == "m.room.message" and event.sender == alice.user_id:
                heard.append(event.content.body)
                puppet = service.intent.user(f"@{registration.id}_echo:{server.name}")
                await puppet.ensure_registered()
                await service.intent.invite_user(event.room_id, puppet.mxid)
                await puppet.join_room(event.room_id)
                await puppet.send_text(event.room_id, f"echo {event.content.body}")

        service.matrix_event_handler(handle)
        await asyncio.to_thread(done.wait)
        await service.stop()

    done = threading.Event()
    life = threading.Thread(target=lambda: asyncio.run(bot_life(done)), daemon=True)
    life.start()
    bot_id = f"@{registration.fields['sender_localpart']}:{server.name}"
    room_id = alice.create_room(power_level_content_override={"invite": 0})
    alice.invite(room_id, bot_id)
    eventually(lambda: bot_id in ok(alice.get(("rooms", room_id, "joined_members")))["joined"], 30)
    alice.send_text(room_id, "hello")
    eventually(lambda: "echo hello" in alice.bodies(room_id), 30)
    assert heard == ["hello"]
    done.set()
    life.join(10)
    order(admin, f"unregister-appservice {registration.id}")


# ── 52.5  Questions ──────────────────────────────────────────────────────────


def test_users_and_aliases_are_made_on_demand(
    server: Server, bridge: Bridge, alice: Client
) -> None:
    user_id, alias = f"@{bridge.id}_late:{server.name}", f"#{bridge.id}_late:{server.name}"

    def make_user() -> Json:
        bridge.user(server, "late")
        return {}

    def make_alias() -> Json:
        body = {"room_alias_name": alias[1:].partition(":")[0], "preset": "public_chat"}
        ok(bridge.client(server, "late").post("createRoom", body))
        return {}

    bridge.answers = {f"/users/{user_id}": make_user, f"/rooms/{alias}": make_alias}
    room_id = alice.create_room()
    fails(
        alice.post(("rooms", room_id, "invite"), {"user_id": f"@{bridge.id}_no:{server.name}"}), 404
    )
    alice.invite(room_id, user_id)
    assert alice.join(alias)
    fails(alice.get(("directory", "room", f"#{bridge.id}_no:{server.name}")), 404, "M_NOT_FOUND")


def test_paths_of_old(server: Server, bridge: Bridge) -> None:
    bridge.prefix = ""
    bridge.user(server).create_room()
    eventually(lambda: bridge.events)
    assert any(path.startswith("/_matrix/app/v1/transactions") for _, path in bridge.requests)
    assert f"?access_token={bridge.fields['hs_token']}" in bridge.requests[-1][1]


def test_pings(server: Server, admin: Client, bridge: Bridge, alice: Client) -> None:
    def ping(client: Client, name: str = bridge.id) -> httpx.Response:
        path = f"/_matrix/client/v1/appservice/{name}/ping"
        return client.post(path, {"transaction_id": "meow"})

    bot = bridge.client(server)
    refused = fails(ping(bot), 502, "M_BAD_STATUS")
    assert refused["status"] == 404
    bridge.answers["/ping"] = dict
    assert ok(ping(bot))["duration_ms"] >= 0
    assert ("POST", "/_matrix/app/v1/ping") in bridge.requests
    fails(ping(alice), 403, "M_FORBIDDEN")
    fails(ping(bot, "another"), 403, "M_FORBIDDEN")
    bridge.close()
    fails(ping(bot), 502, "M_CONNECTION_FAILED")


def test_third_party_networks(
    server: Server, admin: Client, new_bridge: Callable[..., Bridge], alice: Client
) -> None:
    bridge = new_bridge(protocols=["irc"]).register_at(admin)
    instance = {"desc": "Libera", "fields": {"network": "libera"}, "network_id": "libera"}
    protocol = {
        **{"user_fields": ["nick"], "location_fields": ["channel"], "icon": "mxc://x/y"},
        "field_types": {"nick": {"regexp": ".*", "placeholder": "nick"}},
        "instances": [instance],
    }
    user = {"userid": f"@{bridge.id}_n:{server.name}", "protocol": "irc", "fields": {"nick": "n"}}
    place = {"alias": f"#{bridge.id}_c:{server.name}", "protocol": "irc", "fields": {}}
    bridge.answers = {
        "/thirdparty/protocol/irc": lambda: json.loads(json.dumps(protocol)),
        "/thirdparty/user/irc?nick=n m": lambda: [user],
        f"/thirdparty/location?alias={place['alias']}": lambda: [place],
    }
    found = ok(alice.get("thirdparty/protocols"))["irc"]
    instance_id = found["instances"][0].pop("instance_id")
    assert found == protocol
    assert ok(alice.get("thirdparty/protocol/irc"))["icon"] == "mxc://x/y"
    fails(alice.get("thirdparty/protocol/xmpp"), 404, "M_NOT_FOUND")
    assert alice.get("thirdparty/user/irc", params={"nick": "n m"}).json() == [user]
    fails(alice.get("thirdparty/user/irc", params={"nick": "other"}), 404, "M_NOT_FOUND")
    query = {"alias": place["alias"]}
    assert alice.get("thirdparty/location", params=query).json() == [place]
    # Rooms of the network.
    bot = bridge.client(server)
    room_id = bot.create_room(name="#libera", preset="public_chat")
    listing = ("directory", "list", "appservice", "libera", room_id)
    fails(alice.put(listing, {"visibility": "public"}), 403, "M_FORBIDDEN")
    ok(bot.put(listing, {"visibility": "public"}))

    def listed(**query: Any) -> bool:
        chunk = ok(alice.post("publicRooms", {"limit": 500, **query}))["chunk"]
        return any(room["room_id"] == room_id for room in chunk)

    assert listed(third_party_instance_id=instance_id)
    assert listed(include_all_networks=True)
    assert not listed()
    assert not listed(third_party_instance_id="another")
    ok(bot.put(listing, {"visibility": "private"}))
    assert not listed(third_party_instance_id=instance_id)
    order(admin, f"unregister-appservice {bridge.id}")


# ═════════════════════════════════════════════════════════════════════════════
#  23. THE ADMIN ROOM
# ═════════════════════════════════════════════════════════════════════════════


@pytest.fixture
def admin(server: Server) -> Client:
    """A fresh device of the first user of the shared server, who is its admin."""
    return Client(server).login("admin", PASSWORD)


def admin_room(client: Client) -> str:
    """The room behind #admins."""
    alias = f"#admins:{client.server.name}"
    return str(ok(client.get(("directory", "room", alias)))["room_id"])


def bot_of(server: Server) -> str:
    return f"@conduit:{server.name}"


def answer_to(client: Client, event_id: str, room_id: str) -> list[Json]:
    """The contents of the notices with which @conduit answers an event, page by page."""
    events = client.messages(room_id, limit=50)["chunk"][::-1]
    ids = [event["event_id"] for event in events]
    pages: list[Json] = []
    for event in events[ids.index(event_id) + 1 :] if event_id in ids else []:
        content = cast("Json", event["content"])
        is_notice = content.get("msgtype") == "m.notice"
        if event["sender"] == bot_of(client.server) and is_notice:
            pages.append(content)
        elif pages:
            break
    return pages


def order(client: Client, text: str) -> str:
    """Say something in the admin room; the plain text of the answer."""
    room_id = admin_room(client)
    event_id = client.send_text(room_id, text)
    pages = eventually(lambda: answer_to(client, event_id, room_id))
    assert all(page["format"] == "org.matrix.custom.html" for page in pages)
    return "\n".join(str(page["body"]) for page in pages)


def stays_silent(client: Client, room_id: str, event_id: str) -> None:
    """Nothing answers an event: what is said after it is answered first."""
    order(client, "help")
    notices = answer_to(client, event_id, room_id)
    assert not notices or notices[0]["body"].startswith("Write a command"), notices


def exists(client: Client, localpart: str) -> bool:
    """Whether a user name is taken."""
    return client.get("register/available", username=localpart).status_code != 200


# ── 23.1  Answers ────────────────────────────────────────────────────────────


@given(st.text(max_size=50), st.lists(st.tuples(st.text(), st.text()), max_size=20))
def test_tables_are_escaped(title: str, rows: list[tuple[str, str]]) -> None:
    reply = conduit.reply_table(title, ("One", "Two"), rows)
    assert set(re.findall(r"</?(\w+)[^>]*>", reply.html)) <= {
        "p",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert reply.html.count("<tr>") == len(rows) + 1
    assert "<" not in re.sub(r"</?(p|table|thead|tbody|tr|th|td)>", "", reply.html)


@given(st.integers(0, 3000), st.integers(0, 200))
def test_an_answer_is_never_too_long_for_an_event(rows: int, wide: int) -> None:
    names = [f"@ünïcode{number}:{'x' * wide}.org" for number in range(rows)]
    reply = conduit.reply_table("All:", ("User", ""), [(name, "admin") for name in names])
    contents = list(conduit.reply_contents(reply))
    for content in contents:
        assert len(json.dumps(content, ensure_ascii=False).encode()) < 60_000
        assert content["body"].startswith("All:")
        assert content["format"] == "org.matrix.custom.html"
    told = "\n".join(content["body"] for content in contents)
    assert [name for name in names if f"{name} " not in told] == []


# ── 23.2  The language ───────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("usage", "line", "found"),
    [
        ("x", "", {}),
        ("x NAME", "a", {"NAME": "a"}),
        ("x NAME [PASSWORD]", "a", {"NAME": "a"}),
        ("x NAME [PASSWORD]", "a b", {"NAME": "a", "PASSWORD": "b"}),
        ("x ID [--erase]", "a --erase", {"ID": "a", "--erase": ""}),
        ("x ID [--erase]", "--erase a", {"ID": "a", "--erase": ""}),
        ("x NAME [PASSWORD]", "a -- --b", {"NAME": "a", "PASSWORD": "--b"}),
        ("x [--keep=N] FILE", "a --keep 3", {"FILE": "a", "--keep": "3"}),
        ("x [--keep=N] FILE", "--keep=3 a", {"FILE": "a", "--keep": "3"}),
        ("x ROOM TEXT...", "a b c d", {"ROOM": "a", "TEXT": "b c d"}),
        ("x [TEXT...]", "", {}),
    ],
)
def test_arguments_of_commands(usage: str, line: str, found: Json) -> None:
    assert conduit.parse_arguments(usage, line.split()) == found


@pytest.mark.parametrize(
    ("usage", "line", "complaint"),
    [
        ("x", "a", "'a' is one word too many"),
        ("x NAME", "", "NAME is missing"),
        ("x NAME [PASSWORD]", "a b c", "'c' is one word too many"),
        ("x ID [--erase]", "a --eras", "there is no option --eras"),
        ("x ID [--erase]", "a -- --erase", "'--erase' is one word too many"),
        ("x ID [--erase]", "a --erase=1", "there is no option --erase=1"),
        ("x [--keep=N]", "--keep", "--keep wants a value"),
        ("x ROOM TEXT...", "a", "TEXT... is missing"),
        ("x {JSON}", "", "a code block (```) with JSON is missing"),
    ],
)
def test_wrong_arguments(usage: str, line: str, complaint: str) -> None:
    with pytest.raises(conduit.UsageError, match=re.escape(complaint)):
        conduit.parse_arguments(usage, line.split())


def test_three_ways_to_address_the_bot(admin: Client) -> None:
    bot = bot_of(admin.server)
    for text in ("help", "!admin help", f"{bot}: help", f"{bot} help", "Conduit: help", "!admin"):
        assert "list-local-users" in order(admin, text)


def test_mistakes_are_answered_politely(admin: Client) -> None:
    assert "Did you mean list-local-users?" in order(admin, "list-local-user")
    assert "There is no command dance" in order(admin, "!admin dance")
    assert "NAME is missing.\nUsage: create-user NAME [PASSWORD]" in order(admin, "create-user")
    assert "cannot be read" in order(admin, '!admin create-user "a')
    assert "Usage: deactivate-user ID [--erase]" in order(admin, "deactivate-user --help")
    assert "There is no account" in order(admin, "reset-password nobody-here")
    assert "taken" in order(admin, "create-user admin")
    assert "own account" in order(admin, "deactivate-user conduit")
    assert "no user of this server" in order(admin, "deactivate-user @a:elsewhere.example")


def test_admins_can_talk_among_themselves(admin: Client) -> None:
    room_id = admin_room(admin)
    for text in (
        "hello",
        "it's late",
        "who did that?",
        "> help",
        "!administer help",
        "@conduit:x help",
    ):
        stays_silent(admin, room_id, admin.send_text(room_id, text))


# ── 23.3  The commands ───────────────────────────────────────────────────────


def test_help_names_every_command(admin: Client) -> None:
    text = order(admin, "help")
    for name in (
        "help",
        "list-local-users",
        "create-user NAME [PASSWORD]",
        "reset-password NAME",
        "deactivate-user ID [--erase]",
        "memory-usage",
        "clear-caches",
        "show-config",
    ):
        assert name in text


def test_users_are_made_listed_and_deactivated(admin: Client) -> None:
    name = unique("made")
    user_id = f"@{name}:{admin.server.name}"
    assert f"Created user {user_id} with password: s3cret word" in order(
        admin, f"create-user {name.upper()} 's3cret word'"
    )
    made = Client(admin.server).login(name, "s3cret word")
    listing = order(admin, "list-local-users")
    assert user_id in listing
    assert re.search(rf"@admin:{re.escape(admin.server.name)} +admin", listing)
    password = order(admin, f"reset-password {user_id}").rpartition(" ")[2]
    assert ok(made.get("account/whoami"))["user_id"] == user_id
    fails(Client(admin.server).post("login", login_body(name, "s3cret word")), 403, "M_FORBIDDEN")
    other = Client(admin.server).login(name, password)
    order(admin, f"reset-password --logout {name}")
    fails(other.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    assert "has been deactivated" in order(admin, f"deactivate-user {user_id} --erase")
    assert user_id not in order(admin, "list-local-users")
    assert exists(admin, name)


def login_body(name: str, password: str) -> Json:
    return {
        "type": "m.login.password",
        "identifier": {"type": "m.id.user", "user": name},
        "password": password,
    }


def test_a_password_is_made_up(admin: Client) -> None:
    name = unique("made")
    password = order(admin, f"!admin create-user {name}").rpartition(" ")[2]
    assert len(password) >= 16
    Client(admin.server).login(name, password)


def test_memory_and_caches(admin: Client) -> None:
    text = order(admin, "memory-usage")
    for what in (
        "resident memory",
        "cache rooms.events",
        "cache accounts.sessions",
        "cache keys.counts",
        "conduit.db",
        "uploaded media",
    ):
        assert what in text
    assert re.match(r"Done: [1-9]\d* entries", order(admin, "clear-caches"))
    assert admin.state(admin_room(admin), "m.room.name")["name"].endswith("Admin Room")


def test_the_configuration_is_shown_without_secrets(new_server: Callable[..., Server]) -> None:
    secrets_of = {
        "registration_token": "sesame-open",
        "turn_secret": "coturn-secret",
        "emergency_password": "break-the-glass",
        "jwt_secret": "signed-with-this",
        "registration_shared_secret": "shared-by-few",
    }
    server = new_server(**secrets_of)
    text = order(register(server), "show-config")
    assert f'server_name = "{server.name}"' in text
    assert not any(secret in text for secret in secrets_of.values())
    assert all(key in text for key in secrets_of)


def test_rooms_are_shown_named_and_published(admin: Client, alice: Client, bob: Client) -> None:
    room_id = alice.room_with(bob, name="The <lounge>")
    alias = f"#{unique('lounge')}:{admin.server.name}"
    assert "stands for" in order(admin, f"add-alias {alias} {room_id}")
    text = order(admin, f"!admin room-info {alias}")
    for piece in (room_id, "The <lounge>", "2, of them 2 of this server", alias, "invite"):
        assert piece in text
    assert re.search(rf"{re.escape(room_id)} +2 +The <lounge>", order(admin, "list-rooms"))
    assert bob.user_id in order(admin, f"room-members {room_id}")
    assert "Found 0" in order(admin, f"room-members {room_id} ban")
    assert "m.room.create" in order(admin, f"room-state {room_id}")
    state = json.loads(order(admin, f"room-state {room_id} m.room.member {bob.user_id}"))
    assert state["membership"] == "join"
    listed = ("directory", "list", "room", room_id)
    order(admin, f"publish-room {room_id}")
    assert ok(admin.get(listed))["visibility"] == "public"
    order(admin, f"publish-room {room_id} --undo")
    assert ok(admin.get(listed))["visibility"] == "private"
    assert "is gone" in order(admin, f"remove-alias {alias}")
    fails(admin.get(("directory", "room", alias)), 404)
    assert "keeps its name" in order(admin, f"remove-alias #admins:{admin.server.name}")
    assert "no such room" in order(admin, "room-info !nowhere:test.example")
    alice.invite(room_id, admin.user_id)
    assert "is blocked" in order(admin, f"block-room {room_id}")
    assert room_id in order(admin, "list-blocked-rooms")
    fails(admin.post(("join", room_id)), 403, "M_FORBIDDEN")
    assert "is open" in order(admin, f"block-room {room_id} --undo")
    admin.join(room_id)
    assert "is closed; 0 user(s)" in order(admin, f"close-room {room_id}")
    fails(bob.get(("rooms", room_id, "joined_members")), 403)
    assert "is needed" in order(admin, f"close-room {admin_room(admin)}")


def test_devices_and_sessions(admin: Client, alice: Client) -> None:
    phone = alice.login(device_id="PHONE", initial_device_display_name="My phone")
    text = order(admin, f"list-devices {alice.user_id}")
    assert "PHONE" in text
    assert "My phone" in text
    assert "1 device" in order(admin, f"logout-user {alice.user_id} PHONE")
    fails(phone.get("account/whoami"), 401)
    order(admin, f"logout-user {alice.user_id}")
    fails(alice.get("account/whoami"), 401)
    room_id = admin.create_room(name="mine")
    assert re.search(rf"{re.escape(room_id)} +mine", order(admin, "list-joined-rooms admin"))


def test_admins_are_made_and_unmade(admin: Client, alice: Client) -> None:
    assert "is an admin" in order(admin, f"make-admin {alice.user_id}")
    assert "Found" in order(alice, "list-local-users")
    assert "no admin any more" in order(admin, f"make-admin --undo {alice.user_id}")
    room_id = admin_room(admin)
    stays_silent(admin, room_id, alice.send_text(room_id, "version"))


def test_many_accounts_are_closed_at_once(admin: Client) -> None:
    names = [register(admin.server).user_id for _ in range(3)]
    code = "\n".join([*names, "nobody-here", "admin"])
    text = order(admin, f"deactivate-all --erase\n```\n{code}\n```")
    assert "Deactivated 3 account(s), passed over 2" in text
    assert "nobody-here" in text
    listing = order(admin, "list-local-users")
    assert not any(name in listing for name in names)
    assert admin.user_id in listing


def test_the_server_is_looked_after(admin: Client, tmp_path: Path) -> None:
    assert f"conduit.py {conduit.VERSION}" in order(admin, "version")
    assert re.match(r"0 d \d+ h \d+ min", order(admin, "uptime"))
    assert "info,http=debug" in order(admin, "log-level info,http=debug")
    assert "no level" in order(admin, "log-level loud")
    assert "log is at info" in order(admin, "log-level")
    assert "Done" in order(admin, "reload")
    assert "is sound" in order(admin, "check")
    assert "media" in order(admin, "media-usage")
    assert "MiB" in order(admin, f"backup {tmp_path}/a.tar")
    assert "exists already" in order(admin, f"backup {tmp_path}/a.tar")
    assert "no backup" in order(admin, "backup /nowhere/at/all.tar")
    assert "COUNT is a number" in order(admin, f"backup {tmp_path} --keep x")


def test_notices_reach_everybody(new_server: Callable[..., Server]) -> None:
    server = new_server()
    admin, user = register(server), register(server)
    assert "2 user(s)" in order(admin, "notice-all 'The server' rests at night")
    invited = user.poll()["rooms"]["invite"]
    (room_id,) = invited
    user.join(room_id)
    notice = user.messages(room_id)["chunk"][1]["content"]
    assert (notice["msgtype"], notice["body"]) == ("m.server_notice", "The server rests at night")
    tags = ok(user.get(("user", user.user_id, "rooms", room_id, "tags")))["tags"]
    assert tags == {"m.server_notice": {}}
    text = {"msgtype": "m.text", "body": "no"}
    fails(user.put(("rooms", room_id, "send", "m.room.message", unique()), text), 403)
    order(admin, "notice-all And again")
    assert user.bodies(room_id)[-1] == "And again"


def test_events_and_signatures_are_looked_into(admin: Client) -> None:
    room_id = admin.create_room()
    event_id = admin.send_text(room_id, "what is this?")
    pdu = json.loads(order(admin, f"get-pdu {event_id}"))
    assert pdu["content"]["body"] == "what is this?"
    code = f"\n```json\n{json.dumps(pdu)}\n```"
    assert f"Event {event_id}" in order(admin, f"parse-pdu{code}")
    assert "hash is right" in order(admin, f"parse-pdu{code}")
    assert "is wrong" in order(admin, "parse-pdu" + code.replace("what is this?", "this!"))
    chain = order(admin, f"get-auth-chain {event_id}")
    assert all(kind in chain for kind in ("m.room.member", "m.room.power_levels"))
    signed = order(admin, 'sign-json\n```\n{"a": 1}\n```')
    assert "is right" in order(admin, f"verify-json\n```\n{signed}\n```")
    assert "is wrong" in order(admin, "verify-json\n```\n" + signed.replace("1", "2", 1) + "\n```")
    assert "only events that it built" in order(admin, f"sign-json{code}")
    assert "no JSON object" in order(admin, "sign-json\n```\n[]\n```")
    assert "no such event" in order(admin, "get-pdu $nothing")


# ── 23.4  The room ───────────────────────────────────────────────────────────


def test_the_first_user_finds_the_room(new_server: Callable[..., Server]) -> None:
    server = new_server()
    first, second = register(server), register(server)
    room_id = admin_room(first)
    assert list(first.poll()["rooms"]["join"]) == [room_id]
    assert second.poll().get("rooms", {}).get("join", {}) == {}
    assert "Welcome" in first.bodies(room_id)[0]
    assert first.state(room_id, "m.room.create")["m.federate"] is False
    assert first.state(room_id, "m.room.member", bot_of(server))["displayname"] == "Conduit"
    fails(second.post(("join", room_id)), 403, "M_FORBIDDEN")
    server.restart()
    assert admin_room(first) == room_id
    assert "list-local-users" in order(first, "help")


def test_who_is_invited_becomes_an_admin(server: Server, admin: Client, alice: Client) -> None:
    room_id = admin_room(admin)
    admin.invite(room_id, alice)
    listing = order(admin, "list-local-users")
    assert not re.search(rf"{re.escape(alice.user_id)} +admin", listing)
    alice.join(room_id)
    assert re.search(rf"{re.escape(alice.user_id)} +admin", order(alice, "list-local-users"))
    eventually(lambda: alice.user_id in admin.state(room_id, "m.room.power_levels")["users"])
    alice.leave(room_id)
    assert not re.search(rf"{re.escape(alice.user_id)} +admin", order(admin, "list-local-users"))
    eventually(lambda: alice.user_id not in admin.state(room_id, "m.room.power_levels")["users"])
    fails(alice.post(("join", room_id)), 403, "M_FORBIDDEN")


def test_sec_09_admins_cannot_open_the_room(admin: Client) -> None:
    """What would let others in, or the server out, is not even in an admin's power."""
    room_id = admin_room(admin)
    for event_type, content in (
        ("m.room.join_rules", {"join_rule": "public"}),
        ("m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2"}),
        ("m.room.power_levels", {"users_default": 100}),
        ("m.room.tombstone", {"body": "", "replacement_room": "!a:b"}),
        ("m.room.history_visibility", {"history_visibility": "world_readable"}),
    ):
        path = ("rooms", room_id, "state", event_type, "")
        fails(admin.put(path, content), 403, "M_FORBIDDEN")
    fails(admin.post(("rooms", room_id, "upgrade"), {"new_version": "12"}), 403, "M_FORBIDDEN")


def test_sec_09_moving_the_alias_moves_nothing(new_server: Callable[..., Server]) -> None:
    """CVE-2024-6303: whoever held #admins was obeyed. Here the room is a row of the database."""
    server = new_server()
    admin, mallory = register(server), register(server)
    real, alias = admin_room(admin), f"#admins:{server.name}"
    trap = mallory.create_room(preset="public_chat")
    for client in (mallory, admin):
        fails(client.delete(("directory", "room", alias)), 403, "M_FORBIDDEN")
        assert client.put(("directory", "room", alias), {"room_id": trap}).is_client_error
    server.stop()
    with contextlib.closing(sqlite3.connect(server.database)) as database:
        moved = "UPDATE aliases SET room_nid = (SELECT room_nid FROM rooms WHERE room_id = ?)"
        database.execute(moved, (trap,))
        database.commit()
    server.start()
    assert admin_room(admin) == trap
    mallory.send_text(trap, "create-user evil1 password-of-evil")
    admin.join(trap)
    admin.send_text(trap, "create-user evil2 password-of-evil")
    event_id = admin.send_text(real, "list-local-users")
    listing = eventually(lambda: answer_to(admin, event_id, real))[0]["body"]
    assert "evil" not in listing
    assert mallory.user_id in listing


def test_sec_09_a_member_without_the_right_is_not_obeyed(new_server: Callable[..., Server]) -> None:
    """To be in the room is not enough: the right stands in the accounts."""
    server = new_server()
    admin, mallory = register(server), register(server)
    room_id = admin_room(admin)
    admin.invite(room_id, mallory)
    mallory.join(room_id)
    server.stop()
    with contextlib.closing(sqlite3.connect(server.database)) as database:
        database.execute(
            "UPDATE accounts SET is_admin = 0 WHERE user_nid ="
            " (SELECT user_nid FROM users WHERE user_id = ?)",
            (mallory.user_id,),
        )
        database.commit()
    server.start()
    event_id = mallory.send_text(room_id, "create-user evil password-of-evil")
    stays_silent(admin, room_id, event_id)
    assert not exists(admin, "evil")


EVIL: Final = "create-user evil-{} password-of-evil"


@pytest.mark.parametrize(
    "content",
    [
        {"msgtype": "m.notice", "body": EVIL},
        {"msgtype": "m.emote", "body": EVIL},
        {"body": EVIL},
        {"msgtype": "m.text", "body": f"> <@admin> {EVIL}\n\nno!"},
        {"msgtype": "m.text", "body": f"look at this:\n{EVIL}"},
        {
            "msgtype": "m.text",
            "body": EVIL,
            "m.relates_to": {"m.in_reply_to": {"event_id": "$x"}},
        },
        {
            "msgtype": "m.text",
            "body": f"* {EVIL}",
            "m.new_content": {"msgtype": "m.text", "body": EVIL},
            "m.relates_to": {"rel_type": "m.replace", "event_id": "$x"},
        },
        {
            "msgtype": "m.text",
            "body": EVIL,
            "m.new_content": {"msgtype": "m.text", "body": EVIL},
            "m.relates_to": {"rel_type": "m.replace", "event_id": "$x"},
        },
        {"msgtype": "m.text", "body": [EVIL]},
        {
            "msgtype": "m.text",
            "formatted_body": EVIL,
            "format": "org.matrix.custom.html",
            "body": "",
        },
    ],
)
def test_sec_09_only_plain_new_messages_are_commands(admin: Client, content: Json) -> None:
    """Edits, replies, quotations, notices and what other clients make up are not obeyed."""
    name = unique("x").replace("_", "-")
    content = json.loads(json.dumps(content).replace("{}", name))
    room_id = admin_room(admin)
    said = admin.send_text(room_id, "good morning")
    content = json.loads(json.dumps(content).replace("$x", said))
    stays_silent(admin, room_id, admin.send(room_id, "m.room.message", content))
    assert not exists(admin, f"evil-{name}")


def test_sec_09_other_rooms_and_other_types(admin: Client) -> None:
    own = admin.create_room(name="Admin Room")
    admin.send_text(own, "create-user evil-own password-of-evil")
    real = admin_room(admin)
    text = {"msgtype": "m.text", "body": "create-user evil-own password-of-evil"}
    stays_silent(admin, real, admin.send(real, "m.room.encrypted", text))
    stays_silent(admin, real, admin.set_state(real, "m.room.message", text))
    assert not exists(admin, "evil-own")


class AdminRoomParts:
    """What AdminRoom._answer asks of the server, for cases that no client can bring about."""

    def __init__(self, event: Any, membership: str = "join") -> None:
        self.event_at_hand = event
        self.sent: list[Any] = []
        self.db = self.rooms = self.accounts = self.room = self
        self.config = types.SimpleNamespace(server_name="test.example")
        self.bot_id = "@conduit:test.example"
        self.joined = membership

    def __getattr__(self, name: str) -> Any:
        answers = {
            "is_local": lambda user_id: user_id.endswith(":test.example"),
            "membership": lambda user_id: self.joined,
            "is_admin": lambda nid: True,
            "user_nid": lambda user_id: 1,
            "event": lambda event_id: self.event_at_hand,
            "get": lambda room_id: self,
            "send": lambda *args, **kwargs: self.sent.append(args),
            "synced": lambda: asyncio.sleep(0),
        }
        return answers.get(name, lambda *args: None)


@pytest.mark.parametrize(
    ("sender", "redacted_by", "membership", "obeyed"),
    [
        ("@admin:test.example", None, "join", True),
        ("@admin:elsewhere.example", None, "join", False),
        ("@admin:test.example.evil.example", None, "join", False),
        ("@admin:test.example", 7, "join", False),
        ("@admin:test.example", None, "leave", False),
    ],
)
def test_sec_09_remote_redacted_and_gone(
    sender: str, redacted_by: int | None, membership: str, obeyed: bool
) -> None:
    """Users of other servers, messages redacted before they ran, and admins who left."""
    content = {"msgtype": "m.text", "body": "!admin help"}
    event = types.SimpleNamespace(sender=sender, redacted_by=redacted_by, content=content)
    parts = AdminRoomParts(event, membership)
    room = conduit.AdminRoom(cast("Any", parts))
    asyncio.run(room._answer("$event"))
    assert bool(parts.sent) is obeyed


def test_sec_09_only_the_first_line_is_an_order(admin: Client) -> None:
    """What stands below other text, in a quotation or in a block, is not done."""
    room_id, name = admin_room(admin), unique("smuggled")
    for text in (
        f"hello\n!admin create-user {name}",
        f"> said before\n\ncreate-user {name}",
        f"```\ncreate-user {name}\n```",
        f"look:\n```\n!admin create-user {name}\n```",
    ):
        stays_silent(admin, room_id, admin.send_text(room_id, text))
    order(admin, f"version\n```\ncreate-user {name}\n```")
    assert not exists(admin, name)


def test_nobody_is_conduit(server: Server, alice: Client) -> None:
    for password in ("", "conduit", PASSWORD, "None"):
        answer = Client(server).post("login", login_body("conduit", password))
        assert answer.status_code in (400, 403)
    answer = Client(server).post(
        "register", {"username": "Conduit", "password": PASSWORD, "auth": {"type": "m.login.dummy"}}
    )
    assert answer.status_code == 400
    profile = ok(alice.get(("profile", bot_of(server))))
    assert profile["displayname"] == "Conduit"


def test_the_emergency_password(new_server: Callable[..., Server]) -> None:
    server = new_server(emergency_password="break-the-glass")
    first = register(server)
    room_id = admin_room(first)
    bot = Client(server).login("conduit", "break-the-glass")
    assert room_id in bot.poll()["rooms"]["join"]
    assert "Created user" in order(bot, "create-user rescued a-new-password")
    Client(server).login("rescued", "a-new-password")
    fails(Client(server).post("login", login_body("conduit", "another")), 403, "M_FORBIDDEN")
    server.stop()
    server.write_config(emergency_password=None)
    server.start()
    fails(bot.get("account/whoami"), 401, "M_UNKNOWN_TOKEN")
    fails(
        Client(server).post("login", login_body("conduit", "break-the-glass")), 403, "M_FORBIDDEN"
    )
    assert "list-local-users" in order(first, "help")
    server.stop()
    server.check()


def test_a_lost_admin_room_is_made_anew(new_server: Callable[..., Server]) -> None:
    """With the emergency password somebody left the room as @conduit."""
    server = new_server(emergency_password="break-the-glass")
    first = register(server)
    old = admin_room(first)
    Client(server).login("conduit", "break-the-glass").leave(old)
    server.restart()
    rooms = first.poll()["rooms"]["join"]
    new = next(room_id for room_id in rooms if room_id != old)
    event_id = first.send_text(new, "help")
    assert eventually(lambda: answer_to(first, event_id, new))


# ═════════════════════════════════════════════════════════════════════════════
#  24. CALLS, WELL-KNOWN, LANDING PAGE
#
#  Credentials that a TURN server would accept, the documents of .well-known as
#  configured, and a page that keeps to its own Content-Security-Policy.
# ═════════════════════════════════════════════════════════════════════════════

TURN_URIS: Final = ["turn:turn.example.org?transport=udp", "turns:turn.example.org:5349"]


def house_config(**keys: Any) -> conduit.Config:
    """A configuration of example.org with these keys."""
    return conduit.Config(server_name="example.org", database_path=Path("data"), **keys)


# ── 24.1  TURN ───────────────────────────────────────────────────────────────


def test_turn_credentials_are_those_that_coturn_computes() -> None:
    # printf '1700086400:@alice:example.org' | openssl dgst -sha1 -hmac north -binary | base64
    config = house_config(turn_uris=("turn:a",), turn_secret="north")
    name, password = conduit.turn_credentials(config, "@alice:example.org", 1_700_000_000) or (
        "",
        "",
    )
    assert (name, password) == ("1700086400:@alice:example.org", "7kAkbzEsPm8QgksGNCt6Ul1FuvY=")


def test_turn_secret_goes_before_name_and_password() -> None:
    keys: Json = {"turn_uris": ("turn:a",), "turn_username": "u", "turn_password": "p"}
    assert conduit.turn_credentials(house_config(**keys), "@a:b", 0) == ("u", "p")
    made = conduit.turn_credentials(house_config(**keys, turn_secret="s"), "@a:b", 0)
    assert made is not None
    assert made[0] == "86400:@a:b"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"turn_secret": "s"},
        {"turn_uris": ("turn:a",)},
        {"turn_uris": ("turn:a",), "turn_username": "u"},
    ],
)
def test_there_is_no_turn_server_without_uris_and_credentials(keys: Json) -> None:
    assert conduit.turn_credentials(house_config(**keys), "@a:b", 0) is None


def test_turn_server_over_the_wire_and_reloaded(new_server: Callable[..., Server]) -> None:
    server = new_server(turn_uris=TURN_URIS, turn_secret="north", turn_ttl=600)
    alice = register(server, "alice")
    for version in ("v3", "r0"):
        answer = ok(alice.get(f"/_matrix/client/{version}/voip/turnServer"))
        expiry, _, user_id = answer["username"].partition(":")
        assert user_id == alice.user_id
        assert 590 <= int(expiry) - time.time() <= 610
        digest = hmac.new(b"north", answer["username"].encode(), "sha1").digest()
        assert base64.b64decode(answer["password"]) == digest
        assert (answer["uris"], answer["ttl"]) == (TURN_URIS, 600)
    server.write_config(turn_secret="", turn_username="u", turn_password="p")
    os.kill(server.pid, signal.SIGHUP)
    path = "/_matrix/client/v3/voip/turnServer"
    eventually(lambda: ok(alice.get(path))["username"] == "u")
    assert ok(alice.get(path))["password"] == "p"


def test_without_a_turn_server_there_is_none(alice: Client, nobody: Client) -> None:
    answer = ok(alice.get("/_matrix/client/v3/voip/turnServer"))
    assert answer == {"username": "", "password": "", "uris": [], "ttl": 86400}
    fails(nobody.get("/_matrix/client/v3/voip/turnServer"), 401, "M_MISSING_TOKEN")


# ── 24.2  The signs at the door ──────────────────────────────────────────────


def test_well_known_by_default(nobody: Client, server: Server) -> None:
    client = nobody.get("/.well-known/matrix/client")
    assert ok(client) == {"m.homeserver": {"base_url": f"https://{server.name}"}}
    assert client.headers["access-control-allow-origin"] == "*"
    assert client.headers["content-type"].startswith("application/json")
    other = nobody.get("/.well-known/matrix/server")
    assert ok(other) == {"m.server": f"{server.name}:443"}
    assert "max-age" in other.headers["cache-control"]
    fails(nobody.get("/.well-known/matrix/support"), 404, "M_NOT_FOUND")


def test_well_known_as_configured_and_reloaded(new_server: Callable[..., Server]) -> None:
    foci = [{"type": "livekit", "livekit_service_url": "https://livekit.example.org"}]
    server = new_server(
        well_known={"client": "https://matrix.example.org/", "server": "matrix.example.org:8448"},
        rtc_foci=foci,
        support_contact="admin@example.org",
        support_page="https://example.org/help",
    )
    anyone = Client(server)
    assert ok(anyone.get("/.well-known/matrix/client")) == {
        "m.homeserver": {"base_url": "https://matrix.example.org"},
        "org.matrix.msc4143.rtc_foci": foci,
    }
    assert ok(anyone.get("/.well-known/matrix/server")) == {"m.server": "matrix.example.org:8448"}
    assert ok(anyone.get("/.well-known/matrix/support")) == {
        "contacts": [{"email_address": "admin@example.org", "role": "m.role.admin"}],
        "support_page": "https://example.org/help",
    }
    server.write_config(support_contact="@admin:example.org", support_page=None, rtc_foci=[])
    os.kill(server.pid, signal.SIGHUP)
    wanted = {"contacts": [{"matrix_id": "@admin:example.org", "role": "m.role.admin"}]}
    eventually(lambda: ok(anyone.get("/.well-known/matrix/support")) == wanted)
    assert list(ok(anyone.get("/.well-known/matrix/client"))) == ["m.homeserver"]
    server.write_config(support_contact="nobody", port="wrong")  # nothing of it is taken
    os.kill(server.pid, signal.SIGHUP)
    eventually(lambda: "support_contact" in server.log and "port" in server.log)
    assert ok(anyone.get("/.well-known/matrix/support")) == wanted


# ── 24.3  The landing page ───────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/", "/_matrix/static/", "/_matrix/static"])
def test_the_page_says_what_this_is_and_what_to_do(
    nobody: Client, server: Server, path: str
) -> None:
    page = nobody.get(path)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for word in (server.name, "Matrix homeserver", "Element", "Cinny", "nheko", "FluffyChat"):
        assert word in page.text
    assert f"https://{server.name}" in page.text


def test_the_page_keeps_to_its_own_policy(nobody: Client) -> None:
    page = nobody.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    style = re.search(r"<style>(.*?)</style>", page.text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert not re.search(r"<script|style=|\son\w+=|src=\"http|@import|url\(", page.text)
    assert page.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_balanced_html() -> None:
    html = conduit.landing_html(house_config(), True)
    void = {"meta", "link", "img", "!doctype"}
    open_tags: list[str] = []
    for closing, tag in re.findall(r"<(/?)([a-z0-9!]+)", html):
        if closing:
            assert open_tags.pop() == tag
        elif tag not in void:
            open_tags.append(tag)
    assert open_tags == []
    assert "$" not in html


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "Registration is closed."),
        ({"registration_token": "a"}, "Registration is closed."),
        ({"allow_registration": True, "registration_token": "a"}, "Registration needs a token."),
        ({"allow_registration": True}, "Only this machine can register"),
        ({"allow_registration": True, "allow_open_registration": True}, "Registration is open."),
    ],
)
def test_the_page_is_honest_about_registration(keys: Json, said: str) -> None:
    page = conduit.landing_html(house_config(**keys), True)
    assert said in page
    assert ("Create account" in page) == ("token." in said or "open" in said)
    assert "Nobody has an account" in conduit.landing_html(house_config(**keys), False)


def test_sec_35_nothing_configured_becomes_markup() -> None:
    page = conduit.landing_html(
        house_config(
            support_contact="a\"'&b@example.org",
            support_page='https://a/"><script>alert(1)</script>',
        ),
        True,
    )
    assert "<script" not in page
    assert "a&quot;'&amp;b@example.org" in page
    assert "mailto:a%22%27%26b@example.org" in page


def test_icon(nobody: Client) -> None:
    for path in ("/favicon.svg", "/favicon.ico"):
        icon = nobody.get(path)
        assert icon.headers["content-type"] == "image/svg+xml"
        assert icon.text.startswith("<svg")
        assert "sandbox" in icon.headers["content-security-policy"]


def test_what_is_not_there_is_not_the_page(nobody: Client) -> None:
    fails(nobody.get("/index.html"), 404, "M_UNRECOGNIZED")


# ── 24.4  The repository's own files ─────────────────────────────────────────


def test_the_service_starts_what_is_there() -> None:
    unit = (ROOT / "conduit.service").read_text("utf-8")
    assert "python3 -m conduit\n" in unit
    assert "Type=notify\n" in unit
    for line in unit.splitlines():
        assert not line or line.startswith(("#", "[")) or re.match(r"[A-Z]\w+=", line), line


def test_make_helps() -> None:
    command = ["make", "-C", str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  fixed
    for target in ("run", "test", "lint", "bench", "clean"):
        assert f"make {target}" in result.stdout


def test_what_carries_group_calls(new_server: Callable[..., Server], alice: Client) -> None:
    path = "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
    assert ok(alice.get(path)) == {"rtc_transports": []}
    focus = {"type": "livekit", "livekit_service_url": "https://rtc.example"}
    caller = register(new_server(rtc_foci=[focus]))
    assert ok(caller.get(path)) == {"rtc_transports": [focus]}
    fails(Client(caller.server).get(path), 401, "M_MISSING_TOKEN")


# ═════════════════════════════════════════════════════════════════════════════
#  53. METRICS AND TRACING
# ═════════════════════════════════════════════════════════════════════════════


def scrape(server: Server, **headers: str) -> dict[str, Any]:
    """The metrics by name, read as Prometheus reads them."""
    reply = httpx.get(f"{server.url}/_conduit/metrics", headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(reply.text)}


def test_metrics(new_server: Callable[..., Server], new_bridge: Callable[..., Bridge]) -> None:
    server = new_server(metrics=True)
    admin = register(server)
    bridge = new_bridge(id='a "b"\\c', url=None).register_at(admin)
    for _ in range(3):
        admin.get("account/whoami")
    Client(server, "wrong").get("account/whoami")
    admin.get("/nonsense/../x")
    for number in range(20):
        admin.request(f"M{number}", "/", headers={"Content-Length": "0"})
    found = scrape(server)
    route = {"method": "GET", "route": "/_matrix/client/v3/account/whoami"}

    def value(name: str, **labels: str) -> float:
        family = found[name.removesuffix("_total").partition("_seconds_")[0]]
        return sum(s.value for s in family.samples if s.name == name and s.labels == labels)

    requests = found["conduit_http_requests"].samples
    counts = {(s.labels["route"], s.labels["status"]): s.value for s in requests}
    assert counts[route["route"], "200"] == 3
    assert counts[route["route"], "401"] == 1
    assert counts["unknown", "404"] >= 1
    assert {s.labels["method"] for s in requests} <= {"GET", "POST", "PUT", "other"}
    buckets = [
        sample
        for sample in found["conduit_http_request_seconds"].samples
        if sample.labels.get("route") == route["route"] and sample.name.endswith("_bucket")
    ]
    assert [sample.value for sample in buckets] == sorted(sample.value for sample in buckets)
    assert buckets[-1].labels["le"] == "+Inf"
    assert buckets[-1].value == 4
    single = {name: family.samples[0].value for name, family in found.items() if family.samples}
    assert single["process_resident_memory_bytes"] == pytest.approx(server.rss() * 2**20, rel=0.2)
    assert single["conduit_users"] == 3  # the bot and the service's own beside the admin
    assert single["conduit_rooms"] == 1
    assert single["conduit_db_commits"] > 1
    assert single["conduit_db_sync_seconds"] > 0
    assert single["conduit_connections"] >= 1
    labels = found["conduit_appservice_queue"].samples[0].labels
    assert labels == {"appservice": bridge.id}
    assert any(s.labels["cache"] == "rooms.events" for s in found["conduit_cache_entries"].samples)


def test_sec_50_nothing_of_the_house_is_open_through_a_proxy(
    new_server: Callable[..., Server],
) -> None:
    """Whoever proxies all paths to the world shows neither metrics nor an admin interface."""
    server = new_server(metrics=True)
    admin, user = register(server), register(server)
    path = "/_conduit/metrics"
    outside = {"X-Forwarded-For": "203.0.113.5"}
    fails(Client(server).get(path, headers=outside), 403, "M_FORBIDDEN")
    fails(Client(server).get(path, headers={"Host": "evil.example"}), 403, "M_FORBIDDEN")
    fails(user.get(path, headers=outside), 403, "M_FORBIDDEN")
    assert scrape(server, Authorization=f"Bearer {admin.token}", **outside)
    fails(Client(server, "wrong").get(path), 401, "M_UNKNOWN_TOKEN")
    for admin_path in ("register", "users", "rooms", "server_version"):
        reply = Client(server).get(f"/_synapse/admin/v1/{admin_path}", headers=outside)
        assert reply.status_code == 404, admin_path
    server.stop()
    server.write_config(metrics=False)
    fails(Client(server.start()).get(path), 404, "M_UNRECOGNIZED")


def test_traces(new_server: Callable[..., Server]) -> None:
    taken: list[Json] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        server = new_server(allow_jaeger=True, tracing_endpoint=url)
        parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        Client(server).get("/_matrix/client/versions", headers=parent)

        def spans() -> list[Json]:
            return [
                span
                for document in taken
                for of_us in document["resourceSpans"]
                for scope in of_us["scopeSpans"]
                for span in scope["spans"]
            ]

        eventually(lambda: [span for span in spans() if span.get("parentSpanId")], 20)
        span = next(span for span in spans() if span.get("parentSpanId"))
        collector.shutdown()
    assert (span["traceId"], span["parentSpanId"]) == ("a" * 32, "b" * 16)
    assert span["name"] == "GET /_matrix/client/versions"
    assert int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"])
    assert re.fullmatch("[0-9a-f]{16}", span["spanId"])


def test_a_flame_graph_is_recorded(new_server: Callable[..., Server]) -> None:
    server = new_server(tracing_flame=True)
    user = register(server)
    for _ in range(20):
        user.get("account/whoami")
    server.stop()
    lines = (server.data / conduit.FLAME_FILE).read_text().splitlines()
    assert lines
    assert all(re.fullmatch(r"\S.*;.* \d+", line) for line in lines)
    assert any("conduit:run_server" in line for line in lines)


def test_each_request_is_a_line_at_debug(new_server: Callable[..., Server]) -> None:
    server = new_server(log="warn,http=debug")
    Client(server).get("/_matrix/client/versions")
    found = re.findall(r"http: #(\d+) GET /_matrix/client/versions: 200, [\d.]+ ms", server.log)
    assert len(set(found)) == len(found) >= 1


# ═════════════════════════════════════════════════════════════════════════════
#  26. COMMAND LINE
#
#  Real processes: what they print, what they tell systemd, what signals do.
# ═════════════════════════════════════════════════════════════════════════════


def run_script(
    *arguments: str, cwd: Path, script: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python conduit.py ARGUMENTS` in a folder, with nothing configured but what is given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CONDUIT_")}
    return subprocess.run(  # noqa: S603  our own command line
        [sys.executable, str(script or ROOT / "conduit.py"), *arguments],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ── 26.1  Arguments ──────────────────────────────────────────────────────────


def test_version_help_and_routes(tmp_path: Path) -> None:
    """These need no configuration."""
    version = run_script("--version", cwd=tmp_path)
    assert version.stdout == f"conduit.py {conduit.VERSION}\n"
    assert "CONDUIT_CONFIG" in run_script("--help", cwd=tmp_path).stdout
    routes = run_script("--routes", cwd=tmp_path).stdout
    assert re.search(
        r"^PUT +/_matrix/client/v3/rooms/\{room_id\}/send/\S+ +(USER|GUEST)", routes, re.M
    )
    assert run_script("--nonsense", cwd=tmp_path).returncode == 2
    assert not list(tmp_path.iterdir())


def test_without_configuration(tmp_path: Path) -> None:
    """Three lines that say what to do, and no traceback."""
    result = run_script(cwd=tmp_path)
    assert result.returncode == 1
    assert "conduit-example.toml" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    """Each wrong key is named."""
    (tmp_path / "conduit.toml").write_text(
        '[global]\nserver_name = "https://x"\ndatabase_path = "data"\nport = "x"\naddress = 5\n'
    )
    result = run_script(cwd=tmp_path)
    assert result.returncode == 1
    for name in ("server_name", "port", "address"):
        assert name in result.stderr
    assert "Traceback" not in result.stderr


def test_port_in_use(new_server: Callable[..., Server], tmp_path: Path) -> None:
    """One sentence that names the address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fresh = new_server(start=False, port=port)
        result = fresh.run_command()
    assert result.returncode == 1
    assert str(port) in result.stderr
    assert "in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_second_server_on_one_database(new_server: Callable[..., Server]) -> None:
    """It is refused, and the first one goes on."""
    first = new_server()
    result = first.run_command()
    assert result.returncode == 1
    assert "running" in result.stderr
    assert "Traceback" not in result.stderr
    assert first.answers()


# ── 26.2  Check and backup ───────────────────────────────────────────────────


def test_check_and_backup_while_running(new_server: Callable[..., Server], tmp_path: Path) -> None:
    """Both work on a database in use; the copy is complete, and made once only."""
    running = new_server()
    user = register(running)
    room = ok(user.post("createRoom", {}))["room_id"]
    assert running.run_command("--check").stdout == "the database is sound\n"
    copy = tmp_path / "copy.db"
    result = running.run_command("--backup", str(copy))
    assert result.returncode == 0, result.stderr
    assert copy.stat().st_mode & 0o777 == 0o600
    again = running.run_command("--backup", str(copy))
    assert again.returncode == 1
    assert "exists" in again.stderr
    with contextlib.closing(sqlite3.connect(copy)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        dump = "\n".join(database.iterdump())
    assert room in dump


def test_orders_from_a_shell(new_server: Callable[..., Server]) -> None:
    """--admin does what the admin room does, for the server's own user only."""
    running = new_server()
    assert "conduit.py" in running.run_command("--admin", "version").stdout
    made = running.run_command("--admin", "create-user bob 'a password'")
    assert made.stdout == f"Created user @bob:{running.name} with password: a password\n"
    Client(running).login("bob", "a password")
    many = running.run_command("--admin", "deactivate-all\n```\nbob\n```")
    assert "Deactivated 1" in many.stdout
    wrong = running.run_command("--admin", "create-user")
    assert (wrong.returncode, "NAME is missing" in wrong.stdout) == (1, True)
    assert running.run_command("--admin", "no-such").returncode == 1
    path = running.data / conduit.ADMIN_SOCKET
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            rude.sendall(b"x" * 3 * conduit.MAX_ORDER_BYTES)
            rude.shutdown(socket.SHUT_WR)
            assert rude.recv(100) == b""
    running.kill9()
    gone = running.run_command("--admin", "version")
    assert (gone.returncode, "no server is running" in gone.stderr) == (1, True)
    running.start()
    assert running.run_command("--admin", "uptime").returncode == 0


def upload_keys(client: Client, *names: str, fallback: str = "") -> None:
    """Publish device keys, one-time keys of these names, and a fallback key."""
    sign = {"signatures": {client.user_id: {f"ed25519:{client.device_id}": "s"}}}
    device = {"user_id": client.user_id, "device_id": client.device_id, "algorithms": []}
    body: Json = {"device_keys": {**device, "keys": {}, **sign}}
    body["one_time_keys"] = {f"signed_curve25519:{n}": {"key": n, **sign} for n in names}
    if fallback:
        key = {"key": fallback, "fallback": True, **sign}
        body["fallback_keys"] = {f"signed_curve25519:{fallback}": key}
    ok(client.post("keys/upload", body))


def claimed_key(client: Client, other: Client) -> str | None:
    """The one-time key that the server hands out for another device."""
    wanted = {other.user_id: {other.device_id: "signed_curve25519"}}
    found = ok(client.post("keys/claim", {"one_time_keys": wanted}))["one_time_keys"]
    keys = found.get(other.user_id, {}).get(other.device_id, {})
    return next((key["key"] for key in keys.values()), None)


def test_backup_and_restore(new_server: Callable[..., Server], tmp_path: Path) -> None:
    """The whole drill: what was there is there again, and no key is handed out twice."""
    server = new_server()
    alice, bob = register(server), register(server)
    room_id = alice.room_with(bob)
    alice.send_text(room_id, "before")
    mxc = alice.upload(b"a picture" * 1000, "image/png")
    upload_keys(alice, "A", "B", fallback="F")
    upload_keys(bob, "C")
    bob.poll()
    archive = tmp_path / "all.tar"
    assert server.run_command("--backup", str(archive)).returncode == 0
    assert archive.stat().st_mode & 0o777 == 0o600
    assert claimed_key(bob, alice) == "A"  # after the backup, which still has it
    bob.since = alice.poll()["next_batch"]
    later = alice.send_text(room_id, "after")
    bob.poll()
    refused = server.run_command("--restore", str(archive))
    assert (refused.returncode, "is running" in refused.stderr) == (1, True)
    server.kill9()
    refused = server.run_command("--restore", str(archive))
    assert (refused.returncode, "not empty" in refused.stderr) == (1, True)
    server.data.rename(tmp_path / "old")
    restored = server.run_command("--restore", str(archive))
    assert restored.returncode == 0, restored.stderr
    server.check()
    server.start()
    assert alice.bodies(room_id) == ["before"]
    fails(alice.get(("rooms", room_id, "event", later)), 404)
    assert alice.download(mxc).content == b"a picture" * 1000
    assert claimed_key(bob, alice) == "F"  # A was handed out; B may have been
    news = bob.poll()
    assert alice.user_id in news["device_lists"]["changed"]
    counts = alice.poll()["device_one_time_keys_count"]
    assert counts == {"signed_curve25519": 0}
    upload_keys(alice, "B", "D")
    assert claimed_key(bob, alice) == "D"
    alice.send_text(room_id, "and on")
    assert [e["content"]["body"] for e in bob.timeline(room_id, bob.poll())] == ["and on"]


def test_backups_in_a_folder(new_server: Callable[..., Server], tmp_path: Path) -> None:
    """Each gets a name of its own, and only so many stay; other files are left alone."""
    server = new_server()
    for name in ("conduit-20200101-000000.tar", "conduit-20200102-000000.tar", "other.tar"):
        (tmp_path / name).touch()
    assert server.run_command("--backup", str(tmp_path), "--keep", "2").returncode == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    assert {"conduit-20200102-000000.tar", "other.tar"} < set(names)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "media/aa/../../evil", "conduit.toml"])
def test_a_hostile_archive_is_refused(
    new_server: Callable[..., Server], tmp_path: Path, name: str
) -> None:
    server = new_server(start=False)
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as members:
        members.addfile(tarfile.TarInfo(name), io.BytesIO())
    result = server.run_command("--restore", str(archive))
    assert (result.returncode, "no backup" in result.stderr) == (1, True)
    archive.write_bytes(b"rubbish" * 1000)
    assert "cannot be read" in server.run_command("--restore", str(archive)).stderr
    assert [path.name for path in server.data.iterdir()] == ["conduit.lock"]
    assert not (tmp_path / "evil").exists()


def test_a_backup_of_another_server_is_refused(
    new_server: Callable[..., Server], tmp_path: Path
) -> None:
    one, other = new_server(), new_server(start=False, server_name="other.example")
    assert one.run_command("--backup", str(tmp_path / "a.tar")).returncode == 0
    result = other.run_command("--restore", str(tmp_path / "a.tar"))
    assert (result.returncode, "belongs to" in result.stderr) == (1, True)
    assert [path.name for path in other.data.iterdir()] == ["conduit.lock"]


def test_check_of_nothing_and_of_rubbish(new_server: Callable[..., Server]) -> None:
    """No database, or a file that is none, is an error in words."""
    fresh = new_server(start=False)
    missing = fresh.run_command("--check")
    assert (missing.returncode, "no database" in missing.stdout) == (1, True)
    assert fresh.run_command("--backup", str(fresh.folder / "copy")).returncode == 1
    assert fresh.run_command("--restore", str(fresh.folder / "copy")).returncode == 1
    fresh.data.mkdir()
    (fresh.data / conduit.DATABASE_FILE).write_bytes(b"rubbish " * 1000)
    broken = fresh.run_command("--check")
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr


# ── 26.3  Signals and systemd ────────────────────────────────────────────────


class Manager:
    """The end of NOTIFY_SOCKET that systemd holds."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.settimeout(20)

    def hear(self) -> str:
        """The next message."""
        return self.sock.recv(4096).decode()


def test_what_systemd_hears(new_server: Callable[..., Server], tmp_path: Path) -> None:
    """READY when it answers, RELOADING and READY around a reload, STOPPING at the end."""
    manager = Manager(tmp_path / "notify")
    service = new_server(start=False)
    service.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
    service.spawn()
    assert manager.hear().startswith("READY=1")
    assert service.answers(), "READY came before it answered"
    os.kill(service.pid, signal.SIGHUP)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", manager.hear())
    assert manager.hear() == "READY=1"
    os.kill(service.pid, signal.SIGTERM)
    assert manager.hear() == "STOPPING=1"
    assert service.process is not None
    assert service.process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_in_peace(new_server: Callable[..., Server], number: signal.Signals) -> None:
    """A waiting sync is answered at once, the process ends with 0, well within five seconds."""
    running = new_server()
    user = register(running)
    since = ok(user.get("sync"))["next_batch"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(user.get, "sync", params={"since": since, "timeout": "30000"})
        time.sleep(0.5)
        started = time.monotonic()
        os.kill(running.pid, number)
        assert waiting.result(10).status_code == 200
    assert running.process is not None
    assert running.process.wait(10) == 0
    assert time.monotonic() - started < 5
    running.check()


def test_reload(new_server: Callable[..., Server]) -> None:
    """SIGHUP takes over what may change; a wrong file changes nothing and is reported."""
    running = new_server(log="warn")
    running.write_config(log="info,http=debug")
    os.kill(running.pid, signal.SIGHUP)
    eventually(lambda: "read again" in running.log)
    assert running.answers()
    eventually(lambda: "GET /_matrix/client/versions: 200" in running.log)
    good = running.config["port"]
    running.config_path.write_text("[global]\nport = 'x'\n")
    os.kill(running.pid, signal.SIGHUP)
    eventually(lambda: "stays as it was" in running.log)
    assert running.answers()
    running.write_config(port=good)


@needs_openssl
def test_reload_of_the_certificate(new_server: Callable[..., Server], tmp_path: Path) -> None:
    """A new certificate in the same file is served after SIGHUP; a broken one is not taken."""
    certs, key = self_signed(tmp_path, "one.example")
    running = new_server(tls={"certs": str(certs), "key": str(key)})

    def served() -> str:
        return ssl.get_server_certificate(("127.0.0.1", running.port)).strip()

    first = served()
    assert first == certs.read_text().strip()
    for path, new in zip((certs, key), self_signed(tmp_path, "two.example"), strict=True):
        path.write_bytes(new.read_bytes())
    os.kill(running.pid, signal.SIGHUP)
    eventually(lambda: served() == certs.read_text().strip() != first)
    second = served()
    certs.write_text("rubbish")
    os.kill(running.pid, signal.SIGHUP)
    eventually(lambda: "stays as it was" in running.log)
    assert served() == second


def test_an_end_that_hangs_is_cut_short(tmp_path: Path) -> None:
    """Whatever blocks the end, the process is gone a little after five seconds."""
    program = (
        "import conduit, asyncio, os, signal, sys, time\n"
        "class Hanging:\n"
        "    def __init__(self, config): pass\n"
        "    async def start(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    def first_steps(self): return ['ready']\n"
        "    async def stop(self): time.sleep(60)\n"
        "conduit.Homeserver = Hanging\n"
        "conduit.STOP_SECONDS = 1\n"
        "sys.exit(conduit.main())\n"
    )
    environment = {
        **os.environ,
        "CONDUIT_CONFIG": "",
        "CONDUIT_SERVER_NAME": "x",
        "CONDUIT_DATABASE_PATH": str(tmp_path),
    }
    started = time.monotonic()
    result = subprocess.run(  # noqa: S603  our own command line
        [sys.executable, "-c", program], env=environment, cwd=ROOT, timeout=30, check=False
    )
    assert result.returncode == 1
    assert time.monotonic() - started < 10


# ── 26.4  From script to module ──────────────────────────────────────────────


def test_script_becomes_a_module(tmp_path: Path) -> None:
    """`python3 conduit.py` runs as `-m conduit`, in the same process, wherever it is started."""
    service = Server(tmp_path / "server")
    service.command = [sys.executable, "-X", "dev", str(ROOT / "conduit.py")]
    (tmp_path / "json.py").write_text("raise SystemExit('a file in the working directory was run')")
    service.cwd = tmp_path
    service.start()
    command = Path(f"/proc/{service.pid}/cmdline").read_bytes().split(b"\0")
    assert command[1:-1] == [b"-X", b"dev", b"-m", b"conduit"]
    assert service.stop() == 0


def test_bytecode_of_a_read_only_folder(tmp_path: Path) -> None:
    """Where nothing can or may be written beside the file, the database folder takes it."""
    script = tmp_path / "usr" / "conduit.py"
    script.parent.mkdir()
    environment = {
        "CONDUIT_CONFIG": "",
        "CONDUIT_SERVER_NAME": "x",
        "CONDUIT_DATABASE_PATH": str(tmp_path / "data"),
    }
    elsewhere = tmp_path / "data" / "bytecode" / "conduit.pyc"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "dont_write_bytecode", False)
        assert conduit.bytecode_file(script).parent == script.parent / "__pycache__"
        patch.setattr(sys, "dont_write_bytecode", True)
        assert conduit.bytecode_file(script) == elsewhere
        patch.setattr(sys, "dont_write_bytecode", False)
        patch.setattr(os, "access", lambda path, mode: False)
        assert conduit.bytecode_file(script) == elsewhere


# ── 26.5  The log ────────────────────────────────────────────────────────────


def test_log_lines() -> None:
    """Readable on a terminal; with levels for the journal, on each line of a traceback."""
    record = logging.LogRecord("conduit.http", logging.WARNING, "", 1, "one\ntwo", None, None)
    plain = conduit.LogFormatter(for_journal=False).format(record)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING http: one\ntwo", plain)
    journal = conduit.LogFormatter(for_journal=True).format(record)
    assert journal == "<4>WARNING http: one\n<4>two"


def test_loop_errors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """An exception that nobody awaited is in the log, with its traceback."""
    loop = asyncio.new_event_loop()
    conduit.log_loop_error(loop, {"message": "task failed", "exception": ValueError("lost")})
    conduit.log_loop_error(loop, {"message": "hung up", "exception": ConnectionResetError()})
    loop.close()
    assert "lost" in caplog.text
    assert "hung up" not in caplog.text


@pytest.mark.parametrize("no_bytecode", ["", "1"])
def test_started_as_a_script_it_never_compiles_itself(tmp_path: Path, no_bytecode: str) -> None:
    """The bytecode is there before the server starts, so that even the first start is small."""
    shutil.copy(ROOT / "conduit.py", tmp_path)
    port = free_port()
    environment = {
        **os.environ,
        "CONDUIT_CONFIG": "",
        "CONDUIT_SERVER_NAME": "x",
        "CONDUIT_PORT": str(port),
        "CONDUIT_DATABASE_PATH": str(tmp_path / "data"),
        "PYTHONDONTWRITEBYTECODE": no_bytecode,
    }
    command = [sys.executable, str(tmp_path / "conduit.py")]
    with subprocess.Popen(  # noqa: S603  our own command line
        command, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}/_matrix/client/versions"
            eventually(lambda: is_answering(url), 20)
            status = Path(f"/proc/{process.pid}/status").read_text()
        finally:
            process.terminate()
    resident = int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024
    assert resident <= 40


def is_answering(url: str) -> bool:
    """Whether a server answers 200 there."""
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


# ═════════════════════════════════════════════════════════════════════════════
#  SYSTEM
#
#  The whole server under what life brings: real encrypted clients, a pulled
#  plug, a full disk, a fault at every step, nonsense from the network, and the
#  first minute of somebody new.
# ═════════════════════════════════════════════════════════════════════════════

# ── Two encrypted clients ────────────────────────────────────────────────────


class Device:
    """One matrix-nio client with encryption, that notes what it could and could not read."""

    def __init__(self, server: Server, user_id: str, folder: Path) -> None:
        folder.mkdir()
        config = nio.AsyncClientConfig(encryption_enabled=True, store_sync_tokens=True)
        self.nio = nio.AsyncClient(server.url, user_id, store_path=str(folder), config=config)
        self.read: dict[str, nio.RoomMessage] = {}
        self.unreadable: dict[str, nio.MegolmEvent] = {}
        self.nio.add_event_callback(self._on_message, nio.RoomMessage)
        self.nio.add_event_callback(self._on_unreadable, nio.MegolmEvent)

    async def _on_message(self, _room: nio.MatrixRoom, event: Any) -> None:
        assert event.event_id not in self.read, "an event came twice"
        self.read[event.event_id] = event

    async def _on_unreadable(self, _room: nio.MatrixRoom, event: nio.MegolmEvent) -> None:
        self.unreadable[event.event_id] = event

    async def login(self) -> Device:
        """A new device of the user, its keys uploaded."""
        answer = await self.nio.login(PASSWORD, device_name="nio")
        assert isinstance(answer, nio.LoginResponse), answer
        await self.sync()
        return self

    async def sync(self) -> None:
        """One turn of what sync_forever does: sync, then what key management wants done."""
        answer = await self.nio.sync(0, sync_filter={"room": {"timeline": {"limit": 500}}})
        assert isinstance(answer, nio.SyncResponse), answer
        if self.nio.should_upload_keys:
            await self.nio.keys_upload()
        if self.nio.should_query_keys:
            await self.nio.keys_query()
        if self.nio.should_claim_keys:
            await self.nio.keys_claim(self.nio.get_users_for_key_claiming())
            self.nio.olm.collect_key_requests()
        await self.nio.send_to_device_messages()

    def trust_everyone(self) -> None:
        """Verify each device that this one knows, as comparing emoji would."""
        for device in self.nio.device_store:
            if not self.nio.olm.is_device_verified(device):
                self.nio.verify_device(device)

    async def say(self, room_id: str, content: Json) -> str:
        """Send an encrypted message to trusted devices only; its event id."""
        answer = await self.nio.room_send(room_id, "m.room.message", content)
        assert isinstance(answer, nio.RoomSendResponse), answer
        return str(answer.event_id)

    async def talk(self, room_id: str, texts: Iterable[str]) -> dict[str, str]:
        """Send texts; event id -> text."""
        return {
            await self.say(room_id, {"msgtype": "m.text", "body": text}): text for text in texts
        }

    def texts(self) -> dict[str, str]:
        """event id -> body of all that was readable."""
        return {event_id: event.body for event_id, event in self.read.items()}


@contextlib.asynccontextmanager
async def logged_in(*devices: Device) -> AsyncIterator[None]:
    """Log the devices in one by one, close them at the end."""
    try:
        for device in devices:
            await device.login()
        yield
    finally:
        for device in devices:
            await device.nio.close()


ENCRYPTED: Final[Json] = {
    "type": "m.room.encryption",
    "state_key": "",
    "content": {"algorithm": "m.megolm.v1.aes-sha2", "rotation_period_msgs": 50},
}


async def encrypted_room(host: Device, guest: Device) -> str:
    """An encrypted room of two, both joined and trusting each other's devices."""
    made = await host.nio.room_create(invite=[guest.nio.user_id], initial_state=[ENCRYPTED])
    assert isinstance(made, nio.RoomCreateResponse), made
    await guest.sync()
    assert isinstance(await guest.nio.join(made.room_id), nio.JoinResponse)
    for _ in range(2):
        for device in (host, guest):
            await device.sync()
            device.trust_everyone()
    return str(made.room_id)


async def send_picture(sender: Device, room_id: str, picture: bytes) -> str:
    """Upload an encrypted picture and send it; the event id."""
    uploaded, keys = await sender.nio.upload(
        io.BytesIO(picture), "image/png", "cat.png", encrypt=True, filesize=len(picture)
    )
    assert isinstance(uploaded, nio.UploadResponse), uploaded
    assert keys is not None
    content = {
        "msgtype": "m.image",
        "body": "cat.png",
        "info": {"mimetype": "image/png", "size": len(picture)},
        "file": {"url": uploaded.content_uri, "mimetype": "image/png", **keys},
    }
    return await sender.say(room_id, content)


async def open_picture(server: Server, viewer: Device, event_id: str) -> bytes:
    """Download the picture of an event the authenticated way and decrypt it."""
    event = viewer.read[event_id]
    assert isinstance(event, nio.RoomEncryptedImage)
    client = Client(server, viewer.nio.access_token)
    sealed = await asyncio.to_thread(client.download, event.url)
    assert sealed.status_code == 200, sealed.text
    return cast(
        "bytes",
        nio.crypto.decrypt_attachment(
            sealed.content, event.key["k"], event.hashes["sha256"], event.iv
        ),
    )


async def ask_for_keys(new: Device, old: Device, event: nio.MegolmEvent) -> None:
    """The new device asks for a room key; the old one, which trusts it, shares."""
    answer = await new.nio.request_room_key(event)
    assert isinstance(answer, nio.RoomKeyRequestResponse), answer
    for _ in range(4):  # request; claim a key for an Olm session; forward; receive
        await old.sync()
        old.trust_everyone()
        waiting = old.nio.olm.get_active_key_requests(new.nio.user_id, new.nio.device_id)
        for request in list(waiting):
            old.nio.continue_key_share(request)
        await new.sync()
        new.trust_everyone()


async def read_with_new_device(new: Device, old: Device, room_id: str, folder: Path) -> list[str]:
    """History as a second device reads it: one key by request, then all by key export."""
    page = await new.nio.room_messages(room_id, limit=1000)
    sealed = [event for event in page.chunk if isinstance(event, nio.MegolmEvent)]
    await ask_for_keys(new, old, sealed[0])
    assert new.nio.decrypt_event(sealed[0]).body
    await old.nio.export_keys(str(folder / "keys.txt"), "passphrase", count=1000)
    await new.nio.import_keys(str(folder / "keys.txt"), "passphrase")
    return [new.nio.decrypt_event(event).body for event in reversed(sealed)]


async def encrypted_conversation(server: Server, folder: Path, count: int) -> None:
    """The whole story; `count` messages each way, half of them after a restart."""
    for name in ("admin", "alice", "bob"):
        register(server, name)
    alice = Device(server, f"@alice:{server.name}", folder / "alice")
    bob = Device(server, f"@bob:{server.name}", folder / "bob")
    tablet = Device(server, f"@alice:{server.name}", folder / "tablet")
    sent: dict[str, str] = {}
    async with logged_in(alice, bob):
        room_id = await encrypted_room(alice, bob)
        for part in range(2):
            for device, name in ((alice, "alice"), (bob, "bob")):
                texts = [f"{name} {part} {n}" for n in range(count // 2)]
                sent |= await device.talk(room_id, texts)
                await alice.sync()
                await bob.sync()
            if part == 0:
                await asyncio.to_thread(server.restart)
        picture = random.Random(7).randbytes(300_000)  # noqa: S311  any bytes will do
        event_id = await send_picture(alice, room_id, picture)
        await bob.sync()
        await alice.sync()
        assert await open_picture(server, bob, event_id) == picture
        for device in (alice, bob):
            assert not device.unreadable
            assert device.texts() == {**sent, event_id: "cat.png"}
        async with logged_in(tablet):
            await tablet.sync()
            tablet.trust_everyone()
            await alice.sync()
            alice.trust_everyone()
            texts = await read_with_new_device(tablet, alice, room_id, folder)
            assert texts == [*sent.values(), "cat.png"]
            late = await alice.talk(room_id, ["for the tablet as well"])
            await tablet.sync()
            assert tablet.texts().items() >= late.items()


@slow
def test_two_encrypted_clients_over_a_restart(
    new_server: Callable[..., Server], tmp_path: Path
) -> None:
    asyncio.run(encrypted_conversation(new_server(), tmp_path, 200))


# ── The pulled plug ──────────────────────────────────────────────────────────
#
# The server runs under a few lines of Python that note in an append-only file what each
# fsync made durable.  SIGKILL ends it at a random moment, and what had not been synced is
# cut off its files: the tail of the write-ahead log, unsynced media, unsynced folder entries.


def wal_end(path: str) -> tuple[str, int]:
    """The salt of a write-ahead log, and where the last frame of that generation ends."""
    with open(path, "rb") as wal:
        header = wal.read(32)
        if len(header) < 32:
            return "", 0
        salt, frame = header[16:24], 24 + int.from_bytes(header[8:12], "big")
        end = 32
        while True:
            wal.seek(end)
            if wal.read(24)[8:16] != salt:
                return salt.hex(), end
            end += frame


def record_syncs(log: str, checkpoint_commits: int) -> None:
    """Runs in the server's process: append to the log what each successful sync made durable."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    real: dict[str, Callable[[int], None]] = {"fsync": os.fsync, "fdatasync": os.fdatasync}

    def note(*words: object) -> None:
        os.write(out, (" ".join(map(str, words)) + "\n").encode())

    def synced(name: str, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            words: tuple[object, ...] = ("dir", path, "/".join(sorted(os.listdir(path))))
        elif path.endswith("-wal"):
            words = ("wal", *wal_end(path))
        else:
            status = os.fstat(descriptor)
            words = ("file", status.st_ino, status.st_size)
        real[name](descriptor)
        note(*words)

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if "wal_checkpoint" not in sql:
                return super().execute(sql, *parameters)
            path = super().execute("PRAGMA database_list").fetchone()[2]
            note("checkpoint", "begins")
            cursor = super().execute(sql, *parameters)
            note("wal", *wal_end(path + "-wal"))
            return cursor

    vars(os).update({name: functools.partial(synced, name) for name in real})
    vars(sqlite3)["connect"] = functools.partial(sqlite3.connect, factory=Connection)
    conduit.CHECKPOINT_COMMITS = checkpoint_commits
    sys.exit(conduit.main())


def run_under(server: Server, hook: Callable[..., None], *helpers: Any, **arguments: Any) -> None:
    """Let the server be started by a function of this file that runs in its process."""
    source = "".join(inspect.getsource(function) for function in (*helpers, hook))
    heading = "from __future__ import annotations\nimport functools, os, signal, sqlite3, sys\n"
    heading += "import conduit\n"
    call = f"{hook.__name__}(**{arguments!r})\n"
    server.command = [sys.executable, "-c", heading + source + call]


class Durable:
    """What a log of record_syncs says would have survived a power cut."""

    def __init__(self, log: Path) -> None:
        self.salt, self.end = "", 0
        self.sizes: dict[int, int] = {}
        self.entries: dict[str, set[str]] = {}
        self.checkpointing = False
        for line in log.read_text().splitlines():
            kind, *words = line.split(" ")
            getattr(self, f"on_{kind}")(*words)

    def on_checkpoint(self, _begins: str) -> None:
        """SQLite syncs by itself now; until the next line nobody knows how far."""
        self.checkpointing = True

    def on_wal(self, salt: str, end: str) -> None:
        """The write-ahead log is durable up to here."""
        self.salt, self.end, self.checkpointing = salt, int(end), False

    def on_file(self, inode: str, size: str) -> None:
        """A file's bytes are durable."""
        self.sizes[int(inode)] = int(size)

    def on_dir(self, path: str, names: str = "") -> None:
        """A folder's entries are durable."""
        self.entries[path] = set(names.split("/"))

    def wal_length(self, wal: Path) -> int:
        """How much of a write-ahead log is sure to be there."""
        return self.end if wal_end(str(wal))[0] == self.salt else 0

    def cut(self, data: Path, chance: random.Random) -> None:
        """Take from a stopped server's files what had not been synced, or some of it."""
        (data / "conduit.db-shm").unlink(missing_ok=True)
        wal = data / "conduit.db-wal"
        if wal.exists() and not self.checkpointing:
            size = wal.stat().st_size
            sure = min(size, self.wal_length(wal))
            os.truncate(wal, chance.choice([sure, chance.randint(sure, size)]))
        for path in sorted(data.rglob("*")):
            if path.is_file() and not path.name.startswith("conduit.db") and path.suffix != ".lock":
                self._cut_file(path)

    def _cut_file(self, path: Path) -> None:
        if path.name not in self.entries.get(str(path.parent), set()):
            path.unlink()
        elif self.sizes.get(path.stat().st_ino, 0) < path.stat().st_size:
            os.truncate(path, self.sizes.get(path.stat().st_ino, 0))


class Sender:
    """Sends numbered messages; repeats a transaction whose answer never came."""

    def __init__(self, client: Client, room_id: str) -> None:
        self.client, self.room_id = client, room_id
        self.sent: dict[str, str] = {}
        self.pending = ""

    def step(self) -> None:
        """Send one message."""
        self.pending = self.pending or unique("message")
        event_id = self.client.send_text(self.room_id, self.pending, self.pending)
        self.sent[self.pending], self.pending = event_id, ""

    def settle(self) -> None:
        """After a restart: whether or not the message arrived, the repetition makes it one."""
        if self.pending:
            self.step()
        for txn, event_id in list(self.sent.items())[-2:]:
            assert self.client.send_text(self.room_id, txn, txn) == event_id, "sent twice"


class ToDeviceSender:
    """Sends numbered to-device messages, in the same way."""

    def __init__(self, client: Client, receiver: Client) -> None:
        self.client, self.receiver = client, receiver
        self.sent: list[str] = []
        self.pending = ""

    def step(self) -> None:
        """Send one."""
        self.pending = self.pending or unique("note")
        messages = {self.receiver.user_id: {self.receiver.device_id: {"n": self.pending}}}
        path = ("sendToDevice", "m.test", self.pending)
        ok(self.client.put(path, {"messages": messages}))
        self.sent.append(self.pending)
        self.pending = ""

    def settle(self) -> None:
        """After a restart: send again what was not acknowledged."""
        if self.pending:
            self.step()


class Receiver:
    """Syncs; whatever comes must come once, over all restarts."""

    FILTER: Final[Json] = {"room": {"timeline": {"limit": 1000}}, "presence": {"not_types": ["*"]}}

    def __init__(self, client: Client, room_id: str) -> None:
        self.client, self.room_id = client, room_id
        self.client.poll(filter=self.FILTER)
        self.notes: set[str] = set()
        self.events: dict[str, str] = {}

    def step(self) -> Json:
        """One sync, its answer noted before the next one acknowledges it."""
        result = self.client.poll(timeout=20, filter=self.FILTER)
        for message in result.get("to_device", {}).get("events", []):
            number = message["content"]["n"]
            assert number not in self.notes, f"to-device message {number} came twice"
            self.notes.add(number)
        room = result.get("rooms", {}).get("join", {}).get(self.room_id, {})
        assert not room.get("timeline", {}).get("limited"), "a gap"
        for event in self.client.timeline(self.room_id, result):
            assert event["event_id"] not in self.events, f"{event['event_id']} came twice"
            self.events[event["event_id"]] = event["content"].get("body", "")
        return result

    def settle(self) -> None:
        """Sync until nothing more comes."""
        while (result := self.step()).keys() & {"rooms", "to_device"}:
            assert result["next_batch"] == self.client.since


class KeyOwner:
    """Uploads one-time keys of a device, a few at a time."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.signing = nacl.signing.SigningKey.generate()
        self.acknowledged: set[str] = set()
        self.attempted: set[str] = set()
        device_keys: Json = {
            "user_id": client.user_id,
            "device_id": client.device_id,
            "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
            "keys": {
                f"curve25519:{client.device_id}": unpadded(secrets.token_bytes(32)),
                f"ed25519:{client.device_id}": unpadded(bytes(self.signing.verify_key)),
            },
        }
        ok(client.post("keys/upload", {"device_keys": self.signed(device_keys)}))

    def signed(self, value: Json) -> Json:
        """The object with this device's signature."""
        signature = self.signing.sign(conduit.canonical_json(value)).signature
        name = f"ed25519:{self.client.device_id}"
        return {**value, "signatures": {self.client.user_id: {name: unpadded(signature)}}}

    def step(self) -> None:
        """Upload five keys."""
        names = {f"signed_curve25519:{unique('K')}" for _ in range(5)}
        keys = {name: self.signed({"key": unpadded(secrets.token_bytes(32))}) for name in names}
        self.attempted |= names
        ok(self.client.post("keys/upload", {"one_time_keys": keys}))
        self.acknowledged |= names

    def count(self) -> int:
        """How many keys the server says that it has."""
        counts = ok(self.client.post("keys/upload", {}))["one_time_key_counts"]
        return int(counts.get("signed_curve25519", 0))

    def settle(self) -> None:
        """Nothing to repeat: an upload without an answer may or may not have happened."""


class KeyClaimer:
    """Claims the keys of a KeyOwner; no key may come twice."""

    def __init__(self, client: Client, owner: KeyOwner) -> None:
        self.client, self.owner = client, owner
        self.claimed: set[str] = set()
        self.unanswered = 0

    def step(self) -> bool:
        """Claim one key; whether there was one."""
        user_id, device_id = self.owner.client.user_id, self.owner.client.device_id
        body = {"one_time_keys": {user_id: {device_id: "signed_curve25519"}}}
        self.unanswered += 1
        answer = ok(self.client.post("keys/claim", body))["one_time_keys"]
        self.unanswered -= 1
        keys = answer.get(user_id, {}).get(device_id, {})
        for name in keys:
            assert name in self.owner.attempted
            assert name not in self.claimed, f"{name} was handed out twice"
            self.claimed.add(name)
        return bool(keys)

    def settle(self) -> None:
        """The server has what was acknowledged and not claimed; unanswered requests blur it."""
        count = self.owner.count()
        assert count <= len(self.owner.attempted) - len(self.claimed)
        assert count >= len(self.owner.acknowledged) - len(self.claimed) - self.unanswered


class MediaSender:
    """Uploads files and looks at them again."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.files: dict[str, bytes] = {}

    def step(self) -> None:
        """Upload one file."""
        data = secrets.token_bytes(secrets.randbelow(30_000) + 1)
        self.files[self.client.upload(data)] = data

    def settle(self) -> None:
        """The latest files are whole."""
        for mxc, data in list(self.files.items())[-5:]:
            assert self.client.download(mxc).content == data


class DeviceMaker:
    """Logs in again and again, and out; each token that was given out works."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.devices: list[Client] = []

    def step(self) -> None:
        """Log in once, and log the oldest device out."""
        self.devices.append(self.client.login())
        if len(self.devices) > 2:
            ok(self.devices.pop(0).post("logout"))

    def settle(self) -> None:
        """The tokens work."""
        for device in self.devices:
            assert ok(device.get("account/whoami"))["device_id"] == device.device_id


def unpadded(data: bytes) -> str:
    """Base64 as Matrix writes it."""
    return base64.b64encode(data).decode().rstrip("=")


class Crowd:
    """All of them in one room on one server, and the rounds in which its plug is pulled."""

    def __init__(self, server: Server) -> None:
        self.server = server
        register(server, "admin")
        clients = [register(server, f"user{n}") for n in range(4)]
        for client in clients:
            client.checked = False  # the schema check would take most of the time
        self.room_id = clients[0].room_with(*clients[1:])
        self.senders = [Sender(client, self.room_id) for client in clients[:3]]
        self.receiver = Receiver(clients[3], self.room_id)
        self.notes = ToDeviceSender(clients[0].login(), clients[3])
        self.keys = KeyOwner(clients[1].login())
        self.claimer = KeyClaimer(clients[2].login(), self.keys)
        others = (MediaSender(clients[0].login()), DeviceMaker(clients[3]))
        self.people: list[Any] = [*self.senders, self.notes, self.receiver, self.keys, *others]
        self.people.append(self.claimer)
        for person in self.people:
            person.client.checked = False

    def live(self, seconds: float) -> None:
        """Everybody acts at once; then SIGKILL."""
        with ThreadPoolExecutor(len(self.people)) as pool:
            acts = [pool.submit(self.act, person) for person in self.people]
            time.sleep(seconds)
            self.server.kill9()
        for act in acts:
            act.result()

    def act(self, person: Any) -> None:
        """One step after the other until the server is gone."""
        with contextlib.suppress(httpx.TransportError):
            while True:
                person.step()
                time.sleep(0.001)

    def settle(self) -> None:
        """After the restart: all that was acknowledged is there, once."""
        for person in self.people:
            if person is not self.receiver:
                person.settle()
        self.receiver.settle()
        for sender in self.senders:
            for body, event_id in sender.sent.items():
                assert self.receiver.events.get(event_id) == body, f"{body} is lost"
        assert self.receiver.notes >= set(self.notes.sent), "a to-device message is lost"

    def reckon(self) -> None:
        """At the very end: the whole history and all keys."""
        sent = [body for sender in self.senders for body in sender.sent]
        assert sorted(self.senders[0].client.bodies(self.room_id)) == sorted(sent)
        while self.claimer.step():
            pass
        lost = self.keys.acknowledged - self.claimer.claimed
        assert len(lost) <= self.claimer.unanswered, f"keys are lost: {lost}"


@slow
@pytest.mark.parametrize("seed", [1, 2])
def test_sec_a2_nothing_is_lost_when_the_plug_is_pulled(
    new_server: Callable[..., Server], seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311  chance for tests
    rounds = int(os.environ.get("PLUG_ROUNDS", "50"))
    server = new_server(start=False)
    log = server.folder / "syncs"
    run_under(server, record_syncs, wal_end, log=str(log), checkpoint_commits=40)
    crowd = Crowd(server.start())
    for _ in range(rounds):
        crowd.live(chance.uniform(0.02, 0.5))
        Durable(log).cut(server.data, chance)
        assert not conduit.check_database(server.data)
        server.start()
        crowd.settle()
    crowd.reckon()
    server.stop()
    server.check()


def messages_in(database: Path) -> list[int]:
    """The numbers of the messages that a database file (with its log) holds, once checked."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        events = [json.loads(row[0]) for row in connection.execute("SELECT pdu FROM events")]
    return sorted(event["content"]["n"] for event in events if event["type"] == "m.number")


def test_sec_a3_every_cut_of_the_log_leaves_a_prefix(
    new_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = new_server(start=False)
    log = server.folder / "syncs"
    run_under(server, record_syncs, wal_end, log=str(log), checkpoint_commits=100_000)
    alice = register(server.start(), "alice")
    room_id = alice.create_room()
    durable = []  # how much of the log was durable when message n was acknowledged
    for number in range(20):
        alice.send(room_id, "m.number", {"n": number})
        durable.append(Durable(log).end)
    server.kill9()
    wal = (server.data / "conduit.db-wal").read_bytes()
    frame = 24 + int.from_bytes(wal[8:12], "big")
    cuts = {32 + frame * n for n in range(len(wal) // frame + 1)} | set(range(0, len(wal), 4096))
    copy = tmp_path / "conduit.db"
    before = 0
    for cut in sorted(cut for cut in cuts if cut >= durable[0] - 20 * frame):
        shutil.copy(server.data / "conduit.db", copy)
        (tmp_path / "conduit.db-wal").write_bytes(wal[:cut])
        (tmp_path / "conduit.db-shm").unlink(missing_ok=True)
        numbers = messages_in(copy)
        assert numbers == list(range(len(numbers))), "not a prefix"
        assert len(numbers) >= max(before, sum(end <= cut for end in durable))
        before = len(numbers)
    assert before == 20


# ── A fault at every step ────────────────────────────────────────────────────


def fail_at_step(control: str) -> None:
    """Runs in the server's process: after SIGUSR2, the n-th write statement finds the disk full.

    The control file says "n" or "n rollback" (SQLite undid the transaction as well); it is answered
    with the steps that the previous order had left.
    """

    class Connection(sqlite3.Connection):
        left = 0
        undo = False

        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            verb = sql.split(None, 1)[0].upper()
            if verb in {"INSERT", "UPDATE", "DELETE", "REPLACE", "BEGIN", "COMMIT"}:
                Connection.left -= 1
                if Connection.left == 0:
                    if Connection.undo and self.in_transaction:
                        super().execute("ROLLBACK")
                    raise sqlite3.OperationalError("database or disk is full")
            return super().execute(sql, *parameters)

    def order(*_: object) -> None:
        with open(control) as file:
            words = file.read().split()
        left, Connection.left = Connection.left, int(words[0])
        Connection.undo = "rollback" in words
        with open(control + ".answer", "w") as file:
            file.write(f"{left} ")

    signal.signal(signal.SIGUSR2, order)
    vars(sqlite3)["connect"] = functools.partial(sqlite3.connect, factory=Connection)
    sys.exit(conduit.main())


class Faults:
    """The test's end of fail_at_step."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.control = server.folder / "fault"
        self.answer = server.folder / "fault.answer"
        run_under(server, fail_at_step, control=str(self.control))

    def order(self, words: str) -> int:
        """Arm (or with "0" disarm) the fault; how many steps the previous order had left."""
        self.control.write_text(words)
        self.answer.unlink(missing_ok=True)
        os.kill(self.server.pid, signal.SIGUSR2)
        deadline = time.monotonic() + 10
        while not (self.answer.exists() and self.answer.read_text().endswith(" ")):
            assert time.monotonic() < deadline, "the server does not answer to the signal"
            time.sleep(0.001)
        return int(self.answer.read_text())


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ, and how."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{path}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}/{index}")
    elif one != other:
        yield f"{path}: {json.dumps(one)[:300]} and {json.dumps(other)[:300]}"


class Story:
    """A conversation of which every request may fail, and what must be true afterwards."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.alice, self.bob, self.carol = (register(server, n) for n in ("alice", "bob", "carol"))
        self.alice.checked = self.bob.checked = self.carol.checked = False
        self.carol.create_room()  # of her own: her name spreads to rooms in the background
        self.room_id = self.alice.room_with(self.bob)
        self.keys = KeyOwner(self.bob)
        self.claimer = KeyClaimer(self.alice, self.keys)
        self.sent: list[str] = []
        self.topics = ["first"]
        self.alice.set_state(self.room_id, "m.room.topic", {"topic": "first"})
        self.failed = 0

    def attempt(self, response: httpx.Response) -> bool:
        """Whether a request was acknowledged; a refusal must be a clear error."""
        if response.status_code == 200:
            return True
        self.failed += 1
        assert response.status_code in (500, 503, 507), response.text
        assert response.json()["errcode"].startswith("M_"), response.text
        return False

    def tell(self) -> None:
        """Each kind of write once."""
        alice, bob, room = self.alice, self.bob, ("rooms", self.room_id)
        text = unique("text")
        body = {"msgtype": "m.text", "body": text}
        if self.attempt(alice.put((*room, "send", "m.room.message", text), body)):
            self.sent.append(text)
        topic = {"topic": text}
        if self.attempt(alice.put((*room, "state", "m.room.topic", ""), topic)):
            self.topics.append(text)
        self.attempt(bob.put(("user", bob.user_id, "account_data", "m.test"), {"n": text}))
        profile = ("profile", self.carol.user_id, "displayname")
        self.attempt(self.carol.put(profile, {"displayname": text}))
        notes = {"messages": {bob.user_id: {bob.device_id: {"n": text}}}}
        self.attempt(alice.put(("sendToDevice", "m.test", text), notes))
        names = {f"signed_curve25519:{unique('K')}" for _ in range(2)}
        self.keys.attempted |= names
        keys = {
            name: self.keys.signed({"key": unpadded(secrets.token_bytes(32))}) for name in names
        }
        self.attempt(bob.post("keys/upload", {"one_time_keys": keys}))
        self.attempt(bob.post((*room, "receipt", "m.read", self.last_event()), {}))
        made = alice.post("createRoom", {"invite": [bob.user_id], "name": text})
        if self.attempt(made):
            self.attempt(bob.post(("rooms", made.json()["room_id"], "join")))
            self.attempt(bob.post(("rooms", made.json()["room_id"], "leave")))
        self.attempt(alice.request("POST", "/_matrix/media/v3/upload", content=b"x" * 100))
        login = {"type": "m.login.password", "password": PASSWORD}
        identifier = {"type": "m.id.user", "user": "alice"}
        answer = bob.post("login", {**login, "identifier": identifier})
        if self.attempt(answer):
            device = client_from(self.server, answer.json())
            device.checked = False
            self.attempt(device.post("logout"))

    def last_event(self) -> str:
        """The newest event of the room."""
        return str(self.alice.messages(self.room_id, limit=1)["chunk"][0]["event_id"])

    def hold(self) -> None:
        """What was acknowledged is there, what was refused is not."""
        assert self.alice.bodies(self.room_id) == self.sent
        assert self.bob.state(self.room_id, "m.room.topic") == {"topic": self.topics[-1]}

    def picture(self) -> list[Json]:
        """What two users see of everything, for comparing before and after a restart."""
        seen = []
        for client in (self.alice, self.bob):
            result = client.sync(filter={"presence": {"not_types": ["*"]}})
            for room in result["rooms"].get("join", {}).values():
                room["timeline"].pop("prev_batch", None)
            result.pop("next_batch")
            seen.append(json.loads(re.sub(r'"age": \d+', '"age": 0', json.dumps(result))))
        return seen


@slow
@pytest.mark.parametrize("mode", ["", " rollback"])
def test_sec_a1_a_fault_at_every_step(new_server: Callable[..., Server], mode: str) -> None:
    server = new_server(start=False)
    faults = Faults(server)
    story = Story(server.start())
    step, left = 0, 0
    while left <= 0:  # until a whole story passes before the fault
        step += 1
        faults.order(f"{step}{mode}")
        story.tell()
        left = faults.order("0")
        story.hold()
        if step % 25 == 0:
            assert not conduit.check_database(server.data)
            before = story.picture()
            server.restart()
            assert not list(differences(before, story.picture())), "memory and disk disagree"
    assert step > 40
    assert story.failed >= step // 2
    server.restart()
    story.hold()
    server.stop()
    server.check()


# ── A full disk ──────────────────────────────────────────────────────────────


def refused(response: httpx.Response) -> bool:
    """Whether a write was refused with a clear 5xx."""
    if response.status_code == 200:
        return False
    assert response.status_code in (500, 503, 507), response.text
    assert response.json()["errcode"].startswith("M_")
    return True


def live_through_a_full_disk(
    server: Server, fill: Callable[[], None], free: Callable[[], None]
) -> None:
    """Writes are refused clearly while the disk is full, reads go on, and it gets well again."""
    alice = register(server, "alice")
    alice.checked = False
    room_id = alice.create_room()
    kept = [unique("before") for _ in range(3)]
    for text in kept:
        alice.send_text(room_id, text)
    fill()
    refusals = 0
    for number in range(200):
        body = {"msgtype": "m.text", "body": f"{number} " + "x" * 20_000}
        if refused(alice.put(("rooms", room_id, "send", "m.room.message", unique("txn")), body)):
            refusals += 1
        else:
            kept.append(body["body"])
    assert refusals > 5, "the disk was never full"
    upload = alice.request("POST", "/_matrix/media/v3/upload", content=b"x" * 10_000_000)
    assert refused(upload)
    assert alice.bodies(room_id) == kept
    assert ok(alice.get("account/whoami"))["user_id"] == alice.user_id
    assert alice.sync()["rooms"]["join"]
    free()
    kept.append("after")
    alice.send_text(room_id, "after")
    assert alice.download(alice.upload(b"y" * 1_000_000)).status_code == 200
    server.restart()
    assert alice.bodies(room_id) == kept
    server.stop()
    server.check()


def test_sec_a4_disk_full_by_file_size_limit(new_server: Callable[..., Server]) -> None:
    server = new_server()
    old = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)

    def limit(soft: int) -> None:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (soft, old[1]))

    largest = max(path.stat().st_size for path in server.data.rglob("*") if path.is_file())
    live_through_a_full_disk(server, lambda: limit(largest + 1_000_000), lambda: limit(old[0]))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:  # noqa: S603  as root only
        pytest.skip("no right to mount a file system here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)  # noqa: S603, S607  what was mounted above


def test_sec_a4_disk_full_on_a_small_disk(
    new_server: Callable[..., Server], small_disk: Path
) -> None:
    server = new_server(database_path=str(small_disk / "data"))
    filler = small_disk / "filler"

    def fill() -> None:
        room = shutil.disk_usage(small_disk).free - 1_000_000
        filler.write_bytes(b"\0" * max(0, room))

    live_through_a_full_disk(server, fill, filler.unlink)


# ═════════════════════════════════════════════════════════════════════════════
#  NONSENSE FROM THE NETWORK
#
#  Wrong values in every field of every endpoint, sensible requests taken apart
#  piece by piece, bytes shuffled below HTTP: no 5xx, no traceback, no hung
#  connection, and memory stays where it was.
# ═════════════════════════════════════════════════════════════════════════════

WRONG: Final[tuple[Any, ...]] = (
    None, True, 0, -1, 2**63, 1.5, 1e300, "", "x", "x" * 1000, "@x:y", "!x:y", "\0", "\ud800",
    "m.room.member", [], [None], [[[]]], {}, {"": None}, {"a": {"b": [1]}}, {"m.room.create": {}},
)  # fmt: skip
WRONG_BODIES: Final = (
    b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe{}", b'{"a":' * 5000, b"[" * 100_000, b"{}" * 2,
    b'{"a": NaN}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\xed\xa0\x80"}',
    b"0" * 70_000,
)  # fmt: skip
WRONG_SEGMENTS: Final = (
    "", "x", "..", "%2e%2e", "%2f", "%00", "%ff", "%", "%zz", "%ed%a0%80", "x" * 2000, "@x:y",
    "!x:y", "-1", "9" * 30, "{}", "a%0d%0ab", "%F0%9F%92%A9", "m.room.create", "*",
)  # fmt: skip


def replaced(value: Any, wrongs: Sequence[Any]) -> Iterator[Any]:
    """The value with each of its parts, one at a time, replaced by each wrong thing."""
    yield from wrongs
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: changed} for changed in replaced(inner, wrongs))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from ([*value[:at], new, *value[at + 1 :]] for new in replaced(inner, wrongs))


class Nonsense:
    """A user in a room with all sorts of things in it, and requests that make little sense."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.http = httpx.Client(base_url=server.url, timeout=10)
        self.count = 0
        self.problems: dict[str, str] = {}  # one example of each kind
        self.renew()

    def renew(self) -> None:
        """A fresh user with a fresh room: the last one may have been logged out or deactivated."""
        self.alice = alice = register(self.server, unique("alice"))
        self.bob = bob = register(self.server, unique("bob"))
        alice.checked = bob.checked = False
        room_id = alice.room_with(bob)
        event_id = alice.send_text(room_id, "hello")
        media = alice.upload(b"\x89PNG", "image/png").rsplit("/", 1)[1]
        alias = f"#{unique('alias')}:{self.server.name}"
        ok(alice.put(("directory", "room", alias), {"room_id": room_id}))
        filter_id = ok(alice.post(("user", alice.user_id, "filter"), {"room": {}}))["filter_id"]
        backup = {"algorithm": "m.megolm_backup.v1.curve25519-aes-sha2", "auth_data": {}}
        version = alice.post("room_keys/version", backup).json().get("version", "1")
        self.names = {
            "userId": alice.user_id, "roomId": room_id, "eventId": event_id, "mediaId": media,
            "roomAlias": alias, "roomIdOrAlias": room_id, "filterId": filter_id,
            "serverName": self.server.name, "deviceId": alice.device_id, "version": version,
            "eventType": "m.room.message", "type": "m.test", "stateKey": "", "sessionId": "s",
            "kind": "override", "ruleId": ".m.rule.master", "attr": "enabled", "scope": "global",
            "receiptType": "m.read", "relType": "m.thread",
            "keyName": "displayname", "tag": "u.x",
            "event": event_id, "bob": bob.user_id, "bob_device": bob.device_id,
        }  # fmt: skip

    def alive(self) -> None:
        """Start anew if the last requests ended the session."""
        if self.alice.get("account/whoami").status_code != 200:
            self.renew()

    def send(self, method: str, path: str, content: bytes | None = None) -> None:
        """One request, which is to be answered in time, without a 5xx, and with a Matrix error."""
        self.count += 1
        headers = {"Authorization": f"Bearer {self.alice.token}"}
        what = f"{method} {path[:300]} {(content or b'')[:500]!r}"
        try:
            answer = self.http.request(method, path, content=content, headers=headers)
        except httpx.TransportError as error:
            self.problems.setdefault(f"{method} {type(error)}", f"{what}: {error}")
            return
        status = answer.status_code
        if status >= 500 or (status >= 400 and not answer.json().keys() & {"errcode", "flows"}):
            route = re.sub(r"[!@$#%][^/?]*|\d+", "*", path.partition("?")[0])
            self.problems.setdefault(f"{method} {route[:80]} {status}", what)

    def judge(self) -> None:
        """Fail with one example of each problem."""
        report = [f"{what}\n    {first}" for what, first in self.problems.items()]
        assert not report, "\n".join(report)

    def send_json(self, method: str, path: str, value: Any) -> None:
        """The same with a JSON body (lone surrogates go out as escapes)."""
        self.send(method, path, json.dumps(value).encode())

    def fill(self, template: str, **changes: str) -> str:
        """A path with its parameters filled in, percent-encoded; changes go in as they are."""

        def value(found: re.Match[str]) -> str:
            name = found[1]
            return changes.get(name, quote(self.names.get(name) or unique("x"), safe=""))

        return re.sub(r"\{(\w+)\}", value, template)

    def filled(self, value: Any) -> Any:
        """A JSON template with "<name>" replaced by the name's value."""
        return json.loads(
            re.sub(r"<(\w+)>", lambda m: self.names.get(m[1], m[0]), json.dumps(value))
        )

    def syncs(self) -> None:
        """Whatever got into the room, both users can still sync, from the start."""
        for client in (self.alice, self.bob):
            client.sync(timeout=0)


DEFAULTS: Final[Json] = {"string": "x", "integer": 1, "number": 1, "boolean": True, "array": []}


def client_endpoints() -> list[Json]:
    """The client-server endpoints of the specification, from its data beside the checker."""
    path = SPEC_TOOLS.parent / "spec" / "endpoints.json"
    if not path.exists():
        pytest.skip("the specification's list of endpoints is not here")
    listed = json.loads(path.read_text())
    return [each for each in listed if each["api"] in ("client-server", "msc")]


def try_bodies(nonsense: Nonsense, endpoint: Json) -> None:
    """Wrong values in each body field of an endpoint, and bodies that are no such object."""
    method, path = endpoint["method"], endpoint["path"]
    fields = (endpoint["request"] or {}).get("fields") or {}
    plain = {name: DEFAULTS.get(kind, {}) for name, kind in fields.items()}
    for name in fields:
        for wrong in WRONG:
            nonsense.send_json(method, nonsense.fill(path), {**plain, name: wrong})
    for body in WRONG_BODIES if method != "GET" else ():
        nonsense.send(method, nonsense.fill(path), body)


def try_paths(nonsense: Nonsense, endpoint: Json) -> None:
    """Wrong values in each path and query parameter of an endpoint."""
    method, path = endpoint["method"], endpoint["path"]
    tail = "?timeout=0" if "timeout" in endpoint["query"] else "?"
    for name in re.findall(r"\{(\w+)\}", path):
        for segment in WRONG_SEGMENTS:
            nonsense.send(method, nonsense.fill(path, **{name: segment}) + tail)
    for name in endpoint["query"]:
        for value in WRONG_SEGMENTS if name != "timeout" else ("x", "-1", "%00", "0.5"):
            nonsense.send(method, nonsense.fill(path) + f"{tail}&{name}={value}")


@slow
def test_wrong_values_in_every_field_of_every_endpoint(new_server: Callable[..., Server]) -> None:
    nonsense = Nonsense(new_server(log="warn"))
    endpoints = client_endpoints()
    middle = 0.0
    for number, endpoint in enumerate(endpoints):
        nonsense.alive()
        try_bodies(nonsense, endpoint)
        nonsense.alive()
        try_paths(nonsense, endpoint)
        if number == len(endpoints) // 2:
            middle = nonsense.server.rss()
    nonsense.judge()
    assert nonsense.count > 5000
    assert nonsense.server.rss() < middle + 40, "memory grows"


# Requests that make sense; the tests take them apart.  <name> is replaced by a value of Nonsense.
SENSIBLE: Final[tuple[tuple[str, str, Any], ...]] = (
    ("POST", "createRoom", {
        "preset": "trusted_private_chat", "visibility": "private", "name": "n", "topic": "t",
        "invite": ["<bob>"], "room_version": "11", "creation_content": {"m.federate": False},
        "initial_state": [{"type": "m.room.name", "state_key": "", "content": {"name": "x"}}],
        "power_level_content_override": {"users": {"<userId>": 100}, "events": {"a": 50}},
        "is_direct": True,
    }),
    ("PUT", "rooms/{roomId}/state/m.room.power_levels", {
        "users": {"<userId>": 100}, "users_default": 0, "events": {"m.room.name": 50}, "ban": 50,
        "events_default": 0, "state_default": 50, "kick": 50, "redact": 50, "invite": 0,
        "notifications": {"room": 50},
    }),
    ("PUT", "rooms/{roomId}/state/m.room.member/{bob}", {"membership": "invite", "reason": "r"}),
    ("PUT", "rooms/{roomId}/state/m.room.join_rules", {
        "join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": "<roomId>"}],
    }),
    ("PUT", "rooms/{roomId}/state/m.room.server_acl", {"allow": ["*"], "deny": ["x"]}),
    ("PUT", "rooms/{roomId}/state/m.room.canonical_alias", {
        "alias": "<roomAlias>", "alt_aliases": ["<roomAlias>"],
    }),
    ("PUT", "rooms/{roomId}/state/m.room.history_visibility", {"history_visibility": "shared"}),
    ("PUT", "rooms/{roomId}/state/m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2"}),
    ("PUT", "rooms/{roomId}/state/m.room.create", {"creator": "<userId>"}),
    ("PUT", "rooms/{roomId}/state/m.room.name", {"name": "x"}),
    ("PUT", "rooms/{roomId}/state/m.room.tombstone", {"body": "x", "replacement_room": "<roomId>"}),
    ("PUT", "rooms/{roomId}/send/m.room.message/{txnId}", {
        "msgtype": "m.text", "body": "b", "format": "org.matrix.custom.html", "formatted_body": "b",
        "m.mentions": {"user_ids": ["<bob>"], "room": True},
        "m.relates_to": {"rel_type": "m.thread", "event_id": "<event>", "is_falling_back": True,
                         "m.in_reply_to": {"event_id": "<event>"}},
    }),
    ("PUT", "rooms/{roomId}/send/m.reaction/{txnId}", {
        "m.relates_to": {"rel_type": "m.annotation", "event_id": "<event>", "key": "+"},
    }),
    ("PUT", "rooms/{roomId}/redact/{eventId}/{txnId}", {"reason": "r"}),
    ("POST", "rooms/{roomId}/read_markers", {"m.fully_read": "<event>", "m.read": "<event>"}),
    ("POST", "rooms/{roomId}/receipt/m.read/{eventId}", {"thread_id": "main"}),
    ("PUT", "rooms/{roomId}/typing/{userId}", {"typing": True, "timeout": 1000}),
    ("POST", "rooms/{roomId}/kick", {"user_id": "<bob>", "reason": "r"}),
    ("POST", "rooms/{roomId}/invite", {"user_id": "<bob>", "reason": "r"}),
    ("POST", "rooms/{roomId}/join", {"reason": "r", "third_party_signed": {
        "sender": "<bob>", "mxid": "<userId>", "token": "t", "signatures": {"x": {"a:0": "s"}},
    }}),
    ("POST", "keys/upload", {
        "device_keys": {"user_id": "<userId>", "device_id": "<deviceId>", "algorithms": ["a"],
                        "keys": {"ed25519:<deviceId>": "k", "curve25519:<deviceId>": "k"},
                        "signatures": {"<userId>": {"ed25519:<deviceId>": "s"}}},
        "one_time_keys": {"signed_curve25519:A": {"key": "k", "signatures": {}}},
        "fallback_keys": {"signed_curve25519:B": {"key": "k", "fallback": True, "signatures": {}}},
    }),
    ("POST", "keys/query", {"device_keys": {"<bob>": ["<bob_device>"]}, "timeout": 0}),
    ("POST", "keys/claim", {"one_time_keys": {"<bob>": {"<bob_device>": "signed_curve25519"}}}),
    ("POST", "keys/signatures/upload", {"<userId>": {"<deviceId>": {
        "user_id": "<userId>", "device_id": "<deviceId>", "signatures": {"<userId>": {"a:b": "c"}},
    }}}),
    ("POST", "keys/device_signing/upload", {
        "master_key": {"user_id": "<userId>", "usage": ["master"], "keys": {"ed25519:k": "k"}},
        "self_signing_key": {"user_id": "<userId>", "usage": ["self_signing"], "keys": {}},
        "auth": {"type": "m.login.password", "session": "s", "password": "p"},
    }),
    ("PUT", "sendToDevice/m.test/{txnId}", {"messages": {"<bob>": {"<bob_device>": {"a": 1}}}}),
    ("PUT", "room_keys/keys?version={version}", {"rooms": {"<roomId>": {"sessions": {"s": {
        "first_message_index": 1, "forwarded_count": 0, "is_verified": True,
        "session_data": {"ciphertext": "c"},
    }}}}}),
    ("PUT", "room_keys/version/{version}", {"algorithm": "a", "auth_data": {"public_key": "k"}}),
    ("POST", "user/{userId}/filter", {
        "event_fields": ["content.body"], "event_format": "client",
        "presence": {"types": ["*"], "limit": 1}, "account_data": {"not_types": ["a"]},
        "room": {"rooms": ["<roomId>"], "not_rooms": ["!x:y"], "include_leave": True,
                 "timeline": {"limit": 5, "senders": ["<bob>"], "types": ["m.*"],
                              "contains_url": True, "lazy_load_members": True},
                 "state": {"lazy_load_members": True, "unread_thread_notifications": True}},
    }),
    ("PUT", "pushrules/global/override/x", {
        "conditions": [{"kind": "event_match", "key": "content.body", "pattern": "a*"},
                       {"kind": "room_member_count", "is": "2"},
                       {"kind": "event_property_is", "key": "a", "value": 1}],
        "actions": ["notify", {"set_tweak": "sound", "value": "default"}],
    }),
    ("PUT", "pushrules/global/content/y", {"pattern": "a*b", "actions": ["notify"]}),
    ("POST", "pushers/set", {
        "app_id": "a", "pushkey": "k", "kind": "http", "app_display_name": "n", "lang": "en",
        "device_display_name": "d", "data": {"url": "https://x.example/_matrix/push/v1/notify"},
        "append": True,
    }),
    ("PUT", "user/{userId}/rooms/{roomId}/tags/u.x", {"order": 0.5}),
    ("PUT", "user/{userId}/account_data/m.ignored_user_list", {"ignored_users": {"<bob>": {}}}),
    ("PUT", "user/{userId}/account_data/m.direct", {"<bob>": ["<roomId>"]}),
    ("PUT", "presence/{userId}/status", {"presence": "online", "status_msg": "s"}),
    ("PUT", "devices/{deviceId}", {"display_name": "d"}),
    ("POST", "login", {"type": "m.login.password", "password": "p", "device_id": "d",
                       "identifier": {"type": "m.id.user", "user": "u"}, "refresh_token": True}),
    ("POST", "register", {"username": "u", "password": "p", "device_id": "d", "inhibit_login": True,
                          "auth": {"type": "m.login.dummy", "session": "s"}}),
    ("POST", "search", {"search_categories": {"room_events": {
        "search_term": "a", "keys": ["content.body"], "order_by": "recent", "filter": {"limit": 5},
        "event_context": {"before_limit": 1, "after_limit": 1, "include_profile": True},
        "groupings": {"group_by": [{"key": "room_id"}]},
    }}}),
    ("POST", "user_directory/search", {"search_term": "a", "limit": 5}),
    ("POST", "publicRooms", {
        "limit": 5, "filter": {"generic_search_term": "a", "room_types": [None]},
    }),
    ("POST", "rooms/{roomId}/upgrade", {"new_version": "11"}),
    ("PUT", "directory/list/room/{roomId}", {"visibility": "public"}),
)  # fmt: skip


@slow
def test_sensible_requests_with_every_part_replaced(new_server: Callable[..., Server]) -> None:
    nonsense = Nonsense(new_server(log="warn"))
    for method, path, template in SENSIBLE:
        nonsense.alive()
        for body in replaced(nonsense.filled(template), WRONG):
            nonsense.send_json(method, CLIENT + nonsense.fill(path), body)
        nonsense.alive()
        nonsense.syncs()
    nonsense.judge()


@slow
def test_filters_with_every_part_replaced(new_server: Callable[..., Server]) -> None:
    nonsense = Nonsense(new_server(log="warn"))
    template = next(body for _, path, body in SENSIBLE if path.endswith("/filter"))
    messages = nonsense.fill(f"{CLIENT}rooms/{{roomId}}/messages?dir=b&filter=")
    for body in replaced(nonsense.filled(template), WRONG):
        text = quote(json.dumps(body))
        nonsense.send("GET", f"{CLIENT}sync?timeout=0&filter={text}")
        nonsense.send("GET", messages + text)
    nonsense.judge()


def valid_requests(nonsense: Nonsense) -> list[bytes]:
    """Whole requests as bytes, for taking apart below HTTP."""
    made = []
    for method, path, template in SENSIBLE[:20]:
        body = json.dumps(nonsense.filled(template)).encode()
        head = f"{method} {CLIENT}{nonsense.fill(path)} HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Authorization: Bearer {nonsense.alice.token}\r\nContent-Length: {len(body)}\r\n"
        made.append(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        head = re.sub(r"Content-Length: \d+", "Transfer-Encoding: chunked", head)
        made.append(head.encode() + b"\r\n" + chunk)
    return made


JUNK: Final = (b"", b"\0", b"\r\n", b"\n", b" ", b":", b"\xff", b"0" * 20, b"-", b"\x80")


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few of them changed, lost or doubled."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data)) if data else 0
        upto = min(len(data), at + chance.choice((1, 1, 2, 8, 100)))
        data = data[:at] + chance.choice((*JUNK, data[at:upto] * 2)) + data[upto:]
    return data


def exchange_and_close(server: Server, data: bytes) -> bytes:
    """Send bytes, close our half, and read until the server closes its own, within ten seconds."""
    received = b""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    with connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(65536):
            received += chunk
    return received


@slow
def test_mutated_bytes_get_an_answer_or_a_closed_connection(
    new_server: Callable[..., Server],
) -> None:
    chance = random.Random(5)  # noqa: S311  chance for tests
    nonsense = Nonsense(new_server(log="warn"))
    corpus = valid_requests(nonsense)
    before = nonsense.server.rss()
    for _ in range(3000):
        data = mutated(chance.choice(corpus), chance)
        answer = exchange_and_close(nonsense.server, data)
        if answer:
            status = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
            assert status, f"{data!r}\n{answer!r}"
            assert int(status[1]) < 500 or status[1] in (b"501", b"505"), f"{data!r}\n{answer!r}"
    nonsense.renew()
    assert nonsense.server.rss() < before + 40, "memory grows"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def shared_nonsense(server: Server) -> Nonsense:
    """One Nonsense for all the examples of a property."""
    return Nonsense(server)


@slow
@settings(max_examples=300)
@given(data=st.data())
def test_random_json_in_random_places(shared_nonsense: Nonsense, data: st.DataObject) -> None:
    method, path, template = data.draw(st.sampled_from(SENSIBLE))
    known = st.sampled_from([str(key) for key in template])
    body = data.draw(st.dictionaries(known, json_values) | json_values)
    shared_nonsense.alive()
    shared_nonsense.send_json(method, CLIENT + shared_nonsense.fill(path), body)
    shared_nonsense.judge()


# ═════════════════════════════════════════════════════════════════════════════
#  THE FIRST MINUTE, AND THE FIGURES
#
#  What a newcomer does with a fresh checkout; how fast the server starts, what it
#  needs, and that neither history nor many rooms make it slower.
# ═════════════════════════════════════════════════════════════════════════════


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository's files without anything that was made in it."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    return copy


@contextlib.contextmanager
def make_run(checkout: Path, port: int) -> Iterator[Path]:
    """`make run` in a folder, until it answers and after; its output."""
    output = checkout / "output"
    command = ["make", "run", f"PORT={port}", f"PYTHON={sys.executable}"]
    environment = {
        key: value for key, value in os.environ.items() if key[:4] not in ("COND", "MAKE")
    }
    with output.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603  make, as a newcomer would
            command, cwd=checkout, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while b"200" not in first_line(port):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        yield output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait(20)


def first_line(port: int) -> bytes:
    """The status line of /versions on a port; empty if nobody answers."""
    request = b"GET /_matrix/client/versions HTTP/1.1\r\nHost: localhost\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request)
            return connection.recv(1000).partition(b"\r\n")[0]
    except OSError:
        return b""


@slow
def test_make_run_on_a_clean_checkout(checkout: Path) -> None:
    port = free_port()
    with make_run(checkout, port) as output:
        page = httpx.get(f"http://localhost:{port}/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "Matrix" in page.text
        said = output.read_text()
        assert f"http://localhost:{port}" in said
        token = re.search(r"token\s+(\S+)", said)
        assert token, "it does not say how to register"
        server = Server(checkout / "unused", port=port, registration_token=token[1])
        alice = register(server, "alice")
        assert alice.user_id == "@alice:localhost"
        alice.send_text(alice.create_room(), "hello")


def start_figures(server: Server) -> tuple[float, float]:
    """Seconds until the first answer, and seconds of CPU used by then."""
    began = time.monotonic()
    server.start()
    return time.monotonic() - began, server.cpu()


@slow
def test_start_and_idle_memory(new_server: Callable[..., Server]) -> None:
    server = new_server()  # the first start writes the bytecode
    figures = []
    for _ in range(5):
        server.stop()
        figures.append(start_figures(server))
    time.sleep(2)
    wall, cpu = (min(column) for column in zip(*figures, strict=True))
    print(f"start {wall:.2f} s, {cpu:.2f} s of CPU; idle {server.rss():.1f} MiB")
    assert cpu <= 0.6
    assert server.rss() <= 40


def cost(server: Server, act: Callable[[], Any], count: int) -> float:
    """Milliseconds of the server's CPU that one act takes: the best of five series."""
    series = []
    for _ in range(5):
        before = server.cpu()
        for _ in range(count):
            act()
        series.append((server.cpu() - before) / count * 1000)
    return min(series)


@deep
def test_a_send_costs_the_same_in_a_long_room(new_server: Callable[..., Server]) -> None:
    server = new_server(log="warn")
    alice = register(server)
    alice.checked = False
    short, long = alice.create_room(), alice.create_room()
    for room_id, count in ((short, 1_000), (long, 50_000)):
        for number in range(count):
            alice.send_text(room_id, str(number), str(number))
    before = cost(server, lambda: alice.send_text(short, "x"), 100)
    after = cost(server, lambda: alice.send_text(long, "x"), 100)
    print(f"a send: {before:.2f} ms of CPU after 1,000 events, {after:.2f} ms after 50,000")
    assert after <= 1.2 * before


@deep
def test_an_empty_sync_costs_the_same_with_many_rooms(new_server: Callable[..., Server]) -> None:
    server = new_server(log="warn")
    figures = []
    for count in (10, 1_000):
        alice = register(server)
        alice.checked = False
        for _ in range(count):
            alice.create_room()
        alice.poll()
        figures.append(cost(server, alice.poll, 200))
    few, many = figures
    print(f"an empty sync: {few:.3f} ms of CPU with 10 rooms, {many:.3f} ms with 1,000")
    assert many <= 2 * few


def bytes_written(server: Server) -> int:
    """What the process has caused to be written to the disk so far."""
    found = re.search(r"^write_bytes: (\d+)", Path(f"/proc/{server.pid}/io").read_text(), re.M)
    assert found
    return int(found[1])


@deep
def test_a_message_to_a_thousand_members(new_server: Callable[..., Server]) -> None:
    server = new_server(log="warn")
    alice = register(server)
    room_id = alice.create_room(preset="public_chat")
    for _ in range(999):
        register(server).join(room_id)
    alice.checked = False
    milliseconds = cost(server, lambda: alice.send_text(room_id, "x"), 20)
    before = bytes_written(server)
    for _ in range(100):
        alice.send_text(room_id, "x")
    written = (bytes_written(server) - before) / 100
    print(f"a message to 1,000 members: {milliseconds:.2f} ms of CPU, {written / 1000:.1f} kB")
    assert milliseconds <= 3
    assert written <= 40_000


# ═════════════════════════════════════════════════════════════════════════════
#  PACKAGING
#
#  deploy/: each file of it is used as its reader would, with the real programs
#  where one machine is enough for that.
# ═════════════════════════════════════════════════════════════════════════════

DEPLOY: Final = ROOT / "deploy"


def need(*programs: str) -> None:
    """Skip a test for which a program is not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a program that must succeed; what it printed."""
    done = subprocess.run(  # noqa: S603  our own command line
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# ── systemd ──────────────────────────────────────────────────────────────────


def test_the_unit_leaves_little_open() -> None:
    need("systemd-analyze")
    said = run("systemd-analyze", "security", "--offline=yes", ROOT / "conduit.service")
    level = re.search(r"exposure level.*?: ([0-9.]+)", said)
    assert level, said
    assert float(level[1]) <= 2.0


# ── Debian ───────────────────────────────────────────────────────────────────


def debian_mirror() -> tuple[str, str]:
    """The release of Debian that this machine runs, and where it gets its packages from."""
    targets = run("apt-get", "indextargets", "--format", "$(CODENAME) $(SITE)", "Component: main")
    release = re.search(
        r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE
    )
    for line in targets.splitlines():
        codename, _, site = line.partition(" ")
        if release and codename == release[1]:
            return codename, site
    pytest.skip("this is no Debian")


class Root:
    """A minimal Debian in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run("debootstrap", "--variant=minbase", *debian_mirror()[:1], folder, debian_mirror()[1])
        shutil.copy("/etc/resolv.conf", folder / "etc")

    def run(self, *command: str) -> str:
        """Run a program in there."""
        return run("chroot", self.folder, *command, DEBIAN_FRONTEND="noninteractive")

    def install(self, package: Path) -> None:
        """Install a package from a file, and what it depends on."""
        shutil.copy(package, self.folder)
        self.run("apt-get", "install", "--yes", "--no-install-recommends", f"/{package.name}")

    def path(self, path: str) -> Path:
        """Where a path of the inner system is outside."""
        return self.folder / path.lstrip("/")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package, built from a copy of the repository."""
    need("dpkg-buildpackage", "dh", "dh_python3", "debconf-updatepo")
    copy = tmp_path_factory.mktemp("package")
    for name in ("conduit.py", "conduit-example.toml", "conduit.service", "README.md", "Makefile"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(DEPLOY, copy / "deploy")
    run("make", "deb", cwd=copy)
    return next((copy / "build").glob("*.deb"))


@slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, for a Debian of its own")
def test_the_package_is_installed_upgraded_removed_and_purged(
    package: Path, tmp_path: Path
) -> None:
    need("debootstrap", "chroot", "apt-get")
    root, port = Root(tmp_path / "root"), free_port()
    answers = {"hostname": "family.example", "address": "127.0.0.1", "port": port}
    lines = [f"matrix-conduit matrix-conduit/{k} string {v}\n" for k, v in answers.items()]
    root.path("answers").write_text("".join(lines))
    root.run("debconf-set-selections", "/answers")
    root.install(package)

    config = root.path("/etc/matrix-conduit/conduit.toml")
    said = conduit.tomllib.loads(config.read_text())["global"]
    assert (said["server_name"], said["port"]) == ("family.example", port)
    assert config.stat().st_mode & 0o777 == 0o640
    assert root.path("/lib/systemd/system/matrix-conduit.service").exists()
    serve_from(root, said)

    config.write_text(config.read_text() + "\n# edited by hand\n")
    root.run("apt-get", "install", "--yes", "--reinstall", f"/{package.name}")
    assert conduit.tomllib.loads(config.read_text())["global"] == said
    assert "# edited by hand" in config.read_text()

    root.run("apt-get", "remove", "--yes", "matrix-conduit")
    assert config.exists()
    assert root.path("/var/lib/matrix-conduit/conduit.db").exists()
    root.run("apt-get", "purge", "--yes", "matrix-conduit")
    assert not config.parent.exists()
    assert not root.path("/var/lib/matrix-conduit").exists()
    assert "conduit" not in root.path("/etc/passwd").read_text()


def serve_from(root: Root, said: Json) -> None:
    """Start the server in there as systemd would, and register a user."""
    root.run("install", "-d", "-o", "conduit", "-m", "700", "/var/lib/matrix-conduit")
    unit = root.path("/lib/systemd/system/matrix-conduit.service").read_text()
    variables = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.MULTILINE))
    start = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert start
    command = ["chroot", "--userspec=conduit:conduit", str(root.folder), *start[1].split()]
    process = subprocess.Popen(command, env={"PATH": "/usr/bin:/usr/sbin", **variables})  # noqa: S603  as systemd would
    try:
        eventually(lambda: b"200" in first_line(said["port"]), 60)
        server = Server(root.folder / "unused", port=said["port"])
        server.config["registration_token"] = said["registration_token"]
        assert register(server, "alice").user_id == "@alice:family.example"
    finally:
        process.terminate()
        assert process.wait(20) == 0
    root.run("matrix-conduit", "--check")


# ── Reverse proxies ──────────────────────────────────────────────────────────


class Proxy:
    """A reverse proxy from deploy/, its names, ports and certificates changed to the test's."""

    def __init__(self, kind: str, folder: Path, server: Server, authority: Authority) -> None:
        self.folder, self.server = folder, server
        self.clients, self.federation = free_port(), free_port()
        self.certs, self.key = authority.certify("localhost")
        self.command = getattr(self, kind)()

    def adapted(self, name: str, **changes: str) -> str:
        """A file of deploy/ for this test."""
        text = (
            (DEPLOY / name).read_text().replace("127.0.0.1:6167", f"127.0.0.1:{self.server.port}")
        )
        text = text.replace("/etc/letsencrypt/live/example.org/fullchain.pem", str(self.certs))
        text = text.replace("/etc/letsencrypt/live/example.org/privkey.pem", str(self.key))
        text = re.sub(r"\b443\b", str(self.clients), text)
        text = re.sub(r"\b8448\b", str(self.federation), text)
        return text.replace("example.org", "localhost")

    def nginx(self) -> list[str]:
        """The command that runs nginx with nginx.conf, as a part of a whole configuration."""
        need("nginx")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {self.folder}/{kind};\n" for kind in kinds)
        whole = (
            f"daemon off; pid {self.folder}/pid; error_log {self.folder}/error.log;\n"
            f"events {{}}\nhttp {{ access_log off;\n{temporary}{self.adapted('nginx.conf')}}}\n"
        )
        config = self.folder / "nginx.conf"
        config.write_text(whole)
        return ["nginx", "-c", str(config), "-e", str(self.folder / "error.log")]

    def apache(self) -> list[str]:
        """The command that runs Apache with apache.conf."""
        need("apache2")
        modules = ["mpm_event", "authz_core", "ssl", "socache_shmcb", "proxy", "proxy_http"]
        loaded = "".join(
            f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n"
            for name in [*modules, "headers"]
        )
        whole = (
            f"ServerRoot {self.folder}\nPidFile {self.folder}/pid\nServerName localhost\n"
            f"ErrorLog {self.folder}/error.log\nDefaultRuntimeDir {self.folder}\n"
            f"{loaded}Listen {self.clients}\n{self.adapted('apache.conf')}"
        )
        config = self.folder / "apache.conf"
        config.write_text(whole)
        return ["apache2", "-f", str(config), "-D", "FOREGROUND"]

    def caddy(self) -> list[str]:
        """The command that runs Caddy with Caddyfile, and a certificate that is there already."""
        need("caddy")
        text = self.adapted("Caddyfile").replace("localhost, ", f"localhost:{self.clients}, ")
        tls = f"{{\n\ttls {self.certs} {self.key}\n"
        config = self.folder / "Caddyfile"
        config.write_text("{\n\tadmin off\n\tauto_https off\n}\n" + text.replace("{\n", tls, 1))
        return ["caddy", "run", "--adapter", "caddyfile", "--config", str(config)]

    def __enter__(self) -> Proxy:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin"
        environment = {**os.environ, "PATH": path, "HOME": str(self.folder)}
        with (self.folder / "output").open("wb") as output:
            self.process = subprocess.Popen(  # noqa: S603  our own command line
                self.command, env=environment, stdout=output, stderr=output
            )
        eventually(self.answers, 20)
        return self

    def answers(self) -> bool:
        """Whether it passes a request on."""
        assert self.process.poll() is None, (self.folder / "output").read_text()
        with contextlib.suppress(httpx.TransportError):
            url = f"https://localhost:{self.clients}/_matrix/client/versions"
            return httpx.get(url, verify=False).status_code == 200  # noqa: S501  the test's own
        return False

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)


class Behind(Server):
    """A running server as it is seen through a proxy."""

    def __init__(self, server: Server, url: str) -> None:
        self.inner, self.front, self.config, self.name = server, url, server.config, server.name

    @property
    def url(self) -> str:
        """Where the proxy answers."""
        return self.front


@pytest.fixture(params=["nginx", "apache", "caddy"])
def proxy(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    new_server: Callable[..., Server],
    authority: Authority,
) -> Iterator[Proxy]:
    """A server behind each of the proxies."""
    made = Proxy(
        request.param, tmp_path, new_server(registration_token="for the family"), authority
    )
    with made:
        yield made


@slow
def test_a_server_behind_a_proxy(proxy: Proxy) -> None:
    server = Behind(proxy.server, f"https://localhost:{proxy.clients}")
    alice = register(server)
    name = unique("a/b//c/")
    alias = f"#{name}:{server.name}"
    room_id = alice.create_room(room_alias_name=name)
    assert ok(alice.get(("directory", "room", alias)))["room_id"] == room_id
    raw = "/_matrix/client/v3/directory/room/" + quote(alias, safe="/")
    assert alice.get(raw).status_code == 404  # its slashes are no part of a segment any more
    blob = secrets.token_bytes(20_000_000)
    assert alice.download(alice.upload(blob)).content == blob

    since = alice.sync()["next_batch"]
    began = time.monotonic()
    seconds = 300 if os.environ.get("DEEP") else 3
    alice.http.timeout = httpx.Timeout(400)
    assert "rooms" not in alice.sync(since, timeout=seconds * 1000)
    assert time.monotonic() - began > seconds - 1

    url = f"https://localhost:{proxy.federation}/_matrix/client/versions"
    assert httpx.get(url, verify=False).status_code == 200  # noqa: S501  the test's own


def test_addresses_behind_a_proxy_are_told_apart(proxy: Proxy) -> None:
    """What a client itself says about its address is not believed."""
    server = Behind(proxy.server, f"https://localhost:{proxy.clients}")
    alice = register(server)
    ok(alice.get("account/whoami", headers={"X-Forwarded-For": "203.0.113.7"}))
    proxy.server.stop()  # which writes down who was seen where
    with contextlib.closing(sqlite3.connect(proxy.server.database)) as database:
        seen = {row[0] for row in database.execute("SELECT last_seen_ip FROM devices")}
    assert seen & {"127.0.0.1", "::1"}
    assert "203.0.113.7" not in seen


# ── coturn ───────────────────────────────────────────────────────────────────


def test_coturn_gives_a_relay(tmp_path: Path, new_server: Callable[..., Server]) -> None:
    """The credentials that the server hands out are good for a real allocation."""
    need("turnserver", "turnutils_uclient")
    port, secret = free_port(), secrets.token_hex(16)
    text = (DEPLOY / "coturn.conf").read_text()
    text = text.replace("MAKE-ONE-WITH-openssl-rand-hex-32", secret)
    text = text.replace("denied-peer-ip=127.0.0.0-127.255.255.255\n", "")
    config = tmp_path / "turnserver.conf"
    config.write_text(
        text + f"listening-port={port}\nlistening-ip=127.0.0.1\nno-tls\nno-dtls\n"
        f"relay-ip=127.0.0.1\nallow-loopback-peers\npidfile={tmp_path}/pid\n"
        f"userdb={tmp_path}/db\nlog-file=stdout\n"
    )
    uri = f"turn:127.0.0.1:{port}?transport=udp"
    alice = register(new_server(turn_uris=[uri], turn_secret=secret))
    given = ok(alice.get("voip/turnServer"))
    assert given["uris"] == [uri]
    with (tmp_path / "output").open("wb") as output:
        command = ["/usr/bin/env", "turnserver", "-c", str(config)]
        process = subprocess.Popen(command, stdout=output, stderr=output)  # noqa: S603  our own
    try:

        def allocation(password: str) -> str:
            name = given["username"]
            ask = ["turnutils_uclient", "-y", "-n", "1", "-c", "-u", name, "-w", password]
            done = subprocess.run(  # noqa: S603  our own command line
                [*ask, "-p", str(port), "127.0.0.1"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            return done.stdout + done.stderr

        eventually(lambda: "Total lost packets 0" in allocation(given["password"]), 30)
        assert "Total lost packets 0" not in allocation("wrong")
    finally:
        process.terminate()
        process.wait(10)


# ── Containers and Nix ───────────────────────────────────────────────────────


def test_the_steps_of_the_dockerfile(tmp_path: Path) -> None:
    """No engine is needed to do by hand what the file says: install, compile, run, ask."""
    text = (DEPLOY / "Dockerfile").read_text()
    packages = re.search(r"pip install --no-cache-dir --target /app (.*)", text)
    assert packages
    shutil.copy(ROOT / "conduit.py", tmp_path)
    run(sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path, *packages[1].split())
    run(sys.executable, "-m", "compileall", "-q", tmp_path)
    settings_ = dict(re.findall(r"(CONDUIT_\w+|PYTHONPATH)=(\S+)", text))
    settings_ |= {"PYTHONPATH": str(tmp_path), "CONDUIT_CONFIG": ""}
    settings_ |= {"CONDUIT_DATABASE_PATH": str(tmp_path / "data")}
    settings_ |= {"CONDUIT_SERVER_NAME": "in.docker", "CONDUIT_PORT": str(free_port())}
    command = re.search(r"^CMD (\[.*\])$", text, re.MULTILINE)
    healthy = re.search(r"^    CMD (\[.*\])$", text, re.MULTILINE)
    assert command
    assert healthy
    path = os.environ["PATH"]
    as_python = {"python": sys.executable}
    start = [as_python.get(word, word) for word in json.loads(command[1])]
    check = [as_python.get(word, word) for word in json.loads(healthy[1])]
    process = subprocess.Popen(start, cwd=tmp_path, env={"PATH": path, **settings_})  # noqa: S603  the file's own
    try:
        ask = functools.partial(subprocess.run, check, env={"PATH": path, **settings_}, check=False)
        eventually(lambda: ask(capture_output=True).returncode == 0, 30)
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert ask(capture_output=True).returncode != 0


def test_compose_files_are_in_order() -> None:
    """They parse, build from files that are there, and set keys that exist."""
    known = {key.upper() for key in documented_keys()}
    for name in ("docker-compose.yml", "docker-compose.for-traefik.yml"):
        services = yaml.safe_load((DEPLOY / name).read_text())["services"]
        over = yaml.safe_load((DEPLOY / "docker-compose.override.yml").read_text())["services"]
        home = services["homeserver"]
        assert (DEPLOY / home["build"]["context"] / home["build"]["dockerfile"]).exists()
        set_keys = {**home["environment"], **over["homeserver"]["environment"]}
        assert {key.removeprefix("CONDUIT_") for key in set_keys} - known == {"CONFIG"}
        for volume in services.get("well-known", {}).get("volumes", []):
            assert (DEPLOY / volume.partition(":")[0]).exists()


def documented_keys() -> set[str]:
    """The keys of [global] in the README's table."""
    return set(re.findall(r"^\| `([a-z_]+)`", (ROOT / "README.md").read_text(), re.MULTILINE))


# ═════════════════════════════════════════════════════════════════════════════
#  THE BOOK
#
#  conduit.py is read from the top: nothing is used before it is explained, the
#  contents tell the truth, functions stay short, imports stay few, and each SQL
#  statement finds its rows by an index.
# ═════════════════════════════════════════════════════════════════════════════

SOURCE: Final = (ROOT / "conduit.py").read_text("utf-8")
TREE: Final = ast.parse(SOURCE)
FUNCTIONS: Final = [
    node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]
BANNER_WIDTH: Final = 79

# ── Order ────────────────────────────────────────────────────────────────────


def bound_names(node: ast.AST) -> Iterator[str]:
    """The names that one statement or expression binds in the scope it stands in."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            yield name
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in aliases)
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            yield name
        case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            yield name
        case ast.arg(arg=name):
            yield name


DEFINITIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SCOPES: Final = (
    *DEFINITIONS,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


def same_scope(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below in the same scope; inner scopes themselves, but not their insides."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, SCOPES):
            yield from same_scope(child)


def module_definitions(tree: ast.Module) -> dict[str, int]:
    """Each module-level name and the line that first binds it."""
    lines: dict[str, int] = {}
    for node in same_scope(tree):
        for name in bound_names(node):
            lines.setdefault(name, getattr(node, "lineno", 0))
    return lines


class ForwardUses(ast.NodeVisitor):
    """Collects (line, name, line of definition) where a name is used above its definition."""

    def __init__(self, tree: ast.Module) -> None:
        self.defined = module_definitions(tree)
        self.scopes: list[set[str]] = []
        self.found: list[tuple[int, str, int]] = []
        for statement in tree.body:
            self.visit(statement)

    def visit(self, node: ast.AST) -> None:
        """Annotations are skipped (they are never evaluated), inner scopes hide outer names."""
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Name):
            self.use(node)
        for field_name, value in ast.iter_fields(node):
            if field_name not in ("annotation", "returns"):
                self.descend(node, value if isinstance(value, list) else [value])

    def descend(self, node: ast.AST, children: list[Any]) -> None:
        """Visit the children in the scope that the node opens, if it opens one."""
        opens = isinstance(node, SCOPES) and not isinstance(node, ast.ClassDef)
        if opens:
            self.scopes.append({name for below in same_scope(node) for name in bound_names(below)})
        for child in children:
            if isinstance(child, ast.AST):
                self.visit(child)
        if opens:
            self.scopes.pop()

    def use(self, node: ast.Name) -> None:
        """Note a use that runs forward."""
        line = self.defined.get(node.id, 0)
        if line > node.lineno and not any(node.id in scope for scope in self.scopes):
            self.found.append((node.lineno, node.id, line))


def test_forward_use_finder_finds() -> None:
    text = "def f(x: C) -> C:\n    y = [z for z in x]\n    return g(y, z)\n"
    text += "def g(a, z=1): return C\nC = z = 1"
    assert [use[1] for use in ForwardUses(ast.parse(text)).found] == ["g", "z", "C"]
    assert not ForwardUses(ast.parse("def f():\n    def h(): return g\n    g = 1\ng = 2")).found


def forward_uses() -> list[tuple[int, str, int, bool]]:
    """(line, name, line of its definition, whether that is in a later chapter)."""
    starts = [line for line, _, _ in chapters()]
    return [
        (at, name, line, bisect.bisect(starts, at) != bisect.bisect(starts, line))
        for at, name, line in ForwardUses(TREE).found
    ]


def test_no_name_is_used_before_the_chapter_that_defines_it() -> None:
    found = [f"line {at}: {name}, line {line}" for at, name, line, later in forward_uses() if later]
    assert not found, "\n".join(found)


def test_no_name_is_used_above_its_definition() -> None:
    found = [f"line {at}: {name}, line {line}" for at, name, line, _ in forward_uses()]
    assert not found, "\n".join(found)


def test_no_name_is_defined_twice() -> None:
    lines: dict[str, list[int]] = defaultdict(list)
    for node in TREE.body:
        bound = [node] if isinstance(node, DEFINITIONS) else [*ast.iter_child_nodes(node)]
        if not isinstance(node, ast.If | ast.Try):  # alternatives
            for name in (name for each in bound for name in bound_names(each)):
                lines[name].append(node.lineno)
    twice = {name: at for name, at in lines.items() if len(at) > 1}
    assert not twice, f"the later one takes the place of the earlier: {twice}"


# ── Contents ─────────────────────────────────────────────────────────────────


def chapter_banners() -> list[tuple[int, list[str]]]:
    """(number of the first line, lines) of each chapter banner, its two rules included."""
    lines = SOURCE.splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("# ═")]
    assert len(rules) % 2 == 0, "a chapter banner has no end"
    pairs = zip(rules[::2], rules[1::2], strict=True)
    return [(first + 1, lines[first : last + 1]) for first, last in pairs]


def chapters() -> list[tuple[int, int, str]]:
    """(line, number, title) of each chapter banner that has a title."""
    titles = [(at, re.fullmatch(r"#  (\d+)\. (.+)", lines[1])) for at, lines in chapter_banners()]
    return [(at, int(title[1]), title[2]) for at, title in titles if title]


def test_banners_look_alike() -> None:
    rule = "# " + "═" * (BANNER_WIDTH - 2)
    wrong = []
    for at, lines in chapter_banners():
        prose = lines[3:-1]
        shape = lines[0] == lines[-1] == rule and lines[2] == "#" and len(prose) >= 2
        if not shape or not re.fullmatch(r"#  \d+\. [^a-z]+", lines[1]):
            wrong.append(f"line {at}: rule, '#  N. TITLE', '#', two lines of prose, rule: {lines}")
        wrong += [f"line {at}: not indented: {x}" for x in prose if not re.match("#(  |$)", x)]
    assert not wrong, "\n".join(wrong)


def test_chapters_are_numbered_in_order() -> None:
    assert [number for _, number, _ in chapters()] == list(range(1, len(chapters()) + 1))


def test_contents_agree_with_the_banners() -> None:
    docstring = ast.get_docstring(TREE) or ""
    contents = docstring.partition("\nContents")[2].partition("\nHow a message")[0]
    listed = re.findall(r"^ *(\d+)\.? +(\S.*?)(?: {3,}.*)?$", contents, re.MULTILINE)
    expected = [(str(number), title.lower()) for _, number, title in chapters()]
    assert [(number, title.lower().rstrip(".")) for number, title in listed] == expected


def test_sections_are_numbered_within_their_chapter() -> None:
    starts = {line: number for line, number, _ in chapters()}
    chapter, section, wrong = 0, 0, []
    for line, text in enumerate(SOURCE.splitlines(), 1):
        if line in starts:
            chapter, section = starts[line], 0
        if text.startswith("# ──"):
            section += 1
            right = re.fullmatch(rf"# ── {chapter}\.{section}  \S.*? ─+", text)
            if not right or len(text) != BANNER_WIDTH:
                wrong.append(f"line {line}: not {chapter}.{section}, {BANNER_WIDTH} wide: {text}")
    assert not wrong, "\n".join(wrong)


def test_no_chapter_is_a_drawer() -> None:
    titles = " ".join(title.lower() for _, _, title in chapters())
    assert not re.search(r"\b(misc|miscellaneous|utils?|utilities|helpers?|other|common)\b", titles)


# ── Size and shape ───────────────────────────────────────────────────────────


def length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Lines from the def or class line to the end, docstring included."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_are_short() -> None:
    lengths = sorted(length(function) for function in FUNCTIONS)
    too_long = [f"{f.name} ({length(f)})" for f in FUNCTIONS if length(f) > 60]
    assert not too_long, f"functions over 60 lines: {too_long}"
    assert statistics.median(lengths) <= 10, statistics.median(lengths)
    assert lengths[len(lengths) * 9 // 10] <= 30, lengths[len(lengths) * 9 // 10]


def test_classes_are_short() -> None:
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    assert not [f"{c.name} ({length(c)})" for c in classes if length(c) > 400]


def test_the_file_stays_a_book() -> None:
    assert SOURCE.count("\n") < 20_000  # the design wants 12,000; see "How the file is organised"
    assert max(map(len, SOURCE.splitlines())) <= 100


def test_only_the_allowed_imports() -> None:
    allowed = {*sys.stdlib_module_names, "nacl", "tomli", "PIL"}
    imports = [node for node in ast.walk(TREE) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in imports:
        names = [alias.name for alias in node.names]
        for name in names if isinstance(node, ast.Import) else [node.module or ""]:
            assert name.partition(".")[0] in allowed, f"line {node.lineno}: import {name}"


def test_functions_import_nothing_but_pillow() -> None:
    for function in FUNCTIONS:
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "PIL" in ast.unparse(node), f"line {node.lineno}: {ast.unparse(node)}"


def test_every_exemption_has_its_reason() -> None:
    exemption = re.compile(r"# (?:noqa|type: ignore)(.*)$")
    for path in (ROOT / "conduit.py", ROOT / "test_conduit.py"):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            found = exemption.search(line)
            if found and "re.compile" not in line:
                reason = re.sub(r"^(?:: [A-Z0-9, ]+|\[[\w, -]+\])", "", found[1]).strip(" #")
                assert len(reason) > 3, f"{path.name}:{number}: {line.strip()}"


def test_nothing_is_left_for_later() -> None:
    left = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b|not (?:yet )?implemented|for now\b")
    found = [n for n, line in enumerate(SOURCE.splitlines(), 1) if left.search(line)]
    assert not found, f"lines {found}"


# ── Routes ───────────────────────────────────────────────────────────────────


def route_decorators() -> Iterator[tuple[str, ast.Call]]:
    """(function name, decorator call) of each route."""
    for function in FUNCTIONS:
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "route":
                yield function.name, decorator


def test_every_route_says_who_may_call_it() -> None:
    who = {"NONE", "OPTIONAL", "USER", "GUEST", "ADMIN", "SERVER", "APPSERVICE"}
    routes = list(route_decorators())
    assert len(routes) > 100
    for name, call in routes:
        auth = [ast.unparse(k.value) for k in call.keywords if k.arg == "auth"]
        assert auth, f"{name} does not say who may call it"
        assert auth[0] in who, f"{name}: {auth[0]}"


def test_the_route_table_prints_itself(new_server: Callable[..., Server]) -> None:
    result = new_server(start=False).run_command("--routes")
    assert result.returncode == 0, result.stderr
    for path in ("/_matrix/client/versions", "/_matrix/client/v3/sync", "/rooms/{room_id}/send/"):
        assert path in result.stdout


# ── SQL ──────────────────────────────────────────────────────────────────────

STATEMENT: Final = re.compile(r"\s*(?:SELECT|UPDATE|DELETE|INSERT|REPLACE|WITH)\s")

# Statements that read a whole table or index, and why they may.
SCANS: Final = {
    "SELECT name FROM sqlite_schema": "at the start",
    "SELECT user_nid FROM profile_updates": "at the start; the table is a queue",
    "SELECT user_nid, state, status_msg FROM presence": "at the start",
    "SELECT user_nid FROM accounts WHERE leaving = 1": "at the start; the index has only those",
    "SELECT 1 FROM accounts WHERE is_guest = 0 AND by_appservice = 0 AND user_nid IS NOT ?"
    " LIMIT 1": "the first will do",
    "SELECT user_nid, user_id FROM accounts JOIN users USING (user_nid)": "a bridge is registered",
    "SELECT DISTINCT room_nid FROM network_rooms": "bridged networks; an index of few rows",
    "SELECT DISTINCT room_nid FROM memberships": "an admin asks for the list",
    "SELECT user_id, COUNT(*), SUM(size) AS total FROM media JOIN users USING (user_nid)"
    " GROUP BY user_nid ORDER BY total DESC": "an admin asks, in a thread",
    "UPDATE one_time_keys SET used = 1, body = NULL WHERE NOT fallback": "after a restore",
    "UPDATE one_time_keys SET used = 1 WHERE fallback": "after a restore",
    "INSERT OR REPLACE INTO device_changes SELECT user_nid, 0, ? FROM accounts": "after a restore",
    "SELECT id, registration FROM appservices": "at the start",
    "SELECT COUNT(*) FROM accounts WHERE deactivated = 0 AND is_guest = 0": "metrics, in a thread",
    "SELECT COUNT(*) FROM rooms": "metrics, in a thread",
    "SELECT device_nid FROM devices": "maintenance",
    "DELETE FROM short_tokens WHERE expires_ts <= ?": "maintenance; tokens of minutes, so few",
    "DELETE FROM short_tokens WHERE user_nid = ?": "deactivation; the same few",
    "SELECT media_id, sha256, size FROM media WHERE sha256 IS NOT NULL": "maintenance, in a thread",
    "SELECT SUM(size) FROM media": "an admin asks, in a thread",
    "SELECT users.user_id FROM accounts JOIN users USING (user_nid) WHERE deactivated = 0"
    " AND is_guest = 0 ORDER BY users.user_id": "an admin asks for the list",
    "SELECT room_id, blocker_nid, since FROM blocked_rooms": "an admin asks for the list",
    "SELECT pusher_nid, user_nid, device_nid, app_id, pushkey, body, enabled, created_ts, badge,"
    " failures, failing_ts, retry_ts FROM pushers": "at the start and when one changes; in memory",
    "SELECT DISTINCT pusher_nid FROM push_queue": "then as well; the table is a queue",
    "SELECT room_nid FROM published_rooms": "once; the list is kept in memory",
    "SELECT room_nid FROM public_rooms": "once; the list is kept in memory",
    "SELECT user_nid, room_nid, display_name, avatar_url, folded, user_id FROM user_names"
    " JOIN users USING (user_nid) WHERE folded LIKE ? ESCAPE '\\' LIMIT ?": "search, in a thread",
}


def module_constant(node: ast.AST) -> str:
    """The value of a module-level text constant (CAPITALS); empty for anything else."""
    name = node.id if isinstance(node, ast.Name) else ""
    value = getattr(conduit, name, "") if name.isupper() else ""
    return value if isinstance(value, str) else ""


def text_of(node: ast.AST) -> str:
    """A string constant, or an f-string that inserts nothing but module-level constants."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if not isinstance(node, ast.JoinedStr):
        return ""
    parts = [
        module_constant(part.value) if isinstance(part, ast.FormattedValue) else text_of(part)
        for part in node.values
    ]
    return "".join(parts) if all(parts) else ""


def checks_of_the_database() -> set[ast.AST]:
    """Everything inside a call of invariant(): --check reads whole tables by design."""
    calls = [node for node in ast.walk(TREE) if isinstance(node, ast.Call)]
    checks = [call for call in calls if ast.unparse(call.func) == "invariant"]
    return {inner for call in checks for inner in ast.walk(call)}


def sql_statements() -> Iterator[tuple[int, str]]:
    """(line, text) of each SQL statement in the file, but for those of --check."""
    whole = [node for node in ast.walk(TREE) if isinstance(node, ast.JoinedStr)]
    skipped = {part for node in whole for part in node.values} | checks_of_the_database()
    for node in ast.walk(TREE):
        text = "" if node in skipped else text_of(node)
        if STATEMENT.match(text):
            yield getattr(node, "lineno", 0), text


def begins_as_sql(node: ast.AST) -> bool:
    """Whether the node is a string constant that begins as an SQL statement does."""
    return isinstance(node, ast.Constant) and bool(STATEMENT.match(text_of(node)))


def test_sql_is_never_built_by_formatting() -> None:
    built = []
    for node in ast.walk(TREE):
        is_formatted = isinstance(node, ast.JoinedStr) and node.values and not text_of(node)
        if (
            (is_formatted and begins_as_sql(cast("ast.JoinedStr", node).values[0]))
            or (isinstance(node, ast.BinOp) and begins_as_sql(node.left))
            or (isinstance(node, ast.Attribute) and begins_as_sql(node.value))
        ):
            built.append(f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)[:200]}")
    assert not built, "\n".join(built)


def query_plan(database: sqlite3.Connection, statement: str) -> list[str]:
    """The lines of EXPLAIN QUERY PLAN for a statement, its parameters all NULL."""
    unquoted = re.sub(r"'[^']*'", "''", statement)
    named = re.findall(r":(\w+)", unquoted)
    values: Any = dict.fromkeys(named) if named else (None,) * unquoted.count("?")
    rows = database.execute("EXPLAIN QUERY PLAN " + statement, values)
    return [str(row[3]) for row in rows]


def full_scans(plan: list[str]) -> list[str]:
    """The lines of a plan that read a whole table or index of the database."""
    harmless = r"SCAN (?:CONSTANT ROW|\(?subquery|json_each|\d+ CONSTANT|.* VIRTUAL TABLE)"
    return [line for line in plan if line.startswith("SCAN") and not re.match(harmless, line)]


@pytest.fixture(scope="module")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    """The database of a server that was started once."""
    fresh = Server(tmp_path_factory.mktemp("fresh")).start()
    fresh.stop()
    with contextlib.closing(sqlite3.connect(fresh.database)) as database:
        yield database


def test_every_statement_finds_its_rows_by_an_index(fresh_database: sqlite3.Connection) -> None:
    wrong = []
    statements = list(sql_statements())
    assert len(statements) > 50
    for line, statement in statements:
        try:
            scans = full_scans(query_plan(fresh_database, statement))
        except sqlite3.Error as error:
            scans = [f"{error}"]
        compact = " ".join(statement.split())
        if scans and compact not in SCANS:
            wrong.append(f"line {line}: {compact}\n    {'; '.join(scans)}")
    assert not wrong, "\n".join(wrong)


# ── Interpreters ─────────────────────────────────────────────────────────────


def find_python(version: str) -> str | None:
    """A working interpreter of this version: pyenv's, or one on the path."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in [*map(str, pyenv), shutil.which(f"python{version}")]:
        if candidate is None:
            continue
        answer = subprocess.run(  # noqa: S603  an interpreter of this machine
            [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.stdout.strip() == version:
            return candidate
    return None


def python_with_nacl(version: str) -> str:
    """An interpreter of this version with PyNaCl, in a virtual environment kept between runs."""
    folder = Path(tempfile.gettempdir()) / f"conduit-test-{os.getuid()}-python{version}"
    python = folder / "bin" / "python"
    base = find_python(version)
    if base is None:
        pytest.skip(f"there is no Python {version} here")
    if not python.exists():
        subprocess.run([base, "-m", "venv", folder], check=True)  # noqa: S603  our own command
    check = [str(python), "-c", "import nacl.bindings"]
    if subprocess.run(check, capture_output=True, check=False).returncode:  # noqa: S603  the same
        wanted = ["pynacl", "tomli"] if version == "3.10" else ["pynacl"]
        install = [str(python), "-m", "pip", "install", "-q", *wanted]
        if subprocess.run(install, check=False).returncode:  # noqa: S603  the same
            pytest.skip(f"PyNaCl cannot be installed for Python {version}")
    return str(python)


@slow
@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_other_pythons_pass_a_smoke_test(version: str, tmp_path: Path) -> None:
    other = Server(tmp_path)
    other.command[0] = python_with_nacl(version)
    other.environment["PYTHONDEVMODE"] = "1"  # warnings of newer versions show in the log
    other.start()
    alice, bob = register(other, "alice"), register(other, "bob")
    room_id = alice.room_with(bob, topic="smoke")
    bob.poll()
    alice.send_text(room_id, "hello")
    assert bob.wait_for(lambda result: bob.timeline(room_id, result))
    picture = alice.upload(b"\x89PNG\r\n", "image/png")
    assert bob.download(picture).content == b"\x89PNG\r\n"
    other.restart()
    assert bob.bodies(room_id) == ["hello"]
    other.stop()
    other.check()
    other.assert_clean_log()
