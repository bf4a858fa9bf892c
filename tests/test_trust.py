# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is trusted, in which way, and what an administrator is told about it. The matrix at the top runs
with NUT's own clients and servers (Debian's, with NSS)."""

import concurrent.futures
import contextlib
import os
import re
import shutil
import ssl
import sys
import time

import pytest

from certs import LOCAL, openssl
from harness import (NSS_PASSWORD, NUTSHIM, FalseServer, Nut, PlainClient, Relay, Shim, TlsClient, Upsmon, config_text,
                     folder, poll, run, run_shim, tls, upsc, write)

# What is wrong with a peer's certificate: name: (the server's, the client's, what nutshim says about it)
FAULTS = {
    "a wrong name": ("wrong_name", None, "not for"),
    "an unknown CA": ("unknown_ca", "unknown_client", "unknown CA"),
    "a revoked one": ("revoked", "revoked_client", "revoked"),
    "an expired one": ("expired", "expired_client", "expired"),
    "none at all": (None, None, "no client certificate"),
}
SERVERS = {fault: server for fault, (server, _, _) in FAULTS.items() if server}
CLIENTS = {fault: client for fault, (server, client, _) in FAULTS.items() if client or not server}


def refused(connect):
    """connect() makes a TlsClient; True if it fails or gets no answer but an alert or the end."""
    try:
        with connect() as client:
            client.send("NETVER\n")
            return client.recv_until_close() in (b"", b"ERR ACCESS-DENIED\n")
    except OSError:                                 # ssl.SSLError is one
        return True


def read(path):
    """The text of a file."""
    with open(path, encoding="ascii") as file:
        return file.read()


def works(port, **options):
    """A TLS session with a server shim answers."""
    with TlsClient(port, **options) as client:
        return client.ask("NETVER") == b"1.3\n"


def answers(port):
    """A client shim relays."""
    with PlainClient(port) as client:
        return client.ask("NETVER") == b"1.3\n"


def silent_end(port):
    """A client shim closes without a word, as it does when no upstream is good enough."""
    with PlainClient(port) as client:
        client.send("NETVER\n")
        return client.recv_until_close() == b""


class Stage:                                        # pylint: disable=too-few-public-methods
    """A nutshim with many sections."""

    def __init__(self, shim):
        self.shim = shim
        self.ports = {name: port for name, _, port in shim.listening}


@pytest.fixture(scope="module")
def upsd(nut):
    """The way to the real upsd, with a record of what it gets to see."""
    with Relay(nut.port) as relay:
        yield relay


@pytest.fixture(scope="module")
def servers(upsd, pki):
    """Server shims in one process: one with each certificate, right and wrong, and each way to ask for the client's."""
    def server(certificate=pki.server, **options):
        return dict(role="server", listen="127.0.0.1:0", upstream="127.0.0.1:%d" % upsd.port,
                    certificate=certificate.file, **options)
    trust = {"trust": pki.ca.cert}
    config = {name: server(getattr(pki, name)) for name in [*SERVERS.values(), "server", "self_signed", "chained"]}
    config.update({
        "named": server(pki.ca.issue("boxes", "DNS:upsbox.lan,DNS:*.ups.lan,IP:192.0.2.4,IP:2001:db8::4")),
        "old": server(min_tls="1.2"),
        "mutual": server(client_certificate="require", crl=pki.crl, **trust),
        "request": server(client_certificate="request", **trust),
        "pinned": server(client_certificate="require", pin="%s, %s" % (pki.server.pin, pki.client.pin), **trust),
        "pin-request": server(client_certificate="request", pin=pki.client.pin, **trust),
        "other": server(pki.unknown_ca, client_certificate="require", trust=pki.other_ca.cert),
        "on-six": dict(server(), listen="[::1]:0"),
    })
    with Shim(config) as shim:
        yield Stage(shim)


# ---- the matrix: NUT's own clients straight to the server shim ------------------------------------

@contextlib.contextmanager
def watching(port, **options):
    """An Upsmon that is killed in the end: where TERM meets it in the middle of a poll it sleeps for 5 s."""
    with Upsmon(port, **options) as upsmon:
        try:
            yield upsmon
        finally:
            upsmon.kill()


@pytest.fixture(scope="module")
def database(pki, nut_installed):                   # pylint: disable=unused-argument
    """database(identity, …): an NSS database that trusts pki.ca.

    identity: the name of a certificate for it to show; revoke: with pki.crl; old: made to speak TLS 1.2 at most.
    """
    made = {}

    def make(identity=None, revoke=False, old=False):
        key = (identity, revoke, old)
        if key not in made:
            made[key] = path = pki.nss_database("nss-%s-%d-%d" % key, getattr(pki, identity) if identity else None)
            if revoke:
                der = os.path.join(path, "crl.der")
                openssl("crl", "-in", pki.crl, "-outform", "DER", "-out", der)
                done = run("crlutil", "-I", "-B", "-i", der, "-d", "sql:" + path, "-f", os.path.join(path, "password"))
                assert done.returncode == 0, done.stderr
            if old:                                 # NSS's way to a policy, see its lib/pk11wrap/pk11pars.c
                with open(os.path.join(path, "pkcs11.txt"), "a", encoding="ascii") as modules:
                    modules.write('\nlibrary=\nname=Policy\nNSS=flags=policyOnly,moduleDB\n'
                                  'config="allow=tls-version-max=tls1.2"\n\n')
        return made[key]
    return make


def test_upsc_with_the_server_shim(servers, nut):
    """upsc of NUT, which takes TLS where it is offered, speaks TLS 1.3 with the server shim."""
    mark = servers.shim.mark()
    done = upsc(servers.ports["server"], host="localhost")
    assert done.returncode == 0 and done.stdout == upsc(nut.port).stdout, done
    servers.shim.wait_log(r"TLS up: TLSv1\.3", start=mark)


def test_upsc_with_a_server_shim_that_requires_a_certificate(servers, upsd):
    """upsc of NUT 2.8.0 has no certificate to show, so it gets nothing where one is required."""
    before, mark = len(upsd.up), servers.shim.mark()
    done = upsc(servers.ports["mutual"], host="localhost")
    assert done.returncode == 1 and done.stdout == ""
    servers.shim.wait_log("no client certificate", start=mark)
    assert len(upsd.up) == before


@pytest.mark.parametrize("section, client", [("server", None), ("mutual", "client"), ("request", "client")])
def test_upsmon_with_the_server_shim(servers, database, need, section, client):
    """upsmon with CERTPATH, CERTVERIFY 1, FORCESSL 1 and CERTHOST logs in to the server shim, in TLS 1.3."""
    need("certutil", "pk12util")
    mark = servers.shim.mark()
    with watching(servers.ports[section], nss=database(client), identity=bool(client)) as upsmon:
        servers.shim.wait_log("(?i)login.*ups", 10, mark)
        upsmon.wait_log("SUCCESS", 10)
        assert not upsmon.shut_down
    log = "\n".join(servers.shim.lines[mark:])
    assert re.search(r"TLS up: TLSv1\.3", log) and ("client.example" in log) == bool(client)


def test_upsmon_of_tls_1_2(servers, database, need):
    """An upsmon whose NSS may speak TLS 1.2 at most is refused, and taken with min_tls = 1.2."""
    need("certutil")
    mark = servers.shim.mark()
    with watching(servers.ports["server"], nss=database(old=True)) as upsmon:
        upsmon.wait_log("Can not connect", 10)
        servers.shim.wait_log("TLS handshake failed.*TLS version", start=mark)
    with watching(servers.ports["old"], nss=database(old=True)):
        servers.shim.wait_log(r"\[old\].*TLS up: TLSv1\.2", 10, mark)
        servers.shim.wait_log(r"\[old\].*(?i:login).*ups", 10, mark)


@pytest.mark.parametrize("fault", SERVERS)
def test_upsmon_refuses_the_server_shim(servers, upsd, database, need, fault):
    """upsmon refuses a server shim with a wrong name, of an unknown CA, revoked or expired, and says no password."""
    need("certutil", "crlutil")
    before, mark, section = len(upsd.up), servers.shim.mark(), SERVERS[fault]
    with watching(servers.ports[section], nss=database(revoke="revoked" in section)) as upsmon:
        upsmon.wait_log("Certificate validation failed", 10)
        servers.shim.wait_log("TLS handshake failed.*alert", start=mark)
    assert len(upsd.up) == before


@pytest.mark.parametrize("fault", CLIENTS)
def test_server_shim_refuses_upsmon(servers, upsd, database, need, fault):
    """The server shim refuses an upsmon whose certificate is missing, of an unknown CA, revoked or expired."""
    need("certutil", "pk12util")
    before, mark, client = len(upsd.up), servers.shim.mark(), CLIENTS[fault]
    with watching(servers.ports["mutual"], nss=database(client), identity=bool(client)) as upsmon:
        servers.shim.wait_log("TLS handshake failed.*" + FAULTS[fault][2], 10, mark)
        upsmon.wait_log("failed", 10)
    assert len(upsd.up) == before


# ---- the matrix: the client shim, to the server shim and to upsd's own STARTTLS -------------------

@pytest.fixture(scope="module")
def upsds(pki, nut_installed, database):            # pylint: disable=unused-argument
    """{certificate: port} of real upsds that speak STARTTLS themselves, each with its certificate in an NSS database.

    "old" is one whose NSS may speak TLS 1.2 at most.
    """
    databases = {name: database(name) for name in list(SERVERS.values()) + ["server"]}
    databases["old"] = database("server", old=True)
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(len(databases)) as pool:
        nuts = {name: pool.submit(Nut(nss=path).__enter__) for name, path in databases.items()}
        concurrent.futures.wait(nuts.values())
        for nut in nuts.values():
            stack.push(nut.result())
        yield {name: nut.result().port for name, nut in nuts.items()}


@pytest.fixture(scope="module")
def fronts(servers, pki):
    """Client shims in one process: to each server shim, and to the mutual one with each client certificate."""
    def client(server, **options):
        return dict({"role": "client", "listen": "127.0.0.1:0", "trust": pki.ca.cert, "crl": pki.crl,
                     "upstream": "localhost:%d" % servers.ports[server]}, **options)
    config = {name: client(name) for name in list(SERVERS.values()) + ["server"]}
    config["with-client"] = client("mutual", certificate=pki.client.file)
    for name in CLIENTS.values():
        config["with-%s" % name] = client("mutual", **({"certificate": getattr(pki, name).file} if name else {}))
    with Shim(config) as shim:
        yield Stage(shim)


@pytest.fixture(scope="module")
def upsd_fronts(upsds, pki):
    """Client shims in one process, to each upsd with STARTTLS of its own."""
    def client(port, **options):
        return dict({"role": "client", "listen": "127.0.0.1:0", "upstream": "localhost:%d" % port,
                     "trust": pki.ca.cert, "crl": pki.crl}, **options)
    config = {name: client(port) for name, port in upsds.items()}
    config["old-allowed"] = client(upsds["old"], min_tls="1.2")
    with Shim(config) as shim:
        yield Stage(shim)


def upsmon_logs_in(stage, section):
    """A plain upsmon gets through a client shim, which reaches its server in TLS 1.3."""
    mark = stage.shim.mark()
    with watching(stage.ports[section]) as upsmon:
        stage.shim.wait_log("(?i)login.*ups", 10, mark)
        assert not upsmon.shut_down
    assert re.search(r"\[%s\].*TLS up: TLSv1\.3" % section, "\n".join(stage.shim.lines))


@pytest.mark.parametrize("section", ["server", "with-client"])
def test_client_shim_with_the_server_shim(fronts, nut, section):
    """upsc and upsmon reach upsd through both shims in TLS 1.3, without and with a client certificate."""
    assert upsc(fronts.ports[section]).stdout == upsc(nut.port).stdout
    upsmon_logs_in(fronts, section)


def test_client_shim_with_tls_of_upsd(upsd_fronts, nut):
    """upsc and upsmon reach a upsd with STARTTLS of its own (NSS) through the client shim, in TLS 1.3."""
    assert upsc(upsd_fronts.ports["server"]).stdout == upsc(nut.port).stdout
    upsmon_logs_in(upsd_fronts, "server")


def test_client_shim_with_tls_1_2_of_upsd(upsd_fronts):
    """A upsd whose NSS may speak TLS 1.2 at most is refused, and taken with min_tls = 1.2."""
    mark = upsd_fronts.shim.mark()
    assert upsc(upsd_fronts.ports["old"]).returncode == 1
    upsd_fronts.shim.wait_log(r"\[old\].*no upstream.*(TLS version|protocol version)", start=mark)
    assert upsc(upsd_fronts.ports["old-allowed"], "ups.status").stdout == "OL\n"
    upsd_fronts.shim.wait_log(r"\[old-allowed\] shared session: TLS up with .*: TLSv1\.2,", start=mark)


@pytest.mark.parametrize("to_upsd", [False, True], ids=["server shim", "upsd"])
@pytest.mark.parametrize("fault", SERVERS)
def test_client_shim_refuses(request, fault, to_upsd):
    """The client shim refuses a server with a wrong name, of an unknown CA, revoked or expired, shim or upsd."""
    stage = request.getfixturevalue("upsd_fronts" if to_upsd else "fronts")
    mark = stage.shim.mark()
    done = upsc(stage.ports[SERVERS[fault]])
    assert done.returncode == 1 and done.stdout == ""
    stage.shim.wait_log("no upstream.*" + FAULTS[fault][2], start=mark)


@pytest.mark.parametrize("fault", CLIENTS)
def test_client_shim_is_refused(fronts, servers, upsd, fault):
    """A client shim whose certificate is missing, of an unknown CA, revoked or expired gets nothing out of upsd."""
    before, mark = len(upsd.up), servers.shim.mark()
    done = upsc(fronts.ports["with-%s" % CLIENTS[fault]])
    assert done.returncode == 1 and done.stdout == ""
    servers.shim.wait_log("TLS handshake failed.*" + FAULTS[fault][2], start=mark)
    assert len(upsd.up) == before


def test_client_shim_without_the_certificate_that_its_server_requires(shim, pki):
    """A server with TLS of its own that requires a client certificate gets it, or nothing comes of the session.

    The server is a stand-in: Debian's upsd is built without client certificates.
    """
    with FalseServer(tls(pki.server, ca=pki.ca.cert)) as server:
        base = {"role": "client", "upstream": "localhost:%d" % server.port, "trust": pki.ca.cert}
        running = shim({"without": dict(base, listen="127.0.0.1:0"),
                        "with": dict(base, listen="127.0.0.1:0", certificate=pki.client.file)})
        assert silent_end(running.port("without"))
        assert upsc(running.port("with"), "ups.status").stdout == "OL\n"


# ---- client_certificate, crl, pin -----------------------------------------------------------------

def test_client_certificate_none(servers, pki):
    """With none, the default, the server shim does not ask for a certificate and takes any client."""
    mark = servers.shim.mark()
    for certificate in (None, pki.client, pki.unknown_client):
        assert works(servers.ports["server"], certificate=certificate)
    assert "client.example" not in "\n".join(servers.shim.lines[mark:])


def test_client_certificate_request(servers, upsd, pki):
    """With request a client may have none, but one that it shows must be good."""
    for certificate in (None, pki.client):
        assert works(servers.ports["request"], certificate=certificate)
    before = len(upsd.up)
    for certificate in (pki.unknown_client, pki.expired_client, pki.self_signed):
        assert refused(lambda certificate=certificate: TlsClient(servers.ports["request"], certificate=certificate))
    assert len(upsd.up) == before


def test_client_certificate_require(servers, upsd, pki):
    """With require there is no way in without a good one."""
    assert works(servers.ports["mutual"], certificate=pki.client)
    before = len(upsd.up)
    for certificate in (None, pki.unknown_client, pki.expired_client, pki.revoked_client):
        assert refused(lambda certificate=certificate: TlsClient(servers.ports["mutual"], certificate=certificate))
    assert len(upsd.up) == before


def test_pin_of_the_client(servers, upsd, pki):
    """With pin in the server role a good certificate is not enough: its key must be one of those listed."""
    assert works(servers.ports["pinned"], certificate=pki.client)
    assert works(servers.ports["pin-request"], certificate=pki.client)
    before, mark = len(upsd.up), servers.shim.mark()
    for section in ("pinned", "pin-request"):
        assert refused(lambda section=section: TlsClient(servers.ports[section], certificate=pki.other_client))
        servers.shim.wait_log(r"\[%s\].*pin.*%s" % (section, re.escape(pki.other_client.pin)), start=mark)
    assert refused(lambda: TlsClient(servers.ports["pin-request"]))         # no certificate is no pin
    servers.shim.wait_log(r"\[pin-request\].*no pin matches the peer's key.*no certificate", start=mark)
    assert refused(lambda: TlsClient(servers.ports["pinned"], certificate=pki.unknown_client))
    assert len(upsd.up) == before


def verifies(stage, shim, *cases):
    """Client shims, one for each case (server, options, words), all in one process; each does what is expected.

    words is None where the session works, else what the log says about why there is none. options: host is upstream's.
    """
    config, cases = {}, [(server, dict(options), words) for server, options, words in cases]
    for number, (server, options, _) in enumerate(cases):
        upstream = "%s:%d" % (options.pop("host", "localhost"), stage.ports[server])
        config["case%d" % number] = dict({"role": "client", "listen": "127.0.0.1:0", "upstream": upstream}, **options)
    running = shim(config)
    ports = {name: port for name, _, port in running.listening}
    for number, (server, options, words) in enumerate(cases):
        with PlainClient(ports["case%d" % number]) as client:
            client.send("NETVER\nLOGOUT\n")
            got = client.recv_until_close()
        assert got == (b"" if words else b"1.3\nOK Goodbye\n"), (server, options, words, running.log)
        if words:
            running.wait_log(r"\[case%d\].*no upstream.*%s" % (number, words))
    return running


def test_verify_full(servers, shim, pki):
    """full, the default, wants chain and name; a pin comes on top of both."""
    trust = {"trust": pki.ca.cert}
    verifies(servers, shim, ("server", trust, None),
             ("server", dict(trust, pin="%s, %s" % (pki.client.pin, pki.server.pin)), None),
             ("wrong_name", trust, "not for .*localhost"), ("unknown_ca", trust, "unknown CA"),
             ("expired", trust, "expired"),
             ("server", dict(trust, pin=pki.client.pin), re.escape(pki.server.pin)),
             ("wrong_name", dict(trust, pin=pki.wrong_name.pin), "not for .*localhost"),
             ("unknown_ca", dict(trust, pin=pki.unknown_ca.pin), "unknown CA"))


def test_verify_chain(servers, shim, pki):
    """chain takes any name, and still no unknown CA, no expired certificate and no other pin."""
    trust = {"trust": pki.ca.cert, "verify": "chain"}
    verifies(servers, shim, ("wrong_name", trust, None), ("wrong_name", dict(trust, pin=pki.wrong_name.pin), None),
             ("unknown_ca", trust, "unknown CA"), ("expired", trust, "expired"),
             ("wrong_name", dict(trust, pin=pki.server.pin), "pin"))


def test_verify_pin(servers, shim, pki):
    """pin goes by the key alone: whatever else stands in the certificate, the right key is in and any other is out."""
    verifies(servers, shim, ("server", {"verify": "pin", "pin": pki.self_signed.pin}, re.escape(pki.server.pin)),
             *[(server, {"verify": "pin", "pin": "%s, %s" % (pki.client.pin, getattr(pki, server).pin)}, None)
               for server in ("unknown_ca", "self_signed", "expired", "wrong_name")])


def test_client_of_two_lines(servers, shim, pki, tmp_path):
    """With the pin as -t prints it on the server's side, upstream and pin make a client: no file is copied."""
    config = write(tmp_path / "nutshim.conf", "[upsd]\nrole = server\ncertificate = %s\n" % pki.self_signed.file)
    line = re.search(r"pin = sha256//\S+", run_shim("-t", "-f", config).stdout).group()
    running = shim("[upsbox]\nrole = client\nlisten = 127.0.0.1:0\nverify = pin\nupstream = localhost:%d\n%s\n" % (
        servers.ports["self_signed"], line))
    assert upsc(running.port("upsbox"), "ups.status").stdout == "OL\n"
    assert "warning" not in running.log             # it is no lesser way


def test_verify_none(servers, shim, pki):
    """none takes anybody, but for who lacks a pin, and says at every start, every reload and every -t that it does."""
    running = verifies(servers, shim, ("self_signed", {"verify": "none"}, None), ("expired", {"verify": "none"}, None),
                       ("server", {"verify": "none", "pin": pki.client.pin}, "pin"))
    words = r"warning: .*:\d+: \[case0\] verify.*not verified"
    running.wait_log(words)
    mark = running.mark()
    running.reload()
    running.wait_log("reloaded", start=mark)
    running.wait_log(words, start=mark)
    done = run_shim("-t", "-f", running.config)
    assert done.returncode == 0 and re.search(words, done.stdout + done.stderr), done


def test_server_name(servers, shim, pki):
    """server_name is the name or address that the certificate must carry, in place of upstream's host."""
    def case(host, name, good):
        options = {"host": host, "trust": pki.ca.cert}
        if name:
            options["server_name"] = name
        return "named", options, None if good else "not for .*" + re.escape(name or host)
    verifies(servers, shim, *[case(*each) for each in (
        ("127.0.0.1", None, False), ("localhost", None, False),
        ("127.0.0.1", "upsbox.lan", True), ("127.0.0.1", "UPSBOX.Lan", True),
        ("localhost", "one.ups.lan", True), ("localhost", "ups.lan", False), ("localhost", "a.b.ups.lan", False),
        ("localhost", "192.0.2.4", True), ("localhost", "192.0.2.5", False), ("localhost", "2001:db8::4", True),
        ("localhost", "2001:DB8:0:0::4", True), ("localhost", "2001:db8::5", False))])


def test_upstream_by_address(servers, shim, pki):
    """An address as upstream is looked for among the certificate's addresses, IPv4 and IPv6."""
    verifies(servers, shim, ("server", {"host": "127.0.0.1", "trust": pki.ca.cert}, None),
             ("on-six", {"host": "[::1]", "trust": pki.ca.cert}, None))


def test_two_servers_of_different_cas(servers, shim, pki):
    """One process reaches two servers that trust different CAs, with a client certificate for each."""
    def client(server, authority, certificate):
        return {"role": "client", "listen": "127.0.0.1:0", "trust": authority.cert,
                "upstream": "localhost:%d" % servers.ports[server], "certificate": certificate.file}
    running = shim({"first": client("mutual", pki.ca, pki.client),
                    "second": client("other", pki.other_ca, pki.unknown_client),
                    "mixed-1": client("mutual", pki.ca, pki.unknown_client),
                    "mixed-2": client("other", pki.ca, pki.unknown_client),
                    "mixed-3": client("other", pki.other_ca, pki.client)})
    for _ in range(2):                              # the second time with what was kept of the first
        for name in ("first", "second"):
            assert answers(running.port(name))
        for name in ("mixed-1", "mixed-2", "mixed-3"):
            assert silent_end(running.port(name))


# ---- revocation lists -----------------------------------------------------------------------------

def test_crls_of_two_cas(shim, nut, pki):
    """With two CAs in trust and a list of each, the revoked certificates of both are refused and the others work."""
    revoked = pki.other_ca.issue("revoked_too", "DNS:client.example")
    pki.other_ca.revoke(revoked)
    trust = write(os.path.join(pki.path, "both.pem"), read(pki.ca.cert) + read(pki.other_ca.cert))
    running = shim({"server": {
        "role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port,
        "certificate": pki.server.file, "client_certificate": "require", "trust": trust,
        "crl": "%s, %s" % (pki.crl, pki.other_ca.crl())}})
    port = running.port("server")
    for good, bad in ((pki.client, pki.revoked_client), (pki.unknown_client, revoked)):
        assert works(port, certificate=good)
        assert refused(lambda bad=bad: TlsClient(port, certificate=bad))


def test_crl_of_one_ca_only(shim, nut, pki):
    """A certificate whose issuer has no list here is refused, and the log says that the list is missing."""
    trust = write(os.path.join(pki.path, "both2.pem"), read(pki.ca.cert) + read(pki.other_ca.cert))
    running = shim({"server": {
        "role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port,
        "certificate": pki.server.file, "client_certificate": "require", "trust": trust, "crl": pki.crl}})
    assert works(running.port("server"), certificate=pki.client)
    assert refused(lambda: TlsClient(running.port("server"), certificate=pki.unknown_client))
    running.wait_log(r"TLS handshake failed.*revocation list")


def test_revoked_intermediate_ca(shim, nut, pki):
    """Where lists of root and intermediate CA are given, what a revoked intermediate CA has issued is refused."""
    client = pki.sub_ca.issue("sub_client", "DNS:client.example")
    config = {"server": {
        "role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port,
        "certificate": pki.server.file, "client_certificate": "require", "trust": pki.ca.cert}}
    running = shim(config)
    port = running.port("server")
    assert works(port, certificate=client)
    own = shutil.copy(pki.sub_ca.crl(), os.path.join(pki.path, "sub.crl"))
    config["server"]["crl"] = "%s, %s" % (pki.crl, own)
    running.reload(config)
    running.wait_log("reloaded")
    assert works(port, certificate=client)
    index = os.path.join(pki.ca.path, "index")
    before = read(index)
    pki.ca.revoke(pki.sub_ca)
    revoked = shutil.copy(pki.ca.crl(), os.path.join(pki.path, "with-sub.crl"))
    write(index, before)                            # the other tests want it back
    config["server"]["crl"] = "%s, %s" % (revoked, own)
    mark = running.mark()
    running.reload(config)
    running.wait_log("reloaded", start=mark)
    assert refused(lambda: TlsClient(port, certificate=client))
    assert works(port, certificate=pki.client)
    assert pki.crl                                  # writes the list anew, without that CA


def test_certificate_in_a_revocation_list(servers, shim, pki, tmp_path):
    """A certificate that stands in a crl file is not trusted for that: it is an error, or it is left alone."""
    both = write(tmp_path / "both.pem", read(pki.crl) + read(pki.other_ca.cert))
    config = write(tmp_path / "nutshim.conf",
                   "[c]\nrole = client\nupstream = localhost\ntrust = %s\ncrl = %s\n" % (pki.ca.cert, both))
    done = run_shim("-t", "-f", config)
    if done.returncode:
        assert "%s:5: " % config in done.stderr
    else:
        crl = "%s, %s" % (both, pki.other_ca.crl())
        verifies(servers, shim, ("unknown_ca", {"trust": pki.ca.cert, "crl": crl}, "unknown CA"))


def test_crl_past_its_time(shim, nut, pki):
    """A list past its nextUpdate lets nobody in, and the log says that it has to be renewed."""
    authority = pki.other_ca
    path = os.path.join(pki.path, "old.crl")
    openssl("ca", "-config", os.path.join(authority.path, "config"), "-gencrl", "-out", path,
            "-crl_lastupdate", "20200101000000Z", "-crl_nextupdate", "20200201000000Z")
    running = shim({"server": {
        "role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port,
        "certificate": pki.server.file, "client_certificate": "require", "trust": authority.cert, "crl": path}})
    assert refused(lambda: TlsClient(running.port("server"), certificate=pki.unknown_client))
    running.wait_log("revocation list.*expired")


# ---- trust ----------------------------------------------------------------------------------------

def test_trust_in_a_file(servers, shim, pki, tmp_path):
    """A file may hold one certificate or several, with text around them."""
    both = write(tmp_path / "both.pem", "Theirs:\n%s\nOurs:\n%s" % (read(pki.other_ca.cert), read(pki.ca.cert)))
    verifies(servers, shim, ("server", {"trust": pki.ca.cert}, None),
             ("server", {"trust": pki.other_ca.cert}, "unknown CA"),
             ("server", {"trust": both}, None), ("unknown_ca", {"trust": both}, None))


def test_trust_in_a_plain_directory(servers, shim, pki, tmp_path):
    """A directory of PEM files is read whole, whatever their names; what is no certificate is left alone."""
    folder = tmp_path / "trust"
    (folder / "private").mkdir(parents=True)
    shutil.copy(pki.ca.cert, folder / "our ca.pem")
    shutil.copy(pki.other_ca.cert, folder / "theirs")
    (folder / "README").write_text("CAs of this house\n")
    trust = {"trust": folder}
    verifies(servers, shim, ("server", trust, None), ("unknown_ca", trust, None), ("self_signed", trust, "self-signed"))


def test_trust_in_a_hashed_directory(servers, shim, pki, tmp_path, need):
    """A directory as openssl rehash makes it works, lists included, with the files beside the links and without."""
    need("openssl")
    linked, alone = tmp_path / "linked", tmp_path / "alone"
    linked.mkdir()
    alone.mkdir()
    shutil.copy(pki.ca.cert, linked / "ca.pem")
    shutil.copy(pki.crl, linked / "crl.pem")
    openssl("rehash", str(linked))
    names = [name for name in os.listdir(linked) if re.match(r"[0-9a-f]{8}\.r?0$", name)]
    assert len(names) == 2
    for name in names:
        shutil.copy(linked / name, alone / name)
    crl = linked / "crl.pem"                        # elsewhere a list counts for nothing
    verifies(servers, shim, *[(server, {"trust": folder, "crl": crl}, words) for folder in (linked, alone)
                              for server, words in (("server", None), ("unknown_ca", "unknown CA|revocation list"))])
    config = write(tmp_path / "nutshim.conf", "[c]\nrole = client\nupstream = localhost\ntrust = %s\n" % linked)
    assert "%s: a revocation list, which counts only as crl: set crl = %s\n" % (crl, crl) in run_shim("-t", "-f", config).stderr


def test_trust_of_the_system(servers, pki, tmp_path):
    """`system` is OpenSSL's own store, a file or a hashed directory; here SSL_CERT_FILE and SSL_CERT_DIR name it."""
    folder = tmp_path / "certs"
    folder.mkdir()
    shutil.copy(pki.ca.cert, folder / "ca.pem")
    openssl("rehash", str(folder))
    nothing = str(tmp_path / "nothing")
    for env, good in (({"SSL_CERT_FILE": pki.ca.cert, "SSL_CERT_DIR": nothing}, True),
                      ({"SSL_CERT_FILE": nothing, "SSL_CERT_DIR": str(folder)}, True),
                      ({"SSL_CERT_FILE": pki.other_ca.cert, "SSL_CERT_DIR": nothing}, False)):
        with Shim({"client": {"role": "client", "listen": "127.0.0.1:0", "trust": "system",
                              "upstream": "localhost:%d" % servers.ports["server"]}}, env=env) as running:
            assert (answers if good else silent_end)(running.port("client"))


def test_trust_in_what_is_no_root(servers, shim, pki):
    """A self-signed certificate, an intermediate CA and a server's own certificate can each be trusted as they are."""
    verifies(servers, shim, *[(server, {"trust": trust.cert}, words) for server, trust, words in (
        ("self_signed", pki.self_signed, None), ("chained", pki.ca, None), ("chained", pki.sub_ca, None),
        ("server", pki.server, None), ("wrong_name", pki.server, "CA"), ("server", pki.sub_ca, "CA"))])


def bad_trust(pki, tmp_path):
    """{name: path} of what is no good as trust."""
    good = read(pki.ca.cert)
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "notes.txt", "nothing")
    (tmp_path / "half folder").mkdir()
    shutil.copy(pki.ca.cert, tmp_path / "half folder" / "good.pem")
    write(tmp_path / "half folder" / "bad.pem", good.replace("MII", "!!!"))
    openssl("x509", "-in", pki.ca.cert, "-outform", "DER", "-out", str(tmp_path / "ca.der"))
    texts = {
        "empty": "", "no certificate": "trust me\n", "a key": read(pki.ca.key),
        "bad base64": good.replace("MII", "!!!"), "cut": good[:200], "cut behind a good one": good + good[:200],
        "a good one behind a cut one": good[:200] + "\n" + good,
        "nothing in it": "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        "another thing in it": "-----BEGIN CERTIFICATE-----\nbm8gY2VydGlmaWNhdGU=\n-----END CERTIFICATE-----\n",
        "a bit is wrong": good.replace("MIIB", "MIIC"),
    }
    paths = {name: write(tmp_path / name.replace(" ", "-"), text) for name, text in texts.items()}
    paths.update({name: tmp_path / name for name in ("missing", "ca.der", "empty folder", "folder", "half folder")})
    return paths


def test_bad_trust(pki, tmp_path):
    """A trust that is missing, empty or malformed, even in part, is an error FILE:LINE at start and at -t."""
    paths = bad_trust(pki, tmp_path)
    text, lines = "", {}
    for number, (name, path) in enumerate(paths.items()):
        text += "[s%d]\nrole = client\nupstream = localhost\nlisten = 127.0.0.1:0\n" % number
        lines[name] = text.count("\n") + 1
        text += "trust = %s\n" % path
    config = write(str(tmp_path / "nutshim.conf"), config_text(text, str(tmp_path)))
    extra = read(config).count("\n") - text.count("\n")
    for args in (("-t",), ("-F",)):
        done = run_shim(*args, "-f", config)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done
        silent = [name for name, line in lines.items() if "%s:%d: " % (config, line + extra) not in done.stderr]
        assert not silent, "not reported: %s in\n%s" % (silent, done.stderr)
        assert not [line for line in done.stderr.splitlines() if not line.startswith(config)]


def test_unreadable_file(pki):
    """A file that may not be read is an error at -t that names option, file and cause. (Root tries as another user.)"""
    with folder("unreadable") as path:              # pytest's own are closed to others
        text = ""
        for option, source in (("certificate", pki.client.file), ("trust", pki.ca.cert), ("crl", pki.crl),
                               ("key", pki.client.key)):
            secret = shutil.copy(source, os.path.join(path, "secret." + option))
            os.chmod(secret, 0)
            text += "[%s]\nrole = client\nupstream = localhost\n" % option
            text += "" if option == "trust" else "trust = ca.pem\n"
            text += "certificate = own.pem\n" if option == "key" else ""
            text += "%s = %s\n" % (option, secret)
        os.mkdir(os.path.join(path, "sub"))
        os.chmod(shutil.copy(pki.ca.cert, os.path.join(path, "sub", "secret.sub")), 0)
        text += "[sub]\nrole = client\nupstream = localhost\ntrust = sub\n"
        for source, name in ((pki.ca.cert, "ca.pem"), (pki.client.cert, "own.pem"), (NUTSHIM, "nutshim.py")):
            os.chmod(shutil.copy(source, os.path.join(path, name)), 0o644)
        config = write(os.path.join(path, "nutshim.conf"), text, 0o644)
        os.chmod(path, 0o755)
        os.chmod(os.path.join(path, "sub"), 0o755)
        python = next(filter(another_user_can_run, (sys.executable, "/usr/bin/python3")), None)
        if not python:
            pytest.skip("no Python here that another user may run")
        done = run(python, os.path.join(path, "nutshim.py"), "-t", "-f", config, **as_another_user())
    assert done.returncode == 1, done
    for option in ("certificate", "trust", "crl", "key", "sub"):
        words = r"nutshim\.conf:\d+: \[%s\] .*secret\.%s: Permission denied" % (option, option)
        assert re.search(words, done.stderr), done.stderr


def as_another_user():
    """Options of run() that make a command run as nobody, where root would be allowed everything."""
    return {"preexec_fn": lambda: os.setuid(65534), "cwd": "/"} if os.geteuid() == 0 else {}


def another_user_can_run(python):
    """True for a Python that works as that user."""
    with contextlib.suppress(OSError):
        return run(python, "-c", "import ssl", **as_another_user()).returncode == 0
    return False


def faults(config, text):
    """What -t says about a configuration with faults: {section: its lines}."""
    done = run_shim("-t", "-f", write(config, text))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    found = {}
    for line in done.stderr.splitlines():
        match = re.match(r"%s:\d+: \[(.*?)\] (.*)" % re.escape(str(config)), line)
        assert match, "no FILE:LINE in %r" % line
        found[match.group(1)] = found.get(match.group(1), "") + match.group(2) + "\n"
    return found


def test_bad_crl(pki, tmp_path):
    """A crl that is missing, empty or malformed is an error FILE:LINE."""
    texts = {"empty": "", "other": read(pki.ca.cert), "cut": read(pki.crl)[:150]}
    text = ""
    for name in list(texts) + ["missing"]:
        if name in texts:
            write(tmp_path / name, texts[name])
        text += "[%s]\nrole = client\nlisten = localhost:0\nupstream = localhost\ntrust = %s\ncrl = %s\n" % (name, pki.ca.cert, name)
    found = faults(tmp_path / "nutshim.conf", text)
    for name in list(texts) + ["missing"]:
        assert name in found and re.match("crl: .*" + name, found[name]), (name, found)


# ---- keys -----------------------------------------------------------------------------------------

@pytest.fixture
def check(tmp_path):
    """check(option=value …) runs -t for a server shim of these; the CompletedProcess."""
    def start(**options):
        options = dict({"role": "server"}, **options)
        config = write(tmp_path / "nutshim.conf", "[upsd]\n" + "".join("%s = %s\n" % item for item in options.items()))
        return run_shim("-t", "-f", config)
    return start


def test_key_and_certificate_in_any_order(pki, tmp_path, nut, shim):
    """Key and certificate may be two files or one, the key first, last or before the chain; the chain is sent."""
    chained = pki.chained
    key, own = read(chained.key), read(chained.cert)
    chain = read(chained.file)[len(key) + len(own):]
    assert "BEGIN CERTIFICATE" in chain
    config = {}
    for name, text, options in (("key-first", key + own + chain, {}), ("key-last", own + chain + key, {}),
                                ("key-between", own + key + chain, {}), ("apart", own + chain, {"key": chained.key}),
                                ("with-text", "the key\n" + key + "the rest\n" + own + chain, {})):
        config[name] = dict(role="server", listen="127.0.0.1:0", upstream="127.0.0.1:%d" % nut.port,
                            certificate=write(tmp_path / name, text), **options)
    running = shim(config)
    for name in config:
        assert works(running.port(name), ca=pki.ca.cert), name


def test_kinds_of_keys(pki, tmp_path):
    """Keys of every kind and PEM form that openssl writes are taken."""
    text, pins = "", []
    for kind, key_type in (("ec", "ec"), ("rsa", "rsa"), ("ed25519", "ed25519"), ("EC-PARAMETERS", "ec"),
                           ("RSA-PRIVATE-KEY", "rsa")):
        cert = pki.ca.issue("kind-" + kind, LOCAL, key_type=key_type)
        if kind == "EC-PARAMETERS":
            write(cert.key, openssl("ecparam", "-name", "prime256v1") + openssl("ec", "-in", cert.key))
        elif kind == "RSA-PRIVATE-KEY":
            write(cert.key, openssl("rsa", "-in", cert.key, "-traditional"))
        text += "[%s]\nrole = server\nlisten = 127.0.0.1:0\ncertificate = %s\nkey = %s\n" % (
            kind, cert.cert, cert.key)
        pins.append(cert.pin)
    done = run_shim("-t", "-f", write(tmp_path / "nutshim.conf", text))
    assert done.returncode == 0 and all(pin in done.stdout for pin in pins), done


def test_encrypted_key(pki, tmp_path):
    """An encrypted key is an error that says so and what to do, and nobody is asked for a passphrase."""
    text = ""
    for form, command in (("pkcs8", ["pkcs8", "-topk8"]), ("traditional", ["ec", "-aes128"])):
        path = str(tmp_path / form)
        openssl(*command, "-in", pki.server.key, "-out", path, "-passout", "pass:" + NSS_PASSWORD)
        write(path + ".both", read(path) + read(pki.server.cert))
        text += "[%s]\nrole = server\nlisten = *:0\ncertificate = %s\nkey = %s\n" % (form, pki.server.cert, path)
        text += "[%s-both]\nrole = server\nlisten = *:0\ncertificate = %s.both\n" % (form, path)
    found = faults(tmp_path / "nutshim.conf", text)
    for form in ("pkcs8", "traditional"):
        for name, option in ((form, "key"), (form + "-both", "certificate")):
            assert re.match("%s: .*encrypted.*openssl pkey" % option, found[name]), found
    assert "pass phrase" not in str(found)


def test_key_or_certificate_missing(pki, tmp_path):
    """A key or certificate that is missing, cut, another's or another thing is an error FILE:LINE."""
    key, own = read(pki.server.key), read(pki.server.cert)
    write(tmp_path / "cut.key", key[:120])
    write(tmp_path / "cut.pem", key + own[:300])
    cases = {
        "no-key": ({"certificate": pki.server.cert}, "private key"),
        "no-certificate": ({"certificate": pki.server.key}, "certificate"),
        "key-is-none": ({"certificate": pki.server.cert, "key": pki.server.cert}, "private key"),
        "missing": ({"certificate": "missing.pem"}, "missing.pem: No such file"),
        "missing-key": ({"certificate": pki.server.cert, "key": "missing.key"}, "missing.key: No such file"),
        "folder": ({"certificate": "."}, "directory"),
        "cut-key": ({"certificate": pki.server.file, "key": "cut.key"}, "cut.key"),
        "cut": ({"certificate": "cut.pem"}, "cut.pem"),
        "of-another": ({"certificate": pki.server.cert, "key": pki.client.key},
                       "%s.*does not belong.*%s" % (re.escape(pki.client.key), re.escape(pki.server.cert)))}
    text = ""
    for name, (options, _) in cases.items():
        text += "[%s]\nrole = server\nlisten = *:0\n" % name + "".join("%s = %s\n" % item for item in options.items())
    found = faults(tmp_path / "nutshim.conf", text)
    for name, (_, words) in cases.items():
        assert re.search(words, found.get(name, "")), (name, found)


@pytest.mark.parametrize("where", ["certificate", "key"])
def test_key_readable_by_others(check, shim, pki, tmp_path, where):
    """A key that everybody can read is a warning at start and in -t; one for root and a group is not."""
    path = shutil.copy(pki.server.file if where == "certificate" else pki.server.key, tmp_path / "own.pem")
    options = {"certificate": path} if where == "certificate" else {"certificate": pki.server.cert, "key": path}
    os.chmod(path, 0o640)
    done = check(**options)
    assert done.returncode == 0 and "everybody can read" not in done.stdout + done.stderr, done
    os.chmod(path, 0o644)
    done = check(**options)
    assert done.returncode == 0 and re.search(r"warning: .*:\d+: .*own\.pem.*read", done.stdout + done.stderr), done
    running = shim({"upsd": dict({"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:1"}, **options)})
    running.wait_log(r"warning: .*own\.pem.*read")


# ---- expiry ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dated(pki):
    """{days: certificate} that end in so many days, and a CA that does in 20."""
    def stamp(days):
        return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + days * 86400 + 600))
    found = {days: pki.ca.issue("days%d" % days, LOCAL, end=stamp(days)) for days in (-3, 5, 29, 31, 400)}
    authority = pki.ca.issue("days20ca", "DNS:ca", end=stamp(20))
    found["trust"] = authority
    return found


def test_expiry_in_the_check(check, dated):
    """-t says for each own and each trusted certificate how long it still holds, or for how long it has been over."""
    for days, words in ((400, "expires in 400 days"), (29, "expires in 29 days"), (-3, r"expired \d days ago")):
        done = check(certificate=dated[days].file, client_certificate="require", trust=dated["trust"].cert)
        assert re.search(r"own certificate .*%s" % words, done.stdout + done.stderr), done
        assert re.search(r"trusted certificate .*expires in 20 days", done.stdout + done.stderr), done


def test_expiry_in_the_log(shim, dated, nut, tmp_path):
    """At start and reload the log says the same: a warning in the last 30 days, an error once past; all goes on.

    A day later it says so again; the clock's day is a stand-in.
    """
    skip = tmp_path / "a day later"
    write(tmp_path / "sitecustomize.py", "import os, time\nreal = time.monotonic\n"
          "time.monotonic = lambda: real() + 86401 * os.path.exists(%r)\n" % str(skip))

    def server(days):
        return {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port,
                "certificate": dated[days].file}
    config = {"past": server(-3), "soon": server(5), "near": server(29), "far": server(31), "good": server(400)}
    config["trusting"] = dict(server(400), client_certificate="request", trust=dated["trust"].cert)
    running = shim(config, env={"PYTHONPATH": str(tmp_path)})
    words = {"past": r"error: \[past\] own certificate .*expired \d days ago",
             "soon": r"warning: \[soon\] own certificate .*expires in 5 days",
             "near": r"warning: \[near\] .*expires in 29 days", "far": r"info: \[far\] .*expires in 31 days",
             "good": r"info: \[good\] .*expires in 400 days",
             "trusting": r"warning: \[trusting\] trusted certificate .*expires in 20 days"}
    for pattern in words.values():
        running.wait_log(pattern)
    mark = running.mark()
    running.reload()
    for pattern in words.values():
        running.wait_log(pattern, start=mark)
    assert works(running.port("past"))
    mark = running.mark()
    skip.write_text("")
    with PlainClient(running.port("good")) as client:       # wakes the loop, for which a day has passed at once
        client.send("LOGOUT\n")
        client.recv_until_close()
    for name in ("past", "soon", "near", "trusting"):
        running.wait_log(words[name], start=mark)


def test_certificate_that_expires_while_in_use(shim, nut, pki):
    """A running daemon goes on when its certificate expires, and so do its sessions."""
    end = int(time.time()) + 3
    brief = pki.ca.issue("brief", LOCAL, end=time.strftime("%Y%m%d%H%M%SZ", time.gmtime(end)))
    running = shim({"server": {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port,
                               "certificate": brief.file}})
    with TlsClient(running.port("server"), ca=pki.ca.cert) as client:
        assert client.ask("NETVER") == b"1.3\n"
        poll(lambda: time.time() > end + .5)
        assert client.ask("NETVER") == b"1.3\n"
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        TlsClient(running.port("server"), ca=pki.ca.cert).close()
    assert works(running.port("server"))            # for who does not look


# ---- what the check prints ------------------------------------------------------------------------

def test_names_and_pin_in_the_check(check, pki):
    """-t prints the own certificate's names and its pin, ready to paste."""
    done = check(certificate=pki.client.file)
    assert done.returncode == 0
    for name in ("CN=client.example", "DNS:client.example", "IP:127.0.0.1", "URI:urn:nutshim:client",
                 "email:ups@client.example"):
        assert name in done.stdout
    assert re.search(r"(?m)^\s*pin = %s$" % re.escape(pki.client.pin), done.stdout), done.stdout


def test_min_tls_1_2_is_warned_about(check, pki):
    """min_tls = 1.2 and plaintext = localhost are allowed, and warned about."""
    done = check(certificate=pki.server.file, min_tls="1.2", plaintext="localhost")
    text = done.stdout + done.stderr
    assert done.returncode == 0, done
    assert re.search("warning: .*min_tls.*1.2", text) and re.search("warning: .*plaintext.*TLS", text), done
