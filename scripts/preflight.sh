#!/bin/sh
# Checks what an install needs before it downloads anything: one line for each finding, with its remedy.
# Exit 1 where the install could not work; a warning where it works with less.
#
#   PYTHON               the interpreter to use (python3)
#   VENV                 the environment that will be made (.venv)
#   CXX                  the C++ compiler (g++, c++ or clang++)
#   EDITR2_MIN_FREE_GB   free disk asked for (4: torch's CPU build and the rest; its CUDA builds need about 10)
set -u
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
MIN_GB=${EDITR2_MIN_FREE_GB:-4}

stop() { echo "preflight: $*" >&2; exit 1; }
warn() { echo "preflight: warning: $*" >&2; }
found() { command -v "$1" >/dev/null 2>&1; }

found "$PYTHON" ||
    stop "$PYTHON not found: apt-get install python3 python3-venv python3-dev, or make PYTHON=/path/to/python"
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    stop "$PYTHON does not run: repair it, or make PYTHON=/path/to/python"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    stop "$PYTHON is Python $version and 3.10 is the oldest supported: install a newer one, then make PYTHON=python3.11"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "Python $version lacks venv or ensurepip: apt-get install python$version-venv"

# Only a first install is large.
if ! ls -d "$VENV"/lib/python*/site-packages/torch >/dev/null 2>&1; then
    free_kb=$(df -Pk . 2>/dev/null | awk 'NR == 2 { print $4 }')
    if [ -n "$free_kb" ] && [ "$free_kb" -lt $((MIN_GB * 1048576)) ]; then
        stop "$((free_kb / 1048576)) GB free here and the install needs $MIN_GB: free some disk, or EDITR2_MIN_FREE_GB=0 to try anyway"
    fi
fi

without="the install goes on without the native operators and uses Triton or eager PyTorch"
if [ -n "${CXX:-}" ]; then
    found "${CXX%% *}" || warn "CXX=$CXX not found; $without: unset CXX, or apt-get install g++"
elif ! found g++ && ! found c++ && ! found clang++; then
    warn "no C++ compiler; $without: apt-get install g++"
fi
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    warn "Python $version has no C headers; $without: apt-get install python$version-dev"
exit 0
