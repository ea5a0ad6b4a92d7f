#!/usr/bin/env bash
# bash install.sh                 what classification needs: no mmcv
# bash install.sh full            that, mmcv, mmdet and mmseg, and the tests; nothing is compiled: kt brings mmcv's operators
# bash install.sh full compiled   the same with mmcv's own operators, which compile for 15 to 30 minutes, once
#
# Makes .venv with Python 3.10 to 3.12 (PYTHON=... names one). A second run installs nothing again.
# KT_SYSTEM_TORCH=1 keeps the machine's own torch (2.4 or newer) instead of installing the pinned one.
set -euo pipefail
cd "$(dirname "$0")"

mode=${*:-classification}
case "$mode" in
  classification|full) ;;
  "full compiled") mode=compiled ;;
  *) echo "install.sh: unknown arguments '$mode': expected nothing, 'full' or 'full compiled'" >&2; exit 2 ;;
esac

stamp=$(cat pyproject.toml constraints.txt install.sh | sha256sum | cut -c1-16)-${KT_SYSTEM_TORCH:-0}
case "$mode" in  # what serves as well
  classification) enough="classification full compiled" ;;
  full) enough="full compiled" ;;
  compiled) enough=compiled ;;
esac
for done in $enough; do
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
  pip install -q "$(pin torch)" "$(pin torchvision)"
fi
extras=
[ "$mode" = classification ] || extras='[test]'
echo "kt: installing kt$extras"
pip install -q -c "$constraints" -e ".$extras"
if [ "$mode" != classification ]; then
  # Built apart from torch, mmcv leaves its operators out. Not from pip's cache: a wheel kept there may hold compiled ones.
  compiled() { .venv/bin/python -c 'import sys, torch, mmcv._ext; sys.exit(mmcv._ext.__file__.endswith(".py"))' 2>/dev/null; }
  mmcv=$(pin onedl-mmcv)
  if [ "$mode" = compiled ] && ! compiled; then
    echo "kt: compiling mmcv's operators, 15 to 30 minutes"
    pip install -q -c "$constraints" 'setuptools<81' wheel ninja psutil
    MMCV_WITH_OPS=1 pip install -q -c "$constraints" --no-cache-dir --force-reinstall --no-deps --no-build-isolation "$mmcv"
  elif [ "$mode" = full ]; then
    echo "kt: installing mmcv, mmdet and mmseg"
    MMCV_WITH_OPS=0 pip install -q -c "$constraints" --no-cache-dir "$mmcv"
  fi
  pip install -q -c "$constraints" -e '.[test,mm]'
  # Programs that import mmcv before kt find kt's operators as well: asked for, they import kt, which knows where they are.
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cat > "$site/kt-operators.pth" <<'PTH'
import sys; sys.meta_path.append(type("KtOperators", (), {"find_spec": staticmethod(lambda name, path=None, target=None: [__import__("kt")] and None if name == "mmcv._ext" else None)}))
PTH
fi
echo "$stamp" > ".venv/.kt-$mode"
echo "kt: ready"
