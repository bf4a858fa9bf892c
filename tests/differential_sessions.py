#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Random conversations through both shims, compared with those of a direct connection to the same upsd.

tests/differential_sessions.py [-n CONVERSATIONS] [-s SEED]: the long run, of some minutes; it
prints each round and exits 1 at the first difference. tests/test_shared.py runs a short one.

What holds for every client, whatever happens to upsd or to the line between the shims:
- it gets the bytes that upsd gives to a direct connection; where its connection ended early, the
  beginning of these and then the end; never a byte of another's replies;
- upsd hears a command that is not a stateless question only on a connection of that client's own.

upsd is the real one. The line between the shims and the one in front of upsd are relays (lines.py).
"""

import argparse
import collections
import contextlib
import random
import re
import selectors
import socket
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True

# pylint: disable=wrong-import-position
import standin
from certs import Pki
from harness import PRIMARY, Nut, PlainClient, Shim, free_port, many_variables, pair_config, poll
from lines import Path
from wire import reset

# Two habits of upsd 2.8.0 are left out, since there its replies depend on how the bytes are cut into reads,
# so that two direct connections differ as well: it forgets the rest of a read behind a # in quotes, and it
# goes on after LOGOUT where a command stands behind it in one read. Nor does STARTTLS come after a line
# that upsds read in different ways (odd): the shim does not count replies then, and answers it at once.

QUESTIONS = [
    "VER", "NETVER", "PROTVER", "HELP", "ver", "get var ups ups.status", "GET VAR ups ups.mfr", "GET VAR UPS Ups.Model",
    "GET  VAR ups  battery.charge", "GET VAR ups nothing", "GET VAR nobody x",
    "GET VAR ups ups.model", "GET DESC ups ups.status", "GET TYPE ups ups.status", "GET UPSDESC ups", "GET UPSDESC nobody",
    "GET VAR ups ups.status\r", "LIST UPS", "LIST VAR ups", "list  var UPS", "LIST RW ups", "LIST CMD ups", "LIST VAR page",
    "LIST VAR nobody", "LIST ENUM ups ups.status", "LIST RANGE ups ups.status",
    "GET CMDDESC ups tag-{0}-a", "GET DESC page tag-{0}-b", "GET VAR page tag-{0}-c", "LIST ENUM ups tag-{0}-d",
]
LARGE = "LIST VAR many"
ODD = [
    "GET  VAR\tups  battery.charge ", "  GET VAR ups ups.status", "HELP me", "VER # why",
    '"GET" VAR ups "ups.mfr"', "GET VAR=ups ups.model", "GET VAR", "GET", "LIST", "GET TRACKING",
    "G\\ET VAR ups battery.charge", "LIST NONSENSE", "GET VAR ups ups.status tag-{0}", "GET VAR ups\x01 ups.status",
    "GET NONSENSE ups tag-{0}", "LIST VAR ups tag-{0}", "NONSENSE tag-{0}", 'GET CMDDESC ups "tag-{0} \\" quoted"',
    "LISTVAR tag-{0}", "VER tag-{0}", 'GET CMDDESC "ups" tag-{0}', "GET\x0bVAR ups ups.mfr",
]
STATEFUL = [
    "USERNAME tag-{0}", "PASSWORD tag-{0}", "USERNAME tag-{0}", "LOGIN ups", "LOGIN nobody", "PRIMARY ups", "MASTER ups",
    "FSD ups", "SET VAR ups ups.mfr tag-{0}", "INSTCMD ups load.off", "SET TRACKING ON", "NONSENSE tag-{0}", "",
    "# comment tag-{0}", 'GET VAR "a\nodd tag-{0}"', "GE\\\nT VAR ups odd-tag-{0}", "ATTACH ups", "PASSWORD",
]
LOGIN = ["USERNAME " + PRIMARY[0], "PASSWORD " + PRIMARY[1], "LOGIN ups", "PRIMARY ups", "SET TRACKING ON", "GET TRACKING"]
# Replies that upsd cuts at 512 bytes, so that the newline is lost and the next reply follows in the same line.
CUT = ["GET CMDDESC ups " + "A" * 490, "GET CMDDESC ups " + "B" * 508, "GET DESC ups " + "c" * 495]

# What upsd has: LISTs of a few lines, of about one TLS record, and of 100 KB.
UPSES = {"ups": {"ups.status": "OL", "ups.mfr": "Test", "ups.model": 'a "b" \\ #c', "battery.charge": "100"},
         "page": dict(many_variables(118), **{"ups.status": "OL"}),
         "many": dict(many_variables(700), **{"ups.status": "OL"})}

PAST = 4096                                         # bytes: beyond the handshakes
STALL = 8                                           # seconds after which NUT's clients have long given up


def stateless(words):
    """True for a command that leaves no trace in upsd's session, and is read alike by every upsd."""
    return words[:1] != [] and words[0].upper() in (
        "GET", "LIST", "VER", "NETVER", "PROTVER", "HELP") and not any("odd" in word for word in words)


def reply_ends(data):
    """Where each reply in data ends: a list of offsets, beginning with 0."""
    ends, at, closing = [0], 0, None
    for line in data.splitlines(True):
        at += len(line)
        if closing is None and line.startswith(b"BEGIN LIST "):
            closing = b"END" + line[len(b"BEGIN"):]
        elif closing is None or line == closing:
            closing = None
            ends.append(at)
    return ends


def command_ends(data):
    """Where each command in data ends: a list of offsets, beginning with 0."""
    parser = standin.Parser()
    return [0] + [at + 1 for at in range(len(data)) if parser.feed(data[at:at + 1])]


# pieces: (bytes, how many bytes of replies to wait for before they are sent); leave: see Client
Job = collections.namedtuple("Job", "pieces leave")


class Talk:
    """One random conversation: what a client says, how it leaves, and what it is to get.

    kind: "questions" (stateless ones alone), "mixed", or "cut" (questions with replies of 512 bytes).
    """

    def __init__(self, number, chance, kind=None):
        self.number = number
        self.expected = None
        self.leave = chance.choice(("logout",) * 9 + ("close",) * 5 + ("half", "early", "reset"))
        self.slow = chance.random() < 0.04
        self.kind = kind or ("questions" if chance.random() < 0.7 else "mixed")
        lines = ["GET CMDDESC ups tag-%d-first" % number]
        flavour = chance.random()
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 6, 12, 12, 40))):
            pool = QUESTIONS
            if self.kind == "mixed" and chance.random() < 0.4:
                pool = STATEFUL if flavour < 0.4 else ODD
            elif self.kind == "cut" and chance.random() < 0.3:
                pool = CUT
            lines.append(LARGE if chance.random() < 0.01 else chance.choice(pool).format(number))
            if chance.random() < 0.05 and not any("odd" in line for line in lines):
                lines.append("STARTTLS")
        if self.kind == "mixed" and flavour > 0.8:
            lines += LOGIN[:chance.randint(1, 6)]
        lines.append("GET CMDDESC ups tag-%d-last" % number)
        if self.leave == "logout":
            lines.append("LOGOUT")
        self.data = "".join(line + "\n" for line in lines).encode("ascii")
        if self.leave == "half" and chance.random() < 0.5:
            self.data += b"GET VAR ups up"          # a command that never becomes whole

    @property
    def whole(self):
        """True for a client that waits for all its replies."""
        return self.leave not in ("early", "reset")

    def for_upsd(self):
        """The commands that upsd is to see, but for a LOGOUT."""
        return [words for words in standin.Parser().feed(self.data) if words[:1] not in (["STARTTLS"], ["LOGOUT"])]

    def direct(self):
        """As a job for a direct connection: all at once, then everything until the end."""
        return Job([(self.data, 0)], "logout" if self.leave == "logout" else "half")

    def torn(self, chance):
        """As a job in random pieces; half of the clients wait for the replies to what they have sent."""
        commands, replies = command_ends(self.data), reply_ends(self.expected)
        patient = chance.random() < 0.5 and self.kind != "cut"
        most, pieces, at = chance.choice((1, 9, 30, 30, 90, 90) + (8000,) * 6), [], 0
        while at < len(self.data):
            size = chance.randint(1, most)
            whole = sum(command <= at for command in commands) - 1
            pieces.append((self.data[at:at + size], replies[whole] if patient else 0))
            at += size
        if not self.whole and chance.random() < 0.5:
            del pieces[chance.randint(1, len(pieces)):]
        return Job(pieces, self.leave)

    def check(self, got, complete=True):
        """Fail unless got is what a direct connection gets, or, for who leaves early and where complete
        is false, the beginning of it."""
        right = got == self.expected if self.whole and complete else self.expected.startswith(got)
        if not right:
            at = next((at for at, pair in enumerate(zip(got, self.expected)) if pair[0] != pair[1]),
                      min(len(got), len(self.expected)))
            raise AssertionError("client %d (%s, %s%s) said %r; from byte %d on it got %r, not %r" % (
                self.number, self.kind, self.leave, ", slow" * self.slow, self.data, at, got[at:at + 300],
                self.expected[at:at + 300]))

    def check_own(self, got):
        """Fail if what upsd gave while it restarted is not, reply by reply, an answer to what this client asked."""
        tags = {int(tag) for tag in re.findall(rb"tag-(\d+)", got)}
        assert tags <= {self.number}, "client %d got %r" % (self.number, got)
        mine, theirs = reply_ends(got), reply_ends(self.expected)
        for number in range(len(mine) - 1):
            reply = got[mine[number]:mine[number + 1]]
            right = self.expected[theirs[number]:theirs[number + 1]]
            fits = reply.startswith(b"ERR ") or reply == right or right.startswith(b"ERR ") or (
                reply.startswith(b"BEGIN LIST ") and reply.splitlines()[0] == right.splitlines()[0]) or (
                    reply.startswith(b"VAR ") and reply.split(b'"')[0] == right.split(b'"')[0])
            assert fits, "client %d, reply %d: %r, not %r" % (self.number, number, reply, right)


class Client:
    """One connection of drive()'s, which leaves as the job says.

    logout and half: when the other side ends it, half after an end of its own; close: when all
    replies have come; early and reset: once all is sent, whatever has come, reset with RST.
    """

    def __init__(self, port, talk, job, slow):
        self.talk, self.pieces, self._leave = talk, list(reversed(job.pieces)), job.leave
        self.got, self.over, self.ended = b"", False, False
        self.slow = slow
        self.last = self.next_read = time.monotonic()
        self.sock = socket.socket()
        if slow:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)   # loopback's 64 KB would never fit
        self.sock.settimeout(10)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)

    def ready(self):
        """True if there is something to send, and its time has come."""
        return bool(self.pieces) and len(self.got) >= self.pieces[-1][1]

    def send(self):
        """Send the next piece."""
        try:
            data, after = self.pieces.pop()
            sent = self.sock.send(data)
            if sent < len(data):
                self.pieces.append((data[sent:], after))
        except BlockingIOError:
            self.pieces.append((data, after))
            return
        except OSError:                             # ended by the other side, which is seen when it is read
            return
        self.last = time.monotonic()
        if not self.pieces and self._leave == "half":
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        self._look()

    def receive(self):
        """Read once."""
        if self.slow:
            if time.monotonic() < self.next_read:
                return
            self.next_read = time.monotonic() + 0.002
        try:
            data = self.sock.recv(2048 if self.slow else 1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.got += data
        self.last = time.monotonic()
        self.over = self.ended = not data
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


# gave_up: the client left by itself, since nothing came for STALL seconds
Result = collections.namedtuple("Result", "talk got gave_up")


def drive(port, talks, job, chance, clients=30, trouble=None):
    """Hold all these conversations, so many at a time; trouble(how many are over) is called in between. A list of Result."""
    waiting, active, results = list(reversed(talks)), [], []
    deadline = time.monotonic() + 60 + len(talks) / 20
    with selectors.DefaultSelector() as selector:
        while waiting or active:
            while waiting and len(active) < clients:
                talk = waiting.pop()
                active.append(Client(port, talk, job(talk), talk.slow and talk.expected is not None))
                selector.register(active[-1].sock, selectors.EVENT_READ, active[-1])
            ready = [client for client in active if client.ready()]
            slow = any(client.slow for client in active)
            events = selector.select(0 if ready else 0.002 if slow else 0.2)
            for key, _ in events:
                key.data.receive()
            for client in chance.sample(ready, min(len(ready), 7)):
                if not client.over:
                    client.send()
            now = time.monotonic()
            for client in [each for each in active if each.over or now - each.last > STALL]:
                selector.unregister(client.sock)
                client.close()
                active.remove(client)
                results.append(Result(client.talk, client.got, not client.over))
            if slow and not ready and events and all(key.data.slow for key, _ in events):
                time.sleep(0.001)                   # their sockets are readable all the time
            if trouble:
                trouble(len(results))
            assert now < deadline, "these clients still wait: %s" % [
                (client.talk.number, client.talk.data, client.got[-100:], client.pieces) for client in active]
    return results


# ---- what upsd hears ----------------------------------------------------------------------------

def runs_in(some, many):
    """True if the list some stands in the list many, in one run."""
    return any(many[at:at + len(some)] == some for at in range(len(many) - len(some) + 1))


def check_connections(flows, talks):
    """Fail unless upsd heard what leaves a trace only from that client whose connection it was, as it said it.

    Returns (connections with the questions of several clients, those of one client's own).
    """
    talks = {talk.number: talk for talk in talks}
    shared = own = 0
    for flow in flows:
        heard = standin.Parser().feed(flow.up)
        tags = {int(tag) for tag in re.findall(r"tag-(\d+)", " ".join(" ".join(words) for words in heard))}
        acts = [words for words in heard if not stateless(words)]
        while acts and acts[-1] == ["LOGOUT"]:      # the shim's own goodbye, or the client's
            acts.pop()
        if not acts:
            shared += len(tags) > 1
            continue
        own += 1
        assert len(tags) <= 1, "the clients %s spoke on a connection that also heard %r" % (sorted(tags), acts)
        while heard and heard[-1] == ["LOGOUT"]:
            heard.pop()
        if tags:
            said = talks[tags.pop()].for_upsd()
            assert runs_in(heard, said), "upsd heard %r of a client that said %r" % (heard, said)
        else:                                       # it ended before the client's tag came
            assert any(runs_in(heard, talk.for_upsd()) for talk in talks.values()), "upsd heard %r" % heard
    return shared, own


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


# ---- the rounds ---------------------------------------------------------------------------------

class Trial:
    """upsd, both shims, and a relay on each side of the server shim; a context manager.

    The methods are rounds: each holds conversations, checks them and what upsd heard, and returns
    a line of figures.
    """

    def __init__(self, pki, seed=1, clients=30):
        self.chance = random.Random(seed)
        self._pki, self._clients, self._number = pki, clients, 0
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.nut = stack.enter_context(Nut(UPSES))
            self.upstream = stack.enter_context(Path(self.nut.port))
            server = free_port()
            self.path = stack.enter_context(Path(server))
            config = pair_config(self.upstream.port, self._pki, {
                "listen": "127.0.0.1:%d" % server, "max_sessions_per_address": 500}, {
                "upstream": "127.0.0.1:%d" % self.path.port, "max_sessions_per_address": 500})
            self.server = stack.enter_context(Shim({"server": config["server"]}))
            self._config = {"client": config["client"]}
            poll(lambda: has_all_variables(self.nut), 20, "all variables in upsd")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def _talks(self, count, kind=None):
        """New conversations, with what a direct connection gets."""
        talks = [Talk(self._number + number, self.chance, kind) for number in range(count)]
        self._number += count
        # upsd's backlog is 16: with more at once, a SYN is lost now and then, which costs a second.
        for talk, got, gave_up in drive(self.nut.port, talks, Talk.direct, self.chance, clients=10):
            assert got and not gave_up, "a direct connection got nothing for %r" % talk.data
            talk.expected = got
        return talks

    def _drive(self, client, talks, trouble=None):
        """Hold them through the shims; (results, connections that upsd saw in it)."""
        before = len(self.upstream.flows)
        results = drive(client.port("client"), talks, lambda talk: talk.torn(self.chance), self.chance,
                        self._clients, trouble)
        return results, self.upstream.flows[before:]

    def quiet(self, count, kind=None, delay=0):
        """Nothing goes wrong: every client gets just what a direct connection gets, over few connections."""
        talks = self._talks(count, kind)
        self.path.delay = delay
        with Shim(self._config) as client:
            results, flows = self._drive(client, talks)
        self.path.delay = 0
        for talk, got, gave_up in results:
            assert not gave_up, "client %d waited in vain; it said %r and got %r" % (talk.number, talk.data, got)
            talk.check(got)
        shared, own = check_connections(flows, talks)
        if kind != "cut":
            most = sum(talk.kind == "mixed" or talk.slow for talk in talks) + 3
            assert shared and len(flows) <= most, "%d connections to upsd for %d clients, %d with own ones" % (
                len(flows), count, most - 3)
        return "%d conversations, %d connections to upsd, %d of them shared" % (count, len(flows), shared)

    def broken(self, count, hows, events, kind=None, past=0):
        """The line breaks at a random byte, so many times at most: each gets its own replies, or the beginning of them.

        past: only a session that has carried so many bytes breaks, and not again before as many
        conversations as there are at a time are over, so that everybody has been asked again.
        """
        talks = self._talks(count, kind)
        done, next_at = [-1], [0]

        def trouble(over):
            if self.path.armed:
                next_at[0] = over + self._clients * bool(past)
            elif done[0] < events and over >= next_at[0]:
                done[0] += 1
                next_at[0] = over + self._clients * bool(past)      # it may fire before the next look
                if done[0] < events:
                    most = self.chance.choice((60, 600, 6000, 100 * count))
                    self.path.arm(self.chance.choice(hows), self.chance.randint(1, most), past)
        with Shim(self._config) as client:
            results, flows = self._drive(client, talks, trouble)
        happened = done[0] + (not self.path.armed)      # The last one may have come after the last look.
        self.path.disarm()
        short = 0
        for talk, got, gave_up in results:
            talk.check(got, complete=False)
            if talk.kind == "questions":
                assert not gave_up, "client %d waited %d s in vain; it said %r and got %r" % (
                    talk.number, STALL, talk.data, got)
                short += talk.whole and got != talk.expected
        shared, _ = check_connections(flows, talks)
        assert happened > 0 and (shared or not past), "nothing happened"
        if past:        # a break of a session that works costs at most the one whose reply was under way
            assert short <= done[0], "%d breaks cost %d clients with questions alone replies" % (done[0], short)
        return "%d conversations, %d breaks; %d clients with questions alone got the end" % (count, done[0], short)

    def restarted(self, count):
        """upsd restarts: what upsd itself says depends on the moment, but it is each client's own; then all is as before."""
        talks = self._talks(count)
        with Shim(self._config) as client:
            self._drive(client, talks[:30])
            restarting = threading.Thread(target=restart, args=(self.nut,))
            restarting.start()
            before, held = len(self.upstream.flows), 0
            while restarting.is_alive():
                results, _ = self._drive(client, self.chance.sample(talks, min(40, count)))
                held += len(results)
                for talk, got, _ in results:
                    talk.check_own(got)
            restarting.join()
            check_connections(self.upstream.flows[before:], talks)
            poll(lambda: has_all_variables(self.nut), 20, "all variables in upsd")
            results, _ = self._drive(client, talks[:30])
            for talk, got, _ in results:
                talk.check(got)
        return "%d conversations while upsd restarted" % held


def main(argv=None):
    """The long run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=5000, metavar="CONVERSATIONS", help="how many (default: %(default)s)")
    parser.add_argument("-s", type=int, default=1, metavar="SEED", help="of the random numbers (default: %(default)s)")
    options = parser.parse_args(argv)
    share = max(20, options.n // 20)
    rounds = (
        ("nothing breaks", lambda trial: trial.quiet(share * 8)),
        ("5 ms each way", lambda trial: trial.quiet(share * 2, delay=0.005)),
        ("replies cut at 512 bytes", lambda trial: trial.quiet(share, "cut")),
        ("cut and reset", lambda trial: trial.broken(share * 3, ("cut", "reset"), share // 2, past=PAST)),
        ("cut and reset, handshakes too", lambda trial: trial.broken(share * 2, ("cut", "reset"), share // 2)),
        ("silenced", lambda trial: trial.broken(share * 2, ("forget",), max(3, share // 10), "questions", past=PAST)),
        ("all of this", lambda trial: trial.broken(share, ("cut", "reset", "forget"), max(3, share // 10))),
        ("upsd restarts", lambda trial: trial.restarted(share)),
    )
    failed = False
    with tempfile.TemporaryDirectory(prefix="nutshim-differential-") as path:
        pki = Pki(path)
        for number, (name, hold) in enumerate(rounds):
            since = time.monotonic()
            try:
                with Trial(pki, options.s * 100 + number) as trial:
                    result = hold(trial)
            except AssertionError as error:
                result, failed = "FAILED: %s" % error, True
            print("%-30s %5.0f s  %s" % (name, time.monotonic() - since, result), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
