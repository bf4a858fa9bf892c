# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of nutshim as a daemon share: Background, planted faults, and what to ask a system about a process.

The fixtures that go with it (daemon, account, python_for_all) are in conftest.py.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import sys

import pytest

from harness import IS_ROOT, NUTSHIM, PlainClient, TlsClient, config_text, folder, free_port, poll, run, write

NO_FILE, NO_DESCRIPTOR = (re.escape(os.strerror(number)) for number in (errno.ENOENT, errno.EMFILE))
as_root = pytest.mark.skipif(not IS_ROOT, reason="needs root")
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d nutshim\[\d+\] "


def server_section(nut, pki, **options):
    """A server shim in front of a real upsd."""
    section = {"role": "server", "listen": "127.0.0.1:%d" % free_port(), "upstream": "127.0.0.1:%d" % nut.port,
               "certificate": pki.server.file}
    section.update(options)
    return section


PLANTED = """
import os

def plant(name, method, marker):
    cls = getattr(nutshim, name)
    real = getattr(cls, method)
    def faulty(self, data, *more):
        if marker in data:
            raise RuntimeError("planted fault")
        return real(self, data, *more)
    setattr(cls, method, faulty)

plant("Conversation", "from_client", b"PLANTED-client")
plant("Conversation", "from_upstream", b"PLANTED-upstream")
plant("Greeting", "feed", b"PLANTED-greeting")

def plant_call(name):
    real = getattr(nutshim, name)
    def faulty(*args, **options):
        if os.path.exists(os.environ["PLANTED"] + name):
            raise RuntimeError("planted fault")
        return real(*args, **options)
    setattr(nutshim, name, faulty)

if "PLANTED" in os.environ:
    for name in ("Conversation", "starttls_reply", "read_certificate"):
        plant_call(name)
"""


def works(port, question="GET VAR ups ups.status"):
    """True if a new TLS session on a server shim's port reaches upsd."""
    with TlsClient(port) as client:
        return client.ask(question).startswith(b"VAR ups ups.status ")


def refused(port):
    """True if nobody listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False


def turned_away(port, **options):
    """True if a TLS client is not let in."""
    try:
        with TlsClient(port, **options) as client:
            return not client.ask("VER").startswith(b"Network UPS Tools")
    except (OSError, AssertionError):               # ssl.SSLError is an OSError
        return True


def runs(pid):
    """True while a process that may not be our child runs; a zombie does not."""
    try:
        with open("/proc/%d/stat" % pid, encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def proc_status(path, name):
    """The words of one line of a /proc status file."""
    with open(path + "/status", encoding="ascii", errors="replace") as file:
        return re.search(r"^%s:(.*)$" % name, file.read(), re.M).group(1).split()


def read(path):
    """A file's text, "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


class Background:
    """nutshim.py in the background with a log file, as an init script starts it.

    It stays as root unless the configuration says otherwise; user="default" leaves the line out.
    """

    def __init__(self, config, script=NUTSHIM, python=None):
        self._stack = contextlib.ExitStack()
        self.folder = self._stack.enter_context(folder("daemon"))
        os.chmod(self.folder, 0o755)                # for whoever it becomes
        self.config = os.path.join(self.folder, "nutshim.conf")
        self.pidfile = os.path.join(self.folder, "nutshim.pid")
        self.log_file = os.path.join(self.folder, "log")
        self.program = [python or sys.executable, script]
        self.configure(config)

    def configure(self, config):
        """Write the configuration file."""
        if not isinstance(config, str):
            top = dict({"log": self.log_file}, **config.get("", {}))
            default_user = top.get("user") == "default"
            if default_user:
                del top["user"]
            config = config_text(dict({"": top}, **{k: v for k, v in config.items() if k}), self.folder)
            if default_user:
                config = config.replace("user = root\n", "", 1)
        write(self.config, config, 0o644)

    def start(self, *args, **options):
        """Start it and return the CompletedProcess of the parent."""
        return run(*self.program, *args, "-f", self.config, **options)

    @property
    def pid(self):
        """The process that the pidfile names."""
        return int(read(self.pidfile))

    @property
    def proc(self):
        """Its folder in /proc."""
        return "/proc/%d" % self.pid

    @property
    def log(self):
        """Its log file's text."""
        return read(self.log_file)

    def ports(self, section):
        """The ports that a section was said to listen on."""
        return [int(port) for port in re.findall(r"\[%s\] listening on \S+:(\d+)" % section, self.log)]

    def port(self, section):
        """The newest of them."""
        return self.ports(section)[-1]

    def processes(self):
        """The processes whose command line names its configuration."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open("/proc/%s/cmdline" % pid, "rb") as cmdline:
                if self.config.encode() in cmdline.read().split(b"\0") and runs(int(pid)):
                    found.append(int(pid))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.processes():
                os.kill(pid, number)
            with contextlib.suppress(AssertionError):
                poll(lambda: not self.processes(), 5)
        self._stack.close()


def becoming(account):
    """What to do in a new process, before its program runs, to be that user."""
    def become():
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
    return become


def own_copy(path, shim, account):
    """Copy a file into a daemon's folder for that user alone; its path there."""
    copy = shutil.copy(path, shim.folder)
    os.chown(copy, account.pw_uid, account.pw_gid)
    return copy


def knock(port, times=1):
    """Open sessions that end before TLS: each leaves a line or more in the log."""
    for _ in range(times):
        with PlainClient(port) as client:
            assert client.ask("LOGOUT") == b"OK Goodbye\n"


def keepalive_timers(pid):
    """The kinds of timers of a process's established TCP sockets: "keepalive" is one due within a minute."""
    inodes = set()
    for fd in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink("/proc/%d/fd/%s" % (pid, fd)))
    kinds = set()
    for table in ("tcp", "tcp6"):
        for line in read("/proc/net/" + table).splitlines()[1:]:
            fields = line.split()                   # Linux, Documentation/networking/proc_net_tcp.rst
            if "socket:[%s]" % fields[9] in inodes and fields[3] == "01":
                kind, due = fields[5].split(":")
                kinds.add("keepalive" if kind == "02" and int(due, 16) <= 6000 else "timer %s in %d" % (kind, int(due, 16)))
    return kinds
