"""Downloads the official files of CIFAR and SVHN without TensorFlow.

TFDS's download manager fetches a file, shows the progress and verifies size and
SHA-256. It writes to a temporary folder. Only a verified file is moved to
`<place>/downloads/<name>/`, under TFDS's name for it. An interrupted download
leaves no partial file there, and a complete file is never fetched again.

Without a network TFDS retries for minutes, so a short probe runs first. It uses
the same HTTP library as TFDS, hence the same proxies and certificates.
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

#: Timeouts of the probe in seconds, for the connection and for the response.
PROBE_TIMEOUTS = (4.0, 4.0)
#: Deadline of the whole probe in seconds. A name look-up has no timeout, and
#: the connection timeout applies to each address of a host.
PROBE_DEADLINE = 8.0
#: Number of TFDS's retries after a successful probe; TFDS's default is 10.
RETRIES = 2

_STALE_SECONDS = 24 * 3600  # age at which an old temporary folder is removed


def load(
    archive: Archive, places: Sequence[pathlib.Path],
    progress: bool = True) -> tuple[Arrays, str]:
  """Reads a data set from its official files, downloading missing ones.

  Args:
    archive: the data set.
    places: folders whose `downloads/` may contain the files; missing ones are
      downloaded to the first.
    progress: whether to show TFDS's progress bars.

  Returns:
    (images and labels as uint8 and integers, the paths of the files read).

  Raises:
    DataError: if a file cannot be found or downloaded, fails its checksum, or
      is unreadable.
  """
  paths = [fetch(archive, url, places, progress) for url in archive.urls]
  return archives.read(archive, paths), ', '.join(map(str, paths))


def fetch(
    archive: Archive, url: str, places: Sequence[pathlib.Path],
    progress: bool = True) -> pathlib.Path:
  """Finds or downloads one verified file.

  A file saved by hand as `<place>/downloads/manual/<name in the URL>` is
  verified and used in place.

  Args:
    archive: the data set.
    url: one of its URLs.
    places: see `load`.
    progress: whether to show progress bars.

  Returns:
    The path of the file.

  Raises:
    DataError: without a network, for a missing file, an interrupted download
      or a wrong checksum. Nothing is kept of such a download.
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
    # With its .INFO file, TFDS also finds the file.
    resource.replace_info_file(fetched, target / fname)
    return fetched.replace(target / fname)


def _basename(url: str) -> str:
  return url.rsplit('/', 1)[-1]


@contextlib.contextmanager
def _stage(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary folder next to the final file, always removed afterwards."""
  try:
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob('incomplete-*'):  # left by killed processes
      if time.time() - old.stat().st_mtime > _STALE_SECONDS:
        shutil.rmtree(old, ignore_errors=True)
    stage = pathlib.Path(tempfile.mkdtemp(prefix='incomplete-', dir=target))
  except OSError as error:
    raise DataError(
        f'{target} is not writable ({_reason(error)}): set data_dir to a '
        'writable folder') from error
  try:
    yield stage
  finally:
    shutil.rmtree(stage, ignore_errors=True)


def _download(
    url: str, checksum: Checksum, stage: pathlib.Path,
    progress: bool) -> pathlib.Path:
  """Downloads and verifies one file with TFDS."""
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
      _verify(file, url, checksum)  # raises a one-line error
      raise
    # Errors of requests, urllib3, TFDS and the file system.
    except Exception as error:
      raise DataError(
          f'the download of {url} failed ({_reason(error)}); nothing of it was '
          'kept') from error


def _verify(path: pathlib.Path, name: str, checksum: Checksum) -> None:
  """Raises DataError unless the file, called `name`, matches its checksum."""
  from tensorflow_datasets.core.download import checksums

  info = checksums.compute_url_info(path)
  got = Checksum(int(info.size), info.checksum)
  if got != checksum:
    raise DataError(
        f'{name} has a wrong checksum: expected {checksum.size} bytes with '
        f'SHA-256 {checksum.sha256}, got {got.size} bytes with SHA-256 '
        f'{got.sha256}'
        + (' (it is truncated)' if got.size < checksum.size else ''))


@contextlib.contextmanager
def _limited(progress: bool) -> Iterator[None]:
  """Sets TFDS's number of retries and its progress bars."""
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
  """Requests a file and discards the response, to fail fast.

  Args:
    url: the URL of the file.

  Raises:
    DataError: without a successful response within `PROBE_DEADLINE` seconds.
  """
  import requests

  outcome: list[str] = []

  def request() -> None:
    try:
      with requests.get(url, stream=True, timeout=PROBE_TIMEOUTS) as response:
        is_ok = response.status_code == 200
        outcome.append('' if is_ok else f'HTTP status {response.status_code}')
    except (requests.RequestException, ValueError) as error:
      outcome.append(_reason(error))

  # In a thread, because a stuck name look-up cannot be interrupted otherwise.
  thread = threading.Thread(target=request, daemon=True)
  thread.start()
  thread.join(PROBE_DEADLINE)
  problem = outcome[0] if outcome else f'no response in {PROBE_DEADLINE:g} s'
  if problem:
    raise DataError(f'{url} cannot be reached ({problem})')


def _reason(error: BaseException) -> str:
  """Shortens an error; urllib3 nests several errors in one long line."""
  text = str(error)
  core = re.search(
      r"\[Errno -?\d+\] [^'\"()]+|IncompleteRead\([^)]*\)|timed out", text)
  if core and len(text) > 100:
    return f'{type(error).__name__}: {core.group()}'
  return one_line(error)
