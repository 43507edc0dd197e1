"""Clips made anew by a run from what it may see of them, to be scored or shown.

Videos are uint8 [T, S, S, 3].
"""

import pathlib

import jax
import numpy as np

from hatjax import driving, intensity, photos, scores, video


def is_driven(run):
  """Whether a run takes on the motion of a clip, not an expression's label."""
  return 'driving' in run.stages[0].method.reads


def make_rows(
  run, clip, labels, protocols, strengths, alpha, num_sample_steps, seed
):
  """({row: video}, {row: the draft it refined}) of a clip."""
  real = clip['video']
  cascade = len(run.stages) > 1
  made, drafts = scores.baselines(real), {}
  if is_driven(run):  # Every clip drives its first.
    frames = driving.drive(run, real[0], real, motion='absolute')
    return made | {'reenacted': np.stack(list(frames))}, {}

  def make(protocol, strength):
    return run.animate(
      real[0], labels[clip['label']], num_frames=len(real),
      sweep='linear' if protocol == 'linear' else 'profile',
      alpha=alpha[None] if protocol == 'oracle' else None, seed=seed,
      refine=strength,
      num_sample_steps=None if strength == 0 else num_sample_steps,
    )[0]

  for protocol in protocols:
    draft = make(protocol, 0 if cascade else None)
    made[f'{protocol} temporal mean'] = scores.temporal_mean(draft)
    for strength in strengths or (None,):
      name = ' '.join(
        [protocol, *([] if strength is None else [f'refine {strength:g}'])]
      )
      is_draft = strength == 0 or not cascade
      made[name] = draft if is_draft else make(protocol, strength)
      if cascade:
        drafts[name] = draft
  return made, drafts


def make_infer(run):
  """Inferred intensity, (uint8 [T, S, S, 3], label) -> float [T]; or None."""
  _, method, state = run.stages[0]
  if not intensity.is_inferred(method):
    return None

  @jax.jit
  def infer(state, real, label):
    frames = video.to_float(real)[None]
    return method.infer(
      state, {'image': frames[:, 0], 'driving': frames, 'label': label[None]}
    )[0]

  def padded(real, label):
    # Few shapes, so that clips of all lengths share a program.
    n = len(real)
    real = np.concatenate([real, real[-1:].repeat(-n % 16, 0)])
    return np.asarray(infer(state, real, np.int32(label)))[:n]

  return padded


def read_faces(run, paths):
  """{name: uint8 [S, S, 3]} of photos, cropped as the run's records were.

  Raises:
    ValueError: a run that no clip drives, a photo without a face.
  """
  if not paths:
    return {}
  if not is_driven(run):
    raise ValueError('--image: no clip drives this run. Leave it out.')
  crop = 'none' if run.crop == 'none' else 'auto'
  faces = {}
  for path in paths:
    name = pathlib.Path(path).stem
    name = name if name not in faces else f'{name}-{len(faces) + 1}'
    faces[name] = photos.crop_face(path, run.image_size, crop)
  return faces


def drive_faces(run, faces, clips):
  """Faces that clips drive, of other people as a rule: nothing to score.

  Args:
    run: of motion transfer.
    faces: of `read_faces`.
    clips: dicts with id and video.

  Yields:
    (clip dict, {row: video}), as `score_report.Gallery.add` takes them.
  """
  for name, face in faces.items():
    for clip in clips:
      made = np.stack(list(driving.drive(run, face, clip['video'])))
      title = f'{name}, driven by {clip["id"]}'
      yield {'id': title, 'label_name': '', 'video': face[None]}, {
        'copy': face[None].repeat(len(made), 0), 'driving': clip['video'],
        'driven': made,
      }
