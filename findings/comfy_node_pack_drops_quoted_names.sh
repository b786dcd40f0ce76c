#!/usr/bin/env bash
# comfy-cli 1.23.0: `comfy node pack` leaves out tracked files whose names git quotes.
#
# The archive is made from the lines of `git ls-files`. With git's default core.quotePath, a name with a letter outside
# ASCII is printed quoted and escaped ("W\303\274rstchen.json"); no file has that literal name, so comfy-cli prints
# "File not found" and goes on with exit code 0. With core.quotePath=false the file is packed.
# Consequence here: every file of this repository has an ASCII name, and tests/test_packaging.py checks the archive.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet comfy-cli==1.23.0

mkdir "$work/pack" && cd "$work/pack"
git init --quiet .
printf '{}' > plain.json
printf '{}' > Würstchen.json
git add .

names() {
    "$work/venv/bin/python" -c 'from comfy_cli.file_utils import zip_files; zip_files("../out.zip")' > "$work/log"
    "$work/venv/bin/python" -c 'import zipfile; print(" ".join(sorted(zipfile.ZipFile("../out.zip").namelist())))'
}

git config core.quotePath true
quoted=$(names)
grep "File not found" "$work/log"
git config core.quotePath false
unquoted=$(names)
echo "core.quotePath=true packs:  $quoted"
echo "core.quotePath=false packs: $unquoted"
[ "$quoted" = "plain.json" ] && [ "$unquoted" = "Würstchen.json plain.json" ] || {
    echo "behaviour has changed"
    exit 1
}
