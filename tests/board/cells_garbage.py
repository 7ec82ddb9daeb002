"""What a cell each way leaves in the heap: a circuit of four layers, both of its ends."""

import gc
import os
import sys

import minitor as m

# Viper's integers are no objects; 64-bit MicroPython has the plain code, which makes long ones.
NARROW = sys.maxsize == (1 << 31) - 1
CELL = bytearray(514)
# Both ends are here.
m._RECENT = 16


class Link:
    """A channel that keeps what is sent last."""

    def __init__(self):
        self.closed, self.circuits, self.sent = None, {}, None

    def send(self, data):
        self.sent = data


class Stream:
    """The stream's end where cells arrive."""

    taken = 0

    def feed(self, data):
        self.taken += len(data)

    def arrived(self):
        pass


def make_ends():
    ends = m.Circuit(Link()), m.Circuit(Link())
    for onion in (False, False, False, True):
        keys = os.urandom(128)
        for end, service in zip(ends, (False, True)):
            end._layers.append(m.Layer(keys, onion, service))
            end.streams[7] = Stream()
    return ends


def encrypt_and_decrypt(sender, receiver):
    for i in range(10, 14):
        CELL[i] = 0
    sender[-1].seal(CELL, 5)
    i = len(sender)
    while i:
        i -= 1
        sender[i].apply(CELL, 5, 509)
    for layer in receiver:
        layer.apply(CELL, 5, 509, 1)
    assert receiver[-1].opens(CELL, 5)


def send(sender, data):
    sender.send(m.DATA, 7, data)


def receive(receiver, body):
    receiver.receive(body)


def left_by(function, *args):
    before = gc.mem_alloc()
    function(*args)
    return gc.mem_alloc() - before


def main():
    ends, data = make_ends(), os.urandom(498)
    layers = [end._layers for end in ends]
    for i in (0, 1, 0, 1):
        found = left_by(encrypt_and_decrypt, layers[i], layers[1 - i])
    print("encrypted and decrypted: %d bytes" % found)
    assert found == 0 or not NARROW
    for i in (0, 1, 0, 1):
        sent = left_by(send, ends[i], data)
        body = memoryview(ends[i].channel.sent)[5:]
        received = left_by(receive, ends[1 - i], body)
    assert ends[0].streams[7].taken == ends[1].streams[7].taken == 2 * 498
    print("sent: %d bytes, received: %d" % (sent, received))
    # The cell for the channel's queue with its object (544 bytes), arguments and a slice.  For the
    # stream two views and a slice, and the set of streams that have something to read.
    assert sent <= 576 and received <= 96 or not NARROW


gc.collect()
if NARROW:
    gc.disable()
main()
print("ok")
