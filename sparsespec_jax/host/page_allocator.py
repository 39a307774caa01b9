"""The pool of KV pages as plain integers, with reference counts. No jax."""


class OutOfPagesError(RuntimeError):
    """Raised when an allocation exceeds the free pages (a bug of the caller)."""


class PageAllocator:
    """Free list of `num_pages` page ids; a page is free once nobody refers to it.

    `allocate` hands out pages with one reference, `share` adds a reference for
    another reader of the same tokens, `free` drops one.
    """

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # low ids are last
        self._references = [0] * num_pages

    @property
    def num_free(self):
        """Pages that nobody refers to."""
        return len(self._free)

    def allocate(self, count):
        """Return `count` page ids."""
        if count > len(self._free):
            raise OutOfPagesError(
                f"{count} pages asked for, {len(self._free)} of {self.num_pages} free"
            )
        if not count:
            return []
        pages = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages):
        """Add a reference to each of `pages`, which are in use."""
        for page in pages:
            if not self._references[page]:
                raise OutOfPagesError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def free(self, pages):
        """Drop a reference to each of `pages`."""
        for page in reversed(pages):
            if not self._references[page]:
                raise OutOfPagesError(f"page {page} is free already")
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def references(self, page):
        """Requests that read `page`."""
        return self._references[page]
