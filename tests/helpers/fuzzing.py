"""Damage of every kind to bytes and to JSON, drawn from a seed, and what may come of it."""

import json

from sa3dist.errors import SA3DistError
from sa3dist.formats import sealed

HOSTILE_VALUES = [None, -1, 0, 2**70, 1e308, True, "", "x", "../../out", "/etc/passwd", "a\nb", [], {}, [[]], "\ud800"]


def mutated(draw, data, head=100):
    """``data`` with one to five damages; half of them fall on the first ``head`` bytes, since headers decide most."""
    data = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        place = draw.randrange(min(len(data), head) if draw.random() < 0.5 else len(data)) if data else 0
        match draw.randrange(5):
            case 0:
                data[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[place : place + draw.randrange(1, 2000)]
            case 2:
                data[place:place] = draw.randbytes(draw.randrange(1, 2000))
            case 3:
                data[place : place + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
            case 4:
                data[place:place] = data[: draw.randrange(1, 500)]
    return bytes(data)


def forged(draw, data):
    """A sealed JSON file with one to three values replaced, removed or nested, and sealed again: a stranger's."""
    value = json.loads(data)
    value.pop(next(reversed(value)))
    for _ in range(draw.randrange(1, 4)):
        holder, key = value, draw.choice(list(value))
        while isinstance(holder[key], (dict, list)) and holder[key] and draw.random() < 0.9:
            holder = holder[key]
            key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        if draw.random() < 0.2:
            del holder[key]
        else:
            holder[key] = draw.choice(HOSTILE_VALUES)
        if not value:
            break
    return sealed(json.dumps(value)[:-1])


def outcome(work):
    """ "taken" or "refused"; what is not an error of ours, in printable lines, is a crash and raised."""
    try:
        work()
    except SA3DistError as problem:
        message = str(problem)
    else:
        return "taken"
    assert all(line.strip() and line.isprintable() for line in message.split("\n")), repr(message)
    return "refused"
