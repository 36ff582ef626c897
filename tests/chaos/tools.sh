#!/usr/bin/env bash
# Debian's strace, which ends runs at a chosen call in tests: installed if it is absent and this is
# root. Fails where it may not trace.
set -euo pipefail

if ! command -v strace >/dev/null; then
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "strace is not installed, and only root can install it (Debian: apt-get install strace)"
    exit 1
  fi
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends strace >/dev/null
fi
strace -o /dev/null -e inject=getcwd:error=EIO true
