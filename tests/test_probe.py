# SPDX-License-Identifier: GPL-2.0-or-later
"""-p NAME: each step towards a client shim's upstream with its result, or the one that failed in words
that a person can act on. The servers are real server shims in front of real upsd where one can do it."""

import contextlib
import re
import signal
import sys
import time

import pytest

from harness import (NUTSHIM, FalseServer, Nut, Process, Relay, Shim, clean_env, closes, poll, run_shim, says, silent, tls,
                     write)

DEAD = "127.0.0.1:1"                                # nothing listens there
STEPS = ["resolve", "connect", "STARTTLS", "TLS", "chain", "name", "pin", "upsd"]


@pytest.fixture
def probe(tmp_path):
    """probe(upstream, options) runs -p for a client shim of these; the CompletedProcess."""
    def start(upstream, env=None, **options):
        options = dict({"role": "client", "upstream": upstream, "handshake_timeout": 1}, **options)
        path = write(tmp_path / "nutshim.conf", "[box]\n" + "".join("%s = %s\n" % item for item in options.items()))
        return run_shim("-p", "box", "-f", path, env=env or clean_env())
    return start


@pytest.fixture(scope="module")
def ports(nut, pki):
    """{section: port} of one nutshim with server shims of every kind, right and wrong."""
    def server(certificate, **options):
        return dict(role="server", listen="127.0.0.1:0", upstream="127.0.0.1:%d" % nut.port,
                    certificate=certificate.file, **options)
    mutual = {"client_certificate": "require", "trust": pki.ca.cert}
    with Shim({"good": server(pki.server), "named": server(pki.ca.issue("upsbox", "DNS:upsbox.lan,DNS:ups.lan")),
               "unknown": server(pki.unknown_ca), "self": server(pki.self_signed), "expired": server(pki.expired),
               "early": server(pki.not_yet), "revoked": server(pki.revoked), "mutual": server(pki.server, **mutual),
               "strict": server(pki.server, permit="CN=nobody: read, CN=client.example: monitor", **mutual),
               "dead": dict(server(pki.server), upstream=DEAD),
               "old": server(pki.server, min_tls="1.2")}) as shim:
        yield {name: port for name, _, port in shim.listening}


def steps(done):
    """What a probe printed: [(step, text)]."""
    return [tuple(re.match(r"(\S+)\s+(.*)", line).groups()) for line in done.stdout.splitlines()]


def failed(done, step, *words):
    """The probe failed, told so by its exit status, at this step and at no other, with these words."""
    assert done.returncode == 1, done
    assert done.stderr == "" and "Traceback" not in done.stdout
    texts = [text for name, text in steps(done) if "FAILED" in text]
    assert len(texts) == 1 and "FAILED" in done.stdout.splitlines()[-1], done.stdout
    assert steps(done)[-1][0] == step, done.stdout
    for word in words:
        assert re.search(word, texts[0], re.IGNORECASE), "no %r in: %s" % (word, texts[0])
    seen = [name for name, _ in steps(done)[:-1] if name in STEPS]
    assert seen == [name for name in STEPS[:STEPS.index(step)] if name in seen], "steps out of order"
    return texts[0]


# ---- success ------------------------------------------------------------------------------------

def test_each_step_with_its_result(probe, ports, pki):
    """A probe that succeeds prints each step: addresses, TLS version, cipher, names, pin, upsd's VER and LIST UPS."""
    done = probe("localhost:%d" % ports["good"], trust=pki.ca.cert)
    assert done.returncode == 0 and done.stderr == "", done
    assert "FAILED" not in done.stdout
    found = steps(done)
    order = [name for name, _ in found if name in STEPS]
    assert sorted(order, key=STEPS.index) == order and set(order) == set(STEPS), done.stdout
    text = {step: " ".join(text for name, text in found if name == step) for step, _ in found}
    assert "127.0.0.1" in text["resolve"] and "127.0.0.1:%d" % ports["good"] in text["connect"]
    assert "OK" in text["STARTTLS"] and re.search(r"TLSv1\.3.*TLS_\w+", text["TLS"])
    assert re.search(r"DNS:localhost.*IP:127\.0\.0\.1.*IP:::1.*never expires", text["certificate"])
    assert "OK" in text["chain"] and "localhost" in text["name"] and "OK" in text["name"]
    assert pki.server.pin in text["pin"]
    assert "Network UPS Tools upsd" in text["upsd"] and 'UPS ups "Test UPS"' in text["upsd"]


@pytest.mark.parametrize("verify, options", [
    ("chain", {"trust": "{ca}", "server_name": "elsewhere.lan"}), ("pin", {"pin": "{pin}"}), ("none", {})])
def test_what_is_not_checked_is_said(probe, ports, pki, verify, options):
    """With a lesser verify the probe works, and says what it did not check."""
    options = {name: value.format(ca=pki.ca.cert, pin=pki.server.pin) for name, value in options.items()}
    done = probe("127.0.0.1:%d" % ports["good"], verify=verify, **options)
    assert done.returncode == 0, done
    text = dict(steps(done))
    assert "not checked" in text["name"] and verify in text["name"]
    assert ("not checked" in text["chain"]) == (verify != "chain")
    assert text["pin"].endswith(" OK") == (verify == "pin")


def test_with_a_client_certificate(probe, ports, pki):
    """A probe shows the client shim's own certificate to a server that asks for one."""
    done = probe("localhost:%d" % ports["mutual"], trust=pki.ca.cert, certificate=pki.client.file)
    assert done.returncode == 0 and "UPS ups" in done.stdout, done


def test_with_server_name(probe, ports, pki):
    """server_name, not upstream's host, is what the certificate must carry."""
    done = probe("127.0.0.1:%d" % ports["named"], trust=pki.ca.cert, server_name="ups.lan")
    assert done.returncode == 0 and "ups.lan" in dict(steps(done))["name"], done


def test_tls_1_2_where_it_is_allowed(probe, ports, pki):
    """A server of TLS 1.2 is fine with min_tls = 1.2, and the version is told; such a server is a stand-in."""
    with FalseServer(tls(pki.server, maximum=771)) as server:
        done = probe("localhost:%d" % server.port, trust=pki.ca.cert, min_tls="1.2")
        assert done.returncode == 0 and "TLSv1.2" in dict(steps(done))["TLS"], done
        failed(probe("localhost:%d" % server.port, trust=pki.ca.cert), "TLS", "version")
    done = probe("localhost:%d" % ports["old"], trust=pki.ca.cert)
    assert "TLSv1.3" in dict(steps(done))["TLS"]


def test_upsd_with_tls_of_its_own(nut_installed, pki, probe, need):         # pylint: disable=unused-argument
    """A probe works against a upsd that speaks STARTTLS itself (Debian's, with NSS)."""
    need("certutil", "pk12util")
    with Nut(nss=pki.nss_database("probe", pki.server)) as upsd:
        done = probe("localhost:%d" % upsd.port, trust=pki.ca.cert)
    assert done.returncode == 0 and "TLSv1.3" in done.stdout and "UPS ups" in done.stdout, done


# ---- failure ------------------------------------------------------------------------------------

def test_unresolvable_name(probe, pki):
    """A name that nobody knows, since it is too long for DNS: the probe says that it cannot be resolved."""
    name = ".".join(["x" * 63] * 5)
    failed(probe(name, trust=pki.ca.cert), "resolve", name, "not known|resolution")


def test_refused_port(probe, pki):
    """Nothing listens there: connection refused, with address and port."""
    failed(probe(DEAD, trust=pki.ca.cert), "connect", DEAD, "refused")


def test_silent_port(probe, pki):
    """Something accepts and never answers: no answer within handshake_timeout, which is said."""
    start = time.monotonic()
    with FalseServer(silent) as server:
        failed(probe("127.0.0.1:%d" % server.port, trust=pki.ca.cert), "STARTTLS", "no answer within 1 s")
    assert time.monotonic() - start < 5


def test_control_c_ends_it_without_a_traceback(tmp_path):
    """Whoever is tired of waiting for a silent upstream types Control-C, and reads no traceback."""
    with FalseServer(silent) as server:
        path = write(tmp_path / "nutshim.conf", "[box]\nrole = client\nupstream = 127.0.0.1:%d\nverify = none\n"
                     "handshake_timeout = 60\n" % server.port)
        probe = Process([sys.executable, NUTSHIM, "-p", "box", "-f", path])
        try:
            probe.wait_log("resolve")
            poll(lambda: server.peers, 5, "its connection")
            probe.signal(signal.SIGINT)
            assert probe.wait() == -signal.SIGINT and "Traceback" not in probe.log
        finally:
            probe.end()


def test_silent_after_starttls(probe, pki):
    """The same if the silence begins behind OK STARTTLS, or inside TLS."""
    for behaviour, step in ((says(b"OK STARTTLS\n"), "TLS"), (tls(pki.server, then=silent), "upsd")):
        with FalseServer(behaviour) as server:
            failed(probe("localhost:%d" % server.port, trust=pki.ca.cert), step, "no answer within 1 s")


def test_no_starttls(probe, pki, nut):
    """A upsd without TLS: the probe shows what it answered to STARTTLS."""
    failed(probe("127.0.0.1:%d" % nut.port, trust=pki.ca.cert), "STARTTLS", "no TLS", "ERR FEATURE-NOT-CONFIGURED")


@pytest.mark.parametrize("behaviour", [closes, says(b"", closes)], ids=["at once", "instead of OK"])
def test_closed_instead_of_starttls(probe, pki, behaviour):
    """A server that hangs up on STARTTLS: the probe says just that."""
    with FalseServer(behaviour) as server:
        failed(probe("127.0.0.1:%d" % server.port, trust=pki.ca.cert), "STARTTLS", "closed|reset")


def test_something_else_listens_there(probe, pki):
    """A mail server on that port: the probe shows its words, without control characters."""
    with FalseServer(says(b"220 mail.lan ESMTP \x1b[2J\r\n")) as server:
        done = probe("127.0.0.1:%d" % server.port, trust=pki.ca.cert)
        failed(done, "STARTTLS", "220 mail.lan ESMTP")
        assert "\x1b" not in done.stdout


def test_injection_behind_starttls(probe, pki):
    """Bytes behind OK STARTTLS are refused by the probe too, and named as what they are."""
    with FalseServer(says(b"OK STARTTLS\nVAR ups ups.status OB\n")) as server:
        failed(probe("127.0.0.1:%d" % server.port, trust=pki.ca.cert), "STARTTLS", "injection")


def test_wrong_name(probe, ports, pki):
    """The certificate is for other names: the probe tells which, for which one it looked, and what can be done, once."""
    done = probe("localhost:%d" % ports["named"], trust=pki.ca.cert)
    failed(done, "name", "upsbox.lan", "ups.lan", "localhost", "server_name", "certificate", "its pin is sha256//")
    assert (done.stdout + done.stderr).count("set server_name") == 1, done.stdout


def test_address_that_is_not_in_the_certificate(probe, ports, pki):
    """The same for an address, which is what people try first."""
    failed(probe("127.0.0.1:%d" % ports["named"], trust=pki.ca.cert), "name", "for upsbox.lan|DNS:upsbox.lan",
           "not for 127.0.0.1", "server_name", "make (one|a certificate)")


def test_wrong_server_name(probe, ports, pki):
    """A server_name that is not in the certificate is the one that the probe names."""
    failed(probe("localhost:%d" % ports["good"], trust=pki.ca.cert, server_name="upsbox.lan"), "name",
           "localhost", "not for upsbox.lan")


def test_unknown_ca(probe, ports, pki):
    """A certificate of a CA that is not in trust: the probe says so, and shows its names and pin to compare by hand."""
    failed(probe("localhost:%d" % ports["unknown"], trust=pki.ca.cert), "chain", "trust", "CA", "localhost",
           re.escape(pki.unknown_ca.pin))


def test_self_signed_certificate(probe, ports, pki):
    """The same for a self-signed one; put into trust it works."""
    failed(probe("localhost:%d" % ports["self"], trust=pki.ca.cert), "chain", "self-signed", "trust",
           re.escape(pki.self_signed.pin))
    assert probe("localhost:%d" % ports["self"], trust=pki.self_signed.cert).returncode == 0


def test_second_look_that_fails(probe, pki):
    """The probe looks again at a certificate that was refused; if that fails, it still tells the first failure."""
    behaviours = [tls(pki.expired), closes]
    with FalseServer(lambda peer: behaviours.pop(0)(peer)) as server:       # pylint: disable=unnecessary-lambda
        failed(probe("localhost:%d" % server.port, trust=pki.ca.cert), "chain", "expired")


def test_expired_certificate(probe, ports, pki):
    """An expired certificate: since when, and that it has to be renewed."""
    failed(probe("localhost:%d" % ports["expired"], trust=pki.ca.cert), "chain", "expired", r"\d+ days ago", "renew")


def test_certificate_that_is_not_valid_yet(probe, ports, pki):
    """A certificate from the future: most often one of the clocks is wrong, which is what the probe says."""
    failed(probe("localhost:%d" % ports["early"], trust=pki.ca.cert), "chain", "not valid yet", "clock")


def test_revoked_certificate(probe, ports, pki):
    """A certificate on the revocation list."""
    failed(probe("localhost:%d" % ports["revoked"], trust=pki.ca.cert, crl=pki.crl), "chain", "revoked")


@pytest.mark.parametrize("verify", ["full", "pin"])
def test_wrong_pin(probe, ports, pki, verify):
    """Another key than the pinned one: the probe shows the pin that the server has."""
    options = {"trust": pki.ca.cert} if verify == "full" else {}
    done = probe("localhost:%d" % ports["good"], verify=verify, pin=pki.client.pin, **options)
    failed(done, "pin", re.escape(pki.server.pin))


def test_missing_client_certificate(probe, ports, pki):
    """The server wants a client certificate and there is none: the probe says so, every time."""
    for _ in range(5):                              # the alert must not be lost in a reset
        failed(probe("localhost:%d" % ports["mutual"], trust=pki.ca.cert), "upsd", "certificate required")


@pytest.mark.parametrize("which, words", [("unknown_client", "unknown ca"), ("expired_client", "expired")])
def test_client_certificate_that_the_server_refuses(probe, ports, pki, which, words):
    """The server does not take the client's certificate: its alert tells why."""
    certificate = getattr(pki, which).file
    failed(probe("localhost:%d" % ports["mutual"], trust=pki.ca.cert, certificate=certificate), "upsd", words)


def test_client_that_no_permit_line_names(probe, ports, pki):
    """The server knows the certificate but permits it nothing: the probe shows ERR ACCESS-DENIED as a failure."""
    upstream = "localhost:%d" % ports["strict"]
    failed(probe(upstream, trust=pki.ca.cert, certificate=pki.other_client.file), "upsd", "ACCESS-DENIED")
    done = probe(upstream, trust=pki.ca.cert, certificate=pki.client.file)
    assert done.returncode == 0, done


def test_upsd_down_behind_the_server_shim(probe, ports, pki):
    """TLS is fine and upsd is down: the probe gets as far as that, and upsd is what it names."""
    done = probe("localhost:%d" % ports["dead"], trust=pki.ca.cert)
    failed(done, "upsd", "closed", "upsd.*run|log")
    assert pki.server.pin in done.stdout


# ---- several upstreams, names and shims ---------------------------------------------------------

def test_several_upstreams(probe, ports, pki):
    """Each upstream is tried and told of; one that works is enough for exit 0, as for the shim."""
    upstream = "%s, localhost:%d, localhost:%d" % (DEAD, ports["expired"], ports["good"])
    done = probe(upstream, trust=pki.ca.cert)
    assert done.returncode == 0, done
    lines = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert len(lines) == 2 and DEAD in lines[0] and "localhost:%d" % ports["expired"] in lines[1]
    assert done.stdout.index(lines[1]) < done.stdout.index("UPS ups")


def test_no_upstream_works(probe, ports, pki):
    """None of several works: exit 1, and each one's failure is told."""
    done = probe("localhost:%d, %s" % (ports["expired"], DEAD), trust=pki.ca.cert)
    assert done.returncode == 1
    assert [name for name, text in steps(done) if "FAILED" in text] == ["chain", "connect"]


def test_name_with_a_dead_address(probe, ports, pki, tmp_path):
    """Of a name's addresses each is tried, as the shim does: a dead one does not fail the probe.

    The resolver is a stand-in.
    """
    write(tmp_path / "sitecustomize.py", """
import socket
real = socket.getaddrinfo
socket.getaddrinfo = lambda host, *args: real("127.0.0.77", *args) + real("127.0.0.1", *args)
""")
    done = probe("upsbox.lan:%d" % ports["named"], env=clean_env(PYTHONPATH=str(tmp_path)), trust=pki.ca.cert)
    assert done.returncode == 0 and "127.0.0.77" in done.stdout, done
    assert "127.0.0.1:%d" % ports["named"] in dict(steps(done))["connect"]


@pytest.mark.parametrize("name", ["nothere", "upsd"])
def test_no_such_client_shim(pki, tmp_path, name):
    """-p of a name that is no client shim's is a clear error that says which ones there are, exit 1."""
    path = write(tmp_path / "nutshim.conf", "[upsd]\nrole = server\ncertificate = %s\n"
                 "[box]\nrole = client\nupstream = a\ntrust = %s\n" % (pki.server.file, pki.ca.cert))
    done = run_shim("-p", name, "-f", path)
    assert done.returncode == 1 and "(box), not '%s'" % name in done.stderr and done.stdout == "", done


def test_nothing_is_said_before_the_server_is_verified(probe, ports, pki):
    """Towards a server that fails verification the probe says STARTTLS and speaks TLS, and nothing of NUT."""
    for section in ("expired", "unknown", "named"):
        with contextlib.ExitStack() as stack:
            relay = stack.enter_context(Relay(ports[section]))
            assert probe("localhost:%d" % relay.port, trust=pki.ca.cert).returncode == 1
            sent = relay.up
        assert sent.startswith(b"STARTTLS\n\x16") and b"VER" not in sent and b"LIST" not in sent
