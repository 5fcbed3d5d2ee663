"""Checkpoints whose background writes wait for the test."""

import asyncio
import threading

from orbax.checkpoint._src.serialization import serialization


def hold(monkeypatch, before=lambda is_released: None):
  """Holds the write of every array.

  Args:
    monkeypatch: of pytest.
    before: called before each write, with whether it is released already.

  Returns:
    The event that releases the writes, and a list with an entry for each write
    that was let through.
  """
  release, written = threading.Event(), []
  write = serialization.async_serialize_from_host

  async def late(*args, **kwargs):
    before(release.is_set())
    assert await asyncio.to_thread(release.wait, 60)
    written.append(1)
    return await write(*args, **kwargs)

  monkeypatch.setattr(serialization, 'async_serialize_from_host', late)
  return release, written
