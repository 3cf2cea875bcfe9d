# Source this file: it sets PYTHON to an interpreter that has every dependency of pyproject.toml.
#
# The current python is used as it is where it has them all. Otherwise they are installed, once, into .venv in the
# project. .venv/tinydm-setup says how far that came: an install that was cut off is made anew by the next call.

setup_python() {
    local root venv state base="" word path started
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return
    venv="$root/.venv"
    state="$(cat "$venv/tinydm-setup" 2>/dev/null || true)"
    for word in python python3 "$venv/bin/python"; do
        path="$("$word" -c 'import sys; sys.version_info >= (3, 10) and print(sys.executable)' 2>/dev/null)" || continue
        [ -n "$path" ] || continue
        [ "$word" = "$venv/bin/python" ] && [ "$state" = installing ] && continue
        if "$path" "$root/scripts/dependencies.py" >/dev/null; then
            PYTHON="$path"
            return
        fi
        base="${base:-$path}"
    done
    if [ -z "$base" ]; then
        echo "error: no Python 3.10 or newer is on the PATH as python or python3; install one and run this again" >&2
        return 2
    fi
    if [ -e "$venv" ] && [ -z "$state" ]; then
        echo "error: $venv was not made by this project and lacks dependencies of pyproject.toml;" \
             "install them into it with '$venv/bin/python -m pip install -e .[test]', or remove it" >&2
        return 2
    fi

    started=$SECONDS
    echo "installing the dependencies of pyproject.toml into $venv (once; PyTorch is large)"
    [ "$state" = complete ] || rm -rf "$venv"
    mkdir -p "$venv" && echo installing > "$venv/tinydm-setup" || return 2
    if ! "$base" -m venv "$venv"; then
        echo "error: $base cannot make a virtual environment; install its venv package (on Debian python3-venv)," \
             "or activate an environment that has the dependencies of pyproject.toml" >&2
        return 2
    fi
    PYTHON="$venv/bin/python"
    "$PYTHON" "$root/scripts/dependencies.py" > "$venv/requirements.txt" || true       # 1: some are missing
    if ! install_requirements "$venv/requirements.txt"; then
        echo "error: the dependencies could not be installed (see above);" \
             "check the network and the disk space and run this again" >&2
        return 2
    fi
    echo complete > "$venv/tinydm-setup"
    echo "installed in $((SECONDS - started)) s"
}

# With uv, which is several times faster, where it can be had; else with pip.
install_requirements() {
    if "$PYTHON" -m pip install --quiet uv && "$PYTHON" -m uv pip install --quiet --python "$PYTHON" -r "$1"; then
        return
    fi
    "$PYTHON" -m pip install --quiet -r "$1"
}

setup_python
