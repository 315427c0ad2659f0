"""Check a page of sounds in a real browser: `python -m scripts.stress.page listen.html`; needs Chromium or Chrome.

At phone and desk width: every player loads a sound, every picture has pixels, every one of them has a name for those
who cannot see it, nothing is wider than the window, and nothing is said on the console.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

from nanochat.runtime import run_script
from nanochat.system.environment import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (390, 1280)  # CSS pixels: a phone, a desk
SHORTEST = 0.1  # seconds of a sound that counts as loaded

# A frame of exact width holds the page; what it finds is written into the document that the browser prints.
PROBE = """<!DOCTYPE html><iframe id="page" src="{url}" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="found"></pre><script>
const frame = document.getElementById("page"), seconds = s => new Promise(done => setTimeout(done, 1000 * s));
frame.onload = async () => {{
  const page = frame.contentDocument, all = name => [...page.querySelectorAll(name)];
  const sounds = await Promise.all(all("audio").map(sound => Promise.race([seconds(20), new Promise(done => {{
    sound.onloadedmetadata = sound.onerror = done; sound.preload = "metadata"; sound.load(); }})]).then(() =>
    ({{source: sound.getAttribute("src"), size: sound.duration || 0, named: !!sound.ariaLabel}}))));
  const pictures = await Promise.all(all("img").map(picture => {{ picture.loading = "eager";
    return picture.decode().catch(() => 0).then(() =>
    ({{source: picture.getAttribute("src"), size: picture.naturalWidth, named: !!picture.alt}})); }}));
  const wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  document.getElementById("found").textContent = JSON.stringify({{sounds, pictures, wide}}); }};
</script>"""


def main(argv: list[str] | None = None) -> None:
    """Print what loads. UserError without the page or a browser, and when there are faults."""
    parser = argparse.ArgumentParser(prog="scripts.stress.page", description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    page = parser.parse_args(argv).page
    if not page.is_file():
        raise UserError(f"page={str(page)!r}: there is no such file")
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise UserError(f"no browser on PATH ({', '.join(BROWSERS)}): install one, on Debian by apt install chromium")
    faults = []
    for width in WIDTHS:
        found, console = look(browser, page, width)
        faults += [f"{width} px, on the console: {line}" for line in console]
        faults += [f"{width} px: the page is {found['wide']} px too wide"] if found["wide"] > 0 else []
        for kind, least in (("sounds", SHORTEST), ("pictures", 1)):
            faults += [f"{width} px: {e['source']} does not load" for e in found[kind] if e["size"] < least]
            faults += [f"{width} px: {e['source']} has no name" for e in found[kind] if not e["named"]]
        counts = ", ".join(f"{len(found[kind])} {kind}" for kind in ("sounds", "pictures"))
        print(f"{width} px: {counts}")
    if faults:
        raise UserError(f"{page} has {len(faults)} faults: " + "; ".join(faults[:10]))
    print(f"{page}: every sound and picture loads")


def look(browser: str, page: Path, width: int) -> tuple[dict, list[str]]:
    """What the probe found in the page at this width, and the lines on the console."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.html"
        probe.write_text(PROBE.format(url=page.resolve().as_uri(), width=width), encoding="utf-8")
        command = [browser, "--headless=new", "--disable-gpu", f"--user-data-dir={folder}/profile"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no other way to start it
        command += ["--allow-file-access-from-files", "--disable-web-security", "--enable-logging=stderr"]
        command += ["--virtual-time-budget=30000", "--dump-dom", probe.as_uri()]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.+?)</pre>', ended.stdout, re.DOTALL)
    if found is None:
        raise UserError(f"{browser} did not look at {page} (exit code {ended.returncode}): {ended.stderr[-300:]}")
    return json.loads(unescape(found[1])), re.findall(r"INFO:CONSOLE.*", ended.stderr)


if __name__ == "__main__":
    run_script(main)
