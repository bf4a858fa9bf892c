# SPDX-License-Identifier: GPL-2.0-or-later
"""nutshim.conf and the command line: what is taken, what is refused and in which words, and that the
sample, README and -h say what the options table says.

Most tests call main() itself; those about exit codes and about where files are found run the program.
"""

import os
import random
import re
import shutil
import sys

import pytest
from certs import openssl
from harness import IS_ROOT, NUTSHIM, ROOT, clean_env, run, run_shim, write

sys.path.insert(0, ROOT)
# pylint: disable=wrong-import-position
import nutshim  # noqa: E402
from nutshim import OPTIONS, read_config  # noqa: E402

PIN = "sha256//" + "A" * 43 + "="
PLACES = {"global": ("",), "shim": ("server", "client"), "server": ("server",), "client": ("client",)}

# option: values that are good, and values that are bad with words of the message.
VALUES = {
    "user": (["root"], [("no-such-user", "user 'no-such-user'")]),
    "chroot": (["/"], [("/no/such/folder", "is no directory")]),
    "pidfile": (["/run/x.pid", "x.pid"], []),
    "log": (["syslog", "stderr", "/tmp/log", "log.txt"], [("/no/such/log", "no such folder"), ("no/log", "no such folder")]),
    "handshake_threads": (["1", "64"], [("0", "from 1 to 64"), ("65", "from 1 to 64"), ("two", "whole number"),
                                        ("-1", "whole number"), ("1.5", "whole number"), ("\u0662", "whole number"),
                                        ("\u00b2", "whole number")]),
    "max_sessions": (["1", "100000"], [("0", "whole number"), ("many", "whole number")]),
    "role": ([], [("proxy", "server"), ("Server", "client")]),
    "listen": (["*", "*:1401", "127.0.0.1", "[::1]:401", "::1", "localhost:0", "[fe80::1%lo]:401", "a.lan, b.lan:402,::",
                "xn--bcher-kva.lan", "a_b", "0x.lan", '"a.lan", "b.lan:402"', "4.lan"],
               [("", "="), ("host:65536", "HOST[:PORT]"), ("host:x", "HOST[:PORT]"), ("a b", "without blanks"), ("[::1", "HOST[:PORT]"),
                ("a,,b", "HOST[:PORT]"), ("a,", "HOST[:PORT]"), ("b\u00fccher.lan", "xn--"), ("1::2::3", "HOST[:PORT]"),
                ("[a.lan]:401", "HOST[:PORT]"), ("[1::2::3]:401", "HOST[:PORT]"), ("[127.0.0.1]:401", "HOST[:PORT]"),
                ("401", "did you mean *:401?"), (":401", "did you mean *:401?"), ("a.lan, 401", "did you mean *:401?"),
                ("99999", "four numbers"), ("10.1", "four numbers"), ("1.2.3:401", "four numbers"), ("0x7f000001", "four numbers"),
                ("0x7f.1", "four numbers"), ("192.0.2.256", "four numbers"), ("192.0.2.1.", "four numbers"),
                ("192.0.2.1/24", "HOST[:PORT]"), ("a..b", "HOST[:PORT]"), ("a" * 64, "HOST[:PORT]"), ("[::1%a b]", "without blanks"),
                ("fe80::1", "%INTERFACE"), ("ups@host", "MONITOR"), ('"a,b"', "not 'a,b'"), ("http://a.lan", "HOST[:PORT]")]),
    "upstream": (["127.0.0.1", "ups.lan:3493", "[2001:db8::1]:401, ups.lan", "fe80::1%eth0.2", "localhost."],
                 [("*", "host"), ("x:", "HOST[:PORT]"), ("x:99999", "HOST[:PORT]"), ("x:0", "HOST[:PORT]"),
                  ("3493", "did you mean localhost:3493?"), ("ups@localhost", "MONITOR"), ("a, ups@b:401", "MONITOR")]),
    "certificate": (["{server}"], [("no.pem", "No such file"), ("{empty}", "certificate"), ("{crl}", "certificate")]),
    "key": (["{key}"], [("no.key", "No such file"), ("{cert}", "private key"), ("{other_key}", "does not belong"),
                        ("{locked}", "encrypted")]),
    "trust": (["{ca}", "{folder}", "{both}"], [("no.pem", "No such file"), ("{empty}", "certificate"), ("{empty_folder}", "certificate"),
                                              ("{broken}", "cannot be read")]),
    "verify": (["full", "chain"], [("yes", "full, chain, pin or none"), ("FULL", "not 'FULL'")]),
    "server_name": (["ups.lan", "192.0.2.1", "::1"], []),
    "pin": ([PIN, PIN + ", " + PIN], [("sha256//AAAA", "BASE64"), (PIN[8:], "sha256//"), (PIN + ",", "sha256//"),
                                      ("sha256//" + "*" * 44, "BASE64"), ("sha256//" + "A" * 20 + "!" + "A" * 23 + "=", "BASE64"),
                                      ("sha256//" + "A" * 42 + "B=", "BASE64"), ("sha256//" + "\u00e9" * 43 + "=", "BASE64"),
                                      ("SHA256//" + PIN[8:], "sha256//")]),
    "crl": (["{crl}", "{crl}, {crl}"], [("no.crl", "No such file"), ("{ca}", "X509 CRL")]),
    "client_certificate": (["request", "require"], [("yes", "request"), ("on", "none")]),
    "permit": (["*: read", "CN=a b.lan: monitor, DNS:x: primary, IP:::1: admin, URI:urn:x: read, email:a@b: read, %s: read" % PIN,
                '"CN=Smith, John": read, CN="a # b; c: d": admin', "CN=b\u00fcro: read"],
               [("*", "IDENTITY"), ("*: write", "monitor"), ("x: read", "CN="), ("DNS:: read", "DNS:"),
                ("sha256//x: read", "sha256//"), ("*: read,", "a list stands on one line"), ("CN=a: root", "read, monitor, primary, admin"),
                ("DNS:b\u00fccher.lan: read", "xn--"), ("IP:fe80::1%lo: read", "address"), ("IP:10.1: read", "address"),
                ("dns:a: read", "DNS:"), ("CN=Smith, John: read", "IDENTITY")]),
    "allow_from": (["127.0.0.1, 192.0.2.0/24, 2001:db8::/32", "::ffff:192.0.2.1", "192.0.2.0/255.255.255.0"],
                   [("192.0.2.1/24", "192.0.2.0/24 or 192.0.2.1?"), ("lan", "ADDRESS/BITS"), ("1.2.3.4/33", "ADDRESS/BITS"),
                    ("10.1", "ADDRESS/BITS"), ("5", "ADDRESS/BITS"), ("fe80::1%lo", "ADDRESS/BITS"), ("127.0.0.1,", "ADDRESS/BITS")]),
    "plaintext": (["refuse", "localhost"], [("yes", "refuse"), ("any", "localhost")]),
    "min_tls": (["1.3", "1.2"], [("1.1", "1.2"), ("TLSv1.3", "1.3")]),
    "max_sessions_per_address": (["1", "64"], [("0", "whole number"), ("", "=")]),
    "handshake_timeout": (["1", "3600"], [("0", "from 1"), ("10s", "whole number")]),
    "idle_timeout": (["1", "86400"], [("0", "from 1"), ("never", "whole number")]),
    "reuse": (["0", "3600"], [("-1", "from 0"), ("3601", "3600")]),
}


@pytest.fixture(name="files", scope="module")
def _files(pki, tmp_path_factory):
    """Good and bad files for the values above."""
    base = tmp_path_factory.mktemp("files")
    for name in ("folder", "empty_folder"):
        (base / name).mkdir()
    shutil.copy(pki.ca.cert, str(base / "folder"))
    with open(pki.ca.cert, encoding="ascii") as one, open(pki.other_ca.cert, encoding="ascii") as two:
        both, broken = one.read() + two.read(), two.name
    with open(broken, encoding="ascii") as file:
        lines = file.read().splitlines(True)
    locked = str(base / "locked")
    openssl("pkey", "-in", pki.server.key, "-aes256", "-passout", "pass:secret", "-out", locked)
    return {"server": pki.server.file, "key": pki.server.key, "cert": pki.server.cert, "ca": pki.ca.cert, "crl": pki.crl,
            "other_key": pki.client.key, "locked": locked, "folder": str(base / "folder"), "both": write(str(base / "both"), both),
            "empty": write(str(base / "empty"), ""), "empty_folder": str(base / "empty_folder"),
            "broken": write(str(base / "broken"), "".join(lines[:3] + lines[-1:]))}


@pytest.fixture(name="check")
def _check(tmp_path, capsys):
    """check(text): what `nutshim.py -t` makes of a configuration: (status, stdout, stderr with FILE for its path)."""
    def call(text):
        path = write(str(tmp_path / "nutshim.conf"), text)
        status = nutshim.main(["-t", "-f", path])
        out, err = capsys.readouterr()
        return status, out, err.replace(path, "FILE")
    return call


def base(files, role, option=None, value=None):
    """A good configuration with one option more: (text, the option's line number)."""
    top, server, client = {}, {"role": "server", "certificate": files["server"]}, {
        "role": "client", "upstream": "ups.lan", "trust": files["ca"]}
    place = {"": top, "server": server, "client": client}[role]
    if option:
        if role == "server" and (option in ("trust", "crl", "pin", "permit") or value in ("request", "require")):
            place.update(client_certificate="require", trust=files["ca"])
        if option == "listen" and role == "client":
            server["listen"] = "*:1"                # not the client's port
        if option == "key":
            place["certificate"] = files["cert"]
            if role == "client":
                place["certificate"] = files["server"] if value == "no" else files["cert"]
        place.pop(option, None)
        place[option] = value                       # the last line of its section
    lines = ["%s = %s" % item for item in top.items()]
    lines += ["[s]"] + ["%s = %s" % item for item in server.items()]
    lines += ["[c]"] + ["%s = %s" % item for item in client.items()]
    number = lines.index("%s = %s" % (option, value)) + 1 if option else 0
    return "\n".join(lines) + "\n", number


def faults(text):
    """The lines about faults, which stand in line order, as {line number: text}."""
    found = [re.match(r"FILE:(\d+): (.*)", line) for line in text.splitlines()]
    assert all(found), text
    numbers = [int(match.group(1)) for match in found]
    assert numbers == sorted(numbers), text
    return {number: "\n".join(match.group(2) for match in found if int(match.group(1)) == number) for number in numbers}


# ---- options ------------------------------------------------------------------------------------

def test_the_values_above_cover_the_options_table():
    """Every option has its cases in this file."""
    assert set(VALUES) == {option.name for option in OPTIONS}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_good_values_are_taken(option, files, check):
    """Every option takes each good value wherever it belongs."""
    for role in PLACES[option.where]:
        for value in VALUES[option.name][0]:
            text, _ = base(files, role, option.name, value.format(**files))
            status, out, err = check(text)
            assert (status, err) == (0, ""), text
            assert "no fault found" in out


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_bad_values_are_refused_with_file_and_line(option, files, check):
    """Every bad value is one fault: FILE:LINE, the option, and what was expected."""
    for role in PLACES[option.where]:
        for value, words in VALUES[option.name][1]:
            text, number = base(files, role, option.name, value.format(**files))
            status, out, err = check(text)
            assert (status, out) == (1, ""), text
            assert list(faults(err)) == [number] and err.count("\n") == 1, err
            assert words.lower() in err.lower() and option.name in err, err


def test_defaults_hold_for_what_is_not_set(files, tmp_path):
    """An option that is not set has the value that its default, written out, has."""
    path = str(tmp_path / "nutshim.conf")
    written = {"": [], "server": ["[s]", "role = server", "certificate = " + files["server"]],
               "client": ["[c]", "role = client", "upstream = ups.lan", "trust = " + files["ca"]]}
    for option in OPTIONS:
        for role in PLACES[option.where]:
            default = option.default.get(role) if isinstance(option.default, dict) else option.default
            if default is not None:
                written[role].append("%s = %s" % (option.name, default))
    configs = []
    for text in (base(files, "")[0], "\n".join(sum(written.values(), [])) + "\n"):
        conf, found = read_config(write(path, text))
        assert not found
        configs.append([conf] + conf.shims)
    for short, long in zip(*configs):
        for option in OPTIONS:
            assert getattr(short, option.name, None) == getattr(long, option.name, None), option.name
    values = vars(configs[0][1])
    assert (values["handshake_timeout"], values["idle_timeout"], values["min_tls"]) == (10, 120, "1.3")
    values = vars(configs[0][2])
    assert (values["handshake_timeout"], values["verify"], values["reuse"]) == (4, "full", 30)


def test_where_a_shim_listens_and_goes(files, check):
    """Addresses without a port get the role's: 401 at the server shim, 3493 at upsd and for local clients."""
    _, out, _ = check(base(files, "server")[0])
    assert re.search(r"\[s\] server on \*:401, upstream localhost:3493", out), out
    assert re.search(r"\[c\] client on localhost:3493, upstream ups.lan:401", out), out
    _, out, _ = check(base(files, "client", "upstream", "[2001:db8::1], b:4, ::1")[0])
    assert "upstream [2001:db8::1]:401, b:4, [::1]:401" in out


def test_ipv4_written_as_ipv6(files, tmp_path):
    """An IPv4 address in its IPv6 form means that IPv4 address, but for permit: a certificate's address has one form."""
    text = "[s]\nrole = server\ncertificate = %s\nlisten = [::ffff:192.0.2.1]:4, ::FFFF:c000:201\n" % files["server"]
    text += "allow_from = ::ffff:192.0.2.1, ::ffff:192.0.2.0/120, ::/8\nclient_certificate = request\n"
    text += "trust = %s\npermit = IP:::ffff:192.0.2.1: read\n" % files["ca"]
    conf, found = read_config(write(str(tmp_path / "nutshim.conf"), text))
    assert not found
    shim = conf.shims[0]
    assert shim.listen == [("192.0.2.1", 4), ("192.0.2.1", 401)] and shim.permit == [("IP:::ffff:192.0.2.1", "read")]
    assert [str(network) for network in shim.allow_from] == ["192.0.2.1/32", "192.0.2.0/24", "::/8"]


# ---- the file -----------------------------------------------------------------------------------

def test_comments_blanks_and_quotes(files, check):
    """The file may have comments, blanks, quotes and CRLF as ups.conf may."""
    text = "; a comment\r\n\r\n # another\r\nlog=stderr # to the terminal\r\n\t[ s ]   ; upsd\r\n" \
           "role\t=server\r\n certificate = \"%s\"\r\nlisten = *:401;x\r\n" % files["server"]
    status, _, err = check(text)
    assert (status, list(faults(err))) == (1, [8]), "a ; inside a word is no comment"
    status, out, err = check(text.replace(";x", " ;x"))
    assert (status, err) == (0, "") and "[s] server on *:401" in out


def test_quotes_keep_what_is_in_them(files, check, tmp_path):
    """Within quotes #, ;, =, commas and blanks are part of the value; lists are split at the commas outside."""
    shutil.copy(files["server"], str(tmp_path / " a #b; c=d, e.pem"))
    for name in ("x, y.crl", "z;.crl"):
        shutil.copy(files["crl"], str(tmp_path / name))
    text = 'log = "stderr" # "to the terminal\n[s] # "\nrole = "server"\ncertificate = " a #b; c=d, e.pem" ; say "so"\n' \
           'client_certificate = require\ntrust = %s\ncrl = "x, y.crl" , z";".crl # and "this\n' \
           'permit = "CN=a, b" : read,CN="c # d": admin\n' % files["ca"]
    status, _, err = check(text)
    assert (status, err) == (0, "")
    shim = read_config(str(tmp_path / "nutshim.conf"))[0].shims[0]
    assert shim.certificate == str(tmp_path / " a #b; c=d, e.pem")
    assert shim.crl == [str(tmp_path / "x, y.crl"), str(tmp_path / "z;.crl")]
    assert shim.permit == [("CN=a, b", "read"), ("CN=c # d", "admin")]
    for value in ('"a.pem', 'a.pem"', '"a" "b', '"', '"a # b'):
        status, _, err = check("[s]\nrole = server\ncertificate = %s\n" % value)
        assert status == 1 and list(faults(err)) == [3] and "second quote" in err, err
    for value in ('""', '" "'):
        status, _, err = check("[s]\nrole = server\ncertificate = %s\n" % value)
        assert status == 1 and list(faults(err)) == [3] and "name = value" in err, err


def test_utf_8_with_and_without_a_mark(files, tmp_path, capsys):
    """UTF-8 is read with a byte order mark or without, with names that are not ASCII, whatever the line ends."""
    path = tmp_path / "nutshim.conf"
    os.symlink(files["server"], str(tmp_path / "b\u00fcro.pem"))
    text = "# caf\u00e9\n[b\u00fcro]\nrole = server\ncertificate = b\u00fcro.pem\n"
    for data in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode("utf-8-sig"), text.encode()[:-1],
                 b"# caf\xe9 in Latin-1\n" + text.encode()):
        path.write_bytes(data)
        assert nutshim.main(["-t", "-f", str(path)]) == 0
        assert "[b\u00fcro] server on" in capsys.readouterr().out


@pytest.mark.parametrize("encoding, mark", [
    ("utf-16-le", ""), ("utf-16-be", ""), ("utf-16-le", "\ufeff"), ("utf-16-be", "\ufeff")])
def test_utf_16_is_named(encoding, mark, files, tmp_path, capsys):
    """A file in UTF-16, with or without a mark, is one fault that names its encoding; the command in it mends that."""
    path = tmp_path / "nutshim.conf"
    path.write_bytes((mark + base(files, "")[0]).encode(encoding))
    assert nutshim.main(["-t", "-f", str(path)]) == 1
    err = capsys.readouterr().err
    name, command = re.match(r"%s:1: .*(UTF-16[LB]E).*'(iconv .*)'.*\n$" % re.escape(str(path)), err).groups()
    assert name.replace("-", "") == encoding.upper().replace("-", "")
    path.write_bytes(run(*command.replace("FILE", str(path)).split()).stdout.encode())
    assert nutshim.main(["-t", "-f", str(path)]) == 0


def test_other_encodings_and_odd_blanks_are_named(tmp_path, capsys):
    """A byte that is not UTF-8, and a blank that is none, is a fault with its line that names it, and the only one there."""
    path = tmp_path / "nutshim.conf"
    good = "[c]\nrole = client\nupstream = a\nverify = none\n"
    for data, number, words in (
            (good.replace("= a", "= caf\u00e9").encode("latin-1"), 3, "byte 0xe9 is not UTF-8"),
            (good.replace("[c]", "[\u00fcps]").encode("latin-1"), 1, "byte 0xfc is not UTF-8"),
            (good.replace("= none", "=\u00a0none").encode(), 4, "U+00A0"),
            (good.replace("role ", "role\u2003").encode(), 2, "U+2003"),
            (good.replace("= client", "= client\u00a0").encode(), 2, "U+00A0"),
            (good.replace("= client", "= client\u00a0# a comment").encode(), 2, "U+00A0"),
            (good.replace("upstream", "\u200bupstream").encode(), 3, "U+200B"),
            (good.replace("[c]", "[c]\u3000").encode(), 1, "U+3000"),
            ((good + "\ufeff# joined").encode(), 5, "U+FEFF"),
            (good.replace("= a", "= a\x07").encode(), 3, "control character (U+0007)")):
        path.write_bytes(data)
        assert nutshim.main(["-t", "-f", str(path)]) == 1
        err = capsys.readouterr().err.replace(str(path), "FILE")
        assert words in faults(err).get(number, ""), err
        assert len(faults(err)) == 1 or "\u200bupstream" in data.decode("utf-8", "replace"), err
        assert err.replace("\n", "").isprintable()
    path.write_bytes(good.replace("= a", "= a # \u00a0\u200b\ufeff").encode() + b"# \xe9\x07\n")
    assert nutshim.main(["-t", "-f", str(path)]) == 0, "comments may have anything"


def test_a_terminal_without_the_characters(files, tmp_path):
    """On a terminal that has only ASCII, -t and its faults are readable, not a traceback."""
    for text, status, words in (("[b\u00fcro]\nrole = server\ncertificate = %s\n" % files["server"], 0, r"[b\xfcro] server on"),
                                ("[b\u00fcro]\nr\u00f4le = server\n", 1, r"r\xf4le: no such option; did you mean role?")):
        path = tmp_path / "nutshim.conf"
        path.write_bytes(text.encode())
        done = run_shim("-t", "-f", str(path), env=clean_env(PYTHONIOENCODING="ascii"))
        assert done.returncode == status and words in done.stdout + done.stderr, done
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word, near", [
    ("verfy", "verify"), ("Role", "role"), ("MAX_SESSIONS", "max_sessions"), ("max-sessions", "max_sessions"),
    ("certificat", "certificate"), ("lsiten", "listen"), ("turst", "trust"), ("client-certificate", "client_certificate"),
    ("allowfrom", "allow_from"), ("pins", "pin"), ("colour", None), ("ca", None), ("port", None), ("x", None)])
def test_near_names_are_suggested(word, near, check):
    """An unknown option that looks like one there is, is told with that one; any other with where they are listed."""
    _, _, err = check("[s]\nrole = client\nupstream = a\nverify = none\n%s = 1\n" % word)
    expected = "did you mean %s?" % near if near else "'nutshim.py -h' lists them"
    assert faults(err) == {5: "[s] %s: no such option; %s" % (word, expected)}


def test_a_section_without_a_role(check):
    """A section whose role is missing or wrong shows its other faults too."""
    text = "[s]\n%s\nCertificate = c.pem\nlisten = 401\nlog = stderr\ntrust = \npin = x\nreuse = 3\npermit = *: read\n"
    for role, number, words in (("", 1, "role: required: server (in front of upsd) or client"),
                                ("Role = server", 2, "did you mean role?"), ("role = proxy", 2, "expected server or client"),
                                ("role = global", 2, "not 'global'"), ("role", 2, "name = value")):
        status, out, err = check(text % role)
        found = faults(err)
        assert (status, out) == (1, "") and words in found[number], err
        assert set(found) - {1, 2} == {3, 4, 5, 6, 7}, err
        assert "did you mean certificate?" in found[3] and "*:401" in found[4] and "above the first" in found[5]
        assert (1 in found) == (not role.startswith("role")), err


def test_one_mistake_is_one_fault(files, check):
    """A line with a fault is not also told as an option that is missing or has no effect."""
    for role, option, value in (("server", "certificate", '"a'), ("client", "upstream", "="), ("client", "upstream", "\u00a0a"),
                                ("client", "trust", '"x'), ("client", "verify", "pins"), ("server", "client_certificate", "yes")):
        text, number = base(files, role, option, value)
        if value == "=":
            text = text.replace("upstream = =", "upstream =")
        if option == "client_certificate":
            text = text.replace("[c]", "trust = %s\n[c]" % files["ca"])
        if option == "verify":
            text = text.replace("trust = ", "# trust = ")
        status, _, err = check(text)
        assert status == 1 and list(faults(err)) == [number] and err.count("\n") == 1, err


def test_any_file_gives_faults_with_lines(files, tmp_path, capsys):
    """Whatever is in the file, -t says good or gives faults, each with file and line, in line order; no traceback."""
    rng = random.Random(14)
    words = [option.name for option in OPTIONS] + ["[s]", "[c]", "[", "]", "=", " = ", '"', "#", ";", ",", ":", "\n", "\n", "\t",
                                                   "\u00a0", "\ufeff", "\0", "\r", "%", "@", "0", "99999", "\x1b[2J", "\u202e", "*", "read", "x" * 70]
    texts = [base(files, "")[0]]
    for name, (good, bad) in VALUES.items():
        texts += ["%s = %s\n" % (name, value.format(**files)) for value in good + [value for value, _ in bad]]
    path = tmp_path / "nutshim.conf"
    status = []
    for _ in range(1000):
        lines = [line for line in texts[0].splitlines(True) if rng.random() < 0.9]
        for _ in range(rng.choice((0, 1, 3, 9))):
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(texts[1:]))
        for _ in range(rng.choice((0, 1, 3))):
            number = rng.randrange(len(lines))
            at = rng.randrange(len(lines[number]) + 1)
            lines[number] = lines[number][:at] + rng.choice(words) + lines[number][at + rng.choice((0, 0, 1, 5)):]
        data = bytearray("".join(lines).encode())
        if rng.random() < 0.2:
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        status.append(nutshim.main(["-t", "-f", str(path)]))
        out, err = capsys.readouterr()
        found = faults(err.replace(str(path), "FILE"))
        assert bool(found) == bool(status[-1]) and ("no fault found" in out) == (not found), data
        assert not found or max(found) <= data.count(b"\n") + 1, data
        assert re.sub("[\n\t]", "", err).isprintable(), data
    assert 30 < sum(status) < 970, "both kinds were seen"


WRONG = """\
reuse = 3
colour = blue
log = syslog
log = stderr
max_sessions = none
[a]
role = server
role = client
verify = full
listen = host:port
nonsense
timeout =
[b]
listen = *
[a]
role = client
max_sessions = 5
[broken
"""


def test_all_faults_are_shown_at_once(check):
    """Every fault of a file is shown, each with its line, in one run."""
    status, out, err = check(WRONG)
    assert (status, out) == (1, "")
    found = faults(err)
    for number, words in ((1, "role = client"), (2, "no such option"), (4, "line 3"), (5, "whole number"), (8, "line 7"),
                          (9, "role = client"), (10, "HOST[:PORT]"), (11, "name = value"), (12, "name = value"), (13, "role: required"),
                          (15, "[a]"), (17, "[section]"), (18, "[section]")):
        assert words in found.get(number, ""), (number, words, err)


CLIENT = "[%s]\nrole = client\nupstream = a\ntrust = {ca}\n%s\n"


@pytest.mark.parametrize("text, number, words", [
    ("", 1, "[section]"),
    ("log = syslog\n", 1, "[section]"),
    ("role = server\n[s]\nrole = server\ncertificate = {server}\n", 1, "[section]"),
    ("[s]\nrole = server\n", 1, "certificate: required (PEM; mkNUTcert.py makes it)"),
    ("[c]\nrole = client\ntrust = {ca}\n", 1, "upstream: required (the host of the server shim)"),
    ("[c]\nrole = client\nupstream = a\n", 1, "trust: required with verify = full (a PEM file, a folder, or system)"),
    ("[c]\nrole = client\nupstream = a\nverify = chain\n", 1, "trust: required with verify = chain"),
    ("[c]\nrole = client\nupstream = a\nverify = pin\n", 1, "pin: required with verify = pin"),
    ("[c]\nrole = client\nupstream = a\nverify = pin\npin = %s\ntrust = {ca}\n" % PIN, 6, "no effect"),
    ("[c]\nrole = client\nupstream = a\nverify = none\ncrl = {crl}\n", 5, "no effect"),
    ("[c]\nrole = client\nupstream = a\ntrust = {ca}\nkey = {key}\n", 5, "no effect"),
    ("[s]\nrole = server\ncertificate = {server}\nclient_certificate = require\n", 1, "trust: required with client_certificate = require"),
    ("[s]\nrole = server\ncertificate = {server}\nclient_certificate = request\n", 1, "trust"),
    ("[s]\nrole = server\ncertificate = {server}\ntrust = {ca}\n", 4, "no effect"),
    ("[s]\nrole = server\ncertificate = {server}\npin = %s\n" % PIN, 4, "no effect"),
    ("[s]\nrole = server\ncertificate = {server}\ncrl = {crl}\n", 4, "no effect"),
    ("[s]\nrole = server\ncertificate = {server}\npermit = CN=a: read\n", 4, "client_certificate"),
    ("[s]\nrole = server\ncertificate = {server}\nverify = full\n", 4, "role = client"),
    ("[s]\nrole = server\ncertificate = {server}\nreuse = 1\n", 4, "role = client"),
    ("[c]\nrole = client\nupstream = a\ntrust = {ca}\npermit = *: read\n", 5, "role = server"),
    ("[s]\nrole = server\ncertificate = {server}\npermit = *: read\npermit = *: admin\n", 5, "line 4; a list has one line"),
    ("[c]\nrole = client\nupstream = a\ntrust = {ca}\nplaintext = refuse\n", 5, "role = server"),
    ("[s]\nrole = server\ncertificate = {cert}\n", 3, "private key"),
    (CLIENT % ("a", "") + CLIENT % ("b", ""), 6, "[b] listen: 127.0.0.1:3493: [a] listens on 127.0.0.1:3493 already"),
    (CLIENT % ("a", "listen = *:1") + CLIENT % ("b", "listen = 127.0.0.2:2, 127.0.0.2:1"), 10, "[a] listens on 0.0.0.0:1 already"),
    (CLIENT % ("a", "listen = 127.0.0.1:1, *:1"), 5, "0.0.0.0:1: [a] listens on 127.0.0.1:1 already"),
    (CLIENT % ("a", "listen = x y") + CLIENT % ("b", ""), 5, "without blanks"),
])
def test_options_that_do_not_go_together(text, number, words, files, check):
    """What is missing, without effect or in the wrong place is a fault with its line and what was expected."""
    status, _, err = check(text.format(**files))
    assert status == 1 and list(faults(err)) == [number] and err.count("\n") == 1, err
    assert words.lower() in err.lower()


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    """A configuration that is missing, a folder, or no text is one clear error."""
    for path, words in ((tmp_path / "none.conf", "No such file"), (tmp_path, "Is a directory")):
        assert nutshim.main(["-t", "-f", str(path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(str(path)) and words in err
    path = tmp_path / "binary"
    for text, lines in ((bytes(range(256)) * 4, [1, 2]), (b"user = a\0b\n\x0b\nchroot = /\0\n\x1b[2J\n[s\x85]\n", [1, 3, 4])):
        path.write_bytes(text)
        assert nutshim.main(["-t", "-f", str(path)]) == 1
        err = capsys.readouterr().err
        assert all("%s:%d: a control character" % (path, line) in err for line in lines), err
        assert err.replace("\n", "").isprintable()


def test_unwise_options_are_warned_about(files, check, tmp_path):
    """What weakens protection passes with a warning that names the line."""
    key = shutil.copy(files["key"], str(tmp_path / "open.key"))
    os.chmod(key, 0o644)
    for role, option, value, words in (
            ("client", "min_tls", "1.2", "TLS 1.2 is allowed"), ("server", "plaintext", "localhost", "without TLS"),
            ("server", "key", key, "everybody can read this private key")):
        text, number = base(files, role, option, value)
        status, out, err = check(text)
        assert (status, err) == (0, "")
        assert re.search(r"warning: .*nutshim\.conf:%d: .*%s" % (number, words), out), out
        assert value != key or "chmod" in out
    status, out, _ = check("[c]\nrole = client\nupstream = a\nverify = none\n")
    assert status == 0 and re.search(r"warning: .*nutshim\.conf:4: .*not verified", out)


def test_private_key_in_trust(files, check, tmp_path, pki):
    """A client whose trust has a private key got the server's secret file in place of the clients': a warning, with the
    line; none where the key is the shim's own, or lies in a folder of files."""
    warned = r"warning: .*nutshim\.conf:%d: .*trust: .*a private key is in it.*the clients' file"
    text, number = base(files, "client", "trust", files["server"])
    status, out, err = check(text)
    assert (status, err) == (0, "") and re.search(warned % number, out), out
    (tmp_path / "trust").mkdir()
    shutil.copy(pki.server.file, str(tmp_path / "trust" / "both.pem"))
    for more in ("trust = %s\ncertificate = %s\n" % (files["server"], files["server"]), "trust = %s\n" % (tmp_path / "trust")):
        status, out, err = check("[c]\nrole = client\nupstream = a\n" + more)
        assert (status, err) == (0, "") and "private key is in it" not in out, out + err


def test_check_shows_names_pin_and_expiry(files, pki, check):
    """-t prints a server's pin and names, and how long each certificate is valid."""
    _, out, _ = check(base(files, "")[0])
    assert pki.server.pin in out and "DNS:localhost" in out and "IP:::1" in out
    assert len(re.findall(r"never expires", out)) == 2


def test_nothing_starts_with_a_fault(files, tmp_path):
    """With one fault in one shim no shim starts, in the foreground or not: exit 1, the fault on stderr, no pidfile."""
    pidfile = tmp_path / "x.pid"
    path = write(str(tmp_path / "bad.conf"), "log = stderr\npidfile = %s\n[a]\nrole = server\nlisten = 127.0.0.1:0\n"
                 "certificate = %s\n[b]\nrole = client\nreuse = x\nupstream = a\nverify = none\n" % (pidfile, files["server"]))
    for args in (["-F"], ["-D"], []):
        done = run_shim("-f", path, *args)
        assert done.returncode == 1, done
        assert re.match(r"%s:9: .*reuse: expected" % re.escape(path), done.stderr) and done.stderr.count("\n") == 1
        assert "listening" not in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert not pidfile.exists()
    assert run_shim("-t", "-f", path).returncode == 1


# ---- the command line ---------------------------------------------------------------------------

def test_version_and_help():
    """-V prints the versions of nutshim, Python and OpenSSL; -h every option of the command line and of the file."""
    done = run_shim("-V")
    assert done.returncode == 0 and re.match(r"nutshim \d\S*, Python 3\.\d+\.\d+\S*, OpenSSL \d", done.stdout), done.stdout
    done = run_shim("-h")
    assert done.returncode == 0
    for word in ["-f ", "-t ", "-c ", "-p ", "-D ", "-F ", "-u ", "-r ", "-V", "reload", "stop", "status"]:
        assert word in done.stdout, word
    for option in OPTIONS:
        assert re.search(r"(?m)^\s+%s\s" % option.name, done.stdout), option.name


@pytest.mark.parametrize("args", [["--nonsense"], ["-c", "restart"], ["-c"], ["-f"], ["extra"], ["-p"], ["--prometheus"],
                                  ["-t", "--json"]], ids=" ".join)
def test_wrong_usage_is_exit_2(args):
    """A command line that makes no sense ends with 2 and the usage on stderr."""
    done = run_shim(*args)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and not done.stdout


def test_configuration_is_found_beside_the_program(tmp_path, files):
    """Without -f the file of $NUT_CONFPATH is read before all others, and the one beside nutshim.py last."""
    if any(os.path.exists(place + "/nutshim.conf") for place in ("/etc/nut", "/etc/ups", "/usr/local/etc/nut")):
        pytest.skip("this machine has a nutshim.conf of its own")
    script = shutil.copy(NUTSHIM, str(tmp_path / "nutshim.py"))
    done = run_shim("-t", script=script)
    places = ["/etc/nut", "/etc/ups", "/usr/local/etc/nut", str(tmp_path)]
    assert done.returncode == 1 and "-f" in done.stderr
    assert re.findall(r"(\S+)/nutshim\.conf", done.stderr) == places
    beside = write(str(tmp_path / "nutshim.conf"), base(files, "")[0])
    done = run_shim("-t", script=script)
    assert done.returncode == 0 and beside in done.stdout
    (tmp_path / "own").mkdir()
    env = clean_env(NUT_CONFPATH=str(tmp_path / "own"))
    assert beside in run_shim("-t", script=script, env=env).stdout, "a folder without the file is passed over"
    own = write(str(tmp_path / "own" / "nutshim.conf"), "")
    assert run_shim("-t", script=script, env=env).stderr.startswith(own + ":1: ")


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a folder away")
def test_configuration_in_a_folder_that_may_not_be_entered(files, tmp_path, need):
    """A file in a folder that the user may not enter is not called missing, unless one elsewhere can be read."""
    need("setpriv")
    script = shutil.copy(NUTSHIM, str(tmp_path / "nutshim.py"))
    own, beside = str(tmp_path / "own" / "nutshim.conf"), str(tmp_path / "nutshim.conf")
    (tmp_path / "own").mkdir(0o700)
    write(own, base(files, "")[0], 0o644)
    os.chown(os.path.dirname(own), 3493, 3493)
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", sys.executable, script, "-t"]
    env = clean_env(NUT_CONFPATH=os.path.dirname(own))
    done = run(*command, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == own + ": Permission denied: user 0 must be able to enter its folder and to read it\n"
    write(beside, "x = 1\n", 0o644)
    assert run(*command, env=env).stderr.startswith(beside + ":1: ")


@pytest.mark.skipif(not IS_ROOT, reason="only root can have an /etc of its own")
def test_configuration_is_looked_for_in_order(tmp_path):
    """/etc/nut comes before /etc/ups, and that before /usr/local/etc/nut (seen in a mount namespace with both empty)."""
    if run("unshare", "-m", "true").returncode:
        pytest.skip("no mount namespaces here")
    script = shutil.copy(NUTSHIM, str(tmp_path / "nutshim.py"))
    places = ["/etc/nut", "/etc/ups", "/usr/local/etc/nut"]
    done = run("unshare", "-m", "sh", "-c", """
        set -e
        mount -t tmpfs none /etc && mount -t tmpfs none /usr/local/etc
        for place in "$@"; do mkdir $place; : >$place/nutshim.conf; done
        for place in "$@"; do
            "$PYTHON" "$SCRIPT" -t || true
            rm $place/nutshim.conf
        done""", "sh", *places, env=clean_env(PYTHON=sys.executable, SCRIPT=script))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(?m)^(\S+)/nutshim\.conf:1: ", done.stderr) == places, done.stderr


# ---- the sample and README ----------------------------------------------------------------------

def sample():
    """nutshim.conf's lines that are options or sections: (number, mark, text)."""
    with open(os.path.join(ROOT, "nutshim.conf"), encoding="ascii") as file:
        for number, line in enumerate(file, 1):
            match = re.match(r"([#;]?)(\[\w+\]|[a-z_]+ = .*)$", line)
            assert match or line in ("\n", "#\n") or line.startswith("# "), "neither option nor comment: %d: %s" % (number, line)
            if match:
                yield number, match.group(1), match.group(2)


def test_the_sample_shows_every_option_with_its_default():
    """In nutshim.conf each option stands once in each place it belongs to, commented out, behind # with its
    default or behind ; with an example."""
    seen, role = [], ""
    known = {option.name: option for option in OPTIONS}
    must = {"certificate": "server", "upstream": "client", "trust": "client", "role": None}
    for number, mark, text in sample():
        if text.startswith("["):
            role = "client" if role == "server" else "server"
            continue
        name, value = text.split(" = ", 1)
        assert mark, "not commented out: line %d" % number
        assert role in PLACES[known[name].where], "line %d: %s" % (number, name)
        default = known[name].default
        default = default.get(role) if isinstance(default, dict) else default
        if name == "role":
            assert value == role
        elif default is not None:
            assert (mark, value) == ("#", default), "line %d: the default is %s" % (number, default)
        else:
            assert mark == ("#" if must.get(name) == role else ";"), "line %d" % number
        seen.append((role, name))
    assert sorted(seen) == sorted((role, option.name) for option in OPTIONS for role in PLACES[option.where])


def uncommented(files, marks, also=None):
    """The sample as somebody makes it his own: these marks taken away, file names replaced by real ones."""
    lines = []
    for number, mark, text in sample():
        name, _, value = text.partition(" = ")
        if mark in marks or number == also:
            value = {"certificate": files["server"], "trust": files["ca"], "crl": files["crl"], "key": files["key"],
                     "user": "root", "chroot": "/"}.get(name, value)
            if also and name == "client_certificate":
                value = "require"
            lines.append("%s = %s" % (name, value) if value else text)
    return "\n".join(lines) + "\n"


def test_the_sample_works_once_uncommented(files, check):
    """The sample without its # passes -t, given the files, and so does each of its examples added to that."""
    status, out, err = check(uncommented(files, "#"))
    assert (status, err) == (0, "") and "[upsd] server" in out and "[upsbox] client" in out
    for number, mark, text in list(sample()):
        if mark == ";":
            config = uncommented(files, "#", number)
            if "trust = " not in config.split("role = client")[0]:
                config = config.replace("client_certificate = require", "client_certificate = require\ntrust = " + files["ca"])
            if text.startswith("key") and "certificate" not in config.split("role = client")[1]:
                continue                            # has no effect alone: goes with the line above it
            status, _, err = check(config)
            assert (status, err) == (0, ""), (number, text)
    status, _, err = check("")
    assert status == 1, "as delivered nothing is set"


def readme():
    """README's text."""
    with open(os.path.join(ROOT, "README"), encoding="ascii") as file:
        return file.read()


def test_readme_has_every_option():
    """README's table has each option once for each role that knows it, with its default there."""
    table = re.search(r"(?m)^NAME +DEFAULT +MEANING\n((?:.+\n)+)", readme()).group(1)
    groups = {"Of the whole daemon:": [""], "Of every shim:": ["server", "client"], "With role = server:": ["server"],
              "With role = client:": ["client"]}
    roles, rows = None, {}
    for line in table.splitlines():
        if line in groups:
            roles = groups[line]
            continue
        name, default, meaning = line[:25].strip(), line[25:42].strip(), line[42:]
        assert name and default and meaning[0] != " " and line[24] == line[41] == " ", line
        for role in roles:
            assert (name, role) not in rows, line
            rows[name, role] = default
    assert set(rows) == {(option.name, role) for option in OPTIONS for role in PLACES[option.where]}
    for option in OPTIONS:
        for role in PLACES[option.where]:
            default = option.default.get(role) if isinstance(option.default, dict) else option.default
            told = rows[option.name, role]
            required = (option.name, role) in {("role", "server"), ("role", "client"), ("certificate", "server"),
                                               ("upstream", "client"), ("trust", "client")}
            assert told == default if default else (told == "required") == required, (option.name, role, told)


def test_readme_has_the_access_classes_and_every_refusal():
    """README names each class with its commands, and says what to do about every reason in the log, and about the
    shared session's lines."""
    text = readme()
    commands = set()
    for name, verbs in nutshim.CLASSES.items():
        row = re.search(r"(?m)^%s +(?:those, and )?(.*)$" % name, text).group(1)
        if verbs is None:
            assert row == "everything"
        else:
            commands |= set(row.split())
            assert {verb.decode("ascii") for verb in verbs} == commands, name
    text = text[text.index("Troubleshooting\n----"):text.index("Protection\n----")]
    prose = " ".join(text[:text.index("THE LOG SAYS")].split())
    first = " ".join(" ".join(line[:33] for line in text[text.index("THE LOG SAYS"):].splitlines()).split())
    for reason in nutshim.Reason:
        assert reason.words in prose or reason.words in first, reason.words
    for words in ("TLS up with", "given up:", "silent for more than", "a fresh one takes its place", "nobody asks",
                  "the configuration was read again", "not used for %d minutes" % (nutshim.UNSHARED // 60)):
        assert words in " ".join(text.split()) or words in first, words


def test_readme_is_plain_text_of_72_columns():
    """README has no line over 72 columns, no tab, and names only files that exist."""
    for number, line in enumerate(readme().splitlines(), 1):
        assert len(line) <= 72 and "\t" not in line and line == line.rstrip(), "line %d" % number
    for path in set(re.findall(r"\b(?:packaging|tests)/[\w./-]*\w", readme())):
        assert os.path.exists(os.path.join(ROOT, path)), path
