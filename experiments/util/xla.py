"""The compiler's flags, and its cache of programs."""

import contextlib
from importlib import metadata
import os
import pathlib
import sys

#: The flags of XLA's oneDNN convolutions on CPUs.
ONEDNN = ('--xla_cpu_use_onednn=true',
          '--xla_cpu_experimental_onednn_custom_call=true')

#: Largest size of the cache in bytes; the oldest programs make room.
CACHE_BYTES = 4 * 10**9

#: Programs that compile faster are not kept. JAX's own limit of one second
#: leaves out most of the dozens of small programs of a run.
CACHE_SECONDS = 0.1

#: Releases of jaxlib with these flags. XLA ends the process at a flag that it
#: does not know, and experimental flags come and go.
RELEASES = ('0.12.',)


def use_onednn() -> None:
  """Sets XLA_FLAGS as `with_onednn` says.

  XLA reads the flags when JAX first uses a device, so call this before.
  """
  given = os.environ.get('XLA_FLAGS', '')
  wanted = with_onednn(given, metadata.version('jaxlib'))
  if wanted != given:
    os.environ['XLA_FLAGS'] = wanted


def with_onednn(flags: str, jaxlib: str) -> str:
  """Flags of XLA with those of `ONEDNN` that are not among them.

  They concern programs for the CPU, whose plain convolutions in bfloat16 become
  1.7 to ten times as fast.

  Args:
    flags: as in XLA_FLAGS.
    jaxlib: the release that reads them; others than `RELEASES` get no more.

  Returns:
    The flags.
  """
  if not jaxlib.startswith(RELEASES):
    return flags
  given = _values(flags)
  added = [flag for flag in ONEDNN if flag.partition('=')[0] not in given]
  return ' '.join([flags, *added]).strip()


def _values(flags: str) -> dict[str, str]:
  """The value of each flag, '' without one."""
  return {name: value for name, _, value in (
      flag.partition('=') for flag in flags.split())}


def _calls_onednn() -> bool:
  value = _values(os.environ.get('XLA_FLAGS', '')).get(
      ONEDNN[1].partition('=')[0], 'false')
  return value.lower() not in ('false', '0')


def use_cache(folder: str | None) -> None:
  """Keeps compiled programs in a folder, for later runs.

  Args:
    folder: the folder; '' keeps none. None means that of
      JAX_COMPILATION_CACHE_DIR, which JAX reads itself, or else `programs` in
      AWP_CACHE_DIR (by default ~/.cache/awp_jax, and '' keeps none). On CPUs
      with oneDNN there is no cache unless it is asked for: XLA 0.12 cannot
      store a program that calls oneDNN, and JAX warns of each.

  Raises:
    UserError: if `folder` is local and cannot be made. If the default cannot,
      a line says so and there is no cache.
  """
  # The flags need none of these.
  import jax

  from experiments.util import paths
  from experiments.util.errors import UserError

  is_default = folder is None
  if folder is None:
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or (
        _calls_onednn() and jax.default_backend() == 'cpu'):
      return
    caches = paths.caches()
    folder = str(caches / 'programs') if caches else ''
    for name, value in (
        ('jax_compilation_cache_max_size', CACHE_BYTES),
        ('jax_persistent_cache_min_compile_time_secs', CACHE_SECONDS)):
      if name.upper() not in os.environ:
        jax.config.update(name, value)
  folder = os.path.expanduser(folder)
  try:
    if folder and '://' not in folder:
      os.makedirs(folder, exist_ok=True)
  except OSError as error:
    if not is_default:
      raise UserError(f'--compilation_cache={folder}: {error}') from error
    print(f'compiled programs are not kept ({error}): set AWP_CACHE_DIR to a '
          'folder that can be written, or to nothing.', file=sys.stderr)
    folder = ''
  if is_default and folder:
    _remove_parts(pathlib.Path(folder))
  jax.config.update('jax_compilation_cache_dir', folder or None)


def _remove_parts(folder: pathlib.Path) -> None:
  """Removes programs that a killed process wrote in part.

  JAX writes the time of use after the program. A program without one stops all
  later writes to a cache of limited size.
  """
  import filelock

  with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(
      folder / '.lockfile', timeout=1):
    for program in folder.glob('*-cache'):
      if not program.with_name(f'{program.name[:-5]}atime').exists():
        program.unlink()
