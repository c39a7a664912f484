"""Where the ranks of a script meet: at the store of the torchrun that has started them, whatever
address and port the script names.

torchrun lets no rank open a port of its own, so ranks that look for one where the script says would
wait for half an hour; and a port that stands in a script is taken by whoever else runs it on the
same machine.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock
from urllib.parse import urlparse

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def at_torchrun(note: Callable[[str], None]) -> Iterator[None]:
    """Inside, all ranks of the job meet where torchrun's own variables say. `note` is told if the
    script has named another port."""
    distributed_c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")  # typed, it exports nothing of its own
    own = {name: os.environ[name] for name in ADDRESS}
    everybody = (-1, int(os.environ["WORLD_SIZE"]))
    real = distributed_c10d.rendezvous

    def rendezvous(url: str, rank: int = -1, world_size: int = -1, **kwargs: Any) -> Any:
        named = urlparse(url)
        if named.scheme not in ("env", "tcp") or world_size not in everybody:
            return real(url, rank, world_size, **kwargs)
        port = str(named.port) if named.scheme == "tcp" else os.environ.get("MASTER_PORT", own["MASTER_PORT"])
        if port != own["MASTER_PORT"]:
            note(f"the ranks met at a port of torchrun's, not at {port}, which the script names")
        with mock.patch.dict(os.environ, own):
            return iter([next(real("env://", rank, world_size, **kwargs))])

    with mock.patch.object(distributed_c10d, "rendezvous", rendezvous):
        yield
