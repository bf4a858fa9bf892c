# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may do what: access classes, identities, allow_from and plaintext, in front of a real upsd.

A relay between shim and upsd records what upsd gets to see.
"""

import contextlib
import json
import re

import pytest

from harness import (ADMIN, Nut, PlainClient, Relay, Shim, TlsClient, client_context, poll, run_shim,
                     write)

DENIED = b"ERR ACCESS-DENIED\n"
NAMES = {"CN=client.example", "DNS:client.example", "IP:127.0.0.1", "URI:urn:nutshim:client",
         "email:ups@client.example"}              # pki.client's
ORDER = ["read", "monitor", "primary", "admin"]
# Every command of the protocol (RFC 9271 and NUT's net-protocol.txt), and the least class that may say it.
COMMANDS = [(line.strip().encode("latin-1"), access) for access, lines in {
    "read": """GET VAR ups battery.charge\nGET TYPE ups battery.charge.low\nGET DESC ups ups.mfr\nGET= VAR
               GET CMDDESC ups load.off\nGET UPSDESC ups\nGET NUMLOGINS ups\nGET TRACKING\nGET TRACKING x
               GET VAR ups nope\nGET\nLIST UPS\nLIST VAR ups\nLIST RW ups\nLIST CMD ups\nLIST VAR nope\nLIST
               LIST ENUM ups ups.status\nLIST RANGE ups ups.status\nLIST CLIENT ups
               VER\nNETVER\nPROTVER\nHELP\nDETACH\nLOGOUT x""",
    "monitor": "USERNAME %s\nPASSWORD %s\nLOGIN ups\nATTACH ups" % ADMIN,
    "primary": "PRIMARY ups\nMASTER ups\nFSD ups",
    "admin": """SET VAR ups ups.mfr Test\nSET TRACKING OFF\nSET\nINSTCMD ups load.off\nINSTCMD ups load.off 5
                STARTTLS2\nGETVAR\nG"ET" VAR\n=\n"GET VAR" ups\nx\n\n# VER\nSET\x80VAR ups ups.mfr Test""",
}.items() for line in lines.split("\n")]
# Ways to write the same command; each gets the verb and what stands behind it.
SPELLINGS = {
    "as it is": lambda verb, rest: verb + rest,
    "lower case": lambda verb, rest: verb.lower() + rest,
    "mixed case": lambda verb, rest: verb.lower().capitalize() + rest,
    "blanks": lambda verb, rest: b" \t\v\f\r" + verb + rest.replace(b" ", b"\t  ", 1) + b" \t\r",
    "quotes": lambda verb, rest: (b'"%s"' % verb if verb.isalpha() else verb) + rest,
    "escapes": lambda verb, rest: b"".join(b"\\%c" % char for char in verb) + rest if verb.isalpha() else verb + rest,
    "bytes that upsd drops":
        lambda verb, rest: (verb[:1] + b"\x01\x80\xff" + verb[1:] if verb.isalpha() else verb) + rest,
    "comment": lambda verb, rest: verb + rest + b" # GET" if verb.isalpha() else verb + rest,
}


def spell(line, spelling):
    """A command line in one of the SPELLINGS, with its newline."""
    verb, blank, rest = line.partition(b" ")
    return SPELLINGS[spelling](verb, blank + rest) + b"\n"


class Stage:                                        # pylint: disable=too-few-public-methods
    """One nutshim with a section for each thing to see, behind it a relay and a upsd."""

    def __init__(self, shim, nut, upsd):
        self.shim, self.nut, self.upsd = shim, nut, upsd
        self.ports = {name: port for name, _, port in shim.listening}

    def tls(self, section, certificate=None, **options):
        """A TLS session."""
        return TlsClient(self.ports[section], certificate=certificate, **options)

    def plain(self, section, **options):
        """A connection."""
        return PlainClient(self.ports[section], **options)

    def status(self, *args):
        """What -c status says."""
        done = run_shim("-c", "status", "-f", self.shim.config, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def unseen(self, log=None):
        """upsd sees nothing of what happens inside; log: the line that tells of it."""
        before, mark = len(self.upsd.up), self.shim.mark()
        yield
        if log:
            self.shim.wait_log(log, start=mark)
        with self.tls("admin") as client:
            assert client.ask("NETVER") == b"1.3\n"
        assert self.upsd.up[before:] == b"NETVER\n"


# section: (permit, the class that pki.client gets, the class of a client without a certificate); None = refused
PERMITS = {
    "cn": ("CN=client.example: monitor", "monitor", None),
    "dns": ("DNS:CLIENT.Example: monitor", "monitor", None),
    "ip": ("IP:127.0.0.1: primary", "primary", None),
    "uri": ("URI:urn:nutshim:client: read", "read", None),
    "email": ("email:UPS@client.example: primary", "primary", None),
    "pin": ("{pin}: admin", "admin", None),
    "anyone": ("*: read", "read", "read"),
    "first counts": ("CN=nobody: admin, DNS:client.example: read, CN=client.example: admin, *: admin", "read", "admin"),
    "anyone first": ("*: monitor, CN=client.example: admin", "monitor", "monitor"),
    "names, then anyone": ("{pin}: primary, *: read", "primary", "read"),
    "no match": ("CN=nobody: admin, IP:127.0.0.2: admin, {other}: admin", None, None),
    "near misses": ("CN=client: admin, CN=*: admin, CN=DNS:client.example: admin, DNS:example: admin, "
                    "DNS:*.example: admin, DNS:sub.client.example: admin, URI:client.example: admin, "
                    "URI:urn:nutshim: admin, email:client.example: admin, IP:::ffff:127.0.0.1: admin, "
                    "IP:127.0.0.10: admin", None, None),
}


@pytest.fixture(scope="module")
def stage(nut_installed, pki):                      # pylint: disable=unused-argument
    """The Stage. Its upsd is in FSD from the start, so that this test or that does not change its answers."""
    with Nut() as nut, Relay(nut.port) as upsd:
        def server(**options):
            return dict(role="server", listen="127.0.0.1:0", upstream="127.0.0.1:%d" % upsd.port,
                        certificate=pki.server.file, **options)
        asks = {"client_certificate": "request", "trust": pki.ca.cert}
        config = {access: server(permit="*: " + access) for access in ORDER}
        for name, (permit, _, _) in PERMITS.items():
            config[name.replace(" ", "-").replace(",", "")] = server(
                permit=permit.format(pin=pki.client.pin, other=pki.server.pin), **asks)
        config.update({
            "open": server(),
            "local": server(plaintext="localhost", permit="CN=client.example: admin, *: read",
                            client_certificate="require", trust=pki.ca.cert),
            "local-names": server(plaintext="localhost", permit="CN=client.example: admin", **asks),
            "from-2": server(allow_from="127.0.0.2"),
            "from-net": server(allow_from="192.0.2.0/24, 127.0.0.0/31, 2001:db8::/32"),
            "from-6": dict(server(allow_from="::1"), listen="[::1]:0"),
            "from-other-6": dict(server(allow_from="2001:db8::/32, ::2, 127.0.0.1"), listen="[::1]:0"),
            "client": {"role": "client", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % upsd.port,
                       "verify": "none", "allow_from": "127.0.0.2"}})
        with PlainClient(nut.port) as client:
            client.login()
            assert client.ask("FSD ups") == b"OK FSD-SET\n"
        with Shim(config) as shim:
            yield Stage(shim, nut, upsd)


# ---- the classes --------------------------------------------------------------------------------

def may(access, needed):
    """True if a class may say what needs another class at least."""
    return ORDER.index(access) >= ORDER.index(needed)


@pytest.fixture(scope="module")
def replies(stage):
    """replies(class): what the real upsd, asked directly, says to each command of that class, b"" for one beyond it."""
    known = {}

    def ask(access):
        if access not in known:
            with PlainClient(stage.nut.port) as client:
                asked = [line.replace(b"\x80", b"").decode("ascii") if may(access, needed) else None
                         for line, needed in COMMANDS]
                known[access] = [b"" if line is None else client.ask_list(line) for line in asked]
            with PlainClient(stage.nut.port) as client:
                poll(lambda: client.ask("GET NUMLOGINS ups") == b"NUMLOGINS ups 0\n")
        return known[access]
    return ask


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("access", ORDER)
def test_every_command_in_every_class(stage, replies, access, spelling):
    """Each command of the protocol, however it is written, gets upsd's reply or ERR ACCESS-DENIED in its turn.

    All of them come in one segment; upsd sees, byte for byte, the permitted ones and nothing else.
    """
    lines = [spell(line, spelling) for line, _ in COMMANDS]
    permitted = [may(access, needed) for _, needed in COMMANDS]
    expected = b"".join(reply if good else DENIED for reply, good in zip(replies(access), permitted))
    start = len(stage.upsd.up)
    with stage.tls(access) as client:
        client.send(b"".join(lines))
        got = client.recv_exactly(len(expected))
        assert got == expected
        assert stage.upsd.up[start:] == b"".join(line for line, good in zip(lines, permitted) if good)
        assert client.ask("NETVER") == b"1.3\n"
    with PlainClient(stage.nut.port) as client:     # the next one must find the same upsd
        poll(lambda: client.ask("GET NUMLOGINS ups") == b"NUMLOGINS ups 0\n")


@pytest.mark.parametrize("access", ["read", "primary"])
def test_commands_byte_by_byte(stage, replies, access):
    """It makes no difference if each byte of the commands comes in a TLS record of its own."""
    commands = [(line, needed) for line, needed in COMMANDS if not line.startswith(b"LIST")]
    answers = dict(zip((line for line, _ in COMMANDS), replies(access)))
    expected = b"".join(answers[line] if may(access, needed) else DENIED for line, needed in commands)
    with stage.tls(access) as client:
        client.send_bytewise(b"".join(line + b"\n" for line, _ in commands))
        assert client.recv_exactly(len(expected)) == expected
    with PlainClient(stage.nut.port) as client:
        poll(lambda: client.ask("GET NUMLOGINS ups") == b"NUMLOGINS ups 0\n")


@pytest.mark.parametrize("access", ORDER)
@pytest.mark.parametrize("goodbye", ["LOGOUT", "logout", "\\LOGOUT \r"])
def test_logout_in_every_class(stage, access, goodbye):
    """LOGOUT is for everybody: OK Goodbye and the end, behind the replies still owed."""
    with stage.tls(access) as client:
        client.send("NETVER\nBOGUS\n")
        assert client.recv_lines(2) == [b"1.3\n", b"ERR UNKNOWN-COMMAND\n" if access == "admin" else DENIED]
        client.send(goodbye + "\n")
        assert client.recv_until_close() == b"OK Goodbye\n"


def test_denied_commands_alone(stage):
    """Thousands of refused commands in a row are all answered, and upsd sees none of them."""
    with stage.unseen(), stage.tls("read") as client:
        client.send("FSD ups\nINSTCMD ups load.off\n" * 2000)
        assert client.recv_exactly(4000 * len(DENIED)) == DENIED * 4000


# ---- identities ---------------------------------------------------------------------------------

def access_of(client):
    """The class that a session has, found out by what it is refused; None for a session that is refused itself."""
    client.send("NETVER\nUSERNAME x\nPRIMARY ups\nBOGUS\n")
    first = client.recv_line()
    if first == DENIED:
        assert client.recv_until_close() == b""
        return None
    assert first == b"1.3\n"
    return ORDER[3 - client.recv_lines(3).count(DENIED)]


@pytest.mark.parametrize("name", PERMITS)
def test_identity(stage, pki, name):
    """CN=, DNS:, IP:, URI:, email:, pin and * name a peer; the first that matches counts, without one it is refused."""
    section = name.replace(" ", "-").replace(",", "")
    for certificate, expected in zip((pki.client, None), PERMITS[name][1:]):
        with stage.unseen(log="no permit line") if expected is None else contextlib.nullcontext():
            with stage.tls(section, certificate) as client:
                assert access_of(client) == expected


def test_identity_by_an_ipv6_address(stage, shim, pki):
    """An IPv6 address matches in whatever form it is written."""
    six = pki.ca.issue("six", "IP:2001:db8::a:1")
    running = shim({"server": {
        "role": "server", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % stage.nut.port,
        "certificate": pki.server.file, "client_certificate": "require", "trust": pki.ca.cert,
        "permit": "IP:2001:DB8:0:0::000A:1: monitor"}})
    with TlsClient(running.port("server"), certificate=six) as client:
        assert access_of(client) == "monitor"


def test_identity_of_a_resumed_session(stage, pki):
    """A client that resumes its TLS session is still who it was, and a ticket of nobody makes nobody of it."""
    for certificate, expected in ((pki.client, "primary"), (None, "read")):
        context = client_context(pki.ca.cert, certificate)
        with stage.tls("names-then-anyone", context=context) as client:
            assert access_of(client) == expected
            ticket = client.sock.session
        with stage.tls("names-then-anyone", context=context, session=ticket) as client:
            assert access_of(client) == expected and client.sock.session_reused


def test_everything_without_permit(stage):
    """Without permit everybody may do everything, as upsd's own users allow."""
    with stage.tls("open") as client:
        assert access_of(client) == "admin"
        client.send("LOGOUT\n")
    with stage.tls("open") as client:
        client.login()
        assert client.ask("SET VAR ups ups.mfr Test") == b"OK\n"


def test_identity_and_class_are_logged(stage, pki):
    """The log tells a session's names and class."""
    with stage.tls("cn", pki.client) as client:
        peer = "127.0.0.1:%d: " % client.sock.getsockname()[1]
        assert client.ask("NETVER") == b"1.3\n"
    stage.shim.wait_log(peer + "closed")
    lines = "\n".join(line for line in stage.shim.lines if peer in line)
    assert all(name in lines for name in NAMES)
    assert "monitor" in lines


def test_identity_and_class_in_the_status(stage, pki):
    """-c status tells for each session its peer's address, names, class, user and UPS."""
    with stage.tls("cn", pki.client) as client, stage.tls("anyone") as stranger:
        assert client.ask("USERNAME monuser") == b"OK\n" and stranger.ask("NETVER") == b"1.3\n"
        named, anonymous = json.loads(stage.status("--json"))["sessions"][-2:]
        table = stage.status().splitlines()
        peers = ["%s:%d" % each.sock.getsockname() for each in (client, stranger)]
    assert (named["shim"], named["class"], named["tls"], named["peer"]) == ("cn", "monitor", "TLSv1.3", peers[0])
    assert "monuser" in named["user"]
    assert NAMES <= set(named["identity"])
    assert (anonymous["class"], anonymous["identity"], anonymous["peer"]) == ("read", [], peers[1])
    row = next(line for line in table if peers[0] in line)
    assert "monitor" in row and "CN=client.example" in row and "monuser" in row
    assert "read" in next(line for line in table if peers[1] in line)


def test_refusals_are_counted(stage):
    """-c status counts sessions that no permit line matches and addresses that allow_from does not know."""
    with stage.tls("cn") as client:
        assert client.recv_until_close() == DENIED
    with stage.plain("from-2") as client:
        assert client.recv_until_close() == b""
    shims = {each["name"]: each["refused"] for each in json.loads(stage.status("--json"))["shims"]}
    assert any("permit" in reason and count for reason, count in shims["cn"].items())
    assert any("allow_from" in reason and count for reason, count in shims["from-2"].items())


def test_class_after_a_reload(nut, shim, pki):
    """A reload gives new sessions the new class; a session that runs keeps the one it has."""
    config = {"server": {"role": "server", "listen": "127.0.0.1:0", "permit": "*: monitor",
                         "upstream": "127.0.0.1:%d" % nut.port, "certificate": pki.server.file}}
    running = shim(config)
    with TlsClient(running.port("server")) as before:
        assert before.ask("NETVER") == b"1.3\n"
        config["server"]["permit"] = "*: read"
        running.reload(config)
        running.wait_log("reloaded")
        assert access_of(before) == "monitor"
        with TlsClient(running.port("server")) as after:
            assert access_of(after) == "read"


# ---- allow_from and plaintext --------------------------------------------------------------------

@pytest.mark.parametrize("section, source, admitted", [
    ("from-2", "127.0.0.2", True), ("from-2", "127.0.0.1", False), ("from-2", "127.0.0.20", False),
    ("from-net", "127.0.0.1", True), ("from-net", "127.0.0.2", False),
    ("from-6", "::1", True), ("from-other-6", "::1", False)])
def test_allow_from(stage, section, source, admitted):
    """Only addresses and networks in allow_from are talked to; others are cut off without a word."""
    options = {"host": "::1" if ":" in source else "127.0.0.1", "source": (source, 0)}
    if admitted:
        with stage.plain(section, **options) as client:
            assert client.ask("STARTTLS") == b"OK STARTTLS\n"
    else:
        with stage.unseen(), stage.plain(section, **options) as client:
            with contextlib.suppress(OSError):
                client.send("STARTTLS\n")
            assert client.recv_until_close() == b""


def test_allow_from_of_a_client_shim(stage):
    """A client shim, too, talks only to whom allow_from names; for others it does not even look for upstream."""
    connections = stage.upsd.connections
    with stage.plain("client") as client:
        assert client.recv_until_close() == b""
    assert stage.upsd.connections == connections
    with stage.plain("client", source=("127.0.0.2", 0)) as client:
        client.send(b"VER\n")
        client.recv_until_close()                   # admitted, and a upsd without TLS is no upstream
    assert stage.upsd.connections == connections + 1


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_plaintext_localhost(stage, pki, source):
    """With `plaintext = localhost` a loopback peer goes on without TLS, as one without certificate; TLS still works."""
    with stage.plain("local", source=(source, 0)) as client:
        assert access_of(client) == "read"
        assert client.ask("STARTTLS") == b"ERR FEATURE-NOT-CONFIGURED\n"
    with stage.plain("local", source=(source, 0)) as client:
        client.send(b"GET VAR ups battery.charge\nFSD ups\nNETVER\n")
        assert client.recv_lines(3) == [b'VAR ups battery.charge "100"\n', DENIED, b"1.3\n"]
    with stage.tls("local", pki.client) as client:
        assert access_of(client) == "admin"


def test_plaintext_localhost_without_a_class(stage):
    """Names in permit are no names of a peer without TLS: without * it is refused."""
    with stage.unseen(log="no permit line"), stage.plain("local-names") as client:
        client.send("NETVER\n")
        assert client.recv_until_close() == DENIED


def test_plaintext_is_refused_by_default(stage):
    """Without the option a loopback peer is told that TLS is wanted, like any other."""
    with stage.unseen(), stage.plain("open") as client:
        assert client.ask("NETVER") == b"ERR TLS-NOT-ENABLED\n"


# ---- the configuration --------------------------------------------------------------------------

def test_configuration_that_means_nothing(pki, tmp_path):
    """An identity, class or address that cannot match is an error FILE:LINE, not a line that is silently ignored."""
    lines = [
        "permit = CN=client.example", "permit = CN=client.example: root", "permit = client.example: read",
        "permit = read", "permit = DNS:: read", "permit = sha256//abc: read", "permit = *: read, , *: admin",
        "permit = IP:upsbox.lan: read", "permit = IP:192.0.2.0/24: read", "permit = IP:192.0.2.256: read",
        "allow_from = upsbox.lan", "allow_from = 192.0.2.1/24", "allow_from = 192.0.2.0/33",
        "allow_from = 192.0.2.256", "allow_from = ::/129",
        "plaintext = yes", "client_certificate = yes", "pin = sha256//abc", "pin = md5//abc"]
    text, wrong = "", {}
    for number, line in enumerate(lines):
        text += "[s%d]\nrole = server\nlisten = 127.0.0.1:0\ncertificate = %s\ntrust = %s\n" % (
            number, pki.server.file, pki.ca.cert)
        if not line.startswith("client_certificate"):
            text += "client_certificate = request\n"
        wrong[text.count("\n") + 1] = line
        text += line + "\n"
    config = write(tmp_path / "nutshim.conf", text)
    done = run_shim("-t", "-f", config)
    assert done.returncode == 1
    silent = [line for number, line in wrong.items()
              if not re.search("%s:%d: .*%s" % (re.escape(str(config)), number, line.split()[0]), done.stderr)]
    assert not silent, "not reported: %s" % silent


def test_names_need_client_certificates(pki, tmp_path):
    """Names in permit without client_certificate are an error: nobody could ever match them."""
    config = write(tmp_path / "nutshim.conf",
                   "[server]\nrole = server\ncertificate = %s\npermit = CN=x: read\n" % pki.server.file)
    done = run_shim("-t", "-f", config)
    assert done.returncode == 1 and "%s:4: " % config in done.stderr and "client_certificate" in done.stderr
