# SPDX-License-Identifier: GPL-2.0-or-later
"""Upstream reuse and TLS resumption: faster, and still each client has a conversation of its own, with its
own replies, and nobody else's login.

The differential test runs against the real upsd, through a relay that records what comes to it. Servers
that die at a chosen moment, or tell whether TLS was resumed, are wire.FalseServer's.
"""

import collections
import contextlib
import json
import random
import re
import selectors
import socket
import ssl
import sys
import threading
import time

import pytest
import standin
from harness import (PRIMARY, ROOT, FalseServer, Nut, Peer, PlainClient, TlsClient, client_context, free_port, many_variables,
                     pair_config, poll, run_shim, tls)
from wire import listen, reset

sys.path.insert(0, ROOT)
from nutshim import Commands, Replies  # noqa: E402  pylint: disable=wrong-import-position


def counts(shim):
    """The client shim's upstream sessions, as -c status has them: (fresh, reused, kept)."""
    done = run_shim("-c", "status", "--json", "-f", shim.config)
    assert done.returncode == 0, done.stderr
    section = next(section for section in json.loads(done.stdout)["shims"] if section["name"] == "client")
    return section["upstream_fresh"], section["upstream_reused"], section["kept"]


def client_config(port, pki, **options):
    """A client shim in front of a server on a port."""
    section = {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % port, "trust": pki.ca.cert}
    return {"client": dict(section, **options)}


def say_goodbye(client):
    """LOGOUT, and see the end of the connection."""
    client.send("LOGOUT\n")
    assert client.recv_until_close() == b"OK Goodbye\n"


def end(sock):
    """End a connection whose socket another thread may have in use."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


# ---- random conversations -----------------------------------------------------------------------

# Two habits of upsd 2.8.0 are left out, since there its replies depend on how the bytes are cut into reads,
# so that two direct connections differ as well: it forgets the rest of a read behind a # in quotes, and it
# goes on after LOGOUT where a command stands behind it in one read. Nor does STARTTLS come after a line
# that upsds read in different ways (odd): the shim does not count replies then, and answers it at once.

STATELESS = [
    "VER", "NETVER", "PROTVER", "HELP", "HELP me", "VER # why", "get var ups ups.status", '"GET" VAR ups "ups.mfr"',
    "GET VAR ups ups.model", "GET VAR=ups ups.model", "GET VAR ups nothing", "GET VAR nobody x", "GET VAR", "GET", "LIST",
    "GET DESC ups ups.status", "GET TYPE ups ups.status", "GET UPSDESC ups", "GET TRACKING", "G\\ET VAR ups battery.charge",
    "GET VAR ups ups.status\r", "LIST UPS", "LIST VAR ups", "LIST RW ups", "LIST CMD ups",
    "LIST ENUM ups ups.status", "LIST RANGE ups ups.status", "LIST VAR nobody", "LIST NONSENSE", "GET VAR ups battery.charge",
]
LONG = ["LIST VAR many", "GET CMDDESC ups " + "A" * 490, "GET CMDDESC ups " + "B" * 700]
STATEFUL = [
    "USERNAME u{0}", "PASSWORD p{0}", "USERNAME u{0}", "LOGIN ups", "LOGIN nobody", "PRIMARY ups", "MASTER ups", "FSD ups",
    "SET VAR ups ups.mfr x{0}", "INSTCMD ups load.off", "SET TRACKING ON", "NONSENSE {0}", "", "# comment {0}",
    'GET VAR "a\nodd{0}"', "GE\\\nT VAR ups odd{0}", "ATTACH ups", "PASSWORD",
]
LOGIN = ["USERNAME " + PRIMARY[0], "PASSWORD " + PRIMARY[1], "LOGIN ups", "PRIMARY ups", "SET TRACKING ON", "GET TRACKING"]

# What the upsd that is asked has: LISTs of ten lines to 100 KB.
UPSES = {"ups": {"ups.status": "OL", "ups.mfr": "Test", "ups.model": 'a "b" \\ #c', "battery.charge": "100"},
         "many": dict(many_variables(700), **{"ups.status": "OL"})}


def stateless(words):
    """True for a command that leaves no trace in upsd's session, and is read alike by every upsd."""
    return words[:1] != [] and words[0].upper() in (
        "GET", "LIST", "VER", "NETVER", "PROTVER", "HELP") and not any("odd" in word for word in words)


# pieces: (bytes, how many bytes of replies to wait for before they are sent); leave: see Client
Job = collections.namedtuple("Job", "pieces leave")


class Talk:
    """One random conversation: what a client says, how it leaves, and what it is to get."""

    def __init__(self, number, chance):
        self.number = number
        self.expected = None
        self.leave = chance.choice(("logout",) * 9 + ("close",) * 5 + ("half", "early", "reset"))
        lines = ["GET CMDDESC ups first-%d" % number]       # tells upstream whose conversation begins
        kind = chance.random()
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 6, 12))):
            pool = STATEFUL if kind < 0.08 and chance.random() < 0.4 else LONG if chance.random() < 0.03 else STATELESS
            lines.append(chance.choice(pool).format(number))
            if chance.random() < 0.05 and not any("odd" in line for line in lines):
                lines.append("STARTTLS")
        if kind > 0.97:
            lines += LOGIN[:chance.randint(1, 6)]
        lines.append("GET CMDDESC ups last-%d" % number)
        if self.leave == "logout":
            lines.append("LOGOUT")
        self.data = "".join(line + "\n" for line in lines).encode("ascii")
        if self.leave == "half" and chance.random() < 0.5:
            self.data += b"GET VAR ups up"                  # a command that never becomes whole

    def for_upsd(self):
        """The commands that upsd is to see, but for a LOGOUT."""
        return [words for words in standin.Parser().feed(self.data) if words[:1] not in (["STARTTLS"], ["LOGOUT"])]

    def direct(self):
        """As a job for a direct connection: all at once, then everything until the end."""
        return Job([(self.data, 0)], "logout" if self.leave == "logout" else "half")

    def torn(self, chance):
        """As a job in random pieces; half of the clients wait for the replies to what they have sent."""
        commands, replies = [0], [0] + list(Replies().feed(self.expected))
        for raw, _, _ in Commands().feed(self.data):
            commands.append(commands[-1] + len(raw))
        patient, most, pieces, at = chance.random() < 0.5, chance.choice((1, 9, 30, 30, 90, 90) + (4000,) * 6), [], 0
        while at < len(self.data):
            size = chance.randint(1, most)
            whole = sum(command <= at for command in commands) - 1
            pieces.append((self.data[at:at + size], replies[whole] if patient else 0))
            at += size
        if self.leave in ("early", "reset") and chance.random() < 0.5:
            del pieces[chance.randint(1, len(pieces)):]
        return Job(pieces, self.leave)

    def check(self, got):
        """Fail unless got is what a direct connection gets, or the beginning of it for who leaves early."""
        whole = self.leave not in ("early", "reset")
        assert got == self.expected if whole else self.expected.startswith(got), (
            self.number, self.leave, self.data, got, self.expected)

    def check_own(self, got):
        """Fail if somebody else's conversation is in got."""
        assert {int(number) for number in re.findall(rb" (?:first|last)-(\d+) ", got)} <= {self.number}, (self.data, got)


class Client:
    """One connection of drive()'s, which leaves as the job says.

    logout and half: when the other side ends it, half after an end of its own; close: when all
    replies have come; early and reset: once all is sent, whatever has come, reset with RST.
    """

    def __init__(self, port, talk, job):
        self.talk, self.pieces, self._leave = talk, list(reversed(job.pieces)), job.leave
        self.got, self.over = b"", False
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)

    def ready(self):
        """True if there is something to send, and its time has come."""
        return bool(self.pieces) and len(self.got) >= self.pieces[-1][1]

    def send(self):
        """Send the next piece."""
        with contextlib.suppress(OSError):          # ended by the other side, which is seen when it is read
            self.sock.send(self.pieces.pop()[0])
            if not self.pieces and self._leave == "half":
                self.sock.shutdown(socket.SHUT_WR)
        self._look()

    def receive(self):
        """Read once."""
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        self.got += data
        self.over = not data
        self._look()

    def _look(self):
        if not self.pieces:
            self.over |= self._leave in ("early", "reset")
            self.over |= self._leave == "close" and len(self.got) >= len(self.talk.expected)

    def close(self):
        """Leave."""
        if self._leave == "reset":
            reset(self.sock)
        self.sock.close()


def drive(port, talks, job, chance, clients=20):
    """Hold all these conversations, so many at a time; [(talk, what its client got)]."""
    waiting, active, results = list(reversed(talks)), [], []
    deadline = time.monotonic() + 90
    with selectors.DefaultSelector() as selector:
        while waiting or active:
            while waiting and len(active) < clients:
                talk = waiting.pop()
                active.append(Client(port, talk, job(talk)))
                selector.register(active[-1].sock, selectors.EVENT_READ, active[-1])
            ready = [client for client in active if client.ready()]
            for key, _ in selector.select(0 if ready else 1):
                key.data.receive()
            for client in chance.sample(ready, min(len(ready), 7)):
                if not client.over:
                    client.send()
            for client in [client for client in active if client.over]:
                selector.unregister(client.sock)
                client.close()
                active.remove(client)
                results.append((client.talk, client.got))
            assert time.monotonic() < deadline, "these clients still wait: %s" % [
                (client.talk.number, client.talk.data, client.got[-100:], client.pieces) for client in active]
    return results


# ---- what upsd hears ----------------------------------------------------------------------------

class Recorder:
    """A relay in front of upsd that keeps what comes to it, apart for each connection."""

    def __init__(self, target):
        self.connections = []                       # a bytearray for each
        self._target = target
        self._sockets, self._threads = [], []
        self._listener = listen()
        self.port = self._listener.getsockname()[1]

    def __enter__(self):
        self._spawn(self._accept)
        return self

    def __exit__(self, *_):
        end(self._listener)                         # wakes accept()
        for sock in self._sockets:
            end(sock)
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    def _spawn(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                self._sockets.append(near)
                self._spawn(self._connection, near)

    def _connection(self, near):
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target), 5) as far:
            record = bytearray()
            self.connections.append(record)
            for sock in (near, far):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            down = self._spawn(self._forward, far, near, bytearray())
            self._forward(near, far, record)
            down.join()

    @staticmethod
    def _forward(source, sink, record):
        try:
            data = source.recv(65536)
            while data:
                record += data
                sink.sendall(data)
                data = source.recv(65536)
        except OSError:
            end(source)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)           # an end is passed on as such


def check_connections(connections, talks):
    """Fail unless each upstream connection heard one conversation after the other, each as its client
    said it, and nothing more after the first command that is not stateless but that client's own.

    Returns how many connections heard more than one.
    """
    talks = {"first-%d" % talk.number: talk for talk in talks}
    shared = 0
    for record in connections:
        heard = []                                  # (talk, the commands that came of it)
        for words in standin.Parser().feed(bytes(record)):
            if words[:3] == ["GET", "CMDDESC", "ups"] and words[3].startswith("first-"):
                heard.append((talks[words[3]], []))
            assert heard, "it begins in the midst of a conversation: %r" % record[:200]
            heard[-1][1].append(words)
        shared += len(heard) > 1
        for talk, commands in heard[:-1]:
            assert all(map(stateless, commands)), "after this somebody else came: %r" % commands
            assert commands[-1][-1] == "last-%d" % talk.number or talk.leave in ("early", "reset"), commands
        for talk, commands in heard:
            said = talk.for_upsd() + [["LOGOUT"]] * (talk is heard[-1][0])
            assert commands == said[:len(commands)], "not what client %d said: %r" % (talk.number, commands)
    return shared


def has_all_variables(nut):
    """True once upsd has the 700 of UPS many from its driver."""
    with PlainClient(nut.port) as client:
        return client.ask_list("LIST VAR many").count(b"\nVAR many outlet.") == 700


def restart(nut):
    """Restart upsd, and the drivers: dummy-ups 2.8.0 spins once its upsd has gone, and dies at the next change."""
    nut.stop()
    for ups, driver in list(nut.drivers.items()):
        driver.end()
        nut.start_driver(ups)
    nut.start()


@pytest.mark.seconds(180)                           # 25 s of computing, of which two processors do it in 15
@pytest.mark.usefixtures("nut_installed")
def test_reuse_changes_nothing_for_any_client(shim, pki):
    """5,000 random conversations, 20 at once, get through reuse the replies that a direct connection gets,
    each client its own, and no upstream session hears a second client after a first command with a trace.

    upsd is restarted between them and in their midst: there, replies depend on the moment, but are its own.
    """
    chance = random.Random(5)
    talks = [Talk(number, chance) for number in range(5000)]
    with Nut(UPSES) as nut, Recorder(nut.port) as upstream:
        poll(lambda: has_all_variables(nut), 20, "all variables in upsd")
        # upsd's backlog is 16: with more at once, a SYN is lost now and then, which costs a second.
        for talk, talk.expected in drive(nut.port, talks, Talk.direct, chance, clients=10):
            assert talk.expected
        pair = shim(pair_config(upstream.port, pki, {"max_sessions_per_address": 500}))
        port = pair.port("client")
        for batch in (talks[:2000], talks[2000:4000], talks[4000:]):
            for talk, got in drive(port, batch, lambda talk: talk.torn(chance), chance):
                talk.check(got)
            if batch[0] is talks[0]:
                fresh, reused, kept = counts(pair)
                assert reused > 1400 and fresh < 600 and 0 < kept <= 32, (fresh, reused, kept)
            if batch[-1] is not talks[-1]:
                restarting = threading.Thread(target=restart, args=(nut,))
                restarting.start()
                while restarting.is_alive():
                    for talk, got in drive(port, chance.sample(talks, 40), Talk.direct, chance):
                        talk.check_own(got)
                restarting.join()
                poll(lambda: has_all_variables(nut), 20, "all variables in upsd")
        assert check_connections(list(upstream.connections), talks) > 30


# ---- what is kept, and what never ---------------------------------------------------------------

def test_status_counts_fresh_reused_and_kept(pair):
    """-c status counts upstream sessions: fresh, reused, and kept just now."""
    assert counts(pair.shim) == (0, 0, 0)
    with PlainClient(pair.client_port) as one, PlainClient(pair.client_port) as two:
        for client in (one, two):
            assert client.ask("NETVER") == b"1.3\n"
        assert counts(pair.shim) == (2, 0, 0)
        say_goodbye(one)
        poll(lambda: counts(pair.shim) == (2, 0, 1), 5, "one kept")
        with PlainClient(pair.client_port) as three:
            assert three.ask("NETVER") == b"1.3\n"
            assert counts(pair.shim) == (2, 1, 0)
    poll(lambda: counts(pair.shim) == (2, 1, 2), 5, "both kept, after a close without LOGOUT")


@pytest.mark.parametrize("command", ["USERNAME u", "PASSWORD p", "LOGIN ups", "PRIMARY ups", "FSD ups", "SET TRACKING ON",
                                     "INSTCMD ups x", "ATTACH ups", "NONSENSE", "", "# x", 'GET VAR "a\nb"', "DETACH"])
def test_a_session_with_a_trace_is_never_passed_on(command, shim, pki):
    """After any command but the six stateless ones an upstream session ends with its client."""
    with FalseServer(tls(pki.server)) as server:
        client_shim = shim(client_config(server.port, pki))
        for leave in (say_goodbye, PlainClient.close):
            before = len(server.peers)
            with PlainClient(client_shim.port("client")) as client:
                client.ask("VER")
                client.ask(command)
                client.ask("VER")
                leave(client)
            with PlainClient(client_shim.port("client")) as client:
                assert client.ask("GET TRACKING") == b"OFF\n"
                client.send("USERNAME mine\n")      # or it would be kept for the next round
                assert client.recv_line() == b"OK\n"
            assert len(server.peers) == before + 2


@pytest.mark.parametrize("leave", ["close", "reset", "logout"])
def test_a_session_with_a_reply_under_way_is_never_passed_on(leave, shim, pki):
    """A client that leaves before its reply is there takes its upstream session along; the next gets a fresh
    one, and no byte of the other's reply."""
    late = threading.Event()

    def answers_late(peer):
        if peer is peer.server.peers[0]:
            peer.recv_line()
            peer.send(b"VAR ups secret ")
            late.wait(10)
            peer.send(b'"of another"\n')
        peer.answer()
    with FalseServer(tls(pki.server, then=answers_late)) as server:
        port = shim(client_config(server.port, pki)).port("client")
        with PlainClient(port) as first:
            first.send("GET VAR ups secret\n" + "LOGOUT\n" * (leave == "logout"))
            assert first.recv_until(b"secret ") == b"VAR ups secret "
            if leave == "reset":
                first.reset()
        with PlainClient(port) as second:
            assert second.ask("NETVER") == b"1.3\n"
            late.set()
            assert second.ask("PROTVER") == b"1.3\n"
            assert len(server.peers) == 2


def test_a_kept_session_that_speaks_is_dropped(shim, pki):
    """Bytes that nobody asked for end a kept session: no client ever gets them."""
    kept = threading.Event()

    def babbles(peer):
        if peer is peer.server.peers[0]:
            peer.send(standin.Session(peer.server.upsd).feed(peer.recv()))
            kept.wait(10)
            peer.send(b"OK\n")
        peer.answer()
    with FalseServer(tls(pki.server, then=babbles)) as server:
        client_shim = shim(client_config(server.port, pki))
        with PlainClient(client_shim.port("client")) as first:
            assert first.ask("NETVER") == b"1.3\n"
            say_goodbye(first)
        poll(lambda: counts(client_shim) == (1, 0, 1), 5, "it is kept")
        kept.set()
        poll(lambda: counts(client_shim) == (1, 0, 0), 5, "it is dropped")
        with PlainClient(client_shim.port("client")) as second:
            assert second.ask("PROTVER") == b"1.3\n"


def test_reuse_can_be_off_and_has_an_end(shim, pki):
    """reuse = 0 keeps nothing; reuse = 1 keeps an idle session for a second, then ends it."""
    with FalseServer(tls(pki.server)) as server:
        config = client_config(server.port, pki, reuse=0)
        config["short"] = dict(config["client"], reuse=1, listen="127.0.0.1:%d" % free_port())
        both = shim(config)
        for _ in range(2):
            with PlainClient(both.port("client")) as client:
                client.ask("VER")
                say_goodbye(client)
        assert counts(both) == (2, 0, 0)
        with PlainClient(both.port("short")) as client:
            client.ask("VER")
            say_goodbye(client)
        last = server.peers[-1]
        assert last.sock.fileno() >= 0
        poll(lambda: last.sock.fileno() < 0, 10, "its end at the server")


def test_kept_sessions_are_bounded(pair):
    """However many clients leave at once, no more than 32 upstream sessions are kept."""
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            client = stack.enter_context(PlainClient(pair.client_port))
            assert client.ask("NETVER") == b"1.3\n"
    poll(lambda: counts(pair.shim) == (40, 0, 32), 10, "32 of 40 kept")


# ---- dead kept sessions -------------------------------------------------------------------------

def closes_tls(peer):
    """End TLS properly."""
    with contextlib.suppress(OSError):
        peer.sock = peer.sock.unwrap()


def closes_raw(peer):
    """End TCP without a word of TLS."""
    end(peer.sock)


def dies(how, reply=b""):
    """The first connection ends on its second command, with at most the beginning of a reply; others live."""
    def behaviour(peer):
        if peer is not peer.server.peers[0]:
            return peer.answer()
        peer.send(standin.Session(peer.server.upsd).feed(peer.recv()))
        peer.recv()
        if reply:
            peer.send(reply)
        return how(peer)
    return behaviour


@contextlib.contextmanager
def kept_and_dying(shim, pki, behaviour):
    """A client shim with one kept session to such a server: (server, shim)."""
    with FalseServer(tls(pki.server, then=behaviour)) as server:
        client_shim = shim(client_config(server.port, pki))
        with PlainClient(client_shim.port("client")) as client:
            assert client.ask("NETVER") == b"1.3\n"
            say_goodbye(client)
        yield server, client_shim


@pytest.mark.parametrize("how", [closes_tls, closes_raw, Peer.reset])
def test_a_dead_kept_session_is_replaced_unseen(how, shim, pki):
    """A kept session that dies before a byte of reply is replaced, all commands so far are sent again, and
    the client sees nothing but its replies."""
    for data in (b"VER\n", b"LIST VAR ups\nSTARTTLS\nGET VAR ups x\nNETVER\n", b"USERNAME u\nPASSWORD p\n", b"VER\nLOGOUT\n"):
        direct = standin.Session(standin.StandIn()).feed(data)
        with kept_and_dying(shim, pki, dies(how)) as (server, client_shim):
            with PlainClient(client_shim.port("client")) as client:
                client.send(data)
                assert client.recv_exactly(len(direct)) == direct
                assert counts(client_shim)[:2] == (2, 1)
                sent_again = data.replace(b"STARTTLS\n", b"").replace(b"LOGOUT\n", b"")
                assert server.peers[1].received.split(b"STARTTLS\n")[1] == sent_again
                if b"LOGOUT" not in data:
                    assert client.ask("NETVER") == b"1.3\n"


@pytest.mark.parametrize("command", ["FSD ups", "SET VAR ups ups.mfr x", "INSTCMD ups load.off", "LOGIN ups", "PRIMARY ups", "NONSENSE"])
def test_what_acts_is_never_sent_twice(command, shim, pki):
    """A command that may have acted already is not sent again when a kept session dies: its client is closed."""
    for before in ("", "USERNAME u\nPASSWORD p\n"):
        with kept_and_dying(shim, pki, dies(closes_raw)) as (server, client_shim):
            with PlainClient(client_shim.port("client")) as client:
                client.send(before + command + "\n")
                assert client.recv_until_close() == b""
            assert [command.encode("ascii") in peer.received for peer in server.peers] == [True]


def test_a_reply_that_has_begun_is_never_repeated(shim, pki):
    """Once a byte of reply has gone to the client, an upstream that dies ends the client's session, too."""
    with kept_and_dying(shim, pki, dies(closes_raw, b"Network UPS")) as (server, client_shim):
        with PlainClient(client_shim.port("client")) as client:
            client.send("VER\n")
            assert client.recv_until_close() == b"Network UPS"
        assert len(server.peers) == 1


def test_a_fresh_session_that_dies_ends_its_client(shim, pki):
    """Only a kept session is replaced: a fresh one that dies without a reply closes its client, as upsd would."""
    with FalseServer(tls(pki.server, then=lambda peer: peer.recv())) as server:
        with PlainClient(shim(client_config(server.port, pki)).port("client")) as client:
            client.send("VER\n")
            assert client.recv_until_close() == b""
        assert len(server.peers) == 1


def test_a_dead_kept_session_with_no_upstream_left(shim, pki):
    """When a kept session is dead and its server gives no other, the client is closed and the log says why."""
    def gives_up(peer):
        if peer is peer.server.peers[0]:
            tls(pki.server, then=dies(closes_raw))(peer)
    with FalseServer(gives_up) as server:
        client_shim = shim(client_config(server.port, pki))
        with PlainClient(client_shim.port("client")) as client:
            assert client.ask("NETVER") == b"1.3\n"
            say_goodbye(client)
        mark = client_shim.mark()
        with PlainClient(client_shim.port("client")) as client:
            client.send("VER\n")
            assert client.recv_until_close() == b""
        client_shim.wait_log("closed: no upstream .*STARTTLS", start=mark)


# ---- reload -------------------------------------------------------------------------------------

def reloaded(shim, config=None):
    """Reload and wait for it."""
    mark = shim.mark()
    shim.reload(config)
    shim.wait_log("notice: reloaded ", start=mark)


def test_a_reload_drops_what_is_kept(shim, pki):
    """After a reload no session of before is passed on, neither the kept ones nor those in use."""
    with FalseServer(tls(pki.server)) as server:
        client_shim = shim(client_config(server.port, pki))
        port = client_shim.port("client")
        with PlainClient(port) as client:
            client.ask("VER")
            say_goodbye(client)
        with PlainClient(port) as client:
            assert client.ask("NETVER") == b"1.3\n" and len(server.peers) == 1
            reloaded(client_shim)
            assert client.ask("NETVER") == b"1.3\n", "a session in use goes on"
            say_goodbye(client)
        poll(lambda: server.peers[0].sock.fileno() < 0, 5, "the end of the session of before")
        assert counts(client_shim)[2] == 0
        with PlainClient(port) as client:
            assert client.ask("NETVER") == b"1.3\n" and len(server.peers) == 2
            say_goodbye(client)
        reloaded(client_shim)
        poll(lambda: server.peers[1].sock.fileno() < 0, 5, "the end of the kept session")
        assert counts(client_shim)[2] == 0


def test_a_reload_with_less_trust_counts_at_once(shim, pki):
    """A server that is no longer trusted is refused right after the reload, whatever was kept or could be resumed."""
    context = server_context(pki)
    seen = []
    with FalseServer(resuming(context, seen)) as server:
        client_shim = shim(client_config(server.port, pki, reuse=30))
        port = client_shim.port("client")
        for _ in range(2):
            with PlainClient(port) as client:
                assert client.ask("NETVER") == b"1.3\n"
                client.send("USERNAME u\n")         # of its own, so that the next one has to resume
                assert client.recv_line() == b"OK\n"
        with PlainClient(port) as client:
            assert client.ask("NETVER") == b"1.3\n"
            say_goodbye(client)
        assert seen == [False, True, True]
        mark = client_shim.mark()
        reloaded(client_shim, client_config(server.port, pki, reuse=30, trust=pki.other_ca.cert))
        with PlainClient(port) as client:
            client.send("NETVER\n")
            assert client.recv_until_close() == b""
        client_shim.wait_log("unknown CA", start=mark)


# ---- TLS resumption -----------------------------------------------------------------------------

def server_context(pki, maximum=ssl.TLSVersion.TLSv1_3):
    """A TLS server's context, with one ticket key for all its connections."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.server.file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = maximum
    return context


def resuming(context, seen):
    """A server shim's behaviour that notes for each TLS session whether it was resumed."""
    def behaviour(peer):
        peer.recv_line()
        peer.send(b"OK STARTTLS\n")
        peer.sock = context.wrap_socket(peer.sock, server_side=True)
        peer.server.sockets.append(peer.sock)
        seen.append(peer.sock.session_reused)
        peer.answer()
    return behaviour


@pytest.mark.parametrize("version", ["1.3", "1.2"])
def test_the_client_role_resumes(version, shim, pki):
    """The second fresh upstream session of a client shim resumes the TLS session of the first; after a reload
    the first does a full handshake again."""
    seen = []
    context = server_context(pki, {"1.3": ssl.TLSVersion.TLSv1_3, "1.2": ssl.TLSVersion.TLSv1_2}[version])
    with FalseServer(resuming(context, seen)) as server:
        client_shim = shim(client_config(server.port, pki, reuse=0, min_tls=version))
        for reload in (False, True):
            if reload:
                reloaded(client_shim)
            for _ in range(3):
                with PlainClient(client_shim.port("client")) as client:
                    assert client.ask("NETVER") == b"1.3\n"
                    say_goodbye(client)
        assert seen == [False, True, True] * 2


def test_the_client_role_does_not_resume_elsewhere(shim, pki):
    """A TLS session is resumed only with the server, by name, that it was made with."""
    seen, others = [], []
    context = server_context(pki)
    with FalseServer(resuming(context, seen)) as one, FalseServer(resuming(context, others)) as two:
        config = client_config(one.port, pki, reuse=0, upstream="127.0.0.1:%d" % one.port)
        config["other"] = dict(config["client"], upstream="localhost:%d" % two.port, listen="127.0.0.1:%d" % free_port())
        both = shim(config)
        for section in ("client", "other"):
            with PlainClient(both.port(section)) as client:
                assert client.ask("NETVER") == b"1.3\n"
                say_goodbye(client)
        assert (seen, others) == ([False], [False])


def resumed(port, context, session=None):
    """A TLS session with a server shim: (was it resumed, the ssl.SSLSession for the next one)."""
    with TlsClient(port, context=context, session=session) as client:
        assert client.ask("NETVER") == b"1.3\n"
        return client.sock.session_reused, client.sock.session


@pytest.mark.parametrize("version", ["1.3", "1.2"])
def test_the_server_role_resumes_until_a_reload(version, shim, pki, nut):
    """A client's TLS session can be resumed, but not after a reload, which gives new ticket keys."""
    server_shim = shim({"server": {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port,
                                   "certificate": pki.server.file, "min_tls": version}})
    port = server_shim.port("server")
    context = client_context(pki.ca.cert, maximum={"1.3": ssl.TLSVersion.TLSv1_3, "1.2": ssl.TLSVersion.TLSv1_2}[version])
    first, session = resumed(port, context)
    second, session = resumed(port, context, session)
    assert (first, second) == (False, True)
    reloaded(server_shim)
    third, fresh = resumed(port, context, session)
    assert not third, "a ticket of before the reload was accepted"
    assert resumed(port, context, fresh)[0]


def test_a_revoked_client_cannot_resume(shim, pki, nut):
    """A client certificate that a reload's revocation list has is refused, with a ticket of before as without."""
    config = {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port, "certificate": pki.server.file,
              "client_certificate": "require", "trust": pki.ca.cert}
    server_shim = shim({"server": config})
    port = server_shim.port("server")
    context = client_context(pki.ca.cert, pki.revoked_client)
    _, session = resumed(port, context)
    assert resumed(port, context, session)[0]
    mark = server_shim.mark()
    reloaded(server_shim, {"server": dict(config, crl=pki.crl)})
    for ticket in (session, None):
        with pytest.raises((OSError, AssertionError)):      # in TLS 1.3 the refusal comes with the first read
            resumed(port, context, ticket)
    server_shim.wait_log("revoked", start=mark)
