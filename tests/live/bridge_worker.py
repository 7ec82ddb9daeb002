"""Fetches a page through the bridge of a line, by obfs4proxy, and prints what came of it.

    python bridge_worker.py FOLDER URL LINE...
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import minitor  # noqa: E402

folder, url, lines = sys.argv[1], sys.argv[2], sys.argv[3:]
logged = []
minitor.set_log(minitor.INFO, lambda severity, text: logged.append((severity, text)))
bridges = minitor.Bridges(lines, ["obfs2,obfs4 exec /usr/bin/obfs4proxy"])
with minitor.Tor(folder, bridges=bridges) as tor:
    pages = [tor.http_get(url)]
    plugin = bridges._plugins["obfs4"]
    first = plugin._process.pid
    os.kill(first, signal.SIGKILL)
    end = time.monotonic() + 30
    while len(pages) < 2:
        try:
            pages.append(tor.http_get(url))
        except minitor.TorError:
            assert time.monotonic() < end, logged
            time.sleep(0.2)
    second = plugin._process.pid
    method = tor.run(plugin.method("obfs4"))
time.sleep(0.2)
ended = not os.path.exists("/proc/%d" % second)
print(json.dumps({"pages": pages, "pids": [first, second], "ended": ended, "method": method,
                  "logged": logged}))
