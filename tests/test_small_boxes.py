# SPDX-License-Identifier: GPL-2.0-or-later
"""What nutshim.py needs of Python: OpenWrt's python3-light and python3-openssl, from 3.7 on.

The small Python is the one at hand with an import hook that has nothing of what OpenWrt puts into
other packages (lang/python/python3/files/python3-package-*.mk in its packages feed), run without
site and the environment. Modules that need one of these are out with them, as they are there.
"""

import concurrent.futures
import glob
import os
import subprocess
import sys

import pytest

from harness import (NUTSHIM, ROOT, TESTS, PlainClient, Shim, TlsClient, clean_env, folder, free_port, run, run_shim,
                     upsc, write)

OPENWRT_LACKS = """asyncio cgi cgitb ctypes curses dbm decimal distutils email ensurepip gdbm idlelib lib2to3
logging lzma multiprocessing ncurses pip pkg_resources pydoc pydoc_data readline setuptools sqlite3 tkinter turtle
unicodedata unittest urllib uuid venv webbrowser xml xmlrpc""".split()

# Runs a script, or - or -c TEXT, as python3-light would: `python3 -S -E small.py SCRIPT ARGUMENT…`
SMALL_PYTHON = """
import sys

LACKS = frozenset(%r)


class NotThere:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in LACKS or top.startswith("_codecs_"):
            raise ModuleNotFoundError("No module named %%r: it is not in python3-light" %% name, name=name)


sys.meta_path.insert(0, NotThere())
for name in list(sys.modules):
    if name.partition(".")[0] in LACKS:
        del sys.modules[name]
del sys.argv[0]
if sys.argv[0] == "-c":
    code = sys.argv.pop(1)
elif sys.argv[0] == "-":
    code = sys.stdin.read()
else:
    with open(sys.argv[0], encoding="utf-8") as file:
        code = file.read()
exec(compile(code, sys.argv[0], "exec"), {"__name__": "__main__", "__file__": sys.argv[0]})
""" % OPENWRT_LACKS


@pytest.fixture(scope="module")
def small_python(tmp_path_factory):
    """What to put between python3 and a script."""
    return ["-S", "-E", write(str(tmp_path_factory.mktemp("small") / "small.py"), SMALL_PYTHON)]


def small_shim(small_python, config, args=("-F",)):
    """A Shim under the small Python."""
    return Shim(config, script=small_python[0], args=small_python[1:] + [NUTSHIM] + list(args))


def config_with_names(upsd_port, pki):
    """Both roles, with names wherever a name can stand: these are what the idna codec would be asked for."""
    middle = free_port()
    return {
        "server": {"role": "server", "listen": "localhost:%d" % middle, "upstream": "localhost:%d" % upsd_port,
                   "certificate": pki.server.file, "client_certificate": "request", "trust": pki.ca.cert,
                   "permit": "DNS:client.example: admin, *: monitor", "allow_from": "127.0.0.0/8, ::1"},
        "client": {"role": "client", "listen": "127.0.0.1:0", "upstream": "localhost:%d" % middle,
                   "trust": pki.ca.cert, "certificate": pki.client.file},
    }


@pytest.mark.parametrize("text, fault", [
    ("import logging", "ModuleNotFoundError"), ("import concurrent.futures.thread", "ModuleNotFoundError"),
    ("import http.client", "ModuleNotFoundError"), ("import unicodedata", "ModuleNotFoundError"),
    ("import codecs; codecs.lookup('idna')", "LookupError"),
    ("import socket; socket.getaddrinfo('localhost', 0)", "LookupError")])
def test_small_python_is_small(small_python, tmp_path, text, fault):
    """The small Python of these tests lacks what OpenWrt's lacks, the idna codec included."""
    script = write(str(tmp_path / "script.py"), text + "\n")
    done = run(sys.executable, *(small_python + [script]))
    assert done.returncode == 1 and fault in done.stderr


def test_session_on_openwrts_python(small_python, nut, pki):
    """Both roles relay real sessions, by name, with python3-light and python3-openssl alone."""
    with small_shim(small_python, config_with_names(nut.port, pki)) as shims:
        answer = upsc(shims.port("client"), host="localhost")
        assert answer.returncode == 0 and "ups.status: OL" in answer.stdout, answer.stderr
        with PlainClient(shims.port("client")) as client, TlsClient(shims.port("server"), ca=pki.ca.cert) as stranger:
            client.login()
            assert client.ask("SET TRACKING ON") == b"OK\n"
            assert stranger.ask("SET TRACKING ON") == b"ERR ACCESS-DENIED\n"
        status = run(sys.executable, *(small_python + [NUTSHIM, "-c", "status", "--json", "-f", shims.config]))
        assert status.returncode == 0 and '"client"' in status.stdout, status.stderr


@pytest.mark.parametrize("args, words", [
    (["-t"], "no fault found"), (["-p", "client"], "TLSv1.3"), (["-V"], "nutshim"), (["-h"], "handshake_timeout")])
def test_commands_on_openwrts_python(small_python, nut, pki, args, words):
    """-t, -p, -V and -h work with python3-light and python3-openssl alone."""
    with small_shim(small_python, config_with_names(nut.port, pki)) as shims:
        done = run(sys.executable, *(small_python + [NUTSHIM] + args + ["-f", shims.config]))
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr


def test_faults_on_openwrts_python(small_python, pki, tmp_path):
    """Where something fails the small Python gives the administrator's error too, and no traceback."""
    path = write(str(tmp_path / "nutshim.conf"),
                 "[a]\nrole = server\ncertificate = nosuch.pem\nlisten = x y\nnosuch = 1\n")
    done = run(sys.executable, *(small_python + [NUTSHIM, "-t", "-f", path]))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all("%s:%d: " % (path, line) in done.stderr for line in (3, 4, 5))
    config = config_with_names(free_port(), pki)
    with small_shim(small_python, config) as shims, PlainClient(shims.port("client")) as client:
        client.send("VER\n")
        assert client.recv_until_close() == b""


def test_quickstart_on_openwrts_python(small_python, nut, tmp_path):
    """packaging/quickstart, mkNUTcert.py in it, works with python3-light and python3-openssl alone."""
    python = write(str(tmp_path / "python"), '#!/bin/sh\nexec %s %s "$@"\n' % (
        sys.executable, " ".join(small_python)), 0o700)
    with folder("quick") as path:
        done = run(os.path.join(ROOT, "packaging", "quickstart"), "--once", timeout=50,
                   env=clean_env(PYTHON=python, TMPDIR=path, QUICKSTART_PORT=str(nut.port)))
        assert done.returncode == 0 and 'ups.status "OL"' in done.stdout, done.stdout + done.stderr
        assert os.listdir(path) == []


# ---- every Python from 3.7 on -------------------------------------------------------------------

def pythons():
    """{version: path} of the Pythons from 3.7 to 3.14 that are installed and have ssl, the running one among them.

    python3.7 … python3.14 on PATH, and pyenv's versions.
    """
    places = ["python3.%d" % minor for minor in range(7, 15)]
    places += sorted(glob.glob(os.path.join(os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv")),
                                            "versions", "3.*", "bin", "python3")))
    found = {"%d.%d" % sys.version_info[:2]: sys.executable}
    for place in places:
        try:
            done = subprocess.run([place, "-c", "import sys, ssl; print('%d.%d' % sys.version_info[:2])"],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_env(), check=False)
        except OSError:
            continue
        version = done.stdout.decode("ascii", "replace").strip()
        if done.returncode == 0 and version in ["3.%d" % minor for minor in range(7, 15)]:
            found.setdefault(version, place)
    return dict(sorted(found.items(), key=lambda item: int(item[0][2:])))


PYTHONS = pythons()
EACH = pytest.mark.parametrize("python", PYTHONS.values(), ids=PYTHONS)


@pytest.fixture(scope="module")
def core_tests():
    """The tests of the core under every Python, two at a time in the background: {python: result to come}."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {python: pool.submit(run, python, os.path.join(TESTS, "test_core.py"), timeout=100)
               for python in PYTHONS.values()}


@EACH
@pytest.mark.seconds(120)
def test_core_under_every_python(core_tests, python):
    """The tests of the protocol core pass under every Python that is installed."""
    done = core_tests[python].result()
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


@EACH
def test_session_under_every_python(nut, pki, python):
    """Both roles relay a session, verified by name, under every Python that is installed, and warn of nothing."""
    config = config_with_names(nut.port, pki)
    checked = run_shim("-V", python=python)
    assert checked.returncode == 0 and checked.stderr == ""
    with Shim(config, python=python, env={"PYTHONWARNINGS": "default"}) as shims:
        answer = upsc(shims.port("client"), "ups.status")
        assert (answer.returncode, answer.stdout) == (0, "OL\n"), answer.stderr
        with PlainClient(shims.port("client")) as client, PlainClient(nut.port) as direct:
            assert client.ask_list("LIST VAR ups") == direct.ask_list("LIST VAR ups")
            client.login()
            assert client.ask("SET TRACKING ON") == b"OK\n"
        assert "Warning" not in shims.log, shims.log
