#!/usr/bin/env bash
# bash install.sh        what classification needs: no mmcv, nothing to compile
# bash install.sh full   that, mmcv, mmdet and mmseg (mmcv compiles its operators, 15 to 20 minutes once), and the tests
#
# Makes .venv with Python 3.10 to 3.12 (PYTHON=... names one). A second run installs nothing again.
# KT_SYSTEM_TORCH=1 keeps the machine's own torch (2.4 or newer) instead of installing the pinned one.
set -euo pipefail
cd "$(dirname "$0")"

mode=${1:-classification}
case "$mode" in
  classification|full) ;;
  *) echo "install.sh: unknown argument '$mode': expected nothing or 'full'" >&2; exit 2 ;;
esac

stamp=$(cat pyproject.toml constraints.txt install.sh | sha256sum | cut -c1-16)-${KT_SYSTEM_TORCH:-0}
for done in "$mode" full; do
  if [ "$(cat ".venv/.kt-$done" 2>/dev/null)" = "$stamp" ]; then
    echo "kt: .venv is up to date"
    exit 0
  fi
done

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
if [ ! -x .venv/bin/python ]; then
  chosen=
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.10}; do
    if fits "$candidate"; then chosen=$candidate; break; fi
  done
  if [ -z "$chosen" ]; then
    echo "install.sh: no Python 3.10, 3.11 or 3.12 found; set PYTHON= to one" >&2
    exit 2
  fi
  system=()
  [ "${KT_SYSTEM_TORCH:-0}" = 1 ] && system=(--system-site-packages)
  if ! "$chosen" -m venv "${system[@]}" .venv; then
    rm -rf .venv
    echo "install.sh: $chosen cannot make a virtual environment; on Debian: apt-get install python3-venv python3-dev" >&2
    exit 2
  fi
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pin() { grep "^$1=" constraints.txt | cut -d' ' -f1; }
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
if [ "${KT_SYSTEM_TORCH:-0}" = 1 ]; then
  grep -vE '^(torch|torchvision|numpy|triton|nvidia-|cuda-)' constraints.txt > "$constraints"
else
  cp constraints.txt "$constraints"
  echo "kt: installing torch"
  # With `==`, a platform's own CPU build of torch may be taken, which torchvision's build does not fit.
  pip install -q "$(pin torch)" "$(pin torchvision)" 'setuptools<81' wheel ninja psutil
fi
extras=
[ "$mode" = full ] && extras='[test]'
echo "kt: installing kt$extras"
pip install -q -c "$constraints" -e ".$extras"
if [ "$mode" = full ]; then
  echo "kt: installing mmcv, mmdet and mmseg; the first time, mmcv compiles for 15 to 20 minutes"
  MMCV_WITH_OPS=1 pip install -q -c "$constraints" --no-build-isolation "$(pin onedl-mmcv)"
  pip install -q -c "$constraints" -e '.[test,mm]'
fi
echo "$stamp" > ".venv/.kt-$mode"
echo "kt: ready"
