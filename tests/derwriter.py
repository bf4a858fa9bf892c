# SPDX-License-Identifier: GPL-2.0-or-later
"""Certificates made byte by byte, right and wrong ones: what the openssl command does not make."""

import base64
import os
import ssl
import subprocess

from harness import clean_env, write


def tlv(tag, *contents):
    """A DER element (X.690 8.1)."""
    content = b"".join(contents)
    return bytes([tag]) + length(len(content)) + content


def length(size):
    """A DER length (X.690 10.1)."""
    if size < 0x80:
        return bytes([size])
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(octets)]) + octets


def oid(text):
    """An object identifier."""
    numbers = [int(word) for word in text.split(".")]
    content = b""
    for number in [40 * numbers[0] + numbers[1]] + numbers[2:]:
        octets = [number & 0x7f]
        while number > 0x7f:
            number >>= 7
            octets.insert(0, 0x80 | number & 0x7f)
        content += bytes(octets)
    return tlv(0x06, content)


CN, O, OU, C, EMAIL = "2.5.4.3", "2.5.4.10", "2.5.4.11", "2.5.4.6", "1.2.840.113549.1.9.1"
SAN, BASIC, USAGE = "2.5.29.17", "2.5.29.19", "2.5.29.15"
ALGORITHM = tlv(0x30, oid("1.2.840.10045.4.3.2"))       # ecdsa-with-SHA256
SPKI = tlv(0x30, tlv(0x30, oid("1.3.101.112")), tlv(0x03, b"\0" + bytes(range(32))))


def name(*relatives):
    """A Name; each relative is (oid, tag, value), or a list of those for one of several values."""
    return tlv(0x30, *[tlv(0x31, *sorted(tlv(0x30, oid(kind), tlv(tag, value)) for kind, tag, value in (
        relative if isinstance(relative, list) else [relative]))) for relative in relatives])


def time_of(text):
    """UTCTime or GeneralizedTime, by its length."""
    return tlv(0x18 if len(text) == 15 else 0x17, text.encode("ascii"))


def extension(kind, value, critical=b""):
    """An extension of a value's DER; critical as its BOOLEAN's bytes."""
    return tlv(0x30, oid(kind), critical, tlv(0x04, value))


def san(*names):
    """The subjectAltName of (tag, value) pairs."""
    return extension(SAN, tlv(0x30, *[tlv(tag, value) for tag, value in names]))


def certificate(signer=None, outer=ALGORITHM, behind=b"", fields=None, **pieces):
    """A certificate (RFC 5280 4.1). pieces replace its fields' bytes; fields all of them; signer is a key's file."""
    parts = {"version": tlv(0xa0, tlv(0x02, b"\2")), "serial": tlv(0x02, b"\1"), "algorithm": ALGORITHM,
             "issuer": name((CN, 0x0c, b"Test")), "validity": tlv(0x30, time_of("200101000000Z"), time_of("99991231235959Z")),
             "subject": name((CN, 0x0c, b"localhost")), "spki": SPKI,
             "extensions": tlv(0xa3, tlv(0x30, san((0x82, b"localhost"))))}
    assert not set(pieces) - set(parts), pieces
    parts.update(pieces)
    body = tlv(0x30, *(fields or parts.values()))
    signature = bytes(64)
    if signer:
        signature = subprocess.run(["openssl", "dgst", "-sha256", "-sign", signer], input=body, stdout=subprocess.PIPE,
                                   check=True, env=clean_env()).stdout
    return tlv(0x30, body, outer, tlv(0x03, b"\0" + signature)) + behind


def public_key(key):
    """The SubjectPublicKeyInfo of a key's file."""
    done = subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-outform", "DER"], stdout=subprocess.PIPE, check=True,
                          env=clean_env())
    return done.stdout


def new_key(path):
    """Make a P-256 key in a file; its path."""
    subprocess.run(["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(path)],
                   check=True, env=clean_env(), stderr=subprocess.DEVNULL)
    return str(path)


def pem(der, kind="CERTIFICATE"):
    """PEM of DER."""
    return "-----BEGIN %s-----\n%s-----END %s-----\n" % (kind, base64.encodebytes(der).decode("ascii"), kind)


def server_file(folder, title, der, key):
    """A file with a certificate and its key, for a TLS server."""
    with open(key, encoding="ascii") as file:
        return write(os.path.join(str(folder), title + ".pem"), file.read() + ssl.DER_cert_to_PEM_cert(der))
