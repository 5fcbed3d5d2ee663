"""The fixtures' PyTorch names and layouts, as our parameter trees."""

import jax.numpy as jnp
import numpy as np

_NAMES = {'bias': 'bias', 'running_mean': 'mean', 'running_var': 'var'}


def variables(archive, prefix):
  """Parameters and statistics of a PreActResNet under a prefix."""
  out = {'params': {}, 'batch_stats': {}}
  for key in archive.files:
    if not key.startswith(prefix):
      continue
    value = np.asarray(archive[key])
    *path, leaf = key[len(prefix):].split('.')
    if path[0].startswith('layer'):
      path = [f'{path[0]}_{path[1]}', *path[2:]]
    if path[-1] == '0':  # the convolution inside of a shortcut
      path = path[:-1]
    if leaf == 'weight':
      name = 'scale' if path[-1].startswith('bn') else 'kernel'
      if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
      elif value.ndim == 2:
        value = value.T
    else:
      name = _NAMES[leaf]
    node = out['batch_stats' if leaf.startswith('running') else 'params']
    for part in path:
      node = node.setdefault(part, {})
    node[name] = jnp.asarray(value)
  return out
