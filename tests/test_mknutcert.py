# SPDX-License-Identifier: GPL-2.0-or-later
"""mkNUTcert.py, from outside: what it writes is judged by openssl itself, by Python's ssl module, by NSS
(certutil), by NUT's upsd and upsmon and by nutshim.py; what it refuses must leave everything as it was.

Tests that take `openssl` run once for every openssl that is found: on PATH, in /opt and /usr/local, and
those that NUTSHIM_OPENSSL names (paths of commands, with colons between).
"""

import contextlib
import glob
import importlib.util
import os
import pty
import re
import select
import shutil
import ssl
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback

import pytest
from harness import (NSS_PASSWORD, Nut, PlainClient, Shim, TlsClient, Upsmon, clean_env, client_context,
                     free_port, missing_nut, poll, run, run_shim, upsc, write)

TESTS = os.path.dirname(os.path.abspath(__file__))
MKNUTCERT = os.path.join(os.path.dirname(TESTS), "mkNUTcert.py")
IS_ROOT = os.geteuid() == 0
KEY_TYPES = ("ec", "rsa:2048", "ed25519")
NOBODY = 65534
root_only = pytest.mark.skipif(not IS_ROOT, reason="only root can do this")


# ---- what there is to test with -----------------------------------------------------------------

def find_openssls():
    """{version: path} of every openssl command that can be found and runs."""
    paths = [shutil.which("openssl")] + os.environ.get("NUTSHIM_OPENSSL", "").split(":")
    for pattern in ("/opt/*/bin/openssl", "/usr/local/bin/openssl", "/usr/local/*/bin/openssl",
                    "/usr/local/opt/*/bin/openssl"):
        paths += sorted(glob.glob(pattern))
    found = {}
    for path in filter(None, paths):
        with contextlib.suppress(OSError):
            done = run(path, "version")
            if done.returncode == 0:
                found.setdefault("-".join(done.stdout.split()[:2]), os.path.abspath(path))
    return found


def find_pythons():
    """{version: path} of python3.7 to python3.14 on PATH and among pyenv's versions."""
    found = {}
    for minor in range(7, 15):
        pyenv = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.%d.*/bin/python" % minor)))
        for path in pyenv + list(filter(None, [shutil.which("python3.%d" % minor)])):
            if run(path, "-c", "import sys; sys.exit(sys.version_info[:2] != (3, %d))" % minor).returncode == 0:
                found["3.%d" % minor] = path
                break
    return found


OPENSSLS = find_openssls()
PYTHONS = find_pythons()


def need(present, what):
    """Skip where something is missing, but fail in CI, which has to have it."""
    if not present:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what + " is not installed")


# ---- running it ---------------------------------------------------------------------------------

def load_tool():
    """mkNUTcert.py as a module."""
    spec = importlib.util.spec_from_file_location("mkNUTcert", MKNUTCERT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()
tool.reader()  # once here, and not in every fork


def forked(function, output=os.devnull):
    """Start function() in a child, its exit code what the function returns; the child's pid."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
            os.dup2(1, 2)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8")
            code = function()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            sys.stderr.write(traceback.format_exc())
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pid


def wait(pid):
    """A child's exit code, 128 + the signal if that ended it."""
    status = os.waitpid(pid, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def mk(*args, expect=0, path=None, cwd=None, python=None, user=None, **env):
    """Run mkNUTcert.py without a terminal and return what it printed. Whatever happens, neither a
    key nor a traceback may show. It runs in a fork of this process, which saves the start of a
    Python; with python=..., as a program of its own."""
    args = [str(arg) for arg in args]
    if path:
        env["PATH"] = path + ":" + os.environ["PATH"]
    environment = clean_env(**env)
    if python:
        done = run(python, MKNUTCERT, *args, env=environment, cwd=cwd)
        code, text = done.returncode, done.stdout + done.stderr
    else:
        def child():
            os.environ.clear()
            os.environ.update(environment)
            tempfile.tempdir = None
            os.chdir(cwd or "/")
            if user:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            return tool.main(args)
        with tempfile.NamedTemporaryFile() as output:
            code = wait(forked(child, output.name))
            text = output.read().decode()
    assert "Traceback" not in text and "PRIVATE KEY" not in text, text
    assert code == expect, "exit code %d, expected %d:\n%s" % (code, expect, text)
    return text


def refused(*args, code=1, **options):
    """Run it in the expectation of a fault; the fault's text."""
    text = mk(*args, expect=code, **options)
    assert "mkNUTcert.py" in text, "no word about the fault"
    return text


def ossl(*args, ok=True, **options):
    """Run the system's openssl; standard output."""
    done = run("openssl", *args, **options)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout


def verify(trust, cert, *options, ok=True):
    """`openssl verify -x509_strict`; its output."""
    done = run("openssl", "verify", "-x509_strict", "-CAfile", trust, *options, cert)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def field(cert, *options):
    """What `openssl x509` prints for an option."""
    return ossl("x509", "-in", cert, "-noout", *options).strip()


def pin(path):
    """The pin of a file's key: by openssl and coreutils alone, as curl's manual has it."""
    script = "openssl pkey -in '%s' -pubout -outform DER | openssl dgst -sha256 -binary | openssl base64" % path
    return "sha256//" + run("sh", "-c", script).stdout.strip()


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def blocks(path):
    """The kinds of a PEM file's blocks, in order."""
    with open(path, encoding="ascii") as file:
        return re.findall("-----BEGIN (.*)-----", file.read())


def content(folder):
    """Every file below a folder with its bytes and mode."""
    found = {}
    for base, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(base, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = (file.read(), mode(path))
    return found


def sections(text):
    """The indented nutshim.conf lines in a message: {name: lines}, a name as often as it is there."""
    found = []
    for line in text.splitlines():
        line = line.strip()
        if re.fullmatch(r"\[\w+\]", line):
            found.append([line])
        elif found and re.match(r"\w+ = \S", line):
            found[-1].append(line)
    return ["\n".join(lines) + "\n" for lines in found]


class Pair:
    """What the default action makes, in a folder of its own."""

    def __init__(self, folder, *args, **options):
        self.folder = str(folder)
        os.makedirs(self.folder, exist_ok=True)
        self.server, self.client = self.folder + "/server.pem", self.folder + "/clients.pem"
        self.args = ("-s", self.server, "-c", self.client) + args
        self.output = mk(*self.args, **options)


class Ca:
    """A CA and what it issues."""

    def __init__(self, folder, *args, **options):
        self.folder = str(folder)
        self.options = options
        self.output = mk("ca", "-d", self.folder, *args, **options)
        self.cert, self.crl = self.folder + "/ca.pem", self.folder + "/crl.pem"

    def make(self, role, *args, **options):
        text = mk(role, "-d", self.folder, *args, **dict(self.options, **options))
        return re.search(r"^  (\S+\.pem) ", text, re.M).group(1)

    def issued(self, role="*"):
        return sorted(glob.glob("%s/issued/*.%s.*" % (self.folder, role)))


class Kit:
    """With one openssl and one key type: a pair, a CA, and from that a server's and a client's certificate."""

    def __init__(self, folder, version, key_type):
        self.path = str(folder / "bin")  # for the front of PATH
        os.mkdir(self.path)
        os.symlink(OPENSSLS[version], self.path + "/openssl")
        self.key_type = key_type
        options = ("--key-type", key_type)
        self.pair = Pair(folder / "pair", "-SAN", "UPSbox.lan nas_1 192.0.2.4 2001:db8:0::4", *options, path=self.path)
        self.ca = Ca(folder / "ca", *options, path=self.path)
        self.server = self.ca.make("server", "b.lan", "192.0.2.4", "::1", *options)
        self.client = self.ca.make("client", "c.lan", *options)


@pytest.fixture(scope="module", params=["%s %s" % (version, kind) for version in sorted(OPENSSLS) for kind in KEY_TYPES])
def kit(request, tmp_path_factory):
    """A Kit for every openssl and every key type."""
    return Kit(tmp_path_factory.mktemp("kit"), *request.param.split())


# ---- the default action -------------------------------------------------------------------------

def test_pair_holds_under_strict_verification(kit):
    """With every openssl and key type the pair passes `openssl verify -x509_strict` for its purpose and each of its names."""
    pair, key_type = kit.pair, kit.key_type
    assert verify(pair.client, pair.server, "-purpose", "sslserver")
    for option, name in (("hostname", "upsbox.lan"), ("hostname", "nas_1"), ("ip", "192.0.2.4"), ("ip", "2001:db8::4")):
        verify(pair.client, pair.server, "-verify_" + option, name)
    verify(pair.client, pair.server, "-verify_hostname", "elsewhere", ok=False)
    verify(pair.client, pair.server, "-purpose", "sslclient", ok=False)
    assert field(pair.server, "-ext", "subjectAltName").splitlines()[1].strip() == \
        "DNS:upsbox.lan, DNS:nas_1, IP Address:192.0.2.4, IP Address:2001:DB8:0:0:0:0:0:4"
    assert field(pair.server, "-enddate") == "notAfter=Dec 31 23:59:59 9999 GMT"
    text = {"ec": "NIST CURVE: P-256", "rsa:2048": "(2048 bit", "ed25519": "ED25519"}[key_type]
    assert text in ossl("pkey", "-in", pair.server, "-noout", "-text_pub")


def test_pair_is_two_files_and_the_ca_key_is_in_neither(tmp_path):
    """The server's file has key, certificate, CA; the clients' file only the CA; the one key is the server's own."""
    pair = Pair(tmp_path / "pair")
    assert blocks(pair.server) == ["PRIVATE KEY", "CERTIFICATE", "CERTIFICATE"]
    assert blocks(pair.client) == ["CERTIFICATE"]
    assert sorted(os.listdir(pair.folder)) == ["clients.pem", "server.pem"]
    assert ossl("pkey", "-in", pair.server, "-pubout") == field(pair.server, "-pubkey") + "\n"
    assert field(pair.client, "-pubkey") != field(pair.server, "-pubkey")


def test_ca_is_limited_to_being_a_ca(tmp_path):
    """The CA's certificate is critical CA:TRUE with pathlen:0, keyCertSign and cRLSign and nothing more; the server's is no CA."""
    pair = Pair(tmp_path / "pair")
    text = field(pair.client, "-ext", "basicConstraints,keyUsage,extendedKeyUsage")
    assert "X509v3 Basic Constraints: critical\n    CA:TRUE, pathlen:0" in text
    assert "X509v3 Key Usage: critical\n    Certificate Sign, CRL Sign" in text and "Extended" not in text
    assert "X509v3 Basic Constraints: critical\n    CA:FALSE" in field(pair.server, "-ext", "basicConstraints")


def test_defaults_are_those_of_the_older_tool(tmp_path):
    """Without options the two files are HOSTNAME.cert.pem and HOSTNAME-client.cert.pem in NUT's folder, for this host and loopback."""
    text = mk(NUT_CONFPATH=str(tmp_path))
    host = os.uname().nodename.lower()
    server = str(tmp_path / (host + ".cert.pem"))
    assert sorted(os.listdir(tmp_path)) == sorted([host + ".cert.pem", host + "-client.cert.pem"])
    assert field(server, "-subject", "-nameopt", "sep_multiline,sname").split("\n    ")[1:] == [
        "C=FR", "O=Network UPS Tools", "CN=" + host]
    for option, name in (("hostname", host), ("hostname", "localhost"), ("ip", "127.0.0.1"), ("ip", "::1")):
        verify(str(tmp_path / (host + "-client.cert.pem")), server, "-verify_" + option, name)
    assert server in text
    assert mk("-v") == mk("--version") and mk("-v").startswith("mkNUTcert.py ")


def test_folder_holds_for_named_files_too(tmp_path):
    """-d is the folder of both files even where -s and -c name them; a full path stays what it is."""
    mk("-y", "-d", str(tmp_path), "-s", "server.pem", "-c", str(tmp_path / "else" / ".." / "client.pem"), "-SAN", "a.lan")
    assert sorted(os.listdir(tmp_path)) == ["client.pem", "server.pem"]


def test_options_of_the_older_tool(tmp_path):
    """-SAN, -C, -O, -OU, --serialNumber, --notBefore and --notAfter do what they did, under either spelling."""
    before = int(time.time())
    pair = Pair(tmp_path / "a", "-SAN", "a.lan  b.lan", "-C", "de", "-O", "Bäcker & Söhne, 'A/S'", "-OU", "IT+1",
                "--serialNumber", "4711", "--notBefore", "-3600", "--notAfter", "7200")
    subject = field(pair.server, "-subject", "-nameopt", "sep_multiline,sname,utf8").split("\n    ")[1:]
    assert subject == ["C=DE", "O=Bäcker & Söhne, 'A/S'", "OU=IT+1", "CN=a.lan"]
    assert field(pair.server, "-serial") == "serial=1267"
    ends = [int(run("date", "-d", field(pair.server, "-" + name).split("=")[1], "+%s").stdout) - before
            for name in ("startdate", "enddate")]
    assert abs(ends[0] + 3600) < 10 and abs(ends[1] - 7200) < 10
    Pair(tmp_path / "b", "--subjectAltName", "a.lan", "--countryName", "", "--organisationName", "x",
         "--organisationUnitName", "y")


DAYS_TO_2052 = str(int((2566e6 - time.time()) // 86400))


def test_own_names(monkeypatch):
    """This host's name is completed by its full name, asked for as bytes (python3-light has no idna codec); a host that cannot
    tell its name is localhost. (The resolver is a stand-in here: this host need not have a full name.)"""
    loopback = [("DNS", "localhost"), ("IP", "127.0.0.1"), ("IP", "::1")]

    def resolver(host, *_):
        answer = {b"UPSbox": "upsbox.lan", b"odd": "localhost.localdomain", b"bad": "bad.a b"}[host]
        return [(None, None, None, answer, None)]
    monkeypatch.setattr(tool.socket, "getaddrinfo", resolver)
    for host, names in (("UPSbox", [("DNS", "upsbox"), ("DNS", "upsbox.lan")]), ("odd", [("DNS", "odd")]), ("bad", [("DNS", "bad")]),
                        ("my box", []), ("schöner", []), ("", [])):
        monkeypatch.setattr(tool.socket, "gethostname", lambda host=host: host)
        assert tool.own_names() == names + loopback
    monkeypatch.setattr(tool.socket, "gethostname", lambda: "upsbox")
    for fault in (OSError(), LookupError(), UnicodeError()):
        monkeypatch.setattr(tool.socket, "getaddrinfo", lambda *_, fault=fault: (_ for _ in ()).throw(fault))
        assert tool.own_names() == [("DNS", "upsbox")] + loopback


@pytest.mark.parametrize("days, form", [("30", "UTCTIME"), ("3650000", None), (DAYS_TO_2052, "GENERALIZEDTIME")])
def test_days(tmp_path, days, form):
    """--days counts from the beginning, written as RFC 5280 wants it before and from 2050 on; beyond 9999 is refused."""
    if form is None:
        assert "1950 to 9999" in refused("-d", tmp_path, "--days", days)
        assert not os.listdir(tmp_path)
        return
    pair = Pair(tmp_path, "--days", days)
    done = ossl("asn1parse", "-in", pair.client)
    assert re.findall("(UTCTIME|GENERALIZEDTIME) ", done)[:2] == ["UTCTIME", form]
    assert run("openssl", "x509", "-in", pair.server, "-noout", "-checkend", str(int(days) * 86400 - 60)).returncode == 0
    assert run("openssl", "x509", "-in", pair.server, "-noout", "-checkend", str(int(days) * 86400 + 60)).returncode == 1


@pytest.mark.parametrize("args, code", [
    (("--days", "5", "--notAfter", "5"), 2), (("--days", "0"), 2), (("--days", "x"), 2), (("--notBefore", "1e3"), 2),
    (("--notAfter", "-5"), 1), (("--notBefore", "10", "--notAfter", "5"), 1), (("--notBefore", "-999999999999"), 1),
    (("--notAfter", "999999999999"), 1), (("--serialNumber", "0"), 2), (("--serialNumber", "-1"), 2),
    (("--serialNumber", "9" * 50), 2), (("--key-type", "dsa"), 2), (("--key-type", "rsa:1024"), 2),
    (("--key-type", "rsa:99999"), 2), (("-SAN",), 2), (("extra",), 2), (("-s", "x.pem", "-c", "./x.pem"), 1),
    (("server", "-SAN", "x"), 2), (("client", "a.lan", "--upstream", "b"), 2), (("renew", "x.pem", "--key-type", "ec"), 2), (("check",), 2), (("client",), 2), (("renew", "none.pem", "--days", "3"), 1),
])
def test_wrong_options(tmp_path, args, code):
    """Options that are wrong or contradict each other: exit 2 for usage, else 1, and nothing is written."""
    refused("-d", tmp_path, *args, code=code, cwd=str(tmp_path)) if args[0] not in ("server", "check", "client", "renew") \
        else refused(*args, code=code, cwd=str(tmp_path), NUT_CONFPATH=str(tmp_path))
    assert not os.listdir(tmp_path)


def test_rsa_shows_that_it_is_working(tmp_path):
    """An RSA key is announced with its bits before the wait."""
    assert "RSA key of 2048 bits" in mk("-d", tmp_path, "--key-type", "rsa:2048")


# ---- accepted by others -------------------------------------------------------------------------

STRICT = """
import ssl, sys
trust, server, client, name = sys.argv[1:]
ends = []
for context, file in ((ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), server), (ssl.create_default_context(cafile=trust), client)):
    context.load_verify_locations(trust)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if file != "-":
        context.load_cert_chain(file)
        if not ends and client != "-":
            context.verify_mode = ssl.CERT_REQUIRED
    ends.append((ssl.MemoryBIO(), ssl.MemoryBIO(), context))
one = ends[0][2].wrap_bio(ends[0][0], ends[0][1], server_side=True)
two = ends[1][2].wrap_bio(ends[1][0], ends[1][1], server_hostname=name)
for _ in range(4):
    for side in (two, one):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
        ends[0][0].write(ends[1][1].read())
        ends[1][0].write(ends[0][1].read())
print(two.version(), dict(x for y in two.getpeercert()["subject"] for x in y)["commonName"],
      bool(one.getpeercert()) if client != "-" else "-")
"""


def test_python_3_13_strict(kit):
    """Python 3.13's VERIFY_X509_STRICT accepts pair, server and client in a TLS 1.3 handshake, each end verifying the other."""
    if "3.13" not in PYTHONS:
        pytest.skip("Python 3.13 is not installed")
    pair = kit.pair
    for name in ("upsbox.lan", "192.0.2.4", "2001:db8::4"):
        done = run(PYTHONS["3.13"], "-c", STRICT, pair.client, pair.server, "-", name)
        assert done.stdout == "TLSv1.3 upsbox.lan -\n", done.stderr
    done = run(PYTHONS["3.13"], "-c", STRICT, pair.client, pair.server, "-", "b.lan")
    assert done.returncode == 1 and "Hostname mismatch" in done.stderr
    done = run(PYTHONS["3.13"], "-c", STRICT, kit.ca.cert, kit.server, kit.client, "b.lan")
    assert done.stdout == "TLSv1.3 b.lan True\n", done.stderr


def nss_database(folder, ca, identity=None):
    """An NSS database that trusts a CA; identity: a PEM file with key and certificate, kept as "own"."""
    os.mkdir(folder, 0o700)
    password = write(folder + "/password", NSS_PASSWORD + "\n")
    done = [run("certutil", "-N", "-d", folder, "-f", password),
            run("certutil", "-A", "-d", folder, "-f", password, "-n", "ca", "-t", "CT,,", "-i", ca)]
    if identity:
        ossl("pkcs12", "-export", "-in", identity, "-out", folder + "/own.p12", "-name", "own", "-passout", "file:" + password)
        done.append(run("pk12util", "-i", folder + "/own.p12", "-d", folder, "-k", password, "-w", password))
    assert not any(each.returncode for each in done), [each.stderr for each in done]
    return folder


def test_nss_accepts_it(kit, tmp_path):
    """NSS (certutil -V) takes pair, server and client for what they are and nothing else; where it cannot, the tool says so."""
    need(shutil.which("certutil") and shutil.which("pk12util"), "certutil of libnss3-tools")
    assert ("NSS" in kit.pair.output) == (kit.key_type == "ed25519")
    for number, (trust, cert, good, bad) in enumerate((
            (kit.pair.client, kit.pair.server, "V", "C"), (kit.ca.cert, kit.server, "V", "C"), (kit.ca.cert, kit.client, "C", "V"))):
        database = str(tmp_path / ("nss%d" % number))
        if kit.key_type == "ed25519":  # what the note is about: NSS cannot even take it into its database
            with pytest.raises(AssertionError):
                nss_database(database, trust, cert)
            continue
        nss_database(database, trust, cert)
        done = [run("certutil", "-V", "-e", "-d", database, "-f", database + "/password", "-n", "own", "-u", use)
                for use in (good, bad)]
        assert done[0].returncode == 0, done[0].stdout + done[0].stderr
        assert done[1].returncode != 0, "good for -u %s too: %s" % (bad, done[1].stdout)


def test_upsmon_and_upsd_of_nut_use_it(tmp_path):
    """Debian's upsmon (NSS) with CERTVERIFY and FORCESSL logs in at a upsd that has the server's file, and not with another CA."""
    need(not missing_nut(), "NUT")
    need(shutil.which("pk12util"), "pk12util of libnss3-tools")
    pair, other = Pair(tmp_path / "pair"), Pair(tmp_path / "other")
    server = nss_database(str(tmp_path / "upsd"), pair.client, pair.server)
    with Nut(nss=server) as nut:
        def logged_in():
            with PlainClient(nut.port) as client:
                return client.ask("GET NUMLOGINS ups") == b"NUMLOGINS ups 1\n"
        with Upsmon(nut.port, nss=nss_database(str(tmp_path / "other_nss"), other.client)) as upsmon:
            upsmon.wait_log("Certificate validation failed", 20)
            upsmon.wait_log("[Cc]onnect failed", 20)
            assert not logged_in()
        with Upsmon(nut.port, nss=nss_database(str(tmp_path / "nss"), pair.client)) as upsmon:
            upsmon.wait_log("Connected to NUT server localhost in SSL", 20)
            poll(logged_in, 20, lambda: "upsmon's login: " + upsmon.log)


@pytest.mark.parametrize("version", ["3.%d" % minor for minor in range(7, 15)])
def test_every_python(tmp_path, version):
    """Every Python from 3.7 to 3.14 that is installed makes a pair, a CA and a server's certificate that hold, without a warning."""
    if version not in PYTHONS:
        pytest.skip("Python %s is not installed" % version)
    python = PYTHONS[version]
    options = {"python": python, "PYTHONWARNINGS": "default"}
    done = [mk("-d", tmp_path, "-s", tmp_path / "s.pem", "-c", tmp_path / "c.pem", **options),
            mk("ca", "-d", tmp_path / "ca", **options), mk("server", "a.lan", "-d", tmp_path / "ca", **options),
            mk("check", tmp_path / "s.pem", "-d", tmp_path / "ca", tmp_path / "c.pem", "--for", "::1", **options)]
    assert "Warning" not in "".join(done)
    verify(str(tmp_path / "c.pem"), str(tmp_path / "s.pem"), "-purpose", "sslserver")


OPENWRT = """
import sys
OPENSSL = set('%s'.split())
MISSING = set('''logging unittest asyncio email urllib multiprocessing ctypes decimal _decimal unicodedata uuid xml pydoc lzma
_lzma sqlite3 readline dbm pathlib concurrent http statistics turtle idlelib lib2to3 cgi'''.split()) | OPENSSL
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING or name == "importlib.metadata":
            raise ModuleNotFoundError(name + " is not in python3-light")
sys.meta_path.insert(0, Finder())
assert not MISSING & set(sys.modules), MISSING & set(sys.modules)
import socket
try:
    "x".encode("idna")
    sys.exit("the idna codec is still there")
except LookupError:
    pass
sys.argv = sys.argv[1:]
__file__ = sys.argv[0]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


def test_python3_light_of_openwrt_is_enough(tmp_path):
    """It runs without the modules and the idna codec that OpenWrt's python3-light lacks; without ssl too, where it reads no
    certificate, and else names the package."""
    light = ("-S", "-E", "-c", OPENWRT % "ssl _ssl _hashlib", MKNUTCERT)
    done = run(sys.executable, *light, "-d", tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, *light, "show", next(str(path) for path in tmp_path.iterdir()))
    assert done.returncode == 1 and "install python3-openssl" in done.stderr, done.stderr
    for args in (("ca", "-d", tmp_path / "ca"), ("client", "c.lan", "-d", tmp_path / "ca", "--bundle", tmp_path / "c.tar"),
                 ("check", "-d", tmp_path / "ca", tmp_path / "ca/ca.pem")):
        done = run(sys.executable, "-S", "-E", "-c", OPENWRT % "", MKNUTCERT, *args)
        assert done.returncode == 0, done.stderr


def test_missing_openssl_names_the_package(tmp_path):
    """Without an openssl command the fault names the package, OpenWrt's too, and nothing is written."""
    (tmp_path / "empty").mkdir()
    assert "openssl-util" in refused("-d", tmp_path, PATH=str(tmp_path / "empty"))
    assert os.listdir(tmp_path) == ["empty"]


LIBRESSL = """#!/bin/sh
for word; do
    case $word in
    -ext | -no_check_time | -verify_hostname | -verify_ip | -partial_chain | -no-CApath | -rand_serial | -quiet)
        echo "unknown option '$word'" >&2
        exit 1 ;;
    esac
done
exec %s "$@"
"""


def test_without_the_options_that_libressl_lacks(tmp_path):
    """Pair, CA, server and client can be made without the openssl options that LibreSSL lacks; what needs them says so. (The openssl
    here is a stand-in: a script that refuses those options, as told by LibreSSL's sources.)"""
    (tmp_path / "bin").mkdir()
    path = str(tmp_path / "bin")
    write(path + "/openssl", LIBRESSL % shutil.which("openssl"), 0o755)
    pair, ca = Pair(tmp_path / "pair", path=path), Ca(tmp_path / "ca", path=path)
    verify(pair.client, pair.server, "-verify_hostname", "localhost")
    verify(ca.cert, ca.make("server", "a.lan"), "-verify_hostname", "a.lan")
    client = ca.make("client", "c.lan")
    mk("show", client, path=path)
    for command in ("revoke", "renew"):
        assert "unknown option" in refused(command, client, "-d", ca.folder, path=path)


def test_the_systems_openssl_configuration_does_not_count(tmp_path):
    """A broken or hostile openssl.cnf of the system changes nothing: the tool uses its own."""
    broken = write(str(tmp_path / "openssl.cnf"), "openssl_conf = nowhere\n[ca]\ndefault_ca = nowhere\n[[[\n")
    pair = Pair(tmp_path / "pair", OPENSSL_CONF=broken, SSL_CERT_FILE="/nonexistent")
    verify(pair.client, pair.server)


# ---- bad input ----------------------------------------------------------------------------------

BAD_NAMES = {
    "empty": "", "blank": "a b", "comma": "a,b", "newline": "a\nb", "carriage return": "a\rb", "tab": "a\tb", "slash": "a/b",
    "path": "../../etc/passwd", "equals": "a=b", "wildcard": "*.lan", "wildcard alone": "*", "long": "a" * 300,
    "long label": "a" * 64 + ".lan", "long in sum": ".".join(["a" * 60] * 5), "non-ASCII": "ünut.lan", "IDN digits": "１.２.３.４",
    "environment": "$ENV::HOME", "variable": "${HOME}", "section": "[names]", "injection": "DNS:x,IP:1.2.3.4", "prefix": "DNS:x",
    "config lines": "x\n[names]\nDNS.9 = evil.lan", "comment": "a#b", "semicolon": "a;b", "backslash": "a\\b", "quote": "a'b",
    "IPv4 range": "256.1.1.1", "IPv4 short": "1.2.3", "number": "12345", "IPv4 port": "1.2.3.4:401", "IPv6 range": "fffff::1",
    "IPv6 zone": "fe80::1%eth0", "IPv6 brackets": "[::1]", "IPv6 twice": "1::2::3", "dots": "a..b", "dot first": ".lan",
    "dot last": "lan.", "minus first": "a.-b", "minus last": "b-.lan", "at": "me@lan", "NUL-like": "a\\x00b", "URL": "https://a",
    "quotes": '"a"', "command": "$(id)", "backticks": "`id`",
}


HINTS = {"wildcard": "wildcard", "non-ASCII": "xn--", "injection": "without DNS:", "IPv4 range": "IPv4", "IPv6 zone": "%zone",
         "IPv6 brackets": "brackets", "long": "253", "blank": "no host name"}


@pytest.mark.parametrize("what", BAD_NAMES)
def test_bad_name(tmp_path, what):
    """A name that is no host name or address is refused everywhere, in one clear line that shows it, and nothing is written."""
    bad = BAD_NAMES[what]
    ways = [("server", "-d", tmp_path, "good.lan", "--", bad), ("check", MKNUTCERT, "--for=" + bad),
            ("client", "-d", tmp_path, "--", bad)]
    if " " not in bad:  # for -SAN a blank sets names apart
        ways.append(("-d", tmp_path, "-SAN=" + (bad and "good.lan " + bad)))
    for args in ways:
        text = refused(*args, code=2)
        last = text.strip().splitlines()[-1]
        assert "error: argument" in last and (ascii(bad[:80])[1:-1] in last or not bad), text
        assert HINTS.get(what, "") in last
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("option, value", [
    ("-O", "a\nb"), ("-O", "$ENV::HOME"), ("-O", "a\\b"), ("-O", 'a"b'), ("-O", "a#b"), ("-O", "a;b"), ("-O", "a=b"), ("-OU", "x" * 65),
    ("-O", "a\x00b".replace("\x00", "\x01")), ("-OU", "[ca]"), ("-O", "\u202eabc"), ("-C", "FRA"), ("-C", "F1"), ("-C", "\nF"), ("-C", "É1"),
])
def test_bad_subject(tmp_path, option, value):
    """Whatever could have a meaning in an openssl configuration, or is too long, does not get into the subject."""
    assert "expected" in refused("-d", tmp_path, option, value, code=2)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value", ["x y", "a:0", "a:99999", "a:b", "::1:401:", "[::1", "*", "a,b", "a\nlisten = *:1"])
def test_bad_upstream(tmp_path, value):
    """An --upstream that is no HOST[:PORT] is refused, so that nothing else gets into the bundle's nutshim.conf."""
    assert "argument --upstream" in refused("client", "c.lan", "-d", tmp_path, "--upstream", value, code=2)


def test_too_many_names(tmp_path):
    """More names than a certificate can carry are refused; a hundred are fine, and a name given twice counts once."""
    assert "too many" in refused("-d", tmp_path, "-SAN", " ".join("h%d.lan" % i for i in range(101)))
    pair = Pair(tmp_path / "pair", "-SAN", " ".join("h%d.lan" % (i % 100) for i in range(200)))
    verify(pair.client, pair.server, "-verify_hostname", "h99.lan")


def test_long_names_fit(tmp_path):
    """The longest host name there can be stands among the names, though it fits neither a CN nor a file name."""
    name = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
    assert len(name) == 253
    pair = Pair(tmp_path / "pair", "-SAN", name)
    verify(pair.client, pair.server, "-verify_hostname", name)
    ca = Ca(tmp_path / "ca")
    verify(ca.cert, ca.make("server", name), "-verify_hostname", name)
    mk("client", name, "-d", ca.folder, "--bundle", tmp_path / "x.tar")


# ---- files: never overwritten unasked, whole or not at all -----------------------------------------

def test_existing_files_stay_without_y(tmp_path):
    """A file that exists is left as it is without -y, its fellow is not made either, and -y replaces both."""
    pair = Pair(tmp_path)
    before = content(tmp_path)
    assert "-y" in refused(*pair.args) and content(tmp_path) == before
    os.unlink(pair.client)
    refused(*pair.args)
    assert os.listdir(tmp_path) == ["server.pem"]
    mk(*pair.args, "-y")
    assert content(tmp_path)["server.pem"] != before["server.pem"]
    verify(pair.client, pair.server)


def terminal(answer, *args):
    """Run it on a terminal and type an answer once it asks; exit code and what it printed."""
    main, other = pty.openpty()
    process = subprocess.Popen([sys.executable, MKNUTCERT] + [str(arg) for arg in args], stdin=other, stdout=other,
                               stderr=other, env=clean_env(), start_new_session=True)
    os.close(other)
    text = b""
    try:
        while select.select([main], [], [], 20)[0]:
            try:
                data = os.read(main, 4096)
            except OSError:  # its last end is closed
                break
            text += data
            if b"[y/N]" in text and answer is not None:
                os.write(main, answer)
                answer = None
        return process.wait(20), text.decode()
    finally:
        process.kill()
        process.wait()
        os.close(main)


@pytest.mark.parametrize("answer, replaced", [(b"yes\n", True), (b"y\n", True), (b"n\n", False), (b"\n", False), (b"\x04", False)])
def test_a_typed_yes_replaces(tmp_path, answer, replaced):
    """On a terminal it asks before it replaces, and only a typed yes will do; no answer at all is a no."""
    pair = Pair(tmp_path)
    before = content(tmp_path)
    code, text = terminal(answer, *pair.args)
    assert "Replace?" in text and "Traceback" not in text
    assert code == (0 if replaced else 1) and (content(tmp_path) != before) == replaced


def test_no_question_without_a_reason(tmp_path):
    """On a terminal nothing is asked where nothing is replaced."""
    code, text = terminal(None, "-d", tmp_path)
    assert code == 0 and "?" not in text and len(os.listdir(tmp_path)) == 2


FILE_CALLS = ("open", "fsync", "replace", "link", "unlink", "fchmod", "fchown", "mkdir")


def hook(call):
    """Let call(name, args) see each of the tool's system calls that create, write out or move a file, before it is made."""
    for name in FILE_CALLS:
        def hooked(*args, _name=name, _real=getattr(os, name), **options):
            if _name != "open" or len(args) > 1 and args[1] & os.O_CREAT:
                call(_name, args)
            return _real(*args, **options)
        setattr(os, name, hooked)


def test_keys_are_private_from_the_first_byte(tmp_path):
    """Under umask 0 every file is created with O_EXCL and 0600, the CA's lock and key folder closed to all others."""
    def child():
        bad = []

        def call(name, args):
            if name == "open" and "mkNUTcert-" not in str(args[0]) and (
                    len(args) < 3 or args[2] != 0o600 or not args[1] & os.O_EXCL and not args[0].endswith("lock")):
                bad.append(args)
        os.umask(0)
        hook(call)
        code = tool.main(["-d", str(tmp_path)]) or tool.main(["ca", "-d", str(tmp_path / "ca")]) or tool.main(
            ["client", "c.lan", "-d", str(tmp_path / "ca"), "--bundle", str(tmp_path / "c.tar")])
        return code or len(bad)
    assert wait(forked(child)) == 0
    assert mode(tmp_path / "ca/private") == 0o700 and mode(tmp_path / "c.tar") == 0o600
    for base, _, files in os.walk(tmp_path):
        for name in files:
            path = os.path.join(base, name)
            keys = any("KEY" in kind for kind in blocks(path)) if name.endswith(".pem") else name.endswith(".tar")
            assert not keys or mode(path) in (0o600, 0o640), (path, oct(mode(path)))


SPY = """#!/bin/sh
echo "$@" >> {log}
env >> {log}
grep -rl 'PRIVATE KEY' {tmp} >> {found} 2>/dev/null
{real} "$@"
code=$?
grep -rl 'PRIVATE KEY' {tmp} >> {found} 2>/dev/null
exit $code
"""


def test_keys_are_in_no_argument_and_no_temporary_file(tmp_path):
    """While it works, no private key is in an argument, the environment or the temporary folder; the CA's of a pair never anywhere."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "tmp").mkdir()
    log, found = tmp_path / "log", tmp_path / "found"
    write(str(tmp_path / "bin/openssl"), SPY.format(log=log, found=found, tmp=tmp_path / "tmp", real=shutil.which("openssl")), 0o755)
    pair = Pair(tmp_path / "pair", path=str(tmp_path / "bin"), TMPDIR=str(tmp_path / "tmp"))
    ca = Ca(tmp_path / "ca", path=str(tmp_path / "bin"), TMPDIR=str(tmp_path / "tmp"))
    client = ca.make("client", "c.lan")
    text = log.read_text()
    assert "genpkey" in text and "-keyfile /dev/stdin" in text and "PRIVATE KEY" not in text and found.read_text() == ""
    for path in (pair.server, client, ca.folder + "/private/ca-key.pem"):
        with open(path, encoding="ascii") as file:
            assert file.read().splitlines()[1] not in text
    assert os.listdir(tmp_path / "tmp") == [], "the private folder is left behind"


@pytest.fixture
def outside():
    """A folder that every user can reach, unlike pytest's."""
    path = tempfile.mkdtemp(prefix="nutshim-mk-")
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


@root_only
def test_owner(tmp_path, outside):
    """A key is root's and readable by one group: that of --owner, of its GROUP, or of NUT's user; public files are 0644."""
    need(not missing_nut(), "NUT")
    for args, group in (((), "nut"), (("--owner", "nobody"), "nogroup"), (("--owner", "nut:daemon"), "daemon")):
        pair = Pair(tmp_path / group, *args)
        assert "0640 root:" + group in pair.output
        assert run("stat", "-c", "%a %U:%G", pair.server).stdout == "640 root:%s\n" % group
        assert mode(pair.client) == 0o644
    for owner in ("no-such-user", "nut:no-such-group", ":nut"):
        assert "no such" in refused("-d", tmp_path, "--owner", owner)
    os.chown(outside, NOBODY, NOBODY)
    assert "only root" in refused("-d", outside, "--owner", "nut", user=NOBODY) and os.listdir(outside) == []
    mk("-d", outside, user=NOBODY)
    assert sorted(mode(os.path.join(outside, name)) for name in os.listdir(outside)) == [0o600, 0o644]


def test_places_that_are_no_files(tmp_path):
    """A folder or a pipe in a file's place, and a folder that is missing, are named, even with -y, and stay as they are."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for place in (str(tmp_path / "folder"), str(tmp_path / "fifo")):
        assert "no plain file" in refused("-s", place, "-c", tmp_path / "c.pem", "-y")
    assert "no such folder" in refused("-s", tmp_path / "missing/s.pem", "-c", tmp_path / "c.pem", "-y")
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode) and sorted(os.listdir(tmp_path)) == ["fifo", "folder"]
    write(str(tmp_path / "file"), "")
    refused("ca", "-d", tmp_path / "file")


def test_two_names_of_one_folder(tmp_path):
    """Two files for one folder, named once by a link to it, are made, with each run waiting for others, not for itself."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    mk("-SAN", "a.lan", "-s", tmp_path / "real/a.pem", "-c", tmp_path / "link/b.pem")
    assert sorted(os.listdir(str(tmp_path / "real"))) == ["a.pem", "b.pem"]


def test_a_link_is_neither_followed_nor_replaced(tmp_path):
    """A symbolic link in a file's place is refused, even with -y and whatever it points to, and both stay as they are."""
    target = write(str(tmp_path / "precious"), "data")
    for number, place in enumerate((target, str(tmp_path / "nowhere"), str(tmp_path))):
        link = str(tmp_path / ("link%d" % number))
        os.symlink(place, link)
        assert "no plain file" in refused("-s", link, "-c", tmp_path / "c.pem", "-y")
        assert os.readlink(link) == place
    assert (tmp_path / "precious").read_text() == "data" and sorted(os.listdir(tmp_path)) == ["link0", "link1", "link2", "precious"]


@contextlib.contextmanager
def mounted(path, size):
    """A small tmpfs; a visible skip where none can be mounted."""
    os.makedirs(path, exist_ok=True)
    if not IS_ROOT or run("mount", "-t", "tmpfs", "-o", "size=" + size, "none", path).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield path
    finally:
        done = run("umount", path)
        assert done.returncode == 0, done.stderr


def fill(path):
    """Leave no block free."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_full_disk(tmp_path):
    """On a full disk the fault says so, the files of before are whole, and no piece is left."""
    with mounted(str(tmp_path / "small"), "64k") as small:
        ca, pair = Ca(small + "/ca"), Pair(small)
        fill(small + "/ballast")
        before = content(small)
        for args in ((*pair.args, "-y"), ("server", "a.lan", "-d", ca.folder), ("revoke", "-d", ca.folder, pair.server),
                     ("client", "c.lan", "-d", ca.folder, "--bundle", small + "/x.tar")):
            text = refused(*args)
            assert "No space left" in text or "not begin with a certificate from" in text, text
            assert content(small) == before


def test_read_only_disk(tmp_path):
    """On a read-only disk the fault names the file and the reason, and nothing is lost."""
    with mounted(str(tmp_path / "small"), "64k") as small:
        ca, pair = Ca(small + "/ca"), Pair(small)
        before = content(small)
        assert run("mount", "-o", "remount,ro", small).returncode == 0
        text = refused(*pair.args, "-y")
        assert "Read-only" in text and small in text
        assert "Read-only" in refused("server", "a.lan", "-d", ca.folder)
        assert "Read-only" in refused("ca", "-d", small + "/new")
        assert content(small) == before


@root_only
def test_folder_of_someone_else(outside):
    """Where others own or can write the CA's folder, or the user may not write, the fault names it and nothing changes."""
    pair, ca = Pair(outside + "/roots"), Ca(outside + "/ca")
    before = content(outside)
    for args in (pair.args + ("-y",), ("-d", pair.folder)):
        assert "Permission denied" in refused(*args, user=NOBODY)
    for args in (("server", "a.lan"), ("client", "a.lan"), ("ca",), ("revoke", pair.server), ("renew", pair.server)):
        text = refused(*args, "-d", ca.folder, user=NOBODY)
        assert ca.folder in text and "root" in text
    for path in (ca.folder, ca.folder + "/private"):
        old = mode(path)
        os.chown(path, NOBODY, NOBODY)
        assert "run this as" in refused("server", "a.lan", "-d", ca.folder)
        os.chown(path, 0, 0)
        os.chmod(path, 0o777)
        assert "chmod go-w" in refused("server", "a.lan", "-d", ca.folder)
        os.chmod(path, old)
    assert "chmod go-w" in refused("ca", "-d", tempfile.gettempdir())
    assert content(outside) == before


def test_two_runs_at_once_for_one_pair(tmp_path):
    """Of several runs for the same two files without -y exactly one makes them, and what lies there belongs together."""
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        args = ["-s", str(folder / "s.pem"), "-c", str(folder / "c.pem")]
        pids = [forked(lambda: tool.main(args)) for _ in range(4)]
        assert sorted(map(wait, pids)) == [0, 1, 1, 1]
        assert sorted(os.listdir(folder)) == ["c.pem", "s.pem"]
        verify(str(folder / "c.pem"), str(folder / "s.pem"))


def test_two_runs_at_once_that_replace_one_pair(tmp_path, monkeypatch):
    """With -y the last of several runs wins, with both files. (Each takes its time between the two.)"""
    server, client = str(tmp_path / "s.pem"), str(tmp_path / "c.pem")
    monkeypatch.setattr(tool, "sync_names", lambda folder: time.sleep(int.from_bytes(os.urandom(1), "big") / 1000))
    args = ["-y", "-SAN", "a.lan", "-s", server, "-c", client]
    assert tool.main(args) == 0
    pids = [forked(lambda: tool.main(args)) for _ in range(8)]
    assert set(map(wait, pids)) == {0}
    verify(client, server)


def test_runs_at_once_in_one_ca(tmp_path):
    """Several runs at once in one CA all succeed, no serial comes twice, and the index has them all."""
    ca = Ca(tmp_path / "ca")
    pids = [forked(lambda i=i: tool.main(["client" if i % 2 else "server", "h%d.lan" % i, "-d", ca.folder])) for i in range(8)]
    assert list(map(wait, pids)) == [0] * 8
    serials = {field(path, "-serial") for path in ca.issued()}
    assert len(serials) == 8 and all(len(serial) == 7 + 32 for serial in serials)
    with open(ca.folder + "/private/index.txt", encoding="ascii") as file:
        assert {"serial=" + line.split("\t")[3] for line in file} == serials
    pids = [forked(lambda path=path: tool.main(["revoke", path, "-d", ca.folder])) for path in ca.issued()]
    pids += [forked(lambda: tool.main(["ca", "-d", str(tmp_path / "new")])) for _ in range(3)]
    codes = list(map(wait, pids))
    assert codes[:8] == [0] * 8 and sorted(codes[8:]) == [0, 1, 1]
    assert ossl("crl", "-in", ca.crl, "-noout", "-text").count("Serial Number:") == 8
    verify(str(tmp_path / "new/ca.pem"), str(tmp_path / "new/ca.pem"))


# ---- the CA that stays --------------------------------------------------------------------------

def test_ca_issues_and_revokes(kit):
    """With every openssl and key type: server and client hold for their purpose alone; revoked ones, and only those, fail the CRL check."""
    ca, server, client = kit.ca, kit.server, kit.client
    crl = ("-crl_check", "-CRLfile", ca.crl)
    for cert, use, other, name in ((server, "sslserver", "sslclient", "b.lan"), (client, "sslclient", "sslserver", "c.lan")):
        assert blocks(cert) == ["PRIVATE KEY", "CERTIFICATE", "CERTIFICATE"]
        verify(ca.cert, cert, "-purpose", use, "-verify_hostname", name, *crl)
        verify(ca.cert, cert, "-purpose", other, ok=False)
    victims = [ca.make(role, "victim.lan") for role in ("server", "client")]
    assert "crl = " + ca.crl in mk("revoke", victims[0], "-d", ca.folder, path=kit.path)
    mk("revoke", victims[0], "-d", ca.folder, path=kit.path)
    mk("revoke", glob.glob(ca.folder + "/issued/victim.lan.client.*")[0], "-d", ca.folder, path=kit.path)
    for cert in victims:
        assert "certificate revoked" in verify(ca.cert, cert, *crl, ok=False)
    verify(ca.cert, server, *crl)
    text = ossl("crl", "-in", ca.crl, "-noout", "-text")
    assert text.count("Serial Number:") == 2 and "X509v3 CRL Number: \n                4" in text
    assert "verify OK" in run("openssl", "crl", "-in", ca.crl, "-noout", "-CAfile", ca.cert).stderr
    assert field(ca.cert, "-enddate").endswith("9999 GMT")
    assert ossl("crl", "-in", ca.crl, "-noout", "-nextupdate").strip().endswith("9999 GMT")


def test_ca_folder(tmp_path):
    """By default the CA is in nutshim below NUT's folder; its key is its owner's alone, apart from what is handed out."""
    (tmp_path / "nut").mkdir()
    text = mk("ca", NUT_CONFPATH=str(tmp_path / "nut"))
    folder = tmp_path / "nut/nutshim"
    assert sorted(os.listdir(folder)) == ["ca.pem", "crl.pem", "issued", "private"]
    assert mode(folder) == 0o755 and mode(folder / "private") == 0o700 and mode(folder / "private/ca-key.pem") == 0o600
    assert blocks(folder / "ca.pem") == ["CERTIFICATE"] and "0600" in text
    mk("server", NUT_CONFPATH=str(tmp_path / "nut"))
    mk("check", folder / "crl.pem", folder / "private/ca-key.pem", *glob.glob(str(folder / "*.pem")), NUT_CONFPATH=str(tmp_path / "nut"))


def test_a_ca_is_not_replaced(tmp_path):
    """A CA that is there stays, with -y too; without one, server, client, revoke and renew name the command that makes it."""
    ca = Ca(tmp_path / "ca")
    cert = ca.make("server", "a.lan")
    before = content(ca.folder)
    for args in ((), ("-y",)):
        assert "CA already" in refused("ca", "-d", ca.folder, *args) and content(ca.folder) == before
    (tmp_path / "none").mkdir()
    for args in (("server", "a.lan"), ("client", "a.lan"), ("revoke", cert), ("renew", cert, "-y")):
        for folder in ("none", "missing"):
            assert "mkNUTcert.py ca -d" in refused(*args, "-d", tmp_path / folder)
    assert os.listdir(tmp_path / "none") == []


def test_certificates_end_with_their_ca(tmp_path):
    """A certificate never outlives its CA, and a CA that has ended issues none."""
    ca = Ca(tmp_path / "ca", "--days", "10")
    assert field(ca.make("server", "a.lan"), "-enddate") == field(ca.cert, "-enddate")
    assert field(ca.make("server", "b.lan", "--days", "5"), "-enddate") != field(ca.cert, "-enddate")
    ended = Ca(tmp_path / "ended", "--notBefore", "-100", "--notAfter", "-50")
    assert "the CA ends on" in refused("server", "a.lan", "-d", ended.folder)


def test_revoke_takes_only_what_the_ca_issued(tmp_path):
    """A certificate of another CA, the CA's own, a key, text and a folder are refused, and the CRL stays as it is."""
    ca, other = Ca(tmp_path / "ca"), Ca(tmp_path / "other")
    before = content(ca.folder)
    for path in (other.make("client", "x.lan"), ca.cert, ca.folder + "/private/ca-key.pem", MKNUTCERT, tmp_path, "missing.pem"):
        refused("revoke", path, "-d", ca.folder)
    assert content(ca.folder) == before


def test_revoke_names_what_is_still_good(tmp_path):
    """revoke names the certificates for the same name that are neither revoked nor over, until there are none; show lists what the list revokes."""
    ca = Ca(tmp_path / "ca")
    for args in ((), ("-y",), ("-y", "--notBefore", "-10", "--notAfter", "-5")):
        ca.make("client", "lost.lan", *args)
    ca.make("client", "lost.lan.example")
    copies = {name: name.split(".")[-2] for name in glob.glob(ca.folder + "/issued/lost.lan.client.*")}
    good = [name for name in copies if run("openssl", "x509", "-in", name, "-noout", "-checkend", "0").returncode == 0]
    assert len(good) == 2 and len(copies) == 3
    text = mk("revoke", good[0], "-d", ca.folder)
    assert text.partition("Careful")[2].count("/issued/") == 1 and good[1] in text
    assert "ends its open sessions too" in text
    assert "Careful" not in mk("revoke", good[1], "-d", ca.folder)
    shown = mk("show", ca.crl)
    assert [copies[name] in shown for name in copies] == [name in good for name in copies]


def test_renew(tmp_path):
    """renew keeps names, purpose, subject, key, pin, length, owner and mode; --new-key changes the key and prints both pins."""
    ca = Ca(tmp_path / "ca")
    for role, names in (("server", ("a.lan", "192.0.2.4", "::1")), ("client", ("c.lan",))):
        path = ca.make(role, *names, "--days", "100", "-O", "Söhne, A/S", "-OU", "x+y'z")
        os.chmod(path, 0o400)
        old, key = {name: field(path, "-" + name) for name in ("subject", "serial", "pubkey")}, pin(path)
        names = field(path, "-ext", "subjectAltName,extendedKeyUsage,keyUsage,basicConstraints")
        assert "-y" in refused("renew", path, "-d", ca.folder)
        text = mk("renew", path, "-d", ca.folder, "-y", "--notBefore", "-10")
        assert key in text and pin(path) == key and mode(path) == 0o400
        assert ("carry it to c.lan" in text) == (role == "client")
        assert [field(path, "-" + name) == old[name] for name in ("subject", "serial", "pubkey")] == [True, False, True]
        assert field(path, "-ext", "subjectAltName,extendedKeyUsage,keyUsage,basicConstraints") == names
        for seconds, code in ((100 * 86400 - 100, 0), (100 * 86400 + 100, 1)):
            assert run("openssl", "x509", "-in", path, "-noout", "-checkend", str(seconds)).returncode == code
        text = mk("renew", path, "-d", ca.folder, "-y", "--new-key", "--days", "3")
        assert key in text and pin(path) in text and pin(path) != key
        assert run("openssl", "x509", "-in", path, "-noout", "-checkend", str(4 * 86400)).returncode == 1
        verify(ca.cert, path, "-purpose", "ssl" + role)
        mk("renew", path, "-d", ca.folder, "-o", tmp_path / (role + "2.pem"), "--notAfter", "0")
        assert pin(tmp_path / (role + "2.pem")) == pin(path)
        assert field(tmp_path / (role + "2.pem"), "-enddate").endswith("9999 GMT")


def test_renew_of_the_issued_copy_and_its_key_type(tmp_path):
    """A copy in issued/ has no key, so it wants --new-key; the new key is of the old kind unless --key-type says otherwise."""
    ca = Ca(tmp_path / "ca")
    ca.make("server", "a.lan", "--key-type", "rsa:2048")
    copy, out = ca.issued("server")[0], str(tmp_path / "new.pem")
    assert "--new-key" in refused("renew", copy, "-d", ca.folder, "-o", out)
    mk("renew", copy, "-d", ca.folder, "-o", out, "--new-key")
    assert "2048 bit" in ossl("pkey", "-in", out, "-noout", "-text_pub") and mode(out) in (0o600, 0o640)
    mk("renew", out, "-d", ca.folder, "-y", "--new-key", "--key-type", "ed25519")
    assert "ED25519" in ossl("pkey", "-in", out, "-noout", "-text_pub")


def test_renew_of_what_is_expired_or_revoked(tmp_path):
    """An expired certificate can be renewed; a revoked one, one of another CA and one with a foreign key cannot."""
    ca, other = Ca(tmp_path / "ca"), Ca(tmp_path / "other")
    path = ca.make("server", "a.lan", "--notBefore", "-10", "--notAfter", "-5")
    mk("renew", path, "-d", ca.folder, "-y", "--days", "5")
    assert run("openssl", "x509", "-in", path, "-noout", "-checkend", "0").returncode == 0
    assert "not begin with a certificate from the CA" in refused("renew", path, "-d", other.folder, "-y")
    client = ca.make("client", "c.lan")
    with open(client, encoding="ascii") as file:
        key = file.read().split("-----BEGIN CERT")[0]
    with open(path, encoding="ascii") as file:
        mixed = write(str(tmp_path / "mixed.pem"), key + "-----BEGIN CERT" + file.read().split("-----BEGIN CERT", 1)[1])
    assert "key is not in it" in refused("renew", mixed, "-d", ca.folder, "-y")
    mk("revoke", client, "-d", ca.folder)
    assert "is revoked" in refused("renew", client, "-d", ca.folder, "-y")


def test_bundle(tmp_path):
    """The bundle is one 0600 tar of key file, CA and a nutshim.conf that nutshim.py -t takes; no other copy of the key is made."""
    ca = Ca(tmp_path / "ca")
    tar = str(tmp_path / "c.tar")
    text = mk("client", "c.lan", "-d", ca.folder, "--bundle", tar, "--upstream", "[2001:db8::4]:4010")
    assert mode(tar) == 0o600 and not glob.glob(ca.folder + "/*client.pem")
    with tarfile.open(tar) as file:
        members = {member.name: (member.mode, member.uname, member.gname) for member in file}
        assert members == {"nutshim.conf": (0o640, "root", "nut"), "c.lan.client.pem": (0o640, "root", "nut"),
                           "nutshim-ca.pem": (0o644, "root", "nut")}
        file.extractall(tmp_path / "there")
    there = str(tmp_path / "there")
    verify(there + "/nutshim-ca.pem", there + "/c.lan.client.pem", "-purpose", "sslclient")
    assert pin(there + "/c.lan.client.pem").startswith("sha256//")
    with open(there + "/nutshim.conf", encoding="ascii") as file:
        conf = file.read()
    assert "upstream = [2001:db8::4]:4010\n" in conf and "certificate = /etc/nut/c.lan.client.pem\n" in conf
    write(there + "/test.conf", conf.replace("/etc/nut", there))
    tested = run_shim("-t", "-f", there + "/test.conf")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "tar -xpf c.tar -C /etc/nut" in text
    refused("client", "c.lan", "-d", ca.folder, "--bundle", tar)
    text = mk("client", "d.lan", "-d", ca.folder, "--bundle", tar, "-y", "-o", tmp_path / "d.pem")
    with tarfile.open(tar) as file:
        assert b"upstream = CHANGE-ME\n" in file.extractfile("nutshim.conf").read()
        assert file.extractfile("d.lan.client.pem").read() == (tmp_path / "d.pem").read_bytes()
    assert "set upstream" in text


def test_the_lines_to_paste_work(tmp_path):
    """What pair and server print for nutshim.conf, by file and by pin alone, is taken by nutshim.py -t as it stands."""
    pair = Pair(tmp_path / "pair", "-SAN", "localhost")
    ca = Ca(tmp_path / "ca")
    text = mk("server", "localhost", "-d", ca.folder)
    for text, folder in ((pair.output, pair.folder), (text, ca.folder)):
        conf = sections(text)
        assert [each.split("\n")[0] for each in conf] == ["[upsd]", "[ups]", "[ups]"]
        for part in conf:
            path = write(str(tmp_path / "nutshim.conf"), part.replace("/etc/nut", folder))
            tested = run_shim("-t", "-f", path)
            assert tested.returncode == 0, part + tested.stdout + tested.stderr
        assert "verify = pin\npin = sha256//" in conf[2]
    assert pin(pair.server) in pair.output


def test_the_lines_to_paste_work_for_any_folder(tmp_path):
    """A path with what means something in nutshim.conf is printed so that nutshim.py -t takes it: in server, client and revoke."""
    ca = Ca(tmp_path / "a, b #1;")
    server, = sections(mk("server", "localhost", "-d", ca.folder))[:1]
    client = mk("client", "c.lan", "-d", ca.folder)
    lines = [line for line in client.splitlines() if re.match("  (client_certificate|trust|crl) = ", line)]
    assert len(lines) == 3 and lines[2] in mk("revoke", ca.folder + "/c.lan.client.pem", "-d", ca.folder)
    tested = run_shim("-t", "-f", write(str(tmp_path / "nutshim.conf"), "\n".join([server] + lines)))
    assert tested.returncode == 0, tested.stdout + tested.stderr


# ---- show and check -----------------------------------------------------------------------------

def test_show(tmp_path, kit):
    """show says in words what is in a file: subject, names, issuer, dates with days left, key type, pin; and goes on after a bad file."""
    ca = kit.ca
    server = ca.make("server", "a.lan", "::1", "--days", "11", "--notBefore", "-60", "--key-type", kit.key_type, "-O", "Söhne", "-y")
    text = mk("show", server, ca.crl, path=kit.path)
    key = {"ec": "EC P-256", "rsa:2048": "RSA 2048", "ed25519": "Ed25519"}[kit.key_type]
    for part in ("private key, %s, of certificate 1" % key, "certificate 1, for TLS Web Server Authentication", "O=Söhne, CN=a.lan",
                 "DNS:a.lan, IP:::1", "10 days left", "issuer:  itself", "never expires", pin(server), "certificate revocation list"):
        assert part in text, part
    text = mk("show", "missing.pem", ca.cert, MKNUTCERT, expect=1, path=kit.path)
    assert "missing.pem: No such file" in text and "no whole PEM file" in text and "of a CA" in text
    for kind in "PRIVATE KEY", "X509 CRL":
        broken = write(str(tmp_path / "broken.pem"), "-----BEGIN %s-----\nMAAA\n-----END %s-----\n" % (kind, kind))
        text = mk("show", broken, ca.cert, expect=1, path=kit.path)
        assert re.search("(?m)^mkNUTcert.py: %s: .*cannot (be )?read" % re.escape(broken), text) and "of a CA" in text, text
    expired = ca.make("client", "e.lan", "--notBefore", "-99999", "--notAfter", "-86500", "-o", tmp_path / "e.pem")
    assert "EXPIRED 1 days ago" in mk("show", expired, path=kit.path)


def test_check_finds_nothing_wrong_with_what_is_right(kit, tmp_path):
    """With every openssl and key type, all that the tool makes passes its own check, for its names too."""
    text = mk("check", kit.pair.server, kit.pair.client, "--for", "upsbox.lan", "--for", "2001:db8::4", "-d", tmp_path, path=kit.path)
    assert text.endswith("all good\n") and text.count(": good\n") == 2
    text = mk("check", kit.server, kit.client, kit.ca.cert, kit.ca.crl, path=kit.path, NUT_CONFPATH=str(tmp_path))
    assert text.endswith("all good\n") and text.count(": good\n") == 4
    mk("check", kit.server, kit.client, "--for", "b.lan", "-d", kit.ca.folder, path=kit.path)


def test_check_names_each_fault_and_its_cure(tmp_path):
    """Each thing that can be wrong with a file is found, with its cure, and makes the exit code 1."""
    ca, other = Ca(tmp_path / "ca"), Ca(tmp_path / "other")
    server, client = ca.make("server", "a.lan"), ca.make("client", "c.lan")
    parts = {}
    for path in (server, client):
        with open(path, encoding="ascii") as file:
            parts[path] = [part + "-----\n" for part in re.split("(?<=[YE])-----\n(?=-----BEGIN|$)", file.read()) if part]
        assert len(parts[path]) == 3

    def faults(*args, code=1, d=ca.folder):
        text = mk("check", *args, "-d", d, expect=code)
        assert ("cure:" in text) == bool(code)
        return text

    def file(*pieces, name="x.pem"):
        path = write(str(tmp_path / name), "".join(pieces))
        os.chown(path, -1, os.stat(server).st_gid)
        os.chmod(path, mode(server))
        return path

    assert "is for DNS:a.lan, not for b.lan" in faults(server, "--for", "b.lan")
    assert "not for 192.0.2.4" in faults(server, "--for", "192.0.2.4")
    assert "expired on" in faults(ca.make("server", "e.lan", "--notBefore", "-10", "--notAfter", "-5"))
    assert "not valid before" in faults(ca.make("server", "f.lan", "--notBefore", "1000"))
    assert "19 days left" in faults(ca.make("server", "g.lan", "--days", "20", "--notBefore", "-5"), code=0)
    assert "the key is not that of the first certificate" in faults(file(parts[client][0], *parts[server][1:]))
    assert "the key is not that of the certificates" in faults(file(parts[client][0]), server)
    alone = file(*parts[server][:2])
    assert "its CA C=FR, O=Network UPS Tools, CN=NUT CA of" in faults(alone, d=other.folder)
    faults(alone, "--trust", ca.cert, d=other.folder, code=0)
    assert "chmod o=" in faults(write(str(tmp_path / "y.pem"), "".join(parts[server]), 0o644))
    assert "chmod go-w" in faults(write(str(tmp_path / "z.pem"), "".join(parts[server]), 0o620))
    ossl("pkey", "-in", server, "-aes256", "-passout", "pass:secret", "-out", tmp_path / "locked.pem")
    assert "passphrase" in faults(str(tmp_path / "locked.pem"))
    odd = write(str(tmp_path / "it's $odd; *.pem"), "".join(parts[server]), 0o666)
    os.chown(odd, -1, os.stat(server).st_gid)
    for cure in re.findall("cure: (.*)", faults(odd)):
        assert run("sh", "-c", cure).returncode == 0
    faults(odd, code=0)
    assert faults(odd + "; x.pem").startswith("%s; x.pem: No such file or directory\n" % odd)
    assert "no whole PEM file" in faults(file("".join(parts[server])[:-40]))
    assert "No such file" in faults("missing.pem")
    broken = file("-----BEGIN PRIVATE KEY-----\nMAAA\n-----END PRIVATE KEY-----\n", parts[server][1], name="broken.pem")
    found = faults(broken, server, "--for", "b.lan")
    assert "broken.pem: a private key that openssl cannot read" in found and "not for b.lan" in found
    mk("revoke", client, "-d", ca.folder)
    assert "is revoked" in faults(client)
    faults(server, code=0)
    assert "not from a CA that is known" in faults(ca.crl, d=other.folder)
    if not ossl("version").startswith("OpenSSL 1."):  # whose -x509_strict lets this pass
        loose = write(str(tmp_path / "loose.cnf"), "extendedKeyUsage=serverAuth\nauthorityKeyIdentifier=none\nsubjectKeyIdentifier=none\n")
        ossl("req", "-new", "-key", server, "-subj", "/CN=x", "-out", tmp_path / "loose.csr")
        ossl("x509", "-req", "-in", tmp_path / "loose.csr", "-CA", ca.cert, "-CAkey", ca.folder + "/private/ca-key.pem", "-CAcreateserial",
             "-CAserial", tmp_path / "loose.srl", "-extfile", loose, "-out", tmp_path / "loose.pem")
        assert "cure: make a certificate that keeps to RFC 5280" in faults(str(tmp_path / "loose.pem"))
    old = ca.folder + "/private/"
    config = write(str(tmp_path / "old.cnf"), "[ca]\ndefault_ca=x\n[x]\ndatabase=%sindex.txt\ndefault_md=sha256\n" % old)
    ossl("ca", "-config", config, "-gencrl", "-keyfile", old + "ca-key.pem", "-cert", ca.cert, "-crlsec", "1", "-out", tmp_path / "late.pem")
    late = int(time.time()) + 3
    poll(lambda: time.time() > late, 5)
    assert "out of date" in faults(str(tmp_path / "late.pem"))
    if IS_ROOT and not missing_nut():
        os.chmod(file(*parts[server], name="w.pem"), 0o600)
        assert "NUT's user nut cannot read it" in faults(str(tmp_path / "w.pem"))
        os.chown(tmp_path / "w.pem", NOBODY, NOBODY)
        assert "belongs to another user" in faults(str(tmp_path / "w.pem"))


def test_check_of_a_configuration(tmp_path):
    """check -f reads the files that a nutshim.conf names, section by section, and applies the role."""
    ca = Ca(tmp_path / "ca")
    server, client = ca.make("server", "a.lan"), ca.make("client", "c.lan")
    (tmp_path / "trust.d").mkdir()
    shutil.copy(ca.cert, tmp_path / "trust.d/one.pem")
    text = ("pidfile = /x ; a comment\n[upsd]\nrole = server\n# certificate = nowhere.pem\ncertificate = %s # mine\ntrust = trust.d\n"
            "crl = ca/crl.pem\n[ups]\nrole=client\ncertificate= %s\ntrust =system\n[other]\nrole = client\n")
    conf = write(str(tmp_path / "nutshim.conf"), text % (server, client))
    found = mk("check", "-f", conf, "-d", ca.folder)
    assert re.findall(r"^\[.*\]$", found, re.M) == ["[upsd]", "[ups]"] and found.count(": good") == 4, found
    mk("check", "-f", conf, "-d", ca.folder, "--for", "a.lan")
    write(conf, text % (client, server))
    found = mk("check", "-f", conf, "-d", ca.folder, expect=1)
    assert found.count("cure: it was made for another use") == 2, found
    write(conf, text % ("gone.pem", client))
    assert "gone.pem: No such file" in mk("check", "-f", conf, "-d", ca.folder, expect=1)
    assert "names no certificate" in refused("check", "-f", write(str(tmp_path / "empty.conf"), "[a]\n"))
    assert "No such file" in refused("check", "-f", tmp_path / "missing.conf")


# ---- in use: real upsd, upsc and both shims --------------------------------------------------------

class Life:
    """A CA, a server's and a client's certificate, and the two shims that use them in front of a upsd.

    The shims are processes of their own, as on two boxes; `reuse` is off, so that each session of a
    local client is a session between the shims.
    """

    def __init__(self, folder, upsd_port, stack):
        self.ca = Ca(folder)
        self.server, self.client = self.ca.make("server", "localhost", "127.0.0.1"), self.ca.make("client", "box.lan")
        self.port = free_port()
        self.server_shim = stack.enter_context(Shim({"upsd": {
            "role": "server", "listen": "127.0.0.1:%d" % self.port, "upstream": "127.0.0.1:%d" % upsd_port,
            "certificate": self.server, "client_certificate": "require", "trust": self.ca.cert, "crl": self.ca.crl}}))
        self.local = free_port()
        self.start_client(stack)

    def start_client(self, stack):
        """Start the client shim, or start it anew: then it has no TLS session to resume."""
        if hasattr(self, "client_shim"):
            self.client_shim.stop()
        self.client_shim = stack.enter_context(Shim({"ups": {
            "role": "client", "listen": "127.0.0.1:%d" % self.local, "upstream": "localhost:%d" % self.port,
            "certificate": self.client, "trust": self.ca.cert, "crl": self.ca.crl, "reuse": 0}}))

    def reload(self):
        for shim in (self.server_shim, self.client_shim):
            mark = shim.mark()
            shim.reload()
            shim.wait_log("reloaded", start=mark)

    def works(self):
        return upsc(self.local, "ups.status").stdout == "OL\n"

    def refused(self, server_says, client_says):
        """A new session fails, and each shim's log says why."""
        marks = [shim.mark() for shim in (self.server_shim, self.client_shim)]
        assert not self.works()
        self.server_shim.wait_log(server_says, start=marks[0])
        self.client_shim.wait_log(client_says, start=marks[1])

    def shown(self):
        """The public key, as PEM, of the certificate that the server shim shows."""
        context = client_context(self.ca.cert)
        context.load_cert_chain(self.client)
        with TlsClient(self.port, context=context) as client:
            pem = ssl.DER_cert_to_PEM_cert(client.sock.getpeercert(True))
        return ossl("x509", "-noout", "-pubkey", input=pem)


def test_full_life(tmp_path, nut):
    """ca, server, client; mutual TLS; renew and reload while a session lives on; revoke and reload, and that client is refused."""
    with contextlib.ExitStack() as stack:
        life = Life(tmp_path / "ca", nut.port, stack)
        session = stack.enter_context(PlainClient(life.local))
        assert session.ask("VER").startswith(b"Network UPS Tools upsd") and life.works()
        life.server_shim.wait_log(r"TLS up: TLSv1\.3\b.*CN=box\.lan.*DNS:box\.lan")
        assert life.shown() == ossl("pkey", "-in", life.server, "-pubout")
        for args in ((), ("--new-key",)):
            before, serial = life.shown(), field(life.server, "-serial")
            for path in (life.server, life.client):
                mk("renew", path, "-d", life.ca.folder, "-y", *args)
            life.reload()
            assert life.works() and session.ask("GET VAR ups ups.status") == b'VAR ups ups.status "OL"\n'
            assert life.shown() == ossl("pkey", "-in", life.server, "-pubout") and field(life.server, "-serial") != serial
            assert (life.shown() != before) == bool(args)
        mk("revoke", life.client, "-d", life.ca.folder)
        life.reload()
        life.refused("is revoked", "certificate revoked")
        assert session.ask("GET VAR ups ups.status") == b'VAR ups ups.status "OL"\n'
        mk("client", "box.lan", "-d", life.ca.folder, "-y")
        life.reload()
        assert life.works()
        mk("revoke", life.server, "-d", life.ca.folder)
        life.reload()
        life.refused("certificate revoked", "is revoked")


EXPIRED = {"client": ("has expired: renew it", "certificate expired"),
           "server": ("certificate expired", "has expired: renew it")}


@pytest.fixture(scope="module")
def ended(nut, tmp_path_factory):
    """{role: Life} where that role's certificate was made for 5 seconds, worked, and has ended."""
    with contextlib.ExitStack() as stack:
        lives = {role: Life(tmp_path_factory.mktemp("ended") / "ca", nut.port, stack) for role in EXPIRED}
        ends = []
        for role, life in lives.items():
            path = getattr(life, role)
            mk("renew", path, "-d", life.ca.folder, "-y", "--notAfter", "5")
            life.reload()
            assert life.works()
            ends.append(int(run("date", "-d", field(path, "-enddate").partition("=")[2], "+%s").stdout))
        poll(lambda: time.time() >= max(ends) + 1, 10, "their end")
        yield lives


@pytest.mark.parametrize("role", sorted(EXPIRED))
def test_expiry_ends_resumption(ended, role):
    """Once a certificate has ended, the other end refuses it even where both go on running and could resume a TLS session from before,
    and says why. (A TLS session that is resumed is up before it is refused, so its own end sees no more than a close.)"""
    ended[role].refused(*[said if "renew it" in said else "closed" for said in EXPIRED[role]])


@pytest.mark.parametrize("role", sorted(EXPIRED))
def test_expiry(ended, role):
    """With a certificate that has ended, a client shim that starts gets nowhere, and both logs say that it has expired; so does check."""
    life = ended[role]
    assert "expired on" in mk("check", getattr(life, role), "-d", life.ca.folder, expect=1)
    with contextlib.ExitStack() as stack:
        life.start_client(stack)
        life.refused(*EXPIRED[role])
