"""Stands for a board's `ntptime`.  scene.json, "ntp": a year or null (no answer) for each call."""

import time

from scene import SCENE

host = "pool.ntp.org"
answers = list(SCENE.get("ntp", []))


def settime():
    answer = answers.pop(0) if answers else 2026
    print("(asked %s: %s)" % (host, answer))
    if answer is None:
        raise OSError(110)
    time.set_year(answer)
