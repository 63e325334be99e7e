"""What is made once per session: a browser."""

from pipeline.tests.browser import browser  # noqa: F401 (a fixture)
