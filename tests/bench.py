#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""nutshim measured beside stunnel, haproxy and upsd in the clear.

    load processes --plain--> client process --TLS--> server process --plain--> upsd
    load processes --plain------------------------------------------------------> upsd   (the limit)

All candidates stand side by side in front of the same real upsd (with dummy-ups), use TLS 1.3 with the same
certificate, check it, and have one process for each side.  A round takes each measure once from each candidate,
in an order that changes, so that whatever else the machine does hits all of them alike.  A figure is the median
of the rounds; a ratio is the median of the rounds' ratios.

upsc1 upsc16            sessions a second, 1 or 16 at once: connect, GET VAR, its reply, LOGOUT, `OK Goodbye`, close
poll1 poll32 poll256    exchanges a second on 1, 32 or 256 established sessions: each asks again once it has its reply
pss                     memory of each process with 0, 100 and 1,000 established sessions
start                   time from the start of the server's process to the first answer to STARTTLS (nutshim alone
                        speaks it) and to the first complete TLS handshake (all)
storm                   an established TLS session of the server's process, while 64 clients storm it with full
                        handshakes against an RSA-4096 certificate

CPU times are those of the client's and the server's process together, by the kernel's own count.

Order of this file: certificates and processes, upsd, candidates, load, measures, results, chart, main.
"""

import argparse
import array
import errno
import itertools
import json
import math
import multiprocessing
import os
import platform
import pwd
import random
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from html import escape
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
USER = pwd.getpwuid(os.getuid()).pw_name     # nobody changes to another user
LOCAL = "127.0.0.1"
LOAD_PROCESSES = 4 if (os.cpu_count() or 1) >= 4 else 2
SESSIONS_AT_MOST = 4096     # what upsd and every candidate are set up for
FILES_AT_MOST = 16384       # open files a process: two a session, and room for what was closed a moment ago
START_LIMIT = 15            # seconds for a program to open its port
SETUP_LIMIT = 90            # seconds for a load process to establish its sessions
REPLY_LIMIT = 10            # seconds without any reply at all: the candidate hangs
WARM_UP = 0.3               # seconds of load before anything counts
STORM_CLIENTS = 64
STORM_WARM_UP = 1.0         # a storm takes longer to be in full swing
MEMORY_STEPS = (0, 100, 1000)


Address = Tuple[str, int]


class Failure(Exception):
    """A candidate did not do what is measured; its figure is left out and the reason is shown."""


# ---- certificates and processes ---------------------------------------------------------------------------------

class Lab:
    """A temporary folder and the processes of this run; close() leaves neither behind."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="nutshim-bench-")
        self.processes = []  # type: List[subprocess.Popen]
        self.logs = {}       # type: Dict[int, str]
        self.numbers = itertools.count(1)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def write(self, name: str, text: str) -> str:
        """Write a file under a name of its own and return its path."""
        path = self.path("%03d-%s" % (next(self.numbers), name))
        with open(path, "w") as file:
            file.write(text)
        return path

    def start(self, command: Sequence[str], port: int, **more: Any) -> subprocess.Popen:
        """Start a program; return once it listens on port (0: at once)."""
        log = self.write("log", "")
        with open(log, "ab") as output:
            # A session of its own keeps the terminal's Ctrl-C away from it: close() ends it.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                       start_new_session=True, **more)
        self.processes.append(process)
        self.logs[process.pid] = log
        deadline = time.monotonic() + START_LIMIT
        while port and not is_listening(port):
            if process.poll() is not None:
                raise Failure("%s ended at once:\n%s" % (" ".join(command), self.last_words(process)))
            if time.monotonic() > deadline:
                raise Failure("%s did not open port %d:\n%s" % (" ".join(command), port, self.last_words(process)))
            time.sleep(0.01)
        return process

    def last_words(self, process: subprocess.Popen) -> str:
        with open(self.logs[process.pid], "rb") as file:
            return file.read()[-1500:].decode("utf-8", "replace").strip()

    def empty_logs(self) -> None:
        """Logs are kept for messages only; a line for each session would fill the disk."""
        for process in self.processes:
            os.truncate(self.logs[process.pid], 0)

    def stop(self, process: subprocess.Popen) -> None:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.remove(process)

    def close(self) -> None:
        for process in reversed(self.processes[:]):
            self.stop(process)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    """A free loopback port outside the range that outgoing connections take theirs from."""
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind((LOCAL, port))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise


def is_listening(port: int) -> bool:
    """Ask the kernel, not the program: a connection made to try would already be a session."""
    with open("/proc/net/tcp") as table:
        return any(line.split()[1].endswith(":%04X" % port) and line.split()[3] == "0A"
                   for line in itertools.islice(table, 1, None))


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all its threads, those that ended too (Linux: the clock's number is made of the id)."""
    return time.clock_gettime((~pid << 3) | 2)


def memory(pid: int) -> Dict[str, float]:
    """MB of a process: PSS (each shared page split between those who map it) and RSS (each page in full)."""
    with open("/proc/%d/smaps_rollup" % pid) as file:
        return {name.lower(): int(kilobytes) / 1024
                for name, kilobytes in re.findall(r"^(Pss|Rss):\s+(\d+) kB", file.read(), re.M)}


def make_certificates(lab: Lab) -> None:
    """ca.pem, and under it server.pem (P-256) and server-rsa.pem (RSA-4096), each with its key."""
    def openssl(*arguments: str) -> None:
        done = subprocess.run(("openssl",) + arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise Failure("openssl %s failed:\n%s" % (arguments[0], done.stdout.decode("utf-8", "replace")))

    p256 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    extensions = lab.write("extensions", "subjectAltName = DNS:localhost, IP:127.0.0.1\n"
                                         "keyUsage = digitalSignature\nextendedKeyUsage = serverAuth\n"
                                         "authorityKeyIdentifier = keyid\nsubjectKeyIdentifier = hash\n")
    openssl("req", "-x509", *p256, "-nodes", "-days", "2", "-subj", "/CN=nutshim benchmark",
            "-addext", "keyUsage = critical, keyCertSign", "-keyout", lab.path("ca.key"), "-out", lab.path("ca.pem"))
    for name, key in (("server", p256), ("server-rsa", ("-newkey", "rsa:4096"))):
        request, key_file, certificate = lab.path("request"), lab.path("key"), lab.path("certificate")
        openssl("req", "-new", *key, "-nodes", "-subj", "/CN=localhost", "-keyout", key_file, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", lab.path("ca.pem"), "-CAkey", lab.path("ca.key"),
                "-CAcreateserial", "-days", "2", "-extfile", extensions, "-out", certificate)
        with open(lab.path(name + ".pem"), "w") as both:
            for part in (certificate, key_file):
                with open(part) as file:
                    both.write(file.read())


# ---- upsd -------------------------------------------------------------------------------------------------------

class Upsd(NamedTuple):
    address: Address
    question: bytes             # the GET VAR that all sessions ask
    pid: int                    # 0: not ours


def start_upsd(lab: Lab) -> Upsd:
    """The distribution's upsd with dummy-ups as its driver; both live in the temporary folder."""
    programs = {}
    for name in ("upsd", "dummy-ups"):
        programs[name] = shutil.which(name, path="/lib/nut:/usr/lib/nut:/usr/libexec/nut:/usr/sbin:/sbin:"
                                                 "/usr/local/ups/sbin:/usr/local/ups/bin:" + os.environ["PATH"])
        if not programs[name]:
            raise Failure("%s is missing: install nut-server, or name a running upsd with --upsd" % name)
    folder, port = lab.path("nut"), free_port()
    os.mkdir(folder, 0o700)
    for name, text in (
            ("nut.conf", "MODE=standalone\n"),
            ("ups.conf", "[ups]\n driver = dummy-ups\n port = ups.dev\n desc = \"benchmark\"\n"),
            # Without the TIMER dummy-ups would read its file again and again and eat a processor.
            ("ups.dev", "ups.status: OL\nbattery.charge: 100\nups.load: 17\nTIMER 300\n"),
            ("upsd.conf", "LISTEN %s %d\nMAXCONN %d\n" % (LOCAL, port, SESSIONS_AT_MOST)),
            ("upsd.users", "")):
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)
    environment = dict(os.environ, **{name: folder for name in (
        "NUT_CONFPATH", "NUT_STATEPATH", "NUT_PIDPATH", "NUT_ALTPIDPATH")})
    lab.start([programs["dummy-ups"], "-a", "ups", "-F", "-u", USER], 0, env=environment)
    daemon = lab.start([programs["upsd"], "-F", "-u", USER], port, env=environment)
    upsd = Upsd((LOCAL, port), b"GET VAR ups ups.status\n", daemon.pid)
    deadline = time.monotonic() + START_LIMIT
    while not ask(upsd.address, upsd.question).startswith(b"VAR "):
        if time.monotonic() > deadline:
            raise Failure("upsd does not get data from dummy-ups:\n" + lab.last_words(daemon))
        time.sleep(0.1)
    return upsd


def use_upsd(where: str) -> Upsd:
    """A upsd that runs already, and the first UPS in its list."""
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise Failure("--upsd %s: expected HOST:PORT" % where)
    address = (socket.gethostbyname(host), int(port))
    with socket.create_connection(address, REPLY_LIMIT) as connection, connection.makefile("rwb") as stream:
        stream.write(b"LIST UPS\n")
        stream.flush()
        first = [stream.readline(), stream.readline()][1].split()
    if first[:1] != [b"UPS"]:
        raise Failure("upsd at %s has no UPS" % where)
    return Upsd(address, b"GET VAR %s ups.status\n" % first[1], 0)


def read_line(connection: Any) -> bytes:
    """One reply of one line, whole."""
    data = connection.recv(4096)
    while not data.endswith(b"\n"):
        more = connection.recv(4096)
        if not more:
            raise Failure("connection closed instead of a reply" if not data else "reply cut: %r" % data)
        data += more
    return data


def ask(address: Address, question: bytes) -> bytes:
    with socket.create_connection(address, REPLY_LIMIT) as connection:
        connection.sendall(question)
        return read_line(connection)


# ---- candidates -------------------------------------------------------------------------------------------------

class Candidate(NamedTuple):
    """A program under test.  Its configuration is the first text and, behind it, that of the side."""
    name: str
    program: List[str]          # the command, up to the name of its configuration file
    version: List[str]          # the command that tells its version
    starttls: bool
    every: str
    server: str                 # TLS in, plain to upsd
    client: str                 # plain in, verified TLS to the server side

    def command(self, lab: Lab, side: str, port: int, upstream: Address, pem: str = "") -> List[str]:
        text = self.every + getattr(self, side)
        return self.program + [lab.write(self.name, text.format(
            side=side, port=port, upstream="%s:%d" % upstream, pem=lab.path(pem), ca=lab.path("ca.pem"),
            most=SESSIONS_AT_MOST, user=USER, pidfile=lab.path("%d.pid" % port)))]


def nutshim(name: str, path: str, python: str) -> Candidate:
    return Candidate(name, [python, path, "-F", "-f"], [python, "-V"], True,
                     "log = stderr\nuser = {user}\npidfile = {pidfile}\nmax_sessions = {most}\n[{side}]\n"
                     "role = {side}\nlisten = 127.0.0.1:{port}\nupstream = {upstream}\n"
                     "max_sessions_per_address = {most}\n",
                     "certificate = {pem}\n",
                     "server_name = localhost\ntrust = {ca}\n")


def stunnel(name: str, path: str) -> Candidate:
    # TCP_NODELAY is what its manual has for short messages.  It resumes sessions by itself, and has a thread a session.
    return Candidate(name, [path], [path, "-version"], False,
                     "foreground = yes\npid =\nsyslog = no\ndebug = 3\nsocket = l:TCP_NODELAY=1\n"
                     "socket = r:TCP_NODELAY=1\n[nut]\naccept = 127.0.0.1:{port}\nconnect = {upstream}\n"
                     "sslVersionMin = TLSv1.3\n",
                     "cert = {pem}\n",
                     "client = yes\nsni = localhost\nverifyChain = yes\ncheckHost = localhost\nCAfile = {ca}\n")


def haproxy(name: str, path: str) -> Candidate:
    # TCP_NODELAY and resumption are its defaults; it checks the name sent as SNI; it logs nothing unless told where.
    return Candidate(name, [path, "-db", "-f"], [path, "-v"], False,
                     "global\n nbthread 1\n maxconn {most}\ndefaults\n mode tcp\n maxconn {most}\n timeout connect 5s\n"
                     " timeout client 10m\n timeout server 10m\nlisten nut\n",
                     " bind 127.0.0.1:{port} ssl crt {pem} ssl-min-ver TLSv1.3\n server upsd {upstream}\n",
                     " bind 127.0.0.1:{port}\n server shim {upstream} ssl ssl-min-ver TLSv1.3 sni str(localhost)"
                     " verify required ca-file {ca}\n")


DIRECT = Candidate("upsd", [], [], False, "", "", "")       # nothing in between
BOTH = ("server", "client")
CANDIDATES = ("upsd", "nutshim", "stunnel", "haproxy")


class Pair:
    """A candidate's running processes, each in front of the one before, and upsd behind them all."""

    def __init__(self, lab: Lab, candidate: Candidate, upsd: Upsd, sides: Sequence[str] = BOTH,
                 pem: str = "server.pem") -> None:
        self.lab, self.name, self.starttls = lab, candidate.name, candidate.starttls
        self.address = upsd.address
        self.processes = []  # type: List[subprocess.Popen]
        for side in sides:
            port = free_port()
            command = candidate.command(lab, side, port, self.address, pem)
            self.processes.append(lab.start(command, port))
            self.address = (LOCAL, port)

    def pids(self) -> List[int]:
        return [process.pid for process in self.processes]

    def last_words(self) -> str:
        return "".join("\n%s: %s" % (side, self.lab.last_words(process)) for side, process in zip(BOTH, self.processes))


# ---- load: these functions run in processes of their own -----------------------------------------------------------
#
# Each establishes what it needs, calls window(), which returns the two times between which events count once all
# load processes are ready, and goes on until the second.

Figures = Dict[str, float]
Window = Callable[[], Tuple[float, float]]


class Tls(NamedTuple):
    starttls: bool              # False: TLS from the first byte
    ca: str                     # file


def load_upsc(window: Window, address: Address, count: int, question: bytes) -> Dict[str, Any]:
    """Sessions as upsc has them, count at once, one after the other without end."""
    poller, asking, leaving, done = select.epoll(), {}, {}, 0

    def open_session() -> None:
        connection = socket.socket()
        connection.connect(address)     # on loopback: at once
        connection.send(question)
        asking[connection.fileno()] = connection
        poller.register(connection, select.EPOLLIN)

    begin, end = window()
    for _ in range(count):
        open_session()
    while time.monotonic() < end:
        events = poller.poll(REPLY_LIMIT)
        if not events:
            raise Failure("no reply within %d s" % REPLY_LIMIT)
        for number, _ in events:
            connection = asking.pop(number, None)
            if connection:
                reply = read_line(connection)
                if not reply.startswith(b"VAR "):
                    raise Failure("wrong reply %r" % reply)
                connection.send(b"LOGOUT\n")
                leaving[number] = connection
            else:
                connection = leaving.pop(number)
                reply = read_line(connection)
                if reply != b"OK Goodbye\n":
                    raise Failure("wrong reply to LOGOUT: %r" % reply)
                connection.close()
                if begin <= time.monotonic() < end:
                    done += 1
                open_session()
    return {"done": done}


def load_poll(window: Window, address: Address, count: int, question: bytes,
              tls: Optional[Tls] = None) -> Dict[str, Any]:
    """Established sessions as upsmon has them, each of which asks again once it has its reply."""
    poller, sessions, asked, waits, now = select.epoll(), {}, {}, array.array("d"), 0.0
    for connection in open_sessions(address, count, question, tls):
        sessions[connection.fileno()] = connection
        poller.register(connection, select.EPOLLIN)
    begin, end = window()
    for number, connection in sessions.items():
        asked[number] = time.monotonic()
        connection.send(question)
    while now < end:
        events = poller.poll(REPLY_LIMIT)
        if not events:
            raise Failure("no reply within %d s" % REPLY_LIMIT)
        for number, _ in events:
            connection = sessions[number]
            reply = read_line(connection)
            now = time.monotonic()
            if not reply.startswith(b"VAR "):
                raise Failure("wrong reply %r" % reply)
            if begin <= now < end:
                waits.append(now - asked[number])
            asked[number] = now
            connection.send(question)
    return {"done": len(waits), "waits": waits}


def open_sessions(address: Address, count: int, question: bytes,
                  tls: Optional[Tls] = None) -> List[socket.socket]:
    """Sessions that have each had a reply, so that they stand all the way to upsd."""
    sessions = []
    for number in range(count):
        try:
            connection = socket.create_connection(address, REPLY_LIMIT)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls:
                if tls.starttls:
                    connection.sendall(b"STARTTLS\n")
                    read_line(connection)
                connection = tls_context(tls.ca).wrap_socket(connection, server_hostname="localhost")
            connection.sendall(question)
            read_line(connection)
        except (Failure, OSError) as error:
            raise Failure("session %d of %d: %s" % (number + 1, count, error)) from None
        connection.setblocking(True)
        sessions.append(connection)
    return sessions


def tls_context(ca: str) -> Any:
    # Not imported in the main process: that would share OpenSSL's pages with the candidates and lower their PSS.
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    return context


def load_storm(window: Window, address: Address, count: int, starttls: bool) -> Dict[str, Any]:
    """Clients that do a full handshake, hang up and come again; count at once, in one process of low priority."""
    import ssl
    os.nice(10)                 # on a small machine the server under storm comes first
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE     # saves work here; the server's is the same
    poller, clients, done, lost = select.epoll(), {}, 0, 0

    def come() -> None:
        client = socket.create_connection(address)
        client.setblocking(False)
        poller.register(client, select.EPOLLIN)
        if starttls:
            client.send(b"STARTTLS\n")
            clients[client.fileno()] = client
        else:
            shake_hands(client)

    def shake_hands(client: socket.socket) -> None:
        """One step of a handshake; afterwards the next client comes in its place."""
        nonlocal done, lost
        try:
            if not isinstance(client, ssl.SSLSocket):
                client = context.wrap_socket(client, do_handshake_on_connect=False)     # the same descriptor
                clients[client.fileno()] = client
            client.do_handshake()
            done += begin <= time.monotonic() < end
        except ssl.SSLWantReadError:
            return
        except OSError:
            lost += 1
        clients.pop(client.fileno()).close()
        come()

    begin, end = window()
    for _ in range(count):
        come()
    while time.monotonic() < end:
        for number, _ in poller.poll(0.5):
            client = clients[number]
            if not isinstance(client, ssl.SSLSocket) and read_line(client) != b"OK STARTTLS\n":
                raise Failure("STARTTLS refused")
            shake_hands(client)
    return {"done": done, "lost": lost}


def load_first_answer(window: Window, address: Address, tls: Tls) -> Dict[str, Any]:
    """Try to connect until it works; the times of the first answer and of the first handshake's end."""
    context = tls_context(tls.ca)           # now, and not when the clock runs
    _, deadline = window()
    while True:
        try:
            plain = socket.create_connection(address)
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise Failure("port not open within %d s" % START_LIMIT) from None
            time.sleep(0.0005)
    result = {}
    if tls.starttls:
        plain.sendall(b"STARTTLS\n")
        read_line(plain)
        result["starttls"] = time.monotonic()
    context.wrap_socket(plain, server_hostname="localhost").close()
    result["handshake"] = time.monotonic()
    return result


class LoadProcess:
    """A forked process that runs one of the functions above."""

    def __init__(self, function: Callable[..., Dict[str, Any]], arguments: Sequence[Any]) -> None:
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

    def hear(self, limit: float) -> Any:
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

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def run_load(jobs: Sequence[Tuple[Any, ...]], pids: List[int], upsd: Upsd, seconds: float,
             warm_up: float = WARM_UP) -> Tuple[List[Dict[str, Any]], float, Figures]:
    """Run each job (function, arguments …) in a process of its own, all over the same stretch of time.

    What comes back: the jobs' results; the CPU seconds of the processes pids, together; how busy upsd and the
    busiest load process were and how long the sessions waited."""
    processes = [LoadProcess(job[0], job[1:]) for job in jobs]
    watched = pids + [process.process.pid for process in processes] + ([upsd.pid] if upsd.pid else [])
    try:
        for process in processes:
            process.hear(SETUP_LIMIT)
        begin = time.monotonic() + warm_up
        counts = []
        for process in processes:
            process.pipe.send((begin, begin + seconds))
        for moment in (begin, begin + seconds):
            time.sleep(max(0, moment - time.monotonic()))
            counts.append([cpu_seconds(pid) for pid in watched])
        results = [process.hear(REPLY_LIMIT + 20) for process in processes]
    finally:
        for process in processes:
            process.stop()
    used = [after - before for before, after in zip(*counts)]
    own, load = len(pids), len(pids) + len(jobs)
    figures = {"load_busy": max(used[own:load]) / seconds * 100}
    if upsd.pid:
        figures["upsd_busy"] = used[load] / seconds * 100
    waits = sorted(itertools.chain.from_iterable(result.get("waits", ()) for result in results))
    if waits:
        figures.update(p50=statistics.median(waits) * 1e3, p99=waits[len(waits) * 99 // 100] * 1e3)
    return results, sum(used[:own]), figures


# ---- measures ----------------------------------------------------------------------------------------------------

def measure_sessions(function: Callable[..., Dict[str, Any]], pair: Pair, upsd: Upsd, at_once: int,
                     seconds: float) -> Figures:
    shares = min(LOAD_PROCESSES, at_once)
    jobs = [(function, pair.address, at_once // shares, upsd.question)] * shares
    results, cpu, figures = run_load(jobs, pair.pids(), upsd, seconds)
    done = sum(result["done"] for result in results)
    if not done:
        raise Failure("nothing came to its end in %.1f s" % seconds)
    if pair.processes:
        figures["cpu"] = cpu / done * 1e6
    return dict(figures, rate=done / seconds)


def measure_memory(lab: Lab, candidate: Candidate, upsd: Upsd) -> Figures:
    """In processes of their own, of which nothing else runs meanwhile: PSS depends on who shares the pages."""
    pair, sessions, figures = Pair(lab, candidate, upsd), [], {}  # type: Pair, List[socket.socket], Figures
    try:
        for step in MEMORY_STEPS:
            sessions += open_sessions(pair.address, step - len(sessions), upsd.question)
            time.sleep(0.5)         # the last session's tickets and log lines are under way
            for side, pid in zip(BOTH, pair.pids()):
                for kind, megabytes in memory(pid).items():
                    figures["%s_%s_%d" % (side, kind, step)] = megabytes
        return figures
    except Failure as error:
        raise Failure(str(error) + pair.last_words()) from None
    finally:
        for connection in sessions:
            connection.close()
        for process in pair.processes:
            lab.stop(process)


def measure_start(lab: Lab, candidate: Candidate, upsd: Upsd) -> Figures:
    port = free_port()
    command = candidate.command(lab, "server", port, upsd.address, "server.pem")
    watcher = LoadProcess(load_first_answer, ((LOCAL, port), Tls(candidate.starttls, lab.path("ca.pem"))))
    process = None
    try:
        watcher.hear(SETUP_LIMIT)
        started = time.monotonic()
        watcher.pipe.send((started, started + START_LIMIT))
        process = lab.start(command, 0)
        while not watcher.pipe.poll(0.1):
            if process.poll() is not None:
                raise Failure("%s ended at once:\n%s" % (" ".join(command), lab.last_words(process)))
        return {name: (moment - started) * 1e3 for name, moment in watcher.hear(0).items()}
    finally:
        watcher.stop()
        if process:
            lab.stop(process)


def measure_storm(lab: Lab, pair: Pair, upsd: Upsd, seconds: float) -> Figures:
    jobs = [(load_poll, pair.address, 1, upsd.question, Tls(pair.starttls, lab.path("ca.pem"))),
            (load_storm, pair.address, STORM_CLIENTS, pair.starttls)]
    (steady, storm), _, figures = run_load(jobs, pair.pids(), upsd, seconds, STORM_WARM_UP)
    if not storm["done"]:
        raise Failure("no client of the storm finished a handshake (%d were cut off)" % storm["lost"])
    return dict(figures, rate=steady["done"] / seconds, handshakes=storm["done"] / seconds,
                lost=storm["lost"] / seconds)


MEASURES = ("pss", "start", "upsc1", "upsc16", "poll1", "poll32", "poll256", "storm")
Results = Dict[str, Dict[str, List[Optional[float]]]]       # candidate, "measure.figure", one value for each round


class Run:
    """All measures of all candidates, round by round."""

    def __init__(self, lab: Lab, upsd: Upsd, candidates: List[Candidate], measures: Sequence[str], rounds: int,
                 seconds: float) -> None:
        self.lab, self.upsd, self.candidates = lab, upsd, candidates
        self.measures, self.rounds, self.seconds = measures, rounds, seconds
        self.results = {candidate.name: {} for candidate in candidates + [DIRECT]}  # type: Results

    def take(self, number: int, measure: str, name: str, function: Callable[..., Figures], *arguments: Any) -> None:
        """Take, note and show what one measure brings for one candidate in one round."""
        before = time.monotonic()
        try:
            figures = function(*arguments)
            text = ", ".join("%s %.4g" % item for item in figures.items() if "_rss_" not in item[0])
        except (Failure, OSError) as error:
            figures, text = {}, "FAILED: %s" % error
            text += "".join(pair.last_words() for pair in arguments if isinstance(pair, Pair))
        for figure, value in figures.items():
            noted = self.results[name].setdefault("%s.%s" % (measure, figure), [None] * self.rounds)
            noted[number] = value
        self.lab.empty_logs()
        say("round %d/%d  %-7s  %-8s  %4.1f s  %s" % (number + 1, self.rounds, measure, name,
                                                       time.monotonic() - before, text))

    def alone(self) -> None:
        """The measures that start processes of their own; nothing of another candidate may run beside them."""
        for number in range(self.rounds):
            for candidate in turned(self.candidates, number):
                if "pss" in self.measures and number == 0:      # the same in each round
                    self.take(number, "pss", candidate.name, measure_memory, self.lab, candidate, self.upsd)
                if "start" in self.measures:
                    self.take(number, "start", candidate.name, measure_start, self.lab, candidate, self.upsd)

    def side_by_side(self, with_upsd: bool) -> None:
        """The measures of processes that stand all the time; idle ones cost nothing."""
        steady = [measure for measure in self.measures if measure not in ("pss", "start", "storm")]
        pairs, storms = [], []  # type: List[Pair], List[Pair]
        if with_upsd and steady:
            pairs.append(Pair(self.lab, DIRECT, self.upsd, ()))
        for candidate in self.candidates:
            try:
                if steady:
                    pairs.append(Pair(self.lab, candidate, self.upsd))
                if "storm" in self.measures:
                    storms.append(Pair(self.lab, candidate, self.upsd, BOTH[:1], "server-rsa.pem"))
            except Failure as error:
                say("%s is left out: %s" % (candidate.name, error))
        for number in range(self.rounds):
            for measure in steady:
                function = load_upsc if measure.startswith("upsc") else load_poll
                for pair in turned(pairs, number):
                    self.take(number, measure, pair.name, measure_sessions, function, pair, self.upsd,
                              int(measure[4:]), self.seconds)
            for pair in turned(storms, number):
                self.take(number, "storm", pair.name, measure_storm, self.lab, pair, self.upsd, self.seconds)


def turned(items: List[Any], by: int) -> List[Any]:
    """The same items, another one first."""
    by %= len(items) or 1
    return items[by:] + items[:by]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- results -----------------------------------------------------------------------------------------------------

class Target(NamedTuple):
    """A ratio of nutshim's figure to another candidate's, and how good it should be."""
    label: str
    figure: str
    against: str
    more_is_better: bool
    least: float
    aim: float


TARGETS = (
    Target("sessions/s, upsc pattern, 16 at once", "upsc16.rate", "haproxy", True, 6, 10),
    Target("sessions/s, upsc pattern, 16 at once", "upsc16.rate", "stunnel", True, 12, 20),
    Target("sessions/s, upsc pattern, 16 at once", "upsc16.rate", "upsd", True, 0.45, 0.7),
    Target("CPU a session, upsc pattern, 16 at once", "upsc16.cpu", "haproxy", False, 1 / 7, 1 / 12),
    Target("CPU an exchange, 32 sessions", "poll32.cpu", "haproxy", False, 1.25, 1.0),
    Target("CPU an exchange, 32 sessions", "poll32.cpu", "stunnel", False, 0.7, 0.4),
    Target("p99 in the RSA-4096 storm", "storm.p99", "stunnel", False, 1 / 5, 1 / 15),
    Target("PSS, 1,000 sessions, server side", "pss.server_pss_1000", "haproxy", False, 0.75, 0.5),
    Target("PSS idle, server side", "pss.server_pss_0", "stunnel", False, 1.1, 0.9),
)


def table_rows() -> List[Tuple[str, str]]:
    """The rows of the table: what stands in the first column, and the figure; rows without figures are not shown."""
    rows = []
    for measure, title, thing in (("upsc1", "upsc pattern, 1 at once", "sessions"),
                                  ("upsc16", "upsc pattern, 16 at once", "sessions"),
                                  ("poll1", "established sessions, 1", "exchanges"),
                                  ("poll32", "established sessions, 32", "exchanges"),
                                  ("poll256", "established sessions, 256", "exchanges"),
                                  ("storm", "established session in the storm", "exchanges")):
        rows += [("%s: %s" % (title, what), "%s.%s" % (measure, figure)) for what, figure in (
            (thing + "/s", "rate"), ("CPU each, us", "cpu"), ("p50, ms", "p50"), ("p99, ms", "p99"),
            ("upsd busy, %", "upsd_busy"), ("load process busy, %", "load_busy"),
            ("handshakes/s", "handshakes"), ("handshakes cut off/s", "lost"))]
    rows += [("%s, %s side, %d sessions, MB" % (kind.upper(), side, step), "pss.%s_%s_%d" % (side, kind, step))
             for kind in ("pss", "rss") for side in BOTH for step in MEMORY_STEPS]
    return rows + [("start to first OK STARTTLS, ms", "start.starttls"),
                   ("start to first TLS handshake, ms", "start.handshake")]


def median(values: Sequence[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(results: Results, name: str, target: Target) -> Optional[float]:
    """The median of the rounds' ratios; None without figures of both."""
    pairs = zip(results.get(name, {}).get(target.figure, ()), results.get(target.against, {}).get(target.figure, ()))
    return median([own / other if own is not None and other else None for own, other in pairs])


def number_text(value: Optional[float]) -> str:
    if value is None:
        return "-"
    return "%.0f" % value if value >= 100 else "%.1f" % value if value >= 10 else "%.2f" % value


def ratio_text(value: float) -> str:
    """6 x, 0.45 x, but 1/12 rather than 0.08 x."""
    return "%.3g x" % value if value > 0.3 else "1/%.3g" % (1 / value)


def verdict(target: Target, value: Optional[float]) -> str:
    if value is None:
        return "no figure"
    better = (lambda wanted: value >= wanted) if target.more_is_better else (lambda wanted: value <= wanted)
    word = "aim met" if better(target.aim) else "met" if better(target.least) else "SHORT"
    return "%s, %s" % (ratio_text(value), word)


def print_columns(lines: List[List[str]]) -> None:
    """A table with its first column to the left and the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]))


def print_results(results: Results, shims: List[str], rounds: int) -> None:
    names = [name for name in results if results[name]]
    lines = [["median of %d rounds" % rounds] + names]
    for label, figure in table_rows():
        values = [median(results[name].get(figure, ())) for name in names]
        if any(value is not None for value in values):
            lines.append([label] + [number_text(value) for value in values])
    print_columns(lines)
    print()
    lines = [["ratio", "at least", "aim"] + shims]
    for target in TARGETS:
        values = [ratio(results, name, target) for name in shims]
        if any(value is not None for value in values):
            sign = "" if target.more_is_better else "<= "
            lines.append(["%s, against %s" % (target.label, target.against), sign + ratio_text(target.least),
                          sign + ratio_text(target.aim)] + [verdict(target, value) for value in values])
    if lines[1:]:
        print_columns(lines)


NOTES = """
upsd: straight to upsd in the clear, the limit.  Where upsd is busy at nearly 100 %, it is upsd that limits the figure.
CPU each: client's and server's process together, for one session or exchange.
Memory is measured once.  RSS is what a process has where nothing else on the box uses the same libraries.  PSS
flatters nutshim here: the benchmark is Python too, and takes a share of the interpreter's pages."""


# ---- chart -------------------------------------------------------------------------------------------------------

def chart(results: Results, shims: List[str]) -> str:
    """An SVG: for each ratio a bar, how many times better nutshim is (less than 1: worse), on a logarithmic scale."""
    rows = [(target, name, ratio(results, name, target)) for target in TARGETS for name in shims]
    rows = [row for row in rows if row[2]]
    left, width, step, top = 420 if len(shims) == 1 else 490, 420, 30, 64
    low, high = 0.1, 100.0

    def across(times: float) -> float:
        share = math.log(min(max(times, low), high) / low) / math.log(high / low)
        return left + share * width

    def better(target: Target, value: float) -> float:
        return value if target.more_is_better else 1 / value

    bottom = top + step * len(rows)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">'
             % (left + width + 90, bottom + 60), '<rect width="100%" height="100%" fill="white"/>',
             '<text x="16" y="26" font-size="16" font-weight="bold">nutshim against others: how many times better'
             '</text>']
    for times in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        x = across(times)
        parts.append('<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s"/>'
                     % (x, top - 8, x, bottom, "#444" if times == 1 else "#ddd"))
        parts.append('<text x="%.1f" y="%d" text-anchor="middle" fill="#555">%g</text>' % (x, top - 14, times))
    for row, (target, name, value) in enumerate(rows):
        y, times = top + row * step, better(target, value)
        ends = sorted((across(1), across(times)))
        good = times >= better(target, target.least)
        label = "%s, against %s" % (target.label, target.against)
        parts.append('<text x="%d" y="%d" text-anchor="end">%s</text>'
                     % (left - 10, y + 16, escape(label if len(shims) == 1 else "%s: %s" % (name, label))))
        parts.append('<rect x="%.1f" y="%d" width="%.1f" height="16" fill="%s"/>'
                     % (ends[0], y + 4, max(ends[1] - ends[0], 1), "#2f7d4f" if good else "#c0662b"))
        for wanted, colour in ((target.least, "#000"), (target.aim, "#888")):
            x = across(better(target, wanted))
            parts.append('<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s" stroke-width="2"/>'
                         % (x, y + 1, x, y + 23, colour))
        parts.append('<text x="%d" y="%d">%s</text>' % (left + width + 10, y + 16, escape(ratio_text(value))))
    parts.append('<text x="16" y="%d" fill="#555">Ticks: wanted at least (black), aim (grey). Orange: short of it. '
                 'Right: the ratio itself. %s</text></svg>' % (bottom + 30, escape(time.strftime("%Y-%m-%d"))))
    return "\n".join(parts) + "\n"


# ---- main --------------------------------------------------------------------------------------------------------

def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure nutshim beside stunnel, haproxy and upsd in the clear.")
    parser.add_argument("--quick", action="store_true", help="2 short rounds, to see that all works")
    parser.add_argument("--rounds", type=int, help="how often each measure is taken (default 5)")
    parser.add_argument("--seconds", type=float, help="length of one measurement (default 2)")
    parser.add_argument("--only", metavar="NAME,…", help="%s (default all)" % ", ".join(CANDIDATES))
    parser.add_argument("--measure", metavar="NAME,…", help="%s, or the beginning of a name" % ", ".join(MEASURES))
    parser.add_argument("--nutshim", metavar="PATH", action="append",
                        help="nutshim.py to measure; repeat it to compare versions as nutshim, nutshim2, …")
    parser.add_argument("--python", metavar="PATH", default=sys.executable,
                        help="the Python that runs nutshim.py (default: this one)")
    parser.add_argument("--upsd", metavar="HOST:PORT", help="a upsd that runs already, instead of one of our own")
    parser.add_argument("--json", metavar="FILE", help="write all figures of all rounds there")
    parser.add_argument("--svg", metavar="FILE", help="write a bar chart of the ratios there")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (0.5 if options.quick else 2.0)
    options.nutshim = options.nutshim or [os.path.join(os.path.dirname(HERE), "nutshim.py")]
    wanted = options.measure.split(",") if options.measure else MEASURES
    options.measures = [name for name in MEASURES if name.startswith(tuple(wanted))]
    for name in wanted:
        if not any(measure.startswith(name) for measure in MEASURES):
            parser.error("unknown measure %s; there are %s" % (name, ", ".join(MEASURES)))
    options.only = options.only.split(",") if options.only else CANDIDATES
    for name in set(options.only).difference(CANDIDATES):
        parser.error("unknown candidate %s; there are %s" % (name, ", ".join(CANDIDATES)))
    return options


def find_candidates(options: argparse.Namespace) -> List[Candidate]:
    """Those that are wanted and here; a missing one is left out and said so."""
    found = []  # type: List[Candidate]
    if "nutshim" in options.only:
        for number, path in enumerate(options.nutshim, 1):
            name = "nutshim" if number == 1 else "nutshim%d" % number
            if os.path.exists(path):
                found.append(nutshim(name, os.path.abspath(path), options.python))
            else:
                say("%s is left out: no file %s" % (name, path))
    for make, package in ((stunnel, "stunnel4"), (haproxy, "haproxy")):
        name = make.__name__
        if name in options.only:
            program = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
            if program:
                found.append(make(name, program))
            else:
                say("%s is left out: not installed (Debian package %s)" % (name, package))
    return found


def version_of(candidate: Candidate) -> str:
    done = subprocess.run(candidate.version, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return "%s (%s)" % (next((line.strip() for line in lines if re.search(r"\d\.\d", line)), "version unknown"),
                        " ".join(candidate.program[:2] if candidate.starttls else candidate.program[:1]))


def main(argv: Optional[List[str]] = None) -> int:
    options = parse(argv)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = FILES_AT_MOST if hard == resource.RLIM_INFINITY else min(hard, FILES_AT_MOST)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)   # they end the run as Ctrl-C does
    lab, ended = Lab(), False
    try:
        make_certificates(lab)
        upsd = use_upsd(options.upsd) if options.upsd else start_upsd(lab)
        candidates = find_candidates(options)
        about = {"date": time.strftime("%Y-%m-%d %H:%M"), "processors": os.cpu_count(), "kernel": platform.release(),
                 "rounds": options.rounds, "seconds": options.seconds, "upsd": options.upsd or "own",
                 "candidates": {candidate.name: version_of(candidate) for candidate in candidates}}
        run = Run(lab, upsd, candidates, options.measures, options.rounds, options.seconds)
        try:
            run.alone()
            run.side_by_side("upsd" in options.only)
        except KeyboardInterrupt:
            ended = True
            say("\nended early; the results so far:")
        print("%(date)s, %(processors)s processors, Linux %(kernel)s, %(seconds)g s a measurement" % about)
        for item in about["candidates"].items():
            print("%s: %s" % item)
        print()
        shims = [candidate.name for candidate in candidates if candidate.name.startswith("nutshim")]
        if any(run.results.values()):
            print_results(run.results, shims, options.rounds)
            print(NOTES)
        ratios = {name: {"%s, against %s" % (target.label, target.against): ratio(run.results, name, target)
                         for target in TARGETS} for name in shims}
        if options.json:
            with open(options.json, "w") as file:
                json.dump({"about": about, "results": run.results, "ratios": ratios}, file, indent=1)
        if options.svg:
            with open(options.svg, "w") as file:
                file.write(chart(run.results, shims))
    except KeyboardInterrupt:
        ended = True
    except (Failure, OSError) as error:
        say("bench.py: %s" % error)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # an impatient second Ctrl-C must leave nothing behind
        lab.close()
    return 130 if ended else 0


if __name__ == "__main__":
    sys.exit(main())
