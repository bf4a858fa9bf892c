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
into commands and upsd's bytes into replies, so it knows at any moment how many replies are owed.
The order of the shim's own replies, the access classes, STARTTLS and the reuse of upstream sessions
all rest on that one count.  One selectors loop moves the bytes.

Threads.  Only the main thread, the loop's, touches sessions, sockets in the selector, the log and
the configuration.  Handshake threads run single steps of do_handshake() on a non-blocking socket
that the loop has let go of; a look-up thread runs getaddrinfo().  They hand results back through
Workers.done and wake the loop by a byte on a socket pair, where signals arrive as well.

Faults.  ConfigError is the administrator's and names FILE:LINE; ProtocolError and OSError are a
peer's and end its session with one log line.  Anything else is a bug: a traceback in the log, that
session closed, the daemon lives.

Sections: limits - options - errors - protocol core - certificates and TLS contexts - log -
sockets and threads - sessions - shims and upstream reuse - loop - control and status - probe -
daemon - main.
"""
from __future__ import annotations

import argparse
import binascii
import collections
import enum
import errno
import fcntl
import hashlib
import os
import pwd
import queue
import re
import selectors
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import types

VERSION = "1.0"

# --- Limits: each bounds what a peer can make this process hold, or wait for -----------------------

CHUNK = 16384             # bytes a read: the payload of one TLS record (RFC 8446 5.1)
MAX_COMMAND = 33 * 1024   # bytes a command: 32 words of 512 characters, each escaped (NUT parseconf.h)
MAX_GREETING = 1024       # bytes a line before TLS: enough for any command a plain client tries
MAX_GREETING_LINES = 8    # lines before TLS that are answered; then it is not a TLS client
MAX_REPLY_LINE = 512      # upsd cuts a reply line here, without a newline (NUT_NET_ANSWER_MAX)
MAX_LOCAL_REPLIES = 64    # own replies waiting for their turn, before the client is read again
HIGH_WATER = 64 * 1024    # bytes unsent to one side, before its other side has to wait
STALL_LIMIT = 10          # seconds a peer may leave replies unread: upsd's writes block, for everybody
DRAIN_LIMIT = 5           # seconds for what is still under way after one side has closed
STOP_GRACE = 2            # seconds for replies under way at TERM; procd kills after 5
ACCEPT_BATCH = 16         # connections taken at once, so that a storm does not starve the others
BACKLOG = 128             # connections waiting in the kernel
KEPT_MAX = 32             # idle upstream sessions kept for reuse, per shim
RESOLVE_TTL = 60          # seconds a name's addresses are used without asking again
RATE_LIMIT = 10           # seconds between two log lines of the same refusal
CONTROL_LINE = 64         # bytes of a request on the status socket
EXPIRY_WARNING = 30       # days before the end of a certificate
KEEPALIVE = (30, 10, 3)   # TCP: seconds idle, seconds between probes, probes

# --- Options: the one source for the parser, the help and the documentation's tests ---------------


def _number(low, high):
    def parse(text, _base):
        if not text.isdigit() or not low <= int(text) <= high:
            raise ValueError("expected a whole number from %d to %d" % (low, high))
        return int(text)
    return parse


def _choice(*words):
    def parse(text, _base):
        if text not in words:
            raise ValueError("expected %s" % " or ".join(words))
        return text
    return parse


def _text(text, _base):
    return text


def _path(text, base):
    return os.path.join(base, text)


def _log(text, base):
    return text if text in ("syslog", "stderr") else os.path.join(base, text)


def _trust(text, base):
    return text if text == "system" else os.path.join(base, text)


def _list(item):
    def parse(text, base):
        return [item(part.strip(), base) for part in text.split(",")]
    return parse


def _address(default_host):
    """HOST[:PORT], [IPv6][:PORT], a bare IPv6 address -> (host, port or None)."""
    def parse(text, _base):
        match = re.match(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^\s:\[\]]+))(?::(\d{1,5}))?$", text)
        if match:
            host, port = match.group(1) or match.group(2), match.group(3)
        elif numeric_family(text) == socket.AF_INET6:
            host, port = text, None
        else:
            raise ValueError("expected HOST[:PORT], an IPv6 address in brackets, not '%s'" % text)
        if not host.isascii() if hasattr(host, "isascii") else any(ord(c) > 127 for c in host):
            raise ValueError("expected ASCII: write '%s' in its xn-- form" % host)
        if host == "*" and default_host != "*" or port and int(port) > 65535:
            raise ValueError("expected HOST[:PORT] with a port up to 65535, not '%s'" % text)
        return host, int(port) if port else None
    return parse


def _pin(text, _base):
    try:
        if text.startswith("sha256//") and len(binascii.a2b_base64(text[8:])) == 32:
            return text
    except binascii.Error:
        pass
    raise ValueError("expected sha256//BASE64 of a SHA-256, as 'nutshim.py -t' prints it, not '%s'" % text)


def _network(text, _base):
    import ipaddress                                    # Rarely used, so not imported at every start.
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError("expected an address or ADDRESS/BITS: %s" % error) from None


def _permit(text, _base):
    identity, colon, access = (part.strip() for part in text.rpartition(":"))
    if not colon or access not in CLASSES:
        raise ValueError("expected IDENTITY: %s, not '%s'" % (" or ".join(CLASSES), text))
    if identity.startswith("sha256//"):
        return _pin(identity, _base), access
    if identity != "*" and not re.match(r"(CN=|DNS:|IP:|URI:|email:)\S", identity):
        raise ValueError("expected CN=, DNS:, IP:, URI:, email:, sha256// or * in '%s'" % text)
    return normal_name(identity), access


GLOBAL, SHIM, SERVER, CLIENT = "global", "shim", "server", "client"

Option = collections.namedtuple("Option", "name where default parse help")
OPTIONS = [Option(*row) for row in (
    ("user", GLOBAL, None, _text, "who to become once the ports are open; default nut, if it exists and started as root"),
    ("chroot", GLOBAL, None, _path, "directory to confine to, before user is dropped"),
    ("pidfile", GLOBAL, "/run/nutshim.pid", _path, "/var/run/nutshim.pid where /run is missing; the status socket lies beside it"),
    ("log", GLOBAL, "syslog", _log, "syslog, stderr, or a file"),
    ("handshake_threads", GLOBAL, "2", _number(1, 64), "threads that do TLS handshakes"),
    ("max_sessions", GLOBAL, "512", _number(1, 1000000), "sessions over all shims"),
    ("role", SHIM, None, _choice(SERVER, CLIENT), "server (in front of upsd) or client (in front of upsmon, upsc, ...); required"),
    ("listen", SHIM, {SERVER: "*:401", CLIENT: "localhost:3493"}, _list(_address("*")), "ADDRESS[:PORT] list; * is every address"),
    ("upstream", SHIM, {SERVER: "localhost:3493", CLIENT: None}, _list(_address("")), "HOST[:PORT] list, tried in order; client: required, port 401"),
    ("certificate", SHIM, None, _path, "PEM: own certificate, its chain, and the key unless key names it; server: required"),
    ("key", SHIM, None, _path, "PEM private key; default: in certificate"),
    ("trust", SHIM, None, _trust, "PEM file or directory of CA or self-signed certificates, or system; client: required unless verify is pin or none"),
    ("verify", CLIENT, "full", _choice("full", "chain", "pin", "none"), "full (chain and name), chain, pin (the pinned key alone), none"),
    ("server_name", CLIENT, None, _text, "name or address that the certificate must carry; default: upstream's host"),
    ("pin", SHIM, None, _list(_pin), "sha256//BASE64 list; the peer's public key must be one of them"),
    ("crl", SHIM, None, _list(_path), "PEM revocation list(s)"),
    ("client_certificate", SERVER, "none", _choice("none", "request", "require"), "none, request or require"),
    ("permit", SERVER, None, _list(_permit), "IDENTITY: CLASS list; CLASS is read, monitor, primary or admin; default: everything"),
    ("allow_from", SHIM, None, _list(_network), "addresses or networks that may connect; default: anyone"),
    ("plaintext", SERVER, "refuse", _choice("refuse", "localhost"), "refuse, or localhost: loopback peers may go on without TLS"),
    ("min_tls", SHIM, "1.3", _choice("1.3", "1.2"), "1.3 or 1.2"),
    ("max_sessions_per_address", SHIM, "64", _number(1, 1000000), "sessions from one address"),
    ("handshake_timeout", SHIM, {SERVER: "10", CLIENT: "4"}, _number(1, 3600), "seconds from accept to the end of the TLS handshake"),
    ("idle_timeout", SHIM, "120", _number(1, 1000000), "seconds without a byte"),
    ("reuse", CLIENT, "30", _number(0, 3600), "seconds an idle upstream session is kept for the next client; 0 is off"),
)]


def option_help():
    return "\n".join("  %-25s %s" % (o.name, o.help) for o in OPTIONS)


# --- Errors --------------------------------------------------------------------------------------


class ConfigError(Exception):
    """The administrator's fault: every line says where, what is wrong and what was expected."""

    def __init__(self, lines):
        super().__init__("\n".join(lines))


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

# --- Configuration: nutshim.conf -----------------------------------------------------------------------


def find_config():
    """The file that is read without -f."""
    here = os.path.dirname(os.path.abspath(__file__))
    places = [os.environ.get("NUT_CONFPATH"), "/etc/nut", "/etc/ups", "/usr/local/etc/nut", here]
    paths = [os.path.join(place, "nutshim.conf") for place in places if place]
    for path in paths:
        if os.path.exists(path):
            return path
    raise ConfigError(["no configuration file: looked for %s; name it with -f FILE" % ", ".join(paths)])


def read_config(path):
    """nutshim.conf -> (globals with .shims, faults as FILE:LINE lines). Faulty options have their default."""
    path = os.path.abspath(path)
    faults = []
    try:
        with open(path, "rb") as file:
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise ConfigError(["%s: %s" % (path, error.strerror)]) from None
    sections = [(None, 1, {})]                  # (name, line, {option: (line, text)})
    for number, line in enumerate(lines, 1):
        line = re.sub(r"(^|\s)[#;].*", "", line).strip()
        if not line:
            continue
        header = re.match(r"\[\s*([\w.-]+)\s*\]$", line)
        name, equals, text = (part.strip() for part in line.partition("="))
        if header:
            name = header.group(1)
            if name in (section[0] for section in sections):
                faults.append("%s:%d: a second section [%s]: give each shim a name of its own" % (path, number, name))
            sections.append((name, number, {}))
        elif not equals or not text:
            faults.append("%s:%d: expected 'name = value' or '[section]', not '%s'" % (path, number, line))
        elif name in sections[-1][2]:
            faults.append("%s:%d: %s: stands already in line %d" % (path, number, name, sections[-1][2][name][0]))
        else:
            if len(text) > 1 and text[0] == text[-1] == '"':
                text = text[1:-1]
            sections[-1][2][name] = (number, text)
    conf = _read_section(path, sections[0], GLOBAL, faults)
    conf.shims = []
    for section in sections[1:]:
        number, role = section[2].get("role", (section[1], ""))
        if role in (SERVER, CLIENT):
            conf.shims.append(_read_section(path, section, role, faults))
        else:
            faults.append("%s:%d: [%s]: expected role = server or role = client" % (path, number, section[0]))
    if len(sections) == 1:
        faults.append("%s:1: expected a [section] for each shim, found none" % path)
    return conf, faults


def _read_section(path, section, role, faults):
    """One section's options, checked each by itself and against each other."""
    name, line, given = section
    wanted = (GLOBAL,) if role == GLOBAL else (SHIM, role)
    conf = types.SimpleNamespace(name=name, role=role, path=path, line=line,
                                 lines={option: number for option, (number, _) in given.items()})
    known = {option.name: option for option in OPTIONS}
    for option, (number, _) in given.items():
        if option not in known:
            faults.append("%s:%d: %s: no such option; 'nutshim.py -h' lists them" % (path, number, option))
        elif known[option].where not in wanted:
            faults.append("%s:%d: %s: expected in a %s" % (
                path, number, option, {GLOBAL: "global place, above the first [section]", SHIM: "[section]"}.get(
                    known[option].where, "shim with role = %s" % known[option].where)))
    for option in OPTIONS:
        if option.where not in wanted:
            continue
        default = option.default.get(role) if isinstance(option.default, dict) else option.default
        number, text = given.get(option.name, (0, default))
        value = None
        try:
            value = None if text is None else option.parse(text, os.path.dirname(path))
        except ValueError as error:
            faults.append("%s:%d: %s: %s" % (path, number, option.name, error))
            value = None if default is None else option.parse(default, "")
        setattr(conf, option.name, value)

    def expect(good, option, text):
        if not good:
            faults.append("%s:%d: [%s] %s: %s" % (path, conf.lines.get(option, line), name, option, text))

    if role == SERVER:
        expect(conf.certificate, "certificate", "expected: a server needs one; mkNUTcert.py makes it")
        asks = conf.client_certificate != "none"
        expect(conf.trust or not asks, "trust", "expected: client_certificate = %s needs it" % conf.client_certificate)
        for option in ("trust", "pin", "crl"):
            expect(asks or not getattr(conf, option), option, "has no effect without client_certificate = require or request")
        expect(asks or not conf.permit or all(identity == "*" for identity, _ in conf.permit), "permit",
               "names need client_certificate = require or request")
    elif role == CLIENT:
        expect(conf.upstream, "upstream", "expected: the host of the server shim")
        checks = conf.verify in ("full", "chain")
        expect(conf.trust or not checks, "trust", "expected: verify = %s needs it" % conf.verify)
        expect(checks or not conf.trust, "trust", "has no effect with verify = %s" % conf.verify)
        expect(checks or not conf.crl, "crl", "has no effect with verify = %s" % conf.verify)
        expect(conf.pin or conf.verify != "pin", "pin", "expected: verify = pin needs it")
    if role != GLOBAL:
        expect(conf.certificate or not conf.key, "key", "has no effect without certificate")
        port = 401 if role == SERVER else 3493
        conf.listen = [(host, port if number is None else number) for host, number in conf.listen]
    return conf


def check_config(path):
    """-> (configuration, {name: Credentials}, warnings); ConfigError with every fault that can be found."""
    conf, faults = read_config(path)
    warnings, credentials = [], {}
    for shim in conf.shims:
        def say(lines, option, text, shim=shim):
            lines.append("%s:%d: [%s] %s: %s" % (shim.path, shim.lines.get(option, shim.line), shim.name, option, text))
        credentials[shim.name] = Credentials(shim, lambda *a, say=say: say(faults, *a), lambda *a, say=say: say(warnings, *a))
        for option, value, text in (
                ("verify", "none", "the server is not verified: anybody can pretend to be it"),
                ("min_tls", "1.2", "TLS 1.2 is allowed"),
                ("plaintext", "localhost", "loopback peers may go on without TLS")):
            if getattr(shim, option, None) == value:
                say(warnings, option, text)
    if conf.user:
        try:
            pwd.getpwnam(conf.user)
        except KeyError:
            faults.append("%s:%d: user: no user '%s' on this machine" % (conf.path, conf.lines["user"], conf.user))
    if conf.chroot and not os.path.isdir(conf.chroot):
        faults.append("%s:%d: chroot: %s is no directory" % (conf.path, conf.lines["chroot"], conf.chroot))
    if faults:
        raise ConfigError(faults)
    return conf, credentials, warnings


# --- Protocol core: bytes in, bytes and facts out --------------------------------------------------

STATELESS = frozenset((b"GET", b"LIST", b"VER", b"NETVER", b"PROTVER", b"HELP"))
# What may be sent again when a kept session turns out dead: it does nothing outside that session.
REPEATABLE = STATELESS | {b"USERNAME", b"PASSWORD"}
NOTED = frozenset((b"USERNAME", b"LOGIN", b"ATTACH"))
_READ = STATELESS | {b"LOGOUT", b"DETACH"}
_MONITOR = _READ | {b"USERNAME", b"PASSWORD", b"LOGIN", b"ATTACH"}
_PRIMARY = _MONITOR | {b"PRIMARY", b"MASTER", b"FSD"}
CLASSES = {"read": _READ, "monitor": _MONITOR, "primary": _PRIMARY, "admin": None}

OK_STARTTLS = b"OK STARTTLS\n"
OK_GOODBYE = b"OK Goodbye\n"
TLS_NOT_ENABLED = b"ERR TLS-NOT-ENABLED\n"
ALREADY_TLS = b"ERR ALREADY-SSL-MODE\n"
NO_TLS_HERE = b"ERR FEATURE-NOT-CONFIGURED\n"
ACCESS_DENIED = b"ERR ACCESS-DENIED\n"

_ODD = re.compile(rb'["#=\\\x00-\x08\x0e-\x1f\x80-\xff]')
_BLANKS = b" \t\v\f\r"
_START, _WORD, _WORD_ESCAPE, _QUOTE, _QUOTE_ESCAPE, _COMMENT = range(6)


class Commands:
    """Cuts a client's bytes into commands exactly as upsd does (NUT common/parseconf.c).

    feed() returns (raw, words, odd) for each whole command.  odd marks what versions of upsd read
    in different ways: # or a newline in quotes, an escaped newline.
    """
    __slots__ = ("limit", "_raw", "_slow", "_state", "_word", "_words", "_odd")

    def __init__(self, limit=MAX_COMMAND):
        self.limit = limit
        self._raw = b""
        self._slow = False
        self._begin()

    def _begin(self):
        self._state, self._word, self._words, self._odd = _START, b"", [], False

    @property
    def pending(self):
        """The bytes of a command that is not whole yet."""
        return self._raw

    def feed(self, data):
        if self._slow:
            return self._feed_slow(data)
        if self._raw:
            data, self._raw = self._raw + data, b""
        if _ODD.search(data):
            return self._feed_slow(data)
        if data.count(b"\n") == 1 and data[-1] == 10:
            return ((data, data.split(), False),)
        lines = data.split(b"\n")
        self._raw = self._check(lines.pop())
        return [(self._check(line) + b"\n", line.split(), False) for line in lines]

    def _check(self, raw):
        if len(raw) > self.limit:
            raise ProtocolError(Reason.BAD_LINE, "a command of more than %d bytes" % self.limit)
        return raw

    def _feed_slow(self, data):
        """The same for lines with quotes, escapes, comments, = or odd bytes: parseconf's states."""
        commands = []
        raw, word, state = bytearray(self._raw), bytearray(self._word), self._state
        for byte in data:
            raw.append(byte)
            kept = byte if 0x20 <= byte <= 0x7f else None
            if state in (_WORD_ESCAPE, _QUOTE_ESCAPE):
                state -= 1
                self._odd |= byte == 10
            elif state == _QUOTE:
                if byte == 0x22 or byte == 0x5c:
                    kept = None
                    state = _START if byte == 0x22 else _QUOTE_ESCAPE
                    if byte == 0x22:
                        self._words.append(bytes(word))
                        word.clear()
                self._odd |= byte in b"#\n"
            elif byte == 10 or byte in _BLANKS or byte == 0x23 or byte == 0x3d:
                if state == _COMMENT and byte != 10:
                    continue
                if state == _WORD:
                    self._words.append(bytes(word))
                    word.clear()
                kept = None
                state = _COMMENT if byte == 0x23 else _START
                if byte == 0x3d:
                    self._words.append(b"=")
                elif byte == 10:
                    commands.append((bytes(self._check(raw)), self._words, self._odd))
                    raw.clear()
                    self._begin()
            elif state == _COMMENT:
                continue
            elif byte == 0x5c:
                kept, state = None, _WORD_ESCAPE
            elif byte == 0x22 and state == _START:
                kept, state = None, _QUOTE
            else:
                state = _WORD
            if kept is not None:
                word.append(kept)
        self._raw, self._word, self._state = bytes(self._check(raw)), bytes(word), state
        self._slow = bool(raw)
        return commands


class Replies:
    """Frames upsd's replies: one line, or BEGIN LIST ... END LIST (NUT docs/net-protocol.txt).

    A line ends at its newline or, cut by upsd without one, at byte 512.
    """
    __slots__ = ("_head", "_length", "_list", "cut")

    def __init__(self):
        self._head = b""        # The start of an unfinished line, enough to tell what it is.
        self._length = 0        # Its bytes so far.
        self._list = False
        self.cut = False        # A line was cut: the framing may be wrong with another upsd.

    @property
    def whole(self):
        return not self._length and not self._list

    def feed(self, data):
        """Return where in data each reply ends."""
        if (not self._length and not self._list and data.find(b"\n") == len(data) - 1
                and len(data) <= MAX_REPLY_LINE and not data.startswith(b"BEGIN LIST")):
            return (len(data),)
        ends, start, size = [], 0, len(data)
        while start < size:
            most = start + MAX_REPLY_LINE - self._length
            end = data.find(b"\n", start, most) + 1
            if not end:
                if most > size:
                    self._head = (self._head + data[start:start + 10])[:10]
                    self._length += size - start
                    break
                end, self.cut = most, True
            head = (self._head + data[start:min(end, start + 10)])[:10] if self._head else data[start:start + 10]
            if self._list:
                if head.startswith(b"END LIST"):
                    self._list = False
                    ends.append(end)
            elif head == b"BEGIN LIST":
                self._list = True
            else:
                ends.append(end)
            self._head, self._length, start = b"", 0, end
        return ends


class Conversation:
    """One NUT client's commands and upsd's replies, with the shim's own replies in their turn.

    starttls: the reply to STARTTLS; allowed: the verbs of the access class, None for all;
    reuse: LOGOUT of a stateless session is answered here, so that upstream stays usable.
    """
    __slots__ = ("_starttls", "_allowed", "_reuse", "_trace", "_commands", "_replies", "_local",
                 "sent", "got", "seen", "stateless", "repeatable", "counted", "leaving", "refused")

    def __init__(self, starttls, allowed=None, reuse=False, trace=False):
        self._starttls, self._allowed, self._reuse, self._trace = starttls, allowed, reuse, trace
        self._commands = Commands()
        self._replies = Replies()
        self._local = None      # A deque of (commands sent before it, reply), once it is needed.
        self.sent = 0           # Commands passed to upsd.
        self.got = 0            # Replies that have ended.
        self.seen = []          # (verb, words) that the log wants; whoever logs empties it.
        self.stateless = True   # Nothing but STATELESS was sent.
        self.repeatable = True  # Nothing but REPEATABLE was sent.
        self.counted = True     # False once upsd's number of replies cannot be known.
        self.leaving = False    # LOGOUT was answered, or will be in its turn.
        self.refused = 0        # Commands answered with ACCESS-DENIED.

    @property
    def owed(self):
        """Replies that upsd still has to give."""
        return self.sent - self.got if self.counted else 0

    @property
    def clean(self):
        """Upstream is as good as new: nothing but stateless commands, every reply in and whole."""
        return (self.stateless and self.sent == self.got and self._replies.whole
                and not self._replies.cut and not self._local)

    @property
    def done(self):
        """The client said LOGOUT and has its answer."""
        return self.leaving and not self._local

    @property
    def crowded(self):
        return bool(self._local) and len(self._local) > MAX_LOCAL_REPLIES

    def from_client(self, data):
        """Bytes from the client -> (bytes for upsd, bytes for the client now)."""
        if self.leaving:
            return b"", b""
        commands = self._commands.feed(data)
        up, back = [], []
        last = len(commands) - 1
        for index, (raw, words, odd) in enumerate(commands):
            verb = words[0].upper() if words else b""
            if verb in NOTED or self._trace:
                self.seen.append((verb, words))
            if verb in STATELESS and not odd:
                pass
            elif verb == b"STARTTLS":
                self._answer(self._starttls, back)
                continue
            elif (verb == b"LOGOUT" and self._reuse and self.stateless and len(words) == 1
                  and index == last and not self._commands.pending):
                # With more behind it, upsd 2.8 goes on after LOGOUT: then it has to see it itself.
                self._answer(OK_GOODBYE, back)
                self.leaving = True
                continue
            elif self._allowed is not None and (odd or verb not in self._allowed):
                self._answer(ACCESS_DENIED, back)
                self.refused += 1
                continue
            else:
                self.stateless = False
                self.repeatable = self.repeatable and verb in REPEATABLE and not odd
                self.counted = self.counted and not odd
            self.sent += 1
            up.append(raw)
        return (up[0] if len(up) == 1 else b"".join(up)), b"".join(back)

    def _answer(self, reply, back):
        if self.owed > 0:
            if self._local is None:
                self._local = collections.deque()
            self._local.append((self.sent, reply))
        else:
            back.append(reply)

    def from_upstream(self, data):
        """Bytes from upsd -> bytes for the client."""
        ends = self._replies.feed(data)
        if not self._local:
            self.got += len(ends)
            return data
        parts, start = [], 0
        for end in ends:
            self.got += 1
            while self._local and (self._local[0][0] <= self.got or not self.counted):
                parts += (data[start:end], self._local.popleft()[1])
                start = end
        parts.append(data[start:])
        return b"".join(parts)


class Greeting:
    """The server shim's side before TLS: lines until STARTTLS (RFC 9271 4.2.12)."""
    __slots__ = ("_commands", "_lines", "_first")

    def __init__(self):
        self._commands = Commands(MAX_GREETING)
        self._lines = 0
        self._first = True

    def feed(self, data, plaintext=False):
        """-> (reply, 'tls' | 'plain' | 'goodbye' | None, bytes behind); ProtocolError ends it."""
        if self._first and data[:1] == b"\x16":
            raise ProtocolError(Reason.TLS_FIRST)
        self._first = False
        if b"\0" in data:
            raise ProtocolError(Reason.BAD_LINE, "a NUL byte")
        held = self._commands.pending
        reply, consumed = b"", 0
        for raw, words, _odd in self._commands.feed(data):
            consumed += len(raw)
            verb = words[0].upper() if words else b""
            if verb == b"STARTTLS":
                if consumed < len(held) + len(data):
                    raise ProtocolError(Reason.INJECTION)
                return reply + OK_STARTTLS, "tls", b""
            if plaintext:
                return reply, "plain", held + data
            if verb in (b"LOGOUT", b"DETACH"):
                return reply + OK_GOODBYE, "goodbye", b""
            reply += TLS_NOT_ENABLED
            self._lines += 1
            if self._lines >= MAX_GREETING_LINES:
                return reply, "refused", b""
        return reply, None, b""


def starttls_reply(data):
    """upstream's answer to STARTTLS: True when whole and OK, False when not whole yet."""
    line, newline, behind = data.partition(b"\n")
    if behind:
        raise ProtocolError(Reason.UPSTREAM, "bytes behind OK STARTTLS: response injection")
    if not newline and len(line) < MAX_REPLY_LINE:
        return False
    if line.split() not in ([b"OK", b"STARTTLS"], [b"OK"]):      # A bare OK is the TLS-Shims' one.
        raise ProtocolError(Reason.UPSTREAM, "no TLS there: STARTTLS was answered with %s" % printable(line[:80]))
    return True


def printable(data):
    """Bytes or text of a peer's, safe for a log line."""
    text = data.decode("latin-1") if isinstance(data, bytes) else data
    return "'%s'" % "".join(c if " " <= c <= "~" or c > "\xa0" and c.isprintable() else "\\x%02x" % ord(c) for c in text)


# --- Certificates and TLS contexts -----------------------------------------------------------------

Certificate = collections.namedtuple("Certificate", "names pin not_after")
Certificate.__doc__ = "names: 'CN=...', 'DNS:...', 'IP:...' as permit has them; pin; not_after: seconds since 1970."

_SAN_KINDS = {0x81: "email:", 0x82: "DNS:", 0x86: "URI:"}
_TEXT_CODECS = {0x0c: "utf-8", 0x1e: "utf-16-be"}


def _der(data, at=0):
    """(tag, start, end) of the DER element at a place (X.690 8.1)."""
    try:
        tag, size, start = data[at], data[at + 1], at + 2
        if size & 0x80:
            count = size & 0x7f
            size = int.from_bytes(data[start:start + count], "big")
            start += count
    except IndexError:
        raise ValueError("truncated DER") from None
    if start + size > len(data):
        raise ValueError("truncated DER")
    return tag, start, start + size


def _der_items(data, start, end):
    items = []
    while start < end:
        item = _der(data, start)
        items.append(item)
        start = item[2]
    return items


def read_certificate(der):
    """What permit, pin and the expiry checks need of a certificate (RFC 5280 4.1); ValueError if it is none."""
    body = _der_items(der, *_der(der, _der(der)[1])[1:])
    if body[0][0] == 0xa0:
        body.pop(0)                                             # The version.
    serial, _algorithm, _issuer, validity, subject, spki = body[:6]
    names = []
    for _, start, end in _der_items(der, *subject[1:]):
        for _, pair_start, pair_end in _der_items(der, start, end):
            oid, value = _der_items(der, pair_start, pair_end)
            if der[oid[1]:oid[2]] == b"\x55\x04\x03":           # 2.5.4.3, commonName
                text = der[value[1]:value[2]].decode(_TEXT_CODECS.get(value[0], "latin-1"), "replace")
                names.append("CN=" + text)
    for tag, start, end in body[6:]:
        if tag == 0xa3:
            for _, ext_start, ext_end in _der_items(der, *_der(der, start)[1:]):
                parts = _der_items(der, ext_start, ext_end)
                if der[parts[0][1]:parts[0][2]] == b"\x55\x1d\x11":      # 2.5.29.17, subjectAltName
                    for kind, at, to in _der_items(der, *_der(der, parts[-1][1])[1:]):
                        if kind in _SAN_KINDS:
                            names.append(normal_name(_SAN_KINDS[kind] + der[at:to].decode("latin-1")))
                        elif kind == 0x87 and to - at in (4, 16):
                            family = socket.AF_INET if to - at == 4 else socket.AF_INET6
                            names.append("IP:" + socket.inet_ntop(family, der[at:to]))
    return Certificate(names, pin_of(der[_der_start(der, spki):spki[2]]), _der_time(der, _der_items(der, *validity[1:])[1]))


def _der_start(data, element):
    """Where an element's tag stands: its content's start less the header."""
    size = element[2] - element[1]
    return element[1] - (2 if size < 128 else 2 + (size.bit_length() + 7) // 8)


def _der_time(data, element):
    """UTCTime or GeneralizedTime -> seconds since 1970 (RFC 5280 4.1.2.5)."""
    import datetime                                     # A slow import, for certificates only.
    text = data[element[1]:element[2]].decode("ascii", "replace")
    if element[0] == 0x17:
        text = ("19" if text[:2] >= "50" else "20") + text
    fields = [int(text[:4])] + [int(text[at:at + 2]) for at in range(4, 14, 2)]
    return int(datetime.datetime(*fields, tzinfo=datetime.timezone.utc).timestamp())


def pin_of(spki):
    """A public key as curl's --pinnedpubkey writes it."""
    return "sha256//" + binascii.b2a_base64(hashlib.sha256(spki).digest(), newline=False).decode()


def normal_name(name):
    """A name as permit compares it: DNS and email without case, addresses in their one form."""
    kind, colon, value = name.partition(":")
    if kind == "IP" and numeric_family(value):
        family = numeric_family(value)
        return "IP:" + socket.inet_ntop(family, socket.inet_pton(family, value))
    return kind + colon + value.lower() if kind in ("DNS", "email") else name


def read_pem(path):
    """A file's text and its certificates; OSError or ValueError with words for the administrator."""
    with open(path, "rb") as file:
        text = file.read().decode("latin-1")
    blocks = re.findall("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", text, re.DOTALL)
    try:
        return text, [read_certificate(ssl.PEM_cert_to_DER_cert(block)) for block in blocks], blocks
    except (ValueError, IndexError) as error:
        raise ValueError("a certificate in it cannot be read (%s)" % error) from None


def trust_files(path):
    return sorted(os.path.join(path, name) for name in os.listdir(path)) if os.path.isdir(path) else [path]


class Credentials:
    """A shim's TLS context with what -t, the log and the expiry checks want to know of it.

    fault(option, text) takes each thing that is wrong; warn(option, text) what is only unwise.
    """

    def __init__(self, conf, fault, warn):
        self.conf, self._fault, self._warn = conf, fault, warn
        self.expiries = []                  # (what, not_after)
        self.own = None                     # The own Certificate.
        server = conf.role == SERVER
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        self.context = context
        context.minimum_version = ssl.TLSVersion.TLSv1_3 if conf.min_tls == "1.3" else ssl.TLSVersion.TLSv1_2
        if conf.min_tls == "1.2":
            context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        if ssl.OPENSSL_VERSION_INFO >= (3,):
            # upsd and others end without close_notify; SSL_OP_IGNORE_UNEXPECTED_EOF makes that an end,
            # after which replies can still be sent, rather than an error.
            context.options |= 0x80
        context.check_hostname = not server and conf.verify == "full"
        if server:
            context.verify_mode = {"none": ssl.CERT_NONE, "request": ssl.CERT_OPTIONAL,
                                   "require": ssl.CERT_REQUIRED}[conf.client_certificate]
            if hasattr(context, "num_tickets"):
                context.num_tickets = 1     # One is enough to resume once; each costs time and bytes.
        else:
            context.verify_mode = ssl.CERT_REQUIRED if conf.verify in ("full", "chain") else ssl.CERT_NONE
            if hasattr(context, "hostname_checks_common_name"):
                context.hostname_checks_common_name = False
        if conf.certificate:
            self._load_own()
        if context.verify_mode != ssl.CERT_NONE:
            self._load_trust()

    def _guard(self, option, path, load):
        try:
            return load()
        except ssl.SSLError as error:
            self._fault(option, "%s: %s" % (path, error.reason or error))
        except OSError as error:
            self._fault(option, "%s: %s" % (path, error.strerror or error))
        except ValueError as error:
            self._fault(option, "%s: %s" % (path, error))
        return None

    def _load_own(self):
        conf = self.conf
        key_option, key_path = ("key", conf.key) if conf.key else ("certificate", conf.certificate)
        found = self._guard("certificate", conf.certificate, lambda: read_pem(conf.certificate))
        key = found if not conf.key else self._guard("key", key_path, lambda: read_pem(key_path))
        if not found or not key:
            return
        if not found[1]:
            return self._fault("certificate", "%s: expected a PEM certificate, found none" % conf.certificate)
        if "PRIVATE KEY-----" not in key[0]:
            return self._fault(key_option, "%s: expected a PEM private key, found none" % key_path)
        if "ENCRYPTED" in key[0]:
            return self._fault(key_option, "%s: the key is encrypted, which a daemon cannot open: "
                               "'openssl pkey -in FILE' writes it without a passphrase" % key_path)
        try:
            self.context.load_cert_chain(conf.certificate, conf.key)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                return self._fault(key_option, "%s: this key does not belong to the first certificate in %s"
                                   % (key_path, conf.certificate))
            return self._fault(key_option, "%s: %s" % (key_path, error.reason or error))
        if os.stat(key_path).st_mode & stat.S_IROTH:
            self._warn(key_option, "%s: everybody can read this private key; 'chmod o-rwx' it" % key_path)
        self.own = found[1][0]
        self.expiries.append(("own certificate %s" % conf.certificate, self.own.not_after))

    def _load_trust(self):
        conf, context = self.conf, self.context
        # A certificate put into trust is trusted as it is, be it an intermediate CA's or a server's own.
        context.verify_flags |= 0x80000                     # X509_V_FLAG_PARTIAL_CHAIN, named since 3.10
        if conf.trust == "system":
            context.load_default_certs()
            paths = ssl.get_default_verify_paths()
            if not context.cert_store_stats()["x509"] and not (paths.capath and os.listdir(paths.capath)):
                self._fault("trust", "system: this machine has no CA certificates; install its ca-certificates package")
        else:
            blocks = []
            for path in self._guard("trust", conf.trust, lambda: trust_files(conf.trust)) or []:
                found = self._guard("trust", path, lambda path=path: read_pem(path))
                for certificate in found[1] if found else ():
                    self.expiries.append(("trusted certificate in %s" % path, certificate.not_after))
                blocks += found[2] if found else ()
            if blocks:
                self._guard("trust", conf.trust, lambda: context.load_verify_locations(cadata="\n".join(blocks)))
            else:
                self._fault("trust", "%s: expected PEM certificates, found none" % conf.trust)
        for path in conf.crl or ():
            found = self._guard("crl", path, lambda path=path: read_pem(path))
            if found and "-----BEGIN X509 CRL-----" not in found[0]:
                self._fault("crl", "%s: expected a PEM revocation list (X509 CRL), found none" % path)
            elif found:
                self._guard("crl", path, lambda path=path: context.load_verify_locations(cafile=path))
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


Peer = collections.namedtuple("Peer", "version cipher names pin not_after")
Peer.__doc__ = "What the log, the status and the checks know of the other end of a TLS session."


def handshake_step(sock, context, server, name, session):
    """One step, in a handshake thread: (socket, 'read' | 'write' | Peer). Raises OSError, ssl.SSLError."""
    if not isinstance(sock, ssl.SSLSocket):
        sock = context.wrap_socket(sock, server_side=server, do_handshake_on_connect=False,
                                   server_hostname=name, session=session)
    try:
        sock.do_handshake()
    except ssl.SSLWantReadError:
        return sock, "read"
    except ssl.SSLWantWriteError:
        return sock, "write"
    return sock, describe_peer(sock)


def describe_peer(sock):
    der = sock.getpeercert(True)
    try:
        names, pin, not_after = read_certificate(der) if der else ([], None, None)
    except (ValueError, IndexError):
        raise ssl.SSLError("the peer's certificate cannot be read") from None
    return Peer(sock.version(), sock.cipher()[0], names, pin, not_after)


_VERIFY_WORDS = {
    3: "no revocation list (crl) of its issuer", 9: "its certificate is not valid yet: compare the clocks",
    10: "its certificate has expired: renew it", 12: "the revocation list (crl) has expired: renew it",
    18: "its certificate is self-signed and not in trust", 19: "unknown CA: its issuer is not in trust",
    20: "unknown CA: its issuer is not in trust", 21: "unknown CA: its issuer is not in trust",
    23: "its certificate is revoked", 62: "its certificate is not for this name", 64: "its certificate is not for this address",
}


def tls_error(error, name=None):
    """An exception of the ssl module in an administrator's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        text = _VERIFY_WORDS.get(error.verify_code, error.verify_message)
        if error.verify_code in (62, 64) and name:
            text += " (%s): set server_name, or make a certificate with it" % name
        return text
    reason = getattr(error, "reason", None) or ""
    alert = re.match("(?:TLSV?1?3?|SSLV3)_ALERT_(.*)", reason)
    if alert:
        return "the peer refused with the TLS alert '%s'" % alert.group(1).lower().replace("_", " ")
    if reason in ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW", "UNKNOWN_PROTOCOL", "WRONG_SSL_VERSION", "TLSV13_ALERT_PROTOCOL_VERSION"):
        return "the peer speaks no TLS version that min_tls allows"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the peer has no client certificate"
    if isinstance(error, ssl.SSLEOFError) or reason == "UNEXPECTED_EOF_WHILE_READING":
        return "the peer closed during the handshake"
    if reason:
        return reason.lower().replace("_", " ")
    return getattr(error, "strerror", None) or str(error)


# --- Log -------------------------------------------------------------------------------------------

ERROR, WARNING, NOTICE, INFO, DEBUG = 3, 4, 5, 6, 7         # As syslog's (RFC 5424 6.2.1).
_LEVELS = {ERROR: "error", WARNING: "warning", NOTICE: "notice", INFO: "info", DEBUG: "debug"}


class Log:
    """Lines to syslog, stderr or a file. What cannot be written at once is dropped and counted."""

    def __init__(self, debug=0):
        self.debug = debug                  # 1: protocol words, 2: more of the inner life
        self._target, self._fd, self._syslog, self._lost = "stderr", 2, None, 0
        self._limited = {}

    def open(self, target):
        """Start or reopen; OSError when a file cannot be written."""
        fd = 2
        if target not in ("syslog", "stderr"):
            fd = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        if self._fd > 2:
            os.close(self._fd)
        self._target, self._fd = target, fd
        if target == "syslog":
            self._connect()

    def _connect(self):
        self._syslog = None
        for path in ("/dev/log", "/var/run/log", "/var/run/syslog"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            sock.setblocking(False)
            try:
                sock.connect(path)
                self._syslog = sock
                return
            except OSError:
                sock.close()

    def __call__(self, level, text, *args):
        if args:
            text = text % args
        if self._lost:
            text = "(%d log lines lost) %s" % (self._lost, text)
        try:
            self._write(level, text)
            self._lost = 0
        except OSError:
            self._lost += 1

    def _write(self, level, text):
        if self._target == "syslog":
            if self._syslog is None:
                self._connect()
            for line in text.split("\n"):
                stamp = time.strftime("%b %e %H:%M:%S")
                packet = "<%d>%s nutshim[%d]: %s" % (3 * 8 + level, stamp, os.getpid(), line)   # facility daemon
                try:
                    if self._syslog is None:
                        raise FileNotFoundError(errno.ENOENT, "no syslog socket")
                    self._syslog.send(packet.encode("utf-8", "replace")[:2048])
                except BlockingIOError:
                    raise
                except OSError:
                    self._syslog = None     # syslogd was restarted: connect anew with the next line.
                    raise
            return
        line = "%s nutshim[%d] %s: %s\n" % (time.strftime("%Y-%m-%d %H:%M:%S"), os.getpid(), _LEVELS[level], text)
        if self._fd == 2:
            with selectors.PollSelector() as poll:      # A full pipe or a stopped terminal must not stop the loop.
                poll.register(2, selectors.EVENT_WRITE)
                if not poll.select(0):
                    raise BlockingIOError(errno.EAGAIN, "stderr is full")
        os.write(self._fd, line.encode("utf-8", "replace")[:4096])

    def limited(self, level, key, text, *args):
        """Not more often than every RATE_LIMIT seconds for the same key; says how many it left out."""
        now = time.monotonic()
        since, left_out = self._limited.get(key, (-RATE_LIMIT, 0))
        if now - since < RATE_LIMIT:
            self._limited[key] = (since, left_out + 1)
            return
        self._limited[key] = (now, 0)
        more = " (and %d more in the last while)" % left_out if left_out else ""
        self(level, text + more.replace("%", "%%"), *args)


# --- Sockets and threads -----------------------------------------------------------------------------

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def numeric_family(host):
    """AF_INET or AF_INET6 of a numeric address, None of a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host.partition("%")[0])
            return family
        except OSError:
            pass
    return None


def address_text(address):
    """A socket's address as ADDRESS:PORT."""
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address[:2]


def look_up(host, port, passive=False):
    """getaddrinfo() -> [(family, address)], IPv4 and IPv6 as the system orders them; OSError."""
    # Bytes, since a str needs the idna codec, which small boxes do not have.
    found = socket.getaddrinfo(host.encode("ascii"), port, 0, socket.SOCK_STREAM, 0,
                               socket.AI_PASSIVE if passive else 0)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


class Workers:
    """Threads that run jobs for the loop; see the docstring's thread contract."""

    def __init__(self, count, wake):
        self._wake = wake
        self._jobs = queue.SimpleQueue()
        self.done = collections.deque()         # (session, then, result, error), from any thread
        for _ in range(count):
            threading.Thread(target=self._run, daemon=True).start()

    def submit(self, session, job, then):
        """Run job() in a thread, then then(result, error) in the loop's, on behalf of a session."""
        self._jobs.put((session, job, then))

    def look_up(self, host, port, then):
        """In a thread of its own: a resolver that hangs must not hold up handshakes."""
        threading.Thread(target=self._do, args=(None, lambda: look_up(host, port), then), daemon=True).start()

    def _run(self):
        while True:
            self._do(*self._jobs.get())

    def _do(self, session, job, then):
        try:
            self.done.append((session, then, job(), None))
        except Exception as error:              # The loop tells a peer's fault from a bug.
            self.done.append((session, then, None, error))
        self._wake()


class Side:
    """One socket of a session: bytes out that the kernel did not take yet, and what it waits for."""
    __slots__ = ("sock", "out", "mask", "eof", "busy", "closed", "error", "on_read", "on_write", "session",
                 "peer", "shim", "_selector")

    def __init__(self, selector, sock, session):
        self.sock, self.session, self._selector = sock, session, selector
        self.out = b""
        self.mask = 0
        self.eof = False            # Nothing more will come from it.
        self.busy = False           # A handshake thread has the socket.
        self.closed = False
        self.error = ""             # Why it ended, if not by a proper end.
        self.on_read = self.on_write = None
        self.peer = None            # The Peer, once TLS is up.

    def want(self, mask):
        if mask != self.mask:
            if not mask:
                self._selector.unregister(self.sock)
            elif not self.mask:
                self._selector.register(self.sock, mask, self)
            else:
                self._selector.modify(self.sock, mask, self)
            self.mask = mask

    def recv(self):
        """Bytes; b"" at the end, however it came; None when there is nothing yet."""
        try:
            data = self.sock.recv(CHUNK)
        except _NOT_NOW:
            return None
        except ssl.SSLZeroReturnError:
            data = b""
        except OSError as error:
            data, self.error = b"", tls_error(error)
        if not data:
            self.eof = True
        return data

    def send(self, data):
        """Send now what the kernel takes, keep the rest for flush()."""
        if self.out:
            self.out += data
            return
        try:
            sent = self.sock.send(data)
            while sent < len(data):
                data = data[sent:]
                sent = self.sock.send(data)
        except _NOT_NOW:
            self.out = bytearray(data)
            self.want(self.mask | WRITE)
        except OSError:
            self.want(self.mask | READ)         # What is wrong shows when it is read.

    def flush(self):
        try:
            while self.out:
                del self.out[:self.sock.send(self.out)]
        except _NOT_NOW:
            return
        except OSError:
            pass
        self.out = b""
        self.want(self.mask & ~WRITE or READ)

    def half_close(self):
        """Tell the peer that nothing more will come, and still read its replies."""
        try:
            socket.socket.shutdown(self.sock, socket.SHUT_WR)   # SSLSocket's own would drop TLS.
        except OSError:
            pass

    def close(self):
        """Idempotent. With TLS a close_notify goes first; a busy socket is closed when its thread is done."""
        if not self.closed:
            self.want(0)
            self.closed = True
        if self.busy or self.sock is None:
            return
        try:
            if not self.eof:
                if self.peer:
                    self.sock.unwrap()
                else:
                    self.sock.recv(CHUNK)       # Unread bytes would turn the close into a reset, and lose replies.
        except (OSError, ValueError):
            pass
        self.sock.close()
        self.sock = None


# --- Sessions --------------------------------------------------------------------------------------


class State(enum.Enum):
    GREETING = "greeting"       # server: the client's lines before TLS
    HANDSHAKE = "handshake"     # server: TLS with the client
    DIAL = "connecting"         # look-up, TCP, and for a client shim STARTTLS and TLS with upstream
    RELAY = "relaying"
    ENDING = "ending"           # the last bytes on their way
    CLOSED = "closed"


class Session:
    """One NUT client's connection and the upstream one made for it, from accept to close.

    Its deadline is the loop's to watch: past it, expired() is called.
    """
    __slots__ = ("loop", "shim", "number", "client", "upstream", "address", "state", "deadline", "began", "last",
                 "talk", "greeting", "access", "user", "ups", "bytes_in", "bytes_out", "reused", "replay",
                 "targets", "addresses", "target", "dial_end", "failures", "ending", "stopping")

    def __init__(self, loop, shim, sock, address):
        self.loop, self.shim, self.address = loop, shim, address
        self.number = loop.next_number()
        self.client = Side(loop.selector, sock, self)
        self.upstream = self.talk = self.user = self.ups = self.replay = self.access = self.target = None
        self.began = self.last = loop.now
        self.bytes_in = self.bytes_out = 0
        self.reused = self.stopping = False
        self.failures, self.greeting = [], b""
        self.log(INFO, "opened")
        if shim.server:
            self.state, self.greeting = State.GREETING, Greeting()
            self.client.on_read = self._greet
            self._set_deadline(loop.now + shim.conf.handshake_timeout)
            self.client.want(READ)
        else:
            self._start_talk(NO_TLS_HERE)
            kept = shim.take_kept()
            if kept:
                self._adopt(kept)
            else:
                self._dial()

    def log(self, level, text, *args):
        if level < DEBUG or self.loop.log.debug:
            self.loop.log(level, "[%s] #%d %s: %s", self.shim.name, self.number, address_text(self.address),
                          text % args if args else text)

    def _set_deadline(self, when):
        self.deadline = when
        self.loop.watch(when)

    # The server shim before upsd is reached.

    def _greet(self):
        data = self.client.recv()
        if data is None:
            return
        if not data:
            return self.close(Reason.CLIENT)
        reply, verdict, rest = self.greeting.feed(
            data, self.shim.conf.plaintext == "localhost" and is_loopback(self.address[0]))
        if self.loop.log.debug:
            self.log(DEBUG, "before TLS: %d bytes, %s", len(data), verdict or "not STARTTLS")
        if reply:
            self.client.send(reply)
        if verdict == "tls":
            self.state = State.HANDSHAKE
            self.greeting = None
            self._handshake(self.client, None)
        elif verdict == "plain":
            self.log(NOTICE, "goes on without TLS, as 'plaintext = localhost' allows")
            self.greeting = rest
            self._admit([])
        elif verdict:
            self.finish(Reason.LOGOUT if verdict == "goodbye" else Reason.NO_STARTTLS)

    def _admit(self, identities):
        """Find the access class, then connect to upsd: strangers never get that far."""
        permit = self.shim.conf.permit
        if permit is not None:
            self.access = next((access for name, access in permit if name == "*" or name in identities), None)
            if self.access is None:
                self.client.send(ACCESS_DENIED)
                return self.finish(Reason.PERMIT, ", ".join(identities) or "no certificate")
        plain = self.state is State.GREETING
        self._start_talk(NO_TLS_HERE if plain else ALREADY_TLS)
        self._dial()

    def _start_talk(self, starttls):
        allowed = CLASSES[self.access] if self.access else None
        self.talk = Conversation(starttls, allowed, self.shim.reuse > 0, self.loop.log.debug > 0)

    # TLS, in either role.

    def _handshake(self, side, name):
        shim = self.shim
        side.want(0)
        side.busy = True
        sock, context, session = side.sock, shim.context, shim.resume.get(name)
        self.loop.workers.submit(self, lambda: handshake_step(sock, context, shim.server, name, session),
                                 lambda result, error: self._stepped(side, name, result, error))

    def _stepped(self, side, name, result, error):
        side.busy = False
        if result:
            side.sock = result[0]
        if side.closed:
            return side.close()
        if error is not None and not isinstance(error, (OSError, ValueError)):
            raise error
        if error is not None:
            return self._tls_failed(side, Reason.TLS, tls_error(error, name and name.decode()))
        if not isinstance(result[1], Peer):
            side.on_read = side.on_write = lambda: self._handshake(side, name)
            return side.want(READ if result[1] == "read" else WRITE)
        side.peer = peer = result[1]
        pins = self.shim.conf.pin
        if pins and peer.pin not in pins and (peer.pin or self.shim.conf.client_certificate != "request"):
            return self._tls_failed(side, Reason.PIN, "it has %s" % (peer.pin or "no certificate"))
        self.log(INFO, "TLS up: %s %s%s", peer.version, peer.cipher,
                 ", ".join([""] + [printable(n) for n in peer.names]) or ", no certificate")
        if self.shim.server:
            self._admit(peer.names + [peer.pin])
        else:
            self._connected(side)

    def _tls_failed(self, side, reason, text):
        if self.shim.server:
            side.error = text
            self.close(reason, text)
        else:
            self._target_failed(text if reason is Reason.TLS else "%s: %s" % (reason.value, text))

    # Upstream: each address of each target in order, all within one deadline.

    def _dial(self):
        self.state = State.DIAL
        self.client.want(0)
        self.targets, self.addresses = list(self.shim.targets), []
        self.dial_end = max(self.loop.now, self.began) + self.shim.conf.handshake_timeout
        self._next_address()

    def _next_address(self):
        if self.upstream:
            self.upstream.close()
            self.upstream = None
        if not self.addresses:
            if not self.targets:
                return self.close(Reason.UPSTREAM, "; ".join(self.failures))
            self.target = self.targets.pop(0)
            self.addresses = list(self.target.addresses)
        left = 1 + len(self.targets) + max(0, len(self.addresses) - 1)
        self._set_deadline(self.loop.now + max(0, self.dial_end - self.loop.now) / left)
        self.target.refresh(self.loop, self._resolved)
        if self.addresses:
            self._connect(*self.addresses.pop(0))

    def _resolved(self, target, error):
        """A look-up that this session waited for has ended."""
        if self.state is State.DIAL and self.target is target and not self.upstream and not self.addresses:
            self.addresses = list(target.addresses)
            if self.addresses:
                self._next_address()
            else:
                self._target_failed("the name cannot be resolved: %s" % error)

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
        side.on_read = side.on_write = self._tcp_up
        side.want(WRITE)

    def _tcp_up(self):
        side = self.upstream
        code = side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            return self._target_failed(os.strerror(code))
        if self.shim.server:
            return self._connected(side)
        self.greeting = b""
        side.on_read = self._starttls_answered
        side.on_write = side.flush
        side.want(READ)
        side.send(b"STARTTLS\n")

    def _starttls_answered(self):
        side = self.upstream
        data = side.recv()
        if data is None:
            return
        if not data:
            return self._target_failed("closed before it answered STARTTLS %s" % side.error)
        self.greeting += data
        try:
            if not starttls_reply(self.greeting):
                return
        except ProtocolError as error:
            return self._target_failed(str(error))
        self._handshake(side, self.shim.name_for(self.target))

    def _target_failed(self, text):
        failure = "%s: %s" % (self.target.text, text.strip())
        self.failures.append(failure)
        self.target.failed = failure
        self._next_address()

    def _connected(self, side):
        self.target.failed = None
        self.shim.fresh += 1
        self._adopt(side)
        if self.replay is not None:                 # A kept session was dead: the same commands, once more.
            replay, self.replay = self.replay, None
            side.send(replay)
        elif self.shim.server and self.greeting:    # The plaintext client's first line.
            self._take(self.greeting)

    def _adopt(self, side):
        """Start relaying over a new or a kept upstream session."""
        self.upstream, side.session = side, self
        self.state = State.RELAY
        side.on_read, side.on_write = self._from_upstream, self._drained
        client = self.client
        client.on_read, client.on_write = self._from_client, self._drained
        self._set_deadline(self.loop.now + self.shim.conf.idle_timeout)
        if side.mask != READ:
            side.want(READ)
        if not self.shim.server and self.reused:
            self.replay = b""
        client.want(READ)

    # Relaying.

    def _from_client(self):
        data = self.client.recv()
        if data is None:
            return
        if not data:
            return self._client_ended()
        self._take(data)

    def _take(self, data):
        """Bytes from the client; they come from its socket, or from before upsd was reached."""
        talk, upstream, client = self.talk, self.upstream, self.client
        self.last = self.loop.now
        self.bytes_in += len(data)
        up, back = talk.from_client(data)
        if talk.seen:
            self._note(talk.seen)
        if up:
            if self.replay is not None:
                self.replay = self.replay + up if len(self.replay) < CHUNK else None
            upstream.send(up)
        if back:
            client.send(back)
        if talk.done:
            self._logout()
        elif client.out or upstream.out or talk.crowded:
            self._balance()

    def _from_upstream(self):
        data = self.upstream.recv()
        if data is None:
            return
        if not data:
            return self._upstream_ended()
        talk, client = self.talk, self.client
        self.last = self.loop.now
        self.bytes_out += len(data)
        self.replay = None
        crowded = talk.crowded
        client.send(talk.from_upstream(data))
        if talk.done:
            self._logout()
        elif client.out or crowded:
            self._balance()
        if self.stopping and not talk.owed:
            self.finish(Reason.STOP)

    def _drained(self):
        """A side takes bytes again."""
        before = len(self.client.out)
        self.client.flush()
        if len(self.client.out) < before:
            self.last = self.loop.now
        if self.upstream and self.upstream.out:
            self.upstream.flush()
        if self.state is State.ENDING:
            if not self.client.out:
                self.close(*self.ending)
        else:
            self._balance()

    def _balance(self):
        """Read each side only while the other, and the client's own, takes what comes of it."""
        client, upstream = self.client, self.upstream
        if self.state is not State.RELAY:
            return
        full = len(client.out) > HIGH_WATER
        read_client = not (client.eof or full or upstream.out or self.talk.crowded or self.stopping)
        client.want((READ if read_client else 0) | (WRITE if client.out else 0))
        upstream.want((0 if full else READ) | (WRITE if upstream.out else 0))
        limit = STALL_LIMIT if full else self.shim.conf.idle_timeout
        if self.last + limit < self.deadline:
            self._set_deadline(self.last + limit)

    def _note(self, seen):
        for verb, words in seen:
            if self.loop.log.debug:
                shown = words if verb != b"PASSWORD" else words[:1] + [b"..."]
                self.log(DEBUG, "command %s", printable(b" ".join(shown)))
            if verb in NOTED and len(words) == 2:
                if verb == b"USERNAME":
                    self.user = printable(words[1])
                    self.log(INFO, "user %s", self.user)
                else:
                    self.ups = printable(words[1])
                    self.log(INFO, "%s to UPS %s", verb.decode().lower(), self.ups)
        seen.clear()

    # Ends.

    def _client_ended(self):
        talk, upstream = self.talk, self.upstream
        if self.shim.reuse and talk.clean:
            self._release()
        elif talk.owed > 0 and not self.client.error:
            # Half-closed: upsd learns of it at once, and its last replies still arrive.
            upstream.half_close()
            self.client.want(WRITE if self.client.out else 0)
            return self._set_deadline(self.loop.now + DRAIN_LIMIT)
        self.close(Reason.CLIENT, self.client.error)

    def _upstream_ended(self):
        if self.replay is not None and self.talk.repeatable and not self.stopping:
            self.log(DEBUG, "the kept upstream session was dead: replaced")
            self.upstream.close()
            self.upstream, self.reused = None, False
            self.began = self.loop.now
            if not self.replay:
                self.replay = None
            return self._dial()
        reason = Reason.LOGOUT if self.talk.leaving else Reason.UPSD
        self.finish(reason, self.upstream.error)

    def _logout(self):
        """The client said LOGOUT and was answered here: upstream is free for the next one."""
        if self.talk.clean:
            self._release()
        self.finish(Reason.LOGOUT)

    def _release(self):
        side, self.upstream = self.upstream, None
        if side.out or not self.shim.keep(side):
            side.close()

    def finish(self, reason, detail=""):
        """Close once the client has what is on its way to it."""
        if not self.client.out:
            return self.close(reason, detail)
        self.state, self.ending = State.ENDING, (reason, detail)
        self.client.on_write = self._drained
        self.client.want(WRITE)
        if self.upstream:
            self.upstream.want(0)
        self._set_deadline(self.loop.now + DRAIN_LIMIT)

    def stop(self):
        """At TERM: the replies under way, no new commands."""
        self.stopping = True
        if self.state is State.RELAY and self.talk.owed > 0:
            self._balance()
        elif self.state is not State.ENDING:
            self.finish(Reason.STOP)

    def expired(self):
        """The deadline has passed, or activity has moved it."""
        now, conf = self.loop.now, self.shim.conf
        if self.state is State.DIAL:
            self._target_failed("no answer in time")
        elif self.state is State.RELAY and not self.client.eof:
            full = len(self.client.out) > HIGH_WATER
            end = self.last + (STALL_LIMIT if full else conf.idle_timeout)
            if now < end:
                self._set_deadline(end)
            else:
                self.close(Reason.STALL if full else Reason.IDLE)
        elif self.state in (State.GREETING, State.HANDSHAKE):
            self.close(Reason.TIMEOUT, "no %s within %d s" % (
                "STARTTLS" if self.state is State.GREETING else "end of the TLS handshake", conf.handshake_timeout))
        else:
            self.close(self.ending[0] if self.state is State.ENDING else Reason.CLIENT, "drained too slowly")

    def close(self, reason, detail=""):
        """The one way down; idempotent."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        if self.upstream:
            self.shim.remember(self.upstream, self.target)
            self.upstream.close()
        self.client.close()
        self.loop.forget(self)
        if reason not in ORDINARY:
            self.shim.refused[reason.value] += 1
        self.log(INFO if reason in ORDINARY else WARNING, "closed: %s%s, %.1f s, %d bytes in, %d bytes out",
                 reason.value, " (%s)" % detail if detail else "", self.loop.now - self.began, self.bytes_in, self.bytes_out)


def is_loopback(host):
    return host.startswith("127.") or host in ("::1", "::ffff:127.0.0.1")


def tune(sock):
    """No delay for small replies; find out about peers that have vanished."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# --- Shims and upstream reuse ------------------------------------------------------------------------


class Target:
    """One upstream and its addresses, looked up anew in the background while the old ones serve."""

    def __init__(self, host, port):
        self.host, self.port = host, port
        self.text = address_text((host, port))
        self.numeric = numeric_family(host)
        self.addresses = [(self.numeric, (host, port))] if self.numeric and "%" not in host else []
        self.failed = None                      # The last failure, None when it works.
        self._fresh_until = 0
        self._waiting = None                    # Sessions' callbacks while a look-up runs.

    def refresh(self, loop, then):
        """See to it that addresses are fresh; then(self, error) is called if there are none yet."""
        if self.numeric and self.addresses or loop.now < self._fresh_until:
            return
        if self._waiting is not None:
            self._waiting.append(then)
            return
        self._waiting = [then]

        def done(found, error):
            waiting, self._waiting = self._waiting, None
            if found:
                self.addresses, self._fresh_until = found, loop.now + RESOLVE_TTL
            elif self.addresses:
                loop.log.limited(WARNING, self.text, "%s: the name cannot be resolved (%s); going on with the old addresses",
                                 self.text, error)
                self._fresh_until = loop.now + RATE_LIMIT
            for callback in waiting:
                callback(self, error)
        loop.workers.look_up(self.host, self.port, done)


class Shim:
    """A configured shim at run time: TLS context, upstreams, kept sessions and counters."""

    def __init__(self, loop, conf, credentials):
        self.loop, self.conf, self.name = loop, conf, conf.name
        self.server = conf.role == SERVER
        self.credentials, self.context = credentials, credentials.context
        self.reuse = 0 if self.server else conf.reuse
        self.targets = [Target(host, port or (3493 if self.server else 401)) for host, port in conf.upstream]
        self.kept = collections.deque()         # (until, side), the oldest first
        self.resume = {}                        # server name -> ssl.SSLSession, for TLS 1.3 resumption
        self.sessions = self.total = self.fresh = self.reused = 0
        self.refused = collections.Counter()
        self.addresses = collections.Counter()  # Sessions by peer address.
        self.retired = False                    # Replaced by a reload: keeps nothing any more.

    def name_for(self, target):
        return (self.conf.server_name or target.host.partition("%")[0]).encode("ascii")

    def remember(self, side, target):
        """Keep the newest ticket for the next handshake."""
        if not self.server and side.peer and target and not self.retired and not side.closed:
            try:
                session = side.sock.session
                if session and session.has_ticket:
                    self.resume[self.name_for(target)] = session
            except (OSError, ValueError, AttributeError):
                pass

    def keep(self, side):
        """Put an upstream session that is as good as new aside; False when it may not be kept."""
        if self.retired or self.loop.stopping or len(self.kept) >= KEPT_MAX or side.eof:
            return False
        entry = (self.loop.now + self.reuse, side)
        self.kept.append(entry)
        side.session = None
        side.on_read = lambda: self._kept_spoke(entry)
        self.loop.watch(entry[0])
        return True

    def _kept_spoke(self, entry):
        if entry[1].recv() is not None:         # Its end, or a byte nobody asked for: no good any more.
            self.kept.remove(entry)
            entry[1].close()

    def take_kept(self):
        if not self.kept:
            return None
        self.reused += 1
        return self.kept.pop()[1]

    def drop_kept(self, before):
        """Close what has been kept past its time; float('inf') for all of it."""
        while self.kept and self.kept[0][0] <= before:
            self.kept.popleft()[1].close()
        if self.kept:
            self.loop.watch(self.kept[0][0])


# --- Loop ------------------------------------------------------------------------------------------


class Loop:
    """The selectors loop: events to sides, deadlines to sessions, threads' results to whoever asked."""

    def __init__(self, log, threads):
        self.log = log
        self.selector = selectors.DefaultSelector()
        self.now = time.monotonic()
        self.sessions = set()
        self.max_sessions = 0
        self.stopping = self.finished = False
        self.on_signal = None
        self._number = 0
        self._next = float("inf")               # When the earliest deadline may be due.
        self._timers = []                       # (when, callback)
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self.shims = []
        reader, self._waker = socket.socketpair()
        reader.setblocking(False)
        self._waker.setblocking(False)
        self._wakes = self.add(reader, self._woken)
        self.workers = Workers(threads, self._wake)
        signal.set_wakeup_fd(self._waker.fileno())

    def add(self, sock, on_read):
        """Watch a socket that is no session's; the Side's close() ends that."""
        side = Side(self.selector, sock, None)
        side.on_read, side.on_write = on_read, side.flush
        side.want(READ)
        return side

    def _wake(self):
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            pass                                # Full: it will wake anyway.

    def _woken(self):
        for number in (self._wakes.recv() or b"").replace(b"\0", b""):
            self.on_signal(number)
        done = self.workers.done
        while done:
            session, then, result, error = done.popleft()
            self._guarded(session, then, result, error)

    def _guarded(self, session, call, *args):
        try:
            call(*args)
        except ProtocolError as error:
            session.close(error.reason, str(error))
        except MemoryError:
            self.log.limited(ERROR, "memory", "out of memory: a session is closed")
            if session:
                session.close(Reason.RESOURCES, "memory")
        except Exception:
            import traceback                    # Only a bug needs it.
            self.log(ERROR, "%s", "internal error, please report:\n" + traceback.format_exc())
            if session:
                session.close(Reason.BUG)

    def watch(self, when):
        if when < self._next:
            self._next = when

    def at(self, when, callback):
        self._timers.append((when, callback))
        self.watch(when)

    def next_number(self):
        self._number += 1
        return self._number

    def run(self):
        select, monotonic, guarded = self.selector.select, time.monotonic, self._guarded
        while not self.finished:
            events = select(max(0, self._next - monotonic()) if self._next < float("inf") else None)
            self.now = monotonic()
            for key, mask in events:
                side = key.data
                if mask & READ and side.mask & READ:
                    guarded(side.session, side.on_read)
                if mask & WRITE and side.mask & WRITE:
                    guarded(side.session, side.on_write)
            if self.now >= self._next:
                self._sweep()

    def _sweep(self):
        now, self._next = self.now, float("inf")
        for session in list(self.sessions):
            if session.deadline <= now:
                self._guarded(session, session.expired)
            else:
                self.watch(session.deadline)
        for shim in self.shims:
            shim.drop_kept(now)
        due = [timer for timer in self._timers if timer[0] <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for _, callback in due:
            self._guarded(None, callback)
        for when, _ in self._timers:
            self.watch(when)
        self._next = max(self._next, now + 0.25)

    # Sessions.

    def listen(self, sock, shim):
        """Accept sessions for a shim; returns the Side, whose session attribute holds the shim."""
        side = self.add(sock, lambda: self._accept(side))
        side.shim = shim
        return side

    def _accept(self, listener):
        for _ in range(ACCEPT_BATCH):
            try:
                sock, address = listener.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                return self._exhausted(listener, error)
            reason = self._refusal(listener.shim, address[0])
            if reason:
                listener.shim.refused[reason.value] += 1
                self.log.limited(WARNING, (listener.shim.name, reason), "[%s] %s: refused: %s", listener.shim.name,
                                 address_text(address), reason.value)
                sock.close()
                continue
            sock.setblocking(False)
            listener.shim.total += 1
            listener.shim.sessions += 1
            listener.shim.addresses[address[0]] += 1
            self._guarded(None, self._begin, listener.shim, sock, address)

    def _begin(self, shim, sock, address):
        session = Session(self, shim, sock, address)
        if session.state is not State.CLOSED:
            self.sessions.add(session)

    def _refusal(self, shim, host):
        conf = shim.conf
        if conf.allow_from:
            import ipaddress
            if not any(ipaddress.ip_address(host.partition("%")[0]) in network for network in conf.allow_from):
                return Reason.ALLOW_FROM
        if len(self.sessions) >= self.max_sessions:
            return Reason.MAX_SESSIONS
        return Reason.PER_ADDRESS if shim.addresses[host] >= conf.max_sessions_per_address else None

    def _exhausted(self, listener, error):
        """Without descriptors a connection cannot even be refused, so one is held back for that."""
        self.log.limited(ERROR, "accept", "[%s] a new session is refused: %s", listener.shim.name, error.strerror)
        listener.shim.refused[Reason.RESOURCES.value] += 1
        try:
            os.close(self._spare)
            listener.sock.accept()[0].close()
        except (OSError, TypeError):
            listener.want(0)                    # Nothing helps: look again in a second.
            self.at(self.now + 1, lambda: listener.closed or listener.want(READ))
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            self._spare = None

    def forget(self, session):
        shim, host = session.shim, session.address[0]
        self.sessions.discard(session)
        shim.sessions -= 1
        shim.addresses[host] -= 1
        if not shim.addresses[host]:
            del shim.addresses[host]


# --- Control and status -----------------------------------------------------------------------------


def control_path(conf):
    return os.path.splitext(conf.pidfile)[0] + ".sock"


def default_pidfile(conf):
    if "pidfile" not in conf.lines and not os.path.isdir("/run"):
        conf.pidfile = "/var/run/nutshim.pid"
    return conf


def ask_daemon(conf, request):
    """Send one request to the running daemon: (exit status, answer)."""
    path = control_path(conf)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        try:
            sock.connect(path)
            sock.sendall(request.encode() + b"\n")
            answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        except OSError as error:
            return 1, "no running nutshim answers at %s: %s" % (path, error.strerror or error)
    status, _, text = answer.partition("\n")
    return (0 if status == "OK" else 1), text


def status_data(daemon):
    """Everything -c status shows, as plain data."""
    loop, now = daemon.loop, time.time()
    shims = []
    for shim in loop.shims:
        shims.append({
            "name": shim.name, "role": shim.conf.role,
            "listen": [address_text(side.sock.getsockname()) for side in daemon.listeners.values() if side.shim is shim],
            "upstream": [{"address": t.text, "state": t.failed or "ok"} for t in shim.targets],
            "certificates": [{"what": what, "days_left": int((end - now) // 86400)} for what, end in shim.credentials.expiries],
            "sessions": shim.sessions, "sessions_total": shim.total, "kept": len(shim.kept),
            "upstream_fresh": shim.fresh, "upstream_reused": shim.reused, "refused": dict(shim.refused)})
    sessions = []
    for s in sorted(loop.sessions, key=lambda s: s.number):
        peer = s.client.peer or s.upstream and s.upstream.peer
        sessions.append({
            "number": s.number, "shim": s.shim.name, "state": s.state.value, "seconds": int(loop.now - s.began),
            "peer": address_text(s.address), "tls": peer.version if peer else "", "identity": peer.names if peer else [],
            "class": s.access or ("admin" if s.shim.server else ""), "user": s.user or "", "ups": s.ups or "",
            "bytes_in": s.bytes_in, "bytes_out": s.bytes_out})
    return {"version": VERSION, "pid": os.getpid(), "seconds": int(loop.now - daemon.began), "shims": shims, "sessions": sessions}


def status_table(data):
    lines = ["nutshim %(version)s, process %(pid)d, up %(seconds)d s" % data]
    for shim in data["shims"]:
        lines.append("[%s] %s on %s" % (shim["name"], shim["role"], ", ".join(shim["listen"])))
        lines += ["    upstream %(address)s: %(state)s" % target for target in shim["upstream"]]
        lines += ["    %(what)s: %(days_left)d days left" % item for item in shim["certificates"]]
        lines.append("    sessions %(sessions)d now, %(sessions_total)d since start; upstream sessions %(upstream_fresh)d fresh, "
                     "%(upstream_reused)d reused, %(kept)d kept" % shim)
        lines += ["    refused %d: %s" % (count, reason) for reason, count in sorted(shim["refused"].items())]
    rows = [("NUMBER", "SHIM", "PEER", "AGE", "STATE", "TLS", "CLASS", "USER", "UPS", "IN", "OUT", "IDENTITY")]
    rows += [tuple(str(s[k]) for k in ("number", "shim", "peer", "seconds", "state", "tls", "class", "user", "ups", "bytes_in",
                                       "bytes_out")) + (", ".join(s["identity"]),) for s in data["sessions"]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(lines + ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows])


def status_prometheus(data):
    lines = ["nutshim_up_seconds %d" % data["seconds"]]
    for shim in data["shims"]:
        label = 'shim="%s"' % shim["name"]
        for key in ("sessions", "sessions_total", "kept", "upstream_fresh", "upstream_reused"):
            lines.append("nutshim_%s{%s} %d" % (key, label, shim[key]))
        lines += ['nutshim_refused_total{%s,reason="%s"} %d' % (label, r, n) for r, n in sorted(shim["refused"].items())]
        lines += ['nutshim_upstream_up{%s,upstream="%s"} %d' % (label, t["address"], t["state"] == "ok") for t in shim["upstream"]]
        lines += ['nutshim_certificate_days_left{%s,what="%s"} %d' % (label, c["what"], c["days_left"]) for c in shim["certificates"]]
    return "\n".join(lines)


# --- Probe -----------------------------------------------------------------------------------------


def probe(conf, credentials, say):
    """-p NAME: each step towards a client shim's upstream, with its result; the exit status."""
    for host, port in conf.upstream:
        port = port or 401
        text = address_text((host, port))
        name = (conf.server_name or host.partition("%")[0])
        step, sock = "resolve", None
        try:
            found = look_up(host, port)
            say("resolve     %s: %s" % (host, ", ".join(address_text(address) for _, address in found)))
            step = "connect"
            sock = socket.create_connection(found[0][1][:2] if False else _bytes_address(found), conf.handshake_timeout)
            say("connect     %s" % address_text(sock.getpeername()))
            step = "STARTTLS"
            _probe_starttls(sock)
            say("STARTTLS    OK")
            step = "TLS"
            try:
                sock = credentials.context.wrap_socket(sock, server_hostname=name.encode())
            except ssl.SSLCertVerificationError as error:
                step = "name" if error.verify_code in (62, 64) else "chain"
                raise ValueError("%s. %s" % (tls_error(error, name), _probe_stranger(conf, found, name))) from None
            peer = describe_peer(sock)
            say("TLS         %s %s" % (peer.version, peer.cipher))
            say("certificate %s, %s" % (", ".join(peer.names), days_text(peer.not_after)))
            say("chain       %s" % ("OK" if conf.verify in ("full", "chain") else "not checked (verify = %s)" % conf.verify))
            say("name        %s" % ("%s OK" % name if conf.verify == "full" else "not checked (verify = %s)" % conf.verify))
            step = "pin"
            if conf.pin and peer.pin not in conf.pin:
                raise ValueError("the server's key has the pin %s, which is not in 'pin'" % peer.pin)
            say("pin         %s%s" % (peer.pin, " OK" if conf.pin else ""))
            step = "upsd"
            for command in (b"VER", b"LIST UPS"):
                sock.sendall(command + b"\n")
                replies, answer = Replies(), b""
                while True:
                    data = sock.recv(CHUNK)
                    if not data:
                        raise ValueError("closed before it answered %s" % command.decode())
                    answer += data
                    if replies.feed(data):
                        break
                for line in answer.splitlines():
                    say("upsd        %s" % printable(line)[1:-1])
            return 0
        except (OSError, ValueError, ProtocolError) as error:
            words = "no answer within %d s" % conf.handshake_timeout if isinstance(error, socket.timeout) else tls_error(error, name)
            say("%-11s FAILED at %s: %s" % (step, text, words))
        finally:
            if sock:
                sock.close()
    return 1


def _bytes_address(found):
    return found[0][1][:2]


def _probe_starttls(sock):
    sock.sendall(b"STARTTLS\n")
    answer = b""
    while not starttls_reply(answer):
        data = sock.recv(CHUNK)
        if not data:
            raise ValueError("closed before it answered STARTTLS")
        answer += data


def _probe_stranger(conf, found, name):
    """Whose certificate was refused: looked at over a second connection, on which nothing is said."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(_bytes_address(found), conf.handshake_timeout) as sock:
        _probe_starttls(sock)
        with context.wrap_socket(sock) as tls:
            peer = describe_peer(tls)
    return "The certificate is for %s, not for %s; %s; its pin is %s" % (
        ", ".join(peer.names) or "nobody", name, days_text(peer.not_after), peer.pin)


def days_text(not_after):
    days = int((not_after - time.time()) // 86400)
    return "expired %d days ago" % -days if days < 0 else "expires in %d days" % days


# --- Daemon ------------------------------------------------------------------------------------------


class Daemon:
    """The running program: configuration, listeners, pidfile, user, reload and stop."""

    def __init__(self, path, args, log):
        self.path, self.args, self.log = os.path.abspath(path), args, log
        self.listeners = {}                     # (family, host, port as configured) -> Side
        self.conf = self.loop = self._pidfile = None
        self.began = time.monotonic()
        self._notify_socket = None

    def start(self, ready):
        """Open everything, become the user, and say ready(); ConfigError or OSError if that fails."""
        self.conf, credentials, warnings = check_config(self.path)
        conf = default_pidfile(self.conf)
        for option in ("user", "chroot"):
            if getattr(self.args, option, None):
                setattr(conf, option, getattr(self.args, option))
        self._open_log()
        self._lock_pidfile()
        self.loop = loop = Loop(self.log, conf.handshake_threads)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)      # The loop gets it through the wake-up descriptor.
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        loop.on_signal = self._signalled
        self._apply(conf, credentials, warnings, self._handed_over())
        self._open_control()
        self._open_notify()
        self._drop_privileges()
        self.log(NOTICE, "nutshim %s started, %s", VERSION, ssl.OPENSSL_VERSION)
        self.notify("READY=1")
        ready()
        self._daily()
        loop.run()
        return 0

    def _open_log(self):
        foreground = self.args.debug or self.args.foreground
        if self.conf.log == "stderr" and not foreground:
            raise ConfigError(["%s: log: stderr needs -F or -D" % self.conf.path])
        try:
            self.log.open("stderr" if self.args.debug else self.conf.log)
        except OSError as error:
            raise ConfigError(["%s:%d: log: %s: %s" % (self.conf.path, self.conf.lines.get("log", 0), self.conf.log,
                                                       error.strerror)]) from None

    # Listeners.

    def _apply(self, conf, credentials, warnings, handed_over=()):
        """Make a configuration the running one: all of it, or on ConfigError none."""
        opened, wanted = {}, {}
        shims = [Shim(self.loop, shim_conf, credentials[shim_conf.name]) for shim_conf in conf.shims]
        try:
            for shim in shims:
                for key in self._listen_keys(shim):
                    if key in wanted:
                        raise ConfigError(["%s:%d: [%s] listen: %s is taken by [%s]" % (
                            conf.path, shim.conf.line, shim.name, address_text(key[1:]), wanted[key].name)])
                    if key not in self.listeners:
                        sock = take_handed_over(handed_over, key) or self._bind(shim, key)
                        if sock:
                            opened[key] = sock
                    wanted[key] = shim
                if not any(wanted[key] is shim and (key in opened or key in self.listeners) for key in wanted):
                    raise ConfigError(["%s:%d: [%s] listen: none of its addresses exists on this machine" % (
                        conf.path, shim.conf.line, shim.name)])
        except (ConfigError, OSError):
            for sock in opened.values():
                sock.close()
            raise
        for key in [key for key in self.listeners if key not in wanted]:
            self.listeners.pop(key).close()
        for key, shim in wanted.items():
            if key in opened:
                self.listeners[key] = self.loop.listen(opened[key], shim)
                self.log(INFO, "[%s] listening on %s (%s, upstream %s)", shim.name, address_text(opened[key].getsockname()),
                         shim.conf.role, ", ".join(target.text for target in shim.targets))
            elif key in self.listeners:
                self.listeners[key].shim = shim
        for shim in self.loop.shims:
            shim.retired = True
            shim.drop_kept(float("inf"))
        self.loop.shims = shims
        self.loop.max_sessions = conf.max_sessions
        for text in warnings:
            self.log(WARNING, "%s", text)
        self.conf = conf

    def _listen_keys(self, shim):
        keys = []
        for host, port in shim.conf.listen:
            if host == "*":
                found = [(socket.AF_INET, ("0.0.0.0", port)), (socket.AF_INET6, ("::", port))]  # noqa: S104
            else:
                try:
                    found = look_up(host, port, passive=True)
                except OSError as error:
                    raise ConfigError(["%s:%d: [%s] listen: %s: %s" % (
                        self.conf.path, shim.conf.lines.get("listen", shim.conf.line), shim.name, host, error.strerror)]) from None
            keys += [(family,) + address for family, address in found if (family,) + address not in keys]
        return keys

    def _bind(self, shim, key):
        family, address = key[0], key[1:]
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            return None                                     # A machine without IPv6.
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            tune(sock)                                      # Accepted sockets inherit it.
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
            return sock
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET6:
                return None
            hint = {errno.EACCES: "; ports below 1024 need root at start", errno.EADDRINUSE: "; something else listens there"}
            raise ConfigError(["%s:%d: [%s] listen: %s: %s%s" % (
                shim.conf.path, shim.conf.lines.get("listen", shim.conf.line), shim.name, address_text(address), error.strerror,
                hint.get(error.errno, ""))]) from None

    def _handed_over(self):
        """Sockets from systemd (sd_listen_fds(3))."""
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            return []
        socks = [socket.socket(fileno=fd) for fd in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))]
        for sock in socks:
            sock.setblocking(False)
        return socks

    # Process: pidfile, user, service manager.

    def _lock_pidfile(self):
        path = self.conf.pidfile
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if not (self.args.foreground or self.args.debug):
                raise ConfigError(["pidfile: %s: %s" % (path, error.strerror)]) from None
            return self.log(WARNING, "pidfile: %s: %s; -c will not work", path, error.strerror)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(["%s: nutshim is running already, as process %s" % (
                path, os.read(fd, 20).decode("ascii", "replace").strip())]) from None
        os.ftruncate(fd, 0)
        os.write(fd, b"%d\n" % os.getpid())
        self._pidfile = fd

    def _drop_privileges(self):
        conf = self.conf
        if conf.user is None and os.geteuid() == 0:
            try:
                conf.user = pwd.getpwnam("nut").pw_name
            except KeyError:
                self.log(WARNING, "there is no user nut: going on as root; set user")
        account = pwd.getpwnam(conf.user) if conf.user else None
        if account and account.pw_uid == os.geteuid():
            account = None
        if account and self._pidfile is not None:
            os.chown(control_path(conf), account.pw_uid, account.pw_gid)
        if conf.chroot:
            os.chroot(conf.chroot)
        os.chdir("/")
        if account:
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
            if (os.getuid(), os.geteuid(), os.getgid(), os.getgroups()) != (account.pw_uid, account.pw_uid, account.pw_gid, []):
                raise ConfigError(["user: could not become %s" % conf.user])

    def _open_notify(self):
        path = os.environ.get("NOTIFY_SOCKET", "")
        if path:
            self._notify_socket = sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            sock.setblocking(False)
            sock.connect("\0" + path[1:] if path[0] == "@" else path)
            if os.environ.get("WATCHDOG_USEC", "").isdigit():
                self._watchdog(int(os.environ["WATCHDOG_USEC"]) / 2e6)

    def _watchdog(self, every):
        self.notify("WATCHDOG=1")
        self.loop.at(self.loop.now + every, lambda: self._watchdog(every))

    def notify(self, text):
        """To the service manager (sd_notify(3))."""
        if self._notify_socket:
            try:
                self._notify_socket.send(text.encode())
            except OSError:
                pass

    # Requests: signals and the status socket.

    def _open_control(self):
        if self._pidfile is None:
            return
        path = control_path(self.conf)
        try:
            os.unlink(path)                                 # Left by a killed one: the pidfile's lock is ours.
        except OSError:
            pass
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        except OSError as error:
            raise ConfigError(["pidfile: %s: %s" % (path, error.strerror)]) from None
        finally:
            os.umask(mask)
        sock.listen(8)
        sock.setblocking(False)
        side = self.loop.add(sock, lambda: self._control_accept(side))

    def _control_accept(self, listener):
        try:
            sock = listener.sock.accept()[0]
        except OSError:
            return
        sock.setblocking(False)
        side = self.loop.add(sock, lambda: self._control_read(side))

    def _control_read(self, side):
        data = side.recv()
        if data is None:
            return
        text = self._request(data.decode("ascii", "replace").strip()) if data[-1:] == b"\n" and len(data) <= CONTROL_LINE else ""
        side.on_write = lambda: (side.flush(), side.out or side.close())
        side.send(text.encode())
        if not side.out:
            side.close()

    def _request(self, word):
        if word == "status":
            import json
            return "OK\n" + json.dumps(status_data(self))
        if word == "reload":
            fault = self.reload()
            return "ERR\n" + fault if fault else "OK\nreloaded"
        if word == "stop":
            self.stop()
            return "OK\nstopping"
        return "ERR\nexpected status, reload or stop"

    def _signalled(self, number):
        if number == signal.SIGHUP:
            self.reload()
        elif number in (signal.SIGTERM, signal.SIGINT):
            self.stop()

    def reload(self):
        """Take the configuration anew; on a fault nothing changes. Returns the fault's text, or None."""
        if self.loop.stopping:
            return "nutshim is stopping"
        self.notify("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
        old = self.conf
        try:
            conf, credentials, warnings = check_config(self.path)
            default_pidfile(conf)
            if conf.log != "syslog" and not self.args.debug:
                self.log.open(conf.log)
            self._apply(conf, credentials, warnings)
        except (ConfigError, OSError) as error:
            self.log(ERROR, "reload failed, going on as before:\n%s", error)
            self.notify("READY=1")
            return str(error)
        changed = [o for o in ("user", "chroot", "pidfile", "handshake_threads")
                   if o in conf.lines and getattr(conf, o) != getattr(old, o)]
        for option in ("user", "chroot", "pidfile"):
            setattr(conf, option, getattr(old, option))
        if changed:
            self.log(WARNING, "%s: takes effect with the next start", ", ".join(changed))
        self.log(NOTICE, "reloaded %s", self.path)
        self._daily(again=False)
        self.notify("READY=1")
        return None

    def _daily(self, again=True):
        """Say how long the certificates still hold, at start, reload and each day."""
        for shim in self.loop.shims:
            for what, end in shim.credentials.expiries:
                days = (end - time.time()) / 86400
                level = ERROR if days < 0 else WARNING if days < EXPIRY_WARNING else INFO
                self.log(level, "[%s] %s %s", shim.name, what, days_text(end))
        if again:
            self.loop.at(self.loop.now + 86400, self._daily)

    def stop(self):
        """No new sessions; replies under way arrive; then the end."""
        loop = self.loop
        if loop.stopping:
            return
        loop.stopping = True
        self.log(NOTICE, "stopping, %d sessions", len(loop.sessions))
        self.notify("STOPPING=1")
        for side in self.listeners.values():
            side.close()
        for shim in loop.shims:
            shim.drop_kept(float("inf"))
        for session in list(loop.sessions):
            session.stop()
        loop.at(loop.now + STOP_GRACE, self._end)
        self._end_if_idle()

    def _end_if_idle(self):
        if self.loop.sessions:
            self.loop.at(self.loop.now, self._end_if_idle)
        else:
            self._end()

    def _end(self):
        for session in list(self.loop.sessions):
            session.close(Reason.STOP)
        self.loop.finished = True
        if self._pidfile is not None:
            for path in (self.conf.pidfile, control_path(self.conf)):
                try:
                    os.unlink(path)
                except OSError:
                    pass                                    # The user may not, in /run: an empty file stays.
            os.ftruncate(self._pidfile, 0)
        self.log(NOTICE, "stopped")


def take_handed_over(socks, key):
    """The systemd socket for a listen address, taken out of the list."""
    for sock in socks:
        if sock.family == key[0] and sock.getsockname()[:2] == key[1:3]:
            socks.remove(sock)
            return sock
    return None


# --- Main ------------------------------------------------------------------------------------------


def background(run):
    """Double fork; the parent stays until the daemon is ready, so that a failed start is seen. Exit status."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return 0 if os.read(reader, 1) else 1
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(reader)

    def ready():
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.write(writer, b"1")
        os.close(writer)
    return run(ready)


def print_check(conf, credentials, warnings):
    for text in warnings:
        print("warning: %s" % text)
    for shim in conf.shims:
        held = credentials[shim.name]
        print("[%s] %s on %s, upstream %s" % (
            shim.name, shim.role, ", ".join(address_text(a) for a in shim.listen),
            ", ".join(address_text((host, port or (3493 if shim.role == SERVER else 401))) for host, port in shim.upstream)))
        for what, end in held.expiries:
            print("    %s: %s" % (what, days_text(end)))
        if held.own:
            print("    names %s\n    pin = %s" % (", ".join(held.own.names), held.own.pin))
    print("%s: no fault found" % conf.path)


def control(words, conf, form):
    status, text = ask_daemon(conf, words)
    if status == 0 and words == "status":
        import json
        data = json.loads(text)
        text = {"json": json.dumps(data, indent=1), "prometheus": status_prometheus(data)}.get(form) or status_table(data)
    print(text, file=sys.stderr if status else sys.stdout)
    if status == 0 and words == "stop":
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and os.path.exists(control_path(conf)):
            if ask_daemon(conf, "")[1].startswith("no running"):
                break
            time.sleep(0.05)
    return status


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="nutshim.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="TLS 1.3 for NUT: in front of upsd (role server), and of upsmon, upsc, ... (role client).",
        epilog="Options in nutshim.conf:\n" + option_help())
    parser.add_argument("-f", metavar="FILE", dest="file", help="configuration file")
    parser.add_argument("-D", action="count", default=0, dest="debug", help="debug: foreground, to stderr; repeat for more")
    parser.add_argument("-F", action="store_true", dest="foreground", help="stay in the foreground, log where 'log' says")
    parser.add_argument("-u", metavar="USER", dest="user", help="become USER once the ports are open")
    parser.add_argument("-r", metavar="DIR", dest="chroot", help="confine to DIR")
    parser.add_argument("-t", action="store_true", dest="test", help="check the configuration, report every fault")
    parser.add_argument("-c", choices=("reload", "stop", "status"), dest="command", help="speak to the running daemon")
    parser.add_argument("--json", action="store_const", const="json", dest="form", help="with -c status")
    parser.add_argument("--prometheus", action="store_const", const="prometheus", dest="form", help="with -c status")
    parser.add_argument("-p", metavar="NAME", dest="probe", help="probe client shim NAME's upstream")
    parser.add_argument("-V", action="version", version="nutshim %s, Python %s, %s" % (
        VERSION, sys.version.split()[0], ssl.OPENSSL_VERSION))
    args = parser.parse_args(argv)
    log = Log(args.debug)
    try:
        path = args.file or find_config()
        if args.command:
            return control(args.command, default_pidfile(read_config(path)[0]), args.form)
        conf, credentials, warnings = check_config(path)
        if args.test:
            print_check(conf, credentials, warnings)
            return 0
        if args.probe:
            shim = next((s for s in conf.shims if s.name == args.probe and s.role == CLIENT), None)
            if not shim:
                raise ConfigError(["%s: no client shim [%s]" % (path, args.probe)])
            return probe(shim, credentials[shim.name], lambda text: print(text, flush=True))
        daemon = Daemon(path, args, log)
        if args.foreground or args.debug:
            return daemon.start(lambda: None)
        return background(daemon.start)
    except ConfigError as error:
        print(error, file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
