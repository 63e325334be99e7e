"""The two ways a device test ends badly on purpose. Anything else that reaches the person is a bug."""

from __future__ import annotations


class DeviceTestError(Exception):
    """The person's mistake: one line that ends in what to do next. Exit code 2."""


class ArtifactFailure(Exception):
    """The artifact or its runtime did wrong: refused to open, raised, or answered with broken logits. Exit code 1."""
