"""Copy every frame between two devices, each a fixed time later: `relay.py DEVICE DEVICE SECONDS`.

Stands in for tc's netem where the kernel is built without it. `relay.py --prepare DEVICE` makes a sending device fill
in its checksums and cut its segments itself, for a copied frame passes no hardware that would.
"""

import collections
import ctypes
import fcntl
import select
import socket
import struct
import sys
import time

ETH_P_ALL = 3
SIOCETHTOOL = 0x8946
ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO = 0x17, 0x1F, 0x24
LONGEST_FRAME = 65536


def prepare(device: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for setting in (ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO):
            value = ctypes.create_string_buffer(struct.pack("II", setting, 0))
            request = struct.pack("16sP", device.encode(), ctypes.addressof(value))
            fcntl.ioctl(control, SIOCETHTOOL, request)


def relay(devices: list[str], seconds: float) -> None:
    sides = []
    for device in devices:
        side = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        side.bind((device, ETH_P_ALL))
        side.setblocking(False)
        sides.append(side)
    other = dict(zip(sides, reversed(sides), strict=True))
    waiting: collections.deque = collections.deque()
    print("ready", flush=True)
    while True:
        rest = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for side in select.select(sides, [], [], rest)[0]:
            frame, address = side.recvfrom(LONGEST_FRAME)
            # What this relay sends itself comes back marked as outgoing.
            if address[2] != socket.PACKET_OUTGOING:
                waiting.append((time.monotonic() + seconds, other[side], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, side, frame = waiting.popleft()
            side.send(frame)


if __name__ == "__main__":
    if sys.argv[1] == "--prepare":
        prepare(sys.argv[2])
    else:
        relay(sys.argv[1:3], float(sys.argv[3]))
