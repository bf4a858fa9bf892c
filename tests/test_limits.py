# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits of sessions, descriptors, memory and time, and faults nobody foresaw.

Real processes throughout. Where a fault cannot be had for real, nutshim.py is started through a small
script that plants it: harness.patched().
"""

import collections
import contextlib
import ipaddress
import os
import re
import resource
import sys
import time
import types

import pytest

from daemons import NO_DESCRIPTOR, PLANTED, STAMP, keepalive_timers, proc_status, server_section, turned_away
from harness import (ROOT, PlainClient, TlsClient, client_context, command, free_port, pair_config, patched, poll, run,
                     shim_status, status, write)

sys.path.insert(0, ROOT)

from nutshim import Reason, address_place  # noqa: E402
from nutshim import Shim as RuntimeShim  # noqa: E402


# ---- limits -------------------------------------------------------------------------------------

def shut_out(port, address="127.0.0.1"):
    """True if a client from that address is closed at once."""
    with PlainClient(port, source=(address, 0)) as client:
        return client.recv_until_close() == b""


def test_sessions_are_limited_in_all_and_by_address(shim, nut, pki):
    """One more than max_sessions_per_address or max_sessions is closed at once, logged once and counted; others go on."""
    config = {"": {"max_sessions": 5}, "shim": server_section(nut, pki, max_sessions_per_address=3),
              "front": {"role": "client", "listen": "127.0.0.1:0", "trust": pki.ca.cert}}
    config["front"]["upstream"] = config["shim"]["listen"].replace("127.0.0.1", "localhost")
    one = shim(config)
    port, front = one.port("shim"), one.port("front")
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(TlsClient(port)) for _ in range(3)]
        assert [client.ask("NETVER") for client in first] == [b"1.3\n"] * 3    # else one may be a stranger still
        for _ in range(20):
            assert shut_out(port)
        first.pop().close()
        poll(lambda: len(status(one)["sessions"]) == 2, 5)
        for number in (2, 3):                       # and with the session that they share it is five
            first.append(stack.enter_context(PlainClient(front, source=("127.0.0.%d" % number, 0))))
            assert first[-1].ask("NETVER") == b"1.3\n"
        for _ in range(10):
            assert shut_out(port, "127.0.0.4") and shut_out(front, "127.0.0.4")
        assert [client.ask("NETVER") for client in first] == [b"1.3\n"] * 4
        counts = [shim_status(one, name)["refused"] for name in ("shim", "front")]
        assert counts == [{"max_sessions_per_address reached": 20, "max_sessions reached": 10}, {"max_sessions reached": 10}]
        poll(lambda: one.log.count("refused") >= 3, 5, "the refusals in the log")
        assert one.log.count("refused") == 3        # one line for each reason, not one for each peer
        first.pop(0).close()
        poll(lambda: len(status(one)["sessions"]) == 4, 5)
        assert not turned_away(port)
    poll(lambda: len(status(one)["sessions"]) == 1, 5, "no session left but the shared one")


@pytest.mark.parametrize("limit", ["max_sessions", "max_sessions_per_address"])
@pytest.mark.parametrize("role", ["server", "client"])
def test_silent_strangers_make_room_for_newcomers(shim, nut, pki, role, limit):
    """At a limit the oldest connection without TLS, or behind a client shim without a command, goes; no other ever does."""
    own = 3                                         # sessions beside the strangers, for max_sessions to count
    config = {"": {"max_sessions": own + 4 if limit == "max_sessions" else 100}}
    config.update(pair_config(nut.port, pki, {"max_sessions_per_address": 100, "handshake_timeout": 60},
                              {"max_sessions_per_address": 100}))
    if limit == "max_sessions_per_address":
        config[role][limit] = 5
    one = shim(config)
    port, connect = one.port(role), TlsClient if role == "server" else PlainClient
    with contextlib.ExitStack() as stack:
        paired = stack.enter_context(PlainClient(one.port("client")))       # with the shared session two
        assert paired.ask("NETVER") == b"1.3\n"
        known = stack.enter_context(connect(port))
        assert known.ask("NETVER") == b"1.3\n"
        strangers = []
        for number in range(4 if limit == "max_sessions" else 3):
            strangers.append(stack.enter_context(PlainClient(port)))
            if number == 1 and role == "server":
                strangers[1].send("STARTTLS\n")     # half-way is not there yet
                assert strangers[1].recv_line() == b"OK STARTTLS\n"
            poll(lambda number=number: len(status(one)["sessions"]) == own + number + 1, 15)
        newcomers = []
        for number, oldest in enumerate(strangers, 1):
            newcomers.append(stack.enter_context(connect(port)))
            assert newcomers[-1].ask("NETVER") == b"1.3\n"
            assert oldest.recv_until_close() == b""
            assert all(other.silent_for(0.01) for other in strangers[number:])
        assert shut_out(port)                       # only sessions with something to lose are left
        assert [each.ask("NETVER") for each in [paired, known] + newcomers] == [b"1.3\n"] * (2 + len(newcomers))
        assert shim_status(one, role)["refused"] == {
            "silent, and a newer connection needed its place": len(strangers), "%s reached" % limit: 1}
    one.wait_log("silent, and a newer connection needed its place")


def test_who_is_not_admitted_keeps_nobody_out(shim, nut, pki):
    """Peers whom permit refuses, and who do not end their connections, make room for one that comes after them."""
    one = shim({"": {"max_sessions": 3}, "shim": server_section(
        nut, pki, client_certificate="request", trust=pki.ca.cert, permit="CN=client.example: admin")})
    port = one.port("shim")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            refused = stack.enter_context(TlsClient(port))
            assert refused.recv_line() == b"ERR ACCESS-DENIED\n"
        with TlsClient(port, certificate=pki.client) as client:
            assert client.ask("NETVER") == b"1.3\n"


@pytest.mark.parametrize("one, other, same", [
    ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", True), ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
    ("fe80::1%eth0", "fe80::2%eth1", True), ("::1", "::2", True), ("192.0.2.1", "192.0.2.2", False)])
def test_an_ipv6_network_of_64_bits_counts_as_one_address(one, other, same):
    """Whoever has a /64 of IPv6 has as many addresses as he likes (RFC 4291 2.5.4); IPv4 counts by the address."""
    assert (address_place(one) == address_place(other)) == same


@pytest.mark.parametrize("host, admitted", [
    ("192.0.2.1", True), ("fd00::ffff:1", True), ("fd00::1%eth0", True), ("192.0.3.1", False), ("fe00::ffff:1", False)])
def test_allow_from_reads_every_form_of_an_address(host, admitted):
    """An address is read whatever is in it."""
    shim = types.SimpleNamespace(
        conf=types.SimpleNamespace(allow_from=list(map(ipaddress.ip_network, ("192.0.2.0/24", "fd00::/8"))),
                                   max_sessions_per_address=1),
        loop=types.SimpleNamespace(sessions=(), max_sessions=1), addresses=collections.Counter())
    assert RuntimeShim.refusal(shim, host, address_place(host)) is (None if admitted else Reason.ALLOW_FROM)


DESCRIPTORS = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, %s))
"""


def test_the_limit_of_descriptors_is_raised_for_max_sessions(shim, nut, pki, tmp_path):
    """Started with a soft limit of 64 open files, or as root with a hard one too, it raises it for max_sessions."""
    raises = run(sys.executable, "-c", DESCRIPTORS % 64 + "resource.setrlimit(resource.RLIMIT_NOFILE, (640, 640))")
    for hard in (["1000"] if raises.returncode else ["1000", "64"]):
        one = shim({"": {"max_sessions": 300}, "shim": server_section(nut, pki)},
                   script=patched(str(tmp_path), DESCRIPTORS % hard))
        poll(lambda: resource.prlimit(one.pid, resource.RLIMIT_NOFILE)[0] >= 2 * 300, 5, "a higher limit")
        assert "limit of open files" not in one.log


NO_RAISE = DESCRIPTORS % 64 + """
def setrlimit(*_):
    raise ValueError("not allowed to raise maximum limit")
resource.setrlimit = setrlimit
"""


def test_a_limit_of_descriptors_that_cannot_be_raised_holds_max_sessions(shim, nut, pki, tmp_path):
    """Where the limit stays at 64 open files, sessions are held to what it bears, said at the start; they all work.

    Root may raise any limit, so that it fails is planted.
    """
    one = shim({"": {"max_sessions": 300}, "shim": server_section(nut, pki)}, script=patched(str(tmp_path), NO_RAISE))
    found = one.wait_log(r"warning: \S+nutshim\.conf:\d+: max_sessions: the limit of open files allows only (\d+) sessions")
    bears = int(found.group(1))
    assert 5 < bears < 32
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(TlsClient(one.port("shim"))) for _ in range(bears)]
        assert [client.ask("NETVER") for client in clients] == [b"1.3\n"] * bears
        assert shut_out(one.port("shim"))
        assert command(one, "reload").returncode == 0           # for which descriptors are left
        assert shim_status(one, "shim")["refused"] == {"max_sessions reached": 1}


# A descriptor is wanted and not there only by a fault of the design, so the room for it is overstated.
BOUNDLESS = NO_RAISE + "nutshim.raise_descriptor_limit = lambda max_sessions: max_sessions\n" + PLANTED


def test_without_descriptors_running_sessions_go_on(shim, nut, pki, tmp_path):
    """With 64 descriptors and none left: running sessions go on, even beside a bug in one of them; new ones wait or end,
    with one log line in 10 s, and nothing spins; with descriptors again new sessions work."""
    config = pair_config(nut.port, pki, {"max_sessions_per_address": 500}, {"max_sessions_per_address": 500})
    one = shim(config, script=patched(str(tmp_path), BOUNDLESS))
    one.expect_traceback = True
    port = one.port("server")
    with TlsClient(port) as direct, PlainClient(one.port("client")) as paired, contextlib.ExitStack() as stack:
        victim = stack.enter_context(TlsClient(port))
        assert direct.ask("NETVER") == paired.ask("NETVER") == victim.ask("NETVER") == b"1.3\n"

        def go_on():
            for _ in range(5):
                assert direct.ask("NETVER") == paired.ask("NETVER") == b"1.3\n"
        for number in range(90):                    # fills all with peers that wait in the greeting
            stack.enter_context(PlainClient(port))
            if number % 30 == 0:
                go_on()
        one.wait_log("a new session is refused: " + NO_DESCRIPTOR)
        go_on()
        before, since = one.cpu(), time.monotonic()
        assert direct.silent_for(1.5)
        assert one.cpu() - before < 0.3 * (time.monotonic() - since), "it spins"
        assert len(re.findall(NO_DESCRIPTOR, one.log)) == 1
        victim.send("GET VAR ups PLANTED-client\n")
        assert victim.recv_until_close() == b""
        one.wait_log("planted fault")
        go_on()
        stack.close()
        poll(lambda: not turned_away(port), 10, "a new session")
        go_on()
        mark = one.mark()
        for _ in range(60):                         # sessions of their own upstream take four here
            client = PlainClient(one.port("client"))
            stack.callback(client.close)
            with contextlib.suppress(OSError):
                client.send("USERNAME me\n")
        go_on()
        assert len([line for line in one.lines[mark:] if "a new session is refused" in line]) <= 1
        stack.close()
        poll(lambda: not turned_away(port), 10, "a new session")
        go_on()
    one.wait_log("Traceback")
    assert one.log.count("Traceback") == 1, one.log     # the planted one


def test_without_memory_running_sessions_go_on(shim, nut, pki):
    """With hardly any memory left: new sessions are refused, with one log line in 10 s, running ones go on, and it recovers."""
    one = shim(dict({"": {"max_sessions": 5000}}, **pair_config(nut.port, pki, {"max_sessions_per_address": 5000})))
    port, context = one.port("server"), client_context()
    with TlsClient(port) as direct, PlainClient(one.port("client")) as paired, contextlib.ExitStack() as stack:
        assert direct.ask("NETVER") == paired.ask("NETVER") == b"1.3\n"
        before = resource.prlimit(one.pid, resource.RLIMIT_AS)
        size = 1024 * int(proc_status("/proc/%d" % one.pid, "VmSize")[0])
        resource.prlimit(one.pid, resource.RLIMIT_AS, (size + (2 << 20), before[1]))
        lost = 0
        for _ in range(1000):
            try:
                stack.enter_context(TlsClient(port, context=context))
            except (OSError, AssertionError):
                lost += 1
            assert direct.ask("NETVER") == paired.ask("NETVER") == b"1.3\n"
            if lost == 20:
                break
        assert lost == 20, "memory never ran out"
        assert len([line for line in one.lines if re.search("refused|memory", line)]) <= 2
        resource.prlimit(one.pid, resource.RLIMIT_AS, before)
        assert not turned_away(port)
        assert any("memory" in reason for reason in shim_status(one, "server")["refused"])
        assert direct.ask("NETVER") == paired.ask("NETVER") == b"1.3\n"


def test_dead_peers_are_noticed_on_both_sides(shim, nut, pki):
    """TCP keepalive, of less than a minute, runs on every connection: of clients, between the shims, and to upsd."""
    one = shim(pair_config(nut.port, pki))
    with TlsClient(one.port("server")) as tls, PlainClient(one.port("client")) as plain:
        assert tls.ask("NETVER") == plain.ask("NETVER") == b"1.3\n"
        poll(lambda: keepalive_timers(one.pid) == {"keepalive"}, 5, lambda: "keepalive on all, not %s" % keepalive_timers(one.pid))


def test_idle_sessions_are_closed_and_busy_ones_not(shim, nut, pki):
    """idle_timeout ends a session that said nothing for so long, in both roles, but not one that talks."""
    config = pair_config(nut.port, pki, client={"idle_timeout": 1, "reuse": 0})
    config["short"] = dict(config["server"], listen="127.0.0.1:%d" % free_port(), idle_timeout=1)
    one = shim(config)
    with TlsClient(one.port("short")) as tls, PlainClient(one.port("client")) as plain, \
            TlsClient(one.port("short")) as busy_tls, PlainClient(one.port("client")) as busy_plain:
        assert tls.ask("NETVER") == plain.ask("NETVER") == b"1.3\n"
        end = time.monotonic() + 1.6
        while time.monotonic() < end:
            assert busy_tls.ask("NETVER") == busy_plain.ask("NETVER") == b"1.3\n"
            assert busy_tls.silent_for(0.1)
        assert tls.recv_until_close(1) == plain.recv_until_close(1) == b""
    poll(lambda: set(re.findall(r"\[([a-z]+)\] .*closed: idle", one.log)) == {"short", "client"}, 5,
         lambda: "both ends in:\n" + one.log)


# ---- faults nobody foresaw ----------------------------------------------------------------------

def test_an_exception_nobody_foresaw_ends_its_session_alone(shim, nut, pki, tmp_path):
    """Wherever it strikes: a traceback at error level, that session closed and forgotten, and nothing else."""
    flags = str(tmp_path / "fault-")
    config = pair_config(nut.port, pki, {"max_sessions_per_address": 8}, {"max_sessions_per_address": 4, "reuse": 0})
    config["sharing"] = dict(config["client"], reuse=30)
    one = shim(config, script=patched(str(tmp_path), PLANTED), env={"PLANTED": flags})
    one.expect_traceback = True
    port, client_port = one.port("server"), one.port("client")
    with TlsClient(port) as tls, PlainClient(client_port) as plain:
        def strikes(victim, words="VER\n", at=client_port):
            """The victim's session ends, a traceback is in the log, and the bystanders do not notice."""
            mark = one.mark()
            with victim(port if victim is TlsClient else at) as client:
                client.send(words)
                client.recv_until_close()
            poll(lambda: "planted fault" in "\n".join(one.lines[mark:]), 5, "the traceback")
            text = "\n".join(one.lines[mark:]).partition("RuntimeError: planted fault")[0]
            assert re.findall(STAMP + r"(\w+): ", text)[-1] == "error" and "Traceback" in text
            assert tls.ask("NETVER") == plain.ask("NETVER") == b"1.3\n"

        for _ in range(6):                          # more than fit the limits, if one were not forgotten
            for words in ("GET VAR ups PLANTED-client\n", "GET CMDDESC ups PLANTED-upstream\n"):
                strikes(TlsClient, words)
                strikes(PlainClient, words)
            strikes(lambda _: PlainClient(port), "PLANTED-greeting\n")
        for place in ("Conversation", "starttls_reply", "read_certificate"):
            write(flags + place, "")
            for _ in range(6):
                strikes(PlainClient)
            if place != "Conversation":             # of which the shared session has none
                for _ in range(6):
                    strikes(PlainClient, at=one.port("sharing"))
            os.unlink(flags + place)
        assert len(status(one)["sessions"]) == 3    # the two bystanders, one of them in both shims
        found = {each["name"]: each["sessions"] for each in status(one)["shims"]}
        assert found == {"server": 2, "client": 1, "sharing": 0}
        for name in ("client", "sharing"):
            with PlainClient(one.port(name)) as client:
                assert client.ask("NETVER") == b"1.3\n"


CLOCK = """
import time
real_time = time.time
def shifted():
    with open(%r) as file:
        return real_time() + float(file.read())
time.time = shifted
"""


def test_a_clock_that_jumps_disturbs_no_session(shim, nut, pki, tmp_path):
    """The clock set back a year, or forward ten: sessions and timeouts go on by the time that passes."""
    offset = write(str(tmp_path / "offset"), "0")
    one = shim(pair_config(nut.port, pki, {"idle_timeout": 4}, {"idle_timeout": 100}),
               script=patched(str(tmp_path), CLOCK % offset))
    with TlsClient(one.port("server")) as idle, PlainClient(one.port("client")) as busy_client:
        for years in (-1, 10):
            os.replace(write(offset + ".new", str(years * 365.25 * 86400)), offset)
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                assert busy_client.ask("NETVER") == b"1.3\n"
            assert idle.ask("NETVER") == b"1.3\n"
            found = status(one)
            assert len(found["sessions"]) == 3 and all(0 <= each["seconds"] < 60 for each in found["sessions"])
        with PlainClient(one.port("client")) as client:
            assert client.ask("NETVER") == b"1.3\n"
        since = time.monotonic()
        assert idle.recv_until_close(10) == b"" and time.monotonic() - since > 0.5
