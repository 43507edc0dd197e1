"""The page of `hatjax.app`: what it shows, and what a touch does.

Pictures are uint8 [H, W, 3]. Whatever goes wrong with a photo or a clip is
told on the page, as a note, and changes nothing.
"""

import base64
import contextlib
import html
import pathlib
import tempfile
import time

import cv2

from hatjax import faces, synthetic_faces, video

MAX_PIXELS = 40_000_000
MAX_SECONDS = 20  # of a driving clip
MAX_WAIT = 180  # seconds that one result may take
KEEP = 900  # seconds until files are deleted
EXAMPLES = (1001, 1002, 1005, 1008, 1010, 1012)  # faces that nobody has: seeds
TITLE = 'A photo, moving'
CSS = """
#clip .video-container, #clip video {max-height: 205px}
.gradio-container {max-width: 1100px !important; margin: auto}
.hj-row {display: flex; flex-wrap: wrap; gap: 12px; justify-content: center}
.hj-row figure {margin: 0; flex: 1 1 130px; max-width: 320px}
.hj-row img {width: 100%; border-radius: 12px; display: block}
.hj-row figcaption {text-align: center; font-size: 13px; opacity: .75}
.hj-hint {text-align: center; padding: 40px 12px; opacity: .6}
#box img {width: auto; max-width: 100%; max-height: 220px; margin: auto}
@media (max-width: 640px) {.hj-row figure {flex-basis: 40%}}
"""


def _data_address(image, kind='.png'):
  """The picture inside of the page: one trip instead of two."""
  data = cv2.imencode(kind, image[..., ::-1])[1]
  word = {'.png': 'png', '.jpg': 'jpeg'}[kind]
  return f'data:image/{word};base64,' + base64.b64encode(data).decode()


def _figures(pictures):
  """A row of (address of a picture, caption), as HTML."""
  inside = ''.join(
    f'<figure><img src="{address}" alt="{html.escape(caption)}">'
    f'<figcaption>{html.escape(caption)}</figcaption></figure>'
    for address, caption in pictures
  )
  return f'<div class="hj-row">{inside}</div>'


def _hint(text):
  return f'<div class="hj-hint">{html.escape(text)}</div>'


def _with_box(image, face):
  """The photo, small, with the boxes of the face and of what is used."""
  image = image.copy()
  thick = max(2, max(image.shape) // 200)
  if face is not None:
    x0, y0, x1, y1 = faces.square_crop_box(face, image.shape)
    cv2.rectangle(image, (x0, y0), (x1, y1), (255, 255, 255), thick)
    cv2.rectangle(image, face[:2], face[2:], (64, 200, 120), thick)
  shrink = min(1.0, 480 / max(image.shape))
  size = [max(1, round(side * shrink)) for side in image.shape[:2]]
  return video.resize(image, size)


def write_examples(folder):
  """Writes the synthetic faces one can start from; returns their paths."""
  paths = []
  for seed in EXAMPLES:
    clip = synthetic_faces.render_clip(seed, 'neutral', 1, 256)
    paths.append(str(pathlib.Path(folder) / f'examples/synthetic_{seed}.png'))
    video.write_image(paths[-1], clip['video'][0])
  return paths


def sweep(folder, keep=KEEP):
  """Deletes the files below a folder that are older than `keep` seconds.

  The drawn faces stay, by their content: wherever they were copied to.
  """
  files = [path for path in pathlib.Path(folder).rglob('*') if path.is_file()]
  drawn = {
    path.read_bytes() for path in files
    if path.parent == pathlib.Path(folder) / 'examples'
  }
  for path in files:
    with contextlib.suppress(OSError):  # gone already
      old = time.time() - path.stat().st_mtime > keep
      if old and path.read_bytes() not in drawn:
        path.unlink()


class Page:
  """What happens when something on the page is touched.

  Args:
    lives: list of `live.Live`, shown side by side.
    folder: where results are written.
  """

  def __init__(self, lives, folder):
    import gradio

    self._gradio, self.lives = gradio, lives
    self._folder = pathlib.Path(folder)
    labels = [label for run in lives for label in run.labels]
    self.labels = list(dict.fromkeys(labels))
    self.driven = [run for run in lives if run.driven]
    self.moved = [run for run in lives if not run.driven]

  def see(self, path, cropped, label, alpha):
    """A new photo -> (one face per run, the box, the moved faces)."""
    if not path:
      return None, _hint('The face that was found'), self._waiting()
    try:
      image = video.read_image(path, MAX_PIXELS)
    except ValueError as error:
      # Not the name on the server's disk.
      self._warn(str(error).replace(str(path), 'The picture'))
      return None, _hint('No picture'), self._waiting()
    face = faces.detect_face(image)
    if face is None and cropped:
      self._warn(
        'No face found. Take one from the front, in good light, or untick '
        '"Crop to the face".'
      )
      shown = _figures([(_data_address(_with_box(image, None), '.jpg'),
                         'no face found')])
      return None, shown, self._waiting()
    crops = [run.face(image, not cropped, face) for run in self.lives]
    note = 'green: the face found; white: what is used'
    box = _with_box(image, face if cropped else None)
    shown = _figures([(_data_address(box, '.jpg'), note if cropped else '')])
    return crops, shown, self.move(crops, label, alpha)

  def move(self, crops, label, alpha):
    """The faces at an intensity, as HTML."""
    if crops is None or not self.moved:
      return self._waiting()
    pictures = []
    for run, crop in zip(self.lives, crops):
      if run.driven:
        continue
      if run.labels and label not in run.labels:
        pictures.append((_data_address(crop), f'{run.name}: no {label}'))
        continue
      begin = time.perf_counter()
      made = run.frame(crop, label, alpha)
      spent = 1000 * (time.perf_counter() - begin)
      pictures.append((_data_address(made), f'{run.name}, {spent:.0f} ms'))
    return _figures(pictures)

  def make(self, crops, label, alpha, frames, sweep, refine, forth_and_back,
           progress=None):
    """Yields, run after run, all results: (video, mp4, gif) each."""
    clips = {}
    for run in self.moved:
      if run.labels and label not in run.labels:
        continue
      strength = refine if run.refines else None
      clips[run] = lambda crop, run=run, strength=strength: run.clip(
        crop, label, alpha, int(frames), sweep, strength
      )
    count = int(frames)
    yield from self._results(
      crops, self.moved, clips, 25, count, forth_and_back, progress
    )

  def drive(self, crops, clip, progress=None):
    """As `make`, for the runs that a clip drives."""
    if not clip:
      self._warn('Upload or record a driving clip first.')
      return
    try:
      fps = video.read_fps(clip)
    except ValueError as error:
      self._warn(str(error).replace(str(clip), 'The clip'))
      return
    limit = int(MAX_SECONDS * fps)

    def frames(crop, run):
      for n, frame in enumerate(run.drive(crop, clip)):
        if n == limit:
          self._note(f'Only the first {MAX_SECONDS} seconds are used.')
          return
        yield frame

    clips = {run: lambda crop, run=run: frames(crop, run)
             for run in self.driven}
    yield from self._results(
      crops, self.driven, clips, fps, limit, False, progress
    )

  def _results(self, crops, runs, clips, fps, count, forth_and_back, progress):
    if crops is None:
      self._warn('Drop a photo first, or take one of the faces below it.')
      return
    results = [(None, None, None) for _ in runs]
    for i, run in enumerate(runs):
      if run not in clips:
        continue
      crop = crops[self.lives.index(run)]
      try:
        made = self._collect(clips[run](crop), count, run.name, progress)
        results[i] = self._write(run, made, fps, forth_and_back)
      except (ValueError, OSError) as error:
        self._warn(f'{run.name}: {error}')
        continue
      yield [part for result in results for part in result]

  def _collect(self, frames, count, name, progress):
    made, begin = [], time.monotonic()
    for frame in frames:
      made.append(frame)
      if progress is not None:
        progress((len(made), max(count, len(made))), desc=name, unit='frames')
      if time.monotonic() - begin > MAX_WAIT:
        self._note(f'Stopped after {MAX_WAIT} seconds.')
        break
    return made

  def _write(self, run, made, fps, forth_and_back):
    if not made:
      raise ValueError('the clip holds no frames')
    if forth_and_back:
      made = made + made[-2:0:-1]
    folder = tempfile.mkdtemp(dir=self._folder)
    stem = f'{folder}/{pathlib.Path(run.name).name}'
    run.signature.write_video(f'{stem}.mp4', made, fps)
    run.signature.write_video(f'{stem}.gif', made, min(fps, 25))
    return f'{stem}.mp4', f'{stem}.mp4', f'{stem}.gif'

  def _waiting(self):
    return _hint('Your face moves here' if self.moved else 'Driven by a clip')

  def _warn(self, text):
    self._gradio.Warning(text)

  def _note(self, text):
    self._gradio.Info(text)


def build(lives, folder):
  """The page, a gradio.Blocks, for a list of `live.Live`.

  Args:
    lives: what it shows side by side.
    folder: for examples and results; the caller deletes it.
  """
  import gradio as gr

  page = Page(lives, folder)
  with gr.Blocks(
    title=TITLE, analytics_enabled=False, delete_cache=(60, KEEP)
  ) as blocks:
    gr.Markdown(
      f'## {TITLE}\nUse your own face, or that of somebody who agreed. '
      f'What you upload is deleted within {KEEP // 60} minutes.'
    )
    crops = gr.State(None, time_to_live=3600)
    with gr.Row():
      with gr.Column(min_width=280):
        photo = gr.Image(
          label='Photo', type='filepath', sources=['upload', 'webcam'],
          height=260, elem_id='photo', buttons=[],
        )
        _take_any_file(photo)
        gr.Examples(
          write_examples(folder), photo, label='Faces that nobody has',
          preload=False,
        )
        with gr.Accordion('The face that was found', open=True):
          box = gr.HTML(_hint('The face that was found'), elem_id='box')
          cropped = gr.Checkbox(True, label='Crop to the face')
      with gr.Column(min_width=280):
        moved = gr.HTML(_hint('Your face moves here'), elem_id='moved')
        has = bool(page.moved)
        label = gr.Radio(
          page.labels, value=_first(page.labels), label='Expression',
          elem_id='label', visible=bool(page.labels),
        )
        alpha = gr.Slider(
          0, 1.5, 1.0, step=0.01, label='Intensity', elem_id='alpha',
          visible=has, buttons=[],
        )
        if has:
          _making(gr, page, crops, label, alpha)
        if page.driven:
          _driving(gr, page, crops)
    quick = dict(show_progress='hidden', concurrency_limit=4)
    inputs, outputs = [photo, cropped, label, alpha], [crops, box, moved]
    seen = photo.change(page.see, inputs, outputs, **quick)
    seen.then(None, js=_show('#moved:has(img)'))
    cropped.input(page.see, inputs, outputs, **quick)
    for touched in (label.input, alpha.input):
      touched(
        page.move, [crops, label, alpha], moved, queue=False,
        trigger_mode='always_last', show_progress='hidden',
      )
  return blocks


def _show(place):
  """JavaScript that scrolls to what has changed, where it is out of sight."""
  return (
    f"() => document.querySelector('{place}')?.scrollIntoView("
    "{block: innerWidth < 700 ? 'start' : 'nearest'})"
  )


def _first(labels):
  """The expression to begin with."""
  return next((x for x in labels if x.startswith('happ')), next(
    iter(labels), None
  ))


def _making(gr, page, crops, label, alpha):
  """Settings, the button, and what it makes of label and intensity."""
  with gr.Accordion('Settings of the video', open=False):
    frames = gr.Slider(8, 96, 32, step=8, label='Frames, 25 per second')
    sweep = gr.Radio(
      [('as people do', 'profile'), ('evenly', 'linear')], value='profile',
      label='How the expression grows',
    )
    refine = gr.Slider(
      0, 1, _strength(page.moved), step=0.01,
      label='Refinement by the second stage',
      visible=any(run.refines for run in page.moved),
    )
    both_ways = gr.Checkbox(True, label='Forth and back')
  button = gr.Button('Make the video', variant='primary', elem_id='make')
  outputs = _outputs(gr, page.moved)

  def make(crops, label, alpha, frames, sweep, refine, both_ways,
           progress=gr.Progress()):  # noqa: B008  (how Gradio asks for it)
    yield from page.make(
      crops, label, alpha, frames, sweep, refine, both_ways, progress
    )

  button.click(
    make, [crops, label, alpha, frames, sweep, refine, both_ways], outputs,
    concurrency_limit=1, concurrency_id='make',
  ).then(None, js=_show('.hj-video'))


def _take_any_file(photo):
  """`Page.see` says kindly what is no picture; Gradio would end in an error."""
  read = photo.preprocess
  photo.preprocess = lambda given: (
    given.path if given and given.path else read(given)
  )


def _strength(runs):
  found = [run.run.method.strength for run in runs if run.refines]
  return found[0] if found else 0.0


def _driving(gr, page, crops):
  """The driving clip, the button, and the face that follows it."""
  clip = gr.Video(
    label=f'Driving clip, up to {MAX_SECONDS} seconds', elem_id='clip',
    sources=['upload', 'webcam'], height=260, buttons=[],
    include_audio=True,  # to take it off, Gradio would want an ffmpeg
  )
  button = gr.Button('Drive the face', variant='primary', elem_id='drive')
  outputs = _outputs(gr, page.driven)

  def drive(crops, clip, progress=gr.Progress()):  # noqa: B008
    yield from page.drive(crops, clip, progress)

  button.click(
    drive, [crops, clip], outputs, concurrency_limit=1, concurrency_id='make',
  ).then(None, js=_show('.hj-video'))


def _outputs(gr, runs):
  """Per run a player and two downloads."""
  outputs = []
  with gr.Row():
    for run in runs:
      with gr.Column(min_width=200):
        outputs.append(gr.Video(
          label=run.name, autoplay=True, loop=True, height=300,
          interactive=False, buttons=[], elem_classes='hj-video',
        ))
        with gr.Row():
          for kind in ('mp4', 'gif'):
            outputs.append(gr.DownloadButton(
              kind, size='sm', min_width=80, elem_classes=f'hj-{kind}'
            ))
  return outputs
