"""page_readers.py PORT COUNT: that many pages at once, without browsers.

Says "COUNT pages are open", reads how many loads there will be, and says when every page knows of them. A process of
its own, so that the readers' work is not the watcher's.
"""

from __future__ import annotations

import asyncio
import json
import sys


class Page:
    """One stream of updates."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.loads = 0
        self.reported = asyncio.Condition()

    async def follow(self, port: int) -> None:
        """Reads until the stream ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        writer.write(f"GET /page/updates HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        while line := await reader.readline():
            if line.startswith(b"data: "):
                async with self.reported:
                    self.loads = json.loads(line[6:])["status"]["loads"]
                    self.is_open.set()
                    self.reported.notify_all()

    async def wait_for(self, loads: int) -> None:
        """Waits until so many loads were told."""
        async with self.reported:
            await self.reported.wait_for(lambda: self.loads == loads)


async def main(port: int, count: int) -> None:
    """Opens the pages, and says so; then waits for what standard input says."""
    pages = [Page() for _ in range(count)]
    following = [asyncio.create_task(page.follow(port)) for page in pages]
    await asyncio.gather(*(page.is_open.wait() for page in pages))
    print(f"{count} pages are open", flush=True)  # noqa: T201
    loads = int(await asyncio.to_thread(sys.stdin.readline))
    await asyncio.gather(*(page.wait_for(loads) for page in pages))
    print(f"{count} pages know of {loads} loads", flush=True)  # noqa: T201
    for task in following:
        task.cancel()


asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
