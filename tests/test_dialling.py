# SPDX-License-Identifier: GPL-2.0-or-later
"""How the client role dials its upstream: several addresses raced in order, the first that is up and verified wins.

Servers are wire.FalseServer's, since they have to be slow, deaf or wrong at a chosen step; a box that gives
no answer at all is a listening socket whose backlog is full (lines.blackhole).
"""

import contextlib
import errno
import os
import socket
import struct
import sys
import threading
import time

import pytest
import standin
from harness import IS_ROOT, FalseServer, Peer, PlainClient, closes, free_port, poll, tls, write
from lines import Path, blackhole, plug

LONG = 40           # a handshake_timeout that no test waits for
SOON = 8            # s; 10 x what a race takes, and far less than a share of LONG


def config(pki, upstreams, **options):
    """A client shim in front of upstreams, ports or HOST:PORT, without sharing: each client is a dial of its own."""
    targets = ["127.0.0.1:%d" % each if isinstance(each, int) else each for each in upstreams]
    return {"client": dict({"role": "client", "listen": "127.0.0.1:0", "upstream": targets, "trust": pki.ca.cert, "reuse": 0,
                            "handshake_timeout": LONG}, **options)}


def named(name):
    """A UPS description that tells which server has answered."""
    upsd = standin.StandIn(description=name)
    return lambda peer: answer(peer, upsd)


def answer(peer, upsd):
    """Speak NUT for upsd until the client ends it."""
    session = standin.Session(upsd)
    while not session.closed:
        data = peer.recv()
        if not data:
            return
        peer.send(session.feed(data))


def who(port, seconds=SOON):
    """Which server answers a client of the shim now; "" if it gets the end."""
    with PlainClient(port) as client:
        client.send("GET UPSDESC ups\nLOGOUT\n")
        reply = client.recv_until_close(seconds)
        return reply.decode("ascii").split('"')[1] if reply else ""


@pytest.fixture
def server(pki):
    """server(name, …) starts a FalseServer that answers as that name; behaviour: in place of TLS and NUT."""
    with contextlib.ExitStack() as stack:
        def start(name, behaviour=None, certificate=None, host="127.0.0.1", port=0):
            behaviour = behaviour or tls(certificate or pki.server, then=named(name))
            return stack.enter_context(ServerAt(behaviour, host, port))
        yield start


class ServerAt(FalseServer):
    """A FalseServer on a port of one's choice."""

    def __init__(self, behaviour, host="127.0.0.1", port=0):
        super().__init__(behaviour, host)
        if port:
            self._listener.close()
            self._listener = socket.socket()
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((host, port))
            self._listener.listen(128)
            self.port = port
        self._ended = False

    def stop(self):
        """End it before its time."""
        if not self._ended:
            self._ended = True
            super().__exit__()

    def __exit__(self, *_):
        self.stop()


def deaf(peer):
    """Take connections and never say a word."""
    peer.sock.settimeout(LONG)
    Peer.hang(peer)


def after(seconds, behaviour):
    """The same, so many seconds later."""
    def late(peer):
        time.sleep(seconds)
        behaviour(peer)
    return late


def test_a_silent_first_upstream_costs_its_half_second_once(shim, pki, server):
    """Where the first upstream gives no answer, it counts as failed once the second has won: those who dial in the next
    30 s do not wait for it."""
    two = server("two")
    with blackhole() as silent:
        port = shim(config(pki, [silent, two.port])).port("client")
        times = []
        for _ in range(4):
            since = time.monotonic()
            assert who(port) == "two"
            times.append(time.monotonic() - since)
        assert min(times[1:]) < 0.4, times          # less than the half second for which the next one waits


def test_hundreds_of_addresses_that_fail_at_once(shim, pki):
    """However many addresses refuse at once, a resolver's worst answer say, the client gets the end at once."""
    port = free_port()
    upstreams = ["127.%d.1.%d:%d" % (number // 200 + 1, number % 200 + 1, port) for number in range(600)]
    one = shim(config(pki, upstreams, reuse=30))
    for command in ("VER\n", "USERNAME x\n"):
        with PlainClient(one.port("client")) as client:
            client.send(command)
            assert client.recv_until_close(SOON) == b""


def test_the_first_upstream_is_used_while_it_works(shim, pki, server):
    """With both upstreams up the first is used, time and again, and the second is not even dialled."""
    one, two = server("one"), server("two")
    port = shim(config(pki, [one.port, two.port])).port("client")
    assert [who(port) for _ in range(3)] == ["one"] * 3
    assert not two.peers


def test_a_dead_first_upstream_costs_next_to_nothing(shim, pki, server):
    """Where the first upstream refuses, or gives no answer at all, the second answers soon, for the shared session too."""
    two = server("two")
    with blackhole() as silent:
        for first in (free_port(), silent):
            for reuse in (0, 30):
                port = shim(config(pki, [first, two.port], reuse=reuse)).port("client")
                assert [who(port) for _ in range(2)] == ["two"] * 2


@pytest.mark.parametrize("what", ["deaf", "closes", "no TLS", "unknown CA", "wrong name"])
def test_an_upstream_that_is_not_verified_does_not_win(what, shim, pki, server):
    """An upstream that connects at once, but does not come to a verified TLS session, gives way to the next."""
    first = {
        "deaf": lambda: server("one", deaf),
        "closes": lambda: server("one", lambda peer: None),
        "no TLS": lambda: server("one", lambda peer: peer.answer()),
        "unknown CA": lambda: server("one", certificate=pki.unknown_ca),
        "wrong name": lambda: server("one", certificate=pki.wrong_name),
    }[what]()
    two = server("two")
    client_shim = shim(config(pki, [first.port, two.port]))
    assert who(client_shim.port("client")) == "two"
    assert first.peers and not any(b"UPSDESC" in peer.received for peer in first.peers)


def test_the_losers_of_a_race_are_closed(shim, pki, server):
    """A slow first upstream is not given up when the second is dialled, and is closed once that one has won."""
    one = server("one", deaf)
    two = server("two", after(0.5, tls(pki.server, then=named("two"))))
    port = shim(config(pki, [one.port, two.port])).port("client")
    with PlainClient(port) as client:
        client.send("GET UPSDESC ups\n")
        poll(lambda: two.peers, SOON, "the second upstream dialled")
        assert one.peers[0].sock.fileno() >= 0, "the first was given up too early"
        assert client.recv_line(SOON) == b'UPSDESC ups "two"\n'
        poll(lambda: one.peers[0].sock.fileno() < 0, 5, "the end of the first")
        assert client.ask("GET UPSDESC ups") == b'UPSDESC ups "two"\n'


def test_a_slow_line_is_given_the_whole_time(shim, pki, server):
    """Two upstreams behind a slow line: each has the whole handshake_timeout, not a share of it."""
    one, two = server("one"), server("two")
    # Two round trips of 1.3 s, to which the test machine may add; half of the time would be too little.
    with Path(one.port, delay=0.65) as first, Path(two.port, delay=0.65) as second:
        port = shim(config(pki, [first.port, second.port], handshake_timeout=5)).port("client")
        assert who(port, 20) in ("one", "two")


def test_no_upstream_is_told_in_time(shim, pki):
    """With no upstream that answers, a client gets the end after handshake_timeout, and the log names each address and
    how far it got."""
    with blackhole() as silent:
        refuses = free_port()
        client_shim = shim(config(pki, [silent, refuses], handshake_timeout=1))
        since = time.monotonic()
        assert who(client_shim.port("client"), 20) == ""
        assert time.monotonic() - since > 0.8
        client_shim.wait_log("127.0.0.1:%d.*refused|127.0.0.1.*%d.*refused" % (refuses, refuses))
        client_shim.wait_log("127.0.0.1(:| port )%d" % silent)


def test_what_failed_lately_is_tried_last(shim, pki, server):
    """An upstream that has just failed comes behind those that have not, even when it is back, and is used again when
    these fail."""
    first, two = free_port(), server("two")
    port = shim(config(pki, [first, two.port])).port("client")
    assert who(port) == "two"
    one = server("one", port=first)
    assert who(port) == "two" and not one.peers
    two.behaviour = lambda peer: None
    assert who(port) == "one"


@pytest.mark.parametrize("how", ["alert", "end", "reset"])
@pytest.mark.parametrize("reuse", [0, 30])
def test_a_ticket_that_is_refused_is_not_offered_again(reuse, how, shim, pki, server):
    """A server that does not take a TLS ticket is dialled again without one, in the same opening, and is offered none any
    more: no client notices. upsd sends a fatal alert."""
    offers = []

    def refuses_tickets(peer):
        peer.recv_line()
        peer.send(b"OK STARTTLS\n")
        hello = b""
        while len(hello) < 5 or len(hello) < 5 + struct.unpack(">H", hello[3:5])[0]:
            time.sleep(0.001)
            hello = peer.sock.recv(65536, socket.MSG_PEEK)
            if not hello:
                return
        offers.append(offers_ticket(hello))
        if offers[-1]:
            peer.sock.recv(65536)
            if how == "alert":
                peer.send(b"\x15\x03\x03\x00\x02\x02\x50")  # fatal, internal_error
            elif how == "reset":
                peer.reset()
            return
        peer.start_tls(pki.server)
        named("one")(peer)
    one = server("one", refuses_tickets)
    port = shim(config(pki, [one.port], reuse=reuse)).port("client")
    for _ in range(4):
        with PlainClient(port) as client:           # with reuse, USERNAME makes it dial
            client.send("USERNAME u\nGET UPSDESC ups\n")
            assert client.recv_lines(2) == [b"OK\n", b'UPSDESC ups "one"\n']
    assert offers.count(True) == 1 and offers.count(False) == 4, offers


def offers_ticket(hello):
    """True if a ClientHello record has the extension pre_shared_key (RFC 8446 4.2.11)."""
    at = 5 + 4 + 2 + 32
    at += 1 + hello[at]                             # legacy_session_id
    at += 2 + struct.unpack(">H", hello[at:at + 2])[0]      # cipher_suites
    at += 1 + hello[at]                             # legacy_compression_methods
    end = at + 2 + struct.unpack(">H", hello[at:at + 2])[0]
    at += 2
    while at < end:
        kind, size = struct.unpack(">HH", hello[at:at + 4])
        if kind == 41:
            return True
        at += 4 + size
    return False


# A program that takes away a family of addresses, as a kernel without it does, and becomes Python: seccomp makes socket()
# fail. The numbers are those of socket() and of the architecture as in linux/audit.h.
WITHOUT_IPV6 = """#!{python}
import ctypes, os, platform, struct, sys
number, arch = {{"x86_64": (41, 0xc000003e), "aarch64": (198, 0xc00000b7)}}[platform.machine()]
code = [(0x20, 0, 0, 4), (0x15, 0, 5, arch), (0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, {family}),
        (0x06, 0, 0, 0x00050000 | {error}), (0x06, 0, 0, 0x7fff0000)]
program = b"".join(struct.pack("HBBI", *each) for each in code)
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(program)
filter = ctypes.create_string_buffer(struct.pack("HL", len(code), ctypes.addressof(buffer)))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter, 0, 0):
    sys.exit("no seccomp: " + os.strerror(ctypes.get_errno()))
os.execv(sys.executable, [sys.executable] + sys.argv[1:])
"""


def test_a_kernel_without_ipv6_has_ipv4_all_the_same(shim, pki, server, tmp_path):
    """Where socket() knows no IPv6, an IPv6 address is that address's failure: the next one is used, and nothing is said
    of descriptors or memory."""
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("no system call number for this machine")
    launcher = write(str(tmp_path / "without-ipv6"), WITHOUT_IPV6.format(
        python=sys.executable, family=int(socket.AF_INET6), error=errno.EAFNOSUPPORT), 0o700)
    two = server("two")
    client_shim = shim(config(pki, ["[::1]:%d" % two.port, two.port]), python=launcher)
    assert [who(client_shim.port("client")) for _ in range(2)] == ["two"] * 2
    assert "descriptor" not in client_shim.log


# ---- names --------------------------------------------------------------------------------------

@pytest.fixture
def hosts(tmp_path, need):
    """A name service of one's own for a shim: hosts(line, …) sets what /etc/hosts has there; hosts.python starts it so."""
    if not IS_ROOT:
        pytest.skip("needs root for a mount namespace")
    need("unshare", "mount")
    path = tmp_path / "hosts"
    launcher = '#!/bin/sh\nmount --bind %s /etc/hosts && exec %s "$@"\n' % (path, sys.executable)
    inner = write(str(tmp_path / "inner"), launcher, 0o700)

    def put(*lines):
        with open(str(path), "w", encoding="ascii") as file:        # in place: the mount is of this very file
            file.write("127.0.0.1 localhost\n" + "".join(line + "\n" for line in lines))
    put()
    put.python = write(str(tmp_path / "launcher"), '#!/bin/sh\nexec unshare -m %s "$@"\n' % inner, 0o700)
    return put


class Resolver(threading.Thread):
    """A DNS server (RFC 1035) on a loopback address: any name has the address `answer`, told after `seconds`."""

    def __init__(self, answer):
        super().__init__(daemon=True)
        self.answer, self.seconds = answer, 0
        self._sock = socket.socket(type=socket.SOCK_DGRAM)
        self.address = "127.53.%d.%d" % divmod(os.getpid() % 65536, 256)
        self._sock.bind((self.address, 53))

    def run(self):
        while True:
            query, client = self._sock.recvfrom(512)
            if not query:
                return
            time.sleep(self.seconds)
            end = query.index(b"\0", 12) + 5
            kind = struct.unpack(">H", query[end - 4:end - 2])[0]
            records = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + socket.inet_aton(self.answer) if kind == 1 else b""
            head = query[:2] + struct.pack(">HHHHH", 0x8180, 1, bool(records), 0, 0)
            self._sock.sendto(head + query[12:end] + records, client)

    def stop(self):
        """End it."""
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", (self.address, 53))
        self.join(20)
        self._sock.close()


@pytest.fixture
def resolver(tmp_path, need):
    """A Resolver; resolver.python starts a shim that asks it."""
    if not IS_ROOT:
        pytest.skip("needs root for a mount namespace and port 53")
    need("unshare", "mount")
    made = Resolver("127.0.0.2")
    conf = write(str(tmp_path / "resolv.conf"), "nameserver %s\noptions timeout:20 attempts:1\n" % made.address, 0o644)
    inner = write(str(tmp_path / "inner"), '#!/bin/sh\nmount --bind %s /etc/resolv.conf && exec %s "$@"\n' % (
        conf, sys.executable), 0o700)
    made.python = write(str(tmp_path / "launcher"), '#!/bin/sh\nexec unshare -m %s "$@"\n' % inner, 0o700)
    made.start()
    yield made
    made.stop()


def test_a_name_that_moves_while_the_resolver_is_slow(shim, pki, server, resolver):
    """A dial does not wait for a look-up while it has addresses, and takes new ones in when they come, though the old one
    gives no answer."""
    one = server("one", host="127.0.0.2")
    server("two", host="127.0.0.3", port=one.port)
    options = config(pki, ["ups.example:%d" % one.port], server_name="localhost")
    port = shim(options, python=resolver.python).port("client")
    assert who(port) == "one"
    one.behaviour = closes
    assert who(port) == ""                          # from now on its name is looked up at each dial
    one.behaviour = deaf
    resolver.answer, resolver.seconds = "127.0.0.3", 0.7    # for each of the two questions, one after the other
    assert who(port) == "two"


@pytest.mark.parametrize("old", ["refuses", "is silent"])
def test_a_name_that_moves(old, shim, pki, server, hosts):
    """When a name goes over to another address, at most one client gets the end, whether the old address refuses or gives
    no answer any more."""
    one = server("one", host="127.0.0.2")
    server("two", host="127.0.0.3", port=one.port)
    hosts("127.0.0.2 ups.example")
    options = config(pki, ["ups.example:%d" % one.port], server_name="localhost", handshake_timeout=2)
    port = shim(options, python=hosts.python).port("client")
    assert [who(port) for _ in range(2)] == ["one"] * 2
    if old == "refuses":
        one.stop()
    else:
        one.behaviour = deaf
    hosts("127.0.0.3 ups.example")
    answers = [who(port) for _ in range(3)]
    assert answers[0] in ("", "two") and answers[1:] == ["two"] * 2, answers


def test_all_addresses_of_a_name_are_raced(shim, pki, server, hosts):
    """Of a name's addresses the one that answers is used, soon, though another comes first and is dead."""
    two = server("two", host="127.0.0.3")
    with socket.socket() as silent:
        silent.bind(("127.0.0.2", two.port))
        silent.listen(0)
        with contextlib.ExitStack() as stack:
            for sock in plug(silent):
                stack.enter_context(sock)
            hosts("127.0.0.2 ups.example", "127.0.0.3 ups.example")
            options = config(pki, ["ups.example:%d" % two.port], server_name="localhost")
            port = shim(options, python=hosts.python).port("client")
            assert [who(port) for _ in range(3)] == ["two"] * 3
