# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends of the wire for the tests: raw clients (PlainClient, TlsClient), servers that
misbehave (FalseServer and its behaviours) and a relay that records (Relay).

harness.py hands these names on. Everything here is a context manager and ends what it began.
"""

import contextlib
import socket
import ssl
import struct
import threading
import time

import standin

# Users of every upsd in the tests, real or not: name and password.
ADMIN = ("admin", "adminpass")
PRIMARY = ("primary", "primarypass")
SECONDARY = ("secondary", "secondarypass")


def listen(host="127.0.0.1"):
    """A listening socket on a free port."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen(128)
    return listener


def reset(sock):
    """Close a connection with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# ---- clients ------------------------------------------------------------------------------------

class PlainClient:
    """A raw client: every wait has a deadline. Replies are bytes, with their newlines."""

    def __init__(self, port, host="127.0.0.1", seconds=5, source=None):
        self.sock = socket.create_connection((host, port), seconds, source)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reads = []                             # the size of each read: under TLS, of each record
        self._buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the connection."""
        self.sock.close()

    def reset(self):
        """Close with RST."""
        reset(self.sock)

    def send(self, data):
        """Send bytes, or a text as ASCII."""
        self.sock.sendall(data.encode("ascii") if isinstance(data, str) else data)

    def send_bytewise(self, data):
        """Send each byte in a write of its own."""
        for byte in data:
            self.send(bytes([byte]))

    def _read(self, deadline):
        """Read once into the buffer; False at the end of the connection."""
        self.sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self.sock.recv(65536)
        except socket.timeout:
            raise AssertionError("no answer in time; so far %r" % self._buffer[-300:]) from None
        except (ConnectionResetError, BrokenPipeError):     # that: OpenSSL 3.5, at an end after we shut down writing
            data = b""
        except ssl.SSLError as error:               # Python 3.7 with OpenSSL 3: an end without close_notify
            if "eof" not in str(error).lower():
                raise
            data = b""
        if data:
            self.reads.append(len(data))
            self._buffer += data
        return bool(data)

    def recv_until(self, end, seconds=5):
        """Everything up to and with the bytes end."""
        deadline = time.monotonic() + seconds
        seen = 0
        while end not in self._buffer[seen:]:
            seen = max(0, len(self._buffer) - len(end))
            if not self._read(deadline):
                raise AssertionError("closed before %r; so far %r" % (end, self._buffer[-300:]))
        size = self._buffer.index(end) + len(end)
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def recv_line(self, seconds=5):
        """One line."""
        return self.recv_until(b"\n", seconds)

    def recv_lines(self, count, seconds=5):
        """So many lines."""
        return [self.recv_line(seconds) for _ in range(count)]

    def recv_exactly(self, size, seconds=5):
        """So many bytes."""
        deadline = time.monotonic() + seconds
        while len(self._buffer) < size:
            if not self._read(deadline):
                raise AssertionError("closed after %d of %d bytes" % (len(self._buffer), size))
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def recv_until_close(self, seconds=5):
        """Everything until the other side ends the connection, which it must do in time."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        data, self._buffer = self._buffer, b""
        return data

    def ask(self, command, seconds=5):
        """Send a command line and return its one-line reply."""
        self.send(command + "\n")
        return self.recv_line(seconds)

    def ask_list(self, command, seconds=5):
        """Send LIST … and return the whole reply, or the ERR line."""
        first = self.ask(command, seconds)
        if not first.startswith(b"BEGIN "):
            return first
        return first + self.recv_until(b"END" + first[len(b"BEGIN"):], seconds)

    def login(self, login=ADMIN):
        """Say USERNAME and PASSWORD."""
        for command in ("USERNAME " + login[0], "PASSWORD " + login[1]):
            assert self.ask(command) == b"OK\n"

    def silent_for(self, seconds):
        """True if for so many seconds neither a byte nor the end of the connection comes."""
        self.sock.settimeout(seconds)
        try:
            self._buffer += self.sock.recv(65536)
        except socket.timeout:
            return not self._buffer
        except ConnectionResetError:
            pass
        return False


def client_context(ca=None, certificate=None, minimum=None, maximum=None):
    """A TLS context for a client; without a CA file it verifies nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca:
        context.load_verify_locations(ca)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(certificate.file)
    return limit(context, minimum, maximum)


def limit(context, minimum=None, maximum=None):
    """Set the TLS versions of a context, old ones included where OpenSSL still has them."""
    if maximum and maximum < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("ALL:@SECLEVEL=0")
    if minimum or maximum:
        context.minimum_version = minimum or min(ssl.TLSVersion.TLSv1_2, maximum)
        context.maximum_version = maximum or ssl.TLSVersion.MAXIMUM_SUPPORTED
    return context


class TlsClient(PlainClient):
    """A raw client after STARTTLS by hand; options as for client_context.

    A refused STARTTLS is an AssertionError, a failed handshake what ssl raises.
    """

    def __init__(self, port, host="127.0.0.1", seconds=5, server_name="localhost", context=None, session=None,
                 starttls="STARTTLS\n", **options):
        super().__init__(port, host, seconds)
        try:
            self.send(starttls)
            reply = self.recv_line(seconds)
            assert reply == b"OK STARTTLS\n", "STARTTLS was answered with %r" % reply
            assert not self._buffer, "bytes behind OK STARTTLS: %r" % self._buffer
            self.start_tls(context or client_context(**options), server_name, session)
        except BaseException:
            self.close()
            raise

    def start_tls(self, context, server_name="localhost", session=None, seconds=5):
        """Do the handshake."""
        self.sock.settimeout(seconds)
        self.sock = context.wrap_socket(self.sock, server_hostname=server_name, session=session,
                                        suppress_ragged_eofs=True)
        self.reads = []


# ---- servers that misbehave ---------------------------------------------------------------------

class Peer:
    """What a FalseServer's behaviour gets: one accepted connection and what to do with it."""

    def __init__(self, server, sock):
        self.server = server
        self.sock = sock
        self.sock.settimeout(10)
        self.received = b""                         # all that came in, decrypted
        self.tls_version = None

    def recv(self):
        """What comes next, b"" at the end."""
        data = self.sock.recv(65536)
        self.received += data
        return data

    def recv_line(self):
        """Wait until a whole line has come."""
        start = len(self.received)
        while b"\n" not in self.received[start:]:
            if not self.recv():
                return

    def send(self, data):
        """Send bytes."""
        self.sock.sendall(data)

    def start_tls(self, certificate, minimum=None, maximum=None, ca=None):
        """Do a TLS handshake as the server; ca: ask for a client certificate of that CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.file)
        if ca:
            context.load_verify_locations(ca)
            context.verify_mode = ssl.CERT_REQUIRED
        self.sock = limit(context, minimum, maximum).wrap_socket(self.sock, server_side=True)
        self.server.sockets.append(self.sock)
        self.tls_version = self.sock.version()

    def answer(self, piece=None):
        """Speak NUT until the client ends it; piece: send replies torn into so many bytes."""
        session = standin.Session(self.server.upsd)
        while not session.closed:
            data = self.recv()
            if not data:
                return
            replies = session.feed(data)
            for start in range(0, len(replies), piece or max(1, len(replies))):
                self.send(replies[start:start + (piece or len(replies))])

    def hang(self):
        """Read and never answer, until the client or the test ends it."""
        while self.recv():
            pass

    def reset(self):
        """Close with RST."""
        reset(self.sock)


class FalseServer:
    """A server in threads that does to each connection what behaviour(peer) says, then closes it.

    peers lists the connections, errors what went wrong with them (refused handshakes, resets).
    """

    def __init__(self, behaviour, host="127.0.0.1"):
        self.behaviour = behaviour
        self.peers, self.errors, self.sockets, self._threads = [], [], [], []
        self.upsd = standin.StandIn()               # never started: it lends its data to answer()
        self._listener = listen(host)
        self.port = self._listener.getsockname()[1]
        self._accepter = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self):
        self._accepter.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)   # wakes accept()
        self._accepter.join(5)
        self._listener.close()
        for sock in list(self.sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in self.sockets:
            sock.close()

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sockets.append(sock)
            self.peers.append(Peer(self, sock))
            self._threads.append(threading.Thread(target=self._serve, args=(self.peers[-1],), daemon=True))
            self._threads[-1].start()

    def _serve(self, peer):
        try:
            self.behaviour(peer)
        except OSError as error:                    # ssl.SSLError is one too
            self.errors.append(str(error))
        finally:
            peer.sock.close()


def silent(peer):
    """Accept and never answer."""
    peer.hang()


def says(reply, then=Peer.hang):
    """Answer the first line with reply, whatever it was; then: another behaviour."""
    def behaviour(peer):
        peer.recv_line()
        peer.send(reply)
        then(peer)
    return behaviour


def closes(_peer):
    """Close at once; as says(…, closes): close after the reply."""


def plain(piece=None):
    """A upsd without TLS, which also refuses STARTTLS as such a one does."""
    return lambda peer: peer.answer(piece)


def tls(certificate, reply=b"OK STARTTLS\n", then=None, piece=None, **options):
    """Take STARTTLS, then a TLS handshake (options: see start_tls), then NUT or another behaviour."""
    def after(peer):
        peer.start_tls(certificate, **options)
        if then:
            then(peer)
        else:
            peer.answer(piece)
    return says(reply, after)


# ---- the recording relay ------------------------------------------------------------------------

class Relay:
    """A TCP forwarder that keeps every byte: up from the clients, down from the server.

    piece: forward so many bytes at a time, each in a segment of its own.
    """

    def __init__(self, target, host="127.0.0.1", piece=65536):
        self.up = self.down = b""                   # over all connections, in order of arrival
        self.connections = 0
        self.piece = piece
        self._target = (host, target)
        self._sockets, self._threads = [], []
        self._lock = threading.Lock()               # guards up and down
        self._listener = listen()
        self.port = self._listener.getsockname()[1]

    def __enter__(self):
        self._spawn(self._accept)
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(5)
        self._listener.close()
        for sock in self._sockets:
            sock.close()

    def cut(self):
        """End all connections of now, both sides."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _spawn(self, target, *args):
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                self.connections += 1
                try:
                    far = socket.create_connection(self._target, 5)
                except OSError:
                    near.shutdown(socket.SHUT_RDWR)
                    continue
                self._sockets.append(far)
                for sock in (near, far):
                    sock.settimeout(None)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._spawn(self._forward, near, far, "up")
                self._spawn(self._forward, far, near, "down")

    def _forward(self, source, sink, way):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                with self._lock:
                    setattr(self, way, getattr(self, way) + data)
                for start in range(0, len(data), self.piece):
                    sink.sendall(data[start:start + self.piece])
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)           # pass a half-close on as such
