"""Samples of one prompt, and whose pages another of them may read. No jax."""

from sparsespec_jax.host.request import Status


class PromptGroups:
    """The requests in slots by prompt group; those without a group are left out."""

    def __init__(self):
        self._members = {}

    def add(self, request):
        """Note that a request holds a slot."""
        if request.prompt_group is not None:
            self._members.setdefault(request.prompt_group, []).append(request)

    def remove(self, request):
        """Note that a request holds its slot no longer."""
        if request.prompt_group is None:
            return
        members = self._members[request.prompt_group]
        members.remove(request)
        if not members:
            del self._members[request.prompt_group]

    def owner(self, request):
        """(another sample whose prompt is in the pool or None, True if to wait for it)

        Of samples that all have the prompt before them the oldest goes first.
        """
        others = [r for r in self._members[request.prompt_group] if r is not request]
        for other in others:
            if other.status in (Status.READY, Status.RUNNING):
                return other, False
        return None, any(
            other.status is Status.PREFILL and other.request_id < request.request_id
            for other in others
        )
