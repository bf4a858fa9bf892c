#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""nutshim measured beside haproxy, stunnel and upsd in the clear, and beside another nutshim.py (--against).

    load --plain--> client process --TLS 1.3, verified--> server process --plain--> upsd
    load --plain-----------------------------------------------------------------> upsd   (the limit)

All candidates stand side by side in front of one real upsd, with the same certificate, and have one process for each
side.  A round takes each measure once from each candidate, in an order that changes, so that whatever else the
machine does hits all of them alike.  A figure is the median of the rounds; a ratio is the median of the rounds' ratios.

poll32    exchanges/s of 32 sessions that ask GET VAR without end and never log in
login32   the same, but each has said USERNAME, PASSWORD and LOGIN first, as upsmon does
poll1     one such session without login: p50
upsc16    sessions/s, 16 at once: connect, GET VAR, its reply, LOGOUT, its reply, close
storm     waits of an established TLS session while 64 clients do full handshakes with an RSA-4096 certificate
memory    of each process, idle, and with 1,000 sessions after one exchange, and after an 18 kB reply to each
start     from the start of a server process to the end of the first TLS handshake
attacks   waits of an established session under each attack (nutshim alone)

CPU is the kernel's count for the client's and the server's process together, all threads.  In storm and attacks the
session asks each 5 ms, and a longer wait counts as those of all the questions that it kept from being asked.
Only Linux has what this needs.
"""

import argparse
import array
import collections
import contextlib
import itertools
import multiprocessing
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from _socket import socket as raw_socket        # its methods are C all the way
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from certs import Pki
from harness import IS_ROOT, NUTSHIM, SECONDARY, VARIABLES, Nut, Process, clean_env, free_port, many_variables, write
from keyflood import ClientFlood, tls_flood
from wire import Peer, client_context, listen

LOCAL = "127.0.0.1"
QUESTION = b"GET VAR ups ups.status\n"
REPLY = b"VAR ups ups.status "
LONG_QUESTION, LONG_END = b"LIST VAR big\n", b"END LIST VAR big\n"
LONG_VARIABLES = 125            # make the long reply 18 kB
LOGIN = b"USERNAME %s\nPASSWORD %s\nLOGIN ups\n" % tuple(word.encode() for word in SECONDARY)
MOST = 4096                     # sessions that upsd and every candidate are set up for
FILES = 16384                   # open files a process: two a session, and room for what was closed a moment ago
MANY = 1000                     # sessions in the memory measures
START_LIMIT = 15                # seconds for a program to open its port
SETUP_LIMIT = 120               # seconds for a load process to establish its sessions
REPLY_LIMIT = 30                # seconds without any reply at all: the candidate hangs
WARM_UP = 0.3                   # seconds of load before anything counts
PACE = 0.005                    # seconds between the questions of a session under attack
KEY_UPDATES = 60000             # records for each second of measurement

Address = Tuple[str, int]
Figures = Dict[str, float]
Window = Callable[[], Tuple[float, float]]


class Failure(Exception):
    """A candidate did not do what is measured; its figure is left out and the reason is shown."""


# ---- candidates ---------------------------------------------------------------------------------

class Candidate(NamedTuple):
    """A program under test. Its configuration is the text every and, behind it, that of the side."""
    name: str
    program: List[str]          # the command, up to the name of its configuration file
    version: List[str]          # the command that tells its version
    starttls: bool
    every: str
    server: str                 # TLS in, plain to upsd
    client: str                 # plain in, verified TLS to the server side


def nutshim(name: str, path: str, python: str) -> Candidate:
    return Candidate(name, [python, path, "-F", "-f"], [python, path, "-V"], True,
                     "log = stderr\npidfile = {folder}/{port}.pid\nmax_sessions = {most}\n"
                     + ("user = root\n" if IS_ROOT else "") +
                     "[{side}]\nrole = {side}\nlisten = 127.0.0.1:{port}\nupstream = 127.0.0.1:{upstream}\n"
                     "max_sessions_per_address = {most}\n",
                     "certificate = {pem}\n",
                     "server_name = localhost\ntrust = {ca}\n")


def stunnel(path: str) -> Candidate:
    # TCP_NODELAY is what its manual has for short messages. It resumes sessions by itself, and has a thread a session.
    return Candidate("stunnel", [path], [path, "-version"], False,
                     "foreground = yes\npid =\nsyslog = no\ndebug = 3\nsocket = l:TCP_NODELAY=1\n"
                     "socket = r:TCP_NODELAY=1\n[nut]\naccept = 127.0.0.1:{port}\nconnect = 127.0.0.1:{upstream}\n"
                     "sslVersionMin = TLSv1.3\n",
                     "cert = {pem}\n",
                     "client = yes\nsni = localhost\nverifyChain = yes\ncheckHost = localhost\nCAfile = {ca}\n")


def haproxy(path: str) -> Candidate:
    # TCP_NODELAY and resumption are its defaults; it checks the name sent as SNI; it logs nothing unless told where.
    return Candidate("haproxy", [path, "-db", "-f"], [path, "-v"], False,
                     "global\n nbthread 1\n maxconn {most}\ndefaults\n mode tcp\n maxconn {most}\n timeout connect 5s\n"
                     " timeout client 10m\n timeout server 10m\nlisten nut\n",
                     " bind 127.0.0.1:{port} ssl crt {pem} ssl-min-ver TLSv1.3\n server upsd 127.0.0.1:{upstream}\n",
                     " bind 127.0.0.1:{port}\n server shim 127.0.0.1:{upstream} ssl ssl-min-ver TLSv1.3"
                     " sni str(localhost) verify required ca-file {ca}\n")


class Lab:
    """upsd, certificates, a temporary folder and the processes of this run; leaves nothing behind."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.folder = tempfile.mkdtemp(prefix="nutshim-bench-")
        self._stack.callback(shutil.rmtree, self.folder)
        self.pki = Pki(self.folder)
        self.upsd = self._stack.enter_context(Nut({"ups": VARIABLES, "big": many_variables(LONG_VARIABLES)},
                                                  options="MAXCONN %d\n" % MOST))
        self.logs = {}          # type: Dict[subprocess.Popen, str]
        self._stack.callback(lambda: [self.stop(process) for process in list(self.logs)])

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def command(self, candidate: Candidate, side: str, port: int, upstream: int, more: str = "",
                pem: str = "") -> List[str]:
        text = (candidate.every + getattr(candidate, side)).format(
            side=side, port=port, upstream=upstream, pem=pem or self.pki.server.file, ca=self.pki.ca.cert, most=MOST,
            folder=self.folder)
        return candidate.program + [write("%s/%d.conf" % (self.folder, port), text + more)]

    def start(self, command: Sequence[str], port: int = 0) -> subprocess.Popen:
        """Start a program; return once it listens on port (0: at once)."""
        log = "%s/%d.log" % (self.folder, len(os.listdir(self.folder)))
        with open(log, "ab") as output:
            # A session of its own keeps the terminal's Ctrl-C away from it.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                       start_new_session=True, env=clean_env())
        self.logs[process] = log
        deadline = time.monotonic() + START_LIMIT
        while port and not is_listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failure("%s did not open port %d:\n%s" % (" ".join(command), port, self.last_words(process)))
            time.sleep(0.01)
        return process

    def last_words(self, process: subprocess.Popen) -> str:
        with open(self.logs[process], "rb") as file:
            return file.read()[-1000:].decode("utf-8", "replace").strip()

    def empty_logs(self) -> None:
        """Logs are kept for messages only; a line for each session would fill the disk."""
        for log in self.logs.values():
            os.truncate(log, 0)

    def stop(self, process: subprocess.Popen) -> None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        del self.logs[process]


class Pair:
    """A candidate's processes: server in front of upsd, client in front of that. Without a candidate: upsd alone.

    more: what to put behind the client's configuration; sides: or the server's process alone."""

    def __init__(self, lab: Lab, candidate: Optional[Candidate], sides: Sequence[str] = ("server", "client"),
                 more: str = "", pem: str = "") -> None:
        self.lab, self.candidate = lab, candidate
        self.name = candidate.name if candidate else "upsd"
        self.processes = {}     # type: Dict[str, subprocess.Popen]
        self.ports = {}         # type: Dict[str, int]
        port = lab.upsd.port
        for side in sides if candidate else ():
            upstream, port = port, free_port()
            text = more if side == "client" else ""
            self.processes[side] = lab.start(lab.command(candidate, side, port, upstream, text, pem), port)
            self.ports[side] = port
        self.address = (LOCAL, port)

    @property
    def pids(self) -> List[int]:
        return [process.pid for process in self.processes.values()]

    def tls(self) -> "Tls":
        return Tls((LOCAL, self.ports["server"]), self.candidate.starttls, self.lab.pki.ca.cert)

    def stop(self) -> None:
        for process in self.processes.values():
            self.lab.stop(process)


def is_listening(port: int) -> bool:
    """Ask the kernel, not the program: a connection made to try would already be a session."""
    with open("/proc/net/tcp") as table:
        return any(line.split()[1].endswith(":%04X" % port) and line.split()[3] == "0A"
                   for line in itertools.islice(table, 1, None))


def cpu_seconds(pid: int) -> float:
    """utime and stime of a process, all its threads, finer than /proc has it (the clock's number is made of the id)."""
    return time.clock_gettime((~pid << 3) | 2)


def settle(pids: Sequence[int]) -> None:
    """Wait until these processes are idle."""
    deadline, used = time.monotonic() + SETUP_LIMIT, 1.0
    while used > 0.02:
        if time.monotonic() > deadline:
            raise Failure("still busy %d s after the attack before" % SETUP_LIMIT)
        before = sum(map(cpu_seconds, pids))
        time.sleep(0.3)
        used = sum(map(cpu_seconds, pids)) - before


def memory(pid: int) -> Figures:
    """kB of a process from /proc/PID/smaps_rollup: private (written to: nobody can share it), USS and PSS."""
    with open("/proc/%d/smaps_rollup" % pid) as file:
        kb = {name: int(number) for name, number in re.findall(r"^(\w+):\s+(\d+) kB", file.read(), re.M)}
    return {"private": kb["Private_Dirty"], "uss": kb["Private_Dirty"] + kb["Private_Clean"], "pss": kb["Pss"]}


# ---- load: each of these functions runs in a process of its own ---------------------------------
#
# It establishes what it needs, calls window(), which returns the two times between which events count once all load
# processes are ready, and goes on until the second.

class Tls(NamedTuple):
    """How to get at a server's process."""
    address: Address
    starttls: bool              # False: TLS from the first byte
    ca: str                     # file


def read_reply(connection: Any, end: bytes = b"\n") -> bytes:
    data = connection.recv(65536)
    while not data.endswith(end):
        more = connection.recv(65536)
        if not more:
            raise Failure("connection closed instead of a reply, so far %r" % data[-200:])
        data += more
    return data


def open_session(where: Any, login: bool = False) -> Any:
    """A session that has had a reply, so that it stands all the way to upsd. where: an Address or a Tls."""
    connection = socket.create_connection(where.address if isinstance(where, Tls) else where, REPLY_LIMIT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if isinstance(where, Tls):
        if where.starttls:
            connection.sendall(b"STARTTLS\n")
            read_reply(connection)
        connection = client_context(where.ca).wrap_socket(connection, server_hostname="localhost")
    if login:
        for line in LOGIN.splitlines(True):
            connection.sendall(line)
            if read_reply(connection) != b"OK\n":
                raise Failure("login refused")
    connection.sendall(QUESTION)
    read_reply(connection)
    connection.settimeout(None)
    return connection


def load_upsc(window: Window, address: Address, count: int) -> Dict[str, Any]:
    """Sessions as upsc has them, count at once, one after the other without end."""
    now, done = time.monotonic, 0

    def come() -> Tuple[Any, bool]:
        connection = raw_socket()
        connection.connect(address)     # on loopback: at once
        connection.send(QUESTION)
        return connection, True

    begin, end = window()
    # Waiting for the oldest is leaner than asking which are ready, and nobody answers far out of turn.
    queue = collections.deque([come() for _ in range(count)])
    while now() < end:
        connection, asked = queue.popleft()
        data = connection.recv(4096)
        if asked:
            if not (data.startswith(REPLY) and data.endswith(b"\n")):
                raise Failure("wrong or torn reply %r" % data)
            connection.send(b"LOGOUT\n")
            queue.append((connection, False))
        else:
            if data != b"OK Goodbye\n":
                raise Failure("wrong reply to LOGOUT: %r" % data)
            connection.close()
            done += begin <= now() < end
            queue.append(come())
    return {"done": done}


def load_poll(window: Window, where: Any, count: int, login: bool = False, pace: float = 0) -> Dict[str, Any]:
    """Established sessions, each of which asks again once it has its reply; one with a pace, in seconds, keeps it."""
    poller, waits, now = select.epoll(), array.array("d"), time.monotonic
    sessions = {each.fileno(): each for each in [open_session(where, login) for _ in range(count)]}
    for number in sessions:
        poller.register(number, select.EPOLLIN)
    begin, end = window()
    asked = dict.fromkeys(sessions, now())
    for connection in sessions.values():
        connection.send(QUESTION)
    moment = now()
    while moment < end:
        events = poller.poll(REPLY_LIMIT)
        if not events:
            raise Failure("no reply within %d s" % REPLY_LIMIT)
        for number, _ in events:
            connection = sessions[number]
            data = connection.recv(4096)
            if not data.startswith(REPLY):
                raise Failure("wrong reply %r" % data)
            if data[-1] != 10:
                read_reply(connection)
            moment = now()
            if begin <= moment:
                waits.append(moment - asked[number])
            if pace:                                # the questions that were due during this wait
                late = moment - asked[number] - pace
                while late > 0 and begin <= moment:
                    waits.append(late)
                    late -= pace
                time.sleep(max(0, -late))
                moment = now()
            asked[number] = moment
            connection.send(QUESTION)
    return {"done": len(waits), "waits": waits}


def load_hold(window: Window, where: Any, count: int) -> Dict[str, Any]:
    """Sessions that are idle after one exchange; after the second window(), idle after a long reply."""
    sessions = [open_session(where) for _ in range(count)]
    window()
    for connection in sessions:
        connection.sendall(LONG_QUESTION)
        read_reply(connection, LONG_END)
    window()
    return {}


def load_first_answer(window: Window, where: Tls) -> Dict[str, Any]:
    """Try to connect until it works; when the first handshake was through."""
    context = client_context(where.ca)      # now, and not when the clock runs
    _, deadline = window()
    while True:
        try:
            plain = socket.create_connection(where.address)
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise Failure("port not open within %d s" % START_LIMIT) from None
            time.sleep(0.0005)
    if where.starttls:
        plain.sendall(b"STARTTLS\n")
        read_reply(plain)
    context.wrap_socket(plain, server_hostname="localhost").close()
    return {"moment": time.monotonic()}


class Attack(NamedTuple):
    """What a crowd of clients does to a server shim, again and again, each as fast as it is let."""
    count: int                  # at once
    opening: str                # what comes first: nothing, STARTTLS, or TLS behind it
    data: bytes
    goes_on: bool = False       # sends data for ever; else once, and waits for the end
    reads: bool = True
    version: Optional[ssl.TLSVersion] = None


# The kinds of tests/test_attacks.py, as floods, and what a client within TLS can do beyond them.
ATTACKS = {
    "nothing": Attack(0, "", b""),
    "commands in the clear": Attack(16, "", b"VER\n" * 8),
    "bytes behind STARTTLS": Attack(16, "", b"STARTTLS\nVER\n"),
    "TLS without STARTTLS": Attack(16, "", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506)),
    "over-long line": Attack(16, "", b"x" * 40000),
    "NUL": Attack(16, "", b"STARTTLS\0\n"),
    "record of garbage": Attack(16, "STARTTLS", b"\x16\x03\x01\x40\x00" + b"x" * 16384),
    "half a hello": Attack(64, "STARTTLS", b"\x16\x03\x01\x02\x00\x01"),
    "TLS 1.2": Attack(16, "TLS", b"", version=ssl.TLSVersion.TLSv1_2),
    "handshakes": Attack(64, "TLS", b""),
    "empty lines": Attack(60, "TLS", b"\n" * 65536, True),
    "equals signs": Attack(60, "TLS", (b"=" * 32000 + b"\n") * 4, True),
    "escapes": Attack(60, "TLS", b"\\a" * 16000 + b"\n", True),
    "endless command": Attack(60, "TLS", b"x" * 65536, True),
    "STARTTLS in TLS, unread": Attack(60, "TLS", b"STARTTLS\n" * 4000, True, False),
    "LISTs, unread": Attack(60, "TLS", LONG_QUESTION * 1000, True, False),
    "commands": Attack(60, "TLS", QUESTION * 700, True),
}
STORM = ATTACKS["handshakes"]


def visit(where: Tls, attack: Attack, context: Any, count: Callable[[], None]) -> Iterator[Tuple[Any, int]]:
    """One client's attack; yields the socket and what it waits for."""
    sock = socket.create_connection(where.address)     # type: Any
    try:
        sock.setblocking(False)
        if where.starttls and attack.opening:
            sock.send(b"STARTTLS\n")
            yield sock, select.EPOLLIN
            if sock.recv(100) != b"OK STARTTLS\n":
                return
        if attack.opening == "TLS":
            sock = context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname="localhost")
            while True:
                try:
                    sock.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    yield sock, select.EPOLLIN
        count()
        rest = attack.data
        while rest or not attack.opening == "TLS":
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                if rest:
                    sent = sock.send(rest)
                    rest = rest if attack.goes_on else rest[sent:]
            with contextlib.suppress(ssl.SSLWantReadError, BlockingIOError):
                if attack.reads and not sock.recv(65536):
                    return
            yield sock, (select.EPOLLIN if attack.reads else 0) | (select.EPOLLOUT if rest else 0)
    finally:
        sock.close()


def load_attack(window: Window, where: Tls, attack: Attack) -> Dict[str, Any]:
    """A crowd in one process of low priority: on a small machine the one attacked comes first."""
    os.nice(10)
    context = client_context(maximum=attack.version)   # verifies nothing: saves work here, the server's is the same
    poller, clients, done = select.epoll(), {}, 0
    begin = end = 0.0

    def count() -> None:
        nonlocal done
        done += begin <= time.monotonic() < end

    def step(client: Iterator[Tuple[Any, int]]) -> None:
        while time.monotonic() < end:
            try:
                sock, events = next(client)
            except (StopIteration, OSError):            # the next one comes in its place
                client = visit(where, attack, context, count)
                continue
            number = sock.fileno()
            clients[number] = client
            try:
                poller.modify(number, events)
            except FileNotFoundError:
                poller.register(number, events)
            return

    begin, end = window()
    for _ in range(attack.count):
        step(visit(where, attack, context, count))
    while time.monotonic() < end:
        for number, _ in poller.poll(0.1):
            step(clients[number])
    return {"done": done}


def load_key_updates(window: Window, port: int, count: int) -> Dict[str, Any]:
    """One client of a server shim sends KeyUpdate records, made beforehand."""
    with ClientFlood(port) as flood:
        records = flood.engine.key_updates(count)
        begin, _ = window()
        time.sleep(max(0, begin - time.monotonic()))
        with contextlib.suppress(OSError):          # a good shim ends it early
            flood.send(records)
    return {"done": 1}


def load_key_updates_of_upstream(window: Window, port: int, listener: socket.socket, certificate: Any,
                                 count: int) -> Dict[str, Any]:
    """A false upstream does the same to a client shim, whose client asks it one thing first."""
    with socket.create_connection((LOCAL, port)) as client:
        client.sendall(b"NETVER\n")
        peer = Peer(None, listener.accept()[0])
        plain_send, sent = peer.send, []

        def send(data: bytes) -> None:
            sent.append(len(data))
            if len(data) > 100000:                  # the flood itself
                begin, _ = window()
                time.sleep(max(0, begin - time.monotonic()))
            plain_send(data)
        peer.send = send                            # type: ignore
        peer.sock.settimeout(2)
        with contextlib.suppress(OSError):
            tls_flood(certificate, count)(peer)
        peer.sock.close()
    if max(sent) < 100000:
        raise Failure("the client shim left before the flood")
    return {"done": 1}


class LoadProcess:
    """A forked process that runs one of the functions above."""

    def __init__(self, function: Callable[..., Dict[str, Any]], *arguments: Any) -> None:
        fork = multiprocessing.get_context("fork")
        self.pipe, far_end = fork.Pipe()
        self.process = fork.Process(target=self.run, args=(far_end, function, arguments), daemon=True)
        self.process.start()
        far_end.close()

    @staticmethod
    def run(pipe: Any, function: Callable[..., Dict[str, Any]], arguments: Sequence[Any]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # the main process ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

        def window() -> Tuple[float, float]:
            pipe.send("ready")
            return pipe.recv()
        try:
            pipe.send(function(window, *arguments))
        except (Failure, OSError) as error:
            pipe.send(Failure(str(error)))

    def hear(self, limit: float = SETUP_LIMIT) -> Any:
        """What the process says next; Failure when it says nothing, or only that it failed."""
        if not self.pipe.poll(limit):
            raise Failure("no result within %d s" % limit)
        try:
            said = self.pipe.recv()
        except EOFError:
            raise Failure("a load process ended without a word") from None
        if isinstance(said, Failure):
            raise said
        return said

    def __enter__(self) -> "LoadProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def run_load(lab: Lab, pids: List[int], seconds: float, jobs: Sequence[Tuple[Any, ...]],
             attack: Sequence[Any] = (), warm_up: float = WARM_UP) -> Figures:
    """Run each job (function, arguments …) in a process of its own, all over the same stretch of time, and an attack.

    The figures are those of the jobs: how many a second, CPU of pids for each, waits, who was how busy."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(LoadProcess(*job)) for job in list(jobs) + [attack] * bool(attack)]
        watched = pids + [lab.upsd.upsd.pid] + [each.process.pid for each in processes]
        for process in processes:
            process.hear()
        begin = time.monotonic() + warm_up
        for process in processes:
            process.pipe.send((begin, begin + seconds))
        counts = []
        for moment in (begin, begin + seconds):
            time.sleep(max(0, moment - time.monotonic()))
            counts.append([cpu_seconds(pid) for pid in watched])
        results = [process.hear() for process in processes]
    used = [after - before for before, after in zip(*counts)]
    own = results[:len(jobs)]
    done = sum(result["done"] for result in own)
    waits = sorted(itertools.chain.from_iterable(result.get("waits", ()) for result in own))
    if not done:
        raise Failure("nothing came to its end in %.1f s" % seconds)
    figures = {"rate": done / seconds, "upsd": used[len(pids)] / seconds * 100,
               "load": max(used[len(pids) + 1:]) / seconds * 100}
    if pids:
        figures["cpu"] = sum(used[:len(pids)]) / done * 1e6
    if waits:
        figures.update(p50=statistics.median(waits) * 1e3, p99=waits[len(waits) * 99 // 100] * 1e3,
                       worst=waits[-1] * 1e3)
    if attack:
        figures["attack"] = results[-1]["done"] / seconds
    return figures


# ---- measures -----------------------------------------------------------------------------------

def measure_steady(pair: Pair, group: str, seconds: float) -> Figures:
    jobs = {"poll32": (load_poll, pair.address, 32), "login32": (load_poll, pair.address, 32, True),
            "poll1": (load_poll, pair.address, 1), "upsc16": (load_upsc, pair.address, 8)}
    # In the clear one load process would be what limits upsc16: a connection costs its client more than upsd.
    return run_load(pair.lab, pair.pids, seconds, [jobs[group]] * (2 if group == "upsc16" else 1))


def measure_storm(pair: Pair, seconds: float) -> Figures:
    return run_load(pair.lab, pair.pids, seconds, [(load_poll, pair.tls(), 1, False, PACE)],
                    (load_attack, pair.tls(), STORM), warm_up=1)


def measure_attack(pair: Pair, name: str, seconds: float, false: Tuple[int, socket.socket]) -> Figures:
    lab, count, where = pair.lab, int(KEY_UPDATES * seconds), pair.tls()    # type: Any, int, Any
    settle(pair.pids + [lab.upsd.upsd.pid])         # what the attack before has left to do
    if name == "KeyUpdates":
        attack = (load_key_updates, pair.ports["server"], count)    # type: Tuple[Any, ...]
    elif name == "KeyUpdates, by an upstream":
        where = pair.address
        attack = (load_key_updates_of_upstream, *false, lab.pki.server, count)
    else:
        attack = (load_attack, where, ATTACKS[name])
    return run_load(lab, pair.pids, seconds, [(load_poll, where, 1, False, PACE)], attack)


def measure_memory(lab: Lab, candidate: Candidate) -> Figures:
    """In processes of their own, of which nothing else runs meanwhile: PSS depends on who shares the pages."""
    figures = {}                # type: Figures

    def note(step: str, process: subprocess.Popen) -> None:
        time.sleep(0.5)         # the last session's tickets and log lines are under way
        figures.update({"%s_%s" % (step, kind): value for kind, value in memory(process.pid).items()})

    for side in ("server", "client"):
        pair = Pair(lab, candidate, ("server", "client")[:1 + (side == "client")])
        try:
            process = pair.processes[side]
            note(side + "_idle", process)
            with LoadProcess(load_hold, pair.tls() if side == "server" else pair.address, MANY) as holder:
                for step in ("_many", "_long"):
                    holder.hear()
                    note(side + step, process)
                    holder.pipe.send((0, 0))
                    figures[side + step + "_each"] = (
                        figures[side + step + "_private"] - figures[side + "_idle_private"]) / MANY
        except Failure as error:
            raise Failure("%s\n%s" % (error, lab.last_words(pair.processes[side]))) from None
        finally:
            pair.stop()
    return figures


def measure_bare(python: str) -> Figures:
    """Python with what a shim cannot do without, waiting."""
    code = "import ssl, selectors, time; print('ready', flush=True); time.sleep(99)"
    bare = Process([python, "-I", "-S", "-c", code])
    try:
        bare.wait_log("ready")
        return {"server_idle_" + kind: value for kind, value in memory(bare.pid).items()}
    finally:
        bare.end()


def measure_start(lab: Lab, candidate: Candidate) -> Figures:
    port = free_port()
    command = lab.command(candidate, "server", port, lab.upsd.port)
    with LoadProcess(load_first_answer, Tls((LOCAL, port), candidate.starttls, lab.pki.ca.cert)) as watcher:
        watcher.hear()
        started = time.monotonic()
        watcher.pipe.send((started, started + START_LIMIT))
        process = lab.start(command)
        try:
            return {"handshake": (watcher.hear(START_LIMIT + 5)["moment"] - started) * 1e3}
        finally:
            lab.stop(process)


STEADY = ("poll32", "login32", "poll1", "upsc16")
GROUPS = STEADY + ("storm", "memory", "start", "attacks")
KEY_ATTACKS = ("KeyUpdates", "KeyUpdates, by an upstream")
Results = Dict[str, Dict[str, List[Optional[float]]]]       # candidate, "group.figure", one value for each round


class Run:
    """All measures of all candidates, round by round."""

    def __init__(self, lab: Lab, candidates: List[Candidate], options: argparse.Namespace) -> None:
        self.lab, self.candidates, self.options = lab, candidates, options
        self.results = {}       # type: Results

    def take(self, number: int, group: str, name: str, function: Callable[..., Figures], *arguments: Any) -> None:
        """Take, note and show what one measure brings for one candidate in one round."""
        before = time.monotonic()
        try:
            figures = function(*arguments)
            text = ", ".join("%s %.4g" % item for item in figures.items())
        except (Failure, OSError, AssertionError) as error:
            figures, text = {}, "FAILED: %s" % error
        for figure, value in figures.items():
            noted = self.results.setdefault(name, {}).setdefault(group + "." + figure, [None] * self.options.rounds)
            noted[number] = value
        self.lab.empty_logs()
        say("round %d/%d  %s  %s  %.1f s  %s" % (number + 1, self.options.rounds, group, name,
                                                  time.monotonic() - before, text))

    def alone(self) -> None:
        """The measures that start processes of their own; nothing of another candidate may run beside them."""
        for number in range(self.options.rounds):
            if "memory" in self.options.groups and number == 0:     # the same in each round
                self.take(0, "memory", "python", measure_bare, self.options.python)
                for candidate in self.candidates:
                    self.take(0, "memory", candidate.name, measure_memory, self.lab, candidate)
            if "start" in self.options.groups:
                for candidate in turned(self.candidates, number):
                    self.take(number, "start", candidate.name, measure_start, self.lab, candidate)

    def side_by_side(self) -> None:
        """The measures of processes that stand all the time; idle ones cost nothing."""
        groups, seconds = self.options.groups, self.options.seconds
        steady = [group for group in STEADY if group in groups]
        pairs = [Pair(self.lab, each) for each in [None] + self.candidates] if steady else []
        storms = [Pair(self.lab, each, ("server",), pem=self.lab.pki.rsa4096.file)
                  for each in self.candidates] if "storm" in groups else []
        attacked = []           # type: List[Tuple[Pair, Tuple[int, socket.socket]]]
        for candidate in self.candidates:
            if "attacks" in groups and candidate.starttls:
                port, listener = free_port(), listen()
                more = "[false]\nrole = client\nlisten = 127.0.0.1:%d\nupstream = localhost:%d\ntrust = %s\n" % (
                    port, listener.getsockname()[1], self.lab.pki.ca.cert)
                attacked.append((Pair(self.lab, candidate, more=more), (port, listener)))
        for number in range(self.options.rounds):
            for group in steady:
                for pair in turned(pairs, number):
                    self.take(number, group, pair.name, measure_steady, pair, group, seconds)
            for pair in turned(storms, number):
                self.take(number, "storm", pair.name, measure_storm, pair, seconds)
            for attack in tuple(ATTACKS) + KEY_ATTACKS if attacked else ():
                for pair, false in turned(attacked, number):
                    self.take(number, "attack " + attack, pair.name, measure_attack, pair, attack, seconds, false)


def turned(items: List[Any], by: int) -> List[Any]:
    """The same items, another one first."""
    by %= len(items) or 1
    return items[by:] + items[:by]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- results ------------------------------------------------------------------------------------

class Target(NamedTuple):
    """nutshim's figure divided by another candidate's, or less it, and how good that should be."""
    label: str
    figure: str
    against: str                # "" is the nutshim.py of --against
    least: float
    aim: float
    more_is_better: bool = False
    difference: bool = False


TARGETS = (
    Target("32 pollers: exchanges/s", "poll32.rate", "haproxy", 1.3, 1.6, True),
    Target("32 pollers: CPU an exchange", "poll32.cpu", "haproxy", 0.7, 0.5),
    Target("32 pollers: CPU an exchange", "poll32.cpu", "stunnel", 0.25, 0.17),
    Target("upsc, 16 at once: sessions/s", "upsc16.rate", "haproxy", 9, 12, True),
    Target("upsc, 16 at once: sessions/s", "upsc16.rate", "stunnel", 11, 15, True),
    Target("upsc, 16 at once: sessions/s", "upsc16.rate", "upsd", 0.4, 0.5, True),
    Target("upsc, 16 at once: CPU a session", "upsc16.cpu", "haproxy", 1 / 14, 1 / 18),
    Target("32 logged in: CPU an exchange", "login32.cpu", "haproxy", 1.5, 1.3),
    Target("1 session: p50", "poll1.p50", "haproxy", 1.15, 1.0),
    Target("RSA-4096 storm: p99", "storm.p99", "stunnel", 1 / 2, 1 / 4),
    Target("idle: private memory", "memory.server_idle_private", "python", 1.45, 1.25),
    Target("idle: USS", "memory.server_idle_uss", "python", 1.45, 1.25),
    Target("idle: PSS", "memory.server_idle_pss", "python", 1.45, 1.25),
    Target("1,000 sessions, server side: PSS", "memory.server_many_pss", "haproxy", 1.25, 1.1),
    Target("start to first TLS handshake", "start.handshake", "", 1.15, 1.0),
    Target("32 pollers: CPU an exchange", "poll32.cpu", "", 1.0, 0.95),
    Target("32 logged in: CPU an exchange", "login32.cpu", "", 1.0, 0.95),
    Target("upsc, 16 at once: CPU a session", "upsc16.cpu", "", 1.0, 0.95),
    Target("kB a session, idle", "memory.server_many_each", "", 3.5, 0, difference=True),
    Target("kB a session, after 18 kB", "memory.server_long_each", "", 6, 0, difference=True),
)
FIGURES = {"rate": "each second", "cpu": "CPU each, us", "p50": "p50, ms", "p99": "p99, ms", "worst": "worst, ms",
           "attack": "attackers' handshakes/s", "upsd": "upsd busy, %", "load": "load process busy, %"}
TITLES = {"poll32": "32 pollers, exchanges", "login32": "32 logged in, exchanges", "poll1": "1 session, exchanges",
          "upsc16": "upsc, 16 at once, sessions", "storm": "RSA-4096 storm, exchanges"}


def table_rows(results: Results) -> List[Tuple[str, str]]:
    """The rows of the table: what stands in the first column, and the figure."""
    rows = [("%s: %s" % (title, text), "%s.%s" % (group, figure))
            for group, title in TITLES.items() for figure, text in FIGURES.items()]
    for side in ("server", "client"):
        for step, title in (("idle", "idle"), ("many", "1,000 sessions"), ("long", "and 18 kB each")):
            rows += [("%s side, %s: %s" % (side, title, label), "memory.%s_%s_%s" % (side, step, kind))
                     for kind, label in (("private", "private, kB"), ("uss", "USS, kB"), ("pss", "PSS, kB"),
                                         ("each", "private a session, kB"))]
    rows.append(("start to first TLS handshake, ms", "start.handshake"))
    return [row for row in rows if any(row[1] in figures for figures in results.values())]


def median(values: Sequence[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def compare(results: Results, target: Target, against: str) -> Optional[float]:
    """The median over the rounds; None without figures of both."""
    pairs = zip(*(results.get(name, {}).get(target.figure, ()) for name in ("nutshim", target.against or against)))
    return median([None if own is None or not other else own - other if target.difference else own / other
                   for own, other in pairs])


def number_text(value: Optional[float]) -> str:
    if value is None:
        return "-"
    return "%.0f" % value if value >= 100 else "%.1f" % value if value >= 10 else "%.2f" % value


def wanted_text(target: Target, value: float) -> str:
    """6 x, 0.45 x, but 1/12 rather than 0.08 x."""
    if target.difference:
        return "%+.1f" % value
    return "%.3g x" % value if value > 0.3 or target.more_is_better else "1/%.3g" % (1 / value)


def print_columns(lines: List[List[str]]) -> None:
    """A table with its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]))


def print_results(results: Results, against: str, rounds: int) -> None:
    names, said = list(results), "median of %d round(s)" % rounds
    lines = [[label] + [number_text(median(results[name].get(figure, ()))) for name in names]
             for label, figure in table_rows(results)]
    if lines:
        print_columns([[said] + names] + lines)
    names = [name for name in names if any(figure.startswith("attack ") for figure in results[name])]
    if names:
        print("\nwaits of an established session under attack: p50 / p99 / worst, ms")
        print_columns([[said] + names] + [
            [attack] + [" / ".join(number_text(median(results[name].get("attack %s.%s" % (attack, figure), ())))
                                   for figure in ("p50", "p99", "worst")) for name in names]
            for attack in tuple(ATTACKS) + KEY_ATTACKS])
    lines = []
    for target in TARGETS:
        value = compare(results, target, against)
        if value is not None:
            better = (lambda limit: value >= limit) if target.more_is_better else (lambda limit: value <= limit)
            lines.append(["%s, against %s" % (target.label, target.against or against)]
                         + [("" if target.more_is_better else "<= ") + wanted_text(target, limit)
                            for limit in (target.least, target.aim)] + [wanted_text(target, value)] + [
                "aim met" if better(target.aim) else "met" if better(target.least) else "SHORT"])
    if lines:
        print()
        print_columns([["ratio of nutshim's figure", "at least", "aim", "got", ""]] + lines)


# ---- main ---------------------------------------------------------------------------------------

def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure nutshim beside haproxy, stunnel and upsd in the clear.",
                                     epilog="groups: %s (default: all). A look at all of them within two minutes: "
                                     "--rounds 1 --seconds 0.5" % ", ".join(GROUPS))
    parser.add_argument("groups", metavar="GROUP", nargs="*", help="what to measure, see below")
    parser.add_argument("--rounds", type=int, default=5, help="how often each measure is taken (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2, help="length of one measurement (default %(default)s)")
    parser.add_argument("--nutshim", metavar="FILE", default=NUTSHIM, help="nutshim.py to measure (default: this one)")
    parser.add_argument("--against", metavar="FILE", help="another nutshim.py to measure beside it")
    parser.add_argument("--python", metavar="FILE", help="Python for both (default: /usr/bin/python3, else this one; "
                        "another than runs this file, so that they share no pages with it)")
    options = parser.parse_args(argv)
    system = "/usr/bin/python3"
    options.python = options.python or (system if os.path.exists(system) else sys.executable)
    for group in options.groups:
        if group not in GROUPS:
            parser.error("no such group: %s; there are %s" % (group, ", ".join(GROUPS)))
    options.groups = options.groups or GROUPS
    return options


def find_candidates(options: argparse.Namespace) -> List[Candidate]:
    """Those that are here; a missing one is left out and said so."""
    found = [nutshim("nutshim", os.path.abspath(options.nutshim), options.python)]
    if options.against:
        found.append(nutshim(os.path.basename(options.against), os.path.abspath(options.against), options.python))
    for make, package in ((haproxy, "haproxy"), (stunnel, "stunnel4")):
        program = shutil.which(make.__name__, path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
        if program:
            found.append(make(program))
        else:
            say("%s is left out: not installed (Debian package %s)" % (make.__name__, package))
    return found


def version_of(candidate: Candidate) -> str:
    done = subprocess.run(candidate.version, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in lines if re.search(r"\d\.\d", line)), "version unknown")


def main(argv: Optional[List[str]] = None) -> int:
    options = parse(argv)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)   # they end the run as Ctrl-C does
    with Lab() as lab:
        candidates = find_candidates(options)
        run, code = Run(lab, candidates, options), 0
        try:
            run.alone()
            run.side_by_side()
        except KeyboardInterrupt:
            say("\nended early; the results so far:")
            code = 130
        except Failure as error:
            say("bench.py: %s" % error)
            code = 1
        print("%s, %d processors, Linux %s, %g s a measurement" % (
            time.strftime("%Y-%m-%d %H:%M"), os.cpu_count() or 0, platform.release(), options.seconds))
        for candidate in candidates:
            print("%s: %s" % (candidate.name, version_of(candidate)))
        print()
        if run.results:
            print_results(run.results, os.path.basename(options.against or ""), options.rounds)
    return code


if __name__ == "__main__":
    sys.exit(main())
