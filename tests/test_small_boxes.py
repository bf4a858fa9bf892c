# SPDX-License-Identifier: GPL-2.0-or-later
"""What nutshim.py needs of Python and of the system: OpenWrt's python3-light and python3-openssl, from 3.7
on, and nothing that only Linux has.

The small Python is the one at hand, copied, beside a standard library that has nothing of what OpenWrt
puts into other packages (lang/python/python3/files/python3-package-*.mk in its packages feed). Modules
that need one of these are out with them, as they are there. It is an interpreter of its own: what it
starts with its own path, isolated and without site, is as small as it is itself. Other systems are
simulated the same way, by changes to that library.
"""

import ast
import os
import pwd
import re
import shutil
import sys
import sysconfig

import pytest

from harness import (IS_ROOT, NUTSHIM, ROOT, TESTS, PlainClient, Shim, TlsClient, clean_env, folder, free_port, run, run_shim,
                     upsc, write)

OPENWRT_LACKS = """asyncio cgi cgitb ctypes curses dbm decimal distutils email ensurepip gdbm idlelib lib2to3
logging lzma multiprocessing ncurses pip pkg_resources pydoc pydoc_data readline setuptools sqlite3 tkinter turtle
unicodedata unittest urllib uuid venv webbrowser xml xmlrpc""".split()

# Their compiled parts, by the names that these have in lib-dynload.
OPENWRT_LACKS += ["_" + name for name in OPENWRT_LACKS] + ["_codecs_cn", "_codecs_hk", "_codecs_iso2022", "_codecs_jp",
                                                           "_codecs_kr", "_codecs_tw", "_multibytecodec", "_tkinter"]

# What of these is compiled into the interpreter itself is refused by the first module of the library that
# every start reads, before any flag of the command line counts.
REFUSE = """
import sys


class _NotThere:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in %r:
            raise ModuleNotFoundError("No module named %%r: it is not in python3-light" %% name, name=name)


sys.meta_path.insert(0, _NotThere)
""" % [name for name in sys.builtin_module_names if name in OPENWRT_LACKS]


OWN_FOLDERS = ("lib-dynload", "encodings", "encodings/__pycache__", "__pycache__")


def make_python(top, lacks=(), changes=None):
    """A Python in the folder top with a library of its own; the path of its program.

    lacks: modules that it does not have; changes: {module: text to add at the end of it}. A script cannot get
    round either: what it starts with sys.executable, whatever the flags, is the same Python.
    """
    name = "python%d.%d" % sys.version_info[:2]
    library, own = sysconfig.get_path("stdlib"), os.path.join(top, "lib", name)
    changed = {module.replace(".", "/") + ".py": text for module, text in (changes or {}).items()}
    os.makedirs(os.path.join(top, "bin"))
    shutil.copy(os.path.realpath(sys.executable), os.path.join(top, "bin", name))

    def link(folder):
        os.makedirs(os.path.join(own, folder))
        for entry in os.listdir(os.path.join(library, folder)):
            path = os.path.join(folder, entry)
            source = re.sub(r"__pycache__/([^.]+)\..*", r"\1.py", path)    # what a file of bytecode was made from
            if path in OWN_FOLDERS:
                link(path)
            elif source not in changed and entry.partition(".")[0] not in lacks and not entry.endswith("-packages"):
                os.symlink(os.path.join(library, path), os.path.join(own, path))
    link("")
    for path, text in changed.items():
        with open(os.path.join(library, path), encoding="utf-8") as file:
            write(os.path.join(own, path), file.read() + text)
    return os.path.join(top, "bin", name)


@pytest.fixture(scope="module")
def small_python(tmp_path_factory):
    """The path of a Python that has what OpenWrt's has."""
    return make_python(str(tmp_path_factory.mktemp("small")), OPENWRT_LACKS, {"encodings.__init__": REFUSE})


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


@pytest.mark.parametrize("flags", [[], ["-I", "-S", "-B"]], ids=["plain", "isolated"])
def test_small_python_is_small(small_python, flags):
    """The small Python of these tests lacks what OpenWrt's lacks, the idna codec included, whatever its flags.

    What it starts is as small: the same program, and no other library in its path.
    """
    for text, fault in [("import logging", "ModuleNotFoundError"), ("import ctypes", "ModuleNotFoundError"),
                        ("import concurrent.futures.thread", "ModuleNotFoundError"), ("import http.client", "ModuleNotFoundError"),
                        ("import unicodedata", "ModuleNotFoundError"), ("import decimal", "ModuleNotFoundError"),
                        ("import codecs; codecs.lookup('idna')", "LookupError"),
                        ("import socket; socket.getaddrinfo('localhost', 0)", "LookupError")]:
        done = run(small_python, *flags, "-c", text)
        assert done.returncode == 1 and fault in done.stderr, (text, done.stderr)
    done = run(small_python, *flags, "-c", "import os, sys, ssl, subprocess; print(sys.executable); print(os.__file__); print(sys.path)")
    executable, module, path = done.stdout.splitlines()
    home = os.path.dirname(os.path.dirname(small_python))
    assert executable == small_python and module.startswith(home), done.stdout
    assert all(part == "" or part.startswith(home) for part in ast.literal_eval(path)), path


def test_session_on_openwrts_python(small_python, nut, pki):
    """Both roles relay real sessions, by name, with python3-light and python3-openssl alone.

    The process that relays runs on the small Python itself, whatever it has started itself as.
    """
    with Shim(config_with_names(nut.port, pki), python=small_python) as shims:
        assert os.readlink("/proc/%d/exe" % shims.pid) == os.path.realpath(small_python)
        answer = upsc(shims.port("client"), host="localhost")
        assert answer.returncode == 0 and "ups.status: OL" in answer.stdout, answer.stderr
        with PlainClient(shims.port("client")) as client, TlsClient(shims.port("server"), ca=pki.ca.cert) as stranger:
            client.login()
            assert client.ask("SET TRACKING ON") == b"OK\n"
            assert stranger.ask("SET TRACKING ON") == b"ERR ACCESS-DENIED\n"
        status = run_shim("-c", "status", "--json", "-f", shims.config, python=small_python)
        assert status.returncode == 0 and '"client"' in status.stdout, status.stderr


@pytest.mark.parametrize("args, words", [
    (["-t"], "no fault found"), (["-p", "client"], "TLSv1.3"), (["-V"], "nutshim"), (["-h"], "handshake_timeout")])
def test_commands_on_openwrts_python(small_python, nut, pki, args, words):
    """-t, -p, -V and -h work with python3-light and python3-openssl alone."""
    with Shim(config_with_names(nut.port, pki), python=small_python) as shims:
        done = run_shim(*args, "-f", shims.config, python=small_python)
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr


def test_faults_on_openwrts_python(small_python, pki, tmp_path):
    """Where something fails the small Python gives the administrator's error too, and no traceback."""
    path = write(str(tmp_path / "nutshim.conf"),
                 "[a]\nrole = server\ncertificate = nosuch.pem\nlisten = x y\nnosuch = 1\n")
    done = run_shim("-t", "-f", path, python=small_python)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all("%s:%d: " % (path, line) in done.stderr for line in (3, 4, 5))
    with Shim(config_with_names(free_port(), pki), python=small_python) as shims:
        with PlainClient(shims.port("client")) as client:
            client.send("VER\n")
            assert client.recv_until_close() == b""


def test_quickstart_on_openwrts_python(small_python, nut):
    """packaging/quickstart, mkNUTcert.py in it, works with python3-light and python3-openssl alone."""
    with folder("quick") as path:
        done = run(os.path.join(ROOT, "packaging", "quickstart"), "--once", timeout=50,
                   env=clean_env(PYTHON=small_python, TMPDIR=path, QUICKSTART_PORT=str(nut.port)))
        assert done.returncode == 0 and 'ups.status "OL"' in done.stdout, done.stdout + done.stderr
        assert os.listdir(path) == []


# ---- systems unlike this one, simulated ---------------------------------------------------------

# {system: (module, what makes it like that)}
SYSTEMS = {
    "no getresuid (macOS, NetBSD, illumos)": ("selectors", "import os\ndel os.getresuid, os.getresgid\n"),
    "getgroups() has the group too (FreeBSD up to 14)": ("selectors", "import os\nos.getgroups = lambda: [os.getegid()]\n"),
    "a kernel without IPv6": ("socket", """
_socket_class = socket
class socket(_socket_class):
    def __init__(self, family=-1, type=-1, proto=-1, fileno=None):
        if fileno is None and family == AF_INET6:
            raise OSError(97, "Address family not supported by protocol")   # EAFNOSUPPORT
        super().__init__(family, type, proto, fileno)
"""),
    "no TCP_KEEPIDLE and the like": ("socket", """
for _name in "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT":
    globals().pop(_name, None)
"""),
    "select() alone": ("selectors", "DefaultSelector = SelectSelector\n"),
    "poll() alone": ("selectors", "DefaultSelector = PollSelector\n"),
    "thread stacks of 128 KiB (musl)": ("selectors", "import _thread\n_thread.stack_size(131072)\n"),
}

@pytest.mark.parametrize("system", SYSTEMS)
def test_session_on_other_systems(system, nut, pki, tmp_path):
    """Both roles relay a session, as the user nut where the tests run as root, on systems that differ from this one."""
    module, text = SYSTEMS[system]
    python = make_python(str(tmp_path / "python"), changes={module: text})
    config = dict({"": {"user": "nut"} if IS_ROOT else {}}, **config_with_names(nut.port, pki))
    with Shim(config, python=python, ready=1) as shims:
        shims.wait_log("started")
        if IS_ROOT:
            assert os.stat("/proc/%d" % shims.pid).st_uid == pwd.getpwnam("nut").pw_uid
        answer = upsc(shims.port("client"), "ups.status")
        assert (answer.returncode, answer.stdout) == (0, "OL\n"), answer.stderr + shims.log


# ---- every Python from 3.7 on -------------------------------------------------------------------

def pythons():
    """{version: path} of the Pythons that tests/pythons finds, the running one in the place of its version."""
    found = dict(line.split(" ", 1) for line in run("sh", os.path.join(TESTS, "pythons"), "--list").stdout.splitlines())
    found["%d.%d" % sys.version_info[:2]] = sys.executable
    return dict(sorted(found.items(), key=lambda item: int(item[0][2:])))


PYTHONS = pythons()
EACH = pytest.mark.parametrize("python", PYTHONS.values(), ids=PYTHONS)


@pytest.mark.parametrize("version", sorted({list(PYTHONS)[0], list(PYTHONS)[-1]}))
def test_core_under_old_and_new_python(version):
    """The tests of the protocol core pass under the oldest and the newest Python at hand; tests/pythons takes each."""
    done = run(PYTHONS[version], "-W", "error", os.path.join(TESTS, "test_core.py"), timeout=50)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


@EACH
def test_session_under_every_python(nut, pki, python):
    """Both roles relay a session, verified by name, under every Python that is installed, with -W error and -X dev."""
    config = config_with_names(nut.port, pki)
    checked = run(python, "-W", "error", NUTSHIM, "-V")
    assert checked.returncode == 0 and checked.stderr == ""
    with Shim(config, python=python, script="-W", args=["error", "-X", "dev", NUTSHIM, "-F"]) as shims:
        answer = upsc(shims.port("client"), "ups.status")
        assert (answer.returncode, answer.stdout) == (0, "OL\n"), answer.stderr
        with PlainClient(shims.port("client")) as client, PlainClient(nut.port) as direct:
            assert client.ask_list("LIST VAR ups") == direct.ask_list("LIST VAR ups")
            client.login()
            assert client.ask("SET TRACKING ON") == b"OK\n"
        assert "Warning" not in shims.log, shims.log
