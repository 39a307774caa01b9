"""The rows of K and V that an engine keeps of its texts, as bytes."""

import numpy as np

from sparsespec_jax import Engine


class ReadableEngine(Engine):
    """An Engine whose KV rows can be read while it is paused."""

    def running(self):
        """Requests that hold a slot and all of their pages, by request id."""
        return {
            request.request_id: request
            for request in self._scheduler.slots
            if request is not None and request.is_seeded
        }

    def kv_rows(self, request, count):
        """KV rows uint8 [layers, count, bytes] of the first tokens of a request."""
        state, size = self.device_steps.state, self.shape.page_size
        pages = np.asarray(state.full_table[request.slot, : -(-count // size)])
        layers = []
        for layer in state.layers:
            rows = np.asarray(layer.kv_pages[pages]).swapaxes(1, 2)  # page, row, head
            rows = np.ascontiguousarray(rows.reshape(-1, *rows.shape[2:])[:count])
            layers.append(rows.view(np.uint8).reshape(count, -1))
        return np.stack(layers)


def compare(one, other):
    """How many KV rows of the texts in both engines have the same bytes.

    one, other: paused ReadableEngines that got the same requests in the same order.

    Returns:
        {"kv_texts", "kv_rows", "identical_kv_rows"}; a row is of one layer.
    """
    running = one.running(), other.running()
    found = {"kv_texts": 0, "kv_rows": 0, "identical_kv_rows": 0}
    for request_id in sorted(set(running[0]) & set(running[1])):
        requests = [requests[request_id] for requests in running]
        count = min(request.committed for request in requests)
        rows = [
            engine.kv_rows(request, count)
            for engine, request in zip((one, other), requests, strict=True)
        ]
        found["kv_texts"] += 1
        found["kv_rows"] += rows[0].shape[0] * count
        found["identical_kv_rows"] += int((rows[0] == rows[1]).all(-1).sum())
    return found
