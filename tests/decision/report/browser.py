"""Pages in a real browser: Chromium without a window shows a page in a frame of any width, and says what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SECONDS = 120
# A frame of a document's own source has its origin: the script around it can look into it, and the page stays as it is.
AROUND = """<!DOCTYPE html><meta charset="utf-8"><title>around</title><style>body {{ margin: 0 }}</style>
<iframe style="width: {width}px; height: {height}px; border: 0" srcdoc="{page}"></iframe>
<script>
const parse = (text) => {{
  const found = text.match(/[\\d.]+/g).map(Number);
  return found.length > 3 ? found : [...found, 1];
}};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const light = (color) => {{
  const [r, g, b] = color.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}};
const contrast = (a, b) => {{
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}};
const measure = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, view = frame.contentWindow;
  const ground = (element) => {{
    if (!element) return [255, 255, 255, 1];
    const own = parse(view.getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : over(own, ground(element.parentElement));
  }};
  const texts = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {{
    const element = walker.currentNode.parentElement, style = view.getComputedStyle(element);
    if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
    const color = parse(element.closest("svg") ? style.fill : style.color), behind = ground(element);
    texts.push([contrast(over(color, behind), behind), walker.currentNode.data.slice(0, 40)]);
  }}
  const plots = [...page.querySelectorAll("svg")].map((svg) => {{
    const shapes = [...svg.querySelectorAll("path, use, rect")].filter((shape) => {{
      const style = view.getComputedStyle(shape), box = shape.getBoundingClientRect();
      const painted = (style.fill !== "none" || style.stroke !== "none") && (box.width > 0 || box.height > 0);
      return painted && !shape.closest("defs");
    }});
    const box = svg.getBBox(), shown = svg.getBoundingClientRect();
    const scale = shown.width / svg.viewBox.baseVal.width;
    const size = (text) => parseFloat(view.getComputedStyle(text).fontSize) * scale;
    const sizes = [...svg.querySelectorAll("text")].map(size);
    return {{
      label: svg.getAttribute("aria-label"), width: box.width, height: box.height, shown: shown.width,
      shapes: shapes.length, smallest: Math.min(...sizes),
    }};
  }});
  const tables = [...page.querySelectorAll("table")].map((table) => table.getBoundingClientRect().height);
  return {{
    title: page.title, ground: parse(view.getComputedStyle(page.body).backgroundColor), plots, tables,
    width: page.documentElement.clientWidth, overflow: page.documentElement.scrollWidth,
    contrast: texts.sort((a, b) => a[0] - b[0]).slice(0, 5), texts: texts.length,
    height: page.documentElement.scrollHeight,
  }};
}};
window.onload = () => {{
  const shown = document.createElement("pre");
  shown.id = "measured";
  shown.textContent = JSON.stringify(measure());
  document.body.append(shown);
}};
</script>
"""


def show(page: str, folder: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What Chromium shows of a page that is `width` pixels wide, and what it says on its console."""
    around = folder / f"around-{width}-{dark}.html"
    around.write_text(AROUND.format(width=width, height=2_000, page=escape(page)), encoding="utf-8")
    done = _run(folder, "--dump-dom", around.as_uri(), dark=dark)
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2_000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(unescape(found[1])), "console": console}


def picture(page: str, folder: Path, name: str, size: tuple[int, int], *, dark: bool = False) -> Path:
    """A screenshot of a page in a frame, from its top."""
    around = folder / f"{name}.html"
    around.write_text(AROUND.format(width=size[0], height=size[1], page=escape(page)), encoding="utf-8")
    file = folder / f"{name}.png"
    window = f"--window-size={max(size[0], 500)},{size[1]}"  # a window has a least width
    _run(folder, f"--screenshot={file}", window, "--hide-scrollbars", around.as_uri(), dark=dark)
    return file


def _run(folder: Path, *arguments: str, dark: bool) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--host-resolver-rules=MAP * ~NOTFOUND", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
