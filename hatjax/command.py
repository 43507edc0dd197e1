"""How commands begin and end: one kind of help, pipes, exit codes."""

import os
import sys
import textwrap

HELP = ('--help', '-h', '-help', '--helpfull', '--helpshort', '-?')


def run(main):
  """The exit code of main(); whoever reads its output may leave early.

  A closed pipe (`| head -1`) ends it without a word, with 141 as in a shell.
  """
  try:
    try:
      return main()
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    # Python flushes once more when it exits, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def run_absl(main, parse, doc, groups):
  """As `run`, for a command that has absl's flags.

  Args:
    main: takes what is left of argv.
    parse: reads the flags.
    doc: what the command does, with examples.
    groups: {title: names of flags, with spaces between}, for --help.
  """
  from absl import app

  if any(word in HELP for word in sys.argv[1:]):
    return run(lambda: print(help_text(doc, groups)))
  return run(lambda: app.run(main, flags_parser=parse))


def help_text(doc, groups):
  """The docstring of a command and its flags, wrapped."""
  from absl import flags

  lines = [doc.strip()]
  for title, names in groups.items():
    lines += ['', f'{title}:']
    for name in names.split():
      flag = flags.FLAGS[name]
      shown = f'--[no]{name}' if flag.boolean else f'--{name}'
      text = ' '.join((flag.help or '').split())
      plain = flag.default in (None, '', False, ()) or 'default' in text
      text += '' if plain else f' (default: {flag.default})'
      lines += textwrap.wrap(
        text, 80, initial_indent=f'  {shown}'.ljust(24) + (
          ' ' if len(shown) > 21 else ''
        ), subsequent_indent=' ' * 24,
      )
  return '\n'.join(lines)
