"""The cases that `accelerator.py` measures."""

from typing import NamedTuple

METHODS = {'AT': 0.0, 'AT-AWP': 0.01}
NETWORKS = {'preact_resnet': (18, 64), 'wide_resnet': (34, 10)}
PRECISIONS = ('float32', 'tf32', 'bfloat16')
STATISTICS = ('perturbed', 'reference')
VARIANTS = ('eager', 'tuned', 'compiled')

#: In order of importance: a budget cuts off the end.
OURS = (
    'preact_resnet:AT-AWP:128:bfloat16:perturbed',
    'preact_resnet:AT-AWP:128:bfloat16:reference',
    'preact_resnet:AT-AWP:128:tf32:reference',
    'preact_resnet:AT-AWP:128:float32:reference',
    'preact_resnet:AT:128:bfloat16:perturbed',
    'wide_resnet:AT-AWP:128:bfloat16:perturbed',
    'preact_resnet:AT-AWP:512:bfloat16:perturbed',
    'wide_resnet:AT:128:bfloat16:perturbed',
    'wide_resnet:AT-AWP:128:tf32:reference',
    'preact_resnet:AT:128:tf32:reference',
    'preact_resnet:AT-AWP:512:tf32:reference',
    'wide_resnet:AT-AWP:512:bfloat16:perturbed',
)
TORCH = (
    'preact_resnet:AT-AWP:128:tf32:eager',
    'preact_resnet:AT-AWP:128:bfloat16:tuned',
    'preact_resnet:AT:128:tf32:eager',
    'wide_resnet:AT-AWP:128:tf32:eager',
    'wide_resnet:AT-AWP:128:bfloat16:tuned',
    'preact_resnet:AT-AWP:512:bfloat16:tuned',
    'preact_resnet:AT-AWP:128:bfloat16:compiled',
)


class Case(NamedTuple):
  """One measured step; `kind` is a policy of statistics or a variant."""

  network: str
  method: str
  batch_size: int
  precision: str
  kind: str


def parse_case(text: str, batch_size: int = 0) -> Case:
  """Reads NETWORK:METHOD:BATCH:PRECISION:KIND.

  Args:
    text: a case of the command line.
    batch_size: replaces that of the case, unless it is 0.

  Returns:
    The case.

  Raises:
    ValueError: for a wrong number of parts or an unknown name.
  """
  parts = text.split(':')
  allowed = (NETWORKS, METHODS, None, PRECISIONS, (*STATISTICS, *VARIANTS))
  if len(parts) != 5 or not parts[2].isdecimal() or any(
      names is not None and part not in names
      for part, names in zip(parts, allowed, strict=True)):
    raise ValueError(
        f'a case is NETWORK:METHOD:BATCH:PRECISION:KIND with '
        f'{", ".join(NETWORKS)}; {", ".join(METHODS)}; a number; '
        f'{", ".join(PRECISIONS)}; {", ".join((*STATISTICS, *VARIANTS))}; got '
        f'{text!r}.')
  return Case(
      parts[0], parts[1], batch_size or int(parts[2]), parts[3], parts[4])
