#!/usr/bin/env bash
# Build the package into dist/, check it, and spend a small day with the wheel alone: a fresh environment, an empty
# home, outside the repository. PYTHON chooses the interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH nnUNet_extTrainer
mkdir "$work/home" "$work/day"

echo "Building"
"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet --disable-pip-version-check build twine
rm -rf "$root/dist"
"$work/tools/bin/python" -m build --outdir "$root/dist" "$root"
"$work/tools/bin/python" -m twine check --strict "$root"/dist/*

echo "Installing the wheel (PyTorch is large: some minutes)"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$root"/dist/*.whl

# From here on nothing of the caller's: what the wheel lacks is missing.
export HOME="$work/home" PATH="$work/venv/bin:$PATH"
export nnUNet_raw="$work/day/raw" nnUNet_preprocessed="$work/day/preprocessed" nnUNet_results="$work/day/results"
mkdir "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"
cd "$work/day"
set -x
eval "$(nnunet-ssl env)"
python -c "
from pathlib import Path
from nnunet_ssl.demo.synthetic import Sizes, write_dataset
write_dataset(Path('$nnUNet_raw/Dataset901_Chest'), Sizes(labeled=5, unlabeled=4, test=2, side=32))"
nnUNetv2_plan_and_preprocess -d 901 -c 2d -np 1 -npfp 1
nnunet-ssl configure -d 901 -p nnUNetPlans -o Tiny -c 2d --batch-size 4 --base-features 4 --max-features 8 \
  --set num_epochs=2 --set num_iterations_per_epoch=2 --set num_val_iterations_per_epoch=1
nnunet-ssl preprocess -d 901 -c 2d -p Tiny -np 1
nnUNetv2_train 901 2d 0 -p Tiny -tr nnUNetTrainerSemiTC -device cpu
nnUNetv2_predict -d 901 -c 2d -f 0 -p Tiny -tr nnUNetTrainerSemiTC -device cpu -npp 1 -nps 1 \
  -i "$nnUNet_raw/Dataset901_Chest/imagesTs" -o predicted
ls predicted/*.png
{ set +x; } 2>/dev/null
echo "$(basename "$root"/dist/*.whl) installs, trains and predicts with $("$python" --version)"
