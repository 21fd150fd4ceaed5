#!/usr/bin/env bash
# pybind11 3.0.1 to 3.1.0: a second extension of the same name, from another file, is the first one. The module is
# kept by its name for as long as the interpreter lives, also after it was dropped from sys.modules, and an import
# that finds another file under that name gets it again, with the old __file__. With 2.13.6 and 3.0.0 each file is a
# module of its own. It hits who compares two builds of one package in one process, or builds anew, to another
# path, what a running interpreter has imported: the new build seems to change nothing.
#
# Seen: builds that say 1 and 2: "1 2" with 2.13.6 and 3.0.0, "1 1" with 3.0.1 and 3.1.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python=$folder/venv/bin/python
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')

for version in 2.13.6 3.0.0 3.0.1 3.1.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "pybind11==$version"
  for build in 1 2; do
    mkdir -p "$folder/$version/$build"
    printf '#include <pybind11/pybind11.h>\nPYBIND11_MODULE(built, m) { m.attr("build") = %d; }\n' \
      "$build" >"$folder/built.cpp"
    c++ -std=c++17 -shared -fPIC -I"$include" -I"$("$python" -c 'import pybind11; print(pybind11.get_include())')" \
      "$folder/built.cpp" -o "$folder/$version/$build/built$suffix"
  done
  "$python" - "$folder/$version" "$version" <<'PYTHON'
import importlib, pathlib, sys

folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
found, paths = [], []
for build in ("1", "2"):
    sys.modules.pop("built", None)
    sys.path.insert(0, str(folder / build))
    importlib.invalidate_caches()
    module = importlib.import_module("built")
    found.append(module.build)
    paths.append(pathlib.Path(module.__file__).parent.name)
print(f"pybind11 {version}, Python {sys.version.split()[0]}: files 1 and 2 say", *found, "from", *paths)
assert found == ([1, 2] if version in ("2.13.6", "3.0.0") else [1, 1]), "it has changed"
PYTHON
done
