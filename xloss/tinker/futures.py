"""What the client's calls return: results that are there already, under the ways that code waits for them."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Generator
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Future(Generic[T]):
    """The result of a call that has run: ``result()``, ``await`` and tinker's other ways give it at once.

    A local model works on the thread that calls it, in the order of the calls. So a call that fails raises itself, and
    nothing after it, an optimizer step least of all, runs on what it left undone.
    """

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self, timeout: float | None = None) -> T:
        """The result; ``timeout`` is never reached."""
        return self._value

    async def result_async(self, timeout: float | None = None) -> T:
        """The result; ``timeout`` is never reached."""
        await asyncio.sleep(0)  # other tasks had no turn while the model worked
        return self._value

    async def coroutine(self) -> T:
        """The result as a coroutine, for ``asyncio.create_task``."""
        return await self.result_async()

    def future(self) -> concurrent.futures.Future[T]:
        """The result as a standard future."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        done.set_result(self._value)
        return done

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()


class Ready:
    """A client that is also the finished future of itself: tinker gives either where one is made, and code uses both.

    ``client.result()``, ``await client`` and the client itself are the same object.
    """

    def result(self, timeout: float | None = None) -> Self:
        """This client; ``timeout`` is never reached."""
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        """This client; ``timeout`` is never reached."""
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()
