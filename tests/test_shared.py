# SPDX-License-Identifier: GPL-2.0-or-later
"""The shared upstream session of the client role: many local clients' questions over one session, and still
each client has a conversation of its own, with its own replies, and nobody else's login.

Against the real upsd where it can be made to do the thing. Upstreams that answer oddly, fall silent or
die at a chosen moment are wire.FalseServer's; lines that break are lines.Path's. Random conversations
are in differential_sessions.py, whose long run has its own command.
"""

import contextlib
import re
import signal
import socket
import ssl
import statistics
import threading
import time

import pytest
import standin
from differential_sessions import PAST, Trial
from harness import (FalseServer, Nut, PlainClient, Shim, TlsClient, client_context, free_port, many_variables,
                     pair_config, patched, poll, tls, write)
from lines import Path

QUICK = 0.9         # s; less than the second of silence that is the least PATIENCE of design, 100 x an exchange


def client_config(port, pki, **options):
    """A client shim in front of a server on a port."""
    section = {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % port, "trust": pki.ca.cert}
    return {"client": dict(section, **options)}


def say_goodbye(client):
    """LOGOUT, and see the end of the connection."""
    client.send("LOGOUT\n")
    assert client.recv_until_close() == b"OK Goodbye\n"


def tagged(name):
    """A question that carries a name, and its reply."""
    return "GET CMDDESC ups " + name, b'CMDDESC ups %s "Description unavailable"\n' % name.encode("ascii")


def answers(client, *names):
    """Ask a tagged question for each name, one after the other, and check the replies."""
    for name in names:
        question, reply = tagged(name)
        assert client.ask(question) == reply


def heard(peer):
    """What a server has heard of a connection inside TLS."""
    return peer.received.partition(b"STARTTLS\n")[2]


def answering(change=lambda peer, line, reply: reply):
    """A behaviour inside TLS: NUT, with each reply as change() makes it; peer.sizes: what each read brought."""
    def behaviour(peer):
        session, peer.sizes = standin.Session(peer.server.upsd), []
        while not session.closed:
            data = peer.recv()
            if not data:
                return
            peer.sizes.append(len(data))            # at most a TLS record
            for line in data.splitlines(True):
                peer.send(change(peer, line, session.feed(line)))
    return behaviour


@contextlib.contextmanager
def frozen(process):
    """A process that does nothing meanwhile, and finds all at once what has come."""
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


@pytest.fixture
def upstream(pki):
    """upstream(behaviour inside TLS) starts a FalseServer that takes STARTTLS and a handshake."""
    with contextlib.ExitStack() as stack:
        yield lambda then=answering(): stack.enter_context(FalseServer(tls(pki.server, then=then)))


@pytest.fixture
def clients():
    """clients(port, …) connects PlainClients, one for each port, and closes them."""
    with contextlib.ExitStack() as stack:
        yield lambda *ports: [stack.enter_context(PlainClient(port)) for port in ports]


RETIRED = """
ask = nutshim.Shared.ask
def ask_and_reload(self, *question):
    ask(self, *question)
    self.retire()
nutshim.Shared.ask = ask_and_reload
"""


def test_a_question_that_comes_together_with_a_reload_is_answered(shim, nut, pki, tmp_path):
    """What is asked in the very round of a reload, before there is a shared session, is answered. (The round is played.)"""
    one = shim(pair_config(nut.port, pki), script=patched(str(tmp_path), RETIRED))
    with PlainClient(one.port("client")) as client:
        for _ in range(3):
            assert client.ask("NETVER") == b"1.3\n"
    one.wait_log("given up: the configuration was read again")


# ---- random conversations -----------------------------------------------------------------------

@pytest.mark.usefixtures("nut_installed")
def test_random_conversations_are_as_with_a_direct_connection(pki):
    """However they are torn, and whatever breaks, 30 clients at once get through a shared session what a direct
    connection gives them, each its own, and no login is ever heard on a connection of several clients."""
    with Trial(pki) as trial:
        trial.quiet(150)
        trial.quiet(20, "cut")
        trial.broken(90, ("cut", "reset"), 10, past=PAST)
        trial.broken(40, ("cut", "reset"), 20)
        trial.broken(40, ("forget",), 1, "questions", past=PAST)


# ---- what is shared, and what never --------------------------------------------------------------

def test_all_clients_ask_over_one_upstream_session(shim, pki, upstream, clients):
    """However many clients ask questions, at once or one after another, upstream has one session."""
    server = upstream()
    port = shim(client_config(server.port, pki)).port("client")
    here = clients(*[port] * 30)
    for number, client in enumerate(here):
        client.send(tagged("at-once-%d" % number)[0] + "\nVER\n")
    for number, client in enumerate(here):
        assert client.recv_lines(2) == [tagged("at-once-%d" % number)[1], standin.VERSION.encode("ascii") + b"\n"]
    for number in range(10):
        with PlainClient(port) as client:
            answers(client, "later-%d" % number)
            say_goodbye(client)
    assert len(server.peers) == 1 and b"LOGOUT" not in server.peers[0].received


QUESTIONS = [
    "GET VAR ups ups.status", "GET TYPE ups ups.status", "GET DESC ups ups.status", "GET CMDDESC ups load.off",
    "GET UPSDESC ups", "GET NUMLOGINS ups", "LIST UPS", "LIST VAR ups", "LIST RW ups", "LIST CMD ups", "LIST CLIENT ups",
    "LIST ENUM ups ups.mfr", "LIST RANGE ups ups.mfr", "VER", "NETVER", "PROTVER", "HELP", "list var ups", "GET VAR none x",
    "GET VAR ups none",
]


def test_questions_are_shared(shim, pki, upstream, clients):
    """Every form of GET and LIST whose reply repeats it, and VER, NETVER, PROTVER, HELP, go over the shared session."""
    server = upstream()
    port = shim(client_config(server.port, pki)).port("client")
    one, two = clients(port, port)
    direct = standin.Session(standin.StandIn())
    for question in QUESTIONS:
        reply = direct.feed(question.encode("ascii") + b"\n")
        for client in (one, two):
            client.send(question + "\n")
            assert client.recv_exactly(len(reply)) == reply
    assert len(server.peers) == 1


OTHERS = [
    "USERNAME u", "PASSWORD p", "LOGIN ups", "ATTACH ups", "PRIMARY ups", "FSD ups", "SET TRACKING ON", "SET VAR ups ups.mfr x",
    "INSTCMD ups load.off", "NONSENSE", "", "# x", "GET TRACKING", "GET", "GET VAR", "GET VAR ups", "LIST", "LIST VAR",
    "LIST NONSENSE ups", "GET VAR ups ups.status more", "LIST VAR ups more", "VER more", 'GET VAR ups "ups.status"',
    "GET VAR ups ups\\.status", "GET VAR=ups ups.status", "GET VAR ups ups.status # x", "GET VAR ups ups.st\x01atus",
    b"GET VAR ups ups.st\xe4tus", 'GET VAR "a\nb"', "DETACH",
]


def test_what_is_no_question_goes_over_an_own_session(shim, pki, upstream, clients):
    """A command with a trace, an unknown one, GET TRACKING, and whatever has something odd in it are never heard on
    the shared session: its client gets one of its own, for good, on which nobody else is heard."""
    server = upstream()
    port = shim(client_config(server.port, pki)).port("client")
    everybody, = clients(port)
    for number, command in enumerate(OTHERS):
        command = command.encode("latin-1") if isinstance(command, str) else command
        data = b"%s\n%s\n" % (command, tagged("after")[0].encode("ascii"))
        expected = standin.Session(standin.StandIn()).feed(data)
        with PlainClient(port) as client:
            answers(client, "before", "before")
            client.send(data)
            assert client.recv_exactly(len(expected)) == expected, command
            answers(everybody, "meanwhile")
            assert [heard(peer) for peer in server.peers[number + 1:]] == [data]
    assert b"after" not in heard(server.peers[0]) and set(re.findall(rb"ups (\w+)\n", heard(server.peers[0]))) == {
        b"before", b"meanwhile"}


def test_questions_before_a_login_are_answered_first(shim, pki, upstream, clients):
    """Questions pipelined before and behind USERNAME are answered in their order, and USERNAME is heard once they are."""
    lines = ["GET VAR ups ups.status", "LIST VAR ups", "STARTTLS", "GET DESC ups ups.status", "USERNAME primary", "LIST RW ups",
             "PASSWORD primarypass", "STARTTLS", "LOGIN ups", "GET UPSDESC ups", "GET TRACKING", "LOGOUT"]
    data = "".join(line + "\n" for line in lines).encode("ascii")
    expected = standin.Session(standin.StandIn()).feed(data)
    server = upstream()
    client_shim = shim(client_config(server.port, pki))
    for pieces in ([data], [data[at:at + 7] for at in range(0, len(data), 7)]):
        client, = clients(client_shim.port("client"))
        for piece in pieces:
            client.send(piece)
        assert client.recv_until_close() == expected
    assert not any(word in heard(server.peers[0]) for word in (b"USERNAME", b"PASSWORD", b"LOGIN ", b"TRACKING"))
    assert all(heard(peer).startswith(b"USERNAME") for peer in server.peers[1:]) and len(server.peers) == 3


@pytest.mark.parametrize("odd", ['GET VAR "a\nb"', "GE\\\nT VAR ups b", "GET VAR ups b # x", ""])
def test_starttls_keeps_its_place(odd, shim, pki, upstream, clients):
    """STARTTLS is answered in its turn, behind the replies still owed, whatever comes behind it in the same read."""
    lines = ["GET VAR ups ups.status", "USERNAME u", "STARTTLS", "LIST VAR ups", "STARTTLS", odd]
    data = "".join(line + "\n" for line in lines).encode("ascii")
    expected = standin.Session(standin.StandIn()).feed(data)
    server = upstream()
    client, = clients(shim(client_config(server.port, pki)).port("client"))
    client.send(data)
    assert client.recv_exactly(len(expected)) == expected


def test_a_client_without_a_question_costs_upstream_nothing(shim, pki, upstream, clients):
    """Upstream hears of a client with its first command: not when it connects, nor of its LOGOUT or STARTTLS."""
    for reuse in (30, 0):
        server = upstream()
        port = shim(client_config(server.port, pki, reuse=reuse)).port("client")
        idle, short, other = clients(port, port, port)
        assert other.ask("STARTTLS") == b"ERR FEATURE-NOT-CONFIGURED\n"
        say_goodbye(short)
        assert not server.peers
        answers(other, "x")
        assert len(server.peers) == 1
        say_goodbye(idle)
        assert len(server.peers) == 1


def test_without_reuse_each_client_has_its_own_session(shim, pki, upstream, clients):
    """reuse = 0: no upstream session hears two clients; each begins with its client's first command and ends with it."""
    server = upstream()
    port = shim(client_config(server.port, pki, reuse=0)).port("client")
    for number, client in enumerate(clients(port, port, port)):
        answers(client, "client-%d" % number, "client-%d" % number)
        assert [heard(peer).count(b"client-%d" % number) for peer in server.peers] == [0] * number + [2]
        if number == 1:
            say_goodbye(client)
            poll(lambda: server.peers[1].sock.fileno() < 0, 5, "the end of its upstream session")


def test_an_unused_shared_session_ends(shim, pki, upstream):
    """reuse = 1: the shared session is kept for a second after its last client has gone, then ended."""
    server = upstream()
    port = shim(client_config(server.port, pki, reuse=1)).port("client")
    for number in range(2):
        with PlainClient(port) as client:
            answers(client, "x")
        assert len(server.peers) == 1, "it is used again"
        assert number or server.peers[0].sock.fileno() >= 0
    poll(lambda: server.peers[0].sock.fileno() < 0, 10, "its end at the server")


@pytest.mark.parametrize("leave", ["close", "reset", "logout"])
def test_replies_to_a_client_that_has_left_go_to_nobody(leave, shim, pki, upstream, clients):
    """A client that leaves before its reply is there costs nobody anything: the reply is dropped, others get theirs."""
    late, asked = threading.Event(), threading.Event()

    def hold(_peer, line, reply):
        if b"secret" in line:
            asked.set()
            late.wait(10)
        return reply
    server = upstream(answering(hold))
    port = shim(client_config(server.port, pki)).port("client")
    first, second = clients(port, port)
    answers(second, "before")
    first.send("GET CMDDESC ups secret\n" + "LOGOUT\n" * (leave == "logout"))
    asked.wait(5)
    if leave == "reset":
        first.reset()
    elif leave == "close":
        first.close()
    second.send("NETVER\n" + tagged("mine")[0] + "\n")
    late.set()
    assert second.recv_lines(2) == [b"1.3\n", tagged("mine")[1]]
    if leave == "logout":
        assert first.recv_until_close() == tagged("secret")[1] + b"OK Goodbye\n"
    assert len(server.peers) == 1


# ---- records towards upstream -------------------------------------------------------------------

def test_records_towards_upstream_are_small(shim, pki, upstream, clients):
    """No TLS record towards upstream holds more than 512 bytes of commands, however many are pipelined, shared or
    own, since upsd's own TLS takes no more of one."""
    server = upstream()
    client_shim = shim(client_config(server.port, pki))
    port = client_shim.port("client")
    many = clients(*[port] * 30)
    answers(many[0], "before")
    with frozen(client_shim):                       # so that it finds all these questions in one round
        for number, client in enumerate(many):
            client.send((tagged("client-%04d" % number)[0] + "\n") * 5)
    for number, client in enumerate(many):
        assert client.recv_lines(5) == [tagged("client-%04d" % number)[1]] * 5
    shared, own = clients(port, port)
    names = ["name-%04d" % number for number in range(300)]
    for client, first in ((shared, ""), (own, "USERNAME u\n")):
        client.send(first + "".join(tagged(name)[0] + "\n" for name in names))
        assert client.recv_line() == b"OK\n" if first else True
        assert client.recv_lines(len(names)) == [tagged(name)[1] for name in names]
    assert len(server.peers) == 2
    for peer in server.peers:
        assert sum(peer.sizes) > 7000 and max(peer.sizes) <= 512, sorted(peer.sizes)[-3:]


@pytest.mark.usefixtures("nut_installed")
def test_pipelined_questions_to_upsds_own_tls(shim, pki, need):
    """100 questions in one write are all answered by a upsd that speaks TLS itself, and so are 30 clients at once."""
    need("certutil", "pk12util")
    with Nut(nss=pki.nss_database("shared-nss", pki.server)) as nut:
        client_shim = shim(client_config(nut.port, pki, upstream="localhost:%d" % nut.port))
        port = client_shim.port("client")
        with contextlib.ExitStack() as stack:
            one = stack.enter_context(PlainClient(port))
            one.send("GET VAR ups battery.charge\n" * 100)
            assert set(one.recv_lines(100)) == {b'VAR ups battery.charge "100"\n'}
            many = [stack.enter_context(PlainClient(port)) for _ in range(30)]
            with frozen(client_shim):
                for client in many:
                    client.send("GET VAR ups battery.runtime\nLIST UPS\n")
            for client in many:
                assert client.recv_lines(4)[0] == b'VAR ups battery.runtime "1800"\n'


# ---- odd upstreams ------------------------------------------------------------------------------

LIST = b"BEGIN LIST VAR ups\n%sEND LIST VAR ups\n"
# name: (the question that is answered oddly, how)
ODDITIES = {
    "a second line": (tagged("odd")[0], lambda reply: reply + b"OK\n"),
    "a second line of VER": ("VER", lambda reply: reply + b"more of it\n"),
    "no newline": (tagged("odd")[0], lambda reply: reply[:-1]),
    "no newline but CR": (tagged("odd")[0], lambda reply: reply[:-1] + b"\r"),
    "512 bytes and no newline": (tagged("odd")[0], lambda reply: (reply[:-2] + b"x" * 512)[:512]),
    "a LIST whose line is cut": ("LIST VAR ups", lambda reply: LIST % (b'VAR ups a "' + b"x" * 501)),
    "END LIST inside": ("LIST VAR ups", lambda reply: LIST % LIST[19:].replace(b"%s", b"") + reply[19:]),
    "END of another LIST": ("LIST VAR ups", lambda reply: reply.replace(b"END LIST VAR", b"END LIST RW")),
    "a line of another LIST": ("LIST VAR ups", lambda reply: reply.replace(b"\nVAR ups", b"\nVAR other", 1)),
    "another's reply": (tagged("odd")[0], lambda reply: b'CMDDESC ups foreign "x"\n'),
    "a reply of another form": (tagged("odd")[0], lambda reply: b"OK\n"),
    "a list for a line": (tagged("odd")[0], lambda reply: LIST % b""),
    "a line for a list": ("LIST VAR ups", lambda reply: b'VAR ups ups.status "OL"\n'),
    "a NUL in front": (tagged("odd")[0], lambda reply: b"\0" + reply),
    "a NUL inside": (tagged("odd")[0], lambda reply: reply.replace(b"odd", b"o\0d")),
    "an empty line": (tagged("odd")[0], lambda reply: b"\n" + reply),
}


@pytest.fixture(scope="module")
def odd_ground(pki):
    """A client shim with a section for each oddity, in front of a server that has it: (shim, {name: server})."""
    with contextlib.ExitStack() as stack:
        servers, config = {}, {}
        for number, (name, (question, how)) in enumerate(sorted(ODDITIES.items())):
            line = question.encode("ascii") + b"\n"
            then = answering(lambda peer, said, reply, line=line, how=how: how(reply) if said == line else reply)
            servers[name] = stack.enter_context(FalseServer(tls(pki.server, then=then)))
            config["odd-%d" % number] = client_config(servers[name].port, pki)["client"]
        yield stack.enter_context(Shim(config)), servers


def whole_or_end(client, expected, seconds=12):
    """What a client gets: its replies, or the beginning of them and the end of its connection."""
    got, deadline = b"", time.monotonic() + seconds
    while len(got) < len(expected):
        client.sock.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            data = client.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        except socket.timeout:
            raise AssertionError("neither its replies nor the end, but %r" % got[-300:]) from None
        if not data:
            break
        got += data
    assert expected.startswith(got), "got %r, expected %r" % (got[-300:], expected[-300:])
    return got == expected


@pytest.mark.parametrize("name", sorted(ODDITIES))
def test_an_upstream_that_answers_oddly_is_not_shared(name, odd_ground, clients):
    """An odd reply costs no other client more than its connection, and none a byte of another's; the log says why, and
    from then on this upstream is not shared: each client has a session of its own."""
    client_shim, servers = odd_ground
    section, server = "odd-%d" % sorted(ODDITIES).index(name), servers[name]
    question, how = ODDITIES[name]
    port = client_shim.port(section)
    odd, *others = clients(*[port] * 6)
    for number, client in enumerate([odd] + others):
        answers(client, "warm-%d" % number)
    assert len(server.peers) == 1
    mark = client_shim.mark()
    asked = [[tagged("client-%d-%d" % (number, turn)) for turn in range(5)] for number in range(len(others))]
    for number, client in enumerate(others):
        client.send("".join(question + "\n" for question, _ in asked[number]))
        if number == 2:
            odd.send(question + "\n")
    for client, questions in zip(others, asked):
        whole_or_end(client, b"".join(reply for _, reply in questions))
    right = standin.Session(server.upsd).feed(question.encode("ascii") + b"\n")
    odd.sock.settimeout(1)
    got = b""
    with contextlib.suppress(socket.timeout, ConnectionResetError):
        while len(got) < min(len(right), len(how(right))):
            data = odd.sock.recv(65536)
            if not data:
                break
            got += data
    # Its reply, or what upsd gives it over a session of its own.
    assert right.startswith(got) or how(right).startswith(got), "the odd one got %r" % got
    client_shim.wait_log(r"%s\b.*\bshared\b" % section, 5, mark)
    known = len(server.peers)
    new = clients(port, port)
    for number, client in enumerate(new):
        answers(client, "new-%d" % number, "new-%d" % number)
    assert [re.findall(rb"new-(\d)", heard(peer)) for peer in server.peers[known:]] == [[b"0", b"0"], [b"1", b"1"]]


def test_a_line_that_nobody_asked_for_goes_to_nobody(shim, pki, upstream, clients):
    """A late line on an idle shared session ends it; no client ever gets it, and this upstream is not shared any more."""
    speak = threading.Event()

    def late(peer):
        if peer is peer.server.peers[0]:
            peer.send(standin.Session(peer.server.upsd).feed(peer.recv()))
            speak.wait(10)
            peer.send(b'VAR ups ups.status "OB LB"\n')
        answering()(peer)
    server = upstream(late)
    client_shim = shim(client_config(server.port, pki))
    port = client_shim.port("client")
    one, two = clients(port, port)
    answers(one, "x")
    mark = client_shim.mark()
    speak.set()
    client_shim.wait_log(r"client\b.*\bshared\b", 5, mark)
    poll(lambda: server.peers[0].sock.fileno() < 0, 5, "its end at the server")
    for number, client in enumerate((one, two)):
        assert client.ask("GET VAR ups ups.status") == b'VAR ups ups.status "OL"\n'
        answers(client, "client-%d" % number)
    assert [heard(peer).count(b"client-") for peer in server.peers] == [0, 1, 1]


# ---- silence and death --------------------------------------------------------------------------

def test_a_shared_session_that_died_without_a_word_is_replaced(shim, pki, upstream, clients):
    """An idle shared session whose line has forgotten it costs the first who asks about a second, and nobody after."""
    server = upstream()
    with Path(server.port) as path:
        client_shim = shim(client_config(path.port, pki))
        port = client_shim.port("client")
        here = clients(*[port] * 4)
        for client in here:
            answers(client, "before")
        path.forget()
        since = time.monotonic()
        answers(here[0], "first")
        first = time.monotonic() - since
        assert first < 5, first
        since = time.monotonic()
        for client in here[1:] + clients(port):
            answers(client, "after")
        assert time.monotonic() - since < QUICK
        assert len(server.peers) == 2


@pytest.mark.parametrize("how", ["closes TLS", "closes TCP", "resets"])
def test_a_shared_session_that_ends_is_replaced_unseen(how, shim, pki, upstream, clients):
    """A shared session that ends with questions unanswered is replaced, they are asked once more, and the clients see
    nothing but their replies."""
    def ends(peer, line, reply):
        if peer is not peer.server.peers[0] or b"deadly" not in line:
            return reply
        if how == "closes TLS":
            with contextlib.suppress(OSError, ValueError):
                peer.sock.unwrap()
        elif how == "closes TCP":
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        else:
            peer.reset()
        raise ConnectionResetError("done on purpose")
    server = upstream(answering(ends))
    port = shim(client_config(server.port, pki)).port("client")
    here = clients(*[port] * 5)
    for client in here:
        answers(client, "before")
    said = ["LIST VAR ups\n%s\n%sSTARTTLS\nVER\n" % (
        tagged("deadly" if number == 2 else "x%d" % number)[0], "GET VAR ups ups.mfr\n" * 10 * (number % 2))
            for number in range(len(here))]
    for client, data in zip(here, said):
        client.send(data)
    for client, data in zip(here, said):
        direct = standin.Session(server.upsd).feed(data.encode("ascii"))
        assert client.recv_exactly(len(direct)) == direct
        answers(client, "after")
    assert len(server.peers) == 2


def test_the_fresh_session_goes_on_where_the_silent_one_stays_silent(shim, pki, upstream, clients):
    """Half a reply, or none, and then silence: a second session is dialled beside the silent one, all are answered over
    it, and the first is closed."""
    def mute(half):
        def change(peer, line, reply):
            if peer is peer.server.peers[0] and b"mute" in line:
                peer.send(reply[:half])
                peer.hang()
                raise ConnectionResetError("ended by the client")
            return reply
        return upstream(answering(change))
    servers = [mute(half) for half in (0, 12)]
    config = {"none": client_config(servers[0].port, pki)["client"],
              "half": client_config(servers[1].port, pki, listen="127.0.0.1:%d" % free_port())["client"]}
    both = shim(config)
    asking = []
    for section in config:
        here = clients(*[both.port(section)] * 5)
        answers(here[0], "before")
        asking += [(client, *tagged("mute" if number == 1 else "x%d" % number)) for number, client in enumerate(here)]
    for client, question, _ in asking:
        client.send(question + "\n")
    for client, _, reply in asking:
        assert client.recv_exactly(len(reply), 10) == reply
    for server in servers:
        poll(lambda server=server: server.peers[0].sock.fileno() < 0, 5, "the end of the silent session")
        assert len(server.peers) == 2


def test_the_silent_session_goes_on_if_it_speaks_first(shim, pki, clients):
    """Where the silent session speaks before the second one is up, it goes on, and the second is closed; meanwhile no
    third is dialled."""
    dialled = threading.Event()

    def behaviour(peer):
        if peer is peer.server.peers[0]:
            return tls(pki.server, then=answering(slow))(peer)
        dialled.set()                               # takes STARTTLS and says nothing
        return peer.hang()

    def slow(_peer, line, reply):
        if b"slow" in line:
            dialled.wait(10)
            time.sleep(1.5)                         # time for a shim that dials again and again to do so
        return reply
    with FalseServer(behaviour) as server:
        port = shim(client_config(server.port, pki)).port("client")
        one, two = clients(port, port)
        answers(one, "before")
        one.send(tagged("slow")[0] + "\n")
        two.send(tagged("x")[0] + "\n")
        for client, name in ((one, "slow"), (two, "x")):
            assert client.recv_line(10) == tagged(name)[1]
        assert len(server.peers) == 2
        poll(lambda: server.peers[1].sock.fileno() < 0, 10, "the end of the second session")
        answers(two, "after")
        assert len(server.peers) == 2


@pytest.mark.parametrize("command", ["FSD ups", "SET VAR ups ups.mfr x", "INSTCMD ups load.off", "LOGIN ups", "NONSENSE"])
def test_what_acts_is_never_sent_twice(command, shim, pki, upstream, clients):
    """A command that may have acted already is not sent again when its session ends: its client gets the end."""
    def dies(peer, line, reply):
        if line.startswith(command.encode("ascii")):
            raise ConnectionResetError("done on purpose")
        return reply
    server = upstream(answering(dies))
    port = shim(client_config(server.port, pki)).port("client")
    client, = clients(port)
    answers(client, "before")
    client.send("USERNAME u\nPASSWORD p\n%s\nVER\n" % command)
    assert client.recv_until_close() == b"OK\nOK\n"
    with PlainClient(port) as another:
        answers(another, "after")
    assert [heard(peer).count(command.encode("ascii")) for peer in server.peers] == [0, 1]


def test_no_upstream_left(shim, pki, upstream, clients):
    """When the shared session is gone and its server gives no other, who asks gets the end, not silence, and the log
    says why."""
    def once(peer):
        if peer is peer.server.peers[0]:
            tls(pki.server, then=answering(end))(peer)

    def end(_peer, line, reply):
        if b"deadly" in line:
            raise ConnectionResetError("done on purpose")
        return reply
    with FalseServer(once) as server:
        client_shim = shim(client_config(server.port, pki))
        one, two = clients(*[client_shim.port("client")] * 2)
        answers(one, "before")
        mark = client_shim.mark()
        one.send(tagged("deadly")[0] + "\n")
        two.send(tagged("x")[0] + "\n")
        for client in (one, two):
            assert client.recv_until_close(10) in (b"", tagged("x")[1])
        client_shim.wait_log("no upstream|STARTTLS", start=mark)


# ---- slow readers -------------------------------------------------------------------------------

@pytest.mark.usefixtures("nut_installed")
def test_a_client_that_does_not_read_holds_nobody_up(pki):
    """2 MB of LISTs to a client that takes nothing of them: 30 pollers beside it are answered as before, and the client
    shim's memory grows by less than 1 MB. With 3 MB upsd 2.8.0 itself would wait for this reader."""
    with Nut({"ups": {"ups.status": "OL"}, "big": many_variables(4000)}) as nut, contextlib.ExitStack() as stack:
        config = pair_config(nut.port, pki)
        stack.enter_context(Shim({"server": config["server"]}))
        client_shim = stack.enter_context(Shim({"client": config["client"]}))
        port = client_shim.port("client")
        pollers = [stack.enter_context(PlainClient(port)) for _ in range(30)]

        def rounds():
            times = []
            for _ in range(20):
                since = time.monotonic()
                for client in pollers:
                    client.send("GET VAR ups ups.status\n")
                for client in pollers:
                    assert client.recv_line(10) == b'VAR ups ups.status "OL"\n'
                times.append(time.monotonic() - since)
            return times
        rounds()
        before, quiet = client_shim.rss(), rounds()
        slow = socket.socket()
        stack.callback(slow.close)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        slow.sendall(b"LIST VAR big\n" * 4)
        assert slow.recv(10) == b"BEGIN LIST"
        beside = rounds()
        grown = client_shim.rss() - before
        assert statistics.median(beside) < 5 * statistics.median(quiet), (statistics.median(beside), statistics.median(quiet))
        assert max(beside) < 5, max(beside)
        assert grown < 1024, "memory has grown by %d kB" % grown
        slow.settimeout(10)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        got, whole = bytearray(b"BEGIN LIST"), None
        while whole is None or len(got) < 4 * whole:        # and in the end it gets what it asked for
            data = slow.recv(1 << 18)
            assert data, "cut after %d bytes" % len(got)
            got += data
            if whole is None and b"\nEND LIST VAR big\n" in got[-(1 << 18) - 20:]:
                whole = got.index(b"\nEND LIST VAR big\n") + len(b"\nEND LIST VAR big\n")
        assert bytes(got) == bytes(got[:whole]) * 4 and got[:whole].count(b"\nVAR big outlet.") == 4000


# ---- reload -------------------------------------------------------------------------------------

def reloaded(shim, config=None):
    """Reload and wait for it."""
    mark = shim.mark()
    shim.reload(config)
    shim.wait_log("notice: reloaded ", start=mark)


def same_trust(pki, path):
    """What pki.ca.cert is, in another file: a reload that goes over to it touches trust."""
    with open(pki.ca.cert, encoding="ascii") as file:
        return write(str(path / "ca.pem"), file.read())


def test_a_reload_begins_a_new_shared_session(shim, pki, upstream, clients, tmp_path):
    """A reload that touches trust closes the shared session once its replies are in; own sessions go on."""
    server = upstream()
    client_shim = shim(client_config(server.port, pki))
    port = client_shim.port("client")
    asking, own = clients(port, port)
    answers(asking, "before")
    assert own.ask("USERNAME u") == b"OK\n"
    reloaded(client_shim, client_config(server.port, pki, trust=same_trust(pki, tmp_path)))
    poll(lambda: server.peers[0].sock.fileno() < 0, 5, "the end of the session of before")
    answers(asking, "after")
    answers(own, "own")
    assert [re.findall(rb"ups (\w+)\n", heard(peer)) for peer in server.peers] == [[b"before"], [b"own"], [b"after"]]


def test_a_reload_with_less_trust_counts_at_once(shim, pki):
    """A server that is no longer trusted is refused right after the reload, whatever was shared or could be resumed."""
    context = server_context(pki)
    seen = []
    with FalseServer(resuming(context, seen)) as server:
        client_shim = shim(client_config(server.port, pki))
        port = client_shim.port("client")
        for _ in range(2):
            with PlainClient(port) as client:
                assert client.ask("NETVER") == b"1.3\n"
                assert client.ask("USERNAME u") == b"OK\n"
        assert seen[0] is False and seen[-1] is True
        mark = client_shim.mark()
        reloaded(client_shim, client_config(server.port, pki, trust=pki.other_ca.cert))
        with PlainClient(port) as client:
            client.send("NETVER\n")
            assert client.recv_until_close() == b""
        client_shim.wait_log("unknown CA|not .*trust", start=mark)


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
def test_the_client_role_resumes(version, shim, pki, tmp_path):
    """The second upstream session of a client shim resumes the TLS session of the first; after a reload that touches
    trust the first does a full handshake again."""
    seen = []
    context = server_context(pki, {"1.3": ssl.TLSVersion.TLSv1_3, "1.2": ssl.TLSVersion.TLSv1_2}[version])
    with FalseServer(resuming(context, seen)) as server:
        client_shim = shim(client_config(server.port, pki, reuse=0, min_tls=version))
        for reload in (False, True):
            if reload:
                reloaded(client_shim, client_config(server.port, pki, reuse=0, min_tls=version,
                                                    trust=same_trust(pki, tmp_path)))
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
    """A client's TLS session can be resumed, but not after a reload that touches identities, which gives new ticket keys."""
    config = {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % nut.port, "certificate": pki.server.file,
              "min_tls": version}
    server_shim = shim({"server": config})
    port = server_shim.port("server")
    context = client_context(pki.ca.cert, maximum={"1.3": ssl.TLSVersion.TLSv1_3, "1.2": ssl.TLSVersion.TLSv1_2}[version])
    first, session = resumed(port, context)
    second, session = resumed(port, context, session)
    assert (first, second) == (False, True)
    reloaded(server_shim, {"server": dict(config, trust=pki.ca.cert, client_certificate="request")})
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
