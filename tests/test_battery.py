# SPDX-License-Identifier: GPL-2.0-or-later
"""A real upsmon on battery behind both shims, while everything around it restarts, reloads and storms.

What upsmon 2.8.0 does by itself, straight on upsd (NUT's upsmon.conf, DEADTIME, and seen in the
controls here): a lost connection is COMMBAD and it connects anew; if the last status was OB and no
poll has worked for DEADTIME seconds it takes the UPS for OB LB, and shuts down. So a shim must
neither drop connections of its own accord, nor hide that upsd is gone. From 2.8.1 on upsmon is
stricter: it shuts down at once when a connection is lost on battery, so there upsd restarts while
the line is on.
"""

import contextlib
import os
import threading
import time

import pytest

from harness import (PRIMARY, SECONDARY, Nut, PlainClient, Shim, Upsmon, free_port, nut_version, pair_config, poll, upsc,
                     write)
from lines import Path
from test_endurance import UNLIMITED, Storm

DEADTIME = 15                                       # NUT's default
AFTER_LB = 10                                       # seconds in which OB LB must have its effect


class Ground:
    """A upsd with several UPSes, a server shim in front of it and a client shim in front of that, each a process."""

    def __init__(self, pki, *upses):
        self._pki, self._stack = pki, contextlib.ExitStack()
        self.status = {ups: "OL" for ups in upses}

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.nut = stack.enter_context(Nut({ups: {"ups.status": "OL"} for ups in self.status}))
            config = pair_config(self.nut.port, self._pki, UNLIMITED, UNLIMITED)
            self.server = stack.enter_context(Shim({"server": config["server"]}))
            self.client = stack.enter_context(Shim({"client": config["client"]}))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def restart_upsd(self, kill=False):
        """End upsd one way or the other and start it again, the drivers too: dummy-ups 2.8.0 does not survive its upsd."""
        if kill:
            self.nut.kill()
        else:
            self.nut.stop()
        for ups, status in self.status.items():
            self.nut.drivers[ups].end()
            write(os.path.join(self.nut.folder, ups + ".dev"), "ups.status: %s\nTIMER 300\n" % status)
            self.nut.start_driver(ups)
        self.nut.start()

    def reload(self):
        """Reload both shims."""
        for shim in (self.server, self.client):
            mark = shim.mark()
            shim.reload()
            shim.wait_log("reloaded", 20, mark)

    @property
    def server_port(self):
        """Where the server shim listens: the place for storms."""
        return self.server.port("server")


class Watch:
    """Four upsmons on two UPSes: a primary and a secondary behind the shims on one of them, and,
    as controls, a primary and a secondary straight on upsd on the other."""

    def __init__(self, ground, ups, control, deadtime=DEADTIME):
        self.ground, self._upses, self._deadtime = ground, (ups, control), deadtime
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            def upsmons(port, ups):
                return [stack.enter_context(Upsmon(port, ups=ups, login=login, kind=kind, deadtime=self._deadtime))
                        for login, kind in ((PRIMARY, "primary"), (SECONDARY, "secondary"))]
            self.shimmed = upsmons(self.ground.client.port("client"), self._upses[0])
            self.controls = upsmons(self.ground.nut.port, self._upses[1])
            for ups in self._upses:
                poll(lambda ups=ups: self._logins(ups) == 2, 15, "two upsmons logged in to " + ups)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def _logins(self, ups):
        with PlainClient(self.ground.nut.port) as client:
            return int(client.ask("GET NUMLOGINS " + ups).split()[2])

    @property
    def all(self):
        """The four upsmons."""
        return self.shimmed + self.controls

    def set_status(self, status):
        """Put both UPSes into a status, through upsd, which must be up."""
        for ups in self._upses:
            self.ground.status[ups] = status
            self.ground.nut.set_status(status, ups)

    def _turn(self, status, event):
        before = [upsmon.events.count(event) for upsmon in self.all]
        self.set_status(status)
        poll(lambda: all(upsmon.events.count(event) > count for upsmon, count in zip(self.all, before)), 15,
             lambda: "%s at all upsmons: %s" % (event, [upsmon.events for upsmon in self.all]))

    def on_battery(self):
        """Both UPSes on battery, and every upsmon knows."""
        self._turn("OB", "ONBATT")

    def on_line(self):
        """The same for the line."""
        self._turn("OL", "ONLINE")

    def check(self):
        """Nobody has begun to shut down."""
        for upsmon in self.all:
            assert upsmon.alive and not upsmon.shut_down, upsmon.log
            assert not {"FSD", "SHUTDOWN", "LOWBATT"} & set(upsmon.events), upsmon.events

    @staticmethod
    def losses(upsmons):
        """How often each of these upsmons has lost its connection."""
        return [upsmon.events.count("COMMBAD") for upsmon in upsmons]

    def settle(self, seconds=3):
        """Let every upsmon poll some times; all have their connection then."""
        poll(lambda: all(upsmon.events.count("COMMOK") >= upsmon.events.count("COMMBAD") for upsmon in self.all), 15,
             lambda: "connections of all upsmons: %s" % [upsmon.events for upsmon in self.all])
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.check()
            time.sleep(0.2)

    def low_battery(self, meanwhile):
        """OB LB, then meanwhile(): every upsmon shuts down in time."""
        self.set_status("OB LB")
        since = time.monotonic()
        meanwhile()
        for upsmon in self.all:
            upsmon.wait_shutdown(max(0.1, AFTER_LB - (time.monotonic() - since)))
            assert "LOWBATT" in upsmon.events or "FSD" in upsmon.events
        for ups in self._upses:                     # its primary has told upsd, for secondaries elsewhere
            assert "FSD" in self.ground.nut.get("ups.status", ups).split()


def reloads_and_storms(watch, seconds, say=lambda text: None):
    """On battery, nothing that happens to the shims costs an upsmon its connection."""
    before = watch.losses(watch.all)
    end, number = time.monotonic() + seconds, 0
    with Storm(watch.ground.server_port, threads=3):
        while time.monotonic() < end:
            watch.ground.reload()
            watch.check()
            number += 1
            time.sleep(0.2)
    watch.settle(1.5)
    assert watch.losses(watch.all) == before, "a reload or a storm has cost a connection"
    say("%d reloads of each shim under storm" % number)


def upsd_restarts(watch, times, say=lambda text: None):
    """On battery (see above), upsd restarts cost each connection once at most, as without shims, and nothing else
    happens."""
    strict = nut_version() > (2, 8, 0)
    if strict:
        watch.on_line()
    before = watch.losses(watch.all)
    with Storm(watch.ground.server_port, threads=1):
        for number in range(times):
            watch.ground.restart_upsd(number % 2 == 1)
            if number % 3 == 0:
                watch.ground.reload()
            watch.settle(0.5)
            say("upsd restart %d: lost %s behind the shims, %s without" % (
                number + 1, watch.losses(watch.shimmed), watch.losses(watch.controls)))
    lost = [now - then for now, then in zip(watch.losses(watch.all), before)]
    assert max(lost) <= times, "more connections lost than upsd was restarted: %s" % lost
    if strict:
        watch.on_battery()


@pytest.fixture(scope="module")
def ground(nut_installed, pki):                     # pylint: disable=unused-argument
    """One Ground for the tests here; each has UPSes of its own."""
    with Ground(pki, "ups", "control", "ups-2", "control-2") as made:
        yield made


def test_upsmon_shuts_down_at_low_battery_and_never_before(ground):
    """On battery through storms, reloads and upsd restarts no upsmon shuts down; at OB LB each does, within 10 s."""
    with Watch(ground, "ups", "control") as watch:
        watch.on_battery()
        reloads_and_storms(watch, 2)
        upsd_restarts(watch, 2)

        def meanwhile():
            with Storm(ground.server_port, threads=2):
                ground.reload()
        watch.low_battery(meanwhile)


def test_a_upsd_that_stays_away_on_battery_is_noticed_through_the_shims(ground):
    """Gone for longer than DEADTIME while on battery, upsd leaves upsmon behind the shims as it does one without: shut down."""
    with Watch(ground, "ups-2", "control-2", deadtime=2) as watch:
        watch.on_battery()
        ground.nut.stop()
        for upsmon in watch.all:
            upsmon.wait_event("COMMBAD", 4)         # by its next poll, not by a time-out of 5 s
        for upsmon in watch.all:
            upsmon.wait_shutdown(2 + AFTER_LB)


# ---- lines that fail ----------------------------------------------------------------------------

class Posts:
    """Secondary upsmons on one UPS on battery, each behind a line of its own (lines.Path) that can fail; a context
    manager.

    paths: {name: Path}. "clear" is the control, an upsmon straight on upsd behind such a line. Behind a client shim
    each and one server shim: "alone"; "1 other" and "10 others", where so many local clients have asked before; "second"
    has a second upstream, whose line does not fail. "upsc" is a client shim that upsc asks each second, and "upsc clear"
    its control.
    """

    OTHERS = {"alone": 0, "1 other": 1, "10 others": 10, "second": 1}

    def __init__(self, pki):
        self._pki = pki
        self.paths, self.upsmons, self._ports = {}, {}, {}
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.nut = stack.enter_context(Nut({"ups": {"ups.status": "OL"}}))
            server = free_port()
            spare = stack.enter_context(Path(server))
            config = pair_config(self.nut.port, self._pki, dict(UNLIMITED, listen="127.0.0.1:%d" % server))
            clients = {"server": config["server"]}
            for name in list(self.OTHERS) + ["upsc"]:
                self.paths[name] = stack.enter_context(Path(server))
                self._ports[name] = free_port()
                upstream = ["127.0.0.1:%d" % path.port for path in [self.paths[name]] + [spare] * (name == "second")]
                clients[name.replace(" ", "-")] = dict(config["client"], upstream=upstream,
                                                       listen="127.0.0.1:%d" % self._ports[name])
            for name in ("clear", "upsc clear"):
                self.paths[name] = stack.enter_context(Path(self.nut.port))
                self._ports[name] = self.paths[name].port
            self.shim = stack.enter_context(Shim(clients))
            for name in ["clear"] + list(self.OTHERS):
                self.upsmons[name] = stack.enter_context(Upsmon(
                    self._ports[name], host="127.0.0.1", login=SECONDARY, kind="secondary", deadtime=DEADTIME))
            poll(lambda: self.nut_logins() == len(self.upsmons), 15, "all upsmons logged in")
            self.nut.set_status("OB")
            for upsmon in self.upsmons.values():
                upsmon.wait_event("ONBATT", 15)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def nut_logins(self):
        """How many are logged in."""
        with PlainClient(self.nut.port) as client:
            return int(client.ask("GET NUMLOGINS ups").split()[2])

    def others(self):
        """Other local clients, as many as each post has: they ask and leave."""
        for name, count in self.OTHERS.items():
            with contextlib.ExitStack() as stack:
                for client in [stack.enter_context(PlainClient(self._ports[name])) for _ in range(count)]:
                    assert client.ask("GET VAR ups ups.status") == b'VAR ups ups.status "OB"\n'

    def ask_with_upsc(self, name):
        """Ask with upsc each second until stopped; a list of (seconds it took, did it work), and a function to stop."""
        asked, over = [], threading.Event()

        def run():
            while not over.is_set():
                since = time.monotonic()
                done = upsc(self._ports[name], "ups.status", timeout=60)
                asked.append((time.monotonic() - since, done.returncode == 0 and done.stdout == "OB\n"))
                over.wait(max(0.0, 1 - (time.monotonic() - since)))
        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def stop():
            over.set()
            thread.join(60)
        return asked, stop

    def check(self):
        """No upsmon has begun to shut down."""
        for name, upsmon in self.upsmons.items():
            assert upsmon.alive and not upsmon.shut_down and not {"FSD", "SHUTDOWN", "LOWBATT"} & set(upsmon.events), (
                name, upsmon.events, upsmon.log)

    def recoveries(self, event, seconds=30):
        """Let event() happen; {name: seconds until that upsmon had lost its connection and had it again}."""
        before = {name: upsmon.events.count("COMMOK") for name, upsmon in self.upsmons.items()}
        event()
        since, took = time.monotonic(), {}
        while len(took) < len(self.upsmons):
            self.check()
            for name, upsmon in self.upsmons.items():
                if name not in took and upsmon.events.count("COMMOK") > before[name]:
                    took[name] = time.monotonic() - since
            assert time.monotonic() - since < seconds, "not all have recovered in %s s: %s" % (seconds, took)
            time.sleep(0.02)
        return took


def test_connections_that_die_without_a_word_on_battery(pki, nut_installed):      # pylint: disable=unused-argument
    """On battery every line forgets its connections, as a NAT without its table does, and the first of two upstreams
    loses its power: no upsmon shuts down, and behind the shims each has its connection again when it has in the clear;
    of the upsc that ask each second at most one is slow. A cut of 4 s costs no upsmon its connection."""
    if nut_version() > (2, 8, 0):
        pytest.skip("this upsmon shuts down when it loses its connection on battery, in the clear too")
    with Posts(pki) as posts:
        asked, stop = posts.ask_with_upsc("upsc")
        poll(lambda: len(asked) >= 2, 10, "two answers for upsc")
        posts.others()

        def forget():
            for name, path in posts.paths.items():
                if name == "second":
                    path.off()
                else:
                    path.forget()
        took = posts.recoveries(forget)
        stop()
        # upsmon looks once a second, and one round of it may be missed.
        assert max(took.values()) < took["clear"] + 3, took
        bad = [each for each in asked if not each[1] or each[0] > 0.9]
        assert len(bad) <= 1 and len(asked) > 5, asked
        assert all(seconds < 5 and works for seconds, works in asked), asked

        lost = {name: upsmon.events.count("COMMBAD") for name, upsmon in posts.upsmons.items()}
        for path in posts.paths.values():
            if path is not posts.paths["second"]:
                path.hold()
        time.sleep(4)
        for path in posts.paths.values():
            if path is not posts.paths["second"]:
                path.release()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            posts.check()
            time.sleep(0.1)
        assert {name: upsmon.events.count("COMMBAD") for name, upsmon in posts.upsmons.items()} == lost
