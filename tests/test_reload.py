# SPDX-License-Identifier: GPL-2.0-or-later
"""Reload and stop of a running nutshim, by signal and by -c, around a real upsd.

Real processes throughout. Where a fault cannot be had for real, nutshim.py is started through a small
script that plants it: harness.patched().
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import threading
import time

from certs import Authority
from daemons import NO_FILE, as_root, read, refused, runs, server_section, turned_away, works
from harness import (FalseServer, PlainClient, TlsClient, client_context, command, folder, free_port, pair_config, patched,
                     poll, run_shim, silent, status, write)


# ---- reload -------------------------------------------------------------------------------------

def test_reload_takes_the_new_configuration_and_leaves_sessions_alone(shim, nut, pki):
    """New ports open, old ones close, a certificate is exchanged; sessions of sections changed or gone go on."""
    gone, stays = server_section(nut, pki), server_section(nut, pki)
    one = shim({"gone": gone, "stays": stays})
    old_port, port = one.port("gone"), one.port("stays")
    with TlsClient(old_port) as first, TlsClient(port) as second:
        assert first.ask("NETVER") == second.ask("NETVER") == b"1.3\n"
        own = second.sock.getpeercert(True)
        mark = one.mark()
        one.configure({"stays": dict(stays, certificate=pki.chained.file), "new": server_section(nut, pki)})
        done = command(one, "reload")
        assert done.returncode == 0 and "reloaded" in done.stdout, done.stderr
        one.wait_log("reloaded", start=mark)
        assert refused(old_port)
        assert works(one.port("new")) and works(port)
        with TlsClient(port) as third:
            assert own == pki.server.der and third.sock.getpeercert(True) == pki.chained.der
        assert first.ask("GET VAR ups ups.status") == second.ask("GET VAR ups ups.status") == b'VAR ups ups.status "OL"\n'
        assert {each["shim"] for each in status(one)["sessions"]} == {"gone", "stays"}


def test_reload_takes_new_revocation_lists(shim, nut, pki, tmp_path):
    """A client revoked since is refused after the reload, resumption or not, and its live session ends; others go on."""
    authority = Authority(str(tmp_path / "ca"), "/CN=Revoking CA")
    good, bad = authority.issue("good"), authority.issue("bad")
    config = {"shim": server_section(nut, pki, client_certificate="require", trust=authority.cert, crl=authority.crl())}
    one = shim(config)
    port = one.port("shim")
    context = client_context(certificate=bad)
    with TlsClient(port, context=context) as live, TlsClient(port, certificate=good) as other:
        assert live.ask("NETVER") == other.ask("NETVER") == b"1.3\n"
        ticket = live.sock.session
        assert ticket.has_ticket
        with TlsClient(port, context=context, session=ticket) as again:
            assert again.ask("NETVER") == b"1.3\n" and again.sock.session_reused
            ticket = again.sock.session
        authority.revoke(bad)
        authority.crl()
        assert command(one, "reload").returncode == 0
        assert live.recv_until_close() == b"" and other.ask("NETVER") == b"1.3\n"
        one.wait_log(r"#1 .*closed: the peer's certificate is revoked \(CN=bad")
        assert turned_away(port, context=context)
        assert turned_away(port, context=context, session=ticket)
        assert not turned_away(port, certificate=good)
        one.wait_log("its certificate, or its issuer's, is revoked")


def test_a_reload_ends_sessions_with_a_server_revoked_since(shim, nut, pki, tmp_path):
    """A client shim leaves the server whose certificate crl has after the reload, with sessions of their own and with the shared one."""
    authority = Authority(str(tmp_path / "ca"), "/CN=Revoking CA")
    server, config = authority.issue("localhost", "DNS:localhost"), pair_config(nut.port, pki)
    config["server"]["certificate"] = server.file
    config["client"].update(trust=authority.cert, crl=authority.crl(), verify="chain")
    one = shim(config)
    with PlainClient(one.port("client")) as own, PlainClient(one.port("client")) as sharing:
        assert own.ask("USERNAME x") == b"OK\n" and sharing.ask("NETVER") == b"1.3\n"
        authority.revoke(server)
        authority.crl()
        assert command(one, "reload").returncode == 0
        assert own.recv_until_close() == b""
        one.wait_log(r"\[client\] #\d+ .*closed: the peer's certificate is revoked \(CN=localhost, DNS:localhost\)")
        sharing.send("NETVER\n")
        assert sharing.recv_until_close() == b""
        one.wait_log(r"closed: no upstream .*is revoked")


def test_a_handshake_under_way_does_not_outlive_a_revocation(shim, nut, pki, tmp_path):
    """Whoever is in the middle of the handshake when a reload brings a list with its certificate is refused as well."""
    authority = Authority(str(tmp_path / "ca"), "/CN=Revoking CA")
    bad = authority.issue("bad")
    one = shim({"shim": server_section(nut, pki, client_certificate="require", trust=authority.cert, crl=authority.crl())})
    with PlainClient(one.port("shim")) as plain:
        assert plain.ask("STARTTLS") == b"OK STARTTLS\n"
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context(certificate=bad).wrap_bio(incoming, outgoing, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        plain.sock.sendall(outgoing.read())
        while outgoing.pending == 0:                # its certificate, held back
            incoming.write(plain.sock.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
        authority.revoke(bad)
        authority.crl()
        assert command(one, "reload").returncode == 0
        plain.sock.sendall(outgoing.read())
        one.wait_log(r"#1 .*closed: the peer's certificate is revoked \(CN=bad")


def status_by_socket(shim):
    """The status of a daemon whose configuration file is gone: asked with another file that names its pidfile."""
    with folder("conf") as path:
        done = run_shim("-c", "status", "--json", "-f",
                        write(path + "/nutshim.conf", "pidfile = %s/nutshim.pid\n" % shim.folder))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def test_a_faulty_reload_changes_nothing_and_says_why(shim, nut, pki, tmp_path):
    """Whatever is wrong, -c reload exits 1 with FILE:LINE and the fault, and all goes on as before."""
    section = server_section(nut, pki)
    one = shim({"": {"max_sessions": 20}, "shim": section})
    port, taken, never = one.port("shim"), socket.socket(), free_port()
    taken.bind(("127.0.0.1", 0))
    taken.listen(1)
    broken = write(str(tmp_path / "broken.pem"), read(pki.server.file).replace("M", "?"))
    with open(pki.other_client.key, encoding="ascii") as key, open(pki.server.cert, encoding="ascii") as cert:
        foreign = write(str(tmp_path / "foreign.pem"), key.read() + cert.read())
    cases = [
        (dict(section, lissten="*:1"), r"nutshim\.conf:\d+:.* lissten"),
        (dict(section, min_tls="1.4"), r"nutshim\.conf:\d+:.* min_tls: expected 1\.3 or 1\.2"),
        (dict(section, certificate=str(tmp_path / "none.pem")), r"nutshim\.conf:\d+:.*none\.pem: " + NO_FILE),
        (dict(section, certificate=broken), r"nutshim\.conf:\d+:.*broken\.pem"),
        (dict(section, certificate=foreign), r"nutshim\.conf:\d+:.*foreign\.pem.*does not belong"),
        (dict(section, certificate=pki.server.cert), r"(?i)nutshim\.conf:\d+:.*expected.*private key"),
        (dict(section, listen="127.0.0.1:%d, 127.0.0.1:%d" % (never, taken.getsockname()[1])),
         r"nutshim\.conf:\d+:.*127\.0\.0\.1:%d.*in use" % taken.getsockname()[1]),
        (dict(section, listen="127.0.0.1:%d, *:%d" % (never, never)), r"nutshim\.conf:\d+:.*0\.0\.0\.0:%d: \[shim\] listens" % never),
        (dict(section, listen="*:%d" % port), r"nutshim\.conf:\d+:.*nutshim itself listens on 127\.0\.0\.1:%d" % port),
        (dict(section, listen="no.such.host.invalid:401"), r"nutshim\.conf:\d+:.*no\.such\.host\.invalid"),
    ]
    with contextlib.closing(taken), TlsClient(port) as live:
        before = status(one)
        for faulty, pattern in cases:
            one.configure({"": {"max_sessions": 1}, "shim": faulty, "more": server_section(nut, pki)})
            mark = one.mark()
            done = command(one, "reload")
            assert done.returncode == 1 and done.stdout == ""
            assert re.search(pattern, done.stderr) and "Traceback" not in done.stderr, done.stderr
            one.wait_log(pattern, start=mark)       # the log has the same text
            assert live.ask("NETVER") == b"1.3\n" and works(port) and refused(never)
        os.unlink(one.config)
        done = command(one, "reload")
        assert done.returncode == 1
        after = status_by_socket(one)
        for key in ("name", "listen", "upstream", "certificates"):
            assert [each[key] for each in after["shims"]] == [each[key] for each in before["shims"]]
        assert len(one.ports("more")) == 0


@as_root
def test_a_file_whose_name_is_not_utf_8_is_named_all_the_same(shim, pki, tmp_path):
    """-c reload and the log tell of a fault in a file of trust whose name is Latin-1."""
    trust = str(tmp_path / "trust")
    os.mkdir(trust)
    shutil.copy(pki.ca.cert, trust)
    name = os.path.join(os.fsencode(trust), b"caf\xe9.pem")
    shutil.copy(os.fsencode(pki.ca.cert), name)
    one = shim({"client": {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:1", "trust": trust}})
    with open(name, "ab") as file:
        file.write(b"-----BEGIN CERTIFICATE-----\n")
    done = command(one, "reload", timeout=60)
    assert done.returncode == 1 and "caf\\udce9.pem: line" in done.stderr, done.stderr
    one.wait_log(re.escape("caf\\udce9.pem: line"))


def test_an_unreadable_key_fails_the_reload_alone(daemon, nut, pki, account, python_for_all):
    """A key that only root may read is read at start, fails a later reload with words, and the old one goes on."""
    shim = daemon({"": {"user": "nut"}, "shim": server_section(nut, pki)}, python=python_for_all)
    port = shim.port("shim")
    with TlsClient(port) as live:
        done = command(shim, "reload")
        assert done.returncode == 1
        assert re.search(r"nutshim\.conf:\d+: .*%s: Permission denied" % re.escape(pki.server.file), done.stderr), done.stderr
        assert re.search(r"%s: nut cannot read it.*'chgrp %d " % (re.escape(pki.server.file), account.pw_gid), done.stderr), done.stderr
        assert live.ask("NETVER") == b"1.3\n" and works(port)


# ---- stop ---------------------------------------------------------------------------------------

def test_stop_closes_everything_properly(shim, nut, pki):
    """TERM: ports closed, sessions ended with close_notify, STOP in the log, exit 0, pidfile and status socket gone."""
    one = shim(pair_config(nut.port, pki))
    with TlsClient(one.port("server")) as tls, PlainClient(one.port("client")) as plain:
        assert tls.ask("NETVER") == plain.ask("NETVER") == b"1.3\n"
        tls.sock.suppress_ragged_eofs = False       # a missing close_notify is then an error
        one.stop()
        assert tls.sock.recv(1) == plain.sock.recv(1) == b""
    assert refused(one.port("server")) and refused(one.port("client"))
    assert [name for name in os.listdir(one.folder) if name != "nutshim.conf"] == []
    assert "stopped" in one.lines[-1]


LOOKUP_THAT_HANGS = """
import socket, time
real = socket.getaddrinfo
def getaddrinfo(host, *more):
    if host in (b"hangs.invalid", "hangs.invalid"):
        time.sleep(600)
    return real(host, *more)
socket.getaddrinfo = getaddrinfo
"""


def test_nothing_delays_the_end(shim, pki, tmp_path):
    """TERM ends it in 3 s with 0 whatever hangs: a reply that never comes, a handshake, a look-up, a peer that reads nothing."""
    with FalseServer(silent) as upsd, FalseServer(lambda peer: peer.send(b"x" * (8 << 20))) as flood:
        one = shim({
            "silent": {"role": "server", "listen": "127.0.0.1:%d" % free_port(), "upstream": "127.0.0.1:%d" % upsd.port,
                       "certificate": pki.server.file},
            "flood": {"role": "server", "listen": "127.0.0.1:%d" % free_port(), "upstream": "127.0.0.1:%d" % flood.port,
                      "certificate": pki.server.file},
            "lost": {"role": "client", "listen": "127.0.0.1:0", "upstream": "hangs.invalid", "verify": "none",
                     "handshake_timeout": 60}}, script=patched(str(tmp_path), LOOKUP_THAT_HANGS))
        with TlsClient(one.port("silent")) as owed, PlainClient(one.port("silent")) as shaking, \
                TlsClient(one.port("flood")) as stuck, PlainClient(one.port("lost")) as lost:
            owed.send("VER\n")
            shaking.send("STARTTLS\n")
            assert shaking.recv_line() == b"OK STARTTLS\n"
            stuck.send("VER\n")
            lost.send("VER\n")
            poll(lambda: upsd.peers and b"VER" in upsd.peers[0].received, 5, "the command at upsd")
            poll(lambda: len(status(one)["sessions"]) == 4, 5, "four sessions")
            one.stop(within=3)


def test_a_signal_among_hundreds_is_not_lost(shim, nut, pki, tmp_path):
    """TERM ends it although hundreds of other signals came before it, all of them during a reload that took long."""
    section, fifo = server_section(nut, pki), str(tmp_path / "fifo.pem")
    os.mkfifo(fifo)
    one = shim({"shim": section})
    one.configure({"shim": dict(section, certificate=fifo)})

    def pending():
        with open("/proc/%d/status" % one.pid, encoding="ascii", errors="replace") as file:
            return int(re.search(r"ShdPnd:\s*(\w+)", file.read()).group(1), 16)
    one.signal(signal.SIGHUP)
    writer = os.open(fifo, os.O_WRONLY)             # waits until the reload reads the certificate
    for number in 600 * [signal.SIGHUP] + [signal.SIGTERM]:
        one.signal(number)
        poll(lambda: not pending(), 5, "the signal's arrival")
    os.close(writer)
    assert one.wait(5) == 0


def test_a_reload_from_one_address_to_all_says_that_it_takes_a_restart(shim, nut, pki):
    """Where the running nutshim itself is in the way of a new address, a reload says so and changes nothing."""
    port = free_port()
    one = shim({"shim": server_section(nut, pki, listen="127.0.0.1:%d" % port)})
    one.configure({"shim": server_section(nut, pki, listen="0.0.0.0:%d" % port)})
    done = command(one, "reload")
    assert done.returncode == 1 and re.search(r"listen: 0\.0\.0\.0:%d: .*nutshim itself.*restart" % port, done.stderr)
    assert works(port)


def test_a_reload_during_the_stop_is_refused(shim, pki):
    """HUP and -c reload while it stops change nothing: the reply under way arrives, it ends with 0, and says so."""
    answer = threading.Event()

    def slow(peer):
        peer.recv_line()
        answer.wait(10)
        peer.send(b"late but whole\n")
        peer.hang()
    with FalseServer(slow) as upsd:
        one = shim({"shim": {"role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % upsd.port,
                             "certificate": pki.server.file}})
        with TlsClient(one.port("shim")) as client:
            client.send("VER\n")                    # a reply that is owed keeps the stop waiting
            poll(lambda: upsd.peers and b"VER" in upsd.peers[0].received, 5, "the command at upsd")
            since = time.monotonic()
            one.signal(signal.SIGTERM)
            one.wait_log("stopping")
            one.signal(signal.SIGHUP)
            done = command(one, "reload")
            one.signal(signal.SIGHUP)
            answer.set()
            assert done.returncode == 1 and re.search("stopping|no .*nutshim answers", done.stderr)
            if time.monotonic() - since < 1.5:      # else the grace of 2 s may have been over
                assert client.recv_until_close() == b"late but whole\n"
            assert one.wait(3) == 0
        assert "reloaded" not in one.log and refused(one.port("shim"))


def test_stop_returns_when_the_next_start_can_follow(daemon, nut, pki):
    """-c stop exits 0 only when the daemon is gone, though a reply is owed, so that a start right behind it succeeds."""
    with FalseServer(silent) as upsd:
        shim = daemon({"shim": server_section(nut, pki),
                       "silent": server_section(nut, pki, upstream="127.0.0.1:%d" % upsd.port)})
        with TlsClient(shim.port("silent")) as client:
            client.send("VER\n")
            poll(lambda: upsd.peers and b"VER" in upsd.peers[0].received, 5, "the command at upsd")
            for _ in range(2):
                pid = shim.pid
                done = command(shim, "stop")
                assert done.returncode == 0 and "stop" in done.stdout, done.stderr
                done = shim.start()
                assert done.returncode == 0 and not runs(pid), done.stderr
    assert works(shim.port("shim"))


def test_commands_without_a_daemon_exit_1_with_words(daemon, nut, pki):
    """-c reload, stop and status with no daemon running say where they looked and exit 1; an unknown word is usage, 2."""
    shim = daemon({"shim": server_section(nut, pki)}, start=False)
    for killed in (False, True):
        if killed:                                  # pidfile and socket are there, nobody behind them
            assert shim.start().returncode == 0
            os.kill(shim.pid, signal.SIGKILL)
            poll(lambda: not runs(shim.pid), 5)
        for word in ("reload", "stop", "status"):
            done = command(shim, word)
            assert done.returncode == 1 and done.stdout == "", word
            assert re.search("no .*nutshim.*%s" % re.escape(shim.folder), done.stderr), done.stderr
    assert command(shim, "restart").returncode == 2
