# SPDX-License-Identifier: GPL-2.0-or-later
"""The log: syslog, files, standard error, its levels, and what a reload makes of it.

Real processes and files; a syslogd whose socket can be left unread is played.
"""

import contextlib
import os
import re
import socket
import stat
import sys

import pytest

from daemons import STAMP, as_root, knock, own_copy, read, refused, server_section, works
from harness import (IS_ROOT, NUTSHIM, PRIMARY, FalseServer, PlainClient, Shim, TlsClient, command, free_port, pair_config,
                     poll, run, tls, write)


LOST = r"[1-9]\d* log lines.*lost"


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


def test_a_syslog_socket_of_streams_is_taken_too(nut, pki, tmp_path):
    """Where syslogd listens for streams, as s6's does, each message ends with NUL, also to one that was restarted."""
    port, path = free_port(), str(tmp_path / "syslog")
    with Shim({"": {"log": "syslog"}, "shim": server_section(nut, pki, listen="127.0.0.1:%d" % port)},
              **namespace(str(tmp_path), PRIVATE_DEV_LOG)) as shim:
        poll(lambda: not refused(port), 10, lambda: "the port; " + shim.log)
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen(1)
                listener.settimeout(5)
                knock(port, 2)
                sock = listener.accept()[0]
            with sock:
                sock.settimeout(5)
                data = b""
                while data.count(b"opened\0") < 2:
                    data += sock.recv(65536)
                assert all(re.match(rb"<\d+>\w{3} [ \d]\d [\d:]{8} nutshim\[\d+\]: [^\n]+$", line)
                           for line in data.split(b"\0")[:-1])
            os.unlink(path)
            knock(port)                             # and there is nobody again


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
    """With the log's file system full, sessions go on; with space again the log goes on, in a line of its own, and says how
    many lines were lost."""
    port, disk = free_port(), str(tmp_path / "disk")
    os.mkdir(disk)
    with Shim({"": {"log": disk + "/log"}, "shim": server_section(nut, pki, listen="127.0.0.1:%d" % port)},
              **namespace(disk, 'mount -t tmpfs -o size=16k tmpfs "$0"; head -c 8k /dev/zero >"$0/ballast"')) as shim:
        poll(lambda: not refused(port), 10, lambda: "the port; " + shim.log)
        log = "/proc/%d/root%s/log" % (shim.pid, disk)
        with TlsClient(port) as client:
            for _ in range(20):
                knock(port, 10)
                assert client.ask("NETVER") == b"1.3\n"
            assert os.path.getsize(log) == 8192
            os.unlink(os.path.join(os.path.dirname(log), "ballast"))
            knock(port)
            poll(lambda: re.search(LOST, read(log)), 5, "the number of lost lines")
            assert max(line.count("nutshim[") for line in read(log).splitlines()) == 1
            assert client.ask("NETVER") == b"1.3\n"


def test_a_line_is_never_longer_than_2048_characters(shim, pki):
    """A false server whose certificate has thousands of names does not fill the log with them."""
    names = pki.ca.issue("many", ",".join("DNS:%s%d.example" % ("x" * 50, number) for number in range(1000)))
    with FalseServer(tls(names)) as server:
        one = shim({"client": {"role": "client", "listen": "127.0.0.1:0", "upstream": "localhost:%d" % server.port,
                               "trust": pki.ca.cert}})
        with PlainClient(one.port("client")) as client:
            client.send("VER\n")
            assert client.recv_until_close() == b""
        one.wait_log("no upstream .*its certificate is")
    assert max(map(len, one.lines)) < 2048 + 100    # the time and the process stand before it


STEPS = {                                           # of an opening, by the shim that takes them
    "server": ["greeting: tls", r"connect: 127\.0\.0\.1:\d+: trying", r"connect: 127\.0\.0\.1:\d+: 127"],
    "client": ["upstream: a session of its own", r"look-up: |connect: localhost:\d+: trying", "connect: localhost:.*127",
               "STARTTLS: .*OK", "TLS: .*has to be for localhost", r"TLS: .*TLSv1\.3"],
}


@pytest.mark.parametrize("level", ["-F", "-D", "-DD"])
def test_each_level_of_debugging_tells_its_own(nut, pki, tmp_path, level):
    """-F logs where log says; -D to stderr, with each step of an opening; -DD with the protocol's words too, but no secret."""
    log = str(tmp_path / "log")
    config = dict({"": {"log": log}}, **pair_config(nut.port, pki))
    config["client"]["upstream"] = config["client"]["upstream"].replace("127.0.0.1", "localhost")
    with Shim(config, args=(level,), ready=0) as shim:
        def text():
            return read(log) if level == "-F" else shim.log
        poll(lambda: text().count("listening on") == 2, 5, "the listening lines")
        port = int(re.search(r"\[client\] listening on 127.0.0.1:(\d+)", text()).group(1))
        with PlainClient(port) as client:
            assert client.ask("GET VAR ups ups.status").startswith(b"VAR ups")
            for each in ("USERNAME " + PRIMARY[0], "PASSWORD " + PRIMARY[1]):
                assert client.ask(each) == b"OK\n"
            assert client.ask("PASSWROD " + PRIMARY[1]).startswith(b"ERR ")     # a slip of the hand
            assert client.ask("GET VAR ups ups.mfr").startswith(b"VAR ups")
        poll(lambda: re.search(r"\[client\] .*closed", text()), 5, "the end of the session in the log")
    lines = [line for line in text().splitlines() if re.match(STAMP + "debug: ", line)]
    for section, steps in STEPS.items():
        of_it = "\n".join(line for line in lines if "[%s]" % section in line)
        for step in steps:
            assert bool(re.search(step, of_it)) == (level != "-F"), (step, of_it)
    words = ["GET VAR ups ups.status", "GET VAR ups ups.mfr", "USERNAME " + PRIMARY[0], "PASSWORD \\.\\.\\.",
             "\\.\\.\\."]
    for word in words:
        assert len([line for line in lines if re.search("command '%s'" % word, line)]) == 2 * (level == "-DD"), word
    assert bool(lines) == (level != "-F") and bool(read(log)) == (level == "-F")
    assert PRIMARY[1] not in shim.log + read(log)


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
    for top, section in (({"log": elsewhere}, {"listen": "127.0.0.1:%d" % nut.port}),   # which is upsd's
                         ({"log": elsewhere}, {"certificate": "/none"}),
                         ({"log": shim.folder + "/none/log"}, {})):
        shim.configure({"": top, "shim": dict(config["shim"], **section)})
        done = command(shim, "reload")
        assert done.returncode == 1, done.stdout
        poll(lambda lines=done.stderr.splitlines(): all(line in shim.log for line in lines), 5, lambda: "the same in:\n" + shim.log)
        lines = shim.log.count("\n")
        knock(port)
        poll(lambda lines=lines: shim.log.count("\n") >= lines + 2, 5, "lines in the old log")
        poll(lambda: len(os.listdir(shim.proc + "/fd")) == descriptors, 5, "as few descriptors as before")
    shim.configure({"": {"log": elsewhere}, "shim": config["shim"]})
    assert command(shim, "reload").returncode == 0
    knock(port)
    poll(lambda: "closed" in read(elsewhere), 5, "lines in the new log")


def test_a_daemon_in_the_background_is_given_no_standard_file_at_a_reload(daemon, nut, pki):
    """There stderr and stdout lead nowhere, so a reload that asks for them fails and the log goes on where it was."""
    shim = daemon({"shim": server_section(nut, pki)})
    for target in ("stderr", "/dev/stderr", "/dev/stdout"):
        shim.configure({"": {"log": target}, "shim": server_section(nut, pki, listen="127.0.0.1:%d" % shim.port("shim"))})
        done = command(shim, "reload")
        assert done.returncode == 1 and re.search("log: %s needs -F" % target, done.stderr), done.stderr
        assert "%s needs -F" % target in shim.log


def test_a_log_that_cannot_be_opened_anew_goes_on_as_it_is(daemon, nut, pki):
    """A reload whose log, the same as before, cannot be opened any more succeeds, with a warning in the file that is open."""
    shim = daemon({}, start=False)
    place = os.path.join(shim.folder, "place")
    os.mkdir(place)
    config = {"": {"log": place + "/log"}, "shim": server_section(nut, pki)}
    shim.configure(config)
    done = shim.start()
    assert done.returncode == 0, done.stderr
    os.rename(place, place + ".old")
    shim.configure(dict(config, new=server_section(nut, pki)))
    done = command(shim, "reload")
    assert done.returncode == 0, done.stderr
    warning = r"warning: \S+nutshim\.conf:\d+: log: .*No such file.*goes on in the file that is open"
    poll(lambda: re.search(warning, read(place + ".old/log")), 5, lambda: "the warning in: " + read(place + ".old/log"))
    assert "[new] listening on" in read(place + ".old/log")
