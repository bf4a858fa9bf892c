#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""mkNUTcert.py - certificates for NUT over TLS, made with the openssl command.

Without a command it makes one pair of files and keeps nothing else:

      a CA made for this pair alone; its key is never written
        |  signs
      HOST.cert.pem          for the upsd box: key, certificate, CA       secret
      HOST-client.cert.pem   for the clients, their `trust`: the CA       public

`mkNUTcert.py ca` makes a CA that stays; server, client, revoke and renew use it:

      /etc/nut/nutshim/ca.pem             `trust` on every box            public
                       crl.pem            `crl` on the upsd box           public
                       issued/            a copy of every certificate     public
                       private/           the CA's key and its records    its owner's alone
                       HOST.server.pem    key, certificate, CA            secret
                       HOST.client.pem    the same, for mutual TLS        secret

Secret files are root's and NUT's group may read them (0640 root:nut); 0600 where there is no
NUT user. `show` and `check` read any PEM file and change nothing.

From the top: limits - signals - names - files - what is in them - the openssl command - the CA -
what is made - show - check - the command line. It needs no more than OpenWrt's python3-light and
openssl-util, Python 3.7, OpenSSL 1.1.1. LibreSSL lacks options that revoke, renew and check want.
What reads certificates wants nutshim.py beside this file, and with it python3-openssl.
"""

import argparse
import base64
import contextlib
import datetime
import errno
import fcntl
import functools
import grp
import hashlib
import importlib.util
import io
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

VERSION = "1.1"
CONF_FOLDERS = ("/etc/nut", "/etc/ups", "/usr/local/etc/nut")  # after $NUT_CONFPATH
NUT_USERS = ("nut", "upsd", "ups", "nutmon")  # the first that exists may read the keys
THERE = "/etc/nut"          # where files are taken to go on the other box

NO_END = datetime.datetime(9999, 12, 31, 23, 59, 59)  # RFC 5280 4.1.2.5: "has no end"
WARN_DAYS = 30              # so long before its end a certificate is warned about, as in nutshim.py
MAX_NAMES = 100             # TLS libraries refuse a handshake with more than some 100 KB
MAX_DN = 64                 # RFC 5280 A.1: ub-common-name, ub-organization-name
MAX_STEM = 100              # a host name may have 253 characters, a file name only 255
RSA_BITS = (2048, 8192)     # fewer are unsafe; more take a router hours
ROOM = 256 << 10            # what openssl's files take, and as much again
LAST_UTCTIME = datetime.datetime(2049, 12, 31, 23, 59, 59)  # RFC 5280 4.1.2.5.1


class Fault(Exception):
    """Something that the user can set right; shown without a traceback, exit 1."""


# --- signals: a run that is told to stop tidies up first ---

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Whatever is done with the handlers of STOPS inside is undone."""
    kept = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stops_late() -> Iterator[None]:
    """A signal to stop that comes inside takes effect at the end."""
    came: List[int] = []
    with handlers_kept():
        for number in STOPS:
            if callable(signal.getsignal(number)):
                signal.signal(number, lambda number, _: came.append(number))
        yield
    if came:
        raise KeyboardInterrupt


# --- names: whatever gets into a certificate, and so into an openssl configuration ---

LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
DN_TEXT = re.compile(r"[\w .,'&()+:@!/-]*")


class Name(NamedTuple):
    """A host. kind: DNS or IP; text: in lower case, an address in its one form."""
    kind: str
    text: str


def host_name(text: str) -> Name:
    """One host name or address, from the command line; anything else goes no further."""
    why = ""
    if not text or len(text) > 253:
        why = "a name has 1 to 253 characters"
    elif any(ord(c) > 126 for c in text):
        why = "give an international name in its ASCII form (xn--...)"
    elif "*" in text:
        why = "no certificate is made for a wildcard: name each host"
    elif re.match("(DNS|IP):", text, re.I):
        why = "give the bare name or address, without DNS: or IP:"
    elif ":" in text or text.rsplit(".", 1)[-1].isdigit():  # what ends in a number is meant as IPv4
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        try:
            return Name("IP", socket.inet_ntop(family, socket.inet_pton(family, text)))
        except (OSError, ValueError):
            why = "no valid IPv4 or IPv6 address (neither brackets nor %zone)"
    elif not all(map(LABEL.fullmatch, text.split("."))):
        why = "no host name (letters, digits, '-' and '_'; parts of 1 to 63, with '.' between)"
    if why:
        raise argparse.ArgumentTypeError("%s: %s" % (ascii(text[:80]), why))
    return Name("DNS", text.lower())


def host_list(text: str) -> List[Name]:
    return [host_name(word) for word in text.split(" ") if word] or [host_name("")]


def upstream(text: str) -> str:
    """HOST[:PORT] as nutshim.conf has it; an IPv6 address stands in brackets."""
    match = re.fullmatch(r"(?:\[(?P<six>.*)\]|(?P<host>[^:\[]*))(?::(?P<port>[0-9]{1,5}))?", text)
    name = host_name(match and (match.group("six") or match.group("host")) or text)
    port = match and match.group("port") or ""
    if port and not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError("%s: a port is 1 to 65535" % ascii(text))
    return bracketed(name) + (":" + port if port else "")


def bracketed(name: Name) -> str:
    return "[%s]" % name.text if ":" in name.text else name.text


def dn_text(text: str) -> str:
    """For -O and -OU; nothing leaves it out."""
    if not (DN_TEXT.fullmatch(text) and text.isprintable() and len(text) <= MAX_DN):
        raise argparse.ArgumentTypeError("%s: expected up to %d letters, digits, blanks and "
                                         ".,'&()+:@!/-" % (ascii(text[:80]), MAX_DN))
    return text.strip()


def country(text: str) -> str:
    if not re.fullmatch("([A-Za-z]{2})?", text):
        raise argparse.ArgumentTypeError("%s: expected a country's two letters" % ascii(text[:80]))
    return text.upper()


def own_names() -> List[Name]:
    """This host's name, its full name if it has one, and loopback."""
    names = []
    with contextlib.suppress(OSError, LookupError, ValueError, argparse.ArgumentTypeError):
        host = socket.gethostname()
        names.append(host_name(host))
        # As bytes: python3-light has no idna codec that would turn a str into them.
        full = socket.getaddrinfo(host.encode("ascii"), None, 0, 0, 0, socket.AI_CANONNAME)[0][3]
        if full.lower().startswith(host.lower() + "."):
            names.append(host_name(full))
    return names + [Name("DNS", "localhost"), Name("IP", "127.0.0.1"), Name("IP", "::1")]


def is_loopback(name: Name) -> bool:
    return name.text.split(".")[0] == "localhost" or name == Name("IP", "::1") \
        or name.kind == "IP" and name.text.startswith("127.")


def reachable_names(how: str) -> List[Name]:
    """own_names(), where clients could use them; `how` tells the way to name others."""
    names = own_names()
    if is_loopback(names[0]):
        raise Fault("this host's name is %s, by which no client reaches it; give its names: %s"
                    % (ascii(socket.gethostname()), how))
    return names


def unique(names: List[Name]) -> List[Name]:
    names = list(dict.fromkeys(names))
    if len(names) > MAX_NAMES:
        raise Fault("%d names are too many: one certificate has room for %d"
                    % (len(names), MAX_NAMES))
    return names


# --- files: whole or not at all ---

class Output(NamedTuple):
    path: str
    data: bytes
    mode: int = 0o644
    uid: int = -1
    gid: int = -1
    fresh: bool = False     # it never takes the place of another file


NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

LEFT = re.compile(r"\.mkNUTcert-[0-9a-f]{16}\.tmp")
LEFT_BY_1_0 = re.compile(r"\.[0-9a-f]{16}\.tmp")


def roomy(beside: str) -> str:
    """Where temporary files go, which on a router is memory; `beside` if there is no room."""
    with contextlib.suppress(OSError):
        place = tempfile.gettempdir()
        room = os.statvfs(place)
        if room.f_bavail * room.f_frsize >= ROOM:
            return place
    return beside


@contextlib.contextmanager
def scratch(place: str) -> Iterator[str]:
    """A private folder inside `place`, which must exist, for as long as this lasts.

    It stays locked: one of that name without a lock is what a killed run has left, and goes.
    """
    with contextlib.ExitStack() as undo:
        with blame(place):
            sweep(place, LEFT)
            fd = -1
            while fd < 0:
                path = "%s/.mkNUTcert-%s.tmp" % (place, os.urandom(8).hex())
                os.mkdir(path, 0o700)
                undo.callback(shutil.rmtree, path, ignore_errors=True)
                # Until it is locked, another run may take it for a leftover.
                with contextlib.suppress(FileNotFoundError):
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    undo.callback(os.close, fd)
                    with contextlib.suppress(OSError):  # no locks there; then nothing is swept
                        fcntl.flock(fd, fcntl.LOCK_EX)
                    if not os.path.exists(path):
                        fd = -1
        yield path


def sweep(place: str, pattern: "re.Pattern[str]") -> None:
    """Remove what killed runs have left in a folder."""
    for name in filter(pattern.fullmatch, os.listdir(place)):
        path = os.path.join(place, name)
        with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
            if os.lstat(path).st_uid != os.geteuid():
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            undo.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its run lives
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def write_files(outputs: List[Output]) -> None:
    """Write all files whole, or none. Each is first written beside its place and for nobody
    else's eyes, so that a lack of room or rights shows while nothing has changed; then they
    take their places in the order given."""
    with contextlib.ExitStack() as rooms:
        room = {folder: rooms.enter_context(scratch(folder))
                for folder in dict.fromkeys(os.path.dirname(output.path) for output in outputs)}
        staged = []
        for output in outputs:
            folder, name = os.path.split(output.path)
            staged.append(os.path.join(room[folder], name))     # A name it cannot have shows, too.
            with blame(output.path):
                stage(staged[-1], output)
                if output.fresh and os.path.lexists(output.path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        # One run at a time, or the files of two would be mixed; a folder can have two names.
        for folder in sorted(set(map(os.path.realpath, room))):
            fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            rooms.callback(os.close, fd)
            with contextlib.suppress(OSError):  # no locks there
                fcntl.flock(fd, fcntl.LOCK_EX)
        # Now it is quicker to finish than to stop, and half of it would be worth less than either.
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        done: List[Output] = []
        try:
            for path, output in zip(staged, outputs):
                with blame(output.path, [each.path for each in done if not each.fresh]):
                    move(path, output)
                    done.append(output)
                    sync_names(os.path.dirname(output.path))
        except Fault:
            for output in done:
                if output.fresh:
                    with contextlib.suppress(OSError):
                        os.unlink(output.path)
            raise


def stage(path: str, output: Output) -> None:
    fd = os.open(path, NEW_FILE, 0o600)
    with open(fd, "wb") as file:
        file.write(output.data)
        file.flush()
        mode = output.mode
        try:
            os.fchown(fd, output.uid, output.gid)
        except PermissionError:  # a file system without owners, or a group that is not ours to give
            mode &= 0o777 if mode & 0o004 else 0o700
        with contextlib.suppress(PermissionError):  # a file system without modes
            os.fchmod(fd, mode)
        os.fsync(fd)


def move(path: str, output: Output) -> None:
    """Move a file to its place; one that is fresh fails where another came into being meanwhile."""
    if output.fresh:
        try:
            os.link(path, output.path)
            return
        except FileExistsError:
            raise
        except OSError:  # No hard links there, as on a USB stick: an empty file holds the place.
            os.close(os.open(output.path, NEW_FILE, 0o600))
    try:
        os.replace(path, output.path)
    except OSError:
        if output.fresh:
            os.unlink(output.path)
        raise


def sync_names(folder: str) -> None:
    """Have a folder's names on the disk before the next file takes its place."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no such thing
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def blame(path: str, done: Optional[List[str]] = None) -> Iterator[None]:
    """An OSError inside becomes a Fault that names `path` and, where there is one, the way out.
    done: files that were written before, and stay."""
    try:
        yield
    except OSError as error:
        other = "choose another folder"
        root = ("run this as root, or " if os.geteuid() else "") + other
        hints = {errno.EACCES: root, errno.EPERM: root, errno.EROFS: other,
                 errno.EEXIST: "it came into being meanwhile and is left as it is"}
        if not done:
            hints[errno.ENOSPC] = hints[errno.EDQUOT] = "make room: nothing was changed"
        hint = hints.get(error.errno or 0)
        raise Fault("%s: %s%s%s" % (
            path, error.strerror, "; " + hint if hint else "",
            "; written before it: " + ", ".join(done) if done else "")) from None


def may_write(paths: List[str], yes: bool) -> bool:
    """Ask before files are replaced; whether write_files() may replace any."""
    for path in paths:
        # Nor is a link followed or replaced: /dev/stdout is one.
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise Fault("%s: is no plain file; name one" % path)
        if not os.path.isdir(os.path.dirname(path)):
            raise Fault("%s: there is no such folder" % os.path.dirname(path))
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise Fault("%s: cannot be two files at once" % paths[0])
    old = ", ".join(path for path in paths if os.path.lexists(path))
    if old and not yes:
        if not (sys.stdin and sys.stdin.isatty()):
            raise Fault("%s: exists and is left as it is; -y replaces it" % old)
        try:
            answer = input("%s: exists. Replace? [y/N] " % old)
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            raise Fault("nothing was changed")
    return bool(old)


def key_rights(owner: Optional[str]) -> Tuple[int, int, int]:
    """Mode, uid and gid of a file with a key.

    owner: USER[:GROUP], else NUT's user if there is one.
    """
    if owner and os.geteuid() != 0:
        raise Fault("--owner %s: only root can give a file away; run this as root, or leave it out"
                    % owner)
    if not owner:
        owner = next((user for user in NUT_USERS if find(pwd.getpwnam, user)), None)
        if not owner or os.geteuid() != 0:
            return 0o600, -1, -1
    user, _, group = owner.partition(":")
    account = find(pwd.getpwnam, user)
    if not account or group and not find(grp.getgrnam, group):
        raise Fault("--owner %s: there is no such %s"
                    % (ascii(owner), "group" if account else "user"))
    return 0o640, 0, grp.getgrnam(group).gr_gid if group else account.pw_gid


def find(function: Callable[[Any], Any], key: Any) -> Any:
    """A look-up in the user or group database; None if it is not there."""
    try:
        return function(key)
    except KeyError:
        return None


def rights(path: str) -> str:
    """As in 0640 root:nut."""
    info = os.stat(path)
    user, group = find(pwd.getpwuid, info.st_uid), find(grp.getgrgid, info.st_gid)
    return "%04o %s:%s" % (stat.S_IMODE(info.st_mode), user.pw_name if user else info.st_uid,
                           group.gr_name if group else info.st_gid)


def conf_folder() -> str:
    folders = [folder for folder in (os.environ.get("NUT_CONFPATH"),) + CONF_FOLDERS if folder]
    for folder in filter(os.path.isdir, folders):
        return os.path.abspath(folder)
    raise Fault("no NUT configuration folder found (%s): name a folder with -d"
                % ", ".join(folders))


# --- what is in them: DER, read by nutshim.py, never openssl's words about it ---

OIDS = {  # those of a public key's algorithm or curve
    "1.2.840.113549.1.1.1": "RSA", "1.2.840.113549.1.1.10": "RSA-PSS",
    "1.2.840.10045.3.1.7": "EC P-256", "1.3.132.0.34": "EC P-384", "1.3.132.0.35": "EC P-521",
    "1.3.101.112": "Ed25519", "1.3.101.113": "Ed448"}
EXTENDED_KEY_USAGE = b"\x55\x1d\x25"
USES = {"2.5.29.37.0": "any use", "1.3.6.1.5.5.7.3.1": "TLS Web Server Authentication",
        "1.3.6.1.5.5.7.3.2": "TLS Web Client Authentication", "1.3.6.1.5.5.7.3.3": "Code Signing",
        "1.3.6.1.5.5.7.3.4": "E-mail Protection", "1.3.6.1.5.5.7.3.9": "OCSP Signing"}


@functools.lru_cache(maxsize=None)
def reader() -> Any:
    """nutshim.py, as a module: there is one reader of certificates, the one that serves."""
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), "nutshim.py")
    if not os.path.isfile(path):
        raise Fault("%s: is missing; certificates are read with it: put nutshim.py beside "
                    "mkNUTcert.py" % path)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ in /usr/sbin
    try:
        # By its path, since an isolated Python does not look beside the script.
        spec = importlib.util.spec_from_file_location("nutshim", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise Fault("nutshim.py cannot be used: %s (on OpenWrt install python3-openssl)"
                    % error) from None
    finally:
        sys.dont_write_bytecode = before


class Pem(NamedTuple):
    """What nutshim.py finds in a file; each block as PEM."""
    path: str
    keys: List[bytes]
    certs: List[bytes]
    crls: List[bytes]


def read_pem(path: str) -> Pem:
    pem = Pem(path, [], [], [])
    try:
        with blame(path):
            blocks = reader().pem_blocks(reader().read_file(path))
    except ValueError as error:
        raise Fault("%s: no whole PEM file: %s" % (path, error)) from None
    for block in blocks:
        if block.encrypted:
            raise Fault("%s: the key has a passphrase, which nobody types when a box starts; "
                        "take it off: openssl pkey -in %s -out NEWFILE"
                        % (path, shlex.quote(path)))
        place = {"CERTIFICATE": pem.certs, "X509 CRL": pem.crls}.get(
            block.kind, pem.keys if block.kind.endswith("PRIVATE KEY") else [])
        lines = b"\n".join(re.findall(b".{1,64}", base64.b64encode(block.der)))
        title = block.kind.encode()
        place.append(b"-----BEGIN %s-----\n%s\n-----END %s-----\n" % (title, lines, title))
    if not any(pem[1:]):
        raise Fault("%s: no whole PEM file; expected -----BEGIN CERTIFICATE----- (or a key, or an "
                    "X509 CRL) and its END line; bring the whole file again" % path)
    return pem


class Certificate(NamedTuple):
    """One, in words; whatever it says of itself is harmless text."""
    pem: bytes
    serial: int
    subject: str
    issuer: str
    start: datetime.datetime
    end: datetime.datetime
    names: List[str]    # DNS:host, IP:address, ...
    uses: str           # extendedKeyUsage in words
    is_ca: bool
    key: str            # EC P-256, RSA 2048, ...
    pin: str
    fields: List[Tuple[str, str]]   # the subject's: CN and so on, and its text


def describe(cert: bytes) -> Certificate:
    try:
        found = reader().read_certificate(der(cert))
        uses = []
        if EXTENDED_KEY_USAGE in found.extensions:
            (_, content, _), = reader().der_items(found.extensions[EXTENDED_KEY_USAGE])
            for _, oid, _ in reader().der_items(content):
                uses.append(USES.get(reader().oid_text(oid), reader().oid_text(oid)))
    except (ValueError, IndexError) as error:
        raise Fault("no certificate that nutshim.py takes: %s; make it again" % error) from None
    return Certificate(cert, found.serial, found.subject or "no subject", found.issuer or "nobody",
                       moment(found.not_before), moment(found.not_after),
                       [name for name in found.names if not name.startswith("CN=")],
                       ", ".join(uses), found.is_ca, key_name(found.spki), found.pin, found.fields)


def describe_all(pem: Pem) -> List[Certificate]:
    found = []
    for number, cert in enumerate(pem.certs, 1):
        try:
            found.append(describe(cert))
        except Fault as fault:
            raise Fault("%s: certificate %d: %s" % (pem.path, number, fault)) from None
    return found


def read_list(crl: bytes) -> Any:
    """A CRL's issuer, dates and serials."""
    try:
        return reader().read_crl(der(crl))
    except ValueError as error:
        raise Fault("%s; get a new one from its CA" % error) from None


def key_name(public: bytes) -> str:
    """What kind of key it is, from its SubjectPublicKeyInfo (RFC 3279 2.3, RFC 5480)."""
    items = reader().der_items
    (_, algorithm, _), (_, bits, _) = items(items(public)[0][1])
    oids = [reader().oid_text(content) for tag, content, _ in items(algorithm) if tag == 0x06]
    name = next((OIDS[oid] for oid in reversed(oids) if oid in OIDS), "another kind")
    if name.startswith("RSA"):
        with contextlib.suppress(ValueError, IndexError):
            modulus = items(items(bits[1:])[0][1])[0][1]
            return "%s %d" % (name, int.from_bytes(modulus, "big").bit_length())
    return name


def der(pem: Union[bytes, str]) -> bytes:
    """The bytes of a PEM block that this program or openssl has made."""
    text = pem.decode() if isinstance(pem, bytes) else pem
    return base64.b64decode("".join(text.split("-----")[2].split()))


def pin_of(public: bytes) -> str:
    """SHA-256 of a public key's DER, as curl writes it."""
    return "sha256//" + base64.b64encode(hashlib.sha256(public).digest()).decode()


def now() -> datetime.datetime:
    return moment(int(time.time()))


def moment(seconds: int) -> datetime.datetime:
    # Not fromtimestamp(), which ends in 2038 where time_t has 32 bits. Naive, and UTC everywhere.
    return datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)


# --- the openssl command ---

NOISE = ("Using configuration from", "Check that the request matches", "Signature ok",
         "The Subject's")
RSA = bytes.fromhex("06092a864886f70d010101")  # a public key's algorithm in DER
GENPKEY = {"ec": "EC -pkeyopt ec_paramgen_curve:P-256 -pkeyopt ec_param_enc:named_curve",
           "ed25519": "ED25519", "rsa": "RSA -pkeyopt rsa_keygen_bits:%s"}
CA_USE = "basicConstraints = critical,CA:TRUE,pathlen:0\nkeyUsage = critical,keyCertSign,cRLSign"
LEAF_USE = ("basicConstraints = critical,CA:FALSE\nsubjectAltName = @names\n"
            "extendedKeyUsage = %sAuth\nkeyUsage = critical,digitalSignature")
RSA_USE = ",keyEncipherment"  # without which NSS takes no RSA server
CONFIG = """\
[req]
prompt = no
utf8 = yes
string_mask = utf8only
distinguished_name = subject
[subject]
{subject}
[ca]
default_ca = here
[here]
database = index.txt
serial = serial
crlnumber = crlnumber
new_certs_dir = .
unique_subject = no
default_md = default
policy = any
x509_extensions = extensions
crl_extensions = crl
[any]
C = optional
O = optional
OU = optional
CN = optional
[crl]
authorityKeyIdentifier = keyid:always
[extensions]
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
{extensions}
[names]
{names}
"""


class OpenSSL:
    """The one way to the openssl command.

    Its private folder holds a configuration of its own and certificates, never a private key:
    that reaches openssl through standard input, and no argument holds one either. What openssl
    has written is never taken as it is: its exit status says nothing of a file that it cut.
    """

    def __init__(self) -> None:
        self.place = ""  # where the folder is made at its first use; else where temporary files go
        self._folder = ""
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "OpenSSL":
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def folder(self) -> str:
        if not self._folder:
            self._folder = self._undo.enter_context(scratch(self.place or tempfile.gettempdir()))
            self.configure()
        return self._folder

    def file(self, name: str, data: bytes) -> str:
        """Put a file into the folder, where openssl finds it by its bare name."""
        path = os.path.join(self.folder, name)
        with blame(path), open(path, "wb") as file:
            file.write(data)
        return name

    def configure(self, subject: str = "", extensions: str = "", names: str = "") -> None:
        text = CONFIG.format(subject=subject, extensions=extensions, names=names)
        self.file("openssl.cnf", text.encode())

    def run(self, *args: str, stdin: bytes = b"", slow: bool = False) -> Tuple[int, str, str]:
        """Exit code, standard output, error text. `slow` shows a dot a second."""
        data: Optional[bytes] = stdin
        process: Optional["subprocess.Popen[bytes]"] = None
        try:
            with stops_late():
                process = subprocess.Popen(("openssl",) + args, stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                           cwd=self.folder,
                                           env=dict(os.environ, OPENSSL_CONF="openssl.cnf"))
            while True:
                try:
                    out, err = process.communicate(data, timeout=1 if slow else None)
                    return (process.returncode, out.decode("utf-8", "replace"),
                            err.decode("utf-8", "replace"))
                except subprocess.TimeoutExpired:
                    data = None  # it is on its way already
                    print(".", end="", file=sys.stderr, flush=True)
        except FileNotFoundError:
            raise Fault("the openssl command is missing: install the package openssl (on OpenWrt "
                        "openssl-util)") from None
        except BaseException:
            if process:
                process.kill()
                process.wait()
            raise

    def __call__(self, *args: str, stdin: bytes = b"", slow: bool = False) -> str:
        """Standard output; a failure is a Fault in openssl's own words."""
        code, out, err = self.run(*args, stdin=stdin, slow=slow)
        if code != 0:
            lines = [line for line in err.splitlines()
                     if line.strip() and not line.startswith(NOISE)]
            raise Fault("openssl %s failed:\n  %s"
                        % (args[0], "\n  ".join(lines) or "exit code %d" % code))
        return out

    def new_key(self, kind: str) -> bytes:
        """kind: as --key-type has it, with the bits of rsa."""
        name, _, bits = kind.partition(":")
        if bits:
            print("Making an RSA key of %s bits; on a small box this takes minutes " % bits, end="",
                  file=sys.stderr, flush=True)
        words = GENPKEY[name].replace("%s", bits).split()
        key = self("genpkey", "-algorithm", *words, slow=bool(bits)).encode()
        if bits:
            print(" done", file=sys.stderr)
        return key

    def sign(self, role: str, subject: Dict[str, str], names: List[Name], key: bytes, serial: int,
             start: datetime.datetime, end: datetime.datetime, ca_key: bytes,
             ca_cert: Optional[bytes]) -> bytes:
        """A certificate for `key`. No ca_cert: it is the CA's own."""
        extensions, public = CA_USE, self.public(key)
        if role != "ca":
            extensions = LEAF_USE % role + (RSA_USE if RSA in public[:32] else "")
        # Behind a backslash no sign has a meaning in the configuration.
        self.configure("\n".join("%s = %s" % (field, re.sub(r"([^\w ]|_)", r"\\\1", value))
                                 for field, value in subject.items() if value), extensions,
                       "\n".join("%s.%d = %s" % (name.kind, i, name.text)
                                 for i, name in enumerate(names)))
        digits = "%X" % serial
        self.file("serial", ("0" * (len(digits) % 2) + digits + "\n").encode())
        self.file("index.txt", b"")
        request = self("req", "-new", "-key", "/dev/stdin", stdin=key).encode()
        issuer = ("-cert", self.file("issuer.pem", ca_cert)) if ca_cert else ("-selfsign",)
        out = self("ca", "-batch", "-notext", "-preserveDN",
                   "-in", self.file("request.pem", request), "-keyfile", "/dev/stdin",
                   "-startdate", asn1_time(start), "-enddate", asn1_time(end), *issuer,
                   stdin=ca_key)
        said = self("x509", "-noout", "-serial", "-pubkey", stdin=out.encode())
        if der(said) != public or not re.search("^serial=0*%X$" % serial, said, re.M):
            raise Fault("openssl ca made another certificate than it was asked for")
        return out.encode()

    def crl(self, ca_key: bytes, ca_cert: bytes, index: "Index", number: int) -> bytes:
        """The CRL for an index. It has no end: an overdue one would lock every client out."""
        self.file("index.txt", b"".join(index.values()))
        self.file("crlnumber", b"%016X\n" % number)
        return self("ca", "-batch", "-gencrl", "-keyfile", "/dev/stdin",
                    "-cert", self.file("issuer.pem", ca_cert),
                    "-crldays", str((NO_END - now()).days), stdin=ca_key).encode()

    def verify(self, cert: bytes, trust: bytes, *options: str,
               chain: bytes = b"") -> Dict[int, str]:
        """OpenSSL's error numbers and their texts; none if the certificate holds.

        Dates do not count.
        """
        if chain:
            options += ("-untrusted", self.file("chain.pem", chain))
        if trust:
            options += ("-CAfile", self.file("trust.pem", trust))
        file = self.file("verified.pem", cert)
        code, out, err = self.run("verify", "-no_check_time", *options, file)
        found = re.findall(r"^error (\d+) at \d+ depth lookup: ?(.*)", out + err, re.M)
        if code != 0 and not found:
            raise Fault("openssl verify failed:\n  " + err.strip())
        return {int(number): text for number, text in found}

    def public(self, key: bytes) -> bytes:
        """DER of the public half of a private key."""
        code, out, _ = self.run("pkey", "-pubout", stdin=key)
        if code != 0:
            raise Fault("a private key that openssl cannot read; bring the whole file again")
        return der(out)


def asn1_time(when: datetime.datetime) -> str:
    """RFC 5280 4.1.2.5: two digits for the year up to 2049, then four."""
    text = "%04d%02d%02d%02d%02d%02dZ" % when.timetuple()[:6]
    return text[2:] if when.year < 2050 else text


def new_serial() -> int:
    """127 bits, 126 of them random: positive, of one length, never the same twice."""
    return 1 << 126 | int.from_bytes(os.urandom(16), "big") >> 2


# --- the CA: a folder that one run at a time may use ---

Index = Dict[int, bytes]  # a CA's index.txt as openssl has it: its lines by their serials

# State, end, date of revocation, serial, file, subject.
LINE = re.compile(rb"[VRE]\t\d{12,14}Z\t(?:\d{12}Z[^\t\n]*)?\t([0-9A-F]+)\t[^\t\n]+\t[^\n]*\n")


def read_index(path: str, data: bytes) -> Index:
    index: Index = {}
    for number, line in enumerate(data.splitlines(True), 1):
        match = LINE.fullmatch(line)
        if not match or int(match.group(1), 16) in index:
            raise Fault("%s:%d: is damaged, expected one certificate's line; bring the file back "
                        "from a backup" % (path, number))
        index[int(match.group(1), 16)] = line
    return index


def index_line(serial: int, end: datetime.datetime, subject: Dict[str, str]) -> bytes:
    """A certificate's line as `openssl ca` writes it."""
    digits = "%X" % serial
    text = "".join("/%s=%s" % (field, re.sub("[/+]", r"\\\g<0>", value))
                   for field, value in subject.items() if value)
    return b"V\t%s\t\t%s\tunknown\t%s\n" % (
        asn1_time(end).encode(), ("0" * (len(digits) % 2) + digits).encode(),
        re.sub(rb"[^ -~]", lambda match: b"\\x%02X" % match.group()[0], text.encode()) or b"/")


def as_revoked(line: bytes) -> bytes:
    """A line of the index with today's date of revocation, unless it has one."""
    if line.startswith(b"R"):
        return line
    _, end, _, rest = line.split(b"\t", 3)
    # openssl takes no later date there; a date in the past revokes as well.
    return b"\t".join((b"R", end, asn1_time(min(now(), LAST_UTCTIME)).encode(), rest))


def revoked(index: Index) -> Set[int]:
    return {serial for serial, line in index.items() if line.startswith(b"R")}


class CA:
    """Its records hold whenever a run is cut short: first the index knows of a certificate, then
    there is a copy in issued/, and then the file with its key; crl.pem follows the index."""

    def __init__(self, ossl: OpenSSL, opts: argparse.Namespace, create: bool = False) -> None:
        self.ossl, self.folder = ossl, opts.d or os.path.join(conf_folder(), "nutshim")
        ossl.place = private = self.path("private")
        if not create and not os.path.exists(self.path("ca.pem")):
            raise Fault("%s: there is no CA; make one: mkNUTcert.py ca -d %s"
                        % (self.folder, shlex.quote(self.folder)))
        for path in (self.folder, self.path("issued"), private):
            if create and not os.path.isdir(path):
                with blame(path):
                    os.makedirs(path)
                    os.chmod(path, 0o700 if path == private else 0o755)
            with blame(path):
                info = os.stat(path)
            cure = ""
            if info.st_uid != os.geteuid():
                cure = "run this as the one it belongs to"
            elif info.st_mode & 0o022:
                cure = "chmod go-w %s%s" % (shlex.quote(path),
                                            ", or choose another folder" if create else "")
            if cure:
                raise Fault("%s: is %s; a CA is safe only where nobody but you can write: %s"
                            % (path, rights(path), cure))
        with blame(private):
            self.lock = os.open(self.path("private/lock"),
                                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        for path in (self.folder, self.path("issued"), private):
            with blame(path):
                sweep(path, LEFT)
                sweep(path, LEFT_BY_1_0)
        self.index: Index = {}
        if not create:
            self.load()

    def load(self) -> None:
        cert, key = self.path("ca.pem"), self.path("private/ca-key.pem")
        certs, keys = read_pem(cert).certs, read_pem(key).keys
        if not certs or not keys:
            raise Fault("%s: has no %s in it; bring it back from a backup"
                        % ((key, "key") if certs else (cert, "certificate")))
        self.cert, self.key = certs[0], keys[0]
        if os.stat(key).st_mode & 0o077:
            raise Fault("%s: is %s, and whoever can read it can pose as any box: chmod 600 %s; "
                        "if somebody has read it, make another CA, in another folder"
                        % (key, rights(key), shlex.quote(key)))
        self.index = read_index(self.path("private/index.txt"), self.record("private/index.txt"))
        self.catch_up()

    def catch_up(self) -> None:
        """Bring index and list together after a run that was killed, or an old backup: what
        either has revoked stays revoked. What neither knows can only be told."""
        path, index_path = self.path("crl.pem"), self.path("private/index.txt")
        listed: Optional[Set[int]] = None
        if os.path.lexists(path):
            try:
                listed = set().union(*(reader().read_crl(der(crl)).serials
                                       for crl in read_pem(path).crls))
            except (Fault, ValueError) as fault:
                raise Fault("%s: cannot be used (%s): bring it back from a backup, or remove it, "
                            "and the next run makes it again"
                            % (path, str(fault).replace(path + ": ", ""))) from None
        index = dict(self.index)
        forgotten = (listed or set()) - revoked(index)
        for serial in forgotten:
            index[serial] = as_revoked(index.get(serial) or index_line(serial, NO_END, {}))
        if forgotten or listed is None or revoked(index) - listed:
            with handlers_kept():
                self.publish(index)
            say("%s: made again from %s" % (path, index_path))
        if forgotten:
            say("%s: did not know of %d that crl.pem revokes (restored from an older backup?); "
                "they stay revoked" % (index_path, len(forgotten)))
        copies = os.listdir(self.path("issued"))
        unknown = [name for name in sorted(copies) if re.fullmatch(r".+\.[0-9A-F]+\.pem", name)
                   and int(name.split(".")[-2], 16) not in index]
        if unknown:
            say("%s: does not know %s in %s (restored from an older backup?). What was revoked "
                "since is good again: revoke it once more, and renew and revoke the others"
                % (index_path, ", ".join(unknown), self.path("issued")))

    def __enter__(self) -> "CA":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.lock)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def record(self, name: str) -> bytes:
        with blame(self.path(name)), open(self.path(name), "rb") as file:
            return file.read()

    def private(self, name: str, data: bytes) -> Output:
        return Output(self.path("private/" + name), data, 0o600)

    def issue(self, role: str, subject: Dict[str, str], names: List[Name], key: bytes,
              start: datetime.datetime, end: datetime.datetime
              ) -> Tuple[bytes, datetime.datetime, List[Output]]:
        """A certificate, its end, which is the CA's if that comes first, and the CA's record of
        it, which is to be written before any file with the certificate."""
        ca_end = describe(self.cert).end
        if start >= ca_end:
            raise Fault("%s: the CA ends on %s; make another one, in another folder: "
                        "mkNUTcert.py ca -d DIR" % (self.path("ca.pem"), ca_end))
        end, serial = min(end, ca_end), new_serial()
        copy = "issued/%s.%s.%X.pem" % (names[0].text[:MAX_STEM], role, serial)
        cert = self.ossl.sign(role, subject, names, key, serial, start, end, self.key, self.cert)
        index = b"".join(self.index.values()) + index_line(serial, end, subject)
        return cert, end, [self.private("index.txt", index), Output(self.path(copy), cert)]

    def publish(self, index: Index) -> None:
        """Take another index, and the revocation list that follows from it."""
        path, text = self.path("private/crlnumber"), self.record("private/crlnumber").strip()
        if not re.fullmatch(rb"[0-9]{1,18}", text):
            raise Fault("%s: is damaged, expected the last revocation list's number; write it "
                        "there in decimal; openssl crl -noout -crlnumber -in %s tells it in "
                        "hexadecimal" % (path, shlex.quote(self.path("crl.pem"))))
        number = int(text) + 1
        crl = self.ossl.crl(self.key, self.cert, index, number)
        if read_list(crl).serials != revoked(index):
            raise Fault("openssl ca made a revocation list that is not the index's")
        write_files([self.private("index.txt", b"".join(index.values())),
                     self.private("crlnumber", b"%d" % number), Output(self.path("crl.pem"), crl)])
        self.index = index

    def still_good(self, cert: Certificate) -> List[str]:
        """The copies of other certificates for its first name that are neither revoked nor over."""
        name = (cert.names or [""])[0].partition(":")[2]
        try:
            stem = host_name(name).text[:MAX_STEM]
        except argparse.ArgumentTypeError:
            return []
        found = []
        for file in sorted(os.listdir(self.path("issued"))):
            match = re.fullmatch(re.escape(stem) + r"\.(?:client|server)\.([0-9A-F]+)\.pem", file)
            if match and int(match.group(1), 16) not in revoked(self.index):
                path = self.path("issued/" + file)
                with contextlib.suppress(Fault):  # a damaged copy is no reason to fail here
                    if all(describe(each).end > now() for each in read_pem(path).certs):
                        found.append(path)
        return found

    def issued(self, path: str) -> Pem:
        """A file whose certificate is from this CA."""
        pem = read_pem(path)
        # The CA's own certificate is from this CA as well, and is never meant.
        if not pem.certs or self.ossl.verify(pem.certs[0], self.cert, "-CApath", ".") \
                or pem.certs[0].split() == self.cert.split():
            raise Fault("%s: does not begin with a certificate from the CA in %s"
                        % (path, self.folder))
        return pem


# --- what is made, and the messages about it ---

def validity(opts: argparse.Namespace, length: Optional[datetime.timedelta] = None
             ) -> Tuple[datetime.datetime, datetime.datetime]:
    """From and until; `length` holds where neither --days nor --notAfter was given."""
    try:
        start = now() + datetime.timedelta(seconds=opts.notBefore)
        end = NO_END
        if opts.days:
            end = start + datetime.timedelta(days=opts.days)
        elif opts.notAfter:
            end = now() + datetime.timedelta(seconds=opts.notAfter)
        elif opts.notAfter is None and length:
            end = start + length
    except OverflowError:
        start = end = NO_END
    if start.year < 1950 or end <= start:
        raise Fault("no certificate can begin and end like that (from 1950 to 9999, and the end "
                    "after the beginning): check --notBefore, --notAfter, --days")
    return start, end


def subject_of(opts: argparse.Namespace, common_name: str) -> Dict[str, str]:
    """A name too long for a CN stands among the SANs alone, where it counts anyway."""
    return {"C": opts.countryName, "O": opts.organisationName, "OU": opts.organisationUnitName,
            "CN": common_name if len(common_name) <= MAX_DN else ""}


def ca_subject(opts: argparse.Namespace, host: Name) -> Dict[str, str]:
    """Each CA has a name of its own, so that a client can trust several."""
    return subject_of(opts, "NUT CA of %s %s" % (host.text[:40], os.urandom(4).hex()))


def make_pair(ossl: OpenSSL, opts: argparse.Namespace) -> None:
    """The default action: the server's file and the clients' file."""
    names = unique(opts.subjectAltName or reachable_names('-SAN "NAME NAME ..."'))
    start, end = validity(opts)
    own = own_names()[0]
    stem = (names[0] if is_loopback(own) else own).text[:MAX_STEM]
    server = opts.servercertfile or os.path.join(opts.d or conf_folder(), stem + ".cert.pem")
    client = opts.clientcertfile or os.path.join(opts.d or conf_folder(), stem + "-client.cert.pem")
    owner = key_rights(opts.owner)
    fresh = not may_write([server, client], opts.y)
    ossl.place = roomy(os.path.dirname(server))
    ca_key, key = ossl.new_key(opts.key_type), ossl.new_key(opts.key_type)
    ca_cert = ossl.sign("ca", ca_subject(opts, names[0]), [], ca_key, new_serial(), start, end,
                        ca_key, None)
    cert = ossl.sign("server", subject_of(opts, names[0].text), names, key,
                     opts.serialNumber or new_serial(), start, end, ca_key, ca_cert)
    write_files([Output(server, key + cert + ca_cert, *owner, fresh),
                 Output(client, ca_cert, fresh=fresh)])
    say_made(names, end, opts.key_type, {
        server: "key, certificate, CA: stays on this box, secret",
        client: "the CA's certificate: for the clients, no secret"})
    say_shims(names, server, client, pin_of(ossl.public(key)))


def make_ca(ossl: OpenSSL, opts: argparse.Namespace) -> None:
    start, end = validity(opts)
    with CA(ossl, opts, create=True) as ca:
        # Not even with -y: all that the CA there has issued would be worth nothing.
        if os.path.exists(ca.path("ca.pem")):
            raise Fault("%s: is a CA already and stays so; another one needs another folder: "
                        "-d DIR" % ca.folder)
        key = ossl.new_key(opts.key_type)
        cert = ossl.sign("ca", ca_subject(opts, own_names()[0]), [], key, new_serial(), start, end,
                         key, None)
        # ca.pem comes last: what is there without it is no CA yet.
        write_files([ca.private("index.txt", b""), ca.private("crlnumber", b"1"),
                     ca.private("ca-key.pem", key),
                     Output(ca.path("crl.pem"), ossl.crl(key, cert, {}, 1)),
                     Output(ca.path("ca.pem"), cert)])
        say_made([], end, opts.key_type, {
            ca.path("ca.pem"): "the CA's certificate: `trust` on every box, no secret",
            ca.path("crl.pem"):
                "what it has revoked, nothing yet: `crl` on the upsd box, no secret",
            ca.path("private/ca-key.pem"):
                "the CA's key: stays here; who has it can pose as any box"})
        print("\nNext:\n  mkNUTcert.py server{0}        a certificate for this box's upsd\n"
              "  mkNUTcert.py client NAME{0}   one for a client, where the server shim demands it"
              .format(" -d " + shlex.quote(opts.d) if opts.d else ""))


def make_server(ossl: OpenSSL, opts: argparse.Namespace) -> None:
    names = unique(opts.names or reachable_names("mkNUTcert.py server NAME ..."))
    start, end = validity(opts)
    owner = key_rights(opts.owner)
    with CA(ossl, opts) as ca:
        path = opts.out or ca.path(names[0].text[:MAX_STEM] + ".server.pem")
        fresh = not may_write([path], opts.y)
        key = ossl.new_key(opts.key_type)
        cert, end, record = ca.issue("server", subject_of(opts, names[0].text), names, key, start,
                                     end)
        write_files(record + [Output(path, key + cert + ca.cert, *owner, fresh)])
    say_made(names, end, opts.key_type, {path: "key, certificate, CA: for the upsd box, secret"})
    say_shims(names, path, ca.path("ca.pem"), pin_of(ossl.public(key)))


def make_client(ossl: OpenSSL, opts: argparse.Namespace) -> None:
    name, made = opts.name, {}
    start, end = validity(opts)
    owner = key_rights(opts.owner)
    with CA(ossl, opts) as ca:
        file_name = name.text[:MAX_STEM] + ".client.pem"
        path = opts.out or ("" if opts.bundle else ca.path(file_name))
        fresh = not may_write(list(filter(None, (path, opts.bundle))), opts.y)
        key = ossl.new_key(opts.key_type)
        cert, end, outputs = ca.issue("client", subject_of(opts, name.text), [name], key, start,
                                      end)
        pem = key + cert + ca.cert
        if path:
            outputs.append(Output(path, pem, *owner, fresh))
            made[path] = "key, certificate, CA: for %s, secret" % name.text
        if opts.bundle:
            outputs.append(Output(opts.bundle, bundle(file_name, pem, ca.cert, opts.upstream),
                                  0o600, fresh=fresh))
            made[opts.bundle] = "the same with nutshim.conf: for %s, secret" % name.text
        write_files(outputs)
    say_made([name], end, opts.key_type, made)
    print("\nOn the upsd box, in nutshim.conf, in the server shim's section:\n"
          "  client_certificate = require\n  trust = %s\n  crl = %s"
          % (conf_text(ca.path("ca.pem")), conf_text(ca.path("crl.pem"))))
    if opts.bundle:
        print("\nCarry {0} to {1}, and there, as root:\n  tar -xpf {2} -C {3} && rm {2}".format(
            opts.bundle, name.text, shlex.quote(os.path.basename(opts.bundle)), THERE))
        if not opts.upstream:
            print("  (set upstream in nutshim.conf)")
        print("  nutshim.py -t\nthen start it, or nutshim.py -c reload.")
    else:
        print("\nCarry %s to %s, where the user %s has to be able to read it, and there, in "
              "nutshim.conf, in the client shim's section:\n  certificate = %s"
              % (path, name.text, NUT_USERS[0],
                 conf_text(os.path.join(THERE, os.path.basename(path)))))


def bundle(file_name: str, pem: bytes, ca_cert: bytes, server: Optional[str]) -> bytes:
    """A tar with all that a client's box needs, to be unpacked where its NUT configuration is."""
    conf = """\
# nutshim.conf of a client's box. Its NUT configuration is taken to be in {there};
# if it is elsewhere, change the paths of certificate and trust.
[ups]
role = client
listen = localhost:3493
{upstream}
certificate = {there}/{file}
trust = {there}/nutshim-ca.pem
""".format(there=THERE, file=file_name, upstream="upstream = " + server if server else
           "# Put the upsd box's name here, one that its certificate has:\nupstream = CHANGE-ME")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, mode in (("nutshim.conf", conf.encode(), 0o640), (file_name, pem, 0o640),
                                 ("nutshim-ca.pem", ca_cert, 0o644)):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), mode, int(time.time())
            # tar looks the names up: root:nut where there is such a group, else root:root.
            info.uname, info.gname = "root", NUT_USERS[0]
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def revoke(ossl: OpenSSL, opts: argparse.Namespace) -> None:
    with CA(ossl, opts) as ca:
        cert = describe(ca.issued(opts.file).certs[0])
        # Once more is no error, and makes a new list.
        line = ca.index.get(cert.serial) or index_line(cert.serial, cert.end, {})
        ca.publish({**ca.index, cert.serial: as_revoked(line)})
        others = ca.still_good(cert)
    crl = ca.path("crl.pem")
    print("%s: is revoked.\n  %s  %s  the CA's revocation list, no secret\n\n"
          "Next, where it could be shown, in nutshim.conf:\n  crl = %s\n"
          "(on the upsd box for a client's certificate, on the clients' for a server's) "
          "and nutshim.py -c reload, which ends its open sessions too"
          % (opts.file, crl, rights(crl), conf_text(crl)))
    if others:
        print("\nCareful: for the same name these are still good. If the box is lost, revoke them "
              "too:\n  " + "\n  ".join(others))


def renew(ossl: OpenSSL, opts: argparse.Namespace) -> None:
    """The same names and purpose; the same key, or a new one."""
    with CA(ossl, opts) as ca:
        pem = ca.issued(opts.file)
        old = describe(pem.certs[0])
        crl = ossl.file("crl.pem", ca.record("crl.pem"))
        if ossl.verify(old.pem, ca.cert, "-crl_check", "-CRLfile", crl):
            raise Fault("%s: is revoked; make another one: mkNUTcert.py server or client"
                        % opts.file)
        if not opts.new_key and (not pem.keys or pin_of(ossl.public(pem.keys[0])) != old.pin):
            raise Fault("%s: the certificate's key is not in it; --new-key makes one" % opts.file)
        if not pem.keys and not opts.out:
            raise Fault("%s: has no key in it and is no place for one; name the file to write: "
                        "-o FILE" % opts.file)
        # Without --owner the file stays whose it was.
        info = os.stat(opts.file)
        owner = (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid)
        if opts.owner or not pem.keys:
            owner = key_rights(opts.owner)
        path = opts.out or os.path.abspath(opts.file)
        fresh = not may_write([path], opts.y)
        start, end = validity(opts, None if old.end == NO_END else old.end - old.start)
        try:
            kind = opts.key_type or {"EC": "ec", "Ed25519": "ed25519"}.get(old.key.split()[0]) \
                or key_type(old.key.lower().replace(" ", ":"))
            names = [host_name(name.partition(":")[2]) for name in old.names or [""]]
            # Checked as if they had been typed.
            subject = {field: dn_text(text) for field, text in old.fields}
        except argparse.ArgumentTypeError as error:
            raise Fault("%s: its names or its key's type cannot be used again: %s"
                        % (opts.file, error)) from None
        key = ossl.new_key(kind) if opts.new_key else pem.keys[0]
        role = "client" if ossl.verify(old.pem, ca.cert, "-purpose", "sslserver") else "server"
        cert, end, record = ca.issue(role, subject, names, key, start, end)
        write_files(record + [Output(path, key + cert + ca.cert, *owner, fresh)])
    pin = pin_of(ossl.public(key))
    after = "Next: nutshim.py -c reload"
    if role == "client":
        after = "Next: carry it to %s, and there nutshim.py -c reload" % names[0].text
    say_made(names, end, kind, {path: "key, certificate, CA: secret"})
    if not opts.new_key:
        print("\nThe key is the same, and so is the pin:\n  pin = %s\n%s" % (pin, after))
    else:
        print("\nThe key is new. Whoever knows this box by its pin needs both until it is in use:\n"
              "  pin = %s, %s\n%s\n"
              "The certificate of before holds until it ends. If its key got into wrong hands, "
              "revoke it; a copy is in\n  %s" % (old.pin, pin, after, ca.path("issued")))


def say_made(names: List[Name], end: datetime.datetime, kind: str, made: Dict[str, str]) -> None:
    print("Made%s, %s:" % (" for " + " ".join(name.text for name in names) if names else "",
                           "without an end" if end == NO_END else "valid until %s UTC" % end))
    for path, what in made.items():
        print("  %s  %s  %s" % (path, rights(path), what))
        if re.search("[,:] secret$", what) and os.stat(path).st_mode & 0o004:
            print("Careful: everybody on this box can read the key in it.")
    if kind == "ed25519":
        print("Note: nutshim takes Ed25519; NUT's own TLS does not where it is built with NSS, "
              "as Debian's is.")


def conf_text(path: str) -> str:
    """A path as nutshim.conf has it: in quotes where it would end, or be two."""
    return '"%s"' % path if re.search("[#;,]", path) else path


def say(text: str) -> None:
    print("mkNUTcert.py: " + text, file=sys.stderr)


def say_shims(names: List[Name], server: str, trust: str, pin: str) -> None:
    name = next((name for name in names if not is_loopback(name)), names[0])
    print("""
On the upsd box, in nutshim.conf:
  [upsd]
  role = server
  certificate = {set_server}
then nutshim.py -t, and start it, or nutshim.py -c reload.

On each client's box, with {trust} copied to {there}, in nutshim.conf:
  [ups]
  role = client
  upstream = {host}
  trust = {set_trust}
or, without a file, by the server's key alone:
  [ups]
  role = client
  upstream = {host}
  verify = pin
  pin = {pin}""".format(trust=trust, there=THERE, host=bracketed(name), pin=pin,
                        set_server=conf_text(server),
                        set_trust=conf_text(os.path.join(THERE, os.path.basename(trust)))))


# --- show: a file in words ---

def show(ossl: OpenSSL, opts: argparse.Namespace) -> int:
    code = 0
    for path in opts.files:
        try:
            show_file(ossl, read_pem(path))
        except Fault as fault:
            say(str(fault) if path in str(fault) else "%s: %s" % (path, fault))
            code = 1
    return code


def show_file(ossl: OpenSSL, pem: Pem) -> None:
    print("%s: %s" % (pem.path, rights(pem.path)))
    certs = describe_all(pem)
    for key in pem.keys:
        public = ossl.public(key)
        pin = pin_of(public)
        of = ["of certificate %d" % i for i, cert in enumerate(certs, 1) if cert.pin == pin]
        print("  private key, %s, %s\n    pin:     %s" % (
            key_name(public), of[0] if of else "of no certificate in this file", pin))
    for i, cert in enumerate(certs, 1):
        print("  certificate %d, %s\n    subject: %s\n    names:   %s\n    issuer:  %s\n"
              "    from:    %s UTC\n    until:   %s\n    key:     %s\n    pin:     %s" % (
                  i, "of a CA" if cert.is_ca else "for " + (cert.uses or "any use"), cert.subject,
                  ", ".join(cert.names) or "none",
                  "itself" if cert.issuer == cert.subject else cert.issuer,
                  cert.start, until(cert.end), cert.key, cert.pin))
    for crl in pem.crls:
        found = read_list(crl)
        print("  certificate revocation list\n    issuer:  %s\n    from:    %s UTC\n"
              "    until:   %s\n    revokes: %s" % (
                  found.issuer, moment(found.not_before), until(moment(found.not_after)),
                  ", ".join("%X" % serial for serial in sorted(found.serials)) or "nothing"))


def until(end: datetime.datetime) -> str:
    left = end - now()
    if end.year == NO_END.year:
        return "never expires"
    if left.total_seconds() < 0:
        return "%s UTC, EXPIRED %d days ago" % (end, -left.days - 1)
    return "%s UTC, %d days left" % (end, left.days)


# --- check: every fault with its cure ---

Faults = Iterator[Tuple[str, str]]  # what is wrong, what to do

NEEDS_CA = "name the file of the CA that issued it: --trust FILE"
# OpenSSL's X509_V_ERR_ numbers.
REVOKED = 23
NO_CA = (2, 20, 21)
CURES = {
    2: NEEDS_CA, 19: NEEDS_CA, 20: NEEDS_CA, 21: NEEDS_CA,
    18: "make one with a CA: mkNUTcert.py; or name it itself: --trust FILE",
    26: "it was made for another use; make one: mkNUTcert.py server or client",
}


def check(ossl: OpenSSL, opts: argparse.Namespace) -> int:
    found = 0
    groups = [("", "", opts.files)] if opts.files else []
    if opts.f:
        groups += read_conf(opts.f)
    for title, role, paths in groups:
        if title:
            print("[%s]" % title)
        found += check_group(ossl, opts, paths, role)
    print("%d fault%s" % (found, "s" if found > 1 else "") if found else "all good")
    return 1 if found else 0


def read_conf(path: str) -> List[Tuple[str, str, List[str]]]:
    """Each shim of nutshim.conf with its role and the files that it names. Whether the rest is
    right, `nutshim.py -t` knows."""
    try:
        conf, _ = reader().read_config(path)
    except reader().ConfigError as error:
        raise Fault(str(error)) from None
    found = [(shim.name, shim.role, [file for file in shim.files() if not os.path.isdir(file)])
             for shim in conf.shims if shim.files()]
    if not found:
        raise Fault("%s: names no certificate, key, trust or crl in a shim's section" % path)
    return found


def check_group(ossl: OpenSSL, opts: argparse.Namespace, paths: List[str], role: str) -> int:
    """The number of faults in files that belong together: keys find their certificates, and
    certificates their CA, among them, in --trust, in the CA's folder and in the system's store."""
    files = []
    found: List[Tuple[str, str, str]] = []
    for path in paths:
        try:
            pem = read_pem(path)
            files.append((pem, describe_all(pem), [pin_of(ossl.public(key)) for key in pem.keys]))
        except Fault as fault:
            what, _, cure = str(fault).replace(path + ": ", "").partition("; ")
            found.append((path, what, cure or "name the right file, or make it again"))
    own = [cert for _, certs, _ in files for cert in certs]
    known = list(own)
    known += [cert for path in opts.trust for cert in describe_all(read_pem(path))]
    crls = [crl for pem, _, _ in files for crl in pem.crls]
    with contextlib.suppress(Fault):
        folder = opts.d or os.path.join(conf_folder(), "nutshim")
        known += describe_all(read_pem(os.path.join(folder, "ca.pem")))
        crls += read_pem(os.path.join(folder, "crl.pem")).crls
    trust = b"".join(cert.pem for cert in known if cert.is_ca or cert.issuer == cert.subject)
    for pem, certs, pins in files:
        faults = []
        of_ca = False
        for pin in pins:
            of_ca = any(cert.is_ca and cert.pin == pin for cert in known)
            if pin not in [cert.pin for cert in certs[:1] or known]:
                other = "first certificate" if certs else "certificates here"
                faults.append(("the key is not that of the " + other,
                               "bring the two that were made together, own certificate first"))
        faults += check_rights(pem, of_ca)
        for cert in certs:
            faults += check_dates(pem.path, cert)
        if certs and not certs[0].is_ca:
            faults += check_chain(ossl, opts, certs, trust, b"".join(crls),
                                  role if pem.keys else "")
        for crl in pem.crls:
            faults += check_crl(ossl, crl, trust)
        for cert in certs:
            if cert.is_ca and cert.issuer == cert.subject:
                faults += [("%s: %s" % (cert.subject, text),
                            "make a CA that keeps to RFC 5280: mkNUTcert.py ca")
                           for text in ossl.verify(cert.pem, cert.pem, "-x509_strict").values()]
        found += [(pem.path,) + fault for fault in faults]
        if not faults:
            print("%s: good%s" % (pem.path, "".join(", but " + until(cert.end) for cert in certs
                                                    if (cert.end - now()).days < WARN_DAYS)))
    for path, what, cure in found:
        print("%s: %s\n    cure: %s" % (path, what, cure))
    for text in not_checked(own, known, crls):
        print("not checked: " + text)
    return len(found)


def not_checked(certs: List[Certificate], known: List[Certificate], crls: List[bytes]) -> List[str]:
    """What could not be found out of certificates, for want of a CA or its CRL at hand."""
    subjects, listed, notes = {cert.subject for cert in known}, set(), []
    for crl in crls:
        with contextlib.suppress(Fault):
            listed.add(read_list(crl).issuer)
    for cert in certs:
        if cert.issuer == cert.subject:
            continue
        if cert.issuer not in subjects and cert.is_ca:
            notes.append("who issued %s: its CA %s is not at hand; %s" % (
                cert.subject, cert.issuer, NEEDS_CA))
        if cert.issuer not in listed:
            notes.append("whether %s is revoked: no CRL of %s is at hand; name its file too" % (
                cert.subject, cert.issuer))
    return list(dict.fromkeys(notes))


def check_rights(pem: Pem, of_ca: bool) -> Faults:
    """of_ca: it has a CA's key, which is for its owner alone."""
    info, path, word = os.stat(pem.path), pem.path, shlex.quote(pem.path)
    user = next(filter(None, (find(pwd.getpwnam, name) for name in NUT_USERS)), None)
    if info.st_uid not in (0, os.geteuid(), user.pw_uid if user else 0):
        yield "belongs to another user: " + rights(path), "chown root " + word
    if info.st_mode & 0o022:
        yield "others can change it: " + rights(path), "chmod go-w " + word
    if pem.keys and info.st_mode & 0o004:
        yield "everybody can read the key: " + rights(path), "chmod o= " + word
    elif of_ca and info.st_mode & 0o077:
        yield "not only its owner can read the CA's key: " + rights(path), "chmod 600 " + word
    elif user and not of_ca and info.st_uid == 0 and not info.st_mode & 0o004 and not (
            info.st_mode & 0o040 and info.st_gid == user.pw_gid):
        yield ("NUT's user %s cannot read it, so a reload would fail: %s"
               % (user.pw_name, rights(path)),
               "chgrp %d %s && chmod g+r %s" % (user.pw_gid, word, word))


def check_dates(path: str, cert: Certificate) -> Faults:
    if cert.end < now():
        yield ("%s: expired on %s UTC" % (cert.subject, cert.end),
               "make another CA, in another folder, and from it new certificates: "
               "mkNUTcert.py ca -d DIR" if cert.is_ca
               else "mkNUTcert.py renew %s, or make it again" % shlex.quote(path))
    if cert.start > now():
        yield ("%s: not valid before %s UTC" % (cert.subject, cert.start),
               "set this box's clock, or wait")


def check_chain(ossl: OpenSSL, opts: argparse.Namespace, certs: List[Certificate], trust: bytes,
                crls: bytes, role: str) -> Faults:
    own = certs[0]
    chain = b"".join(cert.pem for cert in certs[1:])
    errors = {use: ossl.verify(own.pem, trust, "-x509_strict", "-purpose", "ssl" + use, chain=chain)
              for use in ("server", "client")}
    if role in errors and errors[role] or all(errors.values()):
        for number, text in errors.get(role, errors["server"]).items():
            if number in NO_CA:
                text = ("who issued it could not be checked: its CA %s is not at hand"
                        % certs[-1].issuer)
            yield ("%s: %s" % (own.subject, text),
                   CURES.get(number, "make a certificate that keeps to RFC 5280: mkNUTcert.py"))
    if crls and REVOKED in ossl.verify(own.pem, trust, "-crl_check",
                                       "-CRLfile", ossl.file("crls.pem", crls), chain=chain):
        yield "%s: is revoked" % own.subject, "make another one: mkNUTcert.py server or client"
    if errors["server"] and not errors["client"]:
        return  # Nobody looks for a host's name in a client's certificate.
    for host in opts.hosts:
        option = "-verify_hostname" if host.kind == "DNS" else "-verify_ip"
        if ossl.verify(own.pem, own.pem, "-partial_chain", option, host.text):
            yield ("%s: is for %s, not for %s"
                   % (own.subject, ", ".join(own.names) or "no name", host.text),
                   "on the clients set server_name to one of its names, or make one with %s in it"
                   % host.text)


def check_crl(ossl: OpenSSL, crl: bytes, trust: bytes) -> Faults:
    try:
        found = read_list(crl)
        start, end = moment(found.not_before), moment(found.not_after)
    except Fault as fault:
        what, _, cure = str(fault).partition("; ")
        yield what, cure
        return
    code, _, err = ossl.run("crl", "-noout", "-CAfile", ossl.file("trust.pem", trust), stdin=crl)
    if code != 0 or "verify OK" not in err:
        yield "this CRL is not from a CA that is known here", NEEDS_CA
    elif end < now():
        yield "this CRL is out of date, which shuts out everybody", "get a new one from its CA"
    elif start > now():
        yield ("this CRL is not valid before %s UTC, and until then shuts out everybody" % start,
               "set the clock of this box, or that of the CA's, and get a new one from its CA")


# --- the command line ---

def key_type(text: str) -> str:
    match = re.fullmatch("ec|ed25519|rsa(:[0-9]{1,5})?", text)
    if not match or match.group(1) and not RSA_BITS[0] <= int(match.group(1)[1:]) <= RSA_BITS[1]:
        raise argparse.ArgumentTypeError("%s: expected ec, ed25519, rsa or rsa:BITS with "
                                         "%d to %d bits" % ((ascii(text[:80]),) + RSA_BITS))
    return "rsa:3072" if text == "rsa" else text


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,60}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError("%s: expected a number from %d to %d"
                                             % (ascii(text[:80]), low, high))
        return int(text)
    return parse


COMMANDS = {
    "ca": (make_ca, "make a CA that stays, in a folder of its own"),
    "server": (make_server, "make a certificate from it for a upsd box"),
    "client": (make_client, "make a certificate from it for a client, for mutual TLS"),
    "renew": (renew, "make a certificate again: the same names, a new date"),
    "revoke": (revoke, "put a certificate on the CA's revocation list"),
    "show": (show, "say what is in PEM files"),
    "check": (check, "say what is wrong with PEM files, and how to cure it"),
}


OWN_NAMES = "this host's name, full name, localhost, 127.0.0.1, ::1"


def parser_for(command: str) -> argparse.ArgumentParser:
    """Each command has a parser of its own; "" is the default action with the older tool's
    options."""
    parser = argparse.ArgumentParser(
        prog=("mkNUTcert.py " + command).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    if command:
        parser.description = COMMANDS[command][1]
    else:
        parser.description = ("Make a server's certificate for NUT over TLS, and the file by which "
                              "its clients know it.")
        parser.epilog = "commands, each with its own -h:\n" + "\n".join(
            "  %-8s %s" % (name, text) for name, (_, text) in COMMANDS.items())
    add = parser.add_argument
    add("-v", "--version", action="version", version="mkNUTcert.py " + VERSION)
    if command != "show":
        add("-d", metavar="DIR",
            help="the CA's folder (default: nutshim in NUT's configuration folder)" if command
            else "folder for the two files (default: NUT's configuration folder)")
    if command in ("show", "check"):
        add("files", metavar="FILE", nargs="+" if command == "show" else "*")
    if command == "check":
        add("-f", metavar="CONF", help="check the files that this nutshim.conf names")
        add("--for", metavar="HOST", dest="hosts", type=host_name, action="append", default=[],
            help="must hold for this name or address (repeat for more)")
        add("--trust", metavar="FILE", action="append", default=[],
            help="CA to trust (repeat for more)")
    if command in ("revoke", "renew"):
        add("file", metavar="FILE", help="PEM file with the certificate, or its copy in issued/")
    if command == "server":
        add("names", metavar="NAME", nargs="*", type=host_name,
            help="host names and addresses (default: %s)" % OWN_NAMES)
    if command == "client":
        add("name", metavar="NAME", type=host_name, help="the client's host name")
        add("--bundle", metavar="FILE.tar",
            help="one file to carry there: certificate, CA, nutshim.conf")
        add("--upstream", metavar="HOST[:PORT]", type=upstream,
            help="the server shim, for that nutshim.conf")
    if command in ("server", "client", "renew"):
        add("-o", "--out", metavar="FILE", help="file to write (default: %s)" % (
            "the same file" if command == "renew" else "NAME.%s.pem in the CA's folder" % command))
    if command in ("", "ca", "server", "client", "renew"):
        add("-y", action="store_true", help="replace files that exist, without a question")
        if command == "renew":
            add("--new-key", action="store_true", help="with a new key")
        add("--key-type", metavar="TYPE", type=key_type,
            default=None if command == "renew" else "ec",
            help="ec (P-256), rsa, rsa:BITS, ed25519 (default: %s)"
            % ("as before" if command == "renew" else "ec"))
        add("--notBefore", metavar="SECONDS", type=whole(-10 ** 12, 10 ** 12), default=0,
            help="begin, from now (0)")
        end = parser.add_mutually_exclusive_group()
        end.add_argument("--notAfter", metavar="SECONDS", type=whole(-10 ** 12, 10 ** 12),
                         help="end, from now; 0: without an end, 99991231235959Z (default: %s)"
                         % ("as long as before" if command == "renew" else "0"))
        end.add_argument("--days", metavar="N", type=whole(1, 10 ** 7),
                         help="end, in days from the beginning")
    if command in ("", "server", "client", "renew"):
        add("--owner", metavar="USER[:GROUP]",
            help="whose group may read the key (default: NUT's user's)")
    if command in ("", "ca", "server", "client"):
        add("-C", "--countryName", metavar="XX", type=country, default="FR",
            help="country (default: FR)")
        add("-O", "--organisationName", metavar="TEXT", type=dn_text, default="Network UPS Tools",
            help="organisation (default: Network UPS Tools)")
        add("-OU", "--organisationUnitName", metavar="TEXT", type=dn_text, default="",
            help="its unit (default: none)")
    if command == "":
        add("-SAN", "--subjectAltName", metavar='"NAME NAME ..."', type=host_list,
            help="host names and addresses, separated by blanks (default: %s)" % OWN_NAMES)
        add("--serialNumber", metavar="INT", type=whole(1, 2 ** 159 - 1), help="(default: random)")
        add("-s", "--servercertfile", metavar="FILE",
            help="the server's file (default: HOSTNAME.cert.pem)")
        add("-c", "--clientcertfile", metavar="FILE",
            help="the clients' file (default: HOSTNAME-client.cert.pem)")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path need not fit the terminal
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    parser = parser_for(command)
    try:
        opts = parser.parse_intermixed_args(argv[1:] if command else argv)
        for name in ("d", "out", "bundle", "servercertfile", "clientcertfile"):
            if getattr(opts, name, None):  # whoever reads the messages may be elsewhere
                inside = opts.d if name.endswith("certfile") and opts.d else ""
                setattr(opts, name, os.path.abspath(os.path.join(inside, getattr(opts, name))))
        if command == "check" and not opts.files and not opts.f:
            parser.error("expected FILE or -f nutshim.conf")
        if command == "client" and opts.upstream and not opts.bundle:
            parser.error("--upstream is for --bundle")
        if command == "renew" and opts.key_type and not opts.new_key:
            parser.error("--key-type is for --new-key")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with OpenSSL() as ossl:
            return (COMMANDS[command][0] if command else make_pair)(ossl, opts) or 0
    except (Fault, OSError) as fault:
        say(str(fault))
    except KeyboardInterrupt:
        say("stopped")
    return 1


if __name__ == "__main__":
    sys.exit(main())
