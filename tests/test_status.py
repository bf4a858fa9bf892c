# SPDX-License-Identifier: GPL-2.0-or-later
"""What -c status tells programs and people, and who may ask."""

import os
import re
import stat

import pytest

from daemons import as_root, becoming, server_section, turned_away, works
from harness import NUTSHIM, PRIMARY, PlainClient, TlsClient, command, pair_config, poll, run, shim_status, status
from standin import StandIn


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
    busy.wait_log(r"#%d %s: opened" % (tls["number"], busy.peers["server"]))
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
    with TlsClient(busy.port("server"), certificate=pki.client) as client:
        assert client.ask("NETVER") == b"1.3\n"
        assert command(busy, "reload").returncode == 0
        poll(lambda: shim_status(busy, "server")["sessions"] == 2, 5, "the end of the shared session at the reload")
    poll(lambda: shim_status(busy, "server")["sessions"] == 1, 5, "the end of a session from before the reload")
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
        at = re.search(r"\b%s\b" % word, heading).start()
        assert line[at:].startswith(value + " "), done.stdout
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
    counters = re.findall("# TYPE (\\S+) counter", done.stdout)
    assert counters and all(name.endswith("_total") for name in counters)
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
