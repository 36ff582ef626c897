#!/usr/bin/env bash
# Debian's Chromium, which draws PNG figures and opens pages in tests: installed if it is absent and
# this is root.
set -euo pipefail

if command -v chromium >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "chromium is not installed, and only root can install it (Debian: apt-get install chromium)"
  exit 1
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium >/dev/null
