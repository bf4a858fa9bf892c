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

How it works.  A pure protocol core (no socket, clock, log or configuration) cuts a client's bytes
into commands and upsd's into replies, so it knows how many replies are owed, or that nobody can
know any more (Conversation.counted).  The turn of the shim's own replies, access classes and
STARTTLS rest on that one count.  One selectors loop moves the bytes.  TLS happens in memory: the
loop reads a socket once, feeds what came to the TLS engine, and sends what the engine makes.

A Listener makes a Session of each connection that is let in.  Its opening (greeting, TLS,
admission, look-up, TCP, STARTTLS, TLS; Session._open()) is a coroutine that tells the steps in
order and waits for a socket, a thread or a deadline.  From then on a table of states and events
(_EVENTS) says what happens, and Session._settle() who is read while others cannot take more.  All
ends are Session.finish() or close(), which log the one "closed:" line, with a Reason.

A client shim's session has no opening at first: its stateless questions, and all other clients',
are asked over one shared upstream session (Shared), which holds each reply against its question.
A client that says anything else gets an upstream session of its own, for good, by an opening.

A reload makes new Shims.  A session with an upstream session of its own keeps its
old Shim, unless the new crl has its peer's certificate (Session.judge_again()).

Threads.  Only the main thread, the loop's, touches sockets, sessions, the selector, the log and
the configuration.  Handshake threads get a TLS engine and bytes for it, and give bytes back; each
look-up has a thread for getaddrinfo().  Results come back through Workers.done, and a byte on a
socket pair, where signals arrive as well, wakes the loop.

Faults.  ConfigError is the administrator's and names FILE:LINE.  ProtocolError is a peer's and ends
its session; so does an OSError in an opening or in a Connection's reads and writes.  MemoryError
ends a session too (Loop.fault()).  Anything else is a bug: a traceback in the log, that session
closed, the daemon lives.

Sections, each begun by a line "# --- ": start from bytecode - limits - options - errors and
reasons - configuration - protocol core - certificates and TLS - log - connections and workers -
openings - sessions - upstream - shims - loop - listeners - status and control - probe - process -
daemon - main
"""
from __future__ import annotations

import os
import sys

# --- Start from bytecode: compiling this file leaves 7 MB that Python never gives back -----------

_LAUNCHER = ("import marshal, os, sys; del sys.argv[0]; fd = int(sys.argv.pop(0)); "
             "file = os.fdopen(fd, 'rb'); code = marshal.load(file); file.close(); "
             "exec(code, {'__name__': '__main__', '__file__': sys.argv[0], 'FROM_SOURCE': ''})")
# Why the daemon goes on as compiled from its source; empty when it runs from bytecode.
FROM_SOURCE = globals().get("FROM_SOURCE", "not started as a program")


def _unnamed_file() -> int:
    """A descriptor of a file that no name leads to, and that an exec keeps."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("nutshim", 0)
    for folder in ("/run", "/var/run", "/tmp"):
        path = os.path.join(folder, f".nutshim-{os.urandom(8).hex()}")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError:
            continue
        os.unlink(path)
        os.set_inheritable(fd, True)
        return fd
    raise OSError("no place for an unnamed file")


def open_standard() -> None:
    """Started with 0, 1 or 2 closed: keep these from being anything else."""
    fd = 0
    while fd <= 2:
        fd = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(fd, fd <= 2)
    os.close(fd)


def _start_from_bytecode(code, argv) -> str:
    """Become the same program, started from its bytecode; the reason if that cannot be done."""
    if any(word[:2] in ("-t", "-c", "-p", "-V", "-h", "--") for word in argv[1:]):
        return "not a daemon"
    if os.path.abspath(code.co_filename) != os.path.abspath(argv[0]):
        return "run by another program"
    if not sys.executable or any(name in os.environ for name in ("PYTHONHOME", "PYTHONPATH")):
        return "Python is told by its environment where its modules are"
    import marshal
    import signal
    flags = sys.flags
    words = ["-I", "-S"] + ["-B"] * flags.dont_write_bytecode + ["-O"] * flags.optimize
    words += ["-b"] * flags.bytes_warning + ["-v"] * flags.verbose
    words += [f"-W{each}" for each in sys.warnoptions]
    words += [f"-X{name}" if value is True else f"-X{name}={value}"
              for name, value in sys._xoptions.items()]
    words += ["-Xdev"] * (flags.dev_mode and "dev" not in sys._xoptions)
    try:
        fd = _unnamed_file()
        with os.fdopen(os.dup(fd), "wb") as file:
            marshal.dump(code, file)
        os.lseek(fd, 0, os.SEEK_SET)
        # Signals wait until their handlers are there: process 1 would lose them.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        os.execv(sys.executable, [sys.executable] + words
                 + ["-c", _LAUNCHER, str(fd), os.path.abspath(argv[0])] + argv[1:])
    except (OSError, ValueError) as error:
        return str(error)


if __name__ == "__main__" and FROM_SOURCE:
    open_standard()
    FROM_SOURCE = _start_from_bytecode(sys._getframe().f_code, sys.argv)

# Imports come after it, and are few; what only a check or a probe needs is imported there.
# ruff: noqa: E402
import binascii
import collections
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import itertools
import mmap
import pwd
import re
import select
import selectors
import signal
import socket
import ssl
import stat
import time
import types
import _thread  # threading and queue cost 0.5 MB.
try:
    from _queue import SimpleQueue
except ImportError:
    from queue import SimpleQueue

TYPE_CHECKING = False                # typing costs memory, and annotations are not evaluated.
if TYPE_CHECKING:
    from typing import Any, Callable, Counter, Iterable, Optional, Union

VERSION = "1.1"

# --- Limits: each bounds what a peer can make this process hold, or wait for ---------------------

CHUNK = 16384             # bytes a read: the payload of one TLS record (RFC 8446 5.1)
PIECE = 2048              # bytes fed to or taken from TLS at once: its buffers never shrink
TURN = 512                # bytes of commands taken from a client in one turn, as upsd does
RECORD = 512              # bytes of commands in a TLS record: upsd's own TLS forgets what is beyond
MAX_COMMAND = 33 * 1024   # bytes a command: 32 words of 512, each escaped (NUT parseconf.h)
MAX_COMMAND_LINES = 32    # newlines in a command's quotes; NUT's own clients send none
MAX_WORDS = 32            # words of a command that are looked at; upsd drops what is beyond
MAX_QUESTION = 256        # bytes of a command that may go over a shared session
MAX_KNOWN = 256           # lines of clients that are recognized without being read again
MAX_GREETING = 1024       # bytes a line before TLS
MAX_GREETING_LINES = 8    # lines before TLS that are answered; then it is no TLS client
MAX_HANDSHAKE = 256 * 1024  # bytes of a peer's handshake; a chain of certificates may have 100 KB
MAX_REPLY_LINE = 512      # upsd cuts a reply line here, without a newline (NUT_NET_ANSWER_MAX)
MAX_AHEAD = 64            # commands of a client unanswered, before more of it are taken
HIGH_WATER = 64 * 1024    # bytes unsent to one side, before its other side has to wait
OVERHEAD = 50             # times its data a peer's TLS may need, and HIGH_WATER more; 7 are honest
STALL_LIMIT = 10          # seconds a client may leave that much unread: upsd's writes block for all
DRAIN_LIMIT = 5           # seconds for what is under way when one side has closed
STOP_GRACE = 2            # seconds for replies under way at TERM; procd kills after 5
BACKLOG = 128             # connections waiting in the kernel
ACCEPT_BATCH = 16         # of them taken in one round, before established sessions have their turn
STAGGER = 0.5             # seconds without progress before the next address is tried (RFC 8305)
PATIENCE = 1              # seconds of a shared session's silence, or 4 round trips
MAX_PATIENCE = 60         # seconds: each silence in a row is allowed longer, up to this
MAX_ASKED = 2             # times a question is asked over shared sessions that are lost
UNSHARED = 3600           # seconds that an upstream which gave an odd reply is not shared
RESOLVE_TTL = 60          # seconds a name's addresses are used without asking again
FAILED_TTL = 30           # seconds an address that failed is tried after all others
TICKET_TTL = 3600         # seconds a TLS ticket is used: Python 3.10 to 3.12 lose 6 kB each read
MAX_LOG_LINE = 2048       # characters, bytes to syslog; a false server's names can have 200 KB
RATE_LIMIT = 10           # seconds between two log lines of the same refusal
EXPIRY_WARNING = 30       # days before the end of a certificate
MAX_DEPTH = 30            # DER elements inside each other, as in OpenSSL: no deep recursion
MAX_PEM = 64 << 20        # bytes a PEM file: revocation lists have some MB; a device has no end
BUNDLE = 8                # certificates in trust that are listed one by one; more count as a bundle
NO_EXPIRY = 253370764800  # seconds since 1970: the year 9999, no known end (RFC 5280 4.1.2.5)
SPARE_MEMORY = 2 << 20    # bytes free that a new TLS session needs; Python takes 1 MiB at once
SPARE_DESCRIPTORS = 40    # besides two a session: listeners, log, wake-up, dials
KEEPALIVE = (30, 10, 3)   # TCP: seconds idle, seconds between probes, probes

# --- Options: the one source for parser, help and documentation ----------------------------------
# A parser takes a text and the folder of nutshim.conf; its ValueError says what was expected.


def _number(low, high):
    def parse(text, _base):
        if not re.match("[0-9]{1,9}$", text) or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}, not '{text}'")
        return int(text)
    return parse


def _choice(*words):
    def parse(text, _base):
        if text not in words:
            raise ValueError(f"expected {', '.join(words[:-1])} or {words[-1]}, not '{text}'")
        return text
    return parse


def _path(*words):
    return lambda text, base: text if text in words else os.path.join(base, text)


_ASCII = "expected ASCII without blanks, an international name in its xn-- form"
_host_name = re.compile(r"(?!-)[\w-]{1,63}(?:\.[\w-]{1,63})*", re.ASCII).fullmatch


def _address(local):
    """A parser of HOST[:PORT], [IPv6][:PORT] or a bare IPv6 address -> (host, port or None).

    local is the host that goes with a port alone: * where nutshim listens, localhost elsewhere.
    """
    def parse(text, _base):
        alone = re.match(":?([0-9]{1,5})$", text)
        if alone and int(alone[1]) <= 65535:
            raise ValueError(f"'{text}' is a port; did you mean {local}:{alone[1]}?")
        if "@" in text:
            raise ValueError("a UPS's name belongs in upsmon.conf's MONITOR line, not here: "
                             f"expected HOST[:PORT], not '{text}'")
        if re.search("[^!-~]", text):
            raise ValueError(f"{_ASCII}, not '{text}'")
        host, port = re.match(r"(\[.*\]|[^:]*|.*)(?::([0-9]{1,5}))?$", text).groups()
        host = re.sub(r"^\[(.*:.*)\]$", r"\1", host)
        family = numeric_family(host)
        if family == socket.AF_INET6 and re.match("fe[89ab][^%]*$", host, re.I):
            raise ValueError(f"a link-local address needs its interface: {host}%INTERFACE")
        # inet_aton() takes 401 for 0.0.1.145.
        if not family and re.match(r"(([0-9]+|0x[0-9a-f]*)(\.|$))+$", host, re.I):
            raise ValueError(f"'{host}' is no IPv4 address: expected four numbers from 0 to 255")
        if not family:
            host = re.sub(r"\.$", "", host)
        scoped = family == socket.AF_INET6 and re.match(r"[^%]+(%[\w.-]+)?$", host)
        lowest = 0 if local == "*" else 1
        if (not (_host_name(host) or scoped or host == local)
                or not lowest <= int(port or 401) <= 65535):
            raise ValueError("expected HOST[:PORT], an IPv6 address in brackets, "
                             f"a port up to 65535, not '{text}'")
        packed = socket.inet_pton(family, host.partition("%")[0]) if scoped else b""
        if packed[:12] == bytes(10) + b"\xff\xff":       # ::ffff:192.0.2.1 (RFC 4291 2.5.5.2)
            host = socket.inet_ntop(socket.AF_INET, packed[12:])
        return host, int(port) if port else None
    return parse


def _server_name(text, _base):
    """A host name or address, as certificates have it: without the root's dot at its end."""
    name = re.sub(r"\.$", "", text)
    if not _host_name(name) and (not numeric_family(name) or "%" in name):
        raise ValueError("expected one host name or address, in ASCII (an international name in "
                         f"its xn-- form), without port or brackets, not '{text}'")
    return name


def _pin(text, _base):
    try:
        digest = binascii.a2b_base64(text[8:])
    except ValueError:
        digest = b""
    # Pins are compared as text, so each has only one form.
    if len(digest) != 32 or text != pin_text(digest):
        raise ValueError(f"expected sha256//BASE64 as 'nutshim.py -t' prints it, not '{text}'")
    return text


def pin_text(digest: bytes) -> str:
    """A public key's SHA-256 as curl writes it."""
    return "sha256//" + binascii.b2a_base64(digest, newline=False).decode()


def _network(text, _base):
    import ipaddress                            # Rarely needed: not imported at every start.
    address = text.partition("/")[0]
    try:
        if not numeric_family(address) or "%" in address:
            raise ValueError
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"expected ADDRESS or ADDRESS/BITS, not '{text}'") from None
    first, bits = network.network_address, network.prefixlen
    if first != ipaddress.ip_address(address):
        raise ValueError(f"'{text}' is no network; did you mean {network} or {address}?")
    mapped = bits >= 96 and first.version == 6 and first.ipv4_mapped
    return ipaddress.ip_network((mapped, bits - 96)) if mapped else network


def _permit(text, base):
    identity, _, access = (part.strip() for part in text.rpartition(":"))
    if access not in CLASSES:
        raise ValueError(f"expected IDENTITY: {', '.join(CLASSES)}, not '{text}'")
    if identity.startswith("sha256//"):
        return _pin(identity, base), access
    match = re.match(r"\*$|(CN=|DNS:|IP:|URI:|email:)(\S.*)", identity)
    if not match:
        raise ValueError(f"expected CN=, DNS:, IP:, URI:, email:, sha256// or *, not '{identity}'")
    kind, value = match.groups()
    if kind == "IP:" and ("%" in value or not numeric_family(value)):
        raise ValueError(f"expected an address after IP:, not '{identity}'")
    if kind not in (None, "CN=") and re.search("[^!-~]", value):
        raise ValueError(f"{_ASCII}, not '{identity}'")
    return normal_name(identity), access


GLOBAL, SHIM, SERVER, CLIENT = "global", "shim", "server", "client"

# parse is a parser or, for a list separated by commas, [the parser of an entry].
Option = collections.namedtuple("Option", "name where default parse help")
OPTIONS = [Option(*row) for row in (
    ("user", GLOBAL, None, lambda text, _base: text, "user to run as; nut if started as root"),
    ("chroot", GLOBAL, None, _path(), "folder to confine the daemon to, before it becomes user"),
    ("pidfile", GLOBAL, ("/run" if os.path.isdir("/run") else "/var/run") + "/nutshim.pid", _path(),
     "file with the process id; the status socket lies beside it"),
    ("log", GLOBAL, "syslog", _path("syslog", "stderr"), "syslog, stderr or a file"),
    ("handshake_threads", GLOBAL, "2", _number(1, 64), "threads that do TLS handshakes"),
    ("max_sessions", GLOBAL, "512", _number(1, 1000000), "sessions over all shims"),
    ("role", SHIM, None, _choice(SERVER, CLIENT),
     "server (in front of upsd) or client (in front of upsmon, upsc, ...)"),
    ("listen", SHIM, {SERVER: "*:401", CLIENT: "localhost:3493"}, [_address("*")],
     "ADDRESS[:PORT] list; * is every address of both families"),
    ("upstream", SHIM, {SERVER: "localhost:3493", CLIENT: None}, [_address("localhost")],
     "HOST[:PORT] list, tried in order; a client's default port is 401"),
    ("certificate", SHIM, None, _path(), "PEM: own certificate, chain and key; server: required"),
    ("key", SHIM, None, _path(), "PEM private key, if it is not in certificate"),
    ("trust", SHIM, None, _path("system"),
     "PEM file or folder of CA or self-signed certificates, or system"),
    ("verify", CLIENT, "full", _choice("full", "chain", "pin", "none"),
     "full (chain and name), chain, pin (the key alone) or none"),
    ("server_name", CLIENT, None, _server_name, "the certificate's name; default upstream's host"),
    ("pin", SHIM, None, [_pin], "sha256//BASE64 list of public keys; the peer has one of them"),
    ("crl", SHIM, None, [_path()], "PEM revocation list(s)"),
    ("client_certificate", SERVER, "none", _choice("none", "request", "require"),
     "none, request or require"),
    ("permit", SERVER, None, [_permit], "IDENTITY: CLASS list; read, monitor, primary or admin"),
    ("allow_from", SHIM, None, [_network], "addresses or networks that may connect"),
    ("plaintext", SERVER, "refuse", _choice("refuse", "localhost"),
     "refuse, or localhost: loopback peers need no TLS"),
    ("min_tls", SHIM, "1.3", _choice("1.3", "1.2"), "1.3 or 1.2"),
    ("max_sessions_per_address", SHIM, "64", _number(1, 1000000), "sessions from one address"),
    ("handshake_timeout", SHIM, {SERVER: "10", CLIENT: "4"}, _number(1, 3600),
     "seconds from accept to the end of the TLS handshake"),
    ("idle_timeout", SHIM, "120", _number(1, 1000000), "seconds without a byte"),
    ("reuse", CLIENT, "30", _number(0, 3600),
     "seconds the shared upstream session is kept unused; 0 shares none"),
)]
_LISTS = [option.name for option in OPTIONS if isinstance(option.parse, list)]
DEFAULT_PORT = {("listen", SERVER): 401, ("listen", CLIENT): 3493,
                ("upstream", SERVER): 3493, ("upstream", CLIENT): 401}

# --- Errors and reasons --------------------------------------------------------------------------

ERROR, WARNING, NOTICE, INFO, DEBUG = 3, 4, 5, 6, 7         # As syslog's (RFC 5424 6.2.1).
LEVELS = {ERROR: "error: ", WARNING: "warning: ", NOTICE: "notice: ", INFO: "info: ",
          DEBUG: "debug: "}


class ConfigError(Exception):
    """The administrator's fault, in lines that say where, what is wrong and what was expected."""


class ProtocolError(Exception):
    """The peer's fault: ends its session with one log line."""

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(detail)
        self.reason = reason


class Reason(enum.Enum):
    """Why a session ended, or never began.

    words: the log's; level: the log line's; polite: the client is told (what is on its way, then
    our end) and its own end waited for.
    """
    LOGOUT = ("logout", INFO, True)
    CLIENT = ("closed by the client", INFO, False)
    UPSD = ("closed by upstream", INFO, True)
    LOST = ("lost by upstream", WARNING, True)
    STOP = ("nutshim stops", INFO, True)
    IDLE = ("idle too long", INFO, True)
    STALL = ("the client does not read its replies", WARNING, False)
    TIMEOUT = ("handshake timeout", WARNING, False)
    NO_STARTTLS = ("no STARTTLS", WARNING, True)
    INJECTION = ("bytes behind STARTTLS: command injection", WARNING, False)
    TLS_FIRST = ("TLS hello without STARTTLS", WARNING, False)
    BAD_LINE = ("bad line", WARNING, False)
    TLS = ("TLS handshake failed", WARNING, True)
    PIN = ("no pin matches the peer's key", WARNING, True)
    PERMIT = ("no permit line matches the peer", WARNING, True)
    REVOKED = ("the peer's certificate is revoked", WARNING, True)
    UPSTREAM = ("no upstream", WARNING, True)
    ALLOW_FROM = ("address not in allow_from", WARNING, False)
    MADE_ROOM = ("silent, and a newer connection needed its place", WARNING, False)
    MAX_SESSIONS = ("max_sessions reached", WARNING, False)
    PER_ADDRESS = ("max_sessions_per_address reached", WARNING, False)
    RESOURCES = ("out of descriptors or memory", WARNING, False)
    BUG = ("internal error", WARNING, False)

    def __init__(self, words: str, level: int, polite: bool):
        self.words, self.level, self.polite = words, level, polite


# --- Configuration: nutshim.conf -----------------------------------------------------------------


class Conf(types.SimpleNamespace):
    """One section's options as attributes, with name, role, path, and the lines that set them."""

    def at(self, option):
        """FILE:LINE of an option, as messages begin."""
        section = f"[{self.name}] " if self.name else ""
        return f"{self.path}:{self.lines.get(option, self.line)}: {section}{option}: "

    def files(self) -> list:
        """What a reload has to read: the shim's files, and trust's folder with its files."""
        paths = [self.certificate, self.key, self.trust] + (self.crl or [])
        try:
            names = os.listdir(self.trust) if self.trust not in (None, "system") else []
            inside = [os.path.join(self.trust, name) for name in sorted(names)]
            paths += [path for path in inside if not os.path.isdir(path)]
        except OSError:
            pass                                # A file, or a folder closed to the user by now.
        return [path for path in paths if path and path != "system"]

    def error(self, option, what, error):
        """The ConfigError for an option's file, address or user and its OSError."""
        return ConfigError(f"{self.at(option)}{what}: {error.strerror or error}")


def find_config() -> str:
    """The file that is read without -f."""
    places = (os.environ.get("NUT_CONFPATH"), "/etc/nut", "/etc/ups", "/usr/local/etc/nut",
              os.path.dirname(os.path.abspath(__file__)))
    paths = [os.path.join(place, "nutshim.conf") for place in places if place]
    hidden = []
    for path in paths:
        try:
            os.stat(path)
            return path
        except PermissionError:
            hidden.append(path)
        except OSError:
            pass
    if hidden:
        raise ConfigError(f"{hidden[0]}: Permission denied: user {os.geteuid()} must be able to "
                          "enter its folder and to read it")
    raise ConfigError(f"no configuration file: looked for {', '.join(paths)}; name it with -f FILE")


def read_config(path: str) -> tuple:
    """nutshim.conf -> (global Conf with .shims, fault lines); a faulty option has its default."""
    path = os.path.abspath(path)
    faults = []
    sections = [(Conf(name=None, path=path, line=1, lines={}), {})]     # {option: text or None}
    for number, line in enumerate(_read_lines(path), 1):
        # A comment begins a line or follows a blank; quotes keep what is in them.
        line = re.sub(r'("[^"]*")|(?:^|[ \t])[#;].*', lambda match: match[1] or "", line)
        line = line.strip(" \t\r")
        if not line:
            continue
        (conf, texts), header, fault = sections[-1], line[0] == "[", None
        name, _, text = (part.strip() for part in line.partition("="))
        if header:
            name = re.sub(r"[^\w.-]", "", line)
        if line.count('"') % 2:
            fault = f"expected a second quote (\"), not '{line}'"
        elif header and not re.match(r"\[[ \t]*[\w.-]+[ \t]*\]$", line):
            fault = f"expected [section], a name of letters, digits, '.', '_' and '-', not '{line}'"
        elif header and any(name == each.name for each, _ in sections):
            fault = f"a second section [{name}]: expected a name of its own for each shim"
        elif not header and not (name and text.strip('" \t')):
            fault = f"expected 'name = value' or '[section]', not '{line}'"
        elif not header and name in texts:
            fault = f"{name}: already given in line {conf.lines[name]}" + (
                "; a list has one line" if name in _LISTS else "")
        fault = _odd_character(line) or fault
        if header:
            sections.append((Conf(name=name, path=path, line=number, lines={}), {}))
        elif name not in texts:
            conf.lines[name], texts[name] = number, None if fault else text
        if fault:
            faults.append(f"{path}:{number}: {fault}")
    if not sections[1:]:
        faults.append(f"{path}:1: expected a [section] for each shim, found none")
    for conf, texts in sections:
        _set_options(conf, texts, faults)
    conf, *shims = [conf for conf, _ in sections]
    conf.shims = [shim for shim in shims if shim.role]
    return conf, faults


def _read_lines(path):
    """A file's lines; bytes that are not UTF-8 are surrogates in them (PEP 383)."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    for encoding, start in (("UTF-16LE", rb"\xff\xfe|[^\0]\0[^\0]\0"),
                            ("UTF-16BE", rb"\xfe\xff|\0[^\0]\0[^\0]")):
        if re.match(start, data):
            raise ConfigError(f"{path}:1: this file is {encoding}; expected UTF-8: "
                              f"'iconv -f {encoding} -t UTF-8 FILE' converts it")
    return re.sub("^\ufeff", "", data.decode("utf-8", "surrogateescape")).split("\n")


def _odd_character(line):
    """What is wrong with the first character that no line may have, or None."""
    c = next((c for c in line if c != "\t" and not c.isprintable()), None)
    if c is None:
        return None
    if "\udc80" <= c <= "\udcff":
        return (f"byte {ord(c) - 0xdc00:#x} is not UTF-8; if this file is Latin-1, "
                "'iconv -f ISO-8859-1 -t UTF-8 FILE' converts it")
    if c < "\xa0":
        return f"a control character (U+{ord(c):04X}); expected plain text"
    return f"U+{ord(c):04X} looks like a blank, or like nothing; expected plain blanks"


_BELONGS = {SHIM: "in a [section]", GLOBAL: "above the first [section]",
            SERVER: "in a shim with role = server", CLIENT: "in a shim with role = client"}


def _set_options(conf, texts, faults):
    """A section's options, each checked by itself and, with a role, against each other."""
    role = (texts.get("role") or "").replace('"', "")
    role = GLOBAL if conf.name is None else role if role in (SERVER, CLIENT) else None
    conf.role = role
    wanted = {GLOBAL: (GLOBAL,), None: (SHIM, SERVER, CLIENT)}.get(role, (SHIM, role))
    places = {option.name: option.where for option in OPTIONS}
    bad = set()                                 # Options that have their fault already.
    for option, text in texts.items():
        if text is None:
            bad.add(option)
        elif option not in places:
            import difflib
            near = difflib.get_close_matches(option.lower(), places, 1, 0.75)
            faults.append(conf.at(option) + "no such option; " + (
                f"did you mean {near[0]}?" if near else "'nutshim.py -h' lists them"))
        elif places[option] not in wanted:
            faults.append(conf.at(option) + "belongs " + _BELONGS[places[option]])
    for option in OPTIONS:
        if option.where not in wanted:
            continue
        default = option.default.get(role) if isinstance(option.default, dict) else option.default
        try:
            value = _parse(option, texts.get(option.name) or default, conf.path)
        except ValueError as error:
            faults.append(conf.at(option.name) + str(error))
            bad.add(option.name)
            value = _parse(option, default, conf.path)
        port = DEFAULT_PORT.get((option.name, role))
        if port and value:
            value = [(host, port if number is None else number) for host, number in value]
        setattr(conf, option.name, value)
    faults += [conf.at(option) + words for option, broken, words in _rules(conf, bad)
               if broken and option not in bad]


def _parse(option, text, path):
    """An option's value, None without a text; ValueError."""
    if text is None:
        return None
    base, parts = os.path.dirname(path), text.split('"')
    if not isinstance(option.parse, list):
        return option.parse("".join(parts), base)
    parts[::2] = [re.sub("[ \t]*,[ \t]*", "\n", part) for part in parts[::2]]    # Outside quotes.
    values = []
    for entry in "".join(parts).split("\n"):
        try:
            values.append(option.parse[0](entry, base))
        except ValueError as error:
            more = "" if entry else "; a list stands on one line, with commas between its entries"
            raise ValueError(f"{error}{more}") from None
    return values


def _rules(conf, bad):
    """What options ask of each other: (option, whether that is broken, what is wrong)."""
    if conf.role not in (SERVER, CLIENT):
        return [("role", conf.role is None,
                 "required: server (in front of upsd) or client (in front of upsmon, upsc, ...)")]
    server = conf.role == SERVER
    rules = [
        ("certificate", server and not conf.certificate, "required (PEM; mkNUTcert.py makes it)"),
        ("upstream", not conf.upstream, "required (the host of the server shim)"),
        ("key", conf.key and not conf.certificate, "has no effect without certificate")]
    option = "client_certificate" if server else "verify"
    if option in bad:
        return rules
    how = getattr(conf, option)
    checks = how not in ("none", "pin")
    named = any(identity != "*" for identity, _ in server and conf.permit or ())
    return rules + [
        ("trust", checks and not conf.trust,
         f"required with {option} = {how} (a PEM file, a folder, or system)"),
        ("pin", how == "pin" and not conf.pin,
         f"required with {option} = {how} (as 'nutshim.py -t' prints it on the server)"),
        ("permit", named and not checks, "names need client_certificate = request or require")
    ] + [(each, not checks and getattr(conf, each), f"has no effect with {option} = {how}")
         for each in ["trust", "crl"] + ["pin"] * server]


def check_config(path: str, user=None, chroot=None) -> tuple:
    """-> (configuration, {name: Credentials}, warnings); ConfigError: all faults in line order."""
    conf, faults = read_config(path)
    conf.user, conf.chroot = user or conf.user, chroot or conf.chroot
    warnings, credentials = [], {}
    for shim in conf.shims:
        credentials[shim.name] = Credentials(shim, faults, warnings)
        for option, value, text in (
                ("verify", "none", "the server is not verified, anybody can pretend to be it"),
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
    add_listen_faults(conf.shims, faults)
    if faults:
        faults.sort(key=lambda fault: int(fault[len(conf.path) + 1:].partition(":")[0]))
        raise ConfigError("\n".join(faults))
    return conf, credentials, warnings


# --- Protocol core: bytes in, bytes and facts out ------------------------------------------------

IDENTIFYING = frozenset((b"USERNAME", b"LOGIN", b"ATTACH"))
_READ = frozenset((b"GET", b"LIST", b"VER", b"NETVER", b"PROTVER", b"HELP", b"LOGOUT", b"DETACH"))
_MONITOR = _READ | IDENTIFYING | {b"PASSWORD"}
_PRIMARY = _MONITOR | {b"PRIMARY", b"MASTER", b"FSD"}
# How many words of a command -DD shows; those beyond may be a mistyped password.
SHOWN = {b"PASSWORD": 1, b"GET": 4, b"LIST": 4, b"SET": 5, b"INSTCMD": 4}
SHOWN.update(dict.fromkeys((b"VER", b"NETVER", b"PROTVER", b"HELP", b"STARTTLS", b"LOGOUT",
                            b"DETACH"), 1))
SHOWN.update(dict.fromkeys(IDENTIFYING | {b"PRIMARY", b"MASTER", b"FSD"}, 2))
CLASSES = {"read": _READ, "monitor": _MONITOR, "primary": _PRIMARY, "admin": None}

OK_STARTTLS = b"OK STARTTLS\n"
OK_GOODBYE = b"OK Goodbye\n"
TLS_NOT_ENABLED = b"ERR TLS-NOT-ENABLED\n"
ALREADY_TLS = b"ERR ALREADY-SSL-MODE\n"
NO_TLS_HERE = b"ERR FEATURE-NOT-CONFIGURED\n"
ACCESS_DENIED = b"ERR ACCESS-DENIED\n"

# What upsd makes of a line (NUT common/parseconf.c). A quote counts at the start of a word only.
_odd = re.compile(rb'["#=\\\x00-\x08\x0e-\x1f\x80-\xff]').search
_token = re.compile(rb"""
    " (?P<quoted> (?: [^"\\] | \\. )* ) "
    | (?P<word> (?: [^\s"\#=\\] | \\. ) (?: [^\s\#=\\] | \\. )* ) (?= [\s\#=] )
    | (?P<equals> = )
    | (?P<end> (?: \#[^\n]* )? \n )
    | [ \t\v\f\r]+ """, re.VERBOSE | re.DOTALL).match
_words_beyond = re.compile(rb"""(?:
    "(?: [^"\\] | \\. )*"
    | (?: [^\s"\#=\\] | \\. ) (?: [^\s\#=\\] | \\. )* (?= [\s\#=] )
    | [= \t\v\f\r]+ )*""", re.VERBOSE | re.DOTALL).match
_read_alike = re.compile(rb"(?: [^\\\#\n] | \\[^\n] )*", re.VERBOSE).fullmatch
_DROPPED = bytes(range(0x20)) + bytes(range(0x80, 0x100))
_DROPPED_TO_NUL = bytes.maketrans(_DROPPED, bytes(len(_DROPPED)))

# Whole stateless commands with nothing odd in them: what nearly all traffic is.
_stateless_lines = re.compile(
    rb"(?:(?i:GET|LIST|VER|NETVER|PROTVER|HELP)(?:[ \t][\t !$-<>-\[\]-\x7f]{0,99})?\r?\n)+"
    ).fullmatch
_known: dict = {}           # Clients repeat themselves. Nothing else is kept, no passwords.


def _are_stateless(data):
    if data in _known:
        return True
    if not _stateless_lines(data):
        return False
    if len(data) < MAX_QUESTION:
        _remember(data, None)
    return True


def _remember(data, found):
    """A line or lines that need not be read again."""
    if len(_known) >= MAX_KNOWN:
        _known.clear()
    _known[data] = found


def _unescaped(text):
    """A word as upsd keeps it: without escapes, and without bytes that it drops."""
    if b"\\" in text:                   # A regular expression takes 50 times as long.
        text = text.translate(_DROPPED_TO_NUL).replace(b"\\\\", b"\xff")
        text = text.translate(None, b"\\\0").replace(b"\xff", b"\\")
    return text.translate(None, _DROPPED)


class Commands:
    """Cuts a client's bytes into commands exactly as upsd does.

    feed() returns (raw, words, odd) of each whole command.  odd marks what versions of upsd read
    in different ways: # or a newline in quotes, an escaped newline.
    """
    __slots__ = ("limit", "pending", "_at", "_words", "_odd")

    def __init__(self, limit: int = MAX_COMMAND):
        self.limit = limit
        self.pending = b""      # The bytes of a command that is not whole yet,
        self._at = 0            # how many of them are cut into words already,
        self._words: list = []  # and what these are.
        self._odd = False

    def _check(self, raw):
        if len(raw) > self.limit:
            raise ProtocolError(Reason.BAD_LINE, f"a command of more than {self.limit} bytes")
        return raw

    def feed(self, data: bytes) -> list:
        whole = b"\n" in data
        data = self.pending + data
        if not whole:                   # A slow writer's bytes are not looked at again and again.
            self.pending = self._check(data)
            return []
        if not self._at and not _odd(data):
            lines = data.split(b"\n")
            self.pending = self._check(lines.pop())
            return [(self._check(line + b"\n"), line.split(None, MAX_WORDS)[:MAX_WORDS], False)
                    for line in lines]
        commands, start, at = [], 0, self._at
        token = _token(data, at)
        while token:
            kind, at = token.lastgroup, token.end()
            if kind == "end":
                commands.append((self._check(data[start:at]), self._words, self._odd))
                self._words, self._odd, start = [], False, at
            elif kind:
                text = token[kind]
                self._words.append(_unescaped(text))
                if len(self._words) >= MAX_WORDS:       # upsd drops what is beyond.
                    beyond = _words_beyond(data, at)
                    text, at = text + beyond[0], beyond.end()
                    del self._words[MAX_WORDS:]
                self._odd = self._odd or not _read_alike(text)
            token = _token(data, at)
        self.pending, self._at = self._check(data[start:]), at - start
        if self.pending.count(b"\n") > MAX_COMMAND_LINES:
            raise ProtocolError(Reason.BAD_LINE,
                                f"a command of more than {MAX_COMMAND_LINES} lines")
        return commands


# The lines of a list that upsd has not cut.
_items = re.compile(rb"(?:(?!END LIST)[^\n]{0,%d}\n)*" % (MAX_REPLY_LINE - 1)).match


class Replies:
    """Frames upsd's replies: one line, or BEGIN LIST ... END LIST (NUT docs/net-protocol.txt).

    A line ends at its newline or, cut by upsd without one, at byte 512.
    """
    __slots__ = ("_head", "_length", "_list", "whole")

    def __init__(self):
        self._head = b""        # The start of an unfinished line, enough to tell what it is.
        self._length = 0        # Its bytes so far.
        self._list = False
        self.whole = True       # No reply is under way.

    def feed(self, data: bytes) -> list:
        """(where it ends in data, the start of its last line) of each reply that ends there."""
        replies, start, size = [], 0, len(data)
        while start < size:
            if self._list and not self._length:
                start = _items(data, start).end()
            most = start + MAX_REPLY_LINE - self._length
            end = data.find(b"\n", start, most) + 1
            head = (self._head + data[start:min(end or size, start + 10)])[:10]
            if not end and most > size:
                self._head, self._length = head, self._length + size - start
                break
            end = end or most
            if head == b"BEGIN LIST" and not self._list:
                self._list = True
            elif not self._list or head.startswith(b"END LIST"):
                self._list = False
                replies.append((end, head))
            self._head, self._length, start = b"", 0, end
        self.whole = not (self._length or self._list)
        return replies


class Conversation:
    """One NUT client's commands and upsd's replies, with the shim's own replies in their turn.

    starttls: the reply to STARTTLS; allowed: the verbs of the access class, None for all; trace:
    note every command in seen.
    """
    __slots__ = ("_starttls", "_allowed", "_trace", "_commands", "_replies", "due",
                 "counted", "sent", "got", "seen", "facts", "refused")

    def __init__(self, starttls: bytes, allowed: Optional[frozenset] = None, trace: bool = False):
        self._starttls, self._allowed, self._trace = starttls, allowed, trace
        self._commands, self._replies = Commands(), Replies()
        # What waits for upsd's reply of that number: (number, None, own reply after it), or
        # (number, verb, name) of an identity to be confirmed by it.
        self.due: list = []     # What waits for replies; whoever reads the client bounds it.
        self.counted = True     # False once the number of upsd's replies cannot be known.
        self.sent = 0           # Commands passed to upsd.
        self.got = 0            # Replies that have ended.
        self.seen: list = []    # Lists of words for the log; whoever logs them empties it.
        self.facts: list = []   # (verb, name) of what upsd has said OK to, likewise.
        self.refused = 0        # Commands answered with ACCESS-DENIED.

    @property
    def busy(self) -> bool:
        """Replies may still come."""
        return self.sent > self.got or not self.counted

    def from_client(self, data: bytes) -> tuple:
        """Bytes from the client -> (bytes for upsd, bytes for the client now)."""
        if not self._commands.pending and not self._trace and _are_stateless(data):
            self.sent += data.count(b"\n")
            return data, b""
        up: list = []
        back: list = []
        for raw, words, odd in self._commands.feed(data):
            verb = words[0].upper() if words else b""
            if self._trace:
                self.seen.append(words)
            if verb == b"STARTTLS":
                self._answer(self._starttls, back)
            elif self._allowed is not None and (odd or verb not in self._allowed):
                self._answer(ACCESS_DENIED, back)
                self.refused += 1
            else:
                self.counted = self.counted and not odd
                self.sent += 1
                up.append(raw)
                if self.counted and verb in IDENTIFYING and len(words) == 2:
                    self.due.append((self.sent, verb, words[1]))
        return b"".join(up), b"".join(back)

    def _answer(self, reply, back):
        if self.counted and self.sent > self.got:
            self.due.append((self.sent, None, reply))
        else:
            back.append(reply)

    def from_upstream(self, data: bytes) -> bytes:
        """Bytes from upsd -> bytes for the client."""
        if (self._replies.whole and not self.due and len(data) <= MAX_REPLY_LINE
                and data.endswith(b"\n") and b"BEGIN LIST" not in data):
            self.got += data.count(b"\n")
            self.counted = self.counted and self.got <= self.sent
            return data
        parts, start = [], 0
        for end, head in self._replies.feed(data):
            self.got += 1
            # More replies than commands: this upstream answers one command in two lines, or so.
            self.counted = self.counted and self.got <= self.sent
            while self.due and self.due[0][0] == self.got:
                _, verb, text = self.due.pop(0)
                if verb is None:
                    parts += (data[start:end], text)
                    start = end
                elif head.split() == [b"OK"]:
                    self.facts.append((verb, text))
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
        held, reply, at = self._commands.pending + data, b"", 0
        for piece in data.splitlines(True):         # What follows STARTTLS is never parsed.
            at += len(piece)
            if b"\0" in piece:
                raise ProtocolError(Reason.BAD_LINE, "a NUL byte")
            for _, words, _ in self._commands.feed(piece):
                verb = words[0].upper() if words else b""
                if verb == b"STARTTLS":
                    if at < len(data):
                        raise ProtocolError(Reason.INJECTION)
                    return reply + OK_STARTTLS, "tls", b""
                if plaintext:
                    return reply, "plain", held
                if verb in (b"LOGOUT", b"DETACH"):
                    return reply + OK_GOODBYE, "goodbye", b""
                reply += TLS_NOT_ENABLED
                self.refused += 1
                if self.refused >= MAX_GREETING_LINES:
                    return reply, "refused", b""
        return reply, None, b""


def starttls_reply(data: bytes) -> bool:
    """upstream's answer to STARTTLS: True when it is OK, False when it is not whole yet."""
    line, newline, after = data.partition(b"\n")
    if after:
        raise ProtocolError(Reason.UPSTREAM, "bytes behind OK STARTTLS: response injection")
    if not newline and len(line) < MAX_REPLY_LINE:
        return False
    # The TLS-Shims answer a bare OK.
    if not newline or line.split() not in ([b"OK", b"STARTTLS"], [b"OK"]):
        raise ProtocolError(Reason.UPSTREAM, f"no TLS there: STARTTLS was answered with "
                                             f"'{printable(line[:80])}'")
    return True


# The shared upstream session: many clients' questions, and each reply to the one who asked.

Question = collections.namedtuple("Question", "raw head rest item tail")
Question.__doc__ = """A command whose reply can be told from every other's.

raw: its bytes; head: how the reply begins, in small letters; empty: the reply is any one line, so
nothing else may be asked before that has come; rest: matches what follows the head, to the end;
item, tail: how a list's lines begin, its last line.
"""
_question_line = re.compile(rb"[!$-<>-\[\]-~]+(?: +[!$-<>-\[\]-~]+)*\r?\n").fullmatch
# The forms of questions, and how many words each has.
_FORMS = {
    b"GET VAR": 4, b"GET TYPE": 4, b"GET DESC": 4, b"GET CMDDESC": 4, b"GET UPSDESC": 3,
    b"GET NUMLOGINS": 3, b"LIST UPS": 2, b"LIST VAR": 3, b"LIST RW": 3, b"LIST CMD": 3,
    b"LIST CLIENT": 3, b"LIST ENUM": 4, b"LIST RANGE": 4,
    b"VER": 1, b"NETVER": 1, b"PROTVER": 1, b"HELP": 1}
# How replies begin that name their question: none of these answers VER.
_NAMING = {b"BEGIN", b"END"}.union(form.split()[1] for form in _FORMS if b" " in form)


# The whole of a reply is looked at: without its newline the next one would be taken as its end.
_quoted_text = re.compile(rb'"(?:[^"\\\n]|\\.)*"\n').fullmatch
_RESTS = {b"NUMLOGINS": re.compile(rb"\d+\n").fullmatch,
          b"TYPE": re.compile(rb"(?: ?(?:RW|ENUM|RANGE|NUMBER|UNKNOWN|STRING:\d+))+\n").fullmatch}
_error = re.compile(rb"ERR [A-Z0-9-]+\n").fullmatch


def question(raw: bytes) -> Optional[Question]:
    """The Question that one whole line is, or None: then it is not for a shared session."""
    found = _known.get(raw)
    if not found:
        found = _question(raw)
        if found:
            _remember(raw, found)
    return found


def _question(raw):
    if len(raw) > MAX_QUESTION or not _question_line(raw):
        return None
    words = raw.split()
    form = b" ".join(words[:2]).upper()
    if _FORMS.get(form) != len(words):
        return None
    verb, _, what = form.partition(b" ")
    item = b" ".join([what] + words[2:])            # upsd repeats the names as they were typed.
    if verb == b"LIST":
        return Question(raw, b"begin list " + item.lower() + b"\n", None, item + b" ",
                        b"END LIST " + item + b"\n")
    return Question(raw, what and item.lower() + b" ", _RESTS.get(what, _quoted_text), b"", b"")


class Questions:
    """What is asked over one shared upstream session, and each reply held against its question.

    Askers are opaque.  An asker that has left is None: its reply is dropped.  Between two
    questions with a free reply (VER and the like) goes a LIST of our own: an upsd may answer the
    first in two lines, and the second must not pass for the next reply.
    """
    __slots__ = ("waiting", "sent", "fault", "begun", "_data", "_held", "_in_list", "_free")

    def __init__(self, waiting=()):
        # (asker, Question), not sent yet
        self.waiting: collections.deque = collections.deque(waiting)
        self.sent: collections.deque = collections.deque()  # The same, sent and not answered.
        self.fault = ""         # Why this session is not to be trusted any more.
        self.begun = False      # The first reply due has been handed out in part.
        self._data = b""        # Its other bytes,
        self._held = 0          # how many of them, whole lines, are held against the question,
        self._in_list = False   # and whether these are a list's.
        self._free = False      # The last reply was a free line.

    def ask(self, asker, asked: Question):
        self.waiting.append((asker, asked))

    def to_send(self) -> bytes:
        """Take the commands that may be sent now."""
        commands = [asked.raw for _, asked in self.waiting if asked.head]
        if len(commands) == len(self.waiting) and not (self.sent and not self.sent[-1][1].head):
            self.sent += self.waiting               # Nearly always.
            self.waiting.clear()
            return b"".join(commands)
        commands = []
        while self.waiting:
            if self.sent and not (self.waiting[0][1].head and self.sent[-1][1].head):
                break
            if self._free and not self.waiting[0][1].head:
                self.waiting.appendleft((None, question(b"LIST UPS\n")))
            self.sent.append(self.waiting.popleft())
            commands.append(self.sent[-1][1].raw)
        return b"".join(commands)

    def feed(self, data: bytes) -> list:
        """(asker, bytes, whole) for each reply, or part of a long one; may set fault."""
        answers, data, start, at = [], self._data + data, 0, self._held
        while at < len(data) and not self.fault:
            if not self.sent:
                return self._blame(answers, "a line that nobody asked for", data[at:])
            asker, asked = self.sent[0]
            end = data.find(b"\n", at, at + MAX_REPLY_LINE) + 1
            if not end:
                if len(data) - at < MAX_REPLY_LINE:
                    break
                return self._blame(answers, "a line cut at 512 bytes in reply to", data[at:])
            if self._in_list:
                if data.startswith(asked.item, at):
                    at = end
                    continue
                if not data.startswith(asked.tail, at):
                    return self._blame(answers, "an item of another list in reply to", data[at:])
                self._in_list = False
            else:
                # upsd repeats names as they were typed, but for its own (server.info).
                head = at + len(asked.head)
                if (data[at:head].lower() != asked.head
                        or asked.head and asked.rest and not asked.rest(data, head, end)
                        or not asked.head and data[at:end].split(b" ", 1)[0] in _NAMING):
                    if not _error(data, at, end):
                        return self._blame(answers, "another answer in reply to", data[at:])
                elif asked.tail:
                    self._in_list, at = True, end
                    continue
            if not asked.head and end < len(data):
                return self._blame(answers, "more than one line in reply to", data[end:])
            self.sent.popleft()
            if asker is not None:
                answers.append((asker, data[start:end], True))
            start, at, self.begun, self._free = end, end, False, not asked.head
        if at - start > HIGH_WATER:             # Too long to be held until it is whole.
            if self.sent[0][0] is not None:
                answers.append((self.sent[0][0], data[start:at], False))
            start, self.begun = at, True
        self._data, self._held = data[start:], at - start
        return answers

    def _blame(self, answers, what, data):
        asked = f" '{printable(self.sent[0][1].raw.strip())}'" if self.sent else ""
        self.fault = f"{what}{asked}: '{printable(data[:60])}'"
        self._data, self._held = b"", 0
        return answers

    def unanswered(self) -> list:
        """(asker, Question) of all that can be asked again elsewhere, in their order."""
        rest = list(self.sent)[1 if self.begun else 0:] + list(self.waiting)
        return [each for each in rest if each[0] is not None]

    def forget(self, asker) -> None:
        """An asker has left: what it has not got yet is not asked, or not handed out."""
        self.waiting = collections.deque(each for each in self.waiting if each[0] is not asker)
        self.sent = collections.deque((None if who is asker else who, asked)
                                      for who, asked in self.sent)


def printable(data: Union[bytes, str]) -> str:
    """A peer's bytes or text, made safe for a log line: no control, no bidi mark, no newline."""
    text = data.decode("latin-1") if isinstance(data, bytes) else data
    return "".join(c if " " <= c <= "~" or c > "\xa0" and c.isprintable() else
                   f"\\x{ord(c):02x}" if c <= "\xff" else ascii(c)[1:-1] for c in text)


# --- Certificates and TLS ------------------------------------------------------------------------

Certificate = collections.namedtuple(
    "Certificate",
    "serial names pin not_before not_after subject issuer fields is_ca spki extensions")
Certificate.__doc__ = """What is read of a certificate (RFC 5280 4.1). Its texts are printable().

names are as permit has them (CN=, DNS:, IP:, URI:, email:); pin is that of spki, the public key's
DER; not_before and not_after are seconds since 1970; subject and issuer have one line each, fields
are the subject's as [(CN and the like, text)]; extensions are {OID's content: value}."""

RevocationList = collections.namedtuple("RevocationList", "issuer not_before not_after serials")
RevocationList.__doc__ = """A CRL (RFC 5280 5.1): issuer, thisUpdate, nextUpdate or NO_EXPIRY, and
the serial numbers that it revokes."""

Peer = collections.namedtuple("Peer", "version cipher names pin not_after")
Peer.__doc__ = "What the checks, the log and the status know of the other end of a TLS session."

Loaded = collections.namedtuple("Loaded", "what not_before not_after")
Loaded.__doc__ = "A certificate or revocation list in use: what it is, its file, its dates."

Element = collections.namedtuple("Element", "tag content whole")
Element.__doc__ = "A DER element (X.690 8.1)."

_SAN, _BASIC_CONSTRAINTS = b"\x55\x1d\x11", b"\x55\x1d\x13"
_FIELDS = {b"\x55\x04" + bytes([number]): name for number, name in (
    (3, "CN"), (4, "SN"), (5, "serialNumber"), (6, "C"), (7, "L"), (8, "ST"), (9, "street"),
    (10, "O"), (11, "OU"), (12, "title"), (42, "GN"))}
_FIELDS[bytes.fromhex("2a864886f70d010901")] = "emailAddress"
_FIELDS[bytes.fromhex("0992268993f22c640119")] = "DC"
# The types of text: their encodings, which Python has built in, and what tells it the byte order.
# OpenSSL takes all but three for Latin-1.
_TEXTS = dict.fromkeys((0x12, 0x13, 0x14, 0x16), ("latin-1", b""))
_TEXTS[0x0c], _TEXTS[0x1c] = ("utf-8", b""), ("utf-32", b"\0\0\xfe\xff")
_TEXTS[0x1e] = ("utf-16", b"\xfe\xff")
_TEXT_NAMES = {0x81: "email:", 0x82: "DNS:", 0x86: "URI:"}
_NUMBER = rb"(?!\0[\0-\x7f]|\xff[\x80-\xff]).+"
# The one form that DER has for a value, by its tag (X.690 8, 11.1).
_DER_FORMS = {tag: (what, re.compile(form, re.DOTALL).fullmatch) for tag, what, form in (
    (0x01, "a truth value", rb"\0|\xff"), (0x02, "a number", _NUMBER), (0x0a, "a number", _NUMBER),
    (0x03, "a bit string", rb"\0.*|[\1-\7].+"), (0x05, "a null", rb""),
    (0x06, "an object identifier", rb"(?:(?!\x80)[\x80-\xff]*[\0-\x7f])+"),
    (0x1c, "a text", rb"(?:.{4})*"), (0x1e, "a text", rb"(?:.{2})*"))}


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
    """Each element, and each inside it, is in the one form of DER (X.690 8, 10.2, 11.1)."""
    if depth > MAX_DEPTH:
        raise ValueError("elements too deep inside each other")
    for tag, content, _ in items:
        constructed = tag & 0x20 > 0
        if tag < 0x40 and (tag == 0 or constructed != (tag in (0x30, 0x31))):
            raise ValueError(f"an element with the tag {tag:#04x}")
        if constructed:
            _check_der(der_items(content), depth + 1)
        elif tag in _DER_FORMS and not _DER_FORMS[tag][1](content):
            raise ValueError(f"{_DER_FORMS[tag][0]} of another form than DER's")


def _parts(content, tags, what):
    """The Elements in content, whose tags must match a pattern: those of its groups, or all."""
    items = der_items(content)
    match = re.fullmatch(tags, bytes([item.tag for item in items]))
    if not match:
        raise ValueError(f"{what} is not as expected")
    if not match.re.groups:
        return items
    places = map(match.start, range(1, match.re.groups + 1))
    return [items[at] if at >= 0 else None for at in places]


def _sequence(data, tags, what):
    """The same for what is in the one SEQUENCE that data is."""
    whole, = _parts(data, rb"\x30", what)
    return _parts(whole.content, tags, what)


def _name(element):
    """A Name as [[(CN and the like, text), …], …] (RFC 5280 4.1.2.4)."""
    found = []
    for relative in _parts(element.content, rb"\x31*", "a name"):
        found.append([])
        for pair in _parts(relative.content, rb"\x30+", "a name"):
            # OpenSSL takes texts, bit strings and sequences; else it has no SAN around such a name.
            oid, value = _parts(pair.content, rb"\x06[\3\x0c\x12-\x14\x16\x1c\x1e\x30]",
                                "a name's field")
            if value.tag in _TEXTS:
                field = _FIELDS.get(oid.content) or oid_text(oid.content)
                encoding, mark = _TEXTS[value.tag]
                text = (mark + value.content).decode(encoding)
                if encoding == "utf-16" and len(text) < len(value.content) // 2:
                    raise ValueError("a pair of surrogates, which a BMPString cannot have")
            else:                           # Under its number, so that it never passes for a CN.
                field, text = oid_text(oid.content), "#" + value.whole.hex()
            found[-1].append((field, text))
    return found


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
    if text == text.strip() and not re.search(f'[{marks}"]', text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def names_text(names: list) -> str:
    """Names for a message, with commas that cannot be confused with those in a name."""
    return ", ".join(_quoted(name, ",") for name in names)


def _seconds(element):
    """UTCTime or GeneralizedTime in seconds since 1970 (RFC 5280 4.1.2.5)."""
    text = element.content.decode("ascii")
    if element.tag == 0x17:
        text = ("19" if text[:2] >= "50" else "20") + text
    match = re.fullmatch(
        r"(\d{4})(\d\d)(\d\d)([01]\d|2[0-3])([0-5]\d)([0-5]\d)Z", text, re.ASCII)
    year, month, day, hour, minute, second = map(int, match.groups() if match else bytes(6))
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = (0, 31, 28 + leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if not (year and 0 < month < 13 and 0 < day <= lengths[month]):
        raise ValueError("no such date")
    # No datetime, which costs memory, and no time_t, which ends in 2038 on small boxes.
    before = year - 1
    days = 365 * before + before // 4 - before // 100 + before // 400 + sum(lengths[:month]) + day
    return 86400 * (days - 719163) + 3600 * hour + 60 * minute + second


def _san_names(value):
    """subjectAltName's names, as far as permit has a word for them (RFC 5280 4.2.1.6)."""
    what, names = "the subjectAltName", []
    for item in _sequence(value, rb"[\x81\x82\x86\x87\x88\xa0\xa3-\xa5]*", what):
        tag, content, _ = item
        if tag in _TEXT_NAMES:
            # What is not ASCII is spelt out: no such name equals one that an administrator wrote.
            text = content.decode("ascii", "backslashreplace")
            names.append(normal_name(_TEXT_NAMES[tag] + text))
        elif tag == 0x87 and len(content) in (4, 16):
            family = socket.AF_INET if len(content) == 4 else socket.AF_INET6
            names.append("IP:" + socket.inet_ntop(family, content))
        # Of the others the form counts: where it is wrong, OpenSSL has none of the names.
        elif tag == 0xa0:                   # otherName
            other, = _parts(content, rb"\x06(\xa0)", what)
            _parts(other.content, rb"(?s).", what)
        elif tag == 0xa4:                   # directoryName
            _name(*_parts(content, rb"\x30", what))
        elif tag == 0xa5:                   # ediPartyName
            for text in _parts(content, rb"\xa0?\xa1", what):
                _parts(text.content, rb"[\x0c\x13\x14\x1c\x1e]", what)
        elif tag == 0x88 and not _DER_FORMS[0x06][1](content):
            raise ValueError(f"{what} is not as expected")
    return names


def _extensions(content):
    """{OID's content: the extension's value} (RFC 5280 4.2)."""
    found = {}
    for extension in _sequence(content, rb"\x30*", "the extensions"):
        oid, value = _parts(extension.content, rb"(\x06)\x01?(\x04)", "an extension")
        if oid.content in found:
            raise ValueError("an extension stands twice")
        found[oid.content] = value.content
        if oid.content in (_SAN, _BASIC_CONSTRAINTS):
            _check_der(der_items(value.content))
    return found


def _signed(der, tags):
    """The fields of what is signed, by a pattern, and the algorithm beside it (RFC 5280 4.1.1)."""
    _check_der(der_items(der))
    body, algorithm = _sequence(der, rb"(\x30)(\x30)\x03", "it")
    return _parts(body.content, tags, "it"), algorithm


def read_certificate(der: bytes) -> Certificate:
    """A certificate's DER; ValueError for all that is not as RFC 5280 4.1 has it, DER throughout.

    OpenSSL reads BER too. What it would read differently must not be read here, or a peer shows one
    key or name to OpenSSL and another one to pin or permit.
    """
    try:
        (version, serial, signed_by, issuer, validity, subject, spki, last), algorithm = _signed(
            der, rb"(\xa0)?(\x02)(\x30)(\x30)(\x30)(\x30)(\x30)\x81?\x82?(\xa3)?")
        if version and version.content not in (b"\2\1\0", b"\2\1\1", b"\2\1\2"):
            raise ValueError("the version is not 1, 2 or 3")
        if signed_by != algorithm:
            raise ValueError("the signature's algorithm is not the one that is signed")
        begin, end = map(_seconds, _parts(validity.content, rb"[\x17\x18]{2}", "the validity"))
        key, = _parts(spki.content, rb"\x30(\x03)", "the public key")
        if key.content[0]:
            raise ValueError("the public key is not whole bytes")
        name = _name(subject)
        fields = [field for pairs in name for field in pairs]
        names = ["CN=" + text for field, text in fields if field == "CN"]
        extensions = _extensions(last.content) if last else {}
        if _SAN in extensions:
            names += _san_names(extensions[_SAN])
        is_ca = None
        if _BASIC_CONSTRAINTS in extensions:
            is_ca, = _sequence(extensions[_BASIC_CONSTRAINTS], rb"(\x01)?\x02?",
                               "the basicConstraints extension")
        return Certificate(
            serial=int.from_bytes(serial.content, "big"),
            # With an escape in it a name matches no permit line.
            names=list(map(printable, names)), pin=pin_text(hashlib.sha256(spki.whole).digest()),
            not_before=begin, not_after=end, subject=_name_text(name),
            issuer=_name_text(_name(issuer)),
            fields=[(field, printable(text)) for field, text in fields],
            is_ca=is_ca is not None and is_ca.content == b"\xff",
            spki=spki.whole, extensions=extensions)
    except ValueError as error:
        raise _unreadable("certificate", error) from None


def read_crl(der: bytes) -> RevocationList:
    """A revocation list's DER; ValueError for all that is not as RFC 5280 5.1 has it."""
    try:
        (issuer, begin, end, revoked), _ = _signed(
            der, rb"\x02?\x30(\x30)([\x17\x18])([\x17\x18])?(\x30)?\xa0?")
        serials = set()
        for entry in der_items(revoked.content) if revoked else ():
            serial, = _parts(entry.content, rb"(\x02)[\x17\x18]\x30?", "an entry")
            serials.add(int.from_bytes(serial.content, "big"))
        return RevocationList(_name_text(_name(issuer)), _seconds(begin),
                              _seconds(end) if end else NO_EXPIRY, serials)
    except ValueError as error:
        raise _unreadable("revocation list", error) from None


def _unreadable(what, error):
    # Python's own words about bytes that are no text tell an administrator nothing.
    why = "a text of a wrong encoding" if isinstance(error, UnicodeError) else error
    return ValueError(f"a {what} that cannot be read ({why})")


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

_BLANKS = "".join(map(chr, range(33)))                  # What OpenSSL takes off a line's end.
_marker = re.compile(r"-----(BEGIN|END) ([!-,.-~]+(?:[ -][!-,.-~]+)*)-----").fullmatch
_like_marker = re.compile(
    r"(?:BEGIN|END)\s+(?:[A-Z0-9]+\s+)*(?:CERTIFICATE|CRL|KEY|PARAMETERS)\b|"
    r"-\s*(?i:(?:BEGIN|END)\s+(?:\w+\s+)*(?:CERTIFICATE|CRL|KEY)\b)").search
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
    text = re.sub("^\xef\xbb\xbf", "", data.decode("latin-1"))
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip(_BLANKS)
        marker = _marker(line)
        if marker and marker[2] == "TRUSTED CERTIFICATE":
            raise ValueError(
                f"line {number}: a TRUSTED CERTIFICATE, which only the openssl command "
                "understands; 'openssl x509 -in FILE -out NEWFILE' writes a plain one")
        if marker and marker[1] == "BEGIN" and not kind:
            kind, start, lines = marker[2], number, []
        elif marker and marker.groups() == ("END", kind):
            blocks.append(_block(kind, start, lines))
            kind = ""
        elif marker:
            expected = (f"-----END {kind}-----, for the BEGIN in line {start}" if kind else
                        "its BEGIN line before it")
            raise ValueError(f"line {number}: {line}: expected {expected}")
        elif _like_marker(line) and (kind or not line.lstrip().startswith("#")):
            # The line is not shown: part of a key may be in it.
            raise ValueError(
                f"line {number}: a damaged BEGIN or END line (a dash lost, blanks before it, "
                "a joined END and BEGIN line): expected one like -----BEGIN CERTIFICATE-----, "
                "alone in its line")
        elif kind:
            lines.append(line)
    if kind:
        raise ValueError(f"line {start}: this BEGIN has no END line: bring the whole file again")
    return blocks


def _block(kind, start, lines):
    """A block of the lines between BEGIN and END; headers end with an empty line (RFC 1421 4.4)."""
    end = lines.index("") if "" in lines else 0
    text = "".join(lines[end:])
    if end and ":" not in lines[0] or "" in lines[end + 1:]:
        raise ValueError(f"line {start + end + 1}: an empty line in this block, which to OpenSSL "
                         "is the end of its headers: take it out, and all others")
    if not text or len(text) % 4 or not _base64(text):
        bad = [number for number, line in enumerate(lines, start + 1)
               if number > start + end and not _base64(line)]
        raise ValueError(f"line {(bad or [start])[0]}: damaged base64 in this block: "
                         "bring the whole file again")
    encrypted = "ENCRYPTED" in kind or any("ENCRYPTED" in line for line in lines[:end])
    kind = "CERTIFICATE" if kind == "X509 CERTIFICATE" else kind    # OpenSSL's older word.
    return Block(kind, binascii.a2b_base64(text), start, encrypted)


def _contents(data):
    """A PEM file's {DER: Certificate}, {DER: RevocationList} and Blocks of keys; ValueError."""
    certificates, lists, keys = {}, {}, []
    for block in pem_blocks(data):
        try:
            if block.kind == "CERTIFICATE":
                certificates[block.der] = read_certificate(block.der)
            elif block.kind == "X509 CRL":
                lists[block.der] = read_crl(block.der)
            elif block.kind.endswith("PRIVATE KEY"):
                keys.append(block)
            elif _is_certificate(block.der):
                raise ValueError(f"a certificate under the heading {block.kind}: "
                                 "expected CERTIFICATE")
        except ValueError as error:
            raise ValueError(f"line {block.line}: {error}") from None
    if data[:2] == b"\x30\x82":
        raise ValueError("expected PEM; this looks like DER: "
                         "'openssl x509 -inform DER -in FILE -out NEWFILE' writes PEM")
    return certificates, lists, keys


def _is_certificate(der):
    try:
        return bool(read_certificate(der))
    except ValueError:
        return False


def _expect(found, what):
    if not found:
        raise ValueError(f"expected PEM with a {what}, found none")


class Credentials:
    """A shim's TLS context, and what -t, the log and the expiry checks want to know of it.

    own is the own Certificate; loaded is all that the context uses, as Loaded; revoked has the
    serial numbers of its revocation lists by their issuers. What is wrong is added to faults, what
    is only unwise to warnings, as lines.
    """

    def __init__(self, conf, faults, warnings):
        self._conf, self._faults, self._warnings = conf, faults, warnings
        self.own, self.loaded, self.revoked = None, [], {}
        server = conf.role == SERVER
        self.context = context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if conf.min_tls == "1.2":
            context.minimum_version = ssl.TLSVersion.TLSv1_2
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
        context.loaded, context.revoked = self.loaded, self.revoked     # For note_failure().
        if conf.certificate:
            self._load_own()
        if checks and conf.trust:
            self._load_trust()

    def _fault(self, option, path, error):
        words = tls_error(error)
        if isinstance(error, ssl.SSLError) and words not in _REASONS.values():
            words = f"OpenSSL cannot use it ({words}): is it whole, and of a kind that it knows?"
        self._faults.append(f"{self._conf.at(option)}{path}: {words}")

    def _note(self, what, subject, dates):
        self.loaded.append(Loaded(f"{what} ({subject or 'without a subject'})",
                                  dates.not_before, dates.not_after))

    def _load_own(self):
        conf, option, path = self._conf, "certificate", self._conf.certificate
        try:
            chain, _, keys = _contents(read_file(path))
            _expect(chain, "certificate")
            if conf.key:
                option, path = "key", conf.key
                _, _, keys = _contents(read_file(path))
            _expect(keys, "private key")
            if any(block.encrypted for block in keys):
                raise ValueError("the key is encrypted, which a daemon cannot open; "
                                 "'openssl pkey -in FILE' writes it plain")
            self.context.load_cert_chain(conf.certificate, conf.key, "")
        except (OSError, ValueError) as error:
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                error = f"this key does not belong to the first certificate of {conf.certificate}"
            return self._fault(option, path, error)
        if os.stat(path).st_mode & stat.S_IROTH:
            self._warnings.append(f"{conf.at(option)}{path}: everybody can read this private key; "
                                  f"'chmod o= {shell_word(path)}'")
        self.own, *others = chain.values()
        self._note(f"own certificate {conf.certificate}", self.own.subject, self.own)
        for each in others:
            self._note(f"chain certificate {conf.certificate}", each.subject, each)

    def _load_trust(self):
        conf, context = self._conf, self.context
        # What is put into trust is trusted as it is, be it an intermediate CA's or a server's own.
        context.verify_flags |= 0x80000     # X509_V_FLAG_PARTIAL_CHAIN; Python 3.10 has the name
        found, lists = {}, {}               # DER: (Certificate or RevocationList, path)
        for path in conf.crl or ():
            try:
                certificates, here, _ = _contents(read_file(path))
                _expect(here, "revocation list (X509 CRL)")
                if certificates:
                    raise ValueError("expected nothing but revocation lists, "
                                     "found a certificate, which would be trusted")
                context.load_verify_locations(cafile=path)
                lists.update((der, (each, path)) for der, each in here.items())
            except (OSError, ValueError) as error:
                self._fault("crl", path, error)
        held = context.cert_store_stats()
        if held["crl"] != len(lists) or held["x509"]:
            self._fault("crl", ", ".join(conf.crl), f"OpenSSL finds {held['crl']} revocation lists "
                        f"and {held['x509']} certificates, nutshim {len(lists)} and none")
        try:
            found = self._system() if conf.trust == "system" else self._trusted(lists)
        except (OSError, ValueError) as error:
            self._fault("trust", conf.trust, error)
        self._note_trust(found)
        for each, path in lists.values():
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
            self.revoked.setdefault(each.issuer.lower(), set()).update(each.serials)
            self._note(f"revocation list {path}", each.issuer, each)
        lack = [each.subject for each, _ in found.values()
                if each.is_ca and each.subject.lower() not in self.revoked]
        if lists and lack and len(found) <= BUNDLE:
            self._warnings.append(
                f"{conf.at('crl')}no revocation list of {_some(lack)}, which trust has: what it "
                "has issued is refused, since with crl set each CA needs one")

    def _trusted(self, lists):
        """Load the certificates of trust, each once: {DER: (Certificate, path)}."""
        context, trust, found, before = self.context, self._conf.trust, {}, len(self._faults)
        folder = os.path.isdir(trust)
        for name in sorted(os.listdir(trust)) if folder else [""]:
            path = os.path.join(trust, name) if folder else trust
            if folder and not os.path.isfile(path):
                continue
            try:
                data = read_file(path)
                if folder and not re.search(
                        rb"BEGIN (?:[A-Z0-9]+ )*(?:CERTIFICATE(?! REQUEST)|CRL)\b", data):
                    continue                # Other files may stand beside: a README, keys.
                certificates, others, keys = _contents(data)
                if keys and not folder and path not in (self._conf.certificate, self._conf.key):
                    self._warnings.append(
                        f"{self._conf.at('trust')}{path}: a private key is in it, which must not "
                        "leave the box that it is made for: take the clients' file in its place")
                if others.keys() - lists.keys():
                    cure = "move it into a file of its own and set crl = FILE"
                    raise ValueError("a revocation list, which counts only as crl: "
                                     + (cure if certificates else f"set crl = {path}"))
                if certificates:
                    # Not as DER, whose end Python 3.7 does not know from a fault with OpenSSL 3.
                    context.load_verify_locations(
                        cadata="".join(map(ssl.DER_cert_to_PEM_cert, certificates)))
                for der, each in certificates.items():
                    found.setdefault(der, (each, path))
            except (OSError, ValueError) as error:
                self._fault("trust", path, error)
        if len(self._faults) == before:
            count = context.cert_store_stats()["x509"]
            _expect(found, "certificate")
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
                self._note(f"trusted certificate in {path}", each.subject, each)
            return
        now = time.time()
        certificates = [each for each, _ in found.values()]
        past = sum(each.not_after < now for each in certificates)
        first = min(certificates, key=lambda each: (each.not_after < now, each.not_after))
        which = f"{past} of them expired, the next to end" if past else "the first to end"
        self._note(f"{len(found)} trusted certificates in {self._conf.trust}, {which}",
                   first.subject, first)


def _some(texts, most=3):
    """The first few of many, for a message."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return " and ".join(texts[:most]) + more


_WEAK_KEY = "is too short for this OpenSSL's security level (RSA needs 2048 bits): make a new one"
_WEAK_DIGEST = ("is signed with SHA-1 or another weak digest, which this OpenSSL's security level "
                "does not allow: make a new one")
_REASONS = {                                # OpenSSL's (sslerr.h).
    "EE_KEY_TOO_SMALL": "its key " + _WEAK_KEY,
    "CA_KEY_TOO_SMALL": "the key of a CA in it " + _WEAK_KEY,
    "CA_MD_TOO_WEAK": "a certificate in it " + _WEAK_DIGEST,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer has no client certificate"}


def describe_peer(sock) -> Peer:
    """The Peer of an SSLSocket or SSLObject; ValueError if its certificate cannot be read."""
    der, names, pin, not_after = sock.getpeercert(True), [], "", 0
    if der:
        try:
            found = read_certificate(der)
        except ValueError as error:
            raise ValueError(f"the peer sent {error}") from None
        names, pin, not_after = found.names, found.pin, found.not_after
    return Peer(sock.version(), sock.cipher()[0], names, pin, not_after)


def tls_text(peer: Peer) -> str:
    who = names_text(peer.names) or peer.pin or "no certificate"
    return f"{peer.version}, {peer.cipher}, {who}"


# By OpenSSL's X509_V_ERR_ numbers (x509_vfy.h).
_NAME_FAULTS = (62, 64)
_DATE_WORDS = {9: "is not valid yet: compare the clocks", 10: "has expired: renew it"}
_UNKNOWN_CA = "unknown CA: its issuer is not in trust"
_NO_CA = "its issuer's certificate is not one of a CA"
_ODD_LIST = "the revocation list (crl) is not a plain one, of all that its CA has issued"
_VERIFY_WORDS = {
    3: "no revocation list (crl) of its issuer: with crl set, each CA above it needs one",
    7: "unknown CA: trust has another CA with the name of its issuer, or of that one's",
    8: "the revocation list (crl) is from another CA with the name of its issuer",
    11: "the revocation list (crl) is not valid yet: compare the clocks",
    12: "the revocation list (crl) has expired: renew it",
    18: "its certificate is self-signed and not in trust",
    19: _UNKNOWN_CA, 20: _UNKNOWN_CA, 21: _UNKNOWN_CA,
    23: "its certificate, or its issuer's, is revoked",
    24: _NO_CA, 79: _NO_CA,                 # The former in OpenSSL 1.1.1.
    26: "its certificate, or its issuer's, was made for another use: a server's has serverAuth, "
        "a client's clientAuth",
    35: "the revocation list (crl) does not count: its CA's certificate lacks cRLSign",
    36: _ODD_LIST, 44: _ODD_LIST,
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
        whose = [f"its issuer's certificate ({each.subject})" if number else "its certificate"
                 for number, each in enumerate(chain) if wrong(each)]
        trusted = [each.what for each in context.loaded
                   if each.what.startswith("trusted") and wrong(each)]
        if not chain or not whose + trusted:
            whose = [" or ".join(["its certificate, or its issuer's,"] + trusted[:1])]
        error.whose = f"{(whose + trusted)[0]} {_DATE_WORDS[code]}"
    elif code == 3:
        lack = dict.fromkeys(each.issuer for each in chain
                             if each.issuer.lower() not in context.revoked)
        if lack:
            error.whose = _VERIFY_WORDS[3].replace("its issuer", _some(list(lack)))
    elif code in _NAME_FAULTS and chain:
        error.whose = f"its certificate {name_words(chain[0].names, sock.server_hostname or '')}"


def name_words(names: list, name: str) -> str:
    """How a certificate with these names stands to a name, and the cure if it does not fit."""
    address = numeric_family(name)
    wanted = normal_name(("IP:" if address else "DNS:") + name)
    alternatives = [each for each in names if each.startswith(("DNS:", "IP:"))]
    if not alternatives:
        return (f"is not for {name}: it has no subjectAltName, and names count nowhere else; "
                f"make a new one with one ({wanted})")
    if address and "DNS:" + name.lower() in names:
        return f"is not for {name}: it has the address as DNS:{name}; make a new one with {wanted}"
    words = "is for " + names_text(alternatives)
    if wanted in names or not address and "DNS:*." + wanted.partition(".")[2] in names:
        return words
    return (f"{words}, not for {name}: set server_name to one of these, "
            f"or make a certificate with {name}")


def tls_error(error, name=None) -> str:
    """An exception of a socket or a file, or a text, in an administrator's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        words = _VERIFY_WORDS.get(error.verify_code, error.verify_message)
        if error.verify_code in _NAME_FAULTS:
            words = (f"its certificate is not for {name}: "
                     "set server_name, or make a certificate with it")
        return getattr(error, "whose", words)
    reason = isinstance(error, ssl.SSLError) and getattr(error, "reason", None) or ""
    if reason in _REASONS:
        return _REASONS[reason]
    plain = reason.lower().replace("_", " ")
    if "ALERT_" in reason:
        return f"the peer refused with the TLS alert '{plain.partition('alert ')[2]}'"
    if "PROTOCOL" in reason or "VERSION" in reason:
        return "the peer speaks no TLS version that min_tls allows"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return "the peer closed during the handshake"
    text = getattr(error, "strerror", None) or str(error)
    return plain or re.sub(r"^\[[^]]*\] +| *\(_ssl\.c:\d+\)$", "", text)


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

SYSLOG_PATHS = ("/dev/log", "/var/run/log", "/var/run/syslog")
STANDARD_LOGS = {"/dev/stdout": 1, "/dev/stderr": 2}        # Links, which open_own() refuses.


class Log:
    """Lines to syslog, stderr or a file, without ever waiting: what cannot be written is counted.

    The loop holds the lines of one round and writes them together.
    """

    def __init__(self, debug: int = 0):
        self.debug = debug                  # 1: the steps of an opening; 2: protocol words too
        self.hold = False
        self.lines: list = []
        self._limited: dict = {}
        self._lost, self._sock = 0, None
        self.fd = -1
        self.use("stderr", 2)

    def use(self, target: str, fd: int) -> None:
        if self.fd > 2:
            os.close(self.fd)
        self.fd, self._syslog, self._second = fd, target == "syslog", None
        self._torn = False                  # The last write ended inside a line.
        self._poll = None                   # A plain file never makes us wait.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            self._poll = select.poll()
            self._poll.register(fd, select.POLLOUT)

    def __call__(self, level: int, text: str) -> None:
        self.lines += [(level, line[:MAX_LOG_LINE]) for line in text.split("\n")]
        if not self.hold:
            self.flush()

    def limited(self, level: int, key, text: str) -> None:
        """At most one line in RATE_LIMIT seconds for a key; it says how many were left out."""
        now = time.monotonic()
        since, left_out = self._limited.get(key, (-RATE_LIMIT, 0))
        if now - since < RATE_LIMIT:
            self._limited[key] = (since, left_out + 1)
        else:
            self._limited[key] = (now, 0)
            more = f" (and {left_out} more since the last such line)" if left_out else ""
            self(level, text + more)

    def flush(self) -> None:
        lines, self.lines = self.lines, []
        note = [(WARNING, f"{self._lost} log lines were lost here")] if self._lost else []
        lines[:0] = note
        try:
            if self._syslog:
                self._to_syslog(lines)
            else:
                self._to_file(lines)
            self._lost = 0
        except OSError:
            # lines holds what could not be written; the note about earlier losses is not a line.
            self._lost = len(lines) + (self._lost - 1 if note and lines[:1] == note else 0)

    def _to_file(self, lines):
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._stamp = time.strftime("%Y-%m-%d %H:%M:%S ") + f"nutshim[{os.getpid()}] "
        data = "".join([self._stamp + LEVELS[level] + text + "\n" for level, text in lines])
        rest = data.encode("utf-8", "backslashreplace")
        if self._torn:
            self._write(b"\n")
        while rest:
            size = self._write(rest[:rest.rfind(b"\n", 0, 4096) + 1 or 4096])
            del lines[:rest.count(b"\n", 0, size)]
            rest = rest[size:]

    def _write(self, data):
        # A pipe that takes anything takes 4096 bytes (PIPE_BUF).
        if self._poll and not self._poll.poll(0):
            raise BlockingIOError
        size = os.write(self.fd, data)
        self._torn = data[size - 1] != 10
        return size

    def _to_syslog(self, lines):
        """The library's syslog() waits for a syslogd that hangs, so we speak to it ourselves (RFC
        3164): in datagrams or, where it takes none, over a stream."""
        if not self._sock:
            for kind, path in itertools.product((socket.SOCK_DGRAM, socket.SOCK_STREAM),
                                                SYSLOG_PATHS):
                self._sock = socket.socket(socket.AF_UNIX, kind)
                self._sock.setblocking(False)
                if self._sock.connect_ex(path) == 0:
                    break
                self._sock.close()
        try:
            while lines:
                level, text = lines[0]
                stamp = time.strftime("%b %e %H:%M:%S")
                line = f"<{3 * 8 + level}>{stamp} nutshim[{os.getpid()}]: {text}"
                # In a stream NUL ends a message, as syslog(3) has it.
                packet = (line.encode("utf-8", "backslashreplace")[:MAX_LOG_LINE]
                          + b"\0" * (self._sock.type == socket.SOCK_STREAM))
                if self._sock.send(packet) < len(packet):
                    raise OSError("a message was cut")
                del lines[0]
        except BlockingIOError:
            raise
        except OSError:
            self._sock.close()              # syslogd was restarted: connect again next time.
            self._sock = None
            raise


def open_log(target: str, uid: int) -> int:
    """The descriptor to use() for a target; OSError when its file cannot be written."""
    if target in ("syslog", "stderr"):
        return 2
    if target in STANDARD_LOGS:
        return os.dup(STANDARD_LOGS[target])
    return open_own(target, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK, 0o640, uid)


def open_own(path: str, flags: int, mode: int, uid: int) -> int:
    """Open or make a file in a folder that may be another user's.

    A link is not followed, and a plain file with another name elsewhere, or of a user other than
    root, uid and the present one, is left alone: OSError.
    """
    fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and (info.st_nlink != 1
                                       or info.st_uid not in (0, os.geteuid(), uid)):
        os.close(fd)
        whose = f"belongs to user {info.st_uid}" if info.st_nlink == 1 else "has another name too"
        raise OSError(errno.EPERM, f"this file {whose}, so it is left alone; remove it")
    return fd


# --- Connections and workers ---------------------------------------------------------------------

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_NOT_NOW = (BlockingIOError, InterruptedError)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def numeric_family(host: str) -> Optional[int]:
    """AF_INET or AF_INET6 of a numeric address, None of a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host.partition("%")[0])
            return family
        except (OSError, ValueError):
            pass
    return None


def address_text(address: tuple) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


def look_up(host: str, port: int) -> list:
    """getaddrinfo() as [(family, address)], in its order; OSError.

    localhost needs no resolver (RFC 6761 6.3).
    """
    if host == "localhost":
        return look_up("127.0.0.1", port) + look_up("::1", port)
    # Bytes, since a str needs the idna codec, which small boxes do not have.
    found = socket.getaddrinfo(host.encode("ascii"), port, 0, socket.SOCK_STREAM)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def tune(sock: socket.socket) -> None:
    """No delay for small replies; find out about peers that have vanished."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * HIGH_WATER)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Workers:
    """Threads that run jobs for the loop; see Threads above."""

    def __init__(self, count: int, wake: Callable):
        self._wake, self._jobs = wake, SimpleQueue()
        self.done: collections.deque = collections.deque()  # (then, result, error), from any thread
        for _ in range(count):
            _thread.start_new_thread(self._run, ())

    def submit(self, job: Callable, then: Callable) -> list:
        """Run job() in a thread, then then(result, error) in the loop's.

        To give it up, empty the list returned.
        """
        task = [(job, then)]
        self._jobs.put(task)
        return task

    def submit_look_up(self, host: str, port: int, then: Callable) -> None:
        """In a thread of its own: a resolver that hangs must not hold up handshakes."""
        try:
            _thread.start_new_thread(self._do, ([(lambda: look_up(host, port), then)],))
        except RuntimeError as error:
            self.done.append((then, None, OSError(errno.EAGAIN, str(error))))
            self._wake()

    def _run(self):
        while True:
            try:
                self._do(self._jobs.get())
            except MemoryError:
                pass                        # The session's deadline ends it; the thread must live.

    def _do(self, task):
        try:
            job, then = task.pop()
        except IndexError:                  # Not wanted any more.
            return
        try:
            self.done.append((then, job(), None))
        except Exception as error:          # The loop tells a peer's fault from a bug.
            self.done.append((then, None, error))
        self._wake()


QUICKACK = getattr(socket, "TCP_QUICKACK", None)
LAST = getattr(socket, "MSG_MORE", 0)       # With what is sent right before the end: one packet.
_buffer = bytearray(CHUNK)      # All reads go through it: 16 KiB more cost more than a read.
_view = memoryview(_buffer)


class Connection:
    """One socket in the loop, with the bytes that the kernel did not take yet.

    on_read is called when there is something for recv(); on_write when the kernel has taken some of
    what had to wait, or the connection is up.
    """
    __slots__ = ("loop", "owner", "sock", "out", "mask", "on_read", "on_write", "more", "ended",
                 "fault", "peer", "origin", "_wanted", "_ending", "_fill", "_send")

    def __init__(self, loop, sock, owner=None, on_read=None):
        self.loop, self.owner = loop, owner     # The owner is closed when a bug shows.
        self.sock, self._send = sock, sock.send
        self._fill = functools.partial(sock.recv_into, _buffer)
        self.on_read, self.on_write = on_read, None
        self.out = b""                  # What the kernel has not taken.
        self.mask = self._wanted = 0    # Events registered; events asked for by want().
        self.more = False               # recv() has something that select() does not see.
        self.ended = False              # The peer's side has ended.
        self.fault = ""                 # How, if not by a proper end.
        self.peer: Optional[Peer] = None    # Who it is, where there is TLS.
        self.origin: Any = None         # The Target and its address, where we have dialled.
        self._ending = False            # Our side ends once out is empty.
        if on_read:
            self.want(READ)

    def want(self, mask: int) -> None:
        """Which events are asked for; unsent bytes are taken care of anyway."""
        self._wanted = mask
        if self.out or mask != self.mask:
            self._register()
        if self.more and mask & READ:
            self.loop.again[self] = None

    def _register(self):
        mask = self._wanted | (WRITE if self.out else 0)
        if mask != self.mask:
            if not mask:
                self.loop.selector.unregister(self.sock)
            elif self.mask:
                self.loop.selector.modify(self.sock, mask, self)
            else:
                self.loop.selector.register(self.sock, mask, self)
            self.mask = mask

    def go_on(self) -> None:
        if self.more and self.mask & READ:
            self.on_read()

    def recv(self) -> Optional[bytes]:
        """Bytes; b"" at the end, however it came; None when there is nothing yet."""
        try:
            size = self._fill()
            if size:
                return _view[:size].tobytes()
        except _NOT_NOW:
            return None
        except OSError as error:
            self.fault = tls_error(error)
        self.ended = True
        return b""

    def hurry(self) -> None:
        """More is to come: acknowledge at once, since upsd's kernel holds the next reply back until
        then (Nagle's algorithm), and ours would take 40 ms."""
        if QUICKACK is not None:
            self.sock.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)

    def discard(self) -> bool:
        """Read without looking; whether the peer's side has ended."""
        try:
            return not self._fill()
        except _NOT_NOW:
            return False
        except OSError:
            return True

    def send(self, data: bytes, flags: int = 0) -> None:
        """Send what the kernel takes now, keep the rest."""
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
            self._register()
        except OSError:
            self.want(self._wanted | READ)      # What is wrong shows when it is read.

    def writable(self) -> None:
        try:
            while self.out:
                del self.out[:self._send(self.out)]
        except _NOT_NOW:
            pass
        except OSError:
            self.out = b""                      # As in send().
        if not self.out:
            self.out = b""
            if self._ending:
                self._shut()
        self._register()
        if self.on_write:
            self.on_write()

    def end(self) -> None:
        """Our side ends after what was sent; reading goes on."""
        self._ending = True
        if not self.out:
            self._shut()

    def _shut(self):
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass                                # The peer was faster.

    def close(self) -> None:
        """Idempotent. What the kernel has taken still goes out."""
        if self.sock:
            self.more = False
            self.out = b""
            self.want(0)
            self.sock.close()
            # No cycle, so a session's memory is free at once.
            self.sock = self.owner = self.on_read = self.on_write = self._fill = self._send = None


def _ask_for_memory():
    """MemoryError while there is still some, for the sessions that run and for OpenSSL.

    Python 3.11 dies when OpenSSL has none for a new engine.
    """
    try:
        mmap.mmap(-1, SPARE_MEMORY).close()     # Never touched, so it costs nothing.
    except OSError:
        raise MemoryError from None


class Engine:
    """The TLS of one connection between two memory buffers; see Threads above."""
    __slots__ = ("tls", "name", "incoming", "outgoing")

    def __init__(self, context: ssl.SSLContext, server: bool, name: Optional[bytes] = None,
                 ticket: Optional[ssl.SSLSession] = None):
        _ask_for_memory()
        self.name, self.incoming, self.outgoing = name, ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server, name, ticket)

    def shake(self, data: Optional[bytes]) -> tuple:
        """A step of the handshake, in a thread; b"" is the peer's end, None the first step.

        -> (bytes to send, the Peer once it is done or the exception that ends it, bytes left over)
        """
        rest = memoryview(data or b"")
        outcome = None
        try:
            if data == b"":
                self.incoming.write_eof()
            while outcome is None:
                if rest:
                    self.incoming.write(rest[:PIECE])
                    rest = rest[PIECE:]
                try:
                    self.tls.do_handshake()
                    outcome = describe_peer(self.tls)
                except ssl.SSLWantReadError:
                    if not rest:
                        break
        except (OSError, ValueError) as error:
            if isinstance(error, ssl.SSLCertVerificationError):
                note_failure(self.tls, error)
            outcome = error
        return self.outgoing.read(), outcome, bytes(rest)


class TlsConnection(Connection):
    """A Connection whose bytes are TLS's; it takes the place of the plain one after a handshake."""
    __slots__ = ("engine", "_rest", "_piece", "_excess", "_incoming", "_outgoing", "_feed",
                 "_decrypt", "_encrypt", "_made")

    def __init__(self, plain: Connection, engine: Engine, peer: Peer, piece: int, rest: bytes):
        super().__init__(plain.loop, plain.sock, plain.owner)
        self.out, self.engine, self.peer = plain.out, engine, peer
        self._piece = piece             # bytes of data a record, at the most
        self._rest = rest               # Received, and not fed to the engine yet.
        self._excess = 0                # Bytes of TLS that carried nothing.
        self._incoming, self._outgoing = engine.incoming, engine.outgoing
        self._feed, self._made = engine.incoming.write, engine.outgoing.read
        # Past SSLObject's methods, which only pass on: one call less each.
        tls = getattr(engine.tls, "_sslobj", engine.tls)
        self._encrypt, self._decrypt = tls.write, functools.partial(tls.read, CHUNK, _buffer)
        self.more = bool(rest or engine.incoming.pending)
        plain.out = b""
        plain.want(0)
        plain.sock = None
        self._register()

    def recv(self) -> Optional[bytes]:
        """One read of the socket, and what comes out of it: no peer can keep the loop longer."""
        rest, self._rest = self._rest, b""
        if self.more:
            self.more = False
            if self.ended:
                return b""
        else:
            try:
                size = self._fill()
            except _NOT_NOW:
                return None
            except OSError as error:
                self.fault, size = tls_error(error), 0
            if not size:                    # With or without a close_notify: an end is an end.
                self.ended = True
                return b""
            self._excess += size
            if size > PIECE:
                rest = _view[PIECE:size].tobytes()
                size = PIECE
            self._feed(_view[:size])
        data = self._decrypted(rest)
        excess = self._excess - OVERHEAD * len(data)
        self._excess = excess if excess > 0 else 0
        if excess > HIGH_WATER and not self.ended:
            self.ended, self.fault = True, "its TLS is nearly all overhead"
        if self._outgoing.pending:          # Alerts, key updates, tickets.
            super().send(self._made())
            if len(self.out) > 2 * HIGH_WATER:
                self.ended, self.fault = True, "it does not read what TLS has to say"
        if self.ended and data:
            self.more = True                # The end is told by the next call.
            self.loop.again[self] = None
        return data if data or self.ended else None

    def _decrypted(self, rest):
        """What is in the engine, and in the rest, that it is fed with."""
        data = b""
        try:
            while True:
                try:
                    size = self._decrypt()
                    if not size:
                        self.ended = True
                        return data
                    data = data + _view[:size] if data else _view[:size].tobytes()
                except ssl.SSLWantReadError:
                    pass
                if not self._incoming.pending:
                    if not rest:
                        return data
                    self._feed(rest[:PIECE])
                    rest = rest[PIECE:]
        except (OSError, ValueError) as error:
            self.ended = True
            if not isinstance(error, (ssl.SSLZeroReturnError, ssl.SSLEOFError)):
                self.fault = tls_error(error)
        return data

    def send(self, data: bytes, flags: int = 0) -> None:
        piece = self._piece
        try:
            if len(data) <= piece:
                self._encrypt(data)
                made = self._made()
            else:
                records = []
                for at in range(0, len(data), piece):
                    self._encrypt(data[at:at + piece])
                    records.append(self._made())
                made = b"".join(records)
        except OSError:
            self.want(self._wanted | READ)      # What is wrong shows when it is read.
            return
        super().send(made, flags)

    def discard(self) -> bool:
        """Our close_notify is out, so TLS reads no more."""
        self.more = False
        return self.ended or super().discard()

    def end(self) -> None:
        """Our close_notify, then TCP's end (RFC 8446 6.1)."""
        if not self._ending:
            self._say_close_notify()
        super().end()

    def _say_close_notify(self):
        """After what was sent. The peer's bytes are read first: with some unread unwrap() fails."""
        self._decrypted(self._rest)
        self._rest = b""
        try:
            self.engine.tls.unwrap()
        except (OSError, ValueError):           # Nearly always: it wants the peer's.
            pass
        if self._outgoing.pending:
            super().send(self._made())

    def close(self) -> None:
        if self.sock and not self._ending:
            self._ending = True
            self._say_close_notify()
        super().close()
        self.engine = self._incoming = self._outgoing = None
        self._feed = self._decrypt = self._encrypt = self._made = None


# --- Openings: what is told in order -------------------------------------------------------------


class Late(Exception):
    """Raised in an opening whose deadline has passed."""


class Task:
    """A coroutine of the loop. What it awaits with until() calls it back; then(result, error).

    error is a peer's fault, or Late; anything else is a bug, which ends the owner.
    """
    __slots__ = ("_loop", "_owner", "_coroutine", "_then", "_turn")

    def __init__(self, loop, owner, coroutine, then: Callable):
        self._loop, self._owner = loop, owner
        self._coroutine, self._then, self._turn = coroutine, then, 0

    def start(self) -> Task:
        self._go(0)
        return self

    def _go(self, turn, value=None, error=None):
        if turn != self._turn:              # Called back by something that it no longer awaits.
            return
        self._turn += 1
        try:
            try:
                arm = self._coroutine.throw(error) if error else self._coroutine.send(value)
            except StopIteration as done:
                self._turn = -1
                self._then(done.value, None)
            except (ProtocolError, OSError, Late) as failure:
                self._turn = -1
                self._then(None, failure)
            else:
                arm(functools.partial(self._go, self._turn))
        except Exception as bug:
            self._loop.fault(self._owner, bug)

    def late(self) -> None:
        self._go(self._turn, error=Late())

    def cancel(self) -> None:
        self._turn = -1
        self._coroutine.close()


@types.coroutine
def until(arm: Callable):
    """In a Task: hand arm() a function and wait until that is called with (result, error)."""
    return (yield arm)


async def ready(conn: Connection, mask: int) -> None:
    """Wait until a connection can be read, or is up."""
    def arm(resume):
        conn.on_read = conn.on_write = resume
        conn.want(mask)
    await until(arm)
    conn.want(0)


async def received(conn: Connection) -> bytes:
    """Wait for bytes; b"" at the end."""
    while True:
        await ready(conn, READ)
        data = conn.recv()
        if data is not None:
            return data


async def in_thread(loop, job: Callable):
    """The result of a job; given up, it costs no thread's time and holds nothing."""
    task: list = []

    def arm(resume):
        nonlocal task
        task = loop.workers.submit(job, resume)
    try:
        return await until(arm)
    finally:
        task.clear()


async def connected(loop, owner, family: int, address: tuple) -> Connection:
    """A TCP connection to one address; OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    conn = Connection(loop, sock, owner)
    try:
        tune(sock)
        code = sock.connect_ex(address)
        if code in (0, errno.EINPROGRESS):
            await ready(conn, WRITE)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        return conn
    except BaseException:
        conn.close()
        raise


async def ask_for_tls(conn: Connection) -> None:
    """STARTTLS and its answer (RFC 9271 4.2.12)."""
    conn.send(b"STARTTLS\n")
    answer = b""
    while not starttls_reply(answer):
        data = await received(conn)
        if not data:
            raise ProtocolError(Reason.UPSTREAM,
                                f"closed before it answered STARTTLS {conn.fault}".strip())
        answer += data


async def secured(conn: Connection, engine: Engine, server: bool,
                  name: Optional[bytes] = None) -> TlsConnection:
    """The TLS handshake; ProtocolError says why there is none."""
    data = await received(conn) if server else None     # The client speaks first.
    size = 0
    while True:
        fault = conn.fault
        step = functools.partial(engine.shake, data)
        made, outcome, rest = await in_thread(conn.loop, step)
        if made:
            conn.send(made)
        if isinstance(outcome, Peer):
            return TlsConnection(conn, engine, outcome, PIECE if server else RECORD, rest)
        if outcome:
            text = fault or tls_error(outcome, name and name.decode())
            raise ProtocolError(Reason.TLS, text) from outcome
        data = await received(conn)
        size += len(data)
        if size > MAX_HANDSHAKE:
            raise ProtocolError(Reason.TLS, f"a handshake of more than {MAX_HANDSHAKE} bytes")


# --- Sessions ------------------------------------------------------------------------------------

OPENING, RELAY, DRAIN = "opening", "relaying", "draining"
ENDING, CLOSED = "ending", "closed"

# What happens, by state: client readable, upstream readable, writable again, deadline.
# OPENING is told by a coroutine; CLOSED is the end.
_EVENTS = {RELAY: ("_commands", "_replies", "_written", "_idle"),
           DRAIN: ("_gone", "_replies", "_written", "_over"),
           ENDING: ("_discard", "_gone", "_last_words", "_over")}


class Session:
    """One NUT client's connection and the upstream session that serves it, from accept to close.

    A server shim's client has an upstream session of its own once it is admitted. A client shim's
    has none until it says something that is no question; its questions are asked over the shared
    session, and count in asked until they are answered.
    """
    __slots__ = ("shim", "loop", "number", "address", "place", "client", "upstream", "link",
                 "state", "deadline", "began", "last", "talk", "access", "user", "ups", "bytes_in",
                 "bytes_out", "opening", "backlog", "asked", "tries", "alone", "reason",
                 "stopping")

    def __init__(self, shim: Shim, sock: socket.socket, address: tuple, place: Union[str, bytes]):
        self.shim, self.loop, self.address, self.place = shim, shim.loop, address, place
        self.client = Connection(self.loop, sock, self)
        self.upstream = self.link = self.talk = self.opening = self.reason = None
        self.access = self.user = self.ups = None
        self.began = self.last = self.loop.now
        self.deadline = float("inf")
        self.state = OPENING
        self.bytes_in = self.bytes_out = 0
        self.backlog = b""          # What the client has sent and nobody has looked at yet.
        self.asked = 0              # Questions over the shared session that are unanswered.
        self.tries = 0              # How often they had to be asked again.
        self.alone = False          # From its next command on it gets a session of its own.
        self.stopping = False       # The replies under way, then the end.
        self.number = shim.count(place)

    def start(self) -> None:
        self.log(INFO, "opened")
        if self.shim.server:
            self._open(self._admitted())
        else:
            self._enter(RELAY, self.shim.conf.idle_timeout)
            self.client.want(READ)

    def log(self, level: int, text: str) -> None:
        peer = address_text(self.address)
        self.loop.log(level, f"[{self.shim.name}] #{self.number} {peer}: {text}")

    def tell(self, step: str, text: str, _done: bool = True) -> None:
        """A step of an opening, for -D."""
        if self.loop.log.debug:
            self.log(DEBUG, f"{step}: {text}")

    def _until(self, seconds):
        """Past that deadline the loop calls expired()."""
        self.deadline = self.loop.now + seconds
        self.loop.watch(self.deadline)

    def expired(self) -> None:
        if self.state == OPENING:
            self.opening.late()
        else:
            getattr(self, _EVENTS[self.state][3])()

    def _enter(self, state, seconds):
        """The one change of state, and with it of what happens."""
        self.state, self.last = state, self.loop.now
        commands, replies, written, _ = _EVENTS[state]
        self.client.on_read = getattr(self, commands)
        self.client.on_write = getattr(self, written)
        if self.upstream:
            self.upstream.on_read = getattr(self, replies)
            self.upstream.on_write = self.client.on_write
        self._until(seconds)

    # Opening.

    def _open(self, steps):
        self.state = OPENING
        self.client.want(0)
        self.opening = Task(self.loop, self, steps, self._opened)
        self.opening.start()

    async def _admitted(self):
        """A server shim's client, before upsd is reached: strangers never get that far."""
        conf, what = self.shim.conf, "STARTTLS"
        self._until(conf.handshake_timeout)
        try:
            if await self._greeted() == "tls":
                what = "end of the TLS handshake"
                engine = Engine(self.shim.context, True)
                self.client = await secured(self.client, engine, True)
        except Late:
            raise ProtocolError(Reason.TIMEOUT,
                                f"no {what} within {conf.handshake_timeout} s") from None
        peer = self.client.peer
        if peer:
            self.shim.judge(self.client)
            self._tell_tls(peer)
        if conf.permit is not None:
            identities = peer.names + [peer.pin] if peer and peer.pin else []
            self.access = next((access for name, access in conf.permit
                                if name == "*" or name in identities), None)
            if self.access is None:
                self.client.send(ACCESS_DENIED)
                raise ProtocolError(Reason.PERMIT, ", ".join(identities) or "no certificate")
            self.log(INFO, f"access class {self.access}")
        self.loop.strangers.pop(self, None)
        return await self._dialled()

    async def _greeted(self):
        """Lines until STARTTLS, or those of a client that goes on without TLS."""
        client, greeting = self.client, Greeting()
        local = self.shim.conf.plaintext == "localhost" and is_loopback(self.address[0])
        while True:
            data = await received(client)
            if not data:
                reason = Reason.NO_STARTTLS if greeting.refused else Reason.CLIENT
                raise ProtocolError(reason, client.fault)
            self.bytes_in += len(data)
            reply, verdict, self.backlog = greeting.feed(data, local)
            self.tell("greeting", verdict or "no STARTTLS yet")
            if reply:
                client.send(reply)
            if verdict == "plain":
                self.log(NOTICE, "goes on without TLS, as plaintext = localhost allows")
            elif verdict != "tls" and verdict:
                raise ProtocolError(Reason.NO_STARTTLS if greeting.refused else Reason.LOGOUT)
            if verdict:
                return verdict

    def _tell_tls(self, peer):
        self.log(INFO, f"TLS up: {tls_text(peer)}")

    async def _dialled(self):
        """An upstream session of its own; the dial has a deadline of its own."""
        self.deadline = float("inf")
        upstream = await dialled(self.shim, self, self.tell)
        if upstream.peer:
            self._tell_tls(upstream.peer)
        return upstream

    def _opened(self, upstream, error):
        self.opening = None
        if isinstance(error, ProtocolError):
            return self.finish(error.reason, str(error))
        if error:
            return self.finish(Reason.TLS, tls_error(error))
        self.upstream = upstream
        upstream.owner = self
        self.shim.counts["own"] += 1
        self.talk = Conversation(ALREADY_TLS if self.client.peer else NO_TLS_HERE,
                                 CLASSES.get(self.access), self.loop.log.debug > 1)
        self._enter(RELAY, self.shim.conf.idle_timeout)
        self._settle()

    # Relaying.

    def _commands(self):
        data = self.client.recv()
        if data:
            self.last = self.loop.now
            self.bytes_in += len(data)
            if self.backlog:
                data = self.backlog + data
                self.backlog = b""
            if len(data) > MAX_AHEAD:       # Fewer bytes are no more commands.
                self.backlog = data
                self._turn()
            else:
                self._take(data)
        elif data is not None:
            self._client_ended()

    def _turn(self):
        """Take from the backlog what upsd would in a turn."""
        data = self.backlog
        cut = len(data)
        if cut > TURN:
            cut = data.rfind(b"\n", 0, TURN) + 1 or TURN
        if data.count(b"\n", 0, cut) > MAX_AHEAD:
            cut = 0
            for _ in range(MAX_AHEAD):
                cut = data.index(b"\n", cut) + 1
        self.backlog = data[cut:]
        self._take(data[:cut])

    def go_on(self) -> None:
        """The loop's next round: what is left in the backlog has its turn."""
        if self.state == RELAY and self.backlog:
            self._turn()
        if self.state == RELAY:
            self._settle()

    def _take(self, data):
        if self.talk is None:
            return self._ask(data)
        talk, client = self.talk, self.client
        up, back = talk.from_client(data)
        if talk.seen:
            self._tell_commands(talk.seen)
        if up:
            self.upstream.send(up)
        if back:
            client.send(back)
        if (self.backlog or client.out or self.upstream.out or talk.due or self.stopping
                or talk.sent >= talk.got + MAX_AHEAD):
            self._settle()

    def _replies(self):
        data = self.upstream.recv()
        if not data:
            if data is not None:
                self._upstream_ended()
            return
        talk, client = self.talk, self.client
        self.last = self.loop.now
        if not self.bytes_out:
            self.shim.remember(self.upstream)
        self.bytes_out += len(data)
        waiting = bool(talk.due)
        client.send(talk.from_upstream(data))
        if talk.sent > talk.got:
            self.upstream.hurry()
        if talk.facts:
            self._identify(talk.facts)
        if (waiting or client.out or self.backlog or self.stopping or self.state == DRAIN
                or not client.mask):
            self._settle()

    def _written(self):
        self.last = self.loop.now
        self._settle()

    def _settle(self):
        """What follows from bytes moved: who may be read while others cannot take more."""
        client, upstream, talk = self.client, self.upstream, self.talk
        busy = self.asked or bool(talk) and talk.busy
        if self.stopping and not busy:
            return self.finish(Reason.STOP)
        if self.state == DRAIN and not (busy or self.backlog or client.out):
            return self.finish(Reason.CLIENT)
        full = len(client.out) > HIGH_WATER
        wait = full or self.stopping or self.state == DRAIN
        source = upstream or self.link and self.link.conn
        if talk:
            ahead = talk.sent - talk.got if talk.counted else 0
            wait = wait or bool(upstream.out) or max(ahead, len(talk.due)) >= MAX_AHEAD
        if source:
            source.want(0 if full else READ)
        # A line that is not whole yet is no question yet.
        more = self.backlog and (talk or b"\n" in self.backlog or len(self.backlog) > MAX_QUESTION)
        if more and not wait and (talk or not self.asked):
            self.loop.again[self] = None
        client.want(0 if wait or more else READ)
        if full:
            self.loop.watch(self.last + STALL_LIMIT)
            self.deadline = min(self.deadline, self.last + STALL_LIMIT)

    def _tell_commands(self, seen):
        for words in seen:
            most = SHOWN.get(words[0].upper() if words else b"", 0)
            shown = b" ".join(words[:most] + [b"..."] * (len(words) > most))
            self.log(DEBUG, f"command '{printable(shown[:MAX_QUESTION])}'")
        seen.clear()

    def _identify(self, facts):
        """What upsd has said OK to, once."""
        for verb, name in facts:
            name = printable(name[:MAX_QUESTION])
            if verb == b"USERNAME" and self.user is None:
                self.user = name
            elif verb != b"USERNAME" and self.ups is None:
                self.ups = name
            else:
                continue
            self.log(INFO, f"{verb.decode()} {name}")
        facts.clear()

    # Without an upstream session of its own.

    def _ask(self, data):
        """Pass questions on, up to the first other command; that waits for their answers."""
        newest = self.shim.newest[0]
        if not self.asked:                              # The configuration may be another one.
            self.shim = newest
        shared, at = self.shim.shared, 0
        share = (self.shim is newest and not self.alone
                 and self.loop.now >= shared.closed_until)
        end = data.find(b"\n") + 1
        while end and share and self.asked < MAX_AHEAD:
            asked = question(data[at:end])
            if not asked:
                break
            if self.loop.log.debug > 1:
                self._tell_commands([asked.raw.split()])
            shared.ask(self, asked)
            self.asked += 1
            at = end
            end = data.find(b"\n", at) + 1
        if at and not self.bytes_out:
            self.loop.strangers.pop(self, None)
        rest = data[at:]
        if rest or self.backlog or self.client.out:
            self.backlog = rest + self.backlog
            if rest and not self.asked and (end or len(rest) > MAX_QUESTION):
                self._say_oneself(rest[:end - at] if end else rest)
            else:
                self._settle()

    def _say_oneself(self, line):
        """The first command that is no question: answered here, or over a session of its own."""
        self.loop.strangers.pop(self, None)
        words = line.split()
        verb = words[0].upper() if len(words) == 1 and line.endswith(b"\n") else b""
        if verb == b"STARTTLS":
            self.client.send(NO_TLS_HERE)
            self.backlog = self.backlog[len(line):]
            self._settle()
        # With more after it, upsd goes on past LOGOUT: then upsd has to see it itself.
        elif verb == b"LOGOUT" and len(line) == len(self.backlog):
            self.client.send(OK_GOODBYE, LAST)
            self.finish(Reason.LOGOUT)
        else:
            self.tell("upstream", "a session of its own")
            self._open(self._dialled())

    def answered(self, reply: bytes, whole: bool) -> None:
        """From the shared session: a reply, or a part of a long one."""
        if self.state not in (RELAY, DRAIN):
            return
        self.last = self.loop.now
        self.bytes_out += len(reply)
        self.client.send(reply)
        if whole:
            self.asked -= 1
            self.tries = 0
            if self.link and not self.asked:
                self.shim.close_upstream(self.link.conn)
                self.link = None
        if (len(self.client.out) > HIGH_WATER and self.asked and not self.link
                and self.shim.shared.links):        # Another client may have been given it.
            self.alone, self.link = True, self.shim.shared.give_away(self)
        if self.client.out or self.backlog or self.stopping or self.link or self.state == DRAIN:
            self._settle()

    def ask_alone(self, commands: bytes) -> None:
        """The shared session is given up: what is unanswered is asked over one of its own."""
        if self.state not in (RELAY, DRAIN):
            return
        self.asked, self.alone = 0, True
        self.backlog = commands + self.backlog
        self._open(self._dialled())

    # Ends.

    def _client_ended(self):
        client, busy = self.client, self.asked or self.talk and self.talk.busy
        self.backlog = b""                      # A line that nobody will end.
        if client.fault or not (busy or client.out):
            return self.close(Reason.CLIENT, client.fault)
        # Half-closed: upsd learns of it at once, and its last replies still arrive.
        if self.upstream:
            self.upstream.end()
        self._enter(DRAIN, DRAIN_LIMIT)
        self._settle()

    def _upstream_ended(self):
        fault, origin = self.upstream.fault, self.upstream.origin
        if origin and not self.bytes_out:
            origin[0].gone(self.loop, origin[1])
        self.finish(Reason.LOST if fault else Reason.UPSD, fault)

    def finish(self, reason: Reason, detail: str = "") -> None:
        """The end, told to the client: what is on its way to it, our end, a wait for its own.

        A socket that is closed with bytes unread, or gets some afterwards, is reset: its last
        replies are lost, and NUT's own programs die of SIGPIPE without a word.
        """
        client = self.client
        if (not reason.polite or self.state == CLOSED
                or not client.out and (client.ended or reason is Reason.LOGOUT)):
            return self.close(reason, detail)
        self._report(reason, detail)
        self._let_go()
        client.end()
        self._enter(ENDING, DRAIN_LIMIT)
        client.want(READ)

    def _discard(self):
        if self.client.discard():
            self.client.ended = True
            self._last_words()

    def _last_words(self):
        self.last = self.loop.now
        if self.client.ended:
            if self.client.out:
                self.client.want(0)
            else:
                self.close(Reason.CLIENT)

    def _gone(self):
        """Nothing is read on that side any more."""

    def judge_again(self) -> None:
        """After a reload; ProtocolError. Only crl counts: nothing else ends a running session."""
        for conn in (self.client, self.upstream):
            self.shim.newest[0].expel(conn)

    def stop(self) -> None:
        """At TERM: the replies under way, no new commands."""
        self.stopping = True
        self.backlog = b""
        if self.state in (RELAY, DRAIN):
            self._settle()
        elif self.state == OPENING:
            self.close(Reason.STOP)

    def _idle(self):
        """The deadline has passed, unless activity has moved it."""
        full = len(self.client.out) > HIGH_WATER
        limit = STALL_LIMIT if full else self.shim.conf.idle_timeout
        left = self.last + limit - self.loop.now
        if left > 0:
            self._until(left)
        elif full:
            self.close(Reason.STALL)
        else:
            self.finish(Reason.IDLE)

    def _over(self):
        """The time for last words has passed, unless some of them still go out."""
        left = self.last + DRAIN_LIMIT - self.loop.now
        if left > 0:
            self._until(left)
        else:
            self.close(Reason.CLIENT)

    def _let_go(self):
        """Of all but the client's connection."""
        if self.opening:
            self.opening.cancel()
            self.opening = None
        if self.asked:
            self.shim.shared.forget(self)
            self.asked = 0
        for upstream in (self.upstream, self.link and self.link.conn):
            if upstream:
                self.shim.close_upstream(upstream)
        self.upstream = self.link = None
        self.backlog = b""

    def close(self, reason: Reason, detail: str = "") -> None:
        """The one way down; idempotent."""
        if self.state != CLOSED:
            self._let_go()
            self.state = CLOSED
            self.client.close()
            self.loop.sessions.discard(self)
            self.loop.timed.discard(self)
            self.loop.strangers.pop(self, None)
            self.shim.discount(self.place)
            self._report(reason, detail)

    def _report(self, reason, detail):
        """The one line that says why; the first reason is the true one."""
        if self.reason:
            return
        self.reason = reason
        if reason.level < INFO:
            self.shim.refused[reason.words] += 1
        why = f"{reason.words} ({detail})" if detail else reason.words
        text = (f"closed: {why}, {self.loop.now - self.began:.1f} s, "
                f"{self.bytes_in} bytes in, {self.bytes_out} bytes out")
        if reason in (Reason.RESOURCES, Reason.MADE_ROOM):
            where = f"[{self.shim.name}] {address_text(self.address)}"
            self.loop.log.limited(reason.level, reason, f"{where}: {text}")
        else:
            self.log(reason.level, text)


# --- Upstream: dialling, and the shared session --------------------------------------------------


class Target:
    """One upstream and its addresses; a name is looked up while its old addresses serve."""

    def __init__(self, host: str, port: int):
        self.host, self.port, self.text = host, port, address_text((host, port))
        self.fault = ""                         # Of the last dial, empty when it worked.
        self.failed_at = 0                      # When that was, in seconds since 1970.
        self.addresses: list = []               # [(family, address)], in the resolver's order
        self.failures: dict = {}                # address -> when it failed, on the loop's clock
        self._fresh_until = 0
        self._waiting: Optional[list] = None    # Who wants to know of a look-up under way.
        if host == "localhost" or numeric_family(host):
            self.addresses, self._fresh_until = look_up(host, port), float("inf")

    def refresh(self, loop, then: Callable, again: bool = False) -> bool:
        """Whether a look-up is under way; then(error) is called when it is done."""
        if loop.now < self._fresh_until and not (again and self._fresh_until < float("inf")):
            return False
        if self._waiting is None:
            self._waiting = []
            loop.workers.submit_look_up(self.host, self.port,
                                        functools.partial(self._looked_up, loop))
        self._waiting.append(then)
        return True

    def _looked_up(self, loop, found, error):
        waiting, self._waiting = self._waiting, None
        if found:
            self.addresses, self._fresh_until = found, loop.now + RESOLVE_TTL
        elif self.addresses:
            loop.log.limited(WARNING, (self.text, "look-up"),
                             f"{self.text}: the name cannot be resolved, going on with its old "
                             f"addresses: {tls_error(error)}")
        for then in waiting:
            then(error)

    def gone(self, loop, address: tuple) -> None:
        """It closed without an answer (its upsd is down, say): the next address is tried."""
        self.failed(loop, address, "closed before it answered")

    def worked(self, address: tuple) -> None:
        self.fault = ""
        self.failures.pop(address, None)

    def failed(self, loop, address: Optional[tuple], text: str) -> None:
        self.fault, self.failed_at = text, time.time()
        if address:
            self.failures[address] = loop.now
        if self._fresh_until < float("inf"):
            self._fresh_until = 0


async def reached(shim: Shim, owner, target: Target, family: int, address: tuple,
                  tell: Callable) -> tuple:
    """TCP, and for a client shim STARTTLS and TLS, with one address.

    -> (connection, its round trip in seconds); OSError or ProtocolError.
    """
    tell("connect", f"trying {address_text(address)}", False)
    began = time.monotonic()
    conn = await connected(shim.loop, owner, family, address)
    trip = time.monotonic() - began
    tell("connect", address_text(address))
    if shim.server:
        return conn, trip
    try:
        tell("STARTTLS", "asking", False)
        await ask_for_tls(conn)
        tell("STARTTLS", "OK")
        name = shim.name_for(target)
        wanted = f"its certificate has to be for {name.decode()}" if shim.context.check_hostname \
            else f"its name is not checked, as verify = {shim.conf.verify}"
        tell("TLS", wanted, False)
        engine = Engine(shim.context, False, name, shim.ticket(name))
        conn = await secured(conn, engine, False, name)
        peer = conn.peer
        how = ", resumed" if engine.tls.session_reused else ""
        tell("TLS", f"{peer.version}, {peer.cipher}{how}")
        shim.judge(conn)
        return conn, trip
    except BaseException:
        conn.close()
        raise


class Dial:
    """A race of all targets' addresses for one upstream connection (RFC 8305 section 5).

    They are tried in the administrator's order, those that failed lately last. The next one begins
    when the one before has failed, or has made no progress for STAGGER seconds. The first
    that is up and verified wins. then(connection, ProtocolError).
    """

    def __init__(self, shim: Shim, owner, tell: Callable, then: Callable):
        self._shim, self._loop, self._owner, self._tell = shim, shim.loop, owner, tell
        self._then: Optional[Callable] = then
        self._tried: set = set()
        self._running: dict = {}                # address -> (target, Task)
        self._looking = 0
        self._failures: list = []
        self._end = self._loop.now + shim.conf.handshake_timeout
        self.deadline = self._end

    def start(self) -> None:
        self._loop.timed.add(self)
        self._look_up(False)
        self._next()

    def _looked_up(self, target, error):
        if self._then:
            self._looking -= 1
            if error:
                self._failed(target, None, f"the name cannot be resolved: {tls_error(error)}")
            else:
                found = ", ".join(address_text(address) for _, address in target.addresses)
                self._tell("look-up", f"{target.host}: {found}")
            if self.deadline == self._end or not self._running:
                self._next()

    def _next(self):
        if not self._then:
            return
        now, untried = self._loop.now, []
        for target in self._shim.targets:
            for family, address in target.addresses:
                if (target, address) not in self._tried:
                    late = now - target.failures.get(address, -FAILED_TTL) < FAILED_TTL
                    untried.append((late, len(untried), target, family, address))
        if untried:
            _, _, target, family, address = min(untried, key=lambda each: each[:2])
            self._tried.add((target, address))
            self.deadline = self._end
            task = Task(self._loop, self._owner, self._attempt(target, family, address),
                        functools.partial(self._attempted, target, address))
            self._running[target, address] = task
            task.start()
        elif self._running or self._looking:
            if self.deadline < self._end:           # Silence: a name may have moved meanwhile.
                self._look_up(True)
            self.deadline = self._end
            self._loop.watch(self._end)
        else:
            self._lose()

    def _look_up(self, again):
        for target in self._shim.targets:
            then = functools.partial(self._looked_up, target)
            self._looking += target.refresh(self._loop, then, again)

    def _step(self, target, step, text, done=True):
        """An attempt has made progress."""
        self._tell(step, f"{target.text}: {text}", done)
        self.deadline = min(self._end, self._loop.now + STAGGER)
        self._loop.watch(self.deadline)

    async def _attempt(self, target, family, address):
        """One address, and once more without a ticket where the server does not take it."""
        tell, shim = functools.partial(self._step, target), self._shim
        try:
            return await reached(shim, self._owner, target, family, address, tell)
        except ProtocolError as error:
            name = shim.name_for(target)
            if error.reason is not Reason.TLS or not shim.ticket(name):
                raise
            self._step(target, "TLS", f"{error}; once more without a ticket")
            shim.refuse_ticket(name)
        return await reached(shim, self._owner, target, family, address, tell)

    def _attempted(self, target, address, result, error):
        earlier = itertools.takewhile(lambda each: each != (target, address), self._running)
        if result:
            for slow, where in earlier:         # Overtaken: not waited for the next time.
                slow.failures[where] = self._loop.now
        del self._running[target, address]
        if result:
            conn, self._shim.round_trip = result
            conn.origin = (target, address)
            target.worked(address)
            then = self._then
            self.cancel()
            then(conn, None)
            return
        if isinstance(error, ProtocolError):
            worded = error.reason in (Reason.PIN, Reason.REVOKED, Reason.RESOURCES)
            text = f"{error.reason.words}: {error}" if worded else str(error)
        else:
            text = tls_error(error)
            if error.errno in _EXHAUSTED:
                text = f"{Reason.RESOURCES.words}: {text}"
        self._failed(target, address, text)
        # By way of the loop: hundreds of addresses that fail at once would recurse too deep.
        self._loop.soon.append(self._next)

    def _failed(self, target, address, text):
        where = target.text if address is None or address[0] == target.host else (
            f"{target.text} ({address_text(address)})")
        target.failed(self._loop, address, text)
        self._tell("failed", f"{where}: {text}")
        self._failures.append(f"{where}: {text}")

    def expired(self) -> None:
        if self._loop.now < self._end:
            self._next()
        else:
            for target, address in list(self._running):
                self._failed(target, address, "no answer in time")
            self._lose()

    def _lose(self):
        then = self._then
        self.cancel()
        failures = "; ".join(dict.fromkeys(self._failures)) or "the name was not resolved in time"
        then(None, ProtocolError(Reason.UPSTREAM, failures))

    def close(self, reason: Reason, detail: str = "") -> None:
        """After a bug."""
        if self._then:
            self._failures.append(f"{reason.words} {detail}".strip())
            self._lose()

    def cancel(self) -> None:
        self._then = None
        self._loop.timed.discard(self)
        running, self._running = self._running, {}
        for _, task in running.items():
            task.cancel()


async def dialled(shim: Shim, owner, tell: Callable) -> Connection:
    """An upstream connection, up and verified; ProtocolError with all that failed."""
    dial: Any = None

    def arm(resume):
        nonlocal dial
        dial = Dial(shim, owner, tell, resume)
        dial.start()
    try:
        return await until(arm)
    finally:
        dial.cancel()


class Link:
    """One upstream connection that carries questions."""
    __slots__ = ("conn", "questions", "spoke")

    def __init__(self, conn: Connection, waiting: list):
        self.conn, self.questions = conn, Questions(waiting)
        self.spoke = False              # A byte has come.

    def flush(self) -> None:
        data = self.questions.to_send()
        if data:
            self.conn.send(data)


class Shared:
    """The upstream session over which all clients of a client shim ask their questions.

    Mostly there is one link. When that is silent, a fresh one is dialled beside it; whichever
    speaks first goes on.
    """

    def __init__(self, shim: Shim):
        self.shim, self.loop = shim, shim.loop
        self.links: list = []
        self.asked = self.asked_again = 0       # Questions so far, for the status.
        self.ended = ""                         # Why the last link was given up.
        self.up_since = 0                       # In seconds since 1970; 0 while there is none.
        self.deadline = float("inf")
        self._waiting: list = []                # (asker, Question), while there is no link.
        self._dial: Optional[Task] = None
        self._flushing = False
        self._heard = 0                         # When it was last heard, or first asked since.
        self._since = 0                         # The same, or since when a fresh one is awaited.
        self._silences = 0                      # One after another.
        self.closed_until = 0.0 if not shim.server and shim.conf.reuse else float("inf")
        self._retired = False

    @property
    def link(self) -> Optional[Connection]:
        """The connection in use."""
        return self.links[0].conn if self.links else None

    def log(self, level: int, text: str) -> None:
        self.loop.log(level, f"[{self.shim.name}] shared session: {text}")

    def tell(self, step: str, text: str, _done: bool = True) -> None:
        if self.loop.log.debug:
            self.log(DEBUG, f"{step}: {text}")

    def ask(self, asker, asked: Question) -> None:
        self.asked += 1
        if not self.links:
            self._waiting.append((asker, asked))
        for link in self.links:
            link.questions.ask(asker, asked)
        if not self._flushing:
            self._flushing = True
            self.loop.soon.append(self._flush)

    def _flush(self):
        """At the end of a round: many questions in one send."""
        self._flushing = False
        if self._waiting:
            self._start_dial()
        fresh = [link for link in self.links if not link.questions.sent]
        for link in self.links:
            link.flush()
        if fresh:
            self._since = self.loop.now
            if len(fresh) == len(self.links):
                self._heard = self._since
            self._watch()

    def _patience(self):
        """Seconds of silence to put up with."""
        patience = max(PATIENCE, 4 * self.shim.round_trip)
        return min(MAX_PATIENCE, patience * 2 ** min(self._silences, 6))

    def _busy(self):
        return bool(self._waiting) or any(link.questions.sent or link.questions.waiting
                                          for link in self.links)

    def _limit(self):
        """Seconds that it may be silent."""
        return self._patience() if self._busy() else self.shim.conf.reuse

    def _watch(self):
        deadline = self._since + self._limit()
        if deadline < self.deadline:
            self.deadline = deadline
            self.loop.timed.add(self)
            self.loop.watch(deadline)

    def expired(self) -> None:
        self.deadline = float("inf")
        self.loop.timed.discard(self)       # Or the shims of all reloads would stay.
        left = self._since + self._limit() - self.loop.now
        if not self.links or self._dial:
            return
        if left > 0:
            self._watch()
        elif self._busy():
            silent = self.loop.now - self._heard
            if self._silences and silent >= self.shim.conf.handshake_timeout:
                return self._fail(Reason.LOST, f"silent for {silent:.0f} s")
            if len(self.links) > 1:
                self._drop(self.links[0])
            self._silences += 1
            self._since = self.loop.now
            self.tell("silence", "dialling a fresh session beside it")
            self._start_dial()
        else:
            self._give_up("nobody asks")

    # Links.

    def _start_dial(self):
        if not self._dial:
            if self.links:
                self.shim.remember(self.links[0].conn)
            self._dial = Task(self.loop, self, dialled(self.shim, self, self.tell), self._dialled)
            self._dial.start()

    def _dialled(self, conn, error):
        self._dial = None
        if error:
            text = str(error) if isinstance(error, ProtocolError) else tls_error(error)
            if self.links and self.loop.now - self._heard < self.shim.conf.handshake_timeout:
                self._since = self.loop.now     # The silent one may speak yet.
                return self._watch()
            return self._fail(Reason.UPSTREAM, text)
        waiting = self._unanswered()
        if self.links:
            self.asked_again += len(waiting)
        link = Link(conn, waiting)
        conn.owner = self
        conn.on_read = functools.partial(self._readable, link)
        self._waiting = []
        self.links.append(link)
        conn.want(READ)
        if len(self.links) == 1:
            self._tell_up(link)
        self._flush()
        if self._retired and not self._busy():
            self._give_up("the configuration was read again")

    def _tell_up(self, link):
        self.up_since = time.time()
        self.log(INFO, f"TLS up with {link.conn.origin[0].text}: {tls_text(link.conn.peer)}, "
                       f"round trip {self.shim.round_trip * 1000:.1f} ms")

    def _readable(self, link):
        data = link.conn.recv()
        if data is None:
            return
        if not data:
            return self._lost(link)
        self._since = self._heard = self.loop.now
        if not link.spoke:
            link.spoke = True
            self.shim.remember(link.conn)
        if self._dial or len(self.links) > 1:
            self._settle_for(link)
        self._silences = 0
        for asker, reply, whole in link.questions.feed(data):
            try:
                asker.answered(reply, whole)
            except Exception as bug:
                self.loop.fault(asker, bug)
        if link.questions.fault:
            return self._distrust(link)
        if link.questions.waiting and not link.questions.sent:
            link.flush()
        if link.questions.sent and link.conn.sock:
            link.conn.hurry()
        if self._retired and not self._busy():
            self._give_up("the configuration was read again")
        elif self.deadline == float("inf"):
            self._watch()

    def _settle_for(self, link):
        """It speaks, so it goes on; whatever else was beside it is closed."""
        if self._dial:
            self._dial.cancel()
            self._dial = None
        for other in [each for each in self.links if each is not link]:
            if other is self.links[0]:
                self.ended = f"silent for more than {self._patience() / 2:.0f} s"
                self.log(NOTICE, f"{self.ended}: a fresh one takes its place")
                self._drop(other)
                self._tell_up(link)
            else:
                self._drop(other)

    def _drop(self, link):
        """Close a link. A reply that was handed out in part cannot be asked again."""
        self.links.remove(link)
        self.shim.close_upstream(link.conn)
        if link.questions.begun and link.questions.sent[0][0] is not None:
            link.questions.sent[0][0].finish(Reason.LOST, "in the middle of a reply")

    def _lost(self, link):
        """Its end. What is unanswered is asked once more over a fresh one."""
        rest, fault = link.questions.unanswered(), link.conn.fault
        if not link.spoke:
            target, address = link.conn.origin
            target.gone(self.loop, address)
        self._drop(link)
        if self.links:
            return                              # The other one has been asked the same.
        self._end(f"closed by upstream{fault and f' ({fault})'}")
        for asker in self._askers(rest):
            asker.tries += 1
            if asker.tries >= MAX_ASKED:
                asker.finish(Reason.LOST, self.ended)
        self._waiting = [each for each in rest if each[0].asked]
        if self._waiting:
            self.asked_again += len(self._waiting)
            self._start_dial()

    def _distrust(self, link):
        """An upstream like that is not shared: each client gets a session of its own."""
        fault, rest = link.questions.fault, self._unanswered()
        if link not in self.links:              # Given away a moment ago.
            link.conn.owner.finish(Reason.LOST, fault)
        self.closed_until = self.loop.now + UNSHARED
        self.log(WARNING, f"not used for {UNSHARED // 60} minutes, each client has a session of "
                          f"its own: {fault}")
        self._give_up(fault)
        for asker in self._askers(rest):
            asker.ask_alone(b"".join(asked.raw for who, asked in rest if who is asker))

    def _give_up(self, why):
        if self._dial:
            self._dial.cancel()
            self._dial = None
        self._waiting = []
        for link in list(self.links):
            self._drop(link)
        self._end(why)

    def _fail(self, reason, text):
        """Nobody gets an answer; nobody is left waiting."""
        askers = self._askers(self._unanswered())
        self._give_up(text)
        for asker in askers:
            asker.finish(reason, text)

    def _end(self, why):
        if self.up_since:
            self.log(INFO, f"given up: {why}")
        self.ended, self.up_since, self._silences = why, 0, 0

    def _unanswered(self):
        return self.links[0].questions.unanswered() if self.links else list(self._waiting)

    @staticmethod
    def _askers(rest):
        return dict.fromkeys(asker for asker, _ in rest)

    # Clients.

    def forget(self, asker) -> None:
        """A client has left with questions unanswered."""
        self._waiting = [each for each in self._waiting if each[0] is not asker]
        for link in self.links:
            link.questions.forget(asker)

    def give_away(self, asker) -> Link:
        """A client does not take its reply: its link becomes its own, and the others move on."""
        link = self.links[0]
        for other in self.links[1:]:
            self._drop(other)
        rest = [each for each in link.questions.unanswered() if each[0] is not asker]
        for other in self._askers(rest):
            link.questions.forget(other)
        self.links = []
        link.conn.owner = asker
        link.conn.on_read = functools.partial(self._readable_of, asker, link)
        self._end("a client does not read its reply: it has that session to itself")
        self._waiting = rest
        if rest:
            self._start_dial()
        return link

    @staticmethod
    def _readable_of(asker, link):
        data = link.conn.recv()
        if data:
            for who, reply, whole in link.questions.feed(data):
                who.answered(reply, whole)
            if link.questions.fault:
                asker.finish(Reason.LOST, link.questions.fault)
            elif link.conn.sock:
                link.flush()
        elif data is not None:
            asker.finish(Reason.LOST, link.conn.fault)

    def retire(self) -> None:
        """At a reload: closed once its replies are in."""
        self._retired = True
        if not self._busy() and not self._dial:
            self._give_up("the configuration was read again")

    def close(self, reason: Reason, detail: str = "") -> None:
        """After a bug."""
        self._fail(reason, detail)

    finish = close


# --- Shims ---------------------------------------------------------------------------------------


class Shim:
    """A configured shim at run time: TLS context, upstreams, the shared session, counters."""
    numbers = 0                                 # Sessions of all shims so far.

    def __init__(self, loop: Loop, conf: Conf, credentials: Credentials):
        self.loop, self.conf, self.name = loop, conf, conf.name
        self.server = conf.role == SERVER
        self.credentials, self.context = credentials, credentials.context
        self.targets = [Target(host, port) for host, port in conf.upstream]
        self.round_trip = 0.0                           # The last dial's, in seconds.
        self.counts: Counter = collections.Counter()    # Sessions in "total", upstream ones "own".
        self.refused: Counter = collections.Counter()   # By the Reason's words.
        self.addresses: Counter = collections.Counter() # Open sessions by the peer's address.
        self.newest: list = [self]     # Of this name; one list, or old ones would keep all between.
        self.shared = Shared(self)
        self._tickets: dict = {}                # server name -> (until, ssl.SSLSession or None)

    def count(self, place: Union[str, bytes]) -> int:
        """A session from an address_place() begins; its number."""
        self.counts["total"] += 1
        self.addresses[place] += 1
        Shim.numbers += 1
        return Shim.numbers

    def discount(self, place: Union[str, bytes]) -> None:
        self.addresses[place] -= 1
        if not self.addresses[place]:
            del self.addresses[place]

    def refusal(self, host: str, place: Union[str, bytes]) -> Optional[Reason]:
        """Why that address gets no session, or None."""
        if self.conf.allow_from:
            import ipaddress
            address = ipaddress.ip_address(host.partition("%")[0])
            if not any(address in network for network in self.conf.allow_from):
                return Reason.ALLOW_FROM
        if len(self.loop.sessions) >= self.loop.max_sessions:
            return Reason.MAX_SESSIONS
        if self.addresses[place] >= self.conf.max_sessions_per_address:
            return Reason.PER_ADDRESS
        return None

    def judge(self, conn: Connection) -> None:
        """What the configuration asks beyond the TLS handshake; ProtocolError."""
        peer = conn.peer
        if self.context.verify_mode != ssl.CERT_NONE and peer.pin and peer.not_after < time.time():
            # A resumed session skips the dates.
            raise ProtocolError(Reason.TLS, "its certificate has expired: renew it")
        if self.conf.pin and peer.pin not in self.conf.pin:
            raise ProtocolError(Reason.PIN, f"it has {peer.pin or 'no certificate'}")
        if self.newest[0] is not self:          # A reload came during the handshake.
            self.newest[0].expel(conn)

    def expel(self, conn: Optional[Connection]) -> None:
        """ProtocolError when crl revokes the certificate of a peer that was let in earlier."""
        revoked = self.credentials.revoked
        der = revoked and isinstance(conn, TlsConnection) and conn.engine.tls.getpeercert(True)
        found = der and read_certificate(der)
        if found and found.serial in revoked.get(found.issuer.lower(), ()):
            raise ProtocolError(Reason.REVOKED, names_text(found.names))

    def name_for(self, target: Target) -> bytes:
        """What the certificate must carry, in ASCII: the ssl module takes it without idna."""
        return (self.conf.server_name or target.host.partition("%")[0]).encode("ascii")

    # Tickets: a shortcut for the next handshake with the same server (RFC 8446 2.2).

    def close_upstream(self, conn: Connection) -> None:
        self.remember(conn)
        conn.close()

    def remember(self, conn: Connection) -> None:
        """Keep the ticket that a server has given."""
        engine = isinstance(conn, TlsConnection) and not conn.fault and conn.engine
        if engine and self.loop.now >= self._tickets.get(engine.name, (0, None))[0]:
            try:
                ticket = engine.tls.session
            except (OSError, ValueError):
                ticket = None
            if ticket and ticket.has_ticket:
                self._tickets[engine.name] = (self.loop.now + TICKET_TTL, ticket)

    def ticket(self, name: bytes) -> Optional[ssl.SSLSession]:
        return self._tickets.get(name, (0, None))[1]

    def refuse_ticket(self, name: bytes) -> None:
        """That server does not take them: none for a while."""
        self._tickets[name] = (self.loop.now + TICKET_TTL, None)

    def retire(self, heirs: Iterable[Shim]) -> None:
        """At a reload: the shim of the same name goes on counting, nothing else is taken over."""
        for heir in heirs:
            if heir.name == self.name and heir.server == self.server:
                heir.counts, heir.refused = self.counts, self.refused
                heir.addresses, heir.newest = self.addresses, self.newest
                self.newest[0] = heir
        self.shared.retire()


def address_place(host: str) -> Union[str, bytes]:
    """What counts as one address: an IPv6 peer has a /64 to choose from (RFC 4291 2.5.4)."""
    if ":" not in host:
        return host
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8]


# --- Loop ----------------------------------------------------------------------------------------


class Timer:
    """One call after a while."""

    def __init__(self, loop: Loop, seconds: float, call: Callable):
        self._loop, self._call, self.deadline = loop, call, loop.now + seconds
        loop.timed.add(self)
        loop.watch(self.deadline)

    def expired(self) -> None:
        self._loop.timed.discard(self)
        self._call()

    def close(self, _reason: Reason, _detail: str = "") -> None:
        """After a bug in the call: it is over already."""


class Loop:
    """The selectors loop: events to connections, deadlines to whatever has one, threads' results
    to whoever asked."""

    def __init__(self, log: Log, threads: int, on_signal: Callable):
        self.log, self._on_signal = log, on_signal
        self._signals: set = set()          # Received, not handled yet.
        self.selector = selectors.DefaultSelector()
        self.now = time.monotonic()
        self.sessions: set = set()
        self.strangers: dict = {}           # Sessions that have shown nothing yet, oldest first.
        self.timed: set = set()             # What has a deadline and expired().
        self.again: dict = {}               # What has more to do that select() does not see.
        self.soon: list = []                # Calls at the end of this round.
        self.max_sessions = 0
        self.stopping = self.finished = False
        self._next = float("inf")           # When the earliest deadline may be due.
        reader, self._waker = socket.socketpair()
        reader.setblocking(False)
        self._waker.setblocking(False)
        self._wakes = Connection(self, reader, None, self._woken)
        self.workers = Workers(threads, self._wake)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def _wake(self):
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            pass                            # Full, so it will wake anyway.

    def signalled(self, number: int, _frame=None) -> None:
        """A signal's handler: the byte that Python writes is lost when the socket is full."""
        self._signals.add(number)
        self._wake()

    def _woken(self):
        self._wakes.recv()
        # TERM before INT before HUP, and each of them once.
        signals, self._signals = self._signals, set()
        for number in sorted(signals, reverse=True):
            self._on_signal(number)
        done = self.workers.done
        while done:
            then, result, error = done.popleft()
            self.guarded(None, then, result, error)

    def guarded(self, owner, call: Callable, *args) -> None:
        try:
            call(*args)
        except Exception as error:
            self.fault(owner, error)

    def fault(self, owner, error: Exception) -> None:
        """The one place that tells a peer's fault from a bug; either ends the owner."""
        if isinstance(error, ProtocolError) and owner:
            owner.finish(error.reason, str(error))
        elif isinstance(error, MemoryError):
            self.log.limited(ERROR, "memory", "out of memory: a session is closed")
            if owner:
                owner.close(Reason.RESOURCES)
        else:
            # Made by hand, since the module traceback may be out of reach: in a chroot, say.
            self.log(ERROR, "internal error, please report it:\nTraceback (most recent call last):")
            trace = error.__traceback__
            while trace:
                code = trace.tb_frame.f_code
                self.log(ERROR, f"  {code.co_filename}:{trace.tb_lineno}, in {code.co_name}")
                trace = trace.tb_next
            self.log(ERROR, f"{type(error).__name__}: {error}")
            if owner:
                owner.close(Reason.BUG)

    def watch(self, when: float) -> None:
        if when < self._next:
            self._next = when

    def run(self) -> None:
        select, monotonic = self.selector.select, time.monotonic
        self.log.hold = True
        while not self.finished:
            timeout: Optional[float] = None
            if self.again:
                timeout = 0
            elif self._next < float("inf"):
                timeout = max(0, self._next - monotonic())
            events = select(timeout)
            self.now = monotonic()
            again, self.again = self.again, {}
            for key, mask in events:
                conn = key.data
                try:
                    if mask & conn.mask & READ:
                        conn.on_read()
                    if mask & conn.mask & WRITE:
                        conn.writable()
                except Exception as error:
                    self.fault(conn.owner, error)
            for each in again:
                self.guarded(getattr(each, "owner", each), each.go_on)
            if self.now >= self._next:
                self._sweep()
            while self.soon:
                self.guarded(None, self.soon.pop())
            if self.log.lines:
                self.guarded(None, self.log.flush)
        self.log.hold = False

    def _sweep(self):
        """Deadlines that are due; looked at twenty times a second at the most."""
        self._next = float("inf")
        for each in list(self.timed):
            if each.deadline > self.now:
                self.watch(each.deadline)
            elif each in self.timed:        # An earlier call may have ended it.
                self.guarded(each, each.expired)
        self._next = max(self._next, self.now + 0.05)


# --- Listeners -----------------------------------------------------------------------------------


class Listener(Connection):
    """A listening socket: connections to sessions of its shim, as far as there is room."""
    __slots__ = ("shim",)

    def __init__(self, loop: Loop, sock: socket.socket, shim: Shim):
        super().__init__(loop, sock, None, self._accept)
        self.shim = shim

    def _accept(self):
        loop, shim = self.loop, self.shim
        for _ in range(ACCEPT_BATCH):
            try:
                sock, address = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:                # Out of descriptors, most likely.
                shim.refused[Reason.RESOURCES.words] += 1
                loop.log.limited(ERROR, "accept", f"[{shim.name}] a new session is refused: "
                                                  f"{error.strerror}")
                self.want(0)
                Timer(loop, 1, self._rested)
                return
            sock.setblocking(False)
            # A socket of both families, handed over, has IPv4 peers as ::ffff:192.0.2.1.
            if re.match("::ffff:.*[.]", address[0]):
                address = (address[0][7:],) + address[1:]
            place = address_place(address[0])
            reason = shim.refusal(address[0], place)
            if reason and not self._make_room(reason, address[0], place):
                shim.refused[reason.words] += 1
                loop.log.limited(reason.level, (shim.name, reason),
                                 f"[{shim.name}] {address_text(address)}: refused: {reason.words}")
                sock.close()
                continue
            session = Session(shim, sock, address, place)
            loop.sessions.add(session)
            loop.strangers[session] = None
            loop.timed.add(session)
            loop.guarded(session, session.start)

    def _rested(self):
        if self.sock:
            self.want(READ)

    def _make_room(self, reason, host, place):
        """Idle strangers keep nobody out: the oldest one makes room for a new connection."""
        if reason is Reason.ALLOW_FROM:
            return False
        for session in self.loop.strangers:
            if reason is Reason.MAX_SESSIONS or (session.shim.addresses is self.shim.addresses
                                                 and session.place == place):
                session.close(Reason.MADE_ROOM)
                return self.shim.refusal(host, place) is None
        return False


# What lets a socket bind to an address that may come later, a VPN's or a tentative one of IPv6 at
# boot; the socket module lacks these names: IPV6_FREEBIND, IP_FREEBIND; IPV6_BINDANY, IP_BINDANY.
_BIND_ABSENT = {"linux": ((socket.IPPROTO_IPV6, 78), (socket.IPPROTO_IP, 15)),
                "freebsd": ((socket.IPPROTO_IPV6, 64), (socket.IPPROTO_IP, 24))
                }.get(sys.platform.rstrip("0123456789"), ())


def listen_keys(conf: Conf) -> list:
    """The addresses that listen names: (family, address, the shim's name if any port will do)."""
    keys: dict = {}
    for host, port in conf.listen:
        try:
            for where in ("0.0.0.0", "::") if host == "*" else (host,):
                keys.update(((family, address, "" if port else conf.name), None)
                            for family, address in look_up(where, port))
        except OSError as error:
            raise ConfigError(f"{conf.at('listen')}{host}: {error.strerror}") from None
    return list(keys)


def clash(key: tuple, others: Iterable) -> Optional[tuple]:
    """The one of other keys that cannot be open beside this one: the same, or * has its port."""
    family, address, _ = key
    return next((other for other in others if other[0] == family and address[1] == other[1][1] > 0
                 and (address == other[1] or {"0.0.0.0", "::"} & {address[0], other[1][0]})), None)


def add_listen_faults(shims: list, faults: list) -> None:
    """Add a line for each address that is listened on twice, by itself or as one of *'s."""
    taken: dict = {}                            # key: the shim's name
    for conf in shims:
        if any(fault.startswith(f"{conf.path}:{conf.lines.get('listen')}:") for fault in faults):
            continue                            # It has the default in place of what is wrong.
        if not all(host in ("*", "localhost") or numeric_family(host) for host, _ in conf.listen):
            continue                            # A resolver may take its time.
        for key in listen_keys(conf):
            other = clash(key, taken)
            if other:
                faults.append(f"{conf.at('listen')}{address_text(key[1])}: [{taken[other]}] "
                              f"listens on {address_text(other[1])} already")
                break
            taken[key] = conf.name


def open_listener(key: tuple, at: str, handed_over: list) -> Optional[socket.socket]:
    """A listening socket, one of those handed over if it fits; None where the machine lacks the
    whole family; ConfigError."""
    family, address, _ = key
    for sock in handed_over:
        if sock.family == family and sock.getsockname()[:2] == address[:2]:
            handed_over.remove(sock)
            tune(sock)
            sock.listen(BACKLOG)
            return sock
        if (address[0] == "0.0.0.0" and sock.getsockname()[:2] == ("::", address[1])
                and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)):
            twin = sock.dup()           # One for both families, as systemd's are.
            tune(twin)
            twin.listen(BACKLOG)
            return twin
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        tune(sock)                              # Accepted sockets inherit it.
        for level, option in _BIND_ABSENT:
            try:
                sock.setsockopt(level, option, 1)
            except OSError:
                pass                            # The other family's, or for root only.
        sock.bind(address)
        sock.listen(BACKLOG)                    # Only this shows that no other program does.
        return sock
    except OSError as error:
        if sock:
            sock.close()
        if family == socket.AF_INET6 and error.errno == errno.EAFNOSUPPORT:
            return None
        if address[0] in ("::", "::1") and error.errno == errno.EADDRNOTAVAIL:
            return None                         # IPv6 is switched off.
        hint = {errno.EACCES: "; below 1024 a port needs root at the start",
                errno.EADDRINUSE: "; another program has it"}.get(error.errno, "")
        raise ConfigError(f"{at}{address_text(address)}: {error.strerror}{hint}") from None


def is_absent(family: int, address: tuple) -> bool:
    """Whether this machine does not have that address (yet); one without IPv6 lacks no ::1."""
    if address[0] in ("::", "::1"):
        return False
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((address[0], 0) + address[2:])
    except OSError as error:
        return error.errno == errno.EADDRNOTAVAIL
    return False


def absent_addresses(conf: Conf) -> list:
    """A warning for each address of listen that this machine does not have."""
    try:
        return [f"{conf.at('listen')}{address[0]}: this machine has no such address (yet)"
                for family, address, _ in listen_keys(conf) if is_absent(family, address)]
    except ConfigError as fault:
        return [str(fault)]


# --- Status and control: both ends of the status socket ------------------------------------------


def status_data(daemon: Daemon) -> dict:
    """What -c status shows, as plain data."""
    loop = daemon.loop
    sessions = sorted(loop.sessions, key=lambda session: session.number)
    return {"version": VERSION, "pid": os.getpid(), "seconds": int(loop.now - daemon.began),
            "config": daemon.path, "loaded": int(daemon.loaded),
            "shims": [_status_of_shim(daemon, shim) for shim in daemon.shims],
            "sessions": list(map(_status_of_session, sessions))}


def _status_of_shim(daemon, shim):
    conf = shim.conf
    bound = [(each.sock.family, each.sock.getsockname())
             for each in daemon.listeners.values() if each.shim is shim]
    status = {
        "name": shim.name, "role": conf.role,
        "listen": [address_text(each[1]) for each in bound],
        "absent": [address_text(each[1]) for each in bound if is_absent(*each)],
        "upstream": [{"address": target.text, "state": target.fault or "ok",
                      "failed_at": int(target.failed_at)} for target in shim.targets],
        "certificates": [{"what": each.what, "days_left": days_left(each),
                          "holds": days_text(each.not_after, each.not_before)}
                         for each in shim.credentials.loaded],
        "files": conf.files(), "sessions": sum(shim.addresses.values()),
        "sessions_total": shim.counts["total"], "upstream_own": shim.counts["own"],
        "refused": dict(shim.refused)}
    if not shim.server:
        shared = shim.shared
        status["shared"] = {
            "up_since": int(shared.up_since), "round_trip_ms": round(shim.round_trip * 1000, 1),
            "asked": shared.asked, "asked_again": shared.asked_again, "given_up": shared.ended}
    return status


def _status_of_session(session):
    upstream = session.upstream or session.shim.shared.link
    peer = session.client.peer or upstream and upstream.peer
    way = "own" if session.upstream else "" if session.shim.server else "shared"
    return {"number": session.number, "shim": session.shim.name,
            "peer": address_text(session.address),
            "seconds": int(session.loop.now - session.began), "state": session.state,
            "tls": peer.version if peer else "", "upstream": way, "class": session.access or "",
            "user": session.user or "", "ups": session.ups or "", "bytes_in": session.bytes_in,
            "bytes_out": session.bytes_out, "identity": peer.names if peer else []}


def _time_text(seconds):
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def status_table(data: dict) -> str:
    """What a person reads."""
    lines = [f"nutshim {data['version']}, process {data['pid']}, up {data['seconds']} s, "
             f"configuration {data['config']} of {_time_text(data['loaded'])}"]
    for shim in data["shims"]:
        lines.append(f"[{shim['name']}] {shim['role']}, listening on {', '.join(shim['listen'])}")
        lines += [f"    warning: this machine has no address {address.rpartition(':')[0]} (yet)"
                  for address in shim["absent"]]
        for target in shim["upstream"]:
            when = f", last failed {_time_text(target['failed_at'])}" if target["failed_at"] else ""
            lines.append(f"    upstream {target['address']}: {target['state']}{when}")
        lines += [f"    {each['what']} {each['holds']}" for each in shim["certificates"]]
        lines.append(f"    sessions {shim['sessions']} now, {shim['sessions_total']} since start; "
                     f"upstream sessions of their own: {shim['upstream_own']}")
        shared = shim.get("shared")
        if shared:
            up = f"up since {_time_text(shared['up_since'])}" if shared["up_since"] else "down"
            why = f"; last given up: {shared['given_up']}" if shared["given_up"] else ""
            lines.append(f"    shared session {up}, round trip {shared['round_trip_ms']} ms, "
                         f"{shared['asked']} questions, {shared['asked_again']} asked again{why}")
        lines += [f"    refused {count}: {why}" for why, count in sorted(shim["refused"].items())]
    rows = [("number", "shim", "peer", "seconds", "state", "tls", "upstream", "class", "user",
             "ups", "bytes_in", "bytes_out", "identity")]
    for session in data["sessions"]:
        shown = dict(session, identity=", ".join(session["identity"]))
        rows.append(tuple(str(shown[column]) for column in rows[0]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(lines + ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows])


METRICS = {                                 # name: (type, help), in the order of the output
    "up_seconds": ("gauge", "seconds since the start"),
    "sessions": ("gauge", "sessions now"),
    "sessions_total": ("counter", "sessions since the start"),
    "upstream_own_total": ("counter", "upstream sessions opened for one client alone"),
    "shared_up": ("gauge", "1 while the shared upstream session is up"),
    "shared_round_trip_ms": ("gauge", "round trip of the last opening, in milliseconds"),
    "questions_total": ("counter", "questions asked over the shared session"),
    "questions_again_total": ("counter", "questions asked once more over a fresh one"),
    "refused_total": ("counter", "sessions refused, by reason"),
    "upstream_up": ("gauge", "1 if the last attempt at this upstream worked"),
    "certificate_days_left": ("gauge", "days until a certificate or revocation list ends, or +Inf"),
}
_LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})


def status_prometheus(data: dict) -> str:
    """The numbers in the text format of Prometheus."""
    series: dict = {name: {} for name in METRICS}       # {labels: value}: none stands twice

    def metric(name, value, **labels):
        pairs = ",".join(f'{label}="{text.translate(_LABEL_ESCAPES)}"'
                         for label, text in labels.items())
        key = f"{{{pairs}}}" if pairs else ""
        value = float("inf") if value is None else int(value)
        series[name][key] = min(value, series[name].get(key, value))
    metric("up_seconds", data["seconds"])
    for shim in data["shims"]:
        name = shim["name"]
        for each in ("sessions", "sessions_total"):
            metric(each, shim[each], shim=name)
        metric("upstream_own_total", shim["upstream_own"], shim=name)
        for reason, count in shim["refused"].items():
            metric("refused_total", count, reason=reason, shim=name)
        for target in shim["upstream"]:
            metric("upstream_up", target["state"] == "ok", upstream=target["address"], shim=name)
        for each in shim["certificates"]:
            metric("certificate_days_left", each["days_left"], what=each["what"], shim=name)
        shared = shim.get("shared")
        if shared:
            metric("shared_up", shared["up_since"] > 0, shim=name)
            metric("shared_round_trip_ms", shared["round_trip_ms"], shim=name)
            metric("questions_total", shared["asked"], shim=name)
            metric("questions_again_total", shared["asked_again"], shim=name)
    lines = []
    for name, found in series.items():
        if found:
            kind, text = METRICS[name]
            lines += [f"# HELP nutshim_{name} {text}", f"# TYPE nutshim_{name} {kind}"]
            lines += [f"nutshim_{name}{key} {'+Inf' if value == float('inf') else value}"
                      for key, value in found.items()]
    return "\n".join(lines)


def control_path(conf: Conf) -> str:
    return os.path.splitext(conf.pidfile)[0] + ".sock"


class Control(Connection):
    """The daemon's end: one word in, its answer out."""
    __slots__ = ("daemon",)

    def __init__(self, daemon: Daemon):
        path = control_path(daemon.conf)
        try:
            if os.path.lexists(path):
                os.unlink(path)                 # A killed daemon's: the pidfile's lock is ours.
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            mask = os.umask(0o177)
            try:
                sock.bind(path)
            finally:
                os.umask(mask)
        except OSError as error:
            raise daemon.conf.error("pidfile", path, error) from None
        sock.listen(8)
        sock.setblocking(False)
        super().__init__(daemon.loop, sock, None, self._accept)
        self.daemon = daemon

    def _accept(self):
        try:
            sock = self.sock.accept()[0]
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:                         # Out of descriptors: asked again in a second.
            self.want(0)
            Timer(self.loop, 1, lambda: self.want(READ))
            return
        sock.setblocking(False)
        conn = Connection(self.loop, sock)
        conn.on_read = functools.partial(self._read, conn)
        conn.want(READ)

    def _read(self, conn):
        data = conn.recv()
        if data is None:
            return
        conn.want(0)
        conn.on_write = conn.close
        answer = "ERR\nan internal error, which the log tells"
        try:
            answer = self.daemon.request(data.decode("ascii", "replace").strip())
        finally:
            # A file's name need not be UTF-8.
            conn.send(answer.encode("utf-8", "backslashreplace"))
            if not conn.out:
                conn.close()


def ask_daemon(conf: Conf, word: str) -> tuple:
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


def control(word: str, conf: Conf, form: Optional[str]) -> int:
    """-c: reload, stop or status; the exit status."""
    status, text = ask_daemon(conf, word)
    if status == 0 and word == "status":
        import ast
        data = ast.literal_eval(text)
        if form == "json":
            import json
            text = json.dumps(data, indent=1)
        else:
            text = status_prometheus(data) if form else status_table(data)
    print(text, file=sys.stderr if status else sys.stdout)
    if status == 0 and word == "stop":
        deadline = time.monotonic() + STOP_GRACE + 3
        while time.monotonic() < deadline and not ask_daemon(conf, "")[1].startswith("no "):
            time.sleep(0.05)
    return status


# --- Probe ---------------------------------------------------------------------------------------


def probe(conf: Conf, credentials: Credentials) -> int:
    """-p: each step towards a client shim's upstream with its result; the exit status."""
    loop = Loop(Log(), 1, lambda number: None)
    shim = Shim(loop, conf, credentials)
    return 0 if any([Probe(shim, target).run() for target in shim.targets]) else 1


class Probe:
    """The opening of a session with one target, told step by step, and two questions to upsd."""

    def __init__(self, shim: Shim, target: Target):
        self._shim, self._target, self._loop = shim, target, shim.loop
        self._name = shim.name_for(target).decode()
        self._step = "resolve"
        self._worked = False
        self._task = Task(self._loop, self, self._steps(), self._done)

    def run(self) -> bool:
        self._loop.finished, self._loop.now = False, time.monotonic()
        self._task.start()
        self._loop.run()
        return self._worked

    def close(self, _reason: Reason, _detail: str = "") -> None:
        """After a bug."""
        self._loop.finished = True

    def _say(self, step, text, done=True):
        self._step = step
        if done:
            print(f"{step:12}{text}", flush=True)

    def _limit(self):
        return Timer(self._loop, self._shim.conf.handshake_timeout, self._task.late)

    async def _steps(self):
        shim, target, conf = self._shim, self._target, self._shim.conf
        limit = self._limit()
        found = await in_thread(self._loop, lambda: look_up(target.host, target.port))
        self._say("resolve", f"{target.host}: {', '.join(address_text(each) for _, each in found)}")
        for number, (family, address) in enumerate(found, 1):
            try:
                conn, _ = await reached(shim, self, target, family, address, self._say)
                break
            except OSError:
                if number == len(found):
                    raise
            except ProtocolError as error:
                if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                    self._step = "name" if error.__cause__.verify_code in _NAME_FAULTS else "chain"
                    error = ProtocolError(error.reason, f"{error}. "
                                          + await self._stranger(family, address, str(error)))
                elif error.reason is Reason.PIN:
                    self._step = "pin"
                raise error
        self._loop.timed.discard(limit)
        peer, unchecked = conn.peer, f"not checked, as verify = {conf.verify}"
        self._say("certificate", f"{names_text(peer.names) or 'without names'}, "
                                 f"{days_text(peer.not_after)}")
        self._say("chain", "OK" if conf.verify in ("full", "chain") else unchecked)
        self._say("name", f"{self._name} OK" if conf.verify == "full" else unchecked)
        self._say("pin", peer.pin + (" OK" if conf.pin else ""))
        limit = self._limit()
        try:
            for command in (b"VER\n", b"LIST UPS\n"):
                self._step = "upsd"
                for line in (await self._answer(conn, command)).splitlines():
                    self._say("upsd", printable(line))
        finally:
            conn.close()
            self._loop.timed.discard(limit)

    async def _answer(self, conn, command):
        conn.send(command)
        word = command.decode().strip()
        replies, answer, ends = Replies(), b"", []
        while not ends:
            data = await received(conn)
            if not data:
                raise ProtocolError(Reason.UPSTREAM, conn.fault or "closed before it answered "
                                    f"{word}: does upsd run there? The server shim's log tells")
            answer, ends = answer + data, replies.feed(data)
        if answer.startswith(b"ERR"):
            raise ProtocolError(Reason.UPSTREAM, f"{word} was answered with "
                                f"'{printable(answer.strip())}': what does permit say there?")
        return answer

    async def _stranger(self, family, address, told):
        """More about the refused certificate than told says, over a second, silent connection."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            conn = await connected(self._loop, self, family, address)
            try:
                await ask_for_tls(conn)
                conn = await secured(conn, Engine(context, False), False)
                peer = conn.peer
            finally:
                conn.close()
        except (OSError, ValueError, ProtocolError):
            return "It could not be looked at again"
        names = name_words(peer.names, self._name)
        start = "It" if names in told else f"The certificate {names}; it"
        return f"{start} {days_text(peer.not_after)}; its pin is {peer.pin}"

    def _done(self, _result, error):
        self._loop.finished, self._worked = True, error is None
        if not error:
            return
        if isinstance(error, Late):
            words = f"no answer within {self._shim.conf.handshake_timeout} s"
        elif isinstance(error, ProtocolError):
            words = str(error) + ", which pin does not name" * (self._step == "pin")
        else:
            words = tls_error(error, self._name)
        self._say(self._step, f"FAILED with {self._target.text}: {words}")


# --- Process: pidfile, user, descriptors, service manager ----------------------------------------


def prepare_process() -> None:
    """Standard descriptors are open, no others but those that a service manager handed over."""
    open_standard()
    try:
        highest = max(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        highest = 255
    os.closerange(handed_over().stop, highest + 1)
    try:
        with open("/proc/self/comm", "w") as file:
            file.write("nutshim")
    except OSError:
        pass


def handed_over() -> range:
    """The descriptors of sockets that systemd has opened (sd_listen_fds(3))."""
    ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return range(3, 3 + (int(os.environ.get("LISTEN_FDS", "0")) if ours else 0))


def raise_descriptor_limit(max_sessions: int) -> int:
    """Make room for that many sessions, two descriptors each; how many fit."""
    wanted = 2 * max_sessions + SPARE_DESCRIPTORS
    if not 0 <= os.sysconf("SC_OPEN_MAX") < wanted:     # -1: no limit
        return max_sessions
    import resource                             # It costs 0.2 MB.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limits in ((wanted, max(wanted, hard)), (min(wanted, hard), hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            break
        except (OSError, ValueError):
            pass
    room = (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS) // 2
    return min(max_sessions, max(1, room))


def shell_word(path: str) -> str:
    """A path as a shell takes it, for commands that an administrator may copy."""
    plain = re.fullmatch(r"[\w@%+=:,./-]+", path)
    return path if plain else '"' + re.sub(r'(["$`\\])', r"\\\1", path) + '"'


def closed_steps(path: str, account: pwd.struct_passwd) -> list:
    """What closes a file to an account without other groups: [(folder or file, commands)].

    The permission bits of each folder on the way, behind links too, and of the file count. The
    commands, followed literally, open it for the account's group.
    """
    found: list = []
    here, todo, links = "/", os.path.abspath(path).split("/"), 0
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
            place = shell_word(here)
            cures = [f"chgrp {account.pw_gid} {place}"] * (who == "o") + [f"chmod g+{need} {place}"]
            found.append((here, [f"chmod u+{lacks} {place}"] if who == "u" else cures))
        if not todo:
            return found
        part = todo.pop(0)
        here = os.path.dirname(here) if part == ".." else os.path.join(here, part)


def unreadable_files(conf: Conf, account: pwd.struct_passwd) -> list:
    """A warning for each file that the account cannot read, as a reload has to; OSError.

    Whoever asks is root, or the account itself.
    """
    found = {path: closed_steps(path, account)
             for shim in conf.shims for path in [conf.path] + shim.files()}
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        os.setgroups([])                        # For good: nobody needs root's.
        os.setegid(account.pw_gid)
        os.seteuid(account.pw_uid)
    try:
        for path in list(found):                # Tried, not worked out from modes: ACLs count.
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
                del found[path]
            except OSError:
                pass
    finally:
        if uid == 0:
            os.seteuid(uid)
            os.setegid(gid)
    warnings = []
    for path, steps in found.items():
        cures = " and ".join(f"'{cure}'" for _, cures in steps for cure in cures)
        where = f" ({steps[0][0]} is closed to it)" if steps and steps[0][0] != path else ""
        warnings.append(f"{path}: {account.pw_name} cannot read it{where}, as a reload has to"
                        + (f"; {cures} let it" if cures else ""))
    return warnings


def find_account(conf: Conf, warn: Callable) -> Optional[pwd.struct_passwd]:
    """The user to become; None to stay who we are, be it root for lack of a user nut."""
    account = None
    if conf.user or os.geteuid() == 0:
        try:
            account = pwd.getpwnam(conf.user or "nut")
        except KeyError:
            warn(conf.at("user") + "going on as root, since there is no user nut")
    return account if account and account.pw_uid != os.geteuid() else None


def _is_only(uid, gid):
    """This process has that user and group alone, and cannot go back."""
    users, groups = {os.getuid(), os.geteuid()}, {os.getgid(), os.getegid()}
    if hasattr(os, "getresuid"):
        users, groups = set(os.getresuid()), set(os.getresgid())
    elif uid:
        try:
            os.seteuid(0)                       # macOS, NetBSD: a saved uid of root would allow it.
            return False
        except OSError:
            pass
    # Up to FreeBSD 14 getgroups() names the effective group as well.
    return users == {uid} and groups == {gid} and set(os.getgroups()) <= {gid}


class Process:
    """What the system knows of the daemon: its pidfile, its user, its service manager."""

    def __init__(self, log: Log):
        self._log = log
        self.pidfile: Optional[int] = None      # Its descriptor, once it is locked.
        self._notify: Optional[socket.socket] = None

    def lock_pidfile(self, conf: Conf, uid: int) -> None:
        """The lock, not the file, tells whether nutshim runs, so a stale file does no harm.

        ConfigError, also when nutshim runs already.
        """
        path = conf.pidfile
        try:
            fd = open_own(path, os.O_RDWR, 0o644, uid)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_size > 20:
                os.close(fd)
                raise ConfigError(f"{conf.at('pidfile')}{path}: this is no pidfile, so it is left "
                                  "alone")
            os.ftruncate(fd, 0)
            os.write(fd, b"%d\n" % os.getpid())
        except BlockingIOError:
            number = os.read(fd, 20).decode("ascii", "replace").strip()
            raise ConfigError(f"{conf.at('pidfile')}{path}: nutshim is running already, as process "
                              f"{number}") from None
        except OSError as error:
            raise conf.error("pidfile", path, error) from None
        self.pidfile = fd

    def remove_files(self, conf: Conf) -> None:
        if self.pidfile is not None:
            os.ftruncate(self.pidfile, 0)
            for path in (conf.pidfile, control_path(conf)):
                try:
                    os.unlink(path)
                except OSError:
                    pass                        # In /run only root may: an empty file stays.

    def drop_privileges(self, conf: Conf, account: Optional[pwd.struct_passwd]) -> None:
        """chroot, then the account's user and group, and no others; ConfigError."""
        at = conf.at("user")
        try:
            if account and self.pidfile is not None:
                os.lchown(control_path(conf), account.pw_uid, account.pw_gid)
            # Its log is the account's, but for /dev/null and what the shell has opened.
            if (account and self._log.fd > 2 and conf.log not in STANDARD_LOGS
                    and stat.S_ISREG(os.fstat(self._log.fd).st_mode)):
                os.fchown(self._log.fd, account.pw_uid, account.pw_gid)
            if conf.chroot:
                import difflib, ipaddress, resource     # noqa: E401, F401  A reload may need them.
                at = conf.at("chroot") + conf.chroot + ": "
                os.chroot(conf.chroot)
            os.chdir("/")
            if not account:
                return
            at = conf.at("user") + account.pw_name + ": "
            for text in unreadable_files(conf, account):
                self._log(WARNING, text)
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
        except OSError as error:
            raise ConfigError(at + error.strerror) from None
        if not _is_only(account.pw_uid, account.pw_gid):
            raise ConfigError(at + "the change of user did not work")

    def open_notify(self, loop: Loop) -> None:
        path = os.environ.get("NOTIFY_SOCKET")
        if path:
            self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._notify.setblocking(False)
            if self._notify.connect_ex("\0" + path[1:] if path[0] == "@" else path):
                self._log(WARNING, f"NOTIFY_SOCKET {path} does not answer")
            if os.environ.get("WATCHDOG_USEC", "").isdigit():
                self._watchdog(loop, int(os.environ["WATCHDOG_USEC"]) / 2e6)

    def _watchdog(self, loop, seconds):
        self.notify("WATCHDOG=1")
        Timer(loop, seconds, lambda: self._watchdog(loop, seconds))

    def notify(self, text: str) -> None:
        """Tell the service manager (sd_notify(3))."""
        if self._notify:
            try:
                self._notify.send(text.encode())
            except OSError:
                pass


# --- Daemon --------------------------------------------------------------------------------------


class Daemon:
    """The running program: its configuration and listeners, reload and stop."""

    def __init__(self, path: str, args: types.SimpleNamespace, log: Log):
        self.path, self.args, self.log = os.path.abspath(path), args, log
        self.listeners: dict = {}               # key of listen_keys() -> Listener
        self.shims: list = []
        self.began = time.monotonic()
        self.loaded = 0.0                       # When, in seconds since 1970.
        self.conf: Any = None
        self.loop: Any = None
        self.uid = os.geteuid()                 # Whose files are written: the user to become.
        self.account: Optional[pwd.struct_passwd] = None        # To become; None to stay.
        self.process = Process(log)

    def run(self, ready: Callable) -> int:
        """Open everything, become the user, say ready() and serve; ConfigError before that."""
        conf, credentials, warnings = check_config(self.path, self.args.user, self.args.chroot)
        self.conf = conf
        self.account = account = find_account(conf, lambda text: self.log(WARNING, text))
        if account:
            self.uid = account.pw_uid
        os.umask(0o027)
        self.log.use(*self._open_log(conf))
        process = self.process
        try:
            process.lock_pidfile(conf, self.uid)
        except ConfigError as fault:
            if not self.args.foreground or "running already" in str(fault):
                raise
            self.log(WARNING, f"{fault}; -c will not work")
        try:
            self.loop = Loop(self.log, conf.handshake_threads, self._signalled)
        except RuntimeError as error:
            raise ConfigError(f"{conf.at('handshake_threads')}{error}: raise the limit of "
                              "processes or memory (ulimit, TasksMax)") from None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.loop.signalled)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        self._apply(conf, credentials, warnings,
                    [socket.socket(fileno=fd) for fd in handed_over()])
        try:
            if process.pidfile is not None:
                Control(self)                   # The selector keeps it.
            process.open_notify(self.loop)
            process.drop_privileges(conf, account)
        except ConfigError:
            process.remove_files(conf)
            raise
        self.log(NOTICE, f"nutshim {VERSION} started, {ssl.OPENSSL_VERSION}")
        if self.log.debug:
            self.log(DEBUG, f"runs from {'source: ' + FROM_SOURCE if FROM_SOURCE else 'bytecode'}")
        process.notify("READY=1")
        ready()
        self._each_day()
        self.loop.run()
        return 0

    def _open_log(self, conf):
        """What log.use() takes."""
        target = "stderr" if self.args.debug else conf.log
        if not self.args.foreground and (target == "stderr" or target in STANDARD_LOGS):
            raise ConfigError(f"{conf.at('log')}{target} needs -F or -D")
        if (target == "syslog" and self.args.foreground and "log" not in conf.lines
                and not any(map(os.path.exists, SYSLOG_PATHS))):
            self.log(NOTICE, "no syslog here, so the log goes to stderr")
            target = "stderr"
        try:
            return target, open_log(target, self.uid)
        except OSError as error:
            raise conf.error("log", conf.log, error) from None

    def _apply(self, conf, credentials, warnings, socks):
        """Make a configuration the running one: all of it or, on ConfigError, none."""
        wanted, opened = {}, {}
        shims = [Shim(self.loop, each, credentials[each.name]) for each in conf.shims]
        try:
            for shim in shims:
                at = shim.conf.at("listen")
                for key in listen_keys(shim.conf):
                    if key not in self.listeners:
                        other = clash(key, self.listeners)
                        if other:
                            raise ConfigError(f"{at}{address_text(key[1])}: nutshim itself listens "
                                              f"on {address_text(other[1])}, until a restart")
                        sock = open_listener(key, at, socks)
                        if not sock:
                            continue
                        opened[key] = sock
                    wanted[key] = shim
                if shim not in wanted.values():
                    raise ConfigError(at + "none of these addresses exists here")
                warnings += absent_addresses(shim.conf)
        except ConfigError:
            for sock in opened.values():
                sock.close()
            raise
        for key in self.listeners.keys() - wanted:
            self.listeners.pop(key).close()
        for key, shim in wanted.items():
            if key in opened:
                self.listeners[key] = Listener(self.loop, opened[key], shim)
                where = address_text(opened[key].getsockname())
                upstream = ", ".join(target.text for target in shim.targets)
                self.log(INFO, f"[{shim.name}] listening on {where} ({shim.conf.role}, "
                               f"upstream {upstream})")
            self.listeners[key].shim = shim
        for shim in self.shims:
            shim.retire(shims)
        self.shims, self.conf, self.loaded = shims, conf, time.time()
        self.loop.max_sessions = raise_descriptor_limit(conf.max_sessions)
        if self.loop.max_sessions < conf.max_sessions:
            warnings.append(f"{conf.at('max_sessions')}the limit of open files allows only "
                            f"{self.loop.max_sessions} sessions; raise it (ulimit -n, LimitNOFILE)")
        for text in warnings:
            self.log(WARNING, text)

    # Requests: signals and the status socket.

    def request(self, word: str) -> str:
        """A word from the status socket; its answer."""
        if word == "status":
            return f"OK\n{status_data(self)}"          # A Python literal: json would cost memory.
        if word == "reload":
            return self.reload()
        if word == "stop":
            Timer(self.loop, 0, self.stop)
            return "OK\nstopping"
        return "ERR\nexpected status, reload or stop"

    def _signalled(self, number):
        if number == signal.SIGHUP:
            self.reload()
        else:
            self.stop()

    def reload(self) -> str:
        """Read the configuration again; on a fault nothing changes. The answer for -c reload."""
        if self.loop.stopping:
            return "ERR\nnutshim is stopping"
        gc.collect()                            # Earlier shims, which refer to themselves.
        self.process.notify(f"RELOADING=1\nMONOTONIC_USEC={int(time.monotonic() * 1e6)}")
        old, log = self.conf, None
        try:
            conf, credentials, warnings = check_config(self.path, self.args.user, self.args.chroot)
            fixed = [option for option in ("user", "chroot", "pidfile", "handshake_threads")
                     if getattr(conf, option) != getattr(old, option)
                     and (option in conf.lines or option in old.lines)]
            conf.user, conf.chroot, conf.pidfile = old.user, old.chroot, old.pidfile
            try:
                log = self._open_log(conf)
            except ConfigError as fault:
                if conf.log != old.log:
                    raise
                warnings.append(f"{fault}; the log goes on in the file that is open")
            self._apply(conf, credentials, warnings, [])
        except (ConfigError, OSError) as error:
            if log and log[1] > 2:
                os.close(log[1])
            text = "\n".join([str(error)] + self._closed())
            if old.chroot:
                text += f"\n(looked for inside the chroot {old.chroot})"
            self.log(ERROR, "reload failed, going on as before:\n" + text)
            self.process.notify("READY=1")
            return "ERR\n" + text
        if log:
            self.log.use(*log)
        if fixed:
            self.log(WARNING, ", ".join(fixed) + ": takes effect at the next start")
        self.log(NOTICE, f"reloaded {self.path}")
        for session in list(self.loop.sessions):
            self.loop.guarded(session, session.judge_again)
        self._tell_expiries()
        self.process.notify("READY=1")
        return "OK\nreloaded"

    def _closed(self):
        """After a reload that failed: what the user cannot read, with the cure."""
        try:
            conf = read_config(self.path)[0]
            return unreadable_files(conf, self.account) if self.account else []
        except (ConfigError, OSError):
            return []

    def _each_day(self):
        self._tell_expiries()
        Timer(self.loop, 86400, self._each_day)

    def _tell_expiries(self):
        for shim in self.shims:
            for each in shim.credentials.loaded:
                words = days_text(each.not_after, each.not_before)
                self.log(date_level(each), f"[{shim.name}] {each.what} {words}")

    def stop(self) -> None:
        """No new sessions, the replies under way, the end."""
        loop = self.loop
        if loop.stopping:
            return
        loop.stopping = True
        self.log(NOTICE, f"stopping with {len(loop.sessions)} sessions")
        self.process.notify("STOPPING=1")
        for listener in self.listeners.values():
            listener.close()
        for session in list(loop.sessions):
            loop.guarded(session, session.stop)
        self._end(loop.now)

    def _end(self, began):
        loop = self.loop
        late = loop.now >= began + STOP_GRACE
        for session in list(loop.sessions):
            # Their last words have gone to the kernel, and there was time for an answer to them.
            told = session.state == ENDING and not session.client.out and loop.now > began + 0.2
            if told or late:
                session.close(Reason.STOP)
        if loop.sessions and not late:
            Timer(loop, 0.1, lambda: self._end(began))
            return
        for shim in self.shims:
            shim.shared.retire()
        loop.finished = True
        self.process.remove_files(self.conf)
        self.log(NOTICE, "stopped")


# --- Main ----------------------------------------------------------------------------------------


def background(run: Callable) -> int:
    """Double fork. The parent waits until the daemon is ready, so a failed start is told."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return 0 if os.read(reader, 1) else 1
    os.setsid()
    if os.fork():
        os._exit(0)

    null = os.open(os.devnull, os.O_RDWR)       # Before a chroot hides it.

    def ready():
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.write(writer, b"1")
        os.close(writer)
    return run(ready)


def print_check(conf: Conf, credentials: dict, warnings: list) -> None:
    """-t, when no fault was found."""
    for text in itertools.chain(warnings, *map(absent_addresses, conf.shims)):
        print(f"warning: {text}")
    for shim in conf.shims:
        own, loaded = credentials[shim.name].own, credentials[shim.name].loaded
        listen, upstream = (", ".join(map(address_text, addresses))
                            for addresses in (shim.listen, shim.upstream))
        print(f"[{shim.name}] {shim.role} on {listen}, upstream {upstream}")
        for each in loaded:
            mark = "    " if date_level(each) == INFO else "warning: "
            print(f"{mark}{each.what} {days_text(each.not_after, each.not_before)}")
        if own:
            print(f"    its names: {names_text(own.names)}\n    pin = {own.pin}")
    print(f"{conf.path}: no fault found")


USAGE = """usage: nutshim.py [-D]... [-F] [-f FILE] [-u USER] [-r DIR]
       nutshim.py -t | -p NAME | -c reload|stop|status [--json|--prometheus] [-f FILE]
       nutshim.py -V | -h
"""
HELP = """
TLS 1.3 for NUT: in front of upsd (role server) and of upsmon, upsc, ... (role client).

  -f FILE       configuration file
  -D            debug: foreground, log to stderr, with each step of an opening;
                -DD: protocol words too
  -F            foreground, log where the option log says
  -u USER       user to run as once the ports are open
  -r DIR        confine to DIR
  -t            check the configuration, report every fault
  -c COMMAND    speak to the running daemon: reload, stop or status
  --json, --prometheus    with -c status: for programs
  -p NAME       probe client shim NAME's upstream
  -V            version
  -h            this text

options in nutshim.conf:
"""
_FLAGS = {"D": "debug", "F": "foreground", "t": "test", "V": "version", "h": "help"}
_VALUES = {"f": "file", "u": "user", "r": "chroot", "c": "command", "p": "probe"}


def read_arguments(argv: list) -> types.SimpleNamespace:
    """The command line, as getopt(3) would; argparse takes 0.5 MB for good. ValueError."""
    args = types.SimpleNamespace(form=None, **dict.fromkeys(_FLAGS.values(), 0),
                                 **dict.fromkeys(_VALUES.values()))
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("--json", "--prometheus"):
            args.form = word[2:]
            continue
        letters = "h" if word == "--help" else word[1:]
        if not re.match("-[A-Za-z]|--help$", word):
            raise ValueError(f"'{word}' is no option")
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in _FLAGS:
                setattr(args, _FLAGS[letter], getattr(args, _FLAGS[letter]) + 1)
            elif letter not in _VALUES:
                raise ValueError(f"-{letter} is no option")
            elif not letters and not words:
                raise ValueError(f"-{letter} needs a value")
            else:
                setattr(args, _VALUES[letter], letters or words.pop(0))
                letters = ""
    if args.command not in (None, "reload", "stop", "status"):
        raise ValueError(f"-c: expected reload, stop or status, not '{args.command}'")
    if args.form and args.command != "status":
        raise ValueError(f"--{args.form} goes with -c status")
    args.foreground = args.foreground or args.debug
    return args


def check(path: str, args: types.SimpleNamespace) -> int:
    """-t and -p."""
    conf, credentials, warnings = check_config(path, args.user, args.chroot)
    if args.test:
        if not os.path.isdir(os.path.dirname(conf.log) or "/"):
            raise ConfigError(f"{conf.at('log')}{conf.log}: there is no such folder")
        account = os.geteuid() == 0 and find_account(conf, warnings.append)
        if account and not conf.chroot:         # Where the paths lead elsewhere.
            try:
                warnings += unreadable_files(conf, account)
            except OSError as error:
                raise conf.error("user", account.pw_name, error) from None
        print_check(conf, credentials, warnings)
        return 0
    clients = {shim.name: shim for shim in conf.shims if shim.role == CLIENT}
    if args.probe in clients:
        return probe(clients[args.probe], credentials[args.probe])
    raise ConfigError(f"{path}: expected a client shim's name ("
                      f"{', '.join(clients) or 'there is none'}), not '{args.probe}'")


def main(argv: Optional[list] = None) -> int:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")   # A terminal may lack a name's characters.
    try:
        args = read_arguments(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"{USAGE}nutshim.py: {error}", file=sys.stderr)
        return 2
    if args.help or args.version:
        version = f"nutshim {VERSION}, Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}"
        options = "\n".join(f"  {each.name:25} {each.help}" for each in OPTIONS)
        print(USAGE + HELP + options if args.help else version)
        return 0
    try:
        path = args.file or find_config()
        if args.command:
            return control(args.command, read_config(path)[0], args.form)
        if args.test or args.probe:
            return check(path, args)
        prepare_process()
        daemon = Daemon(path, args, Log(args.debug))
        return daemon.run(lambda: None) if args.foreground else background(daemon.run)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Control-C at a probe: no traceback.
    sys.exit(main())
