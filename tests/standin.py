#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A small stand-in for upsd, for where no real one is at hand or can be made to do a thing.

It speaks NUT's protocol (RFC 9271) in the formats of upsd 2.8, for one UPS with a handful of
variables. It knows nothing of drivers, and these habits of upsd 2.8.0 it does not copy: there an
unescaped # inside quotes makes a command vanish, and a command in one packet with LOGOUT makes
upsd forget the LOGOUT.

As a program: python3 standin.py [--host ADDRESS] [--port PORT] [--variables N], prints `port N`
and serves until TERM or INT. As a module: with StandIn() as upsd: ... upsd.port ...
"""

import argparse
import signal
import socket
import socketserver
import sys
import threading
import uuid

VERSION = "Network UPS Tools upsd 2.8.0 - stand-in of nutshim's tests"
WORD_MAX = 512      # longer words are cut (upsd's SMALLBUF)
WORDS_MAX = 32      # further words are dropped
REPLY_MAX = 512     # a longer reply is cut there, and its newline lost

# user: (password, upsmon role, may SET, INSTCMD and FSD)
USERS = {
    "admin": ("adminpass", None, True),
    "primary": ("primarypass", "primary", False),
    "secondary": ("secondarypass", "secondary", False),
}
VARIABLES = {
    "battery.charge": "100",
    "battery.charge.low": "20",
    "battery.runtime": "1800",
    "device.mfr": "Stand-In",
    "device.type": "ups",
    "input.voltage": "230.1",
    "ups.mfr": "Stand-In",
    "ups.model": "Model \"one\"",
    "ups.status": "OL",
}
WRITABLE = {"battery.charge.low": 10, "ups.mfr": 32, "ups.status": 32}   # name: longest value
DESCRIPTIONS = {
    "battery.charge": "Battery charge (percent of full)",
    "ups.status": "UPS status",
}
COMMANDS = {"test.battery.start": "Start a battery test", "load.off": "Turn off the load immediately"}


class Parser:
    """Splits a stream into commands, each a list of words, by the rules of NUT's parseconf.c."""

    def __init__(self):
        self._state = "blank"
        self._words = []
        self._word = bytearray()

    def feed(self, data):
        """Return the commands that data completes."""
        commands = []
        for byte in data:
            if self._step(byte, bytes([byte])):
                commands.append(self._words)
                self._words = []
                self._state = "blank"
        return commands

    def _step(self, byte, char):
        """Take one byte; true if it ends the command."""
        state = self._state
        if state in ("escaped", "quoted-escaped"):
            if char != b"\n":                       # backslash and newline join two lines
                self._add(byte)
            self._state = "quoted" if state == "quoted-escaped" else "word"
        elif state == "comment":
            return char == b"\n"
        elif char == b"\\":
            self._state = "quoted-escaped" if state == "quoted" else "escaped"
        elif state == "quoted":
            if char == b'"':
                self._end_word()
            else:
                self._add(byte)
        elif char == b'"' and state == "blank":
            self._state = "quoted"
        elif char == b"\n" or char == b"#" or char.isspace() or char == b"=":
            if state == "word":
                self._end_word()
            if char == b"#":
                self._state = "comment"
            elif char == b"=":                      # always a word of its own
                self._add(byte)
                self._end_word()
            return char == b"\n"
        else:
            self._add(byte)
            self._state = "word"
        return False

    def _add(self, byte):
        if 0x20 <= byte <= 0x7f and len(self._word) < WORD_MAX:
            self._word.append(byte)

    def _end_word(self):
        if len(self._words) < WORDS_MAX:
            self._words.append(self._word.decode("ascii"))
        self._word = bytearray()
        self._state = "blank"


class Refused(Exception):
    """Carries the reason of an ERR reply."""


def quoted(text):
    """A value as upsd sends it: in quotes, with quotes, backslashes and # escaped."""
    for char in '\\"#':
        text = text.replace(char, "\\" + char)
    return '"%s"' % text


class Session:
    """One client's conversation: bytes in, bytes out, no socket."""

    def __init__(self, upsd, address="127.0.0.1"):
        self.upsd = upsd
        self.address = address
        self.closed = False
        self.ups = None                             # the UPS logged in to
        self._parser = Parser()
        self._user = self._password = None
        self._tracking = False

    def feed(self, data):
        """Return the replies to data."""
        replies = []
        for words in self._parser.feed(data):
            if self.closed:
                break
            self.upsd.commands.append(words)
            try:
                with self.upsd.lock:
                    lines = self._answer(words)
            except Refused as refused:
                lines = ["ERR %s" % refused]
            replies += [(line + "\n").encode("ascii")[:REPLY_MAX] for line in lines]
        return b"".join(replies)

    def _answer(self, words):
        command = words[0].upper() if words else ""
        method = getattr(self, "_do_" + command.lower(), None)
        if not command.isalpha() or method is None:
            raise Refused("UNKNOWN-COMMAND")
        return method(words[1:])

    def _arguments(self, words, count):
        if len(words) < count:
            raise Refused("INVALID-ARGUMENT")
        return words

    def _no_arguments(self, words):
        if words:
            raise Refused("INVALID-ARGUMENT")

    def _variables(self, ups):
        if ups.lower() != self.upsd.name.lower():
            raise Refused("UNKNOWN-UPS")
        return self.upsd.variables

    def _variable(self, ups, name):
        for known in self._variables(ups):
            if known.lower() == name.lower():
                return known
        raise Refused("VAR-NOT-SUPPORTED")

    def _known_user(self):
        if self._user is None:
            raise Refused("USERNAME-REQUIRED")
        if self._password is None:
            raise Refused("PASSWORD-REQUIRED")

    def _allowed(self, role=None):
        password, user_role, admin = USERS.get(self._user, (None, None, False))
        if password is None or password != self._password:
            raise Refused("ACCESS-DENIED")
        if not (admin if role is None else user_role in role):
            raise Refused("ACCESS-DENIED")

    def _done(self):
        if not self._tracking:
            return ["OK"]
        track = str(uuid.uuid4()).upper()
        self.upsd.tracked.add(track)
        return ["OK TRACKING " + track]

    # The commands, in the order of RFC 9271.

    def _do_ver(self, words):
        self._no_arguments(words)
        return [VERSION]

    def _do_netver(self, words):
        self._no_arguments(words)
        return ["1.3"]

    _do_protver = _do_netver

    def _do_help(self, words):
        self._no_arguments(words)
        return ["Commands: HELP VER GET LIST SET INSTCMD LOGIN LOGOUT USERNAME PASSWORD STARTTLS"]

    def _do_starttls(self, _words):
        raise Refused("FEATURE-NOT-CONFIGURED")

    def _do_logout(self, words):
        self._no_arguments(words)
        self.closed = True
        return ["OK Goodbye"]

    def _do_username(self, words):
        if len(words) != 1:
            raise Refused("INVALID-ARGUMENT")
        if self._user is not None:
            raise Refused("ALREADY-SET-USERNAME")
        self._user = words[0]
        return ["OK"]

    def _do_password(self, words):
        if len(words) != 1:
            raise Refused("INVALID-ARGUMENT")
        if self._password is not None:
            raise Refused("ALREADY-SET-PASSWORD")
        self._password = words[0]
        return ["OK"]

    def _do_login(self, words):
        self._known_user()
        if len(words) != 1:
            raise Refused("INVALID-ARGUMENT")
        if self.ups:
            raise Refused("ALREADY-LOGGED-IN")
        self._variables(words[0])
        self._allowed(("primary", "secondary"))
        self.ups = words[0]
        self.upsd.logins.append(self)
        return ["OK"]

    def _do_primary(self, words, granted="OK PRIMARY-GRANTED"):
        self._known_user()
        self._variables(self._arguments(words, 1)[0])
        self._allowed(("primary",))
        return [granted]

    def _do_master(self, words):
        return self._do_primary(words, "OK MASTER-GRANTED")

    def _do_fsd(self, words):
        self._known_user()
        variables = self._variables(self._arguments(words, 1)[0])
        if self._user == "admin":
            self._allowed()
        else:
            self._allowed(("primary",))
        if not variables["ups.status"].startswith("FSD"):
            variables["ups.status"] = "FSD " + variables["ups.status"]
        return ["OK FSD-SET"]

    def _do_set(self, words):
        self._known_user()
        what = self._arguments(words, 1)[0].upper()
        if what == "TRACKING" and len(words) == 2 and words[1].upper() in ("ON", "OFF"):
            self._tracking = words[1].upper() == "ON"
            return ["OK"]
        if what != "VAR" or len(words) < 4:
            raise Refused("INVALID-ARGUMENT")
        self._allowed()
        name = self._variable(words[1], words[2])
        if name not in WRITABLE:
            raise Refused("READONLY")
        if len(words[3]) > WRITABLE[name]:
            raise Refused("TOO-LONG")
        self.upsd.variables[name] = words[3]
        return self._done()

    def _do_instcmd(self, words):
        self._known_user()
        self._arguments(words, 2)
        self._variables(words[0])
        self._allowed()
        if words[1].lower() not in COMMANDS:
            raise Refused("CMD-NOT-SUPPORTED")
        return self._done()

    def _do_get(self, words):
        what = self._arguments(words, 1)[0].upper()
        if what == "TRACKING":
            return [self._get_tracking(words[1:])]
        ups = self._arguments(words, 2)[1]
        if what == "NUMLOGINS":
            self._variables(ups)
            return ["NUMLOGINS %s %d" % (ups, len(self.upsd.logins))]
        if what == "UPSDESC":
            self._variables(ups)
            return ["UPSDESC %s %s" % (ups, quoted(self.upsd.description))]
        if what not in ("VAR", "TYPE", "DESC", "CMDDESC"):
            raise Refused("INVALID-ARGUMENT")
        name = self._arguments(words, 3)[2]
        self._variables(ups)
        if what in ("DESC", "CMDDESC"):             # known or not, and the name as it came
            texts = DESCRIPTIONS if what == "DESC" else COMMANDS
            text = texts.get(name.lower(), "Description unavailable")
            return ['%s %s %s "%s"' % (what, ups, name, text)]
        known = self._variable(ups, name)
        if what == "VAR":
            return ["VAR %s %s %s" % (ups, name, quoted(self.upsd.variables[known]))]
        if known in WRITABLE:
            return ["TYPE %s %s RW STRING:%d" % (ups, name, WRITABLE[known])]
        return ["TYPE %s %s NUMBER" % (ups, name)]

    def _get_tracking(self, words):
        if not words:
            return "ON" if self._tracking else "OFF"
        if not self._tracking:
            raise Refused("FEATURE-NOT-CONFIGURED")
        if words[0] not in self.upsd.tracked:
            raise Refused("UNKNOWN")
        return "SUCCESS"

    def _do_list(self, words):
        what = self._arguments(words, 1)[0].upper()
        if what == "UPS":
            head, lines = what, ["UPS %s %s" % (self.upsd.name, quoted(self.upsd.description))]
        elif what in ("VAR", "RW", "CMD", "CLIENT"):
            ups = self._arguments(words, 2)[1]
            variables = self._variables(ups)
            head = "%s %s" % (what, ups)
            if what == "CMD":
                values = sorted(COMMANDS)
            elif what == "CLIENT":
                values = [session.address for session in self.upsd.logins]
            else:
                names = variables if what == "VAR" else WRITABLE
                values = ["%s %s" % (name, quoted(variables[name])) for name in sorted(names)]
            lines = ["%s %s" % (head, value) for value in values]
        elif what in ("ENUM", "RANGE"):
            ups, name = self._arguments(words, 3)[1:3]
            self._variable(ups, name)
            head, lines = "%s %s %s" % (what, ups, name), []
        else:
            raise Refused("INVALID-ARGUMENT")
        return ["BEGIN LIST " + head] + lines + ["END LIST " + head]


class StandIn:
    """The stand-in upsd, a context manager. port is where it listens once started.

    commands holds the words of every command that came, in order, over all clients.
    """

    def __init__(self, name="ups", description="Stand-in UPS", many=0, host="127.0.0.1", port=0):
        self.name = name
        self.description = description
        self.variables = dict(VARIABLES)
        for number in range(many):
            self.variables["outlet.%d.desc" % number] = "v" * 110
        self.commands = []
        self.logins = []
        self.tracked = set()
        self.lock = threading.Lock()                # guards the UPS's data: held while a command is answered
        self.port = port
        self._host = host
        self._sockets = set()
        self._server = self._thread = None

    def converse(self, connection, address="127.0.0.1"):
        """Answer what comes on connection (a socket, TLS or not) until either side ends it."""
        session = Session(self, address)
        self._sockets.add(connection)
        try:
            while not session.closed:
                data = connection.recv(65536)
                if not data:
                    break
                connection.sendall(session.feed(data))
        except OSError:
            pass                                    # the client is gone
        finally:
            self._sockets.discard(connection)
            with self.lock:
                if session in self.logins:
                    self.logins.remove(session)

    def start(self):
        """Listen, and serve in the background. OSError if the port is taken."""
        standin = self

        class Server(socketserver.ThreadingTCPServer):
            """One thread for each client."""
            address_family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            allow_reuse_address = True
            daemon_threads = True

            def finish_request(self, request, client_address):
                standin.converse(request, client_address[0])

        self._server = Server((self._host, self.port), None)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def stop(self):
        """Stop serving and end every conversation."""
        self._server.shutdown()
        self._thread.join()
        for connection in list(self._sockets):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._server.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


def main(argv=None):
    """Run as a program; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=3493, help="port to listen on, 0 = any free one")
    parser.add_argument("--variables", type=int, default=0, help="so many variables more, for big lists")
    options = parser.parse_args(argv)
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)       # before the threads, which inherit it
    upsd = StandIn(many=options.variables, host=options.host, port=options.port)
    try:
        upsd.start()
    except OSError as error:
        print("cannot listen on %s port %d: %s" % (options.host, options.port, error.strerror),
              file=sys.stderr)
        return 1
    print("port %d" % upsd.port, flush=True)
    signal.sigwait(signals)
    upsd.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
