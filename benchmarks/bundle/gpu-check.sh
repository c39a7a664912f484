#!/bin/sh
# Hold bf16prof's predictions against this machine's GPU: no network, no root, no compiler. Needs python3 with torch.
# Usage: ./gpu-check.sh [--cpu] [--minutes 8]      PYTHON=python3.12 ./gpu-check.sh
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=${BF16PROF_CHECK_DIR:-$PWD/gpu-check}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gpu-check: Python 3.11 or newer is needed; set PYTHON" >&2; exit 2; }
"$python" -c 'import torch' 2>/dev/null || { echo "gpu-check: $python has no torch; set PYTHON" >&2; exit 2; }
mkdir -p "$work"
"$python" -m venv --system-site-packages "$work/venv"
# A venv made from a venv does not see that one's packages, and torch's libraries (libcudnn.so.9, ...) may lie in another folder than torch:
# name every folder that this python looks in, after the venv's own.
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import os, sys, sysconfig
own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
own |= {os.path.join(path, "lib-dynload") for path in own}
print("\n".join(path for path in sys.path[1:] if os.path.isdir(path) and path not in own))' > "$site/beside_torch.pth"
tag=$("$work/venv/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
rm -rf "$work/wheels"
tar -xJf "$here/wheels.tar.xz" -C "$work" 2>/dev/null || "$python" -m tarfile -e "$here/wheels.tar.xz" "$work"
wheels=$(find "$work/wheels" -name '*.whl' \( -name "*-$tag-*" -o -name '*-none-*' -o -name '*-abi3-*' \) | sort)
# shellcheck disable=SC2086
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --force-reinstall $wheels
cd "$work"
exec "$work/venv/bin/python" -m bf16prof.check "$@"
