"""Make `.venv` and install what a target needs, once: `python3 tools/environment.py book|dev [--cpu-index URL]`.

A stamp in the environment remembers what was installed; while settings.ini, setup.py and constraints.txt stay the same, a
second call returns at once. A lock lets one set-up run at a time, and a set-up that was interrupted is begun afresh.
This file runs on the system's Python, whatever its age, so it uses nothing new.
"""
import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 11)
SOURCES = ("settings.ini", "setup.py", "constraints.txt")


def fail(message):
    "Stop with one line."
    sys.exit("error: " + message)


def check_python(version=sys.version_info):
    "The book needs Python 3.11 or newer with its venv module."
    if tuple(version[:2]) < OLDEST:
        fail(
            "Python {}.{} or newer is needed, and {} is {}.{}; install one and say which, as in: make tour PYTHON=python3.12".format(
                OLDEST[0], OLDEST[1], sys.executable, version[0], version[1]
            )
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fail("this Python cannot make virtual environments; install its venv package (on Debian and Ubuntu: apt install python3-venv)")


def fingerprint():
    "What an installation depends on: the requirements and where the repository lies."
    digest = hashlib.sha256(ROOT.encode())
    for name in SOURCES:
        with open(os.path.join(ROOT, name), "rb") as source:
            digest.update(source.read())
    return digest.hexdigest()


def python_in(venv):
    "The environment's interpreter."
    return os.path.join(venv, "Scripts", "python.exe") if os.name == "nt" else os.path.join(venv, "bin", "python")


def works(venv):
    "Whether the environment's interpreter starts."
    try:
        return subprocess.call([python_in(venv), "-c", "pass"], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def ready(venv, extra):
    "Whether everything `extra` needs is installed (`dev` contains `book`)."
    for name in {"book": ("book", "dev"), "dev": ("dev",)}[extra]:
        try:
            with open(os.path.join(venv, ".ready-" + name)) as stamp:
                if stamp.read() == fingerprint() and os.path.exists(python_in(venv)):
                    return True
        except OSError:
            pass
    return False


@contextlib.contextmanager
def lock(path):
    "One set-up at a time; the lock goes with its process, however that ends."
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another set-up is at work here, waiting for it ...", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def install(venv, extra, cpu_index=None):
    "Fill the environment; only a finished installation leaves a stamp."
    begun = os.path.join(venv, ".installing")
    if os.path.isdir(venv) and (os.path.exists(begun) or not works(venv)):
        print("the last set-up did not finish: starting afresh", flush=True)
        shutil.rmtree(venv)
    start = time.time()
    if not os.path.isdir(venv):
        os.mkdir(venv)
        open(begun, "w").close()
        subprocess.check_call([sys.executable, "-m", "venv", venv])
    open(begun, "w").close()
    for stamp in (".ready-book", ".ready-dev"):
        with contextlib.suppress(OSError):
            os.remove(os.path.join(venv, stamp))
    pip = [python_in(venv), "-m", "pip", "install", "--disable-pip-version-check", "-c", "constraints.txt"]
    if cpu_index:
        subprocess.check_call(pip + ["torch", "torchvision", "--index-url", cpu_index], cwd=ROOT)
    print("installing dfkd_nb[{}] into {} (once; a minute or two, longer on a slow line)".format(extra, venv), flush=True)
    subprocess.check_call(pip + ["-e", ".[{}]".format(extra)], cwd=ROOT)
    with open(os.path.join(venv, ".ready-" + extra), "w") as stamp:
        stamp.write(fingerprint())
    os.remove(begun)
    print("set-up took {:.0f} s".format(time.time() - start), flush=True)


def main():
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extra", choices=["book", "dev"])
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"))
    parser.add_argument("--cpu-index", help="take torch and torchvision from this index first")
    options = parser.parse_args()
    if ready(options.venv, options.extra):
        return
    check_python()
    try:
        with lock(options.venv.rstrip("/\\") + ".lock"):
            if not ready(options.venv, options.extra):
                install(options.venv, options.extra, options.cpu_index)
    except subprocess.CalledProcessError as error:
        fail("`{}` failed; read pip's message above, then run the same command again".format(" ".join(map(str, error.cmd[:4]))))
    except KeyboardInterrupt:
        fail("interrupted; the next call starts afresh")


if __name__ == "__main__":
    main()
