# SPDX-License-Identifier: GPL-2.0-or-later
"""nutshim as a daemon: start, user, log, service manager, reload, stop, status and limits, around a real upsd.

Real processes throughout. Where a fault cannot be had for real (an exception nobody foresaw, a
clock set back), nutshim.py is started through a small script that plants it: patched().
"""

import contextlib
import errno
import json
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import stat
import sys
import threading
import time

import pytest

from certs import Authority
from harness import (IS_ROOT, NUTSHIM, PRIMARY, ROOT, FalseServer, PlainClient, Shim, TlsClient, client_context,
                     config_text, folder, free_port, pair_config, poll, run, run_shim, silent, write)
from standin import StandIn

as_root = pytest.mark.skipif(not IS_ROOT, reason="needs root")
NO_FILE, NO_DESCRIPTOR = (re.escape(os.strerror(number)) for number in (errno.ENOENT, errno.EMFILE))
LOST = r"[1-9]\d* log lines.*lost"
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d nutshim\[\d+\] "


# ---- helpers ------------------------------------------------------------------------------------

def server_section(nut, pki, **options):
    """A server shim in front of a real upsd."""
    section = {"role": "server", "listen": "127.0.0.1:%d" % free_port(), "upstream": "127.0.0.1:%d" % nut.port,
               "certificate": pki.server.file}
    section.update(options)
    return section


def patched(path, code):
    """Write a script that runs nutshim with some code put in front of main(); its path."""
    return write(os.path.join(path, "patched.py"),
                 "import sys\nsys.path.insert(0, %r)\nimport nutshim\n%s\nsys.exit(nutshim.main())\n" % (ROOT, code), 0o644)


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


def command(shim, *words, **options):
    """Run nutshim.py -c for a daemon; the CompletedProcess."""
    return run_shim("-c", *words, "-f", shim.config, **options)


def status(shim):
    """What -c status --json says."""
    done = command(shim, "status", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shim_status(shim, name):
    """The part of the status about one section."""
    return next(each for each in status(shim)["shims"] if each["name"] == name)


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


@pytest.fixture
def daemon():
    """daemon(config) is a Background that has been started; start=False: not yet."""
    with contextlib.ExitStack() as stack:
        def make(config, *args, start=True, script=NUTSHIM, python=None, **options):
            made = stack.enter_context(Background(config, script, python))
            if start:
                done = made.start(*args, **options)
                assert done.returncode == 0, done.stderr + made.log
            return made
        yield make


@pytest.fixture(scope="module")
def account():
    """The user nut, and that there is a Python which that user can read."""
    try:
        return pwd.getpwnam("nut")
    except KeyError:
        pytest.skip("there is no user nut")


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


@pytest.fixture(scope="module")
def python_for_all(account):
    """A Python that the user nut can run too (one under /root is for root alone)."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            if run(python, "-c", "import ssl", preexec_fn=becoming(account)).returncode == 0:
                return python
        except OSError:
            pass
    return pytest.skip("no Python that the user nut can run")


# ---- start --------------------------------------------------------------------------------------

SLOW_TO_LISTEN = """
import socket, time
real = socket.socket.listen
def listen(sock, *backlog):
    if sock.family == socket.AF_INET:
        time.sleep(0.4)
    return real(sock, *backlog)
socket.socket.listen = listen
"""


def test_the_background_process_is_a_daemon_when_its_parent_says_so(daemon, nut, pki, tmp_path):
    """The parent exits 0 once the ports are open; what stays has no terminal, no parent, and / as its directory."""
    shim = daemon({"shim": server_section(nut, pki)}, start=False, script=patched(str(tmp_path), SLOW_TO_LISTEN))
    output = str(tmp_path / "output")               # a pipe would be waited for until the daemon has closed it
    done = run("sh", "-c", 'umask 0; exec "$@" > "$0" 2>&1', output, *shim.program, "-f", shim.config)
    assert (done.returncode, read(output)) == (0, "")
    assert works(shim.port("shim"))                 # no waiting: it is ready
    pid = shim.pid
    assert shim.processes() == [pid]
    assert os.getsid(pid) not in (os.getsid(0), pid)     # a session of its own, which it does not lead
    assert os.readlink(shim.proc + "/cwd") == "/"
    assert {os.readlink("%s/fd/%d" % (shim.proc, fd)) for fd in range(3)} == {"/dev/null"}
    assert int(proc_status(shim.proc, "Umask")[0], 8) & 0o022 == 0o022
    assert stat.S_IMODE(os.stat(shim.pidfile).st_mode) & 0o022 == 0
    assert stat.S_IMODE(os.stat(shim.log_file).st_mode) & 0o027 == 0


def test_the_background_process_survives_closed_standard_files(daemon, nut, pki):
    """Started without any of stdin, stdout and stderr, as some init scripts do, it serves all the same."""
    shim = daemon({"shim": server_section(nut, pki)}, start=False)
    done = run("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *shim.program, "-f", shim.config)
    assert done.returncode == 0, shim.log
    assert works(shim.port("shim"))
    assert status(shim)["pid"] == shim.pid


FAILED_STARTS = {
    "port taken": ({"listen": "127.0.0.1:{taken}"}, {}, (), "127.0.0.1:{taken}.*in use"),
    "missing certificate": ({"certificate": "{folder}/missing.pem"}, {}, (), r"missing\.pem: " + NO_FILE),
    "unwritable pidfile": ({}, {"pidfile": "{folder}/none/nutshim.pid"}, (), r"none/nutshim\.pid: " + NO_FILE),
    "unknown user": ({}, {"user": "nobody-such"}, (), "user.*nobody-such"),
    "unknown user of -u": ({}, {}, ("-u", "nobody-such"), "user.*nobody-such"),
    "chroot that is none": ({}, {}, ("-r", "{folder}/none"), "chroot.*none"),
    "log in no directory": ({}, {"log": "{folder}/none/log"}, (), "log.*none/log: " + NO_FILE),
    "log to stderr": ({}, {"log": "stderr"}, (), "log.*stderr.*-F"),
}


@pytest.mark.parametrize("case", FAILED_STARTS)
def test_a_failed_start_is_told_by_the_parent(daemon, nut, pki, case):
    """Whatever fails before the daemon is ready, the parent says it on stderr and exits 1, and nothing stays."""
    section, top, args, pattern = FAILED_STARTS[case]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        shim = daemon({}, start=False)
        names = {"taken": taken.getsockname()[1], "folder": shim.folder}
        shim.configure({"": {key: value.format(**names) for key, value in top.items()},
                        "shim": server_section(nut, pki, **{k: v.format(**names) for k, v in section.items()})})
        done = shim.start(*[arg.format(**names) for arg in args])
    assert done.returncode == 1, done.stderr
    assert re.search(pattern.format(**names), done.stderr), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    poll(lambda: not shim.processes(), 5, "the end of every process of the failed start")
    assert not [name for name in os.listdir(shim.folder) if name.endswith(".sock")]


@as_root
def test_privileges_that_cannot_be_changed_end_the_start(daemon, nut, pki, account, python_for_all):
    """Started without the rights to become the wanted user, or to chroot, it exits 1 and says which."""
    shim = daemon({}, start=False, python=python_for_all)
    os.chown(shim.folder, account.pw_uid, account.pw_gid)
    certificate = own_copy(pki.server.file, shim, account)
    for name, top in (("user", {"user": "root"}), ("chroot", {"user": "nut", "chroot": shim.folder})):
        shim.configure({"": top, "shim": server_section(nut, pki, certificate=certificate)})
        done = shim.start(preexec_fn=becoming(account))
        assert done.returncode == 1
        assert re.search("%s.*not permitted" % name, done.stderr, re.I), done.stderr
        assert "Traceback" not in done.stderr
        assert not [left for left in os.listdir(shim.folder) if left.endswith((".sock", ".pid"))]
    poll(lambda: not shim.processes(), 5, "the end of every process of the failed start")


@as_root
def test_a_change_of_user_without_effect_ends_the_start(daemon, nut, pki, account, tmp_path):
    """The outcome counts: where setuid(), setgid() or setgroups() claims to have worked and has not, nothing starts."""
    shim = daemon({"": {"user": "nut"}, "shim": server_section(nut, pki)}, start=False,
                  script=patched(str(tmp_path), ""))
    for call in ("setuid", "setgid", "setgroups"):
        patched(str(tmp_path), "import os\nos.%s = lambda *_: None" % call)
        done = shim.start(preexec_fn=lambda: os.setgroups([account.pw_gid]))
        assert done.returncode == 1 and "Traceback" not in done.stderr, call
        assert re.search(r"user.*%s.*not work" % account.pw_name, done.stderr), done.stderr
        poll(lambda: not shim.processes(), 5, "the end of every process of the failed start")


def test_a_stale_pidfile_is_taken_over_and_a_second_instance_refused(daemon, nut, pki):
    """A pidfile left by a dead process does not matter, even if its number belongs to another now; a live one's does."""
    port = free_port()
    shim = daemon({"shim": server_section(nut, pki, listen="127.0.0.1:%d" % port)}, start=False)
    for stale in ("%d\n" % os.getpid(), "999999999\n", "nonsense", ""):
        write(shim.pidfile, stale)
        assert shim.start().returncode == 0
        pid = shim.pid
        assert shim.processes() == [pid]
        for args in ((), ("-F",)) if stale.strip().isdigit() else ():
            done = run_shim(*args, "-f", shim.config)
            assert done.returncode == 1
            assert re.search("running already.*%d" % pid, done.stderr), done.stderr
        assert shim.pid == pid and works(port)
        os.kill(pid, signal.SIGKILL)                # leaves pidfile and status socket
        poll(lambda: not runs(pid), 5)


def test_a_killed_daemon_can_start_again_at_once(daemon, nut, pki):
    """After kill -9 with sessions open, the next start binds the same ports, pidfile and status socket."""
    ports = [free_port(), free_port()]
    config = {"a": server_section(nut, pki, listen="127.0.0.1:%d" % ports[0]),
              "b": {"role": "client", "listen": "127.0.0.1:%d" % ports[1], "upstream": "127.0.0.1:%d" % ports[0],
                    "trust": pki.ca.cert}}
    shim = daemon(config)
    with TlsClient(ports[0]) as tls, PlainClient(ports[1]) as plain:
        assert tls.ask("NETVER") == plain.ask("NETVER") == b"1.3\n"
        os.kill(shim.pid, signal.SIGKILL)
        assert plain.recv_until_close() == b""
        pid = shim.pid
        poll(lambda: not runs(pid), 5)
        done = shim.start()
        assert done.returncode == 0, done.stderr
    with PlainClient(ports[1]) as plain:
        assert plain.ask("NETVER") == b"1.3\n"
    assert status(shim)["pid"] == shim.pid != pid


# ---- user, chroot, ports ------------------------------------------------------------------------

@as_root
@pytest.mark.parametrize("way", ["default", "option", "argument"])
def test_root_becomes_the_user_for_good(daemon, nut, pki, account, way):
    """Started as root it becomes nut, or whom user or -u names: uid, gid and groups of every thread, no capability left."""
    user = {"default": "default", "option": "nut", "argument": "root"}[way]
    shim = daemon({"": {"user": user}, "shim": server_section(nut, pki)}, start=False)
    done = shim.start(*(["-u", "nut"] if way == "argument" else []), preexec_fn=lambda: os.setgroups([0, 4, 24]))
    assert done.returncode == 0, done.stderr
    for thread in os.listdir(shim.proc + "/task"):
        path = "%s/task/%s" % (shim.proc, thread)
        assert proc_status(path, "Uid") == [str(account.pw_uid)] * 4
        assert proc_status(path, "Gid") == [str(account.pw_gid)] * 4
        assert proc_status(path, "Groups") == []
        assert int(proc_status(path, "CapEff")[0], 16) == int(proc_status(path, "CapPrm")[0], 16) == 0
    assert works(shim.port("shim"))


@as_root
def test_files_that_a_reload_could_not_read_are_named_at_the_start(daemon, nut, pki, account):
    """Each file that only root can read is named in the log, with the cure, when root becomes the user."""
    shim = daemon({}, start=False)
    files = {name: shutil.copy(path, shim.folder) for name, path in (
        ("certificate", pki.server.file), ("trust", pki.ca.cert), ("crl", pki.crl))}
    for path in files.values():
        os.chmod(path, 0o600)
    shim.configure({"": {"user": "nut"}, "shim": server_section(nut, pki, client_certificate="require", **files)})
    assert shim.start().returncode == 0
    log = read(shim.log_file)
    for path in files.values():
        assert re.search(r"warning: %s: nut cannot read it.*'chgrp %d %s'" % (path, account.pw_gid, path), log), log
    assert log.count("cannot read it") == 3         # nutshim.conf it can


@as_root
def test_privileged_ports_stay_open_over_reload(daemon, nut, pki, account, python_for_all):
    """A port below 1024, opened as root, goes on through reloads as the user nut; a new one is refused with words."""
    def is_free(port):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0
    port, other = [number for number in range(1023, 900, -1) if is_free(number)][:2]
    shim = daemon({}, start=False, python=python_for_all)
    certificate = own_copy(pki.server.file, shim, account)
    config = {"": {"user": "nut"}, "shim": server_section(nut, pki, certificate=certificate,
                                                         listen="127.0.0.1:%d" % port)}
    shim.configure(config)
    done = shim.start()
    assert done.returncode == 0, done.stderr
    with TlsClient(port) as client:
        for _ in range(3):
            done = command(shim, "reload")
            assert done.returncode == 0, done.stderr
            assert works(port)
        config["shim"]["listen"] += ", 127.0.0.1:%d" % other
        shim.configure(config)
        done = command(shim, "reload")
        assert done.returncode == 1
        assert re.search(r"nutshim\.conf:\d+.*%d.*Permission denied" % other, done.stderr), done.stderr
        assert client.ask("NETVER") == b"1.3\n" and works(port)
        config["shim"]["listen"] = "127.0.0.1:0"    # and an open one can be given up
        shim.configure(config)
        assert command(shim, "reload").returncode == 0
        assert refused(port) and works(shim.port("shim"))
        assert client.ask("NETVER") == b"1.3\n"


@as_root
@pytest.mark.parametrize("name", ["log", "nutshim.pid"])
def test_root_follows_no_link_of_its_user(daemon, nut, pki, account, name):
    """A link that nut could lay in its own folder, in place of log or pidfile, does not give it the file behind."""
    shim = daemon({"": {"user": "nut"}, "shim": server_section(nut, pki)}, start=False)
    os.chown(shim.folder, account.pw_uid, account.pw_gid)
    precious = write(os.path.join(shim.folder, "precious"), "precious\n")
    os.symlink(precious, os.path.join(shim.folder, name))
    done = shim.start()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"nutshim\.conf:\d+.*%s" % re.escape(name), done.stderr), done.stderr
    assert os.stat(precious).st_uid == 0 and read(precious) == "precious\n"


@as_root
def test_a_chroot_confines_and_nothing_is_missing_in_it(daemon, nut, pki, tmp_path):
    """In an empty chroot everything still works: both roles, status, the traceback of a bug, and a reload of what lies in it."""
    script = patched(str(tmp_path), PLANTED)
    middle = free_port()
    config = {"server": server_section(nut, pki, listen="127.0.0.1:%d" % middle),
              "client": {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % middle,
                         "verify": "pin", "pin": pki.server.pin}}
    shim = daemon(config, start=False, script=script)
    jail = os.path.join(shim.folder, "jail")
    os.mkdir(jail)
    shim.configure(dict(config, **{"": {"chroot": jail}}))
    done = shim.start()
    assert done.returncode == 0, done.stderr
    assert os.readlink(shim.proc + "/root") == jail and os.readlink(shim.proc + "/cwd") == jail
    with PlainClient(shim.port("client")) as client:
        assert client.ask("NETVER") == b"1.3\n"
        with TlsClient(middle) as victim:
            victim.send("GET VAR ups PLANTED-client\n")
            assert victim.recv_until_close() == b""
        assert len(status(shim)["sessions"]) == 2
        assert "planted fault" in shim.log
        done = command(shim, "reload")              # what is outside the jail it cannot read, and says so
        assert done.returncode == 1 and "Traceback" not in done.stderr and jail in done.stderr, done.stderr + shim.log
        for path in (shim.config, pki.server.file):
            os.makedirs(jail + os.path.dirname(path))
            shutil.copy(path, jail + path)
        for path in (jail, "/etc"):
            os.makedirs(jail + path)
        write(jail + "/etc/passwd", "root:x:0:0::/:/bin/sh\n")
        with open(jail + shim.config, "a", encoding="utf-8") as file:
            file.write("allow_from = 127.0.0.0/8\n")      # of the section client
        done = command(shim, "reload")
        assert done.returncode == 0, done.stderr
        with PlainClient(shim.port("client")) as late:
            assert late.ask("NETVER") == client.ask("NETVER") == b"1.3\n"
    assert command(shim, "stop").returncode == 0


# ---- systemd ------------------------------------------------------------------------------------

HAND_OVER = """
import os, socket, sys
for wanted, address in enumerate(sys.argv[2].split(","), 3):
    host, _, port = address.rpartition(":")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if ":" in host:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((host, int(port)))
    sock.listen(5)
    if sock.fileno() != wanted:
        os.dup2(sock.fileno(), wanted)
    os.set_inheritable(wanted, True)
    sock.detach()
os.environ.update(LISTEN_FDS=str(wanted - 2), LISTEN_PID=str(os.getpid() + int(sys.argv[1])))
os.execv(sys.argv[3], sys.argv[3:])
"""


def handed_over(config, addresses, wrong_pid=0):
    """A Shim that gets listening sockets the way systemd hands them over (sd_listen_fds(3))."""
    return Shim(config, python=sys.executable, script="-c",
                args=(HAND_OVER, str(wrong_pid), ",".join(addresses), sys.executable, NUTSHIM, "-F"))


def test_sockets_of_systemd_are_taken_for_the_listen_lines_that_match(nut, pki):
    """Each handed-over socket serves the listen address that it is bound to, also after a reload; others are closed."""
    port, plain, extra = free_port(), free_port(), free_port()
    config = {"one": server_section(nut, pki, listen="*:%d" % port),
              "two": server_section(nut, pki, listen="127.0.0.1:%d, 127.0.0.1:%d" % (plain, free_port()))}
    with handed_over(config, ["0.0.0.0:%d" % port, ":::%d" % port, "127.0.0.1:%d" % plain,
                              "127.0.0.1:%d" % extra]) as shim:
        for number in shim.ports("one") + shim.ports("two"):
            assert works(number)
        assert refused(extra)
        with TlsClient(port) as client:
            poll(lambda: keepalive_timers(shim.pid) == {"keepalive"}, 5,
                 lambda: "keepalive on both sides, not %s" % keepalive_timers(shim.pid))
            shim.reload()
            shim.wait_log("reloaded")
            assert client.ask("NETVER") == b"1.3\n"
            assert works(port) and works(plain)


def test_sockets_meant_for_another_process_are_left_alone(nut, pki):
    """With a LISTEN_PID that is not its own the sockets are not taken: the port then is in use."""
    port = free_port()
    with pytest.raises(AssertionError, match="ended with 1(.|\n)*in use"):
        handed_over({"one": server_section(nut, pki, listen="127.0.0.1:%d" % port)}, ["127.0.0.1:%d" % port], 1)


class Manager:
    """The service manager's end of NOTIFY_SOCKET (sd_notify(3))."""

    def __init__(self, address):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address.replace("@", "\0", 1))
        self.sock.setblocking(False)
        self.messages, self._heartbeats = [], []    # _heartbeats: when they came

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def fetch(self):
        """All messages so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.messages.append(self.sock.recv(4096).decode("ascii"))
                if self.messages[-1] == "WATCHDOG=1":
                    self._heartbeats.append(time.monotonic())
        return self.messages

    def wait_heartbeat(self, period):
        """Wait until two WATCHDOG=1 come with less than so many seconds between them."""
        self.fetch()
        start = len(self._heartbeats)

        def gaps():
            self.fetch()
            times = self._heartbeats[start:]
            return [after - before for before, after in zip(times, times[1:])]
        poll(lambda: any(gap < period for gap in gaps()), 5, lambda: "WATCHDOG=1 within %s s, not %s" % (period, gaps()))

    def states(self):
        """The first words of all messages but WATCHDOG."""
        return [message.split("\n")[0] for message in self.fetch() if not message.startswith("WATCHDOG")]

    def wait(self, *states):
        """Wait until just these came, in this order."""
        poll(lambda: self.states() == list(states), 5, lambda: "%s, not %s" % (states, self.states()))


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_service_manager_is_told_of_ready_reload_stop_and_life(nut, pki, tmp_path, kind):
    """READY, RELOADING with the clock and READY again even if it fails, WATCHDOG twice a period, STOPPING."""
    address = {"path": str(tmp_path / "notify"), "abstract": "@nutshim-test-%d" % os.getpid()}[kind]
    section = server_section(nut, pki)
    with Manager(address) as manager:
        closed = []

        def connect_when_ready():
            manager.wait("READY=1")
            closed.append(refused(int(section["listen"].rpartition(":")[2])))
        thread = threading.Thread(target=connect_when_ready)
        thread.start()
        with Shim({"shim": section}, env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "500000"}) as shim:
            thread.join()
            assert closed == [False], "READY=1 before the port was open"
            before = time.clock_gettime(time.CLOCK_MONOTONIC)
            shim.reload()
            manager.wait("READY=1", "RELOADING=1", "READY=1")
            reloading = next(m for m in manager.messages if m.startswith("RELOADING"))
            at = int(re.search(r"^MONOTONIC_USEC=(\d+)$", reloading, re.M).group(1)) / 1e6
            assert before <= at <= time.clock_gettime(time.CLOCK_MONOTONIC)
            shim.reload("nonsense")
            manager.wait("READY=1", "RELOADING=1", "READY=1", "RELOADING=1", "READY=1")
            manager.wait_heartbeat(0.75 * 0.5)      # 0.75: twice a period, with room for a slow machine
            shim.stop()
            assert manager.states()[5:] == ["STOPPING=1"]


# ---- log ----------------------------------------------------------------------------------------

def namespace(folder_path, commands, *args):
    """Options for Shim() that run it in a mount namespace of its own, after shell commands; $0 is the folder."""
    if not IS_ROOT or run("unshare", "-m", "true").returncode:
        pytest.skip("needs root and mount namespaces")
    return {"python": "unshare", "script": "-m", "ready": 0,
            "args": ("sh", "-ec", commands + '; exec "$@"', folder_path, sys.executable, NUTSHIM, "-F") + args}


PRIVATE_DEV_LOG = """
mkdir "$0/dev"
mount --bind /dev "$0/dev"
mount -t tmpfs -o mode=755 tmpfs /dev
ln -s "$0/dev/null" "$0/dev/urandom" /dev
ln -s "$0/syslog" /dev/log"""


class Syslog:
    """A syslog daemon's socket."""

    def __init__(self, path):
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(path)
        self.sock.setblocking(False)
        self.lines = []

    def fetch(self):
        """All lines so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.lines.append(self.sock.recv(65536).decode("utf-8"))
        return self.lines

    def wait(self, pattern):
        """Wait for a line that matches; the match."""
        return poll(lambda: next(filter(None, (re.search(pattern, line) for line in self.fetch())), None), 5,
                    lambda: "%r in %s" % (pattern, self.lines))

    def close(self):
        """End it as a syslog daemon that stops."""
        self.sock.close()
        os.unlink(self.path)


def knock(port, times=1):
    """Open sessions that end before TLS: each leaves a line or more in the log."""
    for _ in range(times):
        with PlainClient(port) as client:
            assert client.ask("LOGOUT") == b"OK Goodbye\n"


def test_syslog_lines_have_the_form_that_syslogd_expects(nut, pki, tmp_path):
    """<facility daemon and severity> TIME nutshim[PID]: text, also to a syslogd that was restarted or was not there at first."""
    port = free_port()
    with Shim({"": {"log": "syslog"}, "shim": server_section(nut, pki, listen="127.0.0.1:%d" % port)},
              **namespace(str(tmp_path), PRIVATE_DEV_LOG)) as shim:
        poll(lambda: not refused(port), 10, lambda: "the port; " + shim.log)
        assert works(port)                          # and nobody listens to syslog
        for _ in range(2):
            syslog = Syslog(str(tmp_path / "syslog"))
            knock(port, 2)
            line = syslog.wait(r"^<(\d+)>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d nutshim\[(\d+)\]: .*#\d+ 127\.0\.0\.1:\d+: opened")
            assert line.group(1) == str(3 * 8 + 6)  # daemon.info
            assert int(line.group(2)) == shim.pid
            syslog.close()
        syslog = Syslog(str(tmp_path / "syslog"))
        with PlainClient(port) as client:
            client.send("STARTTLS\nVER\n")
            client.recv_until_close()
        syslog.wait(r"^<28>.*injection")            # daemon.warning
        shim.reload("nonsense")
        syslog.wait(r"^<27>.*nonsense")             # daemon.err
        assert all(re.match(r"<\d+>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d nutshim\[\d+\]: \S", line) and "\n" not in line
                   for line in syslog.fetch())
        syslog.close()


def test_a_syslog_socket_that_nobody_reads_stops_nothing(nut, pki, tmp_path):
    """With syslogd stuck and its socket full, sessions go on; later the log says how many lines were lost."""
    port = free_port()
    syslog = Syslog(str(tmp_path / "syslog"))
    with Shim({"": {"log": "syslog"}, "shim": server_section(nut, pki, listen="127.0.0.1:%d" % port)},
              **namespace(str(tmp_path), PRIVATE_DEV_LOG)) as shim:
        poll(lambda: not refused(port), 10, lambda: "the port; " + shim.log)
        with TlsClient(port) as client:
            for _ in range(30):
                knock(port, 10)
                assert client.ask("NETVER") == b"1.3\n"
        kept = len(syslog.fetch())
        knock(port)
        lost = int(syslog.wait(LOST).group(0).split()[0])
        assert kept < 600, "the socket never filled: %d lines" % kept
        assert 0 <= 600 - lost - kept + 20 < 40, "%d lines came, %d were said to be lost" % (kept, lost)
    syslog.close()


def test_a_standard_error_that_nobody_reads_stops_nothing(nut, pki, tmp_path):
    """With stderr a pipe that is full, sessions go on; once it is read again the log says how many lines were lost."""
    fifo, port = str(tmp_path / "stderr"), free_port()
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    def fetch():
        with contextlib.suppress(BlockingIOError):
            return os.read(reader, 1 << 20).decode("utf-8")
        return ""
    with Shim({"shim": server_section(nut, pki, listen="127.0.0.1:%d" % port)}, python="sh", script="-c", ready=0,
              args=('exec "$@" 2>"$0"', fifo, sys.executable, NUTSHIM, "-F")) as one:
        poll(lambda: not refused(port), 10, "the port")
        with TlsClient(port) as client:
            assert client.ask("NETVER") == b"1.3\n"
            one.reload("nonsense\n" * 1000)         # more in one go than a pipe holds
            for _ in range(20):
                knock(port, 10)
                assert client.ask("NETVER") == b"1.3\n"
        kept = fetch()
        assert 32000 < len(kept) < 70000, "the pipe never filled"
        knock(port)
        poll(lambda: re.search(LOST, fetch()), 5, "the number of lost lines")
    os.close(reader)


def test_a_full_disk_stops_nothing(nut, pki, tmp_path):
    """With the log's file system full, sessions go on; with space again the log goes on and says how many lines were lost."""
    port, disk = free_port(), str(tmp_path / "disk")
    os.mkdir(disk)
    with Shim({"": {"log": disk + "/log"}, "shim": server_section(nut, pki, listen="127.0.0.1:%d" % port)},
              **namespace(disk, 'mount -t tmpfs -o size=16k tmpfs "$0"')) as shim:
        poll(lambda: not refused(port), 10, lambda: "the port; " + shim.log)
        log = "/proc/%d/root%s/log" % (shim.pid, disk)
        with TlsClient(port) as client:
            for _ in range(20):
                knock(port, 10)
                assert client.ask("NETVER") == b"1.3\n"
            assert 8000 < os.path.getsize(log) <= 16384
            os.truncate(log, 0)
            knock(port)
            poll(lambda: re.search(LOST, read(log)), 5, "the number of lost lines")
            assert client.ask("NETVER") == b"1.3\n"


def test_debugging_stays_in_the_foreground_and_tells_more(nut, pki, tmp_path):
    """-D logs to stderr whatever the option log says, with the protocol's words at level debug; -F has none of these."""
    log = str(tmp_path / "log")
    config = {"": {"log": log}, "shim": server_section(nut, pki)}
    for args, debug in ((("-D",), True), (("-F",), False)):
        with Shim(config, args=args, ready=0) as shim:
            text = (lambda shim=shim: shim.log) if debug else (lambda: read(log))
            poll(lambda: "listening" in text(), 5, "the listening line")
            port = int(re.search(r"listening on 127.0.0.1:(\d+)", text()).group(1))
            with TlsClient(port) as client:
                client.ask("GET VAR ups ups.status")
            poll(lambda: "closed" in text(), 5, "the end of the session in the log")
            assert bool(re.search(STAMP + "debug: .*GET VAR ups ups.status", text())) == debug
        assert bool(read(log)) != debug and bool(shim.log) == debug


def test_the_log_file_is_opened_anew_at_reload(daemon, nut, pki):
    """A log file that was moved away gets nothing more after a reload, and the new one everything, complete lines only."""
    shim = daemon({"shim": server_section(nut, pki)})
    port = shim.port("shim")
    knock(port)
    old = shim.log_file + ".1"
    os.rename(shim.log_file, old)
    knock(port)                                     # goes to the old one
    assert command(shim, "reload").returncode == 0
    size = os.path.getsize(old)
    knock(port)
    poll(lambda: shim.log.count("closed") == 1, 5, "the new log")
    assert os.path.getsize(old) == size and read(old).count("closed") == 2
    for line in (read(old) + shim.log).splitlines():
        assert re.match(STAMP + "(error|warning|notice|info): ", line), line


@as_root
def test_logrotate_and_a_user_without_rights_in_var_log(daemon, nut, pki, account, python_for_all):
    """As the user nut too, it can open its log anew: the file it found or made as root belongs to it."""
    shim = daemon({}, start=False, python=python_for_all)
    certificate = own_copy(pki.server.file, shim, account)
    shim.configure({"": {"user": "nut"}, "shim": server_section(nut, pki, certificate=certificate)})
    done = shim.start()
    assert done.returncode == 0, done.stderr
    port = shim.port("shim")
    owner = os.stat(shim.log_file)
    os.rename(shim.log_file, shim.log_file + ".1")
    write(shim.log_file, "", stat.S_IMODE(owner.st_mode))       # logrotate's "create", as in Debian's logrotate.conf
    os.chown(shim.log_file, owner.st_uid, owner.st_gid)
    done = command(shim, "reload")
    assert done.returncode == 0, done.stderr
    knock(port)
    poll(lambda: "closed" in shim.log, 5, "the new log")


def test_a_reload_that_fails_leaves_the_log_where_it_was(daemon, nut, pki):
    """A faulty configuration does not move the log either; a good one does."""
    config = {"shim": server_section(nut, pki)}
    shim = daemon(config)
    port, elsewhere = shim.port("shim"), os.path.join(shim.folder, "elsewhere")
    descriptors = len(os.listdir(shim.proc + "/fd"))
    for top, section in (({"log": elsewhere}, {"listen": "192.0.2.1:1"}),               # no address of this machine
                         ({"log": elsewhere}, {"certificate": "/none"}),
                         ({"log": shim.folder + "/none/log"}, {})):
        shim.configure({"": top, "shim": dict(config["shim"], **section)})
        done = command(shim, "reload")
        assert done.returncode == 1, done.stdout
        assert all(line in shim.log for line in done.stderr.splitlines()), done.stderr
        lines = shim.log.count("\n")
        knock(port)
        poll(lambda lines=lines: shim.log.count("\n") >= lines + 2, 5, "lines in the old log")
        poll(lambda: len(os.listdir(shim.proc + "/fd")) == descriptors, 5, "as few descriptors as before")
    shim.configure({"": {"log": elsewhere}, "shim": config["shim"]})
    assert command(shim, "reload").returncode == 0
    knock(port)
    poll(lambda: "closed" in read(elsewhere), 5, "lines in the new log")


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
    """A client revoked since is refused after the reload, resumption or not, while its live session goes on."""
    authority = Authority(str(tmp_path / "ca"), "/CN=Revoking CA")
    good, bad = authority.issue("good"), authority.issue("bad")
    config = {"shim": server_section(nut, pki, client_certificate="require", trust=authority.cert, crl=authority.crl())}
    one = shim(config)
    port = one.port("shim")
    context = client_context(certificate=bad)
    with TlsClient(port, context=context) as live:
        assert live.ask("NETVER") == b"1.3\n"
        ticket = live.sock.session
        assert ticket.has_ticket
        with TlsClient(port, context=context, session=ticket) as again:
            assert again.ask("NETVER") == b"1.3\n" and again.sock.session_reused
            ticket = again.sock.session
        authority.revoke(bad)
        authority.crl()
        assert command(one, "reload").returncode == 0
        assert live.ask("NETVER") == b"1.3\n"
        assert turned_away(port, context=context)
        assert turned_away(port, context=context, session=ticket)
        assert not turned_away(port, certificate=good)
        one.wait_log("revoked")


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
def test_an_unreadable_key_fails_the_reload_alone(daemon, nut, pki, account, python_for_all):
    """A key that only root may read is read at start, fails a later reload with words, and the old one goes on."""
    shim = daemon({"": {"user": "nut"}, "shim": server_section(nut, pki)}, python=python_for_all)
    port = shim.port("shim")
    with TlsClient(port) as live:
        done = command(shim, "reload")
        assert done.returncode == 1
        assert re.search(r"nutshim\.conf:\d+: .*%s: Permission denied" % re.escape(pki.server.file), done.stderr), done.stderr
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


# ---- status -------------------------------------------------------------------------------------

def status_by_socket(shim):
    """The status of a daemon whose configuration file is gone: asked with another file that names its pidfile."""
    with folder("conf") as path:
        done = run_shim("-c", "status", "--json", "-f",
                        write(path + "/nutshim.conf", "pidfile = %s/nutshim.pid\n" % shim.folder))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def busy(shim, nut, pki):
    """A Shim with one session of each role and some refusals; .peers are the sessions' own addresses."""
    config = pair_config(nut.port, pki, {"client_certificate": "require", "trust": pki.ca.cert,
                                         "permit": ["CN=client.example: primary", "DNS:other.example: read"]},
                         {"certificate": pki.other_client.file})
    config["shut"] = server_section(nut, pki, allow_from="192.0.2.0/24")
    one = shim(config)
    port = one.port("server")
    with TlsClient(port, certificate=pki.client) as tls, \
            PlainClient(one.port("client"), source=("127.0.0.9", 0)) as plain:
        commands = ["USERNAME " + PRIMARY[0], "PASSWORD " + PRIMARY[1], "LOGIN ups"]
        assert [tls.ask(each) for each in commands] == [b"OK\n"] * 3
        one.asked, one.answered = len("\n".join(commands) + "\n"), len("OK\n" * 3)
        assert plain.ask("NETVER") == b"1.3\n"
        for text in ("STARTTLS\nVER\n", "\x16\x03\x01", "VER\n" * 8):
            with PlainClient(port) as client:
                client.send(text)
                client.recv_until_close()
        for _ in range(3):
            assert turned_away(one.port("shut"))
        assert turned_away(port)                    # no client certificate
        one.peers = {"server": "%s:%d" % tls.sock.getsockname(), "client": "%s:%d" % plain.sock.getsockname()}
        poll(lambda: one.log.count(" closed: ") >= 4, 5, "the refusals' ends")
        yield one


def test_status_gives_programs_everything_about_sessions(busy, nut):
    """--json: per session number, age, peer, TLS version, identity, class, user, UPS and bytes: what LIST CLIENT loses."""
    found = status(busy)
    assert found["pid"] == busy.pid
    by_peer = {each["peer"]: each for each in found["sessions"]}
    tls, plain = by_peer[busy.peers["server"]], by_peer[busy.peers["client"]]
    assert tls["shim"] == "server" and plain["shim"] == "client"
    assert re.search(r"#%d %s: opened" % (tls["number"], busy.peers["server"]), busy.log)
    assert 0 <= tls["seconds"] < 60
    assert tls["tls"] == plain["tls"] == "TLSv1.3"
    assert {"CN=client.example", "DNS:client.example"} <= set(tls["identity"])
    assert "DNS:localhost" in plain["identity"]     # of the server it reached
    assert (tls["class"], tls["user"], tls["ups"]) == ("primary", PRIMARY[0], "ups")
    assert tls["bytes_in"] - busy.asked in (0, len("STARTTLS\n")) and tls["bytes_out"] == busy.answered
    assert (plain["bytes_in"], plain["bytes_out"]) == (len("NETVER\n"), len("1.3\n"))
    with PlainClient(nut.port) as client:           # upsd itself knows the shim's address only
        assert b"CLIENT ups 127.0.0.1\n" in client.ask_list("LIST CLIENT ups")
    through = [each for each in found["sessions"] if each["shim"] == "server" and each is not tls]
    assert [each["class"] for each in through] == ["read"]


def test_status_counts_over_a_reload(busy, pki):
    """Sessions now and since start, and refusals by reason, count on over a reload."""
    with TlsClient(busy.port("server"), certificate=pki.client):
        assert command(busy, "reload").returncode == 0
        assert shim_status(busy, "server")["sessions"] == 3
    poll(lambda: shim_status(busy, "server")["sessions"] == 2, 5, "the end of a session from before the reload")
    found = {each["name"]: each for each in status(busy)["shims"]}
    assert found["client"]["sessions"] == 1
    assert found["server"]["sessions_total"] >= 7 and found["client"]["sessions_total"] == 1
    reasons = found["server"]["refused"]
    for words in ("injection", "without STARTTLS", "no STARTTLS", "TLS"):
        assert sum(count for reason, count in reasons.items() if words in reason) >= 1, reasons
    assert sum(reasons.values()) == 4
    assert list(found["shut"]["refused"].values()) == [3] and "allow_from" in list(found["shut"]["refused"])[0]


def test_status_tells_of_addresses_certificates_and_upstream(pki, shim):
    """Per shim: where it listens, how long certificates hold, and whether upstream answers, while it does and when not."""
    with StandIn() as upsd:                         # it can be gone and come back more quickly than upsd
        one = shim(pair_config(upsd.port, pki, client={"reuse": 0}))
        with PlainClient(one.port("client")) as client:
            assert client.ask("NETVER") == b"1.3\n"
        found = shim_status(one, "server")
        assert found["listen"] == ["127.0.0.1:%d" % one.port("server")] and found["role"] == "server"
        assert [each["address"] for each in found["upstream"]] == ["127.0.0.1:%d" % upsd.port]
        assert found["upstream"][0]["state"] == "ok"
        assert [(each["days_left"], each["holds"]) for each in found["certificates"]] == [(None, "never expires")]
        assert pki.server.file in found["certificates"][0]["what"]
    with PlainClient(one.port("client")) as client:
        client.send("VER\n")
        assert client.recv_until_close() == b""
    assert "refused" in shim_status(one, "server")["upstream"][0]["state"]
    with StandIn(port=upsd.port), PlainClient(one.port("client")) as client:
        assert client.ask("NETVER") == b"1.3\n"
    assert shim_status(one, "server")["upstream"][0]["state"] == "ok"


def test_status_table_is_for_people(busy):
    """Without an option: a table with a heading, one line a session, and each shim's facts."""
    done = command(busy, "status")
    assert done.returncode == 0 and done.stderr == ""
    heading = next(line for line in done.stdout.splitlines() if "identity" in line.lower()).upper()
    line = next(line for line in done.stdout.splitlines() if busy.peers["server"] in line)
    for word, value in (("USER", PRIMARY[0]), ("UPS", "ups"), ("TLS", "TLSv1.3"), ("CLASS", "primary")):
        assert line[heading.index(word):].lstrip("'").startswith(value), done.stdout
    assert "CN=client.example" in line
    assert "[server]" in done.stdout and "allow_from" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 250


def test_status_speaks_prometheus(busy, nut):
    """--prometheus: every line a metric of the text format, with sessions, refusals and expiry by shim."""
    done = command(busy, "status", "--prometheus")
    assert done.returncode == 0
    metrics = {}
    label = r'[a-z_]+="(?:[^"\\]|\\.)*"'
    for line in done.stdout.splitlines():
        if not line.startswith("#"):
            found = re.match(r"([a-z_]+)(?:\{(%s(?:,%s)*)\})? (-?\d+(?:\.\d+)?|\+Inf)$" % (label, label), line)
            assert found, line
            labels = frozenset(re.findall(label, found.group(2) or ""))
            metrics.setdefault(found.group(1), {})[labels] = float(found.group(3))
    server = 'shim="server"'
    assert metrics["nutshim_sessions"][frozenset([server])] == 2
    assert sum(value for labels, value in metrics["nutshim_refused_total"].items() if 'shim="shut"' in labels) == 3
    assert metrics["nutshim_upstream_up"][frozenset([server, 'upstream="127.0.0.1:%d"' % nut.port])] == 1
    assert set(metrics["nutshim_certificate_days_left"].values()) == {float("inf")}


def test_the_status_socket_is_for_its_owner_alone(daemon, nut, pki):
    """It has mode 0600 whatever the umask, and another user's -c gets exit 1 and words."""
    shim = daemon({"shim": server_section(nut, pki)}, start=False)
    assert shim.start(preexec_fn=lambda: os.umask(0)).returncode == 0
    sockets = [os.stat(os.path.join(shim.folder, name)) for name in os.listdir(shim.folder) if name.endswith(".sock")]
    assert [stat.S_ISSOCK(each.st_mode) and stat.S_IMODE(each.st_mode) for each in sockets] == [0o600]


@as_root
def test_another_user_cannot_command_the_daemon(daemon, nut, pki, account, python_for_all):
    """-c stop of a user who is not the daemon's exits 1 with words, and the daemon goes on."""
    shim = daemon({"shim": server_section(nut, pki)}, python=python_for_all)
    done = run(python_for_all, NUTSHIM, "-c", "stop", "-f", shim.config, preexec_fn=becoming(account))
    assert done.returncode == 1 and "Permission denied" in done.stderr and "Traceback" not in done.stderr
    assert works(shim.port("shim"))


# ---- limits -------------------------------------------------------------------------------------

def test_sessions_are_limited_in_all_and_by_address(shim, nut, pki):
    """One more than max_sessions_per_address or max_sessions is closed at once, logged once and counted; others go on."""
    one = shim({"": {"max_sessions": 5}, "shim": server_section(nut, pki, max_sessions_per_address=3)})
    port = one.port("shim")

    def shut_out(address):
        with PlainClient(port, source=(address, 0)) as client:
            return client.recv_until_close() == b""
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(TlsClient(port)) for _ in range(3)]
        for _ in range(20):
            assert shut_out("127.0.0.1")
        for number in (2, 3):
            other = stack.enter_context(PlainClient(port, source=("127.0.0.%d" % number, 0)))
            assert other.ask("VER") == b"ERR TLS-NOT-ENABLED\n"
        for _ in range(20):
            assert shut_out("127.0.0.4")
        assert [client.ask("NETVER") for client in first] == [b"1.3\n"] * 3
        counts = shim_status(one, "shim")["refused"]
        assert sorted(counts.values()) == [20, 20] and any("per_address" in reason for reason in counts)
        first.pop().close()
        poll(lambda: len(status(one)["sessions"]) == 4, 5)
        assert not turned_away(port)
    poll(lambda: not status(one)["sessions"], 5, "no session left")
    one.stop()                                      # the log is whole
    assert one.log.count("refused") == 2            # one line for each reason, not one for each peer


FEW_DESCRIPTORS = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
"""


def test_without_descriptors_running_sessions_go_on(shim, nut, pki, tmp_path):
    """With 64 descriptors and none left: running sessions go on, even beside a bug in one of them; new ones are refused,
    with one log line in 10 s, and nothing spins."""
    config = pair_config(nut.port, pki, {"max_sessions_per_address": 500}, {"max_sessions_per_address": 500, "reuse": 0})
    one = shim(config, script=patched(str(tmp_path), FEW_DESCRIPTORS + PLANTED))
    one.expect_traceback = True
    port = one.port("server")
    with TlsClient(port) as direct, PlainClient(one.port("client")) as paired, contextlib.ExitStack() as stack:
        victim = stack.enter_context(TlsClient(port))
        assert direct.ask("NETVER") == paired.ask("NETVER") == b"1.3\n"

        def go_on():
            for _ in range(5):
                assert direct.ask("NETVER") == paired.ask("NETVER") == b"1.3\n"
        for number in range(90):                    # fills all with peers that wait in the greeting
            stack.enter_context(PlainClient(port))
            if number % 30 == 0:
                go_on()
        control = stack.enter_context(socket.socket(socket.AF_UNIX))
        control.connect(os.path.join(one.folder, "nutshim.sock"))
        control.sendall(b"status\n")
        control.settimeout(5)
        assert control.recv(3) == b"OK\n"           # the administrator sees who has them all
        go_on()
        before, since = one.cpu(), time.monotonic()
        assert direct.silent_for(1)
        assert one.cpu() - before < 0.5 * (time.monotonic() - since), "it spins"
        assert len([line for line in one.lines if re.search("refused: .*%s|out of descriptors" % NO_DESCRIPTOR, line)]) == 1
        victim.send("GET VAR ups PLANTED-client\n")
        assert victim.recv_until_close() == b""
        one.wait_log("planted fault")
        go_on()
        one.reload()                                # which perhaps cannot read its files now
        one.wait_log("reload failed|reloaded")
        go_on()
        stack.close()
        poll(lambda: not turned_away(port), 10, "a new session")
        go_on()
        mark = one.mark()
        for _ in range(60):                         # sessions that come as far as upsd take twice as many
            client = PlainClient(one.port("client"))
            stack.callback(client.close)
            with contextlib.suppress(OSError):
                client.send("NETVER\n")
        go_on()
        assert len([line for line in one.lines[mark:] if re.search(NO_DESCRIPTOR + "|out of descriptors", line)]) <= 2
        stack.close()
        poll(lambda: not turned_away(port), 10, "a new session")
        go_on()
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
    assert set(re.findall(r"\[([a-z]+)\] .*closed: idle", one.log)) == {"short", "client"}


# ---- faults nobody foresaw ----------------------------------------------------------------------

def test_an_exception_nobody_foresaw_ends_its_session_alone(shim, nut, pki, tmp_path):
    """Wherever it strikes: a traceback at error level, that session closed and forgotten, and nothing else."""
    flags = str(tmp_path / "fault-")
    one = shim(pair_config(nut.port, pki, {"max_sessions_per_address": 8}, {"max_sessions_per_address": 4, "reuse": 0}),
               script=patched(str(tmp_path), PLANTED), env={"PLANTED": flags})
    one.expect_traceback = True
    port, client_port = one.port("server"), one.port("client")
    with TlsClient(port) as tls, PlainClient(client_port) as plain:
        def strikes(victim, words=""):
            """The victim's session ends, a traceback is in the log, and the bystanders do not notice."""
            mark = one.mark()
            with victim(port if victim is TlsClient else client_port) as client:
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
            os.unlink(flags + place)
        assert len(status(one)["sessions"]) == 3    # the two bystanders, one of them in both shims
        found = {each["name"]: each["sessions"] for each in status(one)["shims"]}
        assert found == {"server": 2, "client": 1}
        with PlainClient(client_port) as client:
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
    one = shim(pair_config(nut.port, pki, {"idle_timeout": 1}, {"idle_timeout": 100}),
               script=patched(str(tmp_path), CLOCK % offset))
    with TlsClient(one.port("server")) as idle, PlainClient(one.port("client")) as busy_client:
        for years in (-1, 10):
            os.replace(write(offset + ".new", str(years * 365.25 * 86400)), offset)
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                assert busy_client.ask("NETVER") == b"1.3\n"
            found = status(one)
            assert len(found["sessions"]) == 3 and all(0 <= each["seconds"] < 60 for each in found["sessions"])
            assert idle.ask("NETVER") == b"1.3\n"
        with PlainClient(one.port("client")) as client:
            assert client.ask("NETVER") == b"1.3\n"
        since = time.monotonic()
        assert idle.recv_until_close(10) == b"" and time.monotonic() - since > 0.5
