"""Stands for a board's `machine`: a reset ends the program, and one file outlives it."""

import asyncio
import sys

import time
from scene import SPEED, seconds

sleep = asyncio.sleep
asyncio.sleep = lambda seconds: sleep(seconds / SPEED)


def reset():
    print("(reset)")
    sys.exit(0)


class RTC:
    def memory(self, data=None):
        if data is not None:
            with open("rtc", "wb") as f:
                f.write(data)
            return None
        try:
            with open("rtc", "rb") as f:
                return f.read()
        except OSError:
            return b""

    def datetime(self, date):
        print("(clock set to %d)" % date[0])
        time.set_year(date[0])


class WDT:
    def __init__(self, id=0, timeout=5000):
        print("(watchdog of %d ms)" % timeout)
        self.timeout, self.fed, self.times = timeout, seconds(), 0

    def feed(self):
        if 1000 * (seconds() - self.fed) > self.timeout:
            print("(watchdog: too late)")
            sys.exit(3)
        self.fed = seconds()
        self.times += 1
        if self.times == 10:
            print("(watchdog fed)")
