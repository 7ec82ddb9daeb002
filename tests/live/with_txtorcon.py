"""A program that uses txtorcon; prints JSON.

    with_txtorcon.py SOCKET SOCKS-PORT TARGET-PORT FINGERPRINT    of a relay that is no last hop
"""

import json
import sys

import txtorcon
from twisted.internet import task
from twisted.internet.defer import inlineCallbacks
from twisted.internet.endpoints import TCP4ClientEndpoint, UNIXClientEndpoint
from twisted.web.client import readBody

found = {"attached": []}


class Listener(txtorcon.StreamListenerMixin):
    def stream_attach(self, stream, circuit):
        found["attached"].append(circuit.id)


@inlineCallbacks
def main(reactor, path, socks_port, target_port, avoid):
    tor = yield txtorcon.connect(reactor, UNIXClientEndpoint(reactor, path))
    state = yield tor.create_state()
    config = yield tor.get_config()
    found["relays"], found["guards"] = len(state.routers_by_hash), len(state.entry_guards)
    found["pid"], found["dirtiness"] = state.tor_pid, config.MaxCircuitDirtiness
    # A circuit of its own choice, and a request through that.
    guard = list(state.entry_guards.values())[0]
    others = [r for r in state.routers_by_hash.values()
              if "exit" in r.flags and r.id_hex not in (guard.id_hex, "$" + avoid)]
    path = [guard] + others[:2]
    circuit = yield state.build_circuit(path)
    yield circuit.when_built()
    found["circuit"], found["wanted"] = circuit.id, [r.id_hex for r in path]
    found["path"] = [r.id_hex for r in circuit.path]
    state.add_stream_listener(Listener())
    agent = circuit.web_agent(reactor, TCP4ClientEndpoint(reactor, "127.0.0.1", socks_port))
    response = yield agent.request(b"GET", b"http://127.0.0.1:%d/" % target_port)
    found["body"] = (yield readBody(response)).decode()
    yield circuit.close()
    # An onion service.
    onion = yield tor.create_onion_service([(80, target_port)], version=3)
    found["onion"] = onion.hostname
    answer = yield tor.protocol.get_info("onions/current")
    found["current"] = answer["onions/current"] + ".onion"
    yield onion.remove()
    print(json.dumps(found))


task.react(main, (sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
