# SPDX-License-Identifier: GPL-2.0-or-later
"""What all test files share: basics (free_port, poll, run), processes (Process), real NUT (Nut,
Upsmon, upsc, upscmd, upsrw) and the shim (Shim, run_shim, command, status, patched, pair_config).

The raw clients and false servers are in wire.py and handed on from here; the certificates are in
certs.py (fixture pki). Everything that starts something is a context manager and ends it.
"""

import contextlib
import errno
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import standin
from wire import (ADMIN, PRIMARY, SECONDARY, FalseServer, Peer, PlainClient,     # noqa: F401 (handed on)
                  Relay, TlsClient, client_context, closes, listen, plain, says, silent, tls)

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
NUTSHIM = os.path.join(ROOT, "nutshim.py")
IS_ROOT = os.geteuid() == 0
# The reader of what the programs print takes so many seconds a line: shows tests that look before they wait.
SLOW_READER = float(os.environ.get("NUTSHIM_TEST_SLOW_READER", "0"))


# ---- basics -------------------------------------------------------------------------------------

def free_port():
    """A TCP port that nobody uses, on either loopback address."""
    while True:
        with socket.socket() as four:
            four.bind(("127.0.0.1", 0))
            port = four.getsockname()[1]
            try:
                with socket.socket(socket.AF_INET6) as six:
                    six.bind(("::1", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue                        # any other error: no IPv6 here
            return port


def poll(predicate, seconds=5, what="a condition"):
    """Wait until predicate() is true and return its value; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError("waited %s s in vain for %s" % (seconds, what() if callable(what) else what))
        time.sleep(0.01)


def clean_env(**extra):
    """The environment without what would lead NUT, nutshim or Python astray."""
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("NUT_", "NOTIFY_", "LISTEN_", "WATCHDOG_", "PYTHON"))}
    env.update(LC_ALL="C", PATH=env.get("PATH", "") + ":/usr/sbin:/sbin", PYTHONDONTWRITEBYTECODE="1")
    env.update(extra)
    return env


def run(*args, timeout=20, **options):
    """Run a command to its end and return the CompletedProcess, output as text."""
    options.setdefault("env", clean_env())
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([str(arg) for arg in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=timeout, **options)


def write(path, text, mode=0o600):
    """Write a text file and return its path."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, mode)
    return path


@contextlib.contextmanager
def folder(prefix):
    """A short-named private folder (the paths of UNIX sockets are limited), removed afterwards."""
    path = tempfile.mkdtemp(prefix="nutshim-%s-" % prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path)


# ---- processes ----------------------------------------------------------------------------------

def late(lines, seconds):
    """The same lines, each so many seconds after the one before, but never late by more than ten times that."""
    waiting = queue.Queue()

    def read():
        for line in lines:
            waiting.put((time.monotonic() + 10 * seconds, line))
        waiting.put(None)
    threading.Thread(target=read, daemon=True).start()
    for latest, line in iter(waiting.get, None):
        time.sleep(max(0, min(seconds, latest - time.monotonic())))
        yield line


class Process:
    """A program in the background; what it prints is collected in lines."""

    def __init__(self, args, env=None, cwd=None):
        self.args = [str(arg) for arg in args]
        self.lines = []
        self._popen = subprocess.Popen(self.args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, env=env or clean_env(), cwd=cwd)
        self.pid = self._popen.pid
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()

    def _collect(self):
        for line in late(self._popen.stdout, SLOW_READER) if SLOW_READER else self._popen.stdout:
            self.lines.append(line.decode("utf-8", "replace").rstrip("\n"))

    @property
    def log(self):
        """All that it has printed so far."""
        return "\n".join(self.lines)

    @property
    def returncode(self):
        """The exit status, None while it runs."""
        return self._popen.poll()

    @property
    def alive(self):
        """True while it runs."""
        return self._popen.poll() is None

    def wait_log(self, pattern, seconds=5, start=0):
        """Wait for a line, from number start on, that matches; return the match."""
        def find():
            over = not self.alive and not self._reader.is_alive()
            for line in self.lines[start:]:
                match = re.search(pattern, line)
                if match:
                    return match
            assert not over, "ended with %s before it printed %r:\n%s" % (self.returncode, pattern, self.log)
            return None
        return poll(find, seconds, lambda: "the line %r in:\n%s" % (pattern, self.log))

    def signal(self, number):
        """Send a signal."""
        self._popen.send_signal(number)

    def wait(self, seconds=5):
        """Wait for its end; return the exit status."""
        code = self._popen.wait(seconds)
        self._reader.join(5)
        return code

    def end(self):
        """End it, however that goes, and release what it held."""
        if self.alive:
            self.signal(signal.SIGCONT)
            self._popen.terminate()
            try:
                self._popen.wait(5)
            except subprocess.TimeoutExpired:
                self._popen.kill()
        self.wait()
        if not self._reader.is_alive():             # else a child of its own still holds the pipe
            self._popen.stdout.close()

    def kill(self):
        """End it with SIGKILL."""
        self._popen.kill()
        self.wait()

    def _status(self, name, file="status"):
        with open("/proc/%d/%s" % (self.pid, file), encoding="ascii", errors="replace") as status:
            return int(re.search(r"^%s:\s+(\d+)" % name, status.read(), re.M).group(1))

    def rss(self):
        """Resident memory, kB."""
        return self._status("VmRSS")

    def pss(self):
        """Proportional memory, kB."""
        return self._status("Pss", "smaps_rollup")

    def threads(self):
        """Number of threads."""
        return self._status("Threads")

    def fds(self):
        """Number of open file descriptors."""
        return len(os.listdir("/proc/%d/fd" % self.pid))

    def cpu(self):
        """CPU time used so far, seconds, in steps of 10 ms."""
        with open("/proc/%d/stat" % self.pid, encoding="ascii", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- real NUT -----------------------------------------------------------------------------------

NSS_PASSWORD = "nss-test"                           # of the databases that pki.nss_database() makes

NUT_FOLDERS = ("/lib/nut", "/usr/lib/nut", "/usr/libexec/nut", "/usr/local/ups/sbin", "/usr/local/ups/bin",
               "/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin")
VARIABLES = {
    "ups.status": "OL",
    "ups.mfr": "Test",
    "ups.model": 'Dummy "2" \\ #3',
    "battery.charge": "100",
    "battery.charge.low": "20",
    "battery.runtime": "1800",
    "device.serial": "ABC123",
    "input.voltage": "230.1",
}
USERS = """
[admin]
password = adminpass
actions = SET
actions = FSD
instcmds = ALL
[primary]
password = primarypass
upsmon primary
[secondary]
password = secondarypass
upsmon secondary
"""


def nut_program(name):
    """The path of one of NUT's programs, None if it is not installed.

    The folders of the programs come first: /usr/sbin/upsd may be a wrapper that wants nut.conf.
    """
    paths = [os.path.join(path, name) for path in NUT_FOLDERS]
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def nut_version():
    """The version of NUT, such as (2, 8, 0)."""
    done = run(nut_program("upsmon"), "-V")
    return tuple(map(int, re.search(r"Network UPS Tools \S+ (\d+)\.(\d+)\.(\d+)", done.stdout + done.stderr).groups()))


def missing_nut():
    """The programs of NUT that the tests need and do not find."""
    return [name for name in ("upsd", "dummy-ups", "upsc", "upscmd", "upsrw", "upsmon") if not nut_program(name)]


def many_variables(count):
    """VARIABLES and so many more, with some 137 bytes each in a LIST VAR (8000 make 1.1 MB)."""
    return dict(VARIABLES, **{"outlet.%d.desc" % number: "v" * 110 for number in range(count)})


class Nut:
    """A real upsd on 127.0.0.1 with a dummy-ups driver for each UPS, in a folder of its own.

    upses: {name: {variable: value}}; descriptions: {name: text} for UPSDESC; nss: a folder of
    pki.nss_database() makes upsd offer STARTTLS of its own; options: more lines for upsd.conf.
    """

    def __init__(self, upses=None, descriptions=None, nss=None, options=""):
        self.upses = upses or {"ups": VARIABLES}
        self.port = free_port()
        self._stack = contextlib.ExitStack()
        self.folder = self._stack.enter_context(folder("nut"))
        self.env = clean_env(**{name: self.folder for name in (
            "NUT_CONFPATH", "NUT_STATEPATH", "NUT_PIDPATH", "NUT_ALTPIDPATH")})
        self._user = ["-u", "root"] if IS_ROOT else []
        if nss:
            options += 'CERTPATH %s\nCERTIDENT "own" "%s"\n' % (nss, NSS_PASSWORD)
        ups_conf = "pollinterval = 30\n"            # a driver naps for 1 s in each, deaf to upsd
        for name, variables in self.upses.items():
            description = (descriptions or {}).get(name, "Test UPS")
            ups_conf += "[%s]\ndriver = dummy-ups\nport = %s.dev\nsynchronous = yes\ndesc = %s\n" % (
                name, name, standin.quoted(description))
            lines = ["%s: %s\n" % (key, standin.quoted(value)) for key, value in variables.items()]
            write(self._path(name + ".dev"), "".join(lines) + "TIMER 300\n")     # else dummy-ups spins
        write(self._path("ups.conf"), ups_conf)
        write(self._path("upsd.users"), USERS)
        write(self._path("upsd.conf"), "LISTEN 127.0.0.1 %d\n%s" % (self.port, options))
        self.upsd = None
        self.drivers = {}

    def _path(self, name):
        return os.path.join(self.folder, name)

    def __enter__(self):
        try:
            for name in self.upses:
                self.start_driver(name)
            self.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_):
        self._stack.close()

    def start_driver(self, name):
        """Start the driver of one UPS."""
        driver = Process([nut_program("dummy-ups"), "-a", name, "-F"] + self._user, self.env)
        self._stack.callback(driver.end)
        self.drivers[name] = driver
        poll(lambda: os.path.exists(self._path("dummy-ups-" + name)), 5, lambda: "dummy-ups: " + driver.log)

    def start(self):
        """Start upsd and wait until it has every UPS's data."""
        self.upsd = Process([nut_program("upsd"), "-F"] + self._user, self.env)
        self._stack.callback(self.upsd.end)
        poll(self._complete, 15, lambda: "upsd: " + self.upsd.log)

    def _complete(self):
        """True once upsd has all variables of all UPSes; before that ups.status says WAIT."""
        try:
            with PlainClient(self.port) as client:
                return all(b'"WAIT"' not in client.ask("GET VAR %s ups.status" % name)
                           and client.ask_list("LIST VAR " + name).count(b"\n") >= len(variables) + 2
                           for name, variables in self.upses.items())
        except OSError:
            return False

    def stop(self):
        """Stop upsd; the drivers go on."""
        self.upsd.end()

    def kill(self):
        """Kill upsd; the drivers go on."""
        self.upsd.kill()

    def restart(self):
        """Stop upsd and start it again on the same port."""
        self.stop()
        self.start()

    def freeze(self):
        """Let upsd's connections be accepted but never answered, until thaw()."""
        self.upsd.signal(signal.SIGSTOP)

    def thaw(self):
        """End freeze()."""
        self.upsd.signal(signal.SIGCONT)

    def get(self, variable, ups="ups"):
        """A variable's value, asked of upsd directly."""
        with PlainClient(self.port) as client:
            return client.ask("GET VAR %s %s" % (ups, variable)).decode("ascii").split('"')[1]

    def set_status(self, status, ups="ups"):
        """Make the UPS report a status such as "OB LB"."""
        done = upsrw(self.port, "-s", "ups.status=" + status, ups=ups)
        assert done.returncode == 0, done.stderr
        poll(lambda: self.get("ups.status", ups) in (status, "FSD " + status), 10, "status " + status)


def upsc(port, *args, ups="ups", host="127.0.0.1", timeout=20):
    """Run upsc for a UPS on a port; the CompletedProcess."""
    return run(nut_program("upsc"), "%s@%s:%d" % (ups, host, port), *args, timeout=timeout)


def upscmd(port, *args, ups="ups", host="127.0.0.1", login=ADMIN, timeout=20):
    """Run upscmd; args: instant command and value."""
    return run(nut_program("upscmd"), "-u", login[0], "-p", login[1], "%s@%s:%d" % (ups, host, port), *args,
               timeout=timeout)


def upsrw(port, *args, ups="ups", host="127.0.0.1", login=ADMIN, timeout=20):
    """Run upsrw; args: "-s", "NAME=VALUE", or none for the list."""
    return run(nut_program("upsrw"), *args, "-u", login[0], "-p", login[1], "%s@%s:%d" % (ups, host, port),
               timeout=timeout)


class Upsmon(Process):
    """A real upsmon that watches one UPS. Its shutdown command writes a marker and nothing else.

    nss: a folder of pki.nss_database() makes it speak TLS itself, strictly; identity: and show
    the certificate in it (both for NUT's NSS build).
    """

    # Who it runs as where the tests run as root: upsmon writes its PID file into the compiled-in
    # folder whatever its environment says, and this user cannot. Nor can it shut anything down.
    NOBODY = 65534
    EVENTS = ("ONLINE ONBATT LOWBATT FSD COMMOK COMMBAD SHUTDOWN REPLBATT NOCOMM NOPARENT").split()
    CONFIG = """
MONITOR {ups}@{host}:{port} 1 {login[0]} {login[1]} {kind}
MINSUPPLIES 1
SHUTDOWNCMD "touch {folder}/shutdown"
POWERDOWNFLAG {folder}/killpower
NOTIFYCMD {folder}/notify
POLLFREQ 1
POLLFREQALERT 1
HOSTSYNC 3
DEADTIME {deadtime}
FINALDELAY 0
NOCOMMWARNTIME 5
RBWARNTIME 43200
"""

    def __init__(self, port, host="localhost", ups="ups", login=PRIMARY, kind="primary", deadtime=5, nss=None,
                 identity=False):
        self._stack = contextlib.ExitStack()
        self.folder = self._stack.enter_context(folder("upsmon"))
        config = self.CONFIG.format(ups=ups, host=host, port=port, login=login, kind=kind, deadtime=deadtime,
                                    folder=self.folder)
        config += "".join("NOTIFYFLAG %s EXEC\n" % event for event in self.EVENTS)      # no wall, no syslog
        if nss:
            own_nss = shutil.copytree(nss, os.path.join(self.folder, "nss"))
            config += "CERTPATH %s\nCERTVERIFY 1\nFORCESSL 1\nCERTHOST %s %s 1 1\n" % (own_nss, host, host)
        if identity:
            config += 'CERTIDENT "own" "%s"\n' % NSS_PASSWORD
        write(os.path.join(self.folder, "upsmon.conf"), config)
        write(os.path.join(self.folder, "notify"),
              '#!/bin/sh\necho "$NOTIFYTYPE" >> "%s/events"\n' % self.folder, 0o700)
        write(os.path.join(self.folder, "wall"), "#!/bin/sh\n", 0o700)     # upsmon calls it at a shutdown
        env = clean_env(**{name: self.folder for name in (
            "NUT_CONFPATH", "NUT_STATEPATH", "NUT_ALTPIDPATH")})
        env["PATH"] = self.folder + ":" + env["PATH"]
        # -p: one process, without the privileged parent that only its child's end would stop.
        args = [nut_program("upsmon"), "-F", "-p"]
        if IS_ROOT:
            for path, _, files in os.walk(self.folder):
                for name in [path] + [os.path.join(path, file) for file in files]:
                    os.chown(name, self.NOBODY, self.NOBODY)
            args = ["setpriv", "--reuid", self.NOBODY, "--regid", self.NOBODY, "--clear-groups"] + args
        super().__init__(args, env)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
        self._stack.close()

    @property
    def shut_down(self):
        """True once it has run its shutdown command."""
        return os.path.exists(os.path.join(self.folder, "shutdown"))

    @property
    def events(self):
        """The types of its notifications so far, in order."""
        try:
            with open(os.path.join(self.folder, "events"), encoding="ascii") as file:
                return file.read().split()
        except FileNotFoundError:
            return []

    def wait_event(self, event, seconds=10):
        """Wait for a notification such as ONBATT."""
        poll(lambda: event in self.events, seconds, lambda: "%s from upsmon, which has %s and printed:\n%s" % (
            event, self.events, self.log))

    def wait_shutdown(self, seconds=10):
        """Wait until it runs its shutdown command."""
        poll(lambda: self.shut_down, seconds, lambda: "upsmon's shutdown, which printed:\n" + self.log)


# ---- the shim -----------------------------------------------------------------------------------

def config_text(config, base):
    """A configuration as text.

    From a dict of sections ("" for global options) or a text; log, pidfile and, as root, user are
    put in front unless it sets them. Lists may be given as Python lists.
    """
    if not isinstance(config, str):
        text = ""
        for section, options in config.items():
            text += "[%s]\n" % section if section else ""
            for name, value in options.items():
                text += "%s = %s\n" % (name, ", ".join(map(str, value)) if isinstance(value, list) else value)
        config = text
    top = re.split(r"(?m)^\s*\[", config)[0]
    defaults = {"log": "stderr", "pidfile": os.path.join(base, "nutshim.pid")}
    if IS_ROOT:
        defaults["user"] = "root"                   # pytest's folders are for root alone
    missing = [name for name in defaults if not re.search(r"(?m)^\s*%s\s*=" % name, top)]
    return "".join("%s = %s\n" % (name, defaults[name]) for name in missing) + config


def run_shim(*args, python=None, script=NUTSHIM, **options):
    """Run nutshim.py to its end (-t, -V, -c …); the CompletedProcess."""
    return run(python or sys.executable, script, *args, **options)


def command(shim, *words, **options):
    """Run nutshim.py -c for a running Shim or daemon; the CompletedProcess."""
    return run_shim("-c", *words, "-f", shim.config, **options)


def status(shim):
    """What -c status --json says."""
    done = command(shim, "status", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shim_status(shim, name):
    """The part of the status about one section."""
    return next(each for each in status(shim)["shims"] if each["name"] == name)


def patched(path, code):
    """Write a script that runs nutshim with some code put in front of main(); its path."""
    return write(os.path.join(path, "patched.py"),
                 "import sys\nsys.path.insert(0, %r)\nimport nutshim\n%s\nsys.exit(nutshim.main())\n" % (ROOT, code), 0o644)


class Shim(Process):
    """nutshim.py in the foreground, ready when its constructor returns.

    config: see config_text. args: in place of -F. ready: how many listening lines to wait for in
    all; by default one for each entry of each listen option.
    """

    expect_traceback = False                        # set to True by a test that provokes one
    started = []                                    # all of them, for the report of a test that fails

    def __init__(self, config, args=("-F",), python=None, script=NUTSHIM, cwd=None, env=None, ready=None):
        self._stack = contextlib.ExitStack()
        self.folder = self._stack.enter_context(folder("shim"))
        self.config = os.path.join(self.folder, "nutshim.conf")
        self.configure(config)
        self._ended = False
        super().__init__([python or sys.executable, script] + list(args) + ["-f", self.config],
                         clean_env(**(env or {})), cwd)
        self.began = time.time()
        self.started.append(self)
        try:
            self._wait_ready(ready)
        except BaseException:
            self.end()
            self._stack.close()
            raise

    def configure(self, config):
        """Write the configuration file anew."""
        write(self.config, config_text(config, self.folder))

    def _wait_ready(self, ready):
        with open(self.config, encoding="utf-8") as file:
            text = file.read()
        wanted = {}
        if ready is None:                           # a name may have two addresses, so each section counts for itself
            parts = re.split(r"(?m)^\s*\[(.*)\]", text)
            for section, options in zip(parts[1::2], parts[2::2]):
                listens = re.search(r"(?m)^\s*listen\s*=(.*)", options)
                wanted[section] = listens.group(1).count(",") + 1 if listens else 1
        poll(lambda: not self.alive or len(self.listening) >= (ready or 0) and all(
            len(self.ports(section)) >= count for section, count in wanted.items()), 10,
             lambda: "%s listening lines of nutshim:\n%s" % (ready or wanted, self.log))
        assert self.alive, "nutshim ended with %s:\n%s" % (self.wait(), self.log)

    @property
    def listening(self):
        """Where it listens: a list of (section, address, port)."""
        found = [re.search(r"\[([^][]+)\] listening on (\S+):(\d+)", line) for line in list(self.lines)]
        return [(match.group(1), match.group(2), int(match.group(3))) for match in found if match]

    def ports(self, section):
        """The ports that a section listens on, in order."""
        return [port for name, _, port in self.listening if name == section]

    def port(self, section):
        """The first port that a section listens on."""
        return self.ports(section)[0]

    def mark(self):
        """The number of lines so far, for wait_log(…, start=…)."""
        return len(self.lines)

    def reload(self, config=None):
        """Send HUP, with a new configuration first if one is given; wait_log tells the outcome."""
        if config is not None:
            self.configure(config)
        self.signal(signal.SIGHUP)

    def kill(self):
        """End it with SIGKILL; close() then asks for no clean exit."""
        self._ended = True
        super().kill()

    def stop(self, expect=0, within=3):
        """Send TERM and check that it ends in time, and how."""
        self._ended = True
        if self.alive:
            self.signal(signal.SIGTERM)
        try:
            code = self.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError("nutshim did not end within %s s of TERM:\n%s" % (within, self.log)) from None
        assert code == expect, "nutshim ended with %s, not %s:\n%s" % (code, expect, self.log)

    def close(self):
        """stop(), unless the test has ended it; check that the log holds no traceback; clean up."""
        try:
            if not self._ended:
                self.stop()
            assert self.expect_traceback or "Traceback" not in self.log, "nutshim's log has:\n" + self.log
        finally:
            self.end()
            self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
        else:                                       # the first fault is the one to report
            self.end()
            self._stack.close()


def pair_config(upsd_port, pki, server=None, client=None):
    """The configuration of a server shim in front of upsd and a client shim in front of that.

    server and client: options to add or replace; None as a value leaves the option out.
    """
    middle = free_port()
    sections = {
        "server": {"role": "server", "listen": "127.0.0.1:%d" % middle, "upstream": "127.0.0.1:%d" % upsd_port,
                   "certificate": pki.server.file},
        "client": {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % middle,
                   "trust": pki.ca.cert},
    }
    sections["server"].update(server or {})
    sections["client"].update(client or {})
    return {name: {key: value for key, value in options.items() if value is not None}
            for name, options in sections.items()}
