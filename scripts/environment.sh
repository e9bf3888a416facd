# Sourced by the other scripts: a virtual environment with the package in it, made once and kept up to date.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${NNUNET_SSL_VENV:-$root/.venv}"
if [ ! -x "$venv/bin/python" ]; then
  echo "Making a virtual environment in $venv"
  "${PYTHON:-python3}" -m venv "$venv"
fi
# The marker holds the project file it was installed from: a changed one installs again.
if ! cmp -s "$root/pyproject.toml" "$venv/.installed-from"; then
  echo "Installing nnunet-ssl and what it needs (PyTorch is large: some minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root[dev]"
  cp "$root/pyproject.toml" "$venv/.installed-from"
fi
export PATH="$venv/bin:$PATH"
