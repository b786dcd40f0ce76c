#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0: --dist loadgroup runs tests of one xdist_group in several processes, silently.
#
# pytest-xdist appends "@GROUP" to a private attribute, from which pytest 9.2 no longer makes the ids of tests. The mark is
# known, the option is accepted, "scheduling tests via LoadGroupScheduling" is printed, and each test is scheduled alone:
# tests that must not run at the same time do, and fixtures of a session or module are made in each process. With pytest
# 9.1.1 the groups hold. loadfile and loadscope take the files and classes from the ids, and still work.
# Consequence here: requirements-test.txt has pytest<9.2, since each process started every ComfyUI.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"

cat > "$work/test_groups.py" <<'PY'
import os
import pathlib
import time

import pytest


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("group", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in "ab"])
def test_a_group_has_one_process(group, number):
    time.sleep(0.1)
    pathlib.Path(os.environ["FOUND"], f"{group} {os.environ['PYTEST_XDIST_WORKER']}").touch()
PY

count() { # the number of processes of group a
  rm -rf "$work/found"
  mkdir "$work/found"
  FOUND=$work/found "$work/venv/bin/python" -m pytest -p no:cacheprovider -q -n 2 --dist loadgroup "$work" > "$work/log"
  find "$work/found" -name "a *" | wc -l
}

for pytest in 9.1.1 9.2.0; do
  "$work/venv/bin/python" -m pip install --quiet pytest==$pytest pytest-xdist==3.8.0
  found[${pytest//./}]=$(count)
  echo "pytest $pytest: processes of one group: ${found[${pytest//./}]}"
done
[ "${found[911]}" = 1 ] && [ "${found[920]}" = 2 ] || { echo "behaviour has changed"; exit 1; }
