"""Settings, checked in the same words everywhere."""

DTYPES = ('float32', 'bfloat16')  # of a computation


def check_choices(**choices):
  """Raises ValueError unless every value is one of those known.

  Args:
    **choices: full name of the setting, '__' for each dot -> (value, known).
  """
  for name, (value, known) in choices.items():
    if value not in known:
      raise ValueError(
        f'{name.replace("__", ".")} is {value!r}. Choose one of: '
        f'{", ".join(known)}.'
      )


def check_shares(**shares):
  """Raises ValueError unless every value lies in [0, 1]; names as above."""
  for name, value in shares.items():
    if not 0 <= value <= 1:
      raise ValueError(
        f'{name.replace("__", ".")} is {value}. It must lie in 0..1.'
      )
