# SPDX-License-Identifier: Apache-2.0
"""Work with files beside the event loop, in a thread of Moat's own.

The threads of ``asyncio.to_thread`` are few, and LiteLLM fills them with its callbacks: a gateway that waits for one of
them serves and seems silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class SideThread:
    """One thread; it is started by the first work.

    Args:
        name: of the thread, for a dump of all of them.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        """Return what the work returns; works are done one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Take no more work, and drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
