# Sourced by the other scripts: a Python environment with everything in it. An active one is used as it is, else .venv is made.
# What is installed is remembered by the checksum of the requirements, so a rerun starts at once.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
fi
install() {
    local stamp sum
    stamp="$(python -c 'import sys; print(sys.prefix)')/.align_sd-$1"
    sum="$(cat ./*requirements.txt | cksum)" # they name one another
    [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ] && return
    python -m pip install --quiet -r "$1"
    echo "$sum" > "$stamp"
}
