"""Runs a Python program, and notes in a file each address that it connects to or looks up.

    python bridged.py NOTES PROGRAM ARGUMENTS...
"""

import runpy
import socket
import sys

notes = open(sys.argv[1], "a", buffering=1)


def note(event, arguments):
    if event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        print("%s:%d" % arguments[1][:2], file=notes)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        # asyncio looks up addresses that are numbers; that asks nobody.
        if event == "socket.sendto" or not str(arguments[0]).replace(".", "").isdigit():
            print("%s %r" % (event, arguments), file=notes)


sys.addaudithook(note)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
