#!/usr/bin/env bash
# From nothing to a video, in minutes on 2 cores: installs, trains on synthetic
# faces, animates faces it has never seen, scores the result. Run again: goes
# on, 800 steps more.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
python=.venv/bin/python
work=runs/quickstart

steps=800
if [ -f "$work/steps" ]; then
  steps=$(($(cat "$work/steps") + 800))
fi
$python -m hatjax.train --config configs/synthetic.py --workdir "$work" \
  --config.hat_cgan.train.num_steps="$steps"
echo "$steps" > "$work/steps"

$python -m hatjax.generate --workdir "$work" --split test --num_images 4 \
  --label all --boomerang --strip --out 'out/quickstart/{image}_{label}.mp4'

$python -m hatjax.evaluate --workdir "$work" --split test

cat <<TXT

Four faces that were not trained on, each making every expression:
  out/quickstart/all_grid.mp4      (all_grid.png: the strongest frames)
  $work/hat_cgan/samples/          real frames over generated ones
  $work/hat_cgan/losses.png        the curves
Next:
  bash launch/quickstart.sh        800 steps more: better faces
  .venv/bin/python -m hatjax.generate --workdir $work --image your_face.jpg
  bash launch/install.sh app && .venv/bin/python -m hatjax.app   # in a browser
  .venv/bin/python -m hatjax.prepare --help      your own clips, CK+, MUG
TXT
