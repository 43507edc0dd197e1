"""What scores need from trained nets: loaded where their weights are there.

Each says what it is and the checksum of its weights. Without weights a score
is 'not computed: needs X, get it with ...', never made up.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hatjax import face_embedding, metrics, video, weights
from hatjax.nets import pretrained, vgg

# LPIPS compares these features of VGG-16.
LPIPS_TAPS = ('relu1_2', 'relu2_2', 'relu3_3', 'relu4_3', 'relu5_3')
# Score -> (the net that gives it, the weights that needs).
NEEDS = {
  'lpips': ('lpips', ('vgg16', 'lpips_vgg')),
  'fid': ('inception', ('inception_fid',)),
  'kid': ('inception', ('inception_fid',)),
  'inception_score': ('inception', ('inception_fid',)),
  'video_fid': ('video', ('resnext101_kinetics',)),
}


@dataclasses.dataclass
class Parts:
  """What `gather` found.

  Attributes:
    arguments: of `scores.Scorer`.
    absent: {score: why it is not computed}, also in `arguments`.
    described: {use: {name, about, checksum}} for the tables.
  """

  arguments: dict
  absent: dict
  described: dict


def gather(faces='auto', judge=None, identity=None, labels=(), nets=True):
  """Everything that can be had.

  Args:
    faces: see `face_embedding.make`, or 'none'.
    judge: a loaded face_classifier run that names expressions, or None.
    identity: one whose identity codes stand in for `faces`, or None.
    labels: names of the labels that columns of the judge must follow.
    nets: False leaves Inception, LPIPS and video features out.

  Returns:
    Parts.

  Raises:
    ValueError: damaged weights, or a run of other labels.
  """
  absent, described, loaded = {}, {}, {}
  embedder = None
  if identity is not None:
    embedder = IdentityCode(identity)
  elif faces != 'none':
    embedder = face_embedding.make(faces)
  if embedder is None:
    absent |= dict.fromkeys(
      ('acd', 'acd_consecutive', 'acd_i'), 'not computed: --faces none'
    )
  else:
    described['ACD'] = _describe(embedder)
  for score, (net, needed) in NEEDS.items():
    missing = [name for name in needed if not weights.is_there(name)]
    if not nets:
      absent[score] = 'not computed: --nonets'
    elif missing:
      cures = ' and '.join(weights.cure(name) for name in missing)
      absent[score] = (
        f'not computed: needs {" and ".join(missing)}, get it with {cures}'
      )
    elif net not in loaded:
      loaded[net] = _NETS[net]()
      described[score] = _describe(loaded[net])
  function = None
  if judge is None:
    absent['recognised'] = (
      'not computed: needs a classifier, get it with python -m hatjax.train '
      '--config <file>:face_classifier --workdir runs/judge, then pass '
      '--classifier runs/judge'
    )
  else:
    function = make_judge(judge, labels)
    described['recognised'] = {
      'name': 'face_classifier', 'about': 'expression classifier ' + _of(judge)
    }
  return Parts(
    dict(embedder=embedder, judge=function, nets=loaded, absent=absent),
    absent, described,
  )


def _describe(part):
  return {'name': part.name, 'about': part.about, 'checksum': part.checksum}


def _of(run):
  info = run.config['info']
  return (
    f'of {getattr(run, "folder", "a run")}, step {run.step}, records '
    f'{info["fingerprint"][:12]}'
  )


def make_judge(run, labels):
  """(uint8 [T, H, W, 3]) -> float [T, L + ...], columns in order of `labels`.

  Columns after the labels are what else the classifier knows (neutral).

  Raises:
    ValueError: a run that classifies nothing, or other labels.
  """
  theirs = list(run.config['info']['labels'])
  if not hasattr(run.method, 'classify'):
    raise ValueError(
      f'--classifier: {run.config["stages"][-1]} names no expressions. Train '
      'a face_classifier.'
    )
  lacking = sorted(set(labels) - set(theirs))
  if lacking:
    raise ValueError(
      f'--classifier: it knows {", ".join(theirs)}, not {lacking[0]}. Train '
      'one on the same records.'
    )
  order = [theirs.index(label) for label in labels]
  order += [i for i in range(run.method.num_labels + 1) if i not in order]
  classify = jax.jit(
    lambda state, x: run.method.classify(state, video.to_float(x))
  )

  def judge(frames):
    frames = video.resize(frames, run.image_size)
    return np.asarray(classify(run.state, frames))[:, order]

  return judge


class IdentityCode:
  """The identity code of a trained face_classifier, of whole frames."""

  checksum = ''

  def __init__(self, run):
    if not hasattr(run.method, 'embed'):
      raise ValueError(
        f'--faces: {run.config["stages"][-1]} has no identity code. Train a '
        'face_classifier.'
      )
    self._run = run
    self._embed = jax.jit(
      lambda state, x: run.method.embed(state, video.to_float(x))
    )
    self.name = 'face_classifier'
    self.about = (
      f'identity code of the face_classifier {_of(run)}; not comparable with '
      'published ACD'
    )

  def embed(self, frames):
    """See `face_embedding`; it looks for no face, so it misses none."""
    frames = video.resize(frames, self._run.image_size)
    vectors = np.asarray(self._embed(self._run.state, frames))
    return vectors, np.ones(len(frames), bool)


class Lpips:
  """LPIPS v0.1 with VGG-16."""

  name, about = 'lpips-vgg-v0.1', 'LPIPS v0.1, VGG-16'

  def __init__(self):
    self._params = vgg.unflatten(weights.load('vgg16'))
    lin = weights.load('lpips_vgg')
    self._weights = [lin[f'lin{i}'] for i in range(len(LPIPS_TAPS))]
    self.checksum = weights.checksum('lpips_vgg')
    self._distance = jax.jit(self._compare)

  def _compare(self, params, a, b):
    net = vgg.VGG(taps=LPIPS_TAPS, range='imagenet')
    apply = lambda x: net.apply({'params': params}, video.to_float(x))
    return metrics.lpips(apply(a), apply(b), self._weights)

  def distance(self, a, b):
    """uint8 [B, H, W, 3] twice -> [B]."""
    return self._distance(self._params, a, b)


class InceptionFeatures:
  """FID's Inception."""

  name = 'inception-2015-12-05'
  about = 'Inception 2015-12-05, pool3, 299x299 bilinear (half-pixel)'

  def __init__(self):
    self._params = pretrained.unflatten(weights.load('inception_fid'))
    self.checksum = weights.checksum('inception_fid')
    net = pretrained.Inception()
    self._apply = jax.jit(
      lambda params, x: net.apply({'params': params}, video.to_float(x))
    )

  def features(self, frames):
    """uint8 [B, H, W, 3] -> ([B, 2048], logits [B, 1008])."""
    return self._apply(self._params, frames)


class VideoFeatures:
  """ResNeXt-101 of whole clips, as in ImaGINator's and G3AN's video FID."""

  name = 'resnext101-kinetics'
  about = '3-D ResNeXt-101, Kinetics-400, 16 centre frames at 112x112'

  def __init__(self):
    arrays = weights.load('resnext101_kinetics')
    self._params = pretrained.unflatten(arrays)
    self.checksum = weights.checksum('resnext101_kinetics')
    net = pretrained.VideoResNeXt()
    self._apply = jax.jit(
      lambda params, x: net.apply({'params': params}, video.to_float(x))
    )

  def features(self, frames):
    """A clip uint8 [T, H, W, 3] -> [1, 2048]."""
    clip = centre_frames(frames, pretrained.VIDEO_FRAMES)
    shape = (len(clip), *(pretrained.VIDEO_SIDE,) * 2, 3)
    clip = np.asarray(_bilinear(clip, shape))
    return np.asarray(self._apply(self._params, clip[None]))


@functools.partial(jax.jit, static_argnums=1)
def _bilinear(frames, shape):
  frames = frames.astype(jnp.float32)
  frames = jax.image.resize(frames, shape, 'bilinear', antialias=False)
  return frames.round().astype(jnp.uint8)


def centre_frames(frames, count):
  """`count` frames from the middle; a shorter clip repeats its last one."""
  if len(frames) < count:
    last = frames[-1:].repeat(count - len(frames), 0)
    return np.concatenate([frames, last])
  start = (len(frames) - count) // 2
  return frames[start : start + count]


_NETS = {
  'lpips': Lpips, 'inception': InceptionFeatures, 'video': VideoFeatures,
}
