import sys

from . import TorError, read, serve

try:
    if sys.argv[1:2] == ["serve"] and len(sys.argv) == 2:
        serve("Hello from inside a package.\n", lambda address: print(address, flush=True))
    elif sys.argv[1:2] == ["read"] and len(sys.argv) == 3:
        print(read(sys.argv[2]), end="")
    else:
        sys.exit("usage: python -m onionsay serve | read ADDRESS")
except KeyboardInterrupt:
    pass
except TorError as e:
    sys.exit("onionsay: %s" % e)
