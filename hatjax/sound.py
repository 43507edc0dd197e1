"""The sound of one video, put to the pictures of another."""

import contextlib
import heapq
import itertools
import os
import pathlib
import secrets

import av

from hatjax import video

# That an mp4 may hold as they are.
TYPES = ('aac', 'mp3', 'ac3', 'opus', 'alac')


def copy(source, target):
  """Gives `target`, an mp4, the first sound track of `source`, from the start.

  Packets are copied one by one; sound of a type that an mp4 cannot hold
  becomes AAC. The file changes whole or not at all.

  Args:
    source: video file; a folder or a file without sound changes nothing.
    target: mp4 without sound.

  Returns:
    Whether there was sound.

  Raises:
    ValueError: the sound cannot be read; the pictures stand.
  """
  if pathlib.Path(source).is_dir():
    return False
  temporary = pathlib.Path(target).with_name(
    f'.hatjax-{secrets.token_hex(6)}.part'
  )
  try:
    with contextlib.ExitStack() as stack:
      audio = stack.enter_context(video.open_container(source))
      if not audio.streams.audio:
        return False
      pictures = stack.enter_context(video.open_container(target))
      out = stack.enter_context(av.open(
        str(temporary), 'w', format='mp4', options={'movflags': '+faststart'}
      ))
      out.metadata.update(pictures.metadata)  # where the video comes from
      _mux(pictures, audio, out)
    os.replace(temporary, target)
    return True
  except av.FFmpegError as error:
    raise ValueError(
      f'The sound of {source} cannot be copied ({error.strerror}). '
      f'{target} has none.'
    ) from error
  finally:
    temporary.unlink(missing_ok=True)


def _mux(pictures, audio, out):
  """Interleaves by time, so that neither waits in memory for the other."""
  seen, heard = pictures.streams.video[0], audio.streams.audio[0]
  video_out = out.add_stream_from_template(seen)
  kept = heard.codec_context.name in TYPES
  if kept:
    audio_out = out.add_stream_from_template(heard)
    sounds = _packets(audio, heard, audio_out)
  else:
    audio_out = out.add_stream('aac', rate=heard.codec_context.sample_rate)
    sounds = _encoded(audio, heard, audio_out)
  both = heapq.merge(
    _packets(pictures, seen, video_out), sounds, key=lambda x: x[0]
  )
  length = float((seen.duration or 0) * seen.time_base)
  for when, packet in both:
    if packet.stream is video_out or not length or when < length:
      out.mux(packet)


def _packets(container, stream, target):
  for packet in container.demux(stream):
    if packet.dts is not None:
      when = float(packet.dts * packet.time_base)
      packet.stream = target
      yield when, packet


def _encoded(container, stream, target):
  frames = itertools.chain(container.decode(stream), [None])
  for frame in frames:
    for packet in target.encode(frame):
      yield float((packet.dts or 0) * packet.time_base), packet

