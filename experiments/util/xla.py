"""The compiler's flags, and its cache of programs."""

from importlib import metadata
import os

#: The flags of XLA's oneDNN convolutions on CPUs.
ONEDNN = ('--xla_cpu_use_onednn=true',
          '--xla_cpu_experimental_onednn_custom_call=true')

#: Releases of jaxlib with these flags. XLA ends the process at a flag that it
#: does not know, and experimental flags come and go.
RELEASES = ('0.12.',)


def use_onednn() -> None:
  """Adds `ONEDNN` to XLA_FLAGS, unless they are there or jaxlib lacks them.

  They concern programs for the CPU: convolutions in bfloat16 become two to
  ten times as fast. XLA reads the flags when JAX first uses a device, so call
  this before.
  """
  if not metadata.version('jaxlib').startswith(RELEASES):
    return
  given = os.environ.get('XLA_FLAGS', '')
  added = [flag for flag in ONEDNN if flag.split('=')[0] not in given]
  if added:
    os.environ['XLA_FLAGS'] = ' '.join([given, *added]).strip()


#: Largest size of the cache in bytes; the oldest programs make room.
CACHE_BYTES = 4 * 10**9


def use_cache(folder: str | None) -> None:
  """Keeps compiled programs in a folder, for later runs.

  Args:
    folder: the folder; '' keeps none. None means that of
      JAX_COMPILATION_CACHE_DIR, which JAX reads itself, or else `programs` in
      AWP_CACHE_DIR (by default ~/.cache/awp_jax, and '' keeps none). With
      oneDNN there is no cache unless it is asked for: XLA 0.12 cannot store a
      program that calls oneDNN, and JAX warns of each.

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
        'onednn_custom_call' in os.environ.get('XLA_FLAGS', '')):
      return
    caches = paths.caches()
    folder = str(caches / 'programs') if caches else ''
    jax.config.update('jax_compilation_cache_max_size', CACHE_BYTES)
  try:
    if folder and '://' not in folder:
      os.makedirs(folder, exist_ok=True)
  except OSError as error:
    if not is_default:
      raise UserError(f'--compilation_cache={folder}: {error}') from error
    print(f'compiled programs are not kept ({error}): set AWP_CACHE_DIR to a '
          'folder that can be written, or to nothing.', flush=True)
    folder = ''
  jax.config.update('jax_compilation_cache_dir', folder or None)
