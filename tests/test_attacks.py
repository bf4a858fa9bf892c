# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks on STARTTLS and TLS, both directions. Each test is named after its attack, and each attack
fails: upsd, a real one behind a relay that records, sees nothing of it, and so does the client.

The server shim stands in front of real upsd; the client shim in front of a false server, since no
real one can be made to misbehave.
"""

import contextlib
import json
import os
import random
import re
import selectors
import socket
import ssl
import subprocess
import sys
import time

import pytest

from certs import LOCAL, Certificate, openssl
from harness import (TESTS, FalseServer, PlainClient, Relay, Shim, TlsClient, clean_env, client_context, closes,
                     free_port, pair_config, poll, run, run_shim, says, silent, tls)

OK_STARTTLS = b"OK STARTTLS\n"
NOT_ENABLED = b"ERR TLS-NOT-ENABLED\n"
SECRET = b"USERNAME admin\nPASSWORD adminpass\n"
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d nutshim\[\d+\] (error|warning|notice|info|debug): [ -~]*$")


def ready(socks, seconds, event=selectors.EVENT_READ):
    """Those sockets that can be read, or written, within so many seconds."""
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            selector.register(sock, event)
        return [key.fileobj for key, _ in selector.select(seconds)]


def hello(name="localhost"):
    """The bytes of a real ClientHello."""
    out = ssl.MemoryBIO()
    conversation = client_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        conversation.do_handshake()
    return out.read()


class Mallory(Relay):
    """A relay in the middle: edit(way, data) returns what goes on in place of data, way is "up" or "down".

    sent holds what each connection's client has sent.
    """

    def __init__(self, target):
        super().__init__(target)
        self.sent = []
        self.edit = lambda way, data: data

    def _forward(self, source, sink, way):
        record = bytearray()
        if way == "up":
            self.sent.append(record)

        class Edited:                               # pylint: disable=too-few-public-methods
            """The source as the other side gets to see it."""
            @staticmethod
            def recv(size):
                """What comes next, changed."""
                data = source.recv(size)
                record.extend(data)
                return data and self.edit(way, data)
        super()._forward(Edited, sink, way)


class Stage:
    """One nutshim with every shim that the attacks need, real upsd behind it and a false one."""

    def __init__(self, shim, upsd, false, wire):
        self.shim, self.upsd, self.false, self.wire = shim, upsd, false, wire
        self.ports = {name: port for name, _, port in shim.listening}

    def plain(self, section="open", **options):
        """A connection to a shim."""
        return PlainClient(self.ports[section], **options)

    def tls(self, section="open", **options):
        """A TLS session with a server shim."""
        return TlsClient(self.ports[section], **options)

    def settle(self):
        """Return once the loop has read all that was sent to it before: a round trip of a connection of its own."""
        with self.plain() as client:
            assert client.ask("LOGOUT") == b"OK Goodbye\n"

    @contextlib.contextmanager
    def unseen(self, log=None):
        """Of what happens inside upsd sees neither a byte nor a connection; log: the line that tells of it."""
        connections, before, mark = self.upsd.connections, len(self.upsd.up), self.shim.mark()
        yield
        if log:
            self.shim.wait_log(log, start=mark)
        with self.tls() as client:
            assert client.ask("NETVER") == b"1.3\n"
        assert self.upsd.up[before:] == b"NETVER\n"
        assert self.upsd.connections == connections + 1

    def betray(self, behaviour, section="front", log=None):
        """A client says its password to the client shim while a server misbehaves: it gets nothing.

        Nothing that the client said goes out either: the server sees STARTTLS, then TLS or nothing.
        """
        self.false.behaviour = behaviour
        before, mark = len(self.wire.sent), self.shim.mark()
        with self.plain(section) as client:
            client.send(SECRET)
            assert client.recv_until_close() == b""
        if log:
            self.shim.wait_log(log, start=mark)
        for sent in self.wire.sent[before:]:
            assert re.match(rb"(STARTTLS\n(\x16\x03.*)?)?$", sent, re.DOTALL), sent[:80]
            assert b"admin" not in sent


@pytest.fixture(scope="module")
def stage(nut, pki):
    """The Stage."""
    with contextlib.ExitStack() as stack:
        upsd = stack.enter_context(Relay(nut.port))
        false = stack.enter_context(FalseServer(closes))
        wire = stack.enter_context(Mallory(false.port))

        def server(**options):
            return dict(role="server", listen="127.0.0.1:0", upstream="127.0.0.1:%d" % upsd.port,
                        certificate=pki.server.file, **options)

        def client(**options):
            return dict({"role": "client", "listen": "127.0.0.1:0", "reuse": 0,
                         "upstream": "localhost:%d" % wire.port, "trust": pki.ca.cert}, **options)
        mutual = {"client_certificate": "require", "trust": pki.ca.cert, "crl": pki.crl}
        shim = stack.enter_context(Shim({
            "open": server(), "hasty": server(handshake_timeout=1), "old": server(min_tls="1.2"),
            "mutual": server(**mutual), "read": server(permit="*: read"),
            "other": server(client_certificate="require", trust=pki.other_ca.cert),
            "named": server(client_certificate="request", trust=pki.ca.cert, permit="CN=nobody: read"),
            "local": server(plaintext="localhost", permit="*: read"),
            "fast": dict(server(plaintext="localhost", permit="*: read"), upstream="127.0.0.1:%d" % nut.port),
            "front": client(), "fast-front": dict(client(), upstream="localhost:%d" % false.port),
            "kept-front": client(reuse=30), "old-front": client(min_tls="1.2"),
            # By address, since a name with two of them would share the time out between them.
            "hasty-front": client(handshake_timeout=1, upstream="127.0.0.1:%d" % wire.port),
        }))
        yield Stage(shim, upsd, false, wire)


def upgrade(client):
    """Do a TLS handshake on a PlainClient, as if OK STARTTLS had come."""
    client.sock = client_context().wrap_socket(client.sock, server_hostname="localhost")


def refused(connect):
    """connect() makes a TlsClient; True if it fails or gets no answer but an alert or the end."""
    try:
        with connect() as client:
            client.send("VER\n")
            return client.recv_until_close() == b""
    except OSError:                                 # ssl.SSLError is one
        return True


# ---- the server shim: STARTTLS ------------------------------------------------------------------

@pytest.mark.parametrize("behind", [b"VER\n", b"S", b"\n", b" ", b"\0", b"STARTTLS\n", b"LOGOUT\n", b"\x16\x03\x01"])
def test_command_injection_in_one_segment(stage, behind):
    """Whatever stands behind STARTTLS in its segment ends the connection, unanswered, and never counts inside TLS."""
    with stage.unseen(log="injection|NUL"), stage.plain() as client:
        client.send(b"STARTTLS\n" + behind)
        assert client.recv_until_close() == b""


def test_command_injection_with_a_tls_hello_behind(stage):
    """A ClientHello that does not wait for OK STARTTLS is not answered: who knows what stands before it."""
    with stage.unseen(log="injection|NUL"), stage.plain() as client:
        client.send(b"STARTTLS\nUSERNAME admin\n" + hello())
        assert client.recv_until_close() == b""


def test_command_injection_split_at_each_byte(stage):
    """However STARTTLS and a command behind it are cut into two segments, upsd never sees the command."""
    data = b"STARTTLS\nUSERNAME admin\n"
    with stage.unseen():
        for cut in range(1, len(data)):
            with stage.plain() as client:
                client.send(data[:cut])
                stage.settle()
                with contextlib.suppress(OSError):  # the shim has closed already
                    client.send(data[cut:])
                got = client.recv_until_close()
                if cut == len(b"STARTTLS\n"):       # the rest came as if it were TLS: an alert may follow
                    assert got.startswith(OK_STARTTLS) and got[len(OK_STARTTLS):][:1] in (b"", b"\x15")
                else:
                    assert got == b""


def test_command_injection_byte_by_byte(stage):
    """A command behind STARTTLS that comes one byte at a time is taken for TLS, and fails as such."""
    with stage.unseen(log="TLS"), stage.plain() as client:
        client.send_bytewise(b"STARTTLS\n")
        assert client.recv_line() == OK_STARTTLS
        with contextlib.suppress(OSError):
            for byte in b"USERNAME admin\n":
                client.send(bytes([byte]))
                stage.settle()
        assert client.recv_until_close()[:1] in (b"", b"\x15")


def test_command_injection_between_starttls_and_the_hello(stage):
    """A line put between OK STARTTLS and a real client's hello breaks the handshake and is no part of a session."""
    with stage.unseen(log="TLS handshake failed"), stage.plain() as client:
        assert client.ask("STARTTLS") == OK_STARTTLS
        client.send("FSD ups\n")
        with pytest.raises(OSError):
            upgrade(client)


def test_state_set_in_the_clear_does_not_survive_tls(stage):
    """What was said before STARTTLS, whole or half, is forgotten: not even a user name gets into the TLS session."""
    for before in (SECRET, SECRET + b'SET VAR ups ups.mfr "', SECRET + b"VER \\\n", b"STARTTL"):
        start = len(stage.upsd.up)
        with stage.plain() as client:
            client.send(before)
            for _ in range(before.count(b"\n") - before.count(b"\\\n")):
                assert client.recv_line() == NOT_ENABLED
            client.send(b'"\nSTARTTLS\n' if b'"' in before else b"\nSTARTTLS\n")
            if not before.endswith(b"\n"):
                assert client.recv_line() == NOT_ENABLED
            elif before.endswith(b"\\\n"):
                assert client.recv_line() == NOT_ENABLED
            else:
                assert client.recv_line() == NOT_ENABLED        # the empty line
            assert client.recv_line() == OK_STARTTLS
            upgrade(client)
            assert client.ask("LOGIN ups") == b"ERR USERNAME-REQUIRED\n"
            assert client.ask("USERNAME other") == b"OK\n"
        assert stage.upsd.up[start:] == b"LOGIN ups\nUSERNAME other\n"


def test_session_in_the_clear(stage):
    """A client that never says STARTTLS learns that TLS is wanted, eight times at the most, and upsd nothing at all."""
    with stage.unseen(log="no STARTTLS"), stage.plain() as client:
        client.send(SECRET * 10)
        assert client.recv_until_close() == NOT_ENABLED * 8


def test_browser_made_to_speak_nut(stage):
    """A request of a web browser with NUT commands in its body gets nowhere."""
    with stage.unseen(), stage.plain() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: upsbox:401\r\nContent-Length: 33\r\n\r\n"
                    b"STARTTLS\r\nUSERNAME admin\r\nFSD ups\r\n")
        assert OK_STARTTLS not in client.recv_until_close()


@pytest.mark.parametrize("command", ["STARTTLS", "starttls", "StartTLS", " \tSTARTTLS \r", '"STARTTLS"', "START\\TLS",
                                     "STARTTLS x", "STARTTLS # comment"])
def test_starttls_inside_tls(stage, command):
    """STARTTLS inside TLS gets ERR ALREADY-SSL-MODE in its turn, whatever its spelling, and never reaches upsd."""
    start = len(stage.upsd.up)
    with stage.tls() as client:
        client.send("NETVER\n%s\nLIST UPS\n%s\nNETVER\n" % (command, command))
        lines = client.recv_lines(7)
    assert [line.split()[0] for line in lines] == [b"1.3", b"ERR", b"BEGIN", b"UPS", b"END", b"ERR", b"1.3"]
    assert lines[1] == lines[5] == b"ERR ALREADY-SSL-MODE\n"
    assert stage.upsd.up[start:] == b"NETVER\nLIST UPS\nNETVER\n"


def test_tls_hello_without_starttls(stage):
    """A TLS hello as the first bytes ends the connection, and the log says what was missing."""
    with stage.unseen(log="TLS hello without STARTTLS"), stage.plain() as client:
        with pytest.raises(OSError):
            upgrade(client)


def test_tls_hello_behind_a_line(stage):
    """A TLS hello in place of a later line is no way into TLS either."""
    with stage.unseen(), stage.plain() as client:
        assert client.ask("VER") == NOT_ENABLED
        with pytest.raises(OSError):
            upgrade(client)


@pytest.mark.parametrize("data", [b"A" * 5000, b'"' + b"A\n" * 2500, b"STARTTLS" + b" " * 5000 + b"\n", b"A" * 300000],
                         ids=["no newline", "open quote", "STARTTLS with 5000 blanks", "300 kB"])
def test_over_long_line_before_tls(stage, data):
    """A line of more than a kilobyte before TLS ends the connection."""
    with stage.unseen(log="bad line"), stage.plain() as client:
        with contextlib.suppress(OSError):
            client.send(data)
        assert client.recv_until_close() == b""


@pytest.mark.parametrize("data", [b"\0", b"STARTTLS\0\n", b"START\0TLS\n", b"VE\0R\nSTARTTLS\n", b"STARTTLS\n\0"])
def test_nul_before_tls(stage, data):
    """A NUL before TLS ends the connection."""
    with stage.unseen(log="NUL|injection"), stage.plain() as client:
        client.send(data)
        assert OK_STARTTLS not in client.recv_until_close()


@pytest.mark.parametrize("unit", [b"A", b'"A B" ', b"\\A"], ids=["word", "quotes", "escapes"])
def test_over_long_command_inside_tls(stage, unit):
    """A command without an end does not fill the memory: past some 33 kB the session ends, and upsd saw none of it."""
    connections, start, mark, before = stage.upsd.connections, len(stage.upsd.up), stage.shim.mark(), stage.shim.rss()
    with stage.tls() as client:
        with contextlib.suppress(OSError):
            for _ in range(200):
                client.send(unit * (8192 // len(unit)))
        with contextlib.suppress(OSError):
            assert client.recv_until_close() == b""
    stage.shim.wait_log("bad line", start=mark)
    assert stage.upsd.up[start:] == b"" and stage.upsd.connections == connections + 1
    assert stage.shim.rss() - before < 1024


def test_random_bytes_before_tls(stage):
    """Whatever comes before TLS, upsd sees nothing of it, and the replies are the contract's three in their order.

    2,000 inputs of a seeded generator, each cut into one to four pieces.
    """
    rnd = random.Random(3)
    lines = [b"STARTTLS\n", b"starttls\r\n", b"\n", b"\r\n", b"LOGOUT\n", b"DETACH\n", b"VER\n", b"USERNAME admin\n",
             b"PASSWORD adminpass\n", b'SET VAR ups ups.mfr "x\\""\n', b"# comment\n", b"FSD ups\n"]
    others = [b"STARTTLS", b"LOGOUT", b" ", b"\t", b"\r", b'"', b"\\", b"\\\n", b"#", b"=", b"\0", b"\x80\xff",
              b"\x16\x03\x01", b"\x15\x03\x03\0\x02\x01\0", hello(), b"A" * 600]

    def some():
        """Some whole lines, or lines and other things."""
        choice = lines if rnd.random() < .5 else lines + others + [bytes([rnd.randrange(256)])]
        return b"".join(rnd.choice(choice) for _ in range(rnd.randrange(1, 5)))
    replies = re.compile(rb"(ERR TLS-NOT-ENABLED\n){0,8}(OK STARTTLS\n(\x15.*)?|OK Goodbye\n)?$", re.DOTALL)
    seen = {b"": 0, NOT_ENABLED: 0, OK_STARTTLS: 0, b"OK Goodbye\n": 0}
    with stage.unseen():
        for number in range(2000):
            pieces = [some() for _ in range(rnd.randrange(1, 5))] + [b"STARTTLS\n"] * (rnd.random() < .2)
            with stage.plain() as client:
                with contextlib.suppress(OSError):
                    for piece in pieces:
                        client.send(piece)
                    client.sock.shutdown(socket.SHUT_WR)
                got = client.recv_until_close()
            # A hello that came in a segment of its own, right behind STARTTLS, is a proper handshake.
            if b"\n\x16" not in got:
                assert replies.match(got), "input %d, %r: %r" % (number, pieces, got)
            for reply in seen:
                seen[reply] += reply in got if reply else not got
    assert min(seen.values()) > 60, "the generator is too tame: %s" % seen


# ---- the server shim: TLS -----------------------------------------------------------------------

@pytest.mark.parametrize("section, version", [("open", ssl.TLSVersion.TLSv1_2), ("open", ssl.TLSVersion.TLSv1_1),
                                              ("old", ssl.TLSVersion.TLSv1_1), ("old", ssl.TLSVersion.TLSv1)])
def test_downgrade(stage, section, version):
    """A client that offers less than min_tls is refused, and the log says why."""
    with stage.unseen(log="TLS version"):
        assert refused(lambda: stage.tls(section, maximum=version))


@pytest.mark.parametrize("cipher", ["ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES128-SHA256", "AES128-GCM-SHA256",
                                    "eNULL", "aNULL"])
def test_downgrade_to_a_weak_cipher(stage, cipher):
    """Where TLS 1.2 is allowed, ciphers without forward secrecy or authenticated encryption are not."""
    context = client_context(maximum=ssl.TLSVersion.TLSv1_2)
    context.set_ciphers(cipher + ":@SECLEVEL=0")
    with stage.unseen(log="TLS handshake failed"):
        assert refused(lambda: stage.tls("old", context=context))


def test_garbage_record_of_16_kb_instead_of_a_hello(stage):
    """A full record of garbage in place of the hello ends the connection; so do a megabyte and a record too long."""
    noise = random.Random(16).getrandbits(8 * 16384).to_bytes(16384, "big")
    for data in (b"\x16\x03\x01\x40\x00" + noise, b"\x16\x03\x01\xff\xff" + noise, noise * 64,
                 b"\x17\x03\x03\x40\x11" + noise):
        with stage.unseen(log="TLS handshake failed"), stage.plain() as client:
            assert client.ask("STARTTLS") == OK_STARTTLS
            with contextlib.suppress(OSError):
                client.send(data)
                client.sock.shutdown(socket.SHUT_WR)
            assert client.recv_until_close()[:1] in (b"", b"\x15")


def test_handshake_that_never_ends(stage):
    """The deadline counts from accept: silence, half a hello, and bytes that keep dripping all end with it."""
    start, mark = time.monotonic(), stage.shim.mark()
    greeting = hello()
    # Said at once, and what then follows byte by byte: silence, half a word, blanks, no hello, half a one, all of it.
    drips = [(b"", b""), (b"STAR", b""), (b"", b" " * 100), (b"STARTTLS\n", b""), (b"STARTTLS\n", greeting[:100]),
             (b"STARTTLS\n", greeting)]
    with stage.unseen(), contextlib.ExitStack() as stack:
        open_still = {}
        for before, drip in drips:
            client = stack.enter_context(stage.plain("hasty"))
            client.send(before)
            if before.endswith(b"\n"):
                assert client.recv_line() == OK_STARTTLS
            open_still[client] = iter(drip)
        while open_still:
            assert time.monotonic() - start < 10, "still open"
            found = ready([client.sock for client in open_still], .05)
            for client in list(open_still):
                if client.sock in found:
                    assert client.recv_until_close() == b""
                    del open_still[client]
                else:
                    byte = next(open_still[client], None)
                    with contextlib.suppress(OSError):
                        client.send(b"" if byte is None else bytes([byte]))
        assert time.monotonic() - start > .9
    poll(lambda: sum("handshake timeout" in line for line in stage.shim.lines[mark:]) == len(drips))


@contextlib.contextmanager
def s_client(port, *args):
    """The openssl command as a client, through a bridge that does STARTTLS for it: (input, output) and the process."""
    def bridge(peer):
        with PlainClient(port) as far:
            assert far.ask("STARTTLS") == OK_STARTTLS
            while True:
                for sock in ready([peer.sock, far.sock], 10):
                    data = sock.recv(65536)
                    if not data:
                        return
                    (far.sock if sock is peer.sock else peer.sock).sendall(data)
    with FalseServer(bridge) as server:
        args = ["openssl", "s_client", "-connect", "127.0.0.1:%d" % server.port] + list(args)
        with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=clean_env()) as process:
            try:
                yield process
            finally:
                process.kill()


def converse(process, command, until):
    """Say a line to s_client; what it prints up to a line with the bytes until."""
    process.stdin.write(command)
    process.stdin.flush()
    got = b""
    while until not in got:
        line = process.stdout.readline()
        assert line, got[-2000:]
        got += line
    return got


def test_renegotiation(stage, need):
    """A client of TLS 1.2 that wants to renegotiate is refused, and what it sends behind that never reaches upsd."""
    need("openssl")
    start = len(stage.upsd.up)
    with s_client(stage.ports["old"], "-tls1_2") as process:
        converse(process, b"NETVER\n", b"1.3\n")
        assert b"no renegotiation" in converse(process, b"R\n", b"no renegotiation")
        with contextlib.suppress(OSError):
            process.stdin.write(b"FSD ups\n")
            process.stdin.close()
        process.wait(10)
    with stage.tls() as client:
        assert client.ask("VER")
    assert stage.upsd.up[start:] == b"NETVER\nVER\n"


def test_early_data_replayed(stage, need, tmp_path):
    """No ticket allows early data, which a listener could send again."""
    need("openssl")
    saved = tmp_path / "ticket"
    with s_client(stage.ports["open"], "-tls1_3", "-sess_out", str(saved)) as process:
        converse(process, b"NETVER\n", b"1.3\n")
        poll(lambda: saved.exists() and saved.stat().st_size)
    text = openssl("sess_id", "-in", saved, "-noout", "-text")
    assert "TLS session ticket:" in text and "Max Early Data: 0\n" in text


def test_truncated_command(stage):
    """A command whose end is cut off is not carried out, whether the session ends by FIN, RST or close_notify."""
    start, connections = len(stage.upsd.up), stage.upsd.connections
    for end in ("FIN", "RST", "close_notify", "half a record"):
        mark = stage.shim.mark()
        client = stage.tls()
        client.send("FSD ups")
        if end == "close_notify":
            client.sock.settimeout(5)
            with contextlib.suppress(OSError):
                client.sock.unwrap()
        elif end == "half a record":
            socket.socket.sendall(client.sock, b"\x17\x03\x03\x01\x00half")
        (client.reset if end == "RST" else client.close)()
        stage.shim.wait_log("closed: ", start=mark)
    stage.settle()
    assert stage.upsd.up[start:] == b"" and stage.upsd.connections == connections + 4


@pytest.fixture(scope="module")
def line(stage, pki):
    """(Mallory, port): a client shim with mutual TLS reaches the mutual server shim through Mallory."""
    with Mallory(stage.ports["mutual"]) as mallory:
        with Shim({"client": {"role": "client", "listen": "127.0.0.1:0", "upstream": "localhost:%d" % mallory.port,
                              "trust": pki.ca.cert, "certificate": pki.client.file, "reuse": 0}}) as shim:
            yield mallory, shim.port("client")


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("change", ["bit", "twice", "swallowed", "plain"])
def test_record_tampered_with(stage, line, way, change):
    """A TLS record that is changed, doubled, left out or replaced ends the session; its content goes nowhere."""
    mallory, port = line
    with PlainClient(port) as client:
        assert client.ask("GET VAR ups battery.charge") == b'VAR ups battery.charge "100"\n'
        start = len(stage.upsd.up)
        seen = []

        def edit(direction, data):
            if direction == way and not seen:
                seen.append(data)
                return {"bit": data[:-1] + bytes([data[-1] ^ 1]), "twice": data + data,
                        "swallowed": b"\x17\x03\x03\0\x11" + b"x" * 17,
                        "plain": b"FSD ups\n" if way == "up" else b'VAR ups ups.status "OB LB"\n'}[change]
            return data
        unchanged, mallory.edit = mallory.edit, edit
        client.send("GET VAR ups ups.status\nPROTVER\n")
        genuine = b'VAR ups ups.status "OL"\n1.3\n'
        got = client.recv_until_close()
        mallory.edit = unchanged
    stage.settle()
    assert seen
    assert genuine.startswith(got)                  # nothing forged, nothing twice
    assert b"GET VAR ups ups.status\nPROTVER\n".startswith(stage.upsd.up[start:])
    if way == "up" and change != "twice":
        assert stage.upsd.up[start:] == b""
    if way == "down" and change != "twice":
        assert got == b""


def test_session_replayed(stage, line):
    """A whole session, recorded and sent again, is not accepted: upsd sees nothing the second time."""
    mallory, port = line
    with PlainClient(port) as client:
        client.login()
        assert client.ask("LOGOUT") == b"OK Goodbye\n"
        client.recv_until_close()
    recorded = bytes(mallory.sent[-1])
    assert recorded.startswith(b"STARTTLS\n\x16")
    with stage.unseen(log="TLS handshake failed"), stage.plain("mutual") as client:
        assert client.ask("STARTTLS") == OK_STARTTLS
        with contextlib.suppress(OSError):
            client.send(recorded[len(b"STARTTLS\n"):])
        with contextlib.suppress(OSError):
            client.sock.shutdown(socket.SHUT_WR)
        client.recv_until_close()


def leaf_signed(pki, name, san):
    """A certificate signed with the key of a server certificate, which is no CA."""
    base = Certificate(os.path.join(pki.path, name))
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", base.key,
            "-subj", "/CN=" + name, "-addext", "subjectAltName=" + san,
            "-x509", "-CA", pki.server.cert, "-CAkey", pki.server.key, "-out", base.cert)
    with open(base.file, "w", encoding="ascii") as file:
        for path in (base.key, base.cert, pki.server.cert):
            with open(path, encoding="ascii") as part:
                file.write(part.read())
    return base


CLIENT_CERTIFICATES = {
    "none": lambda pki: None,
    "of an unknown CA": lambda pki: pki.unknown_client,
    "self-signed": lambda pki: pki.self_signed,
    "expired": lambda pki: pki.expired_client,
    "not yet valid": lambda pki: pki.ca.issue("early", "DNS:client.example", start="99980101000000Z"),
    "revoked": lambda pki: pki.revoked_client,
    "a server's": lambda pki: pki.server,
    "signed by a server's key": lambda pki: leaf_signed(pki, "forged_client", "DNS:client.example"),
}


@pytest.mark.parametrize("which", CLIENT_CERTIFICATES)
def test_client_certificate(stage, pki, which):
    """A client without a certificate, or with one that trust, crl, dates or purpose forbid, never gets to upsd."""
    certificate = CLIENT_CERTIFICATES[which](pki)
    with stage.unseen(log="TLS handshake failed"):
        assert refused(lambda: stage.tls("mutual", certificate=certificate))


def test_client_certificate_of_another_shims_ca(stage, pki):
    """Each shim has a trust of its own: what one of them takes, its neighbour in the same process does not."""
    with stage.tls("mutual", certificate=pki.client) as client:
        assert client.ask("NETVER") == b"1.3\n"
    with stage.tls("other", certificate=pki.unknown_client) as client:
        assert client.ask("NETVER") == b"1.3\n"
    with stage.unseen(log="unknown CA"):
        assert refused(lambda: stage.tls("other", certificate=pki.client))
        assert refused(lambda: stage.tls("mutual", certificate=pki.unknown_client))


def ticket(connect):
    """A TLS session that can be resumed, shown by resuming it once."""
    with connect(None) as client:
        assert client.ask("NETVER") == b"1.3\n"
        session = client.sock.session
    with connect(session) as client:
        assert client.ask("NETVER") == b"1.3\n" and client.sock.session_reused
        return client.sock.session


def test_ticket_of_another_shim(stage, pki):
    """A ticket of one shim does not spare its neighbour the look at the certificate."""
    context = client_context(pki.ca.cert, pki.unknown_client)
    session = ticket(lambda session: stage.tls("other", context=context, session=session))
    with stage.unseen(log="unknown CA"):
        assert refused(lambda: stage.tls("mutual", context=context, session=session))


@pytest.mark.parametrize("change", ["trust", "crl", "permit", "client_certificate", "pin"])
def test_ticket_after_a_reload_that_took_trust_away(shim, nut, pki, change):
    """A ticket from before a reload that distrusts its holder is worth nothing."""
    base = {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port,
            "certificate": pki.server.file}
    mutual = dict(base, client_certificate="require", trust=pki.ca.cert)
    before, after = {
        "trust": (mutual, dict(mutual, trust=pki.other_ca.cert)),
        "crl": (mutual, dict(mutual, crl=pki.crl)),
        "permit": (mutual, dict(mutual, permit="CN=nobody: read")),
        "client_certificate": (base, dict(mutual, trust=pki.other_ca.cert)),
        "pin": (mutual, dict(mutual, pin=pki.server.pin)),
    }[change]
    with Relay(nut.port) as upsd:
        before["upstream"] = after["upstream"] = "127.0.0.1:%d" % upsd.port
        running = shim({"server": before})
        context = client_context(pki.ca.cert, pki.revoked_client if change == "crl" else pki.client)

        def connect(session):
            return TlsClient(running.port("server"), context=context, session=session)
        session = ticket(connect)
        start = len(upsd.up)
        running.reload({"server": after})
        running.wait_log("reloaded")
        if change == "permit":
            with connect(session) as client:
                assert client.recv_until_close() == b"ERR ACCESS-DENIED\n"
        else:
            assert refused(lambda: connect(session))
        assert len(upsd.up) == start


@pytest.mark.seconds(150)
def test_ticket_outlives_the_certificate(stage, shim, pki):
    """A ticket is worth nothing once the certificate behind it has expired, on either side."""
    for seconds in (3, 12, 40):                     # to live for the certificates: longer on a slow machine
        end = int(time.time()) + seconds
        stamp = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(end))
        client_cert = pki.ca.issue("brief_client", "DNS:client.example", end=stamp)
        server_cert = pki.ca.issue("brief_server", LOCAL, end=stamp)
        middle = free_port()
        running = shim({
            "brief": {"role": "server", "listen": "127.0.0.1:%d" % middle,
                      "upstream": "127.0.0.1:%d" % stage.upsd.port, "certificate": server_cert.file},
            "client": {"role": "client", "listen": "127.0.0.1:0", "upstream": "localhost:%d" % middle, "reuse": 0,
                       "trust": pki.ca.cert}})
        context = client_context(pki.ca.cert, client_cert)
        with contextlib.suppress(OSError, AssertionError):
            session = ticket(lambda session, context=context: stage.tls("mutual", context=context, session=session))
            for _ in range(2):                      # the second one resumes
                with PlainClient(running.port("client")) as client:
                    assert client.ask("NETVER") == b"1.3\n"
            if time.time() < end:
                break
    assert time.time() < end, "no session before the certificates had expired"
    poll(lambda: time.time() > end + 1)
    with stage.unseen():
        assert refused(lambda: stage.tls("mutual", context=context, session=session))
    start = len(stage.upsd.up)
    with PlainClient(running.port("client")) as client:
        client.send(SECRET)
        assert client.recv_until_close() == b""
    assert len(stage.upsd.up) == start


# ---- the server shim: a peer that was let in ----------------------------------------------------

@pytest.mark.parametrize("busy", [False, True], ids=["nothing owed", "behind a reply that does not come"])
def test_pipelined_starttls_without_reading(stage, pki, busy):
    """A client that pipelines STARTTLS by the thousands and reads nothing is made to wait: the memory does not grow."""
    with contextlib.ExitStack() as stack:
        if busy:                                    # a upsd that never answers: no real one does that for long
            upsd = FalseServer(silent)
            running = stack.enter_context(Shim({"open": {
                "role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % upsd.port,
                "certificate": pki.server.file}}))
            stack.enter_context(upsd)
        else:
            running = stage.shim
        client = stack.enter_context(TlsClient(running.port("open")))
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        if busy:
            client.send("VER\n")
        before = running.rss()
        client.sock.setblocking(False)
        data, sent = b"STARTTLS\n" * 1820, 0
        while sent < 64 << 20:
            try:
                sent += client.sock.send(data)
            except ssl.SSLWantWriteError:
                if not ready([client.sock], .3, selectors.EVENT_WRITE):
                    break
        assert 16380 < sent < 32 << 20, "never made to wait"
        assert running.rss() - before < 1024


FORGED = '2026-01-01 00:00:00 nutshim[1] error: forged\x1b[2J\x07\x7f\u202e\\"'


@pytest.mark.parametrize("newline", ["", "\\\n"], ids=["control characters", "an escaped newline"])
def test_log_injection_through_user_and_ups(shim, pki, newline):
    """What a client calls itself and its UPS cannot forge a log line, nor reach a terminal as control characters.

    The upsd here says OK to everything, as no real one does: refused names are not told at all.
    """
    def agrees(peer):
        for line in iter(peer.sock.makefile("rb").readline, b""):
            if not line.endswith(b"\\\n"):
                peer.send(b"OK\n")
    with FalseServer(agrees) as upsd:
        one = shim({"open": {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % upsd.port,
                             "certificate": pki.server.file}})
        with TlsClient(one.port("open")) as client:
            mark = one.mark()
            for command in ("USERNAME", "PASSWORD", "LOGIN"):
                word = "adminpass" if command == "PASSWORD" else '"x' + newline + FORGED + '"'
                client.send(("%s %s\n" % (command, word)).encode("utf-8"))
                assert client.recv_line() == b"OK\n"
            table = run_shim("-c", "status", "-f", one.config)
            session = json.loads(run_shim("-c", "status", "--json", "-f", one.config).stdout)["sessions"][-1]
    # An escaped newline is read in two ways, so from there on nothing is known for sure, nor told.
    for line, name in (("USERNAME", session["user"]), ("LOGIN", session["ups"])):
        assert ("forged" in name) == (not newline)
        assert len([each for each in one.lines[mark:] if line in each and "forged" in each]) == (not newline)
    assert not [line for line in one.lines[mark:] if not LOG_LINE.match(line)]
    assert "adminpass" not in one.log
    assert not re.search(r"[^\n -~]|^2026-01", table.stdout, re.MULTILINE), table.stdout


def test_refused_names_are_no_identity(stage):
    """A user and a UPS that upsd has refused stand in no log line and no status: a name would lend a stranger weight."""
    with stage.tls() as client:
        mark = stage.shim.mark()
        assert client.ask("LOGIN ghost-ups") == b"ERR USERNAME-REQUIRED\n"
        assert client.ask("USERNAME admin") == client.ask("PASSWORD adminpass") == b"OK\n"
        assert client.ask("USERNAME ghost-user").startswith(b"ERR ")
        assert client.ask("LOGIN ghost-ups").startswith(b"ERR ")
        stage.shim.wait_log("USERNAME admin", start=mark)
        session = json.loads(run_shim("-c", "status", "--json", "-f", stage.shim.config).stdout)["sessions"][-1]
    assert (session["user"], session["ups"]) == ("admin", "")
    assert "ghost" not in stage.shim.log


EVIL = "x\n2026-01-01 00:00:00 nutshim[1] error: forged\x1b[2J"


@pytest.fixture(scope="module")
def evil(pki):
    """A certificate of the right CA with control characters in every kind of name."""
    def der(tag, content):
        return bytes([tag, len(content)]) + content
    text = EVIL.encode("ascii")
    names = der(0x30, der(0x82, b"localhost") + b"".join(der(tag, text[:30]) for tag in (0x81, 0x82, 0x86)))
    return pki.ca.issue("evil", "DER:" + ":".join("%02x" % byte for byte in names), cn=EVIL)


def test_log_injection_through_certificate_names(stage, evil):
    """Newlines and escape sequences in a certificate's names forge no line in log or status, admitted or not."""
    mark = stage.shim.mark()
    with stage.tls("mutual", certificate=evil) as client:
        assert client.ask("NETVER") == b"1.3\n"
        table = run_shim("-c", "status", "-f", stage.shim.config)
        prometheus = run_shim("-c", "status", "--prometheus", "-f", stage.shim.config)
        sessions = json.loads(run_shim("-c", "status", "--json", "-f", stage.shim.config).stdout)["sessions"]
    assert any("forged" in name for name in sessions[-1]["identity"])
    with stage.tls("named", certificate=evil) as client:
        assert client.recv_until_close() == b"ERR ACCESS-DENIED\n"
    stage.shim.wait_log("no permit line", start=mark)
    lines = stage.shim.lines[mark:]
    assert sum("forged" in line for line in lines) >= 2
    assert not [line for line in lines if not LOG_LINE.match(line)]
    for text in (table.stdout, prometheus.stdout):
        assert not re.search(r"[^\n -~]|^2026", text, re.MULTILINE), text
    assert "forged" in table.stdout


def test_terminal_injection_through_certificate_names(stage, evil, tmp_path):
    """The same names do no harm in the output of -p and -t either."""
    stage.false.behaviour = tls(evil)
    config = tmp_path / "nutshim.conf"
    config.write_text("[front]\nrole = client\nupstream = localhost:%d\nverify = none\n"
                      "[own]\nrole = server\ncertificate = %s\n" % (stage.false.port, evil.file))
    for args in (("-p", "front"), ("-t",)):
        done = run_shim(*args, "-f", config)
        assert done.returncode == 0 and "forged" in done.stdout, done
        assert not re.search(r"[^\n -~]|^2026", done.stdout + done.stderr, re.MULTILINE), done.stdout


NAMESPACE = """
import fcntl, socket, struct, sys
sys.path.insert(0, sys.argv[1])
from harness import *

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    flags, address = struct.pack("H", 0x49), struct.pack("H2x4s", socket.AF_INET, bytes([192, 0, 2, 77]))
    for name, request, data in (b"lo", 0x8914, flags), (b"lo:1", 0x8916, address):      # SIOCSIFFLAGS, SIOCSIFADDR
        fcntl.ioctl(sock, request, struct.pack("16s24s", name, data))
with FalseServer(plain()) as upsd:
    with Shim({"local": {"role": "server", "listen": "127.0.0.1:0, 192.0.2.77:0", "plaintext": "localhost",
                         "upstream": "127.0.0.1:%d" % upsd.port, "certificate": sys.argv[2]}}) as shim:
        near, far = shim.ports("local")
        with PlainClient(far, "192.0.2.77") as client:
            assert client.ask("NETVER") == b"ERR TLS-NOT-ENABLED\\n"
        assert not upsd.peers
        with TlsClient(far, "192.0.2.77") as client:
            assert client.ask("NETVER") == b"1.3\\n"
        with PlainClient(near) as client:
            assert client.ask("NETVER") == b"1.3\\n"
print("as promised")
"""


def test_plaintext_from_an_address_that_is_not_loopback(pki, need):
    """`plaintext = localhost` opens the door to loopback addresses only, not to the machine's other ones.

    In a network namespace of its own, with one more address; the upsd there is a stand-in.
    """
    need("unshare")
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    if run(*unshare, "true").returncode:
        pytest.skip("no network namespaces here")
    done = run(*unshare, sys.executable, "-c", NAMESPACE, TESTS, pki.server.file)
    assert done.stdout == "as promised\n", done.stderr


# ---- the server shim: access classes and upsd's way of reading -----------------------------------

PASSED, DENIED = b"-", b"ERR ACCESS-DENIED\n"       # PASSED: whatever upsd says
# What a client of class read says to get USERNAME past the shim, and the replies to it.
SMUGGLED = [
    (b'GET VAR ups "#"\nUSERNAME admin', [DENIED, DENIED]),         # upsd 2.8.0 drops what it has read behind this #
    (b'GET VAR ups "a#\nUSERNAME admin\n"', [DENIED]),
    (b'GET VAR ups "#', None),
    (b'GET VAR "a\nUSERNAME admin\n"', [DENIED]),                   # a newline in quotes ends nothing
    (b'GET VAR "a\\"\nUSERNAME admin\n"', [DENIED]),
    (b"GET VAR ups a\\\nUSERNAME admin", [DENIED]),                 # an escaped one joins two lines
    (b"VER\\\n\nUSERNAME admin", [DENIED, DENIED]),
    (b"\\\nUSERNAME admin", [DENIED]),
    (b"USER\\\nNAME admin", [DENIED]),
    (b'"USERNAME" admin', [DENIED]),
    (b'"USER\\NAME"admin', [DENIED]),
    (b"\\USERNAME admin", [DENIED]),
    (b"US\x01ERN\x80AME\xff admin", [DENIED]),                      # bytes that upsd drops
    (b"\r\v\f\tUSERNAME\radmin", [DENIED]),                         # blanks
    (b"USERNAME=admin", [DENIED]),
    (b"= USERNAME admin", [DENIED]),
    (b'"" USERNAME admin', [DENIED]),
    (b"\0 USERNAME admin", [DENIED]),
    (b"# \\\nUSERNAME admin", [DENIED, DENIED]),                    # no escape in a comment
    (b'#"\nUSERNAME admin', [DENIED, DENIED]),                      # and no quote
    (b"GET#\nUSERNAME admin", [PASSED, DENIED]),
    (b'GET VAR ups "a"#"\nUSERNAME admin', [PASSED, DENIED]),
    (b'GET VAR ups \\"a\nUSERNAME admin', [PASSED, DENIED]),
    (b'GET VAR ups a"\nUSERNAME admin', [PASSED, DENIED]),          # a quote opens at the start of a word only
    (b'GET VAR ups "\\#"\nUSERNAME admin', [PASSED, DENIED]),
    (b"GET VAR ups \\#\nUSERNAME admin", [PASSED, DENIED]),
    (b"GET VAR ups \\\\\nUSERNAME admin", [PASSED, DENIED]),
    (b"GET VAR ups \x01\nUSERNAME admin", [PASSED, DENIED]),
    (b"GET " + b"x " * 40 + b"\nUSERNAME admin", [PASSED, DENIED]),  # more than 32 words
    (b"GET VAR ups " + b"x" * 600 + b"\nUSERNAME admin", [PASSED, DENIED]),     # more than 512 characters
    (b"USERNAME" + b"x" * 600 + b"\nUSERNAME admin", [DENIED, DENIED]),
    (b'"GET VAR" ups\nUSERNAME admin', [DENIED, DENIED]),
    (b"GET\0VAR\nUSERNAME admin", [DENIED, DENIED]),
]


@pytest.mark.parametrize("trick, replies", SMUGGLED, ids=[str(trick[:30]) for trick, _ in SMUGGLED])
def test_command_smuggled_past_an_access_class(stage, trick, replies):
    """Quotes, escapes, comments and odd bytes carry no refused command to upsd, wherever its reads of 512 bytes end."""
    start = len(stage.upsd.up)
    with contextlib.ExitStack() as stack:           # all at once, since upsd is slow to send pipelined replies
        clients = {}
        for offset in (0, 480, 495, 510, 511, 512, 513):
            client = stack.enter_context(stage.plain("local"))
            assert client.ask("NETVER") == b"1.3\n"     # that was the greeting, where a NUL is fatal
            filler = b"GET VAR ups " + b"f" * (offset - 13) + b"\n" if offset else b""
            client.send(filler + trick + b"\n" + (b"NETVER\n" if replies else b""))
            clients[client] = [b"ERR VAR-NOT-SUPPORTED\n"] * bool(filler) + (replies + [b"1.3\n"] if replies else [])
        for client, expected in clients.items():
            got = client.recv_lines(len(expected))
            assert [PASSED if reply == PASSED and line != DENIED else line
                    for line, reply in zip(got, expected)] == expected
    assert b"USERNAME" not in stage.upsd.up[start:]


def test_random_commands_of_the_class_read(stage, nut):
    """Whatever bytes a client of class read sends, real upsd carries out nothing outside that class.

    1,000 conversations of a seeded generator that knows upsd's quotes, escapes and comments. What would
    give a command away is its reply: OK, or that it needs a user, or that there is no such command.
    """
    rnd = random.Random(9271)
    commands = [b"GET VAR ups ups.mfr", b"GET DESC ups x", b"LIST UPS", b"VER", b"NETVER",
                b"USERNAME admin", b"PASSWORD adminpass", b'SET VAR ups ups.mfr "X"', b"FSD ups", b"LOGIN ups",
                b"PRIMARY ups", b"INSTCMD ups load.off", b"SET TRACKING ON"]
    odd = [b"\n", b"\n", b"\n", b"\r\n", b'"', b'"', b"\\", b"#", b"=", b" ", b"\t", b"\x01", b"\x80",
           b"x" * 250, b"x" * 505]
    passed = denied = 0
    for _ in range(1000):
        data = b"".join(rnd.choice(commands) + b"\n" if rnd.random() < .45 else rnd.choice(odd + commands)
                        for _ in range(rnd.randrange(2, 14)))
        with stage.plain("fast") as client:
            client.send(b"HELP\n")
            while data:
                size = rnd.randrange(1, 700)
                client.send(data[:size])
                data = data[size:]
            client.sock.shutdown(socket.SHUT_WR)
            lines = client.recv_until_close().split(b"\n")
        assert not [line for line in lines if line.startswith((
            b"OK", b"ERR UNKNOWN-COMMAND", b"ERR USERNAME", b"ERR PASSWORD", b"ERR ALREADY"))], lines
        denied += lines.count(DENIED[:-1])
        passed += sum(line.startswith((b"VAR ups", b"UPS ups", b"Network UPS", b"1.3")) for line in lines)
    assert nut.get("ups.mfr") == "Test" and nut.get("ups.status") == "OL"
    assert passed > 500 and denied > 2000


def test_reply_of_upsd_cut_at_512_bytes(stage):
    """A reply that upsd cuts off without a newline does not move the shim's own replies out of their turn."""
    name = "x" * 490
    with stage.tls() as client:
        client.send("GET CMDDESC ups %s\nSTARTTLS\nNETVER\n" % name)
        assert client.recv_exactly(512).startswith(b"CMDDESC ups xxx")
        assert client.recv_lines(2) == [b"ERR ALREADY-SSL-MODE\n", b"1.3\n"]


# ---- the client shim ----------------------------------------------------------------------------

def test_right_server(stage, pki):
    """The control of what follows: the same client shim relays to a server that is the right one."""
    stage.false.behaviour = tls(pki.server)
    for section in ("front", "old-front", "hasty-front"):
        with stage.plain(section) as client:
            client.login()


def plain(peer):
    """A plain session, in which a TLS hello is a bad command. Its bytes are not parsed: one that is a quote would hide the line's end."""
    while peer.recv():
        peer.send(b"ERR UNKNOWN-COMMAND\n")


STRIPPED = {
    "ERR in place of OK": says(b"ERR FEATURE-NOT-CONFIGURED\n"),
    "ERR, then a plain session": says(b"ERR UNKNOWN-COMMAND\n", lambda peer: peer.answer()),
    "a upsd without TLS": lambda peer: peer.answer(),
    "closed at once": closes,
    "closed in place of OK": says(b"", closes),
    "reset in place of OK": says(b"", lambda peer: peer.reset()),
    "half an OK": says(b"OK STARTT", closes),
    "OK STARTTLS, then closed": says(OK_STARTTLS, closes),
    "OK STARTTLS, then a plain session": says(OK_STARTTLS, plain),
    "OK, then a plain session": says(b"OK\n", plain),
    "OK Goodbye": says(b"OK Goodbye\n"),
    "OK STARTTLS with more in its line": says(b"OK STARTTLS NOT\n"),
    "OK STARTTLSX": says(b"OK STARTTLSX\n"),
    "lower case": says(b"ok starttls\n"),
    "a NUL": says(b"OK STARTTLS\0\n"),
    "an empty line first": says(b"\nOK STARTTLS\n"),
    "an over-long line": says(b"OK STARTTLS" + b" " * 5000),
    "300 kB without a newline": says(b"A" * 300000),
    "a TLS hello": says(hello()),
    "control characters": says(b"ERR \x1b[2J\x07\r2026-01-01 00:00:00 nutshim[1] error: forged\n"),
}


@pytest.mark.parametrize("attack", STRIPPED)
def test_stripping(stage, attack):
    """Without OK STARTTLS and TLS behind it there is no way on: the client gets nothing, its password stays here."""
    mark, before, start = stage.shim.mark(), len(stage.wire.sent), time.monotonic()
    stage.betray(STRIPPED[attack], log="no upstream")
    assert time.monotonic() - start < 1.9, "it waited for handshake_timeout"
    hello_due = attack.startswith(("OK STARTTLS, then", "OK, then"))
    assert any(b"\x16" in sent for sent in stage.wire.sent[before:]) == hello_due
    assert not [line for line in stage.shim.lines[mark:] if not LOG_LINE.match(line)]


INJECTED = b'VAR ups ups.status "OB LB"\n'


@pytest.mark.parametrize("behind", [INJECTED, b"V", b"\n", b"\0", b"\r\n", b"\x16\x03\x03"])
def test_response_injection_in_one_segment(stage, behind):
    """One byte behind OK STARTTLS in its segment ends it, and no client ever reads it."""
    stage.betray(says(OK_STARTTLS + behind), log="response injection")


def test_response_injection_split_at_each_byte(stage, pki):
    """However the answer and a reply behind it are cut into two segments, no client reads that reply."""
    data = OK_STARTTLS + INJECTED
    for cut in range(1, len(data)):
        def behaviour(peer, cut=cut):
            peer.recv_line()
            peer.send(data[:cut])
            stage.settle()
            peer.send(data[cut:])
            peer.start_tls(pki.server)
            peer.answer()
        stage.betray(behaviour)


def test_response_injection_byte_by_byte(stage):
    """A reply behind OK STARTTLS that comes one byte at a time is taken for TLS, and fails as such."""
    def behaviour(peer):
        peer.recv_line()
        for byte in OK_STARTTLS + INJECTED:
            peer.send(bytes([byte]))
            stage.settle()
        peer.hang()
    stage.betray(behaviour, log="no upstream")


def test_random_answers_to_starttls(stage):
    """Whatever answers STARTTLS short of verified TLS, the client gets nothing, and nothing it said leaves the machine.

    300 answers of a seeded generator, each in one to four segments.
    """
    rnd = random.Random(12)
    parts = [b"OK STARTTLS\n", b"OK STARTTLS", b"OK", b"ERR ", b"\n", b"\r", b" ", b"\0",
             b"\x16\x03\x03\0\x7a\x02", b"\x15\x03\x03\0\x02\2\x28", b"\x14\x03\x03\0\1\1", hello(), INJECTED,
             b"A" * 600]
    for _ in range(300):
        pieces = [b"".join(rnd.choice(parts) if rnd.random() < .8 else bytes([rnd.randrange(256)])
                           for _ in range(rnd.randrange(1, 6))) for _ in range(rnd.randrange(1, 5))]

        def behaviour(peer, pieces=pieces):
            peer.recv_line()
            for piece in pieces:
                peer.send(piece)
            peer.sock.shutdown(socket.SHUT_WR)
            peer.hang()
        stage.betray(behaviour, "fast-front")
        assert stage.false.peers[-1].received[:9] == b"STARTTLS\n" and b"admin" not in stage.false.peers[-1].received


def dns_name(raw):
    """A subjectAltName with one DNS name of any bytes."""
    return "DER:" + ":".join("%02x" % byte for byte in bytes([0x30, len(raw) + 2, 0x82, len(raw)]) + raw)


FALSE_SERVERS = {
    "another name": (lambda pki: pki.wrong_name, "not for"),
    "the name as CN alone": (lambda pki: pki.ca.issue("localhost_cn", cn="localhost"), "not for"),
    "the name before a NUL": (lambda pki: pki.ca.issue("nul", dns_name(b"localhost\0.evil.example")), "no upstream"),
    "the name with a domain behind": (lambda pki: pki.ca.issue("longer", "DNS:localhost.evil.example"), "not for"),
    "a lone wildcard": (lambda pki: pki.ca.issue("wild", "DNS:*"), "not for"),
    "an unknown CA": (lambda pki: pki.unknown_ca, "unknown CA"),
    "itself as CA": (lambda pki: pki.self_signed, "self-signed"),
    "a server's key as CA": (lambda pki: leaf_signed(pki, "forged", LOCAL), "no upstream"),
    "expired": (lambda pki: pki.expired, "expired"),
    "not yet valid": (lambda pki: pki.not_yet, "not valid yet"),
    "a client's certificate": (lambda pki: pki.ca.issue("client_as_server", LOCAL, eku="clientAuth"), "no upstream"),
}


@pytest.mark.parametrize("which", FALSE_SERVERS)
def test_false_server(stage, pki, which):
    """A server with a wrong certificate gets nothing but a TLS hello, and the log says what is wrong with it."""
    make, log = FALSE_SERVERS[which]
    stage.betray(tls(make(pki)), log=log)


def test_false_server_with_the_address_as_a_name(stage, shim, pki):
    """An address is looked for among the addresses of a certificate, not among its names."""
    fake = pki.ca.issue("address_as_name", "DNS:127.0.0.1")
    stage.false.behaviour = tls(fake)
    running = shim({"front": {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % stage.wire.port,
                              "trust": pki.ca.cert}})
    before = len(stage.wire.sent)
    with PlainClient(running.port("front")) as client:
        client.send(SECRET)
        assert client.recv_until_close() == b""
    assert not any(b"admin" in sent for sent in stage.wire.sent[before:])
    running.wait_log("not for")


@pytest.mark.parametrize("section, version", [("front", ssl.TLSVersion.TLSv1_2), ("old-front", ssl.TLSVersion.TLSv1_1)])
def test_downgrade_by_the_server(stage, pki, section, version):
    """A server that offers less than min_tls is refused."""
    stage.betray(tls(pki.server, maximum=version), section, log="no upstream")


def test_garbage_record_of_16_kb_from_the_server(stage):
    """A full record of garbage in place of the server's hello is refused."""
    noise = random.Random(17).getrandbits(8 * 16384).to_bytes(16384, "big")
    for head in (b"\x16\x03\x03\x40\x00", b"\x17\x03\x03\xff\xff", b""):
        def behaviour(peer, head=head):
            peer.recv_line()
            peer.send(OK_STARTTLS)
            peer.recv()                             # the hello: now it is no injection
            peer.send(head + noise)
            peer.hang()
        stage.betray(behaviour, log="no upstream")


def test_server_that_never_finishes(stage):
    """The client shim's deadline is for the whole: silence, half a line, no hello, bytes that keep dripping."""
    def dripping(peer):
        with contextlib.suppress(OSError):
            for byte in b"OK STARTTLS" + b" " * 400:
                peer.send(bytes([byte]))
                if ready([peer.sock], .05) and not peer.recv():
                    return

    def half_a_hello(peer):
        peer.recv()
        peer.send(b"\x16\x03\x03\x00\x7a\x02\x00")
        peer.hang()
    behaviours = [silent, says(b"OK START"), says(OK_STARTTLS), dripping, says(OK_STARTTLS, half_a_hello)]
    left = list(behaviours)
    stage.false.behaviour = lambda peer: left.pop()(peer)   # pylint: disable=unnecessary-lambda
    before, start, mark = len(stage.wire.sent), time.monotonic(), stage.shim.mark()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(stage.plain("hasty-front")) for _ in behaviours]
        for client in clients:
            client.send(SECRET)
        for client in clients:
            assert client.recv_until_close() == b""
    assert .9 < time.monotonic() - start < 5
    assert not any(b"admin" in sent for sent in stage.wire.sent[before:])
    poll(lambda: sum("no answer in time" in line for line in stage.shim.lines[mark:]) == len(behaviours))


@pytest.mark.parametrize("end", ["FIN", "RST", "half a record"])
def test_truncated_reply(stage, pki, end):
    """Of a reply that is cut off the client gets what came, then the end: the shim neither completes nor repeats it."""
    part = b'BEGIN LIST VAR ups\nVAR ups ups.status "O'

    def cut(peer):
        peer.recv_line()
        peer.send(part)
        if end == "half a record":
            socket.socket.sendall(peer.sock, b"\x17\x03\x03\x01\x00half")
        if end == "RST":
            poll(lambda: read)                      # a reset would overtake what was sent
            peer.reset()
    read = []
    stage.false.behaviour = tls(pki.server, then=cut)
    with stage.plain("front") as client:
        client.send("LIST VAR ups\n")
        assert client.recv_exactly(len(part)) == part
        read.append(True)
        assert client.recv_until_close() == b""


def test_command_cut_off_in_one_session_continued_in_the_next(stage, pki):
    """Half a command of a client that left is not completed by the next client's, though both ask over one TLS session."""
    stage.false.behaviour = tls(pki.server)
    first = len(stage.false.peers)
    for rest in ("GET VAR ups ", "SET VAR ups ups.mfr ", ""):
        with stage.plain("kept-front") as client:
            assert client.ask("NETVER") == b"1.3\n"
            client.send(rest)
        stage.settle()
    with stage.plain("kept-front") as client:       # neither is it by what goes over a session of its own
        assert client.ask("LOGIN ups") == b"ERR USERNAME-REQUIRED\n"
    shared, own = stage.false.peers[first:]
    assert shared.received == b"STARTTLS\n" + b"LIST UPS\n".join([b"NETVER\n"] * 3)       # the LISTs are the shim's own
    assert own.received == b"STARTTLS\nLOGIN ups\n"


@pytest.mark.parametrize("when", ["with the reply", "behind the reply", "while nobody is there"])
def test_reply_smuggled_into_the_next_clients_session(stage, shim, pki, when):
    """What a server says unasked in one client's session is never read by the next client as its reply."""
    gone, said = [], []

    def forge(peer):
        peer.recv_line()
        peer.send(b"1.3\n" + INJECTED * (when == "with the reply"))
        if when == "while nobody is there":
            poll(lambda: gone)
        if when != "with the reply":
            peer.send(INJECTED)
        said.append(True)
        peer.answer()
    behaviours = [tls(pki.server, then=forge)]
    stage.false.behaviour = lambda peer: (behaviours.pop() if behaviours else tls(pki.server))(peer)
    running = shim({"front": {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % stage.false.port,
                              "trust": pki.ca.cert}})
    with PlainClient(running.port("front")) as client:
        assert client.ask("NETVER") == b"1.3\n"
        client.send("LOGOUT\n")
        assert client.recv_until_close().endswith(b"OK Goodbye\n")
    gone.append(True)
    poll(lambda: said)
    with PlainClient(running.port("front")) as client:      # a round trip of the loop, which reads what came
        client.send("LOGOUT\n")
        assert INJECTED not in client.recv_until_close()
    with PlainClient(running.port("front")) as client:
        assert client.ask("GET VAR ups battery.charge") == b'VAR ups battery.charge "100"\n'


def test_password_in_the_log(nut, shim, pki):
    """Not even at -DD does a password get into the log, however PASSWORD is written, nor into the status."""
    running = shim(pair_config(nut.port, pki), args=("-DD",))
    seen, secrets = "", []
    for number, command in enumerate((
            "PASSWORD %s", "password %s", '"PASSWORD" %s', "PASS\\WORD %s", 'PASSWORD "%s"', "PASSWORD=%s",
            "\tPASSWORD\t%s\t# %s", "PASSWORD %s x", "PASS\x01WORD %s", "PASSWORD \\\n%s")):
        secrets.append("sesame%d" % number)
        line = command.replace("%s", secrets[-1])
        with PlainClient(running.port("client")) as client:
            client.send("USERNAME admin\n%s\nNETVER\n" % line)
            client.recv_until(b"1.3\n")
            if not number:
                seen = run_shim("-c", "status", "--json", "-f", running.config).stdout
        with PlainClient(running.port("server")) as client:     # and one that forgets about TLS
            assert client.ask(line) == NOT_ENABLED
    running.stop()                                  # so that the log is whole
    assert "USERNAME" in running.log and "admin" in seen
    found = [secret for secret in secrets if secret in running.log + seen]
    assert not found, [line for line in running.lines if "sesame" in line]
