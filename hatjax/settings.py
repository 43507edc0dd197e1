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


def check_model(method, **known):
  """Checks a method's settings, `dtype` and `microbatches` among them.

  Args:
    method: has them as attributes.
    **known: setting name -> the values it may have.

  Raises:
    ValueError: names the setting, model.<name>.
  """
  known |= {'dtype': DTYPES}
  check_choices(**{
    f'model.{name}': (getattr(method, name), values)
    for name, values in known.items()
  })
  if method.microbatches < 1:
    raise ValueError(
      f'model.microbatches is {method.microbatches}. Use 1, or more to compute '
      'a step in as many parts.'
    )


def check_shares(**shares):
  """Raises ValueError unless every value lies in [0, 1]; names as above."""
  for name, value in shares.items():
    if not 0 <= value <= 1:
      raise ValueError(
        f'{name.replace("__", ".")} is {value}. It must lie in 0..1.'
      )
