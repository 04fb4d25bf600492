#!/usr/bin/env bash
# Runs the tests with several releases of torch and Python, each in a virtual environment of its own, and prints a table.
#
#   tests/versions.sh                          the releases that pyproject.toml promises, with this Python
#   tests/versions.sh 2.15.0 python3.13:2.15.0 these; an interpreter may stand before the release
#   tests/versions.sh 2.15.0 -- tests/loaders  arguments behind -- go to pytest
#
# Environments are kept in $VERSIONS_DIR (~/.cache/distaccum-versions), as the newest releases bring several GB each.
set -euo pipefail
cd "$(dirname "$0")/.."

versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do versions+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#versions[@]} -gt 0 ] || versions=(2.11.0 2.13.0 2.14.1 2.15.0)
folder=${VERSIONS_DIR:-$HOME/.cache/distaccum-versions}
mkdir -p "$folder"

status=0
table=
for version in "${versions[@]}"; do
    torch=${version##*:}
    interpreter=python3
    [ "$torch" = "$version" ] || interpreter=${version%%:*}
    environment=$folder/$(basename "$interpreter")-torch-$torch
    log=$environment.log
    echo "$version: see $log"
    if [ ! -x "$environment/bin/python" ]; then "$interpreter" -m venv "$environment"; fi
    ended=
    {
        echo "torch==$torch" >"$environment/constraints.txt"
        PIP_CONSTRAINT=$environment/constraints.txt "$environment/bin/pip" install -e '.[bench,docs,test]' &&
            PATH=$environment/bin:$PATH "$environment/bin/python" -m pytest "$@"
    } >"$log" 2>&1 || { ended=failed; status=1; }
    python=$("$environment/bin/python" -c 'import platform; print(platform.python_version())')
    table+=$(printf '%-10s %-10s %-7s %s' "$torch" "$python" "${ended:-passed}" "$(tail -n 1 "$log")")$'\n'
done
printf '%-10s %-10s\n%s' torch Python "$table"
exit $status
