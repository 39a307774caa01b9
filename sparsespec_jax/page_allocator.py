"""The pool of KV pages as plain integers: who holds which page. No jax."""


class OutOfPagesError(RuntimeError):
    """Raised when an allocation exceeds the free pages (a bug of the caller)."""


class PageAllocator:
    """Free list of `num_pages` page ids, with promises for growth to come.

    A promise sets pages aside for a request without choosing them, so that page by
    page growth can never fail half-way: `can_promise` asks, `promise` sets aside,
    `allocate` turns promised pages into ids, `free` gives both back.
    """

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # pop() gives low ids first
        self._held = {}  # owner -> page ids
        self._promised = {}  # owner -> pages it may still allocate
        self._num_promised = 0

    @property
    def num_free(self):
        """Pages held by nobody, promised ones included."""
        return len(self._free)

    @property
    def num_unpromised(self):
        """Pages that a new owner could be promised."""
        return len(self._free) - self._num_promised

    def can_promise(self, count):
        """True if `count` more pages can be set aside."""
        return count <= self.num_unpromised

    def promise(self, owner, count):
        """Set `count` pages aside for `owner`."""
        if not self.can_promise(count):
            raise OutOfPagesError(
                f"{owner} asks for {count} pages, {self.num_unpromised} of "
                f"{self.num_pages} are neither held nor promised"
            )
        self._promised[owner] = self._promised.get(owner, 0) + count
        self._num_promised += count
        self._held.setdefault(owner, [])

    def allocate(self, owner, count):
        """Return `count` page ids out of `owner`'s promise."""
        if count > self._promised.get(owner, 0):
            raise OutOfPagesError(
                f"{owner} asks for {count} pages, its promise has "
                f"{self._promised.get(owner, 0)} left"
            )
        pages = [self._free.pop() for _ in range(count)]
        self._promised[owner] -= count
        self._num_promised -= count
        self._held[owner].extend(pages)
        return pages

    def free(self, owner):
        """Take back every page and promise of `owner`."""
        self._free.extend(reversed(self._held.pop(owner)))
        self._num_promised -= self._promised.pop(owner)

    def held(self, owner):
        """Page ids that `owner` holds."""
        return tuple(self._held.get(owner, ()))
