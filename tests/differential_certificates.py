#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Certificates as nutshim.py reads them and as OpenSSL does: python3 tests/differential_certificates.py [SEED]

Makes 1,000 certificates and 20,000 mutants of them. Whenever OpenSSL loads one and nutshim.py reads it,
both find the same names, pin, dates and CA flag; else the exit code is 1. OpenSSL's side is libcrypto
itself, the library behind the openssl command, since one process for each would take an hour; the
certificates that are made whole go through the command as well. test_certificates.py runs a short form.
"""

import base64
import ctypes
import ctypes.util
import hashlib
import os
import random
import re
import socket
import subprocess
import sys
import time

sys.dont_write_bytecode = True
sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
# pylint: disable=wrong-import-position
import nutshim  # noqa: E402
from derwriter import (BASIC, C, CN, EMAIL, O, OU, SPKI, USAGE, certificate, extension, length, name, oid, san,  # noqa: E402
                       time_of, tlv)

NID_CN, NID_SAN, NID_BASIC = 13, 85, 87                 # OpenSSL's obj_mac.h
SAN_KINDS = {1: "email:", 2: "DNS:", 6: "URI:", 7: "IP:"}


class Library:                                          # pylint: disable=too-few-public-methods
    """libcrypto: what OpenSSL makes of a certificate's bytes."""

    def __init__(self):
        path = ctypes.util.find_library("crypto")
        if not path:
            raise OSError("no libcrypto here")
        self._lib = ctypes.CDLL(path)
        for function in ("d2i_X509", "X509_get_subject_name", "X509_NAME_get_entry", "X509_NAME_ENTRY_get_object",
                         "X509_NAME_ENTRY_get_data", "X509_get0_notBefore", "X509_get0_notAfter", "ASN1_TIME_set",
                         "X509_get_ext_d2i", "OPENSSL_sk_value", "GENERAL_NAME_get0_value", "ASN1_STRING_get0_data",
                         "X509_get_X509_PUBKEY"):
            getattr(self._lib, function).restype = ctypes.c_void_p
        self._epoch = self._call("ASN1_TIME_set", None, ctypes.c_long(0))

    def _call(self, function, *args):
        return getattr(self._lib, function)(*[ctypes.c_void_p(each) if isinstance(each, int) else each for each in args])

    def _seconds(self, moment):
        days, seconds = ctypes.c_int(), ctypes.c_int()
        if self._call("ASN1_TIME_diff", ctypes.byref(days), ctypes.byref(seconds), self._epoch, moment) != 1:
            return None
        return 86400 * days.value + seconds.value

    def _names(self, cert):
        subject, out = self._call("X509_get_subject_name", cert), ctypes.c_void_p()
        for number in range(self._call("X509_NAME_entry_count", subject)):
            entry = self._call("X509_NAME_get_entry", subject, ctypes.c_int(number))
            if self._call("OBJ_obj2nid", self._call("X509_NAME_ENTRY_get_object", entry)) == NID_CN:
                size = self._call("ASN1_STRING_to_UTF8", ctypes.byref(out), self._call("X509_NAME_ENTRY_get_data", entry))
                if size >= 0:
                    yield "CN=", ctypes.string_at(out.value, size)
                    self._call("CRYPTO_free", out.value, b"", ctypes.c_int(0))
        alternatives = self._call("X509_get_ext_d2i", cert, ctypes.c_int(NID_SAN), None, None)
        if alternatives:
            for number in range(self._call("OPENSSL_sk_num", alternatives)):
                kind = ctypes.c_int()
                value = self._call("GENERAL_NAME_get0_value", self._call("OPENSSL_sk_value", alternatives, ctypes.c_int(number)),
                                   ctypes.byref(kind))
                if kind.value in SAN_KINDS:
                    size = self._call("ASN1_STRING_length", value)
                    data = ctypes.string_at(self._call("ASN1_STRING_get0_data", value), size)
                    if kind.value != 7 or size in (4, 16):
                        yield SAN_KINDS[kind.value], data
            self._call("GENERAL_NAMES_free", alternatives)

    def _is_ca(self, cert):
        basic = self._call("X509_get_ext_d2i", cert, ctypes.c_int(NID_BASIC), None, None)
        if not basic:
            return False
        found = ctypes.c_int.from_address(basic).value != 0     # BASIC_CONSTRAINTS begins with int ca
        self._call("BASIC_CONSTRAINTS_free", basic)
        return found

    def read(self, der):
        """(names, pin, begin, end, CA or not) as OpenSSL has them; None where it loads no certificate."""
        buffer = ctypes.create_string_buffer(der, len(der))
        at, out = ctypes.c_void_p(ctypes.addressof(buffer)), ctypes.c_void_p()
        cert = self._call("d2i_X509", None, ctypes.byref(at), ctypes.c_long(len(der)))
        if not cert:
            self._call("ERR_clear_error")
            return None
        try:
            size = self._call("i2d_X509_PUBKEY", self._call("X509_get_X509_PUBKEY", cert), ctypes.byref(out))
            key = ctypes.string_at(out.value, size)
            self._call("CRYPTO_free", out.value, b"", ctypes.c_int(0))
            pin = "sha256//" + base64.b64encode(hashlib.sha256(key).digest()).decode("ascii")
            return (list(self._names(cert)), pin, self._seconds(self._call("X509_get0_notBefore", cert)),
                    self._seconds(self._call("X509_get0_notAfter", cert)), self._is_ca(cert))
        finally:
            self._call("X509_free", cert)
            self._call("ERR_clear_error")


def spelt(kind, value):
    """A name as OpenSSL has its bytes, in permit's words."""
    if kind == "IP:":
        return kind + socket.inet_ntop(socket.AF_INET if len(value) == 4 else socket.AF_INET6, value)
    text = value.decode("utf-8") if kind == "CN=" else value.decode("ascii", "backslashreplace")
    return nutshim.printable(kind + (text.lower() if kind in ("DNS:", "email:") else text))


def ours(der):
    """The same as nutshim.py reads it; None where it refuses it."""
    try:
        found = nutshim.read_certificate(der)
    except ValueError:
        return None
    return found.names, found.pin, found.not_before, found.not_after, found.is_ca


def compare(library, der):
    """(OpenSSL loads it, nutshim.py reads it, they agree)."""
    theirs, own = library.read(der), ours(der)
    if theirs is None or own is None:
        return theirs is not None, own is not None, True
    names, *rest = theirs
    return True, True, ([spelt(*each) for each in names], *rest) == own


# ---- what is made ---------------------------------------------------------------------------------

TEXTS = {0x0c: "utf-8", 0x12: "ascii", 0x13: "ascii", 0x14: "latin-1", 0x16: "ascii", 0x1c: "utf-32-be",
         0x1e: "utf-16-be"}


def some_text(chance, tag):
    """A text of a type's own characters, at times none, at times one that does harm in a terminal."""
    letters = {"ascii": "abcXYZ09 .-,+=\"\\/@*\0\n\x1b", "latin-1": "ab\xe9\xdf\x85", "utf-16-be": "ab\xe9\u20ac\u202e\u4e2d"}.get(
        TEXTS[tag], "ab\xe9\u20ac\u202e\u4e2d\U0001f50c\n\x9b")
    if tag == 0x12:
        letters = "0123456789 "
    return "".join(chance.choice(letters) for _ in range(chance.choice((0, 1, 3, 8, 20)))).encode(TEXTS[tag])


def some_name(chance):
    """A Name with several values, several and empty CNs, all types."""
    def one():
        if chance.random() < 0.03:
            return "2.5.4.45", 0x03, b"\0abc"           # x500UniqueIdentifier, no text
        tag = chance.choice(list(TEXTS))
        return chance.choice((CN, CN, CN, O, OU, C, EMAIL, "2.5.4.12", "1.2.3.4")), tag, some_text(chance, tag)
    return name(*[[one() for _ in range(chance.randint(2, 3))] if chance.random() < 0.2 else one()
                  for _ in range(chance.choice((0, 1, 1, 2, 4)))])


def some_time(chance):
    """A date from 1950 to 9999, in either form."""
    year = chance.choice((1950, 1969, 1970, 2000, 2038, 2049, 2050, 2100, 9999, chance.randint(1950, 9999)))
    month = chance.randint(1, 12)
    day = chance.randint(1, 29 if month == 2 and year % 4 == 0 and (year % 100 or year % 400 == 0) else 28 if month == 2 else 30)
    text = "%04d%02d%02d%02d%02d%02dZ" % (year, month, day, chance.randrange(24), chance.randrange(60), chance.randrange(60))
    return time_of(text[2:] if 1950 <= year < 2050 and chance.random() < 0.9 else text)


def some_san(chance):
    """Each kind of GeneralName (RFC 5280 4.2.1.6)."""
    host = chance.choice((b"nas.lan", b"NAS.Lan", b"*.lan", b"nas.lan.", b"", b"nas.lan\0.evil", b"n\xe4s.lan", b"a, DNS:b", b"x\ny"))
    return chance.choice((
        (0x82, host), (0x82, host), (0x82, host), (0x81, b"Ups@" + host), (0x86, b"urn:" + host), (0x87, bytes(chance.randrange(256) for _ in range(4))),
        (0x87, bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 1])), (0x87, bytes(15) + b"\1"), (0x87, bytes(chance.choice((3, 8, 16)))),
        (0xa0, oid("1.3.6.1.4.1.311.20.2.3") + tlv(0xa0, tlv(0x0c, b"user@lan"))), (0xa4, some_name(chance)), (0x88, oid("1.2.3.4")[2:]),
        (0xa5, tlv(0xa1, tlv(0x0c, b"party"))), (0xa5, tlv(0xa0, tlv(0x13, b"who")) + tlv(0xa1, tlv(0x0c, b"party"))),
        (0xa3, tlv(0x30, tlv(0x02, b"\1")))))


def some_certificate(chance):
    """One that is right: RFC 5280's form throughout, in many variants."""
    critical = chance.choice((b"", b"\1\1\xff"))
    extensions = [extension(BASIC, tlv(0x30, *chance.choice(((), (b"\1\1\xff",), (b"\1\1\xff", b"\2\1\0")))), critical)]
    if chance.random() < 0.9:
        extensions.append(san(*[some_san(chance) for _ in range(chance.choice((1, 1, 2, 5, 12)))]))
    if chance.random() < 0.3:
        extensions.append(extension(USAGE, b"\3\2\5\xa0", critical))
    if chance.random() < 0.3:
        extensions.append(extension("1.2.3.4.%d" % chance.randrange(1000), bytes(chance.randrange(200))))
    chance.shuffle(extensions)
    key = chance.choice((SPKI, tlv(0x30, tlv(0x30, oid("1.2.840.113549.1.1.1"), b"\5\0"), tlv(0x03, b"\0", tlv(
        0x30, tlv(0x02, b"\0" + b"\xc5" * chance.choice((128, 256))), tlv(0x02, b"\1\0\1"))))))
    version = chance.choice((b"", tlv(0xa0, b"\2\1\1"), tlv(0xa0, b"\2\1\2"), tlv(0xa0, b"\2\1\2")))
    unique = chance.choice((b"", b"", b"", tlv(0x81, b"\0abc") + tlv(0x82, b"\0def")))
    last = unique + (tlv(0xa3, tlv(0x30, *extensions)) if version[-1:] == b"\2" else b"")
    return certificate(version=version, serial=tlv(0x02, bytes([chance.randint(1, 127)]) + bytes(chance.randrange(20))),
                       issuer=some_name(chance), validity=tlv(0x30, some_time(chance), some_time(chance)), subject=some_name(chance),
                       spki=key, extensions=last)


# ---- mutants: of the bytes, and of the tree with all lengths put right ----------------------------

def tree(data):
    """DER as a list of [tag, children or bytes]; extensions' values and bit strings are opened where they hold DER."""
    nodes, at = [], 0
    while at < len(data):
        size, start = data[at + 1], at + 2
        if size & 0x80:
            start += size & 0x7f
            size = int.from_bytes(data[at + 2:start], "big")
        if start + size > len(data) or data[at] == 0:
            raise ValueError
        node = [data[at], data[start:start + size], "short"]
        try:
            if data[at] & 0x20 or data[at] == 0x04:
                node[1] = tree(node[1])
        except (IndexError, ValueError):
            pass
        nodes.append(node)
        at = start + size
    return nodes


def write(nodes):
    """The bytes of a tree, each length in its node's form."""
    out = b""
    for tag, content, form in nodes:
        content = write(content) if isinstance(content, list) else content
        first = bytes([tag & 0xe0 | 0x1f, tag & 0x1f]) if form == "high tag" else bytes([tag])
        if form == "indefinite":
            out += first + b"\x80" + content + b"\0\0"
        elif form == "long":
            out += first + b"\x84" + len(content).to_bytes(4, "big") + content
        else:
            out += first + length(len(content)) + content
    return out


def all_lists(nodes):
    """Every list of nodes in a tree."""
    yield nodes
    for _, content, _ in nodes:
        if isinstance(content, list):
            yield from all_lists(content)


def mutant(chance, der):
    """A certificate that is a little wrong."""
    if chance.random() < 0.3:
        data = bytearray(der)
        for _ in range(chance.choice((1, 1, 2, 4))):
            at = chance.randrange(len(data))
            kind = chance.random()
            if kind < 0.7:
                data[at] = chance.choice((0, 1, 0x7f, 0x80, 0x84, 0xff, data[at] ^ 1 << chance.randrange(8), chance.randrange(256)))
            elif kind < 0.85:
                del data[at:at + chance.randint(1, 4)]
            else:
                data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 4)))
        return bytes(data)
    nodes = tree(der)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        siblings = chance.choice([each for each in all_lists(nodes) if each])
        at = chance.randrange(len(siblings))
        node, kind = siblings[at], chance.randrange(12)
        if kind == 0:
            node[2] = "indefinite"
        elif kind == 1:
            node[2] = "long"
        elif kind == 2:
            node[2] = "high tag"
        elif kind == 3:
            node[0] = chance.choice((0x02, 0x03, 0x04, 0x05, 0x06, 0x0c, 0x13, 0x16, 0x1e, 0x1c, 0x30, 0x31, 0x82, 0x86, 0xa0, 0xa3, 0x24,
                                     node[0] ^ 0x20, chance.randrange(256)))
        elif kind == 4:
            siblings.insert(at, [node[0], node[1], node[2]])
        elif kind == 5 and siblings is not nodes:
            del siblings[at]
        elif kind == 6:
            siblings.insert(chance.randint(0, len(siblings)), siblings.pop(at))
        elif kind == 7:
            siblings.insert(at, [chance.choice((0x05, 0x04, 0x30, 0xa0, 0x9f)), b"\1\2", "short"])
        elif isinstance(node[1], bytes):
            data = bytearray(node[1])
            if kind < 10 and data:
                data[chance.randrange(len(data))] = chance.choice((0, 0x2e, 0x5a, 0x80, 0xff, 0xd8, chance.randrange(256)))
            elif kind == 10:
                data += bytes([chance.choice((0, 0x0a, 0x20, 0x5a, 0x80))])
            else:
                del data[chance.randrange(len(data) + 1):]
            node[1] = bytes(data)
        elif kind == 11:
            node[1] = [[0x24, [[0x04, write(node[1]), "short"]], "short"]]
    return write(nodes)


# ---- the openssl command, for what is whole -------------------------------------------------------

def command_agrees(der):
    """True if the openssl command says the same pin, dates and CNs, and no other name, of a certificate that is right."""
    done = subprocess.run(["openssl", "x509", "-inform", "DER", "-noout", "-startdate", "-enddate", "-subject", "-nameopt",
                           "sep_multiline,utf8,esc_ctrl,esc_2253,sname", "-pubkey"], input=der, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, check=False)          # it fails where it does not take the key
    text, found = done.stdout.decode("utf-8"), nutshim.read_certificate(der)
    key = base64.b64decode("".join(re.search("-----BEGIN PUBLIC KEY-----(.*?)-----END", text, re.S).group(1).split())) \
        if "BEGIN PUBLIC" in text else None

    def seconds(field):
        stamp = re.search(field + r"=(\w+) +(\d+) (\d+):(\d+):(\d+) (\d+) GMT", text).groups()
        month = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split().index(stamp[0]) + 1
        day, hour, minute, second, year = map(int, stamp[1:])
        then = time.strptime("2000-%02d-%02d" % (month, day), "%Y-%m-%d").tm_yday      # of a leap year
        if month > 2 and not (year % 4 == 0 and (year % 100 or year % 400 == 0)):
            then -= 1
        before = year - 1
        days = 365 * before + before // 4 - before // 100 + before // 400 + then - 719163
        return 86400 * days + 3600 * hour + 60 * minute + second

    def unescaped(line):
        data = re.sub(rb"\\([0-9A-F]{2}|.)", lambda match: bytes.fromhex(match.group(1).decode()) if len(match.group(1)) == 2
                      else match.group(1), line.encode("utf-8"))
        return nutshim.printable(data.decode("utf-8"))
    names = [unescaped(part) for line in text.split("\n") if line[:4] == "    " for part in line[4:].split(" + ") if part[:3] == "CN="]
    return (seconds("notBefore"), seconds("notAfter")) == (found.not_before, found.not_after) \
        and names == [each for each in found.names if each.startswith("CN=")] \
        and (key is None or found.pin == "sha256//" + base64.b64encode(hashlib.sha256(key).digest()).decode())


def run(seed, certificates, mutants, command):
    """Counts, and the certificates about which the two disagree; command: how many go through the openssl command too."""
    chance, library = random.Random(seed), Library()
    made = [some_certificate(chance) for _ in range(certificates)]
    wrong = [der for der in made if compare(library, der) != (True, True, True)]
    wrong += [der for der in made[:command] if not command_agrees(der)]
    counts = {"loaded": 0, "read": 0, "both": 0}
    for _ in range(mutants):
        der = mutant(chance, chance.choice(made))
        theirs, own, same = compare(library, der)
        counts["loaded"] += theirs
        counts["read"] += own
        counts["both"] += theirs and own
        if not same:
            wrong.append(der)
    return counts, wrong


def main():
    """The long form."""
    seed = int(sys.argv[1]) if sys.argv[1:] else 1
    counts, wrong = run(seed, 1000, 20000, 1000)
    print("seed %d: 1000 certificates and 20000 mutants; of the mutants OpenSSL loads %d, nutshim.py reads %d, both %d; they "
          "disagree about %d" % (seed, counts["loaded"], counts["read"], counts["both"], len(wrong)))
    for der in wrong[:3]:
        print(der.hex())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
