"""A Griffe extension: formulas in docstrings become code blocks.

Docstrings indent formulas and examples by two spaces, as the code does;
Markdown needs four.

https://mkdocstrings.github.io/griffe/guide/users/extending/
"""

import re
from typing import Any

import griffe

_SECTION = re.compile(r'[A-Z]\w+:$')


def indent_blocks(docstring: str) -> str:
  """Indents paragraphs outside sections by two more spaces if indented."""
  paragraphs, in_section = docstring.split('\n\n'), False
  for i, paragraph in enumerate(paragraphs):
    lines = paragraph.split('\n')
    if not lines[0].startswith(' '):
      in_section = bool(_SECTION.match(lines[0]))
    elif not in_section and all(line.startswith('  ') for line in lines):
      paragraphs[i] = '\n'.join(f'  {line}' for line in lines)
  return '\n\n'.join(paragraphs)


class IndentBlocks(griffe.Extension):
  """Applies `indent_blocks` to every docstring."""

  def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
    """Called by Griffe with each object after its members were loaded."""
    if obj.docstring:
      obj.docstring.value = indent_blocks(obj.docstring.value)
