"""The official archives of CIFAR-10, CIFAR-100 and SVHN, without TensorFlow.

TFDS's download manager fetches a file, shows the progress and compares size and
SHA-256 with those that TFDS registered. It works in a folder of its own, and
only a verified file is moved into `<place>/downloads/<name>/`, under the name
that TFDS itself gives it: an interrupted download leaves nothing behind that a
later one could take for whole, and a whole one is never fetched again.

Without a network TFDS tries for minutes, hence one short probe comes first. It
goes through the library that TFDS uses, so it meets the same proxies and
certificates.
"""

from collections.abc import Iterator, Sequence
import contextlib
import pathlib
import re
import shutil
import tempfile
import threading
import time

from experiments.data import archives
from experiments.data.archives import Archive, Checksum
from experiments.data.arrays import Arrays, DataError, one_line

#: Seconds that the probe waits for a connection, and then for an answer.
PROBE_TIMEOUTS = (4.0, 4.0)
#: Seconds after which the probe counts as failed, whatever it hangs in: looking
#: up a name knows no timeout, and each address of a host has its own.
PROBE_DEADLINE = 8.0
#: How often TFDS tries again after a good probe, instead of its 10 times.
RETRIES = 2

_STALE_SECONDS = 24 * 3600  # age at which a left-over folder is removed


def load(
    archive: Archive, places: Sequence[pathlib.Path],
    progress: bool = True) -> tuple[Arrays, str]:
  """Reads a data set from its official files, fetching those not at hand.

  Args:
    archive: which data set.
    places: folders whose `downloads/` may hold the files; missing ones are
      fetched into the first.
    progress: whether to show TFDS's progress bars.

  Returns:
    (images and labels as uint8 and integers, the paths of the files read).

  Raises:
    DataError: when a file can be neither found nor fetched, fails its
      checksum, or cannot be read.
  """
  paths = [fetch(archive, url, places, progress) for url in archive.urls]
  return archives.read(archive, paths), ', '.join(map(str, paths))


def fetch(
    archive: Archive, url: str, places: Sequence[pathlib.Path],
    progress: bool = True) -> pathlib.Path:
  """One verified file: from a place that holds it, or else from the network.

  A file put into `<place>/downloads/manual/` by hand, under the name it has in
  the URL, is verified and used where it lies.

  Args:
    archive: the data set.
    url: one of its URLs.
    places: see `load`.
    progress: whether to show progress bars.

  Returns:
    The path of the file.

  Raises:
    DataError: when there is no network or no such file, when the download
      breaks off, and for a wrong checksum; nothing is kept of such a download.
  """
  from tensorflow_datasets.core.download import resource

  checksum = archive.checksum(url)
  fname = resource.get_dl_fname(url, checksum.sha256)
  for place in places:
    path = place / 'downloads' / archive.name / fname
    if path.is_file() and path.stat().st_size == checksum.size:
      return path
  for place in places:
    path = place / 'downloads' / 'manual' / _basename(url)
    if path.is_file():
      _verify(path, str(path), checksum)
      return path
  probe(url)
  target = places[0] / 'downloads' / archive.name
  with _stage(target) as stage:
    fetched = _download(url, checksum, stage, progress)
    # The .INFO file is TFDS's own: with it TFDS, too, knows the file.
    resource.replace_info_file(fetched, target / fname)
    return fetched.replace(target / fname)


def _basename(url: str) -> str:
  return url.rsplit('/', 1)[-1]


@contextlib.contextmanager
def _stage(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder beside the final file that is gone afterwards, come what may."""
  try:
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob('incomplete-*'):  # of a run that was killed
      if time.time() - old.stat().st_mtime > _STALE_SECONDS:
        shutil.rmtree(old, ignore_errors=True)
    stage = pathlib.Path(tempfile.mkdtemp(prefix='incomplete-', dir=target))
  except OSError as error:
    raise DataError(
        f'{target} cannot be written ({_reason(error)}): name a writable '
        'folder as data_dir') from error
  try:
    yield stage
  finally:
    shutil.rmtree(stage, ignore_errors=True)


def _download(
    url: str, checksum: Checksum, stage: pathlib.Path,
    progress: bool) -> pathlib.Path:
  """Lets TFDS fetch and verify one file."""
  from tensorflow_datasets.core.download import checksums, download_manager
  from tensorflow_datasets.core.utils import Size

  info = checksums.UrlInfo(Size(checksum.size), checksum.sha256, _basename(url))
  with _limited(progress):
    manager = download_manager.DownloadManager(
        download_dir=stage, url_infos={url: info},
        force_checksums_validation=True)
    try:
      return pathlib.Path(manager.download(url))
    except download_manager.NonMatchingChecksumError:
      file = next(path for path in stage.rglob('*') if path.is_file())
      _verify(file, url, checksum)  # says the same in one line
      raise
    # Errors of requests, urllib3, TFDS and the file system.
    except Exception as error:
      raise DataError(
          f'the download of {url} broke off ({_reason(error)}) and nothing of '
          'it was kept') from error


def _verify(path: pathlib.Path, name: str, checksum: Checksum) -> None:
  """Raises DataError, calling the file `name`, unless it is what it must be."""
  from tensorflow_datasets.core.download import checksums

  info = checksums.compute_url_info(path)
  got = Checksum(int(info.size), info.checksum)
  if got != checksum:
    raise DataError(
        f'{name} has a wrong checksum: expected {checksum.size} bytes with '
        f'SHA-256 {checksum.sha256}, got {got.size} bytes with SHA-256 '
        f'{got.sha256}'
        + (' (it is cut off)' if got.size < checksum.size else ''))


@contextlib.contextmanager
def _limited(progress: bool) -> Iterator[None]:
  """TFDS with few retries, and with or without its progress bars."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import downloader

  before = downloader.MAX_RETRIES
  downloader.MAX_RETRIES = RETRIES
  tfds.display_progress_bar(progress)
  try:
    yield
  finally:
    downloader.MAX_RETRIES = before
    tfds.display_progress_bar(True)


def probe(url: str) -> None:
  """Asks for a file and drops the answer, to learn soon whether it is there.

  Args:
    url: of the file.

  Raises:
    DataError: when no good answer comes within `PROBE_DEADLINE` seconds.
  """
  import requests

  outcome: list[str] = []

  def ask() -> None:
    try:
      with requests.get(url, stream=True, timeout=PROBE_TIMEOUTS) as response:
        good = response.status_code == 200
        outcome.append('' if good else f'HTTP status {response.status_code}')
    except (requests.RequestException, ValueError) as error:
      outcome.append(_reason(error))

  # A thread, since there is no other way out of a stuck look-up of a name.
  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(PROBE_DEADLINE)
  problem = outcome[0] if outcome else f'no answer in {PROBE_DEADLINE:g} s'
  if problem:
    raise DataError(f'{url} cannot be reached ({problem})')


def _reason(error: BaseException) -> str:
  """An error in a few words: those of urllib3 nest several in one long line."""
  text = str(error)
  core = re.search(
      r"\[Errno -?\d+\] [^'\"()]+|IncompleteRead\([^)]*\)|timed out", text)
  if core and len(text) > 100:
    return f'{type(error).__name__}: {core.group()}'
  return one_line(error)
