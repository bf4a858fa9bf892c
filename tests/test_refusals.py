# SPDX-License-Identifier: GPL-2.0-or-later
"""What the shims refuse, each with exactly one warning in the log, which names the reason.

The attacks themselves, cut at every byte, are in test_attacks.py; here it is the words that count,
and that the shim serves the next one. Behind it is real upsd; false servers have the certificates
and give the replies that no honest server has.
"""

import re
import socket
import ssl

import pytest

from harness import (FalseServer, PlainClient, TlsClient, closes, free_port, pair_config, plain, poll,
                     says, tls, upsc)

NUT_WORDS = b"USERNAME admin\nPASSWORD adminpass\nLIST VAR ups\n"
REFUSED = b"ERR TLS-NOT-ENABLED\n"


def warnings(shim):
    """The log's lines that are more than information."""
    return [line for line in shim.lines if re.search(r"nutshim\[\d+\] (warning|error): ", line)]


def one_warning(shim, section, reason, port=None, before=0):
    """Wait for the warning, and see that it is one session's one and only, but for some from before."""
    poll(lambda: len(warnings(shim)) > before, 10, lambda: "a warning in:\n" + shim.log)
    shim.stop()
    lines = warnings(shim)[before:]
    assert len(lines) == 1, "not one warning:\n" + shim.log
    peer = r"127\.0\.0\.1:%s" % (port or r"\d+")
    assert re.search(r" warning: \[%s\] #\d+ %s: closed: .*%s" % (section, peer, reason), lines[0]), lines[0]


# ---- the server shim and its clients ------------------------------------------------------------

@pytest.fixture
def server(shim, nut, pki):
    """A server shim in front of the shared upsd."""
    return shim({"server": pair_config(nut.port, pki)["server"]})


# name: (what the client says, what it is told, the reason in the log)
SAYS = {
    "commands without STARTTLS": (b"VER\n" * 8, REFUSED * 8, "no STARTTLS"),
    "one command, then the end": (b"LIST UPS\n", REFUSED, "no STARTTLS"),
    "one command, then LOGOUT": (b"GET VAR ups ups.status\nLOGOUT\n", REFUSED + b"OK Goodbye\n", "no STARTTLS"),
    "bytes behind STARTTLS": (b"STARTTLS\nUSERNAME admin\n", b"", "bytes behind STARTTLS.*injection"),
    "one byte behind STARTTLS": (b"STARTTLS\r\n\n", b"", "bytes behind STARTTLS.*injection"),
    "a TLS hello without STARTTLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"", "TLS.* without STARTTLS"),
    "an over-long line": (b"x" * 40000, b"", "bad line.*bytes"),
    "a NUL": (b"STARTTLS\0\n", b"", "bad line.*NUL"),
}


@pytest.mark.parametrize("case", SAYS)
def test_bad_openings_are_refused(server, nut, case):
    """What is no STARTTLS is refused with one warning that says what it was, and the next client is served."""
    data, answer, reason = SAYS[case]
    with PlainClient(server.port("server")) as client:
        port = client.sock.getsockname()[1]
        client.send(data)
        if case == "one command, then the end":
            assert client.recv_line() == REFUSED
            answer = b""
            client.sock.shutdown(socket.SHUT_WR)
        assert client.recv_until_close() == answer
    with TlsClient(server.port("server")) as client, PlainClient(nut.port) as direct:
        assert client.ask("GET VAR ups ups.status") == direct.ask("GET VAR ups ups.status")
    one_warning(server, "server", reason, port)


def test_silent_client_is_refused(shim, nut, pki):
    """A client that says nothing is closed at handshake_timeout, and the log says for what it was waited."""
    server = shim({"server": dict(pair_config(nut.port, pki)["server"], handshake_timeout=1)})
    with PlainClient(server.port("server")) as client:
        assert client.recv_until_close() == b""
    one_warning(server, "server", "handshake timeout.*STARTTLS")


def test_endless_handshake_is_refused(shim, nut, pki):
    """A client that stops in the middle of its handshake is closed at handshake_timeout, and the log says so."""
    server = shim({"server": dict(pair_config(nut.port, pki)["server"], handshake_timeout=1)})
    with PlainClient(server.port("server")) as client:
        assert client.ask("STARTTLS") == b"OK STARTTLS\n"
        client.send(b"\x16\x03\x01\x02\x00\x01")
        assert client.recv_until_close() == b""
    one_warning(server, "server", "handshake timeout.*TLS handshake")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version, min_tls", [("TLSv1_2", "1.3"), ("TLSv1", "1.3"), ("TLSv1", "1.2"),
                                              ("TLSv1_1", "1.2")])
def test_old_tls_is_refused(shim, nut, pki, version, min_tls):
    """A client that speaks no TLS version that min_tls allows is refused by its version; TLS 1.0 and 1.1 always are."""
    server = shim({"server": dict(pair_config(nut.port, pki)["server"], min_tls=min_tls)})
    if min_tls == "1.2":
        server.wait_log("warning: .*min_tls")       # at the start
    before = len(warnings(server))
    with pytest.raises(ssl.SSLError):
        TlsClient(server.port("server"), maximum=ssl.TLSVersion[version])
    one_warning(server, "server", "TLS.*version", before=before)


def test_client_that_does_not_trust_us_is_told_apart(server, pki):
    """A client that refuses the server's certificate leaves one warning with the reason from its TLS alert."""
    with pytest.raises(ssl.SSLCertVerificationError):
        TlsClient(server.port("server"), ca=pki.other_ca.cert)
    one_warning(server, "server", "refused.*unknown ca")


# ---- the client shim and its upstream -----------------------------------------------------------

# name: (the upstream, what the log says of it)
UPSTREAMS = {
    "wrong name": (lambda pki: tls(pki.wrong_name), "its certificate is for .*, not for localhost"),
    "unknown CA": (lambda pki: tls(pki.unknown_ca), "unknown CA"),
    "self-signed": (lambda pki: tls(pki.self_signed), "not in trust"),
    "expired certificate": (lambda pki: tls(pki.expired), "expired"),
    "certificate not valid yet": (lambda pki: tls(pki.not_yet), "not valid yet"),
    "TLS 1.2": (lambda pki: tls(pki.server, maximum=ssl.TLSVersion.TLSv1_2), "version"),
    "without TLS": (lambda _: plain(), "no TLS there.*ERR FEATURE-NOT-CONFIGURED"),
    "STARTTLS unknown": (lambda _: says(b"ERR UNKNOWN-COMMAND\n"), "no TLS there.*ERR UNKNOWN-COMMAND"),
    "not NUT": (lambda _: says(b"SSH-2.0-x\r\n"), "no TLS there.*SSH-2.0-x"),
    "bytes behind OK STARTTLS": (lambda _: says(b"OK STARTTLS\nOK\n"), "bytes behind OK STARTTLS.*injection"),
    "bytes behind a bare OK": (lambda _: says(b"OK\n\n"), "bytes behind OK STARTTLS.*injection"),
    "closes at once": (lambda _: closes, "closed before it answered STARTTLS"),
    "closes after OK STARTTLS": (lambda _: says(b"OK STARTTLS\n", closes), "closed during the handshake|reset"),
    "an endless reply": (lambda _: says(b"O" * 5000), "no TLS there"),
}


@pytest.mark.parametrize("case", UPSTREAMS)
def test_bad_upstream_is_refused(shim, pki, case):
    """A client gets no byte of a bad upstream, which gets no command of its; the log says what is wrong with it."""
    behaviour, reason = UPSTREAMS[case]
    with FalseServer(behaviour(pki)) as upstream:
        client_shim = shim({"client": {"role": "client", "listen": "127.0.0.1:0", "trust": pki.ca.cert,
                                       "upstream": "localhost:%d" % upstream.port}})
        with PlainClient(client_shim.port("client")) as client:
            port = client.sock.getsockname()[1]
            client.send(NUT_WORDS)
            assert client.recv_until_close() == b""
        one_warning(client_shim, "client", "no upstream.*localhost:%d.*%s" % (upstream.port, reason), port)
        assert [peer.received for peer in upstream.peers if peer.received not in (b"", b"STARTTLS\n")] == []


def test_real_upsd_without_tls_is_refused(shim, nut, pki):
    """A client shim that is pointed at a plain upsd refuses to go on without TLS; upsc fails, the log says why."""
    client_shim = shim({"client": {"role": "client", "listen": "127.0.0.1:0", "trust": pki.ca.cert,
                                   "upstream": "127.0.0.1:%d" % nut.port}})
    answer = upsc(client_shim.port("client"))
    assert answer.returncode != 0 and answer.stdout == ""
    one_warning(client_shim, "client", "no TLS there.*ERR FEATURE-NOT-CONFIGURED")


@pytest.mark.parametrize("section", ["client", "server"])
def test_no_upstream_closes_at_once(shim, pki, section):
    """Where no upstream listens the client is closed at once, long before handshake_timeout, and the log names it."""
    dead = free_port()
    config = pair_config(dead, pki, {"handshake_timeout": 50},
                         {"handshake_timeout": 50, "upstream": ["127.0.0.1:%d" % dead, "localhost:%d" % dead]})
    server = shim({section: config[section]})
    client = PlainClient(server.port(section)) if section == "client" else TlsClient(server.port(section))
    with client:
        client.send(b"VER\n")                       # a client shim's first command is what needs upstream
        assert client.recv_until_close(10) == b""
    both = ".*127.0.0.1:%d.*refused" % dead if section == "server" else \
        ".*127.0.0.1:%d.*refused.*localhost:%d.*refused" % (dead, dead)
    one_warning(server, section, "no upstream" + both)


def test_silent_upstream_closes_in_time(shim, pki):
    """An upstream that is silent is given up at handshake_timeout, and the log says that it gave no answer."""
    with FalseServer(lambda peer: peer.hang()) as upstream:
        client_shim = shim({"client": {"role": "client", "listen": "127.0.0.1:0", "trust": pki.ca.cert,
                                       "upstream": "127.0.0.1:%d" % upstream.port, "handshake_timeout": 1}})
        with PlainClient(client_shim.port("client")) as client:
            client.send(b"VER\n")
            assert client.recv_until_close() == b""
        one_warning(client_shim, "client", "no upstream.*no answer in time")
