#!/bin/sh
# A machine without any Python: take Debian's, or say how.
set -eu
if ! command -v apt-get >/dev/null; then
    echo "Helios needs Python 3.11 or newer; install it and run this again." >&2
    exit 1
elif [ "$(id -u)" = 0 ]; then
    as_root=
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "Helios needs Python 3.11 or newer. Run this, then the same again:" >&2
    echo "  sudo apt-get install -y python3 python3-venv python3-dev" >&2
    exit 1
fi
echo "[setup] installing python3"
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get install -y -qq --no-install-recommends python3 >/dev/null 2>&1 || {
    $as_root apt-get update -qq
    $as_root apt-get install -y -qq --no-install-recommends python3 >/dev/null
}
