# SPDX-License-Identifier: GPL-2.0-or-later
"""How connections begin and end at the edges: what comes in one segment with the TLS handshake or with
the end, close_notify in both directions, and a last word for NUT's own programs.

Real upsd and NUT's own clients; a false server where one has to end in a way that upsd never does.
"""

import socket
import ssl
import time

import pytest

from harness import (FalseServer, PlainClient, Relay, client_context, free_port, nut_program, patched, poll, run, status,
                     tls)


# ---- helpers ------------------------------------------------------------------------------------

class TlsByHand:
    """A TLS client over memory buffers: its test decides which bytes go into one segment."""

    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port), 5)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = client_context().wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.got = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def shake_but_for_the_last_flight(self):
        """STARTTLS and the handshake; our Finished stays in outgoing."""
        self.sock.sendall(b"STARTTLS\n")
        assert self.sock.recv(100) == b"OK STARTTLS\n"
        while True:
            try:
                return self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.sock.sendall(self.outgoing.read())
                self.incoming.write(self.sock.recv(65536))

    def say(self, commands, close=False):
        """Put commands, and our close_notify if asked for, behind what is in outgoing already; send all in one go."""
        if commands:
            self.tls.write(commands)
        if close:
            with pytest.raises(ssl.SSLWantReadError):
                self.tls.unwrap()
        self.sock.sendall(self.outgoing.read())

    def hear(self, until, seconds=5):
        """Read until these bytes have come or the server has ended; how it ended, None when it has not."""
        self.sock.settimeout(seconds)
        while not until or until not in self.got:
            try:
                data = self.tls.read(65536)
                if not data:
                    return "close_notify"
                self.got += data
            except ssl.SSLZeroReturnError:
                return "close_notify"
            except ssl.SSLWantReadError:
                data = self.sock.recv(65536)
                if not data:
                    return "no close_notify"
                self.incoming.write(data)
        return None


# ---- with the end of the handshake ---------------------------------------------------------------

@pytest.mark.parametrize("commands, last", [
    (b"NETVER\n", b"1.3\n"), (b"LIST VAR ups\n" * 3, b"END LIST VAR ups\n"), (b"LIST VAR ups\nLOGOUT\n", b"OK Goodbye\n")])
@pytest.mark.parametrize("close", [False, True], ids=["open", "with close_notify"])
def test_what_comes_with_the_end_of_the_handshake_is_answered_at_once(pair, nut, commands, last, close):
    """A client's Finished, its commands and its close_notify in one segment: every reply comes at once, then our close_notify.

    select() does not see what is in the TLS engine already, and the client sends nothing more.
    """
    with PlainClient(nut.port) as plain:
        expected = b"".join(plain.ask_list(line) for line in commands.decode().splitlines())
    for split in (False, True):                     # and with the commands in a segment of their own
        with TlsByHand(pair.server_port) as client:
            client.shake_but_for_the_last_flight()
            if split:
                client.say(b"")
            since = time.monotonic()
            client.say(commands, close)
            over = close or b"LOGOUT" in commands
            end = client.hear(b"" if over else expected)
            assert client.got == expected and client.got.endswith(last)
            assert end == ("close_notify" if over else None)
            assert time.monotonic() - since < 4     # not by the limit of 5 s for what is under way


# ---- close_notify --------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["LOGOUT", "close_notify", "FIN"])
def test_the_server_shim_ends_tls_by_close_notify(pair, how):
    """Whether the client says LOGOUT, its own close_notify or just FIN: it gets its reply whole, then ours (RFC 8446 6.1)."""
    with TlsByHand(pair.server_port) as client:
        client.shake_but_for_the_last_flight()
        client.say(b"LIST VAR ups\n" + (b"LOGOUT\n" if how == "LOGOUT" else b""), how == "close_notify")
        if how == "FIN":
            client.sock.shutdown(socket.SHUT_WR)
        assert client.hear(b"") == "close_notify"
        assert b"END LIST VAR ups\n" in client.got


def test_an_end_by_upsd_is_told_by_close_notify(pair_of, nut):
    """When upsd ends a session, its client gets close_notify, then FIN, and what it sends meanwhile resets nothing."""
    with Relay(nut.port) as relay:
        nut_by_relay = type("Upsd", (), {"port": relay.port})
        pair = pair_of(nut_by_relay)
        with TlsByHand(pair.server_port) as client:
            client.shake_but_for_the_last_flight()
            client.say(b"NETVER\n")
            assert client.hear(b"1.3\n") is None
            relay.cut()
            assert client.hear(b"") == "close_notify"
            for _ in range(3):
                client.say(b"NETVER\n")
                time.sleep(0.05)
            assert client.sock.recv(100) == b""     # FIN, no RST
        pair.shim.wait_log("closed: closed by upstream")


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_the_client_shim_ends_tls_by_close_notify(shim, pki, own):
    """An upstream gets the client shim's close_notify when a session of its own ends, or the shared one at the stop."""
    ends = []

    def watch(peer):
        peer.sock.suppress_ragged_eofs = False      # an end without close_notify is then an error
        peer.answer()
        ends.append("close_notify")
    with FalseServer(tls(pki.server, then=watch)) as upsd:
        one = shim({"front": {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % upsd.port,
                              "trust": pki.ca.cert, "server_name": "localhost"}})
        with PlainClient(one.port("front")) as client:
            assert client.ask("LOGIN ups" if own else "NETVER") == (b"ERR USERNAME-REQUIRED\n" if own else b"1.3\n")
        if not own:
            one.stop()
        poll(lambda: ends or upsd.errors, 5, "the end at the upstream")
        assert not upsd.errors


# ---- ends that a client is told of ---------------------------------------------------------------

def test_nuts_own_programs_say_so_when_there_is_no_upstream(shim, pki, nut_installed):      # pylint: disable=unused-argument
    """upsc, upscmd and upsrw behind a client shim without an upstream end with words, none of them by SIGPIPE."""
    one = shim({"front": {"role": "client", "listen": "127.0.0.1:%d" % free_port(), "trust": pki.ca.cert,
                          "upstream": "127.0.0.1:%d" % free_port()}})
    ups = "ups@127.0.0.1:%d" % one.port("front")
    login = ["-u", "admin", "-p", "adminpass"]
    for args in (["upsc", ups], ["upsc", "-l", ups[4:]], ["upscmd", "-l", ups], ["upscmd"] + login + [ups, "load.off"],
                 ["upsrw", ups], ["upsrw", "-s", "ups.mfr=x"] + login + [ups]):
        for _ in range(3):
            done = run(nut_program(args[0]), *args[1:])
            assert done.returncode > 0 and (done.stdout + done.stderr).strip(), (args, done)
    one.wait_log(r"closed: no upstream \(127\.0\.0\.1:\d+: Connection refused\)")


def test_a_client_is_given_time_to_end_itself(shim, pki):
    """A client that the shim has ended may still write, without a reset, until it ends its side; the status says ending."""
    one = shim({"front": {"role": "client", "listen": "127.0.0.1:%d" % free_port(), "trust": pki.ca.cert,
                          "upstream": "127.0.0.1:%d" % free_port()}})
    with PlainClient(one.port("front")) as client:
        client.send("VER\n")
        assert client.sock.recv(100) == b""
        for _ in range(3):
            client.send("LOGOUT\n")
            time.sleep(0.02)
        assert client.sock.recv(100) == b""
        assert [each["state"] for each in status(one)["sessions"]] == ["ending"]
    poll(lambda: not status(one)["sessions"], 3, "the session's end, well within the limit of 5 s")


def test_a_client_that_never_ends_itself_is_closed_all_the_same(shim, pki, tmp_path):
    """One that holds its side open after the shim's end goes after the limit, which is set from 5 s to 1 here."""
    script = patched(str(tmp_path), "nutshim.DRAIN_LIMIT = 1")
    one = shim({"front": {"role": "client", "listen": "127.0.0.1:%d" % free_port(), "trust": pki.ca.cert,
                          "upstream": "127.0.0.1:%d" % free_port()}}, script=script)
    with PlainClient(one.port("front")) as client:
        client.send("VER\n")
        assert client.sock.recv(100) == b""
        poll(lambda: not status(one)["sessions"], 4, "the session's end by the limit")
