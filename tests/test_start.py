# SPDX-License-Identifier: GPL-2.0-or-later
"""How nutshim starts around a real upsd: the background, bytecode, user, chroot and ports, systemd.

Real processes throughout. Where a fault cannot be had for real, nutshim.py is started through a small
script that plants it: harness.patched().
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import sys
import threading
import time

import pytest

from daemons import (NO_FILE, PLANTED, as_root, becoming, keepalive_timers, own_copy, proc_status, read, refused, runs,
                     server_section, works)
from harness import (NUTSHIM, PlainClient, Shim, TlsClient, command, free_port, patched, poll, run, run_shim,
                     shim_status, status, write)


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
    "pidfile that is none": ({}, {"pidfile": "{folder}/nutshim.conf"}, (), r"nutshim\.conf: this is no pidfile"),
    "unknown user": ({}, {"user": "nobody-such"}, (), "user.*nobody-such"),
    "unknown user of -u": ({}, {}, ("-u", "nobody-such"), "user.*nobody-such"),
    "chroot that is none": ({}, {}, ("-r", "{folder}/none"), "chroot.*none"),
    "pidfile with too long a path": ({}, {"pidfile": "{folder}/" + 110 * "x" + ".pid"}, (), "pidfile.*path too long"),
    "log in no directory": ({}, {"log": "{folder}/none/log"}, (), "log.*none/log: " + NO_FILE),
    "log to stderr": ({}, {"log": "stderr"}, (), "log.*stderr.*-F"),
    "log to a standard file's device": ({}, {"log": "/dev/stdout"}, (), "log.*/dev/stdout.*-F"),
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
    assert "Traceback" not in done.stderr and done.stdout == "" and "[shim]" in read(shim.config)
    poll(lambda: not shim.processes(), 5, "the end of every process of the failed start")
    assert not [name for name in os.listdir(shim.folder) if name.endswith(".sock")]


NO_THREADS = """
import _thread
def start_new_thread(*_):
    raise RuntimeError("can't start new thread")
_thread.start_new_thread = start_new_thread
"""


def test_a_start_without_threads_is_told(daemon, nut, pki, tmp_path):
    """Where the system gives it no thread, as under a narrow limit of processes, it says so without a traceback."""
    shim = daemon({"shim": server_section(nut, pki)}, start=False, script=patched(str(tmp_path), NO_THREADS))
    done = shim.start()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"handshake_threads: can't start new thread: raise the limit", done.stderr), done.stderr


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
        done = shim.start(preexec_fn=lambda: os.setgroups([4, account.pw_gid]))
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


# ---- start from bytecode ------------------------------------------------------------------------

def words_of(pid):
    """A process's command line, as a list."""
    with open("/proc/%d/cmdline" % pid, "rb") as file:
        return file.read().decode("utf-8").split("\0")[:-1]


@pytest.mark.parametrize("flags", [[], ["-B", "-W", "error", "-X", "dev"]], ids=["plain", "-B -W error -X dev"])
def test_it_starts_itself_from_bytecode_as_the_same_process(nut, pki, flags):
    """What was started becomes the daemon: same process, Python's flags kept, and ps shows nutshim.py with its arguments."""
    first, rest = (flags + [NUTSHIM])[0], (flags + [NUTSHIM])[1:]
    with Shim({"shim": server_section(nut, pki)}, script=first, args=rest + ["-D"]) as shim:
        shim.wait_log("debug: runs from bytecode")
        assert status(shim)["pid"] == shim.pid      # Popen's own number
        words = words_of(shim.pid)
        at = words.index(NUTSHIM)
        assert words[at:] == [NUTSHIM, "-D", "-f", shim.config]
        assert read("/proc/%d/comm" % shim.pid) == "nutshim\n"
        for flag in flags and ("-B", "-Werror", "-Xdev"):
            assert flag in words[:at]
        assert works(shim.port("shim"))
    assert "Warning" not in shim.log


def test_the_daemon_in_the_background_runs_from_bytecode(daemon, nut, pki):
    """The pidfile names the process that serves, isolated and without site, and the parent waited for it."""
    shim = daemon({"shim": server_section(nut, pki)})
    assert shim.processes() == [shim.pid] and status(shim)["pid"] == shim.pid
    words = words_of(shim.pid)
    assert words[1:3] == ["-I", "-S"] and NUTSHIM in words
    assert read(shim.proc + "/comm") == "nutshim\n"
    assert works(shim.port("shim"))


def started_as_a_program(path, code):
    """Write a script that becomes `python3 nutshim.py` after some code; its path."""
    return write(os.path.join(path, "start.py"), "import os, runpy, sys\n%s\nsys.argv[0] = %r\n"
                 "runpy.run_path(%r, run_name='__main__')\n" % (code, NUTSHIM, NUTSHIM), 0o644)


NO_MEMFD = """
def fails(*_):
    raise OSError(38, "Function not implemented")
os.memfd_create = fails
"""


@pytest.mark.parametrize("code, env, way", [
    (NO_MEMFD, {}, "source: .*Function not implemented"),
    ("if hasattr(os, 'memfd_create'): del os.memfd_create", {}, "bytecode"),
    ("", {"PYTHONPATH": "/nonexistent"}, "source: .*environment"),
    ("", {"PYTHONHOME": sys.base_prefix}, "source: .*environment")],
    ids=["memfd fails", "no memfd", "PYTHONPATH", "PYTHONHOME"])
def test_without_the_means_it_goes_on_from_source(nut, pki, tmp_path, code, env, way):
    """Where no unnamed file can be had, or Python's modules are elsewhere, it runs as it was compiled; -D says so."""
    before = set(os.listdir("/run")) | set(os.listdir("/tmp"))
    with Shim({"shim": server_section(nut, pki)}, script=started_as_a_program(str(tmp_path), code), args=("-D",),
              env=env) as shim:
        shim.wait_log("debug: runs from " + way)
        assert status(shim)["pid"] == shim.pid and works(shim.port("shim"))
        left = (set(os.listdir("/run")) | set(os.listdir("/tmp"))) - before
        assert not [name for name in left if name.startswith(".nutshim")]


INHERIT = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
fds = [os.dup(1) for _ in range(20)] + list(os.pipe())
for fd in fds:
    os.set_inheritable(fd, True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_nothing_of_its_parent_stays(nut, pki):
    """Descriptors that the parent left open are closed, and signals that it held back are let through."""
    plain = Shim({"shim": server_section(nut, pki)})
    with plain, Shim({"shim": server_section(nut, pki)}, script="-c", args=(INHERIT, sys.executable, NUTSHIM, "-F")) as shim:
        poll(lambda: shim.fds() == plain.fds(), 5, lambda: "as many descriptors: %s, %s" % (shim.fds(), plain.fds()))
        mark = shim.mark()
        shim.reload()
        shim.wait_log("reloaded", start=mark)
        shim.stop()


@as_root
@pytest.mark.parametrize("name", ["log", "nutshim.pid"])
@pytest.mark.parametrize("trick", ["a second name", "another user's"])
def test_a_file_that_may_be_somebody_elses_is_left_alone(daemon, nut, pki, name, trick):
    """A log or pidfile with a second hard link, or of a strange user, ends the start with words and is not written to."""
    shim = daemon({"shim": server_section(nut, pki)}, start=False)
    precious, path = os.path.join(shim.folder, "precious"), os.path.join(shim.folder, name)
    write(precious, "precious\n")
    if trick == "a second name":
        os.link(precious, path)
    else:
        os.rename(precious, path)
        os.chown(path, 12345, 12345)
        precious = path
    done = shim.start()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    words = "has another name too" if trick == "a second name" else "belongs to user 12345"
    assert re.search(r"nutshim\.conf:\d+.*%s.*%s" % (re.escape(name), words), done.stderr), done.stderr
    assert read(precious) == "precious\n"
    assert shim.processes() == []


def test_an_address_that_is_not_there_yet_is_bound_all_the_same(shim, nut, pki):
    """An address of listen that this machine lacks is warned about in the log, by -t and in the status; the others serve."""
    section = server_section(nut, pki)
    config = {"shim": dict(section, listen=section["listen"] + ", 192.0.2.1:0, [2001:db8::1]:0")}
    one = shim(config)
    assert works(one.port("shim"))
    for address in ("192.0.2.1", "2001:db8::1"):
        pattern = r"warning: \S+nutshim\.conf:\d+: \[shim\] listen: %s: this machine has no such address" % re.escape(address)
        one.wait_log(pattern)
        assert re.search(pattern, run_shim("-t", "-f", one.config).stdout)
    assert [each.rpartition(":")[0] for each in shim_status(one, "shim")["absent"]] == ["192.0.2.1", "[2001:db8::1]"]
    assert "this machine has no address [2001:db8::1]" in command(one, "status").stdout


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
def test_a_folder_in_trust_is_none_of_the_files_that_a_reload_reads(daemon, nut, pki, account):
    """A closed folder inside the folder trust, such as a CA's, draws no warning and no advice to open it."""
    shim = daemon({}, start=False)
    trust = os.path.join(shim.folder, "trust")
    os.makedirs(trust + "/closed", 0o755)
    os.chmod(trust + "/closed", 0o700)
    shutil.copy(pki.ca.cert, trust)
    shim.configure({"": {"user": "nut"}, "shim": server_section(nut, pki, client_certificate="require", trust=trust)})
    tested = run(*shim.program, "-t", "-f", shim.config)
    assert tested.returncode == 0 and "trust/closed" not in tested.stdout + tested.stderr, tested


@as_root
def test_files_that_a_reload_could_not_read_are_named_at_the_start(daemon, nut, pki, account):
    """Each file that only root can read is named in the log, with the cure, when root becomes the user, and by root's -t before."""
    shim = daemon({}, start=False)
    files = {name: shutil.copy(path, shim.folder) for name, path in (
        ("certificate", pki.server.file), ("trust", pki.ca.cert), ("crl", pki.crl))}
    for path in files.values():
        os.chmod(path, 0o600)
    shim.configure({"": {"user": "nut"}, "shim": server_section(nut, pki, client_certificate="require", **files)})
    tested = run(*shim.program, "-t", "-f", shim.config)
    assert tested.returncode == 0, tested.stderr
    assert shim.start().returncode == 0
    for text in (read(shim.log_file), tested.stdout):
        for path in files.values():
            assert re.search(r"warning: %s: nut cannot read it.*'chgrp %d %s'" % (path, account.pw_gid, path), text), text
        assert text.count("cannot read it") == 3        # nutshim.conf it can


@as_root
def test_the_status_comes_where_the_folder_trust_is_closed(daemon, nut, pki, account):
    """-c status works although nut cannot list the folder that trust names."""
    shim = daemon({}, start=False)
    folder = os.path.join(shim.folder, "trust")
    os.mkdir(folder, 0o700)
    shutil.copy(pki.ca.cert, folder)
    shim.configure({"": {"user": "nut"}, "shim": server_section(nut, pki, client_certificate="request", trust=folder)})
    assert shim.start().returncode == 0
    assert folder in status(shim)["shims"][0]["files"]
    assert re.search("warning: %s: nut cannot read it" % folder, read(shim.log_file))


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
def test_root_gives_its_user_no_device_and_no_output(nut, pki, account, python_for_all, tmp_path):
    """A log in /dev/null or /dev/stdout does not hand the device, or the file that the shell has opened, to nut."""
    device, output, port = str(tmp_path / "null"), write(str(tmp_path / "output"), ""), free_port()
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        write(device, "")
    except OSError:
        pytest.skip("no devices can be made here")
    for log in (device, "/dev/stdout"):
        section = server_section(nut, pki, listen="127.0.0.1:%d" % port)
        with Shim({"": {"user": account.pw_name, "log": log}, "shim": section}, python="sh", script="-c", ready=0,
                  args=('exec "$@" >"$0"', output, python_for_all, NUTSHIM, "-F")) as one:
            poll(lambda one=one: proc_status("/proc/%d" % one.pid, "Uid")[0] == str(account.pw_uid), 10, "the change of user")
    assert "stopped" in read(output)
    assert os.stat(device).st_uid == os.stat(output).st_uid == 0


@as_root
def test_a_chroot_confines_and_nothing_is_missing_in_it(daemon, nut, pki, tmp_path):
    """In an empty chroot everything still works: both roles, status, the traceback of a bug, and a reload of what lies in
    it, faulty or not."""
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
        poll(lambda: "planted fault" in shim.log, 5, "the fault in the log")
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
        good = read(jail + shim.config)
        write(jail + shim.config, "max_sesions = 5\n" + good)
        done = command(shim, "reload")
        assert done.returncode == 1 and "did you mean max_sessions" in done.stderr, done.stderr
        write(jail + shim.config, "max_sessions = 100000\n" + good)
        done = command(shim, "reload")              # which raises the limit of descriptors
        assert done.returncode == 0, done.stderr
    assert command(shim, "stop").returncode == 0


# ---- systemd ------------------------------------------------------------------------------------

HAND_OVER = """
import os, socket, sys
for wanted, address in enumerate(sys.argv[2].split(","), 3):
    host, _, port = address.rpartition(":")
    sock = socket.socket(socket.AF_INET6 if ":" in host or host == "*" else socket.AF_INET)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "*")
    sock.bind((host.replace("*", "::"), int(port)))
    sock.listen(5)
    if sock.fileno() != wanted:
        os.dup2(sock.fileno(), wanted)
    os.set_inheritable(wanted, True)
    sock.detach()
    print(os.readlink("/proc/self/fd/%d" % wanted), flush=True)
os.environ.update(LISTEN_FDS=str(wanted - 2), LISTEN_PID=str(os.getpid() + int(sys.argv[1])))
os.execv(sys.argv[3], sys.argv[3:])
"""


def handed_over(config, addresses, wrong_pid=0):
    """A Shim that gets listening sockets the way systemd hands them over (sd_listen_fds(3)); * is one of both families."""
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


@pytest.mark.parametrize("host", ["*", "0.0.0.0"])
def test_a_socket_of_both_families_serves_both(nut, pki, host):
    """One socket, as systemd makes it of ListenStream=PORT, is enough for listen = * or 0.0.0.0, also after a reload; peers
    of IPv4 have their own address, and nobody holds up the others."""
    port = free_port()
    config = {"one": server_section(nut, pki, listen="%s:%d" % (host, port), allow_from="127.0.0.1, ::1", plaintext="localhost")}
    with handed_over(config, ["*:%d" % port]) as shim:
        for reloaded in (False, True):
            if reloaded:
                shim.reload()
                shim.wait_log("reloaded")
            for address in ("127.0.0.1", "::1")[:1 + (host == "*")]:
                with PlainClient(port, address) as client:
                    assert client.ask("NETVER") == b"1.3\n"
            with PlainClient(port, source=("127.0.0.2", 0)) as client:
                assert client.recv_until_close() == b""
        shim.wait_log(r"\[one\] #\d+ 127\.0\.0\.1:\d+: opened")


def test_sockets_meant_for_another_process_are_closed(nut, pki):
    """With a LISTEN_PID that is not its own the sockets are not taken but closed, and it binds one of its own."""
    port, extra = free_port(), free_port()
    with handed_over({"one": server_section(nut, pki, listen="127.0.0.1:%d" % port)},
                     ["127.0.0.1:%d" % port, "127.0.0.1:%d" % extra], 1) as shim:
        poll(lambda: len(re.findall(r"socket:\[\d+\]", shim.log)) >= 2, 5, "two sockets")
        inherited = set(re.findall(r"socket:\[\d+\]", shim.log))
        assert len(inherited) == 2
        links = [os.readlink("/proc/%d/fd/%s" % (shim.pid, fd)) for fd in os.listdir("/proc/%d/fd" % shim.pid)]
        assert not inherited & set(links)
        assert works(port) and refused(extra)


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
