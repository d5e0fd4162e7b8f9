"""A proxy that keeps what a client sent and what it got: bytes pass unchanged, both ways."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Exchange:
    """A request and its answer. `body` is JSON where it can be read as such, else text."""

    line: str
    headers: dict[str, str]
    body: Any
    answer: bytes = b""

    @property
    def path(self) -> str:
        return self.line.split()[1]

    @property
    def content(self) -> str:
        return self.answer.partition(b"\r\n\r\n")[2].decode(errors="replace")

    @property
    def status(self) -> int:
        return int(self.answer.split(b" ", 2)[1]) if self.answer.startswith(b"HTTP/") else 0


@dataclass
class Record:
    """All exchanges of a recorder, in the order their requests came."""

    url: str
    exchanges: list[Exchange] = field(default_factory=list)

    def refusals(self) -> list[str]:
        """One line for each answer of 400 and above."""
        return [f"{e.line} -> {e.status} {e.content[:600]}" for e in self.exchanges if e.status >= 400]

    def write(self, path: Path) -> None:
        """One exchange a line, as JSON."""
        lines = [
            {"request": e.line, "headers": e.headers, "body": e.body, "answer": e.answer.decode(errors="replace")}
            for e in self.exchanges
        ]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


@contextmanager
def recording(port: int) -> Iterator[Record]:
    """A recorder before the server at `port`, on a free port of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="recorder", daemon=True)
    thread.start()
    record = Record("")
    server = asyncio.run_coroutine_threadsafe(_listen(port, record), loop).result(10)
    record.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield record
    finally:
        asyncio.run_coroutine_threadsafe(_close(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _listen(port: int, record: Record) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
        answers = asyncio.create_task(_answers(up_reader, writer, pending := []))
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while (exchange := await _request(reader, up_writer)) is not None:
                record.exchanges.append(exchange)
                pending.append(exchange)
        up_writer.close()
        with suppress(ConnectionError):
            await answers
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)


async def _close(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _request(reader: asyncio.StreamReader, upstream: asyncio.StreamWriter) -> Exchange | None:
    """Pass one request on; None at the end of the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    upstream.write(head)
    line, *rest = head.decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in rest)}
    if headers.get("transfer-encoding") == "chunked":
        body = await _chunks(reader, upstream)
    else:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        upstream.write(body)
    await upstream.drain()
    try:
        content: Any = json.loads(body) if body else None
    except ValueError:
        content = body.decode(errors="replace")
    return Exchange(line, headers, content)


async def _chunks(reader: asyncio.StreamReader, upstream: asyncio.StreamWriter) -> bytes:
    body = b""
    while True:
        size = await reader.readline()
        chunk = await reader.readexactly(int(size.split(b";")[0], 16) + 2)
        upstream.write(size + chunk)
        body += chunk[:-2]
        if len(chunk) == 2:
            return body


async def _answers(upstream: asyncio.StreamReader, client: asyncio.StreamWriter, pending: list[Exchange]) -> None:
    """Pass answers on; bytes belong to the request sent last, since clients wait for an answer before the next one."""
    while data := await upstream.read(1 << 16):
        if pending:
            pending[-1].answer += data
        with suppress(ConnectionError):
            client.write(data)
            await client.drain()
