"""Work ahead of the consumer in a thread that ends with the iterator."""

import threading
from collections.abc import Generator, Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def prefetch(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """The items in their order, up to `depth` of them made ahead of time by a thread.

    The thread starts with the first item asked for and ends when the iterator is exhausted, closed or
    forgotten (a `break` does that). What `items` raises is raised here, traceback included, after the items
    before it.
    """
    ready: SimpleQueue = SimpleQueue()
    free = threading.Semaphore(depth)
    stop = threading.Event()
    work = (iter(items), ready, free, stop)
    thread = threading.Thread(target=_work, args=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            free.release()
            yield item
    finally:
        stop.set()
        free.release()
        thread.join()


def _work(items: Iterator, ready: SimpleQueue, free: threading.Semaphore, stop: threading.Event) -> None:
    try:
        while True:
            free.acquire()
            if stop.is_set():
                return
            item = next(items, _END)
            ready.put((item, None))
            if item is _END:
                return
    except BaseException as error:
        ready.put((None, error))
