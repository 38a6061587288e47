"""Inbox: how long what a device sends is sure to be needed, whatever the devices' speeds.

    rank 0:  F0 >x F1 >y  <dx B0 F2 >z          once dx is here, rank 1 has finished B of 0: x is not needed any more
    rank 1:  <x F0 B0 >dx <y F1 ...             (y may still wait: nothing that rank 0 received was sent after its F1)

A message's memory is its sender's until the receiver has used it. The receiver may be late, so the sender must count it
until something that it receives was sent after that use (Lamport's happened-before, 1978). Sound for any speeds.
"""

from __future__ import annotations

from collections.abc import Mapping

from partita.program import Instruction, Program

Message = tuple[str, str, int, int, str, bool]


def message(sender: str, receiver: str, item: Instruction) -> Message:
    """What tells one message of a step from all others."""
    return sender, receiver, item.segment, item.microbatch, item.tensor, item.grad


def sure_releases(
    program: Program, puts_off: frozenset[int] = frozenset()
) -> dict[tuple[str, int], tuple[Message, ...]]:
    """(device, position of a RECV in its list) -> messages the device had sent that have certainly been used by then.

    Messages that are not listed may be needed to the end of the device's list. Lists that never end give what is known
    where they stop. ``puts_off``: segments whose W step needs what their B needed.
    """
    lists = dict(program.instructions)
    used_at = _used_at(program, lists, puts_off)
    known = {device: dict.fromkeys(lists, 0) for device in lists}
    position, sent = dict.fromkeys(lists, 0), dict[Message, dict[str, int]]()
    open_: dict[str, dict[Message, int]] = {device: {} for device in lists}
    result: dict[tuple[str, int], tuple[Message, ...]] = {}
    moved = True
    while moved:
        moved = False
        for device, items in lists.items():
            while position[device] < len(items):
                at, item = position[device], items[position[device]]
                if item.kind == "RECV":
                    key = message(item.peer, device, item)
                    if key not in sent:
                        break
                    mine = known[device]
                    for other, count in sent[key].items():
                        mine[other] = max(mine[other], count)
                    done = tuple(m for m, use in open_[device].items() if mine[m[1]] > use)
                    for m in done:
                        del open_[device][m]
                    if done:
                        result[device, at] = done
                position[device], known[device][device], moved = at + 1, at + 1, True
                if item.kind == "SEND" and item.peer in lists:
                    key = message(device, item.peer, item)
                    sent[key] = dict(known[device])
                    open_[device][key] = used_at.get(key, len(lists[item.peer]))
    return result


def _used_at(
    program: Program, lists: Mapping[str, tuple[Instruction, ...]], puts_off: frozenset[int]
) -> dict[Message, int]:
    """Message -> position in the receiver's list of the instruction that uses it last."""
    maker = {name: s for s, segment in enumerate(program.segments) for name in segment.outputs}
    readers: dict[str, set[int]] = {}
    for s, segment in enumerate(program.segments):
        for use in segment.uses:
            readers.setdefault(use.tensor, set()).add(s)
    result: dict[Message, int] = {}
    for device, items in lists.items():
        ran: dict[tuple[str, int, int], int] = {
            (i.kind, i.segment, i.microbatch): at
            for at, i in enumerate(items)
            if i.kind in ("F", "B") or (i.kind == "W" and i.segment in puts_off)
        }
        for item in items:
            if item.kind != "RECV":
                continue
            kinds = ("B", "W") if item.grad else ("F", "B", "W")
            users = {maker.get(item.tensor, -1)} if item.grad else readers.get(item.tensor, set())
            found = [ran[k, s, m] for k in kinds for s in users for m in (item.microbatch, -1) if (k, s, m) in ran]
            if found:
                result[message(item.peer, device, item)] = max(found)
    return result
