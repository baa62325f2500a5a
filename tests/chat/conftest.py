"""A headless browser for the tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from headless import Browser, headless_browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a headless Chromium, or skip."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(
                f"{program} is not installed (Debian: apt install chromium chromium-driver)"
            )
    with headless_browser(tmp_path_factory.mktemp("profile")) as running:
        yield running
