"""What native libraries print of themselves, kept from a person's terminal: it goes to the log, which ``--verbose`` shows."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def to_log() -> Iterator[None]:
    """Send standard error, also what is not written through Python, to the log while the block runs."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as words:
        os.dup2(words.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            words.seek(0)
            for line in words.read().splitlines():
                logger.info("%s", line)
