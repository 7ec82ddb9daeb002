"""MicroPython's `time` with a clock that can be set; scene.json, "year": what it shows first."""

import utime
from utime import *

from scene import SCENE, seconds

YEAR = [SCENE.get("year", 2026)]


def gmtime(at=None):
    return (YEAR[0],) + utime.gmtime()[1:] if at is None else utime.gmtime(at)


def time():
    return utime.time() + seconds()
