"""Scores of videos against real ones: per clip, over all, with their settings.

Videos are uint8 [T, H, W, 3], generated and real of one size and length, the
first frame being the input. It does not matter who made them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hatjax import metrics, video

CHUNK = 64  # frames per call of the device
ACD_FRAMES = 16  # of a clip, evenly spread, as MoCoGAN's clips have
MIN_FRAMES, MIN_VIDEOS = 2048, 2048  # below them FID is mostly bias
PSNR_CAP = 100.0  # dB, of equal frames
# Score -> (format, what it says, better: 1 high, -1 low, 0 neither).
COLUMNS = {
  'psnr': ('.2f', 'dB, all frames but the first', 1),
  'ssim': ('.4f', 'all frames but the first', 1),
  'psnr_last': ('.2f', 'dB, the last frame', 1),
  'ssim_last': ('.4f', 'the last frame', 1),
  'lpips': ('.4f', 'LPIPS (VGG-16 v0.1)', -1),
  'acd': ('.4f', 'face distance of all pairs of frames', -1),
  'acd_consecutive': ('.4f', 'face distance of neighbouring frames', -1),
  'acd_i': ('.4f', 'face distance to the input', -1),
  'recognised': ('.3f', 'share whose expression the classifier names', 1),
  'alpha_order': ('.3f', 'rank correlation of inferred alpha and time', 1),
  'flicker': ('.2f', 'mean |second difference in time|, levels of 255', 0),
  'flicker_error': ('.2f', 'its distance to the real clip', -1),
  'sharpness': ('.2f', "gradient energy over the real clip's", 0),
  'sharpness_of_draft': ('.2f', "gradient energy over the draft's", 0),
  'fid': ('.2f', 'Frechet distance of Inception features, frames', -1),
  'kid': ('.4f', 'kernel Inception distance, frames', -1),
  'inception_score': ('.3f', 'Inception score, frames', 1),
  'video_fid': ('.2f', 'Frechet distance of ResNeXt-101 features, clips', -1),
}


@dataclasses.dataclass(kw_only=True)
class Scorer:
  """Collects clips, gives scores.

  Attributes:
    ssim: window, see `metrics.ssim`.
    sizes: sides, besides the clips' own, that clips are shrunk to (by areas)
      and scored at too.
    embedder: of `face_embedding`, or None.
    judge: (uint8 [T, H, W, 3]) -> label scores [T, L], or None; column `l` is
      label l.
    infer: (uint8 [T, H, W, 3], label) -> alpha [T], or None.
    nets: {'lpips', 'inception', 'video'} -> a net of `extractors`, as far as
      its weights are there.
    absent: {score: why it is not computed}.
    seed: of bootstrap and subsets.
  """

  ssim: str = 'gaussian'
  sizes: tuple[int, ...] = ()
  embedder: Any = None
  judge: Callable | None = None
  infer: Callable | None = None
  nets: dict = dataclasses.field(default_factory=dict)
  absent: dict = dataclasses.field(default_factory=dict)
  seed: int = 0

  def __post_init__(self):
    self.clips, self.ids = {}, []
    self.counts = {'frames': 0, 'seconds': 0.0}
    self._features, self._faces = {}, {}

  def add(self, clip_id, label, real, videos, drafts=None):
    """Scores one clip.

    Args:
      clip_id: names it.
      label: int, or None if unknown.
      real: uint8 [T, H, W, 3].
      videos: {row: uint8 [T, H, W, 3]}; 'blend' has the last frame by right
        and is not scored on it.
      drafts: {row: what it refined}.
    """
    begin = time.perf_counter()
    names = list(videos)
    stacked = np.concatenate([videos[name] for name in names])
    columns = self._per_frame(stacked, real, len(names))
    for name, scores in zip(names, columns):
      row = self._summarize(name, scores, real)
      fake = videos[name]
      row |= self._over_time(fake, real)
      if drafts and name in drafts:
        row['sharpness_of_draft'] = sharpness(fake, drafts[name])
      row |= self._faces_of(name, fake)
      if self.judge is not None and label is not None:
        row['recognised'] = float(is_recognised(self.judge(fake), label))
      if self.infer is not None and len(fake) > 3:
        row['alpha_order'] = metrics.spearman(
          self.infer(fake, label)[1:], np.arange(len(fake) - 1)
        )
      for score, value in row.items():
        self.clips.setdefault(name, {}).setdefault(score, []).append(value)
      self._keep_features(name, fake)
    self.ids.append(clip_id)
    self.counts['frames'] += len(stacked)
    self.counts['seconds'] += time.perf_counter() - begin

  def _per_frame(self, stacked, real, rows):
    """Per row a dict {score: [T]} of all frames."""
    scores = {}
    tiled = np.concatenate([real] * rows)
    sizes = [s for s in self.sizes if s < min(real.shape[1:3])]
    for size in (None, *sizes):
      a, b = stacked, tiled
      end = ''
      if size:
        a, b = (video.resize(x, size, 'area') for x in (a, b))
        end = f'@{size}'
      psnr, ssim = in_chunks(_pair_scores(self.ssim), a, b)
      scores[f'psnr{end}'] = np.minimum(psnr, PSNR_CAP)
      scores[f'ssim{end}'] = ssim
    if 'lpips' in self.nets:
      (scores['lpips'],) = in_chunks(self.nets['lpips'].distance, a=stacked,
                                     b=tiled)
    split = {k: np.split(v, rows) for k, v in scores.items()}
    return [{k: v[i] for k, v in split.items()} for i in range(rows)]

  def _summarize(self, name, scores, real):
    """Means over frames, and the last frame's."""
    has_last = name == 'blend'
    shown = slice(1, len(real) - 1 if has_last and len(real) > 2 else None)
    row = {k: float(v[shown].mean()) for k, v in scores.items()}
    if not has_last:
      row |= {f'{k}_last': float(scores[k][-1]) for k in ('psnr', 'ssim')}
    row['identical_frames'] = int((scores['psnr'][shown] >= PSNR_CAP).sum())
    return row

  def _over_time(self, fake, real):
    row = {}
    if len(real) > 2:
      ours, theirs = (
        127.5 * float(metrics.flicker(video.to_float(x[None]))[0])
        for x in (fake, real)
      )
      row = {'flicker': ours, 'flicker_error': abs(ours - theirs)}
    row['sharpness'] = sharpness(fake, real)
    return row

  def _faces_of(self, name, fake):
    """ACD and its kin, and how many faces were missed."""
    if self.embedder is None:
      return {}
    picked = np.linspace(0, len(fake) - 1, min(ACD_FRAMES, len(fake)))
    vectors, found = self.embedder.embed(fake[picked.round().astype(int)])
    first = vectors[0] if found[0] else None
    row = metrics.content_distances(vectors[1:], found[1:], first)
    return row | {
      'faces_missed': int((~found).sum()), 'faces_sought': len(found)
    }

  def _keep_features(self, name, fake):
    kept = self._features.setdefault(name, {})
    if 'inception' in self.nets:
      pool, logits = in_chunks(self.nets['inception'].features, fake)
      kept.setdefault('pool', []).append(pool)
      kept.setdefault('logits', []).append(logits)
    if 'video' in self.nets:
      kept.setdefault('video', []).append(self.nets['video'].features(fake))

  def result(self):
    """dict: rows {name: {score: {mean, low, high, n}}}, clips, absent."""
    rows = {
      name: {
        score: metrics.bootstrap(values, self.seed)
        for score, values in row.items()
        if score not in ('faces_missed', 'faces_sought', 'identical_frames')
      } for name, row in self.clips.items()
    }
    absent = dict(self.absent)
    for name in rows:
      rows[name] |= self._over_sets(name, absent)
      row = self.clips[name]
      for count in ('faces_missed', 'faces_sought', 'identical_frames'):
        if count in row:
          rows[name][count] = int(np.sum(row[count]))
    return {
      'rows': rows, 'clips': self.clips, 'ids': self.ids,
      'not_computed': absent, 'scoring': self.rate(),
    }

  def rate(self):
    """Frames scored, seconds, frames per second."""
    seconds = max(self.counts['seconds'], 1e-9)
    return {**self.counts, 'frames_per_second': self.counts['frames'] / seconds}

  def _over_sets(self, name, absent):
    """FID or KID, IS and video FID of a row, as far as they can be told."""
    stack = lambda row, key: np.concatenate(self._features[row][key])
    out = {}
    if 'inception' in self.nets and 'real' in self._features:
      ours, theirs = (stack(row, 'pool') for row in (name, 'real'))
      if len(ours) >= MIN_FRAMES:
        out['fid'] = {'mean': metrics.frechet_distance(ours, theirs)}
      else:
        absent['fid'] = (
          f'not computed: needs {MIN_FRAMES} frames, there are {len(ours)}; '
          'KID stands for it'
        )
      mean, std = metrics.kernel_distance(ours, theirs, seed=self.seed)
      out['kid'] = {'mean': mean, 'std': std}
      mean, std = metrics.inception_score(stack(name, 'logits'))
      out['inception_score'] = {'mean': mean, 'std': std}
    if 'video' in self.nets and 'real' in self._features:
      ours, theirs = (stack(row, 'video') for row in (name, 'real'))
      if len(ours) >= MIN_VIDEOS:
        out['video_fid'] = {'mean': metrics.frechet_distance(ours, theirs)}
      else:
        absent['video_fid'] = (
          f'not computed: needs {MIN_VIDEOS} videos, there are {len(ours)}'
        )
    return out


def in_chunks(function, a, b=None):
  """A jitted function of CHUNK frames at a time, on any number of frames.

  Args:
    function: float [CHUNK, ...] in [-1, 1], one or two, -> array or tuple of
      arrays [CHUNK, ...].
    a: uint8 [N, ...].
    b: the same, if the function takes two.

  Returns:
    tuple of np.ndarray [N, ...].
  """
  parts = []
  for start in range(0, len(a), CHUNK):
    args = []
    for x in (a,) if b is None else (a, b):
      part = x[start : start + CHUNK]
      pad = [(0, CHUNK - len(part))] + [(0, 0)] * (part.ndim - 1)
      args.append(np.pad(part, pad))
    out = function(*args)
    parts.append(out if isinstance(out, tuple) else (out,))
  parts = jax.device_get(parts)  # The device runs ahead until here.
  return tuple(np.concatenate(x)[: len(a)] for x in zip(*parts))


@functools.cache
def _pair_scores(window):
  @jax.jit
  def scores(a, b):
    a, b = video.to_float(a), video.to_float(b)
    return metrics.psnr(a, b), metrics.ssim(a, b, window)

  return scores


def sharpness(fake, other):
  """Gradient energy over that of another clip; the first frames left out."""
  ours, theirs = (
    float(metrics.gradient_energy(video.to_float(x[None, 1:]))[0])
    for x in (fake, other)
  )
  return ours / max(theirs, 1e-12)


def is_recognised(scores, label):
  """Whether the mean scores of a clip's last quarter name its label.

  Args:
    scores: [T, L] of the frames; a neutral face may have columns of its own.
    label: the true one.
  """
  last = scores[-max(1, len(scores) // 4):]
  return int(np.argmax(last.mean(0))) == label


def temporal_mean(frames):
  """Each frame averaged with its two neighbours, uint8 [T, H, W, 3].

  The first and the last count twice, having one. A clip's plainest smoothing:
  what a refining stage must beat.
  """
  padded = np.pad(frames, ((1, 1), (0, 0), (0, 0), (0, 0)), mode='edge')
  mean = (padded[:-2].astype(np.float32) + padded[1:-1] + padded[2:]) / 3
  return np.rint(mean).astype(np.uint8)


def baselines(real):
  """Rows that need no model: {name: uint8 [T, H, W, 3]}.

  `real` against itself; `copy` repeats the first frame; `blend` fades from
  the first real frame to the last.
  """
  share = np.linspace(0, 1, len(real))[:, None, None, None]
  blend = np.rint((1 - share) * real[0] + share * real[-1])
  return {
    'real': real, 'copy': np.repeat(real[:1], len(real), 0),
    'blend': blend.astype(np.uint8),
  }
