# SPDX-License-Identifier: GPL-2.0-or-later
"""packaging/quickstart, README's first command: with each kind of upsd, in each shell, and its end."""

import contextlib
import os
import re
import shutil
import signal
import sys
import uuid

import pytest

from conftest import leftovers
from harness import (IS_ROOT, ROOT, PlainClient, Process, clean_env, folder, free_port, missing_nut, nut_program,
                     poll, run, write)

NOBODY = 65534
QUICKSTART = os.path.join(ROOT, "packaging", "quickstart")


class Place:
    """Where one quickstart runs: its temporary folder, its environment, and what is left of it."""

    def __init__(self, path):
        self.path = path
        self.mark = uuid.uuid4().hex
        self.env = clean_env(TMPDIR=path, NUTSHIM_TESTS=self.mark, QUICKSTART_PORT=str(free_port()),
                             PYTHON=sys.executable)

    def run(self, *args, command=(QUICKSTART,), **options):
        """Run it to its end; the CompletedProcess. Nothing may be left, however it went."""
        done = run(*(list(command) + list(args)), env=self.env, timeout=50, **options)
        self.nothing_left()
        return done

    def nothing_left(self):
        """No file and no process stays behind."""
        assert os.listdir(self.path) == []
        assert leftovers(self.mark) == {}


@pytest.fixture
def place():
    """A Place."""
    with folder("quick") as path:
        here = Place(path)
        yield here
        for pid in leftovers(here.mark):            # a test that found them has failed already
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def shown(output):
    """Check what a good run prints; the UPS and the port of the upsc line, None with --once."""
    for words in (r"TLS +TLSv1\.3\W+TLS_\w+", r"certificate .*DNS:localhost.*IP:127\.0\.0\.1",
                  r"> VER\n +< Network UPS Tools",
                  r"< BEGIN LIST UPS\n +< UPS ups ", r"> GET VAR ups ups\.status\n +< VAR ups ups\.status \"OL\"",
                  r"< OK Goodbye"):
        assert re.search(words, output), "no %r in:\n%s" % (words, output)
    line = re.search(r"upsc (\w+)@127\.0\.0\.1:(\d+)", output)
    return line and (line.group(1), int(line.group(2)))


def test_upsd_that_runs_is_used(place, nut):
    """The upsd that answers on the port is talked to, and goes on as before."""
    place.env["QUICKSTART_PORT"] = str(nut.port)
    with PlainClient(nut.port) as client:
        assert client.ask("NETVER") == b"1.3\n"
        done = place.run("--once")
        assert done.returncode == 0, done.stderr
        assert shown(done.stdout) is None
        assert "found on localhost port %d" % nut.port in done.stdout and "Test UPS" in done.stdout
        assert client.ask("NETVER") == b"1.3\n"


def test_installed_upsd_is_started(place, nut_installed):
    """Where no upsd runs an installed one is started with a made-up UPS, and ended again."""
    done = place.run("--once")
    assert done.returncode == 0, done.stderr
    shown(done.stdout)
    assert nut_program("upsd") in done.stdout and "A made-up UPS" in done.stdout


def small_path(path, commands, box=None):
    """Put nothing but these commands into a folder, for PATH; box: from busybox."""
    for name in commands:
        target = sys.executable if name == "python3" else shutil.which(name)
        if name in BOX_COMMANDS and box:
            os.symlink(box, os.path.join(path, name))
        else:                                       # a link would lead a Python in a virtual environment astray
            write(os.path.join(path, name), '#!/bin/sh\nexec %s "$@"\n' % target, 0o755)


BOX_COMMANDS = "basename cat dirname grep head mktemp rm sed sleep".split()


@pytest.mark.parametrize("shell", ["sh", "bash", "busybox"])
def test_standin_in_every_shell(place, shell):
    """Without NUT the stand-in upsd does, in every sh, in the end with busybox, openssl and python3 alone."""
    if not shutil.which(shell):
        pytest.skip("not installed: " + shell)
    place.env["QUICKSTART_NUT"] = ""
    command = [shutil.which(shell), QUICKSTART]
    with folder("path") as path:
        if shell == "busybox":
            command.insert(1, "sh")
            small_path(path, BOX_COMMANDS + ["python3", "openssl"], box=command[0])
            place.env.update(PATH=path, PYTHON="python3")
        done = place.run("--once", command=command)
    assert done.returncode == 0, done.stderr
    shown(done.stdout)
    assert "stand-in" in done.stdout


def test_upsd_that_cannot_start_gives_way_to_the_standin(place):
    """An installed upsd that ends at once is not the end of it: the stand-in takes its place."""
    with folder("nut") as path:
        for name in ("upsd", "dummy-ups"):
            write(os.path.join(path, name), "#!/bin/sh\nexit 1\n", 0o755)
        place.env["QUICKSTART_NUT"] = path
        done = place.run("--once")
    assert done.returncode == 0, done.stderr
    shown(done.stdout)
    assert "stand-in" in done.stdout


@pytest.mark.skipif(not IS_ROOT, reason="the other tests run it as a user already")
def test_it_needs_no_rights(place):
    """A user without any rights can run it, with an installed upsd if there is one."""
    python = next((path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(path)), None)
    if not python:
        pytest.skip("no Python outside root's home")
    with folder("tree") as tree:
        os.chmod(tree, 0o755)
        for name in ("nutshim.py", "mkNUTcert.py", "tests/standin.py", "packaging/quickstart"):
            os.makedirs(os.path.dirname(os.path.join(tree, name)), exist_ok=True)
            shutil.copy(os.path.join(ROOT, name), os.path.join(tree, name))
        os.chown(place.path, NOBODY, NOBODY)
        place.env["PYTHON"] = python
        done = place.run("--once", command=["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups",
                                            os.path.join(tree, "packaging", "quickstart")], cwd="/")
    assert done.returncode == 0, done.stderr
    shown(done.stdout)
    assert (nut_program("upsd") if not missing_nut() else "stand-in") in done.stdout


@pytest.mark.parametrize("number, everybody", [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, False)])
def test_it_stays_until_ctrl_c_and_leaves_nothing(place, number, everybody):
    """It stays for others to try; Ctrl-C (to all of the terminal's programs), TERM and HUP end it without a trace."""
    place.env["QUICKSTART_NUT"] = ""
    quickstart = Process(["setsid", QUICKSTART], place.env)
    try:
        quickstart.wait_log("Ctrl-C", 30)
        ups, port = shown(quickstart.log)
        with PlainClient(port) as client:
            assert client.ask("GET VAR %s ups.status" % ups) == b'VAR ups ups.status "OL"\n'
            assert quickstart.alive and len(leftovers(place.mark)) > 3
        if everybody:
            os.killpg(quickstart.pid, number)
        else:
            quickstart.signal(number)
        assert quickstart.wait(15) == 0
        place.nothing_left()
    finally:
        quickstart.end()


def test_an_early_end_leaves_nothing_either(place):
    """Ended while it is still starting, it leaves nothing behind and does not claim success."""
    place.env["QUICKSTART_NUT"] = ""
    quickstart = Process(["setsid", QUICKSTART], place.env)
    try:
        quickstart.wait_log("Certificates", 30)
        os.killpg(quickstart.pid, signal.SIGINT)
        assert quickstart.wait(15) == 1
        poll(lambda: not leftovers(place.mark), 10, "the end of what it started")
        place.nothing_left()
    finally:
        quickstart.end()


def test_a_second_ctrl_c_ends_what_hangs(place):
    """If one of its programs does not end, a second Ctrl-C makes it, and nothing is left behind either."""
    place.env["QUICKSTART_NUT"] = ""
    quickstart = Process(["setsid", QUICKSTART], place.env)
    try:
        quickstart.wait_log("Ctrl-C", 30)
        frozen = [pid for pid, command in leftovers(place.mark).items() if "standin.py" in command]
        assert len(frozen) == 1
        os.kill(frozen[0], signal.SIGSTOP)
        quickstart.signal(signal.SIGINT)
        poll(lambda: len(leftovers(place.mark)) == 2, 10, "the end of all but the frozen one and the script")
        quickstart.signal(signal.SIGINT)
        assert quickstart.wait(15) == 0
        place.nothing_left()
    finally:
        quickstart.end()


@pytest.mark.parametrize("broken, words", [("nutshim.py", "the server shim does not start"),
                                           ("mkNUTcert.py", "no certificates")])
def test_a_failure_shows_why_and_leaves_nothing(place, broken, words):
    """When a program fails, its own words are shown, the exit status is 1, and nothing is left behind."""
    with folder("tree") as tree:
        for name in ("nutshim.py", "mkNUTcert.py", "tests/standin.py", "packaging/quickstart"):
            os.makedirs(os.path.dirname(os.path.join(tree, name)), exist_ok=True)
            shutil.copy(os.path.join(ROOT, name), os.path.join(tree, name))
        write(os.path.join(tree, broken), "import sys\nsys.exit('broken on purpose')\n")
        place.env["QUICKSTART_NUT"] = ""
        done = place.run("--once", command=[os.path.join(tree, "packaging", "quickstart")])
    assert done.returncode == 1
    assert words in done.stderr and "broken on purpose" in done.stderr


def test_what_it_needs_is_named(place):
    """Without openssl or a fit python3 it says so at once; wrong usage is exit status 2."""
    assert place.run("--twice").returncode == 2
    del place.env["PYTHON"]
    with folder("path") as path:
        small_path(path, BOX_COMMANDS)
        place.env["PATH"] = path
        done = place.run("--once")
        assert done.returncode == 1 and "Python 3.7" in done.stderr
        small_path(path, ["python3"])
        done = place.run("--once")
        assert done.returncode == 1 and "expected the openssl command" in done.stderr
