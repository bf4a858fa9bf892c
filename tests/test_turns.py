# SPDX-License-Identifier: GPL-2.0-or-later
"""Replies in their turn and turns that are bounded: who waits for whom, whose bytes go to whom, and how much
one session may make the shim hold.

Real upsd where turns are compared with it; a false one where it has to answer oddly, or to be without
end or mercy.
"""

import contextlib
import select
import socket
import ssl
import threading
import time

import pytest

from harness import (FalseServer, PlainClient, Shim, TlsClient, client_context, pair_config, poll, status,
                     silent)
from wire import standin

DENIED, TLS_ALREADY, NO_TLS = b"ERR ACCESS-DENIED\n", b"ERR ALREADY-SSL-MODE\n", b"ERR FEATURE-NOT-CONFIGURED\n"


# ---- replies in their turn -----------------------------------------------------------------------

def test_the_shims_own_replies_keep_their_turn(pair_of, nut):
    """Behind a LIST, STARTTLS and a refused command are answered in their place, through either shim and through both."""
    pair = pair_of(nut, server={"permit": "*: read"})
    with PlainClient(nut.port) as plain:
        listed, version = plain.ask_list("LIST VAR ups"), plain.ask("NETVER")
    commands = "LIST VAR ups\nSTARTTLS\nNETVER\nFSD ups\nSTARTTLS\nLIST VAR ups\nINSTCMD ups load.off\nNETVER\n"
    for connect, starttls in ((lambda: TlsClient(pair.server_port), TLS_ALREADY),
                              (lambda: PlainClient(pair.client_port), NO_TLS)):
        expected = listed + starttls + version + DENIED + starttls + listed + DENIED + version
        for ending in (commands, commands + "LOGOUT\n"):
            with connect() as client:
                client.send(ending)
                assert client.recv_exactly(len(expected)) == expected
                if ending != commands:
                    assert client.recv_until_close() == b"OK Goodbye\n"


def two_lines(peer):
    """A upsd that answers VER in two lines, as the first upsdTLS.py does; other commands as usual, ups.status late."""
    session = standin.Session(peer.server.upsd)
    for line in iter(peer.sock.makefile("rb").readline, b""):
        if line == b"VER\n":
            peer.send(b"upsd 2.8.0,\nvia a shim\n")
        else:
            time.sleep(0.3 if b"ups.status" in line else 0)
            peer.send(session.feed(line))
        if session.closed:
            return


def test_an_upstream_that_answers_in_two_lines_mixes_nobody_up(shim, pki):
    """Where one command has two lines of reply no client gets another's, each gets all of its own, in order."""
    with FalseServer(two_lines) as upsd:
        one = shim(pair_config(upsd.port, pki))
        for _ in range(2):
            with PlainClient(one.port("client")) as first:
                first.send("VER\n")
                assert first.recv_lines(2) == [b"upsd 2.8.0,\n", b"via a shim\n"]
                first.send("GET VAR ups ups.status\n")          # and leaves before the answer
            with PlainClient(one.port("client")) as second:
                assert second.ask("GET VAR ups battery.charge") == b'VAR ups battery.charge "100"\n'
                second.send("GET VAR ups ups.status\nGET VAR ups battery.charge\n")
                assert second.recv_lines(2) == [b'VAR ups ups.status "OL"\n', b'VAR ups battery.charge "100"\n']
        one.wait_log("shared session: not used for 60 minutes.*more than one line")
        for connect in (lambda: PlainClient(one.port("client")), lambda: TlsClient(one.port("server"))):
            with connect() as client:
                client.send("VER\n")
                client.recv_lines(2)
                client.send("GET VAR ups battery.charge\nLOGOUT\n")
                assert client.recv_until_close() == b'VAR ups battery.charge "100"\nOK Goodbye\n'
            with connect() as client:               # one that ends its side is still owed its reply
                client.send("VER\n")
                client.recv_lines(2)
                client.send("GET VAR ups ups.status\n")
                socket.socket.shutdown(client.sock, socket.SHUT_WR)
                assert client.recv_line() == b'VAR ups ups.status "OL"\n'


# ---- turns are bounded ---------------------------------------------------------------------------

@contextlib.contextmanager
def flood(port, clients, block):
    """Clients that send a block again and again, as fast as they can, and drop what they are answered."""
    over, opened = threading.Event(), []

    def work():
        while not over.is_set():
            readable, writable, _ = select.select(opened, opened, [], 0.1)
            for sock in readable:
                with contextlib.suppress(OSError):
                    sock.recv(65536)
            for sock in writable:
                with contextlib.suppress(OSError):
                    sock.send(block)
    with contextlib.ExitStack() as stack:
        for _ in range(clients):
            opened.append(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
            opened[-1].sendall(b"VER\n")            # which the greeting lets through
            opened[-1].setblocking(False)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(30)


def waits(client, polls):
    """How long each of so many polls took, in seconds."""
    found = []
    for _ in range(polls):
        before = time.monotonic()
        assert client.ask("NETVER", 20) == b"1.3\n"
        found.append(time.monotonic() - before)
    return found


@pytest.mark.parametrize("block", [b"\n" * 65536, b"\\a" * 16000 + b"\n", b"=" * 32000 + b"\n"],
                         ids=["empty lines", "escapes", "equals"])
def test_a_flood_of_odd_lines_leaves_others_their_turns(shim, own_nut, pki, block):
    """While 12 sessions send what is slow to read, as fast as they can, another's polls never take as long as upsmon waits.

    The sessions are without TLS, as plaintext = localhost allows, so that they are faster still.
    """
    one = shim(pair_config(own_nut.port, pki, {"plaintext": "localhost"}))
    with PlainClient(one.port("server")) as client, flood(one.port("server"), 12, block):
        poll(lambda: sum(each["bytes_in"] for each in status(one)["sessions"]) > 100000, 20, "the flood")
        assert max(waits(client, 10)) < 4.5         # NUT's clients wait 5 s


# ---- memory of a session -------------------------------------------------------------------------

HELD = 20           # sessions that are made to hold what they can


def private(pid):
    """A process's own memory, in kB."""
    with open("/proc/%d/smaps_rollup" % pid, encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("Private_", "Swap:")))


def settled(shim):
    """A shim's own memory in kB, once its sessions move no more bytes."""
    def moved():
        return sum(each["bytes_in"] + each["bytes_out"] for each in status(shim)["sessions"])
    last, now = -1, moved()
    while last != now:
        time.sleep(0.2)
        last, now = now, moved()
    return private(shim.pid)


def press(clients, data):
    """Send data on every connection until it is gone or nothing moves for half a second."""
    rest = {client: data for client in clients}
    for client in clients:
        client.sock.setblocking(False)
    moved = time.monotonic()
    while rest and time.monotonic() < moved + 0.3:
        for client in list(rest):
            try:
                rest[client] = rest[client][client.sock.send(rest[client][:16384]):]
                moved = time.monotonic()
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                continue
            if not rest[client]:
                del rest[client]
        time.sleep(0.001)


def answers_at_length(peer):
    """A upsd whose reply to each line is 8 kB in a list, whoever reads."""
    data = b""
    while True:
        more = peer.sock.recv(65536)
        if not more:
            return
        data += more
        lines = data.count(b"\n")
        data = data[data.rfind(b"\n") + 1:]
        for _ in range(lines):
            peer.send(b"BEGIN LIST VAR ups\n" + b'VAR ups x "%s"\n' % (b"v" * 100) * 70 + b"END LIST VAR ups\n")


GREEDY = {
    "replies that are not read": (answers_at_length, b"LIST VAR ups\n" * 1000),
    "questions without an answer": (silent, b"GET VAR ups ups.status\n" * 10000),
    "local replies": (silent, b"VER\n" + b"STARTTLS\n" * 30000),
    "local replies that are not read": (silent, b"STARTTLS\n" * 50000),
    "identities without an answer": (silent, b"LOGIN " + b"u" * 500 + b"\n" + (b"USERNAME " + b"x" * 480 + b"\n") * 300),
    "an unfinished command": (silent, b"SET VAR ups " + b"v" * 33000),
    "an unfinished command of equals": (silent, b"=" * 33000),
    "an unfinished quote": (silent, b'SET "' + b"\\a" * 16000),
}


@pytest.mark.parametrize("role, how", [("server", how) for how in GREEDY] + [("client", how) for how in (
    "replies that are not read", "questions without an answer", "identities without an answer", "an unfinished quote")])
def test_no_session_holds_more_than_256_kib(shim, pki, role, how):
    """Whatever a client sends and leaves unread, its session's share of the process's own memory stays below 256 KiB."""
    behaviour, data = GREEDY[how]
    with FalseServer(behaviour) as upsd, contextlib.ExitStack() as stack:
        options = {"max_sessions_per_address": 100}
        # Only one of the shims in the process that is measured; the other one's sessions are not these clients'.
        config = pair_config(upsd.port, pki, options, dict(options, reuse=30))
        measured = stack.enter_context(Shim({role: config[role]}))
        if role == "client":
            stack.enter_context(Shim({"server": config["server"]}))
        context = client_context()
        connect = (lambda: TlsClient(measured.port("server"), context=context)) if role == "server" else (
            lambda: PlainClient(measured.port("client")))
        warm = [stack.enter_context(connect()) for _ in range(2)]
        press(warm, data)
        before = settled(measured)
        clients = [stack.enter_context(connect()) for _ in range(HELD)]
        for client in clients:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        press(clients, data)
        held = (settled(measured) - before) / HELD
        assert len(status(measured)["sessions"]) >= HELD, "the sessions are gone"
        assert held < 256, "%.0f kB a session" % held


def test_half_a_record_holds_little(shim, nut, pki):
    """TLS sessions with all but the last byte of a record of 16 KiB sent hold less than 64 KiB each, and can go on."""
    one = shim({"shim": dict(pair_config(nut.port, pki)["server"], max_sessions_per_address=100)})

    class Split:                                    # pylint: disable=too-few-public-methods
        """A TLS session whose last record is cut by hand."""

        def __init__(self):
            self.sock = socket.create_connection(("127.0.0.1", one.port("shim")), 5)
            self.sock.sendall(b"STARTTLS\n")
            assert self.sock.recv(100) == b"OK STARTTLS\n"
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self.sock.sendall(outgoing.read())
                    incoming.write(self.sock.recv(65536))
            self.sock.sendall(outgoing.read())
            tls.write(b"NETVER\n" + b" " * 16370 + b"\nVER\n"[:3])
            record = outgoing.read()
            self.sock.sendall(record[:-1])
            self.last = record[-1:]
            self.tls, self.incoming = tls, incoming
    warm, split = Split(), []
    try:
        before = settled(one)
        split = [Split() for _ in range(HELD)]
        poll(lambda: len(status(one)["sessions"]) == HELD + 1, 5)
        held = (settled(one) - before) / HELD
        assert held < 64, "%.0f kB a session" % held
        for each in [warm] + split[:2]:
            each.sock.sendall(each.last)
            answer = b""
            while b"\n" not in answer:
                try:
                    answer += each.tls.read(100)
                except ssl.SSLWantReadError:
                    each.incoming.write(each.sock.recv(65536))
            assert answer.startswith(b"1.3\n")
    finally:
        for each in [warm] + split:
            each.sock.close()
