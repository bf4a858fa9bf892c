# SPDX-License-Identifier: GPL-2.0-or-later
"""Certificates as OpenSSL and nutshim.py read them: made byte by byte, in PEM files of all forms, with their dates;
and what the administrator is told about each."""

import base64
import contextlib
import json
import os
import re
import shutil
import ssl
import sys
import time
import types

import pytest
from certs import LOCAL, openssl
from derwriter import (ALGORITHM, BASIC, CN, O, SAN, certificate, extension, name, new_key, oid, pem, public_key, san,
                       server_file, time_of, tlv)
from harness import ROOT, FalseServer, PlainClient, TlsClient, poll, run, run_shim, tls, write

with contextlib.ExitStack() as _stack:
    _stack.callback(setattr, sys, "dont_write_bytecode", sys.dont_write_bytecode)
    sys.dont_write_bytecode = True
    sys.path.insert(0, ROOT)
    import differential_certificates
    import nutshim

RAW = re.compile(r"_ssl\.c|\[SSL|\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b|Traceback")      # no words for an administrator


def read(path):
    """The text of a file."""
    with open(path, encoding="ascii") as file:
        return file.read()


def pin(spki):
    """The pin of a key."""
    return nutshim.read_certificate(certificate(spki=spki)).pin


# ---- byte by byte ---------------------------------------------------------------------------------

def long_tag(element):
    """The same element with its tag in two bytes."""
    return bytes([element[0] & 0xe0 | 0x1f, element[0] & 0x1f]) + element[1:]


def indefinite(element):
    """The same with an indefinite length. (Its own has one byte.)"""
    return element[:1] + b"\x80" + element[2:] + b"\0\0"


def long_length(element):
    """The same with a length longer than need be. (Its own has one byte.)"""
    return element[:1] + b"\x81" + element[1:]


VALIDITY = tlv(0x30, time_of("200101000000Z"), time_of("99991231235959Z"))
SUBJECT = name((CN, 0x0c, b"localhost"))
EXTENSIONS = san((0x82, b"localhost"))
SERIAL = tlv(0x02, b"\1")
# BER that OpenSSL takes, by what is BER in it, and the reason that is given.
BER = {
    "indefinite signature": ({"algorithm": indefinite(ALGORITHM)}, "indefinite length"),
    "indefinite subject": ({"subject": indefinite(SUBJECT)}, "indefinite length"),
    "indefinite validity": ({"validity": indefinite(VALIDITY)}, "indefinite length"),
    "indefinite extensions": ({"extensions": tlv(0xa3, indefinite(tlv(0x30, EXTENSIONS)))}, "indefinite length"),
    "indefinite attribute": ({"subject": tlv(0x30, indefinite(tlv(0x31, tlv(0x30, oid(CN), tlv(0x0c, b"localhost")))))},
                             "indefinite length"),
    "long tag": ({"subject": long_tag(SUBJECT)}, "tag of more than one byte"),
    "long tag of a parameter": ({"algorithm": tlv(0x30, ALGORITHM[2:], b"\x9f\x12\1x")}, "tag of more than one byte"),
    "long length": ({"subject": long_length(SUBJECT)}, "length that is not the shortest"),
    "long length in validity": ({"validity": tlv(0x30, long_length(time_of("200101000000Z")), time_of("491231235959Z"))},
                                "length that is not the shortest"),
    "other truth": ({"extensions": tlv(0xa3, tlv(0x30, extension(BASIC, tlv(0x30), b"\1\1\1"), EXTENSIONS))}, "truth value"),
    "an algorithm that is not the signed one": ({"outer": tlv(0x30, oid("1.2.840.10045.4.3.3"))}, "algorithm"),
    "bytes behind the names": ({"extensions": tlv(0xa3, tlv(0x30, extension(SAN, tlv(0x30, tlv(0x82, b"localhost")) + b"\5\0")))},
                               "subjectAltName"),
    "a string in pieces": ({"extensions": tlv(0xa3, tlv(0x30, tlv(0x30, oid(SAN), tlv(0x24, tlv(
        0x04, tlv(0x30, tlv(0x82, b"localhost")))))))}, "tag 0x24"),
}


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    """The file of a key."""
    return new_key(tmp_path_factory.mktemp("keys") / "key.pem")


def test_ber_is_refused_by_a_client(shim, key, tmp_path):
    """A server whose certificate OpenSSL takes and that is not DER is refused with the reason, pinned or not; it learns nothing."""
    spki = public_key(key)
    good = server_file(tmp_path, "good", certificate(key, spki=spki), key)
    config, servers, words = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for number, (title, (pieces, reason)) in enumerate([("", ({}, ""))] + list(BER.items())):
            path = server_file(tmp_path, "s%d" % number, certificate(key, spki=spki, **pieces), key)
            server = stack.enter_context(FalseServer(tls(types.SimpleNamespace(file=path))))
            name_of = "case%d" % number
            servers[name_of], words[name_of] = server, (title, reason)
            config[name_of] = {"role": "client", "listen": "127.0.0.1:0", "upstream": "localhost:%d" % server.port,
                               "verify": "pin", "pin": pin(spki)}
        running = shim(config)
        for name_of, (title, reason) in words.items():
            with PlainClient(running.port(name_of)) as client:
                client.send("USERNAME admin\nPASSWORD secretpw\n")
                if title:
                    with contextlib.suppress(ConnectionResetError):
                        assert client.recv_until_close() == b"", title
                    running.wait_log(r"\[%s\].*the peer sent a certificate that cannot be read \(.*%s" % (name_of, reason))
                    assert not any(b"secretpw" in peer.received for peer in servers[name_of].peers), title
                else:
                    assert client.recv_line() == b"OK\n", "the good one of the same make"
    assert "internal error" not in running.log and good


def test_der_is_refused_that_is_in_no_order():
    """Fields that are missing, swapped, doubled or of another type, and bytes behind the end, make no certificate."""
    assert nutshim.read_certificate(certificate()).names == ["CN=localhost", "DNS:localhost"]
    fields = [tlv(0xa0, tlv(0x02, b"\2")), SERIAL, ALGORITHM, name(), VALIDITY, SUBJECT, tlv(
        0x30, tlv(0x30, oid("1.3.101.112")), tlv(0x03, b"\0" + bytes(32))), tlv(0xa3, tlv(0x30, EXTENSIONS))]
    whole = certificate(fields=fields)
    nutshim.read_certificate(whole)
    wrong = {"bytes behind": whole + b"\0", "an element behind": whole + b"\5\0", "cut": whole[:-1], "nothing": b"", "empty": b"\x30\0",
             "two": whole + whole, "a NULL behind the fields": certificate(fields=fields + [b"\5\0"]),
             "version 4": certificate(fields=[tlv(0xa0, tlv(0x02, b"\3"))] + fields[1:]),
             "serial not the shortest": certificate(serial=tlv(0x02, b"\0\1")),
             "an extension twice": certificate(extensions=tlv(0xa3, tlv(0x30, EXTENSIONS, san((0x82, b"admin.lan"))))),
             "no name": certificate(subject=tlv(0x30, tlv(0x31))),
             "unused bits in the key": certificate(spki=tlv(0x30, tlv(0x30, oid("1.3.101.112")), tlv(0x03, b"\1" + bytes(32)))),
             "a third date": certificate(validity=tlv(0x30, *[time_of("200101000000Z")] * 3)),
             "no UTF-8": certificate(subject=name((CN, 0x0c, b"\xff"))), "half a pair": certificate(subject=name((CN, 0x1e, b"\xd8\0"))),
             "odd": certificate(subject=name((CN, 0x1e, b"a"))), "no character": certificate(subject=name((CN, 0x1c, b"\xff" * 4))),
             "an OID that is none": certificate(subject=tlv(0x30, tlv(0x31, tlv(0x30, b"\6\3\x55\x80\3", tlv(0x0c, b"x"))))),
             "a directoryName that is no text": certificate(extensions=tlv(0xa3, tlv(0x30, san((0xa4, name((O, 0x04, b"x"))))))),
             "half a character of a party": certificate(extensions=tlv(0xa3, tlv(0x30, san((0xa5, tlv(0xa1, tlv(0x1e, b"odd"))))))),
             "deep": certificate(algorithm=tlv(0x30, ALGORITHM[2:], deep(50)), outer=tlv(0x30, ALGORITHM[2:], deep(50)))}
    for text in ("2001010000Z", "200101000000+0100", "20200101000000.5Z", "20010100000Z", "200230000000Z", "201301000000Z", "200101240000Z"):
        wrong["the date " + text] = certificate(validity=tlv(0x30, tlv(0x17, text.encode("ascii")), time_of("491231235959Z")))
    for at in range(len(fields)):
        for other in range(at):
            swapped = list(fields)
            swapped[at], swapped[other] = fields[other], fields[at]
            if swapped != fields and {at, other} - {3, 5}:       # the Names have one form
                wrong["%d for %d" % (at, other)] = certificate(fields=swapped)
        wrong["no %d" % at] = certificate(fields=fields[:at] + fields[at + 1:])
        if at not in (0, 7):
            wrong["twice %d" % at] = certificate(fields=fields[:at + 1] + fields[at:])
    for title in ("no 0", "no 7"):
        nutshim.read_certificate(wrong.pop(title))      # which are optional
    wrong.pop("7 for 0", None)
    for title, der in wrong.items():
        with pytest.raises(ValueError, match="cannot be read"):
            pytest.fail("taken: %s: %r" % (title, nutshim.read_certificate(der)))


def deep(levels):
    """Elements inside each other."""
    element = b"\5\0"
    for _ in range(levels):
        element = tlv(0x30, element)
    return element


def test_names_that_look_like_others(shim, nut, key, tmp_path):
    """NUL, wildcard, trailing dot and IPv4-mapped names, and those that are not ASCII, are no permit line's; mixed case is."""
    spki = public_key(key)
    clients = {"nul": (0x82, b"nas.lan\0.evil.lan"), "dot": (0x82, b"nas.lan."), "wildcard": (0x82, b"*.lan"), "uri": (0x86, b"nas.lan"),
               "newline": (0x82, b"nas.lan\n"), "latin": (0x82, b"n\xe4s.lan"), "mapped": (0x87, bytes(10) + b"\xff\xff\xc0\0\2\1"),
               "mask": (0x87, b"\xc0\0\2\1\xff\xff\xff\xff"), "case": (0x82, b"NAS.Lan"), "address": (0x87, b"\xc0\0\2\1")}
    trust = "".join(pem(certificate(key, spki=spki, subject=name((CN, 0x0c, title.encode())), issuer=name((CN, 0x0c, title.encode())),
                                    extensions=tlv(0xa3, tlv(0x30, san(each))))) for title, each in clients.items())
    running = shim({"server": {
        "role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port, "client_certificate": "require",
        "certificate": server_file(tmp_path, "own", certificate(key, spki=spki), key), "trust": write(str(tmp_path / "trust"), trust),
        "permit": "DNS:nas.lan: admin, IP:192.0.2.1: admin, email:nas.lan: admin"}})
    for title, block in zip(clients, re.findall("(?s)-----BEGIN.*?END CERTIFICATE-----\n", trust)):
        own = types.SimpleNamespace(file=write(str(tmp_path / title), read(key) + block))
        with TlsClient(running.port("server"), certificate=own) as client:
            answer = client.ask("NETVER")
            assert answer == (b"1.3\n" if title in ("case", "address") else b"ERR ACCESS-DENIED\n"), title
    running.wait_log("#10 .*closed")
    assert re.search(r"no permit line matches the peer \(CN=nul, DNS:nas\.lan\\x00\.evil\.lan", running.log)
    assert re.search(r"DNS:nas\.lan\\x0a", running.log) and "IP:::ffff:192.0.2.1" in running.log


def test_text_out_of_certificates_is_harmless():
    """Controls, C1, bidi marks and newlines are escaped; commas and quotes inside a name are not taken for its end."""
    found = nutshim.read_certificate(certificate(
        subject=name((O, 0x0c, "a\n\x9b\u202e\U000e0001, CN=\"x\\".encode()), [(CN, 0x0c, b"one"), (O, 0x0c, b" two")], (CN, 0x03, b"\0x")),
        extensions=tlv(0xa3, tlv(0x30, san((0x82, b"a, DNS:admin.lan"), (0x82, b"quo\"te"), (0x81, b"x\x1b[2K"))))))
    assert found.subject == r'O="a\\x0a\\x9b\\u202e\\U000e0001, CN=\"x\\", CN=one + O=" two", 2.5.4.3=#03020078'
    assert found.names == ["CN=one", "DNS:a, dns:admin.lan", 'DNS:quo"te', r"email:x\x1b[2k"]
    assert nutshim.names_text(found.names) == r'CN=one, "DNS:a, dns:admin.lan", "DNS:quo\"te", email:x\x1b[2k'


def test_dates_of_all_centuries():
    """Dates are the seconds since 1970 from 1950 to 9999, leap years right; nothing ends in 2038."""
    for text, seconds in (("500101000000Z", -631152000), ("19500101000000Z", -631152000), ("700101000000Z", 0), ("380119031408Z", 2**31),
                          ("20500101000000Z", 2524608000), ("21000301000000Z", 4107542400), ("20000229235959Z", 951868799),
                          ("99991231235959Z", 253402300799)):
        found = nutshim.read_certificate(certificate(validity=tlv(0x30, time_of(text), time_of(text))))
        assert found.not_before == found.not_after == seconds, text
    for text in ("310101000000Z\n", "310101000000", "310101000000z", "311301000000Z", "20310101000000", "310230000000Z"):
        with pytest.raises(ValueError):
            nutshim.read_certificate(certificate(validity=tlv(0x30, tlv(0x17, text.encode("ascii")), time_of("99991231235959Z"))))


def test_nutshim_and_openssl_agree():
    """Of whatever OpenSSL loads and nutshim.py reads, both have the same names, pin, dates and CA flag. (A short form: the
    long one is `python3 tests/differential_certificates.py`.)"""
    try:
        counts, wrong = differential_certificates.run(7, 100, 1200, 20)
    except OSError as error:
        pytest.skip(str(error))
    assert not wrong, wrong[0].hex()
    assert counts["both"] > 200 and counts["loaded"] > counts["both"], counts


# ---- PEM files ------------------------------------------------------------------------------------

def check(tmp_path, text):
    """-t of a configuration, each shim of which gets ports of its own: the CompletedProcess, its words fit for an administrator."""
    text = text.replace("\nrole", "\nlisten = localhost:0\nrole")
    done = run_shim("-t", "-f", write(str(tmp_path / "nutshim.conf"), text))
    assert not RAW.search(re.sub(r"/\S*", "", done.stdout + done.stderr)), done
    return done


def test_damaged_pem_files_are_named(pki, tmp_path):
    """Whatever OpenSSL would pass over, or refuse without a word about the file, is a fault with file, line and what to do."""
    own, cert, ca, other = read(pki.server.key), read(pki.server.cert), read(pki.ca.cert), read(pki.other_ca.cert)
    body = cert.split("\n")
    tight = openssl("x509", "-in", pki.ca.cert, "-trustout")
    old = ca.replace("CERTIFICATE", "X509 CERTIFICATE")
    cases = {
        "certificate": {
            "dash lost": (own + cert[1:], "damaged BEGIN"), "dash lost in END": (own + cert.rstrip("\n")[:-1] + "\n", "damaged BEGIN or END"),
            "dash lost in the key": (own[1:] + cert, "damaged BEGIN"), "long dash": (own + cert.replace("-----BEGIN", "\u2014BEGIN"), "damaged"),
            "joined": (own.rstrip("\n") + cert, "joined END and BEGIN line"), "indented": (own + "  " + "\n  ".join(body[:-1]), "blanks"),
            "base64": (own + cert.replace(body[2], body[2][:-1] + "!"), "line 8: damaged base64"),
            "a line lost": (own + cert.replace(body[2] + "\n", ""), "cannot be read"),
            "a letter lost": (own + cert.replace(body[2], body[2][1:]), "damaged base64"), "trusted": (own + openssl(
                "x509", "-in", pki.server.cert, "-trustout"), "openssl x509 -in .*writes a plain one"),
            "trusted in the chain": (own + cert + tight, "TRUSTED"), "cut": (own + cert[:200], "no END line"), "other END": (
                own + cert.replace("END CERTIFICATE", "END X509 CRL"), "expected -----END CERTIFICATE-----"),
            "no BEGIN": (own + "\n".join(body[1:]), "expected its BEGIN"), "no key": (cert, "private key"),
            "der": (pki.server.der, "openssl x509 -inform DER"), "damaged key": (own.replace(own.split("\n")[1], own.split("\n")[1][::-1]) + cert,
                                                                                "OpenSSL cannot use it"),
            "empty line": (own + cert.replace(body[2], "\n" + body[2]), "line 8: an empty line in this block"),
            "all lines doubled": ((own + cert).replace("\n", "\r\n\n"), "line 2: an empty line"),
        },
        "trust": {
            "dash lost": (ca[1:], "damaged"), "a damaged second": (ca + other.replace("MII", "!!!", 1), "damaged base64"),
            "dash lost in the second": (ca + other[1:], "damaged"), "trusted": (tight, "TRUSTED CERTIFICATE"),
            "six dashes": (ca + other.replace("ATE-----", "ATE------"), "damaged BEGIN"), "lower case": (
                ca + other.replace("BEGIN CERTIFICATE", "begin certificate"), "damaged BEGIN"), "a blank": (
                ca + other.replace("ATE-----", "ATE -----"), "damaged BEGIN"), "misspelt": (
                ca + other.replace("CERTIFICATE", "CERTFICATE"), "a certificate under the heading CERTFICATE"),
            "two blanks": (ca + re.sub("(BEGIN|END) ", r"\1  ", other), "damaged BEGIN"), "empty line": (
                ca + other.replace("\n-----END", "\n\n-----END"), "an empty line"),
            "trusted among others": (ca + tight, "TRUSTED CERTIFICATE"), "ber": (ca + pem(certificate(subject=indefinite(SUBJECT))), "indefinite"),
            "list": (ca + read(pki.crl), "revocation list, which counts only as crl"), "a list alone": (read(pki.crl), r"set crl = \S*list"),
        }}
    text, expected = "", {}
    for option, files in cases.items():
        for title, (content, words) in files.items():
            path = str(tmp_path / ("%s %s" % (option, title)).replace(" ", "-"))
            with open(path, "wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode("utf-8"))
            section = os.path.basename(path)
            text += "[%s]\nrole = %s\n%s = %s\n" % (section, "server" if option == "certificate" else "client\nupstream = localhost",
                                                   option, path)
            expected[section] = (option, path, words)
    done = check(tmp_path, text)
    assert done.returncode == 1
    for section, (option, path, words) in expected.items():
        assert re.search(r"nutshim\.conf:\d+: \[%s\] %s: %s: .*%s" % (section, option, re.escape(path), words), done.stderr), (
            section, [line for line in done.stderr.split("\n") if "[%s]" % section in line])
    assert old


def test_no_key_material_is_told(pki, tmp_path):
    """A damaged key file is told of without a piece of the key."""
    own = read(pki.server.key)
    lines = own.split("\n")
    for number, damaged in enumerate((own.replace("\n-----END", "-----END"), own.replace(lines[0] + "\n", lines[0]), own[:-30],
                                      own.replace(lines[1], lines[1] + "!"))):
        path = write(str(tmp_path / str(number)), damaged)
        done = check(tmp_path, "[s]\nrole = server\ncertificate = %s\nkey = %s\n" % (pki.server.cert, path))
        assert done.returncode == 1 and path in done.stderr, done
        assert not any(line[at:at + 8] in done.stderr for line in lines[1:-2] for at in range(len(line) - 8)), done


def test_pem_files_of_all_forms(pki, tmp_path, shim, nut):
    """CRLF, BOM, Bag Attributes, text, comments, EC PARAMETERS, X509 CERTIFICATE, no last newline, duplicates, the root in the
    chain, a long chain: all work, and the whole chain is sent."""
    own, cert, ca, key = read(pki.chained.file), read(pki.chained.cert), read(pki.ca.cert), read(pki.chained.key)
    bag = "Bag Attributes\n    localKeyID: 01 02\n    friendlyName: own\nKey Attributes: <No Attributes>\n"
    forms = {
        "crlf": own.replace("\n", "\r\n"), "bom": "\ufeff" + own, "bag": bag + key + bag + own[len(key):], "text": openssl(
            "x509", "-in", pki.chained.cert, "-text") + own[len(key) + len(cert):] + key, "comments": "# -----BEGIN CERTIFICATE-----\n# x\n" + own,
        "parameters": openssl("ecparam", "-name", "prime256v1") + own, "old": own.replace(" CERTIFICATE", " X509 CERTIFICATE"),
        "no newline": own.rstrip("\n"), "control-Z": own + "\x1a", "twice": key + cert + cert + own[len(key) + len(cert):] * 2,
        "root": own + ca, "long": own + ca * 218, "blanks": own.replace("\n", "  \t\n"), "old key": openssl("ec", "-in", pki.chained.key) + own[len(key):],
    }
    if ssl.OPENSSL_VERSION_INFO < (3,):
        del forms["bom"]                                # which OpenSSL 1.1.1 does not pass over
    running = shim({title.replace(" ", "-"): {
        "role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port,
        "certificate": put(tmp_path / title.replace(" ", "-"), form)} for title, form in forms.items()})
    for title in forms:
        with TlsClient(running.port(title.replace(" ", "-")), ca=pki.ca.cert) as client:
            assert client.ask("NETVER") == b"1.3\n", title


def put(path, text):
    """Write a file in UTF-8, its newlines as they are; its path."""
    with open(path, "wb") as file:
        file.write(text.encode("utf-8"))
    return str(path)


def test_certificates_of_all_kinds(tmp_path):
    """Ed448, RSA-PSS, P-384 and RSA certificates are read with the pins that openssl gives them, by -t and by mkNUTcert.py show."""
    kinds = {"Ed448": ["ed448"], "RSA-PSS 2048": ["rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048"], "RSA 2048": ["rsa:2048"],
             "EC P-384": ["ec", "-pkeyopt", "ec_paramgen_curve:P-384"]}
    text, pins = "", {}
    for kind, options in kinds.items():
        base = str(tmp_path / kind.replace(" ", ""))
        openssl("req", "-x509", "-newkey", *options, "-nodes", "-keyout", base + ".key", "-out", base + ".pem", "-subj", "/CN=x", "-days", "9")
        text += "[%s]\nrole = server\ncertificate = %s.pem\nkey = %s.key\n" % (os.path.basename(base), base, base)
        pins[kind] = pin(public_key(base + ".key"))
        shown = mk("show", base + ".pem")[1]
        assert "key:     %s\n" % kind in shown and pins[kind] in shown, shown
    done = check(tmp_path, text)
    assert done.returncode == 0 and all("pin = %s\n" % each in done.stdout for each in pins.values()), done


def test_roots_that_are_renewed_or_cross_signed(shim, pki, tmp_path):
    """Several certificates of one CA, renewed with the same key or signed by another CA, are all in trust and all told of."""
    config, ca = os.path.join(pki.ca.path, "config"), os.path.splitext(pki.ca.cert)[0]
    for title, how in (("renewed", ["-selfsign"]), ("crossed", ["-cert", pki.other_ca.cert, "-keyfile", pki.other_ca.key])):
        openssl("ca", "-batch", "-notext", "-config", config, "-in", ca + ".csr", "-extfile", ca + ".ext", "-out",
                str(tmp_path / title), "-startdate", "20200101000000Z", "-enddate", "20600101000000Z", *how)
    trust = write(str(tmp_path / "trust"), read(tmp_path / "renewed") + read(tmp_path / "crossed") + read(pki.ca.cert))
    with FalseServer(tls(pki.chained)) as server:
        running = shim({"c": {"role": "client", "listen": "127.0.0.1:0", "upstream": "localhost:%d" % server.port, "trust": trust}})
        with PlainClient(running.port("c")) as client:
            client.send("USERNAME x\n")
            assert client.recv_line() == b"OK\n"
    told = "trusted certificate in %s (CN=Test CA)" % trust
    poll(lambda: running.log.count(told) == 3, 5, lambda: "three lines in:\n" + running.log)


def test_trust_of_all_forms(pki, tmp_path):
    """The same for trust: how many certificates it holds is told, and OpenSSL holds as many."""
    ca, other = read(pki.ca.cert), read(pki.other_ca.cert)
    forms = {"crlf": (ca + other).replace("\n", "\r\n"), "bom": "\ufeff" + ca + other, "old": (ca + other).replace(" CERT", " X509 CERT"),
             "twice": ca + other + ca, "text": openssl("x509", "-in", pki.ca.cert, "-text") + other, "key": read(pki.other_ca.key) + ca + other}
    text = "".join("[%s]\nrole = client\nupstream = localhost\ntrust = %s\n" % (title, put(tmp_path / title, form)) for title, form in forms.items())
    done = check(tmp_path, text)
    assert done.returncode == 0 and done.stdout.count("(CN=Test CA)") == done.stdout.count("(CN=Other CA)") == len(forms), done


def test_a_bundle_is_one_line(tmp_path):
    """Certificates in trust are told one by one, with their subjects; more than a few are one line with the first to end."""
    def some(count):
        return "".join(pem(certificate(subject=name((CN, 0x0c, b"CA %d" % number)), issuer=name((CN, 0x0c, b"CA %d" % number)), serial=tlv(
            0x02, bytes([1 + number])), validity=tlv(0x30, time_of("200101000000Z"), time_of("%dZ" % (20500101000000 + number * 10**10)))))
                       for number in range(count))
    text = ""
    for count in (3, 40):
        text += "[c%d]\nrole = client\nupstream = localhost\ntrust = %s\n" % (count, write(str(tmp_path / ("t%d" % count)), some(count)))
    done = check(tmp_path, text)
    assert done.returncode == 0 and done.stdout.count("trusted certificate in") == 3, done
    assert re.search(r"40 trusted certificates in \S*t40, the first to end \(CN=CA 0\) expires in \d+ days", done.stdout), done


# ---- dates ----------------------------------------------------------------------------------------

def stamp(days):
    """A moment so many days from now."""
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + days * 86400 + 600))


@pytest.fixture(scope="module")
def ending(pki):
    """Certificates and lists that end in so many days, or begin."""
    found = {days: pki.ca.issue("ends%d" % days, LOCAL, end=stamp(days)) for days in (-3, 5, 400)}
    found["later"] = pki.ca.issue("later", LOCAL, start=stamp(7))
    for title, end in (("past", "20200201000000Z"), ("soon", stamp(4))):
        found[title] = os.path.join(pki.path, title + ".crl")
        openssl("ca", "-config", os.path.join(pki.ca.path, "config"), "-gencrl", "-out", found[title],
                "-crl_lastupdate", "20200101000000Z", "-crl_nextupdate", end)
    return found


def test_all_that_is_loaded_is_watched(ending, pki, tmp_path, shim):
    """Own certificate, each of its chain, each in trust and each revocation list: -t, the log, the status and Prometheus tell of
    its dates, with its subject or issuer and its file; what does not hold is a warning in -t and an error in the log."""
    own = write(str(tmp_path / "own.pem"), read(ending[400].file) + read(ending[-3].cert) + read(ending["later"].cert))
    crl = write(str(tmp_path / "crl.pem"), read(ending["past"]) + read(ending["soon"]))
    trust = write(str(tmp_path / "trust.pem"), read(pki.ca.cert) + read(ending[5].cert))
    config = {"s": {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:1", "certificate": own, "crl": crl, "trust": trust,
                    "client_certificate": "require"}}
    expected = [("own certificate", own, "CN=ends400", "expires in 400 days", "info"),
                ("chain certificate", own, "CN=ends-3", r"expired \d days ago", "error"),
                ("chain certificate", own, "CN=later", "is not valid yet, but in 8 days", "error"),
                ("trusted certificate in", trust, "CN=Test CA", "never expires", "info"),
                ("trusted certificate in", trust, "CN=ends5", "expires in 5 days", "warning"),
                ("revocation list", crl, "CN=Test CA", r"expired \d+ days ago", "error"),
                ("revocation list", crl, "CN=Test CA", "expires in 4 days", "warning")]
    running = shim(config)
    done = run_shim("-t", "-f", running.config)
    table = run_shim("-c", "status", "-f", running.config).stdout
    for kind, path, subject, words, level in expected:
        line = r"%s %s \(%s\) %s" % (kind, re.escape(path), subject, words)
        running.wait_log(level + r": \[s\] " + line)
        assert re.search("(?m)^%s%s$" % ("    " if level == "info" else "warning: ", line), done.stdout), done
        assert re.search("(?m)^    %s$" % line, table), table
    assert done.returncode == 0 and not RAW.search(re.sub(r"/\S*", "", done.stdout + running.log))
    found = json.loads(run_shim("-c", "status", "--json", "-f", running.config).stdout)["shims"][0]["certificates"]
    assert [each["days_left"] for each in found][:2] == [400, found[1]["days_left"]] and found[1]["days_left"] < 0
    assert [each["days_left"] for each in found if "never" in each["holds"]] == [None]


def test_prometheus_is_well_formed(shim, key, tmp_path):
    """Each metric has HELP and TYPE before it, no series stands twice, labels are escaped, and what never ends is +Inf."""
    one = certificate(key, spki=public_key(key), subject=name((CN, 0x0c, b"a\"b\\c\nd")))
    again = certificate(key, spki=public_key(key), subject=name((CN, 0x0c, b"a\"b\\c\nd")), serial=tlv(0x02, b"\2"),
                        validity=tlv(0x30, time_of("200101000000Z"), time_of("20600101000000Z")))
    trust = write(str(tmp_path / "trust.pem"), pem(one) + pem(again))
    running = shim({"c": {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:1", "trust": trust},
                    "s": {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:1",
                          "certificate": server_file(tmp_path, "own", one, key)}})
    text = run_shim("-c", "status", "--prometheus", "-f", running.config).stdout
    seen, metric, series = [], None, []
    for line in text.splitlines():
        words = line.split(" ", 3)
        if words[:2] == ["#", "HELP"]:
            metric = words[2]
            seen.append(metric)
        elif words[:2] == ["#", "TYPE"]:
            assert words[2] == metric and words[3] in ("gauge", "counter")
        else:
            match = re.match(r'(%s(?:\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\})?) (\+Inf|-?\d+)$' % metric, line)
            assert match, line
            series.append(match.group(1))
    assert len(set(seen)) == len(seen) and len(set(series)) == len(series), text
    days = [line for line in text.splitlines() if line.startswith("nutshim_certificate_days_left{")]
    assert len(days) == 2 and days[1].endswith(" +Inf") and not days[0].endswith("+Inf"), days


# ---- what is said ---------------------------------------------------------------------------------

def says(shim, server, **options):
    """The log of a client shim that is refused by the certificate of a server's file."""
    with FalseServer(tls(types.SimpleNamespace(file=server))) as upstream:
        running = shim({"c": dict({"role": "client", "listen": "127.0.0.1:0", "upstream": "localhost:%d" % upstream.port}, **options)})
        with PlainClient(running.port("c")) as client:
            client.send("NETVER\n")
            assert client.recv_until_close() == b""
        running.wait_log("no upstream")
        probe = run_shim("-p", "c", "-f", running.config)
        assert probe.returncode == 1 and not RAW.search(re.sub(r"/\S*", "", running.log + probe.stdout)), (running.log, probe)
        return running.log, probe.stdout


def test_whose_certificate_it_was(shim, pki, tmp_path):
    """A message about dates says whether it was the peer's certificate, its issuer's, or one in the own trust."""
    root, late = pki.ca, type(pki.ca)(os.path.join(pki.path, "late"), "/CN=Late CA")
    sub, expired = type(pki.ca)(os.path.join(pki.path, "ending-sub"), "/CN=Ended Sub", parent=late), pki.expired
    config = os.path.join(late.path, "config")
    openssl("ca", "-batch", "-notext", "-config", config, "-in", os.path.splitext(sub.cert)[0] + ".csr", "-out", sub.cert, "-extfile",
            os.path.splitext(sub.cert)[0] + ".ext", "-startdate", "20200101000000Z", "-enddate", "20210101000000Z")
    leaf = sub.issue("under", LOCAL)
    chain = write(str(tmp_path / "chain.pem"), read(leaf.key) + read(leaf.cert) + read(sub.cert))
    openssl("ca", "-batch", "-notext", "-config", config, "-selfsign", "-in", late.path + "/ca.csr", "-out", str(tmp_path / "old-root.pem"),
            "-extfile", late.path + "/ca.ext", "-startdate", "20200101000000Z", "-enddate", "20210101000000Z")
    plain = late.issue("plain", LOCAL)
    chains = sys.version_info >= (3, 10)                # before, Python does not tell what a server has sent
    log, _ = says(shim, expired.file, trust=root.cert)
    assert (": its certificate has expired: renew it" if chains else "or its issuer's, has expired") in log
    log, _ = says(shim, chain, trust=late.cert)
    assert ("its issuer's certificate (CN=Ended Sub) has expired" if chains else "or its issuer's, has expired") in log
    log, _ = says(shim, plain.file, trust=str(tmp_path / "old-root.pem"))
    assert re.search(r"trusted certificate in \S*old-root.pem \(CN=Late CA\) has expired", log)


def test_a_name_that_does_not_fit(shim, pki, key, tmp_path):
    """CN without subjectAltName, an address as a DNS name, another name: each has its own words and cure, in log and -p."""
    spki = public_key(key)
    cases = {
        "cn": (certificate(key, spki=spki, extensions=b""), {}, "has no subjectAltName, .*make a new one with one .DNS:localhost"),
        "address": (certificate(key, spki=spki, extensions=tlv(0xa3, tlv(0x30, san((0x82, b"192.0.2.9"))))), {"server_name": "192.0.2.9"},
                    "has the address as DNS:192.0.2.9; make a new one with IP:192.0.2.9"),
        "other": (certificate(key, spki=spki, extensions=tlv(0xa3, tlv(0x30, san((0x82, b"nas.lan"))))), {},
                  "is for DNS:nas.lan, not for localhost: set server_name")}
    for title, (der, options, words) in cases.items():
        path = server_file(tmp_path, title, der, key)
        log, probe = says(shim, path, trust=write(str(tmp_path / (title + ".trust")), pem(der)), **options)
        assert re.search("no upstream.*its certificate .*(%s|not for this)" % words, log), log
        assert re.search(words, probe) and "localhost, not for localhost" not in probe, probe
    assert pki


def test_weak_keys_and_digests_in_words(tmp_path):
    """An own certificate that OpenSSL's security level does not allow is told of in words."""
    for title, options, words in (("rsa1024", ("rsa:1024", "-sha256"), "too short"), ("sha1", ("rsa:2048", "-sha1"), "SHA-1")):
        base = str(tmp_path / title)
        openssl("req", "-x509", "-newkey", options[0], options[1], "-nodes", "-keyout", base + ".key", "-out", base + ".crt", "-subj", "/CN=x")
        openssl("req", "-new", "-key", base + ".key", "-subj", "/CN=y", "-out", base + ".csr")
        openssl("x509", "-req", options[1], "-in", base + ".csr", "-CA", base + ".crt", "-CAkey", base + ".key", "-set_serial", "2", "-out", base + ".leaf")
        done = check(tmp_path, "[s]\nrole = server\ncertificate = %s.leaf\nkey = %s.key\n" % (base, base))
        if done.returncode == 0:
            pytest.skip("this machine's OpenSSL allows them")
        assert re.search(re.escape(base) + ".*" + words, done.stderr), done


def test_a_list_for_every_ca(shim, pki, tmp_path):
    """With crl set, a CA without a list is named: in -t where trust has it, in the log where the peer's chain has it."""
    text = "[c]\nrole = client\nupstream = localhost\ntrust = %s\ncrl = %s\n" % (
        write(str(tmp_path / "both"), read(pki.ca.cert) + read(pki.other_ca.cert)), pki.crl)
    done = check(tmp_path, text)
    assert done.returncode == 0 and re.search(r"warning: \S*:6: \[c\] crl: no revocation list of CN=Other CA, which trust has", done.stdout), done
    log, _ = says(shim, pki.chained.file, trust=pki.ca.cert, crl=pki.crl)
    who = "CN=Test Intermediate CA" if sys.version_info >= (3, 10) else "its issuer"
    assert "no revocation list (crl) of %s: with crl set, each CA" % who in log, log


def test_another_ca_of_the_same_name(shim, pki, tmp_path):
    """Where trust, crl or the chain has a certificate that does not fit though its name does, log and -p say which and why."""
    other = type(pki.ca)(str(tmp_path / "other"), "/CN=Test CA")
    openssl("req", "-new", "-key", pki.server.key, "-subj", "/CN=localhost", "-out", str(tmp_path / "csr"))
    extensions = write(str(tmp_path / "extensions"), "subjectAltName=DNS:localhost\nauthorityKeyIdentifier=none\n")

    def signed(title, issuer):
        openssl("x509", "-req", "-in", str(tmp_path / "csr"), "-CA", issuer.cert, "-CAkey", issuer.key, "-set_serial", "9", "-extfile", extensions,
                "-out", str(tmp_path / title))
        return write(str(tmp_path / (title + ".pem")), read(pki.server.key) + read(tmp_path / title) + read(issuer.cert))
    for server, crl, words in ((signed("leaf", other), pki.crl, "trust has another CA with the name of its issuer"),
                               (pki.server.file, other.crl(), "revocation list (crl) is from another CA with the name"),
                               (signed("under", pki.client), None, "its issuer's certificate is not one of a CA")):
        log, probe = says(shim, server, trust=pki.ca.cert, **{"crl": crl} if crl else {})
        assert words in log and words in probe, (log, probe)


@pytest.mark.parametrize("value, good", [
    ("localhost", True), ("localhost.", True), ("UPS_box.lan", True), ("192.0.2.1", True), ("2001:db8::1", True), ("b\u00fccher.lan", False),
    ("ups.lan, nas.lan", False), ("ups.lan:401", False), ("[::1]", False), ("ups lan", False), ("*.lan", False), ("ups..lan", False), (".", False),
    ("fe80::1%eth0", False)])
def test_server_name_is_checked(pki, tmp_path, value, good):
    """server_name is one host name or address in ASCII, without port, list or blank; a dot at its end is taken off."""
    path = put(tmp_path / "nutshim.conf", "[c]\nrole = client\nupstream = localhost.\ntrust = %s\nserver_name = %s\n" % (pki.ca.cert, value))
    done = run_shim("-t", "-f", path)
    assert done.returncode == (not good), done
    assert good or re.search(r"nutshim\.conf:5: \[c\] server_name: expected one host name or address", done.stderr), done
    assert not good or "localhost:401" in done.stdout


def test_a_dot_at_the_end_of_a_name(shim, nut, pki):
    """upstream and server_name may end with the root's dot, which no certificate has."""
    server = shim({"s": {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port, "certificate": pki.server.file}})
    port = server.port("s")
    running = shim({"c": {"role": "client", "listen": "127.0.0.1:0", "upstream": "localhost.:%d" % port, "trust": pki.ca.cert},
                    "d": {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % port, "trust": pki.ca.cert,
                          "server_name": "localhost."}})
    for section in "cd":
        with PlainClient(running.port(section)) as client:
            assert client.ask("NETVER") == b"1.3\n"


def test_what_closes_a_file(tmp_path):
    """The folders and files that an account cannot enter or read are found, behind links too, and the commands open them."""
    account = types.SimpleNamespace(pw_name="nobody", pw_uid=65534, pw_gid=65534)
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chmod(tmp_path, 0o755)
    live, archive = tmp_path / "live", tmp_path / "archive"
    for path in (live, archive):
        path.mkdir()
        path.chmod(0o700)
    write(str(archive / "key1.pem"), "x", 0o600)
    (live / "key.pem").symlink_to("../archive/key1.pem")
    own = write(str(archive / "own.pem"), "x", 0o000)
    os.chown(own, account.pw_uid, -1)
    start = nutshim.closed_steps(str(tmp_path), account)        # pytest's own folders may be closed

    def closed(path):
        return [each for each in nutshim.closed_steps(str(path), account) if each not in start]
    assert [place for place, _ in closed(live / "key.pem")] == [str(live), str(archive), str(archive / "key1.pem")]
    assert closed(own)[-1] == (own, ["chmod u+r " + own])
    for _, commands in closed(live / "key.pem"):
        for command in commands:
            assert run(*command.split()).returncode == 0
    assert closed(live / "key.pem") == [] and oct(os.stat(live).st_mode)[-3:] == "710"
    assert closed(tmp_path / "missing") == []


# ---- mkNUTcert.py ---------------------------------------------------------------------------------

def mk(*args, script=os.path.join(ROOT, "mkNUTcert.py"), options=()):
    """Run mkNUTcert.py; (exit code, what it printed)."""
    done = run(sys.executable, *options, script, *map(str, args))
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_show_believes_no_certificate(key, tmp_path):
    """Whatever a certificate says of itself, show prints its true pin, and nothing that a terminal would obey."""
    other = base64.b64encode(public_key(new_key(tmp_path / "other.pem"))).decode("ascii")
    spki = public_key(key)
    evil = {"a PEM block in O": {"subject": name((O, 0x0c, b"-----BEGIN PUBLIC KEY-----%s-----END PUBLIC KEY-----" % other.encode()), (CN, 0x0c, b"x"))},
            "newlines": {"subject": name((O, 0x0c, b"\nX509v3 Basic Constraints:\n    CA:TRUE")), "extensions": tlv(0xa3, tlv(0x30, san(
                (0x86, b"x:\nX509v3 Basic Constraints: \n    CA:TRUE\nsubject=CN=good\n"))))},
            "escapes": {"subject": name((CN, 0x0c, "a\x1b[2K\x9b2Kb\u202e".encode()))}}
    for title, pieces in evil.items():
        der = certificate(key, spki=spki, **pieces)
        code, text = mk("show", write(str(tmp_path / "x.pem"), pem(der)))
        assert code == 0 and "    pin:     %s\n" % pin(spki) in text and "of a CA" not in text, (title, text)
        assert text.count("\n") == 9 and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), (title, text)
        code, text = mk("check", str(tmp_path / "x.pem"), "-d", tmp_path)
        assert code == 1 and "all good" not in text, (title, text)
    code, text = mk("show", write(str(tmp_path / "ber.pem"), pem(certificate(subject=indefinite(SUBJECT)))))
    assert code == 1 and "ber.pem: certificate 1: " in text and "an indefinite length" in text


def test_check_says_what_it_could_not_check(pki, tmp_path):
    """Without the CA or its revocation list at hand check says what it could not find out, and names the CA."""
    code, text = mk("check", pki.server.cert, "-d", tmp_path)
    assert code == 1 and "who issued it could not be checked: its CA CN=Test CA is not at hand" in text and "--trust FILE" in text, text
    code, text = mk("check", pki.server.cert, "--trust", pki.ca.cert, "-d", tmp_path)
    assert code == 0 and re.search("not checked: whether CN=localhost is revoked: no CRL of CN=Test CA is at hand", text), text
    code, text = mk("check", pki.server.cert, pki.crl, "--trust", pki.ca.cert, "-d", tmp_path)
    assert code == 0 and "not checked" not in text, text
    code, text = mk("check", pki.sub_ca.cert, "-d", tmp_path)
    assert "not checked: who issued CN=Test Intermediate CA: its CA CN=Test CA is not at hand" in text, text


def test_the_reader_is_nutshims(pki, tmp_path):
    """mkNUTcert.py reads with the nutshim.py beside it, isolated or not, leaves no __pycache__, and says so where there is none;
    what reads no certificate works without."""
    alone = shutil.copy(os.path.join(ROOT, "mkNUTcert.py"), str(tmp_path))
    code, text = mk("show", pki.ca.cert, script=alone)
    assert code == 1 and "nutshim.py: is missing" in text and "put nutshim.py beside mkNUTcert.py" in text
    assert mk("-y", "-d", tmp_path, script=alone)[0] == 0
    shutil.copy(os.path.join(ROOT, "nutshim.py"), str(tmp_path))
    link = tmp_path / "bin"
    link.mkdir()
    (link / "mk").symlink_to(alone)
    for script, options in ((alone, ()), (alone, ("-I",)), (str(link / "mk"), ("-I", "-S"))):
        code, text = mk("show", pki.ca.cert, script=script, options=options)
        assert code == 0 and pki.ca.pin in text, text
    assert not [each for each in os.listdir(tmp_path) if "cache" in each]
