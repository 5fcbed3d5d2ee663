"""Opens a page in a headless browser and reports what it shows.

The browser opens a copy of the page with an added script and a policy that
forbids every request. The page itself has neither.
"""

import html
import json
import os
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, (
    'chromium', 'chromium-browser', 'google-chrome'))), None)


POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'; img-src data:; script-src 'unsafe-inline'\">")


SCRIPT = '''<script>
const seen = {errors: [], requests: []};
addEventListener('error', e => seen.errors.push(e.message || e.target.outerHTML
  .slice(0, 90)), true);
addEventListener('securitypolicyviolation', e => seen.requests.push(
  e.blockedURI));
addEventListener('load', () => {
  const all = query => [...document.querySelectorAll(query)];
  seen.width = innerWidth;
  seen.content = document.documentElement.scrollWidth;
  seen.dark = matchMedia('(prefers-color-scheme: dark)').matches;
  seen.resources = performance.getEntriesByType('resource')
    .map(e => e.name).filter(name => !name.startsWith('data:'));
  seen.figures = all('figure[id]').map(f => {
    const svg = f.querySelector('svg'), box = svg.getBoundingClientRect();
    return {name: f.id, width: box.width, height: box.height,
      right: box.right, paths: svg.querySelectorAll('path').length,
      text: svg.querySelectorAll('text').length};
  });
  seen.images = all('img').map(i => i.naturalWidth);
  seen.ink = getComputedStyle(document.querySelector('svg text')).fill;
  seen.page = getComputedStyle(document.body).backgroundColor;
  parent.postMessage(JSON.stringify(seen), '*');
});
</script>'''


#: A headless window is at least 500 pixels wide. A page in a frame sees the
#: width of the frame.
FRAME = '''<html><meta name="color-scheme" content="light dark"><body><script>
addEventListener('message', e => {
  const out = document.createElement('pre');
  out.id = 'seen';
  out.textContent = e.data;
  document.body.append(out);
});
</script><iframe src="page.html" style="border: 0; width: %dpx; height: 900px">
</iframe></body></html>'''


def browse(text, folder, width, dark=False):
  """Opens a page in a browser of that width; returns layout and console."""
  if BROWSER is None:
    pytest.skip('no chromium, chromium-browser or google-chrome on the PATH')
  (folder / 'page.html').write_text(
      text.replace('<head>', f'<head>{POLICY}{SCRIPT}', 1))
  path = folder / 'frame.html'
  path.write_text(FRAME % width)
  process = subprocess.run([
      BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run',
      '--disable-background-networking', '--disable-component-update',
      '--disable-sync', '--disable-dev-shm-usage', '--hide-scrollbars',
      f'--user-data-dir={folder / "profile"}', '--window-size=1500,900',
      f'--blink-settings=preferredColorScheme={0 if dark else 1}',
      '--enable-logging=stderr', '--virtual-time-budget=9000', '--dump-dom',
      path.as_uri()],
      capture_output=True, text=True, timeout=100, check=True,
      env=os.environ | {'HOME': str(folder)})
  found = re.search(r'<pre id="seen">(.*?)</pre>', process.stdout, re.S)
  assert found, process.stderr
  seen = json.loads(html.unescape(found[1]))
  seen['console'] = [
      line for line in process.stderr.splitlines() if 'CONSOLE' in line]
  return seen
