#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""nutshim - TLS 1.3 for NUT, Network UPS Tools, in front of upsd and of its clients

                 server shim                            client shim
              (in front of upsd)                   (in front of upsmon & co)
    ,------,   plain   ,--------,   TLS 1.3 after    ,--------,   plain   ,----------------,
    | upsd |-----------| listen |--------------------| listen |-----------| upsmon upsc    |
    '------'  loopback |  401   |  STARTTLS, network |  3493  | loopback  | upsrw upscmd … |
                       '--------'                    '--------'           '----------------'

One process runs any number of shims; a shim's role is data, not another program.

How it works.  A pure protocol core (no socket, clock, log or configuration) cuts the client's bytes
into commands and upsd's into replies, so it knows at any moment how many replies are owed.  The turn
of the shim's own replies, access classes, STARTTLS and the reuse of upstream sessions rest on that
one count.  One selectors loop moves the bytes.

Threads.  Only the main thread, the loop's, touches sessions, the selector, the log and the
configuration.  Handshake threads run single steps of do_handshake() on non-blocking sockets that the
loop has let go of; each look-up has a thread for getaddrinfo().  Results come back through
Workers.done, and a byte on a socket pair, where signals arrive as well, wakes the loop.

Faults.  ConfigError is the administrator's and names FILE:LINE.  ProtocolError and OSError are a
peer's and end its session with one log line.  Anything else is a bug: a traceback in the log, that
session closed, the daemon lives.

Sections: limits - options - errors - configuration - protocol core - certificates and TLS - log -
sockets and threads - sessions - shims and upstream reuse - loop - status - probe - daemon - main
"""
from __future__ import annotations

import argparse
import binascii
import collections
import enum
import errno
import fcntl
import functools
import hashlib
import json
import os
import pwd
import queue
import re
import select
import selectors
import signal
import socket
import ssl
import stat
import sys
import termios
import threading
import time
import types

VERSION = "1.0"

# --- Limits: each bounds what a peer can make this process hold, or wait for ---------------------

CHUNK = 16384             # bytes a read: the payload of one TLS record (RFC 8446 5.1)
MAX_COMMAND = 33 * 1024   # bytes a command: 32 words of 512 characters, each escaped (NUT parseconf.h)
MAX_GREETING = 1024       # bytes a line before TLS
MAX_GREETING_LINES = 8    # lines before TLS that are answered; then it is no TLS client
MAX_REPLY_LINE = 512      # upsd cuts a reply line here, without a newline (NUT_NET_ANSWER_MAX)
SPARE_MEMORY = 512 * 1024 # bytes that must be to be had before sixteen more sessions begin
MAX_LOCAL_REPLIES = 64    # own replies waiting for their turn, before the client is read again
HIGH_WATER = 64 * 1024    # bytes unsent to one side, before its other side has to wait
STALL_LIMIT = 10          # seconds a client may leave that much unread: upsd's writes block, for everybody
DRAIN_LIMIT = 5           # seconds for what is under way when one side has closed
STOP_GRACE = 2            # seconds for replies under way at TERM; procd kills after 5
BACKLOG = 128             # connections waiting in the kernel
ACCEPT_BATCH = 16         # of them taken in one round, before established sessions have their turn
KEPT_MAX = 32             # idle upstream sessions kept for reuse, per shim
RESOLVE_TTL = 60          # seconds a name's addresses are used without asking again
TICKET_TTL = 3600         # seconds a TLS ticket is used: Python 3.10 to 3.12 lose 6 kB each time one is read
RATE_LIMIT = 10           # seconds between two log lines of the same refusal
EXPIRY_WARNING = 30       # days before the end of a certificate
MAX_DEPTH = 30            # DER elements inside each other, as in OpenSSL: no deep recursion
MAX_PEM = 64 << 20        # bytes a PEM file: revocation lists have some MB; a device has no end
BUNDLE = 8                # certificates in trust that are told of one by one; more are a bundle
NO_EXPIRY = 253370764800  # seconds since 1970: the year 9999, no known end (RFC 5280 4.1.2.5)
KEEPALIVE = (30, 10, 3)   # TCP: seconds idle, seconds between probes, probes

# --- Options: the one source for parser, help and documentation ----------------------------------


def _number(low, high):
    def parse(text, _base):
        if not re.match("[0-9]{1,9}$", text) or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(text)
    return parse


def _choice(*words):
    def parse(text, _base):
        if text not in words:
            raise ValueError("expected " + " or ".join(words))
        return text
    return parse


def _path(*words):
    return lambda text, base: text if text in words else os.path.join(base, text)


def _text(text, _base):
    return text


def _list(item):
    return lambda text, base: [item(part.strip(), base) for part in text.split(",")]


def _address(text, _base):
    """HOST[:PORT], [IPv6][:PORT] or a bare IPv6 address -> (host, port or None)."""
    match = re.match(r"(?:\[([\da-fA-F:.]+(?:%[\w.-]+)?)\]|([^\s:\[\]]+))(?::(\d{1,5}))?$", text, re.ASCII)
    if match and int(match.group(3) or 0) <= 65535:
        host, port = match.group(1) or match.group(2), match.group(3)
    elif numeric_family(text) == socket.AF_INET6:
        host, port = text, None
    else:
        raise ValueError(f"expected HOST[:PORT], an IPv6 address in brackets, a port up to 65535, not '{text}'")
    if any(c > "~" for c in host):
        raise ValueError(f"expected ASCII, an international name in its xn-- form, not '{text}'")
    return host[:-1] if host.endswith(".") else host, int(port) if port else None


def _server_name(text, _base):
    """A host name or address, as certificates have it: without the root's dot at its end."""
    name = text[:-1] if text.endswith(".") else text
    host = re.match(r"(?!-)[\w-]{1,63}(?:\.[\w-]{1,63})*\Z", name, re.ASCII)
    if not host and (not numeric_family(name) or "%" in name):
        raise ValueError("expected one host name or address, in ASCII (an international name in "
                         f"its xn-- form), without port or brackets, not '{text}'")
    return name


def _pin(text, _base):
    try:
        if text.startswith("sha256//") and len(binascii.a2b_base64(text[8:])) == 32:
            return text
    except binascii.Error:
        pass
    raise ValueError(f"expected sha256//BASE64 as 'nutshim.py -t' prints it, not '{text}'")


def _network(text, _base):
    import ipaddress                                    # Rarely needed: not imported at every start.
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"expected ADDRESS or ADDRESS/BITS: {error}") from None


def _permit(text, base):
    identity, _, access = (part.strip() for part in text.rpartition(":"))
    if access not in CLASSES:
        raise ValueError(f"expected IDENTITY: {' or '.join(CLASSES)}, not '{text}'")
    if identity.startswith("sha256//"):
        return _pin(identity, base), access
    if identity != "*" and not re.match(r"(CN=|DNS:|IP:|URI:|email:)\S", identity):
        raise ValueError(f"expected CN=, DNS:, IP:, URI:, email:, sha256// or *, not '{identity}'")
    if identity.startswith("IP:") and not numeric_family(identity[3:]):
        raise ValueError(f"expected an address behind IP:, not '{identity}'")
    return normal_name(identity), access


GLOBAL, SHIM, SERVER, CLIENT = "global", "shim", "server", "client"

Option = collections.namedtuple("Option", "name where default parse help")
OPTIONS = [Option(*row) for row in (
    ("user", GLOBAL, None, _text, "who to become once the ports are open; default nut, if started as root"),
    ("chroot", GLOBAL, None, _path(), "directory to confine to, before user is dropped"),
    ("pidfile", GLOBAL, "/run/nutshim.pid", _path(), "also the place of the status socket (/var/run without /run)"),
    ("log", GLOBAL, "syslog", _path("syslog", "stderr"), "syslog, stderr or a file"),
    ("handshake_threads", GLOBAL, "2", _number(1, 64), "threads that do TLS handshakes"),
    ("max_sessions", GLOBAL, "512", _number(1, 1000000), "sessions over all shims"),
    ("role", SHIM, None, _choice(SERVER, CLIENT), "server (in front of upsd) or client (of upsmon, upsc, ...)"),
    ("listen", SHIM, {SERVER: "*:401", CLIENT: "localhost:3493"}, _list(_address), "ADDRESS[:PORT] list, * is every address"),
    ("upstream", SHIM, {SERVER: "localhost:3493", CLIENT: None}, _list(_address), "HOST[:PORT] list, tried in order; client: port 401"),
    ("certificate", SHIM, None, _path(), "PEM: own certificate, chain, and key; server: required"),
    ("key", SHIM, None, _path(), "PEM private key, if not in certificate"),
    ("trust", SHIM, None, _path("system"), "PEM file or directory of trusted certificates, or system"),
    ("verify", CLIENT, "full", _choice("full", "chain", "pin", "none"), "full (chain and name), chain, pin, none"),
    ("server_name", CLIENT, None, _server_name, "what the certificate must carry; default: upstream's host"),
    ("pin", SHIM, None, _list(_pin), "sha256//BASE64 list of the peer's public key"),
    ("crl", SHIM, None, _list(_path()), "PEM revocation list(s)"),
    ("client_certificate", SERVER, "none", _choice("none", "request", "require"), "none, request, require"),
    ("permit", SERVER, None, _list(_permit), "IDENTITY: CLASS list; read, monitor, primary, admin"),
    ("allow_from", SHIM, None, _list(_network), "addresses or networks that may connect"),
    ("plaintext", SERVER, "refuse", _choice("refuse", "localhost"), "refuse, or localhost: loopback peers need no TLS"),
    ("min_tls", SHIM, "1.3", _choice("1.3", "1.2"), "1.3 or 1.2"),
    ("max_sessions_per_address", SHIM, "64", _number(1, 1000000), "sessions from one address"),
    ("handshake_timeout", SHIM, {SERVER: "10", CLIENT: "4"}, _number(1, 3600), "seconds from accept to the end of the handshake"),
    ("idle_timeout", SHIM, "120", _number(1, 1000000), "seconds without a byte"),
    ("reuse", CLIENT, "30", _number(0, 3600), "seconds an idle upstream session is kept; 0 = off"),
)]
DEFAULT_PORT = {("listen", SERVER): 401, ("listen", CLIENT): 3493, ("upstream", SERVER): 3493, ("upstream", CLIENT): 401}

# --- Errors --------------------------------------------------------------------------------------


class ConfigError(Exception):
    """The administrator's fault, in lines that say where, what is wrong and what was expected."""


class ProtocolError(Exception):
    """The peer's fault: ends its session with one log line."""

    def __init__(self, reason, detail=""):
        super().__init__(detail)
        self.reason = reason


class Reason(enum.Enum):
    """Why a session ended, or never began."""
    LOGOUT = "logout"
    CLIENT = "closed by the client"
    UPSD = "closed by upstream"
    STOP = "nutshim stops"
    IDLE = "idle too long"
    STALL = "the client does not read its replies"
    TIMEOUT = "handshake timeout"
    NO_STARTTLS = "no STARTTLS"
    INJECTION = "bytes behind STARTTLS: command injection"
    TLS_FIRST = "TLS hello without STARTTLS"
    BAD_LINE = "bad line"
    TLS = "TLS handshake failed"
    PIN = "no pin matches the peer's key"
    PERMIT = "no permit line matches the peer"
    UPSTREAM = "no upstream"
    ALLOW_FROM = "address not in allow_from"
    MAX_SESSIONS = "max_sessions reached"
    PER_ADDRESS = "max_sessions_per_address reached"
    RESOURCES = "out of descriptors or memory"
    BUG = "internal error"


ORDINARY = {Reason.LOGOUT, Reason.CLIENT, Reason.UPSD, Reason.STOP, Reason.IDLE}

# --- Configuration: nutshim.conf -----------------------------------------------------------------


class Conf(types.SimpleNamespace):
    """One section's options as attributes, with name, role, path, and the lines that set them."""

    def at(self, option):
        """FILE:LINE of an option, as messages begin."""
        section = f"[{self.name}] " if self.name else ""
        return f"{self.path}:{self.lines.get(option, self.line)}: {section}{option}: "

    def error(self, option, what, error):
        """The ConfigError for an option's file, address or user and its OSError."""
        return ConfigError(f"{self.at(option)}{what}: {error.strerror}")


def find_config() -> str:
    """The file that is read without -f."""
    places = (os.environ.get("NUT_CONFPATH"), "/etc/nut", "/etc/ups", "/usr/local/etc/nut",
              os.path.dirname(os.path.abspath(__file__)))
    paths = [os.path.join(place, "nutshim.conf") for place in places if place]
    for path in paths:
        if os.path.exists(path):
            return path
    raise ConfigError(f"no configuration file: looked for {', '.join(paths)}; name it with -f FILE")


def read_config(path):
    """nutshim.conf -> (global Conf with .shims, faults as lines); a faulty option has its default."""
    path = os.path.abspath(path)
    try:
        with open(path, "rb") as file:
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    faults = []
    sections = [(None, 1, {})]                  # (name, line, {option: (line, text)})
    for number, line in enumerate(lines, 1):
        line = re.sub(r"(^|\s)[#;].*", "", line).strip()
        header = re.match(r"\[\s*([\w.-]+)\s*\]$", line)
        name, _, text = (part.strip() for part in line.partition("="))
        given = sections[-1][2]
        fault = None
        if not line.replace("\t", " ").isprintable():
            fault = "a control character: expected text"
        elif header:
            name = header.group(1)
            if any(name == section[0] for section in sections):
                fault = f"a second section [{name}]: expected a name of its own for each shim"
            sections.append((name, number, {}))
        elif line and not (name and text):
            fault = f"expected 'name = value' or '[section]', not '{line}'"
        elif name in given:
            fault = f"{name}: stands already in line {given[name][0]}"
        elif line:
            given[name] = (number, text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text)
        if fault:
            faults.append(f"{path}:{number}: {fault}")
    conf = _read_section(path, sections[0], GLOBAL, faults)
    conf.shims = []
    if "pidfile" not in conf.lines and not os.path.isdir("/run"):
        conf.pidfile = "/var/run/nutshim.pid"
    for name, line, given in sections[1:]:
        number, role = given.get("role", (line, ""))
        if role in (SERVER, CLIENT):
            conf.shims.append(_read_section(path, (name, line, given), role, faults))
        else:
            faults.append(f"{path}:{number}: [{name}] role: expected role = server or role = client")
    if not sections[1:]:
        faults.append(f"{path}:1: expected a [section] for each shim, found none")
    return conf, faults


def _read_section(path, section, role, faults):
    """One section's options, checked each by itself and against each other."""
    name, line, given = section
    wanted = (GLOBAL,) if role == GLOBAL else (SHIM, role)
    conf = Conf(name=name, role=role, path=path, line=line, lines={option: at for option, (at, _) in given.items()})
    places = {option.name: option.where for option in OPTIONS}
    expected = {None: "no such option; 'nutshim.py -h' lists them", SHIM: "expected in a [section]",
                GLOBAL: "expected a global option above the first [section]"}
    for option in given:
        where = places.get(option)
        if where not in wanted:
            faults.append(conf.at(option) + expected.get(where, f"expected in a shim with role = {where}"))
    for option in OPTIONS:
        if option.where not in wanted:
            continue
        default = option.default.get(role) if isinstance(option.default, dict) else option.default
        for text in (given.get(option.name, (0, default))[1], default):
            try:
                value = None if text is None else option.parse(text, os.path.dirname(path))
                break
            except ValueError as error:
                faults.append(conf.at(option.name) + str(error))
        port = DEFAULT_PORT.get((option.name, role))
        if port and value:
            value = [(host, port if given_port is None else given_port) for host, given_port in value]
        setattr(conf, option.name, value)
    if role == GLOBAL:
        return conf
    server = role == SERVER
    how = conf.client_certificate if server else conf.verify
    mode = f"{'client_certificate' if server else 'verify'} = {how}"
    checks = how not in ("none", "pin")
    rules = [
        ("certificate", server and not conf.certificate, "expected one: mkNUTcert.py makes it"),
        ("upstream", not conf.upstream, "expected the host of the server shim"),
        ("upstream", any(host == "*" for host, _ in conf.upstream or ()), "expected HOST[:PORT], not *"),
        ("trust", checks and not conf.trust, "expected with " + mode),
        ("pin", how == "pin" and not conf.pin, "expected with " + mode),
        ("key", conf.key and not conf.certificate, "has no effect without certificate"),
        ("permit", server and not checks and any(identity != "*" for identity, _ in conf.permit or ()),
         "names need client_certificate = request or require")]
    rules += [(option, not checks and getattr(conf, option), "has no effect with " + mode)
              for option in ["trust", "crl"] + ["pin"] * server]
    faults += [conf.at(option) + text for option, bad, text in rules
               if bad and (getattr(conf, option) is not None or option not in given)]      # A bad value has its fault.
    return conf


def check_config(path, user=None, chroot=None):
    """-> (configuration, {name: Credentials}, warnings); ConfigError with every fault there is."""
    conf, faults = read_config(path)
    conf.user, conf.chroot = user or conf.user, chroot or conf.chroot
    warnings, credentials = [], {}
    for shim in conf.shims:
        credentials[shim.name] = Credentials(shim, faults, warnings)
        for option, value, text in (("verify", "none", "the server is not verified, anybody can pretend to be it"),
                                    ("min_tls", "1.2", "TLS 1.2 is allowed"),
                                    ("plaintext", "localhost", "loopback peers may go on without TLS")):
            if getattr(shim, option, None) == value:
                warnings.append(shim.at(option) + text)
    try:
        if conf.user:
            pwd.getpwnam(conf.user)
    except KeyError:
        faults.append(conf.at("user") + f"there is no user '{conf.user}' here")
    if conf.chroot and not os.path.isdir(conf.chroot):
        faults.append(conf.at("chroot") + f"{conf.chroot} is no directory")
    if faults:
        raise ConfigError("\n".join(faults))
    return conf, credentials, warnings


# --- Protocol core: bytes in, bytes and facts out ------------------------------------------------

STATELESS = frozenset((b"GET", b"LIST", b"VER", b"NETVER", b"PROTVER", b"HELP"))
# What may be sent again when a kept session turns out dead: it does nothing outside that session.
REPEATABLE = STATELESS | {b"USERNAME", b"PASSWORD"}
NOTED = frozenset((b"USERNAME", b"LOGIN", b"ATTACH"))
_READ = STATELESS | {b"LOGOUT", b"DETACH"}
_MONITOR = _READ | {b"USERNAME", b"PASSWORD", b"LOGIN", b"ATTACH"}
CLASSES = {"read": _READ, "monitor": _MONITOR, "primary": _MONITOR | {b"PRIMARY", b"MASTER", b"FSD"}, "admin": None}

OK_STARTTLS = b"OK STARTTLS\n"
OK_GOODBYE = b"OK Goodbye\n"
TLS_NOT_ENABLED = b"ERR TLS-NOT-ENABLED\n"
ALREADY_TLS = b"ERR ALREADY-SSL-MODE\n"
NO_TLS_HERE = b"ERR FEATURE-NOT-CONFIGURED\n"
ACCESS_DENIED = b"ERR ACCESS-DENIED\n"

# One stateless command without quotes and the like: what nearly all traffic is. Clients repeat themselves.
_one_command = functools.lru_cache(256)(
    re.compile(rb'(?:GET|LIST|VER|NETVER|PROTVER|HELP)(?:[ \t][\t !$-<>-\[\]-\x7f]{0,99})?\r?\n', re.I).fullmatch)
_odd = re.compile(rb'["#=\\\x00-\x08\x0e-\x1f\x80-\xff]').search
_START, _WORD, _WORD_ESCAPE, _QUOTE, _QUOTE_ESCAPE, _COMMENT = range(6)


class Commands:
    """Cuts a client's bytes into commands exactly as upsd does (NUT common/parseconf.c).

    feed() returns (raw, words, odd) of each whole command.  odd marks what versions of upsd read in
    different ways: # or a newline in quotes, an escaped newline.
    """
    __slots__ = ("limit", "pending", "_slow", "_state", "_word", "_words", "_was_odd")

    def __init__(self, limit: int = MAX_COMMAND):
        self.limit = limit
        self.pending = b""         # The bytes of a command that is not whole yet.
        self._slow = False
        self._begin()

    def _begin(self):
        self._state, self._word, self._words, self._was_odd = _START, b"", [], False

    def _check(self, raw):
        if len(raw) > self.limit:
            raise ProtocolError(Reason.BAD_LINE, f"a command of more than {self.limit} bytes")
        return raw

    def feed(self, data: bytes) -> list:
        if not self._slow:
            data, self.pending = self.pending + data, b""
            if not _odd(data):
                lines = data.split(b"\n")
                self.pending = self._check(lines.pop())
                return [(self._check(line + b"\n"), line.split(), False) for line in lines]
        commands = []
        raw, word, state = bytearray(self.pending), bytearray(self._word), self._state
        for byte in data:
            raw.append(byte)
            kept = 0x20 <= byte <= 0x7f
            if state in (_WORD_ESCAPE, _QUOTE_ESCAPE):
                state -= 1
                self._was_odd |= byte == 10
            elif state == _QUOTE:
                self._was_odd |= byte in b"#\n"
                if byte in b'"\\':
                    kept, state = False, _START if byte == 0x22 else _QUOTE_ESCAPE
                    if byte == 0x22:
                        self._words.append(bytes(word))
                        word.clear()
            elif state == _COMMENT and byte != 10:
                continue
            elif byte in b"\n \t\v\f\r#=":
                if state == _WORD:
                    self._words.append(bytes(word))
                    word.clear()
                kept, state = False, _COMMENT if byte == 0x23 else _START
                if byte == 0x3d:
                    self._words.append(b"=")
                elif byte == 10:
                    commands.append((bytes(self._check(raw)), self._words, self._was_odd))
                    raw.clear()
                    self._begin()
            elif byte == 0x5c:
                kept, state = False, _WORD_ESCAPE
            elif byte == 0x22 and state == _START:
                kept, state = False, _QUOTE
            else:
                state = _WORD
            if kept:
                word.append(byte)
        self.pending, self._word, self._state = bytes(self._check(raw)), bytes(word), state
        self._slow = bool(raw)
        return commands


class Replies:
    """Frames upsd's replies: one line, or BEGIN LIST ... END LIST (NUT docs/net-protocol.txt).

    A line ends at its newline or, cut by upsd without one, at byte 512.
    """
    __slots__ = ("_head", "_length", "_list", "whole", "cut")

    def __init__(self):
        self._head = b""        # The start of an unfinished line, enough to tell what it is.
        self._length = 0        # Its bytes so far.
        self._list = False
        self.whole = True       # No reply is under way.
        self.cut = False        # A line was cut: with another upsd the framing may be wrong.

    def feed(self, data: bytes) -> list:
        """Where in data each reply ends."""
        ends, start, size = [], 0, len(data)
        while start < size:
            most = start + MAX_REPLY_LINE - self._length
            end = data.find(b"\n", start, most) + 1
            head = (self._head + data[start:start + 10])[:10] if self._length else data[start:start + 10]
            if not end and most > size:
                self._head, self._length = head, self._length + size - start
                break
            if not end:
                end, self.cut = most, True
            if head[:10] == b"BEGIN LIST" and not self._list:
                self._list = True
            elif not self._list or head[:8] == b"END LIST":
                self._list = False
                ends.append(end)
            self._length, start = 0, end
        self.whole = not (self._length or self._list)
        return ends


class Conversation:
    """One NUT client's commands and upsd's replies, with the shim's own replies in their turn.

    starttls: the reply to STARTTLS; allowed: the verbs of the access class, None for all; reuse:
    LOGOUT of a stateless session is answered here, and upstream stays usable; trace: note every
    command in seen.
    """
    __slots__ = ("_starttls", "_allowed", "_reuse", "_trace", "_commands", "_replies", "local", "counted", "sent", "got", "seen", "stateless", "repeatable", "leaving", "refused")

    def __init__(self, starttls: bytes, allowed=None, reuse: bool = False, trace: bool = False):
        self._starttls, self._allowed, self._reuse, self._trace = starttls, allowed, reuse, trace
        self._commands, self._replies = Commands(), Replies()
        self.counted = True    # False once the number of upsd's replies cannot be known.
        self.local = ()         # A deque of (commands sent before it, reply), once one has to wait.
        self.sent = 0           # Commands passed to upsd.
        self.got = 0            # Replies that have ended.
        self.seen: list = []    # (verb, words) for the log; whoever logs them empties it.
        self.stateless = True   # Nothing but STATELESS was sent.
        self.repeatable = True  # Nothing but REPEATABLE was sent.
        self.leaving = False    # LOGOUT was answered here, or will be in its turn.
        self.refused = 0        # Commands answered with ACCESS-DENIED.

    @property
    def owed(self) -> int:
        """Replies that upsd still has to give."""
        return self.sent - self.got if self.counted else 0

    @property
    def busy(self) -> bool:
        """Replies may still come."""
        return self.sent > self.got or not self.counted

    @property
    def clean(self) -> bool:
        """Upstream is as good as new: only stateless commands, every reply in and whole."""
        replies = self._replies
        return self.stateless and self.sent == self.got and replies.whole and not replies.cut and not self.local

    @property
    def done(self) -> bool:
        """The client said LOGOUT and has its answer."""
        return self.leaving and not self.local

    @property
    def crowded(self) -> bool:
        return len(self.local) > MAX_LOCAL_REPLIES

    def from_client(self, data: bytes) -> tuple:
        """Bytes from the client -> (bytes for upsd, bytes for the client now)."""
        if self.leaving:
            return b"", b""
        if len(data) < 128 and _one_command(data) and not self._commands.pending and not self._trace:
            self.sent += 1
            return data, b""
        up: list = []
        back: list = []
        commands = self._commands.feed(data)
        for raw, words, odd in commands:
            verb = words[0].upper() if words else b""
            if self._trace or verb in NOTED:
                self.seen.append((verb, words))
            if verb == b"STARTTLS":
                self._answer(self._starttls, back)
            elif (verb == b"LOGOUT" and len(words) == 1 and self._reuse and self.stateless
                  and raw is commands[-1][0] and not self._commands.pending):
                # With more behind it, upsd 2.8 goes on after LOGOUT: then upsd has to see it itself.
                self._answer(OK_GOODBYE, back)
                self.leaving = True
            elif self._allowed is not None and (odd or verb not in self._allowed):
                self._answer(ACCESS_DENIED, back)
                self.refused += 1
            else:
                self.stateless = self.stateless and verb in STATELESS and not odd
                self.repeatable = self.repeatable and verb in REPEATABLE and not odd
                self.counted = self.counted and not odd
                self.sent += 1
                up.append(raw)
        return b"".join(up), b"".join(back)

    def _answer(self, reply, back):
        if self.owed > 0:
            if not self.local:
                self.local = collections.deque()
            self.local.append((self.sent, reply))
        else:
            back.append(reply)

    def from_upstream(self, data: bytes) -> bytes:
        """Bytes from upsd -> bytes for the client."""
        replies = self._replies
        if not self.local:
            if data.find(b"\n", 0, MAX_REPLY_LINE) == len(data) - 1 and replies.whole and data[:10] != b"BEGIN LIST":
                self.got += 1
            else:
                self.got += len(replies.feed(data))
            return data
        parts, start = [], 0
        for end in replies.feed(data):
            self.got += 1
            while self.local and self.local[0][0] <= self.got:
                parts += (data[start:end], self.local.popleft()[1])
                start = end
        parts.append(data[start:])
        return b"".join(parts)


class Greeting:
    """The server shim's side before TLS: lines until STARTTLS (RFC 9271 4.2.12)."""
    __slots__ = ("_commands", "_first", "refused")

    def __init__(self):
        self._commands = Commands(MAX_GREETING)
        self._first = True
        self.refused = 0        # Lines that were not STARTTLS.

    def feed(self, data: bytes, plaintext: bool = False) -> tuple:
        """-> (reply, 'tls' | 'plain' | 'goodbye' | 'refused' | None, the plain client's bytes)."""
        if self._first and data[:1] == b"\x16":
            raise ProtocolError(Reason.TLS_FIRST)
        self._first = False
        if b"\0" in data:
            raise ProtocolError(Reason.BAD_LINE, "a NUL byte")
        data_all = self._commands.pending + data
        reply, consumed = b"", 0
        for raw, words, _odd in self._commands.feed(data):
            consumed += len(raw)
            verb = words[0].upper() if words else b""
            if verb == b"STARTTLS":
                if consumed < len(data_all):
                    raise ProtocolError(Reason.INJECTION)
                return reply + OK_STARTTLS, "tls", b""
            if plaintext:
                return reply, "plain", data_all
            if verb in (b"LOGOUT", b"DETACH"):
                return reply + OK_GOODBYE, "goodbye", b""
            reply += TLS_NOT_ENABLED
            self.refused += 1
            if self.refused >= MAX_GREETING_LINES:
                return reply, "refused", b""
        return reply, None, b""


def starttls_reply(data: bytes) -> bool:
    """upstream's answer to STARTTLS: True when it is OK, False when it is not whole yet."""
    line, newline, behind = data.partition(b"\n")
    if behind:
        raise ProtocolError(Reason.UPSTREAM, "bytes behind OK STARTTLS: response injection")
    if not newline and len(line) < MAX_REPLY_LINE:
        return False
    if not newline or line.split() not in ([b"OK", b"STARTTLS"], [b"OK"]):     # The TLS-Shims answer a bare OK.
        raise ProtocolError(Reason.UPSTREAM, f"no TLS there: STARTTLS was answered with '{printable(line[:80])}'")
    return True


def printable(data) -> str:
    """A peer's bytes or text, made safe for a log line: no control, no bidi mark, no newline."""
    text = data.decode("latin-1") if isinstance(data, bytes) else data
    return "".join(c if " " <= c <= "~" or c > "\xa0" and c.isprintable() else
                   f"\\x{ord(c):02x}" if c <= "\xff" else ascii(c)[1:-1] for c in text)


# --- Certificates and TLS ------------------------------------------------------------------------

Certificate = collections.namedtuple(
    "Certificate", "names pin not_before not_after subject issuer fields is_ca spki extensions")
Certificate.__doc__ = """What is read of a certificate (RFC 5280 4.1). Its texts are printable().

names are as permit has them (CN=, DNS:, IP:, URI:, email:); pin is that of spki, the public key's
DER; not_before and not_after are seconds since 1970; subject and issuer have one line each, fields
are the subject's as [(CN and the like, text)]; extensions are {OID's content: value}."""

RevocationList = collections.namedtuple("RevocationList", "issuer this_update next_update")
RevocationList.__doc__ = "A CRL (RFC 5280 5.1); next_update is NO_EXPIRY where there is none."

Peer = collections.namedtuple("Peer", "version cipher names pin not_after")
Peer.__doc__ = "What the checks, the log and the status know of the other end of a TLS session."

Loaded = collections.namedtuple("Loaded", "what not_before not_after")
Loaded.__doc__ = "A certificate or revocation list in use: what it is, its file, its dates."

Element = collections.namedtuple("Element", "tag content whole")
Element.__doc__ = "A DER element (X.690 8.1)."

_BOOLEAN, _INTEGER, _BITS, _OCTETS, _NULL, _OID = 0x01, 0x02, 0x03, 0x04, 0x05, 0x06
_ENUMERATED, _SEQUENCE, _SET, _TIMES = 0x0a, 0x30, 0x31, (0x17, 0x18)  # UTCTime, GeneralizedTime
_SAN, _BASIC_CONSTRAINTS = b"\x55\x1d\x11", b"\x55\x1d\x13"
_FIELDS = {b"\x55\x04" + bytes([number]): name for number, name in (
    (3, "CN"), (4, "SN"), (5, "serialNumber"), (6, "C"), (7, "L"), (8, "ST"), (9, "street"),
    (10, "O"), (11, "OU"), (12, "title"), (42, "GN"))}
_FIELDS[bytes.fromhex("2a864886f70d010901")] = "emailAddress"
_FIELDS[bytes.fromhex("0992268993f22c640119")] = "DC"
# The types of text: UTF8String, and those that OpenSSL takes for Latin-1.
_TEXTS = {0x0c: "utf-8", 0x12: "latin-1", 0x13: "latin-1", 0x14: "latin-1", 0x16: "latin-1"}
_WIDE_TEXTS = {0x1c: 4, 0x1e: 2}            # UniversalString, BMPString: bytes a character
_TEXT_NAMES = {0x81: "email:", 0x82: "DNS:", 0x86: "URI:"}


def der_items(data: bytes) -> list:
    """The DER Elements that data is made of (X.690 8.1, 10.1).

    ValueError for lengths that are indefinite or longer than need be, and for tags of several
    bytes: what two readers could read in two ways is not read at all.
    """
    items, at, end = [], 0, len(data)
    while at < end:
        if end - at < 2:
            raise ValueError("it is cut short")
        tag, size, start = data[at], data[at + 1], at + 2
        if tag & 0x1f == 0x1f:
            raise ValueError("a tag of more than one byte")
        if size == 0x80:
            raise ValueError("an indefinite length")
        if size > 0x80:
            start += size & 0x7f
            octets = data[at + 2:start]
            size = int.from_bytes(octets, "big")
            if size < 0x80 or octets[0] == 0:
                raise ValueError("a length that is not the shortest")
        if end - start < size:
            raise ValueError("it is cut short")
        items.append(Element(tag, data[start:start + size], data[at:start + size]))
        at = start + size
    return items


def _check_der(items, depth=0):
    """Each element, and each inside it, is in the one form of DER (X.690 8, 10.2, 11.1, 11.2)."""
    if depth > MAX_DEPTH:
        raise ValueError("elements too deep inside each other")
    for tag, content, _ in items:
        first, more = content[:1], content[1:]
        constructed = tag & 0x20 > 0
        if tag < 0x40 and (tag == 0 or constructed != (tag in (_SEQUENCE, _SET))):
            raise ValueError(f"an element with the tag {tag:#04x}")
        if constructed:
            _check_der(der_items(content), depth + 1)
        elif tag in (_INTEGER, _ENUMERATED):
            if not content or more and first in b"\0\xff" and first[0] >> 7 == more[0] >> 7:
                raise ValueError("a number that is not the shortest")
        elif tag == _BITS:
            unused = first[0] if content else 8
            if unused > 7 or unused and (not more or more[-1] & (1 << unused) - 1):
                raise ValueError("a bit string with a wrong end")
        elif tag == _OID:
            _check_oid(content)
        elif tag == _BOOLEAN and content not in (b"\0", b"\xff") or tag == _NULL and content:
            raise ValueError("a truth value or null of another form")
        elif len(content) % _WIDE_TEXTS.get(tag, 1):
            raise ValueError("a text of a wrong length")


def _check_oid(content):
    if not content or content[-1] & 0x80 or re.search(rb"(?:\A|[\x00-\x7f])\x80", content):
        raise ValueError("an object identifier that is none")


class _Sequence:
    """The elements of a SEQUENCE, taken in order, each with a tag that its place allows."""

    def __init__(self, content, what):
        self._items, self._what = der_items(content), what

    def maybe(self, *tags):
        """The next Element if it has one of the tags, or if any will do, else None."""
        if self._items and (not tags or self._items[0].tag in tags):
            return self._items.pop(0)
        return None

    def take(self, *tags):
        """The next Element, which must have one of the tags."""
        found = self.maybe(*tags)
        if not found:
            raise ValueError(f"{self._what} is not as expected")
        return found

    def only(self, *tags):
        """The last Element."""
        found = self.take(*tags)
        self.end()
        return found

    def end(self):
        if self._items:
            raise ValueError(f"{self._what} is not as expected")


def _signed(der, what):
    """The fields of what is signed, and its algorithm's element (RFC 5280 4.1.1)."""
    _check_der(der_items(der))
    whole = _Sequence(_Sequence(der, what).only(_SEQUENCE).content, what)
    body, algorithm, signature = whole.take(_SEQUENCE), whole.take(_SEQUENCE), whole.only(_BITS)
    if signature.content[0]:
        raise ValueError("the signature is not whole bytes")
    return _Sequence(body.content, what), algorithm


def _take_algorithm(fields, signed_by=None):
    """An AlgorithmIdentifier; what is signed has the one outside (RFC 5280 4.1.1.2)."""
    algorithm = fields.take(_SEQUENCE)
    parts = _Sequence(algorithm.content, "an algorithm")
    parts.take(_OID)
    parts.maybe()
    parts.end()
    if signed_by and algorithm != signed_by:
        raise ValueError("the signature's algorithm is not the one that is signed")


def _take_name(fields):
    """A Name as [[(CN and the like, text), …], …] (RFC 5280 4.1.2.4)."""
    found = []
    for relative in der_items(fields.take(_SEQUENCE).content):
        pairs = der_items(relative.content)
        if relative.tag != _SET or not pairs:
            raise ValueError("a name is not as expected")
        found.append([])
        for pair in pairs:
            parts = _Sequence(pair.content if pair.tag == _SEQUENCE else b"", "a name's field")
            oid, value = parts.take(_OID).content, parts.only()
            text = _text_of(value)
            if text is None:                # Under its number: no CN that is none is taken for one.
                found[-1].append((oid_text(oid), "#" + value.whole.hex()))
            else:
                found[-1].append((_FIELDS.get(oid) or oid_text(oid), text))
    return found


def _text_of(value):
    """A field's value as text; None, or ValueError where no name has that, if it is no text."""
    if value.tag in _TEXTS:
        return value.content.decode(_TEXTS[value.tag])
    if value.tag in _WIDE_TEXTS:
        size, data = _WIDE_TEXTS[value.tag], value.content
        codes = [int.from_bytes(data[at:at + size], "big") for at in range(0, len(data), size)]
        text = "".join(map(chr, codes))
        text.encode("utf-8")                # No half of a pair.
        return text
    if value.tag not in (_BITS, _SEQUENCE):
        raise ValueError("a name's field has a type that no text has")
    return None


def _name_text(name):
    """A Name in one line, as in C=FR, O=Network UPS Tools, CN=ups.lan."""
    return ", ".join(" + ".join(f"{field}={_quoted(text, ',+')}" for field, text in pairs)
                     for pairs in name)


def oid_text(content: bytes) -> str:
    """An object identifier with dots, from its DER content (X.690 8.19)."""
    numbers, number = [], 0
    for byte in content:
        number = number << 7 | byte & 0x7f
        if not byte & 0x80:
            numbers.append(number)
            number = 0
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, [first, numbers[0] - 40 * first] + numbers[1:]))


def _quoted(text, marks):
    """printable(), in quotes where one of the marks in it could be taken for the text's end."""
    text = printable(text)
    if text == text.strip() and not any(mark in text for mark in marks + '"'):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def names_text(names: list) -> str:
    """Names for a message, with commas that cannot be confused with those in a name."""
    return ", ".join(_quoted(name, ",") for name in names)


def _take_time(fields):
    """UTCTime or GeneralizedTime in seconds since 1970 (RFC 5280 4.1.2.5)."""
    tag, content, _ = fields.take(*_TIMES)
    text = content.decode("ascii")
    if tag == _TIMES[0]:
        text = ("19" if text[:2] >= "50" else "20") + text
    if len(text) != 15 or not re.match("[0-9]{14}Z", text):
        raise ValueError("a date of another form")
    month, day, hour, minute, second = (int(text[at:at + 2]) for at in range(4, 14, 2))
    year = int(text[:4])
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = (31, 28 + leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if not (year and 0 < month < 13 and 0 < day <= lengths[month - 1]
            and hour < 24 and minute < 60 and second < 60):
        raise ValueError("a date that is none")
    # No datetime, which costs memory, and no time_t, which ends in 2038 on small boxes.
    before = year - 1
    days = 365 * before + before // 4 - before // 100 + before // 400 + sum(lengths[:month - 1])
    days += day - 719163                    # 1970-01-01
    return 86400 * days + 3600 * hour + 60 * minute + second


def _san_names(value):
    """subjectAltName's names, as far as permit has a word for them (RFC 5280 4.2.1.6)."""
    what, names = "the subjectAltName", []
    for tag, content, _ in der_items(_Sequence(value, what).only(_SEQUENCE).content):
        if tag in _TEXT_NAMES:
            # What is not ASCII is spelt out: no such name equals one that an administrator wrote.
            text = content.decode("ascii", "backslashreplace")
            names.append(normal_name(_TEXT_NAMES[tag] + text))
        elif tag == 0x87:
            if len(content) in (4, 16):
                family = socket.AF_INET if len(content) == 4 else socket.AF_INET6
                names.append("IP:" + socket.inet_ntop(family, content))
        elif tag == 0xa0:                   # otherName
            parts = _Sequence(content, what)
            parts.take(_OID)
            _Sequence(parts.only(0xa0).content, what).only()
        elif tag == 0xa4:                   # directoryName
            parts = _Sequence(content, what)
            _take_name(parts)
            parts.end()
        elif tag == 0xa5:                   # ediPartyName
            parts = _Sequence(content, what)
            for text in (parts.maybe(0xa0), parts.only(0xa1)):
                if text:
                    _Sequence(text.content, what).only(0x0c, 0x13, 0x14, *_WIDE_TEXTS)
        elif tag == 0x88:                   # registeredID
            _check_oid(content)
        elif tag != 0xa3:                   # x400Address
            raise ValueError(f"{what} is not as expected")
    return names


def _extensions(content):
    """{OID's content: the extension's value} (RFC 5280 4.2)."""
    found = {}
    for extension in der_items(_Sequence(content, "the extensions").only(_SEQUENCE).content):
        fields = _Sequence(extension.content if extension.tag == _SEQUENCE else b"", "an extension")
        oid = fields.take(_OID).content
        fields.maybe(_BOOLEAN)              # critical
        if oid in found:
            raise ValueError("an extension stands twice")
        found[oid] = fields.only(_OCTETS).content
        if oid in (_SAN, _BASIC_CONSTRAINTS):
            _check_der(der_items(found[oid]))
    return found


def _is_ca(value):
    what = "the basicConstraints extension"
    fields = _Sequence(_Sequence(value, what).only(_SEQUENCE).content, what)
    ca = fields.maybe(_BOOLEAN)
    fields.maybe(_INTEGER)                  # pathLenConstraint
    fields.end()
    return ca is not None and ca.content == b"\xff"


def read_certificate(der: bytes) -> Certificate:
    """A certificate's DER; ValueError for all that is not as RFC 5280 4.1 has it, DER throughout.

    OpenSSL reads BER too. What it would read differently must not be read here, or a peer shows one
    key or name to OpenSSL and another one to pin or permit.
    """
    try:
        fields, signed_by = _signed(der, "it")
        version = fields.maybe(0xa0)
        if version and version.content not in (b"\x02\x01\0", b"\x02\x01\1", b"\x02\x01\2"):
            raise ValueError("the version is not 1, 2 or 3")
        fields.take(_INTEGER)               # serialNumber
        _take_algorithm(fields, signed_by)
        issuer = _take_name(fields)
        validity = _Sequence(fields.take(_SEQUENCE).content, "the validity")
        begin, end = _take_time(validity), _take_time(validity)
        validity.end()
        subject = _take_name(fields)
        spki = fields.take(_SEQUENCE)
        key = _Sequence(spki.content, "the public key")
        _take_algorithm(key)
        if key.only(_BITS).content[0]:
            raise ValueError("the public key is not whole bytes")
        fields.maybe(0x81)                  # issuerUniqueID
        fields.maybe(0x82)                  # subjectUniqueID
        last = fields.maybe(0xa3)
        fields.end()
        extensions = _extensions(last.content) if last else {}
        names = ["CN=" + text for pairs in subject for field, text in pairs if field == "CN"]
        names += _san_names(extensions[_SAN]) if _SAN in extensions else []
        digest = hashlib.sha256(spki.whole).digest()
        return Certificate(
            # With an escape in it a name matches no permit line.
            names=list(map(printable, names)),
            pin="sha256//" + binascii.b2a_base64(digest, newline=False).decode(),
            not_before=begin, not_after=end, subject=_name_text(subject), issuer=_name_text(issuer),
            fields=[(field, printable(text)) for pairs in subject for field, text in pairs],
            is_ca=_BASIC_CONSTRAINTS in extensions and _is_ca(extensions[_BASIC_CONSTRAINTS]),
            spki=spki.whole, extensions=extensions)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"a certificate that cannot be read ({_plain(error)})") from None


def read_crl(der: bytes) -> RevocationList:
    """A revocation list's DER; ValueError for all that is not as RFC 5280 5.1 has it."""
    try:
        fields, signed_by = _signed(der, "it")
        fields.maybe(_INTEGER)              # version
        _take_algorithm(fields, signed_by)
        issuer = _name_text(_take_name(fields))
        begin, end = _take_time(fields), NO_EXPIRY
        later = fields.maybe(*_TIMES)
        if later:
            end = _take_time(_Sequence(later.whole, "it"))
        fields.maybe(_SEQUENCE)             # revokedCertificates
        fields.maybe(0xa0)                  # crlExtensions
        fields.end()
        return RevocationList(issuer, begin, end)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"a revocation list that cannot be read ({_plain(error)})") from None


def _plain(error):
    """Python's own words about bytes that are no text tell an administrator nothing."""
    no_text = isinstance(error, (UnicodeError, OverflowError)) or "chr()" in str(error)
    return "a text of a wrong encoding" if no_text else error


def normal_name(name: str) -> str:
    """A name as permit compares it: DNS and email without case, addresses in their one form."""
    kind, colon, value = name.partition(":")
    family = numeric_family(value) if kind == "IP" else None
    if family:
        value = socket.inet_ntop(family, socket.inet_pton(family, value))
    return kind + colon + value.lower() if kind in ("DNS", "email", "IP") else name


# PEM files: each is read once, and by this reader alone.

Block = collections.namedtuple("Block", "kind der line encrypted")
Block.__doc__ = "A PEM block: CERTIFICATE or the like, bytes, BEGIN's line, a locked key or not."

CERTIFICATES = ("CERTIFICATE", "X509 CERTIFICATE")      # The second is OpenSSL's older word.
REVOCATION_LIST = "X509 CRL"
_KEYS, _LISTS, _TRUST = ("PRIVATE KEY",), (REVOCATION_LIST,), CERTIFICATES + (REVOCATION_LIST,)
_KINDS = {CERTIFICATES: "certificate", _TRUST: "certificate", _KEYS: "private key",
          _LISTS: "revocation list (X509 CRL)"}
_BLANKS = "".join(map(chr, range(33)))                  # What OpenSSL takes off a line's end.
_marker = re.compile(r"-----(BEGIN|END) ([!-,.-~]+(?:[ -][!-,.-~]+)*)-----").fullmatch
_like_marker = re.compile(r"(?:BEGIN|END) (?:[A-Z0-9]+ )*(?:CERTIFICATE|CRL|KEY|PARAMETERS)\b|"
                          r"-\s*(?i:(?:BEGIN|END) (?:\w+ )*(?:CERTIFICATE|CRL|KEY)\b)").search
_base64 = re.compile(r"[A-Za-z0-9+/]*={0,2}").fullmatch


def read_file(path: str) -> bytes:
    """A PEM file's bytes; OSError, or ValueError for what is too large to be one."""
    with open(path, "rb") as file:
        data = file.read(MAX_PEM + 1)
    if len(data) > MAX_PEM:
        raise ValueError(f"more than {MAX_PEM} bytes: expected a PEM file")
    return data


def pem_blocks(data: bytes) -> list:
    """The Blocks of a PEM file (RFC 7468); ValueError, with the line, where one is damaged.

    OpenSSL passes over a block whose BEGIN line it does not know for one, without a word. So all
    that looks like such a line must be one. Text between the blocks, CRLF and a BOM do no harm.
    """
    blocks, kind, start, lines = [], "", 0, []
    for number, line in enumerate(data.decode("latin-1").split("\n"), 1):
        if number == 1 and line.startswith("\xef\xbb\xbf"):
            line = line[3:]
        line = line.rstrip(_BLANKS)
        marker, like = _marker(line), _like_marker(line)
        if not kind and not marker and (not like or line.lstrip().startswith("#")):
            continue                        # Text, or what somebody has turned into a comment.
        if kind and not marker and not like:
            lines.append(line)
        elif not marker:
            raise ValueError(f"line {number}: {_marker_fault(line)}")
        elif marker.group(1) == "BEGIN" and not kind:
            kind, start, lines = marker.group(2), number, []
        elif marker.groups() == ("END", kind):
            blocks.append(_block(kind, start, lines))
            kind = ""
        elif kind:
            raise ValueError(f"line {number}: {printable(line)}: expected "
                             f"-----END {printable(kind)}-----, for the BEGIN in line {start}")
        else:
            raise ValueError(f"line {number}: {printable(line)}: expected its BEGIN line before it")
    if kind:
        raise ValueError(f"line {start}: this BEGIN has no END line: bring the whole file again")
    return blocks


def _marker_fault(line):
    """What is wrong with a BEGIN or END line, which is not shown: part of a key may be in it."""
    if re.search("END .*-----BEGIN", line):
        return "a joined END and BEGIN line: expected a line for each"
    if _marker(line.lstrip()):
        return "blanks before BEGIN or END: expected all lines of a block without"
    return ("a damaged BEGIN or END line: expected one like -----BEGIN CERTIFICATE-----, "
            "alone in its line")


def _block(kind, start, lines):
    """A block of the lines between BEGIN and END; headers end with an empty line (RFC 1421 4.4)."""
    encrypted, body, before = kind == "ENCRYPTED PRIVATE KEY", lines, start
    if lines and ":" in lines[0]:
        end = lines.index("") if "" in lines else 0
        encrypted = any("ENCRYPTED" in line for line in lines[:end])
        body, before = lines[end:], start + end
    for number, line in enumerate(body, before + 1):
        if not _base64(line):
            hint = "; take the blanks before it off" if _base64(line.strip()) else ""
            raise ValueError(f"line {number}: damaged base64{hint}")
    text = "".join(body)
    try:
        if not text or len(text) % 4 or "=" in text.rstrip("="):
            raise ValueError
        return Block(kind, binascii.a2b_base64(text), start, encrypted)
    except ValueError:
        raise ValueError(f"line {start}: damaged base64 in this block: "
                         "bring the whole file again") from None


def _wanted(blocks, kinds, data):
    """The blocks of these kinds, a key's with its algorithm before; ValueError if there is none."""
    found = [block for block in blocks
             if block.kind in kinds or kinds == _KEYS and block.kind.endswith(_KEYS)]
    if not found:
        hint = ""
        if data[:2] == b"\x30\x82":
            hint = ("; this looks like DER: "
                    "'openssl x509 -inform DER -in FILE -out NEWFILE' writes PEM")
        raise ValueError(f"expected PEM with a {_KINDS[kinds]}, found none{hint}")
    return found


class Credentials:
    """A shim's TLS context, and what -t, the log and the expiry checks want to know of it.

    own is the own Certificate; loaded is all that the context uses, as Loaded. What is wrong is
    added to faults, what is only unwise to warnings, as lines.
    """

    def __init__(self, conf, faults, warnings):
        self._conf, self._faults = conf, faults
        self.own, self.loaded = None, []
        server = conf.role == SERVER
        self.context = context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = (
            ssl.TLSVersion.TLSv1_3 if conf.min_tls == "1.3" else ssl.TLSVersion.TLSv1_2)
        if conf.min_tls == "1.2":
            context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        if ssl.OPENSSL_VERSION_INFO >= (3,):
            context.options |= 0x80         # SSL_OP_IGNORE_UNEXPECTED_EOF: no close_notify ends it.
        if server:
            checks = conf.client_certificate != "none"
            context.verify_mode = {"none": ssl.CERT_NONE, "request": ssl.CERT_OPTIONAL,
                                   "require": ssl.CERT_REQUIRED}[conf.client_certificate]
            if hasattr(context, "num_tickets"):
                context.num_tickets = 1     # Enough to resume; each costs time and bytes.
        else:
            checks = conf.verify in ("full", "chain")
            context.check_hostname = conf.verify == "full"
            context.verify_mode = ssl.CERT_REQUIRED if checks else ssl.CERT_NONE
            if hasattr(context, "hostname_checks_common_name"):
                context.hostname_checks_common_name = False
        context.loaded, context.crl_issuers = self.loaded, None         # For note_failure().
        if conf.certificate:
            self._load_own(warnings)
        if checks and conf.trust:
            self._load_trust(warnings)

    def _fault(self, option, path, error):
        self._faults.append(f"{self._conf.at(option)}{path}: {openssl_words(error)}")

    def _blocks(self, option, path, kinds, data=None):
        """A file's Blocks; none, and a fault, where it is faulty or has none of these kinds."""
        try:
            data = read_file(path) if data is None else data
            blocks = pem_blocks(data)
            for block in blocks:
                if block.kind == "TRUSTED CERTIFICATE" and kinds != _KEYS:
                    raise ValueError(
                        f"line {block.line}: a TRUSTED CERTIFICATE, which only the openssl command "
                        f"understands; 'openssl x509 -in {path} -out NEWFILE' writes a plain one")
                if block.kind not in _TRUST and _is_certificate(block.der):
                    raise ValueError(f"line {block.line}: a certificate under the heading "
                                     f"{printable(block.kind)}: expected CERTIFICATE")
            _wanted(blocks, kinds, data)
            return blocks
        except (OSError, ValueError) as error:
            self._fault(option, path, error)
            return []

    def _read(self, option, path, blocks, kinds, read):
        """[(what read() makes of it, DER)] of such blocks; none, and a fault, if one is bad."""
        found = []
        for block in blocks:
            if block.kind in kinds:
                try:
                    found.append((read(block.der), block.der))
                except ValueError as error:
                    self._fault(option, path, f"line {block.line}: {error}")
                    return []
        return found

    def _note(self, kind, path, subject, not_before, not_after):
        what = f"{kind} {path} ({subject or 'without a subject'})"
        self.loaded.append(Loaded(what, not_before, not_after))

    def _load_own(self, warnings):
        conf, own = self._conf, self._conf.certificate
        option, path = ("key", conf.key) if conf.key else ("certificate", own)
        blocks = self._blocks("certificate", own, CERTIFICATES)
        chain = self._read("certificate", own, blocks, CERTIFICATES, read_certificate)
        if chain and conf.key:
            blocks = self._blocks(option, path, _KEYS)
        try:
            keys = chain and blocks and _wanted(blocks, _KEYS, b"")
            if not keys:
                return
            if any(block.encrypted for block in keys):
                raise ValueError("the key is encrypted, which a daemon cannot open; "
                                 "'openssl pkey -in FILE' writes it plain")
            for certificate, der in chain:
                _try_openssl(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, der)
            self.context.load_cert_chain(own, conf.key, "")
        except (OSError, ValueError) as error:
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                error = f"this key does not belong to the first certificate of {own}"
            return self._fault(option, path, error)
        if os.stat(path).st_mode & stat.S_IROTH:
            warnings.append(f"{conf.at(option)}{path}: everybody can read this private key; "
                            f"'chmod o= {path}'")
        self.own = chain[0][0]
        for number, each in enumerate({der: each for each, der in chain}.values()):
            kind = "chain certificate" if number else "own certificate"
            self._note(kind, own, each.subject, each.not_before, each.not_after)

    def _load_trust(self, warnings):
        conf, context = self._conf, self.context
        # What is put into trust is trusted as it is, be it an intermediate CA's or a server's own.
        context.verify_flags |= 0x80000     # X509_V_FLAG_PARTIAL_CHAIN; Python 3.10 has the name
        lists = {}                          # DER: (RevocationList, path)
        for path in conf.crl or ():
            blocks = self._blocks("crl", path, _LISTS)
            if any(block.kind in CERTIFICATES for block in blocks):
                self._fault("crl", path, "expected nothing but revocation lists, "
                                         "found a certificate, which would be trusted")
            else:
                for each, der in self._read("crl", path, blocks, _LISTS, read_crl):
                    lists.setdefault(der, (each, path))
        found = {}                          # DER: (Certificate, path)
        try:
            found = self._system() if conf.trust == "system" else self._trusted(lists)
        except (OSError, ValueError) as error:
            self._fault("trust", conf.trust, error)
        self._note_trust(found)
        if lists:
            self._load_lists(lists)
            lack = [each.subject for each, _ in found.values()
                    if each.is_ca and each.subject not in context.crl_issuers]
            if lack and len(found) <= BUNDLE:
                warnings.append(
                    f"{conf.at('crl')}no revocation list of {_some(lack)}, which trust has: what it "
                    "has issued is refused, since with crl set each CA needs one")

    def _trusted(self, lists):
        """Load the certificates of trust, each once: {DER: (Certificate, path)}."""
        context, trust, found, before = self.context, self._conf.trust, {}, len(self._faults)
        folder = os.path.isdir(trust)
        names = sorted(os.listdir(trust)) if folder else [""]
        for path in (os.path.join(trust, name) if folder else trust for name in names):
            if folder and not os.path.isfile(path):
                continue
            try:
                data = read_file(path)
            except (OSError, ValueError) as error:
                self._fault("trust", path, error)
                continue
            here = rb"BEGIN (?:[A-Z0-9]+ )*(?:CERTIFICATE(?! REQUEST)|CRL)\b"
            if folder and not re.search(here, data):
                continue                    # Other files may stand beside: a README, keys.
            blocks = self._blocks("trust", path, _TRUST, data)
            certificates = self._read("trust", path, blocks, CERTIFICATES, read_certificate)
            for each, der in certificates:
                found.setdefault(der, (each, path))
            if any(block.kind == REVOCATION_LIST and block.der not in lists for block in blocks):
                cure = "move it into a file of its own and set crl = FILE"
                self._fault("trust", path, "a revocation list, which counts only as crl: "
                            + (cure if certificates else f"set crl = {path}"))
        for der, (each, path) in found.items():
            try:
                _try_openssl(context, each, der)
            except ValueError as error:
                self._fault("trust", path, error)
        if len(self._faults) == before:
            count = context.cert_store_stats()["x509"]
            if not found:
                raise ValueError("expected PEM files with certificates, found none")
            if count != len(found):
                raise ValueError(f"OpenSSL uses {count} of {len(found)} certificates")
        return found

    def _system(self):
        """Load the machine's certificates, of which OpenSSL reads a folder's only when needed."""
        self.context.load_default_certs()
        folder, found = ssl.get_default_verify_paths().capath, {}
        if not self.context.cert_store_stats()["x509"] and not (folder and os.listdir(folder)):
            raise ValueError("this machine has no CA certificates; "
                             "install its package ca-certificates")
        for der in self.context.get_ca_certs(True):
            try:
                found[der] = read_certificate(der), "system"
            except ValueError:
                pass                        # OpenSSL's to judge; only its dates are not watched.
        return found

    def _note_trust(self, found):
        """One line for each, or one for a whole bundle with the first of them to end."""
        if len(found) <= BUNDLE:
            for each, path in found.values():
                self._note("trusted certificate in", path, each.subject,
                           each.not_before, each.not_after)
            return
        now = time.time()
        certificates = [each for each, _ in found.values()]
        past = sum(each.not_after < now for each in certificates)
        first = min(certificates, key=lambda each: (each.not_after < now, each.not_after))
        which = f"{past} of them expired, the next to end" if past else "the first to end"
        self._note(f"{len(found)} trusted certificates in", f"{self._conf.trust}, {which}",
                   first.subject, first.not_before, first.not_after)

    def _load_lists(self, lists):
        """Load revocation lists, for which Python has no other way than their files' paths."""
        context, before = self.context, self.context.cert_store_stats()
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        for path in dict.fromkeys(path for _, path in lists.values()):
            try:
                context.load_verify_locations(cafile=path)
            except OSError as error:
                self._fault("crl", path, error)
        after = context.cert_store_stats()
        if after["crl"] != len(lists) or after["x509"] != before["x509"]:
            self._fault("crl", ", ".join(self._conf.crl),
                        f"OpenSSL uses {after['crl']} of {len(lists)} revocation lists")
        for each, path in lists.values():
            self._note("revocation list", path, each.issuer, each.this_update, each.next_update)
        context.crl_issuers = {each.issuer for each, _ in lists.values()}


def _is_certificate(der):
    try:
        return bool(read_certificate(der))
    except ValueError:
        return False


def _try_openssl(context, certificate, der):
    """Load a certificate into a context's store; ValueError that names it if OpenSSL refuses."""
    try:
        context.load_verify_locations(cadata=der)
    except (OSError, ValueError) as error:
        raise ValueError(f"OpenSSL does not take the certificate of {certificate.subject}: "
                         f"{openssl_words(error)}") from None


def _some(texts, most=3):
    """The first few of many, for a message."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return " and ".join(texts[:most]) + more


_WEAK_KEY = "is too short for this OpenSSL's security level (RSA needs 2048 bits): make a new one"
_WEAK_DIGEST = ("is signed with SHA-1 or another weak digest, which this OpenSSL's security level "
                "does not allow: make it anew")
_LOAD_WORDS = {                             # By OpenSSL's reasons (sslerr.h).
    "EE_KEY_TOO_SMALL": "its key " + _WEAK_KEY,
    "CA_KEY_TOO_SMALL": "the key of a CA in it " + _WEAK_KEY,
    "CA_MD_TOO_WEAK": "a certificate in it " + _WEAK_DIGEST}


def openssl_words(error) -> str:
    """An OSError, ssl.SSLError, ValueError or text about a file, in an administrator's words."""
    reason = getattr(error, "reason", None) or ""
    if reason in _LOAD_WORDS:
        return _LOAD_WORDS[reason]
    if isinstance(error, ssl.SSLError):
        words = re.sub(r"^\[[^]]*\] *| *\(_ssl\.c:\d+\)$", "", str(error))
        words = reason.lower().replace("_", " ") or words
        return f"OpenSSL cannot use it ({words}): is it whole, and of a kind that OpenSSL knows?"
    return getattr(error, "strerror", None) or str(error)


def handshake_step(sock):
    """One step, in a handshake thread: -> READ or WRITE for the next one, or the Peer when done."""
    try:
        sock.do_handshake()
    except ssl.SSLWantReadError:
        return READ
    except ssl.SSLWantWriteError:
        return WRITE
    except ssl.SSLCertVerificationError as error:
        note_failure(sock, error)
        raise
    return describe_peer(sock)


def describe_peer(sock) -> Peer:
    """The Peer of an SSLSocket or SSLObject; ValueError if its certificate cannot be read."""
    der = sock.getpeercert(True)
    names, pin, not_after = [], "", 0
    if der:
        try:
            found = read_certificate(der)
        except ValueError as error:
            raise ValueError(f"the peer sent {error}") from None
        names, pin, not_after = found.names, found.pin, found.not_after
    return Peer(sock.version(), sock.cipher()[0], names, pin, not_after)


# By OpenSSL's X509_V_ERR_ numbers (x509_vfy.h).
_NAME_FAULTS = (62, 64)
_DATE_WORDS = {9: "is not valid yet: compare the clocks", 10: "has expired: renew it"}
_VERIFY_WORDS = {
    3: "no revocation list (crl) of its issuer: with crl set, each CA above it needs one",
    9: "its certificate " + _DATE_WORDS[9], 10: "its certificate " + _DATE_WORDS[10],
    11: "the revocation list (crl) is not valid yet: compare the clocks",
    12: "the revocation list (crl) has expired: renew it",
    18: "its certificate is self-signed and not in trust",
    19: "unknown CA: its issuer is not in trust", 20: "unknown CA: its issuer is not in trust",
    21: "unknown CA: its issuer is not in trust",
    23: "its certificate, or its issuer's, is revoked",
    24: "its issuer's certificate is not one of a CA",
    26: "its certificate, or its issuer's, was made for another use: a server's has serverAuth, "
        "a client's clientAuth",
    66: "the key of its certificate " + _WEAK_KEY,
    67: "the key of a CA above its certificate " + _WEAK_KEY,
    68: "its certificate, or its issuer's, " + _WEAK_DIGEST}


def note_failure(sock, error):
    """Give a verification's error an attribute, whose: the words, with whose certificate it was.

    sock is the SSLSocket or SSLObject. From Python 3.10 on a client has the chain that the server
    sent; a server has nothing.
    """
    chain = []
    try:
        for each in sock._sslobj.get_unverified_chain() or ():  # Public in Python 3.13.
            chain.append(read_certificate(each.public_bytes(2)))        # DER
    except (AttributeError, ValueError):
        pass
    code, context, now = error.verify_code, sock.context, time.time()
    if code in _DATE_WORDS:
        def wrong(each):
            return now > each.not_after if code == 10 else now < each.not_before
        sent = [number for number, each in enumerate(chain) if wrong(each)]
        trusted = [each.what for each in getattr(context, "loaded", ())
                   if each.what.startswith("trusted") and wrong(each)]
        if sent:
            whose = "its certificate"
            if sent[0]:
                whose = f"its issuer's certificate ({chain[sent[0]].subject})"
        elif chain and trusted:
            whose = trusted[0]
        else:
            whose = " or ".join(["its certificate, or its issuer's,"] + trusted[:1])
        error.whose = f"{whose} {_DATE_WORDS[code]}"
    elif code == 3 and chain and getattr(context, "crl_issuers", None):
        lack = [each.issuer for each in chain if each.issuer not in context.crl_issuers]
        if lack:
            error.whose = _VERIFY_WORDS[3].replace("its issuer", _some(list(dict.fromkeys(lack))))
    elif code in _NAME_FAULTS and chain:
        error.whose = f"its certificate {name_words(chain[0].names, sock.server_hostname or '')}"


def name_words(names: list, name: str) -> str:
    """How a certificate with these names stands to a name: "is for …", or why not, and the cure."""
    address = numeric_family(name)
    wanted = normal_name(("IP:" if address else "DNS:") + name)
    alternatives = [each for each in names if each.startswith(("DNS:", "IP:"))]
    if not alternatives:
        return (f"is not for {name}: it has no subjectAltName, and names count nowhere else; "
                f"make it anew with one ({wanted})")
    if address and "DNS:" + name.lower() in names:
        return f"is not for {name}: it has the address as DNS:{name}; make it anew with {wanted}"
    words = "is for " + names_text(alternatives)
    if wanted in names or not address and "DNS:*." + wanted.partition(".")[2] in names:
        return words
    return f"{words}, not for {name}: set server_name to one of these, or make one with {name}"


def tls_error(error, name=None) -> str:
    """An exception of a socket, with or without TLS, in an administrator's words."""
    reason = isinstance(error, ssl.SSLError) and getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        code = error.verify_code
        if hasattr(error, "whose"):
            return error.whose
        if code in _NAME_FAULTS:
            kind = "name" if code == 62 else "address"
            return (f"its certificate is not for this {kind} ({name}): "
                    "set server_name, or make a certificate with it")
        if code in _DATE_WORDS:
            return f"its certificate, its issuer's, or one in trust {_DATE_WORDS[code]}"
        return _VERIFY_WORDS.get(code, error.verify_message)
    if "ALERT_" in reason:
        alert = reason.partition("ALERT_")[2].lower().replace("_", " ")
        return f"the peer refused with the TLS alert '{alert}'"
    if "PROTOCOL" in reason or "VERSION" in reason:
        return "the peer speaks no TLS version that min_tls allows"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the peer has no client certificate"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return "the peer closed during the handshake"
    return reason.lower().replace("_", " ") or getattr(error, "strerror", None) or str(error)


def days_text(not_after, not_before=0) -> str:
    """What to say of dates, given in seconds since 1970."""
    now = time.time()
    if not_before > now:
        return f"is not valid yet, but in {int((not_before - now) / 86400) + 1} days"
    if not_after >= NO_EXPIRY:
        return "never expires"
    days = (not_after - now) / 86400
    return f"expires in {int(days)} days" if days >= 0 else f"expired {int(-days)} days ago"


def days_left(loaded):
    """A Loaded's whole days, negative once past; None where there is no end."""
    return None if loaded.not_after >= NO_EXPIRY else int((loaded.not_after - time.time()) // 86400)


def date_level(loaded) -> int:
    """How a Loaded's dates are logged: ERROR if it does not hold now, WARNING soon before."""
    now = time.time()
    if not loaded.not_before <= now <= loaded.not_after:
        return ERROR
    return WARNING if loaded.not_after - now < EXPIRY_WARNING * 86400 else INFO


# --- Log -----------------------------------------------------------------------------------------

ERROR, WARNING, NOTICE, INFO, DEBUG = 3, 4, 5, 6, 7         # As syslog's (RFC 5424 6.2.1).
_LEVELS = {ERROR: "error: ", WARNING: "warning: ", NOTICE: "notice: ", INFO: "info: ", DEBUG: "debug: "}


class Log:
    """Lines to syslog, stderr or a file, without ever waiting: what cannot be written is lost, and counted.

    The loop holds the lines of one round and writes them together.
    """

    def __init__(self, debug: int = 0):
        self.debug = debug                  # 1 and more: protocol words
        self.hold = False
        self.lines: list = []
        self._limited: dict = {}
        self._lost, self._sock = 0, None
        self.fd = -1
        self.use("stderr", 2)

    @staticmethod
    def open(target: str) -> int:
        """The descriptor to use() for a target; OSError when its file cannot be written."""
        if target in ("syslog", "stderr"):
            return 2
        # Root opens it in a folder that may be another user's, so a link is not followed.
        return os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)

    def use(self, target: str, fd: int):
        if self.fd > 2:
            os.close(self.fd)
        self.fd, self._syslog, self._second = fd, target == "syslog", None
        self._poll = None                   # A plain file takes all at once.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            self._poll = select.poll()
            self._poll.register(fd, select.POLLOUT)

    def __call__(self, level: int, text: str):
        for line in text.split("\n"):
            self.lines.append((level, line))
        if not self.hold:
            self.flush()

    def limited(self, level: int, key, text: str):
        """Not more often than every RATE_LIMIT seconds for the same key; says how many were left out."""
        now = time.monotonic()
        since, left_out = self._limited.get(key, (-RATE_LIMIT, 0))
        if now - since < RATE_LIMIT:
            self._limited[key] = (since, left_out + 1)
        else:
            self._limited[key] = (now, 0)
            self(level, text + f" (and {left_out} more since the last such line)" if left_out else text)

    def flush(self):
        lines, self.lines = self.lines, []
        note = [(WARNING, f"{self._lost} log lines were lost here")] if self._lost else []
        lines[:0] = note
        try:
            (self._to_syslog if self._syslog else self._to_file)(lines)
            self._lost = 0
        except OSError:
            # lines holds what could not be written; the note about earlier losses is none of them.
            self._lost = len(lines) + (self._lost - 1 if note and lines[:1] == note else 0)

    def _to_file(self, lines):
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._stamp = time.strftime("%Y-%m-%d %H:%M:%S ") + f"nutshim[{os.getpid()}] "
        data = "".join([self._stamp + _LEVELS[level] + text + "\n" for level, text in lines]).encode("utf-8", "replace")
        while data:
            cut = data.rfind(b"\n", 0, 4096) + 1 or 4096
            if self._poll and not self._poll.poll(0):   # A pipe that takes anything takes 4096 bytes (PIPE_BUF).
                raise BlockingIOError
            os.write(self.fd, data[:cut])
            del lines[:data.count(b"\n", 0, cut)]
            data = data[cut:]

    def _to_syslog(self, lines):
        """The library's syslog() would wait for a syslogd that hangs, so its datagrams are made here (RFC 3164)."""
        if not self._sock:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sock.setblocking(False)
            for path in ("/dev/log", "/var/run/log", "/var/run/syslog"):
                if self._sock.connect_ex(path) == 0:
                    break
        try:
            while lines:
                level, text = lines[0]
                packet = f"<{3 * 8 + level}>{time.strftime('%b %e %H:%M:%S')} nutshim[{os.getpid()}]: {text}"
                self._sock.send(packet.encode("utf-8", "replace")[:2048])
                del lines[0]
        except BlockingIOError:
            raise
        except OSError:
            self._sock.close()                      # syslogd was restarted: connect anew next time.
            self._sock = None
            raise


# --- Sockets and threads -------------------------------------------------------------------------

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def numeric_family(host: str):
    """AF_INET or AF_INET6 of a numeric address, None of a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host.partition("%")[0])
            return family
        except (OSError, ValueError):
            pass
    return None


def address_text(address) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def look_up(host: str, port: int) -> list:
    """getaddrinfo() as [(family, address)], in its order; OSError. localhost needs no resolver (RFC 6761 6.3)."""
    if host == "localhost":
        return look_up("127.0.0.1", port) + look_up("::1", port)
    # Bytes, since a str needs the idna codec, which small boxes do not have.
    found = socket.getaddrinfo(host.encode("ascii"), port, 0, socket.SOCK_STREAM)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def tune(sock):
    """No delay for small replies; find out about peers that have vanished; see slow readers' progress."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * HIGH_WATER)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Workers:
    """Threads that run jobs for the loop; see the thread contract above."""

    def __init__(self, count, wake):
        self._wake, self._jobs = wake, queue.SimpleQueue()
        self.done = collections.deque()         # (session, then, result, error), from any thread
        for _ in range(count):
            threading.Thread(target=self._run, daemon=True).start()

    def submit(self, session, job, then):
        """Run job() in a thread, then then(result, error) in the loop's, on behalf of a session."""
        self._jobs.put((session, job, then))

    def submit_look_up(self, host, port, then):
        """In a thread of its own: a resolver that hangs must not hold up handshakes."""
        threading.Thread(target=self._do, args=(None, lambda: look_up(host, port), then), daemon=True).start()

    def _run(self):
        while True:
            try:
                self._do(*self._jobs.get())
            except MemoryError:
                pass                            # The session's deadline ends it; the thread must live.

    def _do(self, session, job, then):
        try:
            self.done.append((session, then, job(), None))
        except Exception as error:              # The loop tells a peer's fault from a bug.
            self.done.append((session, then, None, error))
        self._wake()


_LAST = getattr(socket, "MSG_MORE", 0)      # With what is sent right before close(): one packet, not two.
_buffer = bytearray(CHUNK)      # All reads go through it: a new 16 KiB object each time would cost more than the read.
_view = memoryview(_buffer)


class Side:
    """One socket in the loop, with the bytes that the kernel did not take yet."""
    __slots__ = ("sock", "_fill", "_send", "session", "shim", "out", "mask", "eof", "busy", "closed", "error", "on_read", "on_write",
                 "peer", "name", "_selector")

    def __init__(self, selector, sock, session, on_read=None):
        self.session, self._selector = session, selector
        self.adopt(sock)
        self.on_read, self.on_write = on_read, self.flush
        self.out, self.mask, self.error = b"", 0, ""    # error: how it ended, if not by a proper end.
        self.eof = False                # Nothing more will come.
        self.busy = False               # A handshake thread has the socket.
        self.closed = False
        self.peer = self.name = None    # The Peer, once TLS is up, and by what name it was asked for.
        if on_read:
            self.want(READ)

    def adopt(self, sock):
        """Take a socket, or the TLS socket that was made of it."""
        self.sock, self._send = sock, sock.send
        self._fill = functools.partial(*(sock.read, CHUNK, _buffer) if isinstance(sock, ssl.SSLSocket)
                                       else (sock.recv_into, _buffer))

    def want(self, mask):
        if mask != self.mask:
            if not mask:
                self._selector.unregister(self.sock)
            elif self.mask:
                self._selector.modify(self.sock, mask, self)
            else:
                self._selector.register(self.sock, mask, self)
            self.mask = mask

    def recv(self):
        """Bytes; b"" at the end, however it came; None when there is nothing yet."""
        try:
            size = self._fill()
            if size:
                return _view[:size].tobytes()
        except _NOT_NOW:
            return None
        except OSError as error:
            if not isinstance(error, ssl.SSLZeroReturnError):
                self.error = tls_error(error)
        self.eof = True
        return b""

    def send(self, data, flags=0):
        """Send what the kernel takes now, keep the rest for flush()."""
        if self.out:
            self.out += data
            return
        try:
            sent = self._send(data, flags)
            while sent < len(data):
                data = data[sent:]
                sent = self._send(data)
        except _NOT_NOW:
            self.out = bytearray(data)
            self.want(self.mask | WRITE)
        except OSError:
            self.want(self.mask | READ)             # What is wrong shows when it is read.

    def flush(self):
        try:
            while self.out:
                del self.out[:self._send(self.out)]
        except _NOT_NOW:
            return
        except OSError:
            pass
        self.out = b""
        self.want(self.mask & ~WRITE)

    def half_close(self):
        """Tell the peer that nothing more will come, and go on reading."""
        try:
            socket.socket.shutdown(self.sock, socket.SHUT_WR)       # SSLSocket's own would drop TLS.
        except OSError:
            pass

    def settled(self):
        """Nothing is unread, and the peer has acknowledged everything: close() loses nothing."""
        try:
            if socket.socket.recv(self.sock, 1, socket.MSG_PEEK):
                return False
        except BlockingIOError:
            pass
        except OSError:
            return True
        try:
            return not any(fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))
        except OSError:
            return False                            # Only Linux tells of the latter.

    def say_goodbye(self):
        """The same with TLS's close_notify; what still comes is not read as TLS any more."""
        try:
            if self.peer and not self.eof:
                self.sock.unwrap()
        except (OSError, ValueError):
            pass
        self._fill = functools.partial(socket.socket.recv_into, self.sock, _buffer)
        self.peer = None
        self.half_close()

    def close(self):
        """Idempotent; with TLS a close_notify goes first. A busy socket is closed when its thread is done."""
        self.want(0)
        self.closed = True
        self.session = self.on_read = self.on_write = None      # No cycle, so a session's memory is free at once.
        if self.sock and not self.busy:
            if self.peer:
                self.say_goodbye()
            self.sock.close()
            self.sock = self._fill = self._send = None


# --- Sessions ------------------------------------------------------------------------------------

GREETING, HANDSHAKE = "greeting", "handshake"       # A server shim's client: lines before TLS, then TLS.
DIAL = "connecting"         # Look-up and TCP, and for a client shim STARTTLS and TLS, with upstream.
RELAY, ENDING, CLOSED = "relaying", "ending", "closed"


class Session:
    """One NUT client's connection and the upstream session that serves it, from accept to close."""
    __slots__ = ("loop", "shim", "number", "client", "upstream", "address", "state", "deadline", "began", "last",
                 "talk", "greeting", "access", "user", "ups", "bytes_in", "bytes_out", "replay",
                 "targets", "addresses", "target", "dial_end", "failures", "ending", "stopping", "prefix")

    def __init__(self, loop, shim, sock, address):
        self.loop, self.shim, self.address = loop, shim, address
        self.client = Side(loop.selector, sock, self)
        self.upstream = self.talk = self.greeting = self.access = self.user = self.ups = self.target = None
        self.replay = None          # What a kept upstream session was sent, until it answers.
        self.state, self.stopping = GREETING, False
        self.began = self.last = self.deadline = loop.now
        self.bytes_in = self.bytes_out = 0
        self.failures, self.ending = [], None
        self.number = shim.count(address)
        self.prefix = f"[{shim.name}] #{self.number} {address_text(address)}: "

    def start(self):
        self.log(INFO, "opened")
        if self.shim.server:
            self.greeting = Greeting()
            self.client.on_read = self._greet
            self._until(self.shim.conf.handshake_timeout)
            self.client.want(READ)
            return
        self._start_talk(NO_TLS_HERE)
        kept = self.shim.take_kept()
        if kept:
            self.replay = b""
            self._relay_over(kept)
        else:
            self._dial()

    def log(self, level, text):
        self.loop.log(level, self.prefix + text)

    def _until(self, seconds):
        """Past that deadline the loop calls expired()."""
        self.deadline = self.loop.now + seconds
        self.loop.watch(self.deadline)

    # A server shim's client before upsd is reached.

    def _greet(self):
        data = self.client.recv()
        if data is None:
            return
        if not data:
            return self.close(Reason.NO_STARTTLS if self.greeting.refused else Reason.CLIENT, self.client.error)
        self.bytes_in += len(data)
        local = self.shim.conf.plaintext == "localhost" and is_loopback(self.address[0])
        reply, verdict, plain = self.greeting.feed(data, local)
        if self.loop.log.debug:
            self.log(DEBUG, f"before TLS: {len(data)} bytes, {verdict or 'no STARTTLS yet'}")
        if reply:
            self.client.send(reply)
        if verdict == "tls":
            self.state = HANDSHAKE
            self._start_tls(self.client, None)
        elif verdict == "plain":
            self.log(NOTICE, "goes on without TLS, as plaintext = localhost allows")
            self.greeting = plain
            self._admit(NO_TLS_HERE, [])
        elif verdict:
            self.finish(Reason.NO_STARTTLS if self.greeting.refused else Reason.LOGOUT)

    def _admit(self, starttls, identities):
        """Find the access class, then connect to upsd: strangers never get that far."""
        permit = self.shim.conf.permit
        if permit is not None:
            self.access = next((access for name, access in permit if name == "*" or name in identities), None)
            if self.access is None:
                self.client.send(ACCESS_DENIED)
                return self.finish(Reason.PERMIT, ", ".join(identities) or "no certificate")
            self.log(INFO, f"access class {self.access}")
        self._start_talk(starttls)
        self._dial()

    def _start_talk(self, starttls):
        self.talk = Conversation(starttls, CLASSES.get(self.access), self.shim.reuse > 0, self.loop.log.debug > 0)

    # TLS, with the client or with upstream.

    def _start_tls(self, side, name):
        shim = self.shim
        side.want(0)
        side.name = name
        try:
            side.adopt(shim.context.wrap_socket(side.sock, shim.server, False, server_hostname=name,
                                                session=shim.ticket(name)))
        except (OSError, ValueError) as error:
            side.eof = True                     # Reset by now; the socket went with it.
            return self._tls_failed(side, Reason.TLS, tls_error(error))
        self._handshake(side)

    def _handshake(self, side):
        sock = side.sock
        side.want(0)
        side.busy = True
        self.loop.workers.submit(self, lambda: handshake_step(sock), lambda result, error: self._stepped(side, result, error))

    def _stepped(self, side, result, error):
        side.busy = False
        if side.closed:
            return side.close()
        if isinstance(error, (OSError, ValueError)):
            return self._tls_failed(side, Reason.TLS, tls_error(error, side.name and side.name.decode()))
        if error:
            raise error
        if result in (READ, WRITE):
            side.on_read = side.on_write = lambda: self._handshake(side)
            return side.want(result)
        side.peer = peer = result
        if self.shim.context.verify_mode != ssl.CERT_NONE and peer.pin and peer.not_after < time.time():
            return self._tls_failed(side, Reason.TLS, _VERIFY_WORDS[10])     # A resumed session skips the dates.
        pins = self.shim.conf.pin
        if pins and peer.pin not in pins and (peer.pin or not self.shim.server):
            return self._tls_failed(side, Reason.PIN, f"it has {peer.pin}")
        self.log(INFO, f"TLS up: {peer.version}, {peer.cipher}, {', '.join(peer.names) or peer.pin or 'no certificate'}")
        if self.shim.server:
            self._admit(ALREADY_TLS, peer.names + [peer.pin] if peer.pin else [])
        else:
            self._connected(side)

    def _tls_failed(self, side, reason, text):
        self.shim.drop_ticket(side.name)
        if self.shim.server and side.eof:
            self.close(reason, text)
        elif self.shim.server:
            self.finish(reason, text)           # Not close(), or a reset could overtake the alert.
        else:
            self._target_failed(text if reason is Reason.TLS else f"{reason.value}: {text}")

    # Upstream: each address of each target in order, all within one deadline.

    def _dial(self):
        self.state = DIAL
        self.client.want(0)
        self.targets, self.addresses = list(self.shim.targets), []
        self.dial_end = self.loop.now + self.shim.conf.handshake_timeout
        self._next_address()

    def _next_address(self):
        if self.upstream:
            self.upstream.close()
            self.upstream = None
        if not self.addresses:
            if not self.targets:
                return self.close(Reason.UPSTREAM, "; ".join(self.failures))
            self.target = self.targets.pop(0)
            self.addresses = self.target.resolve(self.loop, self._resolved)
        self._until(max(0, self.dial_end - self.loop.now) / (len(self.targets) + max(1, len(self.addresses))))
        if self.addresses:
            self._connect(*self.addresses.pop(0))

    def _resolved(self, target, error):
        if self.state == DIAL and self.target is target and not self.upstream:
            self.addresses = list(target.addresses)
            if self.addresses:
                self._next_address()
            else:
                self._target_failed(f"the name cannot be resolved: {error}")

    def _connect(self, family, address):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            return self.close(Reason.RESOURCES, error.strerror)
        self.upstream = side = Side(self.loop.selector, sock, self)
        sock.setblocking(False)
        tune(sock)
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            return self._target_failed(os.strerror(code))
        side.on_write = self._tcp_up
        side.want(WRITE)

    def _tcp_up(self):
        side = self.upstream
        code = side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            return self._target_failed(os.strerror(code))
        side.on_write = side.flush
        if self.shim.server:
            return self._connected(side)
        self.greeting = b""
        side.on_read = self._starttls_answered
        side.want(READ)
        side.send(b"STARTTLS\n")

    def _starttls_answered(self):
        side = self.upstream
        data = side.recv()
        if data is None:
            return
        if not data:
            return self._target_failed(f"closed before it answered STARTTLS {side.error}")
        self.greeting += data
        try:
            if starttls_reply(self.greeting):
                self._start_tls(side, self.shim.name_for(self.target))
        except ProtocolError as error:
            self._target_failed(str(error))

    def _target_failed(self, text):
        self.target.failed = failure = f"{self.target.text}: {text.strip()}"
        self.failures.append(failure)
        self._next_address()

    def _connected(self, side):
        self.target.failed = None
        self.shim.counts["fresh"] += 1
        self._relay_over(side)
        if self.replay is not None:             # A kept session was dead: the same commands, once more.
            replay, self.replay = self.replay, None
            if replay:
                side.send(replay)
        elif self.shim.server and isinstance(self.greeting, bytes):
            self._take(self.greeting)           # The first lines of a client without TLS.

    # Relaying.

    def _relay_over(self, side):
        self.upstream, side.session, self.state = side, self, RELAY
        client = self.client
        side.on_read, side.on_write = self._from_upstream, self._drained
        client.on_read, client.on_write = self._from_client, self._drained
        self.last = self.loop.now
        self._until(self.shim.conf.idle_timeout)
        side.want(READ)
        client.want(READ)

    def _from_client(self):
        data = self.client.recv()
        if data:
            self._take(data)
        elif data is not None:
            self._client_ended()

    def _take(self, data):
        talk, client = self.talk, self.client
        self.last = self.loop.now
        self.bytes_in += len(data)
        up, back = talk.from_client(data)
        if talk.seen:
            self._note(talk.seen)
        if up:
            if self.replay is not None:
                self.replay = self.replay + up if len(self.replay) < CHUNK else None
            self.upstream.send(up)
        if back:
            client.send(back, _LAST if talk.done else 0)
        if client.out or self.upstream.out or talk.leaving or talk.local:
            self._settle()

    def _from_upstream(self):
        data = self.upstream.recv()
        if not data:
            return data is None or self._upstream_ended()
        talk = self.talk
        self.last = self.loop.now
        self.bytes_out += len(data)
        self.replay = None
        unusual = bool(talk.local) or talk.leaving or self.stopping
        self.client.send(talk.from_upstream(data))
        if unusual or self.client.out:
            self._settle()

    def _drained(self):
        """A side takes bytes again."""
        before = len(self.client.out)
        self.client.flush()
        if len(self.client.out) < before:
            self.last = self.loop.now
        if self.upstream:
            self.upstream.flush()
        if self.state == RELAY:
            self._settle()
        elif not self.client.out:
            self.client.say_goodbye()
            if self.client.eof:
                self.close(Reason.CLIENT)
            else:
                self.client.want(READ)

    def _settle(self):
        """What follows from bytes moved: LOGOUT, TERM, and who may be read while others cannot take more."""
        talk, client, upstream = self.talk, self.client, self.upstream
        if talk.done:
            if self.shim.reuse and talk.clean:
                self._release()
            return self.finish(Reason.LOGOUT)
        if self.stopping and not talk.busy:
            return self.finish(Reason.STOP)
        full = len(client.out) > HIGH_WATER
        wait = client.eof or full or upstream.out or self.stopping or talk.crowded
        client.want((0 if wait else READ) | (WRITE if client.out else 0))
        upstream.want((0 if full else READ) | (WRITE if upstream.out else 0))
        if full:
            self.loop.watch(self.last + STALL_LIMIT)
            self.deadline = min(self.deadline, self.last + STALL_LIMIT)

    def _note(self, seen):
        for verb, words in seen:
            if self.loop.log.debug:
                shown = printable(b" ".join(words if verb != b"PASSWORD" else [verb, b"..."]))
                self.log(DEBUG, f"command '{shown}'")
            if verb in NOTED and len(words) == 2:
                if verb == b"USERNAME":
                    self.user = printable(words[1])
                else:
                    self.ups = printable(words[1])
                self.log(INFO, f"{verb.decode()} {printable(words[1])}")
        seen.clear()

    # Ends.

    def _client_ended(self):
        if self.shim.reuse and self.talk.clean:
            self._release()
        elif self.talk.busy and not self.client.error:
            # Half-closed: upsd learns of it at once, and its last replies still arrive.
            self.upstream.half_close()
            self._settle()
            return self._until(DRAIN_LIMIT)
        self.close(Reason.CLIENT, self.client.error)

    def _upstream_ended(self):
        if self.replay is not None and self.talk.repeatable and not self.stopping:
            self.log(INFO, "the kept upstream session was dead: replaced")
            self.upstream.close()
            self.upstream = None
            return self._dial()
        self.finish(Reason.LOGOUT if self.talk.leaving else Reason.UPSD, self.upstream.error)

    def _release(self):
        side, self.upstream = self.upstream, None
        self.shim.keep(side)

    def finish(self, reason, detail=""):
        """Send the client what is on its way to it, say goodbye, and wait a little for its own end.

        A socket that is closed with bytes unread, or gets some afterwards, is reset and its last replies are lost.
        """
        client = self.client
        if reason in ORDINARY and not client.out and (reason is Reason.LOGOUT or client.settled()):
            return self.close(reason, detail)
        self._report(reason, detail)
        self.state = ENDING
        if self.upstream:
            self.shim.close_upstream(self.upstream)
            self.upstream = None
        client.on_read, client.on_write = self._discard, self._drained
        self._until(DRAIN_LIMIT)
        self._drained()

    def _discard(self):
        if self.client.recv() == b"":
            if self.client.out and not self.client.error:
                self.client.want(WRITE)
            else:
                self.close(Reason.CLIENT)

    def stop(self):
        """At TERM: the replies under way, no new commands."""
        self.stopping = True
        if self.state == RELAY:
            self._settle()
        elif self.state != ENDING:
            self.close(Reason.STOP)

    def expired(self):
        """The deadline has passed, unless activity has moved it."""
        conf = self.shim.conf
        if self.state == DIAL:
            self._target_failed("no answer in time")
        elif self.state == RELAY and not self.client.eof:
            full = len(self.client.out) > HIGH_WATER
            left = self.last + (STALL_LIMIT if full else conf.idle_timeout) - self.loop.now
            if left > 0:
                self._until(left)
            else:
                self.close(Reason.STALL if full else Reason.IDLE)
        elif self.state in (GREETING, HANDSHAKE):
            what = "STARTTLS" if self.state == GREETING else "end of the TLS handshake"
            self.close(Reason.TIMEOUT, f"no {what} within {conf.handshake_timeout} s")
        else:
            self.close(Reason.CLIENT)

    def close(self, reason, detail=""):
        """The one way down; idempotent."""
        if self.state == CLOSED:
            return
        self.state = CLOSED
        if self.upstream:
            self.shim.close_upstream(self.upstream)
        self.client.close()
        self.loop.sessions.discard(self)
        self.shim.discount(self.address)
        self._report(reason, detail)

    def _report(self, reason, detail):
        """The one line that says why; the first reason is the true one."""
        if self.ending:
            return
        self.ending = reason
        ordinary = reason in ORDINARY and not (reason is Reason.UPSD and detail)
        if not ordinary:
            self.shim.refused[reason.value] += 1
        why = f"{reason.value} ({detail})" if detail else reason.value
        seconds = self.loop.now - self.began
        text = f"closed: {why}, {seconds:.1f} s, {self.bytes_in} bytes in, {self.bytes_out} bytes out"
        if reason is Reason.RESOURCES:
            self.loop.log.limited(WARNING, reason, self.prefix + text)
        else:
            self.log(INFO if ordinary else WARNING, text)


def is_loopback(host):
    return host.startswith("127.") or host == "::1"


# --- Shims and upstream reuse --------------------------------------------------------------------


class Target:
    """One upstream and its addresses; these are looked up anew while the old ones serve."""

    def __init__(self, host, port):
        self.host, self.port, self.text = host, port, address_text((host, port))
        self.failed = None                      # The last failure, None when it works.
        self._waiting = None                    # The callbacks of a look-up under way.
        self.addresses, self._fresh_until = [], 0
        if host == "localhost" or numeric_family(host):
            self.addresses, self._fresh_until = look_up(host, port), float("inf")

    def resolve(self, loop, then):
        """The addresses known; where there are none yet, then(self, error) is called later."""
        if loop.now >= self._fresh_until:
            if self._waiting is None:
                loop.workers.submit_look_up(self.host, self.port, lambda found, error: self._resolved(loop, found, error))
                self._waiting = []
            if not self.addresses:
                self._waiting.append(then)
        return list(self.addresses)

    def _resolved(self, loop, found, error):
        waiting, self._waiting = self._waiting, None
        if found:
            self.addresses, self._fresh_until = found, loop.now + RESOLVE_TTL
        elif self.addresses:
            self._fresh_until = loop.now + RATE_LIMIT
            loop.log(WARNING, f"{self.text}: the name cannot be resolved, going on with the old addresses: {error}")
        for then in waiting:
            then(self, error)


class Shim:
    """A configured shim at run time: TLS context, upstreams, kept sessions, counters."""
    numbers = 0                                 # Sessions of all shims so far.

    def __init__(self, loop, conf, credentials):
        self.loop, self.conf, self.name, self.server = loop, conf, conf.name, conf.role == SERVER
        self.credentials, self.context = credentials, credentials.context
        self.reuse = 0 if self.server else conf.reuse
        self.targets = [Target(host, port) for host, port in conf.upstream]
        self.kept = collections.deque()         # (until, side), the oldest first
        self._tickets = {}                      # server name -> (until, ssl.SSLSession or None)
        self.counts = collections.Counter()     # "total" sessions, "fresh" and "reused" upstream sessions
        self.refused = collections.Counter()    # By the Reason's words.
        self.addresses = collections.Counter()  # Open sessions by the peer's address.
        self.retired = False                    # Replaced by a reload: keeps nothing any more.

    def count(self, address):
        """A session begins; its number."""
        self.counts["total"] += 1
        self.addresses[address[0]] += 1
        Shim.numbers += 1
        return Shim.numbers

    def discount(self, address):
        self.addresses[address[0]] -= 1
        if not self.addresses[address[0]]:
            del self.addresses[address[0]]

    def refusal(self, host):
        """Why that address gets no session, or None."""
        if self.conf.allow_from:
            import ipaddress
            if not any(ipaddress.ip_address(host.partition("%")[0]) in network for network in self.conf.allow_from):
                return Reason.ALLOW_FROM
        if len(self.loop.sessions) >= self.loop.max_sessions:
            return Reason.MAX_SESSIONS
        try:
            if self.counts["total"] % 16 == 0:
                bytearray(SPARE_MEMORY)
        except MemoryError:                     # What is left is for the sessions that run.
            return Reason.RESOURCES
        return Reason.PER_ADDRESS if self.addresses[host] >= self.conf.max_sessions_per_address else None

    def name_for(self, target) -> bytes:
        """What the certificate must carry, in ASCII as the ssl module takes it without the idna codec."""
        return (self.conf.server_name or target.host.partition("%")[0]).encode("ascii")

    def close_upstream(self, side):
        """Close it, and keep its ticket for the next handshakes with that server."""
        if side.peer and side.name and not side.error and self.loop.now >= self._tickets.get(side.name, (0, None))[0]:
            try:
                ticket = side.sock.session
            except (OSError, ValueError):
                ticket = None
            self._tickets[side.name] = (self.loop.now + TICKET_TTL, ticket if ticket and ticket.has_ticket else None)
        side.close()

    def ticket(self, name):
        """The ssl.SSLSession to resume with that server, or None (RFC 8446 2.2)."""
        return self._tickets.get(name, (0, None))[1]

    def drop_ticket(self, name):
        self._tickets.pop(name, None)

    def keep(self, side):
        """Put an upstream session that is as good as new aside, or close it."""
        if self.retired or len(self.kept) >= KEPT_MAX or side.eof or side.out:
            return self.close_upstream(side)
        entry = (self.loop.now + self.reuse, side)
        self.kept.append(entry)
        side.session = None
        side.on_read = lambda: self._kept_spoke(entry)
        self.loop.watch(entry[0])

    def _kept_spoke(self, entry):
        if entry[1].recv() is not None:         # Its end, or a byte nobody asked for: no good any more.
            self.kept.remove(entry)
            self.close_upstream(entry[1])

    def take_kept(self):
        if self.kept:
            self.counts["reused"] += 1
            return self.kept.pop()[1]
        return None

    def drop_kept(self, before):
        """Close what was kept until then; float("inf") for all."""
        while self.kept and self.kept[0][0] <= before:
            self.close_upstream(self.kept.popleft()[1])
        if self.kept:
            self.loop.watch(self.kept[0][0])

    def retire(self, heirs):
        """At reload: the shim of the same name goes on counting, nothing else is taken over."""
        for heir in heirs:
            if heir.name == self.name:
                heir.counts, heir.refused, heir.addresses = self.counts, self.refused, self.addresses
        self.retired = True
        self.drop_kept(float("inf"))


# --- Loop ----------------------------------------------------------------------------------------


class Loop:
    """The selectors loop: events to sides, deadlines to sessions, threads' results to whoever asked."""

    def __init__(self, log, threads, on_signal):
        self.log, self._on_signal = log, on_signal
        self.selector = selectors.DefaultSelector()
        self.now = time.monotonic()
        self.shims, self.sessions, self.max_sessions = [], set(), 0
        self.stopping = self.finished = False
        self._next = float("inf")               # When the earliest deadline may be due.
        self._timers = []                       # (when, callback)
        self._spare = None                      # A descriptor held back for when there are no others.
        self.hold_spare()
        reader, self._waker = socket.socketpair()
        reader.setblocking(False)
        self._waker.setblocking(False)
        self._wakes = Side(self.selector, reader, None, self._woken)
        self.workers = Workers(threads, self._wake)
        signal.set_wakeup_fd(self._waker.fileno())

    def _wake(self):
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            pass                                # Full, so it will wake anyway.

    def _woken(self):
        for number in (self._wakes.recv() or b"").replace(b"\0", b""):
            self._on_signal(number)
        while self.workers.done:
            session, then, result, error = self.workers.done.popleft()
            self.guarded(session, then, result, error)

    def guarded(self, session, call, *args):
        try:
            call(*args)
        except Exception as error:
            self._fault(session, error)

    def _fault(self, session, error):
        if isinstance(error, ProtocolError):
            session.close(error.reason, str(error))
        elif isinstance(error, MemoryError):
            self.log.limited(ERROR, "memory", "out of memory: a session is closed")
            if session:
                session.close(Reason.RESOURCES)
        else:
            # Made by hand, since the module traceback may be out of reach: no descriptors, a chroot.
            self.log(ERROR, "internal error, please report it:\nTraceback (most recent call last):")
            trace = error.__traceback__
            while trace:
                code = trace.tb_frame.f_code
                self.log(ERROR, f"  {code.co_filename}:{trace.tb_lineno}, in {code.co_name}")
                trace = trace.tb_next
            self.log(ERROR, f"{type(error).__name__}: {error}")
            if session:
                session.close(Reason.BUG)

    def watch(self, when):
        if when < self._next:
            self._next = when

    def at(self, seconds, callback):
        self._timers.append((self.now + seconds, callback))
        self.watch(self.now + seconds)

    def run(self):
        select, monotonic = self.selector.select, time.monotonic
        self.log.hold = True
        while not self.finished:
            events = select(max(0, self._next - monotonic()) if self._next < float("inf") else None)
            self.now = monotonic()
            for key, mask in events:
                side = key.data
                try:
                    if mask & side.mask & READ:
                        side.on_read()
                    if mask & side.mask & WRITE:
                        side.on_write()
                except Exception as error:
                    self._fault(side.session, error)
            if self.now >= self._next:
                self.guarded(None, self._sweep)
            if self.log.lines:
                self.guarded(None, self.log.flush)
        self.log.hold = False

    def _sweep(self):
        """Deadlines and timers that are due; looked at four times a second at the most."""
        self._next = float("inf")
        for session in list(self.sessions):
            if session.deadline <= self.now:
                self.guarded(session, session.expired)
            else:
                self.watch(session.deadline)
        for shim in self.shims:
            shim.drop_kept(self.now)
        timers, self._timers = self._timers, []
        for when, callback in timers:
            if when <= self.now:
                self.guarded(None, callback)
            else:
                self.at(when - self.now, callback)
        self._next = max(self._next, self.now + 0.25)

    def listen(self, sock, shim):
        side = Side(self.selector, sock, None, lambda: self._accept(side))
        side.shim = shim
        return side

    def _accept(self, listener):
        shim = listener.shim
        for _ in range(ACCEPT_BATCH):
            try:
                sock, address = listener.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                return self._exhausted(listener, error)
            reason = shim.refusal(address[0])
            if reason:
                shim.refused[reason.value] += 1
                self.log.limited(WARNING, (shim.name, reason), f"[{shim.name}] {address_text(address)}: refused: {reason.value}")
                sock.close()
                continue
            sock.setblocking(False)
            session = Session(self, shim, sock, address)
            self.sessions.add(session)
            self.guarded(session, session.start)

    def _exhausted(self, listener, error):
        """Without descriptors a connection cannot even be refused but with the one held back."""
        listener.shim.refused[Reason.RESOURCES.value] += 1
        self.log.limited(ERROR, "accept", f"[{listener.shim.name}] a new session is refused: {error.strerror}")
        sock = self.accept_with_spare(listener)
        if sock:
            sock.close()
            self.hold_spare()

    def hold_spare(self):
        try:
            self._spare = self._spare or os.open(os.devnull, os.O_RDONLY)
        except OSError:
            pass                                # Tried again when a listener has rested.

    def accept_with_spare(self, listener):
        """The next connection, in the spare descriptor's place, or None: then the listener rests a second."""
        try:
            if self._spare:
                os.close(self._spare)
                self._spare = None
            return listener.sock.accept()[0]
        except OSError:
            listener.want(0)
            self.at(1, lambda: (self.hold_spare(), listener.closed or listener.want(READ)))
            return None


# --- Status --------------------------------------------------------------------------------------


def status_data(daemon):
    """What -c status shows, as plain data."""
    loop = daemon.loop
    shims = [{
        "name": shim.name, "role": shim.conf.role,
        "listen": [address_text(side.sock.getsockname()) for side in daemon.listeners.values() if side.shim is shim],
        "upstream": [{"address": target.text, "state": target.failed or "ok"} for target in shim.targets],
        "certificates": [{"what": each.what, "days_left": days_left(each),
                          "holds": days_text(each.not_after, each.not_before)}
                         for each in shim.credentials.loaded],
        "sessions": sum(shim.addresses.values()), "sessions_total": shim.counts["total"],
        "upstream_fresh": shim.counts["fresh"], "upstream_reused": shim.counts["reused"], "kept": len(shim.kept), "refused": dict(shim.refused)} for shim in loop.shims]
    sessions = []
    for session in sorted(loop.sessions, key=lambda session: session.number):
        peer = session.client.peer or session.upstream and session.upstream.peer or Peer("", "", [], "", 0)
        sessions.append({
            "number": session.number, "shim": session.shim.name, "peer": address_text(session.address),
            "seconds": int(loop.now - session.began), "state": session.state, "tls": peer.version,
            "class": session.access or "", "user": session.user or "", "ups": session.ups or "",
            "bytes_in": session.bytes_in, "bytes_out": session.bytes_out, "identity": peer.names})
    return {"version": VERSION, "pid": os.getpid(), "seconds": int(loop.now - daemon.began),
            "shims": shims, "sessions": sessions}


def status_table(data):
    lines = ["nutshim {version}, process {pid}, up {seconds} s".format(**data)]
    for shim in data["shims"]:
        lines.append(f"[{shim['name']}] {shim['role']}, listening on {', '.join(shim['listen'])}")
        lines += [f"    upstream {target['address']}: {target['state']}" for target in shim["upstream"]]
        lines += [f"    {each['what']} {each['holds']}" for each in shim["certificates"]]
        lines.append("    sessions {sessions} now, {sessions_total} since start; upstream sessions: {upstream_fresh} fresh, "
                     "{upstream_reused} times reused, {kept} kept".format(**shim))
        lines += [f"    refused {count}: {reason}" for reason, count in sorted(shim["refused"].items())]
    columns = ("number", "shim", "peer", "seconds", "state", "tls", "class", "user", "ups", "bytes_in", "bytes_out", "identity")
    rows = [columns] + [tuple(map(str, map(session.get, columns[:-1]))) + (", ".join(session["identity"]),)
                        for session in data["sessions"]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(lines + ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows])


METRICS = {                                 # name: (type, help), in the order of the output
    "up_seconds": ("gauge", "seconds since the start"),
    "sessions": ("gauge", "sessions now"),
    "sessions_total": ("counter", "sessions since the start"),
    "upstream_fresh": ("counter", "upstream sessions opened"),
    "upstream_reused": ("counter", "sessions that an open upstream session served"),
    "kept": ("gauge", "idle upstream sessions kept for reuse"),
    "refused_total": ("counter", "sessions refused, by reason"),
    "upstream_up": ("gauge", "1 if the last attempt at this upstream worked"),
    "certificate_days_left": ("gauge", "days until a certificate or revocation list ends, or +Inf"),
}


def status_prometheus(data):
    """The numbers in the text format of Prometheus."""
    series = {name: {} for name in METRICS}             # {labels: value}: none stands twice

    def metric(name, value, **labels):
        def escaped(text):
            return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs = ",".join(f'{label}="{escaped(text)}"' for label, text in labels.items())
        key = f"{{{pairs}}}" if pairs else ""
        value = float("inf") if value is None else int(value)
        series[name][key] = min(value, series[name].get(key, value))
    metric("up_seconds", data["seconds"])
    for shim in data["shims"]:
        name = shim["name"]
        for each in ("sessions", "sessions_total", "upstream_fresh", "upstream_reused", "kept"):
            metric(each, shim[each], shim=name)
        for reason, count in shim["refused"].items():
            metric("refused_total", count, reason=reason, shim=name)
        for target in shim["upstream"]:
            metric("upstream_up", target["state"] == "ok", upstream=target["address"], shim=name)
        for each in shim["certificates"]:
            metric("certificate_days_left", each["days_left"], what=each["what"], shim=name)
    lines = []
    for name, found in series.items():
        if found:
            kind, text = METRICS[name]
            lines += [f"# HELP nutshim_{name} {text}", f"# TYPE nutshim_{name} {kind}"]
            lines += [f"nutshim_{name}{key} {'+Inf' if value == float('inf') else value}"
                      for key, value in found.items()]
    return "\n".join(lines)


def control_path(conf):
    return os.path.splitext(conf.pidfile)[0] + ".sock"


def ask_daemon(conf, word):
    """One word to the running daemon: (exit status, answer)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        try:
            sock.connect(control_path(conf))
            sock.sendall(word.encode() + b"\n")
            answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        except OSError as error:
            return 1, f"no nutshim answers at {control_path(conf)}: {error.strerror or error}"
    status, _, text = answer.partition("\n")
    return (0 if status == "OK" else 1), text


def control(word, conf, form):
    """-c: reload, stop or status; the exit status."""
    status, text = ask_daemon(conf, word)
    if status == 0 and word == "status":
        text = {"json": lambda data: json.dumps(data, indent=1), "prometheus": status_prometheus,
                None: status_table}[form](json.loads(text))
    print(text, file=sys.stderr if status else sys.stdout)
    deadline = time.monotonic() + STOP_GRACE + 3
    while word == "stop" and status == 0 and time.monotonic() < deadline and not ask_daemon(conf, "")[1].startswith("no "):
        time.sleep(0.05)
    return status


# --- Probe ---------------------------------------------------------------------------------------


def probe(conf, context):
    """-p: each step towards a client shim's upstream with its result; the exit status."""
    return 0 if any([_probe(conf, context, host, port) for host, port in conf.upstream]) else 1


def _probe(conf, context, host, port):
    name = conf.server_name or host.partition("%")[0]
    sock = None

    def say(step, text):
        print(f"{step:12}{text}", flush=True)
    try:
        step = "resolve"
        found = look_up(host, port)
        say(step, f"{host}: {', '.join(address_text(address) for _, address in found)}")
        step = "connect"
        sock = _probe_connect(found, conf.handshake_timeout)
        say(step, address_text(sock.getpeername()))
        step = "STARTTLS"
        _probe_starttls(sock)
        say(step, "OK")
        step = "TLS"
        try:
            sock = context.wrap_socket(sock, server_hostname=name.encode("ascii"))
        except ssl.SSLCertVerificationError as error:
            step = "name" if error.verify_code in (62, 64) else "chain"
            raise ValueError(f"{tls_error(error, name)}. {_probe_stranger(conf, found, name)}") from None
        peer = describe_peer(sock)
        say(step, f"{peer.version}, {peer.cipher}")
        say("certificate", f"{', '.join(peer.names) or 'without names'}, {days_text(peer.not_after)}")
        say("chain", "OK" if conf.verify in ("full", "chain") else f"not checked, as verify = {conf.verify}")
        say("name", f"{name} OK" if conf.verify == "full" else f"not checked, as verify = {conf.verify}")
        step = "pin"
        if conf.pin and peer.pin not in conf.pin:
            raise ValueError(f"the server's key has the pin {peer.pin}, which pin does not name")
        say(step, peer.pin + (" OK" if conf.pin else ""))
        step = "upsd"
        for command in (b"VER\n", b"LIST UPS\n"):
            sock.sendall(command)
            replies, answer, ends = Replies(), b"", []
            while not ends:
                data = sock.recv(CHUNK)
                if not data:
                    raise ValueError(f"closed before it answered {command.decode().strip()}: does upsd run there? The server shim's log tells")
                answer, ends = answer + data, replies.feed(data)
            if answer.startswith(b"ERR"):
                raise ValueError(f"{command.decode().strip()} was answered with '{printable(answer.strip())}': what does permit say there?")
            for line in answer.splitlines():
                say(step, printable(line))
        return True
    except (OSError, ValueError, ProtocolError) as error:
        words = f"no answer within {conf.handshake_timeout} s" if isinstance(error, socket.timeout) else tls_error(error, name)
        say(step, f"FAILED with {address_text((host, port))}: {words}")
        return False
    finally:
        if sock:
            sock.close()


def _probe_connect(found, seconds):
    for family, address in found:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(seconds)
        try:
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            last = error
    raise last


def _probe_starttls(sock):
    sock.sendall(b"STARTTLS\n")
    answer = b""
    while not starttls_reply(answer):
        data = sock.recv(CHUNK)
        if not data:
            raise ValueError("closed before it answered STARTTLS")
        answer += data


def _probe_stranger(conf, found, name):
    """Whose certificate was refused, looked at over a second connection, on which nothing is said."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _probe_connect(found, conf.handshake_timeout) as sock:
            _probe_starttls(sock)
            with context.wrap_socket(sock) as tls:
                peer = describe_peer(tls)
    except (OSError, ValueError, ProtocolError):
        return "It could not be looked at again"
    return (f"The certificate {name_words(peer.names, name)}; it {days_text(peer.not_after)}; "
            f"its pin is {peer.pin}")


# --- Daemon --------------------------------------------------------------------------------------


class Daemon:
    """The running program: configuration, listeners, pidfile, user, reload and stop."""

    def __init__(self, path, args, log):
        self.path, self.args, self.log = os.path.abspath(path), args, log
        self.listeners = {}                     # (family, address as configured, shim if any port will do) -> Side
        self.began = time.monotonic()
        self.conf = self.loop = self._pidfile = self._notify = None

    def run(self, ready):
        """Open everything, become the user, say ready() and serve; ConfigError or OSError before that."""
        conf, credentials, warnings = check_config(self.path, self.args.user, self.args.chroot)
        if conf.log == "stderr" and not self.args.foreground:
            raise ConfigError(conf.at("log") + "stderr needs -F or -D")
        self.conf = conf
        os.umask(0o027)
        self.log.use(*self._open_log(conf))
        self._lock_pidfile()
        self.loop = Loop(self.log, conf.handshake_threads, self._signalled)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)      # The loop learns of it through the wake-up descriptor.
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self._apply(conf, credentials, warnings, self._handed_over())
        try:
            self._open_control()
            self._open_notify()
            self._drop_privileges()
        except ConfigError:
            self._remove_files()
            raise
        self.log(NOTICE, f"nutshim {VERSION} started, {ssl.OPENSSL_VERSION}")
        self.notify("READY=1")
        ready()
        self._tell_expiries()
        self._each_day()
        self.loop.run()
        return 0

    def _open_log(self, conf):
        """What log.use() takes."""
        target = "stderr" if self.args.debug else conf.log
        try:
            return target, self.log.open(target)
        except OSError as error:
            raise conf.error("log", conf.log, error) from None

    # Listeners.

    def _apply(self, conf, credentials, warnings, handed_over=()):
        """Make a configuration the running one: all of it or, on ConfigError, none."""
        wanted, opened = {}, {}
        shims = [Shim(self.loop, each, credentials[each.name]) for each in conf.shims]
        try:
            for shim in shims:
                at = shim.conf.at("listen")
                for key in self._listen_keys(shim.conf, at):
                    if key in wanted:
                        raise ConfigError(f"{at}{address_text(key[1])} is [{wanted[key].name}]'s already")
                    sock = None
                    if key not in self.listeners:
                        sock = _take_handed_over(handed_over, key) or self._bind(key, at)
                        if not sock:
                            continue                    # An address of a family that this machine lacks.
                        opened[key] = sock
                    wanted[key] = shim
                if shim not in wanted.values():
                    raise ConfigError(at + "none of these addresses exists here")
        except ConfigError:
            for sock in opened.values():
                sock.close()
            raise
        for key in [key for key in self.listeners if key not in wanted]:
            self.listeners.pop(key).close()
        for key, shim in wanted.items():
            if key in opened:
                self.listeners[key] = self.loop.listen(opened[key], shim)
                upstream = ", ".join(target.text for target in shim.targets)
                self.log(INFO, f"[{shim.name}] listening on {address_text(opened[key].getsockname())} "
                               f"({shim.conf.role}, upstream {upstream})")
            self.listeners[key].shim = shim
        for shim in self.loop.shims:
            shim.retire(shims)
        self.loop.shims, self.loop.max_sessions, self.conf = shims, conf.max_sessions, conf
        for text in warnings:
            self.log(WARNING, text)

    def _listen_keys(self, conf, at):
        keys = {}
        for host, port in conf.listen:
            try:
                for where in ("0.0.0.0", "::") if host == "*" else (host,):
                    keys.update(((family, address, "" if port else conf.name), None) for family, address in look_up(where, port))
            except OSError as error:
                raise ConfigError(f"{at}{host}: {error.strerror}") from None
        return keys

    def _bind(self, key, at):
        family, address, _ = key
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            tune(sock)                                  # Accepted sockets inherit it.
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
            return sock
        except OSError as error:
            if sock:
                sock.close()
            if family == socket.AF_INET6 and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                return None
            hint = {errno.EACCES: "; below 1024 a port needs root at the start", errno.EADDRINUSE: "; another program has it"}
            raise ConfigError(f"{at}{address_text(address)}: {error.strerror}{hint.get(error.errno, '')}") from None

    def _handed_over(self):
        """The sockets that systemd has opened (sd_listen_fds(3))."""
        count = int(os.environ.get("LISTEN_FDS", "0")) if os.environ.get("LISTEN_PID") == str(os.getpid()) else 0
        socks = [socket.socket(fileno=fd) for fd in range(3, 3 + count)]
        for sock in socks:
            tune(sock)
            sock.setblocking(False)
        return socks

    # The process: pidfile, user, service manager.

    def _lock_pidfile(self):
        """The lock, not the file, tells whether nutshim runs, so a stale file does no harm."""
        path = self.conf.pidfile
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.write(fd, b"%d\n" % os.getpid())
        except BlockingIOError:
            number = os.read(fd, 20).decode("ascii", "replace").strip()
            raise ConfigError(f"{self.conf.at('pidfile')}{path}: nutshim is running already, as process {number}") from None
        except OSError as error:
            fault = self.conf.error("pidfile", path, error)
            if not self.args.foreground:
                raise fault from None
            return self.log(WARNING, f"{fault}; -c will not work")
        self._pidfile = fd

    def _drop_privileges(self):
        conf = self.conf
        account = None
        if conf.user or os.geteuid() == 0:
            try:
                account = pwd.getpwnam(conf.user or "nut")
            except KeyError:
                self.log(WARNING, conf.at("user") + "going on as root, since there is no user nut")
        if account and account.pw_uid == os.geteuid():
            account = None
        at = conf.at("user")
        try:
            if account and self._pidfile is not None:
                os.lchown(control_path(conf), account.pw_uid, account.pw_gid)
            if account and self.log.fd > 2:
                os.fchown(self.log.fd, account.pw_uid, account.pw_gid)
            if conf.chroot:
                import ipaddress                # noqa: F401  Out of reach afterwards.
                at = conf.at("chroot") + conf.chroot + ": "
                os.chroot(conf.chroot)
            os.chdir("/")
            if not account:
                return
            # While nothing is closed to us.
            closed = {path: closed_steps(path, account) for path in self._files()}
            at = conf.at("user") + account.pw_name + ": "
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
        except OSError as error:
            raise ConfigError(at + error.strerror) from None
        if (os.getresuid(), os.getresgid(), os.getgroups()) != ((account.pw_uid,) * 3, (account.pw_gid,) * 3, []):
            raise ConfigError(at + "the change of user did not work")
        for path, steps in closed.items():
            if not os.access(path, os.R_OK):
                cures = " and ".join(f"'{cure}'" for _, cures in steps for cure in cures)
                where = f" ({steps[0][0]} is closed to it)" if steps and steps[0][0] != path else ""
                self.log(WARNING, f"{path}: {account.pw_name} cannot read it{where}, "
                                  "so a reload will fail" + (f"; {cures} let it" if cures else ""))

    def _files(self):
        """All files that a reload reads, and trust's folders with theirs."""
        paths = [self.conf.path]
        for shim in self.conf.shims:
            paths += [shim.certificate, shim.key, shim.trust] + (shim.crl or [])
            if shim.trust and os.path.isdir(shim.trust):
                paths += [os.path.join(shim.trust, name) for name in sorted(os.listdir(shim.trust))]
        return dict.fromkeys(path for path in paths if path and path != "system")

    def _open_notify(self):
        path = os.environ.get("NOTIFY_SOCKET")
        if path:
            self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._notify.setblocking(False)
            if self._notify.connect_ex("\0" + path[1:] if path[0] == "@" else path):
                self.log(WARNING, f"NOTIFY_SOCKET {path} does not answer")
            if os.environ.get("WATCHDOG_USEC", "").isdigit():
                self._watchdog(int(os.environ["WATCHDOG_USEC"]) / 2e6)

    def _watchdog(self, seconds):
        self.notify("WATCHDOG=1")
        self.loop.at(seconds, lambda: self._watchdog(seconds))

    def notify(self, text):
        """Tell the service manager (sd_notify(3))."""
        if self._notify:
            try:
                self._notify.send(text.encode())
            except OSError:
                pass

    # Requests: signals and the status socket.

    def _open_control(self):
        if self._pidfile is None:
            return
        path = control_path(self.conf)
        try:
            if os.path.exists(path):
                os.unlink(path)                         # A killed daemon's: the pidfile's lock is ours.
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            mask = os.umask(0o177)
            sock.bind(path)
            os.umask(mask)
        except OSError as error:
            raise self.conf.error("pidfile", path, error) from None
        sock.listen(8)
        sock.setblocking(False)
        side = Side(self.loop.selector, sock, None, lambda: self._control_accept(side))

    def _control_accept(self, listener):
        try:
            sock = listener.sock.accept()[0]
        except BlockingIOError:
            return
        except OSError:
            sock = self.loop.accept_with_spare(listener)
            if not sock:
                return
            self.loop.hold_spare()
        sock.setblocking(False)
        side = Side(self.loop.selector, sock, None, lambda: self._control_read(side))

    def _control_read(self, side):
        data = side.recv()
        if data is None:
            return
        side.on_write = lambda: (side.flush(), side.out or side.close())
        side.on_read = side.close
        answer = "ERR\nan internal error, which the log tells"
        try:
            answer = self._request(data.decode("ascii", "replace").strip())
        finally:
            side.send(answer.encode())
            if not side.out:
                side.close()

    def _request(self, word):
        if word == "status":
            return "OK\n" + json.dumps(status_data(self))
        if word == "reload":
            fault = self.reload()
            return "ERR\n" + fault if fault else "OK\nreloaded"
        if word == "stop":
            self.loop.at(0, self.stop)
            return "OK\nstopping"
        return "ERR\nexpected status, reload or stop"

    def _signalled(self, number):
        if number == signal.SIGHUP:
            self.reload()
        elif number in (signal.SIGTERM, signal.SIGINT):
            self.stop()

    def reload(self):
        """Take the configuration anew; on a fault nothing changes. Returns the fault, or None."""
        if self.loop.stopping:
            return "nutshim is stopping"
        self.notify(f"RELOADING=1\nMONOTONIC_USEC={int(time.monotonic() * 1e6)}")
        old, log = self.conf, None
        try:
            conf, credentials, warnings = check_config(self.path, self.args.user, self.args.chroot)
            fixed = [option for option in ("user", "chroot", "pidfile", "handshake_threads")
                     if getattr(conf, option) != getattr(old, option) and (option in conf.lines or option in old.lines)]
            for option in ("user", "chroot", "pidfile"):
                setattr(conf, option, getattr(old, option))
            log = self._open_log(conf)
            self._apply(conf, credentials, warnings)
        except (ConfigError, OSError) as error:
            if log and log[1] > 2:
                os.close(log[1])
            text = str(error) + (f"\n(looked for inside the chroot {old.chroot})" if old.chroot else "")
            self.log(ERROR, "reload failed, going on as before:\n" + text)
            self.notify("READY=1")
            return text
        self.log.use(*log)
        if fixed:
            self.log(WARNING, ", ".join(fixed) + ": takes effect at the next start")
        self.log(NOTICE, f"reloaded {self.path}")
        self._tell_expiries()
        self.notify("READY=1")
        return None

    def _each_day(self):
        self.loop.at(86400, lambda: (self._tell_expiries(), self._each_day()))

    def _tell_expiries(self):
        for shim in self.loop.shims:
            for each in shim.credentials.loaded:
                words = days_text(each.not_after, each.not_before)
                self.log(date_level(each), f"[{shim.name}] {each.what} {words}")

    def stop(self):
        """No new sessions, the replies under way, the end."""
        loop = self.loop
        if loop.stopping:
            return
        loop.stopping = True
        self.log(NOTICE, f"stopping with {len(loop.sessions)} sessions")
        self.notify("STOPPING=1")
        for side in self.listeners.values():
            side.close()
        for shim in loop.shims:
            shim.retire(())
        for session in list(loop.sessions):
            loop.guarded(session, session.stop)
        self._end(loop.now + STOP_GRACE)

    def _end(self, deadline):
        loop = self.loop
        for session in list(loop.sessions):
            if session.state == ENDING and not session.client.out and session.client.settled():
                session.close(Reason.STOP)              # Its last reply has been acknowledged meanwhile.
        if loop.sessions and loop.now < deadline:
            return loop.at(0.1, lambda: self._end(deadline))
        for session in list(loop.sessions):
            session.close(Reason.STOP)
        loop.finished = True
        self._remove_files()
        self.log(NOTICE, "stopped")

    def _remove_files(self):
        if self._pidfile is not None:
            os.ftruncate(self._pidfile, 0)
            for path in (self.conf.pidfile, control_path(self.conf)):
                try:
                    os.unlink(path)
                except OSError:
                    pass                                # In /run only root may: an empty file stays.


def closed_steps(path: str, account) -> list:
    """What closes a file to an account without other groups: [(folder or file, commands)].

    The permission bits of each folder on the way, behind links too, and of the file count. account
    is one of pwd. The commands, followed literally, open it for the account's group.
    """
    found, here, todo, links = [], "/", os.path.abspath(path).split("/"), 0
    while True:
        try:
            info = os.lstat(here)
            if stat.S_ISLNK(info.st_mode) and links < 40:               # MAXSYMLINKS of Linux
                links += 1
                todo = os.readlink(here).split("/") + todo
                here = "/" if todo[0] == "" else os.path.dirname(here)
                continue
        except OSError:
            return found                                # It is not there, or is not ours to see.
        todo = [part for part in todo if part not in ("", ".")]
        folder = stat.S_ISDIR(info.st_mode)
        need = "x" * folder if todo else "r" + "x" * folder
        who = "g" if info.st_gid == account.pw_gid else "o"
        who = "u" if info.st_uid == account.pw_uid else who
        bits = info.st_mode >> 3 * "ogu".index(who)
        lacks = "".join(letter for letter in need if not bits & {"r": 4, "x": 1}[letter])
        if lacks and here not in [place for place, _ in found]:
            # Another owner's file is opened by way of its group, whose bits then count.
            cures = [f"chgrp {account.pw_gid} {here}"] * (who == "o") + [f"chmod g+{need} {here}"]
            found.append((here, [f"chmod u+{lacks} {here}"] if who == "u" else cures))
        if not todo:
            return found
        part = todo.pop(0)
        here = os.path.dirname(here) if part == ".." else os.path.join(here, part)


def _take_handed_over(socks, key):
    for sock in socks:
        if sock.family == key[0] and sock.getsockname()[:2] == key[1][:2]:
            socks.remove(sock)
            return sock
    return None


# --- Main ----------------------------------------------------------------------------------------


def background(run):
    """Double fork. The parent waits until the daemon is ready, so that a failed start is told; exit status."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return 0 if os.read(reader, 1) else 1
    os.setsid()
    if os.fork():
        os._exit(0)

    null = os.open(os.devnull, os.O_RDWR)              # Before a chroot hides it.

    def ready():
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.write(writer, b"1")
        os.close(writer)
    return run(ready)


def print_check(conf, credentials, warnings):
    for text in warnings:
        print(f"warning: {text}")
    for shim in conf.shims:
        held = credentials[shim.name]
        listen, upstream = (", ".join(map(address_text, addresses)) for addresses in (shim.listen, shim.upstream))
        print(f"[{shim.name}] {shim.role} on {listen}, upstream {upstream}")
        for each in held.loaded:
            mark = "    " if date_level(each) == INFO else "warning: "
            print(f"{mark}{each.what} {days_text(each.not_after, each.not_before)}")
        if held.own:
            print(f"    its names: {names_text(held.own.names)}\n    pin = {held.own.pin}")
    print(f"{conf.path}: no fault found")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="nutshim.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="TLS 1.3 for NUT: in front of upsd (role server) and of upsmon, upsc, ... (role client).",
        epilog="options in nutshim.conf:\n" + "\n".join(f"  {each.name:25} {each.help}" for each in OPTIONS))
    add = parser.add_argument
    add("-f", metavar="FILE", dest="file", help="configuration file")
    add("-D", action="count", default=0, dest="debug", help="debug: foreground, log to stderr; repeat for more")
    add("-F", action="store_true", dest="foreground", help="foreground, log where the option log says")
    add("-u", metavar="USER", dest="user", help="become USER once the ports are open")
    add("-r", metavar="DIR", dest="chroot", help="confine to DIR")
    add("-t", action="store_true", dest="test", help="check the configuration, report every fault")
    add("-c", choices=("reload", "stop", "status"), dest="command", help="speak to the running daemon")
    add("--json", action="store_const", const="json", dest="form", help="with -c status")
    add("--prometheus", action="store_const", const="prometheus", dest="form", help="with -c status")
    add("-p", metavar="NAME", dest="probe", help="probe client shim NAME's upstream")
    add("-V", action="version", version=f"nutshim {VERSION}, Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}")
    args = parser.parse_args(argv)
    while os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) <= 2:
        pass                                            # Started with 0, 1 or 2 closed: keep them from our sockets.
    args.foreground = args.foreground or args.debug > 0
    try:
        path = args.file or find_config()
        if args.command:
            return control(args.command, read_config(path)[0], args.form)
        conf, credentials, warnings = check_config(path, args.user, args.chroot)
        if args.test:
            print_check(conf, credentials, warnings)
        elif args.probe:
            for shim in conf.shims:
                if shim.name == args.probe and shim.role == CLIENT:
                    return probe(shim, credentials[shim.name].context)
            raise ConfigError(f"{path}: expected a client shim's name, there is no such [{args.probe}]")
        else:
            daemon = Daemon(path, args, Log(args.debug))
            return daemon.run(lambda: None) if args.foreground else background(daemon.run)
        return 0
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
