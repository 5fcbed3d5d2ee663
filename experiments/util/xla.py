"""The compiler's flags, and its cache of programs."""

from importlib import metadata
import os
import pathlib

import jax

#: XLA's oneDNN convolutions on CPUs.
ONEDNN = ('xla_cpu_use_onednn', 'xla_cpu_experimental_onednn_custom_call')

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
  added = [f'--{name}=true' for name in ONEDNN if name not in given]
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
  """
  if folder is None:
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or (
        ONEDNN[1] in os.environ.get('XLA_FLAGS', '')):
      return
    root = os.environ.get('AWP_CACHE_DIR', '~/.cache/awp_jax')
    folder = root and str(pathlib.Path(root).expanduser() / 'programs')
    jax.config.update('jax_compilation_cache_max_size', CACHE_BYTES)
  jax.config.update('jax_compilation_cache_dir', folder or None)
