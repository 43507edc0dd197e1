"""A page where a face photo moves, for the browser on this or another machine.

  python -m hatjax.app                              # the quickstart model
  python -m hatjax.app --workdir runs/a,runs/b      # side by side
"""

import argparse
import atexit
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from hatjax import command, page

_EPILOG = """\
examples:
  python -m hatjax.app
  python -m hatjax.app --workdir runs/a
  python -m hatjax.app --workdir runs/a,runs/b --port 8000
  python -m hatjax.app --workdir runs/a --host 0.0.0.0      # for all who can
                                                            # reach this machine

Without --workdir it shows runs/quickstart, and offers to train it first where
it is missing. Photos, clips and results are deleted within 15 minutes and when
the page ends; nothing leaves the machine. Stop it with Ctrl-C.
"""

QUICKSTART = pathlib.Path('runs/quickstart')
QUICKSTART_STEPS = 800
MAX_MEGABYTES = 50  # of an upload
_PREFIX = 'hatjax-app-'
# The browser itself refuses whatever is not on this machine.
POLICY = (
  "default-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
  "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
  "connect-src 'self' data: blob: ws: wss:"
)


class _Local:
  """ASGI middleware: the page may load nothing from elsewhere."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    async def guarded(message):
      if message['type'] == 'http.response.start':
        message.setdefault('headers', []).append(
          (b'content-security-policy', POLICY.encode())
        )
      await send(message)

    is_http = scope['type'] == 'http'
    await self._app(scope, receive, guarded if is_http else send)


def serve(blocks, host='127.0.0.1', port=None, open_browser=False):
  """Starts the page in a thread; returns its address."""
  import gradio as gr
  from starlette.middleware import Middleware

  blocks.queue(max_size=32)
  fonts = ['system-ui', 'sans-serif']
  _, address, _ = blocks.launch(
    server_name=host, server_port=port, inbrowser=open_browser, share=False,
    prevent_thread_lock=True, quiet=True, footer_links=[], css=page.CSS,
    theme=gr.themes.Soft(font=fonts, font_mono=['monospace']),
    max_file_size=MAX_MEGABYTES * 2**20, enable_monitoring=False,
    ssr_mode=False, state_session_capacity=200,
    app_kwargs={'middleware': [Middleware(_Local)]},
  )
  return address


def offer_training(folder=QUICKSTART):
  """A page that trains the quickstart model; (blocks, done: an Event)."""
  import gradio as gr

  done, untrained = threading.Event(), 'No trained run yet'

  def train():
    command = [
      sys.executable, '-m', 'hatjax.train', '--config',
      'configs/synthetic.py', '--workdir', str(folder),
      f'--config.hat_cgan.train.num_steps={QUICKSTART_STEPS}',
    ]
    log = pathlib.Path(folder).parent / 'quickstart.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'w') as file:
      process = subprocess.Popen(command, stdout=file, stderr=file)
    while process.poll() is None:
      steps = _steps_done(folder)
      yield (
        f'Training: {steps} of {QUICKSTART_STEPS} steps.' if steps else
        'Drawing faces and compiling: a minute or two.'
      )
      time.sleep(1)
    if process.returncode:
      raise gr.Error(f'Training ended early. {log} says why.')
    (pathlib.Path(folder) / 'steps').write_text(f'{QUICKSTART_STEPS}\n')
    yield 'Done. The page opens by itself in a few seconds.'
    done.set()

  with gr.Blocks(title='hatjax', analytics_enabled=False) as blocks:
    gr.Markdown(
      f'## {untrained}\nTrain the quickstart model first: synthetic '
      'faces, 64x64, about six minutes on two cores. Or start this page with '
      '`--workdir` and a run of your own.'
    )
    button = gr.Button('Train it now', variant='primary', elem_id='train')
    said = gr.Markdown(elem_id='said')
    button.click(train, None, said, concurrency_limit=1)
    button.click(lambda: gr.Button(interactive=False), None, button)
    # Another page stands here when the training is over.
    button.click(None, js='() => {setInterval(() => fetch("/")'
                 '.then((answer) => answer.text()).then((text) => '
                 f'{{if (!text.includes("{untrained}")) location.reload()}})'
                 '.catch(() => {}), 3000)}')
  return blocks, done


def _steps_done(folder):
  """How far the training of a quickstart is."""
  import json

  path = pathlib.Path(folder) / 'hat_cgan' / 'metrics.jsonl'
  try:
    return json.loads(path.read_text().splitlines()[-1])['step']
  except (OSError, IndexError, ValueError, KeyError):
    return 0


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m hatjax.app', epilog=_EPILOG,
    description='A page where a face photo moves.',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--workdir', default='', metavar='RUN[,RUN]',
      help='trained runs or exported models; default: runs/quickstart')
  group = parser.add_argument_group('where')
  group.add_argument('--host', default='127.0.0.1',
      help='address to listen on; default: this machine only')
  group.add_argument('--port', type=int,
      help='default: the first free one from 7860')
  group.add_argument('--open', action='store_true', help='open a browser')
  return parser


def _load(folders):
  """The runs, ready for the first touch."""
  import hatjax
  from hatjax import live  # brings JAX

  lives = []
  for folder in folders:
    print(f'loading {folder}', file=sys.stderr)
    name = pathlib.Path(folder).name or str(folder)
    lives.append(live.Live(hatjax.load(folder), name))
    lives[-1].warm()
  return lives


def _temporary_folder():
  """A folder of this process; those of dead ones are deleted."""
  for old in pathlib.Path(tempfile.gettempdir()).glob(f'{_PREFIX}*'):
    owner = old.name.removeprefix(_PREFIX).partition('-')[0]
    if owner.isdecimal() and not _lives(int(owner)):
      shutil.rmtree(old, ignore_errors=True)
  return tempfile.mkdtemp(prefix=f'{_PREFIX}{os.getpid()}-')


def _lives(process):
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:
    pass  # it is another user's
  return True


def _stop(*_):
  # Not KeyboardInterrupt: raised in the midst of an `exec` (an import that
  # makes a dataclass), it turns a clean exit of `python -m` into signal 2.
  sys.exit()


def _run(args):
  # Nothing uploaded outlives the page.
  for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    if hasattr(signal, name):
      signal.signal(getattr(signal, name), _stop)
  folder = _temporary_folder()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  os.environ['GRADIO_TEMP_DIR'] = folder  # uploads: gone when this ends
  os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
  os.environ.setdefault('HF_HUB_OFFLINE', '1')
  try:
    import gradio  # noqa: F401
  except ImportError:
    raise ValueError(
      "The page needs Gradio. Add it: pip install 'hatjax[app]'"
    ) from None
  folders = [x for x in args.workdir.split(',') if x] or [str(QUICKSTART)]
  port = args.port
  if not args.workdir and not (QUICKSTART / 'config.json').exists():
    blocks, done = offer_training()
    address = serve(blocks, args.host, port, args.open)
    print(address, flush=True)
    done.wait()
    lives = _load(folders)
    time.sleep(1)  # the last word reaches the browser
    port = int(address.rstrip('/').rpartition(':')[2])
    blocks.close()
  else:
    lives = _load(folders)
  address = serve(page.build(lives, folder), args.host, port, args.open)
  print(address, flush=True)
  print('Stop it with Ctrl-C.', file=sys.stderr)
  while True:
    time.sleep(30)
    page.sweep(folder)


def main(argv=None):
  """Runs the command; returns its exit code."""
  args = _parser().parse_args(argv)
  try:
    _run(args)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
