"""The bodies of the hooks on the radix tree, for releases whose calls take one `params` object (0.5). A second tree that
the cache-aware policies keep for the queue is left out. For the age of what is evicted, the probe keeps the time of the
last match or insert through each KV slot, where the slots are numbers in the CPU's memory; asking a GPU would cost more
than the answer is worth, and there the time is that of the last match or insert that ended at the node."""

from __future__ import annotations

import sys

from labprobe.observer import Observer, now


class Touched:
    """When each node, or each slot, was last gone through."""

    def __init__(self) -> None:
        self._nodes: dict[object, int] = {}
        self._slots: object = None

    def note(self, node: object, slots: object) -> None:
        """A match or an insert went through `slots`, a tensor of KV slots, and ended at `node`."""
        moment = now()
        self._nodes[node] = moment
        if slots is None or slots.device.type != "cpu" or not len(slots):
            return
        torch = sys.modules["torch"]
        highest = int(slots.max())
        if self._slots is None or len(self._slots) <= highest:
            grown = torch.zeros(2 * (highest + 1), dtype=torch.int64)
            if self._slots is not None:
                grown[: len(self._slots)] = self._slots
            self._slots = grown
        self._slots[slots] = moment

    def age(self, node: object, slots: object) -> tuple[int | None, str]:
        """Nanoseconds since then, and what "then" is of: "path", or "end" where the slots are not to be seen."""
        last = self._nodes.pop(node, 0)
        of = "end"
        if slots is not None and self._slots is not None and slots.device.type == "cpu":
            last, of = int(self._slots[slots].max()), "path"
        return (now() - last if last else None), of

    def forget(self) -> None:
        self._nodes.clear()
        self._slots = None


def name_of(node: object) -> object:
    """A node as a number: the unified tree's handles are numbers, others have an `id`."""
    return node if isinstance(node, int) or node is None else getattr(node, "id", None)


class TreeBodies:
    """Around the methods of the tree."""

    def __init__(self, observer: Observer) -> None:
        self.o = observer
        self.touched = Touched()

    def ours(self, tree: object) -> bool:
        return id(tree) in self.o.trees

    def nothing(self, *args: object, **kwargs: object) -> None:
        return None

    def begin(self, *args: object, **kwargs: object) -> int:
        return now()

    def evicted(
        self, start: int, result: object, tree: object, params: object, *args: object, **kw: object
    ) -> None:
        if self.ours(tree):
            self.note_evicted(start, params.num_tokens, result.num_tokens_evicted)

    def note_evicted(self, start: int, wanted: int, tokens: int) -> None:
        took = now() - start
        free, _ = self.o.pools.free_and_evictable()
        self.o.put(("evict", now(), wanted, tokens, took, free, *self.o.pools.tree()))

    def matched(
        self, token: object, result: object, tree: object, params: object, *args: object, **kw: object
    ) -> None:
        if self.ours(tree):
            rid = params.req.rid if params.req is not None else None
            self.note_match(rid, result.last_device_node, len(params.key), result.device_indices)

    def note_match(self, rid: object, node: object, key_tokens: int, slots: object) -> None:
        name = name_of(node)
        # The policies' matches move nodes in the tree's order too, so they count as touches.
        self.touched.note(name, slots)
        why = self.o.why_match
        self.o.put(("match", now(), why, rid, name, key_tokens, len(slots), *self.o.pools.tree()))

    def inserted(
        self, token: object, result: object, tree: object, params: object, *args: object, **kw: object
    ) -> None:
        if self.ours(tree):
            key = len(params.key)
            new = max(0, key - result.prefix_len)
            self.note_insert(getattr(result, "last_device_node", None), key, new, params.value)

    def note_insert(self, node: object, key_tokens: int, new: int, slots: object) -> None:
        name = name_of(node)
        self.touched.note(name, slots)
        self.o.put(("insert", now(), self.o.why_insert, name, key_tokens, new, *self.o.pools.tree()))

    def store_begins(self, *args: object, **kwargs: object) -> None:
        self.o.why_match = self.o.why_insert = "store"

    def store_ends(self, *args: object, **kwargs: object) -> None:
        self.o.why_match, self.o.why_insert = "schedule", "finish"

    def leaf_begins(
        self, tree: object, node: int, tracker: dict[object, int], *args: object
    ) -> tuple[object, ...]:
        component = tree.tree_components[0]
        slots = tree.tree_core.get_component_device_value(node, component)
        return component, tracker.get(component, 0), *self.touched.age(node, slots)

    def leaf_ends(
        self,
        token: tuple[object, ...],
        result: object,
        tree: object,
        node: int,
        tracker: dict[object, int],
        *a: object,
    ) -> None:
        component, before, age_ns, of = token
        self.o.put(("evict_node", now(), node, tracker.get(component, 0) - before, age_ns, of))
