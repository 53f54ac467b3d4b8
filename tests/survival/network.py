"""Hosts as network namespaces around a switch: cut a cable, throttle it, delay it, count its bytes. Needs root."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

SWITCH = "sa3-switch"
BRIDGE = "sa3br"
DEVICE = "eth0"
SUBNET = "10.213.77"
# A few frames: what passes unbounded after a pause.
BURST_BYTES = 4 * 1024


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Network:
    """``count`` hosts named sa3-0, sa3-1, ...; each has a name of its own, an eth0 and a port of the switch."""

    def __init__(self, count: int = 2) -> None:
        self.nodes = [f"sa3-{number}" for number in range(count)]
        self._relay: subprocess.Popen | None = None

    def __enter__(self) -> Network:
        self._remove()
        ip("netns", "add", SWITCH)
        ip("-n", SWITCH, "link", "add", BRIDGE, "type", "bridge")
        ip("-n", SWITCH, "link", "set", BRIDGE, "up")
        names = "".join(f"{self.address(number)} {node}\n" for number, node in enumerate(self.nodes))
        for number, node in enumerate(self.nodes):
            ip("netns", "add", node)
            ip("link", "add", DEVICE, "netns", node, "type", "veth", "peer", "name", f"p{number}", "netns", SWITCH)
            ip("-n", node, "addr", "add", f"{self.address(number)}/24", "dev", DEVICE)
            for device in (DEVICE, "lo"):
                ip("-n", node, "link", "set", device, "up")
            ip("-n", SWITCH, "link", "set", f"p{number}", "master", BRIDGE, "up")
            # `ip netns exec` mounts these over /etc.
            etc = Path("/etc/netns") / node
            etc.mkdir(parents=True, exist_ok=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        return self

    def __exit__(self, *_) -> None:
        self.delay(None)
        self._remove()

    def _remove(self) -> None:
        present = ip("netns", "list").split()
        for node in (*self.nodes, SWITCH):
            if node in present:
                ip("netns", "del", node)
            with contextlib.suppress(FileNotFoundError):
                (Path("/etc/netns") / node / "hosts").unlink()
                (Path("/etc/netns") / node).rmdir()

    def address(self, number: int) -> str:
        return f"{SUBNET}.{number + 1}"

    def on(self, number: int, command: list[str]) -> list[str]:
        """The command line that runs ``command`` on a host, as PID 1 of a process namespace of its own."""
        name = self.nodes[number]
        start = f'hostname {name}; exec "$@"'
        isolate = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        return ["ip", "netns", "exec", name, *isolate, "sh", "-c", start, "sh", *command]

    def cut(self, number: int) -> None:
        """The switch forgets the host: nothing arrives any more, and neither side sees its carrier go."""
        self._port(number, "disabled")

    def mend(self, number: int) -> None:
        self._port(number, "forwarding")

    def _port(self, number: int, state: str) -> None:
        # Not `ip link ... type bridge_slave state`: it ends with 0 and changes nothing.
        port = f"p{number}"
        subprocess.run(["bridge", "-n", SWITCH, "link", "set", "dev", port, "state", state], check=True)
        assert f"bridge_slave state {state}" in ip("-n", SWITCH, "-d", "link", "show", port)

    def throttle(self, megabits_per_second: float | None) -> None:
        """Bound what every host sends; None takes the bound away."""
        for node in self.nodes:
            tc = ["ip", "netns", "exec", node, "tc", "qdisc"]
            if megabits_per_second is None:
                subprocess.run([*tc, "del", "dev", DEVICE, "root"], check=True)
            else:
                rate = f"{megabits_per_second * 1e6:.0f}bit"
                shape = ["tbf", "rate", rate, "burst", str(BURST_BYTES), "latency", "200ms"]
                subprocess.run([*tc, "replace", "dev", DEVICE, "root", *shape], check=True)

    def delay(self, seconds: float | None) -> None:
        """Send every frame of two hosts so much later, by a relay in the bridge's place; None puts the bridge back."""
        if self._relay is not None:
            self._relay.send_signal(signal.SIGTERM)
            self._relay.wait()
            self._relay = None
            for port in ("p0", "p1"):
                ip("-n", SWITCH, "link", "set", port, "master", BRIDGE)
        if seconds is not None:
            for number in (0, 1):
                ip("-n", SWITCH, "link", "set", f"p{number}", "nomaster")
            relay = [sys.executable, str(Path(__file__).with_name("relay.py"))]
            for node in self.nodes:
                # A copied frame must carry its checksum, and be no longer than the wire's.
                subprocess.run(["ip", "netns", "exec", node, *relay, "--prepare", DEVICE], check=True)
            command = ["ip", "netns", "exec", SWITCH, *relay, "p0", "p1", str(seconds)]
            self._relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert self._relay.stdout.readline() == "ready\n"

    def sent_bytes(self, number: int) -> int:
        """Bytes the host has sent, by its device's counter; frames without preamble and gaps."""
        words = ip("-n", self.nodes[number], "-s", "link", "show", DEVICE).split("TX:")[1].split("\n")[1].split()
        return int(words[0])


def require_root() -> None:
    if os.geteuid() != 0:
        sys.exit("network namespaces need root")
