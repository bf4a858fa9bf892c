# SPDX-License-Identifier: GPL-2.0-or-later
"""The ground that the other tests stand on: real NUT, certificates, clients and false servers."""

import os
import ssl
import stat
import sys
import time

import pytest

import standin
from certs import openssl
from conftest import MARK, leftovers
from harness import (VARIABLES, FalseServer, Nut, PlainClient, Process, Relay, TlsClient, Upsmon, late, many_variables,
                     poll, run, says, tls, upsc, upscmd, upsrw)
from keyflood import ClientFlood, tls_flood


def test_real_nut_answers_its_own_clients(own_nut):
    """upsc, upsrw and upscmd of NUT work on the upsd that Nut starts."""
    listed = upsc(own_nut.port)
    for name, value in VARIABLES.items():
        assert "%s: %s\n" % (name, value) in listed.stdout
    assert "battery.charge.low" in upsrw(own_nut.port).stdout
    assert "OK" in upscmd(own_nut.port, "load.off").stderr.splitlines()
    assert upsrw(own_nut.port, "-s", "ups.mfr=x", login=("admin", "wrong")).returncode != 0
    own_nut.set_status("OB")
    assert upsc(own_nut.port, "ups.status").stdout == "OB\n"


def test_upsd_can_be_killed_and_started_again(own_nut):
    """A upsd that is killed leaves its port to the next one, which has the data again."""
    own_nut.kill()
    with pytest.raises(ConnectionRefusedError):
        PlainClient(own_nut.port)
    own_nut.start()
    assert own_nut.get("ups.status") == "OL"


def test_real_upsd_gives_a_list_of_a_megabyte(nut_installed):
    """One LIST VAR of more than 1 MB comes from a real upsd."""
    with Nut({"big": many_variables(8000)}) as nut, PlainClient(nut.port) as client:
        assert len(client.ask_list("LIST VAR big", 20)) > 1 << 20


def test_upsmon_shuts_down_only_on_low_battery(own_nut):
    """The control of the shutdown story: upsmon, straight on upsd, runs SHUTDOWNCMD at OB LB and not before."""
    with Upsmon(own_nut.port) as upsmon:
        with PlainClient(own_nut.port) as client:
            own_nut.set_status("OB")
            upsmon.wait_event("ONBATT")
            assert client.ask("GET NUMLOGINS ups") == b"NUMLOGINS ups 1\n"
            assert not upsmon.shut_down
            own_nut.set_status("OB LB")
            upsmon.wait_shutdown()
            assert client.ask("GET VAR ups ups.status").startswith(b'VAR ups ups.status "FSD ')
        for event in ("LOWBATT", "SHUTDOWN"):
            upsmon.wait_event(event)


def test_nut_speaks_tls_of_its_own(nut_installed, pki, need):
    """upsd and upsmon of NUT meet in TLS, verified, with the databases that the harness makes."""
    need("certutil", "pk12util")
    with Nut(nss=pki.nss_database("upsd", pki.server)) as nut:
        with TlsClient(nut.port, ca=pki.ca.cert) as client:
            assert client.ask("GET VAR ups ups.status") == b'VAR ups ups.status "OL"\n'
        nut.set_status("OL")
        with Upsmon(nut.port, nss=pki.nss_database("upsmon")) as upsmon, PlainClient(nut.port) as client:
            nut.set_status("OB")
            upsmon.wait_event("ONBATT")
            assert client.ask("GET NUMLOGINS ups") == b"NUMLOGINS ups 1\n"
        with Upsmon(nut.port, nss=pki.nss_database("strange", ca=pki.other_ca)) as upsmon:
            upsmon.wait_event("COMMBAD")
            upsmon.wait_log("(?i)certificate.*(fail|not trusted|unknown|invalid)")


def test_certificates_fail_each_for_its_own_reason(pki):
    """Each certificate verifies, or fails with the one fault that its name says."""
    def verify(cert, *options):
        done = run("openssl", "verify", "-x509_strict", "-CAfile", pki.ca.cert, *options, cert.cert)
        return done.stdout + done.stderr
    local = ("-verify_hostname", "localhost")
    for good in (pki.server, pki.rsa4096):
        assert verify(good, *local).endswith(": OK\n")
        assert verify(good, "-verify_ip", "::1").endswith(": OK\n")
    assert verify(pki.chained, "-untrusted", pki.sub_ca.cert, *local).endswith(": OK\n")
    assert verify(pki.client, "-purpose", "sslclient").endswith(": OK\n")
    assert "hostname mismatch" in verify(pki.wrong_name, *local).lower()
    assert "certificate has expired" in verify(pki.expired)
    assert "not yet valid" in verify(pki.not_yet)
    assert "unable to get local issuer" in verify(pki.unknown_ca)
    assert "self-signed" in verify(pki.self_signed).replace("self signed", "self-signed")
    revoked = ("-CRLfile", pki.crl, "-crl_check")
    assert "certificate revoked" in verify(pki.revoked, *revoked)
    assert verify(pki.server, *revoked).endswith(": OK\n")
    assert stat.S_IMODE(os.stat(pki.server.file).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(pki.server.key).st_mode) == 0o600
    assert "4096 bit" in openssl("x509", "-in", pki.rsa4096.cert, "-noout", "-text")


def test_wire_helpers_do_what_they_say(pki):
    """TlsClient, FalseServer and Relay: TLS of the version asked for, every byte kept, refusals seen."""
    with FalseServer(tls(pki.server)) as server, Relay(server.port, piece=7) as relay:
        with TlsClient(relay.port, ca=pki.ca.cert) as client:
            assert client.sock.version() == "TLSv1.3"
            assert client.ask("GET VAR ups ups.status") == b'VAR ups ups.status "OL"\n'
            assert client.silent_for(0.05)
            assert client.ask("LOGOUT") == b"OK Goodbye\n"
            assert client.recv_until_close() == b""
            assert client.reads == [24, 11]
        assert relay.up.startswith(b"STARTTLS\n\x16\x03") and relay.down.startswith(b"OK STARTTLS\n\x16\x03")
        assert b"ups.status" not in relay.up + relay.down
        with pytest.raises(ssl.SSLCertVerificationError):
            TlsClient(server.port, ca=pki.other_ca.cert)
    with FalseServer(tls(pki.server, maximum=ssl.TLSVersion.TLSv1_2)) as server:
        with TlsClient(server.port) as client:
            assert client.sock.version() == "TLSv1.2"
    with FalseServer(says(b"ERR FEATURE-NOT-CONFIGURED\n")) as server:
        with pytest.raises(AssertionError, match="FEATURE-NOT-CONFIGURED"):
            TlsClient(server.port)


def test_key_updates_are_sound_from_either_end(pki):
    """keyflood's records are KeyUpdates that the other side's TLS takes, asked for an answer or not."""
    with FalseServer(tls(pki.server)) as server, ClientFlood(server.port) as client:
        assert client.ask("NETVER") == b"1.3\n"
        for answered in (False, True):
            records = client.engine.key_updates(200, answered)
            assert len(records) == 200 * 27         # header 5, message 5, type 1, tag 16
            client.send(records)
            assert client.ask("NETVER") == b"1.3\n"
    with FalseServer(tls_flood(pki.server, 2000)) as server, Relay(server.port) as relay:
        with TlsClient(relay.port) as client:
            assert client.ask("NETVER") == b"1.3\n"
            poll(lambda: len(relay.down) > 2000 * 27, 10, "the records")
            assert client.silent_for(0.3)           # and no fault in them


def test_a_slow_reader_loses_nothing():
    """late() hands every line on, in order, each some time after the one before, and a long queue in bounded time."""
    since = time.monotonic()
    assert list(late(["%d" % number for number in range(500)], 0.02)) == ["%d" % number for number in range(500)]
    assert 0.15 < time.monotonic() - since < 10



CONVERSATION = r"""
NETVER
PROTVER
HELP
HELP me

# a comment
netver#x y
"NETVER"
NE\TVER
NET\
VER
NETVER=1
=
V"ER"
"open
quote" NETVER
FOO
LOGOUT now
GET
GET VAR
GET VAR ups
GET FOO ups
GET VAR bad ups.status
GET VAR ups nope
get var UPS UPS.Status
GET VAR ups "ups.status"
GET VAR=ups ups.mfr
GET VAR ups ups.model
GET TYPE ups ups.mfr
GET TYPE ups nope
GET DESC ups ups.status
GET DESC ups "a b"
GET CMDDESC ups load.off
GET CMDDESC ups {long}
GET NUMLOGINS ups
GET UPSDESC ups
GET TRACKING
GET TRACKING x
LIST
LIST UPS
LIST FOO ups
LIST VAR bad
LIST VAR
LIST CLIENT ups
LIST ENUM ups ups.status
LIST RANGE ups ups.status
LIST ENUM ups nope
SET VAR ups ups.mfr x
INSTCMD ups load.off
LOGIN ups
PRIMARY ups
FSD ups
STARTTLS
ATTACH ups
USERNAME
USERNAME admin
USERNAME admin
SET VAR ups ups.mfr x
PASSWORD adminpass
PASSWORD adminpass
LOGIN ups
PRIMARY ups
SET
SET FOO
SET VAR ups
SET VAR ups nope x
SET VAR ups ups.mfr {long}
INSTCMD ups
INSTCMD ups nope
INSTCMD ups load.off
SET TRACKING maybe
SET TRACKING ON
GET TRACKING
GET TRACKING x
SET TRACKING OFF
LOGOUT
"""


def test_standin_answers_as_real_upsd_does(nut):
    """The stand-in gives byte for byte the replies of a real upsd, but for its version and drivers' data."""
    conversation = CONVERSATION.lstrip().format(long="x" * 600).encode("ascii")
    odd_bytes = b"\0\n\xff\xfe\nNET\xc3\xa9VER\r\nGET\tVAR\x0bups ups.status\n"
    odd_bytes += b"A" * 600 + b"\nNETVER" + b" a" * 40 + b"\n"
    replies = []
    with standin.StandIn(description="Test UPS") as upsd:
        upsd.variables.update(VARIABLES)
        for port in (nut.port, upsd.port):
            with PlainClient(port) as client:
                client.send(odd_bytes + conversation)
                said = client.recv_until_close().replace(b" PROTVER ", b" ")    # later ones name it in their HELP
                replies.append(said.split(b"\n"))
    assert replies[1] == replies[0]


def test_standin_runs_as_a_program():
    """standin.py --port 0 prints its port, serves there and ends with 0 on TERM."""
    program = Process([sys.executable, standin.__file__, "--port", "0"])
    try:
        port = int(program.wait_log(r"^port (\d+)$").group(1))
        with PlainClient(port) as client:
            assert client.ask("VER").endswith(b"stand-in of nutshim's tests\n")
            program.signal(15)
            assert program.wait() == 0
    finally:
        program.end()


def test_a_process_left_behind_is_noticed():
    """The session's last check sees a process that a test started, until it is gone."""
    sleeper = Process(["sleep", "60"])
    assert sleeper.pid in leftovers(os.environ[MARK])
    sleeper.end()
    assert sleeper.pid not in leftovers(os.environ[MARK])
