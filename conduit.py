#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["pynacl", "tomli; python_version < '3.11'"]
# ///
"""A complete Matrix homeserver in one file.

Matrix is an open network for chat and calls, in which everyone may run a server of
their own. This is such a server: copy this file to a machine that is always on,
write ten lines of configuration, start it, and family and friends can register with
any Matrix client (Element, Cinny, nheko, FluffyChat ...) and talk, end-to-end encrypted.

To run it
    needs    Python 3.10 or newer and PyNaCl: `apt install python3-nacl`, or pip
    write    conduit.toml, as conduit-example.toml shows; the least is server_name,
             database_path and registration_token under [global]
    start    CONDUIT_CONFIG=conduit.toml python3 conduit.py
    data     all in the folder that database_path names: conduit.db and media/
    backup   python3 conduit.py --backup FILE, while it runs
    help     python3 conduit.py --help; README.md; the admin room #admins

Contents (search for the number and the title)

    Part I    Foundations
       1  ERRORS AND IDENTIFIERS
       2  CONFIGURATION
       3  CANONICAL JSON, HASHES, SIGNATURES
       4  STORAGE
    Part II   Rooms
       5  ROOM VERSIONS
       6  EVENTS
       7  AUTHORIZATION RULES
       8  STATE RESOLUTION
       9  STATE GROUPS
      10  THE ROOM STORE
      11  HISTORY VISIBILITY AND THE CLIENT FORMAT
    Part III  The wire
      12  HTTP SERVER
      13  ROUTER, AUTHENTICATION, RATE LIMITS
    Part IV   Clients
      14  ACCOUNTS, DEVICES, LOGINS
      15  PROFILES, ACCOUNT DATA, FILTERS
      16  DIRECTORY
      17  ROOMS AND MESSAGES
      18  PUSH RULES AND UNREAD COUNTS
      19  RECEIPTS, TYPING, PRESENCE
      20  ENCRYPTION KEYS AND TO-DEVICE
      21  SYNC
      22  MEDIA
    Part V    The house
      23  THE ADMIN ROOM
      24  CALLS, WELL-KNOWN, LANDING PAGE
    Part VI   Running
      25  COMPOSITION ROOT AND MAINTENANCE
      26  COMMAND LINE

How a message travels, by chapters
    12  A client sends PUT /_matrix/client/v3/rooms/!r:s/send/m.room.message/1. The HTTP
        server reads the head, strictly, and
    13  the router finds the handler, asks who the access token belongs to (14), counts
        the request against the rate limits and checks the shape of the body.
    17  `put_send` looks whether this device sent this transaction id before; if not,
    10  `Rooms.send` builds the event: what came before it (prev_events), what allows it
        (auth_events), who sent it and when.
     6  `finish_event` hashes and signs it; the hash is the event's id,
     7  and `check_auth` holds it against the rules of the room's version (5).
    10  `Rooms.append` writes it into the shared transaction, with the state group (9)
        that follows it, and tells all who subscribed, as
    25  `Homeserver` wired them: presence, unread counts, the admin room.
     4  The stream gets a new position; the syncs that wait wake up (21).
     4  The transaction is committed to the write-ahead log and a thread syncs it, one
        sync for all that came together. Until then no answer goes out (12), not the
        sender's, nor that of any reader who could know of the event.
    21  Each waiting sync finds the room in the stream's log, reads the new events, asks
    11  which of them its user may see (history visibility), adds unread counts (18),
        receipts (19) and keys (20), and answers with a token: the stream's position.

Rules that hold everywhere
    Nothing leaves the machine before it is on the disk.
    Nothing from the network raises anything but a MatrixError.
    Everything that touches state runs on one loop; code between two awaits is atomic.
    A name is used only below its definition, so the file can be read from the top.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import base64
import binascii
import bisect
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import heapq
import hmac
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import marshal
import math
import operator
import os
import queue
import re
import resource
import secrets
import shlex
import signal
import smtplib
import socket
import sqlite3
import ssl
import string
import struct
import sys
import threading
import time
import traceback
import types
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from enum import Enum
from html.parser import HTMLParser
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, NewType, Protocol, TypeVar, cast
from urllib.parse import parse_qs, quote, unquote, urldefrag, urljoin, urlsplit

try:
    import nacl.bindings
    import nacl.exceptions
    import nacl.pwhash.argon2id
except ImportError:
    sys.exit(
        "conduit.py needs PyNaCl for its signatures and passwords. Install it with\n"
        "    sudo apt install python3-nacl      (Debian, Ubuntu, Raspberry Pi OS)\n"
        "    python3 -m pip install pynacl      (elsewhere)"
    )

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
# ╔═══════════════════════════════════════════════════════════════════════════╗
# ║  PART I   FOUNDATIONS                                                     ║
# ╚═══════════════════════════════════════════════════════════════════════════╝
#
# Everything above stands on five things: one kind of error, one set of
# identifiers, one configuration, one way to write JSON as bytes that can be
# signed, and one database in which a thing that was acknowledged stays.
#
# Two ideas carry this part. First, whatever arrives from the network can raise
# nothing but a MatrixError, which already is the answer that the client gets.
# Second, nothing leaves the machine before it is on the disk: writes go into
# one shared transaction, a thread syncs it, and every answer waits for that.


# ═════════════════════════════════════════════════════════════════════════════
#  1. ERRORS AND IDENTIFIERS
#
#  The one exception of the protocol, the short ways to make it, and the names
#  of things: users, rooms, events, aliases, servers.   spec: CS-API "Standard
#  error response", appendices "Identifier grammar"
# ═════════════════════════════════════════════════════════════════════════════

VERSION = "1.0.0"

Json = dict[str, Any]
RoomNid = NewType("RoomNid", int)  # "nid": the integer that stands for an id in the database
EventNid = NewType("EventNid", int)
UserNid = NewType("UserNid", int)
DeviceNid = NewType("DeviceNid", int)
StateNid = NewType("StateNid", int)  # stands for a pair (event type, state key)
StateKey = tuple[str, str]  # (event type, state key)

# ── 1.1  Errors ──────────────────────────────────────────────────────────────


class MatrixError(Exception):
    """The standard error response: an HTTP status, an errcode and a text for people."""

    def __init__(self, status: int, errcode: str, error: str, **extra: Any) -> None:
        super().__init__(f"{status} {errcode}: {error}")
        self.status = status
        self.errcode = errcode
        self.error = error
        self.extra = extra

    def to_json(self) -> Json:
        """The body of the response."""
        return {"errcode": self.errcode, "error": self.error, **self.extra}


def forbidden(error: str) -> MatrixError:
    """403 M_FORBIDDEN."""
    return MatrixError(403, "M_FORBIDDEN", error)


def not_found(error: str) -> MatrixError:
    """404 M_NOT_FOUND."""
    return MatrixError(404, "M_NOT_FOUND", error)


def invalid_param(error: str) -> MatrixError:
    """400 M_INVALID_PARAM."""
    return MatrixError(400, "M_INVALID_PARAM", error)


def missing_param(error: str) -> MatrixError:
    """400 M_MISSING_PARAM."""
    return MatrixError(400, "M_MISSING_PARAM", error)


def bad_json(error: str) -> MatrixError:
    """400 M_BAD_JSON: valid JSON with the wrong members."""
    return MatrixError(400, "M_BAD_JSON", error)


def too_large(error: str) -> MatrixError:
    """413 M_TOO_LARGE."""
    return MatrixError(413, "M_TOO_LARGE", error)


def limit_exceeded(retry_after_ms: int, error: str = "Too many requests") -> MatrixError:
    """429 M_LIMIT_EXCEEDED; the HTTP layer turns retry_after_ms into Retry-After as well."""
    return MatrixError(429, "M_LIMIT_EXCEEDED", error, retry_after_ms=retry_after_ms)


# ── 1.2  Time and randomness ─────────────────────────────────────────────────


def now_ms() -> int:
    """Milliseconds since the Unix epoch, as in origin_server_ts."""
    return time.time_ns() // 1_000_000


TOKEN_ALPHABET = string.ascii_letters + string.digits


def random_token(length: int = 43) -> str:
    """Random letters and digits from the system's source; 43 of them carry 256 bits."""
    return "".join(secrets.choice(TOKEN_ALPHABET) for _ in range(length))


# ── 1.3  Identifiers ─────────────────────────────────────────────────────────

MAX_ID_BYTES = 255
SERVER_NAME = re.compile(
    r"(?:\d{1,3}(?:\.\d{1,3}){3}|\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z.-]{1,230})(?::\d{1,5})?"
)
LOCALPART = re.compile(r"[a-z0-9._=/+-]+")  # what a new user may have
HISTORICAL_LOCALPART = re.compile(r"[\x21-\x39\x3B-\x7E]*")  # what a user elsewhere may have


def is_server_name(text: object) -> bool:
    """Whether the text is a host name or address with an optional port.  Spec: "Server Name"."""
    return isinstance(text, str) and len(text) <= MAX_ID_BYTES and bool(SERVER_NAME.fullmatch(text))


def byte_length(text: str) -> int:
    """Length in UTF-8 bytes, the unit of the specification's limits; surrogates count as three."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def split_id(sigil: str, text: object) -> tuple[str, str] | None:
    """The localpart and the server name of an id such as @user:server, or None if malformed."""
    if not isinstance(text, str) or not text.startswith(sigil) or "\0" in text:
        return None
    localpart, colon, server = text[1:].partition(":")
    if not colon or not is_server_name(server) or byte_length(text) > MAX_ID_BYTES:
        return None
    return localpart, server


def is_user_id(text: object) -> bool:
    """Whether the text is a user id, historical ones included."""
    parts = split_id("@", text)
    return parts is not None and bool(HISTORICAL_LOCALPART.fullmatch(parts[0]))


def is_room_id(text: object) -> bool:
    """Whether the text is a room id: !opaque:server, or since version 12 !hash without a server."""
    if not isinstance(text, str) or not text.startswith("!") or byte_length(text) > MAX_ID_BYTES:
        return False
    return split_id("!", text) is not None or bool(re.fullmatch(r"![0-9A-Za-z_-]{43}", text))


def is_room_alias(text: object) -> bool:
    """Whether the text is a room alias with a localpart of at least one character."""
    parts = split_id("#", text)
    return parts is not None and bool(parts[0])


def server_of(identifier: str) -> str:
    """The server name at the end of an id; empty when it has none."""
    return identifier.partition(":")[2]


# ── 1.4  A bounded cache ─────────────────────────────────────────────────────

CacheKey = TypeVar("CacheKey")
CacheValue = TypeVar("CacheValue")


class LruCache(Generic[CacheKey, CacheValue]):
    """A dictionary that forgets what was not asked for longest once it holds `capacity` weight."""

    def __init__(self, capacity: int) -> None:
        self.capacity = max(1, capacity)
        self.weight = 0
        self._items: OrderedDict[CacheKey, tuple[CacheValue, int]] = OrderedDict()

    def get(self, key: CacheKey) -> CacheValue | None:
        """The value, which is now the most recent, or None."""
        item = self._items.get(key)
        if item is None:
            return None
        self._items.move_to_end(key)
        return item[0]

    def put(self, key: CacheKey, value: CacheValue, weight: int = 1) -> None:
        """Remember the value; `weight` is in the unit of the capacity (entries or bytes)."""
        self.pop(key)
        self._items[key] = (value, weight)
        self.weight += weight
        while self.weight > self.capacity and len(self._items) > 1:
            self.weight -= self._items.popitem(last=False)[1][1]

    def pop(self, key: CacheKey) -> None:
        """Forget one entry, if it is there."""
        item = self._items.pop(key, None)
        if item is not None:
            self.weight -= item[1]

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self.weight = 0

    def values(self) -> Iterator[CacheValue]:
        """Each value held, oldest first."""
        return (item[0] for item in self._items.values())

    def __len__(self) -> int:
        return len(self._items)


# ═════════════════════════════════════════════════════════════════════════════
#  2. CONFIGURATION
#
#  The dataclass Config is the table of all keys: its fields carry type,
#  default, bounds and help text. The reader below, the README's table, the
#  dump in the admin room and the tests are made from that one table. A file
#  that is wrong is refused with all its mistakes at once.
# ═════════════════════════════════════════════════════════════════════════════

config_log = logging.getLogger("conduit.config")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# ── 2.1  Log levels ──────────────────────────────────────────────────────────

LOG_LEVELS = {
    "off": logging.CRITICAL + 10,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG // 2,
}


def parse_log_levels(text: str) -> dict[str, int]:
    """The level of each area, "" for all others, from "warn,http=debug".

    Trap: old files name crates of Rust ("rocket=off"). They parse, and name areas that never log.
    """
    levels = {"": logging.WARNING}
    for directive in filter(None, (part.strip() for part in text.split(","))):
        area, _, level = directive.rpartition("=")
        if level.lower() not in LOG_LEVELS or not re.fullmatch(r"[\w:.-]*", area):
            raise ValueError(directive)
        own_area = area.replace("::", ".").removeprefix("conduit").strip(".")
        levels[own_area] = LOG_LEVELS[level.lower()]
    return levels


def apply_log_levels(levels: Mapping[str, int]) -> None:
    """Set the loggers "conduit" and "conduit.<area>"; areas no longer named follow the first."""
    named = {f"conduit.{area}" for area in levels if area}
    silent = (name for name in logging.root.manager.loggerDict if name.startswith("conduit."))
    for name in [*silent, *named]:
        level = levels.get(name.removeprefix("conduit."), logging.NOTSET)
        logging.getLogger(name).setLevel(level)
    logging.getLogger("conduit").setLevel(levels[""])


# ── 2.2  What a key may hold ─────────────────────────────────────────────────


class ConfigError(Exception):
    """Everything that is wrong with the configuration, one text for each mistake."""

    def __init__(self, problems: list[str], warnings: Sequence[str] = ()) -> None:
        super().__init__("\n".join([*problems, *warnings]))
        self.problems = problems


class Check(NamedTuple):
    """What a value must be beyond its type; of a list, each item."""

    passes: Callable[[Any], Any]  # may raise ValueError or TypeError to say no
    expect: str  # in words, for whoever got it wrong


@dataclass(frozen=True)
class Setting:
    """What the table says about one key, beside its name, type and default."""

    text: str  # for people, in the README
    check: Check | None = None
    bounds: tuple[float, float] | None = None
    reload: bool = False  # SIGHUP takes a new value over
    secret: bool = False  # masked wherever it is shown; may be given as <key>_file
    shown: str = ""  # the default in the README, where the value itself is no help
    no_effect: bool = False  # read for the sake of old files only


def setting(
    text: str, default: Any = dataclasses.MISSING, check: Check | None = None, **rules: Any
) -> Any:
    """A field of a configuration table; without a default the key is required."""
    return field(default=default, metadata={"setting": Setting(text, check, **rules)})


def live(text: str, default: Any, check: Check | None = None, **rules: Any) -> Any:
    """The same for a key that can change while the server runs."""
    return setting(text, default, check, reload=True, **rules)


HOST_NAME = re.compile(r"[0-9A-Za-z]([0-9A-Za-z.-]{0,252})")
EMAIL_ADDRESS = re.compile(r"[^\s@<>,;]{1,64}@[^\s@<>,;]{1,190}")
RELIABLE_TOKEN = re.compile(r"[0-9A-Za-z._~-]{1,64}")  # what the specification lets a token be
SAMPLE_TOKENS = frozenset({"YOU-NEED-TO-EDIT-THIS", "for_testing_only"})


def is_listen_address(text: str) -> bool:
    """Whether one can listen there: an IP address, a host name, or the path of a Unix socket."""
    if text.startswith("/") or HOST_NAME.fullmatch(text):
        return "\0" not in text
    return bool(ipaddress.ip_address(text))


def matches(pattern: str) -> Callable[[str], Any]:
    """A check by a regular expression."""
    return re.compile(pattern).fullmatch


A_ADDRESS = Check(is_listen_address, "an address such as 127.0.0.1, or a path such as /run/c.sock")
A_ALIAS = Check(is_room_alias, "aliases such as #family:example.org")
A_BACKEND = Check(
    "sqlite".__eq__,
    'write database_backend = "sqlite" and give database_path a folder of its own;'
    " this server keeps its data in SQLite and cannot open a RocksDB database",
)
A_CONTACT = Check(
    lambda text: is_user_id(text) or EMAIL_ADDRESS.fullmatch(text), "an e-mail address or user id"
)
A_EMAIL = Check(EMAIL_ADDRESS.fullmatch, "an address such as matrix@example.org")
A_FILE = Check(Path.is_file, "a file that exists")
A_FOCUS = Check(  # and nothing that JSON cannot carry, such as a date
    lambda focus: isinstance(focus.get("type"), str) and json.dumps(focus),
    'a table such as { type = "livekit", livekit_service_url = "https://…" }',
)
A_FOLDER = Check(lambda path: path.name and "\0" not in str(path), "a folder such as /srv/matrix")
A_HOST = Check(HOST_NAME.fullmatch, "a host such as mail.example.org")
A_LOG_FILTER = Check(parse_log_levels, "a level (off, error, warn, info, debug) or warn,http=debug")
A_PROXY = Check(
    matches(r"(https?|socks5h?)://\S+:\d+/?"), "a proxy such as socks5h://localhost:9050"
)
A_ROOM_VERSION = Check(matches("[1-9]|1[0-2]"), 'a version from "1" to "12", in quotes')
A_SECRET = Check(bool, "a long random text; the output of `openssl rand -hex 32` is a good one")
A_SERVER = Check(is_server_name, "a name such as example.org, without https://")
A_SHORT_NAME = Check(RELIABLE_TOKEN.fullmatch, "a short name such as privacy_policy")
A_TOKEN = Check(
    lambda token: token.strip() and token not in SAMPLE_TOKENS,
    "a token of your own; the output of `openssl rand -hex 16` is a good one",
)
A_TURN_URI = Check(matches(r"turns?:\S+"), "URIs such as turn:turn.example.org?transport=udp")
A_URL = Check(matches(r"https?://[^\s/?#@]+(/[^\s?#]*)?"), "a URL such as https://example.org")

# Where requests to hosts named by others must not go: private, loopback and link-local addresses;
# documentation and benchmarks; multicast and reserved ones; those with an IPv4 address inside.
PRIVATE_RANGES_TEXT = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24
    192.168.0.0/16 ::/128 ::1/128 fc00::/7 fe80::/10 fec0::/10 192.0.2.0/24 198.18.0.0/15
    198.51.100.0/24 203.0.113.0/24 2001:db8::/32 192.88.99.0/24 224.0.0.0/4 240.0.0.0/4 ff00::/8
    64:ff9b::/96 2002::/16
"""
PRIVATE_RANGES = tuple(ipaddress.ip_network(text) for text in PRIVATE_RANGES_TEXT.split())
LOOPBACK_RANGES = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))

# ── 2.3  The table of keys ───────────────────────────────────────────────────
#
#  A trailing underscore (global_, from_) keeps a key apart from Python's word.


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """[global.tls]: serve HTTPS without a reverse proxy."""

    certs: Path = setting("PEM file with the certificate chain", check=A_FILE)
    key: Path = setting("PEM file with the private key", check=A_FILE)


@dataclass(frozen=True, kw_only=True)
class WellKnown:
    """[global.well_known]: where the server is reached, if not at server_name itself."""

    client: str = setting("URL for clients", "", A_URL, shown="`https://<server_name>`")
    server: str = setting("host:port for other servers", "", A_SERVER, shown="`<server_name>:443`")


@dataclass(frozen=True, kw_only=True)
class ProxyGlobal:
    """The proxy of all outgoing requests that no by_domain table claims."""

    url: str = setting("address of the proxy: http, https, socks5 or socks5h", check=A_PROXY)


@dataclass(frozen=True, kw_only=True)
class ProxyRule:
    """The proxy of some domains; `exclude` goes before `include`."""

    url: str = setting("address of the proxy: http, https, socks5 or socks5h", check=A_PROXY)
    include: tuple[str, ...] = setting("globs of domains that use this proxy", ("*",))
    exclude: tuple[str, ...] = setting("globs of domains that do not", ())


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """[global.proxy]: the way out to other servers."""

    global_: ProxyGlobal | None = setting("proxy of all outgoing requests", None)
    by_domain: tuple[ProxyRule, ...] = setting("proxies of some domains; the first match wins", ())


@dataclass(frozen=True, kw_only=True)
class SmtpConfig:
    """[global.smtp]: how the server sends e-mail."""

    host: str = setting("mail server", check=A_HOST)
    port: int = setting("587 starts TLS, 465 begins with it", 587, bounds=(1, 65535))
    user: str | None = setting("user name, where the mail server wants one", None)
    password: str | None = setting("and the password", None, secret=True)
    from_: str = setting("sender of the messages", check=A_EMAIL)


@dataclass(frozen=True, kw_only=True)
class TermsDocument:
    """[[global.terms]]: a document that new users must accept."""

    id: str = setting("short name, such as privacy_policy", check=A_SHORT_NAME)
    version: str = setting("version of the text, kept with each consent", "1.0")
    name: str = setting("title that users see")
    url: str = setting("where the text is", check=A_URL)
    lang: str = setting("language of the text", "en")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Each key of [global]; see README "Configuration" for the same table to read."""

    # Who and where
    server_name: str = setting("what follows : in @user:example.org, for ever", check=A_SERVER)
    database_path: Path = setting("folder of database and media; made if missing", check=A_FOLDER)
    database_backend: str = setting("the only one there is", "sqlite", A_BACKEND)
    address: str = setting("address, host name or Unix socket to listen on", "127.0.0.1", A_ADDRESS)
    port: int = setting("port to listen on; 0 takes a free one", 8000, bounds=(0, 65535))
    tls: TlsConfig | None = live("HTTPS without a proxy; its files are read again on reload", None)
    well_known: WellKnown = live("where the server is reached, if not at server_name", WellKnown())
    trusted_proxies: tuple[Network, ...] = live(
        "addresses of reverse proxies, whose X-Forwarded-For is believed", LOOPBACK_RANGES
    )

    # Who may register
    allow_registration: bool = live("whether new users can register", False)
    registration_token: str | None = live("what new users must know", None, A_TOKEN, secret=True)
    allow_open_registration: bool = live(
        "without a token only this machine itself can register, unless this is true", False
    )
    registration_shared_secret: str | None = live(
        "for Synapse's /_synapse/admin/v1/register; off when unset", None, A_SECRET, secret=True
    )
    admin_api_allowlist: tuple[Network, ...] = live(
        "addresses beside this machine itself that admins may call /_synapse/admin from", ()
    )
    enable_lightning_bolt: bool = live("new users get ⚡️ behind their display name", True)
    auto_join_rooms: tuple[str, ...] = live("aliases of rooms that new users join", (), A_ALIAS)
    terms: tuple[TermsDocument, ...] = live("documents that new users must accept", ())
    emergency_password: str | None = setting(
        "logs in as @conduit when nobody else can; remove it then", None, A_SECRET, secret=True
    )
    jwt_secret: str | None = live(
        "secret of JSON web tokens (HS256) that log in; off when unset", None, A_SECRET, secret=True
    )

    # What users may do
    allow_room_creation: bool = live("whether users can create rooms", True)
    allow_encryption: bool = live("whether rooms can be encrypted", True)
    allow_unstable_room_versions: bool = live("whether rooms can have an unstable version", True)
    default_room_version: str = live("version of new rooms", "12", A_ROOM_VERSION)
    max_request_size: int = live("largest upload, in bytes", 20_971_520, bounds=(65_536, 2**40))
    rate_limit: bool = live("whether a user or an address that asks too fast has to wait", True)
    allow_local_presence: bool = live("whether users see who is online", True)

    # Other servers
    allow_federation: bool = setting("whether to talk to other servers", True)
    trusted_servers: tuple[str, ...] = setting(
        "servers asked for the keys of servers that are offline", (), A_SERVER
    )
    max_concurrent_requests: int = setting("requests to others at a time", 100, bounds=(1, 10**5))
    max_fetch_prev_events: int = live("missing events to fetch for one", 100, bounds=(0, 10**5))
    ip_range_denylist: tuple[Network, ...] = live(
        "addresses that requests to hosts named by others never go to",
        PRIVATE_RANGES,
        shown="private, loopback, link-local and reserved ranges",
    )
    proxy: ProxyConfig = setting("proxies for outgoing requests", ProxyConfig())
    allow_incoming_presence: bool = live("presence of users elsewhere", True)
    allow_outgoing_presence: bool = live("presence of ours, to them", False)
    allow_incoming_typing: bool = live("who is typing elsewhere", True)
    allow_outgoing_typing: bool = live("who is typing here, to them", True)
    allow_incoming_read_receipts: bool = live("what others have read", True)
    allow_outgoing_read_receipts: bool = live("what ours have read, to them", True)

    # Calls
    turn_uris: tuple[str, ...] = live("TURN servers, which most calls need", (), A_TURN_URI)
    turn_secret: str = live("coturn's secret; goes before name and password", "", secret=True)
    turn_username: str = live("name for a TURN server without secret", "")
    turn_password: str = live("and its password", "", secret=True)
    turn_ttl: int = live("seconds that TURN credentials last", 86_400, bounds=(60, 31_536_000))
    rtc_foci: tuple[Json, ...] = live("backends of Element Call, such as LiveKit", (), A_FOCUS)

    # Media
    url_preview_allowlist: tuple[str, ...] = live("globs of hosts to preview; empty: none", ())
    media_retention_remote_days: int | None = live(
        "days after which media of other servers go; unset: they stay", None, bounds=(1, 36_500)
    )
    media_budget_mb: int | None = live(
        "MB for media of other servers and previews; unset: no limit", None, bounds=(1, 2**30)
    )

    # The house
    appservice_config_files: tuple[Path, ...] = setting("registration files of bridges (YAML)", ())
    support_contact: str | None = live("whom to ask: e-mail address or user id", None, A_CONTACT)
    support_page: str | None = live("a page that helps users", None, A_URL)
    smtp: SmtpConfig | None = live("e-mail: addresses in accounts, forgotten passwords", None)
    allow_check_for_updates: bool = setting("whether to look for news of this server", True)
    check_for_updates_url: str | None = setting("where to look; unset: nowhere", None, A_URL)

    # Resources, logs, measurements
    log: str = live("a level, then areas with another one: warn,http=debug", "warn", A_LOG_FILTER)
    db_cache_capacity_mb: float = setting("cache of the database, in MB", 300.0, bounds=(1, 2**20))
    conduit_cache_capacity_modifier: float = setting(
        "all other caches times this number", 1.0, bounds=(0.01, 1000)
    )
    pdu_cache_capacity: int = setting("events kept in memory", 150_000, bounds=(1, 10**9))
    cleanup_second_interval: int = setting("seconds between clean-ups", 60, bounds=(1, 86_400))
    metrics: bool = setting(
        "figures for Prometheus on /_conduit/metrics, for this machine or with a token", False
    )
    allow_jaeger: bool = setting("send traces to Jaeger", False)
    tracing_flame: bool = setting("record a flame graph", False)
    rocksdb_max_open_files: int = setting(
        "has no effect here: there is no RocksDB", 1000, bounds=(1, 10**9), no_effect=True
    )

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on server_name."""
        given, name = self.well_known, self.server_name
        has_port = name.rpartition(":")[2].isdigit()
        client = (given.client or f"https://{name}").rstrip("/")
        server = given.server or (name if has_port else f"{name}:443")
        object.__setattr__(self, "well_known", WellKnown(client=client, server=server))


SUBTABLES = (TlsConfig, WellKnown, ProxyGlobal, ProxyRule, ProxyConfig, SmtpConfig, TermsDocument)
CONFIG_TABLES: dict[str, type] = {table.__name__: table for table in SUBTABLES}

# ── 2.4  Types of values ─────────────────────────────────────────────────────


class Kind(NamedTuple):
    """A type that a value can have, as TOML writes it."""

    expect: str
    accepts: tuple[type, ...]
    convert: Callable[[Any], Any]  # ValueError on one that is wrong


KINDS = {
    "str": Kind("a text in quotes", (str,), str),
    "Path": Kind("a path in quotes", (str,), lambda text: Path(text).expanduser()),
    "bool": Kind("true or false", (bool,), bool),
    "int": Kind("a whole number", (int,), int),
    "float": Kind("a number", (int, float), float),
    "Network": Kind("address ranges like 10.0.0.0/8", (str,), ipaddress.ip_network),
    "Json": Kind("a table", (dict,), dict),
}


class Shape(NamedTuple):
    """The type of a key, taken apart: `tuple[Path, ...]` is many of "Path"."""

    base: str
    many: bool
    table: type | None


@functools.cache
def shape_of(annotation: str) -> Shape:
    """Read the annotation of a field; annotations are texts in this file."""
    inner = annotation.removesuffix(" | None")
    base = inner.removeprefix("tuple[").removesuffix(", ...]")
    return Shape(base, base != inner, CONFIG_TABLES.get(base))


def keys_of(table: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a table by the name they have in the file."""
    return {entry.name.rstrip("_"): entry for entry in dataclasses.fields(table)}


def known_keys(table: type, prefix: str = "") -> Iterator[str]:
    """Each key that can be written, those of nested tables and `<secret>_file` too."""
    for name, entry in keys_of(table).items():
        yield prefix + name
        if entry.metadata["setting"].secret:
            yield f"{prefix}{name}_file"
        nested = shape_of(str(entry.type)).table
        if nested:
            yield from known_keys(nested, f"{prefix}{name}.")


def nearest_key(name: str, known: Iterable[str]) -> str | None:
    """The known key that is most like the name, if one is like it at all."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, 0.7)), None)


# ── 2.5  Reading a table ─────────────────────────────────────────────────────

URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
MASK = "********"
MAX_SHOWN = 80  # characters of a value in an error message


def shown_value(value: Any, secret: bool) -> str:
    """A value as the file would write it; secrets and passwords in URLs are masked."""
    if secret:
        return MASK
    text = json.dumps(value, ensure_ascii=False, default=str)
    return URL_PASSWORD.sub(MASK, text)


def bounds_text(rules: Setting) -> str:
    """The bounds of a number, in words."""
    return f" from {rules.bounds[0]} to {rules.bounds[1]}" if rules.bounds else ""


def accepted(raw: Any, kind: Kind, rules: Setting) -> Any:
    """The value that TOML's value stands for; ValueError or TypeError when it is wrong.

    Trap: to Python, True is an integer as well. And NaN, which TOML can write, is smaller and
    greater than nothing, so ask for what is right.
    """
    if not isinstance(raw, kind.accepts) or isinstance(raw, bool) != (bool in kind.accepts):
        raise TypeError(raw)
    value = kind.convert(raw)
    within = rules.bounds is None or rules.bounds[0] <= value <= rules.bounds[1]
    if not within or (rules.check and not rules.check.passes(value)):
        raise ValueError(raw)
    return value


def value_of_variable(text: str) -> Any:
    """What a variable of the environment says, as TOML or JSON read it; as it stands otherwise."""
    with contextlib.suppress(ValueError, RecursionError):
        return tomllib.loads(f"value = {text.strip()}")["value"]
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return text  # which is of the wrong type, and is reported as such


class ConfigReader:
    """Makes a dataclass of what TOML and the environment hold, and collects what is wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.origins: dict[str, str] = {}  # key → variable of the environment it came from

    def complain(self, path: str, value: Any, right: str, secret: bool = False) -> None:
        """Note a mistake: the key, the value, what would be right."""
        shown = shown_value(value, secret)
        if len(shown) > MAX_SHOWN:
            shown = f"{shown[:MAX_SHOWN]}…"
        self.problems.append(f"{self.origins.get(path, path)} = {shown}\n    should be: {right}")

    def table(self, table: type, raw: Mapping[str, Any], prefix: str = "") -> Any:
        """An instance of the table, or None when something in it is wrong."""
        before = len(self.problems)
        keys = keys_of(table)
        given = self.read_secret_files(keys, raw, prefix)
        values = {}
        for name, entry in keys.items():
            if name in given:
                values[entry.name] = self.value(entry, given[name], prefix + name)
            elif entry.default is dataclasses.MISSING:
                text = entry.metadata["setting"].text
                self.problems.append(f"{prefix}{name} is missing\n    it is: {text}")
        for name in sorted(given.keys() - keys.keys()):
            self.warn_unknown(prefix + name)
        return table(**values) if len(self.problems) == before else None

    def read_secret_files(
        self, keys: Mapping[str, dataclasses.Field[Any]], raw: Mapping[str, Any], prefix: str
    ) -> dict[str, Any]:
        """The same values, with what `<secret>_file` names in the place of `<secret>`."""
        given = dict(raw)
        for name in [name for name, entry in keys.items() if entry.metadata["setting"].secret]:
            file = given.pop(f"{name}_file", None)
            path = f"{prefix}{name}_file"
            if file is not None and name in given:
                self.complain(path, file, f"left out, as there is {name} as well")
            elif file is not None:
                try:
                    given[name] = Path(file).expanduser().read_text("utf-8").strip().split("\n")[0]
                except (OSError, TypeError, ValueError, RuntimeError) as error:
                    self.complain(path, file, f"a file that holds the secret ({error})")
        return given

    def warn_unknown(self, path: str) -> None:
        """Say that a key means nothing here, and which one may have been meant."""
        nearest = nearest_key(path, known_keys(Config))
        if nearest and path in self.origins:
            nearest = f"CONDUIT_{nearest.upper().replace('.', '__')}"
        hint = f"; did you mean {nearest}?" if nearest else ""
        self.warnings.append(f"unknown key {self.origins.get(path, path)}{hint}")

    def value(self, entry: dataclasses.Field[Any], raw: Any, path: str) -> Any:
        """The value of one key, or None after noting a mistake."""
        rules: Setting = entry.metadata["setting"]
        shape = shape_of(str(entry.type))
        if rules.no_effect:
            self.warnings.append(f"{path} {rules.text}")
        is_text = shape.base in {"str", "Path"} and not shape.many
        if path in self.origins and isinstance(raw, str) and not is_text:
            raw = value_of_variable(raw)
        if not shape.many:
            return self.item(shape, rules, raw, path)
        if not isinstance(raw, list):
            right = "tables" if shape.table else KINDS[shape.base].expect
            return self.complain(path, raw, f"a list in brackets: {right}", rules.secret)
        kept = [one for one in raw if one != ""]  # old example files have trusted_servers = [""]
        at = f"{path}[{{}}]" if shape.table else path
        return tuple(self.item(shape, rules, one, at.format(i)) for i, one in enumerate(kept))

    def item(self, shape: Shape, rules: Setting, raw: Any, path: str) -> Any:
        """One value, or one item of a list."""
        if shape.table is not None:
            if isinstance(raw, dict):
                return self.table(shape.table, raw, f"{path}.")
            return self.complain(path, raw, f"a table: [global.{path}]")
        kind = KINDS[shape.base]
        try:
            return accepted(raw, kind, rules)
        except (ValueError, TypeError, OverflowError, RuntimeError, OSError):
            right = rules.check.expect if rules.check else kind.expect + bounds_text(rules)
            hint = "" if isinstance(raw, kind.accepts) or not rules.check else f"{kind.expect}: "
            return self.complain(path, raw, hint + right, rules.secret)


# ── 2.6  Files and the environment ───────────────────────────────────────────

NO_CONFIGURATION = """\
There is no configuration: CONDUIT_CONFIG is not set and there is no ./conduit.toml.
Copy conduit-example.toml to conduit.toml and write your server_name into it,
or name a file in CONDUIT_CONFIG, or set CONDUIT_CONFIG="" and CONDUIT_SERVER_NAME and so on."""


def read_config_file(environ: Mapping[str, str], reader: ConfigReader) -> Json:
    """The [global] table of the file in charge; empty where the environment has to do."""
    name = environ.get("CONDUIT_CONFIG")
    if name == "":
        return {}
    path = Path(name or "conduit.toml")
    if name is None and not path.exists():
        raise ConfigError([NO_CONFIGURATION])
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error
    table = document.pop("global", None)
    if not isinstance(table, dict):
        first = next(iter(document), "server_name")
        raise ConfigError([f"{path} has no [global] table: write the line [global] above {first}"])
    for name in document:
        if name in keys_of(Config):
            reader.problems.append(f"{name} stands outside of [global]: move it below that line")
        else:
            reader.warnings.append(f"{name} stands outside of [global] and is not read")
    return table


def flatten_turn(raw: Json, reader: ConfigReader) -> Json:
    """The table [global.turn], as newer versions of Conduit write it, as the keys turn_*."""
    turn = raw.get("turn")
    if not isinstance(turn, dict):
        return raw
    flat = {f"turn_{name}": value for name, value in turn.items()}
    for twice in sorted(flat.keys() & raw.keys()):
        reader.complain(twice, flat[twice], "given once, here or in [global.turn]", secret=True)
    return {name: value for name, value in raw.items() if name != "turn"} | flat


def environment_table(environ: Mapping[str, str], reader: ConfigReader) -> Json:
    """What CONDUIT_<KEY> and CONDUIT_<TABLE>__<KEY> say, in the shape of the file."""
    overrides: Json = {}
    for variable in sorted(environ):
        if not variable.startswith("CONDUIT_") or variable == "CONDUIT_CONFIG":
            continue
        key = variable.removeprefix("CONDUIT_").lower()
        *tables, name = re.sub("^turn__", "turn_", key).split("__")
        reader.origins[".".join([*tables, name])] = variable
        place = overrides
        for table in tables:
            if not isinstance(place.get(table), dict):
                place[table] = {}
            place = place[table]
        place[name] = environ[variable]
    return overrides


def merge_tables(below: Json, above: Json) -> Json:
    """Both tables in one; what is above wins, and a secret takes the place of its file."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged.pop(name.removesuffix("_file") if name.endswith("_file") else f"{name}_file", None)
        nested = isinstance(value, dict) and isinstance(old, dict)
        merged[name] = merge_tables(cast(Json, old), value) if nested else value
    return merged


OPEN_DOOR = "registration is open to everybody who can reach this server, spammers included"
CLOSED_DOOR = (
    "allow_registration is true without a registration_token, so only this machine can register:"
    " set a token, or allow_open_registration = true to let everybody in"
)


def advice(config: Config) -> Iterator[str]:
    """What is allowed, but most likely not meant."""
    token = config.registration_token
    if token and not config.allow_registration:
        yield "nobody can use registration_token while allow_registration is false"
    if token and not RELIABLE_TOKEN.fullmatch(token):
        yield "registration_token works in every client if it has up to 64 letters, digits or ._~-"
    if config.allow_registration and not token:
        yield OPEN_DOOR if config.allow_open_registration else CLOSED_DOOR
    has_login = config.turn_secret or (config.turn_username and config.turn_password)
    if config.turn_uris and not has_login:
        yield "turn_uris needs turn_secret, or turn_username and turn_password; it is not used"
    if config.emergency_password:
        yield "emergency_password lets whoever knows it administer this server; remove it soon"


def load_config(environ: Mapping[str, str]) -> tuple[Config, list[str]]:
    """The configuration and warnings about it; ConfigError names all mistakes at once."""
    reader = ConfigReader()
    below = flatten_turn(read_config_file(environ, reader), reader)
    above = environment_table(environ, reader)
    raw = merge_tables(below, above)
    if raw.get("proxy") == "none":  # how Conduit writes that there is none
        del raw["proxy"]
    if raw.get("address") == "":  # the documented default
        del raw["address"]
    config = reader.table(Config, raw)
    if reader.problems:
        raise ConfigError(reader.problems, reader.warnings)
    return config, [*reader.warnings, *advice(config)]


def reload_config(running: Config, environ: Mapping[str, str]) -> Config:
    """What file and environment say now, for the keys that can change at run time.

    Logs the warnings, and which keys wait for a restart. ConfigError if the file is wrong.
    """
    fresh, warnings = load_config(environ)
    kept = {}
    for entry in dataclasses.fields(Config):
        old, new = getattr(running, entry.name), getattr(fresh, entry.name)
        if old != new and not entry.metadata["setting"].reload:
            kept[entry.name] = old
            warnings.append(f"{entry.name} has changed; the new value waits for a restart")
    for warning in warnings:
        config_log.warning("%s", warning)
    return dataclasses.replace(fresh, **kept)


# ── 2.7  Showing the table ───────────────────────────────────────────────────


def masked_config(config: Any, prefix: str = "global") -> str:
    """The configuration as TOML to show to an admin, every secret masked."""
    lines, tables = [f"[{prefix}]"], []
    for name, entry in keys_of(type(config)).items():
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            tables.append(masked_config(value, f"{prefix}.{name}"))
        elif value and shape_of(str(entry.type)).table:
            items = (masked_config(item, f"{prefix}.{name}") for item in value)
            tables.extend(re.sub(r"^\[(.*)\]", r"[[\1]]", item) for item in items)
        elif value is not None:
            secret = entry.metadata["setting"].secret and bool(value)
            lines.append(f"{name} = {shown_value(value, secret)}")
    return "\n".join([*lines, *("\n" + table for table in tables)])


# ═════════════════════════════════════════════════════════════════════════════
#  3. CANONICAL JSON, HASHES, SIGNATURES
#
#  A signature covers bytes, so every server has to write the same JSON as the
#  same bytes. This chapter reads JSON without trusting it, writes it the one
#  canonical way, and signs and verifies with Ed25519.
#                                     spec: appendices "Signing JSON", "Base64"
# ═════════════════════════════════════════════════════════════════════════════

# ── 3.1  Writing JSON ────────────────────────────────────────────────────────

MAX_CANONICAL_INT = 2**53 - 1  # what a double holds exactly; the limit for canonical JSON
MAX_CANONICAL_DIGITS = 17  # of such an integer, with its sign
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_encode_sorted = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, sort_keys=True
).encode


def encode_json(value: Any) -> bytes:
    """Compact JSON in UTF-8, for responses; the value is our own and so needs no checks."""
    return _encode(value).encode("utf-8")


def canonical_json(value: Any) -> bytes:
    """The one way to write a JSON value: keys sorted by code point, no spaces, UTF-8.

    M_BAD_JSON for what has no such form: lone surrogates, NaN, a depth that Python cannot follow.
    Spec: appendices "Canonical JSON". Trap: rooms before version 6 may hold floats and large
    integers; they are written as Python writes them, which is how Synapse made them.
    """
    try:
        return _encode_sorted(value).encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise bad_json(f"No canonical JSON: {error}") from error


def is_canonical_int(value: object) -> bool:
    """Whether the value is an integer in the range of canonical JSON; true and false are not."""
    return type(value) is int and -MAX_CANONICAL_INT <= value <= MAX_CANONICAL_INT


def check_canonical(value: Any) -> None:
    """M_BAD_JSON for a parsed value with a number that canonical JSON forbids.

    Spec: rooms/v6 "Canonical JSON", enforced from room version 6 on.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        kind = type(item)
        if kind is str or kind is bool or item is None:
            continue
        if kind is dict:
            stack.extend(item.values())
        elif kind is list:
            stack.extend(item)
        elif not is_canonical_int(item):
            raise bad_json(f"The number {str(item)[:20]} is no integer within ±(2^53 - 1)")


# ── 3.2  Reading JSON ────────────────────────────────────────────────────────

MAX_JSON_DEPTH = 100  # nested arrays and objects; an honest event has fewer than ten
MAX_JSON_DIGITS = 4300  # of an integer; more would cost quadratic time
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def refuse_constant(text: str) -> Any:
    """NaN, Infinity and -Infinity are Python's idea, not JSON's."""
    raise ValueError(f"{text} is not JSON")


def finite_float(text: str) -> float:
    """A float, unless it is too large for one."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise bad_json("A number is out of range")
    return value


def bounded_int(text: str) -> int:
    """An integer that is cheap to convert; early Pythons 3.10 have no limit of their own."""
    if len(text) > MAX_JSON_DIGITS:
        raise ValueError("a number is too long")
    return int(text)


def canonical_int(text: str) -> int:
    """An integer that canonical JSON can hold."""
    if text == "-0" or len(text) > MAX_CANONICAL_DIGITS or not is_canonical_int(value := int(text)):
        raise bad_json(f"The integer {text[:20]} is out of range")
    return value


def refuse_float(text: str) -> float:
    """Canonical JSON has no floats."""
    raise bad_json(f"The number {text[:20]} is not an integer")


def unique_object(pairs: list[tuple[str, Any]]) -> Json:
    """An object none of whose keys occurs twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise bad_json("An object has the same key twice")
    return value


PLAIN_DECODER = json.JSONDecoder(
    parse_constant=refuse_constant,
    parse_float=finite_float,
    parse_int=None if hasattr(sys, "get_int_max_str_digits") else bounded_int,
)
STRICT_DECODER = json.JSONDecoder(
    parse_constant=refuse_constant,
    parse_float=refuse_float,
    parse_int=canonical_int,
    object_pairs_hook=unique_object,
)


def check_depth(value: Any) -> None:
    """Refuse JSON nested deeper than MAX_JSON_DEPTH, level by level and so without recursion."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise bad_json("JSON is nested too deeply")


def parse_json(raw: bytes, *, strict: bool = False) -> Any:
    """The value that the bytes spell.

    Every way to fail is a MatrixError: 400 M_NOT_JSON when the bytes are no JSON, 400 M_BAD_JSON
    when they are JSON that we refuse: too deep, lone surrogates, 1e400. `strict` also refuses what
    canonical JSON has no room for: floats, -0, integers beyond 2^53 - 1, an object's key twice.
    Trap: json.loads alone accepts NaN, turns 1e400 into infinity and guesses UTF-16.
    """
    decoder = STRICT_DECODER if strict else PLAIN_DECODER
    try:
        value = decoder.decode(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MatrixError(400, "M_NOT_JSON", f"Not valid JSON: {error}") from error
    if raw.count(b"[") + raw.count(b"{") > MAX_JSON_DEPTH:
        check_depth(value)
    if SURROGATE_ESCAPE.search(raw):
        canonical_json(value)  # a pair of escapes is a character; a lone one cannot be written
    return value


# ── 3.3  Base64 ──────────────────────────────────────────────────────────────

BASE64_TEXT = re.compile(r"[A-Za-z0-9+/_-]*={0,2}", re.ASCII)
TO_STANDARD_ALPHABET = str.maketrans("-_", "+/")


def b64encode(raw: bytes) -> str:
    """Base64 without padding."""
    return binascii.b2a_base64(raw, newline=False).rstrip(b"=").decode("ascii")


def b64url_encode(raw: bytes) -> str:
    """Base64 in the URL-safe alphabet, without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def b64decode(text: object) -> bytes:
    """The bytes that the text stands for, padded or not, in either alphabet.

    Spec: appendices "Unpadded Base64"; keys of third-party invites come in both alphabets.
    M_INVALID_PARAM for anything else.
    """
    if not isinstance(text, str) or not BASE64_TEXT.fullmatch(text):
        raise invalid_param("Not valid base64")
    bare = text.rstrip("=").translate(TO_STANDARD_ALPHABET)
    try:
        return binascii.a2b_base64(bare + "=" * (-len(bare) % 4))
    except binascii.Error as error:
        raise invalid_param("Not valid base64") from error


def sha256_base64(raw: bytes) -> str:
    """The SHA-256 of the bytes in unpadded base64, the form that `hashes` wants."""
    return b64encode(hashlib.sha256(raw).digest())


# ── 3.4  Signing keys ────────────────────────────────────────────────────────

KEY_LINE = re.compile(r"(?:ed25519[ \t]+)?([A-Za-z0-9_]{1,64})[ \t]+([A-Za-z0-9+/_-]{43})=?\s")
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


def sync_folder(folder: Path) -> None:
    """Make a new name in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SigningKey:
    """An Ed25519 key pair with its name; the private half leaves this object only by save()."""

    __slots__ = ("_secret", "key_id", "public", "seed")

    def __init__(self, name: str, seed: bytes) -> None:
        public, self._secret = nacl.bindings.crypto_sign_seed_keypair(seed)
        self.seed: Final = seed
        self.key_id: Final = f"ed25519:{name}"
        self.public: Final = b64encode(public)

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key with 256 random bits and a random name.  Spec: key ids match [a-zA-Z0-9_]+."""
        return cls("a_" + random_token(4), secrets.token_bytes(32))

    @classmethod
    def parse(cls, text: str) -> SigningKey:
        """The first key of a text in Synapse's format; ValueError when it holds none."""
        match = KEY_LINE.match(text.lstrip() + "\n")
        if match is None:
            raise ValueError("expected one line 'ed25519 <name> <unpadded base64 seed>'")
        return cls(match[1], b64decode(match[2]))

    def text(self) -> str:
        """The line that `parse` reads; a secret."""
        return f"ed25519 {self.key_id.partition(':')[2]} {b64encode(self.seed)}"

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key of a file in Synapse's format; ValueError with a sentence for the owner."""
        try:
            return cls.parse(path.read_text(encoding="ascii", errors="replace"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write the key file, readable by its owner alone, whole or not at all.

        FileExistsError when there is one: a lost signing key cannot be replaced.
        """
        draft = path.with_name(f".{path.name}.{random_token(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(self.text() + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)  # which, unlike a rename, fails when the name is taken
        finally:
            draft.unlink()
        sync_folder(path.parent)

    def sign(self, raw: bytes) -> str:
        """The signature of the bytes, in unpadded base64."""
        return b64encode(nacl.bindings.crypto_sign(raw, self._secret)[:SIGNATURE_BYTES])

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id})"


def verify_signature(public: object, signature: object, raw: bytes) -> bool:
    """Whether the signature of the bytes was made with the private half of the key; both base64."""
    try:
        key, mark = b64decode(public), b64decode(signature)
    except MatrixError:
        return False
    if len(key) != PUBLIC_KEY_BYTES or len(mark) != SIGNATURE_BYTES:
        return False
    try:
        nacl.bindings.crypto_sign_open(mark + raw, key)
    except nacl.exceptions.CryptoError:
        return False
    return True


# ── 3.5  Signed JSON ─────────────────────────────────────────────────────────

NOT_SIGNED = frozenset({"signatures", "unsigned"})


def signed_bytes(value: Json) -> bytes:
    """The bytes of a JSON object that a signature covers."""
    return canonical_json({key: value[key] for key in value if key not in NOT_SIGNED})


def signatures_by(value: Json, signer: str) -> Json:
    """The signatures of one signer, key id → base64; empty when there is none of a usable shape."""
    signatures = value.get("signatures")
    own = signatures.get(signer) if isinstance(signatures, dict) else None
    return own if isinstance(own, dict) else {}


def sign_json(value: Json, signer: str, key: SigningKey) -> Json:
    """A copy of the object that carries one more signature.  Spec: appendices "Signing Details"."""
    old = value.get("signatures")
    signatures = dict(old) if isinstance(old, dict) else {}
    signatures[signer] = {**signatures_by(value, signer), key.key_id: key.sign(signed_bytes(value))}
    return {**value, "signatures": signatures}


def verify_json(value: Json, signer: str, key_id: str, public: object) -> bool:
    """Whether the object carries a valid signature of the signer with this key.

    Spec: appendices "Checking for a Signature". A shape that cannot be checked does not pass.
    """
    signature = signatures_by(value, signer).get(key_id)
    try:
        return verify_signature(public, signature, signed_bytes(value))
    except MatrixError:
        return False


# ═════════════════════════════════════════════════════════════════════════════
#  4. STORAGE
#
#  One SQLite file in WAL mode, one writing connection on the loop thread, and
#  group commit: handlers write into one shared transaction, a commit appends it
#  to the WAL, a thread syncs the WAL once for all who wait. Beside it the stream:
#  one counter that stamps whatever a sync can carry.
#                            spec: none; SQLite's "Write-Ahead Logging" document
# ═════════════════════════════════════════════════════════════════════════════

DATABASE_FILE = "conduit.db"
PAGE_CACHE_SHARE = 16  # the operating system caches pages too, so SQLite gets 1/16 of the budget
WAL_BYTES = 2**26  # a write-ahead log that grew beyond is cut back when it begins anew
CHECKPOINT_COMMITS = 1000  # copy the WAL back into the database after so many commits
STREAM_BLOCK = 10_000  # positions reserved in the database at a time
INTERNED = 50_000  # names remembered with their integers, of each kind
STREAM_LOG = 20_000  # changes remembered in memory; older tokens read the tables instead
NO_SPACE = frozenset({"database or disk is full", "disk I/O error"})

SCHEMAS: Final[list[str]] = []
INVARIANTS: Final[list[tuple[str, str]]] = []
Checker = Callable[[Path, sqlite3.Connection], Iterator[str]]
CHECKERS: Final[list[Checker]] = []

log_storage = logging.getLogger("conduit.storage")


def schema(sql: str) -> None:
    """Register the tables of a chapter; a new database is made from all of them."""
    SCHEMAS.append(sql)


def invariant(what: str, sql: str) -> None:
    """Register a query for --check that selects what ought not to exist."""
    INVARIANTS.append((what, sql))


def checker(function: Checker) -> Checker:
    """Register what --check asks for more problems, with the folder and a connection."""
    CHECKERS.append(function)
    return function


schema("""
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value ANY
) WITHOUT ROWID;
CREATE TABLE users (
    user_nid INTEGER PRIMARY KEY,
    user_id TEXT NOT NULL UNIQUE
);
""")

# ── 4.1  Errors, copies, migrations ──────────────────────────────────────────


class DatabaseRefused(Exception):
    """The database must not be opened; the text says why and what to do."""


def storage_error(error: BaseException) -> MatrixError:
    """What a client hears when a write failed; the log has the cause."""
    if isinstance(error, MatrixError):
        return error
    if str(error) in NO_SPACE or getattr(error, "errno", None) in {errno.ENOSPC, errno.EFBIG}:
        return MatrixError(507, "M_UNKNOWN", "The server's disk is full; nothing was stored")
    return MatrixError(500, "M_UNKNOWN", "The server could not store this; see its log")


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open a connection with the settings that every connection needs."""
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode={'ro' if read_only else 'rwc'}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=1024,
    )
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA busy_timeout = 10000")
    return connection


def sync_path(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_database(source: Path, target: Path, *, replace: bool = False) -> None:
    """Write a consistent, compact copy of a database that may be in use; complete or not there."""
    if target.exists() and not replace:
        raise DatabaseRefused(f"{target} exists already; name a file that does not")
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    with contextlib.closing(connect(source, read_only=True)) as connection:
        connection.execute("VACUUM INTO ?", (str(partial),))
    os.chmod(partial, 0o600)
    sync_path(partial)
    partial.replace(target)
    sync_path(target.parent)


class Migration(NamedTuple):
    """One step of the schema: what it does in words, and the statements that do it."""

    what: str
    sql: str


# The first schema is version 1; the n-th entry leads from version n to n + 1.
MIGRATIONS: Final[tuple[Migration, ...]] = ()


def migrate(connection: sqlite3.Connection, path: Path, steps: Sequence[Migration]) -> None:
    """Bring an older database up to date, one transaction a step, with a copy before each."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    for old in range(version, len(steps) + 1):
        step, new = steps[old - 1], old + 1
        copy = path.with_name(f"{path.name}.before-version-{new}")
        log_storage.warning("migrating to version %d: %s; copy in %s", new, step.what, copy)
        copy_database(path, copy, replace=True)
        statements = f"BEGIN IMMEDIATE;\n{step.sql};\nPRAGMA user_version = {new:d};\nCOMMIT;"
        try:
            connection.executescript(statements)
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


# ── 4.2  Opening ─────────────────────────────────────────────────────────────


def claim_folder(folder: Path) -> int:
    """Make the folder, readable by its owner alone, and lock it: two servers would ruin it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseRefused(f"database_path {folder} cannot be made: {error.strerror}") from error
    descriptor = os.open(folder / "conduit.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DatabaseRefused(f"another server is running on {folder}") from None
    return descriptor


def refuse_half_wiped(folder: Path) -> None:
    """A folder with media but no database was wiped by accident; a start would finish it off."""
    if (folder / DATABASE_FILE).exists():
        return
    left = [name for name in (f"{DATABASE_FILE}-wal", "media") if (folder / name).exists()]
    if left:
        raise DatabaseRefused(
            f"{folder} has {' and '.join(left)} but no {DATABASE_FILE}: restore the database "
            "from a backup, or empty the folder to start a new server"
        )


def refuse_foreign(connection: sqlite3.Connection, folder: Path, server_name: str) -> None:
    """Refuse a database of a newer program, of another server, or without its tables."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    newest = len(MIGRATIONS) + 1
    if version > newest:
        raise DatabaseRefused(
            f"the database in {folder} has version {version}, this program knows {newest}: "
            "use the newer program, or the copy that was made before the upgrade"
        )
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
    row = None
    if {"meta", "users", "events"} <= tables:
        row = connection.execute("SELECT value FROM meta WHERE key = 'server_name'").fetchone()
    if version == 0 or row is None:
        raise DatabaseRefused(
            f"the database in {folder} is not complete: restore it from a backup, "
            "or empty the folder to start a new server"
        )
    if row[0] != server_name:
        raise DatabaseRefused(
            f"the database in {folder} belongs to {row[0]}, the configuration says {server_name}: "
            "a server cannot be renamed; put the old server_name back or use another folder"
        )


def create_database(connection: sqlite3.Connection, server_name: str) -> None:
    """Make all tables of all chapters in one transaction."""
    version = f"PRAGMA user_version = {len(MIGRATIONS) + 1:d};"
    connection.executescript("\n".join(["BEGIN IMMEDIATE;", *SCHEMAS, version]))
    connection.execute("INSERT INTO meta VALUES ('server_name', ?)", (server_name,))
    connection.execute("INSERT INTO meta VALUES ('created_ts', ?)", (now_ms(),))
    connection.execute("COMMIT")


def open_database(folder: Path, server_name: str, cache_mb: float) -> sqlite3.Connection:
    """Open or make the database of this server, upgraded, in WAL mode."""
    refuse_half_wiped(folder)
    path = folder / DATABASE_FILE
    fresh = not path.exists()
    connection = connect(path)
    try:
        if fresh:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        else:
            refuse_foreign(connection, folder, server_name)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES:d}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute(f"PRAGMA cache_size = {-max(2048, int(cache_mb * 1024)):d}")
        if fresh:
            create_database(connection, server_name)
            sync_path(folder)
        else:
            migrate(connection, path, MIGRATIONS)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise DatabaseRefused(f"the database {path} cannot be read: {error}") from error
        raise
    return connection


# ── 4.3  Group commit ────────────────────────────────────────────────────────

Result = TypeVar("Result")
Name = TypeVar("Name", str, StateKey)
Nid = TypeVar("Nid", bound=int)


Batch = list["asyncio.Future[None]"]  # who waits for one commit
Report = Callable[["OSError | None"], None]  # hears how a sync went


def settle(batch: Batch, error: MatrixError | None) -> None:
    """Tell everyone who waits that the batch is on the disk, or that it is lost."""
    for future in batch:
        if not future.done() and error is None:
            future.set_result(None)
        elif not future.done():
            future.set_exception(cast(MatrixError, error))


def call_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Call a function on the loop from a thread; a loop that is gone needs no answer."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


def sync_on_demand(wal: int, jobs: queue.SimpleQueue[Report | None]) -> None:
    """In a thread of its own: force the WAL onto the disk for one job after the other."""
    while (report := jobs.get()) is not None:
        try:
            os.fdatasync(wal)
        except OSError as error:
            report(error)
        else:
            report(None)
    os.close(wal)


def checkpoint(path: Path) -> None:
    """In a thread: copy the WAL back into the database; what fails is tried again later."""
    try:
        with contextlib.closing(connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    except sqlite3.Error as error:
        log_storage.error("checkpoint failed, will be tried again: %s", error)


class Interned(Generic[Name, Nid]):
    """A table that gives integers to names (texts or pairs of texts), most of it in memory."""

    def __init__(self, database: Database, *, find: str, add: str, name: str) -> None:
        self.database = database
        self._find, self._add, self._name = find, add, name
        self._nids: LruCache[Name, Nid] = LruCache(INTERNED)
        self._names: LruCache[Nid, Name] = LruCache(INTERNED)
        database.on_reset(self._nids.clear)
        database.on_reset(self._names.clear)

    def find(self, name: Name) -> Nid | None:
        """The integer of a name, or None if it was never seen."""
        nid = self._nids.get(name)
        if nid is None:
            nid = self.database.value(self._find, name if isinstance(name, tuple) else (name,))
            if nid is not None:
                self._nids.put(name, nid)
        return nid

    def nid(self, name: Name) -> Nid:
        """The integer of a name, made if new."""
        nid = self.find(name)
        if nid is None:
            with self.database.write():
                self.database.execute(self._add, name if isinstance(name, tuple) else (name,))
            nid = self.find(name)
        return cast(Nid, nid)

    def name(self, nid: Nid) -> Name:
        """The name that an integer stands for."""
        name = self._names.get(nid)
        if name is None:
            row = tuple(map(sys.intern, self.database.one(self._name, (nid,))))
            name = cast(Name, row if len(row) > 1 else row[0])
            self._names.put(nid, name)
        return name


class Database:
    """The one database. All methods are for the loop thread; what is in a thread says so.

    `execute`, `one`, `all`, `value` read, and write inside `with write():`. Writes are visible at
    once and durable once `await synced()` returns.
    """

    def __init__(self, folder: Path, server_name: str, cache_mb: float) -> None:
        self.folder = folder
        self._lock = claim_folder(folder)
        try:
            self.connection = open_database(folder, server_name, cache_mb / PAGE_CACHE_SHARE)
        except BaseException:
            os.close(self._lock)
            raise
        self.execute = self.connection.execute
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="pool")
        wal = os.open(folder / f"{DATABASE_FILE}-wal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._jobs: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._syncer = threading.Thread(target=sync_on_demand, args=(wal, self._jobs), daemon=True)
        self._syncer.start()
        self._open: Batch | None = None
        self._flushing: Batch | None = None
        self._blocks: list[int] = []  # of each open block, how many rows were changed before it
        self._commits = 0
        self._wal, self._copying = wal, False
        self.lost = 0  # batches that were undone
        self._mostly_copied = False  # a thread has copied the WAL but for the last commits
        self._broken: MatrixError | None = None
        self._reset: list[Callable[[], None]] = []
        self._readers = threading.local()
        users: Interned[str, UserNid] = Interned(
            self,
            find="SELECT user_nid FROM users WHERE user_id = ?",
            add="INSERT INTO users (user_id) VALUES (?)",
            name="SELECT user_id FROM users WHERE user_nid = ?",
        )
        self.user_nid, self.find_user_nid, self.user_id = users.nid, users.find, users.name

    # Reading

    def one(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> Any:
        """The first row, or None."""
        return self.execute(sql, params).fetchone()

    def all(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """All rows."""
        return self.execute(sql, params).fetchall()

    def value(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> Any:
        """The first column of the first row, or None."""
        row = self.execute(sql, params).fetchone()
        return None if row is None else row[0]

    # Writing

    def write(self) -> Database:
        """`with db.write():` one handler's writes, all or none of them; it never spans an await."""
        return self

    def __enter__(self) -> None:
        """Open the shared transaction if there is none, and a savepoint in it."""
        if self._broken:
            raise self._broken
        if self._open is None:
            try:
                self.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                raise self._reported(error) from error
            self._open = []
            if self._flushing is None:
                asyncio.get_running_loop().call_soon(self._commit)
        self.execute("SAVEPOINT block")
        self._blocks.append(self.connection.total_changes)

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: Any) -> None:
        """Keep the block's writes, or undo them; SQLite itself may have undone the whole batch."""
        changes_before = self._blocks.pop()
        if self.connection.in_transaction:
            if error is not None:
                self.execute("ROLLBACK TO block")
            self.execute("RELEASE block")
            if error is None:
                return
        else:
            error = error or sqlite3.OperationalError("an inner block was lost, and this with it")
            self._lose_open_batch(error)
        # A handler that refuses before it wrote anything must not cost everyone their caches.
        if not isinstance(error, MatrixError) or self.connection.total_changes > changes_before:
            self.forget()
        if isinstance(error, sqlite3.OperationalError | sqlite3.IntegrityError | OverflowError):
            raise self._reported(error) from error

    async def synced(self) -> None:
        """Wait until everything written so far is on the disk; MatrixError if it was lost."""
        batch = self._flushing if self._open is None else self._open
        if batch is not None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            batch.append(future)
            await future
        elif self._broken:
            raise self._broken

    def on_reset(self, callback: Callable[[], None]) -> None:
        """Call back when writes were undone, so that no cache keeps what never happened."""
        self._reset.append(callback)

    def forget(self) -> None:
        """Empty whatever caches rows; all of it can be read again."""
        for callback in self._reset:
            callback()

    def _reported(self, error: BaseException) -> MatrixError:
        log_storage.error("write failed: %s; free some space or look at the disk", error)
        return storage_error(error)

    def _lose_open_batch(self, error: BaseException) -> None:
        self.lost += 1
        batch, self._open = self._open, None
        if batch is not None:
            settle(batch, self._reported(error))

    def _commit(self) -> None:
        """Append the open transaction to the WAL and hand it to the syncing thread."""
        if self._open is None or self._flushing is not None:
            return
        try:
            self.execute("COMMIT")
        except sqlite3.Error as error:
            if self.connection.in_transaction:
                self.execute("ROLLBACK")
            self._lose_open_batch(error)
            self.forget()
            return
        self._flushing, self._open = self._open, None
        if self._mostly_copied:
            self._finish_checkpoint()
        loop = asyncio.get_running_loop()
        self._jobs.put(functools.partial(call_loop, loop, self._flushed))

    def _flushed(self, error: OSError | None) -> None:
        """The sync came back: answer those who waited, and commit what came in meanwhile."""
        batch, self._flushing = self._flushing, None
        if error is not None:
            self._broken = storage_error(error)
            log_storage.critical(
                "the disk failed to sync (%s): stopping, nothing more is told", error
            )
            os.kill(os.getpid(), signal.SIGTERM)
        settle(cast(Batch, batch), self._broken)
        self._commit()
        self._commits += 1
        is_long = os.fstat(self._wal).st_size > WAL_BYTES
        if (is_long or self._commits >= CHECKPOINT_COMMITS) and not self._copying:
            self._commits, self._copying = 0, True
            copying = self.pool.submit(checkpoint, self.folder / DATABASE_FILE)
            copying.add_done_callback(lambda _: setattr(self, "_mostly_copied", True))

    def _finish_checkpoint(self) -> None:
        """Copy the few commits since the thread began, at a moment when no transaction is open.

        Trap: SQLite begins the WAL anew only when all of it is copied; without this, a server that
        always has something to write has a WAL that always grows.
        """
        self._mostly_copied = self._copying = False
        with contextlib.suppress(sqlite3.Error):  # the next round tries again
            self.execute("PRAGMA wal_checkpoint(PASSIVE)")

    # Threads

    async def in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run what takes long and holds no state in the small pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    async def read_in_thread(self, function: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run a long scan in the pool on a read-only connection, which sees what is committed."""
        return await self.in_thread(self._with_reader, function)

    def _with_reader(self, function: Callable[[sqlite3.Connection], Result]) -> Result:
        connection = getattr(self._readers, "connection", None)
        if connection is None:
            connection = connect(self.folder / DATABASE_FILE, read_only=True)
            self._readers.connection = connection
        return function(connection)

    async def close(self) -> None:
        """Make everything durable, copy the WAL back and let go of the folder."""
        with contextlib.suppress(MatrixError):
            await self.synced()
        self._jobs.put(None)
        self._syncer.join()
        self.pool.shutdown()
        with contextlib.suppress(sqlite3.Error):
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.connection.close()
        os.close(self._lock)

    # Small values

    def meta(self, key: str) -> Any:
        """A single value kept for the whole server, or None."""
        return self.value("SELECT value FROM meta WHERE key = ?", (key,))

    def set_meta(self, key: str, value: Any) -> None:
        """Store a single value for the whole server."""
        with self.write():
            self.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


# ── 4.4  The stream ──────────────────────────────────────────────────────────

# What a position can stand for; the target is a room or a user.
ROOM_EVENT = "event"  # room: a new timeline event
RECEIPT = "receipt"  # room: read receipts moved
TYPING = "typing"  # room: who types changed
ROOM_DATA = "room data"  # user: account data or tags of one of their rooms
ACCOUNT_DATA = "account data"  # user: their own account data, push rules included
TO_DEVICE = "to-device"  # user: a message for one of their devices
DEVICE_LIST = "device list"  # user whose devices or keys changed
KEY_COUNTS = "key counts"  # user: one-time or fallback keys of a device were used up
PRESENCE = "presence"  # user whose presence changed
THREAD_SUBSCRIPTION = "thread subscription"  # user: what they follow changed


class Stream:
    """The one counter that orders all changes, with the newest of them in memory.

    Positions are handed out from blocks reserved in the database, so that a position never
    comes twice, not even after a power cut: a sync token stays good for ever.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.position: int = database.meta("stream_reserved") or 0
        self._reserved = self.position
        self._floor = self.position  # changes at or before this are not in the log
        self._positions: list[int] = []
        self._changes: list[tuple[str, int]] = []
        self._listeners: list[Callable[[str, int], None]] = []
        database.on_reset(self._forget_reservation)

    def stamp(self, kind: str, target: int) -> int:
        """Take the next position for a change and tell those who wait for it."""
        position = self.advance()
        self._positions.append(position)
        self._changes.append((kind, target))
        if len(self._positions) > STREAM_LOG:
            drop = STREAM_LOG // 2
            self._floor = self._positions[drop - 1]
            del self._positions[:drop], self._changes[:drop]
        for listener in self._listeners:
            listener(kind, target)
        return position

    def advance(self) -> int:
        """Take a position that no sync needs to hear of, such as that of an outlier."""
        if self.position >= self._reserved:
            reserved = self.position + STREAM_BLOCK
            self.database.set_meta("stream_reserved", reserved)
            self._reserved = reserved
        self.position += 1
        return self.position

    def since(self, position: int) -> list[tuple[str, int]] | None:
        """The (kind, target)s after a position, oldest first; None if the log begins later."""
        if position < self._floor:
            return None
        return self._changes[bisect.bisect_right(self._positions, position) :]

    def subscribe(self, listener: Callable[[str, int], None]) -> None:
        """Call back with kind and target at each stamp."""
        self._listeners.append(listener)

    def save(self) -> None:
        """At a clean stop, give back the positions that were reserved and not used."""
        self.database.set_meta("stream_reserved", self.position)
        self._reserved = self.position

    def _forget_reservation(self) -> None:
        # The row may have been rolled back; the next stamp reserves anew, above all used ones.
        self._reserved = min(self._reserved, self.position)


# ── 4.5  The check ───────────────────────────────────────────────────────────


def check_database(folder: Path) -> list[str]:
    """What is wrong with a database, which may be in use: SQLite's check, then every chapter's."""
    path = folder / DATABASE_FILE
    if not path.exists():
        return [f"there is no database in {folder}"]
    try:
        with contextlib.closing(connect(path, read_only=True)) as connection:
            lines = connection.execute("PRAGMA integrity_check").fetchall()
            found = [f"integrity: {line}" for (line,) in lines if line != "ok"]
            for what, sql in INVARIANTS:
                if rows := connection.execute(sql).fetchmany(5):
                    found.append(f"{what}: {', '.join(str(row[0]) for row in rows)}")
            for function in CHECKERS:
                found += function(folder, connection)
            return found
    except sqlite3.DatabaseError as error:
        return [f"the database cannot be read: {error}"]


invariant(
    "stream positions above the reserved ones",
    "SELECT pos FROM events WHERE pos > (SELECT value FROM meta WHERE key = 'stream_reserved')",
)


# ╔═══════════════════════════════════════════════════════════════════════════╗
# ║  PART II   ROOMS                                                          ║
# ╚═══════════════════════════════════════════════════════════════════════════╝
#
# A room is a growing graph of events that many servers hold a copy of. Nobody
# is in charge: each server appends its users' events, sends them to the
# others, and everyone must come to the same view of who is in the room and
# who may do what. This part is how.
#
# Every event names the newest events its server knew (prev_events), which
# makes the graph, and those that permit it (auth_events), which makes the
# proof. An event is hashed and signed, so it cannot be altered on its way; it
# can be redacted, because hash and signature cover only what a redaction
# leaves. Where the graph forks, the two branches may disagree about the state
# of the room, and the state resolution decides between them.
#
# Two ideas carry this part. First, the rules are functions of plain data:
# chapters 5 to 8 know no database, no clock and no network, so that the same
# input gives the same verdict on every server and in every test. Second, what
# differs between the twelve room versions is one table, and no chapter ever
# asks for a version by its number. Only the last chapter of the part, the room
# store, keeps anything.


# ═════════════════════════════════════════════════════════════════════════════
#  5. ROOM VERSIONS
#
#  A room keeps the rules it was made with for as long as it lives. Twelve sets
#  of rules are in use; this chapter is the table of what distinguishes them.
#                                                spec: rooms/*, "Feature matrix"
# ═════════════════════════════════════════════════════════════════════════════

# ── 5.1  What a redaction leaves ─────────────────────────────────────────────

REDACTED_KEYS = frozenset({"event_id", "type", "room_id", "sender", "state_key", "content"}).union(
    {"hashes", "signatures", "depth", "prev_events", "auth_events", "origin_server_ts"}
)
REDACTED_KEYS_BEFORE_11 = REDACTED_KEYS | {"prev_state", "origin", "membership"}

ContentKeys = Mapping[str, frozenset[str]]  # event type → keys of the content that stay


def _keeping(older: ContentKeys, **keys: str) -> ContentKeys:
    """The table of an older version with some rows added or replaced; m.room. is left out here."""
    return {**older, **{"m.room." + name: frozenset(words.split()) for name, words in keys.items()}}


CONTENT_KEPT_SINCE_6 = _keeping(
    {},
    member="membership",
    create="creator",
    join_rules="join_rule",
    power_levels="ban events events_default kick redact state_default users users_default",
    history_visibility="history_visibility",
)
CONTENT_KEPT_SINCE_1 = _keeping(CONTENT_KEPT_SINCE_6, aliases="aliases")
CONTENT_KEPT_SINCE_8 = _keeping(CONTENT_KEPT_SINCE_6, join_rules="join_rule allow")
CONTENT_KEPT_SINCE_9 = _keeping(
    CONTENT_KEPT_SINCE_8, member="membership join_authorised_via_users_server"
)
CONTENT_KEPT_SINCE_11 = _keeping(
    CONTENT_KEPT_SINCE_9,
    power_levels="ban events events_default invite kick redact state_default users users_default",
    redaction="redacts",
)

# ── 5.2  The table ───────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class RoomVersion:
    """One row: what servers must know to take part in rooms of this version."""

    id: str
    stable: bool = True  # what /capabilities says about it
    # Event format and ids
    explicit_event_ids: bool = False  # 1-2: the event names its id; prev_events carry hashes
    url_safe_event_ids: bool = True  # from 4: the reference hash in URL-safe base64
    strict_json: bool = True  # from 6: canonical JSON is enforced, no floats, 53-bit integers
    room_id_is_hash: bool = False  # from 12: the room id is the create event's id with a !
    # State resolution and keys
    resolution: str = "v2"  # "v1", "v2" or "v2.1"
    enforce_key_validity: bool = True  # from 5: a key must be valid at origin_server_ts
    # Redaction
    redacted_keys: frozenset[str] = REDACTED_KEYS_BEFORE_11
    redacted_content: ContentKeys = field(default_factory=dict)
    redaction_keeps_create: bool = False  # from 11: all of m.room.create's content stays
    redaction_keeps_signed_invite: bool = False  # from 11: third_party_invite.signed stays
    redacts_in_content: bool = False  # from 11: content.redacts instead of the top level
    # Authorization rules
    aliases_rule: bool = False  # 1-5: m.room.aliases belong to the server in their state key
    redaction_rule: bool = False  # 1-2: redacting is a matter of the authorization rules
    creator_in_content: bool = True  # 1-10: content.creator; later the sender of m.room.create
    notification_levels: bool = True  # from 6: changes of notification levels are checked
    knock: bool = False  # from 7: join rule and membership "knock"
    restricted: bool = False  # from 8: join rule "restricted"
    knock_restricted: bool = False  # from 10: join rule "knock_restricted"
    integer_levels: bool = False  # from 10: power levels are integers and nothing else
    privileged_creators: bool = False  # from 12: creators stand above all power levels

    def __repr__(self) -> str:
        return f"RoomVersion({self.id})"


def _versions() -> dict[str, RoomVersion]:
    """The twelve rows, each written as what it changes in the one before."""
    next_to = dataclasses.replace
    v1 = RoomVersion(
        "1",
        explicit_event_ids=True,
        url_safe_event_ids=False,
        strict_json=False,
        resolution="v1",
        enforce_key_validity=False,
        redacted_content=CONTENT_KEPT_SINCE_1,
        aliases_rule=True,
        redaction_rule=True,
        notification_levels=False,
    )
    v2 = next_to(v1, id="2", resolution="v2")
    v3 = next_to(v2, id="3", explicit_event_ids=False, redaction_rule=False)
    v4 = next_to(v3, id="4", url_safe_event_ids=True)
    v5 = next_to(v4, id="5", enforce_key_validity=True)
    v6 = next_to(
        v5,
        id="6",
        strict_json=True,
        aliases_rule=False,
        notification_levels=True,
        redacted_content=CONTENT_KEPT_SINCE_6,
    )
    v7 = next_to(v6, id="7", knock=True)
    v8 = next_to(v7, id="8", restricted=True, redacted_content=CONTENT_KEPT_SINCE_8)
    v9 = next_to(v8, id="9", redacted_content=CONTENT_KEPT_SINCE_9)
    v10 = next_to(v9, id="10", knock_restricted=True, integer_levels=True)
    v11 = next_to(
        v10,
        id="11",
        redacted_keys=REDACTED_KEYS,
        redacted_content=CONTENT_KEPT_SINCE_11,
        redaction_keeps_create=True,
        redaction_keeps_signed_invite=True,
        redacts_in_content=True,
        creator_in_content=False,
    )
    v12 = next_to(v11, id="12", room_id_is_hash=True, resolution="v2.1", privileged_creators=True)
    rows = (v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12)
    return {row.id: row for row in rows}


ROOM_VERSIONS: Final[Mapping[str, RoomVersion]] = _versions()
STABLE_VERSIONS: Final = frozenset(row.id for row in ROOM_VERSIONS.values() if row.stable)


def room_version(name: object) -> RoomVersion:
    """The row of a version.  400 M_UNSUPPORTED_ROOM_VERSION when there is none of that name."""
    row = ROOM_VERSIONS.get(name) if isinstance(name, str) else None
    if row is None:
        error = f"Room version {str(name)[:40]!r} is not supported"
        raise MatrixError(400, "M_UNSUPPORTED_ROOM_VERSION", error)
    return row


def version_of_create(content: Json) -> RoomVersion:
    """The version that a create event's content names; "1" when it names none."""
    return room_version(content.get("room_version", "1"))


# ═════════════════════════════════════════════════════════════════════════════
#  6. EVENTS
#
#  A persistent data unit (PDU) is what servers exchange: a JSON object with
#  hashes and signatures. Here is what shape it must have, how it gets its id,
#  what is left of it after a redaction, and how we make one of our own.
#          spec: rooms/* "Event format", SS-API "Signing Events", CS-API "Redactions"
# ═════════════════════════════════════════════════════════════════════════════

# ── 6.1  The event ───────────────────────────────────────────────────────────

MAX_EVENT_BYTES = 65_536  # of the whole event as canonical JSON, signatures included
MAX_PREV_EVENTS = 20
MAX_AUTH_EVENTS = 10
MAX_SQL_INT = 2**63 - 1  # the depth limit before room version 6
CREATE: Final = "m.room.create"
MEMBER: Final = "m.room.member"
POWER_LEVELS: Final = "m.room.power_levels"
JOIN_RULES: Final = "m.room.join_rules"
THIRD_PARTY_INVITE: Final = "m.room.third_party_invite"
REDACTION: Final = "m.room.redaction"
ALIASES: Final = "m.room.aliases"
CREATE_KEY: Final[StateKey] = (CREATE, "")
POWER_LEVELS_KEY: Final[StateKey] = (POWER_LEVELS, "")
JOIN_RULES_KEY: Final[StateKey] = (JOIN_RULES, "")


def room_id_of(version: RoomVersion, pdu: Json, event_id: str) -> str:
    """The room that an event belongs to; from version 12 a create event names its room itself."""
    if version.room_id_is_hash and pdu["type"] == CREATE:
        return "!" + event_id[1:]
    return cast(str, pdu["room_id"])


def referenced_ids(version: RoomVersion, references: list[Any]) -> list[str]:
    """The ids in prev_events or auth_events; versions 1 and 2 have pairs of id and hashes there."""
    if version.explicit_event_ids:
        return [reference[0] for reference in references]
    return references


def redaction_target(version: RoomVersion, pdu: Json) -> str | None:
    """The id of the event that a redaction is aimed at.  Spec: rooms/v11 "Event format"."""
    if pdu["type"] != REDACTION:
        return None
    target = (pdu["content"] if version.redacts_in_content else pdu).get("redacts")
    return target if isinstance(target, str) else None


class Event:
    """One event of a checked format: the PDU as it travels, and what the server knows of it."""

    __slots__ = (
        "auth_events",
        "content",
        "depth",
        "event_id",
        "nid",
        "origin_server_ts",
        "pdu",
        "pos",
        "prev_events",
        "redacted_by",
        "redacts",
        "rejected",
        "replaces",
        "room_id",
        "room_nid",
        "sender",
        "soft_failed",
        "state_group",
        "state_key",
        "txn_device",
        "txn_id",
        "type",
        "version",
    )

    def __init__(self, version: RoomVersion, pdu: Json, event_id: str) -> None:
        self.version: Final = version
        self.pdu = pdu  #: the event as it is sent to other servers
        self.event_id: Final = event_id
        self.type: Final[str] = pdu["type"]
        self.sender: Final[str] = pdu["sender"]
        self.state_key: Final[str | None] = pdu.get("state_key")
        self.content: Json = pdu["content"]
        self.room_id: Final = room_id_of(version, pdu, event_id)
        self.depth: Final[int] = pdu["depth"]
        self.origin_server_ts: Final[int] = pdu["origin_server_ts"]  #: milliseconds, as claimed
        self.prev_events: Final = referenced_ids(version, pdu["prev_events"])
        self.auth_events: Final = referenced_ids(version, pdu["auth_events"])
        self.redacts: Final = redaction_target(version, pdu)  #: event id, of redactions only
        # What the room store (chapter 10) knows of the event
        self.nid = EventNid(0)
        self.pos: int | None = None  #: place in the timeline; None for events outside of it
        self.room_nid = RoomNid(0)
        self.state_group: int | None = None  #: the state after the event
        self.replaces: EventNid | None = None  #: the state event that was in its place before
        self.rejected: str | None = None  #: the rule that refused it
        self.soft_failed = False
        self.redacted_by: EventNid | None = None  #: the redaction that applies
        self.txn_device: int | None = None  #: which local device sent it,
        self.txn_id: str | None = None  #: and under what transaction id

    @property
    def is_state(self) -> bool:
        """Whether the event sets a piece of state."""
        return self.state_key is not None

    @property
    def key(self) -> StateKey:
        """The piece of state that a state event sets; of others a pair that matches nothing."""
        return cast(StateKey, (self.type, self.state_key))

    @property
    def membership(self) -> str | None:
        """The membership that a member event gives its target; None when it is no usable one."""
        if self.type != MEMBER or self.state_key is None:
            return None
        membership = self.content.get("membership")
        return membership if isinstance(membership, str) else None

    def __repr__(self) -> str:
        return f"Event({self.event_id} {self.type} {self.state_key!r} by {self.sender})"


# ── 6.2  The format ──────────────────────────────────────────────────────────


def is_sender_id(text: object) -> bool:
    """Whether the text can be a sender; any localpart will do.  Spec: "Historical User IDs"."""
    return split_id("@", text) is not None


def is_event_id(text: object) -> bool:
    """Whether the text can be an event id of some room version."""
    return isinstance(text, str) and text.startswith("$") and byte_length(text) <= MAX_ID_BYTES


def is_event_pair(reference: object) -> bool:
    """Whether this is [event id, {algorithm: hash}], the reference of versions 1 and 2."""
    return (
        isinstance(reference, list)
        and len(reference) == 2
        and is_event_id(reference[0])
        and isinstance(reference[1], dict)
    )


def check_text(pdu: Json, name: str) -> str:
    """A required string of at most 255 bytes.  Spec: CS-API "Size limits"."""
    value = pdu.get(name)
    if not isinstance(value, str):
        raise bad_json(f"{name} is not a string")
    if byte_length(value) > MAX_ID_BYTES:
        raise too_large(f"{name} is longer than 255 bytes")
    return value


def check_room_id(version: RoomVersion, pdu: Json, event_type: str) -> None:
    """The room id has the form of the version; create events from version 12 need none.

    A create event of version 12 that has a room_id all the same falls to authorization rule 1.2.
    """
    if version.room_id_is_hash and event_type == CREATE:
        return
    room_id = check_text(pdu, "room_id")
    has_server = split_id("!", room_id) is not None
    if not is_room_id(room_id) or has_server == version.room_id_is_hash:
        raise bad_json("room_id is not a room id of this room version")


def check_numbers(version: RoomVersion, pdu: Json) -> None:
    """Depth and time are integers that fit: 53 bits from version 6, 63 before that."""
    limit = MAX_CANONICAL_INT if version.strict_json else MAX_SQL_INT
    for name, lowest in (("depth", 0), ("origin_server_ts", -limit)):
        value = pdu.get(name)
        if type(value) is not int or not lowest <= value <= limit:
            raise bad_json(f"{name} is not an integer in range")


def check_references(version: RoomVersion, pdu: Json, name: str, limit: int) -> None:
    """A list of at most `limit` event ids, in versions 1 and 2 of pairs of id and hashes."""
    references = pdu.get(name)
    if not isinstance(references, list):
        raise bad_json(f"{name} is not a list")
    if len(references) > limit:
        raise bad_json(f"{name} has more than {limit} entries")
    for reference in references:
        if version.explicit_event_ids:
            if not is_event_pair(reference):
                raise bad_json(f"{name} has an entry that is no pair of event id and hashes")
        elif not is_event_id(reference):
            raise bad_json(f"{name} has an entry that is no event id")


def check_fields(version: RoomVersion, pdu: Json) -> None:
    """The part of the format that an event has before it is hashed and signed."""
    event_type = check_text(pdu, "type")
    if not is_sender_id(check_text(pdu, "sender")):
        raise bad_json("sender is not a user id")
    if "state_key" in pdu:
        check_text(pdu, "state_key")
    check_room_id(version, pdu, event_type)
    if not isinstance(pdu.get("content"), dict):
        raise bad_json("content is not an object")
    check_numbers(version, pdu)
    check_references(version, pdu, "prev_events", MAX_PREV_EVENTS)
    check_references(version, pdu, "auth_events", MAX_AUTH_EVENTS)
    if version.explicit_event_ids and split_id("$", check_text(pdu, "event_id")) is None:
        raise bad_json("event_id is not of the form $id:server")
    if not version.redacts_in_content and not isinstance(pdu.get("redacts", ""), str):
        raise bad_json("redacts is not a string")
    if version.strict_json:
        check_canonical({key: value for key, value in pdu.items() if key != "unsigned"})


def check_hashes(hashes: object) -> None:
    """An event carries a SHA-256 of its content; content_hash_ok says whether it is right."""
    if not isinstance(hashes, dict) or not isinstance(hashes.get("sha256"), str):
        raise bad_json("hashes.sha256 is not a string")


def check_signatures(signatures: object) -> None:
    """Signatures are objects of strings by server; whether they are right is checked elsewhere."""
    if not isinstance(signatures, dict):
        raise bad_json("signatures is not an object")
    for by_key in signatures.values():
        if not isinstance(by_key, dict) or not all(isinstance(s, str) for s in by_key.values()):
            raise bad_json("signatures has an entry of the wrong shape")


def check_format(version: RoomVersion, pdu: Any) -> None:
    """Refuse what is no event of this room version: 400 M_BAD_JSON, or 413 M_TOO_LARGE.

    Spec: SS-API "Checks performed on receipt of a PDU", check 1.
    Trap: `unsigned` is whatever the sender likes; nothing may be concluded from it.
    """
    if not isinstance(pdu, dict):
        raise bad_json("An event is an object")
    check_fields(version, pdu)
    check_hashes(pdu.get("hashes"))
    check_signatures(pdu.get("signatures"))
    if len(canonical_json(pdu)) > MAX_EVENT_BYTES:
        raise too_large("The event is larger than 65536 bytes")


# ── 6.3  Redaction ───────────────────────────────────────────────────────────

NOTHING_KEPT: Final[frozenset[str]] = frozenset()


def redact_content(version: RoomVersion, event_type: object, content: object) -> Json:
    """What a redaction leaves of an event's content."""
    if not content or not isinstance(content, dict) or not isinstance(event_type, str):
        return {}
    if event_type == CREATE and version.redaction_keeps_create:
        return content
    kept = version.redacted_content.get(event_type, NOTHING_KEPT)
    redacted = {key: content[key] for key in kept if key in content}
    if event_type == MEMBER and version.redaction_keeps_signed_invite:
        invite = content.get("third_party_invite")
        if isinstance(invite, dict) and "signed" in invite:
            redacted["third_party_invite"] = {"signed": invite["signed"]}
    return redacted


def redact(version: RoomVersion, pdu: Json) -> Json:
    """What a redaction leaves of the event; also the part that the signature covers.

    Spec: rooms/* "Redactions". `unsigned` goes with the rest.
    """
    kept = version.redacted_keys
    redacted = {key: value for key, value in pdu.items() if key in kept}
    redacted["content"] = redact_content(version, pdu.get("type"), pdu.get("content"))
    return redacted


# ── 6.4  Hashes, ids and signatures ──────────────────────────────────────────

NOT_HASHED = frozenset({"signatures", "unsigned", "hashes"})


def content_hash(pdu: Json) -> str:
    """The hash over all that the sender wrote.  Spec: SS-API "Calculating the content hash"."""
    return sha256_base64(canonical_json({k: pdu[k] for k in pdu if k not in NOT_HASHED}))


def content_hash_ok(pdu: Json) -> bool:
    """Whether the content is what was signed; if not, only redact() of the event counts."""
    hashes = pdu.get("hashes")
    try:
        claimed = b64decode(hashes.get("sha256") if isinstance(hashes, dict) else None)
        return hmac.compare_digest(claimed, b64decode(content_hash(pdu)))
    except MatrixError:
        return False


def reference_bytes(version: RoomVersion, pdu: Json) -> bytes:
    """What the signatures and the reference hash cover: the redacted event without signatures."""
    redacted = redact(version, pdu)
    redacted.pop("signatures", None)
    return canonical_json(redacted)


def event_id_from(version: RoomVersion, covered: bytes) -> str:
    """The id of an event from version 3 on: the hash of its reference bytes.

    Spec: rooms/v3 and rooms/v4 "Event IDs"; the two differ in the alphabet.
    """
    digest = hashlib.sha256(covered).digest()
    return "$" + (b64url_encode(digest) if version.url_safe_event_ids else b64encode(digest))


def make_event(version: RoomVersion, pdu: Json, event_id: str | None = None) -> Event:
    """The event of a PDU that check_format has passed; whoever knows its id saves computing it."""
    if event_id is None and version.explicit_event_ids:
        event_id = pdu["event_id"]
    return Event(version, pdu, event_id or event_id_from(version, reference_bytes(version, pdu)))


def event_reference(event: Event) -> Any:
    """How another event of the room names this one in its prev_events and auth_events."""
    if not event.version.explicit_event_ids:
        return event.event_id
    digest = hashlib.sha256(reference_bytes(event.version, event.pdu)).digest()
    return [event.event_id, {"sha256": b64encode(digest)}]


def required_signers(event: Event) -> set[str]:
    """The servers whose signature the event must carry.

    Spec: SS-API "Validating hashes and signatures"; rooms/v8 rule 4.2.
    Trap: an invite that stems from a third-party invite may come from any server.
    """
    is_member = event.type == MEMBER and event.state_key is not None
    by_third_party = event.membership == "invite" and "third_party_invite" in event.content
    signers = set() if by_third_party else {server_of(event.sender)}
    if event.version.explicit_event_ids:
        signers.add(server_of(event.event_id))
    voucher = event.content.get("join_authorised_via_users_server")
    if is_member and event.version.restricted and voucher is not None:
        signers.add(server_of(voucher) if isinstance(voucher, str) else "")
    return signers


FindKey = Callable[[str, str], str | None]  # (server, key id) → public key that counts, or None


def verify_event_signatures(event: Event, find_key: FindKey) -> None:
    """403 M_FORBIDDEN unless each required server has signed, rightly, with a key that counts.

    Spec: SS-API "Validating hashes and signatures": unknown and expired keys are skipped, all
    others must verify, and at least one must be left.
    """
    covered = reference_bytes(event.version, event.pdu)
    for server in required_signers(event):
        found = False
        for key_id, signature in signatures_by(event.pdu, server).items():
            public = find_key(server, key_id) if key_id.startswith("ed25519:") else None
            if public is None:
                continue
            if not verify_signature(public, signature, covered):
                raise forbidden(f"The signature of {server} with {key_id} is wrong")
            found = True
        if not found:
            raise forbidden(f"The event is not signed by {server} with a known key")


# ── 6.5  Making an event ─────────────────────────────────────────────────────

SIGNATURE_MEMBERS = len(b',"hashes":,"signatures":')  # bytes around the two members added last


def finish_event(version: RoomVersion, fields: Json, signer: str, key: SigningKey) -> Event:
    """Turn the fields of an event of ours into the event: check, hash, sign, and give it its id.

    `fields` has type, sender, content, depth, origin_server_ts, room_id, prev_events and
    auth_events (see event_reference), perhaps state_key and redacts. The bytes that are signed are
    those of the reference hash, so they are encoded once.
    """
    pdu = dict(fields)
    if version.explicit_event_ids:
        pdu.setdefault("event_id", f"${random_token(24)}:{signer}")
    check_fields(version, pdu)
    encoded = canonical_json(pdu)
    pdu["hashes"] = {"sha256": sha256_base64(encoded)}
    covered = reference_bytes(version, pdu)
    pdu["signatures"] = {signer: {key.key_id: key.sign(covered)}}
    added = len(_encode(pdu["hashes"])) + len(_encode(pdu["signatures"])) + SIGNATURE_MEMBERS
    if len(encoded) + added > MAX_EVENT_BYTES:
        raise too_large("The event is larger than 65536 bytes")
    event_id = pdu["event_id"] if version.explicit_event_ids else event_id_from(version, covered)
    return Event(version, pdu, event_id)


# ═════════════════════════════════════════════════════════════════════════════
#  7. AUTHORIZATION RULES
#
#  Whether an event may be in the room, given the state it is judged by. Each
#  rule is a small function and says nothing when it has no objection; they
#  stand in the order of the specification and bear its numbers of room version
#  12. Older versions number some rules differently.
#                                     spec: rooms/v12 (and v1 to v11) "Authorisation rules"
# ═════════════════════════════════════════════════════════════════════════════

# ── 7.1  Verdicts ────────────────────────────────────────────────────────────

AuthState = Mapping[StateKey, Event]


class AuthError(MatrixError):
    """403 M_FORBIDDEN: a rule refuses the event."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(403, "M_FORBIDDEN", f"{reason} (authorization rule {rule})")
        self.rule = rule  #: its number in room version 12, or "v1 ..." for rules that are gone


# ── 7.2  Power levels ────────────────────────────────────────────────────────

INFINITE_LEVEL: Final = 2**53  # of creators from version 12; events hold less
CREATOR_LEVEL: Final = 100  # of the creator in older versions, as long as no event says otherwise
LEVEL_DEFAULTS: Final[Mapping[str, int]] = {
    "users_default": 0,
    "events_default": 0,
    "state_default": 50,
    "ban": 50,
    "redact": 50,
    "kick": 50,
    "invite": 0,
}
NOTIFICATION_DEFAULT: Final = 50  # level for "@room" and its like
LEVEL_TEXT = re.compile(r"[ \t\n\r\f\v]*([+-]?)([0-9]+)[ \t\n\r\f\v]*")
MAX_LEVEL_DIGITS: Final = 308  # what a double can hold, which is as far as other servers count


def level_of(version: RoomVersion, value: object) -> int | None:
    """The power level that a JSON value stands for, or None when it is none.

    Spec: rooms/v1 "accept values as strings", "as floats"; integers alone from version 10.
    Trap: true is an int in Python; int() takes "1_0" and Arabic digits; a float is truncated.
    """
    if type(value) is int:
        return value
    if version.integer_levels:
        return None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else None
    match = LEVEL_TEXT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    digits = match[2].lstrip("0") or "0"
    return int(match[1] + digits) if len(digits) <= MAX_LEVEL_DIGITS else None


def object_in(content: Json, name: str) -> Json:
    """A member that should be an object; an empty one when it is missing or something else."""
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def creator_of(version: RoomVersion, create: Event) -> object:
    """The creator of the room: `content.creator` until version 10, then the sender."""
    return create.content.get("creator") if version.creator_in_content else create.sender


def creators_of(version: RoomVersion, create: Event | None) -> Sequence[object]:
    """The sender of the create event and `additional_creators`; nobody before version 12."""
    if create is None or not version.privileged_creators:
        return ()
    more = create.content.get("additional_creators")
    return [create.sender, *more] if isinstance(more, list) else [create.sender]


class PowerLevels:
    """Who may do what in a room: m.room.power_levels read with the room version's eyes."""

    __slots__ = ("_content", "_creator", "_creators", "_events", "_users", "_version")

    def __init__(self, version: RoomVersion, create: Event | None, content: Json | None) -> None:
        self._version = version
        self._content: Json = content or {}
        self._users = object_in(self._content, "users")
        self._events = object_in(self._content, "events")
        #: who stands above all levels, from version 12
        self._creators = creators_of(version, create)
        #: whom the absence of the event gives level 100
        self._creator = creator_of(version, create) if content is None and create else None

    def _level(self, value: object, default: int) -> int:
        level = level_of(self._version, value)
        return default if level is None else level

    def user(self, user_id: str) -> int:
        """The power level of a user."""
        if user_id in self._creators:
            return INFINITE_LEVEL
        level = level_of(self._version, self._users.get(user_id))
        if level is not None:
            return level
        return CREATOR_LEVEL if user_id == self._creator else self.named("users_default")

    def event(self, event_type: str, is_state: bool) -> int:
        """The level required to send an event.  Spec: SS-API "Required Power Level"."""
        level = level_of(self._version, self._events.get(event_type))
        if level is not None:
            return level
        return self.named("state_default" if is_state else "events_default")

    def named(self, name: str) -> int:
        """One of the levels in LEVEL_DEFAULTS."""
        return self._level(self._content.get(name), LEVEL_DEFAULTS[name])

    def notification(self, name: str) -> int:
        """The level required to notify by a keyword such as "room"."""
        levels = object_in(self._content, "notifications")
        return self._level(levels.get(name), NOTIFICATION_DEFAULT)

    @property
    def invite(self) -> int:
        """The level required to invite."""
        return self.named("invite")

    @property
    def kick(self) -> int:
        """The level required to kick."""
        return self.named("kick")

    @property
    def ban(self) -> int:
        """The level required to ban and unban."""
        return self.named("ban")

    @property
    def redact(self) -> int:
        """The level required to redact what others wrote."""
        return self.named("redact")


def power_levels_of(version: RoomVersion, auth_state: AuthState) -> PowerLevels:
    """The power levels in a room state."""
    event = auth_state.get(POWER_LEVELS_KEY)
    content = None if event is None else event.content
    return PowerLevels(version, auth_state.get(CREATE_KEY), content)


# ── 7.3  Which events authorise ──────────────────────────────────────────────

JOIN_RULE_MATTERS = ("join", "invite", "knock")


def member_auth_types(version: RoomVersion, target: str, content: Json) -> list[StateKey]:
    """What a member event is judged by beyond the rest."""
    membership = content.get("membership")
    keys = [(MEMBER, target)]
    if membership in JOIN_RULE_MATTERS:
        keys.append(JOIN_RULES_KEY)
    if membership == "invite":
        token = object_in(object_in(content, "third_party_invite"), "signed").get("token")
        if isinstance(token, str):
            keys.append((THIRD_PARTY_INVITE, token))
    voucher = content.get("join_authorised_via_users_server")
    if version.restricted and membership == "join" and isinstance(voucher, str):
        keys.append((MEMBER, voucher))
    return keys


def auth_types_for_event(
    version: RoomVersion, event_type: str, sender: str, state_key: str | None, content: Json
) -> list[StateKey]:
    """The pieces of state by which an event is judged, hence those to name in its auth_events.

    Spec: SS-API "Auth events selection". Version 12 leaves out the create event, which the room id
    already names.
    """
    if event_type == CREATE:
        return []
    keys = [POWER_LEVELS_KEY, (MEMBER, sender)]
    if not version.room_id_is_hash:
        keys.append(CREATE_KEY)
    if event_type != MEMBER or state_key is None:
        return keys
    return list(dict.fromkeys(keys + member_auth_types(version, state_key, content)))


def auth_types_of(event: Event) -> list[StateKey]:
    """auth_types_for_event of an event that exists."""
    return auth_types_for_event(
        event.version, event.type, event.sender, event.state_key, event.content
    )


# ── 7.4  The case before the court ───────────────────────────────────────────


class AuthCase:
    """An event, the state it is judged by, and what several rules ask of them."""

    __slots__ = ("_levels", "create", "event", "state", "version")

    def __init__(self, version: RoomVersion, event: Event, state: AuthState) -> None:
        self.version = version
        self.event = event
        self.state = state
        self._levels: PowerLevels | None = None
        create = state.get(CREATE_KEY)
        if create is None:
            raise AuthError("3.4", "There is no m.room.create event")
        self.create = create

    @property
    def levels(self) -> PowerLevels:
        """The power levels of the room."""
        if self._levels is None:
            self._levels = power_levels_of(self.version, self.state)
        return self._levels

    @property
    def sender_level(self) -> int:
        """The sender's power level."""
        return self.levels.user(self.event.sender)

    @property
    def target(self) -> str:
        """The user whom a member event is about; rule 5.1 has seen to it that there is one."""
        return cast(str, self.event.state_key)

    @property
    def join_rule(self) -> object:
        """The join rule of the room; "invite" when no event says otherwise."""
        event = self.state.get(JOIN_RULES_KEY)
        return "invite" if event is None else event.content.get("join_rule", "invite")

    def membership(self, user_id: str) -> str | None:
        """The current membership of a user, None when they never had any."""
        event = self.state.get((MEMBER, user_id))
        return None if event is None else event.membership

    def is_own(self) -> bool:
        """Whether a member event's sender is its target."""
        return self.event.sender == self.event.state_key


# ── 7.5  Rules 1 to 4: the room ──────────────────────────────────────────────


def check_create_has_no_room_id(event: Event) -> None:
    """Rule 1.2: the hash of the create event is the room id, so it cannot contain it."""
    if "room_id" in event.pdu:
        raise AuthError("1.2", "A create event has no room_id")


def check_additional_creators(content: Json) -> None:
    """Rule 1.4: further creators are a list of user ids."""
    creators = content.get("additional_creators", [])
    if not isinstance(creators, list) or not all(is_sender_id(user) for user in creators):
        raise AuthError("1.4", "additional_creators is not a list of user ids")


def check_create(version: RoomVersion, event: Event) -> None:
    """Rule 1: the event that makes a room."""
    if event.prev_events:
        raise AuthError("1.1", "A create event has no previous events")
    if version.room_id_is_hash:
        check_create_has_no_room_id(event)
    elif server_of(event.room_id) != server_of(event.sender):
        raise AuthError("v1 1.2", "The room id is of another server than the sender")
    named = event.content.get("room_version", "1")
    if not isinstance(named, str) or named not in ROOM_VERSIONS:
        raise AuthError("1.3", "The room version is not known")
    if version.creator_in_content and "creator" not in event.content:
        raise AuthError("v1 1.4", "The create event names no creator")
    if version.privileged_creators:
        check_additional_creators(event.content)


def check_room_exists(case: AuthCase) -> None:
    """Rule 2: the room id names an accepted create event; before version 12 see rule 3.4."""
    if not case.version.room_id_is_hash:
        return
    if case.create.event_id[1:] != case.event.room_id[1:] or case.create.rejected:
        raise AuthError("2", "The room id does not name an accepted create event")


def check_auth_entry(event: Event, entry: Event, allowed: list[StateKey], state: AuthState) -> None:
    """Rules 3.1, 3.2, 3.3 and 3.5 for one entry of auth_events."""
    if entry.key in state:
        raise AuthError("3.1", f"auth_events has two entries for {entry.type}")
    if entry.key not in allowed:
        raise AuthError("3.2", f"auth_events has an entry {entry.type} that does not belong there")
    if entry.rejected:
        raise AuthError("3.3", f"The auth event {entry.event_id} was itself rejected")
    if entry.room_id != event.room_id:
        raise AuthError("3.5", f"The auth event {entry.event_id} is of another room")


def check_auth_events(
    event: Event, entries: Iterable[Event], create: Event | None = None
) -> dict[StateKey, Event]:
    """Rule 3: the event's auth_events are the right kind; returns the state that they make.

    `entries` are the events that its auth_events name; from version 12 `create` is the one that its
    room id names. The result is what check_auth wants for "based on the event's auth events".
    """
    if event.type == CREATE:
        return {}
    allowed = auth_types_of(event)
    state: dict[StateKey, Event] = {}
    for entry in entries:
        check_auth_entry(event, entry, allowed, state)
        state[entry.key] = entry
    if event.version.room_id_is_hash and create is not None:
        state[CREATE_KEY] = create
    if CREATE_KEY not in state:
        rule = "2" if event.version.room_id_is_hash else "v1 2.4"
        raise AuthError(rule, "There is no m.room.create event to stand on")
    return state


def check_federated(case: AuthCase) -> None:
    """Rule 4: a room that does not federate is for users of the creator's server."""
    closed = case.create.content.get("m.federate") is False
    if closed and server_of(case.create.sender) != server_of(case.event.sender):
        raise AuthError("4", "The room does not federate")


def check_aliases(case: AuthCase) -> None:
    """Rule 4 of versions 1 to 5: a server lists its own aliases and no others'."""
    if case.event.state_key is None:
        raise AuthError("v1 4.1", "m.room.aliases has no state_key")
    if case.event.state_key != server_of(case.event.sender):
        raise AuthError("v1 4.2", "m.room.aliases is of another server")


# ── 7.6  Rule 5: membership ──────────────────────────────────────────────────
#
#  new         who            the target is now        else required              rule
#  ──────────  ─────────────  ───────────────────────  ─────────────────────────  ────────
#  join        the creator    -                        only m.room.create before  5.3.1
#  join        oneself        not banned               join rule public           5.3.6
#  join        oneself        invite, join             join rule invite, knock    5.3.4
#  join        oneself        invite, join             join rule restricted       5.3.5.1
#  join        oneself        not banned               someone vouches for it     5.3.5.2
#  invite      joined         not join, not ban        invite level               5.4.4
#  invite      who asked      not ban                  signature of the token     5.4.1
#  leave       oneself        invite, join, knock      -                          5.5.1
#  leave       joined         ban                      ban level, kick level      5.5.3
#  leave       joined         anything else            kick level, above target   5.5.4
#  ban         joined         anything                 ban level, above target    5.6.2
#  knock       oneself        not ban, invite, join    join rule knock            5.7


def is_creator_joining(case: AuthCase) -> bool:
    """Rule 5.3.1: the first event after the create event lets the creator in."""
    return (
        case.event.prev_events == [case.create.event_id]
        and creator_of(case.version, case.create) == case.event.state_key
    )


def known_join_rules(version: RoomVersion) -> tuple[str, ...]:
    """The join rules that let the invited in: rules 5.3.4 and 5.3.5."""
    if version.knock_restricted:
        return ("invite", "knock", "restricted", "knock_restricted")
    if version.restricted:
        return ("invite", "knock", "restricted")
    return ("invite", "knock") if version.knock else ("invite",)


def check_voucher(case: AuthCase) -> None:
    """Rule 5.3.5.2: a member who may invite stands for a restricted join."""
    voucher = case.event.content.get("join_authorised_via_users_server")
    if not isinstance(voucher, str) or case.membership(voucher) != "join":
        raise AuthError("5.3.5.2", "No member of the room vouches for the join")
    if case.levels.user(voucher) < case.levels.invite:
        raise AuthError("5.3.5.2", "Who vouches for the join may not invite")


def check_join(case: AuthCase) -> None:
    """Rules 5.3.1 to 5.3.7: joining is for oneself, and as the join rule says."""
    if is_creator_joining(case):
        return
    if not case.is_own():
        raise AuthError("5.3.2", "Nobody can join for somebody else")
    current = case.membership(case.event.sender)
    if current == "ban":
        raise AuthError("5.3.3", "You are banned from the room")
    rule = case.join_rule
    if rule == "public":
        return
    if rule not in known_join_rules(case.version):
        raise AuthError("5.3.7", "The join rule lets nobody in")
    if current in ("invite", "join"):
        return
    if rule not in ("restricted", "knock_restricted"):
        raise AuthError("5.3.4", "You are not invited to the room")
    check_voucher(case)


MAX_INVITE_CHECKS = 256  # signatures times keys; one of each is usual, and each check costs 0.1 ms


def is_signed_by_any(signed: Json, keys: list[str]) -> bool:
    """Rule 5.4.1.7: whether any signature in `signed` was made by any of the keys."""
    raw = signed_bytes(signed)
    marks = [
        mark
        for by_key in object_in(signed, "signatures").values()
        if isinstance(by_key, dict)
        for key_id, mark in by_key.items()
        if key_id.startswith("ed25519:")
    ]
    pairs = [(key, mark) for mark in marks[:MAX_INVITE_CHECKS] for key in keys[:MAX_INVITE_CHECKS]]
    return any(verify_signature(key, mark, raw) for key, mark in pairs[:MAX_INVITE_CHECKS])


def invite_entries(invite: Event) -> list[Json]:
    """The objects of an m.room.third_party_invite event that may hold a key, in either place."""
    more = invite.content.get("public_keys")
    entries = [invite.content, *(more if isinstance(more, list) else [])]
    return [entry for entry in entries if isinstance(entry, dict)]


def invite_keys(invite: Event) -> list[str]:
    """The public keys that an m.room.third_party_invite event lists."""
    keys = [entry.get("public_key") for entry in invite_entries(invite)]
    return [key for key in keys if isinstance(key, str)]


def check_third_party_invite(case: AuthCase) -> None:
    """Rule 5.4.1: an invite of an e-mail address has found its user, and can prove it."""
    if case.membership(case.target) == "ban":
        raise AuthError("5.4.1.1", "The user is banned")
    signed = object_in(case.event.content, "third_party_invite").get("signed")
    if not isinstance(signed, dict):
        raise AuthError("5.4.1.2", "third_party_invite has no signed object")
    if "mxid" not in signed or "token" not in signed:
        raise AuthError("5.4.1.3", "third_party_invite.signed lacks mxid or token")
    if signed["mxid"] != case.event.state_key:
        raise AuthError("5.4.1.4", "third_party_invite is for another user")
    token = signed["token"]
    invite = case.state.get((THIRD_PARTY_INVITE, token)) if isinstance(token, str) else None
    if invite is None:
        raise AuthError("5.4.1.5", "There is no third-party invite with this token")
    if invite.sender != case.event.sender:
        raise AuthError("5.4.1.6", "The third-party invite is somebody else's")
    if not is_signed_by_any(signed, invite_keys(invite)):
        raise AuthError("5.4.1.8", "No key of the third-party invite has signed this")


def check_invite(case: AuthCase) -> None:
    """Rule 5.4: a member with the invite level may invite who is neither joined nor banned."""
    if "third_party_invite" in case.event.content:
        check_third_party_invite(case)
        return
    if case.membership(case.event.sender) != "join":
        raise AuthError("5.4.2", "You are not in the room")
    current = case.membership(case.target)
    if current in ("join", "ban"):
        raise AuthError("5.4.3", "The user is banned or in the room already")
    if case.sender_level < case.levels.invite:
        raise AuthError("5.4.5", "Your power level is too low to invite")


def check_own_leave(case: AuthCase) -> None:
    """Rule 5.5.1: only who is in, invited or (since version 7) knocking can leave."""
    current = case.membership(case.event.sender)
    if current not in ("invite", "join") and not (current == "knock" and case.version.knock):
        raise AuthError("5.5.1", "You are not in the room")


def check_leave(case: AuthCase) -> None:
    """Rule 5.5: leaving, turning an invite down, kicking and unbanning."""
    if case.is_own():
        check_own_leave(case)
        return
    if case.membership(case.event.sender) != "join":
        raise AuthError("5.5.2", "You are not in the room")
    level = case.sender_level
    if case.membership(case.target) == "ban" and level < case.levels.ban:
        raise AuthError("5.5.3", "Your power level is too low to unban")
    if level < case.levels.kick or case.levels.user(case.target) >= level:
        raise AuthError("5.5.5", "Your power level is too low to remove this user")


def check_ban(case: AuthCase) -> None:
    """Rule 5.6: banning takes the ban level, and standing above the target."""
    if case.membership(case.event.sender) != "join":
        raise AuthError("5.6.1", "You are not in the room")
    level = case.sender_level
    if level < case.levels.ban or case.levels.user(case.target) >= level:
        raise AuthError("5.6.3", "Your power level is too low to ban this user")


def check_knock(case: AuthCase) -> None:
    """Rule 5.7: asking to be let in, where the join rule has a door to knock on."""
    doors = ("knock", "knock_restricted") if case.version.knock_restricted else ("knock",)
    if case.join_rule not in doors:
        raise AuthError("5.7.1", "The room cannot be knocked on")
    if not case.is_own():
        raise AuthError("5.7.2", "Nobody can knock for somebody else")
    if case.membership(case.event.sender) in ("ban", "invite", "join"):
        raise AuthError("5.7.4", "You are banned, invited or in the room already")


MEMBERSHIP_RULES: Final[Mapping[str, Callable[[AuthCase], None]]] = {
    "join": check_join,
    "invite": check_invite,
    "leave": check_leave,
    "ban": check_ban,
    "knock": check_knock,
}


def check_member(case: AuthCase) -> None:
    """Rule 5: each membership has its own.

    Trap: rule 5.1 asks for a state_key; that it must be a user id goes without saying, and other
    servers refuse the event if it is none.
    """
    membership = case.event.content.get("membership")
    if not is_sender_id(case.event.state_key) or not isinstance(membership, str):
        raise AuthError("5.1", "A member event has a user as its state_key, and a membership")
    check = MEMBERSHIP_RULES.get(membership)
    if check is None or (membership == "knock" and not case.version.knock):
        raise AuthError("5.8", f"The membership {membership[:40]!r} is not known")
    check(case)


# ── 7.7  Rules 6 to 9: everything else ───────────────────────────────────────


def check_sender_joined(case: AuthCase) -> None:
    """Rule 6: only members speak."""
    if case.membership(case.event.sender) != "join":
        raise AuthError("6", "You are not in the room")


def check_third_party_sender(case: AuthCase) -> None:
    """Rule 7: inviting an e-mail address takes the invite level, and nothing else."""
    if case.sender_level < case.levels.invite:
        raise AuthError("7.1", "Your power level is too low to invite")


def check_required_level(case: AuthCase) -> None:
    """Rule 8: each event type has its required power level."""
    if case.levels.event(case.event.type, case.event.is_state) > case.sender_level:
        raise AuthError("8", f"Your power level is too low to send {case.event.type}")


def check_user_state_key(case: AuthCase) -> None:
    """Rule 9: state that bears a user's id belongs to that user."""
    state_key = case.event.state_key
    if state_key is not None and state_key.startswith("@") and state_key != case.event.sender:
        raise AuthError("9", "This state belongs to another user")


# ── 7.8  Rule 10: power levels ───────────────────────────────────────────────


def is_level_table(version: RoomVersion, table: object) -> bool:
    """Whether this is an object whose values are levels."""
    if not isinstance(table, dict):
        return False
    return all(level_of(version, value) is not None for value in table.values())


def check_level_types(version: RoomVersion, content: Json) -> None:
    """Rules 10.1 and 10.2: levels are integers, or before version 10 what can pass for one.

    Trap: before version 10 the specification demands this of `users` only. Other servers cannot
    read the event all the same, and drop it, so it is refused here too.
    """
    for name in LEVEL_DEFAULTS:
        if name in content and level_of(version, content[name]) is None:
            raise AuthError("10.1", f"The level {name} is not an integer")
    tables = ("events", "notifications") if version.notification_levels else ("events",)
    for table in tables:
        if table in content and not is_level_table(version, content[table]):
            raise AuthError("10.2", f"{table} is not an object of integers")


def check_users_named(case: AuthCase) -> None:
    """Rules 10.3 and 10.4: `users` has levels of users, and none of a creator from version 12."""
    users = case.event.content.get("users", {})
    if not is_level_table(case.version, users) or not all(is_sender_id(user) for user in users):
        raise AuthError("10.3", "users is not an object of integers by user id")
    if any(creator in users for creator in creators_of(case.version, case.create)):
        raise AuthError("10.4", "The power of creators is beyond levels and cannot be set")


Change = tuple[int | None, int | None]  # the level before and after; None where there is none


def changes(version: RoomVersion, old: Json, new: Json, names: Iterable[str]) -> dict[str, Change]:
    """The named levels that differ between two objects; "50" and 50 do not."""
    found = {}
    for name in names:
        before, after = level_of(version, old.get(name)), level_of(version, new.get(name))
        if before != after:
            found[name] = (before, after)
    return found


def check_level_changes(case: AuthCase, rule: str, found: dict[str, Change]) -> None:
    """Rules 10.6, 10.7 and 10.8: neither the old nor the new level is above the sender's own."""
    own = case.sender_level
    for name, (before, after) in found.items():
        if (before is not None and before > own) or (after is not None and after > own):
            raise AuthError(rule, f"Your power level is too low to change the level of {name[:80]}")


def check_user_changes(case: AuthCase, old: Json, new: Json) -> None:
    """Rules 10.9 and 10.10: others are changed from below one's level, and to no more than it."""
    own = case.sender_level
    found = changes(case.version, old, new, {**old, **new})
    for user, (before, after) in found.items():
        if before is not None and before >= own and user != case.event.sender:
            raise AuthError("10.9", f"Your power level is too low to change that of {user[:255]}")
        if after is not None and after > own:
            raise AuthError("10.10", "You cannot give more power than you have")


def check_power_levels(case: AuthCase) -> None:
    """Rule 10: nobody gives or takes more power than they have."""
    check_level_types(case.version, case.event.content)
    check_users_named(case)
    current = case.state.get(POWER_LEVELS_KEY)
    if current is None:
        return  # rule 10.5
    old, new = current.content, case.event.content
    check_level_changes(case, "10.6", changes(case.version, old, new, LEVEL_DEFAULTS))
    tables = ("events", "notifications") if case.version.notification_levels else ("events",)
    for table in tables:
        pair = object_in(old, table), object_in(new, table)
        check_level_changes(case, "10.7", changes(case.version, *pair, {**pair[0], **pair[1]}))
    check_user_changes(case, object_in(old, "users"), object_in(new, "users"))


# ── 7.9  Rule 11 of versions 1 and 2: redactions ─────────────────────────────


def check_redaction(case: AuthCase) -> None:
    """Rule 11 of versions 1 and 2: the redact level, or an event of the same server.

    Later versions accept every redaction and decide when both events are there: may_redact.
    """
    if case.sender_level >= case.levels.redact:
        return
    target = case.event.redacts
    if target is None or server_of(target) != server_of(case.event.event_id):
        raise AuthError("v1 11.3", "Your power level is too low to redact this event")


def may_redact(redaction: Event, target: Event, levels: PowerLevels) -> bool:
    """Whether an accepted redaction takes effect on its target, by the levels at the redaction.

    Spec: rooms/v3 "Handling redactions". Trap: a target in another room is none.
    """
    if redaction.room_id != target.room_id or redaction.redacts != target.event_id:
        return False
    if redaction.version.redaction_rule:
        return True
    if levels.user(redaction.sender) >= levels.redact:
        return True
    return server_of(redaction.sender) == server_of(target.sender)


# ── 7.10  All rules ──────────────────────────────────────────────────────────


def check_other(case: AuthCase) -> None:
    """Rules 6 to 11, for whatever is neither a membership nor the beginning of the room."""
    check_sender_joined(case)
    if case.event.type == THIRD_PARTY_INVITE:
        check_third_party_sender(case)
        return
    check_required_level(case)
    check_user_state_key(case)
    if case.event.type == POWER_LEVELS:
        check_power_levels(case)
    elif case.event.type == REDACTION and case.version.redaction_rule:
        check_redaction(case)


def check_auth(version: RoomVersion, event: Event, auth_state: AuthState) -> None:
    """Judge the event by a room state: AuthError when a rule refuses it.

    The state holds at least the events that auth_types_for_event names, as far as they exist, and
    in all versions the create event. What concerns the event's own list of auth_events is rule 3
    (check_auth_events); signatures, rule 5.2 among them, are verify_event_signatures' business.
    """
    if event.type == CREATE:
        check_create(version, event)
        return
    case = AuthCase(version, event, auth_state)
    check_room_exists(case)
    check_federated(case)
    if event.type == ALIASES and version.aliases_rule:
        check_aliases(case)
    elif event.type == MEMBER:
        check_member(case)
    else:
        check_other(case)


# ═════════════════════════════════════════════════════════════════════════════
#  8. STATE RESOLUTION
#
#  Where the event graph forks, the branches may hold different states. This
#  chapter decides, the same way on every server, which events make the state
#  where they meet again: in three versions, as the algorithm was mended twice.
#                           spec: rooms/v1, rooms/v2, rooms/v12 "State resolution"
# ═════════════════════════════════════════════════════════════════════════════

# ── 8.1  Version 1 ───────────────────────────────────────────────────────────

StateIds = Mapping[StateKey, str]  # a room state: the event id for each (type, state key)
Lookup = Callable[[str], Event | None]  # the event of an id, None when it is not known


def is_allowed(version: RoomVersion, event: Event, state: AuthState) -> bool:
    """Whether the authorization rules let the event pass."""
    try:
        check_auth(version, event, state)
    except AuthError:
        return False
    return True


def state_for_auth(event: Event, resolved: StateIds, lookup: Lookup) -> dict[StateKey, Event]:
    """The part of a state that an event is judged by."""
    keys = [CREATE_KEY, *auth_types_of(event)]
    found = {key: lookup(resolved[key]) for key in keys if key in resolved}
    return {key: known for key, known in found.items() if known is not None}


def depth_order(event: Event) -> tuple[int, str]:
    """Deepest first; among equals by the SHA-1 of the id, which here is no matter of security."""
    digest = hashlib.sha1(event.event_id.encode("utf-8"), usedforsecurity=False).hexdigest()
    return -event.depth, digest


def separate_v1(
    state_sets: Sequence[StateIds], lookup: Lookup
) -> tuple[dict[StateKey, str], dict[StateKey, list[Event]]]:
    """The state without conflicts, and the known events of each conflict, deepest first."""
    candidates: dict[StateKey, set[str]] = {}
    for state in state_sets:
        for key, event_id in state.items():
            candidates.setdefault(key, set()).add(event_id)
    agreed: dict[StateKey, str] = {}
    conflicted: dict[StateKey, list[Event]] = {}
    for key, event_ids in candidates.items():
        if len(event_ids) == 1:
            agreed[key] = min(event_ids)
            continue
        events = [event for event_id in event_ids if (event := lookup(event_id)) is not None]
        if len(events) == 1:
            agreed[key] = events[0].event_id
        elif events:
            conflicted[key] = sorted(events, key=depth_order)
    return agreed, conflicted


def last_in_succession(
    version: RoomVersion, events: list[Event], resolved: StateIds, lookup: Lookup
) -> str:
    """From the shallowest event on, each may replace the one before, until one must not."""
    *later, winner = events
    for event in reversed(later):
        state = state_for_auth(event, resolved, lookup)
        state[winner.key] = winner
        if not is_allowed(version, event, state):
            break
        winner = event
    return winner.event_id


def deepest_allowed(
    version: RoomVersion, events: list[Event], resolved: StateIds, lookup: Lookup
) -> str:
    """The deepest event that is allowed; when none is, the shallowest (the spec is silent)."""
    for event in events:
        if is_allowed(version, event, state_for_auth(event, resolved, lookup)):
            return event.event_id
    return events[-1].event_id


def resolve_v1(
    version: RoomVersion, state_sets: Sequence[StateIds], lookup: Lookup
) -> dict[StateKey, str]:
    """The algorithm of room version 1: power levels, join rules, members, then the rest, by depth.

    Spec: rooms/v1 "State resolution". Trap: here a piece of state that some states lack is no
    conflict. Conflicts of one kind (say, of several members) do not see each other's outcome.
    """
    resolved, conflicted = separate_v1(state_sets, lookup)
    for kind in (POWER_LEVELS, JOIN_RULES, MEMBER):
        keys = [key for key in conflicted if key[0] == kind]
        outcome = {
            key: last_in_succession(version, conflicted.pop(key), resolved, lookup) for key in keys
        }
        resolved.update(outcome)
    outcome = {
        key: deepest_allowed(version, events, resolved, lookup)
        for key, events in conflicted.items()
    }
    return {**resolved, **outcome}


# ── 8.2  Auth chains ─────────────────────────────────────────────────────────


class AuthGraph:
    """The graph of auth events, with the two questions that state resolution asks of it.

    Both turn on the height of an event: one more than that of its highest auth event. Heights fall
    along every edge, so a search from the top may stop as soon as nothing below it is in doubt.
    This class computes them by walking the whole chain. Who keeps them (they never change, and
    unlike `depth` no other server can lie about them) overrides `height` and `parents`.
    """

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._heights: dict[str, int] = {}

    def parents(self, event_id: str) -> Iterable[str]:
        """The ids of an event's auth events; none for an event that is not known."""
        event = self._lookup(event_id)
        return () if event is None else event.auth_events

    def height(self, event_id: str) -> int:
        """The length of the longest way down from an event; found without recursion."""
        heights, open_events, stack = self._heights, set[str](), [event_id]
        while stack:
            top = stack[-1]
            below = () if top in heights else self.parents(top)
            unknown = [e for e in below if e not in heights and e not in open_events]
            if unknown:
                open_events.add(top)  # a cycle, which only versions 1 and 2 can spell, ends here
                stack += unknown
                continue
            if top not in heights:
                heights[top] = 1 + max((heights.get(e, 0) for e in below), default=0)
            stack.pop()
        return heights[event_id]

    def difference(self, state_sets: Sequence[set[str]]) -> set[str]:
        """The auth difference: events in the full auth chain of some sets but not of all.

        Each event carries a bit for every set that it is reached from, and hands them down. Spec:
        rooms/v2 "Auth difference". Trap: like everywhere, a set's chain includes its own events.
        """
        everywhere = (1 << len(state_sets)) - 1
        reached: dict[str, int] = {}
        for number, state in enumerate(state_sets):
            for event_id in state:
                reached[event_id] = reached.get(event_id, 0) | 1 << number
        doubtful = sum(bits != everywhere for bits in reached.values())
        heap = [(-self.height(event_id), event_id) for event_id in reached] if doubtful else []
        heapq.heapify(heap)
        found = set()
        while doubtful > 0 and heap:
            event_id = heapq.heappop(heap)[1]
            bits = reached[event_id]
            if bits != everywhere:
                found.add(event_id)
                doubtful -= 1
            for parent in self.parents(event_id):
                before = reached.get(parent, 0)
                reached[parent] = before | bits
                if not before:
                    heapq.heappush(heap, (-self.height(parent), parent))
                doubtful += (reached[parent] != everywhere) - (0 < before < everywhere)
        return found

    def subgraph(self, conflicted: set[str]) -> set[str]:
        """The conflicted state subgraph: all events on auth paths between conflicted events.

        Spec: rooms/v12 "Conflicted state subgraph".
        """
        floor = min(map(self.height, conflicted), default=0)
        below, stack = set(conflicted), list(conflicted)
        while stack:
            for parent in self.parents(stack.pop()):
                if parent not in below and self.height(parent) >= floor:
                    below.add(parent)
                    stack.append(parent)
        between = set(conflicted)
        for event_id in sorted(below, key=self.height):
            if not between.isdisjoint(self.parents(event_id)):
                between.add(event_id)
        return between


# ── 8.3  Iterative auth checks ───────────────────────────────────────────────


class Replay:
    """A room state that grows as events are applied to it: the iterative auth checks."""

    def __init__(self, version: RoomVersion, start: StateIds, lookup: Lookup) -> None:
        self.version = version
        self.start = start
        self.lookup = lookup
        self.applied: dict[StateKey, str] = {}
        self._levels: dict[tuple[str, str], PowerLevels] = {}

    def event(self, key: StateKey) -> Event | None:
        """The event that the state has at a key now."""
        event_id = self.applied.get(key) or self.start.get(key)
        return None if event_id is None else self.lookup(event_id)

    def apply(self, event: Event) -> None:
        """Let the event into the state if the rules allow it; otherwise ignore it.

        Spec: rooms/v2 "Iterative auth checks". What the state lacks comes from the event's own
        auth_events, unless rejected.
        """
        state = self.own_auth_state(event)
        for key in auth_types_of(event):
            current = self.event(key)
            if current is not None:
                state[key] = current
        if is_allowed(self.version, event, state):
            self.applied[event.key] = event.event_id

    def own_auth_state(self, event: Event) -> dict[StateKey, Event]:
        """The state that the event's auth_events make, and from version 12 the room id."""
        found = [self.lookup(event_id) for event_id in event.auth_events]
        if self.version.room_id_is_hash:
            found.append(self.lookup("$" + event.room_id[1:]))
        return {entry.key: entry for entry in found if entry is not None and not entry.rejected}

    def sender_level(self, event: Event) -> int:
        """The power level of the event's sender by the event's own auth_events."""
        own = self.own_auth_state(event)
        create, levels = own.get(CREATE_KEY), own.get(POWER_LEVELS_KEY)
        cache_key = (create.event_id if create else "", levels.event_id if levels else "")
        if cache_key not in self._levels:
            self._levels[cache_key] = power_levels_of(self.version, own)
        return self._levels[cache_key].user(event.sender)

    def power_levels_before(self, event: Event) -> Event | None:
        """The power levels event among the event's auth_events."""
        for event_id in event.auth_events:
            entry = self.lookup(event_id)
            if entry is not None and entry.key == POWER_LEVELS_KEY:
                return entry
        return None


# ── 8.4  Reverse topological power ordering ──────────────────────────────────

POWER_KEYS = frozenset({POWER_LEVELS_KEY, JOIN_RULES_KEY, CREATE_KEY})


def is_power_event(event: Event) -> bool:
    """Whether the event might take away somebody's ability to do something.

    Spec: rooms/v2 "Power events". Trap: only with the empty state key; and the create event counts,
    as on all other servers.
    """
    if event.membership in ("leave", "ban"):
        return event.sender != event.state_key
    return event.key in POWER_KEYS


def power_events_with_chains(events: Mapping[str, Event]) -> dict[str, Event]:
    """Step 1: the power events, and what of their auth chains is in the full conflicted set.

    Trap: the chain is followed through that set only, as on all other servers.
    """
    found = {event_id: event for event_id, event in events.items() if is_power_event(event)}
    stack = list(found.values())
    while stack:
        for event_id in stack.pop().auth_events:
            if event_id in events and event_id not in found:
                found[event_id] = events[event_id]
                stack.append(events[event_id])
    return found


def power_order(events: Mapping[str, Event], replay: Replay) -> Iterator[Event]:
    """Auth events before what they authorise; else by power, then time, then id (Kahn's algorithm).

    Spec: rooms/v2 "Reverse topological power ordering".
    """
    waiting_for: dict[str, int] = {}  # event → how many of its auth events are still to come
    unblocks: dict[str, list[str]] = {}
    for event_id, event in events.items():
        needed = {entry for entry in event.auth_events if entry in events}
        waiting_for[event_id] = len(needed)
        for entry in needed:
            unblocks.setdefault(entry, []).append(event_id)
    rank = {
        event_id: (-replay.sender_level(event), event.origin_server_ts, event_id)
        for event_id, event in events.items()
    }
    ready = [rank[event_id] for event_id, count in waiting_for.items() if count == 0]
    heapq.heapify(ready)
    while ready:
        event_id = heapq.heappop(ready)[2]
        yield events[event_id]
        for later in unblocks.get(event_id, ()):
            waiting_for[later] -= 1
            if waiting_for[later] == 0:
                heapq.heappush(ready, rank[later])


# ── 8.5  Mainline ordering ───────────────────────────────────────────────────

BEYOND_MAINLINE: Final = 2**62  # the position of an event that stands on no mainline event


def mainline_positions(replay: Replay) -> dict[str, int]:
    """The position of each event of the mainline of the current power levels."""
    positions: dict[str, int] = {}
    event = replay.event(POWER_LEVELS_KEY)
    while event is not None and event.event_id not in positions:
        positions[event.event_id] = len(positions)
        event = replay.power_levels_before(event)
    return positions


def mainline_position(event: Event, positions: dict[str, int], replay: Replay) -> int:
    """The position of the nearest mainline event that an event stands on.

    What is found is noted for each event passed on the way: long side lines are walked once.
    """
    passed: set[str] = set()
    step: Event | None = event
    while step is not None and step.event_id not in positions and step.event_id not in passed:
        passed.add(step.event_id)
        step = replay.power_levels_before(step)
    found = BEYOND_MAINLINE if step is None else positions.get(step.event_id, BEYOND_MAINLINE)
    positions.update(dict.fromkeys(passed, found))
    return found


def mainline_order(events: list[Event], replay: Replay) -> list[Event]:
    """By how late in the line of power levels events an event stands, then time, then id.

    Spec: rooms/v2 "Mainline ordering". Positions count from the newest: a larger one comes first.
    """
    if not events:
        return []
    positions = mainline_positions(replay)
    depth = {event.event_id: mainline_position(event, positions, replay) for event in events}
    return sorted(
        events, key=lambda event: (-depth[event.event_id], event.origin_server_ts, event.event_id)
    )


# ── 8.6  Versions 2 and 2.1 ──────────────────────────────────────────────────


def separate_v2(state_sets: Sequence[StateIds]) -> tuple[dict[StateKey, str], set[str]]:
    """The unconflicted state map, and the conflicted state set.

    Trap: here a piece of state that some states lack is a conflict.
    """
    first, *others = state_sets
    agreed = {
        key: event_id
        for key, event_id in first.items()
        if all(state.get(key) == event_id for state in others)
    }
    conflicted = {
        event_id for state in state_sets for key, event_id in state.items() if key not in agreed
    }
    return agreed, conflicted


def resolve_v2(
    version: RoomVersion, state_sets: Sequence[StateIds], lookup: Lookup, graph: AuthGraph
) -> dict[StateKey, str]:
    """The algorithm of room versions 2 to 11, and with version 2.1 of room version 12.

    Spec: rooms/v2 and rooms/v12 "State resolution". 2.1 starts from the empty state instead of the
    unconflicted one, and also replays what lies between conflicted events.
    """
    agreed, conflicted = separate_v2(state_sets)
    if not conflicted:
        return agreed
    full = conflicted | graph.difference([set(state.values()) for state in state_sets])
    is_v2_1 = version.resolution == "v2.1"
    if is_v2_1:
        full |= graph.subgraph(conflicted)
    known = {event_id: lookup(event_id) for event_id in full}
    events = {key: event for key, event in known.items() if event is not None and event.is_state}
    replay = Replay(version, {} if is_v2_1 else agreed, lookup)
    first = power_events_with_chains(events)
    for event in power_order(first, replay):
        replay.apply(event)
    rest = [event for event in events.values() if event.event_id not in first]
    for event in mainline_order(rest, replay):
        replay.apply(event)
    return {**replay.applied, **agreed}


# ── 8.7  The resolution of a set of states ───────────────────────────────────


def resolve_state(
    version: RoomVersion,
    state_sets: Sequence[StateIds],
    lookup: Lookup,
    graph: AuthGraph | None = None,
) -> dict[StateKey, str]:
    """The one state that several states resolve to, whatever their order.

    `graph` may know shorter ways through the auth events than looking at every one of them.
    """
    if len(state_sets) < 2:
        return dict(state_sets[0]) if state_sets else {}
    if version.resolution == "v1":
        return resolve_v1(version, state_sets, lookup)
    return resolve_v2(version, state_sets, lookup, graph or AuthGraph(lookup))


# ═════════════════════════════════════════════════════════════════════════════
#  9. STATE GROUPS
#
#  The state of a room after each of its events, without a copy for each: a group
#  differs from an earlier group by a few pairs of integers, and any state of any
#  time is a few row reads.                            spec: SS-API "Room State"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE state_keys (
    state_nid INTEGER PRIMARY KEY,
    type TEXT NOT NULL,
    state_key TEXT NOT NULL,
    UNIQUE (type, state_key)
);
CREATE TABLE state_groups (
    state_group INTEGER PRIMARY KEY,
    room_nid INTEGER NOT NULL,
    height INTEGER NOT NULL,        -- steps since the empty state
    base INTEGER,                   -- the group that the delta starts from
    delta BLOB NOT NULL             -- sorted state nids, then their event nids, 8 bytes each
);
""")
invariant(
    "state groups on a base that is not there",
    """
    SELECT state_group
    FROM state_groups
    WHERE base NOT IN (SELECT state_group FROM state_groups)
    """,
)

MANY_LOOKUPS = 200  # from here on, reading two states as a whole is cheaper

# ── 9.1  Deltas ──────────────────────────────────────────────────────────────
#
# A group at height n stores its difference to the group at height n & (n - 1), that
# is n without its lowest set bit. So a group is read in at most log2(n) rows, and each
# change is written log2(n) / 2 times on average: no snapshot of 10,000 entries, ever.
#
#     height   1   2   3   4   5   6   7   8
#     base     0   0   2   0   4   4   6   0


class StateGroup(NamedTuple):
    """A row of state_groups; the delta is unpacked into keys and values, both sorted by key."""

    height: int
    base: int | None
    keys: array.array[int]
    values: array.array[int]


def pack_delta(delta: Mapping[StateNid, EventNid]) -> bytes:
    """Sorted keys and then their values, as little-endian 64-bit integers; value 0 is 'gone'."""
    keys = sorted(delta)
    packed = array.array("q", [*keys, *(delta[key] for key in keys)])
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_delta(raw: bytes) -> tuple[array.array[int], array.array[int]]:
    """Turn the bytes of pack_delta back into keys and values."""
    packed = array.array("q", raw)
    if sys.byteorder == "big":
        packed.byteswap()
    half = len(packed) // 2
    return packed[:half], packed[half:]


# ── 9.2  States ──────────────────────────────────────────────────────────────


class StateGroups:
    """Reads and makes state groups; a state is a dict from state nid to event nid."""

    def __init__(self, database: Database, stream: Stream, cache_bytes: int) -> None:
        self.database = database
        self.stream = stream
        self.cache: LruCache[int, StateGroup] = LruCache(cache_bytes)
        self.names: Interned[StateKey, StateNid] = Interned(
            database,
            find="SELECT state_nid FROM state_keys WHERE type = ? AND state_key = ?",
            add="INSERT INTO state_keys (type, state_key) VALUES (?, ?)",
            name="SELECT type, state_key FROM state_keys WHERE state_nid = ?",
        )
        database.on_reset(self.cache.clear)

    def row(self, group: int) -> StateGroup:
        """One row, from memory or from the database."""
        found = self.cache.get(group)
        if found is None:
            height, base, delta = self.database.one(
                "SELECT height, base, delta FROM state_groups WHERE state_group = ?", (group,)
            )
            found = StateGroup(height, base, *unpack_delta(delta))
            self.cache.put(group, found, 300 + len(delta))
        return found

    def chain(self, group: int | None) -> Iterator[tuple[int, StateGroup]]:
        """The group and the bases under it, newest first."""
        while group is not None:
            found = self.row(group)
            yield group, found
            group = found.base

    def read(self, group: int) -> dict[StateNid, EventNid]:
        """The whole state of a group."""
        state: dict[Any, Any] = {}
        for _, row in reversed(list(self.chain(group))):
            state.update(zip(row.keys, row.values, strict=True))
        return {key: value for key, value in state.items() if value}

    def named(self, state: Mapping[StateNid, EventNid]) -> dict[StateKey, EventNid]:
        """A state with its keys as (type, state_key)."""
        return {self.names.name(key): nid for key, nid in state.items()}

    def lookup(self, group: int, key: StateNid) -> EventNid | None:
        """One entry of the state, without reading the whole."""
        for _, row in self.chain(group):
            at = bisect.bisect_left(row.keys, key)
            if at < len(row.keys) and row.keys[at] == key:
                return EventNid(row.values[at]) if row.values[at] else None
        return None

    def extend(self, room_nid: int, parent: int | None, changes: dict[StateNid, EventNid]) -> int:
        """A new group: the parent's state with some entries changed (0: gone)."""
        height = self.row(parent).height + 1 if parent is not None else 0
        delta: dict[Any, Any] = dict(changes)
        base = parent
        for group, row in self.chain(parent):
            base = group
            if row.height <= height & (height - 1):
                break
            for key, value in zip(row.keys, row.values, strict=True):
                delta.setdefault(key, value)
        new = self.stream.advance()
        with self.database.write():
            self.database.execute(
                """
                INSERT INTO state_groups (state_group, room_nid, height, base, delta)
                VALUES (?, ?, ?, ?, ?)
                """,
                (new, room_nid, height, base, pack_delta(delta)),
            )
        return new

    def difference(self, old: int, new: int) -> dict[StateNid, EventNid]:
        """The entries of `new` that `old` lacks or has otherwise; reads what differs, not all."""
        chains = dict(self.chain(old)), dict(self.chain(new))
        rows = {**chains[0], **chains[1]}
        touched: set[Any] = set()
        for group in chains[0].keys() ^ chains[1].keys():
            touched.update(rows[group].keys)
        if len(touched) > MANY_LOOKUPS:
            before, after = self.read(old), self.read(new)
            return {key: value for key, value in after.items() if before.get(key) != value}
        pairs = ((key, self.lookup(new, key)) for key in touched)
        return {key: nid for key, nid in pairs if nid is not None and nid != self.lookup(old, key)}


# ═════════════════════════════════════════════════════════════════════════════
#  10. THE ROOM STORE
#
#  Events once, as the bytes that were signed; memberships as a table of what is
#  now; rooms in use in memory. Here is the one path by which an event enters a
#  room, and from here its news spreads to all who subscribed.
#                                                          spec: SS-API "Rooms"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE rooms (
    room_nid INTEGER PRIMARY KEY,
    room_id TEXT NOT NULL UNIQUE,
    version TEXT NOT NULL,
    state_group INTEGER NOT NULL,   -- the state now
    last_pos INTEGER NOT NULL,      -- position of the newest timeline event
    extremities TEXT NOT NULL       -- event nids without a successor, as a JSON list
);
CREATE TABLE events (
    nid INTEGER PRIMARY KEY,        -- from the stream's counter
    event_id TEXT NOT NULL UNIQUE,
    room_nid INTEGER NOT NULL,
    pos INTEGER,                    -- place in the timeline; NULL for what is outside of it
    state_nid INTEGER,              -- NULL for what is no state event
    state_group INTEGER,            -- the state after the event
    replaces INTEGER,               -- the state event that was in its place before
    redacted_by INTEGER,            -- the redaction that took its content away
    rejected TEXT,                  -- the rule that refused it
    soft_failed INTEGER NOT NULL DEFAULT 0,
    txn_device INTEGER,             -- which device sent it, NULL if it was delayed,
    txn_id TEXT,                    -- and the transaction id, or the delay_id
    ts INTEGER NOT NULL,            -- origin_server_ts, to find the event of a day
    pdu BLOB NOT NULL               -- canonical JSON
);
CREATE INDEX events_ts ON events (room_nid, ts, pos) WHERE pos IS NOT NULL;
CREATE UNIQUE INDEX events_timeline ON events (room_nid, pos) WHERE pos IS NOT NULL;
CREATE INDEX events_state ON events (room_nid, state_nid, pos) WHERE state_nid IS NOT NULL;
CREATE TABLE memberships (
    user_nid INTEGER NOT NULL,
    room_nid INTEGER NOT NULL,
    membership TEXT NOT NULL,
    event_nid INTEGER NOT NULL,
    join_pos INTEGER NOT NULL,      -- where the present join began
    forgotten INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (user_nid, room_nid)
) WITHOUT ROWID;
CREATE INDEX memberships_room ON memberships (room_nid, membership);
CREATE TABLE relations (
    room_nid INTEGER NOT NULL,
    parent_id TEXT NOT NULL,
    pos INTEGER NOT NULL,           -- of the child
    nid INTEGER NOT NULL,
    rel_type TEXT NOT NULL,
    sender_nid INTEGER NOT NULL,
    PRIMARY KEY (room_nid, parent_id, pos)
) WITHOUT ROWID;
CREATE INDEX relations_type ON relations (room_nid, parent_id, rel_type, pos, sender_nid, nid);
CREATE TABLE pending_redactions (
    event_id TEXT NOT NULL,         -- not seen yet
    redaction INTEGER NOT NULL,
    PRIMARY KEY (event_id, redaction)
) WITHOUT ROWID;
""")
invariant(
    "events of rooms that are not there",
    "SELECT nid FROM events WHERE room_nid NOT IN (SELECT room_nid FROM rooms)",
)
invariant(
    "events with state groups that are not there",
    "SELECT nid FROM events WHERE state_group NOT IN (SELECT state_group FROM state_groups)",
)
invariant(
    "relations of events that are not there",
    "SELECT nid FROM relations WHERE nid NOT IN (SELECT nid FROM events)",
)
invariant(
    "memberships from events that are not there",
    "SELECT event_nid FROM memberships WHERE event_nid NOT IN (SELECT nid FROM events)",
)
invariant(
    "rooms whose last position is not that of their newest event",
    """
    SELECT room_id
    FROM rooms
    WHERE last_pos != (SELECT MAX(pos) FROM events WHERE events.room_nid = rooms.room_nid)
    """,
)

EVENT_OVERHEAD_BYTES = 2500  # what a parsed event weighs beside its text, in CPython
STATE_ENTRY_BYTES = 120
MIN_POSITION = -(2**62)
MAX_POSITION = 2**62
MAX_DEPTH = 2**53 - 1
PURGE_BATCH = 100

# ── 10.1  A room in memory ───────────────────────────────────────────────────


class Member(NamedTuple):
    """A row of memberships, for one user."""

    membership: str
    event_nid: EventNid
    join_pos: int
    forgotten: bool


HISTORY_VISIBILITIES = ("world_readable", "shared", "invited", "joined")


def history_visibility_of(event: Event | None) -> str:
    """The setting in a history visibility event; "shared" when there is none or it is unknown."""
    value = None if event is None else event.content.get("history_visibility")
    return value if value in HISTORY_VISIBILITIES else "shared"


class Room:
    """What is asked for all the time of a room that is in use; the truth is in the tables."""

    def __init__(self, store: RoomReader, nid: RoomNid) -> None:
        self.store = store
        self.nid = nid
        self.room_id = ""
        self.version = ROOM_VERSIONS["1"]
        self.state: dict[StateKey, EventNid] = {}
        self.group: int | None = None
        self.last_pos = 0
        self.extremities: list[EventNid] = []
        self.members_by_nid: dict[UserNid, str] = {}
        self.counts: Counter[str] = Counter()
        self.local_joined: set[UserNid] = set()
        self.typing: dict[UserNid, int] = {}
        self.power: tuple[object, PowerLevels] | None = None

    def state_event(self, event_type: str, state_key: str = "") -> Event | None:
        """The current state event of that type and key."""
        nid = self.state.get((event_type, state_key))
        return None if nid is None else self.store.event_by_nid(nid)

    def content(self, event_type: str, state_key: str = "") -> Json:
        """The content of a current state event; empty when there is none."""
        event = self.state_event(event_type, state_key)
        return {} if event is None else event.content

    def setting(self, event_type: str, key: str, default: str) -> str:
        """A text in the content of a current state event, such as the join rule."""
        value = self.content(event_type).get(key)
        return value if isinstance(value, str) else default

    @property
    def join_rule(self) -> str:
        """The current join rule; rooms without one are invite only."""
        return self.setting(JOIN_RULES, "join_rule", "invite")

    @property
    def history_visibility(self) -> str:
        """The current history visibility."""
        return history_visibility_of(self.state_event("m.room.history_visibility"))

    @property
    def encrypted(self) -> bool:
        """Whether encryption was ever switched on."""
        return ("m.room.encryption", "") in self.state

    def membership_of(self, user_nid: UserNid) -> str | None:
        """The membership of a user known by integer."""
        return self.members_by_nid.get(user_nid)

    def membership(self, user_id: str) -> str | None:
        """The membership of a user, None for one who never had any."""
        nid = self.store.database.find_user_nid(user_id)
        return None if nid is None else self.members_by_nid.get(nid)

    def members(self, membership: str = "join") -> list[str]:
        """The ids of all users with that membership."""
        name = self.store.database.user_id
        return [name(nid) for nid, value in self.members_by_nid.items() if value == membership]

    @property
    def joined_count(self) -> int:
        """How many users are joined."""
        return self.counts["join"]

    @property
    def invited_count(self) -> int:
        """How many users are invited."""
        return self.counts["invite"]

    def power_levels(self) -> PowerLevels:
        """The power levels now, kept until the events that they come from change."""
        keys = (POWER_LEVELS_KEY, CREATE_KEY)
        source = tuple(self.state.get(key) for key in keys)
        if self.power is None or self.power[0] != source:
            events = {key: event for key in keys if (event := self.state_event(*key)) is not None}
            self.power = (source, power_levels_of(self.version, events))
        return self.power[1]

    def set_member(self, user_nid: UserNid, membership: str, *, is_local: bool) -> None:
        """Note a membership in the sums as well."""
        self.counts[self.members_by_nid.get(user_nid, "")] -= 1
        self.counts[membership] += 1
        self.members_by_nid[user_nid] = membership
        if is_local and membership == "join":
            self.local_joined.add(user_nid)
        else:
            self.local_joined.discard(user_nid)

    def weight(self) -> int:
        """About how many bytes the room takes."""
        return 2000 + STATE_ENTRY_BYTES * (len(self.state) + len(self.members_by_nid))


# ── 10.2  Reading ────────────────────────────────────────────────────────────

TIMELINE_NEWEST = """
    SELECT nid
    FROM events
    WHERE room_nid = ?
      AND pos > ?
      AND pos <= ?
    ORDER BY pos DESC
    LIMIT ?
"""
TIMELINE_OLDEST = """
    SELECT nid
    FROM events
    WHERE room_nid = ?
      AND pos > ?
      AND pos <= ?
    ORDER BY pos ASC
    LIMIT ?
"""


class RoomReader:
    """All rooms: looks up rooms, events, states of the past and members, and keeps them."""

    def __init__(
        self, database: Database, stream: Stream, server_name: str, cache_bytes: int, events: int
    ) -> None:
        self.database = database
        self.stream = stream
        self.server_name = server_name
        self.groups = StateGroups(database, stream, cache_bytes // 8)
        self.erased: Mapping[str, int] = {}  # users whose events newcomers get redacted; since when
        self._suffix = ":" + server_name
        self._rooms: LruCache[RoomNid, Room] = LruCache(cache_bytes // 4)
        self._alive: weakref.WeakValueDictionary[RoomNid, Room] = weakref.WeakValueDictionary()
        self._room_nids: LruCache[str, RoomNid] = LruCache(10_000)
        self._events: LruCache[EventNid, Event] = LruCache(
            min(cache_bytes // 8, events * EVENT_OVERHEAD_BYTES)
        )
        self._memberships: LruCache[UserNid, dict[RoomNid, Member]] = LruCache(100_000)
        # Whom a user ignores is known to a later chapter: the composition root sets this.
        self.ignored: Callable[[UserNid], frozenset[str]] = lambda _: frozenset()
        database.on_reset(self._reset)

    def caches(self) -> dict[str, LruCache[Any, Any]]:
        """The caches by name, for the admin room."""
        return {
            "rooms": self._rooms,
            "room ids": self._room_nids,
            "events": self._events,
            "memberships": self._memberships,
            "state groups": self.groups.cache,
        }

    def _reset(self) -> None:
        """Forget what may never have happened; rooms that someone holds are read again."""
        for cache in self.caches().values():
            cache.clear()
        for room in list(self._alive.values()):
            self._read(room)

    # Rooms

    def find(self, room_id: str) -> Room | None:
        """The room with that id, or None."""
        nid = self._room_nids.get(room_id)
        if nid is None:
            nid = self.database.value("SELECT room_nid FROM rooms WHERE room_id = ?", (room_id,))
            if nid is None:
                return None
            self._room_nids.put(room_id, nid)
        return self.by_nid(nid)

    def get(self, room_id: str) -> Room:
        """The room with that id, or 404."""
        room = self.find(room_id)
        if room is None:
            raise not_found("There is no such room")
        return room

    def by_nid(self, nid: RoomNid) -> Room:
        """A room that is known to exist: one object, as long as anybody holds it."""
        room = self._rooms.get(nid)
        if room is None:
            room = self._alive.get(nid)
            if room is None:
                room = self._alive[nid] = Room(self, nid)
                self._read(room)
            self._rooms.put(nid, room, room.weight())
        return room

    def _read(self, room: Room) -> None:
        """Fill a room from the tables, unless it is not there, because its creation was undone."""
        row = self.database.one(
            """
            SELECT room_id, version, state_group, last_pos, extremities
            FROM rooms
            WHERE room_nid = ?
            """,
            (room.nid,),
        )
        if row is None or not row[2]:  # undone, or on the way to it: a room without a create event
            return
        room.room_id, version, group, room.last_pos, extremities = row
        room.version, room.group, room.power = ROOM_VERSIONS[version], group, None
        room.extremities = json.loads(extremities)
        room.state = self.groups.named(self.groups.read(group))
        for kept in (room.members_by_nid, room.counts, room.local_joined):
            kept.clear()
        rows = self.database.execute(
            "SELECT user_nid, membership FROM memberships WHERE room_nid = ?", (room.nid,)
        )
        for user_nid, membership in rows:
            room.set_member(user_nid, sys.intern(membership), is_local=self.is_local(user_nid))

    def is_local(self, user_nid: UserNid) -> bool:
        """Whether the user's account is on this server."""
        return self.database.user_id(user_nid).endswith(self._suffix)

    # Events

    def event_by_nid(self, nid: EventNid) -> Event | None:
        """The event with that integer, or None."""
        event = self._events.get(nid)
        return event or next(iter(self.events_by_nids((nid,))), None)

    def event(self, event_id: str) -> Event | None:
        """The event with that id, whatever its fate, or None."""
        nid = self.database.value("SELECT nid FROM events WHERE event_id = ?", (event_id,))
        return None if nid is None else self.event_by_nid(nid)

    def events_by_nids(self, nids: Iterable[EventNid]) -> list[Event]:
        """Many events in the order asked for, read in one go; the ones not there are left out."""
        wanted = list(nids)
        found = {nid: self._events.get(nid) for nid in wanted}
        missing = [nid for nid, event in found.items() if event is None]
        if missing:
            rows = self.database.all(
                """
                SELECT event_id, pdu, nid, room_nid, pos, state_group, replaces, redacted_by,
                    rejected, soft_failed, txn_device, txn_id
                FROM json_each(?)
                JOIN events ON nid = value
                """,
                (json.dumps(missing),),
            )
            found.update((row[2], self._event_from(row)) for row in rows)
        return [event for nid in wanted if (event := found[nid]) is not None]

    def _event_from(self, row: Any) -> Event:
        event = Event(self.by_nid(row[3]).version, json.loads(row[1]), row[0])
        event.nid, event.room_nid, event.pos, event.state_group, event.replaces = row[2:7]
        event.redacted_by, event.rejected = row[7:9]
        event.soft_failed = bool(row[9])
        event.txn_device, event.txn_id = row[10:]
        self._events.put(event.nid, event, EVENT_OVERHEAD_BYTES + 2 * len(row[1]))
        return event

    def events_between(
        self, room: Room, after: int, upto: int, limit: int, *, newest: bool = True
    ) -> list[Event]:
        """Timeline events with after < pos <= upto in timeline order: the newest, or the oldest."""
        sql = TIMELINE_NEWEST if newest else TIMELINE_OLDEST
        nids = [row[0] for row in self.database.execute(sql, (room.nid, after, upto, limit))]
        return self.events_by_nids(reversed(nids) if newest else nids)

    def event_at(self, room: Room, position: int) -> Event | None:
        """The newest timeline event at or before a position."""
        events = self.events_between(room, MIN_POSITION, position, 1)
        return events[0] if events else None

    # State in the past

    def state_after(self, event: Event) -> dict[StateKey, EventNid]:
        """The room's state just after an event."""
        return self.groups.named(self.groups.read(cast(int, event.state_group)))

    def entry_before(self, event: Event, key: StateKey) -> Event | None:
        """One entry of the room's state just before an event."""
        if event.is_state and event.key == key and not event.rejected and not event.soft_failed:
            return None if event.replaces is None else self.event_by_nid(event.replaces)
        return self.entry_after(event, key)

    def entry_after(self, event: Event, key: StateKey) -> Event | None:
        """One entry of the room's state just after an event."""
        nid = self.groups.names.find(key)
        if nid is None or event.state_group is None:
            return None
        event_nid = self.groups.lookup(event.state_group, nid)
        return None if event_nid is None else self.event_by_nid(event_nid)

    # Members

    def memberships(self, user_nid: UserNid) -> dict[RoomNid, Member]:
        """All rooms that the user has or had a membership in, the forgotten ones too."""
        found = self._memberships.get(user_nid)
        if found is None:
            rows = self.database.execute(
                """
                SELECT room_nid, membership, event_nid, join_pos, forgotten
                FROM memberships
                WHERE user_nid = ?
                """,
                (user_nid,),
            )
            found = {
                nid: Member(sys.intern(membership), event_nid, join_pos, bool(forgotten))
                for nid, membership, event_nid, join_pos, forgotten in rows
            }
            self._memberships.put(user_nid, found, 1 + len(found))
        return found

    def joined_rooms(self, user_nid: UserNid) -> list[RoomNid]:
        """The rooms that the user is in now."""
        rooms = self.memberships(user_nid).items()
        return [room_nid for room_nid, member in rooms if member.membership == "join"]

    def share_room(self, one: UserNid, other: UserNid) -> bool:
        """Whether two users are in a room together."""
        return not set(self.joined_rooms(one)).isdisjoint(self.joined_rooms(other))

    def users_sharing(self, user_nid: UserNid) -> set[UserNid]:
        """Everyone who is in a room with the user, themselves not included."""
        rows = self.database.execute(
            """
            SELECT DISTINCT theirs.user_nid
            FROM memberships AS mine
            JOIN memberships AS theirs
              ON theirs.room_nid = mine.room_nid
             AND theirs.membership = 'join'
            WHERE mine.user_nid = ?
              AND mine.membership = 'join'
            """,
            (user_nid,),
        )
        return {row[0] for row in rows} - {user_nid}


# ── 10.3  Writing ────────────────────────────────────────────────────────────

# The device and its transaction id, or None and the delay_id of what was sent for the user later.
SentAs = tuple[int | None, str] | None
RoomListener = Callable[["Room", Event], None]
MembershipListener = Callable[["Room", UserNid, "str | None", str], None]
RelationListener = Callable[["Room", Event, int], None]
SenderCheck = Callable[["Room", str, str, Json, "str | None", "str | None"], None]  # as `send`


def relation_in(content: Json) -> tuple[str, str] | None:
    """The (rel_type, parent event id) in the content of an event that relates to another."""
    relates_to = content.get("m.relates_to")
    if not isinstance(relates_to, dict):
        return None
    rel_type, parent = relates_to.get("rel_type"), relates_to.get("event_id")
    if not isinstance(rel_type, str) or not isinstance(parent, str):
        return None
    return (rel_type, parent) if max(len(rel_type), len(parent)) <= MAX_ID_BYTES else None


def relation_of(event: Event) -> tuple[str, str] | None:
    """The (rel_type, parent event id) of an event that relates to another."""
    return relation_in(event.content)


class RoomWriter(RoomReader):
    """Puts events into rooms: the only way we make them, and the only way they get in."""

    def __init__(self, signing_key: SigningKey, *args: Any) -> None:
        super().__init__(*args)
        self.signing_key = signing_key
        self._listeners: list[RoomListener] = []
        self._membership_listeners: list[MembershipListener] = []
        self._relation_listeners: list[RelationListener] = []
        self.check_sender: SenderCheck = lambda *_: None
        self._purge_listeners: list[Callable[[Sequence[EventNid]], None]] = []
        self.subscribe_purge = self._purge_listeners.append  # with events that go for good

    def subscribe(self, listener: RoomListener) -> None:
        """Call back for each new timeline event, inside the transaction that stores it."""
        self._listeners.append(listener)

    def subscribe_membership(self, listener: MembershipListener) -> None:
        """Call back with room, user, old and new membership, inside the transaction."""
        self._membership_listeners.append(listener)

    def subscribe_relation(self, listener: RelationListener) -> None:
        """Call back with each event that relates to another (1), and when it is redacted (-1)."""
        self._relation_listeners.append(listener)

    def create(self, version_id: str, creator: str, content: Json) -> Room:
        """Make a room: its create event, and the row that everything else hangs on."""
        version = ROOM_VERSIONS[version_id]
        fields: Json = {"type": CREATE, "state_key": "", "sender": creator, "content": content}
        fields |= {"origin_server_ts": now_ms(), "depth": 1, "prev_events": [], "auth_events": []}
        if not version.room_id_is_hash:
            fields["room_id"] = f"!{random_token(18)}:{self.server_name}"
        event = finish_event(version, fields, self.server_name, self.signing_key)
        check_auth(version, event, {})
        with self.database.write():
            cursor = self.database.execute(
                """
                INSERT INTO rooms (room_id, version, state_group, last_pos, extremities)
                VALUES (?, ?, 0, 0, '[]')
                """,
                (event.room_id, version_id),
            )
            room = Room(self, RoomNid(cast(int, cursor.lastrowid)))
            room.room_id, room.version = event.room_id, version
            self._alive[room.nid] = room
            self._rooms.put(room.nid, room, room.weight())
            self.append(room, event, is_ours=True)
        return room

    def send(
        self,
        room: Room,
        sender: str,
        event_type: str,
        content: Json,
        *,
        state_key: str | None = None,
        redacts: str | None = None,
        timestamp: int | None = None,
        transaction: SentAs = None,
    ) -> Event:
        """Build, authorise, sign and store an event of a local user: the only way we make events.

        Raises MatrixError when the rules refuse it.
        """
        version = room.version
        self.check_sender(room, sender, event_type, content, state_key, redacts)
        if redacts is not None and version.redacts_in_content:
            content = {**content, "redacts": redacts}
        before = [cast(Event, self.event_by_nid(nid)) for nid in room.extremities[:MAX_PREV_EVENTS]]
        keys = auth_types_for_event(version, event_type, sender, state_key, content)
        auth_state = {key: found for key in keys if (found := room.state_event(*key)) is not None}
        fields = {
            "type": event_type,
            "sender": sender,
            "content": content,
            "room_id": room.room_id,
            "origin_server_ts": now_ms() if timestamp is None else timestamp,
            "prev_events": [event_reference(event) for event in before],
            "auth_events": [event_reference(event) for event in auth_state.values()],
            "depth": min(1 + max((event.depth for event in before), default=0), MAX_DEPTH),
        }
        if state_key is not None:
            fields["state_key"] = state_key
        if redacts is not None and not version.redacts_in_content:
            fields["redacts"] = redacts
        event = finish_event(version, fields, self.server_name, self.signing_key)
        # Version 12 leaves the create event out of auth_events, but the rules still look at it.
        created = cast(Event, room.state_event(*CREATE_KEY))
        check_auth(version, event, {CREATE_KEY: created, **auth_state})
        if transaction is not None:
            event.txn_device, event.txn_id = transaction
        self.append(room, event, is_ours=True)
        return event

    def append(self, room: Room, event: Event, *, is_ours: bool = False) -> None:
        """Store an authorised event at the end of the timeline and announce it: the one way in."""
        with self.database.write():
            event.nid = EventNid(self.stream.stamp(ROOM_EVENT, room.nid))
            event.pos, event.room_nid, event.state_group = event.nid, room.nid, room.group
            state_nid = None
            if event.is_state:
                state_nid = self.groups.names.nid(event.key)
                event.replaces = room.state.get(event.key)
                event.state_group = self.groups.extend(room.nid, room.group, {state_nid: event.nid})
            self._insert(event, state_nid)
            self._advance(room, event)
            self._index_relation(room, event)
            if event.type == REDACTION:
                self._redact_target(room, event)
            if not is_ours:  # nobody can have redacted an event that we make just now
                self._redact_if_pending(room, event)
            for listener in self._listeners:
                listener(room, event)

    def _insert(self, event: Event, state_nid: StateNid | None) -> None:
        raw = canonical_json(event.pdu)
        place = (event.nid, event.event_id, event.room_nid, event.pos, state_nid, event.state_group)
        fate = (event.replaces, event.rejected, event.soft_failed, event.txn_device, event.txn_id)
        self.database.execute(
            """
            INSERT INTO events (nid, event_id, room_nid, pos, state_nid, state_group,
                replaces, rejected, soft_failed, txn_device, txn_id, ts, pdu)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            """,
            (*place, *fate, event.origin_server_ts, raw),
        )
        self._events.put(event.nid, event, EVENT_OVERHEAD_BYTES + 2 * len(raw))

    def _advance(self, room: Room, event: Event) -> None:
        """Move the room on to an event that follows all its extremities."""
        self.database.execute(
            """
            UPDATE rooms
            SET state_group = ?, last_pos = ?, extremities = ?
            WHERE room_nid = ?
            """,
            (event.state_group, event.pos, f"[{event.nid}]", room.nid),
        )
        room.group = event.state_group
        room.last_pos = cast(int, event.pos)
        room.extremities = [event.nid]
        if event.is_state:
            room.state[event.key] = event.nid
            if event.type == MEMBER:
                self._change_membership(room, event)

    def _change_membership(self, room: Room, event: Event) -> None:
        user_nid = self.database.user_nid(cast(str, event.state_key))
        membership = sys.intern(cast(str, event.membership))
        old, known = room.members_by_nid.get(user_nid), self.memberships(user_nid)
        previous = known.get(room.nid)
        stays = previous is not None and previous.membership == membership == "join"
        join_pos = previous.join_pos if stays and previous else event.nid
        self.database.execute(
            """
            INSERT OR REPLACE INTO memberships (user_nid, room_nid, membership, event_nid, join_pos)
            VALUES (?, ?, ?, ?, ?)
            """,
            (user_nid, room.nid, membership, event.nid, join_pos),
        )
        known[room.nid] = Member(membership, event.nid, join_pos, False)
        self._memberships.put(user_nid, known, 1 + len(known))
        room.set_member(user_nid, membership, is_local=self.is_local(user_nid))
        self._rooms.put(room.nid, room, room.weight())
        if old != membership or membership == "join":
            for listener in self._membership_listeners:
                listener(room, user_nid, old, membership)

    def forget(self, user_nid: UserNid, room: Room) -> None:
        """Mark a room that the user has left as forgotten."""
        with self.database.write():
            self.database.execute(
                "UPDATE memberships SET forgotten = 1 WHERE user_nid = ? AND room_nid = ?",
                (user_nid, room.nid),
            )
            self._memberships.pop(user_nid)

    def purge(
        self, room: Room, after: int, upto: int, *, everything: bool
    ) -> tuple[int, Sequence[EventNid]]:
        """Delete some of the old events for good; up to which position, and which they were.

        State stays, and so do the newest events, on which the next ones build. `everything` takes
        what our own users sent as well, which nobody else may have kept.
        """
        events = self.events_between(room, after, upto, PURGE_BATCH, newest=False)
        gone = [
            event
            for event in events
            if not event.is_state
            and event.nid not in room.extremities
            and event.pos != room.last_pos
            and (everything or not event.sender.endswith(self._suffix))
        ]
        with self.database.write():
            for event in gone:
                self.database.execute(
                    "DELETE FROM relations WHERE parent_id = ?", (event.event_id,)
                )
                if (relation := relation_of(event)) is not None:
                    row = (relation[1], event.nid)
                    sql = "DELETE FROM relations WHERE parent_id = ? AND nid = ?"
                    self.database.execute(sql, row)
                self.database.execute("DELETE FROM events WHERE nid = ?", (event.nid,))
                self._events.pop(event.nid)
            nids = [event.nid for event in gone]
            for listener in self._purge_listeners:
                listener(nids)
        return cast(int, events[-1].pos) if events else upto, nids

    # Relations and redactions

    def _index_relation(self, room: Room, event: Event) -> None:
        relation = relation_of(event)
        if relation is not None and event.pos is not None and not event.is_state:
            sender = self.database.user_nid(event.sender)
            self.database.execute(
                """
                INSERT INTO relations (room_nid, parent_id, pos, nid, rel_type, sender_nid)
                VALUES (?, ?, ?, ?, ?, ?)
                """,
                (room.nid, relation[1], event.pos, event.nid, relation[0], sender),
            )
            self._tell_relation(room, event, 1)

    def _tell_relation(self, room: Room, event: Event, change: int) -> None:
        for listener in self._relation_listeners:
            listener(room, event, change)

    def _redact_target(self, room: Room, redaction: Event) -> None:
        """Apply a redaction, or keep it until its target comes."""
        if redaction.redacts is None:
            return
        target = self.event(redaction.redacts)
        if target is not None:
            self._apply_redaction(room, redaction, target)
            return
        self.database.execute(
            "INSERT OR IGNORE INTO pending_redactions (event_id, redaction) VALUES (?, ?)",
            (redaction.redacts, redaction.nid),
        )

    def _redact_if_pending(self, room: Room, event: Event) -> None:
        """Apply the redactions that came before the event itself did."""
        rows = self.database.all(
            "SELECT redaction FROM pending_redactions WHERE event_id = ?", (event.event_id,)
        )
        for redaction in self.events_by_nids(row[0] for row in rows):
            self._apply_redaction(room, redaction, event)
        if rows:
            self.database.execute(
                "DELETE FROM pending_redactions WHERE event_id = ?", (event.event_id,)
            )

    def _apply_redaction(self, room: Room, redaction: Event, target: Event) -> None:
        """Take the content of the target away, if the redaction's sender may do that.

        Spec: rooms/v3 "Handling redactions".
        """
        if target.room_nid != room.nid or target.redacted_by is not None:
            return
        levels = room.power_levels()
        same_server = server_of(redaction.sender) == server_of(target.sender)
        if not same_server and levels.user(redaction.sender) < levels.redact:
            return
        self.database.execute(
            "UPDATE events SET pdu = ?, redacted_by = ? WHERE nid = ?",
            (canonical_json(redact(room.version, target.pdu)), redaction.nid, target.nid),
        )
        relation = relation_of(target)
        if relation is not None:
            self.database.execute(
                "DELETE FROM relations WHERE room_nid = ? AND parent_id = ? AND pos = ?",
                (room.nid, relation[1], target.pos),
            )
            self._tell_relation(room, target, -1)
        self._events.pop(target.nid)
        room.power = None


# ═════════════════════════════════════════════════════════════════════════════
#  11. HISTORY VISIBILITY AND THE CLIENT FORMAT
#
#  The one check that says who may see which event, and the form in which clients
#  get what they may see.
#       spec: CS-API "Room history visibility", "Room event format", "Stripped state"
# ═════════════════════════════════════════════════════════════════════════════

# ── 11.1  History visibility ─────────────────────────────────────────────────
#
#   visibility      who may see an event
#   world_readable  everyone
#   shared          who was joined then, or has joined at any time after
#   invited         who was joined or invited then
#   joined          who was joined then
#
# An event that changes the visibility is judged by the wider of the old and the new
# setting; one's own membership event by the better of the memberships around it.

VISIBILITY_KEY: Final[StateKey] = ("m.room.history_visibility", "")


class Viewer:
    """One user's view of one room's past; remembers what it looked up, for a page of events."""

    def __init__(self, rooms: RoomReader, room: Room, user_nid: UserNid | None) -> None:
        self.rooms = rooms
        self.room = room
        member = rooms.memberships(user_nid).get(room.nid) if user_nid is not None else None
        self.member = None if member is not None and member.forgotten else member
        user_id = rooms.database.user_id(user_nid) if user_nid is not None else ""
        self.key = (MEMBER, user_id)
        self.is_joined = member is not None and member.membership == "join"
        self.ignored = frozenset[str]() if user_nid is None else rooms.ignored(user_nid)
        self._seen: dict[tuple[int | None, StateKey], Event | None] = {}
        self._until: int | None = None
        self._own: list[Event] | None = None

    def may_see(self, event: Event) -> bool:
        """Whether the user may see the event, and does not ignore its sender.

        Spec: CS-API "Ignoring Users": state is shown all the same, or rooms would look wrong.
        """
        is_ignored = event.sender in self.ignored and not event.is_state
        return not is_ignored and self.has_access(event)

    def has_access(self, event: Event) -> bool:
        """Whether history visibility lets the user see the event."""
        if event.rejected or event.soft_failed:
            return False
        member = self.member
        if member is not None and self.is_joined and event.pos == event.nid >= member.join_pos:
            return True  # by far the most frequent case
        settings = {history_visibility_of(found) for found in self._around(event, VISIBILITY_KEY)}
        if member is None or "world_readable" in settings:
            return "world_readable" in settings
        memberships = {found.membership for found in self._around(event, self.key) if found}
        if "join" in memberships or ("invite" in memberships and "invited" in settings):
            return True
        return "shared" in settings and (event.pos or 0) < self._joined_until()

    def may_read(self, event: Event) -> bool:
        """Whether the user may see the event as it was sent, not only that there was one."""
        return self.may_see(event) and self.without_erased(event) is event

    def without_erased(self, event: Event) -> Event:
        """The event, or its redacted copy: for who came after its sender asked to be erased.

        Spec: CS-API "Account deactivation", `erase`. State goes on to be what the room needs.
        """
        position = self.rooms.erased.get(event.sender)
        if position is None or event.is_state:
            return event
        if self.is_joined and cast(Member, self.member).join_pos <= position:
            return event
        joins = (own for own in self._own_events() if own.membership == "join")
        if any(own.nid <= position for own in joins):
            return event
        shown = Event(event.version, redact(event.version, event.pdu), event.event_id)
        for name in ("nid", "room_nid", "pos", "state_group", "redacted_by"):
            setattr(shown, name, getattr(event, name))
        return shown

    def _around(self, event: Event, key: StateKey) -> tuple[Event | None, ...]:
        """An entry of the state after the event; where it is the event itself, also before it."""
        at = (event.state_group, key)
        if at not in self._seen:
            self._seen[at] = self.rooms.entry_after(event, key)
        if event.is_state and event.key == key:
            return self._seen[at], self.rooms.entry_before(event, key)
        return (self._seen[at],)

    def _joined_until(self) -> int:
        """The position up to which the user has been joined at some time: all, if joined now."""
        if self._until is None:
            self._until = MAX_POSITION if self.is_joined else self._find_last_join()
        return self._until

    def _find_last_join(self) -> int:
        until = MAX_POSITION
        for event in self._own_events():
            if event.membership == "join":
                return until
            until = cast(int, event.pos)
        return MIN_POSITION

    def _own_events(self) -> list[Event]:
        """The user's own member events, the newest first."""
        if self._own is None:
            rows = self.rooms.database.all(
                """
                SELECT nid
                FROM events
                WHERE room_nid = ?
                  AND state_nid = ?
                  AND pos IS NOT NULL
                ORDER BY pos DESC
                """,
                (self.room.nid, self.rooms.groups.names.find(self.key)),
            )
            self._own = self.rooms.events_by_nids(row[0] for row in rows)
        return self._own


class Rooms(RoomWriter):
    """The room store as the rest of the server knows it: reading, writing, and who may see."""

    def visible(self, user_nid: UserNid | None, room: Room, events: Iterable[Event]) -> list[Event]:
        """The events that a user may see; None stands for someone without an account.

        Spec: CS-API "Room history visibility", "Server behaviour". All doors lead through here.
        """
        viewer = Viewer(self, room, user_nid)
        seen = [event for event in events if viewer.may_see(event)]
        return [viewer.without_erased(event) for event in seen] if self.erased else seen


# ── 11.2  The client format ──────────────────────────────────────────────────


def sent_as(rooms: RoomReader, event: Event, device_nid: int) -> Json:
    """The transaction_id for the device that sent the event, the delay_id for all of its user."""
    if event.txn_device is not None:
        return {"transaction_id": event.txn_id} if event.txn_device == device_nid else {}
    query = "SELECT user_id FROM devices JOIN users USING (user_nid) WHERE device_nid = ?"
    is_own = rooms.database.value(query, (device_nid,)) == event.sender
    return {"org.matrix.msc4140.delay_id": event.txn_id} if is_own else {}


def client_event(
    rooms: RoomReader,
    event: Event,
    device_nid: int | None = None,
    *,
    room_id: bool = True,
    nested: bool = False,
) -> Json:
    """An event as clients get it.  Spec: CS-API "Room event format".

    `device_nid` is the reader's device: the one that sent the event also gets its transaction_id.
    `nested` is what stands in another event's `unsigned`, and has no further event in its own.
    """
    result: Json = {
        "type": event.type,
        "sender": event.sender,
        "content": event.content,
        "event_id": event.event_id,
        "origin_server_ts": event.origin_server_ts,
    }
    if room_id:
        result["room_id"] = event.room_id
    if event.state_key is not None:
        result["state_key"] = event.state_key
    if event.redacts is not None:
        # Clients of either age find it: at the top as before version 11, and in the content.
        result["redacts"] = event.redacts
        result["content"] = {**event.content, "redacts": event.redacts}
    unsigned = result["unsigned"] = {"age": max(0, now_ms() - event.origin_server_ts)}
    if device_nid is not None and event.txn_id is not None:
        unsigned |= sent_as(rooms, event, device_nid)
    if event.replaces is not None:
        replaced = rooms.event_by_nid(event.replaces)
        if replaced is not None:
            unsigned["prev_content"] = replaced.content
            unsigned["replaces_state"] = replaced.event_id
    if event.redacted_by is not None and not nested:
        redaction = rooms.event_by_nid(event.redacted_by)
        if redaction is not None:
            unsigned["redacted_because"] = client_event(rooms, redaction, nested=True)
    return result


STRIPPED_TYPES = (
    CREATE,
    JOIN_RULES,
    "m.room.canonical_alias",
    "m.room.avatar",
    "m.room.name",
    "m.room.encryption",
    "m.room.topic",
)


def stripped_event(event: Event) -> Json:
    """The four members of a state event that someone outside of the room may see."""
    members = {"type": event.type, "state_key": event.state_key}
    return {**members, "content": event.content, "sender": event.sender}


def stripped_state(room: Room, *members: str) -> list[Json]:
    """What an invited or knocking user is shown of the room.  Spec: "Stripped state"."""
    keys = [(event_type, "") for event_type in STRIPPED_TYPES]
    keys += [(MEMBER, user_id) for user_id in members]
    return [stripped_event(event) for key in keys if (event := room.state_event(*key)) is not None]


# ╔═══════════════════════════════════════════════════════════════════════════╗
# ║  PART III   THE WIRE                                                      ║
# ╚═══════════════════════════════════════════════════════════════════════════╝
#
# Below this part bytes come in from strangers; above it functions are called
# with a path, a user and a JSON object that are what they claim to be.
#
# Two ideas carry it. First, a request is read strictly or not at all: whatever
# two programs could understand in two ways (lengths, line ends, folded lines)
# is refused and the connection closed, since everything after it is in doubt.
# Second, nothing in here costs a task or a timer per request: each connection
# is one task that reads, answers and reads again, and one sweep a second looks
# at the deadlines of all connections.


# ═════════════════════════════════════════════════════════════════════════════
#  12. HTTP SERVER
#
#  HTTP/1.1 on asyncio streams: the head is read by hand, bodies are streamed
#  both ways in constant memory, answers go out in the order of the requests,
#  and every wait has an end.      spec: RFC 9110, RFC 9112; CS-API "Web browser
#  clients" for the CORS headers
# ═════════════════════════════════════════════════════════════════════════════

log_http = logging.getLogger("conduit.http")

MAX_HEAD_BYTES = 32_768  # request line and header fields together
MAX_REQUEST_LINE = 16_384  # a filter in the query of /sync takes some kilobytes
MAX_HEADER_LINE = 8_192
MAX_HEADERS = 100
MAX_CHUNK_LINE = 256  # a chunk size with its extensions
MAX_DRAIN = 65_536  # of an unwanted body, to keep the connection usable
READ_BYTES = 65_536
FILE_BLOCK = 131_072

HEAD_SECONDS = 15.0  # from the first byte of a request to the end of its head
IDLE_SECONDS = 75.0  # between two requests
BODY_SECONDS = 20.0  # of silence at most while a body arrives; earned again by bytes
WRITE_SECONDS = 30.0  # for an answer, and what MIN_RATE gives its size
LINGER_SECONDS = 2.0  # to read what still comes in, so that the refusal is not lost in a reset
SWEEP_SECONDS = 1.0  # between two looks at all deadlines
MIN_RATE = 1_024  # bytes a second, below which a client is hung up on
MAX_CONNECTIONS = 4_096
MAX_CONNECTIONS_PER_ADDRESS = 256
RESERVED_FILES = 256  # for the database, media, and what goes out

# ── 12.1  The head of a request ──────────────────────────────────────────────

Headers = dict[str, str]  # names in lower case, repeated fields joined by commas

REQUEST_LINE = re.compile(r"([A-Z]{1,20}) (/(?:[!\"$-.0-~][!\"$-~]*)?) HTTP/1\.([01])")
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HOST = re.compile(r"(?:[0-9A-Za-z._~-]+|\[[0-9A-Fa-f:.]+\])?(?::[0-9]{0,5})?")
CONTENT_LENGTH = re.compile(r"[0-9]{1,15}")
ONLY_ONCE = frozenset(  # to join these would make up a value that nobody sent
    {"content-length", "content-type", "expect", "host", "if-range", "range", "transfer-encoding"}
)
CONTROL_BYTES = bytes(set(range(32)) - set(b"\t")) + b"\x7f"


def malformed(reason: str, status: int = 400) -> MatrixError:
    """For what is no proper HTTP, or more of it than we take; the connection ends after it."""
    return MatrixError(status, "M_UNKNOWN", f"Malformed request: {reason}")


def has_control(raw: bytes) -> bool:
    """Whether there is a control character other than tab, or a CR or LF that stands alone."""
    text = raw.replace(b"\r\n", b"")
    return len(text.translate(None, CONTROL_BYTES)) != len(text)


@functools.lru_cache(512)  # clients repeat most of their lines
def parse_header(line: str) -> tuple[str, str]:
    """One header field: its name in lower case, and its value."""
    name, colon, value = line.partition(":")
    if not colon or not HEADER_NAME.fullmatch(name):
        raise malformed("header name")
    return name.lower(), value.strip(" \t")


def parse_headers(lines: list[str]) -> Headers:
    """Header fields by name."""
    headers: Headers = {}
    for line in lines:
        if len(line) > MAX_HEADER_LINE:
            raise malformed("too long a header field", 431)
        name, value = parse_header(line)
        if name in headers and name in ONLY_ONCE:
            raise malformed(f"{name} twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def parse_head(raw: bytes) -> tuple[str, str, bool, Headers]:
    """Method, target, whether it is HTTP/1.1, and header fields, from all bytes of a head.

    Strict: folded lines, a space before the colon, control characters, a bare CR or LF, a second
    Host, and a target that is absolute or begins with // are refused: proxies disagree on each.
    """
    if has_control(raw):
        raise malformed("control character")
    request_line, *lines = raw.decode("latin-1").split("\r\n")
    if len(request_line) > MAX_REQUEST_LINE or len(lines) > MAX_HEADERS:
        raise malformed("too long a request line, or too many header fields", 431)
    match = REQUEST_LINE.fullmatch(request_line)
    if match is None:
        raise malformed("request line")
    method, target, minor = match.groups()
    headers = parse_headers(lines)
    host = headers.get("host", "" if minor == "0" else None)
    if host is None or not HOST.fullmatch(host):
        raise malformed("Host")
    return method, target, minor == "1", headers


def body_length(headers: Headers, is_http11: bool) -> int | None:
    """How many bytes of body follow; None when it comes in chunks.

    Trap: requests are smuggled past proxies with two lengths, or one that can be read in two ways.
    """
    coding = headers.get("transfer-encoding")
    if coding is None:
        length = headers.get("content-length", "0")
        if not CONTENT_LENGTH.fullmatch(length):
            raise malformed("Content-Length")
        return int(length)
    if "content-length" in headers or not is_http11:
        raise malformed("Transfer-Encoding")
    if coding.lower() != "chunked":
        raise malformed("the only transfer coding is chunked", 501)
    return None


BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")


@functools.lru_cache(512)  # for the ids of rooms and users, which come again and again
def percent_decode(text: str) -> str:
    """An ASCII text without its %XX escapes; 400 for broken ones, NUL, and what is no UTF-8."""
    if BAD_ESCAPE.search(text):
        raise invalid_param("Bad percent-encoding in the URL")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise invalid_param("The URL is no UTF-8") from None


# ── 12.2  The body of a request ──────────────────────────────────────────────

CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t -~]*)?")


class BodyStream:
    """The bytes of one body as they arrive: `async for block in request.stream`.

    413 M_TOO_LARGE over the server's limit, or a smaller one given to read(); 400 for bad chunks.
    """

    def __init__(self, connection: Connection, length: int | None, expect: str) -> None:
        self.limit = connection.server.max_request_size
        self.finished = length == 0
        self._connection = connection
        self._chunked = length is None
        self._left = length or 0  # of the body, or of the chunk at hand
        self._received = 0
        self._is_held_back = expect.lower() == "100-continue"

    @property
    def is_small(self) -> bool:
        """Whether what is left may be read and thrown away to keep the connection."""
        return self.finished or not (self._is_held_back or self._chunked or self._left > MAX_DRAIN)

    async def read(self, limit: int | None = None) -> bytes:
        """The whole body."""
        if limit is not None:
            self.limit = min(limit, self.limit)
        return b"" if self.finished else b"".join([block async for block in self])

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._chunked and not self._left and not self.finished:
            await self._start_chunk()
        if self.finished:
            raise StopAsyncIteration
        if self._received + self._left > self.limit:
            raise too_large(f"The body is larger than {self.limit} bytes")
        self._invite()
        block = await self._connection.some(self._left)
        self._received += len(block)
        self._left -= len(block)
        self.finished = not self._left and not self._chunked
        return block

    def _invite(self) -> None:
        """Tell a client that waits for it to go ahead, unless the body has come already."""
        if self._is_held_back and not self._connection.buffer:
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._is_held_back = False

    async def _start_chunk(self) -> None:
        """Read the size of the next chunk; after the last, of size 0, we take no trailers."""
        self._invite()
        line = self._connection.line
        if self._received and await line(MAX_CHUNK_LINE):
            raise malformed("chunk longer than its size")
        match = CHUNK_SIZE.fullmatch(await line(MAX_CHUNK_LINE))
        if match is None:
            raise malformed("chunk size")
        self._left = int(match[1], 16)
        if not self._left and await line(MAX_CHUNK_LINE):
            raise malformed("trailers")
        self.finished = not self._left


# ── 12.3  A request ──────────────────────────────────────────────────────────

parse_address = functools.lru_cache(1024)(ipaddress.ip_address)  # 2 µs each, for every request


@functools.lru_cache(1024)
def plain_address(text: str) -> str:
    """An address in the one form we compare, IPv4 as such; ValueError if it is none."""
    parsed = ipaddress.ip_address(text.strip().partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def address_group(address: str) -> str:
    """What counts as one client: an address, or the /64 network that an IPv6 customer has."""
    if ":" not in address:
        return address
    return socket.inet_pton(socket.AF_INET6, address)[:8].hex()


class ClientGone(ConnectionError):
    """The client hung up; there is nobody left to answer."""


FORWARDING_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
LOOPBACK_HOST = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
INTEGER = re.compile(r"-?[0-9]{1,16}")  # int() alone takes "1_0", " 1" and digits of all scripts


def give_up(waiting: asyncio.Future[Any] | None) -> None:
    """End a wait with False, unless what was waited for is there."""
    if waiting is not None and not waiting.done():
        waiting.set_result(False)


class Request:
    """One request: what its head says, its body when asked for, and who sends it.

    The router sets `json` (the checked body) and `requester` before it calls the handler.
    """

    def __init__(self, connection: Connection, raw: bytes) -> None:
        self.connection = connection
        self.method, target, self.is_http11, self.headers = parse_head(raw)
        self.path, _, self.raw_query = target.partition("?")
        # Split before decoding: %2F never makes a new segment.
        self.segments = [percent_decode(s) if "%" in s else s for s in self.path[1:].split("/")]
        # No upgrade is ever taken up; but a proxy may believe that one was.
        ends = "close" in self.headers.get("connection", "").lower() or "upgrade" in self.headers
        self.keep_alive = self.is_http11 and not ends
        length = body_length(self.headers, self.is_http11)
        self.stream = BodyStream(connection, length, self.headers.get("expect", ""))
        self.started = time.monotonic()
        self.json: Any = None
        self.requester: Requester | None = None

    @functools.cached_property
    def query(self) -> dict[str, list[str]]:
        """The query's arguments, each with its values in order; a plus sign stands for a space."""
        query: dict[str, list[str]] = {}
        for pair in self.raw_query.replace("+", " ").split("&"):
            name, _, value = pair.partition("=")
            if pair:
                query.setdefault(percent_decode(name), []).append(percent_decode(value))
        return query

    def arg(self, name: str, default: str | None = None) -> str | None:
        """The first value of a query argument."""
        values = self.query.get(name)
        return values[0] if values else default

    def int_arg(self, name: str, default: int, low: int, high: int) -> int:
        """An integer argument; over `high` it counts as `high`, below `low` as M_INVALID_PARAM."""
        text = self.arg(name)
        if text is None:
            return default
        if not INTEGER.fullmatch(text) or int(text) < low:
            raise invalid_param(f"{name} must be an integer of at least {low}")
        return min(int(text), high)

    def bool_arg(self, name: str, default: bool) -> bool:
        """An argument that is true or false; M_INVALID_PARAM for anything else."""
        text = self.arg(name)
        if text not in (None, "true", "false"):
            raise invalid_param(f"{name} must be true or false")
        return default if text is None else text == "true"

    @property
    def user(self) -> Requester:
        """Who asks, on a route that nobody reaches without an access token."""
        if self.requester is None:
            raise MatrixError(401, "M_MISSING_TOKEN", "Missing access token")
        return self.requester

    @property
    def address(self) -> str:
        """The client's: the last hop in X-Forwarded-For that is no trusted proxy, or the peer's."""
        server, address = self.connection.server, self.connection.peer
        forwarded = self.headers.get("x-forwarded-for")
        for hop in reversed(forwarded.split(",")) if forwarded else ():
            if not server.is_trusted(address):
                break
            try:
                address = plain_address(hop)
            except ValueError:
                break
        return address

    def is_local(self) -> bool:
        """Whether this comes from this machine itself, through no proxy, and asks for localhost.

        Trap: the Host is checked as well, or a web page could ask in the owner's browser, under
        a name of its own that it has made to point at 127.0.0.1.
        """
        peer = self.connection.peer
        return (
            (peer == "::1" or peer.startswith("127."))
            and not any(name in self.headers for name in FORWARDING_HEADERS)
            and bool(LOOPBACK_HOST.fullmatch(self.headers.get("host", "")))
        )

    async def wait(self, news: asyncio.Future[Any], seconds: float) -> bool:
        """Wait for the future, at most so long: whether it came.

        Trap: the future must be this request's own. It gets False when the time is over, the server
        stops, or the client hangs up; the last raises ClientGone.
        """
        if self.connection.server.stopping:
            return False
        self.connection.waiting = news
        timer = asyncio.get_running_loop().call_later(seconds, give_up, news)
        try:
            result = await news
        finally:
            timer.cancel()
            self.connection.waiting = None
        if self.connection.is_gone():
            raise ClientGone
        return result is not False


# ── 12.4  Answers ────────────────────────────────────────────────────────────


class FileBody(NamedTuple):
    """A file as the body of an answer: sent in blocks, or in part when a Range asks for that."""

    path: Path
    size: int
    first: int = 0  # the part to send, filled in just before: from this byte
    end: int = 0  # up to before this one


@dataclass(slots=True)
class Response:
    """An answer other than 200 with JSON: a status, further headers, or a body that is not JSON."""

    status: int = 200
    body: bytes | FileBody | AsyncIterator[bytes] = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


def error_response(error: MatrixError) -> Response:
    """The standard error as an answer, with Retry-After where it says when to come back."""
    wait_ms = error.extra.get("retry_after_ms")
    headers = {"Retry-After": str(max(1, -(-wait_ms // 1000)))} if isinstance(wait_ms, int) else {}
    return Response(error.status, encode_json(error.to_json()), headers)


SECRET_MEMBERS = frozenset(
    {"access_token", "client_secret", "mac", "new_password", "password"}
    | {"pin", "refresh_token", "secret", "token"}
)
SECRET_ARGUMENT = re.compile(r"(?:access_token|token|loginToken)=([^&]+)")


def secrets_in(value: Any) -> Iterator[str]:
    """Each text in a JSON body that stands under a secret name."""
    members = dict(enumerate(value)) if isinstance(value, list) else value
    for name, member in members.items() if isinstance(members, dict) else ():
        if name in SECRET_MEMBERS and isinstance(member, str):
            yield member
        yield from secrets_in(member)


def failure_response(request: Request, error: Exception) -> Response:
    """The answer to a request whose handling raised that: the error, or 500 for a fault of ours.

    What it was stands in the log, without passwords and tokens, which its message may quote.
    """
    if isinstance(error, MatrixError):
        return error_response(error)
    if isinstance(error, ClientGone):
        raise error
    report = traceback.format_exc()
    given = [request.headers.get("authorization", "").partition(" ")[2], *secrets_in(request.json)]
    for secret in filter(None, given + SECRET_ARGUMENT.findall(request.raw_query)):
        report = report.replace(secret, "***")
    log_http.error("%s %s failed\n%s", request.method, request.path, report)
    return error_response(MatrixError(500, "M_UNKNOWN", "Internal server error"))


CORS = (
    "Access-Control-Allow-Origin: *\r\n"
    "Access-Control-Allow-Methods: GET, HEAD, POST, PUT, DELETE, OPTIONS\r\n"
    "Access-Control-Allow-Headers: X-Requested-With, Content-Type, Authorization\r\n"
)
STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n" for s in HTTPStatus}
NO_BODY = frozenset({204, 304})
UNSAFE_VALUE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")
RANGE = re.compile(r"bytes=([0-9]{0,15})-([0-9]{0,15})")


@functools.lru_cache(2)
def shared_lines(second: int) -> str:
    """The header lines that all answers of one second share: Date and CORS."""
    return time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT\r\n", time.gmtime(second)) + CORS


@functools.lru_cache(256)
def header_line(name: str, value: str) -> str:
    """A header field.  Trap: a line end in a value would let its author write a whole answer."""
    if UNSAFE_VALUE.search(value) or not HEADER_NAME.fullmatch(name):
        raise ValueError(f"unsafe value for the header {name!r}")
    return f"{name}: {value}\r\n"


def response_head(response: Response, length: int | None, keep: bool) -> bytes:
    """Status line and header fields of an answer; without a length its body comes in chunks."""
    lines = STATUS_LINES[response.status] + shared_lines(int(time.time()))
    if response.status not in NO_BODY:
        lines += header_line("Content-Type", response.content_type)
        framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        lines += framing + "\r\n"
    for name, value in response.headers.items():
        lines += header_line(name, value)
    return (lines + ("\r\n" if keep else "Connection: close\r\n\r\n")).encode("latin-1")


def byte_range(text: str, size: int) -> tuple[int, int] | None:
    """From which byte up to before which one a Range header asks, for a file of that size.

    None if the header is to be ignored: another unit, several ranges, nonsense. Trap: the range may
    be empty, when the file ends before it.
    """
    match = RANGE.fullmatch(text)
    if match is None:
        return None
    first, last = match.groups()
    if not (first or last) or (first and last and int(last) < int(first)):
        return None
    start = int(first) if first else max(0, size - int(last or 0))
    end = min(size, int(last) + 1) if first and last else size
    return start, end


def select_range(request: Request, response: Response, file: FileBody) -> None:
    """Make of an answer with a file one with the part that is asked for.  Spec: RFC 9110, 14."""
    response.headers = headers = {**response.headers, "Accept-Ranges": "bytes"}
    tag = headers.get("ETag")
    bounds = byte_range(request.headers.get("range", ""), file.size)
    if bounds is None or request.headers.get("if-range", tag) != tag:
        bounds = (0, file.size)
    elif bounds[0] >= bounds[1]:
        error = MatrixError(416, "M_INVALID_PARAM", "The file ends before that range")
        response.status, response.body = error.status, encode_json(error.to_json())
        headers["Content-Range"] = f"bytes */{file.size}"
        response.content_type = "application/json"
        return
    else:
        response.status = 206
        headers["Content-Range"] = f"bytes {bounds[0]}-{bounds[1] - 1}/{file.size}"
    response.body = file._replace(first=bounds[0], end=bounds[1])


async def file_blocks(file: FileBody) -> AsyncIterator[bytes]:
    """The wanted part of a file, read by a thread, so that a slow disk holds nobody up."""
    in_thread = asyncio.get_running_loop().run_in_executor
    descriptor = await in_thread(None, os.open, file.path, os.O_RDONLY)
    try:
        for offset in range(file.first, file.end, FILE_BLOCK):
            size = min(FILE_BLOCK, file.end - offset)
            block = await in_thread(None, os.pread, descriptor, size, offset)
            if len(block) != size:
                raise OSError(f"{file.path} is shorter than {file.size} bytes")
            yield block
    finally:
        os.close(descriptor)


# ── 12.5  A connection ───────────────────────────────────────────────────────

IDLE, READING, WORKING, WRITING, CLOSING = range(5)  # what a connection is doing


class Connection:
    """One client's connection: a task that reads a request, answers it, and reads the next."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def __init__(self, server: HttpServer, peer: str) -> None:
        self.server = server
        self.peer = peer  # its address; empty on a Unix socket
        self.group = address_group(peer)
        self.buffer = b""  # read, but not yet used
        self.phase = WORKING
        self.deadline = 0.0  # of every phase but WORKING
        self.patience = BODY_SECONDS
        self.answered = False  # whether anything of the present answer has gone out
        self.waiting: asyncio.Future[Any] | None = None  # what a long poll waits for

    async def run(self) -> None:
        """Serve the connection until one side has had enough."""
        try:
            while await self._serve_one():
                pass
        except MatrixError as error:
            log_http.debug("refused %s: %s", self.peer, error.error)
            if not self.answered:
                body = encode_json(error.to_json())
                self.write(response_head(Response(error.status), len(body), keep=False) + body)
            await self._linger()

    async def _serve_one(self) -> bool:
        """Read and answer one request: whether the connection is good for another one."""
        self.answered = False
        raw = await self._read_head()
        if raw is None:
            return False
        request = Request(self, raw)
        self.phase, self.patience = WORKING, BODY_SECONDS
        response = await self.server.answer(request)
        stream = request.stream
        keep = request.keep_alive and stream.is_small and not self.server.stopping
        await self._send_or_fail(request, response, keep)
        spent_ms = (time.monotonic() - request.started) * 1000
        log_http.debug(
            "%s %s: %d, %.1f ms", request.method, request.path, response.status, spent_ms
        )
        if keep:
            await stream.read()
        elif self.buffer or not stream.finished:
            await self._linger()
        return keep

    def _limit(self, phase: int, seconds: float) -> None:
        """Say what is done now, and how long it may take."""
        self.phase = phase
        self.deadline = time.monotonic() + seconds

    async def _read_head(self) -> bytes | None:
        """The bytes of the next head, or None if the client has hung up instead."""
        if self.buffer:
            self._limit(READING, HEAD_SECONDS)
            await asyncio.sleep(0)  # others come first, or a pipeline could hold the loop for long
        else:
            self._limit(IDLE, IDLE_SECONDS)
        while True:
            buffer = self.buffer.removeprefix(b"\r\n")  # RFC 9112 2.2: some send one too many
            end = buffer.find(b"\r\n\r\n")
            if end > MAX_HEAD_BYTES or (end < 0 and len(buffer) > MAX_HEAD_BYTES):
                raise malformed("too large a head", 431)
            if end >= 0:
                self.buffer = buffer[end + 4 :]
                return buffer[:end]
            if has_control(buffer.removesuffix(b"\r")):  # its LF may still come
                raise malformed("bare line end")
            data = await self.reader.read(READ_BYTES)
            if not data or self.phase == CLOSING:  # which it is when it had to make room
                return None
            if self.phase == IDLE:
                self._limit(READING, HEAD_SECONDS)
            self.buffer += data

    async def _fill(self) -> None:
        """Wait for more of a body. Silence uses up the client's patience, bytes earn it again."""
        began = time.monotonic()
        self._limit(READING, self.patience)
        data = await self.reader.read(READ_BYTES)
        self.phase = WORKING
        if not data:
            raise ClientGone
        spent = time.monotonic() - began - len(data) / MIN_RATE
        self.patience = min(BODY_SECONDS, self.patience - spent)
        self.buffer += data

    async def some(self, limit: int) -> bytes:
        """At least one byte of a body, at most `limit`."""
        if not self.buffer:
            await self._fill()
        block, self.buffer = self.buffer[:limit], self.buffer[limit:]
        return block

    async def line(self, limit: int) -> bytes:
        """A line of a body, without its line end."""
        while (end := self.buffer.find(b"\r\n")) < 0:
            if len(self.buffer) > limit or has_control(self.buffer.removesuffix(b"\r")):
                raise malformed("chunk")
            await self._fill()
        line, self.buffer = self.buffer[:end], self.buffer[end + 2 :]
        if len(line) > limit or has_control(line):
            raise malformed("chunk")
        return line

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket, or to its buffer."""
        if self.writer.transport.is_closing():
            raise ClientGone
        self.answered = True
        self.writer.write(data)

    async def _flush(self) -> None:
        """Wait until a slow reader has taken most of what is in the buffer."""
        waiting = self.writer.transport.get_write_buffer_size()
        if waiting and self.reader.exception() is None:
            self._limit(WRITING, WRITE_SECONDS + waiting / MIN_RATE)
            await self.writer.drain()
            self.phase = WORKING

    async def _send_or_fail(self, request: Request, response: Response, keep: bool) -> None:
        """Write the answer; 500 stands for one that cannot be made, unless a part of it is out."""
        self.answered = False
        try:
            if self.server.before_response is not None:
                await self.server.before_response()
            if isinstance(response.body, FileBody):
                select_range(request, response, response.body)
            await self._send(request, response, keep)
        except ConnectionError:
            raise
        except Exception as error:  # the disk is full, no such file, an unsafe header
            failure = failure_response(request, error)
            if self.answered:
                raise ClientGone from None
            await self._send(request, failure, keep)

    async def _send(self, request: Request, response: Response, keep: bool) -> None:
        """Write the answer; its head waits for the first block, which may turn out a fault."""
        body, length = response.body, None
        if isinstance(body, FileBody):
            length, body = body.end - body.first, file_blocks(body)
        elif not isinstance(body, bytes) and not request.is_http11:  # which knows no chunks
            body = b"".join([block async for block in body])
        if isinstance(body, bytes):
            length = len(body)
        head = response_head(response, length, keep)
        if request.method == "HEAD" or response.status in NO_BODY:
            self.write(head)
        elif isinstance(body, bytes):
            self.write(head + body)
        else:
            await self._send_blocks(head, body, in_chunks=length is None)
        await self._flush()

    async def _send_blocks(self, head: bytes, body: AsyncIterator[bytes], in_chunks: bool) -> None:
        """Write a body as it is made, or read from the disk."""
        async for block in body:
            if block:
                self.write(head + (b"%x\r\n%b\r\n" % (len(block), block) if in_chunks else block))
                head = b""
                await self._flush()
        self.write(head + (b"0\r\n\r\n" if in_chunks else b""))

    def is_gone(self) -> bool:
        """Whether the client has hung up."""
        return self.reader.at_eof() or self.writer.transport.is_closing()

    def check(self, now: float) -> None:
        """What the sweep does: free a long poll that nobody waits for, end what takes too long."""
        if self.phase == WORKING:
            if self.waiting is not None and self.is_gone():
                give_up(self.waiting)
        elif now < self.deadline:
            return
        elif self.phase == IDLE:
            self._limit(CLOSING, LINGER_SECONDS)  # Python 3.10 waits for ever for the end of TLS
            self.writer.close()
        elif self.phase == READING:
            self.reader.set_exception(malformed("it took too long", 408))
        else:
            self.abort()

    def abort(self) -> None:
        """Hang up at once; what has not been sent is lost."""
        self.phase, self.deadline = CLOSING, math.inf
        self.writer.transport.abort()

    async def _linger(self) -> None:
        """Say that nothing more will come, and read on for a moment.

        Trap: to close a socket with unread bytes resets it, and the reset can overtake the answer.
        """
        if self.writer.can_write_eof():
            self.writer.write_eof()
        self._limit(CLOSING, LINGER_SECONDS)
        with contextlib.suppress(MatrixError):  # a timeout that has been answered is raised again
            while await self.reader.read(READ_BYTES):
                pass

    async def close(self) -> None:
        """Close after what is in the buffer has been sent, if that does not take too long."""
        self._limit(CLOSING, WRITE_SECONDS)
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except asyncio.CancelledError:
            self.abort()  # the server stops, and has waited long enough
            raise


# ── 12.6  Listening ──────────────────────────────────────────────────────────


def open_listeners(address: str, port: int) -> list[socket.socket]:
    """Listening sockets for an address or host name ("::" takes IPv4 too), or a Unix socket's path.

    That is for owner and group; one left behind by a crash is replaced.
    """
    if not address.startswith("/"):
        both = address == "::" and socket.has_dualstack_ipv6()
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return [
            socket.create_server((place[0], port), family=family, backlog=1024, dualstack_ipv6=both)
            for family, _, _, _, place in found
        ]
    if Path(address).is_socket():
        Path(address).unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    Path(address).chmod(0o660)
    listener.listen(1024)
    return [listener]


def tls_context(certs: Path, key: Path) -> ssl.SSLContext:
    """What TLS needs to serve with this certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certs, key)
    context.set_alpn_protocols(["http/1.1"])
    return context


def connection_limit() -> int:
    """How many connections to allow, after asking the system for as many files as that takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_FILES
    files = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    return max(16, files - RESERVED_FILES)


class HttpServer:
    """Listens, accepts, and keeps all connections; `handler` turns requests into responses.

    `before_response` is awaited before each answer: when it returns, whatever the answer depends
    on is on the disk.
    """

    def __init__(
        self,
        handler: Callable[[Request], Awaitable[Response]],
        *,
        max_request_size: int,
        trusted_proxies: Sequence[Network] = (),
        before_response: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.handler = handler
        self.max_request_size = max_request_size
        self.trusted_proxies = trusted_proxies
        self.before_response = before_response
        self.stopping = False
        self.names: list[str] = []  # where it listens: URLs, or the path of the socket
        self.tls: ssl.SSLContext | None = None  # of new connections
        self._limit = connection_limit()
        self._listeners: dict[socket.socket, asyncio.Task[None]] = {}
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._sweep: asyncio.Handle | None = None

    async def answer(self, request: Request) -> Response:
        """The handler's response, or the error it raised."""
        try:
            return await self.handler(request)
        except Exception as error:
            return failure_response(request, error)

    def is_trusted(self, peer: str) -> bool:
        """Whether a proxy at this address is believed; on a Unix socket there is no one else."""
        return not peer or any(parse_address(peer) in network for network in self.trusted_proxies)

    async def listen(self, address: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Begin to serve on an address and port, or on a Unix socket when the address is a path."""
        self.tls = tls
        for listener in open_listeners(address, port):
            listener.setblocking(False)
            place = listener.getsockname()
            host = f"[{place[0]}]" if ":" in place[0] else place[0]
            url = f"{'https' if tls else 'http'}://{host}:{place[1]}"
            self.names.append(place if isinstance(place, str) else url)
            self._listeners[listener] = asyncio.create_task(self._accept(listener))

    async def _accept(self, listener: socket.socket) -> None:
        """Take in connections, one a round of the loop, so that a flood of them starves nobody."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, place = await loop.sock_accept(listener)
            except OSError as error:  # the client has gone already, or no descriptor is left
                log_http.warning("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(0 if error.errno == errno.ECONNABORTED else 1)
                continue
            peer = plain_address(place[0]) if isinstance(place, tuple) else ""
            connection = Connection(self, peer)
            if self._has_room_for(connection):
                self._connections[connection] = loop.create_task(self._serve(sock, connection))
                self._sweep = self._sweep or loop.call_soon(self._check_all)
            else:
                sock.close()
            await asyncio.sleep(0)

    def _has_room_for(self, new: Connection) -> bool:
        """Whether there is room; if not, the connection that has been idle longest has to go."""
        rivals = list(self._connections)
        if len(rivals) < self._limit:
            rivals = [connection for connection in rivals if connection.group == new.group]
            if len(rivals) < MAX_CONNECTIONS_PER_ADDRESS or self.is_trusted(new.peer):
                return True
        idle = [connection for connection in rivals if connection.phase == IDLE]
        if not idle:
            return False
        min(idle, key=lambda connection: connection.deadline).abort()
        return True

    async def _serve(self, sock: socket.socket, connection: Connection) -> None:
        """The life of a connection, from the TLS handshake on, if there is one."""
        loop = asyncio.get_running_loop()
        connection.reader = reader = asyncio.StreamReader(limit=READ_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        timeout = HEAD_SECONDS if self.tls else None
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, sock, ssl=self.tls, ssl_handshake_timeout=timeout
            )
            connection.writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            try:
                await connection.run()
            except asyncio.CancelledError:  # the server stops, and has waited long enough
                connection.abort()
                raise
            finally:
                await connection.close()
        except OSError as error:
            log_http.debug("%s hung up: %s", connection.peer, error)
        except Exception:
            log_http.exception("a connection failed")
        finally:
            del self._connections[connection]

    def _check_all(self) -> None:
        """Once a second, as long as there are connections: see to their deadlines."""
        loop = asyncio.get_running_loop()
        again = bool(self._connections)
        self._sweep = loop.call_later(SWEEP_SECONDS, self._check_all) if again else None
        now = time.monotonic()
        for connection in list(self._connections):
            connection.check(now)

    async def stop(self, seconds: float = 4.0) -> None:
        """Accept nothing more, wake long polls, finish what is under way, hang up on the rest."""
        self.stopping = True
        for listener, task in self._listeners.items():
            task.cancel()
            listener.close()
        for path in filter(os.path.isabs, self.names):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for connection in self._connections:
            give_up(connection.waiting)
            if connection.phase == IDLE:
                connection.writer.close()
        tasks = list(self._connections.values())
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._sweep is not None:
            self._sweep.cancel()


# ═════════════════════════════════════════════════════════════════════════════
#  13. ROUTER, AUTHENTICATION, RATE LIMITS
#
#  A handler is a function with a route above it. The route says who may call,
#  how often, and with which body; all of that is checked here, in one place, so
#  that a handler begins where its own work begins.      spec: CS-API "API
#  Standards", "Client Authentication", "Rate limiting"
# ═════════════════════════════════════════════════════════════════════════════

# ── 13.1  Who asks ───────────────────────────────────────────────────────────


class Auth(Enum):
    """Who may call a route."""

    none = "anyone"
    optional = "anyone, known by a token if there is one"
    guest = "users and guests"
    user = "users"
    admin = "admins"


NONE, OPTIONAL, GUEST, USER, ADMIN = Auth


@dataclass(frozen=True, slots=True)
class Requester:
    """The user behind an access token, and the device that the token belongs to."""

    user_id: str
    nid: UserNid
    device_id: str | None
    device_nid: DeviceNid | None
    token_nid: int | None
    is_guest: bool = False
    is_admin: bool = False
    appservice: str | None = None  # the id of the application service that acts for the user


def access_token(request: Request) -> str | None:
    """The token from the Authorization header, or from the query, where old clients put it."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip(" ")
    return request.arg("access_token") or None


def check_caller(auth: Auth, requester: Requester | None) -> None:
    """Refuse who may not call a route: 401 without a token, 403 for guests and non-admins."""
    if auth in (NONE, OPTIONAL):
        return
    if requester is None:
        raise MatrixError(401, "M_MISSING_TOKEN", "Missing access token")
    if requester.is_guest and auth is not GUEST:
        raise MatrixError(403, "M_GUEST_ACCESS_FORBIDDEN", "Guests may not do this")
    if auth is ADMIN and not requester.is_admin:
        raise forbidden("Only admins of this server may do this")


# ── 13.2  What a body must look like ─────────────────────────────────────────
#
#  A schema is a literal in the shape of the JSON it describes:
#
#      {"membership": str, "reason?": str, "invite?": [str], "content": dict}
#
#  A question mark makes a member optional; null then counts as not there. The
#  values are: a type (int is no bool, float takes integers as well), ANY, a list
#  of one schema, an object of further members, {str: schema} for an object with
#  any member names, or a tuple of types of which one must fit.

ANY = object
ANY_OBJECT: dict[str, Any] = {}
STREAM: Final = "stream"  # the handler reads the body itself, block by block

JSON_TYPES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "an array",
}


def is_of_type(value: Any, kind: type) -> bool:
    """Whether a JSON value is of the type.  Trap: to Python, true is an integer."""
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def shaped_members(
    value: Json, shape: Mapping[Any, Any], prefix: str
) -> Iterator[tuple[Any, Any, str]]:
    """Each member of an object, its schema, and its name; optional ones that are null go."""
    if str in shape:
        yield from ((member, shape[str], prefix + name) for name, member in value.items())
        return
    for key, member_shape in shape.items():
        name = key.removesuffix("?")
        if name is not key and value.get(name) is None:
            value.pop(name, None)
        elif name not in value:
            raise missing_param(f"{prefix}{name} is missing")
        else:
            yield value[name], member_shape, prefix + name


def check_shape(value: Any, shape: Any, where: str = "The body") -> None:
    """Hold a JSON value against a schema: M_MISSING_PARAM or M_BAD_JSON, naming the member."""
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if isinstance(shape, (dict, list)):
        kinds = (type(shape),)
    if not any(is_of_type(value, kind) for kind in kinds):
        raise bad_json(f"{where} must be {' or '.join(JSON_TYPES[kind] for kind in kinds)}")
    if isinstance(shape, dict):
        for member in shaped_members(value, shape, "" if where == "The body" else f"{where}."):
            check_shape(*member)
    elif isinstance(shape, list):
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{index}]")


# ── 13.3  Rate limits ────────────────────────────────────────────────────────

RATE_LIMITS = {  # requests a second for ever, and how many at once after a pause
    "default": (50, 200),
    "message": (20, 100),
    "create": (0.5, 20),  # rooms and aliases
    "join": (2, 50),
    "invite": (2, 100),
    "media": (100, 500),  # opening a room shows many thumbnails at once
    "upload": (5, 100),
    "search": (2, 20),
    "login": (0.5, 20),  # wrong passwords have limits of their own, in chapter 14
    "register": (0.2, 10),
    "report": (0.2, 10),
}  # for one user; a client without a token has the same for its address
ADDRESS_SHARE = 8  # users behind one address, who share its limit
MAX_BUCKETS = 20_000


class RateLimiter:
    """Token buckets, each kept as one number: the time at which it will be full again."""

    def __init__(self) -> None:
        self._full_at: dict[tuple[str, int | str], float] = {}

    def check(self, limit: str, who: int | str, share: int = 1) -> None:
        """Count one request of a user or an address; 429 if it comes too soon."""
        rate, burst = RATE_LIMITS[limit]
        now = time.monotonic()
        key = (limit, who)
        full_at = max(self._full_at.get(key, now), now)
        wait = full_at - now - (burst - 1 / share) / rate
        if wait > 0:
            raise limit_exceeded(math.ceil(wait * 1000))
        self._full_at[key] = full_at + 1 / (rate * share)
        if len(self._full_at) > MAX_BUCKETS:  # drop the full ones, then those that came first
            live = [(key, full_at) for key, full_at in self._full_at.items() if full_at > now]
            self._full_at = dict(live[-MAX_BUCKETS // 2 :])


# ── 13.4  Routes ─────────────────────────────────────────────────────────────

Handler = Callable[..., Awaitable[Any]]  # (hs, request, **path parameters) -> Json or Response

MAX_JSON_BODY = 4_194_304  # of somebody known: a backup of keys, messages to many devices
MAX_ANONYMOUS_BODY = 262_144


@dataclass(frozen=True, slots=True)
class Route:
    """A handler with what the decorator says about it."""

    method: str
    paths: tuple[str, ...]
    auth: Auth
    limit: str | None
    body: Any
    handler: Handler


ROUTES: list[Route] = []
Endpoint = tuple[Route, tuple[str, ...]]  # a route and the names of the parameters in its path


VERSION_SEGMENT = re.compile(r"(?<=/)v[0-9]+(?=/)")


def all_paths(path: str, also: Iterable[str]) -> tuple[str, ...]:
    """A path with its other versions; what is at v3 is at r0 too, for old clients."""
    paths = [path, *(o if o[0] == "/" else VERSION_SEGMENT.sub(o, path, count=1) for o in also)]
    old = [re.sub("^/_matrix/(client|media)/v3/", r"/_matrix/\1/r0/", each) for each in paths]
    return tuple(dict.fromkeys(paths + old))


def route(
    method: str,
    path: str,
    *,
    auth: Auth,
    limit: str | None = "default",
    also: Iterable[str] = (),
    body: Any = None,
) -> Callable[[Handler], Handler]:
    """Make a function the handler of a path.

    `{name}` stands for one segment, `{name...}` at the end for whatever follows, nothing included.
    `also` has further versions ("v1", "unstable") or other paths; v3 comes with r0 by itself.
    Without `body` a body is not looked at; ANY_OBJECT takes any object, and nothing at all as {}.
    """
    if limit is not None and limit not in RATE_LIMITS:
        raise ValueError(f"{path}: no rate limit is called {limit}")

    def register(handler: Handler) -> Handler:
        ROUTES.append(Route(method, all_paths(path, also), auth, limit, body, handler))
        return handler

    return register


def route_table() -> str:
    """All routes, for people: method, path, who may call, limit, handler."""
    rows = sorted((path, entry.method, entry) for entry in ROUTES for path in entry.paths)
    width = max(len(path) for path, _, _ in rows)
    return "\n".join(
        f"{method:7} {path:{width}} {e.auth.name.upper():9} {e.limit or '-':9} {e.handler.__name__}"
        for path, method, e in rows
    )


class PathNode:
    """The routes below one beginning of a path."""

    __slots__ = ("children", "endpoints", "parameter", "rest")

    def __init__(self) -> None:
        self.children: dict[str, PathNode] = {}
        self.parameter: PathNode | None = None
        self.endpoints: dict[str, Endpoint] = {}  # by method, of the path that ends here
        self.rest: dict[str, Endpoint] = {}  # of paths that may go on as they like

    def add(self, entry: Route, path: str) -> None:
        """Make a route reachable by a path."""
        node, names, endpoints = self, [], None
        for segment in path[1:].split("/"):
            if segment.endswith("...}"):
                names.append(segment[1:-4])
                endpoints = node.rest
            elif segment.startswith("{"):
                names.append(segment[1:-1])
                node.parameter = node = node.parameter or PathNode()
            else:
                node = node.children.setdefault(segment, PathNode())
        endpoints = node.endpoints if endpoints is None else endpoints
        if entry.method in endpoints:
            raise ValueError(f"two handlers for {entry.method} {path}")
        endpoints[entry.method] = (entry, tuple(names))

    def find(self, segments: list[str], at: int, method: str) -> tuple[Endpoint, list[str]] | None:
        """The endpoint for the segments from `at` on, with the parameters from last to first.

        A literal segment goes before a parameter, and a parameter before `{name...}`.
        """
        if at == len(segments):
            endpoint = self.endpoints.get(method)
            if endpoint is not None:
                return endpoint, []
        else:
            child = self.children.get(segments[at])
            found = child.find(segments, at + 1, method) if child is not None else None
            if found is None and self.parameter is not None and segments[at]:
                found = self.parameter.find(segments, at + 1, method)
                if found is not None:
                    found[1].append(segments[at])
            if found is not None:
                return found
        endpoint = self.rest.get(method)
        return None if endpoint is None else (endpoint, ["/".join(segments[at:])])


# ── 13.5  From a request to its handler ──────────────────────────────────────

METHODS = ("GET", "PUT", "POST", "DELETE", "PATCH")
PREFLIGHT = Response(204, headers={"Access-Control-Max-Age": "86400"})


class Router:
    """Finds the handler of a request, and calls it when everything that its route demands is met.

    `authenticate` is set by the composition root: it knows tokens, which are a later chapter's.
    """

    authenticate: Callable[[Request, str], Requester]

    def __init__(self, hs: Homeserver, routes: Iterable[Route] = ROUTES) -> None:
        self.hs = hs
        self.limiter = RateLimiter()
        self._root = PathNode()
        for entry in routes:
            for path in entry.paths:
                self._root.add(entry, path)

    async def dispatch(self, request: Request) -> Response:
        """Answer one request; what goes wrong is raised as a MatrixError."""
        method = request.method
        if method == "OPTIONS":
            return PREFLIGHT
        found = self._root.find(request.segments, 0, "GET" if method == "HEAD" else method)
        if found is None:
            return self._unrecognized(request)
        (entry, names), values = found
        self._admit(request, entry)
        await self._read_body(request, entry)
        if request.requester is not None:  # the session may have ended while the body came
            request.requester = self.authenticate(request, access_token(request) or "")
            check_caller(entry.auth, request.requester)
        values.reverse()
        lost = self.hs.db.lost
        result = await entry.handler(self.hs, request, **dict(zip(names, values, strict=True)))
        if self.hs.db.lost != lost and method not in {"GET", "HEAD"}:  # perhaps a part of this
            raise MatrixError(507, "M_UNKNOWN", "The server could not store all of this; try again")
        return result if isinstance(result, Response) else Response(200, encode_json(result))

    def _admit(self, request: Request, entry: Route) -> None:
        """Find out who asks, and whether they may, and whether they may already again."""
        limit = entry.limit if self.hs.config.rate_limit else None
        anonymous = entry.auth is NONE
        if limit is not None:
            share = 1 if anonymous else ADDRESS_SHARE
            self.limiter.check(limit, address_group(request.address), share)
        if anonymous:
            return
        token = access_token(request)
        request.requester = self.authenticate(request, token) if token else None
        check_caller(entry.auth, request.requester)
        if limit is not None and request.requester is not None:
            self.limiter.check(limit, request.requester.nid)

    async def _read_body(self, request: Request, entry: Route) -> None:
        """Read and check the body, as the route wants it."""
        if entry.body is None:
            await request.stream.read(MAX_DRAIN)
        elif entry.body is not STREAM:
            known = request.requester is not None
            raw = await request.stream.read(MAX_JSON_BODY if known else MAX_ANONYMOUS_BODY)
            request.json = parse_json(raw) if raw else {}
            check_shape(request.json, entry.body)

    def _unrecognized(self, request: Request) -> Response:
        """404 for a path that nobody handles, 405 for one with other methods."""
        allowed = [m for m in METHODS if self._root.find(request.segments, 0, m) is not None]
        if not allowed:
            raise MatrixError(404, "M_UNRECOGNIZED", "Unrecognized request")
        response = error_response(MatrixError(405, "M_UNRECOGNIZED", "Not with this method"))
        response.headers = {"Allow": ", ".join(allowed)}
        return response


# ╔═══════════════════════════════════════════════════════════════════════════╗
# ║  PART IV   CLIENTS                                                        ║
# ╚═══════════════════════════════════════════════════════════════════════════╝
#
# The client-server API, a chapter for each thing a client works with: who it
# is, what it keeps about itself, rooms, what was read, keys, sync, media, and
# how people and rooms are found.
#
# Two ideas carry this part. First, a handler is a function from a checked
# request to a JSON object; what it changed is stamped by the one stream, and
# sync is nothing but a question about stamps. Second, chapters below never call
# chapters above: who wants to know that a device is gone or a profile changed
# subscribes, so each chapter keeps its own tables and nobody else writes them.


# ═════════════════════════════════════════════════════════════════════════════
#  14. ACCOUNTS, DEVICES, LOGINS
#
#  Who somebody is, and how they prove it: a password hash per account, a device
#  per login, and tokens of which the database knows only the hash. Everything
#  that could be guessed has a budget of tries, which runs dry for the guesser
#  and not for the owner.       spec: CS-API "Client authentication", "Legacy API"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE accounts (
    user_nid INTEGER PRIMARY KEY,
    password_hash TEXT,              -- Argon2id with its parameters; NULL: no login by password
    created_ts INTEGER NOT NULL,
    is_admin INTEGER NOT NULL DEFAULT 0,
    is_guest INTEGER NOT NULL DEFAULT 0,
    deactivated INTEGER NOT NULL DEFAULT 0,
    locked INTEGER NOT NULL DEFAULT 0,
    suspended INTEGER NOT NULL DEFAULT 0,
    erased INTEGER NOT NULL DEFAULT 0,  -- the position at which erasure was asked for
    behind INTEGER NOT NULL DEFAULT 0  -- changes that the member events still have to follow
);
CREATE INDEX accounts_behind ON accounts (behind) WHERE behind > 0;
CREATE INDEX accounts_suspended ON accounts (suspended) WHERE suspended > 0;
CREATE INDEX accounts_erased ON accounts (erased) WHERE erased > 0;
CREATE TABLE devices (
    device_nid INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice
    user_nid INTEGER NOT NULL,
    device_id TEXT NOT NULL,
    display_name TEXT,
    last_seen_ip TEXT,
    last_seen_ts INTEGER,
    UNIQUE (user_nid, device_id)
);
CREATE TABLE tokens (  -- an access token and the refresh token that came with it
    token_nid INTEGER PRIMARY KEY AUTOINCREMENT,
    access_hash BLOB NOT NULL UNIQUE,
    refresh_hash BLOB UNIQUE,        -- NULL: the client does not refresh
    user_nid INTEGER NOT NULL,
    device_nid INTEGER NOT NULL,
    expires_ts INTEGER,              -- of the access token; NULL: never
    replaces INTEGER,                -- the pair this one came from, until one of this pair is used
    spent INTEGER NOT NULL DEFAULT 0 -- a newer pair is in use; kept to answer with soft_logout
);
CREATE INDEX tokens_of_device ON tokens (user_nid, device_nid);
CREATE TABLE txns (
    device_nid INTEGER NOT NULL,     -- or minus the user_nid, for a user without a device
    txn_key BLOB NOT NULL,           -- hash of scope and transaction id
    result TEXT NOT NULL,
    created_ts INTEGER NOT NULL,
    PRIMARY KEY (device_nid, txn_key)
) WITHOUT ROWID;
CREATE TABLE openid_tokens (token_hash BLOB PRIMARY KEY, user_nid INTEGER, expires_ts INTEGER);
CREATE INDEX openid_tokens_expiry ON openid_tokens (expires_ts);
""")
invariant(
    "tokens of devices that are gone",
    "SELECT token_nid FROM tokens WHERE device_nid NOT IN (SELECT device_nid FROM devices)",
)
invariant(
    "devices of deactivated accounts",
    "SELECT device_nid FROM devices JOIN accounts USING (user_nid) WHERE deactivated = 1",
)

V3 = "/_matrix/client/v3"

ACCESS_TOKEN_LIFETIME_MS = 3_600_000  # of tokens that can be refreshed; others live until logout
TXN_LIFETIME_MS = 3 * 86_400_000
OPENID_SECONDS = 3600
MAX_PASSWORD_BYTES = 512
BOT_LOCALPART = "conduit"

log_accounts = logging.getLogger("conduit.accounts")

# ── 14.1  Passwords ──────────────────────────────────────────────────────────

PASSWORD_PASSES = 2
PASSWORD_MEMORY = 19 * 1024 * 1024  # bytes; OWASP's minimum, as a Pi has to carry two at a time
HASH_PREFIX = "$argon2id$v=19$m=19456,t=2,p=1$"  # of hashes with these parameters
NO_PASSWORD = f"{HASH_PREFIX}kqSz/Yxm/P6jFtDUxsQg4g$VNh+c6XDd3tD2H5GfC9FD0lg/xKj5jdoflziLmgHMwk"


def hash_password(password: str) -> str:
    """Argon2id hash with salt and parameters in it; 25 ms and 19 MiB, so never on the loop."""
    raw = nacl.pwhash.argon2id.str(password.encode(), PASSWORD_PASSES, PASSWORD_MEMORY)
    return raw.decode("ascii")


def matches_hash(stored: str, password: str) -> bool:
    """Whether this is the password of the hash; for threads, as above."""
    try:
        return nacl.pwhash.argon2id.verify(stored.encode(), password.encode())
    except nacl.exceptions.InvalidkeyError:
        return False


def check_new_password(password: str) -> None:
    """Refuse what cannot be a password; how good it is, the client has to judge."""
    if not password:
        raise MatrixError(400, "M_WEAK_PASSWORD", "The password is empty")
    if byte_length(password) > MAX_PASSWORD_BYTES:
        raise invalid_param(f"The password is longer than {MAX_PASSWORD_BYTES} bytes")


# ── 14.2  Budgets for guesses ────────────────────────────────────────────────


GuessKey = tuple[str, ...]  # the budget's name, and whose it is
BUDGETS: Final = {  # how many wrong tries are free, and after how many seconds one comes back
    "pair": (10, 30.0),  # one address at one account
    "address": (50, 10.0),  # one address at all accounts
    "account": (100, 6.0),  # all addresses that the account does not know
    "token": (10, 30.0),  # one address at registration tokens
    "mail": (5, 900.0),  # messages to one e-mail address, whoever asks for them
}
FREE_TRIES = 3  # an address new to an account has these, however much others guess


class GuessLimiter:
    """Counts wrong tries; a budget refills with time, so that nobody is locked out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: LruCache[GuessKey, float] = LruCache(20_000)  # when it will be full again

    def _spent(self, key: GuessKey) -> float:
        """How many tries of the budget are used up now."""
        missing = (self._full_at.get(key) or 0.0) - self._clock()
        return max(0.0, missing / BUDGETS[key[0]][1])

    def take(self, keys: Iterable[GuessKey]) -> None:
        """Pay for one try before it is looked at, or 429 with the time until there is one."""
        for key in keys:
            tries, seconds = BUDGETS[key[0]]
            wait = (self._spent(key) + 1 - tries) * seconds
            if wait > 0:
                raise limit_exceeded(int(wait * 1000) + 1, "Too many failed attempts")
        self.refund(keys, -1)

    def refund(self, keys: Iterable[GuessKey], tries: int = 1) -> None:
        """The try was right: it costs nothing."""
        for key in keys:
            spent = max(0.0, self._spent(key) - tries)
            self._full_at.put(key, self._clock() + spent * BUDGETS[key[0]][1])

    def login_keys(self, user_id: str, address: str, known: bool) -> list[GuessKey]:
        """Whose budgets a try at a password takes from.

        An address from which the account was used before pays for itself alone, and one that is
        new to it may try a few times first: however long a thousand others guess, they use up
        nothing that the owner needs.
        """
        group = address_group(address)
        pair: GuessKey = ("pair", user_id, group)
        if known:
            return [pair]
        shared = [("account", user_id)] if self._spent(pair) >= FREE_TRIES else []
        return [pair, ("address", group), *shared]


# ── 14.3  Tokens and devices ─────────────────────────────────────────────────


class ShortLived(Generic[CacheValue]):
    """Values under random names, each forgotten after some seconds, and by a restart."""

    def __init__(self, seconds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._values: LruCache[str, tuple[CacheValue, float]] = LruCache(5_000)

    def add(self, value: CacheValue) -> str:
        """The name under which the value is found."""
        name = random_token()
        self._values.put(name, (value, self._clock() + self.seconds))
        return name

    def get(self, name: str | None) -> CacheValue | None:
        """The value, or None if the name is unknown or its time is over."""
        found = self._values.get(name or "")
        return found[0] if found is not None and found[1] > self._clock() else None

    def live(self) -> list[CacheValue]:
        """All values whose time is not over."""
        return [value for value, until in self._values.values() if until > self._clock()]

    def pop(self, name: str) -> CacheValue | None:
        """The value, for the last time."""
        value = self.get(name)
        self._values.pop(name)
        return value


class Account(NamedTuple):
    """A row of accounts."""

    nid: UserNid
    password_hash: str | None
    is_admin: bool
    is_guest: bool
    deactivated: bool
    locked: bool
    suspended: bool
    erased: bool


Session = tuple[Requester, DeviceNid, int | None, bool]  # who, until when, whether locked
DeviceChanged = Callable[[UserNid, DeviceNid, str], None]  # user, device, device id
LOGOUT_PATH = re.compile(r"/_matrix/client/(?:v3|r0)/logout(?:/all)?")
DEVICE_TEXT = re.compile(r"[^\x00-\x1f\x7f]{0,100}")


def check_device_texts(fields: Json) -> None:
    """Refuse ids and display names of devices that are long or could hide something."""
    for name in ("device_id", "initial_device_display_name", "display_name"):
        if not DEVICE_TEXT.fullmatch(fields.get(name) or ""):
            raise invalid_param(f"{name} has at most 100 characters, and all printable")


def token_hash(token: str) -> bytes:
    """What the database keeps of a token; it carries 256 random bits, so a fast hash will do."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def unknown_token(*, soft_logout: bool = False) -> MatrixError:
    """401 M_UNKNOWN_TOKEN; with soft_logout the client keeps its keys and may log in again."""
    text = "The access token has expired" if soft_logout else "Unrecognised access token"
    return MatrixError(401, "M_UNKNOWN_TOKEN", text, soft_logout=soft_logout)


def user_locked() -> MatrixError:
    """401 M_USER_LOCKED.  Spec: "Account locking"."""
    return MatrixError(401, "M_USER_LOCKED", "This account has been locked", soft_logout=True)


def local_user_id(hs: Homeserver, username: str) -> str:
    """The user id that a wanted user name makes; 400 M_INVALID_USERNAME.

    Trap: upper case is mapped to lower case, so that nobody can be Alice beside alice; but only of
    ASCII, as the lower case of the Kelvin sign is a k. A dot at an end is easily overlooked.
    """
    localpart = username.lower() if username.isascii() else username
    user_id = f"@{localpart}:{hs.config.server_name}"
    if not LOCALPART.fullmatch(localpart) or localpart.strip(".") != localpart:
        text = "A user name consists of a-z, 0-9 and . _ = - / +, without a dot at the ends"
        raise MatrixError(400, "M_INVALID_USERNAME", text)
    if byte_length(user_id) > MAX_ID_BYTES:
        raise MatrixError(400, "M_INVALID_USERNAME", "This user name is too long")
    return user_id


class Sessions:
    """Who has an account, on which devices they are logged in, and with which tokens."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self.db = hs.db
        capacity = int(10_000 * hs.config.conduit_cache_capacity_modifier)
        self._sessions: LruCache[bytes, Session] = LruCache(capacity)
        self._seen: dict[DeviceNid, tuple[str, int]] = {}  # address and time, not yet written
        self._expired_ts = 0
        self._device_deleted: list[DeviceChanged] = []
        self._device_renamed: list[DeviceChanged] = []
        self.on_device_deleted = self._device_deleted.append  # called before it is deleted
        self.on_device_renamed = self._device_renamed.append
        hs.db.on_reset(self._sessions.clear)

    def get(self, nid: UserNid) -> Account | None:
        """The account of a user, or None if they have none here."""
        row = self.db.one(
            """
            SELECT user_nid, password_hash, is_admin, is_guest, deactivated, locked, suspended,
                erased
            FROM accounts
            WHERE user_nid = ?
            """,
            (nid,),
        )
        return None if row is None else Account(row[0], row[1], *map(bool, row[2:]))

    # Tokens

    def authenticate(self, request: Request, token: str) -> Requester:
        """Who holds this access token; 401 M_UNKNOWN_TOKEN or M_USER_LOCKED."""
        key, now = token_hash(token), now_ms()
        session = self._sessions.get(key)
        if session is None:
            session = self._read_session(key, is_refresh=False)
            self._sessions.put(key, session)
        requester, device_nid, expires_ts, locked = session
        if expires_ts is not None and expires_ts <= now:
            raise unknown_token(soft_logout=True)
        if locked and not LOGOUT_PATH.fullmatch(request.path):
            raise user_locked()
        self._seen[device_nid] = (request.address, now)
        return requester

    def _read_session(self, key: bytes, *, is_refresh: bool) -> Session:
        """The session of an access or a refresh token; its first use ends the pair before it."""
        row = self.db.one(
            """
            SELECT token_nid, user_nid, device_nid, device_id, expires_ts, replaces, spent
            FROM tokens
            JOIN devices USING (user_nid, device_nid)
            WHERE (access_hash = :key AND NOT :is_refresh)
                OR (refresh_hash = :key AND :is_refresh)
            """,
            {"key": key, "is_refresh": is_refresh},
        )
        account = self.get(row[1]) if row else None
        if row is None or account is None or account.deactivated:
            raise unknown_token()
        token_nid, nid, device_nid, device_id, expires_ts, replaces, spent = row
        if spent:
            raise unknown_token(soft_logout=True)
        if replaces is not None:
            self._end_older_pairs(nid, device_nid, token_nid, replaces)
        rights = account.is_guest, account.is_admin
        user_id = self.db.user_id(nid)
        requester = Requester(user_id, nid, device_id, device_nid, token_nid, *rights)
        return requester, device_nid, expires_ts, account.locked

    def _end_older_pairs(
        self, nid: UserNid, device_nid: DeviceNid, token_nid: int, replaced: int
    ) -> None:
        """Make a refreshed pair the only one; whoever holds the one before gets a soft logout."""
        self._forget_sessions(nid)
        with self.db.write():
            self.db.execute("UPDATE tokens SET spent = 1 WHERE token_nid = ?", (replaced,))
            self.db.execute("UPDATE tokens SET replaces = NULL WHERE token_nid = ?", (token_nid,))
            self.db.execute(
                """
                DELETE FROM tokens
                WHERE user_nid = ? AND device_nid = ? AND token_nid NOT IN (?, ?)
                """,
                (nid, device_nid, token_nid, replaced),
            )

    def refresh(self, refresh_token: str) -> Json:
        """A new pair of tokens; the old one stays good until one of the new is used.

        Spec: "Refreshing access tokens".
        """
        session = self._read_session(token_hash(refresh_token), is_refresh=True)
        requester, device_nid, _, locked = session
        if locked:
            raise user_locked()
        return self._issue_tokens(requester.nid, device_nid, True, requester.token_nid)

    def _issue_tokens(
        self,
        nid: UserNid,
        device_nid: DeviceNid,
        refreshable: bool,
        replaced: int | None = None,
        expires_ts: int | None = None,
    ) -> Json:
        answer: Json = {"access_token": random_token()}
        refresh_hash = None
        if refreshable:
            answer["refresh_token"] = random_token()
            answer["expires_in_ms"] = ACCESS_TOKEN_LIFETIME_MS
            refresh_hash = token_hash(answer["refresh_token"])
            expires_ts = now_ms() + ACCESS_TOKEN_LIFETIME_MS
        access_hash = token_hash(answer["access_token"])
        with self.db.write():
            self.db.execute(
                """
                INSERT INTO tokens
                    (access_hash, refresh_hash, user_nid, device_nid, expires_ts, replaces)
                VALUES (?, ?, ?, ?, ?, ?)
                """,
                (access_hash, refresh_hash, nid, device_nid, expires_ts, replaced),
            )
        return answer

    def _end_tokens(self, nid: UserNid, device_nid: DeviceNid) -> None:
        self._forget_sessions(nid)
        device = (nid, device_nid)
        self.db.execute("DELETE FROM tokens WHERE user_nid = ? AND device_nid = ?", device)

    def _forget_sessions(self, nid: UserNid) -> None:
        for (key,) in self.db.all("SELECT access_hash FROM tokens WHERE user_nid = ?", (nid,)):
            self._sessions.pop(key)

    # Devices

    def log_in(
        self, nid: UserNid, address: str, fields: Json, expires_ts: int | None = None
    ) -> Json:
        """The answer of /login or /register: a session as the fields of their body want it.

        The older tokens of a device end.  Spec: "Relationship between access tokens and devices".
        """
        device_id = fields.get("device_id") or random_token(10).upper()
        name = fields.get("initial_device_display_name")
        with self.db.write():
            device_nid = self.add_device(nid, device_id, name, address)
            self._end_tokens(nid, device_nid)
            refreshable = fields.get("refresh_token") is True
            tokens = self._issue_tokens(nid, device_nid, refreshable, None, expires_ts)
        self._seen[device_nid] = (address, now_ms())
        answer = {"user_id": self.db.user_id(nid), "device_id": device_id, **tokens}
        return {**answer, "home_server": self.hs.config.server_name}

    def add_device(
        self, nid: UserNid, device_id: str, name: str | None, address: str | None = None
    ) -> DeviceNid:
        """A device, made if it is not there; inside a write block."""
        seen_ts = None if address is None else now_ms()
        self.db.execute(
            """
            INSERT OR IGNORE INTO devices
                (user_nid, device_id, display_name, last_seen_ip, last_seen_ts)
            VALUES (?, ?, ?, ?, ?)
            """,
            (nid, device_id, name, address, seen_ts),
        )
        return cast(DeviceNid, self.find_device(nid, device_id))

    def find_device(self, nid: UserNid, device_id: str) -> DeviceNid | None:
        """The integer of a user's device, or None."""
        sql = "SELECT device_nid FROM devices WHERE user_nid = ? AND device_id = ?"
        return cast("DeviceNid | None", self.db.value(sql, (nid, device_id)))

    def check_logged_in(self, requester: Requester) -> None:
        """401 for a device that was logged out, or a user locked, while the request waited."""
        nid, device_nid = requester.nid, requester.device_nid
        account = self.get(nid)
        if account is not None and account.locked:
            raise user_locked()
        if device_nid is not None and self.find_device(nid, str(requester.device_id)) != device_nid:
            raise unknown_token()

    def devices(self, nid: UserNid) -> list[Json]:
        """All devices of a user as /devices shows them to their owner."""
        self.flush_last_seen()
        rows = self.db.all(
            """
            SELECT device_id, display_name, last_seen_ip, last_seen_ts
            FROM devices
            WHERE user_nid = ?
            ORDER BY device_nid
            """,
            (nid,),
        )
        names = ("device_id", "display_name", "last_seen_ip", "last_seen_ts")
        return [{k: v for k, v in zip(names, row, strict=True) if v is not None} for row in rows]

    def rename_device(self, nid: UserNid, device_id: str, name: str | None) -> None:
        """Give a device another display name, if one is given. 404 when there is no such device."""
        device_nid = self.find_device(nid, device_id)
        if device_nid is None:
            raise not_found("You have no device with this id")
        if name is None:
            return
        with self.db.write():
            sql = "UPDATE devices SET display_name = ? WHERE device_nid = ?"
            self.db.execute(sql, (name, device_nid))
            for callback in self._device_renamed:
                callback(nid, device_nid, device_id)

    def delete_devices(self, nid: UserNid, device_ids: Iterable[str]) -> None:
        """Log out devices; ids of none are no error."""
        with self.db.write():
            for device_id in set(device_ids):
                device_nid = self.find_device(nid, device_id)
                if device_nid is None:
                    continue
                for callback in self._device_deleted:
                    callback(nid, device_nid, device_id)
                self._end_tokens(nid, device_nid)
                self._seen.pop(device_nid, None)
                self.db.execute("DELETE FROM txns WHERE device_nid = ?", (device_nid,))
                self.db.execute("DELETE FROM devices WHERE device_nid = ?", (device_nid,))

    def log_out_everywhere(self, nid: UserNid, *, keep: DeviceNid | None = None) -> None:
        """Log out all devices of a user, but the one to keep."""
        rows = self.db.all("SELECT device_nid, device_id FROM devices WHERE user_nid = ?", (nid,))
        self.delete_devices(
            nid, [device_id for device_nid, device_id in rows if device_nid != keep]
        )

    # Maintenance

    def flush_last_seen(self) -> None:
        """Write down where devices were seen since the last time, for each every five minutes."""
        seen, self._seen = self._seen, {}
        with self.db.write() if seen else contextlib.nullcontext():
            for device_nid, (address, seen_ts) in seen.items():
                self.db.execute(
                    """
                    UPDATE devices
                    SET last_seen_ip = :address, last_seen_ts = :seen
                    WHERE device_nid = :device
                        AND (last_seen_ip IS NOT :address OR last_seen_ts < :seen - 300000)
                    """,
                    {"address": address, "seen": seen_ts, "device": device_nid},
                )

    async def expire(self) -> None:
        """Once an hour, delete transactions that have had their time, device by device."""
        if now_ms() - self._expired_ts < 3_600_000:
            return
        self._expired_ts = now_ms()
        with self.db.write():
            self.db.execute("DELETE FROM openid_tokens WHERE expires_ts < ?", (now_ms(),))
        for (device_nid,) in self.db.all("SELECT device_nid FROM devices"):
            old = (device_nid, now_ms() - TXN_LIFETIME_MS)
            with self.db.write():
                self.db.execute("DELETE FROM txns WHERE device_nid = ? AND created_ts < ?", old)
            await asyncio.sleep(0)


# ── 14.4  Making, changing and ending accounts ───────────────────────────────

SET_MARK = {
    "locked": "UPDATE accounts SET locked = ? WHERE user_nid = ?",
    "suspended": "UPDATE accounts SET suspended = ? WHERE user_nid = ?",
}


class Accounts(Sessions):
    """How accounts are made, changed and ended; callbacks come inside the write block of that.

    Chapters below set how a new account is named, and what a member event repeats of a profile.
    """

    name_account: Callable[[UserNid, str], None]
    member_content: Callable[[UserNid, Json], Json]
    has_tokens: Callable[[], bool]  # whether there are registration tokens beside the configured

    def __init__(self, hs: Homeserver) -> None:
        super().__init__(hs)
        self.bot_id = f"@{BOT_LOCALPART}:{hs.config.server_name}"
        self.guesses = GuessLimiter()
        self.uia: ShortLived[UiaSession] = ShortLived(900)
        self.uia_key = secrets.token_bytes(32)
        self.nonces: ShortLived[bool] = ShortLived(60)
        self.login_tokens: ShortLived[tuple[UserNid, str | None]] = ShortLived(120)
        self.suspended: set[str] = set()
        self.erased: dict[str, int] = {}  # user id → the position of the erasure
        self._hashing = asyncio.Semaphore(2)  # since each takes 19 MiB
        self._admin_token = random_token()
        self._created: list[Callable[[UserNid], None]] = []
        self._registered: list[Callable[[UserNid, UiaSession], None]] = []
        self._deactivated: list[Callable[[UserNid], None]] = []
        self.on_account_created = self._created.append
        self.on_registered = self._registered.append  # with what was proved for the account
        self.on_deactivated = self._deactivated.append
        self._read_marks()
        hs.db.on_reset(self._read_marks)

    def start(self) -> None:
        """Go on with what the last stop interrupted."""
        for (nid,) in self.db.all("SELECT user_nid FROM accounts WHERE behind > 0"):
            self.hs.background(self._update_rooms(nid))

    def _read_marks(self) -> None:
        """Read who is suspended or erased, which is asked for with each event."""
        suspended = self.db.all("SELECT user_nid FROM accounts WHERE suspended > 0")
        erased = self.db.all("SELECT user_nid, erased FROM accounts WHERE erased > 0")
        self.suspended.clear()
        self.suspended.update(self.db.user_id(nid) for (nid,) in suspended)
        self.erased.clear()
        self.erased.update((self.db.user_id(nid), position) for nid, position in erased)

    # Questions

    def find(self, user_id: str) -> Account | None:
        """The account with this user id, or None."""
        nid = self.db.find_user_nid(user_id)
        return None if nid is None else self.get(nid)

    def exists_local(self, user_id: str) -> bool:
        """Whether there is, or was, an account of this name."""
        return self.find(user_id) is not None

    def is_active(self, user_id: str) -> bool:
        """Whether there is an account of this name that was not deactivated."""
        account = self.find(user_id)
        return account is not None and not account.deactivated

    def is_admin(self, nid: UserNid) -> bool:
        """Whether the user administers this server; this flag, not a room, says so."""
        account = self.get(nid)
        return account is not None and account.is_admin

    def list_local_users(self) -> list[str]:
        """The ids of all active accounts, guests left out, in alphabetical order."""
        rows = self.db.all(
            """
            SELECT users.user_id
            FROM accounts
            JOIN users USING (user_nid)
            WHERE deactivated = 0 AND is_guest = 0
            ORDER BY users.user_id
            """
        )
        return [row[0] for row in rows]

    def has_users(self) -> bool:
        """Whether anybody has an account but the server's own bot and guests."""
        bot_nid = self.db.find_user_nid(self.bot_id)
        sql = "SELECT 1 FROM accounts WHERE is_guest = 0 AND user_nid IS NOT ? LIMIT 1"
        return self.db.one(sql, (bot_nid,)) is not None

    def first_admin_token(self) -> str | None:
        """The registration token for the very first account; None once there is one."""
        return None if self.has_users() else self._admin_token

    def check_available(self, user_id: str) -> None:
        """400 M_USER_IN_USE or M_EXCLUSIVE for a user id that cannot be had."""
        if user_id == self.bot_id:
            raise MatrixError(400, "M_EXCLUSIVE", "This user name is reserved")
        if self.exists_local(user_id):
            raise MatrixError(400, "M_USER_IN_USE", "This user name is taken")

    # Making and changing

    def make_account(
        self, user_id: str, password_hash: str | None = None, *, name: str = "", role: str = "user"
    ) -> UserNid:
        """Make the account of a user, an admin or a guest. 400 M_USER_IN_USE."""
        if self.exists_local(user_id):
            raise MatrixError(400, "M_USER_IN_USE", "This user name is taken")
        nid = self.db.user_nid(user_id)
        bolt = " ⚡️" if self.hs.config.enable_lightning_bolt else ""
        with self.db.write():
            self.db.execute(
                """
                INSERT INTO accounts (user_nid, password_hash, created_ts, is_admin, is_guest)
                VALUES (?, ?, ?, ?, ?)
                """,
                (nid, password_hash, now_ms(), role == "admin", role == "guest"),
            )
            if role != "guest":
                self.name_account(nid, name or user_id[1:].partition(":")[0] + bolt)
            for callback in self._created:
                callback(nid)
        log_accounts.info("new account %s, %s", user_id, role)
        return nid

    def create_server_account(self, localpart: str, name: str) -> UserNid:
        """Make the account of the server itself, which has no password."""
        return self.make_account(f"@{localpart}:{self.hs.config.server_name}", name=name)

    async def create_account(
        self, username: str, password: str, *, name: str = "", role: str = "user"
    ) -> UserNid:
        """Make an account for a wanted user name, without asking; 400 as for registration."""
        user_id = local_user_id(self.hs, username)
        self.check_available(user_id)
        check_new_password(password)
        return self.make_account(user_id, await self.hash(password), name=name, role=role)

    def upgrade_guest(self, nid: UserNid, password_hash: str, *, is_admin: bool) -> None:
        """Make a guest a user with a password."""
        with self.db.write():
            sql = "UPDATE accounts SET password_hash = ?, is_guest = 0 WHERE user_nid = ?"
            self.db.execute(sql, (password_hash, nid))
            self.set_admin(nid, is_admin)
            for callback in self._created:
                callback(nid)

    def registered(self, nid: UserNid, proved: UiaSession) -> None:
        """Tell what somebody proved for their new account; whoever hears of it may still object."""
        for callback in self._registered:
            callback(nid, proved)

    def set_admin(self, nid: UserNid, is_admin: bool) -> None:
        """Make a user an administrator, or no longer."""
        with self.db.write():
            self.db.execute("UPDATE accounts SET is_admin = ? WHERE user_nid = ?", (is_admin, nid))
        self._forget_sessions(nid)

    def set_mark(self, nid: UserNid, mark: str, value: bool) -> None:
        """Lock or suspend an account, or take that back."""
        with self.db.write():
            self.db.execute(SET_MARK[mark], (value, nid))
            self._forget_sessions(nid)
            self._read_marks()
        log_accounts.info("%s: %s is now %s", self.db.user_id(nid), mark, value)

    async def set_password(
        self, nid: UserNid, password: str, *, keep: DeviceNid | None = None, log_out: bool = True
    ) -> None:
        """Give a user a new password, and end all their sessions but that of the device to keep."""
        check_new_password(password)
        password_hash = await self.hash(password)
        with self.db.write():
            sql = "UPDATE accounts SET password_hash = ? WHERE user_nid = ? AND deactivated = 0"
            self.db.execute(sql, (password_hash, nid))
            if log_out:
                self.log_out_everywhere(nid, keep=keep)

    async def deactivate(self, nid: UserNid, *, erase: bool = False) -> None:
        """End an account for good: password, devices and tokens go now, rooms in the background."""
        with self.db.write():
            self.log_out_everywhere(nid)
            self.db.execute(
                """
                UPDATE accounts
                SET password_hash = NULL, deactivated = 1, is_admin = 0, erased = ?
                WHERE user_nid = ?
                """,
                (max(1, self.hs.stream.position) if erase else 0, nid),
            )
            self._read_marks()
            for callback in self._deactivated:
                callback(nid)
            self.update_rooms(nid)
        log_accounts.info("account %s was deactivated", self.db.user_id(nid))

    # Member events follow the account

    def update_rooms(self, nid: UserNid) -> None:
        """Bring the user's member events up to date with profile or deactivation, beside requests.

        The row counts the changes under way, so that the next start goes on with them.
        """
        self.db.execute("UPDATE accounts SET behind = behind + 1 WHERE user_nid = ?", (nid,))
        self.hs.background(self._update_rooms(nid))

    async def _update_rooms(self, nid: UserNid) -> None:
        if self.get(nid) is None:  # its creation was undone
            return
        user_id = self.db.user_id(nid)
        for room_nid in list(self.hs.rooms.memberships(nid)):
            await asyncio.sleep(0)  # others are served in between
            room = self.hs.rooms.by_nid(room_nid)
            try:
                self._update_member(room, nid, user_id)
            except MatrixError as error:
                log_accounts.warning("%s in %s not updated: %s", user_id, room.room_id, error)
                if error.status >= 500:
                    return  # the disk is full, say; the next start goes on from here
        with contextlib.suppress(MatrixError), self.db.write():  # else the next start tries again
            sql = "UPDATE accounts SET behind = MAX(behind - 1, 0) WHERE user_nid = ?"
            self.db.execute(sql, (nid,))

    def _update_member(self, room: Room, nid: UserNid, user_id: str) -> None:
        event = room.state_event("m.room.member", user_id)
        if event is None or event.membership not in ("join", "invite", "knock"):
            return
        content: Json = {"membership": "leave"}
        if self.is_active(user_id):
            content = self.member_content(nid, event.content)
        if content != event.content:
            self.hs.rooms.send(room, user_id, "m.room.member", content, state_key=user_id)

    # Passwords

    async def hash(self, password: str) -> str:
        """The hash of a new password."""
        async with self._hashing:
            return await self.db.in_thread(hash_password, password)

    async def verify_password(self, user_id: str, password: str, address: str) -> UserNid | None:
        """The user if the password is theirs, else None; 429 when this address has guessed enough.

        Trap: an unknown user costs the same time and the same budgets as a wrong password.
        """
        account = self.find(user_id)
        device = (account and account.nid, address)
        known = "SELECT 1 FROM devices WHERE user_nid = ? AND last_seen_ip = ?"
        keys = self.guesses.login_keys(user_id, address, self.db.one(known, device) is not None)
        self.guesses.take(keys)
        stored = account.password_hash if account else None
        async with self._hashing:
            good = await self.db.in_thread(matches_hash, stored or NO_PASSWORD, password)
        if user_id == self.bot_id:
            emergency = self.hs.config.emergency_password or ""
            good = bool(emergency) and hmac.compare_digest(emergency.encode(), password.encode())
        elif stored is None:
            good = False
        account = self.find(user_id)  # it may have changed meanwhile
        if not good or account is None or account.deactivated or account.password_hash != stored:
            return None
        self.guesses.refund(keys)
        return account.nid


def refuse_suspended(hs: Homeserver, requester: Requester) -> None:
    """403 M_USER_SUSPENDED for what a suspended user may not do.  Spec: "Account suspension"."""
    if requester.user_id in hs.accounts.suspended:
        raise MatrixError(403, "M_USER_SUSPENDED", "You may only read while you are suspended")


def check_sender(
    hs: Homeserver,
    _room: Room,
    sender: str,
    event_type: str,
    content: Json,
    state_key: str | None,
    redacts: str | None,
) -> None:
    """The same for each event: all a suspended user may send is that they leave, and redactions
    of what they sent themselves.
    """
    if sender not in hs.accounts.suspended:
        return
    target = hs.rooms.event(redacts) if redacts else None
    leaves = (event_type, state_key) == (MEMBER, sender) and content.get("membership") == "leave"
    if not leaves and (target is None or target.sender != sender):
        raise MatrixError(403, "M_USER_SUSPENDED", "You may only read while you are suspended")


# ── 14.5  User-interactive authentication ────────────────────────────────────

DUMMY = "m.login.dummy"
PASSWORD = "m.login.password"  # noqa: S105  the name of a stage
REGISTRATION_TOKEN = "m.login.registration_token"  # noqa: S105  the name of a stage
Flows = tuple[tuple[str, ...], ...]
TERMS = "m.login.terms"
EMAIL = "m.login.email.identity"
AUTH_DATA = {
    **{"type?": str, "session?": str, "password?": str, "token?": str},
    **{"threepid_creds?": dict, "threepidCreds?": dict},
}


@dataclass
class UiaSession:
    """How far a client has come in proving that it may do one thing."""

    operation: tuple[str, str, UserNid | None]  # method, path, user
    flows: Flows
    body: bytes = b""  # a digest; the first stage fixes it, before that some clients send more
    completed: tuple[str, ...] = ()
    results: dict[str, Any] = field(default_factory=dict)  # what a stage brought to light


StageCheck = Callable[["Homeserver", Request, Json, UiaSession], Awaitable[bool]]
STAGES: Final[dict[str, StageCheck]] = {}  # each answers whether the client has proved it
STAGE_PARAMS: Final[dict[str, Callable[[Config], Json]]] = {}


def stage(name: str) -> Callable[[StageCheck], StageCheck]:
    """Make a function the check of a stage."""

    def register(check: StageCheck) -> StageCheck:
        STAGES[name] = check
        return check

    return register


class AuthenticationNeeded(MatrixError):
    """401 with the flows to choose from; with an error only when a stage was tried and failed."""

    def __init__(self, config: Config, name: str, session: UiaSession, error: Json) -> None:
        super().__init__(401, "M_FORBIDDEN", "Further authentication is needed")
        offered = {stage for flow in session.flows for stage in flow}
        params = {stage: STAGE_PARAMS[stage](config) for stage in offered & STAGE_PARAMS.keys()}
        self.body: Json = {"flows": [{"stages": flow} for flow in session.flows], **error}
        self.body |= {"session": name, "params": params}
        self.body |= {"completed": session.completed} if session.completed else {}

    def to_json(self) -> Json:
        """The body of the response."""
        return self.body


IdentifierReader = Callable[["Homeserver", Json], "str | None"]
IDENTIFIERS: Final[dict[object, IdentifierReader]] = {}  # how each type leads to a user id


def user_of_name(hs: Homeserver, identifier: Json) -> str | None:
    """m.id.user: a localpart or a whole user id."""
    name = identifier.get("user")
    if name is None:
        return None
    if not isinstance(name, str):
        raise bad_json("user must be a string")
    localpart, _, server = name.removeprefix("@").partition(":")
    localpart = localpart.lower() if localpart.isascii() else localpart
    return f"@{localpart}:{server or hs.config.server_name}"


IDENTIFIERS["m.id.user"] = user_of_name


def named_user(hs: Homeserver, fields: Json) -> str | None:
    """The user id that a login or a stage names, by identifier or the old way; None if by neither.

    Spec: "Identifier types". 403 for what identifies nobody here, such as a phone number.
    """
    identifier = fields.get("identifier", {"type": "m.id.user", "user": fields.get("user")})
    kind = identifier.get("type") if isinstance(identifier, dict) else None
    if not isinstance(kind, str) or kind not in IDENTIFIERS:
        raise forbidden("Nobody is known here by this type of identifier")
    user_id = IDENTIFIERS[kind](hs, identifier)
    return user_id and user_id[:MAX_ID_BYTES]  # it becomes the name of a budget, kept in memory


@stage(DUMMY)
async def is_anybody(_hs: Homeserver, _request: Request, _auth: Json, _session: UiaSession) -> bool:
    """Nothing is to be proved."""
    return True


@stage(PASSWORD)
async def is_password(hs: Homeserver, request: Request, auth: Json, _session: UiaSession) -> bool:
    """Whether it is the own password; another user's is no proof."""
    check_shape(auth, {"password": str}, "auth")
    user_id = request.user.user_id
    if named_user(hs, auth) not in (None, user_id):
        return False
    return await hs.accounts.verify_password(user_id, auth["password"], request.address) is not None


def uia_session(
    hs: Homeserver, request: Request, name: str | None, flows: Flows
) -> tuple[str, UiaSession]:
    """The session that the client names, or a new one; 403 for a session of something else."""
    user_nid = request.requester.nid if request.requester else None
    operation = (request.method, request.path, user_nid)
    session = hs.accounts.uia.get(name)
    if name is None or session is None:
        session = UiaSession(operation, flows)
        return hs.accounts.uia.add(session), session
    if session.operation != operation:
        raise forbidden("This session was begun for another operation")
    session.flows = flows
    return name, session


async def try_stage(hs: Homeserver, request: Request, auth: Json, session: UiaSession) -> bool:
    """Let the session go on by one stage, if it is the next of a flow and is proved."""
    done = (*session.completed, auth["type"])
    is_next = any(flow[: len(done)] == done for flow in session.flows)
    if not is_next or not await STAGES[auth["type"]](hs, request, auth, session):
        return False
    session.completed = done
    return True


async def user_interactive_auth(
    hs: Homeserver, request: Request, flows: Flows = ((PASSWORD,),)
) -> UiaSession:
    """Let the request pass once all stages of one flow are done; until then 401 with what is left.

    Spec: "User-interactive authentication API". A session is good for one success, for one body.
    """
    auth = request.json.get("auth") or {}
    check_shape(auth, AUTH_DATA, "auth")
    rest = {key: value for key, value in request.json.items() if key != "auth"}
    raw = json.dumps(rest, sort_keys=True).encode()  # there may be a password in it, so hashed
    body = hashlib.blake2b(raw, key=hs.accounts.uia_key).digest()
    name, session = uia_session(hs, request, auth.get("session"), flows)
    failure: Json = {}
    is_new = "type" in auth and auth["type"] not in session.completed
    if is_new and not await try_stage(hs, request, auth, session):  # it can be tried again
        failure = forbidden("Wrong password or token, or not what was asked for").to_json()
    if session.completed:
        session.body = session.body or body
    if session.completed and session.body != body:
        raise forbidden("The request has changed during authentication")
    if failure or session.completed not in flows:
        raise AuthenticationNeeded(hs.config, name, session, failure)
    if hs.accounts.uia.pop(name) is None:
        raise forbidden("This session was used already")
    return session


# ── 14.6  Registration ───────────────────────────────────────────────────────

DEVICE_FIELDS = {"device_id?": str, "initial_device_display_name?": str, "refresh_token?": bool}
NEW_ACCOUNT = {
    **DEVICE_FIELDS,
    **{"auth?": dict, "username?": str, "password?": str, "guest_access_token?": str},
    "inhibit_login?": bool,
}


def registration_flows(hs: Homeserver, request: Request) -> Flows:
    """What somebody has to prove for an account; 403 M_FORBIDDEN when nothing would do.

    The first account is the administrator's. It takes the token printed at the start or the
    configured one, unless it is registered on the machine itself.
    """
    config = hs.config
    is_first = not hs.accounts.has_users()
    is_open = request.is_local() or (config.allow_open_registration and not is_first)
    wants_token = config.registration_token or hs.accounts.has_tokens()
    stages: tuple[str, ...] = (TERMS,) if config.terms else ()
    if config.allow_registration and not config.registration_token and is_open:
        stages = stages or (DUMMY,)
    elif is_first or (config.allow_registration and wants_token):
        stages = (REGISTRATION_TOKEN, *stages)
    else:
        raise forbidden("Registration is disabled")
    return (stages, (EMAIL, *stages)) if config.smtp else (stages,)


def wanted_account(hs: Homeserver, request: Request) -> tuple[str, UserNid | None]:
    """The user id that is to be registered, and the guest that is to have it for good, if one is.

    Spec: "Guest access". 403 M_FORBIDDEN for the token of anybody else.
    """
    user_id = local_user_id(hs, request.json.get("username") or random_token(12))
    if "guest_access_token" not in request.json:
        hs.accounts.check_available(user_id)
        return user_id, None
    guest = hs.accounts.authenticate(request, request.json["guest_access_token"])
    if not guest.is_guest or guest.user_id != user_id:
        raise forbidden("This is not the access token of a guest of that name")
    return user_id, guest.nid


def register_guest(hs: Homeserver, request: Request) -> Json:
    """Make a guest account. Guests prove nothing, so they need registration to be open to all."""
    config = hs.config
    is_open = config.allow_registration and config.allow_open_registration
    if not is_open or config.registration_token:
        raise forbidden("Guest accounts are disabled on this server")
    with hs.db.write():
        nid = hs.accounts.make_account(local_user_id(hs, random_token(12)), role="guest")
        fields = {**request.json, "device_id": None, "refresh_token": None}
        return hs.accounts.log_in(nid, request.address, fields)


@route("POST", V3 + "/register", auth=NONE, limit="register", body=NEW_ACCOUNT)
async def register(hs: Homeserver, request: Request) -> Json:
    """Make an account and log it in.  Spec: "Account registration".

    400 M_USER_IN_USE, M_INVALID_USERNAME, M_EXCLUSIVE, also before authentication.
    """
    accounts, body = hs.accounts, request.json
    kind = request.arg("kind", "user")
    check_device_texts(body)
    if kind == "guest":
        return register_guest(hs, request)
    if kind != "user":
        raise invalid_param("kind must be user or guest")
    flows = registration_flows(hs, request)
    user_id, guest_nid = wanted_account(hs, request)
    check_new_password(body.get("password", "later"))
    is_first = not accounts.has_users()
    proved = await user_interactive_auth(hs, request, flows)
    if "password" not in body:
        raise missing_param("password is missing")
    hashed = await accounts.hash(body["password"])
    if is_first and accounts.has_users():
        raise forbidden("Somebody was faster; try again")  # the token makes one admin only
    with hs.db.write():
        role = "admin" if is_first else "user"
        nid = guest_nid or accounts.make_account(user_id, hashed, role=role)
        if guest_nid is not None:
            accounts.upgrade_guest(guest_nid, hashed, is_admin=is_first)
        accounts.registered(nid, proved)
        if body.get("inhibit_login"):
            return {"user_id": user_id, "home_server": hs.config.server_name}
        return accounts.log_in(nid, request.address, body)


@route("GET", V3 + "/register/available", auth=NONE, limit="register")
async def username_available(hs: Homeserver, request: Request) -> Json:
    """Whether a user name can be had; the errors say why not."""
    check_shape(request.query, {"username": [str]}, "The query")
    hs.accounts.check_available(local_user_id(hs, request.query["username"][0]))
    return {"available": True}


@route("GET", "/_synapse/admin/v1/register", auth=NONE, limit="register")
async def registration_nonce(hs: Homeserver, _request: Request) -> Json:
    """A nonce for one registration by shared secret."""
    if not hs.config.registration_shared_secret:
        raise MatrixError(404, "M_UNRECOGNIZED", "Shared secret registration is not enabled")
    return {"nonce": hs.accounts.nonces.add(True)}


BY_SECRET = {
    **{"nonce": str, "username": str, "password": str, "mac": str},
    **{"admin?": bool, "user_type?": str, "displayname?": str},
}


@route("POST", "/_synapse/admin/v1/register", auth=NONE, limit="register", body=BY_SECRET)
async def register_by_shared_secret(hs: Homeserver, request: Request) -> Json:
    """Make an account for who knows registration_shared_secret, as Synapse's tools do.

    The mac is HMAC-SHA1 over nonce, name, password and admin flag, with NUL between.
    """
    body, role = request.json, "admin" if request.json.get("admin") else "user"
    secret = hs.config.registration_shared_secret
    if not secret or hs.accounts.nonces.pop(body["nonce"]) is None:
        raise MatrixError(400, "M_UNKNOWN", "Unrecognised nonce")
    parts = [body["nonce"], body["username"], body["password"], role.replace("user", "notadmin")]
    parts += [body["user_type"]] if body.get("user_type") else []
    if any("\0" in part for part in parts):
        raise invalid_param("NUL in the user name or password")
    mac = hmac.new(secret.encode(), "\0".join(parts).encode(), hashlib.sha1).hexdigest()
    if not hmac.compare_digest(mac.encode(), body["mac"].lower().encode()):
        raise forbidden("HMAC incorrect")
    names = {"name": body.get("displayname", ""), "role": role}
    nid = await hs.accounts.create_account(body["username"], body["password"], **names)
    return hs.accounts.log_in(nid, request.address, {})


# ── 14.7  Login and refresh ──────────────────────────────────────────────────

LOGIN = {
    **DEVICE_FIELDS,
    **{"type": str, "identifier?": dict, "user?": str, "password?": str, "token?": str},
}


class LoginType(NamedTuple):
    """A way to log in: who it is that does (None: nobody, as it seems), and when it is offered."""

    proved_user: Callable[[Homeserver, Request], Awaitable[UserNid | None]]
    offered: Callable[[Config], object]
    flow: Json


LOGIN_TYPES: Final[dict[str, LoginType]] = {}


def login_type(
    name: str, offered: Callable[[Config], object] = bool, **flow: Any
) -> Callable[[Handler], Handler]:
    """Make a function a way to log in, offered where the configuration says so."""

    def register(proved_user: Handler) -> Handler:
        LOGIN_TYPES[name] = LoginType(proved_user, offered, {"type": name, **flow})
        return proved_user

    return register


@login_type(PASSWORD)
async def user_by_password(hs: Homeserver, request: Request) -> UserNid | None:
    """m.login.password; a wrong password and an unknown user look the same."""
    body = request.json
    check_shape(body, {"password": str})
    user_id = named_user(hs, body)
    if user_id is None:
        raise missing_param("identifier is missing")
    return await hs.accounts.verify_password(user_id, body["password"], request.address)


@login_type("m.login.token", get_login_token=True)
async def user_by_login_token(hs: Homeserver, request: Request) -> UserNid | None:
    """m.login.token: good once, and not after a change of the password."""
    check_shape(request.json, {"token": str})
    nid, stored = hs.accounts.login_tokens.pop(request.json["token"]) or (None, None)
    account = None if nid is None else hs.accounts.get(nid)
    return nid if account is not None and account.password_hash == stored else None


@route("GET", V3 + "/login", auth=NONE, limit="login")
async def login_flows(hs: Homeserver, _request: Request) -> Json:
    """The ways to log in.  Spec: "Login"."""
    return {"flows": [kind.flow for kind in LOGIN_TYPES.values() if kind.offered(hs.config)]}


@route("POST", V3 + "/login", auth=NONE, limit="login", body=LOGIN)
async def login(hs: Homeserver, request: Request) -> Json:
    """Log in: a device with an access token.  Spec: "Login"."""
    check_device_texts(request.json)
    kind = LOGIN_TYPES.get(request.json["type"])
    if kind is None or not kind.offered(hs.config):
        raise MatrixError(400, "M_UNKNOWN", "Unknown login type")
    nid = await kind.proved_user(hs, request)
    account = None if nid is None else hs.accounts.get(nid)
    if account is None or account.deactivated:
        raise forbidden("Invalid user name, password or login token")
    if account.locked:
        raise user_locked()
    return hs.accounts.log_in(account.nid, request.address, request.json)


GET_TOKEN = "/_matrix/client/v1/login/get_token"  # noqa: S105  a path


@route("POST", GET_TOKEN, auth=USER, limit="login", body={"auth?": dict})
async def get_login_token(hs: Homeserver, request: Request) -> Json:
    """A token with which one other device can log in as the same user, after asking for consent."""
    await user_interactive_auth(hs, request)
    account, tokens = hs.accounts.get(request.user.nid), hs.accounts.login_tokens
    token = tokens.add((request.user.nid, account and account.password_hash))
    return {"login_token": token, "expires_in_ms": tokens.seconds * 1000}


@route("POST", V3 + "/refresh", auth=NONE, limit="login", body={"refresh_token": str})
async def refresh_tokens(hs: Homeserver, request: Request) -> Json:
    """New tokens for a refresh token. 401 M_UNKNOWN_TOKEN when it is unknown or used."""
    return hs.accounts.refresh(request.json["refresh_token"])


# ── 14.8  Logout and devices ─────────────────────────────────────────────────

DEVICE = V3 + "/devices/{device_id}"


@route("POST", V3 + "/logout", auth=GUEST)
async def logout(hs: Homeserver, request: Request) -> Json:
    """End this session: its tokens, its device and the device's keys are deleted."""
    if request.user.device_id is not None:
        hs.accounts.delete_devices(request.user.nid, [request.user.device_id])
    return {}


@route("POST", V3 + "/logout/all", auth=GUEST)
async def logout_all(hs: Homeserver, request: Request) -> Json:
    """End all sessions of the user, this one included."""
    hs.accounts.log_out_everywhere(request.user.nid)
    return {}


@route("GET", V3 + "/devices", auth=GUEST)
async def list_devices(hs: Homeserver, request: Request) -> Json:
    """All devices of the user.  Spec: "Device management"."""
    return {"devices": hs.accounts.devices(request.user.nid)}


@route("GET", DEVICE, auth=GUEST)
async def get_device(hs: Homeserver, request: Request, device_id: str) -> Json:
    """One device of the user. 404 M_NOT_FOUND when there is none with this id."""
    for device in hs.accounts.devices(request.user.nid):
        if device["device_id"] == device_id:
            return device
    raise not_found("You have no device with this id")


@route("PUT", DEVICE, auth=GUEST, body={"display_name?": str})
async def put_device(hs: Homeserver, request: Request, device_id: str) -> Json:
    """Rename a device; only an application service could make one here."""
    check_device_texts(request.json)
    hs.accounts.rename_device(request.user.nid, device_id, request.json.get("display_name"))
    return {}


@route("POST", V3 + "/delete_devices", auth=USER, body={"devices": [str], "auth?": dict})
@route("DELETE", DEVICE, auth=USER, body={"auth?": dict})
async def delete_devices(hs: Homeserver, request: Request, device_id: str | None = None) -> Json:
    """Log out one device or several; the password is asked for once."""
    await user_interactive_auth(hs, request)
    names = request.json["devices"] if device_id is None else [device_id]
    hs.accounts.delete_devices(request.user.nid, names)
    return {}


# ── 14.9  The own account ────────────────────────────────────────────────────

PASSWORD_CHANGE = {"new_password": str, "logout_devices?": bool, "auth?": dict}
DEACTIVATION = {"auth?": dict, "id_server?": str, "erase?": bool}


@route("POST", V3 + "/account/password", auth=OPTIONAL, limit="login", body=PASSWORD_CHANGE)
async def change_password(hs: Homeserver, request: Request) -> Json:
    """Change the password; other devices are logged out unless logout_devices is false.

    Without a token it is a forgotten password: the e-mail address tells whose (chapter 47).
    """
    password, log_out = request.json["new_password"], request.json.get("logout_devices", True)
    by_mail: Flows = ((EMAIL,),) if hs.config.smtp else ()
    if request.requester is not None or not by_mail:
        check_caller(USER, request.requester)
    check_new_password(password)
    flows = by_mail if request.requester is None else ((PASSWORD,), *by_mail)
    proved = await user_interactive_auth(hs, request, flows)
    keep = None
    if request.requester is None:
        nid = cast(UserNid, proved.results[EMAIL].user_nid)
    else:
        nid, keep = request.user.nid, request.user.device_nid
    await hs.accounts.set_password(nid, password, keep=keep, log_out=log_out)
    return {}


@route("POST", V3 + "/account/deactivate", auth=USER, limit="login", body=DEACTIVATION)
async def deactivate_account(hs: Homeserver, request: Request) -> Json:
    """End the own account for good.  Spec: "Account deactivation"."""
    if request.user.user_id == hs.accounts.bot_id:
        raise forbidden("This is the server's own account")
    await user_interactive_auth(hs, request)
    await hs.accounts.deactivate(request.user.nid, erase=request.json.get("erase", False))
    return {"id_server_unbind_result": "success"}


@route("GET", V3 + "/account/whoami", auth=GUEST)
async def who_am_i(_hs: Homeserver, request: Request) -> Json:
    """Whose access token this is."""
    user = request.user
    answer = {"user_id": user.user_id, "device_id": user.device_id, "is_guest": user.is_guest}
    return {key: value for key, value in answer.items() if value is not None}


CAPABILITIES: Json = {}  # those that later chapters add, by name


@route("GET", V3 + "/capabilities", auth=GUEST)
async def capabilities(hs: Homeserver, request: Request) -> Json:
    """What this server lets the user do.  Spec: "Capabilities negotiation"."""
    account = hs.accounts.get(request.user.nid)
    has_password = account is not None and account.password_hash is not None
    switches = {
        "m.change_password": has_password,
        "m.set_displayname": True,
        "m.set_avatar_url": True,
        "m.3pid_changes": hs.config.smtp is not None,
        "m.get_login_token": has_password,
        "m.profile_fields": True,
        "uk.tcpip.msc4133.profile_fields": True,
        "io.element.msc4452.preview_url": bool(hs.config.url_preview_allowlist),
    }
    available = {
        version.id: "stable" if version.stable else "unstable"
        for version in ROOM_VERSIONS.values()
        if version.stable or hs.config.allow_unstable_room_versions
    }
    versions = {"default": hs.config.default_room_version, "available": available}
    answer: Json = {name: {"enabled": enabled} for name, enabled in switches.items()}
    if request.user.is_admin:
        answer["m.account_moderation"] = {"suspend": True, "lock": True}
    return {"capabilities": {**answer, **CAPABILITIES, "m.room_versions": versions}}


def check_own_user(request: Request, user_id: str) -> None:
    """403 M_FORBIDDEN for a path that names another user than the one who asks."""
    if user_id != request.user.user_id:
        raise forbidden("You can do this for your own account only")


@route("POST", V3 + "/user/{user_id}/openid/request_token", auth=USER, limit="login")
async def request_openid_token(hs: Homeserver, request: Request, user_id: str) -> Json:
    """A token by which a third service can ask this server who the user is, and nothing else."""
    check_own_user(request, user_id)
    token, expires_ts = random_token(), now_ms() + OPENID_SECONDS * 1000
    with hs.db.write():
        row = (token_hash(token), request.user.nid, expires_ts)
        hs.db.execute("INSERT INTO openid_tokens VALUES (?, ?, ?)", row)
    return {
        "access_token": token,
        "token_type": "Bearer",
        "matrix_server_name": hs.config.server_name,
        "expires_in": OPENID_SECONDS,
    }


def openid_user(hs: Homeserver, token: str) -> str | None:
    """Whose OpenID token this is; None when it is unknown, too old, or its user may not act."""
    sql = "SELECT user_nid FROM openid_tokens WHERE token_hash = ? AND expires_ts > ?"
    nid = hs.db.value(sql, (token_hash(token), now_ms()))
    account = None if nid is None else hs.accounts.get(nid)
    if account is None or account.deactivated or account.locked:
        return None
    return hs.db.user_id(account.nid)


@route("GET", "/_matrix/federation/v1/openid/userinfo", auth=NONE)
async def openid_userinfo(hs: Homeserver, request: Request) -> Json:
    """Whose OpenID token this is.  Spec: SS-API "OpenID"."""
    user_id = openid_user(hs, request.arg("access_token") or "")
    if user_id is None:
        raise unknown_token()
    return {"sub": user_id}


# ── 14.10  Transaction ids ───────────────────────────────────────────────────


def txn_row_key(requester: Requester, scope: str, txn_id: str) -> tuple[int, bytes]:
    """Where a transaction of a device is found; sixteen bytes of hash, as there are many."""
    digest = hashlib.blake2b(f"{scope}\0{txn_id}".encode(), digest_size=16).digest()
    return requester.device_nid or -requester.nid, digest


def repeated_transaction(
    hs: Homeserver, requester: Requester, scope: str, txn_id: str
) -> str | None:
    """The result of the same request sent before by the same device, or None if it is new.

    Spec: "Transaction identifiers". A refreshed token is the same device; a new login of it, too.
    """
    key = txn_row_key(requester, scope, txn_id)
    result = hs.db.value("SELECT result FROM txns WHERE device_nid = ? AND txn_key = ?", key)
    return cast("str | None", result)


def record_transaction(
    hs: Homeserver, requester: Requester, scope: str, txn_id: str, result: str
) -> None:
    """Remember the result of a request, in the write block of what it did."""
    row = (*txn_row_key(requester, scope, txn_id), result, now_ms())
    hs.db.execute("INSERT OR REPLACE INTO txns VALUES (?, ?, ?, ?)", row)


# ═════════════════════════════════════════════════════════════════════════════
#  47. E-MAIL, TERMS, TOKENS
#
#  What stands beside the password: e-mail addresses whose owner has shown that
#  they read them, tokens that let strangers register, documents that they have
#  to accept, and tokens signed by a friendly service. Each is a stage, a login
#  type or an identifier of the chapter before.
#       spec: CS-API "Account registration", "Password management", "Adding Account
#       Administrative Contact Information", "Terms of service at registration"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE emails (
    address TEXT PRIMARY KEY,        -- in lower case
    user_nid INTEGER NOT NULL,
    validated_ts INTEGER NOT NULL,
    added_ts INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX emails_of_user ON emails (user_nid);
CREATE TABLE email_validations (     -- messages sent, and which of them were answered
    sid TEXT PRIMARY KEY,
    purpose TEXT NOT NULL,           -- register, password or 3pid: good for nothing else
    address TEXT NOT NULL,
    secret_hash BLOB NOT NULL,       -- of client_secret
    user_nid INTEGER,                -- whose account it is about; NULL: who has none yet
    send_attempt INTEGER NOT NULL,
    token_hash BLOB NOT NULL UNIQUE, -- of what stands in the link
    next_link TEXT,
    sent_ts INTEGER NOT NULL,
    validated_ts INTEGER,
    UNIQUE (address, secret_hash, purpose)
) WITHOUT ROWID;
CREATE INDEX email_validations_age ON email_validations (sent_ts);
CREATE TABLE consents (
    user_nid INTEGER NOT NULL,
    document TEXT NOT NULL,
    version TEXT NOT NULL,
    accepted_ts INTEGER NOT NULL,
    PRIMARY KEY (user_nid, document)
) WITHOUT ROWID;
CREATE TABLE registration_tokens (   -- as they are, since admins want to read them again
    token TEXT PRIMARY KEY,
    uses_allowed INTEGER,            -- NULL: any number
    completed INTEGER NOT NULL DEFAULT 0,
    expires_ts INTEGER
) WITHOUT ROWID;
""")
invariant(
    "e-mail addresses of accounts that are not there",
    """
    SELECT address
    FROM emails
    WHERE user_nid NOT IN (SELECT user_nid FROM accounts WHERE deactivated = 0)
    """,
)

VALIDATION_MS = 3_600_000  # to follow the link, and then again to go on in the app
MAIL_SECONDS = 10  # for each step of a delivery
MAILS_AT_ONCE = 4
MAILS_WAITING = 50
PLAIN_EMAIL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[A-Za-z0-9.-]{1,190}", re.ASCII)
CLIENT_SECRET = re.compile(r"[0-9a-zA-Z.=_-]{1,255}")
VALIDATE_PATH = "/_conduit/email/validate"

log_mail = logging.getLogger("conduit.mail")

# ── 47.1  Sending e-mail ─────────────────────────────────────────────────────

GREETING = "This message comes from the Matrix server {server}.\n\n"
PARDON = "\n\nIf this was not you, do nothing: without you nothing happens.\n"
THE_LINK = " open this page within an hour:\n\n{link}"
MESSAGES = {  # by purpose, and whether the address belongs to an account
    ("register", False): "Somebody registers there with this address. If it is you,"
    f"{THE_LINK}\n\nand go on in your app.{PARDON}",
    ("register", True): "Somebody wanted to register there with this address, but {user} has it"
    " already. If it is you, sign in as that, with a new password if you have forgotten it."
    f"{PARDON}",
    ("password", True): "Somebody wants a new password for your account {user}. If it is you,"
    f"{THE_LINK}\n\nOpen it only if you have asked for it yourself: whoever asked can then choose"
    f" the password.{PARDON}",
    ("password", False): "Somebody wanted a new password for an account with this address, but"
    f" there is none.{PARDON}",
    ("3pid", False): "Somebody adds this address to an account there. If it is you,"
    f"{THE_LINK}\n\nand go on in your app.{PARDON}",
}
SUBJECTS = {
    "register": "Your new account on {server}",
    "password": "Your password on {server}",
    "3pid": "Your e-mail address on {server}",
}


def deliver(smtp: SmtpConfig, message: EmailMessage) -> None:
    """Hand a message to the mail server; for threads. A password never goes unencrypted."""
    context = ssl.create_default_context()
    if smtp.host in ("localhost", "127.0.0.1"):  # nobody is in between, nor has a certificate
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    options: Any = {"host": smtp.host, "port": smtp.port, "timeout": MAIL_SECONDS}
    tls_first = smtp.port == 465
    with contextlib.ExitStack() as stack:
        kind = functools.partial(smtplib.SMTP_SSL, context=context) if tls_first else smtplib.SMTP
        connection = stack.enter_context(kind(**options))
        connection.ehlo()
        must = bool(smtp.user) or smtp.port == 587
        if not tls_first and (must or connection.has_extn("starttls")):
            connection.starttls(context=context)
        if smtp.user:
            connection.login(smtp.user, smtp.password or "")
        connection.send_message(message)


class Mailer:
    """Sends messages, a few at a time; who would have to wait for long is sent away."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self._waiting = 0
        self._turn = asyncio.Semaphore(MAILS_AT_ONCE)

    async def send(self, address: str, subject: str, text: str) -> None:
        """Send a message, or say with a 500 that it could not be sent; the log has the reason."""
        smtp = cast(SmtpConfig, self.hs.config.smtp)
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = smtp.from_, address, subject
        message["Date"] = format_datetime(datetime.now(timezone.utc))
        message["Message-ID"] = make_msgid(domain=smtp.from_.rpartition("@")[2])
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(text)
        if self._waiting >= MAILS_WAITING:
            raise limit_exceeded(60_000, "Too many messages are waiting to be sent")
        self._waiting += 1
        try:
            await self.hs.db.synced()
            async with self._turn:
                await asyncio.to_thread(deliver, smtp, message)
        except (OSError, smtplib.SMTPException, ValueError) as error:
            log_mail.error("no mail could be sent through %s: %s", smtp.host, error)
            raise MatrixError(500, "M_UNKNOWN", "The e-mail could not be sent") from error
        finally:
            self._waiting -= 1


# ── 47.2  Addresses and who reads them ───────────────────────────────────────


class Validation(NamedTuple):
    """A row of email_validations, as far as others want to know."""

    sid: str
    purpose: str
    address: str
    user_nid: UserNid | None
    next_link: str | None


def checked_email(text: str) -> str:
    """An address in the form in which it is compared. 400 M_INVALID_PARAM."""
    if not PLAIN_EMAIL.fullmatch(text):
        raise invalid_param("This is no e-mail address to which this server could write")
    return text.lower()


def threepid_in_use() -> MatrixError:
    """400 M_THREEPID_IN_USE."""
    return MatrixError(400, "M_THREEPID_IN_USE", "Another account has this address")


class Emails:
    """The e-mail addresses of accounts, and proofs that somebody reads one."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self.db = hs.db
        self.mailer = Mailer(hs)
        hs.accounts.on_registered(self._registered)
        hs.accounts.on_deactivated(self._forget)

    def owner(self, address: str) -> UserNid | None:
        """Whose address this is."""
        sql = "SELECT user_nid FROM emails WHERE address = ?"
        return cast("UserNid | None", self.db.value(sql, (address.lower(),)))

    def of(self, nid: UserNid) -> list[Json]:
        """The addresses of a user, as /account/3pid shows them."""
        sql = "SELECT address, validated_ts, added_ts FROM emails WHERE user_nid = ?"
        names = ("address", "validated_at", "added_at")
        rows = self.db.all(sql, (nid,))
        return [{"medium": "email", **dict(zip(names, row, strict=True))} for row in rows]

    def add(self, nid: UserNid, address: str) -> None:
        """Give a user an address. 400 M_THREEPID_IN_USE for that of another."""
        if self.owner(address) not in (None, nid):
            raise threepid_in_use()
        with self.db.write():
            row = (address.lower(), nid, now_ms(), now_ms())
            self.db.execute("INSERT OR IGNORE INTO emails VALUES (?, ?, ?, ?)", row)

    def remove(self, nid: UserNid, address: str) -> None:
        """Take an address from a user."""
        with self.db.write():
            sql = "DELETE FROM emails WHERE address = ? AND user_nid = ?"
            self.db.execute(sql, (address.lower(), nid))

    def replace(self, nid: UserNid, addresses: Iterable[str]) -> None:
        """Let a user have these addresses and no others."""
        with self.db.write():
            self.db.execute("DELETE FROM emails WHERE user_nid = ?", (nid,))
            for address in addresses:
                self.add(nid, checked_email(address))

    async def ask(self, purpose: str, user_nid: UserNid | None, body: Json) -> str:
        """Write to an address, unless this attempt was made already; the sid.

        Whoever asks learns nothing from it: the message alone says whether there is an account.
        """
        address, secret_hash = checked_email(body["email"]), token_hash(body["client_secret"])
        row = self.db.one(
            """
            SELECT sid, send_attempt
            FROM email_validations
            WHERE address = ? AND secret_hash = ? AND purpose = ? AND sent_ts > ?
            """,
            (address, secret_hash, purpose, now_ms() - VALIDATION_MS),
        )
        if row is not None and row[1] >= body["send_attempt"]:
            return cast(str, row[0])
        self.hs.accounts.guesses.take([("mail", address)])
        owner, sid, token = self.owner(address), random_token(), random_token()
        about = owner if purpose == "password" else user_nid
        proof = (token_hash(token), self._own_link(body.get("next_link")), now_ms())
        with self.db.write():
            self.db.execute(
                """
                INSERT OR REPLACE INTO email_validations (sid, purpose, address, secret_hash,
                    user_nid, send_attempt, token_hash, next_link, sent_ts)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
                """,
                (sid, purpose, address, secret_hash, about, body["send_attempt"], *proof),
            )
        config = self.hs.config  # the link never follows the Host header, which anybody can choose
        names = {"server": config.server_name, "user": owner and self.db.user_id(owner)}
        names["link"] = f"{config.well_known.client}{VALIDATE_PATH}?token={token}"
        text = (GREETING + MESSAGES[purpose, owner is not None]).format(**names)
        try:
            await self.mailer.send(address, SUBJECTS[purpose].format(**names), text)
        except MatrixError:  # the client may make the same attempt again
            with self.db.write():
                self.db.execute("DELETE FROM email_validations WHERE sid = ?", (sid,))
            raise
        return sid

    def _own_link(self, link: str | None) -> str | None:
        """A next_link within this server's own site; apps elsewhere send theirs, to no effect."""
        with contextlib.suppress(ValueError):
            ours, theirs = urlsplit(self.hs.config.well_known.client), urlsplit(link or "")
            if (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc) and link:
                return link if link.isascii() and link.isprintable() else None
        return None

    def asked(self, token: str, *, answer: bool = False) -> Validation | None:
        """What the token in a link is about, and if it is the answer, the proof; None when over."""
        row = self.db.one(
            """
            SELECT sid, purpose, address, user_nid, next_link
            FROM email_validations
            WHERE token_hash = ? AND validated_ts IS NULL AND sent_ts > ?
            """,
            (token_hash(token), now_ms() - VALIDATION_MS),
        )
        if row is not None and answer:
            with self.db.write():
                sql = "UPDATE email_validations SET validated_ts = ? WHERE sid = ?"
                self.db.execute(sql, (now_ms(), row[0]))
        return None if row is None else Validation(*row)

    def proved(self, creds: Json, purpose: str) -> Validation | None:
        """What the owner of an address has proved, for the last time; None if they have not."""
        check_shape(creds, {"sid": str, "client_secret": str}, "threepid_creds")
        row = self.db.one(
            """
            SELECT sid, purpose, address, user_nid, next_link
            FROM email_validations
            WHERE sid = ? AND secret_hash = ? AND purpose = ? AND validated_ts > ?
            """,
            (creds["sid"], token_hash(creds["client_secret"]), purpose, now_ms() - VALIDATION_MS),
        )
        if row is None:
            return None
        with self.db.write():
            self.db.execute("DELETE FROM email_validations WHERE sid = ?", (row[0],))
        return Validation(*row)

    def _registered(self, nid: UserNid, session: UiaSession) -> None:
        if EMAIL in session.results:
            self.add(nid, session.results[EMAIL].address)

    def _forget(self, nid: UserNid) -> None:
        self.db.execute("DELETE FROM emails WHERE user_nid = ?", (nid,))
        self.db.execute("DELETE FROM consents WHERE user_nid = ?", (nid,))

    def expire(self) -> None:
        """Delete validations that have had their time."""
        with self.db.write():
            before = now_ms() - 2 * VALIDATION_MS
            self.db.execute("DELETE FROM email_validations WHERE sent_ts < ?", (before,))


@stage(EMAIL)
async def is_reader(hs: Homeserver, request: Request, auth: Json, session: UiaSession) -> bool:
    """Whether the client's user reads the address: a new one to register, else the account's."""
    creds = auth.get("threepid_creds") or auth.get("threepidCreds") or {}
    purpose = "register" if session.operation[1].endswith("/register") else "password"
    proved = hs.emails.proved(creds, purpose)
    if proved is None:
        return False
    if purpose == "password":
        is_owner = (
            proved.user_nid is not None and hs.emails.owner(proved.address) == proved.user_nid
        )
        if not is_owner or session.operation[2] not in (None, proved.user_nid):
            return False
    session.results[EMAIL] = proved
    return True


def user_of_email(hs: Homeserver, identifier: Json) -> str | None:
    """m.id.thirdparty: the account with an address; an unknown one looks like a wrong password."""
    check_shape(identifier, {"medium": str, "address": str}, "identifier")
    nid = hs.emails.owner(identifier["address"]) if identifier["medium"] == "email" else None
    return f"@{identifier['address']}" if nid is None else hs.db.user_id(nid)


IDENTIFIERS["m.id.thirdparty"] = user_of_email

# ── 47.3  The addresses of an account ────────────────────────────────────────

EMAIL_REQUEST = {
    **{"client_secret": str, "email": str, "send_attempt": int, "next_link?": str},
    **{"id_server?": str, "id_access_token?": str},  # ignored where the homeserver writes itself
}
ADDED = {"client_secret": str, "sid": str, "auth?": dict}
ADDRESS_OF_ACCOUNT = {"medium": str, "address": str, "id_server?": str}
BY_SERVER = {"three_pid_creds?": dict, "client_secret?": str, "sid?": str, "id_server?": str}
WRITE_PATH = "/{medium}/requestToken"


def require_smtp(hs: Homeserver) -> None:
    """403 M_THREEPID_DENIED where no address can be validated."""
    if hs.config.smtp is None:
        raise MatrixError(403, "M_THREEPID_DENIED", "This server sends no e-mail")


@route("POST", V3 + "/account/3pid" + WRITE_PATH, auth=OPTIONAL, limit="register", body=ANY_OBJECT)
@route(
    "POST", V3 + "/account/password" + WRITE_PATH, auth=OPTIONAL, limit="register", body=ANY_OBJECT
)
@route("POST", V3 + "/register" + WRITE_PATH, auth=OPTIONAL, limit="register", body=ANY_OBJECT)
async def request_email_token(hs: Homeserver, request: Request, medium: str) -> Json:
    """Write to an e-mail address, to see whether somebody reads it.

    403 M_THREEPID_DENIED without [global.smtp]; phone numbers cannot be reached.
    """
    purpose, body = request.segments[-3], request.json
    if medium != "email":
        text = "This server sends no text messages"
        raise MatrixError(400, "M_THREEPID_MEDIUM_NOT_SUPPORTED", text)
    check_shape(body, EMAIL_REQUEST)
    if not CLIENT_SECRET.fullmatch(body["client_secret"]):
        raise invalid_param("client_secret consists of up to 255 of 0-9 a-z A-Z . = _ -")
    if abs(body["send_attempt"]) > MAX_CANONICAL_INT:
        raise invalid_param("send_attempt is too large")
    require_smtp(hs)
    if purpose == "3pid" and hs.emails.owner(checked_email(body["email"])) is not None:
        raise threepid_in_use()
    user_nid = request.requester.nid if request.requester else None
    return {"sid": await hs.emails.ask(purpose, user_nid, body)}


@route("GET", V3 + "/account/3pid", auth=USER)
async def list_third_party_ids(hs: Homeserver, request: Request) -> Json:
    """The e-mail addresses of the account."""
    return {"threepids": hs.emails.of(request.user.nid)}


@route("POST", V3 + "/account/3pid/add", auth=USER, limit="login", body=ADDED)
async def add_third_party_id(hs: Homeserver, request: Request) -> Json:
    """Add an address that was validated. 403 M_THREEPID_AUTH_FAILED if it was not."""
    require_smtp(hs)
    await user_interactive_auth(hs, request)
    proved = hs.emails.proved(request.json, "3pid")
    if proved is None or proved.user_nid not in (None, request.user.nid):
        raise MatrixError(403, "M_THREEPID_AUTH_FAILED", "This address has not been validated")
    hs.emails.add(request.user.nid, proved.address)
    return {}


@route("POST", V3 + "/account/3pid", auth=USER, limit="login", body=BY_SERVER)
@route("POST", V3 + "/account/3pid/bind", auth=USER, limit="login", body=BY_SERVER)
async def bind_third_party_id(_hs: Homeserver, _request: Request) -> Json:
    """There is no identity server that this server would trust."""
    raise MatrixError(400, "M_SERVER_NOT_TRUSTED", "This server trusts no identity server")


@route("POST", V3 + "/account/3pid/delete", auth=USER, body=ADDRESS_OF_ACCOUNT)
async def delete_third_party_id(hs: Homeserver, request: Request) -> Json:
    """Take an address from the account; a suspended user could hide by that."""
    refuse_suspended(hs, request.user)
    if request.json["medium"] == "email":
        hs.emails.remove(request.user.nid, request.json["address"])
    return {"id_server_unbind_result": "no-support"}


@route("POST", V3 + "/account/3pid/unbind", auth=USER, body=ADDRESS_OF_ACCOUNT)
async def unbind_third_party_id(_hs: Homeserver, _request: Request) -> Json:
    """Nothing was ever bound through this server."""
    return {"id_server_unbind_result": "no-support"}


# ── 47.4  Terms of service ───────────────────────────────────────────────────


def terms_params(config: Config) -> Json:
    """The documents as m.login.terms presents them."""
    policies: Json = {}
    for document in config.terms:
        policy = policies.setdefault(document.id, {"version": document.version})
        policy[document.lang] = {"name": document.name, "url": document.url}
    return {"policies": policies}


STAGE_PARAMS[TERMS] = terms_params


@stage(TERMS)
async def accept_terms(hs: Homeserver, _request: Request, _auth: Json, session: UiaSession) -> bool:
    """By sending this stage the client says that its user has accepted what was presented."""
    session.results[TERMS] = terms_params(hs.config)["policies"]
    return True


def store_consent(hs: Homeserver, nid: UserNid, session: UiaSession) -> None:
    """Remember which versions a new user has accepted."""
    for document, policy in session.results.get(TERMS, {}).items():
        row = (nid, document, policy["version"], now_ms())
        hs.db.execute("INSERT OR REPLACE INTO consents VALUES (?, ?, ?, ?)", row)


# ── 47.5  Registration tokens ────────────────────────────────────────────────


class RegistrationToken(NamedTuple):
    """A row of registration_tokens."""

    token: str
    uses_allowed: int | None
    completed: int
    expires_ts: int | None


class RegistrationTokens:
    """Tokens that admins have made beside the configured one."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self.db = hs.db
        hs.accounts.has_tokens = self.exist
        hs.accounts.on_registered(self._use)

    def exist(self) -> bool:
        """Whether there is any; one that has expired still says that registration wants one."""
        return self.db.one("SELECT 1 FROM registration_tokens LIMIT 1") is not None

    def find(self, token: str) -> RegistrationToken | None:
        """The token, whether it is still good or not."""
        row = self.db.one(
            """
            SELECT token, uses_allowed, completed, expires_ts
            FROM registration_tokens
            WHERE token = ?
            """,
            (token,),
        )
        return None if row is None else RegistrationToken(*row)

    def all(self) -> list[RegistrationToken]:
        """All tokens, in alphabetical order."""
        rows = self.db.all(
            """
            SELECT token, uses_allowed, completed, expires_ts
            FROM registration_tokens
            ORDER BY token
            """
        )
        return [RegistrationToken(*row) for row in rows]

    def pending(self, token: str) -> int:
        """How many registrations have shown it and are not finished."""
        sessions = self.hs.accounts.uia.live()
        return sum(session.results.get(REGISTRATION_TOKEN) == token for session in sessions)

    def is_good(self, row: RegistrationToken) -> bool:
        """Whether somebody could register with it now."""
        used = row.completed + self.pending(row.token)
        is_left = row.uses_allowed is None or used < row.uses_allowed
        return is_left and (row.expires_ts is None or row.expires_ts > now_ms())

    def put(self, row: RegistrationToken) -> None:
        """Make a token, or change one. 400 when it cannot be one."""
        if not RELIABLE_TOKEN.fullmatch(row.token):
            raise invalid_param("A token consists of up to 64 of 0-9 a-z A-Z . _ ~ -")
        if row.uses_allowed is not None and not 0 <= row.uses_allowed <= MAX_CANONICAL_INT:
            raise invalid_param("uses_allowed is a number from 0 on, or null")
        if row.expires_ts is not None and not now_ms() <= row.expires_ts <= MAX_CANONICAL_INT:
            raise invalid_param("expiry_time lies in the past")
        with self.db.write():
            sql = "INSERT OR REPLACE INTO registration_tokens VALUES (?, ?, ?, ?)"
            self.db.execute(sql, row)

    def delete(self, token: str) -> bool:
        """Delete a token; whether there was one."""
        with self.db.write():
            sql = "DELETE FROM registration_tokens WHERE token = ?"
            return self.db.execute(sql, (token,)).rowcount > 0

    def _use(self, _nid: UserNid, session: UiaSession) -> None:
        """Count a registration. 403 when the token was used up, or deleted, in the meantime."""
        token = session.results.get(REGISTRATION_TOKEN)
        if token is None:
            return
        cursor = self.db.execute(
            """
            UPDATE registration_tokens
            SET completed = completed + 1
            WHERE token = ? AND (uses_allowed IS NULL OR completed < uses_allowed)
            """,
            (token,),
        )
        if not cursor.rowcount:
            raise forbidden("This registration token is not good any more")


def is_fixed_token(hs: Homeserver, token: str) -> bool:
    """Whether this is the configured token, or the one printed for the first account."""
    configured = hs.config.registration_token if hs.config.allow_registration else None
    known = filter(None, (configured, hs.accounts.first_admin_token()))
    return any([hmac.compare_digest(right.encode(), token.encode()) for right in known])


def is_registration_token(hs: Homeserver, token: str, address: str) -> bool:
    """Whether the token lets somebody register now; wrong ones count against the address."""
    keys = [("token", address_group(address))]
    hs.accounts.guesses.take(keys)
    row = hs.registration_tokens.find(token) if hs.config.allow_registration else None
    good = is_fixed_token(hs, token) or (row is not None and hs.registration_tokens.is_good(row))
    if good:
        hs.accounts.guesses.refund(keys)
    return good


@stage(REGISTRATION_TOKEN)
async def has_token(hs: Homeserver, request: Request, auth: Json, session: UiaSession) -> bool:
    """Whether the token is good."""
    check_shape(auth, {"token": str}, "auth")
    if not is_registration_token(hs, auth["token"], request.address):
        return False
    if not is_fixed_token(hs, auth["token"]):  # whose uses nobody counts
        session.results[REGISTRATION_TOKEN] = auth["token"]
    return True


VALIDITY = "/_matrix/client/v1/register/m.login.registration_token/validity"


@route("GET", VALIDITY, auth=NONE, limit="register")
async def registration_token_validity(hs: Homeserver, request: Request) -> Json:
    """Whether a registration token would be accepted now; wrong ones count as guesses."""
    check_shape(request.query, {"token": [str]}, "The query")
    if not hs.config.allow_registration and hs.accounts.has_users():
        raise forbidden("Registration is disabled")
    return {"valid": is_registration_token(hs, request.query["token"][0], request.address)}


# ── 47.6  JSON web tokens ────────────────────────────────────────────────────

JWT_CLAIMS = {"sub": str, "exp": float, "nbf?": float, "iat?": float}


def jwt_claims(token: str, secret: str) -> Json:
    """The claims of a token that this secret signed; ValueError or MatrixError for any other.

    Spec: RFC 7519, RFC 7515. Trap: which algorithm it was is not for the token to say.
    """
    if len(token) > MAX_ID_BYTES * 16:
        raise ValueError("too long")
    signed, _, signature = token.rpartition(".")
    head, _, body = signed.partition(".")
    right = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest()
    padded = [
        base64.b64decode(p + "=" * (-len(p) % 4), b"-_", True) for p in (signature, head, body)
    ]
    if not hmac.compare_digest(padded[0], right):
        raise ValueError("the signature is not right")
    header, claims = parse_json(padded[1]), parse_json(padded[2])
    check_shape(header, {"alg": str})
    check_shape(claims, JWT_CLAIMS)
    if header["alg"] != "HS256" or "crit" in header:
        raise ValueError("only HS256, and nothing beyond it")
    now = now_ms() / 1000
    if not claims.get("nbf", 0) <= now < claims["exp"]:
        raise ValueError("not now")
    return cast(Json, claims)


@login_type("org.matrix.login.jwt", operator.attrgetter("jwt_secret"))
async def user_by_jwt(hs: Homeserver, request: Request) -> UserNid | None:
    """org.matrix.login.jwt: a token in which a service with jwt_secret names the user as `sub`."""
    check_shape(request.json, {"token": str})
    keys = [("token", address_group(request.address))]
    hs.accounts.guesses.take(keys)
    try:
        claims = jwt_claims(request.json["token"], hs.config.jwt_secret or "")
    except (ValueError, MatrixError) as error:
        raise forbidden("This JSON web token is not valid") from error
    hs.accounts.guesses.refund(keys)
    user_id = user_of_name(hs, {"user": claims["sub"]}) or ""
    account = None if user_id == hs.accounts.bot_id else hs.accounts.find(user_id)
    return None if account is None else account.nid


# ── 47.7  Moderating accounts ────────────────────────────────────────────────

MARKS = {"lock": "locked", "suspend": "suspended"}
MARK_PATHS = (
    "/_matrix/client/v1/admin/lock/{user_id}",
    "/_matrix/client/v1/admin/suspend/{user_id}",
)


def moderated_account(hs: Homeserver, request: Request, user_id: str) -> tuple[str, Account]:
    """Which mark a path is about, and the account of the user in it; 400, 403 or 404."""
    if not is_user_id(user_id) or not hs.is_local(user_id):
        raise invalid_param("This is no user of this server")
    account = hs.accounts.find(user_id)
    if account is None or account.deactivated:
        raise not_found("There is no such account")
    if account.is_admin and account.nid != request.user.nid:
        raise forbidden("This is an admin")
    return MARKS[request.segments[-2]], account


@route("GET", MARK_PATHS[0], auth=ADMIN, also=MARK_PATHS[1:])
async def get_mark(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Whether an account is locked or suspended.  Spec: "Server Administration"."""
    mark, account = moderated_account(hs, request, user_id)
    return {mark: getattr(account, mark)}


@route("PUT", MARK_PATHS[0], auth=ADMIN, also=MARK_PATHS[1:], body=ANY_OBJECT)
async def put_mark(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Lock or suspend an account, or take that back; never one's own or another admin's."""
    mark, account = moderated_account(hs, request, user_id)
    check_shape(request.json, {mark: bool})
    if account.is_admin:
        raise forbidden("This is your own account")
    hs.accounts.set_mark(account.nid, mark, request.json[mark])
    return {mark: request.json[mark]}


def connection_of(device: Json) -> Json:
    """Where a device was last seen, as whois tells it."""
    return {"ip": device.get("last_seen_ip", ""), "last_seen": device.get("last_seen_ts", 0)}


@route("GET", V3 + "/admin/whois/{user_id}", auth=USER)
async def who_is(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Where a user's devices were last seen, for themselves and for admins."""
    if user_id != request.user.user_id:
        check_caller(ADMIN, request.user)
    account = hs.accounts.find(user_id)
    if account is None:
        raise not_found("There is no such account")
    devices = {
        device["device_id"]: {"sessions": [{"connections": [connection_of(device)]}]}
        for device in hs.accounts.devices(account.nid)
    }
    return {"user_id": user_id, "devices": devices}


OAUTH_PATH = "/_matrix/client/v1/auth_metadata"


@route("GET", OAUTH_PATH, auth=NONE)
async def auth_metadata(_hs: Homeserver, _request: Request) -> Json:
    """404 M_UNRECOGNIZED tells clients to sign in by the legacy API.  Spec: "Server metadata"."""
    raise MatrixError(404, "M_UNRECOGNIZED", "This server does not use OAuth 2.0")


@route("GET", V3 + "/login/sso/redirect", auth=NONE)
@route("GET", V3 + "/login/sso/redirect/{idp_id}", auth=NONE)
async def sso_redirect(_hs: Homeserver, _request: Request, idp_id: str = "") -> Json:
    """No identity provider is known, so nobody is sent to one.  Spec: "SSO client login"."""
    raise not_found("There is no single sign-on on this server")


# ═════════════════════════════════════════════════════════════════════════════
#  15. PROFILES, ACCOUNT DATA, FILTERS
#
#  What people say about themselves to others (name, picture, further fields),
#  what their clients keep here for themselves (account data, tags), and what
#  their clients want to be sent (filters).      spec: CS-API "Profiles", "Client
#  Config", "Room Tagging", "Ignoring Users", "Filtering"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE profiles (
    user_nid INTEGER NOT NULL,
    field TEXT NOT NULL,
    value TEXT NOT NULL,        -- JSON
    PRIMARY KEY (user_nid, field)
) WITHOUT ROWID;
CREATE TABLE account_data (
    user_nid INTEGER NOT NULL,
    room_nid INTEGER NOT NULL,  -- 0: not of a room
    type TEXT NOT NULL,         -- tags are of type m.tag
    pos INTEGER NOT NULL,
    content TEXT NOT NULL,      -- JSON; null once it is deleted
    PRIMARY KEY (user_nid, room_nid, type)
) WITHOUT ROWID;
CREATE INDEX account_data_changes ON account_data (user_nid, pos);
CREATE TABLE filters (
    user_nid INTEGER NOT NULL,
    filter_id INTEGER NOT NULL,
    content TEXT NOT NULL,      -- canonical JSON, so equal filters are equal text
    PRIMARY KEY (user_nid, filter_id)
) WITHOUT ROWID;
""")
invariant(
    "account data newer than the stream",
    """
    SELECT pos
    FROM account_data
    WHERE pos > (SELECT value FROM meta WHERE key = 'stream_reserved')
    """,
)

MAX_PROFILE_BYTES = 65_535
MAX_DISPLAY_NAME = 256  # characters
MAX_ACCOUNT_DATA_BYTES = 1_048_576  # of one type
MAX_TAGS = 100  # of one room
MAX_FILTER_BYTES = 65_536
MAX_FILTERS = 500  # of one user; beyond, the oldest goes

# ── 15.1  Profiles ───────────────────────────────────────────────────────────

PROFILE = V3 + "/profile/{user_id}"
PROFILE_FIELD = PROFILE + "/{name}"
PROFILE_FIELD_OLD = ("/_matrix/client/unstable/uk.tcpip.msc4133/profile/{user_id}/{name}",)
FIELD_NAME = re.compile(r"[a-z][a-z0-9._-]*")
FIELD_VALUES: Final = {  # what texts those fields take that clients rely on
    "displayname": re.compile(r".{0,256}", re.DOTALL),
    "avatar_url": re.compile(r"(?:mxc://[0-9A-Za-z.:\[\]-]{1,255}/[0-9A-Za-z_-]{1,255})?"),
    "m.tz": re.compile(r"[A-Za-z0-9_+-]{1,32}(?:/[A-Za-z0-9_+-]{1,32}){0,2}"),
}
MEMBER_FIELDS = ("displayname", "avatar_url")  # these are repeated in member events
NOT_REPEATED = {*MEMBER_FIELDS, "reason", "join_authorised_via_users_server", "third_party_invite"}


class Profiles:
    """The profiles of users, and who wants to know when one changes."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self._listeners: list[Callable[[UserNid], None]] = []
        self.on_change = self._listeners.append  # called with each new name or avatar
        hs.accounts.name_account = self._name_account
        hs.accounts.member_content = self._member_content
        hs.accounts.on_deactivated(self._delete)

    def of(self, nid: UserNid) -> Json:
        """All fields of a user's profile."""
        rows = self.hs.db.all("SELECT field, value FROM profiles WHERE user_nid = ?", (nid,))
        return {name: json.loads(value) for name, value in rows}

    def put(self, nid: UserNid, name: str, value: Any) -> None:
        """Set one field, or take it away (None). 400 M_PROFILE_TOO_LARGE over 64 KiB in all."""
        old = self.of(nid)
        if old.get(name) == value:
            return
        if len(canonical_json({**old, name: value})) > MAX_PROFILE_BYTES:
            raise MatrixError(400, "M_PROFILE_TOO_LARGE", "A profile has at most 64 KiB")
        with self.hs.db.write():
            if value is None:
                sql = "DELETE FROM profiles WHERE user_nid = ? AND field = ?"
                self.hs.db.execute(sql, (nid, name))
            else:
                sql = "INSERT OR REPLACE INTO profiles VALUES (?, ?, ?)"
                self.hs.db.execute(sql, (nid, name, json.dumps(value)))
            if name in MEMBER_FIELDS:
                self.hs.accounts.update_rooms(nid)
                for listener in self._listeners:
                    listener(nid)

    def _name_account(self, nid: UserNid, display_name: str) -> None:
        self.put(nid, "displayname", display_name[:MAX_DISPLAY_NAME])

    def _member_content(self, nid: UserNid, content: Json) -> Json:
        """What the member event of a joined user says, with the profile of today."""
        if content.get("membership") != "join":
            return content
        profile = self.of(nid)
        if all(content.get(name) == profile.get(name) for name in MEMBER_FIELDS):
            return content
        kept = {name: value for name, value in content.items() if name not in NOT_REPEATED}
        return kept | {name: profile[name] for name in MEMBER_FIELDS if name in profile}

    def _delete(self, nid: UserNid) -> None:
        """Of a deactivated account nothing is shown any more."""
        self.hs.db.execute("DELETE FROM profiles WHERE user_nid = ?", (nid,))
        for listener in self._listeners:
            listener(nid)


def profile_of(hs: Homeserver, user_id: str) -> Json:
    """The profile of a user, empty when none is known."""
    nid = hs.db.find_user_nid(user_id)
    return {} if nid is None else hs.profiles.of(nid)


@route("GET", PROFILE, auth=NONE)
async def get_profile(hs: Homeserver, _request: Request, user_id: str) -> Json:
    """All that a user says about themselves.  Spec: "Profiles"."""
    if not is_user_id(user_id):
        raise invalid_param("This is not a user id")
    if not hs.accounts.is_active(user_id):
        raise not_found("There is no profile of this user")
    return profile_of(hs, user_id)


@route("GET", PROFILE_FIELD, auth=NONE, also=PROFILE_FIELD_OLD)
async def get_profile_field(hs: Homeserver, request: Request, user_id: str, name: str) -> Json:
    """One field of a profile. 404 M_NOT_FOUND when it is not set."""
    profile = await get_profile(hs, request, user_id)
    if name not in profile:
        raise not_found("This user has no such profile field")
    return {name: profile[name]}


def check_may_edit_profile(hs: Homeserver, request: Request, user_id: str, name: str) -> None:
    """403 for profiles of others, for suspended users, and for guests but for their name."""
    if byte_length(name) > MAX_ID_BYTES:
        raise MatrixError(400, "M_KEY_TOO_LARGE", "A field's name has at most 255 bytes")
    if not FIELD_NAME.fullmatch(name):
        raise invalid_param("This cannot be the name of a profile field")
    check_own_user(request, user_id)
    refuse_suspended(hs, request.user)
    if request.user.is_guest and name != "displayname":
        raise MatrixError(403, "M_GUEST_ACCESS_FORBIDDEN", "Guests have a display name only")


def checked_field(name: str, value: Any) -> Any:
    """A value as it is stored; None for an empty name or avatar."""
    form = FIELD_VALUES.get(name)
    if value is None or (form is not None and not isinstance(value, str)):
        raise bad_json(f"{name} is of the wrong type")
    if form is not None and not form.fullmatch(value):
        raise invalid_param(f"{name} is too long, or nothing that clients could show")
    return None if name in MEMBER_FIELDS and not value else value


@route("PUT", PROFILE_FIELD, auth=GUEST, also=PROFILE_FIELD_OLD, body=ANY_OBJECT)
async def put_profile_field(hs: Homeserver, request: Request, user_id: str, name: str) -> Json:
    """Set a field of the own profile; an empty name or avatar takes it away."""
    check_may_edit_profile(hs, request, user_id, name)
    check_shape(request.json, {name: ANY})
    hs.profiles.put(request.user.nid, name, checked_field(name, request.json[name]))
    return {}


@route("DELETE", PROFILE_FIELD, auth=GUEST, also=PROFILE_FIELD_OLD)
async def delete_profile_field(hs: Homeserver, request: Request, user_id: str, name: str) -> Json:
    """Take a field out of the own profile."""
    check_may_edit_profile(hs, request, user_id, name)
    hs.profiles.put(request.user.nid, name, None)
    return {}


# ── 15.2  Account data ───────────────────────────────────────────────────────

NO_ROOM: Final = RoomNid(0)
SERVER_MANAGED = ("m.fully_read", "m.push_rules")
USER_DATA = V3 + "/user/{user_id}/account_data/{data_type}"
USER_ROOM = V3 + "/user/{user_id}/rooms/{room_id}"
ROOM_DATA_PATH = USER_ROOM + "/account_data/{data_type}"
MSC3391 = "/_matrix/client/unstable/org.matrix.msc3391"


class AccountData:
    """What clients keep here for their user: by type, for the account or for a room."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        capacity = int(10_000 * hs.config.conduit_cache_capacity_modifier)
        self.latest: LruCache[UserNid, int] = LruCache(capacity)  # the newest position
        self.ignored: LruCache[UserNid, frozenset[str]] = LruCache(capacity)
        self._sources: dict[str, Callable[[UserNid], Json]] = {}
        hs.db.on_reset(self.latest.clear)
        hs.db.on_reset(self.ignored.clear)
        hs.accounts.on_deactivated(self._erase)
        hs.accounts.on_device_deleted(self._device_deleted)

    def add_source(self, data_type: str, content_of: Callable[[UserNid], Json]) -> None:
        """Let a later chapter answer for a global type that it keeps itself."""
        self._sources[data_type] = content_of

    def get(self, nid: UserNid, room_nid: RoomNid, data_type: str) -> Json | None:
        """The content, or None if there is none."""
        if room_nid == NO_ROOM and data_type in self._sources:
            return self._sources[data_type](nid)
        sql = "SELECT content FROM account_data WHERE user_nid = ? AND room_nid = ? AND type = ?"
        text = self.hs.db.value(sql, (nid, room_nid, data_type))
        return None if text is None else cast(Json, json.loads(text))

    def put(self, nid: UserNid, room_nid: RoomNid, data_type: str, content: Json | None) -> None:
        """Store content, or that it was deleted (None), and tell the user's clients."""
        text = encode_json(content).decode()
        if byte_length(data_type) > MAX_ID_BYTES:
            raise invalid_param(f"A type has at most {MAX_ID_BYTES} bytes")
        if len(text) > MAX_ACCOUNT_DATA_BYTES:
            raise too_large(f"Account data of one type has at most {MAX_ACCOUNT_DATA_BYTES} bytes")
        with self.hs.db.write():
            pos = self.hs.stream.stamp(ROOM_DATA if room_nid else ACCOUNT_DATA, nid)
            row = (nid, room_nid, data_type, pos, text)
            self.hs.db.execute("INSERT OR REPLACE INTO account_data VALUES (?, ?, ?, ?, ?)", row)
        self.latest.put(nid, pos)
        self.ignored.pop(nid)

    def changes(self, nid: UserNid, since: int) -> list[tuple[RoomNid, Json]]:
        """What changed after a position, with its room; if nothing did, memory knows.

        What was deleted is empty, and clients that know nothing yet do not hear of it.
        """
        latest = self.latest.get(nid)
        if latest is None:
            sql = "SELECT MAX(pos) FROM account_data WHERE user_nid = ?"
            latest = self.hs.db.value(sql, (nid,)) or 0
            self.latest.put(nid, latest)
        if latest <= since:
            return []
        rows = self.hs.db.all(
            """
            SELECT room_nid, type, content
            FROM account_data
            WHERE user_nid = :user AND pos > :since AND (:since OR content <> 'null')
            ORDER BY pos
            """,
            {"user": nid, "since": since},
        )
        return [
            (room, {"type": kind, "content": json.loads(text) or {}}) for room, kind, text in rows
        ]

    def _device_deleted(self, nid: UserNid, _: DeviceNid, device_id: str) -> None:
        """What a client keeps for one device ends with it.  Spec: MSC3890."""
        data_type = f"org.matrix.msc3890.local_notification_settings.{device_id}"
        if self.get(nid, NO_ROOM, data_type) is not None:
            self.put(nid, NO_ROOM, data_type, None)

    def _erase(self, nid: UserNid) -> None:
        """Of an account that is to be erased, nothing of this stays."""
        account = self.hs.accounts.get(nid)
        if account is not None and account.erased:
            self.hs.db.execute("DELETE FROM account_data WHERE user_nid = ?", (nid,))
            self.hs.db.execute("DELETE FROM filters WHERE user_nid = ?", (nid,))
        self.latest.pop(nid)
        self.ignored.pop(nid)


def global_account_data(hs: Homeserver, user_nid: UserNid, since: int) -> list[Json]:
    """The account's own data that changed after a position."""
    changes = hs.account_data.changes(user_nid, since)
    return [event for room_nid, event in changes if room_nid == NO_ROOM]


def room_account_data(hs: Homeserver, user_nid: UserNid, since: int) -> dict[RoomNid, list[Json]]:
    """The data of rooms that changed after a position, by room, tags that went included."""
    by_room: dict[RoomNid, list[Json]] = {}
    for room_nid, event in hs.account_data.changes(user_nid, since):
        if room_nid != NO_ROOM:
            by_room.setdefault(room_nid, []).append(event)
    return by_room


def room_account_data_of(hs: Homeserver, user_nid: UserNid, room_nid: RoomNid) -> list[Json]:
    """All of the user's data of one room."""
    query = """
        SELECT type, content
        FROM account_data
        WHERE user_nid = ? AND room_nid = ? AND content <> 'null'
    """
    rows = hs.db.all(query, (user_nid, room_nid))
    return [{"type": kind, "content": json.loads(text)} for kind, text in rows]


def get_room_account_data(
    hs: Homeserver, user_nid: UserNid, room_nid: RoomNid, data_type: str
) -> Json | None:
    """One type of the user's data of a room, or None."""
    return hs.account_data.get(user_nid, room_nid, data_type)


def set_room_account_data(
    hs: Homeserver, user_nid: UserNid, room_nid: RoomNid, data_type: str, content: Json
) -> None:
    """Set one type of the user's data of a room, for types that the server manages as well."""
    hs.account_data.put(user_nid, room_nid, data_type, content)


def ignored_users(hs: Homeserver, user_nid: UserNid) -> frozenset[str]:
    """Whom the user ignores.  Spec: "Ignoring Users"."""
    found = hs.account_data.ignored.get(user_nid)
    if found is None:
        content = hs.account_data.get(user_nid, NO_ROOM, "m.ignored_user_list") or {}
        listed = content.get("ignored_users")
        found = frozenset(listed if isinstance(listed, dict) else ()) - {hs.db.user_id(user_nid)}
        hs.account_data.ignored.put(user_nid, found)
    return found


# Who may invite: the first list that names the inviter decides.
# Spec: CS-API "Invite permission"; MSC4155
INVITE_PERMISSION = ("m.invite_permission_config", "org.matrix.msc4155.invite_permission_config")
ALLOW, IGNORE, BLOCK = "allowed", "ignored", "blocked"
INVITE_LISTS = tuple(
    (f"{verdict}_{whom}", verdict)
    for whom in ("users", "servers")
    for verdict in (ALLOW, IGNORE, BLOCK)
)


def invite_verdict(content: Json, sender: str) -> str:
    """What a user's configuration says of invites from someone: allowed, ignored or blocked.

    One with a list that is none counts for nothing; [ is no wildcard to the specification.
    """
    lists = {name: content.get(name, []) for name, _ in INVITE_LISTS}
    if content.get("enabled") is False:
        return ALLOW
    for found in lists.values():
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            return ALLOW
    host = re.sub(r":[0-9]+$", "", server_of(sender))
    for name, verdict in INVITE_LISTS:
        whom = sender if name.endswith("users") else host
        if any(fnmatch.fnmatchcase(whom, one.replace("[", "[[]")) for one in lists[name]):
            return verdict
    return BLOCK if content.get("default_action") == "block" else ALLOW


def invite_permission(hs: Homeserver, user_nid: UserNid, sender: str) -> str:
    """Whether invites from `sender` reach a local user: allowed, ignored or blocked."""
    if sender in ignored_users(hs, user_nid):
        return IGNORE
    contents = (hs.account_data.get(user_nid, NO_ROOM, name) for name in INVITE_PERMISSION)
    verdicts = (invite_verdict(content, sender) for content in contents if content)
    return next((verdict for verdict in verdicts if verdict != ALLOW), ALLOW)


def require_inviting_allowed(hs: Homeserver, user_id: str, sender: str) -> None:
    """403 M_INVITE_BLOCKED where a local user blocks invites from `sender`."""
    user_nid = hs.db.find_user_nid(user_id)
    if user_nid is not None and invite_permission(hs, user_nid, sender) == BLOCK:
        raise MatrixError(403, "M_INVITE_BLOCKED", f"{user_id} does not want this invite")


def own_room(hs: Homeserver, request: Request, user_id: str, room_id: str | None) -> RoomNid:
    """The room of a path below the own user; 404 for rooms the user never had to do with."""
    check_own_user(request, user_id)
    if room_id is None:
        return NO_ROOM
    room = hs.rooms.find(room_id)
    if room is None or room.membership_of(request.user.nid) is None:
        raise not_found("You were never in this room")
    return room.nid


@route("PUT", USER_DATA, auth=USER, body=ANY_OBJECT)
@route("PUT", ROOM_DATA_PATH, auth=USER, body=ANY_OBJECT)
async def put_account_data(
    hs: Homeserver, request: Request, user_id: str, data_type: str, room_id: str | None = None
) -> Json:
    """Keep data for the user's clients. 405 M_BAD_JSON for what has endpoints of its own."""
    room_nid = own_room(hs, request, user_id, room_id)
    if data_type in SERVER_MANAGED:
        raise MatrixError(405, "M_BAD_JSON", f"Cannot set {data_type} through this API")
    hs.account_data.put(request.user.nid, room_nid, data_type, request.json)
    return {}


@route("GET", USER_DATA, auth=USER)
@route("GET", ROOM_DATA_PATH, auth=USER)
async def get_account_data(
    hs: Homeserver, request: Request, user_id: str, data_type: str, room_id: str | None = None
) -> Json:
    """Data that the user's clients keep. 404 M_NOT_FOUND when there is none."""
    room_nid = own_room(hs, request, user_id, room_id)
    content = hs.account_data.get(request.user.nid, room_nid, data_type)
    if content is None:
        raise not_found("There is no account data of this type")
    return content


@route("DELETE", USER_DATA.replace(V3, MSC3391), auth=USER)
@route("DELETE", ROOM_DATA_PATH.replace(V3, MSC3391), auth=USER)
async def delete_account_data(
    hs: Homeserver, request: Request, user_id: str, data_type: str, room_id: str | None = None
) -> Json:
    """Delete what is kept under a type, if anything is.  Spec: MSC3391."""
    room_nid = own_room(hs, request, user_id, room_id)
    if data_type in SERVER_MANAGED:
        raise MatrixError(405, "M_BAD_JSON", f"Cannot delete {data_type} through this API")
    if hs.account_data.get(request.user.nid, room_nid, data_type) is not None:
        hs.account_data.put(request.user.nid, room_nid, data_type, None)
    return {}


# ── 15.3  Tags ───────────────────────────────────────────────────────────────


def tags_of(hs: Homeserver, user_nid: UserNid, room_nid: RoomNid) -> Json:
    """The tags that the user has on a room; a client may have stored anything in their place."""
    content = hs.account_data.get(user_nid, room_nid, "m.tag") or {}
    tags = content.get("tags")
    return tags if isinstance(tags, dict) else {}


@route("GET", USER_ROOM + "/tags", auth=USER)
async def get_tags(hs: Homeserver, request: Request, user_id: str, room_id: str) -> Json:
    """The user's tags on a room.  Spec: "Room Tagging"."""
    room_nid = own_room(hs, request, user_id, room_id)
    return {"tags": tags_of(hs, request.user.nid, room_nid)}


@route("PUT", USER_ROOM + "/tags/{tag}", auth=USER, body={"order?": float})
async def put_tag(hs: Homeserver, request: Request, user_id: str, room_id: str, tag: str) -> Json:
    """Put a tag on a room."""
    room_nid = own_room(hs, request, user_id, room_id)
    tags = {**tags_of(hs, request.user.nid, room_nid), tag: request.json}
    if not 0 <= request.json.get("order", 0) <= 1:
        raise invalid_param("order must be between 0 and 1")
    if byte_length(tag) > MAX_ID_BYTES or len(tags) > MAX_TAGS:
        raise invalid_param(f"A tag has at most {MAX_ID_BYTES} bytes, a room {MAX_TAGS} tags")
    hs.account_data.put(request.user.nid, room_nid, "m.tag", {"tags": tags})
    return {}


@route("DELETE", USER_ROOM + "/tags/{tag}", auth=USER)
async def delete_tag(
    hs: Homeserver, request: Request, user_id: str, room_id: str, tag: str
) -> Json:
    """Take a tag off a room, if it is there."""
    room_nid = own_room(hs, request, user_id, room_id)
    tags = tags_of(hs, request.user.nid, room_nid)
    if tags.pop(tag, None) is not None:
        hs.account_data.put(request.user.nid, room_nid, "m.tag", {"tags": tags})
    return {}


# ── 15.4  Filters ────────────────────────────────────────────────────────────

FILTER_PATH = V3 + "/user/{user_id}/filter"
EVENT_FILTER: Final[Json] = {
    "limit?": int,
    **{"senders?": [str], "not_senders?": [str], "types?": [str], "not_types?": [str]},
}
MSC3874: Final = "org.matrix.msc3874."  # filters by relation: the names that clients still send
ROOM_EVENT_FILTER: Final[Json] = {
    **EVENT_FILTER,
    **{"rooms?": [str], "not_rooms?": [str], "contains_url?": bool},
    **{"lazy_load_members?": bool, "include_redundant_members?": bool},
    **{"related_by_senders?": [str], "related_by_rel_types?": [str]},
    "unread_thread_notifications?": bool,
    **{"rel_types?": [str], "not_rel_types?": [str]},
    **{f"{MSC3874}rel_types?": [str], f"{MSC3874}not_rel_types?": [str]},
}
ROOM_FILTER: Final[Json] = {
    **{"rooms?": [str], "not_rooms?": [str], "include_leave?": bool},
    **dict.fromkeys(("ephemeral?", "state?", "timeline?", "account_data?"), ROOM_EVENT_FILTER),
}
FILTER: Final[Json] = {
    **{"event_fields?": [str], "event_format?": str, "room?": ROOM_FILTER},
    **{"presence?": EVENT_FILTER, "account_data?": EVENT_FILTER},
}
FILTER_IDS: Final[dict[str, Callable[[object], bool]]] = {
    **{"senders": is_user_id, "not_senders": is_user_id},
    **{"rooms": is_room_id, "not_rooms": is_room_id},
}


def check_filter_values(part: Json, shape: Json) -> None:
    """Check limits and ids in a part of a filter, of the members that its shape knows.

    Trap: the specification wants limits above 0, but clients send 0 for "nothing of this".
    """
    for name in {key.removesuffix("?") for key in shape} & part.keys():
        value, inner = part[name], shape.get(name + "?")
        if isinstance(inner, dict):
            check_filter_values(value, inner)
        elif name == "limit" and value < 0:
            raise bad_json("limit must not be negative")
        elif name in FILTER_IDS and not all(map(FILTER_IDS[name], value)):
            raise bad_json(f"{name} has something in it that is no id")


def check_filter(definition: Any) -> None:
    """400 M_BAD_JSON for what is no filter; null members are taken out."""
    check_shape(definition, FILTER, "The filter")
    if definition.get("event_format", "client") not in ("client", "federation"):
        raise bad_json("event_format must be client or federation")
    check_filter_values(definition, FILTER)


class Filters:
    """The filters that clients have stored."""

    def __init__(self, hs: Homeserver) -> None:
        self.db = hs.db

    def store(self, nid: UserNid, definition: Json) -> str:
        """Keep a filter; equal ones have one id."""
        text = canonical_json(definition).decode()
        if len(text) > MAX_FILTER_BYTES:
            raise too_large(f"A filter has at most {MAX_FILTER_BYTES} bytes")
        sql = "SELECT filter_id FROM filters WHERE user_nid = ? AND content = ?"
        known = self.db.value(sql, (nid, text))
        if known is not None:
            return str(known)
        last = self.db.value("SELECT MAX(filter_id) FROM filters WHERE user_nid = ?", (nid,))
        filter_id = 1 + (last or 0)
        with self.db.write():
            self.db.execute("INSERT INTO filters VALUES (?, ?, ?)", (nid, filter_id, text))
            oldest = (nid, filter_id - MAX_FILTERS)
            self.db.execute("DELETE FROM filters WHERE user_nid = ? AND filter_id <= ?", oldest)
        return str(filter_id)

    def get(self, nid: UserNid, filter_id: str) -> Json:
        """The filter that an id stands for. 404 M_NOT_FOUND."""
        text = None
        if re.fullmatch("[0-9]{1,15}", filter_id):
            sql = "SELECT content FROM filters WHERE user_nid = ? AND filter_id = ?"
            text = self.db.value(sql, (nid, int(filter_id)))
        if text is None:
            raise not_found("There is no filter with this id")
        return cast(Json, json.loads(text))


def get_filter(hs: Homeserver, user_nid: UserNid, text: str) -> Json:
    """The filter of a query: inline JSON or a stored id. 400 M_INVALID_PARAM, 404 M_NOT_FOUND."""
    if not text.startswith("{"):
        return hs.filters.get(user_nid, text)
    try:
        definition = parse_json(text.encode("utf-8", "surrogatepass"))
        check_filter(definition)
    except MatrixError as error:
        raise invalid_param(f"filter: {error.error}") from error
    return cast(Json, definition)


@route("POST", FILTER_PATH, auth=GUEST, body=ANY_OBJECT)
async def post_filter(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Store a filter for later requests.  Spec: "Filtering"."""
    check_own_user(request, user_id)
    check_filter(request.json)
    return {"filter_id": hs.filters.store(request.user.nid, request.json)}


@route("GET", FILTER_PATH + "/{filter_id}", auth=GUEST)
async def get_stored_filter(hs: Homeserver, request: Request, user_id: str, filter_id: str) -> Json:
    """A filter that was stored."""
    check_own_user(request, user_id)
    return hs.filters.get(request.user.nid, filter_id)


# ═════════════════════════════════════════════════════════════════════════════
#  16. DIRECTORY
#
#  How rooms and people are found: aliases that stand for rooms, the list of
#  published rooms, and the search for users, which shows to each only those
#  whom they could have met.      spec: CS-API "Room aliases", "Published room
#  directory", "User Directory"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE aliases (
    alias TEXT PRIMARY KEY,
    room_nid INTEGER NOT NULL,
    creator_nid INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX aliases_of_room ON aliases (room_nid);
CREATE TABLE published_rooms (room_nid INTEGER PRIMARY KEY); -- in the room list
CREATE TABLE public_rooms (room_nid INTEGER PRIMARY KEY);    -- anybody could join or look in
""")
invariant(
    "aliases of rooms that are not there",
    "SELECT alias FROM aliases WHERE room_nid NOT IN (SELECT room_nid FROM rooms)",
)

ADMINS_ALIAS = "admins"  # the admin room's; nobody else is ever to have it
MAX_LISTED = 500  # rooms in one answer
MAX_FOUND = 50  # users in one answer

# ── 16.1  Aliases ────────────────────────────────────────────────────────────

ALIAS = V3 + "/directory/room/{alias}"


def check_local_alias(hs: Homeserver, alias: str) -> None:
    """400 M_INVALID_PARAM for what is no alias of this server."""
    if not is_room_alias(alias) or any(char.isspace() or not char.isprintable() for char in alias):
        raise invalid_param("This is not a room alias")
    if server_of(alias) != hs.config.server_name:
        raise invalid_param("Aliases can be made on this server only")


def find_alias(hs: Homeserver, alias: str) -> str | None:
    """The id of the room that a local alias stands for, or None."""
    nid = hs.db.value("SELECT room_nid FROM aliases WHERE alias = ?", (alias,))
    return None if nid is None else hs.rooms.by_nid(nid).room_id


def resolve_alias(hs: Homeserver, alias: str) -> tuple[str, list[str]]:
    """The room id that an alias stands for, and servers that know the room. 404 M_NOT_FOUND."""
    if not is_room_alias(alias):
        raise invalid_param("This is not a room alias")
    room_id = find_alias(hs, alias)
    if room_id is None:
        raise not_found(f"The alias {alias} does not stand for a room")
    return room_id, [hs.config.server_name]


def set_alias(hs: Homeserver, alias: str, room: Room, creator: str) -> None:
    """Let an alias stand for a room. 409 when it is in use; 400 M_EXCLUSIVE when it is reserved.

    Trap: #admins is the server's own for ever. Who could point it elsewhere could pretend to be
    the admin room (CVE-2024-6303).
    """
    check_local_alias(hs, alias)
    if alias[1:].partition(":")[0].casefold() == ADMINS_ALIAS and creator != hs.accounts.bot_id:
        raise MatrixError(400, "M_EXCLUSIVE", "This alias is reserved")
    if find_alias(hs, alias) is not None:
        raise MatrixError(409, "M_UNKNOWN", f"The alias {alias} exists already")
    with hs.db.write():
        row = (alias, room.nid, hs.db.user_nid(creator))
        hs.db.execute("INSERT INTO aliases VALUES (?, ?, ?)", row)


def delete_alias(hs: Homeserver, alias: str) -> None:
    """Forget a local alias."""
    with hs.db.write():
        hs.db.execute("DELETE FROM aliases WHERE alias = ?", (alias,))


def may_curate(hs: Homeserver, requester: Requester, room: Room) -> bool:
    """Whether the user may say how a room is found: admins, and who may set its main alias."""
    if hs.accounts.is_admin(requester.nid):
        return True
    levels = room.power_levels()
    is_in = room.membership_of(requester.nid) == "join"
    return is_in and levels.user(requester.user_id) >= levels.event("m.room.canonical_alias", True)


@route("GET", ALIAS, auth=NONE)
async def get_alias(hs: Homeserver, _request: Request, alias: str) -> Json:
    """Which room an alias stands for.  Spec: "Room aliases"."""
    room_id, servers = resolve_alias(hs, alias)
    return {"room_id": room_id, "servers": servers}


@route("PUT", ALIAS, auth=USER, limit="create", body={"room_id": str})
async def put_alias(hs: Homeserver, request: Request, alias: str) -> Json:
    """Make an alias for a room that the user is in. 409 M_UNKNOWN when it exists."""
    check_local_alias(hs, alias)
    refuse_suspended(hs, request.user)
    room = hs.rooms.find(request.json["room_id"])
    if room is None or room.membership_of(request.user.nid) != "join":
        raise forbidden("You are not in this room")
    set_alias(hs, alias, room, request.user.user_id)
    return {}


def withdraw_canonical_alias(hs: Homeserver, room: Room, sender: str, alias: str) -> None:
    """Take a deleted alias out of the room's state, if the user may; it is gone all the same."""
    content = dict(room.content("m.room.canonical_alias"))
    if content.get("alias") == alias:
        del content["alias"]
    if isinstance(others := content.get("alt_aliases"), list):
        content["alt_aliases"] = [other for other in others if other != alias]
    if content != room.content("m.room.canonical_alias"):
        with contextlib.suppress(MatrixError):
            hs.rooms.send(room, sender, "m.room.canonical_alias", content, state_key="")


@route("DELETE", ALIAS, auth=USER)
async def remove_alias(hs: Homeserver, request: Request, alias: str) -> Json:
    """Delete an alias: who made it may, who could set the room's main alias, and admins."""
    check_local_alias(hs, alias)
    row = hs.db.one("SELECT room_nid, creator_nid FROM aliases WHERE alias = ?", (alias,))
    if row is None:
        raise not_found(f"The alias {alias} does not stand for a room")
    room, is_own = hs.rooms.by_nid(row[0]), row[1] == request.user.nid
    is_servers = hs.db.user_id(row[1]) == hs.accounts.bot_id
    if not is_own and (is_servers or not may_curate(hs, request.user, room)):
        raise forbidden("You may not delete this alias")
    delete_alias(hs, alias)
    withdraw_canonical_alias(hs, room, request.user.user_id, alias)
    return {}


ROOM_ALIASES_OLD = ("unstable/org.matrix.msc2432",)


@route("GET", V3 + "/rooms/{room_id}/aliases", auth=USER, also=ROOM_ALIASES_OLD)
async def get_room_aliases(hs: Homeserver, request: Request, room_id: str) -> Json:
    """The local aliases of a room, for its members, or everyone if it is world readable."""
    room = hs.rooms.find(room_id)
    is_in = room is not None and room.membership_of(request.user.nid) == "join"
    if room is None or not (is_in or room.history_visibility == "world_readable"):
        raise forbidden("You are not a member of the room")
    rows = hs.db.all("SELECT alias FROM aliases WHERE room_nid = ? ORDER BY alias", (room.nid,))
    return {"aliases": [row[0] for row in rows]}


# ── 16.2  Published rooms ────────────────────────────────────────────────────

SHOWN_SETTINGS: Final = {  # member of a listing: event type and key in its content
    "name": ("m.room.name", "name"),
    "topic": ("m.room.topic", "topic"),
    "canonical_alias": ("m.room.canonical_alias", "alias"),
    "avatar_url": ("m.room.avatar", "url"),
    "room_type": ("m.room.create", "type"),
}


def listing_of(room: Room) -> Json:
    """How a room is shown in the list."""
    texts = {name: room.setting(*place, "") for name, place in SHOWN_SETTINGS.items()}
    return {name: text for name, text in texts.items() if text} | {
        "room_id": room.room_id,
        "num_joined_members": room.joined_count,
        "world_readable": room.history_visibility == "world_readable",
        "guest_can_join": room.setting("m.room.guest_access", "guest_access", "") == "can_join",
        "join_rule": room.join_rule,
    }


class Directory:
    """Which rooms are listed, how, and in which rooms people can be found by all."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self._listings: LruCache[RoomNid, Json] = LruCache(5_000)
        hs.db.on_reset(self._listings.clear)
        hs.rooms.subscribe(self._on_event)

    def listings(self) -> list[Json]:
        """The published rooms that have somebody in them, large ones first."""
        found = []
        for (nid,) in self.hs.db.all("SELECT room_nid FROM published_rooms"):
            listing = self._listings.get(nid) or listing_of(self.hs.rooms.by_nid(nid))
            self._listings.put(nid, listing)
            if listing["num_joined_members"]:
                found.append(listing)
        return sorted(found, key=lambda room: (-room["num_joined_members"], room["room_id"]))

    def _on_event(self, room: Room, event: Event) -> None:
        if not event.is_state:
            return
        self._listings.pop(room.nid)
        if event.type in ("m.room.join_rules", "m.room.history_visibility"):
            is_public = room.join_rule == "public" or room.history_visibility == "world_readable"
            self.hs.db.execute("DELETE FROM public_rooms WHERE room_nid = ?", (room.nid,))
            if is_public:
                self.hs.db.execute("INSERT INTO public_rooms VALUES (?)", (room.nid,))


def publish_room(hs: Homeserver, room: Room, visibility: str) -> None:
    """Put a room into the list of rooms ("public"), or take it out ("private")."""
    with hs.db.write():
        if visibility == "public":
            hs.db.execute("INSERT OR IGNORE INTO published_rooms VALUES (?)", (room.nid,))
        else:
            hs.db.execute("DELETE FROM published_rooms WHERE room_nid = ?", (room.nid,))


def move_to_replacement(hs: Homeserver, old: Room, new: Room) -> set[str]:
    """Give the local aliases of a room, which are returned, and its place in the list to another.

    The server's own alias stays: who could move #admins could pretend to be the admin room.
    """
    with hs.db.write():
        rows = hs.db.all(
            """
            UPDATE aliases
            SET room_nid = ?
            WHERE room_nid = ?
              AND creator_nid != ?
            RETURNING alias
            """,
            (new.nid, old.nid, hs.db.user_nid(hs.accounts.bot_id)),
        )
        sql = "UPDATE OR IGNORE published_rooms SET room_nid = ? WHERE room_nid = ?"
        hs.db.execute(sql, (new.nid, old.nid))
    return {row[0] for row in rows}


VISIBILITY = V3 + "/directory/list/room/{room_id}"


@route("GET", VISIBILITY, auth=NONE)
async def get_visibility(hs: Homeserver, _request: Request, room_id: str) -> Json:
    """Whether a room is in the list. 404 M_NOT_FOUND for an unknown room."""
    nid = hs.rooms.get(room_id).nid
    row = hs.db.one("SELECT 1 FROM published_rooms WHERE room_nid = ?", (nid,))
    return {"visibility": "private" if row is None else "public"}


@route("PUT", VISIBILITY, auth=USER, limit="create", body={"visibility?": str})
async def put_visibility(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Put a room into the list or take it out, for who may set its main alias."""
    visibility = request.json.get("visibility", "public")
    if visibility not in ("public", "private"):
        raise invalid_param("visibility is public or private")
    room = hs.rooms.get(room_id)
    if not may_curate(hs, request.user, room):
        raise forbidden("You may not change whether this room is listed")
    refuse_suspended(hs, request.user)
    publish_room(hs, room, visibility)
    return {}


# ── 16.3  The list of rooms ──────────────────────────────────────────────────

ROOM_QUERY = {
    **{"limit?": int, "since?": str, "include_all_networks?": bool},
    "filter?": {"generic_search_term?": str, "room_types?": [ANY]},
    "third_party_instance_id?": str,
}


def page_of(rooms: list[Json], since: str, limit: int) -> Json:
    """One page of the list; its tokens are places in it. 400 for what never was a token."""
    if not re.fullmatch("[0-9]{1,9}", since):
        raise invalid_param("since is not a token of this list")
    first = int(since)
    last = first + min(limit, MAX_LISTED)
    answer: Json = {"chunk": rooms[first:last], "total_room_count_estimate": len(rooms)}
    if first > 0:
        answer["prev_batch"] = str(max(0, first - limit))
    if last < len(rooms):
        answer["next_batch"] = str(last)
    return answer


def fits(room: Json, term: str, types: list[str | None] | None) -> bool:
    """Whether a listed room is of the wanted types and has the term in one of its texts."""
    texts = "\n".join(room.get(name, "") for name in ("name", "topic", "canonical_alias"))
    return term in texts.casefold() and (types is None or room.get("room_type") in types)


def public_rooms_page(hs: Homeserver, request: Request, query: Json) -> Json:
    """The page that a query asks for. 404 for the list of a server that is out of reach."""
    if request.arg("server", hs.config.server_name) != hs.config.server_name:
        raise not_found("The room list of that server cannot be reached from here")
    limit = query.get("limit", 100)
    if limit < 1:
        raise invalid_param("limit must be at least 1")
    wanted = query.get("filter", {})
    term, types = wanted.get("generic_search_term", "").casefold(), wanted.get("room_types")
    if query.get("third_party_instance_id") and not query.get("include_all_networks"):
        types = []  # rooms of a bridged network: there are none
    found = [room for room in hs.directory.listings() if fits(room, term, types)]
    return page_of(found, query.get("since", "0"), limit)


@route("GET", V3 + "/publicRooms", auth=NONE, limit="search")
async def get_public_rooms(hs: Homeserver, request: Request) -> Json:
    """The list of published rooms.  Spec: "Published room directory"."""
    limit = request.int_arg("limit", 100, 1, MAX_LISTED)
    return public_rooms_page(hs, request, {"limit": limit, "since": request.arg("since", "0")})


@route("POST", V3 + "/publicRooms", auth=USER, limit="search", body=ROOM_QUERY)
async def search_public_rooms(hs: Homeserver, request: Request) -> Json:
    """The published rooms that fit a search term and are of the wanted types."""
    return public_rooms_page(hs, request, request.json)


# ── 16.4  The search for users ───────────────────────────────────────────────


def matching_members(db: sqlite3.Connection, rooms: str, words: list[str]) -> dict[str, Json]:
    """The members of rooms (JSON list) who have all words in id or name; a scan, for a thread.

    Trap: the name that somebody has in a room is for who sees that room (CVE-2021-39164).
    """
    rows = db.execute(
        """
        SELECT user_id, pdu
        FROM memberships
        JOIN users USING (user_nid)
        JOIN events ON nid = event_nid
        WHERE memberships.room_nid IN (SELECT value FROM json_each(?)) AND membership = 'join'
        """,
        (rooms,),
    )
    found: dict[str, Json] = {}
    for user_id, pdu in rows:
        content = json.loads(pdu)["content"]
        name, avatar = content.get("displayname"), content.get("avatar_url")
        text = f"{user_id}\n{name or ''}".casefold()
        if all(word in text for word in words):
            shown = {"user_id": user_id, "display_name": name, "avatar_url": avatar}
            found[user_id] = {key: value for key, value in shown.items() if isinstance(value, str)}
    return found


USER_QUERY = {"search_term": str, "limit?": int}


@route("POST", V3 + "/user_directory/search", auth=USER, limit="search", body=USER_QUERY)
async def search_users(hs: Homeserver, request: Request) -> Json:
    """Find users by parts of their id or name, in rooms of the searcher or open to all."""
    limit = request.json.get("limit", 10)
    if limit < 1:
        raise invalid_param("limit must be at least 1")
    words = request.json["search_term"].casefold().split()
    if not words:
        return {"results": [], "limited": False}
    rooms = {row[0] for row in hs.db.all("SELECT room_nid FROM public_rooms")}
    among = json.dumps([*rooms.union(hs.rooms.joined_rooms(request.user.nid))])
    found = await hs.db.read_in_thread(lambda db: matching_members(db, among, words))
    found.pop(request.user.user_id, None)
    users = [found[user_id] for user_id in sorted(found)]
    limit = min(limit, MAX_FOUND)
    return {"results": users[:limit], "limited": len(users) > limit}


# ═════════════════════════════════════════════════════════════════════════════
#  41. RELATIONS
#
#  Events that relate to others: edits, replies in threads, references. What relates
#  to an event is summed up and bundled with it wherever a client gets it; and each
#  user has threads that they follow.
#     spec: CS-API "Forming relationships between events", "Threading"; MSC4306
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE threads (
    room_nid INTEGER NOT NULL,
    root_id TEXT NOT NULL,
    sender_nid INTEGER NOT NULL,  -- a row for each who wrote: ignored ones do not count
    count INTEGER NOT NULL,
    latest INTEGER NOT NULL,      -- position of the newest reply
    PRIMARY KEY (room_nid, root_id, sender_nid)
) WITHOUT ROWID;
CREATE INDEX threads_latest ON threads (room_nid, latest);
CREATE TABLE thread_subscriptions (
    user_nid INTEGER NOT NULL,
    room_nid INTEGER NOT NULL,
    root_id TEXT NOT NULL,
    pos INTEGER NOT NULL,
    state TEXT NOT NULL,          -- automatic, manual, or none: unsubscribed
    PRIMARY KEY (user_nid, room_nid, root_id)
) WITHOUT ROWID;
CREATE INDEX thread_subscriptions_pos ON thread_subscriptions (user_nid, pos);
CREATE INDEX thread_subscriptions_room ON thread_subscriptions (room_nid);
""")
invariant(
    "threads of rooms that are not there",
    "SELECT root_id FROM threads WHERE room_nid NOT IN (SELECT room_nid FROM rooms)",
)
invariant(
    "subscriptions to threads of rooms that are not there",
    """
    SELECT root_id
    FROM thread_subscriptions
    WHERE room_nid NOT IN (SELECT room_nid FROM rooms)
    """,
)

REPLACE, THREAD, REFERENCE = "m.replace", "m.thread", "m.reference"
MAX_EDITS = 50  # of one event, the newest, among which the valid ones are looked for
MAX_REFERENCES = 500  # of one event, in its aggregation
MAX_COUNTED = 500  # replies, where some of them may be hidden from the reader
MAX_SUBSCRIPTIONS = 10_000  # of one user

# ── 41.1  Threads ────────────────────────────────────────────────────────────

MAIN_THREAD = "main"
MAX_THREAD_HOPS = 3


def relation_chain(rooms: RoomReader, event: Event) -> Iterator[tuple[str, str]]:
    """The relation of the event, that of its target, and so on, three at most."""
    for _ in range(MAX_THREAD_HOPS):
        relation = relation_of(event)
        if relation is None or not is_event_id(relation[1]):
            return
        yield relation
        target = rooms.event(relation[1])
        if target is None or target.room_id != event.room_id:
            return
        event = target


def thread_root(rooms: RoomReader, event: Event) -> str | None:
    """The id of the root of the thread that an event is part of, or None.

    Reactions and edits go with what they relate to.  Spec: "Threaded read receipts".
    """
    return next((target for kind, target in relation_chain(rooms, event) if kind == THREAD), None)


def thread_of(hs: Homeserver, event: Event) -> str:
    """The id of the root of the thread that an event is part of, or "main"."""
    return thread_root(hs.rooms, event) or MAIN_THREAD


def require_thread_root(hs: Homeserver, room: Room, content: Json) -> None:
    """400 M_UNKNOWN for what would start a thread off an event that itself relates to another.

    Spec: CS-API "Validation of `m.thread` relationships".
    """
    kind, root_id = relation_in(content) or ("", "")
    root = hs.rooms.event(root_id) if kind == THREAD else None
    if root is not None and root.room_nid == room.nid and relation_of(root) is not None:
        raise MatrixError(400, "M_UNKNOWN", "No thread can start from an event that has a relation")


class SubscriptionChange(NamedTuple):
    """How things stand with one thread for one user, since the stream position `bump_stamp`."""

    room_id: str
    root_id: str
    bump_stamp: int
    state: str  # automatic, manual, or none


class Threads:
    """The sums of all threads, kept as events come and go; and who follows which thread."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self.db = hs.db
        hs.rooms.subscribe_relation(self._on_relation)
        hs.accounts.on_deactivated(self._forget_user)

    def senders(self, room_nid: RoomNid, root_id: str) -> list[tuple[UserNid, int, int]]:
        """Who wrote in a thread, how many replies, and the position of the newest."""
        return self.db.all(
            """
            SELECT sender_nid, count, latest
            FROM threads
            WHERE room_nid = ?
              AND root_id = ?
            """,
            (room_nid, root_id),
        )

    def _on_relation(self, room: Room, event: Event, change: int) -> None:
        kind, root_id = relation_of(event) or ("", "")
        if kind != THREAD:
            return
        key = (room.nid, root_id, self.db.user_nid(event.sender))
        if change < 0:
            self._recount(key)
            return
        self.db.execute(
            """
            INSERT INTO threads (room_nid, root_id, sender_nid, count, latest)
            VALUES (?, ?, ?, 1, ?)
            ON CONFLICT DO UPDATE
            SET count = count + 1, latest = MAX(latest, excluded.latest)
            """,
            (*key, event.pos),
        )

    def _recount(self, key: tuple[RoomNid, str, UserNid]) -> None:
        """Count the replies of a sender anew: one of them is gone."""
        count, latest = self.db.one(
            """
            SELECT COUNT(*), MAX(pos)
            FROM relations
            WHERE room_nid = ?
              AND parent_id = ?
              AND sender_nid = ?
              AND rel_type = 'm.thread'
            """,
            key,
        )
        self.db.execute(
            "DELETE FROM threads WHERE room_nid = ? AND root_id = ? AND sender_nid = ?", key
        )
        if count:
            self.db.execute("INSERT INTO threads VALUES (?, ?, ?, ?, ?)", (*key, count, latest))

    def forget_room(self, room: Room) -> None:
        """Delete all there is of a room that goes."""
        self.db.execute("DELETE FROM threads WHERE room_nid = ?", (room.nid,))
        self.db.execute("DELETE FROM thread_subscriptions WHERE room_nid = ?", (room.nid,))

    # Subscriptions

    def subscription(self, user_nid: UserNid, room_nid: RoomNid, root_id: str) -> tuple[str, int]:
        """What a user has to do with a thread (automatic, manual or none), and since when."""
        key = (user_nid, room_nid, root_id)
        return self.db.one(SUBSCRIPTION, key) or ("none", 0)

    def subscribe(self, user_nid: UserNid, room_nid: RoomNid, root_id: str, state: str) -> None:
        """Begin ("automatic", "manual") or end ("none") to follow a thread; a user has so many."""
        with self.db.write():
            pos = self.hs.stream.stamp(THREAD_SUBSCRIPTION, user_nid)
            row = (user_nid, room_nid, root_id, pos, state)
            self.db.execute(
                "INSERT OR REPLACE INTO thread_subscriptions VALUES (?, ?, ?, ?, ?)", row
            )
            self.db.execute(
                """
                DELETE FROM thread_subscriptions
                WHERE user_nid = :user
                  AND pos <= (
                    SELECT pos
                    FROM thread_subscriptions
                    WHERE user_nid = :user
                    ORDER BY pos DESC
                    LIMIT 1 OFFSET :most)
                """,
                {"user": user_nid, "most": MAX_SUBSCRIPTIONS},
            )

    def _forget_user(self, user_nid: UserNid) -> None:
        self.db.execute("DELETE FROM thread_subscriptions WHERE user_nid = ?", (user_nid,))

    def changed(
        self, user_nid: UserNid, since: int, upto: int, limit: int
    ) -> list[SubscriptionChange]:
        """What changed with since < pos <= upto, the newest first, each thread once.  MSC4308."""
        rows = self.db.all(
            """
            SELECT room_nid, root_id, pos, state
            FROM thread_subscriptions
            WHERE user_nid = ?
              AND pos > ?
              AND pos <= ?
            ORDER BY pos DESC
            LIMIT ?
            """,
            (user_nid, since, upto, limit),
        )
        room = self.hs.rooms.by_nid
        return [SubscriptionChange(room(row[0]).room_id, *row[1:]) for row in rows]


SUBSCRIPTION = """
    SELECT state, pos
    FROM thread_subscriptions
    WHERE user_nid = ?
      AND room_nid = ?
      AND root_id = ?
"""


def follows_thread(rooms: RoomReader, event: Event, user_id: str) -> bool | None:
    """Whether a user follows the event's thread; None outside of threads, and for who follows none.

    Spec: MSC4306, the push condition "thread_subscription".
    """
    root_id = thread_root(rooms, event)
    if root_id is None:
        return None
    user_nid = rooms.database.user_nid(user_id)
    row = rooms.database.one(SUBSCRIPTION, (user_nid, event.room_nid, root_id))
    if row is None:
        sql = "SELECT 1 FROM thread_subscriptions WHERE user_nid = ? LIMIT 1"
        return None if rooms.database.one(sql, (user_nid,)) is None else False
    return bool(row[0] != "none")


# ── 41.2  Children ───────────────────────────────────────────────────────────

CHILDREN_NEWEST = """
    SELECT nid
    FROM relations
    WHERE room_nid = ?
      AND parent_id = ?
      AND rel_type = ?
    ORDER BY pos DESC
    LIMIT ?
"""


def children(hs: Homeserver, parent: Event, rel_type: str, limit: int) -> list[Event]:
    """What relates to an event in one way, the newest first."""
    key = (parent.room_nid, parent.event_id, rel_type, limit)
    return hs.rooms.events_by_nids(row[0] for row in hs.db.all(CHILDREN_NEWEST, key))


def is_accepted(event: Event) -> bool:
    """Whether an event counts in its room."""
    return event.rejected is None and not event.soft_failed


def latest_edit(
    hs: Homeserver, event: Event, may_see: Callable[[Event], bool] = is_accepted
) -> Event | None:
    """The newest valid replacement of an event that may be seen, or None.

    Spec: CS-API "Validity of replacement events". The new content of an encrypted one is inside.
    """
    kind = (relation_of(event) or ("",))[0]
    if event.is_state or event.redacted_by is not None or kind == REPLACE:
        return None
    valid = (
        edit
        for edit in children(hs, event, REPLACE, MAX_EDITS)
        if (edit.sender, edit.type, edit.is_state) == (event.sender, event.type, False)
        and (edit.type == "m.room.encrypted" or isinstance(edit.content.get("m.new_content"), dict))
        and may_see(edit)
    )
    return max(valid, key=lambda edit: (edit.origin_server_ts, edit.event_id), default=None)


def related_to(
    hs: Homeserver,
    room: Room,
    events: Sequence[Event],
    rel_types: list[str] | None,
    senders: list[str] | None,
) -> list[Event]:
    """The events that something of these types, sent by one of these, relates to.

    Spec: CS-API "Filtering", `related_by_rel_types` and `related_by_senders`.
    """
    nids = None if senders is None else [hs.db.find_user_nid(sender) for sender in senders]
    rows = hs.db.all(
        """
        SELECT value
        FROM json_each(:parents)
        WHERE EXISTS (
            SELECT 1
            FROM relations
            WHERE room_nid = :room
              AND parent_id = json_each.value
              AND (:types IS NULL OR rel_type IN (SELECT value FROM json_each(:types)))
              AND (:senders IS NULL OR sender_nid IN (SELECT value FROM json_each(:senders))))
        """,
        {
            "room": room.nid,
            "parents": json.dumps([event.event_id for event in events]),
            "types": None if rel_types is None else json.dumps(rel_types),
            "senders": None if nids is None else json.dumps(nids),
        },
    )
    found = {row[0] for row in rows}
    return [event for event in events if event.event_id in found]


# ── 41.3  Aggregations ───────────────────────────────────────────────────────


class Reader(NamedTuple):
    """Who gets the aggregations, and what they may see of the room."""

    hs: Homeserver
    user: Requester
    viewer: Viewer


def sum_up_edits(reader: Reader, event: Event) -> Json | None:
    """The newest edit.  Spec: "Server-side aggregation of `m.replace` relationships"."""
    edit = latest_edit(reader.hs, event, reader.viewer.may_read)
    return None if edit is None else client_event(reader.hs.rooms, edit, reader.user.device_nid)


def sum_up_references(reader: Reader, event: Event) -> Json | None:
    """The ids of what refers to it.  Spec: "Server-side aggregation of `m.reference`"."""
    found = children(reader.hs, event, REFERENCE, MAX_REFERENCES)
    chunk = [{"event_id": one.event_id} for one in reversed(found) if reader.viewer.may_see(one)]
    return {"chunk": chunk} if chunk else None


def sum_up_thread(reader: Reader, event: Event) -> Json | None:
    """A thread in short.  Spec: "Server-side aggregation of `m.thread` relationships".

    Who may not see the newest reply gets a count of those that they see, of the newest hundreds.
    """
    hs, user, viewer = reader
    if relation_of(event) is not None:
        return None  # no thread starts here, and so there can be no loop
    rows = hs.threads.senders(event.room_nid, event.event_id)
    shown = [row for row in rows if hs.db.user_id(row[0]) not in viewer.ignored]
    if not shown:
        return None
    count = sum(row[1] for row in shown)
    at = max(row[2] for row in shown)
    newest = hs.rooms.event_at(viewer.room, at)
    is_there = newest is not None and newest.pos == at  # or old history was deleted
    if newest is None or not (is_there and viewer.is_joined and viewer.may_see(newest)):
        seen = [*filter(viewer.may_see, children(hs, event, THREAD, MAX_COUNTED))]
        if not seen:
            return None
        newest, count = seen[0], len(seen)
    return {
        "latest_event": client_events(hs, user, [viewer.without_erased(newest)])[0],
        "count": count,
        "current_user_participated": event.sender == user.user_id
        or any(row[0] == user.nid for row in rows),
    }


AGGREGATIONS: Final[dict[str, Callable[[Reader, Event], Json | None]]] = {
    REPLACE: sum_up_edits,
    REFERENCE: sum_up_references,
    THREAD: sum_up_thread,
}
AGGREGATED: Final = json.dumps([*AGGREGATIONS])


def aggregations(hs: Homeserver, user: Requester, events: Sequence[Event]) -> dict[EventNid, Json]:
    """The `m.relations` of those events that have any; one query tells which these are.

    Spec: CS-API "Aggregations of child events": none for state events.
    """
    parents = {event.event_id: event for event in events if not event.is_state}
    if not parents:
        return {}
    rows = hs.db.all(
        """
        SELECT parent.key, kind.value
        FROM json_each(:parents) AS parent
        JOIN json_each(:kinds) AS kind
        WHERE EXISTS (
            SELECT 1
            FROM relations
            WHERE room_nid = parent.value
              AND parent_id = parent.key
              AND rel_type = kind.value)
        """,
        {
            "parents": json.dumps({key: event.room_nid for key, event in parents.items()}),
            "kinds": AGGREGATED,
        },
    )
    found: dict[EventNid, Json] = {}
    readers: dict[RoomNid, Reader] = {}
    for event_id, kind in rows:
        event = parents[event_id]
        if event.room_nid not in readers:
            viewer = Viewer(hs.rooms, hs.rooms.by_nid(event.room_nid), user.nid)
            readers[event.room_nid] = Reader(hs, user, viewer)
        summed = AGGREGATIONS[kind](readers[event.room_nid], event)
        if summed is not None:
            found.setdefault(event.nid, {})[kind] = summed
    return found


def client_events(hs: Homeserver, user: Requester, events: Iterable[Event]) -> list[Json]:
    """Events in the client format for one user, with their aggregations."""
    events = list(events)
    sums = aggregations(hs, user, events)
    shown = [client_event(hs.rooms, event, user.device_nid) for event in events]
    for event, one in zip(events, shown, strict=True):
        if event.nid in sums:
            one["unsigned"]["m.relations"] = sums[event.nid]
    return shown


# ═════════════════════════════════════════════════════════════════════════════
#  51. DELAYED EVENTS
#
#  Events that a client hands over now and the server sends later, unless it is told
#  otherwise: a phone that loses its network in a call has left its "I hung up" here.
#  One timer waits for the next of them; the rows are what survives a restart.
#                                                               spec: MSC4140
# ═════════════════════════════════════════════════════════════════════════════

MAX_DELAY_MS = 7 * 24 * 3600 * 1000
MAX_SCHEDULED = 100  # of one user at a time
KEPT_DELAYED_MS = 7 * 24 * 3600 * 1000  # how long it is told what became of them,
KEPT_DELAYED = 1000  # and of how many of one user
DELAYED_AT_ONCE = 50  # overdue ones sent before others get their turn
DELAYED_RETRY_MS = 10_000  # when the disk did not take one
DELAY = "org.matrix.msc4140.delay"
CAPABILITIES["org.matrix.msc4140.delayed_events"] = {
    **{"max_delay_ms": MAX_DELAY_MS, "max_scheduled": MAX_SCHEDULED}
}

schema("""
CREATE TABLE delayed_events (
    delayed_nid INTEGER PRIMARY KEY,
    delay_id TEXT NOT NULL UNIQUE,
    user_nid INTEGER NOT NULL,
    room_id TEXT NOT NULL,
    type TEXT NOT NULL,
    state_key TEXT,              -- NULL for what is to be no state event
    content BLOB NOT NULL,
    delay_ms INTEGER NOT NULL,
    since_ts INTEGER NOT NULL,   -- when it was scheduled, or restarted
    due_ts INTEGER,              -- NULL once it is sent, cancelled or refused
    finalised_ts INTEGER,
    event_id TEXT,               -- if it was sent
    error TEXT                   -- if it was refused, as JSON
);
CREATE INDEX delayed_events_due ON delayed_events (due_ts) WHERE due_ts IS NOT NULL;
CREATE INDEX delayed_events_of_user ON delayed_events (user_nid, due_ts);
CREATE INDEX delayed_events_state ON delayed_events (room_id, type, state_key)
    WHERE due_ts IS NOT NULL;
CREATE INDEX delayed_events_done ON delayed_events (finalised_ts) WHERE finalised_ts IS NOT NULL;
""")
invariant(
    "delayed events that are neither waiting nor done",
    "SELECT delay_id FROM delayed_events WHERE (due_ts IS NULL) = (finalised_ts IS NULL)",
)


class DelayedEvent(NamedTuple):
    """A row of delayed_events."""

    nid: int
    delay_id: str
    user_nid: UserNid
    room_id: str
    type: str
    state_key: str | None
    content: bytes
    delay_ms: int
    since_ts: int
    due_ts: int | None
    finalised_ts: int | None
    event_id: str | None
    error: str | None

    def to_json(self) -> Json:
        """As clients get it; what was one name in the proposal is another in some client."""
        shown = {
            **{"delay_id": self.delay_id, "room_id": self.room_id, "type": self.type},
            **{"state_key": self.state_key, "delay_ms": self.delay_ms, "delay": self.delay_ms},
            **dict.fromkeys(("scheduled_at", "delayed_since_ts", "running_since"), self.since_ts),
            **{"finalised_ts": self.finalised_ts, "event_id": self.event_id},
            "error": None if self.error is None else json.loads(self.error),
            "content": json.loads(self.content),
        }
        return {name: value for name, value in shown.items() if value is not None}


class DelayedEvents:
    """The events that wait for their time.

    `send` is set by the composition root: how an event is sent, with all checks that the sender's
    own request would meet then, is a later chapter's.
    """

    send: Callable[[DelayedEvent], Event]

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self._timer: asyncio.TimerHandle | None = None
        hs.db.on_reset(self.arm)
        hs.rooms.subscribe(self._state_set)

    def schedule(
        self, request: Request, room_id: str, event_type: str, state_key: str | None, delay: int
    ) -> str:
        """Keep the event whose content is the request's JSON for `delay` milliseconds; its id."""
        nid, content = request.user.nid, request.json
        self.hs.rooms.get(room_id)
        if delay <= 0:
            raise invalid_param("The delay must be more than 0 milliseconds")
        if delay > MAX_DELAY_MS:
            raise forbidden(f"The delay can be {MAX_DELAY_MS} milliseconds at most")
        waiting, first = self.hs.db.one(
            "SELECT COUNT(*), MIN(due_ts) FROM delayed_events WHERE user_nid = ? AND due_ts > 0",
            (nid,),
        )
        if waiting >= MAX_SCHEDULED:
            text = f"You have {MAX_SCHEDULED} delayed events already"
            raise limit_exceeded(max(1, first - now_ms()), text)
        check_canonical(content)
        raw, now, delay_id = canonical_json(content), now_ms(), random_token()
        if len(raw) > MAX_EVENT_BYTES:
            raise too_large(f"An event has at most {MAX_EVENT_BYTES} bytes")
        with self.hs.db.write():
            self.hs.db.execute(
                """
                INSERT INTO delayed_events (delay_id, user_nid, room_id, type, state_key, content,
                    delay_ms, since_ts, due_ts)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
                """,
                (delay_id, nid, room_id, event_type, state_key, raw, delay, now, now + delay),
            )
        self.arm()
        return delay_id

    def find(self, delay_id: str, user: Requester | None) -> DelayedEvent:
        """A delayed event, if it is this user's or nobody's name is known; else 404."""
        row = self.hs.db.one("SELECT * FROM delayed_events WHERE delay_id = ?", (delay_id,))
        if row is None or (user is not None and row[2] != user.nid):
            raise not_found("There is no such delayed event")
        return DelayedEvent(*row)

    def waiting(self, user_nid: UserNid) -> list[DelayedEvent]:
        """What a user has scheduled, the soonest first."""
        query = """
            SELECT *
            FROM delayed_events
            WHERE user_nid = ? AND due_ts > 0
            ORDER BY due_ts
        """
        return list(itertools.starmap(DelayedEvent, self.hs.db.all(query, (user_nid,))))

    def restart(self, delayed: DelayedEvent) -> None:
        """Let the whole delay begin anew."""
        now = now_ms()
        update = "UPDATE delayed_events SET since_ts = ?, due_ts = ? WHERE delayed_nid = ?"
        with self.hs.db.write():
            self.hs.db.execute(update, (now, now + delayed.delay_ms, delayed.nid))
        self.arm()

    def send_now(self, delayed: DelayedEvent) -> None:
        """Send it; if that is refused it stays scheduled, for the cause may go away until then."""
        with self.hs.db.write():
            self._finish(delayed, event_id=self.send(delayed).event_id)

    def cancel(self, delayed: DelayedEvent) -> None:
        """Never send it."""
        with self.hs.db.write():
            self._finish(delayed)

    def arm(self) -> None:
        """Wait for the next one that is due."""
        self._arm(self.hs.db.value("SELECT MIN(due_ts) FROM delayed_events WHERE due_ts > 0"))

    def maintain(self) -> None:
        """Forget what became of those that are long done."""
        old = (now_ms() - KEPT_DELAYED_MS,)
        if self.hs.db.value("SELECT 1 FROM delayed_events WHERE finalised_ts < ?", old):
            with self.hs.db.write():
                self.hs.db.execute("DELETE FROM delayed_events WHERE finalised_ts < ?", old)

    def stop(self) -> None:
        """Send nothing more."""
        self._arm(None)

    def _arm(self, due: int | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if due is not None:  # a millisecond later rather than earlier
            wait = max(0, due + 1 - now_ms()) / 1000
            self._timer = asyncio.get_running_loop().call_later(wait, self._send_due)

    def _send_due(self) -> None:
        query = """
            SELECT *
            FROM delayed_events
            WHERE due_ts <= ?
            ORDER BY due_ts, delayed_nid
            LIMIT ?
        """
        try:
            for row in self.hs.db.all(query, (now_ms(), DELAYED_AT_ONCE)):
                self._send_one(DelayedEvent(*row))
        except MatrixError:  # the disk is full, say
            self._arm(now_ms() + DELAYED_RETRY_MS)
        else:
            self.arm()

    def _send_one(self, delayed: DelayedEvent) -> None:
        """Send one that is due, or keep the error with which it was refused for ever."""
        try:
            if self.hs.config.rate_limit:
                self.hs.router.limiter.check("message", delayed.user_nid)
            self.send_now(delayed)
        except MatrixError as error:
            if error.status >= 500:
                raise
            with self.hs.db.write():
                self._finish(delayed, error=json.dumps(error.to_json()))

    def _finish(
        self, delayed: DelayedEvent, event_id: str | None = None, error: str | None = None
    ) -> None:
        self.hs.db.execute(
            """
            UPDATE delayed_events
            SET due_ts = NULL, finalised_ts = ?, event_id = ?, error = ?
            WHERE delayed_nid = ?
            """,
            (now_ms(), event_id, error, delayed.nid),
        )
        self.hs.db.execute(
            """
            DELETE FROM delayed_events
            WHERE user_nid = :user AND due_ts IS NULL AND delayed_nid <= (
                SELECT delayed_nid
                FROM delayed_events
                WHERE user_nid = :user AND due_ts IS NULL
                ORDER BY delayed_nid DESC
                LIMIT 1 OFFSET :kept
            )
            """,
            {"user": delayed.user_nid, "kept": KEPT_DELAYED},
        )

    def _state_set(self, room: Room, event: Event) -> None:
        """State that somebody else sets meanwhile stands: what would overwrite it is cancelled.

        This is not in the proposal, but what servers do and Element Call is written for.
        """
        if not event.is_state:
            return
        query = """
            SELECT *
            FROM delayed_events
            WHERE room_id = ? AND type = ? AND state_key = ? AND due_ts IS NOT NULL
        """
        for row in self.hs.db.all(query, (room.room_id, *event.key)):
            delayed = DelayedEvent(*row)
            if self.hs.db.user_id(delayed.user_nid) != event.sender:
                self._finish(delayed)


DELAYED_PATH: Final = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
DELAYED_EVENT: Final = {
    **{"delay_ms?": int, "delay?": int, "state_key?": str},
    "content": dict,
}


def schedule_once(
    hs: Homeserver,
    request: Request,
    room_id: str,
    event_type: str,
    *,
    delay: int,
    state_key: str | None = None,
    txn_id: str | None = None,
) -> Json:
    """Schedule the request's JSON as an event, unless this device did so under that txn_id."""
    scope = f"{room_id} delayed {event_type}"
    known = repeated_transaction(hs, request.user, scope, txn_id) if txn_id else None
    if known is None:
        with hs.db.write():
            known = hs.delayed_events.schedule(request, room_id, event_type, state_key, delay)
            if txn_id:
                record_transaction(hs, request.user, scope, txn_id, known)
    return {"delay_id": known}


def delay_of(request: Request) -> int | None:
    """The delay in the query of a request that sends an event, in milliseconds."""
    return None if request.arg(DELAY) is None else request.int_arg(DELAY, 0, 1, 2**53)


@route(
    "PUT",
    "/_matrix/client/unstable/org.matrix.msc4140/rooms/{room_id}/delayed_event/{event_type}/{txn_id}",
    auth=GUEST,
    limit="message",
    body=DELAYED_EVENT,
)
async def put_delayed_event(
    hs: Homeserver, request: Request, room_id: str, event_type: str, txn_id: str
) -> Json:
    """Schedule an event.  403 over the longest delay, 429 with too many scheduled."""
    body = request.json
    delay, request.json = body.get("delay_ms", body.get("delay")), body["content"]
    if delay is None:
        raise missing_param("delay_ms is missing")
    place = {"state_key": body.get("state_key"), "txn_id": txn_id}
    return schedule_once(hs, request, room_id, event_type, delay=delay, **place)


@route("GET", DELAYED_PATH, auth=GUEST)
async def list_delayed_events(hs: Homeserver, request: Request) -> Json:
    """What the user has scheduled, the soonest first."""
    waiting = hs.delayed_events.waiting(request.user.nid)
    return {"delayed_events": [delayed.to_json() for delayed in waiting]}


@route("GET", DELAYED_PATH + "/{delay_id}", auth=GUEST)
async def get_delayed_event(hs: Homeserver, request: Request, delay_id: str) -> Json:
    """One delayed event of the user, or what became of it."""
    return hs.delayed_events.find(delay_id, request.user).to_json()


@route("POST", DELAYED_PATH + "/{delay_id}", auth=OPTIONAL, body={"action": str})
@route("POST", DELAYED_PATH + "/{delay_id}/{action}", auth=OPTIONAL)
async def act_on_delayed_event(
    hs: Homeserver, request: Request, delay_id: str, action: str | None = None
) -> Json:
    """Send a delayed event now, cancel it, or let its delay begin anew.

    Without a token the id is the secret: whoever carries the call's media may know it. Once it is
    done, the same again is no error, and anything else 409.
    """
    acts = {
        "send": hs.delayed_events.send_now,
        "cancel": hs.delayed_events.cancel,
        "restart": hs.delayed_events.restart,
    }
    wanted = action or request.json["action"]
    if wanted not in acts:
        raise invalid_param("The action is send, cancel or restart")
    delayed = hs.delayed_events.find(delay_id, request.requester)
    if delayed.due_ts is not None:
        acts[wanted](delayed)
    elif wanted != ("cancel" if delayed.event_id is None else "send"):
        raise MatrixError(409, "M_UNKNOWN", "This delayed event is done already")
    return {}


# ═════════════════════════════════════════════════════════════════════════════
#  17. ROOMS AND MESSAGES
#
#  What a client does with rooms: make them, enter and leave them, set their
#  state, send, redact, and read back. The rules are in Part II; here is what the
#  API adds to them.                        spec: CS-API "Rooms", "Events"
# ═════════════════════════════════════════════════════════════════════════════

MAX_INVITES = 200  # in one createRoom
MAX_PAGE = 1000  # events in one answer of /messages
MAX_SCAN = 5000  # events looked at for one page; the token leads on behind them
DEFAULT_PAGE = 10
ROOM_PATH = "/_matrix/client/v3/rooms/{room_id}"

schema("""
CREATE TABLE blocked_rooms (        -- nobody here may enter them; we need not know them
    room_id TEXT PRIMARY KEY,
    blocker_nid INTEGER NOT NULL,
    since INTEGER NOT NULL          -- in milliseconds
) WITHOUT ROWID;
""")

log_rooms = logging.getLogger("conduit.rooms")

# ── 17.1  Tokens and filters ─────────────────────────────────────────────────


def stream_token(position: int) -> str:
    """The one pagination token: the place behind a stream position, in sync and in /messages."""
    return f"s{position}"


TOKEN = re.compile(r"s(-?[0-9]{1,18})(?:_([0-9]{1,18}))?")  # the second: see chapter 21


def parse_token(text: str) -> int:
    """The position in a token.  400 M_INVALID_PARAM for what is none."""
    match = TOKEN.fullmatch(text)
    if match is None:
        raise invalid_param("That is not a token of this server")
    return int(match[1])


def wildcard_match(pattern: str, text: str) -> bool:
    """Whether a text matches a pattern in which * stands for anything, in linear time."""
    if "*" not in pattern:
        return pattern == text
    first, *middle, last = pattern.split("*")
    if len(text) < len(first) + len(last) or not text.startswith(first):
        return False
    at, end = len(first), len(text) - len(last)
    for part in middle:
        at = text.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return text.endswith(last)


class EventFilter:
    """A RoomEventFilter or EventFilter, ready to be asked of events.  Spec: CS-API "Filtering"."""

    def __init__(self, definition: Json) -> None:
        get = {key.removeprefix(MSC3874): value for key, value in definition.items()}.get
        self.limit: int = min(MAX_PAGE, max(0, get("limit", DEFAULT_PAGE)))
        self.types: list[str] | None = get("types")
        self.not_types: list[str] = get("not_types") or []
        self.senders: list[str] | None = get("senders")
        self.not_senders: list[str] = get("not_senders") or []
        self.rooms: list[str] | None = get("rooms")
        self.not_rooms: list[str] = get("not_rooms") or []
        self.contains_url: bool | None = get("contains_url")
        self.lazy_load_members = get("lazy_load_members") is True
        self.redundant_members = get("include_redundant_members") is True
        self.thread_counts = get("unread_thread_notifications") is True
        self.related_senders: list[str] | None = get("related_by_senders")
        self.related_types: list[str] | None = get("related_by_rel_types")
        self.rel_types: list[str] | None = get("rel_types")
        self.not_rel_types: list[str] = get("not_rel_types") or []
        self.wants_related = (self.related_senders, self.related_types) != (None, None)
        only = self.types, self.senders, self.contains_url, self.rel_types
        unwanted = self.not_types or self.not_senders or self.not_rel_types or self.wants_related
        self.passes_all = only == (None, None, None, None) and not unwanted

    def wants_room(self, room_id: str) -> bool:
        """Whether the filter lets a room through."""
        return room_id not in self.not_rooms and (self.rooms is None or room_id in self.rooms)

    def wants_type(self, event_type: str) -> bool:
        """Whether the filter lets an event type through."""
        if any(wildcard_match(pattern, event_type) for pattern in self.not_types):
            return False
        return self.types is None or any(wildcard_match(one, event_type) for one in self.types)

    def wants(self, event_type: str, sender: str, content: Json) -> bool:
        """Whether the filter lets an event through."""
        if self.passes_all:
            return True
        if sender in self.not_senders or (self.senders is not None and sender not in self.senders):
            return False
        has_url = isinstance(content.get("url"), str)
        if self.contains_url not in (None, has_url) or not self.wants_type(event_type):
            return False
        kind = (relation_in(content) or ("",))[0]
        if kind in self.not_rel_types:
            return False
        return self.rel_types is None or kind in self.rel_types

    def pick(self, events: Iterable[Event]) -> list[Event]:
        """The events that pass."""
        return [event for event in events if self.wants(event.type, event.sender, event.content)]


def page_filter(request: Request) -> EventFilter:
    """The filter and limit in the query of /messages and /context."""
    text = request.arg("filter")
    definition = parse_json(text.encode()) if text else {}
    check_shape(definition, ROOM_EVENT_FILTER, "filter")
    if request.arg("limit") is not None:
        definition["limit"] = request.int_arg("limit", DEFAULT_PAGE, 0, MAX_PAGE)
    return EventFilter(definition)


# ── 17.2  Who may look into a room ───────────────────────────────────────────


def require_joined(room: Room, user_nid: UserNid) -> None:
    """403 unless the user is in the room now."""
    if room.membership_of(user_nid) != "join":
        raise forbidden("You are not in this room")


def known_room(hs: Homeserver, room_id: str) -> Room:
    """A room to be read; 403 where there is none, so that nobody can probe for rooms."""
    room = hs.rooms.find(room_id)
    if room is None:
        raise forbidden("You are not in this room, or there is no such room")
    return room


def departure(hs: Homeserver, event: Event | None) -> Event | None:
    """The member event by which a user stopped being joined; others may have followed it."""
    while event is not None and event.membership in {"leave", "ban"}:  # left, and banned later
        replaced = None if event.replaces is None else hs.rooms.event_by_nid(event.replaces)
        if replaced is not None and replaced.membership == "join":
            return event
        event = replaced
    return None


def readable_room(hs: Homeserver, request: Request, room_id: str) -> tuple[Room, Event | None]:
    """A room, and the event up to which the requester may read its state: None is all there is.

    Members read what is now; who left or was banned reads what was when they stopped being a
    member; everyone reads a world-readable room.  403 for all others.
    """
    room = known_room(hs, room_id)
    member = hs.rooms.memberships(request.user.nid).get(room.nid)
    is_joined = member is not None and member.membership == "join"
    if is_joined or room.history_visibility == "world_readable":
        return room, None
    known = member is not None and not member.forgotten
    event = hs.rooms.event_by_nid(cast(Member, member).event_nid) if known else None
    limit = departure(hs, event)
    if limit is None:
        raise forbidden("You are not in this room")
    return room, limit


def viewable_room(hs: Homeserver, request: Request, room_id: str) -> Room:
    """A room of which the user may see at least some events; history visibility decides which."""
    room = known_room(hs, room_id)
    visibility = room.history_visibility
    if visibility == "world_readable":
        return room
    member = hs.rooms.memberships(request.user.nid).get(room.nid)
    if member is None or member.forgotten or member.membership == "knock":
        raise forbidden("You are not in this room")
    if member.membership == "invite" and visibility != "invited":
        raise forbidden("You are not in this room yet")
    return room


def state_for(hs: Homeserver, room: Room, limit: Event | None) -> Mapping[StateKey, EventNid]:
    """The state that a reader with that limit sees."""
    return room.state if limit is None else hs.rooms.state_after(limit)


def as_clients(hs: Homeserver, request: Request, events: Iterable[Event]) -> list[Json]:
    """Events in the client format for the one who asks, with what relates to them."""
    return client_events(hs, request.user, events)


# ── 17.3  Membership ─────────────────────────────────────────────────────────

REASON: Final[Json] = {"reason?": str}
USER_AND_REASON: Final[Json] = {"user_id": str, "reason?": str}
JOIN_BODY: Final[Json] = {"reason?": str, "third_party_signed?": dict}
INVITE_BODY: Final[Json] = {"user_id?": str, "reason?": str, "medium?": str, "address?": str}


def member_profile(hs: Homeserver, user_id: str) -> Json:
    """What of a profile goes into a member event."""
    profile = profile_of(hs, user_id)
    return {key: profile[key] for key in ("displayname", "avatar_url") if profile.get(key)}


def with_reason(content: Json, reason: str | None) -> Json:
    """The content with the reason, where there is one."""
    return content if reason is None else {**content, "reason": reason}


def set_own_membership(hs: Homeserver, request: Request, room: Room, content: Json) -> None:
    """Send a member event of the requester's, with their profile and the reason in the body."""
    user_id = request.user.user_id
    content = with_reason({**content, **member_profile(hs, user_id)}, request.json.get("reason"))
    hs.rooms.send(room, user_id, MEMBER, content, state_key=user_id)


def block_room(hs: Homeserver, room_id: str, blocker: str) -> None:
    """Let nobody here join, knock on or be invited to a room any more; who is in stays in."""
    if not is_room_id(room_id):
        raise invalid_param("That is not a room id")
    with hs.db.write():
        row = (room_id, hs.db.user_nid(blocker), now_ms())
        hs.db.execute("INSERT OR IGNORE INTO blocked_rooms VALUES (?, ?, ?)", row)


def unblock_room(hs: Homeserver, room_id: str) -> bool:
    """Open a blocked room again; False if it was none."""
    with hs.db.write():
        deleted = hs.db.execute("DELETE FROM blocked_rooms WHERE room_id = ?", (room_id,))
        return deleted.rowcount > 0


def blocked_rooms(hs: Homeserver) -> list[tuple[str, str, int]]:
    """The ids of all blocked rooms, who blocked them, and when (in milliseconds)."""
    rows = hs.db.all("SELECT room_id, blocker_nid, since FROM blocked_rooms")
    return [(room_id, hs.db.user_id(blocker), since) for room_id, blocker, since in rows]


def refuse_blocked(hs: Homeserver, room_id: str) -> None:
    """403 for a room that an admin has blocked."""
    if hs.db.one("SELECT 1 FROM blocked_rooms WHERE room_id = ?", (room_id,)) is not None:
        raise forbidden("This room is blocked on this server")


def require_invitable(hs: Homeserver, user_id: str) -> None:
    """Refuse what is no user, and users that cannot be reached."""
    if not is_user_id(user_id):
        raise invalid_param(f"{user_id[:MAX_ID_BYTES]} is not a user id")
    if not hs.is_local(user_id):
        raise forbidden(f"This server does not federate with {server_of(user_id)}")
    if not hs.accounts.exists_local(user_id):
        raise not_found(f"There is no user {user_id}")


def invite(
    hs: Homeserver,
    room: Room,
    sender: str,
    invitee: str,
    *,
    reason: str | None = None,
    is_direct: bool = False,
) -> None:
    """Invite a user; inviting someone who is invited already changes nothing."""
    refuse_blocked(hs, room.room_id)
    membership = room.membership(invitee)
    if membership == "join":
        raise forbidden(f"{invitee} is in the room already")
    if membership != "invite":
        require_inviting_allowed(hs, invitee, sender)
        content = {"membership": "invite", **member_profile(hs, invitee)}
        if is_direct:
            content["is_direct"] = True
        hs.rooms.send(room, sender, MEMBER, with_reason(content, reason), state_key=invitee)


@route("POST", ROOM_PATH + "/invite", auth=USER, limit="invite", body=INVITE_BODY)
async def post_invite(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Invite a user by id; by e-mail address there is no identity server to ask.

    Spec: CS-API "Joining rooms", "Third-party invites".
    """
    body = request.json
    if "user_id" not in body and "medium" in body and "address" in body:
        raise MatrixError(403, "M_THREEPID_DENIED", "This server knows no identity server")
    if "user_id" not in body:
        raise missing_param("user_id is missing")
    refuse_suspended(hs, request.user)
    room = hs.rooms.get(room_id)
    require_joined(room, request.user.nid)
    require_invitable(hs, body["user_id"])
    invite(hs, room, request.user.user_id, body["user_id"], reason=body.get("reason"))
    return {}


def room_by_name(hs: Homeserver, name: str) -> Room:
    """The room that an id or an alias stands for."""
    if is_room_alias(name):
        return hs.rooms.get(resolve_alias(hs, name)[0])
    if not is_room_id(name):
        raise invalid_param("That is neither a room id nor a room alias")
    return hs.rooms.get(name)


JOIN_PATH = "/_matrix/client/v3/join/{room}"
JOIN_BY_ID = "/_matrix/client/v3/rooms/{room}/join"
KNOCK_PATH = "/_matrix/client/v3/knock/{room}"


def in_allowed_room(hs: Homeserver, condition: object, user_nid: UserNid) -> bool:
    """Whether one condition of a restricted join rule is met."""
    if not isinstance(condition, dict) or condition.get("type") != "m.room_membership":
        return False
    room_id = condition.get("room_id")
    room = hs.rooms.find(room_id) if isinstance(room_id, str) else None
    return room is not None and room.membership_of(user_nid) == "join"


def join_authorisation(hs: Homeserver, room: Room, user_nid: UserNid) -> Json:
    """For a restricted room: who of its members vouches for the join, if a condition is met.

    Spec: CS-API "Restricted rooms"; rooms/v8.  403 when none of the conditions is met.
    """
    rule = room.join_rule
    if "restricted" not in rule or rule not in known_join_rules(room.version):
        return {}
    if room.membership_of(user_nid) in {"invite", "join", "ban"}:
        return {}
    allow = room.content(JOIN_RULES).get("allow")
    conditions = allow if isinstance(allow, list) else []
    if not any(in_allowed_room(hs, condition, user_nid) for condition in conditions):
        raise forbidden("You are in none of the rooms whose members may join this one")
    levels = room.power_levels()
    for voucher in map(hs.db.user_id, sorted(room.local_joined)):
        if levels.user(voucher) >= levels.invite:
            return {"join_authorised_via_users_server": voucher}
    raise MatrixError(403, "M_UNABLE_TO_GRANT_JOIN", "Nobody here may let you in")


GUEST_ACCESS = ("m.room.guest_access", "guest_access")


def require_guest_access(room: Room, user: Requester) -> None:
    """403 for a guest where guests may not join."""
    if user.is_guest and room.setting(*GUEST_ACCESS, "forbidden") != "can_join":
        raise MatrixError(403, "M_GUEST_ACCESS_FORBIDDEN", "Guests cannot join this room")


THIRD_PARTY_SIGNED: Final[Json] = {"sender": str, "mxid": str, "token": str, "signatures": dict}


def accept_third_party_invite(hs: Homeserver, room: Room, user: Requester, signed: Json) -> None:
    """Make the pending invite of an address one of the user to whom it turned out to belong.

    Spec: CS-API "Third-party invites"; the signature is rule 5.4.1's business.  Trap: a key with a
    key_validity_url has to be asked after first, which takes an HTTP client, so it is refused.
    """
    check_shape(signed, THIRD_PARTY_SIGNED, "third_party_signed")
    pending = room.state_event(THIRD_PARTY_INVITE, signed["token"])
    if pending is None or signed["mxid"] != user.user_id or signed["sender"] != pending.sender:
        raise forbidden("third_party_signed belongs to no pending invite of yours")
    if not hs.is_local(pending.sender):
        raise forbidden(f"This server does not federate with {server_of(pending.sender)}")
    if any("key_validity_url" in entry for entry in invite_entries(pending)):
        raise forbidden("Whether the key of this invite is still valid cannot be asked from here")
    name = pending.content.get("display_name")
    invite = {"display_name": name if isinstance(name, str) else "", "signed": signed}
    content = {"membership": "invite", "third_party_invite": invite}
    content.update(member_profile(hs, user.user_id))
    hs.rooms.send(room, pending.sender, MEMBER, content, state_key=user.user_id)


def join(hs: Homeserver, request: Request, room: Room) -> None:
    """Let the requester join; who is in already stays as they are."""
    user, signed = request.user, request.json.get("third_party_signed")
    if room.membership_of(user.nid) == "join":
        return
    refuse_suspended(hs, user)
    refuse_blocked(hs, room.room_id)
    require_guest_access(room, user)
    if signed is not None and room.membership_of(user.nid) != "invite":
        accept_third_party_invite(hs, room, user, signed)
    content = {"membership": "join", **join_authorisation(hs, room, user.nid)}
    if user.is_guest:
        content["kind"] = "guest"
    set_own_membership(hs, request, room, content)


@route("POST", JOIN_PATH, auth=GUEST, limit="join", body=JOIN_BODY)
@route("POST", JOIN_BY_ID, auth=GUEST, limit="join", body=JOIN_BODY)
async def post_join(hs: Homeserver, request: Request, room: str) -> Json:
    """Join a room by its id or one of its aliases.  Spec: CS-API "Joining rooms"."""
    found = room_by_name(hs, room)
    with hs.db.write():
        join(hs, request, found)
    return {"room_id": found.room_id}


def auto_join(hs: Homeserver, user_nid: UserNid) -> None:
    """A new user enters the rooms that the configuration names, where they may."""
    user_id = hs.db.user_id(user_nid)
    for alias in hs.config.auto_join_rooms:
        try:
            room = room_by_name(hs, alias)
            refuse_blocked(hs, room.room_id)
            content = {"membership": "join", **member_profile(hs, user_id)}
            content.update(join_authorisation(hs, room, user_nid))
            hs.rooms.send(room, user_id, MEMBER, content, state_key=user_id)
        except MatrixError as error:
            log_rooms.warning("%s cannot join %s: %s", user_id, alias, error.error)


@route("POST", KNOCK_PATH, auth=USER, limit="join", body=REASON)
async def post_knock(hs: Homeserver, request: Request, room: str) -> Json:
    """Ask to be let into a room.  Spec: CS-API "Knocking on rooms"."""
    refuse_suspended(hs, request.user)
    found = room_by_name(hs, room)
    refuse_blocked(hs, found.room_id)
    if found.membership_of(request.user.nid) != "knock":
        set_own_membership(hs, request, found, {"membership": "knock"})
    return {"room_id": found.room_id}


def leave(hs: Homeserver, room: Room, user_id: str, reason: str | None = None) -> None:
    """Make a user leave a room by themselves."""
    membership = room.membership(user_id)
    if membership is None:
        raise forbidden("You are not in this room")
    if membership != "leave":
        content = with_reason({"membership": "leave"}, reason)
        hs.rooms.send(room, user_id, MEMBER, content, state_key=user_id)


@route("POST", ROOM_PATH + "/leave", auth=GUEST, body=REASON)
async def post_leave(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Leave a room, reject its invite or take back a knock; leaving twice is no error.

    Spec: CS-API "Leaving rooms".
    """
    leave(hs, hs.rooms.get(room_id), request.user.user_id, request.json.get("reason"))
    return {}


# What one does to others: the memberships that it starts from (None: any), that it leads to,
# and what else there is to say.
ACTIONS: Final = {
    "kick": ({"join", "invite", "knock"}, "leave", "is not in the room"),
    "ban": (None, "ban", ""),
    "unban": ({"ban"}, "leave", "is not banned"),
}


@route("POST", ROOM_PATH + "/kick", auth=USER, body=USER_AND_REASON)
@route("POST", ROOM_PATH + "/ban", auth=USER, body=USER_AND_REASON)
@route("POST", ROOM_PATH + "/unban", auth=USER, body=USER_AND_REASON)
async def post_action(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Kick, ban or unban a user, who keeps the name that they had in the room.

    Spec: CS-API "Leaving rooms", "Banning users in a room".  403 where there is nothing to do.
    """
    refuse_suspended(hs, request.user)
    before, after, refusal = ACTIONS[request.segments[-1]]
    room, target = hs.rooms.get(room_id), request.json["user_id"]
    if not is_user_id(target):
        raise invalid_param("user_id is not a user id")
    require_joined(room, request.user.nid)
    if before is not None and room.membership(target) not in before:
        raise forbidden(f"{target} {refusal}")
    old = room.content(MEMBER, target)
    content: Json = {key: old[key] for key in ("displayname", "avatar_url") if key in old}
    content = with_reason({**content, "membership": after}, request.json.get("reason"))
    hs.rooms.send(room, request.user.user_id, MEMBER, content, state_key=target)
    return {}


@route("POST", ROOM_PATH + "/forget", auth=GUEST)
async def post_forget(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Stop remembering a room that one has left.  400 M_UNKNOWN while still in it.

    Spec: CS-API "Leaving rooms".
    """
    room = hs.rooms.get(room_id)
    membership = room.membership_of(request.user.nid)
    if membership in {"join", "invite", "knock"}:
        raise MatrixError(400, "M_UNKNOWN", "Leave the room before you forget it")
    if membership is not None:
        hs.rooms.forget(request.user.nid, room)
    return {}


async def send_guests_away(hs: Homeserver, room: Room) -> None:
    """Make the guests of this server leave a room, unless it lets them in again by now."""
    rows = hs.db.all(
        """
        SELECT user_nid
        FROM memberships
        JOIN accounts USING (user_nid)
        WHERE room_nid = ?
          AND membership = 'join'
          AND is_guest
        """,
        (room.nid,),
    )
    for (nid,) in rows:
        shut_out = room.setting(*GUEST_ACCESS, "forbidden") != "can_join"
        if shut_out and room.membership_of(nid) == "join":
            leave(hs, room, hs.db.user_id(nid), "The room is closed to guests")
        await asyncio.sleep(0)


def guests_may_stay(hs: Homeserver, room: Room, event: Event) -> None:
    """Subscriber of the room store: a room that shuts out guests loses those that are in.

    Spec: CS-API "Guest Access", "Server behaviour".
    """
    if event.key == (GUEST_ACCESS[0], "") and event.content.get("guest_access") != "can_join":
        hs.background(send_guests_away(hs, room))


@route("GET", "/_matrix/client/v3/joined_rooms", auth=GUEST)
async def get_joined_rooms(hs: Homeserver, request: Request) -> Json:
    """The rooms that the user is in.  Spec: CS-API "Room membership"."""
    nids = hs.rooms.joined_rooms(request.user.nid)
    return {"joined_rooms": [hs.rooms.by_nid(nid).room_id for nid in nids]}


# ── 17.4  Creating a room ────────────────────────────────────────────────────

PRESETS: Final = {  # (join rule, guest access)
    "private_chat": ("invite", "can_join"),
    "trusted_private_chat": ("invite", "can_join"),
    "public_chat": ("public", "forbidden"),
}
POWERS: Final = {
    **{"users_default": 0, "events_default": 0, "invite": 0},
    **{"state_default": 50, "kick": 50, "ban": 50, "redact": 50},
}
EVENT_POWERS: Final = {
    "m.room.name": 50,
    "m.room.avatar": 50,
    "m.room.canonical_alias": 50,
    "m.room.power_levels": 100,
    "m.room.history_visibility": 100,
    "m.room.tombstone": 100,
    "m.room.server_acl": 100,
    "m.room.encryption": 100,
}
CREATE_BODY: Final[Json] = {
    "visibility?": str,
    "room_alias_name?": str,
    "name?": str,
    "topic?": str,
    "invite?": [str],
    "invite_3pid?": [dict],
    "room_version?": str,
    "creation_content?": dict,
    "initial_state?": [{"type": str, "state_key?": str, "content": dict}],
    "preset?": str,
    "is_direct?": bool,
    "power_level_content_override?": dict,
}
CREATE_ROOM = "/_matrix/client/v3/createRoom"


def preset_of(body: Json) -> str:
    """The preset asked for, or the one that goes with the visibility."""
    visibility = body.get("visibility", "private")
    if visibility not in {"public", "private"}:
        raise invalid_param("visibility is public or private")
    preset: str = body.get("preset", f"{visibility}_chat")
    if preset not in PRESETS:
        raise invalid_param("There is no preset of that name")
    return preset


def new_alias(hs: Homeserver, body: Json) -> str | None:
    """The whole alias for room_alias_name, which must be free."""
    name = body.get("room_alias_name")
    if name is None:
        return None
    alias = f"#{name}:{hs.config.server_name}"
    if not is_room_alias(alias) or ":" in name or any(char.isspace() for char in name):
        raise invalid_param("room_alias_name is not the local part of an alias")
    if find_alias(hs, alias) is not None:
        raise MatrixError(400, "M_ROOM_IN_USE", f"{alias} exists already")
    return alias


def checked_invitees(hs: Homeserver, creator: str, body: Json) -> list[str]:
    """The users to invite, each once."""
    if body.get("invite_3pid"):
        raise MatrixError(403, "M_THREEPID_DENIED", "This server knows no identity server")
    invitees = list(dict.fromkeys(body.get("invite", [])))
    if len(invitees) > MAX_INVITES:
        raise invalid_param(f"At most {MAX_INVITES} users can be invited at once")
    for invitee in invitees:
        require_invitable(hs, invitee)
    return [invitee for invitee in invitees if invitee != creator]


def create_content(version: RoomVersion, creator: str, body: Json, trusted: list[str]) -> Json:
    """The content of m.room.create."""
    content = {**body.get("creation_content", {}), "room_version": version.id}
    content.pop("creator", None)
    if version.creator_in_content:
        content["creator"] = creator
    if version.privileged_creators and trusted:
        creators = content.get("additional_creators", [])
        named = creators if isinstance(creators, list) else []
        known = {one for one in named if isinstance(one, str)}  # the rules refuse what is none
        content["additional_creators"] = [*named, *(one for one in trusted if one not in known)]
    return content


def initial_levels(version: RoomVersion, creator: str, body: Json, trusted: list[str]) -> Json:
    """The content of the first m.room.power_levels."""
    levels: Json = {**POWERS, "events": dict(EVENT_POWERS), "users": {}}
    if version.privileged_creators:
        levels["events"]["m.room.tombstone"] = 150
    else:
        levels["users"] = {user_id: 100 for user_id in [creator, *trusted]}
    if body.get("preset") == "public_chat" or body.get("visibility") == "public":
        levels["invite"] = 50
    return {**levels, **body.get("power_level_content_override", {})}


def require_encryption_allowed(hs: Homeserver, event_type: str) -> None:
    """403 for switching encryption on where the configuration forbids it."""
    if event_type == "m.room.encryption" and not hs.config.allow_encryption:
        raise forbidden("Encryption is switched off on this server")


def initial_state(
    hs: Homeserver, body: Json, preset: str, alias: str | None
) -> Iterator[tuple[str, str, Json]]:
    """(type, state key, content) of what follows the power levels, in the specified order."""
    if alias is not None:
        yield "m.room.canonical_alias", "", {"alias": alias}
    given = {(one["type"], one.get("state_key", "")): one for one in body.get("initial_state", [])}
    join_rule, guest_access = PRESETS[preset]
    for event_type, name, value in (
        (JOIN_RULES, "join_rule", join_rule),
        ("m.room.history_visibility", "history_visibility", "shared"),
        ("m.room.guest_access", "guest_access", guest_access),
    ):
        if (event_type, "") not in given:
            yield event_type, "", {name: value}
    for (event_type, state_key), one in given.items():
        require_encryption_allowed(hs, event_type)
        yield event_type, state_key, one["content"]
    if "name" in body:
        yield "m.room.name", "", {"name": body["name"]}
    if "topic" in body:  # a plain topic in both its forms
        topic = body["topic"]
        yield "m.room.topic", "", {"topic": topic, "m.topic": {"m.text": [{"body": topic}]}}


def requested_version(hs: Homeserver, body: Json, name: str) -> RoomVersion:
    """The room version in a body, or the default; 400 M_UNSUPPORTED_ROOM_VERSION."""
    version = room_version(body.get(name, hs.config.default_room_version))
    if not version.stable and not hs.config.allow_unstable_room_versions:
        raise MatrixError(400, "M_UNSUPPORTED_ROOM_VERSION", "Unstable versions are switched off")
    return version


def refuse_creation(hs: Homeserver, user: Requester) -> None:
    """403 for the suspended, and where the configuration leaves the making of rooms to admins."""
    refuse_suspended(hs, user)
    if not hs.config.allow_room_creation and not user.is_admin:
        raise forbidden("Room creation is switched off on this server")


def create_room(hs: Homeserver, creator: str, body: Json) -> Room:
    """Make a room as a createRoom body describes it: all of it, or nothing."""
    preset = preset_of(body)
    version = requested_version(hs, body, "room_version")
    alias = new_alias(hs, body)
    invitees = checked_invitees(hs, creator, body)
    trusted = invitees if preset == "trusted_private_chat" else []
    content = create_content(version, creator, body, trusted)
    levels = initial_levels(version, creator, body, trusted)
    joins = {"membership": "join", **member_profile(hs, creator)}
    try:
        with hs.db.write():
            room = hs.rooms.create(version.id, creator, content)
            hs.rooms.send(room, creator, MEMBER, joins, state_key=creator)
            hs.rooms.send(room, creator, POWER_LEVELS, levels, state_key="")
            if alias is not None:
                set_alias(hs, alias, room, creator)
            for event_type, state_key, state in initial_state(hs, body, preset, alias):
                hs.rooms.send(room, creator, event_type, state, state_key=state_key)
            for invitee in invitees:
                invite(hs, room, creator, invitee, is_direct=body.get("is_direct") is True)
            if body.get("visibility") == "public":
                publish_room(hs, room, "public")
    except MatrixError as error:
        if error.errcode != "M_FORBIDDEN":
            raise
        raise MatrixError(400, "M_INVALID_ROOM_STATE", error.error) from error
    return room


@route("POST", CREATE_ROOM, auth=USER, limit="create", body=CREATE_BODY)
async def post_create_room(hs: Homeserver, request: Request) -> Json:
    """Create a room.  Spec: CS-API "Creation".

    400 M_ROOM_IN_USE for a taken alias, M_INVALID_ROOM_STATE when the rules refuse one of the
    events asked for.
    """
    refuse_creation(hs, request.user)
    return {"room_id": create_room(hs, request.user.user_id, request.json).room_id}


# ── 17.5  Replacing a room ───────────────────────────────────────────────────
#
# In three steps, since a room can have thousands of bans and children: the new room with nobody
# but its maker in it, what it inherits, slice by slice, and then at once all that makes it the
# successor. A server that dies on the way leaves the old room as it was.

TOMBSTONE_KEY: Final[StateKey] = ("m.room.tombstone", "")
CANONICAL_ALIAS = "m.room.canonical_alias"
SPACE_CHILD = "m.space.child"
INHERITED: Final = {  # beside the bans; the power levels come earlier and the join rules later
    *("m.room.server_acl", "m.room.encryption", "m.room.name", "m.room.avatar", "m.room.topic"),
    *("m.room.guest_access", "m.room.history_visibility", SPACE_CHILD, "m.space.parent"),
}
INHERITED_AT_ONCE = 20  # events, before others get their turn
MAX_POWER = 2**53 - 1
UPGRADE_BODY: Final[Json] = {"new_version": str, "additional_creators?": [str]}


def levels_in(version: RoomVersion, table: Json) -> dict[str, int]:
    """What of an object are power levels in that version, as the integers of later versions."""
    found = ((name, level_of(version, value)) for name, value in table.items())
    return {name: max(-MAX_POWER, min(MAX_POWER, n)) for name, n in found if n is not None}


def inherited_levels(old: Room, version: RoomVersion, creators: list[str]) -> Json:
    """The power levels of a room in the form that the version of its replacement wants."""
    content = old.content(POWER_LEVELS)
    tables = {
        name: levels_in(old.version, object_in(content, name))
        for name in ("users", "events", "notifications")
    }
    named = {name: content[name] for name in LEVEL_DEFAULTS if name in content}
    plain = {**LEVEL_DEFAULTS, **levels_in(old.version, named)}
    users = {user: level for user, level in tables["users"].items() if is_sender_id(user)}
    if version.privileged_creators:
        users = {user: level for user, level in users.items() if user not in creators}
        events, state_default = tables["events"], plain["state_default"]
        if events.get("m.room.tombstone", state_default) <= state_default:
            events["m.room.tombstone"] = max(150, min(MAX_POWER, state_default + 1))
    else:
        former = creators_of(old.version, old.state_event(*CREATE_KEY))
        users |= {user: 100 for user in former if isinstance(user, str)}
        users.setdefault(creators[0], min(MAX_POWER, old.power_levels().user(creators[0])))
    return {**plain, **tables, "users": users}


def working_levels(version: RoomVersion, levels: Json, maker: str) -> Json:
    """Power levels by which the maker of a room can furnish it, whatever the final ones allow."""
    if version.privileged_creators:
        return levels
    needed = max(levels["state_default"], levels["ban"], *levels["events"].values(), 0)
    own = max(needed, levels["users"][maker])
    return {**levels, "users": {**levels["users"], maker: own}}


def start_replacement(
    hs: Homeserver, old: Room, maker: str, version: RoomVersion, creators: list[str]
) -> tuple[Room, Json]:
    """The new room, with its maker in it and nobody else, and the power levels it is to have."""
    levels = inherited_levels(old, version, creators)
    create, content = old.content(CREATE), cast(Json, {"predecessor": {"room_id": old.room_id}})
    if isinstance(create.get("type"), str):
        content["type"] = create["type"]
    if create.get("m.federate") is False:
        content["m.federate"] = False
    if version.privileged_creators and creators[1:]:
        content["additional_creators"] = creators[1:]
    if not version.privileged_creators:  # from version 12 clients look for the tombstone instead
        newest = cast(Event, hs.rooms.event_at(old, old.last_pos))
        content["predecessor"]["event_id"] = newest.event_id
    content = create_content(version, maker, {"creation_content": content}, [])
    with hs.db.write():
        new = hs.rooms.create(version.id, maker, content)
        joins = {"membership": "join", **member_profile(hs, maker)}
        hs.rooms.send(new, maker, MEMBER, joins, state_key=maker)
        first = working_levels(version, levels, maker)
        hs.rooms.send(new, maker, POWER_LEVELS, first, state_key="")
    return new, levels


def send_if_allowed(
    hs: Homeserver, room: Room, sender: str, event_type: str, content: Json, state_key: str = ""
) -> bool:
    """Set a piece of state, unless the rules or the format of the room refuse it."""
    try:
        hs.rooms.send(room, sender, event_type, content, state_key=state_key)
    except MatrixError as error:
        if error.status >= 500:
            raise
        log_rooms.info("%s is not set in %s: %s", event_type, room.room_id, error.error)
        return False
    return True


def inheritance(old: Room, after: int) -> Iterator[tuple[str, str, Json]]:
    """The (type, state key, content) of settings and bans, as far as set after a position."""
    keys = [key for key in old.state if key[0] in INHERITED]
    for key in keys + [(MEMBER, user_id) for user_id in old.members("ban")]:
        if old.state.get(key, after) > after and (content := old.content(*key)):
            yield *key, content


async def hand_down(hs: Homeserver, old: Room, new: Room, maker: str) -> None:
    """Set in the new room what it inherits, also what is changed while this goes on."""
    done = MIN_POSITION
    while done < old.last_pos:
        after, done = done, old.last_pos
        for number, (event_type, state_key, content) in enumerate(inheritance(old, after)):
            if number % INHERITED_AT_ONCE == 0:
                await asyncio.sleep(0)
            send_if_allowed(hs, new, maker, event_type, content, state_key)


def move_aliases(hs: Homeserver, old: Room, new: Room, maker: str) -> None:
    """Let the local aliases lead to the new room, and say so in both rooms."""
    moved = move_to_replacement(hs, old, new)
    content = old.content(CANONICAL_ALIAS)
    main, others = content.get("alias"), content.get("alt_aliases")
    named = [alias for alias in [main, *(others if isinstance(others, list) else [])] if alias]
    for room, is_new in ((old, False), (new, True)):
        rest = [alias for alias in named if isinstance(alias, str) and (alias in moved) == is_new]
        part: Json = {} if main not in rest else {"alias": rest.pop(0)}
        part |= {"alt_aliases": rest} if rest else {}
        if part != room.content(CANONICAL_ALIAS):
            send_if_allowed(hs, room, maker, CANONICAL_ALIAS, part)


def move_in_spaces(hs: Homeserver, old: Room, new: Room, maker: str) -> None:
    """Put the new room in the old one's place in all spaces where its maker may."""
    rows = hs.db.all(
        """
        SELECT DISTINCT memberships.room_nid
        FROM memberships
        JOIN events ON events.room_nid = memberships.room_nid AND state_nid = ?
        WHERE user_nid = ?
          AND membership = 'join'
        """,
        (hs.rooms.groups.names.find((SPACE_CHILD, old.room_id)), hs.db.user_nid(maker)),
    )
    for (nid,) in rows:
        space = hs.rooms.by_nid(nid)
        content = space.content(SPACE_CHILD, old.room_id)
        if content and send_if_allowed(hs, space, maker, SPACE_CHILD, content, new.room_id):
            send_if_allowed(hs, space, maker, SPACE_CHILD, {}, old.room_id)


def close_replaced(hs: Homeserver, old: Room, maker: str) -> None:
    """Let nobody but moderators write in a replaced room, or invite to it, if the maker may."""
    levels, content = old.power_levels(), old.content(POWER_LEVELS)
    least = max(50, levels.named("users_default") + 1)
    raised = {name: max(least, levels.named(name)) for name in ("events_default", "invite")}
    if POWER_LEVELS_KEY in old.state:
        send_if_allowed(hs, old, maker, POWER_LEVELS, {**content, **raised})


def require_power_to_replace(old: Room, user_id: str) -> None:
    """403 unless the user is in the room and may send its tombstone."""
    levels = old.power_levels()
    needed = levels.event("m.room.tombstone", True)
    if old.membership(user_id) != "join" or levels.user(user_id) < needed:
        raise forbidden("You cannot upgrade this room")


def finish_replacement(hs: Homeserver, old: Room, new: Room, maker: str, levels: Json) -> None:
    """Make the new room the successor: all of it, or nothing."""
    with hs.db.write():
        if JOIN_RULES_KEY in old.state:
            send_if_allowed(hs, new, maker, JOIN_RULES, old.content(JOIN_RULES))
        tombstone = {"body": "This room has been replaced", "replacement_room": new.room_id}
        hs.rooms.send(old, maker, TOMBSTONE_KEY[0], tombstone, state_key="")
        move_aliases(hs, old, new, maker)
        move_in_spaces(hs, old, new, maker)
        close_replaced(hs, old, maker)
        if levels != new.content(POWER_LEVELS):
            hs.rooms.send(new, maker, POWER_LEVELS, levels, state_key="")


async def replace_room(
    hs: Homeserver, old: Room, maker: str, version: RoomVersion, creators: list[str]
) -> Room:
    """Replace a room by one of another version; `creators` are the maker and those beside them."""
    require_power_to_replace(old, maker)
    before = old.state.get(TOMBSTONE_KEY)
    new, levels = start_replacement(hs, old, maker, version, creators)
    try:
        await hand_down(hs, old, new, maker)
        require_power_to_replace(old, maker)  # things may have changed meanwhile
        if old.state.get(TOMBSTONE_KEY) != before:
            raise forbidden("Somebody else has just upgraded this room")
        finish_replacement(hs, old, new, maker, levels)
    except MatrixError:
        leave(hs, new, maker)
        raise
    return new


@route("POST", ROOM_PATH + "/upgrade", auth=USER, limit="create", body=UPGRADE_BODY)
async def post_upgrade(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Replace a room by one of another version, with its settings, bans, aliases and places.

    Spec: CS-API "Room Upgrades".  400 M_UNSUPPORTED_ROOM_VERSION; 403 for those who may not send
    m.room.tombstone. Members come by themselves; their tags and push rules follow.
    """
    body, user = request.json, request.user
    version, room = requested_version(hs, body, "new_version"), known_room(hs, room_id)
    refuse_creation(hs, user)
    refuse_blocked(hs, room_id)
    creators = [user.user_id, *body.get("additional_creators", ())]
    if version.privileged_creators and not all(map(is_user_id, creators)):
        raise invalid_param("additional_creators is not a list of user ids")
    new = await replace_room(hs, room, user.user_id, version, list(dict.fromkeys(creators)))
    return {"replacement_room": new.room_id}


# ── 17.6  Sending ────────────────────────────────────────────────────────────

SEND_PATH = ROOM_PATH + "/send/{event_type}/{txn_id}"
REDACT_PATH = ROOM_PATH + "/redact/{event_id}/{txn_id}"
STATE_PATH = ROOM_PATH + "/state/{event_type}/{state_key...}"


def send_once(
    hs: Homeserver, request: Request, scope: str, txn_id: str, send: Callable[..., Event]
) -> Json:
    """Send an event, unless this device did so before under that transaction id."""
    user = request.user
    event_id = repeated_transaction(hs, user, scope, txn_id)
    if event_id is None:
        with hs.db.write():
            # The device gets the transaction id back with the event.
            sent_as = None if user.device_nid is None else (user.device_nid, txn_id)
            event_id = send(transaction=sent_as).event_id
            record_transaction(hs, user, scope, txn_id, event_id)
    return {"event_id": event_id}


def send_redaction(
    hs: Homeserver,
    user: Requester,
    room_id: str,
    target_id: str,
    content: Json,
    transaction: SentAs,
) -> Event:
    """Redact an event, if the requester may."""
    room = hs.rooms.get(room_id)
    require_joined(room, user.nid)
    target = hs.rooms.event(target_id)
    if target is None or target.room_nid != room.nid:
        raise not_found("There is no such event in this room")
    levels, sender = room.power_levels(), user.user_id
    # Trap: the room's rules let a whole server redact what it sent; a user may redact their own.
    if target.sender != sender:
        refuse_suspended(hs, user)
        is_admins = user.is_admin and hs.is_local(target.sender)
        if levels.user(sender) < levels.redact and not is_admins:
            raise forbidden("You may not redact the events of others in this room")
    return hs.rooms.send(
        room, sender, REDACTION, content, redacts=target_id, transaction=transaction
    )


def send_message(
    hs: Homeserver,
    user: Requester,
    room_id: str,
    event_type: str,
    content: Json,
    transaction: SentAs,
) -> Event:
    """Send an event that is no state; a redaction names its target in the content."""
    if event_type != REDACTION:
        refuse_suspended(hs, user)
        room = hs.rooms.get(room_id)
        require_thread_root(hs, room, content)
        return hs.rooms.send(room, user.user_id, event_type, content, transaction=transaction)
    target = content.get("redacts")
    if not isinstance(target, str):
        raise bad_json("A redaction names the event that it redacts")
    return send_redaction(hs, user, room_id, target, content, transaction)


@route("PUT", SEND_PATH, auth=GUEST, limit="message", body=ANY_OBJECT)
async def put_send(
    hs: Homeserver, request: Request, room_id: str, event_type: str, txn_id: str
) -> Json:
    """Send a message event; a repeated txn_id from the same device answers with the same event_id.

    Spec: CS-API "Sending events to a room".  403 when the room's rules refuse it, 413 M_TOO_LARGE
    over 65,536 bytes.
    """
    delay = delay_of(request)
    if delay is not None:
        return schedule_once(hs, request, room_id, event_type, delay=delay, txn_id=txn_id)
    send = functools.partial(send_message, hs, request.user, room_id, event_type, request.json)
    return send_once(hs, request, f"{room_id} {event_type}", txn_id, send)


@route("PUT", REDACT_PATH, auth=GUEST, limit="message", body=REASON)
async def put_redact(
    hs: Homeserver, request: Request, room_id: str, event_id: str, txn_id: str
) -> Json:
    """Take the content of an event away: one's own, or any with the power to redact.

    Spec: CS-API "Redactions".  403 without that power, which admins have over the users of this
    server; 404 for an event that is not in the room.
    """
    content = with_reason({}, request.json.get("reason"))
    send = functools.partial(send_redaction, hs, request.user, room_id, event_id, content)
    return send_once(hs, request, f"{room_id} redact {event_id}", txn_id, send)


def require_own_aliases(hs: Homeserver, room: Room, content: Json) -> None:
    """400 unless each alias newly named in m.room.canonical_alias leads to this room.

    Spec: CS-API "Sending events to a room", M_BAD_ALIAS and M_INVALID_PARAM.
    """
    check_shape(content, {"alias?": str, "alt_aliases?": [str]}, "The body")
    before = room.content("m.room.canonical_alias")
    known = [before.get("alias"), before.get("alt_aliases")]
    for alias in (content.get("alias"), *content.get("alt_aliases", [])):
        if not alias or alias == known[0] or (isinstance(known[1], list) and alias in known[1]):
            continue
        if not is_room_alias(alias):
            raise invalid_param(f"{alias[:MAX_ID_BYTES]} is not a room alias")
        if find_alias(hs, alias) != room.room_id:
            raise MatrixError(400, "M_BAD_ALIAS", f"{alias} does not lead to this room")


def checked_member_content(
    hs: Homeserver, user: Requester, room: Room, target: str, content: Json
) -> Json:
    """A member event set as state must pass what the membership endpoints check as well."""
    content = {**content}
    content.pop("join_authorised_via_users_server", None)  # no other server would have signed it
    before, after = room.membership(target), content.get("membership")
    if after in ("join", "invite", "knock") and before != after:
        refuse_blocked(hs, room.room_id)
    if after == "invite" and before != "invite":
        require_invitable(hs, target)
        require_inviting_allowed(hs, target, user.user_id)
    if after == "join" and before != "join" and target == user.user_id:
        require_guest_access(room, user)
        return {**content, **join_authorisation(hs, room, user.nid)}
    return content


def set_state(
    hs: Homeserver,
    user: Requester,
    room_id: str,
    event_type: str,
    state_key: str,
    content: Json,
    transaction: SentAs = None,
) -> Event:
    """Set a piece of state; what is so already is left to the event that did it."""
    room, user_id = hs.rooms.get(room_id), user.user_id
    require_encryption_allowed(hs, event_type)
    if event_type == REDACTION:  # it would get past the checks of `send_redaction`
        raise invalid_param("A redaction is no state; PUT .../redact/{event_id}/{txn_id} sends one")
    if event_type == "m.room.canonical_alias":
        require_own_aliases(hs, room, content)
    if event_type == MEMBER:
        content = checked_member_content(hs, user, room, state_key, content)
    if (event_type, state_key, content.get("membership")) != (MEMBER, user_id, "leave"):
        refuse_suspended(hs, user)
    event = room.state_event(event_type, state_key)
    if event is not None and event.content == content and event.sender == user_id:
        return event
    return hs.rooms.send(
        room, user_id, event_type, content, state_key=state_key, transaction=transaction
    )


@route("PUT", STATE_PATH, auth=GUEST, limit="message", body=ANY_OBJECT)
async def put_state(
    hs: Homeserver, request: Request, room_id: str, event_type: str, state_key: str
) -> Json:
    """Set a piece of state; setting it to what it is already answers with the event that did so.

    Spec: CS-API "Sending events to a room".  400 M_BAD_ALIAS for a canonical alias of another room.
    """
    delay = delay_of(request)
    if delay is not None:
        return schedule_once(hs, request, room_id, event_type, delay=delay, state_key=state_key)
    event = set_state(hs, request.user, room_id, event_type, state_key, request.json)
    return {"event_id": event.event_id}


def send_delayed(hs: Homeserver, delayed: DelayedEvent) -> Event:
    """Send a delayed event as its user would now; the event remembers which one it was."""
    account = hs.accounts.get(delayed.user_nid)
    if account is None or account.deactivated or account.locked:
        raise forbidden("This account is not in use any more")
    user_id = hs.db.user_id(delayed.user_nid)
    rights = account.is_guest, account.is_admin
    user = Requester(user_id, delayed.user_nid, None, None, None, *rights)
    content, sent_as = json.loads(delayed.content), (None, delayed.delay_id)
    if delayed.state_key is None:
        return send_message(hs, user, delayed.room_id, delayed.type, content, sent_as)
    place = (delayed.room_id, delayed.type, delayed.state_key)
    return set_state(hs, user, *place, content, sent_as)


# ── 17.7  Reading state and members ──────────────────────────────────────────


@route("GET", ROOM_PATH + "/state", auth=GUEST)
async def get_all_state(hs: Homeserver, request: Request, room_id: str) -> Response:
    """All state of a room.  Spec: CS-API "Getting events for a room"."""
    room, limit = readable_room(hs, request, room_id)
    events = hs.rooms.events_by_nids(state_for(hs, room, limit).values())
    return Response(200, encode_json(as_clients(hs, request, events)))


@route("GET", STATE_PATH, auth=GUEST)
async def get_state(
    hs: Homeserver, request: Request, room_id: str, event_type: str, state_key: str
) -> Json:
    """One piece of state: its content, or with ?format=event the whole event; 404 if not set.

    Spec: CS-API "Getting events for a room".
    """
    room, limit = readable_room(hs, request, room_id)
    key = (event_type, state_key)
    event = room.state_event(*key) if limit is None else hs.rooms.entry_after(limit, key)
    if event is None:
        raise not_found("The room has no such state")
    if request.arg("format", "content") == "event":
        return as_clients(hs, request, [event])[0]
    return event.content


def state_at(
    hs: Homeserver, request: Request, room: Room, limit: Event | None, position: int
) -> Mapping[StateKey, EventNid]:
    """The state at a position in the timeline, as a reader with that limit sees it.

    403 where the reader may not see the event there, and so not what the room was like then.
    """
    event = hs.rooms.event_at(room, position)
    if event is None:
        return {}
    if limit is None or event.nid < limit.nid:
        if not hs.rooms.visible(request.user.nid, room, [event]):
            raise forbidden("You may not see what the room was like then")
        limit = event
    return state_for(hs, room, limit)


@route("GET", ROOM_PATH + "/members", auth=GUEST)
async def get_members(hs: Homeserver, request: Request, room_id: str) -> Json:
    """The member events of a room, now or at a point in the past; 403 for a point one cannot see.

    Spec: CS-API "Getting events for a room".
    """
    room, limit = readable_room(hs, request, room_id)
    at = request.arg("at")
    if at is None:
        state = state_for(hs, room, limit)
    else:
        state = state_at(hs, request, room, limit, parse_token(at))
    wanted, unwanted = request.arg("membership"), request.arg("not_membership")
    events = hs.rooms.events_by_nids(nid for key, nid in state.items() if key[0] == MEMBER)
    chosen = [
        event
        for event in events
        if wanted in (None, event.membership) and (unwanted is None or event.membership != unwanted)
    ]
    return {"chunk": as_clients(hs, request, chosen)}


def joined_member(event: Event) -> Json:
    """The name and picture in a member event, where they are texts."""
    names = (("display_name", "displayname"), ("avatar_url", "avatar_url"))
    pairs = ((ours, event.content.get(theirs)) for ours, theirs in names)
    return {key: value for key, value in pairs if isinstance(value, str)}


@route("GET", ROOM_PATH + "/joined_members", auth=GUEST)
async def get_joined_members(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Names and pictures of those who are in the room.

    Spec: CS-API "Getting events for a room".
    """
    room = known_room(hs, room_id)
    require_joined(room, request.user.nid)
    nids = [room.state[MEMBER, user_id] for user_id in room.members()]
    events = hs.rooms.events_by_nids(nids)
    return {"joined": {cast(str, event.state_key): joined_member(event) for event in events}}


# ── 17.8  Reading events ─────────────────────────────────────────────────────


def visible_event(
    hs: Homeserver, request: Request, room_id: str, event_id: str, *, of_ignored: bool = False
) -> tuple[Room, Event]:
    """A room and an event of it that the user may see; 404 whatever the reason why not.

    With `of_ignored` it may also be of somebody whom the user ignores.
    """
    room, event = hs.rooms.find(room_id), hs.rooms.event(event_id)
    if room is None or event is None or event.room_nid != room.nid:
        raise not_found("There is no such event in this room")
    viewer = Viewer(hs.rooms, room, request.user.nid)
    if not (viewer.has_access if of_ignored else viewer.may_see)(event):
        raise not_found("There is no such event in this room")
    return room, viewer.without_erased(event)


@route("GET", ROOM_PATH + "/event/{event_id}", auth=GUEST)
async def get_event(hs: Homeserver, request: Request, room_id: str, event_id: str) -> Json:
    """One event; 404 also for what the user may not see.

    Spec: CS-API "Getting events for a room".
    """
    return as_clients(hs, request, [visible_event(hs, request, room_id, event_id)[1]])[0]


class Page(NamedTuple):
    """Part of a timeline: the events seen, and the position behind the last one looked at."""

    events: list[Event]
    end: int
    more: bool


Reading = Callable[[int, int, int], list[Event]]  # at most so many events with low < pos <= high


def collect(
    read: Reading,
    keep: Callable[[list[Event]], list[Event]],
    span: tuple[int, int],
    limit: int,
    *,
    backwards: bool,
) -> Page:
    """Up to `limit` events with span[0] < pos <= span[1] that are to be kept.

    Trap: a page may come out empty while `more` is true, when nothing on the way could be shown.
    """
    found: list[Event] = []
    low, high = span
    size = min(MAX_PAGE, max(50, limit))
    for _ in range(MAX_SCAN // MAX_PAGE):
        batch = read(low, high, size)
        kept = {event.nid: event for event in keep(batch)}
        for event in reversed(batch) if backwards else batch:
            if len(found) >= limit:
                return Page(found, high if backwards else low, True)
            if event.nid in kept:
                found.append(kept[event.nid])
            at = cast(int, event.pos)
            low, high = (low, at - 1) if backwards else (at, high)
        if len(batch) < size:
            return Page(found, high if backwards else low, False)
    return Page(found, high if backwards else low, True)


def read_page(
    hs: Homeserver,
    user_nid: UserNid,
    room: Room,
    span: tuple[int, int],
    wanted: EventFilter,
    limit: int,
    *,
    backwards: bool,
) -> Page:
    """Up to `limit` events of a room's timeline that pass filter and visibility."""

    def keep(events: list[Event]) -> list[Event]:
        events = wanted.pick(events)
        if wanted.wants_related:
            events = related_to(hs, room, events, wanted.related_types, wanted.related_senders)
        return hs.rooms.visible(user_nid, room, events)

    if not wanted.wants_room(room.room_id):
        return Page([], span[0] if backwards else span[1], False)
    read = functools.partial(hs.rooms.events_between, room, newest=backwards)
    return collect(read, keep, span, limit, backwards=backwards)


def page_span(
    request: Request, room: Room, direction: str | None = None
) -> tuple[int, tuple[int, int], bool]:
    """Where a page begins, its positions as (low, high), and whether it is read backwards."""
    direction = request.arg("dir", direction)
    start, to = request.arg("from"), request.arg("to")
    if direction is None:
        raise missing_param("dir is missing")
    if direction not in {"b", "f"}:
        raise invalid_param("dir is b or f")
    first, last = (
        (room.last_pos, MIN_POSITION) if direction == "b" else (MIN_POSITION, room.last_pos)
    )
    begin = parse_token(start) if start else first
    end = last if to is None else parse_token(to)
    return begin, (end, begin) if direction == "b" else (begin, end), direction == "b"


def senders_of(hs: Homeserver, events: Sequence[Event]) -> list[Event]:
    """The member events of those who sent the events, as they were at the newest of them."""
    if not events:
        return []
    newest = max(events, key=lambda event: event.pos or 0)
    senders = dict.fromkeys(event.sender for event in events)
    found = (hs.rooms.entry_after(newest, (MEMBER, user_id)) for user_id in senders)
    return [event for event in found if event is not None]


@route("GET", ROOM_PATH + "/messages", auth=GUEST)
async def get_messages(hs: Homeserver, request: Request, room_id: str) -> Json:
    """A page of a room's timeline, in either direction; without `end` there is nothing more.

    Spec: CS-API "Getting events for a room".
    """
    room = viewable_room(hs, request, room_id)
    start, span, backwards = page_span(request, room)
    wanted = page_filter(request)
    page = read_page(hs, request.user.nid, room, span, wanted, wanted.limit, backwards=backwards)
    result: Json = {"start": stream_token(start), "chunk": as_clients(hs, request, page.events)}
    if page.more:
        result["end"] = stream_token(page.end)
    if wanted.lazy_load_members:
        result["state"] = as_clients(hs, request, senders_of(hs, page.events))
    return result


@route("GET", ROOM_PATH + "/context/{event_id}", auth=GUEST)
async def get_context(hs: Homeserver, request: Request, room_id: str, event_id: str) -> Json:
    """An event with what came before and after it, and the state at the last of these.

    Spec: CS-API "Event context".
    """
    room, event = visible_event(hs, request, room_id, event_id)
    if event.pos is None:
        raise not_found("The event is not in the room's timeline")
    wanted = page_filter(request)
    nid, half = request.user.nid, wanted.limit // 2
    past, future = (MIN_POSITION, event.pos - 1), (event.pos, room.last_pos)
    before = read_page(hs, nid, room, past, wanted, half, backwards=True)
    after = read_page(hs, nid, room, future, wanted, half, backwards=False)
    shown = [*before.events, event, *after.events]
    senders = {one.sender for one in shown} if wanted.lazy_load_members else None
    state = hs.rooms.state_after(shown[-1] if after.events else event)
    nids = [
        nid
        for key, nid in state.items()
        if senders is None or key[0] != MEMBER or key[1] in senders
    ]
    return {
        "start": stream_token(before.end),
        "end": stream_token(after.end),
        "event": as_clients(hs, request, [event])[0],
        "events_before": as_clients(hs, request, before.events),
        "events_after": as_clients(hs, request, after.events),
        "state": as_clients(hs, request, hs.rooms.events_by_nids(nids)),
    }


# ═════════════════════════════════════════════════════════════════════════════
#  18. PUSH RULES AND UNREAD COUNTS
#
#  Which events a user wants to hear of, and how many of them are unread. A user's
#  rules are prepared once; what notifies is remembered per user and room as a few
#  stream positions, found when that user's sync asks and not when an event is sent:
#  a message into a room of a thousand members must not write a thousand rows.
#                      spec: CS-API "Push notifications", "Receiving notifications"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE push_rules (
    user_nid INTEGER PRIMARY KEY,
    pos INTEGER NOT NULL,
    rules TEXT NOT NULL  -- JSON: kind -> the user's own rules, "default" -> changes by rule id
);
CREATE TABLE unread (
    room_nid INTEGER NOT NULL,
    user_nid INTEGER NOT NULL,
    upto INTEGER NOT NULL,  -- events after this position were not yet considered
    marks TEXT NOT NULL,  -- JSON: thread -> what notified, see UnreadRoom
    PRIMARY KEY (room_nid, user_nid)
) WITHOUT ROWID;
""")

# ── 18.1  Globs ──────────────────────────────────────────────────────────────

# A word boundary: an end of the text, or a place beside which not both are word characters.
BOUNDARY = "(?:(?<![A-Za-z0-9_])|(?![A-Za-z0-9_]))"
WILDCARD = re.compile(r"[*?]")


def glob(pattern: str, *, words: bool = False, wildcards: bool = True) -> Callable[[str], bool]:
    """A test for texts that match a pattern with * and ?, without regard to case.

    With `words`, a part of the text between word boundaries is enough.
    Trap: a plain regular expression takes hours for *a*a*a*b (CVE-2021-29471). Here a star takes
    as little as it can, and (?=(...)) keeps it from trying more: the rest fits there or nowhere.
    """
    pattern = pattern.lower()
    if not words and not WILDCARD.search(pattern):
        return lambda text: text.lower() == pattern
    parts = [re.escape(part) for part in (pattern.split("*") if wildcards else [pattern])]
    if wildcards:
        parts = [part.replace(r"\?", ".") for part in parts]
    first = f".*?{BOUNDARY}{parts[0]}" if words else parts[0]
    pieces = [first, *(f".*?{part}" for part in parts[1:])]
    pieces[-1] += BOUNDARY if words else r"\Z"
    groups = (f"(?=(?P<g{n}>{piece}))(?P=g{n})" for n, piece in enumerate(pieces))
    match = re.compile("".join(groups), re.DOTALL).match
    return lambda text: match(text.lower()) is not None


# ── 18.2  The predefined rules ───────────────────────────────────────────────

OWN_USER_ID = "[the user's Matrix ID]"  # in a predefined rule: the id of the rule's owner
NOTIFY = "notify"
SOUND: Final = {"set_tweak": "sound", "value": "default"}
RING: Final = {"set_tweak": "sound", "value": "ring"}
HIGHLIGHT: Final = {"set_tweak": "highlight"}
FOLLOWS_THREAD: Final = "io.element.msc4306.thread_subscription"


def event_match(key: str, pattern: str) -> Json:
    """The condition that a property matches a glob."""
    return {"kind": "event_match", "key": key, "pattern": pattern}


def property_is(key: str, value: Any, kind: str = "event_property_is") -> Json:
    """The condition that a property has, or is a list that contains, a value."""
    return {"kind": kind, "key": key, "value": value}


def predefined(name: str, patterns: dict[str, str], actions: list[Any], *others: Json) -> Json:
    """A predefined rule, whose conditions are `others` and patterns of properties."""
    return {
        "rule_id": f".m.rule.{name}",
        "default": True,
        "enabled": name != "master",
        "conditions": [*others, *itertools.starmap(event_match, patterns.items())],
        "actions": actions,
    }


LOUD: Final = [NOTIFY, SOUND]
MENTIONS: Final = r"content.m\.mentions"
MENTIONS_USER: Final = property_is(f"{MENTIONS}.user_ids", OWN_USER_ID, "event_property_contains")
MENTIONS_ROOM: Final = property_is(f"{MENTIONS}.room", True)
MAY_NOTIFY_ROOM: Final = {"kind": "sender_notification_permission", "key": "room"}
IS_EDIT: Final = property_is(r"content.m\.relates_to.rel_type", "m.replace")
TWO_MEMBERS: Final = {"kind": "room_member_count", "is": "2"}
MEMBER_CHANGE: Final = {"type": "m.room.member"}
INVITE: Final = {**MEMBER_CHANGE, "content.membership": "invite", "state_key": OWN_USER_ID}
TOMBSTONE: Final = {"type": "m.room.tombstone", "state_key": ""}
MESSAGE: Final = {"type": "m.room.message"}
ENCRYPTED: Final = {"type": "m.room.encrypted"}


def thread_rule(name: str, actions: list[Any]) -> Json:
    """A predefined rule for what is in a thread that the user follows, or does not."""
    condition = {"kind": FOLLOWS_THREAD, "subscribed": name == "subscribed"}
    rule = predefined(name, {}, actions, condition)
    return {**rule, "rule_id": f".io.element.msc4306.rule.{name}_thread"}


# The kinds in order of weight. The first rule outweighs the user's own.  Spec: "Predefined Rules".
DEFAULT_RULES: Final[dict[str, list[Json]]] = {
    "override": [
        predefined("master", {}, []),
        predefined("suppress_notices", {"content.msgtype": "m.notice"}, []),
        predefined("invite_for_me", INVITE, LOUD),
        predefined("member_event", MEMBER_CHANGE, []),
        predefined("is_user_mention", {}, [*LOUD, HIGHLIGHT], MENTIONS_USER),
        predefined("is_room_mention", {}, [NOTIFY, HIGHLIGHT], MENTIONS_ROOM, MAY_NOTIFY_ROOM),
        predefined("tombstone", TOMBSTONE, [NOTIFY, HIGHLIGHT]),
        predefined("reaction", {"type": "m.reaction"}, []),
        predefined("room.server_acl", {"type": "m.room.server_acl", "state_key": ""}, []),
        predefined("suppress_edits", {}, [], IS_EDIT),
    ],
    "content": [],
    "postcontent": [thread_rule("unsubscribed", []), thread_rule("subscribed", LOUD)],  # MSC4306
    "room": [],
    "sender": [],
    "underride": [
        predefined("call", {"type": "m.call.invite"}, [NOTIFY, RING]),
        predefined("encrypted_room_one_to_one", ENCRYPTED, LOUD, TWO_MEMBERS),
        predefined("room_one_to_one", MESSAGE, LOUD, TWO_MEMBERS),
        predefined("message", MESSAGE, [NOTIFY]),
        predefined("encrypted", ENCRYPTED, [NOTIFY]),
    ],
}
PUSH_KINDS: Final = tuple(DEFAULT_RULES)

# ── 18.3  Conditions ─────────────────────────────────────────────────────────

ABSENT: Final = object()
SCALARS = (str, int, bool, type(None))
MEMBER_COUNT = re.compile(r"(==|<=|>=|<|>|)([0-9]{1,15})")
COMPARISONS: Final[dict[str, Callable[[int, int], bool]]] = {
    **{"": operator.eq, "==": operator.eq, "<": operator.lt, ">": operator.gt},
    **{"<=": operator.le, ">=": operator.ge},
}

# A prepared condition: (the event, its room, the id of the rule's owner) -> whether it holds.
PushCondition = Callable[["Event", "Room", str], bool]


def property_getter(key: str) -> Callable[[Event], object]:
    r"""A function that reads the property at a dotted path, or gives ABSENT.

    Within a name, \. is a dot and \\ a backslash.  Spec: appendices "Dot-separated property paths".
    """
    if key in ("event_id", "room_id"):  # which not every room version has in the event itself
        return operator.attrgetter(key)
    names = key.replace("\\\\", "\0").replace("\\.", "\1").split(".")
    names = [name.replace("\1", ".").replace("\0", "\\") for name in names]

    def get(event: Event) -> object:
        value: object = event.pdu
        for name in names:
            value = value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
        return value

    return get


def never(event: Event, room: Room, user_id: str) -> bool:
    """What is not understood matches nothing."""
    return False


def prepare_event_match(condition: Json) -> PushCondition:
    """A glob on the whole of a string property; in content.body on parts between boundaries."""
    key, pattern = condition.get("key", ""), condition.get("pattern")
    get = property_getter(key)
    if pattern is None:
        return never
    if pattern == OWN_USER_ID:
        return lambda event, room, user_id: get(event) == user_id
    matches = glob(pattern, words=key == "content.body")
    return lambda event, room, user_id: isinstance(value := get(event), str) and matches(value)


def prepare_property(condition: Json) -> PushCondition:
    """A property, or a member of a list, equal to a scalar; in JSON, true is not 1."""
    get, wanted = property_getter(condition.get("key", "")), condition.get("value", ABSENT)
    kind = type(wanted)
    if kind not in SCALARS:
        return never

    def equal(value: object) -> bool:
        return type(value) is kind and value == wanted

    def contains(event: Event, room: Room, user_id: str) -> bool:
        values = get(event)
        if not isinstance(values, list):
            return False
        return user_id in values if wanted == OWN_USER_ID else any(map(equal, values))

    if condition["kind"] == "event_property_contains":
        return contains
    return lambda event, room, user_id: equal(get(event))


def prepare_display_name(_condition: Json) -> PushCondition:
    """The owner's display name in this room, as words of the body."""

    def holds(event: Event, room: Room, user_id: str) -> bool:
        member, body = room.state_event("m.room.member", user_id), event.content.get("body")
        name = member.content.get("displayname") if member else None
        if not isinstance(name, str) or not name or not isinstance(body, str):
            return False
        return glob(name, words=True, wildcards=False)(body)

    return holds


def prepare_member_count(condition: Json) -> PushCondition:
    """How many have joined, compared with a number."""
    parts = MEMBER_COUNT.fullmatch(condition.get("is", ""))
    if parts is None:
        return never
    compare, count = COMPARISONS[parts[1]], int(parts[2])
    return lambda event, room, user_id: compare(room.joined_count, count)


def prepare_sender_permission(condition: Json) -> PushCondition:
    """Whether the sender has the power to notify everybody."""
    key = condition.get("key", "")
    return lambda event, room, user_id: (
        room.power_levels().user(event.sender) >= room.power_levels().notification(key)
    )


def prepare_thread_subscription(condition: Json) -> PushCondition:
    """Whether the event is in a thread that the owner has, or has not, subscribed to.

    Trap: it never holds for who never subscribed to anything. They use clients that know nothing of
    subscriptions, and would hear of no thread any more.
    """
    wanted = condition.get("subscribed")
    return lambda event, room, user_id: follows_thread(room.store, event, user_id) is wanted


PUSH_CONDITIONS: Final[dict[str, Callable[[Json], PushCondition]]] = {
    "event_match": prepare_event_match,
    "event_property_is": prepare_property,
    "event_property_contains": prepare_property,
    "contains_display_name": prepare_display_name,
    "room_member_count": prepare_member_count,
    "sender_notification_permission": prepare_sender_permission,
    FOLLOWS_THREAD: prepare_thread_subscription,
}


def prepare_condition(condition: Json) -> PushCondition:
    """Make a condition ready to be asked; one that is unknown or incomplete never holds."""
    prepare = PUSH_CONDITIONS.get(condition["kind"])
    return prepare(condition) if prepare else never


# ── 18.4  Prepared rules ─────────────────────────────────────────────────────

COMPARED_MEMBERS: Final = {"event_match": "pattern", "event_property_is": "value"}


def conditions_of(kind: str, rule: Json) -> list[Json]:
    """The conditions of a rule, spelled out for the kinds in which they go without saying."""
    if kind == "content":
        return [event_match("content.body", rule["pattern"])]
    if kind in ("room", "sender"):
        return [property_is("room_id" if kind == "room" else "sender", rule["rule_id"])]
    return cast("list[Json]", rule["conditions"])


def only_value(conditions: list[Json], key: str) -> str | None:
    """The one value, in lower case, with which a property can meet the conditions, or None."""
    for condition in conditions:
        member = COMPARED_MEMBERS.get(condition["kind"], "")
        value = condition.get(member) if condition.get("key") == key else None
        if isinstance(value, str) and not WILDCARD.search(value):
            return value.lower()
    return None


class PushRule:
    """One rule, ready to be asked; by `only_type` and `only_room` most events are ruled out."""

    def __init__(self, kind: str, rule: Json) -> None:
        conditions = conditions_of(kind, rule)
        self.rule_id: str = rule["rule_id"]
        self.conditions = [prepare_condition(condition) for condition in conditions]
        self.actions: list[Any] = rule["actions"]
        self.notify = NOTIFY in self.actions
        tweaks = (action for action in self.actions if isinstance(action, dict))
        self.highlight = any(
            t["set_tweak"] == "highlight" and t.get("value") is not False for t in tweaks
        )
        self.only_type = only_value(conditions, "type")
        self.only_room = only_value(conditions, "room_id")


def personal_rule(rule: Json, user_id: str) -> Json:
    """The rule with its owner's id where the predefined text leaves a place for it."""
    if not rule["default"]:
        return rule
    conditions = [
        {name: user_id if value == OWN_USER_ID else value for name, value in condition.items()}
        for condition in rule["conditions"]
    ]
    return {**rule, "conditions": conditions}


class PushRuleset:
    """All rules of a user: as stored, as clients see them, and prepared."""

    def __init__(self, pos: int, stored: Json) -> None:
        self.pos = pos
        self.stored = stored
        listed = ((kind, rule) for kind in PUSH_KINDS for rule in self.listed(kind))
        self._rules = [PushRule(kind, rule) for kind, rule in listed if rule["enabled"]]

    def listed(self, kind: str) -> list[Json]:
        """The rules of a kind, the weightiest first."""
        changes = self.stored.get("default", {})
        defaults = [{**rule, **changes.get(rule["rule_id"], {})} for rule in DEFAULT_RULES[kind]]
        own = [{"default": False, **rule} for rule in self.stored.get(kind, ())]
        first = 1 if kind == "override" else 0  # .m.rule.master outweighs all others
        return [*defaults[:first], *own, *defaults[first:]]

    def to_json(self, user_id: str) -> Json:
        """All rules in the form of the API."""
        return {k: [personal_rule(r, user_id) for r in self.listed(k)] for k in PUSH_KINDS}

    def match(self, event: Event, room: Room, user_id: str) -> PushRule | None:
        """The weightiest rule that fits the event, or None."""
        event_type, room_id = event.type.lower(), event.room_id.lower()
        for rule in self._rules:
            if rule.only_type not in (None, event_type) or rule.only_room not in (None, room_id):
                continue
            for condition in rule.conditions:
                if not condition(event, room, user_id):
                    break
            else:
                return rule
        return None


DEFAULT_RULESET: Final = PushRuleset(0, {})

# ── 18.5  The rules of each user ─────────────────────────────────────────────

MAX_RULES = 262_144  # characters, as JSON
MAX_PATTERNS = 4096  # characters; each can cost a pass over a long body, while everybody waits


def check_rules_cost(stored: Json) -> None:
    """Refuse rules that would make each event expensive."""
    if len(json.dumps(stored)) > MAX_RULES:
        raise too_large("These are too many push rules")
    rules = ((kind, rule) for kind in PUSH_KINDS for rule in stored.get(kind, ()))
    conditions = (c for kind, rule in rules for c in conditions_of(kind, rule) if "pattern" in c)
    searched = sum(
        len(c["pattern"])
        for c in conditions
        if c.get("key") == "content.body" or WILDCARD.search(c["pattern"])
    )
    if searched > MAX_PATTERNS:
        raise invalid_param(f"All patterns may have {MAX_PATTERNS} characters at most")


class PushRules:
    """The rulesets of local users; all who never changed anything share one."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        capacity = int(1000 * hs.config.conduit_cache_capacity_modifier)
        self._rulesets: LruCache[UserNid, PushRuleset] = LruCache(capacity)
        hs.db.on_reset(self._rulesets.clear)
        hs.account_data.add_source("m.push_rules", self.content)
        hs.accounts.on_deactivated(self._delete)

    def of(self, user_nid: UserNid) -> PushRuleset:
        """The ruleset of a user."""
        ruleset = self._rulesets.get(user_nid)
        if ruleset is None:
            sql = "SELECT pos, rules FROM push_rules WHERE user_nid = ?"
            row = self.hs.db.one(sql, (user_nid,))
            ruleset = PushRuleset(row[0], json.loads(row[1])) if row else DEFAULT_RULESET
            self._rulesets.put(user_nid, ruleset)
        return ruleset

    @contextlib.contextmanager
    def edit(self, user_nid: UserNid) -> Iterator[Json]:
        """The stored rules, to be changed; then they are kept and the user's devices told."""
        stored = json.loads(json.dumps(self.of(user_nid).stored))
        yield stored
        check_rules_cost(stored)
        with self.hs.db.write():
            row = (user_nid, self.hs.stream.stamp(ACCOUNT_DATA, user_nid), json.dumps(stored))
            self.hs.db.execute("INSERT OR REPLACE INTO push_rules VALUES (?, ?, ?)", row)
        self._rulesets.pop(user_nid)

    def content(self, user_nid: UserNid) -> Json:
        """The content of the user's m.push_rules event."""
        return {"global": self.of(user_nid).to_json(self.hs.db.user_id(user_nid))}

    def _delete(self, user_nid: UserNid) -> None:
        self.hs.db.execute("DELETE FROM push_rules WHERE user_nid = ?", (user_nid,))
        self._rulesets.pop(user_nid)


def push_rules_account_data(hs: Homeserver, user_nid: UserNid, since: int = 0) -> Json | None:
    """The m.push_rules event if the rules changed after a position, or at all."""
    if since and hs.push_rules.of(user_nid).pos <= since:
        return None
    return {"type": "m.push_rules", "content": hs.push_rules.content(user_nid)}


# ── 18.6  Settings that follow an upgrade ────────────────────────────────────


def inherit_push_rule(hs: Homeserver, user_nid: UserNid, old: Room, new: Room) -> None:
    """Let the user's room rule for a room hold for its replacement, if that has none yet."""
    rules = {rule["rule_id"]: rule for rule in hs.push_rules.of(user_nid).stored.get("room", ())}
    if old.room_id in rules and new.room_id not in rules:
        with hs.push_rules.edit(user_nid) as stored:
            stored["room"].insert(0, {**rules[old.room_id], "rule_id": new.room_id})


def inherit_account_data(hs: Homeserver, user_nid: UserNid, old: Room, new: Room) -> None:
    """Give the replacement of a room the user's tags, and its place among the direct chats."""
    tags = tags_of(hs, user_nid, old.nid)
    if tags and hs.account_data.get(user_nid, new.nid, "m.tag") is None:
        hs.account_data.put(user_nid, new.nid, "m.tag", {"tags": tags})
    direct = hs.account_data.get(user_nid, NO_ROOM, "m.direct") or {}
    changed = {
        person: [*rooms, new.room_id]
        for person, rooms in direct.items()
        if isinstance(rooms, list) and old.room_id in rooms and new.room_id not in rooms
    }
    if changed:
        hs.account_data.put(user_nid, NO_ROOM, "m.direct", {**direct, **changed})


def inherit_settings(hs: Homeserver, user_nid: UserNid, old: Room, new: Room) -> None:
    """Carry the personal settings of a room over; what is too large to fit stays behind."""
    with contextlib.suppress(MatrixError):
        inherit_push_rule(hs, user_nid, old, new)
        inherit_account_data(hs, user_nid, old, new)


def replacement_of(hs: Homeserver, room: Room) -> Room | None:
    """The room that the tombstone of a room names, if that room says the same, and is known.

    Trap: anyone can make a room that claims to be the successor of another.
    """
    new = hs.rooms.find(room.setting(TOMBSTONE_KEY[0], "replacement_room", ""))
    claimed = object_in(new.content(CREATE), "predecessor") if new is not None else {}
    return new if claimed.get("room_id") == room.room_id else None


def follow_into_replacement(
    hs: Homeserver, room: Room, user_nid: UserNid, old: str | None, new: str
) -> None:
    """Subscriber of the room store: a local user who joins a replacement finds their settings."""
    if new != "join" or old == "join" or user_nid not in room.local_joined:
        return
    former_id = object_in(room.content(CREATE), "predecessor").get("room_id")
    former = hs.rooms.find(former_id) if isinstance(former_id, str) else None
    if former is not None and replacement_of(hs, former) is room:
        inherit_settings(hs, user_nid, former, room)


def follow_tombstone(hs: Homeserver, room: Room, event: Event) -> None:
    """Subscriber of the room store: the same for those who are in the replacement already."""
    new = replacement_of(hs, room) if event.key == TOMBSTONE_KEY else None
    if new is not None:
        for user_nid in room.local_joined & new.local_joined:
            inherit_settings(hs, user_nid, room, new)


# ── 18.7  The push rule endpoints ────────────────────────────────────────────

OBSOLETE_ACTIONS = ("dont_notify", "coalesce")
PUSH_RULES_PATH = "/_matrix/client/v3/pushrules"
PUSH_RULE_PATH = "/_matrix/client/v3/pushrules/global/{kind}/{rule_id}"
PUSH_RULE_SHAPE: Final = {
    "actions": [ANY],
    "conditions?": [{"kind": str, "key?": str, "pattern?": str, "is?": str}],
    "pattern?": str,
}


@route("GET", f"{PUSH_RULES_PATH}/", auth=USER, also=(PUSH_RULES_PATH,))
@route("GET", f"{PUSH_RULES_PATH}/global/", auth=USER, also=(f"{PUSH_RULES_PATH}/global",))
async def get_push_rules(hs: Homeserver, request: Request) -> Json:
    """All rules, by kind; "global" is the only scope there is."""
    content = hs.push_rules.content(request.user.nid)
    return content["global"] if "global" in request.segments else content


def check_push_kind(kind: str) -> None:
    """400 for a kind of rule that does not exist."""
    if kind not in PUSH_KINDS:
        raise invalid_param(f"The kind of a push rule is one of {', '.join(PUSH_KINDS)}")


def require_rule(hs: Homeserver, request: Request, kind: str, rule_id: str) -> Json:
    """The rule that a path names, or 404."""
    check_push_kind(kind)
    for rule in hs.push_rules.of(request.user.nid).listed(kind):
        if rule["rule_id"] == rule_id:
            return rule
    raise not_found("There is no such push rule")


@route("GET", PUSH_RULE_PATH, auth=USER)
async def get_push_rule(hs: Homeserver, request: Request, kind: str, rule_id: str) -> Json:
    """One rule."""
    return personal_rule(require_rule(hs, request, kind, rule_id), request.user.user_id)


def parse_actions(actions: list[Any]) -> list[Any]:
    """Actions as stored: those of old are dropped, unknown ones kept.  Spec: "Actions"."""
    for action in actions:
        tweak = action.get("set_tweak") if isinstance(action, dict) else action
        if not isinstance(tweak, str):
            raise bad_json('An action is a string or an object with "set_tweak"')
    return [action for action in actions if action not in OBSOLETE_ACTIONS]


def parse_push_rule(kind: str, rule_id: str, body: Json) -> Json:
    """The rule in a request, with those members only that its kind has."""
    check_push_kind(kind)
    if not re.fullmatch(r"[^./\\][^/\\]*", rule_id) or byte_length(rule_id) > MAX_ID_BYTES:
        raise invalid_param("A rule id has no dot in front, no slash, and at most 255 bytes")
    if not rule_id.startswith({"room": "!", "sender": "@"}.get(kind, "")):
        raise invalid_param("The id of a room or sender rule is the id of that room or user")
    if kind == "postcontent":
        raise invalid_param("Nobody can add rules of this kind")
    rule: Json = {"rule_id": rule_id, "enabled": True, "actions": parse_actions(body["actions"])}
    if kind == "content" and "pattern" not in body:
        raise missing_param("A content rule needs a pattern")
    if kind == "content":
        rule["pattern"] = body["pattern"]
    elif kind in ("override", "underride"):
        rule["conditions"] = body.get("conditions", [])
    return rule


def place_rule(rules: list[Json], rule: Json, before: str | None, after: str | None) -> None:
    """Put a rule where `before` or `after` says; else where it was, or first if it is new."""
    ids = [other["rule_id"] for other in rules]
    index = 0
    if rule["rule_id"] in ids:
        index = ids.index(rule["rule_id"])
        rule["enabled"] = rules.pop(index)["enabled"]
        ids.pop(index)
    beside = before or after
    if beside is not None:
        if beside not in ids:
            raise MatrixError(400, "M_UNKNOWN", f"before/after rule not found: {beside}")
        index = ids.index(beside) + (0 if before else 1)
    rules.insert(index, rule)


@route("PUT", PUSH_RULE_PATH, auth=USER, body=PUSH_RULE_SHAPE)
async def put_push_rule(hs: Homeserver, request: Request, kind: str, rule_id: str) -> Json:
    """Make or change a rule of the user's own; 400 if `before` or `after` names none."""
    rule = parse_push_rule(kind, rule_id, request.json)
    with hs.push_rules.edit(request.user.nid) as stored:
        rules = stored.setdefault(kind, [])
        place_rule(rules, rule, request.arg("before"), request.arg("after"))
    return {}


@route("DELETE", PUSH_RULE_PATH, auth=USER)
async def delete_push_rule(hs: Homeserver, request: Request, kind: str, rule_id: str) -> Json:
    """Delete a rule of the user's own; 400 for a predefined one, which can only be switched off."""
    if require_rule(hs, request, kind, rule_id)["default"]:
        raise invalid_param("Predefined rules cannot be deleted, only disabled")
    with hs.push_rules.edit(request.user.nid) as stored:
        stored[kind] = [rule for rule in stored[kind] if rule["rule_id"] != rule_id]
    return {}


@route("GET", f"{PUSH_RULE_PATH}/enabled", auth=USER)
@route("GET", f"{PUSH_RULE_PATH}/actions", auth=USER)
async def get_push_rule_member(hs: Homeserver, request: Request, kind: str, rule_id: str) -> Json:
    """Whether a rule is in force, or what it does."""
    member = request.segments[-1]
    return {member: require_rule(hs, request, kind, rule_id)[member]}


@route("PUT", f"{PUSH_RULE_PATH}/enabled", auth=USER, body={"enabled": bool})
@route("PUT", f"{PUSH_RULE_PATH}/actions", auth=USER, body={"actions": [ANY]})
async def put_push_rule_member(hs: Homeserver, request: Request, kind: str, rule_id: str) -> Json:
    """Switch a rule on or off, or change what it does; of a predefined one the change is stored."""
    member = request.segments[-1]
    value = request.json[member]
    change = {member: parse_actions(value) if member == "actions" else value}
    default = require_rule(hs, request, kind, rule_id)["default"]
    with hs.push_rules.edit(request.user.nid) as stored:
        if default:
            stored.setdefault("default", {}).setdefault(rule_id, {}).update(change)
        else:
            next(rule for rule in stored[kind] if rule["rule_id"] == rule_id).update(change)
    return {}


# ── 18.8  Unread counts ──────────────────────────────────────────────────────

MAX_CONSIDERED = 500  # events looked at in one go, and marks kept: a badge need not count further
SAVE_AFTER = 50  # events considered before a row is worth writing
MAX_SAVED = 200  # rows written in one go
CACHED_MARKS = 200_000
ROOM_WEIGHT = 10  # what a room takes in memory, in marks


class UnreadCounts(NamedTuple):
    """What a sync says about a room: the main timeline's counts, then those of threads by root."""

    notification_count: int
    highlight_count: int
    threads: dict[str, tuple[int, int]]


@dataclass(slots=True)
class UnreadRoom:
    """What one user has not read in one room: a mark for each event that notified.

    A mark is the event's stream position, doubled, and one more if the event highlights.
    Reading only ever removes marks, and every event considered later lies behind the receipt. So
    receipts need not be remembered here, and nothing is ever counted anew.
    """

    key: tuple[int, int]  # (room nid, user nid)
    upto: int
    marks: dict[str, list[int]]  # by thread, ascending
    unsaved: int = 0  # events considered since the row was written
    ignored: frozenset[str] = frozenset()  # whose marks were taken out

    def counts(self) -> UnreadCounts:
        """The marks, counted."""
        threads = {t: (len(marks), sum(m % 2 for m in marks)) for t, marks in self.marks.items()}
        return UnreadCounts(*threads.pop(MAIN_THREAD, (0, 0)), threads)

    def positions(self) -> list[int]:
        """Where the marks are."""
        return [mark // 2 for marks in self.marks.values() for mark in marks]

    def keep(self, wanted: Callable[[int, str], bool]) -> bool:
        """Keep only the marks whose position and thread are wanted; whether any went."""
        before = self.marks
        kept = {t: [m for m in marks if wanted(m // 2, t)] for t, marks in before.items()}
        self.marks = {thread: marks for thread, marks in kept.items() if marks}
        return self.marks != before

    def read(self, pos: int, thread: str | None) -> bool:
        """Forget what is read up to a position, of one thread or (None) of all; whether any was."""
        return self.keep(lambda p, t: p > pos or thread not in (None, t))


class Unread:
    """The unread rooms of local users: in memory as they are asked for, and a row each.

    A row is written with each receipt that changes something, and by `save` for those that moved
    on a good deal; before, the count begins with the join. A row that lags behind costs time only.
    """

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        capacity = int(CACHED_MARKS * hs.config.conduit_cache_capacity_modifier)
        self._rooms: LruCache[tuple[int, int], UnreadRoom] = LruCache(capacity)
        self._last: tuple[tuple[int, ...], list[Event]] = ((), [])
        self._readers: list[Callable[[UserNid], None]] = []
        self.on_read = self._readers.append  # called when a receipt took marks away
        hs.db.on_reset(self._reset)
        hs.rooms.subscribe_membership(self._membership_changed)

    def room(self, user_nid: UserNid, room: Room) -> UnreadRoom:
        """What a user has not read, brought up to date with the room."""
        unread = self._rooms.get((room.nid, user_nid)) or self._load(user_nid, room)
        ignored = ignored_users(self.hs, user_nid)
        if ignored is not unread.ignored:
            self._drop_ignored(unread, ignored)
        if unread.upto < room.last_pos:
            self._advance(unread, user_nid, room)
        return unread

    def mark_read(self, user_nid: UserNid, room: Room, pos: int, thread: str | None) -> None:
        """A receipt of a joined user: all up to a position is read.  Inside a write block."""
        unread = self.room(user_nid, room)
        # Trap: without a row, a restart would judge what was read by the rules of that later day.
        was_unread = unread.read(pos, thread)
        if was_unread or unread.unsaved:
            self._write(unread)
        for callback in self._readers if was_unread else ():
            callback(user_nid)

    def save(self) -> None:
        """Write the rows that lag far behind: maintenance does it each minute and at the end."""
        lagging = (unread for unread in self._rooms.values() if unread.unsaved > SAVE_AFTER)
        with self.hs.db.write():
            for unread in itertools.islice(lagging, MAX_SAVED):
                self._write(unread)

    def _load(self, user_nid: UserNid, room: Room) -> UnreadRoom:
        key, db = (room.nid, user_nid), self.hs.db
        joined = self.hs.rooms.memberships(user_nid)[room.nid].join_pos
        row = db.one("SELECT upto, marks FROM unread WHERE room_nid = ? AND user_nid = ?", key)
        upto, marks = row or (joined, "{}")
        unread = UnreadRoom(key, upto, json.loads(marks))
        self._rooms.put(key, unread, ROOM_WEIGHT + len(unread.positions()))
        return unread

    def _advance(self, unread: UnreadRoom, user_nid: UserNid, room: Room) -> None:
        window = (room.nid, unread.upto, room.last_pos)
        if window != self._last[0]:  # else somebody just asked for the same events
            self._last = (window, self.hs.rooms.events_between(room, *window[1:], MAX_CONSIDERED))
        events = self._last[1]
        rules, user_id = self.hs.push_rules.of(user_nid), self.hs.db.user_id(user_nid)
        for event in events:
            self._consider(unread, event, room, user_id, rules)
        positions = unread.positions()
        if len(positions) > MAX_CONSIDERED:
            oldest = sorted(positions)[-MAX_CONSIDERED]
            unread.keep(lambda pos, _: pos >= oldest)
        unread.upto = room.last_pos
        unread.unsaved += len(events)
        self._rooms.put(unread.key, unread, ROOM_WEIGHT + len(positions))

    def _consider(
        self, unread: UnreadRoom, event: Event, room: Room, user_id: str, rules: PushRuleset
    ) -> None:
        pos = cast(int, event.pos)
        target = self.hs.rooms.event(event.redacts) if event.redacts and unread.marks else None
        if target is not None and target.redacted_by:
            unread.keep(lambda pos, _: pos != target.pos)
        if event.sender == user_id:
            # Who sends has read; but a new display name, sent to all rooms at once, reads nothing.
            if not event.is_state:
                unread.read(pos, thread_of(self.hs, event))
            return
        if event.redacted_by or event.sender in unread.ignored:
            return
        rule = rules.match(event, room, user_id)
        if rule is not None and rule.notify:
            marks = unread.marks.setdefault(thread_of(self.hs, event), [])
            marks.append(2 * pos + rule.highlight)

    def _drop_ignored(self, unread: UnreadRoom, ignored: frozenset[str]) -> None:
        """Take out the marks of users ignored meanwhile: no receipt could ever reach them."""
        if unread.marks and ignored - unread.ignored:
            # The nid of an event that came live is its position.
            events = self.hs.rooms.events_by_nids(map(EventNid, unread.positions()))
            gone = {event.pos for event in events if event.sender in ignored}
            unread.keep(lambda pos, _: pos not in gone)
        unread.ignored = ignored

    def _membership_changed(self, room: Room, user_nid: UserNid, old: str | None, new: str) -> None:
        """A departure ends the count; after another join it begins anew."""
        if old == "join" != new and self.hs.rooms.is_local(user_nid):
            key = (room.nid, user_nid)
            self._rooms.pop(key)
            self.hs.db.execute("DELETE FROM unread WHERE room_nid = ? AND user_nid = ?", key)

    def _write(self, unread: UnreadRoom) -> None:
        unread.unsaved = 0
        row = (*unread.key, unread.upto, json.dumps(unread.marks, separators=(",", ":")))
        self.hs.db.execute("INSERT OR REPLACE INTO unread VALUES (?, ?, ?, ?)", row)

    def _reset(self) -> None:
        self._rooms.clear()
        self._last = ((), [])


def unread_counts(hs: Homeserver, user_nid: UserNid, room: Room) -> UnreadCounts:
    """How much a user has not read in a room; nothing where the user is not joined."""
    if user_nid not in room.local_joined:
        return UnreadCounts(0, 0, {})
    return hs.unread.room(user_nid, room).counts()


# ═════════════════════════════════════════════════════════════════════════════
#  42. THREADS AND DAYS
#
#  Ways to find events other than by scrolling: by what they relate to, by the
#  threads of a room, by the day.   spec: CS-API "Relationships API", "Threading",
#  "Jumping to a point in a room's history"; MSC4306
# ═════════════════════════════════════════════════════════════════════════════

ROOM_V1 = "/_matrix/client/v1/rooms/{room_id}"

# ── 42.1  What relates to an event ───────────────────────────────────────────

MAX_RECURSION = 3  # how far what relates to it indirectly may be away
MAX_RELATED = 5_000  # events found that way
RELATED_NEWEST = """
    SELECT nid
    FROM relations
    WHERE room_nid = :room
      AND parent_id = :parent
      AND pos > :low
      AND pos <= :high
      AND (:kind IS NULL OR rel_type = :kind)
    ORDER BY pos DESC
    LIMIT :size
"""
RELATED_OLDEST = """
    SELECT nid
    FROM relations
    WHERE room_nid = :room
      AND parent_id = :parent
      AND pos > :low
      AND pos <= :high
      AND (:kind IS NULL OR rel_type = :kind)
    ORDER BY pos ASC
    LIMIT :size
"""


def read_related(hs: Homeserver, parent: Event, kind: str | None, backwards: bool) -> Reading:
    """A way to read what relates to an event, by position."""
    sql = RELATED_NEWEST if backwards else RELATED_OLDEST
    place = {"room": parent.room_nid, "parent": parent.event_id, "kind": kind}

    def read(low: int, high: int, size: int) -> list[Event]:
        rows = hs.db.all(sql, {**place, "low": low, "high": high, "size": size})
        nids = [row[0] for row in rows]
        return hs.rooms.events_by_nids(reversed(nids) if backwards else nids)

    return read


def descendants(hs: Homeserver, parent: Event, kind: str | None) -> list[tuple[int, EventNid]]:
    """Position and nid of what relates to an event directly or indirectly, in order.

    Of a thread of many thousands only the newest part is found; every level costs one query.
    """
    found: list[tuple[int, EventNid]] = []
    level, room_left = [parent.event_id], MAX_RELATED
    for _ in range(MAX_RECURSION):
        rows = hs.db.all(
            """
            SELECT relations.pos, relations.nid, rel_type, event_id
            FROM json_each(:parents)
            JOIN relations ON relations.room_nid = :room AND parent_id = value
            JOIN events ON events.nid = relations.nid
            ORDER BY relations.pos DESC
            LIMIT :limit
            """,
            {"parents": json.dumps(level), "room": parent.room_nid, "limit": room_left},
        )
        level, room_left = [row[3] for row in rows], room_left - len(rows)
        found += [(pos, nid) for pos, nid, rel_type, _ in rows if kind in (None, rel_type)]
    return sorted(set(found))


def read_descendants(hs: Homeserver, parent: Event, kind: str | None, backwards: bool) -> Reading:
    """A way to read what relates to an event directly or indirectly."""
    found = descendants(hs, parent, kind)

    def read(low: int, high: int, size: int) -> list[Event]:
        first, last = (bisect.bisect_right(found, (end, MAX_POSITION)) for end in (low, high))
        part = found[max(first, last - size) : last] if backwards else found[first:last][:size]
        return hs.rooms.events_by_nids(nid for _, nid in part)

    return read


RELATIONS_PATH = ROOM_V1 + "/relations/{event_id}"


@route("GET", RELATIONS_PATH, auth=GUEST)
@route("GET", RELATIONS_PATH + "/{rel_type}", auth=GUEST)
@route("GET", RELATIONS_PATH + "/{rel_type}/{event_type}", auth=GUEST)
async def get_relations(
    hs: Homeserver,
    request: Request,
    room_id: str,
    event_id: str,
    rel_type: str | None = None,
    event_type: str | None = None,
) -> Json:
    """What relates to an event, the newest first unless `dir` is f; with `recurse` indirectly too.

    Spec: CS-API "Relationships API".  404 for an event that is not there or not to be seen.
    """
    room, parent = visible_event(hs, request, room_id, event_id, of_ignored=True)
    start, span, backwards = page_span(request, room, "b")
    recurse = request.bool_arg("recurse", False)
    limit = request.int_arg("limit", DEFAULT_PAGE, 1, MAX_PAGE)

    def keep(events: list[Event]) -> list[Event]:
        events = [event for event in events if event_type in (None, event.type)]
        return hs.rooms.visible(request.user.nid, room, events)

    reading = (read_descendants if recurse else read_related)(hs, parent, rel_type, backwards)
    page = collect(reading, keep, span, limit, backwards=backwards)
    answer: Json = {"chunk": as_clients(hs, request, page.events)}
    if page.more:
        answer["next_batch"] = stream_token(page.end)
    if request.arg("from"):
        answer["prev_batch"] = stream_token(start)
    if request.arg("recurse") is not None:
        answer["recursion_depth"] = MAX_RECURSION if recurse else 1
    return answer


# ── 42.2  The threads of a room ──────────────────────────────────────────────

MAX_THREAD_SCANS = 20  # pages of threads looked at for one answer


def thread_page(hs: Homeserver, viewer: Viewer, before: int, limit: int) -> list[tuple[str, int]]:
    """Thread roots and positions of their newest replies, but for those of ignored users."""
    find = hs.db.find_user_nid
    ignored = [nid for nid in map(find, viewer.ignored) if nid is not None]
    return hs.db.all(
        """
        SELECT root_id, latest
        FROM threads AS newest
        WHERE room_nid = :room
          AND latest < :before
          AND sender_nid NOT IN (SELECT value FROM json_each(:ignored))
          AND NOT EXISTS (
            SELECT 1
            FROM threads AS other
            WHERE other.room_nid = :room
              AND other.root_id = newest.root_id
              AND other.latest > newest.latest
              AND other.sender_nid NOT IN (SELECT value FROM json_each(:ignored)))
        ORDER BY latest DESC
        LIMIT :limit
        """,
        {
            "room": viewer.room.nid,
            "before": before,
            "ignored": json.dumps(ignored),
            "limit": limit,
        },
    )


def thread_roots(
    hs: Homeserver, request: Request, room: Room, roots: Sequence[str], participated: bool
) -> list[Json]:
    """Those of the roots that the user may see, in the client format; of ignored users, redacted.

    Spec: CS-API "Querying threads in a room".
    """
    viewer = Viewer(hs.rooms, room, request.user.nid)
    found = (hs.rooms.event(root_id) for root_id in roots)
    events = [one for one in found if one and one.room_nid == room.nid and viewer.has_access(one)]
    events = [viewer.without_erased(one) for one in events]
    shown = []
    for event, one in zip(events, as_clients(hs, request, events), strict=True):
        thread = one["unsigned"].get("m.relations", {}).get(THREAD)
        if thread is None or (participated and not thread["current_user_participated"]):
            continue
        if event.sender in viewer.ignored:
            one["content"] = redact(room.version, event.pdu)["content"]
        shown.append(one)
    return shown


@route("GET", ROOM_V1 + "/threads", auth=GUEST)
async def get_threads(hs: Homeserver, request: Request, room_id: str) -> Json:
    """The threads of a room, the one with the newest reply first.

    Spec: CS-API "Querying threads in a room".
    """
    room = viewable_room(hs, request, room_id)
    include = request.arg("include", "all")
    if include not in {"all", "participated"}:
        raise invalid_param("include is all or participated")
    limit = request.int_arg("limit", DEFAULT_PAGE, 1, 100)
    token = request.arg("from")
    before = parse_token(token) if token else MAX_POSITION
    viewer = Viewer(hs.rooms, room, request.user.nid)
    chunk: list[Json] = []
    for _ in range(MAX_THREAD_SCANS):
        wanted = limit - len(chunk)
        rows = thread_page(hs, viewer, before, wanted)
        roots = [row[0] for row in rows]
        chunk += thread_roots(hs, request, room, roots, include == "participated")
        before = rows[-1][1] if rows else before
        if len(rows) < wanted:
            return {"chunk": chunk}
        if len(chunk) == limit:
            break
        await asyncio.sleep(0)
    return {"chunk": chunk, "next_batch": stream_token(before)}


# ── 42.3  Subscriptions to threads ───────────────────────────────────────────

MSC4306 = "/_matrix/client/unstable/io.element.msc4306"
SUBSCRIPTION_PATH = MSC4306 + "/rooms/{room_id}/thread/{root_id}/subscription"


def check_cause(hs: Homeserver, room: Room, root: Event, cause_id: str, ended: int) -> None:
    """Refuse a subscription caused by what is not in the thread, or was known when one ended it.

    Spec: MSC4306 "Server-side automatic subscription ordering".
    """
    cause = hs.rooms.event(cause_id)
    is_there = cause is not None and cause.room_nid == room.nid
    if cause is None or not is_there or thread_root(hs.rooms, cause) != root.event_id:
        raise MatrixError(400, "IO.ELEMENT.MSC4306.M_NOT_IN_THREAD", "That is not in the thread")
    if (cause.pos or 0) < ended:
        raise MatrixError(
            409, "IO.ELEMENT.MSC4306.M_CONFLICTING_UNSUBSCRIPTION", "Unsubscribed after that"
        )


@route("PUT", SUBSCRIPTION_PATH, auth=USER, body={"automatic?": str})
async def put_subscription(hs: Homeserver, request: Request, room_id: str, root_id: str) -> Json:
    """Follow a thread; what is done by hand goes before what a client does by itself.  MSC4306."""
    room, root = visible_event(hs, request, room_id, root_id, of_ignored=True)
    state, since = hs.threads.subscription(request.user.nid, room.nid, root_id)
    cause_id = request.json.get("automatic")
    if cause_id is not None:
        check_cause(hs, room, root, cause_id, since if state == "none" else 0)
    wanted = "manual" if cause_id is None else "automatic"
    if state == "none" or (state, wanted) == ("automatic", "manual"):
        hs.threads.subscribe(request.user.nid, room.nid, root_id, wanted)
    return {}


@route("GET", SUBSCRIPTION_PATH, auth=USER)
async def get_subscription(hs: Homeserver, request: Request, room_id: str, root_id: str) -> Json:
    """Whether the subscription to a thread is automatic; 404 if there is none.  MSC4306."""
    room, _ = visible_event(hs, request, room_id, root_id, of_ignored=True)
    state, _ = hs.threads.subscription(request.user.nid, room.nid, root_id)
    if state == "none":
        raise not_found("You have not subscribed to this thread")
    return {"automatic": state == "automatic"}


@route("DELETE", SUBSCRIPTION_PATH, auth=USER)
async def delete_subscription(hs: Homeserver, request: Request, room_id: str, root_id: str) -> Json:
    """Follow a thread no more.  MSC4306."""
    room, _ = visible_event(hs, request, room_id, root_id, of_ignored=True)
    if hs.threads.subscription(request.user.nid, room.nid, root_id)[0] != "none":
        hs.threads.subscribe(request.user.nid, room.nid, root_id, "none")
    return {}


# ── 42.4  The event of a day ─────────────────────────────────────────────────

MSC3030_PATH = "/_matrix/client/unstable/org.matrix.msc3030/rooms/{room_id}/timestamp_to_event"
DAY_PAGE = 500
BY_TIME_LATER = """
    SELECT ts, pos, nid
    FROM events
    WHERE room_nid = ?
      AND pos IS NOT NULL
      AND (ts, pos) > (?, ?)
    ORDER BY ts ASC, pos ASC
    LIMIT ?
"""
BY_TIME_EARLIER = """
    SELECT ts, pos, nid
    FROM events
    WHERE room_nid = ?
      AND pos IS NOT NULL
      AND (ts, pos) < (?, ?)
    ORDER BY ts DESC, pos DESC
    LIMIT ?
"""


async def event_by_time(
    hs: Homeserver, room: Room, user_nid: UserNid | None, ts: int, *, backwards: bool
) -> Event | None:
    """The event nearest to a time, at or before it or at or after it, that the user may see.

    Trap: a long past that is hidden from the user must not end the search; others get their turn.
    """
    sql = BY_TIME_EARLIER if backwards else BY_TIME_LATER
    at = (ts, MAX_POSITION if backwards else MIN_POSITION)
    viewer = Viewer(hs.rooms, room, user_nid)
    size = 1
    while rows := hs.db.all(sql, (room.nid, *at, size)):
        events = hs.rooms.events_by_nids(row[2] for row in rows)
        found = next(filter(viewer.may_see, events), None)
        if found is not None:
            return found
        at, size = rows[-1][:2], DAY_PAGE
        await asyncio.sleep(0)
    return None


@route("GET", ROOM_V1 + "/timestamp_to_event", auth=GUEST, limit="search", also=(MSC3030_PATH,))
async def get_event_by_time(hs: Homeserver, request: Request, room_id: str) -> Json:
    """The event nearest to a time (`ts`, milliseconds) in a direction (`dir`).

    Spec: CS-API "Jumping to a point in a room's history".  404 when there is none.
    """
    room = viewable_room(hs, request, room_id)
    if request.arg("ts") is None or request.arg("dir") is None:
        raise missing_param("ts and dir are needed")
    if request.arg("dir") not in {"f", "b"}:
        raise invalid_param("dir is b or f")
    ts, backwards = request.int_arg("ts", 0, 0, MAX_POSITION), request.arg("dir") == "b"
    event = await event_by_time(hs, room, request.user.nid, ts, backwards=backwards)
    if event is None:
        raise not_found("There is no event in that direction")
    return {"event_id": event.event_id, "origin_server_ts": event.origin_server_ts}


# ═════════════════════════════════════════════════════════════════════════════
#  58. SEARCH
#
#  Full-text search in what a user may see. The index is written behind the events,
#  when somebody searches and once a minute, so that it costs a sender nothing; a
#  redaction or an edit is one more event on its way. Where SQLite has no FTS5, the
#  texts are read one by one.                    spec: CS-API "Server Side Search"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE search_texts (
    nid INTEGER PRIMARY KEY,      -- of the event
    room_nid INTEGER NOT NULL,
    pos INTEGER NOT NULL,
    key TEXT NOT NULL,
    source INTEGER NOT NULL,      -- the event whose text it is: itself, or its newest edit
    text TEXT NOT NULL
);
CREATE INDEX search_room ON search_texts (room_nid, pos);
CREATE INDEX search_source ON search_texts (source);
""")
invariant(
    "search texts of events that are not there",
    "SELECT nid FROM search_texts WHERE nid NOT IN (SELECT nid FROM events)",
)

# ── 58.1  The search index ───────────────────────────────────────────────────

SEARCH_BATCH = 200  # events taken into the index in one go
MAX_SEARCHED_TEXT = 20_000  # characters of one event
MAX_HITS = 2_000  # of one search
SEARCHED: Final = {
    "m.room.message": ("content.body", "body"),
    "m.room.name": ("content.name", "name"),
    "m.room.topic": ("content.topic", "topic"),
}  # by event type, the key of the API and the member of the content


def plain_topic(content: Json) -> str | None:
    """The plain text of an m.room.topic event: that in m.topic, or the old member."""
    rich = content.get("m.topic")
    texts = rich.get("m.text") if isinstance(rich, dict) else None
    for text in texts if isinstance(texts, list) else ():
        if isinstance(text, dict) and text.get("mimetype", "text/plain") == "text/plain":
            body = text.get("body")
            return body if isinstance(body, str) else None
    topic = content.get("topic")
    return topic if isinstance(topic, str) else None


def searched_text(hs: Homeserver, event: Event) -> tuple[str, EventNid, str] | None:
    """The key under which an event is found, the event that has its present text, and the text."""
    key, member = SEARCHED.get(event.type, ("", ""))
    if not key or event.pos is None or event.is_state != (event.type != "m.room.message"):
        return None
    if not is_accepted(event) or (relation_of(event) or ("",))[0] == REPLACE:
        return None
    edit = latest_edit(hs, event)
    content = event.content if edit is None else edit.content["m.new_content"]
    text = plain_topic(content) if member == "topic" else content.get(member)
    source = (edit or event).nid
    return (key, source, text[:MAX_SEARCHED_TEXT]) if isinstance(text, str) else None


class Search:
    """The index of what can be searched for."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self.db = hs.db
        modules = self.db.all("SELECT name FROM pragma_module_list WHERE name = 'fts5'")
        self.has_index = bool(modules)
        if self.has_index and self.db.meta("search_indexed") != self._upto():
            self._make_index()

    def _upto(self) -> int:
        """The nid up to which all events are in the table of texts."""
        return cast(int, self.db.meta("search_upto") or 0)

    def _make_index(self) -> None:
        """Make the full-text index from the texts: at the first start with a library that can."""
        with self.db.write():
            self.db.execute("DROP TABLE IF EXISTS search_index")
            self.db.execute(
                """
                CREATE VIRTUAL TABLE search_index USING fts5 (
                    text,
                    content = 'search_texts',
                    content_rowid = 'nid',
                    tokenize = 'unicode61 remove_diacritics 2'
                )
                """
            )
            self.db.execute("INSERT INTO search_index (search_index) VALUES ('rebuild')")
            self.db.set_meta("search_indexed", self._upto())

    async def catch_up(self) -> None:
        """Take in what has happened since the last time; others get a turn in between."""
        for _ in iter(self._take_in, False):
            await asyncio.sleep(0)

    def _take_in(self) -> bool:
        """Take in some events; whether there were any."""
        sql = "SELECT nid FROM events WHERE nid > ? ORDER BY nid LIMIT ?"
        nids = [row[0] for row in self.db.all(sql, (self._upto(), SEARCH_BATCH))]
        if not nids:
            return False
        with self.db.write():
            for event in self.hs.rooms.events_by_nids(nids):
                for changed in self._changed_by(event):
                    self._refresh(changed)
            self.db.set_meta("search_upto", nids[-1])
            if self.has_index:
                self.db.set_meta("search_indexed", nids[-1])
        return True

    def _changed_by(self, event: Event) -> list[Event]:
        """The events whose text is another since an event came: itself, or what it changes."""
        kind, parent_id = relation_of(event) or ("", "")
        if event.type != REDACTION and kind != REPLACE:
            return [event]
        target = self.hs.rooms.event(event.redacts or parent_id)
        if target is None or target.room_nid != event.room_nid:
            return []
        sql = "SELECT nid FROM search_texts WHERE source = ?"  # the text may have been an edit's
        edited = self.db.all(sql, (target.nid,))
        return [target, *self.hs.rooms.events_by_nids(row[0] for row in edited)]

    def _refresh(self, event: Event) -> None:
        """Make the index say of an event what is true now."""
        self._remove(event.nid)
        found = searched_text(self.hs, event)
        if found is None or self.hs.rooms.by_nid(event.room_nid).encrypted:
            return
        row = (event.nid, event.room_nid, event.pos, *found)
        self.db.execute("INSERT INTO search_texts VALUES (?, ?, ?, ?, ?, ?)", row)
        if self.has_index:
            sql = "INSERT INTO search_index (rowid, text) VALUES (?, ?)"
            self.db.execute(sql, (event.nid, found[2]))

    def _remove(self, nid: EventNid) -> None:
        """Take an event out. Trap: the index forgets a text only if it is told the text."""
        text = self.db.value("SELECT text FROM search_texts WHERE nid = ?", (nid,))
        if text is not None and self.has_index:
            sql = "INSERT INTO search_index (search_index, rowid, text) VALUES ('delete', ?, ?)"
            self.db.execute(sql, (nid, text))
        self.db.execute("DELETE FROM search_texts WHERE nid = ?", (nid,))

    def forget_events(self, _room: Room, nids: Iterable[EventNid]) -> None:
        """Take out events that are deleted; inside a write block."""
        for nid in nids:
            self._remove(nid)


# ── 58.2  Searching ──────────────────────────────────────────────────────────

SEARCH_BODY: Final[Json] = {
    "search_categories": {
        "room_events?": {
            "search_term": str,
            "keys?": [str],
            "filter?": ROOM_EVENT_FILTER,
            "order_by?": str,
            "event_context?": {
                **{"before_limit?": int, "after_limit?": int, "include_profile?": bool}
            },
            "include_state?": bool,
            "groupings?": {"group_by?": [{"key": str}]},
        }
    }
}
SEARCH_KEYS: Final = [key for key, _ in SEARCHED.values()]
GROUPS: Final[dict[str, Callable[[Event], str]]] = {
    "room_id": operator.attrgetter("room_id"),
    "sender": operator.attrgetter("sender"),
}
MAX_SEARCH_PAGE = 100
MAX_SEARCH_WORDS = 30
MAX_CONTEXT = 50
HITS = """
    SELECT search_texts.nid, -bm25(search_index)
    FROM search_index
    JOIN search_texts ON search_texts.nid = search_index.rowid
    WHERE search_index MATCH :match
      AND room_nid IN (SELECT value FROM json_each(:rooms))
      AND key IN (SELECT value FROM json_each(:keys))
      AND pos <= :upto
    ORDER BY iif(:recent, -pos, bm25(search_index)), pos DESC
    LIMIT :limit
"""
TEXTS = """
    SELECT nid, text
    FROM json_each(:rooms)
    JOIN search_texts ON room_nid = value AND pos <= :upto
    WHERE search_texts.key IN (SELECT value FROM json_each(:keys))
    ORDER BY pos DESC
"""


class SearchPlace(NamedTuple):
    """Where a search goes on: what a next_batch token says."""

    at: int  # how many hits were looked at
    upto: int  # what came later does not count, or the hits would move
    group: str = ""  # only hits of this group go on:
    value: str = ""

    def token(self) -> str:
        """The place as a token."""
        return b64url_encode(json.dumps(self).encode())


def search_place(hs: Homeserver, token: str | None) -> SearchPlace:
    """The place that a token stands for.  400 M_INVALID_PARAM for what is none."""
    if token is None:
        return SearchPlace(0, hs.stream.position)
    try:
        at, upto, group, value = json.loads(b64decode(token))
    except (ValueError, TypeError, RecursionError) as error:
        raise invalid_param("next_batch is not a token of this server") from error
    place = SearchPlace(at, upto, group, value)
    kinds = tuple(map(type, place))
    if kinds != (int, int, str, str) or at < 0 or abs(upto) > MAX_POSITION:
        raise invalid_param("next_batch is not a token of this server")
    return place


Hit = tuple[EventNid, float]


def hits_in_texts(rows: Iterable[tuple[EventNid, str]], words: list[str]) -> Iterator[Hit]:
    """The fallback without an index: the texts that have all words in them."""
    for nid, text in rows:
        folded = text.casefold()
        counts = [folded.count(word) for word in words]
        if all(counts):
            yield nid, float(sum(counts))


def find_hits(
    connection: sqlite3.Connection, words: list[str], sql: str, params: Json
) -> list[Hit]:
    """In a thread: the hits for words, each of which may be the beginning of a longer one."""
    if sql == TEXTS:
        hits = hits_in_texts(connection.execute(sql, params), words)
        return [*itertools.islice(hits, MAX_HITS)]
    match = " ".join(f'"{word}"*' for word in words)
    return connection.execute(sql, {**params, "match": match, "limit": MAX_HITS}).fetchall()


async def search_hits(
    hs: Homeserver, request: Request, wanted: Json, place: SearchPlace, words: list[str]
) -> list[Hit]:
    """All hits in rooms that the user is or was in, in the order asked for."""
    order, keys = wanted.get("order_by", "rank"), wanted.get("keys", SEARCH_KEYS)
    if order not in {"rank", "recent"}:
        raise invalid_param("order_by is rank or recent")
    if not set(keys) <= set(SEARCH_KEYS):
        raise invalid_param(f"The keys are {', '.join(SEARCH_KEYS)}")
    if not words:
        return []
    await hs.search.catch_up()
    await hs.db.synced()  # the thread sees what is committed
    mine = hs.rooms.memberships(request.user.nid).items()
    rooms = [nid for nid, one in mine if not one.forgotten and one.membership != "invite"]
    params: Json = {"rooms": json.dumps(rooms), "keys": json.dumps(keys), "upto": place.upto}
    params["recent"] = order == "recent"
    sql = HITS if hs.search.has_index else TEXTS
    hits = await hs.db.read_in_thread(lambda db: find_hits(db, words, sql, params))
    if sql == TEXTS and order == "rank":
        hits.sort(key=lambda hit: -hit[1])
    return hits


def chosen_events(
    hs: Homeserver, request: Request, events: list[Event], wanted: EventFilter, place: SearchPlace
) -> Iterator[Event]:
    """Those of the events that pass the filter and group, and that the user may see."""
    viewers: dict[RoomNid, Viewer] = {}
    for event in wanted.pick(events):
        room = hs.rooms.by_nid(event.room_nid)
        if room.encrypted or not wanted.wants_room(room.room_id):
            continue
        if place.group and GROUPS[place.group](event) != place.value:
            continue
        if wanted.wants_related and not related_to(
            hs, room, [event], wanted.related_types, wanted.related_senders
        ):
            continue
        if room.nid not in viewers:
            viewers[room.nid] = Viewer(hs.rooms, room, request.user.nid)
        if viewers[room.nid].may_read(event):
            yield event


def search_context(hs: Homeserver, request: Request, event: Event, wanted: Json) -> Json:
    """What stands around a hit."""
    room, pos, nid = hs.rooms.by_nid(event.room_nid), cast(int, event.pos), request.user.nid
    before_limit, after_limit = (
        min(MAX_CONTEXT, max(0, wanted.get(name, 5))) for name in ("before_limit", "after_limit")
    )
    past, future, every = (MIN_POSITION, pos - 1), (pos, room.last_pos), EventFilter({})
    before = read_page(hs, nid, room, past, every, before_limit, backwards=True)
    after = read_page(hs, nid, room, future, every, after_limit, backwards=False)
    context: Json = {
        "start": stream_token(before.end),
        "end": stream_token(after.end),
        "events_before": as_clients(hs, request, before.events),
        "events_after": as_clients(hs, request, after.events),
    }
    if wanted.get("include_profile"):
        members = senders_of(hs, [*before.events, event, *after.events])
        context["profile_info"] = {
            cast(str, member.state_key): {
                key: value
                for key in ("displayname", "avatar_url")
                if isinstance(value := member.content.get(key), str)
            }
            for member in members
        }
    return context


def search_groups(
    wanted: Json, events: Sequence[Event], rest: SearchPlace | None
) -> dict[str, dict[str, Json]]:
    """The results by room or by sender, as asked for."""
    groups: dict[str, dict[str, Json]] = {}
    for name in {one["key"] for one in wanted.get("groupings", {}).get("group_by", ())}:
        if name not in GROUPS:
            raise invalid_param("Results can be grouped by room_id and by sender")
        found = groups[name] = {}
        for event in events:
            value = GROUPS[name](event)
            group = found.setdefault(value, {"order": len(found), "results": []})
            group["results"].append(event.event_id)
            if rest is not None:
                group["next_batch"] = rest._replace(group=name, value=value).token()
    return groups


def result_states(
    hs: Homeserver, request: Request, room_ids: Iterable[str]
) -> dict[str, list[Json]]:
    """The state of the rooms that results are in, where the user may read it."""
    states: dict[str, list[Json]] = {}
    for room_id in room_ids:
        with contextlib.suppress(MatrixError):
            nids = state_for(hs, *readable_room(hs, request, room_id)).values()
            states[room_id] = as_clients(hs, request, hs.rooms.events_by_nids(nids))
    return states


async def search_page(
    hs: Homeserver, request: Request, hits: list[Hit], wanted: EventFilter, place: SearchPlace
) -> tuple[list[Event], SearchPlace | None]:
    """The next results, and the place behind them unless there is nothing more."""
    limit = min(wanted.limit, MAX_SEARCH_PAGE)
    found: list[Event] = []
    for at in range(place.at, len(hits)):
        events = hs.rooms.events_by_nids([hits[at][0]])
        chosen = [*chosen_events(hs, request, events, wanted, place)]
        if chosen and len(found) == limit:
            return found, place._replace(at=at)
        found += chosen
        if at % MAX_SEARCH_PAGE == 0:
            await asyncio.sleep(0)
    return found, None


@route("POST", V3 + "/search", auth=USER, limit="search", body=SEARCH_BODY)
async def post_search(hs: Homeserver, request: Request) -> Json:
    """Find events by words, in the rooms that the user is or was in.

    Spec: CS-API "Server Side Search".
    """
    wanted = request.json["search_categories"].get("room_events")
    if wanted is None:
        return {"search_categories": {}}
    definition = wanted.get("filter", {})
    check_filter_values(definition, ROOM_EVENT_FILTER)
    if definition.get("limit", 1) < 1:
        raise invalid_param("limit must be at least 1")
    place = search_place(hs, request.arg("next_batch"))
    if place.group and place.group not in GROUPS:
        raise invalid_param("next_batch is not a token of this server")
    words = re.findall(r"\w+", wanted["search_term"].casefold())[:MAX_SEARCH_WORDS]
    search_groups(wanted, [], None)  # refuses what is no group before anything is done
    hits = await search_hits(hs, request, wanted, place, words)
    events, rest = await search_page(hs, request, hits, EventFilter(definition), place)
    ranks = dict(hits)
    results: list[Json] = [
        {"rank": ranks[event.nid], "result": shown}
        for event, shown in zip(events, as_clients(hs, request, events), strict=True)
    ]
    if wanted.get("event_context") is not None:
        for event, result in zip(events, results, strict=True):
            result["context"] = search_context(hs, request, event, wanted["event_context"])
    answer = {
        "count": len(hits),
        "highlights": words,
        "results": results,
        "groups": search_groups(wanted, events, rest),
    }
    if rest is not None:
        answer["next_batch"] = rest.token()
    if wanted.get("include_state"):
        answer["state"] = result_states(hs, request, {event.room_id for event in events})
    return {"search_categories": {"room_events": answer}}


# ═════════════════════════════════════════════════════════════════════════════
#  59. SPACES, SUMMARIES, REPORTS
#
#  Ways to find rooms, from outside of them: a room in short, the rooms of a space,
#  those in common with somebody; and to tell the admins of what is wrong in one.
#          spec: CS-API "Spaces", "Room summary", "Mutual Rooms", "Reporting Content"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE reports (
    report_nid INTEGER PRIMARY KEY,
    ts INTEGER NOT NULL,
    reporter_nid INTEGER NOT NULL,
    room_id TEXT,
    event_id TEXT,
    user_id TEXT,
    reason TEXT NOT NULL
);
""")

# ── 59.1  Summaries of rooms ─────────────────────────────────────────────────

OPEN_RULES = frozenset({"public", "knock", "knock_restricted"})


def allow_conditions(room: Room) -> list[Any]:
    """The conditions of a restricted join rule."""
    allow = room.content(JOIN_RULES).get("allow")
    restricted = room.join_rule in {"restricted", "knock_restricted"}
    return allow if restricted and isinstance(allow, list) else []


def may_preview(hs: Homeserver, room: Room, user_nid: UserNid | None) -> bool:
    """Whether a user (None: anyone) may know of a room: is in it, may join, or may look into it.

    Spec: CS-API `GET /hierarchy` and `GET /room_summary`.
    """
    if room.history_visibility == "world_readable":
        return True
    membership = None if user_nid is None else room.membership_of(user_nid)
    if membership in {"join", "invite"}:
        return True
    if membership == "ban":
        return False
    if room.join_rule in OPEN_RULES:
        return True
    conditions = () if user_nid is None else allow_conditions(room)
    return any(in_allowed_room(hs, condition, cast(UserNid, user_nid)) for condition in conditions)


def room_summary(room: Room) -> Json:
    """A room in short, as clients and other servers are shown it.  Spec: "RoomSummary"."""
    summary = {**listing_of(room), "room_version": room.version.id}
    topic = plain_topic(room.content("m.room.topic"))
    algorithm = room.content("m.room.encryption").get("algorithm")
    ids = [one.get("room_id") for one in allow_conditions(room) if isinstance(one, dict)]
    more = {
        "topic": topic,
        "encryption": algorithm if isinstance(algorithm, str) else None,
        "allowed_room_ids": [room_id for room_id in ids if is_room_id(room_id)],
    }
    return {**summary, **{key: value for key, value in more.items() if value}}


SUMMARY_PATH = "/_matrix/client/v1/room_summary/{room}"
NHEKO_PATH = "/_matrix/client/unstable/im.nheko.summary"
NHEKO_PATHS = (NHEKO_PATH + "/summary/{room}", NHEKO_PATH + "/rooms/{room}/summary")


@route("GET", SUMMARY_PATH, auth=OPTIONAL, also=NHEKO_PATHS)
async def get_room_summary(hs: Homeserver, request: Request, room: str) -> Json:
    """What a room is, for who may know of it.  Spec: CS-API "Room summary".  404 for others."""
    found = room_by_name(hs, room)
    user_nid = request.requester.nid if request.requester is not None else None
    if not may_preview(hs, found, user_nid):
        raise not_found("There is no such room")
    if user_nid is None:
        return room_summary(found)
    return {**room_summary(found), "membership": found.membership_of(user_nid) or "leave"}


# ── 59.2  Spaces ─────────────────────────────────────────────────────────────

MAX_SPACE_DEPTH = 50
MAX_SPACE_PAGE = 100
MAX_SPACE_ROOMS = 10_000  # that wait for their turn in one walk
SPACE_MEMORY = 200_000  # room ids kept for walks that may go on
SPACE_ORDER = re.compile(r"[\x20-\x7E]{1,50}")


class SpaceWalk(NamedTuple):
    """How far a walk through a space has come; each token stands for one."""

    wanted: tuple[UserNid, str, int, bool]
    waiting: tuple[tuple[str, int], ...]  # room ids and depths, the next one last
    seen: frozenset[str]


def child_rank(child: Event) -> tuple[bool, str, int, str]:
    """The place of a child in its space.  Spec: "Ordering of children within a space"."""
    order = child.content.get("order")
    if not isinstance(order, str) or not SPACE_ORDER.fullmatch(order):
        order = ""
    return not order, order, child.origin_server_ts, cast(str, child.state_key)


def children_state(room: Room, *, suggested_only: bool) -> list[Json]:
    """The valid children of a space in their order, stripped but with their time."""
    if room.content(CREATE).get("type") != "m.space":
        return []
    nids = [nid for key, nid in room.state.items() if key[0] == "m.space.child"]
    valid = [
        event
        for event in room.store.events_by_nids(nids)
        if is_room_id(event.state_key)
        and isinstance(via := event.content.get("via"), list)
        and any(map(is_server_name, via))
        and (event.content.get("suggested") is True or not suggested_only)
    ]
    return [
        {**stripped_event(event), "origin_server_ts": event.origin_server_ts}
        for event in sorted(valid, key=child_rank)
    ]


def hierarchy_room(hs: Homeserver, user_nid: UserNid, room_id: str, suggested: bool) -> Json | None:
    """One room of a hierarchy, or None if the user may not know of it or nobody here does."""
    room = hs.rooms.find(room_id)
    if room is None or not may_preview(hs, room, user_nid):
        return None
    return {**room_summary(room), "children_state": children_state(room, suggested_only=suggested)}


def begin_walk(hs: Homeserver, request: Request, room_id: str) -> SpaceWalk:
    """The walk that a request begins or goes on with.  400 for a token that does not fit."""
    depth = request.int_arg("max_depth", MAX_SPACE_DEPTH, 0, MAX_SPACE_DEPTH)
    wanted = (request.user.nid, room_id, depth, request.bool_arg("suggested_only", False))
    token = request.arg("from")
    if not token:
        if hierarchy_room(hs, request.user.nid, room_id, wanted[3]) is None:
            raise forbidden("You may not view this room, or there is no such room")
        return SpaceWalk(wanted, ((room_id, 0),), frozenset())
    found = hs.space_walks.get(token)
    if found is None or found.wanted != wanted:
        raise invalid_param("from is no token of this request")
    return found


@route("GET", ROOM_V1 + "/hierarchy", auth=GUEST)
async def get_hierarchy(hs: Homeserver, request: Request, room_id: str) -> Json:
    """The rooms of a space and of the spaces in it, each once, depth first.

    Spec: CS-API "Discovering rooms within spaces".  400 when parameters change from page to page.
    """
    limit = request.int_arg("limit", MAX_SPACE_PAGE // 2, 1, MAX_SPACE_PAGE)
    walk = begin_walk(hs, request, room_id)
    user_nid, _, max_depth, suggested = walk.wanted
    waiting, seen, rooms = list(walk.waiting), set(walk.seen), list[Json]()
    while waiting and len(rooms) < limit:
        child_id, depth = waiting.pop()
        if child_id in seen:
            continue
        seen.add(child_id)
        if len(seen) % MAX_SPACE_PAGE == 0:
            await asyncio.sleep(0)
        found = hierarchy_room(hs, user_nid, child_id, suggested)
        if found is None:
            continue
        rooms.append(found)
        if depth < max_depth:
            below = [(one["state_key"], depth + 1) for one in reversed(found["children_state"])]
            waiting = (waiting + below)[-MAX_SPACE_ROOMS:]
    if not waiting:
        return {"rooms": rooms}
    token = random_token(20)
    hs.space_walks.put(
        token, SpaceWalk(walk.wanted, tuple(waiting), frozenset(seen)), len(waiting) + len(seen)
    )
    return {"rooms": rooms, "next_batch": token}


# ── 59.3  Rooms in common ────────────────────────────────────────────────────

MAX_MUTUAL = 100
MSC2666_PATH = "/_matrix/client/unstable/uk.half-shot.msc2666/user/mutual_rooms"


@route("GET", "/_matrix/client/v1/mutual_rooms", auth=USER, limit="search", also=(MSC2666_PATH,))
async def get_mutual_rooms(hs: Homeserver, request: Request) -> Json:
    """The rooms in which the user is together with another.  Spec: CS-API "Mutual Rooms"."""
    other = request.arg("user_id")
    if other is None:
        raise missing_param("user_id is missing")
    parts = split_id("@", other)
    if parts is None or not LOCALPART.fullmatch(parts[0]) or other == request.user.user_id:
        raise invalid_param("user_id must be the id of another user")
    token = request.arg("from")
    after = parse_token(token) if token else 0
    nid = hs.db.find_user_nid(other)
    theirs = set() if nid is None else set(hs.rooms.joined_rooms(nid))
    common = sorted(theirs.intersection(hs.rooms.joined_rooms(request.user.nid)))
    rest = [room_nid for room_nid in common if room_nid > after]
    page = rest[:MAX_MUTUAL]
    joined = [hs.rooms.by_nid(room_nid).room_id for room_nid in page]
    answer: Json = {"joined": joined, "count": len(common)}
    return answer if len(rest) == len(page) else {**answer, "next_batch": stream_token(page[-1])}


# ── 59.4  Reports ────────────────────────────────────────────────────────────
#
# Of rooms and users, whatever is reported is accepted, whether it exists or not: an
# answer must not tell (MSC4277), and things on other servers can be reported too.

MAX_REPORTS = 10_000  # kept, the newest
MAX_REASON = 1_000  # characters
REPORTED: Final = {"event_id": "the event", "room_id": "the room", "user_id": "the user"}


class Reports:
    """What users have reported, for the admins."""

    def __init__(self, hs: Homeserver) -> None:
        self.db = hs.db
        self._listeners: list[Callable[[str], None]] = []

    def subscribe(self, listener: Callable[[str], None]) -> None:
        """Call back with a text for people at each report."""
        self._listeners.append(listener)

    def add(self, reporter: Requester, reason: str | None, **what: str) -> None:
        """Keep a report of what the names say, and tell of it."""
        why = (reason or "")[:MAX_REASON]
        with self.db.write():
            ids = tuple(what.get(name) for name in ("room_id", "event_id", "user_id"))
            cursor = self.db.execute(
                """
                INSERT INTO reports (ts, reporter_nid, room_id, event_id, user_id, reason)
                VALUES (?, ?, ?, ?, ?, ?)
                """,
                (now_ms(), reporter.nid, *ids, why),
            )
            oldest = cast(int, cursor.lastrowid) - MAX_REPORTS
            self.db.execute("DELETE FROM reports WHERE report_nid <= ?", (oldest,))
        named = " in ".join(f"{text} {what[key]}" for key, text in REPORTED.items() if key in what)
        for listener in self._listeners:
            listener(f"{reporter.user_id} reports {named}: {why or 'no reason given'}")


REPORT_ROOM = V3 + "/rooms/{room_id}/report"
REASON_NEEDED: Final[Json] = {"reason": str}


@route("POST", REPORT_ROOM + "/{event_id}", auth=USER, limit="report", body=REASON)
async def report_event(hs: Homeserver, request: Request, room_id: str, event_id: str) -> Json:
    """Report an event to the admins.  Spec: CS-API "Reporting Content".

    404 for who is not in the room, and for an event that is not there, not to be seen, or redacted.
    """
    room = hs.rooms.find(room_id)
    if room is None or room.membership_of(request.user.nid) != "join":
        raise not_found("There is no such event, or you are not in its room")
    _, event = visible_event(hs, request, room_id, event_id, of_ignored=True)
    if event.redacted_by is not None:
        raise not_found("The event is redacted")
    reason, sender = request.json.get("reason"), event.sender
    hs.reports.add(request.user, reason, room_id=room_id, event_id=event_id, user_id=sender)
    return {}


@route("POST", REPORT_ROOM, auth=USER, limit="report", body=REASON_NEEDED)
async def report_room(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Report a room to the admins.  Spec: CS-API "Reporting Content"."""
    if not is_room_id(room_id):
        raise invalid_param("That is no room id")
    hs.reports.add(request.user, request.json["reason"], room_id=room_id)
    return {}


@route("POST", V3 + "/users/{user_id}/report", auth=USER, limit="report", body=REASON_NEEDED)
async def report_user(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Report a user to the admins.  Spec: CS-API "Reporting Content"."""
    if not is_user_id(user_id):
        raise invalid_param("That is no user id")
    hs.reports.add(request.user, request.json["reason"], user_id=user_id)
    return {}


# ═════════════════════════════════════════════════════════════════════════════
#  19. RECEIPTS, TYPING, PRESENCE
#
#  What a room shows beside its events: how far each member has read, who writes
#  just now, who is there. Receipts are rows, typing and presence live in memory;
#  none of them may cost anything while nothing changes.
#         spec: CS-API "Receipts", "Read and unread markers", "Typing Notifications", "Presence"
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE receipts (
    room_nid INTEGER NOT NULL,
    user_nid INTEGER NOT NULL,
    type TEXT NOT NULL,
    thread TEXT NOT NULL,  -- '' unthreaded, 'main', or the id of the thread's root
    event_id TEXT NOT NULL,
    event_pos INTEGER NOT NULL,
    ts INTEGER NOT NULL,
    pos INTEGER NOT NULL,
    PRIMARY KEY (room_nid, user_nid, type, thread)
) WITHOUT ROWID;
CREATE INDEX receipt_changes ON receipts (room_nid, pos);
CREATE TABLE presence (
    user_nid INTEGER PRIMARY KEY,
    state TEXT NOT NULL,
    status_msg TEXT
);
""")

# ── 19.1  Receipts ───────────────────────────────────────────────────────────

READ, READ_PRIVATE, FULLY_READ = "m.read", "m.read.private", "m.fully_read"
UNTHREADED = ""


class Receipts:
    """How far each member of a room has read, by type of receipt and by thread."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs

    def newer(self, room_nid: RoomNid, since: int) -> list[tuple[Any, ...]]:
        """The receipts that changed after a position: user nid, type, thread, event id, time."""
        return self.hs.db.all(
            """
            SELECT user_nid, type, thread, event_id, ts
            FROM receipts
            WHERE room_nid = ? AND pos > ?
            ORDER BY pos
            """,
            (room_nid, since),
        )

    def record(self, room: Room, user_nid: UserNid, kind: str, thread: str, event: Event) -> None:
        """Move a user's receipt forward; one that would go back is dropped without a word."""
        db, key = self.hs.db, (room.nid, user_nid, kind, thread)
        old = db.value(
            """
            SELECT event_pos
            FROM receipts
            WHERE room_nid = ? AND user_nid = ? AND type = ? AND thread = ?
            """,
            key,
        )
        event_pos = cast(int, event.pos)
        if old is not None and old >= event_pos:
            return
        with db.write():
            row = (
                *key,
                event.event_id,
                event_pos,
                now_ms(),
                self.hs.stream.stamp(RECEIPT, room.nid),
            )
            db.execute("INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            if user_nid in room.local_joined:
                self.hs.unread.mark_read(user_nid, room, event_pos, thread or None)


def receipts_since(
    hs: Homeserver,
    room_nid: RoomNid,
    user_nid: UserNid,
    since: int,
    only: set[str] | None = None,
) -> Json | None:
    """The content of an m.receipt event with what changed, or None; private ones to their owner.

    With `only`, of others just the receipts at these events, by id.
    Where a user has two receipts at one event, the unthreaded one goes out: it says more.
    """
    content: Json = {}
    for reader_nid, kind, thread, event_id, ts in hs.receipts.newer(room_nid, since):
        is_shown = kind != READ_PRIVATE and (only is None or event_id in only)
        if not is_shown and reader_nid != user_nid:
            continue
        users = content.setdefault(event_id, {}).setdefault(kind, {})
        reader = hs.db.user_id(reader_nid)
        if thread == UNTHREADED:
            users[reader] = {"ts": ts}
        else:
            users.setdefault(reader, {"ts": ts, "thread_id": thread})
    return content or None


def own_receipt_moved(hs: Homeserver, room_nid: RoomNid, user_nid: UserNid, since: int) -> bool:
    """Whether a receipt of the user's own changed after a position, and so their unread counts."""
    return any(reader_nid == user_nid for reader_nid, *_ in hs.receipts.newer(room_nid, since))


# ── 19.2  The receipt endpoints ──────────────────────────────────────────────

RECEIPT_PATH = "/_matrix/client/v3/rooms/{room_id}/receipt/{receipt_type}/{event_id}"
READ_MARKERS_PATH = "/_matrix/client/v3/rooms/{room_id}/read_markers"
READ_MARKERS_SHAPE: Final = {"m.fully_read?": str, "m.read?": str, "m.read.private?": str}


def require_joined_room(hs: Homeserver, request: Request, room_id: str) -> Room:
    """The room of a path, if the user is in it; 403 else, whether or not there is such a room."""
    room = known_room(hs, room_id)
    require_joined(room, request.user.nid)
    return room


def require_timeline_event(hs: Homeserver, room: Room, event_id: str) -> Event:
    """An event of this room's timeline, or 400."""
    event = hs.rooms.event(event_id)
    if event is None or event.room_nid != room.nid or event.pos is None:
        raise invalid_param("There is no such event in this room")
    return event


def receipt_thread(hs: Homeserver, receipt_type: str, event: Event, body: Json) -> str:
    """The thread that a receipt is for, after the checks that the specification lists.

    Trap: the root of a thread is part of the main timeline, but clients also mark it as read for
    its thread; so does a reaction to it.
    """
    if receipt_type not in (READ, READ_PRIVATE, FULLY_READ):
        raise invalid_param(f"The type of a receipt is {READ}, {READ_PRIVATE} or {FULLY_READ}")
    if "thread_id" not in body:
        return UNTHREADED
    thread = body["thread_id"]
    if not isinstance(thread, str) or not thread:
        raise invalid_param("thread_id field must be a non-empty string")
    if receipt_type == FULLY_READ:
        raise invalid_param(f"{FULLY_READ} is for the room as a whole and takes no thread_id")
    related = {event.event_id, *(target for _, target in relation_chain(hs.rooms, event))}
    if thread not in related and thread != thread_of(hs, event):
        raise invalid_param("The event is not related to that thread")
    return thread


def apply_receipt(
    hs: Homeserver, room: Room, user_nid: UserNid, kind: str, thread: str, event: Event
) -> None:
    """Move a receipt forward, or the marker of what is fully read, which is room account data."""
    hs.presence.touch(user_nid)
    if kind != FULLY_READ:
        hs.receipts.record(room, user_nid, kind, thread, event)
        return
    present = get_room_account_data(hs, user_nid, room.nid, FULLY_READ) or {}
    old = hs.rooms.event(str(present.get("event_id")))
    if old is None or old.pos is None or old.pos < cast(int, event.pos):
        content = {"event_id": event.event_id}
        set_room_account_data(hs, user_nid, room.nid, FULLY_READ, content)


@route("POST", RECEIPT_PATH, auth=USER, body=ANY_OBJECT)
async def post_receipt(
    hs: Homeserver, request: Request, room_id: str, receipt_type: str, event_id: str
) -> Json:
    """Say that the user has read up to an event.

    400 M_INVALID_PARAM for an event that is not in the room or not in the thread.
    """
    room = require_joined_room(hs, request, room_id)
    event = require_timeline_event(hs, room, event_id)
    thread = receipt_thread(hs, receipt_type, event, request.json)
    apply_receipt(hs, room, request.user.nid, receipt_type, thread, event)
    return {}


@route("POST", READ_MARKERS_PATH, auth=USER, body=READ_MARKERS_SHAPE)
async def post_read_markers(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Move the marker of what is fully read, and both receipts, at once."""
    room = require_joined_room(hs, request, room_id)
    kinds = [kind for kind in (FULLY_READ, READ, READ_PRIVATE) if kind in request.json]
    events = [require_timeline_event(hs, room, request.json[kind]) for kind in kinds]
    for kind, event in zip(kinds, events, strict=True):
        apply_receipt(hs, room, request.user.nid, kind, UNTHREADED, event)
    return {}


# ── 19.3  Typing ─────────────────────────────────────────────────────────────

DEFAULT_TYPING_MS = 30_000
MAX_TYPING_MS = 120_000
TYPING_PATH = "/_matrix/client/v3/rooms/{room_id}/typing/{user_id}"


class Typing:
    """Who is typing where, each with the timer that ends it."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self._rooms: dict[RoomNid, dict[UserNid, asyncio.TimerHandle]] = {}
        hs.rooms.subscribe_membership(self._membership_changed)

    def users(self, room_nid: RoomNid) -> list[UserNid]:
        """Who is typing in a room, who began first at the front."""
        return list(self._rooms.get(room_nid, ()))

    def start(self, room_nid: RoomNid, user_nid: UserNid, seconds: float) -> None:
        """A user types, for so long unless we hear again; it is news if they did not before."""
        users = self._rooms.setdefault(room_nid, {})
        before = users.get(user_nid)
        loop = asyncio.get_running_loop()
        users[user_nid] = loop.call_later(seconds, self.stop, room_nid, user_nid)
        if before is None:
            self.hs.stream.stamp(TYPING, room_nid)
        else:
            before.cancel()

    def stop(self, room_nid: RoomNid, user_nid: UserNid) -> None:
        """A user no longer types."""
        timer = self._rooms.get(room_nid, {}).pop(user_nid, None)
        if timer is not None:
            timer.cancel()
            self.hs.stream.stamp(TYPING, room_nid)

    def _membership_changed(self, room: Room, user_nid: UserNid, _: str | None, new: str) -> None:
        if new != "join":
            self.stop(room.nid, user_nid)


def typing_users(hs: Homeserver, room: Room) -> list[str]:
    """The ids of the users who are typing in a room, for its m.typing event."""
    return [hs.db.user_id(nid) for nid in hs.typing.users(room.nid)]


@route("PUT", TYPING_PATH, auth=USER, body={"typing": bool, "timeout?": int})
async def put_typing(hs: Homeserver, request: Request, room_id: str, user_id: str) -> Json:
    """Say that the user types, for `timeout` milliseconds, or has stopped."""
    check_own_user(request, user_id)
    room = require_joined_room(hs, request, room_id)
    timeout = min(request.json.get("timeout", DEFAULT_TYPING_MS), MAX_TYPING_MS)
    if request.json["typing"] and timeout > 0:
        hs.typing.start(room.nid, request.user.nid, timeout / 1000)
        hs.presence.touch(request.user.nid)
    else:
        hs.typing.stop(room.nid, request.user.nid)
    return {}


# ── 19.4  Presence ───────────────────────────────────────────────────────────
#
# Each device of a user is online, unavailable or offline; the best of them counts.
#
#     what happens                              the device becomes
#     it begins to sync, or asks for another    what set_presence says (online if nothing;
#       set_presence than with its last sync      offline: the sync has no effect)
#     PUT .../status                            what it says
#     the user sends, types or reads something  online, if it was unavailable
#     nothing of that for five minutes          unavailable, if it was online
#     it syncs while it is busy                 busy still: only PUT .../status ends that
#     it has not synced for a while             offline
#
# Others are told when the state or the status message changes, and when `currently_active`
# does: true for a minute after the user did something. While it is true they hear no more.

BUSY: Final = "org.matrix.msc3026.busy"
PRESENCE_STATES: Final = ("offline", "unavailable", "online", BUSY)  # the later outweighs the other
PRESENCE_IDLE_SECONDS = 300
ACTIVE_SECONDS = 60
SYNC_GRACE_SECONDS = 30  # how long a device may take between two syncs
STATUS_GRACE_SECONDS = 300  # how long a state set by PUT lasts without a sync
RESTART_GRACE_SECONDS = 60  # how long clients have to come back after a restart
PRESENCE_SWEEP_SECONDS = 10
MAX_STATUS_BYTES = 1024
LAST_RUN = -1  # stands for the devices that were there before the restart


@dataclass(slots=True)
class DevicePresence:
    """What one device says of its user."""

    state: str
    until: float  # when it counts as gone, on the monotonic clock
    asked: str | None = None  # its last set_presence


@dataclass(slots=True)
class UserPresence:
    """What is known of one user, and what the others were told."""

    status_msg: str | None = None
    shown: tuple[str, bool, str | None] = ("offline", False, None)  # as `due` gives it
    last_active: float = -math.inf
    pos: int = 0  # of the stream, when others were told
    joined_pos: int = 0  # and at the last join of a room
    devices: dict[int, DevicePresence] = field(default_factory=dict)

    def due(self, now: float) -> tuple[str, bool, str | None]:
        """What others should know now: state, whether currently active, status message."""
        quiet = now - self.last_active
        states = [device.state for device in self.devices.values()]
        state = max(states, key=PRESENCE_STATES.index, default="offline")
        if state == "online" and quiet > PRESENCE_IDLE_SECONDS:
            state = "unavailable"
        return state, state == "online" and quiet < ACTIVE_SECONDS, self.status_msg

    def content(self, now: float) -> Json:
        """The content of the m.presence event."""
        state, active, status_msg = self.shown
        content: Json = {"presence": state}
        if self.last_active > -math.inf:
            content["last_active_ago"] = int((now - self.last_active) * 1000)
        if state == "online":
            content["currently_active"] = active
        if status_msg is not None:
            content["status_msg"] = status_msg
        return content


class Presence:
    """Who is online. One timer looks after all who are; nothing is written while somebody waits."""

    def __init__(self, hs: Homeserver, clock: Callable[[], float] = time.monotonic) -> None:
        self.hs = hs
        self._clock = clock
        self._users: OrderedDict[UserNid, UserPresence] = OrderedDict()  # in order of `pos`
        self._present: set[UserNid] = set()  # who has devices
        self._unsaved: set[UserNid] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._load()
        hs.rooms.subscribe(self._event_sent)
        hs.rooms.subscribe_membership(self._membership_changed)
        hs.accounts.on_deactivated(self._delete)

    def note_sync(self, requester: Requester, asked: str, timeout: float) -> None:
        """A device syncs, asks to be shown so, and will wait `timeout` seconds at most."""
        if asked == "offline" or not self.hs.config.allow_local_presence:
            return
        user, device, now = self._device(requester)
        device.until = now + timeout + SYNC_GRACE_SECONDS
        if device.asked != asked:
            device.asked = asked
            device.state = BUSY if device.state == BUSY else asked
            if asked == "online":
                user.last_active = now
        self._show(requester.nid, user, now)

    def put(self, requester: Requester, state: str, status_msg: str | None) -> None:
        """The user says how they are."""
        if not self.hs.config.allow_local_presence:
            return
        user, device, now = self._device(requester)
        device.state = state
        device.until = max(device.until, now + STATUS_GRACE_SECONDS)
        user.last_active, user.status_msg = now, status_msg
        self._show(requester.nid, user, now)
        self._unsaved.add(requester.nid)
        self.save()

    def touch(self, user_nid: UserNid) -> None:
        """The user did something: sent, typed or read; cheap, and no news to those who know."""
        if user_nid not in self._present:
            return
        user, now = self._users[user_nid], self._clock()
        user.last_active = now
        for device in user.devices.values():
            if device.state == "unavailable":
                device.state = "online"
        self._show(user_nid, user, now)

    def of(self, user_nid: UserNid) -> Json:
        """A user's presence as it is now, for GET and for m.presence events."""
        return self._users.get(user_nid, UserPresence()).content(self._clock())

    def news(self, user_nid: UserNid, since: int) -> set[UserNid]:
        """Whose presence a user has to hear of who knows all up to a position.

        To somebody new, that is whoever is there; who is not goes without saying.
        """
        share, newest = self.hs.rooms.share_room, reversed(self._users)
        changed = itertools.takewhile(lambda nid: self._users[nid].pos > since, newest)
        others = changed if since else self._present
        news = {other for other in others if other == user_nid or share(user_nid, other)}
        if user_nid in self._users and self._users[user_nid].joined_pos > since:
            for room_nid, member in self.hs.rooms.memberships(user_nid).items():
                if member.membership == "join" and member.join_pos > since:
                    news |= self._present & self.hs.rooms.by_nid(room_nid).local_joined
        return news

    def sweep(self) -> None:
        """Let devices go that do not come back, let users become idle, store what changed."""
        now, self._timer = self._clock(), None
        for user_nid in list(self._present):
            user = self._users[user_nid]
            user.devices = {key: one for key, one in user.devices.items() if one.until >= now}
            if not user.devices:
                self._present.discard(user_nid)
            self._show(user_nid, user, now)
        self._arm()
        # A full disk must not stop the sweep; the rows stay unsaved and are tried again.
        with contextlib.suppress(MatrixError):
            self.save()

    def save(self) -> None:
        """Store the states that changed, so that a restart can tell others who has gone."""
        if not self._unsaved:
            return
        with self.hs.db.write():
            for user_nid in self._unsaved:
                user = self._users[user_nid]
                row = (user_nid, user.shown[0], user.status_msg)
                self.hs.db.execute("INSERT OR REPLACE INTO presence VALUES (?, ?, ?)", row)
        self._unsaved.clear()

    def _device(self, requester: Requester) -> tuple[UserPresence, DevicePresence, float]:
        """Make the requester's device present; also gives the time."""
        nid, now = requester.nid, self._clock()
        if nid not in self._users:
            self._users[nid] = UserPresence()
            self._users.move_to_end(nid, last=False)  # nobody was told: position 0
        self._present.add(nid)
        self._arm()
        user, key = self._users[nid], requester.device_nid or 0
        return user, user.devices.setdefault(key, DevicePresence("offline", now)), now

    def _arm(self) -> None:
        if self._present and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(PRESENCE_SWEEP_SECONDS, self.sweep)

    def _show(self, user_nid: UserNid, user: UserPresence, now: float) -> None:
        due = user.due(now)
        if due == user.shown:
            return
        if due[0] != user.shown[0]:
            self._unsaved.add(user_nid)
        user.shown = due
        self._tell(user_nid)

    def _tell(self, user_nid: UserNid) -> None:
        self._users[user_nid].pos = self.hs.stream.stamp(PRESENCE, user_nid)
        self._users.move_to_end(user_nid)

    def _membership_changed(self, _: Room, user_nid: UserNid, old: str | None, new: str) -> None:
        """Who joins hears of those who are there, and they of them."""
        if old != "join" == new and user_nid in self._present:
            self._tell(user_nid)
            self._users[user_nid].joined_pos = self._users[user_nid].pos

    def _event_sent(self, _room: Room, event: Event) -> None:
        user_nid = self.hs.db.find_user_nid(event.sender)
        if user_nid is not None:
            self.touch(user_nid)

    def _load(self) -> None:
        """Take over who was present before the restart: they have a while to come back."""
        now = self._clock()
        rows = self.hs.db.all("SELECT user_nid, state, status_msg FROM presence")
        for user_nid, state, status_msg in rows:
            shown = (state, state == "online", status_msg)
            user = self._users[user_nid] = UserPresence(status_msg, shown, pos=1)
            if state != "offline":
                user.devices[LAST_RUN] = DevicePresence(state, now + RESTART_GRACE_SECONDS)
                user.last_active = now - ACTIVE_SECONDS
                self._present.add(user_nid)

    def _delete(self, user_nid: UserNid) -> None:
        user = self._users.get(user_nid)
        if user is not None:
            user.devices.clear()
            self._present.discard(user_nid)
            user.status_msg, user.last_active = None, -math.inf
            self._show(user_nid, user, self._clock())
            self._unsaved.add(user_nid)
            self.save()


def note_sync(hs: Homeserver, requester: Requester, set_presence: str, timeout: float = 30) -> None:
    """Tell presence that a device syncs, and for how many seconds it may wait for news."""
    if set_presence not in PRESENCE_STATES:
        raise invalid_param(f"set_presence is one of {', '.join(PRESENCE_STATES)}")
    hs.presence.note_sync(requester, set_presence, timeout)


def presence_since(hs: Homeserver, user_nid: UserNid, since: int = 0) -> list[Json]:
    """The m.presence events of those who share a room with the user and changed since."""
    if not hs.config.allow_local_presence:
        return []
    return [
        {"type": "m.presence", "sender": hs.db.user_id(nid), "content": hs.presence.of(nid)}
        for nid in hs.presence.news(user_nid, since)
    ]


# ── 19.5  The presence endpoints ─────────────────────────────────────────────

PRESENCE_PATH = "/_matrix/client/v3/presence/{user_id}/status"


@route("GET", PRESENCE_PATH, auth=USER)
async def get_presence(hs: Homeserver, request: Request, user_id: str) -> Json:
    """How a user is; 403 unless they share a room, so that nobody can probe for accounts."""
    user_nid, me = hs.db.find_user_nid(user_id), request.user.nid
    if user_nid is None or not (user_nid == me or hs.rooms.share_room(me, user_nid)):
        raise forbidden("You are not allowed to see their presence")
    shown = hs.config.allow_local_presence
    return hs.presence.of(user_nid) if shown else {"presence": "offline"}


@route("PUT", PRESENCE_PATH, auth=USER, body={"presence": str, "status_msg?": str})
async def put_presence(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Set the user's own presence and status message; without one the message is cleared."""
    check_own_user(request, user_id)
    state, status_msg = request.json["presence"], request.json.get("status_msg")
    if state not in PRESENCE_STATES:
        raise invalid_param(f"presence is one of {', '.join(PRESENCE_STATES)}")
    if byte_length(status_msg or "") > MAX_STATUS_BYTES:
        raise invalid_param(f"A status message has at most {MAX_STATUS_BYTES} bytes")
    hs.presence.put(request.user, state, status_msg)
    return {}


# ═════════════════════════════════════════════════════════════════════════════
#  49. PUSHERS
#
#  How a phone hears of what its apps sleep through: a pusher names a gateway, which
#  wakes the phone. What is to be pushed is decided with the event, in the transaction
#  that stores it, and waits in a queue until the gateway has taken it.
#         spec: CS-API "Push Notifications", "Receiving notifications"; Push Gateway API
# ═════════════════════════════════════════════════════════════════════════════

MAX_PUSHERS = 100  # of one user
MAX_PUSHER_BYTES = 16_384  # of what a client says about one
MAX_PUSHES_WAITING = 100  # for one pusher; the oldest go, as the newest say what is to be read
MAX_PUSHES_AT_ONCE = 20  # requests to gateways under way
PUSH_TIMEOUT = 20.0  # seconds
PUSH_ANSWER_BYTES = 65_536
PUSH_KEPT_MS = 24 * 3600 * 1000  # older ones are not news any more
PUSH_RETRY_MS = (1_000, 3_600_000)  # after the first failure, and at most
PUSHER_LIFE_MS = 30 * 24 * 3600 * 1000  # of one whose gateway never answers
PUSH_PATH: Final = "/_matrix/push/v1/notify"
BADGE = EventNid(0)  # in the queue: only the count of what is unread changed

schema("""
CREATE TABLE pushers (
    pusher_nid INTEGER PRIMARY KEY AUTOINCREMENT,
    user_nid INTEGER NOT NULL,
    device_nid INTEGER,           -- with which it goes
    app_id TEXT NOT NULL,
    pushkey TEXT NOT NULL,
    body TEXT NOT NULL,           -- JSON, as the client gave it
    enabled INTEGER NOT NULL,
    created_ts INTEGER NOT NULL,
    badge INTEGER NOT NULL,       -- the count that the gateway was told last
    pushed_ts INTEGER,            -- when it last took something
    failures INTEGER NOT NULL DEFAULT 0, -- since then
    failing_ts INTEGER,           -- when they began
    retry_ts INTEGER NOT NULL DEFAULT 0,
    error TEXT,                   -- and what the last one was
    UNIQUE (user_nid, app_id, pushkey)
);
CREATE INDEX pushers_by_key ON pushers (app_id, pushkey);
CREATE TABLE push_queue (
    pusher_nid INTEGER NOT NULL,
    event_nid INTEGER NOT NULL,
    ts INTEGER NOT NULL,
    tweaks TEXT NOT NULL,         -- JSON
    PRIMARY KEY (pusher_nid, event_nid)
) WITHOUT ROWID;
""")
invariant(
    "what is to be pushed to pushers that are gone",
    "SELECT pusher_nid FROM push_queue WHERE pusher_nid NOT IN (SELECT pusher_nid FROM pushers)",
)
log_push = logging.getLogger("conduit.push")

# ── 49.1  What is pushed ─────────────────────────────────────────────────────


@dataclass(slots=True)
class Pusher:
    """A row of pushers; all of them are in memory."""

    nid: int
    user_nid: UserNid
    device_nid: DeviceNid | None
    app_id: str
    pushkey: str
    body: Json
    enabled: int
    created_ts: int
    badge: int
    failures: int
    failing_ts: int | None
    retry_ts: int

    @property
    def data(self) -> Json:
        """What the client wants its gateway to know, and the gateway's URL."""
        return cast(Json, self.body["data"])


def tweaks_of(actions: list[Any]) -> Json:
    """How a notification is to be made, by the actions of its rule."""
    tweaks = [action for action in actions if isinstance(action, dict)]
    return {tweak["set_tweak"]: tweak.get("value", True) for tweak in tweaks}


def push_about(pusher: Pusher, tweaks: Json, badge: int) -> Json:
    """What every notification says: for which device, and how much is unread.

    Trap: counts of zero should be left out, but then gateways leave the badge as it is.
    """
    data = {name: value for name, value in pusher.data.items() if name != "url"}
    device = {
        **{"app_id": pusher.app_id, "pushkey": pusher.pushkey, "data": data, "tweaks": tweaks},
        "pushkey_ts": pusher.created_ts // 1000,
    }
    hidden = data.get("org.matrix.msc4076.disable_badge_count") is True
    return {"devices": [device], **({} if hidden else {"counts": {"unread": badge}})}


def push_of_event(room: Room, event: Event, user_id: str) -> Json:
    """What a gateway is told of an event; Spec: POST /_matrix/push/v1/notify."""
    member = room.state_event(MEMBER, event.sender)
    names = {
        "sender_display_name": member.content.get("displayname") if member else None,
        "room_name": room.content("m.room.name").get("name"),
        "room_alias": room.content("m.room.canonical_alias").get("alias"),
    }
    return {
        **{"type": event.type, "sender": event.sender, "content": event.content},
        **{name: text for name, text in names.items() if isinstance(text, str) and text},
        **({"user_is_target": True} if event.type == MEMBER and event.state_key == user_id else {}),
    }


def unread_in_all(hs: Homeserver, user_nid: UserNid) -> int:
    """The number for the badge: what notified and was not read, in all rooms and threads."""
    rooms = map(hs.rooms.by_nid, hs.rooms.joined_rooms(user_nid))
    counts = [unread_counts(hs, user_nid, room) for room in rooms]
    threads = (count for each in counts for count, _ in each.threads.values())
    return sum(each.notification_count for each in counts) + sum(threads)


def is_unread(hs: Homeserver, user_nid: UserNid, room: Room, event: Event) -> bool:
    """Whether an event that notified was not read since; an invitation, until it is answered."""
    if event.redacted_by is not None:
        return False
    if user_nid not in room.local_joined:
        return hs.rooms.memberships(user_nid)[room.nid].event_nid == event.nid
    return event.pos in hs.unread.room(user_nid, room).positions()


# ── 49.2  The queue ──────────────────────────────────────────────────────────


class PushAnswer(Protocol):
    """What comes back from a gateway, or from a page that is to be previewed."""

    status: int
    headers: dict[str, str]
    body: bytes


class PushClient(Protocol):
    """The way out to hosts that others name; refused addresses and all limits are its matter."""

    async def request(self, method: str, url: str, **options: Any) -> PushAnswer:
        """One request and its answer; MatrixError for whatever goes wrong."""


class Pushers:
    """All pushers, what waits for them, and the tasks that send it: one for each at a time."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self.db = hs.db
        self._pushers: dict[int, Pusher] = {}
        self._by_user: dict[UserNid, list[Pusher]] = {}
        self._users: set[UserNid] = set()
        self._waiting: set[int] = set()  # pushers with something in the queue
        self._sending: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._load()
        hs.db.on_reset(self._load)
        hs.rooms.subscribe(self._event_sent)
        hs.unread.on_read(self._badge_may_change)
        hs.accounts.on_device_deleted(self._device_deleted)
        hs.accounts.on_deactivated(self._deactivated)

    def of(self, user_nid: UserNid) -> list[Pusher]:
        """The pushers of a user."""
        return self._by_user.get(user_nid, [])

    def put(self, user: Requester, body: Json, enabled: bool, append: bool) -> None:
        """Make a pusher, or change it; that of others with this key goes unless told to append."""
        key, now = (body["app_id"], body["pushkey"]), now_ms()
        if len(self.of(user.nid)) >= MAX_PUSHERS and not self._find(user.nid, *key):
            raise invalid_param(f"You have {MAX_PUSHERS} pushers already")
        others = "SELECT user_nid FROM pushers WHERE app_id = ? AND pushkey = ? AND user_nid <> ?"
        with self.db.write():
            for (other_nid,) in [] if append else self.db.all(others, (*key, user.nid)):
                self.remove(other_nid, *key)
            self.db.execute(
                """
                INSERT INTO pushers (user_nid, device_nid, app_id, pushkey, body, enabled,
                    created_ts, badge)
                VALUES (?, ?, ?, ?, ?, ?, ?, 0)
                ON CONFLICT (user_nid, app_id, pushkey) DO UPDATE
                SET device_nid = excluded.device_nid, body = excluded.body,
                    enabled = excluded.enabled, created_ts = excluded.created_ts,
                    failures = 0, failing_ts = NULL, retry_ts = 0, error = NULL
                """,
                (user.nid, user.device_nid, *key, json.dumps(body), enabled, now),
            )
            self._load()
        self.start()

    def remove(self, user_nid: UserNid, app_id: str, pushkey: str) -> None:
        """Delete a pusher, if there is such."""
        for pusher in self._find(user_nid, app_id, pushkey):
            self._drop(pusher)

    def start(self) -> None:
        """Begin with those pushers whose time has come, and wake up for the next."""
        if self.hs.http_client is None:
            return
        now = now_ms()
        idle = [self._pushers[nid] for nid in self._waiting - self._sending]
        idle.sort(key=operator.attrgetter("retry_ts"))
        free = MAX_PUSHES_AT_ONCE - len(self._sending)
        for pusher in [each for each in idle if each.retry_ts <= now][: max(0, free)]:
            self._sending.add(pusher.nid)
            self.hs.background(self._deliver(pusher.nid))
        later = [pusher.retry_ts for pusher in idle if pusher.retry_ts > now]
        self._arm(min(later) - now if later else None)

    def stop(self) -> None:
        """Begin nothing more."""
        self._arm(None)

    def _arm(self, wait_ms: int | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if wait_ms is not None:
            self._timer = asyncio.get_running_loop().call_later(wait_ms / 1000, self.start)

    def _load(self) -> None:
        self._by_user, self._pushers = {}, {}
        rows = self.db.all(
            """
            SELECT pusher_nid, user_nid, device_nid, app_id, pushkey, body, enabled, created_ts,
                badge, failures, failing_ts, retry_ts
            FROM pushers
            """
        )
        for row in rows:
            pusher = Pusher(*row)
            pusher.body = json.loads(row[5])
            self._by_user.setdefault(pusher.user_nid, []).append(pusher)
            self._pushers[pusher.nid] = pusher
        self._users = set(self._by_user)
        self._waiting = {
            nid for (nid,) in self.db.all("SELECT DISTINCT pusher_nid FROM push_queue")
        }

    def _find(self, user_nid: UserNid, app_id: str, pushkey: str) -> list[Pusher]:
        key = (app_id, pushkey)
        return [each for each in self.of(user_nid) if (each.app_id, each.pushkey) == key]

    def _drop(self, pusher: Pusher) -> None:
        with self.db.write():
            self.db.execute("DELETE FROM push_queue WHERE pusher_nid = ?", (pusher.nid,))
            self.db.execute("DELETE FROM pushers WHERE pusher_nid = ?", (pusher.nid,))
            self._load()

    def _device_deleted(self, user_nid: UserNid, device_nid: DeviceNid, _: str) -> None:
        for pusher in [each for each in self.of(user_nid) if each.device_nid == device_nid]:
            self._drop(pusher)

    def _deactivated(self, user_nid: UserNid) -> None:
        for pusher in list(self.of(user_nid)):  # those that no device had
            self._drop(pusher)

    # What comes in

    def _event_sent(self, room: Room, event: Event) -> None:
        """Decide for each member with a pusher; this is in the transaction of the event."""
        concerned = room.local_joined & self._users
        sender = self.db.find_user_nid(event.sender)
        target = self.db.find_user_nid(str(event.state_key)) if event.type == MEMBER else None
        if target in self._users:
            concerned.add(target)
        for user_nid in concerned:
            if user_nid in (sender, target) or event.type == REDACTION:
                self._badge_may_change(user_nid)  # read, left, or nothing to read any more
            ignored = event.soft_failed or event.sender in ignored_users(self.hs, user_nid)
            if user_nid == sender or ignored:
                continue
            user_id = self.db.user_id(user_nid)
            rule = self.hs.push_rules.of(user_nid).match(event, room, user_id)
            if rule is not None and rule.notify:
                self._put(user_nid, event.nid, tweaks_of(rule.actions))
        if concerned:
            self.start()

    def _badge_may_change(self, user_nid: UserNid) -> None:
        """Less may be unread than the gateways were told."""
        if any(pusher.badge for pusher in self.of(user_nid)):
            self._put(user_nid, BADGE, {})
            self.start()

    def _put(self, user_nid: UserNid, event_nid: EventNid, tweaks: Json) -> None:
        text = json.dumps(tweaks)
        for pusher in self.of(user_nid):
            if not pusher.enabled:
                continue
            row = (pusher.nid, event_nid, now_ms(), text)
            self.db.execute("INSERT OR REPLACE INTO push_queue VALUES (?, ?, ?, ?)", row)
            self.db.execute(
                """
                DELETE FROM push_queue
                WHERE pusher_nid = :pusher AND event_nid <= (
                    SELECT event_nid
                    FROM push_queue
                    WHERE pusher_nid = :pusher
                    ORDER BY event_nid DESC
                    LIMIT 1 OFFSET :kept
                )
                """,
                {"pusher": pusher.nid, "kept": MAX_PUSHES_WAITING},
            )
            self._waiting.add(pusher.nid)

    # What goes out

    async def _deliver(self, nid: int) -> None:
        """Send what waits for one pusher, the oldest first, until the queue or a try ends."""
        try:
            while nid in self._pushers and (entry := self._next(nid)) is not None:
                await self.hs.db.synced()
                event_nid, ts, tweaks = entry
                pusher = self._pushers[nid]
                badge = unread_in_all(self.hs, pusher.user_nid)
                notification = None
                if pusher.enabled and ts > now_ms() - PUSH_KEPT_MS:
                    notification = self._notification(pusher, event_nid, json.loads(tweaks), badge)
                error = notification and await self._push(pusher, notification)
                now = self._pushers.get(nid)  # the pusher may have been changed, or removed
                if error or now is None:
                    self._failed(now, error or "")
                    break
                self._sent(now, event_nid, None if notification is None else badge)
        finally:
            self._sending.discard(nid)
        self.start()

    def _next(self, nid: int) -> tuple[EventNid, int, str] | None:
        query = """
            SELECT event_nid, ts, tweaks
            FROM push_queue
            WHERE pusher_nid = ?
            ORDER BY event_nid
            LIMIT 1
        """
        row = self.db.one(query, (nid,))
        if row is None:
            self._waiting.discard(nid)
        return cast("tuple[EventNid, int, str] | None", row)

    def _notification(
        self, pusher: Pusher, event_nid: EventNid, tweaks: Json, badge: int
    ) -> Json | None:
        """What the gateway is to be told, or None if it has become nothing."""
        about = push_about(pusher, tweaks, badge)
        if event_nid == BADGE:
            return about if badge != pusher.badge and "counts" in about else None
        event = self.hs.rooms.event_by_nid(event_nid)
        if event is None:
            return None
        room = self.hs.rooms.by_nid(event.room_nid)
        if not is_unread(self.hs, pusher.user_nid, room, event):
            return None
        urgent = event.type == "m.room.encrypted" or tweaks.keys() & {"sound", "highlight"}
        about["prio"] = "high" if urgent else "low"
        about |= {"event_id": event.event_id, "room_id": event.room_id}
        if pusher.data.get("format") == "event_id_only":
            return about
        return about | push_of_event(room, event, self.db.user_id(pusher.user_nid))

    async def _push(self, pusher: Pusher, notification: Json) -> str | None:
        """One request to the gateway; None if it took the notification, else what went wrong."""
        body = encode_json({"notification": notification})
        headers = {"Content-Type": "application/json"}
        limits = {"timeout": PUSH_TIMEOUT, "max_bytes": PUSH_ANSWER_BYTES}
        client, url = cast(PushClient, self.hs.http_client), pusher.data["url"]
        try:
            answer = await client.request("POST", url, headers=headers, body=body, **limits)
            value = parse_json(answer.body) if answer.status == 200 else None
        except MatrixError as error:
            return error.error
        if answer.status != 200:
            return f"The gateway answered with status {answer.status}"
        rejected = value.get("rejected") if isinstance(value, dict) else None
        if isinstance(rejected, list) and pusher.pushkey in rejected:
            log_push.info("a gateway rejected a pusher of %s", self.db.user_id(pusher.user_nid))
            self.remove(pusher.user_nid, pusher.app_id, pusher.pushkey)
        return None

    def _sent(self, pusher: Pusher, event_nid: EventNid, badge: int | None) -> None:
        """Take out of the queue what is done, and remember the badge if one was told.

        Trap: what was read while the gateway was told of it would stay on the badge.
        """
        with self.db.write():
            entry = (pusher.nid, event_nid)
            self.db.execute("DELETE FROM push_queue WHERE pusher_nid = ? AND event_nid = ?", entry)
            if badge is None:
                return
            pusher.badge, pusher.failures, pusher.failing_ts = badge, 0, None
            self.db.execute(
                """
                UPDATE pushers
                SET badge = ?, pushed_ts = ?, failures = 0, failing_ts = NULL, error = NULL
                WHERE pusher_nid = ?
                """,
                (badge, now_ms(), pusher.nid),
            )
            if unread_in_all(self.hs, pusher.user_nid) < badge:
                self._put(pusher.user_nid, BADGE, {})

    def _failed(self, pusher: Pusher | None, error: str) -> None:
        """Wait longer each time; forget a gateway that is gone for good."""
        if pusher is None:
            return
        now = now_ms()
        pusher.failures += 1
        pusher.failing_ts = pusher.failing_ts or now
        first, most = PUSH_RETRY_MS
        pusher.retry_ts = now + min(first << min(pusher.failures - 1, 20), most)
        if now - pusher.failing_ts > PUSHER_LIFE_MS:
            self._drop(pusher)
            return
        with self.db.write():
            self.db.execute(
                """
                UPDATE pushers
                SET failures = ?, failing_ts = ?, retry_ts = ?, error = ?
                WHERE pusher_nid = ?
                """,
                (pusher.failures, pusher.failing_ts, pusher.retry_ts, error, pusher.nid),
            )


# ── 49.3  The pusher endpoints ───────────────────────────────────────────────

PUSHERS_PATH: Final = "/_matrix/client/v3/pushers"
PUSHER_TEXTS: Final = ("app_display_name", "device_display_name", "lang")
PUSHER_FIELDS: Final = ("app_id", "pushkey", "kind", *PUSHER_TEXTS, "profile_tag", "data")
ENABLED, DEVICE_ID = "org.matrix.msc3881.enabled", "org.matrix.msc3881.device_id"
PUSHER: Final = {
    **dict.fromkeys(PUSHER_TEXTS, str),
    **{"profile_tag?": str, "data": {"url": str, "format?": str}},
    **{"append?": bool, f"{ENABLED}?": bool},
}


def check_pusher(body: Json) -> None:
    """400 for a pusher that cannot be: too long, of another kind, or with another kind of URL."""
    if body["kind"] != "http":
        raise invalid_param("The only kind of pusher here is http")
    check_shape(body, PUSHER)
    if byte_length(body["pushkey"]) > 512 or len(body["app_id"]) > 64:
        raise invalid_param("pushkey has at most 512 bytes, app_id 64 characters")
    if len(encode_json(body)) > MAX_PUSHER_BYTES:
        raise invalid_param(f"A pusher has at most {MAX_PUSHER_BYTES} bytes")
    try:
        url = urlsplit(body["data"]["url"])
        good = url.scheme == "https" and url.path == PUSH_PATH and bool(url.hostname)
        good = good and url.username is None and (url.port or 443) > 0 and not url.fragment
    except ValueError:
        good = False
    if not good:
        raise invalid_param(f"The URL of a gateway is https://host{PUSH_PATH}")


@route("POST", PUSHERS_PATH + "/set", auth=USER, body={"app_id": str, "pushkey": str})
async def set_pusher(hs: Homeserver, request: Request) -> Json:
    """Make, change or (kind: null) delete a pusher of the user.

    Spec: POST /_matrix/client/v3/pushers/set.
    """
    body, user = request.json, request.user
    if "kind" not in body:
        raise missing_param("kind is missing")
    if body["kind"] is None:
        hs.pushers.remove(user.nid, body["app_id"], body["pushkey"])
        return {}
    check_pusher(body)
    kept = {name: body[name] for name in PUSHER_FIELDS if name in body}
    hs.pushers.put(user, kept, body.get(ENABLED, True), body.get("append", False))
    return {}


@route("GET", PUSHERS_PATH, auth=USER)
async def get_pushers(hs: Homeserver, request: Request) -> Json:
    """The pushers of the user."""
    devices = "SELECT device_nid, device_id FROM devices WHERE user_nid = ?"
    ids = dict(hs.db.all(devices, (request.user.nid,)))
    return {
        "pushers": [
            {**pusher.body, ENABLED: bool(pusher.enabled), DEVICE_ID: ids.get(pusher.device_nid)}
            for pusher in hs.pushers.of(request.user.nid)
        ]
    }


# ── 49.4  The list of notifications ──────────────────────────────────────────
#
# Nobody keeps a list: it is made by asking the rules again, back through the stream. That
# costs only those who look, and never more than a bounded part of the way at a time.

NOTIFICATIONS_SCAN = 5_000  # events looked at for one answer
NOTIFICATIONS_STEP = 250  # before others get their turn


def notified_events(
    hs: Homeserver, user: Requester, before: int
) -> tuple[list[tuple[Event, Room, PushRule]], int | None]:
    """What notified a user among the events before a position, the newest first; where it ends."""
    query = "SELECT nid, room_nid, pos FROM events WHERE nid < ? ORDER BY nid DESC LIMIT ?"
    rows = hs.db.all(query, (before, NOTIFICATIONS_STEP))
    members, rules = hs.rooms.memberships(user.nid), hs.push_rules.of(user.nid)
    ignored, found = ignored_users(hs, user.nid), []
    for nid, room_nid, pos in rows:
        member = members.get(room_nid)
        joined = member is not None and member.membership == "join" and nid >= member.join_pos
        invited = member is not None and member.membership == "invite" and nid == member.event_nid
        event = hs.rooms.event_by_nid(nid) if pos == nid and (joined or invited) else None
        if event is None or event.redacted_by or event.sender in (user.user_id, *ignored):
            continue
        room = hs.rooms.by_nid(room_nid)
        rule = rules.match(event, room, user.user_id)
        if rule is not None and rule.notify:
            found.append((event, room, rule))
    return found, rows[-1][0] if len(rows) == NOTIFICATIONS_STEP else None


@route("GET", "/_matrix/client/v3/notifications", auth=USER)
async def get_notifications(hs: Homeserver, request: Request) -> Json:
    """What the user was or would have been notified of, the newest first.

    Spec: GET /_matrix/client/v3/notifications. A page can be short or empty and not be the last.
    """
    start, limit = request.arg("from"), request.int_arg("limit", 20, 1, 100)
    before: int | None = parse_token(start) if start else hs.stream.position + 1
    loud, scanned = request.arg("only") == "highlight", 0
    chosen: list[tuple[Event, Room, PushRule]] = []
    while before is not None and len(chosen) < limit and scanned < NOTIFICATIONS_SCAN:
        found, before = notified_events(hs, request.user, before)
        chosen += [each for each in found if each[2].highlight or not loud]
        scanned += NOTIFICATIONS_STEP
        await asyncio.sleep(0)
    if len(chosen) > limit:
        before = chosen[limit - 1][0].nid
    events = as_clients(hs, request, (event for event, _, _ in chosen[:limit]))
    notifications = [
        {
            **{"actions": rule.actions, "room_id": event.room_id, "ts": event.origin_server_ts},
            "read": not is_unread(hs, request.user.nid, room, event),
            "event": shown,
        }
        for (event, room, rule), shown in zip(chosen, events, strict=False)
    ]
    return {
        "notifications": notifications,
        **({"next_token": stream_token(before)} if before else {}),
    }


# ═════════════════════════════════════════════════════════════════════════════
#  20. ENCRYPTION KEYS AND TO-DEVICE
#
#  The server sees no plain text; it is the post office of the keys. It keeps
#  what devices publish, hands each one-time key to one caller only, checks who
#  signs whom, tells users whose devices changed, stores encrypted backups, and
#  delivers messages between devices exactly once. What goes wrong here is read
#  by people as "unable to decrypt".
#                      spec: CS-API "End-to-End Encryption", "Send-to-Device"
# ═════════════════════════════════════════════════════════════════════════════

MAX_KEY_BYTES = 65_536  # of a key, a session in a backup, a to-device message; as for events
MAX_ONE_TIME_KEYS = 5_000  # per device; more than any client can hold the private halves of
MAX_QUEUE_BYTES = 64 * 1024 * 1024  # per device; what comes later is refused, nothing is dropped
MESSAGE_OVERHEAD = 200  # bytes that a waiting message takes besides its content
KEYS: Final = "/_matrix/client/v3/keys"
ROOM_KEYS: Final = "/_matrix/client/v3/room_keys"
SEND_TO_DEVICE: Final = "/_matrix/client/v3/sendToDevice/{event_type}/{txn_id}"
OLD: Final = ("unstable",)

# A row of one_time_keys outlives its key, without the body: it is known that it was handed out.
# Signatures that come by /keys/signatures/upload are kept apart from what they sign, for not
# everyone may see them; `target_key` is a device id or a cross-signing public key.
schema("""
CREATE TABLE device_keys (device_nid INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE one_time_keys (
    key_nid INTEGER PRIMARY KEY,  -- rises in the order of upload
    device_nid INTEGER NOT NULL, algorithm TEXT NOT NULL, key_id TEXT NOT NULL,
    fallback INTEGER NOT NULL, used INTEGER NOT NULL DEFAULT 0,
    digest BLOB NOT NULL,         -- tells whether it is the same key, whatever its signatures
    body BLOB,
    UNIQUE (device_nid, algorithm, key_id, fallback)
);
CREATE INDEX one_time_keys_held ON one_time_keys (device_nid, algorithm, fallback)
    WHERE body IS NOT NULL;
CREATE TABLE cross_signing_keys (
    user_nid INTEGER, usage TEXT, body BLOB NOT NULL, PRIMARY KEY (user_nid, usage)
) WITHOUT ROWID;
CREATE TABLE key_signatures (
    target_nid INTEGER, target_key TEXT, signer_nid INTEGER, signer_key TEXT, signature TEXT,
    PRIMARY KEY (target_nid, target_key, signer_nid, signer_key)
) WITHOUT ROWID;
CREATE INDEX key_signatures_by_signer ON key_signatures (signer_nid, signer_key);
CREATE TABLE device_changes (
    user_nid INTEGER, viewer_nid INTEGER,  -- who alone can see the change; 0: everyone
    pos INTEGER NOT NULL, PRIMARY KEY (user_nid, viewer_nid)
) WITHOUT ROWID;
CREATE INDEX device_changes_by_pos ON device_changes (pos);
CREATE TABLE room_sharing (
    user_nid INTEGER, room_nid INTEGER,  -- and when they last came, or went
    pos INTEGER NOT NULL, joined INTEGER NOT NULL, PRIMARY KEY (user_nid, room_nid)
) WITHOUT ROWID;
CREATE INDEX room_sharing_by_room ON room_sharing (room_nid);
CREATE INDEX room_sharing_by_pos ON room_sharing (pos);
CREATE TABLE backups (
    backup_nid INTEGER PRIMARY KEY AUTOINCREMENT,  -- also the version, so none is used twice
    user_nid INTEGER NOT NULL, body BLOB NOT NULL, etag INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX backups_by_user ON backups (user_nid);
CREATE TABLE backup_sessions (
    backup_nid INTEGER, room_id TEXT, session_id TEXT, body BLOB NOT NULL,
    PRIMARY KEY (backup_nid, room_id, session_id)
);
CREATE TABLE to_device (
    device_nid INTEGER, pos INTEGER, sender_nid INTEGER NOT NULL,
    type TEXT NOT NULL, content BLOB NOT NULL, PRIMARY KEY (device_nid, pos)
);
CREATE TABLE dehydrated_devices (
    user_nid INTEGER PRIMARY KEY, device_nid INTEGER NOT NULL, data BLOB NOT NULL
);
""")

# ── 20.1  What is kept in memory ─────────────────────────────────────────────


class KeyCache:
    """What makes an empty sync free: key counts, queues, and when a device list last changed."""

    def __init__(self, database: Database, position: int, scale: float = 1.0) -> None:
        capacity = int(10_000 * scale)
        self.counts: LruCache[DeviceNid, tuple[dict[str, int], list[str]]] = LruCache(capacity)
        self.queues: LruCache[DeviceNid, tuple[int, int]] = LruCache(capacity)
        self.lists_changed = position
        database.on_reset(self.counts.clear)
        database.on_reset(self.queues.clear)


def key_counts(hs: Homeserver, device_nid: DeviceNid) -> tuple[dict[str, int], list[str]]:
    """How many one-time keys wait by algorithm, and for which the fallback key is unused.

    Trap: signed_curve25519 is named even at zero: clients that see no count upload no keys, and
    nobody can write to them (synapse #10456).
    """
    found = hs.keys.counts.get(device_nid)
    if found is None:
        query = """
            SELECT algorithm, fallback, COUNT(*)
            FROM one_time_keys
            WHERE device_nid = ? AND body IS NOT NULL AND NOT used
            GROUP BY algorithm, fallback
        """
        rows = hs.db.all(query, (device_nid,))
        waiting = {algorithm: count for algorithm, fallback, count in rows if not fallback}
        unused = [algorithm for algorithm, fallback, _ in rows if fallback]
        found = ({"signed_curve25519": 0, **waiting}, unused)
        hs.keys.counts.put(device_nid, found)
    return found


def one_time_key_counts(hs: Homeserver, device_nid: DeviceNid) -> dict[str, int]:
    """How many one-time keys wait, by algorithm."""
    return key_counts(hs, device_nid)[0]


def unused_fallback_types(hs: Homeserver, device_nid: DeviceNid) -> list[str]:
    """The algorithms whose fallback key was not handed out yet."""
    return key_counts(hs, device_nid)[1]


# ── 20.2  Device list changes ────────────────────────────────────────────────


def device_list_changed(hs: Homeserver, user_nid: UserNid, viewer_nid: int = 0) -> None:
    """Tell those who share a room with the user, or one viewer alone, to look up keys again."""
    kind, target = (KEY_COUNTS, viewer_nid) if viewer_nid else (DEVICE_LIST, user_nid)
    hs.keys.lists_changed = pos = hs.stream.stamp(kind, target)
    change = (user_nid, viewer_nid, pos)
    hs.db.execute("INSERT OR REPLACE INTO device_changes VALUES (?, ?, ?)", change)


def note_membership(
    hs: Homeserver, room: Room, user_nid: UserNid, old: str | None, new: str
) -> None:
    """Subscriber of the room store: remember who came to share a room with whom, and who left."""
    if (new == "join") != (old == "join"):
        hs.keys.lists_changed = max(hs.keys.lists_changed, room.last_pos)
        move = (user_nid, room.nid, room.last_pos, new == "join")
        hs.db.execute("INSERT OR REPLACE INTO room_sharing VALUES (?, ?, ?, ?)", move)


def device_list_changes(
    hs: Homeserver, user_nid: UserNid, since: int, upto: int
) -> tuple[list[str], list[str]]:
    """Whose keys the user should look up again, and with whom no room is shared any more.

    Spec: CS-API "Extensions to /sync", device_lists. Trap: the lists may name too many and never
    too few, so what changed after `upto` is named now and once more later.
    """
    if since >= min(upto, hs.keys.lists_changed):
        return [], []
    query = """
        SELECT user_nid, 0
        FROM device_changes
        WHERE pos > :since AND viewer_nid IN (0, :user)
        UNION
        SELECT theirs.user_nid, 1
        FROM room_sharing AS theirs
        CROSS JOIN room_sharing AS mine ON mine.room_nid = theirs.room_nid
        WHERE theirs.pos > :since AND mine.user_nid = :user AND (mine.joined OR mine.pos > :since)
        UNION
        SELECT theirs.user_nid, 1
        FROM room_sharing AS mine
        CROSS JOIN room_sharing AS theirs ON theirs.room_nid = mine.room_nid
        WHERE mine.user_nid = :user AND mine.pos > :since AND theirs.joined
    """
    rows = hs.db.all(query, {"user": user_nid, "since": since})
    moved = {nid for nid, has_moved in rows if has_moved and nid != user_nid}
    near = moved.union(nid for nid, has_moved in rows if not has_moved)
    if len(near) > 50:  # one long look at the rooms instead of many short ones
        sharing = {user_nid, *hs.rooms.users_sharing(user_nid)}
    else:
        sharing = {nid for nid in near if nid == user_nid or hs.rooms.share_room(user_nid, nid)}
    changed, left = map(hs.db.user_id, near & sharing), map(hs.db.user_id, moved - sharing)
    return sorted(changed), sorted(left)


def required_arg(request: Request, name: str) -> str:
    """An argument of the query, or M_MISSING_PARAM."""
    value = request.arg(name)
    if not value:
        raise missing_param(f"The query parameter {name} is missing")
    return value


@route("GET", KEYS + "/changes", auth=USER, also=OLD)
async def get_key_changes(hs: Homeserver, request: Request) -> Json:
    """Name the users whose keys changed between two sync tokens."""
    since, upto = (parse_token(required_arg(request, name)) for name in ("from", "to"))
    changed, left = device_list_changes(hs, request.user.nid, since, upto)
    return {"changed": changed, "left": left}


# ── 20.3  Cross-signing keys and signatures ──────────────────────────────────
#
# Whoever signs here is the caller, with devices or cross-signing keys; `signers`
# are those that count, key id → public key: just what a cross-signing key has in `keys`.

USAGES: Final = ("master", "self_signing", "user_signing")
SIGNED: Final = {"user_id": str, "keys": {str: str}, "signatures?": {str: {str: str}}}
CROSS_SIGNING: Final = {f"{usage}_key?": {**SIGNED, "usage": [str]} for usage in USAGES}


def bounded_json(value: Any, what: str) -> bytes:
    """What the server only keeps, as canonical JSON of bounded length; else M_BAD_JSON or 413."""
    check_canonical(value)
    raw = canonical_json(value)
    if len(raw) > MAX_KEY_BYTES:
        raise too_large(f"{what} has at most {MAX_KEY_BYTES} bytes")
    return raw


def cross_signing_keys_of(hs: Homeserver, user_nid: UserNid | None) -> dict[str, Json]:
    """The cross-signing keys of a user by usage, with the signatures that they came with."""
    query = "SELECT usage, body FROM cross_signing_keys WHERE user_nid = ?"
    return {usage: json.loads(body) for usage, body in hs.db.all(query, (user_nid,))}


def public_key(key: Json) -> str:
    """The one public key in a cross-signing key."""
    return str(next(iter(key["keys"].values()), ""))


def published_keys(hs: Homeserver, device_nid: DeviceNid | None) -> Json | None:
    """The identity keys of a device, as it uploaded them."""
    body = hs.db.value("SELECT body FROM device_keys WHERE device_nid = ?", (device_nid,))
    return None if body is None else cast(Json, json.loads(body))


def device_signers(hs: Homeserver, user_nid: UserNid) -> dict[str, str]:
    """The devices of a user as those that sign."""
    query = """
        SELECT 'ed25519:' || device_id, body
        FROM devices JOIN device_keys USING (device_nid)
        WHERE user_nid = ?
    """
    rows = hs.db.all(query, (user_nid,))
    return {key_id: json.loads(body)["keys"].get(key_id, "") for key_id, body in rows}


def good_signatures(value: Json, user_id: str, signers: dict[str, str]) -> dict[str, str]:
    """The user's signatures by these signers; M_INVALID_SIGNATURE for a wrong one.

    Signatures of keys that the server does not know are left out: nobody could check them.
    """
    given = signatures_by(value, user_id)
    known = {key_id: given[key_id] for key_id in signers if key_id in given}
    for key_id in known:
        if not verify_json(value, user_id, key_id, signers[key_id]):
            raise MatrixError(400, "M_INVALID_SIGNATURE", f"The signature of {key_id} is wrong")
    return known


def forget_signatures(hs: Homeserver, user_nid: UserNid, name: str) -> None:
    """Drop the signatures on and by a key that is gone: a device, or a cross-signing key."""
    query = """
        DELETE FROM key_signatures
        WHERE (target_nid = :user AND target_key = :name)
           OR (signer_nid = :user AND signer_key = 'ed25519:' || :name)
    """
    hs.db.execute(query, {"user": user_nid, "name": name})


def check_cross_signing_key(user_id: str, usage: str, key: Json) -> None:
    """Check what an uploaded cross-signing key says of itself, but not its signatures yet."""
    public = public_key(key)
    raw, named = b64decode(public), {f"ed25519:{public}": public}
    is_key = len(raw) == PUBLIC_KEY_BYTES and b64encode(raw) == public and key["keys"] == named
    if not is_key or key["user_id"] != user_id or usage not in key["usage"]:
        raise invalid_param(f"A {usage} key has its user, its usage, and one key, named by itself")


def check_cross_signing(hs: Homeserver, user: Requester, body: Json) -> dict[str, Json]:
    """The uploaded keys by usage, if their signatures hold against the newest master key."""
    keys = {usage: body[f"{usage}_key"] for usage in USAGES if f"{usage}_key" in body}
    for usage, key in keys.items():
        check_cross_signing_key(user.user_id, usage, key)
    master = keys.get("master") or cross_signing_keys_of(hs, user.nid).get("master")
    if master is None:
        raise missing_param("There is no master key, neither here nor uploaded before")
    names = [public_key(key) for key in {**keys, "master": master}.values()]
    if len(set(names)) < len(names) or any(hs.accounts.find_device(user.nid, n) for n in names):
        raise forbidden("A cross-signing key must differ from the others and from all device ids")
    for usage, key in keys.items():
        signers = device_signers(hs, user.nid) if usage == "master" else master["keys"]
        good = good_signatures(key, user.user_id, signers)
        if usage != "master" and not good:
            raise MatrixError(400, "M_INVALID_SIGNATURE", f"The master key must sign {usage}_key")
        keys[usage] = {**key, "signatures": {user.user_id: good}}
    return keys


def store_cross_signing(hs: Homeserver, user_nid: UserNid, keys: dict[str, Json]) -> None:
    """Keep checked keys; with another master key, all that the old one signed goes."""
    before = cross_signing_keys_of(hs, user_nid)
    masters = [each["master"]["keys"] for each in (before, keys) if "master" in each]
    after = keys if masters[0] != masters[-1] else {**before, **keys}
    if after == before:
        return
    with hs.db.write():
        for public in {*map(public_key, before.values())} - {*map(public_key, after.values())}:
            forget_signatures(hs, user_nid, public)
        hs.db.execute("DELETE FROM cross_signing_keys WHERE user_nid = ?", (user_nid,))
        for usage, key in after.items():
            row = (user_nid, usage, bounded_json(key, "A key"))
            hs.db.execute("INSERT INTO cross_signing_keys VALUES (?, ?, ?)", row)
        device_list_changed(hs, user_nid)


@route("POST", KEYS + "/device_signing/upload", auth=USER, also=OLD, body=CROSS_SIGNING)
async def upload_cross_signing_keys(hs: Homeserver, request: Request) -> Json:
    """Publish cross-signing keys; to replace keys, users prove once more who they are."""
    user = request.user
    keys, stored = check_cross_signing(hs, user, request.json), cross_signing_keys_of(hs, user.nid)
    same = [u for u in keys if u in stored and signed_bytes(stored[u]) == signed_bytes(keys[u])]
    if len(same) < len(keys) and "master" in stored and user.appservice is None:
        await user_interactive_auth(hs, request)
        keys = check_cross_signing(hs, user, request.json)
    store_cross_signing(hs, user.nid, keys)
    return {}


def add_signatures(hs: Homeserver, user: Requester, user_id: str, name: str, value: Json) -> None:
    """Keep the caller's signatures on a key, or raise why there is none to keep.

    Who may sign what; nothing else is stored:

        a device of one's own          one's self-signing key
        one's own master key           one's devices
        somebody else's master key     one's user-signing key     (seen by oneself alone)
    """
    target_nid, mine = hs.db.find_user_nid(user_id), cross_signing_keys_of(hs, user.nid)
    key, is_own = cross_signing_keys_of(hs, target_nid).get("master"), user_id == user.user_id
    usage = "user_signing"
    if key is None or public_key(key) != name:
        device_nid = hs.accounts.find_device(user.nid, name) if is_own else None
        key, usage = published_keys(hs, device_nid), "self_signing"
    if target_nid is None or key is None:
        raise not_found("There is no such key, or it is not for you to sign")
    if signed_bytes(value) != signed_bytes(key):
        raise invalid_param("The signed object is not the key that was uploaded")
    by_devices = is_own and usage == "user_signing"
    signers = device_signers(hs, user.nid) if by_devices else mine.get(usage, {}).get("keys", {})
    found = good_signatures(value, user.user_id, signers)
    if not found:
        raise MatrixError(400, "M_INVALID_SIGNATURE", "No signature of a key that may sign this")
    insert = """
        INSERT INTO key_signatures VALUES (?, ?, ?, ?, ?)
        ON CONFLICT DO UPDATE SET signature = excluded.signature
        WHERE signature <> excluded.signature
    """
    with hs.db.write():
        rows = [(target_nid, name, user.nid, *item) for item in found.items()]
        if sum(hs.db.execute(insert, row).rowcount for row in rows):
            device_list_changed(hs, target_nid, 0 if is_own else user.nid)


@route("POST", KEYS + "/signatures/upload", auth=USER, also=OLD, body={str: {str: dict}})
async def upload_signatures(hs: Homeserver, request: Request) -> Json:
    """Publish signatures on devices and master keys; what fails is answered for each key."""
    failures: Json = {}
    for user_id, targets in request.json.items():
        for name, value in targets.items():
            try:
                add_signatures(hs, request.user, user_id, name, value)
            except MatrixError as error:
                failures.setdefault(user_id, {})[name] = error.to_json()
        await asyncio.sleep(0)
    return {"failures": failures}


# ── 20.4  Uploading device keys and one-time keys ────────────────────────────
#
# What a device says about itself is kept as it is, whatever its algorithms: only
# other clients can tell whether it is true, and they verify each signature.

KEY_UPLOAD: Final = {
    "device_keys?": {**SIGNED, "device_id": str, "algorithms": [str]},
    "one_time_keys?": {str: (str, dict)},
    "fallback_keys?": {str: (str, dict)},
}


def forget_device(hs: Homeserver, user_nid: UserNid, device_nid: DeviceNid, device_id: str) -> None:
    """Drop all keys of a device, and the signatures on and by it."""
    hs.db.execute("DELETE FROM device_keys WHERE device_nid = ?", (device_nid,))
    hs.db.execute("DELETE FROM one_time_keys WHERE device_nid = ?", (device_nid,))
    forget_signatures(hs, user_nid, device_id)
    hs.keys.counts.pop(device_nid)


def store_device_keys(hs: Homeserver, user: Requester, device_nid: DeviceNid, keys: Json) -> None:
    """Keep the identity keys of a device; others than before make void all that hangs on them.

    Spec: CS-API "Cross-signing": devices and cross-signing keys share one namespace.
    """
    device_id = str(user.device_id)
    if (keys["user_id"], keys["device_id"]) != (user.user_id, device_id):
        raise invalid_param("device_keys must name the user and the device of the access token")
    if any(device_id == public_key(key) for key in cross_signing_keys_of(hs, user.nid).values()):
        raise forbidden("The device id is the same as a cross-signing key")
    keys.pop("unsigned", None)
    body, before = bounded_json(keys, "device_keys"), published_keys(hs, device_nid)
    if before == keys:
        return
    if before is not None and signed_bytes(before) != signed_bytes(keys):
        forget_device(hs, user.nid, device_nid, device_id)
    hs.db.execute("INSERT OR REPLACE INTO device_keys VALUES (?, ?)", (device_nid, body))
    device_list_changed(hs, user.nid)


def store_key(
    hs: Homeserver, device_nid: DeviceNid, full_id: str, value: Json | str, fallback: bool
) -> None:
    """Add a one-time key behind those that wait, or replace the fallback key of its algorithm.

    M_INVALID_PARAM for another key under the id of one that waits. Trap: the same key again
    changes nothing, even if it was handed out: clients repeat an upload whose answer was lost.
    """
    algorithm, _, key_id = full_id.partition(":")
    if not algorithm or not key_id or byte_length(full_id) > MAX_ID_BYTES:
        raise invalid_param(f"A key id has the form algorithm:name, unlike {full_id[:80]!r}")
    body = bounded_json(value, full_id)
    signed = signed_bytes(value) if isinstance(value, dict) else body
    digest = hashlib.sha256(signed).digest()[:16]
    query = """
        SELECT digest, used
        FROM one_time_keys
        WHERE device_nid = ? AND algorithm = ? AND key_id = ? AND fallback = ?
    """
    key = (device_nid, algorithm, key_id, fallback)
    known, used = hs.db.one(query, key) or (None, True)
    if known == digest:
        return
    if fallback:
        delete = "DELETE FROM one_time_keys WHERE device_nid = ? AND algorithm = ? AND fallback"
        hs.db.execute(delete, (device_nid, algorithm))
    elif not used:
        raise invalid_param(f"Another one-time key {full_id} exists already")
    insert = """
        INSERT OR REPLACE INTO one_time_keys
        (device_nid, algorithm, key_id, fallback, digest, body) VALUES (?, ?, ?, ?, ?, ?)
    """
    hs.db.execute(insert, (*key, digest, body))


def store_uploaded(hs: Homeserver, user: Requester, device_nid: DeviceNid, body: Json) -> None:
    """Store all keys of an upload, or none of them."""
    added = len(body.get("one_time_keys", ()))
    if sum(one_time_key_counts(hs, device_nid).values()) + added > MAX_ONE_TIME_KEYS:
        raise too_large(f"A device has at most {MAX_ONE_TIME_KEYS} one-time keys")
    with hs.db.write():
        if "device_keys" in body:
            store_device_keys(hs, user, device_nid, body["device_keys"])
        for section, fallback in (("one_time_keys", False), ("fallback_keys", True)):
            for full_id, value in body.get(section, {}).items():
                store_key(hs, device_nid, full_id, value, fallback)
        hs.keys.counts.pop(device_nid)


@route("POST", KEYS + "/upload", auth=GUEST, also=OLD, body=KEY_UPLOAD)
async def upload_keys(hs: Homeserver, request: Request) -> Json:
    """Publish a device's identity, one-time and fallback keys, all of them or none."""
    user, device_nid = request.user, request.user.device_nid
    if device_nid is None or hs.accounts.find_device(user.nid, str(user.device_id)) != device_nid:
        raise invalid_param("This access token belongs to no device")
    store_uploaded(hs, user, device_nid, request.json)
    return {"one_time_key_counts": one_time_key_counts(hs, device_nid)}


# ── 20.5  Querying and claiming ──────────────────────────────────────────────


def split_by_server(hs: Homeserver, wanted: Json) -> tuple[Json, Json]:
    """What is asked of local users, and as `failures` the servers of the others."""
    if not all(map(is_user_id, wanted)):
        raise invalid_param("Keys are asked for by user id")
    local = {user_id: wanted[user_id] for user_id in wanted if hs.is_local(user_id)}
    error = {"errcode": "M_UNREACHABLE", "error": "The server could not be reached"}
    return local, {server_of(user_id): error for user_id in wanted if user_id not in local}


def add_keys_of(
    hs: Homeserver, result: Json, user_nid: UserNid, viewer_nid: UserNid, wanted: list[str]
) -> None:
    """Put one local user's keys into the answer of a query: all devices when none is named.

    Spec: CS-API "Key and signature security": nobody sees another's user-signing key at work.
    """
    user_id, objects = hs.db.user_id(user_nid), {}  # by the name under which they are signed
    devices = """
        SELECT device_id, body, display_name
        FROM devices JOIN device_keys USING (device_nid)
        WHERE user_nid = ?
    """
    for device_id, body, name in hs.db.all(devices, (user_nid,)):
        if not wanted or device_id in wanted:
            unsigned = {"device_display_name": name} if name else {}
            objects[device_id] = {**json.loads(body), "unsigned": unsigned}
    result["device_keys"][user_id] = dict(objects)
    for usage, key in cross_signing_keys_of(hs, user_nid).items():
        if usage != "user_signing" or user_nid == viewer_nid:
            result[f"{usage}_keys"][user_id] = objects[public_key(key)] = key
    signatures = """
        SELECT target_key, signer_nid, signer_key, signature
        FROM key_signatures
        WHERE target_nid = :target AND signer_nid IN (:target, :viewer)
    """
    parameters = {"target": user_nid, "viewer": viewer_nid}
    for name, signer_nid, key_id, signature in hs.db.all(signatures, parameters):
        if name in objects:
            signed = objects[name].setdefault("signatures", {})
            signed.setdefault(hs.db.user_id(signer_nid), {})[key_id] = signature


@route("POST", KEYS + "/query", auth=GUEST, also=OLD, body={"device_keys": {str: [str]}})
async def query_keys(hs: Homeserver, request: Request) -> Json:
    """Give the devices and cross-signing keys of users, with the signatures one may see."""
    local, failures = split_by_server(hs, request.json["device_keys"])
    result: Json = {f"{usage}_keys": {} for usage in ("device", *USAGES)}
    for user_id, devices in local.items():
        user_nid = hs.db.find_user_nid(user_id)
        if user_nid is not None:
            add_keys_of(hs, result, user_nid, request.user.nid, devices)
        await asyncio.sleep(0)
    return {**result, "failures": failures}


def claim_key(hs: Homeserver, user_nid: UserNid, device_id: str, algorithm: str) -> Json | None:
    """Hand out the one-time key of a device that was uploaded first, or else its fallback key."""
    device_nid = hs.accounts.find_device(user_nid, device_id)
    query = """
        SELECT key_nid, key_id, fallback, used, body
        FROM one_time_keys
        WHERE device_nid = ? AND algorithm = ? AND body IS NOT NULL
        ORDER BY fallback, key_nid
        LIMIT 1
    """
    row = hs.db.one(query, (device_nid, algorithm))
    if device_nid is None or row is None:
        return None
    key_nid, key_id, fallback, used, body = row
    if not used:
        rest = body if fallback else None
        update = "UPDATE one_time_keys SET used = 1, body = ? WHERE key_nid = ?"
        hs.db.execute(update, (rest, key_nid))
        hs.keys.counts.pop(device_nid)
        hs.stream.stamp(KEY_COUNTS, user_nid)
    return {f"{algorithm}:{key_id}": json.loads(body)}


@route("POST", KEYS + "/claim", auth=GUEST, also=OLD, body={"one_time_keys": {str: {str: str}}})
async def claim_keys(hs: Homeserver, request: Request) -> Json:
    """Hand out one-time keys, each to one caller only; else the fallback key."""
    local, failures = split_by_server(hs, request.json["one_time_keys"])
    found: Json = {}
    for user_id, devices in local.items():
        user_nid = hs.db.find_user_nid(user_id)
        if user_nid is None:
            continue
        with hs.db.write():
            for device_id, algorithm in devices.items():
                key = claim_key(hs, user_nid, device_id, algorithm)
                if key is not None:
                    found.setdefault(user_id, {})[device_id] = key
        await asyncio.sleep(0)
    return {"failures": failures, "one_time_keys": found}


# ── 20.6  Key backup ─────────────────────────────────────────────────────────
#
# All sessions of a version, those of a room, and a single one are each a span of the
# table's key (room id, session id): one query reads them, one statement deletes them.

SESSION: Final = {
    "first_message_index": int,
    "forwarded_count": int,
    "is_verified": bool,
    "session_data": dict,
}
ROOM_SESSIONS: Final = {"sessions": {str: SESSION}}
ALL_SESSIONS: Final = ROOM_KEYS + "/keys"
SESSIONS_OF_ROOM: Final = ALL_SESSIONS + "/{room_id}"
ONE_SESSION: Final = SESSIONS_OF_ROOM + "/{session_id}"
BACKUPS: Final = ROOM_KEYS + "/version"
ONE_BACKUP: Final = BACKUPS + "/{version}"
BACKUP: Final = {"algorithm": str, "auth_data": dict, "version?": str}
SESSIONS_CHANGED: Final = "UPDATE backups SET etag = etag + 1 WHERE backup_nid = ?"
LAST_ID = "\U0010ffff" * 64  # behind every id


def get_backup(hs: Homeserver, request: Request, version: str | None) -> tuple[int, Json]:
    """The number and the description of a version of the caller's backup, or of the newest."""
    query = """
        SELECT backup_nid, body
        FROM backups
        WHERE user_nid = :user AND (:version IS NULL OR CAST(backup_nid AS TEXT) = :version)
        ORDER BY backup_nid DESC
        LIMIT 1
    """
    row = hs.db.one(query, {"user": request.user.nid, "version": version})
    if row is None:
        raise not_found("There is no such version of the backup")
    return row[0], json.loads(row[1])


def backup_counts(hs: Homeserver, backup_nid: int) -> Json:
    """What is answered to each change: clients see by the etag whether others wrote too."""
    etag = hs.db.value("SELECT etag FROM backups WHERE backup_nid = ?", (backup_nid,))
    query = "SELECT COUNT(*) FROM backup_sessions WHERE backup_nid = ?"
    return {"etag": str(etag), "count": hs.db.value(query, (backup_nid,))}


@route("POST", BACKUPS, auth=USER, also=OLD, body=BACKUP)
async def create_backup(hs: Homeserver, request: Request) -> Json:
    """Begin a new version of the key backup."""
    described = {name: request.json[name] for name in ("algorithm", "auth_data")}
    body = bounded_json(described, "A backup")
    insert = "INSERT INTO backups (user_nid, body) VALUES (?, ?)"
    with hs.db.write():
        return {"version": str(hs.db.execute(insert, (request.user.nid, body)).lastrowid)}


@route("GET", BACKUPS, auth=USER, also=OLD)
@route("GET", ONE_BACKUP, auth=USER, also=OLD)
async def describe_backup(hs: Homeserver, request: Request, version: str | None = None) -> Json:
    """Describe a version of the key backup, or the newest."""
    backup_nid, described = get_backup(hs, request, version)
    return {**described, "version": str(backup_nid), **backup_counts(hs, backup_nid)}


@route("PUT", ONE_BACKUP, auth=USER, also=OLD, body=BACKUP)
async def update_backup(hs: Homeserver, request: Request, version: str) -> Json:
    """Replace the auth_data of a version, and nothing else."""
    backup_nid, described = get_backup(hs, request, version)
    asked = request.json["algorithm"], request.json.get("version", version)
    if asked != (described["algorithm"], version):
        raise invalid_param("The algorithm and the version must be those that the backup has")
    body = bounded_json({**described, "auth_data": request.json["auth_data"]}, "A backup")
    with hs.db.write():
        hs.db.execute("UPDATE backups SET body = ? WHERE backup_nid = ?", (body, backup_nid))
    return {}


@route("DELETE", ONE_BACKUP, auth=USER, also=OLD)
async def delete_backup(hs: Homeserver, request: Request, version: str) -> Json:
    """Delete a version with all its keys."""
    backup_nid, _ = get_backup(hs, request, version)
    with hs.db.write():
        hs.db.execute("DELETE FROM backup_sessions WHERE backup_nid = ?", (backup_nid,))
        hs.db.execute("DELETE FROM backups WHERE backup_nid = ?", (backup_nid,))
    return {}


def session_span(room_id: str | None = None, session_id: str | None = None) -> tuple[str, ...]:
    """Room and session where the backup, a room or a session begins, and where it ends."""
    last_room = LAST_ID if room_id is None else room_id
    return room_id or "", session_id or "", last_room, LAST_ID if session_id is None else session_id


def read_sessions(hs: Homeserver, backup_nid: int, **at: str) -> list[tuple[str, bytes]]:
    """The sessions of a room, or a single one: id, body."""
    query = """
        SELECT session_id, body
        FROM backup_sessions
        WHERE backup_nid = ?
          AND (room_id, session_id) >= (?, ?)
          AND (room_id, session_id) <= (?, ?)
    """
    return hs.db.all(query, (backup_nid, *session_span(**at)))


def session_rank(session: Json) -> tuple[bool, int, int]:
    """The higher one of two uploads of a session stays.

    Spec: CS-API "Server-side key backups": verified before not, then the lower index, then the
    fewer hands it went through.
    """
    verified: bool = session["is_verified"]
    return verified, -session["first_message_index"], -session["forwarded_count"]


@route("PUT", ALL_SESSIONS, auth=USER, also=OLD, body={"rooms": {str: ROOM_SESSIONS}})
@route("PUT", SESSIONS_OF_ROOM, auth=USER, also=OLD, body=ROOM_SESSIONS)
@route("PUT", ONE_SESSION, auth=USER, also=OLD, body=SESSION)
async def put_sessions(hs: Homeserver, request: Request, **at: str) -> Json:
    """Store sessions in the newest version, each if it is better than what is there."""
    version, body = required_arg(request, "version"), request.json
    if "session_id" in at:
        body = {"sessions": {at["session_id"]: body}}
    rooms = {at["room_id"]: body} if "room_id" in at else body["rooms"]
    sessions = [(room, *item) for room in rooms for item in rooms[room]["sessions"].items()]
    backup_nid, newest = get_backup(hs, request, version)[0], get_backup(hs, request, None)[0]
    if backup_nid != newest:
        error = "This is not the current version of the backup"
        raise MatrixError(403, "M_WRONG_ROOM_KEYS_VERSION", error, current_version=str(newest))
    insert = "INSERT OR REPLACE INTO backup_sessions VALUES (?, ?, ?, ?)"
    with hs.db.write():
        for room_id, session_id, new in sessions:
            body = bounded_json(new, "A session")
            old = read_sessions(hs, backup_nid, room_id=room_id, session_id=session_id)
            if not old or session_rank(new) > session_rank(json.loads(old[0][1])):
                hs.db.execute(insert, (backup_nid, room_id, session_id, body))
                hs.db.execute(SESSIONS_CHANGED, (backup_nid,))
    return backup_counts(hs, backup_nid)


def room_as_json(hs: Homeserver, backup_nid: int, room_id: str) -> bytes:
    """The sessions of one room."""
    rows = read_sessions(hs, backup_nid, room_id=room_id)
    members = [b"%s:%s" % (encode_json(name), body) for name, body in rows]
    return b'{"sessions":{%s}}' % b",".join(members)


async def backup_as_json(hs: Homeserver, backup_nid: int) -> AsyncIterator[bytes]:
    """A whole backup, room by room: ten years of keys need not fit into memory."""
    query = "SELECT DISTINCT room_id FROM backup_sessions WHERE backup_nid = ?"
    before = b'{"rooms":{'
    for (room_id,) in hs.db.all(query, (backup_nid,)):
        yield b"%s%s:%s" % (before, encode_json(room_id), room_as_json(hs, backup_nid, room_id))
        before = b","
        await asyncio.sleep(0)
    yield b"}}" if before == b"," else before + b"}}"


@route("GET", ALL_SESSIONS, auth=USER, also=OLD)
@route("GET", SESSIONS_OF_ROOM, auth=USER, also=OLD)
@route("GET", ONE_SESSION, auth=USER, also=OLD)
async def get_sessions(hs: Homeserver, request: Request, **at: str) -> Response:
    """Give all sessions of a version, those of one room, or a single one."""
    backup_nid, _ = get_backup(hs, request, required_arg(request, "version"))
    if not at:
        return Response(body=backup_as_json(hs, backup_nid))
    if "session_id" not in at:
        return Response(body=room_as_json(hs, backup_nid, at["room_id"]))
    found = read_sessions(hs, backup_nid, **at)
    if not found:
        raise not_found("The backup has no such session")
    return Response(body=found[0][1])


@route("DELETE", ALL_SESSIONS, auth=USER, also=OLD)
@route("DELETE", SESSIONS_OF_ROOM, auth=USER, also=OLD)
@route("DELETE", ONE_SESSION, auth=USER, also=OLD)
async def delete_sessions(hs: Homeserver, request: Request, **at: str) -> Json:
    """Delete what get_sessions gives."""
    backup_nid, _ = get_backup(hs, request, required_arg(request, "version"))
    delete = """
        DELETE FROM backup_sessions
        WHERE backup_nid = ?
          AND (room_id, session_id) >= (?, ?)
          AND (room_id, session_id) <= (?, ?)
    """
    with hs.db.write():
        if hs.db.execute(delete, (backup_nid, *session_span(**at))).rowcount:
            hs.db.execute(SESSIONS_CHANGED, (backup_nid,))
    return backup_counts(hs, backup_nid)


# ── 20.7  To-device messages ─────────────────────────────────────────────────
#
# A message waits in the queue of its device until that device syncs with a token
# behind it: the token says that the answer which carried the message arrived. So
# an answer that was lost is given again, and nothing comes twice to a client that
# goes on from the token it has. A full queue refuses the newest message: what waits
# was promised, and the oldest are the keys to the messages that are read first.


def queue_of(hs: Homeserver, device_nid: DeviceNid) -> tuple[int, int]:
    """What waits for a device: its size in bytes, and the position of the newest message."""
    queue = hs.keys.queues.get(device_nid)
    if queue is None:
        query = """
            SELECT IFNULL(SUM(LENGTH(content) + ?), 0), IFNULL(MAX(pos), 0)
            FROM to_device
            WHERE device_nid = ?
        """
        queue = hs.db.one(query, (MESSAGE_OVERHEAD, device_nid)) or (0, 0)
        hs.keys.queues.put(device_nid, queue)
    return queue


def queue_to_device(
    hs: Homeserver, sender_nid: UserNid, kind: str, user_nid: UserNid, messages: Mapping[str, bytes]
) -> None:
    """Put messages into the queues of a local user's devices; inside a write block.

    They come by device id; "*" is for all devices that are not named.
    """
    pos = hs.stream.stamp(TO_DEVICE, user_nid)
    rows = hs.db.all("SELECT device_nid, device_id FROM devices WHERE user_nid = ?", (user_nid,))
    for device_nid, device_id in rows:
        raw = messages.get(device_id, messages.get("*"))
        if raw is None:
            continue
        size = queue_of(hs, device_nid)[0] + len(raw) + MESSAGE_OVERHEAD
        if size <= MAX_QUEUE_BYTES:
            row = (device_nid, pos, sender_nid, kind, raw)
            hs.db.execute("INSERT INTO to_device VALUES (?, ?, ?, ?, ?)", row)
            hs.keys.queues.put(device_nid, (size, pos))


def to_device_messages(
    hs: Homeserver, requester: Requester, since: int, upto: int, limit: int = 100
) -> tuple[list[Json], int]:
    """The messages of a device after `since`, and the position up to which these are all.

    When more than `limit` wait, that position is before `upto`, and the sync token must not be
    beyond it.  Spec: CS-API "Send-to-Device messaging", server behaviour.
    """
    device_nid = requester.device_nid
    if device_nid is None or queue_of(hs, device_nid)[1] <= since:
        return [], upto
    query = """
        SELECT pos, sender_nid, type, content
        FROM to_device
        WHERE device_nid = ? AND pos > ? AND pos <= ?
        ORDER BY pos
        LIMIT ?
    """
    rows = hs.db.all(query, (device_nid, since, upto, limit + 1))
    messages = [
        {"sender": hs.db.user_id(sender_nid), "type": kind, "content": json.loads(content)}
        for _, sender_nid, kind, content in rows[:limit]
    ]
    return messages, rows[limit - 1][0] if len(rows) > limit else upto


def acknowledge_to_device(hs: Homeserver, requester: Requester, since: int) -> None:
    """Delete what the device has received: it came back with the token that ended that answer."""
    device_nid = requester.device_nid
    if device_nid is None or not queue_of(hs, device_nid)[0]:
        return
    delete = "DELETE FROM to_device WHERE device_nid = ? AND pos <= ?"
    with hs.db.write():
        if hs.db.execute(delete, (device_nid, since)).rowcount:
            hs.keys.queues.pop(device_nid)


@route("PUT", SEND_TO_DEVICE, auth=GUEST, also=OLD, body={"messages": {str: {str: dict}}})
async def send_to_device(hs: Homeserver, request: Request, event_type: str, txn_id: str) -> Json:
    """Send messages to devices; devices that do not exist are passed over."""
    if byte_length(event_type) > MAX_ID_BYTES:
        raise invalid_param(f"An event type has at most {MAX_ID_BYTES} bytes")
    messages = {
        user_id: {device: bounded_json(content, "A message") for device, content in named.items()}
        for user_id, named in request.json["messages"].items()
    }
    scope = f"sendToDevice/{event_type}"
    if repeated_transaction(hs, request.user, scope, txn_id) is not None:
        return {}
    with hs.db.write():
        for user_id, named in messages.items():
            user_nid = hs.db.find_user_nid(user_id) if hs.is_local(user_id) else None
            if user_nid is not None:
                queue_to_device(hs, request.user.nid, event_type, user_nid, named)
        record_transaction(hs, request.user, scope, txn_id, "{}")
    return {}


# ── 20.8  Dehydrated devices ─────────────────────────────────────────────────
#
# A device that nobody holds in the hand: while all phones are off it collects keys
# for the next one, which can decrypt its private half (`device_data`) with the
# recovery key. It has no access token; to everybody else it is like any other.
#                                                                  spec: MSC3814

DEHYDRATED: Final = "/_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device"
DEHYDRATED_EVENTS: Final = DEHYDRATED + "/{device_id}/events"
DEHYDRATED_UPLOAD: Final = {
    **{"device_id": str, "device_data": {"algorithm": str}, "initial_device_display_name?": str},
    **KEY_UPLOAD,
    "device_keys": KEY_UPLOAD["device_keys?"],
}


def find_dehydrated(hs: Homeserver, user_nid: UserNid) -> tuple[DeviceNid, str, Json] | None:
    """The dehydrated device of a user: its integer, its id, its data."""
    query = """
        SELECT device_nid, device_id, data
        FROM dehydrated_devices JOIN devices USING (device_nid)
        WHERE dehydrated_devices.user_nid = ?
    """
    row = hs.db.one(query, (user_nid,))
    return None if row is None else (row[0], row[1], json.loads(row[2]))


def get_dehydrated(hs: Homeserver, request: Request) -> tuple[DeviceNid, str, Json]:
    """The dehydrated device of the user who asks, or 404."""
    found = find_dehydrated(hs, request.user.nid)
    if found is None:
        raise not_found("You have no dehydrated device")
    return found


@route("PUT", DEHYDRATED, auth=USER, body=DEHYDRATED_UPLOAD)
async def put_dehydrated_device(hs: Homeserver, request: Request) -> Json:
    """Make the user's dehydrated device with its keys, in the place of an earlier one."""
    user, body, device_id = request.user, request.json, request.json["device_id"]
    check_device_texts(body)
    before = find_dehydrated(hs, user.nid)
    taken = hs.accounts.find_device(user.nid, device_id)
    if not device_id or (taken is not None and (before is None or taken != before[0])):
        raise invalid_param("A dehydrated device needs an id that no other device has")
    data = bounded_json(body["device_data"], "device_data")
    name = body.get("initial_device_display_name")
    with hs.db.write():
        if before is not None:
            hs.accounts.delete_devices(user.nid, [before[1]])
        device_nid = hs.accounts.add_device(user.nid, device_id, name)
        device = dataclasses.replace(user, device_id=device_id, device_nid=device_nid)
        store_uploaded(hs, device, device_nid, body)
        row = (user.nid, device_nid, data)
        hs.db.execute("INSERT INTO dehydrated_devices VALUES (?, ?, ?)", row)
    return {"device_id": device_id}


@route("GET", DEHYDRATED, auth=USER)
async def get_dehydrated_device(hs: Homeserver, request: Request) -> Json:
    """The dehydrated device, for a new device to wake it up."""
    _, device_id, data = get_dehydrated(hs, request)
    return {"device_id": device_id, "device_data": data}


@route("DELETE", DEHYDRATED, auth=USER)
async def delete_dehydrated_device(hs: Homeserver, request: Request) -> Json:
    """Delete the dehydrated device; no password is needed for one that nobody holds."""
    _, device_id, _ = get_dehydrated(hs, request)
    hs.accounts.delete_devices(request.user.nid, [device_id])
    return {"device_id": device_id}


@route("GET", DEHYDRATED_EVENTS, auth=USER)
@route("POST", DEHYDRATED_EVENTS, auth=USER, body={"next_batch?": str})
async def get_dehydrated_events(hs: Homeserver, request: Request, device_id: str) -> Json:
    """What was sent to the dehydrated device, a batch at a time; all of it stays until it goes.

    POST names an end always, GET only if there is more.  403 for any other device.
    """
    found, is_post = find_dehydrated(hs, request.user.nid), request.method == "POST"
    if found is None or found[1] != device_id:
        raise forbidden("This is not your dehydrated device")
    token = request.json.get("next_batch") if is_post else request.arg("from")
    since = parse_token(token) if token else 0
    limit, upto = request.int_arg("limit", 100, 1, 1000), hs.stream.position
    device = dataclasses.replace(request.user, device_id=device_id, device_nid=found[0])
    events, end = to_device_messages(hs, device, since, upto, limit)
    return {
        "events": events,
        **({"next_batch": stream_token(end)} if is_post or end < upto else {}),
    }


# ── 20.9  Devices and accounts that go away ──────────────────────────────────


def device_removed(
    hs: Homeserver, user_nid: UserNid, device_nid: DeviceNid, device_id: str
) -> None:
    """Subscriber of the accounts: a device is gone, and with it its keys and its queue."""
    had_keys = published_keys(hs, device_nid) is not None
    with hs.db.write():
        forget_device(hs, user_nid, device_nid, device_id)
        hs.db.execute("DELETE FROM to_device WHERE device_nid = ?", (device_nid,))
        delete = "DELETE FROM dehydrated_devices WHERE user_nid = ? AND device_nid = ?"
        hs.db.execute(delete, (user_nid, device_nid))
        hs.keys.queues.pop(device_nid)
        if had_keys:
            device_list_changed(hs, user_nid)


def device_renamed(hs: Homeserver, user_nid: UserNid, device_nid: DeviceNid, _: str) -> None:
    """Subscriber of the accounts: the display name is part of what a key query answers."""
    if published_keys(hs, device_nid) is not None:
        with hs.db.write():
            device_list_changed(hs, user_nid)


def account_deactivated(hs: Homeserver, user_nid: UserNid) -> None:
    """Subscriber of the accounts: nobody will need these keys and backups again."""
    sessions = """
        DELETE FROM backup_sessions
        WHERE backup_nid IN (SELECT backup_nid FROM backups WHERE user_nid = ?)
    """
    with hs.db.write():
        for key in cross_signing_keys_of(hs, user_nid).values():
            forget_signatures(hs, user_nid, public_key(key))
        hs.db.execute("DELETE FROM cross_signing_keys WHERE user_nid = ?", (user_nid,))
        hs.db.execute(sessions, (user_nid,))
        hs.db.execute("DELETE FROM backups WHERE user_nid = ?", (user_nid,))
        device_list_changed(hs, user_nid)


invariant(
    "keys of and messages for devices that are gone",
    """
    SELECT device_nid FROM device_keys
    UNION SELECT device_nid FROM one_time_keys
    UNION SELECT device_nid FROM to_device
    UNION SELECT device_nid FROM dehydrated_devices
    EXCEPT SELECT device_nid FROM devices
    """,
)
# ═════════════════════════════════════════════════════════════════════════════
#  21. SYNC
#
#  A client asks what is new since a token, and waits when nothing is. The token
#  is a stream position; what lies behind it is found in the stream's log, so that
#  an empty answer costs the same with ten rooms and with a thousand.
#                                       spec: CS-API "Syncing", "Lazy-loading"
# ═════════════════════════════════════════════════════════════════════════════

MAX_SYNC_LIMIT = 100  # timeline events of a room in one answer
MAX_SYNC_TIMEOUT_MS = 300_000
HEROES = 5
YIELD_SECONDS = 0.01  # how long a big sync may hold the loop before others get a turn

# ── 21.1  Waiting ────────────────────────────────────────────────────────────

ROOM_KINDS = frozenset({ROOM_EVENT, RECEIPT, TYPING})
SHARED_KINDS = frozenset({DEVICE_LIST, PRESENCE})  # what those who share a room with the user hear


class Notifier:
    """Wakes the syncs that wait, by user, when the stream moves."""

    def __init__(self, rooms: Rooms, stream: Stream) -> None:
        self.rooms = rooms
        self._waiting: dict[UserNid, set[asyncio.Future[bool]]] = {}
        stream.subscribe(self.on_change)
        rooms.subscribe_membership(lambda _room, user_nid, _old, _new: self.wake({user_nid}))

    def on_change(self, kind: str, target: int) -> None:
        """Wake whom a change concerns."""
        if not self._waiting:
            return
        if kind in ROOM_KINDS:
            self.wake(self.rooms.by_nid(RoomNid(target)).local_joined)
            return
        self.wake({UserNid(target)})
        if kind in SHARED_KINDS:
            self.wake(self.rooms.users_sharing(UserNid(target)))

    def wake(self, users: set[UserNid]) -> None:
        """Wake all syncs of these users."""
        for user_nid in self._waiting.keys() & users:  # walks over the smaller of the two
            for future in self._waiting.pop(user_nid):
                if not future.done():
                    future.set_result(True)

    async def wait(self, request: Request, seconds: float) -> bool:
        """Wait for something that may concern the requester; False when the time is over."""
        if seconds <= 0:
            return False
        user_nid = request.user.nid
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(user_nid, set()).add(future)
        try:
            return await request.wait(future, seconds)
        finally:
            waiting = self._waiting.get(user_nid, set())
            waiting.discard(future)
            if not waiting:
                self._waiting.pop(user_nid, None)


# ── 21.2  What is asked for ──────────────────────────────────────────────────


def split_field(path: str) -> list[str]:
    """The keys of a dotted path, in which a dot or backslash of a key is escaped.

    Spec: appendices "Dot-separated property paths".
    """
    parts = re.findall(r"(?:\\.|[^.\\]|\\$)+", path)
    return [re.sub(r"\\([.\\])", r"\1", part) for part in parts]


class SyncFilter:
    """A whole filter, its parts ready to be asked.  Spec: CS-API "Filtering"."""

    def __init__(self, definition: Json) -> None:
        room = definition.get("room") or {}
        self.rooms = EventFilter({key: room[key] for key in ("rooms", "not_rooms") if key in room})
        self.timeline = EventFilter(room.get("timeline") or {})
        self.state = EventFilter(room.get("state") or {})
        self.ephemeral = EventFilter(room.get("ephemeral") or {})
        self.room_data = EventFilter(room.get("account_data") or {})
        self.presence = EventFilter(definition.get("presence") or {})
        self.account_data = EventFilter(definition.get("account_data") or {})
        self.include_leave = room.get("include_leave") is True
        self.federation_format = definition.get("event_format") == "federation"
        fields = definition.get("event_fields")
        self.fields = None if fields is None else [split_field(one) for one in fields]
        self.limit = min(self.timeline.limit, MAX_SYNC_LIMIT)


def copy_field(source: Json, target: Json, path: list[str]) -> None:
    """Copy one member, with the objects around it."""
    for key in path[:-1]:
        inner = source.get(key)
        if not isinstance(inner, dict):
            return
        source, target = inner, target.setdefault(key, {})
    if path and path[-1] in source:
        target[path[-1]] = source[path[-1]]


class SyncReader:
    """Who asks what is new, and from where on; both kinds of sync ask with it."""

    state_after = True  # whether the state is wanted behind the timeline, or before it

    def __init__(self, hs: Homeserver, request: Request, wanted: SyncFilter) -> None:
        self.hs = hs
        self.user = request.user
        self.nid = request.user.nid
        self.wanted = wanted
        self.since: int | None = None
        self.to_device_since = 0
        self.upto = hs.stream.position
        self.ignored = ignored_users(hs, self.nid)

    def format(self, event: Event, relations: Json | None = None) -> Json:
        """An event of a room's section, in the form for this reader."""
        whole = client_event(self.hs.rooms, event, self.user.device_nid, room_id=False)
        if relations is not None:
            whole["unsigned"]["m.relations"] = relations
        return whole


class SyncRequest(SyncReader):
    """One call of /sync: from where on, and in what form."""

    def __init__(self, hs: Homeserver, request: Request, wanted: SyncFilter) -> None:
        super().__init__(hs, request, wanted)
        self.full_state = request.bool_arg("full_state", False)
        self.state_name, self.state_after = "state", False
        for prefix in ("org.matrix.msc4222.", ""):
            if request.bool_arg(f"{prefix}use_state_after", False):
                self.state_name, self.state_after = f"{prefix}state_after", True
        token = request.arg("since")
        position = parse_token(token) if token else None
        # A position still to come is from a database that was put back: then all begins anew.
        if token and position is not None and position <= hs.stream.position:
            self.since, behind = position, token.partition("_")[2]
            self.to_device_since = int(behind) if behind else position

    def format(self, event: Event, relations: Json | None = None) -> Json:
        """An event of a room's section, in the form that the filter asks for."""
        if self.wanted.federation_format:
            whole = {**event.pdu, "event_id": event.event_id}
        else:
            whole = super().format(event, relations)
        if self.wanted.fields is None:
            return whole
        result: Json = {}
        for path in self.wanted.fields:
            copy_field(whole, result, path)
        return result

    def pick_data(
        self, wanted: EventFilter, events: Iterable[Json], room_id: str | None = None
    ) -> list[Json]:
        """The account data that passes a filter, for which the user counts as the sender."""
        user_id = self.user.user_id
        if room_id is not None and not wanted.wants_room(room_id):
            return []
        return [one for one in events if wanted.wants(one["type"], user_id, one["content"])]


# ── 21.3  What has changed ───────────────────────────────────────────────────


class Changes(NamedTuple):
    """What may be new for a user since a position, before anything is read."""

    rooms: set[RoomNid]
    receipts: set[RoomNid]
    typing: set[RoomNid]
    kinds: set[str]


def changes_in_tables(ask: SyncReader, since: int) -> Changes:
    """The same for a token older than the log: all kinds, and each room with a newer event."""
    rows = ask.hs.db.all(
        """
        SELECT room_nid, last_pos
        FROM memberships
        JOIN rooms USING (room_nid)
        WHERE user_nid = ?
        """,
        (ask.nid,),
    )
    rooms = {room_nid for room_nid, last_pos in rows if last_pos > since}
    kinds = {ROOM_DATA, ACCOUNT_DATA, TO_DEVICE, DEVICE_LIST, KEY_COUNTS, PRESENCE}
    return Changes(rooms, {room_nid for room_nid, _ in rows}, set(), kinds)


def changes_since(ask: SyncReader, since: int) -> Changes:
    """Find what may be new, in the stream's log or, behind a restart, in the tables."""
    log = ask.hs.stream.since(since)
    found = changes_in_tables(ask, since) if log is None else Changes(set(), set(), set(), set())
    mine = ask.hs.rooms.memberships(ask.nid)
    by_kind = {ROOM_EVENT: found.rooms, RECEIPT: found.receipts, TYPING: found.typing}
    for kind, target in log or ():
        rooms = by_kind.get(kind)
        if rooms is None:
            if target == ask.nid or kind in SHARED_KINDS:
                found.kinds.add(kind)
        elif target in mine:
            rooms.add(RoomNid(target))
    if ask.to_device_since < since:  # the last answer did not have room for all messages
        found.kinds.add(TO_DEVICE)
    return found


# ── 21.4  Timelines ──────────────────────────────────────────────────────────


class Timeline(NamedTuple):
    """The newest events of a room for one answer, oldest first; `complete` leaves out no state."""

    events: list[Event]
    limited: bool
    prev_batch: str
    complete: bool


def timeline_of(ask: SyncReader, room: Room, since: int | None, upto: int) -> Timeline:
    """The newest events after `since`, as many as the filter allows."""
    rooms, wanted, limit = ask.hs.rooms, ask.wanted.timeline, ask.wanted.limit
    low = MIN_POSITION if since is None else since
    if not wanted.wants_room(room.room_id):
        return Timeline([], False, stream_token(upto), False)
    page = read_page(ask.hs, ask.nid, room, (low, upto), wanted, limit, backwards=True)
    limited = page.more and bool(rooms.events_between(room, low, page.end, 1))
    first = page.events[-1].pos if page.events else upto + 1
    events = page.events[::-1]
    prev_batch = stream_token(cast(int, first) - 1)
    return Timeline(events, limited, prev_batch, wanted.passes_all and not limited)


def without_gap(ask: SyncRequest, room: Room, timeline: Timeline) -> Timeline:
    """A timeline from behind any gap in which state changed that it had set before.

    Trap: who was away may see what came before and after. A client that applies an old name from
    before the gap would keep it, for the newer one lies within and is not sent.
    """
    gaps: dict[StateKey, int] = {}  # by what the timeline sets, the unseen event that came after
    if timeline.events:
        shown = {event.nid for event in timeline.events}
        first = cast(int, timeline.events[0].pos) - 1
        for event in ask.hs.rooms.events_between(room, first, ask.upto, MAX_PAGE):
            if event.is_state and event.nid in shown:
                gaps[event.key] = 0
            elif event.is_state and event.key in gaps:
                gaps[event.key] = event.nid
    gap = max(gaps.values(), default=0)
    if not gap:
        return timeline
    events = [event for event in timeline.events if event.nid > gap]
    return Timeline(events, True, stream_token(gap), False)


# ── 21.5  State ──────────────────────────────────────────────────────────────


def group_at(ask: SyncReader, room: Room, position: int) -> int | None:
    """The state group of a room at a position; None before its first event."""
    if position >= room.last_pos:
        return room.group
    event = ask.hs.rooms.event_at(room, position)
    return None if event is None else event.state_group


def before_timeline(
    state: dict[StateKey, EventNid], events: list[Event], since: int | None
) -> dict[StateKey, EventNid]:
    """Undo in a state, or in a difference since a position, what the timeline's events did.

    Trap: what a filter keeps out of the timeline must stay, or the client never gets it.
    """
    for event in reversed(events):
        if event.is_state:
            state.pop(event.key, None)
            if event.replaces is not None and (since is None or event.replaces > since):
                state[event.key] = event.replaces
    return state


def changed_state(
    ask: SyncReader, room: Room, since: int | None, timeline: Timeline, upto: int
) -> dict[StateKey, EventNid]:
    """The entries of the state that are new to the client at the point that counts."""
    has_state = any(event.is_state for event in timeline.events)
    if since is not None and timeline.complete and not (ask.state_after and has_state):
        return {}
    groups = ask.hs.rooms.groups
    new = group_at(ask, room, upto)
    old = None if since is None else group_at(ask, room, since)
    if new is None:
        return {}
    if old is not None:
        state = groups.named(groups.difference(old, new))
    else:
        state = dict(room.state) if new == room.group else groups.named(groups.read(new))
    return state if ask.state_after else before_timeline(state, timeline.events, since)


def others_in(ask: SyncReader, room: Room) -> list[str]:
    """Up to five others in the room, from whom a client can make a name for it."""
    found: list[UserNid] = []
    for memberships in (("join", "invite"), ("leave", "ban")):
        for wanted in memberships:
            nids = (nid for nid, value in room.members_by_nid.items() if value == wanted)
            others = (nid for nid in nids if nid != ask.nid)
            found += itertools.islice(others, HEROES - len(found))
        if found:  # those who left count only in an empty room
            break
    return [ask.hs.db.user_id(nid) for nid in found]


def heroes(ask: SyncRequest, room: Room) -> list[str] | None:
    """The others in a room that has neither a name nor an alias, or None."""
    alias = room.content("m.room.canonical_alias").get("alias")
    return None if alias or room.content("m.room.name").get("name") else others_in(ask, room)


def choose_members(
    ask: SyncRequest,
    room: Room,
    state: dict[StateKey, EventNid],
    timeline: Timeline,
    *,
    whole: bool,
) -> dict[StateKey, EventNid]:
    """With lazy-loading: of the members only who speaks in the timeline, oneself, and heroes.

    Spec: CS-API "Lazy-loading room members". What a device was sent it is not sent again, once it
    came back with the token of that answer; until then the answer may have been lost.
    """
    place = (ask.user.token_nid, room.nid)
    sent = {} if whole else ask.hs.lazy_members.get(place) or {}
    wanted = {event.sender for event in timeline.events}
    if whole:
        wanted.add(ask.user.user_id)
    if whole or timeline.limited or any(event.type == MEMBER for event in timeline.events):
        wanted.update(heroes(ask, room) or ())  # as the summary names them
    in_timeline = set() if ask.state_after else {event.nid for event in timeline.events}
    has_gap = timeline.limited and not whole  # of which the client must hear every member's change
    chosen = {
        key: nid for key, nid in state.items() if key[0] != MEMBER or key[1] in sent or has_gap
    }
    for user_id in wanted:
        nid = state.get((MEMBER, user_id)) or room.state.get((MEMBER, user_id))
        while nid is not None and nid in in_timeline:  # who they were before
            nid = cast(Event, ask.hs.rooms.event_by_nid(nid)).replaces
        if nid is None:
            continue
        known, at = sent.get(user_id, (None, 0))
        if known != nid or at > (ask.since or 0) or ask.wanted.state.redundant_members:
            chosen[MEMBER, user_id] = nid
            sent[user_id] = (nid, ask.upto)
    ask.hs.lazy_members.put(place, sent, 1 + len(sent))
    return chosen


def state_section(
    ask: SyncRequest, room: Room, since: int | None, timeline: Timeline, upto: int
) -> list[Json]:
    """The state that the client needs beside the timeline.  Spec: CS-API "Syncing".

    Without a `since`: the whole state before the timeline, or with use_state_after the one behind
    it. With one: what changed between `since` and that point.
    """
    if not ask.wanted.state.wants_room(room.room_id):
        return []
    state = changed_state(ask, room, since, timeline, upto)
    if ask.wanted.state.lazy_load_members:
        state = choose_members(ask, room, state, timeline, whole=since is None)
    events = ask.hs.rooms.events_by_nids(sorted(state.values()))
    return [ask.format(event) for event in ask.wanted.state.pick(events)]


def summary_of(ask: SyncRequest, room: Room) -> Json:
    """The members of a room in numbers, and its heroes if it has no name.  Spec: RoomSummary."""
    summary: Json = {
        "m.joined_member_count": room.joined_count,
        "m.invited_member_count": room.invited_count,
    }
    names = heroes(ask, room)
    return summary if names is None else {**summary, "m.heroes": names}


# ── 21.6  Rooms ──────────────────────────────────────────────────────────────


def ephemeral_events(
    ask: SyncRequest, room: Room, since: int | None, changes: Changes | None
) -> list[Json]:
    """Receipts and typing notices that are new."""
    events: list[Json] = []
    wanted = ask.wanted.ephemeral
    if not wanted.wants_room(room.room_id):
        return events
    fresh = since is None or changes is None
    if (fresh or room.nid in cast(Changes, changes).receipts) and wanted.wants_type("m.receipt"):
        content = receipts_since(ask.hs, room.nid, ask.nid, since or 0)
        if content:
            events.append({"type": "m.receipt", "content": content})
    changed = changes is not None and room.nid in changes.typing
    if (fresh or changed) and wanted.wants_type("m.typing"):
        users = typing_users(ask.hs, room)
        if changed or users:
            events.append({"type": "m.typing", "content": {"user_ids": users}})
    return events


def events_section(
    ask: SyncRequest, timeline: Timeline, state: list[Json], data: list[Json]
) -> Json:
    """The members that joined and left rooms have alike.

    Spec: "Aggregations of child events": without a gap the client has seen all of them itself.
    """
    sums = aggregations(ask.hs, ask.user, timeline.events) if timeline.limited else {}
    return {
        "timeline": {
            "events": [ask.format(event, sums.get(event.nid)) for event in timeline.events],
            "limited": timeline.limited,
            "prev_batch": timeline.prev_batch,
        },
        ask.state_name: {"events": state},
        "account_data": {"events": data},
    }


COUNT_NAMES = ("notification_count", "highlight_count")


def unread_sums(ask: SyncReader, room: Room) -> Json:
    """The unread counts, threads included."""
    counts = unread_counts(ask.hs, ask.nid, room)
    main = (counts.notification_count, counts.highlight_count)
    sums = map(sum, zip(main, *counts.threads.values(), strict=True))
    return dict(zip(COUNT_NAMES, sums, strict=True))


def unread_section(ask: SyncRequest, room: Room) -> Json:
    """The unread counts: in all, or for the main timeline and each thread."""
    if not ask.wanted.timeline.thread_counts:
        return {"unread_notifications": unread_sums(ask, room)}
    counts = unread_counts(ask.hs, ask.nid, room)
    main, threads = (counts.notification_count, counts.highlight_count), counts.threads
    by_root = {root: dict(zip(COUNT_NAMES, pair, strict=True)) for root, pair in threads.items()}
    return {
        "unread_notifications": dict(zip(COUNT_NAMES, main, strict=True)),
        "unread_thread_notifications": by_root,
    }


def joined_section(
    ask: SyncRequest, room: Room, member: Member, changes: Changes | None, data: list[Json]
) -> Json | None:
    """What is new in a room that the user is in, or None."""
    since = ask.since
    if since is not None and member.join_pos > since:
        since = None  # joined meanwhile: everything is new
    fresh = since is None or ask.full_state
    if fresh or changes is None or room.nid in changes.rooms:
        timeline = timeline_of(ask, room, since, ask.upto)
        timeline = timeline if since is not None else without_gap(ask, room, timeline)
        state = state_section(ask, room, None if fresh else since, timeline, ask.upto)
    else:
        timeline, state = Timeline([], False, stream_token(ask.upto), True), []
    ephemeral = ephemeral_events(ask, room, since, changes)
    if not (fresh or timeline.events or state or ephemeral or data):
        receipts = changes.receipts if changes is not None else set()
        if room.nid not in receipts or not own_receipt_moved(
            ask.hs, room.nid, ask.nid, ask.since or 0
        ):
            return None  # even when nothing is to be seen, a receipt of one's own moves the counts
    section: Json = {
        **events_section(ask, timeline, state, data),
        "ephemeral": {"events": ephemeral},
        **unread_section(ask, room),
    }
    members = (*(event.type for event in timeline.events), *(one.get("type") for one in state))
    if fresh or timeline.limited or MEMBER in members:
        section["summary"] = summary_of(ask, room)
    return section


def was_joined(ask: SyncReader, room: Room, position: int) -> bool:
    """Whether the user was in a room at a position."""
    event = ask.hs.rooms.event_at(room, position)
    key = (MEMBER, ask.user.user_id)
    entry = None if event is None else ask.hs.rooms.entry_after(event, key)
    return entry is not None and entry.membership == "join"


def hides_invite(ask: SyncReader, event: Event | None) -> bool:
    """Whether an event is an invite that the user does not want to see."""
    if event is None or event.membership != "invite":
        return False
    return invite_permission(ask.hs, ask.nid, event.sender) != ALLOW


class Departure(NamedTuple):
    """A room that the user has left: up to where it is shown, and from where on it is new."""

    since: int | None
    timeline: Timeline
    state_at: int | None  # position of the state to show; None for who never was a member


def departure_from(ask: SyncReader, room: Room, left: Event, since: int | None) -> Departure:
    """What may be seen of a room, whose member event `left` is, up to the moment of leaving."""
    end = left.pos or left.nid
    gone = departure(ask.hs, left)  # kicked, and banned later: the state is that of the kick
    was_member = gone is not None and gone.nid > (since or 0)
    if since is not None and was_member and not was_joined(ask, room, since):
        since = None  # came and went since the last sync: all is new
    timeline = timeline_of(ask, room, since, end)
    if left not in timeline.events and ask.wanted.timeline.pick([left]):
        timeline = timeline._replace(events=[*timeline.events, left])
    return Departure(since, timeline, cast(Event, gone).nid if was_member else None)


def left_section(ask: SyncRequest, room: Room, member: Member) -> Json | None:
    """A room that the user has left, up to the moment of leaving, or None."""
    left = cast(Event, ask.hs.rooms.event_by_nid(member.event_nid))
    if hides_invite(ask, ask.hs.rooms.entry_before(left, left.key)):
        return None  # the client never heard of it
    since, timeline, upto = departure_from(ask, room, left, ask.since)
    state = [] if upto is None else state_section(ask, room, since, timeline, upto)
    return events_section(ask, timeline, state, [])


def room_section(
    ask: SyncRequest, room: Room, member: Member, changes: Changes | None, data: list[Json]
) -> tuple[str, Json | None]:
    """What is new in one room, whatever the user's place in it, and which section it goes into."""
    is_new = ask.since is None or member.event_nid > ask.since
    section: Json | None = None
    if member.membership == "join":
        return "join", joined_section(ask, room, member, changes, data)
    if member.membership == "invite":
        event = cast(Event, ask.hs.rooms.event_by_nid(member.event_nid))
        if is_new and not hides_invite(ask, event):
            state = stripped_state(room, event.sender, ask.user.user_id)
            section = {"invite_state": {"events": state}}
        return "invite", section
    if member.membership == "knock":
        if is_new:
            section = {"knock_state": {"events": stripped_state(room, ask.user.user_id)}}
        return "knock", section
    wanted = ask.since is not None or ask.wanted.include_leave
    if is_new and wanted and not member.forgotten:
        section = left_section(ask, room, member)
    return "leave", section


async def rooms_section(ask: SyncRequest, changes: Changes | None) -> Json:
    """The rooms of the answer, by membership; others get a turn while a long one is made."""
    rooms, sections = ask.hs.rooms, cast(Json, {})
    data: dict[RoomNid, list[Json]] = {}
    if changes is None or ROOM_DATA in changes.kinds:
        data = room_account_data(ask.hs, ask.nid, ask.since or 0)
    if changes is None or ask.full_state:
        nids = set(rooms.memberships(ask.nid))
    else:
        nids = changes.rooms | changes.receipts | changes.typing | set(data)
    pause_at = time.monotonic() + YIELD_SECONDS
    for nid in nids:
        if time.monotonic() > pause_at:
            await asyncio.sleep(0)
            pause_at = time.monotonic() + YIELD_SECONDS
        member = rooms.memberships(ask.nid).get(nid)
        room = rooms.by_nid(nid)
        if member is None or not ask.wanted.rooms.wants_room(room.room_id):
            continue
        is_new = ask.full_state or (ask.since is not None and member.join_pos > ask.since)
        new_data = room_account_data_of(ask.hs, ask.nid, nid) if is_new else data.get(nid, [])
        new_data = ask.pick_data(ask.wanted.room_data, new_data, room.room_id)
        name, section = room_section(ask, room, member, changes, new_data)
        if section is not None:
            sections.setdefault(name, {})[room.room_id] = section
    return sections


# ── 21.7  The answer ─────────────────────────────────────────────────────────


def add_events(result: Json, name: str, events: list[Json]) -> None:
    """Add a section of events, if there are any."""
    if events:
        result[name] = {"events": events}


def account_data_events(ask: SyncRequest) -> list[Json]:
    """The user's own account data that is new, push rules included."""
    since = 0 if ask.full_state else ask.since or 0
    rules = push_rules_account_data(ask.hs, ask.nid, since)
    events = global_account_data(ask.hs, ask.nid, since)
    events = events if rules is None else [*events, rules]
    return ask.pick_data(ask.wanted.account_data, events)


async def sync_once(ask: SyncRequest) -> tuple[Json, bool]:
    """What is new now, and whether that is anything."""
    hs, since = ask.hs, ask.since
    ask.upto = hs.stream.position
    changes = None if since is None else changes_since(ask, since)
    kinds = changes.kinds if changes is not None else None
    result: Json = {}
    rooms = await rooms_section(ask, changes)
    if rooms:
        result["rooms"] = rooms
    if kinds is None or ACCOUNT_DATA in kinds:
        add_events(result, "account_data", account_data_events(ask))
    if kinds is None or PRESENCE in kinds or (changes is not None and changes.rooms):
        wanted = ask.wanted.presence
        events = presence_since(hs, ask.nid, since or 0)
        events = [one for one in events if wanted.wants(one["type"], one["sender"], one["content"])]
        add_events(result, "presence", events)
    acknowledged = ask.upto
    if kinds is None or TO_DEVICE in kinds:
        messages, acknowledged = to_device_messages(hs, ask.user, ask.to_device_since, ask.upto)
        add_events(result, "to_device", messages)
    if since is not None:
        changed, left = device_list_changes(hs, ask.nid, since, ask.upto)
        if changed or left:
            result["device_lists"] = {"changed": changed, "left": left}
    is_news = bool(result) or (kinds is not None and KEY_COUNTS in kinds)
    if ask.user.device_nid is not None:
        result["device_one_time_keys_count"] = one_time_key_counts(hs, ask.user.device_nid)
        result["device_unused_fallback_key_types"] = unused_fallback_types(hs, ask.user.device_nid)
    result["next_batch"] = stream_token(ask.upto)
    if acknowledged < ask.upto:  # more to-device messages wait: acknowledge only what was sent
        result["next_batch"] += f"_{acknowledged}"
    return result, is_news


def sync_filter(hs: Homeserver, request: Request) -> SyncFilter:
    """The filter that the query names or holds, compiled once."""
    text = request.arg("filter") or ""
    key = (request.user.nid, text)
    found = hs.sync_filters.get(key)
    if found is None:
        found = SyncFilter(get_filter(hs, request.user.nid, text) if text else {})
        hs.sync_filters.put(key, found)
    return found


@route("GET", "/_matrix/client/v3/sync", auth=GUEST, limit=None)
async def get_sync(hs: Homeserver, request: Request) -> Json:
    """What is new since a token; waits up to `timeout` milliseconds when nothing is.

    Spec: CS-API "Syncing".
    """
    timeout = request.int_arg("timeout", 0, 0, 2**53)
    ends = time.monotonic() + min(timeout, MAX_SYNC_TIMEOUT_MS) / 1000
    ask = SyncRequest(hs, request, sync_filter(hs, request))
    asked = request.arg("set_presence") or "online"
    note_sync(hs, request.user, asked, min(timeout, MAX_SYNC_TIMEOUT_MS) / 1000)
    if ask.since is not None:
        acknowledge_to_device(hs, request.user, ask.to_device_since)
    while True:
        result, is_news = await sync_once(ask)
        if is_news or ask.since is None or ask.full_state:
            return result
        ask.since = ask.upto  # there was nothing up to here, so the next look begins here
        if hs.stream.position > ask.upto:
            continue  # something came while the answer was made
        is_late = not await hs.notifier.wait(request, ends - time.monotonic())
        hs.accounts.check_logged_in(request.user)
        if is_late:
            return (await sync_once(ask))[0]


# ═════════════════════════════════════════════════════════════════════════════
#  43. SLIDING SYNC
#
#  What Element X speaks: windows on the list of rooms instead of all rooms. The
#  server remembers for each connection which rooms the client has, and how much of
#  them; a room in a window that has news since is sent.  spec: MSC4186, MSC3884,
#  MSC3885, MSC3959, MSC3960, MSC3961, MSC4308; the older MSC3575 as far as it is the same
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE sliding_connections (
    connection_nid INTEGER PRIMARY KEY,
    user_nid INTEGER NOT NULL,
    device_nid INTEGER NOT NULL,    -- 0: an application service without a device
    conn_id TEXT NOT NULL,
    confirmed INTEGER NOT NULL,     -- the snapshot that the client is known to have
    sent INTEGER NOT NULL,          -- the one of the newest answer
    configs TEXT NOT NULL,          -- what state was asked for, a JSON list that only grows
    UNIQUE (user_nid, device_nid, conn_id)
);
CREATE INDEX sliding_devices ON sliding_connections (device_nid);
CREATE TABLE sliding_rooms (
    connection_nid INTEGER NOT NULL,
    room_nid INTEGER NOT NULL,
    snapshot INTEGER NOT NULL,      -- the first that the row is part of
    behind INTEGER,                 -- NULL: all is sent; else the position up to which it is
    timeline_limit INTEGER NOT NULL,
    config INTEGER NOT NULL,        -- index into the connection's configs
    is_dm INTEGER NOT NULL,
    extra TEXT NOT NULL,            -- event nids of state sent beyond the config, a JSON list
    PRIMARY KEY (connection_nid, room_nid, snapshot)
) WITHOUT ROWID;
""")
invariant(
    "sliding sync connections of devices that are gone",
    """
    SELECT device_nid
    FROM sliding_connections
    WHERE device_nid != 0
    EXCEPT SELECT device_nid FROM devices
    """,
)
invariant(
    "rooms of sliding sync connections that are not there",
    """
    SELECT connection_nid FROM sliding_rooms
    EXCEPT SELECT connection_nid FROM sliding_connections
    """,
)

MAX_SLIDING = 10  # of a device
MAX_LISTS = 100  # in one request, and subscriptions in the accepted form
MAX_LIST_KEY = 64
MAX_RANGES = 100
MAX_REQUIRED_STATE = 300  # entries of one list or subscription
MAX_CONFIGS = 100  # kinds of required_state in the life of a connection
MAX_EXTRA = 200  # members and the like remembered as sent, of a room
SLIDING_ROOMS = 50_000  # rooms of connections in memory
BUMP_SCAN = 200  # events looked at for one that bumps
BUMP_TYPES = frozenset(  # what clients sort rooms by
    {
        *(CREATE, "m.room.message", "m.room.encrypted", "m.sticker", "m.call.invite"),
        *("m.poll.start", "org.matrix.msc3381.poll.start"),
        *("m.beacon_info", "org.matrix.msc3672.beacon_info"),
    }
)

# ── 43.1  What state is wanted ───────────────────────────────────────────────

ANYTHING = "*"


def pairs_match(pairs: frozenset[StateKey], key: StateKey, lazy: bool = False) -> bool:
    """Whether one of the pairs fits; where members are lazy, "all members" does not mean them."""
    if key in pairs or (ANYTHING, key[1]) in pairs:
        return True
    if lazy and key[0] == MEMBER:
        return False
    return (key[0], ANYTHING) in pairs or (ANYTHING, ANYTHING) in pairs


class StateWish(NamedTuple):
    """One required_state: pairs of type and state key, * for any; what not; members lazily."""

    include: frozenset[StateKey]
    exclude: frozenset[StateKey]
    lazy: bool

    def matches(self, key: StateKey) -> bool:
        """Whether it names an entry of the state, lazy members aside."""
        return pairs_match(self.include, key, self.lazy) and not pairs_match(self.exclude, key)


StateConfig = frozenset[StateWish]


def config_matches(config: StateConfig, key: StateKey) -> bool:
    """Whether any of the wishes names an entry of the state."""
    return any(wish.matches(key) for wish in config)


@functools.lru_cache(256)
def wildcards(wish: StateWish) -> tuple[frozenset[str], frozenset[str]]:
    """The types and the state keys that a wish names with a wildcard beside them."""
    types = {kind for kind, key in wish.include if key == ANYTHING}
    keys = {key for kind, key in wish.include if kind == ANYTHING}
    return frozenset(types), frozenset(keys)


def select_state(
    config: StateConfig, state: Mapping[StateKey, EventNid]
) -> dict[StateKey, EventNid]:
    """The entries of a state that a config names; without wildcards they are looked up."""
    chosen: set[StateKey] = set()
    for wish in config:
        types, keys = wildcards(wish)
        if types or keys:
            every = ANYTHING in types or ANYTHING in keys
            names = (key for key in state if every or key[0] in types or key[1] in keys)
            chosen.update(key for key in names if wish.matches(key))
        chosen.update(key for key in wish.include & state.keys() if wish.matches(key))
    return {key: state[key] for key in chosen}


def wish_of_pairs(user_id: str, pairs: list[list[str]]) -> StateWish:
    """The deployed form: pairs, in which $ME and, for members, $LAZY have their meaning."""
    if any(len(pair) != 2 for pair in pairs):
        raise bad_json("required_state has pairs of event type and state key")
    include = {(kind, user_id if key == "$ME" else key) for kind, key in pairs}
    lazy = (MEMBER, "$LAZY") in include
    return StateWish(frozenset(include - {(MEMBER, "$LAZY")}), frozenset(), lazy)


def wish_of_object(_user_id: str, wanted: Json) -> StateWish:
    """The accepted form: what to include and to exclude; a member not there is a wildcard."""
    include, exclude = (
        frozenset(
            (one.get("type", ANYTHING), one.get("state_key", ANYTHING))
            for one in wanted.get(name, ())
        )
        for name in ("include", "exclude")
    )
    return StateWish(include, exclude, wanted.get("lazy_members", False))


def encode_config(config: StateConfig) -> list[Any]:
    """A config as JSON, the same for the same config."""
    return sorted([sorted(wish.include), sorted(wish.exclude), wish.lazy] for wish in config)


def decode_config(value: list[Any]) -> StateConfig:
    """What `encode_config` made."""
    return frozenset(
        StateWish(frozenset(map(tuple, include)), frozenset(map(tuple, exclude)), lazy)
        for include, exclude, lazy in value
    )


# ── 43.2  What is asked for ──────────────────────────────────────────────────
#
# Two forms of the same request: the one that is deployed, at the unstable prefix,
# and the one that was accepted, at v4. They are read into one.

STATE_ELEMENTS: Final = [{"type?": str, "state_key?": str}]
ROOM_WISH: Final[Json] = {"timeline_limit": int, "required_state?": [[str]]}
ROOM_WISH_V4: Final[Json] = {
    "timeline_limit": int,
    "required_state": {
        "include?": STATE_ELEMENTS,
        "exclude?": STATE_ELEMENTS,
        "lazy_members?": bool,
    },
}
SLIDING_FILTERS: Final[Json] = {
    **{"is_dm?": bool, "is_encrypted?": bool, "is_invite?": bool, "is_invited?": bool},
    **{"room_types?": [ANY], "not_room_types?": [ANY], "tags?": [str], "not_tags?": [str]},
    **{"spaces?": [str], "room_name_like?": str},
}
SCOPE: Final[Json] = {"enabled?": bool, "lists?": [str], "rooms?": [str]}
EXTENSIONS: Final[Json] = {
    "to_device?": {"enabled?": bool, "limit?": int, "since?": str},
    "e2ee?": {"enabled?": bool},
    **dict.fromkeys(("account_data?", "receipts?", "typing?"), SCOPE),
    "io.element.msc4308.thread_subscriptions?": {"enabled?": bool, "limit?": int},
}
SLIDING_BODY: Final[Json] = {
    "conn_id?": str,
    "lists?": {str: {**ROOM_WISH, "ranges?": [[int]], "filters?": SLIDING_FILTERS}},
    "room_subscriptions?": {str: ROOM_WISH},
    "extensions?": EXTENSIONS,
}
SLIDING_BODY_V4: Final[Json] = {
    **{"conn_id?": str, "pos?": str, "timeout?": int, "set_presence?": str},
    "lists?": {str: {**ROOM_WISH_V4, "range?": [int], "filters?": SLIDING_FILTERS}},
    "room_subscriptions?": {str: ROOM_WISH_V4},
    "extensions?": EXTENSIONS,
}


class RoomConfig(NamedTuple):
    """How much of a room is wanted."""

    limit: int
    state: StateConfig

    def merged(self, other: RoomConfig) -> RoomConfig:
        """The superset of two."""
        return RoomConfig(max(self.limit, other.limit), self.state | other.state)


class RoomList(NamedTuple):
    """A list: windows on the rooms that pass the filters; None stands for all of them."""

    config: RoomConfig
    ranges: list[list[int]] | None
    filters: Json


@functools.lru_cache(256)
def limited_filter(limit: int) -> SyncFilter:
    """The filter that asks for so many timeline events and nothing else."""
    return SyncFilter({"room": {"timeline": {"limit": limit}}})


class SlidingRequest(SyncReader):
    """One call of sliding sync, in either form."""

    def __init__(self, hs: Homeserver, request: Request, *, accepted: bool) -> None:
        super().__init__(hs, request, limited_filter(0))
        body = request.json
        self.accepted = accepted
        self.conn_id: str = body.get("conn_id", "")
        lists, rooms = body.get("lists", {}), body.get("room_subscriptions", {})
        if len(lists) > MAX_LISTS or (accepted and len(rooms) > MAX_LISTS):
            raise invalid_param(f"At most {MAX_LISTS} lists, and as many subscriptions")
        if any(len(key) > MAX_LIST_KEY for key in (*lists, self.conn_id)):
            raise invalid_param(f"A key or conn_id has at most {MAX_LIST_KEY} characters")
        self.lists = {key: self._list(wanted) for key, wanted in lists.items()}
        self.rooms = {room_id: self._config(wanted) for room_id, wanted in rooms.items()}
        self.extensions = {
            name: wanted
            for name, wanted in body.get("extensions", {}).items()
            if isinstance(wanted, dict) and wanted.get("enabled")
        }
        asked = encode_json([lists, rooms])
        self.digest = hashlib.blake2b(asked, digest_size=16).digest()

    def _config(self, wanted: Json) -> RoomConfig:
        limit, state = wanted["timeline_limit"], wanted.get("required_state", [])
        if not 0 <= limit <= MAX_PAGE:
            raise invalid_param(f"timeline_limit is from 0 to {MAX_PAGE}")
        wish = (wish_of_object if self.accepted else wish_of_pairs)(self.user.user_id, state)
        if len(wish.include) + len(wish.exclude) > MAX_REQUIRED_STATE:
            raise invalid_param(f"required_state has at most {MAX_REQUIRED_STATE} entries")
        return RoomConfig(limit, frozenset((wish,)))

    def _list(self, wanted: Json) -> RoomList:
        ranges = wanted.get("ranges", [])
        if self.accepted:
            ranges = [wanted["range"]] if "range" in wanted else None
        for span in ranges or ():
            if len(span) != 2 or not 0 <= span[0] <= span[1]:
                raise invalid_param("A range has a first and a last index, from 0 on")
        if ranges and len(ranges) > MAX_RANGES:
            raise invalid_param(f"A list has at most {MAX_RANGES} ranges")
        return RoomList(self._config(wanted), ranges, wanted.get("filters", {}))

    def wants_room(self, name: str, room_id: str, lists: Iterable[str]) -> bool:
        """Whether an extension is wanted for a room, which these lists have in their windows."""
        wanted = self.extensions[name]
        for asked, has in ((wanted.get("lists"), lists), (wanted.get("rooms"), (room_id,))):
            present = has if asked is None or ANYTHING in asked else set(asked).intersection(has)
            if present and (has is lists or room_id in self.rooms):
                return True
        return False


# ── 43.3  Connections ────────────────────────────────────────────────────────
#
# A `pos` is a stream position and a snapshot of what the client has. Of a room that
# is `live` the client has everything up to the position; of one that fell out of all
# windows, up to where it did. So an answer in which no room comes or goes changes no
# snapshot and writes nothing. Two snapshots are kept, as rows that differ: the one of
# the last request, which may come again, and the one of the last answer.


class SentRoom(NamedTuple):
    """What the client has of a room."""

    behind: int | None  # the position up to which it has it; None: it is live
    limit: int
    state: StateConfig
    is_dm: bool
    extra: tuple[EventNid, ...]  # state that it has beyond the config: lazy members and such


class Window(NamedTuple):
    """Which rooms a request selects, from which lists, kept while nothing changes that."""

    digest: bytes
    configs: dict[RoomNid, RoomConfig]
    ids: dict[RoomNid, str]
    lists: dict[RoomNid, list[str]]
    answer: Json  # the member `lists` of the response


@dataclass(slots=True)
class SlidingConnection:
    """What a client's connection is known to have: as confirmed, and after the newest answer."""

    nid: int
    confirmed: int
    sent: int
    configs: list[StateConfig]
    rooms: dict[RoomNid, SentRoom] = field(default_factory=dict)
    pending: dict[RoomNid, SentRoom] = field(default_factory=dict)
    window: Window | None = None
    settled: int = 0  # the snapshot in which the client has all rooms of the window
    turn: object = None  # the request that is being answered; an older one changes nothing


def unknown_pos() -> MatrixError:
    """400 M_UNKNOWN_POS: the client starts the connection over."""
    return MatrixError(400, "M_UNKNOWN_POS", "This connection is not known, start it anew")


SAME_CONNECTION = """
    SELECT connection_nid
    FROM sliding_connections
    WHERE user_nid = ? AND device_nid = ? AND conn_id = ?
"""


class Sliding:
    """The connections, and what all of them ask of rooms again and again."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        scale = hs.config.conduit_cache_capacity_modifier
        self._connections: LruCache[tuple[int, int, str], SlidingConnection] = LruCache(
            int(SLIDING_ROOMS * scale)
        )
        self.bumps: LruCache[RoomNid, int] = LruCache(int(SLIDING_ROOMS * scale))
        self.types: LruCache[RoomNid, str] = LruCache(int(SLIDING_ROOMS * scale))
        self.senders: LruCache[EventNid, str] = LruCache(int(SLIDING_ROOMS * scale))
        for cache in (self._connections, self.bumps, self.types, self.senders):
            hs.db.on_reset(cache.clear)
        hs.accounts.on_device_deleted(self._device_deleted)
        hs.accounts.on_deactivated(self._deactivated)
        hs.rooms.subscribe(self._new_event)

    def _new_event(self, room: Room, event: Event) -> None:
        if event.type in BUMP_TYPES and event.pos is not None:
            self.bumps.put(room.nid, max(event.pos, self.bumps.get(room.nid) or 0))

    def _deactivated(self, user_nid: UserNid) -> None:
        sql = "SELECT connection_nid FROM sliding_connections WHERE user_nid = ?"
        self._drop(self.hs.db.all(sql, (user_nid,)))

    def _device_deleted(self, _user: UserNid, device_nid: DeviceNid, _device_id: str) -> None:
        sql = "SELECT connection_nid FROM sliding_connections WHERE device_nid = ?"
        self._drop(self.hs.db.all(sql, (device_nid,)))

    def _drop(self, rows: list[tuple[int]]) -> None:
        """Forget connections."""
        with self.hs.db.write():
            for row in rows:
                self.hs.db.execute("DELETE FROM sliding_rooms WHERE connection_nid = ?", row)
                self.hs.db.execute("DELETE FROM sliding_connections WHERE connection_nid = ?", row)

    def start(self, ask: SlidingRequest) -> SlidingConnection:
        """A connection that begins, in place of the one of the same name."""
        key = ask.nid, ask.user.device_nid or 0, ask.conn_id
        oldest = """
            SELECT connection_nid
            FROM sliding_connections
            WHERE user_nid = ? AND device_nid = ?
            ORDER BY sent DESC
            LIMIT -1 OFFSET ?
        """
        with self.hs.db.write():
            self._drop(self.hs.db.all(SAME_CONNECTION, key))
            self._drop(self.hs.db.all(oldest, (*key[:2], MAX_SLIDING - 1)))
            nid = self.hs.stream.advance()
            row = (nid, *key, nid, nid, "[]")
            self.hs.db.execute("INSERT INTO sliding_connections VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        connection = SlidingConnection(nid, nid, nid, [])
        self._connections.put(key, connection)
        return connection

    def find(self, ask: SlidingRequest, snapshot: int) -> SlidingConnection:
        """The connection of a request, as it was at one of its two snapshots."""
        key = ask.nid, ask.user.device_nid or 0, ask.conn_id
        nid = self.hs.db.value(SAME_CONNECTION, key)
        connection = self._connections.get(key)
        if nid is not None and (connection is None or connection.nid != nid):
            connection = self._load(key)
        if not nid or not connection or snapshot not in (connection.confirmed, connection.sent):
            raise unknown_pos()
        if connection.confirmed != connection.sent:
            self._settle(connection, snapshot)
        self._connections.put(key, connection, 1 + len(connection.rooms))
        return connection

    def _load(self, key: tuple[int, int, str]) -> SlidingConnection | None:
        sql = """
            SELECT connection_nid, confirmed, sent, configs
            FROM sliding_connections
            WHERE user_nid = ? AND device_nid = ? AND conn_id = ?
        """
        found = self.hs.db.one(sql, key)
        if found is None:
            return None
        nid, confirmed, newest, configs = found
        configs = [decode_config(one) for one in json.loads(configs)]
        connection = SlidingConnection(nid, confirmed, newest, configs)
        sql = """
            SELECT room_nid, snapshot, behind, timeline_limit, config, is_dm, extra
            FROM sliding_rooms
            WHERE connection_nid = ?
        """
        for row in self.hs.db.all(sql, (connection.nid,)):
            room_nid, snapshot, behind, limit, config, is_dm, extra = row
            into = connection.rooms if snapshot <= connection.confirmed else connection.pending
            into[room_nid] = SentRoom(
                behind, limit, connection.configs[config], bool(is_dm), tuple(json.loads(extra))
            )
        return connection

    def _settle(self, connection: SlidingConnection, snapshot: int) -> None:
        """The client said which snapshot it has: the last answer arrived, or it was lost."""
        arrived = snapshot == connection.sent
        delete = """
            DELETE FROM sliding_rooms
            WHERE connection_nid = ?
              AND room_nid IN (SELECT value FROM json_each(?))
              AND (snapshot <= ?) = ?
        """
        nids = json.dumps(list(connection.pending))
        update = """
            UPDATE sliding_connections
            SET confirmed = ?, sent = ?
            WHERE connection_nid = ?
        """
        with self.hs.db.write():
            row = (connection.nid, nids, connection.confirmed, arrived)
            self.hs.db.execute(delete, row)
            self.hs.db.execute(update, (snapshot, snapshot, connection.nid))
        if arrived:
            connection.rooms.update(connection.pending)
        else:
            connection.window = None
        connection.pending = {}
        connection.confirmed = connection.sent = snapshot

    def save(self, connection: SlidingConnection, changed: dict[RoomNid, SentRoom]) -> None:
        """A new snapshot, with what changed since the confirmed one."""
        nid, snapshot = connection.nid, self.hs.stream.advance()
        rows = []
        for room_nid, sent in changed.items():
            if sent.state not in connection.configs:
                connection.configs.append(sent.state)
            config, extra = connection.configs.index(sent.state), json.dumps(sent.extra)
            rows.append((nid, room_nid, snapshot, *sent[:2], config, sent.is_dm, extra))
        if len(connection.configs) > MAX_CONFIGS:
            self._drop([(nid,)])
            raise unknown_pos()
        configs = json.dumps([encode_config(config) for config in connection.configs])
        update = "UPDATE sliding_connections SET sent = ?, configs = ? WHERE connection_nid = ?"
        with self.hs.db.write():
            if not self.hs.db.execute(update, (snapshot, configs, nid)).rowcount:
                raise unknown_pos()  # begun anew while this answer was made
            insert = "INSERT INTO sliding_rooms VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            for row in rows:
                self.hs.db.execute(insert, row)
        connection.sent, connection.pending = snapshot, changed


# ── 43.4  The list of rooms ──────────────────────────────────────────────────


def sender_of(hs: Homeserver, nid: EventNid) -> str:
    """Who sent a member event; remembered, as it is asked for each room that one has left."""
    sender = hs.sliding.senders.get(nid)
    if sender is None:
        sender = cast(Event, hs.rooms.event_by_nid(nid)).sender
        hs.sliding.senders.put(nid, sender)
    return sender


def begin_of(ask: SlidingRequest, sent: SentRoom) -> int:
    """The position up to which the client has a room."""
    return cast(int, ask.since) if sent.behind is None else sent.behind


def is_listed(
    ask: SlidingRequest, connection: SlidingConnection, nid: RoomNid, member: Member
) -> bool:
    """Whether a room is in the user's list of rooms.

    Who left by themselves is told so once, if the client has the room; who was removed from a
    room that they had joined keeps it in the list.
    """
    if member.membership == "join":
        return True
    sender = sender_of(ask.hs, member.event_nid)
    if member.membership == "invite":
        return invite_permission(ask.hs, ask.nid, sender) == ALLOW
    if member.membership == "knock":
        return True
    sent = connection.rooms.get(nid)
    if sent is not None and member.event_nid > begin_of(ask, sent):
        return True
    if member.forgotten or sender == ask.user.user_id:
        return False
    return departure(ask.hs, ask.hs.rooms.event_by_nid(member.event_nid)) is not None


def rooms_by_activity(ask: SlidingRequest, connection: SlidingConnection) -> dict[RoomNid, str]:
    """The ids of the user's rooms, the one that had an event last at the front."""
    sql = """
        SELECT room_nid, room_id, last_pos
        FROM memberships
        JOIN rooms USING (room_nid)
        WHERE user_nid = ?
    """
    members = ask.hs.rooms.memberships(ask.nid)
    found = []
    for nid, room_id, last_pos in ask.hs.db.execute(sql, (ask.nid,)):
        member = members[nid]
        if is_listed(ask, connection, nid, member):
            active = last_pos if member.membership == "join" else member.event_nid
            found.append((active, nid, room_id))
    found.sort(reverse=True)
    return {nid: room_id for _, nid, room_id in found}


def direct_rooms(ask: SlidingRequest) -> set[str]:
    """The ids of the rooms in the user's m.direct."""
    content = ask.hs.account_data.get(ask.nid, NO_ROOM, "m.direct") or {}
    lists = [rooms for rooms in content.values() if isinstance(rooms, list)]
    return {room_id for rooms in lists for room_id in rooms if isinstance(room_id, str)}


def room_types(ask: SlidingRequest) -> dict[RoomNid, str | None]:
    """The type of each of the user's rooms, None for an ordinary one; it never changes."""
    known = ask.hs.sliding.types
    types = {nid: known.get(nid) for nid in ask.hs.rooms.memberships(ask.nid)}
    missing = [nid for nid, value in types.items() if value is None]
    sql = """
        SELECT room_nid, pdu
        FROM json_each(?)
        JOIN events ON room_nid = value AND state_nid = ?
    """
    state_nid = ask.hs.rooms.groups.names.find(CREATE_KEY)
    for nid, pdu in ask.hs.db.execute(sql, (json.dumps(missing), state_nid)):
        value = json.loads(pdu)["content"].get("type")
        types[nid] = value if isinstance(value, str) else ""
        known.put(nid, cast(str, types[nid]))
    return {nid: value or None for nid, value in types.items()}


def rooms_in_spaces(ask: SlidingRequest, spaces: list[str]) -> set[str]:
    """The ids of the rooms that spaces which the user is in have as children."""
    found: set[str] = set()
    for space in map(ask.hs.rooms.find, spaces):
        if space is not None and space.membership_of(ask.nid) == "join":
            keys = [key for key in space.state if key[0] == "m.space.child"]
            found.update(key[1] for key in keys if isinstance(space.content(*key).get("via"), list))
    return found


RoomTest = Callable[[RoomNid, str], bool]


def is_one_of(room_ids: set[str]) -> RoomTest:
    """A test for these rooms."""
    return lambda _, room_id: room_id in room_ids


def has_type_of(types: dict[RoomNid, str | None], wanted: list[object]) -> RoomTest:
    """A test for rooms of one of the types."""
    return lambda nid, _: types.get(nid) in wanted


def tagged_with(ask: SlidingRequest, wanted: list[str]) -> RoomTest:
    """A test for rooms that have one of the tags."""
    get = functools.partial(get_room_account_data, ask.hs, ask.nid)

    def test(nid: RoomNid, _room_id: str) -> bool:
        tags = (get(nid, "m.tag") or {}).get("tags")
        return isinstance(tags, dict) and not tags.keys().isdisjoint(wanted)

    return test


def filter_tests(ask: SlidingRequest, filters: Json) -> Iterator[tuple[RoomTest, bool]]:
    """The filters of a list as tests, each with the answer that a room must give."""
    rooms, members = ask.hs.rooms, ask.hs.rooms.memberships(ask.nid)
    tests: dict[str, Callable[[Any], RoomTest]] = {
        "is_dm": lambda _: is_one_of(direct_rooms(ask)),
        "is_invite": lambda _: lambda nid, _: members[nid].membership == "invite",
        "spaces": lambda spaces: is_one_of(rooms_in_spaces(ask, spaces)),
        "tags": lambda wanted: tagged_with(ask, wanted),
        "room_types": lambda wanted: has_type_of(room_types(ask), wanted),
        "is_encrypted": lambda _: lambda nid, _: rooms.by_nid(nid).encrypted,
        "room_name_like": lambda text: (
            lambda nid, _: (
                text.lower() in rooms.by_nid(nid).setting("m.room.name", "name", "").lower()
            )
        ),
    }
    for name, value in filters.items():
        wanted = name.replace("invited", "invite").removeprefix("not_")
        if wanted in tests and (wanted == name or not name.startswith("not_")):
            yield tests[wanted](value), value is not False
        elif name in {"not_room_types", "not_tags"}:
            yield tests[wanted](value), False


def add_to_window(window: Window, nid: RoomNid, room_id: str, config: RoomConfig) -> None:
    """One more reason for a room to be sent."""
    window.ids[nid] = room_id
    known = window.configs.get(nid, config)
    window.configs[nid] = config if known is config else known.merged(config)


def add_subscriptions(ask: SlidingRequest, connection: SlidingConnection, window: Window) -> None:
    """The rooms subscribed to, of those that the user has had to do with."""
    members = ask.hs.rooms.memberships(ask.nid)
    for room_id, config in ask.rooms.items():
        room = ask.hs.rooms.find(room_id)
        member = members.get(room.nid) if room is not None else None
        if room is None or member is None or member.forgotten:
            continue
        was_in = member.membership in {"leave", "ban"}
        if was_in or is_listed(ask, connection, room.nid, member):
            add_to_window(window, room.nid, room_id, config)


def select_rooms(ask: SlidingRequest, connection: SlidingConnection) -> Window:
    """The rooms in the windows of all lists, and those subscribed to, with what is wanted."""
    ordered = rooms_by_activity(ask, connection)
    window = Window(ask.digest, {}, {}, {}, {})
    for name, wanted in ask.lists.items():
        tests = list(filter_tests(ask, wanted.filters))
        nids = [
            nid
            for nid, room_id in ordered.items()
            if all(test(nid, room_id) == right for test, right in tests)
        ]
        spans = [[0, len(nids)]] if wanted.ranges is None else wanted.ranges
        windows = [nids[first : last + 1] for first, last in spans]
        window.answer[name] = {"count": len(nids)}
        if not ask.accepted:
            window.answer[name]["ops"] = [
                {"op": "SYNC", "range": span, "room_ids": [ordered[nid] for nid in shown]}
                for span, shown in zip(spans, windows, strict=True)
            ]
        for nid in dict.fromkeys(itertools.chain(*windows)):
            add_to_window(window, nid, ordered[nid], wanted.config)
            window.lists.setdefault(nid, []).append(name)
    add_subscriptions(ask, connection, window)
    return window


# ── 43.5  A room ─────────────────────────────────────────────────────────────


def newest_bump(ask: SlidingRequest, room: Room) -> int:
    """The position of the newest event that is proper activity, by which clients sort."""
    bump = ask.hs.sliding.bumps.get(room.nid)
    if bump is None:
        events = ask.hs.rooms.events_between(room, MIN_POSITION, room.last_pos, BUMP_SCAN)
        found = (event.pos for event in reversed(events) if event.type in BUMP_TYPES)
        bump = max(0, next(found, events[0].pos if events else 0) or 0)
        ask.hs.sliding.bumps.put(room.nid, bump)
    return bump


class RoomView(NamedTuple):
    """What goes into the section of a room that the user is or was in."""

    room: Room
    config: RoomConfig
    sent: SentRoom | None
    since: int | None  # the position up to which the client has it; None: it begins anew
    timeline: Timeline
    state: Mapping[StateKey, EventNid]  # the whole state at the end
    changed: dict[StateKey, EventNid]  # of that, what is new since
    expanded: bool  # the timeline goes further back than before

    def news(self, *key: str) -> bool:
        """Whether the client does not have the present value of an entry of the state."""
        return self.since is None or key in self.changed

    @property
    def members_changed(self) -> bool:
        """Whether the client does not have the present members."""
        return self.since is None or any(kind == MEMBER for kind, _ in self.changed)


def whole_state(ask: SyncReader, room: Room, position: int) -> Mapping[StateKey, EventNid]:
    """The whole state of a room at a position."""
    group = group_at(ask, room, position)
    if group is None or group == room.group:
        return room.state
    return ask.hs.rooms.groups.named(ask.hs.rooms.groups.read(group))


def redacted_since(
    ask: SyncReader, timeline: Timeline, config: RoomConfig, state: Mapping[StateKey, EventNid]
) -> Iterator[tuple[StateKey, EventNid]]:
    """The entries of the state whose content was taken away, by a redaction that may be new.

    Trap: the entry is the same event as before, but the client reads state nowhere else.
    """
    redactions = {event.nid for event in timeline.events if event.type == REDACTION}
    if timeline.limited or redactions:
        for event in ask.hs.rooms.events_by_nids(select_state(config.state, state).values()):
            if event.redacted_by and (timeline.limited or event.redacted_by in redactions):
                yield event.key, event.nid


def left_place(
    ask: SlidingRequest, room: Room, member: Member, since: int | None, *, expanded: bool
) -> Departure:
    """Of a room that the user has left: what is to be seen, and no more once it was told."""
    left = cast(Event, ask.hs.rooms.event_by_nid(member.event_nid))
    is_known = since is not None and left.nid <= since
    found = departure_from(ask, room, left, None if expanded or is_known else since)
    if is_known and not expanded:
        return Departure(since, Timeline([], False, found.timeline.prev_batch, True), found[2])
    return found._replace(since=since) if expanded else found


def view_room(
    ask: SlidingRequest, room: Room, member: Member, config: RoomConfig, sent: SentRoom | None
) -> RoomView:
    """Find out what is new in a room that the user is or was in."""
    ask.wanted = limited_filter(config.limit)
    since = None if sent is None else begin_of(ask, sent)
    if since is not None and member.membership == "join" and member.join_pos > since:
        since = None  # joined meanwhile: the client knew only of an invite, or of an earlier stay
    expanded = since is not None and sent is not None and config.limit > sent.limit
    at: int | None = ask.upto
    if member.membership == "join":
        timeline = timeline_of(ask, room, None if expanded else since, ask.upto)
    else:
        since, timeline, at = left_place(ask, room, member, since, expanded=expanded)
    if config.limit == 0:
        timeline = Timeline([], False, timeline.prev_batch, False)
    changed: dict[StateKey, EventNid] = {}
    if at is None:  # never was a member: all there is to see is how the invite ended
        own = (MEMBER, ask.user.user_id)
        state = cast(Mapping[StateKey, EventNid], {own: member.event_nid})
        changed = dict(state) if member.event_nid > (since or 0) else {}
    else:
        state = whole_state(ask, room, at)
        if since is not None and at > since:
            changed = changed_state(ask, room, since, timeline, at)
            changed.update(redacted_since(ask, timeline, config, state))
    return RoomView(room, config, sent, since, timeline, state, changed, expanded)


def lazy_members(view: RoomView) -> set[StateKey]:
    """The members that a client which asks for them lazily should have now."""
    people = {event.sender for event in view.timeline.events}
    keys = {(MEMBER, user_id) for user_id in people}
    keys.update(event.key for event in view.timeline.events if event.type == MEMBER)
    if not view.timeline.limited:
        keys.update(key for key in view.changed if key[0] == MEMBER)
    return keys & view.state.keys()


def choose_state(view: RoomView) -> tuple[dict[StateKey, EventNid], list[EventNid]]:
    """The state to send, and what of all that the client then has its config does not name."""
    sent, state, config = view.sent, view.state, view.config.state
    extra: list[EventNid] = []
    if view.since is None or sent is None:
        chosen = select_state(config, state)
    else:
        extra = list(sent.extra)
        chosen = {key: nid for key, nid in view.changed.items() if config_matches(config, key)}
        if sent.state != config:  # more is asked for, or less, or other
            wanted, had = select_state(config, state), select_state(sent.state, state)
            new = wanted.keys() - had.keys()
            chosen.update((key, state[key]) for key in new if state[key] not in extra)
            extra += [had[key] for key in had.keys() - wanted.keys() - view.changed.keys()]
    if any(wish.lazy for wish in config):
        for key in lazy_members(view) - chosen.keys():
            if state[key] not in extra and not config_matches(config, key):
                chosen[key] = state[key]
    extra += [nid for key, nid in chosen.items() if not config_matches(config, key)]
    return chosen, list(dict.fromkeys(extra))[-MAX_EXTRA:]


def hero(room: Room, user_id: str) -> Json:
    """A member by whom a room without a name is called."""
    content = room.content(MEMBER, user_id)
    profile = {key: content.get(key) for key in ("displayname", "avatar_url")}
    return {"user_id": user_id} | {k: v for k, v in profile.items() if isinstance(v, str)}


def describe(ask: SlidingRequest, view: RoomView, *, is_joined: bool) -> Json:
    """Name, picture, heroes and counts of a room, as far as they changed."""
    result: Json = {}
    rooms = ask.hs.rooms
    name = None
    for member, event_type, key in (
        ("name", "m.room.name", "name"),
        ("avatar", "m.room.avatar", "url"),
    ):
        nid = view.state.get((event_type, ""))
        value = cast(Event, rooms.event_by_nid(nid)).content.get(key) if nid else None
        value = value if isinstance(value, str) and value else None
        name = value if member == "name" else name
        if view.news(event_type, "") and (value or view.since is not None):
            result[member] = value
    if is_joined and view.members_changed:
        result["joined_count"] = view.room.joined_count
        result["invited_count"] = view.room.invited_count
    if is_joined and name is None and (view.members_changed or "name" in result):
        result["heroes"] = [hero(view.room, user_id) for user_id in others_in(ask, view.room)]
    return result


def timeline_members(ask: SlidingRequest, view: RoomView) -> Json:
    """The timeline of a room and what goes with it."""
    events, since = view.timeline.events, ask.since
    live = [event for event in events if since is not None and cast(int, event.pos) > since]
    result: Json = {
        "limited": view.timeline.limited,
        "prev_batch": view.timeline.prev_batch,
        "num_live": len(live),
    }
    if events:
        sums = aggregations(ask.hs, ask.user, events) if view.timeline.limited else {}
        result["timeline"] = [ask.format(event, sums.get(event.nid)) for event in events]
    return result


def entered_section(
    ask: SlidingRequest, room: Room, member: Member, config: RoomConfig, sent: SentRoom | None
) -> tuple[Json, SentRoom]:
    """What is new in a room that the user is or was in, and what the client then has."""
    view = view_room(ask, room, member, config, sent)
    is_joined = member.membership == "join"
    chosen, extra = choose_state(view)
    result = describe(ask, view, is_joined=is_joined)
    if view.since is None:
        result["initial"] = True
    if view.expanded:
        result["expanded_timeline" if ask.accepted else "unstable_expanded_timeline"] = True
    if chosen:
        events = ask.hs.rooms.events_by_nids(sorted(chosen.values()))
        result["required_state"] = [ask.format(event) for event in events]
    if view.timeline.events or result:
        if config.limit > 0:
            result.update(timeline_members(ask, view))
        bumped = any(event.type in BUMP_TYPES for event in view.timeline.events)
        if not is_joined:
            result["bump_stamp"] = max(0, member.event_nid)
        elif view.since is None or view.timeline.limited or bumped:
            result["bump_stamp"] = newest_bump(ask, room)
    keeps = sent is not None and view.since is not None and not view.timeline.limited
    limit = max(config.limit, cast(SentRoom, sent).limit) if keeps else config.limit
    return result, SentRoom(None, limit, config.state, False, tuple(extra))


def invited_section(
    ask: SlidingRequest, room: Room, member: Member, config: RoomConfig, sent: SentRoom | None
) -> tuple[Json, SentRoom]:
    """A room that the user was invited to or knocks on."""
    now = SentRoom(None, 0, config.state, False, ())
    if sent is not None and member.event_nid <= begin_of(ask, sent):
        return {}, now
    event = cast(Event, ask.hs.rooms.event_by_nid(member.event_nid))
    people = dict.fromkeys((event.sender, ask.user.user_id))
    stripped = stripped_state(room, *people)
    name = "stripped_state" if ask.accepted else "invite_state"
    return {"initial": True, name: stripped, "bump_stamp": max(0, member.event_nid)}, now


# ── 43.6  The rooms of an answer ─────────────────────────────────────────────


class Answer:
    """An answer in the making: what it selects, what it says, and what the client then has."""

    def __init__(
        self, ask: SlidingRequest, connection: SlidingConnection, changes: Changes
    ) -> None:
        self.ask = ask
        self.connection = connection
        self.changes = changes
        self.sent: dict[RoomNid, SentRoom] = {}
        self.rooms: dict[RoomNid, Json] = {}
        self.direct = direct_rooms(ask)
        self.is_lasting = True  # whether the next answer selects the same; not the rooms that end
        self.window = self._window()
        self.is_settled = connection.settled == connection.confirmed and ask.since is not None

    def _window(self) -> Window:
        """The rooms selected, anew only if something moved that could change the selection."""
        ask, window = self.ask, self.connection.window
        moved = self.changes.rooms or not self.changes.kinds.isdisjoint({ACCOUNT_DATA, ROOM_DATA})
        if window is None or window.digest != ask.digest or moved:
            window = select_rooms(ask, self.connection)
            self.connection.settled = 0
        return window

    def candidates(self) -> Iterable[RoomNid]:
        """The rooms that have to be looked at: all, or if nothing moved, a few."""
        configs = self.window.configs
        return self.changes.receipts & configs.keys() if self.is_settled else list(configs)

    async def make_rooms(self) -> None:
        """Make the sections of all rooms; others get a turn while a long answer is made."""
        pause_at = time.monotonic() + YIELD_SECONDS
        for nid in self.candidates():
            if time.monotonic() > pause_at:
                await asyncio.sleep(0)
                pause_at = time.monotonic() + YIELD_SECONDS
            self._make_room(nid)
        if not self.is_settled:
            for nid, sent in self.connection.rooms.items():
                if sent.behind is None and nid not in self.window.configs:
                    self.sent[nid] = sent._replace(behind=cast(int, self.ask.since))

    def _make_room(self, nid: RoomNid) -> None:
        ask, sent = self.ask, self.connection.rooms.get(nid)
        member, config = ask.hs.rooms.memberships(ask.nid).get(nid), self.window.configs[nid]
        if member is None:
            return
        is_dm = self.window.ids[nid] in self.direct
        moved = self._counts_moved(nid)
        is_same = sent is not None and is_dm == sent.is_dm and not moved
        if sent and is_same and not self._may_have_news(nid, sent, config, member):
            self._note(nid, sent._replace(behind=None))
            return
        room = ask.hs.rooms.by_nid(nid)
        make = invited_section if member.membership in {"invite", "knock"} else entered_section
        section, now = make(ask, room, member, config, sent)
        self.is_lasting &= member.membership in {"join", "invite", "knock"}
        if is_dm != (sent is not None and sent.is_dm):
            section["is_dm"] = is_dm
        if section or moved:
            self.rooms[nid] = self._with_counts(room, member, section, is_dm=is_dm)
        self._note(nid, now._replace(is_dm=is_dm))

    def _note(self, nid: RoomNid, now: SentRoom) -> None:
        """What the client then has of a room, if that is not what it had."""
        if now != self.connection.rooms.get(nid):
            self.sent[nid] = now

    def _may_have_news(
        self, nid: RoomNid, sent: SentRoom, config: RoomConfig, member: Member
    ) -> bool:
        if config.limit > sent.limit or config.state != sent.state:
            return True
        if sent.behind is not None:
            return self.ask.hs.rooms.by_nid(nid).last_pos > sent.behind
        return nid in self.changes.rooms and (
            member.membership == "join" or member.event_nid > begin_of(self.ask, sent)
        )

    def _counts_moved(self, nid: RoomNid) -> bool:
        """Whether the user read something meanwhile: the badge goes away in all their clients."""
        sent = self.connection.rooms.get(nid)
        if self.ask.accepted or sent is None:
            return False
        if sent.behind is None and nid not in self.changes.receipts:
            return False
        return own_receipt_moved(self.ask.hs, nid, self.ask.nid, begin_of(self.ask, sent))

    def _with_counts(self, room: Room, member: Member, section: Json, *, is_dm: bool) -> Json:
        ask = self.ask
        if is_dm:
            section["is_dm"] = True
        if ask.accepted:
            section["membership"] = member.membership
            if room.nid in self.window.lists:
                section["lists"] = self.window.lists[room.nid]
            return section
        return section | unread_sums(ask, room)

    def begin(self, nid: RoomNid) -> int | None:
        """The position from which on receipts and account data of a room are new; None: all."""
        sent = self.connection.rooms.get(nid)
        return None if sent is None else begin_of(self.ask, sent)


# ── 43.7  Extensions ─────────────────────────────────────────────────────────
#
# Each gives its section, and whether that is worth ending a wait for.


def to_device_extension(answer: Answer) -> tuple[Json, bool]:
    """Messages for the device, on a stream of their own: what `since` names is received."""
    ask, wanted = answer.ask, answer.ask.extensions["to_device"]
    since = parse_token(wanted["since"]) if wanted.get("since") else 0
    if since > ask.upto:
        return {"next_batch": stream_token(since), "events": []}, False
    limit = min(100, max(1, wanted.get("limit", 100)))
    events, upto = to_device_messages(ask.hs, ask.user, since, ask.upto, limit)
    return {"next_batch": stream_token(upto), "events": events}, bool(events)


def e2ee_extension(answer: Answer) -> tuple[Json, bool]:
    """How many keys are left, and whose devices changed."""
    ask, device_nid = answer.ask, answer.ask.user.device_nid
    result: Json = {"device_one_time_keys_count": {"signed_curve25519": 0}}
    result["device_unused_fallback_key_types"] = []
    if device_nid is not None:
        result["device_one_time_keys_count"] |= one_time_key_counts(ask.hs, device_nid)
        result["device_unused_fallback_key_types"] = unused_fallback_types(ask.hs, device_nid)
    if ask.since is None:
        return result, False
    changed, left = device_list_changes(ask.hs, ask.nid, ask.since, ask.upto)
    return result | {"device_lists": {"changed": changed, "left": left}}, bool(changed or left)


def rooms_of_extension(answer: Answer, name: str, moved: set[RoomNid]) -> Iterator[Room]:
    """The rooms that an extension is wanted for, of those that are sent, come back, or moved."""
    ask, window = answer.ask, answer.window
    for nid in dict.fromkeys((*answer.sent, *answer.rooms, *moved)):
        if nid in window.configs:
            room = ask.hs.rooms.by_nid(nid)
            if ask.wants_room(name, room.room_id, window.lists.get(nid, ())):
                yield room


def account_data_extension(answer: Answer) -> tuple[Json, bool]:
    """The account's data that changed, and that of the rooms: all when a room comes first."""
    ask, since = answer.ask, answer.ask.since or 0
    events = global_account_data(ask.hs, ask.nid, since)
    rules = push_rules_account_data(ask.hs, ask.nid, since)
    events = events if rules is None else [*events, rules]
    changed = room_account_data(ask.hs, ask.nid, since)
    rooms: Json = {}
    for room in rooms_of_extension(answer, "account_data", set(changed)):
        begin = answer.begin(room.nid)
        if begin is None:
            found = room_account_data_of(ask.hs, ask.nid, room.nid)
        elif begin == since:
            found = changed.get(room.nid, [])
        else:
            found = room_account_data(ask.hs, ask.nid, begin).get(room.nid, [])
        if found:
            rooms[room.room_id] = found
    return {"global": events, "rooms": rooms}, bool(events or rooms)


def receipts_extension(answer: Answer) -> tuple[Json, bool]:
    """Receipts that moved; of a room that comes first, those at the events that come with it."""
    ask = answer.ask
    rooms: Json = {}
    for room in rooms_of_extension(answer, "receipts", answer.changes.receipts):
        if room.membership_of(ask.nid) != "join":
            continue
        section, only = answer.rooms.get(room.nid, {}), None
        begin = answer.begin(room.nid) or 0
        if section.keys() & {"initial", "unstable_expanded_timeline", "expanded_timeline"}:
            only, begin = {event["event_id"] for event in section.get("timeline", ())}, 0
        content = receipts_since(ask.hs, room.nid, ask.nid, begin, only)
        if content:
            rooms[room.room_id] = {"type": "m.receipt", "content": content}
    return {"rooms": rooms}, bool(rooms)


def typing_extension(answer: Answer) -> tuple[Json, bool]:
    """Who types, where that changed, and where a room comes first."""
    ask, rooms = answer.ask, cast(Json, {})
    for room in rooms_of_extension(answer, "typing", answer.changes.typing):
        if room.membership_of(ask.nid) == "join":
            users = typing_users(ask.hs, room)
            if users or room.nid in answer.changes.typing:
                rooms[room.room_id] = {"type": "m.typing", "content": {"user_ids": users}}
    return {"rooms": rooms}, bool(rooms)


def subscription_page(
    hs: Homeserver, user_nid: UserNid, since: int, upto: int, limit: int
) -> tuple[Json, int | None]:
    """The newest subscriptions to threads that changed, and where those before them begin."""
    limit = min(100, max(1, limit))
    changes, page = hs.threads.changed(user_nid, since, upto, limit + 1), cast(Json, {})
    for room_id, root_id, stamp, state in changes[:limit]:
        is_over = state == "none"
        rooms = page.setdefault("unsubscribed" if is_over else "subscribed", {})
        found = {"bump_stamp": stamp} | ({} if is_over else {"automatic": state == "automatic"})
        rooms.setdefault(room_id, {})[root_id] = found
    return page, changes[limit - 1].bump_stamp - 1 if len(changes) > limit else None


def threads_extension(answer: Answer) -> tuple[Json, bool]:
    """The threads that the user began or ceased to follow; nothing if there are none.  MSC4308."""
    ask, wanted = answer.ask, answer.ask.extensions["io.element.msc4308.thread_subscriptions"]
    limit = wanted.get("limit", 100)
    page, more = subscription_page(ask.hs, ask.nid, ask.since or 0, ask.upto, limit)
    return (page if more is None else {**page, "prev_batch": stream_token(more)}), bool(page)


MSC4308_PATH = "/_matrix/client/unstable/io.element.msc4308/thread_subscriptions"


@route("GET", MSC4308_PATH, auth=USER, also=("/_matrix/client/v1/thread_subscriptions",))
async def get_thread_subscriptions(hs: Homeserver, request: Request) -> Json:
    """What an answer of sliding sync had no room for, page by page, the newest first.  MSC4308."""
    if request.arg("dir") != "b":
        raise invalid_param("dir is b")
    begin, to = (request.arg(name) for name in ("from", "to"))
    upto = parse_token(begin) if begin else hs.stream.position
    limit = request.int_arg("limit", 100, 1, 100)
    since = parse_token(to) if to else 0
    page, more = subscription_page(hs, request.user.nid, since, upto, limit)
    return page if more is None else {**page, "end": stream_token(more)}


EXTENSION_MAKERS: Final[dict[str, Callable[[Answer], tuple[Json, bool]]]] = {
    "to_device": to_device_extension,
    "e2ee": e2ee_extension,
    "account_data": account_data_extension,
    "receipts": receipts_extension,
    "typing": typing_extension,
    "io.element.msc4308.thread_subscriptions": threads_extension,
}

# ── 43.8  The answer ─────────────────────────────────────────────────────────


def position_of(ask: SlidingRequest, pos: str | None) -> tuple[int, int] | None:
    """The stream position and the snapshot in a `pos`."""
    if not pos:
        return None
    match = TOKEN.fullmatch(pos)
    if match is None or match[2] is None or int(match[1]) > ask.hs.stream.position:
        raise unknown_pos()
    return int(match[1]), int(match[2])


def open_connection(ask: SlidingRequest, pos: str | None) -> SlidingConnection:
    """The connection that a request goes on with, or a new one; from now on it is the request's."""
    place = position_of(ask, pos)
    if place is None:
        connection = ask.hs.sliding.start(ask)
    else:
        ask.since = place[0]
        connection = ask.hs.sliding.find(ask, place[1])
    connection.turn = ask
    return connection


async def answer_once(
    ask: SlidingRequest, connection: SlidingConnection, changes: Changes
) -> tuple[Answer, Json, bool]:
    """What is new now, as the members of a response, and whether that is anything."""
    answer = Answer(ask, connection, changes)
    await answer.make_rooms()
    connection.window = answer.window if answer.is_lasting else None
    if not answer.sent:
        connection.settled = connection.confirmed
    extensions, is_news = cast(Json, {}), bool(answer.rooms)
    for name, make in EXTENSION_MAKERS.items():
        if name in ask.extensions:
            section, has_news = make(answer)
            is_news = is_news or has_news
            if section:
                extensions[name] = section
    rooms = {answer.window.ids[nid]: section for nid, section in answer.rooms.items()}
    result: Json = {"rooms": rooms, "extensions": extensions}
    if ask.lists:
        result["lists"] = answer.window.answer
    return answer, result, is_news


def finish(
    ask: SlidingRequest, connection: SlidingConnection, answer: Answer, result: Json
) -> Json:
    """Remember what the client has with this answer, and name that in its `pos`."""
    if answer.sent:
        ask.hs.sliding.save(connection, answer.sent)
        connection.settled = connection.sent
    return {"pos": f"{stream_token(ask.upto)}_{connection.sent}", **result}


def superseded(pos: str | None) -> Json:
    """What a request gets that its client gave up for another: nothing, as it still has `pos`."""
    if pos is None:
        raise unknown_pos()
    return {"pos": pos, "rooms": {}, "extensions": {}}


def acknowledge_sliding(ask: SlidingRequest) -> None:
    """Delete the to-device messages that the client says it has."""
    since = ask.extensions.get("to_device", {}).get("since")
    if since and parse_token(since) <= ask.upto:
        acknowledge_to_device(ask.hs, ask.user, parse_token(since))


async def answer_sliding(
    hs: Homeserver, request: Request, ask: SlidingRequest, pos: str | None, seconds: float
) -> Json:
    """What is new since `pos`; waits when nothing is.

    Trap: a client that changes its mind asks again from the same `pos`. The answer to the request
    that it gave up must not count as sent.
    """
    ends = time.monotonic() + seconds
    connection = open_connection(ask, pos)
    acknowledge_sliding(ask)
    changes, looked = Changes(set(), set(), set(), set()), ask.since
    is_late = ask.since is None
    while True:
        ask.upto = hs.stream.position
        if looked is not None:
            changes = Changes(*map(operator.or_, changes, changes_since(ask, looked)))
        looked = ask.upto if ask.since is not None else None
        answer, result, is_news = await answer_once(ask, connection, changes)
        if connection.turn is not ask:
            return superseded(pos)
        if is_news or is_late:
            return finish(ask, connection, answer, result)
        if hs.stream.position == ask.upto:
            is_late = not await hs.notifier.wait(request, ends - time.monotonic())
            hs.accounts.check_logged_in(request.user)


SLIDING_PATH = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"
SLIDING_OLD = "/_matrix/client/unstable/org.matrix.msc3575/sync"


@route("POST", SLIDING_PATH, auth=GUEST, limit=None, also=(SLIDING_OLD,), body=SLIDING_BODY)
async def post_sliding_sync(hs: Homeserver, request: Request) -> Json:
    """What is new in the windows since `pos`, in the form that is deployed.

    Spec: MSC4186 under its unstable prefix.  400 M_UNKNOWN_POS for a `pos` that is not the newest
    of this connection, nor the one before.
    """
    timeout = min(request.int_arg("timeout", 0, 0, 2**53), MAX_SYNC_TIMEOUT_MS) / 1000
    asked = request.arg("set_presence")
    note_sync(hs, request.user, asked if asked in PRESENCE_STATES else "online", timeout)
    ask = SlidingRequest(hs, request, accepted=False)
    return await answer_sliding(hs, request, ask, request.arg("pos"), timeout)


@route("POST", "/_matrix/client/v4/sync", auth=GUEST, limit=None, body=SLIDING_BODY_V4)
async def post_sync(hs: Homeserver, request: Request) -> Json:
    """The same in the form that was accepted.  Spec: MSC4186."""
    body = request.json
    timeout = min(max(0, body.get("timeout", 0)), MAX_SYNC_TIMEOUT_MS) / 1000
    note_sync(hs, request.user, body.get("set_presence", "online"), timeout)
    ask = SlidingRequest(hs, request, accepted=True)
    return await answer_sliding(hs, request, ask, body.get("pos"), timeout)


# ═════════════════════════════════════════════════════════════════════════════
#  22. MEDIA
#
#  Files that users upload and everyone who is logged in may download: a row with
#  what the uploader said about a file, and on the disk one file per content, named
#  by its SHA-256. Bytes stream through a temporary file, and a row is written only
#  when they are on the disk. What goes out can never run in a browser.
#                                           spec: CS-API "Content repository"
# ═════════════════════════════════════════════════════════════════════════════

MEDIA_FOLDER = "media"
MEDIA_ID = re.compile(r"[0-9A-Za-z_-]{1,255}")
UPLOAD_CHUNK = 128 * 1024  # bytes gathered before they go to the disk in a thread
UPLOAD_LIFETIME = 24 * 3600 * 1000  # milliseconds from create to the last chance to upload
PENDING_UPLOADS = 50  # media ids that one user may hold without having uploaded
NEW_MEDIA = "/_matrix/client/v1/media/"
OLD_MEDIA = "/_matrix/media/v3/"
OLD_VERSIONS = ("v1",)
MSC3916 = ("unstable/org.matrix.msc3916",)  # what is stable since, at the places of old clients
MSC2246 = ("unstable/fi.mau.msc2246",)
ONE_FILE = "{server}/{media_id}"
WITH_NAME = ONE_FILE + "/{name...}"

schema("""
CREATE TABLE media (
    media_nid INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice
    server TEXT NOT NULL,   -- empty: this one
    media_id TEXT NOT NULL,
    user_nid INTEGER NOT NULL,
    preview INTEGER NOT NULL DEFAULT 0,     -- a picture of a page, see chapter 50
    fetched INTEGER GENERATED ALWAYS AS (preview OR server <> ''), -- and not uploaded here
    quarantined INTEGER NOT NULL DEFAULT 0, -- an admin wants nobody to have it
    sha256 TEXT,            -- hexadecimal, the name of the file; NULL until uploaded
    size INTEGER,           -- bytes
    content_type TEXT,
    filename TEXT,
    created_ts INTEGER NOT NULL,
    last_access_ts INTEGER NOT NULL,
    expires_ts INTEGER,     -- when an id without a file is forgotten; NULL once uploaded
    UNIQUE (server, media_id)
);
CREATE INDEX media_by_hash ON media (sha256);
CREATE INDEX media_by_user ON media (user_nid, last_access_ts);
CREATE INDEX media_by_server ON media (server, last_access_ts);
CREATE INDEX media_fetched ON media (fetched, last_access_ts, size);
CREATE INDEX media_pending ON media (expires_ts) WHERE expires_ts IS NOT NULL;
""")

invariant(
    "media rows that are neither uploaded nor waiting for an upload",
    "SELECT media_id FROM media WHERE (sha256 IS NULL) = (expires_ts IS NULL)",
)

log_media = logging.getLogger("conduit.media")


class MediaRow(NamedTuple):
    """What is known of one media id; without a hash it waits for its upload."""

    nid: int
    user_nid: UserNid
    sha256: str  # empty until uploaded
    content_type: str
    filename: str | None


StoredUpload = tuple[str, int, str, str | None]  # SHA-256, size, type, name

# ── 22.1  Receiving a file ───────────────────────────────────────────────────


def media_file(folder: Path, sha256: str) -> Path:
    """Where the bytes with this hash are; 256 folders keep each of them small."""
    return folder / sha256[:2] / sha256[2:]


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """507 or 500 for a file that the disk does not take, with the cause in the log."""
    try:
        yield
    except OSError as error:
        log_media.error("a file could not be stored: %s", error)
        raise storage_error(error) from error


class IncomingFile:
    """A temporary file that becomes a stored one when it is complete. For threads of the pool.

    Trap: a cancelled request does not stop the thread that writes for it; after `discard` that
    thread finds the file closed, or nothing to give its name to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._handle = path.open("xb")

    def write(self, data: bytes | bytearray) -> None:
        """Append to the file and to the hash."""
        self._handle.write(data)
        self._digest.update(data)

    def finish(self, rest: bytes | bytearray, folder: Path) -> tuple[str, int]:
        """Force everything onto the disk and give the file its name; hash and size."""
        self.write(rest)
        self._handle.flush()
        os.fsync(self._handle.fileno())
        sha256, size = self._digest.hexdigest(), self._handle.tell()
        target = media_file(folder, sha256)
        self.path.replace(target)
        sync_path(target.parent)
        return sha256, size

    def discard(self) -> None:
        """Close the file, and leave nothing behind if it was not finished."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self._handle.close()


async def receive_file(hs: Homeserver, chunks: AsyncIterator[bytes]) -> tuple[str, int]:
    """Store a body of unknown length in constant memory: hash and size, or no trace of it."""
    with storing():
        incoming = IncomingFile(hs.media.folder / "incoming" / random_token(24))
        buffer = bytearray()
        hs.media.receiving += 1
        try:
            async for chunk in chunks:
                buffer += chunk
                if len(buffer) >= UPLOAD_CHUNK:
                    await hs.db.in_thread(incoming.write, buffer)
                    buffer = bytearray()
            return await hs.db.in_thread(incoming.finish, buffer, hs.media.folder)
        finally:
            hs.media.receiving -= 1
            hs.db.pool.submit(incoming.discard)


# ── 22.2  Headers that cannot hurt ───────────────────────────────────────────

DEFAULT_TYPE = "application/octet-stream"
MIME_TOKEN = r"[0-9A-Za-z!#$%&'*+.^_`|~-]+"  # noqa: S105 - the grammar of a header, no secret
CONTENT_TYPE = re.compile(
    rf'({MIME_TOKEN}/{MIME_TOKEN})(?: ?; ?{MIME_TOKEN}=(?:{MIME_TOKEN}|"[ !#-\[\]-~]*"))*'
)
PLAIN_FILENAME = re.compile(r"[0-9A-Za-z!#$&'()+,._ ~=@^{}-]+")
# A browser that gets one of these with nosniff only ever shows it, and never runs it.
INLINE_TYPES = re.compile(
    r"text/(?:css|plain|csv)|application/(?:ld\+)?json"
    r"|image/(?:jpeg|gif|png|apng|webp|avif)|video/(?:mp4|webm|ogg|quicktime)"
    r"|audio/(?:mp4|webm|aac|mpeg|ogg|wave|wav|x-wav|x-pn-wav|flac|x-flac)"
)
MEDIA_HEADERS: Final = {
    "Content-Security-Policy": "sandbox; default-src 'none'; script-src 'none';"
    " plugin-types application/pdf; style-src 'unsafe-inline'; object-src 'self';",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, max-age=31536000, immutable",
}


def safe_content_type(text: str | None) -> str:
    """The uploader's Content-Type if it is one; anything else could split or confuse a header."""
    kept = (text or "").strip(" \t")
    return kept if len(kept) <= MAX_ID_BYTES and CONTENT_TYPE.fullmatch(kept) else DEFAULT_TYPE


def safe_filename(text: str | None) -> str | None:
    """A file name without folders, control characters and surrogates; None if nothing is left."""
    kept = "".join(c for c in re.sub(r"[/\\]", "_", text or "") if c.isprintable())
    return kept[:MAX_ID_BYTES] or None


def content_disposition(content_type: str, filename: str | None) -> str:
    """Inline for what only shows, attachment for the rest.  Spec: "Serving inline content"."""
    kind = content_type.partition(";")[0].strip().lower()
    disposition = "inline" if INLINE_TYPES.fullmatch(kind) else "attachment"
    if filename is None:
        return disposition
    if PLAIN_FILENAME.fullmatch(filename):
        return f'{disposition}; filename="{filename}"'
    return f"{disposition}; filename*=utf-8''{quote(filename, safe='')}"


def size_of(path: Path) -> int | None:
    """The size of a file, None if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def file_response(request: Request, path: Path, kind: str, filename: str | None) -> Response:
    """A file, sandboxed and not sniffed, for the client alone to keep; 304 if it has it."""
    tag = f'"{path.parent.name}{path.name}"'  # a hash of the content is in the name
    disposition = content_disposition(kind, filename)
    headers = {**MEDIA_HEADERS, "Content-Disposition": disposition, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(304, headers=headers)
    size = size_of(path)
    if size is None:
        log_media.error("%s is missing; restore the media folder from a backup", path)
        raise not_found("Media not found")
    return Response(body=FileBody(path, size), headers=headers, content_type=kind)


# ── 22.3  Thumbnails ─────────────────────────────────────────────────────────

ThumbnailSize = tuple[int, int, str]  # width, height, method
THUMBNAIL_SIZES: Final[tuple[ThumbnailSize, ...]] = (  # those kept; others get the next one up
    *((32, 32, "crop"), (96, 96, "crop")),
    *((320, 240, "scale"), (640, 480, "scale"), (800, 600, "scale"), (1600, 1200, "scale")),
    (1_000_000, 1_000_000, "scale"),  # no picture is that large: the original
)
# The only formats that a decoder gets to see, by their first bytes; and what betrays more than
# one frame near the start of a file, which is only asked when Pillow is not there.
IMAGE_MAGIC = re.compile(
    rb"(?s)(?P<png>\x89PNG\r\n\x1a\n)|(?P<jpeg>\xff\xd8\xff)"
    rb"|(?P<gif>GIF8[79]a)|(?P<webp>RIFF....WEBP)"
)
MOVING_MARK = re.compile(rb"acTL|NETSCAPE2\.0|ANIM")
IMAGE_HEAD = 65_536  # bytes in which it is looked for
MAX_PIXELS = 24_000_000  # they are in memory as a whole, 4 bytes each
MAX_PIXELS_BASELINE = 100_000_000  # of a baseline JPEG, which is scaled down while it is decoded
MAX_MOVING_BYTES = 4_000_000  # an animation up to this size is its own thumbnail
EXIF_ORIENTATION = 0x0112  # from 5 to 8 it swaps width and height


def image_head(path: Path) -> tuple[str, bytes]:
    """The type of an image, whatever its uploader said, and its first bytes; "" for none."""
    try:
        with path.open("rb") as handle:
            head = handle.read(IMAGE_HEAD)
    except FileNotFoundError:
        return "", b""
    found = IMAGE_MAGIC.match(head)
    return f"image/{found.lastgroup}" if found else "", head


def choose_size(width: int, height: int, method: str) -> ThumbnailSize:
    """The smallest size kept that is not smaller than what was asked for.

    Spec: "Servers MUST NOT return a smaller thumbnail than requested". A crop that is not square
    gets the whole picture, from which the client cuts.
    """
    methods = {"crop", "scale"} if method == "crop" and width == height else {"scale"}
    for kept in THUMBNAIL_SIZES:
        if kept[0] >= width and kept[1] >= height and kept[2] in methods:
            return kept
    raise invalid_param("width and height are too large")


def load_pillow() -> tuple[Any, Any] | None:
    """Pillow's modules Image and ImageOps if it is installed."""
    try:
        # Optional, and 10 MB of memory that a server without thumbnails does not spend.
        from PIL import Image, ImageOps  # noqa: PLC0415 - see above
    except ImportError:
        return None
    return Image, ImageOps


def shrink(pillow: Any, image: Any, scale: float, crop: tuple[int, int] | None) -> bytes:
    """Decode the first frame, scale it, cut it, turn it as its camera says, and encode it."""
    images, operations = pillow
    goal = (math.ceil(image.width * scale), math.ceil(image.height * scale))
    image.draft("RGB", (max(goal), max(goal)))
    clear = image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info
    picture = image.convert("RGBA" if clear else "RGB")
    if crop is not None and scale < 1:
        picture = operations.fit(picture, crop, images.Resampling.LANCZOS)
    else:
        picture = picture.resize(goal, images.Resampling.LANCZOS, reducing_gap=2.0)
    output = io.BytesIO()
    operations.exif_transpose(picture).save(output, "PNG" if clear else "JPEG", quality=85)
    return output.getvalue()


def render_thumbnail(
    pillow: Any, source: Path, size: ThumbnailSize, animated: bool | None
) -> bytes | None:
    """The thumbnail's bytes; None when the original is the right answer."""
    with pillow[0].open(source, formats=("PNG", "JPEG", "GIF", "WEBP")) as image:
        baseline = image.format == "JPEG" and not image.info.get("progressive")
        if image.width * image.height > (MAX_PIXELS_BASELINE if baseline else MAX_PIXELS):
            raise pillow[0].DecompressionBombError
        moving = bool(getattr(image, "is_animated", False))
        if moving and animated and source.stat().st_size <= MAX_MOVING_BYTES:
            return None
        width, height, method = size
        turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
        box = (height, width) if turned else (width, height)
        scale = max(box[0] / image.width, box[1] / image.height)
        if scale >= 1 and not moving:
            return None
        return shrink(pillow, image, min(scale, 1.0), box if method == "crop" else None)


def thumbnail_file(folder: Path, sha256: str, size: ThumbnailSize) -> Path:
    """Where a thumbnail is kept."""
    return media_file(folder / "thumbnails", sha256 + "-{}x{}-{}".format(*size))


def keep_thumbnail(target: Path, data: bytes) -> None:
    """Write a thumbnail so that it is there as a whole or not at all."""
    partial = target.with_name(f"{target.name}.partial")
    with storing():
        try:
            target.parent.mkdir(exist_ok=True)
            partial.write_bytes(data)
            sync_path(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def make_thumbnail(
    source: Path, target: Path, size: ThumbnailSize, animated: bool | None
) -> tuple[Path, str]:
    """Find or make the file that answers a thumbnail request, and its type. For a thread."""
    kept, _ = image_head(target)
    if kept and not animated:
        return target, kept
    kind, head = image_head(source)
    pillow = load_pillow()
    cannot = MatrixError(400, "M_UNKNOWN", "Cannot generate thumbnails for the requested content")
    if not kind or (pillow is None and animated is False and MOVING_MARK.search(head)):
        raise cannot
    try:
        rendered = None if pillow is None else render_thumbnail(pillow, source, size, animated)
    except Exception as error:  # a decoder fed with hostile bytes may raise anything
        if type(error).__name__ == "DecompressionBombError":
            raise too_large("Content is too large to thumbnail") from None
        raise cannot from error
    if rendered is None:
        return source, kind
    keep_thumbnail(target, rendered)
    return target, image_head(target)[0]


# ── 22.4  The media of this server ───────────────────────────────────────────


@checker
def media_problems(folder: Path, connection: sqlite3.Connection) -> Iterator[str]:
    """For --check: the media whose file is not in the database folder, or has another size."""
    rows = connection.execute("SELECT media_id, sha256, size FROM media WHERE sha256 IS NOT NULL")
    for media_id, sha256, size in rows:
        if size_of(media_file(folder / MEDIA_FOLDER, sha256)) != size:
            yield f"media {media_id}: its file is missing or has another size"


MXC_URI = re.compile(r"mxc://([^/]{1,255})/([0-9A-Za-z_-]{1,255})")


def media_in(value: Any) -> Iterator[tuple[str, str]]:
    """The media that an event's content names, as (server, media id): such as an admin deletes."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and (match := MXC_URI.fullmatch(value)):
            yield match[1], match[2]


class Media:
    """The folder of files, their rows, and who waits for an upload that was announced."""

    def __init__(self, hs: Homeserver) -> None:
        self.db = hs.db
        self.folder = hs.db.folder / MEDIA_FOLDER
        self.server_name = hs.config.server_name
        self.rendering = asyncio.Lock()  # one picture is decoded at a time, for the memory's sake
        self.touched: dict[int, int] = {}  # when files were asked for; reading must not write
        self._waiting: list[tuple[int, asyncio.Future[Any]]] = []
        self.receiving = 0  # files that are being stored
        self._unused: set[str] = set()  # hashes of files that may have lost their last row
        try:
            self._prepare()
        except OSError as error:
            raise DatabaseRefused(f"{self.folder} cannot be used: {error.strerror}") from error

    def _prepare(self) -> None:
        """Make all folders, and remove what a stopped server left half written.

        Trap: a folder made with its first file would have to be on the disk before that file is
        acknowledged, also to the second upload that finds it there.
        """
        names = ["", "incoming", "thumbnails", *(f"{number:02x}" for number in range(256))]
        if not (self.folder / names[-1]).is_dir():
            for name in names:
                (self.folder / name).mkdir(mode=0o700, exist_ok=True)
            sync_path(self.folder)
            sync_path(self.folder.parent)
        for left in (self.folder / "incoming").iterdir():
            left.unlink()

    def add(
        self,
        user_nid: UserNid,
        upload: StoredUpload | None,
        expires: int | None,
        *,
        preview: bool = False,
    ) -> str:
        """A new media id, for a stored file or for an upload that comes before it expires."""
        media_id, now = random_token(24), now_ms()
        with self.db.write():
            self.db.execute(
                """
                INSERT INTO media (sha256, size, content_type, filename, server, media_id,
                    user_nid, preview, created_ts, last_access_ts, expires_ts)
                VALUES (?, ?, ?, ?, '', ?, ?, ?, ?, ?, ?)
                """,
                (*(upload or (None,) * 4), media_id, user_nid, preview, now, now, expires),
            )
        return media_id

    def find(self, server: str, media_id: str) -> MediaRow | None:
        """The row of a media id, unless it has expired; of this server when `server` is empty."""
        row = self.db.one(
            """
            SELECT media_nid, user_nid, IFNULL(sha256, ''), IFNULL(content_type, ''), filename
            FROM media
            WHERE server = ?
              AND media_id = ?
              AND (expires_ts IS NULL OR expires_ts > ?)
              AND NOT quarantined
            """,
            (server, media_id, now_ms()),
        )
        return None if row is None else MediaRow(*row)

    def complete(self, row: MediaRow, upload: StoredUpload) -> bool:
        """Give an announced media id its file; False when another upload was faster."""
        with self.db.write():
            cursor = self.db.execute(
                """
                UPDATE media
                SET sha256 = ?, size = ?, content_type = ?, filename = ?, expires_ts = NULL
                WHERE media_nid = ?
                  AND sha256 IS NULL
                """,
                (*upload, row.nid),
            )
        for nid, future in self._waiting:
            if nid == row.nid and not future.done():
                future.set_result(True)
        return cursor.rowcount > 0

    async def wait_until_uploaded(self, row: MediaRow, request: Request, wait_ms: int) -> None:
        """Wait for an announced upload; 504 M_NOT_YET_UPLOADED when it does not come in time."""
        waiting = (row.nid, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            if not await request.wait(waiting[1], wait_ms / 1000):
                raise MatrixError(504, "M_NOT_YET_UPLOADED", "Content has not yet been uploaded")
        finally:
            self._waiting.remove(waiting)

    # Deleting

    def delete(self, nids: Iterable[int]) -> int:
        """Delete media, and soon the files that no other media id has; how many there were."""
        count = 0
        with self.db.write():
            for nid in nids:
                query = "SELECT sha256 FROM media WHERE media_nid = ?"
                self._unused.add(self.db.value(query, (nid,)) or "")
                delete = "DELETE FROM media WHERE media_nid = ?"
                count += self.db.execute(delete, (nid,)).rowcount
        return count

    def select(
        self, *, user_nid: UserNid | None = None, server: str = "", before: int
    ) -> list[int]:
        """Media by who uploaded them, else by their server (empty: this one), last used before.

        `before` is in milliseconds since the epoch.
        """
        query, of = "SELECT media_nid FROM media WHERE server = ? AND last_access_ts < ?", server
        if user_nid is not None:
            query = "SELECT media_nid FROM media WHERE user_nid = ? AND last_access_ts < ?"
        return [nid for (nid,) in self.db.all(query, (user_nid or of, before))]

    def of_event(self, event: Event) -> list[int]:
        """The media that an event names, with the thumbnails that their servers made of them."""
        query = """
            SELECT media_nid
            FROM media
            WHERE server = :server
              AND (media_id = :id OR (media_id > :id || '/' AND media_id < :id || '0'))
        """
        found: set[int] = set()
        for server, media_id in media_in(event.content):
            of = "" if server == self.server_name else server
            found.update(nid for (nid,) in self.db.all(query, {"server": of, "id": media_id}))
        return sorted(found)

    def quarantine(self, nids: Iterable[int], quarantined: bool = True) -> None:
        """Let nobody have these media any more, or again; their files stay."""
        with self.db.write():
            for nid in nids:
                update = "UPDATE media SET quarantined = ? WHERE media_nid = ?"
                self.db.execute(update, (quarantined, nid))

    async def sweep(self) -> None:
        """Remove files whose last row was deleted, once that is on the disk.

        Trap: a file that is being stored may be one of these and has no row yet.
        """
        unused, self._unused = self._unused - {""}, set()
        await self.db.synced()
        for sha256 in unused:
            await asyncio.sleep(0)
            if self.receiving:
                self._unused.add(sha256)
            elif not self.db.value("SELECT 1 FROM media WHERE sha256 = ?", (sha256,)):
                kept = [thumbnail_file(self.folder, sha256, size) for size in THUMBNAIL_SIZES]
                for path in (media_file(self.folder, sha256), *kept):
                    path.unlink(missing_ok=True)

    def expire(self, days: int | None, budget_mb: int | None) -> None:
        """Delete what was fetched from elsewhere and not used for days, or is over the budget."""
        if days is not None:
            query = """
                SELECT media_nid
                FROM media
                WHERE fetched = 1 AND last_access_ts < ?
                LIMIT 1000
            """
            self.delete(nid for (nid,) in self.db.all(query, (now_ms() - days * 86_400_000,)))
        if budget_mb is not None:
            query = "SELECT SUM(size) FROM media WHERE fetched = 1"
            excess = (self.db.value(query) or 0) - budget_mb * 1_000_000
            oldest = """
                SELECT media_nid, size
                FROM media
                WHERE fetched = 1
                ORDER BY last_access_ts
                LIMIT 1000
            """
            rows = iter(self.db.all(oldest) if excess > 0 else [])
            while excess > 0 and (row := next(rows, None)) is not None:
                self.delete([row[0]])
                excess -= row[1] or 0

    def maintain(self) -> None:
        """Write the times of last access, and forget the ids that nothing was uploaded to."""
        touched, self.touched = self.touched, {}
        expired = self.db.value("SELECT 1 FROM media WHERE expires_ts <= ?", (now_ms(),))
        if touched or expired:
            with self.db.write():
                self.db.connection.executemany(
                    "UPDATE media SET last_access_ts = ? WHERE media_nid = ?",
                    [(ts, nid) for nid, ts in touched.items()],
                )
                self.db.execute("DELETE FROM media WHERE expires_ts <= ?", (now_ms(),))


# ── 22.5  Uploading ──────────────────────────────────────────────────────────


def find_media(hs: Homeserver, server: str, media_id: str) -> MediaRow:
    """The row of an mxc:// URI; 404 for what is malformed, unknown, expired, or another server's.

    Spec: "Security considerations" of the content repository.
    """
    is_ours = server == hs.config.server_name and MEDIA_ID.fullmatch(media_id)
    row = hs.media.find("", media_id) if is_ours else None
    if row is None:
        raise not_found("Media not found")
    return row


async def receive_upload(hs: Homeserver, request: Request) -> StoredUpload:
    """Store the body, with the type and the name that the uploader gives it, made safe for ever."""
    sha256, size = await receive_file(hs, request.stream)
    hs.accounts.check_logged_in(request.user)
    content_type = safe_content_type(request.headers.get("content-type"))
    return sha256, size, content_type, safe_filename(request.arg("filename"))


@route("POST", f"{OLD_MEDIA}upload", auth=USER, limit="upload", also=OLD_VERSIONS, body=STREAM)
async def upload_media(hs: Homeserver, request: Request) -> Json:
    """Store a file and name it.  Spec: POST /_matrix/media/v3/upload."""
    media_id = hs.media.add(request.user.nid, await receive_upload(hs, request), None)
    return {"content_uri": f"mxc://{hs.config.server_name}/{media_id}"}


@route("POST", "/_matrix/media/v1/create", auth=USER, limit="upload", also=MSC2246)
async def create_media(hs: Homeserver, request: Request) -> Json:
    """Hand out a media id now, for content that follows.  Spec: POST /_matrix/media/v1/create."""
    now = now_ms()
    pending, first = hs.db.one(
        "SELECT COUNT(*), MIN(expires_ts) FROM media WHERE expires_ts > ? AND user_nid = ?",
        (now, request.user.nid),
    )
    if pending >= PENDING_UPLOADS:
        raise limit_exceeded(first - now, "Too many media ids wait for their upload")
    media_id = hs.media.add(request.user.nid, None, now + UPLOAD_LIFETIME)
    content_uri = f"mxc://{hs.config.server_name}/{media_id}"
    return {"content_uri": content_uri, "unused_expires_at": now + UPLOAD_LIFETIME}


@route("PUT", f"{OLD_MEDIA}upload/{ONE_FILE}", auth=USER, limit="upload", body=STREAM, also=MSC2246)
async def upload_later(hs: Homeserver, request: Request, server: str, media_id: str) -> Json:
    """Store the content of a media id that this user created; once.

    Spec: PUT /_matrix/media/v3/upload/{serverName}/{mediaId}.
    """
    row = find_media(hs, server, media_id)
    if row.user_nid != request.user.nid:
        raise forbidden("This media id was created by another user")
    if row.sha256 or not hs.media.complete(row, await receive_upload(hs, request)):
        raise MatrixError(409, "M_CANNOT_OVERWRITE_MEDIA", "Media already uploaded")
    return {}


# ── 22.6  Downloading ────────────────────────────────────────────────────────
#
# Before v1.11 media needed no access token. Those endpoints are frozen: what is uploaded since then
# SHOULD only be had with authentication, and all media of this server is newer. So the old paths
# answer an old client that sends its token, and everyone else with the 404 for frozen media.


async def uploaded(hs: Homeserver, request: Request, server: str, media_id: str) -> MediaRow:
    """The row of a media id that has its content, for which it may wait a while."""
    if request.requester is None:  # before anything that tells whether the media exists
        raise not_found("Media not found; use /_matrix/client/v1/media with an access token")
    wait_ms = request.int_arg("timeout_ms", 20_000, 0, 60_000)
    row = find_media(hs, server, media_id)
    if not row.sha256:
        await hs.media.wait_until_uploaded(row, request, wait_ms)
        row = find_media(hs, server, media_id)
    hs.media.touched[row.nid] = now_ms()
    return row


@route("GET", f"{NEW_MEDIA}download/{WITH_NAME}", auth=GUEST, limit="media", also=MSC3916)
@route("GET", f"{OLD_MEDIA}download/{WITH_NAME}", auth=OPTIONAL, limit="media", also=OLD_VERSIONS)
async def download_media(
    hs: Homeserver, request: Request, server: str, media_id: str, name: str
) -> Response:
    """A file as it was uploaded, or a range of it, under its own or another name.

    Spec: GET /_matrix/client/v1/media/download/{serverName}/{mediaId}/{fileName}.
    """
    row = await uploaded(hs, request, server, media_id)
    filename = safe_filename(name) or row.filename
    path = media_file(hs.media.folder, row.sha256)
    return file_response(request, path, row.content_type, filename)


def wanted_size(request: Request) -> ThumbnailSize:
    """The kept size that answers a thumbnail request, whose arguments are checked here."""
    if None in {request.arg("width"), request.arg("height")}:
        raise missing_param("width and height are needed")
    method = request.arg("method", "scale")
    if method not in {"scale", "crop"}:
        raise invalid_param("method must be scale or crop")
    width, height = (request.int_arg(name, 0, 1, 1_000_000) for name in ("width", "height"))
    return choose_size(width, height, method)


@route("GET", f"{NEW_MEDIA}thumbnail/{ONE_FILE}", auth=GUEST, limit="media", also=MSC3916)
@route("GET", f"{OLD_MEDIA}thumbnail/{ONE_FILE}", auth=OPTIONAL, limit="media", also=OLD_VERSIONS)
async def get_thumbnail(hs: Homeserver, request: Request, server: str, media_id: str) -> Response:
    """A smaller picture of a picture; one that was made before is found without waiting.

    Spec: GET /_matrix/client/v1/media/thumbnail/{serverName}/{mediaId}.
    """
    size = wanted_size(request)
    animated = None if request.arg("animated") is None else request.bool_arg("animated", False)
    row = await uploaded(hs, request, server, media_id)
    source = media_file(hs.media.folder, row.sha256)
    path = thumbnail_file(hs.media.folder, row.sha256, size)
    kind, _ = ("", b"") if animated else await hs.db.in_thread(image_head, path)
    if not kind:
        async with hs.media.rendering:
            path, kind = await hs.db.in_thread(make_thumbnail, source, path, size, animated)
    return file_response(request, path, kind, f"thumbnail.{kind.partition('/')[2]}")


@route("GET", f"{NEW_MEDIA}config", auth=GUEST, also=MSC3916)
@route("GET", f"{OLD_MEDIA}config", auth=GUEST, also=OLD_VERSIONS)
async def media_config(hs: Homeserver, _request: Request) -> Json:
    """How large an upload may be, in bytes.  Spec: GET /_matrix/client/v1/media/config."""
    return {"m.upload.size": hs.config.max_request_size}


# ═════════════════════════════════════════════════════════════════════════════
#  50. PREVIEWS
#
#  What a link in a message leads to, for clients to show: title, a few words, a picture.
#  The server looks so that no member of the room has to, and only at hosts that its
#  owner named. Pages are other people's: little is read of them, and nothing believed.
#                                   spec: CS-API "Content repository", preview_url
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE previews (
    url TEXT PRIMARY KEY,
    body TEXT NOT NULL,         -- JSON, as the endpoint answers
    media_nid INTEGER,          -- the picture, which goes with it
    expires_ts INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX previews_by_age ON previews (expires_ts);
""")

PREVIEW_KEPT_MS = 24 * 3600 * 1000
FAILURE_KEPT_MS = 300_000  # how long a page that could not be read is not asked for again
PREVIEW_SECONDS = 30.0  # for a page and its picture, all redirects included
REQUEST_SECONDS = 10.0
MAX_REDIRECTS = 5
MAX_PAGE_BYTES = 4_194_304
MAX_HTML = 1_048_576  # bytes of it that are read; what a preview shows stands near the top
MAX_PICTURE = 10_485_760  # bytes
MAX_URL = 2_048
MAX_PROPERTIES = 50  # of one page
MAX_PROPERTY = 1_000  # characters
PREVIEWS_AT_ONCE = 10
PREVIEW_HEADERS: Final = {
    "User-Agent": f"conduit.py/{VERSION} (bot; URL previews)",
    "Accept": "text/html,application/xhtml+xml,image/*;q=0.9",
}
# The encodings that pages have; some others of Python's take quadratic time, or are none of text.
CHARSET = re.compile(
    r"(?i)utf-?8|utf-?16(?:le|be)?|us-ascii|iso-8859-\d{1,2}|(?:windows-|cp)125\d"
    r"|shift[_-]jis|euc-(?:jp|kr)|gbk|gb2312|gb18030|big5|koi8-[ru]"
)
PIXELS = re.compile(r"[0-9]{1,6}")
CHARSET_IN_PAGE = re.compile(rb"""(?i)<meta[^>]{0,200}?charset=["']?([0-9A-Za-z_-]{1,40})""")

# ── 50.1  Reading a page ─────────────────────────────────────────────────────

META_NAMES: Final = {  # what stands in for an OpenGraph property that a page does not have
    **{"description": "og:description", "twitter:title": "og:title"},
    **{"twitter:description": "og:description", "twitter:image": "og:image"},
}
TEXT_TAGS: Final = {"title": "og:title", "h1": "og:title", "p": "og:description"}
UNREAD_TAGS: Final = ("script", "style", "noscript", "nav", "header", "footer", "aside", "template")


class PageReader(HTMLParser):
    """Collects what a page says about itself.

    Trap: a tree of the page would be as deep as its author likes (CVE-2022-31052). Here is none:
    tags come one after the other, and all that is kept is one counter and one place for text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.properties: dict[str, str] = {}  # OpenGraph's own
        self.others: dict[str, str] = {}  # what is used where those are missing
        self._unread = 0  # how many elements are open whose text is not for reading
        self._target: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag says, or where the text after it belongs."""
        if tag in UNREAD_TAGS:
            self._unread += 1
        elif tag == "meta":
            self._meta(dict(attrs))
        elif tag in TEXT_TAGS and not self._unread:
            target = TEXT_TAGS[tag]
            self._target = None if self.others.get(target, "").strip() else target

    def handle_endtag(self, tag: str) -> None:
        """The text of an element ends."""
        if tag in UNREAD_TAGS:
            self._unread = max(0, self._unread - 1)
        elif tag in TEXT_TAGS:
            self._target = None

    def handle_data(self, data: str) -> None:
        """Text, kept if it is a title or the first paragraph."""
        if self._target is not None and not self._unread:
            before = self.others.get(self._target, "")
            self.others[self._target] = before + data[: MAX_PROPERTY - len(before)]

    def _meta(self, attributes: dict[str, str | None]) -> None:
        name = (attributes.get("property") or attributes.get("name") or "").lower()
        content = (attributes.get("content") or "").strip()[:MAX_PROPERTY]
        if not content or len(self.properties) >= MAX_PROPERTIES:
            return
        if re.fullmatch(r"og:[a-z0-9_:.-]{1,60}", name):
            self.properties.setdefault(name, content)
        elif name in META_NAMES:
            self.others[META_NAMES[name]] = content

    def result(self) -> Json:
        """The properties, those of OpenGraph first, with the white space that people see."""
        found = {**self.others, **self.properties}
        clean = {name: " ".join(value.split()) for name, value in found.items()}
        return {name: value for name, value in clean.items() if value}


def read_html(raw: bytes, content_type: str) -> Json:
    """The OpenGraph properties of an HTML page; for a thread."""
    raw = raw[:MAX_HTML]
    named = re.search(r"(?i)charset=[\"']?([^\s;\"']+)", content_type)
    in_page = CHARSET_IN_PAGE.search(raw[:4096])
    charset = named[1] if named else in_page[1].decode() if in_page else "utf-8"
    if not CHARSET.fullmatch(charset):
        charset = "utf-8"
    reader = PageReader()
    try:
        # Trap: close() would look at each unfinished tag of a broken page to its end, and again.
        reader.feed(raw.decode(charset, "replace"))
    except Exception as error:  # a parser fed with hostile text may raise anything
        log_media.info("a page could not be read: %s", type(error).__name__)
    return reader.result()


# ── 50.2  Looking ────────────────────────────────────────────────────────────


def is_previewed(hs: Homeserver, url: str) -> bool:
    """Whether the owner of this server lets it look at a URL."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        good = parts.scheme in {"http", "https"} and parts.username is None and len(url) <= MAX_URL
    except ValueError:
        return False
    return good and any(glob(pattern)(host) for pattern in hs.config.url_preview_allowlist)


async def bytes_as_chunks(data: bytes) -> AsyncIterator[bytes]:
    """A body that is in memory, for what takes one that streams."""
    yield data


class Previews:
    """Previews that were made before, and those being made: each page is fetched once."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self._running: dict[str, asyncio.Future[Json]] = {}

    async def of(self, user_nid: UserNid, url: str) -> Json:
        """The preview of a URL that may be looked at; {} for a page that says nothing."""
        query = "SELECT body FROM previews WHERE url = ? AND expires_ts > ?"
        body = self.hs.db.value(query, (url, now_ms()))
        if body is not None:
            return cast(Json, json.loads(body))
        future = self._running.get(url)
        if future is None:
            if len(self._running) >= PREVIEWS_AT_ONCE:
                raise limit_exceeded(1000, "Too many pages are being looked at")
            future = self._running[url] = asyncio.get_running_loop().create_future()
            self.hs.background(self._make(user_nid, url, future))
        return await asyncio.shield(future)

    def maintain(self) -> None:
        """Forget previews that are too old, with their pictures."""
        query = "SELECT url, media_nid FROM previews WHERE expires_ts <= ? LIMIT 500"
        expired = self.hs.db.all(query, (now_ms(),))
        with self.hs.db.write() if expired else contextlib.nullcontext():
            for url, _ in expired:
                self.hs.db.execute("DELETE FROM previews WHERE url = ?", (url,))
            self.hs.media.delete([nid for _, nid in expired if nid is not None])

    async def _make(self, user_nid: UserNid, url: str, future: asyncio.Future[Json]) -> None:
        found: Json = {}
        media_nid = None
        kept_ms = FAILURE_KEPT_MS
        try:
            made = self._look(user_nid, url)
            found, media_nid = await asyncio.wait_for(made, PREVIEW_SECONDS)
            kept_ms = PREVIEW_KEPT_MS
        except (MatrixError, asyncio.TimeoutError) as error:
            log_media.info("no preview of %s: %s", urlsplit(url).hostname, error)
        finally:
            del self._running[url]
            future.set_result(found)
        row = (url, json.dumps(found), media_nid, now_ms() + kept_ms)
        with self.hs.db.write():
            old = self.hs.db.value("SELECT media_nid FROM previews WHERE url = ?", (url,))
            self.hs.media.delete([] if old is None else [old])
            self.hs.db.execute("INSERT OR REPLACE INTO previews VALUES (?, ?, ?, ?)", row)

    async def _look(self, user_nid: UserNid, url: str) -> tuple[Json, int | None]:
        """Fetch a page and its picture: the preview, and the picture's row."""
        url, answer = await self._get(url, MAX_PAGE_BYTES, listed=True)
        content_type = answer.headers.get("content-type", "")
        kind = content_type.partition(";")[0].strip().lower()
        if kind.startswith("image/"):
            return await self._keep_picture(user_nid, answer.body)
        if kind not in {"text/html", "application/xhtml+xml"}:
            return {}, None
        found = await self.hs.db.in_thread(read_html, answer.body, content_type)
        picture, media_nid = await self._picture(user_nid, urljoin(url, found.pop("og:image", "")))
        sizes = ("og:image:width", "og:image:height")
        numbers = {
            name: int(found[name]) for name in sizes if PIXELS.fullmatch(found.get(name, ""))
        }
        said = {name: value for name, value in found.items() if not name.startswith("og:image")}
        return {**said, **({**numbers, **picture} if picture else {})}, media_nid

    async def _picture(self, user_nid: UserNid, url: str) -> tuple[Json, int | None]:
        """Fetch the picture of a page; a preview does without one that cannot be had."""
        if not url.startswith(("http://", "https://")) or len(url) > MAX_URL:
            return {}, None
        limit = min(MAX_PICTURE, self.hs.config.max_request_size)
        try:
            _, answer = await self._get(url, limit, listed=False)
        except MatrixError:
            return {}, None
        return await self._keep_picture(user_nid, answer.body)

    async def _keep_picture(self, user_nid: UserNid, raw: bytes) -> tuple[Json, int | None]:
        """Store a picture among the media, whatever its server says it is."""
        found = IMAGE_MAGIC.match(raw)
        if found is None:
            return {}, None
        kind = f"image/{found.lastgroup}"
        upload = (*await receive_file(self.hs, bytes_as_chunks(raw)), kind, None)
        media_id = self.hs.media.add(user_nid, upload, None, preview=True)
        nid = find_media(self.hs, self.hs.config.server_name, media_id).nid
        uri = f"mxc://{self.hs.config.server_name}/{media_id}"
        return {"og:image": uri, "og:image:type": kind, "matrix:image:size": len(raw)}, nid

    async def _get(self, url: str, limit: int, *, listed: bool) -> tuple[str, PushAnswer]:
        """What a URL leads to in the end, and its own URL; each step must be allowed."""
        client = self.hs.http_client
        limits = {"timeout": REQUEST_SECONDS, "max_bytes": limit}
        for _ in range(MAX_REDIRECTS + 1):
            if client is None or (listed and not is_previewed(self.hs, url)):
                break
            answer = await client.request("GET", url, headers=PREVIEW_HEADERS, **limits)
            target = answer.headers.get("location")
            if answer.status not in {301, 302, 303, 307, 308} or not target:
                if answer.status != 200:
                    raise not_found(f"The page answered with status {answer.status}")
                return url, answer
            url = urljoin(url, target)
        raise forbidden("This page may not be looked at, or leads nowhere")


# ── 50.3  The endpoint ───────────────────────────────────────────────────────


@route("GET", f"{NEW_MEDIA}preview_url", auth=USER, limit="media", also=MSC3916)
@route("GET", f"{OLD_MEDIA}preview_url", auth=USER, limit="media", also=OLD_VERSIONS)
async def preview_url(hs: Homeserver, request: Request) -> Json:
    """What a page is about, as far as it says so; {} if it does not, or cannot be had.

    Spec: GET /_matrix/client/v1/media/preview_url. 403 M_FORBIDDEN for hosts that are not listed.
    """
    url = request.arg("url")
    if not url:
        raise missing_param("The query parameter url is missing")
    request.int_arg("ts", 0, 0, 2**53)
    if hs.http_client is None or not is_previewed(hs, url):
        raise forbidden("This server makes no previews of that page")
    return await hs.previews.of(request.user.nid, urldefrag(url).url)


# ╔═══════════════════════════════════════════════════════════════════════════╗
# ║  PART V   THE HOUSE                                                       ║
# ╚═══════════════════════════════════════════════════════════════════════════╝
#
# Up to here this is a Matrix homeserver like any other. This part is what makes
# it somebody's own: a room in which the owner says what should happen, and what
# the house offers to those who come to its door.
#
# Two ideas carry it. First, the house is a user of itself: the server has an
# account, @conduit, and does nothing in its room that another user could not do
# by the same functions. Second, power is a column of a table, given on purpose:
# no name, no alias and no right in any room makes anybody an admin.


# ═════════════════════════════════════════════════════════════════════════════
#  23. THE ADMIN ROOM
#
#  #admins, where @conduit does what admins write. Which room it is stands in the
#  database; who is an admin stands in the accounts. Commands are a table, and
#  what a command wants is read from the same line that its help shows.
#                             spec: none; the documents of the Conduit server
# ═════════════════════════════════════════════════════════════════════════════

ADMIN_ROOM_VERSION = "12"  # since then nobody has power over the creator of a room: the server
ADMIN_POWER = 100
SERVER_POWER = 101  # what only @conduit may do in its room
REPLY_BYTES = 24_000  # of plain text in one notice; the HTML beside it is about as long

schema("""
CREATE TABLE admin_invitations (   -- an admin asked them in; joining makes them admins
    user_nid INTEGER PRIMARY KEY
);
""")

log_admin = logging.getLogger("conduit.admin")


# ── 23.1  Answers ────────────────────────────────────────────────────────────


class Reply(NamedTuple):
    """An answer in the room, for clients without and with formatting; what is long has pages."""

    text: str
    html: str
    more: tuple[Reply, ...] = ()


HTML_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})


def reply_text(text: str) -> Reply:
    """Sentences."""
    return Reply(text, text.translate(HTML_ESCAPES).replace("\n", "<br>"))


def reply_code(language: str, text: str) -> Reply:
    """A block in which each character counts."""
    escaped = text.translate(HTML_ESCAPES)
    return Reply(text, f'<pre><code class="language-{language}">{escaped}</code></pre>')


def table_row(tag: str, cells: Sequence[str]) -> str:
    """A row of a table in HTML."""
    inner = "".join(f"<{tag}>{cell.translate(HTML_ESCAPES)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def table_page(title: str, lines: Sequence[str], rows: Sequence[str]) -> Reply:
    """A title and a table, whose first row has the heads."""
    body = f"<thead>{rows[0]}</thead><tbody>{''.join(rows[1:])}</tbody>"
    html = f"<p>{title.translate(HTML_ESCAPES)}</p><table>{body}</table>"
    return Reply("\n".join([title, "", *lines]), html)


def reply_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Reply:
    """A title, then a table, aligned with spaces in plain text; on as many pages as it needs."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (heads, *rows)]
    html = [table_row("th", heads), *(table_row("td", row) for row in rows)]
    starts, size = [1], 0
    for at in range(1, len(lines)):
        size += byte_length(lines[at]) + byte_length(html[at])
        if size > 2 * REPLY_BYTES and at > starts[-1]:
            starts.append(at)
            size = byte_length(lines[at]) + byte_length(html[at])
    spans = [[0, *range(*ends)] for ends in itertools.pairwise([*starts, len(lines)])]
    pages = [
        table_page(title, [lines[at] for at in span], [html[at] for at in span]) for span in spans
    ]
    return pages[0]._replace(more=tuple(pages[1:]))


def reply_contents(reply: Reply) -> Iterator[Json]:
    """The contents of the notices; without HTML, and cut, where it would be too long an event."""
    for page in (reply, *reply.more):
        content = {"msgtype": "m.notice", "body": page.text}
        if byte_length(page.text) + byte_length(page.html) <= 2 * REPLY_BYTES + 1000:
            content |= {"format": "org.matrix.custom.html", "formatted_body": page.html}
        elif byte_length(page.text) > REPLY_BYTES:
            kept = page.text.encode("utf-8")[:REPLY_BYTES].decode("utf-8", "ignore")
            content["body"] = f"{kept}\n(the rest is left out)"
        yield content


# ── 23.2  The language ───────────────────────────────────────────────────────

Arguments = dict[str, str]  # by the names in the usage; an option that was given has the value ""
CommandFunction = Callable[["Homeserver", Arguments], Awaitable[Reply]]
COMMANDS: Final[dict[str, tuple[str, CommandFunction]]] = {}  # name → usage, function


def command(usage: str) -> Callable[[CommandFunction], CommandFunction]:
    """Register a command: how it is written, NAME [WORD] [--option]; its docstring is its help."""

    def register(function: CommandFunction) -> CommandFunction:
        COMMANDS[usage.partition(" ")[0]] = (usage, function)
        return function

    return register


class UsageError(Exception):
    """The command was not written as its usage says; the text tells how it differs."""


def parse_arguments(usage: str, words: Sequence[str]) -> Arguments:
    """Match the words after a command with its usage.  Behind `--` nothing is an option."""
    parts = usage.split()[1:]
    names = [part for part in parts if not part.startswith("[--")]
    free = words.index("--") if "--" in words else len(words)
    chosen = [word for word in words[:free] if word.startswith("--")]
    given = [word for word in words[:free] if not word.startswith("--")] + list(words[free + 1 :])
    for word in chosen:
        if f"[{word}]" not in parts:
            raise UsageError(f"there is no option {word}")
    if len(given) > len(names):
        raise UsageError(f"'{given[len(names)]}' is one word too many")
    for name in names[len(given) :]:
        if not name.startswith("["):
            raise UsageError(f"{name} is missing")
    found = {name.strip("[]"): word for name, word in zip(names, given, strict=False)}
    return found | dict.fromkeys(chosen, "")


def unknown_command(name: str, addressed: bool) -> Reply | None:
    """What is said about a word that is no command; nothing if this may be mere talk."""
    nearest = nearest_key(name, COMMANDS) if addressed or "-" in name else None
    if nearest is not None:
        return reply_text(f"There is no command {name}. Did you mean {nearest}?")
    if addressed:
        return reply_text(f"There is no command {name}. Write help for all there are.")
    return None


async def run_line(hs: Homeserver, line: str, addressed: bool) -> Reply | None:
    """Do what a line says, and answer; None for talk among admins."""
    try:
        words = shlex.split(line)
    except ValueError as error:  # an apostrophe in plain talk is no unclosed quotation
        return reply_text(f"This cannot be read: {error}.") if addressed else None
    name = words[0] if words else ""
    if name not in COMMANDS:
        return unknown_command(name, addressed)
    usage, function = COMMANDS[name]
    if "--help" in words:
        return reply_text(f"{function.__doc__}\nUsage: {usage}")
    try:
        return await function(hs, parse_arguments(usage, words[1:]))
    except UsageError as error:
        return reply_text(f"{name}: {error}.\nUsage: {usage}")
    except MatrixError as error:
        return reply_text(f"{name}: {error.error}")


# What follows "!admin", "@conduit:server.name" and the display name before the command.
ADDRESS_ENDS: Final = {"!": {"", " "}, "@": {"", " ", ":"}, "c": {":"}}


def addressed_line(hs: Homeserver, event: Event) -> tuple[str, bool] | None:
    """The first line of a message that may be a command, and whether it is addressed to @conduit.

    None for notices and other kinds, and for whatever relates to another event: an edit, a reply
    with its quotation and a forwarded thread never run.
    """
    body = event.content.get("body")
    is_text = event.content.get("msgtype") == "m.text" and isinstance(body, str)
    if not is_text or "m.relates_to" in event.content:
        return None
    line = cast(str, body).strip().partition("\n")[0].strip()
    for prefix in ("!admin", hs.accounts.bot_id, BOT_LOCALPART):
        rest = line[len(prefix) :]
        if line.lower().startswith(prefix.lower()) and rest[:1] in ADDRESS_ENDS[prefix[0]]:
            return rest.lstrip(": ").strip() or "help", True
    return line, False


# ── 23.3  The commands ───────────────────────────────────────────────────────


def local_part(hs: Homeserver, name: str) -> str:
    """The localpart of a name or a whole user id; 400 for a user of another server."""
    if name.startswith("@") and not hs.is_local(name):
        raise invalid_param(f"{name} is no user of this server")
    return name.removeprefix("@").partition(":")[0]


def local_account(hs: Homeserver, name: str) -> tuple[str, UserNid]:
    """A local account by name or user id; 404 when there is none, 403 for the server's own."""
    user_id = f"@{local_part(hs, name)}:{hs.config.server_name}"
    account = hs.accounts.find(user_id)
    if account is None or account.deactivated:
        raise not_found(f"There is no account {user_id}")
    if user_id == hs.accounts.bot_id:
        raise forbidden("This is the server's own account")
    return user_id, account.nid


def caches_of(hs: Homeserver) -> dict[str, LruCache[Any, Any]]:
    """All caches of the server, by the attributes that lead to them, such as rooms.events."""
    found: dict[str, LruCache[Any, Any]] = {}
    seen, parts = {id(hs)}, deque([("", cast(object, hs))])
    while parts:
        path, part = parts.popleft()
        for attribute, held in vars(part).items():
            value = getattr(held, "__self__", held)  # some parts are only known by their methods
            name = path + attribute.strip("_")
            if isinstance(value, LruCache):
                found[name] = value
            elif type(value).__module__ == __name__ and hasattr(value, "__dict__"):
                if id(value) not in seen:
                    parts.append((f"{name}.", value))
                seen.add(id(value))
    return found


def resident_bytes() -> int:
    """Memory that the process takes; the most it ever took where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mebibytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1_048_576:.1f} MiB"


@command("help")
async def help_command(hs: Homeserver, arguments: Arguments) -> Reply:
    """List all commands."""
    rows = [(usage, function.__doc__ or "") for usage, function in COMMANDS.values()]
    return reply_table(
        f"Write a command as it stands here, after !admin, or after {hs.accounts.bot_id}. "
        "Each explains itself with --help.",
        ("Command", "What it does"),
        rows,
    )


@command("list-local-users")
async def list_local_users(hs: Homeserver, arguments: Arguments) -> Reply:
    """List the accounts of this server."""
    users = hs.accounts.list_local_users()
    admins = {user for user in users if hs.accounts.is_admin(hs.db.user_nid(user))}
    rows = [(user, "admin" if user in admins else "") for user in users]
    return reply_table(f"Found {len(users)} local user account(s):", ("User", ""), rows)


@command("create-user NAME [PASSWORD]")
async def create_user(hs: Homeserver, arguments: Arguments) -> Reply:
    """Create an account; without a password one is made up."""
    password = arguments.get("PASSWORD") or random_token(20)
    user_nid = await hs.accounts.create_account(local_part(hs, arguments["NAME"]), password)
    return reply_text(f"Created user {hs.db.user_id(user_nid)} with password: {password}")


@command("reset-password NAME [--logout]")
async def reset_password(hs: Homeserver, arguments: Arguments) -> Reply:
    """Give an account a new password, which the answer shows; with --logout its sessions end."""
    user_id, user_nid = local_account(hs, arguments["NAME"])
    password = random_token(20)
    await hs.accounts.set_password(user_nid, password, log_out="--logout" in arguments)
    return reply_text(f"Successfully reset the password for user {user_id}: {password}")


@command("deactivate-user ID [--erase]")
async def deactivate_user(hs: Homeserver, arguments: Arguments) -> Reply:
    """Close an account for ever and leave all its rooms; with --erase its account data go too."""
    user_id, user_nid = local_account(hs, arguments["ID"])
    await hs.accounts.deactivate(user_nid, erase="--erase" in arguments)
    return reply_text(f"User {user_id} has been deactivated.")


@command("memory-usage")
async def memory_usage(hs: Homeserver, arguments: Arguments) -> Reply:
    """Show memory, caches and disk space in use."""
    media = await hs.db.read_in_thread(
        lambda connection: connection.execute("SELECT SUM(size) FROM media").fetchone()[0]
    )
    files = [hs.db.folder / name for name in (DATABASE_FILE, f"{DATABASE_FILE}-wal")]
    rows = [
        ("resident memory", mebibytes(resident_bytes()), ""),
        *((file.name, mebibytes(size_of(file) or 0), "on disk") for file in files),
        ("uploaded media", mebibytes(media or 0), "on disk"),
        *(
            (f"cache {name}", f"{len(cache)} entries", f"{cache.weight / cache.capacity:.0%} full")
            for name, cache in caches_of(hs).items()
        ),
    ]
    return reply_table("Memory and disk:", ("What", "Size", ""), rows)


@command("clear-caches")
async def clear_caches(hs: Homeserver, arguments: Arguments) -> Reply:
    """Empty all caches; they fill again by themselves."""
    before = sum(map(len, caches_of(hs).values()))
    hs.db.forget()
    return reply_text(f"Done: {before - sum(map(len, caches_of(hs).values()))} entries are gone.")


@command("show-config")
async def show_config(hs: Homeserver, arguments: Arguments) -> Reply:
    """Show the configuration in force, without its secrets."""
    return reply_code("toml", masked_config(hs.config))


# ── 23.4  The room ───────────────────────────────────────────────────────────


WELCOME = (
    "Welcome! This room is where you run your server. Write help to see what {bot} can do for you; "
    "everyone whom you invite here becomes an admin as well."
)
SERVER_ONLY = (
    "m.room.encryption",  # @conduit could not read any more
    "m.room.tombstone",  # this room stays the admin room
    "m.room.history_visibility",  # answers may hold passwords
    *("m.room.canonical_alias", "m.room.join_rules", "m.room.guest_access"),
    *("m.room.server_acl", "m.room.power_levels"),
)


def admin_room_request(server_name: str) -> Json:
    """The body of the createRoom by which @conduit makes its room."""
    no_guests = {"type": "m.room.guest_access", "content": {"guest_access": "forbidden"}}
    return {
        "room_version": ADMIN_ROOM_VERSION,
        "preset": "private_chat",
        "name": f"{server_name} Admin Room",
        "topic": f"Manage {server_name}. Write help for what can be done here.",
        "room_alias_name": ADMINS_ALIAS,
        # Nobody from elsewhere could be an admin, so nobody from elsewhere gets in.
        "creation_content": {"m.federate": False},
        "initial_state": [no_guests],
        "power_level_content_override": {
            "users": {},
            "invite": ADMIN_POWER,
            "state_default": ADMIN_POWER,
            "events": dict.fromkeys(SERVER_ONLY, SERVER_POWER),
        },
    }


class AdminRoom:
    """@conduit and its room: who gets in, who gives orders, and the answers."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self.bot = hs.accounts.bot_id
        self.room_id: str = ""
        self._turn = asyncio.Lock()  # answers come in the order of the questions
        hs.rooms.subscribe(self._on_event)
        hs.accounts.on_account_created(self.bring_in)
        hs.db.on_reset(self._read_room_id)

    def _read_room_id(self) -> None:
        self.room_id = self.hs.db.meta("admin_room") or ""

    # At the start of the server

    def start(self) -> None:
        """Make account and room at the first start, and see to the emergency password."""
        self._read_room_id()
        with self.hs.db.write():
            if not self.hs.accounts.exists_local(self.bot):
                self.hs.accounts.create_server_account(BOT_LOCALPART, "Conduit")
            self._see_to_emergency(self.hs.db.user_nid(self.bot))
            room = self.hs.rooms.find(self.room_id)
            if room is None or room.membership(self.bot) != "join":  # somebody left as @conduit
                self._make_room()
        self._later(self._settle_power())

    def _see_to_emergency(self, bot_nid: UserNid) -> None:
        """With an emergency password people log in as @conduit, an admin; without, they are out."""
        emergency = bool(self.hs.config.emergency_password)
        if emergency:
            log_admin.warning("emergency_password is set: remove it as soon as you are in again")
        else:
            self.hs.accounts.log_out_everywhere(bot_nid)
        if self.hs.accounts.is_admin(bot_nid) != emergency:
            self.hs.accounts.set_admin(bot_nid, emergency)

    def _make_room(self) -> None:
        server_name = self.hs.config.server_name
        delete_alias(self.hs, f"#{ADMINS_ALIAS}:{server_name}")
        room = create_room(self.hs, self.bot, admin_room_request(server_name))
        self.room_id = room.room_id
        self.hs.db.set_meta("admin_room", room.room_id)
        self._say(reply_text(WELCOME.format(bot=self.bot)))
        for user_id in self.hs.accounts.list_local_users():
            self.bring_in(self.hs.db.user_nid(user_id))

    # Who is in

    def _room(self) -> Room:
        return self.hs.rooms.get(self.room_id)

    def _is_admin(self, user_id: str) -> bool:
        return self.hs.accounts.is_admin(self.hs.db.user_nid(user_id))

    def bring_in(self, user_nid: UserNid) -> None:
        """Let an admin, such as the first account, find itself in the room as if invited."""
        user_id = self.hs.db.user_id(user_nid)
        if not self.room_id or user_id == self.bot or not self._is_admin(user_id):
            return
        try:
            invite(self.hs, self._room(), self.bot, user_id)
            joined = {"membership": "join", **member_profile(self.hs, user_id)}
            self.hs.rooms.send(self._room(), user_id, "m.room.member", joined, state_key=user_id)
        except MatrixError as error:  # an account without its room is better than none
            log_admin.warning("%s could not join the admin room: %s", user_id, error)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what follows from an event beside the requests; a full disk may prevent it."""

        async def attempt() -> None:
            try:
                await work
            except MatrixError as error:
                log_admin.warning("the admin room could not be served: %s", error)

        self.hs.background(attempt())

    def _on_event(self, room: Room, event: Event) -> None:
        if room.room_id != self.room_id:
            return
        user_id = event.state_key or ""
        if event.type == "m.room.message" and not event.is_state:
            self._later(self._answer(event.event_id))
        elif event.membership and self.hs.is_local(user_id) and user_id != self.bot:
            self._on_member(event, self.hs.db.user_nid(user_id))

    def _on_member(self, event: Event, user_nid: UserNid) -> None:
        """Whom an admin invites becomes an admin by joining; who leaves is none any more."""
        if event.membership == "invite":
            if event.sender == self.bot or self._may_command(event.sender):
                self.hs.db.execute(
                    "INSERT OR IGNORE INTO admin_invitations VALUES (?)", (user_nid,)
                )
            return
        delete = "DELETE FROM admin_invitations WHERE user_nid = ?"
        was_invited = self.hs.db.execute(delete, (user_nid,)).rowcount > 0
        if was_invited or event.membership != "join":
            self.hs.accounts.set_admin(user_nid, event.membership == "join")
            self._later(self._settle_power())

    async def _settle_power(self) -> None:
        """Give exactly the admins who are in the room the power to invite and to name it."""
        await self.hs.db.synced()
        room = self._room()
        admins = filter(self.hs.accounts.is_admin, room.local_joined)
        users = dict.fromkeys(sorted(map(self.hs.db.user_id, admins)), ADMIN_POWER)
        users.pop(self.bot, None)
        content = room.content("m.room.power_levels")
        if content.get("users") != users:
            content = {**content, "users": users}
            self.hs.rooms.send(room, self.bot, "m.room.power_levels", content, state_key="")

    # What they say

    def announce(self, text: str) -> None:
        """Say something that nobody asked for, such as that there was a report."""

        async def say() -> None:
            self._say(reply_text(text))

        self._later(say())

    def _may_command(self, user_id: str) -> bool:
        """Whether this is a user of this server, in the room, and an admin by the database."""
        is_here = self.hs.is_local(user_id) and self._room().membership(user_id) == "join"
        return is_here and self._is_admin(user_id)

    def _say(self, reply: Reply) -> None:
        for content in reply_contents(reply):
            self.hs.rooms.send(self._room(), self.bot, "m.room.message", content)

    async def _answer(self, event_id: str) -> None:
        """Do what a message says, if its sender may; once it is on the disk, and not redacted."""
        await self.hs.db.synced()
        async with self._turn:
            event = self.hs.rooms.event(event_id)
            if event is None or event.redacted_by or not self._may_command(event.sender):
                return
            said = addressed_line(self.hs, event)
            reply = None if said is None else await self._run(event.sender, *said)
            if reply is not None:
                self._say(reply)

    async def _run(self, sender: str, line: str, addressed: bool) -> Reply | None:
        name = line.partition(" ")[0]
        if name in COMMANDS:  # of talk nothing is logged, nor what follows: it may be a password
            log_admin.info("%s: %s", sender, name)
        try:
            return await run_line(self.hs, line, addressed)
        except Exception:
            log_admin.exception("the command of %s failed", sender)
            return reply_text("That went wrong. The server's log has the reason.")


# ═════════════════════════════════════════════════════════════════════════════
#  48. SYNAPSE ADMIN API
#
#  What admin pages and moderation bots call, with the paths and bodies that
#  Synapse documents. Who proxies /_synapse to the world does not thereby open
#  it: beside an admin's token it takes an address that the admin has allowed.
#                            spec: none; Synapse's documentation of its Admin API
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE server_notices (user_nid INTEGER PRIMARY KEY, room_nid INTEGER NOT NULL);
""")
invariant(
    "notices in rooms that are not there",
    "SELECT user_nid FROM server_notices WHERE room_nid NOT IN (SELECT room_nid FROM rooms)",
)

ADMIN_API = "/_synapse/admin"
MAX_ROWS = 1000  # in one page of an answer

# ── 48.1  Who may call ───────────────────────────────────────────────────────


def require_admin_address(hs: Homeserver, request: Request) -> None:
    """403 unless the request comes from this machine itself or from an allowed address.

    Trap: behind a proxy that is not in trusted_proxies everybody has the proxy's address.
    """
    peer, trusts = request.connection.peer, request.connection.server.is_trusted
    is_known = trusts(peer) or not any(name in request.headers for name in FORWARDING_HEADERS)
    if request.is_local():
        return
    if is_known and request.address:
        address = parse_address(request.address)
        if any(address in network for network in hs.config.admin_api_allowlist):
            return
    raise forbidden("admin_api_allowlist does not have your address")


def admin_route(method: str, path: str, **options: Any) -> Callable[[Handler], Handler]:
    """A route below /_synapse/admin, for admins at an allowed address."""

    def register(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def guarded(hs: Homeserver, request: Request, **parts: str) -> Any:
            require_admin_address(hs, request)
            return await handler(hs, request, **parts)

        route(method, ADMIN_API + path, auth=ADMIN, **options)(guarded)
        return handler

    return register


def rows_page(request: Request, rows: Sequence[Any]) -> tuple[int, Sequence[Any], int | None]:
    """Where the page that is asked for begins, its rows, and where the next begins, if it does."""
    start = request.int_arg("from", 0, 0, MAX_CANONICAL_INT)
    end = start + request.int_arg("limit", 100, 0, MAX_ROWS)
    return start, rows[start:end], end if end < len(rows) else None


def flag_arg(request: Request, name: str) -> bool | None:
    """A query argument that is true or false, or not there."""
    return {"true": True, "false": False, None: None}.get(request.arg(name))


def admin_target(hs: Homeserver, user_id: str) -> Account:
    """The account that a path names. 400 for a user of another server, 404 for nobody."""
    if not is_user_id(user_id) or not hs.is_local(user_id):
        raise invalid_param("This is no user of this server")
    account = hs.accounts.find(user_id)
    if account is None:
        raise not_found("User not found")
    return account


def changeable(hs: Homeserver, user_id: str) -> Account:
    """The same, of an account that can still change; the server's own cannot."""
    account = admin_target(hs, user_id)
    if user_id == hs.accounts.bot_id:
        raise forbidden("This is the server's own account")
    if account.deactivated:
        raise MatrixError(400, "M_UNKNOWN", "This account is deactivated, for good")
    return account


# ── 48.2  Users ──────────────────────────────────────────────────────────────

USER_ROWS = """
    SELECT user_id, is_guest, is_admin, deactivated, erased > 0, locked, suspended, created_ts,
        (SELECT value FROM profiles WHERE profiles.user_nid = accounts.user_nid
            AND field = 'displayname'),
        (SELECT value FROM profiles WHERE profiles.user_nid = accounts.user_nid
            AND field = 'avatar_url'),
        (SELECT MAX(last_seen_ts) FROM devices WHERE devices.user_nid = accounts.user_nid)
    FROM accounts
    JOIN users USING (user_nid)
"""
USER_ROW = f"{USER_ROWS} WHERE user_nid = ?"
USER_FLAGS = ("is_guest", "admin", "deactivated", "erased", "locked", "suspended")
USER_ORDER = {
    **{name: name for name in ("name", "displayname", "avatar_url", "creation_ts", "last_seen_ts")},
    **{name: name for name in ("is_guest", "admin", "deactivated", "locked", "suspended")},
}


def user_json(row: Sequence[Any]) -> Json:
    """A row of USER_ROWS as Synapse shows it."""
    texts = (None if text is None else json.loads(text) for text in row[8:10])
    times = {"creation_ts": row[7], "last_seen_ts": row[10]}
    user = {"name": row[0], **dict(zip(USER_FLAGS, map(bool, row[1:7]), strict=True))}
    user |= {**dict(zip(("displayname", "avatar_url"), texts, strict=True)), **times}
    return {**user, "user_type": None, "shadow_banned": False}


def is_wanted_user(request: Request, user: Json) -> bool:
    """Whether a user passes the filters of the query."""
    name, user_id = (request.arg("name") or "").lower(), (request.arg("user_id") or "").lower()
    localpart = user["name"].partition(":")[0]
    return (
        (name in localpart or name in (user["displayname"] or "").lower())
        and (name != "" or user_id in user["name"])
        and (user["is_guest"] is False or flag_arg(request, "guests") is not False)
        and (user["deactivated"] is False or flag_arg(request, "deactivated") is True)
        and (flag_arg(request, "admins") in (None, user["admin"]))
        and (user["locked"] is False or flag_arg(request, "locked") is True)
    )


def sort_key(name: str) -> Callable[[Json], tuple[bool, Any]]:
    """Sorts by a member; those without it come first."""
    return lambda row: (row[name] is not None, row[name])


@admin_route("GET", "/v2/users", also=("v3",))
async def admin_list_users(hs: Homeserver, request: Request) -> Json:
    """The accounts that pass the filters, sorted, page by page."""
    order = USER_ORDER.get(request.arg("order_by", "name") or "name")
    if order is None:
        raise invalid_param("order_by names no known column")
    await hs.db.synced()
    rows = await hs.db.read_in_thread(lambda reader: reader.execute(USER_ROWS).fetchall())
    users = [user for user in map(user_json, rows) if is_wanted_user(request, user)]
    users.sort(key=sort_key(order), reverse=request.arg("dir") == "b")
    _, page, end = rows_page(request, users)
    answer: Json = {"users": page, "total": len(users)}
    return answer if end is None else {**answer, "next_token": str(end)}


@admin_route("GET", "/v2/users/{user_id}")
async def admin_get_user(hs: Homeserver, _request: Request, user_id: str) -> Json:
    """All that is known of one account."""
    nid = admin_target(hs, user_id).nid
    consent = hs.db.one("SELECT version, accepted_ts FROM consents WHERE user_nid = ?", (nid,))
    version, accepted_ts = consent or (None, None)
    return {
        **user_json(hs.db.one(USER_ROW, (nid,)) or ()),
        **{"threepids": hs.emails.of(nid), "external_ids": [], "appservice_id": None},
        **{"consent_version": version, "consent_ts": accepted_ts},
    }


def set_admin(hs: Homeserver, user_id: str, is_admin: bool) -> None:
    """Make a user an admin, who finds themselves in the admin room, or one no longer."""
    nid = hs.db.user_nid(user_id)
    if hs.accounts.is_admin(nid) == is_admin:
        return
    with hs.db.write():
        hs.accounts.set_admin(nid, is_admin)
        room = hs.rooms.find(hs.admin_room.room_id)
        if is_admin:
            hs.admin_room.bring_in(nid)
        elif room is not None and room.membership_of(nid) in ("join", "invite"):
            leave(hs, room, user_id)


USER_CHANGES = {
    **{"password?": str, "logout_devices?": bool, "displayname?": str, "avatar_url?": str},
    **{"admin?": bool, "deactivated?": bool, "locked?": bool, "suspended?": bool},
    "threepids?": [{"medium": str, "address": str}],
}


async def change_user(hs: Homeserver, user_id: str, nid: UserNid, changes: Json) -> None:
    """Do what the body of PUT /v2/users says, deactivation last."""
    for name in ("displayname", "avatar_url"):
        if name in changes:
            hs.profiles.put(nid, name, checked_field(name, changes[name]))
    for mark in ("locked", "suspended"):
        if mark in changes:
            hs.accounts.set_mark(nid, mark, changes[mark])
    if "threepids" in changes:
        hs.emails.replace(nid, [one["address"] for one in changes["threepids"]])
    if "admin" in changes:
        set_admin(hs, user_id, changes["admin"])
    if "password" in changes:
        log_out = changes.get("logout_devices", True)
        await hs.accounts.set_password(nid, changes["password"], log_out=log_out)
    if changes.get("deactivated"):
        await hs.accounts.deactivate(nid)


@admin_route("PUT", "/v2/users/{user_id}", body=USER_CHANGES)
async def admin_put_user(hs: Homeserver, request: Request, user_id: str) -> Response:
    """Make an account, with 201, or change one."""
    if not is_user_id(user_id) or not hs.is_local(user_id):
        raise invalid_param("This is no user of this server")
    changes, is_new = request.json, not hs.accounts.exists_local(user_id)
    shuts_out = any(changes.get(name) for name in ("locked", "suspended", "deactivated"))
    if user_id == request.user.user_id and (shuts_out or not changes.get("admin", True)):
        raise MatrixError(400, "M_UNKNOWN", "You may not demote yourself, or shut yourself out")
    if is_new:
        user_id = local_user_id(hs, user_id[1:].partition(":")[0])
        hs.accounts.check_available(user_id)
        hashed = None
        if "password" in changes:
            check_new_password(changes["password"])
            hashed = await hs.accounts.hash(changes.pop("password"))
        nid = hs.accounts.make_account(user_id, hashed)
    else:
        nid = changeable(hs, user_id).nid
    await change_user(hs, user_id, nid, changes)
    answer = await admin_get_user(hs, request, user_id)
    return Response(201 if is_new else 200, encode_json(answer))


@admin_route("POST", "/v1/deactivate/{user_id}", body={"erase?": bool})
async def admin_deactivate(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Close an account for good."""
    account = changeable(hs, user_id)
    await hs.accounts.deactivate(account.nid, erase=request.json.get("erase", False))
    return {"id_server_unbind_result": "success"}


RESET = {"new_password": str, "logout_devices?": bool}


@admin_route("POST", "/v1/reset_password/{user_id}", body=RESET)
async def admin_reset_password(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Give a user a new password."""
    password, log_out = request.json["new_password"], request.json.get("logout_devices", True)
    await hs.accounts.set_password(changeable(hs, user_id).nid, password, log_out=log_out)
    return {}


@admin_route("GET", "/v1/users/{user_id}/admin")
async def admin_is_admin(hs: Homeserver, _request: Request, user_id: str) -> Json:
    """Whether a user is an admin."""
    return {"admin": admin_target(hs, user_id).is_admin}


@admin_route("PUT", "/v1/users/{user_id}/admin", body={"admin": bool})
async def admin_set_admin(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Make a user an admin or take that back; not from oneself."""
    changeable(hs, user_id)
    if user_id == request.user.user_id and not request.json["admin"]:
        raise MatrixError(400, "M_UNKNOWN", "You may not demote yourself")
    set_admin(hs, user_id, request.json["admin"])
    return {}


@admin_route("PUT", "/v1/suspend/{user_id}", body={"suspend": bool})
async def admin_suspend(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Suspend a user, or take that back."""
    account = changeable(hs, user_id)
    if account.is_admin:
        raise forbidden("This is an admin")
    hs.accounts.set_mark(account.nid, "suspended", request.json["suspend"])
    return {f"user_{user_id}_suspended": request.json["suspend"]}


@admin_route("POST", "/v1/users/{user_id}/login", limit="login", body={"valid_until_ms?": int})
async def admin_login_as(hs: Homeserver, request: Request, user_id: str) -> Json:
    """An access token of a user; they see its device among theirs."""
    account = changeable(hs, user_id)
    until = request.json.get("valid_until_ms")
    if user_id == request.user.user_id or (until is not None and until > MAX_CANONICAL_INT):
        raise invalid_param("Not for yourself, and not for ever")
    if account.locked:
        raise forbidden("This account is locked")
    fields = {"initial_device_display_name": f"Login by the admin {request.user.user_id}"[:100]}
    log_admin.warning("%s logs in as %s", request.user.user_id, user_id)
    answer = hs.accounts.log_in(account.nid, request.address, fields, until)
    return {"access_token": answer["access_token"]}


@admin_route("GET", "/v1/whois/{user_id}")
async def admin_who_is(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Where a user's devices were last seen."""
    return await who_is(hs, request, user_id)  # type: ignore[no-any-return]  # a Handler gives Any


@admin_route(
    "GET",
    "/v1/users/{user_id}/joined_rooms",
    also=(f"{ADMIN_API}/v1/users/{{user_id}}/memberships",),
)
async def admin_joined_rooms(hs: Homeserver, request: Request, user_id: str) -> Json:
    """The rooms that a user is in, or with /memberships all that they have a membership in."""
    nid = hs.db.find_user_nid(user_id)
    if nid is None:
        raise not_found("User not found")
    members = hs.rooms.memberships(nid).items()
    found = {hs.rooms.by_nid(room_nid).room_id: member.membership for room_nid, member in members}
    if request.segments[-1] == "memberships":
        return {"memberships": found}
    rooms = [room_id for room_id, membership in found.items() if membership == "join"]
    return {"joined_rooms": rooms, "total": len(rooms)}


@admin_route("GET", "/v1/username_available")
async def admin_username_available(hs: Homeserver, request: Request) -> Json:
    """Whether a user name can be had, also where registration is closed."""
    check_shape(request.query, {"username": [str]}, "The query")
    hs.accounts.check_available(local_user_id(hs, request.query["username"][0]))
    return {"available": True}


# ── 48.3  Devices ────────────────────────────────────────────────────────────

DEVICES_OF = "/v2/users/{user_id}/devices"
DEVICE_OF = DEVICES_OF + "/{device_id}"


@admin_route("GET", DEVICES_OF)
async def admin_devices(hs: Homeserver, _request: Request, user_id: str) -> Json:
    """The devices of a user."""
    devices = hs.accounts.devices(admin_target(hs, user_id).nid)
    return {"devices": [{**one, "user_id": user_id} for one in devices], "total": len(devices)}


@admin_route("GET", DEVICE_OF)
async def admin_device(hs: Homeserver, request: Request, user_id: str, device_id: str) -> Json:
    """One device of a user."""
    for device in (await admin_devices(hs, request, user_id=user_id))["devices"]:
        if device["device_id"] == device_id:
            return cast(Json, device)
    raise not_found("There is no such device")


@admin_route("PUT", DEVICE_OF, body={"display_name?": str})
async def admin_rename(hs: Homeserver, request: Request, user_id: str, device_id: str) -> Json:
    """Give a device of a user another name."""
    check_device_texts(request.json)
    nid = changeable(hs, user_id).nid
    hs.accounts.rename_device(nid, device_id, request.json.get("display_name"))
    return {}


@admin_route("DELETE", DEVICE_OF)
async def admin_log_out(hs: Homeserver, _request: Request, user_id: str, device_id: str) -> Json:
    """Log out a device of a user."""
    hs.accounts.delete_devices(admin_target(hs, user_id).nid, [device_id])
    return {}


@admin_route("POST", "/v2/users/{user_id}/delete_devices", body={"devices": [str]})
async def admin_log_out_some(hs: Homeserver, request: Request, user_id: str) -> Json:
    """Log out some devices of a user."""
    hs.accounts.delete_devices(admin_target(hs, user_id).nid, request.json["devices"])
    return {}


# ── 48.4  Registration tokens ────────────────────────────────────────────────

TOKENS = "/v1/registration_tokens"
TOKEN_FIELDS = {"uses_allowed?": int, "expiry_time?": int}


def token_json(hs: Homeserver, row: RegistrationToken) -> Json:
    """A registration token as Synapse shows it."""
    names = ("token", "uses_allowed", "completed", "expiry_time")
    token = dict(zip(names, row, strict=True))
    return {**token, "pending": hs.registration_tokens.pending(row.token)}


def wanted_token(hs: Homeserver, token: str) -> RegistrationToken:
    """A registration token, or 404."""
    row = hs.registration_tokens.find(token)
    if row is None:
        raise not_found(f"No such registration token: {token[:64]}")
    return row


@admin_route("GET", TOKENS)
async def admin_tokens(hs: Homeserver, request: Request) -> Json:
    """All registration tokens, or those that are good now, or those that are not."""
    tokens, valid = hs.registration_tokens, flag_arg(request, "valid")
    rows = [row for row in tokens.all() if valid in (None, tokens.is_good(row))]
    return {"registration_tokens": [token_json(hs, row) for row in rows]}


@admin_route("GET", TOKENS + "/{token}")
async def admin_token(hs: Homeserver, _request: Request, token: str) -> Json:
    """One registration token."""
    return token_json(hs, wanted_token(hs, token))


@admin_route("POST", TOKENS + "/new", body={**TOKEN_FIELDS, "token?": str, "length?": int})
async def admin_new_token(hs: Homeserver, request: Request) -> Json:
    """Make a registration token, of one's own choice or at random."""
    body = request.json
    length = body.get("length", 16)
    if not 1 <= length <= 64:
        raise invalid_param("length is from 1 to 64")
    token = body.get("token", random_token(length))
    if hs.registration_tokens.find(token) is not None:
        raise invalid_param("There is such a token already")
    row = RegistrationToken(token, body.get("uses_allowed"), 0, body.get("expiry_time"))
    hs.registration_tokens.put(row)
    return token_json(hs, row)


@admin_route("PUT", TOKENS + "/{token}", body=ANY_OBJECT)
async def admin_put_token(hs: Homeserver, request: Request, token: str) -> Json:
    """Change how often and how long a token is good; null takes a limit away."""
    row, body = wanted_token(hs, token), dict(request.json)
    check_shape(request.json, TOKEN_FIELDS)
    uses, expires = body.get("uses_allowed", row[1]), body.get("expiry_time", row[3])
    row = row._replace(uses_allowed=uses, expires_ts=expires)
    hs.registration_tokens.put(row)
    return token_json(hs, row)


@admin_route("DELETE", TOKENS + "/{token}")
async def admin_delete_token(hs: Homeserver, _request: Request, token: str) -> Json:
    """Delete a registration token."""
    if not hs.registration_tokens.delete(token):
        raise not_found("There is no such registration token")
    return {}


# ── 48.5  Rooms ──────────────────────────────────────────────────────────────

ROOM_ORDER = (
    *("name", "canonical_alias", "joined_members", "joined_local_members", "version", "creator"),
    *("encryption", "federatable", "public", "join_rules", "guest_access"),
    *("history_visibility", "state_events"),
)
LARGE_FIRST = ("joined_members", "joined_local_members", "version", "state_events")


def room_json(hs: Homeserver, room: Room) -> Json:
    """A room as Synapse's list shows it."""
    create = cast(Event, room.state_event(*CREATE_KEY))
    listed = hs.db.one("SELECT 1 FROM published_rooms WHERE room_nid = ?", (room.nid,))

    def text(event_type: str, key: str) -> str | None:
        return room.setting(event_type, key, "") or None

    return {
        **{"room_id": room.room_id, "version": room.version.id, "creator": create.sender},
        **{"name": text("m.room.name", "name"), "public": listed is not None},
        "canonical_alias": text("m.room.canonical_alias", "alias"),
        "joined_members": room.joined_count,
        "joined_local_members": len(room.local_joined),
        "encryption": text("m.room.encryption", "algorithm"),
        "federatable": create.content.get("m.federate", True) is not False,
        "join_rules": room.join_rule,
        "guest_access": text("m.room.guest_access", "guest_access"),
        "history_visibility": text("m.room.history_visibility", "history_visibility"),
        "state_events": len(room.state),
        "room_type": text(CREATE, "type"),
    }


@admin_route("GET", "/v1/rooms")
async def admin_rooms(hs: Homeserver, request: Request) -> Json:
    """The rooms that this server knows, sorted, page by page."""
    order, term = request.arg("order_by", "name"), (request.arg("search_term") or "").lower()
    if order not in ROOM_ORDER:
        raise invalid_param(f"order_by is one of {', '.join(ROOM_ORDER)}")
    found = []
    for (nid,) in hs.db.all("SELECT room_nid FROM rooms WHERE state_group > 0"):
        await asyncio.sleep(0)  # others are served in between
        one = room_json(hs, hs.rooms.by_nid(nid))
        names = (one["name"] or "").lower(), (one["canonical_alias"] or "").lower(), one["room_id"]
        is_listed = flag_arg(request, "public_rooms") in (None, one["public"])
        is_empty = one["joined_local_members"] == 0
        has_term = any(term in name for name in names[:2]) or term == names[2].lower()
        if is_listed and flag_arg(request, "empty_rooms") in (None, is_empty) and has_term:
            found.append(one)
    found.sort(key=sort_key(order), reverse=(request.arg("dir") == "b") != (order in LARGE_FIRST))
    start, page, end = rows_page(request, found)
    answer: Json = {"rooms": page, "offset": start, "total_rooms": len(found)}
    answer |= {} if end is None else {"next_batch": end}
    return answer | ({"prev_batch": max(0, start - len(page))} if start else {})


@admin_route("GET", "/v1/rooms/{room_id}")
async def admin_room_details(hs: Homeserver, _request: Request, room_id: str) -> Json:
    """All that is known of one room."""
    room = hs.rooms.get(room_id)
    devices = sum(len(hs.accounts.devices(nid)) for nid in room.local_joined)
    return {
        **room_json(hs, room),
        "avatar": room.setting("m.room.avatar", "url", "") or None,
        "topic": room.setting("m.room.topic", "topic", "") or None,
        "joined_local_devices": devices,
        "forgotten": not room.local_joined,
    }


@admin_route("GET", "/v1/rooms/{room_id}/members")
async def admin_room_members(hs: Homeserver, _request: Request, room_id: str) -> Json:
    """Who is in a room."""
    members = hs.rooms.get(room_id).members()
    return {"members": members, "total": len(members)}


@admin_route("GET", "/v1/rooms/{room_id}/state")
async def admin_room_state(hs: Homeserver, request: Request, room_id: str) -> Json:
    """The state of a room."""
    events = hs.rooms.events_by_nids(hs.rooms.get(room_id).state.values())
    wanted = request.arg("type")
    return {"state": as_clients(hs, request, [e for e in events if wanted in (None, e.type)])}


@admin_route("GET", "/v1/fetch_event/{event_id}")
async def admin_event(hs: Homeserver, request: Request, event_id: str) -> Json:
    """One event of any room."""
    event = hs.rooms.event(event_id)
    if event is None:
        raise not_found("Event not found")
    return {"event": as_clients(hs, request, [event])[0]}


@admin_route("GET", "/v1/rooms/{room_id}/forward_extremities")
async def admin_extremities(hs: Homeserver, _request: Request, room_id: str) -> Json:
    """The events of a room that have no successor."""
    room = hs.rooms.get(room_id)
    results = [
        {
            **{"event_id": event.event_id, "state_group": event.state_group},
            **{"depth": event.depth, "received_ts": event.origin_server_ts},
        }
        for event in hs.rooms.events_by_nids(room.extremities)
    ]
    return {"count": len(results), "results": results}


@admin_route("POST", "/v1/join/{room}", limit="join", body={"user_id": str})
async def admin_join(hs: Homeserver, request: Request, room: str) -> Json:
    """Let a local user join a room, invited by the admin where it takes an invitation."""
    found, user_id = room_by_name(hs, room), request.json["user_id"]
    nid = changeable(hs, user_id).nid
    if found.membership_of(nid) != "join":
        with hs.db.write():
            if found.join_rule != "public" and found.membership_of(nid) != "invite":
                require_joined(found, request.user.nid)
                invite(hs, found, request.user.user_id, user_id)
            content = {"membership": "join", **member_profile(hs, user_id)}
            hs.rooms.send(found, user_id, MEMBER, content, state_key=user_id)
    return {"room_id": found.room_id}


@admin_route("POST", "/v1/rooms/{room}/make_room_admin", body={"user_id?": str})
async def admin_make_room_admin(hs: Homeserver, request: Request, room: str) -> Json:
    """Give a user the highest power that a local member can hand on, and invite them if need be."""
    found, user_id = room_by_name(hs, room), request.json.get("user_id", request.user.user_id)
    changeable(hs, user_id)
    levels = found.power_levels()
    needed = levels.event(POWER_LEVELS, True)
    members = sorted(map(hs.db.user_id, found.local_joined), key=levels.user, reverse=True)
    if not members or levels.user(members[0]) < needed:
        raise MatrixError(400, "M_UNKNOWN", "No local member of this room has the power for that")
    content = found.content(POWER_LEVELS)
    top = int(min(levels.user(members[0]), max(needed, 100)))
    content = {**content, "users": {**content.get("users", {}), user_id: top}}
    with hs.db.write():
        if found.membership(user_id) not in ("join", "invite") and found.join_rule != "public":
            invite(hs, found, members[0], user_id)
        hs.rooms.send(found, members[0], POWER_LEVELS, content, state_key="")
    return {}


# ── 48.6  Blocking and deleting rooms ────────────────────────────────────────


class AdminJobs:
    """Deletions that take their time."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self.jobs: ShortLived[Json] = ShortLived(86_400)

    def begin(self, job: Json, work: Coroutine[Any, Any, None]) -> str:
        """Do something beside the requests, under a name by which its progress is asked for."""

        async def attempt() -> None:
            try:
                await work
            except MatrixError as error:
                job.update(status="failed", error=error.error)
            except BaseException:
                job.update(status="failed", error="the server's log has the reason")
                raise
            else:
                job["status"] = "complete"

        self.hs.background(attempt())
        return self.jobs.add(job)

    async def purge(self, room: Room, upto: int, *, everything: bool) -> None:
        """Delete the history of a room up to a position, a little at a time."""
        at = MIN_POSITION
        while at < upto:
            at, _ = self.hs.rooms.purge(room, at, upto, everything=everything)
            await asyncio.sleep(0.01)


@admin_route("GET", "/v1/rooms/{room_id}/block")
async def admin_get_block(hs: Homeserver, _request: Request, room_id: str) -> Json:
    """Whether a room is blocked, and who did it."""
    nid = hs.db.value("SELECT blocker_nid FROM blocked_rooms WHERE room_id = ?", (room_id,))
    return {"block": False} if nid is None else {"block": True, "user_id": hs.db.user_id(nid)}


@admin_route("PUT", "/v1/rooms/{room_id}/block", body={"block": bool})
async def admin_block(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Block a room, or take that back."""
    if request.json["block"]:
        block_room(hs, room_id, request.user.user_id)
    else:
        unblock_room(hs, room_id)
    return {"block": request.json["block"]}


DELETION = {
    **{"new_room_user_id?": str, "room_name?": str, "message?": str},
    **{"block?": bool, "purge?": bool, "force_purge?": bool},
}


def successor(hs: Homeserver, body: Json) -> Room | None:
    """The room in which those who were put out are told why, where one is asked for."""
    user_id = body.get("new_room_user_id")
    if user_id is None:
        return None
    changeable(hs, user_id)
    name = body.get("room_name", "Content Violation Notification")
    silent = {"events_default": 50}
    request = {"preset": "public_chat", "name": name, "power_level_content_override": silent}
    room = create_room(hs, user_id, request)
    text = body.get("message", "Sharing illegal content on this server is not permitted.")
    hs.rooms.send(room, user_id, "m.room.message", {"msgtype": "m.text", "body": text})
    return room


async def shut_down(hs: Homeserver, room: Room, body: Json, result: Json, user: Requester) -> None:
    """Put all local users out of a room, and delete its messages.

    What stays is its state, without which the members elsewhere could not be understood.
    """
    new_room = successor(hs, body)
    result["new_room_id"] = new_room and new_room.room_id
    if body.get("block"):
        block_room(hs, room.room_id, user.user_id)
    for nid in sorted(nid for nid in room.members_by_nid if hs.rooms.is_local(nid)):
        user_id = hs.db.user_id(nid)
        if room.membership_of(nid) not in ("join", "invite", "knock"):
            continue
        try:
            with hs.db.write():
                leave(hs, room, user_id)
                if new_room is not None and new_room.membership_of(nid) != "join":
                    joins = {"membership": "join", **member_profile(hs, user_id)}
                    hs.rooms.send(new_room, user_id, MEMBER, joins, state_key=user_id)
            result["kicked_users"].append(user_id)
        except MatrixError as error:
            log_admin.warning("%s stays in %s: %s", user_id, room.room_id, error)
            result["failed_to_kick_users"].append(user_id)
        await asyncio.sleep(0)
    rows = hs.db.all("SELECT alias FROM aliases WHERE room_nid = ?", (room.nid,))
    with hs.db.write():
        for (alias,) in rows:
            delete_alias(hs, alias)
        publish_room(hs, room, "private")
    result["local_aliases"] = [alias for (alias,) in rows]
    if body.get("purge", True):
        await hs.admin_jobs.purge(room, room.last_pos, everything=True)


def new_shutdown(hs: Homeserver, request: Request, room_id: str) -> tuple[Room, Json]:
    """The room to delete, and the result as it is before; the admin room is not to be had."""
    if room_id == hs.admin_room.room_id:
        raise forbidden("This is the admin room")
    names = ("kicked_users", "failed_to_kick_users", "local_aliases")
    return hs.rooms.get(room_id), {**{name: [] for name in names}, "new_room_id": None}


@admin_route("DELETE", "/v1/rooms/{room_id}", body=DELETION)
async def admin_delete_now(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Delete a room, and answer when that is done."""
    room, result = new_shutdown(hs, request, room_id)
    await shut_down(hs, room, request.json, result, request.user)
    return result


@admin_route("DELETE", "/v2/rooms/{room_id}", body=DELETION)
async def admin_delete_room(hs: Homeserver, request: Request, room_id: str) -> Json:
    """Delete a room beside the requests; the answer names the job."""
    room, result = new_shutdown(hs, request, room_id)
    job = {"status": "shutting_down", "shutdown_room": result, "room_id": room_id}
    work = shut_down(hs, room, request.json, result, request.user)
    return {"delete_id": hs.admin_jobs.begin(job, work)}


def job_json(job: Json) -> Json:
    """What is told of a job."""
    return {key: value for key, value in job.items() if key != "room_id"}


@admin_route("GET", "/v2/rooms/delete_status/{job_id}")
@admin_route("GET", "/v1/purge_history_status/{job_id}")
async def admin_job_status(hs: Homeserver, _request: Request, job_id: str) -> Json:
    """How far a deletion has come; for a day, and until the next restart."""
    job = hs.admin_jobs.jobs.get(job_id)
    if job is None:
        raise not_found("There is no such deletion")
    return job_json(job)


@admin_route("GET", "/v2/rooms/{room_id}/delete_status")
async def admin_room_jobs(hs: Homeserver, _request: Request, room_id: str) -> Json:
    """The deletions of one room."""
    found = [job_json(job) for job in hs.admin_jobs.jobs.live() if job.get("room_id") == room_id]
    if not found:
        raise not_found("There is no deletion of this room")
    return {"results": found}


PURGE = {"delete_local_events?": bool, "purge_up_to_event_id?": str, "purge_up_to_ts?": int}
PURGE_PATH = "/v1/purge_history/{room_id}"


def purge_limit(hs: Homeserver, room: Room, body: Json, event_id: str | None) -> int:
    """The position up to which a history is to be deleted, that event itself excluded."""
    event_id = event_id or body.get("purge_up_to_event_id")
    if event_id is not None:
        event = hs.rooms.event(event_id)
        if event is None or event.room_nid != room.nid or event.pos is None:
            raise not_found("There is no such event in this room")
        return event.pos - 1
    if "purge_up_to_ts" not in body:
        raise bad_json("purge_up_to_event_id or purge_up_to_ts is missing")
    low, high = MIN_POSITION, room.last_pos
    while (event := hs.rooms.event_at(room, high)) is not None and high > low:
        if event.origin_server_ts < body["purge_up_to_ts"]:
            return high
        high = cast(int, event.pos) - 1
    return low


@admin_route("POST", PURGE_PATH, body=PURGE)
@admin_route("POST", PURGE_PATH + "/{event_id}", body=PURGE)
async def admin_purge(
    hs: Homeserver, request: Request, room_id: str, event_id: str | None = None
) -> Json:
    """Delete the messages of a room up to an event or a time, beside the requests."""
    room = hs.rooms.get(room_id)
    upto = purge_limit(hs, room, request.json, event_id)
    everything = request.json.get("delete_local_events", False)
    purge = hs.admin_jobs.purge(room, upto, everything=everything)
    return {"purge_id": hs.admin_jobs.begin({"status": "active"}, purge)}


# ── 48.7  The server ─────────────────────────────────────────────────────────


@route("GET", ADMIN_API + "/v1/server_version", auth=NONE)
async def admin_version(_hs: Homeserver, _request: Request) -> Json:
    """What runs here; tools ask for it before they have a token."""
    return {"server_version": f"conduit.py {VERSION}"}


def notice_room(hs: Homeserver, user_id: str, nid: UserNid) -> Room:
    """The room in which the server speaks to a user, into which it asks them again if they left.

    Spec: CS-API "Server Notices".
    """
    known = hs.db.value("SELECT room_nid FROM server_notices WHERE user_nid = ?", (nid,))
    if known is not None:
        room = hs.rooms.by_nid(known)
        if room.membership_of(nid) not in ("join", "invite"):
            invite(hs, room, hs.accounts.bot_id, user_id)
        return room
    levels = {"users_default": -10, "events_default": 0}
    body: Json = {"preset": "private_chat", "name": "Server Notices", "invite": [user_id]}
    body |= {"creation_content": {"m.federate": False}, "power_level_content_override": levels}
    room = create_room(hs, hs.accounts.bot_id, body)
    hs.db.execute("INSERT INTO server_notices VALUES (?, ?)", (nid, room.nid))
    hs.account_data.put(nid, room.nid, "m.tag", {"tags": {"m.server_notice": {}}})
    return room


NOTICE = {"user_id": str, "content": dict, "type?": str, "state_key?": str}
NOTICE_PATH = "/v1/send_server_notice"


@admin_route("POST", NOTICE_PATH, body=NOTICE)
@admin_route("PUT", NOTICE_PATH + "/{txn_id}", body=NOTICE)
async def admin_notice(hs: Homeserver, request: Request, txn_id: str | None = None) -> Json:
    """Tell a user something in the server's own name."""
    body, scope = request.json, "server_notice"
    nid = changeable(hs, body["user_id"]).nid
    known = txn_id and repeated_transaction(hs, request.user, scope, txn_id)
    if known:
        return {"event_id": known}
    with hs.db.write():
        room = notice_room(hs, body["user_id"], nid)
        event_type, key = body.get("type", "m.room.message"), body.get("state_key")
        sender = hs.accounts.bot_id
        event = hs.rooms.send(room, sender, event_type, body["content"], state_key=key)
        if txn_id:
            record_transaction(hs, request.user, scope, txn_id, event.event_id)
    return {"event_id": event.event_id}


# ═════════════════════════════════════════════════════════════════════════════
#  24. CALLS, WELL-KNOWN, LANDING PAGE
#
#  What a house needs beside its rooms: the relay through which calls get past
#  routers, the signs at the door that tell clients and servers where to knock,
#  and a page for people who arrive with a browser.
#       spec: CS-API "Voice over IP", "Well-known URIs"; S2S "Server discovery"
# ═════════════════════════════════════════════════════════════════════════════

# ── 24.1  TURN ───────────────────────────────────────────────────────────────


def turn_credentials(config: Config, user_id: str, now: int) -> tuple[str, str] | None:
    """Name and password for the TURN server, or None when there is none; `now` in seconds.

    With a secret they are made for this user and expire: the name is "<expiry>:<user id>", the
    password its HMAC-SHA1, which the TURN server computes as well. Nothing is kept anywhere.
    Spec: draft-uberti-behave-turn-rest, `use-auth-secret` of coturn.
    """
    username, password = config.turn_username, config.turn_password
    if config.turn_secret:
        username = f"{now + config.turn_ttl}:{user_id}"
        digest = hmac.digest(config.turn_secret.encode(), username.encode(), "sha1")
        password = base64.b64encode(digest).decode()
    return (username, password) if config.turn_uris and username and password else None


@route("GET", "/_matrix/client/v3/voip/turnServer", auth=GUEST)
async def turn_server(hs: Homeserver, request: Request) -> Json:
    """Tell a client which relay to use for its next calls.  Spec: CS-API "Voice over IP".

    Without a relay the members are there but empty, as Conduit's are: clients take an error for a
    fault and ask again every minute.
    """
    credentials = turn_credentials(hs.config, request.user.user_id, now_ms() // 1000)
    username, password = credentials or ("", "")
    uris = list(hs.config.turn_uris) if credentials else []
    return {"username": username, "password": password, "uris": uris, "ttl": hs.config.turn_ttl}


@route("GET", "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports", auth=GUEST)
async def rtc_transports(hs: Homeserver, _request: Request) -> Json:
    """Tell a client what carries its group calls.  Spec: MSC4143."""
    return {"rtc_transports": list(hs.config.rtc_foci)}


# ── 24.2  The signs at the door ──────────────────────────────────────────────


def well_known_response(value: Json) -> Response:
    """A document of .well-known, which may be kept for an hour."""
    return Response(200, encode_json(value), {"Cache-Control": "public, max-age=3600"})


@route("GET", "/.well-known/matrix/client", auth=NONE, limit=None)
async def well_known_client(hs: Homeserver, request: Request) -> Response:
    """Tell a client that knows the server's name where its API is.  Spec: "Well-known URIs"."""
    found: Json = {"m.homeserver": {"base_url": hs.config.well_known.client}}
    if hs.config.rtc_foci:
        found["org.matrix.msc4143.rtc_foci"] = list(hs.config.rtc_foci)
    return well_known_response(found)


@route("GET", "/.well-known/matrix/server", auth=NONE, limit=None)
async def well_known_server(hs: Homeserver, request: Request) -> Response:
    """Tell another server which host and port to talk to.  Spec: S2S "Server discovery"."""
    return well_known_response({"m.server": hs.config.well_known.server})


@route("GET", "/.well-known/matrix/support", auth=NONE, limit=None)
async def well_known_support(hs: Homeserver, request: Request) -> Response:
    """Tell people whom to ask.  Spec: "Well-known URIs"; 404 when neither key is configured."""
    contact, page = hs.config.support_contact, hs.config.support_page
    if not contact and not page:
        raise not_found("The admin of this server has not said how to be reached")
    kind = "matrix_id" if is_user_id(contact) else "email_address"
    contacts = {"contacts": [{kind: contact, "role": "m.role.admin"}]} if contact else {}
    return well_known_response(contacts | ({"support_page": page} if page else {}))


# ── 24.3  The landing page ───────────────────────────────────────────────────
#
#  One file without scripts, fonts or pictures from elsewhere. The policy below
#  allows its own style sheet, by hash, and its own icon, and nothing else.

ICON = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">
<rect width="64" height="64" rx="15" fill="#0f766e"/>
<path fill="#fff" d="M14 15h36a5 5 0 0 1 5 5v19a5 5 0 0 1-5 5
H32L20 54V44h-6a5 5 0 0 1-5-5V20a5 5 0 0 1 5-5Z"/>
<path fill="#f59e0b" d="m34 19-12 13h8l-3 9 13-14h-8z"/>
</svg>
"""

STYLE = """
:root{color-scheme:light dark;--page:#f4f6f5;--card:#fff;--text:#17211f;--soft:#55645f;
--line:#dbe3e0;--accent:#0f766e;--tint:#e3f3f0;--code:#eef2f1}
@media(prefers-color-scheme:dark){:root{--page:#0f1514;--card:#182120;--text:#e8efed;--soft:#9db0aa;
--line:#2a3735;--accent:#5eead4;--tint:#123330;--code:#22302d}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:17px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:46rem;margin:0 auto;padding:3.5rem 1.25rem 2rem}
header{display:flex;gap:1.1rem;align-items:center;margin-bottom:1.6rem}
header img{width:4rem;height:4rem;flex:none}
h1{font-size:clamp(1.5rem,5.5vw,2.3rem);line-height:1.15;margin:0;overflow-wrap:anywhere}
header p{margin:.25rem 0 0;color:var(--soft)}
h2{font-size:1.15rem;margin:0 0 .7rem}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:1.4rem 1.5rem;margin:1.1rem 0}
p{margin:.6rem 0}
.status{border-left:4px solid var(--accent);background:var(--tint);border-radius:8px;
padding:.7rem 1rem;margin:1rem 0 0}
ol{margin:0;padding-left:1.4rem}
li{margin:.4rem 0}
li::marker{color:var(--accent);font-weight:700}
a{color:var(--accent);text-underline-offset:.15em}
code{background:var(--code);border-radius:6px;padding:.12em .4em;font-size:.92em;
overflow-wrap:anywhere;font-family:ui-monospace,"Cascadia Mono","DejaVu Sans Mono",monospace}
footer{color:var(--soft);font-size:.9rem;padding:.5rem 0 0}
"""

PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="robots" content="noindex">
<title>$name: a Matrix server</title>
<link rel="icon" href="/favicon.svg" type="image/svg+xml">
<style>$style</style>
</head>
<body><main>
<header><img src="/favicon.svg" alt="">
<div><h1>$name</h1><p>is a Matrix homeserver, and it is running.</p></div>
</header>
<section><h2>What is this?</h2>
<p><a href="https://matrix.org">Matrix</a> is an open network for chat and calls. As with e-mail,
everybody picks a server; this one is the home of users whose names look like
<code>@you:$name</code>. You do not chat on this page: you use an app, and tell it about this
server.</p>
<p class="status">$registration</p>
</section>
<section><h2>What to do next</h2>
<ol>
<li>Get one of the apps below.</li>
<li>Choose <b>Sign in</b>$or_register, and change the server (&ldquo;homeserver&rdquo;) to
<code>$address</code></li>
<li>$third_step</li>
<li>When the app offers a recovery key, save it somewhere safe: it is the only way back into your
encrypted messages if you lose all your devices.</li>
</ol>
</section>
<section><h2>Apps</h2>
<p><a href="https://element.io/download">Element</a> for every device;
<a href="https://cinny.in">Cinny</a>, light and quick, for web and desktop;
<a href="https://nheko-reborn.github.io">nheko</a>, small and native, for the desktop;
<a href="https://fluffychat.im">FluffyChat</a>, simple and friendly, for every device;
and <a href="https://matrix.org/ecosystem/clients/">many more</a>.</p>
</section>
<section><h2>If you run this server</h2>
<p>The first account becomes the admin and finds itself in the room <code>#admins:$name</code>,
where <code>@conduit:$name</code> answers commands; start with <code>help</code>. Everything else is
in the configuration file, which <code>conduit-example.toml</code> explains key by key.</p>
</section>
<footer>conduit.py $version$support</footer>
</main></body></html>
""")
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE_HASH}';"
    " img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
ICON_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "public, max-age=86400",
    "X-Content-Type-Options": "nosniff",
}

NOBODY_YET = """<b>Nobody has an account here yet.</b> The first one becomes the admin. It takes the
registration token that the server printed when it started, or the one in its configuration."""
CLOSED = "<b>Registration is closed.</b> Ask the admin of this server for an account."
INVITED = """<b>Registration needs a token.</b> Ask the admin of this server for it; your app will
want it from you. Element, nheko and Cinny know how to ask."""
ONLY_HERE = """<b>Only this machine can register</b>, as there is neither a registration token nor
<code>allow_open_registration</code>."""
OPEN = "<b>Registration is open.</b> Everybody can create an account here."
SIGN_IN = "Sign in with the name and the password that the admin gave you."
SIGN_UP = "Enter the <b>registration token</b> when you are asked for it, and choose a password."


def way_in(config: Config, has_users: bool, has_tokens: bool) -> tuple[str, str]:
    """How new users get in, and what their third step is; the first one is a case of its own."""
    if not has_users:
        return NOBODY_YET, SIGN_UP
    if not config.allow_registration:
        return CLOSED, SIGN_IN
    if config.allow_open_registration and not config.registration_token:
        return OPEN, "Choose a name and a password."
    if config.registration_token or has_tokens:
        return INVITED, SIGN_UP
    return ONLY_HERE, SIGN_IN


def support_links(config: Config) -> str:
    """The end of the page's last line: whom to ask."""
    links = []
    if config.support_contact:
        prefix = "https://matrix.to/#/" if is_user_id(config.support_contact) else "mailto:"
        target = prefix + quote(config.support_contact, safe="@:")
        links.append(f'<a href="{target}">{config.support_contact.translate(HTML_ESCAPES)}</a>')
    if config.support_page:
        links.append(f'<a href="{config.support_page.translate(HTML_ESCAPES)}">help</a>')
    return "".join(f" &middot; {link}" for link in links)


def landing_html(config: Config, has_users: bool, has_tokens: bool = False) -> str:
    """The page for people who come with a browser."""
    registration, third_step = way_in(config, has_users, has_tokens)
    return PAGE.substitute(
        registration=registration,
        or_register="" if third_step is SIGN_IN else " or <b>Create account</b>",
        third_step=third_step,
        style=STYLE,
        name=config.server_name.translate(HTML_ESCAPES),
        address=config.well_known.client.translate(HTML_ESCAPES),
        version=VERSION,
        support=support_links(config),
    )


@route("GET", "/", auth=NONE, limit=None, also=("/_matrix/static", "/_matrix/static/"))
async def landing_page(hs: Homeserver, request: Request) -> Response:
    """Say what this is and what to do next."""
    body = landing_html(hs.config, hs.accounts.has_users(), hs.registration_tokens.exist()).encode()
    return Response(200, body, PAGE_HEADERS, "text/html; charset=utf-8")


@route("GET", "/favicon.svg", auth=NONE, limit=None, also=("/favicon.ico",))
async def favicon(hs: Homeserver, request: Request) -> Response:
    """The icon of the page."""
    return Response(200, ICON.encode(), ICON_HEADERS, "image/svg+xml")


# ── 24.4  Pages for signing in ───────────────────────────────────────────────
#
#  For apps that do not know a stage or a way to log in, and for the links in our
#  e-mail. No page does anything when it is merely opened: mail scanners do that.

MAX_FORM_BYTES = 4096
FORM_STYLE = (
    STYLE
    + """
main{max-width:30rem}
label{display:block;margin:.9rem 0 .25rem;color:var(--soft)}
label:has([type=checkbox]){color:var(--text);display:flex;gap:.6rem;align-items:baseline}
input:not([type=checkbox]){width:100%;font:inherit;color:inherit;background:var(--page);
border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
button{font:inherit;font-weight:600;margin-top:1.2rem;padding:.6rem 1.4rem;border:0;
border-radius:8px;background:var(--accent);color:var(--card);cursor:pointer}
.error{border-left:4px solid #dc2626;padding:.2rem 0 .2rem .9rem}
"""
)
FORM_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="robots" content="noindex">
<title>$title: $name</title>
<link rel="icon" href="/favicon.svg" type="image/svg+xml">
<style>$style</style>
</head>
<body><main>
<header><img src="/favicon.svg" alt="">
<div><h1>$title</h1><p>on the Matrix server <b>$name</b></p></div>
</header>
<section>$body</section>
</main><script>$script</script></body></html>
""")
DONE = (
    "<p class='status'>Thank you, that is done. You can close this page and go on in your app.</p>"
)
OVER = "<p>This page is out of date. Go back to your app and begin again.</p>"
AUTH_DONE = """
if (window.onAuthDone) {
    window.onAuthDone();
} else if (window.opener && window.opener.postMessage) {
    window.opener.postMessage("authDone", "*");
}
"""
LOGIN_FORM = """
<form><label for="user">User name or e-mail address</label>
<input id="user" autocomplete="username" autocapitalize="none" required autofocus>
<label for="password">Password</label>
<input id="password" type="password" autocomplete="current-password" required>
<p id="problem" role="alert" hidden class="error"></p>
<button>Sign in</button></form>
<noscript><p class="error">This page needs JavaScript.</p></noscript>
"""
LOGIN_SCRIPT = """
const form = document.querySelector("form"), problem = document.getElementById("problem");
form.addEventListener("submit", async (event) => {
    event.preventDefault();
    problem.hidden = true;
    const body = {}, user = form.user.value;
    for (const [name, value] of new URLSearchParams(location.search))
        if (["device_id", "initial_device_display_name"].includes(name)) body[name] = value;
    body.refresh_token = new URLSearchParams(location.search).get("refresh_token") === "true";
    body.type = "m.login.password";
    body.identifier = /^[^@]+@/.test(user)
        ? {type: "m.id.thirdparty", medium: "email", address: user} : {type: "m.id.user", user};
    body.password = form.password.value;
    let answer = {error: "The server cannot be reached."};
    try {
        const response = await fetch("/_matrix/client/v3/login",
            {method: "POST", headers: {"Content-Type": "application/json"},
             body: JSON.stringify(body)});
        answer = await response.json();
        if (response.ok) {
            form.replaceWith("You are signed in as " + answer.user_id
                + ". You can go back to your app.");
            if (window.matrixLogin) window.matrixLogin.onLogin(answer);
            return;
        }
    } catch (error) { }
    problem.textContent = answer.error;
    problem.hidden = false;
});
"""


def source_hash(text: str) -> str:
    """What a policy calls an inline style or script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def form_page(
    hs: Homeserver, title: str, body: str, script: str = "", *, status: int = 200
) -> Response:
    """A page whose body, trusted HTML, may be a form to this server; only this script runs."""
    values = {"title": title, "name": hs.config.server_name, "style": FORM_STYLE}
    html = FORM_PAGE.substitute(values, body=body, script=script)
    policy = (
        f"default-src 'none'; style-src {source_hash(FORM_STYLE)}; script-src"
        f" {source_hash(script)}; img-src 'self'; connect-src 'self'; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    )
    headers = {**PAGE_HEADERS, "Content-Security-Policy": policy, "Cache-Control": "no-store"}
    return Response(status, html.encode(), headers, "text/html; charset=utf-8")


def terms_form(hs: Homeserver) -> str:
    """The documents to accept."""
    items = [
        f'<li><a href="{document.url.translate(HTML_ESCAPES)}" target="_blank" rel="noopener">'
        f"{document.name.translate(HTML_ESCAPES)}</a></li>"
        for document in hs.config.terms
    ]
    return (
        f"<p>Before you can register, please read:</p><ul>{''.join(items)}</ul>"
        '<form method="post"><label><input type="checkbox" required> I accept all of this</label>'
        "<button>Accept</button></form>"
    )


INVITED_FORM = """<p>Who runs this server gives out tokens, with which one can register.</p>
<form method="post"><label for="token">Registration token</label>
<input id="token" name="token" autocomplete="off" autocapitalize="none" required autofocus>
<button>Continue</button></form>"""
DUMMY_FORM = "<p>There is nothing to prove.</p><form method='post'><button>Continue</button></form>"
STAGE_FORMS: Final[dict[str, tuple[str, Callable[[Homeserver], str]]]] = {
    TERMS: ("Terms", terms_form),
    REGISTRATION_TOKEN: ("Registration token", lambda hs: INVITED_FORM),
    DUMMY: ("Registration", lambda hs: DUMMY_FORM),
}


def form_fields(raw: bytes) -> dict[str, list[str]]:
    """What a form sent; 400 for more fields than any of ours has."""
    try:
        return parse_qs(raw.decode("utf-8", "replace"), max_num_fields=10)
    except ValueError as error:
        raise bad_json("This is not our form") from error


STAGE_PAGE = V3 + "/auth/{kind}/fallback/web"


@route("GET", STAGE_PAGE, auth=NONE, limit="login")
@route("POST", STAGE_PAGE, auth=NONE, limit="login", body=STREAM)
async def stage_page(hs: Homeserver, request: Request, kind: str) -> Response:
    """A stage of authentication as a page; not all have one.  Spec: "Fallback"."""
    if kind not in STAGE_FORMS:
        raise not_found("This stage has no page")
    (title, form), problem = STAGE_FORMS[kind], ""
    session = hs.accounts.uia.get(request.arg("session"))
    if session is None:
        return form_page(hs, title, OVER, status=404)
    if request.method == "POST":
        raw = await request.stream.read(MAX_FORM_BYTES)
        fields = form_fields(raw)
        auth = {"type": kind, "token": fields.get("token", [""])[0]}
        try:
            good = await try_stage(hs, request, auth, session)
        except MatrixError as error:
            good, problem = False, f"<p class='error'>{error.error.translate(HTML_ESCAPES)}</p>"
        problem = problem or "<p class='error'>That was not right. Please try again.</p>"
        if good:
            return form_page(hs, title, DONE, AUTH_DONE)
    if kind in session.completed:
        return form_page(hs, title, DONE, AUTH_DONE)
    return form_page(hs, title, problem + form(hs), status=401 if problem else 200)


@route("GET", "/_matrix/static/client/login/", auth=NONE, also=("/_matrix/static/client/login",))
async def login_page(hs: Homeserver, _request: Request) -> Response:
    """The whole login as a page.  Spec: "Login fallback"."""
    return form_page(hs, "Sign in", LOGIN_FORM, LOGIN_SCRIPT)


MAIL_FORMS = {
    "register": ("Confirm your address", "Somebody registers with the address <b>{address}</b>."),
    "3pid": ("Confirm your address", "Somebody adds <b>{address}</b> to their account."),
    "password": (
        "New password",
        "Somebody wants a new password for <b>{user}</b>. Confirm this only if you have asked for"
        " it yourself just now: whoever asked can then choose the password.",
    ),
}


@route("GET", VALIDATE_PATH, auth=NONE, limit="login")
@route("POST", VALIDATE_PATH, auth=NONE, limit="login")
async def validation_page(hs: Homeserver, request: Request) -> Response:
    """Where the link in an e-mail leads: its reader confirms what it is about, once."""
    is_answer = request.method == "POST"
    found = hs.emails.asked(request.arg("token") or "", answer=is_answer)
    if found is None:
        return form_page(hs, "Too late", OVER, status=404)
    title, text = MAIL_FORMS[found.purpose]
    if is_answer and found.next_link:
        return Response(303, headers={**PAGE_HEADERS, "Location": found.next_link})
    if is_answer:
        return form_page(hs, title, DONE)
    user = hs.db.user_id(found.user_nid) if found.user_nid else ""
    names = {"address": found.address, "user": user}
    text = text.format(**{key: value.translate(HTML_ESCAPES) for key, value in names.items()})
    return form_page(
        hs, title, f'<p>{text}</p><form method="post"><button>That was me</button></form>'
    )


# ╔═══════════════════════════════════════════════════════════════════════════╗
# ║  PART VI   RUNNING                                                        ║
# ╚═══════════════════════════════════════════════════════════════════════════╝
#
# Here everything comes together: one object holds the chapters, one place says
# who hears of what, and one loop does the housekeeping. Whoever wants to know
# what an event sets off reads `Homeserver._wire` from top to bottom.


# ═════════════════════════════════════════════════════════════════════════════
#  25. COMPOSITION ROOT AND MAINTENANCE
#
#  The server as a whole: made from a configuration, started, reloaded, stopped;
#  and what it does for itself once a minute.                       spec: none
# ═════════════════════════════════════════════════════════════════════════════

EVENT_CACHE_SHARE = 8  # of db_cache_capacity_mb, for events, rooms and state together
LAZY_MEMBERS = 50_000  # member events remembered as sent, over all devices
SYNC_FILTERS = 500
HARD_STOP_SECONDS = 4.0
WATCH_SECONDS = 1.0
LATE_SECONDS = 0.25

log_server = logging.getLogger("conduit.server")

# ── 25.1  The server ─────────────────────────────────────────────────────────


class Homeserver:
    """Everything that one running server consists of."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.started = time.monotonic()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.db = Database(
            Path(config.database_path), config.server_name, config.db_cache_capacity_mb
        )
        self.stream = Stream(self.db)
        self.signing_key = self._load_signing_key()
        scale = config.conduit_cache_capacity_modifier
        cache_bytes = int(config.db_cache_capacity_mb * 2**20 / EVENT_CACHE_SHARE * scale)
        sizes = cache_bytes, config.pdu_cache_capacity
        self.rooms = Rooms(self.signing_key, self.db, self.stream, config.server_name, *sizes)
        self.accounts = Accounts(self)
        self.emails = Emails(self)
        self.registration_tokens = RegistrationTokens(self)
        self.profiles = Profiles(self)
        self.account_data = AccountData(self)
        self.rooms.ignored = functools.partial(ignored_users, self)
        self.filters = Filters(self)
        self.directory = Directory(self)
        self.threads = Threads(self)
        self.delayed_events = DelayedEvents(self)
        self.push_rules = PushRules(self)
        self.unread = Unread(self)
        self.search = Search(self)
        self.space_walks: LruCache[str, SpaceWalk] = LruCache(SPACE_MEMORY)
        self.reports = Reports(self)
        self.receipts = Receipts(self)
        self.typing = Typing(self)
        self.presence = Presence(self)
        self.http_client: PushClient | None = None
        self.pushers = Pushers(self)
        self.keys = KeyCache(self.db, self.stream.position, scale)
        self.notifier = Notifier(self.rooms, self.stream)
        self.lazy_members: LruCache[tuple[int | None, RoomNid], dict[str, tuple[EventNid, int]]] = (
            LruCache(LAZY_MEMBERS)
        )
        self.sync_filters: LruCache[tuple[UserNid, str], SyncFilter] = LruCache(SYNC_FILTERS)
        self.sliding = Sliding(self)
        self.media = Media(self)
        self.previews = Previews(self)
        self.admin_room = AdminRoom(self)
        self.admin_jobs = AdminJobs(self)
        self.router = Router(self)
        self.router.authenticate = self.accounts.authenticate
        self.http = HttpServer(
            self.router.dispatch,
            max_request_size=config.max_request_size,
            trusted_proxies=config.trusted_proxies,
            before_response=self.db.synced,
        )
        self._wire()

    def _wire(self) -> None:
        """Who hears of what; the order here is the order in which they hear it.

        A new event: delayed events (others' state goes before theirs), threads, presence (the
        sender is active), pushers (whom to wake up), the admin room (it may be a command).
        A report: the admin room.
        A changed membership: unread counts, typing, device lists, the syncs that wait.
        """
        self.accounts.on_account_created(functools.partial(auto_join, self))
        self.accounts.on_registered(functools.partial(store_consent, self))
        self.accounts.on_device_deleted(functools.partial(device_removed, self))
        self.accounts.on_device_renamed(functools.partial(device_renamed, self))
        self.accounts.on_deactivated(functools.partial(account_deactivated, self))
        self.rooms.subscribe_membership(functools.partial(note_membership, self))
        self.rooms.subscribe_membership(functools.partial(follow_into_replacement, self))
        self.rooms.subscribe(functools.partial(follow_tombstone, self))
        self.rooms.subscribe(functools.partial(guests_may_stay, self))
        self.reports.subscribe(self.admin_room.announce)
        self.delayed_events.send = functools.partial(send_delayed, self)
        self.rooms.check_sender = functools.partial(check_sender, self)
        self.rooms.erased = self.accounts.erased

    def _load_signing_key(self) -> SigningKey:
        text = self.db.meta("signing_key")
        if text is None:
            key = SigningKey.generate()
            self.db.set_meta("signing_key", key.text())
            return key
        return SigningKey.parse(text)

    def is_local(self, user_id: str) -> bool:
        """Whether a user belongs to this server."""
        return server_of(user_id) == self.config.server_name

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the requests; what goes wrong in it is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log_server.error("background work failed", exc_info=error)

    async def start(self) -> None:
        """Begin to serve; when this returns, the server answers."""
        self.accounts.start()
        self.admin_room.start()
        self.delayed_events.arm()
        self.pushers.start()
        await self.db.synced()
        tls = self.config.tls
        context = None if tls is None else tls_context(Path(tls.certs), Path(tls.key))
        await self.http.listen(self.config.address, self.config.port, context)
        self.background(self._maintain())
        self.background(self._watch_loop())

    def reload(self, config: Config) -> None:
        """Take over what can change while the server runs."""
        if config.tls is not None:
            self.http.tls = tls_context(Path(config.tls.certs), Path(config.tls.key))
        self.config = config
        self.http.trusted_proxies = config.trusted_proxies
        self.http.max_request_size = config.max_request_size

    async def stop(self) -> None:
        """Answer what is under way, write down what is only in memory, and close the database."""
        await self.http.stop(HARD_STOP_SECONDS)
        self.delayed_events.stop()
        self.pushers.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(MatrixError), self.db.write():
            self._save()
            self.stream.save()
        await self.db.close()

    def first_steps(self) -> list[str]:
        """What someone who starts the server for the first time should know, line by line."""
        lines = [f"{self.config.server_name} answers on {' and '.join(self.http.names)}"]
        token = self.accounts.first_admin_token()
        if token is not None:
            lines += [
                "There is no account yet. The first will be the admin's: register it with a Matrix",
                "client that asks for a registration token: the configured one or, until then,",
                f"    {token}",
            ]
        return lines

    # Maintenance

    def _save(self) -> None:
        """Write down what is kept in memory between two rounds."""
        self.accounts.flush_last_seen()
        self.unread.save()
        self.presence.save()
        self.media.maintain()
        self.delayed_events.maintain()

    async def _maintain(self) -> None:
        """Every cleanup_second_interval: save, expire, and give free pages back to the disk."""
        while True:
            await asyncio.sleep(self.config.cleanup_second_interval)
            try:
                self._save()
                await self.accounts.expire()
                await self.search.catch_up()
                self.previews.maintain()
                self.media.expire(
                    self.config.media_retention_remote_days, self.config.media_budget_mb
                )
                await self.media.sweep()
                self.emails.expire()
                with self.db.write():
                    self.db.execute("PRAGMA incremental_vacuum(200)").fetchall()
            except MatrixError as error:
                log_server.error("maintenance: %s; will try again", error)
            except Exception:  # a bad page, say: the rest of the house still wants keeping
                log_server.exception("maintenance failed, will try again")

    async def _watch_loop(self) -> None:
        """Log when something held the loop for too long; everyone waits then."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            late = time.monotonic() - before - WATCH_SECONDS
            if late > LATE_SECONDS:
                log_server.warning("the loop was busy for %.0f ms without a pause", late * 1000)


# ── 25.2  What this server speaks ────────────────────────────────────────────

SPEC_VERSIONS = [f"v1.{minor}" for minor in range(1, 12)]
UNSTABLE_FEATURES = {
    "org.matrix.e2e_cross_signing": True,
    "org.matrix.msc2285.stable": True,
    "org.matrix.msc3026.busy_presence": True,
    "org.matrix.msc3030": True,
    "org.matrix.msc3391": True,
    "org.matrix.msc3440.stable": True,
    "org.matrix.msc3771": True,
    "org.matrix.msc3773": True,
    "org.matrix.msc3874": True,
    "org.matrix.msc3881": True,
    "org.matrix.msc3916.stable": True,
    "org.matrix.msc3981": True,
    "org.matrix.msc4140": True,
    "org.matrix.msc4143": True,
    "org.matrix.msc4155": True,
    "org.matrix.msc4222": True,
    "org.matrix.msc4306": True,
    "org.matrix.simplified_msc3575": True,
    "uk.half-shot.msc2666.query_mutual_rooms.stable": True,
    "uk.tcpip.msc4133": True,
    "uk.tcpip.msc4133.stable": True,
}


@route("GET", "/_matrix/client/versions", auth=OPTIONAL, limit=None)
async def get_versions(_hs: Homeserver, _request: Request) -> Json:
    """The versions of the specification that this server knows, and features beside them.

    Spec: CS-API "API Versions".
    """
    return {"versions": SPEC_VERSIONS, "unstable_features": UNSTABLE_FEATURES}


# ═════════════════════════════════════════════════════════════════════════════
#  26. COMMAND LINE
#
#  What happens around a running server: arguments, the configuration's mistakes
#  in plain words, the log, signals, and what systemd wants to be told.
#  spec: none; sd_notify(3) for the messages to systemd
# ═════════════════════════════════════════════════════════════════════════════

log_main = logging.getLogger("conduit.main")

STOP_SECONDS = 5  # from SIGTERM to the end of the process, whatever hangs

# ── 26.1  The log ────────────────────────────────────────────────────────────

SYSLOG_LEVELS = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}


class LogFormatter(logging.Formatter):
    """One line an entry: time, level, area, message. Under systemd the journal knows the time."""

    def __init__(self, for_journal: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(area)s: %(message)s")
        self.for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """The entry as text; "<4>" before a line is how the journal learns its level."""
        record.area = record.name.removeprefix("conduit.")
        text = super().format(record)
        if not self.for_journal:
            return text
        mark = f"<{SYSLOG_LEVELS.get(record.levelname, 7)}>"
        text = text.removeprefix(record.asctime).lstrip()
        return "\n".join(mark + line for line in text.splitlines())


def start_log(levels: Mapping[str, int]) -> None:
    """Send the log to stderr, each area at its level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter("JOURNAL_STREAM" in os.environ))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    apply_log_levels(levels)


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an exception that no task was waiting for, instead of losing it."""
    error = context.get("exception")
    message = context.get("message", "an error in the event loop")
    if isinstance(error, ConnectionError):
        log_main.debug("%s: %s", message, error)
    else:
        log_main.error("%s", message, exc_info=error)


# ── 26.2  Arguments ──────────────────────────────────────────────────────────

DESCRIPTION = """\
A Matrix homeserver in one file.

The configuration is read from the file that CONDUIT_CONFIG names, else from ./conduit.toml;
each of its keys can be given as an environment variable CONDUIT_<KEY> as well.
"""


def command_line(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line; without any of them the server runs."""
    parser = argparse.ArgumentParser(
        prog="conduit.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--version", action="version", version=f"conduit.py {VERSION}")
    choice.add_argument("--check", action="store_true", help="verify the database and exit")
    choice.add_argument(
        "--backup", type=Path, metavar="FILE", help="copy the database, even one in use, to FILE"
    )
    choice.add_argument(
        "--routes", action="store_true", help="list all paths and who may call them"
    )
    return parser.parse_args(arguments)


def complain(text: str) -> None:
    """Say on stderr what went wrong."""
    print(f"conduit.py: {text}", file=sys.stderr, flush=True)


def read_configuration() -> Config | None:
    """The configuration, with warnings in the log; None after saying all that is wrong with it."""
    try:
        config, warnings = load_config(os.environ)
    except ConfigError as error:
        complain(f"the configuration cannot be used:\n{error}")
        return None
    start_log(parse_log_levels(config.log))
    for warning in warnings:
        log_main.warning("%s", warning)
    return config


def check_and_report(config: Config) -> int:
    """--check: print what is wrong with the database; the exit code says whether anything is."""
    problems = check_database(config.database_path)
    print("\n".join(problems) or "the database is sound")
    return 1 if problems else 0


def back_up(config: Config, target: Path) -> int:
    """--backup: copy the database, also while the server runs."""
    source = config.database_path / DATABASE_FILE
    if not source.exists():
        complain(f"there is no database in {config.database_path}")
        return 1
    copy_database(source, target)
    print(f"copied to {target}")
    return 0


# ── 26.3  Running ────────────────────────────────────────────────────────────


def tell_systemd(message: str) -> None:
    """Report to the service manager, if it listens.  Spec: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(address)
        sock.send(message.encode())


def reload_running(hs: Homeserver) -> None:
    """SIGHUP: take over what may change while running; a wrong file changes nothing."""
    tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        config = reload_config(hs.config, os.environ)
        hs.reload(config)
    except ConfigError as error:
        log_main.error("the configuration stays as it was, since the new one is wrong:\n%s", error)
    except OSError as error:  # most likely a certificate that cannot be read
        log_main.error("the configuration stays as it was: %s", error)
    else:
        apply_log_levels(parse_log_levels(config.log))
        log_main.info("the configuration has been read again")
    tell_systemd("READY=1")


def end_at_once(*_: Any) -> None:
    """The last resort, when stopping takes too long; what was acknowledged is on the disk."""
    log_main.error("did not stop within %d seconds, and is ended", STOP_SECONDS)
    os._exit(1)


async def serve(config: Config) -> None:
    """Run the server until a signal ends it."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_error)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # too early to read anything again
    hs = Homeserver(config)
    await hs.start()
    loop.add_signal_handler(signal.SIGHUP, reload_running, hs)
    print("\n".join(hs.first_steps()), flush=True)
    tell_systemd(f"READY=1\nSTATUS=serving {config.server_name}")
    await ended.wait()
    tell_systemd("STOPPING=1")
    signal.signal(signal.SIGALRM, end_at_once)
    signal.setitimer(signal.ITIMER_REAL, STOP_SECONDS)
    loop.remove_signal_handler(signal.SIGINT)  # whoever presses ^C twice means it
    await hs.stop()


def run_server(config: Config) -> int:
    """Serve until the end; what prevents the start is told in one sentence, not in a traceback."""
    try:
        asyncio.run(serve(config))
    except (DatabaseRefused, MatrixError) as error:
        complain(str(error))
    except OSError as error:
        complain(f"cannot start on {config.address}, port {config.port}: {error}")
    else:
        return 0
    return 1


def main() -> int:
    """What `python3 conduit.py` does; the exit code."""
    options = command_line(sys.argv[1:])
    if options.routes:
        print(route_table())
        return 0
    os.umask(0o077)
    config = read_configuration()
    if config is None:
        return 1
    if options.check:
        return check_and_report(config)
    try:
        return back_up(config, options.backup) if options.backup else run_server(config)
    except DatabaseRefused as error:
        complain(str(error))
        return 1


# ── 26.4  From script to module ──────────────────────────────────────────────


def bytecode_file(script: Path) -> Path:
    """Where the bytecode goes: beside the source, else to the database folder."""
    if os.access(script.parent, os.W_OK) and not sys.dont_write_bytecode:
        return Path(importlib.util.cache_from_source(str(script)))
    try:
        config, _ = load_config(os.environ)
    except ConfigError:  # the start after this one says what is wrong
        return Path(importlib.util.cache_from_source(str(script)))
    return config.database_path.absolute() / "bytecode" / f"{script.stem}.pyc"


def keep_bytecode(script: Path, code: types.CodeType, target: Path) -> bool:
    """Write what Python has just compiled where the module will be loaded from.  Spec: PEP 552."""
    status = script.stat()
    head = struct.pack("<III", 0, int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(importlib.util.MAGIC_NUMBER + head + marshal.dumps(code))
        partial.replace(target)
    except OSError:  # then the module compiles itself, and takes more memory
        return False
    return True


def become_module(script: Path, code: types.CodeType) -> None:
    """Start again as `python3 -m conduit`, in the same process; returns where that cannot be.

    Python compiles a script at each start, and the memory of that stays taken; a module is loaded
    from its bytecode, which takes half the memory.
    Trap: PYTHONPYCACHEPREFIX would move the bytecode of the standard library as well; so what
    cannot stand beside the source is put, without it, on the path.
    """
    if not script.stem.isidentifier():
        return
    os.umask(0o077)
    target = bytecode_file(script)
    beside = target.parent.name == "__pycache__"
    folder = target.parent if keep_bytecode(script, code, target) and not beside else script.parent
    others = os.environ.get("PYTHONPATH")
    environ = {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{others}" if others else str(folder),
        "PYTHONSAFEPATH": "1",  # or a file in the working directory could pose as a module
    }
    flags = sys.orig_argv[1 : -len(sys.argv)]
    command = [sys.executable, *flags, "-m", script.stem, *sys.argv[1:]]
    os.execve(sys.executable, command, environ)  # noqa: S606  no shell


if __name__ == "__main__":
    if __spec__ is None:
        become_module(Path(__file__).resolve(), sys._getframe().f_code)
    sys.exit(main())
