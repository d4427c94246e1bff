#!/usr/bin/env bash
# Fails when dpag/ is not what the notebooks export, README.md is not what nbs/index.ipynb says, or a notebook carries metadata that nbdev_clean would strip.
set -euo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
cp -r nbs settings.ini pyproject.toml "$tmp/"; [ -f README.md ] && cp README.md "$tmp/"
mkdir "$tmp/.git"; (cd "$tmp" && nbdev_export && nbdev_clean)
diff -r -x __pycache__ -x "*.yaml" dpag "$tmp/dpag" || { echo "dpag/ differs from what nbs/ exports: run nbdev_export"; exit 1; }
diff -rq -x .ipynb_checkpoints nbs "$tmp/nbs" || { echo "notebooks are not clean: run nbdev_clean"; exit 1; }
python tools/make_readme.py --check
echo "export check: dpag/, notebooks and README.md are in step"
