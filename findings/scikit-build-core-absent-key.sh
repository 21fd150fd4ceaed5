#!/usr/bin/env bash
# scikit-build-core 1.1.2: a metadata provider is given the project table as a mapping in which an absent key is an
# error of another kind. project["version"] is there; project.get("urls", {}) of a project without urls raises
# "ValueError: Encountered a circular dependency at urls", although nothing depends on anything, and no default
# comes back, since a mapping's get() expects KeyError. It hits who takes links or authors into a description if
# there are any: such a provider works in projects that have them, and breaks the build of those that do not.
#
# Seen: with urls, the description has them; without, the ValueError above.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scikit-build-core==1.1.2
mkdir -p "$folder/project/tools"
cd "$folder/project"
printf 'cmake_minimum_required(VERSION 3.15)\nproject(sample NONE)\n' >CMakeLists.txt
cat >tools/text.py <<'PYTHON'
def dynamic_metadata(field, settings, project):
    links = project.get("urls", {})
    return {"content-type": "text/markdown", "text": f"{project['version']} has {len(links)} link"}
PYTHON

metadata() { # URLS...: in the last line, how the metadata end, or the error
  cat >pyproject.toml <<TOML
[build-system]
requires = ["scikit-build-core"]
build-backend = "scikit_build_core.build"
[project]
name = "sample"
version = "1.0"
dynamic = ["readme"]
$(printf '%s\n' "$@")
[tool.scikit-build]
experimental = true
metadata.readme = { provider = "text", provider-path = "tools" }
TOML
  "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import pathlib, tempfile
from scikit_build_core import build

with tempfile.TemporaryDirectory() as place:
    try:
        name = build.prepare_metadata_for_build_wheel(place)
        print(pathlib.Path(place, name, "METADATA").read_text().splitlines()[-1])
    except ValueError as error:
        print("ValueError:", error)
PYTHON
}

with_urls=$(metadata 'urls.Home = "https://example.org"' | tail -n 1)
without=$(metadata | tail -n 1)
echo "scikit-build-core 1.1.2: with urls: '$with_urls'; without: '$without'"
[[ $with_urls == "1.0 has 1 link" && $without == "ValueError: Encountered a circular dependency at urls" ]] || {
  echo "it has changed"
  exit 1
}
