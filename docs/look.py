"""Looks at the site in a browser, on a phone and on a desk: nothing may be wider than the window, no picture missing,
no file asked of another host and no script in error. Leaves a picture of each page in build/screenshots."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SITE, PICTURES = ROOT / "build" / "docs", ROOT / "build" / "screenshots"
PATIENCE = 120_000  # milliseconds, on a machine that others use as well
WIDTHS = {"phone": 390, "desk": 1440}
# What sticks out of the page to the right and is in nothing that scrolls by itself.
TOO_WIDE = """() => {
  const own = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
  const scrolls = e => e && (own(e) || scrolls(e.parentElement));
  return [...document.querySelectorAll("article *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement))
    .map(e => `${e.tagName.toLowerCase()} ${e.textContent.trim().slice(0, 60)}`).slice(0, 3);
}"""
MISSING = "() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"


def faults(page, address: str, errors: list[str]) -> list[str]:
    """What is wrong with the page as it stands in the window."""
    errors.clear()
    page.goto(address, wait_until="load")
    page.evaluate("() => document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_load_state("networkidle")
    wide = page.evaluate("() => document.scrollingElement.scrollWidth > innerWidth")
    return [
        *(["the page scrolls sideways"] if wide else []),
        *(f"too wide: {what}" for what in page.evaluate(TOO_WIDE)),
        *(f"no picture: {source}" for source in page.evaluate(MISSING)),
        *errors,
    ]


def look(names: list[str]) -> list[str]:
    """Faults of these pages at each width; pictures of them are left behind."""
    found: list[str] = []
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        # It would look for a proxy, which can take as long as a network that is not there.
        flags = ["--no-sandbox", "--no-proxy-server", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=browser_path, args=flags, timeout=PATIENCE)
        for device, width in WIDTHS.items():
            page, errors = browser.new_page(viewport={"width": width, "height": 900}), []
            page.set_default_timeout(PATIENCE)
            page.on("pageerror", lambda error, errors=errors: errors.append(f"script: {error}"))
            page.on("requestfailed", lambda r, errors=errors: errors.append(f"not loaded: {r.url}"))
            page.on(
                "request",
                lambda r, errors=errors: (
                    None
                    if r.url.startswith(("file:", "data:", "blob:"))
                    else errors.append(f"asked of another host: {r.url}")
                ),
            )
            for name in names:
                print(f"{name} at {width}", flush=True)
                found += [f"{name} at {width}: {fault}" for fault in faults(page, (SITE / name).as_uri(), errors)]
                page.screenshot(path=PICTURES / f"{name.replace('/', '-').removesuffix('.html')}-{device}.png")
        browser.close()
    return found


def main() -> int:
    pages = [path.relative_to(SITE).as_posix() for path in sorted(SITE.rglob("*.html"))]
    skipped = {"index.html", "genindex.html", "search.html"}
    names = [name for name in pages if name not in skipped and not name.startswith("_")]
    found = look(names)
    print(*found, f"{len(names)} pages at {len(WIDTHS)} widths, {len(found)} faults", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
