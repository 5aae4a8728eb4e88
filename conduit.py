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
    backup   python3 conduit.py --backup FILE, while it runs; --restore FILE
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
import shutil
import signal
import socket
import sqlite3
import ssl
import string
import struct
import sys
import tarfile
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
    Container,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from html.parser import HTMLParser
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, NewType, Protocol, TypeVar, cast
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

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
    version: str = setting("version of the text; a new one is asked for again", "1.0")
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
    tracing_endpoint: str = live(
        "where traces go, by OTLP over HTTP", "http://127.0.0.1:4318/v1/traces", A_URL
    )
    tracing_flame: bool = setting("record a flame graph, in database_path", False)
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
        self.syncs, self.sync_seconds, self._sync_began = 0, 0.0, 0.0
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
        self._sync_began = time.monotonic()
        self._jobs.put(functools.partial(call_loop, loop, self._flushed))

    def _flushed(self, error: OSError | None) -> None:
        """The sync came back: answer those who waited, and commit what came in meanwhile."""
        batch, self._flushing = self._flushing, None
        self.syncs += 1
        self.sync_seconds += time.monotonic() - self._sync_began
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
        # The row may have been rolled back; if not, a full disk need not keep anybody from reading.
        self._reserved = self.database.meta("stream_reserved") or 0


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

# ── 4.6  Backup and restore ──────────────────────────────────────────────────
#
#  An archive has a copy of the database, in which the keys of the server are, and
#  the media. The copy comes first: a file that it names was complete before, and
#  its name is the hash of what is in it, so it cannot change any more.

MEDIA_MEMBER = re.compile(r"media/[0-9a-f]{2}/[0-9a-f]{62}")
BACKUP_NAME = re.compile(r"conduit-[0-9]{8}-[0-9]{6}\.tar")
RESTORE_JUMP = 2**40  # stream positions passed over; more than a server uses up in its life

Restorer = Callable[[sqlite3.Connection, int], None]
RESTORERS: Final[list[Restorer]] = []


def restorer(function: Restorer) -> Restorer:
    """Register what makes a restored database safe: called with it and the stream's position."""
    RESTORERS.append(function)
    return function


def archive_folder(folder: Path, target: Path) -> None:
    """Write database and media into one file; complete or not there."""
    partial, copy = (target.with_name(f"{target.name}.{end}") for end in ("partial", "database"))
    try:
        copy_database(folder / DATABASE_FILE, copy, replace=True)
        with tarfile.open(partial, "w") as archive:
            archive.add(copy, DATABASE_FILE)
            for path in sorted((folder / "media").glob("??/*")):
                name = path.relative_to(folder).as_posix()
                if MEDIA_MEMBER.fullmatch(name):
                    with contextlib.suppress(FileNotFoundError):  # deleted in this moment
                        archive.add(path, name)
        os.chmod(partial, 0o600)
        sync_path(partial)
        partial.replace(target)
        sync_path(target.parent)
    finally:
        partial.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)


def back_up(folder: Path, target: Path, keep: int = 0) -> Path:
    """Copy a server that may be running into an archive, or the database alone into a .db.

    In a folder the archive gets a name of its own, and of those only the newest `keep` stay.
    DatabaseRefused if the file exists.
    """
    if not (folder / DATABASE_FILE).exists():
        raise DatabaseRefused(f"there is no database in {folder}")
    if target.suffix == ".db":
        copy_database(folder / DATABASE_FILE, target)
        return target
    place = target
    if target.is_dir():
        target /= time.strftime("conduit-%Y%m%d-%H%M%S.tar", time.gmtime())
    if target.exists():
        raise DatabaseRefused(f"{target} exists already; name a file that does not")
    archive_folder(folder, target)
    if keep and place.is_dir():
        made = sorted(path for path in place.iterdir() if BACKUP_NAME.fullmatch(path.name))
        for path in made[:-keep]:
            path.unlink()
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Write what a backup holds into a folder. DatabaseRefused for a file that is none."""
    try:
        with tarfile.open(archive) as members:
            for member in members:
                is_known = member.name == DATABASE_FILE or MEDIA_MEMBER.fullmatch(member.name)
                if not is_known or not member.isreg():
                    raise DatabaseRefused(f"{archive} has {member.name!r} in it: it is no backup")
                path = folder / member.name
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with path.open("xb") as output:
                    shutil.copyfileobj(
                        cast("io.BufferedReader", members.extractfile(member)), output
                    )
                    output.flush()
                    os.fsync(output.fileno())
    except (tarfile.TarError, EOFError) as error:
        raise DatabaseRefused(f"{archive} cannot be read: {error}") from error
    if not (folder / DATABASE_FILE).exists():
        raise DatabaseRefused(f"{archive} has no {DATABASE_FILE} in it: it is no backup")


def make_safe(folder: Path, server_name: str) -> None:
    """Check a database that was restored, and let every chapter see to its own.

    Trap: clients know positions of the stream from after the backup. None of them may come again,
    or what happens next would look to them like the past.
    """
    with contextlib.closing(connect(folder / DATABASE_FILE)) as connection:
        refuse_foreign(connection, folder, server_name)
        connection.execute("BEGIN IMMEDIATE")
        sql = "UPDATE meta SET value = value + ? WHERE key = 'stream_reserved' RETURNING value"
        (position,) = connection.execute(sql, (RESTORE_JUMP,)).fetchone()
        for function in RESTORERS:
            function(connection, position)
        connection.execute("COMMIT")
    problems = check_database(folder)
    if problems:
        raise DatabaseRefused("the backup is damaged: " + "; ".join(problems))


def restore_folder(archive: Path, folder: Path, server_name: str) -> None:
    """Fill an empty folder from a backup; nothing comes into it before all is found good.

    Trap: the folder may be a mount point, so it is filled, and not put in its place as a whole.
    """
    lock = claim_folder(folder)
    fresh = folder / "restoring"
    try:
        harmless = {"conduit.lock", "bytecode", fresh.name}  # what starting this leaves behind
        if {path.name for path in folder.iterdir()} - harmless:
            raise DatabaseRefused(f"{folder} is not empty: move what is in it to another place")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        unpack(archive, fresh)
        make_safe(fresh, server_name)
        for path in sorted(fresh.iterdir(), key=lambda path: path.name == DATABASE_FILE):
            path.replace(folder / path.name)
        sync_path(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(lock)


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
        until = MAX_POSITION
        for event in self.rooms.events_by_nids(row[0] for row in rows):
            if event.membership == "join":
                return until
            until = cast(int, event.pos)
        return MIN_POSITION


class Rooms(RoomWriter):
    """The room store as the rest of the server knows it: reading, writing, and who may see."""

    def visible(self, user_nid: UserNid | None, room: Room, events: Iterable[Event]) -> list[Event]:
        """The events that a user may see; None stands for someone without an account.

        Spec: CS-API "Room history visibility", "Server behaviour". All doors lead through here.
        """
        may_see = Viewer(self, room, user_nid).may_see
        return [event for event in events if may_see(event)]


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

    The router sets `json` (the checked body), `requester` and `route_path` before it calls the
    handler.
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
        self.route_path = "unknown"  # the path as its route has it

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
    {"access_token", "mac", "new_password", "password", "pin", "refresh_token", "secret", "token"}
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
        spent, number = time.monotonic() - request.started, next(self.server.numbers)
        what = (number, request.method, request.path, response.status, spent * 1000)
        log_http.debug("#%d %s %s: %d, %.1f ms", *what)
        for observe in self.server.observers:
            observe(request, response.status, spent)
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
        self.numbers = itertools.count(1)  # of requests, for the log
        self.observers: list[Callable[[Request, int, float], None]] = []  # status, seconds
        self.names: list[str] = []  # where it listens: URLs, or the path of the socket
        self.tls: ssl.SSLContext | None = None  # of new connections
        self._limit = connection_limit()
        self._listeners: dict[socket.socket, asyncio.Task[None]] = {}
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._sweep: asyncio.Handle | None = None

    @property
    def connection_count(self) -> int:
        """How many connections are open."""
        return len(self._connections)

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
    appservice = "application services"


NONE, OPTIONAL, GUEST, USER, ADMIN, APPSERVICE = Auth


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
    if auth is APPSERVICE and requester.appservice is None:
        raise forbidden("Only application services may do this")


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

    `authenticate` is set by the composition root: it knows tokens, which are a later chapter's;
    and so does `is_unlimited`, which says for whom no rate limit counts.
    """

    authenticate: Callable[[Request, str], Requester]
    is_unlimited: Callable[[Request], bool] = staticmethod(lambda _: False)

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
        request.route_path = entry.paths[0]
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
        is_limited = self.hs.config.rate_limit and not self.is_unlimited(request)
        limit = entry.limit if is_limited else None
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
    by_appservice INTEGER NOT NULL DEFAULT 0,  -- made by one, or itself one: nobody of flesh
    deactivated INTEGER NOT NULL DEFAULT 0,
    locked INTEGER NOT NULL DEFAULT 0,
    suspended INTEGER NOT NULL DEFAULT 0,
    erased INTEGER NOT NULL DEFAULT 0,
    behind INTEGER NOT NULL DEFAULT 0  -- changes that the member events still have to follow
);
CREATE INDEX accounts_behind ON accounts (behind) WHERE behind > 0;
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
        self, nid: UserNid, device_nid: DeviceNid, refreshable: bool, replaced: int | None = None
    ) -> Json:
        answer: Json = {"access_token": random_token()}
        refresh_hash = expires_ts = None
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

    def log_in(self, nid: UserNid, address: str, fields: Json) -> Json:
        """The answer of /login or /register: a session as the fields of their body want it.

        The older tokens of a device end.  Spec: "Relationship between access tokens and devices".
        """
        device_id = fields.get("device_id") or random_token(10).upper()
        name = fields.get("initial_device_display_name")
        with self.db.write():
            device_nid = self.add_device(nid, device_id, name, address)
            self._end_tokens(nid, device_nid)
            tokens = self._issue_tokens(nid, device_nid, fields.get("refresh_token") is True)
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
        """401 for a device that was logged out while its request waited."""
        nid, device_nid = requester.nid, requester.device_nid
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

    def make_device(self, nid: UserNid, device_id: str, name: str | None) -> DeviceNid:
        """The device of that id, made if it is not there, without a token."""
        sql = "INSERT OR IGNORE INTO devices (user_nid, device_id, display_name) VALUES (?, ?, ?)"
        with self.db.write():
            self.db.execute(sql, (nid, device_id, name))
        return cast(DeviceNid, self.find_device(nid, device_id))

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
        for (device_nid,) in self.db.all("SELECT device_nid FROM devices"):
            old = (device_nid, now_ms() - TXN_LIFETIME_MS)
            with self.db.write():
                self.db.execute("DELETE FROM txns WHERE device_nid = ? AND created_ts < ?", old)
            await asyncio.sleep(0)


# ── 14.4  Making, changing and ending accounts ───────────────────────────────


class Accounts(Sessions):
    """How accounts are made, changed and ended; callbacks come inside the write block of that.

    The next chapter sets how a new account is named, and what a member event repeats of a profile;
    chapter 52 which names and requests belong to application services.
    """

    name_account: Callable[[UserNid, str], None]
    member_content: Callable[[UserNid, Json], Json]
    # These are the application services':
    is_reserved: Callable[[str], bool]  # whether a user id is in a namespace of theirs
    check_appservice: Callable[[Request, str], None]  # raises unless such a request is from one
    summon: Callable[[str], Awaitable[None]]  # asks them to make a user

    def __init__(self, hs: Homeserver) -> None:
        super().__init__(hs)
        self.bot_id = f"@{BOT_LOCALPART}:{hs.config.server_name}"
        self.guesses = GuessLimiter()
        self.uia: ShortLived[UiaSession] = ShortLived(900)
        self.uia_key = secrets.token_bytes(32)
        self.nonces: ShortLived[bool] = ShortLived(60)
        self.login_tokens: ShortLived[tuple[UserNid, str | None]] = ShortLived(120)
        self.openid_tokens: ShortLived[UserNid] = ShortLived(3600)
        self._hashing = asyncio.Semaphore(2)  # since each takes 19 MiB
        self._admin_token = random_token()
        self._created: list[Callable[[UserNid], None]] = []
        self._deactivated: list[Callable[[UserNid], None]] = []
        self.on_account_created = self._created.append
        self.on_deactivated = self._deactivated.append

    def start(self) -> None:
        """Go on with what the last stop interrupted."""
        for (nid,) in self.db.all("SELECT user_nid FROM accounts WHERE behind > 0"):
            self.hs.background(self._update_rooms(nid))

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

    def is_puppet(self, nid: UserNid) -> bool:
        """Whether an application service made the account, so that nobody reads what it gets."""
        sql = "SELECT by_appservice FROM accounts WHERE user_nid = ?"
        return bool(self.db.value(sql, (nid,)))

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
        """Whether anybody has an account but the server's own bot, guests, bridges and theirs."""
        bot_nid = self.db.find_user_nid(self.bot_id)
        sql = """
            SELECT 1
            FROM accounts
            WHERE is_guest = 0 AND by_appservice = 0 AND user_nid IS NOT ?
            LIMIT 1
        """
        return self.db.one(sql, (bot_nid,)) is not None

    def first_admin_token(self) -> str | None:
        """The registration token for the very first account; None once there is one."""
        return None if self.has_users() else self._admin_token

    def check_available(self, user_id: str) -> None:
        """400 M_USER_IN_USE or M_EXCLUSIVE for a user id that cannot be had."""
        if user_id == self.bot_id or self.is_reserved(user_id):
            raise MatrixError(400, "M_EXCLUSIVE", "This user name is reserved")
        if self.exists_local(user_id):
            raise MatrixError(400, "M_USER_IN_USE", "This user name is taken")

    # Making and changing

    def make_account(
        self, user_id: str, password_hash: str | None = None, *, name: str = "", role: str = "user"
    ) -> UserNid:
        """Make an account; its role is user, admin, guest or appservice. 400 M_USER_IN_USE."""
        if self.exists_local(user_id):
            raise MatrixError(400, "M_USER_IN_USE", "This user name is taken")
        nid = self.db.user_nid(user_id)
        is_bolted = self.hs.config.enable_lightning_bolt and role != "appservice"
        bolt = " ⚡️" if is_bolted else ""
        with self.db.write():
            self.db.execute(
                """
                INSERT INTO accounts
                    (user_nid, password_hash, created_ts, is_admin, is_guest, by_appservice)
                VALUES (?, ?, ?, ?, ?, ?)
                """,
                (
                    *(nid, password_hash, now_ms()),
                    *(role == each for each in ("admin", "guest", "appservice")),
                ),
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

    def set_admin(self, nid: UserNid, is_admin: bool) -> None:
        """Make a user an administrator, or no longer."""
        with self.db.write():
            self.db.execute("UPDATE accounts SET is_admin = ? WHERE user_nid = ?", (is_admin, nid))
        self._forget_sessions(nid)

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
                (erase, nid),
            )
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
    account = hs.accounts.get(requester.nid)
    if account is not None and account.suspended:
        text = "You cannot perform this action while suspended"
        raise MatrixError(403, "M_USER_SUSPENDED", text)


# ── 14.5  User-interactive authentication ────────────────────────────────────

DUMMY = "m.login.dummy"
PASSWORD = "m.login.password"  # noqa: S105  the name of a stage
REGISTRATION_TOKEN = "m.login.registration_token"  # noqa: S105  the name of a stage
APPLICATION_SERVICE = "m.login.application_service"
PROVED_BY_AS_TOKEN = re.compile(f"{V3}/(?:devices/[^/]+|delete_devices)")
Flows = tuple[tuple[str, ...], ...]
AUTH_DATA = {"type?": str, "session?": str, "password?": str, "token?": str}


@dataclass
class UiaSession:
    """How far a client has come in proving that it may do one thing."""

    operation: tuple[str, str, UserNid | None]  # method, path, user
    body: bytes = b""  # a digest; the first stage fixes it, before that some clients send more
    completed: tuple[str, ...] = ()


class AuthenticationNeeded(MatrixError):
    """401 with the flows to choose from; with an error only when a stage was tried and failed."""

    def __init__(self, flows: Flows, name: str, done: Sequence[str], error: Json) -> None:
        super().__init__(401, "M_FORBIDDEN", "Further authentication is needed")
        self.body: Json = {"flows": [{"stages": flow} for flow in flows], "params": {}, **error}
        self.body |= {"session": name} | ({"completed": done} if done else {})

    def to_json(self) -> Json:
        """The body of the response."""
        return self.body


def named_user(hs: Homeserver, fields: Json) -> str | None:
    """The user id that a login or a stage names, by identifier or the old way; None if by neither.

    Spec: "Identifier types". 403 for third-party identifiers, since none is known here.
    """
    identifier = fields.get("identifier", {"type": "m.id.user", "user": fields.get("user")})
    if not isinstance(identifier, dict) or identifier.get("type") != "m.id.user":
        raise forbidden("Only user names are known here, no addresses or phone numbers")
    name = identifier.get("user")
    if name is None:
        return None
    if not isinstance(name, str):
        raise bad_json("user must be a string")
    localpart, _, server = name.removeprefix("@").partition(":")
    localpart = localpart.lower() if localpart.isascii() else localpart
    return f"@{localpart}:{server or hs.config.server_name}"


def is_registration_token(hs: Homeserver, token: str, address: str) -> bool:
    """Whether the token lets somebody register now; wrong ones count against the address."""
    keys = [("token", address_group(address))]
    hs.accounts.guesses.take(keys)
    configured = hs.config.registration_token if hs.config.allow_registration else None
    known = filter(None, (configured, hs.accounts.first_admin_token()))
    good = any([hmac.compare_digest(right.encode(), token.encode()) for right in known])
    if good:
        hs.accounts.guesses.refund(keys)
    return good


async def is_proved(hs: Homeserver, request: Request, auth: Json) -> bool:
    """Whether the stage that the client sent succeeds; another user's password is no proof."""
    if auth["type"] == DUMMY:
        return True
    if auth["type"] == REGISTRATION_TOKEN:
        check_shape(auth, {"token": str}, "auth")
        return is_registration_token(hs, auth["token"], request.address)
    check_shape(auth, {"password": str}, "auth")
    user_id = request.user.user_id
    if named_user(hs, auth) not in (None, user_id):
        return False
    return await hs.accounts.verify_password(user_id, auth["password"], request.address) is not None


def uia_session(hs: Homeserver, request: Request, name: str | None) -> tuple[str, UiaSession]:
    """The session that the client names, or a new one; 403 for a session of something else."""
    user_nid = request.requester.nid if request.requester else None
    operation = (request.method, request.path, user_nid)
    session = hs.accounts.uia.get(name)
    if name is None or session is None:
        session = UiaSession(operation)
        return hs.accounts.uia.add(session), session
    if session.operation != operation:
        raise forbidden("This session was begun for another operation")
    return name, session


async def user_interactive_auth(
    hs: Homeserver, request: Request, flows: Flows = ((PASSWORD,),)
) -> None:
    """Let the request pass once all stages of one flow are done; until then 401 with what is left.

    Spec: "User-interactive authentication API". A session is good for one success, for one body.
    An application service manages the devices of its users, and not their accounts.
    """
    if request.requester is not None and request.requester.appservice is not None:
        if PROVED_BY_AS_TOKEN.fullmatch(request.path.replace("/r0/", "/v3/")):
            return
        raise forbidden("An application service may not do this for its users")
    auth = request.json.get("auth") or {}
    check_shape(auth, AUTH_DATA, "auth")
    rest = {key: value for key, value in request.json.items() if key != "auth"}
    raw = json.dumps(rest, sort_keys=True).encode()  # there may be a password in it, so hashed
    body = hashlib.blake2b(raw, key=hs.accounts.uia_key).digest()
    name, session = uia_session(hs, request, auth.get("session"))
    failure: Json = {}
    if "type" in auth and auth["type"] not in session.completed:
        done = (*session.completed, auth["type"])
        is_next = any(flow[: len(done)] == done for flow in flows)
        if is_next and await is_proved(hs, request, auth):
            session.body = session.body or body
            session.completed = done
        else:  # it can be tried again
            failure = forbidden("Wrong password or token, or not what was asked for").to_json()
    if session.completed and session.body != body:
        raise forbidden("The request has changed during authentication")
    if failure or session.completed not in flows:
        raise AuthenticationNeeded(flows, name, session.completed, failure)
    if hs.accounts.uia.pop(name) is None:
        raise forbidden("This session was used already")


# ── 14.6  Registration ───────────────────────────────────────────────────────

DEVICE_FIELDS = {"device_id?": str, "initial_device_display_name?": str, "refresh_token?": bool}
NEW_ACCOUNT = {
    **DEVICE_FIELDS,
    **{"auth?": dict, "username?": str, "password?": str, "guest_access_token?": str},
    **{"inhibit_login?": bool, "type?": str},
}


def registration_flows(hs: Homeserver, request: Request) -> Flows:
    """What somebody has to prove for an account; 403 M_FORBIDDEN when nothing would do.

    The first account is the administrator's. It takes the token printed at the start or the
    configured one, unless it is registered on the machine itself.
    """
    config = hs.config
    is_first = not hs.accounts.has_users()
    is_open = request.is_local() or (config.allow_open_registration and not is_first)
    if config.allow_registration and not config.registration_token and is_open:
        return ((DUMMY,),)
    if is_first or (config.allow_registration and config.registration_token):
        return ((REGISTRATION_TOKEN,),)
    raise forbidden("Registration is disabled")


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


def register_by_appservice(hs: Homeserver, request: Request) -> Json:
    """Make an account without a password for a user of an application service.

    Spec: AS-API "Server admin style permissions". 400 M_EXCLUSIVE outside of its namespaces.
    """
    user_id = local_user_id(hs, request.json.get("username") or "")
    hs.accounts.check_appservice(request, user_id)
    with hs.db.write():
        nid = hs.accounts.make_account(user_id, role="appservice")
        if request.json.get("inhibit_login"):
            return {"user_id": user_id, "home_server": hs.config.server_name}
        return hs.accounts.log_in(nid, request.address, request.json)


@route("POST", V3 + "/register", auth=NONE, limit="register", body=NEW_ACCOUNT)
async def register(hs: Homeserver, request: Request) -> Json:
    """Make an account and log it in.  Spec: "Account registration".

    400 M_USER_IN_USE, M_INVALID_USERNAME, M_EXCLUSIVE, also before authentication.
    """
    accounts, body = hs.accounts, request.json
    kind = request.arg("kind", "user")
    check_device_texts(body)
    if body.get("type") == APPLICATION_SERVICE:
        return register_by_appservice(hs, request)
    if kind == "guest":
        return register_guest(hs, request)
    if kind != "user":
        raise invalid_param("kind must be user or guest")
    flows = registration_flows(hs, request)
    user_id, guest_nid = wanted_account(hs, request)
    check_new_password(body.get("password", "later"))
    is_first = not accounts.has_users()
    await user_interactive_auth(hs, request, flows)
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
        if body.get("inhibit_login"):
            return {"user_id": user_id, "home_server": hs.config.server_name}
        return accounts.log_in(nid, request.address, body)


@route("GET", V3 + "/register/available", auth=NONE, limit="register")
async def username_available(hs: Homeserver, request: Request) -> Json:
    """Whether a user name can be had; the errors say why not."""
    check_shape(request.query, {"username": [str]}, "The query")
    hs.accounts.check_available(local_user_id(hs, request.query["username"][0]))
    return {"available": True}


VALIDITY = "/_matrix/client/v1/register/m.login.registration_token/validity"


@route("GET", VALIDITY, auth=NONE, limit="register")
async def registration_token_validity(hs: Homeserver, request: Request) -> Json:
    """Whether a registration token would be accepted now; wrong ones count as guesses."""
    check_shape(request.query, {"token": [str]}, "The query")
    if not hs.config.allow_registration and hs.accounts.has_users():
        raise forbidden("Registration is disabled")
    return {"valid": is_registration_token(hs, request.query["token"][0], request.address)}


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


async def proved_user(hs: Homeserver, request: Request) -> UserNid | None:
    """Who logs in; a wrong password and an unknown user look the same."""
    body = request.json
    if body["type"] == "m.login.token":
        check_shape(body, {"token": str})
        nid, stored = hs.accounts.login_tokens.pop(body["token"]) or (None, None)
        account = None if nid is None else hs.accounts.get(nid)
        return nid if account is not None and account.password_hash == stored else None
    if body["type"] not in (PASSWORD, APPLICATION_SERVICE):
        raise MatrixError(400, "M_UNKNOWN", "Unknown login type")
    user_id = named_user(hs, body)
    if user_id is None:
        raise missing_param("identifier is missing")
    if body["type"] == APPLICATION_SERVICE:
        hs.accounts.check_appservice(request, user_id)
        return hs.db.find_user_nid(user_id)
    check_shape(body, {"password": str})
    return await hs.accounts.verify_password(user_id, body["password"], request.address)


@route("GET", V3 + "/login", auth=NONE, limit="login")
async def login_flows(_hs: Homeserver, _request: Request) -> Json:
    """The ways to log in.  Spec: "Login"."""
    token = {"type": "m.login.token", "get_login_token": True}
    return {"flows": [{"type": PASSWORD}, token, {"type": APPLICATION_SERVICE}]}


@route("POST", V3 + "/login", auth=NONE, limit="login", body=LOGIN)
async def login(hs: Homeserver, request: Request) -> Json:
    """Log in: a device with an access token.  Spec: "Login"."""
    check_device_texts(request.json)
    nid = await proved_user(hs, request)
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
async def put_device(hs: Homeserver, request: Request, device_id: str) -> Json | Response:
    """Rename a device; an application service can make one here as well, which is a 201."""
    user, name = request.user, request.json.get("display_name")
    check_device_texts({**request.json, "device_id": device_id})
    if user.appservice is not None and hs.accounts.find_device(user.nid, device_id) is None:
        hs.accounts.make_device(user.nid, device_id, name)
        return Response(201, b"{}")
    hs.accounts.rename_device(user.nid, device_id, name)
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


@route("POST", V3 + "/account/password", auth=USER, limit="login", body=PASSWORD_CHANGE)
async def change_password(hs: Homeserver, request: Request) -> Json:
    """Change the password; other devices are logged out unless logout_devices is false."""
    password, log_out = request.json["new_password"], request.json.get("logout_devices", True)
    check_new_password(password)
    await user_interactive_auth(hs, request)
    keep = request.user.device_nid
    await hs.accounts.set_password(request.user.nid, password, keep=keep, log_out=log_out)
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
        "m.3pid_changes": False,
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
    return {"capabilities": {**answer, **CAPABILITIES, "m.room_versions": versions}}


def check_own_user(request: Request, user_id: str) -> None:
    """403 M_FORBIDDEN for a path that names another user than the one who asks."""
    if user_id != request.user.user_id:
        raise forbidden("You can do this for your own account only")


@route("POST", V3 + "/user/{user_id}/openid/request_token", auth=USER, limit="login")
async def request_openid_token(hs: Homeserver, request: Request, user_id: str) -> Json:
    """A token by which a third service can ask this server who the user is, and nothing else."""
    check_own_user(request, user_id)
    return {
        "access_token": hs.accounts.openid_tokens.add(request.user.nid),
        "token_type": "Bearer",
        "matrix_server_name": hs.config.server_name,
        "expires_in": hs.accounts.openid_tokens.seconds,
    }


@route("GET", "/_matrix/federation/v1/openid/userinfo", auth=NONE)
async def openid_userinfo(hs: Homeserver, request: Request) -> Json:
    """Whose OpenID token this is.  Spec: SS-API "OpenID"."""
    nid = hs.accounts.openid_tokens.get(request.arg("access_token"))
    account = None if nid is None else hs.accounts.get(nid)
    if account is None or account.deactivated:
        raise unknown_token()
    return {"sub": hs.db.user_id(account.nid)}


# Third-party identifiers: there are none here. No mail is sent and no text message.


@route("GET", V3 + "/account/3pid", auth=USER)
async def list_third_party_ids(_hs: Homeserver, _request: Request) -> Json:
    """The e-mail addresses and phone numbers of the account: none."""
    return {"threepids": []}


@route("POST", V3 + "/account/3pid/delete", auth=USER)
@route("POST", V3 + "/account/3pid/unbind", auth=USER)
async def remove_third_party_id(_hs: Homeserver, _request: Request) -> Json:
    """Nothing was ever bound through this server."""
    return {"id_server_unbind_result": "no-support"}


@route("POST", V3 + "/account/3pid", auth=NONE)
@route("POST", V3 + "/account/3pid/add", auth=NONE)
@route("POST", V3 + "/account/3pid/bind", auth=NONE)
@route("POST", V3 + "/account/3pid/{medium}/requestToken", auth=NONE)
@route("POST", V3 + "/account/password/{medium}/requestToken", auth=NONE)
@route("POST", V3 + "/register/{medium}/requestToken", auth=NONE)
async def deny_third_party_id(_hs: Homeserver, _request: Request, medium: str = "") -> Json:
    """None can be validated, so none can be added, or used.  Spec: "m.3pid_changes"."""
    raise MatrixError(403, "M_THREEPID_DENIED", "This server keeps no addresses")


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
    await hs.accounts.summon(user_id)
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


@route("PUT", PROFILE_FIELD, auth=GUEST, also=PROFILE_FIELD_OLD, body=ANY_OBJECT)
async def put_profile_field(hs: Homeserver, request: Request, user_id: str, name: str) -> Json:
    """Set a field of the own profile; an empty name or avatar takes it away."""
    check_may_edit_profile(hs, request, user_id, name)
    check_shape(request.json, {name: ANY})
    value, form = request.json[name], FIELD_VALUES.get(name)
    if value is None or (form is not None and not isinstance(value, str)):
        raise bad_json(f"{name} is of the wrong type")
    if form is not None and not form.fullmatch(value):
        raise invalid_param(f"{name} is too long, or nothing that clients could show")
    hs.profiles.put(request.user.nid, name, None if name in MEMBER_FIELDS and not value else value)
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
    if hs.directory.is_reserved(alias, creator):
        raise MatrixError(400, "M_EXCLUSIVE", "This alias belongs to an application service")
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
    if requester.is_admin:
        return True
    levels = room.power_levels()
    is_in = room.membership_of(requester.nid) == "join"
    return is_in and levels.user(requester.user_id) >= levels.event("m.room.canonical_alias", True)


@route("GET", ALIAS, auth=NONE)
async def get_alias(hs: Homeserver, _request: Request, alias: str) -> Json:
    """Which room an alias stands for.  Spec: "Room aliases"."""
    await hs.directory.summon(alias)
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
    if hs.directory.is_reserved(alias, request.user.user_id, request.user.appservice or ""):
        raise MatrixError(400, "M_EXCLUSIVE", "This alias is not in your namespaces")
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
    if hs.directory.is_reserved(alias, request.user.user_id, request.user.appservice or ""):
        raise MatrixError(400, "M_EXCLUSIVE", "This alias is not in your namespaces")
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
    """Which rooms are listed, how, and in which rooms people can be found by all.

    What concerns application services is set by chapter 52.
    """

    is_reserved: Callable[..., bool]  # whether an alias is theirs: alias, creator, service
    network_rooms: Callable[[str | None], list[RoomNid]]  # the rooms of a bridged network, of all
    summon: Callable[[str], Awaitable[None]]  # asks them to make an alias

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self._listings: LruCache[RoomNid, Json] = LruCache(5_000)
        hs.db.on_reset(self._listings.clear)
        hs.rooms.subscribe(self._on_event)

    def listings(self, network: str = "", *, everywhere: bool = False) -> list[Json]:
        """The published rooms that have somebody in them, large ones first.

        These are our own, those of a bridged network, or both kinds.
        """
        nids = set(self.network_rooms(network or None)) if network or everywhere else set()
        if not network or everywhere:
            nids |= {row[0] for row in self.hs.db.all("SELECT room_nid FROM published_rooms")}
        found = []
        for nid in nids:
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
    everywhere = query.get("include_all_networks", False)
    network = "" if everywhere else query.get("third_party_instance_id", "")
    listings = hs.directory.listings(network, everywhere=everywhere)
    found = [room for room in listings if fits(room, term, types)]
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
    edit = latest_edit(reader.hs, event, reader.viewer.may_see)
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
        "latest_event": client_events(hs, user, [newest])[0],
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
    await hs.accounts.summon(body["user_id"])
    hs.accounts.check_logged_in(request.user)
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
    await hs.directory.summon(room)
    hs.accounts.check_logged_in(request.user)
    found = room_by_name(hs, room)
    with hs.db.write():
        join(hs, request, found)
    return {"room_id": found.room_id}


def auto_join(hs: Homeserver, user_nid: UserNid) -> None:
    """A new user enters the rooms that the configuration names, where they may."""
    user_id = hs.db.user_id(user_nid)
    if hs.accounts.is_puppet(user_nid):
        return
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
    for invitee in request.json.get("invite", [])[:MAX_INVITES]:
        await hs.accounts.summon(invitee)
    hs.accounts.check_logged_in(request.user)
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


def massaged_time(request: Request) -> int | None:
    """When an event is said to have been sent; only application services can say so.

    Spec: AS-API "Timestamp massaging".
    """
    if request.user.appservice is None or request.arg("ts") is None:
        return None
    timestamp = request.int_arg("ts", 0, 0, 2**60)
    if timestamp >= 2**53:
        raise invalid_param("ts is no time in milliseconds")
    return timestamp


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
    timestamp: int | None = None,
) -> Event:
    """Send an event that is no state; a redaction names its target in the content."""
    if event_type != REDACTION:
        refuse_suspended(hs, user)
        room = hs.rooms.get(room_id)
        require_thread_root(hs, room, content)
        how: Json = {"transaction": transaction, "timestamp": timestamp}
        return hs.rooms.send(room, user.user_id, event_type, content, **how)
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
    send = functools.partial(send, timestamp=massaged_time(request))
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
    timestamp: int | None = None,
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
    how: Json = {"state_key": state_key, "transaction": transaction, "timestamp": timestamp}
    return hs.rooms.send(room, user_id, event_type, content, **how)


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
    place, timestamp = (room_id, event_type, state_key), massaged_time(request)
    event = set_state(hs, request.user, *place, request.json, timestamp=timestamp)
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
    return room, event


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
        kept = {event.nid for event in keep(batch)}
        for event in reversed(batch) if backwards else batch:
            if len(found) >= limit:
                return Page(found, high if backwards else low, True)
            if event.nid in kept:
                found.append(event)
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
        if viewers[room.nid].may_see(event):
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
    hs: Homeserver, room_nid: RoomNid, user_nid: UserNid, since: int, also: Container[UserNid] = ()
) -> Json | None:
    """The content of an m.receipt event with what changed, or None; private ones to their owner.

    `also` has users whose private ones are shown as well: those of an application service.
    Where a user has two receipts at one event, the unthreaded one goes out: it says more.
    """
    content: Json = {}
    for reader_nid, kind, thread, event_id, ts in hs.receipts.newer(room_nid, since):
        if kind == READ_PRIVATE and reader_nid != user_nid and reader_nid not in also:
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


@restorer
def forget_handed_out_keys(connection: sqlite3.Connection, position: int) -> None:
    """After a restore: one-time keys may have been handed out since, and devices have changed.

    Each key goes to one caller only, so none of those of the backup is given to anybody; devices
    upload new ones. All device lists are announced anew.
    """
    connection.execute("UPDATE one_time_keys SET used = 1, body = NULL WHERE NOT fallback")
    connection.execute("UPDATE one_time_keys SET used = 1 WHERE fallback")
    announce = "INSERT OR REPLACE INTO device_changes SELECT user_nid, 0, ? FROM accounts"
    connection.execute(announce, (position,))


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


class SyncRequest:
    """One call of /sync: who asks, from where on, and in what form."""

    def __init__(self, hs: Homeserver, request: Request, wanted: SyncFilter) -> None:
        self.hs = hs
        self.user = request.user
        self.nid = request.user.nid
        self.wanted = wanted
        self.full_state = request.bool_arg("full_state", False)
        self.state_name, self.state_after = "state", False
        for prefix in ("org.matrix.msc4222.", ""):
            if request.bool_arg(f"{prefix}use_state_after", False):
                self.state_name, self.state_after = f"{prefix}state_after", True
        self.since: int | None = None
        self.to_device_since = 0
        token = request.arg("since")
        position = parse_token(token) if token else None
        # A position still to come is from a database that was put back: then all begins anew.
        if token and position is not None and position <= hs.stream.position:
            self.since, behind = position, token.partition("_")[2]
            self.to_device_since = int(behind) if behind else position
        self.upto = hs.stream.position
        self.ignored = ignored_users(hs, self.nid)

    def format(self, event: Event, relations: Json | None = None) -> Json:
        """An event of a room's section, in the form that the filter asks for."""
        if self.wanted.federation_format:
            whole = {**event.pdu, "event_id": event.event_id}
        else:
            whole = client_event(self.hs.rooms, event, self.user.device_nid, room_id=False)
            if relations is not None:
                whole["unsigned"]["m.relations"] = relations
        if self.wanted.fields is None:
            return whole
        result: Json = {}
        for path in self.wanted.fields:
            copy_field(whole, result, path)
        return result

    def pick_data(self, wanted: EventFilter, events: Iterable[Json]) -> list[Json]:
        """The account data that passes a filter, for which the user counts as the sender."""
        user_id = self.user.user_id
        return [one for one in events if wanted.wants(one["type"], user_id, one["content"])]


# ── 21.3  What has changed ───────────────────────────────────────────────────


class Changes(NamedTuple):
    """What may be new for a user since a position, before anything is read."""

    rooms: set[RoomNid]
    receipts: set[RoomNid]
    typing: set[RoomNid]
    kinds: set[str]


def changes_in_tables(ask: SyncRequest, since: int) -> Changes:
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


def changes_since(ask: SyncRequest, since: int) -> Changes:
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


def timeline_of(ask: SyncRequest, room: Room, since: int | None, upto: int) -> Timeline:
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


def group_at(ask: SyncRequest, room: Room, position: int) -> int | None:
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
    ask: SyncRequest, room: Room, since: int | None, timeline: Timeline, upto: int
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


def heroes(ask: SyncRequest, room: Room) -> list[str] | None:
    """Up to five others in the room, from whom a client makes a name for it if it has none."""
    alias = room.content("m.room.canonical_alias").get("alias")
    if alias or room.content("m.room.name").get("name"):
        return None
    found: list[UserNid] = []
    for memberships in (("join", "invite"), ("leave", "ban")):
        for wanted in memberships:
            nids = (nid for nid, value in room.members_by_nid.items() if value == wanted)
            others = (nid for nid in nids if nid != ask.nid)
            found += itertools.islice(others, HEROES - len(found))
        if found:  # those who left count only in an empty room
            break
    return [ask.hs.db.user_id(nid) for nid in found]


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
    chosen = {key: nid for key, nid in state.items() if key[0] != MEMBER or key[1] in sent}
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


def unread_section(ask: SyncRequest, room: Room) -> Json:
    """The unread counts: in all, or for the main timeline and each thread."""
    counts = unread_counts(ask.hs, ask.nid, room)
    main, threads = (counts.notification_count, counts.highlight_count), counts.threads
    names = ("notification_count", "highlight_count")
    if not ask.wanted.timeline.thread_counts:
        sums = map(sum, zip(main, *threads.values(), strict=True))
        return {"unread_notifications": dict(zip(names, sums, strict=True))}
    by_root = {root: dict(zip(names, pair, strict=True)) for root, pair in threads.items()}
    return {
        "unread_notifications": dict(zip(names, main, strict=True)),
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
    if fresh or timeline.limited or any(event.type == MEMBER for event in timeline.events):
        section["summary"] = summary_of(ask, room)
    return section


def was_joined(ask: SyncRequest, room: Room, position: int) -> bool:
    """Whether the user was in a room at a position."""
    event = ask.hs.rooms.event_at(room, position)
    key = (MEMBER, ask.user.user_id)
    entry = None if event is None else ask.hs.rooms.entry_after(event, key)
    return entry is not None and entry.membership == "join"


def left_section(ask: SyncRequest, room: Room, member: Member) -> Json:
    """A room that the user has left, up to the moment of leaving."""
    rooms, since = ask.hs.rooms, ask.since
    left = cast(Event, rooms.event_by_nid(member.event_nid))
    end = left.pos or left.nid
    gone = departure(ask.hs, left)  # kicked, and banned later: the state is that of the kick
    was_member = gone is not None and gone.nid > (since or 0)
    if since is not None and was_member and not was_joined(ask, room, since):
        since = None  # came and went since the last sync: all is new
    timeline = timeline_of(ask, room, since, end)
    if left not in timeline.events and ask.wanted.timeline.pick([left]):
        timeline = timeline._replace(events=[*timeline.events, left])
    upto = cast(Event, gone).nid if was_member else end
    state = state_section(ask, room, since, timeline, upto) if was_member else []
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
        if is_new and event.sender not in ask.ignored:
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
        new_data = ask.pick_data(ask.wanted.room_data, new_data)
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
#  52. APPLICATION SERVICES
#
#  Bridges and bots that act for many users. A registration in YAML says which
#  users, aliases and rooms are theirs; they speak to us with a token of their
#  own, and we tell them what happens, in order, until they have said "200".
#                                     spec: Application Service API; MSC3202
# ═════════════════════════════════════════════════════════════════════════════

schema("""
CREATE TABLE appservices (          -- those registered in the admin room
    id TEXT PRIMARY KEY,
    registration TEXT NOT NULL      -- YAML, as it was given
) WITHOUT ROWID;
CREATE TABLE appservice_queue (     -- what is to be told, in order
    item_nid INTEGER PRIMARY KEY AUTOINCREMENT,
    appservice TEXT NOT NULL,
    event_nid INTEGER,              -- an event, or
    user_id TEXT                    -- a user whose devices changed
);
CREATE INDEX appservice_queue_by_service ON appservice_queue (appservice, item_nid);
CREATE TABLE appservice_txns (      -- what is being told; a retry must not differ
    appservice TEXT PRIMARY KEY,
    txn_id TEXT NOT NULL,
    body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE network_rooms (        -- rooms listed under a bridged network
    appservice TEXT,
    network_id TEXT,
    room_nid INTEGER,
    PRIMARY KEY (appservice, network_id, room_nid)
) WITHOUT ROWID;
""")
invariant(
    "events for application services that are not there",
    """
    SELECT event_nid
    FROM appservice_queue
    WHERE event_nid IS NOT NULL AND event_nid NOT IN (SELECT nid FROM events)
    """,
)
invariant(
    "rooms of networks that are not there",
    "SELECT room_nid FROM network_rooms WHERE room_nid NOT IN (SELECT room_nid FROM rooms)",
)

MAX_TXN_ITEMS = 100
MAX_WAITING_ITEMS = 200_000  # for one service; beyond, the oldest are lost to it
PRUNE_EVERY = 1_000
FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 300.0
SERVICE_SECONDS = 60.0
QUESTION_SECONDS = 10.0  # somebody waits for the answer
MAX_SERVICE_ANSWER = 1_048_576

log_appservice = logging.getLogger("conduit.appservice")

# ── 52.1  The YAML of registrations ──────────────────────────────────────────
#
#  Of YAML, what bridges write: mappings and lists by indentation, texts with and
#  without quotes, block texts, lists and mappings in brackets, comments. Whatever
#  two readers of YAML could understand in two ways is refused, with its line.

YAML_KEY = re.compile(
    r"""("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[A-Za-z_][\w./-]*):(?: +|$)""", re.ASCII
)
YAML_DASH = re.compile(r"-(?: +|$)")
YAML_BLOCK = re.compile(r"([|>])(-?)(?: +#.*)?")
YAML_QUOTED = re.compile(
    r""""(?:[^"\\]|\\(?:["\\/nt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}))*"|'(?:[^']|'')*'"""
)
YAML_PLAIN = re.compile(r"[A-Za-z0-9_/\\^$(~][^#:]*(?:(?:(?<! )#|:(?=[^ ]))[^#:]*)*")
YAML_PLAIN_IN_FLOW = re.compile(r"[A-Za-z0-9_/~][\w ./~$^()+-]*", re.ASCII)
YAML_FLOW_KEY = re.compile(r" *: +")
YAML_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
YAML_WORDS: Final = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~"), None),
}
YAML_AMBIGUOUS = re.compile(
    r"[0-9][0-9_.:]*(?:e[-+]?[0-9]*)?|0[xob][0-9a-f_]*|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*"
    r"|y|n|yes|no|on|off|true|false|null|~.*",
    re.IGNORECASE | re.ASCII,
)
MAX_YAML_DEPTH = 12


class YamlError(Exception):
    """What is wrong with a registration, and in which line."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"line {line}: {what}")


class YamlReader:
    """Reads one document from top to bottom."""

    def __init__(self, text: str) -> None:
        self.lines = [line.removesuffix("\r") for line in text.split("\n")]
        self.at = 0  # the next line to look at
        self.depth = 0
        for number, line in enumerate(self.lines, 1):
            if not line.isprintable():
                raise YamlError(number, "tabs and control characters are not allowed")

    def error(self, what: str) -> YamlError:
        """The mistake in the line that was looked at last."""
        return YamlError(min(self.at + 1, len(self.lines)), what)

    def peek(self) -> tuple[int, str]:
        """Indentation and text of the next line that says something; (-1, "") at the end."""
        while self.at < len(self.lines):
            text = self.lines[self.at].strip(" ")
            if text and not text.startswith("#"):
                return len(self.lines[self.at]) - len(self.lines[self.at].lstrip(" ")), text
            self.at += 1
        return -1, ""

    def document(self) -> Json:
        """The mapping that the whole text is."""
        indent, text = self.peek()
        if text == "---":
            self.at += 1
            indent, text = self.peek()
        if not YAML_KEY.match(text):
            raise self.error("a registration begins with 'key: value'")
        found = self.mapping(indent)
        if self.peek()[0] >= 0:
            raise self.error("this is indented in another way than the lines before")
        return found

    def nested(self, read: Callable[[Any], Any], argument: Any) -> Any:
        """Read what is inside of something else, up to a depth."""
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise self.error("this is nested too deeply")
        found = read(argument)
        self.depth -= 1
        return found

    def mapping(self, indent: int) -> Json:
        """Lines of 'key: value' with the same indentation."""
        found: Json = {}
        while self.peek()[0] == indent and not YAML_DASH.match(text := self.peek()[1]):
            match = YAML_KEY.match(text)
            if match is None:
                raise self.error("this is not 'key: value'")
            key = self.scalar(match[1])
            if not isinstance(key, str) or key in found:
                raise self.error(f"the key {match[1]} is no text, or stands there twice")
            found[key] = self.value(indent, text[match.end() :], is_member=True)
        if self.peek()[0] > indent:
            raise self.error("this is indented too far")
        return found

    def sequence(self, indent: int) -> list[Any]:
        """Lines of '- value' with the same indentation."""
        found = []
        while self.peek()[0] == indent and (match := YAML_DASH.match(self.peek()[1])):
            rest = self.peek()[1][match.end() :]
            if YAML_KEY.match(rest) or YAML_DASH.match(rest):  # a mapping begins behind the dash
                inner = indent + match.end()
                self.lines[self.at] = " " * inner + rest
                found.append(self.nested(self.block, inner))
            else:
                found.append(self.value(indent, rest, is_member=False))
        if self.peek()[0] > indent:
            raise self.error("this is indented too far")
        return found

    def block(self, indent: int) -> Any:
        """Whatever begins in the next line, which has that indentation."""
        text = self.peek()[1]
        if YAML_DASH.match(text):
            return self.sequence(indent)
        if YAML_KEY.match(text):
            return self.mapping(indent)
        raise self.error("a value stands behind its key, in the same line")

    def value(self, indent: int, text: str, *, is_member: bool) -> Any:
        """The value behind a key or a dash: in this line, or in those below."""
        if block := YAML_BLOCK.fullmatch(text):
            return self.block_text(indent, folded=block[1] == ">", stripped=block[2] == "-")
        if text and not text.startswith("#"):
            found, rest = self.flow(text) if text[0] in "[{" else self.inline(text)
            if rest.strip(" ") and not re.match(" +#", rest):
                raise self.error("what stands behind the value belongs in quotes")
            self.at += 1
            return found
        self.at += 1
        inner, text = self.peek()
        if inner > indent or (is_member and inner == indent and YAML_DASH.match(text)):
            return self.nested(self.block, inner)
        return None

    def block_text(self, indent: int, *, folded: bool, stripped: bool) -> str:
        """The lines below a | or >, all with the same indentation and none of them empty."""
        self.at += 1
        inner, found = self.peek_raw(), []
        while self.at < len(self.lines) and self.peek_raw() == inner > indent:
            found.append(self.lines[self.at][inner:])
            self.at += 1
        is_over = self.at == len(self.lines)
        while self.at < len(self.lines) and not self.lines[self.at].strip(" "):
            self.at += 1
        if not found or (self.at < len(self.lines) and self.peek_raw() > indent):
            raise self.error("the lines of a block have the same indentation, and none is empty")
        return (" " if folded else "\n").join(found) + ("" if stripped or is_over else "\n")

    def peek_raw(self) -> int:
        """The indentation of the next line, comments included; -1 for an empty line."""
        line = self.lines[self.at] if self.at < len(self.lines) else ""
        return len(line) - len(line.lstrip(" ")) if line.strip(" ") else -1

    def inline(self, text: str, plain: re.Pattern[str] = YAML_PLAIN) -> tuple[Any, str]:
        """A text, number or word, and what follows it in its line."""
        match = YAML_QUOTED.match(text) or plain.match(text) or YAML_INTEGER.match(text)
        if match is None:
            raise self.error("this belongs in quotes")
        token = match[0].rstrip(" ")
        return self.scalar(token), text[len(token) :]

    def flow(self, text: str) -> tuple[Any, str]:
        """A list or mapping in brackets, and what follows it in its line."""
        closing, members = "]" if text[0] == "[" else "}", dict[Any, Any]()
        text = text[1:].lstrip(" ")
        while not text.startswith(closing):
            if closing == "}":
                key, text = self.inline(text, YAML_PLAIN_IN_FLOW)
                colon = YAML_FLOW_KEY.match(text)
                if colon is None or not isinstance(key, str) or key in members:
                    raise self.error("this is not {key: value, key: value}")
                text = text[colon.end() :]
            else:
                key = len(members)
            members[key], text = self.flow_value(text)
            text = text.lstrip(" ")
            if not text.startswith((",", closing)):
                raise self.error(f"a comma or {closing} is missing")
            text = text.removeprefix(",").lstrip(" ")
        return (members if closing == "}" else list(members.values())), text[1:]

    def flow_value(self, text: str) -> tuple[Any, str]:
        """One value inside of brackets."""
        if text[:1] in ("[", "{"):
            return cast("tuple[Any, str]", self.nested(self.flow, text))
        return self.inline(text, YAML_PLAIN_IN_FLOW)

    def scalar(self, text: str) -> Any:
        """What a text, number or word stands for."""
        if text.startswith("'"):
            return text[1:-1].replace("''", "'")
        if text.startswith('"'):
            if not YAML_QUOTED.fullmatch(text):
                raise self.error('of the escapes there are \\" \\\\ \\/ \\n \\t and \\u')
            return json.loads(text)
        if text in YAML_WORDS:
            return YAML_WORDS[text]
        if YAML_INTEGER.fullmatch(text):
            return int(text)
        if YAML_AMBIGUOUS.fullmatch(text):
            raise self.error(f"{text} belongs in quotes, if it is meant as text")
        return text


# ── 52.2  Registrations ──────────────────────────────────────────────────────

NAMESPACE: Final = [{"regex": str, "exclusive": bool}]
REGISTRATION: Final = {
    **{"id": str, "url?": str, "as_token": str, "hs_token": str, "sender_localpart": str},
    "namespaces": {"users?": NAMESPACE, "aliases?": NAMESPACE, "rooms?": NAMESPACE},
    **{"rate_limited?": bool, "protocols?": [str], "receive_ephemeral?": bool},
    # From before these were in the specification, or since they are not yet:
    **{"push_ephemeral?": bool, "de.sorunome.msc2409.push_ephemeral?": bool},
    "org.matrix.msc3202?": bool,
}
EPHEMERAL: Final = (
    *("receive_ephemeral", "push_ephemeral"),
    "de.sorunome.msc2409.push_ephemeral",
)


@dataclass
class Appservice:
    """A registration, and what is to be told that need not survive a stop."""

    id: str
    url: str | None
    as_token: str
    hs_token: str
    sender: str  # the user that it is itself
    namespaces: dict[str, list[tuple[re.Pattern[str], bool]]]
    rate_limited: bool
    protocols: tuple[str, ...]
    ephemeral: bool
    encryption: bool  # to-device messages, device lists and key counts
    from_file: bool
    owned: set[UserNid] = field(default_factory=set)  # the accounts in its namespaces
    typing: set[RoomNid] = field(default_factory=set)
    receipts: dict[RoomNid, int] = field(default_factory=dict)  # told up to this position
    presence: set[UserNid] = field(default_factory=set)
    keys: set[UserNid] = field(default_factory=set)  # has messages, or used up keys
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    retry: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0

    def claims(self, kind: str, name: str, *, exclusively: bool = False) -> bool:
        """Whether a user, alias or room is in its namespaces.  Trap: a regex binds the start only,
        as other servers have it, and as registrations rely on.
        """
        if kind == "users" and name == self.sender:
            return True
        return any(
            (exclusive or not exclusively) and pattern.match(name)
            for pattern, exclusive in self.namespaces.get(kind, ())
        )


def read_registration(text: str, server_name: str, *, from_file: bool = False) -> Appservice:
    """The application service that a registration describes; 400 with what is wrong with it."""
    try:
        fields = YamlReader(text).document()
        check_shape(fields, REGISTRATION, "The registration")
        namespaces = {
            kind: [(re.compile(each["regex"]), each["exclusive"]) for each in names]
            for kind, names in fields["namespaces"].items()
        }
    except YamlError as error:
        raise bad_json(f"The registration cannot be read, {error}") from None
    except re.error as error:
        raise bad_json(f"{error.pattern!r} is no regular expression: {error}") from None
    url, sender = fields.get("url"), f"@{fields['sender_localpart']}:{server_name}"
    if not is_user_id(sender) or (url is not None and not matches(r"https?://[^\s?#]+")(url)):
        raise bad_json("sender_localpart makes no user id, or url is no URL")
    if not all(fields[name].strip() for name in ("id", "as_token", "hs_token")):
        raise bad_json("id, as_token and hs_token must not be empty")
    return Appservice(
        **{name: fields[name] for name in ("id", "as_token", "hs_token")},
        url=None if url is None else url.rstrip("/"),
        sender=sender,
        namespaces=namespaces,
        rate_limited=fields.get("rate_limited", True),
        protocols=tuple(fields.get("protocols", ())),
        ephemeral=any(fields.get(name) for name in EPHEMERAL),
        encryption=bool(fields.get("org.matrix.msc3202")),
        from_file=from_file,
    )


# ── 52.3  Who speaks, and what is theirs ─────────────────────────────────────

M_EXCLUSIVE: Final = "M_EXCLUSIVE"


class AppserviceRegistry:
    """All application services: what they may do, and which accounts and rooms are theirs."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs, self.db = hs, hs.db
        self.services: dict[str, Appservice] = {}
        self._by_token: dict[bytes, Appservice] = {}
        hs.accounts.is_reserved = lambda user_id: self._is_reserved("users", user_id, "")
        hs.accounts.check_appservice = self.check_claim
        hs.directory.is_reserved = functools.partial(self._is_reserved, "aliases")
        hs.directory.network_rooms = self._network_rooms
        hs.accounts.on_account_created(self._own_account)
        hs.db.on_reset(self._own_accounts)

    def load(self) -> None:
        """Read what is registered, in the files and in the admin room; a wrong file is refused."""
        server_name = self.hs.config.server_name
        for path in self.hs.config.appservice_config_files:
            try:
                self._add(read_registration(path.read_text("utf-8"), server_name, from_file=True))
            except (OSError, UnicodeDecodeError, MatrixError) as error:
                reason = error.error if isinstance(error, MatrixError) else str(error)
                raise ConfigError([f"appservice_config_files: {path}: {reason}"]) from error
        for service_id, text in self.db.all("SELECT id, registration FROM appservices"):
            try:
                self._add(read_registration(text, server_name))
            except MatrixError as error:
                log_appservice.error("%s cannot be used: %s", service_id, error.error)

    def _add(self, service: Appservice) -> None:
        """Let a service in, and make its own account."""
        if service.id in self.services:
            raise invalid_param(f"There is an application service {service.id} already")
        if token_hash(service.as_token) in self._by_token:
            raise invalid_param("Another application service has the same as_token")
        account = self.hs.accounts.find(service.sender)
        if service.sender == self.hs.accounts.bot_id or (account and account.password_hash):
            raise invalid_param(f"{service.sender} is somebody's account already")
        if account is None:
            name = service.sender[1:].partition(":")[0]
            self.hs.accounts.make_account(service.sender, name=name, role="appservice")
        self.services[service.id] = self._by_token[token_hash(service.as_token)] = service
        self._own_accounts()

    def drop(self, service: Appservice) -> None:
        """Let a service go, and end what it waits for."""
        del self.services[service.id], self._by_token[token_hash(service.as_token)]
        service.wake.set()
        service.retry.set()

    # Its accounts

    def _own_accounts(self) -> None:
        """Find the accounts in the namespaces again."""
        rows = self.services and self.db.all(
            "SELECT user_nid, user_id FROM accounts JOIN users USING (user_nid)"
        )
        for service in self.services.values():
            service.owned = {nid for nid, user_id in rows or () if service.claims("users", user_id)}

    def _own_account(self, user_nid: UserNid) -> None:
        for service in self.services.values():
            if service.claims("users", self.db.user_id(user_nid)):
                service.owned.add(user_nid)

    # Requests

    def of_request(self, request: Request) -> Appservice | None:
        """The service whose as_token a request bears."""
        token = access_token(request) if self._by_token else None
        return None if token is None else self._by_token.get(token_hash(token))

    def is_unlimited(self, request: Request) -> bool:
        """Whether no rate limit counts: for the service itself, and for its users if it says so."""
        service = self.of_request(request)
        acts_for = request.arg("user_id")
        return service is not None and (
            not service.rate_limited or acts_for in (None, service.sender)
        )

    def authenticate(self, request: Request, token: str) -> Requester:
        """Who asks: as for everybody, or the user for whom a service acts by user_id.

        Spec: "Identity assertion". 403 M_FORBIDDEN outside of its namespaces, and in the admin
        room, 400 M_UNKNOWN_DEVICE. Trap: a service is never an admin, whomever it acts for.
        """
        service = self._by_token.get(token_hash(token)) if self._by_token else None
        if service is None:
            return self.hs.accounts.authenticate(request, token)
        user_id = request.arg("user_id") or service.sender
        if not self.hs.is_local(user_id) or not service.claims("users", user_id):
            raise forbidden(f"{user_id} is not in the namespaces of {service.id}")
        account = self.hs.accounts.find(user_id)
        if account is None or account.deactivated:
            raise forbidden(f"{user_id} has no account; register it first")
        if account.locked:
            raise user_locked()
        if self.hs.admin_room.room_id in request.segments:
            raise forbidden("The admin room is closed to application services")
        device_id, device_nid = request.arg("device_id"), None
        if device_id is not None:
            device_nid = self.hs.accounts.find_device(account.nid, device_id)
            if device_nid is None:
                raise MatrixError(400, "M_UNKNOWN_DEVICE", f"{user_id} has no device {device_id}")
        return Requester(user_id, account.nid, device_id, device_nid, None, appservice=service.id)

    def check_claim(self, request: Request, user_id: str) -> None:
        """Let a service make or log in a user of its own. 401 without as_token, 400 M_EXCLUSIVE.

        Trap: the tokens of a login are the user's own, and so would be an admin's rights.
        """
        token = access_token(request)
        if token is None:
            raise MatrixError(401, "M_MISSING_TOKEN", "Missing access token")
        service = self._by_token.get(token_hash(token))
        if service is None:
            raise unknown_token()
        if not self.hs.is_local(user_id) or not service.claims("users", user_id):
            raise MatrixError(400, M_EXCLUSIVE, f"{user_id} is not in your namespaces")
        account = self.hs.accounts.find(user_id)
        if user_id == self.hs.accounts.bot_id or (account is not None and account.is_admin):
            raise forbidden("An application service cannot log in as an admin")

    def _is_reserved(self, kind: str, name: str, creator: str, appservice: str = "") -> bool:
        """Whether a name belongs to a service other than the one that wants it.

        That is one in an exclusive namespace; and for a service itself, one outside of its own.
        """
        if appservice:
            return not self.services[appservice].claims(kind, name)
        return any(
            service.claims(kind, name, exclusively=True)
            and not (creator and service.claims("users", creator))
            for service in self.services.values()
        )

    def _network_rooms(self, instance: str | None) -> list[RoomNid]:
        """The rooms that services list under a network, or under any."""
        if instance is None:
            rows = self.db.all("SELECT DISTINCT room_nid FROM network_rooms")
        else:
            appservice, _, network = instance.rpartition("|")
            rows = self.db.all(
                "SELECT room_nid FROM network_rooms WHERE appservice = ? AND network_id = ?",
                (appservice, network),
            )
        return [row[0] for row in rows]

    def list_room(self, service_id: str, network_id: str, room: Room, visibility: str) -> None:
        """List a room under a network of a service ("public"), or no longer ("private")."""
        row = (service_id, network_id, room.nid)
        with self.db.write():
            self.db.execute(
                """
                DELETE FROM network_rooms
                WHERE appservice = ? AND network_id = ? AND room_nid = ?
                """,
                row,
            )
            if visibility == "public":
                self.db.execute("INSERT INTO network_rooms VALUES (?, ?, ?)", row)

    # Interest

    def sees(self, service: Appservice, room: Room) -> bool:
        """Whether a service hears of a room: it is in a namespace, or one of its users is in it."""
        if room.room_id == self.hs.admin_room.room_id:
            return False
        if not room.local_joined.isdisjoint(service.owned) or service.claims("rooms", room.room_id):
            return True
        if not service.namespaces.get("aliases"):
            return False
        rows = self.db.all("SELECT alias FROM aliases WHERE room_nid = ?", (room.nid,))
        return any(service.claims("aliases", alias) for (alias,) in rows)


# ── 52.4  What they are told ─────────────────────────────────────────────────

INSERT_ITEM = "INSERT INTO appservice_queue (appservice, event_nid, user_id) VALUES (?, ?, ?)"


class AppserviceQueues(AppserviceRegistry):
    """Notes what happens for the services that care, and makes transactions of it.

    Events and changed devices stand in the database until they are told. Who types, what was read
    and who is online is noted as "has changed", and looked up when the transaction is made.
    """

    def __init__(self, hs: Homeserver) -> None:
        super().__init__(hs)
        hs.rooms.subscribe(self._on_event)
        hs.rooms.subscribe_membership(self._on_membership)
        hs.stream.subscribe(self._on_stamp)

    def _told(self) -> Iterator[Appservice]:
        return (service for service in self.services.values() if service.url is not None)

    def _put(self, service: Appservice, event_nid: int | None, user_id: str | None) -> None:
        """Put an item into the queue; of a service that is away too long, the oldest is lost."""
        row = (service.id, event_nid, user_id)
        item_nid = cast(int, self.db.execute(INSERT_ITEM, row).lastrowid)
        service.wake.set()
        if item_nid % PRUNE_EVERY == 0:
            self.db.execute(
                """
                DELETE FROM appservice_queue
                WHERE appservice = :id AND item_nid <= (
                    SELECT item_nid
                    FROM appservice_queue
                    WHERE appservice = :id
                    ORDER BY item_nid DESC
                    LIMIT 1 OFFSET :kept
                )
                """,
                {"id": service.id, "kept": MAX_WAITING_ITEMS},
            )

    def _on_event(self, room: Room, event: Event) -> None:
        for service in self._told():
            target = event.state_key if event.type == MEMBER else None
            is_target = target is not None and service.claims("users", target)
            if self.sees(service, room) or (is_target and self.hs.is_local(str(target))):
                self._put(service, event.nid, None)

    def _on_membership(self, room: Room, user_nid: UserNid, old: str | None, new: str) -> None:
        if (old == "join") == (new == "join"):
            return
        for service in self._told():
            if service.encryption and (user_nid in service.owned or self.sees(service, room)):
                self._put(service, None, self.db.user_id(user_nid))

    def _on_stamp(self, kind: str, target: int) -> None:
        for service in self._told():
            if kind in (TYPING, RECEIPT):
                self._note_in_room(service, kind, RoomNid(target))
            elif kind in (PRESENCE, DEVICE_LIST, TO_DEVICE, KEY_COUNTS):
                self._note_of_user(service, kind, UserNid(target))

    def _note_in_room(self, service: Appservice, kind: str, room_nid: RoomNid) -> None:
        if service.ephemeral and self.sees(service, self.hs.rooms.by_nid(room_nid)):
            if kind == TYPING:
                service.typing.add(room_nid)
            else:
                service.receipts.setdefault(room_nid, self.hs.stream.position - 1)
            service.wake.set()

    def _note_of_user(self, service: Appservice, kind: str, user_nid: UserNid) -> None:
        if not (service.ephemeral if kind == PRESENCE else service.encryption):
            return
        if kind in (PRESENCE, DEVICE_LIST):
            rooms = map(self.hs.rooms.by_nid, self.hs.rooms.joined_rooms(user_nid))
            if user_nid not in service.owned and not any(self.sees(service, r) for r in rooms):
                return
        if kind == DEVICE_LIST:
            self._put(service, None, self.db.user_id(user_nid))
        elif kind == PRESENCE:
            service.presence.add(user_nid)
        elif service.claims("users", self.db.user_id(user_nid), exclusively=True):
            service.keys.add(user_nid)  # trap: the devices of people get theirs by sync
        service.wake.set()

    def waiting(self, service: Appservice) -> int:
        """How many items wait in a service's queue."""
        sql = "SELECT COUNT(*) FROM appservice_queue WHERE appservice = ?"
        return cast(int, self.db.value(sql, (service.id,)))

    # Transactions

    def next_transaction(self, service: Appservice) -> tuple[str, bytes] | None:
        """Id and body of the transaction that is due: the one not acknowledged, or a new one."""
        sql = "SELECT txn_id, body FROM appservice_txns WHERE appservice = ?"
        row = self.db.one(sql, (service.id,))
        if row is not None:
            return cast("tuple[str, bytes]", row)
        items = self.db.all(
            """
            SELECT item_nid, event_nid, user_id
            FROM appservice_queue
            WHERE appservice = ?
            ORDER BY item_nid
            LIMIT ?
            """,
            (service.id, MAX_TXN_ITEMS),
        )
        with self.db.write():
            body = self._body(service, items)
            if len(body) == 1 and not body["events"] and not items:
                return None
            txn = (random_token(20), encode_json(body))
            last = items[-1][0] if items else 0
            delete = "DELETE FROM appservice_queue WHERE appservice = ? AND item_nid <= ?"
            self.db.execute(delete, (service.id, last))
            self.db.execute("INSERT INTO appservice_txns VALUES (?, ?, ?)", (service.id, *txn))
        return txn

    def acknowledged(self, service: Appservice, txn_id: str) -> None:
        """A transaction has arrived: the next may follow."""
        delete = "DELETE FROM appservice_txns WHERE appservice = ? AND txn_id = ?"
        with self.db.write():
            self.db.execute(delete, (service.id, txn_id))

    def _body(self, service: Appservice, items: list[Any]) -> Json:
        nids = [event_nid for _, event_nid, _ in items if event_nid is not None]
        events = self.hs.rooms.events_by_nids(nids)
        body: Json = {"events": [client_event(self.hs.rooms, event) for event in events]}
        if ephemeral := [*self._ephemeral(service)]:
            body["ephemeral"] = ephemeral
        if service.encryption:
            moved = dict.fromkeys(user_id for _, _, user_id in items if user_id is not None)
            body |= self._device_lists(service, moved) | self._key_news(service)
        return body

    def _ephemeral(self, service: Appservice) -> Iterator[Json]:
        """What has changed of who types, what was read, and who is online."""
        typing, service.typing = service.typing, set()
        receipts, service.receipts = service.receipts, {}
        present, service.presence = service.presence, set()
        for room in map(self.hs.rooms.by_nid, typing):
            content: Json = {"user_ids": typing_users(self.hs, room)}
            yield {"type": "m.typing", "room_id": room.room_id, "content": content}
        for room_nid, since in receipts.items():
            room_id = self.hs.rooms.by_nid(room_nid).room_id
            nobody = UserNid(0)
            read = receipts_since(self.hs, room_nid, nobody, since, service.owned)
            if read:
                yield {"type": "m.receipt", "room_id": room_id, "content": read}
        for nid in present:
            shown = self.hs.presence.of(nid)
            yield {"type": "m.presence", "sender": self.db.user_id(nid), "content": shown}

    def _device_lists(self, service: Appservice, moved: Iterable[str]) -> Json:
        """Whose devices changed, and with whom no room is shared any more.  Spec: MSC3202."""
        lists: dict[str, list[str]] = {"changed": [], "left": []}
        for user_id in moved:
            nid = self.db.user_nid(user_id)
            rooms = map(self.hs.rooms.by_nid, self.hs.rooms.joined_rooms(nid))
            near = nid in service.owned or any(self.sees(service, room) for room in rooms)
            lists["changed" if near else "left"].append(user_id)
        return {"org.matrix.msc3202.device_lists": lists} if any(lists.values()) else {}

    def _key_news(self, service: Appservice) -> Json:
        """To-device messages, which are gone from the devices' queues then, and key counts.

        Spec: MSC2409 and MSC3202, under their unstable names.
        """
        messages: list[Json] = []
        counts: Json = {}
        unused: Json = {}
        devices = "SELECT device_nid, device_id FROM devices WHERE user_nid = ?"
        while service.keys and len(messages) < MAX_TXN_ITEMS:
            nid = service.keys.pop()
            user_id = self.db.user_id(nid)
            for device_nid, device_id in self.db.all(devices, (nid,)):
                device = Requester(user_id, nid, device_id, device_nid, None)
                upto = self.hs.stream.position
                found, last = to_device_messages(self.hs, device, 0, upto)
                acknowledge_to_device(self.hs, device, last)
                if last < upto:  # more is waiting
                    service.keys.add(nid)
                to = {"to_user_id": user_id, "to_device_id": device_id}
                messages += [{**message, **to} for message in found]
                counts.setdefault(user_id, {})[device_id] = one_time_key_counts(self.hs, device_nid)
                fallback = unused_fallback_types(self.hs, device_nid)
                unused.setdefault(user_id, {})[device_id] = fallback
        news = {
            "de.sorunome.msc2409.to_device": messages,
            "org.matrix.msc3202.device_one_time_keys_count": counts,
            "org.matrix.msc3202.device_unused_fallback_key_types": unused,
        }
        return {name: value for name, value in news.items() if value}


# ── 52.5  Speaking to them ───────────────────────────────────────────────────

SERVICE_PATH = "/_matrix/app/v1"
OLD_PATHS: Final = {"thirdparty": "/_matrix/app/unstable", "ping": None}  # the others: at the root
UNKNOWN_PATH = frozenset({404, 405, 501})
FIELD_TYPES: Final = {str: {"regexp": str, "placeholder": str}}
PROTOCOL: Final = {
    **{"user_fields": [str], "location_fields": [str], "icon": str, "field_types": FIELD_TYPES},
    "instances": [{"desc": str, "fields": dict, "network_id": str}],
}


class Appservices(AppserviceQueues):
    """Sends the transactions, and asks services for what only they know."""

    def __init__(self, hs: Homeserver) -> None:
        super().__init__(hs)
        hs.accounts.summon = self.summon_user
        hs.directory.summon = self.summon_alias

    def start(self) -> None:
        """Go on with what was waiting."""
        with self.db.write():
            self.load()
            for service in self.services.values():
                self._begin(service)

    def _begin(self, service: Appservice) -> None:
        if service.url is None:
            return
        if service.encryption:  # what was noted in memory before the last stop
            service.keys = {
                nid
                for nid in service.owned
                if service.claims("users", self.db.user_id(nid), exclusively=True)
            }
        service.wake.set()
        self.hs.background(self._deliver(service))

    def register(self, text: str) -> Appservice:
        """Register a service by its YAML. 400 with the reason if that is wrong."""
        service = read_registration(text, self.hs.config.server_name)
        with self.db.write():
            self._add(service)
            self.db.execute("INSERT INTO appservices VALUES (?, ?)", (service.id, text))
        self._begin(service)
        return service

    def unregister(self, service_id: str) -> None:
        """Forget a service, with all that waits for it. 404, or 400 for one from a file."""
        service = self.services.get(service_id)
        if service is None:
            raise not_found(f"There is no application service {service_id}")
        if service.from_file:
            raise invalid_param("It stands in appservice_config_files; take it out there")
        with self.db.write():
            self.db.execute("DELETE FROM appservices WHERE id = ?", (service_id,))
            self.db.execute("DELETE FROM appservice_queue WHERE appservice = ?", (service_id,))
            self.db.execute("DELETE FROM appservice_txns WHERE appservice = ?", (service_id,))
            self.db.execute("DELETE FROM network_rooms WHERE appservice = ?", (service_id,))
        self.drop(service)

    async def call(self, service: Appservice, method: str, path: str, body: bytes = b"") -> Any:
        """The answer of a service; asked again under the path of old if it knows no other.

        Raises MatrixError or OSError when there is none.  Spec: "Legacy routes".
        """
        client: Any = self.hs.http_client
        old = OLD_PATHS.get(path.split("/")[1].partition("?")[0], "")
        headers = {"Authorization": f"Bearer {service.hs_token}"}
        if body:
            headers["Content-Type"] = "application/json"
        for prefix in (SERVICE_PATH, old):
            token = "" if prefix else f"?access_token={quote(service.hs_token, safe='')}"
            answer = await client.request(
                method,
                f"{service.url}{prefix}{path}{token}",
                headers=headers,
                body=body,
                timeout=SERVICE_SECONDS if body else QUESTION_SECONDS,
                max_bytes=MAX_SERVICE_ANSWER,
                trusted=True,  # the admin wrote that address
            )
            if answer.status not in UNKNOWN_PATH or old is None:
                break
        return answer

    async def _deliver(self, service: Appservice) -> None:
        """Send a service its transactions, one after the other, as long as it is registered."""
        while self.services.get(service.id) is service:
            try:
                transaction = self.next_transaction(service)
                await self.db.synced()
                if transaction is None:
                    await service.wake.wait()
                    service.wake.clear()
                elif await self._arrives(service, *transaction):
                    self.acknowledged(service, transaction[0])
            except MatrixError as error:  # a full disk, say
                log_appservice.warning("%s waits: %s", service.id, error)
                await asyncio.sleep(FIRST_RETRY_SECONDS)
            except Exception:  # a fault of ours must not cut a bridge off until the next start
                log_appservice.exception("%s waits", service.id)
                await asyncio.sleep(LAST_RETRY_SECONDS)

    async def _arrives(self, service: Appservice, txn_id: str, body: bytes) -> bool:
        """Whether a service took a transaction; after a failure, only when it is time again."""
        try:
            answer = await self.call(service, "PUT", f"/transactions/{txn_id}", body)
            problem = None if answer.status == 200 else f"status {answer.status}"
        except (MatrixError, OSError) as error:
            problem = str(error)
        if problem is None:
            service.failures = 0
            return True
        delay = min(FIRST_RETRY_SECONDS * 2**service.failures, LAST_RETRY_SECONDS)
        service.failures = min(service.failures + 1, 20)
        log_appservice.warning("%s: %s; trying again in %d s", service.id, problem, delay)
        service.retry.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(service.retry.wait(), delay)
        return False

    # Questions

    async def ask(self, service: Appservice, path: str) -> Any:
        """What a service answers to a question: parsed JSON, or None."""
        try:
            answer = await self.call(service, "GET", path)
            return parse_json(answer.body) if answer.status == 200 else None
        except (MatrixError, OSError) as error:
            log_appservice.info("%s did not answer: %s", service.id, error)
            return None

    async def _summon(self, kind: str, path: str, name: str) -> None:
        for service in list(self._told()):
            if service.claims(kind, name):
                await self.ask(service, f"/{path}/{quote(name, safe='')}")

    async def summon_user(self, user_id: str) -> None:
        """Ask whose namespace it is to make a user that does not exist."""
        if self.hs.is_local(user_id) and not self.hs.accounts.exists_local(user_id):
            await self._summon("users", "users", user_id)

    async def summon_alias(self, alias: str) -> None:
        """Ask whose namespace it is to make an alias that does not exist."""
        if server_of(alias) == self.hs.config.server_name and find_alias(self.hs, alias) is None:
            await self._summon("aliases", "rooms", alias)

    async def protocol(self, name: str) -> Json | None:
        """The description of a third-party protocol, with the networks of all who provide it."""
        found: Json | None = None
        for service in [each for each in self._told() if name in each.protocols]:
            answer = await self.ask(service, f"/thirdparty/protocol/{quote(name, safe='')}")
            try:
                check_shape(answer, PROTOCOL)
            except MatrixError:
                continue
            for instance in answer["instances"]:
                instance["instance_id"] = f"{service.id}|{instance['network_id']}"
            if found is None:
                found = answer
            else:
                found["instances"] += answer["instances"]
        return found

    async def look_up(self, kind: str, path: str, query: str, protocol: str | None) -> list[Json]:
        """Users or locations of other networks that services find; 404 when there are none."""
        name = "userid" if kind == "user" else "alias"
        shape, found = [{name: str, "protocol": str, "fields": dict}], []
        for service in list(self._told()):
            if protocol in service.protocols or (protocol is None and service.protocols):
                answer = await self.ask(service, f"/thirdparty/{path}?{query}")
                with contextlib.suppress(MatrixError):
                    check_shape(answer, shape)
                    found += answer
        if not found:
            raise not_found("No application service knows of any")
        return found


THIRD_PARTY = V3 + "/thirdparty"


def query_string(request: Request) -> str:
    """The query of a request for somebody else, without what is between us and the client."""
    private = ("access_token", "user_id", "device_id")
    return "&".join(
        f"{quote(name, safe='')}={quote(values[0], safe='')}"
        for name, values in request.query.items()
        if name not in private
    )


@route("GET", THIRD_PARTY + "/protocols", auth=USER)
async def get_protocols(hs: Homeserver, _request: Request) -> Json:
    """All third-party protocols, such as IRC.  Spec: CS-API "Third-party networks"."""
    names = {name for service in hs.appservices.services.values() for name in service.protocols}
    found = {name: await hs.appservices.protocol(name) for name in sorted(names)}
    return {name: protocol for name, protocol in found.items() if protocol is not None}


@route("GET", THIRD_PARTY + "/protocol/{name}", auth=USER)
async def get_protocol(hs: Homeserver, _request: Request, name: str) -> Json:
    """One third-party protocol. 404 M_NOT_FOUND when nobody here speaks it."""
    found = await hs.appservices.protocol(name)
    if found is None:
        raise not_found("No application service speaks this protocol")
    return found


@route("GET", THIRD_PARTY + "/{kind}/{name}", auth=USER)
async def search_third_party(hs: Homeserver, request: Request, kind: str, name: str) -> list[Json]:
    """Users or locations of a protocol, found by fields. 404 M_NOT_FOUND when there are none."""
    if kind not in ("user", "location"):
        raise MatrixError(404, "M_UNRECOGNIZED", "Unrecognized request")
    path = f"{kind}/{quote(name, safe='')}"
    return await hs.appservices.look_up(kind, path, query_string(request), name)


@route("GET", THIRD_PARTY + "/{kind}", auth=USER)
async def find_third_party(hs: Homeserver, request: Request, kind: str) -> list[Json]:
    """What a Matrix user or alias is elsewhere. 404 M_NOT_FOUND when nobody knows."""
    if kind not in ("user", "location"):
        raise MatrixError(404, "M_UNRECOGNIZED", "Unrecognized request")
    check_shape(request.query, {"userid" if kind == "user" else "alias": [str]}, "The query")
    return await hs.appservices.look_up(kind, kind, query_string(request), None)


# ── 52.6  What they ask of us ────────────────────────────────────────────────

NETWORK_LIST = V3 + "/directory/list/appservice/{network_id}/{room_id}"
APPSERVICE_PING = "/_matrix/client/v1/appservice/{service_id}/ping"


@route("POST", APPSERVICE_PING, auth=APPSERVICE, limit=None, body={"transaction_id?": str})
async def ping_appservice(hs: Homeserver, request: Request, service_id: str) -> Json:
    """Try whether the service can be reached from here, and how fast it answers.

    400 M_URL_NOT_SET, 502 M_BAD_STATUS or M_CONNECTION_FAILED, 504 M_CONNECTION_TIMEOUT.
    """
    service = hs.appservices.services[str(request.user.appservice)]
    if service.id != service_id:
        raise forbidden("This is not your as_token's service")
    if service.url is None:
        raise MatrixError(400, "M_URL_NOT_SET", "The registration has no url")
    began = time.monotonic()
    try:
        answer = await hs.appservices.call(service, "POST", "/ping", encode_json(request.json))
    except (MatrixError, OSError) as error:
        late = isinstance(error, TimeoutError) or getattr(error, "status", 0) == 504
        status, errcode = (504, "M_CONNECTION_TIMEOUT") if late else (502, "M_CONNECTION_FAILED")
        raise MatrixError(status, errcode, f"The service was not reached: {error}") from error
    if answer.status != 200:
        text = answer.body[:4096].decode("utf-8", "replace")
        bad = MatrixError(502, "M_BAD_STATUS", f"Ping returned status {answer.status}")
        bad.extra = {"status": answer.status, "body": text}
        raise bad
    service.retry.set()
    return {"duration_ms": round((time.monotonic() - began) * 1000)}


@route("PUT", NETWORK_LIST, auth=APPSERVICE, body={"visibility": str})
async def list_in_network(hs: Homeserver, request: Request, network_id: str, room_id: str) -> Json:
    """Put a room into the list of a bridged network, or take it out."""
    visibility = request.json["visibility"]
    if visibility not in ("public", "private"):
        raise invalid_param("visibility is public or private")
    service_id, room = str(request.user.appservice), hs.rooms.get(room_id)
    hs.appservices.list_room(service_id, network_id, room, visibility)
    return {}


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
CREATE TABLE notice_rooms (        -- where each user hears from the server
    user_nid INTEGER PRIMARY KEY,
    room_nid INTEGER NOT NULL
);
""")
invariant(
    "rooms for notices that are not there",
    "SELECT room_nid FROM notice_rooms WHERE room_nid NOT IN (SELECT room_nid FROM rooms)",
)

log_admin = logging.getLogger("conduit.admin")


# ── 23.1  Answers ────────────────────────────────────────────────────────────


class Reply(NamedTuple):
    """An answer in the room, for clients without and with formatting; what is long has pages."""

    text: str
    html: str
    more: tuple[Reply, ...] = ()
    failed: bool = False  # what a shell wants to know


HTML_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})


def reply_text(text: str, *, failed: bool = False) -> Reply:
    """Sentences."""
    return Reply(text, text.translate(HTML_ESCAPES).replace("\n", "<br>"), (), failed)


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

Arguments = dict[str, str]  # by the names in the usage; an option without value has ""
CommandFunction = Callable[["Homeserver", Arguments], Awaitable[Reply]]
COMMANDS: Final[dict[str, tuple[str, CommandFunction]]] = {}  # name → usage, function
CODE_BLOCK = re.compile(r"\s*```[^\n`]*\n(.*?)\n?```\s*", re.DOTALL)


def command(usage: str) -> Callable[[CommandFunction], CommandFunction]:
    """Register a command: how it is written, NAME [WORD] [--option] [--option=VALUE].

    WORDS... takes all that is left of the line, {CODE} a code block in the lines below. The
    docstring of the function is the command's help.
    """

    def register(function: CommandFunction) -> CommandFunction:
        COMMANDS[usage.partition(" ")[0]] = (usage, function)
        return function

    return register


class UsageError(Exception):
    """The command was not written as its usage says; the text tells how it differs."""


def sorted_words(usage: str, words: Sequence[str]) -> tuple[Arguments, list[str]]:
    """The options among the words after a command, and the other words.

    Behind `--` nothing is an option.
    """
    found: Arguments = {}
    given: list[str] = []
    rest = iter(words)
    for word in rest:
        name, has_value, value = word.partition("=")
        if word == "--":
            given += rest
        elif not word.startswith("--"):
            given.append(word)
        elif f"[{name}]" in usage.split() and not has_value:
            found[name] = ""
        elif f"[{name}=" not in usage:
            raise UsageError(f"there is no option {word}")
        elif not (value := value if has_value else next(rest, "")):
            raise UsageError(f"{name} wants a value")
        else:
            found[name] = value
    return found, given


def parse_arguments(usage: str, words: Sequence[str], below: str = "") -> Arguments:
    """Match the words after a command, and the lines below, with its usage."""
    names = [part for part in usage.split()[1:] if not part.startswith(("[--", "{"))]
    found, given = sorted_words(usage, words)
    if names and names[-1].strip("[]").endswith("...") and len(given) >= len(names):
        given = [*given[: len(names) - 1], " ".join(given[len(names) - 1 :])]
    if len(given) > len(names):
        raise UsageError(f"'{given[len(names)]}' is one word too many")
    for name in names[len(given) :]:
        if not name.startswith("["):
            raise UsageError(f"{name} is missing")
    found |= {name.strip("[].{}"): word for name, word in zip(names, given, strict=False)}
    code = re.search(r"\{(\w+)\}", usage)
    if code is not None:
        block = CODE_BLOCK.fullmatch(below)
        if block is None:
            raise UsageError(f"a code block (```) with {code[1]} is missing below the command")
        found[code[1]] = block[1]
    return found


def unknown_command(name: str, addressed: bool) -> Reply | None:
    """What is said about a word that is no command; nothing if this may be mere talk."""
    nearest = nearest_key(name, COMMANDS) if addressed or "-" in name else None
    if nearest is not None:
        return reply_text(f"There is no command {name}. Did you mean {nearest}?", failed=True)
    if addressed:
        text = f"There is no command {name}. Write help for all there are."
        return reply_text(text, failed=True)
    return None


async def run_order(hs: Homeserver, order: str, addressed: bool) -> Reply | None:
    """Do what a line says, with the lines below it, and answer; None for talk among admins."""
    line, _, below = order.partition("\n")
    try:
        words = shlex.split(line)
    except ValueError as error:  # an apostrophe in plain talk is no unclosed quotation
        text = f"This cannot be read: {error}."
        return reply_text(text, failed=True) if addressed else None
    name = words[0] if words else ""
    if name not in COMMANDS:
        return unknown_command(name, addressed)
    usage, function = COMMANDS[name]
    if "--help" in words:
        return reply_text(f"{function.__doc__}\nUsage: {usage}")
    try:
        return await function(hs, parse_arguments(usage, words[1:], below))
    except UsageError as error:
        return reply_text(f"{name}: {error}.\nUsage: {usage}", failed=True)
    except MatrixError as error:
        return reply_text(f"{name}: {error.error}", failed=True)


# What follows "!admin", "@conduit:server.name" and the display name before the command.
ADDRESS_ENDS: Final = {"!": {"", " "}, "@": {"", " ", ":"}, "c": {":"}}


def addressed_line(hs: Homeserver, event: Event) -> tuple[str, bool] | None:
    """The text of a message that may be a command, and whether it is addressed to @conduit.

    None for notices and other kinds, and for whatever relates to another event: an edit, a reply
    with its quotation and a forwarded thread never run.
    """
    body = event.content.get("body")
    is_text = event.content.get("msgtype") == "m.text" and isinstance(body, str)
    if not is_text or "m.relates_to" in event.content:
        return None
    line, newline, below = cast(str, body).strip().partition("\n")
    for prefix in ("!admin", hs.accounts.bot_id, BOT_LOCALPART):
        rest = line[len(prefix) :]
        if line.lower().startswith(prefix.lower()) and rest[:1] in ADDRESS_ENDS[prefix[0]]:
            return (rest.lstrip(": ").strip() or "help") + newline + below, True
    return line.strip() + newline + below, False


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


@command("version")
async def show_version(hs: Homeserver, arguments: Arguments) -> Reply:
    """Show which version of this server runs, of Python and of SQLite."""
    return reply_text(
        f"conduit.py {VERSION}, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
    )


@command("uptime")
async def show_uptime(hs: Homeserver, arguments: Arguments) -> Reply:
    """Show for how long the server has been running."""
    days, seconds = divmod(int(time.monotonic() - hs.started), 86_400)
    hours, seconds = divmod(seconds, 3600)
    return reply_text(f"{days} d {hours} h {seconds // 60} min {seconds % 60} s")


@command("log-level [LEVELS]")
async def set_log_level(hs: Homeserver, arguments: Arguments) -> Reply:
    """Log more or less until the next reload, as the key log says it: warn,http=debug."""
    text = arguments.get("LEVELS", hs.config.log)
    try:
        apply_log_levels(parse_log_levels(text))
    except ValueError as error:
        raise UsageError(f"'{error}' is no level such as info or http=debug") from None
    return reply_text(f"The log is at {text}.")


@command("reload")
async def reload_command(hs: Homeserver, arguments: Arguments) -> Reply:
    """Read the configuration again; a wrong one changes nothing."""
    try:
        config = reload_config(hs.config, os.environ)
        hs.reload(config)
    except (ConfigError, OSError) as error:
        return reply_text(f"Everything stays as it was:\n{error}", failed=True)
    apply_log_levels(parse_log_levels(config.log))
    return reply_text("Done. The log names keys that wait for a restart.")


def send_notice(hs: Homeserver, user_nid: UserNid, text: str) -> None:
    """Tell one user something in a room that they have for that.  Spec: "Server Notices"."""
    bot, user_id = hs.accounts.bot_id, hs.db.user_id(user_nid)
    with hs.db.write():
        room_nid = hs.db.value("SELECT room_nid FROM notice_rooms WHERE user_nid = ?", (user_nid,))
        room = None if room_nid is None else hs.rooms.by_nid(room_nid)
        if room is None or room.membership_of(user_nid) not in ("join", "invite"):
            body = {"preset": "private_chat", "name": f"Notices of {hs.config.server_name}"}
            levels = {"users_default": -10}  # it is for reading
            override = {"power_level_content_override": levels}
            room = create_room(hs, bot, {**body, **override, "invite": [user_id]})
            set_room_account_data(
                hs, user_nid, room.nid, "m.tag", {"tags": {"m.server_notice": {}}}
            )
            row = (user_nid, room.nid)
            hs.db.execute("INSERT OR REPLACE INTO notice_rooms VALUES (?, ?)", row)
        content = {"msgtype": "m.server_notice", "body": text}
        content["server_notice_type"] = "m.server_notice.admin"
        hs.rooms.send(room, bot, "m.room.message", content)


@command("notice-all TEXT...")
async def notice_all(hs: Homeserver, arguments: Arguments) -> Reply:
    """Tell all users of this server something, each in a room of their own."""
    told = 0
    for user_id in hs.accounts.list_local_users():
        nid = hs.db.user_nid(user_id)
        if user_id != hs.accounts.bot_id and not hs.accounts.is_puppet(nid):
            send_notice(hs, nid, arguments["TEXT"])
            told += 1
        await asyncio.sleep(0)
    return reply_text(f"{told} user(s) were told.")


@command("check")
async def check_command(hs: Homeserver, arguments: Arguments) -> Reply:
    """Verify the database and the files of the media; this may take a while."""
    problems = await hs.db.in_thread(check_database, hs.db.folder)
    return reply_text("\n".join(problems) or "The database is sound.", failed=bool(problems))


@command("backup FILE [--keep=COUNT]")
async def backup_command(hs: Homeserver, arguments: Arguments) -> Reply:
    """Write database, media and keys to a file, or to a new one in a folder.

    With --keep only so many archives stay in the folder.
    """
    keep = arguments.get("--keep", "0")
    if not keep.isdecimal():
        raise UsageError("COUNT is a number")
    try:
        target = await hs.db.in_thread(back_up, hs.db.folder, Path(arguments["FILE"]), int(keep))
    except (DatabaseRefused, OSError, sqlite3.Error) as error:
        return reply_text(f"There is no backup: {error}", failed=True)
    return reply_text(f"Everything is in {target}, {mebibytes(target.stat().st_size)}.")


@command("list-rooms")
async def list_rooms(hs: Homeserver, arguments: Arguments) -> Reply:
    """List the rooms with users of this server, large ones first."""
    rooms = []
    for (nid,) in hs.db.all("SELECT DISTINCT room_nid FROM memberships"):
        room = hs.rooms.by_nid(nid)
        if room.local_joined:
            rooms.append((room.joined_count, room.room_id, room.setting("m.room.name", "name", "")))
        await asyncio.sleep(0)
    rooms.sort(reverse=True)
    rows = [(room_id, str(count), name) for count, room_id, name in rooms]
    return reply_table(f"Found {len(rows)} room(s):", ("Room", "Members", "Name"), rows)


@command("room-info ROOM")
async def room_info(hs: Homeserver, arguments: Arguments) -> Reply:
    """Show what is known of a room, by its id or alias."""
    room = room_by_name(hs, arguments["ROOM"])
    sql = """
        SELECT COUNT(*), SUM(LENGTH(pdu))
        FROM events
        WHERE room_nid = ? AND pos IS NOT NULL
    """
    count, size = await hs.db.read_in_thread(lambda db: db.execute(sql, (room.nid,)).fetchone())
    aliases = hs.db.all("SELECT alias FROM aliases WHERE room_nid = ?", (room.nid,))
    rows = [
        ("id", room.room_id),
        ("name", room.setting("m.room.name", "name", "")),
        ("version", room.version.id),
        ("members", f"{room.joined_count}, of them {len(room.local_joined)} of this server"),
        ("join rule", room.join_rule),
        ("history visibility", room.history_visibility),
        ("encrypted", "yes" if room.encrypted else "no"),
        ("aliases", " ".join(alias for (alias,) in aliases)),
        ("events", f"{count}, {mebibytes(size or 0)}"),
        ("pieces of state", str(len(room.state))),
    ]
    return reply_table("The room:", ("What", ""), rows)


@command("room-members ROOM [MEMBERSHIP]")
async def room_members(hs: Homeserver, arguments: Arguments) -> Reply:
    """List who is in a room, or who is invited, banned and so on."""
    room = room_by_name(hs, arguments["ROOM"])
    members = sorted(room.members(arguments.get("MEMBERSHIP", "join")))
    levels = room.power_levels()
    rows = [(user_id, str(levels.user(user_id))) for user_id in members]
    return reply_table(f"Found {len(rows)} member(s):", ("User", "Power"), rows)


@command("room-state ROOM [TYPE] [STATE_KEY]")
async def room_state(hs: Homeserver, arguments: Arguments) -> Reply:
    """Show the content of a piece of state, or list all there are."""
    room = room_by_name(hs, arguments["ROOM"])
    if "TYPE" not in arguments:
        rows = [*sorted(room.state)]
        return reply_table(f"{len(rows)} piece(s) of state:", ("Type", "State key"), rows)
    event = room.state_event(arguments["TYPE"], arguments.get("STATE_KEY", ""))
    if event is None:
        raise not_found("There is no such state")
    return reply_code("json", json.dumps(event.content, indent=2, ensure_ascii=False))


@command("add-alias ALIAS ROOM")
async def add_alias(hs: Homeserver, arguments: Arguments) -> Reply:
    """Let an alias of this server stand for a room."""
    room = room_by_name(hs, arguments["ROOM"])
    set_alias(hs, arguments["ALIAS"], room, hs.accounts.bot_id)
    return reply_text(f"{arguments['ALIAS']} stands for {room.room_id}.")


@command("remove-alias ALIAS")
async def remove_alias_command(hs: Homeserver, arguments: Arguments) -> Reply:
    """Delete an alias of this server."""
    alias = arguments["ALIAS"]
    resolve_alias(hs, alias)
    if alias[1:].partition(":")[0] == ADMINS_ALIAS:
        raise forbidden("This room keeps its name")
    delete_alias(hs, alias)
    return reply_text(f"{alias} is gone.")


@command("publish-room ROOM [--undo]")
async def publish_command(hs: Homeserver, arguments: Arguments) -> Reply:
    """Put a room into the list of rooms, or take it out."""
    room, undo = room_by_name(hs, arguments["ROOM"]), "--undo" in arguments
    publish_room(hs, room, "private" if undo else "public")
    return reply_text(f"{room.room_id} is {'no longer ' if undo else ''}in the list of rooms.")


@command("block-room ROOM [--undo]")
async def block_room_command(hs: Homeserver, arguments: Arguments) -> Reply:
    """Keep the users of this server from entering a room, known here or not; see also close-room.

    Who is in it already stays.
    """
    name = arguments["ROOM"]
    room_id = resolve_alias(hs, name)[0] if name.startswith("#") else name
    if not is_room_id(room_id) or room_id == hs.admin_room.room_id:
        raise invalid_param("That is no room that could be blocked")
    if "--undo" in arguments:
        was_blocked = unblock_room(hs, room_id)
        return reply_text(f"{room_id} is open.", failed=not was_blocked)
    block_room(hs, room_id, hs.accounts.bot_id)
    return reply_text(f"{room_id} is blocked.")


@command("list-blocked-rooms")
async def list_blocked_rooms(hs: Homeserver, arguments: Arguments) -> Reply:
    """List the rooms that nobody of this server may enter."""
    rows = [
        (room_id, time.strftime("%Y-%m-%d", time.gmtime(since / 1000)))
        for room_id, _, since in blocked_rooms(hs)
    ]
    return reply_table(f"Found {len(rows)} blocked room(s):", ("Room", "Since"), rows)


@command("close-room ROOM")
async def close_room(hs: Homeserver, arguments: Arguments) -> Reply:
    """Make all users of this server leave a room, and take away its aliases and its listing."""
    room = room_by_name(hs, arguments["ROOM"])
    if room.room_id == hs.admin_room.room_id:
        raise forbidden("This room is needed")
    publish_room(hs, room, "private")
    for (alias,) in hs.db.all("SELECT alias FROM aliases WHERE room_nid = ?", (room.nid,)):
        delete_alias(hs, alias)
    stayed = []
    for user_id in map(hs.db.user_id, list(room.local_joined)):
        try:
            leave(hs, room, user_id, "The room was closed")
        except MatrixError as error:
            stayed.append((user_id, error.error))
        await asyncio.sleep(0)
    title = f"{room.room_id} is closed; {len(stayed)} user(s) could not leave:"
    return reply_table(title, ("User", "Why not"), stayed)


@command("list-devices USER")
async def list_devices_of(hs: Homeserver, arguments: Arguments) -> Reply:
    """List the devices of an account."""
    user_id, nid = local_account(hs, arguments["USER"])
    rows = []
    for device in hs.accounts.devices(nid):
        seen = time.gmtime(device.get("last_seen_ts", 0) // 1000)
        seen_text = time.strftime("%Y-%m-%d %H:%M", seen)
        texts = device.get("display_name", ""), device.get("last_seen_ip", "")
        rows.append((device["device_id"], *texts, seen_text))
    return reply_table(f"Devices of {user_id}:", ("Device", "Name", "Address", "Seen (UTC)"), rows)


@command("logout-user USER [DEVICE]")
async def log_out_user(hs: Homeserver, arguments: Arguments) -> Reply:
    """End a session of an account, or all of them."""
    user_id, nid = local_account(hs, arguments["USER"])
    names = [device["device_id"] for device in hs.accounts.devices(nid)]
    chosen = [name for name in names if name == arguments.get("DEVICE", name)]
    hs.accounts.delete_devices(nid, chosen)
    return reply_text(f"{len(chosen)} device(s) of {user_id} logged out.", failed=not chosen)


@command("make-admin USER [--undo]")
async def make_admin(hs: Homeserver, arguments: Arguments) -> Reply:
    """Make a user an admin who finds this room, or an admin one no longer."""
    user_id, nid = local_account(hs, arguments["USER"])
    if "--undo" in arguments:
        hs.accounts.set_admin(nid, False)
        return reply_text(f"{user_id} is no admin any more.")
    hs.accounts.set_admin(nid, True)
    hs.admin_room.bring_in(nid)
    return reply_text(f"{user_id} is an admin.")


@command("list-joined-rooms USER")
async def list_joined_rooms_of(hs: Homeserver, arguments: Arguments) -> Reply:
    """List the rooms that a user is in."""
    user_id, nid = local_account(hs, arguments["USER"])
    rooms = [*map(hs.rooms.by_nid, hs.rooms.joined_rooms(nid))]
    rows = [(room.room_id, room.setting("m.room.name", "name", "")) for room in rooms]
    return reply_table(f"{user_id} is in {len(rows)} room(s):", ("Room", "Name"), rows)


@command("deactivate-all {IDS} [--erase]")
async def deactivate_all(hs: Homeserver, arguments: Arguments) -> Reply:
    """Close all accounts that the code block names, one in a line; admins are passed over."""
    done, passed = [], []
    for name in arguments["IDS"].split():
        try:
            user_id, nid = local_account(hs, name)
            if hs.accounts.is_admin(nid):
                raise forbidden("This is an admin")
            await hs.accounts.deactivate(nid, erase="--erase" in arguments)
            done.append(user_id)
        except MatrixError as error:
            passed.append((name, error.error))
    title = f"Deactivated {len(done)} account(s), passed over {len(passed)}:"
    return reply_table(title, ("Account", "Why not"), passed)


@command("media-usage")
async def media_usage(hs: Homeserver, arguments: Arguments) -> Reply:
    """Show how much each user has uploaded."""
    sql = """
        SELECT user_id, COUNT(*), SUM(size) AS total
        FROM media
        JOIN users USING (user_nid)
        GROUP BY user_nid
        ORDER BY total DESC
    """
    found = await hs.db.read_in_thread(lambda db: db.execute(sql).fetchall())
    rows = [(user_id, str(count), mebibytes(total or 0)) for user_id, count, total in found]
    return reply_table("Uploaded media:", ("User", "Files", "Size"), rows)


@command("register-appservice {YAML}")
async def register_appservice(hs: Homeserver, arguments: Arguments) -> Reply:
    """Register an application service, such as a bridge, by the YAML that it has made."""
    service = hs.appservices.register(arguments["YAML"])
    return reply_text(f"Registered application service {service.id}, which is {service.sender}.")


@command("unregister-appservice ID")
async def unregister_appservice(hs: Homeserver, arguments: Arguments) -> Reply:
    """Forget an application service, and all that waits for it."""
    hs.appservices.unregister(arguments["ID"])
    return reply_text(f"Unregistered application service {arguments['ID']}.")


@command("list-appservices")
async def list_appservices(hs: Homeserver, arguments: Arguments) -> Reply:
    """List the application services, and what waits for them."""
    services = hs.appservices.services.values()
    rows = [
        (each.id, each.sender, each.url or "", str(hs.appservices.waiting(each)))
        for each in services
    ]
    heads = ("Id", "User", "Address", "Waiting")
    return reply_table(f"Appservices ({len(rows)}):", heads, rows)


@command("get-pdu EVENT_ID")
async def get_pdu(hs: Homeserver, arguments: Arguments) -> Reply:
    """Show an event as it is stored."""
    event = hs.rooms.event(arguments["EVENT_ID"])
    if event is None:
        raise not_found("There is no such event")
    return reply_code("json", json.dumps(event.pdu, indent=2, ensure_ascii=False))


@command("get-auth-chain EVENT_ID")
async def get_auth_chain(hs: Homeserver, arguments: Arguments) -> Reply:
    """List the events that an event's right to be rests on, directly or not."""
    seen, waiting = dict[str, str](), [arguments["EVENT_ID"]]
    while waiting:
        event_id = waiting.pop()
        event = None if event_id in seen else hs.rooms.event(event_id)
        if event is not None:
            seen[event_id] = event.type
            waiting += event.auth_events
        await asyncio.sleep(0)
    if not seen:
        raise not_found("There is no such event")
    del seen[arguments["EVENT_ID"]]
    return reply_table(f"{len(seen)} event(s):", ("Event", "Type"), [*seen.items()])


def parsed_object(text: str) -> Json:
    """The JSON object in a code block; 400 for anything else."""
    value = parse_json(text.encode())
    if not isinstance(value, dict):
        raise bad_json("This is no JSON object")
    return value


@command("parse-pdu {JSON} [--version=ROOM_VERSION]")
async def parse_pdu(hs: Homeserver, arguments: Arguments) -> Reply:
    """Show the id that an event has, and whether its format and its hash are right."""
    version = ROOM_VERSIONS.get(arguments.get("--version", hs.config.default_room_version))
    if version is None:
        raise UsageError("there is no such room version")
    pdu = parsed_object(arguments["JSON"])
    check_format(version, pdu)
    event = make_event(version, pdu)
    good = "is right" if content_hash_ok(pdu) else "is wrong: the content was changed"
    return reply_text(f"Event {event.event_id}, {event.type} of {event.sender}; the hash {good}.")


@command("sign-json {JSON}")
async def sign_command(hs: Homeserver, arguments: Arguments) -> Reply:
    """Sign a JSON object with the key of this server; nothing that could be an event."""
    value = parsed_object(arguments["JSON"])
    if {"type", "sender"} <= value.keys():
        raise forbidden("This server signs only events that it built")
    signed = sign_json(value, hs.config.server_name, hs.signing_key)
    return reply_code("json", json.dumps(signed, indent=2, ensure_ascii=False))


@command("verify-json {JSON}")
async def verify_command(hs: Homeserver, arguments: Arguments) -> Reply:
    """Try the signature of this server on a JSON object."""
    value, key = parsed_object(arguments["JSON"]), hs.signing_key
    good = verify_json(value, hs.config.server_name, key.key_id, key.public)
    return reply_text("The signature is right." if good else "The signature is wrong or missing.")


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


async def obey(hs: Homeserver, sender: str, order: str, addressed: bool) -> Reply | None:
    """Do what somebody orders who may, and answer; what goes wrong is told as well."""
    name = (order.split() or [""])[0]
    if name in COMMANDS:  # of talk nothing is logged, nor what follows: it may be a password
        log_admin.info("%s: %s", sender, name)
    try:
        return await run_order(hs, order, addressed)
    except Exception:
        log_admin.exception("the command of %s failed", sender)
        return reply_text("That went wrong. The server's log has the reason.", failed=True)


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
            reply = None if said is None else await obey(self.hs, event.sender, *said)
            if reply is not None:
                self._say(reply)


# ── 23.5  From a shell ───────────────────────────────────────────────────────

ADMIN_SOCKET = "admin.sock"  # in the database folder; who can open it could read the database, too
MAX_ORDER_BYTES = 1_048_576


class AdminSocket:
    """Takes orders from `conduit.py --admin`: a Unix socket for the server's own user."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self.path = hs.db.folder / ADMIN_SOCKET
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen; a path that is too long for a socket costs the socket, not the server."""
        self.path.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self.path)
        except OSError as error:
            log_admin.warning("--admin will not work: %s: %s", self.path, error)
        finally:
            os.umask(old)

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one order, do it, and write what a shell shows of the answer."""
        try:
            order = (await reader.read(MAX_ORDER_BYTES)).decode("utf-8", "replace")
            while chunk := await reader.read(MAX_ORDER_BYTES):
                order += chunk.decode("utf-8", "replace")
                if len(order) > MAX_ORDER_BYTES:
                    return
            reply = await obey(self.hs, "the shell", order.strip() or "help", addressed=True)
            pages = [reply, *reply.more] if reply else []
            text = "\n".join(page.text for page in pages)
            await self.hs.db.synced()
            failed = reply is not None and reply.failed
            writer.write(encode_json({"text": text, "failed": failed}))
            await writer.drain()
        except (OSError, MatrixError) as error:
            log_admin.warning("an order from the shell was not answered: %s", error)
        finally:
            writer.close()


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


def way_in(config: Config, has_users: bool) -> tuple[str, str]:
    """How new users get in, and what their third step is; the first one is a case of its own."""
    if not has_users:
        return NOBODY_YET, SIGN_UP
    if not config.allow_registration:
        return CLOSED, SIGN_IN
    if config.registration_token:
        return INVITED, SIGN_UP
    if config.allow_open_registration:
        return OPEN, "Choose a name and a password."
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


def landing_html(config: Config, has_users: bool) -> str:
    """The page for people who come with a browser."""
    registration, third_step = way_in(config, has_users)
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
    body = landing_html(hs.config, hs.accounts.has_users()).encode()
    return Response(200, body, PAGE_HEADERS, "text/html; charset=utf-8")


@route("GET", "/favicon.svg", auth=NONE, limit=None, also=("/favicon.ico",))
async def favicon(hs: Homeserver, request: Request) -> Response:
    """The icon of the page."""
    return Response(200, ICON.encode(), ICON_HEADERS, "image/svg+xml")


# ╔═══════════════════════════════════════════════════════════════════════════╗
# ║  PART VI   RUNNING                                                        ║
# ╚═══════════════════════════════════════════════════════════════════════════╝
#
# Here everything comes together: one object holds the chapters, one place says
# who hears of what, and one loop does the housekeeping. Whoever wants to know
# what an event sets off reads `Homeserver._wire` from top to bottom.


# ═════════════════════════════════════════════════════════════════════════════
#  53. METRICS AND TRACING
#
#  How busy the server is, in the text that Prometheus reads; where the time of a
#  request goes, as spans for Jaeger; and which functions take the processor's
#  time, as stacks for a flame graph. Each costs nothing until it is switched on.
#           spec: Prometheus "Exposition formats", OTLP/HTTP, W3C "Trace Context"
# ═════════════════════════════════════════════════════════════════════════════

LATENCIES: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
COUNTED_METHODS = frozenset((*METHODS, "HEAD", "OPTIONS"))  # else strangers could make up many
MAX_SPANS = 2_000  # that wait for the next shipment; the oldest are lost
SPAN_SECONDS = 5.0
TRACE_PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
SAMPLE_SECONDS = 0.01
FLAME_SECONDS = 30.0
MAX_STACKS = 20_000
FLAME_FILE = "flame.folded"

log_tracing = logging.getLogger("conduit.tracing")

# ── 53.1  Metrics ────────────────────────────────────────────────────────────


class Sample(NamedTuple):
    """One line of the text: a figure with its labels."""

    value: float
    labels: Mapping[str, str] = types.MappingProxyType({})
    suffix: str = ""


LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> str:
    """A metric with its figures, as Prometheus reads it."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for value, labels, suffix in samples:
        inner = ",".join(f'{key}="{text.translate(LABEL_ESCAPES)}"' for key, text in labels.items())
        lines.append(f"{name}{suffix}{f'{{{inner}}}' if inner else ''} {value:.10g}")
    return "\n".join(lines) + "\n"


class RequestCounts:
    """How many requests each route had, how they ended, and how long they took."""

    def __init__(self) -> None:
        self._ended: Counter[tuple[str, str, int]] = Counter()
        self._buckets: dict[tuple[str, str], list[int]] = {}
        self._seconds: dict[tuple[str, str], float] = {}

    def observe(self, request: Request, status: int, seconds: float) -> None:
        """Count one request that was answered."""
        method = request.method if request.method in COUNTED_METHODS else "other"
        key = (method, request.route_path)
        self._ended[(*key, status)] += 1
        buckets = self._buckets.setdefault(key, [0] * (len(LATENCIES) + 1))
        buckets[bisect.bisect_left(LATENCIES, seconds)] += 1
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def ended(self) -> Iterator[Sample]:
        """The requests by route and status."""
        for (method, path, status), count in self._ended.items():
            yield Sample(count, {"method": method, "route": path, "status": str(status)})

    def histogram(self) -> Iterator[Sample]:
        """The latencies by route."""
        for key, buckets in self._buckets.items():
            labels = {"method": key[0], "route": key[1]}
            sums = itertools.accumulate(buckets)
            for bound, count in zip([*map(str, LATENCIES), "+Inf"], sums, strict=True):
                yield Sample(count, {**labels, "le": bound}, "_bucket")
            yield Sample(self._seconds[key], labels, "_sum")
            yield Sample(sum(buckets), labels, "_count")


def cache_metrics(hs: Homeserver) -> Iterator[str]:
    """How full each cache is."""
    caches = [({"cache": name}, cache) for name, cache in caches_of(hs).items()]
    figures: tuple[tuple[str, str, Callable[[LruCache[Any, Any]], float]], ...] = (
        ("entries", "Entries in a cache", len),
        ("weight", "What they weigh, in entries or bytes", lambda cache: cache.weight),
        ("capacity", "What they may weigh", lambda cache: cache.capacity),
    )
    for name, text, value in figures:
        samples = [Sample(value(cache), labels) for labels, cache in caches]
        yield metric(f"conduit_cache_{name}", "gauge", text, samples)


COUNTS: Final = {
    "users": "SELECT COUNT(*) FROM accounts WHERE deactivated = 0 AND is_guest = 0",
    "rooms": "SELECT COUNT(*) FROM rooms",
    "events": "SELECT MAX(nid) FROM events",
}


async def metrics_text(hs: Homeserver) -> str:
    """All figures, counted now."""
    counted = await hs.db.read_in_thread(
        lambda db: {name: db.execute(sql).fetchone()[0] for name, sql in COUNTS.items()}
    )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    database = hs.db.folder / DATABASE_FILE
    waiting = [
        Sample(hs.appservices.waiting(service), {"appservice": service.id})
        for service in hs.appservices.services.values()
    ]
    single: tuple[tuple[str, str, str, float], ...] = (
        ("process_resident_memory_bytes", "gauge", "Resident memory", resident_bytes()),
        ("process_cpu_seconds_total", "counter", "CPU time", usage.ru_utime + usage.ru_stime),
        ("conduit_uptime_seconds", "gauge", "Since the start", time.monotonic() - hs.started),
        ("conduit_connections", "gauge", "Open HTTP connections", hs.http.connection_count),
        ("conduit_loop_late_seconds", "gauge", "How late the loop was just now", hs.late),
        ("conduit_db_commits_total", "counter", "Synced group commits", hs.db.syncs),
        ("conduit_db_sync_seconds_total", "counter", "Time in them", hs.db.sync_seconds),
        ("conduit_db_bytes", "gauge", "Size of the database", size_of(database) or 0),
        (
            *("conduit_db_wal_bytes", "gauge", "Size of its write-ahead log"),
            size_of(database.with_name(f"{DATABASE_FILE}-wal")) or 0,
        ),
        ("conduit_stream_position", "counter", "Position of the stream", hs.stream.position),
        ("conduit_users", "gauge", "Active accounts", counted["users"]),
        ("conduit_rooms", "gauge", "Known rooms", counted["rooms"]),
    )
    texts = [metric(name, kind, text, [Sample(value)]) for name, kind, text, value in single]
    texts += cache_metrics(hs)
    texts.append(metric("conduit_appservice_queue", "gauge", "Items that wait", waiting))
    requests = hs.request_counts
    name, text = "conduit_http_requests_total", "Requests by route and status"
    texts.append(metric(name, "counter", text, requests.ended()))
    name, text = "conduit_http_request_seconds", "From the head to the end of the answer"
    return "".join([*texts, metric(name, "histogram", text, requests.histogram())])


@route("GET", "/_conduit/metrics", auth=OPTIONAL)
async def get_metrics(hs: Homeserver, request: Request) -> Response:
    """Figures for Prometheus, if switched on: for this machine itself, or an admin's token."""
    if not hs.config.metrics:
        raise MatrixError(404, "M_UNRECOGNIZED", "Metrics are not switched on")
    is_admin = request.requester is not None and request.requester.is_admin
    if not request.is_local() and not is_admin:
        raise forbidden("Metrics are for this machine, or take the access token of an admin")
    text = await metrics_text(hs)
    return Response(body=text.encode(), content_type="text/plain; version=0.0.4; charset=utf-8")


# ── 53.2  Spans ──────────────────────────────────────────────────────────────


class Tracer:
    """Keeps a span for each request, and ships them every few seconds."""

    def __init__(self, hs: Homeserver) -> None:
        self.hs = hs
        self._spans: deque[Json] = deque(maxlen=MAX_SPANS)

    def observe(self, request: Request, status: int, seconds: float) -> None:
        """Keep the span of one request; its caller's `traceparent` says what it is a part of."""
        parent = TRACE_PARENT.fullmatch(request.headers.get("traceparent", ""))
        end = time.time_ns()
        attributes = {
            "http.request.method": request.method,
            "http.route": request.route_path,
            "http.response.status_code": str(status),
        }
        self._spans.append(
            {
                "traceId": parent[1] if parent else secrets.token_hex(16),
                "spanId": secrets.token_hex(8),
                **({"parentSpanId": parent[2]} if parent else {}),
                "name": f"{request.method} {request.route_path}",
                "kind": 2,  # a server's
                "startTimeUnixNano": str(end - int(seconds * 1e9)),
                "endTimeUnixNano": str(end),
                "attributes": [
                    {"key": key, "value": {"stringValue": value}}
                    for key, value in attributes.items()
                ],
                "status": {"code": 2 if status >= 500 else 0},
            }
        )

    def _document(self, spans: list[Json]) -> Json:
        service = {"key": "service.name", "value": {"stringValue": self.hs.config.server_name}}
        scope = {"scope": {"name": "conduit.py", "version": VERSION}, "spans": spans}
        of_us = {"resource": {"attributes": [service]}, "scopeSpans": [scope]}
        return {"resourceSpans": [of_us]}

    async def ship(self) -> None:
        """Send the spans to tracing_endpoint, again and again; what is not taken is lost."""
        while True:
            await asyncio.sleep(SPAN_SECONDS)
            client: Any = self.hs.http_client
            spans = [*self._spans]
            self._spans.clear()
            if not spans:
                continue
            try:
                answer = await client.request(
                    "POST",
                    self.hs.config.tracing_endpoint,
                    headers={"Content-Type": "application/json"},
                    body=encode_json(self._document(spans)),
                    timeout=SPAN_SECONDS,
                    trusted=True,
                )
                if answer.status >= 300:
                    log_tracing.warning("the traces were refused: status %d", answer.status)
            except (MatrixError, OSError) as error:
                log_tracing.warning("the traces could not be sent: %s", error)


# ── 53.3  A flame graph ──────────────────────────────────────────────────────


def folded_stack(frame: types.FrameType | None) -> str:
    """A stack from its root, as flame graphs are drawn from: names with semicolons between."""
    names = []
    while frame is not None:
        code = frame.f_code
        names.append(f"{Path(code.co_filename).stem}:{code.co_name}")
        frame = frame.f_back
    return ";".join(reversed(names))


class FlameSampler:
    """Looks a hundred times a second where the loop is, and writes down how often it was where."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._watched = threading.get_ident()
        self._counts: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flame", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Write what was seen, and end."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        next_write = time.monotonic() + FLAME_SECONDS
        while not self._ended.wait(SAMPLE_SECONDS):
            stack = folded_stack(sys._current_frames().get(self._watched))
            is_new = stack not in self._counts
            self._counts["(too many)" if is_new and len(self._counts) >= MAX_STACKS else stack] += 1
            if time.monotonic() >= next_write:
                self._write()
                next_write = time.monotonic() + FLAME_SECONDS
        self._write()

    def _write(self) -> None:
        """The file is what flamegraph.pl, inferno and speedscope read."""
        lines = [f"{stack} {count}\n" for stack, count in self._counts.most_common()]
        try:
            self.path.write_text("".join(lines), "utf-8")
        except OSError as error:
            log_tracing.warning("%s cannot be written: %s", self.path, error)


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
        self.late = 0.0  # seconds by which the loop was late just now
        self.request_counts = RequestCounts()
        self.flame: FlameSampler | None = None
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
        self.media = Media(self)
        self.previews = Previews(self)
        self.appservices = Appservices(self)
        self.admin_room = AdminRoom(self)
        self.admin_socket = AdminSocket(self)
        self.router = Router(self)
        self.router.authenticate = self.appservices.authenticate
        self.router.is_unlimited = self.appservices.is_unlimited
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
        self.accounts.on_device_deleted(functools.partial(device_removed, self))
        self.accounts.on_device_renamed(functools.partial(device_renamed, self))
        self.accounts.on_deactivated(functools.partial(account_deactivated, self))
        self.rooms.subscribe_membership(functools.partial(note_membership, self))
        self.rooms.subscribe_membership(functools.partial(follow_into_replacement, self))
        self.rooms.subscribe(functools.partial(follow_tombstone, self))
        self.rooms.subscribe(functools.partial(guests_may_stay, self))
        self.reports.subscribe(self.admin_room.announce)
        self.delayed_events.send = functools.partial(send_delayed, self)

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
        self.appservices.start()
        await self.db.synced()
        tls = self.config.tls
        context = None if tls is None else tls_context(Path(tls.certs), Path(tls.key))
        await self.http.listen(self.config.address, self.config.port, context)
        await self.admin_socket.start()
        self.background(self._maintain())
        self.background(self._watch_loop())
        self._start_measuring()

    def _start_measuring(self) -> None:
        """Begin with what the configuration wants to be measured."""
        if self.config.metrics:
            self.http.observers.append(self.request_counts.observe)
        if self.config.allow_jaeger:
            tracer = Tracer(self)
            self.http.observers.append(tracer.observe)
            self.background(tracer.ship())
        if self.config.tracing_flame:
            self.flame = FlameSampler(self.db.folder / FLAME_FILE)
            self.flame.start()

    def reload(self, config: Config) -> None:
        """Take over what can change while the server runs."""
        if config.tls is not None:
            self.http.tls = tls_context(Path(config.tls.certs), Path(config.tls.key))
        self.config = config
        self.http.trusted_proxies = config.trusted_proxies
        self.http.max_request_size = config.max_request_size

    async def stop(self) -> None:
        """Answer what is under way, write down what is only in memory, and close the database."""
        await self.admin_socket.stop()
        if self.flame is not None:
            self.flame.stop()
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
            self.late = late = time.monotonic() - before - WATCH_SECONDS
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
    "org.matrix.msc4222": True,
    "org.matrix.msc4306": True,
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
        "--backup",
        type=Path,
        metavar="FILE",
        help="copy all data, even in use, to FILE or into a folder; the database alone to a .db",
    )
    choice.add_argument(
        "--restore", type=Path, metavar="FILE", help="make the data anew from a backup, and exit"
    )
    choice.add_argument(
        "--admin",
        metavar="COMMAND",
        help="have the running server do what admins can order; - reads it from standard input",
    )
    parser.add_argument(
        "--keep", type=int, default=0, metavar="COUNT", help="backups that stay in a folder"
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


def back_up_and_report(config: Config, target: Path, keep: int) -> int:
    """--backup: copy everything, also while the server runs."""
    print(f"copied to {back_up(config.database_path, target, keep)}")
    return 0


def restore_and_report(config: Config, archive: Path) -> int:
    """--restore: make the data folder from a backup."""
    restore_folder(archive, config.database_path, config.server_name)
    print(f"restored to {config.database_path}; its users' devices upload new keys by themselves")
    return 0


def order_running_server(config: Config, order: str) -> int:
    """--admin: let the running server obey, through its socket; the exit code says whether it did.

    Spec: none; one JSON object comes back when the order is complete.
    """
    text = sys.stdin.read() if order == "-" else order
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(config.database_path / ADMIN_SOCKET))
        except OSError:
            complain(f"no server is running on {config.database_path}")
            return 1
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            reply = json.loads(answer.read() or b'{"text": "no answer", "failed": true}')
    print(reply["text"])
    return 1 if reply["failed"] else 0


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
    except (ConfigError, DatabaseRefused, MatrixError) as error:
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
    todo: tuple[tuple[Any, Callable[[], int]], ...] = (
        (options.check, lambda: check_and_report(config)),
        (options.backup, lambda: back_up_and_report(config, options.backup, options.keep)),
        (options.restore, lambda: restore_and_report(config, options.restore)),
        (options.admin is not None, lambda: order_running_server(config, options.admin)),
        (True, lambda: run_server(config)),
    )
    try:
        return next(step for wanted, step in todo if wanted)()
    except (DatabaseRefused, OSError, sqlite3.Error) as error:
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
