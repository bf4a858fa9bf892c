# SPDX-License-Identifier: GPL-2.0-or-later
"""Real NUT sessions through both shims: the shutdown story, and the wire as upsd itself would have it.

upsd, dummy-ups, upsmon, upsc, upscmd and upsrw are the real ones. False servers stand in only for
what those cannot be made to do: silence in the middle of a handshake, a reply cut where it hurts,
the older shims' bare OK.
"""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import ssl
import threading
import time

import pytest

from harness import (PRIMARY, SECONDARY, VARIABLES, FalseServer, Nut, PlainClient, Relay, Shim, TlsClient, Upsmon,
                     closes, free_port, many_variables, nut_program, pair_config, poll, run, says, silent, tls, upsc,
                     upscmd, upsrw)
from standin import quoted

DONE = b"OK Goodbye\n"


@pytest.fixture(scope="module")
def rich(nut_installed):                            # pylint: disable=unused-argument
    """A real upsd with five UPSes: ups, which stays as it is; one, two and doomed, which FSD strikes; and dead.

    dead has no driver, and a description so long that upsd cuts its line, newline and all, in LIST UPS.
    """
    upsd = Nut(dict.fromkeys(("ups", "one", "two", "doomed", "dead"), VARIABLES), {"dead": "cut at byte 512 " * 40})
    del upsd.upses["dead"]                          # it is in ups.conf, but nobody starts its driver
    with upsd:
        yield upsd


@pytest.fixture(scope="module")
def rich_pair(rich, pki):
    """Both shims in front of rich, in one process."""
    with Shim(pair_config(rich.port, pki)) as shims:
        yield shims


# ---- the shutdown story -------------------------------------------------------------------------

@contextlib.contextmanager
def recorded_pair(nut, pki):
    """(relay, port of the client shim): a client shim that reaches a server shim through a Relay."""
    sections = pair_config(nut.port, pki)
    server_port = int(sections["server"]["listen"].split(":")[1])
    with Shim({"server": sections["server"]}), Relay(server_port) as relay:
        sections["client"]["upstream"] = "127.0.0.1:%d" % relay.port
        with Shim({"client": sections["client"]}) as client:
            yield relay, client.port("client")


def wait_login(nut, count=1, ups="ups"):
    """Wait until upsd has so many clients logged in."""
    with PlainClient(nut.port) as client:
        poll(lambda: client.ask("GET NUMLOGINS " + ups).split()[-1] == b"%d" % count, 15, "%d logins" % count)


def wait_polls(relay, count=2):
    """Wait until upsmon has asked so many times more; a poll is some 50 bytes of TLS."""
    start = len(relay.up)
    poll(lambda: len(relay.up) > start + 40 * count, 15, "%d polls" % count)


@pytest.mark.usefixtures("slow_readers")            # which need not be waited for here
def test_primary_shuts_down_at_low_battery_and_never_before(rich, pki):
    """upsmon as primary, through both shims, sets FSD and runs SHUTDOWNCMD at OB LB, and never before.

    Over mains, battery, mains and battery it does neither, all in one session: a connection lost on
    battery is what upsmon would shut down for.
    """
    with recorded_pair(rich, pki) as (relay, port), Upsmon(port, ups="one") as upsmon:
        wait_login(rich, 1, "one")
        for status, event in (("OB", "ONBATT"), ("OL", "ONLINE"), ("OB", "ONBATT")):
            seen = len(upsmon.events)
            rich.set_status(status, "one")
            poll(lambda seen=seen: len(upsmon.events) > seen, 10, lambda: "an event in:\n" + upsmon.log)
            assert upsmon.events[seen:] == [event]
            wait_polls(relay)
        assert upsmon.alive and not upsmon.shut_down and rich.get("ups.status", "one") == "OB"
        assert upsmon.events == ["ONBATT", "ONLINE", "ONBATT"]
        rich.set_status("OB LB", "one")
        upsmon.wait_shutdown()
        assert rich.get("ups.status", "one").startswith("FSD")
        assert "COMMBAD" not in upsmon.events and relay.connections == 1


def test_secondary_shuts_down_first(rich, pki):
    """At OB LB the secondary shuts down and its logout reaches upsd, for which the primary has waited."""
    with recorded_pair(rich, pki) as (_, port), Upsmon(port, ups="two") as primary, \
            Upsmon(port, ups="two", login=SECONDARY, kind="secondary") as secondary:
        wait_login(rich, 2, "two")
        rich.set_status("OB LB", "two")
        secondary.wait_shutdown(15)
        primary.wait_shutdown(15)
        assert "sync timer expired" not in primary.log          # that is upsmon 2.8.0's word for waiting in vain
        assert secondary.events[-1] == "SHUTDOWN"
        assert "COMMBAD" not in primary.events + secondary.events


# ---- byte for byte the same ---------------------------------------------------------------------

SAME_MODEL = "SET VAR ups ups.model " + quoted(VARIABLES["ups.model"])    # with ", \\ and # in it

CONVERSATIONS = {
    "reading": """VER|NETVER|PROTVER|HELP|help|Ver|STARTTLS|VER x|HELP x|NOSUCH|NOSUCH COMMAND|
        LIST UPS|LIST VAR ups|LIST RW ups|LIST CMD ups|LIST CLIENT ups|LIST ENUM ups ups.status|
        LIST RANGE ups input.voltage|STARTTLS x|list var UPS|LIST|LIST NOSUCH|LIST UPS x|LIST VAR|LIST VAR nosuch|
        LIST RW nosuch|LIST CMD nosuch|LIST CLIENT nosuch|LIST ENUM ups nosuch|LIST RANGE ups nosuch|LIST VAR dead|
        GET VAR ups ups.status|GET VAR ups ups.model|GET VAR UPS Ups.Status|GET TYPE ups ups.status|
        GET TYPE ups input.voltage|GET DESC ups ups.status|GET DESC ups nosuch|GET CMDDESC ups load.off|
        GET UPSDESC ups|GET UPSDESC dead|GET NUMLOGINS ups|GET TRACKING|GET TRACKING nosuch|GET|GET NOSUCH|GET VAR|
        GET VAR ups|GET VAR nosuch x|GET VAR ups nosuch|GET VAR dead ups.status|GET NUMLOGINS nosuch|starttls|
        LOGIN ups|PRIMARY ups|MASTER ups|FSD ups|SET VAR ups ups.mfr x|INSTCMD ups load.off|LOGOUT x""",
    "primary": """USERNAME|USERNAME primary|USERNAME again|LOGIN ups|PASSWORD|PASSWORD primarypass|PASSWORD again|
        SET TRACKING ON|GET TRACKING|SET TRACKING OFF|SET TRACKING nosuch|GET TRACKING|PRIMARY|PRIMARY nosuch|
        PRIMARY ups|MASTER ups|LOGIN|LOGIN nosuch|LOGIN ups|LOGIN ups|GET NUMLOGINS ups|LIST CLIENT ups|STARTTLS|
        SET VAR ups ups.mfr x|INSTCMD ups load.off|FSD|FSD nosuch|FSD doomed|GET VAR doomed ups.status|
        GET VAR ups ups.status""",
    "admin": """USERNAME admin|PASSWORD adminpass|SET|SET VAR|SET VAR ups|SET VAR ups ups.mfr|SET VAR ups nosuch x|
        SET VAR nosuch ups.mfr x|SET VAR ups ups.mfr Test|%s|SET VAR dead ups.mfr x|INSTCMD|INSTCMD ups|
        INSTCMD ups nosuch|INSTCMD ups load.off|LOGIN ups|PRIMARY ups|SET TRACKING ON|SET VAR ups ups.mfr Test|
        INSTCMD ups load.off|STARTTLS|SET VAR ups ups.mfr Test|GET TRACKING|SET TRACKING OFF|FSD doomed""" % SAME_MODEL,
    "wrong password": """USERNAME admin|PASSWORD wrong|LOGIN ups|PRIMARY ups|FSD ups|SET VAR ups ups.mfr x|
        INSTCMD ups load.off|GET VAR ups ups.status|SET TRACKING ON|GET TRACKING""",
    # What upsd's parser does with odd input: NUT common/parseconf.c. STARTTLS has no place here, where
    # replies are hard to count, but in the other three.
    "odd": [
        b"", b"   ", b"# comment", b"VER # comment", b"VER#c", b'"VER"', b'"VER"x', b'V"ER"', b'""', b"VER=1",
        b"GET VAR=ups ups.mfr", b"\tVER", b"VER\r", b"\rVER\r", b"V\rER", b"V\0ER", b"\0", b"V\x01ER",
        b"V\xc3\xa9ER", b"\xff\xfe", b"GET VAR ups \x80ups.mfr\xff", b"V\x7fER", b"\\VER", b"V\\ER", b"a\\ b", b"\\#x",
        b'GET VAR "ups" "ups.status"', b"GET VAR u\\ps ups\\.status", b'GET VAR ups "a \\"b\\" \\\\ \\# c"',
        b'GET DESC "UPS" "a b"', b"GET DESC ups " + b"A" * 600, b"LIST UPS" + b" x" * 40,
        b"GET CMDDESC ups " + b"A" * 480,
        b'GET VAR "a\nb"', b'GET VAR "a\nVER\nVER"', b"VE\\\nR", b"VER\\\nVER", b'"VER\\\n"', b"LIST VAR \xffups"],
}
PACES = ("whole", "bytewise", "pipelined")
MARK = b"GET DESC ups =mark=\n"


def lines_of(conversation):
    """A conversation as a list of command lines."""
    if isinstance(conversation, str):
        conversation = [command.strip().encode("ascii") for command in conversation.split("|")]
    return [command + b"\n" for command in conversation]


def same_ids(replies):
    """Replies with upsd's random tracking ids, new for each command, made the same."""
    return re.sub(rb"OK TRACKING [0-9A-F-]{36}\n", b"OK TRACKING id\n", replies)


def ask_upsd(nut, lines):
    """upsd's own reply to each line, set apart by a reply of known form behind each."""
    with PlainClient(nut.port) as client:
        mark = client.ask(MARK.decode("ascii").strip())
        client.send(b"".join(line + MARK for line in lines) + b"LOGOUT\n")
        replies = client.recv_until_close().split(mark)
    assert replies.pop() == DONE
    return replies


def hold(client, lines, pace, expected):
    """Hold a conversation; expected: upsd's own replies, for their number of bytes. All replies, as a list."""
    if pace == "whole":
        replies = []
        for line, reply in zip(lines + [b"LOGOUT\n"], expected):
            client.send(line)
            replies.append(client.recv_exactly(len(reply)))
        return replies + [client.recv_until_close()]
    text = b"".join(lines) + b"LOGOUT\n"
    if pace == "bytewise":
        client.send_bytewise(text)
    else:
        client.send(text)
    return [client.recv_until_close(15)]


@pytest.fixture(scope="module")
def upsd_says(rich):
    """upsd's own replies to a conversation, by its name. FSD stays for ever, so it is set before."""
    with PlainClient(rich.port) as client:
        client.login(PRIMARY)
        assert client.ask("FSD doomed") == b"OK FSD-SET\n"
    return {name: ask_upsd(rich, lines_of(conversation)) for name, conversation in CONVERSATIONS.items()}


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("way", ["both shims", "server shim"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_same_bytes_as_upsd(rich, rich_pair, upsd_says, name, way, pace):
    """Every command gets through the shims the very bytes that upsd itself answers it with.

    One command at a time, byte by byte (a read is not a command) and all in one segment (the
    replies keep their order, the shim's own to STARTTLS in their turn).
    """
    lines, expected = lines_of(CONVERSATIONS[name]), list(upsd_says[name])
    assert all(expected) and len(expected) == len(lines)
    if way == "server shim":                        # the one reply that differs by nature
        for number, line in enumerate(lines):
            if line.upper().startswith(b"STARTTLS"):
                assert expected[number] == b"ERR FEATURE-NOT-CONFIGURED\n"
                expected[number] = b"ERR ALREADY-SSL-MODE\n"
    expected += [DONE, b""]
    wait_login(rich, 0)                             # the session of before is gone from GET NUMLOGINS
    client = (PlainClient(rich_pair.port("client")) if way == "both shims"
              else TlsClient(rich_pair.port("server"), server_name="localhost"))
    with client:
        replies = [same_ids(reply) for reply in hold(client, lines, pace, expected)]
    expected = [same_ids(reply) for reply in expected]
    if pace != "whole":
        assert replies == [b"".join(expected)]
    else:
        assert dict(enumerate(zip([b""] + lines, replies))) == dict(enumerate(zip([b""] + lines, expected)))
    with PlainClient(rich.port) as client:
        assert client.ask("GET VAR ups ups.model").decode("ascii") == "VAR ups ups.model %s\n" % quoted(
            VARIABLES["ups.model"])


def test_tracking_ids_are_upsds_own(rich, rich_pair):
    """A tracking id handed out through the shims is the one that upsd knows, and each command has its own."""
    with PlainClient(rich_pair.port("client")) as client, PlainClient(rich.port) as direct:
        for each in (client, direct):
            each.login()
            assert each.ask("SET TRACKING ON") == b"OK\n"
        client.send("SET VAR ups ups.mfr Test\nSET VAR ups ups.mfr Test\n")
        replies = client.recv_lines(2)
        ids = [re.match(rb"OK TRACKING ([0-9A-F-]{36})\n$", reply).group(1).decode("ascii") for reply in replies]
        assert ids[0] != ids[1]
        for each in ids:
            poll(lambda each=each: client.ask("GET TRACKING " + each) == b"SUCCESS\n", 10, "the end of a SET")
            assert direct.ask("GET TRACKING " + each) == b"SUCCESS\n"
        unknown = "GET TRACKING " + ids[0][::-1]
        assert client.ask(unknown) == direct.ask(unknown)


def test_command_that_upsd_swallows_harms_nobody(rich, rich_pair):
    """A line that upsd 2.8.0 drops without a reply (# in quotes) is silent here too, and the next one works."""
    for port in (rich.port, rich_pair.port("client")):
        with PlainClient(port) as client:
            client.send('GET VAR ups "a#"\n')
            if not client.silent_for(0.3):          # a later upsd answers
                assert client.recv_line() == b"ERR VAR-NOT-SUPPORTED\n"
            assert client.ask("NETVER") == b"1.3\n"
            assert client.ask("STARTTLS") == b"ERR FEATURE-NOT-CONFIGURED\n"
            assert client.ask("LOGOUT") == DONE


def test_own_replies_come_in_their_turn(rich_pair):
    """The shim's reply to STARTTLS never overtakes what upsd still owes, however the commands came."""
    with PlainClient(rich_pair.port("client")) as client:
        client.send("LIST VAR ups\nSTARTTLS\nNETVER\n")
        assert client.recv_until(b"END LIST VAR ups\n").startswith(b"BEGIN LIST VAR ups\n")
        assert client.recv_lines(2) == [b"ERR FEATURE-NOT-CONFIGURED\n", b"1.3\n"]


NUT_COMMANDS = (("upsc", "{}"), ("upsc", "{}", "ups.status"), ("upsc", "{}", "nosuch"), ("upsc", "-c", "{}"),
                ("upsc", "-L", "{host}"), ("upscmd", "-l", "{}"), ("upsrw", "{}"),
                ("upscmd", "-u", "admin", "-p", "adminpass", "{}", "nosuch"),
                ("upsrw", "-s", "ups.mfr=x", "-u", "admin", "-p", "wrong", "{}"))


@pytest.mark.parametrize("command", NUT_COMMANDS, ids=" ".join)
def test_nut_clients_say_the_same_as_without_shims(rich, rich_pair, command):
    """upsc, upscmd and upsrw say through both shims what they say straight to upsd."""
    results = []
    for port in (rich_pair.port("client"), rich.port):
        host = "127.0.0.1:%d" % port
        done = run(nut_program(command[0]), *[word.format("ups@" + host, host=host) for word in command[1:]])
        results.append((done.returncode, done.stdout.replace(host, ""), done.stderr.replace(host, "")))
    assert results[0] == results[1]
    assert results[0][1] or results[0][2]


def test_nut_clients_are_obeyed(rich, rich_pair):
    """upsrw changes a variable and upscmd runs a command through both shims."""
    port = rich_pair.port("client")
    assert upsrw(port, "-s", "ups.mfr=Changed", ups="doomed").returncode == 0
    poll(lambda: rich.get("ups.mfr", "doomed") == "Changed", 10, "upsrw's value")
    done = upscmd(port, "load.off")
    assert done.returncode == 0 and "OK" in done.stdout + done.stderr


# ---- on the wire --------------------------------------------------------------------------------

def tls_records(stream):
    """Check that a byte stream is TLS records from end to end; their content types."""
    types, place = [], 0
    while place < len(stream):
        kind, major, _, size = stream[place], stream[place + 1], stream[place + 2], stream[place + 3:place + 5]
        assert kind in (20, 21, 22, 23) and major == 3, "no TLS record: %r" % stream[place:place + 20]
        types.append(kind)
        place += 5 + int.from_bytes(size, "big")
    assert place == len(stream), "the last TLS record is cut"
    return types


def test_nothing_readable_on_the_wire(rich, pki):
    """Between the shims only STARTTLS and OK STARTTLS can be read; all else, both ways, is TLS records."""
    with recorded_pair(rich, pki) as (relay, port):
        with PlainClient(port) as client:
            client.login(PRIMARY)
            assert client.ask("LOGIN ups") == b"OK\n"
            assert b"ups.mfr" in client.ask_list("LIST VAR ups")
            client.send("LOGOUT\n")
            assert client.recv_until_close() == DONE
        assert upsc(port).returncode == 0
        poll(lambda: relay.connections == 2 and b"".join((relay.up, relay.down)), 5, "the recording")
    assert relay.connections == 2                   # the first session had a login, so was not kept for the next
    for stream, opening in ((relay.up, b"STARTTLS\n"), (relay.down, b"OK STARTTLS\n")):
        start, first, second = stream.split(opening) if stream.count(opening) == 2 else (None, b"", b"")
        assert start == b"" and first and second, "not one %r for each session" % opening
        for session in (first, second):
            types = tls_records(session)
            assert types[0] == 22 and types.count(23) > 2
        for word in PRIMARY + ("LIST", "USERNAME", "LOGIN", "ups.mfr", "BEGIN", "localhost", "Test CA"):
            assert word.encode("ascii") not in first + second


def test_reply_stays_in_one_tls_record(rich, rich_pair):
    """upsd's reply to PROTVER comes out of TLS in one read, as NUT's clients expect it."""
    with TlsClient(rich_pair.port("server")) as client, PlainClient(rich.port) as direct:
        for command in ("PROTVER", "VER", "GET VAR ups ups.model"):
            del client.reads[:]
            reply = client.ask(command)
            assert reply == direct.ask(command)
            assert client.reads == [len(reply)]


# ---- big lists and slow readers -----------------------------------------------------------------

class SlowReader:
    """Reads a client's replies at its own pace."""

    def __init__(self, client, size):
        self.sock = client.sock
        self.size = size
        self.data = bytearray()
        self.sock.setblocking(False)

    def read(self, size):
        """Read so many bytes more, or as many as are there."""
        end = min(len(self.data) + size, self.size)
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            while len(self.data) < end:
                data = self.sock.recv(end - len(self.data))
                assert data, "dropped after %d of %d bytes" % (len(self.data), self.size)
                self.data += data


def small_window(client_class, port):
    """A client whose kernel takes little on its behalf."""
    class Client(client_class):
        """The same, but for its socket's buffer."""
        def start_tls(self, *args, **options):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            super().start_tls(*args, **options)

    client = Client(port)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    return client


def read_slowly(pki, seconds=11, lists=6):
    """Let a client of each shim read lists of 1 MB, slowly for some seconds; kB by which the shims grew."""
    ways = ((PlainClient, "client"), (TlsClient, "server"))
    with Nut({"big": dict(VARIABLES, **many_variables(8000))}) as nut, Shim(pair_config(
            nut.port, pki, client={"handshake_timeout": 100})) as shims:        # upsd itself is silent while it writes to another
        with PlainClient(nut.port) as direct:
            expected = direct.ask_list("LIST VAR big", 20)
        assert len(expected) > 1000000
        for make, section in ways:                  # what one list at full speed needs is no growth
            with make(shims.port(section)) as client:
                assert client.ask_list("LIST VAR big", 20) == expected
        before = most = shims.rss()
        with contextlib.ExitStack() as stack:
            readers = []
            for make, section in ways:
                client = stack.enter_context(small_window(make, shims.port(section)))
                client.send("LIST VAR big\n" * lists)
                readers.append(SlowReader(client, lists * len(expected)))
            began = time.monotonic()
            while any(len(reader.data) < reader.size for reader in readers):
                slowly = time.monotonic() < began + seconds
                for reader in readers:
                    try:
                        reader.read(2000 if slowly else 65536)
                    except AssertionError as error:
                        raise AssertionError("%s\n%s" % (error, shims.log)) from None     # which is gone later
                most = max(most, shims.rss())
                time.sleep(0.04 if slowly else 0.001)       # the pace is the point
            assert [reader.data == expected * lists for reader in readers] == [True, True]
        return most - before


@pytest.fixture(scope="module")
def slow_readers(nut_installed, pki):               # pylint: disable=unused-argument
    """read_slowly() in the background of the other tests, since it takes its time: the result to come."""
    pki.server, pki.ca                              # pylint: disable=pointless-statement
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(read_slowly, pki)


def test_slow_readers_of_big_lists_cost_no_memory_and_are_not_dropped(slow_readers):
    """Clients that read six LISTs of 1 MB slowly get them whole, and meanwhile the shims grow by less than 1 MB.

    Six, because the kernel alone holds some MB for a socket that nobody reads. The readers take
    longer than the limit on replies left unread (10 s), which is not for those who do read.
    """
    assert slow_readers.result() < 1024


def test_list_cut_between_reads_or_refused_stalls_nobody(pki, rich):
    """A LIST that stops in the middle, comes in single bytes, or is an ERR, holds up its own client at most."""
    def half(peer):
        peer.recv_line()
        peer.send(b"BEGIN LIST VAR ups\nVAR ups a \"1\"\nEND LI")
        peer.server.go_on.wait(20)
        peer.send(b"ST VAR ups\n")
        peer.hang()

    with FalseServer(half) as stuck, FalseServer(lambda peer: peer.answer(1)) as slow:
        stuck.go_on = threading.Event()
        own = {"role": "server", "certificate": pki.server.file}
        ports = {"stuck": stuck.port, "slow": slow.port, "upsd": rich.port}
        with Shim({name: dict(own, listen="127.0.0.1:%d" % free_port(), upstream="127.0.0.1:%d" % port)
                   for name, port in ports.items()}) as shims:
            with TlsClient(shims.port("stuck")) as waits, TlsClient(shims.port("slow")) as bytewise, \
                    TlsClient(shims.port("upsd")) as other:
                waits.send("LIST VAR ups\n")
                assert waits.recv_until(b"END LI").endswith(b"END LI")
                assert bytewise.ask_list("LIST VAR ups").endswith(b"END LIST VAR ups\n")
                assert other.ask_list("LIST VAR nosuch") == b"ERR UNKNOWN-UPS\n"
                assert other.ask_list("LIST VAR ups").endswith(b"END LIST VAR ups\n")
                stuck.go_on.set()
                assert waits.recv_line() == b"ST VAR ups\n"


# ---- several upstreams, addresses ---------------------------------------------------------------

STALLS = {
    "refuses": None,
    "closes at once": closes,
    "never shakes hands": says(b"OK STARTTLS\n", silent),
    "closes after OK STARTTLS": says(b"OK STARTTLS\n", closes),
}


@pytest.mark.parametrize("fault", STALLS)
def test_next_upstream_serves_when_the_first_does_not(rich, rich_pair, pki, fault):
    """With a first upstream that is dead or silent the second one answers, before NUT's clients give up after 5 s."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(FalseServer(STALLS[fault])).port if STALLS[fault] else free_port()
        shim = stack.enter_context(Shim({"client": {
            "role": "client", "listen": "127.0.0.1:0", "trust": pki.ca.cert,
            "upstream": ["127.0.0.1:%d" % first, "127.0.0.1:%d" % rich_pair.port("server")]}}))
        answer = upsc(shim.port("client"), "ups.status", timeout=10)
        assert (answer.returncode, answer.stdout) == (0, "OL\n"), answer.stderr
        with PlainClient(shim.port("client"), seconds=5) as client:
            assert client.ask("NETVER", 5) == b"1.3\n"


def test_silent_first_upstream_leaves_time_for_a_slow_second(pki):
    """A first upstream that never answers takes only its share of the 4 s: the second may take a second itself."""
    def slow(peer):
        peer.recv_line()
        time.sleep(1)                               # a far-away box, not a wait for anything
        peer.send(b"OK STARTTLS\n")
        peer.start_tls(pki.server)
        peer.answer()

    with FalseServer(silent) as first, FalseServer(slow) as second, Shim({"client": {
            "role": "client", "listen": "127.0.0.1:0", "trust": pki.ca.cert,
            "upstream": ["127.0.0.1:%d" % first.port, "127.0.0.1:%d" % second.port]}}) as shim:
        with PlainClient(shim.port("client")) as client:
            assert client.ask("NETVER", 5) == b"1.3\n"          # NUT's clients wait for 5 s
        assert len(first.peers) == 1


def test_ipv6_names_and_every_address(rich, pki):
    """listen and upstream take IPv6 addresses, names, lists, and * for every address of both families."""
    every, six, more = free_port(), free_port(), free_port()
    config = {
        "every": {"role": "server", "listen": "*:%d" % every, "upstream": "127.0.0.1:%d" % rich.port,
                  "certificate": pki.server.file},
        "six": {"role": "client", "listen": "[::1]:%d" % six, "upstream": "[::1]:%d" % every, "trust": pki.ca.cert},
        "name": {"role": "client", "listen": "localhost:0", "upstream": "localhost:%d" % every, "trust": pki.ca.cert},
        "list": {"role": "client", "listen": "127.0.0.1:%d, [::1]:%d" % (more, more),
                 "upstream": "127.0.0.1:%d" % every, "trust": pki.ca.cert},
    }
    with Shim(config, ready=6) as shims:
        shims.wait_log("started")                   # and so all the listening lines are there
        assert "127.0.0.1" in [address for name, address, _ in shims.listening if name == "name"]
        assert sorted(address for name, address, _ in shims.listening if name == "every") == ["0.0.0.0", "[::]"]
        assert [place for place in shims.listening if place[0] == "six"] == [("six", "[::1]", six)]
        for name, address, port in shims.listening:
            if name == "every":
                continue
            with PlainClient(port, address.strip("[]")) as client:
                assert client.ask("GET VAR ups ups.status") == b'VAR ups ups.status "OL"\n'
        for host in ("127.0.0.1", "::1"):
            with TlsClient(every, host, server_name=host, ca=pki.ca.cert) as client:
                assert client.ask("NETVER") == b"1.3\n"
        answer = upsc(six, "ups.status", host="[::1]")
        assert (answer.returncode, answer.stdout) == (0, "OL\n"), answer.stderr


def test_older_shims_bare_ok_is_taken(pki):
    """A client shim goes on to TLS behind the older shims' bare OK, as behind OK STARTTLS."""
    with FalseServer(tls(pki.server, reply=b"OK\n")) as server, Shim({"client": {
            "role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % server.port,
            "trust": pki.ca.cert}}) as shim:
        with PlainClient(shim.port("client")) as client:
            assert client.ask("GET VAR ups ups.status") == b'VAR ups ups.status "OL"\n'
        assert server.peers[0].tls_version == "TLSv1.3"


def test_server_shim_speaks_the_words_of_the_rfc(rich_pair):
    """Before TLS the server shim says OK STARTTLS in whole and ERR before every refusal (RFC 9271 4.2.12, 4.3.2)."""
    with PlainClient(rich_pair.port("server")) as client:
        assert client.ask("VER") == b"ERR TLS-NOT-ENABLED\n"
        assert client.ask("starttls \r") == b"OK STARTTLS\n"
    with PlainClient(rich_pair.port("server")) as client:
        client.send("LOGOUT\n")
        assert client.recv_until_close() == DONE


# ---- ends ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", ["upsd", "both shims", "server shim"])
def test_half_close_loses_no_reply(rich, rich_pair, way):
    """A client that ends its sending side still gets every reply to what it sent, then the end, as from upsd itself."""
    client = {"upsd": lambda: PlainClient(rich.port), "both shims": lambda: PlainClient(rich_pair.port("client")),
              "server shim": lambda: TlsClient(rich_pair.port("server"))}[way]()
    with PlainClient(rich.port) as direct:
        expected = direct.ask_list("LIST VAR ups")
    with client:
        client.send("LIST VAR ups\n" * 50)
        socket.socket.shutdown(client.sock, socket.SHUT_WR)     # SSLSocket's own would forget TLS
        assert client.recv_until_close() == expected * 50


def test_upsds_end_reaches_the_client_at_once(own_nut, pair_of):
    """When upsd ends a session its client sees the end, and when a client goes upsd's login goes with it."""
    pair = pair_of(own_nut)
    with PlainClient(pair.client_port) as client:
        client.login(PRIMARY)
        assert client.ask("LOGIN ups") == b"OK\n"
        wait_login(own_nut, 1)
    wait_login(own_nut, 0)
    with PlainClient(pair.client_port) as client:
        client.login(PRIMARY)
        own_nut.kill()
        assert client.recv_until_close(5) == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(nut, pki, number):
    """TERM and INT end sessions and ports, exit with 0 and leave neither pidfile nor socket behind."""
    with Shim(pair_config(nut.port, pki)) as shims:
        with PlainClient(shims.port("client")) as client:
            assert client.ask("NETVER") == b"1.3\n"
            left = set(os.listdir(shims.folder))
            assert "nutshim.pid" in left
            shims.signal(number)
            assert client.recv_until_close() == b""
        assert shims.wait(5) == 0
        assert os.listdir(shims.folder) == ["nutshim.conf"]
        assert "Traceback" not in shims.log
        with pytest.raises(ConnectionRefusedError):
            PlainClient(shims.port("client"))


def test_session_outlives_silence_and_bad_neighbours(rich, pki):
    """An established session survives silence longer than both handshake_timeouts, and neighbours that misbehave."""
    with Shim(pair_config(rich.port, pki, {"handshake_timeout": 1}, {"handshake_timeout": 1})) as shims:
        with PlainClient(shims.port("client")) as client, TlsClient(shims.port("server")) as direct:
            for each in (client, direct):
                each.login()
            with PlainClient(shims.port("server")) as mute, PlainClient(shims.port("server")) as slow:
                assert slow.ask("STARTTLS") == b"OK STARTTLS\n"
                for junk in (b"\x16\x03\x01\x00\x05", b"STARTTLS\nVER\n", b"x" * 5000, b"STARTTLS\n\0"):
                    with PlainClient(shims.port("server")) as neighbour:
                        neighbour.send(junk)
                        neighbour.recv_until_close()
                with PlainClient(shims.port("server")) as neighbour:
                    assert neighbour.ask("STARTTLS") == b"OK STARTTLS\n"
                    neighbour.reset()
                assert client.silent_for(2.5)
                assert mute.recv_until_close() == slow.recv_until_close() == b""
            for each in (client, direct):
                assert each.ask("SET TRACKING ON") == b"OK\n"   # still the session that has logged in
                assert each.ask("GET TRACKING") == b"ON\n"


def test_handshake_without_end_holds_up_nobody(rich, rich_pair):
    """While peers hang at every step of the handshake, others connect and are served."""
    with contextlib.ExitStack() as stack:
        for opening in (b"", b"START", b"STARTTLS\n", b"STARTTLS\n", b"STARTTLS\n", b"STARTTLS\n"):
            peer = stack.enter_context(PlainClient(rich_pair.port("server")))
            if opening:
                peer.send(opening)
            if opening.endswith(b"\n"):
                assert peer.recv_line() == b"OK STARTTLS\n"
                peer.send(b"\x16\x03\x01\x02\x00\x01")          # the beginning of a ClientHello
        answer = upsc(rich_pair.port("client"), "ups.status")
        assert answer.stdout == "OL\n", answer.stderr


def test_refused_upstream_ends_one_session_and_not_the_daemon(own_nut, pair_of):
    """While upsd is down each session ends by itself; once it is up the same process serves the next one."""
    pair = pair_of(own_nut)
    own_nut.stop()
    for _ in range(3):
        with PlainClient(pair.client_port) as client:
            client.send("VER\n")
            assert client.recv_until_close() == b""
    own_nut.start()
    with PlainClient(pair.client_port) as client:
        assert client.ask("NETVER") == b"1.3\n"
