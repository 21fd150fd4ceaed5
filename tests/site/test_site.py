"""The built site: it has every public name, and Chromium shows its pages without a fault."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any, ClassVar

import pytest

import fusedopt

SITE = Path(__file__).parents[2] / "build" / "site"
VISIT = Path(__file__).with_name("visit.html")
PAGES = sorted(page.relative_to(SITE).as_posix() for page in SITE.rglob("*.html"))
WIDTHS = [1280, 390]  # a desktop's and a telephone's
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(not PAGES, reason="no build/site: make test-site")


def test_every_public_name_is_in_the_index() -> None:
    from sphinx.util.inventory import InventoryFile

    with (SITE / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    documented = {name for kind, names in inventory.items() if kind[:3] == "py:" for name in names}
    public = {
        f"fusedopt.{name}"
        for name, x in vars(fusedopt).items()
        if not name.startswith("_") and not isinstance(x, ModuleType)
    }
    assert public <= documented
    assert "fusedopt.integrations.transformers.FusedClipping" in documented
    assert "fusedopt.integrations.lightning.FusedClipping" in documented


def test_nothing_is_fetched_from_elsewhere() -> None:
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"((?:https?:)?//[^\"]*)")
    for page in PAGES:
        assert not loads.findall((SITE / page).read_text()), page
    for style in SITE.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text()), style


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, and takes what the page that visits all others has seen."""

    missing: ClassVar[list[str]] = []
    found: ClassVar[Queue[Any]] = Queue()

    def do_GET(self) -> None:
        known = {
            "/visit": VISIT.read_bytes(),
            "/asked": json.dumps({"pages": PAGES, "widths": WIDTHS}).encode(),
        }
        if self.path not in known:
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(known[self.path])

    def do_POST(self) -> None:
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def send_error(self, *args: Any, **kwargs: Any) -> None:
        if self.path != "/favicon.ico":
            self.missing.append(self.path)
        super().send_error(*args, **kwargs)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


FLAGS = """
headless no-sandbox disable-gpu disable-quic no-first-run disable-sync disable-background-networking
disable-component-update enable-logging=stderr window-size=1400,1000
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a visit to every page, at every width, has found, with the lines of the console."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    home = tmp_path_factory.mktemp("chromium")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(SITE)))
    with server, (home / "stderr").open("w") as stderr:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = [f"--{flag}" for flag in [*FLAGS.split(), f"user-data-dir={home / 'data'}"]]
        visit = f"http://127.0.0.1:{server.server_port}/visit"
        browser = subprocess.Popen([CHROMIUM, *flags, visit], stdout=stderr, stderr=stderr)
        try:
            found: dict[str, Any] = Handler.found.get(timeout=300)
        finally:
            browser.terminate()
            browser.wait(timeout=30)
            server.shutdown()
    lines = (home / "stderr").read_text().splitlines()
    return {**found, "console": [line for line in lines if "CONSOLE" in line]}


def test_every_page_was_visited_at_every_width(seen: dict[str, Any]) -> None:
    visited = {(visit["page"], visit["width"]) for visit in seen["visits"]}
    assert visited == {(page, width) for page in PAGES for width in WIDTHS}


def test_the_console_is_empty(seen: dict[str, Any]) -> None:
    assert seen["console"] == []
    assert Handler.missing == []


def test_no_page_is_wider_than_its_window(seen: dict[str, Any]) -> None:
    assert [visit for visit in seen["visits"] if visit["wide"] > visit["width"]] == []


def test_pages_ask_this_server_alone(seen: dict[str, Any]) -> None:
    assert [visit["elsewhere"] for visit in seen["visits"] if visit["elsewhere"]] == []


def test_formulas_are_drawn_by_the_browser(seen: dict[str, Any]) -> None:
    formulas = {visit["page"]: visit["formulas"] for visit in seen["visits"]}
    assert formulas["choosing.html"] > 20
    assert all(formulas[f"optimizers/{name}.html"] > 0 for name in ("adam", "radam", "muon"))


def test_search_finds_a_page(seen: dict[str, Any]) -> None:
    assert any("optimizers/lookahead" in target for target in seen["search"])


def test_the_dark_site_is_dark_and_the_light_one_light(seen: dict[str, Any]) -> None:
    assert min(seen["light"]) > 200
    assert max(seen["dark"]) < 60
