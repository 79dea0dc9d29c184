"""From a fuzzer's bytes to a spoilt file: any bytes, bytes of a good file changed, or a good JSON value changed in places."""

from __future__ import annotations

import copy
import json

HOSTILE = [
    None, True, False, 0, -1, 1, 3, 70000, 10**30, 0.5, 1e308, float("inf"), float("nan"), "", ".", "..", "../../outside",
    "/outside", "C:\\outside", "a\0b", "\ud800", "x" * 300, "2", "os.system", "torch.hub.load", [], {}, [[]], [None], [0, 0, 0],
    {"": None}, {"../outside": {}}, [1e308], ["../outside"], 10**400,
]  # fmt: skip
DEEP = 100_000  # brackets


class Choices:
    """Numbers and texts taken from bytes, one after another; zeros after their end."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def below(self, limit: int) -> int:
        """0 ... limit - 1."""
        width = 1 if limit <= 256 else 3
        taken = self.data[self.position : self.position + width]
        self.position += width
        return int.from_bytes(taken, "little") % limit

    def rest(self) -> bytes:
        return self.data[self.position :]

    def text(self) -> str:
        length = self.below(40)
        taken = self.data[self.position : self.position + length]
        self.position += length
        return taken.decode("utf-8", "surrogateescape")


def spoilt_bytes(choices: Choices, good: bytes) -> bytes:
    """Cut, changed in a few places, or something else altogether."""
    kind = choices.below(4)
    if kind == 0:
        return choices.rest()
    if kind == 1:
        return good[: choices.below(len(good) + 1)]
    content = bytearray(good)
    for _ in range(1 + choices.below(8)):
        where = choices.below(len(content))
        content[where : where + 1 + choices.below(3)] = bytes([choices.below(256)]) * choices.below(4)
        if not content:
            break
    return bytes(content)


def spoilt_json(choices: Choices, good: object) -> bytes:
    """Mostly JSON, with one to four values replaced, removed, renamed or exchanged."""
    kind = choices.below(16)
    if kind == 0:
        return spoilt_bytes(choices, json.dumps(good).encode())
    if kind == 1:
        return b"[" * DEEP
    return json.dumps(spoilt(choices, good)).encode()


def spoilt(choices: Choices, good: object) -> object:
    """The value changed in one to four places."""
    holder = [copy.deepcopy(good)]
    for _ in range(1 + choices.below(4)):
        places = _places(holder)
        container, key = places[choices.below(len(places))]
        action = choices.below(6)
        if action == 0 and container is not holder:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[choices.text()] = container.pop(key)
        elif action == 2:
            other, name = places[choices.below(len(places))]
            container[key] = copy.deepcopy(other[name])
        elif action == 3:
            container[key] = choices.text()
        else:
            container[key] = copy.deepcopy(HOSTILE[choices.below(len(HOSTILE))])
    return holder[0]


def _places(container: dict | list) -> list[tuple[dict | list, object]]:
    """Every value, as the container and key or index where it stands."""
    places = []
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        places.append((container, key))
        if isinstance(value, (dict, list)):
            places.extend(_places(value))
    return places
