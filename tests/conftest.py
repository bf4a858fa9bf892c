# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of all test files, and the rules of a test session: every test has a time limit, no
process outlives the session, and under CI=true a missing program is a failure, not a skip."""

import contextlib
import os
import pwd
import shutil
import signal
import sys
import tempfile
import time
import uuid

import pytest

from certs import Pki
from daemons import Background, becoming
from harness import NUTSHIM, Nut, Shim, missing_nut, pair_config, run

TEST_SECONDS = 60                                   # of one test, unless marked otherwise
MARK = "NUTSHIM_TESTS"                              # in the environment of all that the tests start


def pytest_configure(config):
    """Declare what test files may use, and mark what they start."""
    os.environ[MARK] = uuid.uuid4().hex
    # A shell has what it starts in the background ignore Control-C, and with it all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "seconds(n): this test's own time limit")
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnhandledThreadExceptionWarning")
    config.addinivalue_line("filterwarnings", "ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")     # tested as such


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """End a test that hangs, with a traceback of where it stood."""
    marker = item.get_closest_marker("seconds")
    seconds = marker.args[0] if marker else TEST_SECONDS

    def over(*_):
        raise TimeoutError("the test took longer than %d s" % seconds)
    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Show what the nutshims of a test that fails have logged: those that run, or began with it."""
    report = (yield).get_result()
    for each in Shim.started if report.failed else ():
        if each.alive or each.began >= call.start - 1:
            report.sections.append(("log of nutshim[%d], its end" % each.pid, "\n".join(each.lines[-40:])))


def missing(what):
    """Skip for want of a program; under CI=true that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail("not installed: " + what)
    pytest.skip("not installed: " + what)


@pytest.fixture
def need():
    """need("stunnel") skips the test if there is no such program, or fails it under CI=true."""
    def check(*programs):
        for program in programs:
            if not shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
                missing(program)
    return check


def leftovers(mark):
    """The processes that the session started and that still run: {pid: command line}."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open("/proc/%s/environ" % pid, "rb") as environ, open("/proc/%s/cmdline" % pid, "rb") as command:
                if ("%s=%s" % (MARK, mark)).encode() in environ.read().split(b"\0"):
                    found[int(pid)] = command.read().replace(b"\0", b" ").decode("utf-8", "replace")
    return found


@pytest.hookimpl(hookwrapper=True)
def pytest_sessionfinish(session):
    """Nothing that the tests start outlives them, not even in the background: else the run fails."""
    yield                                           # the last fixtures end in here
    mark = os.environ.pop(MARK)
    deadline = time.monotonic() + 10                # for what is ending anyway
    while leftovers(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    found = leftovers(mark)
    if found:
        print("\nERROR: left running by the tests, killed now: %s" % found)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    while leftovers(mark):                          # one may start another in the meantime
        for pid in leftovers(mark):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def pki():
    """The session's certificates, see certs.Pki."""
    path = tempfile.mkdtemp(prefix="nutshim-pki-")
    yield Pki(path)
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def nut_installed():
    """Asks for real NUT."""
    if missing_nut():
        missing("%s of NUT (Debian: nut-server and nut-client)" % ", ".join(missing_nut()))


@pytest.fixture(scope="session")
def nut(nut_installed):                             # pylint: disable=unused-argument
    """A real upsd that the whole session shares: for tests that only read."""
    with Nut() as upsd:
        yield upsd


@pytest.fixture
def own_nut(nut_installed):                         # pylint: disable=unused-argument
    """A real upsd for one test, which may change, stop or kill it."""
    with Nut() as upsd:
        yield upsd


@pytest.fixture
def shim():
    """shim(config, …) starts a Shim; at the end each must stop in time, with 0 and no traceback."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(Shim(*args, **options))


class Pair:
    """A server shim and a client shim in one process: clients talk to client_port in the clear."""

    def __init__(self, shim, nut):
        self.shim = shim
        self.nut = nut
        self.server_port = shim.port("server")
        self.client_port = shim.port("client")


@pytest.fixture
def pair_of(shim, pki):
    """pair_of(nut, server={…}, client={…}) starts a Pair in front of a Nut; see pair_config."""
    def start(nut, server=None, client=None, **options):
        return Pair(shim(pair_config(nut.port, pki, server, client), **options), nut)
    return start


@pytest.fixture
def pair(pair_of, nut):
    """A Pair in front of the shared upsd: for tests that only read."""
    return pair_of(nut)


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
