"""Stands for a board's `network`.  scene.json, "wifi": seconds out of reach, in reach, out, ..."""

from scene import SCENE, seconds

STA_IF, STAT_CONNECTING, STAT_WRONG_PASSWORD = 0, 1001, 202


def reachable():
    left, inside = seconds(), False
    for length in SCENE.get("wifi", [0]):
        if left < length:
            return inside
        left -= length
        inside = not inside
    return inside


class WLAN:
    # A link that is lost needs a new connect: an ESP32 mostly tries again by itself.
    def __init__(self, interface):
        assert interface == STA_IF
        self.up = self.trying = self.joined = False

    def active(self, up):
        self.up = up

    def connect(self, ssid, password):
        assert self.up
        if self.trying:
            raise OSError("sta is connecting, cannot set config")
        print("(connect to %s with %s)" % (ssid, password))
        self.trying = True

    def disconnect(self):
        self.trying = self.joined = False

    def isconnected(self):
        if self.joined and not reachable():
            self.joined = False
        elif self.trying and not self.joined:
            self.joined = reachable()
            self.trying = not self.joined
        return self.joined

    def status(self):
        return STAT_WRONG_PASSWORD if SCENE.get("wrong_password") else STAT_CONNECTING

    def ifconfig(self):
        return "192.0.2.7", "255.255.255.0", "192.0.2.1", "192.0.2.1"
