"""The judge learns people and expressions; parts of a batch change nothing."""

import jax
import numpy as np
import optax

from configs.methods import face_classifier as config
from hatjax import methods, state


def make(microbatches=1, tx=None):
  stage = config.get_stage('tiny', 16, {'name': 'none'}).to_dict()
  stage['model']['microbatches'] = microbatches
  method = methods.make(stage, num_labels=2, image_size=16)
  if tx:
    object.__setattr__(method, 'tx', {'judge': tx})
  return method


def batch():
  """Four clips: the person is the colour, the expression a growing corner."""
  video = np.zeros((4, 4, 16, 16, 3), np.float32)
  label, subject = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
  for i in range(4):
    video[i, ..., subject[i]] = 0.8
    rows = slice(0, 6) if label[i] else slice(10, 16)
    for t in range(4):
      video[i, t, rows, 4:12] += t / 3
  return {
    'video': video, 'time': np.tile(np.linspace(0, 1, 4, dtype='f4'), (4, 1)),
    'label': label.astype(np.int32), 'subject': subject.astype(np.int32),
  }


def test_it_learns_and_scores():
  method, data = make(tx=optax.adam(1e-2)), batch()
  trained = jax.jit(method.init)(jax.random.key(0), data)
  step = jax.jit(method.train_step)
  for _ in range(60):
    trained, metrics = step(trained, data, jax.random.key(1))
  assert metrics['accuracy/train'] == 1 and metrics['loss/judge'] < 0.5
  video = data['video']
  logits = jax.jit(method.classify)(trained, video[:, 0])
  assert logits.argmax(1).tolist() == [2] * 4  # neutral
  codes = np.asarray(jax.jit(method.embed)(trained, video[:, -1]))
  np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, rtol=1e-5)
  apart = np.linalg.norm(codes[0] - codes, axis=1)
  assert apart[1] < min(apart[2:])  # same person, other expression
  for i in range(4):
    padded = np.concatenate([video[i], video[i, :1]])
    score = method.score(trained, padded, 4, data['label'][i])
    assert score['accuracy/val'] == 1


def test_microbatches_equal_the_whole_batch():
  data, found = batch(), []
  for parts in (1, 2):
    method = make(parts, optax.sgd(1.0))
    begin = jax.jit(method.init)(jax.random.key(0), data)
    end, metrics = jax.jit(method.train_step)(begin, data, None)
    found.append((end.params['judge'], metrics))
  for a, b in zip(*map(jax.tree.leaves, found)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # cancelled biases
  assert isinstance(end, state.TrainState)
