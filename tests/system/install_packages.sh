#!/usr/bin/env bash
# What tests need of the system, where this user may install it: SLURM for tests/system/test_slurm*.py and FFmpeg's
# libraries for tests/unit/data/test_torchcodec.py, which are skipped without it.
set -u
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0
PATH=$PATH:/usr/sbin
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -qq --no-install-recommends "$@"; }
need() { # PACKAGE... that are not there; a list of packages that is out of date is fetched anew
  { install "$@" || { apt-get update -qq && install "$@"; }; } >/dev/null 2>&1 || echo "not installed: $*; tests are skipped"
}
command -v slurmctld >/dev/null && command -v munged >/dev/null || need slurm-wlm munge
ldconfig -p | grep -q libavfilter || need ffmpeg
exit 0
