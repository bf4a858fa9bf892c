# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines that fail: what lies between the two shims, or between a shim and upsd, in the tests.

Path is a TCP relay on loopback that can cut, silence and delay what it carries, and records it.
Line is a slow or lossy network between this network namespace and a second one, packet by packet
over two TUN devices (needs root); as a program this file is the process that moves its packets.
"""

import collections
import contextlib
import errno
import fcntl
import heapq
import json
import os
import random
import select
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time

from wire import listen, reset


# ---- a TCP relay --------------------------------------------------------------------------------

class _Way:
    """One direction of a flow: what has been read of source and is not yet with sink."""

    def __init__(self, source, sink):
        self.source, self.sink = source, sink
        self.record = bytearray()                   # all that has passed
        self.queue = collections.deque()            # (when it is due, bytes)
        self.waiting = 0                            # bytes in queue
        self.ended = self.shut = self.blocked = False


class Flow:
    """A connection through a Path: up and down hold all bytes that were carried so far."""

    def __init__(self, near, far):
        self.near, self.far = near, far
        self.ways = (_Way(near, far), _Way(far, near))
        self.silent = self.closed = False

    @property
    def up(self):
        """What the client has sent."""
        return bytes(self.ways[0].record)

    @property
    def down(self):
        """What the server has sent."""
        return bytes(self.ways[1].record)


class Path:
    """A TCP relay from a port of its own to a target port on loopback, in one thread.

    flows lists all connections it ever had. What it can do to those of now: cut() ends them with
    FIN, reset() with RST, forget() carries nothing any more and says nothing, as a NAT does that
    has lost its table; new connections are not concerned. hold() and release() stop everything for
    a time, off() is a box without power: forget(), and new connections get no answer. arm() does
    one of these to one connection after so many bytes more. delay: seconds each way.
    """

    MOST = 1 << 18                                  # bytes under way in one direction

    def __init__(self, target, delay=0):
        self.flows = []
        self.delay = delay
        self.target = target
        self._listener = listen()
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._orders = collections.deque()
        self._near, self._far = socket.socketpair()
        self._far.setblocking(False)
        self._selector.register(self._far, selectors.EVENT_READ, None)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._held = self._over = False
        self._armed = None                          # (what to do, bytes until then, past how many of a connection)
        self._plugs = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._order(self._end)
        self._thread.join(5)
        for flow in self.flows:
            flow.near.close()
            flow.far.close()
        for sock in self._plugs + [self._listener, self._near, self._far]:
            sock.close()
        self._selector.close()

    # Orders: carried out by the thread, and waited for.

    def _order(self, what):
        done = threading.Event()
        self._orders.append((what, done))
        self._near.send(b"x")
        done.wait(5)

    def _end(self):
        self._over = True

    @property
    def open(self):
        """The flows that are neither closed nor silent."""
        return [flow for flow in list(self.flows) if not flow.closed and not flow.silent]

    def _all(self, how):
        for flow in self.open:
            how(flow)

    def cut(self):
        """End the connections of now, with FIN both ways."""
        self._order(lambda: self._all(self._cut))

    def reset(self):
        """Reset the connections of now, both ways."""
        self._order(lambda: self._all(self._reset))

    def forget(self):
        """Carry nothing more on the connections of now."""
        self._order(lambda: self._all(self._forget))

    def arm(self, how, count, past=0):
        """Do "cut", "reset" or "forget" to the connection that carries the byte number count from now on.

        Only bytes of connections that have carried more than past bytes count: 4096 is past the
        handshakes of both shims.
        """
        def set_it():
            self._armed = [getattr(self, "_" + how), count, past]
        self._order(set_it)

    def disarm(self):
        """Take back arm()."""
        def take_back():
            self._armed = None
        self._order(take_back)

    @property
    def armed(self):
        """True while arm() has not come to its byte."""
        return self._armed is not None

    def hold(self):
        """Carry nothing, and take no connection, until release()."""
        def stop():
            self._held = True
            self._selector.unregister(self._listener)
            for flow in self.open:
                self._watch(flow)
        self._order(stop)

    def release(self):
        """End hold()."""
        def go_on():
            self._held = False
            self._selector.register(self._listener, selectors.EVENT_READ, None)
            for flow in self.open:
                self._pump(flow)
        self._order(go_on)

    def off(self):
        """No power: the connections of now are forgotten, new ones get no answer (the backlog is full)."""
        def switch_off():
            self._all(self._forget)
            self._selector.unregister(self._listener)
            self._plugs += plug(self._listener)
        self._order(switch_off)

    # The thread.

    def _forget(self, flow):
        flow.silent = True
        self._unwatch(flow)

    def _cut(self, flow):
        self._close(flow, lambda sock: sock.shutdown(socket.SHUT_RDWR))

    def _reset(self, flow):
        self._close(flow, reset)

    def _close(self, flow, how):
        self._unwatch(flow)
        flow.closed = True
        for sock in (flow.near, flow.far):
            with contextlib.suppress(OSError):
                how(sock)
            sock.close()

    def _unwatch(self, flow):
        for sock in (flow.near, flow.far):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(sock)

    def _serve(self):
        while not self._over:
            wait = None
            if self.delay and not self._held:
                dues = [way.queue[0][0] for flow in self.open for way in flow.ways if way.queue and not way.blocked]
                wait = max(0, min(dues) - time.monotonic()) if dues else None
            busy = set()
            for key, _ in self._selector.select(wait):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._far:
                    with contextlib.suppress(BlockingIOError):
                        self._far.recv(4096)
                else:
                    busy.add(key.data)
            while self._orders:
                what, done = self._orders.popleft()
                what()
                done.set()
            for flow in busy if not self.delay else self.open:
                if not flow.closed and not flow.silent and not self._held:
                    self._pump(flow)

    def _accept(self):
        try:
            near = self._listener.accept()[0]
        except OSError:
            return
        far = socket.socket()
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        flow = Flow(near, far)
        self.flows.append(flow)
        if far.connect_ex(("127.0.0.1", self.target)) not in (0, errno.EINPROGRESS):
            self._reset(flow)
            return
        self._watch(flow)

    def _pump(self, flow):
        """Read, send and pass ends on, as far as it goes without waiting."""
        try:
            for way in flow.ways:
                if not way.ended and way.waiting < self.MOST:
                    try:
                        data = way.source.recv(16384)
                    except BlockingIOError:
                        data = None
                    if data:
                        way.queue.append((time.monotonic() + self.delay, data))
                        way.waiting += len(data)
                    elif data is not None:
                        way.ended = True
                self._drain(flow, way)
                if flow.closed or flow.silent:
                    return
        except OSError:                             # reset by either side, or no connection to the target
            self._reset(flow)
            return
        if all(way.shut for way in flow.ways):
            self._close(flow, lambda sock: None)
        else:
            self._watch(flow)

    def _drain(self, flow, way):
        way.blocked = False
        while way.queue and way.queue[0][0] <= time.monotonic():
            due, data = way.queue[0]
            deed = None
            counts = self._armed and sum(len(each.record) for each in flow.ways) >= self._armed[2]
            if counts and self._armed[1] <= len(data):
                deed, data = self._armed[0], data[:self._armed[1]]
            try:
                sent = way.sink.send(data) if data else 0
            except BlockingIOError:
                way.blocked = True
                return
            way.record += data[:sent]
            if counts:
                self._armed[1] -= sent
            if deed and sent == len(data):
                self._armed = None
                deed(flow)
                return
            way.waiting -= sent
            rest = way.queue.popleft()[1][sent:]
            if rest:
                way.queue.appendleft((due, rest))
        if way.ended and not way.queue and not way.shut:
            way.shut = True
            with contextlib.suppress(OSError):
                way.sink.shutdown(socket.SHUT_WR)

    def _watch(self, flow):
        for sock, reads, writes in ((flow.near, flow.ways[0], flow.ways[1]), (flow.far, flow.ways[1], flow.ways[0])):
            mask = 0
            if not self._held:
                mask |= selectors.EVENT_READ * (not reads.ended and reads.waiting < self.MOST)
                mask |= selectors.EVENT_WRITE * writes.blocked
            known = self._selector.get_map().get(sock)
            if known and not mask:
                self._selector.unregister(sock)
            elif known and known.events != mask:
                self._selector.modify(sock, mask, flow)
            elif not known and mask:
                self._selector.register(sock, mask, flow)


def plug(listener):
    """Fill a listening socket's backlog, so that the kernel drops whoever wants to connect; the plugs."""
    listener.listen(0)
    plugs = []
    for _ in range(4):                              # Linux takes one more than the backlog says
        plugs.append(socket.socket())
        plugs[-1].setblocking(False)
        plugs[-1].connect_ex(listener.getsockname())
    return plugs


@contextlib.contextmanager
def blackhole():
    """A port on loopback where connections get no answer, neither yes nor no."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen())
        for sock in plug(listener):
            stack.enter_context(sock)
        yield listener.getsockname()[1]


# ---- a network between two namespaces -----------------------------------------------------------

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454ca, 1, 0x1000
HERE, THERE = "10.99.0.1", "10.99.0.2"             # the server's end, in this namespace, and the clients'


def ip(*args):
    """Run ip(8)."""
    done = subprocess.run(["ip"] + [str(arg) for arg in args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        raise OSError("ip %s: %s" % (" ".join(map(str, args)), done.stdout.strip()))
    return done.stdout


class Line:
    """A second network namespace, `name`, and a line to it; a context manager.

    It is meant for a process in a network namespace of its own: HERE is an address of this
    namespace, THERE one of the other. set(): delay in ms each way, loss in percent, down (nothing
    passes), dead (addresses that nothing reaches). forget(): what belongs to connections of before
    is dropped, as by a NAT that has lost its table; the first packet of a new one is let through.
    """

    def __init__(self):
        self.name = "nutshim-%d" % os.getpid()
        self.state = {"delay": 0, "loss": 0, "down": False, "dead": []}
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            ip("link", "set", "lo", "up")
            ip("netns", "add", self.name)
            stack.callback(ip, "netns", "del", self.name)
            process = subprocess.Popen([sys.executable, os.path.abspath(__file__), self.name], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, universal_newlines=True, bufsize=1)
            stack.callback(process.wait, 5)
            stack.callback(process.stdin.close)     # its end
            if process.stdout.readline() != "up\n":
                raise OSError("the line to namespace %s does not come up" % self.name)
            self._process = process
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._process.stdout.close()
        return self._stack.__exit__(*error)

    def _say(self, **order):
        self._process.stdin.write(json.dumps(order) + "\n")
        assert self._process.stdout.readline() == "done\n"

    def set(self, **state):
        """Change some of delay, loss, down, dead; the others stay."""
        self.state.update(state)
        self._say(**self.state)

    def clear(self):
        """A perfect line again, for connections of before too."""
        self.state.update(delay=0, loss=0, down=False, dead=[])
        self._say(forget=False, **self.state)

    def forget(self):
        """Drop what belongs to the connections of now."""
        self._say(forget=True)

    @property
    def inside(self):
        """The beginning of a command that runs in the second namespace."""
        return ["ip", "netns", "exec", self.name]


def flow_of(packet):
    """What tells one TCP connection from another, the same for both directions; None for other packets."""
    if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
        return None
    start = (packet[0] & 15) * 4
    ends = sorted((packet[12:16] + packet[start:start + 2], packet[16:20] + packet[start + 2:start + 4]))
    return ends[0] + ends[1]


def is_syn(packet):
    """True for the first packet of a TCP connection."""
    return packet[(packet[0] & 15) * 4 + 13] & 0x12 == 0x02


def open_tun(name, address, namespace=None):
    """Make a TUN device with an address, in another namespace if one is named; its descriptor."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode("ascii"), IFF_TUN | IFF_NO_PI))
    where = []
    if namespace:
        ip("link", "set", name, "netns", namespace)
        where = ["-n", namespace]
        ip(*where, "link", "set", "lo", "up")
    ip(*where, "addr", "add", address + "/24", "dev", name)
    ip(*where, "link", "set", name, "up")
    return tun


class Mover:
    """Moves the packets of a Line, in a process of its own; orders come on standard input."""

    def __init__(self, tuns):
        self._tuns = tuns
        self._delay = self._loss = 0
        self._down, self._dead = False, set()
        self._seen, self._lost = set(), set()       # connections
        self._under_way, self._number = [], 0
        self._chance = random.Random(1)

    def run(self):
        """Until standard input ends."""
        poller = select.poll()
        for tun in self._tuns + [0]:
            poller.register(tun, select.POLLIN)
        while True:
            wait = None
            if self._under_way:
                wait = max(0, (self._under_way[0][0] - time.monotonic()) * 1000)
            for number, _ in poller.poll(wait):
                if number == 0:
                    line = sys.stdin.readline()     # one order at a time: each is answered before the next
                    if not line:
                        return
                    self._obey(**json.loads(line))
                    print("done", flush=True)
                else:
                    self._take(number)
            self._give()

    def _obey(self, delay=None, loss=None, down=None, dead=None, forget=None):
        if delay is not None:
            self._delay, self._loss, self._down = delay / 1000, loss / 100, down
            self._dead = {socket.inet_aton(address) for address in dead}
        if forget is not None:
            self._lost = set(self._seen) if forget else set()

    def _take(self, tun):
        to = self._tuns[1 - self._tuns.index(tun)]
        for _ in range(64):
            try:
                packet = os.read(tun, 65536)
            except BlockingIOError:
                return
            flow = flow_of(packet)
            if flow:
                if is_syn(packet):
                    self._lost.discard(flow)
                self._seen.add(flow)
            if (self._down or flow in self._lost or packet[12:16] in self._dead or packet[16:20] in self._dead
                    or self._chance.random() < self._loss):
                continue
            self._number += 1                       # packets that are due together keep their order
            heapq.heappush(self._under_way, (time.monotonic() + self._delay, self._number, to, packet))

    def _give(self):
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, to, packet = heapq.heappop(self._under_way)
            with contextlib.suppress(OSError):      # a full queue drops, as networks do
                os.write(to, packet)


def main(namespace):
    """Make the two devices and move packets."""
    tuns = [open_tun("line-here", HERE), open_tun("line-there", THERE, namespace)]
    print("up", flush=True)
    Mover(tuns).run()


if __name__ == "__main__":
    main(sys.argv[1])
