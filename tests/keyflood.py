# SPDX-License-Identifier: GPL-2.0-or-later
"""KeyUpdate records of TLS 1.3 by the thousands, from either end of a connection.

Python's ssl cannot send one, so the OpenSSL below it is called through ctypes. All records are made
beforehand and go out at once: the peer alone has the work.

    flood = ClientFlood(port)           # a stranger's TLS session with a server shim
    flood.send(flood.engine.key_updates(200000))

    FalseServer(tls_flood(certificate, 200000))         # an upstream that does it to a client shim
"""

import ctypes
import ctypes.util
import re
import socket
import ssl      # loads the libssl that is looked for below


def _libssl():
    """The libssl that Python itself uses, else the system's."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        loaded = re.search(r"/\S*/libssl\.so\S*", maps.read())
    library = ctypes.CDLL(loaded.group() if loaded else ctypes.util.find_library("ssl"))
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, *arguments in (
            ("TLS_method", pointer), ("BIO_s_mem", pointer), ("BIO_new", pointer, pointer),
            ("SSL_CTX_new", pointer, pointer), ("SSL_new", pointer, pointer),
            ("SSL_CTX_free", None, pointer), ("SSL_free", None, pointer),
            ("SSL_CTX_use_certificate_chain_file", number, pointer, text),
            ("SSL_CTX_use_PrivateKey_file", number, pointer, text, number),
            ("SSL_set_bio", None, pointer, pointer, pointer),
            ("SSL_set_accept_state", None, pointer), ("SSL_set_connect_state", None, pointer),
            ("SSL_do_handshake", number, pointer), ("SSL_key_update", number, pointer, number),
            ("SSL_read", number, pointer, text, number), ("SSL_write", number, pointer, text, number),
            ("BIO_read", number, pointer, text, number), ("BIO_write", number, pointer, text, number)):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Engine:
    """One end of a TLS 1.3 connection in memory: the server with a certificate's file, else a client that verifies
    nothing. What its methods return goes to the peer, but for decrypt()'s."""

    PEM = 1                                         # SSL_FILETYPE_PEM

    def __init__(self, certificate=None):
        self._lib = _libssl()
        self._context = self._lib.SSL_CTX_new(self._lib.TLS_method())
        if certificate:
            path = certificate.encode()
            assert self._lib.SSL_CTX_use_certificate_chain_file(self._context, path) == 1
            assert self._lib.SSL_CTX_use_PrivateKey_file(self._context, path, self.PEM) == 1
        self._ssl = self._lib.SSL_new(self._context)
        self._in, self._out = (self._lib.BIO_new(self._lib.BIO_s_mem()) for _ in range(2))
        self._lib.SSL_set_bio(self._ssl, self._in, self._out)
        (self._lib.SSL_set_accept_state if certificate else self._lib.SSL_set_connect_state)(self._ssl)
        self._buffer = ctypes.create_string_buffer(65536)
        self.up = False                             # once the handshake is through

    def close(self):
        """Free the memory."""
        self._lib.SSL_free(self._ssl)
        self._lib.SSL_CTX_free(self._context)

    def _drain(self, read, source):
        pieces = []
        while True:
            size = read(source, self._buffer, len(self._buffer))
            if size <= 0:
                return b"".join(pieces)
            pieces.append(self._buffer.raw[:size])

    def handshake(self, data=b""):
        """Take the peer's bytes and go on with the handshake."""
        self._lib.BIO_write(self._in, data, len(data))
        self.up = self._lib.SSL_do_handshake(self._ssl) == 1
        return self._drain(self._lib.BIO_read, self._out)

    def decrypt(self, data):
        """Take the peer's bytes; return what they say."""
        self._lib.BIO_write(self._in, data, len(data))
        return self._drain(self._lib.SSL_read, self._ssl)

    def encrypt(self, data):
        """A record of the data."""
        assert self._lib.SSL_write(self._ssl, data, len(data)) == len(data)
        return self._drain(self._lib.BIO_read, self._out)

    def key_updates(self, count, answered=False):
        """So many KeyUpdate records; answered: each asks the peer for one of its own."""
        for _ in range(count):
            assert self._lib.SSL_key_update(self._ssl, int(answered)) == 1
            assert self._lib.SSL_do_handshake(self._ssl) == 1
        return self._drain(self._lib.BIO_read, self._out)


def _shake_hands(engine, receive, send, data=b""):
    while True:
        send(engine.handshake(data))
        if engine.up:
            return
        data = receive()
        if not data:
            raise ssl.SSLError("closed during the handshake")


class ClientFlood:
    """A TLS session with a server shim, after STARTTLS; a context manager."""

    def __init__(self, port, host="127.0.0.1", seconds=30):
        self.engine = Engine()
        self.sock = socket.create_connection((host, port), seconds)
        self.send = self.sock.sendall
        self.send(b"STARTTLS\n")
        assert self.sock.recv(100) == b"OK STARTTLS\n"
        _shake_hands(self.engine, lambda: self.sock.recv(65536), self.send)

    def ask(self, command):
        """Send a command line; its one-line reply, b"" if the session is over."""
        self.send(self.engine.encrypt(command.encode() + b"\n"))
        reply = b""
        while not reply.endswith(b"\n"):
            data = self.sock.recv(65536)
            if not data:
                return b""
            reply += self.engine.decrypt(data)
        return reply

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()
        self.engine.close()


def tls_flood(certificate, count, reply=b"1.3\n", answered=False):
    """A behaviour for wire.FalseServer: OK STARTTLS, TLS, a reply to the first command, then the records."""
    def behaviour(peer):
        peer.recv_line()
        peer.send(b"OK STARTTLS\n")
        engine = Engine(certificate.file)
        try:
            _shake_hands(engine, peer.recv, peer.send)
            command = engine.decrypt(b"")           # it may have come with the handshake's end
            while not command:
                data = peer.recv()
                if not data:
                    return
                command = engine.decrypt(data)
            peer.send(engine.encrypt(reply))
            peer.send(engine.key_updates(count, answered))
            peer.hang()
        finally:
            engine.close()
    return behaviour
